"""Ctrl-C strikes after a commit, never inside; what goes on behind it is waited for by the next run, outside of its time."""

from __future__ import annotations

import contextlib
import signal
import threading
from types import SimpleNamespace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from by_hand import Ticks, bits
from sessions import session_of
from together import on_threads

from flax_magics.base import threads
from flax_magics.base.threads import Interrupts, Running, Unfinished, elsewhere, uninterrupted
from flax_magics.compile.cache import ProgramCache


def test_an_interrupt_waits_for_the_end_of_the_block():
    done = []
    before = signal.getsignal(signal.SIGINT)

    def commit():
        with uninterrupted():
            signal.raise_signal(signal.SIGINT)
            done.append(1)

    with pytest.raises(KeyboardInterrupt):
        commit()
    assert done == [1]
    assert signal.getsignal(signal.SIGINT) is before


def test_another_thread_is_left_alone():
    done = []

    def run():
        with uninterrupted():
            done.append(signal.getsignal(signal.SIGINT))

    on_threads(run)
    assert done == [signal.getsignal(signal.SIGINT)]


def test_an_interrupt_is_noted_and_raised_where_it_is_asked_for():
    done = []

    def block() -> None:
        with Interrupts() as interrupts:
            signal.raise_signal(signal.SIGINT)
            done.append(interrupts.signal is not None)
            interrupts.check()
            done.append("not raised")

    with pytest.raises(KeyboardInterrupt):
        block()
    assert done == [True]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("before", [False, True])
def test_in_an_opened_block_an_interrupt_is_raised_at_once(before):
    done = []

    def block() -> None:
        with Interrupts() as interrupts:
            if before:
                signal.raise_signal(signal.SIGINT)
            with interrupts.opened():
                done.append("opened")
                signal.raise_signal(signal.SIGINT)
                done.append("not raised")

    with pytest.raises(KeyboardInterrupt):
        block()
    assert done == ([] if before else ["opened"])


def test_one_that_was_dropped_where_it_was_raised_is_raised_by_the_next_check():
    def block() -> None:
        with Interrupts() as interrupts:
            with (
                interrupts.opened(),
                contextlib.suppress(KeyboardInterrupt),
            ):  # as in a callback of the garbage collector
                signal.raise_signal(signal.SIGINT)
            interrupts.check()
            raise AssertionError

    with pytest.raises(KeyboardInterrupt):
        block()


def test_a_handler_that_raises_nothing_is_called_once_for_each():
    called, before = [], signal.signal(signal.SIGINT, lambda *_: called.append(True))
    try:
        with Interrupts() as interrupts:
            with interrupts.opened():
                signal.raise_signal(signal.SIGINT)
            interrupts.check()
    finally:
        signal.signal(signal.SIGINT, before)
    assert called == [True]


@pytest.mark.parametrize("error", [None, ValueError("of its own")])
def test_an_interrupt_that_nobody_asked_for_is_raised_at_the_end_and_never_in_the_place_of_an_error(error):
    def block() -> None:
        with Interrupts():
            signal.raise_signal(signal.SIGINT)
            if error is not None:
                raise error

    with pytest.raises(KeyboardInterrupt if error is None else ValueError):
        block()


def test_elsewhere_is_another_thread_with_the_arguments_as_arrays():
    unfinished = Unfinished()

    def function(x: Any, tree: Any) -> Any:
        return threading.current_thread().name, x, tree

    name, x, tree = elsewhere(function, (2.0, {"a": np.float32(1)}), unfinished, lambda: ())
    assert name == "flax_magics run"
    assert (x.dtype, x.weak_type) == ("float32", True)
    assert (tree["a"].dtype, tree["a"].weak_type) == ("float32", False)
    assert unfinished.wait is None


def test_what_it_raises_is_passed_on():
    def function() -> None:
        raise KeyError("of the user's")

    with pytest.raises(KeyError, match="of the user's"):
        elsewhere(function, (), Unfinished(), lambda: ())


def test_settings_of_this_thread_alone_keep_it_here():
    from flax_magics.compile.disk_cache import jax_settings

    def function() -> str:
        return threading.current_thread().name

    assert elsewhere(function, (), Unfinished(), jax_settings) == "flax_magics run"
    with jax.default_matmul_precision("float32"):
        assert elsewhere(function, (), Unfinished(), jax_settings) == threading.current_thread().name


