"""The Run of each command, from what it did, and what it takes to write it again as plain Flax."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax

from ..base.digest import bytes_of
from ..base.environment import devices_of
from ..base.text import join
from ..code.fingerprint import fingerprint
from ..code.library import nnx_modules
from ..code.walk import arrays_in
from ..compile.compiler import settings
from ..compile.limits import cost_of, devices_in, with_peak
from ..line.expression import positional_names, with_arguments
from ..line.options import ApplyOptions
from ..models.base import Commit, Model, ModelWithInit, ModelWithVariables, Needs
from ..models.linen_trace import inside
from ..models.switch import cloned, read_fields, setting_of, written_in_call
from ..rng.keys import Draw, DrawBatch, RunKeys
from ..run import MODULE, ContainerPart, ExportFacts, HandedBack, InitStats, ModeByHand, Note, Run, Settings
from ..state.entry import ApplyRecipe, ModelEntry, objects_in
from ..state.runs import StoredRun
from .call import BoundCall, Call, prepare_init
from .execute import Execution


class Outcome(NamedTuple):
    """What a command worked out, for the session to make part of itself.

    Attributes:
      draw: what it took from the root key.
      entry: the model as it is to be kept, None: as it is.
      opened: the model whose next apply goes on with the draw.
      write: writes into the user's own object, where that takes more than `commit`.
      commit: what the run changed in a module that holds its own variables.
    """

    run: Run
    stored: StoredRun
    draw: Draw | DrawBatch
    entry: ModelEntry | None = None
    opened: tuple[str, Draw] | None = None
    write: Callable[[], None] | None = None
    commit: Commit | None = None


@dataclass(frozen=True)
class Applied:
    """An apply where everything was found out.

    Attributes:
      recipe: what replays of its line have in common.
      steady: notes that every run of its line has.
      keys_in_call: data of keys that the user passed in the call.
    """

    outcome: Outcome
    execution: Execution
    recipe: ApplyRecipe
    steady: tuple[Note, ...]
    keys_in_call: tuple[bytes, ...]


def recipe_of(execution: Execution) -> ApplyRecipe:
    """What running it again takes besides keys, variables and inputs. Its program is held weakly."""
    request, plan, arguments = execution.request, execution.plan, execution.arguments
    model = request.entry.model
    leaves, structure = jax.tree_util.tree_flatten(execution.built.request.variables)
    objects = objects_in(arguments.treedef, arguments.leaves, structure)
    findable = plan.program if execution.built.key is not None else None
    return ApplyRecipe(
        entry=without_variables(request.entry),
        skeleton=model.layout.skeleton if model.holds_variables else None,
        method=request.call.method,
        options=replace(request.options, variables=None),
        taken=plan.taken and "params" in execution.result.needs.streams,
        settings=settings(),
        key=plan.model.cache_key(),
        program=None if findable is None else weakref.ref(findable),
        names=tuple(name if traced else None for name, traced in zip(arguments.names, arguments.traced, strict=True)),
        record=execution.result.trace,
        structure=structure,
        objects=fingerprint(objects) if objects else b"",
        moving=any(isinstance(leaf, _moving()) for leaf in arguments.leaves),
        inputs=sum(map(bytes_of, arguments.leaves)),
        variables=sum(map(bytes_of, leaves)),
        written=sum(map(bytes_of, jax.tree_util.tree_leaves(execution.result.updates))),
        # Of a module that holds its variables only classes are kept, which NNX keeps for ever itself.
        pinned=() if model.holds_variables else tuple(arrays_in(model.module)),
    )


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


def run_of_apply(
    execution: Execution,
    changed: Iterable[str],
    notes: tuple[Note, ...],
    *,
    started: float,
    made: InitStats | None,
    changes: Mapping[str, int],
    replayed: bool,
    first: bool,
) -> Run:
    """An apply, from its execution.

    Args:
      changed: collections that the run wrote; `changes`: those that are kept → how many runs have written them.
    """
    request, variables, plan, built, result = (
        execution.request,
        execution.variables,
        execution.plan,
        execution.built,
        execution.result,
    )
    bound, call, options, draw = request.bound, request.call, request.options, request.draw
    program, arrays = plan.program, (result.output, result.updates, result.sown)
    timing, built_in = result.timing, built.timing
    handed = {*changed, *result.sown, *options.mutable}
    return Run(
        command="apply",
        model=plan.name,
        mode=execution.mode,
        call=call.text,
        inputs=(bound.args, bound.kwargs),
        output=result.output,
        seed=draw.first.seed,
        draw=draw.first.number,
        draws=draw.size,
        keys=RunKeys(draw, plan.key_names(result.needs)),
        device=devices_of((result.output, built.request.variables)) if program is None else program.device,
        started=started,
        sown=result.sown,
        used={name: tuple(dict.fromkeys(map(join, paths))) for name, paths in result.trace.asked.items()},
        changed=changes,
        program=built.origin,
        reason=built.reason,
        causes=built.causes,
        switch=", ".join((*bound.switch, *(f"axis {name}=1 device" for name in sorted(result.needs.axes)))),
        static=tuple(f"{name}={value}" for name, value in execution.arguments.static if name in execution.arguments.forced),
        timing=replace(
            timing, trace=built_in.trace, lower=built_in.lower, compile=built_in.compile, beside=built_in.beside,
            init=variables.seconds,
        ),
        memory=None if program is None else with_peak(program.memory, devices_in(arrays)),
        cost=cost_of(program.executable) if program is not None and options.runs > 1 else None,
        limits=execution.limits,
        cell=call.cell,
        notes=notes,
        made=made,
        by_hand=by_hand(bound, call, options, result.needs, handed),
        weights=variables.weights,
        replayed=replayed,
        first=first,
        spelling=facts_of_apply(execution),
    )  # fmt: skip


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


def facts_of_apply(execution: Execution) -> ExportFacts:
    """The spelling of an apply, from its execution."""
    call, prepared, result = execution.request.call, execution.request.bound, execution.result
    entry = execution.variables.entry
    model, registered = prepared.model, entry.model
    holds = model.holds_variables
    arguments = _added(prepared.kwargs, call.kwargs)
    module = MODULE
    if prepared.mode != "as written":
        in_call = {*dict(arguments), *written_in_call(prepared.signature, call.args, call.kwargs)}
        fields = () if holds else tuple(pair for pair in map(setting_of, prepared.switch) if pair[0] not in in_call)
        module = MODULE if holds else cloned(MODULE, model.module, fields)
    init_arguments: Settings = ()
    init_module = MODULE
    if execution.variables.made is not None and not holds:
        # With the keys that `--key` adds, and without the switches of the run.
        given = {n: v for n, v in prepared.kwargs.items() if n in call.kwargs or not isinstance(v, bool)}
        init_arguments, init_module = _switches_of_init(replace(call, kwargs=given), registered)
    written = () if holds else tuple(sorted(result.updates))
    parameters = tuple(positional_names(prepared.signature, len(call.args)))
    static = frozenset(name for name, _ in execution.arguments.static)
    passed = [*zip(parameters, call.args, strict=True), *call.kwargs.items()]
    return ExportFacts(
        parameters=parameters,
        static=static,
        containers=tuple((name, _part(value, name, static)) for name, value in passed if _holds(name, static)),
        streams=tuple(sorted(result.needs.streams)),
        held=model.layout.tags if model.holds_variables else frozenset(),
        handed=bool(model.supplied_arguments()),
        taken=execution.plan.taken and "params" in result.needs.streams,
        arguments=arguments,
        nnx=holds,
        module=module,
        mode=_mode(registered, prepared.mode == "train")
        if registered.holds_variables and prepared.mode != "as written"
        else None,
        mutable=() if holds else tuple(sorted({*written, *result.sown})),
        kept=written,
        sown=bool(result.sown),
        axes=tuple(sorted(result.needs.axes)),
        init_arguments=init_arguments,
        init_module=init_module,
        init_streams=() if registered.holds_variables else registered.init_streams,
        returns=_returns(result.output),
        given=tuple(_given(execution)),
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


def _given(execution: Execution) -> Iterator[HandedBack]:
    """The collections in the updates of an NNX run that was asked for some."""
    model, sown = execution.plan.model, execution.result.sown
    if not execution.request.options.mutable or not model.holds_variables:
        return
    for name, tree in execution.result.output[1].items():
        if name in sown:
            leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda part: not isinstance(part, dict))
            steps = [tuple(str(key.key) for key in path) for path, _ in leaves]
            paths = [tuple(int(step) if step.isdigit() else step for step in path) for path in steps]
            whole = len(sown) == 1 and paths == steps
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


def by_hand(prepared: BoundCall, call: Call, options: ApplyOptions, ask: Needs, mutable: set[str]) -> str:
    """The run as plain Flax, with what the model asked for and the collections that are to be mutable."""
    streams = tuple(sorted(ask.streams))
    in_call = written_in_call(prepared.signature, prepared.args, prepared.kwargs)
    switch = tuple(setting for setting in prepared.switch if options.mode and setting.partition("=")[0] not in in_call)
    added = [f"{name}={value}" for name, value in prepared.kwargs.items() if name not in call.kwargs]
    text = with_arguments(call.text, [*(f"{name}={name}_key" for name in options.key), *added])
    code = prepared.model.by_hand(text, call.method, switch, streams, tuple(sorted(mutable)))
    code = inside(ask.axes, code)
    if options.draws is None:
        return code
    return draws_by_hand(code, (*options.key, *streams), prepared.model.holds_variables)


def draws_by_hand(code: str, keys: Iterable[str], holds_variables: bool) -> str:
    """The run of one draw, `code`, for many: mapped over its keys (linen) or one by one (NNX)."""
    names = [f"{name}_key" for name in dict.fromkeys(keys)]
    if not names:
        return code
    many = ", ".join(f"{name}s" for name in names)
    if holds_variables:
        each = f"{names[0]} in {many}" if len(names) == 1 else f"{', '.join(names)} in zip({many})"
        return f"for {each}:\n    {code}"
    return f"jax.vmap(lambda {', '.join(names)}: {code})({many})"
