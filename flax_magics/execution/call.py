"""A call made ready for a model: arguments that fit its signature, and its switch between training and evaluation set.

Calls in Flax's own words, such as `net.apply(variables, x)`, are refused with the command that says the same: as methods
of the model, `%flax_init net.init(key, x)` would keep what the method made, which are no variables of the model.
"""

from __future__ import annotations

import ast
import contextlib
import inspect
import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from msgspec import Struct
from msgspec.structs import replace

from ..base.digest import is_key
from ..base.text import plural
from ..base.types import PyTree, Record
from ..compile.compiler import Units
from ..compile.initialise import Initialising, merged, trace_init
from ..compile.trace import TracedCall, TraceRequest, trace_call
from ..errors import FlaxMagicsError, did_you_mean, written
from ..line.commands import COMMANDS
from ..line.expression import new_key, with_arguments, without_option
from ..line.options import ApplyOptions
from ..models.base import FLAX_ARGUMENTS, AnyModel, CallTrace, Idiom, MissingVariables, Model, ModelWithInit
from ..models.calls import Arguments, Path
from ..models.switch import WHEN_TRAINING, call_switches, check_agreement, value_of, written_in_call
from ..rng.keys import Draw, DrawBatch, shape_of_key
from ..state.entry import LinenEntry, ModelEntry, by_kind

if TYPE_CHECKING:
    from ..state.entry import ModelEntry
    from ..state.weights import Collections


M = TypeVar("M", bound=AnyModel)


class Call(Struct, frozen=True):
    """A call as it was written: method, evaluated arguments, text, and the command that it stands on."""

    method: Path
    args: tuple[PyTree, ...]
    kwargs: dict[str, PyTree]
    text: str
    cell: int | None = None
    command: str = "%flax_apply"
    """The command before the call, with its options: `%flax_apply --train`."""

    @classmethod
    def of(cls, name: str, method: str | None, args: tuple[Any, ...], kwargs: dict[str, Any], *, command: str) -> Call:
        """A script's call, with a text made up for messages; `method` may be dotted, None is `__call__`."""
        arguments = ", ".join(["…"] * len(args) + [f"{key}=…" for key in kwargs])
        path = tuple(method.split(".")) if method else ()
        return cls(path, args, kwargs, f"{'.'.join((name, *path))}({arguments})", command=command)

    @property
    def is_text(self) -> bool:
        """Whether the call is text on a command's line, not arguments of a `Session` method."""
        return self.cell is not None or self.command == "--check"


class BadCall(FlaxMagicsError):
    """Raised where the arguments of a call do not fit the signature of the method."""


for attribute in ("__module__", "__name__", "__qualname__"):  # hosts print these: users see one name of errors
    setattr(BadCall, attribute, getattr(FlaxMagicsError, attribute))


