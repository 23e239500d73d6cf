"""A notebook's cells as Python text with their commands found, and which statement of which cell made which run.

IPython's own transformers make calls of `get_ipython()` out of magics and shell lines, in place and line by line, so what
is found here is what ran.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..base.tokens import ends_quietly
from ..cells.journal import ExecutedCell, Place
from ..errors import FlaxMagicsError
from ..line.call import CallExpression, parse_call
from ..line.commands import COMMANDS
from ..line.expression import end_of, segment, start_of
from ..line.options import LineOptions, read
from ..run import Run

Transform = Callable[[str], str]

AS_BODY = ("time", "capture", "prun", "snakeviz", "memit", "mprun", "scalene", "timed")
"""Cell magics of others that run their body once, in the notebook's own namespace."""


@dataclass(frozen=True, eq=False)
class CommandSite:
    """A place in a cell's text where a command stands.

    Attributes:
      statement: the statement that it is, in the cell's syntax tree.
      name: of the command, such as `flax_apply`.
      given: its options and what follows them, read.
      call: its call, where it takes one.
      target: what stands left of its value, with the sign: `y =`, `total +=`; empty if nothing does.
      path: the compound statements and functions that it is inside, outermost first.
      line: what stands after the command's name.
      above: lines that there were before the cell's text, where the code that ran counts them.
    """

    statement: ast.stmt
    name: str
    given: LineOptions
    call: CallExpression | None
    target: str
    path: tuple[ast.stmt, ...]
    line: str = ""
    above: int = 0

    def is_at(self, place: Place) -> bool:
        """Whether it is the line of that number, in a function of that name."""
        first, last = self.statement.lineno, self.statement.end_lineno or self.statement.lineno
        inside = self.in_function
        named = place.function.startswith("<") if inside is None else place.function == inside.name
        return named and first <= place.line - self.above <= last

    @property
    def draws(self) -> bool:
        """Whether a run comes of it."""
        if self.name == "flax_key":
            return bool(self.given.rest)
        return self.name in ("flax_apply", "flax_init")

    @property
    def in_function(self) -> ast.FunctionDef | ast.AsyncFunctionDef | None:
        """The innermost function that it is inside."""
        for node in reversed(self.path):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                return node
        return None

    @property
    def mode(self) -> str:
        """The mode of its runs, as a Run says it; empty where a run has none."""
        if self.name != "flax_apply":
            return ""
        options = self.given.options
        return "train" if options["train"] else "eval" if options["eval"] else "as written"

    def matches(self, run: Any) -> bool:
        """Whether `run` may be one of this place."""
        command = self.name.removeprefix("flax_")
        if self.name == "flaxmodel":
            name = self.given.rest.partition("=")[0].strip()
            return is_build(run) and name in (run.model, MODELS)
        return bool(run.command == command and MATCHES[command](self, run))

    def has_call_of(self, run: Any) -> bool:
        """Whether the call that is written here is that of `run`, in a draw of its own or in an earlier one."""
        if self.call is None or run.call not in (self.call.call, self.call.text):
            return False
        return bool(run.replayed) == (self.given.options["draw"] is not None)

    def has_mode_of(self, run: Any) -> bool:
        """Whether mode and number of draws are those of `run`. A model without a switch runs as written in any mode."""
        return run.mode in (self.mode, "as written") and run.draws == self.given.options["draws"]


def is_build(run: Any) -> bool:
    """Whether a module was built on a model's line, whose call is the construction itself."""
    inside = run.call.rstrip().removesuffix(")").rstrip(", ")
    return run.kind.opens and bool(run.by_hand.partition(" = ")[2].startswith(inside))


MATCHES: dict[str, Callable[[CommandSite, Any], bool]] = {
    "apply": lambda site, run: site.has_call_of(run) and site.has_mode_of(run),
    "init": lambda site, run: site.has_call_of(run) and not is_build(run),
    "key": lambda site, run: run.call == site.given.rest,
}
"""For each command of a run, whether a place where that command stands may have made the run."""


