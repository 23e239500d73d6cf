"""What an apply begins with: its variables, given, there or initialised, and the program for them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import jax

from .errors import FlaxMagicsError, written
from .initialising import Initialising
from .keys import Draw, Series
from .models import Ask, MissingVariables
from .notes import made_of
from .prepare import Call, Prepared, prepare_init, with_drawn_key
from .program import Programs
from .ready import Job, Ready, begin, compiled, eager, finish
from .registry import Entry
from .run import Made
from .weights import FOR_THIS_RUN, Source, Written, check_alive, check_collections, check_state

if TYPE_CHECKING:
    from .execution import Options


@dataclass(frozen=True)
class Wanted:
    """One apply as it is wanted, which every step of it has to know.

    Attributes:
      call: with the keys that `--key` adds; `prepared`: the same, its mode set.
      on_phase: told what is being done, as it begins.
    """

    call: Call
    prepared: Prepared
    options: Options
    draw: Draw | Series
    programs: Programs
    on_phase: Callable[[str], None]

    @property
    def op_by_op(self) -> bool:
        """Whether nothing is to be compiled."""
        return self.options.eager or bool(getattr(jax.config, "jax_disable_jit", False))


@dataclass(frozen=True)
class Start:
    """Variables to run with, and how they came about in this draw."""

    entry: Entry
    variables: Mapping[str, Any]
    made: Made | None = None
    seconds: float = 0.0
    weights: str = ""
    """Whose they are."""
    taken: bool = False
    """The draw's `params` key went into variables: the run's own `params` stream must be another."""
    making: Initialising | None = None
    """Variables that are being made; until they are, `variables` is empty."""
    since: float = 0.0
    """When that began, on the clock of the programs."""


def start(entry: Entry, wanted: Wanted, *, params_taken: bool) -> Start:
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
    making = Initialising(prepared, call.method, wanted.draw.first, programs.units, taken=params_taken)
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
    source = Source.initialised(wanted.draw.first, variables)
    entry = replace(start.entry, variables=variables, made=made, updates={}, outdated=False, source=source)
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


def merged(old: Mapping[str, Any], new: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """`old` with what only `new` has, and that part alone. What is there is never replaced."""
    both, added = dict(old), {}
    for name, item in new.items():
        if name not in old:
            both[name] = added[name] = item
        elif isinstance(item, Mapping) and isinstance(old[name], Mapping):
            both[name], inside = merged(old[name], item)
            if inside:
                added[name] = inside
    return both, added


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
        guess=entry.guesses.get((call.method, prepared.mode), Ask()),
        forced=frozenset(name for method, name in entry.forced if method == call.method),
        phase=lambda phase: wanted.on_phase(f"{phase} {entry.name}"),
    )
