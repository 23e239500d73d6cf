"""A lowered program becomes an executable: from the disk cache, or by XLA on a thread of its own.

`Compiler` does so for whole programs, `Units` for the single ops that an initialisation runs. `DiskCache` keeps executables
so that a kernel that was restarted does not compile them again.

A file there holds one executable as JAX serialises it, under a digest of all that it depends on: what tells the program from
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
import operator
import os
import platform
import re
import sys
import tempfile
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import jax
from jaxlib import version as jaxlib_version
from msgspec import Struct

from ..base import __version__
from ..base.digest import data_of
from ..base.measures import first_core
from ..base.private import is_compiled_alone, trace_context_names, trace_context_of
from ..base.threads import Future, Workers
from ..base.types import Leaf, PyTree
from ..code.contents import flax_state, flax_state_in_words
from .jaxpr import Equation

T = TypeVar("T")
Executable: TypeAlias = Any
"""A `jax.stages.Compiled`, which says what it is given and gives when it is asked, not in its type."""

trace_context = trace_context_of()
_TRACED = (
    *("jax_enable_x64", "jax_default_matmul_precision", "jax_default_device", "jax_numpy_dtype_promotion"),
    *("jax_numpy_rank_promotion", "jax_threefry_partitionable", "jax_softmax_custom_jvp", "jax_disable_jit"),
)
"""Settings that `trace_context` has, by name where it gives none, and in its place where there is none."""
_OTHERS = (
    *("jax_default_prng_impl", "jax_enable_custom_prng", "jax_default_dtype_bits", "jax_safer_randint"),
    *("jax_debug_nans", "jax_debug_infs", "jax_exec_time_optimization_effort", "jax_memory_fitting_effort"),
    *("jax_memory_fitting_level", "jax_optimization_level", "jax_compiler_enable_remat_pass"),
    "jax_ragged_dot_use_ragged_dot_instruction",
)
"""Settings that change a program and are not part of `trace_context`."""
_FLAG = "jax_disable_most_optimizations"  # `jax.config` has it, and no attribute of that name

_NAMES = tuple(name for name in (_OTHERS if trace_context() else (*_OTHERS, *_TRACED)) if hasattr(jax.config, name))
_read_settings = operator.attrgetter(*_NAMES)


def jax_settings() -> tuple[object, ...]:
    """The settings of JAX that change what a trace or a compilation gives, as they are on this thread now."""
    return (trace_context(), *_read_settings(jax.config), jax.config.read(_FLAG))


def settings() -> tuple[tuple[object, ...], tuple[object, ...]]:
    """JAX's settings and Flax's: all that a trace depends on besides the call, the model, and installed code."""
    return (jax_settings(), flax_state())


def settings_in_words() -> dict[str, object]:
    """The settings of JAX and Flax by name, for a person. Of an older JAX not all of its contexts have one."""
    words: dict[str, object] = dict(zip((*_NAMES, _FLAG), jax_settings()[1:], strict=True))
    names, contexts = trace_context_names(), trace_context()
    if names and len(names) == len(contexts):
        words |= {name.removesuffix("_context_manager"): value for name, value in zip(names, contexts, strict=True)}
    else:
        words |= {name: getattr(jax.config, name) for name in _TRACED if hasattr(jax.config, name)}
    return words | flax_state_in_words()


class Compiled(Struct, frozen=True):
    """An executable, where it is from (`compiled`, `disk cache`), and the seconds that this took."""

    executable: Executable
    origin: str
    seconds: float


LIMIT = 1 << 30
"""Bytes kept at most, what was used longest ago dropped first."""

_MAGIC = b"flax_magics program 2"
_FLAGS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "TF_CPP_VMODULE", "CUDA_VISIBLE_DEVICES")


def default_folder() -> Path:
    """Where the system has caches of the user's: `~/.cache/flax_magics/programs` on Linux."""
    chosen = os.environ.get("XDG_CACHE_HOME", "")
    on_windows = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    homes = {"darwin": Path.home() / "Library" / "Caches", "win32": on_windows}
    base = Path(chosen) if os.path.isabs(chosen) else homes.get(sys.platform, Path.home() / ".cache")
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

    def load(self, name: str, lowered: jax.stages.Lowered) -> Executable:
        """The executable, None where there is none that can be used. A file that is damaged is removed.

        Args:
          lowered: the program that is asked for.
        """
        path = self.folder / name
        try:
            if not self._is_own():
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

    def store(self, name: str, executable: Executable) -> None:
        """Keeps an executable, if JAX can serialise it. Readers see all of it or nothing."""
        try:
            data = _packed(name, executable)
        except Exception:  # some cannot be: with constants as arguments, or on a backend that does not offer it
            return
        temporary = None
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if not self._is_own():
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

    def _is_own(self) -> bool:
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


