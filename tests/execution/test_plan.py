"""A run op by op is of the same plan as a compiled one: it needs the same, and sows the same."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from by_hand import bits

from flax_magics import Session

X = jnp.ones((2, 4))


class Sows(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        x = nn.Dense(3)(x)
        self.sow("losses", "sum", x.sum())
        return x


class Layers(nn.Module):
    @nn.compact
    def __call__(self, x: Any, depth: int) -> Any:
        for _ in range(depth):
            x = nn.Dense(3)(x)
        return x


@pytest.mark.parametrize("eager", [False, True])
def test_what_is_sown_starts_empty_where_the_variables_have_some(eager):
    variables = Sows().init(jax.random.key(0), X)
    assert set(variables) == {"params", "losses"}
    session = Session(seed=0)
    session.register("net", Sows())
    run = session.apply("net", X, variables=variables, eager=eager)
    _, sown = Sows().apply({"params": variables["params"]}, X, mutable=["losses"])
    assert bits(run.sown["losses"]["sum"][0]) == bits(sown["losses"]["sum"][0])
    assert len(run.sown["losses"]["sum"]) == 1


@pytest.mark.parametrize("eager", [False, True])
def test_an_int_whose_value_is_needed_is_static_and_nothing_else_is_asked_for(eager):
    session = Session(seed=0)
    session.register("net", Layers())
    run = session.apply("net", X, 2, eager=eager)
    assert run.static == ("depth=2",)
    assert run.by_hand == "net.apply(variables, …, …)"
