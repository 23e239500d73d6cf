"""How far floating-point numbers are apart, counted in numbers of their dtype: units in the last place."""

from __future__ import annotations

import ml_dtypes
import numpy as np

from .types import HostArray


def largest_ulp(one: HostArray, other: HostArray) -> int | None:
    """The largest distance of two arrays of one dtype and shape, element by element, in units in the last place.

    That is how many steps from a float to the next lead from the one to the other. 0 and -0 are one number, so that they
    are 0 apart though their bits differ. A complex number is two floats.

    Returns:
      None where no distance can be told: of integers, of floats without a sign, and where one of two is NaN.
    """
    if one.dtype.kind == "c":
        parts = np.dtype(f"f{one.dtype.itemsize // 2}").newbyteorder(one.dtype.byteorder)
        return largest_ulp(np.ascontiguousarray(one).view(parts), np.ascontiguousarray(other).view(parts))
    try:
        bits = int(ml_dtypes.finfo(one.dtype).bits)
    except ValueError:
        return None
    if one.dtype.name == "float8_e8m0fnu" or one.dtype.itemsize > 8 or not one.size:
        return None
    with np.errstate(invalid="ignore"):
        if bool((one != one).any()) or bool((other != other).any()):
            return None
    low, high = _ordered(one, bits), _ordered(other, bits)
    low, high = np.minimum(low, high), np.maximum(low, high)
    return int((high.astype(np.uint64) - low.astype(np.uint64)).max())  # of doubles it may need 64 bits


def _ordered(array: HostArray, bits: int) -> HostArray:
    """Integers that are in the order of the floats, and count one for each step from a float to the next."""
    words = np.ascontiguousarray(array).view(np.dtype(f"u{array.dtype.itemsize}").newbyteorder(array.dtype.byteorder))
    sign = np.uint64(1 << (bits - 1))
    wide = words.astype(np.uint64)
    magnitude = (wide & (sign - np.uint64(1))).astype(np.int64)
    return np.where((wide & sign) != 0, -magnitude, magnitude)
