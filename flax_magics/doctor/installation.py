"""Checks of what is installed: accelerators, versions, device memory, folders of compiled programs."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import jax

from ..base.measures import default_device, name_devices
from ..base.private import accelerators
from ..base.text import bytes_
from .finding import Examined, Finding
from .settings import value_of

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
