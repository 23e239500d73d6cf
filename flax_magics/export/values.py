"""The value of a run and where it goes: the assignment, the digest, what the session kept."""

from __future__ import annotations

import ast
from collections.abc import Sequence

from .scribe import Scribe
from .wrapping import WIDTH


def name_of(target: str) -> str:
    """The name of `y =`; empty for a target that is anything else."""
    name = target.removesuffix("=").strip()
    return name if target.endswith("=") and name.isidentifier() else ""


def names_of(target: str) -> list[str]:
    """The names of `y, updates =`; empty for a target that is anything else."""
    match ast.parse(f"{target} 0").body if target else []:
        case [ast.Assign([ast.Tuple(parts)])] if all(isinstance(part, ast.Name) for part in parts):
            return [part.id for part in parts if isinstance(part, ast.Name)]
    return []


def lines_of(
    scribe: Scribe, target: str, label: str, value: str, *, after: Sequence[str] = (), parts: bool = False
) -> list[str]:
    """The lines that run `value`, hold or drop the output, and print its digest.

    Args:
      target: what stands left of the value in the cell, with its sign; empty for nothing.
      after: lines that follow the run.
      parts: the output is a tuple, so that names in its place are the whole of it.
    """
    if not target:
        line = f"{scribe.digest}({scribe.text(label)}, {value})" if scribe.digests else value
        if not scribe.digests or len(line) <= WIDTH - 2 * len(scribe.unit):
            scribe.labels += [label] * scribe.digests
            return [line, *after]
    name, names = name_of(target), names_of(target)
    if not scribe.digests or (names and parts):
        return [f"{target} {value}", *after, *scribe.show(label, f"({', '.join(names)})")]
    output = name or scribe.variable("output", "result")
    lines = [f"{output} = {value}", *after, *scribe.show(label, output)]
    return lines if name or not target else [*lines, f"{target} {output}"]


def lines_of_pair(
    scribe: Scribe, target: str, label: str, value: str, updates: str, *, after: Sequence[str], parts: bool = False
) -> list[str]:
    """The lines for a `value` of output and updates of which the cell gets the output: see `lines_of`.

    Args:
      updates: the name for the updates; `_` where nobody wants them.
    """
    name, names = name_of(target), names_of(target)
    if names and (parts or not scribe.digests):
        whole = f"({', '.join(names)})"
        return [f"{whole}, {updates} = {value}", *after, *scribe.show(label, whole)]
    wanted = target or scribe.digests
    output = name or (scribe.variable("output", "result") if wanted else "_")
    lines = [f"{output}, {updates} = {value}", *after, *scribe.show(label, output)]
    return lines if name or not target else [*lines, f"{target} {output}"]


def merged(scribe: Scribe, variables: str, kept: Sequence[str], mutable: Sequence[str], updates: str) -> list[str]:
    """The line that puts what a run wrote, `updates`, into the variables."""
    if not kept:
        return []
    if set(kept) == set(mutable):
        return [f"{variables} = {{**{variables}, **{updates}}}"]
    items = [f"{scribe.text(name)}: {updates}[{scribe.text(name)}]" for name in kept]
    return [f"{variables} = {{**{variables}, {', '.join(items)}}}"]
