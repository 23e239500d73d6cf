"""Several steps in one program: only where that is faster and gives the bits of one by one, and never across an edge."""

from __future__ import annotations

import time
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import optax
import pytest
from by_hand import bits
from msgspec.structs import replace
from sessions import session_of

from flax_magics import FlaxMagicsError
from flax_magics.training import programs
from flax_magics.training.data import ArrayData, BatchData
from flax_magics.training.programs import Groups, StepPrograms

pytestmark = pytest.mark.usefixtures("optimised")

RANDOM = np.random.RandomState(0)
DATA = {"x": RANDOM.randn(50, 6).astype(np.float32), "y": RANDOM.randint(0, 3, 50)}


class Net(nn.Module):
    @nn.compact
    def __call__(self, x: Any, train: bool = False) -> Any:
        return nn.Dense(3)(nn.Dropout(0.5, deterministic=not train)(nn.relu(nn.Dense(8)(x))))


def batches_of(*lengths: int) -> list[Any]:
    """Batches of the first rows, with so many each."""
    ends = np.cumsum(lengths)
    return [
        {name: array[end - length : end] for name, array in DATA.items()}
        for end, length in zip(ends, lengths, strict=True)
    ]


class Loader(list[Any]):
    """A loader whose iterators give and take their state."""

    def __iter__(self) -> Any:
        return Reading(self)


class Reading:
    """Goes through batches; `fetched` counts those of all."""

    fetched = 0

    def __init__(self, batches: list[Any]) -> None:
        self.batches, self.place = batches, 0

    def __iter__(self) -> Any:
        return self

    def __next__(self) -> Any:
        if self.place == len(self.batches):
            raise StopIteration
        self.place, Reading.fetched = self.place + 1, Reading.fetched + 1
        return self.batches[self.place - 1]

    def get_state(self) -> int:
        return self.place

    def set_state(self, state: int) -> None:
        self.place = state


def loss(net: Any, batch: Any, train: bool) -> Any:
    logits = net(batch["x"], train=train)
    value = optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]).mean()
    return value, {"accuracy": (logits.argmax(-1) == batch["y"]).mean()}


def goes_on_in_groups(session: Any, monkeypatch: pytest.MonkeyPatch, size: int) -> list[int]:
    """Has the next `--resume` try groups of that size at once; returns the steps that programs will be given."""
    monkeypatch.setattr(programs, "FASTER", 1e9)
    begin, bound, given = StepPrograms.begin, StepPrograms._bound, list[int]()

    def begin_and_wait(programs: StepPrograms, batch: Any) -> Any:
        finished = begin(programs, batch)
        if finished is None:
            return None
        while (program := finished()) is None:
            time.sleep(0.01)
        return lambda: program

    def counted(programs: StepPrograms, executable: Any, batch: Any) -> Any:
        program = bound(programs, executable, batch)

        def run(state: Any, number: int, batch: Any) -> Any:
            given.extend([number] if batch.steps > 1 else [])
            return program(state, number, batch)

        return run

    monkeypatch.setattr(StepPrograms, "begin", begin_and_wait)
    monkeypatch.setattr(StepPrograms, "_bound", counted)
    entry = session._state.models["net"]
    after = replace(entry, training=replace(entry.training, group=size))
    session._state = replace(session._state, models={"net": after})
    return given


@pytest.mark.parametrize(("size", "built"), [(6, [6]), (7, [])])
def test_no_group_is_built_that_no_epoch_has_room_for(size, built):
    sizes: list[int] = []
    groups = Groups(ArrayData("data", DATA, 8), lambda batch: sizes.append(batch.steps), lambda: 0.0, size)
    groups.count(1, 100, 0.0)
    assert sizes == built


