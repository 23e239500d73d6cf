"""Ctrl-C during the commit strikes after it, never inside."""

from __future__ import annotations

import signal
import threading

import pytest

from flax_magics.base.critical import uninterrupted


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

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert done == [signal.getsignal(signal.SIGINT)]
