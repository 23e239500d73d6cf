"""A call checked by shapes alone: what it would initialise, give back and ask for. Nothing is computed."""

from __future__ import annotations

from typing import Any

import jax

from .arguments import Arguments
from .edits import initialised
from .keys import Draw, data_of
from .models import Model
from .notes import join, summary
from .prepare import Call, prepare, prepare_init
from .run import describe
from .tracing import Request, trace


def check_call(name: str, model: Model, call: Call, key: Any) -> tuple[tuple[str, str], ...]:
    """Rows of label and value: parameters, out, streams, switch.

    Args:
      key: any typed key; only its kind matters.

    Raises:
      FlaxMagicsError: the arguments do not fit. What the model raises is passed on.
    """
    from .models.switch import WHEN_TRAINING
    from .show.units import bytes_, plural

    first = prepare_init(name, model, call)
    prepared = prepare(name, model, Call(call.method, first.args, first.kwargs, call.text), None)
    holding: Any = model
    if model.holds_variables:
        variables = prepared.model.take() or {}
        shapes = holding.collections()
    else:
        shapes = variables = initialised(first.model, key, call.method, first.args, first.kwargs).shapes or {}
    parameters, size = summary(shapes)
    arguments = Arguments.of(prepared.args, prepared.kwargs, prepared.signature, frozenset())
    draw = Draw(0, 1, data_of(key), str(jax.random.key_impl(key)))
    request = Request(name, prepared.model, call.method, arguments, variables, draw)
    traced, _, record = trace(request)
    output, updates = traced.out_info
    if model.holds_variables:
        updates = dict.fromkeys(holding.commit(updates, record).changed)
    rows = [("params", f"{plural(parameters, 'parameter')}, {bytes_(size)} in all"), ("out", describe(output))]
    if updates:
        rows.append(("writes", ", ".join(sorted(updates))))
    asked = [f"{stream} → {', '.join(dict.fromkeys(map(join, paths)))}" for stream, paths in record.asked.items()]
    rows.append(("streams", "; ".join(asked) or "none as written"))
    switches = [*prepared.switch, *(n for n in prepared.signature.parameters if n in WHEN_TRAINING)]
    names = dict.fromkeys(switch.partition("=")[0] for switch in switches)
    rows.append(("switch", ", ".join(names) or "none"))
    return tuple(rows)
