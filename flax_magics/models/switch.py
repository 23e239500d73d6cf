"""The switch between training and evaluation, under the names that linen and NNX models use for it.

It is set on fields of models and of their configs, and given in calls: by its place where the method stands in one of
linen's lifted transforms, as `nn.remat` and `nn.jit` trace what is given by its name, unless `static_argnames` has it,
and `nn.vmap` and `nn.scan` drop it. For a dropout or normalization layer that a trace called, the place in the source
that gives the layer its switch is found.
"""

from __future__ import annotations

import ast
import copy
import dataclasses
import inspect
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import chain, dropwhile
from types import FrameType, NoneType
from typing import Any, TypeVar

from flax.linen import transforms
from msgspec import Struct

from ..base.types import PyTree
from ..errors import FlaxMagicsError
from .calls import (
    Args,
    Kwargs,
    Path,
    caller_of,
    constructor,
    first_line,
    frame_of,
    in_model,
    is_flax,
    is_lifted,
    made_in,
    places_of,
    self_of,
    without_self,
)

T = TypeVar("T")

WHEN_TRAINING = dict.fromkeys(("train", "training", "is_training"), True)
WHEN_TRAINING |= dict.fromkeys(("deterministic", "use_running_average"), False)
"""Name of a switch → its value in training."""
SWITCH_OF = {"dropout": "deterministic", "norm": "use_running_average"}
"""Kind of a Flax layer → the argument that switches it."""


def value_of(name: str, train: bool) -> bool:
    """The value of the switch `name` for training (`train`) or evaluation."""
    return WHEN_TRAINING[name] is train


def following(switch: str, of_module: str, method: str = "") -> str:
    """The source edit that makes a layer's switch follow that of its module: `deterministic=not self.training`.

    Args:
      switch: the layer's argument.
      of_module: the module's switch as its code writes it; if empty, the edit adds a parameter `train` to `method`.
    """
    follows = of_module or "train"
    alike = WHEN_TRAINING[follows.rpartition(".")[2]] is WHEN_TRAINING[switch]
    edit = f"{switch}={'' if alike else 'not '}{follows}"
    return edit if of_module else f"def {method or '__call__'}(self, …, train):\n{edit}"


def call_switches(signature: inspect.Signature) -> tuple[str, ...]:
    """Names of a method's parameters that are switches."""
    return tuple(name for name in signature.parameters if name in WHEN_TRAINING)


def written_in_call(signature: inspect.Signature, args: Args, kwargs: Kwargs) -> Kwargs:
    """Switch → value for switches passed in the call itself; empty for a call that does not fit the signature."""
    with suppress(TypeError):
        bound = signature.bind_partial(*args, **kwargs)
        return {name: value for name, value in bound.arguments.items() if name in WHEN_TRAINING}
    return {}


def check_agreement(train: bool, written: Kwargs) -> None:
    """Raises FlaxMagicsError where `--train` or `--eval` contradicts a switch written in the call."""
    for name, value in written.items():
        if isinstance(value, bool) and value is not value_of(name, train):
            option = "--train" if train else "--eval"
            raise FlaxMagicsError(f"{option} contradicts {name}={value}, written in the call. Leave one of them out.")


def set_fields(value: T, train: bool, fixed: frozenset[str]) -> tuple[T, tuple[str, ...]]:
    """A copy of `value`, a linen module or config dataclass, with its switches set; and what was set, as text.

    Switches are fields of the value itself, of dataclasses nested in it at any depth, and of those in tuples, lists and
    dicts (submodules given as fields). A switch with value None counts only if there is no other and none in the call.
    """
    result, settings = _visited(value, train, fixed, bool)
    return (result, settings) if settings or fixed else _visited(value, train, fixed, NoneType)


def set_unset_fields(value: T, fixed: frozenset[str]) -> T:
    """`value` with switches that are None set for evaluation, provided that it has no other switch."""
    return value if fixed or read_fields(value) else _visited(value, False, fixed, NoneType)[0]


def read_fields(value: object) -> tuple[str, ...]:
    """The switches of `value` with their present values: `('training=False', 'config.deterministic=True')`."""
    return _visited(value, None, frozenset(), bool)[1]


