"""What `%flax_export` says of the file that it wrote."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..run import Note
from .notice import Notice
from .units import plural

if TYPE_CHECKING:
    from ..export import Exported


def exported(script: Exported, path: Path, replaced: bool) -> Notice:
    """`session.py · written · 12 cells · 9 runs`, and below it what could not be exported."""
    notes = tuple(Note("export", f"not in the script: {reason}") for reason in script.unexported)
    return Notice(
        path.name,
        ("replaced" if replaced else "written", plural(script.cells, "cell"), plural(script.runs, "run")),
        notes,
    )
