"""Code that reads the clock, the environment, files or the host's random numbers is known by what it names."""

from __future__ import annotations

import datetime
import math
import os
import random
import time
from random import gauss
from time import time as now
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_magics.code.fingerprint import fingerprint


def aliased() -> Any:
    library = np
    return library.random.rand()


def importing() -> Any:
    import os as system

    return system.environ


@pytest.mark.parametrize(
    "function",
    [
        lambda: time.time(),
        lambda: now(),
        lambda: os.environ["WIDTH"],
        lambda: os.getenv("WIDTH"),
        lambda: np.random.rand(),
        lambda: random.random(),
        lambda: gauss(0, 1),
        lambda: datetime.datetime.now(),
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
