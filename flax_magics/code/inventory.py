"""Inventories of models for people: fields, code and what the code reads, by name. And the source of a model's classes.

Two inventories are compared to say what changed (`features: 3 → 5`, `helper() was redefined`). They are only made when
a program is compiled, for the sentence that says why. Whether a program may be reused is decided by `fingerprint`
alone, so an inventory may leave things out, and it never raises.
"""

from __future__ import annotations

import ast
import contextlib
import enum
import hashlib
import inspect
import linecache
import re
import sys
import types
import warnings
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import jax
import numpy as np
from msgspec import Struct

from ..base.digest import describe, on_host
from .fingerprint import OF_LINEN, NotPlain, code_digest
from .library import is_module, is_module_class, library_file, library_module, nnx_modules
from .walk import ATOMS, MISSING, kind_of, parts_of, reads_of

MOST = 2000
"""The most pieces in an inventory; further ones are left out."""
LONGEST = 64
"""The most items of a container that are listed one by one; of a longer one only the length counts."""

# Prefixes of class attributes that Python and Flax add.
_MADE = ("_abc", "__dataclass", "_pytree__", "_compact_name_scope")

PieceKind = Literal["value", "function", "method", "class", "layer"]
"""`layer`: a plain attribute of a library's NNX layer, which follows from what its owner built it with, or was set."""


class CodePiece(Struct, frozen=True):
    """One piece of a model: its kind, its text for people, and bytes (`print`) that differ where the piece does."""

    kind: PieceKind
    text: str
    print: bytes


Inventory = Mapping[str, CodePiece]
"""Name → piece, under names that a person uses: `features`, `config.width`, `WIDTH`, `Net.__call__`, `helper`."""


def inventory(module: object) -> Inventory:
    """The pieces of a linen or NNX module. Never raises."""
    walk = _Inventory()
    # An odd object must not fail the run; the pieces found before it are still useful.
    with contextlib.suppress(Exception):
        walk.instance("", module)
    return walk.pieces


def values(named: Iterable[tuple[str, object]]) -> Inventory:
    """The pieces of values, each of which a person knows by a name."""
    walk = _Inventory()
    for name, value in named:
        with contextlib.suppress(Exception):
            walk.visit(name, value)
    return walk.pieces


def changes(old: Inventory, new: Inventory) -> list[str]:
    """The differences as phrases, the most telling first: values, then code.

    Pieces that only one inventory has are told only where nothing else differs: they mostly follow from another change.
    So do attributes of a library's layers, which come last.
    """
    values, code, others, layers = list[str](), list[str](), list[str](), list[str]()
    for name, piece in new.items():
        old_piece = old.get(name)
        if old_piece is None:
            others += [f"{_spell(name, piece)}: not there before"] * (piece.kind != "layer")
        elif old_piece.print == piece.print:
            continue
        elif piece.kind != old_piece.kind:
            code.append(f"{_spell(name, old_piece)} became {_spell(name, piece)}")
        elif piece.kind == "function":
            code.append(f"{name}() was redefined")
        elif piece.kind == "method":
            code.append(f"{name} was edited")
        elif piece.kind == "class":
            code.insert(0, f"{name or 'the model'}: {old_piece.text} → {piece.text}")
        elif old_piece.text == piece.text:
            values.append(f"{name}: other values")
        else:
            (layers if piece.kind == "layer" else values).append(f"{name}: {old_piece.text} → {piece.text}")
    gone = {name: piece for name, piece in old.items() if name not in new and piece.kind != "layer"}
    others += [f"{_spell(name, piece)}: there before" for name, piece in gone.items()]
    return [*values, *code] or others or layers


def _spell(name: str, piece: CodePiece) -> str:
    return f"{name}()" if piece.kind == "function" else name


def shorten(text: str, limit: int = 40) -> str:
    """`text` in one line, cut to `limit` characters with `…`."""
    text = " ".join(text.split())
    return text if len(text) <= limit else text[: limit - 1] + "…"


