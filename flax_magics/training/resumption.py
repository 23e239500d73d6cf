"""What a training goes on with: the state of its optimizer, and the Run that it was so far."""

from __future__ import annotations

from collections.abc import Iterator

import jax
from msgspec.structs import replace

from ..base.digest import alike
from ..base.text import clean, plural
from ..base.types import PyTree
from ..errors import FlaxMagicsError
from ..run import ExportFacts, Note, Run
from ..state.entry import ModelEntry
from ..state.models import differences
from ..state.runs import RunLog, of_draw
from ..state.training import Optimizer, Training, TrainOptions
from ..state.trees import Differs, graft


def fitted_state(training: Training, optimizer: Optimizer, parameters: PyTree, last: Optimizer, line: str) -> PyTree:
    """The state of a training's optimizer in the classes of `optimizer`, which has to be one like it.

    Args:
      parameters: those that are trained, as the optimizer is given them.
      last: the one that the training had so far.
      line: the whole line as it is written.

    Raises:
      FlaxMagicsError: the optimizer makes another state of the parameters.
    """
    expected = jax.eval_shape(optimizer.transformation.init, parameters)
    state, changes = training.opt_state, tuple[str, ...]()
    try:
        state = graft(state, expected)
    except Differs as error:
        changes = (str(error),)
    else:
        shapes = jax.eval_shape(lambda: state)
        changes = differences(shapes, expected)
        if not changes and not alike(*map(jax.tree_util.tree_structure, (shapes, expected))):
            changes = ("it is put together otherwise",)
    if changes:
        message = (
            f"the optimizer's state after {plural(training.step, 'step')} does not fit {clean(optimizer.text)}:"
            " a training goes on with the optimizer that it began with."
        )
        shown = [clean(change) for change in changes[:6]] + [f"and {len(changes) - 6} more"] * (len(changes) > 6)
        write = line.replace(optimizer.text, clean(last.text), 1)
        raise FlaxMagicsError(message, hint="\n".join(shown), write=write)
    return state


def notes_of_resumed(training: Training, entry: ModelEntry, options: TrainOptions, *, exact: bool) -> Iterator[Note]:
    """Notes on what is otherwise than it would be without the stop; `exact`: batches are a function of the step."""
    if not exact:
        text = "goes on with what the iterable gives now: that all is as without the stop is not claimed"
        yield Note("resume", text)
    looked_at, source = training.curve.task.eval, entry.source_now()
    if looked_at and options.eval is None:
        text = f"it no longer looks at `{clean(looked_at)}`: the data of `--eval` have to be given again"
        yield Note("resume", text)
    if source is not None and source.changed:
        yield Note("resume", f"the weights of {entry.name} were changed by your code since: it goes on with these")


def begun_as(run: Run, runs: RunLog | None) -> Run:
    """The Run of a training that goes on, with how it began: as the earlier Run has it, whose place it takes."""
    of_this = (stored.facts for stored in of_draw(runs, run.seed, run.draw) if stored.facts.kind.trains)
    # A file may have brought a history in which another model was trained in that draw.
    earlier = [facts for facts in of_this if facts.model == run.model]
    if not earlier:
        return run
    before = earlier[-1]
    spelling, began = run.spelling, before.spelling
    if spelling is not None and began is not None:  # a run of a file has none
        of_init = {name: getattr(began, name) for name in ExportFacts.__struct_fields__ if name.startswith("init_")}
        spelling = replace(spelling, looks=(*began.looks, *spelling.looks), **of_init)
    beginning = {name: getattr(before, name) for name in ("made", "weights", "first", "registered")}
    return replace(run, spelling=spelling, **beginning)
