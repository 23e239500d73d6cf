"""Names for types that Python's annotations cannot say more of, since JAX takes any class in a pytree."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    import numpy as np

PyTree: TypeAlias = Any
"""Nested containers of leaves, as `jax.tree_util` takes and gives them; a single leaf is one, too."""

Leaf: TypeAlias = Any
"""What stands in a pytree: mostly an array, or else any object."""

HostArray: TypeAlias = "np.ndarray[Any, Any]"
"""An array of NumPy's, of any shape and dtype."""
