"""A summary as a tree of rows, equal ones folded into one: as text in 80 columns and as HTML; and variables as a tree."""

from __future__ import annotations

import math
import warnings
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from functools import cached_property, partial

import treescope  # type: ignore[import-untyped]
from msgspec import Struct
from msgspec.structs import replace

from ..base.text import WIDTH, bytes_, cell_len, clean, clean_lines, count, dotted, plural, wrap
from ..base.types import PyTree
from ..errors import FlaxMagicsError
from ..models.calls import Path
from ..report.facts import Row as Fact
from ..report.html import render, shown_bundle
from ..report.text import columns


def summary_html(summary: Summary, depth: int | None = None) -> str:
    """What `%flax_summary` shows: each row folds. At first those with others inside are open, as deep as the text goes."""
    root = tree(summary)
    of_row = {"cells": partial(cells, summary), "details": partial(details, summary)}
    parts = {"heading": heading(summary), "labels": labels(summary), "facts": facts(summary)}
    return render("summary.html", {**parts, **of_row, "root": root, "deep": shown_depth(root, depth)})


def summary_bundle(summary: Summary, depth: int | None, style: str) -> dict[str, object]:
    """The MIME bundle of a summary; for `depth` see `summary.summary_text`."""
    return shown_bundle(summary_text(summary, depth), lambda: summary_html(summary, depth), style)


def tree_bundle(name: str, variables: PyTree, style: str) -> dict[str, object]:
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


class Size(Struct, frozen=True):
    """How much there is of a collection: elements of its arrays, and bytes."""

    elements: int = 0
    bytes: int = 0

    def __add__(self, other: Size) -> Size:
        return Size(self.elements + other.elements, self.bytes + other.bytes)


class Array(Struct, frozen=True):
    """One variable: its name within the module, and what it is; `about` holds its metadata, such as partition names."""

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
      cls: its class; empty where that is known only in a call.
      method: what was called, in its first call.
      calls: how many calls there are; 0 for one that was not called.
      inputs, outputs: those of the first call, as `float32[3,4], train=True`.
      arrays: variables of its own, those of its submodules left out.
      streams: random streams that it consumed.
      flops: of all its calls, submodules included, as XLA counts them; None where that is not known.
      vjp_flops: of forward and backward pass together, with respect to variables and floating inputs, without what no
        gradient depends on; None unless asked.
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
    """Collection → how much there is of it in all of these; parameters first."""
    of_collection: dict[str, Size] = {}
    for collection, size in parts:
        of_collection[collection] = of_collection.get(collection, Size()) + size
    return dict(sorted(of_collection.items(), key=lambda item: (item[0] not in ("params", "Param"), item[0])))


class Summary(Struct, frozen=True, dict=True):
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
    sown: Mapping[str, str] = {}
    notes: tuple[str, ...] = ()

    @cached_property
    def totals(self) -> Mapping[str, Size]:
        """Collection → how much there is of it, `params` first."""
        return sizes((array.collection, array.size) for module in self.modules for array in module.arrays)

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
        inside = (module for module in self.modules if module.path[: len(path)] == path)
        return sizes((array.collection, array.size) for module in inside for array in module.arrays)

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


class ModuleRow(Struct, frozen=True):
    """A module, several equal ones that follow each other, or a turn of several that repeats.

    Attributes:
      name: `Dense_0`, `Block_0 … Block_49`.
      cls: its class, `50 × Block`; of a turn `9 × (Dense, LayerNorm)`.
      module: the first; None for a turn.
      sizes: collection → how much there is in one of them, submodules included.
      flops, vjp_flops: of one of them.
      rows: the submodules of the first; of a turn its modules.
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
        """How many levels of rows are inside."""
        return max((1 + row.depth for row in self.rows), default=0)

    def size(self, depth: int = -1) -> int:
        """How many rows it is with what is inside, down to a depth; with all of it by default."""
        return 1 + (sum(row.size(depth - 1) for row in self.rows) if depth else 0)


def innermost(path: Path, paths: Container[Path]) -> Path:
    """The innermost of `paths` that `path` is in."""
    return next((path[:n] for n in range(len(path), 0, -1) if path[:n] in paths), ())


def tree(summary: Summary) -> ModuleRow:
    """The model itself, with everything folded that repeats."""
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


def total(counts: list[int | None]) -> int | None:
    """The sum, None where one of them is not known."""
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
    """Name, construction, mode, and the call."""
    switch = clean(", ".join(summary.switch))
    mode = f"{clean(summary.mode)} ({switch})" if switch else clean(summary.mode)
    parts = (clean(summary.name), clean(summary.model), mode if summary.call else switch, clean(summary.call))
    return [part for part in parts if part]


def labels(summary: Summary) -> tuple[str, ...]:
    """What the columns of numbers are: the parameters, their bytes, FLOPs as far as they are known."""
    flops = (("FLOPs", summary.flops), ("vjp FLOPs", summary.vjp_flops))
    return (primary(summary), "bytes", *(label for label, count in flops if count is not None))


def primary(summary: Summary) -> str:
    """The collection of the parameters: `params`, of NNX `Param`."""
    return "Param" if "Param" in summary.totals else "params"


def cells(summary: Summary, row: ModuleRow) -> tuple[str, ...]:
    """The numbers of a row, as many as there are `labels`."""
    size = row.sizes.get(primary(summary))
    numbers = ("", "") if size is None else (number(size.elements), bytes_(size.bytes))
    flops = ((summary.flops, row.flops), (summary.vjp_flops, row.vjp_flops))
    return (*numbers, *(number(of_row) for of_call, of_row in flops if of_call is not None))


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
        said.append(f"{clean(module.inputs) or 'nothing'} → {clean(module.outputs)}")
    elif summary.call:
        said.append("not called")
    if module.calls > 1:
        said.append(f"{module.calls} calls")
    for collection, size in row.sizes.items():
        arrays = [array for array in module.arrays if array.collection == collection]
        many = "" if collection == primary(summary) else f" {number(size.elements)}, {bytes_(size.bytes)}"
        spelled = f": {', '.join(map(spell, arrays))}" if arrays and collection != "RngState" else ""
        said += [f"{clean(collection)}{many}{spelled}"] if many or spelled else []
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
    while deep > 1 and root.size(deep) > LINES:
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
    lines = [*dotted(heading(summary)), *_aligned("module", "  ", numbers[0], widths)]
    for (row, level), figures in zip(rows, numbers[1:], strict=True):
        indent = "  " * (level + 1)
        lines += _aligned(f"{row.name}  {row.cls}".rstrip(), indent, figures, widths)
        said = details(summary, row)
        if level == deep and row.rows:
            said = (*said, f"{plural(row.size() - 1, 'row')} inside")
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


def _aligned(text: str, indent: str, figures: Sequence[str], widths: Sequence[int]) -> list[str]:
    """A name with its numbers at the right; a name that leaves no room for them has lines of its own."""
    room = WIDTH - sum(widths) - 2 * len(widths)
    *above, last = wrap(text, indent, indent + "    ", room)
    right = "".join("  " + " " * (wide - cell_len(text)) + text for text, wide in zip(figures, widths, strict=True))
    return [*above, (last + " " * (room - cell_len(last)) + right).rstrip()]
