"""What an export leaves out because it only shows something, and what it keeps."""

from __future__ import annotations

import ast

import pytest

from flax_magics.export.looks import is_a_look

MODULES = {"jax": "jax", "jnp": "jax.numpy", "np": "numpy", "nn": "flax.linen", "plt": "matplotlib.pyplot"}


def look(text: str, bound: tuple[str, ...] = ()) -> bool:
    return is_a_look(ast.parse(text, mode="eval").body, MODULES, bound)


@pytest.mark.parametrize(
    "text",
    [
        "y",
        "y.shape",
        "y[:2]",
        "variables['params']['Dense_0']['kernel']",
        "y.mean(), y.std()",
        "float(((pred - targets) ** 2).mean())",
        "jax.tree.map(jnp.shape, variables)",
        "jax.tree.map(lambda leaf: leaf.shape, variables)",
        "jnp.abs(y - z).max()",
        "jax.nn.softmax(y)[:3]",
        "len(losses) if losses else None",
        "{name: leaf.shape for name, leaf in params.items()}",
        "f'{loss:.3f}'",
        "net",
    ],
)
def test_a_value_that_nobody_takes_is_a_look(text):
    assert look(text)


@pytest.mark.parametrize(
    "text",
    [
        "net(x)",
        "losses.append(1)",
        "plt.plot(losses)",
        "jax.tree.map(print, variables)",
        "jax.tree.map(step, variables)",
        "jax.config.update('jax_enable_x64', True)",
        "np.random.seed(0)",
        "np.save('y.npy', y)",
        "jnp.set_printoptions(precision=3)",
        "optimizer.update(grads)",
        "(y := 3)",
        "len(losses.pop())",
        "[print(y) for y in ys]",
        "y[losses.pop()]",
    ],
)
def test_what_may_do_something_is_none(text):
    assert not look(text)


def test_a_function_of_the_codes_own_is_none_whatever_it_is_called():
    assert look("sum(y)")
    assert not look("sum(y)", bound=("sum",))
