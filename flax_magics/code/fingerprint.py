"""A digest of what a model computes: its classes' code, its fields, and the values of all that they read.

Two equal fingerprints mean that tracing again would give the same program. That is claimed only for what is plain:
code, classes, modules of libraries, numbers, text, arrays and containers of these. Anything else (an open file, an
iterator, an object with state of its own) raises `NotPlain`, and whoever asked traces again instead of guessing.

What a library defines counts by identity: editing an installed package needs a restart, as everywhere in Python.
Comments, layout, docstrings, annotations and line numbers do not count.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import functools
import hashlib
import types
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from .guards import Guards
from .library import (
    DERIVED,
    NotPlain,
    arguments_of,
    global_names,
    imported,
    is_generated,
    is_outside,
    is_outside_module,
    library_file,
    library_module,
    reads_outside,
)


def fingerprint(value: Any) -> bytes | None:
    """The digest of `value` and of everything it reaches, None where something is not plain."""
    return guarded(value)[0]


def guarded(value: Any) -> tuple[bytes | None, Guards]:
    """`fingerprint(value)`, and what tells whether it would still be the same."""
    walk = _Walk()
    try:
        walk.visit(value)
    except (NotPlain, RecursionError):
        return None, Guards(open=True)
    return walk.hasher.digest(), walk.guards


def code_print(function: types.FunctionType) -> bytes:
    """A digest of a function's own code, nothing that it reaches included; equal for another layout or docstring."""
    walk = _Walk()
    with contextlib.suppress(NotPlain):  # a constant that is not plain: it stands where it stood
        walk._code(function.__code__, function.__doc__)
    return walk.hasher.digest()


@dataclasses.dataclass
class Fingerprint:
    """The fingerprint of one value, taken when it is asked for and again when something it was read from has changed."""

    value: Any
    _digest: bytes | None = None
    _guards: Guards = dataclasses.field(default_factory=lambda: Guards(open=True))

    def digest(self) -> bytes | None:
        """`fingerprint(value)`."""
        if not self._guards.hold():
            self._digest, self._guards = guarded(self.value)
        return self._digest


