"""A line of news that is no run, and what registering a model says; as text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..base.text import clean, dotted, table
from .text import notes as note_lines

if TYPE_CHECKING:
    from ..cells.journal import Registered
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


def registered_text(models: Sequence[Registered]) -> str:
    """A line for each model, with the rows of its check beneath."""
    lines: list[str] = []
    for model in models:
        name = clean(model.name)
        lines += dotted((f"{name} {model.headline}" if model.headline else name, *model.parts))
        lines += table([(clean(label), clean(value)) for label, value in model.check], indent="  ")
    return "\n".join(lines)
