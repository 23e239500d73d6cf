"""A training in a file: what `--resume` goes on with is read without running code, and held against the optimizer."""

from __future__ import annotations

import json
import os
import random
import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from by_hand import Normed, bits, notebook_x
from flax import nnx
from msgspec.structs import asdict, replace
from nnx_kinds import Own
from processes import Nursery
from safetensors.numpy import load_file
from sessions import session_of

from flax_magics import FlaxMagicsError, Session
from flax_magics.base.measures import Curve, Evaluation
from flax_magics.run import like
from flax_magics.snapshot import format
from flax_magics.state.runs import RunLog, StoredRun
from flax_magics.state.training import Optimizer, Position, Training
from flax_magics.training.resumption import begun_as, fitted_state

x = notebook_x()
TEXT = "optax.chain(optax.clip(1.0), optax.adamw(1e-3))"
ADAMW = Optimizer(TEXT, eval(TEXT, {"optax": optax}))


@pytest.fixture
def path(tmp_path):
    return tmp_path / "session.safetensors"


def trained(session: Session, parameters: object, *, steps: int = 3) -> Training:
    """What a training of `net` leaves after so many steps, put into the session."""
    state = ADAMW.transformation.init(parameters)
    for _ in range(steps):
        _, state = ADAMW.transformation.update(jax.tree.map(jnp.cos, parameters), state, parameters)
    losses = np.linspace(1, 0, steps, dtype=np.float32)
    evals = (Evaluation(2, float("nan"), {"accuracy": 0.5}),)
    curve = Curve(losses, {"accuracy": 1 - losses}, evals, 10, 5, 12 * steps, 0.25, stopped="interrupted")
    draw, call = session._state.root.draw(), "loss(net, train)"
    training = Training(
        *(draw, True, state, call, 4, 2, None, curve),
        eval="test",
        freeze=("*/bias",),
        inputs={"['x']": "float32[3,4] #0123"},
        changes=("after 1 step it goes on with other data",),
        position=Position(1, 2, [b"\x00\xff", {"next": 3}]),
    )
    entry = replace(session._state.models["net"], optimizer=ADAMW, training=training)
    session._state = replace(session._state, models={"net": entry})
    return training


def of(session: Session) -> Training:
    return session._state.models["net"].training


def plain(training: Training) -> dict[str, object]:
    """The fields of a training and of its curve, those with arrays left out."""
    curve = {
        name: value for name, value in asdict(training.curve).items() if name not in ("losses", "metrics", "evals")
    }
    rest = {name: value for name, value in asdict(training).items() if name not in ("opt_state", "curve")}
    return {**rest, **curve, "evals": repr(training.curve.evals)}


def linen() -> tuple[Session, object]:
    session = session_of(Normed())
    session.apply("net", x, train=True)
    return session, session.models["net"].variables["params"]


def module() -> tuple[Session, object]:
    session = session_of(Own(3, rngs=nnx.Rngs(0)))
    return session, nnx.state(session.models["net"].module, nnx.Param)


@pytest.mark.parametrize("api", [linen, module])
def test_a_training_comes_back_with_every_bit_and_the_classes_of_its_optimizer(path, api):
    session, parameters = api()
    training = trained(session, parameters)
    session.save(path)
    other = session_of(session.models["net"].module)
    other.load(path)
    loaded = of(other)
    assert plain(loaded) == plain(training)
    assert bits(loaded.curve.losses) == bits(training.curve.losses)
    assert bits(dict(loaded.curve.metrics)) == bits(training.curve.metrics)
    state = fitted_state(loaded, ADAMW, parameters, ADAMW, "loss(net, train)")
    assert jax.tree.structure(state) == jax.tree.structure(training.opt_state)
    assert bits(state) == bits(training.opt_state)
    # Saved again before any optimizer was named, it is still the same.
    other.save(path)
    other.load(path)
    assert plain(of(other)) == plain(training)
    assert bits(fitted_state(of(other), ADAMW, parameters, ADAMW, "loss(net, train)")) == bits(training.opt_state)


