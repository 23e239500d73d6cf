"""Who holds which arrays, and how many bytes they take."""

from __future__ import annotations

import dataclasses
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from msgspec.structs import replace
from runs_to_show import REUSED

from flax_magics.base.measures import name_devices
from flax_magics.doctor.findings import Holding, buffer_of, bytes_by_device, holdings, live_arrays, reached


@dataclasses.dataclass(slots=True)
class Slotted:
    held: Any


class Owner:
    weights: Any = None


class Weights(nnx.Module):
    def __init__(self, array: Any) -> None:
        self.weights = nnx.Param(array)


def failed(array: Any) -> Exception:
    """An error whose frames hold an array."""

    def fail(held: Any) -> None:
        raise ValueError

    try:
        fail(array)
    except ValueError as error:
        return error
    raise AssertionError


def closed_over(array: Any) -> Any:
    return lambda: array


def as_class_attribute(array: Any) -> Any:
    return type("Owner", (Owner,), {"weights": array})


HOLDERS = {
    "itself": lambda array: array,
    "a pytree": lambda array: {"a": [(array,)]},
    "a slot": Slotted,
    "a closure": closed_over,
    "a default": lambda array: types.FunctionType((lambda held=None: 0).__code__, {}, "f", (array,)),
    "a jitted function": lambda array: jax.jit(closed_over(array)),
    "a class": as_class_attribute,
    "an object's class": lambda array: as_class_attribute(array)(),
    "an error": failed,
    "a generator": lambda array: (array for _ in range(2)),
    "an NNX module": lambda array: Weights(array),
    "a Run": lambda array: replace(REUSED, output=array),
    "a method": lambda array: Slotted(array).__eq__,
}


@pytest.mark.parametrize("how", HOLDERS)
def test_an_array_is_found_however_it_is_held(how):
    array = jnp.arange(5.0) + 1
    live = live_arrays()
    holder = HOLDERS[how](array)
    assert id(array) in reached(holder, live)
    assert reached(Slotted(None), live) == []


def test_neither_globals_of_a_function_nor_modules_nor_what_is_stopped_at_are_looked_into():
    array = jnp.arange(5.0) + 1
    live = live_arrays()
    module = types.ModuleType("of_the_user")
    module.array = array
    function = types.FunctionType(
        (lambda: array).__code__.replace(co_freevars=()), {"array": array, "__builtins__": {}}
    )
    assert reached([module, function, {"__builtins__": {}, "array": array}], live) == []
    held = Slotted(array)
    assert reached([held], live, {id(held)}) == []


def test_each_array_counts_once_under_all_that_hold_it():
    first, second, third = arrays = [jnp.ones((size,), jnp.float32) * 2 for size in (1000, 10, 5)]
    live = {id(array): array for array in arrays}
    rows = holdings(live, [("a", [first, second]), ("b", second), ("%flax_replay", [second, third]), ("c", ())])
    assert rows == (
        Holding(("a",), 1, 4000),
        Holding(("a", "b"), 1, 40),
        Holding(("%flax_replay",), 1, 20),
    )
    assert holdings(live, []) == (Holding((), 3, 4060),)


def test_what_numpy_was_shown_of_an_array_is_no_second_one():
    array = jnp.arange(1000.0) * 2
    before = bytes_by_device(live_arrays())
    shown = np.asarray(array)
    twins = [other for other in jax.live_arrays() if buffer_of(other) == buffer_of(array)]
    assert bytes_by_device(live_arrays()) == before
    assert len(twins) >= 1
    assert shown[1] == 2


def test_bytes_are_those_of_each_device():
    array = jnp.ones((7, 3), jnp.bfloat16)
    assert bytes_by_device({id(array): array}) == {name_devices(jax.devices()): 42}
