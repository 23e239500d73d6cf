"""A summary as a tree of rows in which equal ones are folded, as text and as HTML; and variables as a tree."""

from __future__ import annotations

import math
import warnings
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from functools import cached_property, partial

import treescope  # type: ignore[import-untyped]
from msgspec import Struct
from msgspec.structs import replace

from ..base.text import (
    LEAST,
    WIDTH,
    bytes_,
    cell_len,
    clean,
    clean_lines,
    count,
    cut,
    dotted,
    plural,
    repeats,
    width,
    wrap,
)
from ..base.types import PyTree
from ..errors import FlaxMagicsError
from ..models.calls import Path
from ..report.facts import Row as Fact
from ..report.html import render, shown_bundle
from ..report.text import columns


def summary_html(summary: Summary, depth: int | None = None) -> str:
    """A summary as HTML with rows that fold. At first it is open as deep as the text goes."""
    root = tree(summary)
    of_row = {"cells": partial(cells, summary), "details": partial(details, summary), "outputs": outputs}
    parts = {"heading": heading(summary), "labels": labels(summary), "facts": facts(summary), "call": summary.call}
    return render("summary.html", {**parts, **of_row, "root": root, "deep": shown_depth(root, depth)})


def summary_bundle(summary: Summary, depth: int | None, style: str) -> dict[str, object]:
    """The MIME bundle of a summary; `depth` as in `summary_text`."""
    return shown_bundle(summary_text(summary, depth), lambda: summary_html(summary, depth), style)


def tree_bundle(name: str, variables: PyTree, style: str) -> dict[str, object]:
    """The MIME bundle of variables as a tree that unfolds. Treescope's HTML has scripts, unlike every other of ours.

    Raises:
      FlaxMagicsError: the model has no variables.
    """
    if variables is None:
        raise FlaxMagicsError(f"`{name}` has no variables yet that a tree could show.", form=f"%flax_init {name}(…)")

    def html() -> str:
        with treescope.active_autovisualizer.set_scoped(treescope.ArrayAutovisualizer()):
            return str(treescope.render_to_html(variables, ignore_exceptions=True))

    with warnings.catch_warnings():
        # Treescope looks up every name in NumPy, which warns of those that it deprecates.
        warnings.simplefilter("ignore", DeprecationWarning)
        text = clean_lines(treescope.render_to_text(variables, ignore_exceptions=True))
        return shown_bundle("\n".join(text), html, style)


class Size(Struct, frozen=True):
    """Elements and bytes of arrays, which can be added."""

    elements: int = 0
    bytes: int = 0

    def __add__(self, other: Size) -> Size:
        return Size(self.elements + other.elements, self.bytes + other.bytes)


class Array(Struct, frozen=True):
    """One variable: its name within the module, type and shape; `about` is its metadata, such as partition names."""

    collection: str
    name: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int
    about: str = ""

    @property
    def size(self) -> Size:
        """Its elements and bytes."""
        return Size(math.prod(self.shape), self.bytes)


class Module(Struct, frozen=True):
    """One module of a model.

    Attributes:
      path: where it is; `()` is the model itself.
      cls: its class; empty where that would only be known in a call.
      method: the method of its first call.
      calls: how many calls there are; 0 if it was not called.
      inputs, outputs: those of the first call, as `float32[3,4], train=True`.
      arrays: its own variables, without those of its submodules.
      streams: random streams that it consumed itself.
      flops: of all its calls, submodules included, as XLA counts them; None where that is unknown.
      vjp_flops: of forward and backward pass together, for gradients of variables and floating inputs; None unless
        asked for.
    """

    path: Path
    cls: str
    method: str = ""
    calls: int = 0
    inputs: str = ""
    outputs: str = ""
    arrays: tuple[Array, ...] = ()
    streams: tuple[str, ...] = ()
    flops: int | None = None
    vjp_flops: int | None = None


