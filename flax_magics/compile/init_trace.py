"""An initialisation as what it computes: traced by shapes, and what the variables do not depend on told apart."""

from __future__ import annotations

import contextlib
import hashlib
import re
import threading
from collections import OrderedDict
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import numpy as np

from ..code.fingerprint import fingerprint
from ..code.library import library
from ..code.structure import Structure
from ..models.arguments import signature_of
from ..models.base import Model
from ..models.calls import Path
from ..run import altered
from .compiler import settings

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
    assert not model.holds_variables  # an NNX module is initialised where it is built
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


KEPT = 4
"""Traces kept at most, the oldest dropped first."""

_kept: OrderedDict[Hashable, TracedInit] = OrderedDict()


def keep(
    traced: TracedInit, model: Model, key: Any, method: Path, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """Keeps a trace, unless the model is not plain or the trace holds arrays, which would live as long as it."""
    identity = _identity(model, key, method, args, kwargs)
    if identity is None or traced.closed.consts or any(map(is_array, traced.leaves)):
        return
    _kept[identity] = altered(traced, {"inputs": ()})
    while len(_kept) > KEPT:
        _kept.popitem(last=False)


def take(model: Model, key: Any, method: Path, args: tuple[Any, ...], kwargs: dict[str, Any]) -> TracedInit | None:
    """The trace that was kept for such an init, over the arrays of this one."""
    if not _kept:
        return None
    traced = _kept.pop(_identity(model, key, method, args, kwargs), None)
    if traced is None:
        return None
    leaves = jax.tree_util.tree_leaves((args, kwargs))
    return altered(traced, {"inputs": tuple(leaf for leaf in leaves if is_array(leaf))})


def _identity(model: Model, key: Any, method: Path, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Hashable | None:
    """Equal ones trace the same; None where that cannot be told."""
    print_ = model.cache_key()
    leaves, treedef = jax.tree_util.tree_flatten((args, kwargs))
    static = fingerprint([leaf for leaf in leaves if not is_array(leaf)])
    now, structure = settings(), Structure.of(treedef)
    if print_ is None or static is None or structure.contents is None:
        return None
    # Where the arrays are makes no difference to a trace.
    arrays = tuple(signature_of(leaf)[:3] if is_array(leaf) else None for leaf in leaves)
    return print_, method, structure, static, arrays, str(key.dtype), now, library.edition
