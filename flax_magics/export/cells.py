"""A notebook's cells as Python text with their commands found, and which statement of which cell made which run.

IPython's own transformers make calls of `get_ipython()` out of magics and shell lines, in place and line by line, so what
is found here is what ran.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from msgspec import Struct
from msgspec.structs import replace

from ..base.tokens import ends_quietly
from ..cells.journal import ExecutedCell, Place
from ..cells.names import assigned_names
from ..errors import FlaxMagicsError
from ..line.call import CallExpression, parse_call
from ..line.commands import COMMANDS
from ..line.expression import end_of, segment, start_of
from ..line.options import Command, LineOptions, read
from ..run import Run

Transform = Callable[[str], str]
FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef
Definition = FunctionNode | ast.ClassDef
_Valued = ast.Expr | ast.Assign | ast.AnnAssign | ast.AugAssign
"""Statements whose value may be a command."""

AS_BODY = ("time", "capture", "prun", "snakeviz", "memit", "mprun", "scalene", "timed")
"""Cell magics of others that run their body once, in the notebook's own namespace."""


class CommandSite(Struct, frozen=True, eq=False):
    """A place in a cell's text where a command stands.

    Attributes:
      statement: the statement that it is, in the cell's syntax tree.
      name: of the command, such as `flax_apply`.
      parsed: its options and what follows them, read.
      call: its call, where it takes one.
      target: what stands left of its value, with the sign: `y =`, `total +=`; empty if nothing does.
      path: the compound statements and functions that it is inside, outermost first.
      line: what stands after the command's name.
      above: lines that there were before the cell's text, where the code that ran counts them.
    """

    statement: ast.stmt
    name: str
    parsed: LineOptions
    call: CallExpression | None
    target: str
    path: tuple[ast.stmt, ...]
    line: str = ""
    above: int = 0

    def is_at(self, place: Place) -> bool:
        """Whether it is the line of that number, in a function of that name."""
        inside = self.in_function
        named = place.function.startswith("<") if inside is None else place.function == inside.name
        return named and self.statement.lineno <= place.line - self.above <= end(self.statement)

    @property
    def draws(self) -> bool:
        """Whether a run comes of it."""
        return self.name in ("flax_apply", "flax_init") or (self.name == "flax_key" and bool(self.parsed.rest))

    @property
    def in_function(self) -> FunctionNode | None:
        """The innermost function that it is inside."""
        return next((node for node in reversed(self.path) if isinstance(node, FunctionNode)), None)

    @property
    def mode(self) -> str:
        """The mode of its runs, as a Run says it; empty where a run has none."""
        if self.name != "flax_apply":
            return ""
        options = self.parsed.options
        return "train" if options["train"] else "eval" if options["eval"] else "as written"

    def matches(self, run: Run) -> bool:
        """Whether `run` may be one of this place."""
        if self.name == "flaxmodel":
            name = self.parsed.rest.partition("=")[0].strip()
            return is_build(run) and name in (run.model, MODELS)
        command = self.name.removeprefix("flax_")
        return run.command == command and MATCHES[command](self, run)

    def has_call_of(self, run: Run) -> bool:
        """Whether the call that is written here is that of `run`, in a draw of its own or in an earlier one."""
        if self.call is None or run.call not in (self.call.call, self.call.text):
            return False
        return run.replayed == (self.parsed.options["keys_of"] is not None)

    def has_mode_of(self, run: Run) -> bool:
        """Whether mode and number of samples are those of `run`. A model without a switch runs as written in any mode."""
        return run.mode in (self.mode, "as written") and run.samples == self.parsed.options["samples"]


def is_build(run: Run) -> bool:
    """Whether a module was built on a model's line, whose call is the construction itself."""
    inside = run.call.rstrip().removesuffix(")").rstrip(", ")
    return run.kind.opens and run.by_hand.partition(" = ")[2].startswith(inside)


MATCHES: dict[str, Callable[[CommandSite, Run], bool]] = {
    "apply": lambda site, run: site.has_call_of(run) and site.has_mode_of(run),
    "init": lambda site, run: site.has_call_of(run) and not is_build(run),
    "key": lambda site, run: run.call == site.parsed.rest,
}
"""For each command of a run, whether a place where that command stands may have made the run."""


