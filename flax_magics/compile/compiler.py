"""From a lowered program to an executable: loaded from the disk cache, or compiled by XLA on a worker thread.

`Compiler` does this for whole programs, `Units` for the single ops of an initialisation. `DiskCache` stores
executables, so that a restarted kernel need not compile them again.

A file there holds one executable in JAX's serialized form. Its name is a digest of all that the executable depends on:
the `program_key`, versions, devices, the processor and XLA's flags. JAX's own persistent cache is not touched; where
the user has set it up (`jax_compilation_cache_dir`), it serves our programs, too, and this one is not used.

The folder is trusted. An executable is machine code, and JAX's serialized form is a pickle: whoever can write to the
folder can run code as the user, as with every cache of compiled code. So the folder is created for the user alone, and
not used if it belongs to or can be written by anybody else. The digest in each file guards against damage and mixed-up
names, not against malice.
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
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Hashable, Iterator
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import jax
from jaxlib import version as jaxlib_version
from msgspec import Struct

from ..base import __version__
from ..base.digest import data_of
from ..base.measures import first_core
from ..base.private import is_compiled_alone, settings_reader, trace_context_names, trace_context_of
from ..base.threads import Future, Workers
from ..base.types import Leaf, PyTree
from ..code.contents import flax_state, flax_state_in_words
from .jaxpr import Equation

T = TypeVar("T")
Executable: TypeAlias = Any
"""A `jax.stages.Compiled`; `Any`, because its static type does not describe its arguments and results."""

trace_context = trace_context_of()
_TRACED = (
    *("jax_enable_x64", "jax_default_matmul_precision", "jax_default_device", "jax_numpy_dtype_promotion"),
    *("jax_numpy_rank_promotion", "jax_threefry_partitionable", "jax_softmax_custom_jvp", "jax_disable_jit"),
)
"""Settings that are part of JAX's trace context: read by name for messages, and in place of a missing trace context."""
_OTHERS = (
    *("jax_default_prng_impl", "jax_enable_custom_prng", "jax_default_dtype_bits", "jax_safer_randint"),
    *("jax_debug_nans", "jax_debug_infs", "jax_exec_time_optimization_effort", "jax_memory_fitting_effort"),
    *("jax_memory_fitting_level", "jax_optimization_level", "jax_compiler_enable_remat_pass"),
    "jax_ragged_dot_use_ragged_dot_instruction",
)
"""Settings that change a program and are not part of JAX's trace context."""
_FLAG = "jax_disable_most_optimizations"  # a flag without an attribute on `jax.config`: it takes `config.read`

_NAMES = tuple(name for name in (_OTHERS if trace_context() else (*_OTHERS, *_TRACED)) if hasattr(jax.config, name))
_read_settings = settings_reader((*_NAMES, _FLAG))


def jax_settings() -> tuple[object, ...]:
    """All JAX settings that change the result of a trace or compilation, as they are on this thread now."""
    return (trace_context(), *_read_settings())


def settings() -> tuple[tuple[object, ...], tuple[object, ...]]:
    """(JAX's settings, Flax's state): all that a trace depends on besides the call, the model and installed code."""
    return (jax_settings(), flax_state())


def settings_in_words() -> dict[str, object]:
    """The settings of JAX and Flax by name, for messages. An older JAX does not name all of its contexts."""
    words: dict[str, object] = dict(zip((*_NAMES, _FLAG), jax_settings()[1:], strict=True))
    names, contexts = trace_context_names(), trace_context()
    if names and len(names) == len(contexts):
        words |= {name.removesuffix("_context_manager"): value for name, value in zip(names, contexts, strict=True)}
    else:
        words |= {name: getattr(jax.config, name) for name in _TRACED if hasattr(jax.config, name)}
    return words | flax_state_in_words()


class Compiled(Struct, frozen=True):
    """An executable, its origin (`compiled` or `disk cache`), and the seconds that it took to get it."""

    executable: Executable
    origin: str
    seconds: float


LIMIT = 1 << 30
"""The most bytes in the folder; files are deleted least recently used first."""

_MAGIC = b"flax_magics program 2"  # the number goes up with each change of the format
# Environment variables that XLA reads when it compiles or finds its devices.
_FLAGS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "TF_CPP_VMODULE", "CUDA_VISIBLE_DEVICES")


