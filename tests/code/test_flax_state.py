"""Flax's and JAX's own state counts at once, and taking it back too: every run gives what a fresh run by hand gives."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from by_hand import apply_by_hand, bits, keys_of
from flax import nnx
from sessions import session_of, settle

from flax_magics import Session
from flax_magics.compile.disk_cache import settings, settings_in_words

X = jax.random.normal(jax.random.key(42), (2, 4))


class Net(nn.Module):
    """Dropout that is always on, a parameter with names, and code that asks for the rules that are in force."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        kernel_init = nn.with_logical_partitioning(nn.initializers.lecun_normal(), ("in", "out"))
        x = nn.Dense(3, kernel_init=kernel_init)(x)
        for _, axis in nn.get_logical_axis_rules():
            x = x * len(axis)
        return nn.Dropout(0.5, deterministic=False)(x)


def runs_as_by_hand(session: Session, *contexts: Any) -> list[Any]:
    """Two runs of `net`, the second a warm one, each held against one by hand."""
    net, out = session.module("net"), []
    for _ in range(2):
        with contextlib.ExitStack() as stack:
            for context in contexts:
                stack.enter_context(context())
            run = session.apply("net", X)
            variables = session.models["net"].variables
            by_hand = apply_by_hand(net, variables, keys_of(run.draw)("dropout"), X, afresh=True)
        assert bits(run.output) == bits(by_hand)
        out.append(run)
    return out


@pytest.fixture
def session() -> Session:
    """One in which `net` is initialised."""
    session = session_of(Net())
    session.init("net", X)
    return session


# -- interceptors


