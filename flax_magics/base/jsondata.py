"""JSON data that was read from a file, taken apart by somebody who trusts nothing in it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from typing import Any, NoReturn, TypeVar

T = TypeVar("T")


class JsonObject:
    """An object of JSON data, and where it stands.

    Every method raises Damaged where the data is not what was asked for.

    Args:
      data: whatever was read.
      where: how it is called in an error, such as `root`.
      names: the fields that it must have, no other among them; left out, any.
    """

    def __init__(self, data: Any, where: str, names: Iterable[str] | None = None) -> None:
        self.where = where
        if not isinstance(data, dict) or not all(isinstance(name, str) for name in data):
            raise Damaged(f"`{where}` is no object")
        if names is not None and data.keys() != set(names):
            raise Damaged(f"`{where}` has not the fields that it should have")
        self.data: dict[str, Any] = data

    def get(self, name: str) -> Any:
        """The field, whatever it is."""
        if name not in self.data:
            raise Damaged(f"`{self.where}.{name}` is missing")
        return self.data[name]

    def _typed(self, name: str, kind: type[T], what: str) -> T:
        value = self.get(name)
        if type(value) is not kind:
            raise Damaged(f"`{self.where}.{name}` is not {what}")
        return value

    def text(self, name: str) -> str:
        """A str."""
        return self._typed(name, str, "text")

    def maybe_text(self, name: str) -> str | None:
        """A str or None."""
        return None if self.get(name) is None else self.text(name)

    def flag(self, name: str) -> bool:
        """A bool."""
        return self._typed(name, bool, "true or false")

    def whole(self, name: str, least: int | None = 0, most: int = 1 << 63) -> int:
        """An int between two others; None for no lower one."""
        value = self._typed(name, int, "a whole number")
        if value > most or value < (-most if least is None else least):
            raise Damaged(f"`{self.where}.{name}` is too large or too small")
        return value

    def maybe_whole(self, name: str) -> int | None:
        """An int from 0 on, or None."""
        return None if self.get(name) is None else self.whole(name)

    def real(self, name: str) -> float:
        """A float, written as a number or as `nan`, `inf`, `-inf`."""
        return real(self.get(name), f"{self.where}.{name}")

    def items(self, name: str) -> list[Any]:
        """A list."""
        value: list[Any] = self._typed(name, list, "a list")
        return value

    def texts(self, name: str) -> tuple[str, ...]:
        """A list of str."""
        value = self.items(name)
        if not all(isinstance(one, str) for one in value):
            raise Damaged(f"`{self.where}.{name}` is no list of texts")
        return tuple(value)

    def inner(self, name: str, names: Iterable[str] | None = None) -> JsonObject:
        """An object within."""
        return JsonObject(self.get(name), f"{self.where}.{name}", names)

    def mapping(self, name: str, value: Callable[[JsonObject, str], T]) -> dict[str, T]:
        """An object of any names: `value` reads each of its fields."""
        inner = self.inner(name)
        return {key: value(inner, key) for key in inner.data}


def real(value: Any, where: str) -> float:
    """A float. See `JsonObject.real`."""
    if isinstance(value, str) and value in ("nan", "inf", "-inf"):
        return float(value)
    if type(value) not in (int, float) or (type(value) is int and abs(value) > 1 << 1000):
        raise Damaged(f"`{where}` is no number")
    return float(value)


def finite(value: Any) -> Any:
    """JSON data with the floats that JSON has not as text: what `real` reads."""
    if isinstance(value, float):
        return value if math.isfinite(value) else repr(value)
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    return [finite(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def from_hex(text: str, where: str) -> bytes:
    """Bytes of their hex digits. Raises Damaged."""
    if len(text) % 2 or not all(digit in "0123456789abcdef" for digit in text):
        raise Damaged(f"`{where}` is no key")
    return bytes.fromhex(text)


RUN_JSON = "application/vnd.flax-magics.run+json"
"""The run as data, so that a saved notebook can be verified later."""
RUNS_JSON = "application/vnd.flax-magics.runs+json"
"""The same for the runs of a counting line."""


class Damaged(Exception):
    """What was read is not what was written; the text says where, as the end of a sentence."""


def loads(text: str, what: str) -> Any:
    """JSON, read strictly. Raises Damaged for what is none, for a name that stands twice, and for NaN."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise Damaged(f"{what} has a name that stands twice")
        return found

    def number(text: str) -> NoReturn:
        raise Damaged(f"{what} has the number {text}")

    try:
        return json.loads(text, object_pairs_hook=once, parse_constant=number)
    except RecursionError:
        raise Damaged(f"{what} is nested too deeply") from None
    except ValueError:  # no JSON, or an int of thousands of digits
        raise Damaged(f"{what} is no JSON") from None


def convert(data: Any, kind: type[T], what: str) -> T:
    """JSON data as records of the type `kind`. Raises Damaged: it is something else; `what` names it."""
    import msgspec  # takes some 10 ms, which loading the extension has no use for

    try:
        return msgspec.convert(data, kind)
    except (msgspec.ValidationError, ValueError) as error:  # of half a surrogate pair msgspec says so by itself
        raise Damaged(f"{what} is not what it should be: {error}") from None
