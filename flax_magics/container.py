"""Named arrays and JSON in one file, which any safetensors tool opens: what `%flax_save` writes.

    8 bytes   length of the header, little-endian
    header    JSON: for each array its dtype, shape and place, and `__metadata__`:
                flax_magics   the version of this format, `1`
                sha256        of `json`
                json          {"parts": name → {dtype, shape, sha256}, "document": …}
    arrays    their bytes, one after the other, nothing between them

So `safetensors.numpy.load_file(FILE)` gives the arrays by name. One whose dtype it does not know everywhere (float8,
int4, complex) is stored as bytes, `U8` with one more axis, and `parts` has its own dtype and shape.

The library writes, and `unpacking` reads.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from .atomic import Ticket, replace_file
from .errors import FlaxMagicsError

VERSION = 1
HEADER_LIMIT = 100_000_000
"""Bytes: the library reads no longer header."""

CODES = {
    "bool": "BOOL",
    "int8": "I8",
    "int16": "I16",
    "int32": "I32",
    "int64": "I64",
    "uint8": "U8",
    "uint16": "U16",
    "uint32": "U32",
    "uint64": "U64",
    "float16": "F16",
    "float32": "F32",
    "float64": "F64",
    "bfloat16": "BF16",
}
"""dtypes that every version of the library gives back as they are."""

_RAW = (
    "complex64",
    "complex128",
    "int2",
    "int4",
    "uint2",
    "uint4",
    "float4_e2m1fn",
    "float6_e2m3fn",
    "float6_e3m2fn",
    "float8_e3m4",
    "float8_e4m3",
    "float8_e4m3b11fnuz",
    "float8_e4m3fn",
    "float8_e4m3fnuz",
    "float8_e5m2",
    "float8_e5m2fnuz",
    "float8_e8m0fnu",
)
"""dtypes that are stored as bytes."""

NARROW = ("bool", "int2", "int4", "uint2", "uint4", "float4_e2m1fn", "float6_e2m3fn", "float6_e3m2fn")
"""dtypes that fill a part of their byte: not every byte is one of their values."""


class Damaged(Exception):
    """What was read is not what was written; the text says where, as the end of a sentence."""


def dtype_named(name: str) -> np.dtype[Any]:
    """The dtype of that name. Raises Damaged: there is none that a file can have, or that is known here."""
    if name in CODES or name in _RAW:
        found = getattr(ml_dtypes, name, None) or getattr(np, name, None)
        if found is not None:
            dtype: np.dtype[Any] = np.dtype(found)
            return dtype
        raise Damaged(f"the dtype {name} is not known to the installed ml_dtypes")
    raise Damaged(f"{quoted(name)} is no dtype")


def can_store(dtype: np.dtype[Any]) -> bool:
    """Whether a file can hold arrays of this dtype."""
    return dtype.name in CODES or dtype.name in _RAW


def write(
    path: Path, document: Mapping[str, Any], arrays: Mapping[str, np.ndarray[Any, Any]], ticket: Ticket | None = None
) -> int:
    """Writes the file, whole or not at all; gives its size in bytes.

    Args:
      path: where to; see `replace_file`.
      document: what JSON can hold.
      arrays: of dtypes that `can_store`, by names that are not `__metadata__`.
      ticket: calls the write off.

    Raises:
      FlaxMagicsError: the file cannot be written; the one that was there is as it was.
    """
    stored: dict[str, np.ndarray[Any, Any]] = {}
    parts: dict[str, Any] = {}
    for name, array in arrays.items():
        array = np.asarray(array, order="C")
        if array.dtype.byteorder == ">" or (array.dtype.byteorder == "=" and sys.byteorder == "big"):
            array = array.astype(array.dtype.newbyteorder("<"))
        plain = array if array.dtype.name in CODES else _as_bytes(array)
        digest = hashlib.sha256(_bytes_of(plain)).hexdigest()
        parts[name] = {"dtype": array.dtype.name, "shape": list(array.shape), "sha256": digest}
        stored[name] = plain
    text = json_of({"parts": parts, "document": document})
    metadata = {"flax_magics": str(VERSION), "sha256": hashlib.sha256(text.encode()).hexdigest(), "json": text}
    if 2 * len(text) > HEADER_LIMIT:
        raise FlaxMagicsError(f"`{path}` cannot be written: what is to stand in its header is too long.")
    size = 0

    def put(temporary: str) -> None:
        from safetensors.numpy import save_file

        nonlocal size
        save_file(stored, temporary, metadata)
        size = os.stat(temporary).st_size

    from safetensors import SafetensorError

    try:
        replace_file(path, put, ticket)
    except (OSError, SafetensorError) as error:
        raise FlaxMagicsError(f"`{path}` cannot be written: {_why(error)}.") from error
    return size


def _why(error: Exception) -> str:
    """What the system says. The library tells of a full disk in an error of its own, with the number of the system's."""
    number = re.search(r"\(os error (\d{1,4})\)", str(error))
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return os.strerror(int(number[1])) if number else str(error)


def json_of(value: Any) -> str:
    """`value` as JSON text that `loads` reads. Raises FlaxMagicsError: it is nested too deeply."""
    try:
        return json.dumps(value, allow_nan=False, separators=(",", ":"))
    except RecursionError:
        raise FlaxMagicsError("the session cannot be saved: something in it is nested too deeply.") from None


def _as_bytes(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The elements' bytes, on an axis of their own."""
    flat = np.frombuffer(array.tobytes(), np.uint8)
    return flat.reshape(*array.shape, array.dtype.itemsize)


def _bytes_of(array: np.ndarray[Any, Any]) -> Any:
    return array.reshape(-1).view(np.uint8) if array.size else b""


def shape_of(name: str, value: Any) -> tuple[int, ...]:
    """A shape that an array can have. Raises Damaged for every other value."""
    if not isinstance(value, list) or len(value) > 32 or any(type(size) is not int or size < 0 for size in value):
        raise Damaged(f"the shape of {quoted(name)} is none")
    if math.prod(size or 1 for size in value) >= 1 << 60:
        raise Damaged(f"the shape of {quoted(name)} is larger than any array")
    return tuple(value)


def quoted(name: str, limit: int = 80) -> str:
    """A name that stood in a file, safe to print."""
    from .show.columns import clean, cut

    return f"`{cut(clean(name), limit)}`"
