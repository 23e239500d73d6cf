"""What a session keeps of one model, and what a replay of one of its runs needs."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from types import SimpleNamespace
from typing import Any, ClassVar, Concatenate, ParamSpec, Self, TypeVar

import jax
from msgspec import Struct
from msgspec.structs import replace

from ..base.digest import bytes_of, is_gone, owned_copy
from ..base.types import Leaf, PyTree
from ..code.contents import static_data
from ..compile.cache import Program
from ..compile.initialise import InitRecord
from ..compile.placement import Placement, Shardings
from ..line.options import ApplyOptions
from ..models.base import CallTrace, Model, ModelWithInit, ModelWithVariables, Needs
from ..models.calls import Path
from ..models.construction import BuiltBySession, Construction, adopt_built
from .training import Optimizer, Training, TrainOptions
from .weights import COPIES, Collections, WeightSource, Written, check_alive, check_collections, check_state


class AnyEntry(Struct, frozen=True):
    """The part of a registered model's entry that linen and NNX share.

    Attributes:
      fingerprint: `Model.fingerprint` at registration; None where it cannot be computed.
      update_counts: collection → how many runs have written it since the init.
      outdated: the variables are from before an edit that changed how they are made.
      known_needs: what runs asked for last, by method and mode; spares a trace, never decides one.
    """

    name: str
    model: Model
    fingerprint: bytes | None
    update_counts: Mapping[str, int] = {}
    outdated: bool = False
    known_needs: Mapping[tuple[Path, str], Needs] = {}
    static_ints: frozenset[tuple[Path, str]] = frozenset()
    """(method, argument) of each int argument whose value the model needs, so that it is static."""
    source: WeightSource | None = None
    """Where the variables came from; None as long as there are none."""
    replaced: Replaced | None = None
    """Variables that the last init replaced, if they were more than an init's own; or a training that diverged."""
    optimizer: Optimizer | None = None
    """The one of the last training, which later ones use where none is named."""
    training: Training | None = None
    """What goes on with the last training; None where there was none, or where other variables took its place."""

    @property
    def variables(self) -> Collections | None:
        """The variables that the session holds: None before the init, and of a module that holds its own."""
        return None

    @property
    def ready(self) -> bool:
        """Whether there are variables to run with."""
        return self.source is not None

    @property
    def built_by_user(self) -> bool:
        """Whether only the user's own code, which built the module, can make its variables anew."""
        return False

    @property
    def used(self) -> bool:
        """Whether a run has used the model, or anybody has given it variables."""
        return bool(self.known_needs or self.update_counts)

    @property
    def linen(self) -> LinenEntry:
        """Itself, where it is known that an init makes the variables."""
        assert isinstance(self, LinenEntry)
        return self

    @property
    def nnx(self) -> NnxEntry:
        """Itself, where it is known that the module holds its variables."""
        assert isinstance(self, NnxEntry)
        return self

    @property
    def held(self) -> Collections | None:
        """The variables by collection as they are now; of an NNX module neither random streams nor sown values."""
        return self.model.own_variables(self.variables)

    @property
    def held_leaves(self) -> list[Leaf]:
        """The leaves of `held`."""
        return jax.tree_util.tree_leaves(self.held)

    def collections(self) -> Collections | None:
        """The variables by collection, random streams of an NNX module left out."""
        return self.model.collections(self.variables)

    def read_variables(self) -> Collections | None:
        """The variables as the user reads them: the collections, or a copy of an NNX module's `nnx.state`."""
        return self.model.state(self.variables)

    def source_now(self) -> WeightSource | None:
        """Where the variables came from that are held now: notices others that the user's code put in their place."""
        held = self.held
        return self.source if held is None or self.source is None else self.source.now(held, self.update_counts)

    def check_alive(self, call: str, others: str | None = None) -> None:
        """Checks that no array of the weights was donated or deleted.

        Args:
          call: of the model; it has a gap where nobody knows how it was written.
          others: the line that gives the model what a name of the notebook holds in the place of its weights.

        Raises:
          FlaxMagicsError: one was.
        """
        held = self.held
        if not is_gone(held):
            return
        source, hint = self.source_now(), COPIES
        if self.built_by_user:
            others, hint = f"del {self.name}", f"{hint}\nits cell again after `del` makes new ones"
        whose = f" ({source.describe()})" if source is not None else ""
        check_alive(f"the weights of `{self.name}`{whose}", held, others or f"%flax_init {call}", hint=hint)

    def computes(self, fingerprint: bytes | None) -> bool:
        """Whether a model of that fingerprint computes the same as this one; False where that cannot be told."""
        return fingerprint is not None and fingerprint == self.fingerprint

    def registered(self) -> Self:
        """The entry with what is found out of a model when it is registered."""
        return replace(self, fingerprint=self.model.fingerprint())

    def without_variables(self) -> Self:
        """The entry without arrays; see `AnyModel.without_arrays`."""
        model = self.model.without_arrays()
        return replace(self, model=model, update_counts={}, replaced=None, optimizer=None, training=None)


