"""Exports of `%flax_train`: the script does the same steps by hand, with the bits of the session."""

from __future__ import annotations

import jax
import pytest
from exporting import NNX_NET, NORMED, assert_same, digests_of, exported, printed
from msgspec.structs import replace

from flax_magics.base.curve import Task
from flax_magics.base.digest import digest_of
from flax_magics.training.loop import TrainingLoop

curve = TrainingLoop.curve.fget

pytestmark = pytest.mark.usefixtures("optimised")

LOSS = """\
import optax
def loss(net, batch, train, scale=1.0):
    y = net(batch["x"], train=train)
    return scale * ((y - batch["y"]) ** 2).mean(), {"mean": y.mean(), "loss": y.std()}
train = {"x": jax.random.normal(jax.random.key(7), (22, 4)), "y": jnp.ones((22, 3))}
"""
PLAIN = """\
import optax
def loss(net, x):
    return (net(x) ** 2).mean()
"""
SHOWN = """\
import numpy as np
print(np.array([each["loss"] for each in curve]).tobytes().hex())
print_digest("", jax.tree.leaves(opt_state))
"""
STOPS = """\
class Stops(list):
    looks = 0
    def __iter__(self):
        self.looks += 1
        if self.looks == 2:
            raise KeyboardInterrupt
        return super().__iter__()
"""


def test_a_linen_net_with_batches_of_shuffled_arrays(notebook, tmp_path):
    script = assert_same(
        notebook,
        tmp_path,
        NORMED,
        LOSS,
        "%flax_train -q --optimizer optax.adamw(1e-2) --batch 8 --epochs 3 loss(normed, train)",
        "%flax_apply --train --keys-of 1 -q normed(x)",
        "%flax_train -q --batch 5 --steps 7 --freeze */bias loss(normed, train, scale=2.0)",
    )
    assert "first_batch = jax.tree.map(lambda array: array[:8], data)\n" in script
    assert "variables = nn.init(loss, normed)(params_key, first_batch, train=False)\n" in script
    assert (
        """\
for step in range(9):
  epoch, place = divmod(step, 3)
  if place == 0:
    order = jax.random.permutation(
      jax.random.fold_in(row_order_key, epoch), len(jax.tree.leaves(data)[0])
    )
  rows = np.asarray(order)[8 * place : 8 * (place + 1)]
  state, values = train_step(optimizer, state, data, rows, step, dropout_key)
  curve.append(values)
variables, opt_state, _ = state
"""
        in script
    )
    # Losses and the optimizer's state are those of the session, too.
    (run,), entry = notebook.session.last(1), notebook.session._state.models["normed"]
    lines = [line.split()[-1] for line in printed(f"{script}\n{SHOWN}", tmp_path)[-2:]]
    assert lines == [run.losses.tobytes().hex(), digest_of(jax.tree.leaves(entry.training.opt_state))]


def test_a_whole_batch_and_an_iterable_with_the_losses_that_are_asked_for(notebook, tmp_path):
    assert_same(
        notebook,
        tmp_path,
        NORMED,
        LOSS,
        "variables = %flax_init normed(x)",
        "tx = optax.sgd(0.1, momentum=0.9)",
        "%flax_train -q --steps 5 --optimizer tx loss(normed, train)",
        "batches = [{name: array[n : n + 9] for name, array in train.items()} for n in (0, 9)]",
        "%flax_train -q --epochs 2 loss(normed, batches)",
        "for rate in (0.1, 0.01):\n    %flax_train -q --steps 3 --optimizer optax.adam(rate) loss(normed, batches)",
    )


def test_an_nnx_module(notebook, tmp_path):
    script = assert_same(
        notebook,
        tmp_path,
        "from flax import nnx",
        NNX_NET,
        PLAIN,
        "many = jax.random.normal(jax.random.key(7), (22, 4))",
        "%flax_train -q --optimizer optax.adamw(1e-2) --batch 8 --epochs 2 loss(net, many)",
        "%flax_apply --eval -q net(x);",
        "%flax_train -q --steps 3 --freeze hidden loss(net, many)",
    )
    assert "graphdef, params, stats, rest = nnx.split(net_copy, nnx.Param, nnx.BatchStat, ...)\n" in script
    assert "nnx.update(net, params, stats)\n" in script


