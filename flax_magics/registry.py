"""Registered models: what a session keeps of each, and the handle that a person reads and assigns."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import jax

from .construct import Built
from .edits import Edit, Initialised, compare, differences
from .errors import FlaxMagicsError
from .models import Ask, Model, adopt
from .weights import Source

if TYPE_CHECKING:
    from .complete import ModelNames
    from .keeping import Replaced
    from .sessions import Session


@dataclass(frozen=True)
class Entry:
    """A registered model as the session's state has it.

    Attributes:
      print: fingerprint at registration, None where the model is not plain.
      variables: None until initialised.
      made: how the variables were initialised; None if they were assigned.
      updates: collection → how many runs have written it since the init.
      outdated: the variables are from before an edit that changed how they are made.
      guesses: what runs asked for last, by method and mode; spares a trace, never decides one.
    """

    name: str
    model: Model
    print: bytes | None
    variables: Mapping[str, Any] | None = None
    made: Initialised | None = None
    updates: Mapping[str, int] = field(default_factory=dict)
    outdated: bool = False
    guesses: Mapping[Any, Ask] = field(default_factory=dict)
    forced: frozenset[tuple[Any, str]] = frozenset()
    """Int arguments, by method, whose value the model needs."""
    built: Built | None = None
    """How the session built the module (NNX), None where the user did."""
    stale: bool = False
    """A module that holds its variables is to be built anew at its next use."""
    first: bytes | None = None
    """A digest of such a module's variables as they were when it was registered."""
    made_before: Initialised | None = None
    """How the variables were made in whose place the user has put others: what the model's own look like."""
    source: Source | None = None
    """Where the variables came from; None as long as there are none."""
    replaced: Replaced | None = None
    """Variables in whose place an init has put fresh ones, where those were more than an earlier init's."""

    @property
    def ready(self) -> bool:
        """Whether there are variables."""
        return self.variables is not None or self.model.holds_variables

    @property
    def held(self) -> Mapping[str, Any] | None:
        """The variables by collection, where the session or the module holds them now."""
        return self.model.take() if self.model.holds_variables else self.variables

    def source_now(self) -> Source | None:
        """Where the variables came from that are held now."""
        held = self.held
        return self.source if held is None or self.source is None else self.source.now(held, self.updates)


@dataclass(frozen=True)
class Change:
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


def register(old: Entry | None, name: str, module: Any) -> tuple[Entry, Change]:
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
        return Entry(name, model, print_), Change(name, "changed")
    if old is None:
        return Entry(name, model, print_), Change(name, "new")
    if print_ is not None and print_ == old.print:
        return old, unchanged(old)
    return _edited(old, model, print_)


def unchanged(old: Entry) -> Change:
    """What registering the same again says."""
    return Change(old.name, "unchanged", variables="kept" if old.ready else "none")


def register_holding(old: Entry | None, name: str, model: Any, built: Built | None = None) -> tuple[Entry, Change]:
    """`register` for a module that holds its own variables (NNX).

    One that an unchanged cell made again gives way to the one that is there. After an edit the old variables go into the
    new module if they all fit; otherwise, and where nothing but the initial values differs, its own stand.
    """
    print_, first = model.print(), model.sample()
    entry = Entry(name, model, print_, built=built, first=first, source=Source.own(name))
    if old is None:
        return entry, Change(name, "new")
    if not old.model.holds_variables:
        return entry, Change(name, "changed", variables="own")
    before: Any = old.model
    if model.module is before.module:
        return replace(old, model=model, print=print_), Change(name, "changed", variables="kept")
    if old.stale:
        return entry, Change(name, "changed", variables="own")
    if print_ is not None and print_ == old.print:
        if first == old.first:
            return old, unchanged(old)
        return entry, Change(name, "changed", ("initial values",), "own")
    changes = differences(_shapes(before), _shapes(model))
    if changes:
        return entry, Change(name, "changed", changes, "own")
    values = before.collections()
    entry = replace(entry, updates=old.updates, outdated=old.outdated or first != old.first, source=old.source)
    return entry, Change(name, "changed", variables="kept", write=lambda: model.assign(values))


def _shapes(model: Any) -> dict[str, Any]:
    variables = {name: value for tree in model.collections().values() for name, value in tree.items()}
    return jax.eval_shape(lambda: variables)  # type: ignore[no-any-return]


