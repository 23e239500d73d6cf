"""What a session needs of a model, as Protocols: `ModelWithInit` is answered by linen.py, `ModelWithVariables` by nnx.py.

A model is configured, traced and run. A linen model holds no variables, keys or counts: those are the session's. An NNX
module holds its own, so a session asks it for them in every run, and writes back what the run changed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias

from msgspec import Struct

from ..base.threads import Assignment, at_once
from ..base.types import Leaf, PyTree
from ..code.library import nnx_modules
from ..errors import FlaxMagicsError
from ..run import Settings
from .calls import Args, Calls, Function, Kwargs, Names, Path
from .switch import Layer, layer_of

if TYPE_CHECKING:
    from .nnx_graph import RebuiltGraph
    from .nnx_layout import Layout, Values

Variables: TypeAlias = Mapping[str, PyTree]
Updates: TypeAlias = dict[str, PyTree]
Forward = Callable[[Variables, Mapping[str, Any], Args, Kwargs], tuple[PyTree, Updates]]
"""`forward(variables, keys, args, kwargs) -> (output, updates)`; pure; `updates` holds what was written or sown."""

ARGUMENTS = "(arguments)"
"""Where a run's updates keep what it changed in NNX objects that the call passed, such as the counts of an Rngs."""
CONVERTED = "(converted)"
"""Where they keep Python numbers and 64-bit arrays of NumPy that a variable held, unchanged: JAX hands back its own."""
SOWN = "(sown)"
"""Where they keep what NNX sowed, by type: a type may be that of variables which stay, too."""


class KeyUse(Struct, frozen=True):
    """One key that a module took from a stream, and what it drew with it.

    Attributes:
      path: the module's.
      source: what its key is made of, besides the stream's own: equal sources of one stream give equal keys, outside of
        transforms.
      drew: the shape of a dropout's mask and its rate; None where that is not known.
      inside: a transform of Flax's is around it (`nn.scan`, `nnx.vmap`, …), which may have split or forked the stream.
    """

    stream: str
    path: Path
    source: tuple[object, ...]
    drew: tuple[tuple[int, ...], float] | None = None
    inside: bool = False


@dataclass
class CallTrace:
    """Records what one trace saw of the model. Filled while the model runs; read-only afterwards."""

    asked: dict[str, list[Path]] = field(default_factory=dict)
    """stream → paths of the modules that called `make_rng` for it."""
    takes: list[KeyUse] = field(default_factory=list)
    """Keys that modules took, in order."""
    queried: set[str] = field(default_factory=set)
    """Streams that `has_rng` was asked about."""
    written: set[str] = field(default_factory=set)
    """Collections that something was put into, sown ones included."""
    sown: set[str] = field(default_factory=set)
    """Collections that `sow` wrote; of NNX `SOWN`."""
    layers: list[Layer] = field(default_factory=list)
    axes: set[str] = field(default_factory=set)
    """Mapped axes that the model names and that nothing around it binds."""
    unused: frozenset[str] = frozenset()
    """Traced arguments that nothing in the program reads."""
    unchanged: frozenset[tuple[str, str]] = frozenset()
    """Variables (type and path) that were handed back by a transform inside the model as they were (NNX)."""
    held: set[str] = field(default_factory=set)
    """Streams that the model is given whether or not it consumes them: those that an NNX module holds."""
    structure: RebuiltGraph | None = None
    """How the run changed the model's graph (NNX), None if it did not."""
    calls: Calls | None = None
    """Where the calls of modules are noted, None where nobody asks for them."""
    foreign: str = ""
    """The class of an object that the model gives or sows and that is no tree of arrays: no program can give it."""

    def passed(self, kind: str, path: Path, module: object, around: list[Any], given: Mapping[str, object]) -> None:
        """Notes a layer, once; see `layer_of`."""
        layer = layer_of(kind, path, module, around, given)
        if layer is not None and layer not in self.layers:
            self.layers.append(layer)

    def with_what(self, traced: CallTrace) -> CallTrace:
        """This record, completed by streams and layers that only a trace sees: inside the model's own jitted functions."""
        asked = {name: self.asked.get(name, traced.asked.get(name, [])) for name in {**self.asked, **traced.asked}}
        layers = [*self.layers, *(layer for layer in traced.layers if layer not in self.layers)]
        return dataclasses.replace(self, asked=asked, layers=layers, takes=self.takes or traced.takes)


class Needs(Struct, frozen=True):
    """The needs of one run besides variables: streams it may draw from, collections it may write, and
    mapped axes of size 1 that stand for this one device.
    """

    streams: frozenset[str] = frozenset()
    mutable: frozenset[str] = frozenset()
    axes: frozenset[str] = frozenset()

    def and_what(self, record: CallTrace) -> Needs:
        """These needs and those that an incomplete trace showed."""
        return Needs(self.streams | set(record.asked), self.mutable | record.written, self.axes | record.axes)


