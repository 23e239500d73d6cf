"""The compiled programs of a training: one for each shape of a batch, and one that does several steps."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from functools import partial
from typing import Any

import jax
import numpy as np
from msgspec.structs import replace

from ..base.measures import Timing
from ..base.text import plural
from ..base.types import Leaf, PyTree
from ..code.contents import Structure
from ..code.fingerprint import fingerprint
from ..compile.cache import KEPT, Compiling, OnPhase, Services
from ..compile.compiler import keep
from ..compile.placement import agree
from ..compile.program_keys import call_key, hashable
from ..compile.trace import TraceRequest
from ..models.calls import Kwargs, signature_of
from ..rng.keys import Words
from .data import ArrayData, Batch, Data
from .group import StepProgram
from .step import Step, StepResult, TrainState, lacks_loss


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
        # The arrays are the loop's: held here, they would take the place of a whole state to the end.
        self._state = shapes_of(self._state)
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
        sharding = getattr(was, "sharding", None)
        return leaf if sharding is None else jax.lax.with_sharding_constraint(leaf, sharding)

    laid_out: TrainState = jax.tree_util.tree_map(constrain, state, before)
    return laid_out


def shapes_of(tree: PyTree) -> PyTree:
    """A tree of arrays as shapes by which the same program is traced and found."""

    def shape(leaf: Leaf) -> Leaf:
        if not isinstance(leaf, jax.Array):
            return leaf
        shape, dtype, weak, sharding = signature_of(leaf)
        return jax.ShapeDtypeStruct(shape, dtype, weak_type=weak, sharding=sharding)

    return jax.tree_util.tree_map(shape, tree)


def _numbers(first: int, batch: Batch) -> Any:
    """The number of the step, or of each, as the program takes it."""
    return np.uint32(first) if batch.steps == 1 else np.arange(first, first + batch.steps, dtype=np.uint32)
