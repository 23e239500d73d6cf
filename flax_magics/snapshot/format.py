"""Named arrays and JSON in one file, which any safetensors tool opens: what `%flax_save` writes.

    8 bytes   length of the header, little-endian
    header    JSON: for each array its dtype, shape and place, and `__metadata__`:
                flax_magics   the version of this format, `1`
                sha256        of `json`
                json          {"parts": name → {dtype, shape, sha256}, "document": …}
    arrays    their bytes, one after the other, nothing between them

So `safetensors.numpy.load_file(FILE)` returns the arrays by name. A dtype that not every version of safetensors knows
(float8, int4, complex) is stored as `U8` bytes with one more axis, and `parts` has its own dtype and shape.

safetensors writes and reads the file; each array is checked against our own checksum.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import json
import os
import re
import stat
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import msgspec
import numpy as np
from msgspec import Struct

from ..base.digest import little_endian
from ..base.files import Damaged, convert, loads, open_without_waiting, replace_file
from ..base.text import clean, quoted_name
from ..base.types import HostArray
from ..errors import FlaxMagicsError
from ..state.trees import CODES, NARROW, dtype_named, shape_of

VERSION = 1
HEADER_LIMIT = 100_000_000
"""Bytes. safetensors reads no longer header."""


def write(path: Path, document: object, arrays: Mapping[str, HostArray], ticket: threading.Lock | None = None) -> int:
    """Writes the file, whole or not at all. Returns its size in bytes.

    Args:
      path: where to; see `replace_file`.
      document: JSON data, which may have msgspec records in it.
      arrays: with dtypes that `dtype_named` knows, under names other than `__metadata__`.
      ticket: see `replace_file`.

    Raises:
      FlaxMagicsError: the file cannot be written; an old file is left as it was.
    """
    # Imported when a file is written, since most sessions write none.
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    stored: dict[str, HostArray] = {}
    parts: dict[str, PartRecord] = {}
    for name, array in arrays.items():
        plain = array = little_endian(np.asarray(array, order="C"))
        if array.dtype.name not in CODES:  # as bytes, with an axis for the bytes of one element
            plain = np.frombuffer(array.tobytes(), np.uint8).reshape(*array.shape, array.dtype.itemsize)
        digest = hashlib.sha256(plain.reshape(-1).view(np.uint8).data).hexdigest()
        parts[name] = PartRecord(array.dtype.name, list(array.shape), digest)
        stored[name] = plain
    text = json_of(ContentsRecord(parts, document))
    metadata = {"flax_magics": str(VERSION), "sha256": hashlib.sha256(text.encode()).hexdigest(), "json": text}
    # JSON inside JSON has its quotes escaped, so the header may be twice as long.
    if 2 * len(text) > HEADER_LIMIT:
        raise FlaxMagicsError(f"`{path}` cannot be written: what is to stand in its header is too long.")
    try:
        replace_file(path, lambda temporary: save_file(stored, temporary, metadata), ticket)
        return os.stat(path).st_size
    except (OSError, SafetensorError) as error:
        raise FlaxMagicsError(f"`{path}` cannot be written: {_why(error)}.") from error


def _why(error: Exception) -> str:
    """The system's reason. safetensors has its own error for a full disk, with the system's number in its text."""
    number = re.search(r"\(os error (\d{1,4})\)", str(error))
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return os.strerror(int(number[1])) if number else str(error)


def json_of(value: object) -> str:
    """JSON text of data that may have records in it. Raises FlaxMagicsError where it is nested too deeply."""
    try:
        return json.dumps(value, default=msgspec.to_builtins, separators=(",", ":"))
    except RecursionError:
        raise FlaxMagicsError("the session cannot be saved: something in it is nested too deeply.") from None


class FileContents(Struct, frozen=True):
    """A file's contents: JSON data that is not validated yet, and arrays that belong to the caller."""

    document: object
    arrays: Mapping[str, HostArray]


