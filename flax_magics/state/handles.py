"""What a session shows of its state: models as handles that a person reads and assigns, the runs, the root key.

Also finds the registered model that is meant by a name or a module, and has the lock under which the state is replaced.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import jax
from msgspec import Struct

from ..base.digest import describe
from ..base.text import plural
from ..base.threads import Overtaken, uninterrupted
from ..base.types import PyTree
from ..code.library import is_module_class
from ..errors import FlaxMagicsError, did_you_mean, written
from ..models.calls import Arguments, Path
from ..models.construction import spell_construction
from ..run import Note, Run
from .entry import ModelEntry, by_kind
from .models import register
from .runs import Runs, calls_by_cell, length, newest
from .state import ReplayBudget, checked_limit

if TYPE_CHECKING:
    from ..base.measures import Curve
    from ..compile.cache import ProgramSpec
    from .state import SavedModel, State


Then = Callable[..., object]
"""Called with the result of a method, right after its commit."""


def nothing(*_: object) -> None:
    """What follows a commit where nobody waits for it."""


class ShapeBefore(Struct, frozen=True):
    """An argument as it was earlier: who saw it, such as `init saw`, its shape, and dtype and shape in words."""

    who: str
    shape: tuple[int, ...]
    text: str


class RegisteredModel:
    """A registered model. Its `variables` can be read, and assigned (weights from the user's own optax loop)."""

    def __init__(self, name: str, state: Callable[[], State], assign: Callable[[str, PyTree], object]) -> None:
        self.name = name
        self._state, self._assign = state, assign

    def _entry(self) -> ModelEntry:
        return entry_of(self._state().models, self.name)

    @property
    def module(self) -> Any:
        """The user's own module."""
        return self._entry().model.module

    @property
    def variables(self) -> Mapping[str, PyTree] | None:
        """Collections by name, as `init` returns them; None before the first init. Of an NNX module its `nnx.state`."""
        return self._entry().read_variables()

    @variables.setter
    def variables(self, value: Mapping[str, PyTree] | None) -> None:
        self._assign(self.name, value)

    @property
    def weights(self) -> str:
        """Where the variables came from, such as `initialised in draw 1`; empty before the first init."""
        source = self._entry().source_now()
        return "" if source is None else source.describe(self._state().root.seed)

    @property
    def updates(self) -> Mapping[str, int]:
        """Collection → how many runs have written it since it was initialised or assigned."""
        return dict(self._entry().update_counts)

    @property
    def previous(self) -> PyTree:
        """The variables that the last init or edit replaced, if they were set, loaded or trained, or (by an init) written.

        After a training whose loss grew until it was not finite, those from before it.

        Raises:
          FlaxMagicsError: there are none, or they were dropped to stay within `replay_bytes`.
        """
        replaced = self._entry().replaced
        if replaced is None:
            what = f"no init and no edit has replaced weights of `{self.name}` that were more than an init's own."
            raise FlaxMagicsError(what)
        if replaced.origin is None:
            gone = f"the weights of `{self.name}` that were replaced were let go of, to stay within `replay_bytes`."
            raise FlaxMagicsError(gone)
        return replaced.variables

    def collections(self) -> Mapping[str, PyTree] | None:
        """The variables by collection (of an NNX module: by type, random streams left out); None before the first init."""
        return self._entry().collections()

    def names(self) -> ModelNames:
        """Names for tab completion: methods with their arguments, fields, streams and collections seen so far."""
        entry = self._entry()
        methods = {}
        for name in ("__call__", *entry.model.methods()):
            with suppress(FlaxMagicsError):  # a class without `__call__` has no signature to offer
                methods[name] = tuple(entry.model.signature(() if name == "__call__" else (name,)).parameters)
        streams = {stream: None for ask in entry.known_needs.values() for stream in sorted(ask.streams)}
        written = [name for ask in entry.known_needs.values() for name in sorted(ask.mutable)]
        collections = dict.fromkeys([*(entry.collections() or {}), *written])
        return ModelNames(methods, tuple(entry.model.fields()), tuple(streams), tuple(collections))

    def shapes_before(self, method: Path, programs: Sequence[ProgramSpec]) -> dict[str, ShapeBefore]:
        """The array arguments of a method as the init had them, else as the last of the `programs` took them, by name."""
        entry = self._entry()
        init = entry.last_init
        if init is not None and init.method == method:
            rows = Arguments.of(init.args, init.kwargs, entry.model.signature(method), frozenset()).rows
            arrays = {name: leaf for name, leaf, _ in rows if hasattr(leaf, "shape")}
            return {name: ShapeBefore("init saw", leaf.shape, describe(leaf)) for name, leaf in arrays.items()}
        spec = next((spec for spec in reversed(programs) if spec.method == method), None)
        specs = {} if spec is None else {name: leaf for name, leaf in spec.arguments.items() if leaf.kind == "array"}
        return {name: ShapeBefore("an earlier run had", leaf.shape, leaf.text) for name, leaf in specs.items()}

    def describe(self) -> str:
        """How it is built, in one line: `Net(features=8)`."""
        return self._entry().model.describe()

    def __repr__(self) -> str:
        from ..base.digest import count_parameters
        from ..base.text import bytes_

        entry = self._entry()
        state = "not initialised"
        if entry.ready:
            parameters, size = count_parameters(self.collections() or {})
            state = f"{plural(parameters, 'parameter')}, {bytes_(size)}"
        return f"<{self.name}: {entry.model.describe()}, {state}>"


class Models(Mapping[str, RegisteredModel]):
    """The registered models by name, in the order in which they were registered."""

    def __init__(self, state: Callable[[], State], assign: Callable[[str, PyTree], object]) -> None:
        self._state, self._assign = state, assign

    def __getitem__(self, name: str) -> RegisteredModel:
        if name not in self._state().models:
            raise KeyError(name)
        return RegisteredModel(name, self._state, self._assign)

    def __iter__(self) -> Iterator[str]:
        return iter(self._state().models)

    def __len__(self) -> int:
        return len(self._state().models)

    def __repr__(self) -> str:
        return "{" + ", ".join(f"'{name}': {self[name]!r}" for name in self) + "}"


class SessionView:
    """The part of a session that holds its state: models, draws, runs, and how much is kept of them."""

    _keeping: ReplayBudget

    def __init__(self, state: State) -> None:
        self._state = state
        self._committing = threading.Lock()
        """Held while the state is replaced."""
        self.replacements = 0
        """How often the state was replaced by something besides a run, and by the steps of trainings."""

    @contextmanager
    def _in_place_of(self, before: State, then: Then = nothing) -> Iterator[None]:
        """A block that replaces the state `before`; neither Ctrl-C nor another thread can come in between.

        `then` is called right after it, before a Ctrl-C that came meanwhile.
        """
        with uninterrupted():
            with self._committing:
                self._check(before)
                self.replacements += 1
                yield
            then()

    def _check(self, before: State) -> None:
        """Raises Overtaken if `before` is the state no more: what follows from it would undo what another thread did."""
        if self._state is not before:
            raise Overtaken

    @property
    def seed(self) -> int:
        """The seed that the root key came from."""
        return self._state.root.seed

    @property
    def draws(self) -> int:
        """How many draws have been made under this seed."""
        return self._state.root.draws

    @property
    def root_key(self) -> jax.Array:
        """The typed key, shape (), that the next draw will split. Do not use it: it would be used twice."""
        return self._state.root.key

    def module(self, name: str) -> Any:
        """The module that is registered as `name`, None if there is none."""
        entry = self._state.models.get(name)
        return None if entry is None else entry.model.module

    def _entry(self, model: object, mode: str | None = None) -> ModelEntry:
        if mode not in (None, "train", "eval"):
            raise FlaxMagicsError(f"`mode` is 'train', 'eval' or None, not {mode!r}.")
        return entry_of(self._state.models, model)

    def _entry_before(self, name: str, module: object) -> ModelEntry:
        """The registered entry, or that of a module which its first run is to register."""
        return self._state.models.get(name) or entry_now(self._state.models, name, module)[0]

    @property
    def collections(self) -> dict[str, Mapping[str, PyTree] | None]:
        """The variables that the session itself holds, by model: None for an NNX module, and before the first init."""
        return {name: entry.variables for name, entry in self._state.models.items()}

    def variables(self, name: str, module: object = None) -> PyTree:
        """The variables of a model, as `models[name].variables` returns them; see `entry_now` for `module`.

        Raises:
          FlaxMagicsError: the user's code has donated or deleted some.
        """
        entry, _ = entry_now(self._state.models, name, module)
        entry.check_alive(f"{name}(…)")
        return entry.read_variables()

    @property
    def waiting(self) -> Mapping[str, SavedModel]:
        """Models of a loaded file that have variables, but no registered model yet; one of that name will get them."""
        return {name: saved for name, saved in self._state.waiting.items() if saved.ready}

    @property
    def runs(self) -> Sequence[Run]:
        """Every run so far, newest last. Outputs that only the session referred to are `RELEASED`."""
        return Runs(self._state.runs)

    def last(self, n: int) -> list[Run]:
        """The last `n` runs, newest last."""
        return newest(self._state.runs, n)

    @property
    def last_curve(self) -> Curve | None:
        """The numbers of the last run, if that was a training."""
        return None if self._state.runs is None else self._state.runs.last.facts.trained

    @property
    def cells(self) -> dict[int, tuple[str, ...]]:
        """Cell number → the calls of its runs as they were written, for cells of this kernel."""
        return calls_by_cell(self._state.runs)

    @property
    def replay_bytes(self) -> int:
        """The most bytes that are kept for replays; can be set."""
        return self._keeping.limit

    @replay_bytes.setter
    def replay_bytes(self, limit: int) -> None:
        self._keeping.limit = checked_limit(limit)
        self._keeping.settle()

    def settle(self) -> None:
        """Drops what exceeds `replay_bytes` now. A session does so by itself, but only once in some runs."""
        self._keeping.settle()

    @property
    def kept_bytes(self) -> int:
        """Bytes that are held for replays alone."""
        return self._keeping.bytes

    def _count_replaced(self, before: State, entry: ModelEntry | None) -> None:
        """Counts what `entry` has kept of replaced variables, in the place of what the model had in `before`."""
        old = None if entry is None else before.models.get(entry.name)
        was = None if old is None else old.replaced
        if entry is not None and entry.replaced is not was:
            self._keeping.replace(was, entry.replaced)

    def __len__(self) -> int:
        return length(self._state.runs)

    # Without it a session that has no runs yet would be false, because of `__len__`.
    def __bool__(self) -> bool:
        return True

    def __repr__(self) -> str:
        models = ", ".join(self._state.models) or "none"
        return f"<{type(self).__name__}: seed {self.seed}, {plural(self.draws, 'draw')}, models: {models}>"


def entry_of(models: Mapping[str, ModelEntry], model: Any) -> ModelEntry:
    """The entry of a registered name, of a handle from `Session.models`, or of a module that is registered.

    Raises:
      FlaxMagicsError: no such model is registered.
    """
    if isinstance(model, RegisteredModel):
        model = model.name
    if isinstance(model, str):
        if model in models:
            return models[model]
        message = f"no model is registered as `{model}`; registered: {', '.join(models) or 'none yet'}."
        form = None if models else f"%flaxmodel {model} = …"
        raise FlaxMagicsError(message, hint=did_you_mean(model, models), form=form)
    for entry in models.values():
        if entry.model.module is model:
            return entry
    line = spell_construction(model, "%flaxmodel") if is_module_class(model) else "%flaxmodel net = …"
    raise FlaxMagicsError("this model is not registered.", **written(line))


def entry_now(
    models: Mapping[str, ModelEntry], name: str, module: object, limit: int = 0
) -> tuple[ModelEntry, tuple[Note, ...]]:
    """The entry of a name that now stands for `module` (None: as registered), with a note if that is another.

    A module under a name that nothing is registered by is registered: its run says so. `limit` as in `register`.
    """
    if module is not None and name not in models:
        return register(None, name, module)[0], ()
    entry = entry_of(models, name)
    if module is None or module is entry.model.module:
        return entry, ()
    old = _compared(entry)
    entry, change = register(old, name, module, limit)
    if change.state == "unchanged":
        return entry, ()
    became = {"kept": ", variables kept", "dropped": ", variables dropped"}.get(change.variables, "")
    became = " with what it holds" if old is None and entry.ready else became
    text = f"{name} is another module now, {entry.model.describe()}: registered{became}"
    return entry, (Note("rebound", text), *change.notes)


_compared: Callable[[ModelEntry], ModelEntry | None] = by_kind(lambda entry: entry, lambda entry: None)
"""What another module under the name of an entry is compared with: an NNX object in the namespace is itself the truth."""


class ModelNames(Struct, frozen=True):
    """The names of a registered model that completion offers.

    Attributes:
      methods: method → names of its arguments; `__call__` for the model's own call.
      fields: its dataclass fields or attributes.
      streams: the random streams that it is known to ask for.
      collections: the collections that it has, and those that its runs are known to write.
    """

    methods: Mapping[str, tuple[str, ...]]
    fields: tuple[str, ...] = ()
    streams: tuple[str, ...] = ()
    collections: tuple[str, ...] = ()
