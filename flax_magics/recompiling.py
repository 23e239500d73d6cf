"""Programs that keep being new for what differs in an argument, and what to do about that."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax.numpy as jnp

from .lines import Line, changed
from .run import Cause, Note

WINDOW = 10
"""Runs of one model that are looked at."""
NEW = 3
"""New programs among them that are worth a note."""

AVOIDABLE = ("shape", "dtype", "weak", "number", "static")
"""Causes that a person can do something about. Both programs of two modes, methods or settings are kept; edits are meant."""


def of_programs(
    line: Line, causes: tuple[Cause, ...], earlier: Sequence[tuple[str, tuple[Cause, ...]]], leaf: Any
) -> Iterator[Note]:
    """A note where the run that is being made is one of many that compiled.

    Args:
      line: of the run.
      causes: why this run's program is new; none where it is not, or is the model's first.
      earlier: of the runs before, newest first, where the program came from and why it was new.
      leaf: gives an argument of this run by its name, None where there is no such.
    """
    name = re.split(r"\W", line.call, maxsplit=1)[0]
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
    mend = _advice(name_of, kind, all_of, leaf(name_of))
    if mend is not None:
        text, change = mend
        advice = change if isinstance(change, dict) else changed(line, name_of, change)
        yield Note("programs", f"{len(counted)} of the last {len(runs)} runs of {name} compiled: {text}", **advice)


def _of_another(why: tuple[Cause, ...]) -> bool:
    """Whether the model had been edited, or its name stood for another: what was before says nothing on it."""
    return any(cause.kind == "model" for cause in why)


def _advice(
    name: str, kind: str, causes: list[Cause], leaf: Any
) -> tuple[str, dict[str, str] | Callable[[str], str]] | None:
    """What varies, and what to write instead: advice, or what is done to the argument; None where nothing helps."""
    if kind == "shape":
        return _of_shapes(name, {shape for cause in causes for shape in cause.shapes})
    if kind == "static":
        if type(leaf) is not int:
            return None
        text = f"the model needs the value of `{name}`, and each value is a program of its own"
        return text, {"edit": f"jax.lax.fori_loop(0, {name}, …) for range({name}), jnp.where for if"}
    dtypes = sorted({dtype for cause in causes for dtype in (cause.dtypes or re.findall(r"(\w+)\[", cause.text))})
    try:
        dtype = jnp.result_type(*dtypes).name if dtypes else "float32"
    except TypeError:  # keys
        return None
    if kind == "number":
        text = f"`{name}` is an array in one run and a Python number in another, and each kind is a program of its own"
    else:
        weak = any("(weak type)" in cause.text for cause in causes)
        listed = ", ".join([*dtypes, *(["weak types too"] if weak else [])])
        text = f"the dtype of `{name}` varies ({listed}), and each is a program of its own"
    return text, lambda argument: f"jnp.asarray({argument}, '{dtype}')"


def _of_shapes(name: str, shapes: set[tuple[int, ...]]) -> tuple[str, Callable[[str], str]] | None:
    ranks = {len(shape) for shape in shapes}
    if len(ranks) > 1 or ranks == {0}:
        text = f"the number of axes of `{name}` varies, and each is a program of its own"
        return text, lambda argument: f"jnp.reshape({argument}, …)"
    longest = [max(sizes) for sizes in zip(*shapes, strict=True)]
    varies = [len(set(sizes)) > 1 for sizes in zip(*shapes, strict=True)]

    def padded(argument: str) -> str:
        pads = ", ".join(
            f"(0, {size} - {f'{argument}.shape[{axis}]' if axis else f'len({argument})'})" if varied else "(0, 0)"
            for axis, (size, varied) in enumerate(zip(longest, varies, strict=True))
        )
        return f"jnp.pad({argument}, [{pads}])"

    if varies[0] and not any(varies[1:]):
        sizes = ", ".join(map(str, sorted({shape[0] for shape in shapes})))
        text = (
            f"the batch size of `{name}` varies ({sizes}), and each size is a program of its own: leave out the last"
            " batch, which is smaller, or pad it"
        )
        return text, padded
    return f"the shape of `{name}` varies, and each shape is a program of its own: what is padding takes a mask", padded
