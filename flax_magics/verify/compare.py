"""The runs that a notebook holds, held against those that it gives now."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ..errors import FlaxMagicsError
from .stored import Cell, Further, Recorded, unreadable

Outcome = Literal["agrees", "within", "not comparable", "differs"]
NAMES = {"device_kind": "device kind"}
"""How a fact of the environment is called, where it is not by its own name."""


@dataclass(frozen=True)
class Tolerance:
    """How far a floating-point value may be from the stored one: `atol + rtol * abs(stored)`."""

    rtol: float
    atol: float = 0.0


@dataclass(frozen=True)
class Verdict:
    """What became of one run, or of several that were stored as one.

    Attributes:
      cell: its number, of the code cells from 1; `line` is the first of the cell.
      outcome: `agrees` in its keys and in every bit; `within` the tolerance in all values that are stored; `not comparable`
        (the keys agree, the bits do not, and could not be expected to); or `differs`.
      run: the stored one, None where there is none.
      runs: how many runs it stands for.
      what: what differs: `runs`, `keys`, `shape` or `digest`; empty where every bit agrees.
      stored, now: that, in a few words.
      distance: a `values.Distance` between the values that are stored, None where that cannot be told.
      changed: what the bits depend on, and is another now: name → stored and now, `not stored` where it was not.
    """

    cell: int
    line: str
    outcome: Outcome
    run: Recorded | None = None
    runs: int = 1
    what: str = ""
    stored: str = ""
    now: str = ""
    distance: Any = None
    changed: Mapping[str, tuple[str, str]] | None = None


def compare(stored: Iterable[Cell], now: Iterable[Cell], tolerance: Tolerance | None = None) -> list[Verdict]:
    """A verdict on each run, cell by cell.

    Raises:
      FlaxMagicsError: a stored run is not what it says it is.
    """
    return [verdict for one, other in zip(stored, now, strict=True) for verdict in _of_cell(one, other, tolerance)]


def _of_cell(stored: Cell, now: Cell, tolerance: Tolerance | None) -> Iterable[Verdict]:
    if stored.count != now.count:
        run = stored.runs[0] if stored.runs else None
        yield Verdict(
            stored.number, stored.line, "differs", run, stored.count, "runs", str(stored.count), str(now.count)
        )
        return
    for one, other in zip(stored.runs, now.runs, strict=False):
        yield _of_run(stored, one, other, tolerance)
    if stored.further or now.further:
        both = stored.runs and now.runs
        yield _of_further(stored, now, changed_environment(stored.runs[-1], now.runs[-1]) if both else {})


def _of_run(cell: Cell, stored: Recorded, now: Recorded, tolerance: Tolerance | None) -> Verdict:
    changed = changed_environment(stored, now)

    def verdict(outcome: Outcome, what: str, was: str, is_now: str, distance: Any = None) -> Verdict:
        return Verdict(cell.number, cell.line, outcome, stored, 1, what, was, is_now, distance, changed)

    if stored.keys != now.keys:
        return verdict("differs", "keys", *_other_key(stored.keys, now.keys))
    shape = _other_shape(stored, now)
    if shape is not None:
        return verdict("differs", "shape", *shape)
    if stored.digest == now.digest and stored.digest is not None:
        return verdict("agrees", "", "", "")
    from .values import distance, within

    try:
        apart = distance(stored, now)
        close = None if tolerance is None else within(stored, now, tolerance.rtol, tolerance.atol)
    except FlaxMagicsError as error:
        raise unreadable(cell.number, error) from None
    outcome: Outcome = "differs"
    if close:
        outcome = "within"
    elif close is None and (changed or stored.digest is None or now.digest is None):
        outcome = "not comparable"
    return verdict(outcome, "digest", stored.digest or "not stored", now.digest or "none", apart)


def _of_further(stored: Cell, now: Cell, changed: Mapping[str, tuple[str, str]]) -> Verdict:
    """The runs of a loop beyond those that are kept one by one."""
    one, other = stored.further or Further(0, "", ""), now.further or Further(0, "", "")
    runs = max(one.runs, other.runs)

    def verdict(outcome: Outcome, what: str = "", was: str = "", is_now: str = "") -> Verdict:
        return Verdict(stored.number, stored.line, outcome, None, runs, what, was, is_now, None, changed)

    if one.runs != other.runs:  # one had news now, or had then, and so is kept by itself
        return verdict("not comparable", "runs", f"{one.runs} in one", f"{other.runs} in one")
    if one.keys != other.keys:
        return verdict("differs", "keys", one.keys, other.keys)
    if one.digest != other.digest:
        return verdict("not comparable" if changed else "differs", "digest", one.digest, other.digest)
    return verdict("agrees")


def changed_environment(stored: Recorded, now: Recorded) -> dict[str, tuple[str, str]]:
    """What the bits depend on, and is another now than was stored: name → both."""
    found = {}
    for name, value in now.environment.items():
        if name not in stored.environment:
            found[NAMES.get(name, name)] = ("not stored", value or "none")
        elif stored.environment[name] != value:
            found[NAMES.get(name, name)] = (stored.environment[name] or "none", value or "none")
    return found


def _other_key(stored: Mapping[str, str], now: Mapping[str, str]) -> tuple[str, str]:
    for stream in sorted(stored.keys() | now.keys()):
        one, other = stored.get(stream, "none"), now.get(stream, "none")
        if one != other:
            short = 8 if one[:8] != other[:8] else 64
            return f"{stream} {one[:short]}", f"{stream} {other[:short]}"
    raise AssertionError("keys that are equal")


def _other_shape(stored: Recorded, now: Recorded) -> tuple[str, str] | None:
    """The outputs' structure, where it is not the same."""
    if stored.leaves is None or now.leaves is None:
        return None if stored.output == now.output else (stored.output, now.output)
    one, other = ([(leaf.path, leaf.array) for leaf in run.leaves or ()] for run in (stored, now))
    if one == other:
        return None
    if stored.output != now.output and not stored.output.endswith("…"):
        return stored.output, now.output
    both = [pair for pair in zip(one, other, strict=False) if pair[0] != pair[1]]
    first, second = both[0] if both else (("", f"{len(one)} arrays"), ("", f"{len(other)} arrays"))
    return " ".join(filter(None, first)), " ".join(filter(None, second))
