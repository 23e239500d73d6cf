"""The arrays that a model holds besides its variables: in its fields, and in the code of its classes.

What the code reads from its module by name is not held by it: the module is the user's, and stays.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from .library import library_file, library_module

MOST = 10_000
"""Objects that are looked at: an array behind more of them is not counted."""
_PLAIN = (str, bytes, int, float, complex, type(None), np.dtype, types.ModuleType)


def arrays_in(value: Any) -> list[Any]:
    """Every array that `value` keeps alive: a module or a class, and what their fields, defaults and closures hold."""
    found: list[Any] = []
    seen: set[int] = set()
    waiting = [value]
    while waiting and len(seen) < MOST:
        one = waiting.pop()
        if isinstance(one, _PLAIN) or id(one) in seen:
            continue
        seen.add(id(one))
        if isinstance(one, (jax.Array, np.ndarray)):
            found.append(one)
        else:
            waiting += _inside(one)
    return found


def _inside(value: Any) -> Iterable[Any]:
    match value:
        case types.FunctionType():
            return _of_function(value)
        case type():
            return () if library_module(value.__module__) else (*value.__bases__, *vars(value).values())
        case functools.partial():
            return value.func, value.args, value.keywords
        case types.MethodType():
            return value.__func__, value.__self__
        case classmethod() | staticmethod():
            return (value.__func__,)
        case property():
            return value.fget, value.fset, value.fdel
        case Mapping():
            return value.values()
        case tuple() | list() | set() | frozenset():
            return value
    own = getattr(value, "__dict__", None)
    return (type(value), *own.values()) if isinstance(own, dict) else ()


def _of_function(function: types.FunctionType) -> Iterator[Any]:
    if library_file(function.__code__.co_filename) and not hasattr(function, "__wrapped__"):
        return
    yield from function.__defaults__ or ()
    yield from (function.__kwdefaults__ or {}).values()
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # nothing was put into it
            continue
    yield from vars(function).values()