def test_groups_have_the_bits_of_one_by_one(monkeypatch):
    whole, session = session_of(Net()), session_of(Net())
    expected = whole.train(loss, "net", DATA, optimizer=optax.adamw(1e-2), batch=8, epochs=6, eval=DATA)
    session.train(loss, "net", DATA, optimizer=optax.adamw(1e-2), batch=8, epochs=1, eval=DATA)
    given = goes_on_in_groups(session, monkeypatch, 3)
    run = session.train(loss, "net", DATA, epochs=6, resume=True, eval=DATA)
    assert run.trained.group == 3
    # Seven steps an epoch, of which the last has two rows. Tried twice where it could first be, after one step.
    assert given == [10, 10, *(7 * epoch + place for epoch in range(2, 6) for place in (0, 3))]
    assert bits(run.losses) == bits(expected.losses)
    assert bits(run.metrics) == bits(expected.metrics)
    assert run.eval == expected.eval
    assert bits(session.models["net"].variables) == bits(whole.models["net"].variables)


@pytest.mark.parametrize(
    ("kind", "lengths", "given"),
    [
        # Seven steps an epoch, the last of which has two rows. Tried twice where it could first be.
        (list, (8, 8, 8, 8, 8, 8, 2), [14, 14, 28, 28, 35]),
        # No other shapes are in a group: of an epoch of twelve only the first four are one.
        (list, (4, 4, 4, 4, 4, 7, 4, 4, 4, 4, 4, 3), [24, 24, 48, 48, 60]),
        (Loader, (8, 8, 8, 8, 8, 8, 2), [14, 14, 28, 28, 35]),
    ],
)
def test_batches_of_an_iterable_are_stacked_with_the_bits_of_one_by_one(monkeypatch, kind, lengths, given):
    whole, session, data, steps = session_of(Net()), session_of(Net()), kind(batches_of(*lengths)), len(lengths)
    expected = whole.train(loss, "net", data, optimizer=optax.adamw(1e-2), epochs=6, eval=DATA)
    session.train(loss, "net", data, optimizer=optax.adamw(1e-2), steps=steps, eval=DATA)
    programs = goes_on_in_groups(session, monkeypatch, 4)
    # It stops inside a group of the grid, and goes on there one by one.
    assert session.train(loss, "net", data, steps=3 * steps + 2, resume=True).trained.group == 4
    run = session.train(loss, "net", data, epochs=6, resume=True)
    assert (run.trained.group, programs) == (4, given)
    assert bits(run.losses) == bits(expected.losses)
    assert bits(run.metrics) == bits(expected.metrics)
    assert bits(session.models["net"].variables) == bits(whole.models["net"].variables)


def test_no_batch_is_fetched_beyond_the_last_step_nor_more_than_three_groups_ahead(monkeypatch):
    monkeypatch.setattr(Reading, "fetched", 0)
    data = BatchData("data", Reading(batches_of(*[1] * 50)), most=40)
    data.put_together(4)
    try:
        assert [data.take(0, 4).steps, data.take(4, 1).steps, data.take(5, 4).steps] == [4, 1, 1]
        until = time.monotonic() + 5
        while Reading.fetched < 16 and time.monotonic() < until:
            time.sleep(0.01)
        time.sleep(0.1)
        assert (data.position.batches, data.position.state, Reading.fetched) == (6, 6, 16)
        taken = [data.take(6, 4), data.take(7, 4)]
        while (batch := data.take(0, 4)) is not None:
            taken.append(batch)
        assert [batch.steps for batch in taken] == [1, 1, *[4] * 8]
        assert (Reading.fetched, taken[-1].position.state, taken[-1].examples) == (40, 40, 4)
    finally:
        data.close()


def test_arrays_on_the_device_and_batches_of_many_bytes_are_not_stacked(monkeypatch):
    assert BatchData("data", batches_of(8, 8, 8)).most_together == 3
    assert BatchData("data", [jax.tree.map(jax.numpy.asarray, each) for each in batches_of(8, 8, 8)]).most_together == 1
    monkeypatch.setattr("flax_magics.training.data.BYTES", 2 * sum(array[:8].nbytes for array in DATA.values()))
    assert BatchData("data", batches_of(8, 8, 8)).most_together == 2


