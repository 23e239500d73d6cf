"""A statement of a cell with its commands replaced, and with what has no place in a script as comments."""

from __future__ import annotations

import ast
import copy
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from .matching import begin
from .names import binds, reads
from .reading import Foreign, Site, Source, blocks
from .scribe import indented
from .wrapping import fitted

_MAGIC = re.compile(r"get_ipython\(\)\.run_line_magic\((['\"])(\w+)\1, (['\"])(.*)\3\)")
_SHELL = re.compile(r"get_ipython\(\)\.(?:system|getoutput)\((['\"])(.*)\1\)")


def as_seen(line: str) -> str:
    """A line of a cell as it was typed."""
    return _SHELL.sub(r"!\2", _MAGIC.sub(lambda found: f"%{found[2]} {found[4]}".rstrip(), line))


def commented(lines: Iterable[str], indent: str = "") -> list[str]:
    """Lines as comments at one indentation."""
    out = []
    for line in lines:
        text = as_seen(line.removeprefix(indent))
        out.append(f"{indent}# {text}".rstrip())
    return out


@dataclass(eq=False)
class Edit:
    """Writes one statement at the top of a cell.

    Attributes:
      source: the cell.
      command: gives the lines in the place of a command, and whether they are code.
      unit: one step of indentation.
      missing: global names that are not there in the script, with the reason.
      left_out: filled with what was left out: the reason, and the names that it would have bound.
      declared: function → names that the lines in it assign, and that are global.
    """

    source: Source
    command: Callable[[Site], tuple[list[str], bool]]
    missing: Callable[[Iterable[str]], str | None]
    unit: str
    left_out: list[tuple[str, set[str]]] = field(default_factory=list)
    declared: dict[ast.stmt, set[str]] = field(default_factory=dict)
    _edits: list[tuple[int, int, list[str]]] = field(default_factory=list)

    def statement(self, statement: ast.stmt) -> tuple[list[str], bool]:
        """The lines of `statement`, and whether there is code among them."""
        self._edits = []
        code = self._one(statement, frozenset(), top=True)
        for function, names in self.declared.items():
            self._declare(function, names)
        first = begin(statement)
        lines = self.source.text.split("\n")[first - 1 : statement.end_lineno]
        for start, end, new in sorted(self._edits, key=lambda edit: edit[0], reverse=True):
            lines[start - first : end - first + 1] = new
        return lines, code

    def _one(self, statement: ast.stmt, local: frozenset[str], *, top: bool = False) -> bool:
        """Notes the edits of `statement`; whether code is left of it."""
        source = self.source
        indent = self._indent(statement)
        if statement in source.sites:
            new, code = self.command(source.sites[statement])
            new = fitted(new, self.unit, len(indent))
            self._replace(statement, indented(new, indent))
            return code
        if statement in source.foreign:
            return self._foreign(statement, source.foreign[statement], indent)
        inner = [block for block in blocks(statement) if block]
        if isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef)):
            local = local | _own(statement)
        reason = self.missing(reads(_head(statement) if inner else statement) - local)
        if reason is not None:
            self._leave_out(statement, reason, indent)
            return False
        before = len(self._edits)
        kept = False
        for block in inner:
            if any(s.lineno == statement.lineno for s in block) and any(s in source.sites for s in block):
                self._leave_out(statement, "a command on the line of its block", indent)
                return False
            some = False
            for s in block:
                some = self._one(s, local) or some
            if not some:
                last = block[-1]
                at = last.end_lineno or last.lineno
                self._edits.append((at + 1, at, [self._indent(last) + "pass"]))
            kept = kept or some
        if inner and not kept and len(self._edits) > before:
            del self._edits[before:]
            ours = "flax_magics" in "".join(self._lines(statement))
            self._replace(statement, [] if ours else commented(self._lines(statement), indent))
            self.left_out.append(("", binds(statement)))
            return False
        return True

    def _foreign(self, statement: ast.stmt, found: Foreign, indent: str) -> bool:
        lines = [f"{indent}# {line}".rstrip() for line in found.shown]
        if found.code and "get_ipython" not in found.code and not found.code.startswith(("%", "!")):
            self._replace(statement, [*lines, indent + found.code])
            return True
        if found.names:
            self.left_out.append(("a magic or the shell gives it", set(found.names)))
        self._replace(statement, lines)
        return False

    def _leave_out(self, statement: ast.stmt, reason: str, indent: str) -> None:
        lines = [f"{indent}# Left out: {reason}.", *commented(self._lines(statement), indent)]
        self._replace(statement, lines)
        self.left_out.append((reason, binds(statement)))

    def _replace(self, statement: ast.stmt, lines: list[str]) -> None:
        self._edits.append((begin(statement), statement.end_lineno or statement.lineno, lines))

    def _declare(self, function: ast.stmt, names: set[str]) -> None:
        body = function.body  # type: ignore[attr-defined]
        first = body[0]
        docstring = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
        at = (first.end_lineno + 1) if docstring else begin(first)
        if names:
            self._edits.append((at, at - 1, [f"{self._indent(first)}global {', '.join(sorted(names))}"]))

    def _lines(self, statement: ast.stmt) -> list[str]:
        return self.source.text.split("\n")[begin(statement) - 1 : statement.end_lineno]

    def _indent(self, statement: ast.stmt) -> str:
        line = self.source.text.split("\n")[begin(statement) - 1]
        return line[: len(line) - len(line.lstrip())]


def _own(function: ast.FunctionDef | ast.AsyncFunctionDef) -> frozenset[str]:
    """Names that are a function's own."""
    arguments = function.args
    named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    named += [argument for argument in (arguments.vararg, arguments.kwarg) if argument is not None]
    assigned = {name for statement in function.body for name in binds(statement)}
    declared = {name for node in ast.walk(function) if isinstance(node, ast.Global) for name in node.names}
    return frozenset({*(argument.arg for argument in named), *assigned} - declared)


def _head(statement: ast.stmt) -> ast.stmt:
    """A compound statement with nothing in its blocks."""
    head: ast.stmt = copy.copy(statement)
    for name in ("body", "orelse", "finalbody"):
        if getattr(head, name, None):
            setattr(head, name, [ast.Pass()] if name == "body" else [])
    if isinstance(head, ast.Try) or hasattr(head, "handlers"):
        return ast.Pass()
    if isinstance(head, ast.Match):
        return ast.Expr(head.subject)
    return head
