"""The compiled programs of a training: one for each shape of a batch, and one that does several steps.

Several steps are done by one program where that was measured to be faster, and gives the bits of one by one. Where the
steps are those of several processes, these do them together.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Mapping
from contextlib import suppress
from functools import partial
from typing import Any, TypeAlias

import jax
import numpy as np
from msgspec.structs import replace

from ..base.digest import is_key
from ..base.measures import Timing
from ..base.processes import OFTEN
from ..base.text import plural
from ..base.threads import OneByOne
from ..base.types import Leaf, PyTree
from ..code.contents import Structure
from ..code.fingerprint import fingerprint
from ..compile.cache import KEPT, Compiling, OnPhase, Services
from ..compile.compiler import keep
from ..compile.disk_cache import call_key, hashable
from ..compile.placement import Placement, agree
from ..compile.trace import TraceRequest
from ..errors import FlaxMagicsError
from ..models.calls import Kwargs, signature_of
from ..rng.keys import Draw, Words
from .data import ArrayData, Batch, Data
from .step import Step, StepResult, TrainState, lacks_loss

StepProgram: TypeAlias = Callable[[TrainState, int, Batch], StepResult]
"""`program(state, number, batch)`: the steps of a batch, the first of which has that number."""

MEASURED = 30
"""After so many steps it is known how long one takes."""
SHORT = 5e-3
"""Seconds: a step that takes longer gains nothing in a group."""
LONG = 0.03
"""Seconds that a group should take: an interrupt waits for two of them."""
FASTER = 0.95
"""A group is used if it takes less than this share of the time of its steps one by one."""
LONGEST = 0.25
"""Seconds that a group may take."""
MISSES = 3
"""After so many places where the batches for a first group are not alike, none is tried."""


class Groups:
    """Tries whether groups are faster, once; then says where one begins.

    Args:
      build: starts to compile the program for a batch of several steps; returns a function that gives the program, or
        None as long as it is not there. None where steps are to be done one by one.
      cost: seconds that it took to build the program of one step.
      size: of the groups of a training like this one, which needs no measurement; 1 for none.

    Attributes:
      size: steps in a group; 1 as long as there are none.
      asked: the size that is tried.
      decided: the size will not change any more.
    """

    def __init__(
        self,
        data: Data,
        build: Callable[[Batch], Callable[[], StepProgram | None] | None],
        cost: Callable[[], float],
        size: int,
    ) -> None:
        self._data, self._build, self._cost = data, build, cost
        self._most = data.most_together
        # A size may come from a file, and the data may be fewer by now: none is built that would never fit.
        self.size, self.asked = 1, size if size <= self._most else 1
        self._built: Callable[[], StepProgram | None] | None = None
        self._program: StepProgram | None = None
        self.decided, self._misses = self._most == 1, 0
        self._spent: list[float] = []

    def count(self, step: int, total: int | None, spent: float) -> None:
        """Called after each finished step, until it is decided: measures, and starts to compile where it is worth it.

        Args:
          spent: seconds in all steps so far.
        """
        if self.decided or self._built is not None or total is None:
            return
        self._spent.append(spent)
        if self.asked > 1:
            self._begin(self.asked)
        elif len(self._spent) > MEASURED:
            seconds = max(float(np.median(np.diff(self._spent))), 1e-5)
            # The device idles while the group is traced, and the trial takes the time of some groups.
            worth = (total - step) * seconds * 0.3 > 2 * self._cost() + 4 * LONG
            size = self._fitting(int(LONG / seconds))
            if seconds > SHORT or not worth or size < 2:
                self.decided = True
            else:
                self._begin(size)

    def _fitting(self, size: int) -> int:
        """About `size`, so that an epoch has as few steps as possible besides its groups.

        One of few sizes, so that the next training in this session finds the program.
        """
        parts = 1
        while self._most // parts > 1.5 * size:
            parts *= 2
        return self._most // parts

    def _begin(self, size: int) -> None:
        self.asked = size
        with suppress(Exception):  # as many steps one by one are no program that fails
            self._built = self._build(self._data.like(size))
        if self._built is None:
            self._give_up()
        else:
            self._data.put_together(size)

    def begins_at(self, step: int, until: int | None) -> bool:
        """Whether a group of `size` may begin at that step.

        Args:
          until: the next step before which no group may reach over; None for none.
        """
        size = self.asked if self.size == 1 else self.size
        place, room = self._data.place(step)
        return place % size == 0 and size <= room and (until is None or step + size <= until)

    def to_try(self, step: int, until: int | None) -> bool:
        """Whether the program is there, and this is the place to try it."""
        if self.decided or self._built is None or not self.begins_at(step, until):
            return False
        try:
            self._program = self._program or self._built()
        except Exception:  # XLA could not compile it
            self._give_up()
        return self._program is not None

    def missed(self) -> None:
        """Notes that the batches were not alike where a group should be tried."""
        self._misses += 1
        if self._misses == MISSES:
            self._give_up()

    def _give_up(self) -> None:
        self.decided = True
        self._data.put_together(1)

    def attempt(
        self, state: TrainState, step: int, together: Batch, program_of: Callable[[Batch], StepProgram]
    ) -> list[tuple[StepResult, Batch]]:
        """Does the steps of one group both ways, and decides. Returns the steps as they were done one by one."""
        group, whole = self._program, None
        assert group is not None
        self.decided = True
        batches = together.parts or [self._data.take(step + n) for n in range(self.asked)]
        times: dict[bool, list[float]] = {True: [], False: []}
        singles: list[tuple[StepResult, Batch]] = []
        for _ in range(2):
            begin = time.perf_counter()
            with suppress(Exception):  # there was no memory for it
                whole = jax.block_until_ready(group(state, step, together))
            times[True].append(time.perf_counter() - begin)
            begin, ahead, singles = time.perf_counter(), state, []
            for n, batch in enumerate(batches):
                assert batch is not None
                result = program_of(batch)(ahead, step + n, batch)
                ahead = result.state
                singles.append((result, batch))
            jax.block_until_ready(ahead)
            times[False].append(time.perf_counter() - begin)
            # XLA's convolutions take many times longer in a loop.
            if times[True][0] > 2 * FASTER * times[False][0]:
                break
        stacked = [
            np.stack(leaves) for leaves in zip(*(jax.tree_util.tree_leaves(one[1:]) for one, _ in singles), strict=True)
        ]
        same = whole is not None and _bits(whole.state) == _bits(ahead) and _bits(whole[1:]) == _bits(stacked)
        if same and min(times[True]) < min(FASTER * min(times[False]), LONGEST):
            self.size = self.asked
        else:
            self._give_up()
        return singles


def _bits(tree: PyTree) -> list[bytes]:
    leaves = (jax.random.key_data(leaf) if is_key(leaf) else leaf for leaf in jax.tree_util.tree_leaves(tree))
    return [np.asarray(leaf).tobytes() for leaf in leaves]


class StepPrograms:
    """Compiles the step of a training.

    Args:
      request: of the loss without its gradients; its name is the model's, which the programs get.
      keys: stream → key data of the draw.
      state: before the first step.

    Attributes:
      step: with what its optimizer turned out to take.
      origin: where the first program came from: `compiled`, `disk cache` or `reused`.
      timing: of all that was traced, lowered and compiled for steps one by one.
    """

    def __init__(
        self,
        request: TraceRequest,
        step: Step,
        data: Data,
        *,
        keys: Mapping[str, Words],
        state: TrainState,
        services: Services,
    ) -> None:
        self.name, self.step, self._keys, self._services = request.name, step, keys, services
        self._request = request
        code = call_key(request), fingerprint(step.optimizer)
        self._code = None if None in code else (*code, step.batched, step.placement)
        """What all programs are made of; None where that cannot be told."""
        self._state, self._data = state, data
        self._programs: dict[object, StepProgram] = {}
        self._started: dict[object, Compiling] = {}
        self.origin, self.timing = "", Timing()
        self._has_effects = False
        self._first: Any = None

    @property
    def text(self) -> str | None:
        """The first program of one step as XLA writes it, None before there is one."""
        return None if self._first is None else str(self._first.as_text() or "")

    def of(self, batch: Batch) -> StepProgram:
        """The program for a batch, found or compiled."""
        shapes = self._shapes(batch)
        program = self._programs.get(shapes)
        if program is None:
            compiling = self._started.pop(shapes, None) or self._timed(batch)
            self._agree(batch, compiling.digest)
            program, origin, timing = self._finish(compiling, batch, self._phase)
            self.timing = replace(self.timing, compile=self.timing.compile + timing.compile)
            self.origin = self.origin or origin
            self._services.on_phase(f"training {self.name}")
        return program

    def _agree(self, batch: Batch, digest: str) -> None:
        """Asks all processes of the mesh whether they have this program and the same data."""
        data, placement = self._data, self.step.placement
        if placement is None or placement.processes is None:
            return
        rows = len(jax.tree_util.tree_leaves(batch.tree)[0]) if batch.rows is None else batch.rows.size
        # What lies on the mesh already may be cut: then the arrays are those that the user gave.
        inputs = self._state, batch.tree, data.tree, data.first if isinstance(data, ArrayData) else None
        what = f"training {self.name} with {plural(rows, 'row')} a step"
        agree(self._services, placement, self._request.draw, what, digest=digest, tree=inputs)

    def start(self, batch: Batch) -> None:
        """Starts to compile the program for a batch, which `of` then waits for."""
        self._started[self._shapes(batch)] = self._timed(batch)

    def _timed(self, batch: Batch) -> Compiling:
        clock, before = self._services.clock, self.timing
        begin = clock()
        compiling = self._begin(batch)
        lower = compiling.timing.lower
        self.timing = replace(before, trace=before.trace + clock() - begin - lower, lower=before.lower + lower)
        return compiling

    def begin(self, batch: Batch) -> Callable[[], StepProgram | None] | None:
        """Starts to compile the program of several steps; returns a function that gives it, or None before it is there.

        None where a step prints or calls back into Python: a trial would do that once more; and with several processes,
        of which each would measure for itself what is faster.
        """
        placement = self.step.placement
        if self._has_effects or (placement is not None and placement.processes is not None):
            return None
        compiling = self._begin(batch)
        self._services.on_phase(f"training {self.name}")

        def finished() -> StepProgram | None:
            if compiling.future is not None and not compiling.future.done():
                return None
            return self._finish(compiling, batch, lambda phase: None)[0]

        return finished

    def _finish(self, compiling: Compiling, batch: Batch, phase: OnPhase) -> tuple[StepProgram, str, Timing]:
        """Waits for the program of a batch, and keeps it: for this training, and for later ones of the same code."""
        programs = self._services.programs
        executable, origin, timing = programs.finish_compiling(compiling, phase)
        self._first = self._first or executable
        key = self._key(batch)
        # A program that calls back is that of the function that was traced.
        if self._code is not None and key is not None and not self._has_effects:
            known = (self.name, self._code[0]), executable, compiling.digest, self.step.takes_loss
            keep(programs.by_step, key, known, KEPT)
        program = self._programs[self._shapes(batch)] = self._bound(executable, batch)
        return program, origin, timing

    def _key(self, batch: Batch) -> Hashable | None:
        """A key of the program for a batch, as `call_key` is one of a call's."""
        leaves, treedef = jax.tree_util.tree_flatten(self._inputs(batch))
        passed = Structure.of(treedef)
        if self._code is None or passed.contents is None:
            return None
        return hashable((*self._code, batch.steps, self._is_held(batch), passed, tuple(map(signature_of, leaves))))

    def _shapes(self, batch: Batch) -> object:
        """What a program is specialised on of a batch."""
        passed = () if self._is_held(batch) else jax.tree_util.tree_leaves(batch.tree)
        return (batch.steps, None if batch.rows is None else batch.rows.shape, *map(signature_of, passed))

    def _phase(self, phase: str) -> None:
        self._services.on_phase(f"{phase} {self.name}")

    def _is_held(self, batch: Batch) -> bool:
        """Whether the batch is of arrays that all steps are given."""
        return batch.tree is None or batch.tree is self._data.tree

    def arguments(self, batch: Batch) -> Kwargs:
        """The arguments of a step's program by name: those of the batch, or of the arrays that it is taken from."""
        tree, placement = batch.tree, self.step.placement
        if placement is not None and not self._is_held(batch):
            tree = placement.of_batch(tree)
        leaves = jax.tree_util.tree_leaves(self._data.tree if tree is None else tree)
        return {**self.step.arguments.dynamic, **dict(zip(self.step.batched, leaves, strict=True))}

    def _begin(self, batch: Batch) -> Compiling:
        programs, inputs = self._services.programs, self._inputs(batch)
        known = programs.by_step.get(self._key(batch))
        if known is not None:
            _, executable, digest, takes_loss = known
            self.step = replace(self.step, takes_loss=takes_loss)
            return Compiling(executable, digest=digest)
        self._phase("tracing")
        stacked = not self._is_held(batch)
        function = self.step.step if batch.steps == 1 else partial(self.step.group, stacked=stacked)

        def program(
            state: TrainState, keys: Mapping[str, Leaf], numbers: Leaf, rows: Leaf, arguments: Kwargs
        ) -> StepResult:
            result = function(state, keys, numbers, rows, arguments)
            return result if self.step.placement is None else result._replace(state=_like(result.state, self._state))

        program.__name__ = program.__qualname__ = self.name
        jitted: Any = jax.jit(program)
        try:
            traced = jitted.trace(*inputs)
        except TypeError as error:
            if self.step.takes_loss or not lacks_loss(error):
                raise
            self.step = replace(self.step, takes_loss=True)
            return self._begin(batch)
        self._has_effects = bool(traced.jaxpr.effects)
        where = tuple(signature_of(leaf)[-1] for leaf in jax.tree_util.tree_leaves(inputs))
        return programs.begin_compiling(traced, self._phase, where)

    def _inputs(self, batch: Batch) -> tuple[PyTree, ...]:
        """What the program of a batch is given, at the first step."""
        return self._state, self._keys, _numbers(0, batch), batch.rows, self.arguments(batch)

    def _bound(self, executable: Any, batch: Batch) -> StepProgram:
        """An executable with all that is the same in each call."""
        keys, held = self._keys, self.arguments(batch) if self._is_held(batch) else None

        def program(state: TrainState, number: int, batch: Batch) -> StepResult:
            arguments = self.arguments(batch) if held is None else held
            result: StepResult = executable(state, keys, _numbers(number, batch), batch.rows, arguments)
            return result

        return program


