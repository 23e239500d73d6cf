"""What was measured, as one table."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version


@dataclass(frozen=True)
class Measured:
    """Values of a lap, one for each round: ours and, unless the goal is an amount by itself, by hand.

    Seconds, or whatever the lap's unit stands for.
    """

    ours: Sequence[float]
    by_hand: Sequence[float] = ()

    @property
    def ratios(self) -> list[float]:
        """Ours over by hand, round by round."""
        return [ours / by_hand for ours, by_hand in zip(self.ours, self.by_hand, strict=False)]


@dataclass(frozen=True)
class Lap:
    """One row: what is done, what it may cost, and how it is measured.

    Attributes:
      key: what it is chosen by.
      goal: at most this ratio to by hand; with a unit, at most this amount. None: it is measured beside another lap.
      measure: takes the number of rounds.
      unit: `ratio`, or what the amount is in: `ms`, `µs`, `MB`. Amounts are what ours has over by hand, where both were
        measured.
    """

    key: str
    title: str
    goal: float | None
    measure: Callable[[int], Measured]
    unit: str = "ratio"


_PER_UNIT = {"ms": 1e3, "µs": 1e6, "MB": 1e-6}


def row(lap: Lap, found: Measured) -> tuple[str, ...]:
    """A lap as the cells of its row."""
    ours = statistics.median(found.ours)
    by_hand = statistics.median(found.by_hand) if found.by_hand else None
    if lap.unit == "ratio":
        assert by_hand is not None
        value, values, text = ours / by_hand, found.ratios, "{:.3f}×"
        shown = (_seconds(by_hand), _seconds(ours))
    else:
        scale = _PER_UNIT[lap.unit]
        pairs = zip(found.ours, found.by_hand or [0.0] * len(found.ours), strict=False)
        value, values = (ours - (by_hand or 0.0)) * scale, [(a - b) * scale for a, b in pairs]
        text = f"{{:.3g}} {lap.unit}"
        amount = _seconds if lap.unit != "MB" else "{:.3g}".format
        shown = ("" if by_hand is None else amount(by_hand), amount(ours) if lap.unit != "MB" else "")
    spread = f"{text.format(min(values))} – {text.format(max(values))}" if len(values) > 1 else ""
    goal, met = "", ""
    if lap.goal is not None:
        goal = f"≤ {lap.goal:g}{'×' if lap.unit == 'ratio' else ' ' + lap.unit}"
        met = "yes" if value <= lap.goal else "NO"
    return lap.title, *shown, text.format(value), spread, goal, met


HEADINGS = ("lap", "by hand", "ours", "median", "spread", "goal", "met")


def table(rows: Sequence[tuple[str, ...]]) -> str:
    """The rows under their headings."""
    rows = [HEADINGS, *rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(HEADINGS))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "─" * len(lines[0]), *lines[1:]])


def machine() -> str:
    """What it was measured on."""
    names = ", ".join(f"{name} {version(name)}" for name in ("jax", "jaxlib", "flax", "ipython"))
    return (
        f"Python {platform.python_version()}, {names}, {os.cpu_count()} cores, {platform.system()} {platform.machine()}"
    )


def _seconds(value: float) -> str:
    if value < 1e-3:
        return f"{value * 1e6:.0f} µs"
    return f"{value * 1e3:.3g} ms" if value < 1 else f"{value:.2f} s"
