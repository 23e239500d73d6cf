"""A training is repeated: all of its steps, or one of them with its gradients; and what cannot be."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from by_hand import Normed, bits, keys_of
from flax import nnx
from nnx_kinds import Own
from sessions import session_of

from flax_magics import FlaxMagicsError, Session
from flax_magics.history.replay import notice_of
from flax_magics.models.construction import Construction
from flax_magics.report.facts import key_facts

RANDOM = np.random.RandomState(0)
DATA = {"x": RANDOM.randn(22, 4).astype(np.float32), "y": RANDOM.randn(22, 4).astype(np.float32)}
SGD = optax.sgd(1.0)


def loss(net: Any, batch: Any, train: bool) -> Any:
    y = net(batch["x"], train=train)
    return ((y - batch["y"]) ** 2).mean(), {"mean": y.mean()}


def of_module(net: Any, batch: Any) -> Any:
    return ((net(batch["x"]) - batch["y"]) ** 2).mean()


class Once:
    """An iterator of batches."""

    def __iter__(self) -> Any:
        return self

    def __next__(self) -> Any:
        return DATA


def linen() -> tuple[Session, Any]:
    return session_of(Normed()), loss


def module() -> tuple[Session, Any]:
    return session_of(Own(4, rngs=nnx.Rngs(0))), of_module


@pytest.mark.parametrize("api", [linen, module])
def test_a_training_has_the_same_bits_again_and_changes_nothing(api):
    session, function = api()
    run = session.train(function, "net", DATA, optimizer=optax.adam(1e-2), batch=8, epochs=3)
    before = bits(session.models["net"].collections())
    again = session.replay(1)
    assert (again.replayed, again.steps, again.agreement.identical) == (True, 9, True)
    assert bits((again.losses, dict(again.metrics))) == bits((run.losses, dict(run.metrics)))
    assert bits(again.output) == bits(run.output)
    assert notice_of(again).texts[-1] == "identical: weights after 9 steps"
    assert bits(session.models["net"].collections()) == before
    # Its weights are others now, but the losses are kept.
    del run, again
    session.train(function, "net", DATA, batch=8, steps=4)
    again = session.replay(1)
    assert (again.agreement.identical, again.agreement.said) == (True, ())
    assert len(session) == 2


@pytest.mark.parametrize("api", [linen, module])
def test_one_step_has_the_loss_that_it_had_and_the_gradients_by_which_it_moved(api):
    weights = []
    for steps in (5, 6):
        session, function = api()
        run = session.train(function, "net", DATA, optimizer=SGD, batch=8, steps=steps)
        weights.append(session.models["net"].collections())
    step = session.replay(run, step=5)
    assert (step.command, step.draw, step.replayed, step.agreement.identical) == ("grad", 1, True, True)
    assert bits(np.float32(step.output.loss)) == bits(run.losses[5])
    assert notice_of(step).texts[-1] == "identical: its loss"
    kind = "params" if "params" in weights[0] else "Param"
    moved = jax.tree.leaves(jax.tree.map(jnp.subtract, weights[0][kind], weights[1][kind]))
    np.testing.assert_allclose(
        np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(step.output.grads)]),
        np.concatenate([np.ravel(leaf) for leaf in moved]),
        atol=1e-6,
    )
    first = session.replay(run, step=0)
    assert bits(np.float32(first.output.loss)) == bits(run.losses[0])


def test_a_resumed_training_is_repeated_from_its_beginning_and_an_iterable_is_told():
    session = session_of(Normed())
    batches = [jax.tree.map(lambda leaf, n=n: leaf[n : n + 11], DATA) for n in (0, 11)]
    session.train(loss, "net", batches, optimizer=SGD, steps=3)
    run = session.train(loss, "net", batches, resume=True, steps=5)
    again = session.replay(1)
    assert (again.steps, again.agreement.identical) == (5, True)
    assert again.agreement.said == ("its data are an iterable: whether it gives the same batches again cannot be told",)
    step = session.replay(1, step=4)
    assert bits(np.float32(step.output.loss)) == bits(run.losses[4])


def test_the_beginning_of_a_training_is_kept_of_a_module_that_no_fresh_start_builds_anew():
    session, function = module()
    session.restart(3, fresh=True)
    session.train(function, "net", DATA, optimizer=SGD, batch=8, steps=2)
    assert session.replay(1).agreement.identical is True


def test_a_module_that_a_training_builds_anew_is_built_anew_for_its_replay():
    session = Session(seed=0)
    session.register_all({"net": Construction(Own, (4,), {}, "Own(4)")})
    session.apply("net", DATA["x"])
    session.restart(3, fresh=True)
    run = session.train(of_module, "net", DATA, optimizer=SGD, batch=8, steps=2)
    after = bits(nnx.state(session.module("net")))
    assert session.replay(1).agreement.identical
    step = session.replay(1, step=1)
    assert bits(np.float32(step.output.loss)) == bits(run.losses[1])
    session.train(of_module, "net", DATA, optimizer=SGD, batch=8, steps=3, resume=True)
    again = session.replay(1)
    assert (again.steps, again.agreement.identical) == (3, True)
    session.restart(3, fresh=True)
    session.train(of_module, "net", DATA, optimizer=SGD, batch=8, steps=2)
    assert bits(nnx.state(session.module("net"))) == after


def test_one_that_went_on_with_another_loss_or_optimizer_is_not_repeated():
    def other(net: Any, batch: Any, train: bool) -> Any:
        value, metrics = loss(net, batch, train)
        return value * 2, metrics

    for options, repeats in ({}, True), ({"optimizer": optax.sgd(0.2)}, False), ({"loss": other}, False):
        session = session_of(Normed())
        session.train(loss, "net", DATA, optimizer=SGD, steps=3)
        run = session.train(options.pop("loss", loss), "net", DATA, resume=True, steps=5, **options)
        if repeats:
            assert session.replay(run).agreement.identical
        else:
            with pytest.raises(FlaxMagicsError, match="cannot be run again: after 3 steps it goes on with another"):
                session.replay(run)


def test_a_key_among_the_arguments_is_not_told_to_be_used_again():
    def with_key(net: Any, batch: Any, key: Any, train: bool) -> Any:
        noise = jax.random.normal(key, batch["x"].shape)
        return loss(net, {**batch, "x": batch["x"] + noise}, train)

    session = session_of(Normed())
    session.train(with_key, "net", DATA, jax.random.key(5), optimizer=SGD, steps=2)
    assert session.replay(1, step=1).notes == ()
    assert "went into" not in str(session.replay(1).notes)


def test_what_cannot_be_repeated_is_told():
    session = session_of(Normed())
    session.key("latent")
    run = session.train(loss, "net", Once(), optimizer=SGD, steps=3)
    message = "draw 2 of seed 0 cannot be run again: its data are an iterator, which is gone through only once."
    with pytest.raises(FlaxMagicsError, match=message):
        session.replay(run)
    assert [row.marks for row in session.history()] == [(), ("no replay",)]
    with pytest.raises(FlaxMagicsError, match="has the steps 0 to 2, and no step 3") as raised:
        session.replay(run, step=3)
    assert raised.value.write == "%flax_replay --step 2 0:2"
    with pytest.raises(FlaxMagicsError, match="--step is a step of a training, and draw 1 is none"):
        session.replay(1, step=0)


def test_a_training_that_went_on_otherwise_says_what_is_other():
    session = session_of(Normed())
    session.train(loss, "net", DATA, optimizer=SGD, steps=2)
    session.train(loss, "net", {**DATA, "x": DATA["x"] + 1}, resume=True, steps=3)
    with pytest.raises(FlaxMagicsError) as raised:
        session.replay(1)
    assert raised.value.message == (
        "draw 1 of seed 0 cannot be run again: after 2 steps it goes on with other data: `data['x']` has other values."
    )


def test_the_keys_of_a_training_are_handed_out_as_its_first_step_had_them():
    session = session_of(Normed())
    session.train(loss, "net", DATA, optimizer=SGD, steps=2)
    run = session.apply("net", DATA["x"], mode="train", keys_of=1)
    keys = keys_of(1)("dropout", "params")
    assert bits(run.keys["dropout"]) == bits(jax.random.fold_in(keys["dropout"], 0))
    assert [fact.made_by for fact in key_facts(run) if fact.stream == "dropout"] == ["fold_in(split(root, 3)[2], 0)"]
    # An init has the `params` key itself, with which the training initialised.
    session.init("net", DATA["x"], train=False, keys_of=1)
    assert bits(session.runs[-1].keys["params"]) == bits(keys["params"])
