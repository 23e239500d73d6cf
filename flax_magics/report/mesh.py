"""What a report says of a mesh: its devices drawn as a table, what lives where, and what the devices send each other."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..base.text import bytes_, cell_len, clean, width
from .facts import Row

if TYPE_CHECKING:
    from ..base.measures import Lies, MeshUse

SHOWN = 64
"""Of a mesh of more devices the first ones are drawn."""


def drawing(axes: Sequence[tuple[str, int]], devices: Sequence[str]) -> list[tuple[str, ...]]:
    """The mesh as rows of cells: its last axis from left to right, all others downwards."""
    *down, (across, columns) = axes
    devices = [clean(device) for device in devices]
    shown = min(columns, SHOWN)
    more = ("…",) if shown < columns else ()
    rows = [("", *(f"{clean(across)} {n}" for n in range(shown)), *more)]
    for number, place in enumerate(itertools.product(*(range(size) for _, size in down))):
        if number and number * shown >= SHOWN:
            return [*rows, ("…",)]
        label = " ".join(f"{clean(name)} {n}" for (name, _), n in zip(down, place, strict=True))
        rows.append((label, *devices[number * columns : number * columns + shown], *more))
    return rows


def rows(use: MeshUse) -> tuple[Row, ...]:
    """Where inputs, variables and output live, with their bytes on each device, and what is sent between devices."""
    collectives = use.collectives
    sent = tuple(f"{times} × {clean(kind)}, {bytes_(size)}" for kind, times, size in collectives or ())
    return (
        Row("inputs", _lies(use.inputs)),
        Row("vars", _lies(use.variables)),
        Row("out", _lies(use.output)),
        Row("sent", sent or (() if collectives is None else ("nothing between devices",))),
    )


def _lies(parts: Sequence[Lies]) -> tuple[str, ...]:
    shown = tuple(f"{clean(part.name)} {clean(part.how)}, {bytes_(part.bytes)} a device".strip() for part in parts[:8])
    return (*shown, f"and {len(parts) - 8} more") if len(parts) > 8 else shown


def lines(axes: Sequence[tuple[str, int]], devices: Sequence[str], indent: str) -> list[str]:
    """The drawing as text: what is too wide goes on below."""
    labels, cells = zip(*((row[0], row[1:]) for row in drawing(axes, devices)), strict=True)
    first, each = (max(map(cell_len, texts), default=0) for texts in (labels, [cell for row in cells for cell in row]))
    many = max(1, (width() - len(indent) - first) // (each + 2))
    parts = []
    for begin in range(0, max(map(len, cells)), many):
        for label, row in zip(labels, cells, strict=True):
            shown = "".join(f"  {cell:{each}}" for cell in row[begin : begin + many])
            parts.append(f"{indent}{label:{first}}{shown}".rstrip())
    return parts
