"""Whatever is changed behind a model's back between two runs, the next run gives what a fresh run by hand gives."""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from by_hand import Normed, apply_by_hand, bits, keys_of
from flax import nnx
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from interrupts import interrupted_after
from processes import printed_by
from sessions import session_of
from together import on_threads

from flax_magics.base.threads import Running
from flax_magics.execution.plan_cache import LastRun

pytestmark = pytest.mark.usefixtures("optimised")

SOURCE = """
import dataclasses, os
import user_module

SCALE = 2.0
OPTIONS = {"gain": 1.5, "steps": [1, 2]}
TABLE = np.arange(4.0, dtype=np.float32)

@dataclasses.dataclass
class Config:
  power: float = 1.0

config = Config()

def helper(x, by=1.0):
  return jnp.tanh(x) * by

def closing_over(array):
  def add(x):
    return x + array
  def put(new):
    nonlocal array
    array = new
  return add, put

add, put = closing_over(jnp.ones(4))

class Base(nn.Module):
  rate: float = 0.5
  offset = 0.25

  def shift(self, x):
    return x + self.offset

class Net(Base):
  depth: int = 1

  @nn.compact
  def __call__(self, x, train=False):
    for _ in range(self.depth):
      x = nn.relu(nn.Dense(4)(x))
    x = nn.Dropout(self.rate, deterministic=not train)(x)
    for step in OPTIONS["steps"]:
      x = x * step
    x = add(helper(self.shift(x))) * SCALE * OPTIONS["gain"] + TABLE
    return x ** config.power * user_module.factor()

class Asking(Net):
  def shift(self, x):
    return x * float(os.environ.get("FLAX_MAGICS_TEST_FLAG", "1"))
"""


@pytest.fixture
def world() -> Iterator[dict[str, Any]]:
    """A namespace like a notebook's, with a module of the user's beside it."""
    module = types.ModuleType("user_module")
    exec("POWER = 2.0\ndef factor():\n  return POWER", vars(module))
    sys.modules["user_module"] = module
    namespace: dict[str, Any] = {"nn": nn, "jnp": jnp, "jax": jax, "np": np, "__name__": "__main__"}
    exec(compile(SOURCE, "<cell>", "exec"), namespace)
    with contextlib.ExitStack() as undo:
        namespace["undo"] = undo
        yield namespace
    del sys.modules["user_module"]


def _patch(world: dict[str, Any], owner: Any, name: str, value: Any) -> None:
    world["undo"].callback(setattr, owner, name, getattr(owner, name))
    setattr(owner, name, value)


def _dense(by: float) -> Callable[..., Any]:
    dense = nn.Dense.__call__
    return lambda self, x: dense(self, x) * by


Change = Callable[[dict[str, Any], float], None]

CHANGES: dict[str, Change] = {
    "a global": lambda w, v: w.update(SCALE=v),
    "a global of another type": lambda w, v: w.update(SCALE=int(v)),
    "a function in another cell": lambda w, v: exec(f"def helper(x):\n  return jnp.sin(x) + {v}", w),
    "a function's default": lambda w, v: setattr(w["helper"], "__defaults__", (v,)),
    "an item of a dict": lambda w, v: w["OPTIONS"].update(gain=v),
    "an item of a list": lambda w, v: w["OPTIONS"]["steps"].append(v),
    "an array in place": lambda w, v: w["TABLE"].__setitem__(1, v),
    "a config object": lambda w, v: setattr(w["config"], "power", v),
    "what a closure holds": lambda w, v: w["put"](jnp.full(4, v)),
    "an attribute of a base class": lambda w, v: setattr(w["Base"], "offset", v),
    "a method of a base class": lambda w, v: setattr(w["Base"], "shift", lambda self, x: x * v),
    "a global of a user's module": lambda w, v: setattr(sys.modules["user_module"], "POWER", v),
    "a function of a user's module": lambda w, v: setattr(sys.modules["user_module"], "factor", lambda: v),
    "a layer of Flax": lambda w, v: _patch(w, nn.Dense, "__call__", _dense(v)),
    "a function of Flax": lambda w, v: _patch(w, nn, "relu", lambda x: x * v),
    "a function of JAX": lambda w, v: _patch(w, jnp, "tanh", lambda x: x * v),
    "the environment": lambda w, v: os.environ.update(FLAX_MAGICS_TEST_FLAG=str(v)),
    "a module in place of another": lambda w, v: w.update(net=w[type(w["net"]).__name__](rate=min(v / 10, 0.9))),
}

