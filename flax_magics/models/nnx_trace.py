"""One run of an NNX module on a copy of it, watched: streams consumed, layers passed, what was sown, and what it changed."""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from typing import Any

import jax
import numpy as np
from flax import nnx

from ..base.threads import Assignment, at_once
from ..base.types import PyTree
from .base import (
    ARGUMENTS,
    CONVERTED,
    SOWN,
    CallTrace,
    Commit,
    Forward,
    Incomplete,
    KeyUse,
    Needs,
    Updates,
    Variables,
    replaced,
)
from .calls import Args, Function, Kwargs, Path, has_tracer
from .nnx_graph import (
    RebuiltGraph,
    assignment,
    is_other,
    is_sown,
    parts_of,
    raw,
    same,
    set_mode,
    set_raw,
    taken_from,
    walk,
)
from .nnx_layout import Layout
from .switch import mask_of

Passed = tuple[nnx.Variable[Any], ...]
"""Variables of the NNX objects that a call was given."""
STRUCTURE = "(structure)"
"""Where a run's result keeps the variables of a graph that the run changed."""


def forward(
    layout: Layout, method: Path, ask: Needs, record: CallTrace, *, mode: bool | None, rngs: list[str] | None
) -> Forward:
    """The run of a module as a pure function; see `AnyModel.forward`.

    Args:
      mode: what the switches of the copy are set to; None: they stay.
      rngs: names of the streams in the `rngs` that the call is handed; None: it is handed none.
    """

    def run(variables: Variables, keys: PyTree, args: Args, kwargs: Kwargs) -> tuple[PyTree, Updates]:
        copy = layout.rebuild(variables)
        parts_before = dict(walk(copy))
        values = {path: raw(part) if isinstance(part, nnx.Variable) else part for path, part in parts_before.items()}
        _pop(copy, is_sown)
        undo = set_mode(copy, mode)
        reseed(copy, keys)
        trace = object() if has_tracer(variables, keys, args, kwargs) else None
        mark(copy, trace)
        nodes = [(node, parts) for _, node in walk(copy) if (parts := parts_of(node)) is not None]
        handed = None
        passed = [(variable, raw(variable)) for variable in variables_in((args, kwargs))]
        if rngs is not None:
            handed = nnx.Rngs(**{name: keys[name] for name in rngs})
            mark(handed, trace, handed=True)
            kwargs = {**kwargs, "rngs": handed}
        watcher = Watcher(copy, record, handed)
        try:
            # Variables that the model makes are like those that it holds, whatever `flax_hijax_variable` says.
            plain = nnx.var_defaults(hijax=False) if hasattr(nnx, "var_defaults") else nullcontext()
            with watcher.watching(), plain:
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
        updates: Updates = {}
        if sown:
            record.sown.add(SOWN)
            updates[SOWN] = sown
        changed = {str(i): raw(variable) for i, (variable, old) in enumerate(passed) if not same(old, raw(variable))}
        if changed:
            updates[ARGUMENTS] = changed
        if any(is_other(node, parts) for node, parts in nodes):
            undo()
            record.structure, updates[STRUCTURE] = taken_from(copy, parts_before)
        parts_after = dict(walk(copy))
        for slot in layout.slots:
            part = parts_after.get(slot.path)
            if slot.sown or slot.fixed or part is None:
                continue
            value = raw(part) if isinstance(part, nnx.Variable) else part
            if not same(values[slot.path], value):
                updates.setdefault(slot.collection, {})[slot.name] = value
            elif trace is not None and _is_converted(slot.read(), value):
                updates.setdefault(CONVERTED, {}).setdefault(slot.collection, {})[slot.name] = value
        return output, updates

    return run


def commit(layout: Layout, passed: Passed, updates: Variables, structure: RebuiltGraph | None) -> Commit:
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
    write = functools.partial(structure.put_into, layout.module, updates[STRUCTURE])
    return Commit(tuple(changed), tuple(moved), write)


def variables_in(tree: PyTree) -> Passed:
    """The variables of all NNX objects in a tree of arguments, in order."""
    variables: list[nnx.Variable[Any]] = []
    for leaf in jax.tree_util.tree_leaves(tree, is_leaf=lambda part: isinstance(part, (nnx.Pytree, nnx.Variable))):
        if isinstance(leaf, nnx.Variable):
            variables.append(leaf)
        elif isinstance(leaf, nnx.Pytree):
            variables += _variables_of(leaf)
    return tuple(variables)


def _variables_of(module: object) -> list[nnx.Variable[Any]]:
    """The variables of a graph, in order."""
    return [part for _, part in walk(module) if isinstance(part, nnx.Variable)]


def reseed(module: object, keys: Mapping[str, Any]) -> None:
    """`nnx.reseed(module, policy='match_shape', **keys)`: a key of its own for each stream of a tag, in graph order."""
    parts = dict(walk(module))
    for path, (tag, number) in _places(parts).items():
        if tag in keys:
            stream = parts[path]
            shape, key = raw(stream.key).shape, jax.random.fold_in(keys[tag], np.uint32(number))
            key = jax.random.split(key, shape) if shape else key
            set_raw(stream.key, key)
            set_raw(stream.count, jax.numpy.zeros(key.shape, dtype=jax.numpy.uint32))


