"""Tracing of a call, repeated until the model is given exactly the streams, collections and axes that it asks for."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from typing import Any, Generic, TypeAlias, TypeVar

import jax
import jax.extend.core
from jax.errors import (
    ConcretizationTypeError,
    NonConcreteBooleanIndexError,
    TracerArrayConversionError,
    TracerIntegerConversionError,
)
from jax.extend.core import Jaxpr
from msgspec import Struct
from msgspec.structs import replace

from ..base.digest import opened
from ..base.types import Leaf, PyTree
from ..models.base import CallTrace, Incomplete, MissingVariables, Model, Needs, Updates, Variables
from ..models.calls import Arguments, Calls, Function, Kwargs, Path
from ..rng.keys import THREEFRY, Draw, DrawBatch, Words
from .jaxpr import Atom, Equation
from .placement import Placement, Shardings

P = TypeVar("P")
Traced: TypeAlias = Any
"""A `jax.stages.Traced`."""
Add: TypeAlias = Callable[[Variables], Variables]
"""Returns the given variables completed by those that a method needs and no init has made."""


class TraceRequest(Struct, frozen=True):
    """Everything that determines a program.

    Attributes:
      name: the model's name, which the compiled function gets.
      arguments: the call's arguments, split into traced and static leaves.
      variables: the model's variables by collection; may be shapes.
      draw: the draw or batch of draws; only its size and PRNG implementation matter for the program.
      guess: what earlier runs needed: a first attempt that may spare a trace.
    """

    name: str
    model: Model
    method: Path
    arguments: Arguments
    variables: Variables
    draw: Draw | DrawBatch
    keyed: frozenset[str] = frozenset()
    """Names of arguments that are keys of the draw; with a batch of draws they are mapped over."""
    mutable: frozenset[str] = frozenset()
    """Collections that the user wants handed back."""
    mode: str = "as written"
    """`train`, `eval` or `as written`."""
    guess: Needs = Needs()
    noted: bool = False
    """Record the calls of submodules, for a summary."""
    placement: Placement | None = None
    """The mesh that variables and arguments lie on, by which what the model writes is laid out."""
    shardings: Shardings = {}
    """How the arguments were laid out on it, by name."""


Find: TypeAlias = Callable[[TraceRequest], P | None]
"""Returns a cached result for a request, None if there is none."""


def trace(request: TraceRequest) -> tuple[Traced, Needs, CallTrace]:
    """Traces until the model is given what it asks for: `(jax.stages.Traced, what it was given, what was observed)`.

    A stream or collection is given only if the model asked for it in a trace; a guess of too many is corrected.
    """
    guess = request.guess
    ask = Needs(guess.streams | request.model.streams(), guess.mutable | request.mutable, guess.axes)
    for _ in range(16):  # each round finds more needs; a model that never settles must not loop forever
        record = CallTrace(calls=Calls() if request.noted else None)
        program = _named(request, ask, record)
        try:
            traced = jax.jit(program).trace(*inputs_of(request, ask))
        except Incomplete:
            ask = ask.and_what(record)
            continue
        if len(traced.jaxpr.in_avals) > len(jax.tree_util.tree_leaves(inputs_of(request, ask))):
            _check_leaks(request, ask)
        needed = needs(record, request)
        # A stream too many must go as well: `has_rng` would show it to the model, unlike in an `apply` by hand.
        if needed == ask:
            record.unused = unused(traced, request.arguments)
            record.unchanged = unchanged(traced, request, ask, record)
            return _without(traced, request, ask, record.unchanged), ask, record
        ask = needed
    raise RuntimeError(f"{request.name} asks for other streams in every trace")


def _check_leaks(request: TraceRequest, ask: Needs) -> None:
    """Raises JAX's error where the model uses a value of an earlier trace, which a trace alone takes for one more input."""
    closed = jax.make_jaxpr(_named(request, ask, CallTrace()))(*inputs_of(request, ask))
    for leaked in (constant for constant in closed.consts if isinstance(constant, jax.core.Tracer)):
        jax.jit(lambda value: value)(leaked)


class TracedCall(Struct, Generic[P], frozen=True):
    """A call traced with everything that it needs.

    Attributes:
      request: the request, completed: with ints that turned out to be static and the variables that the call takes.
      known: the cached result that `find` returned for it; then nothing was traced, and the rest is None or empty.
      traced: a `jax.stages.Traced`.
      needs: what the model was given.
      trace: what was observed.
    """

    request: TraceRequest
    known: P | None
    traced: Traced
    needs: Needs
    trace: CallTrace


