"""The modules of a model: which there are, in order, and what each holds, consumes and costs.

FLOPs are those of XLA's cost analysis. Nothing is compiled, nothing runs: the equations of a module's calls are told by
their marks, cut out of the program, and lowered by themselves. What computes the same is lowered once, so that fifty equal
blocks cost no more than one.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Var, jaxpr_as_fun

from ..models.base import CallTrace, Model
from ..models.calls import Called, Calls, Path, marks_of

_OWN = re.compile(r"0x[0-9a-f]+|\b\d+(?=:u32\[\])")
"""What parts two pieces that cost the same: addresses of functions, and the numbers that Flax folds into keys."""


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
    of_collection: dict[str, Size] = {}
    for array in arrays:
        of_collection[array.collection] = of_collection.get(array.collection, Size()) + array.size
    return dict(sorted(of_collection.items(), key=lambda item: (item[0] not in ("params", "Param"), item[0])))


@dataclass(frozen=True)
class Flops:
    """As XLA counts them, None where the backend does not say."""

    forward: int | None
    both: int | None = None
    """Of the forward and the backward pass together; None too where nobody asked."""


@dataclass(frozen=True)
class TracedModules:
    """What the trace of a call tells of the modules in it.

    Attributes:
      called: path → the first call, and how many there are.
      streams: random stream → paths of the modules that consumed it.
      flops: path → what its calls cost; under None all modules together.
      nothing: the FLOPs of what computes nothing.
    """

    called: Mapping[Path, tuple[Called, int]] = field(default_factory=dict)
    streams: Mapping[str, list[Path]] = field(default_factory=dict)
    flops: Mapping[Path | None, Flops] = field(default_factory=dict)
    nothing: Flops = Flops(0)

    @classmethod
    def of(cls, record: CallTrace, program: Jaxpr, handed_back: frozenset[Var], *, backward: bool) -> TracedModules:
        """Reads them off a trace.

        Args:
          program: its jaxpr.
          handed_back: see `ModuleEquations`.
          backward: count the backward pass too.
        """
        calls, costs = record.calls or Calls(), _Costs(backward)
        pieces = _pieces(program, {mark: called.path for mark, called in calls.made.items()}, handed_back)
        flops = {path: costs.count(parts) for path, parts in pieces.items()}
        called = _called_in(calls, Counter(mark for each in equations(program) for mark in marks_of(each)))
        return cls(called, record.asked, flops, Flops(0, 0 if backward else None))


def _called_in(calls: Calls, traced: Mapping[int, int]) -> dict[Path, tuple[Called, int]]:
    """Path → the first call, and how many there are.

    Args:
      traced: mark of a call → how many equations of the program were traced in it. A transform may trace its body twice
        and throw one trace away, of which no more than a few constants stay.
    """
    of_path: dict[Path, list[Called]] = {}
    for called in calls.made.values():
        if not called.inside:
            of_path.setdefault(called.path, []).append(called)
    first_and_many = {}
    for path, several in of_path.items():
        most: dict[tuple[str, str], int] = {}
        for one in several:
            kind = (one.method, one.inputs)
            most[kind] = max(most.get(kind, 0), traced.get(one.mark, 0))
        calls_there = sum(0 < most[one.method, one.inputs] < 2 * traced.get(one.mark, 0) for one in several)
        first_and_many[path] = (several[0], max(calls_there, 1))
    return first_and_many


def modules_of(model: Model, variables: Mapping[str, Any], traced: TracedModules) -> tuple[Module, ...]:
    """The modules that were called or hold variables, each with what is its own."""
    called = traced.called
    classes = dict(model.module_classes())
    leaves = sorted(model.iter_variables(variables), key=lambda leaf: (leaf[0], leaf[1]))
    if not called and len(classes) <= 1:
        # Without a call: a module of no known class around every variable.
        around = (path[:n] for _, path, _, _ in leaves for n in range(1, len(path)))
        classes = {**dict.fromkeys(around, ""), **classes}
    known = {*called, *classes}
    paths = {(), *called, *(_owner(path, known) for _, path, _, _ in leaves)}
    arrays: dict[Path, list[Array]] = {}
    for collection, path, leaf, about in leaves:
        if hasattr(leaf, "shape") and hasattr(leaf, "dtype"):
            owner, shape = _owner(path, paths), tuple(leaf.shape)
            size = math.prod(shape) * leaf.dtype.itemsize
            name = "/".join(path[len(owner) :])
            arrays.setdefault(owner, []).append(Array(collection, name, str(leaf.dtype), shape, size, about))
    streams: dict[Path, dict[str, None]] = {}
    for stream, takers in traced.streams.items():
        for taker in takers:
            streams.setdefault(_owner(taker, paths), {})[stream] = None
    modules = []
    for path in _ordered(paths, list(called)):
        variables_here = tuple(arrays.get(path, ()))
        module = Module(path, classes.get(path, ""), arrays=variables_here, streams=tuple(streams.get(path, ())))
        if path in called:
            first, times = called[path]
            cost = traced.flops.get(path, traced.nothing)
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
        modules.append(module)
    return tuple(modules)


def _owner(path: Path, paths: set[Path]) -> Path:
    """The innermost of `paths` that `path` is in."""
    return next((path[:n] for n in range(len(path), 0, -1) if path[:n] in paths), ())


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


@dataclass(frozen=True)
class ModuleEquations:
    """Equations of one jaxpr that belong together.

    Attributes:
      back: inputs of the jaxpr that count as handed back as they are: linen's `apply` does that with what it may write.
    """

    jaxpr: Jaxpr
    equations: list[JaxprEqn]
    back: frozenset[Var]


def _pieces(jaxpr: Jaxpr, paths: Mapping[int, Path], back: frozenset[Var]) -> dict[Path | None, list[ModuleEquations]]:
    """The pieces of each module, by path; of all modules together under None.

    Args:
      jaxpr: the whole program.
      paths: mark → path of the module that was called.
      back: inputs of the program; see `ModuleEquations`.
    """
    pieces: dict[Path | None, list[ModuleEquations]] = {}

    def collect(jaxpr: Jaxpr, back: frozenset[Var], around: frozenset[Path | None]) -> None:
        here: dict[Path | None, ModuleEquations] = {}
        for equation in jaxpr.eqns:
            owners: dict[Path | None, None] = {paths[mark]: None for mark in marks_of(equation) if mark in paths}
            if owners:
                owners[None] = None
            for path in owners:
                if path not in around:
                    here.setdefault(path, ModuleEquations(jaxpr, [], back)).equations.append(equation)
            for inner in _inner(equation):
                same = len(inner.invars) == len(equation.invars)
                pairs = zip(inner.invars, equation.invars, strict=True) if same else ()
                below = frozenset(mine for mine, outer in pairs if not _is_literal(outer) and outer in back)
                collect(inner, below, around | set(owners))
        for path, piece in here.items():
            pieces.setdefault(path, []).append(piece)

    collect(jaxpr, back, frozenset())
    return pieces


def equations(jaxpr: Jaxpr) -> Iterator[JaxprEqn]:
    """The equations of a program, at any depth."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in _inner(equation):
            yield from equations(inner)


