"""Tracebacks that show the user's frames alone.

IPython asks an exception for `_render_traceback_` before it formats frames (7.34, 9, and ipykernel through them). The
shell's own formatter, mode and colors are still used: only frames and causes are chosen here.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import zip_longest
from types import TracebackType
from typing import Any

from ..errors import FlaxMagicsError

PACKAGES = ("flax_magics", "flax", "jax", "jaxlib", "IPython", "ipykernel", "traitlets", "decorator", "numpy")
"""Packages whose frames are left out of tracebacks."""
MACHINERY = ("contextlib", "functools", "threading", "concurrent.futures")
"""Modules of the standard library whose frames are left out: they only pass a call on."""
_DROPPED = ("JaxStackTraceBeforeTransformation", "UnfilteredStackTrace", "SimplifiedTraceback")
"""Types of the causes that JAX attaches to keep its own frames."""
_Step = tuple[int, int]
_Inside = Callable[[TracebackType, TracebackType | None], bool]
"""(a step of a traceback, the step after it) → whether to leave it out."""
_JAX_NOTE = "For simplicity, JAX has removed its internal frames"


def show_user_frames(exc: BaseException, shell: Any, hint: tuple[str, ...] = ()) -> None:
    """Has IPython show `exc` with the user's frames, its message, and the lines of `hint`.

    An exception that renders itself (such as `FlaxMagicsError`), or that takes no attributes, stays as it is. A hint
    that was set before stays while the same error is still propagating.

    Args:
      exc: the error that is being handled; the caller raises it again.
      shell: an `InteractiveShell`; with None nothing is done.
      hint: lines below the message.
    """
    if shell is None or hasattr(type(exc), "_render_traceback_"):
        return
    rendering = getattr(exc, "__dict__", {}).get("_render_traceback_")
    end = None
    if isinstance(rendering, _Rendering):
        # Shown before and raised again: Python has added the new frames above the old ones, which are left out.
        hint, end = (hint, rendering.shown) if rendering.shown else (hint or rendering.hint, rendering.end)
    with suppress(AttributeError):
        exc._render_traceback_ = _Rendering(shell, hint, end)  # type: ignore[attr-defined]


def end_in_cell(error: FlaxMagicsError, shell: Any) -> None:
    """Has `%debug` and `%pdb` begin in the user's own code: the code of ours that found the mistake is of no use there.

    Called as IPython shows the error, which renders itself and would leave the debugger what the error before it left.
    """
    steps: list[TracebackType] = []
    inside, trace = _inside(), error.__traceback__
    while trace is not None:
        steps += [] if steps and inside(trace, None) else [trace]  # IPython takes the first for its own
        trace = trace.tb_next
    if len(steps) > 1:
        for step in reversed(steps):
            trace = TracebackType(trace, step.tb_frame, step.tb_lasti, step.tb_lineno)
        error.__traceback__ = sys.last_traceback = shell.InteractiveTB.tb = trace


def stopped(error: KeyboardInterrupt, doing: str | None, remaining: str = "") -> None:
    """Has IPython show an interrupt as one line, since it does not matter where in our code or XLA's it fell.

    Args:
      error: the interrupt; the caller raises it again.
      doing: what was being done, such as `compiling net`; None if it was done before the interrupt was noticed.
      remaining: what it leaves, such as `kept: its 300 finished steps`; empty where the session is as it was before.
    """
    late = "heard only when the command was done, and it counts"
    said = late if doing is None else f"stopped while {doing}; {remaining or 'the session is as it was before'}"
    error._render_traceback_ = lambda: [f"KeyboardInterrupt: {said}"]  # type: ignore[attr-defined]


class _Rendering:
    """IPython calls it for the lines of a traceback. It holds no exception: that cycle would keep arrays alive.

    Args:
      end: the step at which an earlier raise of the same exception begins, None if there was none.
    """

    def __init__(self, shell: Any, hint: tuple[str, ...], end: _Step | None) -> None:
        self.shell, self.hint, self.end = shell, hint, end
        self.shown: _Step | None = None

    def __call__(self) -> list[str]:
        # IPython calls without the exception: find the one that is being shown.
        raised = (sys.exc_info()[1], getattr(sys, "last_exc", None), getattr(sys, "last_value", None))
        exc = next((exc for exc in raised if getattr(exc, "__dict__", {}).get("_render_traceback_") is self), None)
        if exc is None:
            return list(self.hint)
        self.shown = _identity(exc.__traceback__)
        formatter = self.shell.InteractiveTB
        try:
            with _users_view(exc, _inside(), self.end) as links:
                if any(link.__traceback__ is not None for link in links):
                    lines = formatter.structured_traceback(type(exc), exc, exc.__traceback__, tb_offset=0)
                else:
                    lines = formatter.get_exception_only(type(exc), exc)
        # A formatter that fails must not hide the error itself.
        except Exception:
            lines = [f"{type(exc).__name__}: {exc}"]
        return [*lines[:-1], lines[-1].rstrip("\n"), *self.hint]


@contextmanager
def _users_view(exc: BaseException, inside: _Inside, end: _Step | None) -> Iterator[list[BaseException]]:
    """Reduces the chain of `exc` to the user's frames and causes, and restores it after the block."""
    saved: list[tuple[Any, ...]] = []
    link: BaseException | None = exc
    try:
        # Chains of exceptions can be cyclic.
        while link is not None and not any(link is entry[0] for entry in saved):
            notes = getattr(link, "__notes__", None)
            saved.append((link, link.__traceback__, link.__cause__, link.__context__, link.__suppress_context__, notes))
            cause, context = _next(link, inside)
            trace = None
            # `tb_next` cannot skip steps: the chain is built anew, from the innermost step outwards.
            for step in reversed(_user_steps(link.__traceback__, inside, end)):
                trace = TracebackType(trace, step.tb_frame, step.tb_lasti, step.tb_lineno)
            link.__traceback__ = trace
            link.__cause__, link.__context__, link.__suppress_context__ = cause, context, context is None
            if isinstance(notes, list):
                link.__notes__ = [note for note in notes if _JAX_NOTE not in str(note)]
            link = cause or context
        yield [entry[0] for entry in saved]
    finally:
        for link, trace, cause, context, suppress, notes in saved:
            link.__traceback__, link.__cause__, link.__context__ = trace, cause, context
            link.__suppress_context__ = suppress
            if notes is not None:
                link.__notes__ = notes


