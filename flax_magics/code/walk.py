"""The common walk over the user's code and values: the kind of an object, its parts, and what its code reads.

Three visitors share it: the digest of what a model computes (`fingerprint`), its pieces by name (`inventory`), and the
arrays that it keeps alive (`arrays_in`). Each decides for itself which parts count.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import inspect
import types
from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple
from weakref import WeakKeyDictionary

import jax
import numpy as np

from .library import OUTSIDE, is_outside, library_file, library_module, loads_of, reads_outside

ATOMS = frozenset({bool, int, float, complex, str, bytes, type(None)})
"""Types of immutable values without parts."""
MISSING = dataclasses.MISSING
"""Placeholder for a dataclass field that is not in the object's `__dict__`: it is in a slot or a class default."""

# fmt: off
Kind = Literal[
    "function", "class", "code", "module", "sequence", "mapping", "set", "dtype", "array", "partial", "wrapper",
    "property", "cached property", "method", "enum", "object",
]
Edge = Literal["type", "base", "field", "attribute", "item", "default", "closure", "owner", "inner"]
# fmt: on
Part = tuple[Edge, Any, Any]
"""(how the part is held, its name, key or index there, the part itself)."""

# The first match decides.
_KINDS: tuple[tuple[Kind, Any], ...] = (
    ("function", types.FunctionType),
    ("class", type),
    ("code", types.CodeType),
    ("module", types.ModuleType),
    ("sequence", (tuple, list)),
    ("mapping", Mapping),
    ("set", (set, frozenset)),
    ("dtype", np.dtype),
    ("array", (np.ndarray, np.generic, jax.Array)),
    ("partial", functools.partial),
    ("wrapper", (classmethod, staticmethod)),
    ("property", property),
    ("cached property", functools.cached_property),
    ("method", types.MethodType),
    ("enum", enum.Enum),
)
_OBJECT: Kind = "object"
_INNER: Mapping[str, tuple[str, ...]] = {
    "partial": ("func", "args", "keywords"),
    "wrapper": ("__func__",),
    "property": ("fget", "fset", "fdel"),
    "cached property": ("func",),
    "method": ("__func__", "__self__"),
    "enum": ("value",),
}
# Weak keys: a class of an earlier cell execution must not be kept alive by this cache.
_kind_of_type: WeakKeyDictionary[type, Kind] = WeakKeyDictionary()


def kind_of(value: object) -> Kind:
    """The kind of `value`, cached by its type; `object` for an instance of any other class."""
    cls = type(value)
    kind = _kind_of_type.get(cls)
    if kind is None:
        kind = _kind_of_type[cls] = next((kind for kind, classes in _KINDS if isinstance(value, classes)), _OBJECT)
    return kind


def parts_of(value: Any, kind: Kind) -> Iterator[Part]:
    """The parts that `value` holds directly; callers walk on from these."""
    if kind == "sequence" or kind == "set":
        for index, item in enumerate(value):
            yield "item", index, item
    elif kind == "mapping":
        for key, item in value.items():
            yield "item", key, item
    elif kind == "function":
        yield from _parts_of_function(value)
    elif kind == "class":
        yield from _parts_of_class(value)
    elif kind == "object":
        yield "type", "", type(value)
        held = getattr(value, "__dict__", None)
        held = held if isinstance(held, dict) else {}
        fields = [field.name for field in dataclasses.fields(value)] if dataclasses.is_dataclass(value) else []
        for name in fields:
            yield "field", name, held.get(name, MISSING)
        for name, item in list(held.items()):  # a copy: the dict may change while the caller looks at the parts
            if name not in fields:
                yield "attribute", name, item
    else:
        for name in _INNER.get(kind, ()):
            yield "inner", name, getattr(value, name)


def _parts_of_function(function: types.FunctionType) -> Iterator[Part]:
    """A function's defaults by parameter, closed-over values by variable, and attributes.

    The class that `super()` needs is closed over as `__class__`; its edge is `owner`.
    """
    code, defaults = function.__code__, function.__defaults__ or ()
    # `__defaults__` may be set by hand to more values than there are parameters; the surplus gets empty names.
    names = ("",) * len(defaults) + code.co_varnames[: code.co_argcount]
    for name, default in zip(names[len(names) - len(defaults) :], defaults, strict=True):
        yield "default", name, default
    for name, default in (function.__kwdefaults__ or {}).items():
        yield "default", name, default
    for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=False):
        try:
            contents = cell.cell_contents
        except ValueError:  # an empty cell: the variable is not assigned yet
            continue
        yield "owner" if name == "__class__" else "closure", name, contents
    for name, item in vars(function).items():
        # What a library's wrapper wraps is in its closure as well.
        if name != "__wrapped__" or not library_file(code.co_filename):
            yield "attribute", name, item


