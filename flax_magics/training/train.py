"""Works out `%flax_train`: one draw, the steps of a loop, and the Run of them. The session is changed by `commit` alone."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from functools import cached_property
from typing import cast

import jax
import numpy as np
from flax.core import unfreeze
from msgspec.structs import replace

from ..base.measures import ROW_ORDER, Curve, MeshUse, Timing
from ..base.text import clean, plural
from ..base.threads import Interrupts, Overtaken
from ..compile.cache import Services
from ..compile.initialise import made_of
from ..compile.placement import in_force, put
from ..compile.trace import TracedCall, trace_call
from ..errors import FlaxMagicsError, written
from ..execution import notes
from ..execution.call import Call, initialising, prepare_init
from ..execution.execute import RunVariables, held_variables, placed, plain_errors, wanted_of, with_added
from ..models.base import MissingVariables
from ..run import Note, Run
from ..state.entry import ModelEntry, Replaced
from ..state.state import State
from ..state.training import Training, TrainOptions
from ..state.weights import PREVIOUS, WeightSource
from . import data as training_data
from . import diagnosis, record, resumption
from .data import ArrayData, Data
from .diagnosis import ROWS, notes_of_unused, why_of_step
from .grad import LossCall, of_freeze
from .loop import NotFinite, Schedule, TrainingLoop, started
from .loss import Loss
from .mistakes import mistakes_told, notes_of_last, without_net
from .programs import Groups, StepPrograms, Together, shapes_of
from .record import Look, Progress, TrainingRecord
from .step import Step

STILL = 50
"""After so many steps of the same loss something is wrong."""
EXPLODED = 1e3
"""A loss of so many times the first one was on its way to infinity."""
OFTEN = 0.1
"""Seconds between two commits of finished steps, at least."""
SHOWN = 0.5
"""Seconds between two calls of `on_progress`, at least."""


def train_model(
    state: State,
    entry: ModelEntry,
    loss: Loss,
    call: Call,
    options: TrainOptions,
    *,
    services: Services,
    said: tuple[Note, ...],
    commit: Callable[[Progress], None],
    limit: int,
) -> Run:
    """Trains a net.

    Args:
      loss: of the entry's model.
      call: its arguments are those after the net: the data first.
      said: notes from finding the entry.
      commit: makes the finished steps part of the session.
      limit: bytes of weights from before it that may be kept where it diverges.

    Raises:
      FlaxMagicsError: a mistake in the call, or a step that is not finite. What the loss raises is passed on.
    """
    line = f"{call.command} {call.text}"
    resumed = resumption.resumed_of(entry, call) if options.resume else None
    options = resumption.completed(entry, options, resumed, line)
    if not call.args:
        message = f"`{call.text}` gives no data: they come right after the net."
        raise FlaxMagicsError(message, form=f"{call.command} {loss.name}({entry.name}, …)")
    text = resumption.data_text(call.text)
    training_data.check(text, call.args[0], options.batch, line)
    if options.eval is not None:
        training_data.check_looks(options.eval_text, options.eval, line)
    begin, finished = (None, 0) if resumed is None else (resumption.position_of(resumed), resumed.step)
    most = None if options.steps is None else max(1, options.steps - finished)
    placement = in_force(state.placement)
    with closing(training_data.data_of(text, call.args[0], options.batch, begin, most, placement=placement)) as data:
        if placement is not None:
            training_data.check_divides(text, data, options.batch, placement, line)
        of_batch = replace(call, args=(data.first, *call.args[1:]))
        again = None if resumed is None else (resumed.draw, resumed.taken)
        with plain_errors(of_batch, placement), mistakes_told(loss, call, options.batch):
            ready = LossCall.of(state, entry, loss, of_batch, services, mode="train", said=said, again=again)
            trainer = Trainer(state, ready, call, options, data, said=said, resumed=resumed, commit=commit, limit=limit)
            return trainer.train()


class Trainer:
    """One training, from its loss to its last step; see `train_model` for the arguments.

    Args:
      ready: the loss with its first batch.
      options: completed.
      resumed: what it goes on with; None for a new training.
    """

    def __init__(
        self,
        state: State,
        ready: LossCall,
        call: Call,
        options: TrainOptions,
        data: Data,
        *,
        said: tuple[Note, ...],
        resumed: Training | None,
        commit: Callable[[Progress], None],
        limit: int = 0,
    ) -> None:
        self.ready, self.call, self.options, self.data, self.limit = ready, call, options, data, limit
        self.resumed, self.commit, self.refill = resumed, commit, ""
        self.request, self.services = ready.request, ready.request.services
        self.draw, self.name = ready.request.draw.first, ready.entry.name
        started = time.time()
        self.timing = Timing()
        self._committed = self._shown = time.perf_counter()
        self._has_committed = False
        if isinstance(data, ArrayData):
            data.key = self.draw.stream(ROW_ORDER)
        self.prepare()
        assert options.optimizer is not None
        code = resumption.code_of(ready.entry, ready.loss, options.optimizer)
        inputs = resumption.inputs_of(ready.loss, call, options.eval)
        changes: tuple[str, ...] = ()
        if resumed is not None:
            changes = (
                *map(clean, resumed.changes),
                *resumption.changes_of(resumed, ready.entry, call, options, code=code, inputs=inputs),
                *resumption.change_of_mesh(resumed, self.request.placement),
            )
        bound, written_to = self.request.bound, self.loss.written(self.traced.trace)
        self.record = TrainingRecord(
            state=state,
            ready=ready,
            call=call,
            options=options,
            variables=self.variables,
            source=None if self.initialises else self.variables.entry.source_now(),
            traced=self.traced,
            step=self.step,
            taken=self.taken,
            streams=tuple(self.keys),
            arrays=isinstance(data, ArrayData),
            resumed=resumed,
            started=started,
            spelling=record.facts_of_training(bound, self.variables, self.traced, written_to, taken=self.taken),
            inputs=inputs,
            changes=changes,
            code=code,
        )
        self.notes = (*said, *self._notes())

    # -- before the first step

    def prepare(self) -> None:
        """Finds or initialises the variables, traces what the loss asks for, and makes the optimizer's state."""
        services, bound = self.services, self.request.bound
        self.loss = cast("Loss", bound.model)
        variables = held_variables(self.request)
        self.initialises = variables is None
        if variables is None:
            with self.timed("init"):
                variables = self._initialise()
        services.on_phase(f"tracing {self.name}")
        with self.timed("trace"):
            # Of what the draw makes again the shapes alone: some versions of JAX keep what is traced.
            traced_with = shapes_of(variables.values) if self.initialises else variables.values
            request = wanted_of(self.request, variables.entry, traced_with)
            request = replace(request, model=replace(self.loss, graded=False).as_model())
            try:
                self.traced: TracedCall[None] = trace_call(request)
            except MissingVariables as error:  # a method needs some that the first init did not make
                self.initialises, variables = False, with_added(self.request, variables, error)
                self.traced = trace_call(replace(request, variables=variables.values))
        self.variables, self.made = variables, tuple(notes.of_params(variables.values) if variables.made else ())
        options, optimizer = self.options, self.options.optimizer
        assert optimizer is not None
        arguments = self.traced.request.arguments
        self.step = Step(
            self.loss,
            self.traced.needs,
            optimizer.transformation,
            arguments,
            arguments.names[: len(jax.tree_util.tree_leaves(self.data.first))],
            self.draw.impl,
            placement=self.request.placement,
        )
        # A step gives dicts, whatever the user has given.
        values = unfreeze(dict(self.traced.request.variables))
        if self.initialises:
            values = unfreeze({name: variables.values[name] for name in values})
            self._forget_first()
        trained = self.loss.as_users(self.loss.parameters(values))
        if self.resumed is None:
            opt_state = optimizer.transformation.init(trained)
        else:
            last = self.ready.entry.optimizer or optimizer
            command = self.call.command
            if optimizer.text not in command:  # it was not written in a line
                command = f"%flax_train --resume --optimizer {optimizer.text}"
            opt_state = resumption.fitted_state(self.resumed, optimizer, trained, last, f"{command} {self.call.text}")
        placement = self.request.placement
        if placement is not None:
            opt_state = placement.of_variables(opt_state, self.loss.model.annotations(), before=placement)
        self.task = resumption.task_of(
            options, self.resumed, arrays=isinstance(self.data, ArrayData), once=self.data.once
        )
        self.task = replace(self.task, on_host=isinstance(self.data, ArrayData) and not self.data.held)
        per_epoch = self.data.per_epoch
        if self.resumed is not None and not (self.data.counted and per_epoch):
            per_epoch = self.resumed.curve.epoch or per_epoch
        looks = options.eval is not None
        schedule = Schedule(options.epochs, options.steps, per_epoch, looks=looks, counted=self.data.counted)
        finished = 0 if self.resumed is None else self.resumed.step
        position = self.data.position
        if position is not None and position.epoch and not position.batches:
            schedule.end_epoch(finished, position.epoch)
        if finished and schedule.total is not None and schedule.total < finished:
            message = f"{plural(finished, 'step')} are finished already, and the total is {schedule.total}."
            longer = f"%flax_train --resume --steps {2 * finished} {self.call.text}"
            raise FlaxMagicsError(message, **written(longer))
        self.taken = self.variables.taken
        taken = {name: self.taken and name == "params" for name in self.traced.needs.streams}
        keys = {name: self.draw.words(name, taken=taken[name]) for name in taken}
        self.keys = dict(sorted(keys.items()))
        self.look = Look(
            self.request,
            self.draw,
            self.variables.entry,
            text=options.eval_text,
            data=options.eval,
            batch=options.batch,
        )
        beginning = started(values, opt_state)
        several = None if placement is None or placement.processes is None else placement
        if placement is not None:
            beginning = beginning._replace(alive=put(beginning.alive, placement.replicated))
        self.programs = StepPrograms(
            self.traced.request, self.step, self.data, keys=self.keys, state=beginning, services=services
        )
        programs, resumed, earlier = self.programs, self.resumed, self.ready.entry.training
        same = earlier is not None and (earlier.call, earlier.batch) == (self.call.text, options.batch)
        self.loop = TrainingLoop(
            programs.of,
            beginning,
            self.data,
            schedule,
            curve=Curve() if resumed is None else replace(resumed.curve, stopped=""),
            groups=Groups(
                self.data,
                programs.begin,
                lambda: programs.timing.building,  # no cycle by way of this object: it would keep the last state
                earlier.group if earlier is not None and (same or resumed is not None) else 1,
            ),
            unfinished=services.programs.unfinished,
            together=None if several is None else Together(several, services, self.draw, self.call.text),
        )

    def _initialise(self) -> RunVariables:
        """Initialises a linen net in the training's own draw, by `flax.linen.init(loss, net)` with the first batch."""
        entry, request = self.request.entry.linen, self.request
        self.services.on_phase(f"initialising {self.name}")
        model, call = prepare_init(self.name, entry.model, request.bound.call)
        init = initialising(model, call, self.draw, self.services.programs.units, taken=request.params_taken)
        values, record = init.finish()
        source = WeightSource.initialised(self.draw, values)
        entry = entry.with_variables(values, source, replace(record, method=self.ready.loss.function))
        text = source.describe(self.draw.seed)
        return placed(request, RunVariables(entry, values, made_of(values), 0.0, text, taken=True))

    def _forget_first(self) -> None:
        """Puts shapes in the place of the first variables, which the draw makes again: they are the loop's alone."""
        variables, asked = self.variables, self.traced.request.variables
        # What no step is given stays as it is.
        others = {name: tree for name, tree in variables.values.items() if name not in asked}
        entry = replace(variables.entry.linen, variables=others)
        self.variables = replace(variables, entry=entry, values=shapes_of(variables.values))

    def _notes(self) -> tuple[Note, ...]:
        """The sharp bits that are known before the first step."""
        bound, trace, entry = self.request.bound, self.traced.trace, self.ready.entry
        known = {stream for needs in self.request.entry.known_needs.values() for stream in needs.streams}
        remarks = [
            *notes.of_mode(self.name, bound, bound.mode, trace, loss=self.ready.loss.name),
            *notes.of_streams(trace, known),
        ]
        for other in self.ready.read:
            text = f"`{other.name}` is read as a constant: it gets no gradient, and keeps what it had"
            remarks.append(Note("constant", text))
        seen, arguments = self.services.seen, self.traced.request.arguments
        self.keys_in_call = dict(notes.keys_in(arguments, seen, self.step.batched))
        for name in self.keys_in_call:
            remarks.append(Note("same key", f"`{name}` goes into every step: each has the same numbers"))
        if self.resumed is None:  # else it goes on with the keys of its own draw
            remarks += notes.of_keys(self.keys_in_call, seen, self.request.line)
        frozen = diagnosis.frozen_modules(self.loss, self.traced.request.variables)
        remarks += notes_of_unused(self.traced, self.loss.trainable(), frozen)
        modules = {path[:-1] for path in diagnosis.parameter_paths(self.loss, self.traced.request.variables)} - frozen
        remarks = without_net(self.ready.loss, remarks, len(modules))
        remarks += of_freeze(self.ready.loss, entry, self.traced.request.variables, self.call)
        if self.resumed is not None:
            remarks += resumption.notes_of_resumed(self.resumed, self.options, unsure=self.data.unsure)
            remarks += (Note("resume", change) for change in self.record.changes)
        remarks += notes_of_last(self.data, self.options.batch, self.request.placement)
        if self.variables.made is not None:
            remarks += self.made
        elif entry.outdated:
            remarks.append(notes.outdated_own(self.name) if entry.built_by_user else notes.OUTDATED)
        return tuple(remarks)

    # -- the steps

    def train(self) -> Run:
        """Does the steps, and returns the Run; commits those that are finished whatever happens."""
        first, services, loop = self.loop.step, self.services, self.loop
        if services.programs.unfinished.wait is not None:
            services.on_phase(f"waiting for the interrupted run, then {self.name}")
            services.programs.unfinished.finish()
        services.on_phase(f"training {self.name}")
        with Interrupts() as interrupts:
            try:
                if isinstance(self.data, ArrayData) and self.data.held and loop.curve.total != first:
                    with interrupts.opened():
                        self.programs.start(self.data.like(1))  # meanwhile the first epoch's rows are shuffled
                loop.run(interrupts, self.look, self._on_step)
            except BaseException as error:
                loop.stopped = f"{type(error).__name__} in the loop"
                if isinstance(error, KeyboardInterrupt):
                    loop.stopped = "interrupted"
                elif isinstance(error, NotFinite):
                    loop.stopped = f"step {loop.step} is not finite and was not taken"
                    # It may take long, and without it all is told but the reason.
                    with suppress(KeyboardInterrupt), interrupts.opened():
                        loop.stopped = self._why_not_finite()
                elif isinstance(error, FlaxMagicsError):
                    loop.stopped = str(error).partition("\n")[0]
                    # With an iterator that has run dry, and that no call makes anew, the line would meet the same end.
                    self.refill = f"{error.form}\n" if error.form and "…" in error.form else ""
                # Only finished steps count; a look that was committed has to be said to have been stopped, too.
                if loop.step > first or self._has_committed:
                    try:
                        services.on_progress(self._finish())
                    except Overtaken:
                        # Nothing is kept, and an interrupt or an error of the user's ends it all the same.
                        if isinstance(error, NotFinite):
                            raise
                if isinstance(error, NotFinite):
                    write = None if self.replaced is None else PREVIOUS.format(self.name)
                    raise FlaxMagicsError(loop.stopped, hint=self._hint_of_failed(), write=write) from None
                raise
            return self._finish()

    def _why_not_finite(self) -> str:
        """The step that is not finite, its rows, and what made it so, in one line."""
        loop, failed = self.loop, self.loop.failed
        assert failed is not None
        self.services.on_phase("looking where it is not finite")
        keys = {}
        for name in self.keys:
            key = self.draw.stream(name, taken=self.taken and name == "params")
            keys[name] = np.asarray(jax.random.key_data(jax.random.fold_in(key, loop.step)))
        batch, value = failed
        rows, arguments = batch.rows, self.programs.arguments(batch)
        if rows is None:
            rows = batch.gathered
        else:
            arguments = {name: leaf[rows] if name in self.step.batched else leaf for name, leaf in arguments.items()}
        place = f"step {loop.step}"
        if rows is not None:
            shown = ", ".join(map(str, rows[:ROWS])) + (", …" if len(rows) > ROWS else "")
            place += f" (epoch {loop.step // (self.data.per_epoch or 1)}, rows {shown})"
        request = replace(self.traced.request, variables=loop.state.variables, guess=self.traced.needs)
        why = why_of_step(self.programs.step, request, loop.state.opt_state, (keys, arguments, rows), value)
        return f"{place} is not finite and was not taken: {why}"

    def _hint_of_failed(self) -> str | None:
        """What to do about a step that is not finite; None where it was the first of all."""
        losses = self.loop.numbers.losses
        if not len(losses):
            return None
        # As it is, the line would meet the same step again.
        line = f"%flax_train --resume {self.call.text}"
        hint = f"once the loss or its data are mended, `{line}` goes on with this step"
        if self._has_exploded:
            grown = f"the loss was {losses[0]:.4g} in the first step and {losses[-1]:.4g} in the last"
            hint = f"{grown}: the rate may be too high for steps that nothing clips\n{hint}"
        if self.replaced is not None:
            hint += "\nthe weights from before it are kept, and come back by the line below"
        return hint

    @property
    def _has_exploded(self) -> bool:
        losses = self.loop.numbers.losses
        return bool(len(losses) and losses[-1] > EXPLODED * abs(losses[0]) > 0)

    @cached_property
    def replaced(self) -> Replaced | None:
        """The weights from before a training whose loss has grown until it was not finite; None for any other.

        Asked for at its end alone.
        """
        failed, losses = self.loop.failed, self.loop.numbers.losses
        if failed is None or not (len(losses) and (self._has_exploded or np.isinf(failed[1]))):
            return None  # and where no step was taken
        before, first = self.variables.entry, self.traced.request.variables
        if self.initialises:
            made = self._initialise().values
            first = {name: made[name] for name in first}
        values = unfreeze(dict(first))
        replaced = Replaced(self.loss.as_users(values), before.source or WeightSource(""), before.update_counts)
        return replaced if replaced.size <= self.limit else None

    def _on_step(self) -> None:
        """Commits what is finished, and shows it, unless that was done just now."""
        now = time.perf_counter()
        if now - self._committed < OFTEN and not self.loop.is_large:  # what was committed before is an earlier state
            return
        self._committed = now
        run = self._commit(final=False)
        if now - self._shown >= SHOWN:
            self._shown = now
            self.services.on_progress(run)

    def _finish(self) -> Run:
        """Commits all finished steps, and returns the Run with the variables as its output."""
        notes, losses = [*self.notes], self.loop.numbers.losses
        if len(losses) > STILL and bool((losses[-STILL:] == losses[-STILL - 1]).all()):
            notes.append(Note("still", f"the loss has not moved in the last {STILL} steps"))
        if self.loop.stopped and self.loop.step:
            after, why = f"after {plural(self.loop.step, 'step')}", self.loop.stopped
            text = f"interrupted {after}" if why == "interrupted" else f"stopped {after}: {why}"
            # Of a step that is not finite the error says when that is worth it, right below.
            line = "" if self.loop.failed else f"{self.refill}%flax_train --resume {self.call.text}"
            notes.append(Note("stopped", text, **(written(line) if line else {})))
        resumed = self.resumed
        if resumed is not None and self.loop.step == resumed.step and not self.loop.stopped:
            epochs = self.options.epochs
            asked = f"--steps {2 * resumed.step}" if epochs is None else f"--epochs {2 * epochs}"
            text = f"nothing was left to do: {plural(resumed.step, 'step')} were finished, and no more were asked for"
            notes.append(Note("resume", text, **written(f"%flax_train --resume {asked} {self.call.text}")))
        self.notes = tuple(notes)
        return self._commit(final=True)

    def _commit(self, *, final: bool) -> Run:
        """Makes the finished steps part of the session.

        Args:
          final: nothing comes after it: then the Run has the variables, which are read for its digest.
        """
        loop, programs = self.loop, self.programs
        task = replace(self.task, takes_loss=programs.step.takes_loss)
        curve, timing = replace(loop.curve, task=task), programs.timing
        timing = replace(timing, trace=timing.trace + self.timing.trace, init=self.timing.init, run=curve.seconds)
        record = replace(self.record, spelling=replace(self.record.spelling, looks=(self.look.facts,)))
        progress = record.progress(
            loop.state,
            curve,
            loop.position,
            notes=self.notes,
            program=programs.origin,
            timing=timing,
            final=final,
            mesh=self._mesh(final=final),
            replaced=self.replaced if final else None,
        )
        self._has_committed = True
        self.commit(progress)
        self.services.seen.went_into(self.draw, self.keys_in_call.values())
        return progress.run

    def _mesh(self, *, final: bool) -> MeshUse | None:
        """What the steps make of the session's mesh; at the end with what they send between devices."""
        placement, inputs = self.request.placement, self.traced.request.arguments.dynamic
        if placement is None:
            return None
        sent = self.programs.text if final else None
        return placement.use(inputs, self.loop.state.variables, (), lambda: sent)

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """A block whose time is added to a phase of the Run's timing."""
        begin = self.services.clock()
        yield
        more = getattr(self.timing, phase) + self.services.clock() - begin
        self.timing = replace(self.timing, **{phase: more})
