"""The notebook with its model registered."""

from __future__ import annotations

from typing import Any

import pytest

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


def net(body: str, arguments: str = "x", field: str = "") -> str:
    """A cell that registers a class `Net` whose call gives `body`."""
    head = f"%%flaxmodel\nclass Net(nn.Module):\n{f'  {field}' if field else ''}"
    return f"{head}  @nn.compact\n  def __call__(self, {arguments}):\n    return {body}\n"


@pytest.fixture
def sharp_bits(notebook: Any) -> Any:
    """The notebook's model registered as `my_model`."""
    notebook(MODEL_CELL)
    return notebook
