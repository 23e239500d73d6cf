"""The optimizer of a training that goes on, and its state held against what it makes of the parameters."""

from __future__ import annotations

import jax

from ..base.digest import alike
from ..base.text import clean, plural
from ..base.types import PyTree
from ..errors import FlaxMagicsError
from ..state.models import differences
from ..state.training import Optimizer, Training
from ..state.trees import Differs, graft


def check_known(name: str, optimizer: Optimizer, command: str, call: str) -> None:
    """Raises FlaxMagicsError where nothing but the text of the optimizer is known: it came from a file.

    Args:
      name: of the model.
      command: with its options, such as `%flax_train --resume`.
      call: the loss's, as it is written.
    """
    if optimizer.transformation is None:
        raise FlaxMagicsError(
            f"the optimizer of `{name}` has to be named once more: it was loaded from a file, which runs no code.",
            write=_line(optimizer, command, call),
        )


def fitted_state(training: Training, optimizer: Optimizer, parameters: PyTree, last: Optimizer, command: str) -> PyTree:
    """The state of a training's optimizer in the classes of `optimizer`, which has to be one like it.

    Args:
      parameters: those that are trained, as the optimizer is given them.
      last: the one that the training had so far.
      command: with its options but `--optimizer`.

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
        shown = [clean(line) for line in changes[:6]] + [f"and {len(changes) - 6} more"] * (len(changes) > 6)
        raise FlaxMagicsError(message, hint="\n".join(shown), write=_line(last, command, training.call))
    return state


def _line(optimizer: Optimizer, command: str, call: str) -> str:
    """The command with the optimizer's text, which may be of a file."""
    return f"{command} --optimizer {clean(optimizer.text)} {clean(call)}"
