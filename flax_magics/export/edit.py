"""Writes one statement of a cell: unchanged but for the commands in it, and for what only works in a notebook."""

from __future__ import annotations

import ast
import copy
import re
import symtable
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from ..base.tokens import assigned_names
from ..line.expression import segment
from .cells import CellSource, CommandSite, Definition, ExecutedStatement, FunctionNode, begin, blocks, end
from .context import FROM_PACKAGE, ScriptContext
from .functions import CannotSay
from .writer import indented

_MAGIC = re.compile(r"get_ipython\(\)\.run_line_magic\((['\"])(\w+)\1, (['\"])(.*)\3\)")
_SHELL = re.compile(r"get_ipython\(\)\.(?:system|getoutput)\((['\"])(.*)\1\)")
_A_RUN = "it is a Run of the session"


def as_typed(line: str) -> str:
    """A line as the user typed it, before IPython turned magics and shell lines into calls."""
    return _SHELL.sub(r"!\2", _MAGIC.sub(lambda magic: f"%{magic[2]} {magic[4]}".rstrip(), line))


def commented(lines: Iterable[str], indent: str = "") -> list[str]:
    """Lines of a cell as comments, `#` at the same indentation."""
    return [f"{indent}# {as_typed(line.removeprefix(indent))}".rstrip() for line in lines]


@dataclass(eq=False)
class Edit:
    """Writes one statement at the top level of a cell.

    Attributes:
      source: the cell.
      command: returns the lines for a command, or raises CannotSay.
      futures: collects names imported from `__future__`, which must stand at the top of the script.
      left_out: something in it became a comment.
      written: the commands that have lines.
      declared: function → names that lines inside assign, to be declared global there.
    """

    source: CellSource
    context: ScriptContext
    command: Callable[[CommandSite], list[str]]
    futures: list[str]
    left_out: bool = False
    written: set[CommandSite] = field(default_factory=set)
    declared: dict[FunctionNode, set[str]] = field(default_factory=dict)
    _edits: list[tuple[int, int, list[str]]] = field(default_factory=list)
    """(first line, last line, new lines) of each replacement."""

    def statement(self, statement: ast.stmt) -> tuple[list[str], bool]:
        """The lines for `statement`, and whether any of them is code.

        If a command inside a larger statement has no lines, the whole statement becomes a comment.
        """
        try:
            code = self._one(statement)
        except CannotSay as error:
            self.written.clear()
            code = self._leave_out(statement, error)
        for function, names in self.declared.items():
            if not code or not names:
                continue
            # `global` comes first in the body, but after a docstring.
            first = function.body[0]
            docstring = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
            at = end(first) + 1 if docstring else begin(first)
            self._edits.append((at, at - 1, [f"{self._indent(first)}global {', '.join(sorted(names))}"]))
        first_line = begin(statement)
        lines = lines_of_statement(self.source, statement)
        # From the bottom up, so that line numbers of edits above stay valid.
        for start, last, new in sorted(self._edits, key=lambda edit: edit[0], reverse=True):
            lines[start - first_line : last - first_line + 1] = new
        # Compiled only to see whether a script may have it: nothing is run.
        try:
            compile("\n".join(lines), "<script>", "exec", dont_inherit=True)
        except SyntaxError as error:  # such as `await` at the top level
            code = self._leave_out(statement, CannotSay(f"outside of a notebook it is no Python: {error.msg}"))
            return self._edits[-1][2], code
        return lines, code

    def _one(self, statement: ast.stmt, *, here: bool = True) -> bool:
        """Collects the edits for `statement`. Returns whether code is left; `here`: not inside a function or class."""
        names, source = self.context.names, self.source
        if statement in source.sites:
            return self._site(statement, source.sites[statement], here)
        if statement in source.foreign:
            magic = source.foreign[statement]
            if magic.names and not here:
                raise CannotSay(f"a magic or the shell gives `{magic.names[0]}`")
            names.lose(magic.names, "a magic or the shell gives it")
            self._replace(statement, commented(magic.shown, self._indent(statement)))
            return False
        # The body of a function runs later: its names are not judged here.
        if not here:
            self._blocks(statement, here=False)
            return True
        if isinstance(statement, (ast.Import, ast.ImportFrom)):
            return self._import(statement)
        inside = source.sites_in(statement)
        names.lose((out for site in inside if (out := site.parsed.options.get("out"))), _A_RUN)
        package = "flax_magics" in imported(statement)
        reason = names.missing(self._reads(statement))
        magics = any(begin(statement) <= magic.lineno <= end(statement) for magic in source.foreign)
        as_it_is = not (reason or package or inside or magics)
        if as_it_is or isinstance(statement, Definition) or not blocks(statement):
            if reason or package:
                return self._leave_out(statement, reason or CannotSay("it imports flax_magics"))
            self._blocks(statement, here=False)
            names.bind(binds(statement))
            return True
        # The bodies of loops, branches, `with` and `try` run now: each statement in them is judged by itself.
        head = copy.deepcopy(statement)
        # The head alone: what the bodies read is asked for them.
        for block in blocks(head):
            block[:] = [ast.Pass()]
        reason = names.missing(reads(head))
        if reason is not None:
            return self._leave_out(statement, reason)
        names.bind(binds(head))
        if self._blocks(statement, here=True):
            return True
        lines = lines_of_statement(source, statement)
        ours = "flax_magics" in "".join(lines)
        self._replace(statement, [] if ours else commented(lines, self._indent(statement)))
        return False

    def _reads(self, statement: ast.stmt) -> set[str]:
        """Global names that a statement reads. `get_ipython` counts only where no magic accounts for it."""
        nodes = list(ast.walk(statement))
        calls = sum(node in self.source.sites or node in self.source.foreign for node in nodes)
        shells = sum(isinstance(node, ast.Name) and node.id == "get_ipython" for node in nodes)
        return reads(statement) - ({"get_ipython"} if shells == calls else set())

    def _blocks(self, statement: ast.stmt, *, here: bool) -> bool:
        """Edits the blocks of `statement`, with `pass` where one has nothing left. Returns whether code is left."""
        some = False
        for block in filter(None, blocks(statement)):
            edits = len(self._edits)
            code = [self._one(inner, here=here) for inner in block]
            some = some or any(code)
            starts = [inner.lineno for inner in block]
            # Whole lines are replaced, so a replaced statement must not share its line with another.
            shared = len(set(starts)) < len(block) or statement.lineno in (*starts, *map(end, block))
            if shared and len(self._edits) > edits:
                raise CannotSay("what has to be replaced shares its line with another statement")
            if not any(code):
                at = end(block[-1])
                self._edits.append((at + 1, at, [self._indent(block[-1]) + "pass"]))
        return some

    def _site(self, statement: ast.stmt, site: CommandSite, here: bool) -> bool:
        names, indent = self.context.names, self._indent(statement)
        try:
            lines = self.command(site)
        except CannotSay as error:
            # `statement` catches it, and leaves out the whole statement around the command.
            if site.path:
                raise
            return self._leave_out(statement, error)
        self.written.add(site)
        self._replace(statement, indented(self.context.writer.fitted(lines, len(indent)), indent))
        if here and lines and site.target:
            names.bind(binds(statement))
        if here and site.parsed.options.get("out"):
            names.lose([site.parsed.options["out"]], _A_RUN)
        return bool(lines)

    def _import(self, statement: ast.Import | ast.ImportFrom) -> bool:
        names = self.context.names
        if isinstance(statement, ast.ImportFrom) and statement.module == "__future__":
            # Collected for the top of the script, where Python wants them.
            self.futures += [alias.name for alias in statement.names]
            self._replace(statement, [])
            return False
        if isinstance(statement, ast.Import):
            others = [alias for alias in statement.names if alias.name.partition(".")[0] != "flax_magics"]
        else:
            others = [] if "flax_magics" in imported(statement) else statement.names
        ours = [alias for alias in statement.names if alias not in others]
        names.bind(binds(statement))
        names.lose(((alias.asname or alias.name).partition(".")[0] for alias in ours), FROM_PACKAGE)
        if ours:
            self._replace(statement, [self._indent(statement) + ast.unparse(ast.Import(others))] if others else [])
        return bool(others)

    def _leave_out(self, statement: ast.stmt, reason: CannotSay) -> bool:
        """Replaces `statement` by a comment; the names that it would assign have no value from here on."""
        first, last = begin(statement), end(statement)
        # Edits inside of it no longer apply.
        self._edits = [edit for edit in self._edits if not first <= edit[0] <= last + 1]
        indent, lines = self._indent(statement), lines_of_statement(self.source, statement)
        self._replace(statement, [f"{indent}# Left out: {reason}.", *commented(lines, indent)])
        self.context.unexported.append(f"{as_typed(lines[0]).strip()}: {reason}")
        self.left_out = True
        self.context.names.lose(binds(statement), reason.cause)
        return False

    def _replace(self, statement: ast.stmt, lines: list[str]) -> None:
        self._edits.append((begin(statement), end(statement), lines))

    def _indent(self, statement: ast.stmt) -> str:
        line = self.source.text.split("\n")[begin(statement) - 1]
        return line[: len(line) - len(line.lstrip())]


