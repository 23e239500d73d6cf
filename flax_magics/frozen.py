"""Frozen records, copied with a few fields changed where that has to be quick."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

T = TypeVar("T")


def altered(record: T, changes: Mapping[str, Any]) -> T:
    """`dataclasses.replace(record, **changes)` at a tenth of its cost: no field is checked, and what was worked
    out of the old one and kept beside its fields is carried over.
    """
    new: T = object.__new__(type(record))
    new.__dict__.update(record.__dict__)
    new.__dict__.update(changes)
    return new