class _Inventory:
    """Collects the pieces of a model; an object is visited once, under the first name by which it is reached."""

    def __init__(self) -> None:
        self.pieces: dict[str, CodePiece] = {}
        self._seen: dict[int, object] = {}

    def add(self, name: str, kind: PieceKind, text: str, data: bytes | None = None) -> None:
        if len(self.pieces) < MOST:
            self.pieces.setdefault(name, CodePiece(kind, shorten(text), text.encode() if data is None else data))

    def visit(self, name: str, value: Any) -> None:
        """Adds `value`, and what it holds, under `name`."""
        if type(value) in ATOMS or isinstance(value, enum.Enum):
            self.add(name, "value", repr(value))
            return
        if id(value) in self._seen or len(self.pieces) >= MOST:
            return
        self._seen[id(value)] = value  # kept alive: a temporary object's id could be reused
        kind = kind_of(value)
        match kind:
            case "function":
                self.function(name, value)
            case "class":
                self.cls(value)
            case "array":
                self.array(name, value)
            case "dtype":
                self.add(name, "value", value.name)
            case "module":
                self.add(name, "value", value.__name__)
            case "set":
                self.add(name, "value", "{" + ", ".join(sorted(map(repr, value))) + "}")
            case "mapping" | "sequence":
                self.add(name, "value", f"{len(value)} item{'' if len(value) == 1 else 's'}")
                if len(value) <= LONGEST:
                    for _, key, item in parts_of(value, kind):
                        self.visit(f"{name}[{key!r}]", item)
            case "partial":
                for _, attribute, item in parts_of(value, kind):
                    self.visit(f"{name}.{attribute}", item)
            case "method":
                self.visit(name, value.__func__)
                self.visit(name.rpartition(".")[0] or name, value.__self__)
            case "wrapper" | "property" | "cached property":
                self.visit(name, next(parts_of(value, kind))[2])
            case _ if isinstance(value, jax.sharding.Sharding):
                self.add(name, "value", str(value))
            case _:
                self.instance(name, value)

    def array(self, name: str, value: Any) -> None:
        if isinstance(value, jax.core.Tracer):
            return
        text = describe(value)
        if value.size == 1 and np.asarray(value).dtype.kind in "biufc":
            text = f"{text} {np.asarray(value).item()!r}" if value.shape else f"{value.dtype} {value!s}"
        self.add(name, "value", text, hashlib.sha256(on_host(value).tobytes() + text.encode()).digest())

    def instance(self, name: str, value: Any) -> None:
        """Adds a module, a config or any other object: its class, its fields and its attributes."""
        from flax import linen

        qualified = getattr(value, "__qualname__", None)
        if isinstance(qualified, str) and callable(value):  # a jitted function, a ufunc, a builtin
            wrapped = getattr(value, "__wrapped__", None)
            if isinstance(wrapped, types.FunctionType) and not library_file(wrapped.__code__.co_filename):
                self.visit(name, wrapped)
            else:
                self.add(name, "value", qualified)
            return
        nnx = sys.modules.get("flax.nnx")  # not imported here: without it no value can be of these types
        if nnx is not None and isinstance(value, (nnx.Variable, nnx.RngStream, nnx.Rngs)):
            return  # state that the model runs with, not part of its definition
        cls = type(value)
        self.add(name, "class", cls.__qualname__)
        self.cls(cls)
        hidden = OF_LINEN if isinstance(value, linen.Module) else ()
        # Of a library's NNX layer (nnx.Linear) only submodules and functions: its numbers follow from how it was built,
        # and the change is named where the user's class builds it.
        follows = isinstance(value, nnx_modules()) and library_module(cls.__module__)
        for edge, attribute, item in parts_of(value, "object"):
            if edge == "type" or attribute in hidden or attribute.startswith("_"):
                continue
            if item is MISSING and not hasattr(value, attribute):
                continue
            item = getattr(value, attribute) if item is MISSING else item
            spelled = f"{name}[{attribute}]" if attribute.isdigit() else f"{name}.{attribute}" if name else attribute
            if not follows or isinstance(item, (*nnx_modules(), list, tuple, dict)) or callable(item):
                self.visit(spelled, item)
            elif type(item) in ATOMS:
                self.add(spelled, "layer", repr(item))
        if not is_module(value) and callable(getattr(value, "items", None)):  # a config that keeps its fields inside
            for field, item in value.items():
                self.visit(f"{name}.{field}", item)

    def cls(self, cls: type) -> None:
        """Adds what a user's class and its bases define; a library's class has no pieces."""
        if library_module(cls.__module__):
            return
        self._seen[id(cls)] = cls
        fields = getattr(cls, "__dataclass_fields__", {})
        for edge, name, item in parts_of(cls, "class"):
            if edge == "base":
                if id(item) not in self._seen:
                    self.cls(item)
                continue
            if name in fields or name in OF_LINEN or name.startswith(_MADE):
                continue
            item = getattr(item, "__func__", item)  # of a class or static method
            if isinstance(item, types.FunctionType) and id(item) not in self._seen:
                self._seen[id(item)] = item
                self.function(f"{cls.__name__}.{name}", item, method=True)
            else:
                self.visit(f"{cls.__name__}.{name}", item)

    def function(self, name: str, function: types.FunctionType, *, method: bool = False) -> None:
        """Adds a function: its code, its defaults, the globals that it reads and the variables that it closes over."""
        inner = function
        while isinstance(getattr(inner, "__wrapped__", None), types.FunctionType):
            inner = inner.__wrapped__  # type: ignore[attr-defined]
        code = inner.__code__
        if library_file(code.co_filename) or code.co_filename == "<string>":
            if "." not in name:
                self.add(name, "value", inner.__name__)
            return
        if not method and inner.__name__ not in ("<lambda>", name.rpartition(".")[2]):
            # A field or global that holds a function (`act = nn.relu`): which function it is, and that function's code.
            self.add(name, "value", inner.__name__)
            name = inner.__name__
        digest = b""
        with contextlib.suppress(NotPlain):  # such code compares equal: `compare` then says that the model changed
            digest = code_digest(code, inner.__doc__)
        self.add(name, "method" if method else "function", inner.__name__, digest)
        for edge, variable, item in parts_of(inner, "function"):
            if edge == "default":
                self.visit(f"{variable} of {name}", item)
            elif edge == "closure":
                self.visit(variable, item)
        for spelled, namespace, read in reads_of(code, inner.__globals__):
            if namespace is None or read not in namespace:  # what is read cannot be told, or is a builtin
                continue
            value = namespace[read]
            if not isinstance(value, types.ModuleType) or namespace is not inner.__globals__:
                self.visit(spelled, value)