def _is_converted(held: PyTree, traced: PyTree) -> bool:
    """Whether JAX has made another dtype of a value by taking it into a program."""
    before, after = jax.tree_util.tree_leaves(held), jax.tree_util.tree_leaves(traced)
    return any(getattr(old, "dtype", None) != new.dtype for old, new in zip(before, after, strict=True))


def _pop(module: nnx.Module, wanted: Callable[[object], bool]) -> Updates:
    """Takes the parts that are `wanted` off the graph: type → nested by path."""
    out: Updates = {}
    for path, node in list(walk(module)):
        for name, part in [row for row in parts_of(node) or () if wanted(row[1])]:
            inner = out.setdefault(type(part).__name__, {})
            for step in path:
                inner = inner.setdefault(str(step), {})
            inner[str(name)] = raw(part)
            if isinstance(node, nnx.Pytree):
                del vars(node)[name]
            elif isinstance(node, dict):
                del node[name]
    return out


MARK = "flax_magics_path"
SOWED = "flax_magics_sown"
"""Metadata of variables: the path; that `sow` made it in this run."""
_MAY_LOSE = "capture_noop" in inspect.signature(nnx.Module.sow).parameters
"""Whether this version may be set to sow nothing outside of `nnx.capture`."""
HANDED: Path = ("(rngs of the call)",)
"""In place of a path: a stream that the session made for the call."""


def mark(module: object, trace: object, handed: bool = False) -> None:
    """Every variable of the graph carries its path.

    Args:
      trace: what tells this trace from every other. A function inside the model that is jitted by itself is then traced
        in each, where JAX would answer from what it remembers, and the streams in there would go unseen.
      handed: the graph is the Rngs that the session made for the call.
    """
    for path, part in walk(module):
        if isinstance(part, nnx.Variable):
            where = HANDED if handed else path
            object.__setattr__(part, "_var_metadata", {**part._var_metadata, MARK: (where, trace)})


def path_of(variable: nnx.Variable[Any]) -> Path | None:
    """The path that a variable carries, None for one that the user passed or that the model made itself."""
    path, _ = variable._var_metadata.get(MARK, (None, None))
    return path  # type: ignore[no-any-return]


def was_sown(part: object) -> bool:
    """Whether a variable came to be by `sow` in this run."""
    return isinstance(part, nnx.Variable) and SOWED in getattr(part, "_var_metadata", ())


def unmark(module: nnx.Module) -> None:
    """Takes the paths off again."""
    for variable in _variables_of(module):
        if MARK in getattr(variable, "_var_metadata", ()):  # hijax has none
            metadata = {name: value for name, value in variable._var_metadata.items() if name != MARK}
            object.__setattr__(variable, "_var_metadata", metadata)


