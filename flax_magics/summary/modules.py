"""The modules of a model: which there are, in order, and what each holds, consumes and costs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ..models.base import Model
from ..models.calls import Called, Calls, Path
from .flops import Flops


@dataclass(frozen=True)
class Size:
    """How much there is of a collection: elements of its arrays, and bytes."""

    elements: int = 0
    bytes: int = 0

    def __add__(self, other: Size) -> Size:
        return Size(self.elements + other.elements, self.bytes + other.bytes)


@dataclass(frozen=True)
class Array:
    """One variable: its name within the module, and what it is; `about` holds its metadata, such as partition names."""

    collection: str
    name: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int
    about: str = ""

    @property
    def size(self) -> Size:
        """Its elements and bytes."""
        return Size(math.prod(self.shape), self.bytes)


@dataclass(frozen=True)
class Module:
    """One module of a model.

    Attributes:
      path: where it is; `()` is the model itself.
      cls: its class; empty where that is known only in a call.
      method: what was called, in its first call.
      calls: how many calls there are; 0 for one that was not called.
      inputs, outputs: those of the first call, as `float32[3,4], train=True`.
      arrays: variables of its own, those of its submodules left out.
      streams: random streams that it consumed.
      flops: of all its calls, submodules included, as XLA counts them; None where that is not known.
      vjp_flops: of forward and backward pass together, with respect to variables and floating inputs, without what no
        gradient depends on; None unless asked.
    """

    path: Path
    cls: str
    method: str = ""
    calls: int = 0
    inputs: str = ""
    outputs: str = ""
    arrays: tuple[Array, ...] = ()
    streams: tuple[str, ...] = ()
    flops: int | None = None
    vjp_flops: int | None = None


def sizes(arrays: Iterable[Array]) -> dict[str, Size]:
    """Collection → how much there is of it; parameters first."""
    found: dict[str, Size] = {}
    for array in arrays:
        found[array.collection] = found.get(array.collection, Size()) + array.size
    return dict(sorted(found.items(), key=lambda item: (item[0] not in ("params", "Param"), item[0])))


def called_in(calls: Calls, made: Mapping[int, int]) -> dict[Path, tuple[Called, int]]:
    """Path → the first call, and how many there are.

    Args:
      made: mark of a call → how many equations of the program were traced in it. A transform may trace its body twice
        and throw one trace away, of which no more than a few constants stay.
    """
    found: dict[Path, list[Called]] = {}
    for called in calls.made.values():
        if not called.inside:
            found.setdefault(called.path, []).append(called)
    out = {}
    for path, several in found.items():
        most: dict[tuple[str, str], int] = {}
        for one in several:
            kind = (one.method, one.inputs)
            most[kind] = max(most.get(kind, 0), made.get(one.mark, 0))
        kept = sum(0 < most[one.method, one.inputs] < 2 * made.get(one.mark, 0) for one in several)
        out[path] = (several[0], max(kept, 1))
    return out


def modules_of(
    model: Model,
    variables: Mapping[str, Any],
    called: Mapping[Path, tuple[Called, int]],
    asked: Mapping[str, list[Path]],
    flops: Mapping[Path | None, Flops],
    backward: bool = False,
) -> tuple[Module, ...]:
    """The modules that were called or hold variables, each with what is its own."""
    classes = dict(model.module_classes())
    leaves = sorted(model.iter_variables(variables), key=lambda leaf: (leaf[0], leaf[1]))
    if not called:
        classes = _around(leaves, classes)
    paths = {(), *called}
    for _, path, _, _ in leaves:
        paths.add(_owner(path, {*called, *classes}))
    arrays: dict[Path, list[Array]] = {}
    for collection, path, leaf, about in leaves:
        owner = _owner(path, paths)
        if hasattr(leaf, "shape") and hasattr(leaf, "dtype"):
            shape = tuple(leaf.shape)
            size = math.prod(shape) * leaf.dtype.itemsize
            name = "/".join(path[len(owner) :])
            arrays.setdefault(owner, []).append(Array(collection, name, str(leaf.dtype), shape, size, about))
    streams: dict[Path, dict[str, None]] = {}
    for stream, takers in asked.items():
        for taker in takers:
            streams.setdefault(_owner(taker, paths), {})[stream] = None
    out = []
    nothing = Flops(0, 0 if backward else None)
    for path in _ordered(paths, list(called)):
        module = Module(
            path, classes.get(path, ""), arrays=tuple(arrays.get(path, ())), streams=tuple(streams.get(path, ()))
        )
        if path in called:
            first, times = called[path]
            cost = flops.get(path, nothing)
            module = replace(
                module,
                cls=first.cls,
                method=first.method,
                calls=times,
                inputs=first.inputs,
                outputs=first.outputs,
                flops=cost.forward,
                vjp_flops=cost.both,
            )
        out.append(module)
    return tuple(out)


def _around(leaves: Iterable[tuple[str, Path, Any, str]], classes: dict[Path, str]) -> dict[Path, str]:
    """Without a call: a module of no known class around every variable, unless the classes are known."""
    if len(classes) > 1:
        return classes
    return {**dict.fromkeys((path[:n] for _, path, _, _ in leaves for n in range(1, len(path))), ""), **classes}


def _owner(path: Path, paths: Iterable[Path]) -> Path:
    """The innermost of `paths` that `path` is in."""
    known = paths if isinstance(paths, (set, dict)) else set(paths)
    return next((path[:n] for n in range(len(path), 0, -1) if path[:n] in known), ())


def _ordered(paths: Iterable[Path], called: list[Path]) -> list[Path]:
    """Each path before those inside it, siblings in the order of their calls; what was not called comes last."""
    rank = {path: i for i, path in enumerate(called)}
    first: dict[Path, int] = {}
    for path in paths:
        for n in range(len(path) + 1):
            first[path[:n]] = min(first.get(path[:n], len(rank)), rank.get(path, len(rank)))
    return sorted(paths, key=lambda path: [(first[path[:n]], _natural(path[n - 1])) for n in range(1, len(path) + 1)])


def _natural(name: str) -> tuple[Any, ...]:
    """`layer_10` comes after `layer_9`."""
    stem = name.rstrip("0123456789")
    return (stem, int(name[len(stem) :] or 0))
