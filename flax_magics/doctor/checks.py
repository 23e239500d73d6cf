"""The checks of `%flax_doctor`: of what is installed, of JAX's own settings, and of what the user's names hold.

Each setting is right for some purpose, and costs something where it was left on. `CHECKS`, at the end, has all in the
order in which they are told.
"""

from __future__ import annotations

import ast
import contextlib
import importlib.metadata
import importlib.util
import inspect
import os
import re
import sys
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
from jax.sharding import AxisType, Mesh

from ..base.measures import default_device, name_devices
from ..base.private import accelerators
from ..base.text import bytes_, plural
from ..base.threads import forked_workers
from ..code.library import is_module, is_module_class, library_module, loads_of, nnx_modules
from ..compile.placement import auto_mesh
from .findings import Check, Examined, Finding

PLUGINS = {
    "NVIDIA GPU": ("cuda12", ("jax_cuda12_plugin", "jax_cuda13_plugin"), "cuda"),
    "AMD GPU": ("rocm", ("jax_rocm7_plugin", "jax_rocm60_plugin"), "rocm"),
    "TPU": ("tpu", ("libtpu",), "tpu"),
}
"""Accelerator → the extra of JAX's that installs its plugin, modules of the plugin, and JAX's name of the platform."""
FAMILY = (
    *("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "jax-cuda12-plugin", "jax-cuda12-pjrt"),
    *("jax-cuda13-plugin", "jax-cuda13-pjrt", "libtpu"),
)
"""Packages that require versions of each other."""
EXTRAS = ("", "cuda12", "cuda13", "tpu")
HUGE = 10_000_000_000
"""Bytes of a folder of programs, from which on it is worth a word. Ours never has more than a tenth of it."""
OTHERS = ("torch", "tensorflow", "cupy")
"""Modules that take memory of a GPU for themselves."""
PREALLOCATE = "XLA_PYTHON_CLIENT_PREALLOCATE"
WITHOUT = f'import os\nos.environ["{PREALLOCATE}"] = "false"'
REMOTE = re.compile(r"^\w+://")


def accelerator(_: Examined) -> Finding | None:
    """A GPU or TPU that is there and not used."""
    cost = "models train some 10 to 100 times slower than on it"
    backend, device = jax.default_backend(), default_device()
    if backend != "cpu":
        if device.platform != "cpu":
            return None
        text = f"JAX has {name_devices(jax.local_devices())}, and `jax_default_device` is {name_devices([device])}"
        return Finding(text, cost, 'import jax\njax.config.update("jax_default_device", None)', now=True)
    found = accelerators()
    if not found:
        return None
    extra, modules, platform = PLUGINS[found[0]]
    text = f"this machine has {'a' if found[0] == 'TPU' else 'an'} {found[0]}, and JAX runs on the CPU"
    chosen = value_of("jax_platforms") or ""
    if "cpu" in chosen.split(","):
        if os.environ.get("JAX_PLATFORMS"):
            mend = 'import os\nos.environ.pop("JAX_PLATFORMS", None)'
            return Finding(f'{text}, as JAX_PLATFORMS="{chosen}" says', cost, mend, "first")
        mend = 'import jax\njax.config.update("jax_platforms", None)'
        return Finding(f"{text}, as `jax_platforms` says", cost, mend, "first")
    if not any(importlib.util.find_spec(module) for module in modules):
        mend = f'%pip install -U "jax[{extra}]=={jax.__version__}"'
        return Finding(f"{text}, since the plugin for it is not installed", cost, mend, "then", now=True)
    mend = f'import jax\njax.devices("{platform}")  # says why'
    return Finding(f"{text}, since the plugin for it did not start", cost, mend, now=True)


def installed_since(_: Examined) -> Finding | None:
    """Packages that were installed in another version after this process had imported them."""
    changed = []
    for name in ("jax", "jaxlib", "flax", "optax"):
        imported = getattr(sys.modules.get(name), "__version__", None)
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            installed = importlib.metadata.version(name)
            # A build of one's own may say more of itself after the number.
            if imported is not None and installed.partition("+")[0] != imported.partition("+")[0]:
                changed.append(f"{name} {imported} runs, and {installed} is installed")
    if not changed:
        return None
    cost = "what is imported from now on is of the other version, and fails in odd ways"
    return Finding("; ".join(changed), cost, None, "then", now=True)


def versions(_: Examined) -> Finding | None:
    """Installed versions that do not go together, by what the packages themselves require."""
    unmet = list(_unmet())
    if not unmet:
        return None
    told = [f"{package} takes {wanted}, and {installed} is installed" for package, wanted, installed in unmet]
    wanted = " ".join(dict.fromkeys(f'"{wanted}"' for _, wanted, _ in unmet))
    return Finding("; ".join(told), "calls fail, or a GPU is not found", f"%pip install {wanted}", "then")


def _unmet() -> Iterator[tuple[str, str, str]]:
    """(package, its requirement, the version installed) of each requirement inside the family that is not met."""
    from packaging.requirements import Requirement

    installed = {}
    for name in FAMILY:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            installed[name] = importlib.metadata.version(name)
    for package in installed:
        told = set()
        for requirement in map(Requirement, importlib.metadata.requires(package) or ()):
            marker, version = requirement.marker, installed.get(requirement.name)
            applies = marker is None or any(marker.evaluate({"extra": extra}) for extra in EXTRAS)
            if version is None or not applies or requirement.specifier.contains(version, prereleases=True):
                continue
            if requirement.name not in told:
                told.add(requirement.name)
                yield f"{package} {installed[package]}", f"{requirement.name}{requirement.specifier}", version


def twice_on_path(_: Examined) -> Finding | None:
    """JAX or Flax in two places of `sys.path`."""
    for name in ("jax", "jaxlib", "flax"):
        places: dict[Path, str] = {}
        for distribution in importlib.metadata.distributions(name=name):
            places.setdefault(Path(str(distribution.locate_file(""))).resolve(), distribution.version)
        if len(places) > 1:
            where = " and ".join(f"{version} in {place}" for place, version in places.items())
            cost = "Python imports the first, and its parts or pip may take the other"
            first = next(iter(places))
            inside = str(first).startswith(
                tuple(str(Path(prefix).resolve()) for prefix in (sys.prefix, sys.base_prefix))
            )
            # pip leaves alone what lies outside of its environment.
            text = f"{name} is on the path twice, {where}"
            if inside:
                return Finding(text, cost, f"%pip uninstall -y {name}", "then", now=True)
            return Finding(text, cost, f"import sys\nsys.path.remove({str(first)!r})", "first", now=True)
    return None


def preallocation(examined: Examined) -> Finding | None:
    """The three quarters of a GPU that JAX takes at its start, beside another library that needs some; or too late."""
    gpus = [device for device in jax.local_devices() if device.platform in ("gpu", "cuda", "rocm")]
    if not gpus:
        return None
    chosen = os.environ.get(PREALLOCATE, "true").lower() not in ("false", "0")
    stats = gpus[0].memory_stats() or {}
    limit, pool = stats.get("bytes_limit", 0), stats.get("pool_bytes", 0)
    name = name_devices(gpus)
    if not chosen:
        if not examined.started or not limit or pool < 0.9 * limit:
            return None
        text = f"{PREALLOCATE}=false was set after JAX had taken {bytes_(pool)} of {name}"
        return Finding(text, "nothing else gets that memory", WITHOUT, "first", now=True)
    others = [module for module in OTHERS if module in sys.modules]
    if not others:
        return None
    amount = f"{bytes_(limit)} of {name}" if limit else f"three quarters of {name}"
    takes = "took" if examined.started else "takes"
    text = f"JAX {takes} {amount} at its first use, and {' and '.join(others)} is loaded too"
    return Finding(text, "what that asks for beyond the rest fails", WITHOUT, "first", now=True)


def cache_folder(examined: Examined) -> Finding | None:
    """The folders in which compiled programs are kept: not to be written, or huge."""
    theirs: str | None = value_of("jax_compilation_cache_dir")
    if theirs:
        if REMOTE.match(theirs):
            return None
        if not _writable(Path(theirs)):
            mend = 'import jax\njax.config.update("jax_compilation_cache_dir", "…")'
            return Finding(f"the folder of JAX's cache, {theirs}, cannot be written", NOT_KEPT, mend)
        size = sum(_sizes(theirs))
        if size > HUGE and value_of("jax_compilation_cache_max_size") == -1:
            mend = f'import jax\njax.config.update("jax_compilation_cache_max_size", {HUGE:_})'
            if importlib.util.find_spec("filelock") is None:  # JAX asks for it where there is a limit
                mend = f"%pip install filelock\n{mend}"
            text = f"JAX's cache in {theirs} has {bytes_(size)}, and no limit"
            return Finding(text, "the disk fills up, and nothing is ever deleted", mend, "first")
        return None
    if examined.disk is None:
        return None
    folder, own = examined.disk
    if own and _writable(Path(folder)):
        return None
    what = "cannot be written" if own else "belongs to another user, or others can write to it"
    mend = 'import flax_magics\nflax_magics.session().programs.compiler.keep_on_disk("…")'
    with contextlib.suppress(OSError, AttributeError):
        if not own and os.stat(folder).st_uid == os.geteuid():
            mend = f"import os\nos.chmod({folder!r}, 0o700)"
            what = "can be written by others, and is not trusted"
    return Finding(f"the folder of compiled programs, {folder}, {what}", NOT_KEPT, mend)


NOT_KEPT = "no program is kept, and a restarted kernel compiles all of them again"


def _writable(folder: Path) -> bool:
    """Whether files can be made in the folder, or the folder itself where it is not there yet."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)


def _sizes(folder: str) -> Iterator[int]:
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            with contextlib.suppress(OSError):
                yield entry.stat().st_size


DEBUG = {
    "jax_debug_nans": "each result is looked through",
    "jax_debug_infs": "each result is looked through",
    "jax_debug_key_reuse": "each program is traced with a check of its keys",
    "jax_check_tracer_leaks": "each trace is searched, and none is used again",
    "jax_log_compiles": "each compilation is printed",
    "jax_explain_cache_misses": "each trace is compared with earlier ones, and printed",
    "jax_enable_checks": "JAX checks itself at each operation",
}
"""Setting for debugging → what it costs while it is on."""


def set_to(value: object, *names: str) -> str:
    """The lines that give settings of JAX a value."""
    return "\n".join(["import jax", *(f'jax.config.update("{name}", {value!r})' for name in names)])


def value_of(name: str) -> Any:
    """The value of a setting; None for one that this version of JAX lacks."""
    try:
        return getattr(jax.config, name) if hasattr(jax.config, name) else jax.config.read(name)
    except AttributeError:
        return None


def is_on(name: str) -> bool:
    """Whether a setting is on."""
    return bool(value_of(name))


def x64(_: Examined) -> Finding | None:
    """64 bits where nothing else is said; or the environment variable for it, set too late."""
    if is_on("jax_enable_x64"):
        cost = "twice the memory, and on a GPU or TPU 2 to 60 times the time"
        return Finding("`jax_enable_x64` is on, and new arrays are float64", cost, set_to(False, "jax_enable_x64"))
    if os.environ.get("JAX_ENABLE_X64", "").lower() in ("1", "true", "yes", "on"):
        text = "JAX_ENABLE_X64 is set, and JAX was imported before, or told otherwise"
        return Finding(text, "arrays are float32 all the same", set_to(True, "jax_enable_x64"))
    return None


def legacy_keys(examined: Examined) -> Finding | None:
    """Keys that are plain numbers, as `jax.random.PRNGKey` makes them, or the setting that makes these typed ones."""
    if is_on("jax_enable_custom_prng"):
        text = "`jax_enable_custom_prng` is on, and PRNGKey gives typed keys here and plain numbers elsewhere"
        return Finding(text, "code that was tried here fails there", set_to(False, "jax_enable_custom_prng"))
    shape = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0))).shape
    raw = [
        name
        for name, value in examined.names.items()
        if not name.startswith("_")
        and isinstance(value, jax.Array)
        and value.dtype == "uint32"
        and value.shape == shape
    ]
    # Two numbers are no key by themselves: somebody has to have made keys so.
    if not raw or not any("PRNGKey" in source for source in examined.sources()):
        return None
    told = ", ".join([*(f"`{name}`" for name in raw[:4]), *["…"] * (len(raw) > 4)])
    are = "is a key" if len(raw) == 1 else "are keys"
    text = f"{told} {are} of jax.random.PRNGKey, plain uint32[{shape[0]}]"
    lines = ["import jax", *(f"{name} = jax.random.wrap_key_data({name})" for name in raw)]
    cost = "adding to a key, or giving one where numbers belong, passes unnoticed; jax.random.key makes typed ones"
    return Finding(text, cost, "\n".join(lines))


def threefry(_: Examined) -> Finding | None:
    """Random numbers that depend on how arrays are sharded."""
    if is_on("jax_threefry_partitionable"):
        return None
    cost = "random numbers are others than elsewhere, and change with the number of devices"
    return Finding("`jax_threefry_partitionable` is off", cost, set_to(True, "jax_threefry_partitionable"), now=True)


def without_jit(_: Examined) -> Finding | None:
    """Programs that are run operation by operation."""
    if not is_on("jax_disable_jit"):
        return None
    cost = "jitted functions run operation by operation, some 10 to 100 times slower"
    return Finding("`jax_disable_jit` is on", cost, set_to(False, "jax_disable_jit"), now=True)


def debug_flags(_: Examined) -> Finding | None:
    """Settings for debugging that are on."""
    names = [name for name in DEBUG if is_on(name)]
    if not names:
        return None
    costs = "; ".join(dict.fromkeys(DEBUG[name] for name in names))
    are = "is on" if len(names) == 1 else "are on"
    return Finding(f"{', '.join(f'`{name}`' for name in names)} {are}", costs, set_to(False, *names))


def recoverability(_: Examined) -> Finding | None:
    """A job of several processes, all of which end when one does."""
    if jax.process_count() == 1 or value_of("jax_enable_recoverability") in (None, True):
        return None
    text = f"`jax_enable_recoverability` is off in a job of {jax.process_count()} processes"
    cost = "when one of them ends, JAX ends the others, and what they hold is lost"
    return Finding(text, cost, set_to(True, "jax_enable_recoverability"), "first", now=True)


def jitted_modules(examined: Examined) -> Finding | None:
    """A plain `jax.jit` over an NNX module: what the function changes in it is lost in silence."""
    nnx = sys.modules.get("flax.nnx")
    jitted = {name: value for name, value in _named(examined) if type(value) is type(jax.jit(lambda: None))}
    if nnx is None or not jitted:
        return None
    modules = {name: value for name, value in _named(examined) if isinstance(value, nnx_modules())}
    for name, function in jitted.items():
        inner = inspect.unwrap(function)
        captured = next(_captured(inner, modules), None)
        if captured is not None:
            text = f"`{name}` is jax.jit of a function that reads the NNX module `{captured}` from outside"
            cost = "its weights are constants of the program, and later ones are never seen"
            mend = f"from flax import nnx\n@nnx.jit\ndef {name}({captured}, …):\n  …"
            return Finding(text, cost, mend, now=True)
        for module in _passed(name, modules, examined):
            # A function that only reads parameters loses nothing.
            changes = "update" in getattr(getattr(inner, "__code__", None), "co_names", ())
            if changes or jax.tree_util.tree_leaves(nnx.state(modules[module], nnx.Not(nnx.Param))):
                text = f"`{name}` is a plain jax.jit, and is called with the NNX module `{module}`"
                cost = "what it changes there (counts of random streams, statistics, weights) is lost in silence"
                return Finding(text, cost, f"from flax import nnx\n{name} = nnx.jit({name}.__wrapped__)", now=True)
    return None


def _named(examined: Examined) -> Iterator[tuple[str, Any]]:
    return ((name, value) for name, value in examined.names.items() if not name.startswith("_"))


def _captured(function: Any, modules: Mapping[str, Any]) -> Iterator[str]:
    """Names of the NNX modules that a function reads from its globals, closes over, is, or is a method of."""
    owner = getattr(function, "__self__", function)
    if isinstance(owner, nnx_modules()):
        yield next((name for name, module in modules.items() if module is owner), "net")
    if isinstance(function, types.FunctionType):
        closed = inspect.getclosurevars(function).nonlocals
        loaded = {name: function.__globals__.get(name) for name in loads_of(function.__code__).names}
        yield from (name for name, value in {**loaded, **closed}.items() if isinstance(value, nnx_modules()))


def _passed(function: str, modules: Mapping[str, Any], examined: Examined) -> Iterator[str]:
    """Names of the modules that the user's code passes to a function, as it was written."""
    for source in examined.sources():
        try:
            tree = ast.parse(source)
        except SyntaxError:
            continue
        for call in ast.walk(tree):
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == function:
                arguments = [*call.args, *(keyword.value for keyword in call.keywords)]
                yield from (node.id for node in arguments if isinstance(node, ast.Name) and node.id in modules)


def explicit_mesh(examined: Examined) -> Finding | None:
    """A mesh of Explicit axes, beside Flax modules."""
    if not (examined.modules or any(is_module(value) for _, value in _named(examined))):
        return None
    around = jax.sharding.get_abstract_mesh()
    meshes: list[tuple[str, Any]] = [("", around)] if not around.empty else []
    meshes += [(name, value) for name, value in _named(examined) if isinstance(value, Mesh)]
    explicit = [(name, mesh) for name, mesh in meshes if AxisType.Explicit in mesh.axis_types]
    if not explicit:
        return None
    name = next((name for name, _ in explicit if name), "mesh")
    mesh = explicit[-1][1]
    lines = [
        "import jax",
        "from jax.sharding import AxisType",
        auto_mesh(name, mesh),
        *([f"jax.set_mesh({name})"] if not around.empty else []),
    ]
    what = (
        f"`{name}` has Explicit axes" if any(name for name, _ in explicit) else "the mesh that is set has Explicit axes"
    )
    return Finding(what, "Flax's Dropout, Embed and RNN fail on arrays that are sharded so", "\n".join(lines))


def workers(examined: Examined) -> Finding | None:
    """A loader of torch's that forks this process."""
    forking = {name: count for name, value in _named(examined) if (count := forked_workers(value))}
    if not forking:
        return None
    told = ", ".join(f"`{name}` forks {plural(count, 'worker')}" for name, count in forking.items())
    lines = "\n".join(f"{name}.num_workers = 0" for name in forking)
    cost = "a fork of a process in which JAX runs may wait for ever"
    return Finding(told, f"{cost}; multiprocessing_context='forkserver' starts them otherwise", lines, now=True)


def autoreload(examined: Examined) -> Finding | None:
    """Classes of Flax modules that IPython's autoreload changes in place."""
    registry = getattr(getattr(examined.shell, "magics_manager", None), "registry", {})
    reloader = getattr(registry.get("AutoreloadMagics"), "_reloader", None)
    if reloader is None or not reloader.enabled:
        return None
    found: dict[str, str] = {}
    for value in (*examined.modules.values(), *(value for _, value in _named(examined))):
        cls = value if isinstance(value, type) else type(value)
        module = str(cls.__module__)
        if module == "__main__" or library_module(module) or not is_module_class(cls):
            continue
        if module in reloader.modules or (reloader.check_all and module not in reloader.skip_modules):
            found.setdefault(module, cls.__name__)
    if not found:
        return None
    classes = ", ".join(f"`{name}` of {module}" for module, name in found.items())
    cost = (
        "functions that were jitted before an edit go on with the code before it, in silence, until jax.clear_caches()"
    )
    return Finding(f"autoreload changes {classes} in place", cost, "\n".join(f"%aimport -{module}" for module in found))


CHECKS = (
    Check("accelerator", accelerator, first=True),
    Check("two on the path", twice_on_path, first=True),
    Check("installed since", installed_since, first=True),
    Check("versions", versions),
    Check("preallocation", preallocation, first=True),
    Check("cache folder", cache_folder),
    Check("recoverability", recoverability, first=True),
    Check("without jit", without_jit, first=True),
    Check("threefry", threefry, first=True),
    Check("x64", x64),
    Check("debug flags", debug_flags),
    Check("legacy keys", legacy_keys),
    Check("jitted modules", jitted_modules, first=True),
    Check("explicit mesh", explicit_mesh),
    Check("forked workers", workers, first=True),
    Check("autoreload", autoreload),
)
"""A new one is a function that returns a `Finding`, and a line here; `tests/doctor/test_checks.py` makes it true."""
