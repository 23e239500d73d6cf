"""Text in columns: wraps at a width in terminal cells, hangs what goes on, and cuts nothing unless asked."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence

from rich.cells import cell_len

WIDTH = 80
LEAST = 20
"""Cells that the last column of a table is never narrower than."""
_BREAKS = " /,.:;·→([{=_-"
_HIDDEN = ("Cc", "Cf", "Cs", "Zl", "Zp")


def clean(text: str) -> str:
    """One line that is safe to print: whitespace becomes single spaces, other invisible characters their escapes.

    A terminal obeys control characters, and bidirectional marks reorder a line; both may stand in a user's strings.
    """
    if text.isascii() and text.isprintable() and "  " not in text:
        return text.strip(" ")
    spaced = " ".join(text.split())
    return "".join(_escape(c) if unicodedata.category(c) in _HIDDEN else c for c in spaced)


def _escape(character: str) -> str:
    code = ord(character)
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}" if code < 65536 else f"\\U{code:08x}"


def clean_lines(text: str) -> list[str]:
    """`clean` for text whose lines and indentation mean something, such as code; empty lines at the ends go."""
    lines = []
    for line in text.expandtabs(4).splitlines():
        body = line.lstrip(" ")
        lines.append(" " * (len(line) - len(body)) + clean(body) if body.strip() else "")
    while lines and not lines[-1]:
        lines.pop()
    while lines and not lines[0]:
        lines.pop(0)
    return lines


def cut(text: str, width: int) -> str:
    """`text` in at most `width` cells, its end replaced by `…` if it is longer."""
    if cell_len(text) <= width:
        return text
    kept = text
    while kept and cell_len(kept) > width - 1:
        kept = kept[: max(0, min(len(kept) - 1, width - 1))]
    return kept.rstrip() + "…"


def wrap(text: str, first: str = "", rest: str | None = None, width: int = WIDTH) -> list[str]:
    """Lines of `text`, the first after the prefix `first`, the others after `rest` (as many spaces by default).

    Breaks at a space where there is one in the last half of the line, else after punctuation, else anywhere.
    """
    rest = " " * cell_len(first) if rest is None else rest
    lines, prefix = [], first
    while True:
        room = max(width - cell_len(prefix), 8)
        if cell_len(text) <= room:
            lines.append((prefix + text).rstrip())
            return lines
        at = _break(text, room)
        lines.append((prefix + text[:at]).rstrip())
        text, prefix = text[at:].lstrip(" "), rest


def _break(text: str, room: int) -> int:
    """How many characters of `text` go on a line of `room` cells, at least one."""
    fits = 0
    for index, character in enumerate(text):
        room -= cell_len(character)
        if room < 0:
            break
        fits = index + 1
    fits = max(fits, 1)
    if fits < len(text) and text[fits] == " ":
        return fits
    space = text.rfind(" ", 0, fits)
    if space >= fits // 2 and text[:space].strip():
        return space
    after = max(text.rfind(mark, 0, fits) for mark in _BREAKS) + 1
    return after if after > fits // 2 and text[:after].strip() else fits


def flow(
    items: Iterable[str], first: str = "", rest: str | None = None, gap: str = "    ", width: int = WIDTH
) -> list[str]:
    """Items side by side with `gap` between them; an item that does not fit starts the next line."""
    rest = " " * cell_len(first) if rest is None else rest
    lines: list[str] = []
    current, empty = first, True
    for item in items:
        joined = current + item if empty else current + gap + item
        if cell_len(joined) <= width:
            current, empty = joined, False
            continue
        if not empty:
            lines.append(current.rstrip())
            current = rest
        *full, current = wrap(item, current, rest, width)
        lines += full
        empty = False
    lines.append(current.rstrip())
    return lines


def dotted(parts: Sequence[str], width: int = WIDTH) -> list[str]:
    """`a · b · c`; a line that is too long breaks after a dot and goes on indented."""
    shown = [part for part in parts if part]
    return flow([*(part + " ·" for part in shown[:-1]), *shown[-1:]], rest="    ", gap=" ", width=width)


def table(rows: Iterable[Sequence[str]], indent: str = "", gap: str = "  ", width: int = WIDTH) -> list[str]:
    """Rows with every column but the last as wide as its widest cell (at most 40); the last hangs under itself."""
    cells = [list(row) for row in rows]
    if not cells:
        return []
    widths = [min(40, max(cell_len(row[at]) for row in cells)) for at in range(len(cells[0]) - 1)]
    hang = min(len(indent) + sum(wide + len(gap) for wide in widths), width - LEAST)
    lines: list[str] = []
    for row in cells:
        prefix = indent
        for cell, wide in zip(row, widths, strict=False):
            over = cell_len(cell) > wide
            prefix += cell + ("" if over else " " * (wide - cell_len(cell))) + gap
        if cell_len(prefix) > width - LEAST:  # no room for the last column here: it goes below
            lines += wrap(prefix.strip(), indent, indent + "  ", width)
            prefix = indent + "    "
        lines += wrap(row[-1], prefix, " " * hang, width)
    return lines
