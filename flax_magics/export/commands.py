"""The lines that stand in the place of a command: one function for each."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ..cells.journal import Load, state_of
from . import linen, nnx
from .cells import MODELS, CommandSite
from .context import ScriptContext, ScriptModel
from .functions import CannotSay
from .values import name_of
from .writer import label_of

SESSION_VARIABLES = re.compile(r"flax_magics\.session\(\)\.models\[(['\"])(\w+)\1\]\.variables")
"""A model's variables, as messages write them."""

_ANY = "nnx.Rngs(params=0, dropout=1)"


def lines_of_command(context: ScriptContext, site: CommandSite, indices: Sequence[int]) -> list[str]:
    """The lines for `site`, whose runs are `indices`.

    Raises:
      CannotSay: it cannot be written.
    """
    context.assigned = set()
    if site.name not in LINES:
        raise CannotSay("what it does has no lines in a script")
    return LINES[site.name](context, site, indices)


def _nothing(context: ScriptContext, site: CommandSite, indices: Sequence[int]) -> list[str]:
    """A command that leaves the session as it was."""
    if site.target:
        raise CannotSay(f"its value is a report of %{site.name}")
    return []


def _key(context: ScriptContext, site: CommandSite, indices: Sequence[int]) -> list[str]:
    """`%flax_key`: shows the root key, restarts it, or draws from it."""
    writer, options, name = context.writer, site.given.options, site.given.rest
    if options["seed"] is not None:
        context.assigned.add(writer.root)
        return [writer.start(options["seed"])]
    if not name:
        return _nothing(context, site, indices)
    _check_history(context)
    context.assigned.add(writer.root)
    target = name_of(site.target)
    show = writer.show(f"key {name}", target or writer.key(name))
    if target and name not in ("params", "dropout"):
        return [f"{target} = {writer.fold(name)}  # stream {writer.text(name)}", *writer.draw(), *show]
    bind = [f"{site.target} {writer.key(name)}"] if site.target else []
    return [*writer.draw((name,)), *bind, *show]


def _run(context: ScriptContext, site: CommandSite, indices: Sequence[int]) -> list[str]:
    """`%flax_init` and `%flax_apply`."""
    _check_history(context)
    if not indices:
        # Another branch, say: what a line like it did elsewhere is what this one would do.
        alike = [i for i, run in enumerate(context.groups.runs) if run.made is None and site.matches(run)]
        if not alike or site.name == "flax_init":
            raise CannotSay("it never ran")
        indices = alike[-1:]
    name = context.groups.runs[indices[-1]].model or ""
    model = context.models.get(name)
    if model is None:
        raise CannotSay(f"the model `{name}` is not known any more")
    if any(run.spelling is not None and run.spelling.nnx is not model.holds for run in context.runs(indices)):
        raise CannotSay(f"`{name}` was a model of Flax's other API then")
    if site.name == "flax_init" or any(run.made is not None and not run.made.added for run in context.runs(indices)):
        context.lost.pop(name, None)
    if name in context.lost and site.given.options.get("variables") is None:
        raise CannotSay(context.lost[name])
    if site.name == "flax_init":
        return (nnx.build_again if model.holds else linen.init)(context, site, model, indices)
    return (nnx.apply if model.holds else linen.apply)(context, site, model, indices)


def _check_history(context: ScriptContext) -> None:
    if context.gone:
        raise CannotSay("the history of its run is gone: %flax_load brought another")


