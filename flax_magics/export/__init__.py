"""Writes a session as a plain Flax script: `%flax_export`.

The script has the cells in the order in which they ran. Each command is replaced by the lines that a person would have
written: the split of the root key, `init`, a jitted `apply` with its rngs, what is kept. What cannot be written is
named in a comment in its place. The file is written whole or not at all, formatted, and never over something that a
person wrote.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from msgspec import Struct

from ..base.files import checked_target, replace_file
from ..base.text import plural
from ..base.tokens import variable_name
from ..cells.journal import ExecutedCell, NotebookCells
from ..errors import FlaxMagicsError, visible
from ..report.text import Notice
from ..run import RELEASED, Note, Run
from ..state.entry import ModelEntry
from .cells import CellRun, CellSource, begin, end, match, read_cell
from .commands import SESSION_VARIABLES
from .context import RunGroups, ScriptContext, ScriptModel
from .edit import assigned_by, binds, mentioned, reads, sets_variables
from .script import RootKeyTracker, Script
from .writer import Free, LineWriter


class Exported(Struct, frozen=True):
    """A session as a script.

    Attributes:
      text: the whole script.
      cells: how many executions of cells left lines in it.
      runs: how many runs the session had.
      unexported: what could not be exported, each with its reason.
    """

    text: str
    cells: int
    runs: int
    unexported: tuple[str, ...] = ()

    def __repr__(self) -> str:
        what = (
            f"{plural(self.cells, 'cell')}, {plural(self.runs, 'run')}, {plural(len(self.text.splitlines()), 'line')}"
        )
        return f"<Exported: {what}>"

    def __str__(self) -> str:
        return self.text


def export_session(
    models: Mapping[str, ModelEntry], runs: Sequence[Run], cells: NotebookCells | None, *, seed: int, digests: bool
) -> Exported:
    """Writes the script of a session.

    Args:
      cells: the cells that a notebook ran, the last of which may be asking for the export; None outside of a notebook,
        where `_cell_runs_of` finds the code that the session came from.
      seed: of the root key, if neither cells nor runs tell what it was at first.
      digests: whether the script prints a digest for each run.
    """
    if cells is None:
        cell_runs, restarts = _cell_runs_of(models, runs), []
        seed = runs[0].seed if runs else seed
        title = "The models and runs of a session"
    else:
        cell_runs = match([(cell, read_cell(cell.text, cells.transform)) for cell in cells.executed], runs)
        restarts, seed = cells.restarts, cells.seed
        title = "The cells of a notebook in the order in which they ran"
        # The command that asks for the export, and what stands below it in its cell, are not exported.
        statements = cell_runs[-1].statements if cell_runs else []
        calls = [each.site.name if each.site else ast.unparse(each.statement) for each in statements]
        asking = [i for i, call in enumerate(calls) if call == "flax_export" or ".export(" in call]
        del statements[asking[-1] if asking else len(statements) :]
    sources = [cell_run.source for cell_run in cell_runs]
    # Reading all cells comes before any writing: a name of ours must be free in every cell of the session.
    free = Free({*models, *(name for source in sources for name in mentioned(source.tree))})
    writer = LineWriter.like([cell_run.cell.text for cell_run in cell_runs], free, digests=digests)
    script_models = {name: _model(name, models, runs, free, sources) for name in models}
    executed = [each for cell_run in cell_runs for each in cell_run.statements]
    bindings = Counter(name for each in executed for name in binds(each.statement))
    rebound = frozenset(name for name, times in bindings.items() if times > 1)
    of_vars = " ".join(site.line for source in sources for site in source.sites.values() if site.name == "flax_vars")
    asked_back = frozenset(name for _, name, which in SESSION_VARIABLES.findall(of_vars) if which == "previous")
    groups = RunGroups(runs, cell_runs, restarts)
    context = ScriptContext(writer, groups, script_models, rebound=rebound, asked_back=asked_back)
    stopped = [site for each in executed if each.failed for _, site in each.runs if site is not None]
    in_functions = any(site.in_function is not None for site in stopped)
    script = Script(context, RootKeyTracker(context, seed), stops_in_functions=in_functions)
    for cell_run in cell_runs:
        script.cell(cell_run)
    written = sum(any(map(any, (lines.text for lines in block))) for block in script.blocks)
    return Exported(script.finished(title, sources), written, len(runs), tuple(context.unexported))


def _model(
    name: str, entries: Mapping[str, ModelEntry], runs: Sequence[Run], free: Free, sources: Sequence[CellSource]
) -> ScriptModel:
    """A registered model in the script, with free names for its variables and keys."""
    entry = entries[name]
    module = entry.model.module
    # Registered under its class's name: in the script that name is the class.
    instance = free.take(variable_name(name)) if type(module).__name__ == name else name
    opt_state = None if entry.training is None else entry.training.opt_state
    if entry.model.api != "linen":
        construction = entry.built.recipe.text if entry.built is not None else ""
        saved = entry.model.variables_to_save(None)
        loaded = {kind: tree for kind, tree in saved.items() if kind not in ("RngKey", "RngCount")}
        return ScriptModel(instance, module, True, construction=construction, loaded=loaded, opt_state=opt_state)
    variables = _name_of_init(name, runs, sources)
    if not variables:
        alone = [other.model.api for other in entries.values()].count("linen") == 1
        variables = free.take(*(["variables"] if alone else []), f"{instance}_variables")
    adds = any(run.model == name and run.made is not None and run.made.added for run in runs)
    first_key = free.take(f"{instance}_init_key") if adds else ""
    return ScriptModel(
        instance, module, False, variables, first_key=first_key, loaded=entry.variables, opt_state=opt_state
    )


def _name_of_init(model: str, runs: Sequence[Run], sources: Sequence[CellSource]) -> str:
    """The user's own name for a model's variables, if it always holds the session's; empty where it may not."""
    sites = [site for source in sources for site in source.sites.values()]
    inits = [site for site in sites if site.name == "flax_init" and site.call]
    targets = [site.target.removesuffix("=").strip() for site in inits if site.call and site.call.target == model]
    # Only if every init assigns to one plain name, at the top of a cell, and nothing else ever binds it.
    if len(set(targets)) != 1 or not targets[0].isidentifier() or any(site.path for site in inits):
        return ""
    nodes = [node for source in sources for node in ast.walk(source.tree)]
    named = [n for n in nodes if getattr(n, "id", getattr(n, "name", getattr(n, "arg", None))) == targets[0]]
    bound = sum(not isinstance(getattr(n, "ctx", None), ast.Load) for n in named) + sum(map(sets_variables, nodes))
    changed = any(run.changed or run.made is not None for run in runs if run.kind.forward and run.model == model)
    changed = changed or any(model in assigned_by(site) for site in sites)
    return "" if changed or bound != len(targets) else targets[0]


