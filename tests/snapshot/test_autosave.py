"""Saving in the background: after whatever changes variables, the last state last, and never torn."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from by_hand import SUPPORT, Normed, bits, notebook_x
from flax import nnx
from nnx_kinds import Own
from processes import Nursery, environment
from sessions import session_of

from flax_magics import FlaxMagicsError, Session
from flax_magics.snapshot import document

x = notebook_x()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "session.safetensors"


@pytest.fixture
def session():
    session = session_of(Normed())
    yield session
    session.autosave(None)


class Gate:
    """Holds writes back until it is opened, and counts them."""

    def __init__(self, monkeypatch):
        self.opened = threading.Event()
        self.entered = threading.Event()
        self.writes = 0
        write = document.write

        def held(*args):
            self.entered.set()
            assert self.opened.wait(60)
            self.writes += 1
            return write(*args)

        monkeypatch.setattr(document, "write", held)


def draws_in(path):
    session = Session()
    session.load(path)
    return session.draws


def test_it_saves_after_runs_that_changed_variables_and_after_no_other(session, path):
    session.autosave(path)
    assert draws_in(path) == 0
    session.apply("net", x, train=True)
    session.autosaving.flush()
    assert draws_in(path) == 1
    session.apply("net", x, train=False)
    session.key("latent")
    session.autosaving.flush()
    assert draws_in(path) == 1
    session.apply("net", x, train=True)
    session.autosaving.flush()
    assert draws_in(path) == 4


def test_off_is_how_it_begins_and_how_it_ends(session, path):
    assert session.autosaving is None
    session.apply("net", x, train=True)
    assert not path.exists()
    session.autosave(path)
    session.apply("net", x, train=True)
    assert session.autosave(None) is None
    assert session.autosaving is None
    assert draws_in(path) == 2  # what was noted down is written first
    session.apply("net", x, train=True)
    assert draws_in(path) == 2


def test_the_kernel_goes_on_while_it_writes_and_of_a_burst_the_last_is_written(session, path, monkeypatch):
    session.autosave(path)
    gate = Gate(monkeypatch)
    session.apply("net", x, train=True)
    assert gate.entered.wait(60)
    for draw in range(2, 22):
        assert session.apply("net", x, train=True).draw == draw
    assert draws_in(path) == 0
    gate.opened.set()
    session.autosaving.flush()
    assert gate.writes == 2  # the first of the burst, and the last
    assert draws_in(path) == 21


def test_what_changes_after_it_was_noted_down_is_not_in_it(path, monkeypatch):
    net = Own(4, rngs=nnx.Rngs(0))
    session = session_of(net)
    session.autosave(path)
    gate = Gate(monkeypatch)
    session.apply("net", x, mode="train")
    assert gate.entered.wait(60)
    mean = bits(net.norm.mean[...])
    net.norm.mean[...] = jnp.full(4, 50.0)
    gate.opened.set()
    session.autosave(None)
    (model,) = Session().load(path).waiting
    assert bits(model.variables["BatchStat"]["norm/mean"]) == mean


def test_arrays_of_numpy_that_are_written_into_later_are_saved_as_they_were(session, path, monkeypatch):
    session.autosave(path)
    gate = Gate(monkeypatch)
    weights = np.zeros(3)
    session.models["net"].variables = {"params": {"w": weights}}
    assert gate.entered.wait(60)
    weights[:] = 9.0
    session.models["net"].variables["params"]["more"] = weights
    gate.opened.set()
    session.autosaving.flush()
    (model,) = Session().load(path).waiting
    assert bits(model.variables) == bits({"params": {"w": np.zeros(3)}})


def test_buffers_that_are_given_away_before_they_are_written_are_told_and_the_file_stays(session, path, monkeypatch):
    session.apply("net", x, train=True)
    session.autosave(path)
    gate = Gate(monkeypatch)
    before = session.models["net"].variables
    session.models["net"].variables = jax.tree_util.tree_map(lambda leaf: leaf * 2, before)
    assert gate.entered.wait(60)
    session.models["net"].variables["params"]["Dense_0"]["kernel"].delete()
    gate.opened.set()
    session.autosaving.flush()
    news = session.autosaving.news()
    assert news.startswith("`net/params/Dense_0/kernel` cannot be saved: JAX says: Array has been deleted")
    assert session.autosaving.news() is None  # once
    assert draws_in(path) == 1
    session.models["net"].variables = before
    session.autosaving.flush()
    assert session.autosaving.error is None


def test_a_failure_is_told_when_it_is_turned_on_and_later_once_and_another_one_again(session, path):
    path.mkdir()
    with pytest.raises(FlaxMagicsError, match="is a folder, not a file"):
        session.autosave(path)
    assert session.autosaving is None
    path.rmdir()
    session.autosave(path)
    path.unlink()
    path.mkdir()
    for _ in range(2):
        session.apply("net", x, train=True)
        session.autosaving.flush()
    assert session.autosaving.news() == f"`{path}` is a folder, not a file."
    assert session.autosaving.news() is None
    path.rmdir()
    session.apply("net", x, train=True)
    session.autosaving.flush()
    assert (session.autosaving.news(), draws_in(path)) == (None, 3)
    path.unlink()
    path.mkdir()
    session.apply("net", x, train=True)
    session.autosaving.flush()
    assert session.autosaving.news() == f"`{path}` is a folder, not a file."


def test_a_digest_that_is_taken_later_is_in_the_next_one(session, path):
    session.autosave(path)
    run = session.apply("net", x, train=True)
    session.autosaving.flush()
    session.apply("net", x, train=True)
    digest = run.digest
    session.apply("net", x, train=True)
    session.autosaving.flush()
    other = Session()
    other.load(path)
    assert [run.digest for run in other.runs] == [digest, None, None]


ENDING = """
    import sys
    sys.path.insert(0, sys.argv[2])
    from by_hand import MyModel, notebook_x
    from flax_magics import Session
    session = Session()
    session.register("net", MyModel(3, True))
    session.autosave(sys.argv[1])
    session.init("net", notebook_x())
    session.init("net", notebook_x())
