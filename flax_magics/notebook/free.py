"""Lets go of what a shell keeps of cells that have run: their last error with its frames, and values in `Out`.

The shell is an argument: nothing here imports IPython.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import jax

from ..base.text import plural
from ..doctor.findings import LAST_ERROR, bytes_by_device, freed_bundle, live_arrays, reached

if TYPE_CHECKING:
    from ..doctor.findings import Freed
    from .notebook import Notebook

LAST_VALUES = ("_", "__", "___")
NAMED = 6
"""How many entries of `Out` are named."""
BY_ITSELF = "out of memory, so %flax_free ran; %config FlaxMagics.free = False turns it off"


def free(notebook: Notebook, *, replays: bool = False, failed: Any = None) -> Freed:
    """Lets go of what pins device memory, and says what is still held and by whom.

    Args:
      replays: let go of what is held for replays alone, too.
      failed: IPython's result of a cell that has just failed, of whose error the frames go; models then stay whatever
        became of their names.
    """
    shell, session = notebook.shell, notebook.session
    names, before = shell.user_ns, bytes_by_device(live_arrays())
    had_error, values = _forget_error(shell, failed), _forget_values(shell, session)
    gone = [name for name in session.models if name in notebook.bound and name not in names]
    return session.run_free(
        replays=replays,
        names=names,
        dropped=gone if failed is None else (),
        let_go=[*([LAST_ERROR] if had_error else []), *values],
        before=before,
        stops=(shell,),
    )


def free_after(notebook: Notebook, failed: Any, style: str) -> dict[str, object]:
    """The MIME bundle of a `free` after a cell that failed for want of device memory; empty after any other.

    Args:
      failed: IPython's result of the cell.
    """
    if not any(map(_is_of_memory, _chain(failed.error_in_exec))):
        return {}
    return freed_bundle(free(notebook, failed=failed), style, BY_ITSELF)


def _is_of_memory(error: BaseException) -> bool:
    # The host's memory is the device's where that is the CPU.
    if isinstance(error, MemoryError):
        return jax.default_backend() == "cpu"
    text = str(error)
    return isinstance(error, jax.errors.JaxRuntimeError) and ("RESOURCE_EXHAUSTED" in text or "OUT_OF_MEMORY" in text)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error, and those that it was raised from or in the handling of."""
    waiting, seen = [error], set[int]()
    while waiting:
        link = waiting.pop()
        if link is not None and id(link) not in seen:
            seen.add(id(link))
            yield link
            waiting += [link.__cause__, link.__context__]


def _forget_error(shell: Any, failed: Any) -> bool:
    """Has the shell forget the last error, for `%debug` and `%tb` too. Returns whether there was one."""
    formatter, last = shell.InteractiveTB, shell.last_execution_result
    had_error = getattr(formatter, "tb", None) is not None or getattr(last, "error_in_exec", None) is not None
    # A debugger that was left keeps the frames that it stood in.
    formatter.tb = formatter.pdb = shell.last_execution_result = None
    users = {id(value) for value in shell.user_ns.values()}
    for link in _chain(None if failed is None else failed.error_in_exec):
        # The caller holds the result of the cell, which nobody asks for frames any more.
        if id(link) not in users:
            link.__traceback__ = None
    return had_error


def _forget_values(shell: Any, session: Any) -> list[str]:
    """Takes values that hold arrays out of `Out`, and away from `_`, `__`, `___` and `_N`. Returns what, in words.

    A name among these that the user has bound otherwise stays.
    """
    live, names, hidden, hook = live_arrays(), shell.user_ns, shell.user_ns_hidden, shell.displayhook
    stops = {id(shell), id(names), id(session)}
    outputs: dict[Any, Any] = names.get("_oh", {})
    numbers = [number for number, value in outputs.items() if reached(value, live, stops)]
    for number in numbers:
        value = outputs.pop(number)
        # The shell notes down what it has bound itself, and so holds it once more.
        hidden.pop(f"_{number}", None)
        if names.get(f"_{number}") is value:
            del names[f"_{number}"]
    last = [name for name in LAST_VALUES if reached(getattr(hook, name, None), live, stops)]
    for name in last:
        if names.get(name) is getattr(hook, name):
            names[name] = ""
        hidden[name] = ""
        setattr(hook, name, "")
    if len(numbers) > NAMED:
        return [f"{plural(len(numbers), 'value')} in Out"]
    return [", ".join(f"Out[{number}]" for number in numbers)] if numbers else last[:1]