@dataclass(eq=False)
class _File:
    """The source of a Python file (a module), and its statements at the top level."""

    globals: Mapping[str, object]
    statements: list[ast.stmt]
    text: str

    @classmethod
    def of(cls, name: str) -> _File | None:
        """The file of an imported module, None if its source is not to be had."""
        module = sys.modules.get(name)
        try:
            text = inspect.getsource(module)  # type: ignore[arg-type]
            return cls(vars(module), ast.parse(text).body, text)
        except (OSError, TypeError, SyntaxError):
            return None

    def name_of(self, value: object) -> str | None:
        """A global name that is bound to this very object by a statement at the top level; None if there is none."""
        names = (name for name, held in self.globals.items() if held is value and not name.startswith("_"))
        return next((name for name in names if any(name in binds(statement) for statement in self.statements)), None)

    def reached(self, names: Iterable[str]) -> Iterator[str]:
        """Yields the texts of the statements that bind `names`, and of those that they need in turn."""
        needed, wanted = set[ast.stmt](), set(names)
        while more := {s for s in self.statements if not wanted.isdisjoint(binds(s))} - needed:
            needed |= more
            wanted.update(*map(reads, more))
        lines = self.text.split("\n")
        for statement in self.statements:
            if statement in needed:
                yield "\n".join(lines[begin(statement) - 1 : end(statement)])


