"""A training as a person writes it in plain JAX, Flax and optax: what `%flax_train` has to equal in every bit.

The exported script is these lines with the names of the session. `data` with `rows` are arrays of which a batch is
taken inside the program; with rows None `data` is the batch itself.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax import nnx, traverse_util

Batches = Iterable[tuple[Any, Any]]
"""`(data, rows)` for each step."""


class TrainedByHand(NamedTuple):
    """What is there after the last step. `variables`: linen's collections, or the NNX module's `Param` and what it wrote."""

    variables: Any
    opt_state: Any
    losses: list[Any]
    metrics: list[Any]


def shuffled(data: Any, batch: int, row_order_key: jax.Array, steps: int) -> Iterator[tuple[Any, Any]]:
    """The batches of arrays: each epoch in an order of its own, the last batch shorter."""
    n = len(jax.tree.leaves(data)[0])
    for step in range(steps):
        epoch, at = divmod(step, -(-n // batch))
        if at == 0:
            order = jax.random.permutation(jax.random.fold_in(row_order_key, epoch), n)
            order = np.asarray(order, np.int32)
        yield data, order[at * batch : (at + 1) * batch]


def whole(data: Any, steps: int) -> Batches:
    """All of the data as one batch, again and again."""
    return [(data, None)] * steps


def of_iterable(batches: Iterable[Any], steps: int) -> Batches:
    """The batches that an iterable gives, which is begun anew where it ends."""
    many = iter([])
    for _ in range(steps):
        batch = next(many, None)
        if batch is None:
            many = iter(batches)
            batch = next(many)
        yield batch, None


def train_linen(
    loss: Callable[..., Any],
    net: nn.Module,
    variables: Mapping[str, Any],
    optimizer: optax.GradientTransformation,
    batches: Batches,
    keys: Mapping[str, jax.Array],
    *,
    mutable: Iterable[str] = (),
    freeze: tuple[str, ...] = (),
    group: int = 1,
    start: tuple[int, Any] | None = None,
    **arguments: Any,
) -> TrainedByHand:
    """Trains a linen module.

    Args:
      loss: `loss(net, batch, **arguments)` returns a scalar with a dict of scalars.
      net: in train mode.
      batches: see above; where several steps are one program, all of one length.
      keys: of the draw's streams, which are folded with the number of the step.
      mutable: collections that the loss writes.
      freeze: patterns of the paths of parameters, as `fnmatch` has them.
      group: how many steps are one program.
      start: after how many steps it goes on, and the optimizer's state then.
    """

    def is_frozen(name: str) -> bool:
        return any(fnmatch.fnmatchcase(name, pattern) for one in freeze for pattern in (one, f"{one}/*"))

    flat = traverse_util.flatten_dict(variables["params"], sep="/")
    frozen = {name: value for name, value in flat.items() if is_frozen(name)}
    trained = {name: value for name, value in flat.items() if name not in frozen}
    trained = traverse_util.unflatten_dict(trained, sep="/")

    def train_step(state: Any, data: Any, rows: Any, step: Any, keys: Any, frozen: Any) -> Any:
        variables, opt_state, finite = state
        batch = data if rows is None else jax.tree.map(lambda array: array[rows], data)
        rngs = {stream: jax.random.fold_in(key, step) for stream, key in keys.items()}

        def loss_of(trained: Any) -> Any:
            flat = traverse_util.flatten_dict(trained, sep="/")
            params = traverse_util.unflatten_dict({**frozen, **flat}, sep="/")
            applied = nn.apply(loss, net, mutable=list(mutable))
            (value, metrics), updates = applied({**variables, "params": params}, batch, **arguments, rngs=rngs)
            return value, (metrics, updates)

        (value, (metrics, updates)), grads = jax.value_and_grad(loss_of, has_aux=True)(variables["params"])
        changes, new_opt_state = optimizer.update(grads, opt_state, variables["params"])
        new = {**variables, **updates, "params": optax.apply_updates(variables["params"], changes)}
        finite &= all_finite((value, grads, new["params"], updates))
        # A step that is not finite is not taken, and none after it.
        kept = jax.lax.cond(finite, lambda: (new, new_opt_state), lambda: (variables, opt_state))
        return (*kept, finite), (value, metrics)

    state = {**variables, "params": trained}, optimizer.init(trained) if start is None else start[1], True
    state, values = _loop(train_step, state, batches, (dict(keys), frozen), group, 0 if start is None else start[0])
    variables, opt_state, _ = state
    flat = traverse_util.flatten_dict(variables["params"], sep="/")
    params = traverse_util.unflatten_dict({**frozen, **flat}, sep="/")
    return TrainedByHand({**variables, "params": params}, opt_state, *values)


def train_nnx(
    loss: Callable[..., Any],
    net: nnx.Module,
    optimizer: optax.GradientTransformation,
    batches: Batches,
    keys: Mapping[str, jax.Array],
    *,
    freeze: tuple[str, ...] = (),
    written: tuple[Any, ...] = (nnx.BatchStat,),
    group: int = 1,
    start: tuple[int, Any] | None = None,
    **arguments: Any,
) -> TrainedByHand:
    """Trains an NNX module, which is in train mode and stays as it is; `written`: types that the loss writes.

    The optimizer is given what `nnx.Optimizer` gives it: an `nnx.State` of the module's own nesting.
    """

    def is_trained(path: Any, value: Any) -> bool:
        named = ("/".join(map(str, path)), type(value).__name__)
        patterns = [pattern for one in freeze for pattern in (one, f"{one}/*")]
        frozen = any(fnmatch.fnmatchcase(name, pattern) for name in named for pattern in patterns)
        return isinstance(value, nnx.Param) and not frozen

    graphdef, params, stats, rest = nnx.split(net, is_trained, nnx.Any(*written), ...)

    def train_step(state: Any, data: Any, rows: Any, step: Any, keys: Any, rest: Any) -> Any:
        params, stats, opt_state, finite = state
        batch = data if rows is None else jax.tree.map(lambda array: array[rows], data)
        rngs = {stream: jax.random.fold_in(key, step) for stream, key in keys.items()}

        def loss_of(params: Any) -> Any:
            model = nnx.merge(graphdef, params, stats, rest, copy=True)
            if rngs:
                nnx.reseed(model, policy="match_shape", **rngs)
            value, metrics = loss(model, batch, **arguments)
            return value, (metrics, nnx.state(model, nnx.Any(*written)))

        (value, (metrics, new_stats)), grads = jax.value_and_grad(loss_of, has_aux=True)(params)
        changes, new_opt_state = optimizer.update(grads, opt_state, params)
        new_params = optax.apply_updates(params, changes)
        finite &= all_finite((value, grads, new_params, new_stats))
        new, old = (new_params, new_stats, new_opt_state), (params, stats, opt_state)
        return (*jax.lax.cond(finite, lambda: new, lambda: old), finite), (value, metrics)

    state = params, stats, optimizer.init(params) if start is None else start[1], True
    state, values = _loop(train_step, state, batches, (dict(keys), rest), group, 0 if start is None else start[0])
    params, stats, opt_state, _ = state
    return TrainedByHand(nnx.merge_state(params, stats), opt_state, *values)


def all_finite(tree: Any) -> jax.Array:
    """Whether no number in the tree is NaN or infinite."""
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]).all()


def _loop(train_step: Any, state: Any, batches: Batches, constant: Any, group: int, first: int) -> Any:
    """The last state, and the lists of losses and metrics."""
    one_step = jax.jit(train_step)

    @jax.jit
    def train_steps(state: Any, data: Any, rows: Any, step: Any, *constant: Any) -> Any:
        """Several steps in one program; `rows` has those of each."""

        def one(state: Any, each: Any) -> Any:
            rows, step = each
            return train_step(state, data, rows, step, *constant)

        return jax.lax.scan(one, state, (rows, step + jnp.arange(group)))

    losses, metrics, waiting = [], [], []
    for step, batch in enumerate(batches, first):
        waiting.append(batch)
        if len(waiting) < group:
            continue
        data, rows = waiting[0]
        if group == 1:
            state, (loss, metric) = one_step(state, data, rows, step, *constant)
            losses.append(loss)
            metrics.append(metric)
        else:
            rows = np.stack([rows for _, rows in waiting])
            state, (loss, metric) = train_steps(state, data, rows, step - group + 1, *constant)
            losses += list(loss)
            metrics += [jax.tree.map(lambda many, n=n: many[n], metric) for n in range(group)]
        waiting = []
    return state, (losses, metrics)
