"""Aliases of `Any` for pytrees and their leaves: any class may be a node, which no annotation can express."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    import numpy as np

PyTree: TypeAlias = Any
"""Nested containers of leaves, as `jax.tree_util` handles them; a single leaf is a pytree, too."""

Leaf: TypeAlias = Any
"""A leaf of a pytree: usually an array or a number, but any object may be one."""

HostArray: TypeAlias = "np.ndarray[Any, Any]"
"""A NumPy array of any shape and dtype."""
