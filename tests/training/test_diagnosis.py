"""Planted mistakes in a loss, each named by module, line and value; and layers without a gradient."""

from __future__ import annotations

import re
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

from flax_magics import FlaxMagicsError
from flax_magics.state.entry import Replaced
from flax_magics.training.evaluation import Level, culprit_of

X = jax.random.normal(jax.random.key(0), (3, 5))


def logarithm(x: Any) -> Any:
    return jnp.log(nn.relu(x) * 0)  # planted


def root(x: Any) -> Any:
    return jnp.sqrt(nn.relu(x) * 0)  # planted


def hidden(x: Any) -> Any:
    return jnp.where(jnp.arange(4) > 1, -jnp.inf, x)


def overflow(x: Any) -> Any:
    return (jnp.abs(x) + 1).astype(jnp.bfloat16) * jnp.bfloat16(1e38) * jnp.bfloat16(100)  # planted


def half(x: Any) -> Any:
    return (jnp.abs(x) + 2).astype(jnp.float16) * jnp.float16(6e4)  # planted


@jax.custom_jvp
def slow(x: Any) -> Any:
    return jnp.log(x * 0)  # planted


slow.defjvps(lambda tangent, output, x: tangent)


class Net(nn.Module):
    """What `kind` is called stands between two layers."""

    kind: Any

    @nn.compact
    def __call__(self, x: Any) -> Any:
        return nn.Dense(3, name="last")(self.kind(nn.Dense(4, name="first")(x)))


def masked(x: Any) -> Any:
    return jnp.log(nn.softmax(hidden(x)))  # planted


def with_a_rule(function: Any, rule: Any = lambda tangent, output, x: tangent) -> Any:
    """The function with a derivative of its own."""
    ruled = jax.custom_jvp(lambda x: function(x).astype(jnp.float32))
    ruled.defjvps(rule)
    return ruled


KINDS = {
    "logarithm": logarithm,
    "root": root,
    "masked": masked,
    "slow": slow,
    "overflow": lambda x: overflow(x).astype(jnp.float32),
    "half": lambda x: half(x).astype(jnp.float32),
    "half with a rule": with_a_rule(half),
    "overflow with a rule": with_a_rule(overflow),
    "masked with a rule": with_a_rule(masked),
    "root with a rule": with_a_rule(root, lambda tangent, output, x: tangent * (0.5 / output)),
    "mask with a rule": with_a_rule(lambda x: nn.softmax(hidden(x))),
    "harmless": lambda x: x,
}


class Chosen(nn.Module):
    """The kind that the batch chooses, in a branch of a loop; beside it a mask that is harmless."""

    @nn.compact
    def __call__(self, batch: Any) -> Any:
        def step(module: Any, carry: Any, t: Any) -> Any:
            values = jax.lax.switch(batch["kind"][0], [*KINDS.values()], nn.Dense(4, name="inner")(carry))
            return jnp.where(t == 1, values, carry), hidden(carry)

        loop = nn.scan(step, variable_broadcast="params", split_rngs={"params": False}, length=2)
        carry, aside = loop(self, nn.Dense(4, name="first")(batch["x"]), jnp.arange(2))
        return carry + nn.softmax(aside[0])