def test_the_arrays_are_in_the_file_under_their_paths(path):
    session, parameters = linen()
    trained(session, parameters)
    session.save(path)
    arrays = {name.partition(" trained with/")[2]: array for name, array in load_file(path).items()}
    assert bits(arrays["losses"]) == bits(of(session).curve.losses)
    assert bits(arrays["opt_state/1/0/mu/Dense_0/kernel"]) == bits(of(session).opt_state[1][0].mu["Dense_0"]["kernel"])


def test_the_optimizer_of_a_file_is_nothing_but_text(path):
    session, parameters = linen()
    trained(session, parameters)
    session.save(path)
    other = Session()
    other.load(path)
    other.register("net", Normed())
    optimizer = other._state.models["net"].optimizer
    assert (optimizer.text, optimizer.transformation) == (TEXT, None)


def test_the_eval_data_of_a_file_are_not_evaluated_unless_they_are_a_name(path):
    session, parameters = linen()
    crafted = f"open({str(path.with_name('ran'))!r}, 'w')"
    texts = {"test": "test", crafted: "", "(test)": "", "test\nimport os": ""}
    for text, expected in texts.items():
        training = replace(trained(session, parameters), eval=text)
        entry = replace(session._state.models["net"], training=training)
        session._state = replace(session._state, models={"net": entry})
        session.save(path)
        other = session_of(Normed())
        other.load(path)
        assert of(other).eval == expected
    assert not path.with_name("ran").exists()


def test_a_training_begins_as_no_other_models_training_in_the_same_draw():
    session, parameters = linen()
    run = like(session.apply("net", x, train=True), command="train", trained=trained(session, parameters).curve)
    log = RunLog.add(None, StoredRun(replace(run, registered="Net()")))
    assert begun_as(run, log).registered == "Net()"
    other = like(run, model="other")
    assert begun_as(other, log) is other


@pytest.mark.parametrize(
    ("other", "changes"),
    [
        ("optax.sgd(1e-3)", ["1/0 is a optax._src.transform.ScaleByAdamState in the file"]),
        (
            "optax.chain(optax.clip(1.0), optax.adamw(1e-3, mu_dtype='bfloat16'))",
            [f"1/0/mu/{name} float32→bfloat16" for name in ("BatchNorm_0/bias", "BatchNorm_0/scale")],
        ),
    ],
)
def test_another_optimizer_is_refused_with_what_its_state_has_otherwise(path, other, changes):
    session, parameters = linen()
    trained(session, parameters)
    session.save(path)
    session.load(path)
    optimizer = Optimizer(other, eval(other, {"optax": optax}))
    line = f"%flax_train --resume --steps 9 --optimizer {other} loss(net, train)"
    with pytest.raises(FlaxMagicsError) as raised:
        fitted_state(of(session), optimizer, parameters, ADAMW, line)
    message, *lines = str(raised.value).splitlines()
    assert message == (
        f"the optimizer's state after 3 steps does not fit {other}: a training goes on with the optimizer that it"
        " began with."
    )
    assert [line.strip() for line in lines[: len(changes)]] == changes
    assert lines[-1] == f"  write: %flax_train --resume --steps 9 --optimizer {TEXT} loss(net, train)"


def test_other_weights_leave_nothing_to_go_on_with(path):
    session, parameters = linen()
    trained(session, parameters)
    session.models["net"].variables = {**session.models["net"].variables}
    session.save(path)
    session.load(path)
    entry = session._state.models["net"]
    assert (entry.training, entry.optimizer.text) == (None, TEXT)


@pytest.mark.parametrize(
    ("before", "after", "why"),
    [
        ('"group": 1', '"group": 0', "the training of `net` has a number of steps that is none"),
        ('"group": 1', '"group": 10001', "the training of `net` has a number of steps that is none"),
        ('["losses", {"numpy": "net trained with/losses"}]', '["losses", 1]', "has losses or metrics that are none"),
        ('["losses", ', '["lost", ', "the training of `net` is none"),
        ('"taken": true', '"taken": 1', "is not what it should be"),
        ('"batches": 2', '"batches": -2', "the training of `net` has a position in its data that is none"),
        ('"bytes": "net trained with/position/0"', '"bytes": "history of"', "names an array that is not there"),
        ('"bytes": "net trained with/position/0"', '"bytes": "net trained with/losses"', "has a node that is none"),
    ],
)
def test_a_damaged_training_is_refused(path, before, after, why):
    session, parameters = linen()
    trained(session, parameters)
    session.save(path)
    contents = format.read(path)
    text = json.dumps(contents.document)
    assert before in text
    format.write(path, json.loads(text.replace(before, after)), contents.arrays)
    with pytest.raises(FlaxMagicsError, match=why):
        Session().load(path)