def devices_of(executable: Executable) -> set[jax.Device]:
    """The devices that a compiled program runs on; empty where it has neither inputs nor outputs."""
    shardings = jax.tree_util.tree_leaves((executable.input_shardings, executable.output_shardings))
    return {device for sharding in shardings for device in sharding.device_set}


def _packed(name: str, executable: Executable) -> bytes:
    from jax.experimental import serialize_executable

    payload, _, _ = serialize_executable.serialize(executable)
    devices = sorted(device.id for device in devices_of(executable))
    head = json.dumps({"program": name, "devices": devices, "types": _types(executable)}).encode()
    return b"\n".join((_MAGIC, _digest(head, payload), head, payload))


def _unpacked(data: bytes, name: str, lowered: jax.stages.Lowered) -> Executable:
    from jax.experimental.serialize_executable import deserialize_and_load

    magic, digest, line, payload = data.split(b"\n", 3)
    if magic != _MAGIC or _digest(line, payload) != digest:
        raise ValueError("damaged, or no program")
    head, types = json.loads(line), _types(lowered)
    if head["program"] != name or head["types"] != types:
        raise ValueError("another program")
    by_id = {device.id: device for device in jax.devices()}
    devices = [by_id[id] for id in head["devices"]] or jax.devices()[:1]
    executable = deserialize_and_load(payload, lowered.in_tree, lowered.out_tree, execution_devices=devices)
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


@dataclass
class Compiler:
    """Compiles lowered programs on threads. `disk` is None where nothing is kept on disk."""

    disk: DiskCache | None = None
    workers: Workers = field(default_factory=Workers)

    def keep_on_disk(self, where: bool | str | os.PathLike[str]) -> None:
        """Turns the disk cache on or off: in the user's cache directory, or in the folder of that name."""
        self.disk = None if where is False else DiskCache(None if where is True else Path(where))

    def start(self, lowered: jax.stages.Lowered, key: Hashable | None) -> Future:
        """A future of the `Compiled`. `key` is the program's `program_key`."""
        disk = self.disk if key is not None and not users_cache() else None
        name = "" if disk is None else disk.name_of(key)
        return self.workers.submit(lambda: self._make(lowered, disk, name))

    def _make(self, lowered: jax.stages.Lowered, disk: DiskCache | None, name: str) -> Compiled:
        begin = time.perf_counter()
        executable = None if disk is None else disk.load(name, lowered)
        if executable is not None:
            return Compiled(executable, "disk cache", time.perf_counter() - begin)
        hits = _hits.count
        executable = lowered.compile()
        origin = "compiled" if _hits.count == hits else "disk cache"
        if disk is not None:  # once nobody waits for a compilation
            self.workers.submit(lambda: disk.store(name, executable))
        return Compiled(executable, origin, time.perf_counter() - begin)


def users_cache() -> str | None:
    """The folder of JAX's own cache, where the user has set one: then theirs is in force, and ours is not."""
    folder: str | None = getattr(jax.config, "jax_compilation_cache_dir", None)
    if folder and not _hits.listening:
        _Hits.listening = True
        jax.monitoring.register_event_listener(_hits.hear)
    return folder or None


class _Hits(threading.local):
    """Counts what a thread got from JAX's own cache."""

    count = 0
    listening = False

    def hear(self, event: str, **_: object) -> None:
        self.count += event == "/jax/compilation_cache/cache_hits"


