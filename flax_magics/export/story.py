"""What the runs of a session tell together: which share a draw, which place in the code made which."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from ..run import Run
from .matching import Execution
from .reading import Site


@dataclass(eq=False)
class Story:
    """The runs with what they have to do with each other.

    Attributes:
      runs: all of the session.
      made_by: run → the place that made it, for those that a place explains.
      of_site: place → its runs, by index.
      follower: an init → the apply that took the rest of its draw; `leader` the other way round.
    """

    runs: Sequence[Run]
    made_by: dict[int, Site] = field(default_factory=dict)
    of_site: dict[Site, list[int]] = field(default_factory=dict)
    follower: dict[int, int] = field(default_factory=dict)
    leader: dict[int, int] = field(default_factory=dict)

    @classmethod
    def of(cls, runs: Sequence[Run], executions: Sequence[Execution], restarts: Sequence[int]) -> Story:
        """Reads it off the runs and the executions that made them; `restarts` as `Journal` has them."""
        story = cls(runs)
        for execution in executions:
            for step in execution.steps:
                for index, site in step.made:
                    if site is not None:
                        story.made_by[index] = site
                        story.of_site.setdefault(site, []).append(index)
        opened: int | None = None
        again = set(restarts)
        for index, run in enumerate(runs):
            if index in again:
                opened = None
            if run.replayed:
                continue
            if opened is not None and run.command == "apply":
                first = runs[opened]
                if (first.model, first.seed, first.draw) == (run.model, run.seed, run.draw):
                    story.follower[opened], story.leader[index] = index, opened
            opened = index if run.command == "init" else None
        return story

    def shares_in_place(self, site: Site) -> bool:
        """Whether each run of `site` finds the rest of a draw that an init left in the same block just before."""
        found = self.of_site.get(site, [])
        if not found or site.given.options.get("draws") is not None:
            return False
        for index in found:
            leader = self.leader.get(index)
            if leader is None or leader not in self.made_by:
                return False
            first = self.made_by[leader]
            if first.path != site.path or (site.path and first.in_function is not site.in_function):
                return False
        return True

    def stays(self, site: Site) -> bool:
        """Whether the draw of an init at `site` is made again by the apply that takes the rest of it."""
        after = [self.follower.get(index) for index in self.of_site.get(site, [])]
        sites = [None if index is None else self.made_by.get(index) for index in after]
        return bool(sites) and all(other is not None and not self.shares_in_place(other) for other in sites)

    def folded_later(self, site: Site) -> tuple[tuple[str, ...], bool]:
        """The streams that the apply after an init at `site` takes of its draw, and whether it has its own `params`."""
        streams: dict[str, None] = {}
        taken = False
        for index in self.of_site.get(site, []):
            after = self.follower.get(index)
            other = None if after is None else self.made_by.get(after)
            if after is None or other is None or not self.shares_in_place(other):
                continue
            spelling = self.runs[after].spelling
            streams.update(dict.fromkeys(other.given.options["key"]))
            if spelling is not None:
                streams.update(dict.fromkeys(spelling.streams))
                taken = taken or spelling.taken
        return tuple(streams), taken
