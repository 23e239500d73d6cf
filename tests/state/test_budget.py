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
from sessions import session_of

from flax_magics import FlaxMagicsError, Session
from flax_magics.code.walk import arrays_in
from flax_magics.models.construction import Construction

SIZE = 100_000
"""Bytes of each array that is counted."""


class Table(nn.Module):
    table: jax.Array

    @nn.compact
    def __call__(self, x):
        return x.mean() + self.table[0, 0] + self.param("bias", nn.initializers.normal(), ())


def array(i: int = 0) -> jax.Array:
    return jnp.full((25, 1000), float(i))


class Mean(nn.Module):
    @nn.compact
    def __call__(self, x):
        return x.mean() + self.param("bias", nn.initializers.normal(), (2,))


class Norm(nn.Module):
    """Its statistics are of that size, its params are not."""

    @nn.compact
    def __call__(self, x):
        total = self.variable("state", "total", jnp.zeros, (25, 1000))
        if not self.is_initializing():
            total.value = total.value + x.mean()
        return x.sum() + total.value[0, 0]


class NnxNorm(nnx.Module):
    def __init__(self):
        self.total = nnx.BatchStat(jnp.zeros((25, 1000)))

    def __call__(self, x):
        self.total[...] = self.total[...] + x.mean()
        return x.sum() + self.total[0, 0]


def count() -> int:
    """How many buffers of that size there are in this process."""
    gc.collect()
    # JAX makes a second array of a constant in a program, of the same buffer.
    return len({array.unsafe_buffer_pointer() for array in jax.live_arrays() if array.nbytes == SIZE})


def alive(references: list[weakref.ref]) -> list[bool]:
    gc.collect()
    return [reference() is not None for reference in references]


def test_inputs_are_kept_and_the_oldest_are_let_go_of():
    others = count()
    session = session_of(Mean(), replay_bytes=8 * SIZE)
    references = []
    for i in range(12):
        x = array(i)
        session.apply("net", x)
        references.append(weakref.ref(x))
    del x
    session.settle()
    kept = alive(references)
    # An eighth at a time, so that there is room for some runs.
    assert kept == [False] * (12 - sum(kept)) + [True] * sum(kept)
    assert 7 <= sum(kept) <= 8
    assert session.kept_bytes == sum(kept) * SIZE
    assert count() - others == sum(kept)


def test_an_array_that_many_runs_use_counts_once():
    session = session_of(Mean(), replay_bytes=3 * SIZE)
    x = array()
    for _ in range(1000):
        session.apply("net", x)
    assert session.kept_bytes == SIZE
    assert session.replay(1).agreement.identical is None  # nothing was let go of


def test_so_does_one_of_numpy_that_stays_what_it_is():
    session = session_of(Mean(), replay_bytes=3 * SIZE)
    x = np.zeros((25, 1000), np.float32)
    for _ in range(300):
        session.apply("net", x)
    assert session.kept_bytes == SIZE
    x += 1
    session.apply("net", x)
    assert session.kept_bytes == 2 * SIZE


@pytest.mark.parametrize("module", [Norm, NnxNorm], ids=["linen", "nnx"])
def test_overwritten_variables_count_and_those_of_the_model_do_not(module):
    others = count()
    session = session_of(module(), replay_bytes=8 * SIZE)
    x = jnp.ones(3)
    session.apply("net", x)
    session.apply("net", x)
    before = session.kept_bytes
    for _ in range(4):
        session.apply("net", x)
    assert session.kept_bytes - before == 4 * SIZE
    assert session.kept_bytes < 7 * SIZE
    outputs = [session.apply("net", x).output for _ in range(20)]
    assert session.kept_bytes <= 8 * SIZE
    assert count() - others == session.kept_bytes // SIZE + 1  # the one that is the model's
    assert session.replay("last").agreement.identical
    with pytest.raises(FlaxMagicsError, match="were let go of"):
        session.replay(1)
    assert outputs


def test_nothing_is_kept_where_that_is_asked():
    session = session_of(Mean(), replay_bytes=0)
    x = array()
    session.apply("net", x)
    reference = weakref.ref(x)
    del x
    session.settle()
    assert alive([reference]) == [False]
    assert session.history()[0].inputs == "float32[25,1000]"


