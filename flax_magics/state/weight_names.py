"""Names of the notebook that held a model's weights, and hold others now: those of a training loop by hand.

A name is known once it was seen to hold the very arrays that the model has: its variables or params, or a train state with
them. What only looks like weights (gradients, moments, another model's) never did.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax

from ..base.digest import quick_digest
from ..run import Note
from .weights import CURRENT, Written, misfits

Models = Mapping[str, Mapping[str, Any] | None]
"""Variables by model; None where they are not the session's, or not there."""


class WeightNames:
    """What was seen of the names of one notebook."""

    def __init__(self) -> None:
        self._seen: dict[str, dict[str, int]] = {}
        """model → expression (`variables`, `state.params`) → id of the params that it gave when they were the model's."""
        self._told: dict[str, tuple[int, ...]] = {}
        """model → ids of the params that were told of last."""

    def look(self, models: Models, names: Mapping[str, Any]) -> None:
        """Notes which names hold a model's weights now."""
        wanted = {name: params for name, variables in models.items() if (params := _params(variables)) is not None}
        if not wanted:
            return
        leaves = {model: jax.tree_util.tree_leaves(params) for model, params in wanted.items()}
        for expression, tree in _trees(names):
            for model, params in wanted.items():
                inside = _inside(tree, params)
                if inside is not None and _same(jax.tree_util.tree_leaves(inside), leaves[model]):
                    self.hold(model, expression, tree)

    def hold(self, model: str, expression: str, tree: Mapping[str, Any]) -> None:
        """Notes that an expression gives a model's weights now, and no other model's."""
        for seen in self._seen.values():
            seen.pop(expression, None)
        params = tree.get("params", tree)
        self._seen.setdefault(model, {})[expression] = id(params)

    def chosen(self, model: str, names: Mapping[str, Any]) -> None:
        """The user has just given the model other weights: what the names hold besides is what was not chosen."""
        seen = self._seen.get(model, {})
        seen.update({expression: id(tree.get("params", tree)) for expression, tree in _trees(names, seen)})

    def note(self, model: str, models: Models, names: Mapping[str, Any]) -> Note | None:
        """The sharp bit that names hold other weights than `model`, which is about to run with its own; said once."""
        seen = self._seen.get(model)
        if not seen:
            return None
        moved = {
            expression: tree
            for expression, tree in _trees(names, seen)
            if id(tree.get("params", tree)) != seen[expression]
        }
        if not moved:
            return None
        told = tuple(id(tree.get("params", tree)) for tree in moved.values())
        params = _params(models.get(model))
        if params is None or self._told.get(model) == told:
            return None
        self._told[model] = told
        leaves = jax.tree_util.tree_leaves(params)
        others = {}
        for expression, tree in moved.items():
            inside = _inside(tree, params)
            if inside is None or misfits(params, inside):
                continue
            found = jax.tree_util.tree_leaves(inside)
            if not all(isinstance(leaf, jax.Array) and not leaf.is_deleted() for leaf in (*found, *leaves)):
                continue
            if _same(found, leaves) or quick_digest(found) == quick_digest(leaves):
                return None  # the model has what one of them has
            others[expression] = tree
        return _note(model, models[model] or {}, others) if others else None


def _note(model: str, variables: Mapping[str, Any], others: Mapping[str, Mapping[str, Any]]) -> Note:
    listed = " and ".join(f"`{expression}`" for expression in others)
    verb = "holds" if len(others) == 1 else "hold"
    text = f"{listed} {verb} other weights than {model} has, and this run used those of {model}"
    if len(others) > 1:
        return Note("weights", text, form=f"%flax_vars {model} = …")
    expression, tree = next(iter(others.items()))
    current = CURRENT.format(model)
    if "params" in tree:
        pattern = f"{{**{current}, **{{}}}}" if variables.keys() - tree.keys() else "{}"
    else:
        pattern = f"{{**{current}, 'params': {{}}}}" if variables.keys() - {"params"} else "{'params': {}}"
    return Note("weights", text, **Written(f"%flax_vars {model} = {{}}", expression).advice(pattern))


def _params(variables: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    params = None if variables is None else variables.get("params")
    return params if isinstance(params, Mapping) and params else None


def _inside(tree: Mapping[str, Any], params: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """What `tree` has in the place of `params`; None where it has nothing like it, which most names tell at once."""
    inside = tree.get("params") if "params" in tree else tree
    if not isinstance(inside, Mapping) or inside.keys() != params.keys():
        return None
    try:
        jax.tree_util.tree_structure(inside)
    except ValueError:  # keys that cannot be sorted
        return None
    return inside


def _same(leaves: list[Any], others: list[Any]) -> bool:
    return len(leaves) == len(others) and all(one is other for one, other in zip(leaves, others, strict=True))


def _trees(names: Mapping[str, Any], only: Iterable[str] | None = None) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Expressions of the notebook that give a mapping: names, and the `params` of a dataclass (a train state).

    Args:
      only: those alone.
    """
    for name in list(names) if only is None else dict.fromkeys(one.partition(".")[0] for one in only):
        value = names.get(name)
        if name.startswith("_"):
            continue
        if not isinstance(value, Mapping) and "params" in getattr(type(value), "__dataclass_fields__", ()):
            name, value = f"{name}.params", getattr(value, "params", None)
        if isinstance(value, Mapping) and (only is None or name in only):
            yield name, value
