"""A session at one moment as data: taken, written into a file, and read out of one."""

from __future__ import annotations

import importlib.metadata
import platform
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ..base import __version__, jsondata
from ..base.digest import count_parameters, own
from ..base.files import Ticket
from ..base.jsondata import Damaged, JsonObject, finite, from_hex
from ..code.source import source_of
from ..errors import FlaxMagicsError
from ..rng.keys import Draw, RootKey
from ..state.entry import ModelEntry
from ..state.runs import RunLog, StoredRun
from ..state.saved import SavedInit, SavedModel
from ..state.state import State
from ..state.trees import Reader, Writer, foreign_in, key_of, key_read, key_type
from . import format
from .runs import WrittenRuns, kept_of

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
    model: Any = entry.model
    made = entry.made or entry.made_before
    if model.holds_variables:
        slots = [slot for slot in model.layout.slots if not slot.sown and not slot.fixed]
        variables: Any = tuple((slot.collection, slot.path, _own(slot.read())) for slot in slots)
        parameters, size = count_parameters(model.collections())
    else:
        variables = None if entry.variables is None else _own(entry.variables)
        parameters, size = count_parameters(variables or {})
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


def read(path: Path) -> Snapshot:
    """What a file has. Raises FlaxMagicsError: it is no session, or not as it was written."""
    found = format.read(path)
    try:
        return _snapshot(found.document, Reader(found.arrays), str(path))
    except Damaged as error:
        format.refuse(path, str(error))
    except RecursionError:
        format.refuse(path, "something in it is nested too deeply")


def _snapshot(document: Any, reader: Reader, path: str) -> Snapshot:
    names = ("saved", "versions", "settings", "device", "root", "opened", "seeds", "models")
    own = JsonObject(document, "session", names)
    root = _draw_of(own.inner("root", ("seed", "draws", "key", "impl")))
    opened = None
    if own.get("opened") is not None:
        inner = own.inner("opened", ("model", "seed", "draws", "key", "impl"))
        opened = inner.text("model"), _draw_of(inner)
    models = tuple(_model_of(data, reader, path) for data in own.items("models"))
    if len({model.name for model in models}) != len(models):
        raise Damaged("two of its models have one name")
    return Snapshot(
        root=RootKey(root.seed, root.number - 1, root.root, root.impl),
        opened=opened,
        seeds=dict(_seed(row) for row in own.items("seeds")),
        models=models,
        written=_runs(reader),
        versions=own.mapping("versions", JsonObject.text),
        device=own.text("device"),
        settings=own.mapping("settings", JsonObject.text),
        saved=own.real("saved"),
    )


def _runs(reader: Reader) -> tuple[StoredRun, ...]:
    stored = reader.stored("history")
    if stored.dtype != np.uint8 or stored.ndim != 1:
        raise Damaged("its history is no text")
    try:
        text = stored.tobytes().decode()
    except UnicodeDecodeError:
        raise Damaged("its history is no text") from None
    data = jsondata.loads(text, "its history")
    if not isinstance(data, list):
        raise Damaged("its history is no list")
    return tuple(kept_of(one, f"history[{i}]", first=not i) for i, one in enumerate(data))


def _whole(text: str, where: str) -> int:
    digits = text.removeprefix("-")
    if not (digits.isascii() and digits.isdigit()) or len(digits) > 60:
        raise Damaged(f"`{where}` is no whole number")
    return int(text)


def _draw_of(own: JsonObject) -> Draw:
    """The draw that comes next from a root."""
    seed, impl = _whole(own.text("seed"), f"{own.where}.seed"), own.text("impl")
    data = from_hex(own.text("key"), f"{own.where}.key")
    if len(data) % 4:
        raise Damaged(f"`{own.where}.key` is no key")
    key_of(np.frombuffer(data, np.uint32), impl)
    return Draw(seed, own.whole("draws") + 1, data, impl)


def _seed(row: Any) -> tuple[int, tuple[int, str]]:
    if not isinstance(row, list) or len(row) != 3:
        raise Damaged("`session.seeds` has a row that is none")
    own = JsonObject({"seed": row[0], "last": row[1], "impl": row[2]}, "session.seeds")
    impl = own.text("impl")
    if impl:  # none where no draw was made
        key_type(impl)
    return _whole(own.text("seed"), "session.seeds"), (own.whole("last"), impl)


_MODEL = (
    "name",
    "api",
    "text",
    "source",
    "variables",
    "updates",
    "outdated",
    "stale",
    "made",
    "assigned",
    "keys",
    "parameters",
    "bytes",
    "versions",
)


def _model_of(data: Any, reader: Reader, path: str) -> SavedModel:
    own = JsonObject(data, "session.models", _MODEL)
    name, api = own.text("name"), own.text("api")
    if not name.isidentifier() or api not in ("linen", "nnx"):
        raise Damaged("one of its models is none")
    if api == "nnx":
        variables: Any = tuple(_variable(row, name, reader) for row in own.items("variables"))
        if len({path for _, path, _ in variables}) != len(variables):
            raise Damaged(f"`{name}` has a variable that stands twice")
    else:
        variables = reader.tree(own.get("variables"))
        if variables is not None and not (
            isinstance(variables, Mapping) and all(type(key) is str for key in variables)
        ):
            raise Damaged(f"the variables of `{name}` are no collections")
    _check_tree(variables, f"the variables of `{name}`")
    keys = None
    if own.get("keys") is not None:
        keys = own.mapping("keys", lambda inner, stream: _key(reader.tree(inner.get(stream)), name))
    return SavedModel(
        name,
        api == "nnx",
        own.text("text"),
        own.text("source"),
        variables,
        own.mapping("updates", JsonObject.whole),
        own.flag("outdated"),
        own.flag("stale"),
        _made_of(own, reader),
        own.flag("assigned"),
        keys,
        own.whole("parameters"),
        own.whole("bytes"),
        own.mapping("versions", JsonObject.text),
        path,
    )


