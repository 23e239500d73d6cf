"""NNX modules of many kinds, each as somebody writes it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from by_hand import bits, keys_of, sown_off, values
from flax import nnx

from flax_magics import Session

WARNINGS = pytest.mark.filterwarnings("ignore::DeprecationWarning")


List = getattr(nnx, "List", list)


Dict = getattr(nnx, "Dict", dict)


NO_CHECKS: dict[str, Any] = {"pytree": False} if hasattr(nnx, "List") else {}
"""What newer versions want of a class that keeps layers in plain lists."""


def an_input() -> jax.Array:
    return jax.random.uniform(jax.random.key(42), (5, 4))


def a_sequence(features: int = 4) -> jax.Array:
    return jax.random.normal(jax.random.key(7), (2, 5, features))


class Own(nnx.Module):
    def __init__(self, features, *, rngs):
        self.linear = nnx.Linear(4, features, rngs=rngs)
        self.norm = nnx.BatchNorm(features, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return self.dropout(self.norm(self.linear(x)))


class Noise(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.linear = nnx.Linear(4, 4, rngs=rngs)
        self.rngs = rngs.fork()

    def __call__(self, x: Any) -> Any:
        return self.linear(x) + jax.random.uniform(self.rngs.noise(), x.shape)


class Holding(nnx.Module):
    """Layers that `make` gives, and a call that `run` makes of them."""

    def __init__(self, make: Any, run: Any, **streams: Any):
        self.run = run
        self.block = make(nnx.Rngs(**streams or {"params": 0, "noise": 1}))

    def __call__(self, x: Any) -> Any:
        return self.run(self.block, x)


def stack(cls: Any, n: int = 3) -> Any:
    return nnx.split_rngs(splits=n)(nnx.vmap(cls, in_axes=(0,), out_axes=0))


def scanned(block: Any, x: Any) -> Any:
    return nnx.scan(lambda block, x: block(x), in_axes=(0, nnx.Carry), out_axes=nnx.Carry)(block, x)


class Remembered(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    @nnx.jit
    def __call__(self, x: Any) -> Any:
        return self.dropout(self.norm(x))


class Odd(nnx.Module, **NO_CHECKS):
    """Numbers and 64-bit arrays in variables, bare arrays, plain containers, functions, a layer twice."""

    def __init__(self, rngs: nnx.Rngs):
        self.count, self.factor, self.flag = nnx.Variable(0), nnx.BatchStat(1.5), nnx.Variable(True)
        self.table = nnx.Variable(np.arange(4.0))
        self.bare, self.of_numpy = jnp.zeros(()), np.arange(4.0)
        self.layers = [nnx.Linear(4, 4, rngs=rngs), nnx.Linear(4, 4, rngs=rngs)]
        self.more = {"first": self.layers[0], "pair": (nnx.BatchNorm(4, rngs=rngs), nnx.relu)}
        self.layers[1].kernel = self.layers[0].kernel
        self.pool = functools.partial(jnp.clip, max=2.0)
        self.tree = nnx.Variable({"a": jnp.ones(4), "b": (jnp.zeros(()),)})

    def __call__(self, x: Any) -> Any:
        self.count.value = self.count.value + 1
        self.bare = self.bare + 1
        tree = self.tree.value
        self.tree.value = {"a": tree["a"] * 2, "b": (tree["b"][0] + 1,)}
        for layer in (*self.layers, self.more["first"], *self.more["pair"]):
            x = layer(x)
        return self.pool(x) * self.factor.value + self.table.value + self.of_numpy + self.bare + tree["a"]


class Keyed(nnx.Module):
    def __init__(self):
        self.typed, self.legacy = nnx.Variable(jax.random.key(3)), nnx.Variable(jax.random.PRNGKey(3))

    def __call__(self, x):
        key, self.typed[...] = jax.random.split(self.typed[...])
        self.legacy[...] = jax.random.split(self.legacy[...])[0]
        return x + jax.random.normal(key, x.shape)


def with_refs(net: Any) -> Any:
    return nnx.to_refs(net) if hasattr(nnx, "to_refs") else nnx.with_vars(net, ref=True)


class OfLinen(nn.Module):
    @nn.compact
    def __call__(self, x: Any, train: bool = True) -> Any:
        x = nn.BatchNorm(use_running_average=not train)(nn.Dense(4)(x))
        return nn.Dropout(0.5, deterministic=not train)(x)


class OfNnx(nnx.Module):
    def __init__(self, features: int, rngs: nnx.Rngs):
        self.linear, self.norm = nnx.Linear(4, features, rngs=rngs), nnx.BatchNorm(features, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs, rng_collection="mask")

    def __call__(self, x: Any) -> Any:
        y = self.dropout(self.norm(self.linear(x)))
        self.sow(nnx.Intermediate, "seen", y)
        return y


class AroundNnx(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        return nn.Dropout(0.5, deterministic=False)(nnx.bridge.to_linen(OfNnx, 4, name="inner")(x))


def runs_as_by_hand(
    session: Session,
    make: Callable[[], Any],
    *args: Any,
    mode: str | None = None,
    method: str | None = None,
    hand: Callable[[Any], Any] | None = None,
    rngs: tuple[str, ...] = (),
    eager: bool = False,
    **kwargs: Any,
) -> Any:
    """Applies what `make` gives three times, and compares output, state and intermediates with the same by hand.

    Args:
      hand: what a person does to have the mode; without it `train()` or `eval()`.
      rngs: streams that a person would pass as `rngs`.
    """
    net, other = make(), make()
    session.register("net", net)
    if mode is not None:
        (hand or (lambda net: net.train() if mode == "train" else net.eval()))(other)
    tags = {str(part.key.tag) for _, part in nnx.iter_graph(other) if isinstance(part, nnx.RngStream)}
    leaves, tree = jax.tree_util.tree_flatten((args, kwargs))
    traced = [isinstance(leaf, (jax.Array, np.ndarray, float)) for leaf in leaves]

    def call(net: Any, traced_leaves: Any, passed: dict[str, Any]) -> Any:
        rest = iter(traced_leaves)
        filled = [next(rest) if is_traced else leaf for leaf, is_traced in zip(leaves, traced, strict=True)]
        args, kwargs = jax.tree_util.tree_unflatten(tree, filled)
        return getattr(net, method or "__call__")(*args, **kwargs, **passed)

    by_hand = call if eager else nnx.jit(call)
    run: Any = None
    for draw in (1, 2, 3):
        nnx.reseed(other, policy="match_shape", **keys_of(draw)(*tags))
        passed = {"rngs": nnx.Rngs(**keys_of(draw)(*rngs))} if rngs else {}
        traced_leaves = [leaf for leaf, is_traced in zip(leaves, traced, strict=True) if is_traced]
        output = by_hand(other, traced_leaves, passed)
        run = session.apply("net", *args, mode=mode, method=method, eager=eager, **kwargs)
        assert bits(run.output) == bits(output)
        assert values(run.sown) == values(sown_off(other))
        assert bits(nnx.state(net)) == bits(nnx.state(other))
        assert {note.kind for note in run.notes} <= ({"stream"} if draw == 1 else {"key again"})
    return run


class NormedMLP(nnx.Module):
    """Two dense layers with statistics and dropout between them, from 6 to 3."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.first, self.last = nnx.Linear(6, 8, rngs=rngs), nnx.Linear(8, 3, rngs=rngs)
        self.norm, self.dropout = nnx.BatchNorm(8, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        return self.last(self.dropout(nnx.relu(self.norm(self.first(x)))))
