"""What a report says about a run, in words and without layout: the text and the HTML are both made from these facts."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Literal

from msgspec import Struct

from ..base.digest import data_of, describe, is_gone
from ..base.measures import ROW_ORDER
from ..base.text import bytes_, clean, count, cut, flops, plural, seconds, share, three_digits
from ..base.types import Leaf
from ..rng.keys import SPLIT, StepDraw, short_key, stream_tag
from . import curve

if TYPE_CHECKING:
    from ..base.measures import Steady, Timing
    from ..run import Run

FOLDED = "params (folded)"
"""The name for a run's own `params` stream, where the draw's `params` key went into variables."""

Level = Literal["off", "line", "normal", "details"]

WAIT = 1e-2
"""Seconds. A shorter wait is not reported, nor one that is less than a tenth of the run."""
BESIDE = 1e-3
"""Seconds. Shorter compiling beside other work is not reported."""
CACHED = 1.1
"""From how many times the rate of a large copy on a run is not bound by memory."""
NEAR_LIMIT = 0.1
"""From this share of what the machine reaches on, a run is said to be bound by it."""


class Row(Struct, frozen=True):
    """A row of a report: a label of at most six letters, and the items beside it."""

    label: str
    items: tuple[str, ...]


class KeyFact(Struct, frozen=True):
    """One stream of a draw: the first word of its key (empty if not handed out), how it was made, who consumed it."""

    stream: str
    fingerprint: str
    made_by: str
    takers: str


class Phase(Struct, frozen=True):
    """One part of a run's cost, in seconds."""

    name: str
    seconds: float

    @property
    def text(self) -> str:
        """The time with its unit, such as `0.22 ms`."""
        return seconds(self.seconds)


class Reported(Struct, frozen=True):
    """How runs of one command are reported. A command that runs no model has a report of one line only.

    Attributes:
      mode: the text in the place of the mode, None for the run's own mode.
      cost: makes the parts of the one-line form that tell where the program came from and what took time.
      unused: stream → why its key of the split was not handed out; under None the reason for every other stream.
    """

    mode: str | None
    cost: Callable[[Run], list[str]]
    unused: dict[str | None, str]


def _cost_of_apply(run: Run) -> list[str]:
    waited = sum(_waits(run.timing))
    median = "median " if run.timing.steady else ""
    took = f"run {median}{seconds(run.timing.typical)}"
    return [*roof_of(run), program_of(run), f"waited {seconds(waited)}" if waited else "", took]


def _waits(timing: Timing) -> tuple[float, float]:
    """Seconds for which the run waited for an interrupted one, and for its inputs; 0.0 for too short a wait to tell."""
    least = max(WAIT, timing.typical / 10)
    return timing.busy if timing.busy >= least else 0.0, timing.wait if timing.wait >= least else 0.0


REPORTED = {
    "apply": Reported(
        mode=None,
        cost=_cost_of_apply,
        unused={"params": "not needed: the variables were there", None: "not needed: no module asked for it"},
    ),
    "init": Reported(
        mode="init",
        cost=lambda run: [f"init {seconds(run.timing.init)}" if run.timing.init else ""],
        unused={None: "not needed: init takes params alone"},
    ),
    "key": Reported(mode="", cost=lambda run: [], unused={}),
    "grad": Reported(
        mode=None,
        cost=lambda run: [*scalars_of(run), *_cost_of_apply(run)],
        unused={"params": "not needed: the variables were there", None: "not needed: no module asked for it"},
    ),
    "train": Reported(
        mode="train",
        cost=lambda run: [] if run.trained is None else [*curve.outcome(run.trained), *curve.rates(run.trained)],
        unused={"params": "not needed: the variables were there", None: "not needed: no module asked for it"},
    ),
}


def name_of(run: Run) -> str:
    """The model's name; for a key `key NAME`."""
    return clean(run.model if run.model is not None else f"key {next(iter(run.keys), '')}")


def mode_of(run: Run) -> str:
    """The mode as a report shows it: `init` for an init, empty for a key."""
    mode = REPORTED[run.command].mode
    return clean(run.mode) if mode is None else mode


def draw_of(run: Run, *, seed: bool) -> str:
    """The draw in words: `draw 2`, `draws 3–10`, `draw 2 of seed 0`; with `again` for a replay."""
    last = last_draw(run)
    numbers = f"draw {run.draw}" if last == run.draw else f"draws {run.draw}–{last}"
    return numbers + (f" of seed {run.seed}" if seed else "") + (" again" if run.replayed else "")