class OfNnx(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.first, self.last = nnx.Linear(5, 4, rngs=rngs), nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        return self.last(logarithm(self.first(x)))


def loss(net: Any, x: Any) -> Any:
    return (net(x).astype(jnp.float32) ** 2).mean()


def said(net: Any, x: Any = X) -> list[str]:
    """The notes of a run, the line of the source without its number."""
    run = session_of(net).grad(loss, "net", x)
    return [note.text for note in run.notes]


def planted(text: str) -> tuple[str, str]:
    """What comes before the line of the source, and the text of that line."""
    what, _, line = text.partition(", line ")
    return what, line.partition(": ")[2]


@pytest.mark.parametrize(
    ("net", "what", "line"),
    [
        (
            Net(logarithm),
            "the loss is NaN: log(0) gives -inf in the model itself",
            "return jnp.log(nn.relu(x) * 0)  # planted",
        ),
        (
            Net(root),
            "the loss is finite, and the gradient of first is not: div(0.5, 0) gives inf in the model itself",
            "return jnp.sqrt(nn.relu(x) * 0)  # planted",
        ),
        (
            OfNnx(nnx.Rngs(0)),
            "the loss is NaN: log(0) gives -inf in the model itself",
            "return jnp.log(nn.relu(x) * 0)  # planted",
        ),
    ],
)
def test_the_first_equation_that_is_not_finite_is_named(net, what, line):
    (text,) = said(net, jnp.abs(X))
    assert planted(text.replace("log(-0)", "log(0)")) == (what, line)


CALLED = 'values = jax.lax.switch(batch["kind"][0], [*KINDS.values()], nn.Dense(4, name="inner")(carry))'
CHOSEN = {
    "logarithm": ("log(0) gives -inf in the model itself at step 1", "return jnp.log(nn.relu(x) * 0)  # planted"),
    "root": ("div(0.5, 0) gives inf in the model itself at step 0", "return jnp.sqrt(nn.relu(x) * 0)  # planted"),
    "masked": ("log(0) gives -inf in the model itself at step 1", "return jnp.log(nn.softmax(hidden(x)))  # planted"),
    "overflow": (
        "mul(…, 9.969e+37) gives inf in the model itself at step 1",
        "return (jnp.abs(x) + 1).astype(jnp.bfloat16) * jnp.bfloat16(1e38) * jnp.bfloat16(100)  # planted",
    ),
    "half": (
        "mul(…, 6e+04) gives inf in the model itself at step 1",
        "return (jnp.abs(x) + 2).astype(jnp.float16) * jnp.float16(6e4)  # planted",
    ),
    # What a rule of its own differentiates has for JAX, in a loop, the line in which it is called.
    "slow": (
        "log(0) gives -inf in the model itself at step 1",
        CALLED,
    ),
    "half with a rule": ("mul(…, 6e+04) gives inf in the model itself at step 1", CALLED),
    "overflow with a rule": ("mul(…, 9.969e+37) gives inf in the model itself at step 1", CALLED),
    "masked with a rule": ("log(0) gives -inf in the model itself at step 1", CALLED),
    "root with a rule": ("div(0.5, 0) gives inf in the model itself at step 0", CALLED),
}


@pytest.fixture(scope="module")
def chosen() -> Any:
    """A session of one program, in which each batch has another kind; and the batch of a kind."""
    return session_of(Chosen()), lambda kind: {"x": X, "kind": jnp.full(3, [*KINDS].index(kind))}


@pytest.mark.parametrize("kind", CHOSEN)
def test_in_a_branch_of_a_loop_it_is_named_and_a_mask_that_is_harmless_is_not(chosen, kind):
    session, batch_of = chosen
    (note,) = session.grad(loss, "net", batch_of(kind)).notes
    what, line = planted(re.sub(r"mul\([0-9.e+]+, ", "mul(…, ", note.text.replace("log(-0)", "log(0)")))
    assert (what.partition(": ")[2], line) == (f"{CHOSEN[kind][0]} of the loop", CHOSEN[kind][1])
    harmless = batch_of("harmless")
    for kind in ("harmless", "mask with a rule"):
        assert session.grad(loss, "net", batch_of(kind)).notes == ()
    (note,) = session.grad(loss, "net", {**harmless, "x": X.at[1, 2].set(jnp.nan)}).notes
    assert note.text == "the loss is NaN: `x['x']` holds NaN in row 1"


@pytest.mark.parametrize("kind", ["slow", "half with a rule", "overflow with a rule", "masked with a rule"])
def test_where_no_loop_is_around_a_rule_of_its_own_the_line_in_it_is_named(kind):
    (text,) = said(Net(KINDS[kind]))
    line = "return jnp.log(x * 0)  # planted" if kind == "slow" else CHOSEN[kind.partition(" ")[0]][1]
    assert planted(text)[1] == line
    assert said(Net(KINDS["mask with a rule"])) == []


def test_losses_that_grew_until_they_were_not_finite_are_told():
    session = session_of(nn.Dense(3))
    before = session.train(loss, "net", X, optimizer=optax.sgd(1e-3), steps=2).output
    with pytest.raises(FlaxMagicsError) as error:
        session.train(loss, "net", X, optimizer=optax.sgd(1e3), steps=100)
    losses = session.runs[-1].losses
    assert error.value.hint == (
        f"the loss was {losses[0]:.4g} in the first step and {losses[-1]:.4g} in the last: the rate may be too high"
        " for steps that nothing clips\n"
        "once the loss or its data are mended, `%flax_train --resume loss(net, data)` goes on with this step\n"
        "the weights from before it are kept, and come back by the line below"
    )
    assert error.value.write == "%flax_vars net = flax_magics.session().models['net'].previous"
    assert bits(session.models["net"].previous) == bits(before)
    assert bits(session.models["net"].variables) != bits(before)


def test_those_that_it_made_itself_come_back_too():
    session, same = session_of(nn.Dense(3)), session_of(nn.Dense(3))
    with pytest.raises(FlaxMagicsError, match="not finite"):
        session.train(loss, "net", X, optimizer=optax.sgd(1e3), steps=100)
    same.grad(loss, "net", X)
    assert bits(session.models["net"].previous) == bits(same.models["net"].variables)
    session.models["net"].variables = session.models["net"].previous
    run = session.train(loss, "net", X, optimizer=optax.sgd(1e-3), steps=2)
    assert (session.models["net"].weights, bits(run.losses[:1])) == (
        "trained, 2 steps",
        bits(session.runs[0].losses[:1]),
    )


def test_those_from_before_it_are_kept_until_others_are_replaced():
    session = session_of(nn.Dense(3))
    for _ in range(2):
        session.init("net", X)
        with pytest.raises(FlaxMagicsError, match="not finite"):
            session.train(loss, "net", X, optimizer=optax.sgd(1e3), steps=100)
    diverged = session.models["net"].variables
    session.init("net", X)
    assert bits(session.models["net"].previous) == bits(diverged)
    session.settle()
    assert len([held for held in session._keeping._held if isinstance(held, Replaced)]) == 1


def test_a_training_that_is_stopped_by_its_data_keeps_no_weights_from_before_it():
    session = session_of(nn.Dense(3))
    data = {"x": np.ones((4, 4), np.float32), "y": np.float32([0, 0, np.nan, 0])}

    def weighed(net: Any, batch: Any) -> Any:
        return (net(batch["x"]).mean(1) * batch["y"]).mean()

    batches = [jax.tree_util.tree_map(lambda leaf: leaf[:2], data), data]
    with pytest.raises(FlaxMagicsError) as error:
        session.train(weighed, "net", batches, optimizer=optax.sgd(1e-3), epochs=1)
    assert (session.runs[-1].steps, error.value.write) == (1, None)
    with pytest.raises(FlaxMagicsError, match="no init and no edit has replaced weights of `net`"):
        _ = session.models["net"].previous


def test_a_first_step_that_is_not_finite_has_changed_no_weights_to_take_back():
    session = session_of(nn.Dense(3))
    data = {"x": np.ones((4, 4), np.float32)}
    session.train(lambda net, batch: net(batch["x"]).mean(), "net", data, optimizer=optax.sgd(1e-3), steps=2)
    trained = bits(session.models["net"].variables)
    with pytest.raises(FlaxMagicsError) as error:
        session.train(lambda net, batch: jnp.log(0 * net(batch["x"]).mean()), "net", data, steps=2)
    assert "the loss is -inf" in error.value.message
    assert (error.value.write, bits(session.models["net"].variables)) == (None, trained)


@pytest.mark.parametrize(("kind", "dtype"), [(overflow, "bfloat16"), (half, "float16")])
def test_an_overflow_is_named_with_its_numbers(kind, dtype):
    (text,) = said(Net(kind))
    what, line = planted(text)
    assert what.partition(": ")[2].startswith("mul(")
    assert what.endswith(" gives inf in the model itself")
    assert dtype in line


def test_a_mask_of_minus_infinity_is_harmless_and_what_follows_it_is_not():
    assert said(Net(lambda x: nn.softmax(hidden(x)))) == []
    (text,) = said(Net(lambda x: jnp.log(nn.softmax(hidden(x)))))
    assert planted(text)[0] == "the loss is NaN: log(0) gives -inf in the model itself"
    (text,) = said(Net(lambda x: nn.softmax(x * 0 - jnp.inf)))
    assert planted(text)[0] == "the loss is NaN: sub(-inf, -inf) gives NaN in the model itself"


def test_nan_in_the_data_is_named_by_its_rows():
    assert said(Net(nn.relu), X.at[1, 2].set(jnp.nan)) == ["the loss is NaN: `x` holds NaN in row 1"]


def test_only_leaves_of_the_batch_have_rows_of_the_data_and_one_of_a_number_each_has_them_too():
    def of_table(net: Any, batch: Any, table: Any) -> Any:
        x, y = batch
        return ((net(x).sum(1) - y) ** 2).mean() + table.sum()

    def why(y: Any, table: Any) -> str:
        with pytest.raises(FlaxMagicsError) as error:
            session_of(Net(nn.relu)).train(of_table, "net", (X, y), table, optimizer=optax.sgd(0.1), batch=2, epochs=1)
        return str(error.value).partition(" is not finite and was not taken: ")[2].splitlines()[0]

    y, table = jnp.zeros(len(X)), jnp.zeros((1000, 2))
    row = len(X) - 1
    assert why(y.at[row].set(jnp.nan), table) == f"the loss is NaN: `batch[1]` holds NaN in row {row}"
    assert why(y, table.at[900, 1].set(jnp.nan)) == "the loss is NaN: `table` holds NaN in row 900"


def test_a_chain_longer_than_the_stack_is_gone_through():
    def chain(x: Any) -> Any:
        x = jnp.log(x * 0)
        for _ in range(1100):
            x = x + 1
        return x

    x = jnp.ones(2)
    closed = jax.make_jaxpr(chain)(x)
    level = Level(closed, [x])
    culprit = culprit_of(level, closed.jaxpr.outvars[0])
    assert culprit.equation.primitive.name == "log"


def test_a_search_that_fails_costs_nothing_but_the_reason(monkeypatch):
    def fails(*_: object) -> None:
        raise RecursionError

    data = X.at[1, 2].set(jnp.nan)
    monkeypatch.setattr("flax_magics.training.diagnosis.culprit_of", fails)
    assert said(Net(nn.relu), data) == ["the loss is NaN"]
    monkeypatch.setattr("flax_magics.training.diagnosis.layer_gradients", fails)
    with pytest.raises(FlaxMagicsError) as error:
        session_of(Net(nn.relu)).train(loss, "net", data, optimizer=optax.sgd(0.1), steps=1)
    assert str(error.value) == "step 0 is not finite and was not taken: the loss is NaN"


def test_nan_in_the_weights_is_named():
    session = session_of(Net(nn.relu))
    variables = session.init("net", X)
    variables["params"]["last"]["kernel"] = jnp.full((4, 3), jnp.nan)
    session.models["net"].variables = variables
    (note,) = session.grad(loss, "net", X).notes
    assert note.text == "the loss is NaN: the variable `params/last/kernel` holds NaN"


def test_layers_without_a_gradient_are_named_where_the_reason_is_measured():
    assert said(Net(lambda x: nn.relu(x - 1000))) == [
        "first has no gradient: relu's input is negative for every example"
    ]

    class Unused(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            nn.Dense(2, name="aside")(x)
            return nn.Dense(3, name="main")(x)

    assert said(Unused()) == ["aside has no gradient: the loss does not depend on it"]
