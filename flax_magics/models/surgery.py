"""A graph that a run changed: attributes set, taken away or replaced, and how the module's own objects get them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from flax import nnx

from . import Path
from .graph import GRAPH, flat_state, is_fixed, is_ref, is_sown, parts_of, raw, set_raw, walk


def is_other(node: Any, held: Any) -> bool:
    """Whether a module or container holds other parts than it held; an array in place of an array is the same part."""
    now = parts_of(node)
    if now is None or len(now) != len(held):
        return True
    for (name, value), (old_name, old) in zip(now, held, strict=True):
        if name != old_name:
            return True
        if value is old or (_is_array(value) and _is_array(old)):
            continue
        if type(value) is not type(old) or isinstance(value, (nnx.Pytree, nnx.Variable, list, dict)):
            return True
        try:
            if not bool(value == old):
                return True
        except Exception:
            return True
    return False


def _is_array(value: Any) -> bool:
    return isinstance(value, (jax.Array, np.ndarray))


def taken_from(module: Any, before: Mapping[Path, Any]) -> tuple[Rebuilt, list[Any]]:
    """The graph of `module`, which a run changed, and the values of its variables.

    Args:
      before: its parts by path, as they were before the run.
    """
    was = {id(part): path for path, part in before.items() if isinstance(part, (nnx.Pytree, nnx.Variable))}
    now = {path: part for path, part in walk(module) if isinstance(part, (nnx.Pytree, nnx.Variable))}
    matches = {path: was[id(part)] for path, part in now.items() if id(part) in was}
    added = [type(part).__name__ for part in now.values() if isinstance(part, nnx.Variable) and id(part) not in was]
    graphdef, state = nnx.split(module, **GRAPH)
    skeleton, values, fixed = [], [], []
    for path, leaf in flat_state(state):
        if is_fixed(leaf):
            fixed.append((path, leaf))
            continue
        skeleton.append((path, jax.tree_util.tree_structure(leaf)))
        values.append(raw(leaf) if isinstance(leaf, nnx.Variable) else leaf)
    return Rebuilt(graphdef, tuple(skeleton), tuple(fixed), matches, tuple(dict.fromkeys(added))), values


@dataclass
class Rebuilt:
    """What a run left behind that is more than other values: attributes that were set, taken away or replaced."""

    graphdef: Any
    skeleton: tuple[tuple[Path, Any], ...]
    """Paths of the variables, and the tree structure of each."""
    fixed: tuple[tuple[Path, Any], ...]
    """Paths of what is no data, and what it is."""
    matches: Mapping[Path, Path]
    """Path in the graph as it is now → path before, of every part that was there before."""
    added: tuple[str, ...]
    """Types of variables that are new."""

    def put_into(self, module: Any, values: list[Any]) -> None:
        """Gives the objects of `module` the attributes that the run's copy has."""
        flat = [
            (path, jax.tree_util.tree_unflatten(structure, jax.tree_util.tree_leaves(value)))
            for (path, structure), value in zip(self.skeleton, values, strict=True)
        ]
        copy = nnx.merge(self.graphdef, nnx.from_flat_state([*flat, *self.fixed]))
        before, now = dict(walk(module)), dict(walk(copy))
        own = {id(now[path]): before[old] for path, old in self.matches.items() if path in now and old in before}
        transplant(own, now)


def transplant(own: Mapping[int, Any], now: Mapping[Path, Any]) -> None:
    """Gives each object of `own` (id of its copy → the object) what the copy in `now` holds.

    A part of a copy that stands for an object of `own` becomes that object; what is new is taken over as it is.
    """
    writes: list[Callable[[], None]] = []

    def swap(value: Any) -> Any:
        if id(value) in own:
            return own[id(value)]
        if type(value) in (list, tuple):
            return type(value)(map(swap, value))
        if type(value) is dict:
            return {key: swap(item) for key, item in value.items()}
        return value

    def write_to(target: Any, copy: Any) -> Callable[[], None]:
        if isinstance(target, nnx.Variable):
            metadata = dict(copy._var_metadata)
            if is_ref(raw(target)) and "ref" in metadata:  # the copy holds an array, and says so
                metadata["ref"] = True

            def write() -> None:
                if is_ref(raw(target)):
                    raw(target)[...] = raw(copy)
                else:
                    set_raw(target, raw(copy))
                object.__setattr__(target, "_var_metadata", metadata)
        else:
            attributes = {name: swap(value) for name, value in vars(copy).items() if name != "_pytree__state"}

            def write() -> None:
                for name, value in list(vars(target).items()):
                    if name not in attributes and name != "_pytree__state" and not is_sown(value):
                        del vars(target)[name]
                vars(target).update(attributes)

        return write

    for copy in now.values():
        target = own.get(id(copy))
        if isinstance(target, (nnx.Variable, nnx.Pytree)):
            writes.append(write_to(target, copy))
        elif target is None and isinstance(copy, nnx.Pytree):
            writes.append(write_to(copy, copy))
    for write in writes:
        write()
