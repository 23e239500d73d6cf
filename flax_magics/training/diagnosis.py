"""Why a gradient is zero or not finite."""

from __future__ import annotations

from collections.abc import Iterator

from ..execution.execute import Execution
from ..run import Note, Run


def notes_of(execution: Execution, run: Run) -> Iterator[Note]:
    """Notes."""
    yield from ()
