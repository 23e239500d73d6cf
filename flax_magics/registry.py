"""Registered models: what a session keeps of each, and the handle that a person reads and assigns."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import jax

from .edits import Edit, Initialised, compare
from .errors import FlaxMagicsError
from .fingerprint import fingerprint
from .models import Ask, Model, adopt

if TYPE_CHECKING:
    from .complete import ModelNames
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


@dataclass(frozen=True)
class Change:
    """What registering did: is the model new, the same, or changed; what changed; what became of its variables."""

    name: str
    state: Literal["new", "unchanged", "changed"]
    changes: tuple[str, ...] = ()
    variables: Literal["none", "kept", "dropped"] = "none"


def register(old: Entry | None, name: str, module: Any) -> tuple[Entry, Change]:
    """The entry for `module` under `name`, and how it compares with `old`. Nothing is changed here.

    Raises:
      FlaxMagicsError: the name is no identifier, or the module is none that can be registered.
    """
    if not name.isidentifier():
        raise FlaxMagicsError(f"`{name}` is not a name that a model can have.")
    if old is not None and module is old.model.module:
        print_ = fingerprint(module)
        if print_ is not None and print_ == old.print:
            return old, _unchanged(old)
    model = adopt(module, name)
    print_ = fingerprint(module)
    if old is None:
        return Entry(name, model, print_), Change(name, "new")
    if print_ is not None and print_ == old.print:
        return old, _unchanged(old)
    return _edited(old, model, print_)


def _unchanged(old: Entry) -> Change:
    return Change(old.name, "unchanged", variables="none" if old.variables is None else "kept")


def _edited(old: Entry, model: Model, print_: bytes | None) -> tuple[Entry, Change]:
    entry = replace(old, model=model, print=print_)
    if old.variables is None:
        return entry, Change(old.name, "changed")
    if old.made is None:  # assigned by the user: how they were made is not known
        edit, now = Edit((), fits=True, outdated=False), None
    else:
        edit, now = compare(old.made, model)
    if not edit.fits:
        entry = replace(entry, variables=None, made=None, updates={}, outdated=False)
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
        """Collections by name, as `init` gives them; None before the first init."""
        return self._entry().variables

    @variables.setter
    def variables(self, value: Mapping[str, Any] | None) -> None:
        self._session._assign(self.name, check_variables(self.name, value))

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
        if entry.variables is None:
            state = "not initialised"
        else:
            parameters, size = summary(entry.variables)
            state = f"{plural(parameters, 'parameter')}, {bytes_(size)}"
        return f"<{self.name}: {entry.model.describe()}, {state}>"


def check_variables(name: str, value: Any) -> Any:
    """`value` if it is a mapping of collections (or None).

    Raises:
      FlaxMagicsError: it is something else, or holds bare parameters instead of collections.
    """
    if value is None:
        return None
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise FlaxMagicsError(
            f"variables of `{name}` are a dict of collections, not {type(value).__name__}.",
            write=f"session().models['{name}'].variables = {{'params': params}}",
        )
    if "params" not in value and value and all(isinstance(item, Mapping) for item in value.values()):
        leaves = jax.tree_util.tree_leaves(value)
        modules = [key for key, item in value.items() if set(item) & {"kernel", "bias", "scale", "embedding"}]
        if leaves and modules:
            raise FlaxMagicsError(
                f"variables of `{name}` have no `params`, but `{modules[0]}`: these look like the params themselves.",
                write=f"session().models['{name}'].variables = {{'params': params}}",
            )
    return value


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
