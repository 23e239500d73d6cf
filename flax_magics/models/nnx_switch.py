"""The switches of an NNX graph: read as they stand, set on the copy that runs, and set back."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from flax import nnx

from .nnx_graph import parts_of, walk
from .switch import WHEN_TRAINING, cloned, read_fields, set_fields, setting_of, value_of

_MISSING = object()


_FLAX = ("deterministic", "use_running_average")
"""The switches that `train()` and `eval()` set themselves."""


def mode_by_hand(module: str, nodes: Any, train: bool) -> tuple[str, ...]:
    """The statements that set every switch of a graph, where `module` is the expression that it stands for.

    `net.train(is_training=True)` for those of modules, with the user's own as arguments, and
    `net.config = dataclasses.replace(net.config, training=True)` for those of configs, which it does not reach.
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
    own = ", ".join(f"{name}={value}" for name, value in of_modules.items() if name not in _FLAX)
    first = [f"{module}.{'train' if train else 'eval'}({own})"] if of_modules else []
    return (*first, *out)


def back_by_hand(module: str, nodes: Any, train: bool) -> tuple[str, ...] | None:
    """The statements that set the switches back to how they stand; None where one mode does not describe them."""
    as_they_stand = [(id(node), name, value) for node, name, value, _ in _switches(nodes, None)]
    for other in (train, not train):
        if as_they_stand == [(id(node), name, value) for node, name, value, _ in _switches(nodes, other)]:
            return () if other is train else mode_by_hand(module, nodes, other)
    return None


def switches_read(nodes: Any, train: bool | None) -> tuple[str, ...]:
    """How the switches of a graph's `nodes` read in a mode; as they stand for None. Each with how many modules have it."""
    found = Counter(setting for _, _, _, setting in _switches(nodes, train))
    return tuple(setting if n == 1 else f"{setting} in {n} modules" for setting, n in sorted(found.items()))


def set_mode(module: Any, train: bool | None) -> Callable[[], None]:
    """Sets every switch of `module`; gives what sets them back, where the model has not set them itself since."""
    if train is None:
        return lambda: None
    done = []
    nodes = [(path, node) for path, node in walk(module)]
    for node, name, new, _ in list(_switches(nodes, train)):
        done.append((node, name, vars(node).get(name, _MISSING), new))
        vars(node)[name] = new

    def undo() -> None:
        for node, name, old, new in reversed(done):
            if vars(node).get(name, _MISSING) is not new:
                continue
            if old is _MISSING:
                del vars(node)[name]
            else:
                vars(node)[name] = old

    return undo


def _switches(nodes: Any, train: bool | None) -> Iterator[tuple[Any, str, Any, str]]:
    """Every switch of the graph: the module that has it, the attribute to set and its value, and how that reads.

    A switch is an attribute of the module, of its class, or a field of a config dataclass that it holds.
    """
    for _, node in nodes:
        if not isinstance(node, nnx.Pytree):
            continue
        for name, value in parts_of(node) or ():
            if name in WHEN_TRAINING or isinstance(value, nnx.Pytree) or not dataclasses.is_dataclass(value):
                continue
            if train is None:
                for setting in read_fields(value):
                    yield node, name, value, setting.rpartition(".")[2]
            else:
                new, done = set_fields(value, train, frozenset())
                for setting in done:
                    yield node, name, new, setting.rpartition(".")[2]
        for name in WHEN_TRAINING:
            value = (
                getattr(node, name, _MISSING) if name in vars(node) or name in _class_names(type(node)) else _MISSING
            )
            if value is None or isinstance(value, bool):
                new = value if train is None else value_of(name, train)
                if new is not None:
                    yield node, name, new, f"{name}={new}"


def _class_names(cls: type) -> set[str]:
    return {name for name in WHEN_TRAINING if isinstance(getattr(cls, name, None), bool)}
