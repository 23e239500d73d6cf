"""Gradients by module as a table, and a mesh drawn as one, in text and for HTML.

Modules that repeat are one row with the range of their numbers. Beneath the mesh: what lives where, and what the devices
send each other.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

from msgspec import Struct

from ..base.measures import LayerGradient
from ..base.text import bytes_, cell_len, clean, count, natural, plural, repeats, share, width, wrap
from .facts import Row

if TYPE_CHECKING:
    from ..base.measures import Lies, MeshUse


Path = tuple[str, ...]

LINES = 40
"""The most rows that are shown; what is deeper is counted in."""
TURN = 4
"""The longest sequence of siblings that is recognised as repeating."""
LABELS = ("params", "gradient", "of weights", "zeros")


class GradientRow(Struct, frozen=True, dict=True):
    """A row: a module, several alike that follow each other, or a sequence of modules that repeats.

    Attributes:
      name, cls: `Dense_0` and its class; `Block_0 … Block_49` and `50 × Block`.
      each: the gradient of each module that the row stands for, submodules counted in.
      rows: the rows inside.
    """

    name: str
    cls: str
    each: tuple[LayerGradient, ...]
    rows: tuple[GradientRow, ...] = ()

    @cached_property
    def cells(self) -> tuple[str, ...]:
        """The texts of the columns `LABELS`; a range where the modules differ."""
        of_one = [_cells(layer) for layer in self.each]
        return tuple(_range(column) for column in zip(*of_one, strict=True))

    @property
    def norm(self) -> float:
        """The largest norm of the gradient."""
        return max(math.sqrt(layer.squares) if layer.squares >= 0 else math.nan for layer in self.each)

    @property
    def depth(self) -> int:
        """How many levels of rows are inside of it."""
        return max((1 + row.depth for row in self.rows), default=0)

    def shown(self, levels: int, level: int = 0) -> Iterator[tuple[GradientRow, int]]:
        """This row and those inside, down to `levels`, each with its own level."""
        yield self, level
        for row in self.rows if level < levels else ():
            yield from row.shown(levels, level + 1)


def _cells(layer: LayerGradient) -> tuple[float | str, ...]:
    trained = layer.parameters - layer.frozen
    if not trained:
        return layer.parameters, "frozen", "", ""
    norm, weights = math.sqrt(layer.squares), math.sqrt(layer.weights)
    return layer.parameters, norm, norm / weights if weights else "", Share(layer.zeros / trained)


class Share(float):
    """A part of a whole, which is shown as percent."""


def _range(column: tuple[float | str, ...]) -> str:
    """`0.12`, or `0.12 … 0.4` for modules that differ."""
    if any(isinstance(value, str) for value in column):
        return next(value for value in column if isinstance(value, str))
    numbers = [value for value in column if not isinstance(value, str)]
    broken = next((value for value in numbers if not math.isfinite(value)), None)
    if broken is not None:
        return "NaN" if math.isnan(broken) else "inf"
    least, most = min(numbers), max(numbers)
    if _spell(least) == _spell(most):
        return _spell(least)
    # Two digits are enough for a range, and leave room for names.
    return f"{_spell(least, 2).removesuffix(' %')} … {_spell(most, 2)}"


def _spell(value: float, digits: int = 3) -> str:
    if isinstance(value, Share):
        return share(value) if value else "0 %"
    return count(value) if isinstance(value, int) else f"{value:.{digits}g}"


def tree(layers: Sequence[LayerGradient], name: str) -> GradientRow:
    """The row of the model called `name`, with everything inside folded that repeats."""
    inside: dict[Path, dict[Path, None]] = {}
    by_path = {layer.path: layer for layer in layers}
    for path in by_path:
        for n in range(len(path)):
            inside.setdefault(path[:n], {})[path[: n + 1]] = None

    def row(path: Path) -> GradientRow:
        rows = [row(below) for below in sorted(inside.get(path, ()), key=lambda below: natural(below[-1]))]
        mine = by_path.get(path)
        parts = [*([mine] if mine is not None else []), *(layer for part in rows for layer in part.each)]
        whole = LayerGradient.of_all(parts, path, "" if mine is None else mine.cls)
        return GradientRow(clean(path[-1] if path else name), clean(whole.cls), (whole,), tuple(_fold(rows)))

    return row(())


def _alike(row: GradientRow) -> object:
    """A value that is equal for rows of modules that are built alike, whatever their gradients."""
    first = row.each[0]
    stem = row.cls or row.name.rstrip("0123456789")
    return stem, first.parameters, first.frozen, len(row.each), tuple((one.name, _alike(one)) for one in row.rows)


def _fold(rows: list[GradientRow]) -> Iterator[GradientRow]:
    signs = [_alike(row) for row in rows]
    for begin, turn, times in repeats(signs, TURN):
        same = [rows[begin + n : begin + turn * times : turn] for n in range(turn)]
        if times == 1:
            yield from same[0]
        elif turn == 1:
            yield _merged(same[0])
        else:
            part = rows[begin : begin + turn * times]
            every = (
                LayerGradient.of_all([row.each[0] for row in part[n : n + turn]]) for n in range(0, len(part), turn)
            )
            kinds = ", ".join(row.cls or row.name for row in part[:turn])
            name = f"{part[0].name} … {part[-1].name}"
            yield GradientRow(name, f"{times} × ({kinds})", tuple(every), tuple(map(_merged, same)))


def _merged(rows: Sequence[GradientRow]) -> GradientRow:
    first, last = rows[0], rows[-1]
    between = ", " if len(rows) == 2 else " … "
    stem = first.cls or first.name.rstrip("0123456789").rstrip("_")
    inside = tuple(_with_all(parts) for parts in zip(*(row.rows for row in rows), strict=True))
    each = tuple(layer for row in rows for layer in row.each)
    return GradientRow(f"{first.name}{between}{last.name}", f"{len(rows)} × {stem}".rstrip(" ×"), each, inside)


def _with_all(rows: Sequence[GradientRow]) -> GradientRow:
    """The row of the same module in each of several modules that are alike."""
    first = rows[0]
    each = tuple(layer for row in rows for layer in row.each)
    return GradientRow(
        first.name, first.cls, each, tuple(map(_with_all, zip(*(row.rows for row in rows), strict=True)))
    )


def shown_rows(layers: Sequence[LayerGradient], name: str) -> tuple[list[tuple[GradientRow, int]], int]:
    """The rows that are shown with their levels, and how many levels are not."""
    root = tree(layers, name)
    levels = root.depth
    while levels > 1 and len(list(root.shown(levels))) > LINES:
        levels -= 1
    return list(root.shown(levels)), root.depth - levels


def gradient_lines(layers: Sequence[LayerGradient], name: str) -> list[str]:
    """The table as text, in as many columns as there are."""
    rows, hidden = shown_rows(layers, name)
    texts = [LABELS, *(row.cells for row, _ in rows)]
    widths = [max(cell_len(line[i]) for line in texts) for i in range(len(LABELS))]
    names = [("  ", "module"), *(("  " * (level + 1), f"{row.name}  {row.cls}".rstrip()) for row, level in rows)]
    rest = min(max(cell_len(indent + text) for indent, text in names), width() - sum(widths) - 2 * len(widths))
    shown = []
    for (indent, text), cells in zip(names, texts, strict=True):
        *above, last = wrap(text, indent, indent + "    ", max(rest, 16))
        numbers = "".join("  " + " " * (most - cell_len(cell)) + cell for cell, most in zip(cells, widths, strict=True))
        shown += [*above, (last + " " * (rest - cell_len(last)) + numbers).rstrip()]
    if hidden:
        shown += wrap(f"{plural(hidden, 'deeper level')} counted in", "  ")
    return shown


def gradient_table(layers: Sequence[LayerGradient], name: str) -> dict[str, object]:
    """What the template of the table takes: labels, and of each row name, class, level, cells and length of its bar."""
    rows, hidden = shown_rows(layers, name)
    norms = [row.norm for row, _ in rows if math.isfinite(row.norm)]
    most = max(norms, default=0.0)
    return {
        "labels": LABELS,
        "hidden": hidden,
        "rows": [
            (row.name, row.cls, level, row.cells, row.norm / most if most and math.isfinite(row.norm) else 0.0)
            for row, level in rows
        ],
    }


SHOWN = 64
"""Of a mesh of more devices the first ones are drawn."""


def mesh_drawing(axes: Sequence[tuple[str, int]], devices: Sequence[str]) -> list[tuple[str, ...]]:
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


def mesh_rows(use: MeshUse) -> tuple[Row, ...]:
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


def mesh_lines(axes: Sequence[tuple[str, int]], devices: Sequence[str], indent: str) -> list[str]:
    """The drawing as text: what is too wide goes on below."""
    labels, cells = zip(*((row[0], row[1:]) for row in mesh_drawing(axes, devices)), strict=True)
    first, each = (max(map(cell_len, texts), default=0) for texts in (labels, [cell for row in cells for cell in row]))
    many = max(1, (width() - len(indent) - first) // (each + 2))
    parts = []
    for begin in range(0, max(map(len, cells)), many):
        for label, row in zip(labels, cells, strict=True):
            shown = "".join(f"  {cell:{each}}" for cell in row[begin : begin + many])
            parts.append(f"{indent}{label:{first}}{shown}".rstrip())
    return parts
