"""A session as a plain Flax script: `%flax_export`.

The cells that ran, in the order in which they ran, each command replaced by the lines that a person would have written for
what it did: the split of the root key, `init`, a jitted `apply` with its rngs, what is kept. What cannot be written is said
in its place.
"""

from __future__ import annotations

import ast
import inspect
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..cells.journal import ExecutedCell, NotebookCells
from ..cells.names import Free, binds, mentioned, reads
from ..models.base import Model
from ..models.construction import variable_name
from ..run import RELEASED, Run
from ..state.entry import ModelEntry
from .cells import CellRun, CellSource, ExecutedStatement, begin, end, match, read_cell
from .context import RunGroups, ScriptContext, ScriptModel
from .file import Exported
from .script import RootKeyTracker, Script, assigned_by
from .writer import LineWriter


def export_session(
    models: Mapping[str, ModelEntry],
    runs: Sequence[Run],
    cells: NotebookCells | None,
    *,
    seed: int,
    digests: bool = True,
) -> Exported:
    """The script of a session.

    Args:
      cells: those that a notebook ran; the last may be the one that asks for the export. None for a session that no
        cells made, whose script is what `_cell_runs_of` finds.
      seed: of the root key, where neither cells nor runs say what it was at first.
      digests: print a digest for each run.
    """
    if cells is None:
        cell_runs, restarts = _cell_runs_of(models, runs), []
        seed = runs[0].seed if runs else seed
        title = "The models and runs of a session"
    else:
        cell_runs = match([(cell, read_cell(cell.text, cells.transform)) for cell in cells.executed], runs)
        restarts, seed = cells.restarts, cells.seed
        title = "The cells of a notebook in the order in which they ran"
        # The command that asks for the export, and what follows it in its cell, is no part of it.
        statements = cell_runs[-1].statements if cell_runs else []
        asking = [i for i, statement in enumerate(statements) if _asks(statement)]
        del statements[asking[-1] if asking else len(statements) :]
    sources = [cell_run.source for cell_run in cell_runs]
    free = Free({*models, *(name for source in sources for name in mentioned(source.tree))})
    writer = LineWriter.like([cell_run.cell.text for cell_run in cell_runs], free, digests=digests)
    script_models = {name: _model(name, models, runs, free, sources) for name in models}
    context = ScriptContext(writer, RunGroups(runs, cell_runs, restarts), script_models)
    script = Script(context, RootKeyTracker(context, seed))
    for cell_run in cell_runs:
        script.cell(cell_run)
    written = sum(any(map(any, (lines.text for lines in block))) for block in script.blocks)
    text = script.finished(title, sources)
    return Exported(text, written, len(runs), tuple(context.unexported))


def _asks(executed: ExecutedStatement) -> bool:
    if executed.site is not None:
        return executed.site.name == "flax_export"
    return ".export(" in ast.unparse(executed.statement)


def _model(
    name: str, entries: Mapping[str, ModelEntry], runs: Sequence[Run], free: Free, sources: Sequence[CellSource]
) -> ScriptModel:
    """A registered model, with names for what the script has of it."""
    entry = entries[name]
    module = entry.model.module
    instance = free.take(variable_name(name)) if type(module).__name__ == name else name
    if entry.model.holds_variables:
        construction = entry.built.recipe.text if entry.built is not None else ""
        return ScriptModel(instance, module, True, construction=construction)
    variables = _name_of_init(name, runs, sources)
    if not variables:
        alone = sum(not other.model.holds_variables for other in entries.values()) == 1
        variables = free.take(*(["variables"] if alone else []), f"{instance}_variables")
    adds = any(run.model == name and run.made is not None and run.made.added for run in runs)
    first_key = free.take(f"{instance}_init_key") if adds else ""
    return ScriptModel(instance, module, False, variables, first_key=first_key, loaded=entry.variables)


def _name_of_init(model: str, runs: Sequence[Run], sources: Sequence[CellSource]) -> str:
    """The user's own name for a model's variables, where it always has what the session has; empty where it may not."""
    sites = [site for source in sources for site in source.sites.values()]
    inits = [site for site in sites if site.name == "flax_init" and site.call]
    targets = [site.target.removesuffix("=").strip() for site in inits if site.call and site.call.target == model]
    if len(set(targets)) != 1 or not targets[0].isidentifier() or any(site.path for site in inits):
        return ""
    bound = [
        node
        for source in sources
        for node in ast.walk(source.tree)
        if (isinstance(node, ast.Name) and node.id == targets[0] and not isinstance(node.ctx, ast.Load))
        or getattr(node, "name", getattr(node, "arg", None)) == targets[0]
        or (isinstance(node, ast.Attribute) and node.attr == "variables" and not isinstance(node.ctx, ast.Load))
    ]
    changed = any(run.changed or run.made is not None for run in runs if run.kind.forward and run.model == model)
    changed = changed or any(model in assigned_by(site) for site in sites)
    return "" if changed or len(bound) != len(targets) else targets[0]


