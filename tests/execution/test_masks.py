"""A run with the keys of an earlier draw: the same masks where layers and shapes agree, and said where they do not."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from sessions import session_of

from flax_magics.run import Note

x = jnp.ones((4, 8))


class Two(nn.Module):
    """Two dropouts, the second of another rate and width if asked."""

    width: int = 8
    rate: float = 0.5

    @nn.compact
    def __call__(self, x):
        x = nn.Dropout(0.5, deterministic=False)(x)
        x = jnp.tile(x, (1, self.width // 8))
        return nn.Dropout(self.rate, deterministic=False)(x)


class NnxTwo(nnx.Module):
    """The same."""

    def __init__(self, width=8, rate=0.5, first=True):
        self.width, rngs = width, nnx.Rngs(0)
        if first:
            self.a = nnx.Dropout(0.5, rngs=rngs)
        self.b = nnx.Dropout(rate, rngs=rngs)

    def __call__(self, x):
        x = self.a(x) if hasattr(self, "a") else x
        return self.b(jnp.tile(x, (1, self.width // 8)))


def masks(run):
    return [note for note in run.notes if note.kind == "masks"]


def note(text):
    return [Note("masks", f"other random numbers than in draw 1 at {text}")]


@pytest.fixture(params=[Two, NnxTwo], ids=["linen", "nnx"])
def make(request):
    return request.param


@pytest.fixture
def names(make):
    return ("Dropout_0", "Dropout_1") if make is Two else ("a", "b")


def test_other_inputs_of_the_same_shape_get_the_same_mask(make):
    session = session_of(make())
    first = session.apply("net", x)
    second = session.apply("net", x * 3, keys_of=1)
    assert masks(second) == []
    np.testing.assert_array_equal(first.output == 0, second.output == 0)


def test_layers_of_another_batch_are_named(make, names):
    session = session_of(make())
    session.apply("net", x)
    a, b = names
    assert masks(session.apply("net", x[:2], keys_of=1)) == note(f"{a}, {b}: [4,8] there, [2,8] here")


def test_of_another_model_the_layers_that_differ_alone_are_named(make, names):
    session = session_of(make())
    session.register_all({"wide": make(width=16), "often": make(rate=0.25)})
    session.apply("net", x)
    wide, often = session.apply("wide", x, keys_of=1), session.apply("often", x, keys_of=1)
    assert masks(wide) == note(f"{names[1]}: [4,8] there, [4,16] here")
    assert masks(often) == note(f"{names[1]}: rate 0.5 there, 0.25 here")


def test_layers_of_one_of_them_alone(make):
    class One(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dropout(0.5, deterministic=False)(x)

    session = session_of(make())
    session.register("one", One() if make is Two else NnxTwo(first=False))
    session.apply("net", x)
    run = session.apply("one", x, keys_of=1)
    if make is Two:
        assert masks(run) == note("Dropout_1: in draw 1's run alone")
    else:  # the first stream of the model is another layer's
        assert masks(run) == note("b: another key, by its place in the model; a: in draw 1's run alone")


def test_what_a_module_draws_with_a_key_itself_is_not_claimed(make):
    class Noise(nn.Module):
        @nn.compact
        def __call__(self, x):
            return x + jax.random.normal(self.make_rng("noise"), x.shape)

    class NnxNoise(nnx.Module):
        def __init__(self, *, rngs):
            self.rngs = rngs

        def __call__(self, x):
            return x + jax.random.normal(self.rngs.noise(), x.shape)

    session = session_of(Noise() if make is Two else NnxNoise(rngs=nnx.Rngs(noise=0)))
    session.apply("net", x)
    assert masks(session.apply("net", x[:2], keys_of=1)) == []


def test_a_warm_run_is_compared_too_and_so_is_one_whose_inputs_were_let_go_of(make, names):
    session = session_of(make(), replay_bytes=0)
    for _ in range(3):
        session.apply("net", x)
    assert masks(session.apply("net", x, keys_of=3)) == []
    (said,) = masks(session.apply("net", x[:2], keys_of=3))
    assert said.text == f"other random numbers than in draw 3 at {', '.join(names)}: [4,8] there, [2,8] here"


def test_of_many_layers_some_are_named_and_the_rest_is_counted():
    class Deep(nn.Module):
        @nn.compact
        def __call__(self, x):
            for _ in range(6):
                x = nn.Dropout(0.5, deterministic=False)(x)
            for width in range(1, 8):
                x = x[:, :-1]
                nn.Dropout(0.5, deterministic=False, name=f"d{width}")(x)
            return x

    session = session_of(Deep())
    session.apply("net", x)
    assert masks(session.apply("net", x[:2], keys_of=1)) == note(
        "Dropout_0, Dropout_1, Dropout_2, Dropout_3 and 2 more: [4,8] there, [2,8] here; d1: [4,7] there, [2,7] here; "
        "d2: [4,6] there, [2,6] here; d3: [4,5] there, [2,5] here; d4, d5, d6, d7: other shapes or rates"
    )
