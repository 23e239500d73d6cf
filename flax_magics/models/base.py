"""The Protocols through which a session uses a model: linen.py implements `ModelWithInit`, nnx.py `ModelWithVariables`.

A linen module holds no variables: the session keeps them and passes them to each run. An NNX module holds its own: the
session reads them before each run and writes back what the run changed.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Literal, Protocol, Self, TypeAlias

from msgspec import Struct
from msgspec.structs import replace

from ..base.threads import Assignment, at_once
from ..base.types import Leaf, PyTree
from ..code.library import nnx_modules
from ..errors import FlaxMagicsError
from ..run import ExportFacts, Settings
from .calls import Args, Calls, Function, Kwargs, Names, Path
from .switch import Layer, layer_of

if TYPE_CHECKING:
    from .nnx_graph import RebuiltGraph
    from .nnx_layout import Layout, Skeleton, Values

Variables: TypeAlias = Mapping[str, PyTree]
Updates: TypeAlias = dict[str, PyTree]
Forward = Callable[[Variables, Mapping[str, Any], Args, Kwargs], tuple[PyTree, Updates]]
"""`forward(variables, keys, args, kwargs) -> (output, updates)`, pure; `updates`: what was written or sown."""

# Keys of `updates` beside the collections. The parentheses keep them from being the name of a collection or type.
ARGUMENTS = "(arguments)"
"""Holds changes to NNX objects that were passed to the call, such as the counts of an `nnx.Rngs`."""
CONVERTED = "(converted)"
"""Holds unchanged variables whose value was a Python number or a 64-bit NumPy array: a program returns them as JAX
arrays of another dtype, which NNX stores by hand, too."""
STRUCTURE = "(structure)"
"""Holds the variables' values where an NNX run changed the graph itself; see `RebuiltGraph`."""
SOWN = "(sown)"
"""Holds what NNX sowed, by variable type; apart, because variables of the same type may stay in the module."""


class KeyUse(Struct, frozen=True):
    """One key that a module took from a stream, and the random numbers that it drew with it.

    Attributes:
      path: the path of the module.
      source: what is folded into the stream's key: outside of transforms, equal sources in one stream give equal keys.
      drew: shape and rate of a dropout's mask; None for other uses.
      inside: it happened inside a lifted transform (`nn.scan`, `nnx.vmap`, …), which may have split the stream's key.
    """

    stream: str
    path: Path
    source: tuple[object, ...]
    drew: tuple[tuple[int, ...], float] | None = None
    inside: bool = False


class CallTrace(Struct):
    """What one trace observed of the model. Filled while the model is traced; read-only afterwards."""

    asked: dict[str, list[Path]] = {}
    """Stream → paths of the modules that called `make_rng` for it."""
    takes: list[KeyUse] = []
    """Keys that modules took, in order."""
    queried: set[str] = set()
    """Streams for which the model called `has_rng`."""
    written: set[str] = set()
    """Collections that a linen model wrote, sown ones included."""
    sown: set[str] = set()
    """Collections that `sow` wrote; for NNX only `SOWN`."""
    updated: set[str] = set()
    """Collections, types of NNX, that a loss was given and has changed."""
    layers: list[Layer] = []
    """Dropout and normalization layers that were called, each once."""
    axes: set[str] = set()
    """Mapped axes that the model names (`axis_name` of a BatchNorm) and that nothing around it binds."""
    unused: frozenset[str] = frozenset()
    """Traced arguments that no equation of the program reads."""
    unchanged: frozenset[tuple[str, str]] = frozenset()
    """NNX variables (type, path) that the program returns as outputs although they are its unmodified inputs."""
    held: set[str] = set()
    """Streams that an NNX module holds: it gets their keys whether or not it consumes them."""
    structure: RebuiltGraph | None = None
    """The changed graph of an NNX module, None if the run did not change it."""
    calls: Calls | None = None
    """Records the calls of submodules; None where nobody asks for them."""
    foreign: str = ""
    """The class of an object that the model gives or sows and that is no tree of arrays: no program can give it."""

    def passed(self, kind: str, path: Path, module: object, around: list[Any], arguments: Mapping[str, object]) -> None:
        """Records a dropout or normalization layer that is being called; see `layer_of` for the arguments."""
        layer = layer_of(kind, path, module, around, arguments)
        if layer is not None and layer not in self.layers:
            self.layers.append(layer)

    def with_what(self, traced: CallTrace) -> CallTrace:
        """This record of an eager run, completed by what only a trace sees inside the model's own jitted functions.

        An eager run may find such a function in JAX's cache and never run its Python code.
        """
        asked = {name: self.asked.get(name, traced.asked.get(name, [])) for name in {**self.asked, **traced.asked}}
        layers = [*self.layers, *(layer for layer in traced.layers if layer not in self.layers)]
        return replace(self, asked=asked, layers=layers, takes=self.takes or traced.takes)


