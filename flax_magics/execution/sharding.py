"""Errors of a run whose arguments, or whose surroundings, are a mesh with Explicit axes."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding

from ..errors import FlaxMagicsError, written
from .call import Call


def of_explicit_axes(error: BaseException, call: Call) -> FlaxMagicsError | None:
    """The error for what Explicit axes are the reason of; None where `error` comes of something else.

    `jax.make_mesh` gives Explicit axes unless it is told otherwise. Under them an array's type says how it is sharded, and
    several of Flax's layers (Embed, Dropout, RNN) leave open how their results are.
    """
    around = jax.sharding.get_abstract_mesh()
    arguments = list(_sharded(call))
    mesh: Any = arguments[0][1].mesh if arguments else around
    if mesh.empty or AxisType.Explicit not in mesh.axis_types:
        return None
    # Messages write the types as `float32[16@data,4]`.
    typed = any(f"@{name}" in str(error) for name in mesh.axis_names)
    if not typed and type(error).__name__ != "ShardingTypeError":
        return None
    sizes, names = tuple(mesh.shape.values()), tuple(mesh.axis_names)
    kinds = "(AxisType.Auto,)" + f" * {len(names)}" * (len(names) > 1)
    lines = [
        "import jax",
        "from jax.sharding import AxisType, NamedSharding, PartitionSpec as P",
        f"mesh = jax.make_mesh({sizes}, {names}, axis_types={kinds})",
    ]
    lines += ["jax.set_mesh(mesh)"] * (not around.empty)
    for name, sharding in arguments:
        if name.isidentifier():
            spec = ", ".join(map(repr, sharding.spec))
            lines.append(f"{name} = jax.device_put({name}, NamedSharding(mesh, P({spec})))")
    return FlaxMagicsError(
        f"{call.text} cannot run on a mesh of Explicit axes: a layer leaves open how its result is sharded"
        f" ({type(error).__name__}). Under Auto axes XLA works it out: put the arrays on such a mesh.",
        **written("\n".join(lines)),
    )


def _sharded(call: Call) -> Iterator[tuple[str, NamedSharding]]:
    """The arguments with an array on Explicit axes: what is written there, where that is the array itself; its sharding."""
    tree = ast.parse(call.text, mode="eval").body if call.is_text else None
    values = [*call.args, *call.kwargs.values()]
    nodes = [*tree.args, *(keyword.value for keyword in tree.keywords)] if isinstance(tree, ast.Call) else []
    texts = map(ast.unparse, nodes) if len(nodes) == len(values) else [""] * len(values)
    for text, value in zip(texts, values, strict=True):
        for leaf in jax.tree_util.tree_leaves(value):
            sharding = getattr(leaf, "sharding", None)
            if isinstance(sharding, NamedSharding) and AxisType.Explicit in sharding.mesh.axis_types:
                yield text if leaf is value else "", sharding
                break
