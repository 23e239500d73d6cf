"""A session that no cells made: the code of its models and inputs, read from the files that they come from."""

from __future__ import annotations

import ast
import inspect
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..cells.journal import ExecutedCell
from ..cells.names import binds, reads
from ..run import RELEASED, Run
from .cells import CellRun, CellSource, ExecutedStatement, read_cell


@dataclass(eq=False)
class _File:
    """A module's own text: its top-level statements, and what each reads and binds."""

    globals: Mapping[str, Any]
    statements: list[ast.stmt] = field(default_factory=list)
    text: str = ""

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

    def reached(self, names: set[str]) -> set[ast.stmt]:
        """The statements that bind `names`, and those that these need."""
        out: set[ast.stmt] = set()
        waiting = list(names)
        seen: set[str] = set()
        while waiting:
            name = waiting.pop()
            if name in seen:
                continue
            seen.add(name)
            for statement in self.statements:
                if name in binds(statement):
                    out.add(statement)
                    waiting += reads(statement)
        return out


def cell_runs_of(session: Any) -> list[CellRun]:
    """What stands for the cells of a session that has none: the code behind it, then one line for each run.

    What has no name at the top level of the file that defines the model is left out, and said.
    """
    modules = {name: model._entry().model for name, model in session.models.items()}
    files = {name: _File.of(type(model.module).__module__) for name, model in modules.items()}
    main = _File.of("__main__")
    lines: list[tuple[int | None, str]] = []
    wanted: dict[int, tuple[_File, set[str]]] = {}

    def want(file: _File, name: str) -> None:
        wanted.setdefault(id(file.globals), (file, set()))[1].add(name)

    for name, model in modules.items():
        file = files[name]
        lines += ((None, line) for line in _construction(name, model, file, main, want))
    for index, run in enumerate(session.runs):
        lines += ((index, line) for line in _run(run, files.get(run.model or ""), main, want))
    text = "\n\n".join(_texts(wanted.values()))
    first = read_cell(text, str) if text else CellSource("", ast.Module([], []))
    out = [CellRun(ExecutedCell(None, text), first, [ExecutedStatement(s, None) for s in first.tree.body])]
    for made, line in lines:
        source = read_cell(line, str)
        steps = [ExecutedStatement(statement, source.sites.get(statement)) for statement in source.tree.body]
        cell_run = CellRun(ExecutedCell(None, line), source, steps)
        if made is not None and steps and steps[-1].site is not None:
            steps[-1].made.append((made, steps[-1].site))
        elif made is not None:
            cell_run.loose.append(made)
        out.append(cell_run)
    return out


def _texts(wanted: Any) -> Iterator[str]:
    for file, names in wanted:
        found = file.reached(names)
        for statement in file.statements:
            if statement in found:
                begin = min([statement.lineno, *(d.lineno for d in getattr(statement, "decorator_list", []))])
                yield "\n".join(file.text.split("\n")[begin - 1 : statement.end_lineno])


def _construction(name: str, model: Any, file: _File | None, main: _File | None, want: Any) -> Iterator[str]:
    for place in (file, main):
        own = None if place is None else place.name_of(model.module)
        if own is not None:
            want(place, own)
            if own != name:
                yield f"{name} = {own}"
            return
    cls = type(model.module)
    if file is None or model.holds_variables:
        what = "is the construction of" if file is not None else "is the code of"
        yield f"# Left out: nobody knows where {what} `{name}`, {model.describe()}."
        return
    want(file, cls.__qualname__.partition(".")[0])
    fields = []
    for field_name, own_field in cls.__dataclass_fields__.items():
        value = getattr(model.module, field_name, None)
        if field_name in ("parent", "name") or not own_field.init or value is own_field.default:
            continue
        fields.append(f"{field_name}={_spelled(value, file, main, want)}")
    yield f"{name} = {cls.__qualname__}({', '.join(fields)})"


def _spelled(value: Any, file: _File | None, main: _File | None, want: Any) -> str:
    """A value as an expression: a literal, or the name that stands for it; None as `…` where there is neither."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return repr(value)
    for place in (file, main):
        name = None if place is None else place.name_of(value)
        if name is not None:
            want(place, name)
            return name
    return "…"


def _run(run: Run, file: _File | None, main: _File | None, want: Any) -> Iterator[str]:
    if not run.kind.model:
        yield f"get_ipython().run_line_magic('flax_key', {run.call!r})"
        return
    inputs: Sequence[Any] = () if run.inputs is RELEASED else run.inputs
    arguments = "…"
    if inputs:
        added = dict(run.spelling.arguments) if run.spelling is not None else {}
        parts = [_spelled(value, file, main, want) for value in inputs[0]]
        parts += [f"{k}={_spelled(v, file, main, want)}" for k, v in inputs[1].items() if k not in added]
        arguments = ", ".join(parts)
    called = run.call.partition("(")[0]
    if "…" in arguments:
        yield f"# Left out: {run.command} {called}({arguments}): its input has no name at the top of a file."
        return
    options = {"train": "--train ", "eval": "--eval "}.get(run.mode, "")
    options += f"--draws {run.draws} " if run.draws is not None else ""
    options += f"--draw {run.seed}:{run.draw} " if run.replayed else ""
    options += "--eager " if run.kind.forward and run.program == "eager" else ""
    line = f"{options}{called}({arguments})"
    yield f"get_ipython().run_line_magic('flax_{run.command}', {line!r})"
