"""All checks, in the order in which they are told: what may be wrong with this process, its settings and its names."""

from __future__ import annotations

from . import installation, names, settings
from .finding import Check

CHECKS = (
    Check("accelerator", installation.accelerator, first=True),
    Check("two on the path", installation.twice_on_path, first=True),
    Check("installed since", installation.installed_since, first=True),
    Check("versions", installation.versions),
    Check("preallocation", installation.preallocation, first=True),
    Check("cache folder", installation.cache_folder),
    Check("recoverability", settings.recoverability, first=True),
    Check("without jit", settings.without_jit, first=True),
    Check("threefry", settings.threefry, first=True),
    Check("x64", settings.x64),
    Check("debug flags", settings.debug_flags),
    Check("legacy keys", settings.legacy_keys),
    Check("jitted modules", names.jitted_modules, first=True),
    Check("explicit mesh", names.explicit_mesh),
    Check("forked workers", names.workers, first=True),
    Check("autoreload", names.autoreload),
)
"""A new one is a function that returns a `Finding`, and a line here; `tests/doctor/test_checks.py` makes it true."""
