"""The runs of a session: each is made when it is asked for, as a list has them."""

from __future__ import annotations

import copy
import gc
import pickle
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from by_hand import MyModel, keys_of, notebook_x
from IPython.lib.pretty import pretty
from sessions import session_of

from flax_magics import Session
from flax_magics.base.digest import digest_of, words
from flax_magics.execution.call import Call
from flax_magics.execution.record import Outcome
from flax_magics.line.options import ApplyOptions
from flax_magics.run import RELEASED
from flax_magics.state import runs as module


@jax.tree_util.register_pytree_node_class
class Batch:
    """A pytree that is put together by the model alone."""

    broken = False

    def __init__(self, x):
        self.x = x

    def tree_flatten(self):
        return (self.x,), None

    @classmethod
    def tree_unflatten(cls, aux, children):
        if cls.broken:
            raise TypeError("no batch")
        return cls(*children)


class Half(nn.Module):
    @nn.compact
    def __call__(self, x):
        return x / 2


class Sum(nn.Module):
    @nn.compact
    def __call__(self, batch):
        return batch.x.sum()


def again(session: Session, *args: Any) -> Outcome:
    """A run of a line that ran before, whose Run nobody has asked for."""
    outcome = session.run_again("net", Call.of("net", None, args, {}, command="%flax_apply"), ApplyOptions(), None)
    assert outcome is not None
    return outcome


@pytest.fixture
def session():
    session = session_of(Half())
    for i in range(6):
        session.apply("net", jnp.float32(i))
    return session


@pytest.mark.parametrize("near", [0, 2, 64])
def test_they_are_found_from_either_end(session, monkeypatch, near):
    monkeypatch.setattr(module, "NEAR", near)
    runs = session.runs
    draws = [1, 2, 3, 4, 5, 6]
    assert (
        [run.draw for run in runs] == [runs[i].draw for i in range(6)] == [runs[i - 6].draw for i in range(6)] == draws
    )
    assert runs[2] is runs[2]
    assert [run.draw for run in runs[-2:]] == [5, 6]
    assert [run.draw for run in runs[::-2]] == [6, 4, 2]
    for outside in (6, -7):
        with pytest.raises(IndexError):
            runs[outside]


def test_they_are_those_of_the_moment(session):
    runs = session.runs
    run = session.apply("net", jnp.float32(6))
    assert (len(runs), len(session.runs), session.runs[-1] is run, run in runs) == (6, 7, True, False)
    assert (runs == [], session_of(Half()).runs == []) == (False, True)
    assert repr(runs) == repr(list(runs))
    assert pretty(runs) == pretty(list(runs))
    assert (type(copy.copy(runs)), copy.copy(runs) == runs) == (list, True)
    assert [run.draw for run in pickle.loads(pickle.dumps(runs))] == [1, 2, 3, 4, 5, 6]


def test_keys_of_a_run_that_is_made_later_are_those_that_it_had():
    session, x = session_of(MyModel(3, True)), notebook_x()
    session.apply("net", x)
    again(session, x)
    with jax.threefry_partitionable(False):
        read = session.runs[1].keys["dropout"]
    assert words(read) == words(keys_of(2)("dropout")["dropout"])


def test_the_shape_of_an_output_is_known_after_it_is_gone(session):
    again(session, jnp.float32(1))
    run = session.runs[-1]
    assert (run.output, run.shape, run.to_json()["output"]) == (RELEASED, "float32[]", "float32[]")


def test_whether_the_last_run_trained_is_known_without_its_arrays(monkeypatch):
    session = session_of(Sum())
    assert session.last_curve is None
    session.apply("net", Batch(jnp.ones(2)))
    monkeypatch.setattr(Batch, "broken", True)
    with pytest.raises(TypeError, match="no batch"):
        session.last(1)
    assert session.last_curve is None


def test_a_run_that_was_made_later_is_that_of_the_session_while_somebody_holds_it(session):
    outcome = again(session, jnp.float32(1))
    run = session.runs[-1]
    assert (session.runs[-1] is run, session.last(1) == [run], run in session.runs) == (True, True, True)
    assert (outcome.run is run, session.history()[-1].run is run) == (True, True)


def test_the_copy_of_a_small_output_is_there_until_the_facts_are_read(session):
    outcome = again(session, jnp.float32(3))
    repeated, copied = outcome.repeated, outcome.copy
    repeated.keep(copied)
    del outcome
    assert copied == np.float32(1.5).tobytes()
    assert (session.runs[-1].output, session.runs[-1].digest) == (RELEASED, digest_of(np.float32(1.5)))
    assert copied not in gc.get_referents(repeated)
    row = repeated.recorded(copied, {"draw": 6}, True)
    assert (row["draw"], row["digest"]) == (7, digest_of(np.float32(1.5)))
