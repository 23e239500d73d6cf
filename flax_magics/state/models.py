"""Registering, editing and assigning: how a model's entry changes, worked out without changing anything."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

import jax
from msgspec import Struct
from msgspec.structs import replace

from ..base.text import bytes_
from ..base.types import Leaf, PyTree
from ..compile.initialise import initialised
from ..errors import FlaxMagicsError
from ..models.base import ModelWithInit, ModelWithVariables
from ..models.construction import BuiltBySession, adopt
from ..run import Note
from .entry import ModelEntry, Replaced
from .weights import (
    PREVIOUS,
    Collections,
    WeightSource,
    Written,
    check_alive,
    check_collections,
    check_fit,
    check_state,
    misfits,
    named_leaves,
    unfit,
)


class Registration(Struct, frozen=True):
    """The result of registering: whether the model is new, the same or changed, and what became of its variables.

    Attributes:
      unfit: where variables of `file` do not fit the model, and so still wait.
    """

    name: str
    state: Literal["new", "unchanged", "changed"]
    changes: tuple[str, ...] = ()
    variables: Literal["none", "kept", "dropped", "own", "restored"] = "none"
    file: str = ""
    """The loaded file that has variables for this model, if they were restored now, or are `unfit`; else empty."""
    unfit: tuple[str, ...] = ()
    other: tuple[str, ...] = ()
    """How the model differs from the one that the file was saved with."""
    write: Callable[[], None] | None = None
    """Copies the old variables into the new NNX module, at the commit; None where nothing is copied."""


def register(old: ModelEntry | None, name: str, module: object) -> tuple[ModelEntry, Registration]:
    """The entry for `module` under `name`, and how it compares with `old`. Nothing is changed here.

    Raises:
      FlaxMagicsError: the name is no identifier, or the object is no module that can be registered.
    """
    if not name.isidentifier():
        raise FlaxMagicsError(f"`{name}` is not a name that a model can have.")
    # The same object may have been changed in place, so its fingerprint is asked again.
    if old is not None and module is old.model.module and old.computes(old.model.fingerprint()):
        return old, unchanged(old)
    model = adopt(module, name)
    if model.holds_variables:
        return register_holding(old, name, model)
    fingerprint = model.fingerprint()
    if old is None or old.model.api != model.api:
        return ModelEntry(name, model, fingerprint), Registration(name, "new" if old is None else "changed")
    return (old, unchanged(old)) if old.computes(fingerprint) else _edited(old, model, fingerprint)


def unchanged(old: ModelEntry) -> Registration:
    """The result of registering the same model again."""
    return Registration(old.name, "unchanged", variables="kept" if old.ready else "none")


def register_holding(
    old: ModelEntry | None, name: str, model: ModelWithVariables, built: BuiltBySession | None = None
) -> tuple[ModelEntry, Registration]:
    """`register` for a module that holds its own variables (NNX).

    If an unchanged cell built an equal module again, the old one stays. After an edit the old variables move into the
    new module if all of them fit. If not, or if only initial values differ (another seed), the new one keeps its own.
    """
    fingerprint, first = model.fingerprint(), model.sample()
    entry = ModelEntry(name, model, fingerprint, built=built, initial_sample=first, source=WeightSource.own(name))
    if old is None:
        return entry, Registration(name, "new")
    # The same object, changed in place: what it holds is the model.
    if model.module is old.model.module:
        return replace(old, model=model, fingerprint=fingerprint), Registration(name, "changed", variables="kept")
    # After `--fresh` nothing of the old module is carried over.
    if old.model.api != model.api or old.rebuild_next:
        return entry, Registration(name, "changed", variables="own")
    same = old.computes(fingerprint)
    if same and first == old.initial_sample:
        return old, unchanged(old)
    changes = ("initial values",) if same else differences(_shapes(old.nnx), _shapes(model))
    if changes:
        return entry, Registration(name, "changed", changes, "own")
    # The kept values are outdated if the edited code would begin with others.
    values = old.nnx.collections()
    outdated = old.outdated or first != old.initial_sample
    entry = replace(entry, update_counts=old.update_counts, outdated=outdated, source=old.source)
    entry = replace(entry, optimizer=old.optimizer, training=old.training)
    return entry, Registration(name, "changed", variables="kept", write=lambda: model.assign(values))


def _shapes(model: ModelWithVariables) -> PyTree:
    variables = _by_path(model.collections())
    return jax.eval_shape(lambda: variables)


def _edited(old: ModelEntry, model: ModelWithInit, fingerprint: bytes | None) -> tuple[ModelEntry, Registration]:
    """An edited linen model: the old variables stay if its init would make the same names, shapes and dtypes."""
    entry = replace(old, model=model, fingerprint=fingerprint, static_ints=frozenset())
    if old.variables is None:
        return entry, Registration(old.name, "changed")
    old_init = old.init
    if old_init is None:  # assigned by the user: how they are made is unknown, so nothing can be compared
        return entry, Registration(old.name, "changed", variables="kept")
    try:
        # The last init's call is traced with the new code; nothing is computed.
        init = initialised(model, old_init.key, old_init.method, old_init.args, old_init.kwargs)
    except Exception as error:  # the edited code does not accept the last init's call
        changes: tuple[str, ...] = (f"the last init's call fails now ({type(error).__name__})",)
    else:
        comparable = init.shapes is not None and old_init.shapes is not None
        changes = differences(old_init.shapes, init.shapes) if comparable else ()
    if changes:
        return entry.with_variables(None, None), Registration(old.name, "changed", changes, "dropped")
    # Only an equal init program is sure to make equal variables.
    same = comparable and init.program is not None and init.program == old_init.program
    entry = replace(entry, init=init) if same else replace(entry, outdated=True)
    return entry, Registration(old.name, "changed", variables="kept")


def differences(old: PyTree, new: PyTree) -> tuple[str, ...]:
    """Leaf by leaf: `Dense_0/kernel [4,3]→[4,5]`, `Dense_1/bias added`; leaves of `params` without that prefix."""
    before, after = named_leaves(old), named_leaves(new)
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


def assigned(
    entry: ModelEntry, variables: PyTree, written: Written, cell: int | None
) -> tuple[ModelEntry, Callable[[], None] | None]:
    """The entry with `variables`, and a function that writes them into an NNX module (None for a linen model).

    Raises:
      FlaxMagicsError: they do not fit, or one of their arrays was deleted.
    """
    # `previous_init` still tells what fits, after `init` no longer describes these variables.
    entry = replace(entry, init=None, previous_init=entry.init or entry.previous_init, update_counts={}, outdated=False)
    entry = replace(entry, training=None)
    if entry.model.holds_variables:
        return _into_module(entry, entry.model, variables, written, cell)
    if variables is None:
        return replace(entry, variables=None, source=None), None
    expected, optional = _expected(entry)
    check_collections(entry.name, variables, written, expected)
    if expected is not None:
        check_fit(entry.name, variables, written, expected, optional)
    source = WeightSource.assigned(cell, variables)
    check_alive(f"these variables of `{entry.name}`", variables)
    return replace(entry, variables=variables, source=source), None


def _expected(entry: ModelEntry) -> tuple[Collections | None, frozenset[str]]:
    """Variables that fit the model, and the collections that are optional; None where no init has shown what fits."""
    init = entry.previous_init
    if init is None or entry.variables is None:
        return None if init is None else init.shapes, frozenset()
    by_init = entry.variables if init.shapes is None else init.shapes
    return entry.variables, frozenset(name for name in entry.variables if name not in by_init)


def _into_module(
    entry: ModelEntry, model: ModelWithVariables, variables: object, written: Written, cell: int | None
) -> tuple[ModelEntry, Callable[[], None]]:
    """Checks variables for an NNX module. Those that are not given stay as they are, as in `nnx.update`."""
    name = entry.name
    check_state(name, variables, written, model.module)
    held, values = _by_path(model.own_variables()), model.read_state(name, variables)
    # A state may also have streams and sown values, which are not compared; `read_state` refuses unknown paths.
    wrong = misfits(held, {path: leaf for path, leaf in _by_path(values).items() if path in held})
    if wrong:
        raise unfit(name, wrong)
    check_alive(f"these variables of `{name}`", values)
    source = WeightSource.assigned(cell, {kind: values[kind] for kind in model.collections()}, in_module=True)
    return replace(entry, rebuild_next=False, source=source), lambda: model.assign(values)


def _by_path(values: Mapping[str, Mapping[str, Leaf]]) -> dict[str, Leaf]:
    """The variables by path, whatever the type that they are grouped by."""
    return {path: value for tree in values.values() for path, value in tree.items()}


def replaced_by_init(entry: ModelEntry, limit: int) -> tuple[Replaced | None, tuple[Note, ...]]:
    """The variables that an init replaces, if they are more than an init's own, and the note that says so.

    Otherwise it returns what an earlier init replaced, which is kept on.

    Args:
      limit: the most bytes to keep.
    """
    source = entry.source_now()
    # As an init made them, they can be made again: nothing is lost.
    if not entry.ready or source is None or (source.is_initial and not entry.update_counts):
        return entry.replaced, ()
    replaced = Replaced(entry.read_variables(), source, entry.update_counts)
    runs = ", ".join(f"{name}: update {updates}" for name, updates in entry.update_counts.items())
    text = f"this init replaced weights of {entry.name}: {source.describe()}" + (f", {runs}" if runs else "")
    if replaced.size > limit:
        gone = f"; they are not kept: {bytes_(replaced.size)} are more than replay_bytes, {bytes_(limit)}"
        return None, (Note("replaced", text + gone),)
    return replaced, (Note("replaced", text, write=PREVIOUS.format(entry.name)),)
