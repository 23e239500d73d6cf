"""By what programs are found again, in a session and, as executables in a folder, by a restarted kernel.

A program's keys are of the call, of the equations of its trace, and of the text of the lowered program. All of them hold
the settings of JAX and Flax that a program depends on.

A file there holds one executable in JAX's serialized form. Its name is a digest of all that the executable depends on:
the `program_key`, versions, devices, the processor and XLA's flags. A small file beside it notes by the looks of a call
(its names and types) which program it had. That one is loaded while the call is still being traced, as a guess, and used
if lowering gives its key. JAX's own persistent cache is not touched; where the user has set it up
(`jax_compilation_cache_dir`), it serves our programs, too, and this one is not used.

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
from collections.abc import Hashable, Iterator
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, TypeAlias

import jax
from jax.tree_util import PyTreeDef, default_registry
from jaxlib import version as jaxlib_version

from ..base import __version__
from ..base.digest import data_of
from ..base.measures import first_core
from ..base.private import settings_reader, trace_context_names, trace_context_of
from ..base.types import PyTree
from ..code.contents import Structure, Unknown, flax_state, flax_state_in_words
from ..code.fingerprint import fingerprint
from ..code.library import library
from ..models.calls import signature_of
from .jaxpr import identity
from .trace import Traced, TraceRequest

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


def call_key(request: TraceRequest) -> Hashable | None:
    """A key under which a call's program is cached: equal keys mean that tracing gives the same program.

    None where that cannot be told, as for a model that has no fingerprint.
    """
    arguments = request.arguments
    model, static = request.model.cache_key(), fingerprint(arguments.static)
    treedef = jax.tree_util.tree_structure(request.variables)
    passed, variables = Structure.of(arguments.treedef), Structure.of(treedef)
    state = settings()
    # A part that cannot be told now may be another at the next call without anyone noticing.
    if None in (model, static, passed.contents, variables.contents) or any(isinstance(s, Unknown) for s in state[1]):
        return None
    trees = (passed, arguments.traced, variables)
    return hashable((*looks(request), *trees, model, static, state, library.edition))


def looks(request: TraceRequest) -> tuple[object, ...]:
    """What can be told of a call in any process: names, options, types. Calls of two editions of a model may look alike."""
    call = (request.name, request.method, request.mutable, request.mode == "train", request.keyed, request.placement)
    draw, leaves = (request.draw.impl, request.draw.size), jax.tree_util.tree_leaves(request.variables)
    return *call, *draw, tuple(map(signature_of, request.arguments.dynamic.values())), tuple(map(signature_of, leaves))


def equations_key(traced: Traced, request: TraceRequest) -> Hashable | None:
    """A key of a traced program, equal only if lowering gives the same program; None where that cannot be told."""
    equations = identity(traced.jaxpr)
    trees = (Structure.of(traced.in_tree), Structure.of(jax.tree_util.tree_structure(traced.out_info)))
    return equations and (equations, trees, request.name, jax_settings(), jax.default_backend(), placed(request))


def placed(request: TraceRequest) -> tuple[object, ...]:
    """Sharding of each input that the user placed (committed), None for others: it decides where the program runs."""
    leaves = jax.tree_util.tree_leaves((request.variables, request.arguments.dynamic))
    return tuple(signature_of(leaf)[-1] for leaf in leaves)


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


def digest_of(key: Hashable | None, lowered: jax.stages.Lowered | None) -> str:
    """A digest of a program that all processes of a job have alike, empty in a job of one.

    Args:
      key: its `program_key`; None only where `lowered` is given.
    """
    if jax.process_count() == 1:
        return ""
    if isinstance(key, tuple):
        return str(key[0])
    assert lowered is not None
    # What the text has of a host callback is an address.
    return hashlib.sha256(re.sub(r"[0-9]{6,}", "", lowered.as_text()).encode()).hexdigest()


def hashable(key: Hashable) -> Hashable | None:
    """The key itself, or None where something in it cannot be hashed."""
    try:
        hash(key)
    except TypeError:
        return None
    return key


LIMIT = 1 << 30
"""The most bytes in the folder; files are deleted least recently used first."""

_MAGIC = b"flax_magics program 3"  # the number goes up with each change of the format
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

    def load(self, name: str, lowered: jax.stages.Lowered | None = None) -> Executable:
        """Loads an executable; None where there is no usable one. An unusable file is deleted.

        Args:
          name: the file's name, by `name_of`.
          lowered: the program that is wanted, against which the loaded one is checked; None where that will be known later:
            then only a program whose arguments and results are in plain containers is loaded.
        """
        path, data = self.folder / name, self._read(name)
        if data is None:
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
        """Stores an executable, if JAX can serialize it."""
        try:
            data = _packed(name, executable)
        except Exception:  # not possible with constants as arguments, nor on some backends
            return
        self._write(name, data)

    def program_of(self, looks: str) -> str:
        """The name of the program that a call of these looks (`name_of` them) had last; empty if it had none."""
        noted = (self._read(looks) or b"").decode("ascii", "replace")
        return noted if re.fullmatch("[0-9a-f]{64}", noted) else ""  # it becomes the name of a file

    def note(self, looks: str, name: str) -> None:
        """Notes which program a call of these looks has."""
        self._write(looks, name.encode())

    def _read(self, name: str) -> bytes | None:
        """The bytes of a file; None where there is none, or the folder is not to be trusted."""
        try:
            return (self.folder / name).read_bytes() if self._is_own() else None
        except OSError:
            return None

    def _write(self, name: str, data: bytes) -> None:
        """Replaces a file atomically, and keeps the folder within the limit."""
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
    trees = _plain(executable.in_tree, executable.out_tree)
    head = json.dumps({"program": name, "devices": devices, "types": _types(executable), "trees": trees}).encode()
    return b"\n".join((_MAGIC, _digest(head, payload), head, payload))


def _plain(*trees: PyTree) -> list[str]:
    """Trees of dicts, lists, tuples and None, as text; empty where one has other nodes."""
    with contextlib.suppress(ValueError):
        return [tree.serialize_using_proto().hex() for tree in trees]
    return []


def _unpacked(data: bytes, name: str, lowered: jax.stages.Lowered | None) -> Executable:
    """The executable in a file's bytes; raises ValueError or whatever JAX raises if it is not the wanted one."""
    from jax.experimental.serialize_executable import deserialize_and_load

    magic, digest, line, payload = data.split(b"\n", 3)
    if magic != _MAGIC or _digest(line, payload) != digest:
        raise ValueError("damaged, or no program")
    head = json.loads(line)
    types = head["types"] if lowered is None else _types(lowered)
    if head["program"] != name or head["types"] != types:
        raise ValueError("another program")
    if lowered is not None:
        in_tree, out_tree = lowered.in_tree, lowered.out_tree
    elif head["trees"]:
        in_tree, out_tree = (_tree_of(bytes.fromhex(tree)) for tree in head["trees"])
    else:
        return None
    by_id = {device.id: device for device in jax.devices()}
    # Named by id: by default JAX would load a program onto all devices of this process.
    devices = [by_id[id] for id in head["devices"]] or jax.devices()[:1]
    executable = deserialize_and_load(payload, in_tree, out_tree, execution_devices=devices)
    if _types(executable) != types:  # the head may be right and the payload another program's
        raise ValueError("another program")
    return executable


_tree_of = partial(PyTreeDef.deserialize_using_proto, default_registry)


def is_program(executable: Executable, lowered: jax.stages.Lowered) -> bool:
    """Whether a program that was loaded as a guess has the arguments and results of the one that is wanted."""
    trees = (executable.in_tree, executable.out_tree) == (lowered.in_tree, lowered.out_tree)
    return trees and _types(executable) == _types(lowered)


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
