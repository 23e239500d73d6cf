"""Private names of JAX and Flax: a function for each, with what is done where a version has it no longer."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from functools import cache
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from jax.extend.core import Primitive

    from .types import Leaf

CALLBACKS = frozenset({"jax._src.callback", "jax._src.debugging"})
"""Modules through which a running program calls Python."""
TRANSFORMS = "jax._src.interpreters."
"""What the modules are called in which JAX calls a function to trace, differentiate or map it."""


def is_tracing() -> bool:
    """Whether JAX traces something on this thread; False where it cannot be told: the calling modules still tell most."""
    return not _is_clean()()


@cache
def _is_clean() -> Callable[[], bool]:
    try:
        from jax._src.core import trace_state_clean
    except ImportError:
        return lambda: True
    return trace_state_clean


def role_of(module: str) -> Literal["callback", "trace"] | None:
    """What a frame of the module means for the code that it calls, None for nothing."""
    if module in CALLBACKS:
        return "callback"
    return "trace" if module.startswith(TRANSFORMS) else None


@cache
def hide_frames(folder: str) -> None:
    """Has JAX leave out the frames of a folder's files where it says where a value came from: in leaked tracers, say."""
    try:
        from jax._src.source_info_util import register_exclusion
    except ImportError:
        return
    register_exclusion(folder)


def trace_context_of() -> Callable[[], tuple[object, ...]]:
    """JAX's function that gives all settings of a thread that a trace depends on.

    Where there is none it gives nothing, and the contexts of `with jax.set_mesh` and the like are not told apart.
    """
    try:
        from jax._src.config import trace_context
    except ImportError:
        return tuple
    return trace_context  # type: ignore[no-any-return]


def trace_context_names() -> tuple[str, ...]:
    """What each item of a trace's context is called; empty where JAX does not say."""
    try:
        from jax._src.config import trace_context_names
    except ImportError:
        return ()
    try:
        return tuple(trace_context_names())
    except NotImplementedError:
        return ()


def is_in_mesh() -> bool:
    """Whether this thread computes over a mesh; True where it cannot be told."""
    try:
        from jax._src import mesh

        return not (mesh.get_abstract_mesh().empty and mesh.thread_resources.env.physical_mesh.empty)
    except (ImportError, AttributeError):
        return True


def is_compiled_alone(primitive: Primitive) -> bool:
    """Whether JAX runs a primitive op by op by compiling it; False where it cannot be told."""
    try:
        from jax._src.dispatch import apply_primitive
    except ImportError:
        return False
    return getattr(primitive.impl, "func", None) is apply_primitive


class Staging(NamedTuple):
    """What decides whether a jitted function is one equation in the trace of a key, or inlined there."""

    trace: object
    rules: dict[Primitive, Callable[..., object]]
    """By primitive: what is done instead of writing an equation."""
    jit: Primitive
    """The primitive of jitted functions, which has a rule."""


def staging_of(key: Leaf) -> Staging | None:
    """That of the trace in which `key` is a tracer; None where a version of JAX has other names for it."""
    try:
        from jax._src.interpreters.partial_eval import custom_staging_rules
        from jax.extend.core.primitives import jit_p

        return Staging(key._trace, custom_staging_rules, jit_p) if jit_p in custom_staging_rules else None
    except (ImportError, AttributeError):
        return None


def contents_of(mapping: Mapping[str, object]) -> Mapping[str, object]:
    """The dict inside Flax's frozen one, which wraps what it gives anew each time; any other mapping itself."""
    return getattr(mapping, "_dict", mapping)


def flax_globals() -> tuple[Mapping[str, object], list[object], object, list[list[object]]]:
    """What Flax keeps of its own on this thread: its flags, interceptors, logical axis rules, and `nnx_stacks`.

    Raises AttributeError or KeyError where a version of Flax keeps them elsewhere.
    """
    modules = sys.modules
    return (
        modules["flax.configurations"].config._values,
        modules["flax.linen.module"]._global_interceptor_stack._storage,
        modules["flax.core.spmd"]._axis_rules.rules,
        [getattr(owner, name) for owner, name in nnx_stacks()] if "flax.nnx" in modules else [],
    )


NNX_STACKS = {
    "variable_hijax_stack": "nnx.var_defaults(hijax=…)",
    "variable_ref_stack": "nnx.var_defaults(ref=…)",
    "mutable_variable_stack": "nnx.use_refs",
    "eager_shard_stack": "nnx.use_eager_sharding",
    "graph_mode_stack": "nnx.set_graph_mode",
    "graph_updates_stack": "nnx.set_graph_updates",
}
"""Stacks of NNX's, of which the last item is in force → how it is put there."""


@cache
def nnx_stacks() -> list[tuple[object, str]]:
    """The stacks that this version of NNX has: what holds them, a lot for each thread, and their names."""
    modules = sys.modules
    graphs = modules.get("flax.nnx.graphlib") or modules["flax.nnx.graph"]
    owners = modules["flax.nnx.variablelib"].VARIABLE_CONTEXT, graphs.GRAPH_CONTEXT
    return [(owner, name) for owner in owners for name in NNX_STACKS if hasattr(owner, name)]
