"""Trainings once more: what the session keeps of their beginning, and the same steps from there on."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from contextlib import closing
from typing import Any, NamedTuple

import jax
from msgspec.structs import replace

from ..base.digest import bytes_of, owned_copy
from ..base.types import PyTree
from ..code.fingerprint import Fingerprint, fingerprint
from ..compile.cache import Services
from ..compile.placement import in_force
from ..execution.call import Call
from ..rng.keys import Draw, RootKey, RunKeys, SeenKeys, StepDraw
from ..run import Run
from ..state.entry import ModelEntry, Origin, TrainRecipe
from ..state.runs import Inputs, StoredRun
from ..state.state import State
from ..state.training import TrainOptions
from .data import ArrayData, data_of
from .grad import LossCall, grad_model
from .loss import METHOD, Loss
from .nets import loss_of
from .options import data_text
from .record import Progress
from .train import Trainer


class Beginning(NamedTuple):
    """What a `StoredRun` keeps of a training; `size` in bytes."""

    origin: Origin
    size: int
    inputs: Inputs


def beginning_of(
    state: State, entry: ModelEntry, loss: Loss, call: Call, options: TrainOptions, *, limit: int
) -> Beginning | None:
    """The beginning of a new training; None where it would hold more than `limit` bytes, or cannot be begun again.

    Args:
      call: its arguments are those after the net.
    """
    data = call.args[0] if call.args else None
    # An iterator is gone through once; a module that is built anew has its first variables only then.
    anew = entry.rebuild_next and entry.built is not None
    if anew or (hasattr(data, "__next__") and not hasattr(data, "__len__")):
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
    recipe = TrainRecipe(bare_entry, loss.function, loss.name, options, call.text, taken, structure, pinned, placement)
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
    return recipe.entry.with_arrays(variables)