def _visited(value: T, train: bool | None, fixed: frozenset[str], kind: type) -> tuple[T, tuple[str, ...]]:
    """`value` with those switches set whose present values are of type `kind`, and all such switches as text.

    With `train` None nothing is set, and the text has the present values.
    """
    settings: list[str] = []
    copies: dict[int, PyTree] = {}

    def visit(value: object, path: str) -> PyTree:
        if id(value) not in copies:  # one object becomes one copy everywhere
            copies[id(value)] = changed(value, path)
        return copies[id(value)]

    def changed(value: object, path: str) -> object:
        if isinstance(value, (tuple, list, Mapping)) and not hasattr(value, "_fields"):
            items = {step: visit(item, path + step) for step, item in _parts(value)}
            if all(items[step] is item for step, item in _parts(value)):
                return value
            if not isinstance(value, Mapping):
                return type(value)(items.values())
            whole = {key: items.get(f"[{key!r}]", item) for key, item in value.items()}
            return whole if type(value) is dict else type(value)(whole)  # type: ignore[call-arg]
        if not dataclasses.is_dataclass(value) or isinstance(value, type):
            return value
        changes: dict[str, object] = {}
        for step, old in _parts(value):
            name, where, new = step[1:], f"{path}{step}".removeprefix("."), old
            if name not in WHEN_TRAINING:
                new = visit(old, where)
            elif isinstance(old, kind) and (path or name not in fixed):
                new = old if train is None else value_of(name, train)
                settings.append(f"{where}={new}")
            if new is not old:
                changes[name] = new
        return _replaced(value, changes) if changes else value

    return visit(value, ""), tuple(settings)


def setting_of(text: str) -> tuple[str, bool]:
    """(name, value) of a switch as text: `config.training=True`, or NNX's `deterministic=False in 3 modules`."""
    name, _, value = text.rpartition("=")
    return name, value.startswith("True")


def cloned(name: str, module: object, settings: Iterable[tuple[str, object]]) -> str:
    """The expression for a module with switches set: `net.clone(training=True)`; `name` itself without settings.

    Args:
      name: the expression for the module as it is.
      module: the module, with its switches set or not.
      settings: (path of a field as `set_fields` writes it, value): `("layers[2].deterministic", False)`.
    """
    given, visits, shared = dict(settings), Counter[int](), dict[int, str]()

    def count(value: object) -> None:
        visits[id(value)] += 1
        if visits[id(value)] == 1:
            for _, inner in _parts(value):
                count(inner)

    # In the order of `_visited`, so that both have the same paths.
    def expression(value: object, path: str, name: str) -> str:
        if id(value) in shared:
            return shared[id(value)] or name
        changed = {}
        for step, inner in _parts(value):
            where = f"{path}{step}".removeprefix(".")
            text = str(given[where]) if where in given else expression(inner, where, name + step)
            if text != name + step:
                changed[step] = text
        text = _expression(value, name, changed) if changed else name
        if visits[id(value)] == 1:
            return text
        # A module in two fields is one module with one set of variables: a walrus makes its clone only once.
        shared[id(value)] = f"shared_{sum(map(bool, shared.values())) + 1}" if changed else ""
        return f"({shared[id(value)]} := {text})" if changed else name

    count(module)
    return expression(module, "", name)


def _parts(value: object) -> Iterator[tuple[str, object]]:
    """(step, part) of the parts of `value` that may hold switches; a step is `.config`, `[0]` or `['head']`."""
    if isinstance(value, (tuple, list)) and not hasattr(value, "_fields"):
        yield from ((f"[{i}]", item) for i, item in enumerate(value))
    elif isinstance(value, Mapping):
        yield from ((f"[{key!r}]", item) for key, item in value.items() if isinstance(key, (str, int)))
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = (field.name for field in dataclasses.fields(value) if field.name not in ("parent", "name"))
        yield from ((f".{name}", getattr(value, name, None)) for name in names)


