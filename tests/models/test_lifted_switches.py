"""Switches in calls of linen's lifted transforms, which take them by their place: the bits of `net.apply(v, x, True)`."""

from __future__ import annotations

import functools

import jax
import pytest
from by_hand import Normed, bits
from flax import linen as nn

from flax_magics import Session
from flax_magics.models.switch import written_by_place

X = jax.random.uniform(jax.random.key(42), (3, 4))
MASK = jax.random.uniform(jax.random.key(43), (3, 4))


class Masked(nn.Module):
    @nn.compact
    def __call__(self, x, mask=None, train=False):
        x = x if mask is None else x * mask
        return nn.Dropout(0.5, deterministic=not train)(nn.Dense(4)(x))


class Decorated(nn.Module):
    @functools.partial(nn.remat, static_argnums=(2,))
    @nn.compact
    def encode(self, x, train):
        return nn.Dropout(0.5, deterministic=not train)(nn.Dense(4)(x))


class Step(nn.Module):
    @nn.compact
    def __call__(self, carry, x, train=False):
        return nn.Dropout(0.5, deterministic=not train)(nn.Dense(4)(carry + x)), x


def ensemble(cls, n):
    """Three of `cls`, whose calls have `n` arguments."""
    variables, rngs = {"params": 0, "batch_stats": 0}, {"params": True, "dropout": True}
    return nn.vmap(cls, in_axes=(None,) * n, axis_size=3, variable_axes=variables, split_rngs=rngs)()


scan = nn.scan(
    Step, in_axes=(0, nn.broadcast), variable_broadcast="params", split_rngs={"params": False, "dropout": True}
)
STATIC = {"static_argnums": (2,)}
CASES = {
    "remat": (nn.remat(Normed, **STATIC)(), (X,), {}, (), "…, True"),
    "jit": (nn.jit(Normed, **STATIC)(), (X,), {}, (), "…, True"),
    "both": (nn.jit(nn.remat(Normed, **STATIC), **STATIC)(), (X,), {}, (), "…, True"),
    "vmap": (ensemble(Normed, 2), (X,), {}, (), "…, True"),
    "scan": (scan(), (X[0], X), {}, (), "…, …, True"),
    "an argument before it that is not given": (nn.remat(Masked, static_argnums=3)(), (X,), {}, (None,), "…, None, True"),
    "the same, mapped": (ensemble(Masked, 3), (X,), {}, (None,), "…, None, True"),
    "an argument before it that is given by name": (
        nn.remat(Masked, static_argnums=(3,))(), (X,), {"mask": MASK}, (MASK,), "…, …, True",
    ),
    "a method": (Decorated(), (X,), {"method": "encode"}, (), "…, True"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_switch_is_given_by_its_place(case):
    net, args, named, between, text = CASES[case]
    method = named.get("method")
    session = Session()
    session.register("net", net)
    run = session.apply("net", *args, mode="train", **named)
    variables = net.init(run.keys["params"], *args, *between, False, method=method)
    hand = jax.jit(
        lambda variables, key: net.apply(
            variables, *args, *between, True, rngs={"dropout": key}, mutable=["batch_stats"], method=method
        )
    )
    output, updates = hand(variables, run.keys["dropout"])
    assert bits(run.output) == bits(output)
    assert bits(session.models["net"].variables) == bits({**variables, **updates})
    mutable = ", mutable=['batch_stats']" * bool(updates)
    suffix = f"{mutable}, method='encode'" if method else mutable
    assert run.by_hand == f"net.apply(variables, {text}, rngs={{'dropout': dropout_key}}{suffix})"
    assert (run.mode, run.switch) == ("train", "train=True")
    assert session.replay(run).agreement.identical
    again = session.apply("net", *args, mode="train", **named)
    assert again.program == "reused"
    evaluated = session.apply("net", *args, mode="eval", **named)
    assert ", False" in evaluated.by_hand
    assert evaluated.used == {}
    assert session.summary("net", *args, mode="train", **named).mode == "train"


def test_a_static_name_stays_a_name():
    session = Session()
    session.register("net", nn.jit(Normed, static_argnames="train")())
    assert "…, train=True, rngs=" in session.apply("net", X, mode="train").by_hand
    assert session.init("net", X).keys() == {"params", "batch_stats"}


def test_op_by_op_and_an_init_by_itself():
    session = Session()
    session.register("net", nn.remat(Normed, **STATIC)())
    session.init("net", X)
    assert session.runs[0].by_hand == "net.init(params_key, …, False)"
    eager = session.apply("net", X, mode="train", eager=True)
    assert eager.used == {"dropout": ("Dropout_0",)}


@pytest.mark.parametrize(
    ("cls", "arguments", "expected"),
    [
        (nn.remat(Masked), ["x", "mask=m", "train=True", "**more"], ["x", "mask=m", "train=True", "**more"]),
        (nn.remat(Masked), ["x", "key=k", "train=True"], ["x", "None", "True", "key=k"]),
        (nn.remat(Masked), ["a == b", "train=f(x=1)"], ["a == b", "None", "f(x=1)"]),
        (nn.remat(Masked), ["mask=m", "train=True"], ["mask=m", "train=True"]),
        (nn.vmap(Masked, in_axes=(0,)), ["x"], ["x"]),
        (nn.vmap(Masked, in_axes=(0, 0, None)), ["x"], ["x", "None", "False"]),
        (Masked, ["x", "train=True"], ["x", "train=True"]),
    ],
)
def test_arguments_as_text(cls, arguments, expected):
    assert written_by_place(cls, (), arguments) == expected
