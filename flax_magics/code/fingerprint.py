"""A digest of what a model computes: its classes' code, its fields, and the values of all that they read.

Two equal fingerprints mean that tracing again would give the same program. That is claimed only for what is plain:
code, classes, modules of libraries, numbers, text, arrays and containers of these. Anything else (an open file, an
iterator, an object with state of its own) has no fingerprint, and whoever asked traces again instead of guessing.

What a library defines counts by identity: editing an installed package needs a restart, as everywhere in Python.
Comments, layout, docstrings, annotations and line numbers do not count.

With the digest come guards: the places that it was read from and that can change (a global, a class's attributes, a
list's items, an array's bytes), with what stood there. While they all hold the same objects, the fingerprint is the same,
and asking again costs a look at each place and no walk. Another object of the same value breaks a guard, and only costs
the walk.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import inspect
import types
from collections.abc import Mapping
from dataclasses import dataclass, field
from operator import is_
from typing import Any

import jax
import numpy as np

from ..base.digest import is_key, on_host
from ..base.private import contents_of
from .library import is_outside, library_file, library_module
from .walk import ATOMS, MISSING, Kind, kind_of, parts_of, reads_of


class NotPlain(Exception):
    """Something was reached whose value cannot be told from the outside."""


def fingerprint(value: object) -> bytes | None:
    """The digest of `value` and of everything it reaches, None where something is not plain."""
    return guarded(value)[0]


def guarded(value: object) -> tuple[bytes | None, Guards]:
    """`fingerprint(value)`, and what tells whether it would still be the same."""
    digest = _Digest()
    try:
        digest.visit(value)
    except (NotPlain, RecursionError):
        return None, Guards(open=True)
    return digest.hasher.digest(), digest.guards


_HAS_DOCSTRING = 0x4000000
"""The flag of code whose first constant is a docstring, where this Python has one."""


@functools.lru_cache(maxsize=4096)
def code_digest(code: types.CodeType, doc: str | None = None) -> bytes:
    """A digest of instructions and constants, `doc` left out, those of functions inside it, too; nothing that it reads."""
    # Names of the arguments, which a call can use; other locals have a number and no name that code could read.
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


@dataclass
class Fingerprint:
    """The fingerprint of one value, taken when it is asked for and again when something it was read from has changed."""

    value: Any
    _digest: bytes | None = None
    _guards: Guards = field(default_factory=lambda: Guards(open=True))

    def digest(self) -> bytes | None:
        """`fingerprint(value)`."""
        if not self._guards.hold():
            self._digest, self._guards = guarded(self.value)
        return self._digest


OF_LINEN = ("scope", "parent", "name")
"""Attributes by which linen binds a module."""


class _Digest:
    """Hashes a value and all that it holds and reads, each thing once; keeps the guards of it."""

    def __init__(self) -> None:
        self.hasher = hashlib.sha256()
        self.guards = Guards()
        # id → order of first visit; the objects are kept so that no id is used again during the walk.
        self._seen: dict[int, int] = {}
        self._kept: list[object] = []

    def tag(self, *words: object) -> None:
        """Hashes plain values, which their repr tells from all others."""
        self.hasher.update(repr(words).encode())

    def visit(self, value: object) -> None:
        if type(value) in ATOMS or value is ... or value is NotImplemented or value is MISSING:
            self.tag(value)
            return
        first = self._seen.get(id(value))
        if first is not None:
            self.tag("again", first)
            return
        self._seen[id(value)] = len(self._seen)
        self._kept.append(value)
        kind = kind_of(value)
        if not self._label(kind, value):
            return
        self.guards.note(kind, value)
        for edge, name, inner in parts_of(value, kind):
            # A method's class is visited where the method was reached from; a model's `parent` is None.
            is_hidden = edge == "attribute" and kind == "object" and (name.startswith("_") or name in OF_LINEN)
            if edge == "owner" or (edge == "field" and name == "parent") or is_hidden:
                continue
            if kind == "mapping":
                self.visit(name)
            elif edge not in ("item", "inner"):
                self.tag(edge, name)
            if edge == "field" and inner is MISSING:
                self.guards.attribute(value, name)
                inner = getattr(value, name, MISSING)
            self.visit(inner)

    def _label(self, kind: Kind, value: Any) -> bool:
        """Hashes what `value` itself is. Whether what it holds counts, too: what a library defines is told by its name."""
        match kind:
            case "function":
                return self._function(value)
            case "class":
                if library_module(value.__module__):
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
                if not library_module(cls.__module__) or root not in ("builtins", "collections", "types", "flax"):
                    raise NotPlain(repr(cls))
                self.tag(cls.__qualname__, len(value))
            case "set":
                prints = [fingerprint(item) for item in value]
                if None in prints:
                    raise NotPlain(repr(value))
                self.guards.note("set", value)
                self.guards.open |= any(type(item) not in ATOMS for item in value)  # they may change where they are
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
        if is_outside(value):
            raise NotPlain(repr(value))
        module, name = getattr(value, "__module__", None), getattr(value, "__qualname__", None)
        if isinstance(module, str) and isinstance(name, str) and library_module(module) and callable(value):
            # Builtins, ufuncs, jitted library functions: they have a name in an installed module, and are found there again.
            self.tag("library", type(value).__qualname__, module, name, id(value))
            return False
        # A function inside jax.jit, custom_jvp and the like: the wrapping's own options cannot be read.
        is_wrapping = hasattr(value, "__wrapped__") and library_module(type(value).__module__) and callable(value)
        if is_wrapping or not dataclasses.is_dataclass(value):
            raise NotPlain(repr(type(value)))
        self.tag("dataclass", "")
        return True

    def _array(self, value: Any) -> None:
        if isinstance(value, jax.core.Tracer):
            raise NotPlain("tracer")
        if is_key(value):
            self.tag("key", str(value.dtype))
        array = on_host(value)
        if array.dtype.hasobject:
            raise NotPlain("object array")
        self.tag("array", type(value).__name__, array.dtype.str, array.dtype.name, array.shape)
        self.tag("weak", getattr(value, "weak_type", False))
        self.hasher.update(array.tobytes())

    def _function(self, function: types.FunctionType) -> bool:
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
        self.tag("library wrapper", function.__name__, id(code))  # what it wraps is in its closure
        return True

    def _reads(self, function: types.FunctionType) -> None:
        """What its code reads from its module: the names it loads, and attributes of the user's own modules."""
        for spelled, namespace, name in reads_of(function.__code__, function.__globals__):
            if namespace is None:
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
"""Arrays of NumPy beyond this size are not guarded: comparing costs as much as reading them."""

