"""A few values of an output, from which a saved notebook can tell how far another output is from it.

A digest says whether all bits agree, and nothing about how far they are apart. Some dozens of values do, at the cost of a
line in the notebook; of a small output they are all of it.
"""

from __future__ import annotations

import base64
from typing import Any

import jax
import numpy as np

VALUES = 48
"""Values that are taken of one output at most."""


def sample_of(tree: Any) -> dict[str, Any]:
    """Values of the arrays of `tree`, as JSON data.

    The first `VALUES` arrays share them: each gives as many, at least one, evenly spaced in C order from its first element
    to its last; one that has fewer elements gives all of them. Typed keys give their key data.

    Returns:
      `leaves`: of each array its `path` as `jax.tree_util.keystr` writes it, `array` (`float32[3,4]`), and how many
      `values` it gives. `bits`: the values of all of them one after the other, little-endian, in base64.
    """
    found = [(path, leaf) for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0] if _is_number(leaf)][:VALUES]
    each = max(1, VALUES // max(1, len(found)))
    leaves, bits = [], []
    for path, leaf in found:
        if hasattr(leaf, "dtype") and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        array = np.asarray(leaf)
        values = array.flat[_positions(array.size, each)]
        if values.dtype.byteorder == ">":
            values = values.astype(values.dtype.newbyteorder("<"))
        text = f"{array.dtype.name}[{','.join(map(str, array.shape))}]"
        leaves.append({"path": jax.tree_util.keystr(path), "array": text, "values": int(values.size)})
        bits.append(values.tobytes())
    return {"leaves": leaves, "bits": base64.b64encode(b"".join(bits)).decode()}


def _is_number(leaf: Any) -> bool:
    dtype = getattr(leaf, "dtype", None)
    if dtype is None:
        return isinstance(leaf, (bool, int, float, complex))
    return not isinstance(dtype, np.dtype) or dtype.kind not in "OSUMm"


def _positions(size: int, most: int) -> list[int]:
    """Where in `size` elements the values are taken, `most` of them at most."""
    if size <= most:
        return list(range(size))
    return [0] if most == 1 else [i * (size - 1) // (most - 1) for i in range(most)]
