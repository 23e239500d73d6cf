"""The lines for runs of models: linen's init and jitted apply, and NNX's construction, keys, mode and call."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

from ..models.switch import written_by_place
from ..rng.keys import SPLIT
from ..run import MODULE, ExportFacts, Run, Settings
from .cells import is_build
from .context import CommandLines
from .functions import CannotSay, SplitArguments, as_written, split
from .mesh import arguments_on_mesh, mesh_of, names_of, variables_on_mesh, written_on_mesh
from .writer import LineWriter, call, indented, label_of

Keys = Mapping[str, str]
"""Stream, or argument of `--key` → the variable that holds its key."""


def _arguments(command: CommandLines, written: Iterable[str], added: Settings, keys: Keys) -> list[str]:
    """The arguments of a call with the switches of the mode, and with the keys of `--key`."""
    switches = (f"{name}={value}" for name, value in added)
    arguments = [*written, *switches, *(f"{name}={keys[name]}" for name in command.options.get("key") or ())]
    return written_by_place(type(command.model.module), command.call.method, arguments)


def _passed(command: CommandLines, keys: Collection[str]) -> list[str]:
    """The keys as passed to a function; those of `--samples` are lists, which are stacked to be mapped."""
    if command.options["samples"] is None or not keys:
        return [*keys]
    return [f"jnp.stack({name})" for name in keys]


# -- linen


def init_linen(command: CommandLines) -> list[str]:
    """The lines of `%flax_init` for a linen model."""
    writer, model, site = command.writer, command.model, command.site
    lines, _, params = command.keys_of_init("params")
    init_call, items = _init_items(command, command.runs[-1].spelling or ExportFacts(), {}, params)
    assigned = f"{command.target} = " if command.target and command.target != model.variables else ""
    lines.append(call(f"{assigned}{model.variables} = {init_call}", items))
    if site.target and not command.target:
        lines.append(f"{site.target} {model.variables}")
    command.context.assigned.add(model.variables)
    lines += keep_first_key(command, params)
    return [*lines, *writer.show(label_of(call(f"{model.name}.init(", items[1:])), model.variables)]


def apply_linen(command: CommandLines) -> list[str]:
    """The lines of `%flax_apply` for a linen model.

    Raises:
      CannotSay: its runs differ too much for one set of lines.
    """
    writer, model, options, facts = command.writer, command.model, command.options, command.facts
    lines, key, params = command.keys()
    keys = {stream: key(stream) for stream in (*facts.streams, *options["key"])}
    variables = options["variables"] or model.variables
    lines += [*_init_lines(command, keys, params), *variables_on_mesh(command)]
    value = _linen_call(command, keys, variables)
    mutable = _mutable(command)
    # What the run writes becomes part of the variables only in a plain run.
    keeps = options["variables"] is None and options["keys_of"] is None and options["samples"] is None
    collections = [name for name in facts.kept if name in mutable] if keeps else []
    if collections:
        command.context.assigned.add(model.variables)
    parts = "parts" in facts.returns
    if not mutable:
        return [*lines, *command.value_lines(value, parts=parts)]
    if not options["mutable"]:
        updates = writer.variable("updates", "new_values") if collections else "_"
        after = _merged(command, collections, updates)
        return [*lines, *command.value_lines(value, after=after, parts=parts, updates=updates)]
    # With `--mutable` the cell's value is (output, updates), updates having only the collections asked for.
    asked = [name for name in options["mutable"] if name in facts.mutable]
    pair = len(command.targets) == 2
    if set(asked) == set(mutable) and (command.target or pair or not collections):
        updates = command.targets[1] if pair else f"{command.target}[1]"
        return [*lines, *command.value_lines(value, after=_merged(command, collections, updates), parts=pair)]
    output, updates = command.output, writer.variable("updates", "new_values")
    lines += [f"{output}, {updates} = {value}", *_merged(command, collections, updates)]
    return [*lines, *command.pair_lines(f"{{{_picked(writer, asked, updates)}}}")]


def _linen_call(command: CommandLines, keys: Keys, variables: str) -> str:
    """The call of the jitted function, or with `--eager` of `apply` itself."""
    if command.options["eager"]:
        return call(*_apply_items(command, keys, as_written(written_on_mesh(command)), variables))
    writer, name, facts, samples = command.writer, command.model.name, command.facts, command.options["samples"]
    inside = {stream: f"{stream}_key" for stream in keys}
    one = list(inside.values())
    many = one if samples is None else [f"{key}s" for key in one]
    arguments = split(writer, command.call, facts, ("jax", name, "variables", *one, *many))
    arguments_on_mesh(command, arguments)
    value = call(*_apply_items(command, inside, arguments.inside, "variables"))
    replicated = names_of(command)[2] if facts.kept and mesh_of(command) is not None else ""
    axes = [writer.text(axis) for axis in sorted(facts.axes)]
    body = writer.rendered("calls", "linen_apply", value, samples, one, many, axes, replicated)
    parameters = ("variables", *_with_keys(arguments.parameters, many))
    function = command.jitted("jax.jit", parameters, body, arguments.static)
    return call(f"{function}(", [variables, *_with_keys(arguments.outside, _passed(command, keys.values()))])


def _with_keys(arguments: Sequence[str], keys: Sequence[str]) -> list[str]:
    """Arguments or parameters with those of the keys: after them, or before them if one is starred."""
    starred = any(argument.startswith("*") for argument in arguments)
    return [*keys, *arguments] if starred else [*arguments, *keys]


def _init_items(command: CommandLines, facts: ExportFacts, keys: Keys, key: str) -> tuple[str, list[str]]:
    """`net.init(` and its arguments, for an init, or for the init inside of an apply."""
    # The session's init gave each of these streams the same key.
    if facts.init_streams:
        streams = (command.writer.text(stream) for stream in ("params", *facts.init_streams))
        key = "{" + ", ".join(f"{stream}: {key}" for stream in streams) + "}"
    arguments = _arguments(command, as_written(command.call.arguments), facts.init_arguments, keys)
    return f"{facts.init_module.replace(MODULE, command.model.name)}.init(", [key, *arguments, *_method(command)]


def _apply_items(command: CommandLines, keys: Keys, arguments: Sequence[str], variables: str) -> tuple[str, list[str]]:
    """`net.apply(` and its arguments; `arguments` are those of the call."""
    writer, facts, mutable = command.writer, command.facts, _mutable(command)
    items = [variables, *_arguments(command, arguments, facts.arguments, keys)]
    if facts.streams:
        rngs = ", ".join(f"{writer.text(stream)}: {keys[stream]}" for stream in facts.streams)
        items.append(f"rngs={{{rngs}}}")
    if mutable:
        items.append(f"mutable=[{', '.join(map(writer.text, mutable))}]")
    return f"{facts.module.replace(MODULE, command.model.name)}.apply(", [*items, *_method(command)]


def _mutable(command: CommandLines) -> list[str]:
    return sorted({*command.facts.mutable, *command.options["mutable"]})


def _method(command: CommandLines) -> list[str]:
    method = command.call.method
    if not method:
        return []
    # Flax takes the name of a method of the class, but no path to a submodule's method.
    if len(method) == 1 and hasattr(type(command.model.module), method[0]):
        return [f"method={command.writer.text(method[0])}"]
    return [f"method=lambda module, *args, **kwargs: module.{'.'.join(method)}(*args, **kwargs)"]


def _merged(command: CommandLines, collections: Sequence[str], updates: str) -> list[str]:
    """The line that merges collections which a run wrote into the variables; none if nothing is kept."""
    if not collections:
        return []
    variables = command.model.variables
    whole = set(collections) == set(_mutable(command))
    new = f"**{updates}" if whole else _picked(command.writer, collections, updates)
    return [f"{variables} = {{**{variables}, {new}}}"]


def _picked(writer: LineWriter, names: Sequence[str], updates: str) -> str:
    return ", ".join(f"{writer.text(name)}: {updates}[{writer.text(name)}]" for name in names)


def _init_lines(command: CommandLines, keys: Keys, params: str) -> list[str]:
    """The lines for the init inside of a run, or for variables that a method adds."""
    context, writer, model = command.context, command.writer, command.model

    def init_of(run: Run, key: str) -> tuple[str, list[str]]:
        context.assigned.add(model.variables)
        return _init_items(command, run.spelling or command.facts, keys, key)

    lines: list[str] = []
    if command.initialising:
        init_call, items = init_of(command.initialising[0], params)
        lines = [call(f"{model.variables} = {init_call}", items), *keep_first_key(command, params)]
        # In a loop or a function only the first run initialises.
        if context.is_conditional(command.site):
            lines = [f"if {model.variables} is None:", *indented(lines, writer.unit)]
    adding = [run for run in command.runs if run.made is not None and run.made.added]
    if adding:
        if command.site.path and len(adding) < len(command.runs):
            raise CannotSay("its first run added variables to those that were there, and the others did not")
        flat = writer.variable("flat_variables")
        init_call, items = init_of(adding[0], model.first_key or params)
        lines.append(call(f"{flat} = traverse_util.flatten_dict({init_call}", items, "))"))
        # Variables that are there win over fresh ones.
        lines.append(f"{flat}.update(traverse_util.flatten_dict({model.variables}))")
        lines.append(f"{model.variables} = traverse_util.unflatten_dict({flat})")
    return lines


def keep_first_key(command: CommandLines, params: str) -> list[str]:
    """The line that keeps the key of the first init, for a method that adds variables later."""
    if not command.model.first_key:
        return []
    command.context.assigned.add(command.model.first_key)
    return [f"{command.model.first_key} = {params}"]


# -- NNX


def with_rngs(construction: str, rngs: str = "nnx.Rngs(params=0, dropout=1)") -> str:
    """`Net(8, 3)` with an `rngs` argument added; by default one with streams whose keys do not matter."""
    inside = construction.rstrip().removesuffix(")").rstrip().rstrip(",")
    return f"{inside}{'' if inside.endswith('(') else ', '}rngs={rngs})"


def construction_of(run: Run, params: str, dropout: str) -> str:
    """The construction of a run's module, with these variables as keys."""
    built = run.by_hand.partition(" = ")[2]
    return built.replace("params=params_key", f"params={params}").replace("dropout=dropout_key", f"dropout={dropout}")


