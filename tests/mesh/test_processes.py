"""`%flax_mesh` over two processes: they compute what one with two devices does, and none waits for another for ever."""

from __future__ import annotations

import signal
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from processes import Job, printed_by

from flax_magics import Session

HEAD = """
    import os, signal, sys, threading, time
    import jax, jax.numpy as jnp, numpy as np, optax
    from flax import linen as nn, nnx
    from flax_magics import FlaxMagicsError, Session

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, train=False):
            make = nn.with_partitioning(nn.initializers.lecun_normal(), ("data", None))
            x = nn.BatchNorm(use_running_average=not train)(nn.Dense(16)(x.reshape(len(x), -1)))
            return nn.Dense(4, kernel_init=make)(nn.Dropout(0.5, deterministic=not train)(nn.tanh(x)))

    class Own(nnx.Module):
        def __init__(self, rngs):
            self.hidden, self.norm = nnx.Linear(16, 8, rngs=rngs), nnx.BatchNorm(8, rngs=rngs)
            self.dropout, self.out = nnx.Dropout(0.5, rngs=rngs), nnx.Linear(8, 4, rngs=rngs)

        def __call__(self, x):
            return self.out(self.dropout(self.norm(self.hidden(x.reshape(len(x), -1)))))

    def own_loss(own, batch):
        return ((own(batch["image"]) - batch["label"][:, None]) ** 2).mean()

    def loss(net, batch, train):
        logits = net(batch["image"], train=train)
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()

    image = np.asarray(jax.random.normal(jax.random.key(5), (48, 4, 4)))
    data = {"image": image, "label": (image.sum((1, 2)) > 0) * 2 + (image[:, 0, 0] > 0)}

    def whole(array):
        return np.asarray(jax.experimental.multihost_utils.process_allgather(array, tiled=True))

    def weights(session, name="net"):
        return [whole(leaf) for leaf in jax.tree.leaves(session.models[name].collections())]

    def session_of():
        session = Session()
        session.register("net", Net())
        session.mesh("data=-1")
        session.services.deadline = 60.0
        return session
"""

NUMBERS = f"""{HEAD}
    import jax.experimental.multihost_utils
    numbers = {{}}
    session = session_of()
    runs = [session.apply("net", image, mode="train") for _ in range(3)]
    numbers["mask"] = whole(runs[2].output)
    assert [run.program for run in runs] == ["compiled", "reused", "reused"]
    assert session.replay(2).agreement.identical
    gradients = session.grad(loss, "net", data)
    numbers["gradients"] = np.array([row.squares for row in gradients.layers if row.path != ("Dense_1",)])
    run = session.train(loss, "net", data, optimizer=optax.sgd(0.05), batch=16, steps=40, eval=data)
    numbers["losses"], numbers["looks"] = run.losses, [look.loss for look in run.eval]
    numbers |= {{f"sgd{{n}}": leaf for n, leaf in enumerate(weights(session))}}
    session.save("session.safetensors")
    many = session.apply("net", image, mode="train", samples=3)
    numbers["many"] = whole(many.output)
    assert session.replay(many.draw).agreement.identical
    session.register("own", Own(nnx.Rngs(0)))
    numbers["own mask"] = whole(session.apply("own", image, mode="train").output)
    numbers["own many"] = whole(session.apply("own", image, mode="train", samples=3).output)
    numbers["own gradients"] = np.array([row.squares for row in session.grad(own_loss, "own", data).layers])
    numbers["own losses"] = session.train(own_loss, "own", data, optimizer=optax.sgd(0.05), batch=16, steps=6).losses
    numbers |= {{f"own weights{{n}}": leaf for n, leaf in enumerate(weights(session, "own"))}}
    run = session.train(loss, "net", data, optimizer=optax.adam(1e-2), batch=20, epochs=4)
    numbers |= {{f"adam{{n}}": leaf for n, leaf in enumerate(weights(session))}}
    np.savez(f"numbers{{jax.process_index()}}of{{jax.process_count()}}.npz", **numbers)
"""

