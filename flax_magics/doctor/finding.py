"""What a check looks at, and what it finds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

from msgspec import Struct

from ..run import Note


class Examined(Struct, frozen=True):
    """What the checks look at besides JAX itself.

    Attributes:
      names: the user's variables.
      modules: registered name → the Flax module.
      sources: gives the code of the cells that ran, or of the script.
      disk: (folder of the session's programs on disk, whether it can be used); None where they are not kept there.
      shell: IPython's; None outside of it.
      started: JAX had its devices already when the examination began.
    """

    names: Mapping[str, object] = {}
    modules: Mapping[str, object] = {}
    sources: Callable[[], Iterable[str]] = tuple
    disk: tuple[str, bool] | None = None
    shell: Any = None
    started: bool = True


class Finding(Struct, frozen=True):
    """Something that is wrong.

    Attributes:
      text: what it is.
      cost: what it costs, or may.
      mend: the lines that mend it, with a gap (`…`) where only the reader can say; None where a restart is all.
      when: `first` where they mend it in the first cell of a restarted kernel, since JAX has settled it for this one;
        `then` where the kernel is to be restarted after them; empty where they mend it at once.
      now: results or times of this kernel depend on it, so that its first report says so.
    """

    text: str
    cost: str
    mend: str | None = None
    when: Literal["", "first", "then"] = ""
    now: bool = False

    @property
    def note(self) -> Note:
        """What is wrong and what it costs in one line, with the line that mends it."""
        when = {"": "", "first": "; first of all in a restarted kernel", "then": "; then restart the kernel"}[self.when]
        when = when.replace("then ", "") if self.mend is None else when
        gap = self.mend is not None and "…" in self.mend
        text = f"{self.text}: {self.cost}{when}"
        return Note("doctor", text, write=None if gap else self.mend, form=self.mend if gap else None)


class Check(Struct, frozen=True):
    """One thing that may be wrong.

    Attributes:
      name: what is looked at, in a word or two.
      test: returns what is wrong, None where all is well.
      first: it is worth its time before the first report of a kernel: what it finds matters at once, and it takes a
        millisecond at most.
    """

    name: str
    test: Callable[[Examined], Finding | None]
    first: bool = False


def examine(checks: Iterable[Check], examined: Examined) -> tuple[dict[str, Finding], dict[str, str]]:
    """Makes the checks. Returns what they found and the reasons of those that failed, by name."""
    findings, failed = {}, {}
    for check in checks:
        try:
            finding = check.test(examined)
        except Exception as error:  # one that a version of JAX breaks must not hide what the others find
            failed[check.name] = f"{type(error).__name__}: {error}"
        else:
            if finding is not None:
                findings[check.name] = finding
    return findings, failed
