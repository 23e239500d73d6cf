"""The code that a model's classes were written in, to show to somebody who has the model's variables and not the model."""

from __future__ import annotations

import ast
import inspect
import linecache
import re
import types
import warnings
from typing import Any

from .library import is_module, is_module_class, library_file
from .walk import kind_of, parts_of

LIMIT = 200_000
"""Characters of code that are kept of a model."""


def source_of(module: Any) -> str:
    """The cells (whole) and files (of each the classes) that define the module's classes, its submodules' too.

    Empty where the code is not to be had: in a plain Python prompt.
    """
    texts = dict.fromkeys(map(_text, _classes(module)))
    return "\n\n".join(filter(None, texts))[:LIMIT]


def _classes(module: Any) -> list[type]:
    """The user's own classes of a module and of the modules that it holds, bases first."""
    classes: dict[type, None] = {}
    seen: set[int] = set()

    def visit(value: Any, depth: int) -> None:
        if id(value) in seen or depth > 8:
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
        # The magic's line is kept as a comment there: with it, the cell can be run as it is.
        return re.sub(r"\A# (?=%%flax)", "", "".join(lines).strip("\n"))
    try:
        return inspect.getsource(cls).strip("\n")
    except (OSError, TypeError, SyntaxError):
        return ""


def edited(before: str, now: str) -> tuple[str, ...]:
    """Names of classes and functions that both codes define, not alike; comments, layout and docstrings do not count.

    None where a code cannot be read, as that of a file that was altered.
    """
    was, is_now = _definitions(before), _definitions(now)
    return tuple(name for name, text in was.items() if is_now.get(name, text) != text)


def _definitions(code: str) -> dict[str, str]:
    """What a code defines at its top level: name → its syntax."""
    if len(code) > LIMIT:
        return {}
    plain = "\n".join("" if line.startswith("%%flax") else line for line in code.splitlines())
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what Python thinks of somebody's backslashes
            tree = ast.parse(plain)
            kinds = (ast.ClassDef, ast.FunctionDef)
            for node in ast.walk(tree):
                if isinstance(node, kinds) and ast.get_docstring(node, clean=False) is not None:
                    node.body = node.body[1:]
            definitions = [node for node in tree.body if isinstance(node, kinds)]
            return {node.name: ast.dump(node) for node in definitions}
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return {}
