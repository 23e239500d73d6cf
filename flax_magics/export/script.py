"""A session as a script: its cells in the order in which they ran, and plain Flax in the place of every command."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..journal import Executed, Load
from . import commands
from .editing import Edit, commented
from .functions import Function, Wanted
from .layout import Item
from .ledger import Ledger
from .looks import is_a_look
from .matching import Execution, Step, begin
from .names import binds
from .ours import Ours
from .page import CannotSay, Model, Page
from .reading import Site, Source
from .scope import Scope
from .scribe import Scribe
from .story import Story
from .wrapping import fitted

_UNSAFE = ("environ", "sys.path", "chdir", "set_virtual_device", "distributed.initialize")
"""What an import must not be moved in front of."""


@dataclass(eq=False)
class Script:
    """Writes the executions one by one.

    Attributes:
      blocks: what has been written, one block for each execution.
      imports: those that stand at the top.
      unexported: what could not be exported, each with its reason.
      first_jax: the block that our own imports have to follow; -1 for none, where no setting came before JAX's import.
      functions: jitted functions, by `Wanted.key`; `of_site` has those of each place.
      plain: the session's own `import` statements, one module each.
      written: texts of cells → versions of the names that they bound, once they had run.
    """

    story: Story
    models: Mapping[str, Model]
    scribe: Scribe
    ours: Ours
    scope: Scope
    ledger: Ledger
    blocks: list[list[Item]] = field(default_factory=list)
    imports: list[ast.Import | ast.ImportFrom] = field(default_factory=list)
    unexported: list[str] = field(default_factory=list)
    first_jax: int | None = None
    functions: dict[Any, Function] = field(default_factory=dict)
    of_site: dict[Site, Wanted] = field(default_factory=dict)
    written: dict[str, Mapping[str, int]] = field(default_factory=dict)
    plain: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.page = Page(self.scribe, self.story, self.models, self._define)
        self._before: list[Item] = []
        self._inline: list[str] = []
        self._statement: ast.stmt | None = None
        self._declared: dict[ast.stmt, set[str]] = {}
        self._unset: set[tuple[Step, str]] = set()
        self._unsafe = False
        self._modules: dict[str, str] = {}
        self._loads: Iterator[Load] = iter(())

    # -- one execution

    def execution(self, execution: Execution) -> None:
        """Writes one execution of a cell."""
        cell, source = execution.cell, execution.source
        self.blocks.append([])
        rows = cell.registered
        self.page.states = {row.name: row.state for row in rows}
        self.page.load, self.page.gone = None, cell.gone
        self._loads = iter(cell.loads)
        if self._is_repeated(execution):
            return
        if source.opaque:
            self._opaque(cell, source)
            self._add(self.ledger.unexplained(execution.loose))
            return
        block = self.blocks[-1]
        if source.above and (cell.error is None or any(not step.failed for step in execution.steps)):
            block.append(Item([f"# {line}".rstrip() for line in source.above]))
        for gone in source.foreign.values():
            if not gone.shown and gone.names:
                self.scope.lose(gone.names, "a magic captures it")
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
                self.scope.lose(binds(step.statement) - self.scope.known, f"In [{cell.number}] failed")
            else:
                self._step(step, source, gap, blank)
        self._add(self.ledger.unexplained(execution.loose))
        gap, blank = _gap(source, last_line, source.text.count("\n") + 2)
        if gap and cell.error is None:
            block.append(Item(gap, blank=blank))
        block += restore
        if cell.error is not None and not any(step.failed for step in execution.steps):
            self._failed(cell)
        self.written[source.text] = {name: self.scope.versions[name] for name in self._defines(execution)}

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
            if (
                not plain
                and not registered
                and not (names and binds(step.statement) <= names and binds(step.statement))
            ):
                return False
        return all(self.scope.versions[name] == version for name, version in before.items())

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

    # -- one statement

    def _step(self, step: Step, source: Source, gap: list[str], blank: bool) -> None:
        statement, block = step.statement, self.blocks[-1]
        if self._hoisted(statement):
            return
        if self.ours.learn(statement):
            self.scope.lose(binds(statement), "it is of the session that ran the notebook")
            return
        self._before, self._statement = [], statement
        if step.site is not None and step.site.name == "flax_load":
            self.page.load = next(self._loads, None)
            if self.page.load is not None:
                self.ledger.at = self.page.load.seed, self.page.load.draws
        self.scope.here = binds(statement)
        if self._is_a_look(statement):
            return
        self._add(self.ledger.unexplained([index for index, site in step.made if site is None]))
        self._prepare(step)
        edit = Edit(source, self._command, self.scope.missing, self.scribe.unit)
        self._declared = edit.declared
        lines, code = self._checked(*edit.statement(statement), edit, binds(statement))
        for reason, names in edit.left_out:
            self.scope.lose(names, reason or "a magic or the shell makes it")
            if reason:
                self.unexported.append(f"{_first(statement, source)}: {reason}")
        self.ledger.after(step)
        if code:
            lost = {name for _, names in edit.left_out for name in names}
            if step.site is None:
                self._bind(binds(statement) - lost, statement)
            else:
                for made in ast.parse("\n".join(lines)).body:
                    self._bind(self._targets(step.site) & binds(made), made)
        block += self._before
        if lines or gap:
            apart = code and isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))
            if isinstance(statement, ast.Expr) and code and len(lines) >= 1:
                lines[-1] = lines[-1].rstrip().rstrip(";")
            block.append(Item([*gap, *lines], apart, blank))

    def _checked(self, lines: list[str], code: bool, edit: Edit, names: set[str]) -> tuple[list[str], bool]:
        """The lines of a statement, as comments where they are no Python outside of a notebook: `await` at the top."""
        try:
            compile("\n".join(lines), "<script>", "exec", dont_inherit=True)
        except SyntaxError as error:
            edit.left_out.append((f"outside of a notebook it is no Python: {error.msg}", names))
            return [f"# Left out: {edit.left_out[-1][0]}.", *commented(lines)], False
        return lines, code

    def _bind(self, names: Iterable[str], statement: ast.stmt) -> None:
        names = set(names)
        for name, model in self.models.items():
            if model.variables in names:
                self.page.lost.pop(name, None)
        self.scope.bind(names, statement, len(self.blocks) - 1, self.page.states)

    def _add(self, lines: list[str]) -> None:
        if lines:
            self.blocks[-1].append(Item(lines, blank=True))

    def _targets(self, site: Site) -> set[str]:
        return binds(site.statement) | (
            self.page.assigned - {self.scribe.root, self.scribe.params, self.scribe.dropout}
        )

    def _hoisted(self, statement: ast.stmt) -> bool:
        """Whether it is an import that stands at the top of the script."""
        if not isinstance(statement, (ast.Import, ast.ImportFrom)):
            text = ast.unparse(statement)
            self._unsafe = self._unsafe or any(word in text for word in _UNSAFE)
            return False
        modules = (
            [statement.module or ""] if isinstance(statement, ast.ImportFrom) else [a.name for a in statement.names]
        )
        if any(module.partition(".")[0] in ("jax", "flax") for module in modules) and self.first_jax is None:
            self.first_jax = len(self.blocks) - 1 if self._unsafe else -1
        if isinstance(statement, ast.Import):
            self.plain |= {ast.unparse(ast.Import([alias])) for alias in statement.names}
        ours = any(module.partition(".")[0] == "flax_magics" for module in modules)
        rebound = any(name in self.scope.versions for name in binds(statement) if name not in self.scope.imported)
        if ours or rebound or (self._unsafe and modules != ["__future__"]):
            return False
        self.imports.append(statement)
        self._modules |= _modules(statement)
        self.scope.take_in(binds(statement))
        return True

    def _is_a_look(self, statement: ast.stmt) -> bool:
        """Whether it only shows something that a notebook displays and a script does not: `y`, `y.shape`, `display(y)`."""
        if not isinstance(statement, ast.Expr):
            return False
        node = statement.value
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "display":
            return "display" not in self.scope.known
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            return bool(self.blocks[-1])
        return is_a_look(node, self._modules, self.scope.versions)

    def _command(self, site: Site) -> tuple[list[str], bool]:
        """The lines of a command, and whether they are code."""
        self._inline = []
        indices = self.story.of_site.get(site, [])
        try:
            lines = commands.lines(self.page, site, indices)
        except CannotSay as error:
            return self._cannot(site, str(error), indices)
        if site.given.options.get("out"):
            self.scope.lose([site.given.options["out"]], "it is a Run of the session")
        function = site.in_function
        if function is not None and lines:
            self._declared.setdefault(function, set()).update(self.page.assigned)
        return [*self._inline, *lines], bool(lines)

    def _cannot(self, site: Site, reason: str, indices: Sequence[int]) -> tuple[list[str], bool]:
        line = f"{site.target} %{site.name} {site.line}".strip()
        shown = " ".join(line.split())
        self.scope.lose(binds(site.statement), f"{reason}")
        self.unexported.append(f"{shown}: {reason}")
        lines = [f"# Left out: {reason}.", f"# {shown}"]
        draws = self.ledger.draws(indices)
        if site.path and site.draws:
            return [*lines, f"raise NotImplementedError({self.scribe.text(shown)})"], True
        if draws and not site.path:
            return [*lines, *self.scribe.advance(draws)], True
        return lines, False

    def _prepare(self, step: Step) -> None:
        """What must stand before a statement: the root key where it has to be, variables that are not there yet."""
        lines = self.ledger.before(step)
        self._before += [Item(lines)] if lines else []
        for index, site in step.made:
            if site is None:
                continue
            run = self.story.runs[index]
            if site.in_function is not None and step.statement not in site.path and site in self.of_site:
                self._define(self.of_site[site], site)
            model = self.models.get(run.model or "")
            if model is None or run.made is None or run.made.added or model.holds or (step, model.name) in self._unset:
                continue
            if self.page.is_conditional(site):
                self._unset.add((step, model.name))
                self._before.append(Item([f"{model.variables} = None"]))

    # -- functions

    def _define(self, wanted: Wanted, site: Site) -> str:
        """See `Page.define`."""
        reached = self.scope.reached(wanted.reads)
        every = {name: self.scope.versions[name] for name in reached}
        # `nnx.jit` is given the module, and sees another class by itself.
        seen = self.scope.classes | wanted.reads if wanted.decorator == "nnx.jit" else set()
        versions = {name: version for name, version in every.items() if name not in seen}
        known = self.functions.get(wanted.key)
        self.of_site[site] = wanted
        forced = known is not None and known.every == every and self._is_traced_anew(site)
        inside = bool(site.path) and bool(reached & self.scope.here) and site.path[0] is self._statement
        if known is not None and known.versions == versions and not forced and not inside:
            known.every = every
            return known.name
        name = known.name if known is not None else self.scribe.free.take(*wanted.names)
        self.functions[wanted.key] = Function(name, versions, every)
        lines = fitted(wanted.lines(self.scribe, name), self.scribe.unit)
        if inside and site.in_function is None:
            self._inline = lines
            return name
        here = len(self.blocks) - 1
        place = max((self.scope.bound_in.get(n, here if n in wanted.reads else -1) for n in reached), default=here)
        if place < here and not forced and reached:
            self.blocks[place].append(Item(lines, apart=True))
        else:
            self._before.append(Item(lines, apart=True))
        return name

    def _is_traced_anew(self, site: Site) -> bool:
        """Whether a run at this place had a new program because of what the model reads, though no name was bound anew."""
        # `nnx.jit` is given the module itself, and sees what has changed in it.
        held = self.of_site[site].decorator == "nnx.jit"
        return not site.path and any(
            cause.kind == "model" and not (held and cause.text.startswith("the model changed"))
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
            if model.name not in self.scope.known:
                continue
            old = self.scribe.variable(f"{model.name}_before")
            keep.append(Item([f"{old} = {model.name}"]))
            if row.state == "unchanged":
                restore.append(Item([f"{model.name} = {old}"]))
            else:
                self.scribe.needs.add("nnx")
                restore.append(Item([f"nnx.update({model.name}, nnx.state({old}, nnx.Not(nnx.RngState)))"]))
        return keep, restore


def _modules(statement: ast.Import | ast.ImportFrom) -> dict[str, str]:
    """Names → what they were imported as: `nn` → `flax.linen`."""
    if isinstance(statement, ast.ImportFrom):
        return {alias.asname or alias.name: f"{statement.module}.{alias.name}" for alias in statement.names}
    return {
        alias.asname or alias.name.partition(".")[0]: alias.name if alias.asname else alias.name.partition(".")[0]
        for alias in statement.names
    }


def _first(statement: ast.stmt, source: Source) -> str:
    return source.text.split("\n")[begin(statement) - 1].strip()


def _gap(source: Source, after: int, before: int) -> tuple[list[str], bool]:
    """Comments between two statements (lines `after` and `before`, neither included), and whether a line is empty."""
    lines = source.text.split("\n")[after : before - 1]
    blank = any(not line.strip() for line in lines) and after > 0
    kept = [_comment(line) for line in lines if line.strip().startswith("#")]
    return kept, blank


def _comment(line: str) -> str:
    """A line of comment as formatters have it; a Colab form's title without its sign."""
    text = line.strip()
    title = text.removeprefix("#").lstrip().removeprefix("@title ")
    if title != text.removeprefix("#").lstrip():
        return f"# {title.strip()}"
    return f"# {text[1:]}" if text[1:2] not in ("", " ", "#", "!", ":") else text
