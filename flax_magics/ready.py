"""A model made ready to run: compiled, found among the kept programs, or eager."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import jax

from .arguments import Arguments, signature_of
from .fingerprint import fingerprint
from .keys import Draw, Series
from .models import Ask, Incomplete, Path, Record
from .prepare import Prepared
from .program import Program, Programs, Request, leave_out, running, settings, trace
from .run import Memory, describe

TRACER_ERRORS = (
    jax.errors.ConcretizationTypeError,  # and the conversions to bool and index, which are kinds of it
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerIntegerConversionError,
    jax.errors.NonConcreteBooleanIndexError,
)
"""What JAX raises when traced code needs a value; a shape that is traced is a TypeError without a kind of its own."""


def is_tracer_error(error: BaseException) -> bool:
    """Whether the model looked at a value while it was traced."""
    return isinstance(error, TRACER_ERRORS) or (isinstance(error, TypeError) and "concrete values" in str(error))


_NUMBER = "a Python "


@dataclass
class Ready:
    """What to run, and what it was found to need. An eager run may find out more while it runs."""

    run: Callable[[], Any]
    """Gives `(output, updates)` when the device has finished, and sets `after`."""
    variables: Mapping[str, Any]
    arguments: Arguments
    ask: Ask
    record: Record
    origin: str
    reason: str = ""
    trace: float = 0.0
    lower: float = 0.0
    compile: float = 0.0
    memory: Memory | None = None
    device: str | None = None
    program: Program | None = None
    """The program, where the next run of the same call would find it again."""
    after: Any = None
    """Key data of the root that the next draw splits, where the program worked it out."""
    scalars: tuple[str, ...] = ()
    """Arguments that are Python numbers, and were arrays in the model's run before."""


@dataclass(frozen=True)
class Job:
    """What is to be run: a prepared call of a registered model with variables."""

    name: str
    edition: bytes | None
    """Fingerprint of the model as it was registered."""
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
            self.taken,
            self.keyed,
            self.mutable,
            self.prepared.mode == "train",
            self.guess,
        )


def compiled(job: Job, programs: Programs) -> Ready:
    """Finds the program or builds it. An int whose value the model needs is made static, one at a time, then all."""
    arguments = job.arguments(job.forced)
    try:
        return _compiled(job, arguments, programs)
    except Exception as error:
        if not is_tracer_error(error):
            raise
        names = arguments.numbers
        for more in [*({name} for name in names), *([set(names)] if len(names) > 1 else [])]:
            try:
                return _compiled(job, job.arguments(job.forced | more), programs)
            except Exception as again:
                if not is_tracer_error(again):
                    raise again from None
        raise


def _compiled(job: Job, arguments: Arguments, programs: Programs) -> Ready:
    key = _call_key(job, arguments)
    program = programs.find(key, job.taken)
    parts = _parts(job, arguments)
    scalars = _scalars(programs.parts.get(job.name), parts, arguments)
    if program is not None:
        ready = Ready(lambda: None, job.variables, arguments, program.ask, program.record, "reused")
    else:
        built = programs.build(key, job.request(arguments), job.phase)
        program = built.program
        stale = program.record.sown & set(job.variables)
        if stale:  # a sown collection starts empty: Flax would append to what is there
            programs.forget(program)
            left = {name: tree for name, tree in job.variables.items() if name not in stale}
            return _compiled(replace(job, variables=left), arguments, programs)
        reason = _reason(programs.parts.get(job.name), parts) if built.origin == "compiled" else ""
        ready = Ready(
            lambda: None, job.variables, arguments, program.ask, program.record, built.origin, reason,
            built.trace, built.lower, built.compile,
        )  # fmt: skip
    programs.parts[job.name] = parts
    ready.memory, ready.device, ready.scalars = program.memory, program.device, scalars
    ready.program = program if key is not None else None
    root = job.draw.words

    def run() -> Any:
        result, ready.after = program(job.variables, root, arguments.dynamic)
        program.wait((result, ready.after))
        return result

    ready.run = run
    return ready


def eager(job: Job) -> Ready:
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
            taken = {"params": job.taken}
            keys = {name: job.draw.stream(name, taken=taken.get(name, False)) for name in sorted(ready.ask.streams)}
            try:
                output, updates = running(request, ready.ask, record)(job.variables, keys, arguments.dynamic)
            except Incomplete:
                ready.ask = ready.ask.and_what(record)
                continue
            result = output, leave_out(updates, traced.unchanged)
            jax.block_until_ready(result)
            jax.effects_barrier()
            ready.record = record.with_what(traced)
            return result

    ready.run = run
    return ready


def _call_key(job: Job, arguments: Arguments) -> Hashable | None:
    """Equal keys mean that tracing would give the same program; None if that cannot be told."""
    model = job.prepared.model.key()
    static = fingerprint(arguments.static)
    if model is None or static is None:
        return None
    leaves, treedef = jax.tree_util.tree_flatten(job.variables)
    key = (
        job.name,
        model,
        job.method,
        static,
        arguments.treedef,
        arguments.traced,
        tuple(map(signature_of, arguments.dynamic.values())),
        treedef,
        tuple(map(signature_of, leaves)),
        job.mutable,
        job.prepared.mode == "train",
        job.draw.impl,
        job.draw.size,
        job.keyed,
        settings(),
    )
    try:
        hash(key)
    except TypeError:
        return None
    return key


def _parts(job: Job, arguments: Arguments) -> dict[str, str]:
    """What a program was made for, by name, as a person would say it."""
    parts = {"model": repr(job.edition), "mode": job.prepared.mode, "method": ".".join(job.method) or "the call"}
    for name, leaf, traced in zip(arguments.names, arguments.leaves, arguments.traced, strict=True):
        if traced and not hasattr(leaf, "dtype"):
            parts[name] = f"{_NUMBER}{type(leaf).__name__}"
        else:
            parts[name] = describe(leaf)
    parts["draws"] = "1" if job.draw.size is None else f"{job.draw.size} at once"
    parts["settings"] = repr(settings())
    return parts


def _scalars(before: Mapping[str, str] | None, now: Mapping[str, str], arguments: Arguments) -> tuple[str, ...]:
    if before is None or before["method"] != now["method"]:
        return ()
    numbers = (name for name in arguments.names if now[name].startswith(_NUMBER))
    return tuple(name for name in numbers if re.fullmatch(r"\w+\[[\d,]*\]", before.get(name, "")))


def _reason(before: Mapping[str, str] | None, now: Mapping[str, str]) -> str:
    """Why a program is new, in a few words."""
    if before is None:
        return "first run of this program"
    for name in dict.fromkeys([*before, *now]):
        old, new = before.get(name), now.get(name)
        if old == new:
            continue
        if name == "model":
            return "the model changed"
        if name == "settings":
            return "JAX's settings changed"
        if old is None or new is None:
            return f"{name}: {'not given before' if old is None else 'given before'}"
        return f"{name}: {old} → {new}"
    return "what the model reads changed"
