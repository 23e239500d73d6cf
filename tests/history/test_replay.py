"""`Session.replay`: a draw once more, bit by bit; what is gone is said, and nothing is moved."""

from __future__ import annotations

import gc
import weakref

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from by_hand import MyModel, Normed, bits, notebook_x
from flax import nnx
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from linen_kinds import Sampler
from msgspec.structs import replace
from nnx_kinds import Own
from sessions import session_of

from flax_magics import FlaxMagicsError, Session
from flax_magics.base.output import Agreement, Difference
from flax_magics.models.construction import Construction
from flax_magics.models.nnx_graph import raw

IDENTICAL = Agreement(True, "output")
BY_DIGEST = Agreement(True, "digest")
NOTHING = Agreement(None)


class Wider(nn.Module):
    """Normed after an edit that keeps the tree."""

    @nn.compact
    def __call__(self, x, train):
        x = nn.Dense(4)(x) * 2
        x = nn.BatchNorm(use_running_average=not train)(x)
        return nn.Dropout(rate=0.5, deterministic=not train)(x)


Wider.__name__ = Wider.__qualname__ = "Normed"


@pytest.fixture
def net():
    return session_of(MyModel(3, training=True))


x = notebook_x()


def forget_programs(session, name):
    session.programs.by_call.clear()
    session.programs.by_text.clear()
    session._plans.forget(name)
    gc.collect()


def looked_at(session):
    """All that a replay must leave as it is."""
    state = session._state
    variables = {name: bits(model.variables or {}) for name, model in session.models.items()}
    return state.root, state.opened, state.seeds, dict(state.models), variables, len(session)


@pytest.mark.parametrize("module", [Normed(), Own(4, rngs=nnx.Rngs(0))], ids=["linen", "nnx"])
def test_a_loop_with_moving_statistics_replays_every_draw_identically(session, module):
    session.register("b", module)
    runs = [session.apply("b", x + i, mode="train") for i in range(20)]
    before = looked_at(session)
    for run in runs:
        again = session.replay(run.draw)
        assert again.agreement == IDENTICAL
        assert "\n  replay  identical: " in str(again)
        assert bits(again.output) == bits(run.output)
        assert (again.replayed, again.draw, again.program) == (True, run.draw, "reused")
    assert looked_at(session) == before


@pytest.mark.parametrize("kind", ["linen", "nnx"])
def test_it_does_after_an_edit_and_after_another_seed_too_and_says_that_the_code_is_of_then(session, kind):
    session.register("b", Normed() if kind == "linen" else Own(4, rngs=nnx.Rngs(0)))
    runs = [session.apply("b", x + i, mode="train") for i in range(3)]
    session.register("b", Wider() if kind == "linen" else nnx.Sequential(nnx.Linear(4, 4, rngs=nnx.Rngs(1))))
    session.restart(7)
    session.apply("b", x, **({"train": True} if kind == "linen" else {}))
    edited = Agreement(True, "output", said=("b was edited since: this is its code as it was then",))
    assert [session.replay((0, run.draw)).agreement for run in runs] == [edited] * 3
    assert session.replay(1).agreement.said == ()


def test_a_module_in_the_place_of_a_model_that_could_not_be_told_from_others_is_not_that_model(session):
    before = session_of(MyModel(3, True))._state.models["net"]
    session.register("net", Own(4, rngs=nnx.Rngs(0)))
    entry = session._state.models["net"]
    assert [entry.still(replace(one, fingerprint=None)) for one in (before, entry)] == [False, True]


@pytest.mark.parametrize("module", [Normed(), Own(4, rngs=nnx.Rngs(0))], ids=["linen", "nnx"])
def test_a_program_that_is_gone_is_made_anew(session, module):
    session.register("b", module)
    runs = [session.apply("b", x + i, mode="train") for i in range(2)]
    forget_programs(session, "b")
    before = looked_at(session)
    again = [session.replay(run.draw) for run in runs]
    assert [(run.agreement, run.program) for run in again] == [(IDENTICAL, "compiled"), (IDENTICAL, "reused")]
    assert looked_at(session) == before


