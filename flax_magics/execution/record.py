"""Makes the Run of each command from what it did, and collects what it takes to write it again as plain Flax."""

from __future__ import annotations

import sys
import time
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import TypedDict, Unpack

import jax
from msgspec import Struct
from msgspec.structs import replace

from ..base.digest import bytes_of, is_key
from ..base.measures import MeshUse, devices_of
from ..base.text import join
from ..base.types import PyTree
from ..code.fingerprint import fingerprint
from ..code.library import nnx_modules
from ..compile.compiler import cost_of, devices_in, with_peak
from ..compile.disk_cache import settings
from ..line.expression import positional_names, with_arguments
from ..line.options import ApplyOptions
from ..models.base import Commit, ModelWithInit, Needs, Updates
from ..models.calls import Arguments
from ..models.switch import cloned, read_fields, setting_of, written_in_call
from ..rng.keys import Draw, DrawBatch, RunKeys
from ..run import MODULE, RELEASED, ContainerPart, ExportFacts, InitStats, Note, Run, Settings
from ..state.entry import ApplyRecipe, BuildRecipe, InitRecipe, ModelEntry, Origin, objects_in
from ..state.runs import RepeatedRun, StoredRun, length
from ..state.state import State
from .call import BoundCall, Call, prepare_init
from .execute import Execution, RunVariables


class Outcome(Struct, frozen=True, eq=False):
    """What a command worked out, for the session to commit.

    Attributes:
      made: the Run; None for a run of a line that ran before, whose Run is made when somebody asks for `run`.
      draw: the draw to take from the root key.
      entry: the model's new entry, None if it stays as it is.
      opened: name and draw if that model's next apply shall go on with the draw.
      write: writes into the user's own object, where that takes more than `commit`.
      commit: the changes to the variables of a module that holds them itself.
      committed: called once the run is part of the session.
      state: the session's state with all of this, where it was worked out while the device ran.
      arrays: output, inputs and sown values of a run that is not `made`; `copy` has the bytes of a small output.
    """

    made: Run | None
    stored: StoredRun
    draw: Draw | DrawBatch
    entry: ModelEntry | None = None
    opened: tuple[str, Draw] | None = None
    write: Callable[[], None] | None = None
    commit: Commit | None = None
    committed: Callable[[], None] | None = None
    state: State | None = None
    arrays: tuple[PyTree, PyTree, Mapping[str, PyTree]] = (RELEASED, RELEASED, {})
    copy: bytes = b""

    @property
    def runs(self) -> int:
        """How many runs the session has with this one, where `state` was worked out."""
        return 0 if self.state is None else length(self.state.runs)

    @property
    def repeated(self) -> RepeatedRun | None:
        """The run as the session keeps it, if its Run is not made."""
        return self.stored if isinstance(self.stored, RepeatedRun) else None

    @property
    def run(self) -> Run:
        """The Run. While somebody holds it, it is the session's, too."""
        if self.made is not None:
            return self.made
        assert isinstance(self.stored, RepeatedRun)
        return self.stored.run_of(*self.arrays)

    @property
    def output(self) -> PyTree:
        """The output of the run."""
        return self.arrays[0] if self.made is None else self.made.output


class Applied(Struct, frozen=True):
    """An apply that `apply_model` worked out.

    Attributes:
      recipe: what replays of its line's runs share.
      steady: notes that every run of the line has.
      keys_in_call: data of the keys that the user passed in the call.
    """

    outcome: Outcome
    execution: Execution
    recipe: ApplyRecipe
    steady: tuple[Note, ...]
    keys_in_call: tuple[bytes, ...]


def recipe_of(execution: Execution) -> ApplyRecipe:
    """What a replay takes besides keys, variables and inputs. The program is held weakly."""
    request, plan, arguments = execution.request, execution.plan, execution.arguments
    leaves, structure = jax.tree_util.tree_flatten(execution.built.request.variables)
    objects = objects_in(arguments.treedef, arguments.leaves, structure)
    findable = plan.program if execution.built.key is not None else None
    nnx = sys.modules.get("flax.nnx")
    # Objects that hold variables, whose values a run may change in place.
    moving = () if nnx is None else (*nnx_modules(), nnx.Variable)
    return ApplyRecipe(
        entry=request.entry.without_variables(),
        method=request.bound.call.method,
        options=request.options._replace(variables=None),
        taken=plan.taken and "params" in execution.result.needs.streams,
        settings=settings(),
        key=plan.model.cache_key(),
        program=None if findable is None else weakref.ref(findable),
        names=tuple(name if traced else None for name, traced in zip(arguments.names, arguments.traced, strict=True)),
        record=execution.result.trace,
        structure=structure,
        objects=fingerprint(objects) if objects else b"",
        moving=any(isinstance(leaf, moving) for leaf in arguments.leaves),
        inputs=sum(map(bytes_of, arguments.leaves)),
        variables=sum(map(bytes_of, leaves)),
        written=sum(map(bytes_of, jax.tree_util.tree_leaves(execution.result.updates))),
        pinned=request.entry.model.other_arrays(),
        placement=request.placement,
        shardings=execution.shardings,
    )


