"""Registering, editing and assigning: how a model's entry changes, worked out without changing anything."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

import jax
from msgspec import Struct
from msgspec.structs import replace

from ..base.digest import is_gone
from ..base.text import bytes_
from ..base.types import Leaf, PyTree
from ..compile.initialise import initialised, initialised_in_eval
from ..errors import FlaxMagicsError
from ..models.base import Model, ModelWithVariables
from ..models.construction import adopt
from ..run import Note
from .entry import LinenEntry, ModelEntry, NnxEntry, Replaced, by_kind
from .weights import (
    PREVIOUS,
    Collections,
    WeightSource,
    Written,
    check_alive,
    check_collections,
    check_fit,
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
    notes: tuple[Note, ...] = ()
    """What an edit has dropped that an init would not make again."""
    write: Callable[[], None] | None = None
    """Copies the old variables into the new NNX module, at the commit; None where nothing is copied."""


INITIAL = ("initial values",)
"""What has changed of an NNX module that is built alike, with other keys."""

Assigned = tuple[ModelEntry, Callable[[], None] | None]
"""The entry with variables that were assigned, and what writes them into an NNX module; None for a linen model."""


def register(old: ModelEntry | None, name: str, module: object, limit: int = 0) -> tuple[ModelEntry, Registration]:
    """The entry for `module` under `name`, and how it compares with `old`. Nothing is changed here.

    Args:
      limit: as in `replaced_by_init`, for variables that do not fit the new module.

    Raises:
      FlaxMagicsError: the name is no identifier, or the object is no module that can be registered.
    """
    if not name.isidentifier():
        raise FlaxMagicsError(f"`{name}` is not a name that a model can have.")
    # The same object may have been changed in place, so its fingerprint is asked again.
    if old is not None and module is old.model.module and old.computes(old.model.fingerprint()):
        return old, unchanged(old)
    return compare(old, new_entry(name, adopt(module, name)).registered(), limit)


def new_entry(name: str, model: Model) -> ModelEntry:
    """The entry of a model of which nothing is known yet."""
    kinds: Mapping[str, Callable[..., ModelEntry]] = {"linen": LinenEntry, "nnx": NnxEntry}
    return kinds[model.api](name, model, None)


def compare(old: ModelEntry | None, entry: ModelEntry, limit: int = 0) -> tuple[ModelEntry, Registration]:
    """Of the entry that a name has and a new one: the one to keep, or one with what both have, and how they compare."""
    if old is None:
        return entry, Registration(entry.name, "new")
    if old.model.api != entry.model.api:
        return entry, Registration(entry.name, "changed", variables="own" if entry.ready else "none")
    after, change = _compare(old, entry)
    return (after, change) if change.variables not in ("dropped", "own") else _set_aside(old, after, change, limit)


def _set_aside(old: ModelEntry, after: ModelEntry, change: Registration, limit: int) -> tuple[ModelEntry, Registration]:
    """Both with the weights that an edit dropped, as `replaced` and in a note, where no init makes them again."""
    source, name = old.source_now(), old.name
    # Statistics that runs after an edit have written do not take the place of what a training had made before.
    if source is None or source.is_initial or source == WeightSource.own(name) or is_gone(old.held):
        return replace(after, replaced=old.replaced), change
    replaced, text = replaced_by(old, limit, f"this edit dropped weights of {name}")
    line, write, form = PREVIOUS.format(name), None, None
    if replaced is not None:
        if change.changes == INITIAL:
            write = line
        elif change.variables == "dropped" and after.last_init is None:
            text += "; it takes them again, if they fit, once it is initialised by a call that it takes"
            form = f"%flax_init {name}(…)\n{line}"
        else:
            text += "; it takes them again once the edit is undone"
            form = f"…\n{line}"
    note = Note("replaced", text, write=write, form=form)
    return replace(after, replaced=replaced), replace(change, notes=(note,))


def unchanged(old: ModelEntry) -> Registration:
    """The result of registering the same model again."""
    return Registration(old.name, "unchanged", variables="kept" if old.ready else "none")


def _compare_modules(old: NnxEntry, new: ModelEntry) -> tuple[ModelEntry, Registration]:
    """`compare` for modules that hold their own variables (NNX).

    If an unchanged cell built an equal module again, the old one stays. After an edit the old variables move into the
    new module if all of them fit. If not, or if only initial values differ (another seed), the new one keeps its own.
    """
    entry, name, model, fingerprint = new.nnx, new.name, new.nnx.model, new.fingerprint
    # The same object, changed in place: what it holds is the model.
    if model.module is old.model.module:
        return replace(old, model=model, fingerprint=fingerprint), Registration(name, "changed", variables="kept")
    # After `--fresh` nothing of the old module is carried over.
    if old.rebuild_next:
        return entry, Registration(name, "changed", variables="own")
    same, same_values = old.computes(fingerprint), entry.initial_sample == old.initial_sample
    if same and same_values:
        return old, unchanged(old)
    changes = INITIAL if same else differences(_shapes(old.model), _shapes(model))
    if changes:
        return entry, Registration(name, "changed", changes, "own")
    # The kept values are outdated if the edited code would begin with others.
    values = old.model.collections()
    outdated = old.outdated or not same_values
    entry = replace(entry, update_counts=old.update_counts, outdated=outdated, source=old.source)
    entry = replace(entry, optimizer=old.optimizer, training=old.training)
    return entry, Registration(name, "changed", variables="kept", write=lambda: model.assign(values))


def _shapes(model: ModelWithVariables) -> PyTree:
    variables = _by_path(model.collections())
    return jax.eval_shape(lambda: variables)


def _compare_inits(old: LinenEntry, new: ModelEntry) -> tuple[ModelEntry, Registration]:
    """`compare` for linen models: the old variables stay if the init would make the same names, shapes and dtypes."""
    if old.computes(new.fingerprint):
        return old, unchanged(old)
    model = new.linen.model
    entry = replace(old, model=model, fingerprint=new.fingerprint, static_ints=frozenset())
    old_init, init, failure = old.last_init, None, ""
    if old_init is None:  # how variables are made is unknown, so nothing can be compared
        return entry, Registration(old.name, "changed", variables="kept" if old.ready else "none")
    # The last init's call is traced with the new code; nothing is computed. An edit may have added a switch to the call.
    for trace in (initialised, initialised_in_eval):
        try:
            init = trace(model, old_init.key, old_init.method, old_init.args, old_init.kwargs)
            break
        except Exception as error:
            failure = failure or type(error).__name__
    changes: tuple[str, ...] = ()
    if init is None:
        changes = (f"whether its variables fit cannot be told, as the last init's call fails now ({failure})",)
    else:
        comparable = init.shapes is not None and old_init.shapes is not None
        changes = differences(old_init.shapes, init.shapes) if comparable else ()
    if old.variables is None:
        return replace(entry, previous_init=init), Registration(old.name, "changed")
    if changes:
        entry = replace(entry.with_variables(None, None), previous_init=init)
        return entry, Registration(old.name, "changed", changes, "dropped")
    if old.init is None:  # they were assigned: no init makes them
        return replace(entry, previous_init=init), Registration(old.name, "changed", variables="kept")
    assert init is not None
    # Only an equal init program is sure to make equal variables.
    same = comparable and init.program is not None and init.program == old_init.program
    entry = replace(entry, init=init) if same else replace(entry, outdated=True)
    return entry, Registration(old.name, "changed", variables="kept")


_compare = by_kind(_compare_inits, _compare_modules)


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


def _into_session(entry: LinenEntry, variables: PyTree, written: Written, cell: int | None) -> Assigned:
    """Checks variables for a linen model, and keeps them."""
    # `previous_init` still tells what fits, after `init` no longer describes these variables.
    entry = replace(entry, previous_init=entry.last_init)
    if variables is None:
        return entry.with_variables(None, None), None
    expected, optional = _expected(entry)
    check_collections(entry.name, variables, written, expected)
    if expected is not None:
        check_fit(entry.name, variables, written, expected, optional)
    source = WeightSource.assigned(cell, variables)
    check_alive(f"these variables of `{entry.name}`", variables)
    return entry.with_variables(variables, source), None


def _expected(entry: LinenEntry) -> tuple[Collections | None, frozenset[str]]:
    """Variables that fit the model, and the collections that are optional; None where no init has shown what fits."""
    init = entry.previous_init
    if init is None or entry.variables is None:
        return None if init is None else init.shapes, frozenset()
    by_init = entry.variables if init.shapes is None else init.shapes
    return entry.variables, frozenset(name for name in entry.variables if name not in by_init)


def _into_module(entry: NnxEntry, variables: PyTree, written: Written, cell: int | None) -> Assigned:
    """Checks variables for an NNX module. Those that are not given stay as they are, as in `nnx.update`."""
    name, model = entry.name, entry.model
    values, held = entry.read_given(variables, written), _by_path(model.own_variables())
    # A state may also have streams and sown values, which are not compared; `read_state` refuses unknown paths.
    wrong = misfits(held, {path: leaf for path, leaf in _by_path(values).items() if path in held})
    if wrong:
        raise unfit(name, wrong)
    check_alive(f"these variables of `{name}`", values)
    source = WeightSource.assigned(cell, {kind: values[kind] for kind in model.collections()}, in_module=True)
    entry = replace(entry, update_counts={}, outdated=False, training=None, rebuild_next=False, source=source)
    return entry, lambda: model.assign(values)


assigned = by_kind(_into_session, _into_module)
"""The entry with other variables, and what writes them into the module of an NNX entry.