def test_a_training_that_was_interrupted_goes_on_where_its_cells_did(notebook, tmp_path):
    notebook(NORMED)
    notebook(LOSS)
    notebook(STOPS)
    notebook("looks = Stops([train])")
    line = "%flax_train -q --optimizer optax.adam(1e-2) --batch 8 --steps 20 --eval looks loss(normed, train)"
    notebook.fails(line)
    notebook("%flax_apply --train -q normed(x)")
    notebook("%flax_train -q --resume --eval looks loss(normed, train)")
    assert [(run.command, run.steps) for run in notebook.session.runs] == [("train", 20), ("apply", 0)]
    script = exported(notebook)
    assert "for step in range(4):\n" in script
    assert "for step in range(4, 20):\n" in script
    train, apply = (run.digest for run in notebook.session.runs)
    assert digests_of(printed(script, tmp_path)) == [apply, train]


def test_one_that_did_not_go_on_is_written_with_the_steps_that_are_finished(notebook, tmp_path):
    notebook(NORMED)
    notebook(LOSS)
    notebook(STOPS)
    notebook("looks = Stops([train])")
    notebook.fails("%flax_train -q --optimizer optax.adam(1e-2) --steps 20 --eval looks loss(normed, train)")
    notebook("%flax_apply --eval -q normed(x)")
    script = exported(notebook)
    assert digests_of(printed(script, tmp_path)) == [run.digest for run in notebook.session.runs]


def test_the_text_of_the_eval_data_stays_in_its_comment(notebook, monkeypatch):
    notebook(NORMED)
    notebook(LOSS)
    task = Task("optax.adam(1e-2)", steps=2, eval="train\nraise SystemExit")
    monkeypatch.setattr("flax_magics.training.train.task_of", lambda *_, **__: task)
    notebook("%flax_train -q --optimizer optax.adam(1e-2) --steps 2 --eval train loss(normed, train)")
    assert "# Left out: the looks at `train raise SystemExit` while it trains.\n" in exported(notebook)


@pytest.mark.parametrize("batch", ["--batch 4 ", ""])
def test_several_steps_in_one_program_are_so_in_the_script(notebook, tmp_path, monkeypatch, batch):
    notebook(NORMED)
    notebook(LOSS)
    monkeypatch.setattr(TrainingLoop, "curve", property(lambda loop: replace(curve(loop), group=2)))
    notebook(f"%flax_train -q --optimizer optax.adam(1e-2) {batch}--steps 11 loss(normed, train)")
    script = exported(notebook)
    assert "    return train_step(optimizer, state, data, rows, step, dropout_key)\n" in script or not batch
    assert "state, values = train_steps(" in script
    assert digests_of(printed(script, tmp_path)) == [run.digest for run in notebook.session.runs]
    lines = [line.split()[-1] for line in printed(f"{script}\n{SHOWN}", tmp_path)[-2:]]
    assert lines[0] == notebook.session.runs[-1].losses.tobytes().hex()


def test_what_comes_after_a_training_of_a_file_is_left_out(notebook, tmp_path):
    for cell in (
        NORMED,
        LOSS,
        "%flax_train -q --optimizer optax.adam(1e-2) --steps 2 loss(normed, train)",
        f"%flax_save -q {tmp_path}/a.safetensors",
        f"%flax_load {tmp_path}/a.safetensors",
        "%flax_train -q --resume --steps 4 --optimizer optax.adam(1e-2) loss(normed, train)",
        "%flax_apply --eval -q normed(x)",
    ):
        notebook(cell)
    script = exported(notebook)
    assert "# Left out: it goes on with a training that has no lines.\n" in script
    assert "# Left out: the weights of `normed` come from a training that has no lines.\n" in script
    assert digests_of(printed(script, tmp_path)) == []
