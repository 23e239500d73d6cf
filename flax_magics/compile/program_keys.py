"""By what programs are found again: by the call, by the equations of its trace, by the text of the lowered program.

All of these hold the settings of JAX and Flax that a program depends on.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Hashable
from typing import Any, TypeAlias

import jax

from ..base.digest import data_of
from ..base.private import settings_reader, trace_context_names, trace_context_of
from ..code.contents import Structure, Unknown, flax_state, flax_state_in_words
from ..code.fingerprint import fingerprint
from ..code.library import library
from ..models.calls import signature_of
from .jaxpr import identity
from .trace import Traced, TraceRequest

Executable: TypeAlias = Any
"""A `jax.stages.Compiled`; `Any`, because its static type does not describe its arguments and results."""

trace_context = trace_context_of()
_TRACED = (
    *("jax_enable_x64", "jax_default_matmul_precision", "jax_default_device", "jax_numpy_dtype_promotion"),
    *("jax_numpy_rank_promotion", "jax_threefry_partitionable", "jax_softmax_custom_jvp", "jax_disable_jit"),
)
"""Settings that are part of JAX's trace context: read by name for messages, and in place of a missing trace context."""
_OTHERS = (
    *("jax_default_prng_impl", "jax_enable_custom_prng", "jax_default_dtype_bits", "jax_safer_randint"),
    *("jax_debug_nans", "jax_debug_infs", "jax_exec_time_optimization_effort", "jax_memory_fitting_effort"),
    *("jax_memory_fitting_level", "jax_optimization_level", "jax_compiler_enable_remat_pass"),
    "jax_ragged_dot_use_ragged_dot_instruction",
)
"""Settings that change a program and are not part of JAX's trace context."""
_FLAG = "jax_disable_most_optimizations"  # a flag without an attribute on `jax.config`: it takes `config.read`

_NAMES = tuple(name for name in (_OTHERS if trace_context() else (*_OTHERS, *_TRACED)) if hasattr(jax.config, name))
_read_settings = settings_reader((*_NAMES, _FLAG))


def jax_settings() -> tuple[object, ...]:
    """All JAX settings that change the result of a trace or compilation, as they are on this thread now."""
    return (trace_context(), *_read_settings())


def settings() -> tuple[tuple[object, ...], tuple[object, ...]]:
    """(JAX's settings, Flax's state): all that a trace depends on besides the call, the model and installed code."""
    return (jax_settings(), flax_state())


def settings_in_words() -> dict[str, object]:
    """The settings of JAX and Flax by name, for messages. An older JAX does not name all of its contexts."""
    words: dict[str, object] = dict(zip((*_NAMES, _FLAG), jax_settings()[1:], strict=True))
    names, contexts = trace_context_names(), trace_context()
    if names and len(names) == len(contexts):
        words |= {name.removesuffix("_context_manager"): value for name, value in zip(names, contexts, strict=True)}
    else:
        words |= {name: getattr(jax.config, name) for name in _TRACED if hasattr(jax.config, name)}
    return words | flax_state_in_words()


def call_key(request: TraceRequest) -> Hashable | None:
    """A key under which a call's program is cached: equal keys mean that tracing gives the same program.

    None where that cannot be told, as for a model that has no fingerprint.
    """
    arguments = request.arguments
    model, static = request.model.cache_key(), fingerprint(arguments.static)
    treedef = jax.tree_util.tree_structure(request.variables)
    passed, variables = Structure.of(arguments.treedef), Structure.of(treedef)
    state = settings()
    # A part that cannot be told now may be another at the next call without anyone noticing.
    if None in (model, static, passed.contents, variables.contents) or any(isinstance(s, Unknown) for s in state[1]):
        return None
    trees = (passed, arguments.traced, variables)
    return hashable((*looks(request), *trees, model, static, state, library.edition))


def looks(request: TraceRequest) -> tuple[object, ...]:
    """What can be told of a call in any process: names, options, types. Calls of two editions of a model may look alike."""
    call = (request.name, request.method, request.mutable, request.mode == "train", request.keyed, request.placement)
    draw, leaves = (request.draw.impl, request.draw.size), jax.tree_util.tree_leaves(request.variables)
    return *call, *draw, tuple(map(signature_of, request.arguments.dynamic.values())), tuple(map(signature_of, leaves))


def equations_key(traced: Traced, request: TraceRequest) -> Hashable | None:
    """A key of a traced program, equal only if lowering gives the same program; None where that cannot be told."""
    equations = identity(traced.jaxpr)
    trees = (Structure.of(traced.in_tree), Structure.of(jax.tree_util.tree_structure(traced.out_info)))
    return equations and (equations, trees, request.name, jax_settings(), jax.default_backend(), placed(request))


def placed(request: TraceRequest) -> tuple[object, ...]:
    """Sharding of each input that the user placed (committed), None for others: it decides where the program runs."""
    leaves = jax.tree_util.tree_leaves((request.variables, request.arguments.dynamic))
    return tuple(signature_of(leaf)[-1] for leaf in leaves)


def program_key(traced: jax.stages.Traced, lowered: jax.stages.Lowered, where: Hashable = ()) -> Hashable | None:
    """A key of a lowered program, in memory and on disk; None if different programs might have the same key.

    The text alone is not enough. It lacks shape and dtype of unused arguments, and for all of them the PRNG
    implementation of typed keys and the weak type, on which the types of later computations depend.

    Args:
      where: the shardings of committed arguments, since the text does not name devices.
    """
    text = lowered.as_text()
    if "callback" in text:  # the text numbers host callbacks and does not name them
        return None
    hasher = hashlib.sha256(text.encode())
    # JAX may be set to pass constants as arguments: then they are not in the text.
    for constant in traced.jaxpr.consts:
        if hasattr(constant, "dtype"):
            hasher.update(data_of(constant))
    trees = f"{lowered.in_tree} {lowered.out_tree}"
    avals = (*traced.jaxpr.in_avals, None, *traced.jaxpr.out_avals)
    types = tuple(aval and (aval.shape, str(aval.dtype), bool(getattr(aval, "weak_type", False))) for aval in avals)
    return hasher.hexdigest(), jax_settings(), trees, jax.default_backend(), where, types


def digest_of(key: Hashable | None, traced: jax.stages.Traced) -> str:
    """A digest of a traced program that all processes of a job have alike, empty in a job of one.

    Args:
      key: its `program_key`.
    """
    if jax.process_count() == 1:
        return ""
    if isinstance(key, tuple):
        return str(key[0])
    # What the text has of a host callback is an address.
    return hashlib.sha256(re.sub(r"[0-9]{6,}", "", traced.lower().as_text()).encode()).hexdigest()


def hashable(key: Hashable) -> Hashable | None:
    """The key itself, or None where something in it cannot be hashed."""
    try:
        hash(key)
    except TypeError:
        return None
    return key
