"""The program of a step, kept for later trainings of the same code, and no longer."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from by_hand import bits
from flax import nnx
from sessions import session_of

X = np.random.RandomState(0).randn(8, 4).astype(np.float32)
SCALE = {"by": 1.0}
RATES = {"first": 0.1}


class Net(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        return nn.Dense(2)(nn.relu(nn.Dense(3)(x)))


class NnxNet(nnx.Module):
    def __init__(self, rngs: Any) -> None:
        self.first, self.second = nnx.Linear(4, 3, rngs=rngs), nnx.Linear(3, 2, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        return self.second(nnx.relu(self.first(x)))


def loss(net: Any, x: Any) -> Any:
    return SCALE["by"] * (net(x) ** 2).mean()


def scheduled(count: Any) -> Any:
    return RATES["first"] / (1 + count)


def doubled(following: Any, args: Any, kwargs: Any, context: Any) -> Any:
    result = following(*args, **kwargs)
    return 2 * result if context.method_name == "__call__" else result


def training(session: Any, data: Any = X, **options: Any) -> Any:
    """A training in draw 1, from the same weights each time."""
    session.restart(0)
    weights = jax.tree_util.tree_map(jnp.ones_like, session.models["net"].variables)
    session.models["net"].variables = weights
    options = {"optimizer": optax.sgd(scheduled), "steps": 3, **options}
    return session.train(loss, "net", data, **options)


def prepared(net: Any = None) -> Any:
    session = session_of(Net() if net is None else net)
    if net is None:
        session.init("net", X)
    return session


@pytest.mark.parametrize("net", [None, NnxNet(nnx.Rngs(0))], ids=["linen", "nnx"])
def test_the_same_training_again_traces_no_step_and_gives_the_same_bits(net):
    session = prepared(net)
    first, again = training(session, batch=4), training(session, batch=4)
    assert (first.program, again.program) == ("compiled", "reused")
    assert first.timing.lower > 0
    assert again.timing.lower == 0
    assert bits(again.losses) == bits(first.losses)
    assert bits(again.output) == bits(first.output)


CHANGES: dict[str, tuple[Any, dict[str, Any]]] = {
    "a global of the loss": (lambda patch: patch.setitem(SCALE, "by", 3.0), {}),
    "a dict of the schedule": (lambda patch: patch.setitem(RATES, "first", 0.5), {}),
    "a function of the optimizer's": (
        lambda patch: patch.setattr(scheduled, "__code__", (lambda count: 0.3 / (2 + count)).__code__),
        {},
    ),
    "another optimizer": (lambda patch: None, {"optimizer": optax.sgd(0.7)}),
    "one that takes the loss": (lambda patch: None, {"optimizer": optax.lbfgs()}),
    "frozen parameters": (lambda patch: None, {"freeze": "Dense_1"}),
    "other data": (lambda patch: None, {"data": X[:6]}),
    "their dtype": (lambda patch: None, {"data": X.astype(jnp.bfloat16)}),
}


@pytest.mark.parametrize("change", CHANGES)
def test_where_anything_that_a_step_depends_on_is_other_it_is_traced_anew(change, monkeypatch):
    make, options = CHANGES[change]
    session = prepared()
    training(session)
    make(monkeypatch)
    changed, expected = training(session, **options), training(prepared(), **options)
    assert changed.timing.lower > 0
    assert bits(changed.losses) == bits(expected.losses)
    assert bits(changed.output) == bits(expected.output)


@pytest.mark.parametrize(
    "context", [lambda: nn.intercept_methods(doubled), lambda: jax.default_matmul_precision("highest")]
)
def test_so_it_is_in_another_context_of_flax_or_jax(context):
    session = prepared()
    training(session)
    with context():
        changed, expected = training(session), training(prepared())
    assert changed.timing.lower > 0
    assert bits(changed.losses) == bits(expected.losses)
    assert training(session).timing.lower == 0


def test_to_let_go_of_old_programs_keeps_those_of_a_models_last_training():
    session = prepared()
    training(session, freeze="Dense_1")
    training(session)
    assert session.programs.let_go({"net"}) == 1
    assert training(session).timing.lower == 0
    assert training(session, freeze="Dense_1").program == "compiled"
    assert session.programs.let_go(()) == 2
    assert (len(session.programs.by_step), len(session.programs)) == (0, 0)


def test_a_step_that_calls_back_is_that_of_the_function_that_was_traced(capsys):
    session = session_of(Net())
    session.init("net", X)

    def noisy(text: str) -> Any:
        def loss(net: Any, x: Any) -> Any:
            jax.debug.print(text)
            return (net(x) ** 2).mean()

        return loss

    for text in ("one", "two"):
        session.train(noisy(text), "net", X, optimizer=optax.sgd(0.1), steps=1)
        jax.effects_barrier()
    assert capsys.readouterr().out.split() == ["one", "two"]
