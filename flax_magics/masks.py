"""Whether a run that takes the keys of an earlier draw drew the same masks: where its layers and their shapes agree."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

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
        yield f"{_names(keys)}: another key, by its place among the model's streams"
    for place in both:
        one, other = old[place].drew, new[place].drew
        if place in keys or one is None or other is None or one == other:
            continue
        if one[0] != other[0]:
            yield f"{join(place[1])}: {_shape(one[0])} there, {_shape(other[0])} here"
        else:
            yield f"{join(place[1])}: rate {one[1]:g} there, {other[1]:g} here"


def _names(places: list[_Place]) -> str:
    names = list(dict.fromkeys(join(path) for _, path, _ in places))
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


def _shape(shape: tuple[int, ...]) -> str:
    return f"[{','.join(map(str, shape))}]"