_hits = _Hits()


def program_key(traced: jax.stages.Traced, lowered: jax.stages.Lowered, where: Hashable = ()) -> Hashable | None:
    """What tells a lowered program from every other, in memory and on disk; None if two with the same key may differ.

    Of an argument that nothing reads the text says neither shape nor dtype, and of none the kind of a key or whether its
    type is weak, which decides on the types of what is computed with the results.

    Args:
      where: the devices that its arguments were placed on: the text does not say for which a program is.
    """
    text = lowered.as_text()
    if "callback" in text:  # host callbacks are numbered in the text, not named
        return None
    hasher = hashlib.sha256(text.encode())
    # The text holds constants in full unless JAX is set to pass them as arguments.
    for constant in traced.jaxpr.consts:
        if hasattr(constant, "dtype"):
            hasher.update(data_of(constant))
    trees = f"{lowered.in_tree} {lowered.out_tree}"
    avals = (*traced.jaxpr.in_avals, None, *traced.jaxpr.out_avals)
    types = tuple(aval and (aval.shape, str(aval.dtype), bool(getattr(aval, "weak_type", False))) for aval in avals)
    return hasher.hexdigest(), jax_settings(), trees, jax.default_backend(), where, types


def keep(kept: OrderedDict[Hashable, T], key: Hashable, value: T, most: int) -> None:
    """Keeps `value` as the last one used, and drops those that were used longest ago beyond `most`."""
    kept[key] = value
    kept.move_to_end(key)
    while len(kept) > most:
        kept.popitem(last=False)


def shape_of(array: Leaf) -> jax.ShapeDtypeStruct:
    """The shape, dtype and weak type of an array, or of what stands for one."""
    return jax.ShapeDtypeStruct(array.shape, array.dtype, weak_type=getattr(array, "weak_type", False))


UNITS = 128
"""Units kept at most, the least recently used dropped first."""


@dataclass
class Units:
    """Small programs that JAX makes one by one where code runs op by op: an op, or a function that is jitted by itself.

    An initialisation is made of few kinds of them, many times over. Each kind is compiled once, on threads beside each
    other, instead of one after the other as they are met. What a unit computes is what JAX's own op-by-op execution
    compiles, so its bits are the same.
    """

    compiler: Compiler
    kept: OrderedDict[Hashable, Future] = field(default_factory=OrderedDict)

    def of_equation(self, equation: Equation) -> Future | None:
        """A future of the `Compiled` of one equation of a jaxpr; its arguments are literals too.

        None for one that is run as JAX runs it.
        """
        identity = _equation_key(equation)
        if identity is None:
            return None
        shapes = [shape_of(atom.aval) for atom in equation.invars]
        types = tuple((shape.shape, shape.dtype, shape.weak_type) for shape in shapes)
        key = (identity, types, jax_settings(), jax.default_backend())
        future = self.kept.get(key)
        if future is None or (future.done() and future.exception() is not None):
            bind = partial(equation.primitive.bind, **equation.params)

            def unit(*arguments: Leaf) -> PyTree:
                return bind(*arguments)

            unit.__name__ = str(equation.params.get("name", equation.primitive.name))
            traced = jax.jit(unit).trace(*shapes)
            lowered = traced.lower()
            future = self.compiler.start(lowered, program_key(traced, lowered))
        keep(self.kept, key, future, UNITS)
        return future


def _equation_key(equation: Equation) -> Hashable | None:
    """What tells an equation from another, holding nothing of the user's; None where that cannot be told."""
    primitive = equation.primitive
    if primitive.name not in ("jit", "pjit", "random_fold_in") and not is_compiled_alone(primitive):
        return None
    params = [(name, weakref.ref(value) if name == "jaxpr" else value) for name, value in equation.params.items()]
    return hashable((primitive.name, tuple(sorted(params, key=lambda param: param[0]))))


def hashable(key: Hashable) -> Hashable | None:
    """The key; None where something in it has no hash."""
    try:
        hash(key)
    except TypeError:
        return None
    return key
