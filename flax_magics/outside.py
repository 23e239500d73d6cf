"""What code reads from outside of the program: the clock, the environment, files, the host's random numbers.

Nothing in Python tells whether these are still what they were, so code that reads them is traced in every run.
"""

from __future__ import annotations

import dis
from functools import lru_cache
from types import CodeType, ModuleType
from typing import Any

_MODULES = frozenset(
    [
        "builtins", "datetime", "gc", "glob", "importlib", "inspect", "io", "locale", "numpy.random", "os", "os.path",
        "pathlib", "pickle", "platform", "posix", "posixpath", "random", "requests", "secrets", "shutil", "socket",
        "subprocess", "sys", "tempfile", "threading", "time", "urllib", "uuid", "zoneinfo",
    ]
)  # fmt: skip


@lru_cache(maxsize=4096)
def _chains(code: CodeType) -> dict[str, set[tuple[str, ...]]]:
    """Global names that `code` loads, each with the attributes that it reads one from another after it."""
    found: dict[str, set[tuple[str, ...]]] = {}
    name, attributes = None, []
    for step in dis.get_instructions(code):
        if name is not None and step.opname in ("LOAD_ATTR", "LOAD_METHOD"):
            attributes.append(step.argval)
            continue
        if name is not None:
            found.setdefault(name, set()).add(tuple(attributes))
        name, attributes = (step.argval, []) if step.opname in ("LOAD_GLOBAL", "LOAD_NAME") else (None, [])
    return found


def is_outside_module(name: str) -> bool:
    """Whether the module of this name is one."""
    return name in _MODULES


@lru_cache(maxsize=4096)
def imported(code: CodeType) -> tuple[str, ...]:
    """Names of the modules that `code` itself imports when it runs."""
    return tuple(step.argval for step in dis.get_instructions(code) if step.opname == "IMPORT_NAME")


def is_outside(value: Any) -> bool:
    """Whether `value` is such a module, or something that one of them defines."""
    if isinstance(value, ModuleType):
        return value.__name__ in _MODULES
    module = getattr(value, "__module__", None)
    return isinstance(module, str) and module in _MODULES and module != "builtins"


def reads_outside(name: str, module: ModuleType, code: CodeType) -> bool:
    """Whether `code`, in which `name` is the library `module`, reaches one of them through it: `np.random.rand()`."""
    if is_outside(module):
        return True
    for attributes in _chains(code).get(name, ()):
        value: Any = module
        for attribute in attributes:
            value = vars(value).get(attribute)
            if is_outside(value):
                return True
            if not isinstance(value, ModuleType):
                break
        # A module that goes somewhere else: any of the code's attributes may be read from it.
        if isinstance(value, ModuleType) and any(is_outside(vars(value).get(other)) for other in code.co_names):
            return True
    return False
