"""A call's arguments split into traced and static leaves, signatures, and the record of submodule calls in a trace."""

from __future__ import annotations

import inspect
import itertools
import re
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
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
    """`(args, kwargs)` of a call flattened to named leaves, each traced (an input) or static (in the program).

    Arrays and Python numbers are traced; bools, strings, callables and all other objects are static.

    Attributes:
      treedef: of `(args, kwargs)`.
      parameters: the parameter that receives each argument, positional ones first.
      names, leaves, traced: name, value and kind of each leaf; a name is a parameter with a path, such as `batch['x']`.
      forced: names of int leaves that are static because the model needs their value.
      placed: traced leaves by name that a mesh has copies of: programs take these, reports and replays what was passed.
    """

    treedef: PyTree
    parameters: tuple[str, ...]
    names: tuple[str, ...]
    leaves: tuple[Leaf, ...]
    traced: tuple[bool, ...]
    forced: frozenset[str]
    placed: Mapping[str, Leaf] = {}

    @classmethod
    def of(cls, args: Args, kwargs: Kwargs, signature: inspect.Signature, forced: frozenset[str]) -> Arguments:
        """Flattens `(args, kwargs)`; leaves are named after the parameters of `signature`."""
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
        """(name, leaf, whether it is traced) of each leaf."""
        return zip(self.names, self.leaves, self.traced, strict=True)

    def with_static(self, names: Collection[str]) -> Arguments:
        """A copy in which the leaves of `names` are static."""
        traced = tuple(traced and name not in names for name, _, traced in self.rows)
        return replace(self, traced=traced, forced=self.forced.union(names))

    @property
    def dynamic(self) -> Kwargs:
        """The traced leaves by name: JAX's messages then say `arguments['n']`."""
        return {name: self.placed.get(name, leaf) for name, leaf, traced in self.rows if traced}

    @property
    def static(self) -> tuple[tuple[str, Leaf], ...]:
        """Names and values of the static leaves, in order."""
        return tuple((name, leaf) for name, leaf, traced in self.rows if not traced)

    def leaf(self, name: str) -> Leaf:
        """The leaf called `name`, None where there is none."""
        return dict(zip(self.names, self.leaves, strict=True)).get(name)

    @property
    def numbers(self) -> tuple[str, ...]:
        """Names of the traced leaves that are Python ints."""
        return tuple(name for name, leaf, traced in self.rows if traced and type(leaf) is int)

    def rebuild(self, dynamic: Mapping[str, Leaf]) -> tuple[Args, Kwargs]:
        """`(args, kwargs)` with the traced leaves replaced by those of `dynamic`; static leaves stay."""
        leaves = [dynamic[name] if traced else leaf for name, leaf, traced in self.rows]
        args, kwargs = jax.tree_util.tree_unflatten(self.treedef, leaves)
        return args, kwargs


def is_traced(leaf: object) -> bool:
    """Whether a leaf is data that a program takes as input (an array or number) and not a choice it is compiled for."""
    if isinstance(leaf, (jax.Array, np.ndarray, np.generic)):
        return isinstance(leaf, jax.Array) or leaf.dtype.kind not in "OUSMm"
    return isinstance(leaf, (int, float, complex)) and not isinstance(leaf, bool)


def has_tracer(*trees: PyTree) -> bool:
    """Whether any leaf of the trees is a tracer, that is, the code runs inside a JAX transform."""
    return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree_util.tree_leaves(trees))


def signature_of(leaf: object) -> tuple[Any, ...]:
    """(shape, dtype, weak type, sharding) of a traced leaf: what a compiled program is specialized on.

    The sharding is None unless the user placed the array (it is committed).
    """
    if isinstance(leaf, jax.Array):
        # A key array has no weak type.
        return leaf.shape, leaf.dtype, getattr(leaf, "weak_type", False), leaf.sharding if leaf.committed else None
    if isinstance(leaf, (np.ndarray, np.generic)):
        return leaf.shape, leaf.dtype, False, None
    if isinstance(leaf, jax.ShapeDtypeStruct):  # a variable that an init is still computing
        return leaf.shape, leaf.dtype, leaf.weak_type, leaf.sharding
    return (), type(leaf), True, None  # a Python number: JAX gives it a weak type


TAKES_ANYTHING = inspect.signature(lambda *args, **kwargs: None)


def readable_signature(function: Function) -> inspect.Signature:
    """The signature of `function`; `TAKES_ANYTHING` where it has none that can be inspected (some builtins)."""
    try:
        return inspect.signature(function)
    except (TypeError, ValueError):
        return TAKES_ANYTHING


def constructor(cls: Any) -> inspect.Signature:
    """The signature with which a class is constructed, or `TAKES_ANYTHING`."""
    # For an NNX class `inspect.signature` finds its metaclass's `__call__(*args, **kwargs)`.
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
"""The most characters of the description of a call's inputs or outputs."""

_numbers = itertools.count(1)
_MARK = r"flax_magics_call_(\d+)\b"


class Called(Struct, frozen=True):
    """One call of a submodule in a trace: path, class and method, with inputs and outputs as `dtype[shape]` text."""

    path: Path
    cls: str
    method: str
    inputs: str
    outputs: str
    mark: int
    """The number in the name scope of its equations, unique in the process."""
    inside: bool
    """Another method of the same module made the call."""


class Calls(Struct):
    """The submodule calls of one trace, in the order in which they began.

    Each call is traced under a name scope of its own, by which its equations are recognized in the jaxpr.
    """

    made: dict[int, Called] = {}
    _running: list[Path] = []

    def note(self, call: Function, args: Args, kwargs: Kwargs, *, path: Path, cls: str, method: str) -> PyTree:
        """Makes the call `call(*args, **kwargs)`, records it, and returns its result."""
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
    """The marks of the calls, outermost first, during which an equation of a jaxpr was traced."""
    return [int(mark) for mark in re.findall(_MARK, str(equation.source_info.name_stack))]
