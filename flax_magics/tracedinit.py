"""An initialisation as what it computes: traced by shapes, and what the variables do not depend on told apart."""

from __future__ import annotations

import contextlib
import hashlib
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import numpy as np

from .models import Model, Path

_lock = threading.RLock()

COMPUTED = object()
"""Stands for a leaf of the variables that has to be computed."""


@dataclass(frozen=True)
class TracedInit:
    """An initialisation as a jaxpr over the key and the arrays among the arguments.

    Attributes:
      closed: the jaxpr, its outputs the variables' leaves that it computes.
      needed: its equations that these depend on, in order.
      leaves: the variables' leaves, `COMPUTED` in place of each output.
      treedef: how the variables are put together.
      inputs: the arrays among the arguments.
      whole: JAX's own inlining was kept off: each equation is one program where code runs op by op.
    """

    closed: Any
    needed: tuple[Any, ...]
    leaves: tuple[Any, ...]
    treedef: Any
    inputs: tuple[Any, ...]
    whole: bool

    @property
    def shapes(self) -> Any:
        """The variables, shapes in place of arrays."""
        given = iter(self.closed.out_avals)
        return jax.tree_util.tree_unflatten(
            self.treedef, [_shape(next(given) if leaf is COMPUTED else leaf) for leaf in self.leaves]
        )

    @property
    def variables(self) -> Any:
        """The variables as far as they are known before they are computed: shapes in place of what is not."""
        given = iter(self.closed.out_avals)
        return jax.tree_util.tree_unflatten(
            self.treedef, [_shape(next(given)) if leaf is COMPUTED else leaf for leaf in self.leaves]
        )

    @cached_property
    def digest(self) -> str:
        """A digest of what the variables depend on, the forward pass left out."""
        jaxpr = self.closed.jaxpr
        text = str(jaxpr.replace(eqns=list(self.needed)))
        text = re.sub(r"0x[0-9a-f]+", "", text)  # functions are printed with their address
        hasher = hashlib.sha256(text.encode())
        read = read_by(self.needed) | {var for var in jaxpr.outvars if not hasattr(var, "val")}
        for var, constant in zip(jaxpr.constvars, self.closed.consts, strict=True):
            if (
                var in read
                and hasattr(constant, "dtype")
                and not jax.dtypes.issubdtype(constant.dtype, jax.dtypes.prng_key)
            ):
                hasher.update(np.asarray(constant).tobytes())
        for leaf in self.leaves:
            if hasattr(leaf, "dtype") and not jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
                hasher.update(np.asarray(leaf).tobytes())
            elif leaf is not COMPUTED:
                hasher.update(repr(leaf).encode())
        return hasher.hexdigest()


def trace_init(model: Model, key: Any, method: Path, args: tuple[Any, ...], kwargs: dict[str, Any]) -> TracedInit:
    """Traces the initialisation by shapes; nothing is computed. `key`, `args` and `kwargs` may hold arrays or shapes.

    What the model raises is passed on, and what JAX raises where it looks at values.
    """
    leaves, treedef = jax.tree_util.tree_flatten((args, kwargs))
    dynamic = [leaf for leaf in leaves if is_array(leaf)]
    made: list[Any] = []
    whole: list[bool] = []

    def init(key: Any, dynamic: list[Any]) -> list[Any]:
        given = iter(dynamic)
        full = [next(given) if is_array(leaf) else leaf for leaf in leaves]
        args, kwargs = jax.tree_util.tree_unflatten(treedef, full)
        with _units(key) as kept:
            variables = model.init(key, method, args, kwargs)
        made[:] = jax.tree_util.tree_flatten(variables)
        whole[:] = [kept]
        return [leaf for leaf in made[0] if isinstance(leaf, jax.core.Tracer)]

    closed = jax.make_jaxpr(init)(key, dynamic)
    found = tuple(COMPUTED if isinstance(leaf, jax.core.Tracer) else leaf for leaf in made[0])
    return TracedInit(closed, _needed(closed.jaxpr), found, made[1], tuple(dynamic), whole[0])


@contextlib.contextmanager
def _units(key: Any) -> Iterator[bool]:
    """Keeps what is jitted by itself one equation in the trace that `key` belongs to. Gives whether that can be done.

    JAX runs a jitted function as one program, and inlines some (most of `jax.numpy`) where they are traced.
    """
    with _lock, _whole(key) as kept:
        yield kept


@contextlib.contextmanager
def _whole(key: Any) -> Iterator[bool]:
    try:
        from jax._src.interpreters.partial_eval import custom_staging_rules as rules
        from jax.extend.core.primitives import jit_p

        outer, rule, thread = key._trace, rules[jit_p], threading.get_ident()
    except (ImportError, AttributeError, KeyError):
        yield False
        return

    def stage(trace: Any, source: Any, *args: Any, **params: Any) -> Any:
        inline = params.get("inline")
        inlined = inline is True or getattr(inline, "name", "") == "JAX_EARLY"
        if trace is outer and inlined and not params["compiler_options_kvs"] and threading.get_ident() == thread:
            return trace.default_process_primitive(jit_p, args, params, source_info=source)
        return rule(trace, source, *args, **params)

    try:
        rules[jit_p] = stage
        yield True
    finally:
        rules[jit_p] = rule


def _needed(jaxpr: Any) -> tuple[Any, ...]:
    """The equations that a jaxpr's outputs depend on."""
    wanted = {var for var in jaxpr.outvars if not hasattr(var, "val")}
    kept = []
    for equation in reversed(jaxpr.eqns):
        if wanted.intersection(equation.outvars):
            kept.append(equation)
            wanted.update(var for var in equation.invars if not hasattr(var, "val"))
    return tuple(kept[::-1])


def read_by(equations: tuple[Any, ...]) -> set[Any]:
    """What equations read, literals left out."""
    return {var for equation in equations for var in equation.invars if not hasattr(var, "val")}


def is_array(leaf: Any) -> bool:
    """Whether a leaf is an array or the shape of one: what an initialisation is traced over."""
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype")


def _shape(leaf: Any) -> jax.ShapeDtypeStruct:
    if not is_array(leaf):
        leaf = jax.eval_shape(lambda: leaf)
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, weak_type=getattr(leaf, "weak_type", False))
