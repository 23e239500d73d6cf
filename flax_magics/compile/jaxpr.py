"""What a traced program computes, as something to compare: where it was lowered before, it need not be again.

Lowering takes about as long as tracing. Two traces that have equal identities have the same equations, over the same
types, with the same parameters and constants, and so lower to the same program. Only what is known to be a plain value
takes part: a program with effects, or with a function or anything else of unknown kind in a parameter (a host callback,
whatever a later JAX adds), has no identity, and is lowered to see what it is.
"""

from __future__ import annotations

import enum
import hashlib
from collections.abc import Hashable, Iterable
from typing import Any, TypeAlias

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr

from ..base.digest import on_host
from ..base.types import Leaf, PyTree

Equation: TypeAlias = Any
"""A `jax.extend.core.JaxprEqn`: JAX's annotations do not say what the types of its variables have."""
Atom: TypeAlias = Any
"""A variable of a jaxpr; or a literal, which has a `val`."""

_PLAIN = (type(None), bool, int, float, complex, str, bytes)
_VALUES = {
    *("ShapedArray", "KeyTy", "ManualAxisType", "PRNGImpl", "PyTreeDef", "UnspecifiedValue", "XlaMetadata"),
    *("AbstractMesh", "GSPMDSharding", "Mesh", "MemorySpace", "NamedSharding", "PartitionSpec", "SingleDeviceSharding"),
    *("DotAlgorithm", "Format", "FTTuple", "Layout"),
}
"""Classes of JAX's whose instances are values: equal ones stand for the same."""
_OF_DERIVATIVES = {
    ("custom_jvp_call", "jvp_jaxpr_fun"),
    ("custom_vjp_call", "fwd_jaxpr_thunk"),
    ("custom_vjp_call", "bwd"),
}
"""Parameters that lowering does not read: by then there is nothing to differentiate."""
_EQUATION = {"invars", "outvars", "primitive", "params", "effects", "source_info", "ctx"}
"""What an equation is made of. Where one has more, it is not known what that means."""


class _Unknown(Exception):
    """Raised at a value of a kind for which nobody knows when two of them are the same."""


def identity(closed: ClosedJaxpr) -> Hashable | None:
    """What a closed jaxpr computes; None if that cannot be told from its equations.

    Constants are read in full. Nothing of the user's is held.
    """
    if closed.effects:
        return None
    writer = _Writer()
    try:
        writer.closed(closed)
    except _Unknown:
        return None
    return hashlib.sha256("".join(writer.words).encode()).hexdigest(), tuple(writer.values)


class _Writer:
    """Writes equations as words that are hashed, and as values that are compared by their own `==`."""

    def __init__(self) -> None:
        self.words: list[str] = []
        self.values: dict[tuple[type, object], int] = {}
        self._variables: dict[Atom, int] = {}
        self._once: dict[int, int] = {}

    def word(self, word: object) -> None:
        self.words.append(f"{word!r};")

    def seen(self, thing: object) -> bool:
        """Writes the number of this very object, a new one at the first time. Whether it was written before."""
        is_known = id(thing) in self._once
        self.word(self._once.setdefault(id(thing), len(self._once)))
        return is_known

    def value(self, value: object) -> None:
        """A value of JAX's own, which is kept and compared."""
        try:
            number = self.values.setdefault((type(value), value), len(self.values))
        except TypeError:
            raise _Unknown(value) from None
        self.word(number)

    def closed(self, closed: Any) -> None:
        self.many(map(_bits_of, closed.consts))
        self.jaxpr(closed.jaxpr)

    def jaxpr(self, jaxpr: Jaxpr) -> None:
        """The same jaxpr again, as of a function that is called many times, is written once."""
        if self.seen(jaxpr):
            return
        if getattr(jaxpr, "is_high", False):
            raise _Unknown(jaxpr)
        for variable in (*jaxpr.constvars, *jaxpr.invars):
            self.define(variable)
        for equation in jaxpr.eqns:
            self.equation(equation)
        for atom in jaxpr.outvars:
            self.atom(atom)
        self.word("end")

    def equation(self, equation: Equation) -> None:
        if set(type(equation).__slots__) - _EQUATION or equation.effects:
            raise _Unknown(equation)
        name = equation.primitive.name
        self.value(equation.primitive)
        if not self.seen(equation.ctx):
            names = getattr(type(equation.ctx), "__slots__", None) or vars(equation.ctx)
            self.named((name, getattr(equation.ctx, name, None)) for name in names if name != "__weakref__")
        self.named(item for item in equation.params.items() if (name, item[0]) not in _OF_DERIVATIVES)
        for atom in equation.invars:
            self.atom(atom)
        for variable in equation.outvars:
            self.define(variable)
        self.word(name)

    def define(self, variable: Atom) -> None:
        self._variables[variable] = len(self._variables)
        self.any(variable.aval)

    def atom(self, atom: Atom) -> None:
        if hasattr(atom, "val"):
            self.any(_bits_of(atom.val))
            self.any(atom.aval)
        else:
            self.word(self._variables[atom])

    def many(self, items: Iterable[object]) -> None:
        self.word("(")
        for item in items:
            self.any(item)
        self.word(")")

    def named(self, items: Iterable[tuple[str, object]]) -> None:
        for key, item in sorted(items, key=lambda item: item[0]):
            self.word(key)
            self.any(item)
        self.word("named")

    def any(self, value: PyTree) -> None:
        kind = type(value)
        if kind in _PLAIN:
            self.word(value)
        elif isinstance(value, (np.dtype, enum.Enum)) or (
            kind.__name__ in _VALUES and kind.__module__.startswith(("jax.", "jaxlib."))
        ):
            self.value(value)
        elif isinstance(value, (ClosedJaxpr, Jaxpr)):
            # On newer JAX the two are one.
            self.closed(value) if hasattr(value, "consts") else self.jaxpr(value)
        elif isinstance(value, tuple) or kind is list:
            self.word(f"{kind.__module__}.{kind.__qualname__}")
            self.many(value)
        elif kind is frozenset:
            self.word("frozenset")
            self.many(sorted(value, key=repr))
        elif kind is dict and all(isinstance(key, str) for key in value):
            self.named(value.items())
        elif isinstance(value, (np.ndarray, np.generic)):
            self.any(_bits_of(value))
        else:
            raise _Unknown(value)


def _bits_of(value: Leaf) -> tuple[object, ...]:
    """A constant or literal: its bits, its type, and where it is if it was put there."""
    if type(value) in _PLAIN:
        return ("literal", value)
    dtype = getattr(value, "dtype", None)
    if dtype is None:
        raise _Unknown(value)
    where = value.sharding if isinstance(value, jax.Array) and value.committed else None
    weak = bool(getattr(value, "weak_type", False))
    data = on_host(value)
    if data.dtype.hasobject:
        raise _Unknown(value)
    return "constant", dtype, data.shape, weak, where, hashlib.sha256(data.tobytes()).hexdigest()
