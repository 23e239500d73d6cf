"""The laps of a run like the one before: loops in one process, by hand and ours in turn."""

from __future__ import annotations

import statistics
import time
from typing import Any

from .fresh import ROOT, seconds_of
from .laps import IMPORTS, LOAD, MODEL
from .table import Lap, Measured

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
"""
BY_HAND = """\
root = jax.random.key(0)
root, params_key, dropout_key = jax.random.split(root, 3)
variables = {name}.init(params_key, x)
apply = jax.jit({name}.apply)
"""
DRAW_BY_HAND = """\
root, params_key, dropout_key = jax.random.split(root, 3)
y = jax.block_until_ready(apply(variables, x{rngs}))
"""
BARE = """\
import numpy as np
session = flax_magics.session()
bare = next(reversed(session.programs.by_call.values())).executable
variables = session.models['my_model'].variables
keys, arguments = {'dropout': np.zeros(2, np.uint32)}, {'x': x}
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

class MLP(nnx.Module):
  def __init__(self, din, dmid, dout, *, rngs):
    self.block1 = Block(din, dmid, rngs=rngs)
    self.block2 = Block(dmid, dmid, rngs=rngs)
    self.linear = nnx.Linear(dmid, dout, rngs=rngs)

  def __call__(self, x):
    return self.linear(self.block2(self.block1(x)))

net = MLP(4, 8, 3, rngs=nnx.Rngs(0))
by_hand = MLP(4, 8, 3, rngs=nnx.Rngs(0))
x = jax.random.uniform(jax.random.key(42), (3, 4, 4))

@nnx.jit
def forward(net, x):
  return net(x)
"""


COMPLETE = """\
from IPython.core.completer import provisionalcompleter
globals().update({f'array{i}': jnp.zeros(i) for i in range(100)} | {f'name{i}': i for i in range(100)})
line = '%flax_apply my_model('
def complete():
  with provisionalcompleter():
    return [match.text for match in get_ipython().Completer.completions(line, len(line))]
"""


def loops(setup: list[str], by_hand: str, ours: str, n: int, rounds: int) -> Measured:
    """Seconds of one pass through each body, from loops of `n` in a cell of their own."""

    def loop(body: str, into: str) -> str:
        inside = "".join(f"  {line}\n" for line in body.strip().splitlines())
        after = f"{into}.append((time.perf_counter() - begin) / {n})"
        return f"begin = time.perf_counter()\nfor _ in range({n}):\n{inside}{after}"

    cells = [loop(by_hand, "hand"), loop(ours, "own")]
    timed = [cells[:: 1 if i % 2 == 0 else -1] for i in range(rounds + 1)]
    # The first round warms both up, and is not counted.
    setup = [IMPORTS, LOAD, "import time\nimport flax_magics\nhand, own = [], []", *setup]
    work = {"setup": setup, "timed": [*timed, ["seconds = hand[1:] + own[1:]"]]}
    work["expect"] = "flax_magics.session().runs[-1].program == 'reused'"
    seconds = seconds_of(work)
    return Measured(seconds[rounds:], seconds[:rounds])


def warm(rounds: int) -> Measured:
    """The notebook's 3-neuron model, dropout on."""
    setup = [SHARP_BITS, BY_HAND.format(name="my_model"), "%flaxmodel my_model", "%flax_apply -q my_model(x);"]
    by_hand = DRAW_BY_HAND.format(rngs=", rngs={'dropout': dropout_key}")
    return loops(setup, by_hand, "y = %flax_apply -q my_model(x)", 300, rounds)


def over_bare(rounds: int) -> Measured:
    """The same against calling and awaiting its executable."""
    setup = [SHARP_BITS, "%flaxmodel my_model", "%flax_apply -q my_model(x);", BARE]
    by_hand = "y = jax.block_until_ready(bare(variables, keys, arguments))"
    return loops(setup, by_hand, "y = %flax_apply -q my_model(x)", 300, rounds)


def five_ms(rounds: int) -> Measured:
    """A model that runs some 5 ms."""
    setup = [MODEL, "x = jnp.ones((256, 512))", BY_HAND.format(name="net"), "%flaxmodel net", "%flax_apply -q net(x);"]
    return loops(setup, DRAW_BY_HAND.format(rngs=""), "y = %flax_apply -q net(x)", 30, rounds)


def nnx(rounds: int) -> Measured:
    """An NNX MLP of two blocks against its `nnx.jit`-ed call."""
    setup = [NNX, "%flaxmodel net", "%flax_apply -q net(x);"]
    return loops(setup, "y = jax.block_until_ready(forward(by_hand, x))", "y = %flax_apply -q net(x)", 200, rounds)


def completion(rounds: int) -> Measured:
    """Tab inside of a call, in a notebook with a hundred arrays: what IPython's completer gives, until it has all."""
    setup = [IMPORTS, LOAD, SHARP_BITS, "%flaxmodel my_model", "%flax_apply -q my_model(x);", COMPLETE]
    timed = [["offered = complete()"]] * (rounds + 1)
    expect = "offered[0] == 'x' and offered[101] == 'x=' and 'name0' in offered"
    # The first round imports what is IPython's, and is not counted.
    return Measured(seconds_of({"setup": setup, "timed": timed, "expect": expect})[1:])


def shown(rounds: int) -> Measured:
    """A cell with its report in a real kernel, against the same with `-q`: until the kernel is idle again."""
    from jupyter_client.manager import KernelManager

    manager = KernelManager(kernel_name="python3")
    manager.start_kernel(cwd=str(ROOT))
    client: Any = manager.client()
    try:
        client.start_channels()
        client.wait_for_ready(timeout=120)

        def run(cell: str) -> float:
            begin = time.perf_counter()
            reply = client.execute_interactive(cell, timeout=120, output_hook=lambda message: None)
            seconds = time.perf_counter() - begin
            if reply["content"]["status"] != "ok":
                raise RuntimeError(reply["content"])
            return seconds

        for cell in (IMPORTS, LOAD, SHARP_BITS, "%flaxmodel my_model", "%flax_apply my_model(x);"):
            run(cell)
        quiet, report = "%flax_apply -q my_model(x);", "%flax_apply my_model(x);"
        hand, own = [], []
        for _ in range(rounds):
            pairs = [(run(quiet), run(report)) if i % 2 else (run(report), run(quiet))[::-1] for i in range(20)]
            hand.append(statistics.median(pair[0] for pair in pairs))
            own.append(statistics.median(pair[1] for pair in pairs))
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
    return Measured(own, hand)


LAPS = (
    Lap("warm", "warm -q, the 3-neuron model", 0.35, warm),
    Lap("bare", "warm -q over the bare executable", 80, over_bare, "µs"),
    Lap("5ms", "warm -q, a model of some 5 ms", 1.03, five_ms),
    Lap("shown", "warm, report shown in a real kernel, over -q", 2, shown, "ms"),
    Lap("completion", "Tab inside a call, a hundred arrays there", 50, completion, "ms"),
    Lap("nnx", "warm -q, an NNX MLP of two blocks, against its awaited nnx.jit call", 0.5, nnx),
)
