"""What to add to an error of the model's own, beneath its message: what the call has to do with it, and what to write."""

from __future__ import annotations

import ast
import inspect
import linecache
import re
from typing import TYPE_CHECKING, Any

from msgspec.structs import replace

from ..base.private import is_tracing
from ..code.library import nnx_modules
from ..errors import advice_lines

if TYPE_CHECKING:
    from .notebook import ModelCall, Notebook


def hints(error: Exception, notebook: Notebook, options: dict[str, Any]) -> tuple[str, ...]:
    """Lines to add below an error that the model's code raised; none if we know no more than it says."""
    from ..compile.trace import is_tracer_error

    called = notebook.called
    if called is not None and is_tracer_error(error) and not is_tracing():
        said, command = "the model looks at a value while it is traced", called.expression.command
        if not command.startswith("%flax_apply"):
            return (said,)
        return (f"{said}; op by op it can", *advice_lines(f"{command} --eager {called.expression.call}"))
    # The message of `nn.merge_param`.
    unset = re.search(r'"(\w+)" must be passed to the constructor or at call time', str(error))
    if called is not None and isinstance(error, ValueError) and unset is not None:
        mode = options.get("train") or options.get("eval") or called.expression.command.startswith("%flax_grad")
        return _of_unset(error, unset[1], called, has_mode=bool(mode))
    lacking = re.match(r"(\w+)\.__init__\(\) missing .*'rngs'", str(error)) if isinstance(error, TypeError) else None
    if lacking is not None:
        return (f"to have it built with the session's rngs, move it to the line: %%flaxmodel net = {lacking[1]}(…)",)
    mode = "train" if options.get("train") else "eval" if options.get("eval") else None
    return () if called is None else _of_shapes(error, called, notebook) or _of_first_run(error, called, notebook, mode)


def _of_unset(error: Exception, parameter: str, called: ModelCall, *, has_mode: bool) -> tuple[str, ...]:
    """What to say of an unset switch `parameter` of a layer: the option that sets it, or the edit that connects it.

    `--train` and `--eval` set arguments of the call and fields of the model; a layer that is given neither stays unset.
    """
    from ..models.construction import adopt
    from ..models.switch import call_switches, following

    expression = called.expression
    model = adopt(called.module, expression.target)
    signature = model.signature(expression.method)
    in_call = call_switches(signature)
    standing = {setting.partition("=")[0] for setting in model.fields_as_written()}
    fields = {setting.partition("=")[0] for setting in model.fields_in_mode(True, fixed=frozenset())[1]}
    runs = expression.command.startswith("%flax_")
    if (
        runs
        and not has_mode
        and (fields - standing or any(signature.parameters[name].default is None for name in in_call))
    ):
        lines = "\n".join(f"{expression.command} {option} {expression.call}" for option in ("--train", "--eval"))
        return ("it is the model's own switch, and has no value as written", *advice_lines(lines))
    switch = next(iter((*in_call, *(f"self.{name}" for name in sorted(fields)))), "")
    edit = _edited(error, parameter) or following(parameter, switch, "".join(expression.method[-1:]))
    return (f"`{parameter}` has no value, and no switch of the model's sets it", *advice_lines(edit=edit))


