"""How a line (a call's text with its options) runs: the Plan that its first run makes, and `Plan.run` for all runs."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING

import jax
from msgspec import Struct
from msgspec.structs import replace

from ..base.digest import opened
from ..base.measures import Steady, Timing
from ..base.types import Leaf, PyTree
from ..compile import reasons
from ..compile.cache import BuiltProgram, PendingProgram, Program, Services
from ..compile.compiler import is_out_of_memory, out_of_memory
from ..compile.placement import agree
from ..compile.trace import TracedCall, TraceRequest, is_tracer_error, leave_out, running, trace_call
from ..models.base import SOWN, CallTrace, ForeignOutput, Incomplete, Model, Needs, Variables
from ..rng.keys import SPLIT, Draw, DrawBatch, Words

if TYPE_CHECKING:
    from ..line.options import ApplyOptions
    from ..state.entry import ApplyRecipe
    from ..state.weights import Collections

_NO_TIME = Timing()


class RunResult(Struct, frozen=True):
    """The result of one run.

    Attributes:
      output: the model's; with `--mutable` it is `(output, updates)`.
      updates: collections that were written.
      sown: collections that were sown.
      timing: of the run, and of what it waited for.
      needs, trace: those of the plan; a run op by op may find out more.
    """

    output: PyTree
    updates: dict[str, PyTree]
    sown: dict[str, PyTree]
    timing: Timing
    needs: Needs
    trace: CallTrace


class Plan(Struct, frozen=True, eq=False, dict=True):
    """How one line runs: everything that does not change from one run of the line to the next.

    Attributes:
      model: the model, set to its mode.
      text: the call as it was written.
      taken: the draw's `params` key goes into variables: the run's stream `params` gets another, see `Draw.stream`.
      body: the program; for a model that runs op by op, its call as traced by shapes.
    """

    name: str
    model: Model
    text: str
    options: ApplyOptions
    taken: bool
    body: Program | TracedCall[None]

    @classmethod
    def of_recipe(cls, recipe: ApplyRecipe, program: Program, text: str) -> Plan:
        """The plan that replays a run by the program that ran it: once, whatever `--repeat` said."""
        options = recipe.options._replace(repeat=1, roofline=False)
        return cls(recipe.name, recipe.entry.model, text, options, recipe.taken, program)

    @cached_property
    def program(self) -> Program | None:
        """The compiled program, None where the model runs op by op."""
        return self.body if isinstance(self.body, Program) else None

    @cached_property
    def runs(self) -> int:
        """How often a run executes it (`--repeat`), with one result."""
        return self.options.runs

    @cached_property
    def streams(self) -> tuple[str, ...]:
        """Names of the streams whose keys are passed, sorted."""
        return tuple(sorted(self.body.needs.streams))

    @cached_property
    def folded(self) -> tuple[str, ...]:
        """Those of them that the split has no key of."""
        return tuple(name for name in self.streams if name not in SPLIT)

    def keys(self, draw: Draw | DrawBatch) -> dict[str, Words]:
        """The key data that the program takes, by stream."""
        return {name: draw.words(name, taken=self.taken and name == "params") for name in self.streams}

    def key_names(self, needs: Needs) -> dict[str, tuple[str, bool]]:
        """Names of the keys that a Run lists (see `RunKeys`) if it turned out to need `needs`."""
        names = {name: (name, False) for name in (*SPLIT, *self.options.key, *sorted(needs.streams))}
        if self.taken and "params" in needs.streams:
            names["params (folded)"] = ("params", True)
        return names

    def run(
        self,
        draw: Draw | DrawBatch,
        variables: Variables,
        arguments: Mapping[str, Leaf],
        services: Services,
        pending: PyTree = None,
    ) -> RunResult:
        """Runs once, or as often as the options say, and waits for the device. Changes nothing.

        Args:
          arguments: the traced ones, by name.
          pending: inputs that may still be computed on the device; None for all, after a run that may have been
            interrupted.

        Raises:
          FlaxMagicsError: there was no memory. What the model raises is passed on.
        """
        program, body, runs = self.program, self.body, self.runs
        programs, clock, on_phase = services.programs, services.clock, services.on_phase
        needs, trace = body.needs, body.trace
        keys = self.keys(draw)
        begin = free = clock()
        # What an interrupted run still takes on the device is no time of this one.
        if pending is None:
            if programs.unfinished.wait is not None:
                on_phase(f"waiting for the interrupted run, then {self.name}")
                programs.unfinished.finish()
                free = clock()
            pending = variables, arguments
        # Computing the inputs is timed apart, so that it does not count as the run.
        if pending:
            on_phase(f"waiting for the inputs of {self.name}")
            jax.block_until_ready(pending)
        on_phase(f"running {self.name}")
        start = clock()
        wait = start - free
        times: list[float] = []
        first: PyTree = None
        while True:
            try:
                if program is not None:
                    result = programs.run(program, variables, keys, arguments)
                else:
                    result, needs, trace = self._run_op_by_op(needs, services)
            except Exception as error:
                if is_out_of_memory(error):
                    raise out_of_memory(error, self.text, None if program is None else program.memory) from None
                raise
            times.append(clock() - start)
            # Every repeat has the same keys: the first result is kept, the others only give times.
            first = result if first is None else first
            if len(times) == runs:
                break
            start = clock()
        timing = replace(_NO_TIME, run=times[0], wait=wait, busy=free - begin)
        if len(times) > 1:
            timing = replace(timing, steady=Steady(tuple(times)))
        return RunResult(*self.parted(first, trace), timing, needs, trace)

    def parted(self, result: PyTree, trace: CallTrace) -> tuple[PyTree, dict[str, PyTree], dict[str, PyTree]]:
        """Output, updates and sown values of what a program returned."""
        output, updates = result
        if not updates and not self.options.mutable:  # the usual case, which needs no sorting
            return output, updates, {}
        return _parted(output, updates, trace, self.options.mutable)

    def _run_op_by_op(self, needs: Needs, services: Services) -> tuple[PyTree, Needs, CallTrace]:
        """Runs the model without jit. Also returns its needs, grown by what it asked for, for repeats to begin with."""
        traced, unfinished = self.body, services.programs.unfinished
        assert isinstance(traced, TracedCall)
        request, draw = traced.request, traced.request.draw
        # What the model needs shows only when it asks: then it runs again, with that as well.
        while True:
            seen = CallTrace()
            keys = {name: draw.stream(name, taken=self.taken and name == "params") for name in sorted(needs.streams)}
            try:
                output, updates = running(request, needs, seen)(request.variables, keys, request.arguments.dynamic)
            except Incomplete:
                needs = needs.and_what(seen)
                continue
            # Compiled, a run does not return what it hands through unchanged.
            result = output, leave_out(updates, traced.trace.unchanged)
            if seen.foreign:  # of many draws, which JAX would have to stack
                raise ForeignOutput(seen.foreign)
            # An interrupted wait leaves the device at work, for which the next run then waits.
            unfinished.wait = functools.partial(jax.block_until_ready, opened(result))
            unfinished.wait()
            # Host callbacks have printed into this cell once the barrier is passed.
            jax.effects_barrier()
            unfinished.wait = None
            return result, needs, seen.with_what(traced.trace)


def _parted(
    output: PyTree, updates: Collections, trace: CallTrace, mutable: tuple[str, ...]
) -> tuple[PyTree, dict[str, PyTree], dict[str, PyTree]]:
    """Sorts the result of a run: the output as it is returned, what was written, and what was sown."""
    updates = dict(updates)
    sown: dict[str, PyTree] = dict(updates.pop(SOWN, {}))
    for name in trace.sown:
        if name in updates:
            sown[name] = updates.pop(name)
    if mutable:
        both = {**updates, **sown}
        output = (output, {name: both[name] for name in mutable if name in both})
    return output, updates, sown


def needs_by_shapes(request: TraceRequest) -> TracedCall[None]:
    """Traces a call that runs op by op for its needs; for a model that cannot be traced, assumes all it may need."""
    try:
        return trace_call(request)
    except Exception as error:
        if not is_tracer_error(error):
            raise
    streams = request.guess.streams | {"dropout"} | request.model.streams()
    needs = Needs(streams, request.guess.mutable | request.mutable)
    return TracedCall(request, None, None, needs, CallTrace())


StartedProgram = PendingProgram | BuiltProgram
"""A program that is being compiled, or one that was found."""


def begin_program(request: TraceRequest, services: Services, since: float | None = None) -> StartedProgram:
    """Finds the program, or traces and lowers it and starts to compile it. The variables may be shapes.

    Args:
      since: clock time at which its preparation began, None for now.
    """
    return services.programs.start(request, lambda phase: services.on_phase(f"{phase} {request.name}"), since)


def finish_program(begun: StartedProgram, services: Services, variables: Variables | None = None) -> BuiltProgram:
    """Waits until the program is compiled, and adds the reason why it is new. Of several processes all are asked first.

    Args:
      variables: the arrays, where `begin_program` was given their shapes.
    """
    request = begun.request
    inputs = request.variables if variables is None else variables, request.arguments.leaves
    agree(services, request.placement, request.draw, request.name, digest=begun.digest, tree=inputs)
    built = services.programs.finish(begun, lambda phase: services.on_phase(f"{phase} {request.name}"))
    if variables is not None:
        held = {name: variables[name] for name in request.variables}
        built = replace(built, request=replace(request, variables=held))
    return reasons.explained(services.programs, built, new=isinstance(begun, PendingProgram))