class LinenEntry(AnyEntry, frozen=True):
    """A linen model, whose variables the session holds.

    Attributes:
      variables: None until initialised.
      init: how the variables were initialised; None if they were assigned.
      previous_init: the init whose variables are there no more, or what it is after an edit: it tells what fits the model.
    """

    model: ModelWithInit
    variables: Collections | None = None
    init: InitRecord | None = None
    previous_init: InitRecord | None = None
    built: ClassVar[None] = None
    rebuild_next: ClassVar[bool] = False
    """A session builds no linen module."""

    @property
    def used(self) -> bool:
        """Whether a run has used the model, or anybody has given it variables."""
        return super().used or self.variables is not None or self.previous_init is not None

    @property
    def last_init(self) -> InitRecord | None:
        """The last init that is known, which tells what fits the model, whatever was assigned since."""
        return self.init or self.previous_init

    def still(self, before: ModelEntry) -> bool:
        """Whether it is the model that `before` was. Without a fingerprint only the same object is known to be."""
        return self.model is before.model if self.fingerprint is None else self.computes(before.fingerprint)

    def read_given(self, values: PyTree, written: Written) -> Collections:
        """Variables that are given for one run. Raises FlaxMagicsError if they are none."""
        check_collections(self.name, values, written)
        return values  # type: ignore[no-any-return]

    def with_variables(
        self, variables: Collections | None, source: WeightSource | None, init: InitRecord | None = None
    ) -> LinenEntry:
        """The entry with other variables, which no run has written yet."""
        return replace(
            self, variables=variables, init=init, update_counts={}, outdated=False, source=source, training=None
        )

    def trained(self, values: Collections, source: WeightSource, *, last: bool) -> LinenEntry:
        """The entry with what a training has made of the variables; `last`: at its end, no more is to come."""
        return replace(self, variables={**(self.variables or {}), **values}, source=source.over(values))

    def to_be_made_anew(self) -> LinenEntry:
        """The entry without variables, which its next use initialises."""
        return replace(self.with_variables(None, None), previous_init=self.last_init)

    def without_variables(self) -> Self:
        """The entry without arrays; see `AnyModel.without_arrays`."""
        return replace(super().without_variables(), variables=None, init=None)

    def with_arrays(self, variables: Collections | None) -> LinenEntry:
        """The inverse of `without_variables`."""
        return replace(self, variables=variables)


