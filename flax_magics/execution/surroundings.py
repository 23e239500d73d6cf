"""Where a command may not stand: inside a function that JAX traces, in a host callback, or inside another command.

There it would run once for many calls, pass no gradient on, or take a draw that another command is making. So it
refuses before anything happens, with the plain Flax to write in its place.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from functools import cache
from types import FrameType
from typing import TYPE_CHECKING

from ..base import private
from ..errors import FlaxMagicsError, written
from ..line.expression import with_arguments
from ..models.base import Needs
from ..models.calls import has_tracer
from ..models.construction import Construction
from ..run import DrawNumber, Run
from ..state.entry import LinenEntry, ModelEntry, NnxEntry, by_kind
from . import record
from .call import Call, of_module, prepare, trace_shapes, with_keys

if TYPE_CHECKING:
    from ..line.options import ApplyOptions
    from ..state.state import State

TRACE = "in a function that JAX traces: it would happen once, while JAX traces, and be no part of what then runs"
CALLBACK = "in a host callback, and the program that calls it waits for it"
COMMAND = "in code that another command runs, and the draw of that one is not finished"


def stand_outside(refused: Callable[..., FlaxMagicsError], *what: object) -> None:
    """Raises `refused(where, *what)` inside a traced function, a host callback or another command.

    Every method of a session that draws, runs or changes it calls this first.
    """
    if (where := surroundings(sys._getframe(1))) is not None:
        raise refused(where, *what)


def surroundings(frame: FrameType | None = None) -> str | None:
    """What the code that calls the session is part of, in words for a message; None where it may draw and run.

    Args:
      frame: of the session's method that was called; None for the caller of this function.
    """
    tracing = TRACE if private.is_tracing() else None
    outside = around(caller_of(sys._getframe(1) if frame is None else frame))
    return tracing or outside if outside == CALLBACK else outside or tracing


def caller_of(frame: FrameType) -> FrameType:
    """The frame that called this package, of which `frame` is one: those of this package in between are one command's."""
    while frame.f_back is not None and str(frame.f_globals.get("__name__")).startswith(_OWN):
        frame = frame.f_back
    return frame


def around(frame: FrameType) -> str | None:
    """`surroundings` as far as the frames on the stack tell, from that of the caller of a command outwards."""
    walk: FrameType | None = frame
    tracing: str | None = None
    # A cell's or script's own frame ends the walk: the kernel's frames below, some 50, take as long as a small run.
    while walk is not None and walk.f_code.co_name != "<module>":
        name = walk.f_globals.get("__name__")
        role = _role_of(name) if isinstance(name, str) else None
        if role is not None:
            if role != "trace":
                return COMMAND if role == "command" else tracing or CALLBACK
            tracing = TRACE
        walk = walk.f_back
    return tracing


@cache
def _role_of(module: str) -> str | None:
    """`private.role_of`, or `command` for a module of `_COMMANDS`."""
    return "command" if module in _COMMANDS else private.role_of(module)


_OWN = "flax_magics."
_COMMANDS = ("flax_magics._session", "flax_magics.training.methods")
"""Where the methods of a session are: a frame of these is one of a command."""


Instead = tuple[str, list[str], str]
"""What to do in the place of a command: in words, as lines for a notebook (none if they are not known), with gaps."""


def of_apply(where: str, state: State, entry: ModelEntry, call: Call, options: ApplyOptions) -> FlaxMagicsError:
    """The error for an apply that stands there: plain Flax with the same variables, mode, streams and collections."""
    return _error(f"{call.command} {call.text} stands {where}.", *_instead(entry, where, state, call, options))


def _apply_by_hand(entry: LinenEntry, where: str, state: State, call: Call, options: ApplyOptions) -> Instead:
    name, model = entry.name, f"session.models['{entry.name}']"
    variables, key, module = f"{model}.variables", "session.key('dropout')", f"{model}.module"
    lines: list[str] = []
    if call.cell is not None:
        variables, key, module = f"%flax_vars {name}", "%flax_key dropout", name
        lines = _lines_of_apply(state, entry, call, options, where)
    applied = f"{module}.apply(variables, …, rngs={{'dropout': dropout_key}})"
    form = f"variables = {variables}\ndropout_key = {key}\n{applied}"
    return "Take variables and keys before it, and call the model with them.", lines, form


