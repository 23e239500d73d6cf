"""What is known of a run's output: facts that are computed once and kept for good, some of them from a small copy."""

from __future__ import annotations

import jax
import numpy as np
from msgspec import Struct

from .digest import Spread, Values, describe, digest_of, is_gone, is_key, values_of
from .types import PyTree

SMALL = 4096
"""The most bytes of an output that is copied: some times as many as the facts that are computed of it."""


def _small_copy(tree: PyTree) -> PyTree | None:
    """The JAX arrays of a small pytree as NumPy arrays of their own; None where it is larger, or has other leaves."""
    size = 0
    for leaf in jax.tree_util.tree_leaves(tree):
        if not isinstance(leaf, jax.Array) or is_key(leaf) or not leaf.is_fully_addressable:
            return None
        size += leaf.nbytes
    return None if size > SMALL else jax.tree_util.tree_map(np.array, tree)


class OutputFacts(Struct, eq=False):
    """Facts about a run's output, each computed once; copies of a Run share them, and they outlive the output."""

    digest: str | None = None
    shape: str | None = None
    spread: tuple[Spread, ...] | None = None
    values: tuple[Values, ...] | None = None
    copy: PyTree = None
    """A small output, on the host, of which `digest` and `values` are computed when somebody reads them."""

    def take(self, output: PyTree) -> None:
        """Computes `digest` and `values` from `output` unless they are known. Call it before the output is released."""
        self.digest = self.digest or digest_of(output)
        if self.values is None:
            self.values = values_of(output)

    def put_off(self, output: PyTree) -> bool:
        """Copies a small output, a fifth of the work of `take`, and says so; of any other takes the facts.

        Of one that was donated or deleted there is only the shape to take.
        """
        self.shape = self.shape or describe(output)
        if is_gone(output):
            return False
        copy = None if self.digest is not None else _small_copy(output)
        if copy is None:
            self.take(output)
            return False
        self.copy = copy
        return True

    def read(self) -> OutputFacts:
        """The facts, with those that were put off."""
        if self.copy is not None:
            self.take(self.copy)
            self.copy = None
        return self