SCALE = 2.0


class Scaled(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(x) * SCALE


def test_what_the_model_reads_from_outside_is_as_it_was_while_the_program_is_there(session, monkeypatch):
    session.register("net", Scaled())
    run = session.apply("net", x)
    monkeypatch.setitem(globals(), "SCALE", 3.0)
    assert session.replay(1).agreement.identical
    forget_programs(session, "net")
    agreement = session.replay(1).agreement
    assert not agreement.identical
    assert agreement.said == ("the program was made anew: something that the model's code reads is another now",)
    assert bits(run.output) == bits(session.runs[-1].output)


def test_another_setting_of_jax_is_said(net):
    run = net.apply("net", x)
    with jax.default_matmul_precision("float32"):
        said = net.replay(run).agreement.said
    assert said == ("JAX is set otherwise than it was: its precision, its devices or the like",)
    assert net.replay(run).agreement == IDENTICAL


def test_without_its_output_it_is_held_against_the_digest_and_without_that_against_nothing(net):
    assert net.apply("net", x).digest is not None
    net.apply("net", x)
    gc.collect()
    assert net.replay(1).agreement == BY_DIGEST
    assert net.replay(2).agreement == NOTHING


def test_another_result_is_told_leaf_by_leaf(session, monkeypatch):
    class Two(nn.Module):
        @nn.compact
        def __call__(self, x):
            return {"a": x * 2, "n": jnp.arange(3)}

    session.register("net", Two())
    run = session.apply("net", jnp.ones((2, 3)))
    other = {"a": np.array(run.output["a"]), "n": np.array(run.output["n"])}
    other["a"][0, 0] = np.nextafter(np.float32(2), np.float32(3))
    other["n"][2] = 7
    kept = session._state.runs.last
    monkeypatch.setattr(type(kept), "output", lambda self: other)
    of_a = Difference("['a']", 1, 6, float(np.float32(2).item()) * 2.0**-23, 1)
    assert session.replay(1).agreement == Agreement(False, "output", (of_a, Difference("['n']", 1, 3, 5.0)))


def test_an_init_and_a_key_replay_too(net):
    variables = net.init("net", x)
    key = net.key("latent")
    assert net.replay(1).agreement == IDENTICAL
    assert bits(net.replay(1).output) == bits(variables)
    again = net.replay("last")
    assert (again.command, again.agreement, bits(again.output)) == ("key", IDENTICAL, bits(key))


def test_a_draw_that_an_init_and_an_apply_shared_is_two_runs(net):
    held = net.init("net", x)
    y = net.apply("net", x).output
    assert [(run.command, run.agreement) for run in net.run_replay(1)] == [("init", IDENTICAL), ("apply", IDENTICAL)]
    assert bits(net.replay(1).output) == bits(y)
    assert held is not None


def test_a_draw_that_is_open_stays_open(net):
    net.apply("net", x)
    net.init("net", x)
    net.replay(1)
    assert net.apply("net", x).draw == 2


def test_a_module_that_the_session_built(session):
    session.register_all({"net": Construction(Own, (4,), {}, "Own(4)")})
    net = session.module("net")
    y = session.apply("net", x, mode="train").output
    before = bits(nnx.state(net))
    built, applied = session.run_replay(1)
    assert (built.command, built.agreement) == ("init", IDENTICAL)
    assert applied.agreement == IDENTICAL
    assert bits(applied.output) == bits(y)
    assert bits(nnx.state(net)) == before


def test_samples(net):
    run = net.apply("net", x, samples=4)
    assert [net.replay(n).agreement for n in (1, 4)] == [IDENTICAL] * 2
    assert net.replay(run).samples == 4


@pytest.mark.parametrize(
    "options",
    [{"eager": True}, {"repeat": 3}, {"mutable": "batch_stats"}, {"mode": "eval"}, {"method": "__call__"}],
    ids=["eager", "repeat", "mutable", "eval", "method"],
)
def test_every_option(session, options):
    session.register("b", Normed())
    if options.get("mode") != "eval":
        options = {"mode": "train", **options}
    run = session.apply("b", x, **options)
    again = session.replay(1)
    assert again.agreement == IDENTICAL
    assert bits(again.output) == bits(run.output)


def test_variables_of_the_users_own_and_a_key_in_the_call(session):
    session.register("net", Sampler())
    first = session.apply("net", x, key="key")
    doubled = jax.tree_util.tree_map(lambda leaf: leaf * 2, session.models["net"].variables)
    run = session.apply("net", x, key="key", variables=doubled)
    del doubled
    session.models["net"].variables = None
    gc.collect()
    assert session.replay(first).agreement == IDENTICAL
    assert session.replay(run).agreement == IDENTICAL


def test_a_run_with_an_earlier_draws_keys_is_replayed_by_its_name(net):
    net.apply("net", x)
    run = net.apply("net", x[:2], keys_of=1)
    again = net.replay(run)
    assert again.agreement == IDENTICAL
    assert again.output.shape == (2, 4, 3)


def test_arrays_of_numpy_and_dicts_are_what_they_were(session):
    session.register("net", Reads())
    a, b = np.array(x), np.ones(3, np.float32)
    batch = {"x": a, "bias": b}
    first = session.apply("net", batch)
    a *= 2
    batch["bias"] = b * 7
    second = session.apply("net", batch)
    assert bits(first.output) != bits(second.output)
    assert [session.replay(n).agreement for n in (1, 2)] == [IDENTICAL] * 2


class Reads(nn.Module):
    @nn.compact
    def __call__(self, batch):
        return nn.Dense(3)(batch["x"]) + batch["bias"]


def test_variables_that_are_numpys_own_and_are_changed_in_place(session):
    session.register("net", nn.Dense(3))
    kernel = np.ones((4, 3), np.float32)
    session.models["net"].variables = {"params": {"kernel": kernel, "bias": np.zeros(3, np.float32)}}
    runs = []
    for _ in range(4):
        runs.append(session.apply("net", x))
        kernel += 1
    assert [session.replay(n).agreement for n in (1, 2, 3, 4)] == [IDENTICAL] * 4


def test_rngs_in_the_call_are_those_of_then(session):
    class Takes(nnx.Module):
        def __init__(self):
            self.dropout = nnx.Dropout(0.5)

        def __call__(self, x, rngs):
            return self.dropout(x, rngs=rngs)

    session.register("net", Takes())
    rngs = nnx.Rngs(3)
    runs = [session.apply("net", x, rngs=rngs) for _ in range(3)]
    count = int(rngs.default.count[...])
    assert bits(runs[0].output) != bits(runs[1].output)
    assert [session.replay(n).agreement for n in (1, 2, 3)] == [IDENTICAL] * 3
    assert int(rngs.default.count[...]) == count


def test_the_users_module_may_be_another_since(session):
    net = Own(4, rngs=nnx.Rngs(0))
    session.register("net", net)
    run = session.apply("net", x, mode="train")
    net.linear = nnx.Linear(4, 4, rngs=nnx.Rngs(5))
    net.dropout.rate = 0.1
    before = bits(nnx.state(net))
    again = session.replay(1)
    assert bits(again.output) == bits(run.output)
    assert bits(nnx.state(net)) == before


def test_a_replay_of_nnx_holds_no_array_of_the_module(session):
    net = Own(4, rngs=nnx.Rngs(0))
    session.register("net", net)
    session.apply("net", x, mode="train")
    session.register("net", nnx.Linear(4, 4, rngs=nnx.Rngs(1)))
    session._plans.forget("net")
    module, final = weakref.ref(net), weakref.ref(raw(net.norm.mean))
    del net
    session.programs.by_call.clear()
    gc.collect()
    assert (module(), final()) == (None, None)


def test_what_was_let_go_of_is_said():
    session = session_of(MyModel(3, training=True), replay_bytes=2000)
    runs = [session.apply("net", x + i) for i in range(40)]
    with pytest.raises(FlaxMagicsError) as error:
        session.replay(1)
    assert str(error.value) == (
        "draw 1 of seed 0 cannot be run again: its inputs and variables were let go of: by %flax_free --replays, or the"
        " oldest to stay within 2.0 KB. With a higher limit later ones are kept.\n"
        "  write: %config FlaxMagics.replay_bytes = 1000000000"
    )
    assert session.replay(40).agreement == IDENTICAL
    assert runs[0].output is not None


def test_an_array_that_was_deleted_is_said(net):
    y = jnp.array(x)
    net.apply("net", y)
    y.delete()
    with pytest.raises(FlaxMagicsError, match="an array that it used was deleted or donated since"):
        net.replay(1)


def test_a_draw_that_never_was(session):
    with pytest.raises(FlaxMagicsError, match=r"draw 1 of seed 0 was not made in this session: it has no draw\."):
        session.replay(1)
    with pytest.raises(FlaxMagicsError, match=r"a draw is a number, \(seed, number\), 'last' or a Run, not 'first'\."):
        session.replay("first")


def test_a_replay_that_fails_changes_nothing(session):
    session.register("net", Scaled())
    session.apply("net", x)
    before = looked_at(session)

    def broken(*args):
        raise RuntimeError("no device")

    session.programs.run, run = broken, session.programs.run
    with pytest.raises(RuntimeError, match="no device"):
        session.replay(1)
    session.programs.run = run
    assert looked_at(session) == before
    assert session.replay(1).replayed


PROGRAMS = Session().programs
"""Those of all examples together: most of them need no compiler."""
STEPS = ["train", "eval", "quiet loop", "samples", "edit", "seed", "init", "key", "numpy", "again", "assign"]


@pytest.mark.parametrize("kind", ["linen", "nnx"])
@given(steps=st.lists(st.sampled_from(STEPS), min_size=1, max_size=7), limit=st.sampled_from([0, 3000, 10**9]))
@settings(max_examples=min(12, settings().max_examples), suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_after_any_session_every_draw_replays_identically_or_says_what_is_gone(kind, steps, limit):
    session = Session(seed=0, replay_bytes=limit)
    session.services.programs = PROGRAMS
    modules = [Normed, Wider] if kind == "linen" else [lambda: Own(4, rngs=nnx.Rngs(0))] * 2
    session.register("b", modules[0]())
    a, held, edits = np.array(x), [], 0
    for i, step in enumerate(steps):
        if step in ("train", "eval"):
            held.append(session.apply("b", x + i, mode=step))
        elif step == "quiet loop":
            for _ in range(3):
                session.apply("b", x, mode="train")
        elif step == "samples" and session.models["b"].variables is not None:
            held.append(session.apply("b", x, mode="eval", samples=2))
        elif step == "edit":
            edits += 1
            session.register("b", modules[edits % 2]())
        elif step == "seed":
            session.restart(i % 2, fresh=i % 3 == 0)
        elif step == "init" and kind == "linen":
            held.append(session.init("b", x, train=False))
        elif step == "key":
            held.append(session.key("latent"))
        elif step == "numpy":
            held.append(session.apply("b", a, mode="train"))
            a += 1
        elif step == "again" and session.draws:
            held.append(session.apply("b", x, mode="eval", keys_of=session.draws))
        elif step == "assign" and session.models["b"].variables is not None:
            values = session.models["b"].variables
            session.models["b"].variables = jax.tree_util.tree_map(
                lambda leaf: leaf if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf + 1, values
            )
    before = looked_at(session)
    for run in session.runs:
        if run.replayed and run.command != "apply":
            continue
        try:
            agreement = session.replay(run).agreement
        except FlaxMagicsError as error:
            assert limit < 10**9, str(error)
            assert "were let go of: by %flax_free" in str(error)
            continue
        assert agreement.identical is not False
    assert looked_at(session) == before
