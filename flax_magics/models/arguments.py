"""The arguments of a call, taken apart: leaves that a program is given when it runs, and values that it is made for.

And what takes them: signatures of methods and constructors.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np

from ..code.library import nnx_modules
from ..line.expression import positional_names


@dataclass(frozen=True)
class Arguments:
    """Arguments and keyword arguments as leaves.

    Arrays and Python numbers are traced; bools, strings, callables and whatever else is no array are static.
    `parameters` are those that the arguments are given to. `forced` names int leaves that are static because the model
    needs their value.
    """

    treedef: Any
    parameters: tuple[str, ...]
    names: tuple[str, ...]
    leaves: tuple[Any, ...]
    traced: tuple[bool, ...]
    forced: frozenset[str]

    @classmethod
    def of(
        cls, args: tuple[Any, ...], kwargs: dict[str, Any], signature: inspect.Signature, forced: frozenset[str]
    ) -> Arguments:
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
    def _rows(self) -> Iterator[tuple[str, Any, bool]]:
        return zip(self.names, self.leaves, self.traced, strict=True)

    def with_static(self, names: Collection[str]) -> Arguments:
        """The same with the values of `names` as part of the program."""
        traced = tuple(traced and name not in names for name, traced in zip(self.names, self.traced, strict=True))
        return replace(self, traced=traced, forced=self.forced.union(names))

    @property
    def dynamic(self) -> dict[str, Any]:
        """The traced leaves by name: JAX's messages then say `arguments['n']`."""
        return {name: leaf for name, leaf, traced in self._rows if traced}

    @property
    def static(self) -> tuple[tuple[str, Any], ...]:
        """Names and values of the static leaves, in order."""
        return tuple((name, leaf) for name, leaf, traced in self._rows if not traced)

    def leaf(self, name: str) -> Any:
        """The leaf of that name, None where there is none."""
        return dict(zip(self.names, self.leaves, strict=True)).get(name)

    @property
    def numbers(self) -> tuple[str, ...]:
        """Names of the traced leaves that are Python ints."""
        return tuple(name for name, leaf, traced in self._rows if traced and type(leaf) is int)

    def rebuild(self, dynamic: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """`(args, kwargs)` with other traced leaves in the places of these."""
        leaves = [dynamic[name] if traced else leaf for name, leaf, traced in self._rows]
        args, kwargs = jax.tree_util.tree_unflatten(self.treedef, leaves)
        return args, kwargs


def is_traced(leaf: object) -> bool:
    """Whether a leaf is data (an array or a number), as opposed to a choice that the program is made for."""
    if isinstance(leaf, (jax.Array, np.ndarray, np.generic)):
        return isinstance(leaf, jax.Array) or leaf.dtype.kind not in "OUSMm"
    return isinstance(leaf, (int, float, complex)) and not isinstance(leaf, bool)


def has_tracer(*trees: Any) -> bool:
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


def readable_signature(function: Callable[..., Any]) -> inspect.Signature:
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
    parameters = list(signature.parameters.values())
    return signature if signature is TAKES_ANYTHING else signature.replace(parameters=parameters[1:])


def is_nnx_class(cls: object) -> bool:
    """Whether `cls` is a class of NNX modules."""
    return isinstance(cls, type) and issubclass(cls, nnx_modules())