class PartRecord(msgspec.Struct, forbid_unknown_fields=True):
    """What our JSON says about one array."""

    dtype: str
    shape: list[int]
    sha256: str


class ContentsRecord(msgspec.Struct, forbid_unknown_fields=True):
    """Our JSON: the arrays by name, and the document, which `snapshot.document` validates."""

    parts: dict[str, PartRecord]
    document: Any


def read(path: Path) -> FileContents:
    """The file's contents, checked against the checksums.

    Raises:
      FlaxMagicsError: there is no such file, it is no file of %flax_save, or it is damaged.
    """
    from safetensors import SafetensorError, deserialize

    with _opened(path) as file:
        try:
            contents = convert(loads(_json_in(file, path), "its JSON"), ContentsRecord, "its JSON")
            # Read, not mapped: a mapped file that is truncated meanwhile kills the process (SIGBUS).
            file.seek(0)
            return FileContents(contents.document, _arrays(deserialize(file.read()), contents.parts))
        except Damaged as error:
            refuse(path, str(error))
        except SafetensorError as error:
            refuse(path, f"it was cut short or altered ({error})")
        except OSError as error:
            refuse(path, error.strerror or str(error))
        except MemoryError:
            refuse(path, "there is not enough memory for it")


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    try:
        # Does not wait for a writer if it is a named pipe, which is refused below.
        file = open_without_waiting(path)
    except (FileNotFoundError, NotADirectoryError):
        raise FlaxMagicsError(f"there is no file `{path}`.", hint=_beside(path)) from None
    except (OSError, ValueError) as error:
        if os.path.isdir(path):
            raise FlaxMagicsError(f"`{path}` is a folder, not a file.") from None
        why = getattr(error, "strerror", None) or str(error)
        raise FlaxMagicsError(f"`{path}` cannot be read: {why}.") from None
    with file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise FlaxMagicsError(f"`{path}` is no regular file.")
        yield file


def _beside(path: Path) -> str | None:
    """A hint with names in the same folder that are spelled alike; None if there are none."""
    names: list[str] = []
    with contextlib.suppress(OSError):
        names = [name for name in os.listdir(path.parent) if not name.startswith(".")]
    near = difflib.get_close_matches(path.name, names, n=3, cutoff=0.6)
    return f"did you mean {' or '.join(os.fspath(path.parent / name) for name in near)}?" if near else None


def refuse(path: Path, why: str) -> NoReturn:
    """Raises the error for a damaged file; `why` may have names from the file, which are cleaned for display."""
    raise FlaxMagicsError(f"`{path}` cannot be loaded: {clean(why)}.") from None


_KINDS = (
    (b"PK\x03\x04", "a zip archive (as .npz files and PyTorch checkpoints are)"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"\x93NUMPY", "a NumPy array"),
    (b"\x89HDF", "an HDF5 file"),
    (b"\x80", "a pickle, which would run code when it is loaded"),
    (b"version https://git-lfs", "the pointer of a file that Git LFS has not fetched"),
)


def _metadata_in(file: BinaryIO, path: Path) -> dict[str, object]:
    """What our header says of itself. Raises FlaxMagicsError for a file that is none of ours, or Damaged."""
    start, size = file.read(64), os.fstat(file.fileno()).st_size
    length = int.from_bytes(start[:8], "little")
    if start[8:9] != b"{":
        for magic, kind in _KINDS:
            if start.startswith(magic):
                raise FlaxMagicsError(f"`{path}` is no file of %flax_save, but {kind}.")
        if start.lstrip(b"\xef\xbb\xbf \t\r\n").lower().startswith((b"<!doctype html", b"<html")):
            message = f"`{path}` is no file of %flax_save, but a web page (HTML)."
            raise FlaxMagicsError(message, hint="was the page saved in place of the file that it links to?")
        raise FlaxMagicsError(f"`{path}` is no file of %flax_save: it does not begin as one ({size} bytes).")
    if length > HEADER_LIMIT and length < size:
        raise Damaged(f"its header has {length} bytes, more than the {HEADER_LIMIT} that a header may have")
    # Before reading: a length that was altered must not make us allocate that much.
    if length > size - 8:
        raise Damaged(f"its header should have {length} bytes, and the file has {size}: it was cut short or altered")
    file.seek(8)
    try:
        head = loads(file.read(length).decode(), "its header")
    except UnicodeDecodeError:
        raise Damaged("its header is no text") from None
    metadata = head.get("__metadata__") if isinstance(head, dict) else None
    if not isinstance(metadata, dict) or "flax_magics" not in metadata:
        message = f"`{path}` is a safetensors file, but none of %flax_save: there is no session in it."
        raise FlaxMagicsError(
            message,
            write=f"import safetensors.numpy\narrays = safetensors.numpy.load_file({os.fspath(path)!r})",
        )
    return metadata