def init_nnx(command: CommandLines) -> list[str]:
    """The lines of `%flax_init` for an NNX model: the same construction with other keys, into the same object."""
    target, state = command.site.target, f"nnx.state({command.model.name})"
    lines, key, params = command.keys_of_init(*SPLIT)
    lines.append(rebuilt(command, command.runs[-1], params, key("dropout")))
    bind = [f"{target} nnx.state(nnx.clone({command.model.name}))"] if target else []
    return [*lines, *bind, *command.writer.show(label_of(f"init {command.call.call}"), state)]


def rebuilt(command: CommandLines, run: Run, params: str, dropout: str) -> str:
    """The line that gives a module's own variables the values of a newly built module."""
    name, construction = command.model.name, construction_of(run, params, dropout)
    if name in command.context.apart:  # the session builds it from the class that it had then
        construction = f"type({name}){construction[construction.index('(') :]}"
    return f"nnx.update({name}, nnx.state({construction}))"


def apply_nnx(command: CommandLines) -> list[str]:
    """The lines of `%flax_apply` for an NNX model.

    Raises:
      CannotSay: its runs differ too much for one set of lines, or no lines do what an option does.
    """
    writer, model, options, facts = command.writer, command.model.name, command.options, command.facts
    many = options["samples"] is not None
    lines, key, params = command.keys()
    keys = {stream: key(stream) for stream in (*facts.streams, *options["key"])}
    if command.initialising:
        lines.append(rebuilt(command, build_before(command), params, key("dropout")))
    lines += variables_on_mesh(command)
    if many and options["mutable"]:
        raise CannotSay("--mutable with --samples of an NNX model has no lines yet")
    keeps = options["variables"] is None and options["keys_of"] is None
    module = model
    if options["variables"] is not None or (not many and (not keeps or (facts.mode and facts.mode.back is None))):
        # A run that keeps nothing works on a copy, with the given variables if there are some.
        module = writer.variable(f"{model}_copy")
        lines.append(f"{module} = nnx.clone({model})")
        lines += [] if options["variables"] is None else [f"nnx.update({module}, {options['variables']})"]
    parts = "parts" in facts.returns
    if many:
        return [*lines, *command.value_lines(_call_of_many(command, keys, module), parts=parts)]
    # In the order of a run: keys, mode, call, and the mode set back.
    lines += [*reseeded(writer, facts, keys, module), *mode_lines(facts, module)]
    value = _nnx_call(command, keys, module)
    after = mode_lines(facts, module, back=True) if module == model else []
    keep = [f"nnx.update({model}, nnx.state({module}))"] if module != model and keeps else []
    popped = f"nnx.pop({module}, nnx.Intermediate)" if facts.sown else ""
    if not options["mutable"]:
        after += [*([popped] if popped else []), *keep]
        return [*lines, *command.value_lines(value, after=after, parts=parts)]
    # With `--mutable` the cell's value is (output, updates).
    lines += [f"{command.output} = {value}", *after, *keep]
    if popped:
        sown = [collection for collection in facts.given if collection.sown]
        if not sown:
            lines.append(popped)
        elif not all(collection.whole for collection in sown):
            values = writer.variable("sown", "sown_values")
            lines.append(f"{values} = nnx.to_pure_dict({popped})")
            popped = values
    return [*lines, *command.pair_lines(_updates(command, module, popped))]


