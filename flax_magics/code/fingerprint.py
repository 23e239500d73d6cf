"""A digest of what a model computes: its classes' code, its fields, and the values of everything that they read.

Equal fingerprints mean that tracing again would give the same program. This is claimed only for plain values: code,
classes, library modules, numbers, text, arrays and containers of these. Anything else (an open file, an iterator, an
object with hidden state) has no fingerprint, and the caller traces again instead of guessing.

What a library defines counts by identity: editing an installed package needs a restart, as everywhere in Python.
Comments, layout, docstrings, annotations and line numbers do not count.

Guards make asking again cheap: they hold every mutable place that the digest was read from (a global, a class's
attributes, a list's items, an array's bytes) with the object found there. While all places hold the same objects the
digest is valid, and no walk is needed. Another object of equal value breaks a guard, which costs only a walk.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import inspect
import types
from collections.abc import Mapping
from operator import is_
from typing import Any

import jax
import msgspec
import numpy as np
from msgspec import Struct

from ..base.digest import is_key, on_host
from ..base.private import contents_of
from .library import is_outside, library_file, library_module
from .walk import ATOMS, MISSING, Kind, kind_of, parts_of, reads_of


class NotPlain(Exception):
    """Raised by the walk at a value whose state cannot be read, such as an iterator: there is no fingerprint."""


def fingerprint(value: object) -> bytes | None:
    """The digest of `value` and of everything that it reaches; None where something of that is not plain."""
    return guarded(value)[0]


def guarded(value: object) -> tuple[bytes | None, Guards]:
    """`fingerprint(value)`, with the guards that tell later whether it is still valid."""
    digest = _Digest()
    try:
        digest.visit(value)
    except (NotPlain, RecursionError):  # deeply nested data: tracing again is slow but right
        return None, Guards(open=True)
    return digest.hasher.digest(), digest.guards


_HAS_DOCSTRING = 0x4000000
"""`co_flags` bit, new in Python 3.13, of code whose first constant is a docstring; never set in older versions."""


@functools.lru_cache(maxsize=4096)
def code_digest(code: types.CodeType, doc: str | None = None) -> bytes:
    """A digest of a code object's instructions and constants, inner functions included.

    Left out are the docstring `doc` and the values of the names that the code reads.
    """
    # Parameter names count, since calls may use them. Renaming another local changes no behavior, so those do not.
    starred = bool(code.co_flags & inspect.CO_VARARGS) + bool(code.co_flags & inspect.CO_VARKEYWORDS)
    arguments = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount + starred]
    digest = _Digest()
    digest.tag(
        code.co_code, code.co_names, arguments, code.co_nlocals, code.co_freevars, code.co_cellvars, code.co_flags,
        code.co_argcount, code.co_kwonlyargcount, code.co_posonlyargcount, code.co_exceptiontable,
    )  # fmt: skip
    for i, constant in enumerate(code.co_consts):
        if isinstance(constant, types.CodeType):
            has_doc = constant.co_flags & _HAS_DOCSTRING
            digest.tag(code_digest(constant, constant.co_consts[0] if has_doc else None))
        else:
            digest.visit(None if i == 0 and isinstance(constant, str) and constant == doc else constant)
    return digest.hasher.digest()


class Fingerprint(Struct):
    """The fingerprint of one value, cached until a guard says that something it was read from has changed."""

    value: Any
    _digest: bytes | None = None
    _guards: Guards = msgspec.field(default_factory=lambda: Guards(open=True))

    def digest(self) -> bytes | None:
        """`fingerprint(value)`."""
        if not self._guards.hold():
            self._digest, self._guards = guarded(self.value)
        return self._digest


OF_LINEN = ("scope", "parent", "name")
"""Attributes that linen sets on a module when it binds it; they say nothing of what the module computes."""


class _Digest:
    """One walk that hashes a value and everything that it holds and reads, each object once, and makes its guards."""

    def __init__(self) -> None:
        self.hasher = hashlib.sha256()
        self.guards = Guards()
        # id → order of first visit. `_kept` keeps the objects alive, so that no id is reused during the walk.
        self._seen: dict[int, int] = {}
        self._kept: list[object] = []

    def tag(self, *words: object) -> None:
        """Hashes values by their repr; they must be of types whose repr tells every two values apart."""
        self.hasher.update(repr(words).encode())

    def visit(self, value: object) -> None:
        """Hashes `value`, then its parts; raises NotPlain for anything whose state cannot be read."""
        if type(value) in ATOMS or value is ... or value is NotImplemented or value is MISSING:
            self.tag(value)
            return
        first = self._seen.get(id(value))
        if first is not None:  # a cycle, or a shared object: sharing itself is hashed, too
            self.tag("again", first)
            return
        self._seen[id(value)] = len(self._seen)
        self._kept.append(value)
        kind = kind_of(value)
        if not self._label(kind, value):
            return
        self.guards.note(kind, value)
        for edge, name, inner in parts_of(value, kind):
            # "owner" is a method's class, which was visited before the method; `parent` is None on an unbound module.
            is_hidden = edge == "attribute" and kind == "object" and (name.startswith("_") or name in OF_LINEN)
            if edge == "owner" or (edge == "field" and name == "parent") or is_hidden:
                continue
            if kind == "mapping":
                self.visit(name)
            elif edge not in ("item", "inner"):
                self.tag(edge, name)
            if edge == "field" and inner is MISSING:  # a slot or a class default, which no guard of `__dict__` covers
                self.guards.attribute(value, name)
                inner = getattr(value, name, MISSING)
            self.visit(inner)

    def _label(self, kind: Kind, value: Any) -> bool:
        """Hashes `value` itself; returns whether its parts count, too. What a library defines is known by its name."""
        match kind:
            case "function":
                return self._function(value)
            case "class":
                if library_module(value.__module__):
                    # The id tells classes apart that a library makes in a function, under one name.
                    self.tag("library class", value.__module__, value.__qualname__, id(value))
                    return False
                self.tag("class", value.__qualname__)
                self.visit(type(value))
                for declared in vars(value).get("__dataclass_fields__", {}).values():
                    if declared.name != "parent":  # linen's own, with a sentinel for default
                        self.tag("field", declared.name, declared.init, declared.kw_only, declared._field_type.name)
                        self.visit(declared.default)
                        self.visit(declared.default_factory)
            case "code":
                self.tag("code", code_digest(value))
            case "module":
                if not library_module(value.__name__) or is_outside(value):
                    raise NotPlain(value.__name__)  # its attributes are visited where they are read
                self.tag("module", value.__name__)
            case "sequence":
                self.tag(type(value).__qualname__, len(value))
                if type(value) not in (tuple, list):
                    self.visit(type(value))
            case "mapping":
                cls = type(value)
                root = cls.__module__.partition(".")[0]
                # Another class's mapping may compute its items, or hold more than them.
                if not library_module(cls.__module__) or root not in ("builtins", "collections", "types", "flax"):
                    raise NotPlain(repr(cls))
                self.tag(cls.__qualname__, len(value))
            case "set":
                prints = [fingerprint(item) for item in value]  # each by itself, since a set has no order to hash in
                if None in prints:
                    raise NotPlain(repr(value))
                self.guards.note("set", value)
                self.guards.open |= any(type(item) not in ATOMS for item in value)  # members may change in place
                self.tag("set", sorted(filter(None, prints)))
                return False
            case "dtype":
                self.tag("dtype", value.str, value.name)
            case "array":
                self._array(value)
            case "enum":
                self.tag("enum", type(value).__qualname__, value.name)
            case "object":
                return self._object(value)
            case _:
                self.tag(kind, "")
        return True

    def _object(self, value: object) -> bool:
        """Hashes an object of another kind: library functions by name, dataclasses by their parts; others raise."""
        if is_outside(value):
            raise NotPlain(repr(value))
        module, name = getattr(value, "__module__", None), getattr(value, "__qualname__", None)
        if isinstance(module, str) and isinstance(name, str) and library_module(module) and callable(value):
            # Builtins, ufuncs, jitted library functions: known by their name in an installed module.
            self.tag("library", type(value).__qualname__, module, name, id(value))
            return False
        # A user's function wrapped by jax.jit, custom_jvp and the like: the wrapper's options are hidden.
        is_wrapping = hasattr(value, "__wrapped__") and library_module(type(value).__module__) and callable(value)
        if is_wrapping or not dataclasses.is_dataclass(value):
            raise NotPlain(repr(type(value)))
        self.tag("dataclass", "")
        return True

    def _array(self, value: Any) -> None:
        """Hashes dtype, shape, weak type and every byte of an array."""
        if isinstance(value, jax.core.Tracer):
            raise NotPlain("tracer")
        if is_key(value):
            self.tag("key", str(value.dtype))
        array = on_host(value)
        if array.dtype.hasobject:
            raise NotPlain("object array")
        # `str` has the byte order; `name` tells bfloat16 and float8 apart, whose `str` is a mere `<V2`.
        self.tag("array", type(value).__name__, array.dtype.str, array.dtype.name, array.shape)
        self.tag("weak", getattr(value, "weak_type", False))
        self.hasher.update(array.tobytes())

    def _function(self, function: types.FunctionType) -> bool:
        """Hashes a function: the user's by its code and what it reads, a library's by its name."""
        code = function.__code__
        if not library_file(code.co_filename):
            self.tag("function", function.__name__, code_digest(code, function.__doc__))
            self._reads(function)
            return True
        if is_outside(function):
            raise NotPlain(function.__qualname__)
        if function.__closure__ is None and not hasattr(function, "__wrapped__"):
            self.guards.function(function)
            self.tag("library function", function.__module__, function.__qualname__, id(code))
            return False
        # A wrapper from a library's decorator: the user's function is in its closure, which the walk visits next.
        self.tag("library wrapper", function.__name__, id(code))
        return True

    def _reads(self, function: types.FunctionType) -> None:
        """Hashes and guards what a function's code reads: globals, and attributes of the user's own modules."""
        for spelled, namespace, name in reads_of(function.__code__, function.__globals__):
            if namespace is None:  # `eval`, `globals()`, the clock: whatever is read cannot be told
                raise NotPlain(spelled)
            self.guards.name(namespace, name)
            if name not in namespace:
                self.tag("builtin", name)
            elif isinstance(value := namespace[name], types.ModuleType):
                self.tag("module", value.__name__)  # what is read from it, if it is the user's, follows
            else:
                self.tag("global", name)
                self.visit(value)


BYTES = 1 << 20
"""Bytes beyond which a NumPy array is not guarded: comparing it would cost as much as hashing it again."""

_ABSENT = object()
_NOTHING: Mapping[str, object] = {}
Contents = Mapping[Any, object]
"""A mapping with keys of any type."""


class Guards(Struct):
    """Mutable places with the objects found in them. `open`: something cannot be guarded, so `hold` is never true."""

    open: bool = False
    _names: list[tuple[Mapping[str, object], str, object]] = []
    _attributes: list[tuple[object, str, object]] = []
    _wholes: list[tuple[Contents, tuple[object, ...], tuple[object, ...]]] = []
    _lists: list[tuple[list[object], tuple[object, ...]]] = []
    _sets: list[tuple[set[object], frozenset[object]]] = []
    _functions: list[tuple[types.FunctionType, object, object, object]] = []
    _cells: list[tuple[types.CellType, object]] = []
    _arrays: list[tuple[np.ndarray[Any, Any], tuple[object, ...]]] = []

    def note(self, kind: Kind, value: Any) -> None:
        """Guards everything of `value` that can change in place; what it holds gets guards of its own in the walk."""
        if kind == "function":
            self.function(value)
            if value.__kwdefaults__:
                self.whole(value.__kwdefaults__)
            self.whole(vars(value))
        elif kind == "class":
            self.whole(vars(value))
            self.attribute(value, "__bases__")
        elif kind == "mapping":
            self.whole(contents_of(value))
        elif kind == "object":
            self.whole(getattr(value, "__dict__", _NOTHING))
        elif isinstance(value, list):
            self.items(value)
        elif isinstance(value, set):  # compared by value: the order in which a set gives its members means nothing
            self._sets.append((value, frozenset(value)))
        elif isinstance(value, np.ndarray):  # JAX arrays are immutable
            if value.nbytes > BYTES:
                self.open = True
            else:
                self._arrays.append((value, (value.shape, value.dtype, value.tobytes())))

    def name(self, namespace: Mapping[str, object], name: str) -> None:
        """Guards a global: the object that `name` is bound to in `namespace`, or that it is unbound."""
        self._names.append((namespace, name, namespace.get(name, _ABSENT)))

    def attribute(self, owner: object, name: str) -> None:
        """Guards an attribute that is not in the owner's `__dict__`, such as a slot or `__bases__`."""
        self._attributes.append((owner, name, getattr(owner, name, _ABSENT)))

    def whole(self, mapping: Contents) -> None:
        """Guards a mapping: all keys and values, in order."""
        self._wholes.append((mapping, tuple(mapping), tuple(mapping.values())))

    def items(self, value: list[object]) -> None:
        """Guards the items of a list."""
        self._lists.append((value, tuple(value)))

    def function(self, function: types.FunctionType) -> None:
        """Guards a function's code, its defaults and the cells of its closure."""
        self._functions.append((function, function.__code__, function.__defaults__, function.__kwdefaults__))
        self._cells += [(cell, _contents(cell)) for cell in function.__closure__ or ()]

    def hold(self) -> bool:
        """Whether every place still holds the very object that was found there. Called before every run."""
        if self.open:
            return False
        # Loops in place of `all` with generators: setting one up costs more than most of these lists take.
        for namespace, name, old in self._names:
            if namespace.get(name, _ABSENT) is not old:
                return False
        for mapping, keys, values in self._wholes:
            if len(mapping) != len(keys) or not all(map(is_, mapping.values(), values)) or tuple(mapping) != keys:
                return False
        for function, code, defaults, kwdefaults in self._functions:
            if function.__code__ is not code or function.__defaults__ is not defaults:
                return False
            if function.__kwdefaults__ is not kwdefaults:
                return False
        for cell, old in self._cells:
            if _contents(cell) is not old:
                return False
        for owner, name, old in self._attributes:
            if getattr(owner, name, _ABSENT) is not old:
                return False
        for items, old_items in self._lists:
            if len(items) != len(old_items) or not all(map(is_, items, old_items)):
                return False
        for members, old_members in self._sets:
            if members != old_members:
                return False
        return not self._arrays or all(
            (array.shape, array.dtype, array.tobytes()) == old for array, old in self._arrays
        )


def _contents(cell: types.CellType) -> object:
    """The value in a closure cell, `_ABSENT` for an empty one."""
    try:
        return cell.cell_contents
    except ValueError:  # a variable that is not assigned yet
        return _ABSENT