Args:
  written: how the user gave them.
  cell: the number of the notebook cell; None in a script.

Raises:
  FlaxMagicsError: they do not fit, or one of their arrays was deleted.
"""


def _by_path(values: Mapping[str, Mapping[str, Leaf]]) -> dict[str, Leaf]:
    """The variables by path, whatever the type that they are grouped by."""
    return {path: value for tree in values.values() for path, value in tree.items()}


def replaced_by_init(entry: ModelEntry, limit: int) -> tuple[Replaced | None, tuple[Note, ...]]:
    """The variables that an init replaces, if they are more than an init's own, and the note that says so.

    Otherwise it returns what an earlier init replaced, which is kept on.

    Args:
      limit: the most bytes to keep.
    """
    replaced, text = replaced_by(entry, limit, f"this init replaced weights of {entry.name}")
    if not text:
        return entry.replaced, ()
    return replaced, (Note("replaced", text, write=None if replaced is None else PREVIOUS.format(entry.name)),)


def replaced_by(entry: ModelEntry, limit: int, what: str) -> tuple[Replaced | None, str]:
    """The variables of an entry that others take the place of, and a text that begins with `what`.

    The text is empty if they are an init's own. None where they are more than `limit` bytes, which the text says.
    """
    source = entry.source_now()
    # As an init made them, they can be made again: nothing is lost.
    if not entry.ready or source is None or (source.is_initial and not entry.update_counts):
        return None, ""
    replaced = Replaced(entry.read_variables(), source, entry.update_counts)
    runs = ", ".join(f"{name}: update {updates}" for name, updates in entry.update_counts.items())
    text = f"{what}: {source.describe()}" + (f", {runs}" if runs else "")
    if replaced.size > limit:
        gone = f"; they are not kept: {bytes_(replaced.size)} are more than replay_bytes, {bytes_(limit)}"
        return None, text + gone
    return replaced, text
