"""The switch between training and evaluation, under the names that Flax models use for it."""

from __future__ import annotations

import copy
import dataclasses
import inspect
from collections.abc import Iterable
from types import NoneType
from typing import Any

from ..errors import FlaxMagicsError

WHEN_TRAINING = {
    "train": True,
    "training": True,
    "is_training": True,
    "deterministic": False,
    "use_running_average": False,
}
"""Each name's value in training."""


def value_of(name: str, train: bool) -> bool:
    """What switch `name` has to be for training (or not)."""
    return WHEN_TRAINING[name] is train


def following(switch: str, own: str, method: str = "") -> str:
    """The edit that has a layer's switch follow its module's own: `deterministic=not self.training`.

    Args:
      own: the module's switch as its code writes it; where it has none, `method` takes one.
    """
    follows = own or "train"
    alike = WHEN_TRAINING[follows.rpartition(".")[2]] is WHEN_TRAINING[switch]
    edit = f"{switch}={'' if alike else 'not '}{follows}"
    return edit if own else f"def {method or '__call__'}(self, …, train):\n{edit}"


def call_switches(signature: inspect.Signature) -> tuple[str, ...]:
    """Names of the arguments that are switches."""
    return tuple(name for name in signature.parameters if name in WHEN_TRAINING)


def written_in_call(signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Switch arguments that the call itself gives, and their values. A call that does not fit gives none."""
    try:
        bound = signature.bind_partial(*args, **kwargs)
    except TypeError:
        return {}
    return {name: value for name, value in bound.arguments.items() if name in WHEN_TRAINING}


def check_agreement(train: bool, written: dict[str, Any]) -> None:
    """Raises FlaxMagicsError where an option contradicts an argument written in the call."""
    for name, value in written.items():
        if isinstance(value, bool) and value is not value_of(name, train):
            option = "--train" if train else "--eval"
            raise FlaxMagicsError(f"{option} contradicts {name}={value}, written in the call. Leave one of them out.")


def set_fields(value: Any, train: bool, fixed: frozenset[str]) -> tuple[Any, tuple[str, ...]]:
    """`value` (a dataclass: a linen module or a config) with its switches set, and what was set.

    Fields are found on the value itself, on dataclasses that it holds, however deep, and in tuples and lists of these
    (submodules given as fields). A switch that is None counts only if no other was found and the call has none: then
    nothing else can turn it.
    """
    setter = _Setter(train, fixed, bool)
    result = setter.visit(value, "")
    if not setter.done and not fixed:
        setter = _Setter(train, fixed, NoneType)
        result = setter.visit(value, "")
    return result, tuple(setter.done)


def set_unset_fields(value: Any, fixed: frozenset[str]) -> Any:
    """`value` with the switches that have no value in evaluation, if it has no other switch."""
    if fixed or read_fields(value):
        return value
    return _Setter(False, fixed, NoneType).visit(value, "")


def read_fields(value: Any) -> tuple[str, ...]:
    """The switches of `value` as they stand: `('training=False', 'config.deterministic=True')`."""
    setter = _Setter(None, frozenset(), bool)
    setter.visit(value, "")
    return tuple(setter.done)


def cloned(name: str, module: Any, settings: Iterable[tuple[str, Any]]) -> str:
    """`.clone(training=True)`, and what sets a switch on a config or a module that is a field; empty for no settings.

    Args:
      name: the expression that the module stands for.
      settings: path of a field and its value: `("config.deterministic", False)`.
    """
    items = _items(name, module, settings)
    return f".clone({', '.join(items)})" if items else ""


def _items(name: str, value: Any, settings: Iterable[tuple[str, Any]]) -> list[str]:
    """`config=dataclasses.replace(net.config, deterministic=False)` for each field of `value` that is set, or set within."""
    given: dict[str, list[tuple[str, Any]]] = {}
    for path, setting in settings:
        first, _, rest = path.partition(".")
        given.setdefault(first, []).append((rest, setting))
    items = []
    for first, inner in given.items():
        inside, held = f"{name}.{first}", getattr(value, first, None)
        if not inner[-1][0]:
            text = str(inner[-1][1])
        elif hasattr(held, "clone") and hasattr(held, "scope"):  # a linen module
            text = inside + cloned(inside, held, inner)
        else:
            text = f"dataclasses.replace({', '.join([inside, *_items(inside, held, inner)])})"
        items.append(f"{first}={text}")
    return items


class _Setter:
    """Walks a tree of dataclasses. A value that is shared stays shared: the same object is replaced by the same copy."""

    def __init__(self, train: bool | None, fixed: frozenset[str], kind: type) -> None:
        self.train = train
        self.fixed = fixed
        self.kind = kind
        self.done: list[str] = []
        self.memo: dict[int, Any] = {}

    def visit(self, value: Any, path: str) -> Any:
        if id(value) in self.memo:
            return self.memo[id(value)]
        result = self._visit(value, path)
        self.memo[id(value)] = result
        return result

    def _visit(self, value: Any, path: str) -> Any:
        if isinstance(value, (tuple, list)) and not hasattr(value, "_fields"):
            items = [self.visit(item, f"{path}[{i}]") for i, item in enumerate(value)]
            if all(new is old for new, old in zip(items, value, strict=True)):
                return value
            return type(value)(items)
        if not dataclasses.is_dataclass(value) or isinstance(value, type):
            return value
        changes: dict[str, Any] = {}
        for field in dataclasses.fields(value):
            if field.name in ("parent", "name"):
                continue
            old = getattr(value, field.name, None)
            where = f"{path}.{field.name}" if path else field.name
            if field.name in WHEN_TRAINING:
                new = self._switch(field.name, old, where, top=not path)
            else:
                new = self.visit(old, where)
            if new is not old:
                changes[field.name] = new
        return _replaced(value, changes) if changes else value

    def _switch(self, name: str, old: Any, where: str, *, top: bool) -> Any:
        if top and name in self.fixed:
            return old
        if not isinstance(old, self.kind):
            return old
        new = old if self.train is None else value_of(name, self.train)
        self.done.append(f"{where}={new}")
        return new


def _replaced(value: Any, changes: dict[str, Any]) -> Any:
    if hasattr(value, "clone") and hasattr(value, "scope"):  # a linen module: clone keeps name and parent right
        return value.clone(**changes)
    try:
        return dataclasses.replace(value, **changes)
    except (TypeError, ValueError):  # fields that `__init__` does not take
        new = copy.copy(value)
        for name, item in changes.items():
            object.__setattr__(new, name, item)
        return new