def _module_itself(entry: NnxEntry, where: str, state: State, call: Call, options: ApplyOptions) -> Instead:
    name, lines = entry.name, list[str]()
    with contextlib.suppress(FlaxMagicsError):  # the call does not fit: it is told so where it may stand
        filled = with_keys(entry, call, options, state.root.draw())
        arguments = [f"{key}={key}_key" for key in options.key]
        keys = dict.fromkeys(options.key)
        if prepare(name, entry.model, filled, options.mode).model.supplied_arguments():
            arguments.append("rngs=nnx.Rngs(dropout_key)")
            keys["dropout"] = None
        lines += [] if options.mode is None else [f"{name}.{options.mode}()"]
        lines += [f"{key}_key = %flax_key {key}" for key in keys]
        lines = of_module(name, entry.model, [*lines, with_arguments(call.text, arguments)])
    instead = (
        "Call the module itself there: nnx.grad, nnx.jit and the like see what it changes, where jax.grad and jax.jit"
        " do not."
    )
    if call.cell is None:
        return instead, [], f"session.models['{name}'].module(…)"
    return instead, lines, f"{name}(…)"


_instead = by_kind(_apply_by_hand, _module_itself)


def of_init(where: str, entry: ModelEntry, call: Call) -> FlaxMagicsError:
    """The error for an init that stands there."""
    said = f"{call.command} {call.text} stands {where}."
    if entry.built_by_user:
        return FlaxMagicsError(said)
    if entry.built is not None:
        return of_build(said, entry.name, entry.built.recipe)
    model = entry.linen.model
    lines: list[str] = []
    if call.cell is not None:
        with contextlib.suppress(FlaxMagicsError):  # the call does not fit: it is told so where it may stand
            switches = record.facts_of_init(call, model)
            by_hand = model.init_by_hand(call.text, call.method, switches.init_arguments, switches.init_module)
            lines = of_module(entry.name, model, ["params_key = %flax_key params", f"variables = {by_hand}"])
    form = f"params_key = session.key('params')\nvariables = session.models['{entry.name}'].module.init(params_key, …)"
    return _error(said, "Draw the key before it, and initialise with that.", lines, form)


def of_build(said: str, name: str, recipe: Construction) -> FlaxMagicsError:
    """The error for a construction of an NNX module by the session."""
    keys = [f"{stream}_key = %flax_key {stream}" for stream in ("params", "dropout")]
    return _error(said, "Draw the keys before it, and build with them.", [*keys, recipe.by_hand(name)])


def of_register(where: str, name: str, module: object, cell: int | None) -> FlaxMagicsError:
    """The error for registering a model there, or a construction for the session to build."""
    said = f"`{name}` is registered {where}."
    if isinstance(module, Construction):
        return of_build(said, name, module)
    line = f"session.register('{name}', {name})" if cell is None else f"%flaxmodel {name}"
    return _error(said, "Register it before.", [line])


def of_key(where: str, name: str, cell: int | None) -> FlaxMagicsError:
    """The error for drawing a key there."""
    line = f"{name}_key = session.key('{name}')" if cell is None else f"{name}_key = %flax_key {name}"
    return _error(f"the key `{name}` is drawn {where}.", "Draw it before, and use it there.", [line])


def of_replay(where: str, draw: DrawNumber | str | Run) -> FlaxMagicsError:
    """The error for replaying a draw there; `draw` as in `Session.replay`."""
    if isinstance(draw, Run):
        draw = draw.seed, draw.draw
    line = f"%flax_replay {':'.join(map(str, draw)) if isinstance(draw, tuple) else draw}"
    return of_state(where, line, line)


def of_state(where: str, what: str, line: str) -> FlaxMagicsError:
    """The error for another change of the session there, such as a restart."""
    return _error(f"{what} stands {where}.", "Write it before or after.", [line])


def _error(said: str, instead: str, lines: list[str], form: str | None = None) -> FlaxMagicsError:
    text = f"{said} {instead}"
    return FlaxMagicsError(text, **written("\n".join(lines))) if lines else FlaxMagicsError(text, form=form)


def _lines_of_apply(state: State, entry: ModelEntry, call: Call, options: ApplyOptions, where: str) -> list[str]:
    """Lines to paste: variables, a key for each stream of the call, and the call by hand; none if unknown."""
    options = options._replace(samples=None)
    try:
        call = with_keys(entry, call, options, state.root.draw())
        bound = prepare(entry.name, entry.model, call, options.mode)
        needs = entry.known_needs.get((call.method, bound.mode))
        if needs is None and where == COMMAND:  # a trace may run into the very model that the other command runs
            needs = Needs(frozenset({"dropout"}))
        needs = needs or trace_shapes(entry, bound, state.root.draw()).needs
        code = record.by_hand(bound, options, needs, {*needs.mutable, *options.mutable})
    except Exception:  # the call does not fit, or the model raises: it is told so where it may stand
        return []
    # The name of a traced argument stands for nothing outside of the traced function.
    text = f"{call.text.partition('(')[0]}(…)" if has_tracer(call.args, call.kwargs) else call.text
    variables = f"%flax_init {text}" if entry.variables is None else f"%flax_vars {entry.name}"
    keys = dict.fromkeys((*options.key, *sorted(needs.streams)))
    lines = [f"variables = {variables}", *(f"{key}_key = %flax_key {key}" for key in keys), code]
    return of_module(entry.name, entry.model, lines)