@dataclass(frozen=True, eq=False)
class ForeignMagic:
    """A place where a magic or shell line of others stands: it becomes a comment.

    Attributes:
      shown: as it was written, one line each; empty for one that loads or sets this package, for which nothing stands.
      names: what it assigned.
    """

    shown: tuple[str, ...]
    names: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class CellSource:
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
    sites: dict[ast.stmt, CommandSite] = field(default_factory=dict)
    foreign: dict[ast.stmt, ForeignMagic] = field(default_factory=dict)
    above: tuple[str, ...] = ()
    opaque: bool = False
    offset: int = 0
    captured: tuple[str, ...] = ()


def read_cell(raw: str, transform: Transform) -> CellSource:
    """The cell `raw` as it was typed, read. A text that is no Python is opaque."""
    if not raw.strip():
        return CellSource("", ast.Module([], []))
    try:
        text = _timed(transform(raw), transform)
        tree = ast.parse(text)
    except (SyntaxError, ValueError, FlaxMagicsError) as error:
        return CellSource("", ast.Module([], []), above=(*raw.rstrip().splitlines(), f"({error})"), opaque=True)
    magic = _cell_magic(tree)
    if magic is None:
        return _found(text, tree, (), 0)
    name, line, body = magic
    try:
        return _opened(name, line, body, transform)
    except FlaxMagicsError as error:  # a line that the command refused
        return CellSource("", ast.Module([], []), above=(f"%%{name} {line}", f"({error})"), opaque=True)


def _opened(name: str, line: str, body: str, transform: Transform) -> CellSource:
    """A cell magic's body as the cell that it is."""
    shown = f"%%{name} {line}".rstrip()
    if name == "flaxmodel":
        given = read(COMMANDS["%%flaxmodel"], line.rstrip("; "))
        inner = read_cell(body, transform)
        if inner.opaque:
            return inner
        register = f"\nget_ipython().run_line_magic('flaxmodel', {given.rest or MODELS!r})\n"
        below = inner.text.rstrip() + register
        return _found(below, ast.parse(below), inner.above, 1 + _blank(body))
    if f"%{name}" in COMMANDS:
        return _call_cell(name, line, body, transform)
    if name in AS_BODY:
        inner = read_cell(body, transform)
        names = line.split()[:1] if name == "capture" and not line.startswith("-") else []
        return replace(inner, captured=tuple(names), above=(shown, *inner.above))
    return CellSource("", ast.Module([], []), above=(shown, *body.rstrip().splitlines()), opaque=True)


MODELS = "*"
"""Stands on the line of a `%%flaxmodel` cell that has none of its own: the models that it defined."""


def _blank(body: str) -> int:
    """Empty lines at the top of a body, which IPython takes off."""
    return next((i for i, line in enumerate(body.splitlines()) if line.strip()), 0)


def _timed(text: str, transform: Transform) -> str:
    """`text` with the code of each `%time` line in its place, which runs it in the notebook's own namespace."""
    for statement, _ in reversed(list(_statements(ast.parse(text).body, ()))):
        match statement:
            case ast.Expr(ast.Call(func, [ast.Constant("time"), ast.Constant(str(line))])) if (
                _is_shell(func, "run_line_magic") and line.strip() and not line.lstrip().startswith("-")
            ):
                code = f"{transform(line).strip()}  # %time"
                text = text[: start_of(text, statement)] + code + text[end_of(text, statement) :]
    return text


def _cell_magic(tree: ast.Module) -> tuple[str, str, str] | None:
    """Name, line and body of the cell magic that IPython's transformers made a call of."""
    match tree.body:
        case [ast.Expr(ast.Call(func, [ast.Constant(str(name)), ast.Constant(str(line)), ast.Constant(str(body))]))]:
            return (name, line, body) if _is_shell(func, "run_cell_magic") else None
    return None


def _is_shell(func: ast.expr, method: str) -> bool:
    match func:
        case ast.Attribute(ast.Call(ast.Name("get_ipython"), []), attr):
            return attr == method
    return False


