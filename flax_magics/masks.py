"""Whether a run that takes the keys of an earlier draw drew the same masks: where its layers and their shapes agree.

A transform of Flax's (`nn.scan`, `nnx.vmap`) may split a stream along its axis, or fork it. How is not looked into: what is
drawn inside is compared by path and shape, and where these agree it is said that it may differ.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from .models import Path, Record, Take
from .notes import join
from .run import Note

NAMED = 4
"""Layers that a note names; of more it says how many."""
OTHER_KEY = "another key, by its place in the model"


def compare(draw: int, was: Record, now: Record) -> Iterator[Note]:
    """What is to be said of a run with the keys of `draw`, whose own run saw `was`.

    A mask is the same where the key is made of the same and the shape and the rate agree. Where a module draws with a key
    itself, what it draws is not known: then only where it took the key is compared, and nothing is claimed of the rest.
    Inside a transform an equal path and shape may still be another mask, unless both runs are of one trace.
    """
    if was is now:
        return
    # A record without them is of a run that could not be watched so closely.
    if not (was.takes or now.takes):
        return
    old, new = _by_place(was.takes), _by_place(now.takes)
    both = [place for place in new if place in old]
    texts = {place: _apart(old[place], new[place]) for place in both}
    said = [*_differing(texts)]
    only = [place for place in new if place not in old]
    missing = [place for place in old if place not in new]
    if only and old:
        said.append(f"{_names(only)}: not in draw {draw}'s run")
    if missing and new:
        said.append(f"{_names(missing)}: in draw {draw}'s run alone")
    if said:
        yield Note("masks", f"other random numbers than in draw {draw} at {'; '.join(said)}")
    inside = [place for place in both if not texts[place] and (old[place].inside or new[place].inside)]
    if inside:
        yield Note(
            "masks", f"random numbers drawn inside a transform may differ from those of draw {draw}: {_names(inside)}"
        )


_Place = tuple[str, Path, int]


def _by_place(takes: Iterable[Take]) -> dict[_Place, Take]:
    """Stream, module and how often it took a key before → that key."""
    by_place: dict[_Place, Take] = {}
    for take in takes:
        n = 0
        while (take.stream, take.path, n) in by_place:
            n += 1
        by_place[take.stream, take.path, n] = take
    return by_place


def _differing(texts: dict[_Place, str]) -> Iterator[str]:
    """The places that differ in the same way in one text, some of these and the rest counted."""
    alike: dict[str, list[_Place]] = {}
    for place, text in texts.items():
        if text:
            alike.setdefault(text, []).append(place)
    if OTHER_KEY in alike:
        yield f"{_names(alike.pop(OTHER_KEY))}: {OTHER_KEY}"
    for text in list(alike)[:NAMED]:
        yield f"{_names(alike[text])}: {text}"
    rest = [place for places in list(alike.values())[NAMED:] for place in places]
    if rest:
        yield f"{_names(rest)}: other shapes or rates"


def _apart(old: Take, new: Take) -> str:
    """`[4,8] there, [2,8] here`; empty where what was drawn with the same key is the same, or not known."""
    if old.source != new.source:
        return OTHER_KEY
    if old.drew is None or new.drew is None:
        return ""
    (old_shape, old_rate), (new_shape, new_rate) = old.drew, new.drew
    if old_shape != new_shape:
        return f"{_shape(old_shape)} there, {_shape(new_shape)} here"
    return f"rate {old_rate:g} there, {new_rate:g} here" if old_rate != new_rate else ""


def _shape(shape: tuple[int, ...]) -> str:
    return f"[{','.join(map(str, shape))}]"


def _names(places: list[_Place]) -> str:
    names = list(dict.fromkeys(join(path) for _, path, _ in places))
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more