class BoundCall(Struct, frozen=True):
    """A call whose arguments fit, and the model set to its mode.

    Attributes:
      kwargs: the call's keywords, with those that the mode adds.
      switch: `name=value` of each switch: those that were set, or as they stand where no mode was asked for.
      mode: what was asked for: `train`, `eval`, or `as written`; `init` for an init.
    """

    model: Model
    call: Call
    kwargs: dict[str, PyTree]
    signature: inspect.Signature
    switch: tuple[str, ...]
    mode: str
    own_rngs: bool = False
    """The user passes `rngs` in the call, in place of those that the session would make."""

    def mode_of(self, record: CallTrace) -> str:
        """The mode in which the run that `record` traced was: `as written` where nothing was switched.

        A model that asks `has_rng("dropout")` is switched by being given that stream or not.
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
    defaults = {key: signature.parameters[key].default for key in call_switches(signature)}
    if mode is None:
        values = {**written, **{key: default for key, default in defaults.items() if key not in written}}
        switch = [f"{key}={value}" for key, value in values.items() if isinstance(value, bool)]
        switch += model.fields_as_written()
    else:
        train = mode == "train"
        check_agreement(train, written)
        # `nn.merge_param` raises where a switch has a value both as a field and as an argument of the call.
        by_field = {key for key in defaults if defaults[key] is None and getattr(model.module, key, None) is not None}
        in_call = {key: value_of(key, train) for key in defaults if key in written or key not in by_field}
        kwargs |= {key: value for key, value in in_call.items() if key not in written}
        in_mode, fields = model.fields_in_mode(train, fixed=frozenset(in_call))
        switch = [*(f"{key}={value}" for key, value in in_call.items()), *fields]
        model = in_mode if switch else model
    model, own_rngs = model.with_rngs(signature, call.args, kwargs)
    check_arguments(name, call, signature, {**kwargs, **dict.fromkeys(model.supplied_arguments())})
    return BoundCall(model, call, kwargs, signature, tuple(switch), mode or "as written", own_rngs)


def prepare_init(name: str, model: M, call: Call) -> tuple[M, Call]:
    """Binds the call of an init: the model as written, never in training; a switch without a value means evaluation.

    Returns the model, and the call with such switches among its keywords. Raises FlaxMagicsError: the arguments do not
    fit.
    """
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
    return model.fields_for_init(fixed=frozenset(switches)), replace(call, kwargs=kwargs)


def initialising(model: ModelWithInit, call: Call, draw: Draw, units: Units, *, taken: bool = False) -> Initialising:
    """The initialisation of what `prepare_init` gives."""
    return Initialising(model, call.method, call.args, call.kwargs, draw=draw, units=units, taken=taken)


def with_keys(entry: ModelEntry, call: Call, options: ApplyOptions, draw: Draw | DrawBatch) -> Call:
    """Adds the keys of `--key` to the call's keywords. Raises FlaxMagicsError where the method cannot take them."""
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
    """The request to trace a call, beginning with what earlier calls of the model were found to need."""
    method = bound.call.method
    static = frozenset(name for of_method, name in entry.static_ints if of_method == method)
    return TraceRequest(
        entry.name,
        bound.model,
        method,
        Arguments.of(bound.call.args, bound.kwargs, bound.signature, static),
        variables,
        draw,
        # With `--samples` each of these arguments has a key per draw, which is mapped like the streams' keys.
        keyed=frozenset(() if draw.size is None else options.key),
        mutable=frozenset(options.mutable),
        mode=bound.mode,
        guess=entry.known_needs.get((method, bound.mode)) or entry.model.likely_needs(bound.mode),
    )


def init_shapes(name: str, model: ModelWithInit, call: Call, impl: str) -> Collections:
    """The shapes of the variables that an init with keys of the PRNG implementation `impl` would make."""
    model, call = prepare_init(name, model, call)
    shapes: Collections = trace_init(model, shape_of_key(impl), call.method, call.args, call.kwargs).shapes
    return shapes


def trace_shapes(entry: ModelEntry, bound: BoundCall, draw: Draw) -> TracedCall[None]:
    """Traces a call by shapes alone, with the variables that are held, or with shapes of those that an init would make.

    The trace records the call of every module. Of `draw` only the PRNG implementation matters, no key is used.
    """

    def shapes() -> Collections:
        return init_shapes(entry.name, entry.linen.model, bound.call, draw.impl)

    held = entry.held
    request = request_of(entry, bound, draw, shapes() if held is None else held, ApplyOptions())
    try:
        # A method may need what the first init did not make.
        return trace_call(replace(request, noted=True), add=lambda variables: merged(variables, shapes())[0])
    except MissingVariables as error:
        # Flax's own error, which the models' rooms wrapped to be caught here.
        raise error.__cause__ or error from None


def check_arguments(name: str, call: Call, signature: inspect.Signature, kwargs: dict[str, PyTree]) -> None:
    """Raises BadCall, naming what is missing or unknown, where the arguments do not fit the signature.

    Unknown arguments that are Flax's own (`rngs`, `mutable`, …) raise Idiom instead, which `Translation` answers.
    """
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
        verb = "init" if call.command.startswith("%flax_init") else "apply"
        was = {option.was.lstrip("-"): option.key for option in COMMANDS[f"%flax_{verb}"].options}
        if unknown[0] in was and not call.is_text:
            option = was[unknown[0]]
            form = f"session.{verb}('{name}', …, {option}={kwargs[unknown[0]]!r})"
            raise BadCall(f"`{unknown[0]}` is called `{option}` now.", form=form)
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
    too_many = f" takes {plural(positional, 'positional argument')}, and the call gives {len(call.args)}."
    raise BadCall(f"{function}()" + (too_many if len(call.args) > positional else f": {problem}."), hint=takes)


