"""Every kind of tree that a session may hold, saved and loaded: the next run is the same in every bit, in either order.

A file depends on the trees of a session and on how an init was called, not on how a run is written: what else a model may
do is in test_linen_kinds and test_nnx_kinds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import linen_kinds as of_linen
import nnx_kinds as of_nnx
import numpy as np
import pytest
from by_hand import Normed, bits, notebook_x
from flax import nnx
from flax.core import freeze
from linen_kinds import Structured, Weak
from sessions import session_of

from flax_magics import Session
from flax_magics.base.threads import at_once
from flax_magics.models.construction import adopt

pytestmark = of_nnx.WARNINGS


class Plain(nn.Module):
    @nn.compact
    def __call__(self, x):
        first, (second, nothing) = self.param(
            "tree", lambda key: (jax.random.normal(key, (4,)), [jnp.ones(4), jnp.zeros((0, 4))])
        )
        count = self.variable("counts", "n", lambda: {"runs": 3, "factor": 0.5})
        count.value = {"runs": count.value["runs"] + 1, "factor": count.value["factor"]}
        return x * first + second * count.value["factor"] + nothing.sum() + count.value["runs"]


class Boxed(nn.Module):
    @nn.compact
    def __call__(self, x):
        init = nn.with_logical_partitioning(nn.initializers.lecun_normal(), ("embed", "mlp"))
        layers = nn.scan(
            of_linen.Sows,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=2,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        x, _ = layers()(x, None)
        x = nn.Dense(4, kernel_init=init)(x)
        return nn.Dense(4, kernel_init=nn.with_partitioning(nn.initializers.lecun_normal(), (None, "model")))(x)


class Small(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dense(4, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)(x)
        scale = self.param("scale", lambda key: jnp.ones((4,), jnp.float8_e4m3fn))
        return x * scale.astype(jnp.bfloat16)


class Keys(nn.Module):
    @nn.compact
    def __call__(self, x):
        for impl in ("threefry2x32", "rbg", "unsafe_rbg"):
            key = self.variable("keys", impl, lambda impl=impl: jax.random.key(7, impl=impl))
            drawn, key.value = jax.random.split(key.value)
            x = x + jax.random.normal(drawn, x.shape)
        return x


class OfNnx(nnx.Module):
    def __init__(self, rngs):
        self.layers = of_nnx.List([nnx.Linear(4, 4, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)])
        self.more = of_nnx.Dict(norm=nnx.BatchNorm(4, rngs=rngs))
        self.mean = nnx.BatchStat(jnp.zeros(4), written_by="hand")

    def __call__(self, x):
        self.mean[...] = x.mean(0)
        return self.more["norm"](self.layers[1](self.layers[0](x)))


class WeakOwn(nnx.Module):
    def __init__(self):
        self.scale = nnx.Param(jnp.asarray(1.5))
        self.steps = nnx.Variable(jnp.asarray(0))

    def __call__(self, x):
        return self.steps + self.scale * x


@dataclass
class Kind:
    """A model, its calls before it is saved, and the call that is held against the one of who has loaded it."""

    make: Callable[[], Any]
    args: tuple[Any, ...]
    options: dict[str, Any] = field(default_factory=dict)
    before: Callable[[Session], object] | None = None
    runs: int = 1


def frozen(session: Session) -> None:
    session.apply("net", x, train=True)
    session.models["net"].variables = freeze(dict(session.models["net"].variables))


def attention() -> Any:
    return nn.MultiHeadDotProductAttention(num_heads=2, decode=True)


def decoding() -> Any:
    net = nnx.MultiHeadAttention(num_heads=2, in_features=8, decode=True, rngs=nnx.Rngs(0))
    net.init_cache((2, 5, 8))
    return net


def around_linen() -> Any:
    net = nnx.bridge.ToNNX(of_nnx.OfLinen(), rngs=nnx.Rngs(0, dropout=1))
    nnx.bridge.lazy_init(net, rows)
    return net


x, rows, step = notebook_x(), of_nnx.an_input(), of_nnx.a_sequence(8)[:, :1]
graph = of_linen.Graph(jnp.ones((3, 4)), jnp.arange(16.0).reshape(4, 4), jnp.array([0, 1, 2, 0]))
TRAIN = {"mode": "train"}
KINDS = {
    "dicts, one of them updated": Kind(Normed, (x,), {"train": True}, runs=2),
    "FrozenDicts, assigned": Kind(Normed, (x,), {"train": True}, frozen),
    "tuples, lists, empty arrays, numbers": Kind(Plain, (x,), runs=2),
    "dataclasses and named tuples of the user's": Kind(Structured, (x,)),
    "names of axes": Kind(Boxed, (x,)),
    "weakly typed": Kind(Weak, (jnp.linspace(0, 1, 12).astype(jnp.bfloat16),)),
    "bfloat16 and float8": Kind(Small, (x.astype(jnp.bfloat16),)),
    "keys of every implementation": Kind(Keys, (x,), runs=2),
    "a cache that moves on": Kind(attention, (step,), before=lambda s: s.init("net", of_nnx.a_sequence(8)), runs=2),
    "variables of two methods": Kind(of_linen.Heads, (x,), {"method": "head"}, runs=2),
    "an init called with a named tuple": Kind(of_linen.GraphNet, (graph,)),
    "an init called with dataclasses": Kind(of_linen.Takes, (of_linen.Batch(x, 2.0), of_linen.Settings())),
    "an init called with what is static": Kind(of_linen.Plain, (x,), {"n": 2, "how": "tanh", "act": nn.softplus}),
    "an init called with a key": Kind(of_linen.Sampler, (x, jax.random.key(9))),
    "NNX's variables in linen": Kind(of_nnx.AroundNnx, (rows,), runs=2),
    "NNX: numbers, containers, shared leaves": Kind(lambda: of_nnx.Odd(nnx.Rngs(0)), (rows,), TRAIN, runs=2),
    "NNX: lists, dicts, metadata": Kind(lambda: OfNnx(nnx.Rngs(0)), (rows,), TRAIN, runs=2),
    "NNX: keys, typed and legacy": Kind(of_nnx.Keyed, (rows,), runs=2),
    "NNX: references": Kind(lambda: of_nnx.with_refs(of_nnx.Remembered(nnx.Rngs(0))), (rows,), TRAIN, runs=2),
    "NNX: layers and streams in stacks": Kind(
        lambda: of_nnx.Holding(of_nnx.stack(of_nnx.Noise), of_nnx.scanned), (rows,)
    ),
    "NNX: a cache": Kind(decoding, (step,), runs=2),
    "NNX: weakly typed": Kind(WeakOwn, (jnp.linspace(0, 1, 12).astype(jnp.bfloat16),)),
    "NNX: linen's variables": Kind(around_linen, (rows,), {"train": False}),
}


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_who_has_loaded_a_session_goes_on_as_it_would_have(kind, tmp_path):
    path = tmp_path / "session.safetensors"
    session = session_of(kind.make(), seed=3)
    if kind.before is not None:
        kind.before(session)
    for _ in range(kind.runs):
        session.apply("net", *kind.args, **kind.options)
    saved = session.save(path)
    held = leaves_of(session)
    run = session.apply("net", *kind.args, **kind.options)
    for registered_first in (True, False):
        other, net = Session(seed=99), without_values(kind.make())
        if registered_first:
            other.register("net", net)
            restored = other.load(path)
            assert (restored.models, restored.waiting) == (("net",), ())
        else:
            other.load(path)
            (change,) = other.register_all({"net": net})
            assert (change.variables, change.unfit) == ("restored", ())
        assert (other.seed, other.draws, len(other)) == (saved.seed, saved.draws, saved.runs)
        assert leaves_of(other) == held
        again = other.apply("net", *kind.args, **kind.options)
        assert bits(again.output) == bits(run.output)
        assert bits(dict(again.sown)) == bits(dict(run.sown))
        assert leaves_of(other) == leaves_of(session)
        assert (again.seed, again.draw, dict(again.changed)) == (run.seed, run.draw, dict(run.changed))


def leaves_of(session: Session) -> Any:
    """Every variable down to its bytes, how the trees are put together, and what is weakly typed."""
    variables: Any = session.models["net"].collections() or {}
    leaves, tree = jax.tree_util.tree_flatten(dict(variables))
    return bits(dict(variables)), str(tree), [getattr(leaf, "weak_type", type(leaf).__name__) for leaf in leaves]


def without_values(net: Any) -> Any:
    """`net`, no variable of which has its value if it is an NNX module."""
    model: Any = adopt(net, "net")
    if model.api == "nnx":
        slots = [slot for slot in model.layout.slots if not slot.sown and not slot.fixed]
        at_once([slot.assignment(jax.tree_util.tree_map(other_value, slot.read())) for slot in slots])
    return net


def other_value(leaf: Any) -> Any:
    """Another value of the same shape and dtype."""
    if not hasattr(leaf, "dtype"):
        return leaf
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(jax.random.key_data(leaf) ^ 1, impl=jax.random.key_impl(leaf))
    return np.ones_like(leaf) if isinstance(leaf, np.ndarray) else jnp.ones_like(leaf)
