"""Two threads with a session each: what is replaced for a trace is put back, and each gets the bits of by hand."""

from __future__ import annotations

import threading
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from flax.core import lift
from flax.core.scope import Scope
from flax.linen import transforms
from jax._src.interpreters.partial_eval import custom_staging_rules
from jax.extend.core.primitives import jit_p
from together import on_threads

from flax_magics import Session

X = jnp.ones((3, 4))
inside = threading.Event()


def linger() -> None:
    """Lets the other thread come in, in the first trace of all."""
    if not inside.is_set():
        inside.set()
        time.sleep(0.5)


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        linger()
        return nn.Dropout(0.5, deterministic=False)(nn.Dense(3)(x))


class Nnx(nnx.Module):
    def __init__(self, *, rngs: nnx.Rngs) -> None:
        self.linear, self.dropout = nnx.Linear(4, 3, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        linger()
        return self.dropout(self.linear(x))


def names() -> list[Any]:
    """All that a trace replaces."""
    return [
        *(getattr(Scope, name) for name in ("make_rng", "has_rng", "put_variable")),
        *(nn.Module.sow, transforms.fork_rngs, lift._partial_pack, lift.random),
        *(nnx.RngStream.__call__, nnx.Module.sow, nnx.Dropout.__call__, nnx.BatchNorm.__call__, nnx.Rngs._get_stream),
        custom_staging_rules[jit_p],
    ]


@pytest.mark.parametrize("pair", [(Linen, Linen), (Nnx, Nnx), (Linen, Nnx), (Nnx, Linen)])
def test_what_a_trace_replaces_is_put_back_whoever_else_traces(pair: Any):
    before = names()
    inside.clear()
    runs: list[Any] = [None, None]

    def work(i: int) -> None:
        session = Session(i)
        made = pair[i]() if pair[i] is Linen else Nnx(rngs=nnx.Rngs(0))
        session.register("net", made)
        if i:
            assert inside.wait(60)
        runs[i] = session, session.apply("net", X)

    on_threads(lambda: work(0), lambda: work(1))
    assert names() == before
    for kind, (session, run) in zip(pair, runs, strict=True):
        if kind is Linen:
            apply = jax.jit(Linen().apply)
            by_hand = apply(session.models["net"].variables, X, rngs={"dropout": run.keys["dropout"]})
            np.testing.assert_array_equal(np.asarray(run.output), np.asarray(by_hand))
