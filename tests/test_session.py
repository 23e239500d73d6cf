"""A session against the same thing done by hand in plain Flax: equal bits, and nothing changed by what fails."""

from __future__ import annotations

import gc
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from by_hand import MyModel, Normed, Ticks, bits, notebook_x

from flax_magics import FlaxMagicsError, Session
from flax_magics.base.digest import data_of
from flax_magics.report import facts
from flax_magics.rng.keys import stream_tag
from flax_magics.run import RELEASED


def split(root_key: Any) -> Any:
    return jax.random.split(root_key, 3)


@pytest.mark.parametrize("make", [jax.random.key, jax.random.PRNGKey])
def test_the_notebook_has_every_bit_of_the_code_by_hand(session, make):
    x = notebook_x()
    my_model = MyModel(num_neurons=3, training=False)
    _, params_key, dropout_key = split(make(0))
    variables = my_model.init(params_key, x)
    y = jax.jit(lambda v, x, k: my_model.apply(v, x, rngs={"dropout": k}))(variables, x, dropout_key)

    session.register("my_model", my_model)
    run = session.apply("my_model", x)

    assert bits(run.output) == bits(y)
    assert bits(session.models["my_model"].variables) == bits(variables)
    assert data_of(run.keys["params"]) == data_of(params_key)
    assert data_of(run.keys["dropout"]) == data_of(dropout_key)
    assert run.draw == 1


def test_eager_equals_eager_by_hand(session):
    x = notebook_x()
    by_hand = MyModel(num_neurons=3, training=True)
    _, params_key, dropout_key = split(jax.random.key(0))
    variables = by_hand.init(params_key, x)
    session.register("my_model", by_hand)
    run = session.apply("my_model", x, eager=True)
    assert bits(run.output) == bits(by_hand.apply(variables, x, rngs={"dropout": dropout_key}))
    assert run.program == "eager"


def test_init_and_the_next_apply_are_one_draw(session):
    x = notebook_x()
    session.register("net", MyModel(3, True))
    variables = session.init("net", x)
    run = session.apply("net", x)

    other = Session(seed=0)
    other.register("net", MyModel(3, True))
    together = other.apply("net", x)
    assert (run.draw, together.draw) == (1, 1)
    assert bits(run.output) == bits(together.output)
    assert bits(variables) == bits(other.models["net"].variables)
    assert data_of(session.root_key) == data_of(other.root_key)


def test_a_draw_between_init_and_apply_parts_them(session):
    x = notebook_x()
    session.register("net", MyModel(3, True))
    session.init("net", x)
    session.key("latent")
    assert session.apply("net", x).draw == 3


def test_a_second_init_opens_a_second_draw(session):
    session.register("net", MyModel(3, True))
    first = session.init("net", notebook_x())
    second = session.init("net", notebook_x())
    assert bits(first) != bits(second)
    assert session.apply("net", notebook_x()).draw == 2


