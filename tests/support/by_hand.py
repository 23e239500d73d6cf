"""Models and comparisons that several tests use."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from flax import nnx

SUPPORT = str(Path(__file__).parent)
"""For scripts in processes of their own."""


class MyModel(nn.Module):
    """The model of Flax's notebook The Sharp Bits."""

    num_neurons: int
    training: bool

    @nn.compact
    def __call__(self, x: Any) -> Any:
        x = nn.Dense(self.num_neurons)(x)
        return nn.Dropout(rate=0.5, deterministic=not self.training)(x)


class Normed(nn.Module):
    """BatchNorm and dropout, switched by an argument."""

    @nn.compact
    def __call__(self, x: Any, train: bool) -> Any:
        x = nn.Dense(4)(x)
        x = nn.BatchNorm(use_running_average=not train)(x)
        return nn.Dropout(rate=0.5, deterministic=not train)(x)


def notebook_x() -> jax.Array:
    """An input of the notebook's shape, from a key that no session splits."""
    return jax.random.uniform(jax.random.key(42), (3, 4, 4))


def bits(tree: Any) -> list[tuple[str, str, tuple[int, ...], bytes]]:
    """Every leaf of `tree` down to its bytes; equal lists mean equal bits."""
    out = []
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        if jax.dtypes.issubdtype(getattr(leaf, "dtype", None), jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        array = np.asarray(leaf)
        out.append((jax.tree_util.keystr(path), str(array.dtype), array.shape, array.tobytes()))
    return out


def keys_of(draw: int = 1, seed: int = 0) -> Any:
    """`keys_of(2)("dropout", "noise")`: the keys of a draw's streams, worked out from the rule and from nothing of ours."""
    old = root = jax.random.key(seed)
    params = dropout = root
    for _ in range(draw):
        old = root
        root, params, dropout = jax.random.split(root, 3)

    def key(stream: str) -> jax.Array:
        if stream in ("params", "dropout"):
            return params if stream == "params" else dropout
        tag = int.from_bytes(hashlib.sha256(stream.encode()).digest()[:4], "big") | 1 << 31
        return jax.random.fold_in(old, np.uint32(tag))

    return lambda *streams: {stream: key(stream) for stream in streams}


_jitted: dict[Any, Any] = {}


def apply_by_hand(
    module: Any,
    variables: Any,
    keys: Any,
    *args: Any,
    mutable: Any = False,
    method: Any = None,
    afresh: bool = False,
    **kwargs: Any,
) -> Any:
    """`jax.jit` of `apply`, with keys and every array and number among the arguments as arguments of the program.

    Args:
      afresh: trace again even if this call was traced before, where what the module reads (globals, Flax's own state)
        may have changed since.
    """
    leaves, tree = jax.tree_util.tree_flatten((args, kwargs))
    traced = [isinstance(leaf, (jax.Array, np.ndarray, int, float)) and not isinstance(leaf, bool) for leaf in leaves]
    static = [leaf for leaf, is_traced in zip(leaves, traced, strict=True) if not is_traced]

    def run(variables: Any, keys: Any, given: Any) -> Any:
        given, rest = iter(given), iter(static)
        filled = [next(given) if is_traced else next(rest) for is_traced in traced]
        args, kwargs = jax.tree_util.tree_unflatten(tree, filled)
        return module.apply(variables, *args, rngs=keys, mutable=mutable, method=method, **kwargs)

    # By identity: `run` keeps alive what it was made for.
    place = (id(module), id(method), repr(mutable), tree, tuple(traced), tuple(map(id, static)))
    if afresh or place not in _jitted:
        _jitted[place] = jax.jit(run), module, method
    return _jitted[place][0](
        variables, keys, [leaf for leaf, is_traced in zip(leaves, traced, strict=True) if is_traced]
    )


class Ticks:
    """A clock that moves by one second at each look."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1.0
        return self.now


def sown_off(net: Any) -> list[Any]:
    """Takes the intermediate values off an NNX model, where the session never leaves them, and gives them."""
    found = []
    for _, part in list(nnx.iter_graph(net)):
        for name, value in list(vars(part).items()) if isinstance(part, nnx.Pytree) else ():
            if isinstance(value, nnx.Intermediate) and not isinstance(value, nnx.Perturbation):
                found.append(value)
                delattr(part, name)
    return found


def values(tree: Any) -> list[bytes]:
    """The bytes of every leaf, wherever it is."""
    return sorted(row[-1] for row in bits(tree))


STATIC_ARGUMENTS = {"n": 1, "how": "relu", "twice": False, "act": jax.nn.softplus}
STATIC_CHANGES = [
    ({"n": 2}, "n: 1 → 2"),
    ({"how": "tanh"}, "how: 'relu' → 'tanh'"),
    ({"twice": True}, "twice: False → True"),
    ({"act": jax.nn.sigmoid}, "act: softplus → sigmoid"),
    ({"act": None}, "act: given before"),
]
"""Static arguments of a call, and what is another in the next, with how its report says so."""
