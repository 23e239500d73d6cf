"""Distances between floating-point numbers in units in the last place (ulp)."""

from __future__ import annotations

import ml_dtypes
import numpy as np

from .types import HostArray


def largest_ulp(one: HostArray, other: HostArray) -> int | None:
    """The largest elementwise distance in ulp of two arrays that have the same dtype and shape.

    The distance is the number of steps from one float to the next representable one. 0 and -0 are 0 ulp apart although
    their bits differ. Complex numbers are compared by their parts.

    Returns:
      None where there is no such distance: for integers, unsigned floats, floats over 64 bits, empty arrays, NaN.
    """
    if one.dtype.kind == "c":
        parts = np.dtype(f"f{one.dtype.itemsize // 2}").newbyteorder(one.dtype.byteorder)
        return largest_ulp(np.ascontiguousarray(one).view(parts), np.ascontiguousarray(other).view(parts))
    try:
        bits = int(ml_dtypes.finfo(one.dtype).bits)  # NumPy's own `finfo` lacks bfloat16 and float8
    except ValueError:
        return None
    # float8_e8m0fnu has no sign bit, which `_ordered` relies on.
    if one.dtype.name == "float8_e8m0fnu" or one.dtype.itemsize > 8 or not one.size:
        return None
    with np.errstate(invalid="ignore"):
        if bool((one != one).any()) or bool((other != other).any()):
            return None
    low, high = _ordered(one, bits), _ordered(other, bits)
    low, high = np.minimum(low, high), np.maximum(low, high)
    return int((high.astype(np.uint64) - low.astype(np.uint64)).max())  # int64 overflows between -1e308 and 1e308


def _ordered(array: HostArray, bits: int) -> HostArray:
    """Maps floats to integers in the same order, so that neighboring floats are neighboring integers."""
    words = np.ascontiguousarray(array).view(np.dtype(f"u{array.dtype.itemsize}").newbyteorder(array.dtype.byteorder))
    # Floats are stored as sign and magnitude: the magnitude's bits already count up with the value.
    sign = np.uint64(1 << (bits - 1))
    wide = words.astype(np.uint64)
    magnitude = (wide & (sign - np.uint64(1))).astype(np.int64)
    return np.where((wide & sign) != 0, -magnitude, magnitude)
