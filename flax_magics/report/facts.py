"""What there is to say about a run, in words, before anything is laid out: text and HTML are both made of these."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from ..base.text import bytes_, clean, count, cut, flops, plural, seconds, share

if TYPE_CHECKING:
    from ..base.measures import Steady
    from ..run import Run

FOLDED = "params (folded)"
"""A run's own `params` stream, where an init took the draw's."""

Level = Literal["off", "line", "normal", "details"]
LEVELS: dict[str, Level] = {"off": "off", "line": "line", "normal": "normal", "details": "details"}

WAIT = 1e-3
"""Seconds; a shorter wait for the inputs is not worth a row."""


@dataclass(frozen=True)
class Row:
    """A label of at most six letters, and what stands beside it."""

    label: str
    items: tuple[str, ...]


@dataclass(frozen=True)
class KeyFact:
    """One stream of a draw: the first word of its key (empty if it was not handed out), how it was made, its takers."""

    stream: str
    fingerprint: str
    made_by: str
    takers: str


@dataclass(frozen=True)
class Phase:
    """One part of what a run cost, in seconds."""

    name: str
    seconds: float

    @property
    def text(self) -> str:
        """Such as `0.22 ms`."""
        return seconds(self.seconds)


def name_of(run: Run) -> str:
    """The model's name; for a key, `key NAME`."""
    if run.command == "key":
        return clean(f"key {next(iter(run.keys), '')}")
    return clean(run.model or "")


def mode_of(run: Run) -> str:
    """What stands in the place of the mode: `init` for an init, nothing for a key."""
    return clean(run.mode) if run.command == "apply" else run.command if run.command != "key" else ""


def switch_of(run: Run) -> str:
    """The model's own switches, such as `training=True`."""
    return clean(run.switch)


def draw_of(run: Run, *, seed: bool) -> str:
    """`draw 2`, `draws 3–10`, `draw 2 of seed 0`; with `again` when it was replayed."""
    numbers = f"draw {run.draw}" if last_draw(run) == run.draw else f"draws {run.draw}–{last_draw(run)}"
    return numbers + (f" of seed {run.seed}" if seed else "") + (" again" if run.replayed else "")


def last_draw(run: Run) -> int:
    """The number of the last draw that a run took."""
    return run.draw + (run.draws or 1) - 1


def new_session(run: Run) -> str:
    """What the first report of a kernel begins with, empty for every other."""
    return f"new session, seed {run.seed}" if run.first else ""


def brief(run: Run) -> tuple[str, ...]:
    """The parts of the one-line form after name, mode and device."""
    if run.command == "key":
        return (draw_of(run, seed=True), fingerprint_of(next(iter(run.keys.values()), None)))
    parts = [draw_of(run, seed=False)]
    if run.made is not None:
        parts.append(f"{'added ' if run.made.added else ''}{plural(run.made.parameters, 'parameter')}")
    if run.command == "init":
        parts.append(f"init {seconds(run.timing.init)}" if run.timing.init else "")
    else:
        parts.append(program_of(run))
        if run.timing.wait + run.timing.busy >= WAIT:
            parts.append(f"waited {seconds(run.timing.wait + run.timing.busy)}")
        steady = run.timing.steady
        parts.append(f"run median {seconds(steady.median)}" if steady else f"run {seconds(run.timing.run)}")
    parts += [f"mean {_number(spread.mean)} ± {_number(spread.deviation)}" for spread in run.spread[:1]]
    return (*parts, *changed_of(run), weights_of(run))


def weights_of(run: Run) -> str:
    """Whose weights ran, in few words: `weights of draw 1`, `weights set in [6]`; nothing where the run made them."""
    if not run.weights or run.made is not None:
        return ""
    short = clean(run.weights).replace("initialised in draw", "of draw").replace(" in cell [", " in [")
    return "weights " + short.replace(", changed by your code since", ", changed since")


def program_of(run: Run) -> str:
    """`reused`, `compiled in 0.41 s`, `eager`: a few words on where the program came from."""
    if run.program == "compiled":
        return f"compiled in {seconds(run.timing.building)}"
    if run.program == "reused" and run.timing.building:  # the model is not plain: only a trace could tell
        return f"reused, traced in {seconds(run.timing.building)}"
    return clean(run.program)


