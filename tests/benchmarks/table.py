"""What was measured, as one table in Markdown."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Sequence
from importlib.metadata import version
from typing import NamedTuple

from flax_magics.base.measures import first_core

from .cells import Seconds


class Row(NamedTuple):
    """What is done, and what it may take: at most `goal` times what it takes by hand; in `ms` or `µs`: over the floor.

    Attributes:
      in_bytes: it is memory that is taken, and the numbers are bytes.
    """

    key: str
    title: str
    goal: float | None
    unit: str = "×"
    in_bytes: bool = False

    def cells(self, seconds: Seconds) -> tuple[str, ...]:
        """The row as text: medians, of ratios and differences those of what was measured in turn; spread: 8 of 10."""
        by_hand, floor, ours = (seconds.get(f"{self.key}/{who}", []) for who in ("by hand", "floor", "ours"))
        if self.unit == "×":
            values = [own / hand for own, hand in zip(ours, by_hand, strict=True)]
        else:
            scale = {"ms": 1e3, "µs": 1e6}[self.unit]
            values = [(own - least) * scale for own, least in zip(ours, floor or [0.0] * len(ours), strict=True)]
        value = statistics.median(values)
        goal = "" if self.goal is None else f"≤ {self.goal:g} {self.unit}, {'met' if value <= self.goal else 'NOT met'}"
        low, *_, high = statistics.quantiles(values if len(values) > 1 else values * 2, n=10, method="inclusive")
        spread = f"{_digits(low)} – {_digits(high)}"
        sides = map(_bytes if self.in_bytes else _time, (by_hand, floor, ours))
        return self.key, self.title, *sides, f"{_digits(value)} {self.unit}", spread, goal


HEADINGS = ("name", "lap", "by hand", "floor", "ours", "median", "spread", "goal")


def table(rows: Sequence[Row], seconds: Seconds) -> str:
    """The rows under their headings."""
    lines = [HEADINGS, *(row.cells(seconds) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(HEADINGS))]
    lines.insert(1, tuple("-" * width for width in widths))
    return "\n".join(
        f"| {' | '.join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))} |" for line in lines
    )


def machine() -> str:
    """What it is measured on."""
    processor = first_core().get("model name", platform.machine())
    names = ", ".join(f"{name} {version(name)}" for name in ("jax", "flax", "ipython", "ipykernel"))
    return f"{processor}, {os.cpu_count()} cores, {platform.system()}; Python {platform.python_version()}, {names}"


def _digits(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 0.1 else f"{value:.3g}"


def _time(seconds: Sequence[float]) -> str:
    if not seconds:
        return ""
    value = statistics.median(seconds)
    unit, scale = next((pair for pair in (("s", 1), ("ms", 1e3)) if value * pair[1] >= 1), ("µs", 1e6))
    return f"{value * scale:.3g} {unit}"


def _bytes(sizes: Sequence[float]) -> str:
    return f"{statistics.median(sizes) / 1e6:.3g} MB" if sizes else ""