def stored_init(run: Run, recipe: InitRecipe | BuildRecipe) -> StoredRun:
    """An init of a linen model, or the construction of an NNX module, as the session keeps it."""
    size = sum(map(bytes_of, (*jax.tree_util.tree_leaves(run.inputs), *recipe.pinned)))
    return StoredRun(run, Origin(recipe, []), size)


class ApplyFields(TypedDict):
    """The fields of an apply's `Run` that its execution does not tell."""

    notes: tuple[Note, ...]
    started: float
    made: InitStats | None
    changed: Mapping[str, int]
    dropped: tuple[str, ...]
    first: bool
    registered: str


def run_of_apply(execution: Execution, written: Iterable[str], **fields: Unpack[ApplyFields]) -> Run:
    """The Run of an apply, from its execution; `written` are the collections that the run wrote."""
    request, plan, built, result = execution.request, execution.plan, execution.built, execution.result
    bound, options, draw, program = request.bound, request.options, request.draw, plan.program
    arrays = result.output, result.updates, result.sown
    own_streams = {layer.stream for layer in result.trace.layers if layer.stream}
    return Run(
        command="apply",
        model=plan.name,
        mode=execution.mode,
        call=bound.call.text,
        inputs=(bound.call.args, bound.kwargs),
        output=result.output,
        seed=draw.first.seed,
        draw=draw.first.number,
        samples=draw.size,
        keys=RunKeys(draw, plan.key_names(result.needs)),
        device=devices_of((result.output, built.request.variables)) if program is None else program.device,
        sown=result.sown,
        used={name: tuple(dict.fromkeys(map(join, paths))) for name, paths in result.trace.asked.items()},
        idle=tuple(sorted(own_streams - set(result.trace.asked))),
        program=built.origin,
        reason=built.reason,
        causes=built.causes,
        switch=", ".join((*bound.switch, *(f"axis {name}=1 device" for name in sorted(result.needs.axes)))),
        static=tuple(f"{name}={value}" for name, value in execution.arguments.static if name in execution.arguments.forced),
        timing=execution.timing,
        memory=None if program is None else with_peak(program.memory, devices_in(arrays)),
        cost=cost_of(program.executable) if program is not None and options.runs > 1 else None,
        limits=execution.limits,
        cell=bound.call.cell,
        by_hand=by_hand(bound, options, result.needs, {*written, *result.sown, *options.mutable}),
        weights=execution.variables.weights,
        replayed=options.keys_of is not None,
        spelling=facts_of_apply(execution),
        mesh=mesh_of(execution),
        **fields,
    )  # fmt: skip


def mesh_of(execution: Execution) -> MeshUse | None:
    """What a run made of the session's mesh; None where it ran without one."""
    placement, program = execution.request.placement, execution.plan.program
    if placement is None:
        return None
    held = None if program is None else weakref.ref(program)

    def text() -> str | None:
        program = None if held is None else held()
        return None if program is None else str(program.executable.as_text() or "")

    arguments, variables = execution.arguments.dynamic, execution.built.request.variables
    return placement.use(arguments, variables, execution.result.output, text)


def run_of_key(name: str, draw: Draw, cell: int | None, *, first: bool) -> Run:
    """The Run of a key that was drawn under a name; its output is the key."""
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
    """What an export needs to write an apply as plain Flax."""
    bound, result, variables = execution.request.bound, execution.result, execution.variables
    taken = execution.plan.taken and "params" in result.needs.streams
    facts = facts_of_call(bound, variables, execution.arguments, result.needs, taken=taken)
    facts = replace(facts, sown=bool(result.sown), returns=_returns(result.output))
    handed = result.output[1] if execution.request.options.mutable else {}
    return in_mode_of(bound, facts, kept=result.updates, sown=result.sown, handed=handed)


