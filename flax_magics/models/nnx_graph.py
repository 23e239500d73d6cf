"""The graph of an NNX module: its parts and paths, its train/eval switches, and writing a run's changes back."""

from __future__ import annotations

import dataclasses
import inspect
import operator
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from flax import configurations, nnx
from flax.nnx import variablelib
from msgspec import Struct

from ..base.threads import Assignment
from ..base.types import Leaf, PyTree
from ..errors import FlaxMagicsError
from .calls import Path, is_traced
from .switch import WHEN_TRAINING, cloned, read_fields, set_fields, setting_of, value_of

SIMPLE = (bool, int, float, complex, str, bytes)
_ARRAYS = (jax.Array, np.ndarray)
Parts = tuple[tuple[Any, Any], ...]
"""(attribute name, key or index; value) of everything that a node holds."""

RAW = "raw_value" if "raw_value" in nnx.Variable.__slots__ else "_raw_value"
"""The slot of `nnx.Variable` with its value; versions of Flax name it differently."""
_HIJAX: Any = getattr(configurations, "flax_hijax_variable", None)
"""Flax's flag for hijax Variables, which keep their values elsewhere; None in versions without it."""
# Newer versions also have a tree mode, which a user may make the default; it refuses models that share modules.
GRAPH: dict[str, Any] = {"graph": True} if "graph" in inspect.signature(nnx.split).parameters else {}
_PRIVATE = ("_pytree__state", "_pytree__nodes")
"""NNX's own bookkeeping attributes: the trace that made an object, and which of its attributes hold data."""


def raw(variable: object) -> PyTree:
    """The value that a Variable holds, without calling its `on_get_value` hooks.

    Raises:
      FlaxMagicsError: it is a hijax Variable, which has no such slot.
    """
    try:
        return object.__getattribute__(variable, RAW)
    except AttributeError:
        raise FlaxMagicsError(
            "the module holds Variables of hijax, and flax_magics does not run these yet.",
            hint="they come of flax_hijax_variable, nnx.var_defaults or hijax=True: build the module again without",
            write="import flax; flax.config.update('flax_hijax_variable', False)" if _HIJAX.value else None,
        ) from None


def set_raw(variable: nnx.Variable[Any], value: object) -> None:
    """Sets a Variable's value without calling its `on_set_value` hooks, as `nnx.update` does."""
    object.__setattr__(variable, RAW, value)


def assignment(variable: nnx.Variable[Any], value: object) -> Assignment:
    """`set_raw(variable, value)` as an Assignment for `at_once`."""
    return (object.__setattr__, variable, RAW, value)


def is_ref(value: object) -> bool:
    """Whether a value is a JAX array reference (a mutable array), which programs change in place."""
    return variablelib.is_array_ref(value)


def walk(module: object) -> Iterator[tuple[Path, Any]]:
    """(path, part) of the graph, each object once: modules, variables, containers and static values."""
    return nnx.iter_graph(module, **GRAPH)  # type: ignore[return-value]


def flat_state(state: object) -> list[tuple[Path, Any]]:
    """(path, variable or bare array) of an `nnx.State`, in its order."""
    return list(nnx.to_flat_state(state))  # type: ignore[arg-type]


def parts_of(node: object) -> Parts | None:
    """Names and values of what a module, dict or list holds; None for anything else, which is no mutable node."""
    if isinstance(node, nnx.Pytree):
        return tuple((name, value) for name, value in vars(node).items() if name not in _PRIVATE)
    if isinstance(node, dict):
        return tuple(node.items())
    return tuple(enumerate(node)) if isinstance(node, list) else None


def is_sown(part: object) -> bool:
    """Whether a part is a sown intermediate value, which a run returns and never stores."""
    # A Perturbation is an Intermediate by class, but the model keeps it: gradients are taken with respect to it.
    return isinstance(part, nnx.Intermediate) and not isinstance(part, nnx.Perturbation)


def is_fixed(leaf: object) -> bool:
    """Whether a leaf of the graph is static, such as a function in place of a layer, and not an array or variable."""
    return not isinstance(leaf, (nnx.Variable, bool)) and not is_traced(leaf)


def spell(path: Path) -> str:
    """A path as text: `('layers', 0, 'kernel')` → `layers/0/kernel`."""
    return "/".join(map(str, path))


def same(old: PyTree, new: PyTree) -> bool:
    """Whether two pytrees hold the identical array objects: an unmodified value, even if it was reassigned."""
    if old is new:
        return True
    flat: list[tuple[list[Leaf], PyTree]] = [jax.tree_util.tree_flatten(value) for value in (old, new)]
    return bool(flat[0][1] == flat[1][1]) and all(map(operator.is_, flat[0][0], flat[1][0]))