def _edited(error: Exception, parameter: str) -> str | None:
    """The lines of the model as they are to be, in which a layer is given `parameter`; None where these are not clear.

    The call in which the error was raised gets the argument. It follows the switch of the method around it, or of its
    module, or else one that the method is to take.
    """
    from ..code.library import is_module, library_file
    from ..line.expression import start_of, with_arguments
    from ..models.calls import CallText
    from ..models.switch import WHEN_TRAINING, following

    trace, step = error.__traceback__, None
    while trace is not None:
        is_ours = str(trace.tb_frame.f_globals.get("__name__")).startswith("flax_magics.")
        step = step if is_ours or library_file(trace.tb_frame.f_code.co_filename) else trace
        trace = trace.tb_next
    if step is None:
        return None
    frame, code = step.tb_frame, step.tb_frame.f_code
    names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
    module = frame.f_locals.get(names[0]) if names else None
    call = CallText.at(code, step.tb_lasti)
    line = "" if call is None else linecache.getline(code.co_filename, call.line).strip()
    if call is None or call.text not in line or not is_module(module):  # it goes on over several lines
        return None
    fields = (f"self.{name}" for name in WHEN_TRAINING if isinstance(getattr(module, name, None), bool))
    switch = next((name for name in names if name in WHEN_TRAINING), next(fields, ""))
    *head, keyword = following(parameter, switch, code.co_name).splitlines()
    head = [_with_switch(getattr(type(module), code.co_name, None), code.co_name) or text for text in head]
    edited = line.replace(call.text, with_arguments(call.text, [keyword]), 1)
    if head and edited.startswith("def "):  # the method stands on one line
        body = ast.parse(edited).body[0].body[0]  # type: ignore[attr-defined]
        return f"{head[0]} {edited[start_of(edited, body) :]}"
    return "\n".join([*head, edited])


def _with_switch(method: Any, name: str) -> str | None:
    """The first line of a method with one more parameter, `train`; None where that cannot be said in plain words."""
    try:
        signature = inspect.signature(method)
    except (TypeError, ValueError):
        return None
    parameters = [parameter.replace(annotation=parameter.empty) for parameter in signature.parameters.values()]
    plain = (type(None), bool, int, float, str, type)  # `Parameter.empty` is a class
    if any(p.kind is not p.POSITIONAL_OR_KEYWORD or not isinstance(p.default, plain) for p in parameters):
        return None
    default = False if parameters[-1].default is not inspect.Parameter.empty else inspect.Parameter.empty
    parameters.append(inspect.Parameter("train", inspect.Parameter.POSITIONAL_OR_KEYWORD, default=default))
    return f"def {name}{signature.replace(parameters=parameters, return_annotation=signature.empty)}:"


def _of_shapes(error: Exception, called: ModelCall, notebook: Notebook) -> tuple[str, ...]:
    """What the variables were made for, and what the call has, where one axis is missing or a shape was refused."""
    from ..base.digest import describe
    from ..models.calls import Arguments
    from ..models.construction import adopt

    session, name, call = notebook.session, called.expression.target, called.call
    if name not in session.models:  # this was to be its first run
        return ()
    signature = adopt(called.module, name).signature(call.method)
    shapes = session.models[name].shapes_before(call.method, session.programs.purposes.get(name, ()))
    pairs = [
        (argument, shapes[argument], leaf)
        for argument, leaf, _ in Arguments.of(call.args, call.kwargs, signature, frozenset()).rows
        if argument in shapes and hasattr(leaf, "shape")
    ]
    lacking = [argument for argument, before, leaf in pairs if before.shape[1:] == leaf.shape and before.shape]
    refused = [argument for argument, before, leaf in pairs if before.shape[1:] != leaf.shape[1:]]
    if not lacking and not (refused and "shape" in str(error)):
        return ()
    first = (lacking or refused)[0]
    before, leaf = next((before, leaf) for argument, before, leaf in pairs if argument == first)
    text = f"{before.who} {first}: {before.text}, and this call has {describe(leaf)}"
    if not lacking:
        return (text,)
    if not called.expression.command.startswith("%flax_"):  # `--check` begins no line
        return (f"{text}: a batch axis is missing",)
    line = _with_axis(called, signature, lacking, [argument for argument, *_ in pairs])
    return (f"{text}: a batch axis is missing", *advice_lines(line))


