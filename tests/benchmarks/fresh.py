"""The rows that begin with a fresh process: what is imported, and a session from its first cell through edits."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection, Iterable
from typing import NamedTuple

from .cells import Laps, Seconds, in_shell
from .table import Row

IMPORTS = """\
import jax
import jax.numpy as jnp
import flax.linen as nn
x = jax.random.uniform(jax.random.key(42), (8, 512))
"""
LOAD = "%load_ext flax_magics"
NOTHING = "get_ipython().register_magic_function(lambda line: None, magic_name='nothing')"

MODEL = '''\
class MLP(nn.Module):
  """Eight layers."""
  width: int = 512

  @nn.compact
  def __call__(self, x, train=False):
    for _ in range(8):
      x = nn.relu(nn.Dense(self.width)(x))
      x = nn.Dropout(0.1, deterministic=not train)(x)
    return x

net = MLP()
'''
CELL = "%%flaxmodel\n"
OURS = "y = %flax_apply --train net(x)"
SPLIT = "root, params_key, dropout_key = jax.random.split(root, 3)\n"
INIT = f"root = jax.random.key(0)\n{SPLIT}variables = net.init(params_key, x)\n"
BY_HAND = """\
apply = jax.jit(net.apply, static_argnames="train")
y = jax.block_until_ready(apply(variables, x, train=True, rngs={"dropout": dropout_key}))
"""


def _comments(cell: str) -> str:
    return cell.replace("Eight layers", "As many as eight").replace("    for", "    # one after the other\n\n    for")


def _renamed(cell: str) -> str:
    for old, new in (
        ("x = nn.", "h = nn."),
        ("(x)", "(h)"),
        ("return x", "return h"),
        ("    for", "    h = x\n    for"),
    ):
        cell = cell.replace(old, new)
    return cell


def _refactored(cell: str) -> str:
    helper = "def layer(x, width):\n  return nn.relu(nn.Dense(width)(x))\n\n"
    return helper + cell.replace("nn.relu(nn.Dense(self.width)(x))", "layer(x, self.width)")


class Edit(NamedTuple):
    """A model cell that is run again, edited, and applied; `program` is where ours then comes from."""

    row: Row
    edit: Callable[[str], str]
    program: str = "reused"


EDITS = (
    Edit(Row("unchanged", "model cell run again unchanged, apply", 0.03), str),
    Edit(Row("comments", "with other comments, layout, docstring, apply", 0.03), _comments),
    Edit(Row("renamed", "edited, same program: a local renamed, apply", 0.15), _renamed),
    Edit(Row("refactored", "edited, same program: a helper taken out, apply", 0.15), _refactored),
    Edit(
        Row("wider", "edited, another width, init anew, apply", 0.77),
        lambda cell: cell.replace("int = 512", "int = 528"),
        "compiled",
    ),
)
COLD = Row("cold", "first result in a cold kernel, 8×512 MLP with dropout", 0.65)
RESTART = Row("restart", "first result after a restart, by hand without a cache", 0.25)


def sessions(keys: Collection[str], rounds: int) -> Seconds:
    """By hand, ours and ours after a restart, each in a process of its own, in turn."""
    edits = [edit for edit in EDITS if edit.row.key in keys]
    by_hand, ours = [("", [IMPORTS, NOTHING])], [("", [IMPORTS, LOAD])]
    by_hand.append(("cold/by hand", [MODEL, INIT + BY_HAND]))
    ours += _ours("cold", MODEL, "compiled")
    same_program = [key for (key, *_), _, program in edits if program == "reused"]
    for (key, *_), edit, program in edits:
        cell = edit(MODEL)
        if edit in (str, _comments):
            by_hand.append((f"{key}/floor", [cell, "%nothing net(x)"]))
        if program == "compiled":
            by_hand.append((f"{key}/by hand", [cell, INIT + BY_HAND]))
        elif key == same_program[0]:
            by_hand.append(("edited/by hand", [cell, SPLIT + BY_HAND]))
        ours += _ours(key, cell, program)
    restart = [("", [IMPORTS, LOAD]), *_ours("restart", MODEL, "disk cache")]

    def both(cache: str) -> Seconds:
        return in_shell(ours, cache) | (in_shell(restart, cache) if "restart" in keys else {})

    turns = []
    for i in range(rounds):
        with tempfile.TemporaryDirectory() as cache:
            turns += [run(cache) for run in (lambda _: in_shell(by_hand), both)[:: 1 if i % 2 == 0 else -1]]
    seconds = _together(turns)
    seconds["restart/by hand"] = seconds["cold/by hand"]
    # Whatever the edit is, by hand the program is compiled anew.
    return seconds | {f"{key}/by hand": seconds["edited/by hand"] for key in same_program}


def _ours(key: str, cell: str, program: str) -> Laps:
    yield f"{key}/ours", [CELL + cell, OURS]
    yield "", [f"assert __import__('flax_magics').session().runs[-1].program == '{program}'"]


LOADING = Row("load", "%load_ext over an empty extension, each in a shell's first cell", 20, "ms")
OWN = Row("own", "all of our own that a first command needs, JAX, Flax and msgspec there", 80, "ms")
MSGSPEC = Row("msgspec", "importing msgspec", None, "ms")
JINJA = Row("jinja2", "importing Jinja2 and the templates, at the first HTML", None, "ms")


def loading(keys: Collection[str], rounds: int) -> Seconds:
    """`%load_ext` in a shell that has imported neither JAX nor Flax."""
    ours = [("load/ours", [LOAD]), ("", ["assert 'jax' not in __import__('sys').modules"])]
    empty = [("load/floor", ["%load_ext tests.benchmarks.empty"])]
    return _together(in_shell(laps) for i in range(rounds) for laps in (ours, empty)[:: 1 if i % 2 == 0 else -1])


def importing(keys: Collection[str], rounds: int) -> Seconds:
    """Imports in a shell that has JAX and Flax, one after the other."""
    laps = [
        ("", [IMPORTS]),
        ("msgspec/ours", ["import msgspec"]),
        ("own/ours", ["from flax_magics.notebook import magics\nmagics._import()"]),
        ("jinja2/ours", ["from flax_magics.report import html\nhtml.prepare()"]),
    ]
    return _together(in_shell(laps) for _ in range(rounds))


def _together(turns: Iterable[Seconds]) -> Seconds:
    seconds: Seconds = {}
    for turn in turns:
        for name, values in turn.items():
            seconds.setdefault(name, []).extend(values)
    return seconds
