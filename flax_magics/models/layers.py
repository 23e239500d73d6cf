"""A dropout or normalisation layer as a trace saw it: what it did, and where the source says that it should."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import sys
import textwrap
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, NamedTuple

from .base import CodePlace, Layer
from .calls import Path
from .switch import WHEN_TRAINING


class _Written(NamedTuple):
    """A place in the source that gives the switch of a layer.

    Attributes:
      expression: what it is given; `line`: of that, in the file or cell.
      call: the lines of the call; `name`: of the attribute that the call's value is assigned to.
      keyword: it is given by its name.
    """

    expression: ast.expr
    line: int
    call: range
    name: str
    keyword: bool


def layer_of(kind: str, path: Path, module: Any, around: list[Any], switch: tuple[str, bool, bool]) -> Layer:
    """The layer `module` at `path`, called while its trace runs.

    Args:
      around: the modules around it, innermost first.
      switch: its argument's name and value, and whether the call gave it, not the construction.
    """
    name, value, in_call = switch
    owner = next((each for each in around if not _is_flax(type(each))), None)
    if owner is None:
        made_in = type(around[0] if around else module).__name__
        return Layer(kind, path, value is WHEN_TRAINING[name], made_in, name, value)
    frame = _frame_of(owner)
    line = None if frame is None else frame.f_lineno
    written = list(_written(type(owner), type(module), name, in_call))
    named = [place for place in written if place.name and place.name == re.sub(r"_\d+$", "", path[-1] if path else "")]
    here = [place for place in written if line in place.call]
    places = named or here or [place for place in written if not place.name]
    # Any call of two arguments might give one by its place.
    places = [place for place in places if place.keyword] or places
    texts = {ast.unparse(place.expression) for place in places}
    made_in, source = type(owner).__name__, CodePlace()
    literal = len(texts) == 1 and isinstance(places[0].expression, ast.Constant)
    if len(texts) == 1 and (not literal or texts == {str(value)}):
        source = CodePlace(texts.pop(), literal)
        made_in += f" (line {places[0].line})"
    own_switch, method = _own_switch(owner, frame), "" if frame is None else frame.f_code.co_name
    return Layer(kind, path, value is WHEN_TRAINING[name], made_in, name, value, source, own_switch, method)


def _is_flax(cls: type) -> bool:
    return cls.__module__.partition(".")[0] == "flax"


def _frame_of(module: Any) -> FrameType | None:
    """The innermost frame of the user's in which a method of `module` runs."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        ours = str(frame.f_globals.get("__name__")).startswith(("flax.", "flax_magics."))
        if not ours and code.co_argcount and frame.f_locals.get(code.co_varnames[0]) is module:
            return frame
        frame = frame.f_back
    return None


def _own_switch(module: Any, frame: FrameType | None) -> str:
    """A module's own switch as its methods write it: `train`, `self.training`, `self.config.deterministic`."""
    if frame is not None:
        code = frame.f_code
        arguments = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
        switches = [name for name in arguments if name in WHEN_TRAINING]
        if switches:
            return switches[0]
    configs = {
        f"self.{name}.": value
        for name, value in vars(module).items()
        if dataclasses.is_dataclass(value) and not hasattr(value, "scope") and not name.startswith("_")
    }
    for prefix, value in {"self.": module, **configs}.items():
        for name in WHEN_TRAINING:
            if isinstance(getattr(value, name, None), bool):
                return f"{prefix}{name}"
    return ""


def _written(cls: type, layer: type, switch: str, in_call: bool) -> Iterator[_Written]:
    """Every place in the class's methods that gives `switch` to a layer, where it is made or where it is called."""
    parameters = list(inspect.signature(layer if not in_call else _call_of(layer)).parameters)
    position = parameters.index(switch) if switch in parameters else None
    for base in cls.__mro__:
        if _is_flax(base) or base is object:
            continue
        for function in vars(base).values():
            try:
                lines, start = inspect.getsourcelines(inspect.unwrap(function))
                tree = ast.parse(textwrap.dedent("".join(lines)))
            except (OSError, TypeError, SyntaxError, ValueError):
                continue
            names = {
                id(call): target.attr
                for node in ast.walk(tree)
                if isinstance(node, ast.Assign)
                for target in node.targets
                if isinstance(target, ast.Attribute)
                for call in ast.walk(node.value)
            }
            for call in ast.walk(tree):
                if not isinstance(call, ast.Call) or _makes(call, layer) is in_call:
                    continue
                place = range(call.lineno + start - 1, (call.end_lineno or call.lineno) + start)
                expression = next((item.value for item in call.keywords if item.arg == switch), None)
                keyword = expression is not None
                if not keyword and position is not None and len(call.args) > position:
                    expression = call.args[position] if _last(call.func) != "partial" else None
                if expression is not None:
                    line = expression.lineno + start - 1
                    yield _Written(expression, line, place, names.get(id(call), ""), keyword)


def _call_of(layer: type) -> Callable[..., Any]:
    """The layer's call without `self`."""
    return layer.__call__.__get__(object())  # type: ignore[no-any-return]


def _makes(call: ast.Call, layer: type) -> bool:
    """Whether it is `nn.Dropout(…)` or `partial(nn.Dropout, …)`."""
    return layer.__name__ in {_last(call.func), *(_last(arg) for arg in call.args if _last(call.func) == "partial")}


def _last(node: ast.expr) -> str:
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def mask_of(module: Any, args: Any, kwargs: Any) -> tuple[tuple[int, ...], float] | None:
    """Shape and rate of the mask that a dropout draws, of linen or NNX, for the arguments of its call."""
    inputs = args[0] if args else kwargs.get("inputs")
    shape, rate = getattr(inputs, "shape", None), module.rate
    if shape is None or not isinstance(rate, (int, float)):
        return None
    whole = list(shape)
    for dim in module.broadcast_dims:
        whole[dim] = 1
    return tuple(whole), float(rate)
