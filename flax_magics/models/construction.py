"""Construction of models: the adapter for a user's module, the line that registers it, NNX modules built here."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from msgspec import Struct

from ..base.digest import kind_of
from ..base.tokens import variable_name
from ..base.types import PyTree
from ..code.fingerprint import fingerprint
from ..code.library import is_module, is_module_class, nnx_modules
from ..errors import FlaxMagicsError, written
from ..line.expression import with_arguments
from ..rng.keys import SPLIT, Draw
from .calls import Args, Function, constructor, is_nnx_class

if TYPE_CHECKING:
    import jax

    from .base import Model, ModelWithVariables


def adopt(module: Any, name: str) -> Model:
    """The Model (adapter) for a user's module, which messages call `name`.

    Raises:
      FlaxMagicsError: `module` is no instance of a Flax module, or a linen module that is bound to variables.
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
    raise FlaxMagicsError(f"`{name}` is {kind_of(module)}, not a Flax module.")


def adopt_built(module: object, written: str) -> ModelWithVariables:
    """The Model for an NNX module that the session built; `written` is the text of its construction."""
    from .nnx import NnxModel

    return NnxModel(module, written=written)


def needed_fields(cls: type) -> list[str]:
    """Names of the constructor's parameters that have no default."""
    starred = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    parameters = [each for each in constructor(cls).parameters.values() if each.kind not in starred]
    return [each.name for each in parameters if each.default is each.empty]


def modules_in(names: Mapping[str, object]) -> tuple[list[str], list[str]]:
    """(names of the module instances, names of the module classes) in a namespace."""
    return [name for name in names if is_module(names[name])], [name for name in names if is_module_class(names[name])]


def spell_construction(cls: type, command: str, spelled: str = "", name: str = "") -> str:
    """The line that registers an instance of `cls` with gaps for its required fields: `%flaxmodel net = Net(n=…)`.

    The `rngs` of an NNX class are left out, since the session supplies them.

    Args:
      spelled: the expression for the class; left out, its name.
      name: the model's name; left out, one derived from the class.
    """
    supplied = takes_rngs(cls, (), {})
    fields = ", ".join(f"{name}=…" for name in needed_fields(cls) if name != "rngs" or not supplied)
    return f"{command} {name or variable_name(cls.__name__)} = {spelled or cls.__name__}({fields})"


class Construction(Struct, frozen=True):
    """The recipe of an NNX module that the session builds: class, arguments without `rngs`, text of the call."""

    cls: Function
    args: Args
    kwargs: Mapping[str, PyTree]
    text: str

    @classmethod
    def of(cls, function: Function, args: Args, kwargs: Mapping[str, PyTree], text: str) -> Construction | None:
        """The recipe of a constructor call that lacks `rngs`; None for every other call, which is made as it is."""
        return cls(function, args, kwargs, text) if takes_rngs(function, args, kwargs) else None

    def build(self, keys: Mapping[str, jax.Array]) -> object:
        """Builds the module with `rngs=nnx.Rngs(**keys)`."""
        from flax import nnx

        return self.cls(*self.args, **self.kwargs, rngs=nnx.Rngs(**keys))

    def abstract(self) -> object:
        """The module with shapes in place of arrays; nothing is computed."""
        from flax import nnx

        return nnx.eval_shape(lambda: self.cls(*self.args, **self.kwargs, rngs=nnx.Rngs(params=0, dropout=1)))

    def fingerprint(self) -> bytes | None:
        """A digest of the class, its code and the arguments; None where something of that is not plain."""
        return fingerprint((self.cls, self.args, dict(self.kwargs)))

    def by_hand(self, name: str) -> str:
        """The same in plain Flax: `net = Net(8, 3, rngs=nnx.Rngs(params=params_key, dropout=dropout_key))`."""
        keys = ", ".join(f"{stream}={stream}_key" for stream in SPLIT)
        return f"{name} = {with_arguments(self.text, [f'rngs=nnx.Rngs({keys})'])}"


class BuiltBySession(Struct, frozen=True):
    """How the session built a model: the recipe, the keys, and the recipe's fingerprint at that time."""

    recipe: Construction
    keys: Mapping[str, jax.Array]
    fingerprint: bytes | None

    @classmethod
    def of(cls, recipe: Construction, keys: Mapping[str, jax.Array]) -> BuiltBySession:
        """Takes the recipe's fingerprint now: its class may be edited later."""
        return cls(recipe, keys, recipe.fingerprint())


def keys_of(draw: Draw, *, taken: bool = False) -> dict[str, jax.Array]:
    """The keys of a draw that a construction gets: `params` and `dropout`.

    Args:
      taken: the draw's `params` key was already used for something else; see `Draw.stream`.
    """
    return {name: draw.stream(name, taken=taken and name == "params") for name in SPLIT}


def takes_rngs(function: object, args: Args, kwargs: Mapping[str, PyTree]) -> bool:
    """Whether `function` is an NNX module class whose constructor takes `rngs` while the call passes none."""
    if not is_nnx_class(function):
        return False
    signature = constructor(function)
    with suppress(TypeError):  # arguments that do not fit: the construction itself raises the better error
        return "rngs" in signature.parameters and "rngs" not in signature.bind_partial(*args, **kwargs).arguments
    return False
