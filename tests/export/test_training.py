"""Exports of `%flax_train`: the script does the same steps by hand, with the bits of the session."""

from __future__ import annotations

import jax
import pytest
from exporting import NNX_NET, NORMED, assert_same, compared, digests_of, exported, printed
from msgspec.structs import replace

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
test = {"x": jax.random.normal(jax.random.key(8), (11, 4)), "y": jnp.ones((11, 3))}
"""
MASKED = """\
%%flaxmodel
class Masked(nn.Module):
  @nn.compact
  def __call__(self, x, train=False):
    mask = self.variable("masks", "of_x", lambda: jnp.full(3, -jnp.inf).at[0].set(0.0))
    return jnp.where(jnp.isfinite(mask.value), nn.BatchNorm(use_running_average=not train)(nn.Dense(3)(x)), 0.0)

masked = Masked()
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


KINDS = """\
%%flaxmodel
class Convolved(nn.Module):
  @nn.compact
  def __call__(self, x):
    x = nn.relu(nn.Conv(4, (3,))(x))
    return nn.Dense(3)(x.reshape(len(x), -1))

class Attending(nn.Module):
  training: bool = False

  @nn.compact
  def __call__(self, x):
    x = nn.LayerNorm()(nn.Dense(8)(x))
    x = nn.MultiHeadDotProductAttention(2, dropout_rate=0.3, deterministic=not self.training)(x)
    return nn.Dense(3)(x.mean(1))

class Recurrent(nn.Module):
  @nn.compact
  def __call__(self, x):
    return nn.Dense(3)(nn.RNN(nn.LSTMCell(5))(x)[:, -1])

class Mixed(nnx.Module):
  def __init__(self, rngs):
    self.conv, self.norm = nnx.Conv(2, 8, (3,), rngs=rngs), nnx.BatchNorm(8, rngs=rngs)
    self.attention = nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs)
    self.lstm, self.dropout = nnx.RNN(nnx.LSTMCell(8, 5, rngs=rngs)), nnx.Dropout(0.3, rngs=rngs)
    self.out = nnx.Linear(5, 3, rngs=rngs)

  def __call__(self, x):
    x = self.attention(nnx.relu(self.norm(self.conv(x))))
    return self.out(self.dropout(self.lstm(x)[:, -1]))

convolved, attending, recurrent = Convolved(), Attending(), Recurrent()
"""


def looks_of(run):
    """The looks at `--eval` data as a script prints them."""
    looks = ((look.step, look.loss, dict(look.metrics)) for look in run.eval)
    return [f"namespace(step={step}, loss={loss!r}, metrics={metrics!r})" for step, loss, metrics in looks]


def looks_in(lines):
    return [line for line in lines if line.startswith("namespace(")]


