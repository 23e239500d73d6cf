"""Compares the runs stored in a notebook with those of its new execution."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Literal

import ml_dtypes
import numpy as np
from msgspec import Struct

from ..base.files import Damaged
from ..base.types import HostArray
from ..base.ulp import largest_ulp
from .notebooks import Cell, Further, Leaf, Recorded, unreadable

Outcome = Literal["agrees", "within", "not comparable", "differs"]
_INTEGERS = ("bool", *(f"{sign}int{bits}" for sign in ("", "u") for bits in (2, 4, 8, 16, 32, 64)))
_FLOATS = ("float16", "bfloat16", "float32", "float64", *(name for name in dir(ml_dtypes) if name.startswith("float")))
_KNOWN = {*_INTEGERS, *_FLOATS, "complex64", "complex128"}
NAMES = {"device_kind": "device kind"}
"""How facts of the environment are called where not by their own names."""


class Tolerance(Struct, frozen=True):
    """How far a floating-point value may be from the stored one: `atol + rtol * abs(stored)`, as in `numpy.isclose`."""

    rtol: float
    atol: float = 0.0


class Distance(Struct, frozen=True):
    """How far apart the stored values of two outputs are.

    Attributes:
      compared: how many values were compared.
      of: how many elements the output has.
      differ: how many of the compared values differ.
      ulp: the largest distance in units in the last place among floating-point values; None where there is none, or
        where one of two values is NaN.
      absolute: the largest absolute distance; infinite or NaN where a value is.
      array: path of the array that has it; empty where the output is one array, and where nothing differs.
    """

    compared: int
    of: int
    differ: int
    ulp: int | None
    absolute: float
    array: str


class Verdict(Struct, frozen=True):
    """The verdict on one run, or on several that were stored together.

    Attributes:
      cell: the cell's number among the code cells, from 1; `line` is its first line.
      outcome: `agrees` in keys and every bit; `within` the tolerance in all stored values; `not comparable` (keys
        agree, bits do not, and the environment differs); or `differs`.
      run: the stored run, None where there is none.
      runs: how many runs the verdict is for.
      what: what differs: `runs`, `keys`, `shape` or `digest`; empty where every bit agrees.
      stored, now: the differing thing, in a few words.
      distance: between the stored values, None where that is unknown.
      changed: facts of the environment that differ: name → stored and now, `not stored` where it was not.
    """

    cell: int
    line: str
    outcome: Outcome
    what: str = ""
    stored: str = ""
    now: str = ""
    run: Recorded | None = None
    runs: int = 1
    distance: Distance | None = None
    changed: dict[str, tuple[str, str]] = {}


def compare(stored: Iterable[Cell], now: Iterable[Cell], tolerance: Tolerance | None = None) -> list[Verdict]:
    """A verdict on each run, cell by cell.

    Raises:
      FlaxMagicsError: a stored run is not what its description says.
    """
    return [verdict for one, other in zip(stored, now, strict=True) for verdict in _of_cell(one, other, tolerance)]


def _of_cell(stored: Cell, now: Cell, tolerance: Tolerance | None) -> Iterator[Verdict]:
    # With another number of runs, none can be matched with its counterpart.
    if stored.count != now.count:
        counts, run = (str(stored.count), str(now.count)), stored.runs[0] if stored.runs else None
        yield Verdict(stored.number, stored.line, "differs", "runs", *counts, run=run, runs=stored.count)
        return
    for one, other in zip(stored.runs, now.runs, strict=False):
        yield _of_run(stored, one, other, tolerance)
    if stored.further or now.further:
        yield _of_further(stored, now)


def _of_run(cell: Cell, stored: Recorded, now: Recorded, tolerance: Tolerance | None) -> Verdict:
    changed = changed_environment(stored, now)
    verdict = partial(Verdict, cell.number, cell.line, run=stored, changed=changed)
    if stored.keys != now.keys:
        return verdict("differs", "keys", *_other_key(stored.keys, now.keys))
    shape = _other_shape(stored, now)
    if shape is not None:
        return verdict("differs", "shape", *shape)
    if (stored.digest == now.digest and stored.digest is not None) or _agree_until_stopped(stored, now):
        return verdict("agrees")
    try:
        apart = distance(stored, now)
        close = None if tolerance is None else within(stored, now, tolerance)
    except Damaged as error:
        raise unreadable(cell.number, error) from None
    outcome: Outcome = "differs"
    if close:
        outcome = "within"
    # Without a reason for other bits in the environment, they differ.
    elif close is None and (changed or stored.digest is None or now.digest is None):
        outcome = "not comparable"
    return verdict(outcome, "digest", stored.digest or "not stored", now.digest or "none", distance=apart)


def _agree_until_stopped(stored: Recorded, now: Recorded) -> bool:
    """Whether a training that was interrupted has the losses of the other one, as far as both went."""
    one, other = stored.trained, now.trained
    if one is None or other is None or one.every != 1 or other.every != 1:
        return False
    if "interrupted" not in (one.stopped, other.stopped):
        return False
    # The one that was not interrupted did all of its steps, and would have done those of a longer one, too.
    longest = max(len(one.losses), len(other.losses))
    if any(curve.stopped != "interrupted" and len(curve.losses) < longest for curve in (one, other)):
        return False
    return all(loss == also for loss, also in zip(one.losses, other.losses, strict=False))


def _of_further(stored: Cell, now: Cell) -> Verdict:
    """The verdict on the runs of a loop that were only stored as a count and two digests."""
    one, other = stored.further or Further(0, "", ""), now.further or Further(0, "", "")
    changed = changed_environment(stored.runs[-1], now.runs[-1]) if stored.runs and now.runs else {}
    verdict = partial(Verdict, stored.number, stored.line, runs=max(one.runs, other.runs), changed=changed)
    if one.runs != other.runs:  # a run with a note has a report of its own, and is not among these
        return verdict("not comparable", "runs", f"{one.runs} in one", f"{other.runs} in one")
    if one.keys != other.keys:
        return verdict("differs", "keys", one.keys, other.keys)
    if one.digest != other.digest:
        return verdict("not comparable" if changed else "differs", "digest", one.digest, other.digest)
    return verdict("agrees")


def changed_environment(stored: Recorded, now: Recorded) -> dict[str, tuple[str, str]]:
    """Facts of the environment that are others now than stored: name → both."""
    was = stored.environment
    return {
        NAMES.get(name, name): ((was[name] or "none") if name in was else "not stored", value or "none")
        for name, value in now.environment.items()
        if name not in was or was[name] != value
    }


def _other_key(stored: Mapping[str, str], now: Mapping[str, str]) -> tuple[str, str]:
    """The first stream whose keys differ, with both keys."""
    streams = sorted(stored.keys() | now.keys())
    pairs = ((stream, stored.get(stream, "none"), now.get(stream, "none")) for stream in streams)
    stream, one, other = next((stream, one, other) for stream, one, other in pairs if one != other)
    # Eight digits, as reports show them, unless only later ones differ.
    short = 8 if one[:8] != other[:8] else 64
    return f"{stream} {one[:short]}", f"{stream} {other[:short]}"


def _other_shape(stored: Recorded, now: Recorded) -> tuple[str, str] | None:
    """The structures of the two outputs, if they differ; None if they are the same."""
    if stored.leaves is None or now.leaves is None:
        return None if stored.output == now.output else (stored.output, now.output)
    one, other = ([(leaf.path, leaf.array) for leaf in run.leaves or ()] for run in (stored, now))
    if one == other:
        return None
    # A structure that was cut short may look the same: then the first array that differs is named.
    if stored.output != now.output and not stored.output.endswith("…"):
        return stored.output, now.output
    both = [pair for pair in zip(one, other, strict=False) if pair[0] != pair[1]]
    first, second = both[0] if both else (("", f"{len(one)} arrays"), ("", f"{len(other)} arrays"))
    return " ".join(filter(None, first)), " ".join(filter(None, second))


def distance(stored: Recorded, now: Recorded) -> Distance | None:
    """The distance between two runs whose outputs have the same arrays; None where they have not, or no values.

    Raises:
      Damaged: the values are not what their description says.
    """
    if not _alike(stored, now):
        return None
    compared = differing = 0
    ulp: int | None = None
    lost = False
    worst, array = 0.0, ""
    for leaf, one, other in _pairs(stored, now):
        compared += leaf.values
        differs = _differs(one, other)
        if not differs.any():
            continue
        differing += int(differs.sum())
        apart = largest_ulp(one[differs], other[differs])
        if apart is not None:
            ulp = max(apart, ulp or 0)
        lost = lost or bool((_is_nan(one) != _is_nan(other)).any())
        largest = _absolute(leaf.dtype, one[differs], other[differs])
        if worst == worst and not largest <= worst:  # a NaN counts as the largest, and stays
            worst, array = largest, leaf.path
    of = sum(leaf.size for leaf in stored.leaves or ())
    return Distance(compared, of, differing, None if lost else ulp, worst, array)


def within(stored: Recorded, now: Recorded, tolerance: Tolerance) -> bool | None:
    """Whether all stored values agree: floating-point ones within `tolerance` as in `numpy.allclose`, others exactly.

    None where there are no values to compare. Raises Damaged as `distance` does.
    """
    if not _alike(stored, now) or (not stored.bits and not now.bits and stored.digest != now.digest):
        return None
    for leaf, one, other in _pairs(stored, now):
        if leaf.dtype in _INTEGERS:
            if _differs(one, other).any():
                return False
        else:
            with np.errstate(all="ignore"):
                if not np.allclose(_wide(other), _wide(one), rtol=tolerance.rtol, atol=tolerance.atol, equal_nan=True):
                    return False
    return True


def _alike(stored: Recorded, now: Recorded) -> bool:
    leaves = stored.leaves
    return leaves is not None and leaves == now.leaves and all(leaf.dtype in _KNOWN for leaf in leaves)


def _pairs(stored: Recorded, now: Recorded) -> Iterator[tuple[Leaf, HostArray, HostArray]]:
    """Yields each array with its values in both runs. Raises Damaged where `bits` is too short or too long."""
    start = 0
    for leaf in stored.leaves or ():
        # The bits are stored little-endian.
        dtype = np.dtype(getattr(ml_dtypes, leaf.dtype, None) or leaf.dtype).newbyteorder("<")
        end = start + leaf.values * dtype.itemsize
        if end > len(stored.bits) or end > len(now.bits):
            break
        yield leaf, np.frombuffer(stored.bits[start:end], dtype), np.frombuffer(now.bits[start:end], dtype)
        start = end
    else:
        if start == len(stored.bits) == len(now.bits):
            return
    raise Damaged("`bits` is not as long as the values are")


def _differs(one: HostArray, other: HostArray) -> HostArray:
    """Where the bits differ. All NaNs count as equal, whatever their payload."""
    bits = [array.view(np.uint8).reshape(len(array), array.itemsize) for array in (one, other)]
    differs: HostArray = (bits[0] != bits[1]).any(axis=1) & ~(_is_nan(one) & _is_nan(other))
    return differs


def _is_nan(array: HostArray) -> HostArray:
    return np.isnan(_wide(array))


def _wide(array: HostArray) -> HostArray:
    # Wide enough for each of the dtypes, also for those of ml_dtypes.
    return array.astype(np.complex128 if array.dtype.kind == "c" else np.float64)


def _absolute(dtype: str, one: HostArray, other: HostArray) -> float:
    if dtype in _INTEGERS:  # as Python ints: a float cannot hold every 64-bit integer
        return float(max(abs(int(a) - int(b)) for a, b in zip(one.tolist(), other.tolist(), strict=True)))
    with np.errstate(all="ignore"):
        return float(np.abs(_wide(other) - _wide(one)).max())
