"""Programs: kept by what they compute, never a stale one, and why one is new."""

from __future__ import annotations

import concurrent.futures
import gc
import threading
import weakref
from collections import namedtuple
from typing import Any
from unittest.mock import Mock

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from by_hand import MyModel, bits, notebook_x
from processes import printed_by
from together import on_threads

from flax_magics import Session
from flax_magics.base.measures import name_devices
from flax_magics.compile import cache


def model(source: str, **names: Any) -> Any:
    """`Net()` of a cell's source, in a namespace of its own."""
    namespace: dict[str, Any] = {"nn": nn, "jnp": jnp, "jax": jax, "__name__": "__main__", **names}
    exec(compile(source, "<cell>", "exec"), namespace)
    return namespace["Net"]()


PLAIN = """
class Net(nn.Module):
  @nn.compact
  def __call__(self, x):
    hidden = nn.Dense(WIDTH)(x)
    return other(hidden) * scale[0]
"""


def plain(width: int = 3, other: Any = None, scale: Any = (2.0,)) -> Any:
    return model(PLAIN, WIDTH=width, other=other or (lambda x: x), scale=scale)


X = jnp.ones((2, 4))


def test_a_warm_run_is_reused_and_another_shape_says_which(session):
    session.register("net", plain())
    assert session.apply("net", X).reason == "first run of this program"
    assert session.apply("net", X).program == "reused"
    run = session.apply("net", jnp.ones((5, 4)))
    assert (run.program, run.reason) == ("compiled", "x: float32[2,4] → float32[5,4]")
    run = session.apply("net", jnp.ones((5, 4), jnp.bfloat16))
    assert run.reason == "x: float32[5,4] → bfloat16[5,4]"


def test_two_threads_may_wait_for_one_compilation(session, monkeypatch):
    net, both, outputs = plain(), threading.Barrier(2), []
    session.register("net", net)

    def together(future: Any) -> Any:
        both.wait(60)  # until both have found it under way
        result = wait_for(future)
        both.wait(60)
        return result

    wait_for = cache.wait_for
    session.init("net", X)
    monkeypatch.setattr(cache, "wait_for", together)
    on_threads(*[lambda: outputs.append(session.apply("net", X).output)] * 2)
    assert [bits(output) for output in outputs] == [bits(jax.jit(net.apply)(session.models["net"].variables, X))] * 2
    assert session.services.programs.compiling == {}


def test_a_renamed_local_is_no_change_and_a_refactored_helper_is_traced_but_not_compiled(session):
    session.register("net", plain())
    session.apply("net", X)
    session.register("net", model(PLAIN.replace("hidden", "h"), WIDTH=3, other=lambda x: x, scale=(2.0,)))
    run = session.apply("net", X)
    assert (run.program, run.timing.building) == ("reused", 0)
    refactored = PLAIN.replace("nn.Dense(WIDTH)(x)", "dense(x)")
    helper = "def dense(x):\n  return nn.Dense(WIDTH)(x)\n"
    session.register("net", model(helper + refactored, WIDTH=3, other=lambda x: x, scale=(2.0,)))
    run = session.apply("net", X)
    assert run.program == "reused"
    assert run.timing.trace > 0
    assert (run.timing.lower, run.timing.compile) == (0, 0)


def test_dropped_models_are_freed_and_their_arrays_with_them():
    session, classes = Session(seed=0, replay_bytes=0), []  # nothing is kept for replays
    for i in range(6):
        net = model(PLAIN, WIDTH=3 + i, other=lambda x: x, scale=(float(i),))
        classes.append(weakref.ref(type(net)))
        session.register("net", net)
        session.apply("net", X)
        session.settle()
        del net
        gc.collect()
        if i == 1:
            before = len(jax.live_arrays())
    assert [i for i, cls in enumerate(classes) if cls() is not None] == [5]
    assert len(jax.live_arrays()) == before


def test_a_helper_that_is_not_plain_is_traced_each_time_and_never_stale(session):
    class Stateful:
        factor = 1.0

        def __call__(self, x: Any) -> Any:
            return x * self.factor

    helper = Stateful()
    net = plain(other=helper)
    session.register("net", net)
    session.apply("net", X)
    assert session.apply("net", X).program == "reused"
    helper.factor = 5.0
    run = session.apply("net", X)
    assert run.program == "compiled"
    assert bits(run.output) == bits(jax.jit(net.apply)(session.models["net"].variables, X))


def test_two_callbacks_with_the_same_program_text_are_two_programs(session):
    heard: list[str] = []

    def calling(name: str) -> Any:
        def other(x: Any) -> Any:
            jax.debug.callback(lambda: heard.append(name))
            return x

        return other

    for name in ("one", "two"):
        session.register("net", plain(other=calling(name)))
        if name == "one":
            session.init("net", X)
            heard.clear()  # an init runs the forward pass, as by hand
        session.apply("net", X)
    assert heard == ["one", "two"]


def test_a_run_ends_after_its_callbacks(session):
    printed: list[float] = []

    def other(x: Any) -> Any:
        jax.debug.callback(lambda v: printed.append(float(v)), x.sum())
        return x

    session.register("net", plain(other=other))
    session.init("net", X)
    printed.clear()
    run = session.apply("net", X)
    assert len(printed) == 1
    assert run.program == "compiled"