def lines_of_statement(source: CellSource, statement: ast.stmt) -> list[str]:
    """The lines of a statement; only its own part of a line that it shares by `;`."""
    others = (other for other in source.tree.body if other is not statement)
    if any(other.lineno <= end(statement) and statement.lineno <= end(other) for other in others):
        return segment(source.text, statement).split("\n")
    return source.text.split("\n")[begin(statement) - 1 : end(statement)]


def imported(tree: ast.AST) -> set[str]:
    """The top-level packages that code imports, by statements or by `import_module` with a literal name."""
    modules: list[str] = []
    for node in ast.walk(tree):
        match node:
            case ast.Import(aliases):
                modules += [alias.name for alias in aliases]
            case ast.ImportFrom(module=str(module), level=0):
                modules.append(module)
            case ast.Call(ast.Name(name) | ast.Attribute(attr=name), [ast.Constant(str(module)), *_]):
                modules += [module] if name in ("__import__", "import_module") else []
    return {module.partition(".")[0] for module in modules}


def reads(node: ast.stmt) -> set[str]:
    """The global names that `node`, or a function that it defines, reads when it runs."""
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


def by_line(statements: Sequence[ExecutedStatement]) -> list[list[ExecutedStatement]]:
    """The statements in groups that share a line."""
    lines: list[list[ExecutedStatement]] = []
    for statement in statements:
        if lines and begin(statement.statement) <= end(lines[-1][-1].statement):
            lines[-1].append(statement)
        else:
            lines.append([statement])
    return lines


def assigned_by(site: CommandSite | None) -> Iterable[str]:
    """The model whose variables `%flax_vars net = …` sets; empty for any other command."""
    if site is None or site.name != "flax_vars" or "=" not in site.parsed.rest:
        return ()
    return (site.parsed.rest.partition("=")[0].strip(),)


def sets_variables(node: ast.AST) -> bool:
    """Whether it is the target of an assignment to a model's `variables`."""
    return isinstance(node, ast.Attribute) and node.attr == "variables" and not isinstance(node.ctx, ast.Load)
