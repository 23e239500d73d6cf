"""How a user's module is constructed: the Model that it becomes, the line that says it, and what a session builds itself."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from msgspec import Struct

from ..base.tokens import variable_name
from ..base.types import PyTree
from ..code.fingerprint import fingerprint
from ..code.library import is_module, is_module_class, nnx_modules
from ..errors import FlaxMagicsError, written
from ..rng.keys import SPLIT, Draw
from .calls import Args, Function, constructor, is_nnx_class

if TYPE_CHECKING:
    import jax

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
    kind = type(module).__name__
    article = "an" if kind[:1].lower() in "aeiou" else "a"
    raise FlaxMagicsError(f"`{name}` is {article} {kind}, not a Flax module.")


def adopt_built(module: object, written: str) -> ModelWithVariables:
    """The Model for an NNX module that the session built; `written`: its construction as a person wrote it."""
    from .nnx import NnxModel

    return NnxModel(module, written=written)


def needed_fields(cls: type) -> list[str]:
    """Arguments that the class cannot be built without."""
    starred = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    parameters = [each for each in constructor(cls).parameters.values() if each.kind not in starred]
    return [each.name for each in parameters if each.default is each.empty]


def modules_in(names: Mapping[str, object]) -> tuple[list[str], list[str]]:
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


class Construction(Struct, frozen=True):
    """A construction with everything but its `rngs`: class, arguments, and how a person wrote it."""

    cls: Function
    args: Args
    kwargs: Mapping[str, PyTree]
    text: str

    @classmethod
    def of(cls, function: Function, args: Args, kwargs: Mapping[str, PyTree], text: str) -> Construction | None:
        """The recipe of a call that is for the session to make, None for every other."""
        return cls(function, args, kwargs, text) if takes_rngs(function, args, kwargs) else None

    def build(self, keys: Mapping[str, jax.Array]) -> object:
        """The module, with `nnx.Rngs(**keys)`."""
        from flax import nnx

        return self.cls(*self.args, **self.kwargs, rngs=nnx.Rngs(**keys))

    def abstract(self) -> object:
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


class BuiltBySession(Struct, frozen=True):
    """A model that the session built: from what, with which keys, and a digest of the recipe at that time."""

    recipe: Construction
    keys: Mapping[str, jax.Array]
    fingerprint: bytes | None

    @classmethod
    def of(cls, recipe: Construction, keys: Mapping[str, jax.Array]) -> BuiltBySession:
        """As the recipe stands now."""
        return cls(recipe, keys, recipe.fingerprint())


def keys_of(draw: Draw, *, taken: bool = False) -> dict[str, jax.Array]:
    """The streams of a draw that a construction gets.

    Args:
      taken: something else took the draw's `params` key.
    """
    return {name: draw.stream(name, taken=taken and name == "params") for name in SPLIT}


def takes_rngs(function: object, args: Args, kwargs: Mapping[str, PyTree]) -> bool:
    """Whether `function` is an NNX module class whose constructor takes `rngs`, and the call gives none."""
    if not is_nnx_class(function):
        return False
    signature = constructor(function)
    with suppress(TypeError):  # arguments that do not fit, which the construction itself says
        return "rngs" in signature.parameters and "rngs" not in signature.bind_partial(*args, **kwargs).arguments
    return False
