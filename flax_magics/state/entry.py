"""What a session keeps of one model, and what running one of its runs again needs."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import jax
from msgspec import Struct
from msgspec.structs import replace

from ..base.digest import bytes_of, own
from ..base.types import Leaf, PyTree
from ..code.contents import static_data
from ..compile.cache import Program
from ..compile.initialise import InitRecord
from ..line.options import ApplyOptions
from ..models.base import CallTrace, Model, Needs
from ..models.calls import Path
from ..models.construction import BuiltBySession, Construction
from .weights import COPIES, Collections, WeightSource, check_alive

if TYPE_CHECKING:
    from ..models.nnx_layout import Skeleton


class ModelEntry(Struct, frozen=True):
    """A registered model as the session's state has it.

    Attributes:
      fingerprint: at registration, None where the model is not plain.
      variables: None until initialised.
      init: how the variables were initialised; None if they were assigned.
      update_counts: collection → how many runs have written it since the init.
      outdated: the variables are from before an edit that changed how they are made.
      known_needs: what runs asked for last, by method and mode; spares a trace, never decides one.
    """

    name: str
    model: Model
    fingerprint: bytes | None
    variables: Collections | None = None
    init: InitRecord | None = None
    update_counts: Mapping[str, int] = {}
    outdated: bool = False
    known_needs: Mapping[tuple[Path, str], Needs] = {}
    static_ints: frozenset[tuple[Path, str]] = frozenset()
    """Int arguments, by method, whose value the model needs."""
    built: BuiltBySession | None = None
    """How the session built the module (NNX), None where the user did."""
    rebuild_next: bool = False
    """A module that holds its variables is to be built anew at its next use."""
    initial_sample: bytes | None = None
    """A digest of such a module's variables as they were when it was registered."""
    previous_init: InitRecord | None = None
    """How the variables were made in whose place the user has put others: what the model's own look like."""
    source: WeightSource | None = None
    """Where the variables came from; None as long as there are none."""
    replaced: Replaced | None = None
    """Variables in whose place an init has put fresh ones, where those were more than an earlier init's."""

    @property
    def ready(self) -> bool:
        """Whether there are variables."""
        return self.variables is not None or self.model.holds_variables

    @property
    def used(self) -> bool:
        """Whether a run has used the model, or anybody has given it variables."""
        return bool(self.variables is not None or self.known_needs or self.update_counts or self.previous_init)

    @property
    def held(self) -> Collections | None:
        """The variables by collection, where the session or the module holds them now."""
        return self.model.own_variables() if self.model.holds_variables else self.variables

    def collections(self) -> Collections | None:
        """The variables by collection, random streams of an NNX module left out."""
        return self.model.collections() if self.model.holds_variables else self.variables

    def read_variables(self) -> Collections | None:
        """The variables as the user reads them: the collections, or a copy of an NNX module's `nnx.state`."""
        return self.model.state() if self.model.holds_variables else self.variables

    def source_now(self) -> WeightSource | None:
        """Where the variables came from that are held now."""
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
        source, hint = self.source_now(), COPIES
        if self.model.holds_variables and self.built is None:
            others, hint = f"del {self.name}", f"{hint}\nits cell again after `del` makes new ones"
        whose = f" ({source.describe()})" if source is not None else ""
        check_alive(f"the weights of `{self.name}`{whose}", self.held, others or f"%flax_init {call}", hint=hint)

    def computes(self, fingerprint: bytes | None) -> bool:
        """Whether a model of that fingerprint computes what this one does, as far as can be told."""
        return fingerprint is not None and fingerprint == self.fingerprint

    def with_variables(
        self, variables: Collections | None, source: WeightSource | None, init: InitRecord | None = None
    ) -> ModelEntry:
        """The model with other variables, which no run has written."""
        return replace(self, variables=variables, init=init, update_counts={}, outdated=False, source=source)

    def without_variables(self) -> ModelEntry:
        """The model as it is, holding no arrays: of a module that holds its own only the name, and what was learned."""
        model: Any = self.model
        if self.model.holds_variables:
            # The module itself is the user's, and would keep its arrays alive for as long as this is kept.
            model = _NoModel(self.model.written)
        return replace(self, model=model, variables=None, init=None, update_counts={}, built=None, replaced=None)


