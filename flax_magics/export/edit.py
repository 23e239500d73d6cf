"""A statement of a cell as the script has it: as it is, but for the commands in it and what only a notebook has."""

from __future__ import annotations

import ast
import copy
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from ..cells.names import binds, is_of_the_notebook, reads
from ..line.expression import segment
from .cells import CellSource, CommandSite, begin, blocks
from .functions import CannotSay
from .writer import LineWriter, indented

_MAGIC = re.compile(r"get_ipython\(\)\.run_line_magic\((['\"])(\w+)\1, (['\"])(.*)\3\)")
_SHELL = re.compile(r"get_ipython\(\)\.(?:system|getoutput)\((['\"])(.*)\1\)")
_DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


_A_RUN = "it is a Run of the session"
_OURS = "it comes from flax_magics"


def as_typed(line: str) -> str:
    """A line of a cell before IPython made Python of it."""
    return _SHELL.sub(r"!\2", _MAGIC.sub(lambda magic: f"%{magic[2]} {magic[4]}".rstrip(), line))


def commented(lines: Iterable[str], indent: str = "") -> list[str]:
    """Lines of a cell as comments at one indentation."""
    return [f"{indent}# {as_typed(line.removeprefix(indent))}".rstrip() for line in lines]


@dataclass(eq=False)
class SessionNames:
    """Names that have no value in the script, each with the reason.

    Those of flax_magics and of IPython, and what only lines gave that are comments. Every other name is the user's
    affair: whether it is there, and what it stands for, is never asked.
    """

    gone: dict[str, str] = field(default_factory=lambda: {"flax_magics": _OURS})
    bound: set[str] = field(default_factory=set)
    """What the session's code has given something else: `_`, say."""

    def lose(self, names: Iterable[str], reason: str) -> None:
        """`names` have no value from now on."""
        self.gone.update(dict.fromkeys(names, reason))

    def bind(self, names: Iterable[str]) -> None:
        """`names` get a value in the script."""
        for name in names:
            self.gone.pop(name, None)
            self.bound.add(name)

    def missing(self, names: Iterable[str]) -> CannotSay | None:
        """Why code that reads `names` cannot stand in the script; None where it can."""
        for name in sorted(names):
            reason = self.gone.get(name) or ("it is the notebook's own" if is_of_the_notebook(name) else "")
            if reason and (name in self.gone or name not in self.bound):
                return CannotSay(f"`{name}` is not there: {reason}", reason)
        return None


