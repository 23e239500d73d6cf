"""One apply, from a call to its result. Reads the session's records and gives new ones; changes nothing itself."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import jax
from flax import errors as flax_errors

from ..base.environment import devices_of, name_devices
from ..base.measures import Cost, Limits, Memory, Steady, Timing
from ..base.text import join
from ..compile.cache import ProgramCache
from ..compile.limits import devices_in, dtype_of, is_out_of_memory, limits, out_of_memory, with_peak
from ..errors import FlaxMagicsError, did_you_mean, written
from ..line.variant import Line, with_arguments, without_option
from ..models.base import ARGUMENTS, SOWN, CallTrace, Commit, MissingVariables, Model, Needs
from ..models.linen_trace import inside
from ..models.switch import written_in_call
from ..rng.keys import SPLIT, Draw, DrawBatch, RunKeys
from ..run import Cause, InitStats, Note
from ..state.entry import ModelEntry
from . import plan
from .call import BoundCall, Call, prepare, with_drawn_key
from .notes import SeenKeys, of_mode, of_mutable, of_params, of_rngs, of_scalars, of_streams, of_unused
from .plan import Ready, Wanted, make_both, make_ready, with_added

if TYPE_CHECKING:
    from ..line.options import ApplyOptions


@dataclass(frozen=True)
class Execution:
    """What one apply did and found (see `Run` for the fields of the same name), and the entry as it is to be kept."""

    entry: ModelEntry
    inputs: Any
    output: Any
    sown: Mapping[str, Any]
    keys: Mapping[str, Any]
    used: Mapping[str, tuple[str, ...]]
    changed: Mapping[str, int]
    device: str
    program: str
    reason: str
    causes: tuple[Cause, ...]
    mode: str
    switch: tuple[str, ...]
    static: tuple[str, ...]
    timing: Timing
    memory: Memory | None
    cost: Cost | None
    limits: Limits | None
    notes: tuple[Note, ...]
    made: InitStats | None
    by_hand: str
    weights: str
    """Whose variables ran."""
    keys_in_call: tuple[bytes, ...]
    """Data of keys that the user passed in the call."""
    updates: Mapping[str, Any]
    """What the run wrote."""
    ready: Ready
    prepared: BoundCall
    names: Mapping[str, tuple[str, bool]]
    """See `RunKeys`."""
    steady: tuple[Note, ...]
    """Notes that every run of this kind has."""
    commit: Commit | None
    """What the run changed, None if nothing is to be kept."""
    mutable: tuple[str, ...] = ()
    """Collections that were asked for: then the output is `(output, updates)`."""


def execute(
    entry: ModelEntry,
    call: Call,
    options: ApplyOptions,
    draw: Draw | DrawBatch,
    programs: ProgramCache,
    seen: SeenKeys,
    on_phase: Callable[[str], None],
    *,
    params_taken: bool,
) -> Execution:
    """Initialises if need be, finds or builds the program, runs it and waits for the device.

    Args:
      params_taken: an init took this draw's `params` key already.

    Raises:
      FlaxMagicsError: a mistake in the call, or no memory. What the model raises is passed on.
    """
    if options.repeat < 1:
        raise FlaxMagicsError(f"--repeat takes a number of runs, 1 or more, not {options.repeat}.")
    if options.roofline and options.eager:
        raise FlaxMagicsError(
            "--roofline holds a compiled program against the machine; --eager compiles none.",
            **written(f"{without_option(call.command, '--eager')} {call.text}"),
        )
    call = with_keys(entry, call, options, draw)
    prepared = prepare(entry.name, entry.model, call, options.mode)
    wanted = Wanted(call, prepared, options, draw, programs, on_phase)
    with plain_errors(call):
        start = plan.start(entry, wanted, params_taken=params_taken)
        ready: Ready | None = None
        if start.making is not None:
            start, ready = make_both(start, start.making, wanted)
        while True:
            try:
                if ready is None:
                    ready = make_ready(start, wanted)
                wait, busy = _wait(entry.name, ready, programs, on_phase)
                on_phase(f"running {entry.name}")
                (output, updates), times = _run(ready, options.runs, programs, call)
                break
            except MissingVariables as error:
                start, ready = with_added(start, wanted, error), None
    _check_clash(entry, options, ready, call)
    devices = devices_in((output, updates))
    limits = _limits(devices, ready, programs, on_phase) if options.roofline else None

    record = ready.record
    line = Line(call.command, call.text, prepared.signature)
    mode = prepared.mode_of(record)
    updates = dict(updates)
    if draw.size is not None:
        kept_back = {name: tree for name, tree in updates.items() if name not in record.sown}
        updates |= left_behind(entry.name, line, draw.size, prepared.model, kept_back, record)
    output, updates, sown = hand_back(output, updates, record, options.mutable)
    keep = options.variables is None and options.draw is None
    commit = prepared.model.commit(updates, record)
    changed = commit.changed
    kept = _kept(start.entry, updates if keep else {}, ready, call, prepared.mode)
    if keep and prepared.model.holds_variables:
        kept = replace(
            kept,
            update_counts={**kept.update_counts, **{name: kept.update_counts.get(name, 0) + 1 for name in changed}},
        )
    names = {name: (name, False) for name in (*SPLIT, *options.key, *sorted(ready.ask.streams))}
    if start.taken and "params" in ready.ask.streams:
        names["params (folded)"] = ("params", True)
    in_call = {name: data for name, data in seen.find(ready.arguments) if name not in options.key}
    told = {name for ask in entry.known_needs.values() for name in ask.streams}
    collections = {*ready.variables, *updates, *sown}
    steady = (*of_mode(entry.name, prepared, mode, record), *of_mutable(options.mutable, collections, line))
    notes = [*steady, *of_streams(record, told)]
    if options.draw is None:  # a replay brings its keys again, and means to
        notes += seen.notes(in_call, line)
    notes += of_unused(prepared.switch, (*in_call, *options.key), record.unused, line)
    notes += of_params(start.variables) if start.made is not None else ()
    notes += of_scalars(ready.scalars, line)
    notes += of_rngs(prepared.own_rngs, record)
    return Execution(
        entry=kept,
        inputs=(prepared.args, prepared.kwargs),
        output=output,
        sown=sown,
        keys=RunKeys(draw, names),
        used={name: tuple(dict.fromkeys(map(join, paths))) for name, paths in record.asked.items()},
        changed={name: kept.update_counts[name] for name in sorted(changed)} if keep else {},
        device=ready.device or devices_of((output, ready.variables)),
        program=ready.origin,
        reason=ready.reason,
        causes=ready.causes,
        mode=mode,
        switch=(*prepared.switch, *(f"axis {name}=1 device" for name in sorted(ready.ask.axes))),
        static=tuple(f"{name}={value}" for name, value in ready.arguments.static if name in ready.arguments.forced),
        timing=Timing(
            trace=ready.trace,
            lower=ready.lower,
            compile=ready.compile,
            run=times[0],
            wait=wait,
            busy=busy,
            init=start.seconds,
            beside=ready.beside,
            steady=Steady(tuple(times)) if options.runs > 1 else None,
        ),
        memory=with_peak(ready.memory, devices),
        cost=ready.cost() if options.runs > 1 else None,
        limits=limits,
        notes=tuple(notes),
        made=start.made,
        by_hand=by_hand(prepared, call, options, ready.ask, {*changed, *sown, *options.mutable}),
        weights=start.weights,
        commit=commit if keep else None,
        keys_in_call=tuple(in_call.values()),
        updates=updates,
        ready=ready,
        prepared=prepared,
        names=names,
        steady=steady,
        mutable=options.mutable,
    )


def hand_back(
    output: Any, updates: Mapping[str, Any], record: CallTrace, mutable: tuple[str, ...]
) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """The output as it is given back, what the run wrote, and what it sowed."""
    updates = dict(updates)
    sown: dict[str, Any] = dict(updates.pop(SOWN, {}))
    for name in record.sown:
        if name in updates:
            sown[name] = updates.pop(name)
    if mutable:
        both = {**updates, **sown}
        output = (output, {name: both[name] for name in mutable if name in both})
    return output, updates, sown


def by_hand(prepared: BoundCall, call: Call, options: ApplyOptions, ask: Needs, mutable: set[str]) -> str:
    """The run as plain Flax, with what the model asked for and the collections that are to be mutable."""
    streams = tuple(sorted(ask.streams))
    in_call = written_in_call(prepared.signature, prepared.args, prepared.kwargs)
    switch = tuple(setting for setting in prepared.switch if options.mode and setting.partition("=")[0] not in in_call)
    added = [f"{name}={value}" for name, value in prepared.kwargs.items() if name not in call.kwargs]
    text = with_arguments(call.text, [*(f"{name}={name}_key" for name in options.key), *added])
    code = prepared.model.by_hand(text, call.method, switch, streams, tuple(sorted(mutable)))
    code = inside(ask.axes, code)
    if options.draws is None:
        return code
    return draws_by_hand(code, (*options.key, *streams), prepared.model.holds_variables)


class plain_errors:
    """Turns what no frame of the user's explains into one short message; everything else passes as it is."""

    def __init__(self, call: Call) -> None:
        self.call = call

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, flax_errors.InvalidRngError):
            raise _kept_out(error) from None
        if error is not None and is_out_of_memory(error):
            raise out_of_memory(error, self.call.text, None) from None


