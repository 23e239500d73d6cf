"""What all that writes lines for commands has before it: the script's names, the models, and what the runs tell together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..cells.journal import Load
from ..run import ExportFacts, Run
from .cells import CellRun, CommandSite
from .functions import CannotSay, JittedFunction
from .writer import LineWriter


@dataclass(eq=False)
class ScriptModel:
    """A registered model in the script.

    Attributes:
      name: the variable that holds the module: not its registered name where that is the class's own.
      module: the module as it is registered now.
      holds: whether it holds its variables (NNX).
      variables: the variable that holds its variables (linen).
      construction: how the session built it, without `rngs` (NNX).
      first_key: the variable that keeps the key of its first init, where a method adds variables later; else empty.
      loaded: its variables as they are now: of the tree that a file had.
    """

    name: str
    module: Any
    holds: bool
    variables: str
    construction: str = ""
    first_key: str = ""
    loaded: Any = None


@dataclass(eq=False)
class RunGroups:
    """The runs of a session with what they have to do with each other.

    Attributes:
      runs: all of them.
      made_by: run → the place that made it, for those that a place explains.
      of_site: place → its runs, by index.
      versions: place → for each statement that ran it, the versions of the model's code in its runs: see `version`.
      follower: an init → the apply that took the rest of its draw; `leader` the other way round.
    """

    runs: Sequence[Run]
    made_by: dict[int, CommandSite] = field(default_factory=dict)
    of_site: dict[CommandSite, list[int]] = field(default_factory=dict)
    versions: dict[CommandSite, list[set[Any]]] = field(default_factory=dict)
    follower: dict[int, int] = field(default_factory=dict)
    leader: dict[int, int] = field(default_factory=dict)

    @classmethod
    def of(cls, runs: Sequence[Run], cell_runs: Sequence[CellRun], restarts: Sequence[int]) -> RunGroups:
        """Reads it off the runs and the cells that made them; `restarts` as `Journal` has them."""
        groups = cls(runs)
        groups._code = _codes(runs)
        for statement in (statement for cell_run in cell_runs for statement in cell_run.statements):
            sites = {site for _, site in statement.made if site is not None}
            for site in sites:
                indices = [index for index, other in statement.made if other is site]
                groups.made_by |= dict.fromkeys(indices, site)
                groups.of_site.setdefault(site, []).extend(indices)
                groups.versions.setdefault(site, []).append({groups.version(index) for index in indices})
        of_text = {(site.name, site.line, site.target): site for site in groups.of_site if site.in_function}
        for site in (site for cell_run in cell_runs for site in cell_run.source.sites.values()):
            twin = of_text.get((site.name, site.line, site.target))
            if twin is not None and site not in groups.of_site and site.in_function is not None:
                # The function was defined again before it was called: what its runs were is what they would be.
                groups.of_site[site], groups.versions[site] = groups.of_site[twin], groups.versions[twin]
        opened: int | None = None
        again = set(restarts)
        for index, run in enumerate(runs):
            if index in again:
                opened = None
            if run.replayed:
                continue
            if opened is not None and run.kind.forward:
                first = runs[opened]
                if (first.model, first.seed, first.draw) == (run.model, run.seed, run.draw):
                    groups.follower[opened], groups.leader[index] = index, opened
            opened = index if run.kind.opens else None
        return groups

    def __post_init__(self) -> None:
        self._code: list[Any] = []

    def version(self, index: int) -> Any:
        """What is equal for runs of a model whose code, and all that it reads, was the same."""
        return self._code[index]

    def shares_in_place(self, site: CommandSite) -> bool:
        """Whether each run of `site` finds the rest of a draw that an init left in the same block just before."""
        indices = self.of_site.get(site, [])
        if not indices or site.given.options.get("draws") is not None:
            return False
        for index in indices:
            leader = self.leader.get(index)
            if leader is None or leader not in self.made_by:
                return False
            first = self.made_by[leader]
            if first.path != site.path or (site.path and first.in_function is not site.in_function):
                return False
        return True

    def stays(self, site: CommandSite) -> bool:
        """Whether the draw of an init at `site` is made again by the apply that takes the rest of it."""
        after = [self.follower.get(index) for index in self.of_site.get(site, [])]
        sites = [None if index is None else self.made_by.get(index) for index in after]
        return bool(sites) and all(other is not None and not self.shares_in_place(other) for other in sites)

    def folded_later(self, site: CommandSite) -> tuple[tuple[str, ...], bool]:
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


def _codes(runs: Sequence[Run]) -> list[Any]:
    """The fingerprint of each run's model; where there is none, how often the model had been another until then."""
    changes: Counter[str | None] = Counter()
    out: list[Any] = []
    for run in runs:
        changes[run.model] += any(cause.kind == "model" for cause in run.causes)
        code = None if run.spelling is None else run.spelling.code
        out.append(changes[run.model] if code is None else code)
    return out