def facts_of_call(
    bound: BoundCall, variables: RunVariables, arguments: Arguments, needs: Needs, *, taken: bool
) -> ExportFacts:
    """What an export needs of a call, whatever is run of it."""
    call, registered = bound.call, variables.entry.model
    parameters = tuple(positional_names(bound.signature, len(call.args)))
    static = frozenset(name for name, _ in arguments.static)
    passed = [*zip(parameters, call.args, strict=True), *call.kwargs.items()]
    init = ExportFacts(init_streams=registered.init_streams)
    if variables.made is not None:
        # The init gets the keys of `--key`, but no switch that the run's mode added.
        kwargs = {n: v for n, v in bound.kwargs.items() if n in call.kwargs or not isinstance(v, bool)}
        init = facts_of_init(replace(call, kwargs=kwargs), variables.entry.linen.model)
    return replace(
        init,
        parameters=parameters,
        static=static,
        containers=tuple((name, _part(value, name, static)) for name, value in passed if _holds(name, static)),
        streams=tuple(sorted(needs.streams)),
        taken=taken,
        arguments=_added(bound.kwargs, call.kwargs),
        axes=tuple(sorted(needs.axes)),
        code=registered.code(),
    )


def in_mode_of(bound: BoundCall, facts: ExportFacts, *, kept: Updates, sown: Updates, handed: Updates) -> ExportFacts:
    """The facts with how the call's mode is set, and what the model makes of the updates."""
    call, train = bound.call, None if bound.mode == "as written" else bound.mode == "train"
    in_call = {*dict(facts.arguments), *written_in_call(bound.signature, call.args, call.kwargs)}
    switches = () if train is None else map(setting_of, bound.switch)
    fields = tuple(setting for setting in switches if setting[0] not in in_call)
    return bound.model.facts_of_run(facts, train, fields, kept=kept, sown=sown, handed=handed)


def facts_of_init(call: Call, model: ModelWithInit) -> ExportFacts:
    """What an export needs to write the init of a linen model as plain Flax."""
    to_init, init_call = prepare_init("", model, call)
    as_written, switches = read_fields(model.module), read_fields(to_init.module)
    module = cloned(MODULE, model.module, map(setting_of, switches) if as_written != switches else ())
    arguments = _added(init_call.kwargs, call.kwargs)
    return ExportFacts(init_arguments=arguments, init_module=module, init_streams=model.init_streams)


def _holds(name: str, static: frozenset[str]) -> bool:
    """Whether a leaf inside the argument `name` is static."""
    return any(leaf.startswith((f"{name}[", f"{name}.")) for leaf in static)


def _part(value: PyTree, name: str, static: frozenset[str]) -> ContainerPart:
    """Describes `value`, which stands at the path `name`, part by part down to its static leaves."""
    if value is None:
        return ContainerPart("none")
    if name in static:
        return ContainerPart("choice")
    if not _holds(name, static):
        return ContainerPart("data")
    rows: list[tuple[str | int, PyTree]] = []
    if type(value) is dict and all(type(key) in (str, int) for key in value):
        rows += value.items()
    elif type(value) in (list, tuple):
        rows += enumerate(value)
    kind = type(value).__name__ if rows else "other"
    return ContainerPart(kind, tuple((key, _part(inner, f"{name}[{key!r}]", static)) for key, inner in rows))


def _returns(output: PyTree) -> frozenset[str]:
    """What the output has besides arrays (`keys`, `objects`, `parts`), see `ExportFacts.returns`."""
    kinds = {"parts"} if type(output) in (tuple, list) else set()
    for leaf in jax.tree_util.tree_leaves(output):
        if is_key(leaf):
            kinds.add("keys")
        elif not hasattr(leaf, "dtype") and not isinstance(leaf, (bool, int, float, complex)):
            kinds.add("objects")
    return frozenset(kinds)


def _added(kwargs: Mapping[str, PyTree], written: Mapping[str, PyTree]) -> Settings:
    """The boolean switches that the mode added to the keywords written in the call."""
    return tuple((name, value) for name, value in kwargs.items() if name not in written and isinstance(value, bool))


def by_hand(bound: BoundCall, options: ApplyOptions, needs: Needs, mutable: set[str]) -> str:
    """The run as plain Flax; `mutable` are the collections to make mutable."""
    call = bound.call
    in_call = written_in_call(bound.signature, call.args, bound.kwargs)
    switch = tuple(setting for setting in bound.switch if options.mode and setting.partition("=")[0] not in in_call)
    added = [f"{name}={value}" for name, value in bound.kwargs.items() if name not in call.kwargs]
    text = with_arguments(call.text, [*(f"{name}={name}_key" for name in options.key), *added])
    keys = tuple(f"{name}_key" for name in dict.fromkeys((*options.key, *sorted(needs.streams))))
    needs, samples = replace(needs, mutable=frozenset(mutable)), None if options.samples is None else keys
    return bound.model.by_hand(text, call.method, switch, needs, samples=samples)
