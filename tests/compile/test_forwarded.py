"""What a traced program hands through: told from what it works out, through every equation that holds a program."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import pytest

from flax_magics.compile.trace import forwarded


def origins(function: Any, *args: Any, repeated: bool = False) -> tuple[int | None, ...]:
    return forwarded(jax.make_jaxpr(function)(*args).jaxpr, repeated=repeated)


def both(x: Any, y: Any) -> Any:
    return x, y + 1


X, Y = jnp.ones(3), jnp.zeros(3)


@pytest.mark.parametrize(
    "wrapped",
    [
        both,
        jax.jit(both),
        jax.checkpoint(both),
        jax.jit(jax.checkpoint(jax.jit(both))),
        lambda x, y: jax.lax.optimization_barrier((x, y + 1)),
        lambda x, y: jax.lax.cond(y.sum() > 0, both, lambda x, y: (x, y * 2), x, y),
        lambda x, y: jax.lax.while_loop(lambda c: c[1].sum() < 9, lambda c: both(*c), (x, y)),
        lambda x, y: jax.lax.fori_loop(0, 3, lambda i, c: both(*c), (x, y)),
        lambda x, y: jax.lax.scan(lambda c, _: (both(*c), None), (x, y), None, length=2)[0],
        lambda x, y: jax.lax.scan(lambda c, row: (c + row, (row, c)), y[0], x)[1],
        jax.vmap(jax.checkpoint(both)),
    ],
    ids=["plain", "jit", "remat", "nested", "barrier", "cond", "while", "fori", "scan carry", "scan rows", "vmap"],
)
def test_the_first_is_handed_through_and_the_second_is_worked_out(wrapped):
    assert origins(wrapped, X, Y) == (0, None)


@pytest.mark.parametrize(
    "function",
    [
        lambda x, y: jax.lax.cond(y.sum() > 0, lambda x, y: x, lambda x, y: y, x, y),
        lambda x, y: jax.lax.scan(lambda c, _: (c[::-1], None), (x, y), None, length=2)[0],
        lambda x, y: jax.lax.while_loop(lambda c: c[0].sum() < 9, lambda c: (c[1], c[0]), (x, y)),
        lambda x, y: jax.lax.scan(lambda c, row: (row, c), y[0], x),
        jax.checkpoint(lambda x, y: (x * 1.5, jnp.zeros(3))),
    ],
    ids=["either", "swapped in scan", "swapped in while", "shifted", "remat"],
)
def test_what_may_be_another_is_not_handed_through(function):
    assert set(origins(function, X, Y)) == {None}


def test_inputs_that_change_places_are_told_by_their_numbers():
    assert origins(jax.checkpoint(lambda x, y: (y, x, y)), X, Y) == (1, 0, 1)


def test_what_is_the_same_in_every_row_counts_only_where_rows_are_asked_for():
    def rows(x: Any, y: Any) -> Any:
        return jax.vmap(lambda y: (x, y + x), axis_size=3)(y)

    assert origins(rows, X, Y) == (None, None)
    assert origins(rows, X, Y, repeated=True) == (0, None)
