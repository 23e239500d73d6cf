"""How a user's module is constructed: the Model that it becomes, the line that says it, and what a session builds itself."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..code.fingerprint import fingerprint
from ..code.library import is_module, is_module_class, nnx_modules
from ..errors import FlaxMagicsError, written
from ..rng.keys import SPLIT, Draw
from .arguments import constructor, is_nnx_class

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


def adopt_built(module: object, written: str) -> ModelWithVariables:
    """The Model for an NNX module that the session built; `written`: its construction as a person wrote it."""
    from .nnx import NnxModel

    return NnxModel(module, written=written)


def _kind(value: object) -> str:
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


@dataclass(frozen=True)
class Construction:
    """A construction with everything but its `rngs`: class, arguments, and how a person wrote it."""

    cls: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    text: str

    @classmethod
    def of(cls, function: object, args: tuple[Any, ...], kwargs: Mapping[str, Any], text: str) -> Construction | None:
        """The recipe of a call that is for the session to make, None for every other."""
        return cls(function, args, kwargs, text) if takes_rngs(function, args, kwargs) else None

    def build(self, keys: Mapping[str, Any]) -> Any:
        """The module, with `nnx.Rngs(**keys)`."""
        from flax import nnx

        return self.cls(*self.args, **self.kwargs, rngs=nnx.Rngs(**keys))

    def abstract(self) -> Any:
        """The module with shapes in place of arrays; nothing is computed."""
        from flax import nnx

        return nnx.eval_shape(lambda: self.cls(*self.args, **self.kwargs, rngs=nnx.Rngs(params=0, dropout=1)))

    def fingerprint(self) -> bytes | None:
        """A digest of all that it says, None where something is not plain."""
        return fingerprint((self.cls, self.args, dict(self.kwargs)))

    def by_hand(self, name: str) -> str:
        """`net = Net(8, 3, rngs=nnx.Rngs(params=params_key, dropout=dropout_key))`"""
        inside = self.text.rstrip().removesuffix(")").rstrip().rstrip(",")
        comma = "" if inside.endswith("(") else ", "
        keys = ", ".join(f"{stream}={stream}_key" for stream in SPLIT)
        return f"{name} = {inside}{comma}rngs=nnx.Rngs({keys}))"


@dataclass(frozen=True)
class BuiltBySession:
    """A model that the session built: from what, with which keys, and a digest of the recipe at that time."""

    recipe: Construction
    keys: Mapping[str, Any] = field(repr=False)
    fingerprint: bytes | None

    @classmethod
    def of(cls, recipe: Construction, keys: Mapping[str, Any]) -> BuiltBySession:
        """As the recipe stands now."""
        return cls(recipe, keys, recipe.fingerprint())


def keys_of(draw: Draw, *, taken: bool = False) -> dict[str, Any]:
    """The streams of a draw that a construction gets.

    Args:
      taken: something else took the draw's `params` key.
    """
    return {name: draw.stream(name, taken=taken and name == "params") for name in SPLIT}


def takes_rngs(function: object, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether `function` is an NNX module class whose constructor takes `rngs`, and the call gives none."""
    if not is_nnx_class(function):
        return False
    signature = constructor(function)
    with suppress(TypeError):  # arguments that do not fit, which the construction itself says
        return "rngs" in signature.parameters and "rngs" not in signature.bind_partial(*args, **kwargs).arguments
    return False