def test_the_curve_of_a_run_is_in_the_history_and_a_longer_one_takes_its_place(path):
    session, parameters = linen()
    run = session.apply("net", x, train=True)
    saved = []
    session.autosave(path)
    for steps in (2, 5):
        curve = trained(session, parameters, steps=steps).curve
        stored = StoredRun(like(run, command="train", trained=curve))
        session._state = replace(session._state, runs=replace(session._state.runs, last=stored))
        session.autosaving.offer(session._state)
        session.autosaving.flush()
        other = Session()
        other.load(path)
        saved.append([(run.command, run.steps) for run in other.runs])
        assert bits(other.runs[-1].losses) == bits(curve.losses)
        assert bits(other.runs[-1].metrics) == bits(curve.metrics)
        assert repr(other.runs[-1].eval) == repr(curve.evals)
    session.autosave(None)
    assert saved == [[("apply", 0), ("train", 2)], [("apply", 0), ("train", 5)]]


TRAINED = """
    import time
    import jax
    from trained_kinds import ADAMW, DATA, KINDS, net_and_loss
    from flax_magics import Session
    from flax_magics.base.digest import digest_of
    from flax_magics.snapshot import save
    from flax_magics.training import train

    save.REST, train.OFTEN, train.SHOWN = 0.0, 0.01, 0.01

    def child(api, path, steps):
        session = Session()
        net, function = net_and_loss(api, *KINDS)
        session.register("net", net)
        if os.path.exists(path):
            session.load(path)
        session.autosave(path)
        training = session._state.models["net"].training
        step = 0 if training is None else training.step
        session.services.on_progress = lambda run: os.write(1, f"at {run.steps}\\n".encode())
        os.write(1, f"step {step} of {os.getpid()}\\n".encode())
        run = session.train(
            function, "net", DATA, optimizer=ADAMW, batch=8, steps=int(steps), resume=training is not None
        )
        state = jax.tree.leaves(session._state.models["net"].training.opt_state)
        os.write(1, f"digest {digest_of((run.losses, dict(run.metrics), run.output, state))}\\n".encode())
        while True:  # until it is killed
            time.sleep(1)
"""

MOMENTS = int(os.environ.get("FLAX_MAGICS_KILLS", "3"))
"""At how many moments it is killed; `FLAX_MAGICS_KILLS=20` takes some minutes."""


@pytest.mark.alike
@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no kill -9 on Windows")
@pytest.mark.parametrize("api", ["linen", "nnx"])
def test_killed_again_and_again_it_ends_with_the_bits_of_one_that_was_not(path, api):
    rng, steps, begins = random.Random(0), 1500, []
    with Nursery(TRAINED) as nursery:

        def started(file):
            """Its process, and the step from which it goes on."""
            nursery.bear(api, file, steps)
            line = nursery.line()
            while line[0] != "step":  # of the one before
                line = nursery.line()
            _, step, _, child = line
            return int(child), int(step)

        def digest():
            line = nursery.line()
            while line[0] == "at":
                line = nursery.line()
            return line

        child, _ = started(path.with_name("whole.safetensors"))
        whole = digest()
        # Until it went on from so many different moments, however fast the machine is just now.
        while len(set(begins) - {0, steps}) < MOMENTS and len(begins) < 20 * MOMENTS:
            os.kill(child, signal.SIGKILL)
            if begins and begins[-1] == steps:
                path = path.with_name(f"from_{len(begins)}.safetensors")
            child, step = started(path)
            begins.append(step)
            for _ in range(rng.randrange(3, 9)):
                if nursery.line()[0] == "digest":
                    break
        os.kill(child, signal.SIGKILL)
        started(path)
        assert digest() == whole
    assert len(set(begins) - {0, steps}) == MOMENTS