class _Walk:
    def __init__(self) -> None:
        self.hasher = hashlib.sha256()
        self.guards = Guards()
        # id → order of first visit; the objects are kept so that no id is used again during the walk.
        self.seen: dict[int, int] = {}
        self.kept: list[Any] = []

    def tag(self, *parts: object) -> None:
        for part in parts:
            data = part if isinstance(part, bytes) else str(part).encode()
            self.hasher.update(len(data).to_bytes(8, "little"))
            self.hasher.update(data)

    def visit(self, value: Any) -> None:
        if value is None or type(value) in (bool, int, float, complex, str, bytes):
            self.tag(type(value).__name__, repr(value))
            return
        if value is ... or value is NotImplemented or value is dataclasses.MISSING:
            self.tag(repr(value))
            return
        known = self.seen.get(id(value))
        if known is not None:
            self.tag("again", known)
            return
        self.seen[id(value)] = len(self.seen)
        self.kept.append(value)
        self._visit_new(value)

    def _visit_new(self, value: Any) -> None:
        if isinstance(value, types.FunctionType):
            self._function(value)
        elif isinstance(value, type):
            self._class(value)
        elif isinstance(value, types.CodeType):
            self._code(value)
        elif isinstance(value, types.ModuleType):
            if not library_module(value.__name__) or is_outside(value):
                raise NotPlain(value.__name__)  # its attributes are visited where they are read
            self.tag("module", value.__name__)
        elif isinstance(value, (tuple, list)):
            self.tag(type(value).__qualname__, len(value))
            if type(value) not in (tuple, list):
                self.visit(type(value))
            if isinstance(value, list):
                self.guards.items(value)
            for item in value:
                self.visit(item)
        elif isinstance(value, Mapping):
            self._mapping(value)
        elif isinstance(value, (set, frozenset)):
            parts = []
            for item in value:
                inner = fingerprint(item)
                if inner is None:
                    raise NotPlain(repr(item))
                parts.append(inner)
            if not all(type(item) in (bool, int, float, complex, str, bytes) for item in value):
                self.guards.open = True  # its members may change where they are
            elif isinstance(value, set):
                self.guards.members(value)
            self.tag("set", *sorted(parts))
        elif isinstance(value, np.dtype):
            self.tag("dtype", value.str, value.name)
        elif isinstance(value, (np.ndarray, np.generic, jax.Array)):
            self._array(value)
        elif isinstance(value, functools.partial):
            self.tag("partial")
            self.visit((value.func, value.args, value.keywords))
        elif isinstance(value, (classmethod, staticmethod)):
            self.tag(type(value).__name__)
            self.visit(value.__func__)
        elif isinstance(value, (property, functools.cached_property)):
            self.tag(type(value).__name__)
            accessors = ("fget", "fset", "fdel") if isinstance(value, property) else ("func",)
            for accessor in accessors:
                self.visit(getattr(value, accessor))
        elif isinstance(value, types.MethodType):
            self.tag("method")
            self.visit((value.__func__, value.__self__))
        elif isinstance(value, enum.Enum):
            self.tag("enum", type(value).__qualname__, value.name)
            self.visit(value.value)
        elif self._of_library(value):
            self.tag("library", type(value).__qualname__, value.__module__, value.__qualname__, id(value))
        elif hasattr(value, "__wrapped__") and self._of_library_type(value) and callable(value):
            # A function inside jax.jit, custom_jvp and the like: the wrapping's own options cannot be read.
            raise NotPlain(repr(type(value)))
        elif dataclasses.is_dataclass(value):
            self._dataclass(value)
        else:
            raise NotPlain(repr(type(value)))

    def _of_library(self, value: Any) -> bool:
        """Builtins, ufuncs, jitted library functions: things with a name in an installed module, found there again."""
        if is_outside(value):
            raise NotPlain(repr(value))
        module, name = getattr(value, "__module__", None), getattr(value, "__qualname__", None)
        if not isinstance(module, str) or not isinstance(name, str):
            return False
        return library_module(module) and callable(value) and not isinstance(value, types.FunctionType)

    def _of_library_type(self, value: Any) -> bool:
        return library_module(type(value).__module__)

    def _mapping(self, value: Mapping[Any, Any]) -> None:
        if not (library_module(type(value).__module__) or type(value) is dict):
            raise NotPlain(repr(type(value)))
        if type(value).__module__.partition(".")[0] not in ("builtins", "collections", "types", "flax"):
            raise NotPlain(repr(type(value)))
        self.tag(type(value).__qualname__, len(value))
        self.guards.whole(getattr(value, "_dict", value))  # Flax's frozen one wraps what it gives anew each time
        for key, item in value.items():
            self.visit(key)
            self.visit(item)

    def _array(self, value: Any) -> None:
        if isinstance(value, jax.core.Tracer):
            raise NotPlain("tracer")
        if jax.dtypes.issubdtype(value.dtype, jax.dtypes.prng_key):
            self.tag("key", value.dtype)
            value = jax.random.key_data(value)
        array = np.asarray(value)
        if array.dtype.hasobject:
            raise NotPlain("object array")
        self.tag("array", type(value).__name__, array.dtype.str, array.dtype.name, array.shape)
        self.tag(getattr(value, "weak_type", False))
        if isinstance(value, np.ndarray):
            self.guards.array(value)
        self.hasher.update(np.ascontiguousarray(array).tobytes())

    def _dataclass(self, value: Any) -> None:
        self.tag("dataclass")
        self.visit(type(value))
        fields = dataclasses.fields(value)
        names = {field.name for field in fields}
        own = getattr(value, "__dict__", {})
        self.guards.whole(own)
        for field in fields:
            if field.name == "parent":  # linen: where the module is bound, None for a model
                continue
            self.tag(field.name)
            if field.name not in own:  # in a slot, or the class's default
                self.guards.attribute(value, field.name)
            self.visit(getattr(value, field.name, dataclasses.MISSING))
        for name, item in own.items():
            if name not in names and not (name.startswith("_") or name in ("scope", "parent", "name")):
                self.tag(name)
                self.visit(item)

    def _class(self, cls: type) -> None:
        if library_module(cls.__module__):
            self.tag("library class", cls.__module__, cls.__qualname__, id(cls))
            return
        self.tag("class", cls.__qualname__)
        self.guards.whole(vars(cls))
        self.guards.attribute(cls, "__bases__")
        self.visit(type(cls))
        for base in cls.__bases__:
            self.visit(base)
        fields = cls.__dict__.get("__dataclass_fields__")
        if fields is not None:
            for field in fields.values():
                if field.name == "parent":  # linen's own, with a sentinel for default
                    continue
                self.tag("field", field.name, field.init, field.kw_only, field._field_type.name)
                self.visit(field.default)
                self.visit(field.default_factory)
        for name, item in vars(cls).items():
            if name in DERIVED or name == "__dataclass_fields__":
                continue
            if fields is not None and is_generated(name, item):
                continue
            if isinstance(item, (types.GetSetDescriptorType, types.MemberDescriptorType)):
                continue
            if name in ("parent", "scope") and self._of_library_type(item):
                continue  # linen's descriptor
            self.tag("attribute", name)
            self.visit(item)

    def _function(self, function: types.FunctionType) -> None:
        library = library_file(function.__code__.co_filename)
        self.guards.function(function)
        if library and is_outside(function):
            raise NotPlain(function.__qualname__)
        if library and function.__closure__ is None and not hasattr(function, "__wrapped__"):
            self.tag("library function", function.__module__, function.__qualname__, id(function.__code__))
            return
        self.tag("function", function.__name__)
        if library:
            self.tag(id(function.__code__))  # a wrapper: what it wraps is in its closure
        else:
            self._code(function.__code__, function.__doc__)
            self._globals(function.__code__, function.__globals__, set())
        self.visit(function.__defaults__)
        self.visit(function.__kwdefaults__)
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=False):
            if name == "__class__":  # the class is visited where the function was reached from
                continue
            try:
                contents = cell.cell_contents
            except ValueError:
                self.tag("empty")
                continue
            self.visit(contents)
        self.guards.whole(vars(function))
        for name, item in vars(function).items():
            if name != "__wrapped__" or not library:
                self.tag(name)
                self.visit(item)

    def _code(self, code: types.CodeType, doc: str | None = None) -> None:
        self.tag(
            "code", code.co_code, code.co_names, arguments_of(code), code.co_freevars, code.co_cellvars, code.co_flags,
            code.co_argcount, code.co_kwonlyargcount, code.co_posonlyargcount, code.co_exceptiontable,
        )  # fmt: skip
        constants = list(code.co_consts)
        if constants and isinstance(constants[0], str) and constants[0] == doc:
            constants[0] = None
        for constant in constants:
            if isinstance(constant, types.CodeType):
                inner = constant.co_consts[0] if constant.co_consts else None
                self._code(constant, inner if isinstance(inner, str) and constant.co_flags & 0x4000000 else None)
            else:
                self.visit(constant)

    def _globals(self, code: types.CodeType, namespace: dict[str, Any], done: set[int]) -> None:
        """Visits what `code` reads from its module: the names it loads, and attributes of the user's own modules."""
        if id(code) in done:
            return
        done.add(id(code))
        for name in imported(code):
            if is_outside_module(name) or not library_module(name):
                raise NotPlain(name)
        for name in global_names(code):
            self.guards.name(namespace, name)
            if name in namespace:
                value = namespace[name]
                self.tag("global", name)
                if isinstance(value, types.ModuleType) and reads_outside(name, value, code):
                    raise NotPlain(name)
                if isinstance(value, types.ModuleType) and not library_module(value.__name__):
                    self._user_module(value, code)
                else:
                    self.visit(value)
            else:
                self.tag("builtin", name, name in namespace)
        for constant in code.co_consts:
            if isinstance(constant, types.CodeType):
                self._globals(constant, namespace, done)

    def _user_module(self, module: types.ModuleType, code: types.CodeType) -> None:
        # Which attributes are read from it is not known exactly: every name in the code that it has is visited.
        self.tag("user module", module.__name__)
        for name in code.co_names:
            self.guards.name(vars(module), name)
            if name in vars(module):
                value = vars(module)[name]
                self.tag(name)
                if isinstance(value, types.ModuleType) and not library_module(value.__name__):
                    if id(value) not in self.seen:
                        self.seen[id(value)] = len(self.seen)
                        self._user_module(value, code)
                else:
                    self.visit(value)
