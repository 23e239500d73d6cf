"""Comparison by content of what JAX and Flax compare by `==` or not at all: pytrees' static data, Flax's settings.

Static data (aux data) is what a pytree node keeps besides its children: `struct.field(pytree_node=False)`, the meta
fields of a registered dataclass, the function of a `Partial`, the names of a `Partitioned`. JAX compares it by `==`,
which finds an object that was changed in place equal to itself and `1` equal to `True`, and raises for an array. So its
contents are hashed here.

All state that Flax 0.11.2, 0.12.8 and 0.12.12 keep outside modules and scopes; the first table is what is compared:

    flax.config                                       every flag
    linen.module._global_interceptor_stack            `nn.intercept_methods`, by what the functions do
    core.spmd._axis_rules                             `nn.logical_axis_rules`, `nn.set_logical_axis_rules`, NNX's too
    nnx.variablelib.VARIABLE_CONTEXT                  `nnx.use_eager_sharding`, `nnx.var_defaults`, `nnx.use_refs`
    nnx.graphlib.GRAPH_CONTEXT, its two modes         `nnx.set_graph_mode`, `nnx.set_graph_updates`

    left out: it names operations in a profile        linen.module._use_named_call
    left out: it is empty outside of a call           linen.module._context, core.lift's and NNX's split and merge stacks,
                                                      nnx.bridge.module.MODULE_CONTEXT, `nnx.capture` (on the modules)
    left out: it is about texts and files             nnx.reprlib, nnx.pytreelib.OBJECT_CONTEXT, serialization, io,
                                                      traceback_util
    left out: it fills while models are traced        caches and registries of classes, names and transforms
"""

from __future__ import annotations

import dataclasses
import enum
import sys
from collections.abc import Iterator
from operator import is_
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, PartitionSpec, Sharding
from msgspec import Struct

from ..base.digest import alike
from ..base.private import NNX_STACKS, flax_globals, nnx_stacks
from ..base.types import PyTree
from .fingerprint import Fingerprint, fingerprint

_WITHOUT = (dict, list, tuple, type(None))
"""Node types without static data, or with dict keys only, for which JAX's `==` is enough."""
_EXACT = (str, bytes, type(None), type, enum.Enum, np.dtype, Sharding, Mesh, AbstractMesh, PartitionSpec)
"""Immutable types whose `==` holds for the same value only, so that their contents need not be hashed."""


class Structure:
    """A treedef with a digest of the contents that its static data had at construction.

    `contents` is empty for trees without static data, None where the data has no fingerprint. Two Structures are equal
    if the treedefs are and the contents were.
    """

    __slots__ = ("contents", "treedef")

    def __init__(self, treedef: jax.tree_util.PyTreeDef, contents: bytes | None) -> None:
        self.treedef = treedef
        self.contents = contents

    @classmethod
    def of(cls, treedef: jax.tree_util.PyTreeDef) -> Structure:
        """Hashes the static data as it is now; half a microsecond for each node of the tree."""
        return cls(treedef, _digest(static_data(treedef)))

    @property
    def size(self) -> tuple[int, int]:
        """The number of nodes and of leaves."""
        return self.treedef.num_nodes, self.treedef.num_leaves

    def fits(self, treedef: jax.tree_util.PyTreeDef) -> bool:
        """`self == Structure.of(treedef)`, but only a comparison of treedefs where there is no static data."""
        if self.contents is None:  # contents that cannot be told may have changed
            return False
        return alike(self.treedef, treedef) and (not self.contents or self.contents == _digest(static_data(treedef)))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Structure) and self.contents == other.contents and alike(self.treedef, other.treedef)

    def __hash__(self) -> int:
        return hash((self.treedef, self.contents))


def static_data(treedef: PyTree) -> list[object]:
    """The static data of all nodes in a fixed order, without values that JAX's own `==` tells apart (`_EXACT`)."""
    data: list[object] = []
    waiting = [treedef]
    while waiting:
        node = waiting.pop()
        kind, static = node.node_data() or (None, None)
        if kind is not None:
            data += () if kind in _WITHOUT else _changeable(static)
            waiting += node.children()
    return data


