"""The session of this process. Apart from `sessions.py`, so that asking whether there is one imports nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    from .sessions import Session

_session: Session | None = None
_notebook: Callable[[], tuple[Any, ...]] | None = None
_cell_number: Callable[[], int] | None = None


def existing() -> Session | None:
    """The session if it has been made."""
    return _session


def current(seed: int = 0) -> Session:
    """The session, made at first use with `seed`."""
    global _session
    if _session is None:
        from .sessions import Session

        _session = Session(seed)
    return _session


def in_notebook(cells: Callable[[], tuple[Any, ...]] | None, number: Callable[[], int] | None = None) -> None:
    """The session is that of a notebook. None: it is no more.

    Args:
      cells: gives what an export is made of.
      number: gives the number of the cell that is running.
    """
    global _notebook, _cell_number
    _notebook, _cell_number = cells, number


def cell_number() -> int | None:
    """The number of the cell that is running, None outside of a notebook."""
    return None if _cell_number is None else _cell_number()


def notebook_of(session: Session) -> Callable[[], tuple[Any, ...]] | None:
    """What was given to `in_notebook`, if `session` is the notebook's."""
    return _notebook if session is _session else None
