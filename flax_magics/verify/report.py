"""The result of verifying notebooks, as text in 80 columns and as JSON."""

from __future__ import annotations

import math
import re
import shlex
from collections import ChainMap
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Literal

from msgspec import Struct
from msgspec.structs import asdict

from ..base.text import DIGITS, clean, count, cut, flow, plural, table, ulp, wrap
from ..errors import advice_lines

if TYPE_CHECKING:
    from .compare import Outcome, Tolerance, Verdict

Status = Literal["agrees", "differs", "could not run", "not comparable", "nothing to verify"]
EXIT: dict[Status, int] = {
    # The worst first: the exit status of several notebooks is that of the worst.
    "could not run": 2,
    "differs": 1,
    "nothing to verify": 4,
    "not comparable": 3,
    "agrees": 0,
}
SHOWN = 10
"""How many differences of a notebook the text shows."""
_GIVEN = 1000


class Result(Struct, frozen=True):
    """The result for one notebook.

    Attributes:
      file: its path as it was given.
      verdicts: on each of its runs, as far as it ran.
      failed: why it could not be read, or did not run to its end; None where it did.
      seconds: how long it ran.
      tolerance: within which values may differ; None where every bit has to agree.
      order: how its cells had been run, if not from top to bottom: `cell 4 was run before cell 3`.
    """

    file: str
    verdicts: Sequence[Verdict] = ()
    failed: str | None = None
    seconds: float = 0.0
    tolerance: Tolerance | None = None
    order: str = ""

    @property
    def status(self) -> Status:
        """The result in one word or two: the worst that applies."""
        if self.failed is not None:
            return "could not run"
        if not self.verdicts:
            return "nothing to verify"
        outcomes = {verdict.outcome for verdict in self.verdicts}
        return "differs" if "differs" in outcomes else "not comparable" if "not comparable" in outcomes else "agrees"

    def runs(self, *outcomes: Outcome) -> int:
        """How many runs have one of these outcomes; without arguments, how many there are."""
        return sum(verdict.runs for verdict in self.verdicts if not outcomes or verdict.outcome in outcomes)

    @property
    def changed(self) -> dict[str, tuple[str, str]]:
        """Facts of the environment that differ from those stored with a run: name → stored and now."""
        return dict(ChainMap(*(verdict.changed for verdict in self.verdicts)))


def exit_status(results: Iterable[Result]) -> int:
    """The exit status of the worst result; without results that of nothing to verify."""
    statuses = {result.status for result in results} or {"nothing to verify"}
    return next(number for status, number in EXIT.items() if status in statuses)


def text(result: Result) -> str:
    """A line on the notebook, and beneath it a table of what differs."""
    head = f"{clean(result.file)}: "
    lines = wrap(head + _summary(result), rest="  ")
    other = [v for v in result.verdicts if v.outcome == "differs"] or [
        v for v in result.verdicts if v.outcome == "not comparable"
    ]
    if other:
        rows = [("cell", "first line", "draw", "what", "how far, in how many values"), *map(_row, other[:SHOWN])]
        lines += table(rows, indent="  ")
    if len(other) > SHOWN:
        lines.append(f"  … and {plural(sum(v.runs for v in other[SHOWN:]), 'run')} more")
    if result.changed:
        parts = [f"{clean(name)} {clean(was)} → {clean(now)}" for name, (was, now) in result.changed.items()]
        lines += flow(parts, "  other than stored  ", gap="   ")
    if result.order and result.status in ("differs", "could not run"):
        lines += wrap(f"its cells were not run from top to bottom: {result.order}", "  ")
    if result.status == "not comparable":
        lines.append("  the values that are stored can be compared")
        command = f"python -m flax_magics verify --rtol 1e-5 {shlex.quote(result.file)}"
        lines += [f"  {line}" for line in advice_lines(command)]
    return "\n".join(lines)