class Needs(Struct, frozen=True):
    """What one run must be given besides variables: random streams, mutable collections, and mapped axes of size 1."""

    streams: frozenset[str] = frozenset()
    mutable: frozenset[str] = frozenset()
    axes: frozenset[str] = frozenset()

    def and_what(self, record: CallTrace) -> Needs:
        """These needs together with everything that an incomplete trace asked for, for the next attempt."""
        return Needs(self.streams | set(record.asked), self.mutable | record.written, self.axes | record.axes)


class Commit(Struct, frozen=True):
    """The collections that a run changed, and the writes that bring the changes into an NNX module."""

    changed: tuple[str, ...]
    """Collections (NNX: variable types, without random streams) that the run wrote."""
    assignments: tuple[Assignment, ...] = ()
    """Assignments that write the changes into an NNX module; empty for linen, whose variables the session holds."""
    write: Callable[[], None] | None = None
    """Writes what single assignments cannot: references, or a graph with other attributes than before."""

    def make(self) -> None:
        """Writes all changes into the module."""
        if self.write is not None:
            self.write()
        at_once(self.assignments)


class MissingVariables(Exception):
    """Raised by `forward` where the model needs variables that do not exist: the init did not reach this method."""


class ForeignOutput(Exception):
    """The model gives or sows an object that no program can give; its message is the name of the object's class."""


class Incomplete(Exception):
    """Raised by `forward` where the model asked for streams, collections or axes that it was not given.

    The `CallTrace` says for which; the caller traces again with them.
    """


FLAX_ARGUMENTS = {
    "rngs": "each run is a draw, and the session gives its keys",
    "mutable": "--mutable hands a collection back",
    "method": "another method than the call is written by its name",
    "variables": "the session gives its own, and --variables gives others",
    "capture_intermediates": "it is one of Flax's `apply`",
}
"""Argument of Flax's `apply` or `init` → what a command offers in its place; the end of a message."""


class Idiom(FlaxMagicsError):
    """Raised for a call in Flax's own terms: `net.apply(…)` or another base-class method, or `net(x, rngs=…)`.

    `execution.call` turns it into a message with the command to write instead.

    Attributes:
      method: the method of Flax's base class; empty where an argument is the cause.
      argument: the argument of Flax's `apply` or `init`; empty where a method is the cause.
      linen: the method is defined by `nn.Module`.
    """

    def __init__(self, *, method: str = "", argument: str = "", linen: bool = True) -> None:
        super().__init__(f"`{method or argument}` is Flax's own, and not the model's.")
        self.method, self.argument, self.linen = method, argument, linen


def check_name(owner: object, name: str) -> None:
    """Raises Idiom if `owner.name` is defined by `nn.Module`, `nnx.Module` or their bases and not by the model."""
    from flax import linen

    if isinstance(owner, linen.Module) and name in ("scope", "parent"):
        raise Idiom(method=name)
    across = sys.modules.get("flax.nnx.bridge.module")
    bases = (linen.Module, *nnx_modules(), *(() if across is None else (across.Module,)))
    # Compared by identity, not by the defining class: `nnx.tabulate` copies Module's methods into every class it meets.
    missing = object()
    method, *flaxs = [inspect.getattr_static(cls, name, missing) for cls in (type(owner), *bases)]
    if name not in vars(owner) and method is not missing and any(method is each for each in flaxs):
        raise Idiom(method=name, linen=method is flaxs[0])


class ModelRecord(Struct, frozen=True):
    """An NNX module without its arrays.

    Attributes:
      written: its construction, as text.
      around: makes of the module's model the one that ran, where that was a loss of the module.
    """

    written: str
    skeleton: Skeleton
    around: Callable[[Model], Model] | None = None