class Commit(Struct, frozen=True):
    """The changes of a run, and how a module that holds its own variables is given them."""

    changed: tuple[str, ...]
    """Collections (of NNX: types of variables, random streams left out) that the run wrote."""
    assignments: tuple[Assignment, ...] = ()
    """They write the changes into the module; there are none where the session holds the variables."""
    write: Callable[[], None] | None = None
    """Writes a graph that was changed, which takes more than assignments."""

    def make(self) -> None:
        """Writes all of it."""
        if self.write is not None:
            self.write()
        at_once(self.assignments)


class MissingVariables(Exception):
    """The model needs variables that it was not given (a method that the first init did not reach)."""


class ForeignOutput(Exception):
    """The model gives or sows an object that no program can give; its message is the name of the object's class."""


class Incomplete(Exception):
    """The trace asked for more than it was given; its Record says for what. It must be done again."""


FLAX_ARGUMENTS = {
    "rngs": "each run is a draw, and the session gives its keys",
    "mutable": "--mutable hands a collection back",
    "method": "another method than the call is written by its name",
    "variables": "the session gives its own, and --variables gives others",
    "capture_intermediates": "it is one of Flax's `apply`",
}
"""Arguments of Flax's `apply` and `init` → what there is in their place."""


class Idiom(FlaxMagicsError):
    """The call is in Flax's own words: it names a method of Flax's base class, or an argument of Flax's `apply` or `init`.

    Attributes:
      method: the method; empty where it is the argument.
      argument: the argument; empty where it is the method.
      linen: the method is one of linen's.
    """

    def __init__(self, *, method: str = "", argument: str = "", linen: bool = True) -> None:
        super().__init__(f"`{method or argument}` is Flax's own, and not the model's.")
        self.method, self.argument, self.linen = method, argument, linen


def check_name(owner: object, name: str) -> None:
    """Raises Idiom where `owner.name` is what `nn.Module`, `nnx.Module` or their bases define, and the model does not."""
    from flax import linen

    if isinstance(owner, linen.Module) and name in ("scope", "parent"):
        raise Idiom(method=name)
    across = sys.modules.get("flax.nnx.bridge.module")
    bases = (linen.Module, *nnx_modules(), *(() if across is None else (across.Module,)))
    # What it is, not where it stands: `nnx.tabulate` leaves the methods of Module in every class that it has seen.
    missing = object()
    method, *flaxs = [inspect.getattr_static(cls, name, missing) for cls in (type(owner), *bases)]
    if name not in vars(owner) and method is not missing and any(method is each for each in flaxs):
        raise Idiom(method=name, linen=method is flaxs[0])


class AnyModel(Protocol):
    """A module as a session sees it: what linen's and NNX's answer alike."""

    @property
    def module(self) -> Any:
        """The user's own object."""

    @property
    def held_still(self) -> AbstractContextManager[None]:
        """A block in which nobody changes the module, so that it is looked at once."""

    def describe(self) -> str:
        """The construction as a person writes it: `MyModel(num_neurons=3, training=False)`."""

    def methods(self) -> list[str]:
        """Names that can be called as `net.NAME(…)`, in order of definition."""

    def fields(self) -> list[str]:
        """Names of the module's own fields."""

    def signature(self, method: Path) -> inspect.Signature:
        """The signature of a method (`()`: the call itself), without `self`. Raises FlaxMagicsError if there is none."""

    def fields_in_mode(self, train: bool, *, fixed: frozenset[str]) -> tuple[Model, tuple[str, ...]]:
        """A model whose own fields stand for training or not, and what was set, such as `training=True`.

        Args:
          fixed: switches that the call has as arguments; a field of the same name is left to the call.
        """

    def fields_for_init(self, *, fixed: frozenset[str]) -> Model:
        """A model to initialise with: as written, but a switch field that has no value stands for evaluation."""

    def fields_as_written(self) -> tuple[str, ...]:
        """The module's own switches as they stand."""

    def streams(self) -> frozenset[str]:
        """Streams that every run is given, whether or not it consumes them."""

    def cache_key(self) -> object:
        """A value that differs from another model's where its programs do; None where that cannot be told."""

    def fingerprint(self) -> bytes | None:
        """A digest of what the model computes: equal for what an unchanged cell makes again. None: cannot be told."""

    def code(self) -> bytes | None:
        """A digest of the model's code and of its plain values; None where that cannot be told."""

    def with_rngs(self, signature: inspect.Signature, args: Args, kwargs: Kwargs) -> tuple[Model, bool]:
        """A model that adds the argument which the session makes (`rngs`), and whether the user gave it already."""

    def supplied_arguments(self) -> tuple[str, ...]:
        """Names of the arguments that the model adds to the call itself."""

    def commit(self, updates: Variables, record: CallTrace) -> Commit:
        """The collections that a run's updates change, and the assignments that write them into the module."""

    def forward(self, method: Path, ask: Needs, record: CallTrace, root_impl: str) -> Forward:
        """The run as a pure function. Calling it fills `record`; streams that `ask` lacks get a stand-in key."""

    def module_classes(self) -> Mapping[Path, str]:
        """Classes of the modules, by path, that are known without a call."""

    def iter_variables(self, variables: Variables) -> Iterator[tuple[str, Path, Leaf, str]]:
        """Collection, path, value and metadata (such as `names=(None, 'mlp')`) of every array of `variables`.

        The keys and counts of random streams that a module holds are one collection, `RngState`.
        """

    def by_hand(self, call: str, method: Path, switch: Names, streams: Names, mutable: Names) -> str:
        """The run as a person would have written it in plain Flax."""


