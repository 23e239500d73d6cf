"""One observed run of an NNX module on a copy: streams consumed, layers called, values sown, variables changed."""

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
    STRUCTURE,
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
from .calls import Args, Function, Kwargs, Path, has_tracer, mask_of
from .nnx_graph import (
    RebuiltGraph,
    assignment,
    is_sown,
    other_parts,
    parts_of,
    raw,
    same,
    set_mode,
    set_raw,
    taken_from,
    walk,
)
from .nnx_layout import Layout

Passed = tuple[nnx.Variable[Any], ...]
"""Variables of the NNX objects among a call's arguments."""


def forward(
    layout: Layout, method: Path | Function, ask: Needs, record: CallTrace, *, mode: bool | None, rngs: list[str] | None
) -> Forward:
    """The run of a module as a pure function; see `AnyModel.forward`.

    Args:
      mode: True or False sets the copy's switches for training or evaluation; None leaves them.
      rngs: stream names of the `nnx.Rngs` that is added to the call as `rngs`; None adds no such argument.
    """

    def run(variables: Variables, keys: PyTree, args: Args, kwargs: Kwargs) -> tuple[PyTree, Updates]:
        copy = layout.rebuild(variables)
        parts_before = dict(walk(copy))
        values = {path: raw(part) if isinstance(part, nnx.Variable) else part for path, part in parts_before.items()}
        _pop(copy, is_sown)  # sown by earlier calls: the run would append to it
        undo = set_mode(copy, mode)
        reseed(copy, keys)
        trace = object() if has_tracer(variables, keys, args, kwargs) else None
        mark(copy, trace)
        # After mode, reseeding and marks, so that only what the model itself changes counts as another structure.
        nodes = [(path, node, parts) for path, node in walk(copy) if (parts := parts_of(node)) is not None]
        handed = None
        passed = [(variable, raw(variable)) for variable in variables_in((args, kwargs))]
        if rngs is not None:
            handed = nnx.Rngs(**{name: keys[name] for name in rngs})
            mark(handed, trace, handed=True)
            kwargs = {**kwargs, "rngs": handed}
        watcher = Watcher(copy, record, handed)
        try:
            # Variables that the model makes are plain ones, like those it holds, whatever `flax_hijax_variable` says.
            plain = nnx.var_defaults(hijax=False) if hasattr(nnx, "var_defaults") else nullcontext()
            with watcher.watching(), plain:
                target: Any = functools.partial(method, copy) if callable(method) else copy
                for name in () if callable(method) else method:
                    target = getattr(target, name)
                output = target(*args, **kwargs)
        except (AttributeError, KeyError):
            if watcher.missing is None or watcher.missing in ask.streams:
                raise
            # Otherwise it comes from the look-up of a stream that was not given: below it counts as asking for it.
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
        others = [each for node in nodes for each in other_parts(*node)]
        if others:
            undo()
            record.structure, updates[STRUCTURE] = taken_from(copy, parts_before, others)
        parts_after = dict(walk(copy))
        for slot in layout.slots:
            part = parts_after.get(slot.path)
            if slot.sown or slot.fixed or part is None:
                continue
            value = raw(part) if isinstance(part, nnx.Variable) else part
            if not same(values[slot.path], value):
                updates.setdefault(slot.collection, {})[slot.name] = value
            # A program returns a Python number as an array, which by hand ends up in the module, too.
            elif trace is not None and _is_converted(slot.read(), value):
                updates.setdefault(CONVERTED, {}).setdefault(slot.collection, {})[slot.name] = value
        return output, updates

    return run


def commit(layout: Layout, passed: Passed, updates: Variables, structure: RebuiltGraph | None) -> Commit:
    """The writes that bring a run's `updates` into the module's own objects and into the `passed` variables."""
    ours = (STRUCTURE, ARGUMENTS, CONVERTED)
    changed = [name for name in updates if name not in ours and name not in layout.random]
    moved: list[Assignment] = []
    if ARGUMENTS in updates:
        moved = [assignment(passed[int(i)], value) for i, value in updates[ARGUMENTS].items()]
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
    """The variables of all NNX objects in a pytree of arguments, in order."""
    variables: list[nnx.Variable[Any]] = []
    for leaf in jax.tree_util.tree_leaves(tree, is_leaf=lambda part: isinstance(part, (nnx.Pytree, nnx.Variable))):
        if isinstance(leaf, nnx.Variable):
            variables.append(leaf)
        elif isinstance(leaf, nnx.Pytree):
            variables += _variables_of(leaf)
    return tuple(variables)


def _variables_of(module: object) -> list[nnx.Variable[Any]]:
    """The Variables of a module's graph, in graph order."""
    return [part for _, part in walk(module) if isinstance(part, nnx.Variable)]


