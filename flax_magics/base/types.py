"""Names for types that Python's annotations cannot say more of, since JAX takes any class in a pytree."""

from __future__ import annotations

from typing import Any, TypeAlias

PyTree: TypeAlias = Any
"""Nested containers of leaves, as `jax.tree_util` takes and gives them; a single leaf is one, too."""

Leaf: TypeAlias = Any
"""What stands in a pytree: mostly an array, or else any object."""
