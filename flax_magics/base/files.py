"""Atomic replacement of files, and strict reading of JSON from files that may be damaged.

New content is written into a temporary folder beside the old file, synchronized to disk, and renamed over the old file
in one step. A full disk, an interrupt or a killed process before that step leaves the old file as it was. A killed
process also leaves its temporary folder; the next writer of the same file removes it.
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
"""MIME type under which a notebook output carries a run as JSON, so that the saved notebook can be verified later."""
RUNS_JSON = "application/vnd.flax-magics.runs+json"
"""MIME type for the several runs that share one report line, as in a loop."""

_OURS = ".flax-tmp"
_STALE = 60.0
"""Age in seconds from which an unlocked temporary folder is taken for the leftover of a killed process."""


def open_without_waiting(path: Path) -> BinaryIO:
    """Opens a file for reading without blocking on a named pipe; the caller checks that it is a regular file."""
    # Opening a pipe for reading blocks until somebody opens it for writing. Windows has no O_NONBLOCK.
    return open(path, "rb", opener=lambda name, flags: os.open(name, flags | getattr(os, "O_NONBLOCK", 0)))


class Cancelled(Exception):
    """Raised by `replace_file` when another thread took the `ticket` first: the old file stays."""


def replace_file(path: Path, write: Callable[[str], object], ticket: threading.Lock | None = None) -> None:
    """Replaces the file at `path` atomically by the one that `write(name)` creates under a temporary name.

    A symbolic link stays a link: its target is replaced. A new file gets the permissions of the umask; a replaced
    one keeps its own.

    Args:
      ticket: acquired just before the rename. A thread that acquires it earlier cancels the write.

    Raises:
      FlaxMagicsError: the folder does not exist, or `path` is something else than a regular file.
      OSError: the disk is full or not writable.
      Cancelled: the `ticket` was taken.
    """
    old, target = checked_target(path), Path(os.path.realpath(path))
    _sweep(target.parent, target.name)
    # A private folder rather than a file: `write` may leave temporary files of its own when it is killed (safetensors
    # does, under names that nobody could recognize), and 0o700 keeps other users out.
    workshop = target.parent / f".{target.name}.{secrets.token_hex(4)}{_OURS}"
    os.mkdir(workshop, 0o700)
    try:
        with _in_use(workshop):
            new = workshop / "new"
            rights = _rights_of_new(workshop) if old is None else stat.S_IMODE(old.st_mode)
            write(os.fspath(new))
            with open(new, "rb+") as file:
                if old is not None and hasattr(os, "fchown"):
                    with contextlib.suppress(OSError):  # the user is not a member of the old file's group
                        os.fchown(file.fileno(), -1, old.st_gid)
                os.chmod(new, rights)
                # Before the rename: otherwise a crash may leave the new name with the content not yet written.
                os.fsync(file.fileno())
            if ticket is not None and not ticket.acquire(blocking=False):
                raise Cancelled
            os.replace(new, target)
    finally:
        shutil.rmtree(workshop, ignore_errors=True)
    # The rename itself must reach the disk too. Systems that cannot sync a folder (Windows) do without.
    with contextlib.suppress(OSError), _opened(target.parent) as handle:
        os.fsync(handle)


def _rights_of_new(folder: Path) -> int:
    """The permissions that a newly created file gets, found by creating one."""
    # `os.umask` can only be read by setting it, which other threads would see.
    probe = folder / "probe"
    os.close(os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
    return stat.S_IMODE(os.stat(probe).st_mode)


def checked_target(path: Path) -> os.stat_result | None:
    """The status of the regular file at `path`, None if there is none.

    Raises FlaxMagicsError where `path` cannot be written as a file, PermissionError where the file is read-only.
    """
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
    if not os.access(target, os.W_OK):  # a rename would replace even a read-only file
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
    """Holds a lock on `folder` during the block, so that `_sweep` of another process leaves it alone."""
    if sys.platform == "win32":  # there is no flock, and `_sweep` does nothing either
        yield
        return
    import fcntl

    with _opened(folder) as handle:
        # The kernel releases the lock when the process dies, however it dies. Some file systems have no locks.
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield


def _sweep(folder: Path, name: str) -> None:
    """Removes temporary folders that killed writers of the file `name` left; those of running writers are locked."""
    if sys.platform == "win32":
        return
    import fcntl

    with contextlib.suppress(OSError):
        leftovers = [one for one in os.listdir(folder) if one.startswith(f".{name}.") and one.endswith(_OURS)]
        for one in leftovers:
            with contextlib.suppress(OSError), _opened(folder / one, os.O_DIRECTORY | os.O_NOFOLLOW) as handle:
                # Young folders are spared: their writer may not have locked yet, or the file system has no locks.
                if abs(time.time() - os.fstat(handle).st_mtime) > _STALE:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(folder / one, ignore_errors=True)


class Damaged(Exception):
    """Raised by a reader of a damaged or altered file; the text is the end of a sentence that begins with its name."""


def loads(text: str, what: str) -> object:
    """Parses JSON. Raises Damaged if it is invalid or an object repeats a name; the message calls the text `what`."""

    # Python keeps the last of two equal names in silence; in a file of ours a second one means damage or tampering.
    def once(pairs: list[tuple[str, object]]) -> dict[str, object]:
        """Makes the dict of a JSON object; raises where a name repeats."""
        fields = dict(pairs)
        if len(fields) != len(pairs):
            raise Damaged(f"{what} has a name that stands twice")
        return fields

    try:
        return json.loads(text, object_pairs_hook=once)
    except RecursionError:
        raise Damaged(f"{what} is nested too deeply") from None
    except ValueError:  # invalid JSON, or an int over Python's limit of 4300 digits
        raise Damaged(f"{what} is no JSON") from None


def convert(data: object, kind: type[T], what: str) -> T:
    """Converts JSON data to the record type `kind`. Raises Damaged if it does not fit; `what` names the data."""
    import msgspec  # takes some 10 ms to import, and `%load_ext` imports this module

    try:
        return msgspec.convert(data, kind, str_keys=True)
    except (msgspec.ValidationError, ValueError) as error:  # a lone surrogate in a key is a UnicodeEncodeError
        raise Damaged(f"{what} is not what it should be: {error}") from None
