"""Nets of every kind that is trained, in linen and in NNX, each with a loss; and data for all of them."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import numpy as np
import optax
from flax import nnx

RANDOM = np.random.RandomState(0)
DATA = {"x": RANDOM.randn(22, 4, 3).astype(np.float32), "y": RANDOM.randint(0, 3, 22)}
ADAMW = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(optax.cosine_decay_schedule(1e-2, 2000)))


def loss(net: Any, batch: Any, train: bool) -> Any:
    logits = net(batch["x"], train=train)
    value = optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]).mean()
    return value, {"accuracy": (logits.argmax(-1) == batch["y"]).mean()}


def of_module(net: Any, batch: Any) -> Any:
    logits = net(batch["x"])
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]).mean(), {"mean": logits.mean()}


class Linen(nn.Module):
    """A dense net with the layers of these kinds before it."""

    kinds: tuple[str, ...] = ()

    @nn.compact
    def __call__(self, x: Any, train: bool = False) -> Any:
        if "convolution" in self.kinds:
            x = nn.relu(nn.BatchNorm(use_running_average=not train)(nn.Conv(4, (3,))(x)))
        if "attention" in self.kinds:
            x = nn.Dropout(0.3, deterministic=not train)(nn.LayerNorm()(nn.Dense(4)(x)))
            x = nn.MultiHeadDotProductAttention(2, dropout_rate=0.3, deterministic=not train)(x)
        if "recurrent" in self.kinds:
            x = nn.RNN(nn.LSTMCell(5))(x)
        return nn.Dense(3)(nn.relu(nn.Dense(8)(x.reshape(len(x), -1))))


class Nnx(nnx.Module):
    """The same in NNX."""

    def __init__(self, kinds: tuple[str, ...], rngs: nnx.Rngs) -> None:
        self.kinds, width = kinds, 3
        if "convolution" in kinds:
            self.conv, self.norm = nnx.Conv(3, 4, (3,), rngs=rngs), nnx.BatchNorm(4, rngs=rngs)
            width = 4
        if "attention" in kinds:
            self.dense, self.layer_norm = nnx.Linear(width, 4, rngs=rngs), nnx.LayerNorm(4, rngs=rngs)
            self.dropout = nnx.Dropout(0.3, rngs=rngs)
            self.attention = nnx.MultiHeadAttention(2, 4, dropout_rate=0.3, decode=False, rngs=rngs)
            width = 4
        if "recurrent" in kinds:
            self.lstm, width = nnx.RNN(nnx.LSTMCell(width, 5, rngs=rngs)), 5
        self.first, self.last = nnx.Linear(4 * width, 8, rngs=rngs), nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        if "convolution" in self.kinds:
            x = nnx.relu(self.norm(self.conv(x)))
        if "attention" in self.kinds:
            x = self.attention(self.dropout(self.layer_norm(self.dense(x))))
        if "recurrent" in self.kinds:
            x = self.lstm(x)
        return self.last(nnx.relu(self.first(x.reshape(len(x), -1))))


KINDS = ("convolution", "attention", "recurrent")


def net_and_loss(api: str, *kinds: str) -> tuple[Any, Any]:
    """A net of these kinds, and its loss; `api` is linen or nnx."""
    return (Linen(kinds), loss) if api == "linen" else (Nnx(kinds, nnx.Rngs(0)), of_module)
