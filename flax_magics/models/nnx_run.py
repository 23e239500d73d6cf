"""One run of an NNX module, on a copy of it: what the run changed, and what writes that into the module's own objects."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import jax
import numpy as np
from flax import nnx

from ..arguments import has_tracer
from ..uninterrupted import Assignment, at_once
from . import ARGUMENTS, CONVERTED, SOWN, Ask, Commit, Forward, Incomplete, Path, Record, Variables
from .graph import assignment, is_sown, parts_of, raw, same, set_raw, walk
from .layout import Layout
from .nnx_switch import set_mode
from .streams import Watcher, mark, unmark, was_sown
from .surgery import Rebuilt, is_other, taken_from

STRUCTURE = "(structure)"
"""Where a run's result keeps the variables of a graph that the run changed."""


def forward(
    layout: Layout,
    method: Path,
    ask: Ask,
    record: Record,
    *,
    mode: bool | None,
    held: frozenset[str],
    rngs: list[str] | None,
) -> Forward:
    """The run of a module as a pure function; see `Model.forward`.

    Args:
      mode: what the switches of the copy are set to; None: they stay.
      held: streams that the run is given whether or not it consumes them.
      rngs: names of the streams in the `rngs` that the call is handed; None: it is handed none.
    """

    def run(
        variables: Variables, keys: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]]:
        copy = layout.rebuild(variables)
        before = dict(walk(copy))
        values = {path: raw(part) if isinstance(part, nnx.Variable) else part for path, part in before.items()}
        _pop(copy, is_sown)
        undo = set_mode(copy, mode)
        reseed(copy, keys)
        trace = object() if has_tracer(variables, keys, args, kwargs) else None
        mark(copy, trace)
        nodes = [(node, parts_of(node)) for _, node in walk(copy) if parts_of(node) is not None]
        handed = None
        passed = variables_in((args, kwargs))
        given = [raw(variable) for variable in passed]
        if rngs is not None:
            handed = nnx.Rngs(**{name: keys[name] for name in rngs})
            mark(handed, trace, handed=True)
            kwargs = {**kwargs, "rngs": handed}
        record.held |= held
        watcher = Watcher(copy, record, handed)
        try:
            with watcher.watching(), _plain_variables():
                target: Any = copy
                for name in method:
                    target = getattr(target, name)
                output = target(*args, **kwargs)
        except (AttributeError, KeyError):
            if watcher.missing is None or watcher.missing in ask.streams:
                raise
        finally:
            unmark(copy)
        if watcher.missing is not None and watcher.missing not in ask.streams:
            record.asked.setdefault(watcher.missing, [])
            raise Incomplete
        sown = _pop(copy, lambda part: is_sown(part) or was_sown(part))
        updates: dict[str, Any] = {}
        if sown:
            record.sown.add(SOWN)
            updates[SOWN] = sown
        moved = {
            str(i): raw(variable)
            for i, (variable, old) in enumerate(zip(passed, given, strict=True))
            if not same(old, raw(variable))
        }
        if moved:
            updates[ARGUMENTS] = moved
        if any(is_other(node, parts) for node, parts in nodes):
            undo()
            record.structure, updates[STRUCTURE] = taken_from(copy, before)
        after = dict(walk(copy))
        for slot in layout.slots:
            part = after.get(slot.path)
            if slot.sown or slot.fixed or part is None:
                continue
            value = raw(part) if isinstance(part, nnx.Variable) else part
            if not same(values[slot.path], value):
                updates.setdefault(slot.collection, {})[slot.name] = value
            elif trace is not None and _is_converted(slot.read(), value):
                updates.setdefault(CONVERTED, {}).setdefault(slot.collection, {})[slot.name] = value
        return output, updates

    return run


def commit(layout: Layout, passed: tuple[Any, ...], updates: Mapping[str, Any], structure: Rebuilt | None) -> Commit:
    """How to write a run's `updates` into the module's own objects, and into the variables that were `passed`."""
    ours = (STRUCTURE, ARGUMENTS, CONVERTED)
    changed = [name for name in updates if name not in ours and name not in layout.random]
    moved: list[Assignment] = [assignment(passed[int(i)], value) for i, value in updates.get(ARGUMENTS, {}).items()]
    if structure is None:
        converted = layout.assignments(updates[CONVERTED]) if CONVERTED in updates else ()
        assignments = (*layout.assignments(updates), *converted, *moved)
        if layout.has_refs:
            return Commit(tuple(changed), (), lambda: at_once(assignments))
        return Commit(tuple(changed), assignments)
    changed += [name for name in structure.added if name not in changed and name not in layout.random]

    def write() -> None:
        structure.put_into(layout.module, updates[STRUCTURE])

    return Commit(tuple(changed), tuple(moved), write)


def variables_in(tree: Any) -> tuple[Any, ...]:
    """The variables of all NNX objects in a tree of arguments, in order."""
    found = []
    for leaf in jax.tree_util.tree_leaves(tree, is_leaf=lambda part: isinstance(part, (nnx.Pytree, nnx.Variable))):
        if isinstance(leaf, nnx.Variable):
            found.append(leaf)
        elif isinstance(leaf, nnx.Pytree):
            found += [part for _, part in walk(leaf) if isinstance(part, nnx.Variable)]
    return tuple(found)


def reseed(module: Any, keys: Mapping[str, Any]) -> None:
    """`nnx.reseed(module, policy='match_shape', **keys)`: a key of its own for each stream of a tag, in graph order."""
    drawn: Counter[str] = Counter()
    for _, stream in walk(module):
        if isinstance(stream, nnx.RngStream) and stream.key.tag in keys:
            tag = stream.key.tag
            key = jax.random.fold_in(keys[tag], np.uint32(drawn[tag]))
            drawn[tag] += 1
            shape = raw(stream.key).shape
            if shape:
                key = jax.random.split(key, shape)
            set_raw(stream.key, key)
            set_raw(stream.count, jax.numpy.zeros(key.shape, dtype=jax.numpy.uint32))


def _plain_variables() -> Any:
    """A block in which the model makes Variables like those that it holds, whatever `flax_hijax_variable` says."""
    return nnx.var_defaults(hijax=False) if hasattr(nnx, "var_defaults") else nullcontext()


def _is_converted(held: Any, traced: Any) -> bool:
    """Whether JAX has made another dtype of a value by taking it into a program."""
    before, after = jax.tree_util.tree_leaves(held), jax.tree_util.tree_leaves(traced)
    return any(getattr(old, "dtype", None) != new.dtype for old, new in zip(before, after, strict=True))


def _pop(module: Any, wanted: Callable[[Any], bool]) -> dict[str, Any]:
    """Takes the parts that are `wanted` off the graph: type → nested by path."""
    out: dict[str, Any] = {}
    for path, node in list(walk(module)):
        for name, part in parts_of(node) or ():
            if not wanted(part):
                continue
            inner = out.setdefault(type(part).__name__, {})
            for step in path:
                inner = inner.setdefault(str(step), {})
            inner[str(name)] = raw(part)
            if isinstance(node, nnx.Pytree):
                del vars(node)[name]
            elif isinstance(node, dict):
                del node[name]
    return out
