"""A program evaluated equation by equation with every value kept, and the search for where a bad value comes from.

The search goes backwards from a value that is not finite, through equations that were given one, to the first that was
given none: that one has made it. An infinity which comes to nothing on the way (a mask of an attention) lies on no such
path. Jitted functions, custom derivatives and `jax.checkpoint` are gone through as if they were written out; loops are
entered at their first step that gives a bad value.
"""

from __future__ import annotations

import itertools
from collections.abc import Generator, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr
from msgspec import Struct

from ..base.digest import is_key
from ..base.types import Leaf
from ..compile.jaxpr import Atom, Equation
from ..compile.trace import CALLS, scan_groups
from ..models.calls import marks_of

STEPS = 10_000
"""The most steps of a loop that are gone through."""
_NUMBERS = itertools.count()


class Level:
    """One jaxpr with the values of its variables.

    Args:
      arguments: the values of its inputs.
      outer: for an input, the level and the atom outside that give its value; those without are where a search ends.
      marks: those of the calls around it, see `marks_of`.
      step: the step of the loop that it is, such as `step 3`; empty outside of loops.
      around: the equation that calls it, with that one's level; None for the outermost.
    """

    def __init__(
        self,
        closed: ClosedJaxpr,
        arguments: Sequence[Leaf],
        *,
        outer: Mapping[Atom, tuple[Level, Atom]] | None = None,
        marks: tuple[int, ...] = (),
        step: str = "",
        around: tuple[Level, Equation] | None = None,
    ) -> None:
        self.jaxpr, self.outer, self.marks, self.step = closed.jaxpr, outer or {}, marks, step
        self.around = around
        self.number = next(_NUMBERS)
        """Its own for ever: a step of a loop is forgotten before the next one is there, which may take its `id`."""
        self.values: dict[Atom, Leaf] = dict(zip(self.jaxpr.constvars, closed.consts, strict=True))
        self.values.update(zip(self.jaxpr.invars, arguments, strict=True))
        self.makers: dict[Atom, tuple[Equation, int]] = {}
        self.inner: dict[int, Level] = {}
        """id of an equation that calls a jaxpr → that one's level."""
        for equation in self.jaxpr.eqns:
            self.values.update(zip(equation.outvars, self._evaluate(equation), strict=True))
            self.makers.update((var, (equation, n)) for n, var in enumerate(equation.outvars))

    def read(self, atom: Atom) -> Leaf:
        """The value of a variable or literal."""
        return np.asarray(atom.val, atom.aval.dtype) if hasattr(atom, "val") else self.values[atom]

    def marks_at(self, equation: Equation) -> tuple[int, ...]:
        """The marks of the module calls around an equation, outermost first."""
        return (*self.marks, *marks_of(equation))

    def _evaluate(self, equation: Equation) -> list[Leaf]:
        arguments = [self.read(atom) for atom in equation.invars]
        closed = called_by(equation)
        if closed is None or len(closed.jaxpr.invars) != len(arguments):
            return bind(equation, arguments)
        outer = {var: (self, atom) for var, atom in zip(closed.jaxpr.invars, equation.invars, strict=True)}
        marks, around = self.marks_at(equation), (self, equation)
        level = Level(closed, arguments, outer=outer, marks=marks, step=self.step, around=around)
        self.inner[id(equation)] = level
        return level.results

    @property
    def results(self) -> list[Leaf]:
        """The values of the outputs."""
        return [self.read(atom) for atom in self.jaxpr.outvars]

    def equations(self) -> Iterator[tuple[Level, Equation]]:
        """All equations with their levels, those of called jaxprs included, those of loops not."""
        for equation in self.jaxpr.eqns:
            yield self, equation
            if id(equation) in self.inner:
                yield from self.inner[id(equation)].equations()


def called_by(equation: Equation) -> ClosedJaxpr | None:
    """The jaxpr that an equation runs once on its own inputs; None for any other equation."""
    if equation.primitive.name not in (*CALLS, "custom_vjp_call_jaxpr", "custom_lin"):
        return None
    params = equation.params
    found = next((params[name] for name in ("jaxpr", "call_jaxpr", "fun_jaxpr") if name in params), None)
    return found if found is None or hasattr(found, "consts") else ClosedJaxpr(found, [])


def bind(equation: Equation, arguments: Sequence[Leaf]) -> list[Leaf]:
    """The outputs of an equation that calls nothing."""
    results: Any = equation.primitive.bind(*arguments, **equation.params)
    return list(results) if equation.primitive.multiple_results else [results]


def is_bad(value: Leaf) -> bool:
    """Whether an array holds NaN or an infinity."""
    if is_key(value) or not jax.numpy.issubdtype(value.dtype, jax.numpy.inexact):
        return False
    return not bool(np.isfinite(np.asarray(value)).all())


def has_nan(value: Leaf) -> bool:
    """Whether a floating array holds NaN."""
    array = np.asarray(value)
    return bool((array != array).any())