class NnxEntry(AnyEntry, frozen=True):
    """An NNX module, which holds its own variables.

    Attributes:
      built: how the session built it; None where the user's code did.
      rebuild_next: it is to be built again at its next use (`--fresh`).
      initial_sample: a digest of some elements of its variables when it was registered: tells another seed.
    """

    model: ModelWithVariables
    built: BuiltBySession | None = None
    rebuild_next: bool = False
    initial_sample: bytes | None = None
    init: ClassVar[None] = None
    last_init: ClassVar[None] = None
    """The variables are made with the module."""

    @property
    def built_by_user(self) -> bool:
        """Whether only the user's own code, which built the module, can make its variables anew."""
        return self.built is None

    @property
    def held_leaves(self) -> list[Leaf]:
        """The leaves of `held`."""
        return self.model.layout.leaves()

    def registered(self) -> Self:
        """The entry with what is found out of a module when it is registered."""
        sample, source = self.model.sample(), WeightSource.own(self.name)
        return replace(super().registered(), initial_sample=sample, source=source)

    def still(self, before: ModelEntry) -> bool:
        """Whether it is the module that `before` was, as far as that can be told: no replay keeps the module itself."""
        return isinstance(before, NnxEntry) and (before.fingerprint is None or self.computes(before.fingerprint))

    def read_given(self, values: PyTree, written: Written) -> dict[str, dict[str, Leaf]]:
        """Variables that are given for one run, completed by those that are held; see `read_state`."""
        check_state(self.name, values, written, self.model.module)
        return self.model.read_state(self.name, values)

    def trained(self, values: Collections, source: WeightSource, *, last: bool) -> NnxEntry:
        """The entry after steps of a training; `last`: at its end, no more is to come."""
        # In a module arrays are marked by a digest of some elements, which only the last commit waits for.
        return replace(self, source=source.over(values, in_module=True) if last else source)

    def to_be_made_anew(self) -> NnxEntry:
        """The entry of a module that is built anew at its next use."""
        return replace(self, update_counts={}, outdated=False, training=None, rebuild_next=True)

    def without_variables(self) -> Self:
        """The entry without arrays; see `AnyModel.without_arrays`."""
        return replace(super().without_variables(), built=None)

    def with_arrays(self, variables: Collections | None) -> NnxEntry:
        """The inverse of `without_variables`: of a module of its own, which holds `variables`."""
        record: Any = self.model
        model = adopt_built(record.skeleton.rebuild(variables), record.written)
        return replace(self, model=model if record.around is None else record.around(model), rebuild_next=False)


ModelEntry = LinenEntry | NnxEntry
"""A registered model, as the session's state has it."""

P = ParamSpec("P")
T = TypeVar("T")


