"""The Model of a user's module: which of the two adapters, and how its construction is written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..code.library import is_module, is_module_class, nnx_modules
from ..errors import FlaxMagicsError, written
from .construction import constructor, takes_rngs

if TYPE_CHECKING:
    from .base import Model, ModelWithVariables


def adopt(module: Any, name: str) -> Model:
    """The Model for a user's module.

    Raises:
      FlaxMagicsError: `module` is no Flax module, or is one that is already bound to variables.
    """
    from flax import linen

    if isinstance(module, linen.Module):
        from .linen import LinenModel

        if module.scope is not None:
            raise FlaxMagicsError(
                f"`{name}` is bound to variables already, and a session keeps a model's variables itself.",
                edit=f"{name} = {name}.unbind()[0]",
            )
        return LinenModel(module)
    if isinstance(module, nnx_modules()):
        from .nnx import NnxModel

        return NnxModel(module)
    if is_module_class(module):
        raise FlaxMagicsError(
            f"`{name}` is the class {module.__name__}; a model is an instance of it.",
            **written(spell_construction(module, "%flaxmodel", module.__name__, name)),
        )
    raise FlaxMagicsError(f"`{name}` is {_kind(module)}, not a Flax module.")


def adopt_built(module: Any, written: str) -> ModelWithVariables:
    """The Model for an NNX module that the session built; `written`: its construction as a person wrote it."""
    from .nnx import NnxModel

    return NnxModel(module, written=written)


def _kind(value: Any) -> str:
    name = type(value).__name__
    return f"{'an' if name[:1].lower() in 'aeiou' else 'a'} {name}"


def needed_fields(cls: type) -> list[str]:
    """Arguments that the class cannot be built without."""
    return [
        name
        for name, parameter in constructor(cls).parameters.items()
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    ]


def modules_in(names: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Names of the modules in a namespace, and of the module classes."""
    return [name for name in names if is_module(names[name])], [name for name in names if is_module_class(names[name])]


def spell_construction(cls: type, command: str, spelled: str = "", name: str = "") -> str:
    """The line that registers an instance of `cls`, its fields included: `%%flaxmodel my_model = MyModel(n=…)`.

    NNX's `rngs` are left to the session.

    Args:
      spelled: the class as it is written where that is not its own name.
      name: the model's; left out, one like the class's.
    """
    supplied = takes_rngs(cls, (), {})
    fields = ", ".join(f"{name}=…" for name in needed_fields(cls) if name != "rngs" or not supplied)
    return f"{command} {name or variable_name(cls.__name__)} = {spelled or cls.__name__}({fields})"


def variable_name(class_name: str) -> str:
    """`MyModel` → `my_model`, `CNN` → `cnn`, `VAE2` → `vae2`."""
    out = ""
    for i, letter in enumerate(class_name):
        before = class_name[i - 1] if i else ""
        after = class_name[i + 1] if i + 1 < len(class_name) else ""
        if letter.isupper() and i and before != "_" and (before.islower() or before.isdigit() or after.islower()):
            out += "_"
        out += letter.lower()
    return out if out != class_name else f"{out}_model"