def _expression(value: object, name: str, changed: Mapping[str, str]) -> str:
    """The expression for `value` with some parts replaced; `changed` maps a part's step to its new expression."""
    if isinstance(value, Mapping):
        text = ", ".join([f"**{name}", *(f"{step[1:-1]}: {part}" for step, part in changed.items())])
        return f"{{{text}}}" if type(value) is dict else f"type({name})({{{text}}})"
    if isinstance(value, (tuple, list)):
        items, start = [], 0
        for place in sorted(int(step[1:-1]) for step in changed):
            items += [f"*{name}[{start or ''}:{place}]"] * (place > start) + [changed[f"[{place}]"]]
            start = place + 1
        items += [f"*{name}[{start}:]"] * (start < len(value))
        if type(value) is tuple:
            return f"({', '.join(items)}{',' * (len(items) == 1)})"
        return f"[{', '.join(items)}]" if type(value) is list else f"type({name})([{', '.join(items)}])"
    fields = ", ".join(f"{step[1:]}={part}" for step, part in changed.items())
    return f"{name}.clone({fields})" if _is_linen(value) else f"dataclasses.replace({name}, {fields})"


def _is_linen(value: object) -> bool:
    return hasattr(value, "clone") and hasattr(value, "scope")  # told by attributes: linen may not be imported


def _replaced(value: PyTree, changes: dict[str, object]) -> PyTree:
    """A copy of a dataclass instance with some fields changed."""
    if _is_linen(value):  # `dataclasses.replace` would lose the module's name and parent
        return value.clone(**changes)
    try:
        return dataclasses.replace(value, **changes)
    except (TypeError, ValueError):  # fields with init=False, or an `__init__` of the user's
        new = copy.copy(value)
        for name, item in changes.items():
            object.__setattr__(new, name, item)
        return new


class CodePlace(Struct, frozen=True):
    """The source expression of a layer's switch: its text, empty if not found, and whether it is a literal."""

    text: str = ""
    literal: bool = False


class Link(Struct, frozen=True):
    """A call between the top and a layer's owner that does not hand on the switch.

    Attributes:
      caller: the class whose method makes the call, or the function (a loss) that does, with the line.
      text: of the call, such as `Block()(x)`.
      switch, value: the argument or field of what is called, and what it was.
      source: what the call gives for it; empty text where nothing.
      edit: the caller as it is to be: its first line, if that has to take the switch, and the call; None where more is.
      in_model: a module makes the call.
    """

    caller: str
    text: str
    switch: str
    value: bool
    source: CodePlace
    edit: str | None
    in_model: bool


class Layer(Struct, frozen=True):
    """A dropout or normalization layer that was called in a trace, and whether it ran in its training behavior."""

    kind: str
    """`dropout` or `norm`."""
    path: Path
    training: bool
    owner: str
    """The class that made the layer, with the line that sets the switch where that is known: `MyModel (line 8)`."""
    switch: str
    """The layer's own argument, such as `deterministic`."""
    value: bool
    """The argument's value in this call."""
    source: CodePlace = CodePlace()
    own_switch: str = ""
    """The owner's own switch as its code would write it, such as `train` or `self.training`; empty if it has none."""
    method: str = ""
    """The owner's method that called the layer."""
    stream: str = ""
    """The stream that a dropout layer takes a key from while it is on."""
    link: Link | None = None
    """The call around the owner that does not hand on the owner's switch, where the layer follows that."""


def layer_of(kind: str, path: Path, module: object, around: list[Any], arguments: Mapping[str, object]) -> Layer | None:
    """Describes the layer `module` at `path`, which is being called right now; None where its switch is no bool.

    Args:
      around: the modules around it, innermost first.
      arguments: those of the call, by name.
    """
    name = SWITCH_OF[kind]
    in_call = arguments.get(name) is not None  # else the switch was given at construction
    value = arguments[name] if in_call else getattr(module, name)
    if not isinstance(value, bool):
        return None
    is_training, stream = value is WHEN_TRAINING[name], _stream_of(module)
    owner = next((each for each in around if not is_flax(type(each))), None)
    if owner is None:
        made_in = type(around[0] if around else module).__name__
        return Layer(kind, path, is_training, made_in, name, value, stream=stream)
    frame = frame_of(owner)
    line = None if frame is None else frame.f_lineno
    written = list(places_of(type(owner), type(module), name, in_call))
    # By the attribute's name first; else by the line that is running; else calls that are not assigned (in `@compact`).
    named = [place for place in written if place.name and place.name == re.sub(r"_\d+$", "", path[-1] if path else "")]
    here = [place for place in written if line in place.call]
    places = named or here or [place for place in written if not place.name]
    # Positional candidates are uncertain, since any call with enough arguments looks like one: keywords win.
    places = [place for place in places if place.keyword] or places
    texts = {ast.unparse(place.expression) for place in places}
    made_in, source = type(owner).__name__, CodePlace()
    # Several different expressions, or a literal that is not the actual value: the place was not found.
    literal = len(texts) == 1 and isinstance(places[0].expression, ast.Constant)
    if len(texts) == 1 and (not literal or texts == {str(value)}):
        source = CodePlace(texts.pop(), literal)
        made_in += f" (line {places[0].line})"
    own_switch, method = _own_switch(owner, frame), "" if frame is None else frame.f_code.co_name
    link = None
    if own_switch and following(name, own_switch) == f"{name}={source.text}":
        link = _link([each for each in around if not is_flax(type(each))], own_switch, frame)
    return Layer(kind, path, is_training, made_in, name, value, source, own_switch, method, stream, link)