def test_an_interrupt_leaves_the_rest_to_be_waited_for(monkeypatch):
    unfinished, go_on, done = Unfinished(), threading.Event(), []

    def function() -> None:
        go_on.wait(10)
        done.append(1)

    def interrupt(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(threads.concurrent.futures, "wait", interrupt)
        with pytest.raises(KeyboardInterrupt):
            elsewhere(function, (), unfinished, lambda: ())
    assert (done, unfinished.wait is None) == ([], False)
    threading.Timer(0.05, go_on.set).start()
    unfinished.finish()
    assert (done, unfinished.wait) == ([1], None)


def test_an_error_of_a_run_that_was_given_up_is_nobodys():
    def fail() -> None:
        raise ValueError

    unfinished = Unfinished(fail)
    unfinished.finish()
    assert unfinished.wait is None


class Computing:
    """An array that a device computes: it is ready when it was asked for the `asked`th time, or when it is waited for."""

    def __init__(self, asked: int, error: Exception | None = None) -> None:
        self.asked, self.error, self.waits, self.looks = asked, error, 0, 0

    def is_ready(self) -> bool:
        self.asked, self.looks = self.asked - 1, self.looks + 1
        return self.asked <= 0

    def block_until_ready(self) -> None:
        self.asked, self.waits = 0, self.waits + 1
        if self.error is not None:
            raise self.error


def test_the_time_of_a_program_ends_where_it_was_first_seen_to_be_ready(monkeypatch):
    clock, unfinished, slept = Ticks(), Unfinished(), []
    running = Running((Computing(2), {}), 0.0, clock, unfinished)
    assert [running.look(), running.look()] == [False, True]
    clock.now += 40.0
    assert running.finish(lambda: slept.append(1)) == 1.0
    assert (slept, unfinished.wait) == ([], None)

    monkeypatch.setattr(threads, "POLLED", 0.0)
    array = Computing(10)
    assert Running((array, {}), 0.0, Ticks(), unfinished).finish(lambda: slept.append(1)) == 1.0
    assert (slept, array.waits > 0, unfinished.wait) == ([1], True, None)


def test_a_program_that_takes_long_is_not_asked_again_and_again():
    array = Computing(10)
    assert Running((array, {}), 0.0, Ticks(), Unfinished()).finish(lambda: None, threads.LONG * 2) == 1.0
    assert (array.looks, array.waits > 0) == (1, True)


def test_the_time_of_a_program_begins_at_its_dispatch():
    clock = Ticks()
    cache, computing = ProgramCache(clock), Computing(3)

    def executable(*arguments: Any) -> Any:
        assert clock.now == 1.0  # the clock was looked at just before
        clock.now += 5.0
        return computing, {}

    running = cache.begin(SimpleNamespace(executable=executable), {}, {}, {})
    clock.now += 10.0
    assert [running.look(), running.look(), running.look()] == [False, False, True]
    clock.now += 40.0
    assert (running.finish(print), computing.waits, cache.unfinished.wait) == (16.0, 1, None)


def test_a_program_that_failed_is_no_result_although_it_is_ready():
    with pytest.raises(RuntimeError, match="on the device"):
        Running((Computing(0, RuntimeError("on the device")), {}), 0.0, Ticks(), Unfinished()).finish(print)


def test_the_next_run_waits_before_its_clock_starts_and_says_so():
    from flax_magics.report.text import normal

    clock = Ticks()
    session = session_of(nn.Dense(3), clock=clock)
    session.apply("net", jnp.ones((2, 4)))
    heard: list[str] = []
    session.services.on_phase = heard.append

    def wait() -> None:
        clock.now += 40.0

    session.programs.unfinished.wait = wait
    run = session.apply("net", jnp.ones((2, 4)))
    assert (run.timing.busy, run.timing.wait, run.timing.run) == (41.0, 1.0, 1.0)
    assert heard == ["waiting for the interrupted run, then net", "waiting for the inputs of net", "running net"]
    assert "  wait  the interrupted run had the device for 41.0 s more\n        inputs were ready after" in normal(run)
    assert session.apply("net", jnp.ones((2, 4))).timing.busy == 0.0


class Calls(nn.Module):
    @nn.compact
    def __call__(self, x, scale):
        return jax.pure_callback(lambda v: v * 2, jax.ShapeDtypeStruct(x.shape, x.dtype), nn.Dense(4)(x)) * scale


def test_a_program_that_calls_back_gives_the_bits_by_hand_run_after_run():
    session = session_of(Calls())
    x = jnp.ones((2, 4))
    for scale in (2.0, 3.0):
        run = session.apply("net", x, scale)
        variables = session.models["net"].variables
        assert bits(run.output) == bits(jax.jit(Calls().apply)(variables, x, scale))
    assert session.programs.unfinished.wait is None
    with jax.default_matmul_precision("float32"):
        run = session.apply("net", x, 3.0)
        assert bits(run.output) == bits(jax.jit(Calls().apply)(variables, x, 3.0))
