"""A session at one moment as data: taken, written into a file as its JSON and arrays, and read out of one."""

from __future__ import annotations

import importlib.metadata
import math
import platform
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import takewhile
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import msgspec
import numpy as np
from msgspec.structs import asdict, replace

from ..base import __version__
from ..base.digest import Spread, Values, count_parameters, is_key, own
from ..base.files import Damaged, convert, loads
from ..base.measures import Cost, Limits, Memory, Timing
from ..base.types import PyTree
from ..code.inventory import source_of
from ..errors import FlaxMagicsError
from ..rng.keys import Draw, DrawBatch, RootKey, RunKeys, as_key
from ..run import RELEASED, InitStats, Note, OutputFacts, Run
from ..state.entry import ModelEntry
from ..state.runs import RunLog, StoredRun, backwards
from ..state.state import SavedInit, SavedModel, State
from ..state.trees import Node, Reader, Writer, foreign_in, key_read, key_type
from . import format

_SETTINGS = ("jax_enable_x64", "jax_threefry_partitionable", "jax_default_matmul_precision")
"""Settings of JAX's that change the bits of a run."""
KeyWords = Annotated[str, msgspec.Meta(pattern=r"\A([0-9a-f]{8})*\Z")]
VariableRows = list[tuple[str, list[Any], Node]]
"""Of each variable of an NNX model its type, the steps of its path, and its value."""


