"""Methods and arguments of the user's that are called as Flax's own are, and real methods of Flax's layers."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from by_hand import bits
from flax import linen as nn
from flax import nnx
from sessions import session_of

from flax_magics.execution.call import Call
from flax_magics.line.options import ApplyOptions


class Overriding(nn.Module):
    features: int = 2

    def setup(self):
        self.layer = nn.Dense(self.features)

    def __call__(self, x, method="mean", mutable=1.0):
        return getattr(jnp, method)(self.layer(x)) * mutable

    def tabulate(self, x):
        return self.layer(x) + 1

    def collected(self, x, **rngs):
        return self.layer(x) + rngs["rngs"]


class Base(nn.Module):
    def make_rng(self, x):
        return x + 1


class Inheriting(Base):
    def __call__(self, x):
        return x


class Named(nnx.Module):
    def __init__(self, *, rngs):
        self.linear = nnx.Linear(3, 2, rngs=rngs)

    def __call__(self, x, mutable):
        return self.linear(x) * mutable

    def train(self, x):
        return self.linear(x) + 1


X = jnp.ones((2, 3))


@pytest.fixture
def session():
    session = session_of(Overriding())
    session.init("net", X)
    return session


def by_hand(session, function):
    return jax.jit(lambda variables, x: Overriding().apply(variables, x, method=function))(
        session.models["net"].variables, X
    )


def test_a_method_that_overrides_flaxs_is_the_users(session):
    run = session.apply("net", X, method="tabulate")
    assert bits(run.output) == bits(by_hand(session, lambda net, x: net.tabulate(x)))


def test_a_method_of_the_users_base_class_is_the_users():
    session = session_of(Inheriting())
    assert bits(session.apply("net", X, method="make_rng").output) == bits(X + 1)


@pytest.mark.parametrize("eager", [False, True])
def test_an_argument_that_the_method_has_is_the_users(session, eager):
    call = Call((), (X,), {"method": "sum", "mutable": 2.0}, "net(x, method='sum', mutable=2.0)")
    run = session.run_apply("net", call, ApplyOptions(eager=eager))
    assert bits(run.output) == bits(by_hand(session, lambda net, x: net(x, method="sum", mutable=2.0)))
    assert run.by_hand == "net.apply(variables, method=lambda m: m(x, method='sum', mutable=2.0))"


def test_a_method_that_takes_any_keyword_gets_it(session):
    call = Call(("collected",), (X,), {"rngs": 3.0}, "net.collected(x, rngs=3.0)")
    run = session.run_apply("net", call, ApplyOptions())
    assert bits(run.output) == bits(by_hand(session, lambda net, x: net.collected(x, rngs=3.0)))
    assert run.by_hand == "net.apply(variables, method=lambda m: m.collected(x, rngs=3.0))"


def test_a_layers_real_method_is_a_method():
    session = session_of(nn.Embed(5, 3))
    session.init("net", jnp.arange(4))
    run = session.apply("net", X, method="attend")
    variables = session.models["net"].variables
    assert bits(run.output) == bits(jax.jit(lambda v, x: nn.Embed(5, 3).apply(v, x, method="attend"))(variables, X))
    session = session_of(nnx.Embed(5, 3, rngs=nnx.Rngs(0)))
    assert session.apply("net", X, method="attend").output.shape == (2, 5)


def test_names_of_flaxs_on_an_nnx_module_that_are_the_users():
    session = session_of(Named(rngs=nnx.Rngs(0)))
    assert bits(session.apply("net", X, method="train").output) == bits(session.module("net").linear(X) + 1)
    assert bits(session.apply("net", X, 2.0).output) == bits(session.module("net").linear(X) * 2)


class Takes(nn.Module):
    @nn.compact
    def __call__(self, other, x):
        return nn.Dense(2)(x) @ other["params"]["Dense_0"]["kernel"].T


def test_a_model_that_takes_variables_gets_them(session):
    session.register("takes", Takes())
    other = {"params": {"Dense_0": nn.Dense(2).init(jax.random.key(3), X)["params"]}}
    run = session.apply("takes", other, X)
    variables = session.models["takes"].variables
    assert bits(run.output) == bits(jax.jit(Takes().apply)(variables, other, X))
