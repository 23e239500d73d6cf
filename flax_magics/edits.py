"""What an edit of a model changed: its variables' shapes, and whether initialising would give other values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax

from . import ahead
from .frozen import altered
from .models import Model, Path
from .tracedinit import TracedInit, is_array, trace_init


@dataclass(frozen=True)
class Initialised:
    """How a model's variables were made: enough to ask what a later version of the model would make of it.

    `args` and `kwargs` hold shapes in place of arrays. `traced` is the initialisation as a program, None where it cannot be
    traced.
    """

    key: Any
    method: Path
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    traced: TracedInit | None

    @property
    def shapes(self) -> Any:
        """The variables, shapes in place of arrays; None where they cannot be told."""
        return None if self.traced is None else self.traced.shapes

    @property
    def program(self) -> str | None:
        """A digest of what the variables depend on, forward pass left out; None where that cannot be told."""
        return None if self.traced is None else self.traced.digest


def initialised(model: Model, key: Any, method: Path, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Initialised:
    """Traces the initialisation by shapes; nothing is computed. `args`/`kwargs` may hold arrays or shapes."""
    traced: TracedInit | None
    try:
        traced = trace_init(model, key, method, args, kwargs)
    except jax.errors.JAXTypeError:  # initialisation looks at values
        traced = None
    return record(traced, key, method, args, kwargs)


def shapes_of_init(model: Model, key: Any, method: Path, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The variables that an init would make, as shapes. Nothing is computed; an init that looks at values raises."""
    return trace_init(model, key, method, args, kwargs).shapes


def record(
    traced: TracedInit | None, key: Any, method: Path, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Initialised:
    """How variables were made that `traced` is the program of; None where it cannot be traced."""
    if traced is not None:
        traced = altered(traced, {"inputs": ()})  # they are the user's arrays
        if traced.closed.consts or any(map(is_array, traced.leaves)):
            _ = traced.digest  # of arrays as they are now: they may be let go of, or written into
    return Initialised(key, method, _abstract(args), _abstract(kwargs), traced)


def _abstract(tree: Any) -> Any:
    def one(leaf: Any) -> Any:
        return (
            jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, weak_type=getattr(leaf, "weak_type", False))
            if is_array(leaf)
            else leaf
        )

    return jax.tree_util.tree_map(one, tree)


@dataclass(frozen=True)
class Edit:
    """What became of a model's variables: the leaves that differ, whether they still fit, whether they are outdated."""

    changes: tuple[str, ...]
    fits: bool
    outdated: bool


def compare(before: Initialised, model: Model) -> tuple[Edit, Initialised | None]:
    """What `model`, a later version, would initialise, held against how the variables that are there were made."""
    try:
        now = initialised(model, before.key, before.method, before.args, before.kwargs)
        if now.traced is not None:
            ahead.keep(now.traced, model, before.key, before.method, before.args, before.kwargs)
    except Exception as error:  # the user's new code does not take the old call
        return Edit((f"the last init's call fails now ({type(error).__name__})",), fits=False, outdated=True), None
    if now.shapes is None or before.shapes is None:
        return Edit((), fits=True, outdated=True), now
    changes = differences(before.shapes, now.shapes)
    return Edit(changes, not changes, now.program is None or now.program != before.program), now


def differences(old: Any, new: Any) -> tuple[str, ...]:
    """Leaf by leaf: `Dense_0/kernel [4,3]→[4,5]`, `Dense_1/bias added`. `params` needs no naming."""
    before, after = _leaves(old), _leaves(new)
    out = []
    for name in dict.fromkeys([*before, *after]):
        if name not in after:
            out.append(f"{name} removed")
        elif name not in before:
            out.append(f"{name} added")
        else:
            a, b = before[name], after[name]
            if tuple(a.shape) != tuple(b.shape):
                out.append(f"{name} {list(a.shape)}→{list(b.shape)}".replace(", ", ","))
            elif a.dtype != b.dtype:
                out.append(f"{name} {a.dtype}→{b.dtype}")
    return tuple(out)


def _leaves(tree: Any) -> dict[str, Any]:
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    names = (jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves)
    return {name.removeprefix("params/"): leaf for name, (_, leaf) in zip(names, leaves, strict=True)}
