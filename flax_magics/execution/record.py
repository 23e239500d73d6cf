"""The Run of each command, from what it did, and what it takes to write it again as plain Flax."""

from __future__ import annotations

import time
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax

from ..base.digest import bytes_of, own
from ..base.environment import devices_of
from ..base.measures import Timing
from ..code.fingerprint import fingerprint
from ..code.library import nnx_modules
from ..code.walk import arrays_in
from ..compile.compiler import settings
from ..compile.initialise import made_of
from ..line.options import ApplyOptions
from ..line.variant import positional_names
from ..models.base import Model, ModelWithInit, ModelWithVariables
from ..models.calls import Path
from ..models.construction import Construction
from ..models.switch import cloned, read_fields, setting_of, written_in_call
from ..rng.keys import Draw, DrawBatch, RunKeys
from ..run import MODULE, ContainerPart, ExportFacts, HandedBack, InitStats, ModeByHand, Note, Run, Settings
from ..state.entry import ApplyRecipe, ModelEntry, Origin, objects_in
from ..state.weights import WeightSource
from .call import Call, prepare_init
from .execute import Execution
from .notes import of_params


def origin_of(entry: ModelEntry, options: ApplyOptions, done: Execution, method: Path) -> Origin:
    """The origin of an apply that was found out about.

    Args:
      entry: the model as it was before the run.
    """
    ready, prepared = done.ready, done.prepared
    model = entry.model
    leaves, structure = jax.tree_util.tree_flatten(ready.variables)
    arguments = ready.arguments
    objects = objects_in(arguments.treedef, arguments.leaves, structure)
    inputs, variables = sum(map(bytes_of, arguments.leaves)), sum(map(bytes_of, leaves))
    how = ApplyRecipe(
        entry=without_variables(entry),
        skeleton=model.layout.skeleton if model.holds_variables else None,
        method=method,
        options=replace(options, variables=None),
        taken=any(taken for _, taken in done.names.values()),
        settings=settings(),
        key=prepared.model.cache_key(),
        program=None if ready.program is None else weakref.ref(ready.program),
        names=tuple(name if traced else None for name, traced in zip(arguments.names, arguments.traced, strict=True)),
        record=ready.record,
        structure=structure,
        objects=fingerprint(objects) if objects else b"",
        moving=any(isinstance(leaf, _moving()) for leaf in arguments.leaves),
        inputs=inputs,
        variables=variables,
        written=sum(map(bytes_of, jax.tree_util.tree_leaves(dict(done.updates)))),
        # Of a module that holds its variables only classes are kept, which NNX keeps for ever itself.
        pinned=() if model.holds_variables else tuple(arrays_in(model.module)),
    )
    return Origin(how, list(map(own, leaves)))


def without_variables(entry: ModelEntry) -> ModelEntry:
    """The model as it is, holding no arrays: of a module that holds its own there is only the name, and what was learned."""
    model = entry.model
    if model.holds_variables:
        # The module itself is the user's, and would keep its arrays alive for as long as this is kept.
        nobody: Any = _NoModel(model.written)
        return replace(entry, model=nobody, variables=None, init=None, update_counts={}, built=None, replaced=None)
    return replace(entry, variables=None, init=None, update_counts={}, replaced=None)


@dataclass(frozen=True)
class _NoModel:
    """In the place of a module that is not to be held."""

    written: str


def _moving() -> tuple[type, ...]:
    """Types of objects that hold variables, of which a run may change the values."""
    import sys

    nnx = sys.modules.get("flax.nnx")
    return () if nnx is None else (*nnx_modules(), nnx.Variable)