def _kept_out(error: Exception) -> FlaxMagicsError:
    """Every stream is fed, so a stream can be missing only inside a transform that keeps it out."""
    first = str(error).split(" (https")[0].rstrip(".")
    stream = next(iter(re.findall(r'PRNG for "(\w+)"', first)), "…")
    return FlaxMagicsError(
        f"{first}: a lifted transform (nn.scan, nn.vmap, …) around it does not pass that stream on.",
        edit=f"split_rngs={{'{stream}': True, …}}",
    )


def with_keys(entry: ModelEntry, call: Call, options: ApplyOptions, draw: Draw | DrawBatch) -> Call:
    """The call with the keys that `--key` adds."""
    if not options.key:
        return call
    parameters = entry.model.signature(call.method).parameters
    given = {}
    for name in options.key:
        if name in call.kwargs:
            raise FlaxMagicsError(f"--key {name}: the call gives `{name}` already. Leave one of them out.")
        if name not in parameters and not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            known = ", ".join(parameters)
            raise FlaxMagicsError(
                f"--key {name}: {entry.name} has no argument `{name}`; it takes: {known}.",
                hint=did_you_mean(name, parameters),
            )
        given[name] = draw.stream(name)
    return replace(call, kwargs={**call.kwargs, **given})


def _check_clash(entry: ModelEntry, options: ApplyOptions, ready: Ready, call: Call) -> None:
    both = sorted(set(options.key) & ready.ask.streams)
    if both:
        raise FlaxMagicsError(
            f"{entry.name} draws from the stream `{both[0]}` itself: passed as an argument its key would be used twice.",
            **written(with_drawn_key(call, both[0])),
        )


