"""A line of news that is no run: what a command did, and the sharp bits of it, as text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from .columns import clean, dotted
from .text import notes as note_lines

if TYPE_CHECKING:
    from ..run import Note


@dataclass(frozen=True)
class Notice:
    """`root key · restarted · seed 0`: what it is about, what became of it, and what to look out for."""

    name: str
    texts: tuple[str, ...]
    notes: tuple[Note, ...] = ()


def notice_text(notice: Notice) -> str:
    """One line in 80 columns, sharp bits beneath."""
    return "\n".join([*dotted(tuple(map(clean, (notice.name, *notice.texts)))), *note_lines(notice.notes)])
