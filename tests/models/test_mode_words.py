"""The mode of a run is what was set: a model that has nothing to set runs as written, whatever was asked."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from sessions import session_of

X = jnp.ones((4, 3))


class Fixed(nn.Module):
    on: bool = True

    @nn.compact
    def __call__(self, x):
        return nn.Dropout(0.5, deterministic=not self.on)(nn.Dense(2)(x))


class Switched(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        return nn.Dropout(0.5, deterministic=not train)(nn.Dense(2)(x))


class ByStream(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dropout(0.5, deterministic=not self.has_rng("dropout"))(nn.Dense(2)(x))


def run(module, mode):
    session = session_of(module)
    first, again = session.apply("net", X, mode=mode), session.apply("net", X, mode=mode)
    assert (first.mode, first.switch, first.notes) == (again.mode, again.switch, again.notes)
    return first


def words(one):
    return one.mode, one.switch, [note.text for note in one.notes if note.kind == "mode"]


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("make", [lambda: nn.Dense(2), lambda: nnx.Linear(3, 2, rngs=nnx.Rngs(0))])
def test_without_a_switch_nothing_is_claimed(make, mode):
    said = f"net has no train switch: --{mode} changed nothing"
    assert words(run(make(), mode)) == ("as written", "", [said])
    assert words(run(make(), None)) == ("as written", "", [])


def test_the_run_is_the_one_as_written():
    session = session_of(nnx.Linear(3, 2, rngs=nnx.Rngs(0)))
    written, asked = session.apply("net", X), session.apply("net", X, mode="train")
    assert written.digest == asked.digest
    assert asked.by_hand == written.by_hand
    assert session.replay(asked).agreement.identical
    summary = session.summary("net", X, mode="train")
    assert (summary.mode, summary.notes) == ("as written", ("net has no train switch: --train changed nothing",))


def test_with_one_the_mode_is_said():
    assert words(run(Switched(), "train")) == ("train", "train=True", [])
    assert words(run(nnx.Dropout(0.5, rngs=nnx.Rngs(0)), "eval")) == ("eval", "deterministic=True", [])


def test_a_stream_that_the_model_looks_for_is_a_switch():
    assert words(run(ByStream(), "train")) == ("train", "", [])
    assert words(run(ByStream(), "eval")) == ("eval", "", [])
    assert run(ByStream(), "train").digest != run(ByStream(), "eval").digest


def test_a_layer_that_is_fixed_the_other_way_is_the_sharper_bit():
    one = run(Fixed(False), "train")
    assert words(one) == ("as written", "", [])
    assert [note.kind for note in one.notes] == ["dropout"]
    one = run(Fixed(True), "train")
    assert words(one) == ("as written", "", ["net has no train switch: --train changed nothing"])


def test_the_report(notebook):
    notebook("%%flaxmodel net = Net()\nclass Net(nn.Module):\n  def __call__(self, x):\n    return 2 * x")
    out = notebook("y = %flax_apply --train net(x)").splitlines()
    assert out[1] == "net · as written · cpu:0 · draw 1 of seed 0"
    assert out[-1] == "! net has no train switch: --train changed nothing"
    assert notebook.session.runs[-1].to_json()["mode"] == "as written"
    assert jax.numpy.array_equal(notebook["y"], 2 * notebook["x"])
