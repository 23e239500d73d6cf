"""Copies of what others may change where it is. JAX's arrays do not change, and are held as they are."""

from __future__ import annotations

from typing import Any

import numpy as np


def own(leaf: Any) -> Any:
    """The leaf, a copy of an array of NumPy's."""
    return leaf.copy() if isinstance(leaf, np.ndarray) else leaf
