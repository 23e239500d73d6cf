"""One step of a training as a pure function, in the form in which a person writes it and, but for `kept`, an export too."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from msgspec import Struct

from ..base.types import HostArray, Leaf, PyTree
from ..compile.placement import Placement
from ..errors import FlaxMagicsError
from ..models.base import STRUCTURE, CallTrace, Needs, Updates, Variables
from ..models.calls import Arguments, Kwargs
from ..models.switch import WHEN_TRAINING
from .loss import Loss


class TrainState(NamedTuple):
    """What goes from step to step.

    Attributes:
      variables: of the net, by collection.
      opt_state: the optimizer's.
      alive: all steps so far were finite.
    """

    variables: Variables
    opt_state: PyTree
    alive: Leaf


class StepResult(NamedTuple):
    """What a step gives; `alive` as in its state, which the next step may take away."""

    state: TrainState
    loss: Leaf
    metrics: Mapping[str, Leaf]
    alive: Leaf


class Step(Struct, frozen=True, eq=False):
    """What determines the step of a training.

    Attributes:
      loss: of the net, which is set to train mode.
      needs: streams and collections that the loss asks for.
      optimizer: an optax transformation.
      arguments: those after the net, a batch in the place of the data.
      batched: names of their leaves that belong to the batch, in order.
      impl: PRNG implementation of the keys.
      placement: the mesh over which the rows of a batch are cut.
      takes_loss: the optimizer's `update` takes `value`, `grad` and `value_fn`, too, as those do that search along a line.
    """

    loss: Loss
    needs: Needs
    optimizer: Any
    arguments: Arguments
    batched: tuple[str, ...]
    impl: str
    takes_loss: bool = False
    placement: Placement | None = None

    def step(
        self, state: TrainState, keys: Mapping[str, Leaf], number: Leaf, rows: HostArray | None, arguments: Kwargs
    ) -> StepResult:
        """One step; pure. One that is not finite leaves the state as it is, and so do all after it.

        Args: see `taken`.
        """
        result = self.taken(state, keys, number, rows, arguments)
        return result._replace(state=kept(result.state, state))

    def taken(
        self, state: TrainState, keys: Mapping[str, Leaf], number: Leaf, rows: HostArray | None, arguments: Kwargs
    ) -> StepResult:
        """One step whose state is the new one, finite or not; pure.

        Args:
          keys: stream → key data of the draw, into which the step's number is folded.
          number: of the step, from 0 on.
          rows: those of the arrays in `arguments` that are the batch; None where they are the batch themselves.
          arguments: the traced ones by name.
        """
        record = CallTrace()
        run = self.loss.model.forward(self.loss.function, self.needs, record, self.impl)
        keys = {
            name: jax.random.fold_in(jax.random.wrap_key_data(words, impl=self.impl), number)
            for name, words in keys.items()
        }
        if rows is not None:
            arguments = {name: leaf[rows] if name in self.batched else leaf for name, leaf in arguments.items()}
            if self.placement is not None:  # each device takes its own rows of the arrays, which it has
                cut = partial(jax.lax.with_sharding_constraint, shardings=self.placement.of_rows(len(rows)))
                arguments |= {name: cut(arguments[name]) for name in self.batched}
        args, kwargs = self.arguments.rebuild(arguments)
        loss_of = self.loss.of_parameters(run, state.variables, (keys, args, kwargs))

        trained = self.loss.parameters(state.variables)
        (value, (metrics, updates)), grads = jax.value_and_grad(loss_of, has_aux=True)(trained)
        params, grads = self.loss.as_users(trained), self.loss.as_users(grads)
        of_loss: dict[str, Any] = {}
        if self.takes_loss:
            of_loss = {
                "value": value,
                "grad": grads,
                "value_fn": lambda tree: loss_of(self._as_values(tree, trained))[0],
            }
        params, opt_state = self.updated(params, grads, state.opt_state, **of_loss)
        variables = with_updates(state.variables, updates, record)
        # What nobody updates may be infinite: a mask, a cache before its first use.
        written = [tree for name, tree in variables.items() if tree is not state.variables[name]]
        variables = self.loss.put_into(variables, self._as_values(params, trained))
        alive = state.alive & is_finite((value, grads, params, written))
        return StepResult(TrainState(variables, opt_state, alive), value, metrics or {}, alive)

    def group(
        self,
        state: TrainState,
        keys: Mapping[str, Leaf],
        numbers: Leaf,
        rows: HostArray | None,
        arguments: Kwargs,
        *,
        stacked: bool,
    ) -> StepResult:
        """Several steps in one program, one for each of `numbers`; `rows` has a row for each, and so has the result.

        Args:
          stacked: the arguments of the batch have one for each, too.

        The state is good for nothing where one of them is not finite: to keep that before it takes a tenth of the time.
        """

        def one(state: TrainState, each: tuple[Leaf, HostArray | None, Kwargs]) -> tuple[TrainState, tuple[Leaf, ...]]:
            number, rows, batch = each
            result = self.taken(state, keys, number, rows, {**arguments, **batch})
            return result.state, result[1:]

        batches = {name: arguments[name] for name in self.batched if stacked}
        state, results = jax.lax.scan(one, state, (numbers, rows, batches))
        return StepResult(state, *results)

    def updated(self, params: PyTree, grads: PyTree, opt_state: PyTree, **of_loss: Any) -> tuple[PyTree, PyTree]:
        """Parameters and optimizer state after one update of the optimizer."""
        import optax  # type: ignore[import-untyped]

        changes, opt_state = self.optimizer.update(grads, opt_state, params, **of_loss)
        return optax.apply_updates(params, changes), opt_state

    def _as_values(self, tree: PyTree, like: PyTree) -> PyTree:
        """The inverse of `Loss.as_users`; `like` has the places of the leaves."""
        leaves, treedef = jax.tree_util.tree_flatten(like)
        filled = partial(jax.tree_util.tree_unflatten, treedef)
        # The numbers of the leaves, sent the same way, tell where each has come to stand.
        places = jax.tree_util.tree_leaves(self.loss.as_users(filled(range(len(leaves)))))
        ordered = dict(zip(places, jax.tree_util.tree_leaves(tree), strict=True))
        return filled([ordered[n] for n in range(len(leaves))])


def kept(new: TrainState, old: TrainState) -> TrainState:
    """`new` where it is alive, else what there was before."""
    leaves, structure = jax.tree_util.tree_flatten((new.variables, new.opt_state))
    treedef: Any = structure
    before = treedef.flatten_up_to((old.variables, old.opt_state))
    moved = [place for place, leaf in enumerate(leaves) if leaf is not before[place]]
    # As `lax.cond(alive, lambda: new, lambda: old)`, for which XLA would copy old and new. A `where` changes the bits of
    # what XLA joins with it.
    _, chosen = jax.lax.while_loop(
        lambda carry: ~carry[0],
        lambda carry: (jnp.asarray(True), [before[place] for place in moved]),
        (new.alive, [leaves[place] for place in moved]),
    )
    for place, leaf in zip(moved, chosen, strict=True):
        leaves[place] = leaf
    variables, opt_state = treedef.unflatten(leaves)
    return TrainState(variables, opt_state, new.alive)


def lacks_loss(error: TypeError) -> bool:
    """Whether an optimizer's `update` has failed without the loss: `optax.lbfgs`, `optax.contrib.reduce_on_plateau`."""
    return "missing" in str(error) and "'value'" in str(error)


