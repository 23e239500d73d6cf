"""What `%flax_load` says: what was restored, and the code of the models that wait to be registered; as text."""

from __future__ import annotations

from dataclasses import dataclass

from .columns import clean, clean_lines, dotted
from .notice import Notice, notice_text

SHORT = 24
"""Lines of code that are not folded away."""


@dataclass(frozen=True)
class Waiting:
    """A model whose variables wait until it is registered.

    Attributes:
      module: how it was built, such as `Net(features=8)`.
      source: its code, as it stands in the file; empty if it is not there.
      write: the line that registers it, if its cell does not.
    """

    name: str
    module: str
    source: str
    write: str

    @property
    def parts(self) -> tuple[str, ...]:
        """What is said of it before its code."""
        code = "its code, which was not run:" if self.source else "its code is not in the file"
        return (f"waits for its cell, or for {clean(self.write)}", code)

    @property
    def lines(self) -> list[str]:
        """Its code, safe to print."""
        return clean_lines(self.source)

    @property
    def short(self) -> bool:
        """Whether its code is shown at once where it could be folded away."""
        return len(self.lines) <= SHORT


@dataclass(frozen=True)
class Loaded:
    """A file that was loaded: a line on what was restored, and each model that waits.

    Attributes:
      quiet: sharp bits alone.
    """

    notice: Notice
    waiting: tuple[Waiting, ...] = ()
    quiet: bool = False


def loaded_text(loaded: Loaded) -> str:
    """A line or two, sharp bits beneath, then the code of what waits, indented."""
    lines = [notice_text(loaded.notice)]
    for model in loaded.waiting:
        lines += ["", *dotted((f"{clean(model.name)} = {clean(model.module)}", *model.parts))]
        lines += [f"    {line}".rstrip() for line in model.lines]
    return "\n".join(lines)
