"""What `%%flaxmodel` says: what was registered, and after an edit what changed; as text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from .columns import clean, dotted, table


@dataclass(frozen=True)
class Registered:
    """One model that a cell registered.

    Attributes:
      name: its variable name.
      module: how it is built, such as `Net(features=8)`.
      state: how it compares with the model of that name before.
      changes: what changed, such as `Dense_0/kernel [4,3]→[4,5]`.
      variables: what became of the variables; `none` if there were none, `own` if the module holds new ones.
      check: rows of label and value for `--check`.
      draw: what a module that the session built was built with, such as `draw 1 of seed 0`.
      file: where variables were that waited for this model.
      unfit: why they were not used, leaf by leaf.
      other: what is other about the model than it was there.
    """

    name: str
    module: str
    state: Literal["new", "unchanged", "changed"] = "new"
    changes: tuple[str, ...] = ()
    variables: Literal["none", "kept", "dropped", "own", "restored"] = "none"
    check: tuple[tuple[str, str], ...] = ()
    draw: str = ""
    file: str = ""
    unfit: tuple[str, ...] = ()
    other: tuple[str, ...] = ()

    @property
    def headline(self) -> str:
        """What follows the name in the first part: nothing, `unchanged`, `changed`, `changed: a, b`."""
        if self.state == "changed" and self.changes:
            return "changed: " + ", ".join(map(clean, self.changes))
        return "" if self.state == "new" else self.state

    @property
    def parts(self) -> tuple[str, ...]:
        """What follows the first part."""
        drawn = (f"built with {self.draw}",) if self.draw else ()
        return (*self._parts, *drawn, *self._from_file)

    @property
    def _from_file(self) -> tuple[str, ...]:
        """What became of the variables that waited for the model."""
        if self.unfit:
            leaves = ", ".join(map(clean, self.unfit))
            return (f"the variables in {clean(self.file)} do not fit, and none is used: {leaves}",)
        if self.variables != "restored":
            return ()
        return (f"variables from {clean(self.file)}", *map(clean, self.other))

    @property
    def _parts(self) -> tuple[str, ...]:
        if self.state == "new":
            return (clean(self.module), "registered")
        if self.state == "unchanged":
            return ("variables and programs kept" if self.variables == "kept" else "programs kept",)
        if self.variables == "dropped":
            return ("variables dropped", "next run initialises")
        if self.variables == "own":
            return ("with variables of its own",)
        if self.variables == "restored":
            return ()
        return ("variables kept",) if self.variables == "kept" else ("registered anew",)


def registered_text(models: Sequence[Registered]) -> str:
    """A line for each model, with the rows of its check beneath."""
    lines: list[str] = []
    for model in models:
        name = clean(model.name)
        lines += dotted((f"{name} {model.headline}" if model.headline else name, *model.parts))
        lines += table([(clean(label), clean(value)) for label, value in model.check], indent="  ")
    return "\n".join(lines)
