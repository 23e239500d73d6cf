"""Loading into an IPython shell and leaving it without a trace; and our own modules imported once JAX and Flax are there."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from typing import Any

from ..cells.journal import in_notebook
from ..code.library import library
from .completion import Matcher, install, uninstall
from .magics import FlaxMagics
from .notebook import Notebook
from .run_cell import line_magic_transformer

_loaded: weakref.WeakKeyDictionary[Any, tuple[FlaxMagics, Matcher, Preload]] = weakref.WeakKeyDictionary()


def _hooks(notebook: Notebook) -> tuple[tuple[str, Callable[[Any], None]], ...]:
    """The shell's events and what is called at each, in order."""
    return (
        ("pre_run_cell", notebook.begin_cell),
        ("post_run_cell", notebook.journal.end),
        ("post_run_cell", notebook.end_cell),
    )


def load(shell: Any) -> None:
    """Registers the commands. Prints nothing; loading twice is loading once."""
    if shell in _loaded:
        return
    magics = FlaxMagics(shell=shell, parent=shell)  # adds itself to the shell's configurables, for %config
    shell.register_magics(magics)
    shell.input_transformers_cleanup.append(line_magic_transformer)
    notebook = magics.notebook
    matcher = Matcher(shell, notebook.model_names)
    install(shell, matcher)
    for event, hook in _hooks(notebook):
        shell.events.register(event, hook)
    library.in_cells(True)
    in_notebook(notebook.executed, lambda: notebook.number)
    preload = Preload(shell.events, notebook.prepare)
    preload.begin()
    _loaded[shell] = magics, matcher, preload


def unload(shell: Any) -> None:
    """Takes everything back, hooks first. The session stays, for `%reload_ext` and for `flax_magics.session()`."""
    if shell not in _loaded:
        return
    magics, matcher, preload = _loaded.pop(shell)
    preload.stop()
    for event, hook in _hooks(magics.notebook):
        shell.events.unregister(event, hook)
    library.in_cells(False)
    in_notebook(None)
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


NEEDS = ("jax", "flax.linen")
"""Flax imports its linen half with everything."""


class Preload:
    """A hook for the end of each cell, which takes itself away once it has done its work.

    Args:
      events: the shell's event manager.
      show: gets ready to show a report, as far as the settings want it.
    """

    def __init__(self, events: Any, show: Callable[[], None]) -> None:
        self._events = events
        self._show = show
        self._waiting = False

    def begin(self) -> None:
        """Starts to look for JAX and Flax."""
        self._events.register("post_run_cell", self.end_cell)
        self._waiting = True

    def stop(self) -> None:
        """Stops looking for them."""
        if self._waiting:
            self._waiting = False
            self._events.unregister("post_run_cell", self.end_cell)

    def end_cell(self, _: object = None) -> None:
        """Imports, if they are there."""
        if all(name in sys.modules for name in NEEDS):
            self.stop()
            try:
                _import()
                self._show()
            except (Exception, KeyboardInterrupt):
                pass  # It was for speed alone. What is wrong is said by the first command, which imports it as well.


def _import() -> None:
    """What a model cell and a first run import."""
    from .. import _session  # noqa: F401
    from ..models import linen  # noqa: F401
    from ..report import html, live  # noqa: F401
    from . import model_cell  # noqa: F401

    if "flax.nnx" in sys.modules:
        from ..models import nnx  # noqa: F401
