"""Compares variables from a file with the model that is registered under their name, and restores them.

Either all of them fit (same tree, shapes and dtypes) or none is used; what does not fit is listed leaf by leaf.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
from msgspec import Struct
from msgspec.structs import replace

from ..base.digest import alike
from ..base.text import clean
from ..base.types import Leaf, PyTree
from ..code.inventory import edited, source_of
from ..compile.initialise import InitRecord, initialised
from ..errors import FlaxMagicsError
from ..execution.build import Building, RegisterResult, built_with
from ..models.base import ModelWithInit
from ..models.construction import Construction
from ..run import Note
from ..state.entry import LinenEntry, ModelEntry, NnxEntry, by_kind
from ..state.models import Registration, differences
from ..state.state import SavedModel, State
from ..state.training import Optimizer
from ..state.trees import Differs, foreign_in, graft
from ..state.weights import WeightSource, named_leaves
from .document import versions


class Unfit(Exception):
    """Raised where variables from a file do not fit the registered model; `lines` has each difference."""

    def __init__(self, lines: tuple[str, ...]) -> None:
        self.lines = tuple(map(clean, lines))  # they have names from the file
        super().__init__(", ".join(self.lines))


class Matched(Struct, frozen=True):
    """A model's entry with the variables from the file.

    Attributes:
      entry: the entry for the session.
      write: puts the variables into the user's own object (NNX); None where the session holds them.
      other: how the model differs from the one that was saved, such as `was Net(rate=0.5) there`.
    """

    entry: ModelEntry
    write: Callable[[], None] | None = None
    other: tuple[str, ...] = ()


def match(saved: SavedModel, entry: ModelEntry) -> Matched:
    """`entry` with the variables of `saved`. Nothing is changed here.

    Raises:
      Unfit: they do not fit.
    """
    model = entry.model
    if saved.api != model.api:
        there, here = ("a linen" if each.api == "linen" else "an NNX" for each in (saved, model))
        raise Unfit((f"{there} model is in the file, and {here} one is registered",))
    matched = _restored(entry, saved)
    # The variables may fit, and the outputs still be others.
    names = edited(saved.source, source_of(model.module)) if saved.ready and saved.source else ()
    return replace(matched, other=(*matched.other, f"{', '.join(names)} edited since")) if names else matched


def _into_session(entry: LinenEntry, saved: SavedModel) -> Matched:
    """Restores a linen model, whose variables the session holds."""
    model = entry.model
    if saved.variables is None:
        return Matched(entry.with_variables(None, None))
    variables, init, outdated = _held_against(saved, model)
    assigned = saved.assigned or init is None
    if init is None:  # a loss made them, which is in no file
        init = entry.last_init
        if init is not None and init.shapes is not None:
            _check_common(variables, init.shapes, saved.updates)
    entry = replace(
        entry,
        variables=variables,
        init=None if assigned else init,
        previous_init=init if assigned else None,
        update_counts=dict(saved.updates),
        outdated=outdated,
        source=WeightSource.loaded(saved.file, variables),
        **_trained(saved),
    )
    return Matched(entry, other=() if saved.text == model.describe() else (f"was {saved.text} there",))


def _check_common(variables: PyTree, shapes: PyTree, updates: Container[str]) -> None:
    """Raises Unfit where a leaf that both trees have is another in the model's last init; what runs wrote is left out."""
    there, here = (
        named_leaves({name: tree for name, tree in each.items() if name not in updates})
        for each in (_leaves_only(variables), shapes)
    )
    changes = differences(*({name: each[name] for name in there if name in here} for each in (there, here)))
    if changes:
        raise Unfit(changes)


def _trained(saved: SavedModel) -> dict[str, Any]:
    """The fields of an entry that `--resume` goes on with.

    No text of a file is run: optimizer and `--eval` data have to be given again, but for data that are a name.
    """
    training = None if saved.training is None else saved.training.training()
    if training is not None and not training.eval.isidentifier():
        training = replace(training, eval="")
    return {"optimizer": None if saved.optimizer is None else Optimizer(saved.optimizer, None), "training": training}


