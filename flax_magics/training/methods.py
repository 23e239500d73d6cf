"""The methods of a `Session` that concern a loss, and trainings once more: how each began, and its steps."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
from msgspec.structs import replace

from ..base.digest import bytes_of, owned_copy
from ..base.threads import Overtaken, at_once, uninterrupted, until_committed
from ..base.types import PyTree
from ..code.fingerprint import Fingerprint, fingerprint
from ..compile.cache import Services
from ..compile.placement import in_force
from ..errors import FlaxMagicsError
from ..execution import surroundings
from ..execution.call import Call, as_names
from ..execution.surroundings import stand_outside
from ..rng.keys import Draw, RootKey, RunKeys, SeenKeys, StepDraw
from ..run import RELEASED, Run
from ..state.entry import ModelEntry, Origin, TrainRecipe
from ..state.handles import entry_of
from ..state.runs import Inputs, RunLog, StoredRun, backwards, with_newer
from ..state.state import State
from ..state.training import Optimizer, Training, TrainOptions
from .data import ArrayData, data_of
from .grad import LossCall, grad_model
from .loss import METHOD, Loss, check
from .nets import loss_of
from .record import Progress
from .resumption import data_text
from .train import Trainer

if TYPE_CHECKING:
    from ..compile.cache import Services
    from ..execution.record import Outcome
    from ..models.calls import Function
    from ..run import Note, Run
    from ..state.entry import ModelEntry
    from ..state.state import ReplayBudget, State
    from .record import Progress


ATTEMPTS = 5
"""How often a training begins anew before it gives up, where others draw before its first step is kept."""


class LossMethods:
    """The part of a Session that takes gradients."""

    _state: State
    services: Services
    autosaving: Any
    _committing: threading.Lock
    replacements: int
    _keeping: ReplayBudget
    _check: Callable[[State], None]
    _entry_now: Callable[[str, object], tuple[ModelEntry, tuple[Note, ...]]]
    _commit: Callable[[State, Outcome], None]

    def grad(
        self,
        loss: Function,
        model: object,
        /,
        *args: PyTree,
        mode: str = "train",
        freeze: str | Iterable[str] = (),
        **kwargs: PyTree,
    ) -> Run:
        """Makes one draw, calls `loss(net, *args, **kwargs)`, and takes its gradients by the net's parameters.

        Returns the Run, whose output are `Gradients`: `.loss`, `.metrics`, `.grads`, `.updates`. Nothing that the loss
        writes is kept.

        Args:
          loss: a function of the net and further arguments, which returns a scalar, or (scalar, dict of scalars).
          model: the net: a registered name or an item of `models`.
          mode: `train` or `eval` sets the net's own switch, and a parameter of the loss with a switch's name.
          freeze: patterns of parameters that are taken as constants: `encoder`, `*/bias`.
        """
        if mode not in ("train", "eval"):
            raise FlaxMagicsError(f"`mode` is 'train' or 'eval', not {mode!r}.")
        name = entry_of(self._state.models, model).name
        called = str(getattr(loss, "__name__", "loss"))
        called = called if called.isidentifier() else "loss"  # a lambda
        arguments = ", ".join([name, *["…"] * len(args), *(f"{key}=…" for key in kwargs)])
        patterns = as_names(freeze)
        options = ["%flax_grad", *(["--eval"] if mode == "eval" else []), *(f"--freeze {one}" for one in patterns)]
        call = Call(METHOD, args, kwargs, f"{called}({arguments})", command=" ".join(options))
        return self.run_grad(name, loss, call, mode=mode, freeze=patterns)

    def train(
        self,
        loss: Function,
        model: object,
        data: PyTree,
        /,
        *args: PyTree,
        optimizer: object = None,
        batch: int | None = None,
        epochs: int | None = None,
        steps: int | None = None,
        eval: PyTree = None,
        freeze: str | Iterable[str] = (),
        resume: bool = False,
        **kwargs: PyTree,
    ) -> Run:
        """Makes one draw and trains the net with `loss(net, batch, *args, **kwargs)`, for some epochs or steps.

        Returns the Run: `.losses`, `.metrics`, `.eval`, `.steps`. Finished steps are kept, whatever ends the training.

        Args:
          loss: a function of the net and a batch, which returns a scalar, or (scalar, dict of scalars).
          model: the net: a registered name or an item of `models`.
          data: a dict or tuple of arrays with one leading axis, or an iterable of batches.
          optimizer: an optax transformation; None for that of the net's last training.
          batch: cut arrays into batches of so many rows, shuffled in each epoch; None for all rows in each step.
          epochs, steps: how long; one of them. With `resume` the earlier total where there is neither.
          eval: data to look at in evaluation mode: each epoch, or ten times in a training that counts steps.
          freeze: patterns of parameters that stay as they are: `encoder`, `*/bias`.
          resume: go on with the net's last training after its last finished step, with its `batch` and `freeze`. `eval`
            has to be given again.
        """
        name = entry_of(self._state.models, model).name
        called = str(getattr(loss, "__name__", "loss"))
        called = called if called.isidentifier() else "loss"  # a lambda
        arguments = ", ".join([name, "data", *["…"] * len(args), *(f"{key}=…" for key in kwargs)])
        call = Call(METHOD, (data, *args), kwargs, f"{called}({arguments})", command="%flax_train")
        options = TrainOptions(
            optimizer=None if optimizer is None else Optimizer("optax.…", optimizer),
            batch=batch,
            epochs=epochs,
            steps=steps,
            eval=eval,
            eval_text="" if eval is None else "data",
            freeze=as_names(freeze),
            resume=resume,
        )
        return self.run_train(name, loss, call, options)

    def training_of(self, name: str) -> Training | None:
        """What `--resume` goes on with for that model; None where there is nothing."""
        entry = self._state.models.get(name)
        return None if entry is None else entry.training

    # No context manager: the frames of this command are looked at, and contextlib's are not among them.
    def _net_of(
        self, name: str, function: Any, call: Call, module: object
    ) -> tuple[State, ModelEntry, tuple[Note, ...]]:
        """The session's state, the net of a loss, and notes from finding it.

        Raises:
          FlaxMagicsError: the command cannot stand here, or the loss is none.
        """
        line = f"{call.command} {call.text}"
        stand_outside(surroundings.of_state, line, line)
        check(function, call.text, call.command)
        state = self._state
        return state, *self._entry_now(name, module)

    def run_train(
        self,
        name: str,
        function: Any,
        call: Call,
        options: TrainOptions,
        *,
        module: object = None,
        notes: tuple[Note, ...] = (),
    ) -> Run:
        """`train` of a parsed call, whose arguments are those after the net; see `Session.run_apply` for `module`."""
        for _ in range(ATTEMPTS):
            try:
                return self._train_once(name, function, call, options, module=module, notes=notes)
            except Overtaken:
                if call.args and isinstance(call.args[0], Iterator):  # some of its batches are gone
                    break
        # No first step was kept: the keys that it had are those of another run by now.
        message = (
            "something else drew from the session before the first step was kept: another thread, or the data as they were"
            " gone through. Nothing of this training is kept."
        )
        raise FlaxMagicsError(
            message, hint="draws that data need are made before a training, with a key for each batch"
        )

    def _train_once(
        self,
        name: str,
        function: Any,
        call: Call,
        options: TrainOptions,
        *,
        module: object,
        notes: tuple[Note, ...],
    ) -> Run:
        """`run_train`. Raises Overtaken where another thread, or the data, drew before the first step was kept."""
        from .methods import beginning_of, goes_on_as
        from .train import train_model

        state, entry, more = self._net_of(name, function, call, module)
        with entry.model.held_still:
            entry.model.has_same_layout()  # finds it anew if not; the block takes it as found
            freeze = options.freeze if entry.training is None or not options.resume else entry.training.freeze
            loss = loss_of(entry.model, function, call.text.partition("(")[0], freeze)
            limit = self._keeping.limit
            begun = None if options.resume else beginning_of(state, entry, loss, call, options, limit=limit)
            commit = Committing(self, state, begun, lambda recipe: goes_on_as(recipe, loss, call, options))
            said = (*more, *notes)
            services = self.services
            return train_model(
                state, entry, loss, call, options, services=services, said=said, commit=commit, limit=limit
            )

    @until_committed
    def run_grad(
        self,
        name: str,
        function: Any,
        call: Call,
        *,
        mode: str,
        freeze: tuple[str, ...] = (),
        module: object = None,
        notes: tuple[Note, ...] = (),
    ) -> Run:
        """`grad` of a parsed call, whose arguments are those after the net; see `Session.run_apply` for `module`."""
        from .grad import grad_model

        state, entry, more = self._net_of(name, function, call, module)
        with entry.model.held_still:
            entry.model.has_same_layout()  # finds it anew if not; the block takes it as found
            loss = loss_of(entry.model, function, call.text.partition("(")[0], freeze)
            outcome = grad_model(state, entry, loss, call, self.services, mode=mode, said=(*more, *notes))
            self._commit(state, outcome)
        return outcome.run


class Committing:
    """Makes the finished steps of a training part of a session, as often as there are some; called with them.

    Args:
      before: the session's state from which the training was worked out.
      begun: how it began, for replays; None where that is not kept, and for one that was resumed.
      goes_on_as: whether one that was resumed goes on by what it began with.
    """

    def __init__(
        self,
        session: LossMethods,
        before: State,
        begun: Beginning | None,
        goes_on_as: Callable[[TrainRecipe], bool],
    ) -> None:
        self._session, self._before, self._begun, self._goes_on_as = session, before, begun, goes_on_as
        self._last: Progress | None = None
        self._stored: StoredRun | None = None

    def __call__(self, progress: Progress) -> None:
        """Commits in one uninterruptible step: the entry, the Run in the place of the one before, and the root key.

        Raises:
          Overtaken: before the first commit: another thread has changed the session.
          FlaxMagicsError: after it: another thread has given the net other variables.
        """
        session, run, entry = self._session, progress.run, progress.entry
        # With other data or weights meanwhile it could not be done again from its beginning.
        if self._last is None and progress.resumed and not progress.changes:
            self._begun = self._resumed(run)
        stored = StoredRun(run) if self._begun is None else StoredRun(run, *self._begun)
        with uninterrupted(), session._committing:
            state = session._state
            if self._last is None:
                if self._is_overtaken(state, progress):
                    raise Overtaken
                state = self._first(state, stored, progress)
            else:
                if not _has_same_weights(state.models.get(entry.name), self._last.entry):
                    raise FlaxMagicsError(f"`{entry.name}` was changed by another thread while it was trained.")
                assert self._stored is not None
                runs = with_newer(state.runs, self._stored, stored)
                state = replace(state, models={**state.models, entry.name: entry}, runs=runs)
            if progress.write is not None:
                progress.write()
            session.replacements += 1
            at_once(((object.__setattr__, session, "_state", state),))
        was = self._before.models.get(entry.name) if self._last is None else self._last.entry
        self._last, self._stored = progress, stored
        last = run.output is not RELEASED
        if last and stored.origin is not None:
            session._keeping.noted.append(stored)
            session._keeping.look(stored.size)
        session._keeping.replace(None if was is None else was.replaced, entry.replaced)
        # A snapshot takes time of this thread: there is another one once that before is written.
        if session.autosaving is not None and (last or session.autosaving.idle):
            session.autosaving.after(stored.facts, state)

    def _is_overtaken(self, state: State, progress: Progress) -> bool:
        """Whether another thread has made a draw since, or given the net other weights: both are the training's own."""
        before, name = self._before, progress.entry.name
        drew = state.root is not before.root or state.opened is not before.opened
        same = _has_same_weights(state.models.get(name), before.models.get(name))
        return (drew and not progress.resumed) or not same

    def _first(self, state: State, stored: StoredRun, progress: Progress) -> State:
        """The state after the first commit: past the draw; one that was resumed takes the place of its earlier Run."""
        draw, run = progress.draw, progress.run
        # A root that is never split does no harm there, a missing one would hide a reused key.
        self._session.services.seen.roots.add(draw.next_root)
        if not progress.resumed:
            return state.after(stored, draw, progress.entry, None)
        state = state.with_variables(progress.entry)
        earlier = _earlier(state.runs, run)
        if earlier is not None:
            return replace(state, opened=None, runs=with_newer(state.runs, earlier, stored))
        return replace(state, opened=None, runs=RunLog.add(state.runs, stored))

    def _resumed(self, run: Run) -> Beginning | None:
        """How the training began that is resumed, as long as that is kept."""
        from .methods import Beginning

        earlier = _earlier(self._session._state.runs, run)
        if earlier is None or earlier.origin is None or earlier.inputs is None:
            return None
        # A replay would do all steps with the first loss and optimizer.
        if not isinstance(earlier.origin.how, TrainRecipe) or not self._goes_on_as(earlier.origin.how):
            return None
        return Beginning(earlier.origin, earlier.size, earlier.inputs)