def _call_cell(name: str, line: str, body: str, transform: Transform) -> CellSource:
    """`%%flax_apply` and its like: the last statement is the call, and becomes a line."""
    inner = read_cell(body, transform)
    if inner.opaque or not inner.tree.body:
        return inner
    last: Any = inner.tree.body[-1]
    value = getattr(last, "value", None)
    if not isinstance(value, ast.Call):
        return inner
    start, end = start_of(inner.text, last), end_of(inner.text, last)
    target = inner.text[start : start_of(inner.text, value)]
    semicolon = ";" if ends_quietly(inner.text) else ""
    written = f"{line} {segment(inner.text, value)}{semicolon}".strip()
    below = f"{inner.text[:start]}{target}get_ipython().run_line_magic({name!r}, {written!r})"
    # The call may have stood over several lines: those after it keep their numbers.
    below += "\n" * inner.text[start:end].count("\n") + "\n"
    return _found(below, ast.parse(below), inner.above, 1 + _blank(body))


def _found(text: str, tree: ast.Module, above: tuple[str, ...], offset: int) -> CellSource:
    sites: dict[ast.stmt, CommandSite] = {}
    foreign: dict[ast.stmt, ForeignMagic] = {}
    for statement, path in _statements(tree.body, ()):
        value = getattr(statement, "value", None)
        if not isinstance(statement, (ast.Expr, ast.Assign, ast.AnnAssign, ast.AugAssign)):
            continue
        if not isinstance(value, ast.Call) or not isinstance(value.func, ast.Attribute):
            continue
        target = ""
        if not isinstance(statement, ast.Expr):
            target = text[start_of(text, statement) : start_of(text, value)].strip()
        match value.args:
            case [ast.Constant(str(name)), ast.Constant(str(line))] if _is_shell(value.func, "run_line_magic"):
                command = COMMANDS.get(f"%{name}") or COMMANDS.get(f"%%{name}")
                if command is not None:
                    site = _site(statement, name, command, line, target, path, offset)
                    if site is not None:
                        sites[statement] = site
                        continue
                of_ours = name.endswith("load_ext") and "flax_magics" in line
                of_ours = of_ours or (name == "config" and "FlaxMagics" in line)
                foreign[statement] = _foreign(statement, "" if of_ours else f"{target} %{name} {line}")
            case [ast.Constant(str(line))] if _is_shell(value.func, "system") or _is_shell(value.func, "getoutput"):
                foreign[statement] = _foreign(statement, f"{target} !{line}")
    return CellSource(text, tree, sites, foreign, above, offset=offset)


def _site(
    statement: ast.stmt, name: str, command: Any, line: str, target: str, path: tuple[ast.stmt, ...], above: int
) -> CommandSite | None:
    """The place of a command; None for a line that the command refuses (which ended the cell)."""
    try:
        given = read(command, line if command.takes == "call" else line.rstrip("; "))
        if given.help or (not given.rest and name in ("flax_apply", "flax_init")):
            return CommandSite(statement, "help", given, None, target, path, line)
        bare = name == "flax_summary" and given.rest.rstrip("; ").isidentifier()
        call = parse_call(given.rest, command.name) if command.takes == "call" and not bare else None
    except FlaxMagicsError:
        return None
    return CommandSite(statement, name, given, call, target, path, line, above)


def _foreign(statement: ast.stmt, written: str) -> ForeignMagic:
    stored = (n for n in ast.walk(statement) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store))
    return ForeignMagic(tuple(written.strip().splitlines()), tuple(name.id for name in stored))


def _statements(body: list[ast.stmt], path: tuple[ast.stmt, ...]) -> Iterator[tuple[ast.stmt, tuple[ast.stmt, ...]]]:
    """Every statement with those that it is inside, in the order of the text."""
    for statement in body:
        yield statement, path
        for inner in blocks(statement):
            yield from _statements(inner, (*path, statement))


def blocks(statement: ast.stmt) -> list[list[ast.stmt]]:
    """The blocks of a compound statement, in the order of the text."""
    found = [getattr(statement, name, []) for name in ("body", "handlers", "orelse", "finalbody", "cases")]
    out: list[list[ast.stmt]] = []
    for block in found:
        for item in [block] if block and isinstance(block[0], ast.stmt) else block:
            out.append(item if isinstance(item, list) else item.body)
    return out