def _register(context: ScriptContext, site: CommandSite, indices: Sequence[int]) -> list[str]:
    """`%flaxmodel net = Net(8)`, and what a cell registers by itself."""
    writer = context.writer
    name, _, written = (part.strip() for part in site.given.rest.partition("="))
    lines: list[str] = []
    for registered in context.states if name == MODELS else (name,):
        model = context.models.get(registered)
        if model is None or model.name == registered or (model.holds and indices):
            continue
        if not model.holds:
            lines.append(f"{model.name} = {registered}()")
        elif context.states.get(registered) != "unchanged":
            lines.append(f"{model.name} = {nnx.with_rngs(f'{registered}()', _ANY)}")
        context.assigned.add(model.name)
    for index in indices:
        run = context.groups.runs[index]
        model = context.models[run.model or name]
        context.lost.pop(run.model or name, None)
        _, _, built = run.by_hand.partition(" = ")
        built = built.replace("params=params_key", f"params={writer.params}")
        built = built.replace("dropout=dropout_key", f"dropout={writer.dropout}")
        streams, taken = context.groups.folded_later(site)
        stays = context.groups.stays(site)
        context.assigned |= {writer.root, model.name}
        writer.needs.add("nnx")
        lines += [*writer.draw(streams, taken=taken, stay=stays), f"{model.name} = {built}"]
        lines += writer.show(label_of(f"{model.name} = {run.call}"), f"nnx.state({model.name})")
    if lines or name == MODELS or not written:
        return lines
    known = context.models.get(name)
    if known is not None and known.construction and "rngs" not in written:
        if context.states.get(name) == "unchanged":
            return []
        # An edit that kept the values: the keys do not matter, the streams do.
        writer.needs.add("nnx")
        written = nnx.with_rngs(written, _ANY)
    context.assigned.add(name)
    return [f"{name} = {written}"]


def _variables(context: ScriptContext, site: CommandSite, indices: Sequence[int]) -> list[str]:
    """`%flax_vars`: a model's variables as they are, or others in their place."""
    name, equals, value = (part.strip() for part in site.given.rest.partition("="))
    model = context.models.get(name)
    if model is None:
        raise CannotSay(f"the model `{name}` is not known any more")
    if model.holds:
        context.writer.needs.add("nnx")
    if equals:
        value = SESSION_VARIABLES.sub(lambda match: _held(context, match[2]), value)
        context.lost.pop(name, None)
        if model.holds:
            return [f"nnx.update({model.name}, {value})"]
        context.assigned.add(model.variables)
        return [f"{model.variables} = {value}"]
    variables = _held(context, name)
    return [f"{site.target} {variables}"] if site.target else []


def _held(context: ScriptContext, name: str) -> str:
    """The variables of a model as an expression.

    Raises:
      CannotSay: the script has not those of the session.
    """
    model = context.models.get(name)
    if model is None or name in context.lost:
        raise CannotSay(context.lost.get(name, f"the model `{name}` is not known any more"))
    return f"nnx.state({model.name})" if model.holds else model.variables


def _load(context: ScriptContext, site: CommandSite, indices: Sequence[int]) -> list[str]:
    """`%flax_load`: the variables of linen models out of the file, and the root key as it has it."""
    writer, load = context.writer, context.load
    if load is None:
        raise CannotSay("it stands inside of another statement")
    out: list[str] = []
    context.assigned.add(writer.root)
    for name in load.models:
        model = context.models.get(name)
        if model is None:
            continue
        reason = _why_not(load, name, model)
        if reason:
            context.lost[name] = f"the variables of `{name}` came from `{load.file}`, {reason}"
            out += [f"# Left out: {context.lost[name]}."]
            continue
        context.lost.pop(name, None)
        context.assigned.add(model.variables)
        writer.needs |= {"safetensors", "traverse_util"}
        tensors = writer.variable("tensors", "loaded_tensors")
        if not any("load_file(" in line for line in out):
            file = str(Path(load.file).expanduser()) if load.file.startswith("~") else load.file
            read = f"safetensors.flax.load_file({writer.text(file)})"
            out.append(f"{tensors} = traverse_util.unflatten_dict({read}, sep={writer.text('/')})")
        out.append(f"{model.variables} = {tensors}[{writer.text(name)}]")
    out.append(writer.start(load.seed))
    if load.draws:
        many = "a draw" if load.draws == 1 else f"{load.draws} draws"
        out += [f"# The session in the file had made {many}.", *writer.advance(load.draws)]
    return out


def _why_not(load: Load, name: str, model: ScriptModel) -> str:
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


LINES: Mapping[str, Callable[[ScriptContext, CommandSite, Sequence[int]], list[str]]] = {
    "flax_apply": _run,
    "flax_init": _run,
    "flax_key": _key,
    "flax_load": _load,
    "flax_vars": _variables,
    "flaxmodel": _register,
    **dict.fromkeys(
        (
            "help",
            "flax",
            "flax_doctor",
            "flax_export",
            "flax_free",
            "flax_history",
            "flax_replay",
            "flax_save",
            "flax_summary",
        ),
        _nothing,
    ),
}
"""What writes each command; another one is a comment with its reason."""
