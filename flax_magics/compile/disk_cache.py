"""Compiled programs on disk, so that a kernel that was restarted does not compile them again.

A file holds one executable as JAX serialises it, under a digest of all that it depends on: what tells the program from
every other in memory (see `program_key`), versions, devices, the processor and XLA's flags. JAX's own persistent cache is
not touched. Where the user has set one up (`jax_compilation_cache_dir`), theirs serves our programs
like any other, and this one stands aside.

What is trusted: the folder. An executable is machine code, and JAX's serialised form of one is a pickle around it: whoever
can write here can run code as the user, as with every cache of compiled code. So the folder is made for the user alone, and
not used if it belongs to, or can be written by, anybody else. The digest in each file is against damage and files under
wrong names, not against malice.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import re
import sys
import tempfile
from collections.abc import Hashable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import jax
from jaxlib import version as jaxlib_version

from ..base import __version__
from ..base.measures import first_core

LIMIT = 1 << 30
"""Bytes kept at most, what was used longest ago dropped first."""

_MAGIC = b"flax_magics program 2\n"
_FLAGS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "TF_CPP_VMODULE", "CUDA_VISIBLE_DEVICES")


def default_folder() -> Path:
    """Where the system has caches of the user's: `~/.cache/flax_magics/programs` on Linux."""
    chosen = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(chosen):
        base = Path(chosen)
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    elif sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    else:
        base = Path.home() / ".cache"
    return base / "flax_magics" / "programs"


class DiskCache:
    """Executables in a folder, which is made when the first one is stored. Nothing that fails here fails a run."""

    def __init__(self, folder: Path | None = None, limit: int = LIMIT) -> None:
        self.folder = default_folder() if folder is None else folder
        self.limit = limit

    @property
    def size(self) -> int:
        """Bytes on disk."""
        return sum(status.st_size for _, status in self._files())

    def name_of(self, program: Hashable) -> str:
        """The name of a program's file. `program` tells it from every other one of this process, and is read by its repr."""
        # An object that is printed with its address is the same one in the next process, as far as a program goes.
        text = re.sub(r" at 0x[0-9a-f]+", "", repr(program))
        parts = [text, *_surroundings(), *(os.environ.get(name, "") for name in _FLAGS)]
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()

    def load(self, name: str, lowered: Any) -> Any:
        """The executable, None where there is none that can be used. A file that is damaged is removed.

        Args:
          lowered: the program that is asked for.
        """
        path = self.folder / name
        try:
            if not self._own():
                return None
            data = path.read_bytes()
        except OSError:
            return None
        try:
            return _unpacked(data, name, lowered)
        except Exception:  # damaged, another's, or of a JAX that packs them otherwise: it is compiled and stored anew
            with contextlib.suppress(OSError):
                path.unlink()
            return None
        finally:
            with contextlib.suppress(OSError):
                os.utime(path)

    def store(self, name: str, executable: Any) -> None:
        """Keeps an executable, if JAX can serialise it. Readers see all of it or nothing."""
        try:
            data = _packed(name, executable)
        except Exception:  # some cannot be: with constants as arguments, or on a backend that does not offer it
            return
        temporary = None
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if not self._own():
                return
            with tempfile.NamedTemporaryFile(dir=self.folder, prefix="new-", delete=False) as file:
                temporary = file.name
                file.write(data)
            os.replace(temporary, self.folder / name)
            self._drop_oldest()
        except OSError:  # no room, no right, no such place: the program is compiled again another time
            if temporary is not None:
                with contextlib.suppress(OSError):
                    os.unlink(temporary)

    def _own(self) -> bool:
        """Whether the folder is the user's alone to write."""
        if os.name != "posix":
            return True
        status = os.stat(self.folder)
        return status.st_uid == os.geteuid() and not status.st_mode & 0o022

    def _files(self) -> Iterator[tuple[str, os.stat_result]]:
        with contextlib.suppress(OSError), os.scandir(self.folder) as entries:
            for entry in entries:
                with contextlib.suppress(OSError):
                    if entry.is_file():
                        yield entry.path, entry.stat()

    def _drop_oldest(self) -> None:
        files = sorted(self._files(), key=lambda file: file[1].st_mtime)
        whole = sum(status.st_size for _, status in files)
        for path, status in files:
            if whole <= self.limit:
                return
            with contextlib.suppress(OSError):
                os.unlink(path)
            whole -= status.st_size


def _packed(name: str, executable: Any) -> bytes:
    from jax.experimental import serialize_executable

    payload, _, _ = serialize_executable.serialize(executable)
    shardings = jax.tree_util.tree_leaves((executable.input_shardings, executable.output_shardings))
    devices = sorted({device.id for sharding in shardings for device in sharding.device_set})
    head = json.dumps({"program": name, "devices": devices, "types": _types(executable)}).encode()
    return b"".join((_MAGIC, _digest(head, payload), b"\n", head, b"\n", payload))


def _unpacked(data: bytes, name: str, lowered: Any) -> Any:
    from jax.experimental import serialize_executable

    if not data.startswith(_MAGIC):
        raise ValueError("not a program")
    digest, _, rest = data[len(_MAGIC) :].partition(b"\n")
    line, _, payload = rest.partition(b"\n")
    if _digest(line, payload) != digest:
        raise ValueError("damaged")
    head = json.loads(line)
    types = _types(lowered)
    if head["program"] != name or head["types"] != types:
        raise ValueError("another program")
    by_id = {device.id: device for device in jax.devices()}
    devices = [by_id[id] for id in head["devices"]] or jax.devices()[:1]
    executable = serialize_executable.deserialize_and_load(
        payload, lowered.in_tree, lowered.out_tree, execution_devices=devices
    )
    if _types(executable) != types:
        raise ValueError("another program")
    return executable


def _digest(head: bytes, payload: bytes) -> bytes:
    return hashlib.sha256(head + b"\n" + payload).hexdigest().encode()


def _types(program: Any) -> list[str]:
    """Shape and dtype of each argument and result, and how many there are of each."""
    leaves = jax.tree_util.tree_leaves((program.in_avals, program.out_info))
    types = [f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]" for leaf in leaves]
    return [*types, str(program.in_tree.num_leaves), str(program.out_tree.num_leaves)]


@lru_cache(maxsize=1)
def _surroundings() -> tuple[str, ...]:
    """What is the same for every program of a process: versions, devices, the processor."""
    backend = jax.devices()[0].client
    devices = [f"{device.id} {device.platform} {device.device_kind}" for device in jax.devices()]
    versions = (jax.__version__, jaxlib_version.__version__, __version__)
    return (*versions, str(backend.platform_version), *devices, str(jax.process_count()), _processor())


def _processor() -> str:
    """The processor with all its instructions: what XLA compiles for one may not run on another.

    `measures.processor` is of those alone that may change a sum.
    """
    names, core = ("model name", "flags", "Features", "CPU part"), first_core()
    rows = [f"{name}: {core[name]}" for name in names if name in core]
    return " ".join([platform.machine(), platform.processor(), *rows])
