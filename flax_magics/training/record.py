"""The Run of a training, the entry that its finished steps leave of the net, and looks at `--eval` data on the way."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, cast

import jax
import numpy as np
from msgspec import Struct
from msgspec.structs import replace

from ..base.measures import EVAL, ROW_ORDER, Curve, Evaluation, MeshUse, Timing, devices_of
from ..base.text import join
from ..base.types import PyTree
from ..compile.cache import Program
from ..compile.initialise import made_of
from ..compile.placement import agree
from ..compile.trace import TracedCall, TraceRequest
from ..errors import FlaxMagicsError
from ..execution import record
from ..execution.call import Call
from ..execution.execute import ApplyRequest, RunVariables, wanted_of
from ..models.base import Variables
from ..models.calls import signature_of
from ..rng.keys import Draw, RunKeys, StepDraw
from ..run import RELEASED, ExportFacts, LookFacts, Note, Run
from ..state.entry import ModelEntry, NnxEntry, Replaced, by_kind
from ..state.state import State
from ..state.training import CodeDigests, Position, Training, TrainOptions
from ..state.weights import WeightSource
from .data import in_order, is_arrays
from .grad import LossCall
from .loop import LeftOut
from .loss import METHOD, Loss
from .resumption import begun_as
from .step import Step, TrainState

if TYPE_CHECKING:
    from ..compile.trace import TracedCall
    from ..execution.call import BoundCall
    from ..execution.execute import RunVariables
    from ..run import ExportFacts


class Progress(Struct, frozen=True):
    """Finished steps, for the session to commit.

    Attributes:
      run: what has happened so far.
      entry: the net's new entry.
      draw: the draw of it all.
      write: writes the variables into the user's NNX module; None for linen.
      resumed: it went on with an earlier training, whose Run it takes the place of.
      changes: see `Training`.
    """

    run: Run
    entry: ModelEntry
    draw: Draw
    write: Callable[[], None] | None
    resumed: bool
    changes: tuple[str, ...]


class TrainingRecord(Struct, frozen=True, eq=False):
    """What a training has from its beginning on, of which its Runs are made.

    Attributes:
      state: of the session, before it.
      call: as the user wrote it, all the data in it.
      options: completed.
      variables: those that it began with; `source`: where they came from, as they were then; None where it made them.
      traced: the loss.
      taken: the draw's `params` key is used already, see `Draw.stream`.
      streams: those that its steps take.
      arrays: its data are arrays, and no iterable of batches.
      resumed: what it goes on with; None for a new training.
      started: when it began, as `time.time` has it.
      inputs, changes, code: see `Training`.
    """

    state: State
    ready: LossCall
    call: Call
    options: TrainOptions
    variables: RunVariables
    source: WeightSource | None
    traced: TracedCall[None]
    step: Step
    taken: bool
    streams: tuple[str, ...]
    arrays: bool
    resumed: Training | None
    started: float
    spelling: ExportFacts
    inputs: Mapping[str, str]
    changes: tuple[str, ...]
    code: CodeDigests

    def progress(
        self,
        state: TrainState,
        curve: Curve,
        position: Position | None,
        *,
        notes: tuple[Note, ...],
        program: str,
        timing: Timing,
        final: bool,
        mesh: MeshUse | None = None,
        replaced: Replaced | None = None,
    ) -> Progress:
        """What there is to commit after the finished steps.

        Args:
          position: see `Training`.
          program: where it came from.
          final: nothing comes after it: then the Run has the variables, which are read for its digest.
          mesh: what it makes of the session's mesh.
          replaced: the weights from before it, where they are kept for `models[name].previous`.
        """
        ready, values = self.ready, dict(state.variables)
        entry = self._entry_after(state, curve, position, final=final)
        entry = entry if replaced is None else replace(entry, replaced=replaced)
        output = self.step.loss.as_users(values) if final else RELEASED
        run = self._run(curve, output, entry, notes=notes, program=program, timing=timing, device=devices_of(values))
        run = run if mesh is None else replace(run, mesh=mesh)
        resumed = self.resumed is not None
        run = begun_as(run, self.state.runs if resumed else None)
        return Progress(run, entry, ready.request.draw.first, _write(entry, ready, values), resumed, self.changes)

    def _entry_after(self, state: TrainState, curve: Curve, position: Position | None, *, final: bool) -> ModelEntry:
        """The net's entry after the finished steps."""
        options, ready, request = self.options, self.ready, self.ready.request
        users = self.state.models.get(ready.entry.name, ready.entry)
        before, loss, steps = self.variables.entry, self.step.loss, len(curve.losses)
        training = Training(
            draw=request.draw.first,
            taken=self.taken,
            opt_state=state.opt_state,
            call=self.call.text,
            batch=options.batch,
            epochs=options.epochs,
            steps=options.steps,
            curve=curve,
            eval=options.eval_text,
            freeze=options.freeze,
            group=curve.group,
            inputs=self.inputs,
            changes=self.changes,
            code=self.code,
            position=position,
            mesh="" if request.placement is None else request.placement.axes,
        )
        resumed = 0 if self.resumed is None else self.resumed.step
        new = steps - resumed
        counts = {name: before.update_counts.get(name, 0) + new for name in loss.written(self.traced.trace)}
        source = WeightSource.trained(self.source, request.draw.first, steps, resumed)
        return replace(
            before.trained(state.variables, source, last=final),
            model=users.model if ready.anew else ready.entry.model,
            known_needs={**before.known_needs, (METHOD, request.bound.mode): self.traced.needs},
            static_ints=before.static_ints | {(METHOD, name) for name in self.step.arguments.forced},
            update_counts={**before.update_counts, **counts},
            optimizer=options.optimizer,
            training=training,
        )

    def _run(
        self,
        curve: Curve,
        output: PyTree,
        entry: ModelEntry,
        *,
        notes: tuple[Note, ...],
        program: str,
        timing: Timing,
        device: str,
    ) -> Run:
        """The Run of the finished steps."""
        request, ready, trace, loss = self.ready.request, self.ready, self.traced.trace, self.step.loss
        bound, draw, name = request.bound, request.draw.first, ready.entry.name
        names = {stream: (stream, False) for stream in ("params", "dropout", *self.streams)}
        if self.taken and "params" in self.streams:
            names["params (folded)"] = ("params", True)
        if self.options.batch is not None:
            names[ROW_ORDER] = (ROW_ORDER, False)
        made = made_of(ready.entry.nnx.model.collections()) if ready.anew else self.variables.made
        counts = {
            written: entry.update_counts[written]
            for written in sorted(loss.written(trace))
            if written in entry.update_counts
        }
        return Run(
            command="train",
            model=name,
            mode="train",
            call=bound.call.text,
            # An iterable is no tree of arrays: its first batch stands for it.
            inputs=(self.call.args if self.arrays else request.call.args, bound.kwargs),
            output=output,
            seed=draw.seed,
            draw=draw.number,
            keys=RunKeys(draw, names),
            used={stream: tuple(dict.fromkeys(map(join, paths))) for stream, paths in trace.asked.items()},
            changed={**dict.fromkeys(sorted(loss.trainable()), len(curve.losses)), **counts},
            device=device,
            started=self.started,
            program=program,
            switch=", ".join(bound.switch),
            timing=timing,
            cell=self.call.cell,
            notes=notes,
            made=made,
            weights=self.variables.weights,
            first=self.state.runs is None,
            registered="" if name in self.state.models else entry.model.describe(),
            trained=curve,
            spelling=self.spelling,
        )


