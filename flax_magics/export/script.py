"""Writes the cells of a session in the order in which they ran, with plain Flax in the place of every command."""

from __future__ import annotations

import ast
import importlib.metadata
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import chain

import jax

from ..base.text import plural
from ..cells.journal import Load, Registered
from .cells import CellRun, CellSource, CommandSite, ExecutedStatement, FunctionNode, begin, blocks, end
from .commands import LINES, SESSION_VARIABLES, set_aside
from .context import CommandLines, ScriptContext, initialises
from .edit import (
    Edit,
    assigned_by,
    binds,
    by_line,
    imported,
    lines_of_statement,
    reads,
    sets_variables,
)
from .functions import CannotSay, Function, JittedFunction
from .writer import Lines, draws, joined, tried_until


@dataclass(eq=False)
class RootKeyTracker:
    """Tracks the script's root key, so that each run finds it where the session had it.

    Attributes:
      seed: what the root key starts from.
      at: seed and number of the last draw taken from it; None before the script has made it.
    """

    context: ScriptContext
    seed: int
    at: tuple[int, int] | None = None

    def before(self, statement: ExecutedStatement) -> list[str]:
        """The lines that bring the root key to the draw that `statement` begins with; none if it is there."""
        site, groups, writer = statement.site, self.context.groups, self.context.writer
        # The restart itself is a line of the command.
        if site is not None and site.name == "flax_key" and site.parsed.options["seed"] is not None:
            self.at = site.parsed.options["seed"], 0
            return []
        drawn = [index for index, site in statement.runs if site is not None and not groups.runs[index].replayed]
        if not drawn:
            return []
        run = groups.runs[drawn[0]]
        lines, (seed, number) = self._started()
        # The apply of an init: the draw is made already.
        if drawn[0] in groups.leader and (seed, number) == (run.seed, run.draw):
            return lines
        if seed != run.seed or run.draw - 1 < number:
            lines, number = [writer.start(run.seed)], 0
        behind = run.draw - 1 - number
        if behind:
            many = draws(behind)
            self.context.unexported.append(f"{many} before draw {run.draw} of seed {run.seed} that no cell made")
            lines += [f"# Left out: {many} that no cell made.", *writer.advance(behind)]
        self.at = run.seed, run.draw - 1
        return lines

    def after(self, statement: ExecutedStatement) -> None:
        """Moves on past the draws of a statement that was written."""
        drawn = [row for row in statement.runs if not self.context.groups.runs[row[0]].replayed]
        if drawn:
            self._stand(*drawn[-1])

    def skip(
        self, indices: Sequence[int], *, before: tuple[int, int] | None = None, unexplained: bool = False
    ) -> list[str]:
        """The lines that move the root key past runs which have no lines of their own.

        Args:
          before: where the root key stood before their statement.
          unexplained: no command in the cells made them, which a comment says.
        """
        runs = {index: self.context.groups.runs[index] for index in indices}
        drawn = {index: run.samples or 1 for index, run in runs.items() if not run.replayed}
        # The run after an init shares its draw, which is counted there, unless the init has left the root key for it.
        leader = self.context.groups.leader
        open_to = {index for index, run in runs.items() if before == (run.seed, run.draw - 1)}
        moves = sum(many for index, many in drawn.items() if index not in leader or index in open_to)
        if not moves:
            return []
        said = []
        if unexplained:
            calls = ", ".join(dict.fromkeys(" ".join(run.call.split()) for run in runs.values()))
            reason = f"{draws(sum(drawn.values()))} that no line of the cells explains: {calls}"
            self.context.unexported.append(reason)
            said = [f"# Left out: {reason}."]
        lines = [*self._started()[0], *said, *self.context.writer.advance(moves)]
        self._stand(indices[-1])
        return lines

    def _stand(self, index: int, site: CommandSite | None = None) -> None:
        """Records where the root key is after a run; `site` is the command that made it, if known."""
        groups = self.context.groups
        run = groups.runs[index]
        stays = site is not None and run.kind.opens and groups.stays(site)
        self.at = run.seed, run.draw + (run.samples or 1) - 1 - stays

    def _started(self) -> tuple[list[str], tuple[int, int]]:
        """The line that makes the root key, none if it exists; and the draw it is at."""
        if self.at is not None:
            return [], self.at
        self.at = self.seed, 0
        return [self.context.writer.start(self.seed)], self.at


