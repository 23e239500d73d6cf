"""A model summarised by shapes alone, and a call checked by them. Nothing is computed or drawn."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import jax
from jax.extend.core import Var

from ..base.digest import count_parameters, data_of, describe
from ..base.text import bytes_, join, plural
from ..compile.initialise import initialised
from ..compile.trace import TracedCall, TraceRequest, trace_call
from ..errors import FlaxMagicsError
from ..execution.call import Call, prepare, prepare_init, trace_shapes
from ..execution.execute import plain_errors
from ..execution.notes import of_mode
from ..models.base import CallTrace, Model
from ..models.calls import LONGEST, Arguments
from ..models.switch import WHEN_TRAINING
from ..rng.keys import Draw
from .modules import TracedModules, equations, modules_of
from .view import Summary

if TYPE_CHECKING:
    from ..state.entry import ModelEntry

LOOP = "a loop (scan, while) counts as one turn of it: XLA does not know how many there are"
NO_COUNT = "this backend counts no FLOPs"


def of_variables(entry: ModelEntry) -> Summary:
    """The summary of a model without a call.

    Raises:
      FlaxMagicsError: it has no variables yet.
    """
    name, model = entry.name, entry.model
    variables = entry.held
    if variables is None:
        raise FlaxMagicsError(
            f"`{name}` has no variables yet, and without a call nobody knows which it will have.",
            form=f"%flax_summary {name}(…)",
        )
    modules = modules_of(model, variables, TracedModules())
    return Summary(name, model.describe(), "", "as written", model.fields_as_written(), True, modules)


def of_call(
    entry: ModelEntry,
    call: Call,
    mode: str | None,
    draw: Draw,
    *,
    backward: bool = False,
    phase: Callable[[str], None] = lambda phase: None,
) -> Summary:
    """The summary of a model in a call.

    Args:
      mode: `train`, `eval` or None: as written.
      draw: any; only the kind of its keys matters.
      backward: count the backward pass too.
      phase: told what is being done.

    Raises:
      FlaxMagicsError: the arguments do not fit. What the model raises is passed on.
    """
    prepared = prepare(entry.name, entry.model, call, mode)
    with plain_errors(call):
        phase(f"tracing {entry.name}")
        call_traced = trace_shapes(entry, prepared, draw)
        traced, record, variables = call_traced.traced, call_traced.trace, call_traced.request.variables
        phase(f"counting {entry.name}")
        program, handed_back = traced.jaxpr.jaxpr, _handed_back(prepared.model, traced, variables)
        modules = TracedModules.of(record, program, handed_back, backward=backward)
    whole = modules.flops.get(None, modules.nothing)
    loops = any(equation.primitive.name in ("scan", "while") for equation in equations(program))
    _, updates = traced.out_info
    written = sorted(name for name in prepared.model.commit(updates, record).changed if name in updates)
    mode = prepared.mode_of(record)
    return Summary(
        entry.name,
        entry.model.describe(),
        call.text,
        mode,
        prepared.switch,
        entry.ready,
        modules_of(prepared.model, variables, modules),
        whole.forward,
        whole.both,
        tuple(name for name in written if name not in record.sown),
        {name: describe(updates[name], LONGEST) for name in written if name in record.sown},
        (
            *(note.text for note in of_mode(entry.name, prepared, mode, CallTrace())),
            *(note for note, said in ((LOOP, loops), (NO_COUNT, whole.forward is None)) if said),
        ),
    )


def _handed_back(model: Model, traced: Any, variables: Mapping[str, Any]) -> frozenset[Var]:
    """Inputs of the program that hold the variables which the model does not write.

    Flax's own count of the backward pass has linen's `apply` hand back all that it may write, which is everything: a
    parameter's gradient is then one addition more.
    """
    if model.holds_variables:
        return frozenset()
    _, updates = traced.out_info
    written = {jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_flatten_with_path(updates)[0]}
    leaves = jax.tree_util.tree_flatten_with_path(variables)[0]
    inputs = traced.jaxpr.jaxpr.invars[: len(leaves)]
    return frozenset(
        var for var, (path, _) in zip(inputs, leaves, strict=True) if jax.tree_util.keystr(path) not in written
    )


def check_call(name: str, model: Model, call: Call, key: Any) -> tuple[tuple[str, str], ...]:
    """Rows of label and value: parameters, out, streams, switch.

    Args:
      key: any typed key; only its kind matters.

    Raises:
      FlaxMagicsError: the arguments do not fit. What the model raises is passed on.
    """
    first = prepare_init(name, model, call)
    prepared = prepare(name, model, Call(call.method, call.args, first.kwargs, call.text), None)
    variables: Mapping[str, Any]
    shapes: Mapping[str, Any]
    if model.holds_variables:
        variables, shapes = model.own_variables(), model.collections()
    else:
        shapes = variables = initialised(first.model, key, call.method, call.args, first.kwargs).shapes or {}
    parameters, size = count_parameters(shapes)
    arguments = Arguments.of(call.args, prepared.kwargs, prepared.signature, frozenset())
    draw = Draw(0, 1, data_of(key), str(jax.random.key_impl(key)))
    request = TraceRequest(name, prepared.model, call.method, arguments, variables, draw)
    call_traced: TracedCall[None] = trace_call(request)
    record, (output, updates) = call_traced.trace, call_traced.traced.out_info
    changed = model.commit(updates, record).changed
    rows = [("params", f"{plural(parameters, 'parameter')}, {bytes_(size)} in all"), ("out", describe(output))]
    if changed:
        rows.append(("writes", ", ".join(sorted(changed))))
    asked = [f"{stream} → {', '.join(dict.fromkeys(map(join, paths)))}" for stream, paths in record.asked.items()]
    rows.append(("streams", "; ".join(asked) or "none as written"))
    switches = [*prepared.switch, *(n for n in prepared.signature.parameters if n in WHEN_TRAINING)]
    names = dict.fromkeys(switch.partition("=")[0] for switch in switches)
    rows.append(("switch", ", ".join(names) or "none"))
    return tuple(rows)
