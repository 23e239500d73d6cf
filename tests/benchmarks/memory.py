"""What 1,000 registrations of a changing model leave in memory."""

from __future__ import annotations

from .fresh import seconds_of
from .laps import LOAD
from .table import Lap, Measured

SETUP = """\
import gc
import os
import jax
import jax.numpy as jnp
import flax.linen as nn
x = jnp.ones((2, 4))

def resident():
  gc.collect()
  with open('/proc/self/statm') as file:
    return int(file.read().split()[1]) * os.sysconf('SC_PAGE_SIZE')

def on_device():
  gc.collect()
  return sum(array.nbytes for array in jax.live_arrays())
"""
CELL = """\
%%flaxmodel -q
class Net(nn.Module):
  @nn.compact
  def __call__(self, x):
    x = nn.Dense(WIDTH)(x)
    return x * SCALE

net = Net()
"""
APPLY = "y = %flax_apply -q net(x)"


def edited(i: int) -> str:
    """The model cell at its `i`-th edit: another program each time, other variables mostly."""
    return CELL.replace("WIDTH", str(8 + i % 7)).replace("SCALE", f"{i}.0")


def grown(rounds: int) -> Measured:
    """Bytes by which the process grows from the 100th to the 1,000th registration, each applied once. Measured once.

    What is kept for replays counts in; without it, the arrays of dropped models must be gone.
    """
    first = [cell for i in range(100) for cell in (edited(i), APPLY)]
    rest = [cell for i in range(100, 1000) for cell in (edited(i), APPLY)]
    work = {
        "setup": [SETUP, LOAD, *first, "before, held = resident(), on_device()", *rest],
        "timed": [["seconds = [resident() - before]", "__import__('flax_magics').session().replay_bytes = 0"]],
        "expect": "on_device() <= held + 1000",
    }
    return Measured(seconds_of(work))


LAP = Lap("memory", "memory grown by registrations 101 to 1,000", 100, grown, "MB")