def _wait(name: str, ready: Ready, programs: ProgramCache, on_phase: Callable[[str], None]) -> tuple[float, float]:
    """Seconds until the inputs were there, and until an interrupted run had left the device: not part of the run."""
    begin = programs.clock()
    if programs.unfinished.wait is not None:
        on_phase(f"waiting for the interrupted run, then {name}")
        programs.unfinished.finish()
    free = programs.clock()
    on_phase(f"waiting for the inputs of {name}")
    jax.block_until_ready((ready.variables, ready.arguments.dynamic))
    return programs.clock() - free, free - begin


def _run(ready: Ready, repeat: int, programs: ProgramCache, call: Call) -> tuple[Any, list[float]]:
    """The first result, and the seconds of each run until the device had finished."""
    times = []
    result: Any = None
    for i in range(repeat):
        begin = programs.clock()
        try:
            again = ready.run()
        except Exception as error:
            if is_out_of_memory(error):
                raise out_of_memory(error, call.text, ready.memory) from None
            raise
        times.append(programs.clock() - begin)
        if i == 0:
            result = again
    return result, times


def _limits(devices: set[Any], ready: Ready, programs: ProgramCache, on_phase: Callable[[str], None]) -> Limits:
    """What one of the devices reaches, in the dtype that most of the variables have."""
    device = min(devices, key=lambda device: device.id)
    on_phase(f"measuring what {name_devices({device})} reaches")
    return limits(device, dtype_of(ready.variables, ready.arguments.dynamic), programs.clock)


def _kept(entry: ModelEntry, updates: Mapping[str, Any], ready: Ready, call: Call, mode: str) -> ModelEntry:
    """The entry with what the run wrote, and with what was learned about the call."""
    learned = replace(
        entry,
        known_needs={**entry.known_needs, (call.method, mode): ready.ask},
        static_ints=entry.static_ints | {(call.method, name) for name in ready.arguments.forced},
    )
    if not updates or entry.variables is None:
        return learned
    counts = {**entry.update_counts, **{name: entry.update_counts.get(name, 0) + 1 for name in updates}}
    return replace(learned, variables={**entry.variables, **updates}, update_counts=counts)


def left_behind(
    name: str, line: Line, size: int, model: Model, updates: Mapping[str, Any], record: CallTrace
) -> dict[str, Any]:
    """What stays of `size` draws at once, as after as many runs one by one: the state of the random streams.

    Args:
      name, line: the model's, and that of the run.

    Raises:
      FlaxMagicsError: the model wrote something that each run by itself would have handed on to the next.
    """
    one = line.without_option("--draws", "[0-9]+")
    one_by_one = f"for _ in range({size}):\n    {one}"
    changed = model.commit(updates, record).changed
    if record.structure is not None and not changed:
        changed = ("its own structure",)
    if changed:
        what = ", ".join(f"`{collection}`" for collection in changed)
        raise FlaxMagicsError(
            f"{name} writes {what} in this run: {size} draws at once would all start from the same, where run by run"
            " each hands it on to the next.",
            **written(one_by_one),
        )
    if ARGUMENTS in updates:
        raise FlaxMagicsError(
            f"{line.call} passes rngs of its own: they would give all {size} draws the same keys.",
            **written(str(line.without_argument("rngs") or one_by_one)),
        )
    last: dict[str, Any] = jax.tree_util.tree_map(lambda leaf: leaf[-1], dict(updates))
    return last


def draws_by_hand(code: str, keys: Iterable[str], holds_variables: bool) -> str:
    """The run of one draw, `code`, for many: mapped over its keys (linen) or one by one (NNX)."""
    names = [f"{name}_key" for name in dict.fromkeys(keys)]
    if not names:
        return code
    many = ", ".join(f"{name}s" for name in names)
    if holds_variables:
        each = f"{names[0]} in {many}" if len(names) == 1 else f"{', '.join(names)} in zip({many})"
        return f"for {each}:\n    {code}"
    return f"jax.vmap(lambda {', '.join(names)}: {code})({many})"