def trace_call(request: TraceRequest, *, find: Find[P] = lambda request: None, add: Add | None = None) -> TracedCall[P]:
    """Traces a call, repeatedly until it is given what it asks for.

    An int whose value the model needs becomes static: each one alone is tried first, then all together. A collection
    that the call sows starts empty, because Flax would append to what is there. The variables may be shapes.

    Args:
      find: looks up a cached result for a request, which spares the trace.
      add: completes the variables by those that an init of this method makes; called at most once.

    Raises:
      MissingVariables: the model lacks variables, and there is no `add`.
      Exception: whatever the model raises.
    """
    try:
        return _with_variables(request, find, add)
    except Exception as error:
        if not is_tracer_error(error):
            raise
        numbers = request.arguments.numbers
        for names in [*((name,) for name in numbers), *([numbers] if len(numbers) > 1 else [])]:
            try:
                return _with_variables(replace(request, arguments=request.arguments.with_static(names)), find, add)
            except Exception as again:
                if not is_tracer_error(again):
                    raise again from None
        raise  # the first error: it is of the call as the user wrote it


def _with_variables(request: TraceRequest, find: Find[P], add: Add | None) -> TracedCall[P]:
    """Traces with missing variables added and sown collections emptied, until neither is needed."""
    while True:
        known = find(request)
        if known is not None:
            return TracedCall(request, known, None, request.guess, CallTrace())
        try:
            traced, ask, record = trace(request)
        except MissingVariables:
            if add is None:
                raise
            request, add = replace(request, variables=add(request.variables)), None
            continue
        sown = record.sown & set(request.variables)
        if not sown:
            return TracedCall(request, None, traced, ask, record)
        variables = {name: tree for name, tree in request.variables.items() if name not in sown}
        request = replace(request, variables=variables)


def inputs_of(request: TraceRequest, ask: Needs) -> tuple[Variables, Mapping[str, Words], Kwargs]:
    """The program's inputs: (variables, key data by stream, traced arguments). The keys' values do not matter here."""
    keys = {name: request.draw.words(name) for name in sorted(ask.streams)}
    return request.variables, keys, request.arguments.dynamic


def unchanged(traced: Traced, request: TraceRequest, ask: Needs, record: CallTrace) -> frozenset[tuple[str, str]]:
    """NNX variables (type, path) that the program returns as updates although they are its unmodified inputs.

    A transform inside the model, such as `nnx.jit`, returns all variables that it was given.
    """
    # What a linen model writes is returned as whole collections, which stay whole.
    types = (traced.out_info[1].keys() & request.variables.keys()) - record.written
    if not types:
        return frozenset()
    inputs, _ = jax.tree_util.tree_flatten_with_path(inputs_of(request, ask))
    outputs, _ = jax.tree_util.tree_flatten_with_path(traced.out_info)
    origins = forwarded(traced.jaxpr.jaxpr, repeated=request.draw.size is not None)
    same: dict[tuple[str, str], bool] = {}
    for (path, _), origin in zip(outputs, origins, strict=True):
        if path[0].idx == 1 and path[1].key in types:
            # `(output, updates)` there, `(variables, keys, arguments)` here.
            variable = (path[1].key, path[2].key)
            is_input = origin is not None and inputs[origin][0] == (jax.tree_util.SequenceKey(0), *path[1:])
            same[variable] = same.get(variable, True) and is_input
    return frozenset(variable for variable, is_same in same.items() if is_same)


def leave_out(updates: Variables, variables: Container[tuple[str, str]]) -> Updates:
    """`updates` without the given variables (type, path), and without types that become empty by that."""
    left = {}
    for name, tree in updates.items():
        inner = {path: value for path, value in tree.items() if (name, path) not in variables} if variables else tree
        if inner or not tree:
            left[name] = inner
    return left


def _without(traced: Traced, request: TraceRequest, ask: Needs, variables: frozenset[tuple[str, str]]) -> Traced:
    """The traced program without some of its updates: traced once more, as a function that drops these outputs."""
    if not variables:
        return traced
    run = jax.extend.core.jaxpr_as_fun(traced.jaxpr)
    tree = jax.tree_util.tree_structure(traced.out_info)

    def program(*inputs: PyTree) -> tuple[PyTree, Updates]:
        output, updates = jax.tree_util.tree_unflatten(tree, run(*jax.tree_util.tree_leaves(inputs)))
        return output, leave_out(updates, variables)

    program.__name__ = program.__qualname__ = request.name
    return jax.jit(program).trace(*inputs_of(request, ask))


