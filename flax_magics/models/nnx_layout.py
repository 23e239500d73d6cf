"""The layout of an NNX module: split into graph and variables, merged again inside a program, and written back.

`nnx.split` takes about as long as a small run. So it is done once and its result kept while every module of the graph
holds the same attributes. A run reads the arrays from the variables, and its commit writes changed ones into the same
objects.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from functools import cached_property
from operator import setitem
from typing import Any

import jax
import numpy as np
from flax import nnx
from msgspec import Struct

from ..base.digest import owned_copy
from ..base.threads import Assignment
from ..base.types import Leaf, PyTree
from ..code.contents import static_data
from ..code.fingerprint import Fingerprint, Guards
from ..errors import FlaxMagicsError
from .calls import Path
from .nnx_graph import GRAPH, RAW, SIMPLE, assignment, flat_state, is_fixed, is_ref, is_sown, parts_of, raw, spell, walk

_DATA = (nnx.Pytree, nnx.Variable, jax.Array, np.ndarray, list, dict)

Values = dict[str, dict[str, PyTree]]
"""Variable type → path → array: `{'Param': {'linear/kernel': …}}`. The type of arrays without a Variable is `Array`."""

_SLOT: Any = vars(nnx.Variable)[RAW]
"""Descriptor of the value's slot: its `__get__` reads a value without Flax's hooks, and `map` can call it from C."""

_NO_NUMPY: set[type] = set()
"""Types of values seen so far that are not NumPy arrays: if all values are of these, none needs a copy."""


def _own(value: Leaf) -> Leaf:
    """The value, copied if it is a NumPy array, which an eager run could change in place. Remembers other types."""
    if not isinstance(value, np.ndarray):
        _NO_NUMPY.add(type(value))
    return owned_copy(value)


class Same:
    """A graphdef as part of a cache key, with a cached hash and an identity check before the slow comparison."""

    def __init__(self, value: nnx.GraphDef[Any]) -> None:
        self.value = value

    @cached_property
    def _hash(self) -> int:
        return hash(self.value)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Same) and bool(self.value == other.value))


class Slot(Struct, frozen=True, dict=True):
    """One variable or bare array of a module: its place, and the object that holds it."""

    collection: str
    name: str
    path: Path
    leaf: Leaf
    holder: PyTree
    """The attribute dict or container that holds a bare array; None for a Variable."""
    drawn: bool = False
    """The key or count of a random stream: each run starts with those of its draw, whatever the module holds."""
    fixed: bool = False
    """Static, such as a function in place of a layer: part of the program, not an input."""
    structure: PyTree = None
    """The treedef of a Variable: its type and metadata without the value."""
    ref: bool = False
    """The Variable holds a JAX array reference: runs get the array in it, and updates are written into it."""

    @cached_property
    def sown(self) -> bool:
        """Whether it was sown by an earlier call outside the session; runs start without it."""
        return is_sown(self.leaf)

    def read(self) -> PyTree:
        """The present value; for a reference the array inside."""
        if self.ref:
            with jax.ensure_compile_time_eval():  # in a trace the read would become part of the program
                return raw(self.leaf)[...]
        return raw(self.leaf) if self.holder is None else self.holder[self._key]

    def assignment(self, value: object) -> Assignment:
        """The Assignment that replaces its value."""
        if self.ref:
            return (setitem, raw(self.leaf), ..., value)
        if self.holder is None:
            return assignment(self.leaf, value)
        return (setitem, self.holder, self._key, value)

    @property
    def _key(self) -> str | int:
        key: str | int = self.path[-1]
        # A path may have an int where the user's dict has the text of it as its key.
        return str(key) if isinstance(self.holder, dict) and key not in self.holder else key


class Layout(Struct, dict=True):
    """A module split into graph and variables, valid while the `held` guards hold."""

    module: Any
    graphdef: Same
    slots: tuple[Slot, ...]
    nodes: tuple[tuple[Path, Any], ...]
    """(path, object) of the graph's modules and containers."""
    held: Guards
    """Guards on the attributes and items of all nodes."""
    switches: dict[bool | None, tuple[str, ...]] = {}
    """Mode → the train/eval switches with their values in it, as text; filled on demand."""

    @cached_property
    def fingerprint(self) -> Fingerprint:
        """The fingerprint of the graph's classes, and of static values that may change unseen by the graphdef."""
        values = {id(value): value for value in self._held if not isinstance(value, SIMPLE)}
        classes = dict.fromkeys(type(node) for _, node in self.nodes)
        kinds = dict.fromkeys(type(slot.leaf) for slot in self.slots if slot.holder is None)
        fixed = [slot.leaf for slot in self.slots if slot.fixed]
        return Fingerprint((*classes, *kinds, *values.values(), *fixed))

    @cached_property
    def numbers(self) -> str:
        """The repr of the graph's static numbers, because to the graphdef's `==` the values 1, 1.0 and True are one."""
        return repr([value for value in self._held if isinstance(value, SIMPLE)])

    @property
    def _held(self) -> Iterator[object]:
        """Static values of the graph's nodes and of its variables' metadata, without texts and None."""
        for _, node in self.nodes:
            # Sorted as in the graphdef: the order in which a constructor assigns attributes must not count.
            for _, value in sorted(parts_of(node) or (), key=lambda part: str(part[0])):
                if value is not None and not isinstance(value, (*_DATA, str, bytes)):
                    yield value
        for slot in self.slots:
            yield from () if slot.structure is None else static_data(slot.structure)

    @classmethod
    def of(cls, module: nnx.Module) -> Layout:
        """Splits `module`.

        Raises:
          FlaxMagicsError: it holds a JAX array reference outside a Variable.
        """
        graphdef, state = nnx.split(_on_arrays(module), **GRAPH)
        parts = dict(walk(module))
        slots: list[Slot] = []
        for path, leaf in flat_state(state):
            holder = parts.get(path[:-1])
            if isinstance(leaf, nnx.Variable):
                # `leaf` is a copy that `nnx.split` made; `parts` has the module's own Variable.
                variable, structure = parts.get(path, leaf), jax.tree_util.tree_structure(leaf)
                # A RngState outside a stream (a user's own) is a variable like any other.
                drawn = isinstance(leaf, nnx.RngState) and isinstance(holder, nnx.RngStream)
                where = type(leaf).__name__, spell(path), path
                slots.append(Slot(*where, variable, None, drawn=drawn, structure=structure, ref=is_ref(raw(variable))))
                continue
            if is_ref(leaf):
                raise FlaxMagicsError(
                    f"`{spell(path)}` is a reference without a Variable, which a run would change even where it fails.",
                    edit=f"self.{'.'.join(map(str, path))} = nnx.Variable(…)",
                )
            held_in = vars(holder) if isinstance(holder, nnx.Pytree) else holder
            slots.append(Slot("Array", spell(path), path, leaf, held_in, fixed=is_fixed(leaf)))
        nodes = tuple((path, node) for path, node in parts.items() if parts_of(node) is not None)
        held = Guards()
        for _, node in nodes:
            if isinstance(node, list):
                held.items(node)
            else:
                held.whole(node if isinstance(node, dict) else vars(node))
        return cls(module, Same(graphdef), tuple(slots), nodes, held)

    def copying(self, other: Layout) -> list[Assignment]:
        """The Assignments that copy the values of `other`, a layout with the same graphdef; sown values stay."""
        pairs = zip(self.slots, other.slots, strict=True)
        return [slot.assignment(_own(new.read())) for slot, new in pairs if not (slot.sown or slot.fixed)]

    def given(self) -> Values:
        """The present arrays that a program gets as inputs: all but random streams, sown and static values."""
        out: Values = {}
        for collection, names, leaves in self._given[0]:
            values = list(map(_SLOT.__get__, leaves))  # one C loop: this runs before each dispatch
            if not _NO_NUMPY.issuperset(map(type, values)):
                values = list(map(_own, values))
            out[collection] = dict(zip(names, values, strict=True))
        for slot in self._given[1]:
            out.setdefault(slot.collection, {})[slot.name] = _own(slot.read())
        return out

    def leaves(self) -> list[Leaf]:
        """The leaves of `given()`, NumPy arrays not copied; without its dicts where each Variable holds one leaf."""
        values = list(map(_SLOT.__get__, self._in_order))
        if self._given[1] or not jax.tree_util.all_leaves(values):
            return jax.tree_util.tree_leaves(self.given())
        return values

    @cached_property
    def _in_order(self) -> list[Any]:
        """Plain Variables in the order of JAX's leaves: by type, then by name."""
        variables = {(kind, name): leaf for kind, *rows in self._given[0] for name, leaf in zip(*rows, strict=True)}
        return [variables[place] for place in sorted(variables)]

    @cached_property
    def _given(self) -> tuple[list[tuple[str, list[str], list[Any]]], list[Slot]]:
        """Plain Variables as (type, names, objects), which are read in one go, and the slots that need `Slot.read`."""
        variables: dict[str, tuple[list[str], list[Any]]] = {}
        others = []
        for slot in self.slots:
            if slot.sown or slot.drawn or slot.fixed:
                continue
            if slot.holder is not None or slot.ref:
                others.append(slot)
                continue
            names, leaves = variables.setdefault(slot.collection, ([], []))
            names.append(slot.name)
            leaves.append(slot.leaf)
        return [(collection, names, leaves) for collection, (names, leaves) in variables.items()], others

    def streams(self) -> tuple[tuple[int, ...], ...]:
        """The shape of each held stream's key: () for one key, else the shape to which NNX's `fork` split it."""
        return tuple([slot.read().shape for slot in self._drawn])

    @cached_property
    def _drawn(self) -> tuple[Slot, ...]:
        return tuple(slot for slot in self.slots if slot.drawn and isinstance(slot.leaf, nnx.RngKey))

    @cached_property
    def random(self) -> frozenset[str]:
        """The variable types that belong to random streams, such as `RngKey`."""
        return frozenset(slot.collection for slot in self.slots if isinstance(slot.leaf, nnx.RngState))

    def rebuild(self, values: Mapping[str, Mapping[str, PyTree]]) -> Any:
        """A copy of the module that holds `values` in Variables of its own."""
        # Not `self.skeleton`: NNX's `fork` gives a stream's Variable a key of another shape, unseen by the guards.
        return Skeleton.of(self).rebuild(values)

    @cached_property
    def skeleton(self) -> Skeleton:
        """The module without its arrays, random streams as at the first access."""
        return Skeleton.of(self)

    @cached_property
    def has_refs(self) -> bool:
        """Whether any variable holds a reference: writing into one runs Python code, so it can be interrupted."""
        return any(slot.ref for slot in self.slots)

    @cached_property
    def tags(self) -> frozenset[str]:
        """Tags of the random streams in the graph, such as `dropout`."""
        return frozenset(str(part.key.tag) for _, part in walk(self.module) if isinstance(part, nnx.RngStream))

    def assignments(self, values: Mapping[str, Mapping[str, PyTree]]) -> list[Assignment]:
        """The Assignments that write `values`, of all or some variables, into the module's own objects."""
        plain, others = self._by_name
        assignments: list[Assignment] = []
        for kind, tree in values.items():
            for name, value in tree.items():
                if (kind, name) in plain:  # most are, and every run writes them
                    assignments.append((*plain[kind, name], value))
                elif (kind, name) in others:
                    assignments.append(others[kind, name].assignment(value))
        return assignments

    @cached_property
    def _by_name(self) -> tuple[dict[tuple[str, str], Assignment], dict[tuple[str, str], Slot]]:
        """By type and name: the Assignments of plain Variables, but for the value, and the slots of everything else."""
        plain, others = dict[tuple[str, str], Assignment](), dict[tuple[str, str], Slot]()
        for slot in self.slots:
            if slot.holder is None and not slot.ref:
                plain[slot.collection, slot.name] = slot.assignment(None)[:-1]
            else:
                others[slot.collection, slot.name] = slot
        return plain, others


