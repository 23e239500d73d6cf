"""Lines that are too long for a script, broken as formatters break them: at the last bracket, then at its commas."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Iterator

from ..source import Piece, pieces

WIDTH = 88
"""Columns, the default of formatters."""


def fitted(lines: Iterable[str], unit: str, column: int = 0) -> list[str]:
    """Each logical line on as many lines as it takes, where all of them will stand `column` columns to the right."""
    return [short for line in lines for short in _fitted(line, unit, WIDTH - column)]


def remark(text: str) -> list[str]:
    """A sentence as a comment."""
    return textwrap.wrap(text, WIDTH, initial_indent="# ", subsequent_indent="# ", break_on_hyphens=False)


def _fitted(line: str, unit: str, width: int) -> Iterator[str]:
    if len(line) <= width or line.lstrip().startswith("#"):
        yield line
        return
    indent = line[: len(line) - len(line.lstrip())]
    found = list(pieces(line))
    if found and found[-1].kind == "comment":  # it gets a line of its own
        at = found[-1].start
        yield indent + line[at:]
        yield from _fitted(line[:at].rstrip(), unit, width)
        return
    group = _last_group(found)
    if group is None:
        yield line
        return
    start, end = group
    items = list(_items(line, found, start, end))
    yield line[:start]
    together = f"{indent}{unit}{', '.join(items)}"
    called = start > 1 and line[start - 1] == "(" and (line[start - 2].isalnum() or line[start - 2] in "_)]")
    if (called and len(together) <= width) or (len(items) == 1 and " for " in items[0]):
        yield together
    else:
        for item in items:
            yield from _fitted(f"{indent}{unit}{item},", unit, width)
    yield indent + line[end:]


def _last_group(found: list[Piece]) -> tuple[int, int] | None:
    """Where the content of the last pair of outer brackets begins and ends that has any."""
    start, out = 0, None
    for piece in found:
        if piece.kind == "open" and piece.depth == 1:
            start = piece.end
        elif piece.kind == "close" and not piece.depth and piece.start > start:
            out = start, piece.start
    return out


def _items(line: str, found: list[Piece], start: int, end: int) -> Iterator[str]:
    """What the commas part; those of a lambda's parameters, and of a comprehension's, part nothing."""
    inside = line[start:end]
    if re.search(r"\bfor\b", "".join(line[p.start : p.end] for p in found if p.depth == 1 and start <= p.start < end)):
        yield inside.strip()
        return
    begin, parameters = start, False
    for piece in found:
        if not (start <= piece.start < end) or piece.kind != "word" or piece.depth != 1:
            continue
        word = line[piece.start : piece.end]
        parameters = parameters or word == "lambda" or word.endswith("=lambda")
        for i, letter in enumerate(word):
            if letter == ":" and parameters:
                parameters = False
            elif letter == "," and not parameters:
                yield line[begin : piece.start + i].strip()
                begin = piece.start + i + 1
    rest = line[begin:end].strip()
    if rest:
        yield rest
