"""A session as a script: its cells in the order in which they ran, and plain Flax in the place of every command."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..cells.journal import ExecutedCell, Load
from ..cells.names import binds, reads
from .cells import CellRun, CellSource, CommandSite, ExecutedStatement, begin, blocks
from .commands import SESSION_VARIABLES, lines_of_command
from .context import RunGroups, ScriptContext, ScriptModel
from .edit import Edit, SessionNames, commented, lines_of_statement
from .functions import CannotSay, Function, JittedFunction
from .writer import Lines, LineWriter


@dataclass(eq=False)
class RootKeyTracker:
    """Where the root key of a script stands, and what moves it to where the next run finds it.

    Attributes:
      seed: what it starts from, before any restart.
      at: seed and number of the last draw that was made of it; None while it is not there.
      unexported: filled with what the script's own lines do not explain.
    """

    groups: RunGroups
    writer: LineWriter
    seed: int
    unexported: list[str]
    at: tuple[int, int] | None = None

    def before(self, statement: ExecutedStatement) -> list[str]:
        """The lines that bring the root key to where the runs of `statement` find it; none where it is there."""
        site = statement.site
        if site is not None and site.name == "flax_key" and site.given.options["seed"] is not None:
            self.at = site.given.options["seed"], 0
            return []
        runs = self.groups.runs
        drawn = [index for index, site in statement.made if site is not None and not runs[index].replayed]
        if not drawn:
            return []
        run = runs[drawn[0]]
        lines = self._start()
        assert self.at is not None
        seed, number = self.at
        if drawn[0] in self.groups.leader and (seed, number) == (run.seed, run.draw):
            return lines
        if seed != run.seed or run.draw - 1 < number:
            lines, number = [self.writer.start(run.seed)], 0
        behind = run.draw - 1 - number
        if behind:
            many = "a draw" if behind == 1 else f"{behind} draws"
            self.unexported.append(f"{many} before draw {run.draw} of seed {run.seed} that no cell made")
            lines += [f"# Left out: {many} that no cell made.", *self.writer.advance(behind)]
        self.at = run.seed, run.draw - 1
        return lines

    def after(self, statement: ExecutedStatement) -> None:
        """The statement has run."""
        drawn = [(index, site) for index, site in statement.made if not self.groups.runs[index].replayed]
        if drawn:
            index, site = drawn[-1]
            stays = site is not None and self.groups.runs[index].kind.opens and self.groups.stays(site)
            self._stand(index, stays=stays)

    def skip(self, indices: Sequence[int]) -> list[str]:
        """The lines that move the root key on in the place of runs that have none."""
        moving = (i for i in indices if not self.groups.runs[i].replayed and i not in self.groups.leader)
        draws = sum(self.groups.runs[index].draws or 1 for index in moving)
        if not draws:
            return []
        lines = [*self._start(), *self.writer.advance(draws)]
        self._stand(indices[-1])
        return lines

    def unexplained(self, indices: Sequence[int]) -> list[str]:
        """The same for runs that nothing in the cells explains, which the script says."""
        lines = self.skip(indices)
        if not lines:
            return []
        runs = [self.groups.runs[index] for index in indices]
        calls = ", ".join(dict.fromkeys(" ".join(run.call.split()) for run in runs))
        draws = sum(run.draws or 1 for run in runs if not run.replayed)
        self.unexported.append(
            f"{'a draw' if draws == 1 else f'{draws} draws'} that no line of the cells explains: {calls}"
        )
        at = 1 if lines[0].startswith(f"{self.writer.root} = jax.random.key(") else 0
        return [*lines[:at], f"# Left out: {self.unexported[-1]}.", *lines[at:]]

    def _stand(self, index: int, *, stays: bool = False) -> None:
        run = self.groups.runs[index]
        self.at = run.seed, run.draw + (run.draws or 1) - 1 - stays

    def _start(self) -> list[str]:
        """The line that makes the root key, where it is not there yet."""
        if self.at is not None:
            return []
        self.at = self.seed, 0
        return [self.writer.start(self.seed)]


@dataclass(eq=False)
class Script:
    """Writes the cells one by one.

    Attributes:
      root: the root key.
      names: those that the script has not.
      unexported: what could not be exported, each with its reason.
      blocks: what has been written, one block for each execution of a cell.
      functions: the jitted functions that are there; `of_site` has those that each place calls.
      bound_in: name → the block in which it was given a value last.
      futures: what the cells import from `__future__`.
      failed: how many cells failed and left nothing.
    """

    groups: RunGroups
    models: Mapping[str, ScriptModel]
    writer: LineWriter
    root: RootKeyTracker
    unexported: list[str]
    names: SessionNames = field(default_factory=SessionNames)
    blocks: list[list[Lines]] = field(default_factory=list)
    functions: dict[JittedFunction, Function] = field(default_factory=dict)
    of_site: dict[CommandSite, JittedFunction] = field(default_factory=dict)
    bound_in: dict[str, int] = field(default_factory=dict)
    futures: list[str] = field(default_factory=list)
    failed: int = 0

    def __post_init__(self) -> None:
        self.context = ScriptContext(self.writer, self.groups, self.models, self._define)
        self._before: list[Lines] = []
        self._inline: list[str] = []
        self._made: list[tuple[int, CommandSite | None]] = []
        self._declared: dict[ast.stmt, set[str]] = {}
        self._written: set[CommandSite] = set()
        self._loads: Iterator[Load] = iter(())

    # -- one execution of a cell

    def cell(self, cell_run: CellRun) -> None:
        """Writes one execution of a cell."""
        cell, source, statements = cell_run.cell, cell_run.source, cell_run.statements
        self.blocks.append([])
        self.context.states = {row.name: row.state for row in cell.registered}
        self.context.load, self.context.gone = None, cell.gone
        self._loads = iter(cell.loads)
        if cell.error is not None and _left_nothing(cell_run):
            self.failed += 1
            return
        if any(not statement.failed for statement in statements) or source.opaque:
            self._write([f"# {line}".rstrip() for line in source.above])
        self.names.lose(source.captured, "a magic captures it")
        keep, restore = self._kept_modules(cell.registered)
        self._write(keep, ours=True)
        text = source.text.split("\n")
        last = 0
        for on_one_line in _by_line(statements):
            start = len(self.blocks[-1])
            for statement in on_one_line:
                gap = text[last : begin(statement.statement) - 1]
                last = statement.statement.end_lineno or statement.statement.lineno
                if statement.failed:
                    self._write_failed(cell, source, statement.statement, gap)
                else:
                    self._write_statement(statement, source, gap)
            written = [line for lines in self.blocks[-1][start:] for line in lines.text]
            parts = [line for s in on_one_line for line in lines_of_statement(source, s.statement)]
            if len(on_one_line) > 1 and written[-len(parts) :] == parts:  # nothing of it was replaced
                gap = written[: -len(parts)]
                self.blocks[-1][start:] = [Lines([*gap, *text[begin(on_one_line[0].statement) - 1 : last]], ours=False)]
        self._skip(cell_run.loose)
        if len(statements) == len(source.tree.body):
            self._write(text[last:])
        self._write(restore, ours=True)

    def _write(self, lines: list[str], *, ours: bool = False) -> None:
        if lines:
            self.blocks[-1].append(Lines(lines, ours=ours))

    def _write_failed(self, cell: ExecutedCell, source: CellSource, statement: ast.stmt, gap: list[str]) -> None:
        """The statement in which a cell failed. Of one that runs others it is not known which of its names have a value."""
        what = "A cell" if cell.number is None else f"In [{cell.number}]"
        lines = commented(lines_of_statement(source, statement))
        self._write([*gap, f"# {what} failed here with {cell.error}:", *lines])
        unknown = binds(statement) if blocks(statement) else binds(statement) - self.names.bound
        self.names.lose(unknown, f"{what} failed")

    def _skip(self, indices: Sequence[int]) -> None:
        """Runs that no line of the cells explains."""
        self.context.skipped(indices, "its variables come from a draw that no line of the cells explains")
        self._write(self.root.unexplained(indices), ours=True)

    # -- one statement

    def _write_statement(self, executed: ExecutedStatement, source: CellSource, gap: list[str]) -> None:
        """Writes a statement below the lines of comment and the empty ones above it."""
        statement, site = executed.statement, executed.site
        self._before, self._made = [], executed.made
        if site is not None and site.name == "flax_load":
            self.context.load = next(self._loads, None)
            if self.context.load is not None:
                self.root.at = self.context.load.seed, self.context.load.draws
        self._skip([index for index, site in executed.made if site is None])
        self._prepare(executed)
        edit = Edit(source, self.names, self._command, self.writer)
        self._declared = edit.declared
        lines, code = edit.statement(statement)
        self._written |= edit.written
        self.futures += edit.futures
        for line, reason in edit.left_out:
            self.unexported.append(f"{line}: {reason}")
            assigned = self.models if _assigns_variables(statement) else assigned_by(site)
            self.context.lost.update(dict.fromkeys(assigned, "its variables were set by a line that is left out"))
        skipped = [i for i, place in executed.made if place is not None and not (code and place in self._written)]
        self.context.skipped(skipped, "its variables come from a line that is left out")
        self.root.after(executed)
        for name in binds(statement):
            self.bound_in[name] = len(self.blocks) - 1
        self.blocks[-1] += self._before
        if lines or gap:
            self.blocks[-1].append(Lines([*gap, *lines], ours=bool(edit.written)))
        if skipped:
            self._write(self.root.skip(skipped), ours=True)

    def _command(self, site: CommandSite) -> list[str]:
        """The lines of a command. Raises `CannotSay`."""
        self._inline = []
        indices = self.groups.of_site.get(site, [])
        reason = self.names.missing(_read_by(site))
        if reason is not None:
            raise reason
        try:
            lines = lines_of_command(self.context, site, indices)
        except CannotSay as error:
            if indices or not site.path or not site.draws:
                raise
            shown = " ".join(f"{site.target} %{site.name} {site.line}".split())
            return [f"# Left out: {error}.", f"# {shown}", f"raise NotImplementedError({self.writer.text(shown)})"]
        assigned = self.context.assigned
        if site.in_function is not None:
            self._declared.setdefault(site.in_function, set()).update(assigned if lines else ())
        else:
            self.names.bind(assigned)
            self.bound_in.update(dict.fromkeys(assigned, len(self.blocks) - 1))
        return [*self._inline, *lines]

    def _prepare(self, executed: ExecutedStatement) -> None:
        """What must stand before a statement: the root key where it has to be, variables that are not there yet."""
        lines = self.root.before(executed)
        self._before += [Lines(lines)] if lines else []
        unset: set[str] = set()
        for index, site in executed.made:
            if site is None:
                continue
            run = self.groups.runs[index]
            if site.in_function is not None and executed.statement not in site.path and site in self.of_site:
                self._define_again(self.of_site[site], {self.groups.version(i) for i, s in executed.made if s is site})
            model = self.models.get(run.model or "")
            if model is None or run.made is None or run.made.added or model.holds or model.name in unset:
                continue
            if self.context.is_conditional(site):
                unset.add(model.name)
                self._before.append(Lines([f"{model.variables} = None"]))

    # -- functions

    def _define(self, jitted: JittedFunction, site: CommandSite) -> str:
        """See `ScriptContext.define`."""
        here = len(self.blocks) - 1
        self.of_site[site] = jitted
        known = self.functions.get(jitted)
        name = known.name if known is not None else self.writer.free.take(*jitted.names)
        by_statement = self.groups.versions.get(site, [])
        if site.in_function is None:
            by_statement = [{self.groups.version(index) for index, place in self._made if place is site}]
        if any(len(versions) > 1 for versions in by_statement):  # the model changes while the statement runs
            self._inline = jitted.lines(self.writer, name)
            if known is None or site.in_function is None:
                self.functions[jitted] = Function(name, object(), here)
            return name
        if known is None:
            version = next((version for versions in by_statement for version in versions), None)
            self.functions[jitted] = Function(name, version, -1)
            self._write_function(jitted)
        elif site.in_function is None:
            self._define_again(jitted, by_statement[0])
        return name

    def _define_again(self, jitted: JittedFunction, versions: set[Any]) -> None:
        """Makes sure that a function that is there is the one of the model as it is in the runs to come."""
        function = self.functions[jitted]
        if len(versions) == 1 and versions != {function.version}:
            (function.version,) = versions
            self._write_function(jitted)
        function.used = len(self.blocks) - 1

    def _write_function(self, jitted: JittedFunction) -> None:
        """Writes a function beside its model, or before the statement at hand where an older one is used in between."""
        function, here = self.functions[jitted], len(self.blocks) - 1
        lines = Lines(self.writer.fitted(jitted.lines(self.writer, function.name)), apart=True)
        place = self.bound_in.get(jitted.model, here)
        (self.blocks[place] if function.used < place < here else self._before).append(lines)
        function.used = here

    # -- NNX modules that a cell made again

    def _kept_modules(self, rows: Sequence[Any]) -> tuple[list[str], list[str]]:
        """Lines around a cell that builds anew what the session kept."""
        keep: list[str] = []
        restore: list[str] = []
        for row in rows:
            model = self.models.get(row.name)
            if model is None or not model.holds or row.variables != "kept" or row.state == "new":
                continue
            if (row.state == "unchanged" and model.construction) or model.name not in self.names.bound:
                continue  # its line is left out
            old = self.writer.variable(f"{model.name}_before")
            keep.append(f"{old} = {model.name}")
            if row.state == "unchanged":
                restore.append(f"{model.name} = {old}")
            else:
                self.writer.needs.add("nnx")
                restore.append(f"nnx.update({model.name}, nnx.state({old}, nnx.Not(nnx.RngState)))")
        return keep, restore


def _left_nothing(cell_run: CellRun) -> bool:
    """Whether nothing of a cell that failed is left: no statement had run, and the one that failed runs no others."""
    cell = cell_run.cell
    return cell.first == cell.end and all(
        statement.failed and not blocks(statement.statement) for statement in cell_run.statements
    )


def _by_line(statements: Sequence[ExecutedStatement]) -> list[list[ExecutedStatement]]:
    """The statements, those together that share a line."""
    out: list[list[ExecutedStatement]] = []
    for statement in statements:
        if out and begin(statement.statement) <= (out[-1][-1].statement.end_lineno or 0):
            out[-1].append(statement)
        else:
            out.append([statement])
    return out


def _read_by(site: CommandSite) -> set[str]:
    """Names that the line of a command reads."""
    texts = [site.given.options.get("variables") or ""]
    if site.name in ("flax_apply", "flax_init", "flax_vars", "flaxmodel"):
        texts.append(site.call.call if site.call is not None else SESSION_VARIABLES.sub(r"\2", site.given.rest))
    found: set[str] = set()
    for text in texts:
        try:
            found |= {name for statement in ast.parse(text).body for name in reads(statement)}
        except SyntaxError:  # the models of a `%%flaxmodel` cell
            continue
    return found


def assigned_by(site: CommandSite | None) -> Iterable[str]:
    """The model whose variables `%flax_vars net = …` sets."""
    if site is None or site.name != "flax_vars" or "=" not in site.given.rest:
        return ()
    return (site.given.rest.partition("=")[0].strip(),)


def _assigns_variables(statement: ast.stmt) -> bool:
    """Whether `session().models['net'].variables = …` may stand there."""
    return any(
        isinstance(node, ast.Attribute) and node.attr == "variables" and isinstance(node.ctx, ast.Store)
        for node in ast.walk(statement)
    )
