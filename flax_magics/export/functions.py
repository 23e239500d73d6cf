"""What a call becomes: its arguments parted, and the jitted function for each way in which a model is run."""

from __future__ import annotations

import ast
import itertools
import keyword
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from msgspec import Struct

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


@dataclass(eq=False)
class SplitArguments:
    """The arguments of a call, parted into those of a jitted function and those that are written into its body.

    Attributes:
      used: names that no further parameter may have.
      parameters: names of the function's own parameters.
      inside: the arguments as its body passes them on.
      outside: what is given for the parameters, as the cell has it.
      static: parameters that are no data.
    """

    writer: LineWriter
    used: set[str]
    parameters: list[str] = field(default_factory=list)
    inside: list[str] = field(default_factory=list)
    outside: list[str] = field(default_factory=list)
    static: list[str] = field(default_factory=list)

    def expression(self, written: str, part: ContainerPart, name: str) -> str:
        """What the function's body has for an argument, or for a part of one that is a container.

        Args:
          written: what the call has there.
          name: for the parameter, where it becomes one.
        """
        if part.kind == "none":
            return "None"
        if part.kind == "choice" and _is_literal(written):
            return written
        if part.kind in ("data", "choice"):
            parameter = "".join(letter if letter.isalnum() else "_" for letter in name).strip("_") or "x"
            while parameter in self.used or keyword.iskeyword(parameter):
                parameter += "_"
            self.used.add(parameter)
            self.parameters.append(parameter)
            self.outside.append(written)
            self.static += [parameter] * (part.kind == "choice")
            return parameter
        elements = _elements(written, part)
        rows = []
        for key, inner in part.inside:
            literal = self.writer.text(key) if isinstance(key, str) else str(key)
            inner_name = key if isinstance(key, str) and key.isidentifier() else f"{name}_{key}"
            row = self.expression(elements.get(key, f"{written}[{literal}]"), inner, inner_name)
            rows.append(f"{literal}: {row}" if part.kind == "dict" else row)
        if part.kind == "tuple":
            return f"({', '.join(rows)}{',' * (len(rows) == 1)})"
        return ("{%s}" if part.kind == "dict" else "[%s]") % ", ".join(rows)


def split(writer: LineWriter, call: CallExpression, facts: ExportFacts, used: Iterable[str]) -> SplitArguments:
    """The arguments of `call`. `used` are names that no parameter may have."""
    containers = dict(facts.containers)
    arguments = SplitArguments(writer, set(used))
    if any(name in ("*", "**") for name, _ in call.arguments):
        # Which of them come by `**`, only the call itself knows.
        unknown = sorted(facts.static - {name for name, _ in call.arguments} - set(facts.parameters))
        arguments.static += [name for name in unknown if name.isidentifier()]
    unnamed = (f"argument_{place}" for place in itertools.count(len(facts.parameters)))
    positional = itertools.chain(facts.parameters, unnamed)
    for name, text in ((argument.name, one_line(argument.text)) for argument in call.arguments):
        if name in ("*", "**"):
            parameter = f"{name}args" if name == "*" else f"{name}kwargs"
            arguments.parameters.append(parameter)
            arguments.inside.append(parameter)
            arguments.outside.append(f"{name}{text}")
            continue
        leaf = next(positional) if name is None else name
        container = containers.get(leaf) or ContainerPart("choice" if leaf in facts.static else "data")
        # True, None, a string: no data, whatever the run made of it.
        constants = (object,) if leaf in facts.static else (bool, str, bytes, type(None))
        value = text if _is_literal(text, constants) else arguments.expression(text, container, leaf)
        arguments.inside.append(value if name is None else f"{name}={value}")
    return arguments


def _elements(written: str, part: ContainerPart) -> dict[str | int, str]:
    """The elements of a container that is spelled out in the call; none of one that has a name."""
    elements: dict[str | int, ast.expr] = {}
    match ast.parse(written.strip(), mode="eval").body:
        case ast.Dict(keys, values):
            pairs = [(getattr(key, "value", None), value) for key, value in zip(keys, values, strict=True)]
            elements = {key: value for key, value in pairs if isinstance(key, (str, int))}
        case ast.List(items) | ast.Tuple(items) if not any(isinstance(item, ast.Starred) for item in items):
            elements = dict(enumerate(items))
        case ast.Name() | ast.Attribute() | ast.Subscript():
            return {}
    if set(elements) != {key for key, _ in part.inside}:
        raise CannotSay("an argument is put together in the call")
    return {key: ast.get_source_segment(written.strip(), value) or "" for key, value in elements.items()}


def as_written(arguments: Sequence[Argument]) -> list[str]:
    """The arguments of a call as the cell has them."""
    signs = {None: "", "*": "*", "**": "**"}
    return [signs.get(name, f"{name}=") + one_line(text) for name, text in arguments]


def one_line(text: str) -> str:
    """An expression on one line."""
    return text if "\n" not in text else ast.unparse(ast.parse(text.strip(), mode="eval").body)


def _is_literal(text: str, kinds: tuple[type, ...] = (object,)) -> bool:
    """Whether it is a literal of one of these types."""
    try:
        return isinstance(ast.literal_eval(text), kinds)
    except (ValueError, SyntaxError):
        return False


@dataclass(eq=False)
class Function:
    """A function of the script.

    Attributes:
      version: of the model's code when it was defined: see `RunGroups.versions`. JAX traces it once, so that for another
        version it has to be defined again.
      used: the last cell, by number, that calls it.
    """

    name: str
    version: object
    used: int


class JittedFunction(Struct, frozen=True):
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
        return [decorator, call(f"def {name}(", self.parameters, "):"), *indented(self.body, writer.unit)]
