"""FLOPs of a traced program and of each of its modules, from XLA's cost analysis. Nothing is compiled, nothing runs.

The equations of a module's calls are told by their marks, cut out of the program, and lowered by themselves. What
computes the same is lowered once, so that fifty equal blocks cost no more than one.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun

from ..models.calls import Path, marks_of

_OWN = re.compile(r"0x[0-9a-f]+|\b\d+(?=:u32\[\])")
"""What parts two pieces that cost the same: addresses of functions, and the numbers that Flax folds into keys."""

LOOPS = ("scan", "while")


@dataclass(frozen=True)
class Flops:
    """As XLA counts them, None where the backend does not say."""

    forward: int | None
    both: int | None = None
    """Of the forward and the backward pass together; None too where nobody asked."""


@dataclass(frozen=True)
class ModuleEquations:
    """Equations of one jaxpr that belong together."""

    jaxpr: Any
    equations: list[Any]
    back: frozenset[Any]
    """Inputs of the jaxpr that count as handed back as they are: linen's `apply` does that with what it may write."""


@dataclass
class Costs:
    """Counts pieces; those of the same text once."""

    backward: bool
    _known: dict[str, Flops] = field(default_factory=dict)
    _uses: dict[int, tuple[Any, dict[Any, int]]] = field(default_factory=dict)

    def count(self, pieces: list[ModuleEquations]) -> Flops:
        """The sum over `pieces`."""
        counts = [self._count(piece) for piece in pieces]
        forward, both = [count.forward for count in counts], [count.both for count in counts]
        return Flops(_sum(forward), _sum(both) if self.backward else None)

    def _count(self, piece: ModuleEquations) -> Flops:
        closed = _closed(piece, self._uses_in(piece.jaxpr))
        text = _OWN.sub("", str(closed.jaxpr))
        if text not in self._known:
            function = jaxpr_as_fun(closed)
            shapes = [jax.ShapeDtypeStruct(var.aval.shape, var.aval.dtype) for var in closed.jaxpr.invars]
            both = _flops(_pulled_back(function), shapes) if self.backward else None
            self._known[text] = Flops(_flops(function, shapes), both)
        return self._known[text]

    def _uses_in(self, jaxpr: Any) -> dict[Any, int]:
        """How often each variable of a jaxpr is read. The jaxpr is kept beside it, so that its id stays its own."""
        if id(jaxpr) not in self._uses:
            uses: dict[Any, int] = {}
            for var in [*(var for equation in jaxpr.eqns for var in equation.invars), *jaxpr.outvars]:
                if not hasattr(var, "val"):
                    uses[var] = uses.get(var, 0) + 1
            self._uses[id(jaxpr)] = (jaxpr, uses)
        return self._uses[id(jaxpr)][1]


def _sum(counts: list[int | None]) -> int | None:
    known = [count for count in counts if count is not None]
    return sum(known) if len(known) == len(counts) else None


def _flops(function: Callable[..., Any], shapes: list[Any]) -> int | None:
    cost: Any = jax.jit(function).lower(*shapes).cost_analysis()
    return None if cost is None else int(cost.get("flops", 0))


def _pulled_back(function: Callable[..., Any]) -> Callable[..., Any]:
    """The vjp with respect to all floating inputs, its cotangents the outputs themselves."""

    def both(*values: Any) -> Any:
        outputs, pull = jax.vjp(function, *values)
        return pull([_cotangent(output) for output in outputs])

    return both


def _cotangent(output: Any) -> Any:
    if jax.numpy.issubdtype(output.dtype, jax.numpy.inexact):
        return output
    return np.zeros(output.shape, jax.dtypes.float0)


def _closed(piece: ModuleEquations, uses: Mapping[Any, int]) -> Any:
    """The equations of a piece as a program: of all that they read, giving what the rest reads of them."""
    made: dict[Any, None] = {}
    read: dict[Any, None] = {}
    inside: dict[Any, int] = {}
    for equation in piece.equations:
        for var in equation.invars:
            if not hasattr(var, "val"):  # a literal has its value
                inside[var] = inside.get(var, 0) + 1
                if var not in made:
                    read[var] = None
        made.update(dict.fromkeys(equation.outvars))
    given = [var for var in made if uses.get(var, 0) > inside.get(var, 0)]
    given += [var for var in read if var in piece.back]
    jaxpr = piece.jaxpr.replace(
        constvars=[],
        invars=list(read),
        outvars=given,
        eqns=piece.equations,
        debug_info=piece.jaxpr.debug_info.with_unknown_names(),
    )
    return ClosedJaxpr(jaxpr, [])


def pieces(jaxpr: Any, paths: Mapping[int, Path], back: frozenset[Any]) -> dict[Path | None, list[ModuleEquations]]:
    """The pieces of each module, by path; of all modules together under None.

    Args:
      jaxpr: the whole program.
      paths: mark → path of the module that was called.
      back: inputs of the program; see `Piece`.
    """
    found: dict[Path | None, list[ModuleEquations]] = {}
    _collect(jaxpr, paths, back, frozenset(), found)
    return found


def _collect(
    jaxpr: Any,
    paths: Mapping[int, Path],
    back: frozenset[Any],
    around: frozenset[Path | None],
    found: dict[Path | None, list[ModuleEquations]],
) -> None:
    here: dict[Path | None, ModuleEquations] = {}
    for equation in jaxpr.eqns:
        marks = [mark for mark in marks_of(equation) if mark in paths]
        owners: dict[Path | None, None] = {paths[mark]: None for mark in marks}
        if marks:
            owners[None] = None
        for path in owners:
            if path not in around:
                here.setdefault(path, ModuleEquations(jaxpr, [], back)).equations.append(equation)
        for inner in _inner(equation):
            same = len(inner.invars) == len(equation.invars)
            pairs = zip(inner.invars, equation.invars, strict=True) if same else ()
            below = frozenset(mine for mine, outer in pairs if not hasattr(outer, "val") and outer in back)
            _collect(inner, paths, below, around | set(owners), found)
    for path, piece in here.items():
        found.setdefault(path, []).append(piece)


def marks_in(jaxpr: Any) -> Counter[int]:
    """Mark of a call → how many equations were traced in it, at any depth."""
    found: Counter[int] = Counter()
    for equation in jaxpr.eqns:
        found.update(marks_of(equation))
        for inner in _inner(equation):
            found.update(marks_in(inner))
    return found


def _inner(equation: Any) -> Iterator[Any]:
    """The jaxprs in an equation's parameters."""
    for value in equation.params.values():
        for part in value if isinstance(value, (tuple, list)) else (value,):
            if hasattr(part, "eqns"):
                yield getattr(part, "jaxpr", part)


def loops(jaxpr: Any) -> bool:
    """Whether the program has a loop, of which XLA counts one turn."""
    return any(
        equation.primitive.name in LOOPS or any(loops(inner) for inner in _inner(equation)) for equation in jaxpr.eqns
    )
