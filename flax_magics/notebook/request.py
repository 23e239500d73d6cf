"""What a line asks for, in the session's terms: the model that it names, the call, its options."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from ..code.library import is_module, is_module_class
from ..errors import FlaxMagicsError, advice_lines, did_you_mean, nearest, written
from ..execution.call import Call
from ..line.call import CallExpression, root_name, values_first
from ..line.options import ApplyOptions
from ..models.adopt import adopt, modules_in, needed_fields, spell_construction
from ..models.switch import call_switches, following
from ..run import Run

if TYPE_CHECKING:
    from .._session import Session

Namespace = Mapping[str, Any]


def read_call(
    parsed: CallExpression, session: Session, user_ns: dict[str, Any], local_ns: Namespace, cell: int | None
) -> tuple[str, Call, Any]:
    """Name, call, and the module that the name stands for in the namespace, if it is another than was registered."""
    target = parsed.target
    value = local_ns[target] if target in local_ns else user_ns.get(target)
    registered = session.module(target)
    if registered is None:
        raise _unknown(parsed, value, session, {**user_ns, **local_ns})
    args, kwargs = parsed.evaluate(user_ns, local_ns)
    call = Call(parsed.method, args, kwargs, parsed.call, cell, parsed.command)
    if value is registered:
        return target, call, None
    cls: Any = value if is_module_class(value) else None
    if cls is not None and type(registered).__name__ == cls.__name__ and type(registered) is not cls:
        # A class registered under its own name, and defined again in a cell without the magic.
        value = None if needed_fields(cls) else cls()
    return target, call, value if is_module(value) else None


def _unknown(parsed: CallExpression, value: Any, session: Session, names: Namespace) -> FlaxMagicsError:
    name, known = parsed.target, session.models
    if is_module(value):
        try:
            adopt(value, name)
        except FlaxMagicsError as error:
            return error
        return FlaxMagicsError(f"`{name}` is not registered yet.", write=f"%flaxmodel {name}")
    if is_module_class(value):
        message = f"`{name}` is a class, and a model is an instance of it."
        return FlaxMagicsError(message, **written(spell_construction(value, "%flaxmodel", name)))
    saved = session.waiting.get(name)
    if saved is not None and value is None:
        text = f"no model is registered as `{name}` yet: its variables from `{saved.file}` wait for it"
        if is_module_class(names.get(saved.text.partition("(")[0])):
            return FlaxMagicsError(f"{text}.", **written(f"%flaxmodel {name} = {saved.text}"))
        return FlaxMagicsError(f"{text}, until the cell that defines it is run.", form=f"%flaxmodel {name} = …")
    listed = f"registered: {', '.join(known)}" if known else "no model is registered yet"
    hint = did_you_mean(name, known, *modules_in(names))
    if value is not None:
        text = f"`{name}` is no model but {type(value).__name__}; {listed}."
        calls = [node for node in ast.walk(parsed.tree) if isinstance(node, ast.Call) and root_name(node) in known]
        if calls:  # `jnp.sum(net(x))`
            return FlaxMagicsError(text, **written(values_first(parsed.text, parsed.tree, parsed.command, calls)))
    else:
        text = f"no model is called `{name}`; {listed}."
    return FlaxMagicsError(text, hint=hint, form=None if known or hint else f"%flaxmodel {name} = …")


def of_unset(parameter: str, parsed: CallExpression, session: Session, has_mode: bool) -> tuple[str, ...]:
    """What to say where a layer of the model has no value for `parameter`: the option that sets it, or an edit.

    `--train` and `--eval` set what stands for the call or for the model itself, and not what the model keeps to itself.
    """
    model = adopt(session.module(parsed.target), parsed.target)
    signature = model.signature(parsed.method)
    in_call = call_switches(signature)
    standing = {setting.partition("=")[0] for setting in model.fields_as_written()}
    fields = {setting.partition("=")[0] for setting in model.fields_in_mode(True, fixed=frozenset())[1]}
    if not has_mode and (fields - standing or any(signature.parameters[name].default is None for name in in_call)):
        lines = "\n".join(f"{parsed.command} {option} {parsed.call}" for option in ("--train", "--eval"))
        return ("it is the model's own switch, and has no value as written", *advice_lines(lines))
    own = next(iter((*in_call, *(f"self.{name}" for name in sorted(fields)))), "")
    edit = following(parameter, own, "".join(parsed.method[-1:]))
    return (f"`{parameter}` has no value, and no switch of the model's sets it", *advice_lines(edit=edit))


@lru_cache(maxsize=256)
def options(
    mode: str | None,
    mutable: tuple[str, ...],
    key: tuple[str, ...],
    draw: int | tuple[int, int] | None,
    draws: int | None,
    repeat: int,
    eager: bool,
    roofline: bool,
) -> ApplyOptions:
    """The options of an apply, but for variables. A loop asks for the same ones many times."""
    return ApplyOptions(
        mode=mode, mutable=mutable, key=key, draw=draw, draws=draws, repeat=repeat, eager=eager, roofline=roofline
    )


def replay_of(text: str, session: Session, user_ns: Namespace, local_ns: Namespace, line: str) -> Any:
    """What `%flax_replay` is of, as `Session.replay` takes it: of the name of a Run it is that run itself.

    Args:
      line: the whole one, `{}` in the place of `text`.

    Raises:
      FlaxMagicsError: nothing has been drawn, or `text` is none of these.
    """
    value = local_ns.get(text, user_ns.get(text))
    if text != "last" and isinstance(value, Run):
        return value
    if not len(session):
        raise FlaxMagicsError("nothing has been drawn in this session that could be run again.", form="%flax_apply …")
    return text if text == "last" else draw_of(text, session, user_ns, local_ns, line)


def draw_of(text: str, session: Session, user_ns: Namespace, local_ns: Namespace, line: str) -> Any:
    """`--draw`: a number, `last`, `seed:N`, or the name of a Run, as `Session.apply` takes it.

    Args:
      line: the whole one, `{}` in the place of `text`.
    """
    seed, colon, number = text.rpartition(":")
    if number.isdigit() and (not colon or seed.lstrip("-").isdigit()):
        return (int(seed), int(number)) if colon else int(number)
    if text == "last":
        return session.draws
    value = local_ns.get(text, user_ns.get(text))
    if isinstance(value, Run):
        return value.seed, value.draw
    names = [name for name, value in {**user_ns, **local_ns}.items() if isinstance(value, Run)]
    taker = "%flax_replay" if line.startswith("%flax_replay") else "--draw"
    near = nearest(text, ["last", *names])
    raise FlaxMagicsError(
        f"{taker} takes a number, last, seed:N or the name of a Run, not `{text}`.",
        hint=did_you_mean(text, ["last", *names]),
        **(written(line.replace("{}", next(iter(near), "last"))) if session.draws else {}),
    )
