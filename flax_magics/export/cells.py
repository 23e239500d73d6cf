"""Reads a notebook's cells as Python, finds the commands in them, and matches runs with the statements that made them.

IPython's own transformers turn magics and shell lines into calls of `get_ipython()`, in place and line by line. So what
is found here is what IPython ran.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from msgspec import Struct
from msgspec.structs import replace

from ..base.tokens import assigned_names, ends_quietly
from ..cells.journal import ExecutedCell, Place
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
"""Kinds of statement with a value, which may be a command."""

AS_BODY = ("time", "capture", "prun", "snakeviz", "memit", "mprun", "scalene", "timed")
"""Other cell magics that run their body once, in the notebook's own namespace, so that it counts as a cell."""


class CommandSite(Struct, frozen=True, eq=False):
    """A command at its place in a cell.

    Attributes:
      statement: the statement that the command is, in the cell's syntax tree.
      name: of the command, such as `flax_apply`.
      parsed: its options, and what follows them.
      call: the model's call, for commands that take one.
      target: the text before the command, up to its sign: `y =`, `total +=`; empty if its value is not assigned.
      path: the compound statements and functions around it, outermost first.
      line: the text after the command's name.
      above: how many lines the code that ran had above the cell's text.
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
        """Whether the command is on that line, counted in the code that ran, and in a function of that name."""
        inside = self.in_function
        named = place.function.startswith("<") if inside is None else place.function == inside.name
        return named and self.statement.lineno <= place.line - self.above <= end(self.statement)

    @property
    def draws(self) -> bool:
        """Whether the command makes a run."""
        return self.name in ("flax_apply", "flax_init", "flax_grad", "flax_train") or (
            self.name == "flax_key" and bool(self.parsed.rest)
        )

    @property
    def in_function(self) -> FunctionNode | None:
        """The innermost function around it; None at the top level."""
        return next((node for node in reversed(self.path) if isinstance(node, FunctionNode)), None)

    @property
    def model(self) -> str:
        """The name of the model that it runs, or whose loss; empty for commands without a call."""
        if self.call is None:
            return ""
        loss = self.name in ("flax_grad", "flax_train")
        return next((text for name, text in self.call.arguments if name is None), "") if loss else self.call.target

    @property
    def mode(self) -> str:
        """The mode of its runs, spelled as in a Run; empty for commands without a mode."""
        if self.name not in ("flax_apply", "flax_grad", "flax_train"):
            return ""
        options = self.parsed.options
        return "train" if options["train"] else "eval" if options["eval"] else "as written"

    def matches(self, run: Run) -> bool:
        """Whether `run` may have been made by this command."""
        if self.name == "flaxmodel":
            name = self.parsed.rest.partition("=")[0].strip()
            return is_build(run) and name in (run.model, MODELS)
        command = self.name.removeprefix("flax_")
        return run.command == command and MATCHES[command](self, run)

    def has_call_of(self, run: Run) -> bool:
        """Whether `run` has the call that is written here, and is a replay only if `--keys-of` is written here."""
        if self.call is None or run.call not in (self.call.call, self.call.text):
            return False
        return run.replayed == (self.parsed.options["keys_of"] is not None)

    def has_begun(self, run: Run) -> bool:
        """Whether the command may have begun a training; one that was gone on with has the call of the last command."""
        if self.call is None or self.parsed.options["resume"] or run.trained is None:
            return False
        mine = run.call in (self.call.call, self.call.text)
        return mine or (bool(run.trained.task.parts) and run.model == self.model)

    def has_mode_of(self, run: Run) -> bool:
        """Whether mode and number of samples agree. In any mode, a run of a model without a switch is `as written`."""
        return run.mode in (self.mode, "as written") and run.samples == self.parsed.options["samples"]


def is_build(run: Run) -> bool:
    """Whether the run built a module on a model's line: then its call is the construction itself."""
    inside = run.call.rstrip().removesuffix(")").rstrip(", ")
    return run.kind.opens and run.by_hand.partition(" = ")[2].startswith(inside)


