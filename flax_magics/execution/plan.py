"""An apply made ready to run: its variables, given, there or initialised, and its program, compiled, found or none."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import jax

from ..base.measures import Cost, Memory
from ..code.fingerprint import fingerprint
from ..code.library import library
from ..code.structure import Structure
from ..compile import reasons
from ..compile.cache import PendingProgram, Program, ProgramCache
from ..compile.compiler import is_unknown, settings
from ..compile.initialise import Initialising, made_of, merged
from ..compile.limits import cost_of
from ..compile.trace import TraceRequest, is_tracer_error, leave_out, running, static_choices, trace
from ..errors import FlaxMagicsError, written
from ..models.arguments import Arguments, signature_of
from ..models.base import CallTrace, Incomplete, MissingVariables, Needs
from ..models.calls import Path
from ..rng.keys import Draw, DrawBatch
from ..run import Cause, InitStats
from ..state.entry import ModelEntry
from ..state.weights import FOR_THIS_RUN, WeightSource, Written, check_alive, check_collections, check_state
from .call import BoundCall, Call, prepare_init, with_drawn_key

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
            begun = begin(_job(start, making.expected, wanted), programs, since)
        if begun is not None and begun.building is not None:
            since = programs.clock()
        # What the program takes to compile is what has to be waited for, so it comes before many small ones.
        making.begin_rest()
        wanted.on_phase(f"initialising {start.entry.name}")
    variables, made = making.finish()
    seconds = programs.clock() - since
    source = WeightSource.initialised(wanted.draw.first, variables)
    entry = replace(start.entry, variables=variables, init=made, update_counts={}, outdated=False, source=source)
    weights = source.describe(wanted.draw.first.seed)
    start = Start(entry, variables, made_of(variables), seconds, weights=weights, taken=True)
    return start, None if begun is None else finish(begun, programs, variables)


def make_ready(start: Start, wanted: Wanted) -> Ready:
    """The program for variables that are there: found, or built."""
    job = _job(start, start.variables, wanted)
    return eager(job, wanted.programs) if wanted.op_by_op else compiled(job, wanted.programs)


def with_added(start: Start, wanted: Wanted, error: MissingVariables) -> Start:
    """Adds the variables that a method needs and the first init did not make, from the first init's key."""
    entry, call, programs = start.entry, wanted.call, wanted.programs
    if wanted.options.variables is not None or (start.made is not None and start.made.added):
        raise error.__cause__ or error
    key = entry.init.key if entry.init is not None else wanted.draw.first.stream("params", taken=start.taken)
    prepared = prepare_init(entry.name, entry.model, call)
    model = prepared.model
    assert not model.holds_variables  # an NNX module lacks none
    begin = programs.clock()
    fresh = model.init(key, call.method, prepared.args, prepared.kwargs)
    jax.block_until_ready(fresh)
    seconds = programs.clock() - begin
    variables, added = merged(start.variables, fresh)
    if not jax.tree_util.tree_leaves(added):
        raise error.__cause__ or error
    made = made_of(added, added=True)
    source = entry.source and entry.source.over(variables)
    entry = replace(entry, variables=variables, source=source)
    return replace(start, entry=entry, variables=variables, made=made, seconds=seconds, taken=True)


def _job(start: Start, variables: Mapping[str, Any], wanted: Wanted) -> Job:
    entry, call, prepared, options = start.entry, wanted.call, wanted.prepared, wanted.options
    return Job(
        name=entry.name,
        prepared=prepared,
        method=call.method,
        variables=variables,
        mutable=frozenset(options.mutable),
        draw=wanted.draw,
        taken=start.taken,
        keyed=frozenset(options.key if wanted.draw.size is not None else ()),
        guess=entry.known_needs.get((call.method, prepared.mode), Needs()),
        forced=frozenset(name for method, name in entry.static_ints if method == call.method),
        phase=lambda phase: wanted.on_phase(f"{phase} {entry.name}"),
    )


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


@dataclass(frozen=True)
class Job:
    """What is to be run: a prepared call of a registered model with variables."""

    name: str
    prepared: BoundCall
    method: Path
    variables: Mapping[str, Any]
    mutable: frozenset[str]
    draw: Draw | DrawBatch
    taken: bool
    """The first draw's `params` key went into variables."""
    keyed: frozenset[str]
    """Arguments that have a key of the draw."""
    guess: Needs
    forced: frozenset[str]
    phase: Callable[[str], None] = field(repr=False)

    def takes(self, name: str) -> bool:
        """Whether a stream's key of the draw went to something else: see `Draw.stream`."""
        return self.taken and name == "params"

    def arguments(self, forced: frozenset[str]) -> Arguments:
        """The arguments, with the ints of `forced` as part of the program."""
        prepared = self.prepared
        return Arguments.of(prepared.args, prepared.kwargs, prepared.signature, forced)

    def request(self, arguments: Arguments) -> TraceRequest:
        """What a program for this job is made for."""
        return TraceRequest(
            self.name,
            self.prepared.model,
            self.method,
            arguments,
            self.variables,
            self.draw,
            self.keyed,
            self.mutable,
            self.prepared.mode == "train",
            self.guess,
        )


