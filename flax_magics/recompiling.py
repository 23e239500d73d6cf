"""Programs that keep being new for what differs in an argument, and what to do about that."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from .run import Cause, Note

WINDOW = 10
"""Runs of one model that are looked at."""
NEW = 3
"""New programs among them that are worth a note."""

AVOIDABLE = ("shape", "dtype", "weak", "number", "static")
"""Causes that a person can do something about. Both programs of two modes, methods or settings are kept; edits are meant."""


def of_programs(
    name: str, causes: tuple[Cause, ...], earlier: Sequence[tuple[str, tuple[Cause, ...]]], leaf: Any
) -> Iterator[Note]:
    """A note where the run that is being made is one of many that compiled.

    Args:
      causes: why this run's program is new; none where it is not, or is the model's first.
      earlier: of the runs before, newest first, where the program came from and why it was new.
      leaf: gives an argument of this run by its name, None where there is no such.
    """
    now = [cause for cause in causes if cause.kind in AVOIDABLE]
    if not now or _of_another(causes):
        return
    runs = [("compiled", causes)]
    for run in earlier[: WINDOW - 1]:
        runs.append(run)
        if _of_another(run[1]):
            break
    compiled = [why for program, why in runs if program == "compiled"]
    # The first program of a model has no cause, or the edit that made it, and is one of the many.
    counted = [why for why in compiled if not why or _of_another(why) or any(cause.kind in AVOIDABLE for cause in why)]
    if len(counted) < NEW:
        return
    name_of, kind = now[0].name, now[0].kind
    all_of = [
        cause
        for why in counted
        if not _of_another(why)
        for cause in why
        if cause.name == name_of and cause.kind in AVOIDABLE
    ]
    advice = _advice(kind, name_of, all_of, leaf(name_of))
    if advice is not None:
        text, write = advice
        yield Note("programs", f"{len(counted)} of the last {len(runs)} runs of {name} compiled: {text}", write)


def _of_another(why: tuple[Cause, ...]) -> bool:
    """Whether the model had been edited, or its name stood for another: what was before says nothing on it."""
    return any(cause.kind == "model" for cause in why)


def _advice(kind: str, name: str, causes: list[Cause], leaf: Any) -> tuple[str, str] | None:
    """What varies, and what to write instead; None where nothing is known that helps."""
    if kind == "shape":
        return _of_shapes(name, {shape for cause in causes for shape in cause.shapes})
    if kind == "static":
        if not isinstance(leaf, (bool, int, float, complex)):
            return None
        text = f"the model needs the value of `{name}`, and each value is a program of its own"
        return (
            text,
            f"{name} = jnp.asarray({name})     and in the model jax.lax.fori_loop or jnp.where, which take an array",
        )
    if kind == "number":
        text = f"`{name}` is an array in one run and a Python number in another, and each kind is a program of its own"
        return text, f"{name} = jnp.asarray({name}, jnp.float32)"
    dtypes = sorted({dtype for cause in causes for dtype in cause.dtypes})
    weak = [*dtypes, "weak types too"] if any("(weak type)" in cause.text for cause in causes) else dtypes
    text = f"the dtype of `{name}` varies ({', '.join(weak)}), and each is a program of its own"
    widest = dtypes[-1] if dtypes else "float32"
    return text, f"{name} = jnp.asarray({name}, jnp.{widest})"


def _of_shapes(name: str, shapes: set[tuple[int, ...]]) -> tuple[str, str] | None:
    ranks = {len(shape) for shape in shapes}
    if len(ranks) > 1 or ranks == {0}:
        text = f"the number of axes of `{name}` varies, and each is a program of its own"
        return text, f"{name} = {name}.reshape(…)     to one number of axes"
    longest = [max(sizes) for sizes in zip(*shapes, strict=True)]
    varies = [len(set(sizes)) > 1 for sizes in zip(*shapes, strict=True)]
    if varies[0] and not any(varies[1:]):
        sizes = sorted({shape[0] for shape in shapes})
        pads = ", ".join([f"(0, {longest[0]} - len({name}))", *["(0, 0)"] * (len(longest) - 1)])
        text = (
            f"the batch size of `{name}` varies ({', '.join(map(str, sizes))}), and each size is a program of its own"
        )
        return text, f"{name} = jnp.pad({name}, [{pads}])\nor leave out the last batch, which is smaller"
    pads = ", ".join(
        f"(0, {size} - {name}.shape[{axis}])" if varied else "(0, 0)"
        for axis, (size, varied) in enumerate(zip(longest, varies, strict=True))
    )
    text = f"the shape of `{name}` varies, and each shape is a program of its own"
    return text, f"{name} = jnp.pad({name}, [{pads}])     with a mask for what is padding"