def default_folder() -> Path:
    """The folder of the disk cache, in the user's cache directory: `~/.cache/flax_magics/programs` on Linux."""
    chosen = os.environ.get("XDG_CACHE_HOME", "")
    on_windows = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    homes = {"darwin": Path.home() / "Library" / "Caches", "win32": on_windows}
    base = Path(chosen) if os.path.isabs(chosen) else homes.get(sys.platform, Path.home() / ".cache")
    return base / "flax_magics" / "programs"


class DiskCache:
    """Executables in a folder, which is created when the first one is stored. A failure here never fails a run."""

    def __init__(self, folder: Path | None = None, limit: int = LIMIT) -> None:
        self.folder = default_folder() if folder is None else folder
        self.limit = limit

    @property
    def size(self) -> int:
        """Bytes of all files in the folder."""
        return sum(status.st_size for _, status in self._files())

    @property
    def trusted(self) -> bool:
        """Whether the folder may be used, as far as it is there already."""
        with contextlib.suppress(OSError):
            return self._is_own()
        return True

    def name_of(self, program: Hashable) -> str:
        """The file name for a `program_key`, whose repr is hashed together with the environment."""
        # Reprs with an address would name a new file in every process; the address itself changes no program.
        text = re.sub(r" at 0x[0-9a-f]+", "", repr(program))
        parts = [text, *_surroundings(), *(os.environ.get(name, "") for name in _FLAGS)]
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()

    def load(self, name: str, lowered: jax.stages.Lowered) -> Executable:
        """Loads an executable; None where there is no usable one. An unusable file is deleted.

        Args:
          name: the file's name, by `name_of`.
          lowered: the program that is wanted, against which the loaded one is checked.
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
        except Exception:  # damaged, mixed up, or of an incompatible JAX: the caller compiles and stores it anew
            with contextlib.suppress(OSError):
                path.unlink()
            return None
        finally:
            with contextlib.suppress(OSError):
                os.utime(path)  # the time by which `_drop_oldest` goes

    def store(self, name: str, executable: Executable) -> None:
        """Stores an executable atomically, if JAX can serialize it."""
        try:
            data = _packed(name, executable)
        except Exception:  # not possible with constants as arguments, nor on some backends
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
        except OSError:  # disk full or not writable: the program is compiled again another time
            if temporary is not None:
                with contextlib.suppress(OSError):
                    os.unlink(temporary)

    def _is_own(self) -> bool:
        """Whether the folder belongs to the user and nobody else can write to it."""
        if os.name != "posix":
            return True
        status = os.stat(self.folder)
        return status.st_uid == os.geteuid() and not status.st_mode & 0o022

    def _files(self) -> Iterator[tuple[str, os.stat_result]]:
        """Path and status of each file in the folder; none where it cannot be read."""
        with contextlib.suppress(OSError), os.scandir(self.folder) as entries:
            for entry in entries:
                with contextlib.suppress(OSError):
                    if entry.is_file():
                        yield entry.path, entry.stat()

    def _drop_oldest(self) -> None:
        """Deletes the least recently used files until the folder is within the limit."""
        files = sorted(self._files(), key=lambda file: file[1].st_mtime)
        whole = sum(status.st_size for _, status in files)
        for path, status in files:
            if whole <= self.limit:
                return
            with contextlib.suppress(OSError):
                os.unlink(path)
            whole -= status.st_size


def devices_of(executable: Executable) -> set[jax.Device]:
    """The devices that a compiled program runs on; empty for a program without inputs and outputs."""
    shardings = jax.tree_util.tree_leaves((executable.input_shardings, executable.output_shardings))
    return {device for sharding in shardings for device in sharding.device_set}


def _packed(name: str, executable: Executable) -> bytes:
    """The bytes of a file: magic number, digest, a JSON head with name, devices and types, and the executable."""
    from jax.experimental import serialize_executable

    payload, _, _ = serialize_executable.serialize(executable)
    devices = sorted(device.id for device in devices_of(executable))
    head = json.dumps({"program": name, "devices": devices, "types": _types(executable)}).encode()
    return b"\n".join((_MAGIC, _digest(head, payload), head, payload))


def _unpacked(data: bytes, name: str, lowered: jax.stages.Lowered) -> Executable:
    """The executable in a file's bytes; raises ValueError or whatever JAX raises if it is not the wanted one."""
    from jax.experimental.serialize_executable import deserialize_and_load

    magic, digest, line, payload = data.split(b"\n", 3)
    if magic != _MAGIC or _digest(line, payload) != digest:
        raise ValueError("damaged, or no program")
    head, types = json.loads(line), _types(lowered)
    if head["program"] != name or head["types"] != types:
        raise ValueError("another program")
    by_id = {device.id: device for device in jax.devices()}
    # Named by id: by default JAX would load a program onto all devices of this process.
    devices = [by_id[id] for id in head["devices"]] or jax.devices()[:1]
    executable = deserialize_and_load(payload, lowered.in_tree, lowered.out_tree, execution_devices=devices)
    if _types(executable) != types:  # the head may be right and the payload another program's
        raise ValueError("another program")
    return executable


