"""An identity of jaxprs, by which a traced program that was lowered before is recognized without lowering it again.

Lowering takes about as long as tracing. Jaxprs with equal identities have the same equations, over the same types, with
the same parameters and constants, and so lower to the same program. Only known kinds of plain values take part: a
program with effects, or with a function or another unknown object in a parameter (a host callback, additions of a later
JAX), has no identity and is lowered and compared by its text.
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
"""A `jax.extend.core.JaxprEqn`; `Any`, because JAX's annotations lack the attributes of its variables."""
Atom: TypeAlias = Any
"""An input of an equation: a variable, or a literal, which has a `val`."""

_PLAIN = (type(None), bool, int, float, complex, str, bytes)
_VALUES = {
    *("ShapedArray", "KeyTy", "ManualAxisType", "PRNGImpl", "PyTreeDef", "UnspecifiedValue", "XlaMetadata"),
    *("AbstractMesh", "GSPMDSharding", "Mesh", "MemorySpace", "NamedSharding", "PartitionSpec", "SingleDeviceSharding"),
    *("DotAlgorithm", "Format", "FTTuple", "Layout"),
}
"""Names of immutable JAX classes whose `==` compares all that matters for lowering."""
_OF_DERIVATIVES = {
    ("custom_jvp_call", "jvp_jaxpr_fun"),
    ("custom_vjp_call", "fwd_jaxpr_thunk"),
    ("custom_vjp_call", "bwd"),
}
"""Parameters that hold functions for differentiation, which lowering does not read."""
_EQUATION = {"invars", "outvars", "primitive", "params", "effects", "source_info", "ctx"}
"""The known slots of an equation. One that a later JAX adds may change the program: there is no identity then."""


class _Unknown(Exception):
    """Raised at a value of a kind whose equality is not known: the jaxpr has no identity."""


def identity(closed: ClosedJaxpr) -> Hashable | None:
    """A hashable identity of a closed jaxpr; None where it contains something that cannot be compared.

    Constants are hashed in full, and no user's array is kept alive.
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
    """Serializes equations: `words` are hashed; `values`, to which words refer by number, are compared by `==`."""

    def __init__(self) -> None:
        self.words: list[str] = []
        self.values: dict[tuple[type, object], int] = {}
        self._variables: dict[Atom, int] = {}
        self._once: dict[int, int] = {}

    def word(self, word: object) -> None:
        self.words.append(f"{word!r};")

    def seen(self, thing: object) -> bool:
        """Writes a number for this very object; returns whether it was written before."""
        is_known = id(thing) in self._once
        self.word(self._once.setdefault(id(thing), len(self._once)))
        return is_known

    def value(self, value: object) -> None:
        """Writes a value of a JAX class by its number in `values`, which become part of the identity."""
        try:
            number = self.values.setdefault((type(value), value), len(self.values))
        except TypeError:
            raise _Unknown(value) from None
        self.word(number)

    def closed(self, closed: Any) -> None:
        self.many(map(_bits_of, closed.consts))
        self.jaxpr(closed.jaxpr)

    def jaxpr(self, jaxpr: Jaxpr) -> None:
        """Writes a jaxpr; a repeated one, as of a jitted function that is called many times, only by its number."""
        if self.seen(jaxpr):
            return
        if getattr(jaxpr, "is_high", False):  # hijax types, which lowering rewrites first
            raise _Unknown(jaxpr)
        for variable in (*jaxpr.constvars, *jaxpr.invars):
            self.define(variable)
        for equation in jaxpr.eqns:
            self.equation(equation)
        for atom in jaxpr.outvars:
            self.atom(atom)
        self.word("end")

    def equation(self, equation: Equation) -> None:
        """Writes primitive, context, parameters, inputs and outputs of one equation."""
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
        """Numbers a variable where it is bound, and writes its type."""
        self._variables[variable] = len(self._variables)
        self.any(variable.aval)

    def atom(self, atom: Atom) -> None:
        """Writes an input: a literal by its value, a variable by its number."""
        if hasattr(atom, "val"):
            self.any(_bits_of(atom.val))
            self.any(atom.aval)
        else:
            self.word(self._variables[atom])

    def many(self, items: Iterable[object]) -> None:
        """Writes a sequence of any values between brackets."""
        self.word("(")
        for item in items:
            self.any(item)
        self.word(")")

    def named(self, items: Iterable[tuple[str, object]]) -> None:
        """Writes named values, sorted by name."""
        for key, item in sorted(items, key=lambda item: item[0]):
            self.word(key)
            self.any(item)
        self.word("named")

    def any(self, value: PyTree) -> None:
        """Writes a value of any known kind; raises `_Unknown` for others."""
        kind = type(value)
        if kind in _PLAIN:
            self.word(value)
        elif isinstance(value, (np.dtype, enum.Enum)) or (
            kind.__name__ in _VALUES and kind.__module__.startswith(("jax.", "jaxlib."))
        ):
            self.value(value)
        elif isinstance(value, (ClosedJaxpr, Jaxpr)):
            # Newer JAX has one class for both, so the attribute decides.
            self.closed(value) if hasattr(value, "consts") else self.jaxpr(value)
        elif isinstance(value, tuple) or kind is list:
            self.word(f"{kind.__module__}.{kind.__qualname__}")
            self.many(value)
        elif kind is frozenset:
            self.word("frozenset")
            self.many(sorted(value, key=repr))  # a set's own order differs between equal sets
        elif kind is dict and all(isinstance(key, str) for key in value):
            self.named(value.items())
        elif isinstance(value, (np.ndarray, np.generic)):
            self.any(_bits_of(value))
        else:
            raise _Unknown(value)


def _bits_of(value: Leaf) -> tuple[object, ...]:
    """A constant or literal as plain values: a digest of its bits, its type, and its sharding if it is committed."""
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