@dataclass(eq=False)
class ScriptContext:
    """Attributes:
    models: by registered name.
    define: makes sure that a function is in the script where it will be used, and gives its name.
    assigned: names that the lines of the command at hand assign: a function has to declare them.
    states: what became of the models that the cell registered: `new`, `unchanged`, `changed`.
    load: what the `%flax_load` at hand read.
    gone: the cell's runs are in no history any more.
    lost: models whose variables the script has not, with the reason.
    """

    writer: LineWriter
    groups: RunGroups
    models: Mapping[str, ScriptModel]
    define: Callable[[JittedFunction, CommandSite], str]
    assigned: set[str] = field(default_factory=set)
    states: Mapping[str, str] = field(default_factory=dict)
    load: Load | None = None
    gone: bool = False
    lost: dict[str, str] = field(default_factory=dict)

    @property
    def several(self) -> bool:
        """Whether more than one model was run, so that functions are called after theirs."""
        return len({run.model for run in self.groups.runs if run.kind.forward}) > 1

    def is_conditional(self, site: CommandSite) -> bool:
        """Whether some runs of a place initialise and others do not, so that the script has to look."""
        made = [run.made is not None and not run.made.added for run in self.runs(self.groups.of_site.get(site, []))]
        return bool(site.path) and any(made) and (len(made) == 1 or not all(made))

    def runs(self, indices: Sequence[int]) -> list[Run]:
        """The runs of these indices."""
        return [self.groups.runs[index] for index in indices]

    def skipped(self, indices: Sequence[int], reason: str) -> None:
        """These runs have no lines: models whose variables they made or changed are lost."""
        for run in self.runs(indices):
            if run.model is not None and not run.replayed and (run.made is not None or run.changed):
                self.lost[run.model] = reason


def common(runs: Sequence[Run]) -> ExportFacts:
    """What the runs of one place have in common; where a later one asked for more, that."""
    spellings = [run.spelling for run in runs if run.spelling is not None]
    if not spellings:
        raise CannotSay("the session does not know how it was run")
    last = spellings[-1]
    streams = tuple(sorted({stream for each in spellings for stream in each.streams}))
    mutable = tuple(sorted({name for each in spellings for name in each.mutable}))
    kept = tuple(sorted({name for each in spellings for name in each.kept}))
    if len({each.taken for each in spellings}) > 1:
        raise CannotSay("its first run, which made the variables, had another `params` key than the others")
    if any(each.containers != last.containers for each in spellings):
        raise CannotSay("an argument was put together in another way each time")
    modes = [(each.arguments, each.module, None if each.mode is None else each.mode.to) for each in spellings]
    if any(mode != modes[-1] for mode in modes):
        raise CannotSay("its model takes its mode in another way since an edit")
    if any(each.mode != last.mode for each in spellings) and last.mode is not None:
        last = replace(last, mode=replace(last.mode, back=None))
    apart = tuple(f"{name}[" for name, part in last.containers if not part.has("other"))
    names = (name for name in last.static if not name.isidentifier() and name not in last.parameters)
    parts = sorted(name for name in names if not name.startswith(apart))
    if parts:
        raise CannotSay(f"`{parts[0]}` is part of the program, and jax.jit takes no such part of an argument")
    return replace(last, streams=streams, mutable=mutable, kept=kept)
