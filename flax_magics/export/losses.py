"""The lines for `%flax_grad`: a jitted function that takes loss and gradients as one does by hand."""

from __future__ import annotations

import ast
from collections.abc import Sequence

from ..line.call import CallExpression
from ..line.expression import segment
from ..run import ExportFacts
from .context import CommandLines
from .functions import CannotSay, JittedFunction, SplitArguments, as_written, split
from .mesh import arguments_on_mesh, variables_on_mesh
from .runs import build_before, keep_first_key, mode_lines, of_module, rebuilt, reseeded
from .writer import call, indented

TAKEN = (
    *("jax", "nn", "nnx", "fnmatch", "traverse_util", "variables", "params", "frozen", "trained"),
    *("loss_of", "is_trained", "value", "metrics", "updates", "result", "grads"),
)
"""Names in the functions that no parameter may have."""


def grad_linen(command: CommandLines) -> list[str]:
    """The lines for a linen net: `jax.value_and_grad` over `nn.apply(loss, net)`.

    Raises:
      CannotSay: they cannot be said in plain lines yet, or its runs differ too much for one set of lines.
    """
    writer, model, facts = command.writer, command.model, command.facts
    loss, after_net = taken_apart(command)
    if facts.axes or facts.sown:
        raise CannotSay("its net names a mapped axis" if facts.axes else "its net sows values")
    lines, key, params = command.keys()
    switches = [f"{name}={value}" for name, value in facts.arguments]
    module = of_module(command, facts.module, model.name)
    writer.needs |= {"nn", "jax"}
    if command.initialising:
        lines += init_lines(command, loss, as_written(after_net.arguments), params)
    lines += variables_on_mesh(command)
    names = {stream: f"{stream}_key" for stream in facts.streams}
    arguments = split(writer, after_net, facts, (*TAKEN, model.name, loss, *names.values()))
    arguments_on_mesh(command, arguments)
    items = [f"{{**variables, {writer.text('params')}: params}}", *arguments.inside, *switches]
    if names:
        items.append(f"rngs={{{', '.join(f'{writer.text(stream)}: {name}' for stream, name in names.items())}}}")
    mutable = f", mutable=[{', '.join(map(writer.text, facts.mutable))}]" if facts.mutable else ""
    applied = call(f"nn.apply({loss}, {module}{mutable})(", items)
    metrics = "metrics" in facts.returns
    inside = [f"return {applied}"]
    if metrics and mutable:
        inside = [f"(value, metrics), updates = {applied}", "return value, (metrics, updates)"]
    aux = ", has_aux=True" if metrics or mutable else ""
    quoted, frozen, sep = (
        writer.text("params"),
        patterns_of(command, command.options["freeze"]),
        f"sep={writer.text('/')}",
    )
    body = ["def loss_of(params):", *indented(inside, writer.unit), ""]
    body.append(f"return jax.value_and_grad(loss_of{aux})(variables[{quoted}])")
    if frozen:
        writer.needs |= {"fnmatch", "traverse_util"}
        is_frozen = f"any(fnmatch.fnmatchcase(name, pattern) for pattern in {frozen})"
        merged = f"params = traverse_util.unflatten_dict({{**frozen, **trained}}, {sep})"
        body = [
            f"params = traverse_util.flatten_dict(variables[{quoted}], {sep})",
            f"frozen = {{name: value for name, value in params.items() if {is_frozen}}}",
            "trained = {name: value for name, value in params.items() if name not in frozen}",
            "",
            "def loss_of(trained):",
            *indented([merged, *inside], writer.unit),
            "",
            f"result, grads = jax.value_and_grad(loss_of{aux})(trained)",
            f"return result, traverse_util.unflatten_dict(grads, {sep})",
        ]
    parameters = ("variables", *arguments.parameters, *names.values())
    function = _function(command, loss, parameters, body, arguments)
    value = call(f"{function}(", [model.variables, *arguments.outside, *(key(stream) for stream in names)])
    return [*lines, *_value_lines(command, value, metrics=metrics, updates="updates" if mutable else "")]


def grad_nnx(command: CommandLines) -> list[str]:
    """The lines for an NNX module: `nnx.value_and_grad` of a copy, of which nothing is kept.

    Raises:
      CannotSay: see `grad_linen`.
    """
    writer, model, facts = command.writer, command.model, command.facts
    loss, after_net = taken_apart(command)
    kinds = [name for name in facts.mutable if name != "Intermediate"]
    if facts.sown or facts.handed or any(name not in ("BatchStat", "Cache") for name in kinds):
        raise CannotSay("what its net draws or writes has no lines yet")
    lines, key, params = command.keys()
    writer.needs.add("nnx")
    if command.initialising:
        lines.append(rebuilt(command, build_before(command), params, key("dropout")))
    lines += variables_on_mesh(command)
    keys = {stream: key(stream) for stream in facts.streams}
    copy = writer.variable(f"{model.name}_copy")
    lines += [f"{copy} = nnx.clone({model.name})", *reseeded(command, keys, copy), *mode_lines(command, copy)]
    switches = [f"{name}={value}" for name, value in facts.arguments]
    arguments = split(writer, after_net, facts, (*TAKEN, loss, model.name))
    arguments_on_mesh(command, arguments)
    metrics = "metrics" in facts.returns
    frozen, of, aux = patterns_of(command, command.options["freeze"]), "", ", has_aux=True" if metrics else ""
    body: list[str] = []
    if frozen:
        writer.needs.add("fnmatch")
        of = ", argnums=nnx.DiffState(0, is_trained)"
        body = ["def is_trained(path, value):", *indented(is_trained_body(command, frozen), writer.unit), ""]
    body.append(call(f"return nnx.value_and_grad({loss}{of}{aux})(", [model.name, *arguments.inside, *switches]))
    function = _function(command, loss, (model.name, *arguments.parameters), body, arguments)
    value = call(f"{function}(", [copy, *arguments.outside])
    filters = [f"nnx.{name}" for name in kinds]
    state = f"nnx.state({copy}, {filters[0] if len(filters) == 1 else f'nnx.Any({chr(44).join(filters)})'})"
    return [*lines, *_value_lines(command, value, metrics=metrics, state=state if kinds else "")]