class Culprit(Struct, frozen=True):
    """The equation that made a bad value, with its level; for a value that came in, the input in place of it."""

    level: Level
    equation: Equation | None
    atom: Atom


def culprit_of(level: Level, atom: Atom) -> Culprit | None:
    """What has made the bad value of `atom`; None where it came of nothing but constants that are infinite."""
    seen: set[tuple[int, int]] = set()
    """Numbers of levels and ids of their atoms."""
    # A stack of its own: Python's is too small for a model of some hundred equations in a row.
    searches, culprit = [_search(level, atom, seen)], None
    while searches:
        try:
            place = searches[-1].send(culprit)
        except StopIteration as ended:
            searches.pop()
            culprit = ended.value
        else:
            searches.append(_search(*place, seen))
            culprit = None
    return culprit


Search: TypeAlias = Generator[tuple[Level, Atom], Culprit | None, Culprit | None]
"""Yields places that have to be searched first, is sent what was found behind each, and returns what it has found."""


def _search(level: Level, atom: Atom, seen: set[tuple[int, int]]) -> Search:
    """`culprit_of`; `seen` are places that were searched and gave nothing."""
    while True:
        place = (level.number, id(atom))
        if hasattr(atom, "val") or place in seen:
            return None
        seen.add(place)
        if atom not in level.makers:
            if atom in level.outer:
                level, atom = level.outer[atom]
                continue
            # Infinities may be given on purpose, as in a mask; NaN never is.
            return Culprit(level, None, atom) if not level.step and has_nan(level.read(atom)) else None
        equation, n = level.makers[atom]
        if id(equation) not in level.inner:
            return (yield from _through(level, equation, atom))
        level = level.inner[id(equation)]
        atom = level.jaxpr.outvars[n]


def _through(level: Level, equation: Equation, atom: Atom) -> Search:
    """The culprit behind an equation that gave a bad value: beyond one of its bad inputs, or itself."""
    bad = [each for each in equation.invars if is_bad(level.read(each))]
    nans = [each for each in bad if has_nan(level.read(each))]
    for each in (*nans, *(one for one in bad if one not in nans)):
        culprit = yield level, each
        if culprit is not None:
            return culprit
    entered = equation.primitive.name in ("scan", "while", "cond")
    if entered:
        # One step at a time: all its values are kept while it is looked at.
        for step in _steps(level, equation):
            outputs = step.jaxpr.outvars
            # Each step hands on its carry to the next; what it gives besides concerns nobody but the output itself.
            of_this = [outputs[equation.outvars.index(atom)], *outputs[: _carried(equation)]]
            values = [step.read(one) for one in of_this]
            for has in (has_nan, is_bad):
                for one in (one for one, value in zip(of_this, values, strict=True) if is_bad(value) and has(value)):
                    culprit = yield step, one
                    if culprit is not None:
                        return culprit
    # Of infinities that nobody has made it makes NaN: −inf − −inf, where a mask hides everything. What was entered in vain
    # has infinities that are constants inside, as a mask that JAX has moved out of a loop.
    makes = (not bad and not entered) or (has_nan(level.read(atom)) and not nans)
    return Culprit(level, equation, atom) if makes else None


def _carried(equation: Equation) -> int:
    """How many outputs of a loop are what its steps hand on; of a cond none."""
    name, outputs = equation.primitive.name, len(equation.outvars)
    return scan_groups(equation.params)[1] if name == "scan" else outputs if name == "while" else 0


def _steps(level: Level, equation: Equation) -> Iterator[Level]:
    """The steps of a loop in order, up to the first that gives a bad value; the branch that a cond takes."""
    params, name = equation.params, equation.primitive.name
    arguments = [level.read(atom) for atom in equation.invars]
    marks, around = level.marks_at(equation), (level, equation)
    if name == "cond":
        branch = params["branches"][int(arguments[0])]
        outer = {var: (level, atom) for var, atom in zip(branch.jaxpr.invars, equation.invars[1:], strict=True)}
        yield Level(branch, arguments[1:], outer=outer, marks=marks, step=level.step, around=around)
        return
    if name == "while":
        first, consts = params["cond_nconsts"], params["body_nconsts"]
        constants, body, carry = arguments[first : first + consts], params["body_jaxpr"], arguments[first + consts :]
        for n in range(STEPS):
            if not bool(Level(params["cond_jaxpr"], [*arguments[:first], *carry]).results[0]):
                return
            step = Level(body, [*constants, *carry], outer={}, marks=marks, step=f"step {n}", around=around)
            yield step
            carry = step.results
        return
    consts, carries = scan_groups(params)
    body = params["jaxpr"]
    constants, carry, scanned = arguments[:consts], arguments[consts : consts + carries], arguments[consts + carries :]
    order = range(params["length"])
    for n in list(reversed(order) if params["reverse"] else order)[:STEPS]:
        step = Level(
            body, [*constants, *carry, *(each[n] for each in scanned)], marks=marks, step=f"step {n}", around=around
        )
        yield step
        carry = step.results[:carries]