def by_kind(
    linen: Callable[Concatenate[LinenEntry, P], T], nnx: Callable[Concatenate[NnxEntry, P], T]
) -> Callable[Concatenate[ModelEntry, P], T]:
    """The function that is `linen` for the entry of a linen model, and `nnx` for that of an NNX module."""
    functions: Mapping[type, Callable[..., T]] = {LinenEntry: linen, NnxEntry: nnx}

    def of_kind(entry: ModelEntry, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return functions[type(entry)](entry, *args, **kwargs)

    return of_kind


class ApplyRecipe(Struct, frozen=True, eq=False):
    """What the applies of one line have in common, for their replays.

    Attributes:
      entry: the model as it was, without variables; its `model` is a `ModelRecord` where it would hold some.
      options: without the variables of `--variables`, which are among those that the run had.
      taken: the draw's `params` key had gone into variables.
      settings: JAX's and Flax's at the time, see `program_keys.settings`.
      key: `Model.cache_key` at the time, None where programs cannot be told apart.
      program: a weak reference to the program, which lives as long as the session keeps it; None if it has no key.
      names: names of the input leaves for the program, None for each that is static.
      structure: treedef of the variables.
      objects: a digest of `objects_in` the inputs and variables; empty where there are none, None where it is unknown.
      moving: an input holds variables, which runs may change in place.
      inputs, variables, written: bytes of the inputs, of the variables, and of what the run writes.
      pinned: arrays that the model holds besides its variables.
      placement, shardings: the mesh that it ran on, and how each argument was laid out there by name.
    """

    entry: ModelEntry
    method: Path
    options: ApplyOptions
    taken: bool
    settings: tuple[object, ...]
    key: object
    program: weakref.ref[Program] | None
    names: tuple[str | None, ...]
    record: CallTrace
    structure: jax.tree_util.PyTreeDef
    objects: bytes | None
    moving: bool
    inputs: int
    variables: int
    written: int
    pinned: tuple[Leaf, ...] = ()
    placement: Placement | None = None
    shardings: Shardings = {}

    @property
    def name(self) -> str:
        """The registered name."""
        return self.entry.name

    @property
    def size(self) -> int:
        """The most bytes that keeping a run for replays may take."""
        return self.inputs + self.variables + sum(map(bytes_of, self.pinned))


class InitRecipe(Struct, frozen=True, eq=False):
    """What a replay of a linen init needs: the model as it was, and the method; `pinned` as in `ApplyRecipe`."""

    entry: LinenEntry
    method: Path
    pinned: tuple[Leaf, ...] = ()


class BuildRecipe(Struct, frozen=True, eq=False):
    """What a replay of an NNX construction needs; `fingerprint` is the recipe's then, `pinned` as in `ApplyRecipe`."""

    name: str
    recipe: Construction
    fingerprint: bytes | None
    pinned: tuple[Leaf, ...] = ()


class TrainRecipe(Struct, frozen=True, eq=False):
    """What a replay of a training needs.

    Attributes:
      entry: as in `ApplyRecipe`.
      function, loss: the loss, and how it is written.
      options: as they were completed, without the `--eval` data.
      call: the text of the call.
      taken: the draw's `params` key had gone into variables before.
      structure: treedef of the variables that it began with; None where it initialised them.
      pinned, placement: as in `ApplyRecipe`.
      built: how the session builds the module that the training built anew; None for others.
    """

    entry: ModelEntry
    function: Any
    loss: str
    options: TrainOptions
    call: str
    taken: bool
    structure: jax.tree_util.PyTreeDef | None
    pinned: tuple[Leaf, ...] = ()
    placement: Placement | None = None
    built: BuiltBySession | None = None


class Origin(Struct, eq=False):
    """What a replay of one run needs besides keys and inputs: its recipe, and leaves of the variables that it had."""

    how: ApplyRecipe | InitRecipe | BuildRecipe | TrainRecipe
    leaves: list[Leaf]

    @property
    def record(self) -> CallTrace | None:
        """What the trace of an apply saw, None for an init or a construction."""
        return self.how.record if isinstance(self.how, ApplyRecipe) else None


def objects_in(treedef: object, leaves: Iterable[Leaf], structure: object) -> list[Leaf]:
    """Whatever may be changed in place: inputs that are neither arrays nor plain values, and aux data of both pytrees.

    Args:
      treedef: of the inputs, whose `leaves` these are.
      structure: treedef of the variables.
    """
    plain = (bool, int, float, complex, str, bytes, type(None))
    others = (leaf for leaf in leaves if not hasattr(leaf, "dtype") and not isinstance(leaf, plain))
    return [*others, *static_data(treedef), *static_data(structure)]


class Replaced:
    """Variables that an init replaced, kept for `models[name].previous` while replays leave room for them.

    Attributes:
      source: where they came from.
      updates: collection → how many runs had written it.
      origin, inputs: as in `StoredRun`, so that `ReplayBudget` can treat it like a run; None once dropped.
    """

    def __init__(self, variables: object, source: WeightSource, updates: Mapping[str, int]) -> None:
        self.source, self.updates = source, updates
        nothing: Any = SimpleNamespace(pinned=())  # in place of a recipe, of which only `pinned` is read
        leaves, self._structure = jax.tree_util.tree_flatten(variables)
        self.inputs: tuple[object, list[Leaf]] | None = (None, [])
        self.origin: Origin | None = Origin(nothing, list(map(owned_copy, leaves)))
        self.size = sum(map(bytes_of, leaves))

    @property
    def variables(self) -> PyTree:
        """The pytree that the init replaced. Only to be asked for while `origin` is there."""
        assert self.origin is not None
        return jax.tree_util.tree_unflatten(self._structure, self.origin.leaves)

    def let_go(self) -> None:
        """Drops the arrays, to stay within `replay_bytes`."""
        self.origin = self.inputs = None