def _plain(signature: inspect.Signature) -> str:
    """The signature without annotations, which may be long, as text."""
    parameters = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
    return str(signature.replace(parameters=parameters, return_annotation=signature.empty))


def as_names(value: str | Iterable[str]) -> tuple[str, ...]:
    """Names given as one string or several, as a tuple."""
    return (value,) if isinstance(value, str) else tuple(value)


def of_module(name: str, model: Model, lines: list[str]) -> list[str]:
    """Lines of plain Flax for a model that is registered under the name of its class.

    In the notebook that name is the class, not an instance: the lines fetch the registered module and call that.
    """
    if name != type(model.module).__name__:
        return lines
    plain = [re.sub(rf"^(variables = )?{name}(?=[.(])", r"\1module", line) for line in lines]
    if plain == lines:
        return lines
    return ["import flax_magics", f"module = flax_magics.session().models['{name}'].module", *plain]


def with_drawn_key(call: Call, name: str) -> str:
    """The lines to write in place of `--key NAME`: they draw a key by `%flax_key` and pass it in the call."""
    key = new_key(name)
    command = without_option(call.command, "--key", name)
    return f"{key} = %flax_key {name}\n{command} {with_arguments(call.text, [f'{name}={key}'])}"


INIT, APPLY, SUMMARY, CHECK = "%flax_init", "%flax_apply", "%flax_summary", "--check"

IDIOMS = {**dict.fromkeys(("init", "init_with_output", "lazy_init"), INIT), "apply": APPLY, "tabulate": SUMMARY}
"""Maps a method of Flax to the command that does the same."""

BOUND = frozenset(
    {"variable", "param", "has_variable", "get_variable", "put_variable", "is_mutable_collection", "has_rng", "sow"}
    | {"perturb", "is_initializing", "variables", "unbind", "setup", "scope", "parent", "path"}
)
"""Attributes of a linen module that only mean something inside the model, where it is bound."""