def rows(run: Run) -> tuple[Row, ...]:
    """The rows of the normal form in their order, those with nothing to say left out."""
    found = [
        Row("out", (" · ".join((output_of(run), *not_finite(run))),) if run.command == "apply" else ()),
        Row("draws", draws_of(run)),
        Row("vars", vars_of(run)),
        Row("sown", tuple(f"{clean(name)}: {_described(value)}" for name, value in run.sown.items())),
        Row("keys", keys_of(run)),
        Row("static", static_of(run)),
        Row("init", (f"{seconds(run.timing.init)}, eager",) if run.timing.init else ()),
        Row("jit", (jit_of(run),) if run.command == "apply" and run.program else ()),
        Row("wait", wait_of(run)),
        Row("run", (run_of(run),) if run.command == "apply" else ()),
        Row("rate", rate_of(run)),
        Row("memory", memory_of(run) if run.timing.steady else ()),
    ]
    return tuple(row for row in found if row.items)


def output_of(run: Run) -> str:
    """Structure, dtypes and shapes of what the model returned."""
    return cut(clean(run.shape), 72)


def not_finite(run: Run) -> tuple[str, ...]:
    """`3 of 8 NaN` and `1 of 8 inf`, over all arrays of the output; of several arrays, the first that has some."""
    size = sum(values.size for values in run.values)
    found = []
    for name, label in (("nan", "NaN"), ("inf", "inf")):
        having = [values for values in run.values if getattr(values, name)]
        if having:
            first = f", first in {clean(having[0].path)}" if len(run.values) > 1 else ""
            found.append(f"{count(sum(getattr(one, name) for one in having))} of {count(size)} {label}{first}")
    return tuple(found)


def values_of(run: Run) -> tuple[str, ...]:
    """Range and mean of the finite numbers of each array of the output; of many arrays, the first four."""
    known = [values for values in run.values if values.mean is not None]
    shown = [
        f"{clean(values.path) + ': ' if values.path else ''}{_number(values.least)} … {_number(values.most)},"
        f" mean {_number(values.mean)}"
        for values in known[:4]
        if values.least is not None and values.most is not None and values.mean is not None
    ]
    return (*shown, f"and {len(known) - 4} more") if len(known) > 4 else tuple(shown)


def draws_of(run: Run) -> tuple[str, ...]:
    """Mean and spread of each array of the output over the draws of one run; of many arrays, the first four."""
    shown = [
        f"{clean(spread.path) + ': ' if spread.path else ''}mean {_number(spread.mean)}"
        + (f", spread ± {_number(spread.deviation)}" if (run.draws or 1) > 1 else "")
        for spread in run.spread[:4]
    ]
    more = len(run.spread) - len(shown)
    if more:
        shown.append(f"and {more} more")
    if shown and (run.draws or 1) > 1:
        shown.append("(each element's standard deviation over the draws, averaged)")
    return tuple(shown)


def _number(value: float) -> str:
    return f"{value:.3g}"


def _described(value: Any) -> str:
    from ..base.digest import describe

    return clean(describe(value))


def vars_of(run: Run) -> tuple[str, ...]:
    """Whose variables ran, what was made of them, and collections that the model wrote."""
    return (*((clean(run.weights),) if run.weights else ()), *_made(run), *changed_of(run))


def _made(run: Run) -> Iterable[str]:
    made = run.made
    if made is not None:
        names = ", ".join(map(clean, made.collections)) or "params"
        amount = f"{plural(made.parameters, 'parameter')}, {bytes_(made.bytes)}"
        yield f"{names}: {amount}" + (" added to those there were" if made.added else "")


def changed_of(run: Run) -> tuple[str, ...]:
    """`batch_stats: update 11` for each collection that the model wrote."""
    return tuple(f"{clean(name)}: update {updates}" for name, updates in run.changed.items())


