"""An apply made ready to run: its variables, given, there or initialised, and its program, compiled, found or none."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import jax

from ..base.measures import Cost, Memory
from ..compile import reasons
from ..compile.cache import BuiltProgram, PendingProgram, Program, ProgramCache
from ..compile.initialise import Initialising, made_of, merged
from ..compile.limits import cost_of
from ..compile.trace import TracedCall, TraceRequest, is_tracer_error, leave_out, running, trace_call
from ..errors import FlaxMagicsError, written
from ..models.arguments import Arguments
from ..models.base import CallTrace, Incomplete, MissingVariables, Needs
from ..rng.keys import Draw, DrawBatch
from ..run import Cause, InitStats
from ..state.entry import ModelEntry
from ..state.weights import FOR_THIS_RUN, WeightSource, Written, check_alive, check_collections, check_state
from .call import BoundCall, Call, prepare_init, request_of, with_drawn_key

if TYPE_CHECKING:
    from ..line.options import ApplyOptions


@dataclass(frozen=True)
class Wanted:
    """One apply as it is wanted, which every step of it has to know.

    Attributes:
      call: with the keys that `--key` adds; `prepared`: the same, its mode set.
      on_phase: told what is being done, as it begins.
    """

    call: Call
    prepared: BoundCall
    options: ApplyOptions
    draw: Draw | DrawBatch
    programs: ProgramCache
    on_phase: Callable[[str], None]

    @property
    def op_by_op(self) -> bool:
        """Whether nothing is to be compiled."""
        return self.options.eager or bool(getattr(jax.config, "jax_disable_jit", False))


@dataclass(frozen=True)
class Start:
    """Variables to run with, and how they came about in this draw."""

    entry: ModelEntry
    variables: Mapping[str, Any]
    made: InitStats | None = None
    seconds: float = 0.0
    weights: str = ""
    """Whose they are."""
    taken: bool = False
    """The draw's `params` key went into variables: the run's own `params` stream must be another."""
    making: Initialising | None = None
    """Variables that are being made; until they are, `variables` is empty."""
    since: float = 0.0
    """When that began, on the clock of the programs."""


def start(entry: ModelEntry, wanted: Wanted, *, params_taken: bool) -> Start:
    """The variables to run with: given, there, or initialised in this draw.

    Args:
      params_taken: an init took this draw's `params` key already.

    Raises:
      FlaxMagicsError: the variables that are given are none, or `--key params` asks for the key that initialises.
    """
    options, call, programs = wanted.options, wanted.call, wanted.programs
    held = None if options.variables is not None else entry.held
    if "params" in options.key and (params_taken or (held is None and options.variables is None)):
        raise FlaxMagicsError(
            f"--key params: in this draw that key initialises `{entry.name}`.",
            **written(with_drawn_key(call, "params")),
        )
    taken = params_taken or "params" in options.key
    if options.variables is not None:
        given = options.variables
        line = Written(f"{options.line.replace('…', '{}')} {call.text}")
        if entry.model.holds_variables:
            check_state(entry.name, given, line, entry.model.module)
            given = entry.model.read_state(entry.name, given)
        else:
            taken = params_taken
            check_collections(entry.name, given, line)
        return Start(entry, given, weights=FOR_THIS_RUN, taken=taken)
    if held is not None:
        source = entry.source_now()
        whose = f" ({source.describe()})" if source is not None else ""
        check_alive(f"the weights of `{entry.name}`{whose}", held, f"%flax_init {call.text}")
        entry = entry if source is entry.source else replace(entry, source=source)
        weights = "" if source is None else source.describe(wanted.draw.first.seed)
        return Start(entry, held, weights=weights, taken=taken)
    wanted.on_phase(f"initialising {entry.name}")
    prepared = prepare_init(entry.name, entry.model, call)
    since = programs.clock()
    # An init that the session opened and whose variables were dropped since has used this key already.
    making = Initialising(
        prepared.model,
        call.method,
        prepared.args,
        prepared.kwargs,
        draw=wanted.draw.first,
        units=programs.units,
        taken=params_taken,
    )
    return Start(entry, {}, taken=True, making=making, since=since)


def make_both(start: Start, making: Initialising, wanted: Wanted) -> tuple[Start, Ready | None]:
    """Makes the variables while the program is compiled, for which their shapes are enough.

    The program is None where it has to be made once the variables are there: they do not tell their shapes before, or
    are not all that the call needs. Of the time until then, tracing both counts as trace, the rest as init.
    """
    programs = wanted.programs
    begun, since = None, start.since
    if making.expected is not None and not wanted.op_by_op:
        # The one thread traces the run, and another compiles meanwhile.
        making.begin()
        with contextlib.suppress(MissingVariables):
            begun = begin(start, making.expected, wanted, since)
        if isinstance(begun, PendingProgram):
            since = programs.clock()
        # What the program takes to compile is what has to be waited for, so it comes before many small ones.
        making.begin_rest()
        wanted.on_phase(f"initialising {start.entry.name}")
    variables, made = making.finish()
    seconds = programs.clock() - since
    source = WeightSource.initialised(wanted.draw.first, variables)
    entry = replace(start.entry, variables=variables, made=made, updates={}, outdated=False, source=source)
    weights = source.describe(wanted.draw.first.seed)
    start = Start(entry, variables, made_of(variables), seconds, weights=weights, taken=True)
    return start, None if begun is None else finish(start, begun, wanted, variables)


def make_ready(start: Start, wanted: Wanted) -> Ready:
    """The program for variables that are there: found, or built."""
    if wanted.op_by_op:
        return eager(start, wanted)
    return finish(start, begin(start, start.variables, wanted), wanted)


def with_added(start: Start, wanted: Wanted, error: MissingVariables) -> Start:
    """Adds the variables that a method needs and the first init did not make, from the first init's key."""
    entry, call, programs = start.entry, wanted.call, wanted.programs
    if wanted.options.variables is not None or (start.made is not None and start.made.added):
        raise error.__cause__ or error
    key = entry.made.key if entry.made is not None else wanted.draw.first.stream("params", taken=start.taken)
    prepared = prepare_init(entry.name, entry.model, call)
    begin = programs.clock()
    fresh = prepared.model.init(key, call.method, prepared.args, prepared.kwargs)
    jax.block_until_ready(fresh)
    seconds = programs.clock() - begin
    variables, added = merged(start.variables, fresh)
    if not jax.tree_util.tree_leaves(added):
        raise error.__cause__ or error
    made = made_of(added, added=True)
    source = entry.source and entry.source.over(variables)
    entry = replace(entry, variables=variables, source=source)
    return replace(start, entry=entry, variables=variables, made=made, seconds=seconds, taken=True)