class Translation(Record, contextlib.AbstractContextManager["Translation"]):
    """Surrounds a call of the model: errors that come of Flax's own words become ones that name the command."""

    entry: ModelEntry
    call: Call

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, Idiom):
            raise (self._of_method(error) if error.method else self._of_argument(error.argument)) from None
        method, module = self.call.method, self.entry.model.module
        if isinstance(error, TypeError) and method and (len(method) > 1 or not hasattr(type(module), method[0])):
            # A submodule assigned in `setup` has no signature before it runs: what Python's own TypeError says is read.
            unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
            if unknown and unknown[1] in FLAX_ARGUMENTS.keys() & self.call.kwargs.keys():
                raise self._of_argument(unknown[1]) from None
        # Other messages of ours have named the mistake already.
        of_the_call = isinstance(error, BadCall) or not isinstance(error, FlaxMagicsError)
        if isinstance(error, Exception) and of_the_call and self._begins_with_variables():
            raise self._of_variables() from None

    @property
    def _function(self) -> str:
        return ".".join((self.entry.name, *self.call.method))

    # -- Flax's own methods

    def _of_method(self, error: Idiom) -> FlaxMagicsError:
        call, method, what = self.call, error.method, f"`{self._function}` is Flax's own"
        if method in IDIOMS:
            return self._of_command(IDIOMS[method])
        if method == "make_rng":
            named = [value for value in (*call.args, *call.kwargs.values()) if isinstance(value, str)]
            stream = named[0] if named and named[0].isidentifier() else "params"
            said = f"{what} and draws inside the model: outside, %flax_key draws."
            return self._error(said, [f"{stream}_key = %flax_key {stream}"], f"session.key('{stream}')")
        if method in ("variables", "get_variable", "has_variable") and error.linen and self.entry.variables is not None:
            said = f"{what} and looks at variables inside the model: outside, %flax_vars gives them."
            return self._error(
                said, [f"%flax_vars {self.entry.name}"], f"session.models['{self.entry.name}'].variables"
            )
        inside = method in BOUND or method.startswith("_") or len(call.method) > 1
        if method in ("sow", "perturb") or (error.linen and inside):
            said = f"{what} and for the code inside the model: a command runs a method of the model."
            form = f"session.apply('{self.entry.name}', …)" if not call.is_text else f"%flax_apply {self.entry.name}(…)"
            return FlaxMagicsError(said, form=form)
        said = f"{what} and needs no command: a command runs a method of the model."
        return self._error(said, [call.text], f"session.models['{self.entry.name}'].module.{'.'.join(call.method)}(…)")

    def _of_command(self, command: str) -> FlaxMagicsError:
        """The error for a method that a command replaces, with the same call without what the session passes itself."""
        what, argument = ("variables and keys", "variables") if command == APPLY else ("a key", "rngs")
        said = f"`{self._function}` is Flax's own, and {command} is the command for it: the session gives {what}."
        form = f"session.{command.removeprefix('%flax_')}('{self.entry.name}', …)"
        call, tree = self.call, _tree(self.call)
        if tree is None:
            return self._error(said, [], form)
        if call.command != CHECK and not call.command.startswith(command):
            call = replace(call, command=command)
        # `net.encoder.init(key, x)` becomes `net.encoder(x)`.
        tree.func = tree.func.value if isinstance(tree.func, ast.Attribute) else tree.func
        tree.keywords = [keyword for keyword in tree.keywords if keyword.arg != argument]
        first = tree.args[:1]
        value = call.args[0] if call.args else None
        # What Flax's method takes first; that of `net.apply(x)` was left out already.
        if isinstance(value, Mapping) or is_key(value) or getattr(value, "dtype", None) == "uint32":
            tree.args = tree.args[1:]
        # In `net.apply(*arguments)` the first argument cannot be taken off.
        line = None if first and isinstance(first[0], ast.Starred) else _line(call, tree, None)
        return self._error(said, [line or call.text], form)

    # -- arguments of Flax's `apply` and `init`

    def _of_argument(self, argument: str) -> FlaxMagicsError:
        said = f"{self._function}() has no argument `{argument}`: {FLAX_ARGUMENTS[argument]}."
        tree = _tree(self.call)
        line = None if tree is None else _line(self.call, tree, self.entry.model.module)
        verb = "init" if "init" in self.call.command else "apply"
        return self._error(
            said, self._plain_flax() if line is None else [line], f"session.{verb}('{self.entry.name}', …)"
        )

    def _plain_flax(self) -> list[str]:
        """Lines that make the call by hand, where no option stands for an argument; none if they are unknown."""
        tree = _tree(self.call)
        return [] if tree is None or self.call.method else _plain_flax(self.entry, self.call.command, tree)

    # -- the variables as the first argument

    def _begins_with_variables(self) -> bool:
        """Whether the call's first argument is a pytree like the model's variables, as one passes it to `apply`."""
        value = self.call.args[0] if self.call.args else None
        if not isinstance(value, Mapping) or not value:
            return False
        entry, call = self.entry, replace(self.call, args=self.call.args[1:])
        with contextlib.suppress(Exception):  # it is no state of the module, or the call has another mistake, too
            held = entry.held
            shapes = init_shapes(entry.name, entry.linen.model, call, "threefry2x32") if held is None else held
            return entry.model.is_state(value, shapes)
        return False

    def _of_variables(self) -> FlaxMagicsError:
        said = f"{self._function}() takes no variables: the session passes its own."
        form = f"session.apply('{self.entry.name}', …)\nsession.apply('{self.entry.name}', …, variables=…)"
        tree = _tree(self.call)
        if tree is None:
            return self._error(said, [], form)
        first, *tree.args = tree.args
        command = self.call.command
        # The advised line has to run: a switch without a default needs a mode.
        if command.startswith((APPLY, SUMMARY)) and not {"--train", "--eval"} & set(command.split()):
            signature = self.entry.model.signature(self.call.method)
            switches = written_in_call(signature, self.call.args[1:], self.call.kwargs)
            missing = set(call_switches(signature)) - set(switches)
            needed = any(signature.parameters[name].default is inspect.Parameter.empty for name in missing)
            command += " --eval" * needed
        lines = [f"{command} {ast.unparse(tree)}"]
        if command.startswith(APPLY):
            lines.append(f"{command} --variables {_one_word(first)} {ast.unparse(tree)}")
        return self._error(said, lines, form)

    def _error(self, said: str, lines: list[str], form: str) -> FlaxMagicsError:
        """The error with `lines`, complete ones for a notebook, or `form`, for a script, whose calls have no text."""
        if not self.call.is_text:
            return FlaxMagicsError(said, form=form)
        if lines and lines[0].startswith(CHECK):
            return FlaxMagicsError(said, form=f"%flaxmodel --check {lines[0].removeprefix(CHECK).strip()!r} …")
        return FlaxMagicsError(said, write="\n".join(of_module(self.entry.name, self.entry.model, lines)) or None)