class _NoModel(Struct, frozen=True):
    """In the place of a module that is not to be held."""

    written: str


class ApplyRecipe(Struct, frozen=True, eq=False):
    """What applies of one line have in common.

    Attributes:
      entry: the model as it was, without variables. Of a module that holds its variables it says the name alone.
      skeleton: such a module without its arrays (see `Layout.skeleton`), None for every other.
      options: without the variables of `--variables`, which are those that it ran with.
      taken: the draw's `params` key had gone into variables.
      settings: JAX's, as they were.
      key: what told its program from every other, None where that could not be told.
      program: the executable and what it asked for, for as long as the session keeps it; None where there was none.
      names: the traced inputs by the names that the program knows them by, None in the place of one that is static.
      structure: how the variables are put together.
      objects: a digest of `objects_in` the inputs and variables, None where it cannot be told.
      moving: an input is an object that changes where it is.
      inputs, variables, written: bytes of each; of what the run writes.
      pinned: arrays that the model holds besides its variables.
    """

    entry: ModelEntry
    skeleton: Skeleton | None
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

    @property
    def name(self) -> str:
        """The registered name."""
        return self.entry.name

    @property
    def size(self) -> int:
        """Bytes that a run may hold on to, at most."""
        return self.inputs + self.variables + sum(map(bytes_of, self.pinned))


class InitRecipe(Struct, frozen=True, eq=False):
    """What an init of a linen model needs: the model as it was, and the method called; `pinned` as in `ApplyRecipe`."""

    entry: ModelEntry
    method: Path
    pinned: tuple[Leaf, ...] = ()


class BuildRecipe(Struct, frozen=True, eq=False):
    """What building an NNX module needs: its recipe, and a digest of that at the time; `pinned` as in `ApplyRecipe`."""

    name: str
    recipe: Construction
    fingerprint: bytes | None
    pinned: tuple[Leaf, ...] = ()


@dataclass(eq=False, slots=True)
class Origin:
    """What one run came from: `how` it was run, and the leaves of the variables that it ran with."""

    how: ApplyRecipe | InitRecipe | BuildRecipe
    leaves: list[Leaf]

    @property
    def record(self) -> CallTrace | None:
        """What the run was seen to ask for."""
        return self.how.record if isinstance(self.how, ApplyRecipe) else None


def objects_in(treedef: object, leaves: Iterable[Leaf], structure: object) -> list[Leaf]:
    """What may have changed where it is: inputs that are no arrays and not plain, static data of these and of variables.

    Args:
      structure: how the variables are put together.
    """
    plain = (bool, int, float, complex, str, bytes, type(None))
    others = (leaf for leaf in leaves if not hasattr(leaf, "dtype") and not isinstance(leaf, plain))
    return [*others, *static_data(treedef), *static_data(structure)]


class Replaced:
    """Variables that an init replaced, kept among the runs for as long as there is room, and until they are let go of.

    Attributes:
      source: where they came from.
      updates: collection → how many runs had written it.
      origin, inputs: as `StoredRun` has them, so that they count like a run; None once they were let go of.
    """

    def __init__(self, variables: object, source: WeightSource, updates: Mapping[str, int]) -> None:
        self.source, self.updates = source, updates
        nothing: Any = SimpleNamespace(pinned=())  # came to be by no run, and holds nothing besides the variables
        leaves, self._structure = jax.tree_util.tree_flatten(variables)
        self.inputs: tuple[object, list[Leaf]] | None = (None, [])
        self.origin: Origin | None = Origin(nothing, list(map(own, leaves)))
        self.size = sum(map(bytes_of, leaves))

    @property
    def variables(self) -> PyTree:
        """As they were."""
        assert self.origin is not None
        return jax.tree_util.tree_unflatten(self._structure, self.origin.leaves)

    def let_go(self) -> None:
        """Lets go of the arrays."""
        self.origin = self.inputs = None