PROGRAM_FILE = "<flax_magics>"
"""In the place of a file: where messages of JAX say that a program is."""


def _named(request: TraceRequest, ask: Needs, record: CallTrace) -> Function:
    """The function to compile. JAX's messages show its name, file and argument names, so they are the user's terms."""
    impl = request.draw.impl
    run = running(request, ask, record)

    def program(variables: Variables, keys: Mapping[str, jax.Array], arguments: Kwargs) -> PyTree:
        typed = {name: jax.random.wrap_key_data(words, impl=impl) for name, words in keys.items()}
        output, updates = _without_objects(run(variables, typed, arguments), record)
        if request.placement is not None and request.draw.size is None:
            # XLA is free to cut what it gives: the next run would be another program's.
            updates = request.placement.constrain(updates, request.model.annotations())
        return output, updates

    program.__name__ = program.__qualname__ = request.name
    program.__code__ = program.__code__.replace(co_filename=PROGRAM_FILE, co_firstlineno=1, co_name=request.name)
    return program


def _without_objects(result: PyTree, record: CallTrace) -> PyTree:
    """`result` with the arrays that an object holds in the place of the object, which a trace cannot give.

    `record` has the class of the first such.
    """

    def kept(leaf: Leaf) -> PyTree:
        if _is_of_jax(leaf):
            return leaf
        record.foreign = record.foreign or type(leaf).__name__
        return jax.tree_util.tree_map(lambda inner: inner if _is_of_jax(inner) else None, opened(leaf))

    return jax.tree_util.tree_map(kept, result)


def _is_of_jax(leaf: Leaf) -> bool:
    """Whether a program can give it."""
    if isinstance(leaf, (jax.Array, int, float, complex)):
        return True
    try:
        jax.typeof(leaf)
    except TypeError:
        return False
    return True


def running(request: TraceRequest, ask: Needs, record: CallTrace) -> Function:
    """`run(variables, keys, arguments) -> (output, updates)`; for a batch of draws all results get a leading axis."""
    forward = request.model.forward(request.method, ask, record, request.draw.impl)
    rebuild, size = request.arguments.rebuild, request.draw.size

    def one(variables: Variables, keys: PyTree, arguments: Kwargs) -> PyTree:
        return forward(variables, keys, *rebuild(arguments))

    def many(variables: Variables, keys: PyTree, arguments: Kwargs) -> PyTree:
        keyed = {name: value for name, value in arguments.items() if name in request.keyed}

        def draw(keys: PyTree, keyed: Kwargs) -> PyTree:
            return _without_objects(one(variables, keys, {**arguments, **keyed}), record)

        if request.draw.impl == THREEFRY:
            return jax.vmap(draw, axis_size=size)(keys, keyed)
        # Under `vmap` the other PRNG implementations (`rbg`) give other bits than for one key at a time.
        return jax.lax.scan(lambda _, each: (None, draw(*each)), None, (keys, keyed), length=size)[1]

    return one if size is None else many


def unused(traced: Traced, arguments: Arguments) -> frozenset[str]:
    """Names of the traced arguments that no equation of the program reads and that are no outputs."""
    jaxpr = traced.jaxpr.jaxpr
    names = sorted(arguments.dynamic)
    read = {id(var) for equation in jaxpr.eqns for var in equation.invars} | {id(var) for var in jaxpr.outvars}
    # The arguments are the last inputs, one leaf each, sorted as JAX flattens a dict.
    last = jaxpr.invars[len(jaxpr.invars) - len(names) :]
    return frozenset(name for name, var in zip(names, last, strict=True) if id(var) not in read)


def needs(record: CallTrace, request: TraceRequest) -> Needs:
    """What the model needs, according to a complete trace.

    `has_rng` alone does not count as asking for a stream. The exception is `has_rng('dropout')` in train mode, which
    some models use as their train/eval switch.
    """
    streams = set(record.asked) | record.held
    if request.mode == "train" and "dropout" in record.queried:
        streams.add("dropout")
    return Needs(frozenset(streams), frozenset(record.written) | request.mutable, frozenset(record.axes))


