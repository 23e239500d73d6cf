"""Equal fingerprints only for what traces to the same program.

Code that reads the clock, the environment, files or the host's random numbers has none, and is known by what it names.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import itertools
import math
import os
import random
import time
import types
from random import gauss
from time import time as now
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flax_magics.code.fingerprint import fingerprint

SOURCE = '''
WIDTH = 3
SCALE = {"a": (1.0, 2.0)}
table = jnp.arange(4.0)

def helper(x, by=2):
  """Helps."""
  return jnp.tanh(x) * SCALE["a"][1] * by

class Base(nn.Module):
  rate: float = 0.5

  def shared(self, x):
    return nn.Dropout(self.rate, deterministic=True)(x)

class Net(Base):
  """A net."""
  features: int = 4

  @nn.compact
  def __call__(self, x):
    # a comment
    x = nn.Dense(WIDTH)(x)
    return self.shared(helper(x)) + [table[0] for _ in range(2)][0]
'''


def net(source: str, **fields: Any) -> Any:
    namespace: dict[str, Any] = {"nn": nn, "jnp": jnp, "jax": jax, "__name__": "__main__"}
    exec(compile(source, "<cell>", "exec"), namespace)
    return namespace["Net"](**fields)


def test_the_same_source_run_again_is_the_same():
    assert fingerprint(net(SOURCE)) == fingerprint(net(SOURCE)) is not None


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("# a comment", "# another, and\n\n    # more lines"),
        ('"""Helps."""', '"""Helps a lot."""'),
        ('"""A net."""', '"""The same net."""'),
        ("    x = nn.Dense(WIDTH)(x)", "    x  =  nn.Dense( WIDTH )(x)"),
        ("features: int = 4", "features: 'int' = 4"),
        ("WIDTH = 3\n", "WIDTH = 3\nunused = 9\n"),
    ],
)
def test_comments_layout_docstrings_and_annotations_do_not_count(old, new):
    assert old in SOURCE
    assert fingerprint(net(SOURCE.replace(old, new))) == fingerprint(net(SOURCE))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        *(("WIDTH = 3", "WIDTH = 4"), ("WIDTH = 3", "WIDTH = 3.0"), ("2.0)", "2.5)"), ("by=2", "by=3")),
        *(("jnp.tanh", "jnp.sin"), ("rate: float = 0.5", "rate: float = 0.25"), ("range(2)", "range(3)")),
        *(("deterministic=True", "deterministic=False"), ("jnp.arange(4.0)", "jnp.arange(4.0) + 1")),
        ("features: int = 4", "features: int = 5"),
    ],
)  # fmt: skip
def test_what_the_program_reads_counts(old, new):
    assert old in SOURCE
    assert fingerprint(net(SOURCE.replace(old, new))) != fingerprint(net(SOURCE))


def test_fields_and_globals_count_as_they_are_now():
    model = net(SOURCE)
    before = fingerprint(model)
    assert fingerprint(net(SOURCE, features=7)) != before
    model.__call__.__wrapped__.__globals__["SCALE"]["a"] = (1.0, 3.0)
    assert fingerprint(model) != before


@dataclasses.dataclass
class Config:
    width: int = 3
    inner: Any = None


class Holds(nn.Module):
    value: Any

    def __call__(self, x: Any) -> Any:
        return x


@pytest.mark.parametrize(
    "value",
    [
        *(1, 1.5, "text", b"bytes", None, ..., (1, [2, {"a": {3, 4}}]), np.arange(3), np.float32(2)),
        *(jnp.ones((2, 2), jnp.bfloat16), jax.random.key(1), jnp.float32, np.dtype("int8"), nn.relu, jax.nn.gelu),
        *(nn.initializers.lecun_normal(), functools.partial(nn.Dense, use_bias=False), Config(inner=Config(width=5))),
        *(nn.Dense(3), lambda x: x + 1),
    ],
    ids=lambda value: type(value).__name__,
)
def test_plain_values_have_a_fingerprint(value):
    assert fingerprint(Holds(value)) == fingerprint(Holds(value)) is not None


@pytest.mark.parametrize(
    ("one", "other"),
    [
        *((1, True), (1, 1.0), (0.0, -0.0), ((1, 2), [1, 2]), ({"a": 1, "b": 2}, {"a": 1, "b": 3})),
        *((np.arange(3), np.arange(3, dtype="int32")), (np.zeros(2), np.zeros((1, 2)))),
        *((jax.random.key(1), jax.random.key(2)), (nn.relu, nn.gelu), (nn.initializers.zeros, nn.initializers.ones)),
        *((nn.initializers.normal(1.0), nn.initializers.normal(2.0)), (nn.Dense(3), nn.Dense(4))),
        *((functools.partial(nn.Dense, 3), functools.partial(nn.Dense, 4)), (Config(), Config(width=4))),
        *((lambda x: x + 1, lambda x: x + 2), (lambda x, *, by=1: x, lambda x=1, *, by: x)),
        *((lambda x, by=1: x, lambda x=1, by=1: x), (jnp.float32(1), np.float32(1))),
    ],
)
def test_values_that_differ_have_fingerprints_that_differ(one, other):
    assert fingerprint(Holds(one)) != fingerprint(Holds(other))


@pytest.mark.parametrize(
    "value",
    [
        *(iter([1]), itertools.count(), (i for i in range(3))),
        *(types.SimpleNamespace(a=1), object(), jax.jit(lambda x: x), slice(1, 2)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_is_not_plain_has_none(value):
    assert fingerprint(Holds(value)) is None


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=3) | st.tuples(inner, inner) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


@given(values, values)
@settings(max_examples=200)
def test_two_values_have_the_same_fingerprint_exactly_if_they_look_the_same(one, other):
    assert (fingerprint(one) == fingerprint(other)) is (repr(one) == repr(other))


def aliased() -> Any:
    library = np
    return library.random.rand()


def importing() -> Any:
    import os as system

    return system.environ


@pytest.mark.parametrize(
    "function",
    [
        *(lambda: time.time(), lambda: now(), lambda: os.environ["WIDTH"], lambda: os.getenv("WIDTH")),
        *(lambda: np.random.rand(), lambda: random.random(), lambda: gauss(0, 1), lambda: datetime.datetime.now()),
        lambda: open("file").read(),  # noqa: SIM115 - what is tested is the name
        aliased,
        importing,
        lambda: [time.time() for _ in range(2)],
    ],
)
def test_what_is_outside_of_the_program_is_not_plain(function):
    assert fingerprint(function) is None


def inner_import(x: Any) -> Any:
    import math

    return math.pi * x


@pytest.mark.parametrize(
    "function",
    [
        lambda x: jax.random.normal(jax.random.key(0), x.shape) * np.pi,
        lambda x: jnp.sum(x, dtype=jnp.float32) * math.sqrt(2),
        lambda x: nn.relu(jax.nn.gelu(x)) + np.float32(1),
        lambda x: max(len(x), sum(x)),
        inner_import,
    ],
)
def test_the_rest_of_the_libraries_is(function):
    assert fingerprint(function) is not None