class _Files:
    """The files that define the session's models, and the script that was run.

    Attributes:
      of: maps a module's name to its file; cached, so that each file is one object.
      used: file → the global names that the export takes from it, in the order in which they were needed.
    """

    def __init__(self) -> None:
        self.of = functools.cache(_File.of)
        self.used: dict[_File, set[str]] = {}

    def use(self, file: _File, name: str) -> str:
        """Records that the export needs a global name of `file`, and returns the name."""
        self.used.setdefault(file, set()).add(name)
        return name

    def named(self, value: object, file: _File | None) -> str | None:
        """A name for an object in `file`, or else in the script that was run; None if neither has one."""
        for place in filter(None, (file, self.of("__main__"))):
            name = place.name_of(value)
            if name is not None:
                return self.use(place, name)
        return None

    def spelled(self, value: object, file: _File | None) -> str:
        """A value as an expression: its literal or its name; `…` if it has neither."""
        literal = value is None or isinstance(value, (bool, int, float, str))
        return repr(value) if literal else self.named(value, file) or "…"


def _cell_runs_of(models: Mapping[str, ModelEntry], runs: Sequence[Run]) -> list[CellRun]:
    """Stands in for the cells of a session without any: the code that it needs, then one line for each run.

    Inputs and models without a name at the top level of their file become a comment.
    """
    files = _Files()
    of_model = {name: files.of(type(entry.model.module).__module__) for name, entry in models.items()}
    lines: list[tuple[int | None, str]] = []
    for name in models:
        lines += ((None, line) for line in _construction(name, models, of_model[name], files))
    lines += ((index, _line_of(run, of_model.get(run.model or ""), files)) for index, run in enumerate(runs))
    code = "\n\n".join(part for file, names in files.used.items() for part in file.reached(names))
    cell_runs = []
    for index, text in [(None, code), *lines]:
        source = read_cell(text, str)
        cell_run = CellRun(ExecutedCell(None, text), source, source.statements())
        last = cell_run.statements[-1] if cell_run.statements else None
        if index is not None and last is not None and last.site is not None:
            last.runs.append((index, last.site))
        elif index is not None:
            cell_run.loose.append(index)
        cell_runs.append(cell_run)
    return cell_runs


def _construction(name: str, entries: Mapping[str, ModelEntry], file: _File | None, files: _Files) -> list[str]:
    model = entries[name].model
    known = files.named(model.module, file)
    if known is not None:
        return [] if known == name else [f"{name} = {known}"]
    cls = type(model.module)
    if file is None or model.api != "linen":  # of these fields tell how they are built
        what = "is the construction of" if file is not None else "is the code of"
        return [f"# Left out: nobody knows where {what} `{name}`, {model.describe()}."]
    files.use(file, cls.__qualname__.partition(".")[0])
    fields = []
    for field_name, own_field in cls.__dataclass_fields__.items():
        value = getattr(model.module, field_name, None)
        if field_name in ("parent", "name") or not own_field.init or value is own_field.default:
            continue
        fields.append(f"{field_name}={files.spelled(value, file)}")
    return [f"{name} = {cls.__qualname__}({', '.join(fields)})"]


def _line_of(run: Run, file: _File | None, files: _Files) -> str:
    if not run.kind.model:
        # In the form that IPython gives magics, which is what the export looks for in cells.
        return f"get_ipython().run_line_magic('flax_key', {run.call!r})"
    arguments = "…"
    if run.inputs is not RELEASED and run.inputs:
        args, kwargs = run.inputs
        added = dict(run.spelling.arguments) if run.spelling is not None else {}
        values = [files.spelled(value, file) for value in args]
        values += [f"{name}={files.spelled(value, file)}" for name, value in kwargs.items() if name not in added]
        arguments = ", ".join(values)
    called = run.call.partition("(")[0]
    if run.kind.loss:
        return _line_of_grad(run, called, arguments, files)
    if "…" in arguments:
        return f"# Left out: {run.command} {called}({arguments}): its input has no name at the top of a file."
    options = {"train": "--train ", "eval": "--eval "}.get(run.mode, "")
    options += f"--samples {run.samples} " if run.samples is not None else ""
    options += f"--keys-of {run.seed}:{run.draw} " if run.replayed else ""
    options += "--eager " if run.kind.forward and run.program == "eager" else ""
    return f"get_ipython().run_line_magic('flax_{run.command}', {f'{options}{called}({arguments})'!r})"


