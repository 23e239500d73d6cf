"""What was otherwise when a training went on is told, stays with it, and leaves it without a replay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from msgspec.structs import replace
from sessions import session_of

from flax_magics import FlaxMagicsError, Session
from flax_magics.state.training import Optimizer

X = np.random.RandomState(0).randn(6, 4).astype(np.float32)
DATA = {"x": X, "y": np.arange(6)}
LOOKS = {"x": X[:2], "y": np.arange(2)}
SCALE = SLOPE = 1.0
RATE = 0.1


class Net(nn.Module):
    @nn.compact
    def __call__(self, x: Any, train: bool = False) -> Any:
        return SLOPE * nn.Dense(1)(nn.BatchNorm(use_running_average=not train)(x))


class OfNnx(nnx.Module):
    def __init__(self) -> None:
        self.norm, self.last = nnx.BatchNorm(4, rngs=nnx.Rngs(0)), nnx.Linear(4, 1, rngs=nnx.Rngs(0))

    def __call__(self, x: Any) -> Any:
        return self.last(self.norm(x))


def loss(net: Any, batch: Any, power: Any, train: bool) -> Any:
    return (SCALE * jnp.abs(net(batch["x"], train=train)[:, 0] - batch["y"]) ** power).mean()


def other(net: Any, batch: Any, power: Any, train: bool) -> Any:
    return (jnp.abs(net(batch["x"], train=train)[:, 0] - batch["y"]) ** power).sum()


def loss_of_nnx(net: Any, batch: Any) -> Any:
    return ((net(batch["x"])[:, 0] - batch["y"]) ** 2).mean()


@pytest.fixture(scope="module")
def trained() -> Session:
    session = session_of(Net())
    session.train(loss, "net", DATA, 2.0, optimizer=optax.sgd(RATE, 0.9), steps=2, eval=LOOKS)
    return session


@pytest.fixture
def session(trained):
    """A session in which `net` was trained for two steps."""
    state = trained._state
    yield trained
    trained._state = state


def resumed(session: Session, **otherwise: Any) -> list[str]:
    """What is said of a training that goes on for a step more."""
    given = {"loss": loss, "data": DATA, "power": 2.0, "eval": LOOKS, "optimizer": None, **otherwise}
    loss_now, data, power = (given.pop(name) for name in ("loss", "data", "power"))
    steps = session._state.models["net"].training.step + 1
    run = session.train(loss_now, "net", data, power, steps=steps, resume=True, **given)
    return [note.text for note in run.notes if note.kind == "resume"]


ROLLED = {"x": np.roll(X, 1), "y": DATA["y"]}
SAID = {
    "other values": ({"data": ROLLED}, "it goes on with other data: `data['x']` has other values"),
    "fewer rows": (
        {"data": {"x": X[:5], "y": np.arange(5)}},
        "it goes on with other data: `data['x']` is float32[5,4], and was float32[6,4], `data['y']` is int32[5], and was"
        " int32[6]",
    ),
    "another leaf": ({"data": {**DATA, "z": X}}, "it goes on with other data: `data` is put together otherwise"),
    "an argument": ({"power": 2.5}, "it goes on with other arguments: `power` is 2.5, and was 2.0"),
    "other looks": ({"eval": {**LOOKS, "x": X[2:4]}}, "it looks at other data: `data['x']` has other values"),
    "another loss": ({"loss": other}, "it goes on with another loss: `other` for `loss`"),
    "another rate": (
        {"optimizer": optax.sgd(RATE / 2, 0.9)},
        "it goes on with another optimizer: optax.… has other numbers or functions now",
    ),
}


@pytest.mark.parametrize("case", SAID)
def test_what_is_otherwise_than_before_is_told_stays_and_leaves_no_replay(session, case):
    otherwise, text = SAID[case]
    assert resumed(session, **otherwise) == [f"after 2 steps {text}"]
    assert resumed(session, **otherwise) == [f"after 2 steps {text}"]
    with pytest.raises(FlaxMagicsError) as raised:
        session.replay("last")
    assert str(raised.value) == f"draw 1 of seed 0 cannot be run again: after 2 steps {text}."


def test_what_is_as_before_is_told_in_no_word_whatever_holds_it(session):
    same = {"x": jnp.asarray(X), "y": DATA["y"].astype(np.int32)}
    assert resumed(session, data=same, optimizer=optax.sgd(RATE, 0.9), power=float("2")) == []
    assert session.replay("last").trained.losses.shape == (3,)


def test_code_that_was_edited_meanwhile_is_told(session, monkeypatch):
    monkeypatch.setitem(globals(), "SCALE", 2.0)
    expected = "after 2 steps it goes on with another loss: `loss` was edited, or what it reads is other now"
    assert resumed(session) == [expected]

    monkeypatch.setitem(globals(), "SLOPE", 2.0)
    edited = "it goes on with another net: the code of net was edited, or what it reads is other now"
    assert resumed(session) == [expected, f"after 3 steps {edited}"]
    settings = "JAX or Flax is set otherwise than before: its precision, its devices, its flags or the like"
    with jax.default_matmul_precision("float32"):
        assert resumed(session) == [expected, f"after 3 steps {edited}", f"after 4 steps {settings}"]


def by_apply(session: Session) -> str:
    session.apply("net", X, mode="train")
    return "another run updated batch_stats of net: it goes on with that"


def by_code(session: Session) -> str:
    params = session.models["net"].variables["params"]
    params["Dense_0"]["bias"] = params["Dense_0"]["bias"] + 1
    return "the weights of net were changed by your code: it goes on with these"


@pytest.mark.parametrize("change", [by_apply, by_code])
def test_variables_that_were_changed_meanwhile_are_told(change: Callable[[Session], str]):
    session = session_of(Net())
    session.train(loss, "net", DATA, 2.0, optimizer=optax.sgd(RATE), steps=1)
    text = change(session)
    assert resumed(session, eval=None) == [f"after 1 step {text}"]
    assert resumed(session, eval=None) == [f"after 1 step {text}"]


def test_variables_of_an_nnx_module_that_were_changed_meanwhile_are_told():
    session = session_of(OfNnx())
    module = session.models["net"].module

    def said(steps: int) -> list[str]:
        options = {"optimizer": optax.sgd(RATE)} if steps == 1 else {"resume": True}
        run = session.train(loss_of_nnx, "net", DATA, steps=steps, **options)
        return [note.text for note in run.notes if note.kind == "resume"]

    assert said(1) == []
    nnx.update(module, jax.tree.map(jnp.copy, nnx.state(module)))  # the same values
    assert said(2) == []
    session.apply("net", X, mode="train")
    expected = ["after 2 steps another run updated BatchStat of net: it goes on with that"]
    assert said(3) == expected
    module.last.bias[...] = module.last.bias[...] + 1
    expected.append("after 3 steps the weights of net were changed by your code: it goes on with these")
    assert said(4) == expected


def test_what_only_a_file_tells_is_compared_by_its_text(session, tmp_path):
    assert resumed(session, data=ROLLED) != []
    session.save(tmp_path / "session.safetensors")
    loaded = session_of(Net())
    loaded.load(tmp_path / "session.safetensors")
    entry = loaded._state.models["net"]
    assert entry.training.code is None
    optimizer = Optimizer("optax.sgd(0.2)", optax.sgd(0.2, 0.9))
    loaded._state = replace(loaded._state, models={"net": replace(entry, optimizer=optimizer)})
    assert resumed(loaded, loss=other) == [
        "after 2 steps it goes on with other data: `data['x']` has other values",
        "after 3 steps it goes on with other data: `data['x']` has other values",
        "after 3 steps it goes on with another loss: `other` for `loss`",
        "after 3 steps it goes on with another optimizer: optax.sgd(0.2) for optax.…",
    ]