def _link(modules: list[Any], switch: str, frame: FrameType | None) -> Link | None:
    """The innermost call that does not hand on the switch; None where each does, and where that cannot be told.

    Args:
      modules: from the layer's owner outwards.
      switch: the owner's, as its running method, `frame`, writes it.
    """
    while frame is not None and switch:
        name = switch.removeprefix("self.")
        if name == switch:
            (outside, call), value = caller_of(frame), frame.f_locals.get(name)
            places = list(frame.f_code.co_varnames[self_of(frame) is not None :])
        else:  # a field: it is given where the module is made
            if len(modules) < 2:
                return None
            call, outside = made_in(*modules[:2]), frame_of(modules[1])
            value, places = getattr(modules[0], name, None), list(constructor(type(modules[0])).parameters)
        if call is None or outside is None or name not in places or not isinstance(value, bool):
            return None
        module = self_of(outside)
        own_switch, code = _own_switch(module, outside), outside.f_code
        passed = call.argument(name, places.index(name))
        *head, wanted = following(name, own_switch, code.co_name).splitlines()
        if passed != wanted.partition("=")[2]:
            caller, source = f"`{code.co_name}`", CodePlace(passed, passed in ("True", "False"))
            if module is not None:
                caller = f"{type(module).__name__} (line {call.line})"
            elif head:
                head = [first_line(code, "train")]
            edit: str | None = "\n  … ".join([*head, call.with_argument(wanted, places.index(name))])
            # A lifted transform has to be told which of its arguments are static: more than the call is to be edited.
            if name == switch and is_lifted(frame, outside):
                edit = None
            return Link(caller, call.text, name, value, source, edit, in_model(outside))
        modules = [*dropwhile(lambda each, module=module: each is not module, modules)]  # type: ignore[misc]
        switch, frame = own_switch, outside
    return None


def _stream_of(layer: object) -> str:
    """The stream of a dropout layer; in NNX by the tag of the one that it holds. Empty for any other layer."""
    name, rngs = str(getattr(layer, "rng_collection", "")), getattr(layer, "rngs", None)
    # Not by attributes: an `nnx.Rngs` looks these up as streams, which would count as asking for them.
    streams = getattr(rngs, "__dict__", {})
    held: Any = rngs if "count" in streams else streams.get(name, streams.get("default"))
    return name if held is None else str(held.key.tag)


def _own_switch(module: object, frame: FrameType | None) -> str:
    """A module's own switch as its methods write it: `train`, `self.training`, `self.config.deterministic`; or empty.

    An argument of the running method (`frame`) comes before fields; a function (`module` is None) has nothing else.
    """
    code = None if frame is None else frame.f_code
    arguments = (
        () if code is None else (*code.co_varnames[: code.co_argcount + code.co_kwonlyargcount], *code.co_freevars)
    )
    if module is None:
        return next((name for name in arguments if name in WHEN_TRAINING), "")
    held = [(name, value) for name, value in vars(module).items() if dataclasses.is_dataclass(value)]
    configs = {f"self.{name}.": value for name, value in held if not (hasattr(value, "scope") or name.startswith("_"))}
    places = ((prefix, value, name) for prefix, value in {"self.": module, **configs}.items() for name in WHEN_TRAINING)
    fields = (prefix + name for prefix, value, name in places if isinstance(getattr(value, name, None), bool))
    return next(chain((name for name in arguments if name in WHEN_TRAINING), fields), "")


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