MATCHES: dict[str, Callable[[CommandSite, Run], bool]] = {
    "apply": lambda site, run: site.has_call_of(run) and site.has_mode_of(run),
    "init": lambda site, run: site.has_call_of(run) and not is_build(run),
    "key": lambda site, run: run.call == site.parsed.rest,
    "grad": lambda site, run: site.has_call_of(run) and site.has_mode_of(run),
    "train": lambda site, run: site.has_begun(run),
}
"""For each command of a run, whether a place with that command may have made the run."""


class ForeignMagic(Struct, frozen=True, eq=False):
    """A magic or shell line that is not ours; the script has it as a comment.

    Attributes:
      shown: its lines as they were written; empty for one that loads or configures this package, which is left out.
      names: the names that it assigns.
    """

    shown: tuple[str, ...]
    names: tuple[str, ...] = ()


class CellSource(Struct, frozen=True, eq=False):
    """A cell read as Python.

    Attributes:
      text: its code, with the bodies of cell magics in their place.
      tree: the syntax tree of `text`.
      sites, foreign: statement → the command, or other magic, that it is.
      above: comments in the place of cell magics.
      captured: names that a cell magic assigns its captured output to.
      opaque: the cell is no Python, and only `above` is left of it.
      offset: how many lines `text` has less above it than the code that ran (see `ExecutedCell.line`).
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
        """The commands inside a statement, or the command that it is."""
        return [site for site in self.sites.values() if statement in (site.statement, *site.path)]

    def statements(self) -> list[ExecutedStatement]:
        """Its statements, as if the whole cell had been executed."""
        return [ExecutedStatement(statement, self.sites.get(statement)) for statement in self.tree.body]


def read_cell(raw: str, transform: Transform) -> CellSource:
    """Reads a cell as it was typed. One that cannot be parsed becomes opaque."""
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
            except FlaxMagicsError as error:  # the command had refused its line when it ran
                return _opaque(f"%%{name} {line}", f"({error})")
    return _with_sites(text)


def _opaque(*above: str) -> CellSource:
    return CellSource("", ast.Module([], []), above=above, opaque=True)


def _opened(name: str, line: str, body: str, transform: Transform) -> CellSource:
    """Reads a cell magic's body in place of the magic."""
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
    # IPython strips empty lines at the top of the body; 1 is the line of the magic itself.
    offset = 1 + next((i for i, text in enumerate(body.splitlines()) if text.strip()), 0)
    if name == "flaxmodel":
        register = f"\nget_ipython().run_line_magic('flaxmodel', {rest or MODELS!r})\n"
        return _with_sites(inner.text.rstrip() + register, inner.above, offset)
    # In `%%flax_apply` and the like the last statement is the call: rewritten as the line magic.
    last = inner.tree.body[-1] if inner.tree.body else None
    if not isinstance(last, _Valued) or not isinstance(last.value, ast.Call):
        return inner
    start, stop = start_of(inner.text, last), end_of(inner.text, last)
    target = inner.text[start : start_of(inner.text, last.value)]
    semicolon = ";" if ends_quietly(inner.text) else ""
    written = f"{line} {segment(inner.text, last.value)}{semicolon}".strip()
    below = f"{inner.text[:start]}{target}get_ipython().run_line_magic({name!r}, {written!r})"
    # A call over several lines becomes one line: pad, so that the lines below keep their numbers.
    below += "\n" * inner.text[start:stop].count("\n") + "\n"
    return _with_sites(below, inner.above, offset)


MODELS = "*"
"""The line of a `%%flaxmodel` cell that names no model: it registers the models that the cell defined."""


def _timed(text: str, transform: Transform) -> str:
    """`text` with `%time CODE` replaced by its code, which it runs in the notebook's own namespace."""
    # From the last to the first, so that the positions of those before stay valid.
    for statement, _ in reversed(list(_statements(ast.parse(text).body, ()))):
        match statement:
            case ast.Expr(ast.Call(func, [ast.Constant("time"), ast.Constant(str(line))])):
                if ast.unparse(func) == "get_ipython().run_line_magic" and line.lstrip()[:1] not in ("", "-"):
                    code = f"{transform(line).strip()}  # %time"
                    text = text[: start_of(text, statement)] + code + text[end_of(text, statement) :]
    return text


