"""The lines that replace each command in a script: one function for each."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import numpy as np

from ..base.types import PyTree
from ..cells.journal import Load, state_of
from ..rng.keys import SPLIT
from . import losses, runs, steps, training
from .cells import MODELS
from .context import CommandLines, ScriptContext, ScriptModel
from .functions import CannotSay
from .mesh import mesh_lines
from .writer import draws, label_of

SESSION_VARIABLES = re.compile(r"flax_magics\.session\(\)\.models\[(['\"])(\w+)\1\]\.(variables|previous)\b")
"""The expressions that messages advise: for a model's variables, and for those that an init or an edit replaced."""


def _nothing(command: CommandLines) -> list[str]:
    """For commands that leave the session as it was. Raises CannotSay if the value is used."""
    if command.site.target:
        raise CannotSay(f"its value is a report of %{command.site.name}")
    return []


def _key(command: CommandLines) -> list[str]:
    """`%flax_key`: shows the root key (no lines), restarts it, or draws from it."""
    writer, options, site, name = command.writer, command.options, command.site, command.site.parsed.rest
    if options["seed"] is not None:
        command.context.assigned.add(writer.root)
        return [writer.start(options["seed"])]
    if not name:
        return _nothing(command)
    command.context.assigned.add(writer.root)
    show = writer.show(f"key {name}", command.target or writer.key(name))
    # The folded key is made from the root before it is split, so it can go straight to the user's name.
    if command.target and name not in SPLIT:
        return [writer.fold(name, command.target), *writer.draw(), *show]
    bind = [f"{site.target} {writer.key(name)}"] if site.target else []
    return [*writer.draw((name,)), *bind, *show]


def _run(command: CommandLines) -> list[str]:
    """`%flax_init`, `%flax_apply` and `%flax_grad`. Raises CannotSay where no lines reproduce its runs."""
    context, site = command.context, command.site
    if site.name == "flax_train":
        command = _of_training(command)
    if not command.indices:
        # A branch that was never taken: the runs of an equal line elsewhere show what it would do.
        alike = [i for i, run in enumerate(context.groups.runs) if run.made is None and site.matches(run)]
        if not alike or site.name == "flax_init":
            raise CannotSay("it never ran")
        command = CommandLines(context, site, alike[-1:])
    name, model = command.runs[-1].model or "", command.model
    if any(run.spelling is not None and run.spelling.nnx is not model.holds for run in command.runs):
        raise CannotSay(f"`{name}` was a model of Flax's other API then")
    goes_on = site.name == "flax_train" and command.options["resume"]
    aside: list[str] = []
    if site.name == "flax_init" or (command.initialising and not goes_on):
        aside = set_aside(context, name, [any(note.kind == "replaced" for note in run.notes) for run in command.runs])
        # New variables: what made the old ones impossible to write no longer matters.
        context.lost.pop(name, None)
        context.laid_out.discard(command.model.name)
    if name in context.lost and command.options.get("variables") is None:
        raise CannotSay(context.lost[name])
    if site.name == "flax_init":
        return [*aside, *(runs.init_nnx(command) if model.holds else runs.init_linen(command))]
    if site.name == "flax_train":
        return [*aside, *_train(command)]
    if site.name == "flax_grad":
        return [*aside, *(losses.grad_nnx(command) if model.holds else losses.grad_linen(command))]
    return [*aside, *(runs.apply_nnx(command) if model.holds else runs.apply_linen(command))]


def set_aside(context: ScriptContext, name: str, replaced: list[bool]) -> list[str]:
    """The line that keeps a model's variables before others take their place; none where no line asks for them.

    Args:
      replaced: for each run of a command whether it replaced variables that an init would not make again.
    """
    if name not in context.asked_back or name not in context.models or not any(replaced):
        return []
    model, reason = context.models[name], context.lost.get(name, "")
    context.aside[name] = reason or ("" if all(replaced) else "only some runs of a line replaced the variables")
    if context.aside[name]:
        return []
    kept = context.writer.variable(f"previous_{model.name if model.holds else model.variables}")
    context.assigned.add(kept)
    if not model.holds:
        return [f"{kept} = {model.variables}"]
    return [f"{kept} = jax.tree.map(lambda leaf: leaf, nnx.state({model.name}))"]


def _of_training(command: CommandLines) -> CommandLines:
    """The command with the run of the training that it begins, or that it goes on with."""
    context = command.context
    if not command.site.parsed.options["resume"]:
        return command
    index = context.going(command.site)
    if index is None:
        net = command.site.model
        reason = context.lost.get(net, "it goes on with a training that has no lines")
        context.lost.setdefault(net, f"the weights of `{net}` come from a training that has no lines")
        raise CannotSay(reason)
    return CommandLines(context, command.site, [index])


