"""Which code is the user's and which was installed, how Flax's own stands now, and what code reads from outside."""

from __future__ import annotations

import dis
import functools
import inspect
import sys
import sysconfig
import types
from collections.abc import Iterator, Mapping
from functools import lru_cache
from operator import is_
from types import CodeType, ModuleType
from typing import Any

_ROOTS = ("flax.core", "flax.linen", "flax.nnx")
_PUBLIC = ("jax", "jax.lax", "jax.nn", "jax.nn.initializers", "jax.numpy", "jax.random")
"""Modules of JAX whose names models read; what is behind these is JAX's."""


class FlaxPatches:
    """`edition` counts how often what was looked at had been changed."""

    def __init__(self) -> None:
        self.edition = 0
        self._places: list[tuple[Mapping[str, Any], tuple[Any, ...]]] = []
        self._loaded = 0
        self._in_cells = False
        self._looked = False

    def in_cells(self, value: bool) -> None:
        """Whether cells are told of, each by `new_cell`."""
        self._in_cells = value
        self._looked = False

    def new_cell(self) -> None:
        """The next `look` is a look again."""
        self._looked = False

    def look(self) -> None:
        """Brings `edition` up to date."""
        if self._looked:
            return
        if self._loaded != len(sys.modules):
            self._take(keep=self._loaded != 0 and self._same())
        elif not self._same():
            self._take(keep=False)
        self._looked = self._in_cells

    def _same(self) -> bool:
        return all(
            len(values) == len(place) and all(map(is_, place.values(), values)) for place, values in self._places
        )

    def _take(self, keep: bool) -> None:
        """Notes where everything stands. More modules than before are no change of those that were there."""
        if not keep:
            self.edition += 1
        self._loaded = len(sys.modules)
        self._places = [(place, tuple(place.values())) for place in _places()]


def _places() -> Iterator[Mapping[str, Any]]:
    """The namespaces of the modules, and of the classes that they define."""
    classes: dict[type, None] = {}
    for name, module in list(sys.modules.items()):
        if not isinstance(module, ModuleType) or not (name in _PUBLIC or name.startswith(_ROOTS)):
            continue
        yield vars(module)
        for value in list(vars(module).values()):
            if isinstance(value, type) and str(value.__module__).startswith(_ROOTS):
                classes.setdefault(value)
    for cls in classes:
        yield vars(cls)


library = FlaxPatches()
"""Of this process, as Flax is."""

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


def nnx_modules() -> tuple[type, ...]:
    """NNX's Module, as a tuple; empty where nobody has imported NNX, which takes longer than many a run."""
    nnx = sys.modules.get("flax.nnx")
    return () if nnx is None else (nnx.Module,)


def is_module(value: Any) -> bool:
    """Whether `value` is an instance of a Flax module, of either API."""
    from flax import linen

    return isinstance(value, (linen.Module, *nnx_modules()))


def is_module_class(value: Any) -> bool:
    """Whether `value` is a class of Flax modules, of either API."""
    from flax import linen

    return isinstance(value, type) and issubclass(value, (linen.Module, *nnx_modules()))
