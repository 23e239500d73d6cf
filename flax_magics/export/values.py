"""What goes into a run and comes out of it: the keys of its draw, the assignment of its value, what is kept."""

from __future__ import annotations

import ast
from collections.abc import Callable, Sequence

from ..run import ExportFacts
from .cells import CommandSite
from .context import ScriptContext
from .functions import CannotSay
from .writer import WIDTH, LineWriter, indented


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
    writer: LineWriter, target: str, label: str, value: str, *, after: Sequence[str] = (), parts: bool = False
) -> list[str]:
    """The lines that run `value`, hold or drop the output, and print its digest.

    Args:
      target: what stands left of the value in the cell, with its sign; empty for nothing.
      after: lines that follow the run.
      parts: the output is a tuple, so that names in its place are the whole of it.
    """
    if not target:
        line = f"{writer.digest}({writer.text(label)}, {value})" if writer.digests else value
        if not writer.digests or len(line) <= WIDTH - 2 * len(writer.unit):
            writer.labels += [label] * writer.digests
            return [line, *after]
    name, names = name_of(target), names_of(target)
    if not writer.digests or (names and parts):
        return [f"{target} {value}", *after, *writer.show(label, f"({', '.join(names)})")]
    output = name or writer.variable("output", "result")
    lines = [f"{output} = {value}", *after, *writer.show(label, output)]
    return lines if name or not target else [*lines, f"{target} {output}"]


def lines_of_pair(
    writer: LineWriter, target: str, label: str, value: str, updates: str, *, after: Sequence[str], parts: bool = False
) -> list[str]:
    """The lines for a `value` of output and updates of which the cell gets the output: see `lines_of`.

    Args:
      updates: the name for the updates; `_` where nobody wants them.
    """
    name, names = name_of(target), names_of(target)
    if names and (parts or not writer.digests):
        whole = f"({', '.join(names)})"
        return [f"{whole}, {updates} = {value}", *after, *writer.show(label, whole)]
    wanted = target or writer.digests
    output = name or (writer.variable("output", "result") if wanted else "_")
    lines = [f"{output}, {updates} = {value}", *after, *writer.show(label, output)]
    return lines if name or not target else [*lines, f"{target} {output}"]


def merged(writer: LineWriter, variables: str, kept: Sequence[str], mutable: Sequence[str], updates: str) -> list[str]:
    """The line that puts what a run wrote, `updates`, into the variables."""
    if not kept:
        return []
    if set(kept) == set(mutable):
        return [f"{variables} = {{**{variables}, **{updates}}}"]
    items = [f"{writer.text(name)}: {updates}[{writer.text(name)}]" for name in kept]
    return [f"{variables} = {{**{variables}, {', '.join(items)}}}"]


Keys = tuple[list[str], Callable[[str], str], str]
"""The lines that make keys; the variable of each stream's; and that of the `params` key for an init."""


def keys_of_run(context: ScriptContext, site: CommandSite, indices: Sequence[int], spelling: ExportFacts) -> Keys:
    """The lines that make the keys of a run; the variable of each stream's; and that of the `params` for an init."""
    writer, options = context.writer, site.given.options
    streams = (*spelling.streams, *options["key"])
    size = options["draws"]
    if size is not None and spelling.taken and "params" in streams:
        raise CannotSay("the first of its draws has another `params` key than the others")
    made = any(context.groups.runs[index].made for index in indices)
    if options["draw"] is not None:
        more = ("params", "dropout") if made else ()
        return replayed(context, indices, tuple(dict.fromkeys((*streams, *more))), spelling.taken, size)
    context.assigned.add(writer.root)

    def key(stream: str) -> str:
        return writer.key(stream, taken=spelling.taken)

    if size is not None:
        return _series(writer, writer.root, size, (*streams, *(("params",) if made else ())), key)
    if context.groups.shares_in_place(site):
        context.assigned |= {writer.params, writer.dropout, *(key(stream) for stream in streams)}
        return [], key, writer.params
    return writer.draw(streams, taken=spelling.taken), key, writer.params


def replayed(
    context: ScriptContext, indices: Sequence[int], streams: Sequence[str], taken: bool, size: int | None = None
) -> Keys:
    """The keys of an earlier draw, or of `size` draws from that on, made again from its seed."""
    writer = context.writer
    found = {(context.groups.runs[index].seed, context.groups.runs[index].draw) for index in indices}
    if len(found) > 1:
        raise CannotSay("--draw stood for another draw each time")
    ((seed, number),) = found
    writer.needs.add("jax")
    root = writer.variable("replayed_root_key")
    names = {name: writer.variable(f"replayed_{name}_key") for name in streams}
    which = f"draw {number}" if size in (None, 1) else f"draws {number} to {number + (size or 1) - 1}"
    lines = [
        f"{root} = jax.random.key({seed})  # {which} again",
        *(writer.advance(number - 1, root) if number > 1 else []),
    ]

    def key(stream: str) -> str:
        return names[stream]

    if size is not None:
        moved, many, params = _series(writer, root, size, streams, key)
        return [*lines, *moved], many, params
    return [*lines, *writer.keys_of(root, streams, key, taken=taken)], key, names.get("params", "")


def _series(writer: LineWriter, root: str, size: int, streams: Sequence[str], key: Callable[[str], str]) -> Keys:
    """As many draws from `root` as one run takes: their keys in lists."""
    names = {stream: writer.variable(f"{stream}_keys") for stream in dict.fromkeys(streams)}
    if not names:
        return writer.advance(size, root), key, writer.params
    own = root == writer.root
    body = writer.draw(tuple(names)) if own else writer.keys_of(root, tuple(names), key, moves=True)
    body += [f"{many}.append({key(stream)})" for stream, many in names.items()]
    empty = ", ".join(["[]"] * len(names))
    lines = [f"{', '.join(names.values())} = {empty}", f"for _ in range({size}):", *indented(body, writer.unit)]
    return lines, lambda stream: names[stream], f"{names.get('params', '')}[0]"
