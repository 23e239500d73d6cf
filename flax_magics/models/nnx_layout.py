"""An NNX module taken apart, put together again inside a program, and written back in one step.

`nnx.split` is done once and kept for as long as no module of the graph has another attribute than before; a run then
reads the variables' arrays from the objects, and its commit writes those that changed back onto the same objects.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from operator import setitem
from typing import Any

import jax
import numpy as np
from flax import nnx
from msgspec import Struct

from ..base.digest import own
from ..base.threads import Assignment
from ..base.types import Leaf, PyTree
from ..code.contents import static_data
from ..code.fingerprint import Fingerprint, Guards
from ..errors import FlaxMagicsError
from .calls import Path
from .nnx_graph import GRAPH, RAW, SIMPLE, assignment, flat_state, is_fixed, is_ref, is_sown, parts_of, raw, spell, walk

_DATA = (nnx.Pytree, nnx.Variable, jax.Array, np.ndarray, list, dict)

Values = dict[str, dict[str, PyTree]]
"""Variable type → path → array: `{'Param': {'linear/kernel': …}}`. An array without a Variable is of type `Array`."""

_SLOT: Any = vars(nnx.Variable)[RAW]

_NO_NUMPY: set[type] = set()
"""Types of values that were met and that nobody changes where they are."""


def _own(value: Leaf) -> Leaf:
    """The value, a copy of one of NumPy's: a run op by op could change it in place."""
    if not isinstance(value, np.ndarray):
        _NO_NUMPY.add(type(value))
    return own(value)


class Same:
    """A graphdef as part of a key: compared for equality, which is quick for the very same one; hashed once."""

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
    """One variable (or bare array): where it is, and the object that holds it."""

    collection: str
    name: str
    path: Path
    leaf: Leaf
    holder: PyTree
    """The dict of attributes, or the container, that a bare array is in; None for a Variable."""
    drawn: bool = False
    """A stream's key or count: every run begins with those of its draw, whatever the module holds."""
    fixed: bool = False
    """No data, such as a function in the place of a layer: the program is made for it."""
    structure: PyTree = None
    """Of a Variable: what it is apart from its value."""
    ref: bool = False
    """Whether the Variable holds a reference: runs work on what is in there, and it is written back into it."""

    @cached_property
    def sown(self) -> bool:
        """Whether an earlier call by hand sowed it: a run starts without it."""
        return is_sown(self.leaf)

    def read(self) -> PyTree:
        """Its value now."""
        if self.ref:
            with jax.ensure_compile_time_eval():  # a program that is being made must not read it when it runs
                return raw(self.leaf)[...]
        return raw(self.leaf) if self.holder is None else self.holder[self._key]

    def assignment(self, value: object) -> Assignment:
        """The assignment that replaces its value."""
        if self.ref:
            return (setitem, raw(self.leaf), ..., value)
        if self.holder is None:
            return assignment(self.leaf, value)
        return (setitem, self.holder, self._key, value)

    @property
    def _key(self) -> str | int:
        key: str | int = self.path[-1]
        return str(key) if isinstance(self.holder, dict) and key not in self.holder else key


