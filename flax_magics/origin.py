"""What a run came from, besides its keys and inputs: all that running it again needs.

What the runs of one line have in common is made once and shared; a run adds the leaves of the variables it ran with.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax

from .compiling import settings
from .construct import Recipe
from .copies import own
from .execution import Execution, Options
from .fingerprint import fingerprint
from .models import Path, Record, nnx_modules
from .pinned import arrays_in
from .program import Program
from .registry import Entry
from .structure import static_data


@dataclass(frozen=True, eq=False)
class Applied:
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

    entry: Entry
    skeleton: Any
    method: Path
    options: Options
    taken: bool
    settings: tuple[Any, ...]
    key: Any
    program: weakref.ref[Program] | None
    names: tuple[str | None, ...]
    record: Record
    structure: Any
    objects: bytes | None
    moving: bool
    inputs: int
    variables: int
    written: int
    pinned: tuple[Any, ...] = ()

    @property
    def name(self) -> str:
        """The registered name."""
        return self.entry.name

    @property
    def size(self) -> int:
        """Bytes that a run may hold on to, at most."""
        return self.inputs + self.variables + sum(map(bytes_of, self.pinned))


@dataclass(frozen=True, eq=False)
class Initialised:
    """What an init of a linen model needs: the model as it was, and the method that was called; `pinned` as in `Applied`."""

    entry: Entry
    method: Path
    pinned: tuple[Any, ...] = ()


@dataclass(frozen=True, eq=False)
class Built:
    """What the building of an NNX module needs: its recipe, and a digest of that at the time; `pinned` as in `Applied`."""

    name: str
    recipe: Recipe
    print: bytes | None
    pinned: tuple[Any, ...] = ()


class Origin:
    """What one run came from: `how` it was run, and the leaves of the variables that it ran with."""

    __slots__ = ("how", "leaves")

    @property
    def record(self) -> Record | None:
        """What the run was seen to ask for."""
        return self.how.record if isinstance(self.how, Applied) else None

    def __init__(self, how: Applied | Initialised | Built, leaves: list[Any]) -> None:
        self.how = how
        self.leaves = leaves


def of_apply(entry: Entry, options: Options, done: Execution, method: Path) -> Origin:
    """The origin of an apply that was found out about.

    Args:
      entry: the model as it was before the run.
    """
    ready, prepared = done.ready, done.prepared
    model: Any = entry.model
    holds = model.holds_variables
    leaves, structure = jax.tree_util.tree_flatten(ready.variables)
    arguments = ready.arguments
    objects = objects_in(arguments.treedef, arguments.leaves, structure)
    inputs, variables = sum(map(bytes_of, arguments.leaves)), sum(map(bytes_of, leaves))
    how = Applied(
        entry=without_variables(entry),
        skeleton=model.layout.skeleton if holds else None,
        method=method,
        options=replace(options, variables=None),
        taken=any(taken for _, taken in done.names.values()),
        settings=settings(),
        key=prepared.model.key(),
        program=None if ready.program is None else weakref.ref(ready.program),
        names=tuple(name if traced else None for name, traced in zip(arguments.names, arguments.traced, strict=True)),
        record=ready.record,
        structure=structure,
        objects=fingerprint(objects) if objects else b"",
        moving=any(isinstance(leaf, _moving()) for leaf in arguments.leaves),
        inputs=inputs,
        variables=variables,
        written=sum(map(bytes_of, jax.tree_util.tree_leaves(dict(done.updates)))),
        # Of a module that holds its variables only classes are kept, which NNX keeps for ever itself.
        pinned=() if holds else tuple(arrays_in(model.module)),
    )
    return Origin(how, list(map(own, leaves)))


def without_variables(entry: Entry) -> Entry:
    """The model as it is, holding no arrays: of a module that holds its own there is only the name, and what was learned."""
    model: Any = entry.model
    if model.holds_variables:
        # The module itself is the user's, and would keep its arrays alive for as long as this is kept.
        nobody: Any = _NoModel(model.written)
        return replace(entry, model=nobody, variables=None, made=None, updates={}, built=None, replaced=None)
    return replace(entry, variables=None, made=None, updates={}, replaced=None)


@dataclass(frozen=True)
class _NoModel:
    """In the place of a module that is not to be held."""

    written: str


def bytes_of(leaf: Any) -> int:
    """Bytes of an array, 0 for what is none."""
    size = getattr(leaf, "nbytes", 0)
    return size if isinstance(size, int) else 0


def is_plain(leaf: Any) -> bool:
    """Whether an input is an array or a plain value, which are what they were."""
    return hasattr(leaf, "dtype") or leaf is None or isinstance(leaf, (bool, int, float, complex, str, bytes))


def objects_in(treedef: Any, leaves: Iterable[Any], structure: Any) -> list[Any]:
    """What may have changed where it is: inputs that are no arrays and not plain, static data of these and of variables.

    Args:
      structure: how the variables are put together.
    """
    return [*(leaf for leaf in leaves if not is_plain(leaf)), *static_data(treedef), *static_data(structure)]


def _moving() -> tuple[type, ...]:
    """Types of objects that hold variables, of which a run may change the values."""
    import sys

    nnx = sys.modules.get("flax.nnx")
    return () if nnx is None else (*nnx_modules(), nnx.Variable)


def given_by(how: Applied, inputs: tuple[Any, list[Any]]) -> Mapping[str, Any]:
    """The traced inputs by their names."""
    rows = zip(how.names, inputs[1], strict=True)
    return {name: leaf for name, leaf in rows if name is not None}
