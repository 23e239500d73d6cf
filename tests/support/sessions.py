"""Sessions that are ready for a test."""

from __future__ import annotations

from typing import Any

from flax_magics import Session


def session_of(net: Any, **options: Any) -> Session:
    """A session, with seed 0 if no other is asked for, in which `net` is registered under that name."""
    session = Session(**{"seed": 0, **options})
    session.register("net", net)
    return session


def settle(session: Session) -> None:
    """Waits until what was compiled is on disk."""
    session.programs.compiler.workers.submit(lambda: None).result()
    while session.programs.compiler.workers.busy:
        pass