@dataclass
class Layout:
    """A module as it was when it was taken apart."""

    module: Any
    graphdef: Same
    slots: tuple[Slot, ...]
    nodes: tuple[tuple[Path, Any], ...]
    """The graph's modules and containers."""
    held: Guards
    """They hold for as long as each of these holds the very objects that it held."""
    switches: dict[bool | None, tuple[str, ...]] = field(default_factory=dict)
    """How the switches between training and evaluation read, by mode."""

    @cached_property
    def fingerprint(self) -> Fingerprint:
        """The fingerprint of the graph's classes, and of static values that change behind the graphdef's back."""
        values = {id(value): value for value in self._held if not isinstance(value, SIMPLE)}
        classes = dict.fromkeys(type(node) for _, node in self.nodes)
        kinds = dict.fromkeys(type(slot.leaf) for slot in self.slots if slot.holder is None)
        fixed = [slot.leaf for slot in self.slots if slot.fixed]
        return Fingerprint((*classes, *kinds, *values.values(), *fixed))

    @cached_property
    def numbers(self) -> str:
        """The graph's static numbers as they are written: to a graphdef `1`, `1.0` and `True` are one."""
        return repr([value for value in self._held if isinstance(value, SIMPLE)])

    @property
    def _held(self) -> Iterator[object]:
        """Static values of the graph's nodes, and what its variables are besides their values, without names and None."""
        for _, node in self.nodes:
            # In the graphdef's order, not in that of the assignments: a copy is of the same code.
            for _, value in sorted(parts_of(node) or (), key=lambda part: str(part[0])):
                if value is not None and not isinstance(value, (*_DATA, str, bytes)):
                    yield value
        for slot in self.slots:
            yield from () if slot.structure is None else static_data(slot.structure)

    @classmethod
    def of(cls, module: nnx.Module) -> Layout:
        """Takes `module` apart.

        Raises:
          FlaxMagicsError: it holds references that a program would change in place.
        """
        graphdef, state = nnx.split(_on_arrays(module), **GRAPH)
        parts = dict(walk(module))
        slots: list[Slot] = []
        for path, leaf in flat_state(state):
            holder = parts.get(path[:-1])
            if isinstance(leaf, nnx.Variable):
                variable, structure = parts.get(path, leaf), jax.tree_util.tree_structure(leaf)
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
        """The assignments that give the module the values of `other`, which has the same graphdef. Sown values stay."""
        pairs = zip(self.slots, other.slots, strict=True)
        return [slot.assignment(_own(new.read())) for slot, new in pairs if not (slot.sown or slot.fixed)]

    def given(self) -> Values:
        """The arrays that a program is given, as they are now: neither streams' own nor what earlier calls sowed."""
        out: Values = {}
        for collection, names, leaves in self._given[0]:
            values = list(map(_SLOT.__get__, leaves))
            if not _NO_NUMPY.issuperset(map(type, values)):
                values = list(map(_own, values))
            out[collection] = dict(zip(names, values, strict=True))
        for slot in self._given[1]:
            out.setdefault(slot.collection, {})[slot.name] = _own(slot.read())
        return out

    @cached_property
    def _given(self) -> tuple[list[tuple[str, list[str], list[Any]]], list[Slot]]:
        """Variables by type, with names and objects, which are read in one go; and the slots that take more."""
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
        """Shapes of the streams' keys: () for one key, otherwise as many as NNX's `fork` made."""
        return tuple(slot.read().shape for slot in self._drawn)

    @cached_property
    def _drawn(self) -> tuple[Slot, ...]:
        return tuple(slot for slot in self.slots if slot.drawn and isinstance(slot.leaf, nnx.RngKey))

    @cached_property
    def random(self) -> frozenset[str]:
        """Types of the variables that are a random stream's."""
        return frozenset(slot.collection for slot in self.slots if isinstance(slot.leaf, nnx.RngState))

    def rebuild(self, values: Mapping[str, Mapping[str, PyTree]]) -> Any:
        """A copy of the module that holds `values`, all of its variables its own."""
        # Streams are read anew for every copy: NNX's `fork` gives the same Variable keys of another shape.
        return Skeleton.of(self).rebuild(values)

    @cached_property
    def skeleton(self) -> Skeleton:
        """The module without its arrays, its streams as they were when it was first asked for."""
        return Skeleton.of(self)

    @cached_property
    def has_refs(self) -> bool:
        """Whether any variable is a reference, which takes more than an assignment to be written."""
        return any(slot.ref for slot in self.slots)

    @cached_property
    def tags(self) -> frozenset[str]:
        """Tags of the streams that the graph holds."""
        return frozenset(str(part.key.tag) for _, part in walk(self.module) if isinstance(part, nnx.RngStream))

    def assignments(self, values: Mapping[str, Mapping[str, PyTree]]) -> list[Assignment]:
        """The assignments that put `values`, of all or of some variables, into the module's own objects."""
        slots = self._by_name
        rows = [(collection, name, value) for collection, tree in values.items() for name, value in tree.items()]
        return [slots[kind, name].assignment(value) for kind, name, value in rows if (kind, name) in slots]

    @cached_property
    def _by_name(self) -> dict[tuple[str, str], Slot]:
        return {(slot.collection, slot.name): slot for slot in self.slots}


def _on_arrays(module: nnx.Module) -> PyTree:
    """A copy that holds arrays where the module holds references; the module itself if it holds none."""
    if not any(isinstance(part, nnx.Variable) and is_ref(raw(part)) for _, part in walk(module)):
        return module
    if hasattr(nnx, "to_arrays"):
        return nnx.to_arrays(module)
    return nnx.with_vars(module, ref=False, allow_duplicates=True)


class Skeleton(Struct, frozen=True, eq=False):
    """A module as it was, without its arrays: with other values it is another module, whatever became of the first.

    `rows`: type, name, path and structure of each variable, and what stands for those that no program is given.
    """

    graphdef: Same
    rows: tuple[tuple[str, str, Path, PyTree, PyTree], ...]

    @classmethod
    def of(cls, layout: Layout) -> Skeleton:
        """The module of a layout, its streams as they are now."""
        rows = []
        for slot in layout.slots:
            value = slot.read() if slot.drawn or slot.fixed or slot.sown else None
            if slot.sown:  # a run starts without it
                value = jax.tree_util.tree_map(lambda leaf: 0.0, value)
            rows.append((slot.collection, slot.name, slot.path, slot.structure, value))
        return cls(layout.graphdef, tuple(rows))

    def rebuild(self, values: Mapping[str, Mapping[str, PyTree]]) -> Any:
        """A module that holds `values`, all of its variables its own."""
        flat = []
        for collection, name, path, structure, stand_in in self.rows:
            value = values.get(collection, {}).get(name, stand_in)
            if structure is not None:
                value = jax.tree_util.tree_unflatten(structure, jax.tree_util.tree_leaves(value))
            flat.append((path, value))
        return nnx.merge(self.graphdef.value, nnx.from_flat_state(flat))


@dataclass
class LayoutCache:
    """A module's layout, kept until the module is another."""

    layout: Layout | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)
    steady: int = 0

    def __enter__(self) -> None:
        """Begins a time in which nobody changes the module: it is looked at once."""
        self.layout = self.layout if self.layout is not None and self.layout.held.hold() else None
        self.steady += 1

    def __exit__(self, *_: object) -> None:
        self.steady -= 1

    def of(self, module: nnx.Module) -> Layout:
        """The layout of `module` as it is now."""
        layout = self.layout
        if self.steady and layout is not None and layout.module is module:
            return layout
        with self.lock:
            if self.layout is None or self.layout.module is not module or not self.layout.held.hold():
                self.layout = Layout.of(module)
            return self.layout
