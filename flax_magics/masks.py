"""Whether a run that takes the keys of an earlier draw drew the same masks: where its layers and their shapes agree.

Under a transform that splits a stream along an axis (`nn.scan`, `nn.vmap`) there are as many masks as the axis is long.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

from .models import Path, Record, Take
from .notes import join
from .run import Note

NAMED = 4
"""Layers that a note names; of more it says how many."""


def compare(draw: int, was: Record, now: Record) -> Iterator[Note]:
    """What is to be said of a run with the keys of `draw`, whose own run saw `was`.

    A mask is the same where the key is made of the same and the shape and the rate agree. Where a module draws with a key
    itself, what it draws is not known: then only where it took the key is compared, and nothing is claimed of the rest.
    """
    # A record without them is of a run that could not be watched so closely.
    if not (was.takes or now.takes):
        return
    old, new = _by_place(was.takes), _by_place(now.takes)
    said = [*_differing(old, new)]
    only = [place for place in new if place not in old]
    missing = [place for place in old if place not in new]
    if only and old:
        said.append(f"{_names(only)}: not in draw {draw}'s run")
    if missing and new:
        said.append(f"{_names(missing)}: in draw {draw}'s run alone")
    if said:
        yield Note("masks", f"other random numbers than in draw {draw} at {'; '.join(said)}")


_Place = tuple[str, Path, int]


def _by_place(takes: Iterable[Take]) -> dict[_Place, Take]:
    """Stream, module and how often it took a key before → that key."""
    found: dict[_Place, Take] = {}
    for take in takes:
        n = 0
        while (take.stream, take.path, n) in found:
            n += 1
        found[take.stream, take.path, n] = take
    return found


def _differing(old: dict[_Place, Take], new: dict[_Place, Take]) -> Iterator[str]:
    both = [place for place in new if place in old]
    keys = [place for place in both if old[place].source != new[place].source]
    if keys:
        yield f"{_names(keys)}: another key, by its place in the model"
    alike: dict[str, list[_Place]] = {}
    for place in both:
        said = "" if place in keys else _apart(old[place], new[place])
        if said:
            alike.setdefault(said, []).append(place)
    for said in list(alike)[:NAMED]:
        yield f"{_names(alike[said])}: {said}"
    rest = [place for places in list(alike.values())[NAMED:] for place in places]
    if rest:
        yield f"{_names(rest)}: other shapes or rates"


def _apart(one: Take, other: Take) -> str:
    """`[4,8] there, [2,8] here`; empty where what was drawn with the same key is the same, or not known."""
    if one.drew is None or other.drew is None:
        one, other = replace(one, drew=None), replace(other, drew=None)
    if one.axes != other.axes or (one.drew and other.drew and one.drew[0] != other.drew[0]):
        return f"{_drawn(one)} there, {_drawn(other)} here"
    if one.drew and other.drew and one.drew[1] != other.drew[1]:
        return f"rate {one.drew[1]:g} there, {other.drew[1]:g} here"
    return ""


def _drawn(take: Take) -> str:
    """`6×[4,8]`: so many masks of a shape; where that is not known `6 keys`."""
    times = [str(size) for size in take.axes]
    if take.drew is None:
        return f"{'×'.join(times) or 1} key{'s' if times else ''}"
    return "×".join([*times, f"[{','.join(map(str, take.drew[0]))}]"])


def _names(places: list[_Place]) -> str:
    names = list(dict.fromkeys(join(path) for _, path, _ in places))
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more