def _has_same_weights(entry: ModelEntry | None, before: ModelEntry | None) -> bool:
    """Whether no run and no assignment has changed a net's weights; what runs have learned of it may be more by now."""
    if entry is None or before is None:
        return entry is before
    same = entry.model is before.model and entry.variables is before.variables and entry.training is before.training
    return same and entry.update_counts == before.update_counts


def _earlier(runs: RunLog | None, run: Run) -> StoredRun | None:
    """The run that a resumed training takes the place of."""
    for earlier in backwards(runs):
        facts = earlier.facts
        if facts.kind.trains and (facts.seed, facts.draw, facts.model) == (run.seed, run.draw, run.model):
            return earlier
    return None


class Beginning(NamedTuple):
    """What a `StoredRun` keeps of a training; `size` in bytes."""

    origin: Origin
    size: int
    inputs: Inputs


def beginning_of(
    state: State, entry: ModelEntry, loss: Loss, call: Call, options: TrainOptions, *, limit: int
) -> Beginning | None:
    """The beginning of a new training; None where it would hold more than `limit` bytes, or cannot be begun again.

    Of a module that the training builds anew it has the variables from before: it is built again in the same draw.

    Args:
      call: its arguments are those after the net.
    """
    data = call.args[0] if call.args else None
    # An iterator is gone through once.
    if hasattr(data, "__next__") and not hasattr(data, "__len__"):
        return None
    held, opened = entry.held, state.opened
    taken = opened is not None and opened[0] == entry.name and entry.ready
    leaves, structure = ([], None) if held is None else jax.tree_util.tree_flatten(held)
    inputs, treedef = jax.tree_util.tree_flatten((call.args, call.kwargs))
    pinned = entry.model.other_arrays()
    size = sum(map(bytes_of, (*leaves, *inputs, *pinned)))
    if size > limit:
        return None
    options = replace(options, optimizer=options.optimizer or entry.optimizer, eval=None)
    bare_entry = entry.without_variables()
    placement = in_force(state.placement)
    built = entry.built if entry.rebuild_next else None
    function, name, text = loss.function, loss.name, call.text
    recipe = TrainRecipe(bare_entry, function, name, options, text, taken, structure, pinned, placement, built)
    return Beginning(Origin(recipe, list(map(owned_copy, leaves))), size, (treedef, list(map(owned_copy, inputs))))


