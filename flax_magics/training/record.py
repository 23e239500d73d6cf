"""The Run of a training, and the entry that its finished steps leave of the net."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from msgspec import Struct
from msgspec.structs import replace

from ..base.curve import ROW_ORDER, Curve
from ..base.measures import MeshUse, Timing, devices_of
from ..base.text import join
from ..base.types import PyTree
from ..compile.initialise import made_of
from ..compile.trace import TracedCall
from ..execution.call import Call
from ..execution.execute import RunVariables
from ..rng.keys import Draw, RunKeys
from ..run import RELEASED, ExportFacts, Note, Run
from ..state.entry import ModelEntry, NnxEntry, Replaced, by_kind
from ..state.state import State
from ..state.training import CodeDigests, Position, Training, TrainOptions
from ..state.weights import WeightSource
from .grad import LossCall
from .loss import METHOD
from .resumption import begun_as
from .step import Step, TrainState


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
      variables: those that it began with; `source`: where they came from, as they were then.
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