class Guarded(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        if self.has_rng("noise"):
            x = x + jax.random.normal(self.make_rng("noise"), x.shape)
        if self.has_rng("dropout"):
            x = nn.Dropout(0.5, deterministic=False)(x)
        return nn.Dense(2)(x)


def test_has_rng_alone_is_not_asking_but_train_answers_it(session):
    session.register("net", Guarded())
    assert session.apply("net", notebook_x()).used == {}
    assert session.apply("net", notebook_x(), mode="train").used == {"dropout": ("Dropout_0",)}
    assert session.apply("net", notebook_x(), mode="eval").used == {}


class Dropped(nn.Module):
    rate: float = 0.5
    collection: str = "dropout"

    @nn.compact
    def __call__(self, x: Any, train: bool) -> Any:
        return nn.Dropout(self.rate, deterministic=not train, rng_collection=self.collection)(nn.Dense(2)(x))


@pytest.mark.parametrize(
    ("model", "eager", "told"),
    [
        (Dropped(), False, ("dropout → nobody, layers off",)),
        (Dropped(), True, ("dropout → nobody, layers off",)),
        (Dropped(rate=0.0), False, ()),
        (Dropped(collection="noise"), False, ()),
        (nn.Dense(2), False, ()),
    ],
)
def test_that_nobody_took_a_key_is_told_of_streams_of_the_models_own(session, model, eager, told):
    session.register("net", model)
    session.init("net", notebook_x())
    for _ in range(2):
        run = session.apply("net", notebook_x(), mode="eval", eager=eager)
        assert facts.keys_of(run) == told


class DrawsParams(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        return nn.Dense(2)(x) + jax.random.normal(self.make_rng("params"), (2,))


def test_params_asked_for_in_apply_are_never_the_key_that_initialised(session):
    x, model = notebook_x(), DrawsParams()
    root_key, params_key, _ = split(jax.random.key(0))
    variables = model.init(params_key, x)
    apply = jax.jit(lambda v, x, k: model.apply(v, x, rngs={"params": k}))
    session.register("net", model)
    first = session.apply("net", x)
    own = jax.random.fold_in(jax.random.key(0), jnp.uint32(stream_tag("params")))
    assert bits(first.output) == bits(apply(variables, x, own))
    assert data_of(first.keys["params"]) == data_of(params_key)
    assert data_of(first.keys["params (folded)"]) == data_of(own)
    _, params_key, _ = split(root_key)
    assert bits(session.apply("net", x).output) == bits(apply(variables, x, params_key))


class Either(nn.Module):
    deterministic: bool | None = None

    @nn.compact
    def __call__(self, x: Any, deterministic: bool | None = None) -> Any:
        deterministic = nn.merge_param("deterministic", self.deterministic, deterministic)
        return nn.Dropout(0.5, deterministic=deterministic)(nn.Dense(3)(x))


@pytest.mark.parametrize(
    ("model", "train", "eval_"),
    [
        (MyModel(3, False), "training=True", "training=False"),
        (Normed(), "train=True", "train=False"),
        (nn.Sequential([nn.Dense(3), MyModel(3, False)]), "layers[1].training=True", "layers[1].training=False"),
        (Either(), "deterministic=False", "deterministic=True"),
        (Either(deterministic=True), "deterministic=False", "deterministic=True"),
    ],
)
def test_the_switch_is_found_wherever_the_model_has_it(session, model, train, eval_):
    session.register("net", model)
    trained = session.apply("net", notebook_x(), mode="train")
    assert (trained.switch, "dropout" in trained.used) == (train, True)
    evaluated = session.apply("net", notebook_x(), mode="eval")
    assert (evaluated.switch, "dropout" in evaluated.used) == (eval_, False)
    assert (trained.notes, evaluated.notes) == ((), ())


class TwoWays(nn.Module):
    def setup(self) -> None:
        self.encoder = nn.Dense(3)
        self.decoder = nn.Dense(4)

    def encode(self, x: Any) -> Any:
        return self.encoder(x)

    def __call__(self, x: Any) -> Any:
        return self.decoder(self.encode(x))


def test_methods_run_and_add_the_variables_that_the_first_init_did_not_make(session):
    x, model = notebook_x(), TwoWays()
    _, params_key, _ = split(jax.random.key(0))
    session.register("net", model)
    first = session.apply("net", x, method="encode")
    encoded = model.init(params_key, x, method="encode")
    assert bits(session.models["net"].variables) == bits(encoded)
    assert bits(first.output) == bits(jax.jit(lambda v, x: model.apply(v, x, method="encode"))(encoded, x))

    second = session.apply("net", x)
    full = model.init(params_key, x)
    assert bits(session.models["net"].variables) == bits(full)
    assert bits(second.output) == bits(jax.jit(model.apply)(full, x))
    assert second.made.added
    assert second.made.parameters == 16

    inner = session.apply("net", x, method="encoder")
    assert bits(inner.output) == bits(first.output)


def test_mutable_gives_output_and_updates_as_in_flax(session):
    x, model = notebook_x(), Normed()
    _, params_key, dropout_key = split(jax.random.key(0))
    variables = model.init(params_key, x, train=False)
    session.register("net", model)
    run = session.apply("net", x, mode="train", mutable="batch_stats")
    by_hand = jax.jit(lambda v, x, k: model.apply(v, x, train=True, rngs={"dropout": k}, mutable=["batch_stats"]))(
        variables, x, dropout_key
    )
    assert bits(run.output) == bits(by_hand)


def test_given_variables_are_used_and_nothing_is_kept(session):
    x = notebook_x()
    session.register("net", Normed())
    session.apply("net", x, mode="train")
    before = session.models["net"].variables
    zeros = jax.tree_util.tree_map(jnp.zeros_like, before)
    run = session.apply("net", x, mode="train", variables=zeros)
    assert not run.output.any()
    assert run.changed == {}
    assert session.models["net"].variables is before


def test_variables_that_jax_cannot_sort_are_refused(session):
    x = notebook_x()
    session.register("net", MyModel(3, False))
    with pytest.raises(FlaxMagicsError) as error:
        session.models["net"].variables = {"params": {"Dense_0": {1: x, "bias": x}}}
    assert str(error.value) == (
        "variables of `net`: a dict in them has keys that JAX cannot sort, such as a number beside a string."
    )


class TakesKey(nn.Module):
    @nn.compact
    def __call__(self, x: Any, z_rng: Any) -> Any:
        return nn.Dense(2)(x) + jax.random.normal(z_rng, (2,))


def test_key_passes_the_stream_as_that_argument(session):
    x, model = notebook_x(), TakesKey()
    session.register("vae", model)
    run = session.apply("vae", x, key="z_rng")
    _, params_key, _ = split(jax.random.key(0))
    z_rng = jax.random.fold_in(jax.random.key(0), jnp.uint32(stream_tag("z_rng")))
    variables = model.init(params_key, x, z_rng)
    assert bits(run.output) == bits(jax.jit(model.apply)(variables, x, z_rng))
    assert data_of(run.keys["z_rng"]) == data_of(z_rng)
    assert run.notes == ()


class Keyed(nn.Module):
    @nn.compact
    def __call__(self, x: Any, params: Any = None) -> Any:
        noise = 0.0 if params is None else jax.random.normal(params, x.shape)
        return nn.Dense(2)(x + noise)


@pytest.mark.parametrize("initialised", [True, False])
def test_the_key_of_an_init_is_not_passed_to_the_run_of_the_same_draw(session, initialised):
    x = notebook_x()
    session.register("net", Keyed())
    if initialised:
        session.init("net", x)
    before = session._state
    with pytest.raises(FlaxMagicsError, match="in this draw that key initialises `net`"):
        session.apply("net", x, key="params")
    assert session._state is before
    session.apply("net", x)
    assert session.apply("net", x, key="params").draw == 2


def test_a_key_that_goes_into_two_runs_is_noted_and_so_is_the_root(session):
    x = notebook_x()
    session.register("vae", TakesKey())
    latent = session.key("latent")
    assert session.apply("vae", x, latent).notes == ()
    (note,) = session.apply("vae", x, latent).notes
    assert note.text == "`z_rng` went into draw 2 too: the same key gives the same numbers"
    for root in (session.root_key, jax.random.key(0), jax.random.PRNGKey(0)):
        (note,) = session.apply("vae", x, root).notes
        assert note.text == "`z_rng` is a root key that this session splits: its numbers meet the session's own"


def test_a_drawn_key_is_a_draw_and_in_the_history(session):
    key = session.key("latent")
    by_hand = jax.random.fold_in(jax.random.key(0), jnp.uint32(stream_tag("latent")))
    assert bits(key) == bits(by_hand)
    assert bits(session.key("dropout")) == bits(split(split(jax.random.key(0))[0])[2])
    assert [(run.command, run.call, run.draw) for run in session.runs] == [("key", "latent", 1), ("key", "dropout", 2)]


def test_restart_fresh_repeats_everything(session):
    x = notebook_x()
    session.register("net", Normed())

    def cells() -> list[Any]:
        return [bits(session.apply("net", x + i, mode="train").output) for i in range(3)]

    first = cells()
    restart = session.restart(0, fresh=True)
    assert (restart.keeping, restart.again) == ((), True)
    assert cells() == first
    restart = session.restart(0)
    assert restart.keeping == ("net",)
    assert session.apply("net", x, mode="train").changed == {"batch_stats": 4}


def test_an_earlier_draw_gives_its_keys_again_and_moves_nothing(session):
    x = notebook_x()
    session.register("net", MyModel(3, True))
    runs = [session.apply("net", x) for _ in range(3)]
    root = data_of(session.root_key)
    again = session.apply("net", x, keys_of=2)
    assert bits(again.output) == bits(runs[1].output)
    assert (again.draw, again.replayed) == (2, True)
    assert data_of(session.root_key) == root
    session.restart(7)
    assert bits(session.apply("net", x, keys_of=(0, 3)).output) == bits(runs[2].output)
    with pytest.raises(FlaxMagicsError, match="draw 9 of seed 0 was not made in this session: it has draws 1 to 3"):
        session.apply("net", x, keys_of=(0, 9))


def test_repeat_runs_with_the_same_keys_and_counts_one_draw_and_one_update(session):
    session.register("net", Normed())
    run = session.apply("net", notebook_x(), mode="train", repeat=5)
    assert len(run.timing.steady.times) == 5
    assert run.changed == {"batch_stats": 1}
    assert session.draws == 1


def snapshot(session: Session) -> Any:
    models = {name: (model.module, model.variables) for name, model in session.models.items()}
    runs = [(run.command, run.call, run.draw) for run in session.runs]
    return data_of(session.root_key), session.seed, session.draws, models, runs


class Fails(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        return nn.Dense(2)(x) @ jnp.ones((5, 5))


@pytest.mark.parametrize(
    "fail",
    [
        lambda s, x: s.apply("net", x[..., :2]),
        lambda s, x: s.apply("bad", x),
        lambda s, x: s.init("bad", x),
        lambda s, x: s.apply("net"),
        lambda s, x: s.apply("net", x, mask=x),
        lambda s, x: s.apply("nett", x),
        lambda s, x: s.apply("net", x, method="encode"),
        lambda s, x: s.apply("net", x, keys_of=99),
        lambda s, x: s.apply("net", x, repeat=0),
        lambda s, x: s.apply("net", x, mode="test"),
        lambda s, x: s.key("not a name"),
        lambda s, x: s.register("net", 3),
        lambda s, x: s.register_all({"new": MyModel(3, True), "net": "nothing"}),
        lambda s, x: s.restart(1.5),
    ],
)
def test_what_fails_changes_nothing(session, fail):
    x = notebook_x()
    session.register_all({"net": MyModel(3, True), "bad": Fails()})
    session.init("net", x)  # leaves a draw open, too
    before = snapshot(session)
    with pytest.raises(Exception):  # noqa: B017, PT011 - any error will do here: each text has its own test
        fail(session, x)
    assert snapshot(session) == before
    assert session.apply("net", x).draw == 1


def test_an_interrupt_changes_nothing(session, monkeypatch):
    x = notebook_x()
    session.register("net", MyModel(3, True))
    session.apply("net", x)
    before = snapshot(session)
    for phase in ("tracing", "lowering", "compiling", "running"):

        def interrupt(text: str, phase: str = phase) -> None:
            if text.startswith(phase):
                raise KeyboardInterrupt

        session.services.on_phase = interrupt
        with pytest.raises(KeyboardInterrupt):
            session.apply("net", jnp.ones((2, 7, 4)))
        assert snapshot(session) == before


def test_runs_hold_arrays_weakly_and_a_run_in_hand_holds_its_own(session):
    session.register("net", MyModel(3, True))
    run = session.apply("net", notebook_x())
    assert session.runs[-1] is run
    output, digest = run.output, run.digest
    del run
    gc.collect()
    assert session.runs[-1].output is output
    del output
    gc.collect()
    kept = session.runs[-1]
    assert kept.output is RELEASED
    assert kept.digest == digest
    assert kept.draw == 1


def test_a_run_is_immutable(session):
    session.register("net", MyModel(3, True))
    run = session.apply("net", notebook_x())
    with pytest.raises(AttributeError, match="immutable type: 'Run'"):
        run.draw = 5


def test_each_phase_is_timed_apart_by_the_clock_that_was_given():
    session = Session(seed=0, clock=Ticks())
    session.register("net", MyModel(3, True))
    timing = session.apply("net", notebook_x()).timing
    assert (timing.trace, timing.lower, timing.compile, timing.run, timing.wait, timing.init) == (1, 1, 1, 1, 1, 1)
    timing = session.apply("net", notebook_x()).timing
    assert (timing.trace, timing.lower, timing.compile, timing.run, timing.wait, timing.init) == (0, 0, 0, 1, 1, 0)


def test_a_history_holds_no_device_memory_and_can_be_long(session):
    session.register("net", MyModel(3, True))
    x = notebook_x()
    session.apply("net", x)
    session.apply("net", x)
    gc.collect()
    before = len(jax.live_arrays())
    for _ in range(20):
        session.apply("net", x)
    gc.collect()
    assert len(jax.live_arrays()) <= before + 2
    assert len(session.runs) == 22


def test_a_chain_of_many_runs_can_be_let_go(session):
    from flax_magics.state.runs import RunLog

    chain = None
    for n in range(200_000):
        chain = RunLog(None, chain, n)
    del chain
    gc.collect()
