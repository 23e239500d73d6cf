"""The laps that begin with a cold kernel or an edited cell. JAX and Flax are imported before any clock starts."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
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
DROPOUT = MODEL.replace("self, x)", "self, x, train=False)").replace(
    "    return", "      x = nn.Dropout(0.1, deterministic=not train)(x)\n    return"
)
SPLIT_BY_HAND = "root, params_key, dropout_key = jax.random.split(root, 3)\n"
INIT_BY_HAND = f"""\
root = jax.random.key(0)
{SPLIT_BY_HAND}variables = net.init(params_key, x)
"""
CELL = "%%flaxmodel\n"
PROGRAM = "__import__('flax_magics').session().runs[-1].program"
EDITS = 3
"""How often a process edits its cell."""


@dataclass(frozen=True)
class Kind:
    """A model cell, and how the first result is got by hand and by us."""

    cell: str
    by_hand: str
    ours: str


TRAINED = Kind(
    DROPOUT,
    """\
apply = jax.jit(net.apply, static_argnames="train")
y = jax.block_until_ready(apply(variables, x, train=True, rngs={"dropout": dropout_key}))
""",
    "y = %flax_apply --train net(x)",
)
PLAIN = Kind(
    MODEL, "apply = jax.jit(net.apply)\ny = jax.block_until_ready(apply(variables, x))\n", "y = %flax_apply net(x)"
)


def load(rounds: int) -> Measured:
    """`%load_ext` in a shell that has imported neither JAX nor Flax, beside an extension that does nothing."""
    ours = {"setup": [], "timed": [[LOAD]], "expect": "'jax' not in __import__('sys').modules"}
    empty = {"setup": [], "timed": [["%load_ext tests.benchmarks.empty"]]}
    seconds_of(ours), seconds_of(empty)  # Python compiles what it has not imported before
    return in_turn(lambda: seconds_of(empty), lambda: seconds_of(ours), rounds)


def preload(rounds: int) -> Measured:
    """`%load_ext` in a shell that has both: its cell ends with the imports below, which the laps after them are rid of."""
    return Measured([seconds_of({"setup": [IMPORTS], "timed": [[LOAD]]})[0] for _ in range(rounds)])


def imports(cell: str, *there: str) -> Callable[[int], Measured]:
    """A cell that imports something in a shell that has JAX and Flax, and what the cells `there` import."""

    def measure(rounds: int) -> Measured:
        work = {"setup": [IMPORTS, *there], "timed": [[cell]]}
        seconds_of(work)  # compiled before, as above
        return Measured([seconds_of(work)[0] for _ in range(rounds)])

    return measure


OWN = "import flax_magics.notebook.magics as magics\nmagics._import()"
MSGSPEC = "import msgspec"
HTML = "from flax_magics.report import html"


def cold(kind: Kind) -> Callable[[int], Measured]:
    """The model cell and the first result."""
    return lambda rounds: in_turn(lambda: _first_by_hand(kind), lambda: _first(kind, "compiled"), rounds)


def restart(kind: Kind) -> Callable[[int], Measured]:
    """The same in a second process, where the first has left its programs on disk; by hand has no cache."""

    def measure(rounds: int) -> Measured:
        with tempfile.TemporaryDirectory() as cache:
            _first(kind, "compiled", cache)
            return in_turn(lambda: _first_by_hand(kind), lambda: _first(kind, "disk cache", cache), rounds)

    return measure


def _first_by_hand(kind: Kind) -> list[float]:
    return seconds_of({"setup": [IMPORTS], "timed": [[kind.cell, INIT_BY_HAND + kind.by_hand]]})


def _first(kind: Kind, program: str, cache: str | None = None) -> list[float]:
    expect = f"{PROGRAM} == '{program}'"
    return seconds_of({"setup": [IMPORTS, LOAD], "timed": [[CELL + kind.cell, kind.ours]], "expect": expect}, cache)


def edited(
    kind: Kind, edit: Callable[[str, int], str], program: str, *, anew: bool, drops: bool = False
) -> Callable[[int], Measured]:
    """The model cell run again after an edit, then apply.

    Args:
      edit: the cell's source at each edit, counted from 1.
      program: where ours must come from.
      anew: both initialise again.
      drops: the edit drops the variables by itself; otherwise `%flax_init` is what initialises.
    """
    edits = [edit(kind.cell, i + 1) for i in range(EDITS)]
    again = (INIT_BY_HAND if anew else SPLIT_BY_HAND) + kind.by_hand
    by_hand: dict[str, Any] = {
        "setup": [IMPORTS, kind.cell, INIT_BY_HAND + kind.by_hand],
        "timed": [[source, again] for source in edits],
    }
    init = ["%flax_init net(x);"] if anew and not drops else []
    ours: dict[str, Any] = {
        "setup": [IMPORTS, LOAD, CELL + kind.cell, kind.ours],
        "timed": [[CELL + source, *init, kind.ours] for source in edits],
        "expect": f"{PROGRAM} == '{program}'",
    }
    return lambda rounds: in_turn(lambda: seconds_of(by_hand), lambda: seconds_of(ours), rounds)


def _comments(cell: str, i: int) -> str:
    return cell.replace("Eight layers", f"Eight layers, said for the {i}th time").replace(
        "    for", f"    # {i}\n\n    for"
    )


def _renamed(cell: str, i: int) -> str:
    return (
        cell.replace("x = nn.", f"h{i} = nn.")
        .replace("(x)", f"(h{i})")
        .replace("return x", f"return h{i}")
        .replace("    for", f"    h{i} = x\n    for")
    )


def _refactored(cell: str, i: int) -> str:
    helper = f"def layer{i}(x, width):\n  return nn.relu(nn.Dense(width)(x))\n\n"
    return helper + cell.replace("nn.relu(nn.Dense(self.width)(x))", f"layer{i}(x, self.width)")


def _wider(cell: str, i: int) -> str:
    return cell.replace("int = 512", f"int = {512 + 16 * i}")


def _activation(cell: str, i: int) -> str:
    return cell.replace("nn.relu", ("nn.tanh", "nn.silu", "nn.gelu")[(i - 1) % 3])


EDITED = (
    ("unchanged", "unchanged, apply", 0.03, lambda cell, i: cell, "reused"),
    ("comments", "with other comments, layout, docstring, apply", 0.03, _comments, "reused"),
    ("renamed", "with a local renamed, apply", 0.2, _renamed, "reused"),
    ("refactored", "with a helper refactored, apply", 0.2, _refactored, "reused"),
    ("activation", "with another activation, init anew, apply", 0.8, _activation, "compiled"),
    ("wider", "with another width, init anew, apply", 0.8, _wider, "compiled"),
)
"""Key, how the cell is run again, goal, the edit, and where the program comes from: where it is new, so are variables."""


def _laps(kind: Kind) -> Iterator[tuple[str, str, float, Callable[[int], Measured]]]:
    """Key, title, goal and measurement of each lap of a model."""
    yield "cold", "first result, cold kernel, no disk cache", 0.6, cold(kind)
    yield "restart", "first result after a restart, by hand without a cache", 0.25, restart(kind)
    for key, title, goal, edit, program in EDITED:
        measure = edited(kind, edit, program, anew=program == "compiled", drops=key == "wider")
        yield key, f"cell re-run {title}", goal, measure


LAPS = (
    Lap("load", "%load_ext over an empty extension, nothing imported before", 20, load, "ms"),
    Lap("preload", "%load_ext, JAX and Flax imported before", None, preload, "ms"),
    Lap(
        "own",
        "all modules of ours that a first command needs, JAX, Flax and msgspec there",
        80,
        imports(OWN, MSGSPEC),
        "ms",
    ),
    Lap("msgspec", "msgspec", None, imports(MSGSPEC), "ms"),
    Lap("jinja2", "Jinja2 and the templates, at the first HTML", None, imports("html.prepare()", HTML), "ms"),
    *(Lap(key, title, goal, measure) for key, title, goal, measure in _laps(TRAINED)),
    *(Lap(f"{key}-plain", f"without dropout: {title}", None, measure) for key, title, _, measure in _laps(PLAIN)),
)
