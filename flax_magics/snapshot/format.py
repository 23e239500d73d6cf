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

import contextlib
import difflib
import hashlib
import json
import math
import os
import re
import stat
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from io import RawIOBase
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from ..base.files import Ticket, replace_file
from ..base.jsondata import Damaged, loads
from ..base.text import quoted_name
from ..errors import FlaxMagicsError
from ..state.trees import CODES, NARROW, dtype_named, shape_of

VERSION = 1
HEADER_LIMIT = 100_000_000
"""Bytes: the library reads no longer header."""


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


@dataclass(frozen=True)
class FileContents:
    """What a file has: JSON data of which nothing is known yet, and arrays, which nobody else holds."""

    document: Any
    arrays: Mapping[str, np.ndarray[Any, Any]]


def read(path: Path) -> FileContents:
    """The file's contents, every byte of which has been held against its checksum.

    Raises:
      FlaxMagicsError: there is no such file, it is none of ours, or it is not as it was written.
    """
    with _opened(path) as (file, size), _told(path):
        head, start = _header(file, size, path)
        text = _metadata(head, path)
        inner = loads(text, "its JSON")
        if not isinstance(inner, dict) or inner.keys() != {"parts", "document"}:
            raise Damaged("its JSON has not the parts that it should have")
        return FileContents(inner["document"], _arrays(file, size - start, head, inner["parts"]))


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[tuple[RawIOBase, int]]:
    """The file and its size. A pipe would be waited for, so that what is no file is told before it is opened to read."""
    try:
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except (FileNotFoundError, NotADirectoryError):
        raise FlaxMagicsError(f"there is no file `{path}`.", hint=_beside(path)) from None
    except (OSError, ValueError) as error:
        if os.path.isdir(path):  # Windows opens none
            raise FlaxMagicsError(f"`{path}` is a folder, not a file.") from None
        why = getattr(error, "strerror", None) or str(error)
        raise FlaxMagicsError(f"`{path}` cannot be read: {why}.") from None
    try:
        status = os.fstat(handle)
        if stat.S_ISDIR(status.st_mode):
            raise FlaxMagicsError(f"`{path}` is a folder, not a file.")
        if not stat.S_ISREG(status.st_mode):
            raise FlaxMagicsError(f"`{path}` is no regular file.")
        with open(handle, "rb", buffering=0, closefd=False) as file:
            yield file, status.st_size
    finally:
        os.close(handle)


def _beside(path: Path) -> str | None:
    """What is in the same folder and may have been meant."""
    try:
        names = [name for name in os.listdir(path.parent) if not name.startswith(".")]
    except OSError:
        return None
    near = difflib.get_close_matches(path.name, names, n=3, cutoff=0.6)
    return f"did you mean {' or '.join(os.fspath(path.parent / name) for name in near)}?" if near else None


@contextlib.contextmanager
def _told(path: Path) -> Iterator[None]:
    """Makes one clear error of what goes wrong."""
    try:
        yield
    except Damaged as error:
        refuse(path, str(error))
    except OSError as error:
        refuse(path, error.strerror or str(error))
    except MemoryError:
        refuse(path, "there is not enough memory for it")


def refuse(path: Path, why: str) -> NoReturn:
    """Raises the error for a file that is not as it was written; `why` may have names that stand in it."""
    from ..base.text import clean

    raise FlaxMagicsError(f"`{path}` cannot be loaded: {clean(why)}.") from None


_KINDS = (
    (b"PK\x03\x04", "a zip archive (as .npz files and PyTorch checkpoints are)"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"\x93NUMPY", "a NumPy array"),
    (b"\x89HDF", "an HDF5 file"),
    (b"\x80", "a pickle, which would run code when it is loaded"),
    (b"version https://git-lfs", "the pointer of a file that Git LFS has not fetched"),
)


def _strange(start: bytes, path: Path) -> None:
    """Raises FlaxMagicsError for what is plainly another kind of file."""
    for magic, kind in _KINDS:
        if start.startswith(magic):
            raise FlaxMagicsError(f"`{path}` is no file of %flax_save, but {kind}.")
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<!doctype html", b"<html")):
        message = f"`{path}` is no file of %flax_save, but a web page (HTML)."
        raise FlaxMagicsError(message, hint="was the page saved in place of the file that it links to?")


def _header(file: RawIOBase, size: int, path: Path) -> tuple[dict[str, Any], int]:
    """The header, and where the arrays begin."""
    start = _exactly(file, min(size, 64))
    length = int.from_bytes(start[:8], "little")
    if size < 8 or length > size - 8 or length < 2 or start[8:9] != b"{":
        _strange(start, path)
        if size < 8 or not (start[8:9] == b"{" or size == 8):
            raise FlaxMagicsError(f"`{path}` is no file of %flax_save: it does not begin as one ({size} bytes).")
        raise Damaged(f"its header should have {length} bytes, and the file has {size}: it was cut short or altered")
    if length > HEADER_LIMIT:
        raise Damaged(f"its header has {length} bytes, more than the {HEADER_LIMIT} that a header may have")
    file.seek(8)
    head = loads(_decoded(_exactly(file, length)), "its header")
    if not isinstance(head, dict):
        raise Damaged("its header is no JSON object")
    return head, 8 + length


def _exactly(file: RawIOBase, length: int) -> bytes:
    """So many bytes. Raises Damaged if they are not there: the file is shorter than it was a moment ago."""
    data = bytearray(length)
    _fill(file, memoryview(data))
    return bytes(data)


