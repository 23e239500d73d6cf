"""An initialisation that leaves the forward pass out has the bits of `module.init`, or is `module.init`."""

from __future__ import annotations

import time
from typing import Any
from unittest.mock import Mock

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from by_hand import bits, keys_of
from sessions import session_of

from flax_magics import Session
from flax_magics.compile import initialise
from flax_magics.compile.initialise import trace_init
from flax_magics.execution.call import Call, initialising, prepare_init
from flax_magics.models.construction import adopt
from flax_magics.rng.keys import RootKey


class Everything(nn.Module):
    """Initialisers of many kinds, dtypes, a value of Python's and one of NumPy's among the variables."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        init = nn.initializers
        scaling = init.variance_scaling(2.0, "fan_avg", "truncated_normal")
        for kind in (init.lecun_normal(), init.xavier_uniform(), init.orthogonal(), init.normal(0.02), scaling):
            x = nn.relu(nn.Dense(8, kernel_init=kind)(x))
        x = nn.Dense(8, param_dtype=jnp.bfloat16)(x)
        self.param("mixed", lambda key: jnp.linspace(0.1, 0.7, 5) * jax.random.normal(key, (5,)) + 1 / 3)
        self.param("remainder", lambda key: jnp.remainder(jax.random.normal(key, (7,)), 0.3) * 3 + jnp.hypot(2.0, 3.1))
        self.variable("state", "count", lambda: 0)
        self.variable("state", "table", lambda: np.arange(3.0))
        return nn.BatchNorm(use_running_average=True)(x)


class Statistic(nn.Module):
    """Variables that depend on the forward pass, one of them by a function that JAX runs op by op in its turn."""

    activation: Any = None

    @nn.compact
    def __call__(self, x: Any) -> Any:
        x = nn.Dense(64)(x)
        x = x if self.activation is None else self.activation(x)
        self.variable("state", "statistic", lambda: (x.mean() + jnp.var(x) * 0.3, jnp.sqrt(x * x + 1) / 3))
        return x


class Cell(nn.Module):
    @nn.compact
    def __call__(self, carry: Any, x: Any) -> Any:
        return nn.tanh(nn.Dense(4)(carry) + x), x


class Lifted(nn.Module):
    """Layers inside scan, remat, jit and vmap."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        scanned = nn.scan(Cell, variable_broadcast="params", split_rngs={"params": False})
        x, _ = scanned()(x, jnp.ones((5, *x.shape)))
        x = nn.remat(nn.Dense)(4)(x)
        x = nn.jit(nn.Dense)(4)(x)
        return nn.vmap(nn.Dense, in_axes=0, variable_axes={"params": 0}, split_rngs={"params": True})(4)(x)


