"""Switches in calls of methods that stand in one of linen's lifted transforms, and have to be given by their place.

`nn.remat` and `nn.jit` trace what is given by its name, unless `static_argnames` has it; `nn.vmap` and `nn.scan` drop it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from flax.linen import transforms
from msgspec import Struct

from .calls import Path, without_self
from .switch import WHEN_TRAINING

T = TypeVar("T")


def by_place(
    cls: type, method: Path, args: Sequence[T], kwargs: Mapping[str, T], default: Callable[[Any], T]
) -> tuple[tuple[T, ...], dict[str, T]]:
    """The arguments of a call of `method` with its switches by place, and with all before them; others as they are.

    Args:
      default: gives the argument that stands for a parameter's default, where one has to be given that is not.
    """
    function: Any = getattr(cls, method[0] if method else "__call__", None) if len(method) < 2 else None
    lifts = list(_lifts(function))
    if not lifts:
        return tuple(args), dict(kwargs)
    by_name = {name for lift in lifts for name in _names(lift.options.get("static_argnames", ()))}
    parameters = without_self(inspect.signature(function)).parameters.values()
    places = [each for each in parameters if each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD)]
    switches = [i for i, each in enumerate(places) if each.name in kwargs.keys() & WHEN_TRAINING.keys() - by_name]
    end = max((*(i + 1 for i in switches), *(lift.arguments for lift in lifts)))
    placed = {each.name: each.default for each in places[len(args) : end]}
    lacking = any(name not in kwargs and value is inspect.Parameter.empty for name, value in placed.items())
    if lacking or not placed.keys() & WHEN_TRAINING.keys():
        return tuple(args), dict(kwargs)
    values = (kwargs[name] if name in kwargs else default(value) for name, value in placed.items())
    return (*args, *values), {name: value for name, value in kwargs.items() if name not in placed}


def written_by_place(cls: type, method: Path, arguments: Sequence[str]) -> list[str]:
    """The same of arguments as text: `["x", "train=True"]` → `["x", "True"]`."""
    if any(text.startswith("*") for text in arguments):
        return list(arguments)
    parts = [(name, value) if name.isidentifier() and equals and value[:1] != "=" else (None, text)
             for text in arguments for name, equals, value in [text.partition("=")]]  # fmt: skip
    positional = [value for name, value in parts if name is None]
    args, kwargs = by_place(cls, method, positional, {name: value for name, value in parts if name is not None}, repr)
    return [*args, *(f"{name}={value}" for name, value in kwargs.items())]


class _Lift(Struct, frozen=True):
    """One transform around a method: its name, and the options that it was given."""

    name: str
    options: Mapping[str, Any]

    @property
    def arguments(self) -> int:
        """How many arguments by place it counts on: by `in_axes` and `static_argnums`; 0 where any number will do."""
        axes, static = self.options.get("in_axes"), self.options.get("static_argnums", ())
        mapped = len(axes) + (self.name == "scan") if isinstance(axes, (tuple, list)) else 0
        numbers: tuple[int, ...] = (static,) if isinstance(static, int) else tuple(static)
        return max((mapped, *(number + (self.name != "jit") for number in numbers)))  # only `jit` counts `self`


def _lifts(function: Any) -> Iterator[_Lift]:
    """The transforms around a method, outermost first."""
    while function is not None:
        # The name of the module is copied from the method to what is around it; its globals are not.
        if getattr(function, "__globals__", {}).get("__name__") == transforms.__name__:
            held = inspect.getclosurevars(function).nonlocals
            yield _Lift(getattr(held.get("transform"), "__name__", ""), held.get("trafo_kwargs", {}))
        function = getattr(function, "__wrapped__", None)


def _names(value: str | Sequence[str]) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value)