SETTINGS = {
    "jax_default_matmul_precision": ["bfloat16", "float32", None],
    "jax_enable_x64": [True, False],
    "jax_disable_most_optimizations": [True, False],
    "jax_numpy_rank_promotion": ["warn", "allow"],
}
STEPS = st.one_of(
    st.tuples(st.sampled_from(sorted(CHANGES)), st.sampled_from([0.5, 2.0, 3.0, 7.0])),
    st.tuples(st.just("a setting of JAX"), st.sampled_from([(name, v) for name in SETTINGS for v in SETTINGS[name]])),
    st.tuples(st.just("nothing"), st.none()),
)

X = jax.random.uniform(jax.random.key(42), (3, 4))


@pytest.fixture
def nothing_kept() -> Iterator[None]:
    """Operations that JAX compiled in the test, with other settings, are compiled anew for the next."""
    yield
    jax.clear_caches()


@pytest.mark.usefixtures("nothing_kept")
@pytest.mark.filterwarnings("ignore:Following NumPy automatic rank promotion")
@given(cls=st.sampled_from(["Net", "Asking"]), train=st.booleans(), steps=st.lists(STEPS, min_size=2, max_size=6))
@settings(max_examples=min(12, settings().max_examples), suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_run_is_what_a_fresh_one_by_hand_is(world, cls, train, steps):
    with contextlib.ExitStack() as undo:
        for name in SETTINGS:
            undo.callback(jax.config.update, name, jax.config.values[name])
        undo.callback(os.environ.pop, "FLAX_MAGICS_TEST_FLAG", None)
        exec(compile(SOURCE, "<cell>", "exec"), world)
        undo.enter_context(world["undo"].pop_all())
        world["undo"] = undo
        world["net"] = world[cls]()
        session = session_of(world["net"])
        session.init("net", X)
        for draw, (what, value) in enumerate([("nothing", None), *steps], 1):
            if what == "a setting of JAX":
                jax.config.update(*value)
            elif what != "nothing":
                CHANGES[what](world, value)
            if session.module("net") is not world["net"]:
                session.register("net", world["net"])
            variables = session.models["net"].variables
            run = session.apply("net", X, mode="train" if train else "eval")
            keys = keys_of(draw)("dropout") if train else {}
            by_hand = apply_by_hand(world["net"], variables, keys, X, train=train, afresh=True)
            assert bits(run.output) == bits(by_hand), (what, value)


@pytest.mark.parametrize("what", sorted(CHANGES))
def test_each_change_counts_at_once_and_so_does_taking_it_back(world, what):
    world["net"] = world["Asking" if what == "the environment" else "Net"]()
    world["undo"].callback(os.environ.pop, "FLAX_MAGICS_TEST_FLAG", None)
    session = session_of(world["net"])
    outputs = []
    for change in (None, 3.0, 5.0):
        if change is not None:
            CHANGES[what](world, change)
        if session.module("net") is not world["net"]:
            session.register("net", world["net"])
        for _ in range(2):  # the second is a warm one
            run = session.apply("net", X)
            by_hand = apply_by_hand(world["net"], session.models["net"].variables, {}, X, afresh=True)
            assert bits(run.output) == bits(by_hand)
        outputs.append(bits(run.output))
    if what != "a module in place of another":  # its dropout is off: only the program is another
        assert len(set(map(str, outputs))) > 1


NNX_SOURCE = """
GAIN = 2.0
class Inner(nnx.Module):
  def __init__(self, *, rngs):
    self.linear = nnx.Linear(4, 4, rngs=rngs)
    self.sizes = [1.0, 2.0]
  def __call__(self, x):
    return self.linear(x) * self.sizes[0]
class Net(nnx.Module):
  bias = 0.5
  def __init__(self, *, rngs):
    self.inner = Inner(rngs=rngs)
    self.dropout = nnx.Dropout(0.5, rngs=rngs)
    self.gain = 1.0
  def __call__(self, x):
    return self.dropout(self.inner(x)) * GAIN * self.gain + self.bias
"""

NNX_CHANGES: dict[str, Callable[[Any, dict[str, Any]], None]] = {
    "a global": lambda net, w: w.update(GAIN=3.0),
    "a class attribute": lambda net, w: setattr(w["Net"], "bias", 2.0),
    "a static attribute": lambda net, w: setattr(net, "gain", 5.0),
    "a submodule": lambda net, w: setattr(net.inner, "linear", nnx.Linear(4, 4, rngs=nnx.Rngs(7))),
    "a variable": lambda net, w: setattr(net.inner.linear, "bias", nnx.Param(jnp.ones(4))),
    "a method": lambda net, w: setattr(w["Inner"], "__call__", lambda self, x: self.linear(x) - 1),
    "the rate of a layer": lambda net, w: setattr(net.dropout, "rate", 0.25),
    "a layer of Flax": lambda net, w: _patch(w, nnx.Linear, "__call__", lambda self, x: x * 3),
}


@pytest.mark.parametrize("what", sorted(NNX_CHANGES))
def test_a_change_of_an_nnx_module_counts_at_once(world, what):
    names = {**world, "nnx": nnx}
    exec(compile(NNX_SOURCE, "<cell>", "exec"), names)
    net = names["Net"](rngs=nnx.Rngs(0))
    session = session_of(net)
    outputs = []
    for change in (False, True):
        if change:
            NNX_CHANGES[what](net, names)
        for _ in range(2):
            run = session.apply("net", X)
            copy = nnx.clone(net)
            nnx.reseed(copy, policy="match_shape", default=keys_of(session.draws)("default")["default"])
            assert bits(run.output) == bits(nnx.jit(lambda copy: copy(X))(copy))
        outputs.append(bits(run.output))
    assert outputs[0] != outputs[1]


Between = Callable[[Callable[[], Any]], list[Any]]


at_either_moment = pytest.mark.parametrize("between", ["before the check", "after the check"], indirect=True)


@pytest.fixture
def between(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Between:
    """Has something happen once, between a run's dispatch and its end; gives what did not happen yet."""
    waiting: list[Callable[[], Any]] = []
    holds, finish, moment = LastRun.holds, Running.finish, getattr(request, "param", "before the check")

    def check(self: LastRun, *args: Any) -> bool:
        assert self.brief  # otherwise it would be asked before the dispatch
        while waiting and moment == "before the check":
            waiting.pop()()
        return holds(self, *args)

    def wait(self: Running, *args: Any) -> float:
        while waiting:
            waiting.pop()()
        return finish(self, *args)

    monkeypatch.setattr(LastRun, "brief", property(lambda self: True, lambda self, value: None), raising=False)
    monkeypatch.setattr(LastRun, "holds", check)
    monkeypatch.setattr(Running, "finish", wait)
    return lambda what: waiting.append(what) or waiting


def elsewhere(what: Callable[[], Any]) -> None:
    """On another thread: in the middle of a run a session takes no command from its own."""
    on_threads(what)


def _flags(world: dict[str, Any], value: float) -> None:
    world["undo"].callback(flax.config.update, "flax_return_frozendict", flax.config.flax_return_frozendict)
    flax.config.update("flax_return_frozendict", True)


def _intercepted(world: dict[str, Any], value: float) -> None:
    world["undo"].enter_context(nn.intercept_methods(lambda call, args, kwargs, context: call(*args, **kwargs) * value))


def _setting(name: str, value: Any) -> Change:
    def change(world: dict[str, Any], _: float) -> None:
        world["undo"].callback(jax.config.update, name, jax.config.values[name])
        jax.config.update(name, value)

    return change


MEANWHILE = {
    **{what: change for what, change in CHANGES.items() if what != "the environment"},  # it keeps a line from a plan
    "an interceptor": _intercepted,
    "a flag of Flax": _flags,
    "the precision": _setting("jax_default_matmul_precision", "bfloat16"),
    "x64": _setting("jax_enable_x64", True),
    "optimisations": _setting("jax_disable_most_optimizations", not jax.config.read("jax_disable_most_optimizations")),
}


@pytest.mark.usefixtures("nothing_kept")
@pytest.mark.parametrize("what", sorted(MEANWHILE))
def test_a_change_after_the_dispatch_is_in_the_whole_of_a_run_or_in_nothing_of_it(world, between, what):
    session = session_of(world["Net"](rate=0.25))
    world["net"] = session.module("net")
    for _ in range(3):
        session.apply("net", X, mode="train")
    variables = session.models["net"].variables

    def by_hand(draw: int) -> Any:
        keys = keys_of(draw)("dropout")
        return bits(apply_by_hand(world["net"], variables, keys, X, train=True, afresh=True))

    def change() -> None:
        MEANWHILE[what](world, 3.0)
        if session.module("net") is not world["net"]:
            elsewhere(lambda: session.register("net", world["net"]))

    before = by_hand(4)
    left = between(change)
    run = session.apply("net", X, mode="train")
    assert not left
    assert bits(run.output) in (before, by_hand(4))
    assert (run.draw, session.draws, len(session)) == (4, 4, 4)
    assert bits(dict(run.keys)) == bits(keys_of(4)("params", "dropout"))
    assert session.programs.unfinished.wait is None
    # What comes after is after it.
    assert [bits(session.apply("net", X, mode="train").output) for _ in range(2)] == [by_hand(5), by_hand(6)]


@pytest.mark.parametrize("what", sorted(NNX_CHANGES))
def test_so_is_a_change_of_an_nnx_module(world, between, what):
    names = {**world, "nnx": nnx}
    # With a list, which no hash takes, its line would have no plan.
    exec(compile(NNX_SOURCE.replace("[1.0, 2.0]", "(1.0, 2.0)"), "<cell>", "exec"), names)
    net = names["Net"](rngs=nnx.Rngs(0))
    session = session_of(net)

    def by_hand(draw: int) -> Any:
        copy = nnx.clone(net)
        nnx.reseed(copy, policy="match_shape", default=keys_of(draw)("default")["default"])
        return bits(nnx.jit(lambda copy: copy(X))(copy))

    for _ in range(3):
        session.apply("net", X)
    before = by_hand(4)
    left = between(lambda: NNX_CHANGES[what](net, names))
    run = session.apply("net", X)
    assert not left
    assert bits(run.output) in (before, by_hand(4))
    assert (run.draw, session.draws, len(session)) == (4, 4, 4)
    assert [bits(session.apply("net", X).output) for _ in range(2)] == [by_hand(5), by_hand(6)]


@at_either_moment
def test_variables_and_a_seed_that_another_thread_sets_meanwhile_are_not_written_over(between):
    session = session_of(Normed())
    for _ in range(3):
        session.apply("net", X, mode="train")
    others = jax.tree_util.tree_map(lambda leaf: leaf + 1, session.models["net"].variables)

    def change() -> None:
        elsewhere(lambda: session.assign("net", others))
        elsewhere(lambda: session.restart(7))

    left = between(change)
    run = session.apply("net", X, mode="train")
    assert not left
    assert (run.seed, run.draw, run.changed) == (7, 1, {"batch_stats": 1})
    output, _ = apply_by_hand(Normed(), others, keys_of(1, seed=7)("dropout"), X, train=True, mutable=["batch_stats"])
    assert bits(run.output) == bits(output)


@at_either_moment
def test_a_run_on_another_thread_meanwhile_takes_a_draw_of_its_own(between):
    session = session_of(nn.Dropout(0.5, deterministic=False))
    for _ in range(3):
        session.apply("net", X)
    others = []
    between(lambda: elsewhere(lambda: others.append(session.apply("net", X))))
    run = session.apply("net", X)
    assert [others[0].draw, run.draw, session.draws, len(session)] == [4, 5, 5, 5]
    for one in (others[0], run):
        by_hand = apply_by_hand(nn.Dropout(0.5, deterministic=False), {}, keys_of(one.draw)("dropout"), X)
        assert bits(one.output) == bits(by_hand)


class WithStatistics(nnx.Module):
    def __init__(self, *, rngs: nnx.Rngs) -> None:
        self.norm = nnx.BatchNorm(4, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        return self.norm(x)


@at_either_moment
@pytest.mark.parametrize("kind", ["linen", "nnx"])
def test_statistics_that_somebody_sets_meanwhile_are_not_written_over(between, kind):
    net: Any = Normed() if kind == "linen" else WithStatistics(rngs=nnx.Rngs(0))
    session = session_of(net)
    for _ in range(3):
        session.apply("net", X, mode="train")
    # In the dict that the session holds, or in the module itself.
    statistics = session.models["net"].variables["batch_stats"]["BatchNorm_0"] if kind == "linen" else net.norm

    def mean() -> Any:
        return statistics["mean"] if kind == "linen" else statistics.mean[...]

    def change() -> None:
        if kind == "linen":
            statistics["mean"] = jnp.full(4, 100.0)
        else:
            statistics.mean[...] = jnp.full(4, 100.0)

    others = jax.tree_util.tree_map(lambda leaf: leaf, session.models["net"].variables)
    left = between(change)
    run = session.apply("net", X, mode="train")
    assert not left
    assert (run.draw, session.draws, len(session)) == (4, 4, 4)
    statistics = session.models["net"].variables["batch_stats"]["BatchNorm_0"] if kind == "linen" else net.norm
    if kind == "linen":
        others["batch_stats"]["BatchNorm_0"]["mean"] = jnp.full(4, 100.0)
        keys = keys_of(4)("dropout")
        output, updates = apply_by_hand(net, others, keys, X, train=True, mutable=["batch_stats"])
        assert bits(run.output) == bits(output)
        assert bits(mean()) == bits(updates["batch_stats"]["BatchNorm_0"]["mean"])
    else:
        assert bits(mean()) == bits(jax.jit(lambda x: 0.99 * jnp.full(4, 100.0) + (1 - 0.99) * x.mean(0))(X))


@at_either_moment
@pytest.mark.parametrize("way", ["interrupted", "dropped"])
def test_a_run_that_came_to_nothing_is_no_run_before_the_next(between, way):
    session = session_of(nn.Dropout(0.5, deterministic=False))
    for _ in range(3):
        session.apply("net", X)
    state, x = session._state, X + 1

    def interrupt() -> None:
        raise KeyboardInterrupt

    between(interrupt if way == "interrupted" else lambda: elsewhere(lambda: session.key("latent")))
    with pytest.raises(KeyboardInterrupt) if way == "interrupted" else contextlib.nullcontext():
        run = session.apply("net", x)
    if way == "interrupted":
        assert session._state is state
        session.programs.unfinished.finish()
        run = session.apply("net", x)
    replay = session.replay(run.draw)
    assert (bits(replay.inputs), replay.agreement.identical) == (bits(((x,), {})), True)
    assert (run.draw, run.timing.busy, session.programs.unfinished.wait) == (4 + (way == "dropped"), 0.0, None)


def test_commands_of_several_threads_take_draws_of_their_own():
    threads, applies = (8, 500) if settings().max_examples > 5 else (3, 40)
    session = session_of(Normed())
    session.apply("net", X, mode="train")
    session.apply("net", X, mode="train")
    runs: list[Any] = []

    def work(i: int) -> None:
        for n in range(applies):
            runs.append((n, session.apply("net", X + n % 3, mode="train")))
            if n % 10 == i:
                session.key("latent")
            if n == 20:
                session.register(f"net{i}", Normed())

    switching = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        on_threads(*(functools.partial(work, i) for i in range(threads)))
    finally:
        sys.setswitchinterval(switching)
    assert [run.draw for run in session.runs] == list(range(1, 2 + threads * (applies + applies // 10) + 1))
    assert sorted(session.models) == sorted(["net", *(f"net{i}" for i in range(threads))])
    assert session.models["net"].updates["batch_stats"] == 2 + threads * applies
    net, root = Normed(), jax.random.key(0)
    variables = net.init(keys_of(1)("params")["params"], X, train=False)
    inputs = {run.draw: X + n % 3 for n, run in runs}
    outputs = {run.draw: bits(run.output) for _, run in runs}
    for run in session.runs:
        root, _, key = jax.random.split(root, 3)
        if run.command == "apply":
            keys, x = {"dropout": key}, inputs.get(run.draw, X)
            output, updates = apply_by_hand(net, variables, keys, x, train=True, mutable=["batch_stats"])
            variables = {**variables, **updates}
            assert outputs.get(run.draw, bits(output)) == bits(output)
    assert bits(dict(session.models["net"].variables)) == bits(variables)


def interrupt(frame: object) -> None:
    raise KeyboardInterrupt


@functools.cache
def warm_runs_by_hand() -> list[tuple[Any, Any]]:
    """(output, variables) after each of five runs of `Normed`."""
    net, after = Normed(), []
    variables = net.init(keys_of(1)("params")["params"], X, train=False)
    for draw in range(1, 6):
        output, updates = apply_by_hand(
            net, variables, keys_of(draw)("dropout"), X, train=True, mutable=["batch_stats"]
        )
        variables = {**variables, **updates}
        after.append((bits(output), bits(variables)))
    return after


@pytest.mark.parametrize("interrupted", range(0, 320, 10))
def test_an_interrupt_at_any_line_of_a_warm_run_leaves_all_of_it_or_nothing(interrupted):
    session = session_of(Normed())
    for _ in range(3):
        session.apply("net", X, mode="train")
    with interrupted_after(interrupted, interrupt, once=True):
        session.apply("net", X, mode="train")
    assert session.draws == len(session) == session.models["net"].updates["batch_stats"]
    assert session.draws in (3, 4)
    run = session.apply("net", X, mode="train")
    assert run.draw == session.draws == run.changed["batch_stats"]
    assert (bits(run.output), bits(dict(session.models["net"].variables))) == warm_runs_by_hand()[run.draw - 1]


def test_another_device_and_a_sharded_input_run_where_they_are():
    script = """
        import jax, jax.numpy as jnp, numpy as np
        import flax.linen as nn
        from jax.sharding import Mesh, NamedSharding, PartitionSpec
        import flax_magics

        class Net(nn.Module):
          @nn.compact
          def __call__(self, x):
            return nn.Dropout(0.5, deterministic=False)(nn.Dense(3)(x))

        session = flax_magics.Session()
        session.register("net", Net())
        x = jax.random.normal(jax.random.key(1), (4, 4))
        mesh = Mesh(np.array(jax.devices()), ("data",))
        sharded = NamedSharding(mesh, PartitionSpec("data"))
        root = jax.random.key(0)
        for where in (None, jax.devices()[1], None, sharded, jax.devices()[0], sharded):
            given = x if where is None else jax.device_put(x, where)
            run = session.apply("net", given)
            root, _, key = jax.random.split(root, 3)
            variables = session.models["net"].variables
            by_hand = jax.jit(lambda v, x, k: Net().apply(v, x, rngs={"dropout": k}))(variables, given, key)
            assert np.asarray(run.output).tobytes() == np.asarray(by_hand).tobytes(), where
            assert run.output.sharding == by_hand.sharding, (run.output.sharding, by_hand.sharding)
            assert run.output.committed == by_hand.committed, where
            print(run.device)
    """
    assert printed_by(script, devices=2).split() == ["cpu:0", "cpu:1", "cpu:0", "cpu:0,1", "cpu:0", "cpu:0,1"]