class ModelWithInit(AnyModel, Protocol):
    """A linen module: an init makes its variables, and the session holds them."""

    @property
    def holds_variables(self) -> Literal[False]:
        """Whether the variables are the module's own. mypy tells the two kinds of `Model` by it."""

    def init(self, key: object, method: Path, args: Args, kwargs: Kwargs) -> Updates:
        """Fresh variables; `key` is the `params` key, the only one that an init gets."""

    @property
    def init_streams(self) -> tuple[str, ...]:
        """Streams that an init by hand has to be given besides `params`, known once it has run."""

    def init_by_hand(self, call: str, method: Path, arguments: Settings, module: str) -> str:
        """The init as a person would have written it, with switches added to the call and set on the module.

        Args:
          module: the module with its switches set, `MODULE` in the place of its name.
        """


class ModelWithVariables(AnyModel, Protocol):
    """An NNX module: it holds its own variables, so that a session reads them in every run and writes what changed."""

    @property
    def holds_variables(self) -> Literal[True]:
        """Whether the variables are the module's own. mypy tells the two kinds of `Model` by it."""

    @property
    def written(self) -> str:
        """The construction as it was written, where the session made it: `Net(8, 3)`."""

    @property
    def layout(self) -> Layout:
        """The module taken apart, as it is now."""

    def own_variables(self) -> Values:
        """The variables as they are now, by type and path; the keys and counts of random streams are the draw's to give."""

    def collections(self) -> Values:
        """The variables as they are now, without anything that belongs to random streams."""

    def state(self) -> PyTree:
        """`nnx.state` of the module, its variables copies: later runs do not change them."""

    def read_state(self, name: str, value: object) -> Values:
        """Its own variables with those of `value` in their places. Raises FlaxMagicsError where these do not fit."""

    def sample(self) -> bytes:
        """A digest of some elements of every variable: tells a module of another seed from one of the same."""

    def assign(self, values: Values) -> None:
        """Puts `values` into the module."""

    def become(self, other: ModelWithVariables) -> None:
        """Gives the module's own objects the values of `other`, a newly built one, or all that it holds."""


Model = ModelWithInit | ModelWithVariables
"""Either kind; asking `holds_variables` says which."""


def own_methods(cls: type, *, but: str) -> list[str]:
    """Public methods that the user's classes define, in order of definition, without the hook of the name `but`."""
    users = [base for base in cls.__mro__ if base.__module__.partition(".")[0] not in ("flax", "builtins")]
    methods = [name for base in users for name, value in vars(base).items() if inspect.isfunction(value)]
    return [name for name in dict.fromkeys(methods) if not name.startswith("_") and name != but]


_REPLACING = threading.RLock()


@contextlib.contextmanager
def replaced(*replacements: tuple[object, str, Function]) -> Iterator[None]:
    """Inside the block, `owner.name(…)` of each replacement is `replacement(original, …)` for calls of this thread alone.

    A lock is held from before the first name is read until the last is put back, so that no other thread takes a
    replacement for the original.
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
        try:  # an interrupt may come at any moment
            for owner, name, replacement in replacements:
                method = vars(owner).get(name, getattr(owner, name))
                is_of_class = isinstance(method, classmethod)
                call = here(method.__func__ if is_of_class else method, replacement)
                setattr(owner, name, classmethod(call) if is_of_class else call)
            yield
        finally:
            for owner, name, original in originals:
                if original is not None:
                    setattr(owner, name, original)
                elif name in vars(owner):  # the base class has it
                    delattr(owner, name)
