"""The runs that a notebook's outputs hold. Whatever stands there is checked, field by field, before it is used."""

from __future__ import annotations

import json
import math
import os
import stat
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import msgspec

from ..base.files import open_without_waiting
from ..base.jsondata import RUN_JSON, RUNS_JSON, Damaged, convert
from ..base.text import clean, cut
from ..errors import FlaxMagicsError

LARGEST = 256 << 20
"""Bytes of the largest notebook that is read."""

_LEAVES = 1000
_ROWS = 100_000
_VERSIONS = ("jax", "jaxlib", "flax")
_ARRAY = r"\A[a-z][a-z0-9_]{0,30}\[(?:[0-9]{1,18}(?:,[0-9]{1,18}){0,99})?\]\Z"
T = TypeVar("T")


Number = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]


class Leaf(msgspec.Struct, frozen=True):
    """One array of an output: its path, what it is (`float32[3,4]`), and how many of its values are kept."""

    path: str
    array: Annotated[str, msgspec.Meta(pattern=_ARRAY)]
    values: Number

    def __post_init__(self) -> None:
        if self.values > min(self.size, _LEAVES):
            raise ValueError("`values` is more than there can be")

    @property
    def dtype(self) -> str:
        """`float32`."""
        return self.array.partition("[")[0]

    @property
    def size(self) -> int:
        """How many elements it has."""
        shape = self.array.partition("[")[2].rstrip("]")
        return math.prod(int(size) for size in shape.split(",")) if shape else 1


class Recorded(msgspec.Struct, frozen=True):
    """One run, as `Run.to_json` has it; what else stands there, of a later version, is passed over.

    Attributes:
      keys: stream → the words of its key in hex.
      leaves, bits: the values that are kept of the output; None where the run was stored without them.
      versions, device, device_kind, processor, threads: see `environment`; `UNSET` where one was not stored.
    """

    version: Literal[1]
    command: str
    call: str
    output: str
    seed: int
    draw: Number
    keys: dict[str, str]
    started: float
    device: str
    model: str | None = None
    draws: Number | None = None
    digest: str | None = None
    leaves: Annotated[tuple[Leaf, ...], msgspec.Meta(max_length=_LEAVES)] | None = None
    bits: bytes = b""
    versions: dict[str, str] = {}
    device_kind: str | msgspec.UnsetType | None = msgspec.UNSET
    processor: str | msgspec.UnsetType | None = msgspec.UNSET
    threads: Number | msgspec.UnsetType | None = msgspec.UNSET

    def __post_init__(self) -> None:
        if self.seed.bit_length() > 128:
            raise ValueError("`seed` is too large")
        if not math.isfinite(self.started):
            raise ValueError("`started` is not finite")

    @property
    def environment(self) -> dict[str, str | None]:
        """What its bits depend on: name → value, None where it does not apply, left out where it was not stored."""
        facts = {name: self.versions[name] for name in _VERSIONS if name in self.versions}
        more = {name: getattr(self, name) for name in ("device", "device_kind", "processor", "threads")}
        stored = {name: value for name, value in more.items() if value is not msgspec.UNSET}
        return facts | {name: None if value is None else str(value) for name, value in stored.items()}


class Further(msgspec.Struct, frozen=True):
    """Runs of a loop beyond those that are kept one by one: how many, a digest of their keys, one of their digests."""

    runs: Annotated[int, msgspec.Meta(ge=1, le=(1 << 63) - 1)]
    keys: str
    digest: str


class RecordedLoop(msgspec.Struct, frozen=True):
    """The runs of a counting line. Of each row stands there what differs from the row before."""

    version: Literal[1]
    runs: list[dict[str, Any]]
    further: Further | None = None


@dataclass(frozen=True)
class Cell:
    """The runs of one cell, in the order in which they were made.

    Attributes:
      number: of the code cells of the notebook, from 1.
      line: its first line that is not empty.
    """

    number: int
    line: str
    runs: tuple[Recorded, ...] = ()
    further: Further | None = None

    @property
    def count(self) -> int:
        """All of its runs."""
        return len(self.runs) + (self.further.runs if self.further else 0)