def keys_of(run: Run) -> tuple[str, ...]:
    """`dropout → Dropout_0` for each key. That variables were there already, and needed no `params`, is no news."""
    if run.command == "key":  # its header says it all
        return ()
    where = {stream: takers(run, stream) for stream in run.keys}
    return tuple(f"{clean(s)} → {taker}" for s, taker in where.items() if (s, taker) != ("params", "nobody"))


def takers(run: Run, stream: str) -> str:
    """Who consumed a stream's key: module paths, `new variables`, or `nobody`."""
    if stream == "params" and FOLDED in run.keys:
        return "new variables" if run.made is not None else "the variables"
    paths = run.used.get("params" if stream == FOLDED else stream, ())
    if stream == "params" and (run.command == "init" or run.made is not None):
        return "new variables"
    arguments = run.inputs[1] if isinstance(run.inputs, tuple) else {}
    if not paths and stream in arguments and _same_key(arguments[stream], run.keys[stream]):
        return f"argument {clean(stream)}"
    return ", ".join(clean(path) or "the model itself" for path in paths) if paths else "nobody"


def _same_key(one: Any, other: Any) -> bool:
    from ..base.digest import data_of

    return getattr(one, "dtype", None) == other.dtype and data_of(one) == data_of(other)


def static_of(run: Run) -> tuple[str, ...]:
    """Arguments that became part of the program."""
    if not run.static:
        return ()
    return (f"{', '.join(map(clean, run.static))} (part of the program: another value compiles again)",)


def jit_of(run: Run) -> str:
    """Where the program came from, what it cost, and why."""
    reason = f": {clean(run.reason)}" if run.reason else ""
    if run.program == "compiled":
        return f"compiled in {seconds(run.timing.building)}{reason}"
    if run.program == "disk cache":
        return f"from the disk cache in {seconds(run.timing.building)}{reason}"
    if run.program == "eager":
        return f"eager, op by op: no program, and JAX compiles each op at its first use{reason}"
    return f"{program_of(run)}{reason}"


def wait_of(run: Run) -> tuple[str, ...]:
    """The wait for a run that was interrupted and went on, and for inputs that were still being computed."""
    found = []
    if run.timing.busy >= WAIT:
        found.append(f"the interrupted run had the device for {seconds(run.timing.busy)} more")
    if run.timing.wait >= WAIT:
        found.append(f"inputs were ready after {seconds(run.timing.wait)}")
    return tuple(found)


def run_of(run: Run) -> str:
    """Seconds on the device; of a repeated run, median, spread and the first outlier."""
    if run.timing.steady is None:
        return seconds(run.timing.run)
    return f"median {seconds(run.timing.steady.median)} {spread_of(run.timing.steady)}"


def spread_of(steady: Steady) -> str:
    """`± 0.01 ms of 20 (first outlier: run 4, 0.30 ms; 2 in all)`, the spread in the unit of the median."""
    spread = f"± {seconds(steady.spread, like=steady.median)} of {len(steady.times)}"
    slow = steady.outliers
    if not slow:
        return spread
    first = "the first run" if slow[0] == 0 else f"run {slow[0] + 1}"
    more = f"; {len(slow)} in all" if len(slow) > 1 else ""
    return f"{spread} (first outlier: {first}, {seconds(steady.times[slow[0]])}{more})"


def rate_of(run: Run) -> tuple[str, ...]:
    """Operations and bytes a second of a repeated run, beside what the machine reaches, and what they are made of."""
    cost, limits, steady = run.cost, run.limits, run.timing.steady
    if cost is None or steady is None or steady.median <= 0:
        return ()
    least = "at least " if cost.loops else ""
    found, counted = [], []
    for amount, unit, limit, what in (
        (cost.flops, flops, limits.flops if limits else 0, f"{limits.dtype if limits else ''} matmul"),
        (cost.bytes, bytes_, limits.bytes if limits else 0, "copy"),
    ):
        if amount <= 0:
            continue
        reached = amount / steady.median
        beside = f", {share(reached / limit)} of a large {clean(what)}'s {unit(round(limit))}/s" if limit else ""
        found.append(f"{least}{unit(round(reached))}/s{beside}")
        counted.append(unit(round(amount)))
    each = f" on each of {clean(run.device)}" if _many(run.device) else ""
    loops = ", which counts the body of a loop once" if cost.loops else ""
    return (*found, f"({' and '.join(counted)} a run{each} by XLA's count{loops})")