def _train(command: CommandLines) -> list[str]:
    """`%flax_train`: the next part of its training."""
    written, index = command.context.trained, command.indices[-1]
    part = training.parts_of(command.runs[-1])[written.get(index, 0)]
    if part.facts is not None and not part.is_last:
        command = CommandLines(command.context, command.site, command.indices, part.facts)
    lines = steps.train_nnx(command, part) if command.model.holds else steps.train_linen(command, part)
    written[index] = written.get(index, 0) + 1
    trained, net = command.context.groups.runs[index].trained, command.model.name
    if trained is not None and "is not finite" in trained.stopped:
        # `.previous` may have the weights from before it since.
        command.context.aside[net] = f"a training of `{net}` that was not finite may have replaced them, too"
    return lines


def _register(command: CommandLines) -> list[str]:
    """`%flaxmodel net = Net(8)`, and the models that a `%%flaxmodel` cell registers by itself."""
    lines, context = _registered(command), command.context
    for name in sorted(context.restored & context.waiting.keys()):
        lines += context.waiting.pop(name)
    return lines


def _registered(command: CommandLines) -> list[str]:
    """The lines of `_register`, without those that put a file's variables into the modules."""
    context, writer, site = command.context, command.writer, command.site
    name, _, written = (part.strip() for part in site.parsed.rest.partition("="))
    context.apart -= {context.models[each].name for each in context.states if each in context.models}
    lines: list[str] = []
    for registered in context.states if name == MODELS else (name,):
        # Nothing to write for a name that the cell binds itself; a model that the session built has a run, below.
        model = context.models.get(registered)
        if model is None or model.name == registered or (model.holds and command.runs):
            continue
        if not model.holds:
            lines.append(f"{model.name} = {registered}()")
        elif context.states.get(registered) != "unchanged":
            lines.append(f"{model.name} = {runs.with_rngs(f'{registered}()')}")
        context.assigned.add(model.name)
    for run in command.runs:
        model = context.models[run.model or name]
        context.lost.pop(run.model or name, None)
        context.laid_out.discard(model.name)
        context.assigned |= {writer.root, model.name}
        lines += command.draw_of_init(*SPLIT)
        lines.append(f"{model.name} = {runs.construction_of(run, writer.params, writer.dropout)}")
        lines += writer.show(label_of(f"{model.name} = {run.call}"), f"nnx.state({model.name})")
    if lines or name == MODELS or not written:
        return lines
    known = context.models.get(name)
    if known is not None and known.construction and "rngs" not in written:
        if context.gone:
            context.lost[name] = "the history of its draw is gone: %flax_load brought another"
        if context.states.get(name) == "unchanged":
            return []
        # An edit after which the old values were kept: any keys will do, but the same streams must be there.
        written = runs.with_rngs(written)
    context.assigned.add(name)
    return [f"{name} = {written}"]


def _variables(command: CommandLines) -> list[str]:
    """`%flax_vars`: returns a model's variables, or puts others in their place."""
    context, site = command.context, command.site
    name, equals, value = (part.strip() for part in site.parsed.rest.partition("="))
    model = context.model(name)
    if not equals:
        variables = _variables_of(context, name)
        if model.holds:  # of its own, as the session gave it: later runs write into the module's
            variables = f"nnx.state(nnx.clone({model.name}))"
        return [f"{site.target} {variables}"] if site.target else []
    of = {"variables": _variables_of, "previous": _previous_of}
    value = SESSION_VARIABLES.sub(lambda match: of[match[3]](context, match[2]), value)
    context.lost.pop(name, None)
    context.laid_out.discard(model.name)
    if model.holds:
        return [f"nnx.update({model.name}, {value})"]
    context.assigned.add(model.variables)
    return [f"{model.variables} = {value}"]


def _variables_of(context: ScriptContext, name: str) -> str:
    """A model's variables, as an expression.

    Raises:
      CannotSay: the script could not reproduce them.
    """
    if name in context.lost:
        raise CannotSay(context.lost[name])
    model = context.model(name)
    return f"nnx.state({model.name})" if model.holds else model.variables


def _previous_of(context: ScriptContext, name: str) -> str:
    """The variables of a model that were replaced last, as an expression.

    Raises:
      CannotSay: the script has not kept them.
    """
    reason = context.aside.get(name, "no line of the script has replaced the variables that it takes")
    if reason:
        raise CannotSay(reason)
    model = context.model(name)
    return context.writer.variable(f"previous_{model.name if model.holds else model.variables}")