def with_updates(variables: Variables, updates: Updates, record: CallTrace) -> Variables:
    """`variables` with what a step wrote: statistics and the like; neither sown values nor keys and counts of streams.

    Raises:
      FlaxMagicsError: an NNX module has got other attributes, so that the next step would be another program.
    """
    if STRUCTURE in updates:
        others = () if record.structure is None else record.structure.others
        hint = None
        if any(name.rpartition(".")[2] in WHEN_TRAINING for name in others):
            hint = "the command sets the mode of the net: leave `.eval()` and `.train()` out of the loss"
        named = ", ".join(f"`{name}`" for name in others[:4]) + (
            f" and {len(others) - 4} more" if len(others) > 4 else ""
        )
        raise FlaxMagicsError(f"the loss sets {named} of the net, and a step keeps no other attributes.", hint=hint)
    updated = dict(variables)
    for name in updates.keys() & variables.keys() - record.sown:
        before, after = variables[name], updates[name]
        # Of an NNX module the keys and counts of streams are no variables here: each step has those of its draw.
        in_place = name not in record.written
        updated[name] = {**before, **{key: after[key] for key in before if key in after}} if in_place else after
    return updated


def is_finite(tree: PyTree) -> Leaf:
    """Whether no floating-point number in the tree is NaN or infinite, as an array."""
    floats = [leaf for leaf in jax.tree_util.tree_leaves(tree) if jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)]
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in floats]).all()
