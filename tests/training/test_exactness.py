"""Nets of every kind, linen and NNX: a training that is interrupted again and again ends with the bits of the whole."""

from __future__ import annotations

import signal
import threading
import time
from typing import Any

import numpy as np
import pytest
from by_hand import bits
from interrupts import training_interrupted
from sessions import session_of
from trained_kinds import ADAMW, DATA, KINDS, net_and_loss

from flax_magics.training import train

pytestmark = pytest.mark.usefixtures("optimised")

MOMENTS = 20


def left_by(session: Any) -> tuple[Any, ...]:
    """Losses, metrics and looks of a session's training, its weights, statistics and the optimizer's state."""
    run, training = session.runs[-1], session._state.models["net"].training
    trees = (run.losses, dict(run.metrics), session.models["net"].variables, training.opt_state)
    return (*map(bits, trees), run.eval)


@pytest.mark.parametrize(
    "kinds", [pytest.param((), id="dense"), pytest.param(KINDS, id="of every kind", marks=pytest.mark.alike)]
)
@pytest.mark.parametrize("api", ["linen", "nnx"])
def test_what_is_interrupted_at_twenty_moments_ends_as_what_is_not(api, kinds):
    options = {"optimizer": ADAMW, "batch": 8, "epochs": 60, "eval": DATA}
    (net, loss), (same, _) = (net_and_loss(api, *kinds) for _ in range(2))
    whole, session = session_of(same), session_of(net)
    whole.train(loss, "net", DATA, **options)
    expected, losses = left_by(whole), whole.runs[-1].losses
    random, moments = np.random.RandomState(0), list[int]()
    while len(moments) < MOMENTS:
        finished = session.runs[-1].steps if session.runs else 0
        with training_interrupted(session, random.randint(1, 1200), of="loop.py"):
            session.train(loss, "net", DATA, resume=bool(finished), **options)
        if not session.runs:  # before the first step
            continue
        run = session.runs[-1]
        assert run.trained.stopped == "interrupted", f"it ended after {len(moments)} of them"
        # No finished step is lost, and none is counted that was not taken as in the whole.
        assert run.steps >= finished
        assert bits(run.losses) == bits(losses[: run.steps])
        moments.append(run.steps)
    session.train(loss, "net", DATA, resume=True, **options)
    assert left_by(session) == expected


# A callback of the garbage collector drops what is raised in it, and says so.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.alike
def test_of_120_presses_at_any_moment_none_loses_a_step(monkeypatch):
    monkeypatch.setattr(train, "OFTEN", 0.01)
    monkeypatch.setattr(train, "SHOWN", 0.01)
    options = {"optimizer": ADAMW, "batch": 8}
    (net, loss), (same, _) = (net_and_loss("linen") for _ in range(2))
    session, whole, random, finished = session_of(net), session_of(same), np.random.RandomState(0), 0
    main = threading.main_thread().ident
    assert main is not None

    def press(begun: threading.Event, after: float) -> None:
        begun.wait()
        time.sleep(after)
        signal.pthread_kill(main, signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background has none
    try:
        for _ in range(120):
            begun = threading.Event()
            monkeypatch.setattr(session.services, "on_progress", lambda run, begun=begun: begun.set())
            pressing = threading.Thread(target=press, args=(begun, random.uniform(0, 0.1)))
            pressing.start()
            with pytest.raises(KeyboardInterrupt):
                session.train(loss, "net", DATA, resume=bool(finished), steps=1 << 20, **options)
            pressing.join()
            assert session.runs[-1].steps > finished
            finished = session.runs[-1].steps
    finally:
        signal.signal(signal.SIGINT, before)
    assert len(session.runs) == 1
    whole.train(loss, "net", DATA, steps=finished, **options)
    assert left_by(session) == left_by(whole)
