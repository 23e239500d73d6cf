"""Calls: their arguments taken apart, what takes them, and the calls of a model's modules noted while it is traced."""

from __future__ import annotations

import inspect
import itertools
import re
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import jax
import numpy as np
from msgspec import Struct
from msgspec.structs import replace

from ..base.digest import describe
from ..base.types import Leaf, PyTree
from ..code.library import nnx_modules
from ..line.expression import positional_names

Names: TypeAlias = tuple[str, ...]
Path: TypeAlias = tuple[str, ...]
Args: TypeAlias = tuple[PyTree, ...]
Kwargs: TypeAlias = dict[str, PyTree]
Function: TypeAlias = Callable[..., PyTree]


class Arguments(Struct, frozen=True):
    """Arguments and keyword arguments as leaves: those that a program is given when it runs, and those it is made for.

    Arrays and Python numbers are traced; bools, strings, callables and whatever else is no array are static.
    `parameters` are those that the arguments are given to. `forced` names int leaves that are static because the model
    needs their value.
    """

    treedef: PyTree
    parameters: tuple[str, ...]
    names: tuple[str, ...]
    leaves: tuple[Leaf, ...]
    traced: tuple[bool, ...]
    forced: frozenset[str]

    @classmethod
    def of(cls, args: Args, kwargs: Kwargs, signature: inspect.Signature, forced: frozenset[str]) -> Arguments:
        """Takes `(args, kwargs)` apart; leaves are named after the parameters that they are given to."""
        paths, treedef = jax.tree_util.tree_flatten_with_path((args, kwargs))
        positional = positional_names(signature, len(args))
        names = tuple(
            (positional[argument.idx] if which.idx == 0 else argument.key) + jax.tree_util.keystr(tuple(inside))
            for (which, argument, *inside), _ in paths
        )
        leaves = tuple(leaf for _, leaf in paths)
        traced = tuple(is_traced(leaf) and name not in forced for name, leaf in zip(names, leaves, strict=True))
        return cls(treedef, (*positional, *sorted(kwargs)), names, leaves, traced, forced)

    @property
    def rows(self) -> Iterator[tuple[str, Leaf, bool]]:
        """Name of each leaf, the leaf, and whether it is traced."""
        return zip(self.names, self.leaves, self.traced, strict=True)

    def with_static(self, names: Collection[str]) -> Arguments:
        """The same with the values of `names` as part of the program."""
        traced = tuple(traced and name not in names for name, _, traced in self.rows)
        return replace(self, traced=traced, forced=self.forced.union(names))

    @property
    def dynamic(self) -> Kwargs:
        """The traced leaves by name: JAX's messages then say `arguments['n']`."""
        return {name: leaf for name, leaf, traced in self.rows if traced}

    @property
    def static(self) -> tuple[tuple[str, Leaf], ...]:
        """Names and values of the static leaves, in order."""
        return tuple((name, leaf) for name, leaf, traced in self.rows if not traced)

    def leaf(self, name: str) -> Leaf:
        """The leaf of that name, None where there is none."""
        return dict(zip(self.names, self.leaves, strict=True)).get(name)

    @property
    def numbers(self) -> tuple[str, ...]:
        """Names of the traced leaves that are Python ints."""
        return tuple(name for name, leaf, traced in self.rows if traced and type(leaf) is int)

    def rebuild(self, dynamic: Mapping[str, Leaf]) -> tuple[Args, Kwargs]:
        """`(args, kwargs)` with other traced leaves in the places of these."""
        leaves = [dynamic[name] if traced else leaf for name, leaf, traced in self.rows]
        args, kwargs = jax.tree_util.tree_unflatten(self.treedef, leaves)
        return args, kwargs


def is_traced(leaf: object) -> bool:
    """Whether a leaf is data (an array or a number), as opposed to a choice that the program is made for."""
    if isinstance(leaf, (jax.Array, np.ndarray, np.generic)):
        return isinstance(leaf, jax.Array) or leaf.dtype.kind not in "OUSMm"
    return isinstance(leaf, (int, float, complex)) and not isinstance(leaf, bool)


