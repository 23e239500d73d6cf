"""The loop of a training: steps are dispatched ahead of the device, and count once it has finished them."""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from ..base.digest import bytes_of
from ..base.measures import Curve, Evaluation, default_device
from ..base.threads import Future, Interrupts, Unfinished, smallest
from ..base.types import HostArray, Leaf
from ..compile.compiler import free_bytes
from ..models.base import Variables
from .data import Batch, Data
from .programs import Groups, StepProgram, Together
from .step import StepResult, TrainState

AHEAD = 2
"""How many steps the device is given ahead of what is known to be finished, at least."""
MOST = 32
"""How many it is given at most: of short steps many are counted together, which takes half the time of one by one."""
SECONDS = 0.15
"""How long those take that it is given ahead of the others: an interrupt waits for them."""
MEMORY = 1 << 26
"""Bytes that they may hold, as each has a state and a batch of its own; of an accelerator `SHARE` of its free memory."""
SHARE = 1 / 32
PATIENCE = 0.4
"""Seconds that an interrupt waits for the steps which the device still does; after that they are given up."""


LeftOut: TypeAlias = Callable[[], AbstractContextManager[None]]
"""Makes a block whose time is none of the steps."""
Looks: TypeAlias = Callable[[int, Variables, LeftOut], Evaluation]
"""Evaluates the variables that there are after so many finished steps; what it compiles is left out of the time."""


class NotFinite(Exception):
    """The step at this number gave a loss, a gradient or a variable that is not finite: it was not taken."""


class Dispatched(NamedTuple):
    """A step, or a group of steps, that the device was given, its batch, and the number of the step after it."""

    result: StepResult
    batch: Batch
    following: int


class Numbers:
    """The numbers of the finished steps, in arrays that grow; earlier views of them stay as they are.

    Args:
      curve: that of the training which this one goes on with.
    """

    def __init__(self, curve: Curve) -> None:
        self.count = len(curve.losses)
        self._arrays = {"": np.array(curve.losses, np.float32)}
        self._arrays |= {f" {name}": np.array(values, np.float32) for name, values in curve.metrics.items()}

    def add(self, loss: Leaf, metrics: Mapping[str, Leaf], steps: int) -> None:
        """Adds the numbers of so many steps."""
        after, values = self.count + steps, {"": loss, **{f" {name}": value for name, value in metrics.items()}}
        for name in {**self._arrays, **values}:
            array = self._arrays.get(name)
            if array is None:
                array = self._arrays[name] = np.full(max(self.count, 64), np.nan, np.float32)
            if len(array) < after:
                more = np.zeros(max(len(array), 64, steps), np.float32)
                self._arrays[name] = array = np.concatenate([array, more])
            # A training may go on with a loss that has other metrics: each has a number for each step.
            array[self.count : after] = np.ravel(np.asarray(values.get(name, np.nan))).astype(np.float32)
        self.count = after

    @property
    def losses(self) -> HostArray:
        """One for each finished step."""
        return self._arrays[""][: self.count]

    @property
    def metrics(self) -> dict[str, HostArray]:
        """Name → one for each finished step."""
        return {name[1:]: array[: self.count] for name, array in self._arrays.items() if name}


class Schedule:
    """Which steps there are, and after which of them the `--eval` data are looked at.

    Args:
      epochs, steps: one of them; what was asked for in all.
      per_epoch: steps of an epoch; None where that is not known before its end.
      looks: there are data to look at: each epoch, or ten times in a training that counts steps.
      counted: each epoch has `per_epoch` steps; else it ends when the data end it, wherever that is.
    """

    def __init__(
        self, epochs: int | None, steps: int | None, per_epoch: int | None, *, looks: bool, counted: bool = True
    ) -> None:
        self.epochs, self.steps, self.per_epoch = epochs, steps, per_epoch
        self._looks, self._counted, self._ends = looks, counted, set[int]()

    @property
    def total(self) -> int | None:
        """The steps in all; None as long as that is not known."""
        if self.steps is not None:
            return self.steps
        return None if self.per_epoch is None else (self.epochs or 0) * self.per_epoch

    def ends_at(self, step: int) -> bool:
        """Whether there are no steps after so many; None may come of an iterable before that is known."""
        sure = self.steps is not None or self._counted
        return sure and self.total is not None and step >= self.total

    def end_epoch(self, step: int, epoch: int) -> None:
        """Notes that an epoch ended before `step`, the `epoch`-th of all."""
        self._ends.add(step)
        if epoch == 1:
            self.per_epoch = step
        if self.steps is None and epoch == self.epochs:
            self.steps = step

    def next_look(self, step: int) -> int | None:
        """The first step after that one before which a group has to end: a look, or the end of all."""
        ends = [] if self.total is None else [self.total]
        if self._looks and self.epochs is not None and self.per_epoch is not None:
            ends.append(step - step % self.per_epoch + self.per_epoch)
        elif self._looks and self.steps is not None:
            ends += [round(self.steps * n / 10) for n in range(1, 10)]
        return min((end for end in ends if end > step), default=None)

    def looks_after(self, step: int) -> bool:
        """Whether the data are looked at once so many steps are finished."""
        if not self._looks or not step:
            return False
        if self.epochs is None:
            assert self.steps is not None
            return step == self.steps or step in {round(self.steps * n / 10) for n in range(1, 10)}
        by_count = self._counted and self.per_epoch is not None and step % self.per_epoch == 0
        return by_count or step in self._ends


