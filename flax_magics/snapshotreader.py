"""Reads a Snapshot out of a file, and checks everything in it; runs nothing that the file says."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from . import unpacking
from .container import Damaged
from .fields import Fields, from_hex
from .foreign import foreign_in
from .history import Kept
from .keys import Draw, Root
from .savedruns import kept_of
from .snapshot import SavedInit, SavedModel, Snapshot
from .treereader import Reader, key_of, key_read, key_type


def read(path: Path) -> Snapshot:
    """What a file has. Raises FlaxMagicsError: it is no session, or not as it was written."""
    found = unpacking.read(path)
    try:
        return _snapshot(found.document, Reader(found.arrays), str(path))
    except Damaged as error:
        unpacking.refuse(path, str(error))
    except RecursionError:
        unpacking.refuse(path, "something in it is nested too deeply")


def _snapshot(document: Any, reader: Reader, path: str) -> Snapshot:
    names = ("saved", "versions", "settings", "device", "root", "opened", "seeds", "models")
    own = Fields(document, "session", names)
    root = _draw_of(own.inner("root", ("seed", "draws", "key", "impl")))
    opened = None
    if own.get("opened") is not None:
        inner = own.inner("opened", ("model", "seed", "draws", "key", "impl"))
        opened = inner.text("model"), _draw_of(inner)
    models = tuple(_model_of(data, reader, path) for data in own.items("models"))
    if len({model.name for model in models}) != len(models):
        raise Damaged("two of its models have one name")
    return Snapshot(
        root=Root(root.seed, root.number - 1, root.root, root.impl),
        opened=opened,
        seeds=dict(_seed(row) for row in own.items("seeds")),
        models=models,
        written=_runs(reader),
        versions=own.mapping("versions", Fields.text),
        device=own.text("device"),
        settings=own.mapping("settings", Fields.text),
        saved=own.real("saved"),
    )


def _runs(reader: Reader) -> tuple[Kept, ...]:
    stored = reader.stored("history")
    if stored.dtype != np.uint8 or stored.ndim != 1:
        raise Damaged("its history is no text")
    try:
        text = stored.tobytes().decode()
    except UnicodeDecodeError:
        raise Damaged("its history is no text") from None
    data = unpacking.loads(text, "its history")
    if not isinstance(data, list):
        raise Damaged("its history is no list")
    return tuple(kept_of(one, f"history[{i}]", first=not i) for i, one in enumerate(data))


def _whole(text: str, where: str) -> int:
    digits = text.removeprefix("-")
    if not (digits.isascii() and digits.isdigit()) or len(digits) > 60:
        raise Damaged(f"`{where}` is no whole number")
    return int(text)


def _draw_of(own: Fields) -> Draw:
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
    own = Fields({"seed": row[0], "last": row[1], "impl": row[2]}, "session.seeds")
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
    own = Fields(data, "session.models", _MODEL)
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
        own.mapping("updates", Fields.whole),
        own.flag("outdated"),
        own.flag("stale"),
        _made_of(own, reader),
        own.flag("assigned"),
        keys,
        own.whole("parameters"),
        own.whole("bytes"),
        own.mapping("versions", Fields.text),
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


def _made_of(own: Fields, reader: Reader) -> SavedInit | None:
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
