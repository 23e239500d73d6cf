"""Sessions that are ready for a test."""

from __future__ import annotations

from typing import Any

from flax_magics import Session


def session_of(net: Any, **options: Any) -> Session:
    """A session, with seed 0 if no other is asked for, in which `net` is registered under that name."""
    session = Session(**{"seed": 0, **options})
    session.register("net", net)
    return session
