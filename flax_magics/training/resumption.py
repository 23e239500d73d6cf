"""What a training goes on with: the options of an earlier one of the net, its optimizer's state, and its Run so far."""

from __future__ import annotations

import ast
import hashlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from msgspec.structs import replace

from ..base.digest import alike, describe, is_key, kind_of
from ..base.measures import Task
from ..base.text import clean, plural
from ..base.types import Leaf, PyTree
from ..code.fingerprint import Fingerprint, fingerprint
from ..compile.disk_cache import settings
from ..compile.placement import Placement
from ..errors import FlaxMagicsError, written
from ..execution.call import Call
from ..line.expression import positional_names, without_option
from ..run import ExportFacts, Note, Run
from ..state.entry import ModelEntry
from ..state.models import differences
from ..state.runs import RunLog, of_draw
from ..state.training import CodeDigests, Optimizer, Position, Training, TrainOptions
from ..state.trees import Differs, graft
from .data import is_arrays
from .loss import METHOD, Loss


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
        message = f"--optimizer takes an optax transformation, and `{optimizer.text}` is {kind_of(transformation)}."
        right = "optax.adamw(…)"
        if isinstance(transformation, str) and "(" in transformation:  # in quotes, as a shell would want it
            right = transformation
        elif callable(transformation) and optimizer.text.replace(".", "").isidentifier():  # `optax.adam`
            right = f"{optimizer.text}(…)"
        raise FlaxMagicsError(message, **written(line.replace(optimizer.text, right, 1)))
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


READ = 1 << 24
"""The most bytes that are read of an array, to tell whether it is the one of before."""
DIGEST = " #"
"""Stands between the kind of an array and the digest of its values."""
ARGUMENT = re.compile(r"--eval|[^\W\d]\w*|")
"""The argument at the beginning of a place."""
WHAT = {"": "it goes on with other data", "--eval": "it looks at other data"}


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


def notes_of_resumed(training: Training, options: TrainOptions, *, unsure: str) -> Iterator[Note]:
    """Notes on what `--resume` cannot know, or was not told; `unsure`: see `BatchData.unsure`."""
    if unsure:
        yield Note("resume", f"{clean(unsure)}: that all is as without the stop is not claimed")
    looked_at = training.curve.task.eval
    if looked_at and options.eval is None:
        text = f"it no longer looks at `{clean(looked_at)}`: the data of `--eval` have to be given again"
        yield Note("resume", text)


def code_of(entry: ModelEntry, loss: Loss, optimizer: Optimizer) -> CodeDigests:
    """Digests of what the steps of a training are made of; `loss`: of the entry's net."""
    return CodeDigests(
        loss=Fingerprint(loss.function).digest(),
        net=entry.model.code(),
        optimizer=fingerprint(optimizer.transformation),
        settings=settings(),
    )


def inputs_of(loss: Loss, call: Call, looks: PyTree) -> dict[str, str]:
    """`Training.inputs` of a call, whose arguments are those after the net.

    The places in the data have no name before them, those in other arguments that of the loss's parameter, and those in
    the `--eval` data, `looks`, that of the option. Iterables are left out: only going through them would tell.
    """
    data, *rest = call.args
    names = positional_names(loss.signature(METHOD), len(call.args))[1:]
    kinds: dict[str, str] = {}
    for name, batches in (("", data), ("--eval", looks)):
        if is_arrays(batches):
            kinds |= _kinds_in(name, batches)
        elif isinstance(batches, (list, tuple)):
            kinds[name] = f"{len(batches)} batches{_digest(jax.tree_util.tree_leaves(batches))}"
    for name, argument in (*zip(names, rest, strict=False), *call.kwargs.items()):
        kinds |= _kinds_in(name, argument)
    return kinds


def _kinds_in(name: str, tree: PyTree) -> dict[str, str]:
    rows = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {f"{name}{jax.tree_util.keystr(path)}": f"{_kind(leaf)}{_digest([leaf])}" for path, leaf in rows}


def _kind(leaf: Leaf) -> str:
    """Dtype and shape of an array, any other leaf as it is written."""
    dtype = _dtype(leaf)
    return describe(leaf if dtype is None else jax.ShapeDtypeStruct(leaf.shape, dtype))


def _dtype(leaf: Leaf) -> Any:
    """The dtype that JAX gives a NumPy array, so that its numbers are the same data as a JAX array's; None for others."""
    numbers = isinstance(leaf, (np.ndarray, np.generic)) and leaf.dtype.kind in "biufc"
    return jax.dtypes.canonicalize_dtype(leaf.dtype) if numbers else None


