"""A call made ready for a model: arguments that fit its signature, and its switch between training and evaluation set."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ..compile.initialise import merged, shapes_of_init
from ..compile.trace import TracedCall, TraceRequest, trace_call
from ..errors import FlaxMagicsError, did_you_mean, written
from ..line.expression import new_key, with_arguments, without_option
from ..models.arguments import Arguments
from ..models.base import FLAX_ARGUMENTS, CallTrace, Idiom, MissingVariables, Model, Needs
from ..models.calls import Path
from ..models.switch import WHEN_TRAINING, call_switches, check_agreement, value_of, written_in_call
from ..rng.keys import Draw, DrawBatch, shape_of_key

if TYPE_CHECKING:
    from ..line.options import ApplyOptions
    from ..state.entry import ModelEntry


@dataclass(frozen=True)
class Call:
    """What is called, with what, and how a person wrote it."""

    method: Path
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
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


@dataclass(frozen=True)
class BoundCall:
    """A model in its mode, and arguments that fit.

    Attributes:
      switch: what was set, or how it stands as written.
      mode: what was asked: `train`, `eval`, or `as written`.
    """

    model: Model
    method: Path
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
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


def prepare(name: str, model: Model, call: Call, mode: str | None) -> BoundCall:
    """Sets the mode (`train`, `eval` or None: as written) and checks the arguments.

    Raises:
      FlaxMagicsError: the arguments do not fit, the mode contradicts one, or a switch has no value and no mode is given.
    """
    signature = model.signature(call.method)
    written = written_in_call(signature, call.args, call.kwargs)
    kwargs = dict(call.kwargs)
    if mode is None:
        switch = [f"{key}={value}" for key, value in written.items() if isinstance(value, bool)]
        for key in call_switches(signature):
            default = signature.parameters[key].default
            if key not in written and isinstance(default, bool):
                switch.append(f"{key}={default}")
        switch += model.fields_as_written()
    else:
        train = mode == "train"
        check_agreement(train, written)
        switch = []
        given = []
        for key in call_switches(signature):
            if key not in written:
                parameter = signature.parameters[key]
                # `merge_param`: a field that has a value forbids the argument of the same name.
                if parameter.default is None and getattr(model.module, key, None) is not None:
                    continue
                kwargs[key] = value_of(key, train)
            given.append(key)
            switch.append(f"{key}={value_of(key, train)}")
        in_mode, fields = model.fields_in_mode(train, fixed=frozenset(given))
        switch += fields
        model = in_mode if switch else model
    model, own_rngs = model.with_rngs(signature, call.args, kwargs)
    supplied = model.supplied_arguments()
    check_arguments(name, call, signature, {**kwargs, **dict.fromkeys(supplied)})
    return BoundCall(model, call.method, call.args, kwargs, signature, tuple(switch), mode or "as written", own_rngs)


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
    model = model.fields_for_init(fixed=frozenset(switches))
    return BoundCall(model, call.method, call.args, kwargs, signature, (), "init")


def with_keys(entry: ModelEntry, call: Call, options: ApplyOptions, draw: Draw | DrawBatch) -> Call:
    """The call with the keys that `--key` adds."""
    if not options.key:
        return call
    parameters = entry.model.signature(call.method).parameters
    keys = {}
    for name in options.key:
        if name in call.kwargs:
            raise FlaxMagicsError(f"--key {name}: the call gives `{name}` already. Leave one of them out.")
        if name not in parameters and not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            known = ", ".join(parameters)
            raise FlaxMagicsError(
                f"--key {name}: {entry.name} has no argument `{name}`; it takes: {known}.",
                hint=did_you_mean(name, parameters),
            )
        keys[name] = draw.stream(name)
    return replace(call, kwargs={**call.kwargs, **keys})


def request_of(
    entry: ModelEntry,
    bound: BoundCall,
    draw: Draw | DrawBatch,
    variables: Mapping[str, Any],
    options: ApplyOptions | None = None,
) -> TraceRequest:
    """What a program for a call is made for, with what earlier calls of the model were found to need."""
    return TraceRequest(
        entry.name,
        bound.model,
        bound.method,
        Arguments.of(
            bound.args,
            bound.kwargs,
            bound.signature,
            frozenset(name for method, name in entry.static_ints if method == bound.method),
        ),
        variables,
        draw,
        keyed=frozenset(() if options is None or draw.size is None else options.key),
        mutable=frozenset(() if options is None else options.mutable),
        mode=bound.mode,
        guess=entry.known_needs.get((bound.method, bound.mode), Needs()),
    )


def init_shapes(name: str, model: Model, call: Call, impl: str) -> Mapping[str, Any]:
    """The shapes of the variables that an init by keys of `impl` would make."""
    first = prepare_init(name, model, call)
    shapes: Mapping[str, Any] = shapes_of_init(first.model, shape_of_key(impl), call.method, first.args, first.kwargs)
    return shapes


def trace_shapes(entry: ModelEntry, bound: BoundCall, call: Call, draw: Draw) -> TracedCall[None]:
    """Traces a call by shapes alone, with the variables that are there, or those that an init would make.

    The calls of modules are noted. Of `draw` only the kind of its keys matters.
    """
    held = entry.held
    if held is None:
        held = init_shapes(entry.name, entry.model, call, draw.impl)
    request = replace(request_of(entry, bound, draw, held), noted=True)
    try:
        if entry.model.holds_variables:
            return trace_call(request)
        # A method may need what the first init did not make.
        return trace_call(
            request, add=lambda held: merged(held, init_shapes(entry.name, entry.model, call, draw.impl))[0]
        )
    except MissingVariables as error:
        raise error.__cause__ or error from None


def check_arguments(name: str, call: Call, signature: inspect.Signature, kwargs: dict[str, Any]) -> None:
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
    positional = [p.name for p in parameters.values() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    missing = [
        p.name
        for i, p in enumerate(parameters.values())
        if p.default is p.empty
        and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
        and p.name not in kwargs
        and (p.kind is p.KEYWORD_ONLY or i >= len(call.args))
    ]
    if missing and all(key in WHEN_TRAINING for key in missing):
        raise BadCall(
            f"{call.text} does not say whether it trains: `{missing[0]}` has no value.",
            **written(f"{call.command} --train {call.text}\n{call.command} --eval {call.text}"),
        )
    if missing:
        names = " and ".join(f"`{key}`" for key in missing)
        raise BadCall(f"{function}() needs {names}, which the call does not give.", hint=takes)
    if len(call.args) > len(positional):
        raise BadCall(
            f"{function}() takes {len(positional)} positional arguments, and the call gives {len(call.args)}.",
            hint=takes,
        )
    raise BadCall(f"{function}(): {problem}.", hint=takes)


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