def is_session(path: Path) -> bool:
    """Whether the header of a file says that %flax_save wrote it, whatever became of the rest."""
    try:
        with _opened(path) as file:
            _metadata_in(file, path)
    except (FlaxMagicsError, Damaged, OSError):
        return False
    return True


def _json_in(file: BinaryIO, path: Path) -> str:
    """Our JSON, checked against its checksum. Of a file that is none of ours only the beginning is read."""
    metadata = _metadata_in(file, path)
    version = metadata["flax_magics"]
    if version != str(VERSION):
        if isinstance(version, str) and re.fullmatch("[1-9][0-9]{0,8}", version) and int(version) > VERSION:
            message = f"`{path}` was written by a newer flax_magics: its format is {version}, this one reads {VERSION}."
            raise FlaxMagicsError(message, write="%pip install -U flax_magics")
        raise Damaged(f"its format is {quoted_name(str(version))}, and there is no such format")
    text = metadata.get("json")
    # Half a surrogate pair, which JSON can escape, cannot be encoded; such text was never written, and fails here.
    if not isinstance(text, str) or metadata.get("sha256") != hashlib.sha256(text.encode(errors="replace")).hexdigest():
        raise Damaged("its JSON has not the checksum that it was written with")
    return text


def _arrays(stored: list[tuple[str, Any]], parts: Mapping[str, PartRecord]) -> dict[str, HostArray]:
    """The arrays in the order of our JSON, each with its dtype and shape. Raises Damaged where one does not fit."""
    by_name = dict(stored)
    if parts.keys() != by_name.keys():
        raise Damaged("its header and its JSON name other arrays")
    arrays = {}
    for name, record in parts.items():
        dtype, shape, entry = dtype_named(record.dtype), shape_of(name, record.shape), by_name[name]
        data, last = entry["data"], () if dtype.name in CODES else (dtype.itemsize,)
        if (entry["dtype"], entry["shape"]) != (CODES.get(dtype.name, "U8"), [*shape, *last]):
            raise Damaged(f"{quoted_name(name)} has another dtype or shape in its header than in its JSON")
        if hashlib.sha256(data).hexdigest() != record.sha256:
            # Bytes that are no value, such as 2 as a bool, would have undefined results.
            raise Damaged(f"{quoted_name(name)} has not the checksum that it was written with")
        if dtype.name in NARROW and not _fits(np.frombuffer(data, np.uint8), dtype):
            raise Damaged(f"{quoted_name(name)} has bytes that are no {dtype.name}")
        arrays[name] = np.frombuffer(data, dtype.newbyteorder("<")).astype(dtype, copy=False).reshape(shape)
    return arrays


def _fits(data: HostArray, dtype: np.dtype[Any]) -> bool:
    """Whether every byte is the encoding of a value of this narrow dtype."""
    # A byte is an encoding if it survives the way to a number and back.
    every = np.arange(256, dtype=np.uint8)
    is_value = every.view(dtype).astype(np.float32).astype(dtype).view(np.uint8) == every
    return bool(is_value[data].all())