def last_draw(run: Run) -> int:
    """The number of the last draw that the run took: more than `run.draw` with `--samples`."""
    return run.draw + (run.samples or 1) - 1


def new_session(run: Run) -> str:
    """The line above the first report of a session, and above that of a run which registered its model; else empty."""
    if run.resumed:  # these were reported when it began
        return ""
    model = f"{name_of(run)} registered: {clean(run.registered)}" if run.registered else ""
    return " · ".join(filter(None, (f"new session, seed {run.seed}" if run.first else "", model)))


def brief(run: Run) -> tuple[str, ...]:
    """The parts of a one-line report after name, mode and device: draw, what was made, program, time, weights."""
    if not run.kind.model:
        return (draw_of(run, seed=True), fingerprint_of(next(iter(run.keys.values()), None)))
    parts = [draw_of(run, seed=False), *([] if run.mesh is None else [clean(run.mesh.name)])]
    if run.made is not None and not run.resumed:
        parts.append(f"{'added ' if run.made.added else ''}{plural(run.made.parameters, 'parameter')}")
    parts += REPORTED[run.command].cost(run)
    parts += [f"mean {three_digits(spread.mean)} ± {three_digits(spread.deviation)}" for spread in run.spread[:1]]
    return (*parts, *changed_of(run), weights_of(run), verdict(run))


def verdict(run: Run) -> str:
    """What a replay found: `identical: float32[3,4,3]`, `identical, by its digest`, `differs`, …; else empty."""
    agreement = run.agreement
    if agreement is None:
        return ""
    if agreement.identical is None:
        return "nothing to compare with"
    if not agreement.identical:
        return "differs"
    if agreement.against == "losses":
        return "identical: every loss" if run.kind.trains else "identical: its loss"
    how = ", by its digest" if agreement.against == "digest" else ""
    if run.kind.trains:
        return f"identical{how}: weights after {plural(run.steps, 'step')}"
    if run.kind.opens:
        return f"identical{how}: every variable"
    return f"identical{how}: {'loss and gradients' if run.kind.loss else cut(clean(run.shape), 40)}"


def weights_of(run: Run) -> str:
    """Whose weights ran, in few words: `weights of draw 1`, `weights set in [6]`; empty if the run made them."""
    if not run.weights or run.made is not None:
        return ""
    short = clean(run.weights).replace("initialised in draw", "of draw").replace(" in cell [", " in [")
    return "weights " + short.replace(", changed by your code since", ", changed since")


def program_of(run: Run) -> str:
    """Where the program came from, in few words: `reused`, `compiled in 0.41 s`, `eager`."""
    if run.program == "compiled":
        return f"compiled in {seconds(run.timing.building)}"
    if run.program == "reused" and run.timing.building:  # a model without a cache key is traced to find its program
        return f"reused, traced in {seconds(run.timing.building)}"
    return clean(run.program)


def rows(run: Run) -> tuple[Row, ...]:
    """The rows of the normal report in order, without those that have nothing to say."""
    timing, forward = run.timing, run.kind.forward
    static = f"{', '.join(map(clean, run.static))} (part of the program: another value compiles again)"
    began = "began as " if run.kind.trains else ""
    busy, wait = _waits(timing)
    waits = [f"the interrupted run had the device for {seconds(busy)} more"] if busy else []
    waits += [f"inputs were ready after {seconds(wait)}"] if wait else []
    shown = [
        Row("replay", tuple(filter(None, [verdict(run)]))),
        Row("roof", roof_of(run)),
        Row("mesh", () if run.mesh is None else (clean(run.mesh.name),)),
        Row("steps", steps_of(run)),
        Row("out", out_of(run) if forward and not run.kind.trains else ()),
        Row("samples", samples_of(run)),
        Row("vars", (*((began + clean(run.weights),) if run.weights else ()), *_made(run), *changed_of(run))),
        Row("sown", tuple(f"{clean(name)}: {clean(describe(value))}" for name, value in run.sown.items())),
        Row("keys", keys_of(run)),
        Row("static", (static,) if run.static else ()),
        Row("init", (f"{seconds(timing.init)}, eager",) if timing.init else ()),
        Row("jit", (jit_of(run),) if forward and run.program else ()),
        Row("wait", tuple(waits)),
        Row("run", (run_of(run),) if forward and run.trained is None else trained_in(run)),
        Row("rate", rate_of(run)),
        Row("memory", memory_of(run) if timing.steady else ()),
    ]
    return tuple(row for row in shown if row.items)


