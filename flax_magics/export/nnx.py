"""Runs of NNX models: the module built, its streams replaced, its mode set, the jitted call."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..line.call import CallExpression
from ..run import MODULE, ExportFacts
from . import values
from .cells import CommandSite, is_build
from .context import ScriptContext, ScriptModel, common
from .functions import CannotSay, JittedFunction, SplitArguments, as_written, split, verb_of
from .values import lines_of, names_of
from .writer import LineWriter, call, indented, label_of


@dataclass(frozen=True)
class NnxCall:
    """An NNX run: what is called, with which keys. See `LinenCall` of linen."""

    model: str
    call: CallExpression
    spelling: ExportFacts
    keys: Mapping[str, str]
    arguments: tuple[str, ...]


def reseeded(writer: LineWriter, held: NnxCall, model: str) -> list[str]:
    """The line that gives the streams that the module holds the keys of the draw."""
    streams = [stream for stream in held.spelling.streams if stream in held.spelling.held]
    if not streams:
        return []
    writer.needs.add("nnx")
    items = [model, f"policy={writer.text('match_shape')}", *(f"{s}={held.keys[s]}" for s in streams)]
    return [call("nnx.reseed(", items)]


def rngs(writer: LineWriter, held: NnxCall) -> str:
    """The `rngs` that the call is given; empty where it takes none, or the user's."""
    if not held.spelling.handed:
        return ""
    writer.needs.add("nnx")
    own = held.spelling.held - {"params", "dropout"}
    given = ", ".join(f"{s}={held.keys[s]}" for s in held.spelling.streams if s not in own)
    return f"nnx.Rngs({given})"


def set_mode(writer: LineWriter, spelling: ExportFacts, model: str, *, back: bool = False) -> list[str]:
    """The lines that set the mode of a run, or that set it `back`."""
    if spelling.mode is None:
        return []
    lines = [line.replace(MODULE, model) for line in (spelling.mode.back or () if back else spelling.mode.to)]
    if any("dataclasses." in line for line in lines):
        writer.needs.add("dataclasses")
    return lines


def updates(writer: LineWriter, model: str, spelling: ExportFacts, popped: str) -> str:
    """The collections that a run handed back, as a dict.

    Args:
      popped: the expression that takes off `model` what was sown; a name for it where that is not given as it is.

    Raises:
      CannotSay: the run sowed variables of a type of their own.
    """
    items = []
    for given in spelling.given:
        if not given.sown:
            values = [_held(model, path, variable) for path, variable in given.paths]
            names = ["/".join(map(str, path)) for path, _ in given.paths]
            rows = ", ".join(f"{writer.text(name)}: {value}" for name, value in zip(names, values, strict=True))
            items.append(f"{writer.text(given.name)}: {{{rows}}}")
            continue
        if given.name != "Intermediate":
            raise CannotSay(f"what it sowed are variables of a type of their own, `{given.name}`")
        pure = f"nnx.to_pure_dict({popped})" if given.whole else _nested(writer, given.paths, popped)
        items.append(f"{writer.text(given.name)}: {pure}")
    return f"{{{', '.join(items)}}}"


def _nested(writer: LineWriter, paths: Sequence[tuple[tuple[str | int, ...], bool]], sown: str) -> str:
    """Values of `sown`, nested by their paths, with names in the place of numbers."""
    tree: dict[str, Any] = {}
    for path, _ in paths:
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


def _held(model: str, path: tuple[str | int, ...], variable: bool) -> str:
    """`net.layers[0].kernel[...]`"""
    steps = [f".{step}" if isinstance(step, str) and step.isidentifier() else f"[{step!r}]" for step in path]
    return f"{model}{''.join(steps)}{'[...]' if variable else ''}"


def series(
    writer: LineWriter, held: NnxCall, mode: str, several: bool, size: int
) -> tuple[JittedFunction, SplitArguments]:
    """The jitted function for many draws at once, given the keys of each stream, and what else it is called with."""
    one, arguments = function(writer, held, mode, several)
    keys = [held.keys[stream] for stream in dict.fromkeys((*held.spelling.streams, *held.arguments))]
    copy = "model" if held.model != "model" else "copy"
    while copy in {*one.parameters, *keys}:
        copy += "_"
    given = rngs(writer, held)
    body = [
        f"{copy} = nnx.clone({held.model})",
        *reseeded(writer, held, copy),
        *set_mode(writer, held.spelling, copy),
        *(line.replace(f"return {held.model}", f"return {copy}", 1) for line in one.body),
    ]
    if given:
        body[-1] = body[-1].replace("rngs=rngs", f"rngs={given}")
    mapped = f"jax.vmap(one_draw)({', '.join(f'{key}s' for key in keys)})"
    if not keys:
        mapped = f"jax.vmap(one_draw, axis_size={size})()"
    lines = [f"def one_draw({', '.join(keys)}):", *indented(body, writer.unit), "", f"return {mapped}"]
    writer.needs.add("jax")
    verb = f"{verb_of(mode, held.call.method)}_draws"
    names = (f"{verb}_{held.model}",) if several else (verb, f"{verb}_{held.model}")
    parameters = (held.model, *arguments.parameters, *(f"{key}s" for key in keys))
    return JittedFunction(held.model, names, one.decorator, parameters, one.static, tuple(lines)), arguments


