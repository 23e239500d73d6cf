"""Exports the session of a test's notebook, and runs the script where there is no flax_magics."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from alone import run_alone

from flax_magics import session

NORMED = """\
%%flaxmodel
class Normed(nn.Module):
  @nn.compact
  def __call__(self, x, train=False):
    x = nn.BatchNorm(use_running_average=not train)(x)
    return nn.Dropout(0.5, deterministic=not train)(nn.Dense(3)(x))

normed = Normed()
"""
CHILD = """\
%%flaxmodel
class Base(nn.Module):
    width: int = 3
    double: int = width * 2
    def setup(self):
        self.dense = nn.Dense(self.double)
    def __call__(self, x):
        return self.dense(x)
class Child(Base):
    rate: float = 0.5
    training: bool = False
    def setup(self):
        super().setup()
        self.dropout = nn.Dropout(self.rate)
    def __call__(self, x):
        return self.dropout(super().__call__(x), deterministic=not self.training)
    def encode(self, x):
        return super().__call__(x)

child = Child()
"""
NOISY = """\
%%flaxmodel
class Noisy(nn.Module):
    @nn.compact
    def __call__(self, x, z_rng=None, options=None):
        x = nn.Dense(3)(x) + jax.random.normal(self.make_rng('noise'), (3,))
        if options is not None and options['act'] == 'relu':
            x = nn.relu(x) * options['scale']
        return x if z_rng is None else x + jax.random.normal(z_rng, (3,))

noisy = Noisy()
"""
NNX_NET = """\
%%flaxmodel net = Net(8, 3)
class Net(nnx.Module):
  def __init__(self, features, classes, *, rngs):
    self.hidden = nnx.Linear(4, features, rngs=rngs)
    self.norm = nnx.BatchNorm(features, rngs=rngs)
    self.dropout = nnx.Dropout(0.5, rngs=rngs)
    self.out = nnx.Linear(features, classes, rngs=rngs)
  def __call__(self, x, scale=1.0):
    return self.out(self.dropout(nnx.relu(self.norm(self.hidden(x))))) * scale
  def embed(self, x):
    return self.hidden(x)
"""


def exported(notebook: Any) -> str:
    """The script of a notebook's session, as it is shown: not formatted."""
    return str(session().export().text)


def printed(script: str, folder: Path) -> list[str]:
    """What `script` prints in a fresh process that can import neither flax_magics nor IPython."""
    path = folder / "alone.py"
    path.write_text(script)
    return run_alone(path).splitlines()


def digests_of(lines: list[str]) -> list[str]:
    """The digests among the lines that a script prints."""
    last = [line.split()[-1] for line in lines if line.strip()]
    return [word for word in last if len(word) == 16 and set(word) <= set("0123456789abcdef")]


def assert_same(notebook: Any, folder: Path, *cells: str, kept: list[Any] | None = None) -> str:
    """The exported script, which prints the digest of every run of the session, in order: see `compared`."""
    return compared(notebook, folder, *cells, kept=kept)[0]


def compared(notebook: Any, folder: Path, *cells: str, kept: list[Any] | None = None) -> tuple[str, list[str]]:
    """The exported script, and the lines that it prints: among them the digest of every run of the session, in order.

    Args:
      cells: run before.
      kept: runs that were held, where the session has let go of their outputs.
    """
    for cell in cells:
        notebook(cell)
    script = exported(notebook)
    expected = [run.digest for run in (notebook.session.runs if kept is None else kept)]
    assert None not in expected
    assert not [line for line in script.splitlines() if "flax_magics" in line and not line.lstrip().startswith("#")]
    lines = printed(script, folder)
    assert digests_of(lines) == expected, script
    return script, lines
