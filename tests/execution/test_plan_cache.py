"""A run like the one before takes the short way, and what it reports is what the long way would."""

from __future__ import annotations

import os
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from by_hand import SUPPORT, MyModel, Normed, apply_by_hand, bits, keys_of, notebook_x
from flax import nnx
from nnx_kinds import Own, runs_as_by_hand
from processes import printed_by
from sessions import session_of

from flax_magics import FlaxMagicsError, _session
from flax_magics.base.threads import Running


@pytest.fixture
def ways(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For every run of a line that ran before: whether it took the short way."""
    taken: list[bool] = []
    again = _session.apply_again

    def watched(*args: Any, **kwargs: Any) -> Any:
        outcome = again(*args, **kwargs)
        taken.append(outcome is not None)
        return outcome

    monkeypatch.setattr(_session, "apply_again", watched)
    return taken


FIELDS = [
    "model",
    "mode",
    "switch",
    "call",
    "seed",
    "program",
    "reason",
    "static",
    "by_hand",
    "replayed",
    "notes",
    "used",
]


def test_the_short_way_gives_what_the_long_way_gives(ways):
    x = notebook_x()
    session = session_of(MyModel(3, False))
    runs = [session.apply("net", x, mode="train") for _ in range(4)]
    assert ways == [True] * 3  # the first has none before it
    assert [run.draw for run in runs] == [1, 2, 3, 4]
    variables = session.models["net"].variables
    for run in runs[1:]:
        assert bits(run.output) == bits(apply_by_hand(MyModel(3, True), variables, keys_of(run.draw)("dropout"), x))
        assert {name: getattr(run, name) for name in FIELDS} == {name: getattr(runs[1], name) for name in FIELDS}
        assert bits(dict(run.keys)) == bits(keys_of(run.draw)("params", "dropout"))
    assert runs[-1].timing.building == 0


def test_state_moves_on(ways):
    x = jax.random.normal(jax.random.key(1), (8, 3))
    session = session_of(Normed())
    variables = None
    for update in range(1, 5):
        run = session.apply("net", x + update, mode="train")
        if variables is None:
            variables = Normed().init(keys_of(1)("params")["params"], x + update, train=False)
        output, updates = apply_by_hand(
            Normed(), variables, keys_of(update)("dropout"), x + update, train=True, mutable=["batch_stats"]
        )
        variables = {**variables, **updates}
        assert bits(run.output) == bits(output)
        assert run.changed == {"batch_stats": update}
    assert bits(dict(session.models["net"].variables)) == bits(variables)
    assert ways[-1]
    evaluated = session.apply("net", x, mode="eval")
    assert bits(evaluated.output) == bits(apply_by_hand(Normed(), variables, {}, x, train=False))
    assert evaluated.changed == {}
    assert bits(dict(session.models["net"].variables)) == bits(variables)


def test_a_draw_in_between_is_no_root_used_twice(ways):
    x = notebook_x()
    session = session_of(MyModel(3, True))
    for _ in range(3):
        session.apply("net", x)
    key = session.key("latent")
    assert bits(key) == bits(keys_of(4)("latent")["latent"])
    run = session.apply("net", x)
    assert ways == [True] * 3
    by_hand = apply_by_hand(MyModel(3, True), session.models["net"].variables, keys_of(5)("dropout"), x)
    assert bits(run.output) == bits(by_hand)


CHANGES = {
    "another shape": lambda session: jnp.ones((5, 4, 4)),
    "another dtype": lambda session: jnp.ones((3, 4, 4), jnp.bfloat16),
    "another module": lambda session: session.register("net", MyModel(3, False)) and notebook_x(),
    "to be initialised anew": lambda session: session.restart(0, fresh=True) and notebook_x(),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_differs_takes_the_long_way(ways, change):
    session = session_of(MyModel(3, True))
    for _ in range(3):
        session.apply("net", notebook_x())
    del ways[:]
    session.apply("net", change(session))
    assert not any(ways)


def test_an_input_in_place_of_another_is_looked_at(ways):
    session = session_of(MyModel(3, False))
    x = np.zeros((3, 4, 4), np.float32)
    for scale in range(5):
        x = x if scale == 4 else np.zeros_like(x)
        x[:] = scale  # the last time where it is
        run = session.apply("net", x)
        by_hand = apply_by_hand(MyModel(3, False), session.models["net"].variables, {}, x, afresh=True)
        assert bits(run.output) == bits(by_hand)
    assert ways == [True] * 4


def test_an_array_by_itself_is_not_the_same_array_in_a_list(ways):
    class Takes(nn.Module):
        @nn.compact
        def __call__(self, given: Any) -> Any:
            return nn.Dense(3)(given[0] if isinstance(given, list) else given)

    net, x = Takes(), jnp.ones((2, 2, 4))
    session = session_of(net)
    for given in (x, x, x, [x], [x], x, x):
        run = session.apply("net", given)
        by_hand = apply_by_hand(net, session.models["net"].variables, {}, given)
        assert bits(run.output) == bits(by_hand)
    # The list, and the array after it, are found to be others.
    assert ways == [True, True, False, True, False, True]


def test_a_run_that_fails_on_the_device_changes_nothing(ways):
    session = session_of(nn.Dense(3))
    x = jnp.ones((2, 4))
    for _ in range(3):
        session.apply("net", x)
    state = session._state
    x.delete()
    with pytest.raises(FlaxMagicsError, match="the values of argument 1 of net"):
        session.apply("net", x)
    assert session._state is state


def test_an_nnx_module_moves_on_as_by_hand(ways, session):
    runs_as_by_hand(session, lambda: Own(4, rngs=nnx.Rngs(0)), jax.random.normal(jax.random.key(1), (6, 4)))
    assert ways[-1]


def test_a_variable_that_the_user_writes_is_looked_at(ways):
    net = Own(4, rngs=nnx.Rngs(0))
    net.eval()
    session = session_of(net)
    x = jax.random.normal(jax.random.key(1), (6, 4))
    for scale in (1.0, 2.0, 3.0):
        net.linear.kernel[...] = jnp.full((4, 4), scale, jnp.float32)
        run = session.apply("net", x)
        assert bits(run.output) == bits(nnx.jit(lambda net: net(x))(nnx.clone(net)))
    assert ways[-1]


def test_a_fresh_start_builds_no_module_that_the_user_built(ways):
    net = Own(4, rngs=nnx.Rngs(0))
    session = session_of(net)
    x = jax.random.normal(jax.random.key(1), (6, 4))
    session.apply("net", x)
    session.restart(3, fresh=True)
    runs = [session.apply("net", x) for _ in range(2)]
    assert ways == [True, True]
    assert [(run.seed, run.draw, run.changed) for run in runs] == [(3, 1, {"BatchStat": 1}), (3, 2, {"BatchStat": 2})]


# -- op by op: of the same plan as a compiled run

X = jnp.ones((2, 4))


class Sows(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        x = nn.Dense(3)(x)
        self.sow("losses", "sum", x.sum())
        return x


class Layers(nn.Module):
    @nn.compact
    def __call__(self, x: Any, depth: int) -> Any:
        for _ in range(depth):
            x = nn.Dense(3)(x)
        return x


@pytest.mark.parametrize("eager", [False, True])
def test_what_is_sown_starts_empty_where_the_variables_have_some(eager):
    variables = Sows().init(jax.random.key(0), X)
    assert set(variables) == {"params", "losses"}
    run = session_of(Sows()).apply("net", X, variables=variables, eager=eager)
    _, sown = Sows().apply({"params": variables["params"]}, X, mutable=["losses"])
    assert bits(run.sown["losses"]["sum"][0]) == bits(sown["losses"]["sum"][0])
    assert len(run.sown["losses"]["sum"]) == 1


@pytest.mark.parametrize("eager", [False, True])
def test_an_int_whose_value_is_needed_is_static_and_nothing_else_is_asked_for(eager):
    run = session_of(Layers()).apply("net", X, 2, eager=eager)
    assert run.static == ("depth=2",)
    assert run.by_hand == "net.apply(variables, …, …)"


class HandsThrough(nn.Module):
    @nn.compact
    def __call__(self, x, turns):
        w = nn.Dense(4)(x)
        return x, jnp.zeros(3), jax.lax.fori_loop(0, turns, lambda i, w: jnp.sin(w @ w.T @ w), w)


def test_the_time_of_a_run_does_not_end_before_all_of_it_is_there(ways, monkeypatch):
    look, ready = Running.look, []

    def watched(self: Running) -> bool:
        is_ready = look(self)
        if is_ready:
            ready.append(all(leaf.is_ready() for leaf in jax.tree_util.tree_leaves(self.result)))
        return is_ready

    monkeypatch.setattr(Running, "look", watched)
    session = session_of(HandsThrough())
    for turns in (10, 10, 1000, 20_000, 20_000):
        session.apply("net", jnp.ones((16, 4)), jnp.asarray(turns))
    assert ways == [True] * 4
    assert set(ready) == {True}


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="a process cannot be kept to one processor here")
def test_with_one_processor_the_program_has_its_turns_while_it_is_polled():
    script = f"""
        import os, sys
        os.sched_setaffinity(0, {{min(os.sched_getaffinity(0))}})
        sys.path.insert(0, {SUPPORT!r})
        import jax
        from by_hand import MyModel, bits, keys_of, notebook_x
        from flax_magics import Session
        from flax_magics.base import threads

        session = Session()
        session.register("net", MyModel(3, True))
        runs = [session.apply("net", notebook_x()) for _ in range(5)]
        apply, variables = jax.jit(MyModel(3, True).apply), session.models["net"].variables
        for run in runs:
            assert bits(run.output) == bits(apply(variables, notebook_x(), rngs=keys_of(run.draw)("dropout")))
            assert run.timing.run > 0
        print(threads._give_way is not None, *(run.draw for run in runs), *(run.program for run in runs[1:]))
    """
    assert printed_by(script) == "True 1 2 3 4 5 reused reused reused reused\n"
