"""What a line asks for, in the session's terms: the model that it names, the call, its options.

Imported by the first command that takes a call: this is what imports JAX and Flax.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from .call import ParsedCall
from .errors import FlaxMagicsError, did_you_mean
from .execution import Options
from .models import is_module, is_module_class, needed_fields, spell_construction
from .prepare import Call
from .run import Run

if TYPE_CHECKING:
    from .sessions import Session

Namespace = Mapping[str, Any]


def read_call(
    parsed: ParsedCall, session: Session, user_ns: dict[str, Any], local_ns: Namespace, cell: int | None
) -> tuple[str, Call, Any]:
    """Name, call, and the module that the name stands for in the namespace, if it is another than was registered."""
    target = parsed.target
    value = local_ns[target] if target in local_ns else user_ns.get(target)
    registered = session.module(target)
    if registered is None:
        raise _unknown(target, value, session)
    args, kwargs = parsed.evaluate(user_ns, local_ns)
    call = Call(parsed.method, args, kwargs, parsed.call, cell, parsed.command)
    if value is registered:
        return target, call, None
    cls: Any = value if is_module_class(value) else None
    if cls is not None and type(registered).__name__ == cls.__name__ and type(registered) is not cls:
        # A class registered under its own name, and defined again in a cell without the magic.
        value = None if needed_fields(cls) else cls()
    return target, call, value if is_module(value) else None


def _unknown(name: str, value: Any, session: Session) -> FlaxMagicsError:
    known = session.models
    if is_module(value):
        return FlaxMagicsError(f"`{name}` is not registered yet.", write=f"%flaxmodel {name}")
    if is_module_class(value):
        write = spell_construction(value, "%flaxmodel")
        return FlaxMagicsError(f"`{name}` is a class, and a model is an instance of it.", write=write)
    saved = session.waiting.get(name)
    if saved is not None and value is None:
        text = f"no model is registered as `{name}` yet: its variables from `{saved.file}` wait for it."
        return FlaxMagicsError(text, write=f"%flaxmodel {name} = {saved.text}     or run the cell that defines it")
    listed = f"registered: {', '.join(known)}" if known else "no model is registered yet"
    hint = did_you_mean(name, known)
    if value is not None:
        text = f"`{name}` is no model but {type(value).__name__}; {listed}."
    else:
        text = f"no model is called `{name}`; {listed}."
    return FlaxMagicsError(text, hint=hint, write=None if known else f"%flaxmodel {name} = Net()")


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
) -> Options:
    """The options of an apply, but for variables. A loop asks for the same ones many times."""
    return Options(mode, mutable, None, key, draw, draws, repeat, eager, roofline)


def replay_of(text: str, session: Session, user_ns: Namespace, local_ns: Namespace) -> Any:
    """What `%flax_replay` is of, as `Session.replay` takes it: of the name of a Run it is that run itself.

    Raises:
      FlaxMagicsError: nothing has been drawn, or `text` is none of these.
    """
    value = local_ns.get(text, user_ns.get(text))
    if text != "last" and isinstance(value, Run):
        return value
    if not len(session):
        raise FlaxMagicsError("nothing has been drawn in this session that could be run again.", write="%flax_history")
    return text if text == "last" else draw_of(text, session, user_ns, local_ns, "%flax_replay")


def draw_of(text: str, session: Session, user_ns: Namespace, local_ns: Namespace, command: str = "--draw") -> Any:
    """`--draw`: a number, `last`, `seed:N`, or the name of a Run, as `Session.apply` takes it."""
    seed, colon, number = text.rpartition(":")
    if number.isdigit() and (not colon or seed.lstrip("-").isdigit()):
        return (int(seed), int(number)) if colon else int(number)
    if text == "last":
        return session.draws
    value = local_ns.get(text, user_ns.get(text))
    if isinstance(value, Run):
        return value.seed, value.draw
    names = [name for name, value in {**user_ns, **local_ns}.items() if isinstance(value, Run)]
    write = f"{command} last     the last draw"
    if text in local_ns or text in user_ns:
        write = f"%flax_apply -o run …     binds the Run to a name\n{command} run"
    raise FlaxMagicsError(
        f"{command} takes a number, last, seed:N or the name of a Run, not `{text}`.",
        hint=did_you_mean(text, ["last", *names]),
        write=write,
    )
