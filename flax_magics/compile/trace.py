"""What a program is made for, and its trace: done again until the model has all that it asks for, and no more."""

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

P = TypeVar("P")
Traced: TypeAlias = Any
"""A `jax.stages.Traced`."""
Add: TypeAlias = Callable[[Variables], Variables]


class TraceRequest(Struct, frozen=True):
    """All that a program is made for."""

    name: str
    model: Model
    method: Path
    arguments: Arguments
    variables: Variables
    draw: Draw | DrawBatch
    keyed: frozenset[str] = frozenset()
    """Arguments that have a key of the draw; of a series of draws, one key each."""
    mutable: frozenset[str] = frozenset()
    mode: str = "as written"
    """`train`, `eval` or `as written`."""
    guess: Needs = Needs()
    noted: bool = False
    """The record notes the calls of modules."""


Find: TypeAlias = Callable[[TraceRequest], P | None]


def trace(request: TraceRequest) -> tuple[Traced, Needs, CallTrace]:
    """Traces until the model has all that it asks for: `(jax.stages.Traced, what it was given, what was seen)`.

    A stream or collection is given only if the model asked for it in a trace; a guess that gave too much is corrected.
    """
    guess = request.guess
    ask = Needs(guess.streams | request.model.streams(), guess.mutable | request.mutable, guess.axes)
    for _ in range(16):
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
        if needed == ask:
            record.unused = unused(traced, request.arguments)
            record.unchanged = unchanged(traced, request, ask)
            return _without(traced, request, ask, record.unchanged), ask, record
        ask = needed
    raise RuntimeError(f"{request.name} asks for other streams in every trace")


def _check_leaks(request: TraceRequest, ask: Needs) -> None:
    """Raises JAX's error where the model uses a value of an earlier trace, which a trace alone takes for one more input."""
    closed = jax.make_jaxpr(_named(request, ask, CallTrace()))(*inputs_of(request, ask))
    for leaked in (constant for constant in closed.consts if isinstance(constant, jax.core.Tracer)):
        jax.jit(lambda value: value)(leaked)


class TracedCall(Struct, Generic[P], frozen=True):
    """A call traced with all that it needs.

    Attributes:
      request: what was asked for, with the ints that turned out to be static and the variables that the call takes.
      known: what `find` gave for that; then nothing was traced, and the rest is None or empty.
      traced: a `jax.stages.Traced`.
    """

    request: TraceRequest
    known: P | None
    traced: Traced
    needs: Needs
    trace: CallTrace


