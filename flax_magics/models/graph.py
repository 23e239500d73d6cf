"""The graph of an NNX module: its parts and their paths, what a part is, and the values that variables hold."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import jax
from flax import configurations, nnx
from flax.nnx import variablelib

from ..arguments import is_traced
from ..errors import FlaxMagicsError
from ..uninterrupted import Assignment
from . import Path

SIMPLE = (bool, int, float, complex, str, bytes)

RAW = "raw_value" if "raw_value" in nnx.Variable.__slots__ else "_raw_value"
"""The slot that a Variable holds its value in."""
_HIJAX: Any = getattr(configurations, "flax_hijax_variable", None)
"""The flag that makes Variables of another kind, which hold their values elsewhere."""
# Graph mode, where this version has another: models may share modules.
GRAPH: dict[str, Any] = {"graph": True} if "graph" in inspect.signature(nnx.split).parameters else {}
_PRIVATE = ("_pytree__state", "_pytree__nodes")
"""What NNX itself keeps on an object: when it was made, and which attributes hold data."""


def raw(variable: Any) -> Any:
    """The value that a Variable holds, without its hooks.

    Raises:
      FlaxMagicsError: it is one of hijax, which holds none.
    """
    try:
        return object.__getattribute__(variable, RAW)
    except AttributeError:
        raise FlaxMagicsError(
            "the module holds Variables of hijax, and flax_magics does not run these yet.",
            hint="they come of flax_hijax_variable, nnx.var_defaults or hijax=True: build the module again without",
            write="import flax; flax.config.update('flax_hijax_variable', False)" if _HIJAX.value else None,
        ) from None


def set_raw(variable: Any, value: Any) -> None:
    """Puts a value into a Variable, without its hooks, as `nnx.update` does."""
    object.__setattr__(variable, RAW, value)


def assignment(variable: Any, value: Any) -> Assignment:
    """`set_raw` as an assignment that is still to be made."""
    return (object.__setattr__, variable, RAW, value)


def is_ref(value: Any) -> bool:
    """Whether a value is a reference of JAX's, which programs change where it is."""
    return variablelib.is_array_ref(value)


def walk(module: Any) -> Iterator[tuple[Path, Any]]:
    """Paths and parts of the graph, each part once: modules, variables, containers, and what is static."""
    return nnx.iter_graph(module, **GRAPH)  # type: ignore[return-value]


def flat_state(state: Any) -> list[tuple[Path, Any]]:
    """Paths and variables (or bare arrays) of an `nnx.State`."""
    return list(nnx.to_flat_state(state))  # type: ignore[arg-type]


def parts_of(node: Any) -> tuple[tuple[Any, Any], ...] | None:
    """Names and values of what a node holds, None for what cannot be changed in place."""
    if isinstance(node, nnx.Pytree):
        return tuple((name, value) for name, value in vars(node).items() if name not in _PRIVATE)
    if isinstance(node, dict):
        return tuple(node.items())
    if isinstance(node, list):
        return tuple(enumerate(node))
    return None


def is_sown(part: Any) -> bool:
    """Whether a part is an intermediate value: handed back, never kept."""
    return isinstance(part, nnx.Intermediate) and not isinstance(part, nnx.Perturbation)  # held for its gradient


def is_fixed(leaf: Any) -> bool:
    """Whether a leaf of the graph is no data, such as a function in the place of a layer."""
    return not isinstance(leaf, (nnx.Variable, bool)) and not is_traced(leaf)


def spell(path: Path) -> str:
    """`('layers', 0, 'kernel')` → `layers/0/kernel`."""
    return "/".join(map(str, path))


def same(old: Any, new: Any) -> bool:
    """Whether two values hold the very same arrays."""
    if old is new:
        return True
    before: tuple[list[Any], Any] = jax.tree_util.tree_flatten(old)
    after: tuple[list[Any], Any] = jax.tree_util.tree_flatten(new)
    return bool(before[1] == after[1]) and all(a is b for a, b in zip(before[0], after[0], strict=True))