"""


def test_a_process_that_ends_writes_what_is_left(path):
    command = [sys.executable, "-c", textwrap.dedent(ENDING), str(path), SUPPORT]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=300)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert draws_in(path) == 2


SAVING = """
    import jax, jax.numpy as jnp
    import flax.linen as nn
    from flax_magics import Session
    from flax_magics.snapshot import save

    save.REST, write = 0.0, save.Autosave._write

    def told(*args):
        write(*args)
        os.write(1, b"written\\n")

    def child(path):
        session = Session()
        session.register("net", nn.Dense(3))
        session.models["net"].variables = {"params": {"all": jnp.zeros((300, 100)), "one": jnp.asarray(0)}}
        os.write(1, f"{os.getpid()}\\n".encode())
        save.Autosave._write = told
        session.autosave(path)
        n = 0
        while True:  # until it is killed
            n += 1
            session.models["net"].variables = {"params": {"all": jnp.full((300, 100), n), "one": jnp.asarray(n)}}
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no kill -9 on Windows")
def test_killed_at_twenty_moments_the_file_is_whole_each_time_and_the_next_one_is_written(path):
    rng = random.Random(0)
    numbers, left = [], 0
    with Nursery(SAVING) as nursery:
        for _ in range(20):
            nursery.bear(path)
            child = "written"
            while child == "written":  # by the one before
                (child,) = nursery.line()
            for _ in range(rng.randrange(1, 6)):
                nursery.line()
            time.sleep(rng.uniform(0.0, 0.005))
            os.kill(int(child), signal.SIGKILL)
            numbers.append(number_in(path))
            left += len(os.listdir(path.parent)) > 1
    assert len(set(numbers)) > 5  # they were killed at different moments
    assert left > 0  # and some of them in the midst of a write
    Session().save(path)
    assert draws_in(path) == 0


def number_in(path):
    """The number of which all of the file is made: of one state and a half there would be two."""
    (model,) = Session().load(path).waiting
    variables = model.variables["params"]
    assert set(np.asarray(variables["all"]).reshape(-1).astype(int)) == {int(variables["one"])}
    return int(variables["one"])