def _with_sites(text: str, above: tuple[str, ...] = (), offset: int = 0) -> CellSource:
    """The cell `text` with its commands and other magics found."""
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
                    with suppress(FlaxMagicsError):  # a line that the command refused, which had ended the cell
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
    """Reads a command's line as name (`help` where it only shows that), options, and call where it takes one."""
    parsed = read(command, line if command.takes == "call" else line.rstrip("; "))
    if parsed.help or (not parsed.rest and name in ("flax_apply", "flax_init", "flax_grad", "flax_train")):
        return "help", parsed, None
    if name in ("flax_grad", "flax_train"):  # a run like that of an apply, without most of its options
        trains = name == "flax_train" or not parsed.options["eval"]
        options = {"train": trains, "key": (), "mutable": (), "eager": False}
        options |= dict.fromkeys(("samples", "keys_of", "variables"))
        parsed = parsed._replace(options={**options, **parsed.options})
    bare = name == "flax_summary" and parsed.rest.rstrip("; ").isidentifier()
    return name, parsed, parse_call(parsed.rest, command.name) if command.takes == "call" and not bare else None


def _statements(body: list[ast.stmt], path: tuple[ast.stmt, ...]) -> Iterator[tuple[ast.stmt, tuple[ast.stmt, ...]]]:
    """Yields every statement and the statements around it, in the order of the text."""
    for statement in body:
        yield statement, path
        for inner in blocks(statement):
            yield from _statements(inner, (*path, statement))


def blocks(statement: ast.stmt) -> list[list[ast.stmt]]:
    """The blocks of statements in a compound statement, in the order of the text."""
    inside: list[list[ast.stmt]] = []
    for block in (getattr(statement, name, []) for name in ("body", "handlers", "orelse", "finalbody", "cases")):
        # `handlers` and `cases` hold nodes with a body of their own; the others hold statements.
        inside += [block] if block and isinstance(block[0], ast.stmt) else [part.body for part in block]
    return inside


@dataclass(eq=False)
class ExecutedStatement:
    """A statement at the top level of a cell, as it was executed.

    Attributes:
      runs: (index of a run, the command that made it) for each of its runs; None where no command explains the run.
      failed: the cell ended with an error in this statement.
      took_effect: its command had changed the session before it failed: it has its lines, without a target. A training,
        of which the finished steps are told by the Run, is written as if it had ended there.
    """

    statement: ast.stmt
    site: CommandSite | None
    runs: list[tuple[int, CommandSite | None]] = field(default_factory=list)
    failed: bool = False
    took_effect: bool = False

    @property
    def trains(self) -> bool:
        """Whether it is a `%flax_train`."""
        return self.site is not None and self.site.name == "flax_train"


@dataclass(eq=False)
class CellRun:
    """One execution of a cell: the statements that ran, and the indices of `loose` runs that none of them explains."""

    cell: ExecutedCell
    source: CellSource
    statements: list[ExecutedStatement]
    loose: list[int] = field(default_factory=list)

    @property
    def label(self) -> str:
        """The cell as a comment names it: `In [3]`."""
        return "a cell" if self.cell.number is None else f"In [{self.cell.number}]"


