"""Loading into an IPython shell, and leaving it without a trace."""

from __future__ import annotations

import weakref
from typing import Any

from .cells import line_magic_transformer
from .complete import Matcher, install, uninstall
from .current import in_notebook
from .library import library
from .magics import FlaxMagics
from .preload import Preload

_loaded: weakref.WeakKeyDictionary[Any, tuple[FlaxMagics, Matcher, Preload]] = weakref.WeakKeyDictionary()


def load(shell: Any) -> None:
    """Registers the commands. Prints nothing; loading twice is loading once."""
    if shell in _loaded:
        return
    magics = FlaxMagics(shell=shell, parent=shell)  # adds itself to the shell's configurables, for %config
    shell.register_magics(magics)
    shell.input_transformers_cleanup.append(line_magic_transformer)
    matcher = Matcher(shell, magics.model_names)
    install(shell, matcher)
    shell.events.register("pre_run_cell", magics.begin_cell)
    shell.events.register("post_run_cell", magics.journal.end)
    shell.events.register("post_run_cell", magics.end_cell)
    library.in_cells(True)
    in_notebook(magics.executed, magics.cell_number)
    preload = Preload(shell.events, magics.notebook.prepare)
    preload.begin()
    _loaded[shell] = magics, matcher, preload


def unload(shell: Any) -> None:
    """Takes everything back, hooks first. The session stays, for `%reload_ext` and for `flax_magics.session()`."""
    if shell not in _loaded:
        return
    magics, matcher, preload = _loaded.pop(shell)
    preload.stop()
    shell.events.unregister("pre_run_cell", magics.begin_cell)
    library.in_cells(False)
    in_notebook(None)
    shell.events.unregister("post_run_cell", magics.journal.end)
    shell.events.unregister("post_run_cell", magics.end_cell)
    uninstall(shell, matcher)
    transformers = shell.input_transformers_cleanup
    if line_magic_transformer in transformers:
        transformers.remove(line_magic_transformer)
    if magics in shell.configurables:
        shell.configurables.remove(magics)
    manager = shell.magics_manager
    for kind, names in magics.magics.items():
        for name in names:
            function = manager.magics[kind].get(name)
            if getattr(function, "__self__", None) is magics:
                del manager.magics[kind][name]
    manager.registry.pop(type(magics).__name__, None)