def test_a_linen_net_with_batches_of_shuffled_arrays(notebook, tmp_path):
    script = assert_same(
        notebook,
        tmp_path,
        NORMED,
        LOSS,
        "%flax_train -q --optimizer optax.adamw(1e-2) --batch 8 --epochs 3 --eval test loss(normed, train)",
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
    epoch_key = jax.random.fold_in(row_order_key, epoch)
    order = np.asarray(jax.random.permutation(epoch_key, size))
  rows = order[8 * place : 8 * (place + 1)]
  state, values = train_step(optimizer, state, data, rows, step, dropout_key)
  curve.append(values)
  if (step + 1) % 3 == 0:
    means = evaluate(state[0], eval_data)
    evals.append(types.SimpleNamespace(step=step + 1, **means))
    print(evals[-1])
variables, opt_state, _ = state
"""
        in script
    )
    # Losses, looks and the optimizer's state are those of the session, too.
    (first, *_, run), entry = notebook.session.runs, notebook.session._state.models["normed"]
    lines = printed(f"{script}\n{SHOWN}", tmp_path)
    assert looks_in(lines) == looks_of(first)
    last = [line.split()[-1] for line in lines[-2:]]
    assert last == [run.losses.tobytes().hex(), digest_of(jax.tree.leaves(entry.training.opt_state))]


def test_nets_of_every_kind(notebook, tmp_path):
    assert_same(
        notebook,
        tmp_path,
        "from flax import nnx",
        KINDS,
        "%flaxmodel mixed = Mixed()",
        "import optax\ndef loss(net, batch):\n  return ((net(batch['x']) - batch['y']) ** 2).mean()",
        "data = {'x': jax.random.normal(jax.random.key(7), (22, 6, 2)), 'y': jnp.ones((22, 3))}",
        *(
            f"%flax_train -q --optimizer optax.adamw(1e-2) --batch 8 --epochs 3 loss({name}, data)"
            for name in ("convolved", "attending", "recurrent", "mixed")
        ),
    )


def test_a_whole_batch_and_an_iterable_with_the_losses_that_are_asked_for(notebook, tmp_path):
    script, lines = compared(
        notebook,
        tmp_path,
        NORMED,
        LOSS,
        "variables = %flax_init normed(x)",
        "tx = optax.sgd(0.1, momentum=0.9)",
        "%flax_train -q --steps 5 --optimizer tx --eval train loss(normed, train)",
        "batches = [{name: array[n : n + 9] for name, array in train.items()} for n in (0, 9)]",
        "%flax_train -q --epochs 2 --eval batches loss(normed, batches)",
        "for rate in (0.1, 0.01):\n    %flax_train -q --steps 3 --optimizer optax.adam(rate) loss(normed, batches)",
    )
    looks = [line for run in notebook.session.runs if run.trained for line in looks_of(run)]
    assert looks_in(lines) == looks
    assert "  means = jax.tree.map(float, evaluate(state[0], eval_data))\n" in script


def test_the_script_looks_for_numbers_that_are_not_finite_where_the_session_does(notebook, tmp_path):
    script = assert_same(
        notebook,
        tmp_path,
        MASKED,
        LOSS,
        "%flax_train -q --optimizer optax.sgd(0.1) --steps 3 loss(masked, train)",
    )
    assert "leaves = jax.tree.leaves((value, grads, new_params, updates))\n" in script


def test_an_nnx_module(notebook, tmp_path):
    script, lines = compared(
        notebook,
        tmp_path,
        "from flax import nnx",
        NNX_NET,
        PLAIN,
        "many = jax.random.normal(jax.random.key(7), (22, 4))",
        "%flax_train -q --optimizer optax.adamw(1e-2) --batch 8 --epochs 2 --eval x.reshape(-1,4) loss(net, many)",
        "%flax_apply --eval -q net(x);",
        "%flax_train -q --steps 3 --freeze hidden loss(net, many)",
    )
    assert "graphdef, params, stats, rest = nnx.split(net_copy, nnx.Param, nnx.BatchStat, ...)\n" in script
    assert "nnx.update(net, params, stats)\n" in script
    assert looks_in(lines) == looks_of(notebook.session.runs[1])


def test_a_training_that_was_interrupted_goes_on_where_its_cells_did(notebook, tmp_path):
    notebook(NORMED)
    notebook(LOSS)
    notebook(STOPS)
    notebook("looks = Stops([train])")
    line = "%flax_train -q --optimizer optax.adam(1e-2) --batch 8 --steps 20 --eval looks loss(normed, train)"
    notebook.fails(line)
    notebook("%flax_apply --train -q normed(x)")
    notebook("%flax_train -q --resume --eval test loss(normed, train)")
    assert [(run.command, run.steps) for run in notebook.session.runs] == [("train", 20), ("apply", 0)]
    script = exported(notebook)
    assert "for step in range(4):\n" in script
    assert "for step in range(4, 20):\n" in script
    train, apply = notebook.session.runs
    lines = printed(script, tmp_path)
    assert digests_of(lines) == [apply.digest, train.digest]
    # In the second look it was stopped: that is done first as it goes on, with statistics that the apply has changed.
    assert looks_in(lines) == looks_of(train)


@pytest.mark.alike
def test_one_that_did_not_go_on_is_written_with_the_steps_that_are_finished(notebook, tmp_path):
    notebook(NORMED)
    notebook(LOSS)
    notebook(STOPS)
    notebook("looks = Stops([train])")
    notebook.fails("%flax_train -q --optimizer optax.adam(1e-2) --steps 20 --eval looks loss(normed, train)")
    notebook("%flax_apply --eval -q normed(x)")
    script = exported(notebook)
    assert digests_of(printed(script, tmp_path)) == [run.digest for run in notebook.session.runs]


@pytest.mark.parametrize("batch", ["--batch 4 ", ""])
def test_several_steps_in_one_program_are_so_in_the_script(notebook, tmp_path, monkeypatch, batch):
    notebook(NORMED)
    notebook(LOSS)
    monkeypatch.setattr(TrainingLoop, "curve", property(lambda loop: replace(curve(loop), group=3)))
    notebook(f"%flax_train -q --optimizer optax.adam(1e-2) {batch}--steps 31 --eval test loss(normed, train)")
    script = exported(notebook)
    assert "    return train_step(optimizer, state, data, rows, step, dropout_key)\n" in script or not batch
    assert "state, values = train_steps(" in script
    assert "  until = min(look for look in looks if look > step)\n" in script
    (run,), lines = notebook.session.runs, printed(f"{script}\n{SHOWN}", tmp_path)
    assert digests_of(lines)[:1] == [run.digest]
    assert looks_in(lines) == looks_of(run)
    assert lines[-2] == run.losses.tobytes().hex()


@pytest.mark.alike
def test_arrays_that_stay_on_the_host_do_so_in_the_script(notebook, tmp_path, monkeypatch):
    monkeypatch.setattr("flax_magics.training.data._fits", lambda tree: False)
    script = assert_same(
        notebook,
        tmp_path,
        NORMED,
        LOSS,
        "import numpy as np\ntrain = jax.tree.map(np.asarray, train)",
        "%flax_train -q --optimizer optax.adamw(1e-2) --batch 8 --epochs 3 --eval test loss(normed, train)",
    )
    assert "data = jax.tree.map(np.asarray, train)\n" in script
    assert "batch = jax.tree.map(lambda array: array[rows], data)\n" in script
    assert printed(f"{script}\n{SHOWN}", tmp_path)[-2] == notebook.session.runs[0].losses.tobytes().hex()


BATCHES = "batches = [{name: np.asarray(array[n : n + 4]) for name, array in train.items()} for n in range(0, 22, 4)]"


def test_several_batches_of_an_iterable_in_one_program_are_so_in_the_script(notebook, tmp_path, monkeypatch):
    notebook(NORMED)
    notebook(LOSS)
    notebook(f"import numpy as np\n{BATCHES}")
    monkeypatch.setattr(TrainingLoop, "curve", property(lambda loop: replace(curve(loop), group=2)))
    notebook("%flax_train -q --optimizer optax.adam(1e-2) --epochs 2 --eval test loss(normed, batches)")
    notebook("%flax_train -q --resume --steps 20 loss(normed, batches)")
    notebook("%flax_train -q --optimizer optax.sgd(1e-2) --steps 5 loss(normed, iter(batches))")
    script = exported(notebook)
    assert "fits = place % 2 == 0 and place + 2 <= 6 and step + 2 <= 12\n" in script
    assert "batch in enumerate(part, step):\n" in script
    assert script.count("state, values = train_steps(") == 3
    first, last = notebook.session.runs
    lines = printed(f"{script}\n{SHOWN}", tmp_path)
    assert digests_of(lines)[:2] == [first.digest, last.digest]
    assert looks_in(lines) == looks_of(first)
    assert lines[-2].split()[-1] == last.losses.tobytes().hex()


@pytest.mark.alike
def test_names_that_are_bound_again_stand_for_what_they_stood_for(notebook, tmp_path):
    script, lines = compared(
        notebook,
        tmp_path,
        NORMED,
        LOSS,
        "tx = optax.sgd(0.1)",
        "%flax_train -q --optimizer tx --steps 2 loss(normed, train)",
        "tx = optax.adam(0.1)",
        "train = {name: array[:7] for name, array in train.items()}",
        "run = %flax_train -q --steps 2 loss(normed, train)",
        "assert run.losses.shape == (2,)",
        "train = {name: array[:5] for name, array in train.items()}",
        "%flax_train -q --resume --steps 3 --eval train loss(normed, train)",
        "run = %flax_train -q --resume --steps 4 --optimizer optax.sgd(0.5) loss(normed, test)",
        "assert run.losses.shape == (4,)",
    )
    assert "optimizer = tx\n" in script
    assert looks_in(lines) == looks_of(notebook.session.runs[-1])


@pytest.mark.alike
def test_a_net_and_a_loss_that_were_edited_before_it_goes_on(notebook, tmp_path):
    script = assert_same(
        notebook,
        tmp_path,
        NORMED,
        LOSS,
        "%flax_train -q --optimizer optax.sgd(0.1) --steps 2 loss(normed, train)",
        NORMED.replace("nn.Dense(3)(x)", "nn.relu(nn.Dense(3)(x))"),
        "%flax_train -q --resume --steps 4 loss(normed, train)",
        LOSS.replace("** 2", "** 4"),
        "%flax_train -q --resume --steps 6 loss(normed, train)",
    )
    assert script.count("def train_step(") == 3


@pytest.mark.alike
def test_a_loss_in_its_own_cell_a_generator_and_an_optimizer_that_takes_the_loss(notebook, tmp_path):
    script = assert_same(
        notebook,
        tmp_path,
        NORMED,
        LOSS,
        "%%flax_train -q --optimizer optax.lbfgs() --steps 2\n"
        "def mine(net, x, train):\n    return (net(x, train=train) ** 2).mean()\nmine(normed, train['x'])",
        "def some():\n    for n in range(6):\n        yield {name: array[n : n + 4] for name, array in train.items()}",
        "%flax_train -q --optimizer optax.sgd(0.1) --steps 5 loss(normed, some())",
        "%flax_train -q --resume --steps 7 loss(normed, some())",
        "batches = list(some())",
        "%flax_train -q --steps 4 loss(normed, batches)",
        "batches = batches[::-1]",
        "%flax_train -q --resume --steps 8 loss(normed, batches)",
    )
    assert "    value_fn=lambda params: loss_of(params)[0],\n" in script


def test_a_loss_that_is_called_like_a_variable_of_the_step_has_no_lines(notebook):
    notebook(NORMED)
    notebook("import optax\ndef value(net, x, train):\n    return (net(x, train=train) ** 2).mean()")
    notebook("%flax_train -q --optimizer optax.sgd(0.1) --steps 2 value(normed, x)")
    notebook("%flax_grad -q value(normed, x)")
    reason = "# Left out: its lines have a variable called `value`: another name for yours mends it.\n"
    assert exported(notebook).count(reason) == 1


@pytest.mark.parametrize(
    ("model", "name", "call"), [(NORMED, "normed", "net(x, train=train)"), (NNX_NET, "net", "net(x)")]
)
def test_one_that_goes_on_with_another_loss_has_each_in_its_part(notebook, tmp_path, model, name, call):
    script = assert_same(
        notebook,
        tmp_path,
        "import optax\nfrom flax import nnx",
        model,
        "batch = jnp.ones((6, 4))\ndef of(net, x):\n    return (net(x) ** 2).mean()",
        f"%flax_train -q --optimizer optax.sgd(0.1) --steps 3 of({name}, batch)",
        f"def of(net, x, train, scale=1.0):\n    y = {call}\n    return scale * (y ** 4).mean(), {{'y': y.mean()}}",
        f"%flax_train -q --resume --steps 5 of({name}, batch)",
        f"%flax_train -q --resume --steps 7 of({name}, batch, scale=2.0)",
        "def other(net, x):\n    return abs(net(x)).mean()",
        f"%flax_train -q --resume --steps 9 other({name}, batch)",
    )
    assert "Left out" not in script


def from_a_file(notebook, file, *cells, after):
    """The script of a session that saves itself after `cells`, loads the file again, and runs the cells of `after`."""
    for cell in (*cells, f"%flax_save -q {file}", f"%flax_load -q {file}", *after):
        notebook(cell)
    return exported(notebook)


@pytest.mark.alike
def test_a_training_of_a_file_goes_on(notebook, tmp_path):
    script = from_a_file(
        notebook,
        f"{tmp_path}/a.safetensors",
        NORMED,
        LOSS,
        "%flax_train -q --optimizer optax.adam(1e-2) --batch 8 --epochs 1 --eval test loss(normed, train)",
        after=(
            "%flax_train -q --resume --epochs 2 --optimizer optax.adam(1e-2) --eval test loss(normed, train)",
            "run = %flax_train -q --resume --epochs 3 --eval test loss(normed, train)",
            "print('losses', run.losses.tobytes().hex(), [look.loss for look in run.eval])",
            "%flax_apply --train -q normed(x)",
        ),
    )
    train, apply = notebook.session.runs
    lines = printed(script, tmp_path)
    assert digests_of(lines) == [train.digest, apply.digest]
    assert looks_in(lines) == looks_of(train)[1:]
    losses = f"losses {train.losses.tobytes().hex()} {[look.loss for look in train.eval]}"
    assert [line for line in lines if line.startswith("losses")] == [losses]
    assert "# The training in the file began in draw 1 of seed 0.\n" in script


def test_that_of_an_nnx_module_goes_on_too(notebook, tmp_path):
    script = from_a_file(
        notebook,
        f"{tmp_path}/a.safetensors",
        "from flax import nnx",
        NNX_NET,
        PLAIN,
        "%flax_train -q --optimizer optax.adam(1e-2) --steps 2 loss(net, x.reshape(-1,4))",
        after=("%flax_train -q --resume --steps 4 --optimizer optax.adam(1e-2) loss(net, x.reshape(-1,4))",),
    )
    assert digests_of(printed(script, tmp_path)) == [notebook.session.runs[-1].digest]


@pytest.mark.alike
def test_one_of_a_file_that_is_another_now_says_so(notebook, tmp_path):
    script = from_a_file(
        notebook,
        f"{tmp_path}/a.safetensors",
        NORMED,
        LOSS,
        "%flax_train -q --optimizer optax.sgd(0.1) --steps 2 loss(normed, train)",
        after=(
            "%flax_train -q --resume --steps 4 --optimizer optax.sgd(0.1) loss(normed, train)",
            f"%flax_save -q {tmp_path}/a.safetensors",
            "%flax_apply --eval -q normed(x)",
        ),
    )
    reason = (
        f"the variables of `normed` came from `{tmp_path}/a.safetensors`, which is not the file any more that it was"
    )
    resumed = "# %flax_train -q --resume --steps 4 --optimizer optax.sgd(0.1) loss(normed, train)\n"
    assert f"# Left out: {reason}.\n{resumed}" in script
    assert f"# Left out: {reason}.\n# %flax_apply --eval -q normed(x)\n" in script
    assert digests_of(printed(script, tmp_path)) == []