def read(path: Path) -> Any:
    """The notebook of a file, as nbformat has it. The file is only read.

    Raises:
      FlaxMagicsError: it cannot be read, or is no notebook.
    """
    import nbformat
    from nbformat.v4.nbjson import JSONReader

    try:
        with open_without_waiting(path) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise FlaxMagicsError("it is no file.")
            if status.st_size > LARGEST:
                raise FlaxMagicsError(f"it has {status.st_size:,} bytes, and {LARGEST:,} is the most that is read.")
            data = file.read(LARGEST + 1)
    except OSError as error:
        raise FlaxMagicsError(f"it cannot be read: {error.strerror or type(error).__name__}.") from None
    try:
        content = json.loads(data.decode("utf-8"))
        version = content.get("nbformat") if isinstance(content, dict) else None
        if version != 4 or isinstance(version, bool):
            raise FlaxMagicsError("it is no notebook of format 4, which Jupyter writes: open it there and save it.")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # cells without ids, which old notebooks have
            nbformat.validate(nbformat.from_dict(content))
            notebook = JSONReader().to_notebook(content)
    except RecursionError:
        raise FlaxMagicsError("it is no notebook: it is nested too deeply.") from None
    except nbformat.ValidationError as error:
        raise FlaxMagicsError(f"it is no valid notebook: {brief(str(error))}") from None
    except ValueError as error:  # no UTF-8, no JSON, or an integer of thousands of digits
        raise FlaxMagicsError(f"it is no notebook: {brief(str(error))}") from None
    return notebook


def brief(text: str) -> str:
    """The first line of a message, cleaned and cut."""
    lines = [clean(line[:2000]) for line in text[:20_000].splitlines()]
    return cut(next(filter(None, lines), ""), 200)


def code_cells(notebook: Any) -> list[tuple[int, Any]]:
    """The code cells by their number, from 1."""
    cells = (cell for cell in notebook.cells if cell.cell_type == "code")
    return list(enumerate(cells, 1))


def is_run(cell: Any) -> bool:
    """Whether a code cell is run: it is not empty, and not tagged as one to skip."""
    return bool(cell.source.strip()) and "skip-execution" not in tags_of(cell)


def tags_of(cell: Any) -> list[str]:
    """The tags of a cell."""
    tags = cell.metadata.get("tags")
    return [tag for tag in tags if isinstance(tag, str)] if isinstance(tags, list) else []


def first_line(cell: Any) -> str:
    """The first line of a cell that is not empty."""
    return next((clean(line[:1000]) for line in cell.source.splitlines() if line.strip()), "")


def other_order(notebook: Any) -> str:
    """`cell 4 was run before cell 3`, of the first two cells that were; empty where they were run from top to bottom."""
    latest, before = 0, 0
    for number, cell in code_cells(notebook):
        count = cell.execution_count
        if count is None or not is_run(cell):
            continue
        if count < latest:
            return f"cell {number} was run before cell {before}"
        latest, before = count, number
    return ""


def runs_of(notebook: Any) -> list[Cell]:
    """The runs that the outputs of each code cell hold; cells that are not run hold none.

    Raises:
      FlaxMagicsError: an output under our name is not what we write.
    """
    return [runs_of_cell(number, cell) for number, cell in code_cells(notebook)]


def runs_of_cell(number: int, cell: Any) -> Cell:
    """The runs that the outputs of one code cell hold. Raises what `runs_of` raises."""
    runs: list[Recorded] = []
    further: Further | None = None
    try:
        for output in cell.outputs if is_run(cell) else ():
            data = output.get("data", {})
            if RUN_JSON in data:
                runs.append(_recorded(data[RUN_JSON]))
            if RUNS_JSON in data:
                loop = _of_this_version(data[RUNS_JSON], RecordedLoop, "the loop")
                if len(loop.runs) > _ROWS:
                    raise Damaged(f"the loop has more than {_ROWS} rows")
                if loop.further is not None and further is not None:
                    raise Damaged("there are two loops of more runs than are kept")
                row: dict[str, Any] = {"version": 1}
                for changes in loop.runs:
                    row = {**row, **changes}
                    runs.append(_recorded(row))
                further = loop.further or further
    except Damaged as error:
        raise unreadable(number, error) from None
    # A run that had news has a report of its own, and the others share one: only together they are in order.
    return Cell(number, first_line(cell), tuple(sorted(runs, key=lambda run: run.started)), further)


def unreadable(number: int, error: Damaged) -> FlaxMagicsError:
    """`error`, said of the cell that holds what cannot be read."""
    return FlaxMagicsError(f"cell {number} holds an output of flax_magics that cannot be read: {clean(str(error))}.")


def _recorded(data: Any) -> Recorded:
    return _of_this_version(data, Recorded, "the run")


def _of_this_version(data: Any, kind: type[T], what: str) -> T:
    version = data.get("version") if isinstance(data, dict) else None
    if type(version) is int and version != 1:
        raise Damaged(
            f"{what} was written by another version of flax_magics (its format is {cut(str(version), 20)}, not 1)"
        )
    return convert(data, kind, what)
