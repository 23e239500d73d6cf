"""A call made ready for a model: arguments that fit its signature, and its switch between training and evaluation set."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from msgspec import Struct
from msgspec.structs import replace

from ..base.digest import describe
from ..base.types import PyTree
from ..compile.compiler import Units
from ..compile.initialise import Initialising, merged, trace_init
from ..compile.trace import TracedCall, TraceRequest, trace_call
from ..errors import FlaxMagicsError, did_you_mean, written
from ..line.expression import new_key, with_arguments, without_option
from ..line.options import ApplyOptions
from ..models.base import FLAX_ARGUMENTS, CallTrace, Idiom, MissingVariables, Model, Needs
from ..models.calls import Arguments, Path
from ..models.switch import WHEN_TRAINING, call_switches, check_agreement, value_of, written_in_call
from ..rng.keys import Draw, DrawBatch, shape_of_key

if TYPE_CHECKING:
    from ..compile.cache import ProgramSpec
    from ..state.entry import ModelEntry
    from ..state.weights import Collections


class Call(Struct, frozen=True):
    """What is called, with what, and how a person wrote it."""

    method: Path
    args: tuple[PyTree, ...]
    kwargs: dict[str, PyTree]
    text: str
    cell: int | None = None
    command: str = "%flax_apply"
    """Of whose line the call is, with the options that were given."""

    @classmethod
    def of(cls, name: str, method: str | None, args: tuple[Any, ...], kwargs: dict[str, Any], *, command: str) -> Call:
        """A call that nobody wrote as text: arguments by place, keywords by name; `method` is `encoder.embed`, or None."""
        arguments = ", ".join(["…"] * len(args) + [f"{key}=…" for key in kwargs])
        path = tuple(method.split(".")) if method else ()
        return cls(path, args, kwargs, f"{'.'.join((name, *path))}({arguments})", command=command)

    @property
    def is_text(self) -> bool:
        """Whether somebody wrote it as the text of a command, and not a script as arguments of a method."""
        return self.cell is not None or self.command == "--check"


class BadCall(FlaxMagicsError):
    """The arguments of a call do not fit the method."""


for attribute in ("__module__", "__name__", "__qualname__"):  # hosts show an error by these
    setattr(BadCall, attribute, getattr(FlaxMagicsError, attribute))


class BoundCall(Struct, frozen=True):
    """A call whose arguments fit, and the model in its mode.

    Attributes:
      kwargs: the call's, with those that the mode adds.
      switch: what was set, or how it stands as written.
      mode: what was asked: `train`, `eval`, or `as written`.
    """

    model: Model
    call: Call
    kwargs: dict[str, PyTree]
    signature: inspect.Signature
    switch: tuple[str, ...]
    mode: str
    own_rngs: bool = False
    """The call has `rngs` of the user's, where the session would have given some."""

    def mode_of(self, record: CallTrace) -> str:
        """The mode that the run of `record` was in: as written where nothing was set.

        A model that looks whether it was given the stream `dropout` is switched by that.
        """
        return self.mode if self.switch or "dropout" in record.queried else "as written"

    def initialising(self, draw: Draw, units: Units, *, taken: bool = False) -> Initialising:
        """The initialisation that the call of an init is."""
        call = self.call
        return Initialising(self.model, call.method, call.args, self.kwargs, draw=draw, units=units, taken=taken)


