"""Follows what a message advises, as it was printed: pastes a `write`, fills the gaps of a `form`, makes an `edit`."""

from __future__ import annotations

import ast
import importlib
import pkgutil
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import flax_magics
from flax_magics import errors
from flax_magics.errors import FlaxMagicsError
from flax_magics.run import Note
from flax_magics.snapshot import document

ROOT = Path(flax_magics.__file__).parent
TEXTS = {path: path.read_text("utf-8") for path in sorted(ROOT.rglob("*.py"))}
ERRORS = {"FlaxMagicsError", *re.findall(r"class (\w+)\(FlaxMagicsError\)", "\n".join(TEXTS.values()))}
LABELS = ("write", "form", "in your model", "in your loss")
BUILDER = "_refused"
"""A function that makes errors for others: the place is where it is called."""


@dataclass(frozen=True)
class Site:
    """A place in the source that gives a message its advice: file, function, first and last line, begin of its text."""

    file: str
    function: str
    first: int
    last: int
    says: str

    def __str__(self) -> str:
        return f"flax_magics/{self.file}:{self.first} in {self.function}: {self.says}"


def sites() -> list[Site]:
    """Every place that makes advice: where our errors, Note and advice_lines are given some, and Command's examples."""
    found = []
    for path, text in TEXTS.items():
        file = path.relative_to(ROOT).as_posix()
        if file != "errors.py":
            found += list(_sites(ast.parse(text), file, "(module)"))
    return found


def _sites(node: ast.AST, file: str, function: str) -> Iterator[Site]:
    for child in ast.iter_child_nodes(node):
        inside = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef))
        name = child.name if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)) else function
        if isinstance(child, ast.Call) and _advises(child, file) and function != BUILDER:
            says = ast.unparse(child.args[0])[:60] if child.args else ""
            yield Site(file, function, child.lineno, child.end_lineno or child.lineno, says)
        yield from _sites(child, file, name if inside else function)


def _advises(call: ast.Call, file: str) -> bool:
    name = call.func.id if isinstance(call.func, ast.Name) else getattr(call.func, "attr", "")
    keywords = {item.arg for item in call.keywords}
    if name == "Note" and len(call.args) > 2:
        return not isinstance(call.args[2], ast.Starred)  # read from a file: another place has made it
    if name == BUILDER:
        return True
    if name in {*ERRORS, "Note"}:
        return bool(keywords & {"write", "form", "edit", None})
    return name == "advice_lines" or (name == "Command" and file == "line/commands.py")


@dataclass(frozen=True)
class Advice:
    """What was advised, and by which line of which file."""

    label: str
    text: str
    file: str
    line: int