def taken_apart(command: CommandLines) -> tuple[str, CallExpression]:
    """The loss as it is written, and the call without the net."""
    if not command.model.holds and any(note.kind == "constant" for run in command.runs for note in run.notes):
        raise CannotSay("a second net in its call has no lines yet")
    written = command.call
    tree = written.tree
    after_net = ast.Call(tree.func, tree.args[1:], tree.keywords)
    return segment(written.text, tree.func), written._replace(tree=ast.copy_location(after_net, tree))


def check_names(command: CommandLines, loss: str, parameters: Sequence[str], body: Sequence[str]) -> None:
    """Raises CannotSay where the loss, or a linen net, is called like a variable of the function that reads it."""
    lines = [f"def function({', '.join(parameters)}):", *indented(body, " ")]
    nodes = list(ast.walk(ast.parse("\n".join(lines))))
    names = {node.arg for node in nodes if isinstance(node, ast.arg)}
    names |= {node.name for node in nodes if isinstance(node, ast.FunctionDef)}
    names |= {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    for name in (loss.partition(".")[0], *([] if command.model.holds else [command.model.name])):
        if name in names:
            raise CannotSay(f"its lines have a variable called `{name}`: another name for yours mends it")


def patterns_of(command: CommandLines, freeze: Sequence[str]) -> str:
    """The patterns of `--freeze` as a tuple's text, each also for what is inside a module; empty without any."""
    patterns = [pattern for one in freeze for pattern in (one, f"{one}/*")]
    return f"({', '.join(map(command.writer.text, patterns))})" if patterns else ""


def is_trained_body(command: CommandLines, frozen: str) -> list[str]:
    """The body of `is_trained(path, value)`: whether a variable of an NNX module is trained.

    Args:
      frozen: `patterns_of` those that are not.
    """
    return [
        f"names = {command.writer.text('/')}.join(map(str, path)), type(value).__name__",
        f"patterns = {frozen}",
        "frozen = any(fnmatch.fnmatchcase(name, pattern) for name in names for pattern in patterns)",
        "return isinstance(value, nnx.Param) and not frozen",
    ]


def init_lines(command: CommandLines, loss: str, arguments: Sequence[str], params: str) -> list[str]:
    """The lines of the init that was part of the first run."""
    model, context = command.model, command.context
    facts = command.initialising[0].spelling or ExportFacts()
    if facts.init_streams:
        raise CannotSay("its init asks for more streams than `params`")
    context.assigned.add(model.variables)
    module = of_module(command, facts.init_module, model.name)
    items = [params, *arguments, *(f"{name}={value}" for name, value in facts.init_arguments)]
    lines = [call(f"{model.variables} = nn.init({loss}, {module})(", items), *keep_first_key(command, params)]
    # In a loop or a function only the first run initialises.
    conditional = context.is_conditional(command.site)
    return [f"if {model.variables} is None:", *indented(lines, command.writer.unit)] if conditional else lines


def _function(
    command: CommandLines, loss: str, parameters: Sequence[str], body: Sequence[str], arguments: SplitArguments
) -> str:
    """Makes sure that the jitted function is defined, and returns its name."""
    check_names(command, loss, parameters, body)
    decorator = "nnx.jit" if command.model.holds else "jax.jit"
    name = f"{loss.rpartition('.')[2]}_and_grads"
    names = (name, f"{name}_{command.site.mode}", f"{name}_{command.model.name}")
    static = tuple(arguments.static)
    function = JittedFunction(command.model.name, names, decorator, tuple(parameters), static, tuple(body))
    return command.context.define(function, command.site)


def _value_lines(command: CommandLines, value: str, *, metrics: bool, updates: str = "", state: str = "") -> list[str]:
    """The lines that take the value apart, print its digest, and assign it under the names of `Gradients`."""
    writer = command.writer
    loss, grads = writer.variable("loss_value"), writer.variable("grads")
    parts = {"loss": loss, "grads": grads}
    names = [writer.variable(name) for name in ("metrics", updates) if name and (name != "metrics" or metrics)]
    parts |= {"metrics": writer.variable("metrics")} if metrics else {}
    parts |= {"updates": writer.variable("updates")} if updates else {}
    aux = f"({', '.join(names)})" if len(names) == 2 else "".join(names)
    lines = [f"{f'({loss}, {aux})' if aux else loss}, {grads} = {value}"]
    if state:
        parts["updates"] = writer.variable("updates")
        lines.append(f"{parts['updates']} = {state}")
    shown = ", ".join(f"{writer.text(name)}: {part}" for name, part in parts.items())
    lines += writer.show(command.label, f"{{{shown}}}")
    if command.site.target:
        writer.needs.add("types")
        missing = [f"{name}=None" for name in ("metrics", "updates") if name not in parts]
        fields = [*(f"{name}={part}" for name, part in parts.items()), *missing]
        lines.append(call(f"{command.site.target} types.SimpleNamespace(", fields))
    return lines