def run_of_init(
    entry: ModelEntry,
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
    model = entry.model
    assert not model.holds_variables
    by_hand = facts_of_init(call, model)
    return Run(
        command="init",
        model=entry.name,
        mode="",
        call=call.text,
        inputs=inputs,
        output=variables,
        seed=draw.seed,
        draw=draw.number,
        keys=RunKeys.of(draw, "params"),
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


def run_of_build(
    name: str,
    recipe: Construction,
    model: ModelWithVariables,
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
        weights=WeightSource.initialised(draw, {}).describe(draw.seed),
        replayed=replayed,
        first=first,
    )


def run_of_apply(
    name: str,
    call: Call,
    done: Execution,
    draw: Draw | DrawBatch,
    started: float,
    notes: tuple[Note, ...],
    made: InitStats | None,
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
        spelling=facts_of_apply(call, done),
    )


def run_of_key(name: str, draw: Draw, cell: int | None, *, first: bool) -> Run:
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
        keys=RunKeys.of(draw, name),
        device=devices_of(key),
        started=time.time(),
        cell=cell,
        by_hand="root_key, params_key, dropout_key = jax.random.split(root_key, 3)",
        first=first,
    )


def facts_of_apply(call: Call, done: Execution) -> ExportFacts:
    """The spelling of an apply, from its execution."""
    prepared, ask = done.prepared, done.ready.ask
    model, registered = prepared.model, done.entry.model
    holds = model.holds_variables
    arguments = _added(prepared.kwargs, call.kwargs)
    module = MODULE
    if prepared.mode != "as written":
        in_call = {*dict(arguments), *written_in_call(prepared.signature, call.args, call.kwargs)}
        fields = () if holds else tuple(pair for pair in map(setting_of, prepared.switch) if pair[0] not in in_call)
        module = MODULE if holds else cloned(MODULE, model.module, fields)
    init_arguments: Settings = ()
    init_module = MODULE
    if done.made is not None and not holds:
        # With the keys that `--key` adds, and without the switches of the run.
        given = {n: v for n, v in prepared.kwargs.items() if n in call.kwargs or not isinstance(v, bool)}
        init_arguments, init_module = _switches_of_init(replace(call, kwargs=given), registered)
    written = () if holds else tuple(sorted(done.updates))
    parameters = tuple(positional_names(prepared.signature, len(call.args)))
    static = frozenset(name for name, _ in done.ready.arguments.static)
    passed = [*zip(parameters, call.args, strict=True), *call.kwargs.items()]
    return ExportFacts(
        parameters=parameters,
        static=static,
        containers=tuple((name, _part(value, name, static)) for name, value in passed if _holds(name, static)),
        streams=tuple(sorted(ask.streams)),
        held=model.layout.tags if model.holds_variables else frozenset(),
        handed=bool(model.supplied_arguments()),
        taken="params (folded)" in done.names,
        arguments=arguments,
        nnx=holds,
        module=module,
        mode=_mode(registered, prepared.mode == "train")
        if registered.holds_variables and prepared.mode != "as written"
        else None,
        mutable=() if holds else tuple(sorted({*written, *done.sown})),
        kept=written,
        sown=bool(done.sown),
        axes=tuple(sorted(ask.axes)),
        init_arguments=init_arguments,
        init_module=init_module,
        init_streams=() if registered.holds_variables else registered.init_streams,
        returns=_returns(done.output),
        given=tuple(_given(done)),
        code=registered.code(),
    )


def _mode(model: ModelWithVariables, train: bool) -> ModeByHand:
    from ..models.nnx_graph import back_by_hand, mode_by_hand

    nodes = model.layout.nodes
    return ModeByHand(mode_by_hand(MODULE, nodes, train), back_by_hand(MODULE, nodes, train))


def facts_of_init(call: Call, model: ModelWithInit) -> ExportFacts:
    """The spelling of the init of a linen model that has run."""
    arguments, module = _switches_of_init(call, model)
    return ExportFacts(init_arguments=arguments, init_module=module, init_streams=model.init_streams)


def _switches_of_init(call: Call, model: Model) -> tuple[Settings, str]:
    prepared = prepare_init("", model, call)
    before, after = read_fields(model.module), read_fields(prepared.model.module)
    fields = tuple(map(setting_of, after)) if before != after else ()
    return _added(prepared.kwargs, call.kwargs), cloned(MODULE, model.module, fields)


def _holds(name: str, static: frozenset[str]) -> bool:
    return any(leaf.startswith((f"{name}[", f"{name}.")) for leaf in static)


def _part(value: Any, name: str, static: frozenset[str]) -> ContainerPart:
    """`value`, whose path is `name`, taken apart as far as there are leaves in it that a program is made for."""
    if value is None:
        return ContainerPart("none")
    if name in static:
        return ContainerPart("choice")
    if not _holds(name, static):
        return ContainerPart("data")
    rows: list[tuple[Any, Any]] = []
    if type(value) is dict and all(type(key) in (str, int) for key in value):
        rows += value.items()
    elif type(value) in (list, tuple):
        rows += enumerate(value)
    kind = type(value).__name__ if rows else "other"
    return ContainerPart(kind, tuple((key, _part(inner, f"{name}[{key!r}]", static)) for key, inner in rows))


def _given(done: Execution) -> Iterator[HandedBack]:
    """The collections in the updates of an NNX run that was asked for some."""
    model = done.prepared.model
    if not done.mutable or not model.holds_variables:
        return
    for name, tree in done.output[1].items():
        if name in done.sown:
            leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda part: not isinstance(part, dict))
            steps = [tuple(str(key.key) for key in path) for path, _ in leaves]
            paths = [tuple(int(step) if step.isdigit() else step for step in path) for path in steps]
            whole = len(done.sown) == 1 and paths == steps
            yield HandedBack(name, tuple((path, True) for path in paths), sown=True, whole=whole)
        else:
            slots = [slot for slot in model.layout.slots if slot.collection == name and slot.name in tree]
            yield HandedBack(name, tuple((slot.path, slot.holder is None) for slot in slots))


def _returns(output: Any) -> frozenset[str]:
    found = {"parts"} if type(output) in (tuple, list) else set()
    for leaf in jax.tree_util.tree_leaves(output):
        if not hasattr(leaf, "dtype"):
            found |= set() if isinstance(leaf, (bool, int, float, complex)) else {"objects"}
        elif jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            found.add("keys")
    return frozenset(found)


def _added(now: Mapping[str, Any], written: Mapping[str, Any]) -> Settings:
    """The switches that a call got besides what is written in it."""
    return tuple((name, value) for name, value in now.items() if name not in written and isinstance(value, bool))