def _digest(leaves: list[Leaf]) -> str:
    """A digest of arrays to stand behind their kind: of all rows up to `READ` bytes, else of some; empty for others."""
    hasher = hashlib.sha256()
    try:
        for leaf in leaves:
            array = jax.random.key_data(leaf) if is_key(leaf) else leaf
            every = -(-array.nbytes * len(leaves) // READ)
            array = np.asarray(array[::every] if every > 1 and array.ndim else array)
            hasher.update(array.astype(_dtype(array) or array.dtype, copy=False).tobytes())
    except Exception:  # no array, or one whose values are not here
        return ""
    return f"{DIGEST}{hasher.hexdigest()[:16]}" if leaves else ""


def changes_of(
    training: Training,
    entry: ModelEntry,
    call: Call,
    options: TrainOptions,
    *,
    code: CodeDigests,
    inputs: Mapping[str, str],
) -> Iterator[str]:
    """What is otherwise than when the training stopped, in words; `entry`, `code` and `inputs` are those of now."""
    after, name = f"after {plural(training.step, 'step')}", entry.name
    yield from (f"{after} {what}" for what in _other_inputs(training, call, options, inputs))
    source, held = entry.source_now(), entry.held
    if source is not None and source.changed:
        yield f"{after} the weights of {name} were changed by your code: it goes on with these"
    elif source is not None and held is not None:
        of_one = {kind: replace(source, marks={kind: mark}) for kind, mark in source.marks.items()}
        others = [kind for kind, alone in of_one.items() if alone.now(held, ()).changed]
        if others:
            yield f"{after} another run updated {' and '.join(others)} of {name}: it goes on with that"
    loss, earlier = (text.partition("(")[0] for text in (call.text, clean(training.call)))
    before = training.code or code  # a file has none
    if loss != earlier and (before is code or before.loss != code.loss):
        yield f"{after} it goes on with another loss: `{loss}` for `{earlier}`"
    elif before.loss != code.loss:
        yield f"{after} it goes on with another loss: `{loss}` was edited, or what it reads is other now"
    if before.net != code.net:
        yield f"{after} it goes on with another net: the code of {name} was edited, or what it reads is other now"
    if before.settings != code.settings:
        yield f"{after} JAX or Flax is set otherwise than before: its precision, its devices, its flags or the like"
    optimizer, last = clean(options.optimizer.text if options.optimizer else ""), clean(training.curve.task.optimizer)
    if before.optimizer != code.optimizer or (before is code and optimizer != last):
        what = f"{optimizer} for {last}" if optimizer != last else f"{optimizer} has other numbers or functions now"
        yield f"{after} it goes on with another optimizer: {what}"


def change_of_mesh(training: Training, placement: Placement | None) -> Iterator[str]:
    """What is said where the steps before ran on other devices: their sums are made in another order."""
    axes = "" if placement is None else placement.axes
    if axes != training.mesh:
        was, now = (f"the mesh {clean(text)}" if text else "one device" for text in (training.mesh, axes))
        yield f"after {plural(training.step, 'step')} it runs on {now}, and before on {was}"


def _other_inputs(training: Training, call: Call, options: TrainOptions, inputs: Mapping[str, str]) -> Iterator[str]:
    """What of the arguments is otherwise: a text each for the data, those of `--eval`, and the others."""
    before = training.inputs or inputs
    written = {"": data_text(call.text), "--eval": options.eval_text}
    texts: dict[str, list[str]] = {}
    for argument in dict.fromkeys(ARGUMENT.match(place)[0] for place in (*before, *inputs)):  # type: ignore[index]
        old, new = (
            {place: kind for place, kind in kinds.items() if ARGUMENT.match(place)[0] == argument}  # type: ignore[index]
            for kinds in (before, inputs)
        )
        if argument == "--eval" and not (old and new):  # what it no longer looks at is told elsewhere
            continue
        name = written.get(argument, argument)
        what = texts.setdefault(WHAT.get(argument, "it goes on with other arguments"), [])
        if old.keys() != new.keys():
            what.append(f"`{name}` is put together otherwise")
            continue
        for place, kind in new.items():
            (kind, _, digest), (kind_before, _, digest_before) = kind.partition(DIGEST), old[place].partition(DIGEST)
            leaf = f"`{name}{place.removeprefix(argument)}`"
            if kind != kind_before:
                what.append(f"{leaf} is {kind}, and was {clean(kind_before)}")
            elif digest and digest_before and digest != digest_before:
                what.append(f"{leaf} has other values")
    for begin, what in texts.items():
        if what:
            yield f"{begin}: {', '.join(what[:4])}" + (f", and {len(what) - 4} more" if len(what) > 4 else "")


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
        parts = (*began.parts, replace(began, looks=(), parts=()))
        spelling = replace(spelling, looks=(*began.looks, *spelling.looks), parts=parts, **of_init)
    beginning = {name: getattr(before, name) for name in ("made", "weights", "first", "registered")}
    return replace(run, spelling=spelling, **beginning)