def _on_arrays(module: nnx.Module) -> PyTree:
    """A copy with arrays in place of references; the module itself if it holds no references."""
    if not any(isinstance(part, nnx.Variable) and is_ref(raw(part)) for _, part in walk(module)):
        return module
    if hasattr(nnx, "to_arrays"):  # older Flax; newer has `with_vars`
        return nnx.to_arrays(module)
    return nnx.with_vars(module, ref=False, allow_duplicates=True)


class Skeleton(Struct, frozen=True, eq=False):
    """A module without its arrays, from which copies with other values are built; it does not keep the module alive.

    `rows`: (type, name, path, treedef, value) of each variable; `value` is for those that are no program inputs (random
    streams, static and sown values), and None for the others.
    """

    graphdef: Same
    rows: tuple[tuple[str, str, Path, PyTree, PyTree], ...]

    @classmethod
    def of(cls, layout: Layout) -> Skeleton:
        """The skeleton of a layout's module, with its random streams as they are now."""
        rows = []
        for slot in layout.slots:
            value = slot.read() if slot.drawn or slot.fixed or slot.sown else None
            if slot.sown:  # a run starts without it
                value = jax.tree_util.tree_map(lambda leaf: 0.0, value)
            rows.append((slot.collection, slot.name, slot.path, slot.structure, value))
        return cls(layout.graphdef, tuple(rows))

    def rebuild(self, values: Mapping[str, Mapping[str, PyTree]]) -> Any:
        """A new module that holds `values` in Variables of its own."""
        flat = []
        for collection, name, path, structure, stand_in in self.rows:
            value = values.get(collection, {}).get(name, stand_in)
            if structure is not None:
                value = jax.tree_util.tree_unflatten(structure, jax.tree_util.tree_leaves(value))
            flat.append((path, value))
        return nnx.merge(self.graphdef.value, nnx.from_flat_state(flat))


class LayoutCache:
    """Caches a module's layout until the module's structure changes."""

    def __init__(self) -> None:
        self.layout: Layout | None = None
        self.lock = threading.Lock()
        self.steady = False
        """Whether the layout is used without a check. An interrupt may leave it so, until the next block ends."""

    def __enter__(self) -> None:
        """Begins a block in which the layout is used without a check, but for `check`."""
        self.steady = True

    def __exit__(self, *_: object) -> None:
        self.steady = False

    def check(self) -> bool:
        """Whether the guards of the layout hold; forgets it if they do not."""
        holds = self.layout is not None and self.layout.held.hold()
        if not holds:
            self.layout = None
        return holds

    def of(self, module: nnx.Module) -> Layout:
        """The layout of `module` as it is now."""
        layout = self.layout
        if self.steady and layout is not None and layout.module is module:
            return layout
        with self.lock:
            if self.layout is None or self.layout.module is not module or not self.layout.held.hold():
                self.layout = Layout.of(module)
            return self.layout
