"""How far the values that two runs keep of their outputs are from each other."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from ..base.ulp import largest_ulp
from ..errors import FlaxMagicsError
from .stored import Leaf, Recorded

_INTEGERS = ("bool", *(f"{sign}int{bits}" for sign in ("", "u") for bits in (2, 4, 8, 16, 32, 64)))
_FLOATS = ("float16", "bfloat16", "float32", "float64", *(name for name in dir(ml_dtypes) if name.startswith("float")))
_COMPLEX = {"complex64": "float32", "complex128": "float64"}


@dataclass(frozen=True)
class Distance:
    """How far the values kept of one output are from those of another.

    Attributes:
      values: how many were compared.
      of: how many elements the output has.
      differ: how many of the values differ.
      ulp: the largest distance in units in the last place, over the floating-point values that differ; None where there
        is none, and where one of two is NaN.
      absolute: the largest distance, over all; infinite or NaN where a value is. Of the array that `array` names.
      array: the path of the array with the largest distance; empty where the output is one array, and where none differs.
    """

    values: int
    of: int
    differ: int
    ulp: int | None
    absolute: float
    array: str


def distance(stored: Recorded, now: Recorded) -> Distance | None:
    """Of two runs whose outputs have the same arrays; None where that cannot be told.

    Raises:
      FlaxMagicsError: the values are not what their description says.
    """
    if not _alike(stored, now):
        return None
    values = differing = 0
    ulp: int | None = None
    lost = False
    worst, array = 0.0, ""
    for leaf, one, other in _pairs(stored, now):
        values += leaf.values
        differs = _differs(one, other)
        if not differs.any():
            continue
        differing += int(differs.sum())
        apart = largest_ulp(one[differs], other[differs])
        if apart is not None:
            ulp = max(apart, ulp or 0)
        lost = lost or bool((_is_nan(one) != _is_nan(other)).any())
        largest = _absolute(leaf.dtype, one[differs], other[differs])
        if worst == worst and not largest <= worst:  # NaN is the furthest
            worst, array = largest, leaf.path
    of = sum(leaf.size for leaf in stored.leaves or ())
    return Distance(values, of, differing, None if lost else ulp, worst, array)


def within(stored: Recorded, now: Recorded, rtol: float, atol: float) -> bool | None:
    """Whether all values that are kept agree: floating-point ones if `abs(now - stored) <= atol + rtol * abs(stored)`, as
    numpy has it, all others exactly. None where that cannot be told. Raises what `distance` raises.
    """
    if not _alike(stored, now) or (not stored.bits and not now.bits and stored.digest != now.digest):
        return None
    for leaf, one, other in _pairs(stored, now):
        if leaf.dtype in _INTEGERS:
            if _differs(one, other).any():
                return False
        else:
            with np.errstate(all="ignore"):
                if not np.allclose(_wide(other), _wide(one), rtol=rtol, atol=atol, equal_nan=True):
                    return False
    return True


def _alike(stored: Recorded, now: Recorded) -> bool:
    known = (*_INTEGERS, *_FLOATS, *_COMPLEX)
    leaves = stored.leaves
    return leaves is not None and leaves == now.leaves and all(leaf.dtype in known for leaf in leaves)


def _pairs(stored: Recorded, now: Recorded) -> Iterator[tuple[Leaf, Any, Any]]:
    """Each array with its values in the one and in the other."""
    start = 0
    for leaf in stored.leaves or ():
        dtype = np.dtype(getattr(ml_dtypes, leaf.dtype, None) or leaf.dtype).newbyteorder("<")
        end = start + leaf.values * dtype.itemsize
        if end > len(stored.bits) or end > len(now.bits):
            break
        yield leaf, np.frombuffer(stored.bits[start:end], dtype), np.frombuffer(now.bits[start:end], dtype)
        start = end
    else:
        if start == len(stored.bits) == len(now.bits):
            return
    raise FlaxMagicsError("`bits` is not as long as the values are.")


def _differs(one: Any, other: Any) -> Any:
    """Where the bits differ; one NaN is like another."""
    bits = [array.view(np.uint8).reshape(len(array), -1) for array in (one, other)]
    return (bits[0] != bits[1]).any(axis=1) & ~(_is_nan(one) & _is_nan(other))


def _is_nan(array: Any) -> Any:
    wide = _wide(array)
    return wide != wide


def _wide(array: Any) -> Any:
    return array.astype(np.complex128 if array.dtype.kind == "c" else np.float64)


def _absolute(dtype: str, one: Any, other: Any) -> float:
    if dtype in _INTEGERS:  # exactly, where a float would not hold them
        return float(max(abs(int(a) - int(b)) for a, b in zip(one.tolist(), other.tolist(), strict=True)))
    with np.errstate(all="ignore"):
        return float(np.abs(_wide(other) - _wide(one)).max())
