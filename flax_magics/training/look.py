"""Looks at the `--eval` data during a training: loss and metrics over all of them, in evaluation mode."""

from __future__ import annotations

from typing import Any, cast

import jax
from msgspec.structs import replace

from ..base.curve import Evaluation
from ..base.types import PyTree
from ..compile.cache import Program
from ..compile.trace import TraceRequest
from ..errors import FlaxMagicsError
from ..execution.call import request_of
from ..execution.execute import ApplyRequest
from ..models.base import Variables
from ..models.calls import signature_of
from ..rng.keys import Draw, StepDraw
from ..state.entry import ModelEntry
from .data import in_order
from .loop import LeftOut
from .loss import Loss

EVAL = "eval"
"""Stands before the names of the streams that a look takes: a step has others."""


class Look:
    """Evaluates a state; called with the number of finished steps and the variables.

    Args:
      request: the training's.
      entry: of the net, with its variables.
      text, data: the `--eval` data, and how they are written.
      batch: how many rows of arrays are looked at at once; None for all.
    """

    def __init__(
        self, request: ApplyRequest, draw: Draw, entry: ModelEntry, *, text: str, data: PyTree, batch: int | None
    ) -> None:
        self._request, self._draw, self._entry = request, draw, entry
        self._text, self._data, self._batch = text, data, batch
        self._programs: dict[object, tuple[Program, TraceRequest]] = {}
        """Shapes of a batch → the program of the loss alone, and what it was made for."""
        if data is not None:  # what the call cannot be in evaluation mode is told before the first step
            _ = replace(request, options=request.options._replace(mode="eval")).bound

    def __call__(self, step: int, variables: Variables, left_out: LeftOut) -> Evaluation:
        """The means over all batches, each weighed by its examples; programs are compiled in a block of `left_out`."""
        sums: dict[str, float] = {}
        examples = 0
        for number, (tree, size) in enumerate(in_order(self._text, self._data, self._batch)):
            program, request = self._program(tree, variables, left_out)
            # Each batch has numbers of its own, and each look those of the one before it, so that looks are comparable.
            draw = StepDraw.of(self._draw, number)
            keys = {name: draw.words(f"{EVAL} {name}") for name in sorted(program.needs.streams)}
            programs, dynamic = self._request.services.programs, request.arguments.dynamic
            (value, metrics), _ = programs.run(program, request.variables, keys, dynamic)
            for name, scalar in {"": value, **(metrics or {})}.items():
                sums[name] = sums.get(name, 0.0) + float(scalar) * size
            examples += size
        if not examples:
            raise FlaxMagicsError(f"`{self._text}` has no batch: there is nothing to look at.")
        means = {name: total / examples for name, total in sums.items()}
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
        request = request_of(self._entry, bound, self._draw, variables, asked.options)
        request = replace(request, model=replace(cast("Loss", bound.model), graded=False).as_model())
        shapes = tuple(map(signature_of, jax.tree_util.tree_leaves(tree)))
        if shapes not in self._programs:

            def phase(name: str) -> None:
                services.on_phase(f"{name} {self._request.entry.name}")

            with left_out():
                built = services.programs.finish(services.programs.start(request, phase), phase)
            assert built.program is not None
            self._programs[shapes] = built.program, built.request
        program, known = self._programs[shapes]
        arguments: Any = replace(known.arguments, leaves=request.arguments.leaves)
        held = {name: variables[name] for name in known.variables}
        return program, replace(known, variables=held, arguments=arguments)