def build_before(command: CommandLines) -> Run:
    """The init that built the module, for runs that build it again (after `--fresh`). Raises CannotSay."""
    if command.options["samples"] is not None:
        raise CannotSay("--samples of which the first built the module anew have no lines yet")
    if len(command.initialising) < len(command.runs):
        raise CannotSay("its first run built the module anew, and the others did not")
    earlier = command.context.groups.runs[: command.indices[0]]
    builds = [run for run in earlier if run.model == command.runs[0].model and is_build(run)]
    if not builds:
        raise CannotSay("nobody knows how the module was built")
    return builds[-1]


def _nnx_call(command: CommandLines, keys: Keys, module: str) -> str:
    """The call of the jitted function, or with `--eager` of the module itself."""
    options, facts, rngs = command.options, command.facts, _rngs(command, keys)
    handed = [f"rngs={rngs}"] if rngs else []
    if options["eager"]:
        items = _arguments(command, as_written(written_on_mesh(command)), facts.arguments, keys)
        return call(".".join((module, *command.call.method)) + "(", [*items, *handed])
    arguments, parameters, body = _call_in_function(command)
    # The mode is set on the module, outside of the function, unless it is an argument of the call.
    mode = "" if facts.arguments else "as written"
    function = command.jitted("nnx.jit", parameters, [body], arguments.static, mode=mode)
    passed = [*arguments.outside, *(keys[name] for name in options["key"]), *([rngs] if rngs else [])]
    return call(f"{function}(", [module, *_starred_last(passed)])