def _many(device: str) -> bool:
    return any(sign in device.partition(":")[2] for sign in ",-")


def memory_of(run: Run) -> tuple[str, ...]:
    """The device's own count of its peak; where it keeps none, what XLA's analysis of the program says."""
    memory = run.memory
    if memory is None:
        return ()
    if memory.peak is not None:
        return (f"peak {bytes_(memory.peak)}, as {clean(run.device)} counts since the process began",)
    return (f"{bytes_(memory.analysed)} by XLA's analysis: arguments, temporaries and outputs",)


def fingerprint_of(key: Any) -> str:
    """The first word of a key in hex; an array of keys adds how many; None gives nothing."""
    from ..rng.keys import short_key

    if key is None:
        return ""
    shape: tuple[int, ...] = getattr(key, "shape", ())
    legacy = shape[-1:] if str(getattr(key, "dtype", "")) == "uint32" else ()
    many = shape[: len(shape) - len(legacy)]
    word: str = short_key(key)
    return word + (f" ×{'×'.join(map(str, many))}" if many else "")


def key_facts(run: Run) -> tuple[KeyFact, ...]:
    """Every key of the draw: those that were handed out, then those of the split that were not needed."""
    from ..rng.keys import SPLIT

    given = [KeyFact(clean(s), fingerprint_of(key), _made_by(s), _where(run, s)) for s, key in run.keys.items()]
    if run.command == "key":
        return tuple(KeyFact(fact.stream, fact.fingerprint, fact.made_by, "you") for fact in given)
    left = [KeyFact(s, "", _made_by(s), _not_needed(run, s)) for s in SPLIT if s not in run.keys]
    return (*given, *left)


def _where(run: Run, stream: str) -> str:
    where = takers(run, stream)
    return _not_needed(run, stream) if where == "nobody" else where


def _made_by(stream: str) -> str:
    from ..rng.keys import SPLIT, stream_tag

    if stream == FOLDED:
        stream = "params"
    elif stream in SPLIT:
        return f"split(root, 3)[{1 + SPLIT.index(stream)}]"
    return f"fold_in(root, {stream_tag(stream)})"


def _not_needed(run: Run, stream: str) -> str:
    if run.command == "init":
        return "not needed: init takes params alone"
    if stream == "params":
        return "not needed: the variables were there"
    return "not needed: no module asked for it"


def phases(run: Run) -> tuple[Phase, ...]:
    """What took time, in the order it happened; what did not happen is left out."""
    timing = run.timing
    found = [
        Phase("init", timing.init),
        Phase("trace", timing.trace),
        Phase("lower", timing.lower),
        Phase("XLA", timing.compile - timing.beside),  # what was waited for: the bar is the time that passed
        Phase("wait", timing.wait + timing.busy if timing.wait + timing.busy >= WAIT else 0.0),
        Phase("run", timing.steady.median if timing.steady else timing.run),
    ]
    return tuple(phase for phase in found if phase.seconds > 0)


def building(run: Run) -> tuple[Phase, ...]:
    """The phases of making the program, what was not waited for last: it ran beside the init, or in an earlier run."""
    found = [phase for phase in phases(run) if phase.name in ("trace", "lower", "XLA")]
    if run.timing.beside >= WAIT:
        found.append(Phase("XLA beside the init" if run.timing.init else "XLA before this run", run.timing.beside))
    return tuple(found)


def memory_facts(run: Run) -> tuple[tuple[str, str], ...]:
    """What the program holds while it runs, by XLA's analysis, and the device's own count: label and bytes."""
    memory = run.memory
    if memory is None:
        return ()
    found = [
        ("arguments", bytes_(memory.arguments)),
        ("temporaries", bytes_(memory.temporaries)),
        ("outputs", bytes_(memory.outputs)),
        ("code", bytes_(memory.code)),
    ]
    return (*found, ("device peak so far", bytes_(memory.peak))) if memory.peak is not None else tuple(found)
