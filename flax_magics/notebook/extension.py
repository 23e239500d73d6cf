"""The extension: adds the commands to a shell, and takes them away again."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary, ref

from ..cells.journal import Journal, in_notebook
from ..code.library import library
from ..errors import FlaxMagicsError
from .completion import Matcher
from .magics import FlaxMagics
from .notebook import existing
from .run_cell import line_magic_transformer

if TYPE_CHECKING:
    from .._session import Session

_loaded: dict[Any, tuple[FlaxMagics, Matcher]] = {}
_left: WeakKeyDictionary[Any, tuple[ref[Session], Journal, int]] = WeakKeyDictionary()
"""For a shell that has unloaded it: its session then, the journal of the session's cells, and the number of that cell."""


def load(shell: Any) -> None:
    """Registers the commands in a shell, once however often it is loaded. Prints nothing."""
    if shell in _loaded:
        return
    magics = FlaxMagics(shell=shell, parent=shell)  # this also adds it to `shell.configurables`, for %config
    notebook = magics.notebook
    session, journal, number = _left.pop(shell, (lambda: None, notebook.journal, 0))
    if existing() is not None and session() is existing():  # else an export would not know whose draws these are
        notebook.journal = journal
        if number != notebook.number:
            journal.end_unheard(number)
    notebook.fit_terminal()  # for the rest of this cell
    matcher = Matcher(shell, notebook.names, magics.traits(config=True))
    shell.register_magics(magics)
    # Cleanup transformers run before IPython turns magics into calls, line by line.
    shell.input_transformers_cleanup.append(line_magic_transformer)
    matcher.install()
    shell.events.register("pre_run_cell", notebook.begin_cell)
    shell.events.register("post_run_cell", magics.end_cell)
    shell.events.register("post_execute", notebook.end_silent)
    library.in_cells(True)
    in_notebook(notebook.executed, lambda: notebook.number)
    FlaxMagicsError.before_shown = notebook.show_error
    _loaded[shell] = magics, matcher


def unload(shell: Any) -> None:
    """Removes everything, hooks first. The session stays, for `%reload_ext` and `flax_magics.session()`."""
    if shell not in _loaded:
        return
    magics, matcher = _loaded.pop(shell)
    if (session := existing()) is not None:
        _left[shell] = ref(session), magics.notebook.journal, magics.notebook.number
    shell.events.unregister("pre_run_cell", magics.notebook.begin_cell)
    shell.events.unregister("post_run_cell", magics.end_cell)
    shell.events.unregister("post_execute", magics.notebook.end_silent)
    library.in_cells(False)
    in_notebook(None)
    FlaxMagicsError.before_shown = staticmethod(lambda error: 0)
    matcher.uninstall()
    with suppress(ValueError):  # it was removed by other code
        shell.input_transformers_cleanup.remove(line_magic_transformer)
    with suppress(ValueError):
        shell.configurables.remove(magics)
    manager = shell.magics_manager
    # IPython has no call for this. A command that other code has replaced meanwhile is not ours to remove.
    for kind, names in magics.magics.items():
        for name in names:
            if getattr(manager.magics[kind].get(name), "__self__", None) is magics:
                del manager.magics[kind][name]
    manager.registry.pop(type(magics).__name__, None)