def _into_module(entry: NnxEntry, ready: LossCall, values: dict[str, PyTree]) -> Callable[[], None] | None:
    model = entry.model

    def write() -> None:
        if ready.anew:
            model.become(ready.entry.nnx.model)
            model.has_same_layout()
        model.assign(values)

    return write


_write = by_kind(lambda entry, ready, values: None, _into_module)


def facts_of_training(
    bound: BoundCall, variables: RunVariables, traced: TracedCall[None], written: Iterable[str], *, taken: bool
) -> ExportFacts:
    """What an export needs to write a training; `written`: collections that its steps write besides the parameters."""
    taken = taken and "params" in traced.needs.streams
    facts = record.facts_of_call(bound, variables, traced.request.arguments, traced.needs, taken=taken)
    metrics = traced.traced.out_info[0][1] is not None
    facts = replace(facts, returns=frozenset({"metrics"} if metrics else ()))
    kept: dict[str, object] = dict.fromkeys(written)
    facts = record.in_mode_of(bound, facts, kept=kept, sown=dict.fromkeys(traced.trace.sown), handed={})
    return replace(facts, mutable=tuple(sorted(kept))) if facts.nnx else facts


class Look:
    """Evaluates a state; called with the number of finished steps and the variables.

    Args:
      request: the training's.
      entry: of the net, with its variables.
      text, data: the `--eval` data, and how they are written.
      batch: how many rows of arrays are looked at at once; None for all.

    Attributes:
      facts: what an export needs to write a look; None before the first.
    """

    facts: LookFacts | None = None
    _call: ExportFacts

    def __init__(
        self, request: ApplyRequest, draw: Draw, entry: ModelEntry, *, text: str, data: PyTree, batch: int | None
    ) -> None:
        self._request, self._draw, self._entry = request, draw, entry
        self._text, self._data, self._batch = text, data, batch
        self._is_whole = batch is None and is_arrays(data)
        """All of it is one batch."""
        self._programs: dict[object, tuple[Program, TraceRequest]] = {}
        """Shapes of a batch → the program of the loss alone, and what it was made for."""
        if data is not None:  # what the call cannot be in evaluation mode is told before the first step
            _ = replace(request, options=request.options._replace(mode="eval")).bound

    def __call__(self, step: int, variables: Variables, left_out: LeftOut) -> Evaluation:
        """The means over all batches, each weighed by its examples; programs are compiled in a block of `left_out`."""
        values: dict[str, list[float]] = {"": []}
        sizes: list[int] = []
        for number, (tree, size) in enumerate(in_order(self._text, self._data, self._batch)):
            placement = self._request.placement
            tree = tree if placement is None else placement.of_batch(tree)
            program, request = self._program(tree, variables, left_out)
            # Each batch has numbers of its own, and each look those of the one before it, so that looks are comparable.
            draw = StepDraw.of(self._draw, number)
            keys = {name: draw.words(f"{EVAL} {name}") for name in sorted(program.needs.streams)}
            programs, dynamic = self._request.services.programs, request.arguments.dynamic
            (value, metrics), _ = programs.run(program, request.variables, keys, dynamic)
            for name, scalar in {"": value, **(metrics or {})}.items():
                values.setdefault(name, []).append(float(scalar))
            sizes.append(size)
        if not sizes:
            raise FlaxMagicsError(f"`{self._text}` has no batch: there is nothing to look at.")
        returns = frozenset() if metrics is None else frozenset({"metrics"})
        self.facts = LookFacts(replace(self._call, returns=returns), is_arrays(self._data))
        if self._is_whole:
            means = {name: value for name, (value,) in values.items()}
        else:
            means = {name: float(np.average(each, weights=sizes)) for name, each in values.items()}
        return Evaluation(step, means.pop(""), means)

    def _program(self, tree: PyTree, variables: Variables, left_out: LeftOut) -> tuple[Program, TraceRequest]:
        """The program for a batch, and its inputs."""
        call, services = self._request.call, self._request.services
        asked = replace(
            self._request,
            call=replace(call, args=(tree, *call.args[1:])),
            options=self._request.options._replace(mode="eval"),
        )
        bound = asked.bound
        request = wanted_of(asked, self._entry, variables)
        request = replace(request, model=replace(cast("Loss", bound.model), graded=False).as_model())
        shapes = tuple(map(signature_of, jax.tree_util.tree_leaves(tree)))
        if shapes not in self._programs:

            def phase(name: str) -> None:
                services.on_phase(f"{name} {self._request.entry.name}")

            with left_out():
                begun = services.programs.start(request, phase)
                what = f"the look at {self._text}"
                agree(services, request.placement, self._draw, what, digest=begun.digest, tree=tree)
                built = services.programs.finish(begun, phase)
            assert built.program is not None
            # Without the variables of this look, which no later one needs.
            bare = replace(built.request, variables=dict.fromkeys(built.request.variables))
            self._programs[shapes] = built.program, bare
            needs, values = built.program.needs, RunVariables(self._entry, variables)
            facts = record.facts_of_call(bound, values, built.request.arguments, needs, taken=False)
            # An NNX module may be given streams that evaluation does not ask for.
            facts = replace(facts, streams=tuple(sorted(needs.streams & built.program.trace.asked.keys())))
            self._call = record.in_mode_of(bound, facts, kept=dict.fromkeys(needs.mutable), sown={}, handed={})
        program, known = self._programs[shapes]
        now = request.arguments
        arguments: Any = replace(known.arguments, leaves=now.leaves, placed=now.placed)
        held = {name: variables[name] for name in known.variables}
        return program, replace(known, variables=held, arguments=arguments)
