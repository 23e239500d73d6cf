"""The options of a training, completed by what an earlier one of the net had."""

from __future__ import annotations

import ast
import re

from msgspec.structs import replace

from ..base.curve import Task
from ..base.digest import kind_of
from ..base.text import clean
from ..errors import FlaxMagicsError, written
from ..execution.call import Call
from ..line.expression import without_option
from ..state.entry import ModelEntry
from ..state.training import Position, Training, TrainOptions


def data_text(call: str) -> str:
    """The data as they are written in a call, `train` of `loss(net, train)`."""
    try:
        tree = ast.parse(call, mode="eval").body
    except SyntaxError:  # a gap in the place of the arguments of a script
        return "data"
    return ast.unparse(tree.args[1]) if isinstance(tree, ast.Call) and len(tree.args) > 1 else "data"


def resumed_of(entry: ModelEntry, call: Call) -> Training:
    """The training that `--resume` goes on with. Raises FlaxMagicsError where there is none."""
    if entry.training is None:
        message = (
            f"`{entry.name}` has no training to go on with: no step of one is finished, or others took its weights."
        )
        command = without_option(call.command, "--resume")
        missing = "" if "--optimizer" in command else " --optimizer …"
        missing += "" if re.search("--(epochs|steps)", command) else " --steps …"
        raise FlaxMagicsError(message, **written(f"{command}{missing} {call.text}"))
    return entry.training


def completed(entry: ModelEntry, options: TrainOptions, resumed: Training | None, line: str) -> TrainOptions:
    """The options with what an earlier training of the net had, where they leave it out.

    Raises:
      FlaxMagicsError: they do not say how long or by which optimizer, contradict each other, or are no numbers.
    """
    for option, number in (("--batch", options.batch), ("--epochs", options.epochs), ("--steps", options.steps)):
        if number is not None and (isinstance(number, bool) or not isinstance(number, int) or number < 1):
            raise FlaxMagicsError(f"{option} takes a number, 1 or more, not {number!r}.")
    if options.epochs is not None and options.steps is not None:
        message = "--epochs and --steps both say how long the training is. Leave one of them out."
        raise FlaxMagicsError(message, **written(without_option(line, "--epochs", "[0-9]+")))
    if resumed is not None:
        _check_same(options, resumed, line)
        asked = options.epochs is not None or options.steps is not None
        options = replace(
            options,
            batch=resumed.batch,
            epochs=options.epochs if asked else resumed.epochs,
            steps=options.steps if asked else resumed.steps,
            freeze=resumed.freeze,
        )
    elif options.epochs is None and options.steps is None:
        message = "how long? --steps counts steps, --epochs times through the data."
        command, _, call = line.partition(" ")
        raise FlaxMagicsError(message, **written(f"{command} --steps 100 {call}"))
    optimizer = options.optimizer or entry.optimizer
    if optimizer is None or optimizer.transformation is None:
        command, _, call = line.partition(" ")
        text = "optax.adamw(1e-3)" if optimizer is None else clean(optimizer.text)  # which may be of a file
        known = f" It was {text} before the load, which runs no code." if optimizer is not None else ""
        message = f"`{entry.name}` has no optimizer: any of optax's is one.{known}"
        raise FlaxMagicsError(message, **written(f"import optax\n{command} --optimizer {text} {call}"))
    transformation = optimizer.transformation
    if not (callable(getattr(transformation, "init", None)) and callable(getattr(transformation, "update", None))):
        raise FlaxMagicsError(
            f"--optimizer takes an optax transformation, and `{optimizer.text}` is {kind_of(transformation)}.",
            form=line.replace(optimizer.text, "optax.adamw(…)", 1),
        )
    return replace(options, optimizer=optimizer)


def _check_same(options: TrainOptions, resumed: Training, line: str) -> None:
    """Raises FlaxMagicsError where a training should go on with another batch, or with other parameters frozen."""
    began = "" if resumed.batch is None else f"--batch {resumed.batch}"
    if options.batch not in (None, resumed.batch):
        raise _other("--batch", "[0-9]+", began, line)
    if options.freeze and options.freeze != resumed.freeze:
        raise _other("--freeze", r"\S+", " ".join(f"--freeze {clean(one)}" for one in resumed.freeze), line)


def _other(option: str, value: str, began: str, line: str) -> FlaxMagicsError:
    began = f"`{began}`, which need not be given again" if began else f"without {option}"
    write = without_option(line, option, value)
    return FlaxMagicsError(f"a training goes on as it began: {began}.", **(written(write) if write != line else {}))


def position_of(training: Training) -> Position:
    """How far the finished steps came in an iterable of batches."""
    epoch, position = training.curve.epoch, training.position
    if position is None:  # they took arrays
        return Position(*divmod(training.step, epoch or training.step + 1))
    # Without a state it would be gone through to its end once more.
    ends = position.state is None and position.batches == epoch
    return Position(position.epoch + 1) if ends else position


def task_of(options: TrainOptions, resumed: Training | None, *, arrays: bool, once: bool) -> Task:
    """What a training is asked to do, once its options are completed; `arrays` and `once`: of its data."""
    assert options.optimizer is not None
    return Task(
        optimizer=options.optimizer.text,
        batch=options.batch,
        epochs=options.epochs,
        steps=options.steps,
        eval=options.eval_text,
        freeze=options.freeze,
        arrays=arrays,
        once=once,
        parts=() if resumed is None else (*resumed.curve.task.parts, resumed.step),
        looks=() if resumed is None else (*resumed.curve.task.looks, len(resumed.curve.evals)),
    )