def _linen_by_hand(entry: LinenEntry, command: str, tree: ast.Call) -> list[str]:
    name, arguments = entry.name, ", ".join(map(ast.unparse, (*tree.args, *tree.keywords)))
    if command.startswith(INIT):
        return ["params_key = %flax_key params", f"variables = {name}.init(params_key, {arguments})"]
    if not command.startswith(APPLY):
        return []
    tree.keywords = [keyword for keyword in tree.keywords if keyword.arg not in FLAX_ARGUMENTS]
    variables = f"%flax_vars {name}" if entry.variables is not None else f"%flax_init {ast.unparse(tree)}"
    return [f"variables = {variables}", f"{name}.apply(variables, {arguments})"]


_plain_flax = by_kind(_linen_by_hand, lambda entry, command, tree: [])  # NNX's calls take none of Flax's arguments


def _tree(call: Call) -> ast.Call | None:
    """The call's syntax tree, parsed anew so that it may be edited; None where the call was not written as text."""
    if not call.is_text:
        return None
    tree = ast.parse(call.text, mode="eval").body
    assert isinstance(tree, ast.Call)
    return tree


def _line(call: Call, tree: ast.Call, module: object) -> str | None:
    """The command with each of Flax's arguments as an option or a method; None where one has neither.

    Args:
      module: its methods are those that `method=` may name; None where the model is not known.
    """
    words, keywords = [call.command], []
    applies = call.command.startswith(APPLY)
    for keyword in tree.keywords:
        value = call.kwargs.get(keyword.arg or "")
        if keyword.arg not in FLAX_ARGUMENTS:
            keywords.append(keyword)
        elif keyword.arg == "method":
            method = _method(value, module)
            if method is None:
                return None
            tree.func = ast.Attribute(tree.func, method) if method else tree.func
        elif keyword.arg == "mutable" and applies and value is not False:
            if not isinstance(value, (str, list, tuple)):
                return None
            words += [f"--mutable {name}" for name in ([value] if isinstance(value, str) else value)]
        elif keyword.arg == "variables" and applies:
            words.append(f"--variables {_one_word(keyword.value)}")
        elif keyword.arg == "capture_intermediates" and applies and value:
            return None
    tree.keywords = keywords
    return f"{' '.join(words)} {ast.unparse(tree)}"


def _method(value: object, module: object) -> str | None:
    """How `method=value` is written as a call: a name, empty for `__call__`; None for a function that is no method."""
    if value is None or isinstance(value, str):
        return value or ""
    name = getattr(value, "__name__", "")
    function = getattr(value, "__func__", value)
    if module is not None and getattr(type(module), name, None) is not function:
        return None
    return None if not name.isidentifier() else "" if name == "__call__" else name


def _one_word(node: ast.expr) -> str:
    """The expression's text as one word of an option: in parentheses where it may hold spaces outside of brackets."""
    text = ast.unparse(node)
    return text if isinstance(node, (ast.Name, ast.Attribute, ast.Subscript, ast.Dict, ast.Call)) else f"({text})"
