"""The lines of `%flax_load`: arrays out of the file, which needs no flax_magics to be read, and the root key."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ..journal import Load, state_of
from .page import CannotSay, Model, Page


def lines(page: Page) -> list[str]:
    """The lines that read the variables of linen models, and bring the root key to where the file has it.

    Variables that have no lines are noted in `Page.lost`.
    """
    scribe, load = page.scribe, page.load
    if load is None:
        raise CannotSay("it stands inside of another statement")
    out: list[str] = []
    page.assigned = {scribe.root}
    for name in load.models:
        model = page.models.get(name)
        if model is None:
            continue
        reason = _why_not(load, name, model)
        if reason:
            page.lost[name] = f"the variables of `{name}` came from `{load.file}`, {reason}"
            out += [f"# Left out: {page.lost[name]}."]
            continue
        page.lost.pop(name, None)
        page.assigned.add(model.variables)
        scribe.needs |= {"load_file", "traverse_util"}
        tensors = scribe.variable("tensors", "loaded_tensors")
        if not any("load_file(" in line for line in out):
            file = str(Path(load.file).expanduser()) if load.file.startswith("~") else load.file
            read = f"load_file({scribe.text(file)})"
            out.append(f"{tensors} = traverse_util.unflatten_dict({read}, sep={scribe.text('/')})")
        out.append(f"{model.variables} = {tensors}[{scribe.text(name)}]")
    out.append(scribe.start(load.seed))
    if load.draws:
        many = "a draw" if load.draws == 1 else f"{load.draws} draws"
        out += [f"# The session in the file had made {many}.", *scribe.advance(load.draws)]
    return out


def _why_not(load: Load, name: str, model: Model) -> str:
    """Why the variables cannot be read by plain lines; empty where they can."""
    if model.holds:
        return "and those of an NNX model have no lines yet"
    if state_of(load.file) != load.state:
        return "which is not the file any more that it was"
    if name == "history" or not _is_plain(model.loaded):
        return "and have leaves or names that plain lines do not read"
    return ""


def _is_plain(tree: Any) -> bool:
    """Whether names joined by `/` and arrays of plain numbers are all that there is."""
    if isinstance(tree, Mapping):
        return bool(tree) and all(
            type(key) is str and key and "/" not in key and _is_plain(inner) for key, inner in tree.items()
        )
    if not isinstance(tree, (jax.Array, np.ndarray)):
        return False
    return not jax.dtypes.issubdtype(tree.dtype, jax.dtypes.extended)