@dataclass(eq=False)
class _File:
    """A module's own text, and its statements at the top level."""

    globals: Mapping[str, Any]
    statements: list[ast.stmt]
    text: str

    @classmethod
    def of(cls, name: str) -> _File | None:
        """The module of that name, None where it has no text."""
        module = sys.modules.get(name)
        try:
            text = inspect.getsource(module)  # type: ignore[arg-type]
            return cls(vars(module), ast.parse(text).body, text)
        except (OSError, TypeError, SyntaxError):
            return None

    def name_of(self, value: Any) -> str | None:
        """The global name that stands for this very object, and that a top-level statement binds."""
        for name, held in self.globals.items():
            if held is value and not name.startswith("_") and any(name in binds(s) for s in self.statements):
                return name
        return None

    def reached(self, names: set[str]) -> Iterator[str]:
        """The texts of the statements that bind `names`, and of those that these need."""
        needed: set[ast.stmt] = set()
        waiting, seen = list(names), set[str]()
        while waiting:
            name = waiting.pop()
            if name in seen:
                continue
            seen.add(name)
            for statement in self.statements:
                if name in binds(statement):
                    needed.add(statement)
                    waiting += reads(statement)
        lines = self.text.split("\n")
        for statement in self.statements:
            if statement in needed:
                yield "\n".join(lines[begin(statement) - 1 : end(statement)])


class _Files:
    """The files that a session's models come from, and the script that was run.

    Attributes:
      used: what the export takes from each, in the order in which it came to need them.
    """

    def __init__(self) -> None:
        self.used: dict[_File, set[str]] = {}
        self._by_module: dict[str, _File | None] = {}

    def of(self, module: str) -> _File | None:
        """The file of a module: one and the same each time."""
        if module not in self._by_module:
            self._by_module[module] = _File.of(module)
        return self._by_module[module]

    def use(self, file: _File, name: str) -> str:
        """Notes that the export needs a global name of a file."""
        self.used.setdefault(file, set()).add(name)
        return name

    def named(self, value: Any, file: _File | None) -> str | None:
        """The name that stands for an object in `file`, or in the script that was run."""
        for place in (file, self.of("__main__")):
            name = None if place is None else place.name_of(value)
            if place is not None and name is not None:
                return self.use(place, name)
        return None

    def spelled(self, value: Any, file: _File | None) -> str:
        """A value as an expression: a literal, or the name that stands for it; `…` where there is neither."""
        if value is None or isinstance(value, (bool, int, float, str)):
            return repr(value)
        return self.named(value, file) or "…"


def _cell_runs_of(models: Mapping[str, ModelEntry], runs: Sequence[Run]) -> list[CellRun]:
    """What stands for the cells of a session that has none: the code behind it, then one line for each run.

    What has no name at the top level of the file that defines the model is left out, and said.
    """
    files = _Files()
    of_model = {name: files.of(type(entry.model.module).__module__) for name, entry in models.items()}
    lines: list[tuple[int | None, str]] = []
    for name, entry in models.items():
        lines += ((None, line) for line in _construction(name, entry.model, of_model[name], files))
    for index, run in enumerate(runs):
        lines.append((index, _line_of(run, of_model.get(run.model or ""), files)))
    text = "\n\n".join(part for file, names in files.used.items() for part in file.reached(names))
    source = read_cell(text, str) if text else CellSource("", ast.Module([], []))
    statements = [ExecutedStatement(statement, None) for statement in source.tree.body]
    cell_runs = [CellRun(ExecutedCell(None, text), source, statements)]
    for made, line in lines:
        source = read_cell(line, str)
        statements = [ExecutedStatement(statement, source.sites.get(statement)) for statement in source.tree.body]
        cell_run = CellRun(ExecutedCell(None, line), source, statements)
        if made is not None and statements and statements[-1].site is not None:
            statements[-1].made.append((made, statements[-1].site))
        elif made is not None:
            cell_run.loose.append(made)
        cell_runs.append(cell_run)
    return cell_runs


def _construction(name: str, model: Model, file: _File | None, files: _Files) -> Iterator[str]:
    known = files.named(model.module, file)
    if known is not None:
        if known != name:
            yield f"{name} = {known}"
        return
    cls = type(model.module)
    if file is None or model.holds_variables:
        what = "is the construction of" if file is not None else "is the code of"
        yield f"# Left out: nobody knows where {what} `{name}`, {model.describe()}."
        return
    files.use(file, cls.__qualname__.partition(".")[0])
    fields = []
    for field_name, own_field in cls.__dataclass_fields__.items():
        value = getattr(model.module, field_name, None)
        if field_name in ("parent", "name") or not own_field.init or value is own_field.default:
            continue
        fields.append(f"{field_name}={files.spelled(value, file)}")
    yield f"{name} = {cls.__qualname__}({', '.join(fields)})"


def _line_of(run: Run, file: _File | None, files: _Files) -> str:
    if not run.kind.model:
        return f"get_ipython().run_line_magic('flax_key', {run.call!r})"
    arguments = "…"
    if run.inputs is not RELEASED and run.inputs:
        args, kwargs = run.inputs
        added = dict(run.spelling.arguments) if run.spelling is not None else {}
        values = [files.spelled(value, file) for value in args]
        values += [f"{name}={files.spelled(value, file)}" for name, value in kwargs.items() if name not in added]
        arguments = ", ".join(values)
    called = run.call.partition("(")[0]
    if "…" in arguments:
        return f"# Left out: {run.command} {called}({arguments}): its input has no name at the top of a file."
    options = {"train": "--train ", "eval": "--eval "}.get(run.mode, "")
    options += f"--draws {run.draws} " if run.draws is not None else ""
    options += f"--draw {run.seed}:{run.draw} " if run.replayed else ""
    options += "--eager " if run.kind.forward and run.program == "eager" else ""
    return f"get_ipython().run_line_magic('flax_{run.command}', {f'{options}{called}({arguments})'!r})"