def test_less_can_be_asked_for_later():
    session = session_of(Mean())
    for i in range(3):
        session.apply("net", array(i))
    assert session.kept_bytes == 3 * SIZE
    session.replay_bytes = 2 * SIZE
    assert session.kept_bytes == SIZE
    assert session.replay(3).agreement.identical is None


def test_an_output_is_not_kept():
    session = session_of(nn.Dense(3))
    run = session.apply("net", jnp.ones((2, 4)))
    reference = weakref.ref(run.output)
    del run
    assert alive([reference]) == [False]


@pytest.mark.parametrize("limit", [-1, 1.5, True, "1 GB"])
def test_a_limit_that_is_none(limit):
    with pytest.raises(FlaxMagicsError) as error:
        Session(seed=0, replay_bytes=limit)
    assert str(error.value) == f"`replay_bytes` is a number of bytes, 0 or more, not {limit!r}."


def of_a_closure(table):
    class Net(nn.Module):
        def __call__(self, x):
            return x.mean() + table[0, 0]

    return Net()


def of_a_default(table):
    class Net(nn.Module):
        def __call__(self, x, table=table):
            return x.mean() + table[0, 0]

    return Net()


def of_a_class(table):
    class Net(nn.Module):
        tables = {"one": [table]}  # noqa: RUF012

        def __call__(self, x):
            return x.mean() + self.tables["one"][0][0, 0]

    return Net()


def of_a_submodule(table):
    return nn.Sequential([Table(table)])


@pytest.mark.parametrize("make", [Table, of_a_closure, of_a_default, of_a_class, of_a_submodule])
def test_what_a_model_held_that_is_no_more_is_counted_and_let_go_of(make):
    others = count()
    session = Session(seed=0, replay_bytes=4 * SIZE)
    x = jnp.ones(3)
    for i in range(3):
        session.register("net", make(array(i)))
        for _ in range(2):
            session.apply("net", x)
    # The newest is the model's, which is there anyway; all three can be run again.
    assert session.kept_bytes // SIZE == 2
    assert count() - others == 3
    assert session.replay(1).agreement.identical is None
    for i in range(3, 12):
        session.register("net", make(array(i)))
        session.apply("net", x)
    assert session.kept_bytes <= 4 * SIZE
    assert count() - others == session.kept_bytes // SIZE + 1
    assert session.replay("last").agreement.identical is None
    with pytest.raises(FlaxMagicsError, match="were let go of"):
        session.replay(1)
    session.replay_bytes = 0
    assert count() - others == 1


def test_so_is_what_an_init_and_a_construction_were_of():
    others = count()
    session = session_of(Table(array(1)))
    session.init("net", jnp.ones(3))
    session.register("net", Table(array(2)))
    session.init("net", jnp.ones(3))
    assert session.kept_bytes // SIZE == 1
    session.register_all({"built": Construction(Own, (array(3),), {}, "Own(…)")})
    assert session.kept_bytes // SIZE == 1
    session.register_all({"built": Construction(Own, (array(4),), {}, "Own(…)")})
    assert session.kept_bytes // SIZE == 2
    session.replay_bytes = 0
    session.init("net", jnp.ones(3))
    session.settle()
    assert count() - others == 2


class Own(nnx.Module):
    """Is built of an array that it keeps no longer."""

    def __init__(self, table, *, rngs):
        self.bias = nnx.Param(table[0, 0] + jax.random.normal(rngs.params(), ()))


def test_what_reaches_far_does_not_take_long_to_look_at():
    far: list = []
    for _ in range(3):
        far = [far, *range(100_000)]
    assert len(arrays_in([array(), far])) <= 1


def test_a_run_that_is_committed_while_others_are_counted_is_counted_next():
    session = session_of(Mean(), replay_bytes=10 * SIZE)
    append = session._keeping.noted.append  # a commit on another thread may hold it
    session.apply("net", array(1))
    assert session.kept_bytes == SIZE
    session.apply("net", array(2))
    noted = session._keeping.noted.pop()
    assert session.kept_bytes == SIZE
    append(noted)
    assert session.kept_bytes == 2 * SIZE