class Recorder:
    """Notes every advice that is made, until `pytest` takes the patches back."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.made: list[Advice] = []
        error, advice, record = FlaxMagicsError.__init__, errors.advice, self._note

        def of_error(own: Any, *args: Any, **kwargs: Any) -> None:
            error(own, *args, **kwargs)
            self._note(advice(own.write, own.form, own.edit, own.where), 2)

        # A module imported while this records would have the class below for ever.
        for found in pkgutil.walk_packages(flax_magics.__path__, "flax_magics."):
            if not found.name.endswith("__main__"):
                importlib.import_module(found.name)

        class RecordedNote(Note, frozen=True):
            def __post_init__(self) -> None:
                record(self.advice, 2)

        def of_lines(*args: Any) -> list[tuple[str, str]]:
            found = advice(*args)
            self._note(found, 3)
            return found

        monkeypatch.setattr(FlaxMagicsError, "__init__", of_error)
        for name, module in list(sys.modules.items()):
            # msgspec looks up once for ever what a record in `document` consists of.
            if name.startswith("flax_magics.") and module is not document and vars(module).get("Note") is Note:
                monkeypatch.setattr(module, "Note", RecordedNote)
        monkeypatch.setattr(errors, "advice", of_lines)

    def _note(self, found: list[tuple[str, str]], depth: int) -> None:
        frame = sys._getframe(depth)
        if frame.f_code.co_name == BUILDER:
            frame = sys._getframe(depth + 1)
        file = Path(frame.f_code.co_filename)
        if file.is_relative_to(ROOT) and file.name != "errors.py":
            name = file.relative_to(ROOT).as_posix()
            self.made += [Advice(label.strip(" :"), text, name, frame.f_lineno) for label, text in found]


def printed_advice(printed: str) -> list[tuple[str, str]]:
    """Labels and texts of what is advised in what was printed."""
    found: list[tuple[str, str]] = []
    hang: int | None = None
    for line in printed.splitlines():
        begin = re.match(rf"( *)({'|'.join(LABELS)}): ", line)
        if begin is not None:
            hang = begin.end()
            found.append((begin[2], line[hang:]))
        elif hang is not None and line[:hang].isspace() and len(line) > hang:
            label, text = found.pop()
            found.append((label, f"{text}\n{line[hang:]}"))
        else:
            hang = None
    return found


@dataclass(frozen=True)
class Scenario:
    """A message that is provoked, and its advice followed.

    Attributes:
      place: where the message is made: file and function, such as `call.parse_call`.
      mistake: the cell that provokes it, or a function that does and gives what was printed.
      cells: run before; an edit is made in the last.
      fill: what stands for each gap of a `form`, in order.
      edit: gives the model's cell as the advice has it, from the cell and the advice.
      use: where the text is pasted: a cell with `{}` in it, or a function that gives the cell.
      stops: the exception that the pasted lines are there to raise.
      paste: pastes it elsewhere than in a cell.
      after: a cell that is run when that has worked.
      again: the mistake is run once more afterwards, as it was written, and is none any more.
      check: an expression that holds afterwards.
      patch: brings about what cannot be had in a test.
    """

    place: str
    mistake: str | Callable[[], str]
    cells: tuple[str, ...] = ()
    fill: tuple[str, ...] = ()
    edit: Callable[[str, str], str] | None = None
    use: str | Callable[[str], str] = "{}"
    stops: str = ""
    paste: Callable[[str], str] | None = None
    after: str = ""
    again: bool = False
    check: str = ""
    patch: Callable[[pytest.MonkeyPatch], None] | None = None


class Follower:
    """Follows scenarios in one notebook."""

    def __init__(self, notebook: Any, caplog: Any, recorder: Recorder) -> None:
        self.notebook, self.caplog, self.recorder = notebook, caplog, recorder

    def run(self, cell: str | Callable[[], str], *, works: bool = False) -> str:
        """What a cell printed and logged; `works`: it must not fail."""
        if not isinstance(cell, str):
            return cell()
        self.notebook._capsys.readouterr()
        self.caplog.clear()
        result = self.notebook.shell.run_cell(cell, store_history=True)
        out = self.notebook._capsys.readouterr().out
        if works:
            assert result.success, f"{cell}\n{out}"
        return "\n".join([out.rstrip(), *self.caplog.messages])

    def follow(self, scenario: Scenario) -> tuple[str, int]:
        """Provokes the message, does what it advises, and gives file and line of what made it."""
        for cell in scenario.cells:
            self.run(cell, works=True)
        self.recorder.made.clear()
        printed = self.run(scenario.mistake)
        advice, text = self._advice(scenario.place, printed)
        if advice.label.startswith("in your "):
            assert scenario.edit is not None, printed
            pasted = self.run(scenario.edit(scenario.cells[-1], text), works=True)
        else:
            assert (advice.label == "form") is ("…" in text), printed
            for filled in scenario.fill:
                assert "…" in text, f"no gap for {filled!r} in:\n{printed}"
                text = text.replace("…", filled, 1)
            assert "…" not in text, f"a gap is left open in:\n{text}"
            if scenario.paste is not None:
                pasted = scenario.paste(text)
            else:
                cell = scenario.use.replace("{}", text) if isinstance(scenario.use, str) else scenario.use(text)
                pasted = self.run(cell, works=not scenario.stops)
                assert scenario.stops in pasted
        if scenario.after:
            pasted += "\n" + self.run(scenario.after, works=True)
        if scenario.again or scenario.edit is not None:
            pasted += "\n" + self.run(scenario.mistake, works=True)
        after = [found.file + found.text for found in self.recorder.made if _shown(found, pasted)]
        assert advice.file + advice.text not in after, f"said again after it was followed:\n{pasted}"
        if scenario.check:
            assert eval(scenario.check, self.notebook.shell.user_ns), scenario.check
        return advice.file, advice.line

    def _advice(self, place: str, printed: str) -> tuple[Advice, str]:
        """The last that was made in that place and was printed, and its text as printed."""
        file, _, function = place.rpartition(".")
        for made in reversed(self.recorder.made):
            if made.file == f"{file.replace('.', '/')}.py" and site_of(made.file, made.line).function == function:
                for label, text in printed_advice(printed):
                    if (label, text.split()) == (made.label, made.text.split()):
                        return made, text
        raise AssertionError(f"no advice of {place} in:\n{printed}\nmade: {self.recorder.made}")


def _shown(advice: Advice, printed: str) -> bool:
    return (advice.label, advice.text.split()) in [(label, text.split()) for label, text in printed_advice(printed)]


SITES = sites()


def site_of(file: str, line: int) -> Site:
    """The place that a line belongs to."""
    around = [site for site in SITES if site.file == file and site.first <= line <= site.last]
    assert around, f"flax_magics/{file}:{line} makes advice, and is not among the places that were found"
    return min(around, key=lambda site: site.last - site.first)