class AnyModel(Protocol):
    """The part of a model's interface that linen and NNX share."""

    @property
    def api(self) -> Literal["linen", "nnx"]:
        """The one of Flax's two APIs that the module is written in."""

    @property
    def module(self) -> Any:
        """The user's module object."""

    @property
    def held_still(self) -> AbstractContextManager[None]:
        """A block in which the layout of the module is taken as found; `has_same_layout` asks whether it still is so."""

    def has_same_layout(self) -> bool:
        """Whether the module holds the attributes with which its layout was found; if not, that is forgotten."""

    def describe(self) -> str:
        """The construction as a person writes it: `MyModel(num_neurons=3, training=False)`."""

    def methods(self) -> list[str]:
        """Names of the methods that can be called as `net.NAME(…)`, in order of definition."""

    def fields(self) -> list[str]:
        """Names of the module's own fields."""

    def signature(self, method: Path) -> inspect.Signature:
        """The signature of a method (`()`: `__call__`), without `self`. Raises FlaxMagicsError if there is none."""

    def fields_in_mode(self, train: bool, *, fixed: frozenset[str]) -> tuple[Model, tuple[str, ...]]:
        """A copy with its switch fields set for training or evaluation, and what was set, such as `training=True`.

        Args:
          fixed: switches that the call has as arguments; a field of the same name is left to the call.
        """

    def fields_for_init(self, *, fixed: frozenset[str]) -> Self:
        """The model to initialise with: as written, but a switch field without a value is set for evaluation."""

    def fields_as_written(self) -> tuple[str, ...]:
        """The module's own switches with their present values, such as `training=False`."""

    def streams(self) -> frozenset[str]:
        """Streams that every run is given, whether or not it consumes them."""

    def likely_needs(self, mode: str) -> Needs:
        """What a first run in this mode probably asks for: a right guess spares it a trace."""

    def cache_key(self) -> object:
        """A hashable value, equal for two models only if their programs are equal; None where that cannot be told."""

    def fingerprint(self) -> bytes | None:
        """A digest of what the model computes, the same after an unchanged cell ran again; None: cannot be told."""

    def code(self) -> bytes | None:
        """A digest of the model's code and plain values; None where that cannot be told."""

    def with_rngs(self, signature: inspect.Signature, args: Args, kwargs: Kwargs) -> tuple[Model, bool]:
        """(A model that adds the session's `rngs` if the call takes and lacks them, whether the user gave some)."""

    def supplied_arguments(self) -> tuple[str, ...]:
        """Names of the arguments that the model adds to the call: `rngs` or none."""

    def commit(self, updates: Variables, record: CallTrace) -> Commit:
        """The collections that a run's `updates` change, and the writes that bring them into the module."""

    def forward(self, method: Path | Function, ask: Needs, record: CallTrace, root_impl: str) -> Forward:
        """The run as a pure function, which fills `record` while it is called.

        Args:
          method: the path of a method, or a function (a loss) that is called with the module before the arguments.
          ask: the streams, collections and axes to run with.
          root_impl: PRNG implementation of the dummy keys for streams that `ask` lacks.

        Raises:
          Incomplete: `ask` lacks something (raised by the returned function).
          MissingVariables: the model needs variables that do not exist (raised by the returned function).
        """

    def own_variables(self, of_session: Variables | None) -> Variables | None:
        """The variables as they are now: the module's own, or `of_session`, which the session holds in their place.

        The keys and counts of random streams are the draw's to give.
        """

    def collections(self, of_session: Variables | None) -> Variables | None:
        """`own_variables` without anything that belongs to random streams."""

    def state(self, of_session: Variables | None) -> Variables | None:
        """`own_variables` as a user reads them; what the module holds is copied, so that later runs do not change it."""

    def variables_to_save(self, of_session: Variables | None) -> PyTree:
        """The variables as a file holds them: those of `own_variables`, keys and counts of random streams included."""

    def is_state(self, value: Variables, variables: Variables) -> bool:
        """Whether `value` is a pytree like the model's `variables`, as a user writes it; may raise where it is not."""

    def annotations(self) -> Mapping[str, Mapping[str, tuple[Any, ...]]]:
        """Collection → path → axes of a mesh that the variable is annotated with; empty where boxes in the tree say it."""

    def other_arrays(self) -> tuple[Leaf, ...]:
        """Arrays that the module holds besides its variables, such as those in the fields of a linen module."""

    def without_arrays(self) -> Any:
        """What a replay keeps of the model: itself, or a `ModelRecord` where it would keep the variables alive."""

    def module_classes(self) -> Mapping[Path, str]:
        """Path → class name of the modules that are known without a call."""

    def iter_variables(self, variables: Variables) -> Iterator[tuple[str, Path, Leaf, str]]:
        """(collection, path, array, metadata) of every array; metadata is text such as `names=(None, 'mlp')`.

        Keys and counts of random streams that an NNX module holds are reported as one collection, `RngState`.
        """

    def by_hand(self, call: str, method: Path, switch: Names, needs: Needs, *, samples: Names | None) -> str:
        """The run as a person would have written it in plain Flax.

        Args:
          switch: `name=value` of each switch that is set outside of the call.
          samples: the variables that hold a key for each sample; None for a run without `--samples`.
        """

    @property
    def init_streams(self) -> Names:
        """Streams besides `params` that a handwritten init must be given; known once an init has run."""

    def facts_of_run(
        self, facts: ExportFacts, train: bool | None, fields: Settings, *, kept: Updates, sown: Updates, handed: Updates
    ) -> ExportFacts:
        """`facts` with those that tell how an export sets the mode, and what it does with what the run wrote.

        Args:
          train: the mode, training or evaluation; None where the model ran as written.
          fields: the switches that are set outside of the call.
          kept, sown: what the run wrote and what it sowed, by collection.
          handed: what of both `--mutable` handed back.
        """


