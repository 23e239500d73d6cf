"""NNX modules in a session against the same thing done by hand: equal bits, and nothing changed by what fails."""

from __future__ import annotations

from operator import is_
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from by_hand import bits, keys_of
from flax import nnx
from nnx_kinds import an_input, runs_as_by_hand

from flax_magics import FlaxMagicsError
from flax_magics.models.construction import Construction
from flax_magics.models.nnx_layout import Layout
from flax_magics.state.handles import entry_now


class Net(nnx.Module):
    def __init__(self, features: int, out: int, rngs: nnx.Rngs):
        self.first = nnx.Linear(4, features, rngs=rngs)
        self.norm = nnx.BatchNorm(features, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.last = nnx.Linear(features, out, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        return self.last(self.dropout(nnx.relu(self.norm(self.first(x)))))

    def embed(self, x: Any, scale: Any = 1.0) -> Any:
        return self.first(x) * scale


@pytest.mark.parametrize("more", [{}, {"bare": jnp.ones(2)}, {"pair": nnx.Param((jnp.ones(2), jnp.zeros(3)))}])
def test_leaves_are_those_of_the_dicts_of_variables_in_their_order(more):
    rngs = nnx.Rngs(0)
    net = nnx.Sequential(*(nnx.Linear(2, 2, rngs=rngs) for _ in range(11)), nnx.BatchNorm(2, rngs=rngs))
    net.after, net.again, net.dropout = nnx.Param(jnp.ones(1)), nnx.Cache(jnp.ones(1)), nnx.Dropout(0.5, rngs=rngs)
    for name, value in more.items():
        setattr(net, name, value)
    layout = Layout.of(net)
    leaves = jax.tree_util.tree_leaves(layout.given())
    assert len(leaves) == 22 + 4 + 2 + len(jax.tree_util.tree_leaves(more))
    assert all(map(is_, layout.leaves(), leaves))


@pytest.mark.parametrize("streams", [{"default": 0}, {"params": 0, "dropout": 1}])
def test_training_has_output_and_state_of_the_code_by_hand(session, streams):
    run = runs_as_by_hand(session, lambda: Net(8, 3, nnx.Rngs(**streams)), an_input(), mode="train")
    tag = list(streams)[-1]
    assert (run.changed, run.used) == ({"BatchStat": 3}, {tag: ("dropout",)})
    assert bits(run.keys[tag]) == bits(keys_of(3)(tag)[tag])
    assert (run.mode, run.switch) == ("train", "deterministic=False, use_running_average=False")
    assert run.program == "reused"


def test_eval_leaves_statistics_and_the_objects_own_mode_alone(session):
    run = runs_as_by_hand(session, lambda: Net(8, 3, nnx.Rngs(0)), an_input(), mode="eval")
    net = session.models["net"].module
    assert (net.dropout.deterministic, net.norm.use_running_average) == (False, False)
    assert (run.changed, run.used) == ({}, {})


def test_other_methods_run_and_say_what_they_lack(session):
    x, net = an_input(), Net(8, 3, nnx.Rngs(0))
    session.register("net", net)
    run = session.apply("net", x, method="embed", scale=2.0)
    assert bits(run.output) == bits(nnx.jit(lambda net, x, s: net.embed(x, s))(net, x, 2.0))
    assert bits(session.apply("net", x, method="first").output) == bits(nnx.jit(lambda net, x: net.first(x))(net, x))
    with pytest.raises(FlaxMagicsError, match="Net has no method `embedd`; its methods: embed"):
        session.apply("net", x, method="embedd")


def test_the_users_rngs_stand_and_move_on_as_they_do_by_hand(session):
    x, mine, theirs = an_input(), nnx.Rngs(dropout=7), nnx.Rngs(dropout=7)
    session.register("net", nnx.Dropout(0.5))
    for _ in range(2):
        y = nnx.jit(lambda net, x, rngs: net(x, rngs=rngs))(nnx.Dropout(0.5), x, theirs)
        run = session.apply("net", x, rngs=mine)
        assert bits(run.output) == bits(y)
        assert bits(nnx.state(mine)) == bits(nnx.state(theirs))
        assert ("rngs", "rngs: yours, draw unused") in [(note.kind, note.text) for note in run.notes]
        assert run.used == {}
    state = bits(nnx.state(mine))
    session.apply("net", x, rngs=mine, keys_of=1)
    assert bits(nnx.state(mine)) == state


class Noisy(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.rngs = rngs

    def __call__(self, x: Any) -> Any:
        return x + self.rngs.noise.normal(x.shape)


def test_a_stream_of_any_name_is_the_draws_own_and_one_nobody_consumes_is_not_reported(session):
    run = runs_as_by_hand(session, lambda: Noisy(nnx.Rngs(noise=1, dropout=2)), an_input())
    assert run.used == {"noise": ("(the model)",)}
    assert [[note.kind for note in run.notes] for run in session.runs] == [["stream"], [], []]


def test_what_the_model_adds_to_itself_is_on_the_object_afterwards(session):
    class Adding(nnx.Module):
        def __init__(self, rngs):
            self.linear = nnx.Linear(4, 4, rngs=rngs)
            self.calls = 0

        def __call__(self, x):
            self.calls += 1
            if not hasattr(self, "mean"):
                self.mean = nnx.BatchStat(x.mean())
                self.alias = self.linear
            return self.linear(x)

    x, net, other = an_input(), Adding(nnx.Rngs(0)), Adding(nnx.Rngs(0))
    linear, kernel = net.linear, net.linear.kernel
    session.register("net", net)
    for _ in range(2):
        run = session.apply("net", x)
        assert bits(run.output) == bits(nnx.jit(lambda net, x: net(x))(other, x))
        assert bits(nnx.state(net)) == bits(nnx.state(other))
    assert net.calls == 2
    assert net.linear is linear
    assert net.alias is linear
    assert net.linear.kernel is kernel


def test_a_model_and_its_optimizer_in_one_module_train_in_a_method(session):
    class Training(nnx.Module):
        def __init__(self, rngs):
            self.net = nnx.Linear(4, 1, rngs=rngs)
            self.optimizer = nnx.Optimizer(self.net, optax.sgd(0.1), wrt=nnx.Param)

        def step(self, x, y):
            loss, grads = nnx.value_and_grad(lambda net: ((net(x) - y) ** 2).mean())(self.net)
            self.optimizer.update(self.net, grads)
            return loss

    run = runs_as_by_hand(session, lambda: Training(nnx.Rngs(0)), an_input(), jnp.ones((5, 1)), method="step")
    assert run.changed["Param"] == 3


def test_variables_are_the_state_and_can_be_assigned(session):
    x, net, other = an_input(), Net(8, 3, nnx.Rngs(0)), Net(8, 3, nnx.Rngs(1))
    session.register("net", net)
    model = session.models["net"]
    assert bits(model.variables) == bits(nnx.state(net))
    kept = bits(nnx.state(net))
    run = session.apply("net", x, mode="eval", variables=nnx.state(other))
    other.eval()
    assert bits(run.output) == bits(nnx.jit(lambda net, x: net(x))(other, x))
    assert bits(nnx.state(net)) == kept
    model.variables = nnx.state(other)
    assert bits(nnx.state(net)) == bits(nnx.state(other))
    with pytest.raises(FlaxMagicsError, match="`net` has no variable `nowhere`"):
        model.variables = nnx.State({"nowhere": nnx.Param(jnp.ones(1))})


def recipe(*args: Any, cls: Any = Net) -> Construction:
    return Construction(cls, args, {}, f"{cls.__name__}({', '.join(map(str, args))})")


def test_a_construction_by_the_session_is_a_draw_that_the_next_apply_shares(session):
    x = an_input()
    session.register_all({"net": recipe(8, 3)})
    net, keys = session.models["net"].module, keys_of(1)("params", "dropout")
    other = Net(8, 3, rngs=nnx.Rngs(**keys))
    assert bits(nnx.state(net)) == bits(nnx.state(other))
    assert [(run.command, run.model, run.draw) for run in session.runs] == [("init", "net", 1)]
    run = session.apply("net", x, mode="train")
    other.train()
    nnx.reseed(other, policy="match_shape", dropout=keys["dropout"])
    assert bits(run.output) == bits(nnx.jit(lambda net, x: net(x))(other, x))
    assert run.draw == 1
    assert session.apply("net", x).draw == 2


def test_init_builds_anew_into_the_same_object(session):
    session.register_all({"net": recipe(8, 3)})
    net = session.models["net"].module
    kernel = net.first.kernel
    state = session.init("net", an_input())
    other = Net(8, 3, rngs=nnx.Rngs(**keys_of(2)("params", "dropout")))
    assert bits(nnx.state(net)) == bits(nnx.state(other)) == bits(state)
    assert net.first.kernel is kernel
    assert session.models["net"].module is net


def test_init_of_a_module_of_the_users_own_says_what_to_do(session):
    session.register("net", Net(8, 3, nnx.Rngs(0)))
    with pytest.raises(FlaxMagicsError, match="`net` was built by your own code") as error:
        session.init("net", an_input())
    assert "%flaxmodel net = Net(" in str(error.value)


def test_a_fresh_restart_builds_anew_at_the_next_use(session):
    x = an_input()
    session.register_all({"net": recipe(8, 3)})
    net = session.models["net"].module
    first = session.apply("net", x, mode="train")
    state = bits(nnx.state(net))
    session.apply("net", x, mode="train")
    restart = session.restart(0, fresh=True)
    assert restart.keeping == ()
    again = session.apply("net", x, mode="train")
    assert bits(again.output) == bits(first.output)
    assert bits(nnx.state(net)) == state
    assert again.draw == 1
    assert session.models["net"].module is net


def test_an_unchanged_recipe_keeps_model_and_programs_and_an_edit_keeps_what_fits(session):
    x = an_input()
    session.register_all({"net": recipe(8, 3)})
    session.apply("net", x, mode="train")
    net, root = session.models["net"].module, bits(session.root_key)
    state = bits(nnx.state(net))
    (change,) = session.register_all({"net": recipe(8, 3)})
    assert (change.state, change.variables) == ("unchanged", "kept")
    assert session.models["net"].module is net
    assert session.apply("net", x, mode="train", keys_of=1).program == "reused"
    assert bits(session.root_key) == root

    class Edited(Net):
        def __call__(self, x):
            return super().__call__(x) * 2

    (change,) = session.register_all({"net": recipe(8, 3, cls=Edited)})
    assert (change.state, change.variables) == ("changed", "kept")
    new = session.models["net"].module
    assert type(new) is Edited
    params = nnx.filter_state(nnx.state(new), nnx.Any(nnx.Param, nnx.BatchStat))
    old = nnx.filter_state(nnx.state(net), nnx.Any(nnx.Param, nnx.BatchStat))
    assert bits(params) == bits(old)
    assert bits(nnx.state(net)) == state
    (change,) = session.register_all({"net": recipe(8, 2, cls=Edited)})
    assert change.variables == "own"
    assert change.changes == ("last/bias [3]→[2]", "last/kernel [8,3]→[8,2]")
    assert session.runs[-1].command == "init"


def test_a_linen_model_in_its_place_does_not_go_on_with_the_draw_that_built_it(session):
    session.register_all({"net": recipe(8, 3)})
    assert session._state.opened is not None
    session.register("net", nn.Dense(3))
    assert session._state.opened is None


def test_another_module_under_its_name_is_said_to_hold_something_if_it_does(session):
    session.register("net", Net(8, 3, nnx.Rngs(0)))
    models = session._state.models
    (linen,) = entry_now(models, "net", nn.Dense(3))[1]
    (nnx_note,) = entry_now(models, "net", nnx.Linear(4, 4, rngs=nnx.Rngs(0)))[1]
    assert linen.text.endswith("net is another module now, Dense(features=3): registered")
    assert nnx_note.text.endswith(": registered with what it holds")


def test_a_replay_changes_nothing_on_the_object(session):
    x, net = an_input(), Noisy(nnx.Rngs(0))
    session.register("net", net)
    first = session.apply("net", x)
    state = bits(nnx.state(net))
    again = session.apply("net", x, keys_of=1)
    assert bits(again.output) == bits(first.output)
    assert bits(nnx.state(net)) == state


def test_a_numpy_variable_is_not_changed_in_place_by_an_eager_run(session):
    class Counting(nnx.Module):
        def __init__(self):
            self.count = nnx.Variable(np.zeros(2))

        def __call__(self, x):
            count = self.count[...]
            count += 1
            raise RuntimeError("no")

    net = Counting()
    session.register("net", net)
    with pytest.raises(RuntimeError, match="no"):
        session.apply("net", an_input(), eager=True)
    assert np.asarray(net.count[...]).tolist() == [0, 0]