CALLS = ("jit", "pjit", "closed_call", "core_call", "checkpoint", "remat2", "custom_jvp_call", "custom_vjp_call")
"""Primitives whose equations run one inner jaxpr once, on the equation's own inputs."""


def forwarded(jaxpr: Jaxpr, *, repeated: bool = False) -> tuple[int | None, ...]:
    """For each output of a jaxpr the index of the input that it is unmodified, None for one that was computed.

    Args:
      repeated: an input that is broadcast along a new first axis counts, too: what is the same in a whole `vmap`.
    """
    inputs = {var: i for i, var in enumerate(jaxpr.invars)}
    makers = {var: (equation, i) for equation in jaxpr.eqns for i, var in enumerate(equation.outvars)}
    known: dict[int, tuple[int | None, ...]] = {}

    def origin(var: Atom) -> int | None:
        while not hasattr(var, "val") and var in makers:
            equation, i = makers[var]
            if id(equation) not in known:
                known[id(equation)] = _through(equation, repeated)
            through = known[id(equation)][i]
            if through is None:
                return None
            var = equation.invars[through]
        return None if hasattr(var, "val") else inputs.get(var)  # of literals and constants it is None

    return tuple(map(origin, jaxpr.outvars))


def _through(equation: Equation, repeated: bool) -> tuple[int | None, ...]:
    """`forwarded` for the outputs of one equation, by the jaxprs inside it."""
    name, params = equation.primitive.name, equation.params
    if name in CALLS:
        inner = _open(params.get("jaxpr", params.get("call_jaxpr")))
        if inner is not None and len(inner.invars) == len(equation.invars):
            return forwarded(inner, repeated=repeated)
    elif name == "scan":
        return _scan(equation)
    elif name == "while":  # a carry is forwarded if the body returns it unmodified
        of_condition, consts = params["cond_nconsts"], params["body_nconsts"]
        body = forwarded(_open(params["body_jaxpr"]))
        return tuple(of_condition + consts + i if through == consts + i else None for i, through in enumerate(body))
    elif name == "cond":  # only if all branches forward the same input, which comes after the index
        branches = zip(*(forwarded(_open(branch)) for branch in params["branches"]), strict=True)
        return tuple(1 + ways[0] if ways[0] is not None and len(set(ways)) == 1 else None for ways in branches)
    elif name in ("optimization_barrier", "sharding_constraint"):
        return tuple(range(len(equation.invars)))
    elif name == "broadcast_in_dim" and repeated:
        shape = equation.invars[0].aval.shape
        along = tuple(params["broadcast_dimensions"]) == tuple(range(1, len(shape) + 1))
        if along and tuple(params["shape"][1:]) == tuple(shape):
            return (0,)
    return (None,) * len(equation.outvars)


def scan_groups(params: Mapping[str, Any]) -> tuple[int, int]:
    """How many inputs of a scan are constants, and how many are carried; the rest is scanned over."""
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    # Newer versions of JAX keep the three groups as trees.
    consts, carries, _ = (len(list(group)) for group in params["ft_in"].unpack())
    return consts, carries


def _scan(equation: Equation) -> tuple[int | None, ...]:
    """`_through` for a scan: carries that each step returns unmodified, stacked outputs that are scanned inputs."""
    params = equation.params
    consts, carries = scan_groups(params)
    steps = forwarded(_open(params["jaxpr"]))
    if len(steps) != len(equation.outvars):
        return (None,) * len(equation.outvars)
    out: list[int | None] = []
    for i, through in enumerate(steps):
        same = through == consts + i if i < carries else through is not None and through >= consts + carries
        out.append(through if same else None)
    return tuple(out)


def _open(jaxpr: Jaxpr) -> Jaxpr:
    """The Jaxpr inside a ClosedJaxpr; a Jaxpr itself."""
    return getattr(jaxpr, "jaxpr", jaxpr)


TRACER_ERRORS = (
    # TracerBoolConversionError and the like are subclasses of the first.
    *(ConcretizationTypeError, TracerArrayConversionError, TracerIntegerConversionError, NonConcreteBooleanIndexError),
)
"""JAX's errors for traced code that needs a concrete value. A traced shape raises a bare TypeError instead."""


def is_tracer_error(error: BaseException) -> bool:
    """Whether an error says that the model needs the concrete value of a tracer."""
    return isinstance(error, TRACER_ERRORS) or (isinstance(error, TypeError) and "concrete values" in str(error))
