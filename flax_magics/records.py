"""The Run of each command, from what it did."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from . import spelling
from .construct import Recipe
from .execution import Execution
from .keys import Draw, Series, Streams
from .notes import made_of, of_params
from .prepare import Call
from .program import devices_of
from .registry import Entry
from .run import Made, Note, Run, Timing
from .weights import Source


def of_init(
    entry: Entry,
    call: Call,
    inputs: Any,
    variables: Mapping[str, Any],
    draw: Draw,
    started: float,
    seconds: float,
    notes: tuple[Note, ...],
    *,
    weights: str,
    replayed: bool,
    first: bool,
) -> Run:
    """An init of a linen model; `seconds` is what it took."""
    model: Any = entry.model
    by_hand = spelling.of_init(call, model)
    return Run(
        command="init",
        model=entry.name,
        mode="",
        call=call.text,
        inputs=inputs,
        output=variables,
        seed=draw.seed,
        draw=draw.number,
        keys=Streams.of(draw, "params"),
        device=devices_of(variables),
        started=started,
        program="eager",
        timing=Timing(init=seconds),
        cell=call.cell,
        made=made_of(variables),
        notes=(*notes, *of_params(variables)),
        by_hand=model.init_by_hand(call.text, call.method, by_hand.init_arguments, by_hand.init_module),
        weights=weights,
        replayed=replayed,
        first=first,
        spelling=by_hand,
    )


def of_build(
    name: str,
    recipe: Recipe,
    model: Any,
    draw: Draw,
    keys: Mapping[str, Any],
    started: float,
    seconds: float,
    call: Call | None = None,
    *,
    cell: int | None,
    replayed: bool = False,
    first: bool,
) -> Run:
    """An NNX module that the session built: on a magic's line, or with `call` for an init."""
    state = model.state()
    return Run(
        command="init",
        model=name,
        mode="",
        call=recipe.text if call is None else call.text,
        inputs=(recipe.args, dict(recipe.kwargs)) if call is None else (call.args, call.kwargs),
        output=state,
        seed=draw.seed,
        draw=draw.number,
        keys=keys,
        device=devices_of(state),
        started=started,
        program="eager",
        timing=Timing(init=seconds),
        cell=cell,
        made=made_of(model.collections()),
        by_hand=recipe.by_hand(name),
        weights=Source.initialised(draw, {}).describe(draw.seed),
        replayed=replayed,
        first=first,
    )


def of_apply(
    name: str,
    call: Call,
    done: Execution,
    draw: Draw | Series,
    started: float,
    notes: tuple[Note, ...],
    made: Made | None,
    *,
    replayed: bool,
    first: bool,
) -> Run:
    """An apply, from its execution."""
    return Run(
        command="apply",
        model=name,
        mode=done.mode,
        call=call.text,
        inputs=done.inputs,
        output=done.output,
        seed=draw.first.seed,
        draw=draw.first.number,
        draws=draw.size,
        keys=done.keys,
        device=done.device,
        started=started,
        sown=done.sown,
        used=done.used,
        changed=done.changed,
        program=done.program,
        reason=done.reason,
        causes=done.causes,
        switch=", ".join(done.switch),
        static=done.static,
        timing=done.timing,
        memory=done.memory,
        cost=done.cost,
        limits=done.limits,
        cell=call.cell,
        notes=notes,
        made=made,
        by_hand=done.by_hand,
        weights=done.weights,
        replayed=replayed,
        first=first,
        spelling=spelling.of_apply(call, done),
    )


def of_key(name: str, draw: Draw, cell: int | None, *, first: bool) -> Run:
    """A key drawn under a name; the output is the key."""
    key = draw.stream(name)
    return Run(
        command="key",
        model=None,
        mode="",
        call=name,
        inputs=((), {}),
        output=key,
        seed=draw.seed,
        draw=draw.number,
        keys=Streams.of(draw, name),
        device=devices_of(key),
        started=time.time(),
        cell=cell,
        by_hand="root_key, params_key, dropout_key = jax.random.split(root_key, 3)",
        first=first,
    )
