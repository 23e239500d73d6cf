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
from flax_magics.training import group
from flax_magics.training.data import ArrayData
from flax_magics.training.group import Groups
from flax_magics.training.programs import StepPrograms

pytestmark = pytest.mark.usefixtures("optimised")

RANDOM = np.random.RandomState(0)
DATA = {"x": RANDOM.randn(50, 6).astype(np.float32), "y": RANDOM.randint(0, 3, 50)}


class Net(nn.Module):
    @nn.compact
    def __call__(self, x: Any, train: bool = False) -> Any:
        return nn.Dense(3)(nn.Dropout(0.5, deterministic=not train)(nn.relu(nn.Dense(8)(x))))


def loss(net: Any, batch: Any, train: bool) -> Any:
    logits = net(batch["x"], train=train)
    value = optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]).mean()
    return value, {"accuracy": (logits.argmax(-1) == batch["y"]).mean()}


def goes_on_in_groups(session: Any, monkeypatch: pytest.MonkeyPatch, size: int) -> list[int]:
    """Has the next `--resume` try groups of that size at once; returns the steps that programs will be given."""
    monkeypatch.setattr(group, "FASTER", 1e9)
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


def test_a_group_that_is_not_finite_ends_at_that_step(monkeypatch):
    data = {**DATA, "x": DATA["x"].copy()}
    data["x"][21] = np.nan

    def stopped(grouped: bool) -> tuple[str, Any, Any]:
        session = session_of(Net())
        session.train(loss, "net", DATA, optimizer=optax.sgd(1e-2), batch=8, epochs=3)
        if grouped:
            goes_on_in_groups(session, monkeypatch, 3)
        session.train(loss, "net", DATA, epochs=5, resume=True)
        assert session.runs[-1].trained.group == (3 if grouped else 1)
        with pytest.raises(FlaxMagicsError, match="`batch\\['x'\\]` holds NaN in row 21") as error:
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
    monkeypatch.setattr(group, "FASTER", 1e9)
    data = ArrayData("data", {"x": np.zeros((4, 2), np.float32)}, None)

    def program(state: Any, number: int, batch: Any) -> Any:
        many = batch.steps > 1
        state = state + batch.steps + 1e-3 * (many and wrong)
        value = np.arange(number, number + batch.steps) if many else np.asarray(number)
        return group.StepResult(state, jax.numpy.asarray(value), {}, jax.numpy.asarray(value > -1))

    for wrong in (False, True):
        groups = Groups(data, lambda batch: lambda: program, lambda: 0.0, 2)
        groups.count(1, 100, 0.0)
        assert groups.to_try(2, None)
        done = groups.attempt(jax.numpy.zeros(3), 2, lambda batch: program)
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