class Watcher:
    """Fills a CallTrace from one run of `module`, a copy whose variables are marked.

    Args:
      handed: the Rngs that the session made for the call, None if it made none.
    """

    def __init__(self, module: nnx.Module, record: CallTrace, handed: object) -> None:
        self.record = record
        self.handed = handed
        self.missing: str | None = None
        self.drawing: tuple[tuple[int, ...], float] | None = None
        self.drawn: Counter[tuple[object, ...]] = Counter()
        self.parts = dict(walk(module))
        self.places = _places(self.parts)
        self.paths = {id(part): path for path, part in self.parts.items() if isinstance(part, nnx.Pytree)}

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Inside the block, what the module does on this thread fills the record."""
        modules = [part for part in self.parts.values() if isinstance(part, nnx.Module)]
        noted = [] if self.record.calls is None else list(dict.fromkeys(map(type, modules)))
        with replaced(
            (nnx.RngStream, "__call__", self._draw),
            (nnx.Rngs, "_get_stream", self._look_up),
            (nnx.Module, "sow", self._sow),
            (nnx.Dropout, "__call__", self._dropout),
            (nnx.BatchNorm, "__call__", self._norm),
            *((cls, name, functools.partial(self._noted, name)) for cls in noted for name in _public(cls)),
        ):
            yield

    def _draw(self, draw: Function, stream: nnx.RngStream) -> PyTree:
        self._consumed(stream)
        return draw(stream)

    def _look_up(self, look_up: Function, rngs: object, name: str, error: Callable[[str], Exception]) -> PyTree:
        if self._lacks(rngs, name):
            # With a `default` NNX would fall back on that: in each draw a stream has its own key.
            self.missing = name
            raise error(f"No RngStream named '{name}' found in Rngs.")
        try:
            return look_up(rngs, name, error)
        except (AttributeError, KeyError):
            if self.handed is not None and not name.startswith("_"):
                self.missing = name
            raise

    def _sow(
        self, sow: Function, module: nnx.Module, variable_type: object, name: str, *args: PyTree, **kwargs: PyTree
    ) -> PyTree:
        is_new = not hasattr(module, name)
        if _MAY_LOSE:  # a run hands back what is sown, as `nnx.capture` does
            args, kwargs = args[:3], {**kwargs, "capture_noop": False}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", r"Using 'Module\.sow\(\)' outside", DeprecationWarning)
            result = sow(module, variable_type, name, *args, **kwargs)
        variable = vars(module).get(name)
        if is_new and isinstance(variable, nnx.Variable):
            object.__setattr__(variable, "_var_metadata", {**variable._var_metadata, SOWED: True})
        return result

    def _dropout(self, dropout: Function, module: nnx.Dropout, /, *args: PyTree, **kwargs: PyTree) -> PyTree:
        if module.rate != 0.0:
            self._layer(module, "dropout", kwargs)
        self.drawing = mask_of(module, args, kwargs)
        try:
            return dropout(module, *args, **kwargs)
        finally:
            self.drawing = None

    def _norm(self, norm: Function, module: nnx.Module, /, *args: PyTree, **kwargs: PyTree) -> PyTree:
        self._layer(module, "norm", kwargs)
        return norm(module, *args, **kwargs)

    def _noted(self, name: str, method: Function, module: nnx.Module, /, *args: PyTree, **kwargs: PyTree) -> PyTree:
        calls, path, call = self.record.calls, self._path(module), functools.partial(method, module)
        if calls is None or path is None:
            return call(*args, **kwargs)
        return calls.note(call, args, kwargs, path=tuple(map(str, path)), cls=type(module).__name__, method=name)

    def _lacks(self, rngs: object, name: str) -> bool:
        """Whether `rngs` are those of the call, or a transform's copy of them, and have no stream of that name."""
        if self.handed is None or name.startswith("_") or name in vars(rngs):
            return False
        streams = [part for part in vars(rngs).values() if isinstance(part, nnx.RngStream)]
        return rngs is self.handed or any(path_of(stream.key) == HANDED for stream in streams)

    def _consumed(self, stream: nnx.RngStream) -> None:
        path = path_of(stream.key)
        if path is not None:
            consumer = self._caller() if path == HANDED else self._module_at(path[:-1])
            tag, where = str(stream.key.tag), tuple(map(str, consumer))
            self.record.asked.setdefault(tag, []).append(where)
            # A stream's key is the draw's with its place among the streams of its tag folded in, and then its count.
            place: tuple[object, ...] = (tag,) if path == HANDED else self.places.get(path[:-1], path)
            inside = not self._own(stream, path)
            self.record.takes.append(KeyUse(tag, where, (place, self.drawn[place]), self.drawing, inside))
            self.drawn[place] += 1

    def _own(self, stream: nnx.RngStream, path: Path) -> bool:
        """Whether a stream is the model's own or the call's, and no copy of a transform's."""
        if path == HANDED:
            return any(part is stream for part in vars(self.handed).values())
        return self.parts.get(path[:-1]) is stream

    def _module_at(self, path: Path) -> Path:
        """The nearest module around a part: a layer's stream is the layer's."""
        while path and not isinstance(self.parts.get(path), nnx.Module):
            path = path[:-1]
        return path

    def _caller(self) -> Path:
        """The innermost module whose method is running: who consumes a stream that came as an argument."""
        for frame, _ in traceback.walk_stack(sys._getframe(2)):
            module = frame.f_locals.get("self", frame.f_locals.get("module"))
            path = self._path(module) if isinstance(module, nnx.Module) else None
            if path is not None:
                return path
        return ()

    def _path(self, module: object) -> Path | None:
        if id(module) in self.paths and self.parts[self.paths[id(module)]] is module:
            return self.paths[id(module)]
        for part in vars(module).values():  # a transform's copy
            variable = getattr(part, "key", None) if isinstance(part, nnx.RngStream) else part
            path = path_of(variable) if isinstance(variable, nnx.Variable) else None
            if path is not None:
                return self._module_at(path[:-1])
        return None

    def _layer(self, module: nnx.Module, kind: str, given: Kwargs) -> None:
        path = self._path(module)
        path = self._caller() if path is None else path
        around = (self.parts.get(path[:n]) for n in reversed(range(len(path))))
        modules = [part for part in around if isinstance(part, nnx.Module)]
        self.record.passed(kind, tuple(map(str, path)), module, modules, given)


def _places(parts: Mapping[Path, object]) -> dict[Path, tuple[str, int]]:
    """For each stream of a graph its tag, and which of the streams of that tag it is, in graph order."""
    places: dict[Path, tuple[str, int]] = {}
    numbers: Counter[str] = Counter()
    for path, part in parts.items():
        if isinstance(part, nnx.RngStream):
            tag = str(part.key.tag)
            places[path] = (tag, numbers[tag])
            numbers[tag] += 1
    return places


def _public(cls: type) -> list[str]:
    """The call and the public methods of a module class, without those that every module has."""
    names = [name for name, _ in inspect.getmembers(cls, inspect.isfunction)]
    return [name for name in names if name == "__call__" or not (name.startswith("_") or hasattr(nnx.Module, name))]