def function(writer: LineWriter, held: NnxCall, mode: str, several: bool) -> tuple[JittedFunction, SplitArguments]:
    """The jitted function for a run, and what it is called with besides the module."""
    used = ["jax", "nnx", held.model, *(f"{name}_key" for name in held.arguments)]
    if held.spelling.handed:
        used.append("rngs")
    arguments = split(writer, held.call, held.spelling, used)
    items = [*arguments.inside, *(f"{name}={value}" for name, value in held.spelling.arguments)]
    items += [f"{name}={name}_key" for name in held.arguments]
    parameters = [held.model, *arguments.parameters, *(f"{name}_key" for name in held.arguments)]
    if held.spelling.handed:
        items.append("rngs=rngs")
        parameters.append("rngs")
    starred = [name for name in parameters if name.startswith("*")]
    parameters = [name for name in parameters if name not in starred] + starred
    path = ".".join((held.model, *held.call.method))
    body = [call(f"return {path}(", items)]
    # The mode is the module's own, unless the call has it as an argument.
    verb = verb_of(mode if held.spelling.arguments else "as written", held.call.method)
    names = (f"{verb}_{held.model}",) if several else (verb, f"{verb}_{held.model}")
    writer.needs.add("nnx")
    return JittedFunction(held.model, names, "nnx.jit", tuple(parameters), arguments.static, tuple(body)), arguments


def with_rngs(construction: str, rngs: str) -> str:
    """`Net(8, 3)` with the argument that it lacks."""
    inside = construction.rstrip().removesuffix(")").rstrip().rstrip(",")
    return f"{inside}{'' if inside.endswith('(') else ', '}rngs={rngs})"


def build_again(context: ScriptContext, site: CommandSite, model: ScriptModel, indices: Sequence[int]) -> list[str]:
    """The lines of `%flax_init`: the same construction with other keys, into the same object."""
    writer, run = context.writer, context.groups.runs[indices[-1]]
    _, _, built = run.by_hand.partition(" = ")
    if site.given.options["draw"] is not None:
        lines, _, params = values.replayed(context, indices, ("params", "dropout"), False)
        dropout = writer.variable("replayed_dropout_key")
    else:
        streams, taken = context.groups.folded_later(site)
        lines = writer.draw(streams, taken=taken, stay=context.groups.stays(site))
        params, dropout = writer.params, writer.dropout
        context.assigned |= {writer.root, params, dropout}
    lines += _rebuilt(context, model, built, params, dropout)
    target = [f"{site.target} nnx.state({model.name})"] if site.target else []
    assert site.call is not None
    label = label_of(f"init {site.call.call}")
    return [*lines, *target, *writer.show(label, f"nnx.state({model.name})")]


def _rebuilt(context: ScriptContext, model: ScriptModel, built: str, params: str, dropout: str) -> list[str]:
    """A module's own objects get the values of one that is built anew."""
    writer = context.writer
    writer.needs.add("nnx")
    built = built.replace("params=params_key", f"params={params}").replace("dropout=dropout_key", f"dropout={dropout}")
    return [f"nnx.update({model.name}, nnx.state({built}))"]


