"""A session as it is at one moment, as data: what `%flax_save` writes and `%flax_load` reads.

`take` notes a session down, holding on to its arrays. What was noted may be written by another thread, since nobody
changes it.
"""

from __future__ import annotations

import importlib.metadata
import platform
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import jax
import numpy as np

from . import __version__
from .copies import own
from .edits import Initialised
from .history import Chain, Kept
from .keys import Draw, Root
from .models import Path
from .modelsource import source_of
from .notes import summary
from .registry import Entry
from .state import State

_SETTINGS = ("jax_enable_x64", "jax_threefry_partitionable", "jax_default_matmul_precision")
"""Settings of JAX's that change the bits of a run."""


@dataclass(frozen=True)
class SavedInit:
    """How a linen model's variables came to be, as `Initialised` has it; `program` is a digest."""

    key: Any
    method: Path
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    program: str | None


@dataclass(frozen=True)
class SavedModel:
    """A model's variables, and what is needed to hold them against a model that is registered under its name.

    Attributes:
      holds_variables: an NNX module, not a linen one.
      text: how it was built, in one line.
      source: the code of its classes, empty where that was not to be had.
      variables: of a linen model its collections, None before an init; of an NNX one (type, path, value) of each
        variable.
      made: how a linen model's variables came to be; None where no init of the model is known.
      assigned: the user put other variables in their place.
      keys: what the session built an NNX module with; None where the user's code did.
      file: where it was read.
    """

    name: str
    holds_variables: bool
    text: str
    source: str
    variables: Any
    updates: Mapping[str, int] = field(default_factory=dict)
    outdated: bool = False
    stale: bool = False
    made: Initialised | SavedInit | None = None
    assigned: bool = False
    keys: Mapping[str, Any] | None = None
    parameters: int = 0
    bytes: int = 0
    versions: Mapping[str, str] = field(default_factory=dict)
    file: str = ""

    @property
    def ready(self) -> bool:
        """Whether there are variables."""
        return self.variables is not None


@dataclass(frozen=True)
class Snapshot:
    """A session: its root key, what is open, its models and its runs; and what it ran on.

    Attributes:
      runs: of a session that is there; `written` has those of one that was read.
      saved: seconds since the epoch.
      settings: JAX's, as they were.
    """

    root: Root
    opened: tuple[str, Draw] | None
    seeds: Mapping[int, tuple[int, str]]
    models: tuple[SavedModel, ...]
    runs: Chain | None = None
    written: tuple[Kept, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    device: str = ""
    settings: Mapping[str, str] = field(default_factory=dict)
    saved: float = 0.0

    @property
    def parameters(self) -> int:
        """Of all models together."""
        return sum(model.parameters for model in self.models)


def take(state: State) -> Snapshot:
    """What the session is now, without the models' code: see `with_sources`.

    Values that others may change where they are (NumPy's) are copied.
    """
    models = [_taken(entry) for entry in state.models.values()]
    waiting = [model for name, model in state.waiting.items() if name not in state.models]
    return Snapshot(
        state.root,
        state.opened,
        state.seeds,
        (*models, *waiting),
        state.runs,
        versions=versions(),
        device=device(),
        settings=settings(),
        saved=time.time(),
    )


def _taken(entry: Entry) -> SavedModel:
    model: Any = entry.model
    made = entry.made or entry.made_before
    if model.holds_variables:
        slots = [slot for slot in model.layout.slots if not slot.sown and not slot.fixed]
        variables: Any = tuple((slot.collection, slot.path, _own(slot.read())) for slot in slots)
        parameters, size = summary(model.collections())
    else:
        variables = None if entry.variables is None else _own(entry.variables)
        parameters, size = summary(variables or {})
    return SavedModel(
        entry.name,
        model.holds_variables,
        model.describe(),
        "",
        variables,
        dict(entry.updates),
        entry.outdated,
        entry.stale,
        made,
        entry.made is None,
        None if entry.built is None else dict(entry.built.keys),
        parameters,
        size,
        versions(),
    )


def with_sources(snapshot: Snapshot, state: State, known: dict[str, tuple[Any, str]] | None = None) -> Snapshot:
    """With the code of the models that are registered in `state`.

    Args:
      known: name → module and its code, as they were looked up before.
    """
    known = {} if known is None else known
    models = []
    for model in snapshot.models:
        entry = state.models.get(model.name)
        if entry is not None:
            module = entry.model.module
            if model.name not in known or known[model.name][0] is not module:
                known[model.name] = module, source_of(module)
            model = replace(model, source=known[model.name][1])
        models.append(model)
    return replace(snapshot, models=tuple(models))


def _own(tree: Any) -> Any:
    """The tree in containers that nobody else has, NumPy's arrays copied."""
    if type(tree) is dict:
        return {key: _own(value) for key, value in tree.items()}
    if type(tree) in (list, tuple):
        return type(tree)(map(_own, tree))
    return own(tree) if isinstance(tree, (np.ndarray, jax.Array)) else jax.tree_util.tree_map(own, tree)


@lru_cache(maxsize=1)
def versions() -> dict[str, str]:
    """Of what a run's bits depend on. Not to be changed."""
    found = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax", "numpy")}
    return {"flax_magics": __version__, "python": platform.python_version(), **found}


def settings() -> dict[str, str]:
    """JAX's settings that change the bits of a run, as text."""
    return {name: str(getattr(jax.config, name)) for name in _SETTINGS if hasattr(jax.config, name)}


def device() -> str:
    """The first device: its platform and kind."""
    first = jax.devices()[0]
    return f"{first.platform} {first.device_kind}" if first.device_kind != first.platform else first.platform