def other_parts(path: Path, node: object, held: Parts) -> list[Path]:
    """The paths of what a node holds otherwise than before (`held`). Another array in place of an array is no other part."""
    parts, before = dict(parts_of(node) or ()), dict(held)
    names = [name for name in {**before, **parts} if name not in parts or name not in before]
    names += [name for name in before if name in parts and _is_another(parts[name], before[name])]
    return [(*path, name) for name in names]


def _is_another(value: object, old: object) -> bool:
    """Whether `value` is another part than `old`; an array in place of an array is not."""
    if value is old or (isinstance(value, _ARRAYS) and isinstance(old, _ARRAYS)):
        return False
    if type(value) is not type(old) or isinstance(value, (nnx.Pytree, nnx.Variable, list, dict)):
        return True
    try:
        return not bool(value == old)
    except Exception:  # a user's `__eq__` may raise, or compare arrays
        return True


def taken_from(
    module: nnx.Module, before: Mapping[Path, object], others: list[Path]
) -> tuple[RebuiltGraph, list[PyTree]]:
    """The graph of a run's copy whose structure the run changed, and the values of its variables.

    Args:
      module: the copy, after the run.
      before: the copy's parts by path, as they were before the run.
      others: the paths of what it holds otherwise.
    """
    old_paths = {id(part): path for path, part in before.items() if isinstance(part, (nnx.Pytree, nnx.Variable))}
    parts = {path: part for path, part in walk(module) if isinstance(part, (nnx.Pytree, nnx.Variable))}
    matches = {path: old_paths[id(part)] for path, part in parts.items() if id(part) in old_paths}
    new = [part for part in parts.values() if id(part) not in old_paths]
    added = [type(part).__name__ for part in new if isinstance(part, nnx.Variable)]
    graphdef, state = nnx.split(module, **GRAPH)
    leaves = flat_state(state)
    fixed = tuple((path, leaf) for path, leaf in leaves if is_fixed(leaf))
    data = [(path, leaf) for path, leaf in leaves if not is_fixed(leaf)]
    skeleton = tuple((path, jax.tree_util.tree_structure(leaf)) for path, leaf in data)
    values = [raw(leaf) if isinstance(leaf, nnx.Variable) else leaf for _, leaf in data]
    names = tuple(".".join(map(str, path)) for path in others)
    return RebuiltGraph(graphdef, skeleton, fixed, matches, tuple(dict.fromkeys(added)), names), values


class RebuiltGraph(Struct):
    """The graph after a run that set, removed or replaced attributes, without the values of its variables."""

    graphdef: nnx.GraphDef[Any]
    skeleton: tuple[tuple[Path, PyTree], ...]
    """Path and treedef of each variable."""
    fixed: tuple[tuple[Path, Leaf], ...]
    """Path and value of each static leaf."""
    matches: Mapping[Path, Path]
    """Path after the run → path before it, of every part that existed before."""
    added: tuple[str, ...]
    """Types of variables that the run created."""
    others: tuple[str, ...]
    """What the run set, removed or replaced: `drop.deterministic`."""

    def put_into(self, module: nnx.Module, values: list[PyTree]) -> None:
        """Gives the objects of `module` the attributes of the run's copy; `values` are in the order of `skeleton`."""
        flat = [
            (path, jax.tree_util.tree_unflatten(structure, jax.tree_util.tree_leaves(value)))
            for (path, structure), value in zip(self.skeleton, values, strict=True)
        ]
        copy = nnx.merge(self.graphdef, nnx.from_flat_state([*flat, *self.fixed]))
        originals, copies = dict(walk(module)), dict(walk(copy))
        pairs = [(path, old) for path, old in self.matches.items() if path in copies and old in originals]
        transplant({id(copies[path]): originals[old] for path, old in pairs}, copies.values())


def transplant(originals: Mapping[int, Any], copies: Iterable[object]) -> None:
    """Gives each original the attributes of its copy; `originals` maps the id of a copy to its original.

    A part of a copy that is itself the copy of an original becomes that original; new parts are taken over as they are.
    """
    # All writes are prepared before the first is made, so that an error leaves every original as it was.
    writes: list[Callable[[], None]] = []

    def swap(value: PyTree) -> PyTree:
        if id(value) in originals:
            return originals[id(value)]
        if type(value) in (list, tuple):
            return type(value)(map(swap, value))
        if type(value) is dict:
            return {key: swap(item) for key, item in value.items()}
        return value

    def write_to(target: Any, copy: Any) -> Callable[[], None]:
        if isinstance(target, nnx.Variable):
            metadata = dict(copy._var_metadata)
            # Runs work on arrays in place of references, and the copy's metadata says so.
            if is_ref(raw(target)) and "ref" in metadata:
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

    for copy in copies:
        target = originals.get(id(copy))
        if isinstance(target, (nnx.Variable, nnx.Pytree)):
            writes.append(write_to(target, copy))
        elif target is None and isinstance(copy, nnx.Pytree):
            writes.append(write_to(copy, copy))
    for write in writes:
        write()