def steps_of(run: Run) -> tuple[str, ...]:
    """How far a training is, and how many steps one program does; empty for any other run."""
    if run.trained is None:
        return ()
    group = (f"{run.trained.group} in one program",) if run.trained.group > 1 else ()
    return (curve.steps_of(run.trained), *curve.epochs_of(run.trained), *curve.batch_of(run.trained), *group)


def trained_in(run: Run) -> tuple[str, ...]:
    """The time of a training's finished steps, and steps and examples a second; empty for any other run."""
    return (seconds(run.trained.seconds), *curve.rates(run.trained)) if run.trained is not None and run.steps else ()


def out_of(run: Run) -> tuple[str, ...]:
    """The output's structure and what of it is not finite; of gradients loss and metrics."""
    if run.kind.loss:
        return (*scalars_of(run), *not_finite(run)) or ("loss and gradients",)
    return (" · ".join((cut(clean(run.shape), 72), *not_finite(run))),)


def scalars_of(run: Run) -> tuple[str, ...]:
    """`loss 2.31` and `accuracy 0.125`, of gradients, as far as these are still there."""
    output = run.output
    scalars = [("loss", getattr(output, "loss", None)), *(getattr(output, "metrics", None) or {}).items()]
    there = [(name, value) for name, value in scalars if value is not None and not is_gone(value)]
    return tuple(f"{clean(name)} {three_digits(float(value))}" for name, value in there)


def not_finite(run: Run) -> tuple[str, ...]:
    """`3 of 8 NaN` and `1 of 8 inf`, over all arrays of the output; of several also the first that has some."""
    size = count(sum(values.size for values in run.values))
    texts = []
    for name, label in (("nan", "NaN"), ("inf", "inf")):
        having = [(getattr(values, name), values.path) for values in run.values if getattr(values, name)]
        if having:
            # Of gradients the path of a parameter: `grads/Dense_0/bias`.
            path = re.sub(r"\['([^']*)'\]", r"/\1", having[0][1]).lstrip("/") if run.kind.loss else having[0][1]
            first = f", first in {clean(path)}" if len(run.values) > 1 else ""
            texts.append(f"{count(sum(amount for amount, _ in having))} of {size} {label}{first}")
    return tuple(texts)


def values_of(run: Run) -> tuple[str, ...]:
    """Range and mean of the finite numbers in each array of the output, of the first four arrays."""
    return _first_four(
        f"{_at(values.path)}{three_digits(values.least)} … {three_digits(values.most)}, mean {three_digits(values.mean)}"
        for values in run.values
        if values.least is not None and values.most is not None and values.mean is not None
    )


def samples_of(run: Run) -> tuple[str, ...]:
    """Mean and spread over the samples of each array of the output, of the first four arrays."""
    texts = [f"{_at(spread.path)}mean {three_digits(spread.mean)}" for spread in run.spread]
    # One sample has no spread.
    if (run.samples or 1) == 1:
        return _first_four(texts)
    deviations = (three_digits(spread.deviation) for spread in run.spread)
    texts = [f"{text}, spread ± {deviation}" for text, deviation in zip(texts, deviations, strict=True)]
    return (*_first_four(texts), "(each element's standard deviation over the samples, averaged)") if texts else ()


def _first_four(texts: Iterable[str]) -> tuple[str, ...]:
    shown = tuple(texts)
    return (*shown[:4], f"and {len(shown) - 4} more") if len(shown) > 4 else shown


def _at(path: str) -> str:
    return f"{clean(path)}: " if path else ""


def _made(run: Run) -> tuple[str, ...]:
    """How many variables the run initialised, and their bytes; empty if it made none."""
    if run.made is None or run.resumed:
        return ()
    if not run.made.parameters:
        return ("no parameters",)
    names = ", ".join(map(clean, run.made.collections)) or "params"
    amount = f"{plural(run.made.parameters, 'parameter')}, {bytes_(run.made.bytes)}"
    return (f"{names}: {amount}" + (" added to those there were" if run.made.added else ""),)


def changed_of(run: Run) -> tuple[str, ...]:
    """`batch_stats: update 11`, or `batch_stats: not kept`, for each collection that the model wrote."""
    # Of a training's parameters each step is an update, and the steps are told.
    changed = {name: updates for name, updates in run.changed.items() if not (run.kind.trains and name == "params")}
    updated = (f"{clean(name)}: update {updates}" for name, updates in changed.items())
    return (*updated, *(f"{clean(name)}: not kept" for name in run.dropped))


