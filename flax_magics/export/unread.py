"""Definitions that nothing read before they were replaced: the attempts of a notebook, which a script does without."""

from __future__ import annotations

import ast
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from .layout import Item
from .names import binds, reads

_QUIET = ("jax.", "nn.", "nnx.", "flax.", "functools.", "partial(", "dataclass", "struct.")
"""How decorators begin that do nothing but to what they stand on."""


@dataclass(eq=False)
class _Read:
    """An item of the script.

    Attributes:
      defines: the name that it gives a function, a class or a model, and does nothing else; empty otherwise.
    """

    item: Item
    reads: set[str]
    binds: set[str]
    defines: str


def drop_unread(blocks: Sequence[list[Item]], models: Collection[str]) -> None:
    """Takes out definitions that were replaced by others before anything read them.

    Args:
      models: names of linen modules, which are made without a trace.
    """
    rows = [_read(item, models) for block in blocks for item in block if item.lines]
    while True:
        dead = next((row for i, row in enumerate(rows) if row.defines and _is_replaced(rows, i)), None)
        if dead is None:
            return
        dead.item.lines = []
        rows.remove(dead)


def _read(item: Item, models: Collection[str]) -> _Read:
    body = ast.parse("\n".join(item.lines)).body
    defines = ""
    match body:
        case [ast.FunctionDef(name, decorator_list=decorators) | ast.ClassDef(name, decorator_list=decorators)]:
            if all(ast.unparse(one).startswith(_QUIET) for one in decorators):
                defines = name
        case [ast.Assign([ast.Name(name)], ast.Call(ast.Name(), [], keywords))] if name in models:
            if all(isinstance(keyword.value, (ast.Constant, ast.Name)) for keyword in keywords):
                defines = name
    return _Read(
        item,
        {name for statement in body for name in reads(statement)},
        {name for statement in body for name in binds(statement)},
        defines,
    )


def _is_replaced(rows: Sequence[_Read], at: int) -> bool:
    """Whether the name that `rows[at]` defines is defined anew before it is read, by a function that is called too."""
    name = rows[at].defines
    after = next((i for i in range(at + 1, len(rows)) if rows[i].defines == name), None)
    if after is None:
        return False
    reached: set[str] = set()
    waiting = {read for row in rows[at + 1 : after + 1] for read in row.reads}
    while waiting:
        reached |= waiting
        waiting = {read for row in rows[:after] if row.binds & waiting for read in row.reads} - reached
    return name not in reached
