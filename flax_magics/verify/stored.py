"""The runs that a notebook's outputs hold. Whatever stands there is checked, field by field, before it is used."""

from __future__ import annotations

import base64
import binascii
import json
import math
import os
import re
import stat
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..base.jsondata import RUN_JSON, RUNS_JSON
from ..base.text import clean, cut
from ..errors import FlaxMagicsError

LARGEST = 256 << 20
"""Bytes of the largest notebook that is read."""

_LEAVES = 1000
_ROWS = 100_000
_VERSIONS = ("jax", "jaxlib", "flax")
_ARRAY = re.compile(r"([a-z][a-z0-9_]{0,30})\[((?:\d{1,18}(?:,\d{1,18}){0,99})?)\]")


@dataclass(frozen=True)
class Leaf:
    """One array of an output: its path, what it is (`float32[3,4]`), and how many of its values are kept."""

    path: str
    array: str
    values: int

    @property
    def dtype(self) -> str:
        """`float32`."""
        return self.array.partition("[")[0]

    @property
    def size(self) -> int:
        """How many elements it has."""
        shape = self.array.partition("[")[2].rstrip("]")
        return math.prod(int(size) for size in shape.split(",")) if shape else 1


@dataclass(frozen=True)
class Recorded:
    """One run, as `recorded.recorded` has it.

    Attributes:
      keys: stream → the words of its key in hex.
      leaves, bits: the values that are kept of the output; None where the run was stored without them.
      environment: what its bits depend on: name → value, None where it does not apply, left out where it was not stored.
    """

    command: str
    model: str
    call: str
    output: str
    seed: int
    draw: int
    draws: int | None
    keys: Mapping[str, str]
    digest: str | None
    leaves: tuple[Leaf, ...] | None
    bits: bytes
    started: float
    environment: Mapping[str, str | None]


@dataclass(frozen=True)
class Further:
    """Runs of a loop beyond those that are kept one by one: how many, a digest of their keys, one of their digests."""

    runs: int
    keys: str
    digest: str


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
        with open(path, "rb", opener=_opened) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise FlaxMagicsError("it is no file.")
            if status.st_size > LARGEST:
                raise FlaxMagicsError(f"it has {status.st_size:,} bytes, and {LARGEST:,} is the most that is read.")
            data = file.read(LARGEST + 1)
    except OSError as error:
        raise FlaxMagicsError(f"it cannot be read: {error.strerror or type(error).__name__}.") from None
    try:
        found = json.loads(data.decode("utf-8"))
        version = found.get("nbformat") if isinstance(found, dict) else None
        if version != 4 or isinstance(version, bool):
            raise FlaxMagicsError("it is no notebook of format 4, which Jupyter writes: open it there and save it.")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # cells without ids, which old notebooks have
            nbformat.validate(nbformat.from_dict(found))
            notebook = JSONReader().to_notebook(found)
    except RecursionError:
        raise FlaxMagicsError("it is no notebook: it is nested too deeply.") from None
    except nbformat.ValidationError as error:
        raise FlaxMagicsError(f"it is no valid notebook: {brief(str(error))}") from None
    except ValueError as error:  # no UTF-8, no JSON, or an integer of thousands of digits
        raise FlaxMagicsError(f"it is no notebook: {brief(str(error))}") from None
    return notebook


def _opened(path: str, flags: int) -> int:
    # A named pipe would wait for somebody to write.
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


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
                runs.append(_recorded(_object(data[RUN_JSON], "the run")))
            if RUNS_JSON in data:
                rows, rest = _rows(_object(data[RUNS_JSON], "the loop"))
                if rest is not None and further is not None:
                    raise FlaxMagicsError("there are two loops of more runs than are kept.")
                runs += rows
                further = rest or further
    except FlaxMagicsError as error:
        raise unreadable(number, error) from None
    # A run that had news has a report of its own, and the others share one: only together they are in order.
    return Cell(number, first_line(cell), tuple(sorted(runs, key=lambda run: run.started)), further)


def unreadable(number: int, error: FlaxMagicsError) -> FlaxMagicsError:
    """`error`, said of the cell that holds what cannot be read."""
    return FlaxMagicsError(f"cell {number} holds an output of flax_magics that cannot be read: {error.message}")


