"""A file that is replaced whole or not at all, and JSON out of a file, read by somebody who trusts nothing in it.

What is written goes into a temporary folder beside the old file, reaches the disk, and takes the old one's name in one
step. Whatever happens before that step, a full disk, an interrupt, a killed process, leaves the old file as it was; a
killed process leaves its temporary folder too, which the next one to write there takes away.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, TypeVar

from ..errors import FlaxMagicsError

T = TypeVar("T")

RUN_JSON = "application/vnd.flax-magics.run+json"
"""The MIME type of a run as data, so that a saved notebook can be verified later."""
RUNS_JSON = "application/vnd.flax-magics.runs+json"
"""The same for the runs of a counting line."""

_OURS = ".flax-tmp"
_STALE = 60.0
"""Seconds from which a temporary folder that nobody holds is somebody's who was killed."""


def open_without_waiting(path: Path) -> BinaryIO:
    """Opens a file to read it. A named pipe does not wait here until somebody writes: the caller is to refuse it."""
    return open(path, "rb", opener=lambda name, flags: os.open(name, flags | getattr(os, "O_NONBLOCK", 0)))


class Cancelled(Exception):
    """The write was called off before it took the old file's place."""


def replace_file(path: Path, write: Callable[[str], None], ticket: threading.Lock | None = None) -> None:
    """Replaces the file at `path` by the one that `write` makes under the name that it is given.

    A link stays one: what it points at is replaced. A new file has the rights that the umask gives, an old one keeps
    its own.

    Args:
      ticket: taken before the old file is replaced. Another thread that takes it first has called the write off.

    Raises:
      FlaxMagicsError: there is no such folder, or something that is no file stands there.
      OSError: the disk is full, or may not be written.
      Cancelled: see `ticket`.
    """
    old, target = checked_target(path), Path(os.path.realpath(path))
    _sweep(target.parent, target.name)
    # A folder of our own, since what writes the file may have temporary files, too (safetensors has, which a kill leaves
    # behind under names that nobody would know); nobody else can look into it.
    workshop = target.parent / f".{target.name}.{secrets.token_hex(4)}{_OURS}"
    os.mkdir(workshop, 0o700)
    try:
        with _in_use(workshop):
            new = workshop / "new"
            rights = _rights_of_new(workshop) if old is None else stat.S_IMODE(old.st_mode)
            write(os.fspath(new))
            with open(new, "rb+") as file:
                if old is not None and hasattr(os, "fchown"):
                    with contextlib.suppress(OSError):  # a group that the user is not in
                        os.fchown(file.fileno(), -1, old.st_gid)
                os.chmod(new, rights)
                os.fsync(file.fileno())
            if ticket is not None and not ticket.acquire(blocking=False):
                raise Cancelled
            os.replace(new, target)
    finally:
        shutil.rmtree(workshop, ignore_errors=True)
    # The new name has to reach the disk. Where a folder cannot be synchronised, the file system sees to it.
    with contextlib.suppress(OSError), _opened(target.parent) as handle:
        os.fsync(handle)


def _rights_of_new(folder: Path) -> int:
    """The rights of a file that is made now: to ask for the umask is to change it, under the feet of other threads."""
    probe = folder / "probe"
    os.close(os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
    return stat.S_IMODE(os.stat(probe).st_mode)


def checked_target(path: Path) -> os.stat_result | None:
    """The file that stands at `path`, None for nothing. Raises FlaxMagicsError: it could not be one of ours."""
    target = Path(os.path.realpath(path))
    try:
        old = os.stat(target)
    except FileNotFoundError:
        if not target.parent.is_dir():
            write = f"import os; os.makedirs({os.fspath(target.parent)!r})"
            raise FlaxMagicsError(f"there is no folder `{target.parent}` to write into.", write=write) from None
        return None
    except NotADirectoryError:
        raise FlaxMagicsError(f"`{target.parent}` is a file, not a folder to write into.") from None
    if stat.S_ISDIR(old.st_mode):
        raise FlaxMagicsError(f"`{path}` is a folder, not a file.")
    if not stat.S_ISREG(old.st_mode):
        raise FlaxMagicsError(f"`{path}` is no regular file, and is not replaced by one.")
    if not os.access(target, os.W_OK):  # renaming would not ask
        raise PermissionError(13, "Permission denied", os.fspath(path))
    return old


@contextlib.contextmanager
def _opened(folder: Path, flags: int = 0) -> Iterator[int]:
    handle = os.open(folder, os.O_RDONLY | flags)
    try:
        yield handle
    finally:
        os.close(handle)


@contextlib.contextmanager
def _in_use(folder: Path) -> Iterator[None]:
    """Marks a folder as in use, for as long as its writer lives."""
    if sys.platform == "win32":
        yield
        return
    import fcntl

    with _opened(folder) as handle:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield


def _sweep(folder: Path, name: str) -> None:
    """Takes away what killed writers of this file have left. What another one is writing stays."""
    if sys.platform == "win32":
        return
    import fcntl

    with contextlib.suppress(OSError):
        leftovers = [one for one in os.listdir(folder) if one.startswith(f".{name}.") and one.endswith(_OURS)]
        for one in leftovers:
            with contextlib.suppress(OSError), _opened(folder / one, os.O_DIRECTORY | os.O_NOFOLLOW) as handle:
                if abs(time.time() - os.fstat(handle).st_mtime) > _STALE:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(folder / one, ignore_errors=True)


class Damaged(Exception):
    """What was read is not what was written; the text says where, as the end of a sentence."""


def loads(text: str, what: str) -> object:
    """JSON as `json` writes it. Raises Damaged for what is none, and for a name that stands twice; `what` names it."""

    def once(pairs: list[tuple[str, object]]) -> dict[str, object]:
        fields = dict(pairs)
        if len(fields) != len(pairs):
            raise Damaged(f"{what} has a name that stands twice")
        return fields

    try:
        return json.loads(text, object_pairs_hook=once)
    except RecursionError:
        raise Damaged(f"{what} is nested too deeply") from None
    except ValueError:  # no JSON, or an int of thousands of digits
        raise Damaged(f"{what} is no JSON") from None


def convert(data: object, kind: type[T], what: str) -> T:
    """JSON data as records of the type `kind`. Raises Damaged: it is something else; `what` names it."""
    import msgspec  # takes some 10 ms, which loading the extension has no use for

    try:
        return msgspec.convert(data, kind, str_keys=True)
    except (msgspec.ValidationError, ValueError) as error:  # of half a surrogate pair msgspec says so by itself
        raise Damaged(f"{what} is not what it should be: {error}") from None
