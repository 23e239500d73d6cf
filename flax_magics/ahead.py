"""An initialisation that was traced when an edit was registered, kept for the init that follows.

An edited model is traced by shapes to tell what became of its variables. The next init of it would trace the same again.
Each trace is handed out once, so that what a model prints while it is traced it prints in every init.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from typing import Any

import jax

from .arguments import signature_of
from .compiling import settings
from .fingerprint import fingerprint
from .frozen import altered
from .library import library
from .models import Model, Path
from .structure import Structure
from .tracedinit import TracedInit, is_array

KEPT = 4
"""Traces kept at most, the oldest dropped first."""

_kept: OrderedDict[Hashable, TracedInit] = OrderedDict()


def keep(
    traced: TracedInit, model: Model, key: Any, method: Path, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """Keeps a trace, unless the model is not plain or the trace holds arrays, which would live as long as it."""
    identity = _identity(model, key, method, args, kwargs)
    if identity is None or traced.closed.consts or any(map(is_array, traced.leaves)):
        return
    _kept[identity] = altered(traced, {"inputs": ()})
    while len(_kept) > KEPT:
        _kept.popitem(last=False)


def take(model: Model, key: Any, method: Path, args: tuple[Any, ...], kwargs: dict[str, Any]) -> TracedInit | None:
    """The trace that was kept for such an init, over the arrays of this one."""
    if not _kept:
        return None
    traced = _kept.pop(_identity(model, key, method, args, kwargs), None)
    if traced is None:
        return None
    leaves = jax.tree_util.tree_leaves((args, kwargs))
    return altered(traced, {"inputs": tuple(leaf for leaf in leaves if is_array(leaf))})


def _identity(model: Model, key: Any, method: Path, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Hashable | None:
    """Equal ones trace the same; None where that cannot be told."""
    print_ = model.key()
    leaves, treedef = jax.tree_util.tree_flatten((args, kwargs))
    static = fingerprint([leaf for leaf in leaves if not is_array(leaf)])
    now, structure = settings(), Structure.of(treedef)
    if print_ is None or static is None or structure.contents is None:
        return None
    # Where the arrays are makes no difference to a trace.
    arrays = tuple(signature_of(leaf)[:3] if is_array(leaf) else None for leaf in leaves)
    return print_, method, structure, static, arrays, str(key.dtype), now, library.edition