def _held_against(saved: SavedModel, model: ModelWithInit) -> tuple[PyTree, InitRecord | None, bool]:
    """The variables in the model's own classes, how they are made, and whether the model would now make others."""
    saved_init, variables, init = saved.made, saved.variables, None
    if saved_init is not None:
        try:
            init = initialised(model, saved_init.key, saved_init.method, saved_init.args, saved_init.kwargs)
        except Exception as error:  # the user's present code does not accept the old call
            raise Unfit((f"the call that initialised it fails now ({type(error).__name__})",)) from error
    # Where the init depends on values, only running it would tell its shapes.
    if saved_init is None or init is None or init.shapes is None:
        opaque = foreign_in(variables)
        if opaque is not None:
            text = f"{opaque[0]} is a {opaque[1]} in the file, and the model does not say what to make of it"
            raise Unfit((text,))
        return variables, init, saved.outdated
    try:
        variables = graft(variables, init.shapes)
    except Differs as error:
        raise Unfit((str(error),)) from None
    except Exception as error:  # a pytree class of the user's that does not take these children
        raise Unfit((f"its variables cannot be put together ({type(error).__name__})",)) from error
    # Only what the init makes is compared: runs may have grown what they wrote, or added collections.
    names = [name for name in init.shapes if name not in saved.updates and (name in variables or not saved.assigned)]
    # `params` are compared always: they must be there, whatever was assigned or written.
    if "params" in init.shapes and "params" not in names:
        names.append("params")
    present = {name: variables[name] for name in names if name in variables}
    changes = differences(_leaves_only(present), _leaves_only({name: init.shapes[name] for name in names}))
    if changes:
        raise Unfit(changes)
    # With other versions, the same code may trace to another program.
    outdated = saved.outdated or (saved.versions == versions() and init.program != saved_init.program)
    return variables, init, outdated


def _leaves_only(tree: PyTree) -> PyTree:
    """Shape and dtype of each leaf; for Python numbers and 64-bit NumPy arrays the dtype that JAX uses in a run."""
    return jax.tree_util.tree_map(_leaf, tree)


def _leaf(leaf: Leaf) -> object:
    if isinstance(leaf, (bool, int, float, complex)):
        return jax.ShapeDtypeStruct((), jax.dtypes.canonicalize_dtype(type(leaf)))
    if isinstance(leaf, (np.ndarray, np.generic)):
        return jax.ShapeDtypeStruct(leaf.shape, jax.dtypes.canonicalize_dtype(leaf.dtype))
    if hasattr(leaf, "shape") and hasattr(leaf, "dtype"):
        return leaf
    return SimpleNamespace(dtype=type(leaf).__name__, shape=())  # no array: only its type can be compared


def _into_module(entry: NnxEntry, saved: SavedModel) -> Matched:
    """Restores an NNX module: each saved variable goes to the one at the same path.

    Its description depends on how its construction was written, so that is not compared.
    """
    model = entry.model
    slots = {slot.name: slot for slot in model.layout.slots if not slot.sown and not slot.fixed}
    # A file that somebody altered may have something else in the place of the paths.
    trees = {kind: tree for kind, tree in (saved.variables or {}).items() if isinstance(tree, Mapping)}
    saved_values = {name: (kind, value) for kind, tree in trees.items() for name, value in tree.items()}
    values: dict[str, dict[str, PyTree]] = {}
    changes: list[str] = []
    for name in sorted(saved_values, key=str):
        slot, (kind, value) = slots.get(name), saved_values[name]
        if slot is None:
            changes.append(f"{name} removed")
        elif slot.collection != kind:
            changes.append(f"{name} {kind}→{slot.collection}")
        else:
            values.setdefault(kind, {})[name], more = _fitted(value, slot.read(), name)
            changes += more
    changes += [f"{name} added" for name in slots if name not in saved_values]
    if changes:
        raise Unfit(tuple(changes))
    # Keys and counts of streams, which each draw replaces, are no weights.
    weights = {
        kind: {name: value for name, value in tree.items() if not slots[name].drawn} for kind, tree in values.items()
    }
    built = entry.built
    if built is not None and saved.keys is not None:
        built = replace(built, keys=saved.keys)
    entry = replace(
        entry,
        update_counts=dict(saved.updates),
        outdated=saved.outdated,
        rebuild_next=saved.stale,
        built=built,
        source=WeightSource.loaded(saved.file, weights, in_module=True),
        **_trained(saved),
    )
    return Matched(entry, lambda: model.assign(values))


