"""The table of gradients by module: its numbers, and modules that repeat."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from html_reader import Reader
from sessions import session_of

from flax_magics.base.measures import LayerGradient
from flax_magics.report.tables import gradient_lines, gradient_table

X = jax.random.normal(jax.random.key(0), (3, 8))


def test_numbers_of_each_module():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            return nn.Dense(2, name="last")(nn.Dense(4, name="first")(x))

    session = session_of(Net())
    run = session.grad(lambda net, x: (net(x) ** 2).mean(), "net", X, freeze="first/bias")
    params, grads = session.models["net"].variables["params"], run.output.grads
    first, last = run.layers
    assert (first.path, first.parameters, first.frozen) == (("first",), 36, 4)
    assert (last.path, last.parameters, last.frozen, last.zeros, last.bad) == (("last",), 10, 0, 0, 0)
    squares = sum(
        float(np.sum(np.square(np.asarray(leaf, np.float64)))) for leaf in jax.tree_util.tree_leaves(grads["last"])
    )
    weights = sum(
        float(np.sum(np.square(np.asarray(leaf, np.float64)))) for leaf in jax.tree_util.tree_leaves(params["last"])
    )
    assert np.isclose(last.squares, squares, rtol=1e-12)
    assert np.isclose(last.weights, weights, rtol=1e-12)
    assert run.output.layers == run.layers
    assert "first" in Reader(run._repr_html_()).text
    assert "last" in Reader(run.output._repr_html_()).text
    assert str(run.output).splitlines()[0] == repr(run.output)


def layer(*path: str, norm: float = 1.0, zeros: int = 0, bad: int = 0, frozen: int = 0) -> LayerGradient:
    return LayerGradient(path, "", 10, frozen, norm**2, 4.0, zeros, bad)


def test_equal_blocks_are_one_row_with_a_range():
    blocks = [layer(f"Block_{n}", "Dense_0", norm=float(n + 1), zeros=n % 2) for n in range(12)]
    assert gradient_lines([layer("head"), *blocks], "net") == [
        "  module                            params  gradient  of weights     zeros",
        "  net                                  130      25.5        3.54       5 %",
        "    Block_0 … Block_11  12 × Block      10    1 … 12     0.5 … 6  0 … 10 %",
        "      Dense_0                           10    1 … 12     0.5 … 6  0 … 10 %",
        "    head                                10         1         0.5       0 %",
    ]


def test_a_frozen_module_and_one_that_is_not_finite():
    rows = gradient_lines([layer("a", frozen=10), layer("b", norm=float("nan"), bad=3)], "net")
    assert rows == [
        "  module  params  gradient  of weights  zeros",
        "  net         20       NaN         NaN    0 %",
        "    a         10    frozen",
        "    b         10       NaN         NaN    0 %",
    ]


def test_deep_models_are_cut_at_a_level_and_say_so():
    deep = [layer(f"a{n}_x", f"b{m}_y", f"c{k}_z") for n in range(3) for m in range(4) for k in range(5)]
    assert gradient_lines(deep, "net")[-1] == "  1 deeper level counted in"
    assert len(gradient_table(deep, "net")["rows"]) <= 40  # type: ignore[arg-type]


def test_the_text_fits_80_columns():
    wide = [layer("a_module_with_a_very_long_name_of_its_own" * 2, "and_another_one_inside_of_it", norm=1e-7)]
    assert max(map(len, gradient_lines(wide, "net"))) <= 80


def test_bars_are_as_long_as_norms():
    rows: Any = gradient_table([layer("a", norm=3.0), layer("b", norm=4.0)], "net")["rows"]
    assert [(name, round(share, 3)) for name, *_, share in rows] == [("net", 1.0), ("a", 0.6), ("b", 0.8)]
    assert jnp.isfinite(rows[0][-1])