def sizes(parts: Iterable[tuple[str, Size]]) -> dict[str, Size]:
    """Collection → elements and bytes in all `parts` together; parameters come first."""
    of_collection: dict[str, Size] = {}
    for collection, size in parts:
        of_collection[collection] = of_collection.get(collection, Size()) + size
    return dict(sorted(of_collection.items(), key=lambda item: (item[0] not in ("params", "Param"), item[0])))


class Summary(Struct, frozen=True, dict=True):
    """What a model is, by shapes alone. `print` shows all of it.

    Attributes:
      name: the registered name.
      model: how it is built, such as `Net(features=8)`.
      call: as it was written; empty for a summary of the variables alone.
      mode: `train`, `eval` or `as written`.
      switch: the model's own switches as they stand, such as `training=True`.
      initialised: whether the variables exist; if not, they are described as an init would make them.
      modules: in the order of their first calls, parents before children; the model itself comes first.
      flops, vjp_flops: of the whole call, see `Module`.
      written: collections that the call writes, such as `batch_stats`.
      sown: collection → what the model sows there, as `dtype[shape]`.
      notes: what to know when reading the figures.
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
    sown: Mapping[str, str] = {}
    notes: tuple[str, ...] = ()

    @cached_property
    def totals(self) -> Mapping[str, Size]:
        """Collection → elements and bytes in the whole model, `params` first."""
        return sizes((array.collection, array.size) for module in self.modules for array in module.arrays)

    @property
    def parameters(self) -> int:
        """How many elements the parameters have: `params`, or `Param` of NNX."""
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
        """Collection → elements and bytes in the module at `path` and its submodules."""
        inside = (module for module in self.modules if module.path[: len(path)] == path)
        return sizes((array.collection, array.size) for module in inside for array in module.arrays)

    def __repr__(self) -> str:
        flops = "" if self.flops is None else f", {count(self.flops)} FLOPs"
        modules = plural(len(self.modules), "module")
        return f"<Summary of {self.call or self.name}: {modules}, {plural(self.parameters, 'parameter')}{flops}>"

    def __str__(self) -> str:
        return summary_text(self)

    def _repr_html_(self) -> str:
        return summary_html(self)


LINES = 60
"""The most rows that a text shows, unless it was asked for a depth."""
TURN = 4
"""The longest sequence of siblings that is recognised as repeating, such as (Dense, LayerNorm)."""


class ModuleRow(Struct, frozen=True):
    """A row: a module, several equal modules in a row, or a sequence of modules that repeats.

    Attributes:
      name: `Dense_0`, `Block_0 … Block_49`.
      cls: its class; `50 × Block` for equal modules, `9 × (Dense, LayerNorm)` for a sequence.
      module: the module, or the first of the equal ones; None for a sequence.
      sizes: collection → elements and bytes of one of them, submodules included.
      flops, vjp_flops: of one of them.
      rows: the submodules of the first; for a sequence its modules.
    """

    name: str
    cls: str
    module: Module | None
    sizes: Mapping[str, Size]
    flops: int | None
    vjp_flops: int | None
    rows: tuple[ModuleRow, ...]

    @property
    def depth(self) -> int:
        """How many levels of rows are inside of it."""
        return max((1 + row.depth for row in self.rows), default=0)

    def size(self, depth: int = -1) -> int:
        """How many rows it takes with those inside, `depth` levels down; all levels by default."""
        return 1 + (sum(row.size(depth - 1) for row in self.rows) if depth else 0)


def innermost(path: Path, paths: Container[Path]) -> Path:
    """The longest prefix of `path` that is in `paths`; `()` if there is none."""
    return next((path[:n] for n in range(len(path), 0, -1) if path[:n] in paths), ())


def tree(summary: Summary) -> ModuleRow:
    """The row of the model itself, with everything inside folded that repeats."""
    inside: dict[Path, list[Module]] = {}
    paths = {module.path for module in summary.modules}
    for module in summary.modules:
        if module.path:
            inside.setdefault(innermost(module.path[:-1], paths), []).append(module)

    def row(module: Module, around: Path) -> ModuleRow:
        name = clean("/".join(module.path[len(around) :])) or clean(summary.name)
        cls = clean(module.cls) + (f".{clean(module.method)}" if module.method not in ("", "__call__") else "")
        rows = tuple(fold([row(part, module.path) for part in inside.get(module.path, ())]))
        return ModuleRow(name, cls, module, summary.under(module.path), module.flops, module.vjp_flops, rows)

    return row(summary.modules[0], ())


def _alike(row: ModuleRow) -> object:
    """A value that is equal for rows which differ in nothing but their own names."""
    module = None if row.module is None else replace(row.module, path=())
    return (row.cls, module, tuple((part.name, _alike(part)) for part in row.rows))


def fold(rows: Sequence[ModuleRow]) -> Iterator[ModuleRow]:
    """Folds equal rows that follow each other into one, and so a sequence of rows that occurs three times or more."""
    # Comparing small numbers: a row's own sign is as large as all that is inside of it.
    signs: dict[object, int] = {}
    alike = [signs.setdefault(_alike(row), len(signs)) for row in rows]
    for begin, turn, times in repeats(alike, TURN):
        yield rows[begin] if times == 1 else _folded(rows[begin : begin + turn * times], turn)


def total(counts: list[int | None]) -> int | None:
    """The sum; None if one of the counts is unknown."""
    known = [count for count in counts if count is not None]
    return sum(known) if len(known) == len(counts) else None


def _folded(rows: Sequence[ModuleRow], turn: int) -> ModuleRow:
    times, first, last = len(rows) // turn, rows[0], rows[-1]
    name = f"{first.name}{', ' if len(rows) == 2 else ' … '}{last.name}"
    if turn == 1:
        return replace(first, name=name, cls=f"{times} × {first.cls}".rstrip(" ×"))
    one = rows[:turn]
    size = sizes(item for row in one for item in row.sizes.items())
    kinds = ", ".join(row.cls or row.name for row in one)
    flops, both = total([row.flops for row in one]), total([row.vjp_flops for row in one])
    return ModuleRow(name, f"{times} × ({kinds})", None, size, flops, both, tuple(one))


def heading(summary: Summary) -> list[str]:
    """The parts of the first line: name, construction, mode and call, without the empty ones."""
    switch = clean(", ".join(summary.switch))
    mode = f"{clean(summary.mode)} ({switch})" if switch else clean(summary.mode)
    parts = (clean(summary.name), clean(summary.model), mode if summary.call else switch, clean(summary.call))
    return [part for part in parts if part]


def labels(summary: Summary) -> tuple[str, ...]:
    """The titles of the number columns; FLOPs only as far as they are known."""
    flops = (("FLOPs", summary.flops), ("vjp FLOPs", summary.vjp_flops))
    return (primary(summary), "bytes", *(label for label, count in flops if count is not None))


def primary(summary: Summary) -> str:
    """The name of the parameters' collection: `params`, or `Param` in NNX."""
    return "Param" if "Param" in summary.totals else "params"


