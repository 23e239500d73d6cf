"""Runs of NNX models: the module built, its streams replaced, its mode set, the jitted call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..run import MODULE, Run
from .cells import is_build
from .context import CommandLines, KeyNames
from .functions import CannotSay, JittedFunction, SplitArguments, as_written, split
from .writer import LineWriter, call, indented, label_of


def with_rngs(construction: str, rngs: str = "nnx.Rngs(params=0, dropout=1)") -> str:
    """`Net(8, 3)` with the argument that it lacks; by itself any streams, whose keys do not matter."""
    inside = construction.rstrip().removesuffix(")").rstrip().rstrip(",")
    return f"{inside}{'' if inside.endswith('(') else ', '}rngs={rngs})"


def construction_of(run: Run, params: str, dropout: str) -> str:
    """How the module of an init was built, with these keys."""
    built = run.by_hand.partition(" = ")[2]
    return built.replace("params=params_key", f"params={params}").replace("dropout=dropout_key", f"dropout={dropout}")


def build_again(command: CommandLines) -> list[str]:
    """The lines of `%flax_init`: the same construction with other keys, into the same object."""
    context, writer, site = command.context, command.writer, command.site
    if command.options["draw"] is not None:
        lines, key, params = command.replayed_keys(("params", "dropout"))
        dropout = key("dropout")
    else:
        lines = command.draw_of_init()
        params, dropout = writer.params, writer.dropout
        context.assigned |= {writer.root, params, dropout}
    lines += _rebuilt(command, command.runs[-1], params, dropout)
    state = f"nnx.state({command.model.name})"
    bind = [f"{site.target} {state}"] if site.target else []
    return [*lines, *bind, *writer.show(label_of(f"init {command.call.call}"), state)]


def _rebuilt(command: CommandLines, run: Run, params: str, dropout: str) -> list[str]:
    """A module's own objects get the values of one that is built anew."""
    command.writer.needs.add("nnx")
    return [f"nnx.update({command.model.name}, nnx.state({construction_of(run, params, dropout)}))"]


def apply(command: CommandLines) -> list[str]:
    """The lines of `%flax_apply`.

    Raises:
      CannotSay: its runs were not alike, or an option has no lines.
    """
    writer, model, options, facts = command.writer, command.model.name, command.options, command.facts
    many = options["draws"] is not None
    lines, key, params = command.keys()
    if command.initialising:
        lines += _rebuilt(command, _build_before(command), params, key("dropout"))
    if many and options["mutable"]:
        raise CannotSay("--mutable of many draws of an NNX model at once has no lines yet")
    keeps = options["variables"] is None and options["draw"] is None
    module = model
    if options["variables"] is not None or (not many and (not keeps or (facts.mode and facts.mode.back is None))):
        # A run that keeps nothing has a copy, with other variables where some are given.
        module = writer.variable(f"{model}_copy")
        writer.needs.add("nnx")
        lines.append(f"{module} = nnx.clone({model})")
        lines += [] if options["variables"] is None else [f"nnx.update({module}, {options['variables']})"]
    parts = "parts" in facts.returns
    if many:
        return [*lines, *command.value_lines(_value_of_many(command, key, module), parts=parts)]
    keys = {stream: key(stream) for stream in (*facts.streams, *options["key"])}
    lines += [*_reseeded(command, keys, module), *_mode_lines(command, module)]
    value = _value(command, keys, module)
    after = _mode_lines(command, module, back=True) if module == model else []
    kept = [f"nnx.update({model}, nnx.state({module}))"] if module != model and keeps else []
    popped = f"nnx.pop({module}, nnx.Intermediate)" if facts.sown else ""
    if not options["mutable"]:
        after += [*([popped] if popped else []), *kept]
        return [*lines, *command.value_lines(value, after=after, parts=parts)]
    # The cell gets (output, updates).
    lines += [f"{command.output} = {value}", *after, *kept]
    if popped:
        writer.needs.add("nnx")
        sown = [collection for collection in facts.given if collection.sown]
        if not sown:
            lines.append(popped)
        elif not all(collection.whole for collection in sown):
            values = writer.variable("sown", "sown_values")
            lines.append(f"{values} = nnx.to_pure_dict({popped})")
            popped = values
    return [*lines, *command.pair_lines(_updates(command, module, popped))]