def _like(state: TrainState, before: TrainState) -> TrainState:
    """The state of a step laid out as that before it: XLA is free to cut what it gives, and the next step takes it."""

    def constrain(leaf: Leaf, was: Leaf) -> Leaf:
        return jax.lax.with_sharding_constraint(leaf, was.sharding) if isinstance(was, jax.Array) else leaf

    laid_out: TrainState = jax.tree_util.tree_map(constrain, state, before)
    return laid_out


def _numbers(first: int, batch: Batch) -> Any:
    """The number of the step, or of each, as the program takes it."""
    return np.uint32(first) if batch.steps == 1 else np.arange(first, first + batch.steps, dtype=np.uint32)


class Together:
    """The processes of a job that do the steps of a training together.

    Args:
      text: the call, for messages.

    Attributes:
      beside: where steps are dispatched, so that this thread can leave one for which another process never comes.
    """

    def __init__(self, placement: Placement, services: Services, draw: Draw, text: str) -> None:
        assert placement.processes is not None
        self._processes, self._placement, self.beside = placement.processes, placement, OneByOne()
        self._services, self._draw, self._text = services, draw, text

    def agree(self, step: int, batch: Batch) -> None:
        """Now and then, raises unless all of them are about to do that step with the same batch."""
        if step % OFTEN == 0:
            what = f"step {step} of {self._text}"
            agree(self._services, self._placement, self._draw, what, tree=(batch.rows, batch.tree))

    @property
    def seconds(self) -> float:
        """How long the others are waited for."""
        return self._services.deadline

    def check(self) -> None:
        """Raises where one of them has stopped."""
        self._processes.check_stopped(self._text)

    def stop(self, steps: int, error: BaseException | None) -> tuple[int, int] | None:
        """Tells the others that this one stops after so many steps; gives the fewest and the most that any has begun.

        None where not all have answered.
        """
        why = ""
        if error is not None:
            why = "interrupted" if isinstance(error, KeyboardInterrupt) else type(error).__name__
            why = str(error).partition("\n")[0].rstrip(".") if isinstance(error, FlaxMagicsError) else why
        of_all = self._processes.stop(steps, why, self._text, self._services)
        return None if of_all is None else (min(of_all), max(of_all))

    def why_failed(self) -> FlaxMagicsError | None:
        """The error for a step that failed because one of them has ended."""
        return self._processes.why_failed(self._text)
