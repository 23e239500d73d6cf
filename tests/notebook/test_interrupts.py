"""Ctrl-C that somebody swallows strikes again; one on its way out is left alone."""

from __future__ import annotations

import contextlib
import gc
import signal
import sys
import time

import pytest
from together import on_threads

from flax_magics.notebook.interrupts import InterruptGuard


@pytest.fixture(autouse=True)
def handlers():
    """Python's handler is in place, and so it is afterwards."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    hook = sys.unraisablehook
    yield
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert sys.unraisablehook is hook
    signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def command():
    interrupts = InterruptGuard()
    guarded = interrupts.begin()
    error = None
    try:
        yield
    except BaseException as raised:
        error = raised
        raise
    finally:
        interrupt = interrupts.end(error) if guarded else None
        if interrupt is not None:
            raise interrupt


@contextlib.contextmanager
def ended(error=KeyboardInterrupt, match=None):
    """A command that ends with this error."""
    with pytest.raises(error, match=match), command():
        yield


def press():
    signal.raise_signal(signal.SIGINT)


def work(seconds=30.0):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(0.001)


def test_one_that_is_swallowed_many_times_strikes_as_often():
    lost = []
    with ended():
        for _ in range(4):
            try:
                press() if not lost else work()
            except KeyboardInterrupt:
                lost.append(1)
        work()
    assert len(lost) == 4


def test_one_in_a_callback_of_the_garbage_collector_is_not_printed_and_strikes_again(capfd):
    def callback(phase, info):
        if phase == "start":
            gc.callbacks.remove(callback)
            press()

    done = []
    with ended():
        gc.callbacks.append(callback)
        gc.collect()
        done.append(1)
        work()
    assert done == [1]
    assert capfd.readouterr() == ("", "")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_what_else_cannot_be_raised_is_told_as_ever(monkeypatch):
    told = []
    monkeypatch.setattr(sys, "unraisablehook", lambda lost: told.append(lost.exc_type))

    class Careless:
        def __del__(self):
            raise ValueError("no")

    with command():
        Careless()
    assert told == [ValueError]
    monkeypatch.undo()


def test_one_that_is_being_handled_is_left_alone():
    done = []

    def cleaned():
        try:
            press()
        finally:
            work(0.3)
            with contextlib.suppress(ValueError):
                raise ValueError
            work(0.1)
            done.append("cleaned")

    @contextlib.contextmanager
    def managed():
        try:
            yield
        finally:
            work(0.2)
            done.append("managed")

    with ended(), managed():
        cleaned()
    assert done == ["cleaned", "managed"]


def test_a_second_press_strikes_while_the_first_is_handled():
    done = []
    with ended():
        try:
            press()
        finally:
            press()
            done.append(1)
    assert done == []


def test_a_system_error_that_it_was_made_is_an_interrupt_again():
    with ended():
        try:
            press()
        except KeyboardInterrupt as error:
            raise SystemError("returned a result with an exception set") from error


def test_an_error_that_somebody_made_of_it_stays():
    with ended(RuntimeError, match=r"^mine$"):
        try:
            press()
        except KeyboardInterrupt:
            work(0.2)
            raise RuntimeError("mine") from None


def test_one_that_was_lost_strikes_at_the_end_at_the_latest():
    done = []
    with ended():
        with contextlib.suppress(KeyboardInterrupt):
            press()
        done.append(1)
    assert done == [1]


class Frame:
    """A signal comes between two bytecodes: it is its frame that says which function's."""

    def __init__(self, function):
        self.f_code = function.__code__


def test_one_within_begin_strikes_a_little_later():
    interrupts = InterruptGuard()
    interrupts.begin()
    signal.getsignal(signal.SIGINT)(signal.SIGINT, Frame(InterruptGuard.begin))
    with pytest.raises(KeyboardInterrupt) as caught:
        work()
    assert interrupts.end(caught.value) is None


@pytest.mark.parametrize("error", [None, ValueError()])
def test_one_within_end_strikes_after_it_unless_there_is_an_error(error):
    interrupts = InterruptGuard(work.__code__)
    interrupts.begin()
    signal.getsignal(signal.SIGINT)(signal.SIGINT, Frame(work))
    signal.getsignal(signal.SIGINT)(signal.SIGINT, Frame(InterruptGuard.end))
    assert isinstance(interrupts.end(error), KeyboardInterrupt if error is None else type(None))


def test_a_handler_of_the_users_own_is_left_in_place():
    heard = []

    def mine(number, frame):
        heard.append(number)

    signal.signal(signal.SIGINT, mine)
    with command():
        assert signal.getsignal(signal.SIGINT) is mine
        press()
    assert heard == [signal.SIGINT]
    signal.signal(signal.SIGINT, signal.default_int_handler)


def test_one_that_the_block_sets_stays_too():
    def mine(number, frame):
        pass

    with command():
        signal.signal(signal.SIGINT, mine)
    assert signal.signal(signal.SIGINT, signal.default_int_handler) is mine


def test_a_question_that_another_handler_got_swallows_no_interrupt_of_the_next_command():
    guard, asked = InterruptGuard(), []
    guard.begin()
    with contextlib.suppress(KeyboardInterrupt):
        press()
    signal.signal(signal.SIGINT, lambda *_: asked.append(True))
    while not asked:
        time.sleep(0.001)
    guard.end(None)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    guard.begin()
    with pytest.raises(KeyboardInterrupt) as raised:
        press()
    guard.end(raised.value)


def test_another_thread_changes_nothing():
    found = []

    def run():
        with command():
            found.append(signal.getsignal(signal.SIGINT))

    on_threads(run)
    assert found == [signal.default_int_handler]


def test_nothing_is_asked_after_the_end():
    with ended():
        press()
    work(0.3)  # Python's own handler would raise


def test_one_guard_serves_one_command_after_the_other_and_none_inside_another():
    interrupts, done = InterruptGuard(), []
    for _ in range(2):
        assert interrupts.begin()
        assert not interrupts.begin()
        with contextlib.suppress(KeyboardInterrupt):
            press()
        with pytest.raises(KeyboardInterrupt) as caught:
            work()
        assert interrupts.end(caught.value) is None
        done.append(signal.getsignal(signal.SIGINT) is signal.default_int_handler)
        assert interrupts.begin()
        work(0.2)  # what is asked of the command before is nothing to this one
        assert interrupts.end(None) is None
    assert done == [True, True]


def test_a_training_that_is_stopped_binds_its_run_to_the_name_of_o(notebook):
    notebook("net = nn.Dense(2)\nimport optax")
    notebook(
        "class Batches:\n  def __iter__(self):\n    yield x\n    yield x\n    raise KeyboardInterrupt\n"
        "def loss(net, x):\n  return net(x).sum()"
    )
    line = "%flax_train {}--optimizer optax.sgd(0.1) --steps 9 loss(net, Batches())"
    for option, name in (("-o stopped ", "stopped"), ("", "flax_magics.session().runs[-1]")):
        assert f"! interrupted after 2 steps · `{name}` is its Run\n" in notebook.fails(line.format(option))
    assert notebook["stopped"] is notebook.session.runs[0]
    assert (notebook["stopped"].steps, notebook["stopped"].notes[-1].text) == (2, "interrupted after 2 steps")