LIMIT = 200_000
"""The most characters of source that are stored for a model."""


def source_of(module: object) -> str:
    """The source of the classes of a module and its submodules: whole cells, and from files the classes alone.

    Empty where there is no source, as in a plain Python prompt.
    """
    return "\n\n".join(filter(None, dict.fromkeys(map(_text, _classes(module)))))[:LIMIT]


def _classes(module: object) -> list[type]:
    """The user's own classes of a module and of the modules that it holds, bases first."""
    classes: dict[type, None] = {}
    seen: set[int] = set()

    def visit(value: Any, depth: int) -> None:
        if id(value) in seen or depth > 8:  # deep enough for modules in containers in fields; this need not be complete
            return
        seen.add(id(value))
        kind = kind_of(value)
        if is_module_class(value):
            files = {base: _filename(base) for base in reversed(value.__mro__)}
            classes.update(dict.fromkeys(base for base, file in files.items() if file and not library_file(file)))
        elif kind in ("sequence", "mapping") or is_module(value):
            for _, _, part in parts_of(value, kind):
                visit(part, depth + 1)

    visit(module, 0)
    return list(classes)


def _filename(cls: type) -> str:
    """The filename of a class's code, a file or a cell, by its methods; empty where it defines none."""
    # Not by `inspect.getfile`: that goes by the module, which is `__main__` for every class of a notebook.
    for value in vars(cls).values():
        value = inspect.unwrap(getattr(value, "__func__", value)) if callable(value) else value
        if isinstance(value, types.FunctionType) and value.__qualname__.startswith(f"{cls.__qualname__}."):
            filename = value.__code__.co_filename
            if filename != "<string>":  # generated by `dataclass`
                return filename
    return ""


def _text(cls: type) -> str:
    """The whole cell that defines a class; of a file the class alone."""
    filename = _filename(cls)
    lines = linecache.getlines(filename)
    if not lines:
        return ""
    if not filename.endswith(".py") or "ipykernel_" in filename or filename.startswith("<"):
        # `linecache` has the `%%flax…` line as a comment; uncommented, the text is a cell that can be run.
        return re.sub(r"\A# (?=%%flax)", "", "".join(lines).strip("\n"))
    try:
        return inspect.getsource(cls).strip("\n")
    except (OSError, TypeError, SyntaxError):
        return ""


def edited(before: str, now: str) -> tuple[str, ...]:
    """Names of the top-level classes and functions that both sources define, but differently.

    Comments, layout and docstrings do not count. Empty where a source does not parse, such as one of an altered file.
    """
    texts_now = _definitions(now)
    return tuple(name for name, text in _definitions(before).items() if texts_now.get(name, text) != text)


def _definitions(code: str) -> dict[str, str]:
    """Top-level class or function of a source → its syntax tree as text, docstrings left out."""
    if len(code) > LIMIT:  # `source_of` has cut it
        return {}
    plain = "\n".join("" if line.startswith("%%flax") else line for line in code.splitlines())
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escape sequences in the user's strings
            tree = ast.parse(plain)
            kinds = (ast.ClassDef, ast.FunctionDef)
            for node in ast.walk(tree):
                if isinstance(node, kinds) and ast.get_docstring(node, clean=False) is not None:
                    node.body = node.body[1:]
            return {node.name: ast.dump(node) for node in tree.body if isinstance(node, kinds)}
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return {}