_MISSING = object()

Nodes = Iterable[tuple[Path, Any]]
"""(path, node) of the modules and containers of a graph."""

_FLAX_SWITCHES = ("deterministic", "use_running_average")
"""The switches that NNX's `train()` and `eval()` set without being told their names."""


def mode_by_hand(module: str, nodes: Nodes, train: bool) -> tuple[str, ...]:
    """Statements of plain Flax that set every switch of a graph; `module` is the expression for it.

    Switches of modules are set by `net.train(is_training=True)`, with the user's own as arguments. Switches in config
    dataclasses, which `train()` does not reach, by `net.config = dataclasses.replace(net.config, training=True)`.
    """
    of_modules: dict[str, bool] = {}
    out: dict[str, None] = {}
    for node, name, new, _ in _switches(nodes, train):
        if isinstance(new, bool):
            of_modules[name] = new
            continue
        path = next(path for path, other in nodes if other is node)
        steps = (f".{step}" if isinstance(step, str) and step.isidentifier() else f"[{step!r}]" for step in path)
        where = f"{module}{''.join(steps)}.{name}"
        settings = map(setting_of, set_fields(new, train, frozenset())[1])
        out[f"{where} = {cloned(where, new, settings)}"] = None
    arguments = ", ".join(f"{name}={value}" for name, value in of_modules.items() if name not in _FLAX_SWITCHES)
    call = [f"{module}.{'train' if train else 'eval'}({arguments})"] if of_modules else []
    return (*call, *out)


def back_by_hand(module: str, nodes: Nodes, train: bool) -> tuple[str, ...] | None:
    """Statements that restore the present switches after a run in mode `train`.

    Empty where they already are as in that mode, None where they are mixed, so that no mode restores them.
    """
    as_they_stand = [(id(node), name, value) for node, name, value, _ in _switches(nodes, None)]
    for other in (train, not train):
        if as_they_stand == [(id(node), name, value) for node, name, value, _ in _switches(nodes, other)]:
            return () if other is train else mode_by_hand(module, nodes, other)
    return None


def switches_read(nodes: Nodes, train: bool | None) -> tuple[str, ...]:
    """The switches of a graph with their values in mode `train` (None: present values), such as `training=True`.

    A switch of several modules is listed once, as `deterministic=False in 3 modules`.
    """
    counts = Counter(setting for _, _, _, setting in _switches(nodes, train))
    return tuple(setting if n == 1 else f"{setting} in {n} modules" for setting, n in sorted(counts.items()))


def set_mode(module: nnx.Module, train: bool | None) -> Callable[[], None]:
    """Sets every switch of `module`, and returns a function that undoes it.

    Undoing leaves switches alone that the model has set itself since.
    """
    if train is None:
        return lambda: None
    changes = []
    for node, name, new, _ in list(_switches(walk(module), train)):
        changes.append((node, name, vars(node).get(name, _MISSING), new))
        vars(node)[name] = new

    def undo() -> None:
        for node, name, old, new in reversed(changes):
            if vars(node).get(name, _MISSING) is new and old is _MISSING:
                del vars(node)[name]
            elif vars(node).get(name, _MISSING) is new:
                vars(node)[name] = old

    return undo


def _switches(nodes: Nodes, train: bool | None) -> Iterator[tuple[Any, str, Any, str]]:
    """(module, attribute to set, its value, text such as `training=True`) of every switch in the graph.

    A switch is an attribute of a module or its class, or a field of a config dataclass that the module holds; for a
    field the attribute is the config, and the value a copy of it.
    """
    for _, node in nodes:
        if not isinstance(node, nnx.Pytree):
            continue
        for name, value in parts_of(node) or ():
            if name in WHEN_TRAINING or isinstance(value, nnx.Pytree) or not dataclasses.is_dataclass(value):
                continue
            new, settings = (value, read_fields(value)) if train is None else set_fields(value, train, frozenset())
            for setting in settings:
                yield node, name, new, setting.rpartition(".")[2]
        for name in WHEN_TRAINING:
            if name not in vars(node) and not isinstance(getattr(type(node), name, None), bool):
                continue
            value = getattr(node, name, _MISSING)
            if value is None or isinstance(value, bool):
                value = value if train is None else value_of(name, train)
                if value is not None:
                    yield node, name, value, f"{name}={value}"
