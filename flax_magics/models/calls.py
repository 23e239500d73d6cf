"""The calls of a model's modules, noted while it is traced: which module, with what, giving what.

Each call runs under a name scope of its own, so that the equations that it traced can be told from all others.
"""

from __future__ import annotations

import itertools
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import jax

from ..base.digest import describe

Path = tuple[str, ...]

LONGEST = 400
"""Characters of what is told of a call's inputs or outputs."""

_numbers = itertools.count(1)
_MARK = re.compile(r"flax_magics_call_(\d+)\b")


@dataclass(frozen=True)
class Called:
    """One call: the module's path and class, the method, its inputs and outputs as `dtype[shape]`."""

    path: Path
    cls: str
    method: str
    inputs: str
    outputs: str
    mark: int
    """The number in the name scope of its equations; never used again in this process."""
    inside: bool
    """It was made by another method of the same module."""


@dataclass
class Calls:
    """The calls of one trace, in the order in which they began."""

    made: dict[int, Called] = field(default_factory=dict)
    _running: list[Path] = field(default_factory=list)

    def note(
        self,
        call: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        path: Path,
        cls: str,
        method: str,
    ) -> Any:
        """Makes the call, and gives what it gives."""
        mark = next(_numbers)
        inputs = ", ".join([*map(_spell, args), *(f"{name}={_spell(value)}" for name, value in kwargs.items())])
        called = Called(path, cls, method, inputs, "", mark, path in self._running)
        self.made[mark] = called
        self._running.append(path)
        try:
            with jax.named_scope(f"flax_magics_call_{mark}"):
                output = call(*args, **kwargs)
        finally:
            self._running.pop()
        self.made[mark] = replace(called, outputs=_spell(output))
        return output


def _spell(value: object) -> str:
    nnx = sys.modules.get("flax.nnx")  # without it nothing can be one of its objects
    whole = nnx is not None and isinstance(value, nnx.Pytree)
    return f"{type(value).__name__}(…)" if whole else describe(value, LONGEST)


def marks_of(equation: Any) -> list[int]:
    """The marks of the calls, outermost first, that an equation of a jaxpr was traced in."""
    return [int(mark) for mark in _MARK.findall(str(equation.source_info.name_stack))]