def _next(exc: BaseException, inside: _Inside) -> tuple[BaseException | None, BaseException | None]:
    """The next exception of the chain to show, as (cause, context), of which one is None."""
    seen = {id(exc)}
    explicit = exc.__cause__ is not None
    link = exc.__cause__ or (None if exc.__suppress_context__ else exc.__context__)
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        # A cause without frames is one that the user made: `raise … from ValueError(…)`.
        by_hand = link is exc.__cause__ and link.__traceback__ is None
        if type(link).__name__ not in _DROPPED and (by_hand or _user_steps(link.__traceback__, inside)):
            return (link, None) if explicit else (None, link)
        explicit = explicit and link.__cause__ is not None
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)
    return None, None


def _user_steps(trace: TracebackType | None, inside: _Inside, end: _Step | None = None) -> list[TracebackType]:
    """The steps in the user's code, up to the one that `end` identifies."""
    steps = []
    while trace is not None and (end is None or _identity(trace) != end):
        steps.append(trace)
        trace = trace.tb_next
    return [step for step, following in zip_longest(steps, steps[1:]) if not inside(step, following)]


def _identity(step: TracebackType | None) -> _Step | None:
    """Identifies a step without keeping it, and so its frame's arrays, alive."""
    return None if step is None else (id(step), id(step.tb_frame.f_code))


def _inside() -> _Inside:
    """Makes the test for steps to leave out: of `PACKAGES`, of `MACHINERY`, and lines that only start a magic."""
    # A module that is not imported has no frames, so looking must not import it.
    modules = [sys.modules[name] for name in (*PACKAGES, *MACHINERY) if name in sys.modules]
    folders = [folder + os.sep for module in modules for folder in getattr(module, "__path__", ())]
    places = (*folders, *(str(module.__file__) for module in modules if not hasattr(module, "__path__")))

    def inside(step: TracebackType, following: TracebackType | None) -> bool:
        code = step.tb_frame.f_code
        file = code.co_filename
        if file.startswith(places) or file.startswith(("<frozen importlib", "<decorator-gen", "<flax_magics")):
            return True
        if file == "<string>" and code.co_name.startswith("__"):
            return True  # a method made by `dataclasses`, which has no source to show
        if following is None or step.tb_frame.f_locals is not step.tb_frame.f_globals:
            return False
        return following.tb_frame.f_code.co_name in ("run_line_magic", "run_cell_magic")

    return inside
