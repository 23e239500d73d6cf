"""Splits a call's arguments into data and constants, and describes the jitted functions that a script defines."""

from __future__ import annotations

import ast
import itertools
import keyword
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from msgspec import Struct

from ..line.call import Argument, CallExpression
from ..run import ContainerPart, ExportFacts
from .writer import LineWriter


class CannotSay(Exception):
    """Raised for a command or statement that has no lines in a script; the message says why.

    Attributes:
      cause: the reason given for names that it would have assigned.
    """

    def __init__(self, message: str, cause: str = "") -> None:
        super().__init__(message)
        self.cause = cause or message


@dataclass(eq=False)
class SplitArguments:
    """The arguments of a call, split into parameters of a jitted function and constants written into its body.

    Attributes:
      used: names that no further parameter may take.
      parameters: the function's own parameters.
      inside: the arguments as the body passes them to the model.
      outside: the values for the parameters, as the cell has them.
      static: parameters that are static arguments for `jax.jit`.
      paths: of each value in the call, as the run names it: `batch['x']`.
    """

    writer: LineWriter
    used: set[str]
    parameters: list[str] = field(default_factory=list)
    inside: list[str] = field(default_factory=list)
    outside: list[str] = field(default_factory=list)
    static: list[str] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)

    def expression(self, written: str, part: ContainerPart, name: str, path: str | None = None) -> str:
        """What the body has in place of an argument, or of a part of a container; data becomes a parameter.

        Args:
          written: the text in the call.
          name: the parameter's preferred name.
          path: where it is in the call; None for an argument itself.
        """
        path = name if path is None else path
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
            self.paths.append(path)
            self.static += [parameter] * (part.kind == "choice")
            return parameter
        elements = _elements(written, part)
        rows = []
        for key, inner in part.inside:
            literal = self.writer.text(key) if isinstance(key, str) else str(key)
            inner_name = key if isinstance(key, str) and key.isidentifier() else f"{name}_{key}"
            element = elements.get(key, f"{written}[{literal}]")
            row = self.expression(element, inner, inner_name, f"{path}[{key!r}]")
            rows.append(f"{literal}: {row}" if part.kind == "dict" else row)
        if part.kind == "tuple":
            return f"({', '.join(rows)}{',' * (len(rows) == 1)})"
        return ("{%s}" if part.kind == "dict" else "[%s]") % ", ".join(rows)


def split(writer: LineWriter, call: CallExpression, facts: ExportFacts, used: Iterable[str]) -> SplitArguments:
    """Splits the arguments of `call`; `used` are names that no parameter may have."""
    containers = dict(facts.containers)
    arguments = SplitArguments(writer, set(used))
    if any(name in ("*", "**") for name, _ in call.arguments):
        # Static names that are neither spelled out nor positional can only come from `**`.
        unknown = sorted(facts.static - {name for name, _ in call.arguments} - set(facts.parameters))
        arguments.static += [name for name in unknown if name.isidentifier()]
    unnamed = (f"argument_{place}" for place in itertools.count(len(facts.parameters)))
    positional = itertools.chain(facts.parameters, unnamed)
    for name, source in call.arguments:
        text = one_line(source)
        if name in ("*", "**"):
            parameter = f"{name}args" if name == "*" else f"{name}kwargs"
            arguments.parameters.append(parameter)
            arguments.inside.append(parameter)
            arguments.outside.append(f"{name}{text}")
            arguments.paths.append(parameter)
            continue
        leaf = next(positional) if name is None else name
        container = containers.get(leaf) or ContainerPart("choice" if leaf in facts.static else "data")
        # Constants such as True, None or a string are no data, however the run took them.
        constants = (object,) if leaf in facts.static else (bool, str, bytes, type(None))
        value = text if _is_literal(text, constants) else arguments.expression(text, container, leaf)
        arguments.inside.append(value if name is None else f"{name}={value}")
    return arguments


def _elements(written: str, part: ContainerPart) -> dict[str | int, str]:
    """The texts of a container's elements if it is spelled out in the call; none if it is given by a name."""
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
    """The arguments of a call as the cell has them, each on one line."""
    signs = {None: "", "*": "*", "**": "**"}
    return [signs.get(name, f"{name}=") + one_line(text) for name, text in arguments]


def one_line(text: str) -> str:
    """The expression on one line; its own text if that has no line break."""
    return text if "\n" not in text else ast.unparse(ast.parse(text.strip(), mode="eval").body)


def _is_literal(text: str, kinds: tuple[type, ...] = (object,)) -> bool:
    """Whether the text is a literal of one of these types."""
    try:
        return isinstance(ast.literal_eval(text), kinds)
    except (ValueError, SyntaxError):
        return False


@dataclass(eq=False)
class Function:
    """A function that the script has defined.

    Attributes:
      version: of the model's code when it was defined, see `RunGroups.versions`. JAX traces a function once, so another
        version needs a new definition.
      used: index of the last cell that calls it.
    """

    name: str
    version: object
    used: int


class JittedFunction(Struct, frozen=True):
    """A function that a run needs, as a rule a jitted one; equal ones are defined once.

    Attributes:
      model: the variable that holds the module.
      names: names to choose from, best first.
      decorator: such as `jax.jit`; empty for a plain function.
      parameters, static: see `SplitArguments`.
      body: its lines, without indentation.
    """

    model: str
    names: tuple[str, ...]
    decorator: str
    parameters: tuple[str, ...]
    static: tuple[str, ...]
    body: tuple[str, ...]

    def lines(self, writer: LineWriter, name: str) -> list[str]:
        """The lines of the function, defined as `name`."""
        static = ", ".join(map(writer.text, self.static)) + "," * (len(self.static) == 1)
        return writer.rendered("calls", "function", self, name, static)