class Snapshot(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A session: its root key, what is open and its models; and what it ran on. Its runs are a `RunLog` beside it.

    A file's JSON has its fields, and those of the records in them, under these names: to rename one is to change the format.

    Attributes:
      saved: seconds since the epoch.
      settings: JAX's, as they were.
    """

    root: RootKey
    opened: tuple[str, Draw] | None
    seeds: Mapping[int, tuple[int, str]]
    models: tuple[SavedModel, ...]
    versions: Mapping[str, str]
    device: str
    settings: Mapping[str, str]
    saved: float

    @property
    def parameters(self) -> int:
        """Of all models together."""
        return sum(model.parameters for model in self.models)


class RunRecord(msgspec.Struct, forbid_unknown_fields=True):
    """A run in a file: what `Run.to_json` says of it, with what the history has of it besides.

    Attributes:
      impl: the PRNG implementation of its keys, None where it has none.
      inputs: their dtypes and shapes.
      replays: how often it was run again, and whether any of these gave other bits.
    """

    version: Literal[1]
    command: Literal["apply", "init", "key"]
    model: str | None
    mode: str
    weights: str
    call: str
    output: str
    seed: int
    draw: int
    samples: int | None = msgspec.field(name="draws")
    keys: dict[str, KeyWords]
    digest: str | None
    device: str
    started: float
    replayed: bool
    versions: dict[str, str | None]
    device_kind: str | None
    processor: str | None
    threads: int | None
    switch: str
    used: dict[str, tuple[str, ...]]
    changed: dict[str, int]
    made: InitStats | None
    program: str
    reason: str
    static: tuple[str, ...]
    timing: Timing
    memory: Memory | None
    cost: Cost | None
    limits: Limits | None
    spread: tuple[Spread, ...]
    values: tuple[Values, ...]
    cell: int | None
    notes: tuple[Note, ...]
    by_hand: str
    impl: str | None
    inputs: str
    replays: tuple[int, bool]
    leaves: list[dict[str, str | int]] | None = None
    bits: str = ""
    dropped: tuple[str, ...] = ()


def take(state: State) -> Snapshot:
    """What the session is now, without the models' code: see `with_sources`.

    Values that others may change where they are (NumPy's) are copied.
    """
    models = [_taken(entry) for entry in state.models.values()]
    waiting = [model for name, model in state.waiting.items() if name not in state.models]
    return Snapshot(
        state.root, state.opened, state.seeds, (*models, *waiting), versions(), device(), settings(), time.time()
    )


def _taken(entry: ModelEntry) -> SavedModel:
    model, init = entry.model, entry.init or entry.previous_init
    if model.holds_variables:
        slots = [slot for slot in model.layout.slots if not slot.sown and not slot.fixed]
        variables: PyTree = tuple((slot.collection, slot.path, _own(slot.read())) for slot in slots)
    else:
        variables = _own(entry.variables)
    saved_init = None
    if init is not None and init.program is not None:
        saved_init = SavedInit(init.key, init.method, init.args, init.kwargs, init.program)
    parameters, size = count_parameters(entry.collections() or {})
    return SavedModel(
        name=entry.name,
        holds_variables=model.holds_variables,
        text=model.describe(),
        source="",
        variables=variables,
        updates=dict(entry.update_counts),
        outdated=entry.outdated,
        stale=entry.rebuild_next,
        made=saved_init,
        assigned=entry.init is None,
        keys=None if entry.built is None else dict(entry.built.keys),
        parameters=parameters,
        bytes=size,
        versions=versions(),
    )


def with_sources(snapshot: Snapshot, state: State, known: dict[str, tuple[object, str]] | None = None) -> Snapshot:
    """With the code of the models that are registered in `state`.

    Args:
      known: name → module and its code, as they were looked up before.
    """
    known = {} if known is None else known
    for name, entry in state.models.items():
        module = entry.model.module
        if name not in known or known[name][0] is not module:
            known[name] = module, source_of(module)
    models = (
        replace(model, source=known[model.name][1]) if model.name in state.models else model
        for model in snapshot.models
    )
    return replace(snapshot, models=tuple(models))


def _own(tree: PyTree) -> PyTree:
    """The tree in containers that nobody else has, NumPy's arrays copied."""
    if type(tree) is dict:
        return {key: _own(value) for key, value in tree.items()}
    if type(tree) in (list, tuple):
        return type(tree)(map(_own, tree))
    return own(tree) if isinstance(tree, (np.ndarray, jax.Array)) else jax.tree_util.tree_map(own, tree)


@lru_cache(maxsize=1)
def versions() -> dict[str, str]:
    """Of what a run's bits depend on. Not to be changed."""
    packages = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax", "numpy")}
    return {"flax_magics": __version__, "python": platform.python_version(), **packages}


def settings() -> dict[str, str]:
    """JAX's settings that change the bits of a run, as text."""
    return {name: str(getattr(jax.config, name)) for name in _SETTINGS if hasattr(jax.config, name)}


def device() -> str:
    """The first device: its platform and kind."""
    first = jax.devices()[0]
    return f"{first.platform} {first.device_kind}" if first.device_kind != first.platform else first.platform


def write(
    path: Path,
    snapshot: Snapshot,
    runs: RunLog | None,
    history: WrittenRuns | None = None,
    ticket: threading.Lock | None = None,
) -> int:
    """Writes a session, whole or not at all; gives the size in bytes.

    Args:
      history: has noted down the runs of earlier snapshots.
      ticket: see `replace_file`.

    Raises:
      FlaxMagicsError: something in it cannot be saved, or the file cannot be written; the old one is as it was.
    """
    writer = Writer()
    records = format.json_of((history or WrittenRuns(digest=True)).of(runs)).encode()
    document = replace(snapshot, models=tuple(_written(model, writer) for model in snapshot.models))
    return format.write(path, document, {**writer.arrays, "history": np.frombuffer(records, np.uint8)}, ticket)


def _written(model: SavedModel, writer: Writer) -> SavedModel:
    """The model with nodes in the place of its trees, whose arrays go into `writer`."""
    name, init = model.name, _init_written(model, writer)
    if model.holds_variables:
        variables: PyTree = [
            (collection, writer.key(path, name), writer.tree(value, "/".join((name, collection, *map(str, path)))))
            for collection, path, value in model.variables
        ]
    else:
        tree_writer = Writer(writer.arrays)
        variables = tree_writer.tree(model.variables, name)
        if tree_writer.foreign is not None and init is None:
            where, cls = tree_writer.foreign
            raise FlaxMagicsError(
                f"`{where}` cannot be saved: it is of {cls}, and no init of `{name}` is known here that would tell what"
                " to make of it."
            )
    keys = model.keys and {
        stream: writer.tree(key, f"{name} built with/{stream}") for stream, key in model.keys.items()
    }
    return replace(model, variables=variables, made=init, keys=keys, file="")


def _init_written(model: SavedModel, writer: Writer) -> SavedInit | None:
    """How the variables were made; None where that cannot be said without code of the user's."""
    if model.made is None:
        return None
    # An array of a call that cannot be written is not to be in the file.
    call_writer, at = Writer(), f"{model.name} initialised with"
    try:
        nodes = {
            part: call_writer.tree(getattr(model.made, part), f"{at}/{part}") for part in ("key", "args", "kwargs")
        }
    except FlaxMagicsError:
        return None
    if call_writer.foreign is not None:
        return None
    writer.arrays.update(call_writer.arrays)
    return replace(model.made, **nodes)


class WrittenRuns:
    """The runs of a session as JSON data, each made once: a session that is saved again and again adds few each time.

    Args:
      digest: take the digest of an output that is still there, which reads all of it.
    """

    def __init__(self, *, digest: bool) -> None:
        self._digest = digest
        self._data: list[tuple[dict[str, Any], StoredRun]] = []

    def of(self, log: RunLog | None) -> list[dict[str, Any]]:
        """The data of every run, oldest first."""
        last = self._data[-1][1] if self._data else None
        new = list(takewhile(lambda run: run is not last, backwards(log)))
        if log is None or len(new) == log.length:  # another history than before
            self._data = []
        self._data += [(self._data_of(run), run) for run in reversed(new)]
        # A run's digest may be taken after it was noted down, and it may be run again.
        return [
            data | {"digest": data["digest"] or run.facts._taken.digest, "replays": run.replays}
            for data, run in self._data
        ]

    def _data_of(self, stored: StoredRun) -> dict[str, Any]:
        run = stored.run()
        if not self._digest:
            _ = run.shape  # while there is an output to read it from
            run = replace(run, output=RELEASED)
        impl: str | None
        match run.keys:
            case WrittenKeys(impl=impl) | RunKeys(draw=Draw(impl=impl) | DrawBatch(impl=impl)):
                pass
            case keys:
                impl = next((str(jax.random.key_impl(key)) for key in keys.values()), None)
        return {**run.to_json(), "timing": asdict(run.timing), "impl": impl or None, "inputs": stored.shapes}


def read(path: Path) -> tuple[Snapshot, RunLog | None]:
    """What a file has. Raises FlaxMagicsError: it is no session, or not as it was written."""
    contents = format.read(path)
    reader = Reader(contents.arrays)
    try:
        snapshot = convert(contents.document, Snapshot, "its session")
        if len({model.name for model in snapshot.models}) != len(snapshot.models):
            raise Damaged("two of its models have one name")
        for _, impl in snapshot.seeds.values():
            if impl:  # none where no draw was made
                key_type(impl)
        _check_key(snapshot.root.data, snapshot.root.impl)
        if snapshot.opened is not None:
            _check_key(snapshot.opened[1].root, snapshot.opened[1].impl)
        models = tuple(_model_of(model, reader, str(path)) for model in snapshot.models)
        return replace(snapshot, models=models), _runs_of(reader)
    except Damaged as error:
        format.refuse(path, str(error))
    except RecursionError:
        format.refuse(path, "something in it is nested too deeply")


def _check_key(data: bytes, impl: str) -> None:
    if len(data) != 4 * math.prod(key_type(impl)[1]):
        raise Damaged(f"it has keys that are none of {impl}")


def _model_of(model: SavedModel, reader: Reader, path: str) -> SavedModel:
    """The model with its trees in the place of their nodes: what `_written` took apart."""
    name = model.name
    if not name.isidentifier():
        raise Damaged("one of its models is none")
    if model.holds_variables:
        rows = convert(model.variables, VariableRows, f"what it has of `{name}`")
        variables: PyTree = tuple((collection, key_read(steps), reader.tree(node)) for collection, steps, node in rows)
        if len({steps for _, steps, _ in variables}) != len(variables):
            raise Damaged(f"`{name}` has a variable that stands twice")
    else:
        variables = reader.tree(model.variables)
        if variables is not None and not _has_names(variables):
            raise Damaged(f"the variables of `{name}` are no collections")
    _check_tree(variables, f"the variables of `{name}`")
    keys = model.keys and {stream: reader.tree(node) for stream, node in model.keys.items()}
    if keys and not all(_is_key(key) and not key.shape for key in keys.values()):
        raise Damaged(f"what `{name}` was built with is no key")
    init = model.made and _init_of(model.made, name, reader)
    return replace(model, variables=variables, made=init, keys=keys, file=path)


def _has_names(tree: PyTree) -> bool:
    return isinstance(tree, Mapping) and all(type(key) is str for key in tree)


def _is_key(value: PyTree) -> bool:
    return isinstance(value, jax.Array) and is_key(value)


def _check_tree(tree: PyTree, what: str) -> None:
    """Raises Damaged where JAX does not take something apart, such as a dict with keys of two types: none was saved."""
    try:
        jax.tree_util.tree_structure(tree)
    except ValueError:
        raise Damaged(f"{what} are no tree") from None


def _init_of(init: SavedInit, name: str, reader: Reader) -> SavedInit:
    key, args, kwargs = map(reader.tree, (init.key, init.args, init.kwargs))
    _check_tree((args, kwargs), f"the arguments that `{name}` was initialised with")
    opaque = foreign_in((args, kwargs)) is not None
    if opaque or type(args) is not tuple or not _has_names(kwargs) or not _is_key(key):
        raise Damaged(f"what `{name}` was initialised with is no call")
    return replace(init, key=key, args=args, kwargs=dict(kwargs))


def _runs_of(reader: Reader) -> RunLog | None:
    """The runs that `WrittenRuns` wrote; their inputs and outputs are `RELEASED`."""
    try:
        text = reader.stored("history").tobytes().decode()
    except UnicodeDecodeError:
        raise Damaged("its history is no text") from None
    log = None
    for record in convert(loads(text, "its history"), list[RunRecord], "its history"):
        log = RunLog.add(log, _run_of(record, first=log is None))
    return log


def _run_of(record: RunRecord, *, first: bool) -> StoredRun:
    if record.keys and record.impl is None:
        raise Damaged("a run in its history does not say what its keys are")
    digits = 0 if record.impl is None else 8 * math.prod(key_type(record.impl)[1]) * (record.samples or 1)
    if any(len(words) != digits for words in record.keys.values()):
        raise Damaged("a run in its history has a key that is none")
    elsewhere = {name: getattr(record, name) for name in ("versions", "device_kind", "processor", "threads")}
    if record.leaves is not None:
        elsewhere |= {"leaves": record.leaves, "bits": record.bits}
    taken = OutputFacts(record.digest, record.output, None if record.samples is None else record.spread, record.values)
    facts: dict[str, Any] = {
        **{name: getattr(record, name) for name in Run.__struct_fields__ if hasattr(record, name)},
        "inputs": RELEASED,
        "output": RELEASED,
        "keys": WrittenKeys(record.keys, record.impl or "", record.samples),
        "first": first,
        "elsewhere": elsewhere,
        "_taken": taken,
    }
    return StoredRun.read(Run(**facts), record.inputs, record.replays)


@dataclass(frozen=True)
class WrittenKeys(Mapping[str, jax.Array]):
    """The keys of a run that was read, made when they are looked at.

    Attributes:
      words: stream → its words in hex, of all its keys one after the other.
      size: of how many draws each has the keys; None for one key of shape ().
    """

    words: Mapping[str, str]
    impl: str
    size: int | None = None

    def data(self, name: str) -> bytes:
        """Key data."""
        return np.frombuffer(bytes.fromhex(self.words[name]), ">u4").astype(np.uint32).tobytes()

    def __getitem__(self, name: str) -> jax.Array:
        return as_key(self.data(name), self.impl, self.size)

    def __iter__(self) -> Iterator[str]:
        return iter(self.words)

    def __len__(self) -> int:
        return len(self.words)