def _load(command: CommandLines) -> list[str]:
    """`%flax_load`: reads linen variables from the file, and sets the root key to where it stood there."""
    context, writer, load = command.context, command.writer, command.context.load
    if load is None:
        raise CannotSay("it stands inside of another statement")
    lines: list[str] = []
    context.assigned.add(writer.root)
    context.trained.clear()  # the history is another
    context.laid_out.clear()
    for name in (name for name in load.models if name in context.models):
        model = context.models[name]
        reason = _why_unreadable(load, name, model)
        if reason:
            context.lost[name] = f"the variables of `{name}` came from `{load.file}`, {reason}"
            lines.append(f"# Left out: {context.lost[name]}.")
            continue
        context.lost.pop(name, None)
        tensors = writer.variable("tensors", "loaded_tensors")
        # One reading serves all models of the file.
        if not any("load_file(" in line for line in lines):
            file = str(Path(load.file).expanduser()) if load.file.startswith("~") else load.file
            read = f"safetensors.flax.load_file({writer.text(file)})"
            lines.append(f"{tensors} = traverse_util.unflatten_dict({read}, sep={writer.text('/')})")
        arrays = f"{tensors}[{writer.text(name)}]"
        if not model.holds:
            context.assigned.add(model.variables)
            lines.append(f"{model.variables} = {arrays}")
        elif model.name in context.names.bound:
            lines += _into_module(command, model, arrays)
        else:
            context.waiting[name] = _into_module(command, model, arrays)
        trained = training.resumed_of(context.groups.runs, name, load.trained.get(name))
        if trained is not None:
            index, context.trained[index] = trained[0], trained[1]
            context.saved[index] = f"{tensors}[{writer.text(f'{name} trained with')}]"
    lines.append(writer.start(load.seed))
    if load.draws:
        goes_on = context.groups.goes_on(load)
        more = "; the next run takes the other keys of the last" if goes_on else ""
        lines.append(f"# The session in the file had made {draws(load.draws)}{more}.")
        lines += writer.advance(load.draws - goes_on) if load.draws > goes_on else []
    return lines


def _into_module(command: CommandLines, model: ScriptModel, arrays: str) -> list[str]:
    """The lines that put a file's `arrays` into an NNX module."""
    values, kinds = command.writer.variable("loaded", "loaded_values"), [f"nnx.{kind}" for kind in model.loaded]
    return command.writer.rendered("calls", "nnx_loaded", model.name, values, arrays, kinds)


def _why_unreadable(load: Load, name: str, model: ScriptModel) -> str:
    """Why plain lines cannot read a model's variables from the file, as a relative clause; empty where they can."""
    # The file was written to since: what it has now need not be what was loaded.
    if state_of(load.file) != load.state:
        return "which is not the file any more that it was"
    # `history` is the name of an array of the file's own.
    tree = model.loaded
    if tree is None:
        return "and were dropped since: nothing tells whether plain lines can read them"
    if model.holds:  # a path is one name, with a `/` between its steps
        tree = {
            kind: {path.replace("/", "."): value for path, value in values.items()} for kind, values in tree.items()
        }
    if name == "history" or not _is_plain(tree) or (model.holds and not tree.keys() <= _KINDS):
        return "and have leaves or names that plain lines do not read"
    return ""


def _is_plain(tree: PyTree) -> bool:
    """Whether a tree has only arrays of plain numbers, under names that can be joined by `/`."""
    if isinstance(tree, Mapping):
        names = all(type(name) is str and name and "/" not in name for name in tree)
        return bool(tree) and names and all(map(_is_plain, tree.values()))
    return isinstance(tree, (jax.Array, np.ndarray)) and not jax.dtypes.issubdtype(tree.dtype, jax.dtypes.extended)


_KINDS = {"Param", "BatchStat", "Cache"}
"""Types of variables that `nnx` has under these names."""
_WITHOUT_LINES = ("help", "flax", "flax_doctor", "flax_export", "flax_free", "flax_history", "flax_replay", "flax_save")
LINES: Mapping[str, Callable[[CommandLines], list[str]]] = {
    **dict.fromkeys((*_WITHOUT_LINES, "flax_summary"), _nothing),
    "flax_apply": _run,
    "flax_grad": _run,
    "flax_init": _run,
    "flax_key": _key,
    "flax_load": _load,
    "flax_train": _run,
    "flax_vars": _variables,
    "flax_mesh": mesh_lines,
    "flaxmodel": _register,
}
"""Command → the function that writes its lines or raises CannotSay; any other command becomes a comment."""
