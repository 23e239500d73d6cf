"""Expressions that only show something: what a notebook displays below a cell, and a script has no use for."""

from __future__ import annotations

import ast
from collections.abc import Container, Mapping


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_VALUES = _words(
    "abs bool complex dict dir float frozenset getattr hasattr id int isinstance len list max min range repr reversed "
    "round set sorted str sum tuple type vars zip"
)
"""Functions of Python's that give a value and do nothing else."""
_OF_ARRAYS = _words(
    "all any argmax argmin argsort astype copy count cumsum devices diagonal dot flatten get index item items keys max "
    "mean min nonzero prod ravel reshape round squeeze std sum swapaxes tolist trace transpose values var"
)
"""Methods of arrays and containers that are such."""
_MODULES = frozenset(["jax.tree", "jax.tree_util", "jax.nn", "jax.numpy", "numpy"])
"""Modules whose functions are such."""
_NOT = ("copyto", "fill", "from", "load", "place", "print", "put", "random", "save", "seed", "set", "show", "test")
"""How the names of those begin that are not."""


def is_a_look(node: ast.expr, modules: Mapping[str, str], bound: Container[str]) -> bool:
    """Whether working `node` out has no effect but its value: `y.shape`, `y[:2].mean()`, `jax.tree.map(jnp.shape, v)`.

    Args:
      modules: names of the code → the modules that they were imported as.
      bound: names that the code itself gives something.
    """

    def value(part: ast.AST) -> bool:
        match part:
            case ast.Call(function, arguments, keywords):
                rest = [*arguments, *(keyword.value for keyword in keywords)]
                if "map" in getattr(function, "attr", "") and rest:
                    return called(function) and maps(rest[0]) and all(map(value, rest[1:]))
                return called(function) and all(map(value, rest))
            case ast.Await() | ast.Yield() | ast.YieldFrom() | ast.NamedExpr() | ast.Lambda():
                return False
        return all(map(value, ast.iter_child_nodes(part)))

    def called(function: ast.expr) -> bool:
        match function:
            case ast.Name(name):
                return name in _VALUES and name not in bound
            case ast.Attribute(holder, name):
                module = _module_of(function, modules)
                plain = module in _MODULES and not name.startswith(_NOT)
                return plain if module else name in _OF_ARRAYS and value(holder)
        return False

    def maps(function: ast.expr) -> bool:
        return value(function.body) if isinstance(function, ast.Lambda) else called(function)

    return value(node)


def _module_of(node: ast.Attribute, modules: Mapping[str, str]) -> str:
    """`jax.tree` of `jax.tree.map`; empty where the code's own names are meant."""
    names, inner = [], node.value
    while isinstance(inner, ast.Attribute):
        names.append(inner.attr)
        inner = inner.value
    if not isinstance(inner, ast.Name) or inner.id not in modules:
        return ""
    return ".".join([modules[inner.id], *reversed(names)])