class ForeignMagic(Struct, frozen=True, eq=False):
    """A place where a magic or shell line of others stands: it becomes a comment.

    Attributes:
      shown: as it was written, one line each; empty for one that loads or sets this package, for which nothing stands.
      names: what it assigned.
    """

    shown: tuple[str, ...]
    names: tuple[str, ...] = ()


class CellSource(Struct, frozen=True, eq=False):
    """A cell as Python.

    Attributes:
      text: of the cell, its cell magics opened.
      tree: its syntax.
      sites, foreign: where commands and the magics of others stand, by statement.
      above: lines of comment that stand for cell magics.
      captured: names that a cell magic gives a value: the output that it took.
      opaque: it is no Python, and `above` is all that there is.
      offset: how many lines of `text` less there were where the code that ran counts them (see `ExecutedCell.line`).
    """

    text: str
    tree: ast.Module
    sites: dict[ast.stmt, CommandSite] = {}
    foreign: dict[ast.stmt, ForeignMagic] = {}
    above: tuple[str, ...] = ()
    opaque: bool = False
    offset: int = 0
    captured: tuple[str, ...] = ()

    def sites_in(self, statement: ast.stmt) -> list[CommandSite]:
        """The places of commands in a statement; its own, where it is one."""
        return [site for site in self.sites.values() if statement in (site.statement, *site.path)]

    def statements(self) -> list[ExecutedStatement]:
        """Its statements as if all of them had been executed."""
        return [ExecutedStatement(statement, self.sites.get(statement)) for statement in self.tree.body]


def read_cell(raw: str, transform: Transform) -> CellSource:
    """The cell `raw` as it was typed, read. A text that is no Python is opaque."""
    if not raw.strip():
        return CellSource("", ast.Module([], []))
    try:
        text = _timed(transform(raw), transform)
        body = ast.parse(text).body
    except (SyntaxError, ValueError, FlaxMagicsError) as error:
        return _opaque(*raw.rstrip().splitlines(), f"({error})")
    match body:
        case [
            ast.Expr(ast.Call(func, [ast.Constant(str(name)), ast.Constant(str(line)), ast.Constant(str(inner))]))
        ] if ast.unparse(func) == "get_ipython().run_cell_magic":
            try:
                return _opened(name, line, inner, transform)
            except FlaxMagicsError as error:  # a line that the command refused
                return _opaque(f"%%{name} {line}", f"({error})")
    return _with_sites(text)


def _opaque(*above: str) -> CellSource:
    return CellSource("", ast.Module([], []), above=above, opaque=True)


def _opened(name: str, line: str, body: str, transform: Transform) -> CellSource:
    """A cell magic's body as the cell that it is."""
    shown = f"%%{name} {line}".rstrip()
    if f"%{name}" not in COMMANDS and name not in ("flaxmodel", *AS_BODY):
        return _opaque(shown, *body.rstrip().splitlines())
    inner = read_cell(body, transform)
    if name in AS_BODY:
        names = line.split()[:1] if name == "capture" and not line.startswith("-") else []
        return replace(inner, captured=tuple(names), above=(shown, *inner.above))
    rest = read(COMMANDS["%%flaxmodel"], line.rstrip("; ")).rest if name == "flaxmodel" else ""
    if inner.opaque:
        return inner
    # Empty lines at the top of a body, which IPython takes off, and the magic's own line.
    offset = 1 + next((i for i, text in enumerate(body.splitlines()) if text.strip()), 0)
    if name == "flaxmodel":
        register = f"\nget_ipython().run_line_magic('flaxmodel', {rest or MODELS!r})\n"
        return _with_sites(inner.text.rstrip() + register, inner.above, offset)
    # `%%flax_apply` and its like: the last statement is the call, and becomes a line.
    last = inner.tree.body[-1] if inner.tree.body else None
    if not isinstance(last, _Valued) or not isinstance(last.value, ast.Call):
        return inner
    start, stop = start_of(inner.text, last), end_of(inner.text, last)
    target = inner.text[start : start_of(inner.text, last.value)]
    semicolon = ";" if ends_quietly(inner.text) else ""
    written = f"{line} {segment(inner.text, last.value)}{semicolon}".strip()
    below = f"{inner.text[:start]}{target}get_ipython().run_line_magic({name!r}, {written!r})"
    # The call may have stood over several lines: those after it keep their numbers.
    below += "\n" * inner.text[start:stop].count("\n") + "\n"
    return _with_sites(below, inner.above, offset)


