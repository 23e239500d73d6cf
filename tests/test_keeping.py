"""What is kept for replays: up to so many bytes, each array once, the oldest let go first, and really let go."""

from __future__ import annotations

import gc
import weakref

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from flax_magics import FlaxMagicsError, Session

MB = 1_000_000


def megabyte(i: int = 0) -> jax.Array:
    return jnp.full((250, 1000), float(i))


class Mean(nn.Module):
    """No variables to speak of."""

    @nn.compact
    def __call__(self, x):
        return x.mean() + self.param("bias", nn.initializers.normal(), (2,))


class Norm(nn.Module):
    """Its statistics are a megabyte, its params are not."""

    @nn.compact
    def __call__(self, x):
        total = self.variable("state", "total", jnp.zeros, (250, 1000))
        if not self.is_initializing():
            total.value = total.value + x.mean()
        return x.sum() + total.value[0, 0]


class NnxNorm(nnx.Module):
    """The same."""

    def __init__(self):
        self.total = nnx.BatchStat(jnp.zeros((250, 1000)))

    def __call__(self, x):
        self.total[...] = self.total[...] + x.mean()
        return x.sum() + self.total[0, 0]


def megabytes() -> int:
    """How many arrays of a megabyte there are in this process."""
    gc.collect()
    return sum(array.nbytes == MB for array in jax.live_arrays())


def alive(references: list[weakref.ref]) -> list[bool]:
    gc.collect()
    return [reference() is not None for reference in references]


def test_inputs_are_kept_and_the_oldest_are_let_go_of():
    others = megabytes()
    session = Session(seed=0, replay_bytes=8 * MB)
    session.register("net", Mean())
    references = []
    for i in range(12):
        x = megabyte(i)
        session.apply("net", x)
        references.append(weakref.ref(x))
    del x
    session.settle()
    kept = alive(references)
    # An eighth at a time, so that there is room for some runs.
    assert kept == [False] * (12 - sum(kept)) + [True] * sum(kept)
    assert 7 <= sum(kept) <= 8
    assert session.kept_bytes == sum(kept) * MB
    assert megabytes() - others == sum(kept)


def test_an_array_that_many_runs_use_counts_once():
    session = Session(seed=0, replay_bytes=3 * MB)
    session.register("net", Mean())
    x = megabyte()
    for _ in range(1000):
        session.apply("net", x)
    assert session.kept_bytes == MB
    assert session.replay(1).agreement.identical is None  # nothing was let go of


def test_so_does_one_of_numpy_that_stays_what_it_is():
    session = Session(seed=0, replay_bytes=3 * MB)
    session.register("net", Mean())
    x = np.zeros((250, 1000), np.float32)
    for _ in range(300):
        session.apply("net", x)
    assert session.kept_bytes == MB
    x += 1
    session.apply("net", x)
    assert session.kept_bytes == 2 * MB


@pytest.mark.parametrize("module", [Norm, NnxNorm], ids=["linen", "nnx"])
def test_overwritten_variables_count_and_those_of_the_model_do_not(module):
    others = megabytes()
    session = Session(seed=0, replay_bytes=8 * MB)
    session.register("net", module())
    x = jnp.ones(3)
    session.apply("net", x)
    session.apply("net", x)
    before = session.kept_bytes
    for _ in range(4):
        session.apply("net", x)
    assert session.kept_bytes - before == 4 * MB
    assert session.kept_bytes < 7 * MB
    outputs = [session.apply("net", x).output for _ in range(20)]
    assert session.kept_bytes <= 8 * MB
    assert megabytes() - others == session.kept_bytes // MB + 1  # the one that is the model's
    assert session.replay("last").agreement.identical
    with pytest.raises(FlaxMagicsError, match="were let go of"):
        session.replay(1)
    assert outputs


def test_nothing_is_kept_where_that_is_asked():
    session = Session(seed=0, replay_bytes=0)
    session.register("net", Mean())
    x = megabyte()
    session.apply("net", x)
    reference = weakref.ref(x)
    del x
    session.settle()
    assert alive([reference]) == [False]
    assert session.history()[0].inputs == "float32[250,1000]"


def test_less_can_be_asked_for_later():
    session = Session(seed=0)
    session.register("net", Mean())
    for i in range(3):
        session.apply("net", megabyte(i))
    assert session.kept_bytes == 3 * MB
    session.replay_bytes = 2 * MB
    assert session.kept_bytes == MB
    assert session.replay(3).agreement.identical is None


def test_an_output_is_not_kept():
    session = Session(seed=0)
    session.register("net", nn.Dense(1000))
    run = session.apply("net", jnp.ones((250, 4)))
    reference = weakref.ref(run.output)
    del run
    assert alive([reference]) == [False]


@pytest.mark.parametrize("limit", [-1, 1.5, True, "1 GB"])
def test_a_limit_that_is_none(limit):
    with pytest.raises(FlaxMagicsError) as error:
        Session(seed=0, replay_bytes=limit)
    assert str(error.value) == f"`replay_bytes` is a number of bytes, 0 or more, not {limit!r}."
