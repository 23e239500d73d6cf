"""Equal identities are equal programs, and what is not plain has none."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flax_magics.compile.jaxpr import identity

X = jnp.arange(6.0).reshape(2, 3)


def of(function: Any, *arguments: Any) -> Any:
    return identity(jax.jit(function).trace(*arguments).jaxpr)


class Net(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        x = nn.relu(nn.Conv(4, (3, 3))(x))
        x = nn.BatchNorm(use_running_average=False)(x)
        x = nn.max_pool(x, (2, 2), (2, 2)).reshape(x.shape[0], -1, 4)
        x = nn.MultiHeadDotProductAttention(2, dropout_rate=0.1, deterministic=False)(x)
        x = nn.Dropout(0.5, deterministic=False)(nn.gelu(nn.LayerNorm()(x)))
        return nn.Embed(5, 3)(jnp.argmax(x, -1)), nn.remat(nn.Dense)(3)(x)


def test_a_model_traced_twice_is_one():
    x = jnp.ones((2, 8, 8, 1))
    keys = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    variables = jax.eval_shape(Net().init, keys, x)

    def run(variables: Any, x: Any, key: Any) -> Any:
        return Net().apply(variables, x, rngs={"dropout": key}, mutable=["batch_stats"])

    def again(v: Any, y: Any, k: Any) -> Any:
        return run(v, y, k)

    first = of(run, variables, x, keys["dropout"])
    jax.clear_caches()
    assert first is not None
    assert of(again, variables, x, keys["dropout"]) == first
    assert of(again, variables, x[:1], keys["dropout"]) != first


PAIRS = {
    "another op": (lambda x: x + 1.0, lambda x: x - 1.0),
    "the arguments the other way round": (lambda x: x - x.sum(), lambda x: x.sum() - x),
    "another literal": (lambda x: x * 2.0, lambda x: x * 3.0),
    "minus zero": (lambda x: x * 0.0, lambda x: x * -0.0),
    "an int for a float": (lambda x: (x, 1), lambda x: (x, 1.0)),
    "a bool for an int": (lambda x: (x, True), lambda x: (x, 1)),
    "a weak type": (lambda x: (x, jnp.float32(1.0)), lambda x: (x, jnp.asarray(1.0))),
    "another dtype": (lambda x: x.astype("bfloat16"), lambda x: x.astype("float16")),
    "another axis": (lambda x: x.sum(0, keepdims=True), lambda x: x.sum(1, keepdims=True)),
    "another output": (lambda x: (x, x + 1), lambda x: (x + 1, x)),
    "other captured numbers": (lambda x: x + np.array([1, 2, 3], "f4"), lambda x: x + np.array([1, 2, 4], "f4")),
    "another precision": (lambda x: jnp.dot(x, x.T), lambda x: jnp.dot(x, x.T, precision="highest")),
    "another branch": (
        lambda x: jax.lax.cond(x[0, 0] > 0, jnp.sin, jnp.cos, x),
        lambda x: jax.lax.cond(x[0, 0] > 0, jnp.cos, jnp.sin, x),
    ),
    "another body": (
        lambda x: jax.lax.fori_loop(0, 3, lambda i, y: y * 2, x),
        lambda x: jax.lax.fori_loop(0, 3, lambda i, y: y * 3, x),
    ),
    "another length": (
        lambda x: jax.lax.fori_loop(0, 3, lambda i, y: y * 2, x),
        lambda x: jax.lax.fori_loop(0, 4, lambda i, y: y * 2, x),
    ),
    "another function inside": (lambda x: jax.jit(jnp.sin)(x), lambda x: jax.jit(jnp.cos)(x)),
    "another generator": (
        lambda x: jax.random.bits(jax.random.key(0, impl="rbg")),
        lambda x: jax.random.bits(jax.random.key(0, impl="threefry2x32")),
    ),
}


@pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS)
def test_what_differs_is_told(pair: Any):
    one, other = of(pair[0], X), of(pair[1], X)
    assert one is not None
    assert other is not None
    assert one != other
    jax.clear_caches()
    assert (of(pair[0], X), of(pair[1], X)) == (one, other)


def test_a_setting_that_an_equation_was_traced_under_is_told():
    draw = jax.random.bits
    one = of(draw, jax.random.key(0))
    jax.clear_caches()
    with jax.threefry_partitionable(False):
        other = of(draw, jax.random.key(0))
    assert one != other


def test_a_captured_array_is_read_each_time():
    captured = np.zeros(3, "f4")

    def run(x: Any) -> Any:
        return x + captured

    one = of(run, X)
    captured[0] = 1
    jax.clear_caches()
    assert of(run, X) != one


NOT_PLAIN = {
    "a host callback": lambda x: jax.pure_callback(np.sin, x, x),
    "an effect": lambda x: (jax.debug.print("x"), x)[1],
}


@pytest.mark.parametrize("function", NOT_PLAIN.values(), ids=NOT_PLAIN)
def test_what_is_not_plain_has_none(function: Any):
    assert of(function, X) is None


def test_a_parameter_of_unknown_kind_has_none(monkeypatch: pytest.MonkeyPatch):
    from flax_magics.compile import jaxpr

    assert of(lambda x: x[0], X) is not None
    monkeypatch.setattr(jaxpr, "_VALUES", set())
    jax.clear_caches()
    assert of(lambda x: x[0], X) is None


UNARY = (jnp.sin, jnp.exp, nn.relu, nn.gelu, lambda x: x.T @ x, lambda x: x[:1], lambda x: x.astype(jnp.int32))
STEPS = st.lists(st.tuples(st.integers(0, len(UNARY) - 1), st.sampled_from([0.0, -0.0, 1.0, 1, 2, True])), max_size=3)


def _program(steps: list[tuple[int, Any]]) -> Any:
    def run(x: Any) -> Any:
        for i, number in steps:
            x = UNARY[i](x) * number
        return x

    return run


@given(STEPS, STEPS)
def test_programs_are_equal_only_if_their_text_is(one: list[tuple[int, Any]], other: list[tuple[int, Any]]):
    traces = [jax.jit(_program(steps)).trace(X) for steps in (one, other)]
    identities = [identity(traced.jaxpr) for traced in traces]
    assert None not in identities
    if identities[0] == identities[1]:
        texts = [traced.lower().as_text() for traced in traces]
        assert texts[0] == texts[1]
    else:
        assert repr(one) != repr(other)