def reseed(module: object, keys: Mapping[str, Any]) -> None:
    """Does what `nnx.reseed(module, policy='match_shape', **keys)` does, on key data alone.

    The n-th stream of a tag, in graph order, gets `fold_in(keys[tag], n)`, split to the shape that the stream has.
    """
    parts = dict(walk(module))
    for path, (tag, number) in _places(parts).items():
        if tag in keys:
            stream = parts[path]
            shape, key = raw(stream.key).shape, jax.random.fold_in(keys[tag], np.uint32(number))
            key = jax.random.split(key, shape) if shape else key
            set_raw(stream.key, key)
            set_raw(stream.count, jax.numpy.zeros(key.shape, dtype=jax.numpy.uint32))


def _is_converted(held: PyTree, traced: PyTree) -> bool:
    """Whether a value got another dtype by becoming a program input: Python numbers and 64-bit arrays do."""
    leaves_held, leaves_traced = jax.tree_util.tree_leaves(held), jax.tree_util.tree_leaves(traced)
    return any(getattr(old, "dtype", None) != new.dtype for old, new in zip(leaves_held, leaves_traced, strict=True))


def _pop(module: nnx.Module, wanted: Callable[[object], bool]) -> Updates:
    """Removes the parts for which `wanted` is true from the graph; returns type → values nested by path."""
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
"""Metadata keys of Variables during a run: its path; that `sow` created it in this run."""
_MAY_LOSE = "capture_noop" in inspect.signature(nnx.Module.sow).parameters
"""Whether this version has a flag under which `sow` does nothing outside `nnx.capture`."""
HANDED: Path = ("(rngs of the call)",)
"""The path with which streams of the session's `rngs` argument are marked."""


def mark(module: object, trace: object, handed: bool = False) -> None:
    """Stores its path in the metadata of every Variable of a graph, so that copies made by transforms carry it, too.

    Args:
      trace: an object unique to this trace. Metadata is static data, so that functions jitted inside the model are
        traced again instead of being found in JAX's cache, where their streams would go unseen.
      handed: the graph is the session's `rngs` argument.
    """
    for path, part in walk(module):
        if isinstance(part, nnx.Variable):
            where = HANDED if handed else path
            object.__setattr__(part, "_var_metadata", {**part._var_metadata, MARK: (where, trace)})


def path_of(variable: nnx.Variable[Any]) -> Path | None:
    """The path with which a variable was marked; None for one that the user passed or that the model created."""
    path, _ = variable._var_metadata.get(MARK, (None, None))
    return path  # type: ignore[no-any-return]


def was_sown(part: object) -> bool:
    """Whether `sow` created a variable in this run."""
    return isinstance(part, nnx.Variable) and SOWED in getattr(part, "_var_metadata", ())


def unmark(module: nnx.Module) -> None:
    """Removes the marks from all variables of a graph."""
    for variable in _variables_of(module):
        if MARK in getattr(variable, "_var_metadata", ()):  # hijax Variables have no such attribute
            metadata = {name: value for name, value in variable._var_metadata.items() if name != MARK}
            object.__setattr__(variable, "_var_metadata", metadata)


