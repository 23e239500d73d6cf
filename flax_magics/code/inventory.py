"""What a model is made of, by name: its fields, the code of its classes, and what that code reads.

Two inventories tell what changed between them (`features: 3 → 5`, `helper() was redefined`). They are an account for a
person, taken when a program is compiled and at no other time; whether a program may be used again is `fingerprint`'s to
say. So an inventory may leave things out, and it never raises.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import functools
import hashlib
import sys
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import jax
import numpy as np

from . import library
from .fingerprint import code_print
from .library import nnx_modules

MOST = 2000
"""Pieces in an inventory; a model of more is described by these."""
LONGEST = 64
"""Items of one container that are named; a longer one counts as a whole."""

# Class attributes that Python and Flax add.
_MADE = ("_abc", "__dataclass", "_pytree__", "_compact_name_scope")
_FLAX = ("parent", "scope", "name")

Kind = Literal["value", "function", "method", "class"]


@dataclass(frozen=True)
class CodePiece:
    """One thing that a model is made of: what kind, how a person would write it, and what tells it from another."""

    kind: Kind
    text: str
    print: bytes


Inventory = Mapping[str, CodePiece]
"""Name → piece. Names are those that a person uses: `features`, `config.width`, `WIDTH`, `Net.__call__`, `helper`."""


def inventory(module: Any) -> Inventory:
    """The pieces of a module of either API."""
    walk = _Inventory()
    # An account for a person: an odd object must not fail the run, and what was found before it still tells something.
    with contextlib.suppress(Exception):
        walk.instance("", module)
    return walk.pieces


def changes(old: Inventory, new: Inventory) -> list[str]:
    """What differs, the most telling first: values, then code, then what only one of the two has."""
    values, code, others = [], [], []
    for name, piece in new.items():
        before = old.get(name)
        if before is None:
            others.append(f"{_spell(name, piece)}: not there before")
        elif before.print == piece.print:
            continue
        elif piece.kind != before.kind:
            code.append(f"{_spell(name, before)} became {_spell(name, piece)}")
        elif piece.kind == "function":
            code.append(f"{name}() was redefined")
        elif piece.kind == "method":
            code.append(f"{name} was edited")
        elif piece.kind == "class":
            code.insert(0, f"{name or 'the model'}: {before.text} → {piece.text}")
        elif before.text == piece.text:
            values.append(f"{name}: other values")
        else:
            values.append(f"{name}: {before.text} → {piece.text}")
    others += [f"{_spell(name, piece)}: there before" for name, piece in old.items() if name not in new]
    return [*values, *code] or others


def _spell(name: str, piece: CodePiece) -> str:
    return f"{name}()" if piece.kind == "function" else name


def _short(text: str, limit: int = 40) -> str:
    text = " ".join(text.split())
    return text if len(text) <= limit else text[: limit - 1] + "…"


class _Inventory:
    """Collects pieces; an object is visited once, under the first name that it is met by."""

    def __init__(self) -> None:
        self.pieces: dict[str, CodePiece] = {}
        self._seen: dict[int, Any] = {}

    def add(self, name: str, kind: Kind, text: str, data: bytes | None = None) -> None:
        if len(self.pieces) < MOST:
            self.pieces.setdefault(name, CodePiece(kind, _short(text), data if data is not None else text.encode()))

    def visit(self, name: str, value: Any) -> None:
        """`value`, which a person knows as `name`."""
        if value is None or type(value) in (bool, int, float, complex, str, bytes) or isinstance(value, enum.Enum):
            self.add(name, "value", repr(value))
            return
        if id(value) in self._seen or len(self.pieces) >= MOST:
            return
        self._seen[id(value)] = value
        if isinstance(value, types.FunctionType):
            self.function(name, value)
        elif isinstance(value, type):
            self.cls(value)
        elif isinstance(value, (np.ndarray, np.generic, jax.Array)):
            self.array(name, value)
        elif isinstance(value, np.dtype):
            self.add(name, "value", value.name)
        elif isinstance(value, Mapping):
            self.items(name, ((f"{name}[{key!r}]", item) for key, item in value.items()), len(value))
        elif isinstance(value, (tuple, list)):
            self.items(name, ((f"{name}[{i}]", item) for i, item in enumerate(value)), len(value))
        elif isinstance(value, (set, frozenset)):
            self.add(name, "value", "{" + ", ".join(sorted(map(repr, value))) + "}")
        elif isinstance(value, functools.partial):
            self.visit(f"{name}.func", value.func)
            self.visit(f"{name}.args", value.args)
            self.visit(f"{name}.keywords", value.keywords)
        elif isinstance(value, types.MethodType):
            self.visit(name, value.__func__)
            self.visit(name.rpartition(".")[0] or name, value.__self__)
        elif isinstance(value, (classmethod, staticmethod)):
            self.visit(name, value.__func__)
        elif isinstance(value, (property, functools.cached_property)):
            self.visit(name, value.fget if isinstance(value, property) else value.func)
        elif isinstance(value, types.ModuleType):
            self.add(name, "value", value.__name__)
        elif isinstance(value, jax.sharding.Sharding):
            self.add(name, "value", str(value))
        else:
            self.instance(name, value)

    def items(self, name: str, pairs: Iterator[tuple[str, Any]], size: int) -> None:
        self.add(name, "value", f"{size} item{'' if size == 1 else 's'}")
        if size <= LONGEST:
            for inner, item in pairs:
                self.visit(inner, item)

    def array(self, name: str, value: Any) -> None:
        if isinstance(value, jax.core.Tracer):
            return
        text = f"{value.dtype}[{','.join(map(str, value.shape))}]"
        if value.size == 1 and np.asarray(value).dtype.kind in "biufc":
            text = f"{text} {np.asarray(value).item()!r}" if value.shape else f"{value.dtype} {value!s}"
        if jax.dtypes.issubdtype(value.dtype, jax.dtypes.prng_key):
            value = jax.random.key_data(value)
        self.add(name, "value", text, hashlib.sha256(np.ascontiguousarray(value).tobytes() + text.encode()).digest())

    def instance(self, name: str, value: Any) -> None:
        """A module, a config, or any other object: its class, and what it holds."""
        cls = type(value)
        named = getattr(value, "__qualname__", None)
        if isinstance(named, str) and callable(value):  # a jitted function, a ufunc, a builtin
            wrapped = getattr(value, "__wrapped__", None)
            if isinstance(wrapped, types.FunctionType) and not library.library_file(wrapped.__code__.co_filename):
                self.visit(name, wrapped)
            else:
                self.add(name, "value", named)
            return
        if _is_variable(value):
            return
        self.add(name, "class", cls.__qualname__)
        self.cls(cls)
        for attribute, item in _attributes(value):
            self.visit(f"{name}.{attribute}" if name else attribute, item)

    def cls(self, cls: type) -> None:
        """A class of the user's: what it and its bases define. A library's is known by name."""
        if library.library_module(cls.__module__):
            return
        self._seen[id(cls)] = cls
        for base in cls.__bases__:
            if id(base) not in self._seen:
                self.cls(base)
        fields = getattr(cls, "__dataclass_fields__", {})
        for name, item in vars(cls).items():
            if name in library.DERIVED or name in fields or name in _FLAX or name.startswith(_MADE):
                continue
            if isinstance(item, (types.GetSetDescriptorType, types.MemberDescriptorType)):
                continue
            item = getattr(item, "__func__", item)  # of a class or static method
            if isinstance(item, types.FunctionType) and id(item) not in self._seen:
                self._seen[id(item)] = item
                self.function(f"{cls.__name__}.{name}", item, method=True)
            else:
                self.visit(f"{cls.__name__}.{name}", item)

    def function(self, name: str, function: types.FunctionType, *, method: bool = False) -> None:
        """Its own code, its defaults, and what it reads: globals and what it closes over."""
        inner = function
        while isinstance(getattr(inner, "__wrapped__", None), types.FunctionType):
            inner = inner.__wrapped__  # type: ignore[attr-defined]
        code = inner.__code__
        if library.library_file(code.co_filename) or code.co_filename == "<string>":
            if "." not in name:
                self.add(name, "value", inner.__name__)
            return
        if not method and inner.__name__ not in ("<lambda>", name.rpartition(".")[2]):
            # A field or a global that holds a function: which one counts, as well as how that is written.
            self.add(name, "value", inner.__name__)
            name = inner.__name__
        self.add(name, "method" if method else "function", inner.__name__, code_print(inner))
        parameters = code.co_varnames[: code.co_argcount][-len(inner.__defaults__ or ()) :]
        for parameter, default in zip(parameters, inner.__defaults__ or (), strict=False):
            self.visit(f"{parameter} of {name}", default)
        for parameter, default in (inner.__kwdefaults__ or {}).items():
            self.visit(f"{parameter} of {name}", default)
        for variable, cell in zip(code.co_freevars, inner.__closure__ or (), strict=False):
            if variable != "__class__":
                try:
                    self.visit(variable, cell.cell_contents)
                except ValueError:  # empty
                    continue
        self._read(code, inner.__globals__)

    def _read(self, code: types.CodeType, namespace: Mapping[str, Any]) -> None:
        """Globals that `code` and the functions inside it load; of the user's own modules the attributes it names."""
        own = namespace.get("__name__")
        try:
            names = library.global_names(code)
        except library.NotPlain:  # it may read anything
            return
        for name in names:
            value = namespace.get(name)
            if isinstance(value, types.ModuleType):
                if not library.library_module(value.__name__):
                    for attribute in code.co_names:
                        if attribute in vars(value):
                            self.visit(f"{name}.{attribute}", vars(value)[attribute])
            elif name in namespace:
                self.visit(name if own == "__main__" else f"{own}.{name}", value)
        for constant in code.co_consts:
            if isinstance(constant, types.CodeType):
                self._read(constant, namespace)


def _is_variable(value: Any) -> bool:
    """Variables and random streams of NNX: not what the model is made of, but what it is run with."""
    nnx = sys.modules.get("flax.nnx")  # without it nothing can be one
    return nnx is not None and isinstance(value, (nnx.Variable, nnx.RngStream, nnx.Rngs))


def _attributes(value: Any) -> Iterator[tuple[str, Any]]:
    """What an object holds, without what Flax keeps on it and without variables, which have places of their own."""
    from flax import linen

    fields = [field.name for field in dataclasses.fields(value)] if dataclasses.is_dataclass(value) else []
    own = getattr(value, "__dict__", {})
    hidden = _FLAX if isinstance(value, linen.Module) else ()
    # What a library's NNX layer keeps follows from its variables' shapes and from how its owner built it.
    follows = isinstance(value, nnx_modules()) and library.library_module(type(value).__module__)
    for name in dict.fromkeys([*fields, *own]):
        if name in hidden or name.startswith("_") or not hasattr(value, name):
            continue
        item = getattr(value, name)
        if not follows or isinstance(item, (*nnx_modules(), list, tuple, dict)) or callable(item):
            yield name, item
