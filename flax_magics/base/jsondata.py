"""JSON data that was read from a file, taken apart by somebody who trusts nothing in it."""

from __future__ import annotations

import json
from typing import Any, NoReturn, TypeVar

T = TypeVar("T")


RUN_JSON = "application/vnd.flax-magics.run+json"
"""The run as data, so that a saved notebook can be verified later."""
RUNS_JSON = "application/vnd.flax-magics.runs+json"
"""The same for the runs of a counting line."""


class Damaged(Exception):
    """What was read is not what was written; the text says where, as the end of a sentence."""


def loads(text: str, what: str) -> Any:
    """JSON, read strictly. Raises Damaged for what is none, for a name that stands twice, and for NaN."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        fields = dict(pairs)
        if len(fields) != len(pairs):
            raise Damaged(f"{what} has a name that stands twice")
        return fields

    def number(text: str) -> NoReturn:
        raise Damaged(f"{what} has the number {text}")

    try:
        return json.loads(text, object_pairs_hook=once, parse_constant=number)
    except RecursionError:
        raise Damaged(f"{what} is nested too deeply") from None
    except ValueError:  # no JSON, or an int of thousands of digits
        raise Damaged(f"{what} is no JSON") from None


class Hex(float):
    """A float that stands in JSON as hex text, since it may be NaN or infinite: `0x1.8000000000000p+0`."""


def _read_hex(kind: type, value: Any) -> Any:
    """A `Hex` of its text, or of a number that is to be written as one."""
    try:
        return Hex.fromhex(value) if isinstance(value, str) else Hex(value)
    except OverflowError:
        raise ValueError("a number is too large") from None


def convert(data: Any, kind: type[T], what: str) -> T:
    """JSON data as records of the type `kind`. Raises Damaged: it is something else; `what` names it."""
    import msgspec  # takes some 10 ms, which loading the extension has no use for

    try:
        return msgspec.convert(data, kind, dec_hook=_read_hex)
    except (msgspec.ValidationError, ValueError) as error:  # of half a surrogate pair msgspec says so by itself
        raise Damaged(f"{what} is not what it should be: {error}") from None
