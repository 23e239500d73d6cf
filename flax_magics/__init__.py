"""Write a Flax module in a cell, run it, and every run says what it did.

`%load_ext flax_magics` in a notebook; `flax_magics.Session` in a script.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .base import __version__ as __version__
from .errors import FlaxMagicsError

if TYPE_CHECKING:
    from ._session import Session
    from .run import Run

__all__ = ["FlaxMagicsError", "Run", "Session", "load_ipython_extension", "session", "unload_ipython_extension"]


def session() -> Session:
    """The Session that the notebook commands use; one per process, created at first use."""
    from ._session import current

    return current()


def load_ipython_extension(shell: Any) -> None:
    """Registers the magic commands: IPython calls this for `%load_ext flax_magics`."""
    from .notebook.extension import load

    load(shell)


def unload_ipython_extension(shell: Any) -> None:
    """Removes the magic commands: IPython calls this for `%unload_ext flax_magics`."""
    from .notebook.extension import unload

    unload(shell)


def __getattr__(name: str) -> Any:
    # Imported at first access: loading the extension must not import JAX.
    if name == "Session":
        from ._session import Session

        return Session
    if name == "Run":
        from .run import Run

        return Run
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
