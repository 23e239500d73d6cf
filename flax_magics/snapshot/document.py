"""A session at one moment as a record: taken from the state, written into a file as JSON and arrays, and read back."""

from __future__ import annotations

import importlib.metadata
import math
import platform
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import msgspec
import numpy as np
from msgspec.structs import asdict, replace

from ..base import __version__
from ..base.digest import count_parameters, is_key, owned_copy
from ..base.files import Damaged, convert, loads
from ..base.measures import Cost, Lies, Limits, Memory, MeshUse, Timing
from ..base.output import OutputFacts, Spread, Values
from ..base.types import PyTree
from ..code.inventory import source_of
from ..errors import FlaxMagicsError
from ..rng.keys import SPLIT, Draw, DrawBatch, RootKey, RunKeys, as_key
from ..run import RELEASED, CommandName, InitStats, Note, Run
from ..state.entry import ModelEntry
from ..state.runs import RunLog, StoredRun, backwards
from ..state.state import SavedInit, SavedModel, State
from ..state.training import SavedTraining
from ..state.trees import Reader, Writer, foreign_in, key_type
from . import format
from .training import SavedCurve, arrays_of, check_arrays, written_position

_SETTINGS = ("jax_enable_x64", "jax_threefry_partitionable", "jax_default_matmul_precision")
"""The JAX settings that change the bits of a run."""
KeyWords = Annotated[str, msgspec.Meta(pattern=r"\A([0-9a-f]{8})*\Z")]
Digest = Annotated[str, msgspec.Meta(pattern=r"\A[0-9a-f]{16}\Z")]