@pytest.mark.parametrize("stacked", [False, True])
def test_a_group_that_is_not_finite_ends_at_that_step(monkeypatch, stacked):
    data: Any = {**DATA, "x": DATA["x"].copy()}
    data["x"][21] = np.nan
    whole, options = DATA, {"batch": 8}
    if stacked:
        whole, data = (
            [{name: each[n : n + 5] for name, each in one.items()} for n in range(0, 50, 5)] for one in (DATA, data)
        )
        options = {}

    def stopped(grouped: bool) -> tuple[str, Any, Any]:
        session = session_of(Net())
        session.train(loss, "net", whole, optimizer=optax.sgd(1e-2), epochs=3, **options)
        if grouped:
            goes_on_in_groups(session, monkeypatch, 3)
        session.train(loss, "net", whole, epochs=5, resume=True)
        assert session.runs[-1].trained.group == (3 if grouped else 1)
        with pytest.raises(FlaxMagicsError, match=f"`batch\\['x'\\]` holds NaN in row {1 if stacked else 21}") as error:
            session.train(loss, "net", data, epochs=9, resume=True)
        return str(error.value), bits(session.runs[-1].losses), bits(session.models["net"].variables)

    assert stopped(grouped=False) == stopped(grouped=True)


@pytest.mark.parametrize(
    ("batch", "step", "until", "begins"),
    [
        (8, 0, None, True),
        (8, 3, None, True),
        (8, 4, None, False),
        (8, 6, None, False),
        (8, 7, None, True),
        (8, 7, 9, False),
    ],
)
def test_a_group_lies_on_the_grid_of_its_epoch(batch, step, until, begins):
    groups = Groups(ArrayData("data", DATA, batch), lambda batch: lambda: None, lambda: 0.0, 3)
    groups.count(1, 100, 0.0)
    assert groups.begins_at(step, until) is begins


def test_a_group_with_other_bits_is_not_used(monkeypatch):
    monkeypatch.setattr(programs, "FASTER", 1e9)
    data = ArrayData("data", {"x": np.zeros((4, 2), np.float32)}, None)

    def program(state: Any, number: int, batch: Any) -> Any:
        many = batch.steps > 1
        state = state + batch.steps + 1e-3 * (many and wrong)
        value = np.arange(number, number + batch.steps) if many else np.asarray(number)
        return programs.StepResult(state, jax.numpy.asarray(value), {}, jax.numpy.asarray(value > -1))

    for wrong in (False, True):
        groups = Groups(data, lambda batch: lambda: program, lambda: 0.0, 2)
        groups.count(1, 100, 0.0)
        assert groups.to_try(2, None)
        done = groups.attempt(jax.numpy.zeros(3), 2, data.take(2, 2), lambda batch: program)
        assert [(int(result.loss), batch.steps) for result, batch in done] == [(2, 1), (3, 1)]
        assert groups.size == (1 if wrong else 2)


def test_an_optimizer_may_hold_a_key(monkeypatch):
    def update(grads: Any, key: Any, params: Any = None) -> Any:
        return jax.tree.map(lambda grad: -0.1 * grad, grads), jax.random.split(key)[0]

    keyed = optax.GradientTransformation(lambda params: jax.random.key(0), update)
    session = session_of(Net())
    session.train(loss, "net", DATA, optimizer=keyed, batch=8, steps=1)
    goes_on_in_groups(session, monkeypatch, 3)
    assert session.train(loss, "net", DATA, steps=12, resume=True).trained.group == 3


def test_steps_that_call_back_are_done_one_by_one_and_once(monkeypatch):
    called: list[float] = []

    def printing(net: Any, batch: Any, train: bool) -> Any:
        value, metrics = loss(net, batch, train)
        jax.debug.callback(lambda value: called.append(float(value)), value)
        return value, metrics

    session = session_of(Net())
    session.train(printing, "net", DATA, optimizer=optax.sgd(0.1), batch=8, steps=1)
    jax.effects_barrier()
    called.clear()  # an init has called it, too
    goes_on_in_groups(session, monkeypatch, 3)
    run = session.train(printing, "net", DATA, steps=12, resume=True)
    jax.effects_barrier()
    assert run.trained.group == 1
    assert sorted(called) == sorted(map(float, run.losses[1:]))
