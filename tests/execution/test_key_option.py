"""`--key`: a key that the draw has given away already is not handed out again."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from flax_magics import FlaxMagicsError, Session


class Keyed(nn.Module):
    @nn.compact
    def __call__(self, x: Any, params: Any = None) -> Any:
        noise = 0.0 if params is None else jax.random.normal(params, x.shape)
        return nn.Dense(2)(x + noise)


@pytest.mark.parametrize("initialised", [True, False])
def test_the_key_of_an_init_is_not_passed_to_the_run_of_the_same_draw(initialised):
    session = Session(seed=0)
    session.register("net", Keyed())
    if initialised:
        session.init("net", jnp.ones((2, 3)))
    before = session._state
    with pytest.raises(FlaxMagicsError, match="in this draw that key initialises `net`"):
        session.apply("net", jnp.ones((2, 3)), key="params")
    assert session._state is before
    session.apply("net", jnp.ones((2, 3)))
    run = session.apply("net", jnp.ones((2, 3)), key="params")
    assert run.draw == 2
