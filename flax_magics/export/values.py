"""The value of a run and where it goes: the assignment, the digest, what the session kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .scribe import WIDTH, Scribe


@dataclass(frozen=True)
class Value:
    """An expression that may be too long for one line: `before`, items with commas between, `after`."""

    before: str
    items: tuple[str, ...]
    after: str

    @property
    def line(self) -> str:
        """On one line."""
        return f"{self.before}{', '.join(self.items)}{self.after}"


def lines_of(
    scribe: Scribe,
    target: str,
    label: str,
    value: Value,
    *,
    after: Sequence[str] = (),
    pair: str | None = None,
    given: str = "",
) -> list[str]:
    """The lines that run `value`, hold or drop the output, and print its digest.

    Args:
      target: what stands left of the value in the cell, with its sign; empty for nothing.
      after: lines that follow the run.
      pair: the value is `(output, updates)`, and this is the name for the updates; `_` where nobody wants them.
      given: what the command gave, as an expression of `{output}`, where that is more than the output.
    """
    name = target.removesuffix("=").strip()
    plain = target.endswith("=") and name.isidentifier()
    if pair is None and not target and not given:
        if not scribe.digests:
            return [*scribe.fit(value.before, value.items, value.after), *after]
        line = f"{scribe.digest}({scribe.text(label)}, {value.line})"
        if len(line) <= WIDTH - 2 * len(scribe.unit):
            return [line, *after]
    if not scribe.digests and target and pair is None and not given:
        return [*scribe.fit(f"{target} {value.before}", value.items, value.after), *after]
    output = name if plain else scribe.variable("output", "result") if target or scribe.digests else "_"
    left = output if pair is None else f"{output}, {pair}"
    lines = [*scribe.fit(f"{left} = {value.before}", value.items, value.after), *after]
    if given:
        lines.append(f"{output} = {given.format(output=output)}")
    lines += scribe.show(label, output)
    if target and not plain:
        lines.append(f"{target} {output}")
    return lines


def merged(scribe: Scribe, variables: str, kept: Sequence[str], mutable: Sequence[str]) -> list[str]:
    """The line that puts what a run wrote into the variables."""
    if not kept:
        return []
    new = scribe.variable("updates", "new_values")
    if set(kept) == set(mutable):
        return [f"{variables} = {{**{variables}, **{new}}}"]
    items = [f"{scribe.text(name)}: {new}[{scribe.text(name)}]" for name in kept]
    return [f"{variables} = {{**{variables}, {', '.join(items)}}}"]