@dataclass(frozen=True)
class Begun:
    """A program for a job: found, or traced and lowered and being compiled."""

    job: Job
    arguments: Arguments
    key: Hashable | None
    program: Program | None
    building: PendingProgram | None


def compiled(job: Job, programs: ProgramCache) -> Ready:
    """Finds the program or builds it. An int whose value the model needs is made static, one at a time, then all."""
    return finish(begin(job, programs), programs)


def begin(job: Job, programs: ProgramCache, since: float | None = None) -> Begun:
    """`compiled`, up to where the compilation has to be waited for. The variables of the job may be shapes.

    `since`: when the tracing began, on the clock of the programs, if that was before.
    """
    arguments = job.arguments(job.forced)
    try:
        return _begin(job, arguments, programs, since)
    except Exception as error:
        if not is_tracer_error(error):
            raise
        for more in static_choices(arguments):
            try:
                return _begin(job, job.arguments(job.forced | more), programs, since)
            except Exception as again:
                if not is_tracer_error(again):
                    raise again from None
        raise


def _begin(job: Job, arguments: Arguments, programs: ProgramCache, since: float | None) -> Begun:
    key = _call_key(job, arguments)
    program = programs.find(key)
    building = None
    if program is None:
        building = programs.start(key, job.request(arguments), job.phase, since)
        stale = building.record.sown & set(job.variables)
        if stale:  # a sown collection starts empty: Flax would append to what is there
            left = {name: tree for name, tree in job.variables.items() if name not in stale}
            return _begin(replace(job, variables=left), arguments, programs, since)
    return Begun(job, arguments, key, program, building)


def finish(begun: Begun, programs: ProgramCache, variables: Mapping[str, Any] | None = None) -> Ready:
    """Waits for what was begun. `variables`: those to run with, where the job had shapes."""
    job = begun.job if variables is None else replace(begun.job, variables=variables)
    arguments, key, program = begun.arguments, begun.key, begun.program
    last, now = programs.parts.get(job.name), reasons.ran(job.method, arguments, key)
    if program is not None:
        ready = Ready(lambda: None, job.variables, arguments, program.ask, program.record, "reused")
    else:
        assert begun.building is not None
        program, origin, timing = programs.finish(begun.building, job.phase)
        ready = Ready(
            lambda: None, job.variables, arguments, program.ask, program.record, origin,
            trace=timing.trace, lower=timing.lower, compile=timing.compile, beside=timing.beside,
        )  # fmt: skip
        purpose = reasons.purpose(job.request(arguments), key, job.prepared.mode)
        if origin == "compiled":
            known = programs.purposes.get(job.name)
            ready.causes = reasons.compare(known, last, purpose) if known else ()
            ready.reason = reasons.sentence(ready.causes) + ("; " + RESUMED if begun.building.resumed else "")
        reasons.remember(programs.purposes, job.name, purpose)
    programs.parts[job.name] = now
    ready.memory, ready.device, ready.scalars = program.memory, program.device, reasons.scalars(last, now)
    ready.cost = functools.partial(cost_of, program.executable)
    ready.program = program if key is not None else None
    keys = {name: job.draw.words(name, taken=job.takes(name)) for name in sorted(program.ask.streams)}

    def run() -> Any:
        return programs.run(program, job.variables, keys, arguments.dynamic)

    ready.run = run
    return ready


def eager(job: Job, programs: ProgramCache) -> Ready:
    """Runs op by op, as by hand. What the model asks for is found by shapes; if it cannot be traced, by running it."""
    arguments = job.arguments(job.forced)
    request = job.request(arguments)
    try:
        _, ask, record = trace(request)
    except Exception as error:
        if not is_tracer_error(error):
            raise
        streams = job.guess.streams | {"dropout"} | job.prepared.model.streams()
        ask, record = Needs(streams, job.guess.mutable | job.mutable), CallTrace()
    ready = Ready(lambda: None, job.variables, arguments, ask, record, "eager")
    traced = record

    def run() -> Any:
        while True:
            record = CallTrace()
            keys = {name: job.draw.stream(name, taken=job.takes(name)) for name in sorted(ready.ask.streams)}
            try:
                output, updates = running(request, ready.ask, record)(job.variables, keys, arguments.dynamic)
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


def _call_key(job: Job, arguments: Arguments) -> Hashable | None:
    """Equal keys mean that tracing would give the same program; None if that cannot be told."""
    model = job.prepared.model.cache_key()
    static = fingerprint(arguments.static)
    leaves, treedef = jax.tree_util.tree_flatten(job.variables)
    passed, variables = Structure.of(arguments.treedef), Structure.of(treedef)
    now = settings()
    if None in (model, static, passed.contents, variables.contents) or is_unknown(now):
        return None
    key = (
        job.name,
        model,
        job.method,
        static,
        passed,
        arguments.traced,
        tuple(map(signature_of, arguments.dynamic.values())),
        variables,
        tuple(map(signature_of, leaves)),
        job.mutable,
        job.prepared.mode == "train",
        job.draw.impl,
        job.draw.size,
        job.keyed,
        now,
        library.edition,
    )
    try:
        hash(key)
    except TypeError:
        return None
    return key