def cells(summary: Summary, row: ModuleRow) -> tuple[str, ...]:
    """The numbers of a row, one for each of `labels`."""
    size = row.sizes.get(primary(summary))
    numbers = ("", "") if size is None else (count(size.elements, like=summary.parameters), bytes_(size.bytes))
    flops = ((summary.flops, row.flops), (summary.vjp_flops, row.vjp_flops))
    counted = (("" if of_row is None else count(of_row, like=whole)) for whole, of_row in flops if whole is not None)
    return (*numbers, *counted)


def outputs(row: ModuleRow) -> str:
    """What a row gives, as `dtype[shape]`; of a sequence what its last module gives. Empty without a call."""
    return outputs(row.rows[-1]) if row.module is None else clean(row.module.outputs)


def details(summary: Summary, row: ModuleRow) -> tuple[str, ...]:
    """What a row says besides its columns: shapes of its inputs, calls, variables and streams."""
    module = row.module
    if module is None:
        return ()
    said = []
    if module.inputs:
        said.append(f"in {clean(module.inputs)}")
    if summary.call and not module.calls:
        said.append("not called")
    if module.calls > 1:
        said.append(f"{module.calls} calls")
    for collection, size in row.sizes.items():
        arrays = [array for array in module.arrays if array.collection == collection]
        many = "" if collection == primary(summary) else f" {count(size.elements)}, {bytes_(size.bytes)}"
        # The variables of NNX's random streams are keys and counts, one pair for each stream: only their sum is shown.
        spelled = f": {', '.join(map(spell, arrays))}" if arrays and collection != "RngState" else ""
        said += [f"{clean(collection)}{many}{spelled}"] if many or spelled else []
    if module.streams:
        said.append(f"takes {clean(', '.join(module.streams))}")
    return tuple(said)


