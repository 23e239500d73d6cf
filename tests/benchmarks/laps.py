"""The laps that begin with a cold kernel or an edited cell. JAX and Flax are imported before any clock starts."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import Any

from .fresh import in_turn, seconds_of
from .table import Lap, Measured

IMPORTS = """\
import jax
import jax.numpy as jnp
import flax.linen as nn
x = jax.random.uniform(jax.random.key(42), (8, 512))
"""
LOAD = "%load_ext flax_magics"

MODEL = '''\
class MLP(nn.Module):
  """Eight layers."""
  width: int = 512

  @nn.compact
  def __call__(self, x):
    for _ in range(8):
      x = nn.relu(nn.Dense(self.width)(x))
    return x

net = MLP()
'''
INIT_BY_HAND = """\
root = jax.random.key(0)
root, params_key, dropout_key = jax.random.split(root, 3)
variables = net.init(params_key, x)
"""
APPLY_BY_HAND = """\
apply = jax.jit(net.apply)
y = jax.block_until_ready(apply(variables, x))
"""
AGAIN_BY_HAND = f"root, params_key, dropout_key = jax.random.split(root, 3)\n{APPLY_BY_HAND}"
CELL = "%%flaxmodel\n"
APPLY = "y = %flax_apply net(x)"
PROGRAM = "__import__('flax_magics').session().runs[-1].program"
EDITS = 3
"""How often a process edits its cell."""


def load(rounds: int) -> Measured:
    """`%load_ext` in a shell that has imported neither JAX nor Flax."""
    work = {"setup": [], "timed": [[LOAD]], "expect": "'jax' not in __import__('sys').modules"}
    seconds_of(work)  # Python compiles what it has not imported before
    return Measured([seconds_of(work)[0] for _ in range(rounds)])


def cold(rounds: int) -> Measured:
    """The model cell and the first result."""
    return in_turn(_first_by_hand, lambda: _first("compiled"), rounds)


def restart(rounds: int) -> Measured:
    """The same in a second process, where the first has left its programs on disk; by hand has no cache."""
    with tempfile.TemporaryDirectory() as cache:
        _first("compiled", cache)
        return in_turn(_first_by_hand, lambda: _first("disk cache", cache), rounds)


def _first_by_hand() -> list[float]:
    return seconds_of({"setup": [IMPORTS], "timed": [[MODEL, INIT_BY_HAND + APPLY_BY_HAND]]})


def _first(program: str, cache: str | None = None) -> list[float]:
    expect = f"{PROGRAM} == '{program}'"
    return seconds_of({"setup": [IMPORTS, LOAD], "timed": [[CELL + MODEL, APPLY]], "expect": expect}, cache)


def edited(edit: Callable[[int], str], program: str, *, anew: bool, drops: bool = False) -> Callable[[int], Measured]:
    """The model cell run again after an edit, then apply.

    Args:
      edit: the cell's source at each edit, counted from 1.
      program: where ours must come from.
      anew: both initialise again.
      drops: the edit drops the variables by itself; otherwise `%flax_init` is what initialises.
    """
    edits = [edit(i + 1) for i in range(EDITS)]
    by_hand: dict[str, Any] = {
        "setup": [IMPORTS, MODEL, INIT_BY_HAND + APPLY_BY_HAND],
        "timed": [[source, (INIT_BY_HAND + APPLY_BY_HAND) if anew else AGAIN_BY_HAND] for source in edits],
    }
    init = ["%flax_init net(x);"] if anew and not drops else []
    ours: dict[str, Any] = {
        "setup": [IMPORTS, LOAD, CELL + MODEL, APPLY],
        "timed": [[CELL + source, *init, APPLY] for source in edits],
        "expect": f"{PROGRAM} == '{program}'",
    }
    return lambda rounds: in_turn(lambda: seconds_of(by_hand), lambda: seconds_of(ours), rounds)


def _comments(i: int) -> str:
    return MODEL.replace("Eight layers", f"Eight layers, said for the {i}th time").replace(
        "    for", f"    # {i}\n\n    for"
    )


def _renamed(i: int) -> str:
    return (
        MODEL.replace("x = nn.relu(", f"h{i} = nn.relu(")
        .replace("(x)", f"(h{i})")
        .replace("return x", f"return h{i}")
        .replace("    for", f"    h{i} = x\n    for")
    )


def _refactored(i: int) -> str:
    helper = f"def layer{i}(x, width):\n  return nn.relu(nn.Dense(width)(x))\n\n"
    return helper + MODEL.replace("nn.relu(nn.Dense(self.width)(x))", f"layer{i}(x, self.width)")


def _wider(i: int) -> str:
    return MODEL.replace("int = 512", f"int = {512 + 16 * i}")


def _activation(i: int) -> str:
    return MODEL.replace("nn.relu", ("nn.tanh", "nn.silu", "nn.gelu")[(i - 1) % 3])


LAPS = (
    Lap("load", "%load_ext, nothing imported before", 30, load, "ms"),
    Lap("cold", "first result, cold kernel, no disk cache", 0.6, cold),
    Lap("restart", "first result after a restart, by hand without a cache", 0.25, restart),
    Lap("unchanged", "cell re-run unchanged, apply", 0.03, edited(lambda i: MODEL, "reused", anew=False)),
    Lap(
        "comments",
        "cell re-run with other comments, layout, docstring, apply",
        0.03,
        edited(_comments, "reused", anew=False),
    ),
    Lap("renamed", "cell re-run with a local renamed, apply", 0.2, edited(_renamed, "reused", anew=False)),
    Lap("refactored", "cell re-run with a helper refactored, apply", 0.2, edited(_refactored, "reused", anew=False)),
    Lap(
        "activation",
        "cell re-run with another activation, init anew, apply",
        0.8,
        edited(_activation, "compiled", anew=True),
    ),
    Lap(
        "wider",
        "cell re-run with another width, init anew, apply",
        0.8,
        edited(_wider, "compiled", anew=True, drops=True),
    ),
)