MODELS = "*"
"""Stands on the line of a `%%flaxmodel` cell that has none of its own: the models that it defined."""


def _timed(text: str, transform: Transform) -> str:
    """`text` with the code of each `%time` line in its place, which runs it in the notebook's own namespace."""
    for statement, _ in reversed(list(_statements(ast.parse(text).body, ()))):
        match statement:
            case ast.Expr(ast.Call(func, [ast.Constant("time"), ast.Constant(str(line))])):
                if ast.unparse(func) == "get_ipython().run_line_magic" and line.lstrip()[:1] not in ("", "-"):
                    code = f"{transform(line).strip()}  # %time"
                    text = text[: start_of(text, statement)] + code + text[end_of(text, statement) :]
    return text


def _with_sites(text: str, above: tuple[str, ...] = (), offset: int = 0) -> CellSource:
    source = CellSource(text, ast.parse(text), above=above, offset=offset)
    for statement, path in _statements(source.tree.body, ()):
        if not isinstance(statement, _Valued) or not isinstance(statement.value, ast.Call):
            continue
        call, start = statement.value, start_of(text, statement)
        target = "" if isinstance(statement, ast.Expr) else text[start : start_of(text, call)].strip()
        match ast.unparse(call.func), call.args:
            case "get_ipython().run_line_magic", [ast.Constant(str(name)), ast.Constant(str(line))]:
                command = COMMANDS.get(f"%{name}") or COMMANDS.get(f"%%{name}")
                if command is not None:
                    with suppress(FlaxMagicsError):  # of a line that the command refused, which ended the cell
                        what = _read_line(name, command, line)
                        source.sites[statement] = CommandSite(statement, *what, target, path, line, offset)
                        continue
                of_ours = name.endswith("load_ext") and "flax_magics" in line
                of_ours = of_ours or (name == "config" and "FlaxMagics" in line)
                written = "" if of_ours else f"{target} %{name} {line}"
            case "get_ipython().system" | "get_ipython().getoutput", [ast.Constant(str(line))]:
                written = f"{target} !{line}"
            case _:
                continue
        source.foreign[statement] = ForeignMagic(tuple(written.strip().splitlines()), assigned_names(statement))
    return source


def _read_line(name: str, command: Command, line: str) -> tuple[str, LineOptions, CallExpression | None]:
    """What a command's line asks for: `help` or the command itself, its options, and its call where it takes one."""
    parsed = read(command, line if command.takes == "call" else line.rstrip("; "))
    if parsed.help or (not parsed.rest and name in ("flax_apply", "flax_init")):
        return "help", parsed, None
    bare = name == "flax_summary" and parsed.rest.rstrip("; ").isidentifier()
    return name, parsed, parse_call(parsed.rest, command.name) if command.takes == "call" and not bare else None


def _statements(body: list[ast.stmt], path: tuple[ast.stmt, ...]) -> Iterator[tuple[ast.stmt, tuple[ast.stmt, ...]]]:
    """Every statement with those that it is inside, in the order of the text."""
    for statement in body:
        yield statement, path
        for inner in blocks(statement):
            yield from _statements(inner, (*path, statement))


def blocks(statement: ast.stmt) -> list[list[ast.stmt]]:
    """The blocks of a compound statement, in the order of the text."""
    inside: list[list[ast.stmt]] = []
    for block in (getattr(statement, name, []) for name in ("body", "handlers", "orelse", "finalbody", "cases")):
        inside += [block] if block and isinstance(block[0], ast.stmt) else [part.body for part in block]
    return inside


@dataclass(eq=False)
class ExecutedStatement:
    """One statement at the top of a cell as it was executed.

    Attributes:
      runs: the session's runs by index, with the place in the code that made each; None for one that no place explains.
      failed: the cell ended in it.
    """

    statement: ast.stmt
    site: CommandSite | None
    runs: list[tuple[int, CommandSite | None]] = field(default_factory=list)
    failed: bool = False


