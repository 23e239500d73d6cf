"""Writes a Snapshot into a file: what the file is, see `container`; how trees are kept, see `treewriter`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from . import container
from .atomic import Ticket
from .errors import FlaxMagicsError
from .fields import finite
from .keys import Draw, Root
from .savedruns import History
from .snapshot import SavedModel, Snapshot
from .treewriter import Writer


def write(path: Path, snapshot: Snapshot, history: History | None = None, ticket: Ticket | None = None) -> int:
    """Writes a snapshot, whole or not at all; gives the size in bytes.

    Args:
      history: has noted down the runs of earlier snapshots.
      ticket: calls it off.

    Raises:
      FlaxMagicsError: something in it cannot be saved, or the file cannot be written; the old one is as it was.
    """
    writer = Writer()
    runs = container.json_of((history or History(digest=True)).of(snapshot.runs)).encode()
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
    return container.write(path, document, arrays, ticket)


def _root(root: Root) -> dict[str, Any]:
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