def _inner(equation: JaxprEqn) -> Iterator[Jaxpr]:
    """The jaxprs in an equation's parameters."""
    for value in equation.params.values():
        for part in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(part, (ClosedJaxpr, Jaxpr)):
                yield part.jaxpr if isinstance(part, ClosedJaxpr) else part


def _is_literal(var: Any) -> bool:
    return hasattr(var, "val")


@dataclass
class _Costs:
    """Counts pieces; those of the same text once."""

    backward: bool
    _known: dict[str, Flops] = field(default_factory=dict)
    _uses: dict[Jaxpr, Counter[Any]] = field(default_factory=dict)
    """Jaxpr → how often each of its variables is read."""

    def count(self, pieces: list[ModuleEquations]) -> Flops:
        """The sum over `pieces`."""
        counts = [self._count(piece) for piece in pieces]
        both = total([count.both for count in counts]) if self.backward else None
        return Flops(total([count.forward for count in counts]), both)

    def _count(self, piece: ModuleEquations) -> Flops:
        closed = self._closed(piece)
        text = _OWN.sub("", str(closed.jaxpr))
        if text not in self._known:
            function = jaxpr_as_fun(closed)
            shapes = [jax.ShapeDtypeStruct(var.aval.shape, var.aval.dtype) for var in closed.jaxpr.invars]
            both = _flops(_pulled_back(function), shapes) if self.backward else None
            self._known[text] = Flops(_flops(function, shapes), both)
        return self._known[text]

    def _closed(self, piece: ModuleEquations) -> ClosedJaxpr:
        """The equations of a piece as a program: of all that they read, giving what the rest reads of them."""
        jaxpr = piece.jaxpr
        if jaxpr not in self._uses:
            self._uses[jaxpr] = _reads([*(var for each in jaxpr.eqns for var in each.invars), *jaxpr.outvars])
        uses, inside = self._uses[jaxpr], _reads([var for each in piece.equations for var in each.invars])
        results = dict.fromkeys(var for each in piece.equations for var in each.outvars)
        read = [var for var in inside if var not in results]
        outputs = [var for var in results if uses[var] > inside[var]] + [var for var in read if var in piece.back]
        debug_info = jaxpr.debug_info.with_unknown_names()
        parts = {"constvars": [], "invars": read, "outvars": outputs, "eqns": piece.equations}
        return ClosedJaxpr(jaxpr.replace(**parts, debug_info=debug_info), [])


def _reads(variables: list[Any]) -> Counter[Any]:
    """How often each variable stands there; a literal has its value, and is none."""
    return Counter(var for var in variables if not _is_literal(var))


def total(counts: list[int | None]) -> int | None:
    """The sum, None where one of them is not known."""
    known = [count for count in counts if count is not None]
    return sum(known) if len(known) == len(counts) else None


def _flops(function: Callable[..., Any], shapes: list[Any]) -> int | None:
    cost: Any = jax.jit(function).lower(*shapes).cost_analysis()
    return None if cost is None else int(cost.get("flops", 0))


def _pulled_back(function: Callable[..., Any]) -> Callable[..., Any]:
    """The vjp with respect to all floating inputs, its cotangents the outputs themselves."""

    def cotangent(output: Any) -> Any:
        floating = jax.numpy.issubdtype(output.dtype, jax.numpy.inexact)
        return output if floating else np.zeros(output.shape, jax.dtypes.float0)

    def both(*values: Any) -> Any:
        outputs, pull = jax.vjp(function, *values)
        return pull([cotangent(output) for output in outputs])

    return both
