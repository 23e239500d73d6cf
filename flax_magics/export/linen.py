"""Runs of linen models: init, the jitted apply, what it keeps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..run import MODULE, ExportFacts, Run
from .context import CommandLines
from .functions import CannotSay, JittedFunction, SplitArguments, as_written, split
from .writer import LineWriter, call, indented, label_of

Keys = Mapping[str, str]
"""Stream, or argument that is given a key of the draw (`--key`) → the variable that holds its key."""


def init(command: CommandLines) -> list[str]:
    """The lines of `%flax_init`."""
    context, writer, model, site = command.context, command.writer, command.model, command.site
    if command.options["draw"] is not None:
        lines, _, params = command.replayed_keys(("params",))
    else:
        params = writer.params
        if context.groups.stays(site):
            lines = [writer.STAYS, *writer.keys_of(writer.root, ("params",), writer.key)]
        else:
            lines = command.draw_of_init()
        context.assigned |= {writer.root, params, writer.dropout}
    before, items = _init_items(command, command.runs[-1].spelling or ExportFacts(), {}, params)
    assigned = f"{command.target} = " if command.target and command.target != model.variables else ""
    lines.append(call(f"{assigned}{model.variables} = {before}", items))
    if site.target and not command.target:
        lines.append(f"{site.target} {model.variables}")
    context.assigned.add(model.variables)
    lines += _keep_first_key(command, params)
    return [*lines, *writer.show(label_of(call(f"{model.name}.init(", items[1:])), model.variables)]


def apply(command: CommandLines) -> list[str]:
    """The lines of `%flax_apply`.

    Raises:
      CannotSay: its runs were not alike.
    """
    writer, model, options, facts = command.writer, command.model, command.options, command.facts
    lines, key, params = command.keys()
    keys = {stream: key(stream) for stream in (*facts.streams, *options["key"])}
    variables = options["variables"] or model.variables
    lines += _init_lines(command, keys, params)
    if options["eager"]:
        value = call(*_apply_items(command, keys, as_written(command.call.arguments), variables))
    else:
        jitted, arguments = _function(command, tuple(keys))
        passed = list(keys.values())
        if options["draws"] is not None and keys:
            writer.needs.add("jnp")
            passed = [f"jnp.stack({name})" for name in passed]
        function = command.context.define(jitted, command.site)
        value = call(f"{function}(", [variables, *_with_keys(arguments.outside, passed)])
    mutable = _mutable(command)
    keeps = options["variables"] is None and options["draw"] is None and options["draws"] is None
    kept = [name for name in facts.kept if name in mutable] if keeps else []
    if kept:
        command.context.assigned.add(model.variables)
    parts = "parts" in facts.returns
    if not mutable:
        return [*lines, *command.value_lines(value, parts=parts)]
    if not options["mutable"]:
        updates = writer.variable("updates", "new_values") if kept else "_"
        after = _merged(command, kept, updates)
        return [*lines, *command.value_lines(value, after=after, parts=parts, updates=updates)]
    # The cell gets (output, updates), with the collections in them that it asked for.
    asked = [name for name in options["mutable"] if name in facts.mutable]
    pair = len(command.targets) == 2
    if set(asked) == set(mutable) and (command.target or pair or not kept):
        updates = command.targets[1] if pair else f"{command.target}[1]"
        return [*lines, *command.value_lines(value, after=_merged(command, kept, updates), parts=pair)]
    output, updates = command.output, writer.variable("updates", "new_values")
    lines += [f"{output}, {updates} = {value}", *_merged(command, kept, updates)]
    return [*lines, *command.pair_lines(f"{{{_picked(writer, asked, updates)}}}")]


def _function(command: CommandLines, streams: Sequence[str]) -> tuple[JittedFunction, SplitArguments]:
    """The jitted function for a run, and what it is called with besides variables and keys."""
    writer, name, draws = command.writer, command.model.name, command.options["draws"]
    keys = {stream: f"{stream}_key" for stream in streams}
    one = list(keys.values())
    many = one if draws is None else [f"{key}s" for key in one]
    arguments = split(writer, command.call, command.facts, ("jax", name, "variables", *one, *many))
    value = call(*_apply_items(command, keys, arguments.inside, "variables"))
    body = [f"return {value}"]
    if draws is not None and one:
        mapped = f"return jax.vmap(one_draw)({', '.join(many)})"
        body = [f"def one_draw({', '.join(one)}):", f"{writer.unit}return {value}", "", mapped]
    elif draws is not None:
        body = [f"return jax.vmap(lambda: {value}, axis_size={draws})()"]
    elif command.facts.axes:
        # Around a model that names a mapped axis: the axis with one element, which stands for this device.
        mapped = "one_device"
        for axis in sorted(command.facts.axes):
            mapped = f"jax.vmap({mapped}, axis_name={writer.text(axis)}, axis_size=1)"
        first = ", ".join("0" for _ in command.facts.axes)
        body = ["def one_device():", f"{writer.unit}return {value}", "", f"outputs = {mapped}()"]
        body.append(f"return jax.tree.map(lambda leaf: leaf[{first}], outputs)")
    writer.needs.add("jax")
    parameters = ("variables", *_with_keys(arguments.parameters, many))
    return command.jitted("jax.jit", parameters, arguments.static, body), arguments


def _with_keys(arguments: Sequence[str], keys: Sequence[str]) -> list[str]:
    """Arguments of the call, or parameters for them, with the keys: before them where one is starred."""
    starred = any(argument.startswith("*") for argument in arguments)
    return [*keys, *arguments] if starred else [*arguments, *keys]


def _init_items(command: CommandLines, facts: ExportFacts, keys: Keys, key: str) -> tuple[str, list[str]]:
    """`net.init(` and its arguments, for the init that is part of a run (or is the run)."""
    writer = command.writer
    if facts.init_streams:
        key = "{" + ", ".join(f"{writer.text(stream)}: {key}" for stream in ("params", *facts.init_streams)) + "}"
    items = [key, *as_written(command.call.arguments), *(f"{name}={value}" for name, value in facts.init_arguments)]
    return f"{_module(command, facts.init_module)}.init(", [*items, *_keys_passed(command, keys), *_method(command)]


def _apply_items(command: CommandLines, keys: Keys, arguments: Sequence[str], variables: str) -> tuple[str, list[str]]:
    """`net.apply(` and its arguments, `arguments` being those of the call."""
    writer, facts, mutable = command.writer, command.facts, _mutable(command)
    items = [variables, *arguments, *(f"{name}={value}" for name, value in facts.arguments)]
    items += _keys_passed(command, keys)
    if facts.streams:
        rngs = ", ".join(f"{writer.text(stream)}: {keys[stream]}" for stream in facts.streams)
        items.append(f"rngs={{{rngs}}}")
    if mutable:
        items.append(f"mutable=[{', '.join(map(writer.text, mutable))}]")
    return f"{_module(command, facts.module)}.apply(", [*items, *_method(command)]


def _keys_passed(command: CommandLines, keys: Keys) -> list[str]:
    return [f"{name}={keys[name]}" for name in command.options.get("key") or ()]


def _mutable(command: CommandLines) -> list[str]:
    return sorted({*command.facts.mutable, *command.options["mutable"]})


def _module(command: CommandLines, expression: str) -> str:
    if "dataclasses.replace(" in expression:
        command.writer.needs.add("dataclasses")
    return expression.replace(MODULE, command.model.name)


def _method(command: CommandLines) -> list[str]:
    method = command.call.method
    if not method:
        return []
    if len(method) == 1 and hasattr(type(command.model.module), method[0]):
        return [f"method={command.writer.text(method[0])}"]
    return [f"method=lambda module, *args, **kwargs: module.{'.'.join(method)}(*args, **kwargs)"]


def _merged(command: CommandLines, kept: Sequence[str], updates: str) -> list[str]:
    """The line that puts what a run wrote, `updates`, into the variables."""
    if not kept:
        return []
    variables = command.model.variables
    whole = set(kept) == set(_mutable(command))
    new = f"**{updates}" if whole else _picked(command.writer, kept, updates)
    return [f"{variables} = {{**{variables}, {new}}}"]


def _picked(writer: LineWriter, names: Sequence[str], updates: str) -> str:
    return ", ".join(f"{writer.text(name)}: {updates}[{writer.text(name)}]" for name in names)


def _init_lines(command: CommandLines, keys: Keys, params: str) -> list[str]:
    """The init that is part of a run, or what a method adds to the variables."""
    context, writer, model = command.context, command.writer, command.model

    def init_of(run: Run, key: str) -> tuple[str, list[str]]:
        context.assigned.add(model.variables)
        return _init_items(command, run.spelling or command.facts, keys, key)

    lines: list[str] = []
    if command.initialising:
        before, items = init_of(command.initialising[0], params)
        lines = [call(f"{model.variables} = {before}", items), *_keep_first_key(command, params)]
        if context.is_conditional(command.site):
            lines = [f"if {model.variables} is None:", *indented(lines, writer.unit)]
    adding = [run for run in command.runs if run.made is not None and run.made.added]
    if adding:
        if command.site.path and len(adding) < len(command.runs):
            raise CannotSay("its first run added variables to those that were there, and the others did not")
        writer.needs.add("traverse_util")
        flat = writer.variable("flat_variables")
        before, items = init_of(adding[0], model.first_key or params)
        lines.append(call(f"{flat} = traverse_util.flatten_dict({before}", items, "))"))
        lines.append(f"{flat}.update(traverse_util.flatten_dict({model.variables}))")
        lines.append(f"{model.variables} = traverse_util.unflatten_dict({flat})")
    return lines


def _keep_first_key(command: CommandLines, params: str) -> list[str]:
    """The line that keeps the key of the first init, where a method adds variables later."""
    if not command.model.first_key:
        return []
    command.context.assigned.add(command.model.first_key)
    return [f"{command.model.first_key} = {params}"]
