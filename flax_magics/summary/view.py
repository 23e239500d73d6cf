"""A summary as a tree of rows, equal ones folded into one: as text in 80 columns and as HTML; and variables as a tree."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import treescope  # type: ignore[import-untyped]
from rich.cells import cell_len

from ..base.text import WIDTH, bytes_, clean, clean_lines, count, dotted, plural, wrap
from ..errors import FlaxMagicsError
from ..models.calls import Path
from ..report.facts import Row as Fact
from ..report.html import render, shown_bundle
from ..report.text import columns
from .modules import Array, Module, Size, sizes, total


def summary_html(summary: Summary, depth: int | None = None) -> str:
    """What `%flax_summary` shows: each row folds. At first those with others inside are open, as deep as the text goes."""
    root = tree(summary)
    deep = shown_depth(root, depth)

    def node(row: ModuleRow, level: int) -> dict[str, object]:
        return {
            "name": row.name,
            "cls": row.cls,
            "cells": cells(summary, row),
            "said": details(summary, row),
            "rows": [node(part, level + 1) for part in row.rows],
            "open": bool(row.rows) and level < deep,
        }

    context: dict[str, object] = {
        "heading": [part for part in heading(summary) if part],
        "labels": labels(summary),
        "root": node(root, 0),
        "facts": facts(summary),
    }
    return render("summary.html", context)


def summary_bundle(summary: Summary, depth: int | None, style: str) -> dict[str, Any]:
    """The MIME bundle of a summary; for `depth` see `summary.summary_text`."""
    return shown_bundle(summary_text(summary, depth), lambda: summary_html(summary, depth), style)


def tree_bundle(name: str, variables: Any, style: str) -> dict[str, Any]:
    """The MIME bundle of a model's variables as a tree. It has scripts, as treescope makes it.

    Raises:
      FlaxMagicsError: there are none.
    """
    if variables is None:
        raise FlaxMagicsError(f"`{name}` has no variables yet that a tree could show.", form=f"%flax_init {name}(…)")

    def html() -> str:
        with treescope.active_autovisualizer.set_scoped(treescope.ArrayAutovisualizer()):
            return str(treescope.render_to_html(variables, ignore_exceptions=True))

    with warnings.catch_warnings():
        # To know things by their names treescope looks at all that NumPy has, and NumPy warns of what it will drop.
        warnings.simplefilter("ignore", DeprecationWarning)
        text = clean_lines(treescope.render_to_text(variables, ignore_exceptions=True))
        return shown_bundle("\n".join(text), html, style)


@dataclass(frozen=True, repr=False)
class Summary:
    """What a model is, by shapes alone. `print` shows all of it.

    Attributes:
      name: the registered name.
      model: how it is built, such as `Net(features=8)`.
      call: the call as it was written; empty if there was none: then nothing is known that depends on a call.
      mode: `train`, `eval` or `as written`.
      switch: the model's own switches as they stand, such as `training=True`.
      initialised: whether the variables are there; if not, these are those that an init would make.
      modules: in the order of their first calls, each before its submodules; the model itself comes first.
      flops, vjp_flops: of the whole call; see `Module`.
      written: collections that the call writes, such as `batch_stats`.
      sown: collection → what the model sows there, as `dtype[shape]`.
      notes: what has to be known to read the figures.
    """

    name: str
    model: str
    call: str
    mode: str
    switch: tuple[str, ...]
    initialised: bool
    modules: tuple[Module, ...]
    flops: int | None = None
    vjp_flops: int | None = None
    written: tuple[str, ...] = ()
    sown: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @cached_property
    def totals(self) -> Mapping[str, Size]:
        """Collection → how much there is of it, `params` first."""
        return sizes(array for module in self.modules for array in module.arrays)

    @property
    def parameters(self) -> int:
        """Elements of `params` (of NNX's `Param`)."""
        return self.totals.get("params", self.totals.get("Param", Size())).elements

    @property
    def bytes(self) -> int:
        """Bytes of all collections."""
        return sum(size.bytes for size in self.totals.values())

    @property
    def streams(self) -> Mapping[str, tuple[Path, ...]]:
        """Random stream → paths of the modules that consumed it."""
        names = dict.fromkeys(stream for module in self.modules for stream in module.streams)
        return {name: tuple(m.path for m in self.modules if name in m.streams) for name in names}

    def under(self, path: Path) -> Mapping[str, Size]:
        """How much there is in the module at `path` and its submodules, by collection."""
        return sizes(a for m in self.modules if m.path[: len(path)] == path for a in m.arrays)

    def __repr__(self) -> str:
        flops = "" if self.flops is None else f", {count(self.flops)} FLOPs"
        modules = plural(len(self.modules), "module")
        return f"<Summary of {self.call or self.name}: {modules}, {plural(self.parameters, 'parameter')}{flops}>"

    def __str__(self) -> str:
        return summary_text(self)


LINES = 60
"""Rows that a text shows at most, unless a depth is asked for."""
TURN = 4
"""Siblings at most that are looked for as one turn of what repeats."""
EXACT = 10_000_000
"""Below, a row shows a number in full."""


@dataclass(frozen=True)
class ModuleRow:
    """A module, several equal ones that follow each other, or a turn of several that repeats.

    Attributes:
      name: `Dense_0`, `Block_0 … Block_49`.
      cls: its class, `50 × Block`; of a turn `9 × (Dense, LayerNorm)`.
      module: the first; None for a turn.
      sizes: collection → how much there is in one of them, submodules included.
      flops, vjp_flops: of one of them.
      rows: the submodules of the first; of a turn its modules.
      path: of the first.
    """

    name: str
    cls: str
    module: Module | None
    sizes: Mapping[str, Size]
    flops: int | None
    vjp_flops: int | None
    rows: tuple[ModuleRow, ...]
    path: tuple[str, ...]

    @property
    def size(self) -> int:
        """How many rows it is with all that is inside."""
        return 1 + sum(row.size for row in self.rows)

    @property
    def depth(self) -> int:
        """How many levels of rows are inside."""
        return 1 + max(row.depth for row in self.rows) if self.rows else 0

    def to(self, depth: int) -> int:
        """How many rows it is down to a depth."""
        return 1 + (sum(row.to(depth - 1) for row in self.rows) if depth else 0)


def tree(summary: Summary) -> ModuleRow:
    """The model itself, with everything folded that repeats."""
    inside: dict[tuple[str, ...], list[Module]] = {}
    paths = {module.path for module in summary.modules}
    for module in summary.modules:
        if module.path:
            around = next(module.path[:n] for n in range(len(module.path) - 1, -1, -1) if module.path[:n] in paths)
            inside.setdefault(around, []).append(module)

    def row(module: Module, around: tuple[str, ...]) -> ModuleRow:
        name = clean("/".join(module.path[len(around) :])) or clean(summary.name)
        cls = clean(module.cls) + (f".{clean(module.method)}" if module.method not in ("", "__call__") else "")
        rows = tuple(fold([row(part, module.path) for part in inside.get(module.path, ())]))
        sizes = summary.under(module.path)
        return ModuleRow(name, cls, module, sizes, module.flops, module.vjp_flops, rows, module.path)

    return row(summary.modules[0], ())


def _alike(row: ModuleRow) -> object:
    """Equal for rows that differ in their own name alone."""
    module = None if row.module is None else replace(row.module, path=())
    return (row.cls, module, tuple((part.name, _alike(part)) for part in row.rows))


def fold(rows: Sequence[ModuleRow]) -> Iterator[ModuleRow]:
    """Rows that follow each other and are alike as one; so too turns of several rows, if there are three or more."""
    signs: dict[object, int] = {}
    alike = [signs.setdefault(_alike(row), len(signs)) for row in rows]
    at = 0
    while at < len(rows):
        turn, times = 1, 1
        for length in range(1, TURN + 1):
            n = 1
            while alike[at + n * length : at + (n + 1) * length] == alike[at : at + length]:
                n += 1
            if (n > 2 or (n == 2 and length == 1)) and n * length > turn * times:
                turn, times = length, n
        end = at + turn * times
        yield rows[at] if times == 1 else _folded(rows[at:end], turn)
        at = end


def _folded(rows: Sequence[ModuleRow], turn: int) -> ModuleRow:
    times, first, last = len(rows) // turn, rows[0], rows[-1]
    name = f"{first.name}{', ' if len(rows) == 2 else ' … '}{last.name}"
    if turn == 1:
        return replace(first, name=name, cls=f"{times} × {first.cls}".rstrip(" ×"))
    one = rows[:turn]
    sizes: dict[str, Size] = {}
    for collection, size in (item for row in one for item in row.sizes.items()):
        sizes[collection] = sizes.get(collection, Size()) + size
    kinds = ", ".join(row.cls or row.name for row in one)
    flops, both = total([row.flops for row in one]), total([row.vjp_flops for row in one])
    return ModuleRow(name, f"{times} × ({kinds})", None, sizes, flops, both, tuple(one), first.path)


def heading(summary: Summary) -> tuple[str, ...]:
    """Name, construction, mode, and the call."""
    switch = clean(", ".join(summary.switch))
    mode = f"{clean(summary.mode)} ({switch})" if switch else clean(summary.mode)
    return (clean(summary.name), clean(summary.model), mode if summary.call else switch, clean(summary.call))


def labels(summary: Summary) -> tuple[str, ...]:
    """What the columns of numbers are: the parameters, their bytes, FLOPs as far as they are known."""
    flops = ("FLOPs",) if summary.flops is not None else ()
    return (primary(summary), "bytes", *flops, *(("vjp FLOPs",) if summary.vjp_flops is not None else ()))


def primary(summary: Summary) -> str:
    """The collection of the parameters: `params`, of NNX `Param`."""
    return "Param" if "Param" in summary.totals else "params"


def cells(summary: Summary, row: ModuleRow) -> tuple[str, ...]:
    """The numbers of a row, as many as there are `labels`."""
    size = row.sizes.get(primary(summary))
    numbers = ["", ""] if size is None else [number(size.elements), bytes_(size.bytes)]
    if summary.flops is not None:
        numbers.append(number(row.flops))
    if summary.vjp_flops is not None:
        numbers.append(number(row.vjp_flops))
    return tuple(numbers)


def number(value: int | None) -> str:
    """In full while it is short."""
    return "" if value is None else f"{value:,}" if value < EXACT else count(value)


def details(summary: Summary, row: ModuleRow) -> tuple[str, ...]:
    """What is to be said of a row besides its numbers: shapes, variables, streams, calls."""
    module = row.module
    if module is None:
        return ()
    said = []
    if module.calls:
        inputs = clean(module.inputs) or "nothing"
        said.append(f"{inputs} → {clean(module.outputs)}")
    elif summary.call:
        said.append("not called")
    if module.calls > 1:
        said.append(f"{module.calls} calls")
    for collection, size in row.sizes.items():
        arrays = [array for array in module.arrays if array.collection == collection]
        many = "" if collection == primary(summary) else f" {number(size.elements)}, {bytes_(size.bytes)}"
        if arrays and collection != "RngState":
            said.append(f"{clean(collection)}{many}: {', '.join(map(spell, arrays))}")
        elif many:
            said.append(f"{clean(collection)}{many}")
    if module.streams:
        said.append(f"takes {clean(', '.join(module.streams))}")
    return tuple(said)


def spell(array: Array) -> str:
    """`kernel float32[9,4]`, and its metadata if it has any."""
    shape = ",".join(map(str, array.shape))
    about = f" {clean(array.about)}" if array.about else ""
    return f"{clean(array.name)} {clean(array.dtype)}[{shape}]{about}"


def facts(summary: Summary) -> tuple[Fact, ...]:
    """The totals, streams and notes beneath the rows."""
    totals = [f"{clean(name)} {size.elements:,}, {bytes_(size.bytes)}" for name, size in summary.totals.items()]
    if len(totals) > 1:
        elements = sum(size.elements for size in summary.totals.values())
        totals.append(f"in all {elements:,}, {bytes_(summary.bytes)}")
    flops = [] if summary.flops is None else [f"forward {summary.flops:,}"]
    if summary.vjp_flops is not None:
        flops.append(f"forward and backward {summary.vjp_flops:,}")
    keys = [f"{clean(stream)} → {_takers(paths)}" for stream, paths in summary.streams.items()]
    unset = [] if summary.initialised else ["not initialised: variables are those that an init would make"]
    sown = [f"{clean(name)}: {clean(value)}" for name, value in summary.sown.items()]
    rows = [Fact("total", tuple(totals) or ("no variables",)), Fact("FLOPs", tuple(flops)), Fact("keys", tuple(keys))]
    rows += [Fact("writes", tuple(map(clean, summary.written))), Fact("sown", tuple(sown))]
    return tuple(row for row in [*rows, Fact("note", (*unset, *summary.notes))] if row.items)


def _takers(paths: Sequence[tuple[str, ...]], most: int = 3) -> str:
    names = [clean("/".join(path)) or "(the model)" for path in paths]
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")


def shown_depth(root: ModuleRow, depth: int | None) -> int:
    """How deep a text goes: as it was asked, or as deep as `LINES` allow."""
    if depth is not None:
        return depth
    deep = root.depth
    while deep > 1 and root.to(deep) > LINES:
        deep -= 1
    return deep


def summary_text(summary: Summary, depth: int | None = None) -> str:
    """The whole in 80 columns.

    Args:
      depth: levels of submodules that are shown; None for as many as go on a page.
    """
    root = tree(summary)
    deep = shown_depth(root, depth)
    rows = list(_rows(root, deep))
    numbers = [labels(summary), *(cells(summary, row) for row, _ in rows)]
    widths = [max(cell_len(line[i]) for line in numbers) for i in range(len(numbers[0]))]
    lines = dotted(heading(summary))
    lines.append(_line("  module", numbers[0], widths))
    for (row, level), figures in zip(rows, numbers[1:], strict=True):
        indent = "  " * (level + 1)
        lines += _left(f"{row.name}  {row.cls}".rstrip(), indent, figures, widths)
        said = details(summary, row)
        hidden = row.size - 1 if level == deep else 0
        if hidden:
            said = (*said, f"{plural(hidden, 'row')} inside")
        if said:
            lines += wrap(" · ".join(said), indent + "  ", indent + "    ")
    lines += columns(facts(summary))
    if depth is None and deep < root.depth:
        lines += wrap(f"deeper than {plural(deep, 'level')} is folded away: --depth {root.depth} shows all of it", "  ")
    return "\n".join(lines)


def _rows(row: ModuleRow, deep: int, level: int = 0) -> Iterator[tuple[ModuleRow, int]]:
    yield row, level
    if level < deep:
        for part in row.rows:
            yield from _rows(part, deep, level + 1)


def _left(text: str, indent: str, figures: Sequence[str], widths: Sequence[int]) -> list[str]:
    """A name with its numbers at the right; a name that leaves no room for them has lines of its own."""
    room = WIDTH - sum(widths) - 2 * len(widths)
    *above, last = wrap(text, indent, indent + "    ", room)
    return [*above, _line(last, figures, widths)]


def _line(left: str, figures: Sequence[str], widths: Sequence[int]) -> str:
    room = WIDTH - sum(widths) - 2 * len(widths)
    right = "".join("  " + " " * (wide - cell_len(text)) + text for text, wide in zip(figures, widths, strict=True))
    return (left + " " * (room - cell_len(left)) + right).rstrip()
