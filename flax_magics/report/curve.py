"""How far a training is, in words; its losses and metrics as lines of text, and its losses as a picture for HTML."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from itertools import pairwise

import numpy as np
from msgspec import Struct

from ..base.measures import Curve
from ..base.text import cell_len, clean, count, cut, plural, seconds, table, width
from ..base.types import HostArray

BLOCKS = "▁▂▃▄▅▆▇█"
BROKEN = "×"
"""Stands for values that are not finite."""
SPARKS, FEWEST_SPARKS = 24, 8
"""The columns of a sparkline, at most and at least."""
BUCKETS = 60
"""Of how many parts of a curve the lowest and the highest value are drawn."""
SMOOTHED = 40
"""Of how many parts the mean is drawn, where a curve is noisy."""
NOISY = 4
"""A curve is noisy if its ups and downs together are this many times its range or more."""
DECADE = 10
"""From this ratio of the largest loss to the smallest on, losses are drawn on a logarithmic scale."""
LEFT, RIGHT, TOP, BOTTOM = 50, 575, 24, 166
"""The place of the curve in the picture, which is 600 wide and 200 high."""


# -- in words


def steps_of(curve: Curve) -> str:
    """How many steps are finished: `300 of 500`, or `500` once all are."""
    steps = len(curve.losses)
    over = curve.total is None or (steps == curve.total and not curve.stopped)
    return count(steps) if over else f"{count(steps)} of {count(curve.total or 0)}"


def epochs_of(curve: Curve) -> tuple[str, ...]:
    """How many epochs are finished: `epoch 2.1`; empty where the length of one is not known, or is a single step."""
    steps = len(curve.losses)
    if not curve.epoch or curve.epoch == 1 or not steps:
        return ()
    # Rounded down: an epoch that is not over is not shown as if it were.
    whole, tenths = divmod(steps * 10 // curve.epoch, 10)
    return (f"epoch {whole}" if steps % curve.epoch == 0 else f"epoch {whole}.{tenths}",)


def batch_of(curve: Curve) -> tuple[str, ...]:
    """How many rows of its arrays a step takes; empty for an iterable of batches, and where it is not known."""
    batch = curve.task.batch
    if not curve.task.optimizer or not curve.task.arrays:
        return ()
    return ("all rows in each step: no --batch" if batch is None else f"batches of {count(batch)}",)


def latest(curve: Curve) -> tuple[str, ...]:
    """Loss and metrics after the last step, and those of the last look at the `--eval` data."""
    return tuple(f"{series.name} {_number(series.values[-1])}" for series in series_of(curve))


def _latest_with_means(curve: Curve) -> Iterator[str]:
    """The same with the means of the last epoch: the last batch alone may be a few rows."""
    for text, series in zip(latest(curve), series_of(curve), strict=True):
        yield f"{text} (epoch mean {_number(series.epochs[-1])})" if series.epochs else text


def epoch_means(curve: Curve, values: HostArray) -> tuple[float, ...]:
    """The mean of a loss or metric over the examples of the first and of the last whole epoch.

    One number where they are the same epoch; none where the batches of an epoch are not known.

    Args:
      values: one for each step.
    """
    epoch, batch, steps = curve.epoch or 0, curve.task.batch or 0, len(values)
    whole = steps // epoch if epoch > 1 and batch and curve.task.arrays else 0
    if not whole:
        return ()
    # The last batch of an epoch has what is left of the rows.
    rows, left = divmod(curve.examples - steps % epoch * batch, whole)
    last = rows - (epoch - 1) * batch
    if left or not 0 < last <= batch:
        return ()
    ends = (values[begin : begin + epoch] for begin in sorted({0, (whole - 1) * epoch}))
    return tuple((float(each[:-1].sum(dtype=float)) * batch + float(each[-1]) * last) / rows for each in ends)


def rates(curve: Curve) -> tuple[str, ...]:
    """`812 steps/s`, `104k examples/s`, and of a training under way `0.4 s left`."""
    steps = len(curve.losses)
    if not steps or curve.seconds <= 0:
        return ()
    parts = [f"{_rate(steps / curve.seconds)} steps/s"]
    if curve.examples:
        parts.append(f"{_rate(curve.examples / curve.seconds)} examples/s")
    if curve.total is not None and steps < curve.total and not curve.stopped:
        parts.append(f"{seconds((curve.total - steps) * curve.seconds / steps)} left")
    return tuple(parts)


def outcome(curve: Curve) -> tuple[str, ...]:
    """What a training has come to: `step 300 of 500`, `epoch 2.1`, why it was stopped, loss and metrics."""
    stopped = (cut(clean(curve.stopped), 60),) if curve.stopped else ()
    return (_step(curve), *epochs_of(curve), *stopped, *_latest_with_means(curve))


def news(curve: Curve) -> list[str]:
    """What there is to tell of a training under way, the first first, with the course of the loss."""
    loss, *others = latest(curve) or ("",)
    course = sparkline(curve.losses, FEWEST_SPARKS, logarithmic=is_logarithmic(series_of(curve)))
    *speed, left = rates(curve) or ("",)
    return [*filter(None, [_step(curve), f"{loss} {course}".strip(), left, *epochs_of(curve), *others, *speed])]


def _step(curve: Curve) -> str:
    """`step 300 of 500`, or `500 steps`."""
    steps = steps_of(curve)
    return f"step {steps}" if " of " in steps else plural(len(curve.losses), "step")


def _rate(value: float) -> str:
    """`0.42`, `812`, `104k`, `2.1M`."""
    for unit, size in (("", 1.0), ("k", 1e3), ("M", 1e6)):
        if value < 999.5 * size or unit == "M":
            return f"{value / size:.3g}{unit}"
    raise AssertionError(value)


def _number(value: float) -> str:
    return "NaN" if math.isnan(value) else f"{value:.3g}"


# -- as lines of text


class Series(Struct, frozen=True, eq=False, dict=True):
    """The values of a loss or a metric, after how many steps each was taken, and `epoch_means`."""

    name: str
    steps: HostArray
    values: HostArray
    is_loss: bool = False
    epochs: tuple[float, ...] = ()

    @property
    def change(self) -> str:
        """First and last value: `2.31 → 0.231`."""
        first, last = _number(self.values[0]), _number(self.values[-1])
        return first if len(self.values) == 1 else f"{first} → {last}"

    @property
    def best(self) -> str:
        """The means of the first and the last epoch, `by epoch 2.1 → 0.41`; where none are known the lowest loss,
        `lowest 0.198 at step 287`, or the range of a metric, `0.125 at step 1 … 0.938 at step 5`.

        Nobody says of a metric whether more is better, so it has both ends.
        """
        steps, values = self.finite
        texts = []
        if self.epochs:
            first, last = _number(self.epochs[0]), _number(self.epochs[-1])
            texts.append(f"by epoch {first} → {last}" if len(self.epochs) > 1 else f"epoch mean {first}")
        elif len(values) and len(self.values) > 1:
            ends = [
                f"{_number(values[at])} at step {count(int(steps[at]))}" for at in (values.argmin(), values.argmax())
            ]
            constant = not self.is_loss and values.min() == values.max()
            texts += [] if constant else [f"lowest {ends[0]}"] if self.is_loss else [" … ".join(ends)]
        if len(self.broken):
            times = plural(len(self.broken), "time")
            texts.append(f"not finite {times}, first at step {count(int(self.broken[0]))}")
        return "; ".join(texts)

    @cached_property
    def finite(self) -> tuple[HostArray, HostArray]:
        """The steps with finite values, and these values."""
        finite = np.isfinite(self.values)
        # A live curve of a million steps is looked at twice a second: what can be, is left as it is.
        return (self.steps, self.values) if finite.all() else (self.steps[finite], self.values[finite])

    @property
    def broken(self) -> HostArray:
        """The steps whose values are not finite."""
        return self.steps[:0] if self.finite[1] is self.values else self.steps[~np.isfinite(self.values)]


def series_of(curve: Curve) -> list[Series]:
    """Loss and metrics of the steps, then those of the looks at the `--eval` data; none that has no values."""
    steps = np.arange(1, len(curve.losses) + 1)
    series = [Series("loss", steps, curve.losses, is_loss=True, epochs=epoch_means(curve, curve.losses))]
    series += [
        Series(clean(name), steps, values, epochs=epoch_means(curve, values)) for name, values in curve.metrics.items()
    ]
    looks = curve.evals
    if looks:
        at = np.array([look.step for look in looks])
        series.append(Series("eval loss", at, np.array([look.loss for look in looks]), is_loss=True))
        for name in looks[0].metrics:
            values = np.array([look.metrics.get(name, math.nan) for look in looks])
            series.append(Series(f"eval {clean(name)}", at, values))
    return [one for one in series if len(one.values)]


def lines(curve: Curve) -> list[str]:
    """A line for each loss and metric: sparkline, first and last value, and how the means of epochs went, or its ends."""
    shown = series_of(curve)
    logarithmic = is_logarithmic(shown)
    texts = [(f"{one.name}, log" if logarithmic and one.is_loss else one.name, one.change, one.best) for one in shown]
    taken = 2 + 3 * 2 + sum(max((cell_len(row[at]) for row in texts), default=0) for at in range(3))
    columns = min(SPARKS, max(FEWEST_SPARKS, width() - taken))
    rows = [
        (name, sparkline(one.values, columns, logarithmic=logarithmic and one.is_loss), change, best)
        for one, (name, change, best) in zip(shown, texts, strict=True)
    ]
    return [line.rstrip() for line in table(rows, indent="  ")]


def sparkline(values: HostArray, columns: int, *, logarithmic: bool = False) -> str:
    """The course of `values` as blocks of eight heights, each the mean of the values that it stands for."""
    means = _scaled(_means(values, columns), logarithmic=logarithmic)
    finite = means[np.isfinite(means)]
    if not len(finite):
        return BROKEN * len(means)
    low, high = finite.min(), finite.max()
    heights = (means - low) / (high - low) if high > low else means - low + 0.5
    return "".join(BLOCKS[round(7 * height)] if math.isfinite(height) else BROKEN for height in heights.tolist())


def is_logarithmic(series: Sequence[Series]) -> bool:
    """Whether all losses are positive, and the largest is a decade or more from the smallest."""
    low, high = _range(series)
    return low > 0 and high / low >= DECADE


def _range(series: Sequence[Series]) -> tuple[float, float]:
    """The lowest and the highest loss; NaN where there is none."""
    finite = [one.finite[1] for one in series if one.is_loss and len(one.finite[1])]
    low = min((float(values.min()) for values in finite), default=math.nan)
    return low, max((float(values.max()) for values in finite), default=math.nan)


def _scaled(values: HostArray, *, logarithmic: bool) -> HostArray:
    """The values as they are drawn: their logarithms, or themselves."""
    values = np.asarray(values, np.float64)
    return np.log10(values) if logarithmic else values


def _means(values: HostArray, parts: int) -> HostArray:
    """The mean of the finite values in each of `parts` parts; NaN for a part without any."""
    if len(values) <= parts:
        return np.where(np.isfinite(values), values, math.nan)
    means = []
    for begin, end in _parts(len(values), parts):
        finite = values[begin:end][np.isfinite(values[begin:end])]
        means.append(finite.mean(dtype=float) if len(finite) else math.nan)
    return np.array(means)


def _parts(size: int, parts: int) -> list[tuple[int, int]]:
    """Where each of `parts` parts of about the same length begins and ends."""
    return list(pairwise(np.linspace(0, size, parts + 1).astype(int).tolist()))


# -- as a picture


class Scale(Struct, frozen=True):
    """One axis: values from `low` to `high` (logarithms, if `logarithmic`) lie from `begin` to `end` in the picture."""

    low: float
    high: float
    begin: float
    end: float
    logarithmic: bool = False

    def place(self, values: HostArray | float) -> HostArray:
        """Where the (scaled) values lie."""
        return self.begin + (np.asarray(values) - self.low) / (self.high - self.low) * (self.end - self.begin)

    def ticks(self) -> list[tuple[float, float]]:
        """The round values to write at the axis, and where each lies."""
        values = _decades(self.low, self.high) if self.logarithmic else _round_values(self.low, self.high)
        return [(value, float(self.place(math.log10(value) if self.logarithmic else value))) for value in values]


def _round_values(low: float, high: float) -> list[float]:
    """Up to six multiples of 1, 2 or 5 times a power of ten, in the range."""
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(times * power for times in (1, 2, 5, 10) if times * power >= rough * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [n * step for n in range(first, last + 1)]


def _decades(low: float, high: float) -> list[float]:
    """Powers of ten in the range of logarithms, at most six; of a short range 2 and 5 times them as well."""
    powers = range(math.floor(low), math.ceil(high) + 1)
    fine = [times * 10.0**power for power in powers for times in (1, 2, 5)]
    fine = [value for value in fine if low <= math.log10(value) <= high]
    if len(fine) <= 6:
        return fine
    whole = [power for power in powers if low <= power <= high]
    return [10.0**power for power in whole if (power - whole[0]) % math.ceil(len(whole) / 6) == 0]


LEGEND = {
    "steps": ("train", (("M1 5H23", 1.0, ""),)),
    "smooth": ("train, smoothed", (("M1 5H23", 2.25, ""),)),
    "looks": ("eval", (("M1 5H23", 1.0, "2 4"), ("M8.5 5a3.5 3.5 0 1 0 7 0a3.5 3.5 0 1 0 -7 0", 1.5, ""))),
    "broken": ("not finite", (("M8 1l8 8m0-8l-8 8", 1.75, ""),)),
}
"""What each kind of line in the picture is called, and how it looks: paths with their widths and dashes."""


def context(curve: Curve) -> dict[str, object]:
    """What the template takes: the picture with its legend, and the numbers of each loss and metric."""
    drawn = picture(curve)
    return {
        "picture": drawn,
        "legend": [told for name, told in LEGEND.items() if drawn and drawn[name]],
        "series": [(one.name, one.change, one.best) for one in series_of(curve)],
    }


def picture(curve: Curve) -> dict[str, object] | None:
    """The lines, marks and axes of the picture; None where there is no finite loss.

    However many steps there were, their line has some hundred points: the lowest and the highest of each part of it.
    """
    losses = [one for one in series_of(curve) if one.is_loss]
    if math.isnan(_range(losses)[0]):
        return None
    logarithmic = is_logarithmic(losses)
    low, high = _scaled(np.array(_range(losses)), logarithmic=logarithmic).tolist()
    margin = (high - low) * 0.04 or abs(low) * 0.1 or 1.0
    upward = Scale(low - margin, high + margin, BOTTOM, TOP, logarithmic)
    last = max(int(one.steps[-1]) for one in losses)
    along = Scale(0.0, float(last), LEFT, RIGHT)
    drawn: dict[str, object] = {"steps": "", "smooth": "", "looks": []}
    broken: set[float] = set()
    for one in losses:
        # At most `BUCKETS` of them, evenly spaced.
        some = one.broken[:: max(1, math.ceil(len(one.broken) / BUCKETS))]
        broken |= {round(at, 1) for at in along.place(some).tolist()}
        steps, values = one.finite
        at = _extremes(values)
        x, y = along.place(steps[at]), upward.place(_scaled(values[at], logarithmic=logarithmic))
        points = list(zip(x.tolist(), y.tolist(), strict=True))
        if one.name != "loss":
            drawn["looks"] = points
            continue
        drawn["steps"] = _path(points)
        # A curve that only falls goes through its range once.
        if len(values) > SMOOTHED and np.abs(np.diff(y)).sum() >= NOISY * np.ptp(y):
            means = _scaled(_means(values, SMOOTHED), logarithmic=logarithmic)
            x, y = along.place(_means(steps, SMOOTHED)), upward.place(means)
            drawn["smooth"] = _path(zip(x.tolist(), y.tolist(), strict=True))
    return {
        **drawn,
        "rows": [(f"{value:.4g}", at) for value, at in upward.ticks()],
        "columns": [(count(round(value)), at) for value, at in along.ticks() if value == round(value)],
        "title": "loss, logarithmic" if logarithmic else "loss",
        "broken": sorted(broken),
        "stopped": float(along.place(len(curve.losses))) if curve.stopped else None,
        "said": f"loss over {plural(last, 'step')}: {losses[0].change}",
    }


def _extremes(values: HostArray) -> HostArray:
    """The indices of the first, the last, and of each part the lowest and the highest value."""
    if len(values) <= 2 * BUCKETS:
        return np.arange(len(values))
    parts = _parts(len(values), BUCKETS)
    chosen = {begin + int(pick(values[begin:end])) for begin, end in parts for pick in (np.argmin, np.argmax)}
    return np.array(sorted(chosen | {0, len(values) - 1}))


def _path(points: Iterable[tuple[float, float]]) -> str:
    """The points of a `polyline`; a single one twice, which is drawn as a dot."""
    texts = [f"{x:.1f},{y:.1f}" for x, y in points]
    return " ".join(texts * 2 if len(texts) == 1 else texts)