def _build_before(command: CommandLines) -> Run:
    """The init that built the module which runs of the command have built anew."""
    if command.options["draws"] is not None:
        raise CannotSay("many draws at once, the first of which built the module anew, have no lines yet")
    if len(command.initialising) < len(command.runs):
        raise CannotSay("its first run built the module anew, and the others did not")
    earlier = command.context.groups.runs[: command.indices[0]]
    builds = [run for run in earlier if run.model == command.runs[0].model and is_build(run)]
    if not builds:
        raise CannotSay("nobody knows how the module was built")
    return builds[-1]


def _value(command: CommandLines, keys: Mapping[str, str], module: str) -> str:
    """The call of the model's function, or with `--eager` of the model."""
    options, facts, rngs = command.options, command.facts, _rngs(command, keys)
    if options["eager"]:
        items = [*as_written(command.call.arguments), *(f"{name}={value}" for name, value in facts.arguments)]
        items += [f"{name}={keys[name]}" for name in options["key"]]
        items += [f"rngs={rngs}"] if rngs else []
        return call(".".join((module, *command.call.method)) + "(", items)
    arguments, parameters, body = _call_in_function(command)
    # The mode is the module's own, unless the call has it as an argument.
    mode = "" if facts.arguments else "as written"
    jitted = command.jitted("nnx.jit", parameters, arguments.static, body, mode=mode)
    passed = [*arguments.outside, *(keys[name] for name in options["key"]), *([rngs] if rngs else [])]
    return call(f"{command.context.define(jitted, command.site)}(", [module, *_starred_last(passed)])


def _value_of_many(command: CommandLines, key: KeyNames, module: str) -> str:
    """The call of a function that puts the module together once for each draw."""
    facts = command.facts
    keys = {stream: f"{stream}_key" for stream in (*facts.streams, *command.options["key"])}
    jitted, arguments = _many_draws(command, keys)
    if keys:
        command.writer.needs.add("jnp")
    stacked = [f"jnp.stack({key(stream)})" for stream in keys]
    return call(f"{command.context.define(jitted, command.site)}(", [module, *arguments.outside, *stacked])


def _call_in_function(command: CommandLines) -> tuple[SplitArguments, list[str], list[str]]:
    """The call with its arguments parted, and parameters and body of the function that makes it."""
    writer, name, facts = command.writer, command.model.name, command.facts
    keys = [f"{argument}_key" for argument in command.options["key"]]
    rngs = ["rngs"] if facts.handed else []
    arguments = split(writer, command.call, facts, ("jax", "nnx", name, *keys, *rngs))
    items = [*arguments.inside, *(f"{name}={value}" for name, value in facts.arguments)]
    items += [f"{argument}={argument}_key" for argument in command.options["key"]]
    items += [f"{each}={each}" for each in rngs]
    writer.needs.add("nnx")
    body = [call(f"return {'.'.join((name, *command.call.method))}(", items)]
    return arguments, _starred_last([name, *arguments.parameters, *keys, *rngs]), body


def _many_draws(command: CommandLines, keys: Mapping[str, str]) -> tuple[JittedFunction, SplitArguments]:
    """A function that takes the module apart, and puts it together once for each draw; and what it is called with."""
    writer, name = command.writer, command.model.name
    arguments, parameters, (line,) = _call_in_function(command)
    copy = "model" if name != "model" else "copy"
    while copy in {*parameters, *keys.values()}:
        copy += "_"
    line = line.replace(f"return {name}", f"return {copy}", 1)
    rngs = _rngs(command, keys)
    if rngs:
        line = line.replace("rngs=rngs", f"rngs={rngs}")
    clone = f"{copy} = nnx.clone({name})"
    inner = [clone, *_reseeded(command, keys, copy), *_mode_lines(command, copy), line]
    many = [f"{key}s" for key in keys.values()]
    mapped = f"jax.vmap(one_draw)({', '.join(many)})"
    if not keys:
        mapped = f"jax.vmap(one_draw, axis_size={command.options['draws']})()"
    body = [f"def one_draw({', '.join(keys.values())}):", *indented(inner, writer.unit), "", f"return {mapped}"]
    writer.needs.add("jax")
    return command.jitted("nnx.jit", (name, *arguments.parameters, *many), arguments.static, body), arguments


