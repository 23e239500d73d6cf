"""The same cells on two engines of ipyparallel, by `%%px` in a real kernel, and in one process with as many devices."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from kernels import RUN_JSON, Notebook
from processes import environment, printed_by

START = """
import ipyparallel, os, socket
cluster = ipyparallel.Cluster(n=2, log_level=40)
cluster.start_cluster_sync()
engines = cluster.connect_client_sync()
engines.wait_for_engines(2, timeout=120, interactive=False)
engines.activate()
with socket.create_server(("127.0.0.1", 0)) as free:
  engines[:].push(dict(coordinator=f"127.0.0.1:{free.getsockname()[1]}"), block=True)
engines[:].scatter("rank", range(2), flatten=True, block=True)
"""
JOIN = """%%px --no-stream
import jax
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.config.update("jax_enable_recoverability", True)
jax.distributed.initialize(coordinator, 2, rank)
%load_ext flax_magics"""
DIGITS = """
import jax, jax.numpy as jnp, numpy as np, optax
from flax import linen as nn
from sklearn.datasets import load_digits
digits = load_digits(n_class=4)
train = {"image": digits.images[:512, ..., None].astype(np.float32) / 16, "label": digits.target[:512]}

class Digits(nn.Module):
  @nn.compact
  def __call__(self, x, train=False):
    x = nn.avg_pool(nn.relu(nn.Conv(4, (3, 3))(x)), (2, 2), (2, 2))
    x = nn.Dropout(0.25, deterministic=not train)(x.reshape(len(x), -1))
    return nn.Dense(4)(x)

net = Digits()

def loss(net, batch, train):
  logits = net(batch["image"], train=train)
  return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()
"""
EXPORT = """%%px --no-stream
import contextlib, flax_magics, io
script = open("script.py").read()
assert "Left out" not in script, script
joined, jax.distributed.initialize = jax.distributed.initialize, lambda *_: None
with contextlib.redirect_stdout(io.StringIO()) as printed:
  exec(compile(script, "script.py", "exec"), {"__name__": "__main__", "coordinator": coordinator, "rank": rank})
jax.distributed.initialize = joined
digests = [line.split()[-1] for line in printed.getvalue().splitlines()]
assert digests == [run.digest for run in flax_magics.session().runs], printed.getvalue()"""
TRAIN = "--optimizer optax.sgd(0.05) --batch 64 --epochs 5 loss(net, train)"
ALONE = f"""
    from IPython.core.interactiveshell import InteractiveShell

    for cell in ("%load_ext flax_magics", {DIGITS!r}, "%flax_mesh -q data=-1", "run = %flax_train -q {TRAIN}"):
        InteractiveShell.instance().run_cell(cell).raise_error()
    run = InteractiveShell.instance().user_ns["run"]
    import jax, numpy as np
    print([*map(float, run.losses)])
    print([np.asarray(leaf).ravel().tolist() for leaf in jax.tree.leaves(run.output)])
"""


@pytest.fixture
def engines(start_notebook, monkeypatch) -> Iterator[Notebook]:
    for name in ("JAX_PLATFORMS", "JAX_DISABLE_MOST_OPTIMIZATIONS"):
        monkeypatch.setenv(name, environment()[name])
    notebook = start_notebook()
    try:
        notebook.run(START)
        yield notebook
    finally:
        notebook.run("cluster.stop_cluster_sync()")


@pytest.mark.smoke
def test_digits_are_trained_on_two_engines_as_in_one_process_on_two_devices(engines):
    engines.run(JOIN)
    engines.run(f"%%px --no-stream\n{DIGITS}")
    meshes = engines.run("%%px --no-stream\n%flax_mesh data=-1").displays
    line = "mesh · data=2 · cpu:0,2048 · the leading axis of arrays is cut into 2 parts"
    assert [data["text/plain"].partition("\n")[0] for data in meshes if "mesh" in data["text/plain"]] == [line]
    trained = engines.run(f"%%px --no-stream\nrun = %flax_train {TRAIN}")
    # The report of process 0, and none of the other.
    (report,) = [data for data in trained.displays if RUN_JSON in data]
    assert report["text/plain"].splitlines()[:2] == [
        "new session, seed 0 · net registered: Digits()",
        "net · train (train=True) · cpu:0,2048 · draw 1 of seed 0",
    ]
    engines.run("""%%px --no-stream
variables = %flax_vars net
weights = [np.asarray(leaf).ravel().tolist() for leaf in jax.tree.leaves(variables)]
losses = [*map(float, run.losses)]""")
    both = engines.run("print(engines[:].pull('weights', block=True))\nprint(engines[:].pull('losses', block=True))")
    (first, second), (losses, of_other) = map(eval, both.printed.splitlines())
    assert losses == of_other
    assert first == second
    expected, of_one = map(eval, printed_by(ALONE, "-W", "ignore", devices=2).splitlines())
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    one, other = (np.concatenate(leaves) for leaves in (first, of_one))
    assert np.linalg.norm(one - other) <= 1e-5 * np.linalg.norm(other)
    # The script gives these bits, too: each process prints the digests of its part.
    engines.run("%%px --no-stream\ny = %flax_apply net(train['image'])")
    engines.run("%%px --no-stream\n%flax_export -q script.py")
    engines.run(EXPORT)
    # An error comes of each, with where both stand.
    engines.run("%%px --no-stream --targets 1\nlatent = %flax_key latent")
    failed = engines.fails("%%px --no-stream\n%flax_apply --train net(train['image'])")
    text = "\n".join([*failed.outputs[-1].traceback, *(str(output) for output in failed.outputs)])
    assert text.count("process 0: seed 0, draw 3, net, program ") >= 2
    assert text.count("process 1: seed 0, draw 4, net, program ") >= 2