class TrainingLoop:
    """One training under way.

    Args:
      program_of: finds or compiles the program for a batch.
      state: after the steps that are finished.
      curve: of the steps that are finished.
      together: with other processes; None for this one alone.

    Attributes:
      state, numbers: after the last finished step.
      evals: the looks so far.
      examples: those in the finished steps.
    """

    def __init__(
        self,
        program_of: Callable[[Batch], StepProgram],
        state: TrainState,
        data: Data,
        schedule: Schedule,
        *,
        curve: Curve,
        groups: Groups,
        unfinished: Unfinished,
        together: Together | None = None,
    ) -> None:
        self._program_of, self._data, self._schedule, self._groups = program_of, data, schedule, groups
        self.state, self.numbers = state, Numbers(curve)
        self.evals: list[Evaluation] = list(curve.evals)
        self.examples, self.stopped = curve.examples, ""
        self._seconds = self._before = curve.seconds
        self._first, self._looking = self.step, 0.0
        self._deadline: float | None = None
        self._since: float | None = None
        """When the steps began whose time is not in `_seconds` yet; None while there are none."""
        self._unfinished, self._together = unfinished, together
        self._pending: deque[Dispatched] = deque()
        self._last: Callable[[], StepResult] | None = None
        """Does the newest step once more, of several processes."""
        self._begun = self.step
        """How many steps the device was given, those of earlier parts included."""
        self._blocked: tuple[Future, Batch] | None = None
        """A step that blocks while it is dispatched, and its batch."""
        self.position = data.position
        """After the last finished step, in an iterable."""
        self._bytes = 1
        """Those of the state and the batch of one step, once the first is there."""
        device = default_device()
        self._memory = MEMORY if device.platform == "cpu" else max(MEMORY, int(SHARE * (free_bytes(device) or 0)))
        self._singly_until = 0
        """The step up to which none are done in groups, since one of them is not finite."""
        self.failed: tuple[Batch, Leaf] | None = None
        """Batch and loss of the step that was not finite."""

    @property
    def step(self) -> int:
        """How many steps are finished."""
        return self.numbers.count

    @property
    def seconds(self) -> float:
        """The time of the steps, those of earlier parts of the training included."""
        return self._seconds + (0.0 if self._since is None else time.perf_counter() - self._since)

    @property
    def curve(self) -> Curve:
        """What the training has done so far."""
        total = self._schedule.total
        return Curve(
            self.numbers.losses,
            self.numbers.metrics,
            tuple(self.evals),
            None if total is not None and total < self.step else total,  # a loader has more than it says
            self._schedule.per_epoch,
            self.examples,
            self.seconds,
            self._groups.size,
            self.stopped,
        )

    def run(self, interrupts: Interrupts, look: Looks, on_step: Callable[[], None]) -> None:
        """Does the steps that are left.

        Args:
          look: evaluates the present state; called with no step under way.
          on_step: called after finished steps: each long one, and several short ones.

        Raises:
          NotFinite: of a step, which is not taken.
          KeyboardInterrupt: after those steps that were under way, or after `PATIENCE`.
        """
        self._since = time.perf_counter()
        try:
            self._run(interrupts, look, on_step)
            self._end(None)
        except BaseException as error:
            self._end(error)
            self._drain()
            if self._together is not None and isinstance(error, Exception):
                ended = self._together.why_failed()
                if ended is not None:
                    raise ended from None
            raise
        finally:
            self._seconds, self._since = self.seconds, None
            self._data.close()
            if self._together is not None:
                self._together.beside.close()

    def _run(self, interrupts: Interrupts, look: Looks, on_step: Callable[[], None]) -> None:
        schedule, pending = self._schedule, self._pending
        looked = self.evals[-1].step if self.evals else 0
        while True:
            interrupts.check()
            if not pending and self.step != looked and schedule.looks_after(self.step):
                looked = self.step
                begin = self.seconds
                # Of several processes none leaves in the middle of one, in which the others would wait for it.
                with interrupts.opened() if self._together is None else contextlib.nullcontext():
                    evaluation = look(self.step, self.state.variables, self._left_out)
                self._looking += self.seconds - begin
                self.evals.append(evaluation)
                on_step()
            following = pending[-1].following if pending else self.step
            ends = schedule.ends_at(following)
            if ends and not pending:
                return
            undecided = not self._groups.decided
            tries = undecided and not ends and self._groups.to_try(following, schedule.next_look(following))
            most = self._most_ahead
            waits = len(pending) >= most or bool(pending and (tries or schedule.looks_after(following)))
            if not ends and not waits:
                batch = self._take(interrupts, following, self._groups.asked if tries else self._groups.size)
                if batch is not None and tries and batch.steps > 1:
                    # No local holds one of these states longer than it is pending.
                    steps = enumerate(self._groups.attempt(self.state, following, batch, self._program_of), 1)
                    pending += (Dispatched(*one, following + n) for n, one in steps)
                elif batch is not None:
                    if tries:
                        self._groups.missed()
                    with interrupts.opened(), self._left_out():
                        program = self._program_of(batch)
                        if self._together is not None and following > self._first:
                            self._together.agree(following, batch)
                    self._begun = following + batch.steps
                    before = pending[-1].result if pending else self
                    self._dispatch(partial(program, before.state, following, batch), batch)
                    del before
                continue
            # The device does one half of them while the other is counted.
            count = min(len(pending), max(1, most // 2))
            self._wait(interrupts, pending[count - 1])
            for _ in range(count):
                if pending:  # none are left after a group that is not finite
                    self._settle()
            if undecided:
                with interrupts.opened(), self._left_out():  # it traces and lowers the program of a group
                    room = self._memory // self._bytes  # the trial holds the state of each step
                    self._groups.count(self.step, schedule.total, self._in_steps, room)
            on_step()

    def _dispatch(self, step: Callable[[], StepResult], batch: Batch) -> None:
        """Gives the device a step, the newest that is begun."""
        if self._together is None:
            self._pending.append(Dispatched(step(), batch, self._begun))
            return
        self._last = step
        self._blocked = self._together.beside.submit(self._last), batch
        self._wait_together(self._blocked[0].done)
        self._unblock(None)

    def _unblock(self, limit: float | None) -> None:
        """Waits for the step that is being dispatched, so many seconds at most."""
        if self._blocked is not None:
            (future, batch), self._blocked = self._blocked, None
            self._pending.append(Dispatched(future.result(limit), batch, self._begun))

    def _wait_together(self, is_done: Callable[[], bool], interrupts: Interrupts | None = None) -> None:
        """Waits for a step of several processes, as long as none of them has stopped."""
        assert self._together is not None
        sleep, looked = SLEEP_OF_BRIEF if self._most_ahead > 1 else SLEEP, time.perf_counter()
        while not is_done():
            if interrupts is not None:
                interrupts.check()
            if time.perf_counter() > looked + LOOK:
                self._together.check()
                looked = time.perf_counter()
            time.sleep(sleep)

    @contextlib.contextmanager
    def _left_out(self) -> Iterator[None]:
        """A block in which something is compiled, whose time is none of the steps."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            assert self._since is not None
            self._since += time.perf_counter() - begin

    def _take(self, interrupts: Interrupts, following: int, steps: int) -> Batch | None:
        """The batch of the next step, or of so many if they fit; None where an epoch of an iterable has ended."""
        if steps > 1:
            fits = self._groups.begins_at(following, self._schedule.next_look(following))
            steps = steps if fits and following >= self._singly_until else 1
        # The first shuffle of a size is compiled.
        with interrupts.opened(), self._left_out() if following == self._first else contextlib.nullcontext():
            batch = self._data.take(following, steps)
        if following == self._first and batch is not None:
            batch_tree = None if batch.tree is self._data.tree else batch.tree
            self._bytes = max(1, sum(map(bytes_of, jax.tree_util.tree_leaves((self.state, batch_tree)))))
        if batch is None:
            assert self._data.position is not None  # arrays have no end
            self._schedule.end_epoch(following, self._data.position.epoch)
            if self._data.once and not self._schedule.ends_at(following):
                raise self._data.dry(following, self._schedule.total)
        return batch

    @property
    def _most_ahead(self) -> int:
        """How many programs the device is given ahead.

        While it does a step it should have the next one. After a long one a pause is nothing, and each takes memory.
        """
        if self.step == self._first:
            return 1
        seconds, size = self._in_steps / (self.step - self._first), self._groups.size
        if seconds > BRIEF or (self.is_large and self._together is None):
            return 1
        # Each step is measured, or may have to be taken back since another process has not begun it.
        if not self._groups.decided or self._together is not None:
            return AHEAD
        return max(AHEAD, min(MOST, int(SECONDS / (seconds * size)), self._memory // (self._bytes * size)))

    @property
    def is_large(self) -> bool:
        """Whether a state takes so much that none is held but the last one and that of the step under way."""
        return self._bytes > self._memory

    @property
    def _in_steps(self) -> float:
        """Seconds in the steps of this part of the training, without looks."""
        return self.seconds - self._before - self._looking

    def _wait(self, interrupts: Interrupts, last: Dispatched) -> None:
        """Waits for a step and all before it; of an interrupt at most `PATIENCE` seconds more."""
        alive = last.result.alive
        if self._together is not None:
            # All end with the same step, whatever is under way.
            self._wait_together(alive.is_ready, interrupts)
            return
        if self._most_ahead > 1:
            alive.block_until_ready()  # deaf to Ctrl-C, for no longer than a few short steps
            return
        while not alive.is_ready():
            if interrupts.signal is not None and time.perf_counter() > self._until():
                interrupts.check()
            time.sleep(SLEEP)

    def _until(self) -> float:
        """When an interrupt has waited long enough: `PATIENCE` after this was first asked."""
        self._deadline = self._deadline or time.perf_counter() + PATIENCE
        return self._deadline

    def _settle(self) -> None:
        """Counts the oldest step or group, which the device has finished."""
        result, batch, _ = self._pending[0]
        if not np.asarray(result.alive).all():  # raises the error of a program that failed
            batches = [one.batch for one in self._pending]
            if self._together is None:  # else the others have to begin those after it, too
                self._pending.clear()
            if batch.steps == 1:
                self.failed = batch, np.asarray(result.loss)
                raise NotFinite
            self._singly_until = self.step + batch.steps  # a group does not give the state before that step
            self._data.put_back(batches)
            return
        self.numbers.add(result.loss, result.metrics, batch.steps)
        self.state = result.state
        self.examples += batch.examples
        self.position = batch.position
        self._pending.popleft()

    def _end(self, error: BaseException | None) -> None:
        """Has all processes end with the same step: the last one that all of them have begun.

        A step that some have begun is waiting for the others: they begin it, too, and all drop it.
        """
        if self._together is None:
            return
        together, limit = self._together, self._together.seconds
        steps_of_all = together.stop(self._begun, error)
        if steps_of_all is None:
            return
        fewest, most = steps_of_all
        with contextlib.suppress(Exception):  # of a process that has ended: whatever is left of its steps is given up
            self._unblock(limit)
            # One by one: what two programs at once send each other may come to the wrong one.
            for result, *_ in self._pending:
                result.alive.block_until_ready()
            for _ in range(self._begun, most):
                if self._last is not None:
                    together.beside.submit(self._last).result(limit).alive.block_until_ready()
        while self._pending and self._pending[-1].following > fewest:
            self._unfinished.wait = smallest(self._pending.pop().result.loss)

    def _drain(self) -> None:
        """Counts the steps that the device finishes within `PATIENCE`, and gives the others up."""
        while self._pending:
            while not self._pending[0].result.alive.is_ready():
                if time.perf_counter() > self._until():
                    self._unfinished.wait = smallest(self._pending[-1].result.loss)
                    self._pending.clear()
                    return
                time.sleep(SLEEP)
            try:
                self._settle()
            except Exception:  # it was interrupted, and that is what is told
                self._pending.clear()


BRIEF = 0.05
"""Seconds that a short step takes at most: the thread is blocked for it."""
SLEEP = 1e-3
"""Seconds between two looks at the device during a longer one, so that Ctrl-C is heard."""
SLEEP_OF_BRIEF = 5e-5
"""The same during a short one of several processes, for which another may never come."""
LOOK = 0.3
"""Seconds that such a step takes until it is asked whether another process has stopped."""


def started(variables: Any, opt_state: Any) -> TrainState:
    """The state before the first step, of arrays that the program takes as they are."""
    as_arrays = jax.tree_util.tree_map(jnp.asarray, (dict(variables), opt_state))
    return TrainState(as_arrays[0], as_arrays[1], jnp.asarray(True))
