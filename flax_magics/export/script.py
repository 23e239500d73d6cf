"""A session as a script: its cells in the order in which they ran, and plain Flax in the place of every command."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..journal import Executed
from ..run import Run
from .commands import CannotSay, Commands, Model
from .editing import Edit, begin, commented
from .functions import Function, Wanted
from .layout import Item
from .matching import Execution, Step
from .names import BUILTIN, binds, is_of_the_notebook, reads
from .ours import Ours
from .reading import Site, Source
from .scribe import Scribe
from .story import Story

_UNSAFE = ("environ", "sys.path", "chdir", "set_virtual_device", "distributed.initialize")
"""What an import must not be moved in front of."""


@dataclass(eq=False)
class Script:
    """Writes the executions one by one."""

    story: Story
    models: Mapping[str, Model]
    scribe: Scribe
    ours: Ours
    initial_seed: int
    blocks: list[list[Item]] = field(default_factory=list)
    imports: list[ast.Import | ast.ImportFrom] = field(default_factory=list)
    unexported: list[str] = field(default_factory=list)
    """What could not be exported, each with its reason."""
    gone: dict[str, str] = field(default_factory=dict)
    """Names that are not there in the script, with the reason."""
    known: set[str] = field(default_factory=set)
    ever: set[str] = field(default_factory=set)
    """Names that some cell binds."""
    at: tuple[int, int] | None = None
    """Seed and number of the last draw that the root key in the script has made."""
    versions: Counter[str] = field(default_factory=Counter)
    bound_in: dict[str, int] = field(default_factory=dict)
    uses: dict[str, set[str]] = field(default_factory=dict)
    """What the definition of a name reads."""
    functions: dict[Any, Function] = field(default_factory=dict)
    of_site: dict[Site, Wanted] = field(default_factory=dict)
    unset: set[str] = field(default_factory=set)
    written: dict[str, Mapping[str, int]] = field(default_factory=dict)
    """Texts of cells that only define → versions of the names that they defined, once they had run."""

    def __post_init__(self) -> None:
        self.commands = Commands(self.scribe, self.story, self.models, self._define)
        self.first_jax: int | None = None
        """The block that our own imports have to follow, -1 for none: what must come before an import came before it."""
        self._before: list[Item] = []
        self._inline: list[str] = []
        self._statement: ast.stmt | None = None
        self._bound_here: set[str] = set()
        self._declared: dict[ast.stmt, set[str]] = {}
        self._imported: set[str] = set()
        self._unset_for: set[tuple[int, str]] = set()
        self._unsafe = False

    # -- one execution

    def execution(self, execution: Execution) -> None:
        """Writes one execution of a cell."""
        cell, source = execution.cell, execution.source
        self.blocks.append([])
        rows = cell.registered
        self.commands.states = {row.name: row.state for row in rows}
        if self._is_repeated(execution):
            return
        if source.opaque:
            self._opaque(cell, source)
            self._loose(execution)
            return
        block = self.blocks[-1]
        if source.above:
            block.append(Item([f"# {line}".rstrip() for line in source.above]))
        for gone in source.foreign.values():
            if not gone.shown and gone.names:
                self._lose(gone.names, "what a magic captures is not known to a script")
        keep, restore = self._kept_modules(rows)
        block += keep
        last_line = 0
        for step in execution.steps:
            if begin(step.statement) <= last_line:  # after a `;`, on a line that is there already
                self._bind(binds(step.statement), step.statement)
                continue
            gap, blank = _gap(source, last_line, begin(step.statement))
            last_line = step.statement.end_lineno or step.statement.lineno
            if step.failed:
                first = step is execution.steps[0]
                text = source.text.split("\n")[begin(step.statement) - 1 : last_line]
                self._failed(cell, () if first else text)
                self._lose(binds(step.statement) - self.known, f"In [{cell.number}] failed")
            else:
                self._step(step, source, gap, blank)
        self._loose(execution)
        gap, blank = _gap(source, last_line, source.text.count("\n") + 2)
        if gap and cell.error is None:
            block.append(Item(gap, blank=blank))
        block += restore
        if cell.error is not None and not any(step.failed for step in execution.steps):
            self._failed(cell)
        self.written[source.text] = {name: self.versions[name] for name in self._defines(execution)}

    def _is_repeated(self, execution: Execution) -> bool:
        """Whether it is a cell that only defines, run again with nothing new in it."""
        cell, source = execution.cell, execution.source
        before = self.written.get(source.text)
        if before is None or cell.first != cell.end or cell.error is not None or not source.text.strip():
            return False
        if any(row.state != "unchanged" for row in cell.registered):
            return False
        names = {row.name for row in cell.registered}
        for step in execution.steps:
            plain = isinstance(
                step.statement, (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
            )
            registered = step.site is not None and step.site.name == "flaxmodel"
            if not plain and not registered and not (names and binds(step.statement) <= names and binds(step.statement)):
                return False
        return all(self.versions[name] == version for name, version in before.items())

    def _defines(self, execution: Execution) -> set[str]:
        return {name for step in execution.steps for name in binds(step.statement)}

    def _opaque(self, cell: Executed, source: Source) -> None:
        """A cell that is no Python."""
        if cell.error is not None:
            self._failed(cell)
        else:
            self.blocks[-1].append(Item([f"# {line}".rstrip() for line in source.above]))

    def _failed(self, cell: Executed, lines: Sequence[str] = ()) -> None:
        """Says that a cell failed; `lines` are those in which it did, where something before them ran."""
        what = "A cell" if cell.number is None else f"In [{cell.number}]"
        if lines:
            comment = [f"# {what} failed here with {cell.error}:", *commented(lines)]
        else:
            comment = [f"# {what} failed with {cell.error} and is left out."]
        self.blocks[-1].append(Item(comment, blank=True))

    def _loose(self, execution: Execution) -> None:
        """Runs that nothing in the cell explains: the root key moves on, and the script says so."""
        if execution.loose:
            self._unexplained(execution.loose, execution)

    def _unexplained(self, indices: Sequence[int], execution: Execution | None = None) -> None:
        runs = [self.story.runs[index] for index in indices]
        draws = sum(run.draws or 1 for i, run in zip(indices, runs, strict=True) if self._moves(i))
        if not draws:
            return
        calls = ", ".join(dict.fromkeys(" ".join(run.call.split()) for run in runs))
        plural = "a draw that no line" if draws == 1 else f"{draws} draws that no line"
        reason = f"{plural} of the cells explains: {calls}"
        self.unexported.append(reason)
        self.blocks[-1].append(Item([f"# Left out: {reason}.", *self._start(), *self.scribe.advance(draws)], blank=True))
        last = runs[-1]
        self.at = last.seed, last.draw + (last.draws or 1) - 1
        self.bound_in[self.scribe.root] = len(self.blocks) - 1

    def _moves(self, index: int) -> bool:
        """Whether a run is a draw of its own."""
        return not self.story.runs[index].replayed and index not in self.story.leader

    # -- one statement

    def _step(self, step: Step, source: Source, gap: list[str], blank: bool) -> None:
        statement, block = step.statement, self.blocks[-1]
        if self._hoisted(statement):
            return
        if self.ours.learn(statement):
            self.gone.update(dict.fromkeys(binds(statement), "it is of the session that ran the notebook"))
            return
        self._before, self._statement = [], statement
        self._bound_here = binds(statement)
        unexplained = [index for index, site in step.made if site is None]
        if unexplained and step.site is not None:
            self._unexplained(unexplained)
        self._prepare(step)
        if self._is_a_look(statement):
            return
        edit = Edit(source, self._command, self._missing)
        self._declared = edit.declared
        lines, code = edit.statement(statement)
        for reason, names in edit.left_out:
            self._lose(names, reason or "a magic or the shell makes it")
            if reason:
                self.unexported.append(f"{_first(statement, source)}: {reason}")
        self._settle(step, unexplained)
        if code:
            bound = binds(statement) if step.site is None else self._targets(step.site)
            lost = {name for _, names in edit.left_out for name in names}
            self._bind(bound - lost, statement)
        for item in self._before:
            block.append(item)
        if lines or gap:
            apart = code and isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))
            if isinstance(statement, ast.Expr) and code and len(lines) >= 1:
                lines[-1] = lines[-1].rstrip().rstrip(";")
            block.append(Item([*gap, *lines], apart, blank))

    def _targets(self, site: Site) -> set[str]:
        return binds(site.statement) | (self.commands.assigned - {self.scribe.root, self.scribe.params, self.scribe.dropout})

    def _hoisted(self, statement: ast.stmt) -> bool:
        """Whether it is an import that stands at the top of the script."""
        if not isinstance(statement, (ast.Import, ast.ImportFrom)):
            text = ast.unparse(statement)
            self._unsafe = self._unsafe or any(word in text for word in _UNSAFE)
            return False
        modules = [statement.module or ""] if isinstance(statement, ast.ImportFrom) else [a.name for a in statement.names]
        if any(module.partition(".")[0] in ("jax", "flax") for module in modules) and self.first_jax is None:
            self.first_jax = len(self.blocks) - 1 if self._unsafe else -1
        ours = any(module.partition(".")[0] == "flax_magics" for module in modules)
        rebound = any(name in self.versions for name in binds(statement) if name not in self._imported)
        if ours or rebound or (self._unsafe and modules != ["__future__"]):
            return False
        self.imports.append(statement)
        self.known |= binds(statement)
        self._imported |= binds(statement)
        for name in binds(statement):
            self.gone.pop(name, None)
        return True

    def _is_a_look(self, statement: ast.stmt) -> bool:
        """Whether it only shows something that a notebook displays and a script does not: `y`, `y.shape`, `display(y)`."""
        if not isinstance(statement, ast.Expr):
            return False
        node = statement.value
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "display":
            return "display" not in self.known
        if isinstance(node, ast.Constant):
            return not isinstance(node.value, str) or bool(self.blocks[-1])
        return isinstance(node, (ast.Name, ast.Attribute)) and isinstance(_root(node), ast.Name)

    def _command(self, site: Site) -> tuple[list[str], bool]:
        """The lines of a command, and whether they are code."""
        self._inline = []
        indices = self.story.of_site.get(site, [])
        try:
            lines = self.commands.lines(site, indices)
        except CannotSay as error:
            return self._cannot(site, str(error), indices)
        function = site.in_function
        if function is not None and lines:
            self._declared.setdefault(function, set()).update(self.commands.assigned)
        return [*self._inline, *lines], bool(lines)

    def _cannot(self, site: Site, reason: str, indices: Sequence[int]) -> tuple[list[str], bool]:
        line = f"{site.target} %{site.name} {site.given.rest}".strip()
        shown = " ".join(line.split())
        self._lose(binds(site.statement), f"{reason}")
        self.unexported.append(f"{shown}: {reason}")
        lines = [f"# Left out: {reason}.", f"# {shown}"]
        draws = sum(self.story.runs[index].draws or 1 for index in indices if self._moves(index))
        if site.path and site.draws:
            return [*lines, f"raise NotImplementedError({self.scribe.text(shown)})"], True
        if draws and not site.path:
            return [*lines, *self.scribe.advance(draws)], True
        return lines, False

    def _prepare(self, step: Step) -> None:
        """What must stand before a statement: the root key where it has to be, variables that are not there yet."""
        runs = self.story.runs
        drawn = [(index, site) for index, site in step.made if site is not None and self._counts(index)]
        restarts = step.site is not None and step.site.name == "flax_key" and step.site.given.options["seed"] is not None
        if restarts and step.site is not None:
            self.at = step.site.given.options["seed"], 0
        elif drawn:
            self._before += [Item(lines) for lines in [self._start(runs[drawn[0][0]])] if lines]
        for index, site in step.made:
            if site is None:
                continue
            run = runs[index]
            if site.in_function is not None and step.statement not in site.path and site in self.of_site:
                self._define(self.of_site[site], site)
            if run.made is not None and not run.made.added and site.path and run.model in self.models:
                self._unset(self.models[run.model], site, step)

    def _unset(self, model: Model, site: Site, step: Step) -> None:
        made = [i for i in self.story.of_site[site] if self.story.runs[i].made is not None]
        conditional = len(made) < len(self.story.of_site[site]) or len(made) == 1
        if model.holds or not conditional or (id(step), model.name) in self._unset_for:
            return
        self._unset_for.add((id(step), model.name))
        self._before.append(Item([f"{model.variables} = None"]))

    def _counts(self, index: int) -> bool:
        return not self.story.runs[index].replayed

    def _start(self, run: Run | None = None) -> list[str]:
        """The lines that bring the root key to where `run` finds it; none where it is there."""
        scribe = self.scribe
        lines: list[str] = []
        if self.at is None:
            self.at = self.initial_seed, 0
            lines.append(scribe.start(self.initial_seed))
        if run is None:
            return lines
        seed, drawn = self.at
        if self.story.leader.get(self._index(run)) is not None and (seed, drawn) == (run.seed, run.draw):
            return lines
        if seed != run.seed or run.draw - 1 < drawn:
            lines = [scribe.start(run.seed)]
            drawn = 0
        if run.draw - 1 > drawn:
            behind = run.draw - 1 - drawn
            lines += [f"# {'A draw' if behind == 1 else f'{behind} draws'} that no cell made.", *scribe.advance(behind)]
            self.unexported.append(f"{behind} draws before draw {run.draw} of seed {run.seed} that no cell made")
        self.at = run.seed, run.draw - 1
        return lines

    def _index(self, run: Run) -> int:
        return next(i for i, other in enumerate(self.story.runs) if other is run)

    def _settle(self, step: Step, unexplained: Sequence[int]) -> None:
        """Where the root key stands after a statement."""
        drawn = [(index, site) for index, site in step.made if self._counts(index)]
        if not drawn:
            return
        index, site = drawn[-1]
        run = self.story.runs[index]
        stays = site is not None and run.command == "init" and self.story.stays(site)
        self.at = run.seed, run.draw + (run.draws or 1) - 1 - stays
        if unexplained and step.site is None:
            # Between those that a loop made; where it is exactly, nobody can say.
            self.blocks[-1].append(Item(["# The loop below made draws that its lines do not explain."]))

    # -- names

    def _missing(self, names: Iterable[str]) -> str | None:
        """Why code that reads `names` cannot stand in the script."""
        for name in sorted(names):
            if name in self.gone:
                return f"`{name}` is not there ({self.gone[name]})"
            if name in self.known or name in BUILTIN or name in self.ever or name in self.ours_names:
                continue
            if name in self._bound_here:
                continue
            if name == "get_ipython":
                return "it asks IPython"
            if is_of_the_notebook(name) or name in ("In", "Out", "display"):
                return f"`{name}` is the notebook's own"
            return f"no cell makes `{name}`"
        return None

    @property
    def ours_names(self) -> set[str]:
        """Names of our own in the script."""
        return {self.scribe.root, *(model.variables for model in self.models.values())} | {m.name for m in self.models.values()}

    def _lose(self, names: Iterable[str], reason: str) -> None:
        for name in names:
            self.gone[name] = reason
            self.known.discard(name)

    def _bind(self, names: Iterable[str], statement: ast.stmt) -> None:
        found = reads(statement)
        for name in names:
            self.known.add(name)
            self.gone.pop(name, None)
            if self.commands.states.get(name) == "unchanged" and name in self.versions:
                continue
            self.versions[name] += 1
            self.bound_in[name] = len(self.blocks) - 1
            self.uses[name] = found

    def _reached(self, names: Iterable[str]) -> set[str]:
        """All names that the code behind `names` reads, the names themselves included."""
        out: set[str] = set()
        waiting = list(names)
        while waiting:
            name = waiting.pop()
            if name not in out:
                out.add(name)
                waiting += self.uses.get(name, ())
        return out

    # -- functions

    def _define(self, wanted: Wanted, site: Site) -> str:
        """See `Commands.define`."""
        reached = self._reached(wanted.reads)
        versions = {name: self.versions[name] for name in reached}
        known = self.functions.get(wanted.key)
        forced = known is not None and self._statement is not None and self._is_traced_anew(site)
        self.of_site[site] = wanted
        inside = bool(site.path) and bool(reached & self._bound_here) and site.path[0] is self._statement
        if known is not None and known.versions == versions and not forced and not inside:
            return known.name
        name = known.name if known is not None else self.scribe.free.take(*wanted.names)
        self.functions[wanted.key] = Function(name, versions)
        lines = wanted.lines(self.scribe, name)
        if inside and site.in_function is None:
            self._inline = lines
            return name
        here = len(self.blocks) - 1
        place = max((self.bound_in.get(n, here if n in wanted.reads else -1) for n in reached), default=here)
        if place < here and not forced and reached:
            self.blocks[place].append(Item(lines, apart=True))
        else:
            self._before.append(Item(lines, apart=True))
        return name

    def _is_traced_anew(self, site: Site) -> bool:
        """Whether a run at this place had a new program because of what the model reads, though no name was bound anew."""
        return not site.path and any(
            cause.kind == "model"
            for index in self.story.of_site.get(site, [])
            for cause in self.story.runs[index].causes
        )

    # -- NNX modules that a cell made again

    def _kept_modules(self, rows: Sequence[Any]) -> tuple[list[Item], list[Item]]:
        """Lines around a cell that builds anew what the session kept."""
        keep: list[Item] = []
        restore: list[Item] = []
        for row in rows:
            model = self.models.get(row.name)
            if model is None or not model.holds or row.variables != "kept" or row.state == "new":
                continue
            if row.state == "unchanged" and model.construction:
                continue  # its line is left out
            if model.name not in self.known:
                continue
            old = self.scribe.variable(f"{model.name}_before")
            keep.append(Item([f"{old} = {model.name}"]))
            if row.state == "unchanged":
                restore.append(Item([f"{model.name} = {old}"]))
            else:
                self.scribe.needs.add("nnx")
                restore.append(Item([f"nnx.update({model.name}, nnx.state({old}, nnx.Not(nnx.RngState)))"]))
        return keep, restore


def _root(node: ast.expr) -> ast.expr:
    while isinstance(node, ast.Attribute):
        node = node.value
    return node


def _first(statement: ast.stmt, source: Source) -> str:
    return source.text.split("\n")[begin(statement) - 1].strip()


def _gap(source: Source, after: int, before: int) -> tuple[list[str], bool]:
    """Comments between two statements (lines `after` and `before`, neither included), and whether a line is empty."""
    lines = source.text.split("\n")[after : before - 1]
    blank = any(not line.strip() for line in lines) and after > 0
    kept = [line for line in lines if line.strip().startswith("#")]
    return kept, blank
