"""The rows of a run like the one before: loops in one process, by hand, ours and the floor in turn."""

from __future__ import annotations

import textwrap
from collections.abc import Collection, Iterable
from typing import NamedTuple

from .cells import Laps, Seconds, in_kernel, in_shell
from .fresh import IMPORTS, LOAD, MODEL, NOTHING
from .table import Row

PAUSE = 50e-6
"""Seconds before the bare executable is called, as in a loop of ours: XLA's thread then sleeps, and has to be woken."""
RENEW = "%unload_ext flax_magics\nflax_magics._session._current = None\n%load_ext flax_magics"
"""Begins another session: in one of some 10,000 runs the end of each cell takes longer."""


class Loop(NamedTuple):
    """A row of runs in a loop.

    Attributes:
      setup: cells; one that another loop has run is not run again.
      by_hand, floor, ours: bodies of loops, empty for none.
      pause: seconds in each pass through `floor` that are no part of it.
      end: cells after the loop, of ours; then each loop is a session of its own, and counts as one.
      runs: passes in a loop; a single one is a cell by itself.
      inside: the time is taken in the cell, before its end.
    """

    row: Row
    setup: list[str]
    by_hand: str
    floor: str
    ours: str
    pause: float = PAUSE
    end: tuple[str, ...] = ()
    runs: int = 200
    inside: bool = False

    def laps(self, rounds: int) -> Laps:
        """Each body in turn, in both orders. The first pass warms up, and is not measured."""
        bodies = {"by hand": self.by_hand, "floor": self.floor, "ours": self.ours}
        cells = {who: [self._cell(body)] for who, body in bodies.items() if body}
        cells["ours"] += self.end
        for i in range(rounds + 1):
            for who in list(cells)[:: 1 if i % 2 else -1]:
                if self.end and who == "ours":
                    yield "", [RENEW, self.ours, self.ours]
                yield f"{self.row.key}/{who}" if i else "", cells[who]

    def _cell(self, body: str) -> str:
        cell = body if self.runs == 1 else f"for i in range({self.runs}):\n{textwrap.indent(body, '  ')}"
        return f"begin = time.perf_counter()\n{cell}\nspent = time.perf_counter() - begin" if self.inside else cell

    def of_a_run(self, seconds: Seconds) -> Seconds:
        """The seconds of one pass."""
        key, runs = self.row.key, 1 if self.end else self.runs
        pauses = {f"{key}/floor": self.pause * self.runs}
        names = [name for name in seconds if name.startswith(f"{key}/")]
        return {name: [(value - pauses.get(name, 0)) / runs for value in seconds[name]] for name in names}


def bare(call: str, wait: str = "while not y.is_ready(): pass") -> str:
    """The body that calls and awaits an executable as ours can at best: IPython's empty magic, a pause, the call.

    Args:
      wait: to ask in a loop is the quickest, where Python does not take the CPU from XLA with it.
    """
    return f"""\
%nothing net(x)
until = time.perf_counter() + {PAUSE}
while time.perf_counter() < until: pass
y = {call}
{wait}
"""


SETUP = f"""\
{IMPORTS}import functools
import time
import flax_magics
{NOTHING}
"""
SHARP_BITS = """\
class MyModel(nn.Module):
  num_neurons: int
  training: bool

  @nn.compact
  def __call__(self, x):
    x = nn.Dense(self.num_neurons)(x)
    return nn.Dropout(rate=0.5, deterministic=not self.training)(x)

my_model = MyModel(num_neurons=3, training=True)
x = jax.random.uniform(jax.random.key(42), (3, 4, 4))
batches = [x + i for i in range(200)]
"""
BY_HAND = """\
root, params_key, dropout_key = jax.random.split(jax.random.key(0), 3)
variables = my_model.init(params_key, x)
apply = jax.jit(my_model.apply)
bare = apply.lower(variables, x, rngs={'dropout': dropout_key}).compile()
"""
SPLIT = "root, params_key, dropout_key = jax.random.split(root, 3)\n"
APPLY = f"{SPLIT}y = jax.block_until_ready(apply(variables, x, rngs={{'dropout': dropout_key}}))"
OURS = "y = %flax_apply -q my_model(x)"
BLOCK = "y = y.block_until_ready()"
BARE = "bare(variables, x, rngs={'dropout': dropout_key})"

