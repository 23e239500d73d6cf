"""Small programs that JAX makes one by one where code runs op by op: an op, or a function that is jitted by itself.

An initialisation is made of few kinds of them, many times over. Each kind is compiled once, on threads beside each other,
instead of one after the other as they are met. What a unit computes is what JAX's own op-by-op execution compiles, so its
bits are the same.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax

from ..base.workers import Future, wait_for
from .compiler import Compiler, jax_settings, program_key

KEPT = 128
"""Units kept at most, the least recently used dropped first."""


@dataclass
class Units:
    """Units by what they are: compiled, or being compiled."""

    compiler: Compiler
    kept: OrderedDict[Hashable, Future] = field(default_factory=OrderedDict)

    def start(self, function: Callable[..., Any], what: Hashable, *arguments: Any) -> Future:
        """A future of the `Compiled` of `function` for such arguments (shapes will do).

        Args:
          what: tells the function from every other.
        """
        key = (what, tuple(map(_signature, arguments)), jax_settings(), jax.default_backend())
        future = self.kept.get(key)
        if future is None or (future.done() and future.exception() is not None):
            traced = jax.jit(function).trace(*arguments)
            lowered = traced.lower()
            future = self.kept[key] = self.compiler.start(lowered, program_key(traced, lowered))
            while len(self.kept) > KEPT:
                self.kept.popitem(last=False)
        self.kept.move_to_end(key)
        return future

    def of_equation(self, equation: Any) -> Future | None:
        """The unit of one equation of a jaxpr; its arguments are literals too. None for one that is run as JAX runs it."""
        what = _identity(equation)
        if what is None:
            return None
        bind = partial(equation.primitive.bind, **equation.params)

        def unit(*arguments: Any) -> Any:
            return bind(*arguments)

        unit.__name__ = str(equation.params.get("name", equation.primitive.name))
        shapes = [
            jax.ShapeDtypeStruct(aval.shape, aval.dtype, weak_type=getattr(aval, "weak_type", False))
            for aval in (atom.aval for atom in equation.invars)
        ]
        return self.start(unit, what, *shapes)


def run(future: Future, *arguments: Any) -> Any:
    """Calls a unit, once it is compiled."""
    return wait_for(future).executable(*arguments)


def _signature(argument: Any) -> Hashable:
    return argument.shape, argument.dtype, getattr(argument, "weak_type", False)


def _identity(equation: Any) -> Hashable | None:
    """What tells an equation from another, holding nothing of the user's; None where that cannot be told."""
    primitive = equation.primitive
    if primitive.name not in ("jit", "pjit", "random_fold_in") and not _plain(primitive):
        return None
    params = []
    for name, value in sorted(equation.params.items()):
        if name == "jaxpr":
            value = weakref.ref(value)
        params.append((name, value))
    identity = (primitive.name, tuple(params))
    try:
        hash(identity)
    except TypeError:
        return None
    return identity


def _plain(primitive: Any) -> bool:
    """Whether JAX runs it op by op by compiling it alone."""
    try:
        from jax._src.dispatch import apply_primitive
    except ImportError:
        return False
    return getattr(primitive.impl, "func", None) is apply_primitive
