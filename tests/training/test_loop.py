"""How long a training is, when it looks at other data, and what its numbers are."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from flax_magics.base.measures import Curve
from flax_magics.base.threads import Interrupts, Unfinished
from flax_magics.training import loop
from flax_magics.training.data import ArrayData, Batch
from flax_magics.training.loop import NotFinite, Numbers, Schedule, TrainingLoop, started
from flax_magics.training.programs import Groups
from flax_magics.training.step import StepResult, TrainState


@pytest.mark.parametrize(
    ("epochs", "steps", "per_epoch", "total", "looks"),
    [
        (3, None, 4, 12, [4, 8, 12]),
        (2, None, 1, 2, [1, 2]),
        (None, 20, 4, 20, [2, 4, 6, 8, 10, 12, 14, 16, 18, 20]),
        (None, 4, None, 4, [1, 2, 3, 4]),
        (None, 3, 100, 3, [1, 2, 3]),
    ],
)
def test_data_are_looked_at_each_epoch_or_ten_times_and_at_the_end(epochs, steps, per_epoch, total, looks):
    schedule = Schedule(epochs, steps, per_epoch, looks=True)
    assert schedule.total == total
    assert [step for step in range(total + 1) if schedule.looks_after(step)] == looks
    for step in range(total):
        assert schedule.next_look(step) == next(look for look in looks if look > step)
    without = Schedule(epochs, steps, per_epoch, looks=False)
    assert not any(without.looks_after(step) for step in range(total + 1))
    assert without.next_look(0) == total


def test_an_iterable_says_how_long_it_is_when_it_ends():
    schedule = Schedule(2, None, None, looks=True)
    assert (schedule.total, schedule.looks_after(3)) == (None, False)
    schedule.end_epoch(3, 1)
    assert (schedule.total, schedule.looks_after(3)) == (6, True)
    schedule.end_epoch(5, 2)  # shorter, the second time
    assert (schedule.total, schedule.looks_after(5)) == (5, True)


def test_numbers_grow_and_what_was_read_stays():
    numbers = Numbers(Curve(losses=np.float32([3.0]), metrics={"accuracy": np.float32([0.5])}))
    numbers.add(np.float32(2.0), {"accuracy": np.float32(0.25), "late": np.int32(7)}, 1)
    before, metrics = numbers.losses, numbers.metrics
    numbers.add(np.arange(99, dtype=np.float64), {"accuracy": np.ones(99, np.float32), "late": np.ones(99)}, 99)
    assert before.tolist() == [3.0, 2.0]
    assert metrics["accuracy"].tolist() == [0.5, 0.25]
    np.testing.assert_array_equal(metrics["late"], np.float32([np.nan, 7]))
    assert (numbers.count, numbers.losses.tolist()) == (101, [3.0, 2.0, *range(99)])
    assert {array.dtype.name for array in (numbers.losses, *numbers.metrics.values())} == {"float32"}
    numbers.add(np.float32(1.0), {"accuracy": np.float32(0.75)}, 1)  # of a loss that has one metric fewer
    assert np.isnan(numbers.metrics["late"][-1])
    assert {len(array) for array in numbers.metrics.values()} == {numbers.count} == {102}


def going(steps: int, not_finite: int | None = None) -> tuple[TrainingLoop, list[int], list[int]]:
    """A loop over steps that are done at once and hold a kilobyte each.

    Returns it with how many steps it was ahead at each, and how many were finished whenever it said that some were; both
    are filled as it runs. `not_finite`: the number of the step that is not.
    """
    ahead: list[int] = []
    finished: list[int] = []

    def program(state: TrainState, number: int, batch: Batch) -> StepResult:
        ahead.append(number + 1 - training.step)
        alive = state.alive & (number != not_finite)
        return StepResult(state._replace(alive=alive), jnp.float32(number), {}, alive)

    data = ArrayData("data", {"x": np.zeros((1, 1), np.float32)}, None)
    data.held = False  # so that nothing is tried in groups
    training = TrainingLoop(
        lambda batch: program,
        started({"params": np.zeros(256, np.float32)}, ()),
        data,
        Schedule(None, steps, None, looks=False),
        curve=Curve(),
        groups=Groups(data, lambda batch: None, lambda: 0.0, 1),
        unfinished=Unfinished(),
    )
    return training, ahead, finished


def look(*_: Any) -> Any:
    raise AssertionError


@pytest.mark.parametrize(
    ("limits", "most"),
    [({"SECONDS": 1e9}, 32), ({"SECONDS": 1e9, "MEMORY": 5 * 1029}, 5), ({"SECONDS": 0.0}, 2), ({"BRIEF": 0.0}, 1)],
)
def test_short_steps_are_counted_in_blocks_for_which_there_is_time_and_memory(monkeypatch, limits, most):
    monkeypatch.setattr(loop, "BRIEF", 1e9)
    for name, value in limits.items():
        monkeypatch.setattr(loop, name, value)
    training, ahead, finished = going(100)
    training.run(Interrupts(), look, lambda: finished.append(training.step))
    assert (max(ahead), training.numbers.losses.tolist()) == (most, [*range(100)])
    # One half of them at a time, until there are none to give ahead of the others.
    assert max(np.diff(finished)) == max(1, most // 2)
    assert finished[-1] == 100


def test_of_a_block_with_a_step_that_is_not_finite_those_before_it_count(monkeypatch):
    monkeypatch.setattr(loop, "BRIEF", 1e9)
    monkeypatch.setattr(loop, "SECONDS", 1e9)
    training, ahead, finished = going(100, not_finite=40)
    with pytest.raises(NotFinite):
        training.run(Interrupts(), look, lambda: finished.append(training.step))
    assert (training.step, training.numbers.losses.tolist()) == (40, [*range(40)])
    assert training.failed is not None
    assert (bool(training.state.alive), float(training.failed[1]), max(ahead)) == (True, 40, 32)
