"""The axes of a mesh as a user writes them: `data=-1`, `data=4,model=2`."""

from __future__ import annotations

import re
from collections.abc import Mapping

from ..errors import FlaxMagicsError, nearest

FORM = "%flax_mesh data=-1"


def read(text: str) -> dict[str, int]:
    """Axis → size; commas or blanks stand between them.

    Raises:
      FlaxMagicsError: it is written otherwise.
    """
    axes: dict[str, int] = {}
    for part in filter(None, re.split(r"[\s,]+", text.strip())):
        name, equals, size = part.partition("=")
        if not equals or not name.isidentifier() or not re.fullmatch(r"-?[0-9]+", size):
            if not equals and nearest(part, ["off"]):
                raise FlaxMagicsError(f"`{part}` is no axis: did you mean off?", write="%flax_mesh off")
            message = f"`{part}` is no axis: a mesh is written by the names of its axes and their sizes."
            raise FlaxMagicsError(message, hint="-1 is for all devices that are left", write=FORM)
        if name in axes:
            raise FlaxMagicsError(f"the axis `{name}` has two sizes.", write=FORM)
        axes[name] = int(size)
    return axes


def check(axes: Mapping[str, int]) -> None:
    """Raises FlaxMagicsError where a size is none, or more than one is -1."""
    for name, size in axes.items():
        if isinstance(size, bool) or not isinstance(size, int) or (size < 1 and size != -1):
            message = f"{name}={size}: an axis has a number of devices, 1 or more, or -1 for all that are left."
            raise FlaxMagicsError(message, write=FORM)
    if list(axes.values()).count(-1) > 1:
        raise FlaxMagicsError(f"{as_text(axes)}: only one axis can be -1, for all devices that are left.", write=FORM)


def as_text(axes: Mapping[str, int]) -> str:
    """The axes as they are written: `data=4,model=2`."""
    return ",".join(f"{name}={size}" for name, size in axes.items())