class LooksAtValues(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        return nn.Dense(3 if float(x.sum()) > 0 else 4)(x)


class Heard(nn.Module):
    heard: Any

    @nn.compact
    def __call__(self, x: Any) -> Any:
        jax.debug.callback(self.heard)
        return nn.Dense(3)(x)


def of_hand(module: Any, *args: Any) -> Any:
    return dict(module.init(keys_of(1)("params")["params"], *args))


def is_taken_apart(module: Any, *args: Any) -> bool:
    """Whether it is units that run, not `module.init`."""
    call = Call((), args, {}, "net(x)")
    model, init_call = prepare_init("net", adopt(module, "net"), call)
    units = Session(seed=0).programs.units
    return initialising(model, init_call, RootKey.from_seed(0).draw(), units).expected is not None


@pytest.mark.parametrize(
    ("module", "apart"),
    [
        *((Everything(), True), (Lifted(), True), (LooksAtValues(), False)),
        *((Statistic(), True), (Statistic(nn.relu), False), (Statistic(nn.gelu), True)),
    ],
)
def test_what_is_taken_apart_has_the_bits_of_init_by_hand(module, apart):
    x = jnp.linspace(0.0, 1.0, 12).reshape(3, 4)
    assert is_taken_apart(module, x) is apart
    assert bits(session_of(module).init("net", x)) == bits(of_hand(module, x))


def test_every_bit_and_type_is_that_of_init_by_hand():
    session = session_of(Everything())
    x = jnp.linspace(0.0, 1.0, 12).reshape(3, 4)
    run = session.apply("net", x)
    made, expected = session.models["net"].variables, of_hand(Everything(), x)
    assert bits(made) == bits(expected)
    types = [[type(leaf) for leaf in jax.tree_util.tree_leaves(tree)] for tree in (made, expected)]
    assert types[0] == types[1]
    weak = [[getattr(leaf, "weak_type", None) for leaf in jax.tree_util.tree_leaves(tree)] for tree in (made, expected)]
    assert weak[0] == weak[1]
    assert bits(run.output) == bits(jax.jit(Everything().apply)(expected, x))


def test_the_forward_pass_is_left_out():
    key = jax.random.key(0)

    class Model:
        def init(self, key: Any, method: Any, args: Any, kwargs: Any) -> Any:
            return nn.Dense(4).init(key, *args)

    traced = trace_init(Model(), key, (), (jnp.ones((2, 3)),), {})
    assert "dot_general" in {equation.primitive.name for equation in traced.closed.jaxpr.eqns}
    assert "dot_general" not in {equation.primitive.name for equation in traced.needed}


def test_callbacks_are_called_once_as_by_hand():
    heard: list[int] = []
    session_of(Heard(lambda: heard.append(1))).init("net", jnp.ones((2, 4)))
    jax.effects_barrier()
    assert heard == [1]


def test_a_value_by_the_arguments_is_computed_where_they_are():
    class Mean(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            return self.variable("state", "mean", lambda: x.mean()).value

    x = jax.device_put(jnp.arange(4.0), jax.devices()[0])
    assert bits(session_of(Mean()).init("net", x)) == bits(of_hand(Mean(), x))


def test_looking_for_nan_runs_all_of_it():
    class Broken(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            return nn.Dense(3)(x) / (x.sum() * 0)

    session = session_of(Broken())
    with jax.debug_nans(True), pytest.raises(FloatingPointError):
        session.init("net", jnp.zeros((2, 4)))
    assert session.draws == 0


def test_what_the_model_raises_names_the_users_line():
    class Failing(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            raise ValueError("this line")

    session = session_of(Failing())
    with pytest.raises(ValueError, match="this line") as caught:
        session.apply("net", jnp.ones(2))
    assert caught.traceback[-1].name == "__call__"
    assert (session.draws, session.models["net"].variables) == (0, None)


def test_an_interrupted_init_changes_nothing_and_is_done_again(monkeypatch):
    session = session_of(Everything())
    x = jnp.ones((3, 4))
    with monkeypatch.context() as patch:
        patch.setattr(initialise, "wait_for", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            session.apply("net", x)
    assert (session.draws, session.models["net"].variables, session.runs) == (0, None, [])
    session.apply("net", x)
    assert bits(session.models["net"].variables) == bits(of_hand(Everything(), x))


def test_the_phases_add_up_to_what_passed():
    session = session_of(Everything())
    begin = time.perf_counter()
    timing = session.apply("net", jnp.ones((3, 4))).timing
    passed = time.perf_counter() - begin
    waited = timing.trace + timing.lower + timing.init + timing.compile - timing.beside + timing.wait + timing.run
    assert 0 < waited <= passed
    assert 0 <= timing.beside <= timing.compile


class Scaled(nn.Module):
    start: Any

    @nn.compact
    def __call__(self, x: Any) -> Any:
        return x * self.param("scale", self.start)


def test_a_constant_of_no_dimensions_is_an_array_as_by_hand():
    net, x = Scaled(lambda key: nn.initializers.ones(key, ())), jnp.ones((3, 4))
    scale = session_of(net).init("net", x)["params"]["scale"]
    by_hand = net.init(jax.random.key(0), x)["params"]["scale"]
    assert type(scale) is type(by_hand)
    assert bits(scale) == bits(by_hand)
    assert scale.weak_type == by_hand.weak_type


def test_a_constant_that_is_weakly_typed_is_so_as_by_hand():
    net, x = Scaled(lambda key: jnp.asarray(1.5)), jnp.ones((3,), jnp.bfloat16)
    session = session_of(net)
    run = session.apply("net", x)
    by_hand = net.init(jax.random.key(0), x)
    assert is_taken_apart(net, x)
    assert by_hand["params"]["scale"].weak_type
    assert session.models["net"].variables["params"]["scale"].weak_type
    assert run.output.dtype == jax.jit(net.apply)(by_hand, x).dtype == jnp.bfloat16
    assert session.apply("net", x).program == "reused"
