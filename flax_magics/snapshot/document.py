"""A session at one moment as data: taken, written into a file as its records, and read out of one."""

from __future__ import annotations

import importlib.metadata
import math
import platform
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import jax
import msgspec
import numpy as np
from msgspec.structs import asdict, astuple

from ..base import __version__
from ..base.compare import Spread
from ..base.digest import Values, count_parameters, own
from ..base.jsondata import Damaged, Hex, convert, loads
from ..base.measures import Cost, Limits, Memory, Steady, Timing
from ..code.inventory import source_of
from ..errors import FlaxMagicsError
from ..rng.keys import Draw, RootKey, RunKeys, as_key
from ..run import RELEASED, InitStats, Note, OutputFacts, Run, altered
from ..state.entry import ModelEntry
from ..state.runs import RunLog, StoredRun
from ..state.state import SavedInit, SavedModel, State
from ..state.trees import Reader, Writer, foreign_in, key_of, key_read, key_type
from . import format
from .records import DrawRecord, InitCallRecord, ModelRecord, OpenedRecord, RunRecord, SessionRecord, VariableRows

T = TypeVar("T")

_SETTINGS = ("jax_enable_x64", "jax_threefry_partitionable", "jax_default_matmul_precision")
"""Settings of JAX's that change the bits of a run."""


@dataclass(frozen=True)
class Snapshot:
    """A session: its root key, what is open, its models and its runs; and what it ran on.

    Attributes:
      runs: of a session that is there; `written` has those of one that was read.
      saved: seconds since the epoch.
      settings: JAX's, as they were.
    """

    root: RootKey
    opened: tuple[str, Draw] | None
    seeds: Mapping[int, tuple[int, str]]
    models: tuple[SavedModel, ...]
    runs: RunLog | None = None
    written: tuple[StoredRun, ...] = ()
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


def _taken(entry: ModelEntry) -> SavedModel:
    model = entry.model
    if model.holds_variables:
        slots = [slot for slot in model.layout.slots if not slot.sown and not slot.fixed]
        variables: Any = tuple((slot.collection, slot.path, _own(slot.read())) for slot in slots)
        parameters, size = count_parameters(model.collections())
    else:
        variables = None if entry.variables is None else _own(entry.variables)
        parameters, size = count_parameters(variables or {})
    return SavedModel(
        name=entry.name,
        holds_variables=model.holds_variables,
        text=model.describe(),
        source="",
        variables=variables,
        updates=dict(entry.update_counts),
        outdated=entry.outdated,
        stale=entry.rebuild_next,
        made=entry.init or entry.previous_init,
        assigned=entry.init is None,
        keys=None if entry.built is None else dict(entry.built.keys),
        parameters=parameters,
        bytes=size,
        versions=versions(),
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
    path: Path, snapshot: Snapshot, history: WrittenRuns | None = None, ticket: threading.Lock | None = None
) -> int:
    """Writes a snapshot, whole or not at all; gives the size in bytes.

    Args:
      history: has noted down the runs of earlier snapshots.
      ticket: see `replace_file`.

    Raises:
      FlaxMagicsError: something in it cannot be saved, or the file cannot be written; the old one is as it was.
    """
    writer = Writer()
    runs = format.json_of((history or WrittenRuns(digest=True)).of(snapshot.runs)).encode()
    opened, root = snapshot.opened, snapshot.root
    record = SessionRecord(
        saved=Hex(snapshot.saved),
        versions=dict(snapshot.versions),
        settings=dict(snapshot.settings),
        device=snapshot.device,
        root=DrawRecord(str(root.seed), root.draws, root.data.hex(), root.impl),
        opened=opened
        and OpenedRecord(str(opened[1].seed), opened[1].number - 1, opened[1].root.hex(), opened[1].impl, opened[0]),
        seeds=[(str(seed), last, impl) for seed, (last, impl) in snapshot.seeds.items()],
        models=[_record_of(model, writer) for model in snapshot.models],
    )
    return format.write(path, record, {**writer.arrays, "history": np.frombuffer(runs, np.uint8)}, ticket)


def _record_of(model: SavedModel, writer: Writer) -> ModelRecord:
    name = model.name
    made = _call_of(model, writer)
    if model.holds_variables:
        variables: Any = [
            (collection, [writer.key(step, name) for step in path], writer.tree(value, at))
            for collection, path, value in model.variables
            for at in ["/".join((name, collection, *map(str, path)))]
        ]
    else:
        tree_writer = Writer(writer.arrays)
        variables = tree_writer.tree(model.variables, name)
        if tree_writer.foreign is not None and made is None:
            where, cls = tree_writer.foreign
            raise FlaxMagicsError(
                f"`{where}` cannot be saved: it is of {cls}, and no init of `{name}` is known here that would tell what"
                " to make of it."
            )
    keys = None
    if model.keys is not None:
        keys = {stream: writer.tree(key, f"{name} built with/{stream}") for stream, key in model.keys.items()}
    same = {field: getattr(model, field) for field in ("name", "text", "source", "outdated", "stale", "assigned")}
    return ModelRecord(
        **same,
        api="nnx" if model.holds_variables else "linen",
        variables=variables,
        updates=dict(model.updates),
        made=made,
        keys=keys,
        parameters=model.parameters,
        bytes=model.bytes,
        versions=dict(model.versions),
    )