def apply(context: ScriptContext, site: CommandSite, model: ScriptModel, indices: Sequence[int]) -> list[str]:
    """The lines of `%flax_apply`.

    Raises:
      CannotSay: its runs were not alike, or an option has no lines.
    """
    writer, options = context.writer, site.given.options
    assert site.call is not None
    runs, size = context.runs(indices), options["draws"]
    spelling = common(runs)
    lines, key, params = values.keys_of_run(context, site, indices, spelling)
    rebuilt = [run for run in runs if run.made is not None]
    if rebuilt:
        if size is not None:
            raise CannotSay("many draws at once, the first of which built the module anew, have no lines yet")
        if len(rebuilt) < len(runs):
            raise CannotSay("its first run built the module anew, and the others did not")
        builds = [run for run in context.groups.runs[: indices[0]] if run.model == runs[0].model and is_build(run)]
        if not builds:
            raise CannotSay("nobody knows how the module was built")
        lines += _rebuilt(context, model, builds[-1].by_hand.partition(" = ")[2], params, key("dropout"))
    names = (*spelling.streams, *options["key"])
    keys = {stream: key(stream) if size is None else f"{stream}_key" for stream in names}
    held = NnxCall(model.name, site.call, spelling, keys, tuple(options["key"]))
    if size is not None:
        return [*lines, *_series(context, site, held, key, size)]
    keeps = options["variables"] is None and options["draw"] is None
    name = model.name
    if not keeps or (spelling.mode is not None and spelling.mode.back is None):
        name = writer.variable(f"{model.name}_copy")
        lines += _copied(writer, model.name, name, options["variables"])
    lines += [*reseeded(writer, held, name), *set_mode(writer, spelling, name)]
    own_rngs = rngs(writer, held)
    extra = [*(keys[name] for name in held.arguments), *([own_rngs] if own_rngs else [])]
    if options["eager"]:
        items = [*as_written(site.call.arguments)]
        items += [f"{argument}={value}" for argument, value in spelling.arguments]
        items += [f"{argument}={keys[argument]}" for argument in held.arguments]
        items += [f"rngs={own_rngs}"] if own_rngs else []
        value = call(".".join((name, *site.call.method)) + "(", items)
    else:
        jitted, arguments = function(writer, held, site.mode, context.several)
        starred = [text for text in arguments.outside if text.startswith("*")]
        plain = [text for text in arguments.outside if not text.startswith("*")]
        value = call(f"{context.define(jitted, site)}(", [name, *plain, *extra, *starred])
    after = set_mode(writer, spelling, name, back=True) if name == model.name else []
    kept = [f"nnx.update({model.name}, nnx.state({name}))"] if name != model.name and keeps else []
    label = label_of(site.call.call, site.mode)
    if options["mutable"]:
        after += kept
        return [*lines, *_with_updates(writer, site.target, label, value, name, spelling, after)]
    if spelling.sown:
        after.append(f"nnx.pop({name}, nnx.Intermediate)")
    parts = "parts" in spelling.returns
    return [*lines, *lines_of(writer, site.target, label, value, after=[*after, *kept], parts=parts)]


def _copied(writer: LineWriter, model: str, name: str, variables: str | None) -> list[str]:
    """The lines that make a copy of a module for a run that keeps nothing, with other variables where some are given."""
    writer.needs.add("nnx")
    lines = [f"{name} = nnx.clone({model})"]
    return lines if variables is None else [*lines, f"nnx.update({name}, {variables})"]


def _with_updates(
    writer: LineWriter, target: str, label: str, value: str, model: str, spelling: ExportFacts, after: Sequence[str]
) -> list[str]:
    """The lines for a run that gives `(output, updates)`."""
    pair = names_of(target) if len(names_of(target)) == 2 else []
    output = pair[0] if pair else writer.variable("output", "result")
    lines = [f"{output} = {value}", *after]
    popped = ""
    if spelling.sown:
        writer.needs.add("nnx")
        popped = f"nnx.pop({model}, nnx.Intermediate)"
        sown = [given for given in spelling.given if given.sown]
        if not sown:
            lines.append(popped)
        elif not all(given.whole for given in sown):
            held = writer.variable("sown", "sown_values")
            lines.append(f"{held} = nnx.to_pure_dict({popped})")
            popped = held
    collections = updates(writer, model, spelling, popped)
    if pair:
        return [*lines, f"{pair[1]} = {collections}", *writer.show(label, f"({', '.join(pair)})")]
    return [*lines, *lines_of(writer, target, label, f"({output}, {collections})")]


def _series(
    context: ScriptContext, site: CommandSite, held: NnxCall, key: Callable[[str], str], size: int
) -> list[str]:
    """Many draws of an NNX model: a function that takes the module apart, and puts it together once for each draw."""
    writer, options = context.writer, site.given.options
    assert site.call is not None
    if options["mutable"]:
        raise CannotSay("--mutable of many draws of an NNX model at once has no lines yet")
    lines: list[str] = []
    name = held.model
    if options["variables"] is not None:
        name = writer.variable(f"{held.model}_copy")
        lines += _copied(writer, held.model, name, options["variables"])
    jitted, arguments = series(writer, held, site.mode, context.several, size)
    if held.keys:
        writer.needs.add("jnp")
    keys = [f"jnp.stack({key(stream)})" for stream in dict.fromkeys((*held.spelling.streams, *held.arguments))]
    value = call(f"{context.define(jitted, site)}(", [name, *arguments.outside, *keys])
    label = label_of(site.call.call, site.mode)
    return [*lines, *lines_of(writer, site.target, label, value, parts="parts" in held.spelling.returns)]