def prepare(name: str, model: Model, call: Call, mode: str | None) -> BoundCall:
    """Sets the mode (`train`, `eval` or None: as written) and checks the arguments.

    Raises:
      FlaxMagicsError: the arguments do not fit, the mode contradicts one, or a switch has no value and no mode is given.
    """
    signature = model.signature(call.method)
    written = written_in_call(signature, call.args, call.kwargs)
    kwargs = dict(call.kwargs)
    defaults = {key: signature.parameters[key].default for key in call_switches(signature)}
    if mode is None:
        values = {**written, **{key: default for key, default in defaults.items() if key not in written}}
        switch = [f"{key}={value}" for key, value in values.items() if isinstance(value, bool)]
        switch += model.fields_as_written()
    else:
        train = mode == "train"
        check_agreement(train, written)
        # `merge_param`: a field that has a value forbids the argument of the same name.
        by_field = {key for key in defaults if defaults[key] is None and getattr(model.module, key, None) is not None}
        in_call = {key: value_of(key, train) for key in defaults if key in written or key not in by_field}
        kwargs |= {key: value for key, value in in_call.items() if key not in written}
        in_mode, fields = model.fields_in_mode(train, fixed=frozenset(in_call))
        switch = [*(f"{key}={value}" for key, value in in_call.items()), *fields]
        model = in_mode if switch else model
    model, own_rngs = model.with_rngs(signature, call.args, kwargs)
    check_arguments(name, call, signature, {**kwargs, **dict.fromkeys(model.supplied_arguments())})
    return BoundCall(model, call, kwargs, signature, tuple(switch), mode or "as written", own_rngs)


def prepare_init(name: str, model: Model, call: Call) -> BoundCall:
    """For an init: the model as written, never in training; a switch without a value is initialised in evaluation."""
    signature = model.signature(call.method)
    written = written_in_call(signature, call.args, call.kwargs)
    kwargs = dict(call.kwargs)
    switches = call_switches(signature)
    for key in switches:
        default = signature.parameters[key].default
        unset = default is None and getattr(model.module, key, None) is None
        if key not in written and (unset or default is inspect.Parameter.empty):
            kwargs[key] = value_of(key, train=False)
    check_arguments(name, call, signature, kwargs)
    return BoundCall(model.fields_for_init(fixed=frozenset(switches)), call, kwargs, signature, (), "init")


def with_keys(entry: ModelEntry, call: Call, options: ApplyOptions, draw: Draw | DrawBatch) -> Call:
    """The call with the keys that `--key` adds."""
    if not options.key:
        return call
    parameters = entry.model.signature(call.method).parameters
    for name in options.key:
        if name in call.kwargs:
            raise FlaxMagicsError(f"--key {name}: the call gives `{name}` already. Leave one of them out.")
        if name not in parameters and not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            takes = f"--key {name}: {entry.name} has no argument `{name}`; it takes: {', '.join(parameters)}."
            raise FlaxMagicsError(takes, hint=did_you_mean(name, parameters))
    return replace(call, kwargs={**call.kwargs, **{name: draw.stream(name) for name in options.key}})


def request_of(
    entry: ModelEntry, bound: BoundCall, draw: Draw | DrawBatch, variables: Collections, options: ApplyOptions
) -> TraceRequest:
    """What a program for a call is made for, with what earlier calls of the model were found to need."""
    method = bound.call.method
    static = frozenset(name for of_method, name in entry.static_ints if of_method == method)
    return TraceRequest(
        entry.name,
        bound.model,
        method,
        Arguments.of(bound.call.args, bound.kwargs, bound.signature, static),
        variables,
        draw,
        keyed=frozenset(() if draw.size is None else options.key),
        mutable=frozenset(options.mutable),
        mode=bound.mode,
        guess=entry.known_needs.get((method, bound.mode), Needs()),
    )


def init_shapes(name: str, model: Model, call: Call, impl: str) -> Collections:
    """The shapes of the variables that an init by keys of `impl` would make."""
    first = prepare_init(name, model, call)
    traced = trace_init(first.model, shape_of_key(impl), call.method, call.args, first.kwargs)
    shapes: Collections = traced.shapes
    return shapes


def trace_shapes(entry: ModelEntry, bound: BoundCall, draw: Draw) -> TracedCall[None]:
    """Traces a call by shapes alone, with the variables that are there, or those that an init would make.

    The calls of modules are noted. Of `draw` only the kind of its keys matters.
    """

    def shapes() -> Collections:
        return init_shapes(entry.name, entry.model, bound.call, draw.impl)

    held = entry.held
    request = request_of(entry, bound, draw, shapes() if held is None else held, ApplyOptions())
    # A method may need what the first init did not make.
    add = None if entry.model.holds_variables else lambda held: merged(held, shapes())[0]
    try:
        return trace_call(replace(request, noted=True), add=add)
    except MissingVariables as error:
        raise error.__cause__ or error from None