@dataclass(eq=False)
class CellRun:
    """One execution of a cell: its statements as far as they ran; `loose` runs follow the last of them."""

    cell: ExecutedCell
    source: CellSource
    statements: list[ExecutedStatement]
    loose: list[int] = field(default_factory=list)


def match(cells: Sequence[tuple[ExecutedCell, CellSource]], runs: Sequence[Run]) -> list[CellRun]:
    """The executions in order, each with its runs.

    A statement that is a command made one run; a loop, and a call of a function with a command in it, any number: as many
    as there are but for those that later commands of the cell need. Of lines that are alike, the one counts whose number
    the run has.
    """
    functions: list[CommandSite] = []
    cell_runs = []
    for cell, source in cells:
        statements = _executed(cell, source)
        sites = [source.sites_in(statement.statement) for statement in statements]
        queue = _RunQueue(runs, list(range(cell.first, min(cell.end, len(runs)))), cell)
        for i, statement in enumerate(statements):
            if statement.failed:
                continue
            if statement.site is not None:
                queue.take_one(statement, statement.site)
                continue
            later = [site for inside in sites[i + 1 :] for site in inside if site.draws or site.name == "flaxmodel"]
            if not isinstance(statement.statement, Definition):
                queue.take_many(statement, [*sites[i], *reversed(functions)], later)
            functions += [site for site in sites[i] if site.in_function is not None]
        cell_runs.append(CellRun(cell, source, statements, queue.waiting))
    return cell_runs


def _executed(cell: ExecutedCell, source: CellSource) -> list[ExecutedStatement]:
    """The statements of a cell as far as they ran."""
    statements = source.statements()
    if cell.error is None:
        return statements
    line = (cell.line or 0) - source.offset
    # Before the first line stands the command of the cell's own, which failed once the body had run.
    if cell.line is None or line >= 1:
        statements = [statement for statement in statements if begin(statement.statement) <= line]
    if statements:
        statements[-1].failed = True
    return statements


def begin(statement: ast.stmt) -> int:
    """The first line of a statement, its decorators included."""
    decorators: list[ast.expr] = getattr(statement, "decorator_list", [])
    return min([statement.lineno, *(decorator.lineno for decorator in decorators)])


def end(statement: ast.stmt) -> int:
    """The last line of a statement."""
    return statement.end_lineno or statement.lineno


_REPEATING = FunctionNode | ast.For | ast.AsyncFor | ast.While
"""In these a place can make more than one run in one execution of its statement."""


@dataclass(eq=False)
class _RunQueue:
    """The session's runs; those of one cell wait, by index, for the statement that made them."""

    runs: Sequence[Run]
    waiting: list[int]
    cell: ExecutedCell

    def take_one(self, statement: ExecutedStatement, site: CommandSite) -> None:
        """The run of a command: the next, and what nobody explains before it."""
        if site.name == "flaxmodel":
            while self.waiting and site.matches(self.runs[self.waiting[0]]):
                statement.runs.append((self.waiting.pop(0), site))
            return
        first = next((i for i, index in enumerate(self.waiting) if site.matches(self.runs[index])), None)
        if site.draws and first is not None:
            statement.runs += [(index, None) for index in self.waiting[:first]]
            statement.runs.append((self.waiting[first], site))
            del self.waiting[: first + 1]

    def take_many(self, statement: ExecutedStatement, sites: list[CommandSite], later: list[CommandSite]) -> None:
        """The runs of a statement that has commands inside, or calls functions that have."""
        places = {place.run: place for place in self.cell.places}
        used: set[CommandSite] = set()
        while self.waiting:
            run, place = self.runs[self.waiting[0]], places.get(self.waiting[0])
            fitting = [site for site in sites if site.matches(run)]
            # The first of them: a function that is defined again takes the place of the one before.
            site = next((site for site in fitting if place and site.is_at(place)), None)
            if site is None:
                # Where lines are alike, each of them has run before one has run again.
                unused = [site for site in fitting if site not in used]
                repeating = (site for site in fitting if any(isinstance(node, _REPEATING) for node in site.path))
                site = next(iter([*unused, *repeating]), None)
                if site is None:
                    return
                needed = sum(1 for other in later if other.matches(run))
                if needed and sum(1 for index in self.waiting if site.matches(self.runs[index])) <= needed:
                    return
            used.add(site)
            statement.runs.append((self.waiting.pop(0), site))