def spell(array: Array) -> str:
    """`kernel float32[9,4]`, with its metadata if it has some."""
    shape = ",".join(map(str, array.shape))
    about = f" {clean(array.about)}" if array.about else ""
    return f"{clean(array.name)} {clean(array.dtype)}[{shape}]{about}"


def facts(summary: Summary) -> tuple[Fact, ...]:
    """The rows beneath the table: totals, FLOPs, streams, collections written or sown, notes."""
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
    """How many levels are shown: `depth`, or as many as stay within `LINES` rows."""
    if depth is not None:
        return depth
    deep = root.depth
    while deep > 1 and root.size(deep) > LINES:
        deep -= 1
    return deep


def summary_text(summary: Summary, depth: int | None = None) -> str:
    """A summary as text, in 80 columns but on a wider terminal.

    Args:
      depth: levels of submodules to show; None for as many as stay within `LINES` rows.
    """
    root = tree(summary)
    deep = shown_depth(root, depth)
    rows = list(_rows(root, deep))
    outs = ["out" if summary.call else "", *(outputs(row) for row, _ in rows)]
    numbers = [labels(summary), *(cells(summary, row) for row, _ in rows)]
    widths = [max(cell_len(line[i]) for line in numbers) for i in range(len(numbers[0]))]
    names = [("  ", "module"), *(("  " * (level + 1), f"{row.name}  {row.cls}".rstrip()) for row, level in rows)]
    # What the numbers leave of a line; a wide terminal is used as far as names and outputs need it.
    taken, longest = sum(widths) + 2 * len(widths), max(map(cell_len, outs))
    named = max(cell_len(indent + name) for indent, name in names) + 2
    rest = min(width(), max(WIDTH, named + longest + taken)) - taken
    # Names come first: what is cut of an output for them is told in full beneath.
    wide = min(longest, max(rest - min(LEAST + max(cell_len(indent) for indent, _ in names), named), 3))

    def line(at: int) -> list[str]:
        """The columns of one row: its name wraps, the numbers are aligned at the right."""
        *above, last = wrap(names[at][1], names[at][0], names[at][0] + "    ", rest - wide - 2)
        cell = cut(outs[at], wide)
        text = last + " " * (rest - wide - cell_len(last)) + cell + " " * (wide - cell_len(cell))
        for number, most in zip(numbers[at], widths, strict=True):
            text += "  " + " " * (most - cell_len(number)) + number
        return [*above, text.rstrip()]

    lines = [*dotted(heading(summary)), *line(0)]
    for at, (row, level) in enumerate(rows, 1):
        lines += line(at)
        said = details(summary, row)
        if cell_len(outs[at]) > wide:
            said = (f"out {outs[at]}", *said)
        if level == deep and row.rows:
            said = (*said, f"{plural(row.size() - 1, 'row')} inside")
        if said:
            lines += wrap(" · ".join(said), "  " * (level + 2), "  " * (level + 3))
    lines += columns(facts(summary))
    if depth is None and deep < root.depth:
        lines += wrap(f"deeper than {plural(deep, 'level')} is folded away: --depth {root.depth} shows all of it", "  ")
    return "\n".join(lines)


def _rows(row: ModuleRow, deep: int, level: int = 0) -> Iterator[tuple[ModuleRow, int]]:
    yield row, level
    if level < deep:
        for part in row.rows:
            yield from _rows(part, deep, level + 1)
