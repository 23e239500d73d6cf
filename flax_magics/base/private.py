"""Private names of JAX and Flax, a function for each, with a fallback for versions that lack the name."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import cache, partial
from importlib import import_module
from operator import attrgetter
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from .types import Record

if TYPE_CHECKING:
    from jax.extend.core import Primitive

    from .types import Leaf

CALLBACKS = frozenset({"jax._src.callback", "jax._src.debugging"})
"""JAX modules whose frames are on the stack while a compiled program calls back into Python."""
TRANSFORMS = "jax._src.interpreters."
"""Prefix of the JAX modules that call a function to trace, differentiate or map it."""


T = TypeVar("T")


def _of_jax(name: str, otherwise: T) -> T:
    """A private name of JAX, such as `core.trace_state_clean`; `otherwise` in a version that lacks it."""
    module, _, attribute = name.rpartition(".")
    try:
        found: T = getattr(import_module(f"jax._src.{module}"), attribute)
    except (ImportError, AttributeError):
        return otherwise
    return found


def is_tracing() -> bool:
    """Whether JAX is tracing on this thread; False where JAX lacks the query (`role_of` still tells most traces)."""
    return not _is_clean()()


@cache
def _is_clean() -> Callable[[], bool]:
    return _of_jax("core.trace_state_clean", lambda: True)  # "clean": otherwise every command would be refused


def role_of(module: str) -> Literal["callback", "trace"] | None:
    """What a stack frame of `module` says about the code it calls: a host callback, a trace, or neither (None)."""
    if module in CALLBACKS:
        return "callback"
    return "trace" if module.startswith(TRANSFORMS) else None


@cache
def hide_frames(folder: str) -> bool:
    """Has JAX leave out the frames of a folder's files where it says where a value came from, a leaked tracer, say.

    Gives whether this version can do that.
    """
    register: Callable[[str], object] | None = _of_jax("source_info_util.register_exclusion", None)
    if register is not None:
        register(folder)
    return register is not None


def frames_of(source: object) -> list[tuple[str, int, str]]:
    """(file, line, function) of the frames in which an equation was traced, innermost first, without JAX's own.

    Args:
      source: the equation's `source_info`.
    """
    user_frames: Callable[[object], Iterable[Any]] = _of_jax("source_info_util.user_frames", lambda traceback: ())
    try:
        frames = list(user_frames(source.traceback))  # type: ignore[attr-defined]
        return [(frame.file_name, frame.start_line, frame.function_name) for frame in frames]
    except (AttributeError, TypeError):  # it takes something else in this version
        return []


def trace_context_of() -> Callable[[], tuple[object, ...]]:
    """JAX's function that returns every thread-local setting which a trace depends on, as a tuple.

    On a JAX without it the replacement returns `()`, so programs traced under different `jax.set_mesh` contexts cannot
    be told apart there.
    """
    return _of_jax("config.trace_context", tuple)  # called without arguments it is `()`


def settings_reader(names: Sequence[str]) -> Callable[[], tuple[object, ...]]:
    """A function that returns the values on this thread of settings of `jax.config`, flags without an attribute too.

    They are read in every run: from where JAX holds them, that takes no Python code of JAX's.
    """
    import jax

    holders = getattr(jax.config, "_value_holders", {})
    if all(hasattr(holders.get(name), "value") for name in names):
        chosen = SimpleNamespace(**{name: holders[name] for name in names})
        return partial(attrgetter(*(f"{name}.value" for name in names)), chosen)
    return lambda: tuple(
        [getattr(jax.config, name) if hasattr(jax.config, name) else jax.config.read(name) for name in names]
    )


def trace_context_names() -> tuple[str, ...]:
    """The name of each item of the trace context, in order; empty where JAX does not name them."""
    names: Callable[[], Iterable[str]] = _of_jax("config.trace_context_names", tuple)
    try:
        return tuple(names())
    except NotImplementedError:  # the installed jaxlib is too old for it
        return ()


def is_in_mesh() -> bool:
    """Whether a mesh is set on this thread; True where it cannot be told, so that callers take the careful way."""
    try:
        from jax._src import mesh

        # `jax.set_mesh` sets the abstract mesh, the older `with mesh:` the physical one of the thread.
        return not (mesh.get_abstract_mesh().empty and mesh.thread_resources.env.physical_mesh.empty)
    except (ImportError, AttributeError):
        return True


def accelerators() -> list[str]:
    """The accelerators of this machine, used or not, as JAX itself looks for them: `NVIDIA GPU`, `AMD GPU`, `TPU`."""
    try:
        from jax._src import hardware_utils
    except ImportError:
        return []
    kinds = []
    with suppress(AttributeError, OSError):
        kinds += ["NVIDIA GPU"] * hardware_utils.has_visible_nvidia_gpu()
    with suppress(AttributeError, OSError):
        kinds += ["TPU"] * (hardware_utils.num_available_tpu_chips_and_device_id()[0] > 0)
    with suppress(AttributeError, OSError):  # not in 0.7
        kinds += ["AMD GPU"] * (hardware_utils.num_available_amd_gpus() > 0)
    return kinds


def has_devices() -> bool:
    """Whether JAX has found its devices already, which settles how it holds their memory; True where it cannot be told."""
    return _of_jax("xla_bridge.backends_are_initialized", lambda: True)()


def coordination() -> tuple[Any, str | None]:
    """The client of the coordinator's key-value store, and the coordinator's address; None in a job of one process."""
    state = _of_jax("distributed.global_state", None)
    return getattr(state, "client", None), getattr(state, "coordinator_address", None)


def is_compiled_alone(primitive: Primitive) -> bool:
    """Whether eager JAX runs this primitive by compiling it as a program of its own; False where it cannot be told."""
    # `impl` is then `partial(apply_primitive, primitive)`; other primitives have Python rules of their own.
    return getattr(primitive.impl, "func", None) is _of_jax("dispatch.apply_primitive", object())


class Staging(Record):
    """The JAX objects that decide whether a jitted function becomes one equation of a trace or is inlined into it."""

    trace: object
    """The trace itself; equations of nested traces are left alone."""
    rules: dict[Primitive, Callable[..., object]]
    """Primitive → the function that JAX calls instead of recording an equation."""
    jit: Primitive
    """The primitive of jitted functions; `rules` has an entry for it."""


def staging_of(key: Leaf) -> Staging | None:
    """The staging rules of the trace in which `key` is a tracer; None where a version of JAX names them otherwise."""
    try:
        from jax._src.interpreters.partial_eval import custom_staging_rules
        from jax.extend.core.primitives import jit_p

        return Staging(key._trace, custom_staging_rules, jit_p) if jit_p in custom_staging_rules else None
    except (ImportError, AttributeError):
        return None


def trace_of(leaf: Leaf) -> object:
    """The trace that a tracer belongs to; None for a value."""
    return getattr(leaf, "_trace", None)


def contents_of(mapping: Mapping[str, object]) -> Mapping[str, object]:
    """The dict inside a Flax `FrozenDict` or a `HashableMapping` of NNX; any other mapping itself."""
    # A FrozenDict wraps nested dicts anew at each access, so identities of its values never repeat. A HashableMapping,
    # as NNX's classes have it, is Python code: 20 µs whenever it is compared.
    return getattr(mapping, "_dict", getattr(mapping, "_mapping", mapping))


def flax_globals() -> tuple[Mapping[str, object], list[object], object, Sequence[list[object]]]:
    """Flax's own global state on this thread: flags, method interceptors, logical axis rules, and the `nnx_stacks`.

    Raises AttributeError or KeyError where a version of Flax keeps them elsewhere.
    """
    flags, interceptors, rules = _flax_holders()
    # NNX takes long to import, and its stacks are empty until then.
    return flags, interceptors._storage, rules.rules, _read_stacks()() if "flax.nnx" in sys.modules else ()


@cache
def _flax_holders() -> tuple[Mapping[str, object], Any, Any]:
    modules = sys.modules
    interceptors, rules = modules["flax.linen.module"]._global_interceptor_stack, modules["flax.core.spmd"]._axis_rules
    return modules["flax.configurations"].config._values, interceptors, rules


NNX_STACKS = {
    "variable_hijax_stack": "nnx.var_defaults(hijax=…)",
    "variable_ref_stack": "nnx.var_defaults(ref=…)",
    "mutable_variable_stack": "nnx.use_refs",
    "eager_shard_stack": "nnx.use_eager_sharding",
    "graph_mode_stack": "nnx.set_graph_mode",
    "graph_updates_stack": "nnx.set_graph_updates",
}
"""Name of an NNX stack, whose last item is in force → the call that pushes onto it."""


@cache
def nnx_stacks() -> list[tuple[object, str]]:
    """The stacks that this version of NNX has, as (thread-local owner, attribute name)."""
    modules = sys.modules
    graphs = modules.get("flax.nnx.graphlib") or modules["flax.nnx.graph"]  # flax 0.11 has it there
    owners = modules["flax.nnx.variablelib"].VARIABLE_CONTEXT, graphs.GRAPH_CONTEXT
    return [(owner, name) for owner in owners for name in NNX_STACKS if hasattr(owner, name)]


@cache
def _read_stacks() -> Callable[[], Sequence[list[object]]]:
    """A function without Python code that reads them, since each run does."""
    stacks = nnx_stacks()
    owners = SimpleNamespace(**{f"of_{name}": owner for owner, name in stacks})
    names = [f"of_{name}.{name}" for _, name in stacks]
    return partial(attrgetter(*names), owners) if len(names) > 1 else lambda: [getattr(*stack) for stack in stacks]
