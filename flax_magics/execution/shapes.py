"""A call traced by shapes alone, with whatever variables it turns out to need."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax

from ..compile.initialise import merged, shapes_of_init
from ..compile.trace import TraceRequest, is_tracer_error, static_choices, trace
from ..models.arguments import Arguments
from ..models.base import CallTrace, MissingVariables, Needs
from ..rng.keys import Draw
from .call import BoundCall, Call, prepare_init

if TYPE_CHECKING:
    from ..state.entry import ModelEntry


def trace_call(
    entry: ModelEntry, prepared: BoundCall, call: Call, draw: Draw
) -> tuple[Any, Needs, CallTrace, Mapping[str, Any]]:
    """The program of the call, what it asks for, what its trace saw, modules' calls too, and the variables it was given."""
    forced = frozenset(name for method, name in entry.static_ints if method == call.method)
    arguments = Arguments.of(prepared.args, prepared.kwargs, prepared.signature, forced)
    try:
        return _trace_with(entry, prepared, call, draw, arguments)
    except Exception as error:
        if not is_tracer_error(error):
            raise
        for more in static_choices(arguments):
            arguments = Arguments.of(prepared.args, prepared.kwargs, prepared.signature, forced | more)
            try:
                return _trace_with(entry, prepared, call, draw, arguments)
            except Exception as again:
                if not is_tracer_error(again):
                    raise again from None
        raise


def _trace_with(
    entry: ModelEntry, prepared: BoundCall, call: Call, draw: Draw, arguments: Arguments
) -> tuple[Any, Needs, CallTrace, Mapping[str, Any]]:
    variables, complete = _variables(entry, call, draw), False
    while True:
        request = TraceRequest(
            entry.name,
            prepared.model,
            call.method,
            arguments,
            variables,
            draw,
            training=prepared.mode == "train",
            guess=entry.known_needs.get((call.method, prepared.mode), Needs()),
            noted=True,
        )
        try:
            traced, ask, record = trace(request)
        except MissingVariables as error:
            if complete or entry.model.holds_variables:
                raise error.__cause__ or error from None
            # A method needs what the first init did not make.
            variables, complete = merged(variables, _fresh(entry, call, draw))[0], True
            continue
        sown = record.sown & set(variables)
        if not sown:
            return traced, ask, record, variables
        variables = {name: tree for name, tree in variables.items() if name not in sown}


def _variables(entry: ModelEntry, call: Call, draw: Draw) -> Mapping[str, Any]:
    held = entry.held
    return _fresh(entry, call, draw) if held is None else held


def _fresh(entry: ModelEntry, call: Call, draw: Draw) -> Mapping[str, Any]:
    """The shapes of what an init would make."""
    first = prepare_init(entry.name, entry.model, call)
    key = jax.eval_shape(lambda: jax.random.key(0, impl=draw.impl))
    shapes: Mapping[str, Any] = shapes_of_init(first.model, key, call.method, first.args, first.kwargs)
    return shapes