def _rows(data: Mapping[str, Any]) -> tuple[list[Recorded], Further | None]:
    _version(data)
    rows = data.get("runs")
    if not isinstance(rows, list) or len(rows) > _ROWS:
        raise FlaxMagicsError("`runs` is no list.")
    runs, row = [], {"version": 1}
    for one in rows:
        row = {**row, **_object(one, "a row")}
        runs.append(_recorded(row))
    rest = data.get("further")
    if rest is None:
        return runs, None
    rest = _object(rest, "`further`")
    count = _integer(rest, "runs")
    if count < 1:
        raise FlaxMagicsError("`runs` is less than 1.")
    return runs, Further(count, _text(rest, "keys"), _text(rest, "digest"))


def _recorded(data: Mapping[str, Any]) -> Recorded:
    _version(data)
    keys = _object(data.get("keys"), "`keys`")
    return Recorded(
        command=_text(data, "command"),
        model=_text(data, "model", ""),
        call=_text(data, "call"),
        output=_text(data, "output"),
        seed=_integer(data, "seed"),
        draw=_integer(data, "draw"),
        draws=None if data.get("draws") is None else _integer(data, "draws"),
        keys={stream: _text(keys, stream) for stream in keys},
        digest=None if data.get("digest") is None else _text(data, "digest"),
        leaves=_leaves(data),
        bits=_bits(data),
        started=_number(data, "started"),
        environment=_environment(data),
    )


def _version(data: Mapping[str, Any]) -> None:
    version = _integer(data, "version")
    if version != 1:
        raise FlaxMagicsError(f"it was written by another version of flax_magics (its format is {version}, not 1).")


def _environment(data: Mapping[str, Any]) -> dict[str, str | None]:
    versions = _object(data.get("versions", {}), "`versions`")
    found: dict[str, str | None] = {name: _text(versions, name) for name in _VERSIONS if name in versions}
    found["device"] = _text(data, "device")
    for name in ("device_kind", "processor"):
        if name in data:
            found[name] = None if data[name] is None else _text(data, name)
    if "threads" in data:
        found["threads"] = None if data["threads"] is None else str(_integer(data, "threads"))
    return found


def _leaves(data: Mapping[str, Any]) -> tuple[Leaf, ...] | None:
    leaves = data.get("leaves")
    if leaves is None:
        return None
    if not isinstance(leaves, list) or len(leaves) > _LEAVES:
        raise FlaxMagicsError("`leaves` is no list.")
    found = []
    for leaf in leaves:
        leaf = _object(leaf, "a leaf")
        array, values = _text(leaf, "array"), _integer(leaf, "values")
        if not _ARRAY.fullmatch(array):
            raise FlaxMagicsError("`array` is no dtype with a shape.")
        found.append(Leaf(_text(leaf, "path"), array, values))
        if not 0 <= values <= min(found[-1].size, _LEAVES):
            raise FlaxMagicsError("`values` is more than there can be.")
    return tuple(found)


def _bits(data: Mapping[str, Any]) -> bytes:
    if data.get("bits") is None:
        return b""
    try:
        return base64.b64decode(_text(data, "bits"), validate=True)
    except (binascii.Error, ValueError):
        raise FlaxMagicsError("`bits` is no base64.") from None


def _object(data: Any, what: str) -> Mapping[str, Any]:
    if not isinstance(data, dict):
        raise FlaxMagicsError(f"{what} is no object.")
    return data


def _text(data: Mapping[str, Any], name: str, default: str | None = None) -> str:
    value = data.get(name)
    if value is None and default is not None:
        return default
    if not isinstance(value, str):
        raise FlaxMagicsError(f"`{cut(clean(name), 40)}` is no text.")
    return value


def _integer(data: Mapping[str, Any], name: str) -> int:
    value = data.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or value.bit_length() > 128:
        raise FlaxMagicsError(f"`{name}` is no whole number.")
    return value


def _number(data: Mapping[str, Any], name: str) -> float:
    value = data.get(name)
    if isinstance(value, int):
        return float(_integer(data, name))
    if not isinstance(value, float) or not math.isfinite(value):
        raise FlaxMagicsError(f"`{name}` is no number.")
    return value
