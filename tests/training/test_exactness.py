"""Nets of every kind, linen and NNX: a training that is interrupted again and again ends with the bits of the whole."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from by_hand import bits
from interrupts import training_interrupted
from sessions import session_of
from trained_kinds import ADAMW, DATA, KINDS, net_and_loss

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
