"""Planted mistakes in a loss, each named by module, line and value; and layers without a gradient."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx
from sessions import session_of

from flax_magics import FlaxMagicsError
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


class Looped(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        def step(module: Any, carry: Any, t: Any) -> Any:
            carry = nn.Dense(5, name="inner")(carry)
            return jnp.where(t == 2, jnp.log(carry * 0), carry), None  # planted

        loop = nn.scan(step, variable_broadcast="params", split_rngs={"params": False}, length=4)
        return loop(self, x, jnp.arange(4))[0]


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
            Net(slow),
            "the loss is NaN: log(0) gives -inf in the model itself",
            "return jnp.log(x * 0)  # planted",
        ),
        (
            Looped(),
            "the loss is NaN: log(0) gives -inf in the model itself at step 2 of the loop",
            "return jnp.where(t == 2, jnp.log(carry * 0), carry), None  # planted",
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
    monkeypatch.setattr("flax_magics.training.diagnosis.layers.of", fails)
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
