"""Many draws in one run: what such a run may leave behind, how its outputs differ, and how it is written by hand."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from .errors import FlaxMagicsError, written
from .lines import Line
from .models import ARGUMENTS, Model, Record


@dataclass(frozen=True)
class Spread:
    """How one array of the output differs between draws.

    Attributes:
      path: where it is in the output, as `jax.tree_util.keystr` writes it; empty where the output is one array.
      mean: over all draws and elements.
      deviation: each element's standard deviation over the draws (n - 1 in the denominator), averaged over the elements;
        NaN for one draw.
    """

    path: str
    mean: float
    deviation: float


def spread_of(output: Any) -> tuple[Spread, ...]:
    """The spread of every array of numbers in `output`, draws on its first axis; empty arrays and keys left out."""
    found = []
    for path, leaf in jax.tree_util.tree_flatten_with_path(output)[0]:
        if not isinstance(leaf, jax.Array) or jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key) or not leaf.size:
            continue
        values = np.asarray(leaf)
        if values.dtype.kind != "c":
            values = values.astype(np.float64)
        deviation = float(np.std(values, axis=0, ddof=1).mean()) if len(values) > 1 else float("nan")
        found.append(Spread(jax.tree_util.keystr(path), float(values.mean().real), deviation))
    return tuple(found)


def left_behind(
    name: str, line: Line, size: int, model: Model, updates: Mapping[str, Any], record: Record
) -> dict[str, Any]:
    """What stays of `size` draws at once, as after as many runs one by one: the state of the random streams.

    Args:
      name, line: the model's, and that of the run.

    Raises:
      FlaxMagicsError: the model wrote something that each run by itself would have handed on to the next.
    """
    one = line.without_option("--draws", "[0-9]+")
    one_by_one = f"for _ in range({size}):\n    {one}"
    commit = model.commit(updates, record)
    changed = tuple(updates) if commit is None else commit.changed
    if record.structure is not None and not changed:
        changed = ("its own structure",)
    if changed:
        what = ", ".join(f"`{collection}`" for collection in changed)
        raise FlaxMagicsError(
            f"{name} writes {what} in this run: {size} draws at once would all start from the same, where run by run"
            " each hands it on to the next.",
            **written(one_by_one),
        )
    if ARGUMENTS in updates:
        raise FlaxMagicsError(
            f"{line.call} passes rngs of its own: they would give all {size} draws the same keys.",
            **written(str(line.without_argument("rngs") or one_by_one)),
        )
    last: dict[str, Any] = jax.tree_util.tree_map(lambda leaf: leaf[-1], dict(updates))
    return last


def by_hand(code: str, keys: Iterable[str], holds_variables: bool) -> str:
    """The run of one draw, `code`, for many: mapped over its keys (linen) or one by one (NNX)."""
    names = [f"{name}_key" for name in dict.fromkeys(keys)]
    if not names:
        return code
    many = ", ".join(f"{name}s" for name in names)
    if holds_variables:
        each = f"{names[0]} in {many}" if len(names) == 1 else f"{', '.join(names)} in zip({many})"
        return f"for {each}:\n    {code}"
    return f"jax.vmap(lambda {', '.join(names)}: {code})({many})"
