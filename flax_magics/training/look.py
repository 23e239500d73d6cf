"""Looks at the `--eval` data during a training: loss and metrics over all of them, in evaluation mode."""

from __future__ import annotations

from typing import Any, cast

import jax
import numpy as np
from msgspec.structs import replace

from ..base.curve import EVAL, Evaluation
from ..base.types import PyTree
from ..compile.cache import Program
from ..compile.placement import agree
from ..compile.trace import TraceRequest
from ..errors import FlaxMagicsError
from ..execution import record
from ..execution.execute import ApplyRequest, RunVariables, wanted_of
from ..models.base import Variables
from ..models.calls import signature_of
from ..rng.keys import Draw, StepDraw
from ..run import ExportFacts, LookFacts
from ..state.entry import ModelEntry
from .data import in_order, is_arrays
from .loop import LeftOut
from .loss import Loss


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
            self._programs[shapes] = built.program, built.request
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
