"""Trace, lower, compile; and programs kept by what they compute.

A program is looked up twice. First by what the call is made of (the model's fingerprint, mode, argument shapes, JAX's
settings): a hit skips tracing, and is offered only for models whose whole source could be fingerprinted. Then by the
lowered program's own text, so that an edit which computes the same thing is traced but not compiled again.
"""

from __future__ import annotations

import concurrent.futures
import hashlib
import operator
import threading
from collections import OrderedDict
from collections.abc import Callable, Container, Hashable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.extend.core
import numpy as np

from .arguments import Arguments
from .forwarded import forwarded
from .keys import Draw, Series, split_inside, split_series_inside
from .models import Ask, Incomplete, Model, Path, Record
from .run import Memory

KEPT = 256
"""Programs kept at most, the least recently used dropped first."""

_SETTINGS = (
    "jax_enable_x64",
    "jax_default_matmul_precision",
    "jax_default_prng_impl",
    "jax_default_device",
    "jax_numpy_dtype_promotion",
    "jax_numpy_rank_promotion",
    "jax_threefry_partitionable",
    "jax_debug_nans",
    "jax_debug_infs",
    "jax_softmax_custom_jvp",
    "jax_enable_custom_prng",
    "jax_disable_most_optimizations",
)


_read_settings = operator.attrgetter(*(name for name in _SETTINGS if hasattr(jax.config, name)))


def settings() -> tuple[Any, ...]:
    """The settings of JAX that change what a trace gives, as they are on this thread now."""
    found: tuple[Any, ...] = _read_settings(jax.config)
    return found


@dataclass(frozen=True)
class Program:
    """An executable and what its trace told about it."""

    executable: Callable[..., Any]
    ask: Ask
    record: Record
    device: str
    memory: Memory | None
    effects: bool

    def __call__(self, variables: Mapping[str, Any], root: Any, dynamic: Mapping[str, Any]) -> Any:
        """`((output, updates), next root)`, dispatched; the device may still be working. Roots are key data."""
        return self.executable(variables, root, dynamic)

    def wait(self, result: Any) -> None:
        """Returns when the device has finished, host callbacks included."""
        jax.block_until_ready(result)
        if self.effects:
            jax.effects_barrier()


@dataclass(frozen=True)
class Built:
    """A program, where it came from (`compiled`, `reused`), and seconds per phase (0.0: did not happen)."""

    program: Program
    origin: str
    trace: float = 0.0
    lower: float = 0.0
    compile: float = 0.0


@dataclass(frozen=True)
class Request:
    """All that a program is made for."""

    name: str
    model: Model
    method: Path
    arguments: Arguments
    variables: Mapping[str, Any]
    draw: Draw | Series
    taken: bool = False
    """The first draw's `params` key went into variables."""
    keyed: frozenset[str] = frozenset()
    """Arguments that have a key of the draw; of a series of draws, one key each."""
    mutable: frozenset[str] = frozenset()
    training: bool = False
    guess: Ask = field(default_factory=Ask)


def trace(request: Request) -> tuple[Any, Ask, Record]:
    """Traces until the model has all that it asks for: `(jax.stages.Traced, what it was given, what was seen)`.

    A stream or collection is given only if the model asked for it in a trace; a guess that gave too much is corrected.
    """
    ask = replace(
        request.guess,
        streams=request.guess.streams | request.model.streams(),
        mutable=request.guess.mutable | request.mutable,
    )
    for _ in range(16):
        record = Record()
        program = _named(request, ask, record)
        try:
            traced = jax.jit(program).trace(request.variables, request.draw.words, request.arguments.dynamic)
        except Incomplete:
            ask = ask.and_what(record)
            continue
        needed = needs(record, request)
        if needed == ask:
            record.unused = unused(traced, request.arguments)
            record.unchanged = unchanged(traced, request)
            return _without(traced, request, record.unchanged), ask, record
        ask = needed
    raise RuntimeError(f"{request.name} asks for other streams in every trace")


def unchanged(traced: Any, request: Request) -> frozenset[tuple[str, str]]:
    """Variables (type and path) that the program gives as written, and that are what went in: their writer only had them.

    Of models that hold their variables themselves.
    """
    if not request.model.holds_variables:
        return frozenset()
    inputs, _ = jax.tree_util.tree_flatten_with_path((request.variables, request.draw.words, request.arguments.dynamic))
    outputs, _ = jax.tree_util.tree_flatten_with_path(traced.out_info)
    origins = forwarded(traced.jaxpr.jaxpr, repeated=request.draw.size is not None)
    same: dict[tuple[str, str], bool] = {}
    for (path, _), origin in zip(outputs, origins, strict=True):
        if path[0].idx == 0 and path[1].idx == 1 and path[2].key in request.variables:
            # `((output, updates), root)` there, `(variables, root, arguments)` here.
            variable = (path[2].key, path[3].key)
            is_input = origin is not None and inputs[origin][0] == (path[0], *path[2:])
            same[variable] = same.get(variable, True) and is_input
    return frozenset(variable for variable, is_same in same.items() if is_same)


