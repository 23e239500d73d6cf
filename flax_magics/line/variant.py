"""The line of a run, to be written otherwise: with another argument, with an option more or less.

What a message advises is complete this way: the user's own call, options included.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from ..errors import written

_GAP = "_gap_"
"""Stands for `…`, which is no Python, while a call is read."""


@dataclass(frozen=True)
class Line:
    """A command with its options, and a call.

    Attributes:
      command: `%flax_apply --train`.
      call: in Python's normal form; arguments that nobody wrote down are `…`.
      signature: of what is called.
    """

    command: str
    call: str
    signature: inspect.Signature

    def __str__(self) -> str:
        return f"{self.command} {self.call}"

    def with_option(self, option: str) -> Line:
        """With another option behind the others, such as `--mutable cache`."""
        return replace(self, command=f"{self.command} {option}")

    def without_option(self, flag: str, value: str = "") -> Line:
        """See `without_option`."""
        return replace(self, command=without_option(self.command, flag, value))

    def with_argument(self, name: str, write: str | Callable[[str], str]) -> Line | None:
        """With another text in the place of the argument's; None where the argument is not written by itself."""
        return self._edited(name, write)

    def without_argument(self, name: str) -> Line | None:
        """Without an argument, those after it by their names; None where that cannot be written."""
        return self._edited(name, None)

    def _edited(self, name: str, write: str | Callable[[str], str] | None) -> Line | None:
        call = ast.parse(self.call.replace("…", _GAP), mode="eval").body
        assert isinstance(call, ast.Call)
        if any(isinstance(arg, ast.Starred) for arg in call.args):
            return None
        names = positional_names(self.signature, len(call.args))
        places = [*zip(names, call.args, strict=True), *((item.arg, item.value) for item in call.keywords)]
        argument = next((value for place, value in places if place == name), None)
        if argument is None:
            return None
        if write is not None:
            text = write if isinstance(write, str) else write(ast.unparse(argument))
            edited = ast.parse(text.replace("…", _GAP), mode="eval").body
            call.args = [edited if arg is argument else arg for arg in call.args]
            for item in call.keywords:
                item.value = edited if item.value is argument else item.value
        else:
            before = names.index(name) if argument in call.args else len(call.args)
            after = list(zip(names, call.args, strict=True))[before + 1 :]
            if not all(place.isidentifier() for place, _ in after):
                return None
            call.args = call.args[:before]
            call.keywords = [
                *(ast.keyword(place, value) for place, value in after),
                *(item for item in call.keywords if item.value is not argument),
            ]
        return replace(self, call=ast.unparse(call).replace(_GAP, "…"))


def without_option(command: str, flag: str, value: str = "") -> str:
    """`command` without an option; `value` is a pattern of the value that goes with it."""
    pattern = rf"{flag}[\s=]+{value}" if value else flag
    return re.sub(rf"\s+{pattern}(?=\s|$)", "", command)


def as_array(line: Line, name: str, dtype: str) -> dict[str, str]:
    """The advice to pass an argument as an array of a dtype."""
    return changed(line, name, lambda argument: f"jnp.asarray({argument}, '{dtype}')")


def changed(line: Line, name: str, write: Callable[[str], str]) -> dict[str, str]:
    """The line with `write(text)` of an argument; a form where the argument is no expression of its own in the call.

    `write` may use `jnp`.
    """
    edited = line.with_argument(name, write)
    return {"form": write("…")} if edited is None else written(f"import jax.numpy as jnp\n{edited}")


def new_key(name: str) -> str:
    """A variable's name for a key that an argument is to be given."""
    return f"new_{name}" if name.endswith("key") else f"{name}_key"


def positional_names(signature: inspect.Signature, n: int) -> list[str]:
    """The parameters that `n` positional arguments are given to."""
    names: list[str] = []
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.VAR_POSITIONAL:
            names += [f"{parameter.name}[{i}]" for i in range(n - len(names))]
        elif parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD):
            names.append(parameter.name)
    return (names + [f"argument {i}" for i in range(len(names), n)])[:n]


def with_arguments(call: str, arguments: Sequence[str]) -> str:
    """A call as text with more arguments at its end."""
    if not arguments:
        return call
    inside = call.rpartition(")")[0].rstrip().rstrip(",")
    return f"{inside}{'' if inside.endswith('(') else ', '}{', '.join(arguments)})"