_restored = by_kind(_into_session, _into_module)


def _fitted(value: PyTree, there: PyTree, name: str) -> tuple[PyTree, list[str]]:
    """A variable's value rebuilt in the classes of the present one, and the differences between the two."""
    try:
        value = graft(value, there, name)
    except Differs as error:
        return value, [str(error)]
    except Exception as error:  # a pytree class of the user's that does not take these children
        return value, [f"{name} cannot be put together ({type(error).__name__})"]
    same = alike(jax.tree_util.tree_structure(value), jax.tree_util.tree_structure(there))
    changes = [] if same else [f"{name} is put together otherwise"]
    # `differences` names a leaf by its path, which is empty for the variable itself: its line begins with a space.
    lines = differences(_leaves_only(value), _leaves_only(there))
    return value, changes + [f"{name}{line}" if line.startswith(" ") else f"{name}/{line}" for line in lines]


def unfit(errors: Mapping[str, Unfit], path: str) -> FlaxMagicsError:
    """The error for registered models that the file's variables do not fit; `path` is the file."""
    lines = [f"{name}: {change}" for name, error in errors.items() for change in error.lines]
    names = ", ".join(f"`{name}`" for name in errors)
    verb = "does" if len(errors) == 1 else "do"
    message = f"the variables in `{path}` do not fit: {names} as registered {verb} not have them. Nothing was loaded."
    return FlaxMagicsError(message, hint="\n".join(lines))


class RestoringBuilding(Building):
    """Registers modules in a session where variables from a file still wait for their models."""

    def register(self, state: State, name: str, module: object, *, anew: bool, cell: int | None) -> RegisterResult:
        """As `Building.register`, and restores the variables that wait for the name, if they fit.

        A module that the file's session had built is built with the same keys, which makes no draw, if the variables
        then fit.
        """
        saved = state.waiting.get(name)
        construction = module if isinstance(module, Construction) else None
        if saved is not None and construction is not None and saved.keys is not None:
            restored, change = registered(state, *built_with(None, name, construction, saved.keys))
            if not change.unfit:
                return restored, change, None
        after, change, run = super().register(state, name, module, anew=anew, cell=cell)
        # An equal construction kept the module that is there, which is not restored over.
        if saved is None or not saved.ready or (construction is not None and run is None):
            return after, change, run
        return *registered(replace(after, waiting=state.waiting), after.models[name], change), run


def registered(state: State, entry: ModelEntry, change: Registration) -> tuple[State, Registration]:
    """The state with `entry` registered, restored if variables that wait for it fit; and what to say of it."""
    entry, change = matched(state.waiting, entry, change)
    waiting = state.waiting
    if change.variables == "restored":
        waiting = {name: model for name, model in waiting.items() if name != entry.name}
    return replace(state, models={**state.models, entry.name: entry}, waiting=waiting), change


def matched(
    waiting: Mapping[str, SavedModel], entry: ModelEntry, change: Registration
) -> tuple[ModelEntry, Registration]:
    """`entry`, restored if variables that wait for its name fit. Otherwise the result lists why not."""
    saved = waiting.get(entry.name)
    if saved is None or not saved.ready:
        return entry, change
    try:
        fitting = match(saved, entry)
    except Unfit as error:
        return entry, replace(change, file=saved.file, unfit=error.lines)
    write = fitting.write or change.write
    return fitting.entry, replace(change, file=saved.file, variables="restored", write=write, other=fitting.other)


def rebound(
    waiting: Mapping[str, SavedModel], entry: ModelEntry, notes: tuple[Note, ...]
) -> tuple[ModelEntry, tuple[Note, ...]]:
    """Restores the entry of a name that now stands for another module, if variables that wait for it fit.

    An NNX module that the user has put there keeps its own variables.
    """
    if entry.ready:
        return entry, notes
    entry, change = matched(waiting, entry, Registration(entry.name, "changed"))
    if not change.file:
        return entry, notes
    if change.unfit:
        text = f"the variables in {change.file} do not fit {entry.name}: {', '.join(change.unfit)}"
    else:
        text = ", ".join((f"{entry.name} has its variables from {change.file}", *change.other))
    return entry, (*notes, Note("file", text))
