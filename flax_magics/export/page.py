"""What all that writes lines for commands has before it: the script's names, the runs, the models."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..journal import Load
from ..run import Run
from ..spelling import Spelling
from .functions import CannotSay as CannotSay
from .functions import Wanted
from .reading import Site
from .scribe import Scribe
from .story import Story


@dataclass(eq=False)
class Model:
    """A registered model in the script.

    Attributes:
      name: the variable that holds the module: not its registered name where that is the class's own.
      module: the module as it is registered now, None where that is no more.
      holds: whether it holds its variables (NNX).
      variables: the variable that holds its variables (linen).
      construction: how the session built it, without `rngs` (NNX).
    """

    name: str
    module: Any
    holds: bool
    variables: str
    construction: str = ""
    first_key: str = ""
    """The variable that keeps the key of its first init, where a method adds variables later."""
    loaded: Any = None
    """Its variables as they are now: of the tree that a file had."""


@dataclass(eq=False)
class Page:
    """Attributes:
    models: by registered name.
    define: makes sure that a function is in the script where it will be used, and gives its name.
    assigned: names that the lines of the command at hand assign: a function has to declare them.
    states: what became of the models that the cell registered: `new`, `unchanged`, `changed`.
    load: what the `%flax_load` at hand read.
    gone: the cell's runs are in no history any more.
    lost: models whose variables the script has not, with the reason.
    """

    scribe: Scribe
    story: Story
    models: Mapping[str, Model]
    define: Callable[[Wanted, Site], str]
    assigned: set[str] = field(default_factory=set)
    states: Mapping[str, str] = field(default_factory=dict)
    load: Load | None = None
    gone: bool = False
    lost: dict[str, str] = field(default_factory=dict)

    @property
    def several(self) -> bool:
        """Whether more than one model was run, so that functions are called after theirs."""
        return len({run.model for run in self.story.runs if run.command == "apply"}) > 1

    def is_conditional(self, site: Site) -> bool:
        """Whether some runs of a place initialise and others do not, so that the script has to look."""
        made = [run.made is not None and not run.made.added for run in self.runs(self.story.of_site.get(site, []))]
        return bool(site.path) and any(made) and (len(made) == 1 or not all(made))

    def runs(self, indices: Sequence[int]) -> list[Run]:
        """The runs of these indices."""
        return [self.story.runs[index] for index in indices]


def common(runs: Sequence[Run]) -> Spelling:
    """What the runs of one place have in common; where a later one asked for more, that."""
    spellings = [run.spelling for run in runs if run.spelling is not None]
    if not spellings:
        raise CannotSay("the session does not know how it was run")
    last = spellings[-1]
    streams = tuple(sorted({stream for each in spellings for stream in each.streams}))
    mutable = tuple(sorted({name for each in spellings for name in each.mutable}))
    kept = tuple(sorted({name for each in spellings for name in each.kept}))
    taken = {each.taken for each in spellings}
    if len(taken) > 1:
        raise CannotSay("its first run, which made the variables, had another `params` key than the others")
    if any(each.containers != last.containers for each in spellings):
        raise CannotSay("an argument was put together in another way each time")
    apart = tuple(f"{name}[" for name, part in last.containers if not part.has("other"))
    names = (name for name in last.static if not name.isidentifier() and name not in last.parameters)
    parts = sorted(name for name in names if not name.startswith(apart))
    if parts:
        raise CannotSay(f"`{parts[0]}` is part of the program, and jax.jit takes no such part of an argument")
    return replace(last, streams=streams, mutable=mutable, kept=kept)
