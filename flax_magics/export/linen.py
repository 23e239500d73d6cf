"""Runs of linen models: init, the jitted apply, what it keeps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..line.call import CallExpression
from ..run import MODULE, ExportFacts, Run
from . import values
from .cells import CommandSite
from .context import ScriptContext, ScriptModel, common
from .functions import CannotSay, JittedFunction, SplitArguments, as_written, split, verb_of
from .values import lines_of, lines_of_pair, merged, name_of, names_of
from .writer import LineWriter, call, indented, label_of


@dataclass(frozen=True)
class LinenCall:
    """A linen run: what is called, with which keys.

    Attributes:
      model: the name of the module in the script.
      module: the module itself, as it is registered now.
      variables: the expression for the variables.
      keys: stream → the variable that holds its key.
      arguments: arguments that are given a key of the draw (`--key`), which `keys` has too.
      mutable: collections.
    """

    model: str
    module: Any
    call: CallExpression
    spelling: ExportFacts
    variables: str
    keys: Mapping[str, str]
    arguments: tuple[str, ...]
    mutable: tuple[str, ...]


def init_items(writer: LineWriter, called: LinenCall, key: str) -> tuple[str, list[str]]:
    """`net.init(` and its arguments, for the init that is part of a run (or is the run)."""
    spelling = called.spelling
    extra = [f"{name}={value}" for name, value in spelling.init_arguments]
    extra += [f"{name}={called.keys[name]}" for name in called.arguments]
    model = _module(writer, called.model, spelling.init_module)
    if spelling.init_streams:
        key = "{" + ", ".join(f"{writer.text(stream)}: {key}" for stream in ("params", *spelling.init_streams)) + "}"
    items = [key, *as_written(called.call.arguments), *extra, *_method(writer, called)]
    return f"{model}.init(", items


def apply_items(writer: LineWriter, called: LinenCall, given: Sequence[str], variables: str) -> tuple[str, list[str]]:
    """`net.apply(` and its arguments, `given` being those of the call."""
    spelling = called.spelling
    model = _module(writer, called.model, spelling.module)
    items = [variables, *given, *(f"{name}={value}" for name, value in spelling.arguments)]
    items += [f"{name}={called.keys[name]}" for name in called.arguments]
    if spelling.streams:
        rngs = ", ".join(f"{writer.text(stream)}: {called.keys[stream]}" for stream in spelling.streams)
        items.append(f"rngs={{{rngs}}}")
    if called.mutable:
        items.append(f"mutable={writer.texts(called.mutable)}")
    return f"{model}.apply(", [*items, *_method(writer, called)]


def function(
    writer: LineWriter, called: LinenCall, mode: str, several: bool, draws: int | None
) -> tuple[JittedFunction, SplitArguments]:
    """The jitted function for a run, and what it is called with besides variables and keys.

    Args:
      several: other models have functions too, so that this one's name says whose it is.
      draws: it is mapped over that many keys.
    """
    called = replace(called, keys={stream: f"{stream}_key" for stream in called.keys})
    keys = list(called.keys.values())
    many = keys if draws is None else [f"{key}s" for key in keys]
    used = ("jax", called.model, "variables", *keys, *many)
    arguments = split(writer, called.call, called.spelling, used)
    before, items = apply_items(writer, called, arguments.inside, "variables")
    parameters = ("variables", *many, *arguments.parameters)
    if not any(name.startswith("*") for name in arguments.parameters):
        parameters = ("variables", *arguments.parameters, *many)
    if draws is not None:
        body = _mapped(writer, before, items, keys, draws)
    elif called.spelling.axes:
        body = _bound(writer, before, items, called.spelling.axes)
    else:
        body = [call(f"return {before}", items)]
    verb = verb_of(mode, called.call.method) + ("" if draws is None else "_draws")
    names = (f"{verb}_{called.model}",) if several else (verb, f"{verb}_{called.model}")
    writer.needs.add("jax")
    return JittedFunction(called.model, names, "jax.jit", parameters, arguments.static, tuple(body)), arguments


def _mapped(writer: LineWriter, before: str, items: list[str], keys: list[str], draws: int) -> list[str]:
    body = [call(f"return {before}", items)]
    if not keys:
        return [f"return jax.vmap(lambda: {call(before, items)}, axis_size={draws})()"]
    inner = [f"def one_draw({', '.join(keys)}):", *(writer.unit + line for line in body)]
    return [*inner, "", f"return jax.vmap(one_draw)({', '.join(f'{key}s' for key in keys)})"]


def _bound(writer: LineWriter, before: str, items: list[str], axes: Sequence[str]) -> list[str]:
    """Around a model that names a mapped axis: the axis with one element, which stands for this device."""
    lines = ["def one_device():", writer.unit + call(f"return {before}", items), ""]
    mapped = "one_device"
    for axis in sorted(axes):
        mapped = f"jax.vmap({mapped}, axis_name={writer.text(axis)}, axis_size=1)"
    first = ", ".join("0" for _ in axes)
    return [*lines, f"outputs = {mapped}()", f"return jax.tree.map(lambda leaf: leaf[{first}], outputs)"]


def _module(writer: LineWriter, name: str, module: str) -> str:
    text = module.replace(MODULE, name)
    if "dataclasses.replace(" in text:
        writer.needs.add("dataclasses")
    return text


def _method(writer: LineWriter, called: LinenCall) -> list[str]:
    method = called.call.method
    if not method:
        return []
    if len(method) == 1 and hasattr(type(called.module), method[0]):
        return [f"method={writer.text(method[0])}"]
    return [f"method=lambda module, *args, **kwargs: module.{'.'.join(method)}(*args, **kwargs)"]


def init(context: ScriptContext, site: CommandSite, model: ScriptModel, indices: Sequence[int]) -> list[str]:
    """The lines of `%flax_init`."""
    writer, run = context.writer, context.groups.runs[indices[-1]]
    assert site.call is not None
    spelling = run.spelling or ExportFacts()
    called = _called(context, site, model, spelling, lambda s: s)
    if site.given.options["draw"] is not None:
        lines, _, params = values.replayed(context, indices, ("params",), False)
    else:
        streams, taken = context.groups.folded_later(site)
        params = writer.params
        if context.groups.stays(site):
            lines = [writer.STAYS, *writer.keys_of(writer.root, ("params",), writer.key)]
        else:
            lines = writer.draw(streams, taken=taken)
        context.assigned |= {writer.root, params, writer.dropout}
    before, items = init_items(writer, called, params)
    target = name_of(site.target)
    left = f"{target} = " if target and target != model.variables else ""
    lines.append(call(f"{left}{model.variables} = {before}", items))
    if site.target and not target:
        lines.append(f"{site.target} {model.variables}")
    context.assigned.add(model.variables)
    lines += _keep_first(context, model, params)
    return [*lines, *writer.show(label_of(call(f"{model.name}.init(", items[1:])), model.variables)]


def apply(context: ScriptContext, site: CommandSite, model: ScriptModel, indices: Sequence[int]) -> list[str]:
    """The lines of `%flax_apply`.

    Raises:
      CannotSay: its runs were not alike.
    """
    writer, options = context.writer, site.given.options
    assert site.call is not None
    runs, size = context.runs(indices), options["draws"]
    spelling = common(runs)
    lines, key, params = values.keys_of_run(context, site, indices, spelling)
    called = _called(context, site, model, spelling, key)
    lines += _made(context, site, model, called, runs, params)
    if options["eager"]:
        value = call(*apply_items(writer, called, as_written(called.call.arguments), called.variables))
    else:
        jitted, arguments = function(writer, called, site.mode, context.several, size)
        keys = list(called.keys.values())
        if size is not None and keys:
            writer.needs.add("jnp")
            keys = [f"jnp.stack({name})" for name in keys]
        starred = any(name.startswith("*") for name in arguments.parameters)
        items = [*keys, *arguments.outside] if starred else [*arguments.outside, *keys]
        value = call(f"{context.define(jitted, site)}(", [called.variables, *items])
    keeps = options["variables"] is None and options["draw"] is None and size is None
    kept = tuple(name for name in spelling.kept if name in called.mutable) if keeps else ()
    if kept:
        context.assigned.add(model.variables)
    label = label_of(site.call.call, site.mode)
    parts = "parts" in spelling.returns
    if not called.mutable:
        return [*lines, *lines_of(writer, site.target, label, value, parts=parts)]
    if options["mutable"]:
        given = tuple(name for name in options["mutable"] if name in spelling.mutable)
        return [*lines, *_with_updates(writer, site.target, label, value, called, given=given, kept=kept)]
    updates = writer.variable("updates", "new_values") if kept else "_"
    after = merged(writer, model.variables, kept, called.mutable, updates)
    return [*lines, *lines_of_pair(writer, site.target, label, value, updates, after=after, parts=parts)]


def _with_updates(
    writer: LineWriter,
    target: str,
    label: str,
    value: str,
    called: LinenCall,
    *,
    given: Sequence[str],
    kept: Sequence[str],
) -> list[str]:
    """The lines for a run that gives `(output, updates)`, with the collections `given` in the updates."""
    variables = called.variables
    name, names = name_of(target), names_of(target)
    pair = names if len(names) == 2 else []
    if set(given) == set(called.mutable) and (name or pair or not kept):
        updates = pair[1] if pair else f"{name}[1]"
        after = merged(writer, variables, kept, called.mutable, updates)
        return lines_of(writer, target, label, value, after=after, parts=bool(pair))
    output = pair[0] if pair else writer.variable("output", "result")
    updates = writer.variable("updates", "new_values")
    after = merged(writer, variables, kept, called.mutable, updates)
    picked = ", ".join(f"{writer.text(name)}: {updates}[{writer.text(name)}]" for name in given)
    lines = [f"{output}, {updates} = {value}", *after]
    if pair:
        return [*lines, f"{pair[1]} = {{{picked}}}", *writer.show(label, f"({', '.join(pair)})")]
    return [*lines, *lines_of(writer, target, label, f"({output}, {{{picked}}})")]


def _called(
    context: ScriptContext, site: CommandSite, model: ScriptModel, spelling: ExportFacts, key: Callable[[str], str]
) -> LinenCall:
    assert site.call is not None
    options = site.given.options
    given = options.get("variables")
    arguments = tuple(options.get("key") or ())
    return LinenCall(
        model.name,
        model.module,
        site.call,
        spelling,
        given or model.variables,
        {stream: key(stream) for stream in (*spelling.streams, *arguments)},
        arguments,
        tuple(sorted({*spelling.mutable, *(options.get("mutable") or ())})),
    )


def _made(
    context: ScriptContext, site: CommandSite, model: ScriptModel, called: LinenCall, runs: Sequence[Run], params: str
) -> list[str]:
    """The init that is part of a run, or what a method adds to the variables."""
    writer = context.writer
    made = [run for run in runs if run.made is not None and not run.made.added]
    added = [run for run in runs if run.made is not None and run.made.added]
    lines: list[str] = []
    if made:
        context.assigned.add(model.variables)
        first = replace(called, spelling=made[0].spelling or called.spelling)
        before, items = init_items(writer, first, params)
        if context.is_conditional(site):
            inner = [call(f"{model.variables} = {before}", items), *_keep_first(context, model, params)]
            lines += [f"if {model.variables} is None:", *indented(inner, writer.unit)]
        else:
            lines += [call(f"{model.variables} = {before}", items), *_keep_first(context, model, params)]
    if added:
        if site.path and len(added) < len(runs):
            raise CannotSay("its first run added variables to those that were there, and the others did not")
        context.assigned.add(model.variables)
        writer.needs.add("traverse_util")
        flat = writer.variable("flat_variables")
        first = replace(called, spelling=added[0].spelling or called.spelling)
        before, items = init_items(writer, first, model.first_key or params)
        lines.append(call(f"{flat} = traverse_util.flatten_dict({before}", items, "))"))
        lines.append(f"{flat}.update(traverse_util.flatten_dict({model.variables}))")
        lines.append(f"{model.variables} = traverse_util.unflatten_dict({flat})")
    return lines


def _keep_first(context: ScriptContext, model: ScriptModel, params: str) -> list[str]:
    """The line that keeps the key of the first init, where a method adds variables later."""
    if not model.first_key:
        return []
    context.assigned.add(model.first_key)
    return [f"{model.first_key} = {params}"]