def _starred_last(arguments: Sequence[str]) -> list[str]:
    return sorted(arguments, key=lambda argument: argument.startswith("*"))


def _reseeded(command: CommandLines, keys: Mapping[str, str], module: str) -> list[str]:
    """The line that gives the streams that the module holds the keys of the draw."""
    writer, facts = command.writer, command.facts
    streams = [stream for stream in facts.streams if stream in facts.held]
    if not streams:
        return []
    writer.needs.add("nnx")
    policy = f"policy={writer.text('match_shape')}"
    return [call("nnx.reseed(", [module, policy, *(f"{stream}={keys[stream]}" for stream in streams)])]


def _rngs(command: CommandLines, keys: Mapping[str, str]) -> str:
    """The `rngs` that the call is given; empty where it takes none, or the user's."""
    facts = command.facts
    if not facts.handed:
        return ""
    command.writer.needs.add("nnx")
    in_module = facts.held - {"params", "dropout"}
    return f"nnx.Rngs({', '.join(f'{stream}={keys[stream]}' for stream in facts.streams if stream not in in_module)})"


def _mode_lines(command: CommandLines, module: str, *, back: bool = False) -> list[str]:
    """The lines that set the mode of a run, or that set it `back`."""
    mode = command.facts.mode
    if mode is None:
        return []
    lines = [line.replace(MODULE, module) for line in (mode.back or () if back else mode.to)]
    if any("dataclasses." in line for line in lines):
        command.writer.needs.add("dataclasses")
    return lines


def _updates(command: CommandLines, module: str, popped: str) -> str:
    """The collections that a run handed back, as a dict.

    Args:
      popped: the expression that takes off `module` what was sown; a name for it where that is not given as it is.

    Raises:
      CannotSay: the run sowed variables of a type of their own.
    """
    writer, items = command.writer, []
    for collection in command.facts.given:
        if not collection.sown:
            rows = ", ".join(
                f"{writer.text('/'.join(map(str, path)))}: {_held_value(module, path, variable)}"
                for path, variable in collection.paths
            )
            items.append(f"{writer.text(collection.name)}: {{{rows}}}")
            continue
        if collection.name != "Intermediate":
            raise CannotSay(f"what it sowed are variables of a type of their own, `{collection.name}`")
        paths = [path for path, _ in collection.paths]
        pure = f"nnx.to_pure_dict({popped})" if collection.whole else _nested(writer, paths, popped)
        items.append(f"{writer.text(collection.name)}: {pure}")
    return f"{{{', '.join(items)}}}"


def _held_value(module: str, path: tuple[str | int, ...], variable: bool) -> str:
    """`net.layers[0].kernel[...]`"""
    steps = [f".{step}" if isinstance(step, str) and step.isidentifier() else f"[{step!r}]" for step in path]
    return f"{module}{''.join(steps)}{'[...]' if variable else ''}"


def _nested(writer: LineWriter, paths: Sequence[tuple[str | int, ...]], sown: str) -> str:
    """Values of `sown`, nested by their paths, with names in the place of numbers."""
    tree: dict[str, Any] = {}
    for path in paths:
        inner = tree
        for step in path[:-1]:
            inner = inner.setdefault(str(step), {})
        steps = (writer.text(step) if isinstance(step, str) else str(step) for step in path)
        inner[str(path[-1])] = sown + "".join(f"[{step}]" for step in steps)

    def text(part: Any) -> str:
        if isinstance(part, str):
            return part
        return f"{{{', '.join(f'{writer.text(name)}: {text(inner)}' for name, inner in part.items())}}}"

    return text(tree)