NORMED = """\
class Normed(nn.Module):
  @nn.compact
  def __call__(self, x):
    x = nn.BatchNorm(use_running_average=False)(nn.Dense(3)(x))
    return nn.Dropout(0.5, deterministic=False)(x)

normed = Normed()
all_variables = normed.init(params_key, x)
update = jax.jit(functools.partial(normed.apply, mutable=['batch_stats']))
bare_update = update.lower(all_variables, x, rngs={'dropout': dropout_key}).compile()
"""
UPDATE = f"""\
{SPLIT}y, written = jax.block_until_ready(update(all_variables, x, rngs={{'dropout': dropout_key}}))
all_variables = all_variables | written
"""
NNX = """\
from flax import nnx

class Block(nnx.Module):
  def __init__(self, din, dout, *, rngs):
    self.linear = nnx.Linear(din, dout, rngs=rngs)
    self.bn = nnx.BatchNorm(dout, rngs=rngs)
    self.dropout = nnx.Dropout(0.1, rngs=rngs)

  def __call__(self, x):
    return nnx.relu(self.dropout(self.bn(self.linear(x))))

class NnxMLP(nnx.Module):
  def __init__(self, din, dmid, dout, *, rngs):
    self.block1 = Block(din, dmid, rngs=rngs)
    self.block2 = Block(dmid, dmid, rngs=rngs)
    self.linear = nnx.Linear(dmid, dout, rngs=rngs)

  def __call__(self, x):
    return self.linear(self.block2(self.block1(x)))

def compiled(net, x):
  graphdef, state = nnx.split(net)
  leaves, tree = jax.tree_util.tree_flatten(state)

  @jax.jit
  def run(leaves, x):
    net = nnx.merge(graphdef, jax.tree_util.tree_unflatten(tree, leaves))
    return net(x), jax.tree_util.tree_leaves(nnx.state(net))

  return functools.partial(run.lower(leaves, x).compile(), leaves, x)

mlp, own_mlp = (NnxMLP(4, 8, 3, rngs=nnx.Rngs(0)) for _ in range(2))
rngs = nnx.Rngs(0)
tiny, own_tiny = (nnx.Sequential(nnx.Linear(4, 3, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)) for _ in range(2))
bare_mlp, bare_tiny = compiled(mlp, x), compiled(tiny, x)

@nnx.jit
def forward(net, x):
  return net(x)
"""
LARGE = """\
net, images = MLP(), jnp.ones((128, 512))
weights = net.init(params_key, images)
train = jax.jit(net.apply, static_argnames='train')
bare_large = train.lower(weights, images, train=True, rngs={'dropout': dropout_key}).compile()
"""
EIGHT = "import os\nos.environ['XLA_FLAGS'] = '--xla_force_host_platform_device_count=8'"
SHARDED = """\
from jax.sharding import AxisType, NamedSharding, PartitionSpec
mesh = jax.make_mesh((8,), ('data',), axis_types=(AxisType.Auto,))
net, images = MLP(), jnp.ones((512, 512))
weights = jax.device_put(net.init(params_key, images), NamedSharding(mesh, PartitionSpec()))
cut = jax.device_put(images, NamedSharding(mesh, PartitionSpec('data')))
train = jax.jit(net.apply, static_argnames='train')
%flax_mesh -q data=8
"""
COMPLETE = """\
import numpy as np
from IPython.core.completer import provisionalcompleter
globals().update({f'array{i}': jax.device_put(np.zeros(i, 'f')) for i in range(100)} | {f'name{i}': i for i in range(100)})
def complete(line):
  with provisionalcompleter():
    return [match.text for match in get_ipython().Completer.completions(line, len(line))]
"""
SHOWN = """\
from IPython.utils.capture import capture_output
with capture_output() as shown:
  y = %flax_apply my_model(x)
bundle = shown.outputs[-1].data
"""
REPORTED = "y = %flax_apply my_model(x)"
SMALL = [SETUP, LOAD, SHARP_BITS, BY_HAND]
WARM = Loop(Row("warm", "warm -q, the notebook's 3-neuron model", 0.5), SMALL, APPLY, bare(BARE), OURS)
TEN_MS = Loop(
    Row("10ms", "warm -q, a model of some 10 ms, a cell for each run", 1.03),
    [*SMALL, MODEL, LARGE],
    f"{SPLIT}y = jax.block_until_ready(train(weights, images, train=True, rngs={{'dropout': dropout_key}}))",
    bare("bare_large(weights, images, rngs={'dropout': dropout_key})", BLOCK),
    "y = %flax_apply -q --train net(images)",
    runs=1,
)
IN_SHELL = (
    WARM,
    WARM._replace(
        row=Row("warm-inside", "the same, timed in the cell: without its end", None),
        inside=True,
    ),
    Loop(
        Row("bare", "the same over its bare executable, awaited in a loop of its own", 100, "µs"),
        SMALL,
        "",
        f"y = jax.block_until_ready({BARE})",
        OURS,
        0,
    ),
    Loop(
        Row("arrays", "the same, with another array as argument in each run", 0.6),
        SMALL,
        APPLY.replace(" x,", " batches[i],"),
        bare(BARE.replace(" x,", " batches[i],")),
        "batch = batches[i]\ny = %flax_apply -q my_model(batch)",
    ),
    WARM._replace(row=Row("option", "the same, with -o", 0.7), ours=OURS.replace("-q", "-q -o run")),
    Loop(
        Row("written", "the same, with BatchNorm, whose statistics it writes", 0.7),
        [*SMALL, NORMED],
        UPDATE,
        bare("bare_update(all_variables, x, rngs={'dropout': dropout_key})[0]"),
        "y = %flax_apply -q normed(x)",
    ),
    WARM._replace(
        row=Row("history", "1,000 warm runs, the cell's end, session.runs[-1] and %flax_history", 0.6),
        end=("run = flax_magics.session().runs[-1]", "%flax_history"),
        runs=1000,
    ),
    TEN_MS,
    TEN_MS._replace(row=Row("10ms-inside", "the same, timed in the cell: without its end", None), inside=True),
    # Only here NNX is imported, which the session then watches, too.
    Loop(
        Row("nnx", "warm -q, an NNX MLP of two blocks, against its awaited nnx.jit call", 0.2),
        [*SMALL, NNX],
        "y = jax.block_until_ready(forward(own_mlp, x))",
        bare("bare_mlp()[0]"),
        "y = %flax_apply -q mlp(x)",
    ),
    Loop(
        Row("tiny", "the same, Linear and Dropout alone", 0.3),
        [*SMALL, NNX],
        "y = jax.block_until_ready(forward(own_tiny, x))",
        bare("bare_tiny()[0]"),
        "y = %flax_apply -q tiny(x)",
    ),
    Loop(
        Row("completion", "Tab inside a call, a hundred arrays there", 50, "ms"),
        [*SMALL, COMPLETE],
        "",
        "",
        "assert complete('%flax_apply my_model(')[0] == 'x'",
        runs=1,
    ),
)
ONE_CPU = (
    WARM._replace(
        row=Row("one", "warm -q, the 3-neuron model, in a process with one CPU", 1.5),
        setup=["import os\nos.sched_setaffinity(0, [min(os.sched_getaffinity(0))])", *SMALL],
        floor=bare(BARE, BLOCK),
    ),
)
ON_EIGHT = (
    TEN_MS._replace(
        row=Row("eight", "warm -q, a model of some 20 ms on eight devices of the host, timed in the cell", 1.03),
        setup=[EIGHT, *SMALL, MODEL, SHARDED],
        by_hand=TEN_MS.by_hand.replace("images", "cut"),
        floor="",
        inside=True,
    ),
)
IN_KERNEL = (
    WARM._replace(
        row=Row("loop", "1,000 warm runs in a kernel, with the counting line shown", 0.7), ours=REPORTED, runs=1000
    ),
    Loop(
        Row("shown", "a report shown in a kernel, over a plain display of the same size", 1, "ms"),
        [*SMALL, REPORTED, SHOWN],
        "",
        f"{OURS}\ndisplay(bundle, raw=True)",
        REPORTED,
        0,
        runs=1,
    ),
)
PROCESSES = (IN_SHELL, ONE_CPU, ON_EIGHT, IN_KERNEL)


def measured(loops: Iterable[Loop], keys: Collection[str], rounds: int) -> Seconds:
    """Those of `loops` that have these keys, each in a session of its own, all in one process."""
    chosen = [loop for loop in loops if loop.row.key in keys]
    seconds = (in_kernel if loops is IN_KERNEL else in_shell)(list(_laps(chosen, rounds)))
    return {name: values for loop in chosen for name, values in loop.of_a_run(seconds).items()}


def _laps(chosen: Iterable[Loop], rounds: int) -> Laps:
    run: list[str] = []
    for loop in chosen:
        yield "", [*([RENEW] if run else []), *(cell for cell in loop.setup if cell not in run)]
        run += loop.setup
        # A single run is over so soon that there is time for more of them.
        yield from loop.laps(rounds * {1: 20, 1000: 1}.get(loop.runs, 2))
        yield "", ["assert not len(flax_magics.session()) or flax_magics.session().runs[-1].program == 'reused'"]
