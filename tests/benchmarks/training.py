"""The rows of trainings: windows of many steps, by hand and ours in turn; and the first step in a fresh process."""

from __future__ import annotations

import importlib.util
import socket
from collections.abc import Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from .cells import Laps, Seconds, in_shell
from .fresh import IMPORTS, LOAD
from .table import Row

SETUP = f"""\
{IMPORTS}import time
import numpy as np
import optax
from flax import nnx
import flax_magics
size, batch = 12_800, 128
train = {{'image': jax.random.normal(jax.random.key(1), (size, 64)), 'label': jnp.arange(size) % 10}}

def loss(net, batch):
  logits = net(batch['image'])
  ce = optax.softmax_cross_entropy_with_integer_labels(logits, batch['label']).mean()
  return ce, {{'accuracy': (logits.argmax(-1) == batch['label']).mean()}}

def rows_of(steps):
  order, per_epoch = None, size // batch
  for i in range(steps):
    if i % per_epoch == 0:
      order = np.asarray(jax.random.permutation(jax.random.fold_in(jax.random.key(2), i), size), np.int32)
    yield order[i % per_epoch * batch:][:batch]

tx = optax.adamw(1e-3)
take = jax.jit(lambda data, rows: jax.tree.map(lambda array: array[rows], data))
"""
MODEL = """\
class MLP(nn.Module):
  @nn.compact
  def __call__(self, x):
    return nn.Dense(10)(nn.relu(nn.Dense(128)(x)))

net = MLP()
"""
MODELS = """\
class Normed(nn.Module):
  @nn.compact
  def __call__(self, x, train=False):
    x = nn.BatchNorm(use_running_average=not train)(nn.Dense(128)(x))
    return nn.Dense(10)(nn.Dropout(0.1, deterministic=not train)(nn.relu(x)))

class CNN(nn.Module):
  @nn.compact
  def __call__(self, x):
    x = x.reshape(-1, 8, 8, 1)
    for _ in range(3):
      x = nn.relu(nn.Conv(32, (3, 3))(x))
    return nn.Dense(10)(x.mean((1, 2)))

class NnxMLP(nnx.Module):
  def __init__(self, rngs):
    self.hidden, self.out = nnx.Linear(64, 128, rngs=rngs), nnx.Linear(128, 10, rngs=rngs)

  def __call__(self, x):
    return self.out(nnx.relu(self.hidden(x)))

normed, cnn = Normed(), CNN()
module, own_module = (NnxMLP(nnx.Rngs(0)) for _ in range(2))
optimizer = nnx.Optimizer(own_module, tx, wrt=nnx.Param)

def loss_in_mode(net, batch, train):
  return loss(lambda x: net(x, train=train), batch)
"""
BY_HAND = """\
def made(net):
  variables = net.init(jax.random.key(0), train['image'][:batch])
  params = variables.pop('params')
  return params, variables, tx.init(params)

def updated(net, options, state, batch, key, i):
  params, rest, opt_state = state
  def loss_of(params):
    variables, rngs = {'params': params, **rest}, {'dropout': jax.random.fold_in(key, i)}
    outputs = {}
    def apply(x):
      outputs['y'] = net.apply(variables, x, rngs=rngs, mutable=list(rest), **options)
      return outputs['y'][0]
    value, metrics = loss(apply, batch)
    return value, (metrics, outputs['y'][1])
  (value, (metrics, rest)), grads = jax.value_and_grad(loss_of, has_aux=True)(params)
  changes, opt_state = tx.update(grads, opt_state, params)
  return (optax.apply_updates(params, changes), rest, opt_state), value, metrics

def two_programs(net, **options):
  step = jax.jit(lambda state, batch, key, i: updated(net, options, state, batch, key, i))
  return lambda state, rows, key, i: step(state, take(train, rows), key, i)

def one_program(net, **options):
  @jax.jit
  def step(state, data, rows, key, i):
    return updated(net, options, state, jax.tree.map(lambda array: array[rows], data), key, i)
  return lambda state, rows, key, i: step(state, train, rows, key, i)

def trained(step, state, steps):
  losses, accuracies, key = [], [], jax.random.key(3)
  for i, rows in enumerate(rows_of(steps)):
    state, value, metrics = step(state, rows, key, i)
    losses.append(value)
    accuracies.append(metrics['accuracy'])
  return jax.block_until_ready(state), np.asarray(losses), np.asarray(accuracies)

"""
ALL_BY_HAND = """\
@nnx.jit
def nnx_step(module, optimizer, batch):
  (value, metrics), grads = nnx.value_and_grad(loss, has_aux=True)(module, batch)
  optimizer.update(module, grads)
  return value, metrics

def trained_nnx(steps):
  losses = [nnx_step(own_module, optimizer, take(train, rows)) for rows in rows_of(steps)]
  return jax.block_until_ready(nnx.state(own_module)), [float(value) for value, _ in losses]

steps_of = {'two': two_programs(net), 'one': one_program(net), 'cnn': one_program(cnn)}
steps_of['normed'] = one_program(normed, train=True)
states = {'two': made(net), 'one': made(net), 'cnn': made(cnn), 'normed': made(normed)}
"""
CELLS = [SETUP, LOAD, MODEL, MODELS, BY_HAND, ALL_BY_HAND]
KERAS = """\
import os
os.environ['KERAS_BACKEND'] = 'jax'
import keras
image, label = map(np.asarray, (train['image'], train['label']))
kerasnet = keras.Sequential([keras.Input((64,)), keras.layers.Dense(128, 'relu'), keras.layers.Dense(10)])
kerasnet.compile(
  keras.optimizers.AdamW(1e-3), keras.losses.SparseCategoricalCrossentropy(from_logits=True), metrics=['accuracy']
)
"""
JOIN = """\
import jax
jax.config.update('jax_cpu_collectives_implementation', 'gloo')
jax.distributed.initialize('{coordinator}', 2, {rank})
"""
ON_BOTH = """\
mesh = jax.make_mesh((jax.device_count(),), ('data',), axis_types=(jax.sharding.AxisType.Auto,))
cut, whole = (jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes)) for axes in (['data'], []))

def placed(tree):
  return jax.tree.map(lambda leaf: jax.make_array_from_callback(leaf.shape, whole, np.asarray(leaf).__getitem__), tree)

@jax.jit
def on_both(state, data, rows, i):
  batch = jax.lax.with_sharding_constraint(jax.tree.map(lambda array: array[rows], data), cut)
  state, value, metrics = updated(net, {}, state, batch, jax.random.key(3), i)
  return jax.lax.with_sharding_constraint(state, whole), value, metrics

data, state = placed(train), placed(made(net))
by_hand = 'trained(lambda state, rows, key, i: on_both(state, data, rows, i), state, steps)'
"""
WIDE = """\
class Wide(nn.Module):
  @nn.compact
  def __call__(self, x):
    for _ in range(4):
      x = nn.relu(nn.Dense(2048)(x))
    return nn.Dense(10)(x)

wide = Wide()
"""
PEAK = """\
import ctypes, threading
libc = ctypes.CDLL(None)
libc.mallopt(-3, 1 << 20)

def trimmed():
  while True:
    libc.malloc_trim(0)
    time.sleep(0.05)

threading.Thread(target=trimmed, daemon=True).start()

def held(which):
  lines = open('/proc/self/status').read().splitlines()
  return 1024 * int(next(line for line in lines if line.startswith(which)).split()[1])

with open('/proc/self/clear_refs', 'w') as file:
  file.write('5')
before = held('VmRSS')
"""
"""What the process holds, in bytes: `VmRSS` now, `VmHWM` at most from now on.

Without the holes that malloc keeps, which by chance are between a tenth and the whole of what the arrays take: each of a
megabyte or more (`M_MMAP_THRESHOLD`) is given back once it is free, and so is what XLA's compiler leaves.
"""


