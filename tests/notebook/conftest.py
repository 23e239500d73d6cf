"""The notebook with its model registered."""

from __future__ import annotations

from typing import Any

import pytest
from sharp_bits import MODEL


def net(body: str, arguments: str = "x", field: str = "") -> str:
    """A cell that registers a class `Net` whose call gives `body`."""
    head = f"%%flaxmodel\nclass Net(nn.Module):\n{f'  {field}' if field else ''}"
    return f"{head}  @nn.compact\n  def __call__(self, {arguments}):\n    return {body}\n"


@pytest.fixture
def sharp_bits(notebook: Any) -> Any:
    """The notebook's model registered as `my_model`."""
    notebook(MODEL)
    return notebook
