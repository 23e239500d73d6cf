"""Distances in units in the last place: one meaning for replays and for verify."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flax_magics.base.text import ulp
from flax_magics.base.ulp import largest_ulp

DTYPES = ["float16", "bfloat16", "float32", "float64", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz"]
NARROW = ["float4_e2m1fn", "float6_e2m3fn", "float6_e3m2fn"]


@pytest.mark.parametrize("name", [name for name in (*DTYPES, *NARROW) if hasattr(ml_dtypes, name) or name in DTYPES])
def test_all_numbers_of_a_dtype_in_order_are_one_apart(name):
    dtype = np.dtype(getattr(ml_dtypes, name, None) or name)
    words = np.arange(1 << min(ml_dtypes.finfo(dtype).bits, 16), dtype=np.uint64)
    if dtype.itemsize > 2:  # not all of them
        words = words << np.uint64(8 * dtype.itemsize - 16)
    numbers = words.astype(f"u{dtype.itemsize}").view(dtype)
    with np.errstate(invalid="ignore"):  # some are NaN
        wide = numbers.astype(np.float64)
    order = np.argsort(wide[~np.isnan(wide)], kind="stable")
    numbers, wide = numbers[~np.isnan(wide)][order], wide[~np.isnan(wide)][order]
    steps = 1 if dtype.itemsize <= 2 else 1 << (8 * dtype.itemsize - 16)
    for i in range(0, len(numbers) - 1, max(1, len(numbers) // 300)):
        expected = 0 if wide[i] == wide[i + 1] else steps
        assert largest_ulp(numbers[i : i + 1], numbers[i + 1 : i + 2]) == expected


@given(st.floats(allow_nan=False), st.floats(allow_nan=False))
def test_it_is_symmetric_and_as_large_as_whole_numbers_tell(one, other):
    def place(value):
        word = int(np.float64(value).view(np.uint64))
        return -(word & ~(1 << 63)) if word >> 63 else word

    found = largest_ulp(np.array([one]), np.array([other]))
    assert found == largest_ulp(np.array([other]), np.array([one])) == abs(place(one) - place(other))


def test_zero_and_minus_zero_are_one_number():
    tiny = np.nextafter(np.float32(0), np.float32(1))
    assert largest_ulp(np.float32([0.0]), np.float32([-0.0])) == 0
    assert largest_ulp(np.float32([-0.0]), np.float32([tiny])) == 1
    assert largest_ulp(np.float32([-tiny]), np.float32([tiny])) == 2
    assert (ulp(0), ulp(1), ulp(1234)) == ("0 ulp: 0 and -0", "1 ulp", "1,234 ulp")


def test_the_largest_of_many_and_of_the_parts_of_complex_numbers():
    one = np.array([1.0, 2.0, 3.0], np.float32)
    other = np.nextafter(one, np.float32(9))
    other[1] = np.nextafter(other[1], np.float32(9))
    assert largest_ulp(one, other) == 2
    assert largest_ulp(one.reshape(3, 1), other.reshape(3, 1)) == 2
    assert largest_ulp(one.astype(np.complex64), (one + 1j * (other - one)).astype(np.complex64)) > 2
    assert largest_ulp(one.astype(">f4"), other.astype(">f4")) == 2


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (np.array([1]), np.array([2])),
        (np.array([True]), np.array([False])),
        (np.array([1.0, np.nan]), np.array([1.0, 2.0])),
        (np.array([]), np.array([])),
        (np.array([1], ml_dtypes.float8_e8m0fnu), np.array([2], ml_dtypes.float8_e8m0fnu)),
    ],
)
def test_where_no_distance_can_be_told_there_is_none(one, other):
    assert largest_ulp(one, other) is None