def _request(start: Start, variables: Mapping[str, Any], wanted: Wanted) -> TraceRequest:
    return request_of(start.entry, wanted.prepared, wanted.draw, variables, wanted.options)


RESUMED = "begun by the run that was interrupted"


@dataclass
class Ready:
    """What to run, and what it was found to need. An eager run may find out more while it runs."""

    run: Callable[[], Any]
    """Gives `(output, updates)` when the device has finished."""
    variables: Mapping[str, Any]
    arguments: Arguments
    ask: Needs
    record: CallTrace
    origin: str
    reason: str = ""
    causes: tuple[Cause, ...] = ()
    trace: float = 0.0
    lower: float = 0.0
    compile: float = 0.0
    beside: float = 0.0
    memory: Memory | None = None
    device: str | None = None
    program: Program | None = None
    """The program, where the next run of the same call would find it again."""
    cost: Callable[[], Cost | None] = field(default=lambda: None, repr=False)
    """What XLA counts in the program."""
    scalars: Mapping[str, str] = field(default_factory=dict)
    """Arguments that are Python numbers, and were arrays in the model's run before."""


def begin(
    start: Start, variables: Mapping[str, Any], wanted: Wanted, since: float | None = None
) -> PendingProgram | BuiltProgram:
    """Finds the program, or traces and lowers it and has it compiled. The variables may be shapes."""
    name = start.entry.name
    request = _request(start, variables, wanted)
    return wanted.programs.start(request, lambda phase: wanted.on_phase(f"{phase} {name}"), since)


def finish(
    start: Start, begun: PendingProgram | BuiltProgram, wanted: Wanted, variables: Mapping[str, Any] | None = None
) -> Ready:
    """Waits until the program is compiled, and says why it is new.

    Args:
      variables: those to run with, where `begin` was given shapes.
    """
    programs, name = wanted.programs, start.entry.name
    built = programs.finish(begun, lambda phase: wanted.on_phase(f"{phase} {name}"))
    program, request, key = built.program, built.request, built.key
    if variables is not None:
        request = replace(request, variables={kind: variables[kind] for kind in request.variables})
    arguments = request.arguments
    last, now = programs.parts.get(name), reasons.ran(request.method, arguments, key)
    timing = built.timing
    ready = Ready(
        lambda: None, request.variables, arguments, program.ask, program.record, built.origin,
        trace=timing.trace, lower=timing.lower, compile=timing.compile, beside=timing.beside,
    )  # fmt: skip
    if built is not begun:
        purpose = reasons.purpose(key, request)
        if built.origin == "compiled":
            known = programs.purposes.get(name)
            ready.causes = reasons.compare(known, last, purpose) if known else ()
            ready.reason = reasons.sentence(ready.causes) + ("; " + RESUMED if built.resumed else "")
        reasons.remember(programs.purposes, name, purpose)
    programs.parts[name] = now
    ready.memory, ready.device, ready.scalars = program.memory, program.device, reasons.scalars(last, now)
    ready.cost = functools.partial(cost_of, program.executable)
    ready.program = program if key is not None else None
    draw = wanted.draw
    keys = {
        stream: draw.words(stream, taken=start.taken and stream == "params") for stream in sorted(program.ask.streams)
    }

    def run() -> Any:
        return programs.run(program, request.variables, keys, arguments.dynamic)

    ready.run = run
    return ready


def eager(start: Start, wanted: Wanted) -> Ready:
    """Runs op by op, as by hand. What the model asks for is found by shapes; if it cannot be traced, by running it."""
    request, draw, programs = _request(start, start.variables, wanted), wanted.draw, wanted.programs
    try:
        call: TracedCall[None] = trace_call(request)
        request, ask, traced = call.request, call.needs, call.record
    except Exception as error:
        if not is_tracer_error(error):
            raise
        streams = request.guess.streams | {"dropout"} | request.model.streams()
        ask, traced = Needs(streams, request.guess.mutable | request.mutable), CallTrace()
    ready = Ready(lambda: None, request.variables, request.arguments, ask, traced, "eager")

    def run() -> Any:
        while True:
            record = CallTrace()
            keys = {
                name: draw.stream(name, taken=start.taken and name == "params") for name in sorted(ready.ask.streams)
            }
            try:
                output, updates = running(request, ready.ask, record)(
                    request.variables, keys, request.arguments.dynamic
                )
            except Incomplete:
                ready.ask = ready.ask.and_what(record)
                continue
            result = output, leave_out(updates, traced.unchanged)
            programs.unfinished.wait = functools.partial(jax.block_until_ready, result)
            jax.block_until_ready(result)
            jax.effects_barrier()
            programs.unfinished.wait = None
            ready.record = record.with_what(traced)
            return result

    ready.run = run
    return ready
