"""Further runs of one cell execution (a loop), counted in one line."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import TYPE_CHECKING

from . import facts
from .columns import clean, dotted
from .text import notes as note_lines
from .units import count, seconds

if TYPE_CHECKING:
    from ..run import Note, Run


@dataclass(frozen=True)
class Loop:
    """What the runs of one cell execution add up to. Begin with `Loop()` and `add` each run.

    Attributes:
      model, mode, device: the names that occurred, in order, joined by commas.
      draws: lowest and highest draw number, (0, 0) before the first run.
      runs: how many runs were added.
      programs: `compiled`, `reused`, `disk cache`, `eager` → how many runs.
      building: seconds of trace, lower and compile together.
      changed: collection → updates after the latest run.
      weights: whose weights ran, in order, joined by commas.
      notes: the sharp bits, each once.
    """

    model: str = ""
    mode: str = ""
    device: str = ""
    draws: tuple[int, int] = (0, 0)
    runs: int = 0
    programs: Mapping[str, int] = field(default_factory=dict)
    building: float = 0.0
    changed: Mapping[str, int] = field(default_factory=dict)
    weights: str = ""
    notes: tuple[Note, ...] = ()
    _times: list[float] = field(default_factory=list, repr=False, compare=False)
    _timed: int = 0

    def add(self, run: Run) -> Loop:
        """This and one more run. Costs the same for the thousandth run as for the first."""
        programs = dict(self.programs)
        if run.program and run.command == "apply":
            programs[run.program] = programs.get(run.program, 0) + 1
        times, timed = self._times, self._timed
        if run.command == "apply":
            # Loops that grow from one another share a list of which each reads its own beginning.
            times = times if len(times) == timed else times[:timed]
            times.append(run.timing.steady.median if run.timing.steady else run.timing.run)
            timed += 1
        last = facts.last_draw(run)
        low, high = self.draws if self.runs else (run.draw, last)
        return Loop(
            model=_joined(self.model, facts.name_of(run)),
            mode=_joined(self.mode, facts.mode_of(run)),
            device=_joined(self.device, clean(run.device)),
            draws=(min(low, run.draw), max(high, last)),
            runs=self.runs + 1,
            programs=programs,
            building=self.building + run.timing.building,
            changed={**self.changed, **run.changed},
            weights=_joined(self.weights, facts.weights_of(run)),
            notes=(*self.notes, *(note for note in run.notes if note not in self.notes)),
            _times=times,
            _timed=timed,
        )

    @property
    def median(self) -> float:
        """Median of the runs' seconds on the device, 0.0 before the first."""
        return median(self._times[: self._timed]) if self._timed else 0.0


def _joined(names: str, name: str) -> str:
    return names if not name or name in names.split(", ") else f"{names}, {name}" if names else name


def parts(loop: Loop) -> tuple[str, ...]:
    """What the counting line says after model, mode and device."""
    low, high = loop.draws
    return (
        f"draw {low}" if low == high else f"draws {low}–{high}",
        f"{count(loop.runs)} run" + ("s" if loop.runs != 1 else ""),
        _programs(loop),
        f"run median {seconds(loop.median)}" if loop._timed else "",
        *(f"{clean(name)}: update {updates}" for name, updates in loop.changed.items()),
        loop.weights,
    )


def _programs(loop: Loop) -> str:
    texts = []
    for program, times in loop.programs.items():
        text = clean(program) if len(loop.programs) == 1 and times == loop.runs else f"{count(times)} {clean(program)}"
        texts.append(f"{text} in {seconds(loop.building)}" if program == "compiled" else text)
    return ", ".join(texts)


def line(loop: Loop) -> str:
    """`net · train · cpu:0 · draws 2–101 · 100 runs · reused · run median 0.22 ms`, sharp bits beneath."""
    return "\n".join([*dotted((loop.model, loop.mode, loop.device, *parts(loop))), *note_lines(loop.notes)])
