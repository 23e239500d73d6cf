"""Where the root key of a script stands, and what moves it to where the next run finds it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .matching import Step
from .scribe import Scribe
from .story import Story


@dataclass(eq=False)
class Ledger:
    """The root key of a script.

    Attributes:
      seed: what it starts from, before any restart.
      at: seed and number of the last draw that was made of it; None while it is not there.
      unexported: filled with what the script's own lines do not explain.
    """

    story: Story
    scribe: Scribe
    seed: int
    unexported: list[str]
    at: tuple[int, int] | None = None

    def moves(self, index: int) -> bool:
        """Whether a run is a draw of its own."""
        return not self.story.runs[index].replayed and index not in self.story.leader

    def draws(self, indices: Sequence[int]) -> int:
        """How many draws the runs are."""
        return sum(self.story.runs[index].draws or 1 for index in indices if self.moves(index))

    def start(self) -> list[str]:
        """The line that makes the root key, where it is not there yet."""
        if self.at is not None:
            return []
        self.at = self.seed, 0
        return [self.scribe.start(self.seed)]

    def before(self, step: Step) -> list[str]:
        """The lines that bring the root key to where the runs of `step` find it; none where it is there."""
        if step.site is not None and step.site.name == "flax_key" and step.site.given.options["seed"] is not None:
            self.at = step.site.given.options["seed"], 0
            return []
        drawn = [index for index, site in step.made if site is not None and not self.story.runs[index].replayed]
        if not drawn:
            return []
        run = self.story.runs[drawn[0]]
        lines = self.start()
        assert self.at is not None
        seed, number = self.at
        if drawn[0] in self.story.leader and (seed, number) == (run.seed, run.draw):
            return lines
        if seed != run.seed or run.draw - 1 < number:
            lines, number = [self.scribe.start(run.seed)], 0
        behind = run.draw - 1 - number
        if behind:
            many = "a draw" if behind == 1 else f"{behind} draws"
            self.unexported.append(f"{many} before draw {run.draw} of seed {run.seed} that no cell made")
            lines += [f"# Left out: {many} that no cell made.", *self.scribe.advance(behind)]
        self.at = run.seed, run.draw - 1
        return lines

    def after(self, step: Step) -> None:
        """The statement has run."""
        drawn = [(index, site) for index, site in step.made if not self.story.runs[index].replayed]
        if drawn:
            index, site = drawn[-1]
            run = self.story.runs[index]
            stays = site is not None and run.command == "init" and self.story.stays(site)
            self.at = run.seed, run.draw + (run.draws or 1) - 1 - stays

    def unexplained(self, indices: Sequence[int]) -> list[str]:
        """The lines for runs that nothing in the cells explains: the root key moves on, and the script says so."""
        runs = [self.story.runs[index] for index in indices]
        draws = self.draws(indices)
        if not draws:
            return []
        calls = ", ".join(dict.fromkeys(" ".join(run.call.split()) for run in runs))
        reason = f"{'a draw' if draws == 1 else f'{draws} draws'} that no line of the cells explains: {calls}"
        self.unexported.append(reason)
        lines = [*self.start(), f"# Left out: {reason}.", *self.scribe.advance(draws)]
        self.at = runs[-1].seed, runs[-1].draw + (runs[-1].draws or 1) - 1
        return lines
