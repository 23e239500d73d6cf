"""Samples, many draws in one run: each the single run of that draw, and the root where so many single runs leave it."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import nnx_kinds
import numpy as np
import pytest
from by_hand import MyModel, bits
from flax import linen as nn
from flax import nnx
from sessions import session_of

from flax_magics import FlaxMagicsError
from flax_magics.report import html, text

X = jnp.linspace(-1.0, 1.0, 20).reshape(5, 4)


class Net(nn.Module):
    """Dropout, BatchNorm, and a stream of its own."""

    @nn.compact
    def __call__(self, x, training: bool = True):
        x = nn.Dense(8)(x)
        x = nn.BatchNorm(use_running_average=not training)(x)
        x = nn.Dropout(0.5, deterministic=False)(x)
        x = x + jax.random.normal(self.make_rng("noise"), x.shape)
        return nn.Dense(3)(x)


Plain = partial(MyModel, 8, True)
Own = partial(nnx_kinds.Own, 8)


class Handed(nnx.Module):
    def __init__(self, *, rngs):
        self.dense = nnx.Linear(4, 8, rngs=rngs)
        self.dropout = nnx.Dropout(0.5)

    def __call__(self, x, *, rngs):
        return self.dropout(self.dense(x), rngs=rngs)


def pair(make, *inputs, seed=0):
    """Two sessions with the same model, initialised where there are inputs: one for samples, one for single ones."""
    sessions = session_of(make(), seed=seed), session_of(make(), seed=seed)
    for session in sessions if inputs else ():
        session.init("net", *inputs)
    return sessions


def same(one, other):
    assert bits(one) == bits(other)


def test_each_draw_is_the_single_run_of_that_draw():
    many, single = pair(Plain)
    run = many.apply("net", X, samples=4)
    outputs = [single.apply("net", X).output for _ in range(4)]
    same(run.output, jnp.stack(outputs))
    assert (run.draw, run.samples) == (1, 4)
    assert many.draws == single.draws == 4
    same(many.root_key, single.root_key)
    same(many.apply("net", X).output, single.apply("net", X).output)


def test_batchnorm_in_evaluation_and_an_extra_stream():
    many, single = pair(Net, X, seed=3)
    run = many.apply("net", X, mode="eval", samples=3)
    runs = [single.apply("net", X, mode="eval") for _ in range(3)]
    np.testing.assert_allclose(run.output, jnp.stack([r.output for r in runs]), rtol=1e-5, atol=1e-6)
    for name in ("params", "dropout", "noise"):
        same(run.keys[name], jnp.stack([r.keys[name] for r in runs]))
    same(many.root_key, single.root_key)
    assert run.used == runs[0].used
    same(many.models["net"].variables, single.models["net"].variables)


def test_by_hand_is_a_vmap_over_the_keys():
    session = session_of(Plain())
    run = session.apply("net", X, samples=5)
    hand = jax.vmap(lambda variables, x, key: Plain().apply(variables, x, rngs={"dropout": key}), (None, None, 0))
    same(run.output, jax.jit(hand)(session.models["net"].variables, X, run.keys["dropout"]))
    code = "net.apply(variables, …, rngs={'dropout': dropout_key})"
    assert run.by_hand == f"jax.vmap(lambda dropout_key: {code})(dropout_keys)"


def test_an_opened_draw_is_the_first_of_them():
    many, single = pair(Plain, X)
    run = many.apply("net", X, samples=2)
    outputs = [single.apply("net", X).output for _ in range(2)]
    same(run.output, jnp.stack(outputs))
    assert (run.draw, many.draws) == (1, 2)


def test_eager_and_other_generators():
    session, _ = pair(Plain, X)
    compiled = session.apply("net", X, samples=3)
    eager = session.apply("net", X, keys_of=1, samples=3, eager=True)
    np.testing.assert_allclose(compiled.output, eager.output, rtol=1e-6)
    assert eager.replayed
    with jax.default_prng_impl("rbg"):
        many, single = pair(Plain, X)
    run = many.apply("net", X, samples=3)
    same(run.output, jnp.stack([single.apply("net", X).output for _ in range(3)]))


@pytest.mark.parametrize("samples", [1, 3])
def test_nnx(samples):
    many, single = pair(lambda: Own(rngs=nnx.Rngs(0)), seed=1)
    run = many.apply("net", X, mode="eval", samples=samples)
    outputs = [single.apply("net", X, mode="eval").output for _ in range(samples)]
    same(run.output, jnp.stack(outputs))
    same(nnx.state(many.models["net"].module), nnx.state(Own(rngs=nnx.Rngs(0))))
    same(many.root_key, single.root_key)


def test_nnx_dropout_on_and_rngs_of_the_call():
    for make in (lambda: nnx.Dropout(0.5, rngs=nnx.Rngs(0)), lambda: Handed(rngs=nnx.Rngs(0))):
        many, single = pair(make, seed=1)
        run = many.apply("net", X, mode="train", samples=4)
        outputs = jnp.stack([single.apply("net", X, mode="train").output for _ in range(4)])
        np.testing.assert_allclose(run.output, outputs, rtol=1e-6)
        assert len({np.asarray(mask).tobytes() for mask in run.output == 0}) == 4
        same(nnx.state(many.models["net"].module), nnx.state(make()))
        if isinstance(many.models["net"].module, nnx.Dropout):  # no layer before it whose last bits a vmap changes
            same(run.output, outputs)


def test_keys_as_arguments():
    class Sampler(nn.Module):
        @nn.compact
        def __call__(self, x, z_rng):
            return nn.Dense(2)(x) + jax.random.normal(z_rng, (2,))

    many, single = pair(Sampler, X, jax.random.key(7))
    run = many.apply("net", X, key="z_rng", samples=3)
    same(run.output, jnp.stack([single.apply("net", X, key="z_rng").output for _ in range(3)]))
    assert run.by_hand.startswith("jax.vmap(lambda z_rng_key: ")


def test_sown_values_are_stacked():
    class Sower(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Dropout(0.5, deterministic=False)(x)
            self.sow("intermediates", "h", x)
            return x.sum()

    session = session_of(Sower())
    run = session.apply("net", X, samples=2)
    assert run.sown["intermediates"]["h"][0].shape == (2, 5, 4)
    assert session.models["net"].variables == {}


def test_what_a_model_writes_is_handed_back_and_not_kept():
    session, _ = pair(Net, X)
    variables = session.models["net"].variables
    run = session.apply("net", X, mode="train", mutable="batch_stats", samples=8)

    @jax.jit
    def hand(variables, x, *keys):
        def one(*keys):
            rngs = dict(zip(("dropout", "noise"), keys, strict=True))
            return Net().apply(variables, x, training=True, rngs=rngs, mutable=["batch_stats"])

        return jax.vmap(one)(*keys)

    same(run.output, hand(variables, X, run.keys["dropout"], run.keys["noise"]))
    same(session.models["net"].variables, variables)
    assert (run.changed, run.dropped) == ({}, ("batch_stats",))
    assert "  vars     initialised in draw 1    batch_stats: not kept\n" in text.normal(run)
    assert "batch_stats: not kept" in " ".join(text.report(run, "line").split())
    assert session.replay(run).agreement.identical
    again = session.apply("net", X, mode="train", keys_of=1)
    assert again.dropped == ("batch_stats",)
    assert session.apply("net", X, mode="train").changed == {"batch_stats": 1}


@pytest.mark.parametrize("eager", [False, True])
def test_nnx_statistics_are_not_kept(eager):
    module = Own(rngs=nnx.Rngs(0))
    session, before = session_of(module), bits(nnx.state(module))
    run = session.apply("net", X, mode="train", samples=2, eager=eager)
    assert bits(nnx.state(module)) == before
    assert run.dropped == ("BatchStat",)
    assert run.by_hand == (
        "for default_key in default_keys:\n    net_copy = nnx.clone(net); net_copy.train(); nnx.reseed(net_copy, "
        "policy='match_shape', default=default_key); nnx.jit(lambda net_copy: net_copy(…))(net_copy)"
    )
    masks = {np.asarray(sample == 0).tobytes() for sample in run.output}
    assert len(masks) == 2
    session.apply("net", X, mode="train")
    assert session.runs[-1].changed == {"BatchStat": 1}


def test_rngs_of_the_users_own_are_refused():
    session = session_of(Handed(rngs=nnx.Rngs(0)))
    with pytest.raises(FlaxMagicsError, match="passes rngs of its own: they would give all 2 samples the same keys"):
        session.apply("net", X, rngs=nnx.Rngs(5), samples=2)
    assert session.draws == 0


class Still(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(2)(x)


class Asking(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dropout(0.5, deterministic=not self.has_rng("dropout"))(x)


class Switched(nn.Module):
    @nn.compact
    def __call__(self, x, train=False, z_rng=None):
        return nn.Dropout(0.5, deterministic=not train)(x)


class Fixed(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dropout(0.5, deterministic=True)(x)


def test_samples_without_a_key_are_all_the_same():
    session = session_of(Still())
    run = session.apply("net", X, samples=3)
    same(run.output, jnp.stack([run.output[0]] * 3))
    assert run.spread[0].deviation == 0.0
    assert run.by_hand == "net.apply(variables, …)"


@pytest.mark.parametrize(
    ("model", "options", "advice"),
    [
        (Still, {}, "form: %flax_apply net(…)"),
        (Switched, {}, "form: %flax_apply --train --samples 3 net(…)"),
        (Switched, {"mode": "eval"}, "form: %flax_apply --train --samples 3 net(…)"),
        (Switched, {"train": False}, "form: %flax_apply --samples 3 net(…, train=True)"),
        (Switched, {"key": "z_rng"}, "form: %flax_apply --train --key z_rng --samples 3 net(…)"),
        (Asking, {}, "form: %flax_apply --train --samples 3 net(…)"),
        (Fixed, {}, "in your model: def __call__(self, …, train): deterministic=not train"),
        (lambda: nn.BatchNorm(use_running_average=True), {}, "form: %flax_apply net(…)"),
        (lambda: Own(rngs=nnx.Rngs(0)), {"mode": "eval"}, "form: %flax_apply --train --samples 3 net(…)"),
    ],
)
def test_the_line_that_makes_them_differ(model, options, advice):
    session = session_of(model())
    (note,) = [note for note in session.apply("net", X, samples=3, **options).notes if note.kind == "samples"]
    assert note.text == "the 3 samples are the same: no key is used in this run"
    assert [f"{label.strip()} {' '.join(said.split())}" for label, said in note.advice] == [advice]


def test_what_is_off_in_training_is_told_once_and_one_sample_is_no_news():
    session = session_of(Fixed())
    notes = session.apply("net", X, mode="train", samples=2).notes
    assert [(note.kind, bool(note.advice)) for note in notes] == [("dropout", True), ("samples", False)]
    assert [note.kind for note in session.apply("net", X, samples=1).notes] == []
    switched = session_of(Switched())
    assert [note.kind for note in switched.apply("net", X, mode="train", samples=2).notes] == []


@pytest.mark.parametrize("samples", [0, -1, True, 1.5])
def test_a_number_that_is_none(samples):
    session = session_of(Plain())
    with pytest.raises(FlaxMagicsError, match="--samples takes a number of samples, 1 or more"):
        session.apply("net", X, samples=samples)


def test_a_replay_goes_no_further_than_what_was_drawn():
    session = session_of(Plain())
    first = session.apply("net", X, samples=3)
    same(session.apply("net", X, keys_of=2, samples=2).output, first.output[1:])
    with pytest.raises(FlaxMagicsError, match="draw 4 of seed 0 was not made in this session"):
        session.apply("net", X, keys_of=2, samples=3)
    assert session.draws == 3


def test_spread():
    session = session_of(Plain())
    run = session.apply("net", X, samples=6)
    (spread,) = run.spread
    values = np.asarray(run.output, np.float64)
    assert spread.mean == values.mean()
    assert spread.deviation == values.std(axis=0, ddof=1).mean()
    assert run.to_json()["spread"] == [{"path": "", "mean": spread.mean, "deviation": spread.deviation}]
    assert session.apply("net", X).spread == ()


def test_the_report_says_which_draws_and_how_they_differ():
    session = session_of(Plain())
    session.apply("net", X)
    run = session.apply("net", X, samples=6)
    (spread,) = run.spread
    normal = text.normal(run).splitlines()
    assert normal[0] == "net · as written (training=True) · cpu:0 · draws 2–7 of seed 0"
    assert normal[1] == "  out      float32[6,5,8]"
    assert normal[2] == f"  samples  mean {spread.mean:.3g}, spread ± {spread.deviation:.3g}"
    assert normal[3] == "           (each element's standard deviation over the samples, averaged)"
    assert "  jit      compiled in" in "\n".join(normal)
    assert ": now with --samples 6" in "\n".join(normal)
    assert f"mean {spread.mean:.3g} ± {spread.deviation:.3g}" in text.report(run, "line")
    assert f"mean {spread.mean:.3g}, spread ± {spread.deviation:.3g}" in html.report_html(run, "normal")
    assert session.apply("net", X).draw == 8


def test_the_command(notebook):
    notebook("%flaxmodel -q net = nn.Dropout(0.5, deterministic=False)")
    notebook("ys = %flax_apply -q --samples 4 -o run net(x)")
    assert notebook["ys"].shape == (4, 3, 4, 4)
    assert notebook["run"].samples == 4
    out = notebook("for _ in range(3):\n  %flax_apply --samples 2 net(x);")
    assert "draws 5–6 of seed 0" in out
    assert "net · as written · cpu:0 · draws 7–10 · 2 runs · reused" in out
    assert "--samples needs a positive whole number, not 0." in notebook.fails("%flax_apply --samples 0 net(x)")