def keys_of(run: Run) -> tuple[str, ...]:
    """`dropout → Dropout_0` for each key that was taken; `dropout → nobody, layers off` where they would take it if on."""
    if not run.kind.model:
        return ()
    shown = []
    for stream in run.keys:
        taker = takers(run, stream)
        # That a `params` key has no taker is no news: variables were there, as usual.
        old = stream == "params" and (run.resumed or taker == "nobody")
        if not old and (taker != "nobody" or stream in run.idle):
            shown.append(f"{clean(stream)} → {taker}" + ", layers off" * (taker == "nobody"))
    return tuple(shown)


def takers(run: Run, stream: str) -> str:
    """Who consumed a stream's key: module paths, `argument NAME`, `new variables`, or `nobody`."""
    if stream == "params" and FOLDED in run.keys:
        return "new variables" if run.made is not None else "the variables"
    if stream == "params" and (run.kind.opens or run.made is not None):
        return "new variables"
    paths = run.used.get("params" if stream == FOLDED else stream, ())
    # `--key` passes the draw's stream of an argument's name; a value of the user's own is no taker.
    arguments = run.inputs[1] if isinstance(run.inputs, tuple) else {}
    if not paths and stream in arguments:
        argument, key = arguments[stream], run.keys[stream]
        if getattr(argument, "dtype", None) == key.dtype and data_of(argument) == data_of(key):
            return f"argument {clean(stream)}"
    return ", ".join(clean(path) or "the model itself" for path in paths) if paths else "nobody"


def jit_of(run: Run) -> str:
    """Where the program came from, how long that took, and why it was new."""
    origin = program_of(run)
    if run.program == "disk cache":
        # A trace tells which it is, and most of the time goes there.
        traced = seconds(run.timing.trace + run.timing.lower)
        origin = f"traced in {traced}, from the disk cache in {seconds(run.timing.compile)}"
    elif run.program == "eager":
        origin = "eager, op by op: no program, and JAX compiles each op at its first use"
    return origin + (f": {clean(run.reason)}" if run.reason else "")


def run_of(run: Run) -> str:
    """Time on the device; of a repeated run the median, the spread and the first outlier."""
    if run.timing.steady is None:
        return seconds(run.timing.run)
    return f"median {seconds(run.timing.steady.median)} {spread_of(run.timing.steady)}"


def spread_of(steady: Steady) -> str:
    """`± 0.01 ms of 20 (first outlier: run 4, 0.30 ms; 2 in all)`, the spread in the median's unit."""
    spread = f"± {seconds(steady.spread, like=steady.median)} of {len(steady.times)}"
    slow = steady.outliers
    if not slow:
        return spread
    first = "the first run" if slow[0] == 0 else f"run {slow[0] + 1}"
    more = f"; {len(slow)} in all" if len(slow) > 1 else ""
    return f"{spread} (first outlier: {first}, {seconds(steady.times[slow[0]])}{more})"


def roof_of(run: Run) -> tuple[str, ...]:
    """What bounds a run that was held against the machine: `memory-bound: 62 % of what a large copy reaches`."""
    cost, limits, steady = run.cost, run.limits, run.timing.steady
    if cost is None or limits is None or steady is None or steady.median <= 0:
        return ()
    # At full speed, the run would take as long as the slower of its two parts: that is the roof.
    compute = cost.flops / limits.flops if limits.flops else 0.0
    memory = cost.bytes / limits.bytes if limits.bytes else 0.0
    # What is faster than a large copy has its data in caches: memory is no bound of it.
    cached = memory > CACHED * steady.median and compute > 0
    reached = (compute if cached else max(compute, memory)) / steady.median
    if not reached:
        return ()
    is_memory = memory > compute and not cached
    bound, what = ("memory", "copy") if is_memory else ("compute", f"{clean(limits.dtype)} matmul")
    # What XLA counts of a loop is too little, so that a small share says nothing there.
    near = reached >= NEAR_LIMIT or cost.loops
    verdict = f"{bound}-bound" if near else "neither compute- nor memory-bound"
    return (
        f"{verdict}: {'at least ' if cost.loops else ''}{share(reached)} of what a large {what} reaches"
        + (" (its data fit into caches)" if cached else ""),
    )