def _line(call: str, steps: int | str) -> str:
    return f"%flax_train -q --optimizer tx --batch 128 --steps {steps} {call}"


class Window(NamedTuple):
    """Trainings that take so many seconds by hand, whatever the machine: a row for each way to write them by hand.

    Attributes:
      trial: so many steps take some half a second by hand; how long they do says how many a window has.
      by_hand: for each row the call that does `steps` of them.
      ours: the loss's.
      setup: a cell before them.
    """

    rows: tuple[Row, ...]
    trial: int
    by_hand: tuple[str, ...]
    ours: str
    setup: str = ""

    def laps(self, pairs: int, seconds: int) -> Iterator[tuple[str, list[str]]]:
        """By hand and ours in turn, in both orders.

        What comes before them is not measured. Ours does what takes three seconds by hand, since in a shorter training
        steps are not tried in groups; a step of the CNN is too long for one.
        """
        line = _line(self.ours, "{steps}").removeprefix("%flax_train ")  # in which IPython fills in nothing
        ours = f"get_ipython().run_line_magic('flax_train', f'{line}')"
        yield "", [self.setup] if self.setup else []
        yield "", [f"steps = {min(self.trial, 100)}", *self.by_hand, f"steps = {self.trial}"]
        first = self.by_hand[0]
        yield "", [f"began = time.perf_counter()\n{first}\nin_a_second = steps / (time.perf_counter() - began)"]
        yield "", ["steps = round(in_a_second * (3 if in_a_second > 200 else 0.5))", ours]
        yield "", [f"steps = round({seconds} * in_a_second)"]
        names = [f"{row.key}/by hand" for row in self.rows]
        laps = [*zip(names, self.by_hand, strict=True), (f"{self.rows[0].key}/ours", ours)]
        for n in range(pairs):
            for name, cell in laps[:: -1 if n % 2 else 1]:
                yield name, [cell]


