"""Registering a model, editing it, assigning its variables: what becomes of what a session keeps of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import jax

from ..base.text import bytes_
from ..compile import init_trace
from ..compile.initialise import initialised
from ..errors import FlaxMagicsError
from ..models.adopt import adopt
from ..models.base import Model
from ..models.construction import BuiltBySession
from ..run import Note
from .entry import ModelEntry, Replaced
from .weights import (
    PREVIOUS,
    WeightSource,
    Written,
    check_alive,
    check_collections,
    check_fit,
    check_state,
    misfits,
    unfit,
)

if TYPE_CHECKING:
    from ..compile.initialise import InitRecord


@dataclass(frozen=True)
class Registration:
    """What registering did: is the model new, the same, or changed; what changed; what became of its variables."""

    name: str
    state: Literal["new", "unchanged", "changed"]
    changes: tuple[str, ...] = ()
    variables: Literal["none", "kept", "dropped", "own", "restored"] = "none"
    file: str = ""
    """Where variables wait for this model that were restored from there, or that do not fit it: see `unfit`."""
    unfit: tuple[str, ...] = ()
    other: tuple[str, ...] = ()
    """What is other about the model than when those variables were saved."""
    write: Callable[[], None] | None = field(default=None, repr=False, compare=False)
    """Carries the variables over into a module that holds its own."""


def register(old: ModelEntry | None, name: str, module: Any) -> tuple[ModelEntry, Registration]:
    """The entry for `module` under `name`, and how it compares with `old`. Nothing is changed here.

    Raises:
      FlaxMagicsError: the name is no identifier, or the module is none that can be registered.
    """
    if not name.isidentifier():
        raise FlaxMagicsError(f"`{name}` is not a name that a model can have.")
    if old is not None and module is old.model.module:
        print_ = old.model.print()
        if print_ is not None and print_ == old.print:
            return old, unchanged(old)
    model = adopt(module, name)
    if model.holds_variables:
        return register_holding(old, name, model)
    print_ = model.print()
    if old is not None and old.model.holds_variables:
        return ModelEntry(name, model, print_), Registration(name, "changed")
    if old is None:
        return ModelEntry(name, model, print_), Registration(name, "new")
    if print_ is not None and print_ == old.print:
        return old, unchanged(old)
    return _edited(old, model, print_)


def unchanged(old: ModelEntry) -> Registration:
    """What registering the same again says."""
    return Registration(old.name, "unchanged", variables="kept" if old.ready else "none")


def register_holding(
    old: ModelEntry | None, name: str, model: Any, built: BuiltBySession | None = None
) -> tuple[ModelEntry, Registration]:
    """`register` for a module that holds its own variables (NNX).

    One that an unchanged cell made again gives way to the one that is there. After an edit the old variables go into the
    new module if they all fit; otherwise, and where nothing but the initial values differs, its own stand.
    """
    print_, first = model.print(), model.sample()
    entry = ModelEntry(name, model, print_, built=built, first=first, source=WeightSource.own(name))
    if old is None:
        return entry, Registration(name, "new")
    if not old.model.holds_variables:
        return entry, Registration(name, "changed", variables="own")
    before: Any = old.model
    if model.module is before.module:
        return replace(old, model=model, print=print_), Registration(name, "changed", variables="kept")
    if old.stale:
        return entry, Registration(name, "changed", variables="own")
    if print_ is not None and print_ == old.print:
        if first == old.first:
            return old, unchanged(old)
        return entry, Registration(name, "changed", ("initial values",), "own")
    changes = differences(_shapes(before), _shapes(model))
    if changes:
        return entry, Registration(name, "changed", changes, "own")
    values = before.collections()
    entry = replace(entry, updates=old.updates, outdated=old.outdated or first != old.first, source=old.source)
    return entry, Registration(name, "changed", variables="kept", write=lambda: model.assign(values))


def _shapes(model: Any) -> dict[str, Any]:
    variables = {name: value for tree in model.collections().values() for name, value in tree.items()}
    return jax.eval_shape(lambda: variables)  # type: ignore[no-any-return]


def _edited(old: ModelEntry, model: Model, print_: bytes | None) -> tuple[ModelEntry, Registration]:
    entry = replace(old, model=model, print=print_, forced=frozenset())
    if old.variables is None:
        return entry, Registration(old.name, "changed")
    if old.made is None:  # assigned by the user: how they were made is not known
        edit, now = EditEffect((), fits=True, outdated=False), None
    else:
        edit, now = compare(old.made, model)
    if not edit.fits:
        entry = replace(entry, variables=None, made=None, updates={}, outdated=False, source=None)
        return entry, Registration(old.name, "changed", edit.changes, "dropped")
    made = old.made if now is None or edit.outdated else now
    entry = replace(entry, made=made, outdated=old.outdated or edit.outdated)
    return entry, Registration(old.name, "changed", variables="kept")


@dataclass(frozen=True)
class EditEffect:
    """What became of a model's variables: the leaves that differ, whether they still fit, whether they are outdated."""

    changes: tuple[str, ...]
    fits: bool
    outdated: bool