def static_fields(treedef: PyTree, name: str) -> Iterator[tuple[str, object]]:
    """The static fields of all nodes, each under the name that a person knows: `batch.kind`, where `name` is `batch`.

    Those of a class that does not name them stand together, under the node's own name.
    """
    data: tuple[type, Any] | None = treedef.node_data()
    if data is None:
        return
    (kind, static), children = data, treedef.children()
    steps, names = [f"[{i}]" for i in range(len(children))], list[str]()
    if issubclass(kind, dict):
        steps = [f"[{key!r}]" for key in static]
    elif hasattr(kind, "_fields"):
        steps, static = [f".{field}" for field in kind._fields], None
    elif dataclasses.is_dataclass(kind):
        fields = dataclasses.fields(kind)
        # Flax marks them so, and JAX so.
        names = [one.name for one in fields if one.metadata.get("static", not one.metadata.get("pytree_node", True))]
        inside = [one.name for one in fields if one.name not in names]
        steps = [f".{one}" for one in inside] if len(inside) == len(children) else steps
    if type(static) is tuple and names and len(static) == len(names):
        yield from ((f"{name}.{field}", value) for field, value in zip(names, static, strict=True))
    elif kind not in _WITHOUT and static is not None:
        yield name, static
    for step, child in zip(steps, children, strict=False):
        yield from static_fields(child, name + step)


def _changeable(value: object) -> Iterator[object]:
    """The items of aux data that JAX's `==` does not tell apart, tuples taken apart."""
    if type(value) is tuple:  # taken apart, so that the exact values in it are left out
        for item in value:
            yield from _changeable(item)
    elif not isinstance(value, _EXACT):
        yield value


def _digest(data: list[object]) -> bytes | None:
    return fingerprint(data) if data else b""


class Unknown:
    """Placeholder for a setting whose contents cannot be told. Each look makes a new one, equal only to itself."""

    __slots__ = ()


class Described(Struct, frozen=True):
    """A user's object as text for people, with a digest that tells it from another of the same text."""

    text: str
    contents: bytes | None

    def __str__(self) -> str:
        return self.text


_last_prints: dict[str, Fingerprint] = {}


def _contents_of(kind: str, *values: object) -> bytes | Unknown:
    """A digest of some user's values, cached under `kind` until one of them is replaced or changes in place."""
    last = _last_prints.get(kind)
    if last is None or len(last.value) != len(values) or not all(map(is_, last.value, values)):
        last = _last_prints[kind] = Fingerprint(values)
    return last.digest() or Unknown()


def flax_state() -> tuple[object, ...]:
    """Flax's global state on this thread, read before every run in about 1 µs: equal values give equal traces."""
    if "flax.linen" not in sys.modules:  # nobody can have set anything, and an import would be slow
        return ()
    try:
        flags, interceptors, rules, stacks = flax_globals()
    except (AttributeError, KeyError):  # a version of Flax that keeps it elsewhere: every run is traced anew
        return (Unknown(),)
    return (
        tuple(flags.values()),
        _contents_of("interceptors", *interceptors) if interceptors else None,
        _contents_of("rules", rules) if rules else None,
        tuple([stack[-1] if stack else None for stack in stacks]) if any(stacks) else None,
    )


def flax_state_in_words() -> dict[str, object]:
    """Flax's global state by name, for the sentence that says why a program is new."""
    try:
        flags, interceptors, rules, stacks = flax_globals()
    except (AttributeError, KeyError):
        return {}
    names = ", ".join(getattr(function, "__name__", type(function).__name__) for function in interceptors)
    contents = _contents_of("interceptors", *interceptors)
    words: dict[str, object] = dict(flags)
    words["interceptors"] = Described(names or "none", None if isinstance(contents, Unknown) else contents)
    words["logical axis rules"] = Described(str(rules) if rules else "none", None)
    for (_, name), stack in zip(nnx_stacks() if stacks else (), stacks, strict=True):
        words[NNX_STACKS[name]] = stack[-1] if stack else "not set"
    return words