WINDOWS = (
    Window(
        (
            Row(
                "train", "a 64-128-10 MLP, batch 128, adamw, against a program for the batch and one for the step", 0.77
            ),
            Row("train-one", "the same against batch and step in one program", 0.87),
        ),
        1_000,
        ("trained(steps_of['two'], states['two'], steps)", "trained(steps_of['one'], states['one'], steps)"),
        "loss(net, train)",
    ),
    Window(
        (Row("train-norm", "the same with BatchNorm and Dropout", 0.83),),
        800,
        ("trained(steps_of['normed'], states['normed'], steps)",),
        "loss_in_mode(normed, train)",
    ),
    Window(
        (Row("train-nnx", "the MLP in NNX, against nnx.jit and nnx.Optimizer", 0.33),),
        500,
        ("trained_nnx(steps)",),
        "loss(module, train)",
    ),
    Window(
        (Row("train-cnn", "a CNN of some 20 ms a step, against one program", 1.02),),
        40,
        ("trained(steps_of['cnn'], states['cnn'], steps)",),
        "loss(cnn, train)",
    ),
)
if importlib.util.find_spec("keras"):  # no package that the benchmarks need: as measured, where it is there
    WINDOWS = (
        *WINDOWS,
        Window(
            (Row("train-keras", "the MLP, against Keras 3's `fit` on JAX with its bar", None),),
            500,
            ("kerasnet.fit(image, label, batch_size=batch, epochs=steps // 100, verbose=1)",),
            "loss(net, train)",
            KERAS,
        ),
    )
MEMORY = Row("train-memory", "the most memory that 10 steps take, an MLP of 52 MB with adamw", 1.1, in_bytes=True)
BOTH = Row("train-two", "the MLP in two processes on this machine, against one program started by hand in both", 1.1)
FIRST = Row("train-first", "the first step of a training in a fresh process, model and optimizer made", 1.1)


def measured(keys: Collection[str], rounds: int) -> Seconds:
    """Windows of trainings, all in one process; each of ours is a new training from the weights of the last.

    Three pairs of ten seconds by hand; with a single round one of a second.
    """
    pairs, seconds = (3, 10) if rounds > 1 else (1, 1)
    windows = [window for window in WINDOWS if any(row.key in keys for row in window.rows)]
    measured = in_shell(list(_laps(windows, pairs, seconds)))
    return measured | {
        f"{row.key}/ours": measured[f"{window.rows[0].key}/ours"] for window in windows for row in window.rows
    }


def _laps(windows: Iterable[Window], pairs: int, seconds: int) -> Iterator[tuple[str, list[str]]]:
    yield "", CELLS
    for window in windows:
        yield from window.laps(pairs, seconds)
        yield "", ["assert flax_magics.session().runs[-1].kind.trains"]


def first(keys: Collection[str], rounds: int) -> Seconds:
    """The first step, each in a process of its own with an empty cache, in turn."""
    by_hand = [MODEL, BY_HAND, "trained(two_programs(net), made(net), 1)"]
    return _fresh(FIRST, [SETUP], by_hand, [MODEL, _line("loss(net, train)", 1)], min(rounds, 3))


def both(keys: Collection[str], rounds: int) -> Seconds:
    """Trainings in two processes of one job, by hand and ours in turn, as the first of them times it."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        coordinator = f"127.0.0.1:{free.getsockname()[1]}"
    steps = 300 if rounds > 1 else 50
    sides = (f"{BOTH.key}/by hand", ["eval(by_hand)"]), (f"{BOTH.key}/ours", [_line("loss(net, train)", steps)])

    def laps(rank: int) -> Laps:
        setup = [JOIN.format(coordinator=coordinator, rank=rank), SETUP, LOAD, MODEL, BY_HAND, ON_BOTH]
        yield "", [*setup, f"steps = {steps}", "%flax_mesh -q data=-1", *(cell for _, cells in sides for cell in cells)]
        for n in range(rounds):
            yield from sides[:: -1 if n % 2 else 1]

    with ThreadPoolExecutor(2) as pool:
        first, _ = pool.map(lambda rank: in_shell(list(laps(rank))), (0, 1))
    return first


def memory(keys: Collection[str], rounds: int) -> Seconds:
    """What 10 steps take at most, over what the process holds before them; in bytes, each in a process of its own."""
    spent = "spent = held('VmHWM') - before"
    by_hand = [WIDE, BY_HAND, PEAK, "trained(one_program(wide), made(wide), 10)", spent]
    ours = [WIDE, PEAK, _line("loss(wide, train)", 10), spent]
    return _fresh(MEMORY, [SETUP], by_hand, ours, max(1, rounds // 2))


def _fresh(row: Row, setup: list[str], by_hand: list[str], ours: list[str], rounds: int) -> Seconds:
    """Cells by hand and ours in turn, each in a process of its own with an empty cache; ours loads the extension first."""
    sides: list[Laps] = [
        [("", setup), (f"{row.key}/by hand", by_hand)],
        [("", [*setup, LOAD]), (f"{row.key}/ours", ours)],
    ]
    seconds: Seconds = {}
    for n in range(rounds):
        for laps in sides[:: 1 if n % 2 == 0 else -1]:
            for name, values in in_shell(laps).items():
                seconds.setdefault(name, []).extend(values)
    return seconds