def _check_tree(tree: Any, what: str) -> None:
    """Raises Damaged where JAX does not take something apart, such as a dict with keys of two types: none was saved."""
    try:
        jax.tree_util.tree_structure(tree)
    except ValueError:
        raise Damaged(f"{what} are no tree") from None


def _variable(row: Any, name: str, reader: Reader) -> tuple[str, tuple[Any, ...], Any]:
    if not isinstance(row, list) or len(row) != 3 or not isinstance(row[0], str) or not isinstance(row[1], list):
        raise Damaged(f"`{name}` has a variable that is none")
    value = reader.tree(row[2])
    _check_tree(value, f"the variables of `{name}`")
    return row[0], tuple(map(key_read, row[1])), value


def _key(value: Any, name: str) -> Any:
    if not isinstance(value, jax.Array) or not jax.dtypes.issubdtype(value.dtype, jax.dtypes.prng_key) or value.shape:
        raise Damaged(f"what `{name}` was built with is no key")
    return value


def _made_of(own: JsonObject, reader: Reader) -> SavedInit | None:
    if own.get("made") is None:
        return None
    inner = own.inner("made", ("key", "args", "kwargs", "method", "program"))
    args, kwargs = reader.tree(inner.get("args")), reader.tree(inner.get("kwargs"))
    if type(args) is not tuple or type(kwargs) is not dict or not all(type(key) is str for key in kwargs):
        raise Damaged(f"`{inner.where}` is no call")
    _check_tree((args, kwargs), f"the arguments in `{inner.where}`")
    if foreign_in((args, kwargs)) is not None:
        raise Damaged(f"`{inner.where}` is no call")
    key = reader.tree(inner.get("key"))
    if not (hasattr(key, "dtype") and jax.dtypes.issubdtype(key.dtype, jax.dtypes.prng_key)):
        raise Damaged(f"`{inner.where}.key` is no key")
    return SavedInit(key, inner.texts("method"), args, kwargs, inner.maybe_text("program"))


def write(path: Path, snapshot: Snapshot, history: WrittenRuns | None = None, ticket: Ticket | None = None) -> int:
    """Writes a snapshot, whole or not at all; gives the size in bytes.

    Args:
      history: has noted down the runs of earlier snapshots.
      ticket: calls it off.

    Raises:
      FlaxMagicsError: something in it cannot be saved, or the file cannot be written; the old one is as it was.
    """
    writer = Writer()
    runs = format.json_of((history or WrittenRuns(digest=True)).of(snapshot.runs)).encode()
    document = {
        "saved": finite(snapshot.saved),
        "versions": dict(snapshot.versions),
        "settings": dict(snapshot.settings),
        "device": snapshot.device,
        "root": _root(snapshot.root),
        "opened": None if snapshot.opened is None else {"model": snapshot.opened[0], **_draw(snapshot.opened[1])},
        "seeds": [[str(seed), last, impl] for seed, (last, impl) in snapshot.seeds.items()],
        "models": [_model(model, writer) for model in snapshot.models],
    }
    arrays = {**writer.arrays, "history": np.frombuffer(runs, np.uint8)}
    return format.write(path, document, arrays, ticket)


def _root(root: RootKey) -> dict[str, Any]:
    return {"seed": str(root.seed), "draws": root.draws, "key": root.data.hex(), "impl": root.impl}


def _draw(draw: Draw) -> dict[str, Any]:
    return {"seed": str(draw.seed), "draws": draw.number - 1, "key": draw.root.hex(), "impl": draw.impl}


def _model(model: SavedModel, writer: Writer) -> dict[str, Any]:
    name = model.name
    made = _made(model, writer)
    if model.holds_variables:
        variables: Any = [
            [collection, [writer.key(step, name) for step in path], writer.tree(value, at)]
            for collection, path, value in model.variables
            for at in ["/".join((name, collection, *map(str, path)))]
        ]
    else:
        own = Writer(writer.arrays)
        variables = own.tree(model.variables, name)
        if own.foreign is not None and made is None:
            where, cls = own.foreign
            raise FlaxMagicsError(
                f"`{where}` cannot be saved: it is of {cls}, and no init of `{name}` is known here that would tell what"
                " to make of it."
            )
    keys = None
    if model.keys is not None:
        keys = {stream: writer.tree(key, f"{name} built with/{stream}") for stream, key in model.keys.items()}
    return {
        "name": name,
        "api": "nnx" if model.holds_variables else "linen",
        "text": model.text,
        "source": model.source,
        "variables": variables,
        "updates": dict(model.updates),
        "outdated": model.outdated,
        "stale": model.stale,
        "made": made,
        "assigned": model.assigned,
        "keys": keys,
        "parameters": model.parameters,
        "bytes": model.bytes,
        "versions": dict(model.versions),
    }


def _made(model: SavedModel, writer: Writer) -> Any:
    """How the variables were made, as data; None where that cannot be said without code of the user's."""
    made = model.made
    if made is None:
        return None
    own = Writer()
    try:
        call = {
            "key": own.tree(made.key, f"{model.name} initialised with/key"),
            "args": own.tree(made.args, f"{model.name} initialised with/args"),
            "kwargs": own.tree(made.kwargs, f"{model.name} initialised with/kwargs"),
        }
    except FlaxMagicsError:
        return None
    if own.foreign is not None or made.program is None:
        return None
    writer.arrays.update(own.arrays)
    return {**call, "method": list(made.method), "program": made.program}