def match(cells: Sequence[tuple[ExecutedCell, CellSource]], runs: Sequence[Run]) -> list[CellRun]:
    """Matches runs with the statements that made them. Returns the executions in order.

    A command at the top level made one run. A loop, or a call of a function with commands, made any number: it takes
    all runs that fit, but leaves as many as later commands of the cell need. Among equal lines the recorded line number
    of the run decides. A command that failed has the runs that it had made by then.
    """
    # Functions with commands stay callable from later cells.
    functions: list[CommandSite] = []
    cell_runs = []
    for cell, source in cells:
        statements = _executed(cell, source)
        sites = [source.sites_in(statement.statement) for statement in statements]
        queue = _RunQueue(runs, list(range(cell.first, min(cell.end, len(runs)))), cell)
        if statements and statements[-1].failed:
            last = statements[-1]
            last.took_effect = last.site is not None and _took_effect(last.site, cell)
            if last.site is not None and last.took_effect and last.site.name != "flax_train":
                last.site = source.sites[last.statement] = replace(last.site, target="")
                sites[-1] = [last.site]
            else:
                sites[-1] = [site for site in sites[-1] if any(map(site.is_at, cell.places))]
        for i, statement in enumerate(statements):
            if statement.site is not None:
                if not statement.failed or statement.took_effect:
                    queue.take_one(statement, statement.site)
                continue
            later = [site for inside in sites[i + 1 :] for site in inside if site.draws or site.name == "flaxmodel"]
            if not isinstance(statement.statement, Definition):
                queue.take_many(statement, [*sites[i], *reversed(functions)], later)
            functions += [site for site in sites[i] if site.in_function is not None]
        cell_runs.append(CellRun(cell, source, statements, queue.waiting))
    return cell_runs


def _took_effect(site: CommandSite, cell: ExecutedCell) -> bool:
    """Whether a command, in which the cell failed, had made a run or changed the session otherwise before.

    A training that is stopped fails its cell, and keeps the steps that were done.
    """
    places = [*cell.places, *([] if cell.stopped is None else [cell.stopped])]
    if site.above and (cell.line or 0) <= site.above:  # the cell's own magic, on its first line
        return any(place.line <= site.above for place in places)
    return any(map(site.is_at, places))


def _executed(cell: ExecutedCell, source: CellSource) -> list[ExecutedStatement]:
    """The statements of a cell that ran: all, or those up to the line of the error."""
    statements = source.statements()
    if cell.error is None:
        return statements
    line = (cell.line or 0) - source.offset
    if cell.line is not None and line < 1:  # the magic's own: what it had run of its body, and what was to come
        ran = [statement for statement in statements if end(statement.statement) <= cell.body - source.offset]
        statements = statements[: len(ran) + 1]
    else:
        statements = [statement for statement in statements if begin(statement.statement) <= line]
    if statements:
        statements[-1].failed = True
    return statements


def begin(statement: ast.stmt) -> int:
    """The first line of a statement, counting its decorators."""
    decorators: list[ast.expr] = getattr(statement, "decorator_list", [])
    return min([statement.lineno, *(decorator.lineno for decorator in decorators)])


def end(statement: ast.stmt) -> int:
    """The last line of a statement."""
    return statement.end_lineno or statement.lineno


_REPEATING = FunctionNode | ast.For | ast.AsyncFor | ast.While
"""In these, a command can make several runs in one execution of the statement."""


@dataclass(eq=False)
class _RunQueue:
    """The runs of one cell, by index, that wait for the statement that made them."""

    runs: Sequence[Run]
    waiting: list[int]
    cell: ExecutedCell

    def take_one(self, statement: ExecutedStatement, site: CommandSite) -> None:
        """Assigns the first waiting run that fits to a command; runs before it are its too, but unexplained."""
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
        """Assigns runs to a statement with commands inside, or with calls of functions that have commands."""
        places = {place.run: place for place in self.cell.places}
        used: set[CommandSite] = set()
        while self.waiting:
            run, place = self.runs[self.waiting[0]], places.get(self.waiting[0])
            fitting = [site for site in sites if site.matches(run)]
            # In the order of `sites`: a function that was defined again comes before the one it replaced.
            site = next((site for site in fitting if place and site.is_at(place)), None)
            if site is None:
                # Of equal lines, each must have run once before one runs again.
                unused = [site for site in fitting if site not in used]
                repeating = (site for site in fitting if any(isinstance(node, _REPEATING) for node in site.path))
                site = next(iter([*unused, *repeating]), None)
                if site is None:
                    # No command of this statement explains the run: it may belong to the next.
                    return
                needed = sum(1 for other in later if other.matches(run))
                # Leave the runs that later commands of the cell cannot do without.
                if needed and sum(1 for index in self.waiting if site.matches(self.runs[index])) <= needed:
                    return
            used.add(site)
            statement.runs.append((self.waiting.pop(0), site))