class ModelWithInit(AnyModel, Protocol):
    """A linen module: an init makes its variables, and the session holds them."""

    def init(self, key: object, method: Path | Function, args: Args, kwargs: Kwargs) -> Updates:
        """Fresh variables; `key` is the `params` key, the only one that an init gets. `method`: see `forward`."""

    def init_by_hand(self, call: str, method: Path, arguments: Settings, module: str) -> str:
        """The init in plain Flax.

        Args:
          arguments: switches that are added to the call.
          module: the expression for the module with its switches set; `MODULE` stands for its name.
        """


class ModelWithVariables(AnyModel, Protocol):
    """An NNX module: it holds its own variables, which a session reads before each run and updates after it."""

    @property
    def written(self) -> str:
        """The text of the construction, such as `Net(8, 3)`, where the session built the module; else empty."""

    @property
    def layout(self) -> Layout:
        """The module split into graph and variables, as it is now."""

    def own_variables(self, of_session: Variables | None = None) -> Values:
        """The present variables by type and path, without the random keys and counts that each draw replaces."""

    def collections(self, of_session: Variables | None = None) -> Values:
        """The present variables without anything that belongs to random streams."""

    def state(self, of_session: Variables | None = None) -> Variables:
        """`nnx.state` of the module with copied variables, which later runs do not change."""

    def read_state(self, name: str, value: object) -> Values:
        """The module's variables, replaced by those in `value`; `name` is the model's, for messages.

        Raises FlaxMagicsError if `value` has a variable that the module lacks.
        """

    def trainable(self) -> frozenset[str]:
        """The types of the variables that gradients are taken by: `Param`, and those that the user derived of it."""

    def as_state(self, values: Values) -> Any:
        """`values`, of some of the variables, as the `nnx.State` that `nnx.state` gives of them."""

    def sample(self) -> bytes:
        """A digest of some elements of every variable: differs between modules built with different seeds."""

    def assign(self, values: Variables) -> None:
        """Writes `values` into the module's own variables."""

    def become(self, other: ModelWithVariables) -> None:
        """Makes the module's own objects equal to the newly built `other`: its values, or its whole structure."""


Model = ModelWithInit | ModelWithVariables
"""A model of either API. What a session does otherwise for the one than for the other, its entry tells."""


def own_methods(cls: type, *, but: str) -> list[str]:
    """Public methods that the user's classes define, in order of definition, without the Flax hook named `but`."""
    users = [base for base in cls.__mro__ if base.__module__.partition(".")[0] not in ("flax", "builtins")]
    methods = [name for base in users for name, value in vars(base).items() if inspect.isfunction(value)]
    return [name for name in dict.fromkeys(methods) if not name.startswith("_") and name != but]


def names_in(metadata: Mapping[str, Any]) -> tuple[Any, ...] | None:
    """The names in the metadata of an NNX Variable, which calls them otherwise in each version of Flax."""
    given = (metadata.get(key) for key in ("out_sharding", "sharding_names", "sharding"))
    names = next((names for names in given if names is not None), None)
    rules = dict(metadata.get("sharding_rules") or ())
    return None if names is None else tuple(rules.get(name, name) for name in names)


_REPLACING = threading.RLock()  # reentrant: the bridge replaces further methods inside the block of linen's


@contextlib.contextmanager
def replaced(*replacements: tuple[object, str, Function]) -> Iterator[None]:
    """Monkey-patches methods during the block: `owner.name(…)` calls `replacement(original, …)`, on this thread only.

    A lock is held throughout, so that no other thread reads a replacement as the original and later "restores" it.
    """
    thread = threading.get_ident()

    def here(original: Function, replacement: Function) -> Function:
        @functools.wraps(original)  # Flax reads signatures: nnx.Sequential hands `rngs` to the layers that take some
        def call(*args: PyTree, **kwargs: PyTree) -> PyTree:
            is_here = threading.get_ident() == thread
            return replacement(original, *args, **kwargs) if is_here else original(*args, **kwargs)

        return call

    with _REPLACING:
        originals = [(owner, name, vars(owner).get(name)) for owner, name, _ in replacements]
        try:  # around the replacing, too: an interrupt in between must not leave a method replaced
            for owner, name, replacement in replacements:
                # From `vars`, since `getattr` would bind a classmethod to its class.
                method = vars(owner).get(name, getattr(owner, name))
                is_of_class = isinstance(method, classmethod)
                call = here(method.__func__ if is_of_class else method, replacement)
                setattr(owner, name, classmethod(call) if is_of_class else call)
            yield
        finally:
            for owner, name, original in originals:
                if original is not None:
                    setattr(owner, name, original)
                elif name in vars(owner):  # the original is inherited
                    delattr(owner, name)