def _call_of_many(command: CommandLines, keys: Keys, module: str) -> str:
    """The call of a function that runs a copy of the module for each draw, mapped over their keys."""
    name, inside = command.model.name, {stream: f"{stream}_key" for stream in keys}
    one, many = list(inside.values()), [f"{key}s" for key in inside.values()]
    arguments, parameters, line = _call_in_function(command)
    copy = "model" if name != "model" else "copy"
    while copy in {*parameters, *one}:
        copy += "_"
    line = line.replace(f"return {name}", f"return {copy}", 1)
    rngs = _rngs(command, inside)
    if rngs:
        line = line.replace("rngs=rngs", f"rngs={rngs}")
    facts, writer = command.facts, command.writer
    inner = [f"{copy} = nnx.clone({name})", *reseeded(writer, facts, inside, copy), *mode_lines(facts, copy), line]
    body = writer.rendered("calls", "nnx_samples", inner, command.options["samples"], one, many)
    function = command.jitted("nnx.jit", (name, *arguments.parameters, *many), body, arguments.static)
    return call(f"{function}(", [module, *arguments.outside, *_passed(command, keys.values())])


def _call_in_function(command: CommandLines) -> tuple[SplitArguments, list[str], str]:
    """The split arguments of the call, the parameters of the function that makes it, and its `return` line."""
    writer, name, facts = command.writer, command.model.name, command.facts
    keys = {argument: f"{argument}_key" for argument in command.options["key"]}
    rngs = ["rngs"] if facts.handed else []
    arguments = split(writer, command.call, facts, ("jax", "nnx", name, *keys.values(), *rngs))
    arguments_on_mesh(command, arguments)
    items = [*_arguments(command, arguments.inside, facts.arguments, keys), *(f"{each}={each}" for each in rngs)]
    parameters = _starred_last([name, *arguments.parameters, *keys.values(), *rngs])
    return arguments, parameters, call(f"return {'.'.join((name, *command.call.method))}(", items)


