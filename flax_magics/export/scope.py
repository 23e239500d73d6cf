"""The names of a script as it grows: which are there, which are not and why, and what each was made of."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from .names import BUILTIN, is_of_the_notebook, reads


@dataclass(eq=False)
class Scope:
    """Names that the session's code binds.

    Attributes:
      ours: names of our own.
      ever: names that some cell binds, early or late.
      known: those that the script has by now.
      gone: those that it has not, with the reason.
      imported: those of the imports at its top.
      classes: those of classes.
      versions: how often each was bound.
      bound_in: the block in which it was bound last.
      uses: what its last definition reads.
      here: names that the statement at hand binds.
    """

    ours: set[str]
    ever: set[str]
    known: set[str] = field(default_factory=set)
    gone: dict[str, str] = field(default_factory=dict)
    imported: set[str] = field(default_factory=set)
    classes: set[str] = field(default_factory=set)
    versions: Counter[str] = field(default_factory=Counter)
    bound_in: dict[str, int] = field(default_factory=dict)
    uses: dict[str, set[str]] = field(default_factory=dict)
    here: set[str] = field(default_factory=set)

    def missing(self, names: Iterable[str]) -> str | None:
        """Why code that reads `names` cannot stand in the script; None where it can."""
        for name in sorted(names):
            if name in self.gone:
                return f"`{name}` is not there ({self.gone[name]})"
            if name in self.known | self.ever | self.ours | self.here or name in BUILTIN:
                continue
            if name == "get_ipython":
                return "it asks IPython"
            if is_of_the_notebook(name) or name in ("In", "Out", "display"):
                return f"`{name}` is the notebook's own"
            return f"no cell makes `{name}`"
        return None

    def lose(self, names: Iterable[str], reason: str) -> None:
        """`names` are not there from now on."""
        for name in names:
            self.gone[name] = reason
            self.known.discard(name)

    def take_in(self, names: Iterable[str]) -> None:
        """`names` are imported at the top of the script."""
        for name in names:
            self.known.add(name)
            self.imported.add(name)
            self.gone.pop(name, None)

    def bind(self, names: Iterable[str], statement: ast.stmt, block: int, states: Mapping[str, str]) -> None:
        """`statement`, in the block of that number, binds `names`; `states` as in `Page`."""
        found = reads(statement)
        if isinstance(statement, ast.ClassDef):
            self.classes.add(statement.name)
        for name in names:
            self.known.add(name)
            self.gone.pop(name, None)
            if states.get(name) == "unchanged" and name in self.versions:
                continue
            self.versions[name] += 1
            self.bound_in[name] = block
            self.uses[name] = found

    def reached(self, names: Iterable[str]) -> set[str]:
        """All names that the code behind `names` reads, they themselves included and imported ones left out."""
        out: set[str] = set()
        waiting = list(names)
        while waiting:
            name = waiting.pop()
            if name not in out:
                out.add(name)
                waiting += self.uses.get(name, ())
        return out - self.imported