def _call_of(model: SavedModel, writer: Writer) -> InitCallRecord | None:
    """How the variables were made; None where that cannot be said without code of the user's."""
    made = model.made
    if made is None or made.program is None:
        return None
    # An array of a call that cannot be written is not to be in the file.
    call_writer, at = Writer(), f"{model.name} initialised with"
    try:
        key, args, kwargs = (
            call_writer.tree(getattr(made, part), f"{at}/{part}") for part in ("key", "args", "kwargs")
        )
    except FlaxMagicsError:
        return None
    if call_writer.foreign is not None:
        return None
    writer.arrays.update(call_writer.arrays)
    return InitCallRecord(key, args, kwargs, made.method, made.program)


class WrittenRuns:
    """The runs of a session as JSON data, each made once: a session that is saved again and again adds few each time.

    Args:
      digest: take the digest of an output that is still there, which reads all of it.
    """

    def __init__(self, *, digest: bool) -> None:
        self._digest = digest
        self._last: RunLog | None = None
        self._data: list[tuple[dict[str, Any], StoredRun]] = []

    def of(self, chain: RunLog | None) -> list[dict[str, Any]]:
        """The data of every run, oldest first."""
        new = []
        at = chain
        while at is not None and at is not self._last:
            new.append(at.kept)
            at = at.before
        if at is None:
            self._data = []
        self._data += [(self._data_of(kept), kept) for kept in reversed(new)]
        self._last = chain
        return [_as_it_is_now(data, kept) for data, kept in self._data]

    def _data_of(self, kept: StoredRun) -> dict[str, Any]:
        run = kept.run()
        if not self._digest:
            _ = run.shape  # while there is an output to read it from
            run = altered(run, {"output": RELEASED})
        impl: str | None
        match run.keys:
            case RunKeys(draw=draw):
                impl = draw.impl
            case WrittenKeys(impl=impl):
                pass
            case keys:
                impl = next((str(jax.random.key_impl(key)) for key in keys.values()), None)
        data = {**run.to_json(), "impl": impl, "inputs": kept.shapes, "replays": kept.replays}
        written: dict[str, Any] = msgspec.to_builtins(convert(data, RunRecord, "a run"), enc_hook=float.hex)
        return written


def _as_it_is_now(data: dict[str, Any], kept: StoredRun) -> dict[str, Any]:
    """With what became of a run after it was noted down: its digest was taken, it was run again."""
    digest = data["digest"] or kept.facts["_taken"].digest
    if digest == data["digest"] and kept.replays == tuple(data["replays"]):
        return data
    return {**data, "digest": digest, "replays": list(kept.replays)}


def read(path: Path) -> Snapshot:
    """What a file has. Raises FlaxMagicsError: it is no session, or not as it was written."""
    contents = format.read(path)
    try:
        record = convert(contents.document, SessionRecord, "its session")
        return _snapshot(record, Reader(contents.arrays), str(path))
    except Damaged as error:
        format.refuse(path, str(error))
    except RecursionError:
        format.refuse(path, "something in it is nested too deeply")


def _snapshot(record: SessionRecord, reader: Reader, path: str) -> Snapshot:
    if len({model.name for model in record.models}) != len(record.models):
        raise Damaged("two of its models have one name")
    for _, _, impl in record.seeds:
        if impl:  # none where no draw was made
            key_type(impl)
    root = _draw_of(record.root)
    try:
        history = reader.stored("history").tobytes().decode()
    except UnicodeDecodeError:
        raise Damaged("its history is no text") from None
    runs = convert(loads(history, "its history"), list[RunRecord], "its history")
    return Snapshot(
        root=RootKey(root.seed, root.number - 1, root.root, root.impl),
        opened=None if record.opened is None else (record.opened.model, _draw_of(record.opened)),
        seeds={int(seed): (last, impl) for seed, last, impl in record.seeds},
        models=tuple(_model_of(model, reader, path) for model in record.models),
        written=tuple(_run_of(run, first=not i) for i, run in enumerate(runs)),
        versions=record.versions,
        device=record.device,
        settings=record.settings,
        saved=record.saved,
    )


def _draw_of(record: DrawRecord) -> Draw:
    """The draw that comes next from a root."""
    data = bytes.fromhex(record.key)
    key_of(np.frombuffer(data, np.uint32), record.impl)
    return Draw(int(record.seed), record.draws + 1, data, record.impl)


