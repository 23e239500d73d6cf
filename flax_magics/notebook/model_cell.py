"""What a `%%flaxmodel` cell or a `%flaxmodel` line registers, checks and binds."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Mapping
from types import FunctionType, MappingProxyType
from typing import TYPE_CHECKING, Any

from msgspec import Struct

from ..base.tokens import variable_name
from ..cells.journal import Registered
from ..code.fingerprint import fingerprint
from ..code.library import is_module, is_module_class
from ..errors import FlaxMagicsError, did_you_mean, nearest, written
from ..line.call import Assignment, fresh_names, parse_assignment, parse_call
from ..line.expression import Expression
from ..models.calls import constructor
from ..models.construction import Construction, adopt, modules_in, needed_fields, spell_construction, takes_rngs

if TYPE_CHECKING:
    from .._session import Session
    from ..state.models import Registration
    from .command import CommandUse


class CellModels(Struct, frozen=True):
    """The models of a cell or line.

    Attributes:
      modules: name → module, or a Construction for an NNX module that the session is to build.
      bind: name → value to bind in the namespace, once all are registered.
      previous: name that the cell has bound again → its value before.
      anew: names of models that were not bound before.
    """

    modules: Mapping[str, Any]
    bind: Mapping[str, object] = MappingProxyType({})
    previous: Mapping[str, object] = MappingProxyType({})
    anew: frozenset[str] = frozenset()


def from_line(use: CommandUse) -> CellModels:
    """The models of a `%flaxmodel` line: `net = Net(3)`, or `net` for a module that is in the namespace."""
    try:
        name, expression = parse_assignment(use.rest)
    except FlaxMagicsError:  # once more, for advice that binds no name that is taken
        name, expression = parse_assignment(use.rest, taken=use.taken)
    if expression is not None:
        value = build(expression, use.user_ns, use.local_ns)
        if is_module_class(value):
            line = spell_construction(value, "%flaxmodel", expression.source, name)
            message = f"`{expression.source}` is a class, and a model is an instance of it."
            raise FlaxMagicsError(message, **written(line))
        if not isinstance(value, Construction):
            adopt(value, name)
        return CellModels({name: value}, {name: value})
    if name not in use.local_ns and name not in use.user_ns:
        modules = modules_in(use.names())
        hint = did_you_mean(name, *modules)
        near = nearest(name, modules[0], 1)
        line = f"%flaxmodel {near[0]}" if near else f"%flaxmodel {name} = …"
        raise FlaxMagicsError(f"name '{name}' is not defined.", hint=hint, **written(line))
    value = use.local_ns[name] if name in use.local_ns else use.user_ns[name]
    return CellModels({name: _from_defaults(value, "%flaxmodel", name, use.taken) if is_module_class(value) else value})


def read_line(text: str) -> Assignment | None:
    """Reads the line of a `%%flaxmodel` cell; None for an empty one. Raises FlaxMagicsError if it is no assignment."""
    return parse_assignment(text, "%%flaxmodel") if text else None


def from_cell(use: CommandUse, assigned: Iterable[str], names_before: Mapping[str, object]) -> CellModels:
    """The models of a `%%flaxmodel` cell: its instances and the assignment on its line; else its last module class.

    Args:
      assigned: names that the body assigned at the top level, in order.
      names_before: the namespace before the cell.
    """
    values: dict[str, Any] = {name: use.user_ns[name] for name in assigned if name in use.user_ns}
    modules = {name: value for name, value in values.items() if is_module(value) and not name.startswith("_")}
    bind = {}
    line = read_line(use.rest)
    if line is not None:
        name, expression = line
        if expression is not None:
            bind[name] = modules[name] = build(expression, use.user_ns)
        elif name in values and is_module_class(values[name]):
            modules = {name: _from_defaults(values[name], "%%flaxmodel", name)}
        elif name not in modules:
            what = f"`{name}` is no module" if name in values else f"the cell defines no `{name}`"
            instances, classes = modules_in(values)
            near = nearest(name, instances, 1)
            spelled = f"%%flaxmodel {near[0] if near else f'{name} = …'}"
            if classes and not near:
                spelled = spell_construction(values[classes[-1]], "%%flaxmodel", classes[-1], name)
            hint = did_you_mean(name, instances, classes, values)
            raise FlaxMagicsError(f"{what}.", hint=hint, **written(spelled))
    if not modules:
        classes = modules_in(values)[1]
        if not classes:
            message = (
                "the cell defines no Flax module: neither an instance nor a class; a line registers one from elsewhere."
            )
            raise FlaxMagicsError(message, form="%flaxmodel …")
        modules = {classes[-1]: _from_defaults(values[classes[-1]], "%%flaxmodel", classes[-1])}
    previous = {name: names_before[name] for name, new in values.items() if names_before.get(name, new) is not new}
    return CellModels(modules, bind, previous, frozenset(modules.keys() - names_before.keys()))


def build(expression: Expression, user_ns: dict[str, object], local_ns: Mapping[str, object] | None = None) -> Any:
    """The value of the expression; for an NNX construction without `rngs` a Construction, which the session builds.

    Raises:
      FlaxMagicsError: it gives a module a field that its class does not have.
    """
    call = expression.tree
    if isinstance(call, ast.Call) and isinstance(call.func, (ast.Name, ast.Attribute)):
        function = Expression(expression.text, call.func).evaluate(user_ns, local_ns)
        names = [keyword.arg for keyword in call.keywords if keyword.arg is not None]
        if is_module_class(function):
            check_fields(function, names)
        if "rngs" not in names and is_module_class(function) and takes_rngs(function, (), {}):
            # Only function and arguments are evaluated: the session builds the module with the `rngs` of a draw.
            _, args, kwargs = expression.construct(user_ns, local_ns)
            return Construction.of(function, args, kwargs, ast.unparse(call)) or function(*args, **kwargs)
    return expression.evaluate(user_ns, local_ns)


def check_fields(cls: type, names: Iterable[str]) -> None:
    """Raises FlaxMagicsError where one of `names` is no field (NNX: no parameter of the constructor)."""
    parameters = constructor(cls).parameters
    unknown = next((name for name in names if name not in parameters), None)
    if unknown is None or any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return
    # Linen adds these two to every module; they are no fields of the user's.
    known = [name for name in parameters if name not in ("parent", "name")]
    takes = f"it takes: {cls.__name__}({', '.join(known)})"
    hint = did_you_mean(unknown, known)
    raise FlaxMagicsError(f"{cls.__name__} has no field `{unknown}`.", hint=f"{hint}\n{takes}" if hint else takes)


def _from_defaults(cls: Any, command: str, spelled: str, taken: frozenset[str] = frozenset()) -> Any:
    needed = needed_fields(cls)
    if needed in ([], ["rngs"]) and takes_rngs(cls, (), {}):
        return Construction(cls, (), {}, f"{cls.__name__}()")
    if needed:
        names = " and ".join([", ".join(needed[:-1]), needed[-1]] if len(needed) > 1 else needed)
        free = next(fresh_names(variable_name(cls.__name__), ast.Name(spelled), taken))
        raise FlaxMagicsError(f"{cls.__name__} needs {names}.", form=spell_construction(cls, command, spelled, free))
    return cls()


def check(models: CellModels, use: CommandUse) -> tuple[tuple[str, str], ...]:
    """The rows of `--check`, for a call of one of `models`; empty without the option. Nothing is computed or kept."""
    call = use["check"]
    if call is None:
        return ()
    from ..execution.call import Call, Translation
    from ..state.models import new_entry
    from ..summary.summary import check_call
    from .notebook import ModelCall

    try:
        parsed = parse_call(call, "--check")
    except FlaxMagicsError as error:
        raise FlaxMagicsError(error.message, hint=error.hint) from None  # its advice would begin with a command
    if parsed.target not in models.modules:
        known = ", ".join(models.modules)
        raise FlaxMagicsError(f"--check {call}: this registers {known}, not `{parsed.target}`.")
    module = models.modules[parsed.target]
    # An NNX module that is not built yet is checked by its shapes.
    model = adopt(module.abstract() if isinstance(module, Construction) else module, parsed.target)
    entry = new_entry(parsed.target, model)
    asked = Call(parsed.method, *parsed.evaluate(use.user_ns, use.local_ns), parsed.call, command=parsed.command)
    use.notebook.called = ModelCall(parsed, asked, model.module)
    with Translation(entry, asked):
        return check_call(entry, asked, use.notebook.session.root_key)


def register(models: CellModels, use: CommandUse, rows: tuple[tuple[str, str], ...]) -> list[Registered]:
    """Registers all models or none, binds names, and says what became of each model, which the journal notes down.

    If all are unchanged, the names that the cell bound again return to the objects that were there.
    """
    session, registered = use.notebook.session, list[Registered]()
    runs_before = len(session)

    def bind(changes: list[Registration]) -> None:
        draws = {run.model: f"draw {run.draw} of seed {run.seed}" for run in session.last(len(session) - runs_before)}
        _bind(models, changes, use)
        registered.extend(
            _as_reported(change, session, draws, rows if change is changes[-1] else ()) for change in changes
        )
        use.notebook.journal.registered(registered)

    # With the commit: after an interrupt in between, the names would stand for the modules of before.
    session.register_all(models.modules, anew=models.anew, cell=use.notebook.number, then=bind)
    return registered


def _bind(models: CellModels, changes: list[Registration], use: CommandUse) -> None:
    session, user_ns = use.notebook.session, use.user_ns
    for name, value in models.bind.items():
        user_ns[name] = session.models[name].module if isinstance(value, Construction) else value
    # An unchanged cell keeps the model and its programs: names go back to the objects that these belong to.
    if all(change.state == "unchanged" for change in changes):
        same_classes = set()
        for change in changes:
            if is_module(user_ns.get(change.name)):
                module = session.models[change.name].module
                same_classes.add((type(module), type(user_ns[change.name])))
                user_ns[change.name] = module
        for name, old in models.previous.items():
            new = user_ns[name]
            # Only classes and functions can be compared by their code; other values stay as the cell made them.
            if not isinstance(old, (type, FunctionType)) or type(old) is not type(new):
                continue
            code = None if (old, new) in same_classes else fingerprint(old)
            if (old, new) in same_classes or (code is not None and code == fingerprint(new)):
                user_ns[name] = old


def _as_reported(
    change: Registration, session: Session, draws: Mapping[str | None, str], check: tuple[tuple[str, str], ...]
) -> Registered:
    facts = {
        name: getattr(change, name)
        for name in ("name", "state", "changes", "variables", "file", "unfit", "other", "notes")
    }
    module = session.models[change.name].describe()
    return Registered(**facts, module=module, check=check, draw=draws.get(change.name, ""))