def _edited(old: Entry, model: Model, print_: bytes | None) -> tuple[Entry, Change]:
    entry = replace(old, model=model, print=print_, forced=frozenset())
    if old.variables is None:
        return entry, Change(old.name, "changed")
    if old.made is None:  # assigned by the user: how they were made is not known
        edit, now = Edit((), fits=True, outdated=False), None
    else:
        edit, now = compare(old.made, model)
    if not edit.fits:
        entry = replace(entry, variables=None, made=None, updates={}, outdated=False, source=None)
        return entry, Change(old.name, "changed", edit.changes, "dropped")
    made = old.made if now is None or edit.outdated else now
    entry = replace(entry, made=made, outdated=old.outdated or edit.outdated)
    return entry, Change(old.name, "changed", variables="kept")


class RegisteredModel:
    """A model of a session. `variables` can be read, and assigned (weights from an optax loop of one's own)."""

    def __init__(self, session: Session, name: str) -> None:
        self._session = session
        self.name = name

    def _entry(self) -> Entry:
        return self._session._entry(self.name)

    @property
    def module(self) -> Any:
        """The user's own module."""
        return self._entry().model.module

    @property
    def variables(self) -> Mapping[str, Any] | None:
        """Collections by name, as `init` gives them; None before the first init. Of an NNX module its `nnx.state`."""
        entry = self._entry()
        model: Any = entry.model
        return model.state() if model.holds_variables else entry.variables

    @variables.setter
    def variables(self, value: Mapping[str, Any] | None) -> None:
        self._session.assign(self.name, value)

    @property
    def weights(self) -> str:
        """Where the variables came from, such as `initialised in draw 1`; empty before the first init."""
        source = self._entry().source_now()
        return "" if source is None else source.describe(self._session.seed)

    @property
    def updates(self) -> Mapping[str, int]:
        """Collection → how many runs have written it since."""
        return dict(self._entry().updates)

    @property
    def previous(self) -> Any:
        """The variables that the last init replaced: set, loaded or trained ones, or such as runs had written into.

        Raises:
          FlaxMagicsError: there are none, or they were let go of to stay within `replay_bytes`.
        """
        replaced = self._entry().replaced
        if replaced is None:
            raise FlaxMagicsError(f"no init has replaced weights of `{self.name}` that were more than an init's own.")
        if replaced.origin is None:
            raise FlaxMagicsError(
                f"the weights of `{self.name}` that the init replaced were let go of, to stay within `replay_bytes`."
            )
        return replaced.variables

    def collections(self) -> Mapping[str, Any] | None:
        """The variables by collection (of an NNX module: by type, random streams left out); None before the first init."""
        entry = self._entry()
        model: Any = entry.model
        return model.collections() if model.holds_variables else entry.variables

    def names(self) -> ModelNames:
        """What tab completion offers: methods with their arguments, fields, streams seen so far."""
        from .complete import ModelNames

        entry = self._entry()
        methods = {}
        for name in ("__call__", *entry.model.methods()):
            try:
                signature = entry.model.signature(() if name == "__call__" else (name,))
            except FlaxMagicsError:  # a module without a call
                continue
            methods[name] = tuple(signature.parameters)
        streams = {stream: None for ask in entry.guesses.values() for stream in sorted(ask.streams)}
        return ModelNames(methods, tuple(entry.model.fields()), tuple(streams))

    def describe(self) -> str:
        """How it is built, in one line: `Net(features=8)`."""
        return self._entry().model.describe()

    def __repr__(self) -> str:
        from .notes import summary
        from .show.units import bytes_, plural

        entry = self._entry()
        if not entry.ready:
            state = "not initialised"
        else:
            parameters, size = summary(self.collections() or {})
            state = f"{plural(parameters, 'parameter')}, {bytes_(size)}"
        return f"<{self.name}: {entry.model.describe()}, {state}>"


class Models(Mapping[str, RegisteredModel]):
    """The registered models by name, in the order in which they were registered."""

    def __init__(self, session: Session, names: Callable[[], Mapping[str, Entry]]) -> None:
        self._session = session
        self._names = names

    def __getitem__(self, name: str) -> RegisteredModel:
        if name not in self._names():
            raise KeyError(name)
        return RegisteredModel(self._session, name)

    def __iter__(self) -> Any:
        return iter(self._names())

    def __len__(self) -> int:
        return len(self._names())

    def __repr__(self) -> str:
        return "{" + ", ".join(f"'{name}': {self[name]!r}" for name in self) + "}"
