"""Variables of the user's in the place of a model's own: checked against the model, and taken."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from .registry import Entry
from .weights import Source, Written, check_alive, check_collections, check_fit, check_state, misfits, unfit


def assigned(
    entry: Entry, variables: Any, written: Written, cell: int | None
) -> tuple[Entry, Callable[[], None] | None]:
    """The entry with `variables`; and what writes them into the user's own object (NNX), None where the session has them.

    Raises:
      FlaxMagicsError: they do not fit, or an array of them was deleted.
    """
    entry = replace(entry, made=None, made_before=entry.made or entry.made_before, updates={}, outdated=False)
    model: Any = entry.model
    if model.holds_variables:
        return _into_module(entry, model, variables, written, cell)
    if variables is None:
        return replace(entry, variables=None, source=None), None
    expected, optional = _expected(entry)
    check_collections(entry.name, variables, written, expected)
    if expected is not None:
        check_fit(entry.name, variables, written, expected, optional)
    source = Source.assigned(cell, variables)
    check_alive(f"these variables of `{entry.name}`", variables)
    return replace(entry, variables=variables, source=source), None


def _expected(entry: Entry) -> tuple[Mapping[str, Any] | None, frozenset[str]]:
    """Variables that fit the model, and collections that its first init did not make; None where no init is known."""
    made = entry.made_before
    if made is None:
        return None, frozenset()
    shapes = made.shapes
    if entry.variables is None:
        return shapes, frozenset()
    by_init = entry.variables if shapes is None else shapes
    return entry.variables, frozenset(name for name in entry.variables if name not in by_init)


def _into_module(
    entry: Entry, model: Any, variables: Any, written: Written, cell: int | None
) -> tuple[Entry, Callable[[], None]]:
    """The same for an NNX module; variables that are not among those given stay, as in `nnx.update`."""
    name = entry.name
    check_state(name, variables, written, model.module)
    held = model.take()
    values = model.read_state(name, variables)
    wrong = misfits(_by_path(held), {path: leaf for path, leaf in _by_path(values).items() if path in _by_path(held)})
    if wrong:
        raise unfit(name, wrong)
    check_alive(f"these variables of `{name}`", values)
    source = Source.assigned(cell, {kind: values[kind] for kind in model.collections()}, in_module=True)
    return replace(entry, stale=False, source=source), lambda: model.assign(values)


def _by_path(values: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The variables by their paths, whatever their types."""
    return {path: value for tree in values.values() for path, value in tree.items()}