def _model_of(record: ModelRecord, reader: Reader, path: str) -> SavedModel:
    name = record.name
    if not name.isidentifier():
        raise Damaged("one of its models is none")
    variables: Any
    if record.api == "nnx":
        rows = convert(record.variables, VariableRows, f"what it has of `{name}`")
        variables = tuple(
            (collection, tuple(map(key_read, steps)), reader.tree(node)) for collection, steps, node in rows
        )
        if len({steps for _, steps, _ in variables}) != len(variables):
            raise Damaged(f"`{name}` has a variable that stands twice")
    else:
        variables = reader.tree(record.variables)
        if variables is not None and not _has_names(variables):
            raise Damaged(f"the variables of `{name}` are no collections")
    _check_tree(variables, f"the variables of `{name}`")
    keys = None
    if record.keys is not None:
        keys = {stream: reader.tree(node) for stream, node in record.keys.items()}
        if not all(_is_key(key) and not key.shape for key in keys.values()):
            raise Damaged(f"what `{name}` was built with is no key")
    same = ("text", "source", "updates", "outdated", "stale", "assigned", "parameters", "bytes", "versions")
    return SavedModel(
        name=name,
        holds_variables=record.api == "nnx",
        variables=variables,
        made=None if record.made is None else _init_of(record.made, name, reader),
        keys=keys,
        file=path,
        **{field: getattr(record, field) for field in same},
    )


def _has_names(tree: Any) -> bool:
    return isinstance(tree, Mapping) and all(type(key) is str for key in tree)


def _is_key(value: Any) -> bool:
    return isinstance(value, jax.Array) and jax.dtypes.issubdtype(value.dtype, jax.dtypes.prng_key)


def _check_tree(tree: Any, what: str) -> None:
    """Raises Damaged where JAX does not take something apart, such as a dict with keys of two types: none was saved."""
    try:
        jax.tree_util.tree_structure(tree)
    except ValueError:
        raise Damaged(f"{what} are no tree") from None


def _init_of(record: InitCallRecord, name: str, reader: Reader) -> SavedInit:
    key, args, kwargs = map(reader.tree, (record.key, record.args, record.kwargs))
    _check_tree((args, kwargs), f"the arguments that `{name}` was initialised with")
    if type(args) is not tuple or not _has_names(kwargs) or foreign_in((args, kwargs)) is not None or not _is_key(key):
        raise Damaged(f"what `{name}` was initialised with is no call")
    return SavedInit(key, record.method, args, dict(kwargs), record.program)


def _run_of(record: RunRecord, *, first: bool) -> StoredRun:
    """The run that `WrittenRuns` wrote; its inputs and its output are `RELEASED`."""
    if record.keys and record.impl is None:
        raise Damaged("a run in its history does not say what its keys are")
    digits = 0 if record.impl is None else 8 * math.prod(key_type(record.impl)[1]) * (record.draws or 1)
    if any(len(words) != digits for words in record.keys.values()):
        raise Damaged("a run in its history has a key that is none")
    elsewhere = {name: getattr(record, name) for name in ("versions", "device_kind", "processor", "threads")}
    if record.leaves is not None:
        elsewhere |= {"leaves": list(map(asdict, record.leaves)), "bits": record.bits}
    timing = asdict(record.timing)
    steady = timing.pop("steady")
    spread = tuple(Spread(**asdict(one)) for one in record.spread)
    values = tuple(Values(**asdict(one)) for one in record.values)
    run = Run(
        **{name: getattr(record, name) for name in _SAME},
        inputs=RELEASED,
        output=RELEASED,
        keys=WrittenKeys(record.keys, record.impl or "", record.draws),
        timing=Timing(**timing, steady=None if steady is None else Steady(steady)),
        memory=_made_of(Memory, record.memory),
        cost=_made_of(Cost, record.cost),
        limits=_made_of(Limits, record.limits),
        made=_made_of(InitStats, record.made),
        notes=tuple(Note(*astuple(note)) for note in record.notes),
        first=first,
        elsewhere=elsewhere,
        _taken=OutputFacts(record.digest, record.output, None if record.draws is None else spread, values),
    )
    return StoredRun.read(run, record.inputs, record.replays)


_SAME = (
    *("command", "model", "mode", "call", "seed", "draw", "draws", "device", "started", "used", "changed", "program"),
    *("reason", "switch", "static", "cell", "by_hand", "weights", "replayed"),
)
"""Fields of a Run that its record has as they are."""


def _made_of(kind: Callable[..., T], record: msgspec.Struct | None) -> T | None:
    return None if record is None else kind(**asdict(record))


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
        text = self.words[name]
        return np.array([int(text[i : i + 8], 16) for i in range(0, len(text), 8)], np.uint32).tobytes()

    def __getitem__(self, name: str) -> jax.Array:
        return as_key(self.data(name), self.impl, self.size)

    def __iter__(self) -> Iterator[str]:
        return iter(self.words)

    def __len__(self) -> int:
        return len(self.words)