APART = f"""{NUMBERS}
    def fails(run, *args, **kwargs):
        before = session._state
        try:
            run(*args, **kwargs)
        except FlaxMagicsError as error:
            assert session._state is before or "train" in run.__name__
            return str(error)
        raise AssertionError("it did not fail")

    other, draws = 1 - rank, session.draws
    assert run.device == "cpu:0,2048" and session.mesh().axes == "data=2"
    assert os.path.exists("session.safetensors")
    assert fails(session.mesh, data=1).startswith("data=1 leaves process 1 of this job without a device")
    # Another draw, other arrays, another program: an error on both, before anything runs.
    if rank == 1:
        session.key("latent")
    text = fails(session.apply, "net", image, mode="eval")
    assert text.startswith("net was not begun: the processes of this job do not stand at the same place"), text
    for number in (0, 1):
        assert f"\\n  process {{number}}: seed 0, draw {{draws + 1 + number}}, net, program " in text, text
    if rank == 0:
        session.key("latent")
    text = fails(session.apply, "net", image + rank)
    assert text.startswith("net was not begun: its arrays, or its variables, are not the same in all processes"), text
    text = fails(session.apply, "net", np.repeat(image, 1 + rank, 0))
    assert text.count(f"seed 0, draw {{draws + 2}}, net, program ") == 2, text
    # What each process has of its own is one array once it was made that, and both take part in it.
    parts = jax.make_array_from_process_local_data(session.mesh().batch, image[24 * rank : 24 * rank + 24])
    assert (whole(session.apply("net", parts).output) == whole(session.apply("net", image).output)).all()
    # No answer: an error with who did not, and the next line finds both together.
    session.services.deadline = 1.0
    if rank == 0:
        text = fails(session.apply, "net", image, eager=True)
        assert text.startswith("net was not begun: process 1 did not answer within 1 s"), text
        assert text.endswith("\\n  process 1: no answer"), text
    else:
        time.sleep(2)
    session.services.deadline = 60.0
    session.apply("net", image, eager=True)
    # A training that one leaves ends in both with the same step, and both go on.
    for batches, error, steps in ((7, FlaxMagicsError, 7), (9, KeyError, 6)):

        def give():
            for n in range(9):
                if rank == 1 and n == steps:
                    if error is KeyError:
                        raise KeyError("mine")
                    return
                yield {{name: leaf[:16] for name, leaf in data.items()}}

        try:
            session.train(loss, "net", give(), optimizer=optax.sgd(0.01), steps=9)
        except (FlaxMagicsError, KeyError) as raised:
            assert type(raised) is (error if rank else FlaxMagicsError)
            assert rank or str(raised).startswith(f"loss(net, data) ends here: process 1 stopped after {{steps}} steps: ")
        assert session.runs[-1].steps == steps
    steps = session.runs[-1].steps

    def look(run):
        if rank == 0 and run.steps > 20:
            os.kill(os.getpid(), signal.SIGINT)

    signal.signal(signal.SIGINT, signal.default_int_handler)  # a test that was begun in the background ignores it
    session.services.on_progress = look
    try:
        session.train(loss, "net", data, optimizer=optax.sgd(0.01), batch=16, steps=100_000)
    except (FlaxMagicsError, KeyboardInterrupt) as raised:
        assert type(raised) is (FlaxMagicsError if rank else KeyboardInterrupt), raised
        assert not rank or str(raised).endswith(f"process 0 stopped after {{session.runs[-1].steps}} steps: interrupted.")
    session.services.on_progress = lambda run: None
    run = session.train(loss, "net", data, resume=True, steps=session.runs[-1].steps + 110)
    np.savez(f"resumed{{rank}}.npz", *weights(session))
    # One is killed: the other is told which, keeps its finished steps, and goes on alone.
    if rank == 1:

        def die(run):
            if run.steps > 20:
                open("died", "w").write(repr(time.time()))
                os.kill(os.getpid(), signal.SIGKILL)

        session.services.on_progress = die
    text = fails(session.train, loss, "net", data, optimizer=optax.sgd(0.01), batch=16, steps=100_000)
    now = time.time()
    assert text == "loss(net, data) was given up: process 1 has ended.\\n  %flax_mesh off goes on in one process", text
    assert now - float(open("died").read()) < 1
    assert session.runs[-1].steps > 20
    text = fails(session.apply, "net", image)
    assert text.startswith("net was not begun: process 1 has ended, and cannot take part."), text
    text = fails(session.mesh, "off")
    assert text.startswith("%flax_mesh off: parts of `net` were in a process that has ended, and are lost."), text
    print("done", flush=True)
    os._exit(0)
"""


def _alike(name: str, one: np.lib.npyio.NpzFile, other: np.lib.npyio.NpzFile, close: float) -> None:
    """The arrays of that name agree within `close` of the norm of all."""
    names = [key for key in other if key.startswith(name)]
    apart = sum(((one[key] - other[key]) ** 2).sum() for key in names) ** 0.5
    assert apart <= close * sum((other[key] ** 2).sum() for key in names) ** 0.5