@dataclass(eq=False)
class ExecutedStatement:
    """One statement at the top of a cell as it was executed.

    Attributes:
      made: the session's runs by index, with the place in the code that made each; None for one that no place explains.
      failed: the cell ended in it.
    """

    statement: ast.stmt
    site: CommandSite | None
    made: list[tuple[int, CommandSite | None]] = field(default_factory=list)
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
    out = []
    for cell, source in cells:
        steps = [ExecutedStatement(statement, source.sites.get(statement)) for statement in source.tree.body]
        ran = _as_far_as_it_ran(cell, source, steps)
        queue = list(range(cell.first, min(cell.end, len(runs))))
        where = {place.run: place for place in cell.places}
        for i, step in enumerate(ran):
            later = [site for s in ran[i + 1 :] for site in _inside(source, s) if _single(site)]
            if step.failed:
                continue
            if step.site is not None:
                _take_one(step, step.site, queue, runs)
                continue
            inside = _inside(source, step)
            if not isinstance(step.statement, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                _take_many(step, [*inside, *reversed(functions)], later, queue, runs, where)
            functions += [s for s in inside if s.in_function is not None]
        out.append(CellRun(cell, source, ran, queue))
    return out


def _as_far_as_it_ran(
    cell: ExecutedCell, source: CellSource, steps: list[ExecutedStatement]
) -> list[ExecutedStatement]:
    if cell.error is None or not steps:
        return steps
    if cell.line is None:
        return []
    line = cell.line - source.offset
    if line < 1:  # the command of the cell's first line failed, once the body had run
        steps[-1].failed = True
        return steps
    ran = [step for step in steps if begin(step.statement) <= line]
    if ran:
        ran[-1].failed = True
    return ran


def begin(statement: ast.stmt) -> int:
    """The first line of a statement, its decorators included."""
    decorators: list[ast.expr] = getattr(statement, "decorator_list", [])
    return min([statement.lineno, *(decorator.lineno for decorator in decorators)])


def _single(site: CommandSite) -> bool:
    return site.draws or site.name == "flaxmodel"


def _take_one(step: ExecutedStatement, site: CommandSite, queue: list[int], runs: Sequence[Run]) -> None:
    """The run of a command: the next, and what nobody explains before it."""
    if site.name == "flaxmodel":
        while queue and site.matches(runs[queue[0]]):
            step.made.append((queue.pop(0), site))
        return
    if not site.draws:
        return
    found = next((i for i, index in enumerate(queue) if site.matches(runs[index])), None)
    if found is None:
        return
    step.made += [(index, None) for index in queue[:found]]
    step.made.append((queue[found], site))
    del queue[: found + 1]


def _inside(source: CellSource, step: ExecutedStatement) -> list[CommandSite]:
    """The places of commands in a statement, functions that it only defines left out."""
    if step.site is not None:
        return [step.site]
    return [site for site in source.sites.values() if step.statement in site.path]


def _repeats(site: CommandSite) -> bool:
    """Whether a place can make more than one run in one execution of its statement."""
    return any(
        isinstance(node, (ast.For, ast.AsyncFor, ast.While, ast.FunctionDef, ast.AsyncFunctionDef))
        for node in site.path
    )


def _take_many(
    step: ExecutedStatement,
    sites: list[CommandSite],
    later: list[CommandSite],
    queue: list[int],
    runs: Sequence[Run],
    where: Mapping[int, Place],
) -> None:
    used: set[CommandSite] = set()
    while queue:
        run, place = runs[queue[0]], where.get(queue[0])
        # The first of them: a function that is defined again takes the place of the one before.
        exact = next((site for site in sites if place and site.is_at(place) and site.matches(run)), None)
        if exact is not None:
            used.add(exact)
            step.made.append((queue.pop(0), exact))
            continue
        fitting = [site for site in sites if site.matches(run) and (site not in used or _repeats(site))]
        if not fitting:
            return
        # Where lines are alike, each of them has run before one has run again.
        site = next((site for site in fitting if site not in used), fitting[0])
        used.add(site)
        needed = sum(1 for other in later if other.matches(run))
        if needed and sum(1 for index in queue if site.matches(runs[index])) <= needed:
            return
        step.made.append((queue.pop(0), site))
