"""The user's own code, told from what was installed and from what Python makes of it; and the names that it reads."""

from __future__ import annotations

import dis
import functools
import inspect
import sys
import sysconfig
import types
from typing import Any


class NotPlain(Exception):
    """Something was reached whose value cannot be told from the outside."""


_PATHS = sysconfig.get_paths()
_LIBRARY_ROOTS = tuple({_PATHS[name] for name in ("stdlib", "platstdlib", "purelib", "platlib")})


@functools.lru_cache(maxsize=4096)
def library_file(filename: str) -> bool:
    """Whether code of this file was installed, not written by the user."""
    return filename.startswith(_LIBRARY_ROOTS) or filename.startswith("<frozen ")


def library_module(name: str | None) -> bool:
    """Whether `name` is a module that was installed, not one that the user writes."""
    if name is None or name == "__main__":
        return False
    module = sys.modules.get(name)
    if module is None:
        return False
    file = getattr(module, "__file__", None)
    if file is None:  # built in, or a namespace package
        return name.partition(".")[0] in sys.builtin_module_names or hasattr(module, "__path__")
    return library_file(file)


# Class attributes that Python, dataclasses or Flax make from the rest of the class.
DERIVED = frozenset(
    [
        "__dict__",
        "__weakref__",
        "__doc__",
        "__module__",
        "__annotations__",
        "__annotate__",
        "__annotate_func__",
        "__annotations_cache__",
        "__qualname__",
        "__firstlineno__",
        "__static_attributes__",
        "__dataclass_params__",
        "__match_args__",
        "__abstractmethods__",
        "_abc_impl",
        "__type_params__",
        "__orig_bases__",
        "__parameters__",
        "__hash__",
        "__eq__",
        "__repr__",
        "__replace__",
        "_kw_only_dataclass_fields",
        "__slots__",
        "_state",
        "_parent_ref",
    ]
)

# Methods that `dataclass` writes. A user's own, in code that was executed from a string, has the same file name.
_WRITTEN = frozenset(
    ["__init__", "__repr__", "__eq__", "__hash__", "__lt__", "__le__", "__gt__", "__ge__", "__setattr__", "__delattr__"]
)


def is_generated(name: str, item: Any) -> bool:
    """Whether an attribute of a dataclass is a method that `dataclass` writes, or Flax's wrapping of one."""
    if name not in _WRITTEN or not isinstance(item, types.FunctionType):
        return False
    inner = item
    while hasattr(inner, "__wrapped__"):
        inner = inner.__wrapped__
    return inner.__code__.co_filename == "<string>"


def arguments_of(code: types.CodeType) -> tuple[Any, ...]:
    """Names of the arguments, which a call can use; other locals have a number and no name that code could read."""
    starred = bool(code.co_flags & inspect.CO_VARARGS) + bool(code.co_flags & inspect.CO_VARKEYWORDS)
    return (*code.co_varnames[: code.co_argcount + code.co_kwonlyargcount + starred], code.co_nlocals)


# What a walk cannot follow: reading names by a string.
_REFLECTION = frozenset({"globals", "locals", "vars", "eval", "exec", "open", "next", "iter", "input", "__import__"})


@functools.lru_cache(maxsize=4096)
def global_names(code: types.CodeType) -> tuple[str, ...]:
    """Names that `code` itself loads from its module. Raises NotPlain where it reads names by a string."""
    names = tuple(
        dict.fromkeys(
            instruction.argval
            for instruction in dis.get_instructions(code)
            if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME")
        )
    )
    if _REFLECTION.intersection(names):
        raise NotPlain(", ".join(_REFLECTION.intersection(names)))
    return names