_ABSENT = object()
_NOTHING: Mapping[str, object] = {}
Contents = Mapping[Any, object]
"""A mapping by whatever keys."""


@dataclass
class Guards:
    """Places and what stood in them. `open` tells that something was met which cannot be guarded."""

    open: bool = False
    _names: list[tuple[Mapping[str, object], str, object]] = field(default_factory=list)
    _attributes: list[tuple[object, str, object]] = field(default_factory=list)
    _wholes: list[tuple[Contents, tuple[object, ...], tuple[object, ...]]] = field(default_factory=list)
    _lists: list[tuple[list[object], tuple[object, ...]]] = field(default_factory=list)
    _sets: list[tuple[set[object], frozenset[object]]] = field(default_factory=list)
    _functions: list[tuple[types.FunctionType, object, object, object]] = field(default_factory=list)
    _cells: list[tuple[types.CellType, object]] = field(default_factory=list)
    _arrays: list[tuple[np.ndarray[Any, Any], tuple[object, ...]]] = field(default_factory=list)

    def note(self, kind: Kind, value: Any) -> None:
        """All that may change of a thing and of what it holds, as far as this is not a thing of its own."""
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
        elif isinstance(value, set):  # its members have to be compared by value
            self._sets.append((value, frozenset(value)))
        elif isinstance(value, np.ndarray):
            if value.nbytes > BYTES:
                self.open = True
            else:
                self._arrays.append((value, (value.shape, value.dtype, value.tobytes())))

    def name(self, namespace: Mapping[str, object], name: str) -> None:
        """What `name` is bound to, or that it is not."""
        self._names.append((namespace, name, namespace.get(name, _ABSENT)))

    def attribute(self, owner: object, name: str) -> None:
        """An attribute of an object that keeps it elsewhere than in a dict."""
        self._attributes.append((owner, name, getattr(owner, name, _ABSENT)))

    def whole(self, mapping: Contents) -> None:
        """All keys and values, in order."""
        self._wholes.append((mapping, tuple(mapping), tuple(mapping.values())))

    def items(self, value: list[object]) -> None:
        """The items of a list."""
        self._lists.append((value, tuple(value)))

    def function(self, function: types.FunctionType) -> None:
        """Code, defaults, and what its closure holds."""
        self._functions.append((function, function.__code__, function.__defaults__, function.__kwdefaults__))
        self._cells += [(cell, _contents(cell)) for cell in function.__closure__ or ()]

    def hold(self) -> bool:
        """Whether everything stands where it stood."""
        if self.open:
            return False
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
        # Loops, as a run asks this each time: a generator costs more than what most of these hold.
        for owner, name, old in self._attributes:
            if getattr(owner, name, _ABSENT) is not old:
                return False
        for items, old_items in self._lists:
            if len(items) != len(old_items) or not all(map(is_, items, old_items)):
                return False
        for members, old_members in self._sets:
            if members != old_members:
                return False
        return all((array.shape, array.dtype, array.tobytes()) == old for array, old in self._arrays)


def _contents(cell: types.CellType) -> object:
    try:
        return cell.cell_contents
    except ValueError:
        return _ABSENT
