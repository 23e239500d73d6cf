"""The numbers that a training gives: a loss and metrics for each step, and looks at other data in between."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import numpy as np
from msgspec import Struct

from .types import HostArray

ROW_ORDER = "row order"
"""The stream of a training's draw whose key shuffles the rows: no identifier, so that it is none of a model's."""
EVAL = "eval"
"""Stands before the names of the streams that a look takes: a step has others."""
STORED = 10_000
"""The most steps of which a saved notebook has the numbers."""


class Evaluation(Struct, frozen=True):
    """One look at the `--eval` data: loss and metrics over all of them, weighed by their examples.

    Attributes:
      step: how many steps were finished before it.
    """

    step: int
    loss: float
    metrics: Mapping[str, float]


class Task(Struct, frozen=True, forbid_unknown_fields=True):
    """What a training was asked to do, as it was written.

    Attributes:
      optimizer: the text of the optimizer, empty where it is not known.
      batch, epochs, steps, freeze: see `Session.train`.
      eval: the text of the `--eval` data, empty without any.
      arrays: its data are arrays, and no iterable of batches.
      once: its data are an iterator, which is gone through only once.
      on_host: its data are arrays of which the device is given a batch at a time.
      takes_loss: the optimizer's `update` takes the loss, too.
      parts: how many steps were finished when each of its commands ended, the present one left out.
      looks: how many looks at the `--eval` data there were by then.
    """

    optimizer: str = ""
    batch: int | None = None
    epochs: int | None = None
    steps: int | None = None
    eval: str = ""
    freeze: tuple[str, ...] = ()
    arrays: bool = True
    once: bool = False
    on_host: bool = False
    takes_loss: bool = False
    parts: tuple[int, ...] = ()
    looks: tuple[int, ...] = ()


class Curve(Struct, frozen=True, eq=False):
    """What a training has done so far.

    Attributes:
      losses: one for each finished step, float32.
      metrics: name → one for each finished step, float32.
      evals: the looks at the `--eval` data, in order.
      total: the steps that were asked for in all; None until the length of an iterable is known.
      epoch: the steps of one epoch; None where that is not known.
      examples: how many there were in the finished steps.
      seconds: the time of the finished steps, that of the looks included.
      group: how many steps one program does.
      task: what was asked for.
      stopped: empty for a training that has finished or is under way; `interrupted`, or why it ended, in one line.
    """

    losses: HostArray = np.zeros(0, np.float32)
    metrics: Mapping[str, HostArray] = {}
    evals: tuple[Evaluation, ...] = ()
    total: int | None = None
    epoch: int | None = None
    examples: int = 0
    seconds: float = 0.0
    group: int = 1
    stopped: str = ""
    task: Task = Task()

    def to_json(self) -> dict[str, object]:
        """The numbers as JSON data, null for one that is not finite.

        Of more than `STORED` steps only every n-th is there, the last among them: `every` is this n.
        """
        steps = len(self.losses)
        every = max(1, math.ceil(steps / STORED))
        chosen = slice((steps - 1) % every if steps else 0, None, every)
        looks = [
            {"step": look.step, "loss": _number(look.loss), "metrics": {k: _number(v) for k, v in look.metrics.items()}}
            for look in self.evals
        ]
        names = ("total", "epoch", "examples", "seconds", "group", "stopped")
        return {
            "steps": steps,
            "every": every,
            "losses": _numbers(self.losses[chosen]),
            "metrics": {name: _numbers(values[chosen]) for name, values in self.metrics.items()},
            "evals": looks,
            **{name: getattr(self, name) for name in names},
        }


def _number(value: float) -> float | None:
    # A browser does not read the NaN that Python writes into JSON.
    return value if math.isfinite(value) else None


def _numbers(values: HostArray) -> list[float | None]:
    """The shortest numbers that are these float32 values, read as float32: a half of the digits of their float64."""
    shortest: Iterable[str] = map(str, values)
    return [_number(float(text)) for text in shortest]