def _starred_last(arguments: Sequence[str]) -> list[str]:
    return sorted(arguments, key=lambda argument: argument.startswith("*"))


def reseeded(writer: LineWriter, facts: ExportFacts, keys: Keys, module: str) -> list[str]:
    """The line that gives the module's own random streams the keys of the draw; none if it holds none of these."""
    streams = [f"{stream}={keys[stream]}" for stream in facts.streams if stream in facts.held]
    if not streams:
        return []
    return [call("nnx.reseed(", [module, f"policy={writer.text('match_shape')}", *streams])]


def _rngs(command: CommandLines, keys: Keys) -> str:
    """The `rngs` argument that the call is given; empty if it takes none, or the user's own."""
    facts = command.facts
    if not facts.handed:
        return ""
    # Streams that the module holds are reseeded there.
    in_module = facts.held - set(SPLIT)
    return f"nnx.Rngs({', '.join(f'{stream}={keys[stream]}' for stream in facts.streams if stream not in in_module)})"


def mode_lines(facts: ExportFacts, module: str, *, back: bool = False) -> list[str]:
    """The lines that set the mode on the module; with `back` those that restore it."""
    mode = facts.mode
    lines = () if mode is None else mode.back or () if back else mode.to
    return [line.replace(MODULE, module) for line in lines]


def _updates(command: CommandLines, module: str, popped: str) -> str:
    """The collections that a run returned by `--mutable`, as the text of a dict.

    Args:
      popped: the expression that pops what was sown, or the name of a variable that has it.

    Raises:
      CannotSay: the run sowed variables of a type of the user's.
    """
    writer, items = command.writer, []
    for collection in command.facts.given:
        if collection.sown and collection.name != "Intermediate":
            raise CannotSay(f"what it sowed are variables of a type of their own, `{collection.name}`")
        if not collection.sown:
            values = f"{{{', '.join(_held(writer, module, *place) for place in collection.paths)}}}"
        elif collection.whole:
            values = f"nnx.to_pure_dict({popped})"
        else:
            values = _nested(writer, [path for path, _ in collection.paths], popped)
        items.append(f"{writer.text(collection.name)}: {values}")
    return f"{{{', '.join(items)}}}"


def _held(writer: LineWriter, module: str, path: tuple[str | int, ...], variable: bool) -> str:
    """One entry of a dict of held values: `"layers/0/kernel": net.layers[0].kernel[...]`."""
    steps = [f".{step}" if isinstance(step, str) and step.isidentifier() else f"[{step!r}]" for step in path]
    return f"{writer.text('/'.join(map(str, path)))}: {module}{''.join(steps)}{'[...]' if variable else ''}"


def _nested(writer: LineWriter, paths: Iterable[Sequence[str | int]], sown: str) -> str:
    """The text of a dict of sown values, nested by path; numbers in a path become text keys, as a run returns them."""
    inside: dict[str | int, list[Sequence[str | int]]] = {}
    for step, *rest in paths:
        inside.setdefault(step, []).append(rest)
    rows = []
    for step, rests in inside.items():
        value = f"{sown}[{writer.text(step) if isinstance(step, str) else step}]"
        rows.append(f"{writer.text(str(step))}: {_nested(writer, rests, value) if rests[0] else value}")
    return f"{{{', '.join(rows)}}}"