def rate_of(run: Run) -> tuple[str, ...]:
    """FLOP/s and bytes/s of a repeated run, beside what the machine reaches, and the counts that they come from."""
    cost, limits, steady = run.cost, run.limits, run.timing.steady
    if cost is None or steady is None or steady.median <= 0:
        return ()
    # XLA counts the body of a loop once, however often it runs.
    least = "at least " if cost.loops else ""
    rates, counted = [], []
    for amount, unit, limit, what in (
        (cost.flops, flops, limits.flops if limits else 0, f"{limits.dtype if limits else ''} matmul"),
        (cost.bytes, bytes_, limits.bytes if limits else 0, "copy"),
    ):
        if amount <= 0:
            continue
        reached = amount / steady.median
        beside = f", {share(reached / limit)} of a large {clean(what)}'s {unit(round(limit))}/s" if limit else ""
        rates.append(f"{least}{unit(round(reached))}/s{beside}")
        counted.append(unit(round(amount)))
    several_devices = any(sign in run.device.partition(":")[2] for sign in ",-")
    each = f" on each of {clean(run.device)}" if several_devices else ""
    loops = ", which counts the body of a loop once" if cost.loops else ""
    return (*rates, f"({' and '.join(counted)} a run{each} by XLA's count{loops})")


def memory_of(run: Run) -> tuple[str, ...]:
    """The device's own peak; where the device does not count, the sum by XLA's analysis of the program."""
    if run.memory is None:
        return ()
    if run.memory.peak is not None:
        return (f"peak {bytes_(run.memory.peak)}, as {clean(run.device)} counts since the process began",)
    return (f"{bytes_(run.memory.analysed)} by XLA's analysis: arguments, temporaries and outputs",)


def fingerprint_of(key: Leaf) -> str:
    """The first word of a key in hex, `×N` after it for an array of keys; empty for None."""
    if key is None:
        return ""
    shape: tuple[int, ...] = getattr(key, "shape", ())
    many = (
        shape[:-1] if str(getattr(key, "dtype", "")) == "uint32" else shape
    )  # the last axis of a legacy key holds its words
    return short_key(key) + (f" ×{'×'.join(map(str, many))}" if many else "")


def key_facts(run: Run) -> tuple[KeyFact, ...]:
    """Every key of the draw: first those that were handed out, then those of the split that were not needed."""
    facts, reported, draw = list[KeyFact](), REPORTED[run.command], getattr(run.keys, "draw", None)
    for stream in dict.fromkeys((*run.keys, *(SPLIT if run.kind.model else ()))):
        taker = "you" if not run.kind.model else takers(run, stream) if stream in run.keys else "nobody"
        if stream == ROW_ORDER:
            taker = "the order of the rows"
        elif taker == "nobody":
            taker = reported.unused.get(stream) or reported.unused[None]
        folded = f"fold_in(root, {stream_tag('params' if stream == FOLDED else stream)})"
        made_by = f"split(root, 3)[{1 + SPLIT.index(stream)}]" if stream in SPLIT else folded
        if isinstance(draw, StepDraw):
            made_by = f"fold_in({made_by}, {draw.step})"
        facts.append(KeyFact(clean(stream), fingerprint_of(run.keys.get(stream)), made_by, taker))
    return tuple(facts)


def phases(run: Run) -> tuple[Phase, ...]:
    """What took time, in the order in which it happened, without what did not happen."""
    timing = run.timing
    candidates = [
        Phase("init", timing.init),
        Phase("trace", timing.trace),
        Phase("lower", timing.lower),
        # Without the time beside the init, which nobody waited for.
        Phase(_last_phase(run), timing.compile - timing.beside),
        Phase("wait", sum(_waits(timing))),
        Phase("run", timing.typical),
    ]
    return tuple(phase for phase in candidates if phase.seconds > 0)


def _last_phase(run: Run) -> str:
    """What made the program in the end: XLA, or reading it from the disk cache."""
    return "read" if run.program == "disk cache" else "XLA"


def building(run: Run) -> tuple[Phase, ...]:
    """The phases of making the program; the last is compiling that ran beside the init, or in an earlier run."""
    last = _last_phase(run)
    making = [phase for phase in phases(run) if phase.name in ("trace", "lower", last)]
    if run.timing.beside >= BESIDE:
        making.append(Phase(f"{last} {'beside the init' if run.timing.init else 'before this run'}", run.timing.beside))
    return tuple(making)


def memory_facts(run: Run) -> tuple[tuple[str, str], ...]:
    """Label and bytes of what the program holds while it runs, by XLA's analysis, and of the device's peak so far."""
    memory = run.memory
    if memory is None:
        return ()
    amounts = [(name, bytes_(getattr(memory, name))) for name in ("arguments", "temporaries", "outputs")]
    amounts += [("code", bytes_(memory.code))] if memory.code else []  # XLA does not count it on every device
    return (*amounts, *([("device peak so far", bytes_(memory.peak))] if memory.peak is not None else []))
