"""How far values are apart: units in the last place, counted on the bits, for every dtype that an output may have."""

from __future__ import annotations

import math
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from made import cell, notebook, run, sample

from flax_magics.base.files import Damaged
from flax_magics.verify.compare import Distance, Tolerance, compare, distance, within
from flax_magics.verify.notebooks import Cell, Recorded, runs_of


def recorded(*arrays: Any, paths: tuple[str, ...] = ("",), **changes: Any) -> Recorded:
    data = run(**{**sample(*(np.asarray(array) for array in arrays), paths=paths), **changes})
    (found,) = runs_of(notebook(cell(data)))[0].runs
    return found


def apart(one: Any, other: Any) -> Distance:
    found = distance(recorded(one), recorded(other))
    assert found is not None
    return found


@pytest.mark.parametrize(
    "dtype", [np.float16, np.float32, np.float64, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2]
)
def test_a_step_to_the_next_float_is_one_ulp(dtype):
    one = np.array([1.0, 2.0, -1.0], dtype)
    words = one.view(f"u{one.dtype.itemsize}").copy()
    words[0] += 3
    words[2] -= 1
    other = words.view(dtype)
    found = apart(one, other)
    step = float(other[0].astype(np.float64)) - 1.0
    assert found == Distance(compared=3, of=3, differ=2, ulp=3, absolute=step, array="")


def test_zero_and_minus_zero_differ_by_no_ulp():
    assert apart(np.array([0.0]), np.array([-0.0])) == Distance(1, 1, 1, 0, 0.0, "")


def test_complex_numbers_are_two_floats():
    one = np.array([1 + 1j], np.complex64)
    other = np.array([1 + np.nextafter(np.float32(1), np.float32(2)) * 1j], np.complex64)
    assert apart(one, other).ulp == 1


@pytest.mark.parametrize(
    ("one", "other", "absolute"),
    [
        (np.array([1, 5], np.int32), np.array([1, 7], np.int32), 2.0),
        (np.array([0], np.uint64), np.array([2**64 - 1], np.uint64), 2.0**64),
        (np.array([True, False]), np.array([False, False]), 1.0),
        (np.array([1], ml_dtypes.int4), np.array([-3], ml_dtypes.int4), 4.0),
    ],
)
def test_integers_have_no_ulp(one, other, absolute):
    found = apart(one, other)
    assert (found.differ, found.ulp, found.absolute) == (1, None, absolute)


def test_nan_is_like_nan_and_like_nothing_else():
    nan = np.array([np.nan, 1.0], np.float32)
    other = np.array([-np.nan, 1.0], np.float32)
    assert apart(nan, other).differ == 0
    found = apart(nan, np.array([0.0, 1.5], np.float32))
    assert (found.differ, found.ulp) == (2, None)
    assert math.isnan(found.absolute)
    assert apart(np.array([np.inf]), np.array([1.0])).absolute == math.inf


def test_the_array_that_is_furthest_is_named():
    paths = ("['a']", "['b']")
    one = recorded(np.zeros(2), np.zeros(3), paths=paths)
    other = recorded(np.array([0, 0.5]), np.array([0, 0, 2.0]), paths=paths)
    found = distance(one, other)
    assert found is not None
    assert (found.compared, found.differ, found.absolute, found.array) == (5, 2, 2.0, "['b']")


@pytest.mark.parametrize(
    "changes",
    [
        {"leaves": None},
        {"leaves": [{"path": "", "array": "float32[3]", "values": 2}]},
        {"leaves": [{"path": "", "array": "float7_e9[2]", "values": 2}]},
    ],
)
def test_what_cannot_be_compared_is_not(changes):
    one, other = recorded(np.zeros(2, np.float32)), recorded(np.zeros(2, np.float32), **changes)
    assert (distance(one, other), within(one, other, Tolerance(1.0, 1.0))) == (None, None)
    assert distance(other, other) is None or changes["leaves"][0]["array"] == "float32[3]"


@pytest.mark.parametrize("bits", ["", "AAAA", "AAAAAAAAAAAAAAAAAAAAAAAAAAAA"])
def test_bits_of_another_length_are_refused(bits):
    one = recorded(np.zeros(2, np.float32), bits=bits)
    with pytest.raises(Damaged, match="`bits` is not as long as the values are"):
        distance(one, one)


@pytest.mark.parametrize(
    ("one", "other", "rtol", "atol", "agrees"),
    [
        ([100.0, 1.0], [100.1, 1.0], 1e-2, 0.0, True),
        ([100.0, 1.0], [100.1, 1.0], 1e-4, 0.0, False),
        ([0.0], [1e-9], 1.0, 0.0, False),
        ([0.0], [1e-9], 0.0, 1e-8, True),
        ([np.nan, np.inf], [np.nan, np.inf], 0.0, 0.0, True),
        ([np.nan], [0.0], 1.0, 1.0, False),
        ([np.inf], [-np.inf], 1.0, 1.0, False),
        ([100], [101], 1.0, 1.0, False),
        ([100], [100], 0.0, 0.0, True),
    ],
)
def test_a_tolerance_is_numpys_and_of_integers_none(one, other, rtol, atol, agrees):
    assert within(recorded(np.array(one)), recorded(np.array(other)), Tolerance(rtol, atol)) is agrees


@pytest.mark.parametrize(
    ("losses", "stopped", "every", "outcome"),
    [
        ([2.0, 1.0], "interrupted", 1, "agrees"),
        ([2.0, 1.0, 0.5], "interrupted", 1, "agrees"),
        ([2.0, 1.0, 0.5, 0.25], "interrupted", 1, "differs"),
        ([2.0, 1.5], "interrupted", 1, "differs"),
        ([2.0, 1.0], "step 2 is not finite", 1, "differs"),
        ([2.0, 1.0], "interrupted", 2, "differs"),
    ],
)
def test_a_training_that_was_interrupted_agrees_as_far_as_it_went(losses, stopped, every, outcome):
    def trained(losses: list[float], stopped: str) -> Cell:
        curve = {"losses": losses, "every": every, "stopped": stopped}
        return runs_of(notebook(cell(run(digest=str(losses), trained=curve))))[0]

    (verdict,) = compare([trained([2.0, 1.0, 0.5], "")], [trained(losses, stopped)])
    assert verdict.outcome == outcome