def _digest(head: bytes, payload: bytes) -> bytes:
    return hashlib.sha256(head + b"\n" + payload).hexdigest().encode()


def _types(program: Any) -> list[str]:
    """Dtype and shape of each argument and result, and the numbers of arguments and results."""
    leaves = jax.tree_util.tree_leaves((program.in_avals, program.out_info))
    types = [f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]" for leaf in leaves]
    return [*types, str(program.in_tree.num_leaves), str(program.out_tree.num_leaves)]


@lru_cache(maxsize=1)
def _surroundings() -> tuple[str, ...]:
    """The environment of a compilation that stays the same in a process: versions, devices, the processor."""
    backend = jax.devices()[0].client
    devices = [f"{device.id} {device.platform} {device.device_kind}" for device in jax.devices()]
    versions = (jax.__version__, jaxlib_version.__version__, __version__)
    return (*versions, str(backend.platform_version), *devices, str(jax.process_count()), _processor())


def _processor() -> str:
    """The processor with all its instruction sets: machine code compiled for one may not run on another.

    In contrast, `measures.processor` names only those that may change the order of a sum.
    """
    names, core = ("model name", "flags", "Features", "CPU part"), first_core()
    rows = [f"{name}: {core[name]}" for name in names if name in core]
    return " ".join([platform.machine(), platform.processor(), *rows])


class Compiler:
    """Compiles lowered programs on worker threads. `disk` is None where the disk cache is off."""

    def __init__(self) -> None:
        self.disk: DiskCache | None = None
        self.workers = Workers()

    def keep_on_disk(self, where: bool | str | os.PathLike[str]) -> None:
        """Turns the disk cache off (False) or on, in the user's cache directory (True) or in the given folder."""
        self.disk = None if where is False else DiskCache(None if where is True else Path(where))

    def start(self, lowered: jax.stages.Lowered, key: Hashable | None) -> Future:
        """Starts to compile and returns a future of the `Compiled`. `key`: the `program_key`; None: no disk cache."""
        disk = self.disk if key is not None and not users_cache() else None
        name = "" if disk is None else disk.name_of(key)
        return self.workers.submit(lambda: self._make(lowered, disk, name))

    def _make(self, lowered: jax.stages.Lowered, disk: DiskCache | None, name: str) -> Compiled:
        """Loads or compiles a program, on a worker thread, and hands a compiled one over to be stored."""
        begin = time.perf_counter()
        executable = None if disk is None else disk.load(name, lowered)
        if executable is not None:
            return Compiled(executable, "disk cache", time.perf_counter() - begin)
        hits = _hits.count  # counted by thread, so that other compilations at the same time do not disturb
        executable = lowered.compile()
        origin = "compiled" if _hits.count == hits else "disk cache"
        if disk is not None:  # as a task of its own, so that nobody waits for the disk
            self.workers.submit(lambda: disk.store(name, executable))
        return Compiled(executable, origin, time.perf_counter() - begin)


def users_cache() -> str | None:
    """The folder of JAX's own persistent cache if the user has set one, else None. Ours is then not used."""
    folder: str | None = getattr(jax.config, "jax_compilation_cache_dir", None)
    if folder and not _hits.listening:
        _Hits.listening = True  # on the class: JAX calls a listener on every thread, so it is registered once
        jax.monitoring.register_event_listener(_hits.hear)
    return folder or None


class _Hits(threading.local):
    """Counts the hits of JAX's own persistent cache, on each thread by itself."""

    count = 0
    listening = False

    def hear(self, event: str, **_: object) -> None:
        self.count += event == "/jax/compilation_cache/cache_hits"


