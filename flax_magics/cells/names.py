"""Which names a piece of a session's code reads and binds, and names that it leaves free for ours."""

from __future__ import annotations

import ast
import builtins
import itertools
import re
import sys
import textwrap
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import symtable

_NOTEBOOK = {"get_ipython", "In", "Out", "__IPYTHON__"}
BUILTIN = frozenset(vars(builtins)) - _NOTEBOOK - {"display"} | {"__name__", "__doc__", "__builtins__", "exit", "quit"}
"""Names that are there in a script, whoever runs it."""


def reads(node: ast.stmt) -> set[str]:
    """Global names that running `node`, or a function that it defines, reads."""
    import symtable  # an export's, and `%load_ext` imports this file

    updated = {n.target.id for n in ast.walk(node) if isinstance(n, ast.AugAssign) and isinstance(n.target, ast.Name)}
    text = ast.unparse(ast.fix_missing_locations(ast.Module([node], [])))
    # In a function a comprehension's own variables are no globals, on Python 3.12 and after too.
    assigned = sorted(assigned_names(node))
    lines = ["async def cell():", *([f" global {', '.join(assigned)}"] if assigned else []), textwrap.indent(text, " ")]
    try:
        table = symtable.symtable("\n".join(lines), "<cell>", "exec")
    except SyntaxError:  # `from … import *`, and whatever else has its place at the top alone
        return updated | {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}
    return updated | {name for child in table.get_children() for name in _read(child)}


def _read(table: symtable.SymbolTable) -> Iterator[str]:
    for symbol in table.get_symbols():
        if symbol.is_referenced() and symbol.is_global():
            yield symbol.get_name()
    for child in table.get_children():
        yield from _read(child)


def binds(node: ast.stmt) -> set[str]:
    """Names that running `node` binds, those of a `global` in its functions too."""
    declared = {name for n in ast.walk(node) if isinstance(n, ast.Global) for name in n.names}
    handled = {n.name for n in ast.walk(node) if isinstance(n, ast.ExceptHandler) and n.name}
    return {*assigned_names(node), *handled, *declared, *_starred(node)}


def _starred(node: ast.stmt) -> set[str]:
    """What `from module import *` brings, where the module is loaded in this process."""
    if not isinstance(node, ast.ImportFrom) or node.names[0].name != "*" or node.module not in sys.modules:
        return set()
    module = sys.modules[str(node.module)]
    return set(getattr(module, "__all__", None) or (name for name in vars(module) if not name.startswith("_")))


def mentioned(node: ast.AST) -> Iterator[str]:
    """Every name that occurs in the code, but for those that only a class's methods have as their own."""
    if isinstance(node, ast.Name):
        yield node.id
    elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        yield node.name
    elif isinstance(node, ast.arg):
        yield node.arg
    elif isinstance(node, ast.alias):
        yield (node.asname or node.name).partition(".")[0]
    elif isinstance(node, (ast.Global, ast.Nonlocal)):
        yield from node.names
    for child in ast.iter_child_nodes(node):
        methods_own: set[str] = set()
        if isinstance(node, ast.ClassDef) and isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
            methods_own = {child.name, *(n.arg for n in ast.walk(child.args) if isinstance(n, ast.arg))}
        yield from (name for name in mentioned(child) if name not in methods_own)


def is_of_the_notebook(name: str) -> bool:
    """Whether it is IPython's: itself, or an earlier result or input: `In`, `_`, `__`, `_3`, `_i3`."""
    return name in _NOTEBOOK or re.fullmatch(r"_+|_[_i]*\d+|_i{1,3}|_[iod]h", name) is not None


class Free:
    """Gives names that the session's own code does not use."""

    def __init__(self, used: set[str]) -> None:
        self.used = used | set(BUILTIN)

    def take(self, *wanted: str) -> str:
        """The first of `wanted` that is free, or the last with a number; it is used from then on."""
        numbered = (f"{wanted[-1]}_{number}" for number in itertools.count(2))
        name = next(name for name in itertools.chain(wanted, numbered) if name not in self.used)
        self.used.add(name)
        return name


def assigned_names(tree: ast.AST) -> tuple[str, ...]:
    """Names that running `tree` binds in its own scope, in order of first appearance."""
    return tuple(dict.fromkeys(_assigned(tree)))


def _assigned(node: ast.AST, comprehension: bool = False) -> Iterator[str]:
    children = [*ast.iter_child_nodes(node)]
    match node:
        case ast.FunctionDef() | ast.AsyncFunctionDef():
            yield node.name
            children = [*node.decorator_list, *node.args.defaults, *(d for d in node.args.kw_defaults if d)]
        case ast.ClassDef():
            yield node.name
            children = [*node.decorator_list, *node.bases, *(keyword.value for keyword in node.keywords)]
        case ast.Lambda():
            children = [*node.args.defaults, *(d for d in node.args.kw_defaults if d)]
        case ast.Import() | ast.ImportFrom():
            for alias in node.names:
                if alias.name != "*":
                    yield alias.asname or alias.name.split(".")[0]
        case ast.AnnAssign(value=None):
            children = []
        case ast.NamedExpr(target=ast.Name(name)):
            yield name
            children = [node.value]
        case ast.ListComp() | ast.SetComp() | ast.DictComp() | ast.GeneratorExp():
            comprehension = True
        case ast.Name(name, ast.Store()) if not comprehension:
            yield name
        case ast.MatchAs(name=str(name)) | ast.MatchStar(name=str(name)) | ast.MatchMapping(rest=str(name)):
            yield name
    for child in children:
        yield from _assigned(child, comprehension)
