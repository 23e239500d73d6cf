"""An NNX module that the session builds, because nobody gave its constructor `rngs`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from ..code.fingerprint import fingerprint
from ..code.library import nnx_modules
from ..rng.keys import SPLIT, Draw


@dataclass(frozen=True)
class Construction:
    """A construction with everything but its `rngs`: class, arguments, and how a person wrote it."""

    cls: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    text: str

    @classmethod
    def of(cls, function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], text: str) -> Construction | None:
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


TAKES_ANYTHING = inspect.signature(lambda *args, **kwargs: None)


def readable_signature(function: Callable[..., Any]) -> inspect.Signature:
    """The signature of `function`, `TAKES_ANYTHING` where Python cannot read one."""
    try:
        return inspect.signature(function)
    except (TypeError, ValueError):
        return TAKES_ANYTHING


def constructor(cls: Any) -> inspect.Signature:
    """The signature of a class's construction, as `readable_signature` gives it.

    NNX's metaclass takes anything and hands it to `__init__`, so that is where to look.
    """
    if not _is_nnx(cls):
        return readable_signature(cls)
    signature = readable_signature(cls.__init__)
    parameters = list(signature.parameters.values())
    return signature if signature is TAKES_ANYTHING else signature.replace(parameters=parameters[1:])


def takes_rngs(function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether `function` is an NNX module class whose constructor takes `rngs`, and the call gives none."""
    if not _is_nnx(function):
        return False
    signature = constructor(function)
    with suppress(TypeError):  # arguments that do not fit, which the construction itself says
        return "rngs" in signature.parameters and "rngs" not in signature.bind_partial(*args, **kwargs).arguments
    return False


def _is_nnx(cls: Any) -> bool:
    return isinstance(cls, type) and issubclass(cls, nnx_modules())