@dataclass(eq=False)
class Edit:
    """Writes one statement at the top of a cell.

    Attributes:
      source: the cell.
      names: those that the script has not.
      command: gives the lines in the place of a command; raises `CannotSay`.
      left_out: filled with what became a comment: the line, and the reason.
      written: places of commands that have lines.
      declared: function → names that the lines in it assign, and that are global.
      futures: names that it imports from `__future__`, which stand at the top of the script.
    """

    source: CellSource
    names: SessionNames
    command: Callable[[CommandSite], list[str]]
    writer: LineWriter
    left_out: list[tuple[str, str]] = field(default_factory=list)
    written: set[CommandSite] = field(default_factory=set)
    declared: dict[ast.stmt, set[str]] = field(default_factory=dict)
    futures: list[str] = field(default_factory=list)
    _edits: list[tuple[int, int, list[str]]] = field(default_factory=list)
    """First and last line, and the lines in their place."""

    def statement(self, statement: ast.stmt) -> tuple[list[str], bool]:
        """The lines of `statement`, and whether there is code among them."""
        code = self._whole(statement)
        for function, names in self.declared.items() if code else ():
            self._declare(function, names)
        first = begin(statement)
        lines = self._lines(statement)
        for start, end, new in sorted(self._edits, key=lambda edit: edit[0], reverse=True):
            lines[start - first : end - first + 1] = new
        try:
            compile("\n".join(lines), "<script>", "exec", dont_inherit=True)
        except SyntaxError as error:  # `await` at the top
            code = self._leave_out(statement, CannotSay(f"outside of a notebook it is no Python: {error.msg}"))
            return self._edits[-1][2], code
        return lines, code

    def _whole(self, statement: ast.stmt) -> bool:
        """The edits of a statement at the top: a comment in its place if one of its commands has no lines in there."""
        if statement in self.source.sites:
            return self._one(statement)
        try:
            return self._one(statement)
        except CannotSay as error:
            self.written.clear()
            return self._leave_out(statement, error)

    def _one(self, statement: ast.stmt, *, here: bool = True) -> bool:
        """Notes the edits of `statement`; whether code is left of it. `here`: it is in no function and no class."""
        if statement in self.source.sites:
            return self._site(statement, self.source.sites[statement], here)
        if statement in self.source.foreign:
            magic = self.source.foreign[statement]
            if magic.names and not here:
                raise CannotSay(f"a magic or the shell gives `{magic.names[0]}`")
            self.names.lose(magic.names, "a magic or the shell gives it")
            self._replace(statement, commented(magic.shown, self._indent(statement)))
            return False
        if not here:
            self._blocks(statement, here=False)
            return True
        if isinstance(statement, (ast.Import, ast.ImportFrom)):
            return self._import(statement)
        inside = [site for site in self.source.sites.values() if statement in site.path]
        self.names.lose((out for site in inside if (out := site.given.options.get("out"))), _A_RUN)
        package = _imports_package(statement)
        reason = self.names.missing(reads(_bare(statement, self.source)))
        if (
            not reason
            and not package
            and not inside
            and not any(self._contains(statement, f) for f in self.source.foreign)
        ):
            self.names.bind(binds(statement))
            return True
        if isinstance(statement, _DEFINITIONS) or not blocks(statement):
            if reason or package:
                return self._leave_out(statement, reason or CannotSay("it imports flax_magics"))
            self._blocks(statement, here=False)
            self.names.bind(binds(statement))
            return True
        # A loop, a branch, `with` and `try` run what is inside of them here and now.
        head = _head(statement)
        reason = self.names.missing(reads(head))
        if reason is not None:
            return self._leave_out(statement, reason)
        self.names.bind(binds(head))
        if self._blocks(statement, here=True):
            return True
        ours = "flax_magics" in "".join(self._lines(statement))
        self._replace(statement, [] if ours else commented(self._lines(statement), self._indent(statement)))
        return False

    def _blocks(self, statement: ast.stmt, *, here: bool) -> bool:
        """The edits of the blocks of `statement`, with `pass` in one of which nothing is left; whether some code is."""
        some = False
        for block in filter(None, blocks(statement)):
            before = len(self._edits)
            code = [self._one(inner, here=here) for inner in block]
            some = some or any(code)
            lines = [inner.lineno for inner in block] + [inner.end_lineno for inner in block]
            if len(self._edits) > before and (statement.lineno in lines or len(set(lines[: len(block)])) < len(block)):
                raise CannotSay("what has to be replaced shares its line with another statement")
            if not any(code):
                at = block[-1].end_lineno or block[-1].lineno
                self._edits.append((at + 1, at, [self._indent(block[-1]) + "pass"]))
        return some

    def _site(self, statement: ast.stmt, site: CommandSite, here: bool) -> bool:
        indent = self._indent(statement)
        try:
            lines = self.command(site)
        except CannotSay as error:
            if site.path:
                raise
            return self._leave_out(statement, error)
        self.written.add(site)
        self._replace(statement, indented(self.writer.fitted(lines, len(indent)), indent))
        if here and lines:
            self.names.bind(binds(statement))
        if here and site.given.options.get("out"):
            self.names.lose([site.given.options["out"]], _A_RUN)
        return bool(lines)

    def _import(self, statement: ast.Import | ast.ImportFrom) -> bool:
        if isinstance(statement, ast.ImportFrom) and statement.module == "__future__":
            self.futures += [alias.name for alias in statement.names]
            self._replace(statement, [])
            return False
        if isinstance(statement, ast.Import):
            kept = [alias for alias in statement.names if not _is_package(alias.name)]
        else:
            kept = [] if _is_package(statement.module or "") and not statement.level else statement.names
        gone = [alias for alias in statement.names if alias not in kept]
        self.names.bind(binds(statement))
        self.names.lose(((alias.asname or alias.name).partition(".")[0] for alias in gone), _OURS)
        if gone:
            self._replace(statement, [self._indent(statement) + ast.unparse(ast.Import(kept))] if kept else [])
        return bool(kept)

    def _leave_out(self, statement: ast.stmt, reason: CannotSay) -> bool:
        """A comment in the place of `statement`, whose names have no value then."""
        first, last = begin(statement), statement.end_lineno or statement.lineno
        self._edits = [edit for edit in self._edits if not first <= edit[0] <= last + 1]
        indent, lines = self._indent(statement), self._lines(statement)
        self._replace(statement, [f"{indent}# Left out: {reason}.", *commented(lines, indent)])
        self.left_out.append((as_typed(lines[0]).strip(), str(reason)))
        self.names.lose(binds(statement), reason.cause)
        return False

    def _replace(self, statement: ast.stmt, lines: list[str]) -> None:
        self._edits.append((begin(statement), statement.end_lineno or statement.lineno, lines))

    def _declare(self, function: ast.stmt, names: set[str]) -> None:
        """A `global` at the top of a function."""
        body = function.body  # type: ignore[attr-defined]
        first = body[0]
        docstring = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
        at = (first.end_lineno + 1) if docstring else begin(first)
        if names:
            self._edits.append((at, at - 1, [f"{self._indent(first)}global {', '.join(sorted(names))}"]))

    def _contains(self, statement: ast.stmt, inner: ast.stmt) -> bool:
        return begin(statement) <= inner.lineno <= (statement.end_lineno or statement.lineno)

    def _lines(self, statement: ast.stmt) -> list[str]:
        return lines_of_statement(self.source, statement)

    def _indent(self, statement: ast.stmt) -> str:
        line = self.source.text.split("\n")[begin(statement) - 1]
        return line[: len(line) - len(line.lstrip())]