def compare(before: InitRecord, model: Model) -> tuple[EditEffect, InitRecord | None]:
    """What `model`, a later version, would initialise, held against how the variables that are there were made."""
    try:
        now = initialised(model, before.key, before.method, before.args, before.kwargs)
        if now.traced is not None:
            init_trace.keep(now.traced, model, before.key, before.method, before.args, before.kwargs)
    except Exception as error:  # the user's new code does not take the old call
        return EditEffect(
            (f"the last init's call fails now ({type(error).__name__})",), fits=False, outdated=True
        ), None
    if now.shapes is None or before.shapes is None:
        return EditEffect((), fits=True, outdated=True), now
    changes = differences(before.shapes, now.shapes)
    return EditEffect(changes, not changes, now.program is None or now.program != before.program), now


def differences(old: Any, new: Any) -> tuple[str, ...]:
    """Leaf by leaf: `Dense_0/kernel [4,3]→[4,5]`, `Dense_1/bias added`. `params` needs no naming."""
    before, after = _leaves(old), _leaves(new)
    out = []
    for name in dict.fromkeys([*before, *after]):
        if name not in after:
            out.append(f"{name} removed")
        elif name not in before:
            out.append(f"{name} added")
        else:
            a, b = before[name], after[name]
            if tuple(a.shape) != tuple(b.shape):
                out.append(f"{name} {list(a.shape)}→{list(b.shape)}".replace(", ", ","))
            elif a.dtype != b.dtype:
                out.append(f"{name} {a.dtype}→{b.dtype}")
    return tuple(out)


def _leaves(tree: Any) -> dict[str, Any]:
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    names = (jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves)
    return {name.removeprefix("params/"): leaf for name, (_, leaf) in zip(names, leaves, strict=True)}


def assigned(
    entry: ModelEntry, variables: Any, written: Written, cell: int | None
) -> tuple[ModelEntry, Callable[[], None] | None]:
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
    source = WeightSource.assigned(cell, variables)
    check_alive(f"these variables of `{entry.name}`", variables)
    return replace(entry, variables=variables, source=source), None


def _expected(entry: ModelEntry) -> tuple[Mapping[str, Any] | None, frozenset[str]]:
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
    entry: ModelEntry, model: Any, variables: Any, written: Written, cell: int | None
) -> tuple[ModelEntry, Callable[[], None]]:
    """The same for an NNX module; variables that are not among those given stay, as in `nnx.update`."""
    name = entry.name
    check_state(name, variables, written, model.module)
    held = model.take()
    values = model.read_state(name, variables)
    wrong = misfits(_by_path(held), {path: leaf for path, leaf in _by_path(values).items() if path in _by_path(held)})
    if wrong:
        raise unfit(name, wrong)
    check_alive(f"these variables of `{name}`", values)
    source = WeightSource.assigned(cell, {kind: values[kind] for kind in model.collections()}, in_module=True)
    return replace(entry, stale=False, source=source), lambda: model.assign(values)


def _by_path(values: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The variables by their paths, whatever their types."""
    return {path: value for tree in values.values() for path, value in tree.items()}


def replaced_by_init(entry: ModelEntry, limit: int) -> tuple[Replaced | None, tuple[Note, ...]]:
    """What an init is about to replace, if that is more than an init's own; and the note that says so.

    An init over fresh variables leaves those that an earlier one replaced where they are.

    Args:
      limit: bytes that are kept at most.
    """
    source = entry.source_now()
    if not entry.ready or source is None or (source.is_initial and not entry.updates):
        return entry.replaced, ()
    replaced = Replaced(entry.variables_to_read(), source, entry.updates)
    runs = ", ".join(f"{name}: update {updates}" for name, updates in entry.updates.items())
    text = f"this init replaced weights of {entry.name}: {source.describe()}" + (f", {runs}" if runs else "")
    if replaced.size > limit:
        gone = f"; they are not kept: {bytes_(replaced.size)} are more than replay_bytes, {bytes_(limit)}"
        return None, (Note("replaced", text + gone),)
    return replaced, (Note("replaced", text, write=PREVIOUS.format(entry.name)),)