def leave_out(updates: Mapping[str, Any], variables: Container[tuple[str, str]]) -> dict[str, Any]:
    """`updates` without `variables`, and without the types of which nothing is left."""
    kept = {}
    for name, tree in updates.items():
        inner = {path: value for path, value in tree.items() if (name, path) not in variables} if variables else tree
        if inner or not tree:
            kept[name] = inner
    return kept


def _without(traced: Any, request: Request, variables: frozenset[tuple[str, str]]) -> Any:
    """The traced program without some of the variables that it writes."""
    if not variables:
        return traced
    run = jax.extend.core.jaxpr_as_fun(traced.jaxpr)
    tree = jax.tree_util.tree_structure(traced.out_info)

    def program(*inputs: Any) -> Any:
        (output, updates), after = jax.tree_util.tree_unflatten(tree, run(*jax.tree_util.tree_leaves(inputs)))
        return (output, leave_out(updates, variables)), after

    program.__name__ = program.__qualname__ = request.name
    return jax.jit(program).trace(request.variables, request.draw.words, request.arguments.dynamic)


def _named(request: Request, ask: Ask, record: Record) -> Callable[..., Any]:
    """The function that is compiled. JAX's messages name it, where it is and its arguments: the user's words, not ours."""
    draw, names = request.draw, sorted(ask.streams)
    run = running(request, ask, record)

    def program(variables: Any, root: Any, arguments: Any) -> Any:
        if draw.size is None:
            after, keys = split_inside(root, draw.impl, names, taken=request.taken)
        else:
            after, keys = split_series_inside(root, draw.impl, names, draw.size, taken=request.taken)
        return run(variables, keys, arguments), after

    program.__name__ = program.__qualname__ = request.name
    program.__code__ = program.__code__.replace(co_filename="<flax_magics>", co_firstlineno=1, co_name=request.name)
    return program


def running(request: Request, ask: Ask, record: Record) -> Callable[..., Any]:
    """`run(variables, keys, arguments) -> (output, updates)`; of a series of draws, all with an axis in front."""
    forward = request.model.forward(request.method, ask, record, request.draw.impl)
    rebuild, size = request.arguments.rebuild, request.draw.size

    def one(variables: Any, keys: Any, arguments: Any) -> Any:
        args, kwargs = rebuild(arguments)
        return forward(variables, keys, args, kwargs)

    def many(variables: Any, keys: Any, arguments: Any) -> Any:
        shared = {name: value for name, value in arguments.items() if name not in request.keyed}
        own = {name: value for name, value in arguments.items() if name in request.keyed}

        def draw(keys: Any, own: Any) -> Any:
            return one(variables, keys, {**shared, **own})

        if request.draw.impl == "threefry2x32":
            return jax.vmap(draw, axis_size=size)(keys, own)
        # Mapped over keys, JAX's other generators give other bits than one by one.
        return jax.lax.scan(lambda _, each: (None, draw(*each)), None, (keys, own), length=size)[1]

    return one if size is None else many


def unused(traced: Any, arguments: Arguments) -> frozenset[str]:
    """Names of the traced arguments that no equation of the program reads and that are not handed back."""
    jaxpr = traced.jaxpr.jaxpr
    names = sorted(arguments.dynamic)
    read = {id(var) for equation in jaxpr.eqns for var in equation.invars} | {id(var) for var in jaxpr.outvars}
    # The arguments come last, one leaf each, in the order in which JAX takes a dict apart.
    last = jaxpr.invars[len(jaxpr.invars) - len(names) :]
    return frozenset(name for name, var in zip(names, last, strict=True) if id(var) not in read)


def needs(record: Record, request: Request) -> Ask:
    """What a complete trace shows that the model needs.

    `has_rng` alone is not asking, except that `--train` answers a model which uses `has_rng('dropout')` as its switch.
    """
    streams = set(record.asked) | record.held
    if request.training and "dropout" in record.queried:
        streams.add("dropout")
    return Ask(frozenset(streams), frozenset(record.written) | request.mutable, frozenset(record.axes))