class Snapshot(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A session without its runs, which are a `RunLog` beside it: root key, open draw, models, and what it ran on.

    A file's JSON has these fields, and those of the records in them, by name: renaming one changes the file format.

    Attributes:
      saved: seconds since the epoch.
      settings: of JAX, at that time.
      mesh: its axes as they are written; empty without one.
    """

    root: RootKey
    opened: tuple[str, Draw] | None
    seeds: Mapping[int, tuple[int, str]]
    models: tuple[SavedModel, ...]
    versions: Mapping[str, str]
    device: str
    settings: Mapping[str, str]
    saved: float
    mesh: str = ""

    @property
    def parameters(self) -> int:
        """Elements of the parameters of all models."""
        return sum(model.parameters for model in self.models)


_Size = Annotated[int, msgspec.Meta(ge=1, le=1 << 16)]


class SavedMesh(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a run made of a mesh, as a file has it; see `MeshUse`."""

    axes: Annotated[tuple[tuple[str, _Size], ...], msgspec.Meta(min_length=1, max_length=8)]
    devices: Annotated[tuple[str, ...], msgspec.Meta(max_length=1 << 16)]
    inputs: tuple[Lies, ...]
    variables: tuple[Lies, ...]
    output: tuple[Lies, ...]

    def use(self) -> MeshUse:
        """The same for a Run, whose program is gone."""
        return MeshUse(self.axes, self.devices, self.inputs, self.variables, self.output, lambda: None)


class RunRecord(msgspec.Struct, forbid_unknown_fields=True):
    """A run in a file: what `Run.to_json` has, and what the history needs besides.

    Attributes:
      impl: the PRNG implementation of its keys, None if it has no keys.
      inputs: their dtypes and shapes, as text.
      replays: how often it was run again, and whether any of these gave other bits.
      leaves, bits: a few values of the output, see `output.sample_of`; None and empty without any.
    """

    version: Literal[1]
    command: CommandName
    model: str | None
    mode: str
    weights: str
    call: str
    output: str
    seed: int
    draw: int
    samples: int | None
    keys: dict[str, KeyWords]
    digest: Digest | None
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
    trained: SavedCurve | None = None
    mesh: SavedMesh | None = None


def take(state: State) -> Snapshot:
    """The state as a Snapshot, still without the code of the models (see `with_sources`, which is slower).

    NumPy arrays are copied, since their owners may write into them before the file is written.
    """
    models = [_taken(entry) for entry in state.models.values()]
    # Models of an earlier file that are still waiting are saved again.
    waiting = [model for name, model in state.waiting.items() if name not in state.models]
    return Snapshot(
        state.root,
        state.opened,
        state.seeds,
        (*models, *waiting),
        versions(),
        device(),
        settings(),
        time.time(),
        "" if state.placement is None else state.placement.axes,
    )


def _taken(entry: ModelEntry) -> SavedModel:
    # After an assignment the earlier init still tells what fits the model.
    model, init = entry.model, entry.last_init
    saved_init = None
    # A function, the loss that made the variables, is no data.
    if init is not None and init.program is not None and not callable(init.method):
        saved_init = SavedInit(init.key, init.method, init.args, init.kwargs, init.program)
    parameters, size = count_parameters(entry.collections() or {})
    training = entry.training
    return SavedModel(
        name=entry.name,
        api=model.api,
        text=model.describe(),
        source="",
        variables=_own(model.variables_to_save(entry.variables)),
        updates=dict(entry.update_counts),
        outdated=entry.outdated,
        stale=entry.rebuild_next,
        made=saved_init,
        assigned=entry.init is None,
        keys=None if entry.built is None else dict(entry.built.keys),
        optimizer=None if entry.optimizer is None else entry.optimizer.text,
        training=None if training is None else SavedTraining.of(training, _own(arrays_of(training))),
        parameters=parameters,
        bytes=size,
        versions=versions(),
    )


def with_sources(snapshot: Snapshot, state: State, known: dict[str, tuple[object, str]] | None = None) -> Snapshot:
    """The snapshot with the source code of the models that are registered in `state`.

    Args:
      known: name → module and its code from earlier saves, extended here.
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
    """A copy of the tree's containers, with NumPy arrays copied; JAX arrays, which cannot change, are shared."""
    if type(tree) is dict:
        return {key: _own(value) for key, value in tree.items()}
    if type(tree) in (list, tuple):
        return type(tree)(map(_own, tree))
    return owned_copy(tree) if isinstance(tree, (np.ndarray, jax.Array)) else jax.tree_util.tree_map(owned_copy, tree)


@lru_cache(maxsize=1)
def versions() -> dict[str, str]:
    """Versions that a run's bits depend on. The cached dict must not be changed."""
    packages = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax", "numpy")}
    return {"flax_magics": __version__, "python": platform.python_version(), **packages}


def settings() -> dict[str, str]:
    """The JAX settings that change the bits of a run, with their values as text."""
    return {name: str(getattr(jax.config, name)) for name in _SETTINGS if hasattr(jax.config, name)}


def device() -> str:
    """Platform and kind of the first device, such as `gpu NVIDIA H100`; the platform alone if both are the same."""
    first = jax.devices()[0]
    return f"{first.platform} {first.device_kind}" if first.device_kind != first.platform else first.platform


def write(
    path: Path,
    snapshot: Snapshot,
    runs: RunLog | None,
    history: WrittenRuns | None = None,
    ticket: threading.Lock | None = None,
) -> int:
    """Writes a session into a file, whole or not at all. Returns the file's size in bytes.

    Args:
      history: keeps the JSON of runs that were written before.
      ticket: see `replace_file`.

    Raises:
      FlaxMagicsError: something in it cannot be saved, or the file cannot be written; an old file is left as it was.
    """
    writer = Writer()
    records = format.json_of((history or WrittenRuns(digest=True)).of(runs)).encode()
    document = replace(snapshot, models=tuple(_written(model, writer) for model in snapshot.models))
    return format.write(path, document, {**writer.arrays, "history": np.frombuffer(records, np.uint8)}, ticket)


def _written(model: SavedModel, writer: Writer) -> SavedModel:
    """The model with JSON nodes in the place of its trees, whose arrays go into `writer`."""
    name, init = model.name, _init_written(model, writer)
    # The same arrays, but a `foreign` of its own: it is asked about this tree alone.
    tree_writer = Writer(writer.arrays)
    variables = tree_writer.tree(model.variables, name)
    # An NNX module tells what to make of it, a linen module only by an init.
    if tree_writer.foreign is not None and model.api == "linen" and init is None:
        where, cls = tree_writer.foreign
        raise FlaxMagicsError(
            f"`{where}` cannot be saved: it is of {cls}, and no init of `{name}` is known here that would tell what"
            " to make of it."
        )
    keys = model.keys and {
        stream: writer.tree(key, f"{name} built with/{stream}") for stream, key in model.keys.items()
    }
    training = model.training
    if training is not None:  # its classes are those that the optimizer makes, which is given again
        training = replace(
            training,
            trees=Writer(writer.arrays).tree(training.trees, f"{name} trained with"),
            position=written_position(training.position, f"{name} trained with/position", writer),
        )
    return replace(model, variables=variables, made=init, keys=keys, training=training, file="")


def _init_written(model: SavedModel, writer: Writer) -> SavedInit | None:
    """The init that made the variables, as nodes; None where reading it would need classes of the user's code."""
    if model.made is None:
        return None
    # A writer of its own: if the call cannot be written, none of its arrays may be left in the file.
    call_writer, at = Writer(), f"{model.name} initialised with"
    try:
        nodes = {
            name: call_writer.tree(getattr(model.made, name), f"{at}/{name}") for name in ("key", "args", "kwargs")
        }
    except FlaxMagicsError:
        return None
    if call_writer.foreign is not None:
        return None
    writer.arrays.update(call_writer.arrays)
    return replace(model.made, **nodes)


class WrittenRuns:
    """The runs of a session as JSON data. Each run is converted once, so that saving again costs little.

    Args:
      digest: compute the digest of each output that is still there, which reads all of it.
    """

    def __init__(self, *, digest: bool) -> None:
        self._digest = digest
        self._data: list[tuple[dict[str, Any], StoredRun]] = []

    def of(self, log: RunLog | None) -> list[dict[str, Any]]:
        """The JSON data of every run in `log`, oldest first."""
        # A training's run gives way to another each time that more steps are done: any may be new.
        known = {id(run): data for data, run in self._data}
        runs = reversed(list(backwards(log)))
        self._data = [(known[id(run)] if id(run) in known else self._data_of(run), run) for run in runs]
        # Digest and replays may have come since the run was converted.
        return [
            data | {"digest": data["digest"] or run.facts._taken.read().digest, "replays": run.replays}
            for data, run in self._data
        ]

    def _data_of(self, stored: StoredRun) -> dict[str, Any]:
        run = stored.run()
        if not self._digest:
            _ = run.shape  # read while the output is there: it goes into the file
            run = replace(run, output=RELEASED)
        impl: str | None
        match run.keys:
            case WrittenKeys(impl=impl) | RunKeys(draw=Draw(impl=impl) | DrawBatch(impl=impl)):
                pass
            case keys:
                impl = next((str(jax.random.key_impl(key)) for key in keys.values()), None)
        trained = None if run.trained is None else SavedCurve.of(run.trained)
        record = {**run.to_json(), "timing": asdict(run.timing), "impl": impl or None, "inputs": stored.shapes}
        return {**record, "trained": trained}


def read(path: Path) -> tuple[Snapshot, RunLog | None]:
    """Reads a file. Raises FlaxMagicsError where it is no session, or is damaged."""
    contents = format.read(path)
    reader = Reader(contents.arrays)
    try:
        snapshot = convert(contents.document, Snapshot, "its session")
        if len({model.name for model in snapshot.models}) != len(snapshot.models):
            raise Damaged("two of its models have one name")
        for _, impl in snapshot.seeds.values():
            if impl:  # empty where no draw was made under the seed
                key_type(impl)
        _check_key(snapshot.root.data, snapshot.root.impl)
        if snapshot.opened is not None:
            _check_key(snapshot.opened[1].root, snapshot.opened[1].impl)
        models = tuple(_model_of(model, reader, str(path)) for model in snapshot.models)
        return replace(snapshot, models=models), _runs_of(reader)
    except Damaged as error:
        format.refuse(path, str(error))
    except RecursionError:
        # Nodes are limited in depth, but JSON around them may be nested by whoever altered the file.
        format.refuse(path, "something in it is nested too deeply")


def _check_key(data: bytes, impl: str) -> None:
    if len(data) != 4 * math.prod(key_type(impl)[1]):
        raise Damaged(f"it has keys that are none of {impl}")


def _model_of(model: SavedModel, reader: Reader, path: str) -> SavedModel:
    """The model with trees in the place of nodes, the inverse of `_written`. Raises Damaged."""
    name = model.name
    if not name.isidentifier():
        raise Damaged("one of its models is none")
    variables = reader.tree(model.variables)
    if variables is not None and not _has_names(variables):
        raise Damaged(f"the variables of `{name}` are no collections")
    _check_tree(variables, f"the variables of `{name}`")
    keys = model.keys and {stream: reader.tree(node) for stream, node in model.keys.items()}
    if keys and not (keys.keys() == set(SPLIT) and all(_is_key(key) and not key.shape for key in keys.values())):
        raise Damaged(f"what `{name}` was built with is no key")
    init = model.made and _init_of(model.made, name, reader)
    training = model.training
    if training is not None:
        training = replace(training, trees=reader.tree(training.trees))
        _check_tree(training.trees, f"the training of `{name}`")
        _check_key(training.draw.root, training.draw.impl)
        check_arrays(training, name)
        if training.position is not None:
            state = reader.tree(training.position.state)
            training = replace(training, position=replace(training.position, state=state))
    return replace(model, variables=variables, made=init, keys=keys, training=training, file=path)


def _has_names(tree: PyTree) -> bool:
    return isinstance(tree, Mapping) and all(type(key) is str for key in tree)


def _is_key(value: PyTree) -> bool:
    return isinstance(value, jax.Array) and is_key(value)


def _check_tree(tree: PyTree, what: str) -> None:
    """Raises Damaged where JAX cannot flatten `tree`, such as a dict with keys of two types, which no session has."""
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
    """The runs in the file's history. Their inputs and outputs are `RELEASED`. Raises Damaged."""
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
    # Eight hex digits for each word of each key.
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
        "trained": None if record.trained is None else record.trained.curve(),
        "mesh": None if record.mesh is None else record.mesh.use(),
        "_taken": taken,
    }
    return StoredRun.read(Run(**facts), record.inputs, record.replays)


@dataclass(frozen=True)
class WrittenKeys(Mapping[str, jax.Array]):
    """The keys of a run that was read from a file. Arrays are made only when one is asked for.

    Attributes:
      words: stream → the words of its keys in hex, one after the other.
      size: how many draws have a key in it; None for one key of shape ().
    """

    words: Mapping[str, str]
    impl: str
    size: int | None = None

    def data(self, name: str) -> bytes:
        """The key data of a stream, as bytes of uint32 words."""
        # Hex is written with the most significant digit first, whatever the machine's byte order.
        return np.frombuffer(bytes.fromhex(self.words[name]), ">u4").astype(np.uint32).tobytes()

    def __getitem__(self, name: str) -> jax.Array:
        return as_key(self.data(name), self.impl, self.size)

    def __iter__(self) -> Iterator[str]:
        return iter(self.words)

    def __len__(self) -> int:
        return len(self.words)