def _of_first_run(error: Exception, called: ModelCall, notebook: Notebook, mode: str | None) -> tuple[str, ...]:
    """What the layer takes in which the error was raised, and the line with a batch axis where the model runs with one.

    For a model of which nothing is known yet but its layers: whether it runs is found out by shapes alone.
    """
    import jax.numpy as jnp

    from ..base.digest import describe
    from ..execution.call import prepare, trace_shapes
    from ..models.calls import Arguments
    from ..rng.keys import RootKey
    from ..state.models import register

    session, name, call = notebook.session, called.expression.target, called.call
    held = name in session.models and session.models[name].variables is not None
    entry = register(None, name, called.module)[0]
    # The init of a module that came with variables is its construction, which the call does not change.
    is_known = called.expression.command.startswith("%flax_init") if entry.ready else held
    if is_known or not isinstance(error, (TypeError, ValueError, IndexError, AssertionError)):
        return ()
    told, signature = _of_features(error), entry.model.signature(call.method)
    arguments = Arguments.of(call.args, call.kwargs, signature, frozenset())
    arrays = [argument for argument, leaf, traced in arguments.rows if traced and jnp.ndim(leaf)]
    # As it was written first: where that runs by shapes, the error was another.
    for lacking in ([], arrays, arrays[:1])[: len(arrays) + 1]:
        batched = {
            argument: leaf[None] if argument in lacking else leaf for argument, leaf in arguments.dynamic.items()
        }
        args, kwargs = arguments.rebuild(batched)
        try:
            bound = prepare(name, entry.model, replace(call, args=args, kwargs=kwargs), mode)
            trace_shapes(entry, bound, RootKey.from_seed(0).draw())
        except Exception:
            continue
        if not lacking:
            return told
        shapes = " and ".join(f"{argument} is {describe(arguments.leaf(argument))}" for argument in lacking)
        told = (*told, f"{shapes}: with a batch axis in front, the model runs")
        runs = called.expression.command.startswith("%flax_")  # `--check` begins no line
        line = _with_axis(called, signature, lacking, list(arguments.names)) if runs else None
        return (*told, *advice_lines(line))
    return told


def _of_features(error: Exception) -> tuple[str, ...]:
    """What a layer of NNX's takes, if the error was raised in one that was given an array of other features."""
    from ..base.digest import describe

    trace, layer, names = error.__traceback__, None, dict[int, str]()
    while trace is not None:
        module, inputs = (trace.tb_frame.f_locals.get(name) for name in ("self", "inputs"))
        features = getattr(module, "in_features", None)
        if isinstance(features, int) and getattr(inputs, "shape", (features,))[-1:] != (features,):
            layer = module, features, inputs
        elif isinstance(module, nnx_modules()):
            names |= {id(value): name for name, value in vars(module).items()}
        trace = trace.tb_next
    if layer is None:
        return ()
    module, features, inputs = layer
    what = names.get(id(module), type(module).__name__)
    return (f"`{what}` takes {features} features in the last axis, and was given {describe(inputs)}",)


def _with_axis(called: ModelCall, signature: Any, lacking: list[str], arguments: list[str]) -> str | None:
    """The line with one more axis for the arguments that lack it; None where only a part of an argument does."""
    from ..line.expression import Line

    line: Line | None = Line(called.expression.command, called.expression.call, signature)
    imports = ""
    for name in dict.fromkeys(re.sub(r"^(\w+)[\[.].*", r"\1", argument) for argument in lacking):
        inside = [argument for argument in arguments if re.match(rf"{name}\b", argument)]
        if line is None or not set(inside) <= set(lacking):
            return None
        if inside != [name]:
            imports = "import jax\n"
        line = line.with_argument(name, _batched if inside == [name] else _batched_tree)
    return None if line is None else f"{imports}{line}"


def _batched(argument: str) -> str:
    whole = isinstance(ast.parse(argument, mode="eval").body, (ast.Name, ast.Attribute, ast.Subscript, ast.Call))
    return f"{argument}[None]" if whole else f"({argument})[None]"


def _batched_tree(argument: str) -> str:
    return f"jax.tree_util.tree_map(lambda leaf: leaf[None], {argument})"