def lines_of_statement(source: CellSource, statement: ast.stmt) -> list[str]:
    """The text of a statement: its lines, or its own part of a line that others share with a `;`."""
    if any(
        other is not statement
        and other.lineno <= (statement.end_lineno or 0)
        and statement.lineno <= (other.end_lineno or 0)
        for other in source.tree.body
    ):
        return segment(source.text, statement).split("\n")
    return source.text.split("\n")[begin(statement) - 1 : statement.end_lineno]


def _is_package(module: str) -> bool:
    return module.partition(".")[0] == "flax_magics"


def _imports_package(statement: ast.stmt) -> bool:
    """Whether flax_magics is imported inside of it, by an import or by its name as text."""
    for node in ast.walk(statement):
        match node:
            case ast.Import(names) if any(_is_package(alias.name) for alias in names):
                return True
            case ast.ImportFrom(module=str(module), level=0) if _is_package(module):
                return True
            case ast.Call(ast.Name(name) | ast.Attribute(attr=name), [ast.Constant(str(module)), *_]):
                if name in ("__import__", "import_module") and _is_package(module):
                    return True
    return False


def _bare(statement: ast.stmt, source: CellSource) -> ast.stmt:
    """A copy of `statement` in which the commands, and the magics of others, give None."""

    class Without(ast.NodeTransformer):
        def visit(self, node: ast.AST) -> ast.AST:
            if node in source.sites or node in source.foreign:
                node = copy.copy(node)
                node.value = ast.Constant(None)  # type: ignore[attr-defined]
                return node
            own = copy.copy(node)
            for name, value in ast.iter_fields(node):
                if isinstance(value, list):
                    setattr(own, name, [self.visit(item) if isinstance(item, ast.AST) else item for item in value])
                elif isinstance(value, ast.AST):
                    setattr(own, name, self.visit(value))
            return own

    bare: ast.stmt = Without().visit(statement)  # type: ignore[assignment]
    return bare


def _head(statement: ast.stmt) -> ast.stmt:
    """A compound statement with nothing in its blocks."""
    if isinstance(statement, ast.Match):
        cases = [ast.match_case(case.pattern, case.guard, [ast.Pass()]) for case in statement.cases]
        return ast.Match(statement.subject, cases)
    if hasattr(statement, "handlers"):
        handlers = [ast.ExceptHandler(one.type, one.name, [ast.Pass()]) for one in statement.handlers]
        return ast.Try([ast.Pass()], handlers, [], [ast.Pass()])
    head = copy.copy(statement)
    for name in ("body", "orelse"):
        if getattr(head, name, None):
            setattr(head, name, [ast.Pass()] if name == "body" else [])
    return head