def test_two_processes_compute_what_one_does_and_none_waits_for_ever(tmp_path: Path):
    with Job(APART, str(tmp_path)) as job:
        status, output = job.ended(0)
        assert (status, output.splitlines()[-1]) == (0, "done"), output + job.ended(1, 30)[1]
        assert job.ended(1)[0] == -signal.SIGKILL
    printed_by(
        f"import os; os.chdir({str(tmp_path)!r})\n" + "\n".join(line[4:] for line in NUMBERS.splitlines()), devices=2
    )
    first, second, alone = (np.load(tmp_path / f"numbers{name}.npz") for name in ("0of2", "1of2", "0of1"))
    assert all((first[name] == second[name]).all() for name in first)
    assert ((first["mask"] == 0) == (alone["mask"] == 0)).all()
    for name in ("gradients", "losses", "looks", "many", "own mask", "own many", "own gradients", "own losses"):
        np.testing.assert_allclose(first[name], alone[name], rtol=1e-5, atol=1e-6, err_msg=name)
    _alike("own weights", first, alone, 1e-5)
    _alike("sgd", first, alone, 1e-5)
    _alike("adam", first, alone, 1e-2)
    both = [np.load(tmp_path / f"resumed{rank}.npz") for rank in (0, 1)]
    assert all((both[0][name] == both[1][name]).all() for name in both[0])


KILLED = """
    import os, signal, time
    import jax.numpy as jnp
    from flax import linen as nn
    from flax_magics import FlaxMagicsError, Session

    def loss(net, batch):
        return (net(batch) ** 2).mean()

    session, x = Session(), jnp.ones((6, 4))
    session.register("net", nn.Dense(2))
    session.mesh("data=-1")
    session.services.deadline = 60.0
    for _ in range(2):
        session.apply("net", x)
    # A program that ran before is exchanged once in a hundred draws, and else dispatched at once.
    exchanges = session.mesh().processes._number
    for _ in range(100):
        session.apply("net", x)
    assert session.mesh().processes._number == exchanges + 1
    session.grad(loss, "net", x)
    if rank == 1:
        open("died", "w").write(repr(time.time()))
        os.kill(os.getpid(), signal.SIGKILL)
    while not os.path.exists("died"):
        time.sleep(0.01)
    try:
        session.grad(loss, "net", x)
        raise AssertionError("it did not fail")
    except FlaxMagicsError as error:
        took = time.time() - float(open("died").read())
        assert "process 1 has ended" in str(error), error
    assert took < 1, took
    print("told", flush=True)
    time.sleep(HEARTBEAT + 10)
    session.mesh("off")
    assert session.apply("net", x).device == f"cpu:{2048 * rank}"
    print("lives", flush=True)
    open(f"lives{rank}", "w").close()
    while rank == 0 and not os.path.exists("lives2"):
        time.sleep(0.01)
    os._exit(0)
"""


@pytest.mark.parametrize("recoverable", [True, False], ids=["recoverable", "not recoverable"])
def test_the_others_live_on_where_that_was_asked_for_and_else_end_within_the_heartbeat(tmp_path: Path, recoverable):
    heartbeat, script = 12, KILLED.replace("HEARTBEAT", "12")
    with Job(script, str(tmp_path), 3, heartbeat=heartbeat, recoverable=recoverable) as job:
        assert job.ended(1)[0] == -signal.SIGKILL
        for rank in (0, 2):
            status, output = job.ended(rank, 60 if recoverable else heartbeat + 6)
            assert "told\n" in output
            assert ((status, "lives\n" in output) == (0, True)) is recoverable, output


LEFT = f"""{HEAD}
    session = session_of()
    run = session.train(loss, "net", data, optimizer=optax.sgd(0.05), batch=16, steps=10)
    session.save("session.safetensors")
    if rank == 0:
        np.save("losses.npy", run.losses)

        def die(run):
            if run.steps > 20:
                os.kill(os.getpid(), signal.SIGKILL)

        session.services.on_progress = die
    session.train(loss, "net", data, optimizer=optax.sgd(0.05), batch=16, steps=100_000)
"""


def test_without_process_0_none_outlives_the_heartbeat_and_a_saved_session_resumes(tmp_path: Path):
    with Job(LEFT, str(tmp_path), heartbeat=20) as job:
        assert job.ended(0)[0] == -signal.SIGKILL
        status, _ = job.ended(1, limit=20)
    assert status != 0
    here: dict[str, Any] = {}
    exec(textwrap.dedent(HEAD), here)
    session = Session()
    session.register("net", here["Net"]())
    (note,) = [note.text for note in session.load(tmp_path / "session.safetensors").notes]
    assert note.startswith("saved on the mesh data=2, and here runs are without a mesh: ")
    run = session.train(here["loss"], "net", here["data"], optimizer=here["optax"].sgd(0.05), resume=True, steps=20)
    assert (run.losses[:10] == np.load(tmp_path / "losses.npy")).all()
    assert run.steps == 20