@pytest.mark.parametrize(
    ("name", "value"),
    [("jax_default_matmul_precision", "float32"), ("jax_enable_x64", True), ("jax_numpy_dtype_promotion", "strict")],
)
def test_a_setting_of_jax_that_changed_counts(session, name, value):
    session.register("net", plain())
    session.apply("net", jnp.ones((2, 4), jnp.float32))
    old = getattr(jax.config, name)
    try:
        jax.config.update(name, value)
        run = session.apply("net", jnp.ones((2, 4), jnp.float32), mode=None)
    finally:
        jax.config.update(name, old)
    assert run.timing.trace > 0
    assert session.apply("net", jnp.ones((2, 4), jnp.float32)).timing.trace == 0


def test_disable_jit_runs_op_by_op(session):
    session.register("net", MyModel(3, True))
    with jax.disable_jit():
        assert session.apply("net", notebook_x()).program == "eager"


@pytest.mark.own_executables  # one that is there already cannot be interrupted
def test_an_interrupted_compilation_is_finished_and_used(session, monkeypatch):
    net = MyModel(3, True)
    session.register("net", net)
    session.init("net", notebook_x())
    waits = []
    real = concurrent.futures.wait

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        waits.append(args)
        if len(waits) == 1:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(concurrent.futures, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        session.apply("net", notebook_x())
    (future,) = session.programs.compiling.values()
    run = session.apply("net", notebook_x())
    assert session.programs.compiling == {}
    assert future.done()
    assert (run.draw, run.program) == (1, "compiled")
    assert run.reason == "first run of this program; begun by the run that was interrupted"


@pytest.mark.own_executables  # one that is there already cannot be interrupted
def test_interrupted_compilations_that_nobody_comes_back_for_are_let_go(session, monkeypatch):
    session.register("net", plain())
    session.init("net", X)
    for rows in range(1, 9):
        with monkeypatch.context() as patch:
            patch.setattr(concurrent.futures, "wait", Mock(side_effect=KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                session.apply("net", jnp.ones((rows, 4)))
        futures = list(session.programs.compiling.values())
        concurrent.futures.wait(futures, timeout=60)
    assert len(session.programs.compiling) == cache.LEFT + 1


def test_no_thread_is_left_behind(session):
    session.register("net", plain())
    before = set(threading.enumerate())
    session.apply("net", X)
    for thread in set(threading.enumerate()) - before:
        thread.join(10)
    assert set(threading.enumerate()) <= before


def test_programs_kept_are_bounded(session, monkeypatch):
    monkeypatch.setattr(cache, "KEPT", 3)
    session.register("net", plain())
    for n in range(1, 6):
        session.apply("net", jnp.ones((n, 4)))
    assert len(session.programs) == 3
    assert len(session.programs.by_call) == 3
    assert session.apply("net", jnp.ones((5, 4))).program == "reused"
    assert session.apply("net", jnp.ones((1, 4))).program == "compiled"


class Structured(nn.Module):
    @nn.compact
    def __call__(self, batch: Any, flag: bool, how: str = "sum") -> Any:
        x = nn.Dense(2)(batch["x"]) + batch["y"][0]
        return {"out": x if flag else -x, "none": None, "how": (x.sum(), x.mean()) if how == "sum" else ()}


def test_pytrees_bools_and_strings_as_arguments(session):
    batch = {"x": X, "y": [jnp.ones(2), 3]}
    session.register("net", Structured())
    run = session.apply("net", batch, True)
    variables = session.models["net"].variables
    by_hand = jax.jit(Structured().apply, static_argnums=(2, 3))
    assert bits(run.output) == bits(by_hand(variables, batch, True))
    assert run.shape == "{how: (float32[], float32[]), none: None, out: float32[2,2]}"
    run = session.apply("net", batch, False, how="mean")
    assert bits(run.output) == bits(by_hand(variables, batch, False, "mean"))
    assert run.reason == "flag: True → False; how: not given before"


def test_devices_are_named():
    device = namedtuple("Device", ("id", "platform"), defaults=("gpu",))
    assert name_devices({device(0)}) == "gpu:0"
    assert name_devices({device(2), device(0)}) == "gpu:0,2"
    assert name_devices(set(map(device, range(8)))) == "gpu:0-7"


LEAVES = """
import concurrent.futures
import flax.linen as nn
import jax.numpy as jnp
from flax_magics import Session

def stop(*args, **kwargs):
  raise KeyboardInterrupt

session = Session(0)
session.register("net", nn.Sequential([layer for i in range(2) for layer in (nn.Dense(64 + i), nn.relu)]))
concurrent.futures.wait = stop
try:
  session.apply("net", jnp.ones((4, 64)))
except KeyboardInterrupt:
  print("interrupted")
"""


def test_the_process_can_leave_while_something_compiles():
    assert printed_by(LEAVES) == "interrupted\n"


@pytest.mark.parametrize("disk_cache", [False, True])
def test_an_input_that_nothing_reads_may_have_another_shape(tmp_path, disk_cache):
    session = Session(seed=0, disk_cache=tmp_path if disk_cache else False)
    session.register("net", model(PLAIN.replace("(x)", "(jnp.ones((1, 4)))"), WIDTH=3, other=lambda x: x, scale=(2.0,)))
    first = session.apply("net", X)
    second = session.apply("net", jnp.ones((5, 4), jnp.bfloat16))
    assert second.reason == "x: float32[2,4] → bfloat16[5,4]"
    assert bits(first.output) == bits(second.output)
