"""Names that notebook code reads and binds, and names that are free for an export to use."""

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
# In a notebook IPython puts names of its own into `builtins`, such as `display`.
BUILTIN = frozenset(vars(builtins)) - _NOTEBOOK - {"display"} | {"__name__", "__doc__", "__builtins__", "exit", "quit"}
"""Names that exist in any Python script without an import."""


def reads(node: ast.stmt) -> set[str]:
    """The global names that `node`, or a function that it defines, reads when it runs."""
    import symtable  # only an export needs it, and `%load_ext` imports this module

    updated = {n.target.id for n in ast.walk(node) if isinstance(n, ast.AugAssign) and isinstance(n.target, ast.Name)}
    text = ast.unparse(ast.fix_missing_locations(ast.Module([node], [])))
    # Wrapped in a function: at module level Python 3.12 inlines comprehensions, and their variables look like globals.
    assigned = sorted(assigned_names(node))
    lines = ["async def cell():", *([f" global {', '.join(assigned)}"] if assigned else []), textwrap.indent(text, " ")]
    try:
        table = symtable.symtable("\n".join(lines), "<cell>", "exec")
    except SyntaxError:  # `from … import *` and the like, which only the top level allows
        return updated | {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}
    return updated | {name for child in table.get_children() for name in _read(child)}


def _read(table: symtable.SymbolTable) -> Iterator[str]:
    """Global names that the code of a symbol table, or of a table inside it, refers to."""
    for symbol in table.get_symbols():
        if symbol.is_referenced() and symbol.is_global():
            yield symbol.get_name()
    for child in table.get_children():
        yield from _read(child)


def binds(node: ast.stmt) -> set[str]:
    """The global names that running `node` binds, those that its functions declare `global` included."""
    declared = {name for n in ast.walk(node) if isinstance(n, ast.Global) for name in n.names}
    handled = {n.name for n in ast.walk(node) if isinstance(n, ast.ExceptHandler) and n.name}
    return {*assigned_names(node), *handled, *declared, *_starred(node)}


def _starred(node: ast.stmt) -> set[str]:
    """The names that `from module import *` binds; empty where the module is not imported in this process."""
    if not isinstance(node, ast.ImportFrom) or node.names[0].name != "*" or node.module not in sys.modules:
        return set()
    module = sys.modules[str(node.module)]
    return set(getattr(module, "__all__", None) or (name for name in vars(module) if not name.startswith("_")))


def mentioned(node: ast.AST) -> Iterator[str]:
    """Every name that occurs in the code, except methods' names and their parameters, which clash with no global."""
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
    """Whether `name` is one that IPython defines, for itself or for past inputs and results: `In`, `_`, `_3`, `_i3`."""
    return name in _NOTEBOOK or re.fullmatch(r"_+|_[_i]*\d+|_i{1,3}|_[iod]h", name) is not None


class Free:
    """Hands out names that the session's own code does not use, each once."""

    def __init__(self, used: set[str]) -> None:
        self.used = used | set(BUILTIN)

    def take(self, *wanted: str) -> str:
        """Returns the first free name of `wanted`, else the last one with a number from 2, and marks it as used.

        What no identifier may have, such as a space, becomes `_`.
        """
        wanted = tuple(re.sub(r"\W", "_", name) for name in wanted)
        numbered = (f"{wanted[-1]}_{number}" for number in itertools.count(2))
        name = next(name for name in itertools.chain(wanted, numbered) if name not in self.used)
        self.used.add(name)
        return name


def assigned_names(tree: ast.AST) -> tuple[str, ...]:
    """The names that running `tree` binds in its own scope, in order of first appearance."""
    return tuple(dict.fromkeys(_assigned(tree)))


def _assigned(node: ast.AST, comprehension: bool = False) -> Iterator[str]:
    """Names bound by `node`; `comprehension`: it stands inside one, whose loop variables are its own."""
    children = [*ast.iter_child_nodes(node)]
    match node:
        case ast.FunctionDef() | ast.AsyncFunctionDef():
            yield node.name
            # The body has a scope of its own; decorators and defaults run in this one, and may hold a walrus.
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
        case ast.AnnAssign(value=None):  # `x: int` binds nothing
            children = []
        case ast.NamedExpr(target=ast.Name(name)):
            yield name
            children = [node.value]
        case ast.ListComp() | ast.SetComp() | ast.DictComp() | ast.GeneratorExp():
            comprehension = True  # its targets are its own, but a walrus inside binds in the scope around it
        case ast.Name(name, ast.Store()) if not comprehension:
            yield name
        case ast.MatchAs(name=str(name)) | ast.MatchStar(name=str(name)) | ast.MatchMapping(rest=str(name)):
            yield name
    for child in children:
        yield from _assigned(child, comprehension)
