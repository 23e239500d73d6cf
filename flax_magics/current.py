"""The session of this process. Apart from `sessions.py`, so that asking whether there is one imports nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .sessions import Session

_session: Session | None = None


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