def has_tracer(*trees: PyTree) -> bool:
    """Whether JAX is tracing with a leaf of the trees."""
    return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree_util.tree_leaves(trees))


def signature_of(leaf: object) -> tuple[Any, ...]:
    """What a compiled program is specialised on, of one traced leaf: shape, dtype, weak type, and where it is if that
    was chosen.
    """
    if isinstance(leaf, jax.Array):
        committed = getattr(leaf, "committed", None)
        if committed is None:
            committed = getattr(leaf, "_committed", False)
        # A key array has no weak type.
        return leaf.shape, leaf.dtype, getattr(leaf, "weak_type", False), leaf.sharding if committed else None
    if isinstance(leaf, (np.ndarray, np.generic)):
        return leaf.shape, leaf.dtype, False, None
    if isinstance(leaf, jax.ShapeDtypeStruct):  # an array that is yet to be computed
        return leaf.shape, leaf.dtype, leaf.weak_type, None
    return (), type(leaf), True, None


TAKES_ANYTHING = inspect.signature(lambda *args, **kwargs: None)


def readable_signature(function: Function) -> inspect.Signature:
    """The signature of `function`, `TAKES_ANYTHING` where Python cannot read one."""
    try:
        return inspect.signature(function)
    except (TypeError, ValueError):
        return TAKES_ANYTHING


def constructor(cls: Any) -> inspect.Signature:
    """The signature of a class's construction, as `readable_signature` gives it.

    NNX's metaclass takes anything and hands it to `__init__`, so that is where to look.
    """
    if not is_nnx_class(cls):
        return readable_signature(cls)
    signature = readable_signature(cls.__init__)
    return signature if signature is TAKES_ANYTHING else without_self(signature)


def without_self(signature: inspect.Signature) -> inspect.Signature:
    """A signature without its first parameter."""
    return signature.replace(parameters=list(signature.parameters.values())[1:])


def is_nnx_class(cls: object) -> bool:
    """Whether `cls` is a class of NNX modules."""
    return isinstance(cls, type) and issubclass(cls, nnx_modules())


LONGEST = 400
"""Characters of what is told of a call's inputs or outputs."""

_numbers = itertools.count(1)
_MARK = re.compile(r"flax_magics_call_(\d+)\b")


class Called(Struct, frozen=True):
    """One call: the module's path and class, the method, its inputs and outputs as `dtype[shape]`."""

    path: Path
    cls: str
    method: str
    inputs: str
    outputs: str
    mark: int
    """The number in the name scope of its equations; never used again in this process."""
    inside: bool
    """It was made by another method of the same module."""


@dataclass
class Calls:
    """The calls of one trace, in the order in which they began.

    Each runs under a name scope of its own, so that the equations that it traced can be told from all others.
    """

    made: dict[int, Called] = field(default_factory=dict)
    _running: list[Path] = field(default_factory=list)

    def note(self, call: Function, args: Args, kwargs: Kwargs, *, path: Path, cls: str, method: str) -> PyTree:
        """Makes the call, and gives what it gives."""
        mark = next(_numbers)
        inputs = ", ".join([*map(_spell, args), *(f"{name}={_spell(value)}" for name, value in kwargs.items())])
        self.made[mark] = Called(path, cls, method, inputs, "", mark, path in self._running)
        self._running.append(path)
        try:
            with jax.named_scope(f"flax_magics_call_{mark}"):
                output = call(*args, **kwargs)
        finally:
            self._running.pop()
        self.made[mark] = replace(self.made[mark], outputs=_spell(output))
        return output


def _spell(value: object) -> str:
    nnx = sys.modules.get("flax.nnx")  # without it nothing can be one of its objects
    whole = nnx is not None and isinstance(value, nnx.Pytree)
    return f"{type(value).__name__}(…)" if whole else describe(value, LONGEST)


def marks_of(equation: Any) -> list[int]:
    """The marks of the calls, outermost first, that an equation of a jaxpr was traced in."""
    return [int(mark) for mark in _MARK.findall(str(equation.source_info.name_stack))]