@dataclass
class Programs:
    """Programs kept, and compilations under way. `clock` gives seconds."""

    clock: Callable[[], float]
    by_call: OrderedDict[Hashable, Program] = field(default_factory=OrderedDict)
    by_text: OrderedDict[Hashable, tuple[Any, Any]] = field(default_factory=OrderedDict)
    compiling: dict[Hashable, concurrent.futures.Future[Any]] = field(default_factory=dict)
    parts: dict[str, dict[str, str]] = field(default_factory=dict)
    """model → what its last program was made for, as a person would say it."""

    def __len__(self) -> int:
        return len(self.by_text)

    def find(self, key: Hashable | None, taken: bool) -> Program | None:
        """The program made for exactly this call, if it is kept. None for a key of None. For `taken` see `Request`."""
        for full in ((key, None), (key, taken)):
            program = None if key is None else self.by_call.get(full)
            if program is not None:
                self.by_call.move_to_end(full)
                return program
        return None

    def forget(self, program: Program) -> None:
        """Offers `program` to no call any more."""
        for key in [key for key, kept in self.by_call.items() if kept is program]:
            del self.by_call[key]

    def build(self, key: Hashable | None, request: Request, phase: Callable[[str], None]) -> Built:
        """Traces and lowers; compiles unless a program of the same text is kept.

        `phase` is told the name of each phase as it begins. Compiling happens on another thread, so that an interrupt
        returns at once; what it had begun is finished and used when it is asked for again.
        """
        phase("tracing")
        start = self.clock()
        traced, ask, record = trace(request)
        trace_seconds = self.clock() - start
        phase("lowering")
        start = self.clock()
        lowered = traced.lower()
        text = lowered.as_text()
        lower_seconds = self.clock() - start

        # Host callbacks are numbered in the text, not named: two programs with the same text may call two functions.
        shareable = "callback" not in text
        origin, compile_seconds = "reused", 0.0
        text_key = (_digest(text, traced), settings(), str(lowered.out_tree), jax.default_backend())
        known = self.by_text.get(text_key) if shareable else None
        if known is not None and known[1] == (lowered.in_tree, lowered.out_tree):
            executable = known[0]
            self.by_text.move_to_end(text_key)
        else:
            phase("compiling")
            start = self.clock()
            executable = self._compile(lowered, text_key if shareable else object())
            compile_seconds, origin = self.clock() - start, "compiled"
            if shareable:
                _keep(self.by_text, text_key, (executable, (lowered.in_tree, lowered.out_tree)))
        program = Program(
            executable, ask, record, device_of(executable), analysis(executable), bool(traced.jaxpr.effects)
        )
        if key is not None:
            _keep(self.by_call, (key, request.taken if "params" in ask.streams else None), program)
        return Built(program, origin, trace_seconds, lower_seconds, compile_seconds)

    def _compile(self, lowered: Any, text_key: Hashable) -> Any:
        future = self.compiling.get(text_key)
        if future is None:
            future = concurrent.futures.Future()
            self.compiling[text_key] = future
            # Not a daemon: a compilation that is cut off when Python exits aborts the process.
            threading.Thread(target=_compile_into, args=(future, lowered), name="flax_magics compile").start()
        while not future.done():
            concurrent.futures.wait([future], timeout=0.2)
        del self.compiling[text_key]
        return future.result()


def _compile_into(future: concurrent.futures.Future[Any], lowered: Any) -> None:
    try:
        future.set_result(lowered.compile())
    except BaseException as error:
        future.set_exception(error)


def _keep(kept: OrderedDict[Hashable, Any], key: Hashable, value: Any) -> None:
    kept[key] = value
    kept.move_to_end(key)
    while len(kept) > KEPT:
        kept.popitem(last=False)


def _digest(text: str, traced: Any) -> str:
    hasher = hashlib.sha256(text.encode())
    # The text holds constants in full unless JAX is set to pass them as arguments.
    for constant in traced.jaxpr.consts:
        if hasattr(constant, "dtype"):
            data = (
                jax.random.key_data(constant)
                if jax.dtypes.issubdtype(constant.dtype, jax.dtypes.prng_key)
                else constant
            )
            hasher.update(np.asarray(data).tobytes())
    return hasher.hexdigest()


def device_of(executable: Any) -> str:
    """Where a compiled program runs: `cpu:0`, `gpu:0-7`."""
    shardings = jax.tree_util.tree_leaves((executable.input_shardings, executable.output_shardings))
    devices = {device for sharding in shardings for device in sharding.device_set}
    return name_devices(devices or {default_device()})


def default_device() -> Any:
    """The device that JAX would use now."""
    device: Any = getattr(jax.config, "jax_default_device", None)
    if device is None:
        return jax.local_devices()[0]
    return jax.local_devices(backend=device)[0] if isinstance(device, str) else device


def devices_of(tree: Any) -> str:
    """Where the arrays of `tree` are."""
    leaves = [leaf for leaf in jax.tree_util.tree_leaves(tree) if isinstance(leaf, jax.Array)]
    return name_devices({device for leaf in leaves for device in leaf.devices()} or {default_device()})


def name_devices(devices: Any) -> str:
    """`cpu:0` for one device; `gpu:0-7` or `gpu:0,2` for several."""
    ids = sorted(device.id for device in devices)
    platform = next(iter(devices)).platform
    if len(ids) > 2 and ids == list(range(ids[0], ids[-1] + 1)):
        return f"{platform}:{ids[0]}-{ids[-1]}"
    return f"{platform}:{','.join(map(str, ids))}"


def analysis(executable: Any) -> Memory | None:
    """Bytes as XLA counts them for this program, None where the backend does not say."""
    try:
        stats = executable.memory_analysis()
    except (jax.errors.JaxRuntimeError, NotImplementedError, AttributeError):
        return None
    if stats is None:
        return None
    return Memory(
        stats.argument_size_in_bytes,
        stats.output_size_in_bytes,
        stats.temp_size_in_bytes,
        stats.generated_code_size_in_bytes,
    )