class Watcher:
    """Fills a CallTrace during one run of `module`, a copy whose variables are marked.

    Args:
      handed: the session's `rngs` argument, None if it adds none.

    Attributes:
      missing: the stream that a look-up did not find, None if there was none.
      drawing: shape and rate of the mask of the dropout that is running.
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
        """During the block, calls of NNX's methods on this thread fill the record."""
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
        """Replaces `RngStream.__call__`: records the use of the stream."""
        self._consumed(stream)
        return draw(stream)

    def _look_up(self, look_up: Function, rngs: object, name: str, error: Callable[[str], Exception]) -> PyTree:
        """Replaces `Rngs._get_stream`: records a stream that the call's `rngs` lack as missing."""
        if self._lacks(rngs, name):
            # NNX would fall back on a `default` stream if there is one; here every stream has a key of its own.
            self.missing = name
            raise error(f"No RngStream named '{name}' found in Rngs.")
        try:
            return look_up(rngs, name, error)
        except (AttributeError, KeyError):
            # Python's own protocols look up private names, such as `__deepcopy__`.
            if self.handed is not None and not name.startswith("_"):
                self.missing = name
            raise

    def _sow(
        self, sow: Function, module: nnx.Module, variable_type: object, name: str, *args: PyTree, **kwargs: PyTree
    ) -> PyTree:
        """Replaces `nnx.Module.sow`: marks a variable that it creates."""
        is_new = not hasattr(module, name)
        if _MAY_LOSE:  # a run returns sown values, as `nnx.capture` does, so the flag must not drop them
            args, kwargs = args[:3], {**kwargs, "capture_noop": False}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", r"Using 'Module\.sow\(\)' outside", DeprecationWarning)
            result = sow(module, variable_type, name, *args, **kwargs)
        variable = vars(module).get(name)
        if is_new and isinstance(variable, nnx.Variable):
            object.__setattr__(variable, "_var_metadata", {**variable._var_metadata, SOWED: True})
        return result

    def _dropout(self, dropout: Function, module: nnx.Dropout, /, *args: PyTree, **kwargs: PyTree) -> PyTree:
        """Replaces `Dropout.__call__`: records the layer, and the mask for the keys taken meanwhile."""
        if module.rate != 0.0:
            self._layer(module, "dropout", kwargs)
        self.drawing = mask_of(module, args, kwargs)
        try:
            return dropout(module, *args, **kwargs)
        finally:
            self.drawing = None

    def _norm(self, norm: Function, module: nnx.Module, /, *args: PyTree, **kwargs: PyTree) -> PyTree:
        """Replaces `BatchNorm.__call__`: records the layer."""
        self._layer(module, "norm", kwargs)
        return norm(module, *args, **kwargs)

    def _noted(self, name: str, method: Function, module: nnx.Module, /, *args: PyTree, **kwargs: PyTree) -> PyTree:
        """Replaces a public method of a module: records its call for a summary."""
        calls, path, call = self.record.calls, self._path(module), functools.partial(method, module)
        if calls is None or path is None:
            return call(*args, **kwargs)
        return calls.note(call, args, kwargs, path=tuple(map(str, path)), cls=type(module).__name__, method=name)

    def _lacks(self, rngs: object, name: str) -> bool:
        """Whether `rngs` is the session's argument or a transform's copy of it, and has no stream called `name`."""
        if self.handed is None or name.startswith("_") or name in vars(rngs):
            return False
        streams = [part for part in vars(rngs).values() if isinstance(part, nnx.RngStream)]
        return rngs is self.handed or any(path_of(stream.key) == HANDED for stream in streams)

    def _consumed(self, stream: nnx.RngStream) -> None:
        """Records which module took a key of `stream`, and of what the key is made."""
        path = path_of(stream.key)
        if path is not None:
            consumer = self._caller() if path == HANDED else self._module_at(path[:-1])
            tag, where = str(stream.key.tag), tuple(map(str, consumer))
            self.record.asked.setdefault(tag, []).append(where)
            # `reseed` folds the stream's number among those of its tag into the draw's key, and each use its count:
            # equal (place, count) give equal keys.
            place: tuple[object, ...] = (tag,) if path == HANDED else self.places.get(path[:-1], path)
            inside = not self._own(stream, path)
            self.record.takes.append(KeyUse(tag, where, (place, self.drawn[place]), self.drawing, inside))
            self.drawn[place] += 1

    def _own(self, stream: nnx.RngStream, path: Path) -> bool:
        """Whether a stream is the very object of the model or the call, and no copy that a transform made."""
        if path == HANDED:
            return any(part is stream for part in vars(self.handed).values())
        return self.parts.get(path[:-1]) is stream

    def _module_at(self, path: Path) -> Path:
        """The path of the innermost module around a part: the owner of a stream."""
        while path and not isinstance(self.parts.get(path), nnx.Module):
            path = path[:-1]
        return path

    def _caller(self) -> Path:
        """The path of the innermost module whose method is running: the consumer of a stream from the call's `rngs`."""
        # A method has its module as `self`, a function that is passed one usually as `module`.
        for frame, _ in traceback.walk_stack(sys._getframe(2)):
            module = frame.f_locals.get("self", frame.f_locals.get("module"))
            path = self._path(module) if isinstance(module, nnx.Module) else None
            if path is not None:
                return path
        return ()

    def _path(self, module: object) -> Path | None:
        """The path of a module of the copy, or of a transform's copy of it; None for any other object."""
        if id(module) in self.paths and self.parts[self.paths[id(module)]] is module:
            return self.paths[id(module)]
        for part in vars(module).values():  # a transform's copy of a module: its variables still carry their paths
            variable = getattr(part, "key", None) if isinstance(part, nnx.RngStream) else part
            path = path_of(variable) if isinstance(variable, nnx.Variable) else None
            if path is not None:
                return self._module_at(path[:-1])
        return None

    def _layer(self, module: nnx.Module, kind: str, arguments: Kwargs) -> None:
        """Records a dropout or normalization layer with the modules around it."""
        path = self._path(module)
        path = self._caller() if path is None else path
        around = (self.parts.get(path[:n]) for n in reversed(range(len(path))))
        modules = [part for part in around if isinstance(part, nnx.Module)]
        self.record.passed(kind, tuple(map(str, path)), module, modules, arguments)


def _places(parts: Mapping[Path, object]) -> dict[Path, tuple[str, int]]:
    """Path of each stream in a graph → (its tag, its number from 0 among the streams of that tag, in graph order)."""
    places: dict[Path, tuple[str, int]] = {}
    numbers: Counter[str] = Counter()
    for path, part in parts.items():
        if isinstance(part, nnx.RngStream):
            tag = str(part.key.tag)
            places[path] = (tag, numbers[tag])
            numbers[tag] += 1
    return places


def _public(cls: type) -> list[str]:
    """`__call__` and the public methods of a module class, without those that `nnx.Module` defines."""
    names = [name for name, _ in inspect.getmembers(cls, inspect.isfunction)]
    return [name for name in names if name == "__call__" or not (name.startswith("_") or hasattr(nnx.Module, name))]