@dataclass(eq=False)
class Script:
    """Writes a script, cell by cell.

    Attributes:
      root: the root key.
      blocks: what is written so far, a block for each execution of a cell.
      functions: jitted functions that are defined; `of_site`: command → the one that it calls.
      bound_in: name → index of the block that assigned it last.
      futures: names that the cells import from `__future__`.
      failed: how many cells failed without leaving anything.
      stops_in_functions: a cell failed in a function that had run commands by then.
    """

    context: ScriptContext
    root: RootKeyTracker
    blocks: list[list[Lines]] = field(default_factory=list)
    functions: dict[JittedFunction, Function] = field(default_factory=dict)
    of_site: dict[CommandSite, JittedFunction] = field(default_factory=dict)
    bound_in: dict[str, int] = field(default_factory=dict)
    futures: list[str] = field(default_factory=list)
    failed: int = 0
    stops_in_functions: bool = False

    def __post_init__(self) -> None:
        self.context.define = self._define
        self._before: list[Lines] = []
        # Definitions that stand right where they are called.
        self._inline: list[str] = []
        self._runs: list[tuple[int, CommandSite | None]] = []
        self._declared: dict[FunctionNode, set[str]] = {}
        self._written: set[CommandSite] = set()
        # The statement that is written now failed after some runs, and must stop there.
        self._stopping = False
        self._loads: Iterator[Load] = iter(())

    # -- one execution of a cell

    def cell(self, cell_run: CellRun) -> None:
        """Writes one execution of a cell, as a block of its own."""
        cell, source, statements = cell_run.cell, cell_run.source, cell_run.statements
        self.blocks.append([])
        self.context.states = {row.name: row.state for row in cell.registered}
        self.context.restored = {row.name for row in cell.registered if row.variables == "restored"}
        self.context.load, self.context.gone = None, cell.gone
        self._loads = iter(cell.loads)
        stopped = [each for each in statements if each.failed and (each.runs or each.took_effect)]
        fails_at_once = not stopped and all(each.failed and not blocks(each.statement) for each in statements)
        # It made no run and bound no name, so that a comment would be all that is left of it.
        if cell.error is not None and cell.first == cell.end and fails_at_once:
            self.failed += 1
            return
        if any(not statement.failed for statement in statements) or source.opaque:
            self._write([f"# {line}".rstrip() for line in source.above])
        self.context.names.lose(source.captured, "a magic captures it")
        keep, restore = self._kept_modules(cell.registered)
        for row in cell.registered:
            keep += set_aside(self.context, row.name, [any(note.kind == "replaced" for note in row.notes)])
        self._write(keep, ours=True)
        text = source.text.split("\n")
        last = 0
        for on_one_line in by_line(statements):
            start = len(self.blocks[-1])
            for statement in on_one_line:
                gap = text[last : begin(statement.statement) - 1]
                last = end(statement.statement)
                if statement.failed and statement not in stopped:
                    self._write_failed(cell_run, statement.statement)
                else:
                    self._write_statement(statement, cell_run, gap)
                if statement in stopped and not statement.trains:
                    self._lose(cell_run, statement.statement)
            written = [line for lines in self.blocks[-1][start:] for line in lines.text]
            parts = [line for each in on_one_line for line in lines_of_statement(source, each.statement)]
            if len(on_one_line) > 1 and written[-len(parts) :] == parts:  # unchanged: written on one line again
                gap = written[: -len(parts)]
                self.blocks[-1][start:] = [Lines([*gap, *text[begin(on_one_line[0].statement) - 1 : last]], ours=False)]
        self._skip(cell_run.loose)
        # Comments at the end of the cell, unless it failed before them.
        if len(statements) == len(source.tree.body):
            self._write(text[last:])
        self._write(restore, ours=True)

    def _write(self, lines: list[str], *, ours: bool = False) -> None:
        if lines:
            self.blocks[-1].append(Lines(lines, ours=ours))

    def _write_failed(self, cell_run: CellRun, statement: ast.stmt) -> None:
        """Leaves the statement out that a cell failed in, and what stands below it, in one line.

        Of a compound statement, any name may be left without a value.
        """
        rest = "" if statement is cell_run.statements[0].statement else "the rest of "
        self._write([f"# Left out: {rest}{cell_run.label}, which failed with {cell_run.cell.error}."])
        self._lose(cell_run, statement)

    def _lose(self, cell_run: CellRun, statement: ast.stmt) -> None:
        """Records which names have no value after the statement that a cell failed in."""
        names = self.context.names
        names.lose(
            binds(statement) if blocks(statement) else binds(statement) - names.bound, f"{cell_run.label} failed"
        )

    def _skip(self, indices: Sequence[int]) -> None:
        """Moves the root key past runs that no command in the cells made."""
        self.context.skipped(indices, "its variables come from a draw that no line of the cells explains")
        self._write(self.root.skip(indices, unexplained=True), ours=True)

    # -- one statement

    def _write_statement(self, executed: ExecutedStatement, cell_run: CellRun, gap: list[str]) -> None:
        """Writes a statement, below `gap`: the comments and empty lines above it."""
        context, statement, site, source = self.context, executed.statement, executed.site, cell_run.source
        self._before, self._runs, self._stopping = [], executed.runs, executed.failed and executed.site is None
        if site is not None and site.name == "flax_load":
            context.load = next(self._loads, None)
            if context.load is not None:
                self.root.at = context.load.seed, context.load.draws - context.groups.goes_on(context.load)
        self._skip([index for index, site in executed.runs if site is None])
        # Before the statement's own lines, since its commands rely on the root key and on defined functions.
        self._prepare(executed)
        edit = Edit(source, context, self._command, self.futures)
        self._declared = edit.declared
        lines, code = edit.statement(statement)
        if self._stopping and code:
            lines = self._stopped(executed, cell_run, lines)
        elif executed.took_effect and not executed.trains:
            lines = [f"# Here {cell_run.label} failed with {cell_run.cell.error}, after this:", *lines]
        self._written |= edit.written
        if edit.left_out:
            assigned = context.models if any(map(sets_variables, ast.walk(statement))) else assigned_by(site)
            context.lost.update(dict.fromkeys(assigned, "its variables were set by a line that is left out"))
        skipped = [i for i, place in executed.runs if place is not None and not (code and place in self._written)]
        context.skipped(skipped, "its variables come from a line that is left out")
        before = self.root.at
        self.root.after(executed)
        bound = binds(statement)
        self.bound_in.update(dict.fromkeys(bound, len(self.blocks) - 1))
        models = ((each.name, each.construction.partition("(")[0]) for each in context.models.values())
        context.apart |= {name for name, built in models if built.partition(".")[0] in bound}
        if site is None:  # a module that is built again holds its variables anew
            context.laid_out -= bound
        self.blocks[-1] += self._before
        if lines or gap:
            self.blocks[-1].append(Lines([*gap, *lines], ours=bool(edit.written)))
        if skipped:
            self._write(self.root.skip(skipped, before=before), ours=True)

    def _command(self, site: CommandSite) -> list[str]:
        """The lines of a command, as `Edit` asks for them. Raises CannotSay."""
        context, self._inline = self.context, []
        indices = context.groups.of_site(site)
        reason = context.names.missing(_read_by(site))
        if reason is not None:
            raise reason
        context.assigned = set()
        stop = self._stop_before(site)
        try:
            if site.name not in LINES:
                raise CannotSay("what it does has no lines in a script")
            if context.gone and site.draws:
                gone = "the history of its run is gone: %flax_load brought another"
                context.lost[site.model] = gone  # which it may have initialised, or changed
                raise CannotSay(gone)
            lines = LINES[site.name](CommandLines(context, site, indices))
        except CannotSay as error:
            if indices or not site.path or not site.draws or context.gone:
                raise
            # A branch that never ran must not run silently in the script either.
            shown = " ".join(f"{site.target} %{site.name} {site.line}".split())
            return [
                *stop,
                f"# Left out: {error}.",
                f"# {shown}",
                f"raise NotImplementedError({context.writer.text(shown)})",
            ]
        if site.in_function is not None:
            self._declared.setdefault(site.in_function, set()).update(context.assigned if lines else ())
        else:
            context.names.bind(context.assigned)
            self.bound_in.update(dict.fromkeys(context.assigned, len(self.blocks) - 1))
        return [*stop, *self._inline, *lines]

    # -- a statement that failed after some runs

    def _stop_before(self, site: CommandSite) -> list[str]:
        """The lines above those of a command that stop a statement after the runs which it made before it failed."""
        in_function = site.in_function is not None
        if not site.draws or not (self.stops_in_functions if in_function else self._stopping):
            return []
        unit, left = self.context.writer.unit, self._runs_left
        if in_function:
            self.context.assigned.add(left)
            if left not in self.bound_in:
                self._before.append(Lines([self._never_stop]))
                self.bound_in[left] = len(self.blocks) - 1
        return [f"if {left} == 0:", f"{unit}raise KeyboardInterrupt", f"{left} -= 1"]

    @property
    def _runs_left(self) -> str:
        return self.context.writer.variable("runs_left")

    @property
    def _never_stop(self) -> str:
        return f"{self._runs_left} = float({self.context.writer.text('inf')})"

    def _stopped(self, executed: ExecutedStatement, cell_run: CellRun, lines: list[str]) -> list[str]:
        """The lines of a statement that failed, with what stops it where it had stopped."""
        many = sum(site is not None and site.draws for _, site in executed.runs)
        stopped = f"{cell_run.label} failed here with {cell_run.cell.error}, after {plural(many, 'run')}."
        counting = f"{self._runs_left} = {many}"
        tried = tried_until(lines, str(cell_run.cell.error), self.context.writer.unit)
        return [f"# {stopped}", counting, *tried, *([self._never_stop] if self.stops_in_functions else [])]

    def _prepare(self, executed: ExecutedStatement) -> None:
        """Writes what must come before a statement: moves of the root key, and variables that are tested for."""
        groups = self.context.groups
        lines = self.root.before(executed)
        self._before += [Lines(lines)] if lines else []
        unset: set[str] = set()
        for index, site in executed.runs:
            if site is None:
                continue
            run = groups.runs[index]
            # A function of an earlier cell is called: its model may have been edited since.
            if site.in_function is not None and executed.statement not in site.path and site in self.of_site:
                versions = {groups.versions[other] for other, place in executed.runs if place is site}
                self._define_again(self.of_site[site], versions)
            model = self.context.models.get(run.model or "")
            if model is None or model.holds or model.name in unset or not initialises(run):
                continue
            if self.context.is_conditional(site):
                unset.add(model.name)
                self._before.append(Lines([f"{model.variables} = None"]))

    # -- functions

    def _define(self, jitted: JittedFunction, site: CommandSite) -> str:
        """Defines a jitted function where needed; see `ScriptContext.define`."""
        groups, writer = self.context.groups, self.context.writer
        self.of_site[site] = jitted
        known = self.functions.get(jitted)
        name = known.name if known is not None else writer.free.take(*jitted.names)
        runs_by_statement = groups.by_statement.get(site, [])
        if site.in_function is None:
            runs_by_statement = [[index for index, place in self._runs if place is site]]
        by_statement = [{groups.versions[index] for index in indices} for indices in runs_by_statement]
        if any(len(versions) > 1 for versions in by_statement):  # edited while it runs: define it at each call
            self._inline = jitted.lines(writer, name)
            if known is None or site.in_function is None:
                self.functions[jitted] = Function(name, object(), len(self.blocks) - 1)
            return name
        if known is None:
            version = next((version for versions in by_statement for version in versions), None)
            self.functions[jitted] = Function(name, version, -1)
            self._write_function(jitted)
        elif site.in_function is None:
            self._define_again(jitted, by_statement[0])
        return name

    def _define_again(self, jitted: JittedFunction, versions: set[object]) -> None:
        """Defines a function once more if the coming runs have another version of the model's code.

        Of a training that goes on nothing tells the version of each part: what the function reads is bound again then.
        """
        function = self.functions[jitted]
        if len(versions) == 1 and versions != {function.version}:
            (function.version,) = versions
            self._write_function(jitted)
        elif not versions:
            (definition,) = ast.parse("\n".join(jitted.lines(self.context.writer, function.name))).body
            if any(self.bound_in.get(name, -1) > function.used for name in reads(definition)):
                self._write_function(jitted)
        function.used = len(self.blocks) - 1

    def _write_function(self, jitted: JittedFunction) -> None:
        """Writes a function beside its model; or right before the statement, if an older version is used in between."""
        function, here, writer = self.functions[jitted], len(self.blocks) - 1, self.context.writer
        lines = Lines(writer.fitted(jitted.lines(writer, function.name)), apart=True)
        place = self.bound_in.get(jitted.model, here)
        (self.blocks[place] if function.used < place < here else self._before).append(lines)
        function.used = self.bound_in[function.name] = here

    # -- NNX modules that a cell made again

    def _kept_modules(self, rows: Sequence[Registered]) -> tuple[list[str], list[str]]:
        """Lines before and after a cell that builds NNX modules again where the session kept the old ones."""
        keep: list[str] = []
        restore: list[str] = []
        for row in rows:
            model = self.context.models.get(row.name)
            if model is None or not model.holds or row.variables != "kept" or row.state == "new":
                continue
            if (row.state == "unchanged" and model.construction) or model.name not in self.context.names.bound:
                continue  # nothing builds it again: its line is left out, or its name is not bound
            old = self.context.writer.variable(f"{model.name}_before")
            keep.append(f"{old} = {model.name}")
            if row.state == "unchanged":
                restore.append(f"{model.name} = {old}")
            else:
                # The new object gets the old values; the streams' state is set by each run.
                restore.append(f"nnx.update({model.name}, nnx.state({old}, nnx.Not(nnx.RngState)))")
        return keep, restore

    # -- the whole of it

    def finished(self, title: str, sources: Sequence[CellSource]) -> str:
        """The text of the finished script; `sources` are the cells."""
        self._add_head(sources)
        if self.failed:
            noun, verb = ("cell", "is") if self.failed == 1 else ("cells", "are")
            self.blocks.append([Lines([f"# {self.failed} {noun} that failed and left nothing {verb} left out."])])
        writer, versions = self.context.writer, f"jax {jax.__version__} and flax {importlib.metadata.version('flax')}"
        above = [f'"""{title}, as plain JAX and Flax.', "", f"Written by %flax_export, with {versions}."]
        if writer.labels:
            above.append(f"On the same versions and machine {writer.digest} prints the digests of the session.")
        above.append('"""')
        if self.futures:
            above += ["", f"from __future__ import {', '.join(sorted(set(self.futures)))}"]
        # `display` is a name that only a notebook has.
        parsed = [ast.parse("\n".join(lines.text)) for lines in chain.from_iterable(self.blocks)]
        displays = any("display" in reads(statement) for tree in parsed for statement in tree.body)
        if displays and "display" not in self.context.names.bound:
            above += ["", "display = print  # as a notebook has it"]
        return "\n".join(above) + "\n\n" + joined(self.blocks)

    def _add_head(self, sources: Sequence[CellSource]) -> None:
        """Inserts our imports, and the function that prints digests, above the first lines that use them.

        They come below the cell that imports JAX, so that what must be set before it (`os.environ`) stays first.
        """
        writer, blocks = self.context.writer, self.blocks
        first = next(((i, j) for i, block in enumerate(blocks) for j, lines in enumerate(block) if lines.ours), None)
        if first is None:
            return
        cell = next((i for i, source in enumerate(sources) if imported(source.tree) & {"jax", "flax"}), None)
        if cell is not None and cell < first[0]:
            first = cell + 1, 0
        block, place = first
        above = [line for lines in chain(*blocks[:block], blocks[block][:place]) for line in lines.text]
        nodes = (node for lines in chain(*blocks) if lines.ours for node in ast.walk(ast.parse("\n".join(lines.text))))
        needed = {ast.unparse(node.value) for node in nodes if isinstance(node, ast.Attribute)}
        needed |= {"jax"} if writer.labels else set()
        # Not twice: the user's own cells may have the same imports above.
        imports = (each for each in ast.parse("\n".join(above)).body if isinstance(each, (ast.Import, ast.ImportFrom)))
        there = {alias.asname or alias.name for statement in imports for alias in statement.names}
        lines_of = (writer.IMPORTS[name] for name in needed & writer.IMPORTS.keys())
        missing = sorted(line for line in lines_of if line.split()[-1] not in there)
        head = [Lines(missing, apart=place > 0)] if missing else []
        if writer.labels:
            head.append(Lines(writer.fitted(writer.digest_function(_leaves(self.context))), apart=True))
        if place:
            blocks[block][place:place] = head
        else:
            blocks.insert(block, head)


def _read_by(site: CommandSite) -> set[str]:
    """The names that a command's line reads."""
    # In commands other than a training, `--eval` is the mode.
    options = ("variables", "optimizer", *(["eval"] if site.name == "flax_train" else []))
    texts = [site.parsed.options.get(name) or "" for name in options]
    if site.name in ("flax_apply", "flax_grad", "flax_init", "flax_train", "flax_vars", "flaxmodel"):
        texts.append(site.call.call if site.call is not None else SESSION_VARIABLES.sub(r"\2", site.parsed.rest))
    names: set[str] = set()
    for text in texts:
        with suppress(SyntaxError):  # the line `*` of a `%%flaxmodel` cell is no expression
            names |= {name for statement in ast.parse(text).body for name in reads(statement)}
    return names


def _leaves(context: ScriptContext) -> set[str]:
    """Kinds of leaves besides arrays in the results, see `LineWriter.digest_function`."""
    kinds: set[str] = set()
    for run in context.groups.runs:
        model = context.models.get(run.model or "")
        if not run.kind.model or (run.kind.opens and model is not None and model.holds):
            kinds.add("keys")
        kinds |= run.spelling.returns if run.spelling is not None else set()
    return kinds
