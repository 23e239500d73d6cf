"""Linen models of many kinds, each as somebody writes it."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import flax
import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp


class Sows(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        x = nn.Dense(4)(x)
        self.sow("intermediates", "hidden", x)
        return x, None


class Heads(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(4, name="body")(x)

    @nn.nowrap
    def helper(self, x):
        return x

    @nn.compact_name_scope
    def head(self, x):
        return nn.Dense(4, name="head_dense")(self.helper(x))


class Graph(NamedTuple):
    nodes: Any
    edges: Any
    senders: Any
    globals: Any = None


class GraphNet(nn.Module):
    @nn.compact
    def __call__(self, graph):
        messages = nn.Dense(4)(graph.edges) * nn.Dense(4)(graph.nodes)[graph.senders]
        nodes = jax.ops.segment_sum(messages, graph.senders, graph.nodes.shape[0])
        return graph._replace(nodes=nodes, edges=None)


@flax.struct.dataclass
class Batch:
    image: Any
    scale: float = 1.0
    name: str = flax.struct.field(pytree_node=False, default="batch")


@dataclasses.dataclass(frozen=True)
class Settings:
    width: int = 4
    bias: bool = True


class Takes(nn.Module):
    @nn.compact
    def __call__(self, batch, settings):
        return nn.Dense(settings.width, use_bias=getattr(settings, "bias", True))(batch.image) * batch.scale


class Plain(nn.Module):
    @nn.compact
    def __call__(self, x, n=1, how="relu", twice=False, act=None, shift=0.5):
        x = nn.Dense(4)(x) + shift
        for _ in range(n):
            x = getattr(nn, how)(x)
        x = act(x) if act is not None else x
        return x * 2 if twice else x


class Sampler(nn.Module):
    @nn.compact
    def __call__(self, x, key):
        return nn.Dense(4)(x) + jax.random.normal(key, (4,))


class Weak(nn.Module):
    """Variables that take the dtype of what they are combined with."""

    @nn.compact
    def __call__(self, x):
        steps = self.variable("steps", "n", lambda: jnp.asarray(0))
        steps.value = steps.value + 1
        return x * self.param("scale", lambda key: jnp.asarray(1.5)) + steps.value


class Pair(NamedTuple):
    weight: Any
    bias: Any


@flax.struct.dataclass
class Weights:
    pair: Pair
    scale: Any


class Structured(nn.Module):
    @nn.compact
    def __call__(self, x):
        made = self.param("all", lambda key: Weights(Pair(jax.random.normal(key, (4,)), jnp.zeros(4)), jnp.ones(())))
        boxed = self.param("mesh", nn.with_partitioning(nn.initializers.ones, ("a",)), (4,))
        return (x * made.pair.weight + made.pair.bias) * made.scale + boxed