# Class attributes that Python, dataclasses or Flax derive from the rest of the class.
_DERIVED = frozenset(
    [
        *("__dict__", "__weakref__", "__doc__", "__module__", "__qualname__", "__firstlineno__", "__slots__"),
        *("__annotations__", "__annotate__", "__annotate_func__", "__annotations_cache__", "__static_attributes__"),
        *("__dataclass_fields__", "__dataclass_params__", "_kw_only_dataclass_fields", "__match_args__"),
        *("__abstractmethods__", "_abc_impl", "__type_params__", "__orig_bases__", "__parameters__"),
        *("__hash__", "__eq__", "__repr__", "__replace__", "_state", "_parent_ref"),
    ]
)

# Methods that `dataclass` generates. Their filename is `<string>`, but so is that of a user's code run by `exec`, which
# is why the names are checked as well.
_WRITTEN = frozenset(
    ["__init__", "__repr__", "__eq__", "__hash__", "__lt__", "__le__", "__gt__", "__ge__", "__setattr__", "__delattr__"]
)


def _parts_of_class(cls: type) -> Iterator[Part]:
    """A class's bases and the attributes that it defines, without those that Python or Flax derive from them."""
    for base in cls.__bases__:
        yield "base", base.__name__, base
    is_dataclass = "__dataclass_fields__" in vars(cls)
    for name, item in list(vars(cls).items()):
        if name in _DERIVED or isinstance(item, (types.GetSetDescriptorType, types.MemberDescriptorType)):
            continue
        if is_dataclass and name in _WRITTEN:
            method = inspect.unwrap(item)  # Flax wraps the generated methods
            if isinstance(method, types.FunctionType) and method.__code__.co_filename == "<string>":
                continue
        if name in ("parent", "scope") and library_module(type(item).__module__):
            continue  # linen's descriptor, not a default of the user's
        yield "attribute", name, item


class Read(NamedTuple):
    """One name that code reads from one of the user's modules.

    Attributes:
      spelled: the name as a person would write it; where what is read cannot be told, the cause, such as `eval`.
      namespace: the module's dict in which it is looked up; None where what is read cannot be told.
      name: the key in `namespace`.
    """

    spelled: str
    namespace: Mapping[str, object] | None = None
    name: str = ""


# Builtins that read names given as strings, or outside state: code that uses one cannot be followed.
_REFLECTION = frozenset({"globals", "locals", "vars", "eval", "exec", "open", "next", "iter", "input", "__import__"})


def reads_of(code: types.CodeType, namespace: Mapping[str, object]) -> Iterator[Read]:
    """What `code` and its inner functions read from their module, and from other user modules imported there."""
    loads = loads_of(code)
    for name in loads.imports:
        if name in OUTSIDE or not library_module(name):  # which attributes of it are read is not followed
            yield Read(name)
    if not _REFLECTION.isdisjoint(loads.names):
        yield Read(", ".join(_REFLECTION.intersection(loads.names)))
        return
    module = namespace.get("__name__")
    for name in loads.names:
        yield Read(name if module == "__main__" else f"{module}.{name}", namespace, name)
        value = namespace.get(name)
        if isinstance(value, types.ModuleType):
            if reads_outside(name, value, code):
                yield Read(name)
            if not library_module(value.__name__):
                yield from _reads_of_module(name, value, code, {id(value)})
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from reads_of(constant, namespace)


def _reads_of_module(spelled: str, module: types.ModuleType, code: types.CodeType, seen: set[int]) -> Iterator[Read]:
    """`reads_of` for the attributes of a user module `module` that `code` loads under the name `spelled`."""
    # Which attributes are read from which object cannot be told from `co_names`: every name in the code counts.
    for name in code.co_names:
        yield Read(f"{spelled}.{name}", vars(module), name)
        value = vars(module).get(name)
        if isinstance(value, types.ModuleType):
            if is_outside(value):
                yield Read(name)
            elif not library_module(value.__name__) and id(value) not in seen:
                seen.add(id(value))
                yield from _reads_of_module(f"{spelled}.{name}", value, code, seen)


MOST = 10_000
"""The most objects that `arrays_in` visits; arrays beyond them are not counted."""


def arrays_in(value: object) -> list[jax.Array | np.ndarray[Any, Any]]:
    """Every array that a module or class keeps alive through fields, defaults and closures.

    Globals that its code reads do not count: the user's namespace holds them anyway.
    """
    arrays: list[jax.Array | np.ndarray[Any, Any]] = []
    seen: set[int] = set()
    waiting: list[Any] = [value]
    while waiting and len(seen) < MOST:
        thing = waiting.pop()
        if type(thing) in ATOMS or id(thing) in seen:
            continue
        seen.add(id(thing))
        kind = kind_of(thing)
        if isinstance(thing, (jax.Array, np.ndarray)):
            arrays.append(thing)
        elif kind == "function" and library_file(thing.__code__.co_filename) and not hasattr(thing, "__wrapped__"):
            continue
        elif kind != "class" or not library_module(thing.__module__):
            waiting += [part for _, _, part in parts_of(thing, kind)]
    return arrays
