"""A shell with the extension loaded and the notebook's cells run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from flax_magics import current

SETUP = """\
import jax
import jax.numpy as jnp
import flax.linen as nn
x = jax.random.uniform(jax.random.key(42), (3, 4, 4))
"""
MODEL = """\
class MyModel(nn.Module):
  num_neurons: int
  training: bool
  @nn.compact
  def __call__(self, x):
    x = nn.Dense(self.num_neurons)(x)
    x = nn.Dropout(rate=0.5, deterministic=not self.training)(x)
    return x
"""
MODEL_CELL = f"%%flaxmodel\n{MODEL}\nmy_model = MyModel(num_neurons=3, training=False)\n"


class Notebook:
    """Runs cells as a notebook does, and says what they printed or raised."""

    def __init__(self, shell: Any, capsys: Any) -> None:
        self.shell = shell
        self._capsys = capsys

    def __getitem__(self, name: str) -> Any:
        return self.shell.user_ns[name]

    def __call__(self, cell: str) -> str:
        """Runs a cell that must work; what it printed."""
        self._capsys.readouterr()
        result = self.shell.run_cell(cell, store_history=True)
        out = self._capsys.readouterr().out
        if result.error_before_exec or result.error_in_exec:
            raise AssertionError(f"{cell}\n{out}") from (result.error_before_exec or result.error_in_exec)
        return out.rstrip("\n")

    def fails(self, cell: str) -> str:
        """Runs a cell that must fail; what a person sees."""
        self._capsys.readouterr()
        result = self.shell.run_cell(cell, store_history=True)
        assert result.error_in_exec is not None, cell
        return self._capsys.readouterr().out.rstrip("\n")

    @property
    def session(self) -> Any:
        return current.existing()


@pytest.fixture
def notebook(shell: Any, capsys: Any) -> Iterator[Notebook]:
    """The extension loaded, JAX and Flax imported, `x` made, and a session of its own."""
    current._session = None
    running = Notebook(shell, capsys)
    running("%load_ext flax_magics")
    running(SETUP)
    yield running
    if "flax_magics" in shell.extension_manager.loaded:
        running("%unload_ext flax_magics")
    current._session = None


@pytest.fixture
def sharp_bits(notebook: Notebook) -> Notebook:
    """The notebook's model registered as `my_model`."""
    notebook(MODEL_CELL)
    return notebook