class ShapeBefore(NamedTuple):
    """An argument as it was earlier: who saw it, such as `init saw`, its shape, and dtype and shape in words."""

    who: str
    shape: tuple[int, ...]
    text: str


def shapes_before(entry: ModelEntry, method: Path, programs: Sequence[ProgramSpec]) -> dict[str, ShapeBefore]:
    """Arrays among a method's arguments, by name: as the init had them, else as the last of the `programs` took them."""
    init = entry.init or entry.previous_init
    if init is not None and init.method == method:
        rows = Arguments.of(init.args, init.kwargs, entry.model.signature(method), frozenset()).rows
        return {
            name: ShapeBefore("init saw", leaf.shape, describe(leaf))
            for name, leaf, _ in rows
            if hasattr(leaf, "shape")
        }
    spec = next((spec for spec in reversed(programs) if spec.method == method), None)
    arguments = {} if spec is None else {name: leaf for name, leaf in spec.arguments.items() if leaf.kind == "array"}
    return {name: ShapeBefore("an earlier run had", leaf.shape, leaf.text) for name, leaf in arguments.items()}


def check_arguments(name: str, call: Call, signature: inspect.Signature, kwargs: dict[str, PyTree]) -> None:
    """Raises BadCall where the arguments do not fit the signature: what is missing, or what is not known."""
    try:
        signature.bind(*call.args, **kwargs)
        return
    except TypeError as error:
        problem = str(error)
    function = ".".join((name, *call.method))
    takes = f"it takes: {function}{_plain(signature)}"
    parameters = signature.parameters
    unknown = [key for key in kwargs if key not in parameters]
    if unknown and not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        if FLAX_ARGUMENTS.keys() >= set(unknown):
            raise Idiom(argument=unknown[0])
        hint = did_you_mean(unknown[0], parameters)
        raise BadCall(f"{function}() has no argument `{unknown[0]}`.", hint=f"{hint}\n{takes}" if hint else takes)
    missing = [
        p.name
        for i, p in enumerate(parameters.values())
        if p.default is p.empty
        and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
        and p.name not in kwargs
        and (p.kind is p.KEYWORD_ONLY or i >= len(call.args))
    ]
    if missing and all(key in WHEN_TRAINING for key in missing):
        message = f"{call.text} does not say whether it trains: `{missing[0]}` has no value."
        raise BadCall(message, **written(f"{call.command} --train {call.text}\n{call.command} --eval {call.text}"))
    if missing:
        names = " and ".join(f"`{key}`" for key in missing)
        raise BadCall(f"{function}() needs {names}, which the call does not give.", hint=takes)
    positional = sum(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters.values())
    too_many = f" takes {positional} positional arguments, and the call gives {len(call.args)}."
    raise BadCall(f"{function}()" + (too_many if len(call.args) > positional else f": {problem}."), hint=takes)


def _plain(signature: inspect.Signature) -> str:
    """The signature without annotations, which may be long."""
    parameters = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
    return str(signature.replace(parameters=parameters, return_annotation=signature.empty))


def as_names(value: str | Iterable[str]) -> tuple[str, ...]:
    """One name or several, as a tuple."""
    return (value,) if isinstance(value, str) else tuple(value)


def of_module(name: str, model: Model, lines: list[str]) -> list[str]:
    """Lines of plain Flax that begin with a model's name, which is its class's where it was built from defaults."""
    if name != type(model.module).__name__:
        return lines
    plain = [re.sub(rf"^(variables = )?{name}(?=[.(])", r"\1module", line) for line in lines]
    if plain == lines:
        return lines
    return ["import flax_magics", f"module = flax_magics.session().models['{name}'].module", *plain]


def with_drawn_key(call: Call, name: str) -> str:
    """The lines that draw a key for an argument which `--key` was to give, and pass it."""
    key = new_key(name)
    command = without_option(call.command, "--key", name)
    return f"{key} = %flax_key {name}\n{command} {with_arguments(call.text, [f'{name}={key}'])}"