_hits = _Hits()


def program_key(traced: jax.stages.Traced, lowered: jax.stages.Lowered, where: Hashable = ()) -> Hashable | None:
    """A key of a lowered program, in memory and on disk; None if different programs might have the same key.

    The text alone is not enough. It lacks shape and dtype of unused arguments, and for all of them the PRNG
    implementation of typed keys and the weak type, on which the types of later computations depend.

    Args:
      where: the shardings of committed arguments, since the text does not name devices.
    """
    text = lowered.as_text()
    if "callback" in text:  # the text numbers host callbacks and does not name them
        return None
    hasher = hashlib.sha256(text.encode())
    # JAX may be set to pass constants as arguments: then they are not in the text.
    for constant in traced.jaxpr.consts:
        if hasattr(constant, "dtype"):
            hasher.update(data_of(constant))
    trees = f"{lowered.in_tree} {lowered.out_tree}"
    avals = (*traced.jaxpr.in_avals, None, *traced.jaxpr.out_avals)
    types = tuple(aval and (aval.shape, str(aval.dtype), bool(getattr(aval, "weak_type", False))) for aval in avals)
    return hasher.hexdigest(), jax_settings(), trees, jax.default_backend(), where, types


def keep(cache: OrderedDict[Hashable, T], key: Hashable, value: T, most: int) -> None:
    """Puts `value` into an LRU cache of at most `most` entries, as the most recently used one."""
    cache[key] = value
    cache.move_to_end(key)
    while len(cache) > most:
        cache.popitem(last=False)


def shape_of(array: Leaf) -> jax.ShapeDtypeStruct:
    """The `ShapeDtypeStruct` of an array or aval, with its weak type."""
    return jax.ShapeDtypeStruct(array.shape, array.dtype, weak_type=getattr(array, "weak_type", False))


UNITS = 128
"""The most units in the cache, evicted least recently used first."""


class Units:
    """The small programs of eager execution: one for each kind of op, or of function that is jitted by itself.

    An initialisation consists of few kinds of them, repeated many times. Here each kind is compiled once and all of
    them in parallel, not one after the other as eager JAX meets them. A unit is the program that eager JAX would
    compile, so its bits are the same.
    """

    def __init__(self, compiler: Compiler) -> None:
        self.compiler = compiler
        self.kept: OrderedDict[Hashable, Future] = OrderedDict()

    def of_equation(self, equation: Equation) -> Future | None:
        """A future of the `Compiled` for one equation of a jaxpr; its arguments are all inputs, literals included.

        None for an equation that eager JAX does not run as one program.
        """
        identity = _equation_key(equation)
        if identity is None:
            return None
        shapes = [shape_of(atom.aval) for atom in equation.invars]
        types = tuple((shape.shape, shape.dtype, shape.weak_type) for shape in shapes)
        key = (identity, types, jax_settings(), jax.default_backend())
        future = self.kept.get(key)
        if future is None or (future.done() and future.exception() is not None):  # one that failed is tried again
            bind = partial(equation.primitive.bind, **equation.params)

            def unit(*arguments: Leaf) -> PyTree:
                return bind(*arguments)

            # Eager JAX names the program so, and the name is part of the text by which programs are cached.
            unit.__name__ = str(equation.params.get("name", equation.primitive.name))
            traced = jax.jit(unit).trace(*shapes)
            lowered = traced.lower()
            future = self.compiler.start(lowered, program_key(traced, lowered))
        keep(self.kept, key, future, UNITS)
        return future


def _equation_key(equation: Equation) -> Hashable | None:
    """A hashable key of an equation that keeps nothing of the user's alive; None where it has none."""
    primitive = equation.primitive
    if primitive.name not in ("jit", "pjit", "random_fold_in") and not is_compiled_alone(primitive):
        return None
    # JAX caches the jaxpr of a jitted function: the same function and shapes give the same object. A weak reference
    # keeps no constants alive, and once its jaxpr is gone it equals no other.
    params = [(name, weakref.ref(value) if name == "jaxpr" else value) for name, value in equation.params.items()]
    return hashable((primitive.name, tuple(sorted(params, key=lambda param: param[0]))))


def hashable(key: Hashable) -> Hashable | None:
    """The key itself, or None where something in it cannot be hashed."""
    try:
        hash(key)
    except TypeError:
        return None
    return key