def _fill(file: RawIOBase, place: memoryview) -> None:
    done = 0
    while done < len(place):
        got = file.readinto(place[done:])
        if not got:
            raise Damaged("it ends before it should")
        done += got


def _decoded(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise Damaged("its header is no text") from None


def _metadata(head: dict[str, Any], path: Path) -> str:
    """Our JSON, as its checksum says it was written."""
    metadata = head.pop("__metadata__", None)
    if not isinstance(metadata, dict) or "flax_magics" not in metadata:
        message = f"`{path}` is a safetensors file, but none of %flax_save: there is no session in it."
        raise FlaxMagicsError(
            message,
            write=f"import safetensors.numpy\narrays = safetensors.numpy.load_file({os.fspath(path)!r})",
        )
    version = metadata["flax_magics"]
    if not isinstance(version, str) or not (version.isascii() and version.isdigit() and len(version) < 10):
        raise Damaged("the version of its format is no number")
    if int(version) > VERSION:
        message = (
            f"`{path}` was written by a newer flax_magics: its format is {int(version)}, this one reads {VERSION}."
        )
        raise FlaxMagicsError(message, write="%pip install -U flax_magics")
    if version != str(VERSION):
        raise Damaged(f"its format is {version}, and there is no such format")
    text, digest = metadata.get("json"), metadata.get("sha256")
    if not isinstance(text, str) or metadata.keys() != {"flax_magics", "json", "sha256"}:
        raise Damaged("its metadata are not those that it was written with")
    # One half of a surrogate pair cannot be encoded, and cannot have been written.
    if digest != hashlib.sha256(text.encode(errors="replace")).hexdigest():
        raise Damaged("its JSON has not the checksum that it was written with")
    return text


def _arrays(file: RawIOBase, size: int, head: dict[str, Any], parts: Any) -> dict[str, np.ndarray[Any, Any]]:
    """The arrays, of `size` bytes together."""
    if not isinstance(parts, dict) or parts.keys() != head.keys():
        raise Damaged("its header and its JSON name other arrays")
    places = []
    for name, part in parts.items():
        dtype, shape, digest = _part(name, part)
        code, stored = CODES.get(dtype.name, "U8"), shape if dtype.name in CODES else (*shape, dtype.itemsize)
        begin, end = _place(name, head[name], code, stored)
        if end - begin != math.prod(shape) * dtype.itemsize:
            raise Damaged(f"{quoted_name(name)} has another size than its shape")
        places.append((begin, end, name, dtype, shape, digest))
    # In their order in the file, empty ones before what begins at the same place: each begins where the last one ended.
    places.sort(key=lambda place: place[:2])
    reached = 0
    for begin, end, name, *_ in places:
        if begin != reached:
            raise Damaged(f"{quoted_name(name)} does not begin where the array before it ends")
        reached = end
    if reached != size:
        which = "it was cut short" if reached > size else "something stands after its end"
        raise Damaged(f"its arrays should have {reached} bytes, and there are {size}: {which}")
    out = {}
    for begin, end, name, dtype, shape, digest in places:
        data: Any = np.empty(end - begin, np.uint8)
        _fill(file, memoryview(data))
        if hashlib.sha256(data).hexdigest() != digest:
            raise Damaged(f"{quoted_name(name)} has not the checksum that it was written with")
        out[name] = _typed(name, data, dtype, shape)
    return {name: out[name] for name in parts}


def _part(name: str, part: Any) -> tuple[np.dtype[Any], tuple[int, ...], str]:
    if not isinstance(part, dict) or part.keys() != {"dtype", "shape", "sha256"}:
        raise Damaged(f"what it says of {quoted_name(name)} is not what it should be")
    if not isinstance(part["dtype"], str):
        raise Damaged(f"the dtype of {quoted_name(name)} is no text")
    if not isinstance(part["sha256"], str):
        raise Damaged(f"the checksum of {quoted_name(name)} is no text")
    return dtype_named(part["dtype"]), shape_of(name, part["shape"]), part["sha256"]


def _place(name: str, entry: Any, code: str, shape: tuple[int, ...]) -> tuple[int, int]:
    """Where an array begins and ends, counted from the first."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise Damaged(f"its header's entry of {quoted_name(name)} is not what it should be")
    if entry["dtype"] != code or shape_of(name, entry["shape"]) != shape:
        raise Damaged(f"{quoted_name(name)} has another dtype or shape in its header than in its JSON")
    offsets = entry["data_offsets"]
    if not isinstance(offsets, list) or len(offsets) != 2 or any(type(one) is not int or one < 0 for one in offsets):
        raise Damaged(f"the place of {quoted_name(name)} is none")
    begin, end = offsets
    if end < begin:
        raise Damaged(f"{quoted_name(name)} ends before it begins")
    return begin, end


def _typed(name: str, data: np.ndarray[Any, Any], dtype: np.dtype[Any], shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    if dtype.name in NARROW and data.size and not _fits(data, dtype):
        raise Damaged(f"{quoted_name(name)} has bytes that are no {dtype.name}")
    little = dtype if sys.byteorder == "little" or dtype.itemsize == 1 else dtype.newbyteorder("<")
    return data.view(little).astype(dtype, copy=False).reshape(shape)


def _fits(data: np.ndarray[Any, Any], dtype: np.dtype[Any]) -> bool:
    """Whether every byte is one that a value of this narrow dtype is kept as."""
    if dtype.name == "bool":
        return bool((data < 2).all())
    every = np.arange(256, dtype=np.uint8)
    kept = every.view(dtype).astype(np.float32).astype(dtype).view(np.uint8) == every
    return bool(kept[data].all())