def times(factor: float) -> Callable[..., Any]:
    """An interceptor that closes over a number."""

    def scaled(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        y = call(*args, **kwargs)
        return y * factor if context.method_name == "__call__" else y

    return scaled


def halved(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
    """An interceptor without anything."""
    return jax.tree_util.tree_map(lambda y: y / 2, call(*args, **kwargs))


@dataclass
class Scaling:
    """An interceptor that is an object with a method."""

    factor: float

    def intercept(self, call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        """Scales by what it holds now."""
        y = call(*args, **kwargs)
        return y * self.factor if isinstance(context.module, nn.Dense) else y


class Counting:
    """An interceptor that is called itself, and of which nobody can tell what it will do."""

    def __init__(self) -> None:
        self.factor = 3.0

    def __call__(self, call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        return call(*args, **kwargs) * self.factor


def by(factor: float, call: Any, args: Any, kwargs: Any, context: Any) -> Any:
    """An interceptor for `functools.partial`."""
    return call(*args, **kwargs) + factor


INTERCEPTORS: dict[str, Callable[[], Any]] = {
    "a function": lambda: halved,
    "a closure": lambda: times(2.0),
    "a partial": lambda: functools.partial(by, 1.0),
    "a method": lambda: Scaling(2.0).intercept,
    "an object that nothing can be told of": Counting,
}


@pytest.mark.parametrize("kind", sorted(INTERCEPTORS))
def test_an_interceptor_counts_in_its_block_and_not_outside(session, kind):
    within = functools.partial(nn.intercept_methods, INTERCEPTORS[kind]())
    before = runs_as_by_hand(session)
    inside = runs_as_by_hand(session, within)
    after = runs_as_by_hand(session)
    assert (inside[0].program, inside[1].program, after[0].program) == ("compiled", "reused", "reused")
    assert [run.timing.trace > 0 for run in (before[1], inside[1], after[1])] == [False, "told" in kind, False]


def test_a_model_that_first_ran_inside_the_block_is_not_intercepted_outside(session):
    runs_as_by_hand(session, functools.partial(nn.intercept_methods, times(2.0)))
    runs_as_by_hand(session)


@pytest.mark.parametrize("change", ["what it closes over", "what it holds", "its order", "another of its name"])
def test_an_interceptor_that_changed_is_another(session, change):
    held = Scaling(2.0)
    stack = [times(2.0), halved, held.intercept]

    def within() -> Any:
        inside = contextlib.ExitStack()
        for interceptor in stack:
            inside.enter_context(nn.intercept_methods(interceptor))
        return inside

    (first, _) = runs_as_by_hand(session, within)
    if change == "what it closes over":
        stack[0].__closure__[0].cell_contents = 5.0
    elif change == "what it holds":
        held.factor = 5.0
    elif change == "its order":
        stack[0] = lambda call, args, kwargs, context: jnp.tanh(call(*args, **kwargs))
        stack.reverse()
    else:
        stack[0] = times(7.0)
    (second, _) = runs_as_by_hand(session, within)
    assert (first.program, second.program) == ("compiled", "compiled")
    if change != "its order":
        assert second.reason.startswith("interceptors: scaled, halved, intercept, which changed")


def test_an_init_inside_the_block_is_that_of_a_run_by_hand():
    net = Net()
    session = session_of(net)
    contexts = contextlib.nullcontext, functools.partial(nn.intercept_methods, halved), contextlib.nullcontext
    for draw, context in enumerate(contexts, 1):
        with context():
            variables = session.init("net", X)
            assert bits(variables) == bits(net.init(keys_of(draw)("params")["params"], X))
            run = session.apply("net", X)
            by_hand = apply_by_hand(net, variables, keys_of(draw)("dropout"), X, afresh=True)
            assert bits(run.output) == bits(by_hand)


def test_a_method_and_an_eager_run_are_intercepted_too(session):
    for context in (contextlib.nullcontext, functools.partial(nn.intercept_methods, times(3.0))):
        with context():
            run = session.apply("net", X, eager=True)
            keys = keys_of(run.draw)("dropout")
            assert bits(run.output) == bits(Net().apply(session.models["net"].variables, X, rngs=keys))


def test_a_replay_says_that_flax_is_set_otherwise(session):
    with nn.intercept_methods(halved):
        run = session.apply("net", X)
        assert session.replay(run.draw).agreement.said == ()
    again = session.replay("last")
    assert again.agreement.identical is False
    assert again.agreement.said == ("Flax is set otherwise than it was: its flags, its interceptors or the like",)


@pytest.mark.own_executables
def test_on_disk_an_intercepted_program_is_another(tmp_path):
    for program in ("compiled", "disk cache"):
        session = session_of(Net(), disk_cache=tmp_path / "programs")
        session.init("net", X)
        for contexts in ((), (functools.partial(nn.intercept_methods, halved),)):
            assert runs_as_by_hand(session, *contexts)[0].program == program
        settle(session)


# -- flags, rules


FLAGS = sorted(name for name, value in flax.config._values.items() if isinstance(value, bool))


@contextlib.contextmanager
def flipped(name: str) -> Any:
    """One of Flax's flags, set to what it is not."""
    value = flax.config._values[name]
    flax.config.update(name, not value)
    try:
        yield
    finally:
        flax.config.update(name, value)


@pytest.mark.parametrize("name", FLAGS)
def test_every_flag_of_flax_is_part_of_what_a_trace_depends_on(name):
    before, words = settings(), settings_in_words()
    assert settings() == before
    with flipped(name):
        assert settings() != before
        assert {key for key, value in settings_in_words().items() if value != words[key]} == {name}
    assert settings() == before


def test_a_flag_counts_at_once(session):
    first = runs_as_by_hand(session)
    inside = runs_as_by_hand(session, lambda: flipped("flax_fix_rng_separator"))
    runs_as_by_hand(session)
    assert inside[0].reason == "flax_fix_rng_separator: False → True"
    assert bits(session.replay(first[0].draw).output) == bits(first[0].output)


def test_the_rules_of_logical_axes_count_at_once_and_as_they_are_now(session):
    rules = [("in", "data"), ("out", "model")]
    runs_as_by_hand(session)
    inside = runs_as_by_hand(session, lambda: nn.logical_axis_rules(rules))
    rules[1] = ("out", "rows")
    changed = runs_as_by_hand(session, lambda: nn.logical_axis_rules(rules))
    runs_as_by_hand(session)
    assert inside[0].reason == "logical axis rules: none → [('in', 'data'), ('out', 'model')]"
    assert changed[0].reason.startswith("logical axis rules: [('in', 'data'), ('out', 'model')] → ")


# -- NNX


class Asking(nnx.Module):
    """Its code asks how NNX is set."""

    def __init__(self, *, rngs: nnx.Rngs) -> None:
        self.linear = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        for name in ("using_eager_sharding", "using_refs"):
            if hasattr(nnx, name) and getattr(nnx, name)():
                x = x * 3
        return self.linear(x)


@pytest.mark.parametrize("name", ["use_eager_sharding", "use_refs", "set_graph_mode", "set_graph_updates"])
def test_what_nnx_is_set_to_counts_at_once(name):
    if not hasattr(nnx, name):
        assert name not in str(settings_in_words())
        return
    net = Asking(rngs=nnx.Rngs(0))
    session = session_of(net)
    key = name if name.startswith("set") else f"{name.replace('use', 'using', 1)}"
    now = getattr(nnx, key)() if name.startswith("use") else True
    outputs = []
    for value in (now, not now, now):
        with getattr(nnx, name)(value):
            before = settings()
            for _ in range(2):
                run = session.apply("net", X)
                assert bits(run.output) == bits(nnx.jit(lambda net: net(X))(net))
            assert settings() == before
            outputs.append(bits(run.output))
    assert outputs[0] == outputs[2]
    assert (outputs[0] != outputs[1]) == name.startswith("use")


# -- JAX


JAX: dict[str, Callable[[], Any]] = {
    "a mesh": lambda: (jax.set_mesh if hasattr(jax, "set_mesh") else jax.sharding.use_mesh)(
        jax.make_mesh((1,), ("data",), **_auto())
    ),
    "no jit": lambda: jax.disable_jit(),
    "a precision": lambda: jax.default_matmul_precision("float32"),
    "promotion of ranks": lambda: jax.numpy_rank_promotion("warn"),
    "promotion of dtypes": lambda: jax.numpy_dtype_promotion("strict"),
    "a device": lambda: jax.default_device(jax.devices()[0]),
    "keys": lambda: jax.threefry_partitionable(False),
    "another kind of keys": lambda: jax.default_prng_impl("rbg"),
    "NaN": lambda: jax.debug_nans(True),
}


def _auto() -> dict[str, Any]:
    return {"axis_types": (jax.sharding.AxisType.Auto,)}


@pytest.mark.parametrize("kind", sorted(JAX))
def test_every_context_of_jax_is_part_of_what_a_trace_depends_on(kind):
    before = settings()
    with JAX[kind]():
        assert settings() != before
        inside = settings()
        assert settings() == inside
    assert settings() == before


def test_code_that_asks_for_the_mesh_is_traced_in_it():
    class Meshed(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            return nn.Dense(3)(x) * (1 if jax.sharding.get_abstract_mesh().empty else 5)

    net = Meshed()
    session = session_of(net)
    session.init("net", X)
    outputs = []
    for context in (contextlib.nullcontext, JAX["a mesh"], contextlib.nullcontext):
        for _ in range(2):
            with context():
                run = session.apply("net", X)
                assert bits(run.output) == bits(apply_by_hand(net, session.models["net"].variables, {}, X, afresh=True))
        outputs.append(bits(run.output))
    assert outputs[0] == outputs[2] != outputs[1]
