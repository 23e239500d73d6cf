"""The lines for `%flax_grad`: a jitted function that takes loss and gradients as one does by hand."""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence

from ..line.call import CallExpression
from ..line.expression import segment
from ..run import MODULE, ExportFacts
from .context import CommandLines
from .functions import CannotSay, JittedFunction, SplitArguments, as_written, split
from .mesh import arguments_on_mesh, variables_on_mesh
from .runs import build_before, keep_first_key, mode_lines, rebuilt, reseeded
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
    if command.initialising:
        lines += init_lines(command, loss, as_written(after_net.arguments), params)
    lines += variables_on_mesh(command)
    names = {stream: f"{stream}_key" for stream in facts.streams}
    arguments = split(writer, after_net, facts, (*TAKEN, model.name, loss, *names.values()))
    arguments_on_mesh(command, arguments)
    items = [f"{{**variables, {writer.text('params')}: params}}", *arguments.inside]
    metrics, mutable = "metrics" in facts.returns, bool(facts.mutable)
    frozen = patterns_of(command, command.options["freeze"])
    called = applied(command, loss, facts, items, names)
    body = writer.rendered("calls", "linen_grads", called, metrics, mutable, frozen)
    parameters = ("variables", *arguments.parameters, *names.values())
    function = _function(command, loss, parameters, body, arguments)
    value = call(f"{function}(", [model.variables, *arguments.outside, *(key(stream) for stream in names)])
    return [*lines, *_value_lines(command, value, metrics=metrics, updates=mutable)]


def grad_nnx(command: CommandLines) -> list[str]:
    """The lines for an NNX module: `nnx.value_and_grad` of a copy, of which nothing is kept.

    Raises:
      CannotSay: see `grad_linen`.
    """
    writer, model, facts = command.writer, command.model, command.facts
    loss, after_net = taken_apart(command)
    if facts.sown or facts.handed:
        raise CannotSay("what its net draws or writes has no lines yet")
    written = written_by(facts)
    lines, key, params = command.keys()
    if command.initialising:
        lines.append(rebuilt(command, build_before(command), params, key("dropout")))
    lines += variables_on_mesh(command)
    keys = {stream: key(stream) for stream in facts.streams}
    copy = writer.variable(f"{model.name}_copy")
    lines += [f"{copy} = nnx.clone({model.name})", *reseeded(writer, facts, keys, copy), *mode_lines(facts, copy)]
    switches = [f"{name}={value}" for name, value in facts.arguments]
    arguments = split(writer, after_net, facts, (*TAKEN, loss, model.name))
    arguments_on_mesh(command, arguments)
    metrics = "metrics" in facts.returns
    frozen = patterns_of(command, command.options["freeze"])
    passed = [model.name, *arguments.inside, *switches]
    body = writer.rendered("calls", "nnx_grads", loss, passed, metrics, frozen)
    function = _function(command, loss, (model.name, *arguments.parameters), body, arguments)
    value = call(f"{function}(", [copy, *arguments.outside])
    state = f"nnx.state({copy}, {written})" if written else ""
    return [*lines, *_value_lines(command, value, metrics=metrics, state=state)]


def applied(command: CommandLines, loss: str, facts: ExportFacts, items: Sequence[str], keys: Mapping[str, str]) -> str:
    """The loss applied to a linen net in the mode of `facts`.

    Args:
      items: variables, batch and what follows it.
      keys: stream → its key.
    """
    text, net = command.writer.text, facts.module.replace(MODULE, command.model.name)
    mutable = f", mutable=[{', '.join(map(text, facts.mutable))}]" if facts.mutable else ""
    switches = [f"{name}={value}" for name, value in facts.arguments]
    rngs = ", ".join(f"{text(stream)}: {key}" for stream, key in keys.items())
    return call(f"nn.apply({loss}, {net}{mutable})(", [*items, *switches, *([f"rngs={{{rngs}}}"] if rngs else [])])


def written_by(facts: ExportFacts) -> str:
    """The filter of what an NNX module writes; empty without any. Raises CannotSay for types of the user's."""
    kinds = [f"nnx.{name}" for name in facts.mutable if name != "Intermediate"]
    if any(kind not in ("nnx.BatchStat", "nnx.Cache") for kind in kinds):
        raise CannotSay("its net writes variables of a type of its own")
    return f"nnx.Any({', '.join(kinds)})" if len(kinds) > 1 else "".join(kinds)


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


def init_lines(command: CommandLines, loss: str, arguments: Sequence[str], params: str) -> list[str]:
    """The lines of the init that was part of the first run."""
    model, context = command.model, command.context
    facts = command.initialising[0].spelling or ExportFacts()
    if facts.init_streams:
        raise CannotSay("its init asks for more streams than `params`")
    context.assigned.add(model.variables)
    module = facts.init_module.replace(MODULE, model.name)
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


def _value_lines(
    command: CommandLines, value: str, *, metrics: bool, updates: bool = False, state: str = ""
) -> list[str]:
    """The lines that take the value apart, print its digest, and assign it under the names of `Gradients`."""
    writer = command.writer
    aux = {name: writer.variable(name) for name, there in (("metrics", metrics), ("updates", updates)) if there}
    parts = {"loss": writer.variable("loss_value"), "grads": writer.variable("grads"), **aux}
    given = ", ".join(aux.values())
    loss = f"({parts['loss']}, {f'({given})' if len(aux) > 1 else given})" if aux else parts["loss"]
    lines = [f"{loss}, {parts['grads']} = {value}"]
    if state:
        parts["updates"] = writer.variable("updates")
        lines.append(f"{parts['updates']} = {state}")
    shown = ", ".join(f"{writer.text(name)}: {part}" for name, part in parts.items())
    lines += writer.show(command.label, f"{{{shown}}}")
    if command.site.target:
        missing = [f"{name}=None" for name in ("metrics", "updates") if name not in parts]
        fields = [*(f"{name}={part}" for name, part in parts.items()), *missing]
        lines.append(call(f"{command.site.target} types.SimpleNamespace(", fields))
    return lines