def goes_on_as(recipe: TrainRecipe, loss: Loss, call: Call, options: TrainOptions) -> bool:
    """Whether a training that is resumed has the loss, the call and the optimizer that it began with."""
    began, optimizer, same_optimizer = recipe.options.optimizer, options.optimizer, True
    if optimizer is not None and began is not None and optimizer.transformation is not began.transformation:
        digest = fingerprint(optimizer.transformation)
        same_optimizer = digest is not None and digest == fingerprint(began.transformation)
    code = Fingerprint(recipe.function).digest()
    same_loss = recipe.function is loss.function or (code is not None and code == Fingerprint(loss.function).digest())
    return same_optimizer and same_loss and recipe.call == call.text


class Again:
    """A training once more.

    Args:
      stored: its run, whose origin and inputs are there.
      steps: how many are done.
      models: the registered ones as they are now, of which the loss may read others than the net.
    """

    def __init__(self, stored: StoredRun, steps: int, models: Mapping[str, ModelEntry], services: Services) -> None:
        assert stored.origin is not None
        assert stored.inputs is not None
        recipe = stored.origin.how
        assert isinstance(recipe, TrainRecipe)
        assert isinstance(stored.facts.keys, RunKeys)
        self.facts, self.recipe = stored.facts, recipe
        self.services = _without_keys(replace(services, on_progress=lambda run: None))
        self.draw: Draw = stored.facts.keys.draw.first
        args, kwargs = jax.tree_util.tree_unflatten(*stored.inputs)
        entry = _entry_of(recipe, stored.origin)
        self.loss = loss_of(entry.model, recipe.function, recipe.loss, recipe.options.freeze)
        self.call = Call(METHOD, args, kwargs, recipe.call, command="%flax_replay")
        root = RootKey(self.draw.seed, self.draw.number - 1, self.draw.root, self.draw.impl)
        placement = recipe.placement
        self.state = State(root, {**models, entry.name: entry}, placement=placement)
        self.data = data_of(data_text(recipe.call), args[0], recipe.options.batch, placement=placement)
        options = replace(recipe.options, epochs=None, steps=steps, resume=False)
        last: list[Progress] = []
        with closing(self.data):
            ready = LossCall.of(
                self.state,
                entry,
                self.loss,
                replace(self.call, args=(self.data.first, *args[1:])),
                self.services,
                mode="train",
                said=(),
                again=(self.draw, recipe.taken),
            )
            self.trainer = Trainer(
                self.state, ready, self.call, options, self.data, said=(), resumed=None, commit=last.append
            )
            self.run = self.trainer.train()
        self.progress = last[-1]

    def gradients(self) -> Run:
        """The Run of the gradients in the step that comes next, with that step's batch and keys."""
        progress, step = self.progress, self.run.steps
        if progress.write is not None:
            progress.write()
        loss = replace(self.loss, model=progress.entry.model)
        call = replace(self.call, args=(self._batch(step), *self.call.args[1:]))
        again = StepDraw.of(self.draw, step), self.trainer.taken
        services = _without_keys(self.services)
        outcome = grad_model(self.state, progress.entry, loss, call, services, mode="train", said=(), again=again)
        return outcome.run

    def _batch(self, step: int) -> PyTree:
        """The batch that a step takes."""
        if isinstance(self.data, ArrayData):
            with closing(self.data):
                batch = self.data.take(step)
            assert batch is not None
            if batch.rows is None:
                return batch.tree
            tree, placement = (
                jax.tree_util.tree_map(lambda leaf: leaf[batch.rows], self.data.tree),
                self.recipe.placement,
            )
            if placement is None:
                return tree
            return jax.device_put(tree, placement.of_rows(len(batch.rows)))
        # Through all epochs before it, as the steps before it went.
        batches: Any = itertools.chain.from_iterable(itertools.repeat(self.call.args[0]))
        return next(itertools.islice(batches, step, None))


def _without_keys(services: Services) -> Services:
    """`services` that have seen no keys: what is done once more is given the keys that it had, and tells nothing of it."""
    return replace(services, seen=SeenKeys(set()))


def _entry_of(recipe: TrainRecipe, origin: Origin) -> ModelEntry:
    """The net as it was when the training began."""
    variables = None if recipe.structure is None else jax.tree_util.tree_unflatten(recipe.structure, origin.leaves)
    entry = recipe.entry.with_arrays(variables)
    return entry if recipe.built is None else replace(entry, built=recipe.built, rebuild_next=True)
