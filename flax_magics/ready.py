"""A model made ready to run: compiled, found among the kept programs, or eager."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import jax

from . import reasons
from .arguments import Arguments, signature_of
from .compiling import is_unknown, settings
from .fingerprint import fingerprint
from .keys import Draw, Series
from .library import library
from .models import Ask, Incomplete, Path, Record
from .prepare import Prepared
from .program import Building, Program, Programs
from .roofline import cost_of
from .run import Cause, Cost, Memory
from .structure import Structure
from .tracing import Request, leave_out, running, trace

TRACER_ERRORS = (
    jax.errors.ConcretizationTypeError,  # and the conversions to bool and index, which are kinds of it
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerIntegerConversionError,
    jax.errors.NonConcreteBooleanIndexError,
)
"""What JAX raises when traced code needs a value; a shape that is traced is a TypeError without a kind of its own."""


RESUMED = "begun by the run that was interrupted"


def is_tracer_error(error: BaseException) -> bool:
    """Whether the model looked at a value while it was traced."""
    return isinstance(error, TRACER_ERRORS) or (isinstance(error, TypeError) and "concrete values" in str(error))


@dataclass
class Ready:
    """What to run, and what it was found to need. An eager run may find out more while it runs."""

    run: Callable[[], Any]
    """Gives `(output, updates)` when the device has finished."""
    variables: Mapping[str, Any]
    arguments: Arguments
    ask: Ask
    record: Record
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
    prepared: Prepared
    method: Path
    variables: Mapping[str, Any]
    mutable: frozenset[str]
    draw: Draw | Series
    taken: bool
    """The first draw's `params` key went into variables."""
    keyed: frozenset[str]
    """Arguments that have a key of the draw."""
    guess: Ask
    forced: frozenset[str]
    phase: Callable[[str], None] = field(repr=False)

    def takes(self, name: str) -> bool:
        """Whether a stream's key of the draw went to something else: see `Draw.stream`."""
        return self.taken and name == "params"

    def arguments(self, forced: frozenset[str]) -> Arguments:
        """The arguments, with the ints of `forced` as part of the program."""
        prepared = self.prepared
        return Arguments.of(prepared.args, prepared.kwargs, prepared.signature, forced)

    def request(self, arguments: Arguments) -> Request:
        """What a program for this job is made for."""
        return Request(
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
    building: Building | None


def compiled(job: Job, programs: Programs) -> Ready:
    """Finds the program or builds it. An int whose value the model needs is made static, one at a time, then all."""
    return finish(begin(job, programs), programs)


def begin(job: Job, programs: Programs, since: float | None = None) -> Begun:
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


def static_choices(arguments: Arguments) -> list[set[str]]:
    """The ints that a model may need the value of: one at a time, then all."""
    names = arguments.numbers
    return [*({name} for name in names), *([set(names)] if len(names) > 1 else [])]


def _begin(job: Job, arguments: Arguments, programs: Programs, since: float | None) -> Begun:
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


def finish(begun: Begun, programs: Programs, variables: Mapping[str, Any] | None = None) -> Ready:
    """Waits for what was begun. `variables`: those to run with, where the job had shapes."""
    job = begun.job if variables is None else replace(begun.job, variables=variables)
    arguments, key, program = begun.arguments, begun.key, begun.program
    last, now = programs.parts.get(job.name), reasons.ran(job.method, arguments, key)
    if program is not None:
        ready = Ready(lambda: None, job.variables, arguments, program.ask, program.record, "reused")
    else:
        assert begun.building is not None
        built = programs.finish(begun.building, job.phase)
        program = built.program
        ready = Ready(
            lambda: None, job.variables, arguments, program.ask, program.record, built.origin,
            trace=built.trace, lower=built.lower, compile=built.compile, beside=built.beside,
        )  # fmt: skip
        purpose = _purpose(job, arguments, key)
        if built.origin == "compiled":
            known = programs.purposes.get(job.name)
            ready.causes = reasons.compare(known, last, purpose) if known else ()
            ready.reason = reasons.sentence(ready.causes) + ("; " + RESUMED if built.resumed else "")
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


def eager(job: Job, programs: Programs) -> Ready:
    """Runs op by op, as by hand. What the model asks for is found by shapes; if it cannot be traced, by running it."""
    arguments = job.arguments(job.forced)
    request = job.request(arguments)
    try:
        _, ask, record = trace(request)
    except Exception as error:
        if not is_tracer_error(error):
            raise
        streams = job.guess.streams | {"dropout"} | job.prepared.model.streams()
        ask, record = Ask(streams, job.guess.mutable | job.mutable), Record()
    ready = Ready(lambda: None, job.variables, arguments, ask, record, "eager")
    traced = record

    def run() -> Any:
        while True:
            record = Record()
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
    model = job.prepared.model.key()
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


def _purpose(job: Job, arguments: Arguments, key: Hashable | None) -> reasons.Purpose:
    """What the program is made for."""
    options = {}
    if job.mutable:
        options["--mutable"] = ", ".join(sorted(job.mutable))
    if job.draw.size is not None:
        options["--draws"] = str(job.draw.size)
    if job.keyed:
        options["--key"] = ", ".join(sorted(job.keyed))
    model, mode, keys = job.prepared.model, job.prepared.mode, job.draw.impl
    return reasons.purpose(key, job.method, mode, model.print(), model.module, arguments, job.variables, options, keys)