def _line_of_grad(run: Run, loss: str, arguments: str, files: _Files) -> str:
    """The line of a loss, which a file of the script's own has under its name."""
    script = files.of("__main__")
    frozen = any(layer.frozen for layer in run.layers)  # by patterns that the run does not tell
    if script is None or loss not in script.globals or frozen or run.kind.trains or "…" in arguments:
        return f"# Left out: {run.command} {loss}({arguments}): its loss or its input has no name at the top of a file."
    files.use(script, loss)
    option = "--eval " if run.mode == "eval" else ""
    call = f"{option}{loss}({', '.join(filter(None, (run.model, arguments)))})"
    return f"get_ipython().run_line_magic('flax_grad', {call!r})"


# -- its file


def script_bundle(code: str, style: str) -> dict[str, str]:
    """The MIME bundle of Python code. As Markdown it has the syntax colors of every host.

    What a terminal obeys is shown as its escape, which in a string of the code means the same.
    """
    code = visible(code)
    if style == "text":
        return {"text/plain": code}
    # A fence longer than any run of backticks in the code.
    fence = "`" * max(3, *(len(ticks) + 1 for ticks in re.findall("`+", code)), 3)
    return {"text/plain": code, "text/markdown": f"{fence}python\n{code}{fence}\n"}


# The last line of a file, with a digest of the lines above it, which tells whether somebody has edited them.
_MARK = "# Written by %flax_export, which replaces this file as long as nobody changes it: "


def write(file: str | os.PathLike[str], text: str, *, force: bool = False) -> tuple[Path, bool]:
    """Writes the script to `file`, which must end in `.py`. Returns the path, and whether a file was replaced.

    Args:
      force: replace any file that is there.

    Raises:
      FlaxMagicsError: another file is there, or an export that was edited since; or it cannot be written. Nothing was
        changed then.
    """
    path = Path(file).expanduser()
    if path.suffix != ".py":
        name = path.with_suffix(".py") if path.suffix not in ("", ".") else path.parent / f"{path.name.strip('.')}.py"
        line = f"%flax_export {name if path.name != '.py' else path.parent / 'session.py'}"
        raise FlaxMagicsError(f"a script is a file with the ending .py, and `{path.name}` has another.", write=line)
    try:
        replaces = checked_target(path) is not None
        path = path.resolve()  # a link stays, and the file that it points to is written
        if replaces and not force:
            _check(path, file)
        code = formatted(text, path)
        signed = f"{code}\n{_MARK}{_digest(code)}\n"
        replace_file(path, lambda name: Path(name).write_text(signed, encoding="utf-8", newline="\n"))
    except OSError as error:
        raise FlaxMagicsError(f"`{file}` could not be written: {error.strerror or error}.") from error
    return path, replaces


def formatted(text: str, path: Path) -> str:
    """`text` formatted by ruff or black with the settings that apply to `path`; unchanged if neither is installed."""
    # Of this Python's environment first, which may not be on PATH.
    folders = os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", "")])
    for name, options in (("ruff", ["format"]), ("black", ["--quiet"])):
        program = shutil.which(name, path=folders)
        if program is None:
            continue
        command = [program, *options, "--stdin-filename", str(path), "-"]
        with suppress(OSError, subprocess.SubprocessError):
            result = subprocess.run(command, input=text, capture_output=True, encoding="utf-8", timeout=30)
            if result.returncode == 0 and result.stdout:
                return result.stdout
    return text


def notice(script: Exported, path: Path, replaced: bool) -> Notice:
    """The answer of `%flax_export FILE`: `session.py · written · 12 cells · 9 runs`, and what was not exported."""
    notes = tuple(Note("export", f"not in the script: {reason}") for reason in script.unexported)
    parts = ("replaced" if replaced else "written", plural(script.cells, "cell"), plural(script.runs, "run"))
    return Notice(path.name, parts, notes)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _check(path: Path, file: str | os.PathLike[str]) -> None:
    try:
        text = path.read_text("utf-8")
    except (OSError, ValueError):
        text = ""
    before, mark, digest = text.rpartition(f"\n{_MARK}")
    if not mark:
        what = f"`{file}` is there already, and no export wrote it."
    elif digest.strip() != _digest(before):
        what = f"`{file}` was changed since it was exported."
    else:
        return
    raise FlaxMagicsError(f"{what} --force replaces it.", write=f"%flax_export --force {file}")