def _summary(result: Result) -> str:
    if result.failed is not None:
        differ = result.runs("differs")
        return f"could not run: {result.failed}" + (f" Before it, {plural(differ, 'run')} differ." if differ else "")
    if not result.verdicts:
        return "no flax_magics outputs: nothing to verify"
    runs, bits, within = result.runs(), result.runs("agrees"), result.runs("within")
    apart, differ = result.runs("not comparable"), result.runs("differs")
    if bits == runs:
        return f"agrees: {plural(runs, 'run')}, keys and every bit"
    parts = [f"keys and every bit in {count(bits)}"] if bits else []
    if within and result.tolerance is not None:
        atol = f", atol {result.tolerance.atol:g}" if result.tolerance.atol else ""
        distances = [
            verdict.distance for verdict in result.verdicts if verdict.outcome == "within" and verdict.distance
        ]
        compared, of = sum(distance.compared for distance in distances), sum(distance.of for distance in distances)
        values = f"{count(compared)} of their {plural(of, 'value')}"
        parts.append(f"keys and values within rtol {result.tolerance.rtol:g}{atol} in {count(within)} (by {values})")
    if apart:
        parts.append(f"keys alone in {count(apart)}")
    head = f"differs: {count(differ)} of {plural(runs, 'run')}" if differ else f"{result.status}: {plural(runs, 'run')}"
    return ", ".join([head, *parts])


def _row(verdict: Verdict) -> tuple[str, ...]:
    line = cut(clean(verdict.line), 24)
    return (str(verdict.cell), line, _draw(verdict), verdict.what, how_far(verdict))


def _draw(verdict: Verdict) -> str:
    if verdict.what == "runs":
        return ""
    if verdict.run is None:
        return "later ones"
    first, many = verdict.run.draw, verdict.run.samples
    number = f"{first}–{first + many - 1}" if many else str(first)
    return cut(number if verdict.run.seed == 0 else f"{verdict.run.seed}:{number}", 20)


def how_far(verdict: Verdict) -> str:
    """`1 ulp, 5.96e-08 in 3 of 36`; for keys, shapes and numbers of runs the stored and the new one."""
    distance = verdict.distance
    if distance is None:
        stored_text, new_text = cut(clean(verdict.stored), 60), cut(clean(verdict.now), 60)
        if verdict.what == "keys" and stored_text.partition(" ")[0] == new_text.partition(" ")[0]:
            new_text = new_text.partition(" ")[2]  # without repeating the stream's name
        if verdict.what != "digest":
            return f"{stored_text} → {new_text}"
        # Where there was no digest, words stand in its place.
        stored_text, new_text = (
            re.sub("^[0-9a-f]{16}$", lambda all_: all_[0][:DIGITS], text) for text in (stored_text, new_text)
        )
        return f"{stored_text} → {new_text} (no values stored)"
    stored = f"{count(distance.compared)} stored, of " if distance.compared < distance.of else ""
    among = f"{stored}{count(distance.of)}"
    if not distance.differ:
        return f"in none of {among}"
    parts = [ulp(distance.ulp)] if distance.ulp is not None else []
    parts.append("NaN" if math.isnan(distance.absolute) else f"{distance.absolute:.3g}")
    where = f" ({cut(clean(distance.array), 40)})" if distance.array else ""
    return f"{', '.join(parts)}{where} in {count(distance.differ)} of {among}"


def to_json(results: Sequence[Result]) -> dict[str, object]:
    """All results as JSON data; numbers that are not finite are null."""
    return {"version": 1, "status": exit_status(results), "notebooks": list(map(_notebook, results))}


def _notebook(result: Result) -> dict[str, object]:
    return {
        "file": result.file,
        "status": result.status,
        "message": result.failed,
        "order": result.order or None,
        "seconds": round(result.seconds, 3),
        "runs": {
            "all": result.runs(),
            "agree": result.runs("agrees"),
            "within": result.runs("within"),
            "not_comparable": result.runs("not comparable"),
            "differ": result.runs("differs"),
        },
        "environment": {name: {"stored": was, "now": now} for name, (was, now) in result.changed.items()},
        "differences": [_difference(v) for v in result.verdicts if v.outcome != "agrees"][:_GIVEN],
    }


def _difference(verdict: Verdict) -> dict[str, object]:
    run, distance = verdict.run, verdict.distance
    values = None
    if distance is not None:
        values = asdict(distance) | {"absolute": distance.absolute if math.isfinite(distance.absolute) else None}
    return {
        **{name: getattr(verdict, name) for name in ("cell", "line", "outcome", "what")},
        "command": run and run.command,
        "model": run and (run.model or ""),
        **{name: getattr(run, name, None) for name in ("call", "seed", "draw", "samples")},
        "stored": verdict.stored,
        "now": verdict.now,
        "values": values,
    }
