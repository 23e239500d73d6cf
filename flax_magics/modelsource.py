"""The code that a model's classes were written in, to show to somebody who has the model's variables and not the model."""

from __future__ import annotations

import inspect
import linecache
import types
from typing import Any

from .models import is_module, is_module_class
from .usercode import library_file

LIMIT = 200_000
"""Characters of code that are kept of a model."""


def source_of(module: Any) -> str:
    """The cells (whole) and files (of each the classes) that define the module's classes, its submodules' too.

    Empty where the code is not to be had: in a plain Python prompt.
    """
    found: dict[str, None] = {}
    for cls in _classes(module):
        text = _text(cls)
        if text:
            found.setdefault(text)
    return "\n\n".join(found)[:LIMIT]


def _classes(module: Any) -> list[type]:
    """The user's own classes of a module and of the modules that it holds, bases first."""
    found: dict[type, None] = {}
    seen: set[int] = set()

    def visit(value: Any, depth: int) -> None:
        if id(value) in seen or depth > 8:
            return
        seen.add(id(value))
        if is_module(value):
            add(type(value))
            fields = vars(value)
            for inner in list(fields.values()):
                visit(inner, depth + 1)
        elif is_module_class(value):
            add(value)
        elif isinstance(value, (list, tuple)):
            for inner in value:
                visit(inner, depth + 1)
        elif isinstance(value, dict):
            for inner in list(value.values()):
                visit(inner, depth + 1)

    def add(cls: type) -> None:
        for base in reversed(cls.__mro__):
            filename = _filename(base)
            if filename and not library_file(filename):
                found.setdefault(base)

    visit(module, 0)
    return list(found)


def _filename(cls: type) -> str:
    """The file or the cell of a class, by the code of its methods; empty where it has none of its own."""
    for value in vars(cls).values():
        value = inspect.unwrap(getattr(value, "__func__", value)) if callable(value) else value
        if isinstance(value, types.FunctionType) and value.__qualname__.startswith(f"{cls.__qualname__}."):
            filename = value.__code__.co_filename
            if filename != "<string>":  # what dataclasses write
                return filename
    return ""


def _text(cls: type) -> str:
    """The whole cell that defines a class; of a file the class alone."""
    filename = _filename(cls)
    lines = linecache.getlines(filename)
    if not lines:
        return ""
    if not filename.endswith(".py") or "ipykernel_" in filename or filename.startswith("<"):
        return "".join(lines).strip("\n")
    try:
        return inspect.getsource(cls).strip("\n")
    except (OSError, TypeError, SyntaxError):
        return ""