def trace_call(request: TraceRequest, *, find: Find[P] = lambda request: None, add: Add | None = None) -> TracedCall[P]:
    """Traces a call again until it has what it asks for.

    An int whose value the model needs is made static: one at a time, then all. A collection that the call sows starts
    empty, because Flax would append to what is there. The variables may be shapes.

    Args:
      find: gives what is kept for such a request, which spares the trace.
      add: the variables with those that an init makes besides. Asked once, where the model misses some.

    Raises:
      MissingVariables: the model misses variables, and there is no `add`. What the model raises is passed on.
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
        raise


def _with_variables(request: TraceRequest, find: Find[P], add: Add | None) -> TracedCall[P]:
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
    """What a program is traced for: variables, key data by stream, arguments. Which keys they are makes no difference."""
    keys = {name: request.draw.words(name) for name in sorted(ask.streams)}
    return request.variables, keys, request.arguments.dynamic


def unchanged(traced: Traced, request: TraceRequest, ask: Needs) -> frozenset[tuple[str, str]]:
    """Variables (type and path) that the program gives as written, and that are what went in: their writer only had them.

    Of models that hold their variables themselves.
    """
    if not request.model.holds_variables:
        return frozenset()
    inputs, _ = jax.tree_util.tree_flatten_with_path(inputs_of(request, ask))
    outputs, _ = jax.tree_util.tree_flatten_with_path(traced.out_info)
    origins = forwarded(traced.jaxpr.jaxpr, repeated=request.draw.size is not None)
    same: dict[tuple[str, str], bool] = {}
    for (path, _), origin in zip(outputs, origins, strict=True):
        if path[0].idx == 1 and path[1].key in request.variables:
            # `(output, updates)` there, `(variables, keys, arguments)` here.
            variable = (path[1].key, path[2].key)
            is_input = origin is not None and inputs[origin][0] == (jax.tree_util.SequenceKey(0), *path[1:])
            same[variable] = same.get(variable, True) and is_input
    return frozenset(variable for variable, is_same in same.items() if is_same)


def leave_out(updates: Variables, variables: Container[tuple[str, str]]) -> Updates:
    """`updates` without `variables`, and without the types of which nothing is left."""
    left = {}
    for name, tree in updates.items():
        inner = {path: value for path, value in tree.items() if (name, path) not in variables} if variables else tree
        if inner or not tree:
            left[name] = inner
    return left


def _without(traced: Traced, request: TraceRequest, ask: Needs, variables: frozenset[tuple[str, str]]) -> Traced:
    """The traced program without some of the variables that it writes."""
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
    """The function that is compiled. JAX's messages name it, where it is and its arguments: the user's words, not ours."""
    impl = request.draw.impl
    run = running(request, ask, record)

    def program(variables: Variables, keys: Mapping[str, jax.Array], arguments: Kwargs) -> PyTree:
        typed = {name: jax.random.wrap_key_data(words, impl=impl) for name, words in keys.items()}
        return _without_objects(run(variables, typed, arguments), record)

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
    """`run(variables, keys, arguments) -> (output, updates)`; of a series of draws, all with an axis in front."""
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
        # Mapped over keys, JAX's other generators give other bits than one by one.
        return jax.lax.scan(lambda _, each: (None, draw(*each)), None, (keys, keyed), length=size)[1]

    return one if size is None else many


def unused(traced: Traced, arguments: Arguments) -> frozenset[str]:
    """Names of the traced arguments that no equation of the program reads and that are not handed back."""
    jaxpr = traced.jaxpr.jaxpr
    names = sorted(arguments.dynamic)
    read = {id(var) for equation in jaxpr.eqns for var in equation.invars} | {id(var) for var in jaxpr.outvars}
    # The arguments come last, one leaf each, in the order in which JAX takes a dict apart.
    last = jaxpr.invars[len(jaxpr.invars) - len(names) :]
    return frozenset(name for name, var in zip(names, last, strict=True) if id(var) not in read)


def needs(record: CallTrace, request: TraceRequest) -> Needs:
    """What a complete trace shows that the model needs.

    `has_rng` alone is not asking, except that `--train` answers a model which uses `has_rng('dropout')` as its switch.
    """
    streams = set(record.asked) | record.held
    if request.mode == "train" and "dropout" in record.queried:
        streams.add("dropout")
    return Needs(frozenset(streams), frozenset(record.written) | request.mutable, frozenset(record.axes))


CALLS = ("jit", "pjit", "closed_call", "core_call", "checkpoint", "remat2", "custom_jvp_call", "custom_vjp_call")
"""Equations that run the one program they hold, on their own inputs, once."""


def forwarded(jaxpr: Jaxpr, *, repeated: bool = False) -> tuple[int | None, ...]:
    """For each output of a jaxpr the number of the input that it is, None for one that was worked out.

    Args:
      repeated: an input repeated along a new first axis counts, as what is the same in every row of a `vmap`.
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
    """The same for one equation."""
    name, params = equation.primitive.name, equation.params
    if name in CALLS:
        inner = _open(params.get("jaxpr", params.get("call_jaxpr")))
        if inner is not None and len(inner.invars) == len(equation.invars):
            return forwarded(inner, repeated=repeated)
    elif name == "scan":
        return _scan(equation)
    elif name == "while":
        before, consts = params["cond_nconsts"], params["body_nconsts"]
        body = forwarded(_open(params["body_jaxpr"]))
        return tuple(before + consts + i if through == consts + i else None for i, through in enumerate(body))
    elif name == "cond":
        branches = zip(*(forwarded(_open(branch)) for branch in params["branches"]), strict=True)
        return tuple(1 + ways[0] if ways[0] is not None and len(set(ways)) == 1 else None for ways in branches)
    elif name == "optimization_barrier":
        return tuple(range(len(equation.invars)))
    elif name == "broadcast_in_dim" and repeated:
        shape = equation.invars[0].aval.shape
        along = tuple(params["broadcast_dimensions"]) == tuple(range(1, len(shape) + 1))
        if along and tuple(params["shape"][1:]) == tuple(shape):
            return (0,)
    return (None,) * len(equation.outvars)


def _scan(equation: Equation) -> tuple[int | None, ...]:
    """A carry that every step hands on, and rows that every step gives back."""
    params = equation.params
    if "num_consts" in params:
        consts, carries = params["num_consts"], params["num_carry"]
    else:  # newer versions of JAX keep the three groups as trees
        consts, carries, _ = (len(list(group)) for group in params["ft_in"].unpack())
    steps = forwarded(_open(params["jaxpr"]))
    if len(steps) != len(equation.outvars):
        return (None,) * len(equation.outvars)
    out: list[int | None] = []
    for i, through in enumerate(steps):
        same = through == consts + i if i < carries else through is not None and through >= consts + carries
        out.append(through if same else None)
    return tuple(out)


def _open(jaxpr: Jaxpr) -> Jaxpr:
    """A jaxpr without its constants."""
    return getattr(jaxpr, "jaxpr", jaxpr)


TRACER_ERRORS = (
    # The conversions to bool and index are kinds of the first.
    *(ConcretizationTypeError, TracerArrayConversionError, TracerIntegerConversionError, NonConcreteBooleanIndexError),
)
"""What JAX raises when traced code needs a value; a shape that is traced is a TypeError without a kind of its own."""


def is_tracer_error(error: BaseException) -> bool:
    """Whether the model looked at a value while it was traced."""
    return isinstance(error, TRACER_ERRORS) or (isinstance(error, TypeError) and "concrete values" in str(error))
