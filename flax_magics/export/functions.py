"""The jitted functions of a script: one for each way in which a model is run."""

from __future__ import annotations

import ast
import keyword
from collections.abc import Container, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..line.call import Argument, CallExpression
from ..run import ContainerPart, ExportFacts
from .writer import LineWriter, call, indented


class CannotSay(Exception):
    """A command or a statement for which there are no lines; the message says why.

    Attributes:
      cause: why the names that it gives a value have none then.
    """

    def __init__(self, message: str, cause: str = "") -> None:
        super().__init__(message)
        self.cause = cause or message


@dataclass(frozen=True)
class SplitArguments:
    """The arguments of a call, parted into those of a jitted function and those that are written into its body.

    Attributes:
      parameters: names of the function's own parameters.
      inside: the arguments as its body passes them on.
      outside: what is given for the parameters, as the cell has it.
      static: parameters that are no data.
    """

    parameters: tuple[str, ...]
    inside: tuple[str, ...]
    outside: tuple[str, ...]
    static: tuple[str, ...]


def split(writer: LineWriter, call: CallExpression, spelling: ExportFacts, used: Sequence[str]) -> SplitArguments:
    """The arguments of `call`. `used` are names that no parameter may have."""
    containers = dict(spelling.containers)
    parameters: list[str] = []
    inside: list[str] = []
    outside: list[str] = []
    static: list[str] = []
    place = 0
    if any(name in ("*", "**") for name, _ in call.arguments):
        # Which of them come by `**`, only the call itself knows.
        written = {name for name, _ in call.arguments}
        unknown = sorted(spelling.static - written - set(spelling.parameters))
        static += [name for name in unknown if name.isidentifier()]
    for argument in call.arguments:
        name, text = argument.name, one_line(argument.text)
        if name in ("*", "**"):
            own = "args" if name == "*" else "kwargs"
            parameters.append(name + own)
            inside.append(name + own)
            outside.append(name + text)
            continue
        leaf = name
        if name is None:
            leaf = spelling.parameters[place] if place < len(spelling.parameters) else f"argument_{place}"
            place += 1
        assert leaf is not None
        before = "" if name is None else f"{name}="
        if _is_choice(text) or (leaf in spelling.static and _is_literal(text)):
            inside.append(before + text)
            continue
        if leaf in containers:
            apart = _Apart(writer, {*used, *parameters})
            inside.append(before + apart.text(text, containers[leaf], leaf))
            parameters += apart.parameters
            outside += apart.outside
            static += apart.static
            continue
        parameter = _free_name(leaf, {*used, *parameters})
        parameters.append(parameter)
        inside.append(before + parameter)
        outside.append(text)
        if leaf in spelling.static:
            static.append(parameter)
    return SplitArguments(tuple(parameters), tuple(inside), tuple(outside), tuple(static))


@dataclass(eq=False)
class _Apart:
    """Writes a container into a function's body, with parameters for what is no literal in it."""

    writer: LineWriter
    used: set[str]
    parameters: list[str] = field(default_factory=list)
    outside: list[str] = field(default_factory=list)
    static: list[str] = field(default_factory=list)

    def text(self, written: str, part: ContainerPart, name: str) -> str:
        """The expression for `part`, where the call has `written`; `name` is for a parameter."""
        if part.kind == "none":
            return "None"
        if part.kind == "choice" and _is_literal(written):
            return written
        if part.kind in ("data", "choice"):
            parameter = _free_name(name, self.used)
            self.used.add(parameter)
            self.parameters.append(parameter)
            self.outside.append(written)
            if part.kind == "choice":
                self.static.append(parameter)
            return parameter
        inner = _elements(written, part)
        rows = []
        for key, item in part.inside:
            literal = self.writer.text(key) if isinstance(key, str) else str(key)
            own = key if isinstance(key, str) and key.isidentifier() else f"{name}_{key}"
            row = self.text(inner.get(key, f"{written}[{literal}]"), item, own)
            rows.append(f"{literal}: {row}" if part.kind == "dict" else row)
        if part.kind == "tuple":
            return f"({', '.join(rows)}{',' * (len(rows) == 1)})"
        return ("{%s}" if part.kind == "dict" else "[%s]") % ", ".join(rows)


def _elements(written: str, part: ContainerPart) -> dict[str | int, str]:
    """The elements of a container that is spelled out in the call; none of one that has a name."""
    node = ast.parse(written.strip(), mode="eval").body
    found: dict[str | int, ast.expr] = {}
    match node:
        case ast.Dict(keys, values):
            for key, value in zip(keys, values, strict=True):
                match key:
                    case ast.Constant(str() | int() as name):
                        found[name] = value
        case ast.List(items) | ast.Tuple(items) if not any(isinstance(item, ast.Starred) for item in items):
            found = dict(enumerate(items))
        case ast.Name() | ast.Attribute() | ast.Subscript():
            return {}
    if set(found) != {key for key, _ in part.inside}:
        raise CannotSay("an argument is put together in the call")
    return {key: ast.get_source_segment(written.strip(), value) or "" for key, value in found.items()}


def as_written(arguments: Sequence[Argument]) -> list[str]:
    """The arguments of a call as the cell has them."""
    out = []
    for name, text in arguments:
        before = "" if name is None else name if name in ("*", "**") else f"{name}="
        out.append(before + one_line(text))
    return out


def one_line(text: str) -> str:
    """An expression on one line."""
    return text if "\n" not in text else ast.unparse(ast.parse(text.strip(), mode="eval").body)


def _free_name(leaf: str, used: Container[str]) -> str:
    name = _plain_name(leaf)
    while name in used or keyword.iskeyword(name):
        name += "_"
    return name


def _plain_name(leaf: str) -> str:
    return "".join(letter if letter.isalnum() else "_" for letter in leaf).strip("_") or "x"


def _is_literal(text: str) -> bool:
    try:
        ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return False
    return True


def _is_choice(text: str) -> bool:
    """Whether it is a literal that is no data: True, None, a string."""
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return False
    return value is None or isinstance(value, (bool, str, bytes))


@dataclass(eq=False)
class Function:
    """A function of the script.

    Attributes:
      version: of the model's code when it was defined: see `RunGroups.version`. It is traced once, so that for another
        it has to be defined again.
      used: the last cell, by number, that calls it.
    """

    name: str
    version: Any
    used: int


@dataclass(frozen=True)
class JittedFunction:
    """A function that a run needs.

    Attributes:
      model: the variable that holds the module.
      names: how it may be called, best first.
      decorator: such as `jax.jit`.
      parameters, static: see `SplitArguments`.
      body: its lines.
    """

    model: str
    names: tuple[str, ...]
    decorator: str
    parameters: tuple[str, ...]
    static: tuple[str, ...]
    body: tuple[str, ...]

    def lines(self, writer: LineWriter, name: str) -> list[str]:
        """The function under `name`."""
        decorator = f"@{self.decorator}"
        if self.static:
            writer.needs.add("functools")
            names = ", ".join(map(writer.text, self.static)) + ("," if len(self.static) == 1 else "")
            decorator = f"@functools.partial({self.decorator}, static_argnames=({names}))"
        return [
            decorator,
            call(f"def {name}(", self.parameters, "):"),
            *indented(self.body, writer.unit),
        ]


def verb_of(mode: str, method: Sequence[str]) -> str:
    """What a function is called that runs a model: `train`, `evaluate`, `apply`, `encode`, `train_encode`."""
    verb = {"train": "train", "eval": "evaluate"}.get(mode, "apply")
    if not method:
        return verb
    return method[-1] if mode == "as written" else f"{verb}_{method[-1]}"
