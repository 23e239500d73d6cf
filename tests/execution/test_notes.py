"""Sharp bits: each said once where it is one, in its own words, and not where there is none."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from by_hand import Normed, notebook_x
from flax import nnx
from sessions import session_of


def notes(run):
    return [(note.kind, note.text, "".join(label + text for label, text in note.advice)) for note in run.notes]


class Takes(nn.Module):
    @nn.compact
    def __call__(self, x, noise=None, other=None, train=True):
        x = nn.Dense(2)(x)
        if noise is not None and train:
            x = x + jax.random.uniform(noise, x.shape)
        return x


def test_a_key_that_nobody_uses():
    run = session_of(Takes()).apply("net", notebook_x(), noise=jax.random.key(5), other=jax.random.key(6))
    text = "the key `other` is passed, and nothing in the model uses it"
    assert notes(run) == [("unused key", text, "form: %flax_apply net(…, noise=…)")]


def test_a_key_of_the_draw_that_nobody_uses():
    run = session_of(Takes()).apply("net", notebook_x(), key="other")
    assert [note.kind for note in run.notes] == ["unused key"]


def test_a_key_is_not_needed_in_evaluation(session):
    session.register("net", Takes())
    assert notes(session.apply("net", notebook_x(), noise=jax.random.key(5), mode="eval")) == []
    assert notes(session.apply("net", notebook_x(), noise=jax.random.key(6), train=False)) == []


def test_one_key_for_two_arguments(session):
    session.register("net", Takes())
    key = jax.random.key(5)
    said = notes(session.apply("net", notebook_x(), noise=key, other=key))
    assert said[0] == (
        "same key",
        "`noise` and `other` are given the same key: they get the same numbers",
        "form: noise_key = %flax_key noise\nother_key = %flax_key other\n"
        "%flax_apply net(…, noise=noise_key, other=other_key)",
    )


def test_a_collection_that_the_model_does_not_have_is_told_at_every_run(session):
    session.register("net", Normed())
    text = (
        "--mutable batchstats hands back nothing: the model has no collection of this name; it has batch_stats, params"
    )
    for _ in range(3):
        run = session.apply("net", notebook_x(), mode="train", mutable=["batchstats"])
        assert notes(run) == [("mutable", text, "form: %flax_apply --train --mutable batch_stats net(…)")]
        assert run.output[1] == {}


def test_a_collection_that_is_not_written_or_is_sown_is_there(session):
    session.register("net", Normed())
    assert notes(session.apply("net", notebook_x(), mode="eval", mutable="batch_stats")) == []

    class Sows(nn.Module):
        def __call__(self, x):
            self.sow("intermediates", "x", x)
            return x

    session.register("sows", Sows())
    text = "--mutable params hands back nothing: the model has no collection of this name; it has intermediates"
    run = session.apply("sows", notebook_x(), mutable=["intermediates", "params"])
    assert notes(run) == [("mutable", text, "form: %flax_apply --mutable intermediates sows(…)")]


def test_nnx_has_its_collections_under_the_names_of_their_types(session):
    session.register("net", nnx.BatchNorm(4, rngs=nnx.Rngs(0)))
    text = "--mutable batch_stats hands back nothing: the model has no collection of this name; it has BatchStat, Param"
    run = session.apply("net", notebook_x(), mode="train", mutable="batch_stats")
    assert notes(run) == [("mutable", text, "form: %flax_apply --train --mutable BatchStat net(…)")]
    run = session.apply("net", notebook_x(), mode="train", mutable="BatchStat")
    assert (notes(run), list(run.output[1])) == ([], ["BatchStat"])


def test_params_that_are_zero_throughout(session):
    zeros = nn.initializers.zeros
    session.register("net", nn.Sequential([nn.Dense(3, kernel_init=zeros), nn.Dense(2, kernel_init=zeros)]))
    text = "all params are zero after init: the layers compute the same, and get the same gradients"
    expected = [("zero params", text, "in your model: kernel_init=jax.nn.initializers.lecun_normal()")]
    session.init("net", notebook_x())
    assert notes(session.runs[-1]) == expected
    assert notes(session.apply("net", notebook_x())) == []


@pytest.mark.parametrize(
    "net",
    [nn.Sequential([nn.Dense(3), nn.Dense(2, kernel_init=nn.initializers.zeros)]), nn.BatchNorm(True, use_scale=False)],
    ids=["one layer of two", "a bias alone"],
)
def test_layers_that_begin_at_zero_are_no_sharp_bit(net):
    assert notes(session_of(net).apply("net", notebook_x())) == []


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_params_that_hold_nan(dtype):
    net = nn.Sequential([nn.Dense(3), nn.Dense(2, kernel_init=nn.initializers.constant(jnp.nan), param_dtype=dtype)])
    run = session_of(net).apply("net", notebook_x())
    text = "layers_1/kernel holds NaN after init: look at its initializer"
    assert notes(run) == [("nan params", text, "in your model: kernel_init=jax.nn.initializers.lecun_normal()")]


class Scaled(nn.Module):
    def __call__(self, x, scale):
        return x * scale


def test_a_python_number_where_an_array_was(session):
    session.register("net", Scaled())
    assert notes(session.apply("net", notebook_x(), 2.0)) == []
    assert notes(session.apply("net", notebook_x(), jnp.float32(2.0))) == []
    text = "`scale` is a Python number where an array was before: that is another program"
    assert notes(session.apply("net", notebook_x(), 2.0)) == [
        ("scalar", text, "form: import jax.numpy as jnp\n%flax_apply net(…, jnp.asarray(…, 'float32'))")
    ]
    assert notes(session.apply("net", notebook_x(), 3.0)) == []


def test_a_kind_is_quieted_by_its_name(notebook):
    notebook("%flaxmodel net = nn.Dropout(0.5, deterministic=False, rng_collection='noise')")
    notebook("%config FlaxMagics.notes = {'stream': False}")
    assert "noise` is asked for" not in notebook("%flax_apply -o run net(x);")
    assert [note.kind for note in notebook["run"].notes] == ["stream"]
    notebook("%flaxmodel again = net.clone()")
    notebook("%config FlaxMagics.notes = {}")
    assert "noise` is asked for" in notebook("%flax_apply again(x);")


def test_a_kind_that_there_is_not_is_refused(notebook, caplog):
    notebook("%config FlaxMagics.notes = {'streams': False}")
    assert caplog.messages[-1].startswith("no sharp bit is of the kind `streams`; the kinds: dropout, norm, mode,")
    assert "did you mean" in caplog.messages[-1].lower()
    notebook("%config FlaxMagics.notes = {'stream': 0}")
    assert caplog.messages[-1] == "`stream` is said (True) or not (False), not 0."
