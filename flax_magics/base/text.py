"""Text for people: numbers with units, and columns that wrap at a width in terminal cells and cut nothing unless asked."""

from __future__ import annotations

import functools
import unicodedata
from collections.abc import Callable, Iterable, Sequence

WIDTH = 80
LEAST = 20
"""Cells that the last column of a table is never narrower than."""
_BREAKS = " /,.:;·→([{=_-"
_HIDDEN = ("Cc", "Cf", "Cs", "Zl", "Zp")


def cell_len(text: str) -> int:
    """How many columns of a terminal a text takes."""
    return _measure()(text)


@functools.cache
def _measure() -> Callable[[str], int]:
    from rich.cells import cell_len  # `%load_ext` imports this file, and shows nothing

    return cell_len


def clean(text: str) -> str:
    """One line that is safe to print: whitespace becomes single spaces, other invisible characters their escapes.

    A terminal obeys control characters, and bidirectional marks reorder a line; both may stand in a user's strings.
    """
    if text.isascii() and text.isprintable() and "  " not in text:
        return text.strip(" ")
    spaced = " ".join(text.split())
    return "".join(c.encode("unicode_escape").decode() if unicodedata.category(c) in _HIDDEN else c for c in spaced)


def clean_lines(text: str) -> list[str]:
    """`clean` for text whose lines and indentation mean something, such as code; empty lines at the ends go."""
    lines = []
    for line in text.expandtabs(4).splitlines():
        indent = " " * (len(line) - len(line.lstrip(" ")))
        lines.append((indent + clean(line)).rstrip(" "))
    return "\n".join(lines).strip("\n").splitlines()


def cut(text: str, width: int) -> str:
    """`text` in at most `width` cells, its end replaced by `…` if it is longer."""
    from rich.cells import set_cell_size

    return text if cell_len(text) <= width else set_cell_size(text, width - 1).rstrip() + "…"


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


# A tenth of the next unit is where that unit takes over: 0.22 ms reads better than 220 µs.
_SECONDS = ((1e-6, "µs", 1e-4), (1e-3, "ms", 1e-1), (1.0, "s", 60.0))


def seconds(value: float, like: float | None = None) -> str:
    """`41 µs`, `0.22 ms`, `12.3 s`, `2 min 5 s`.

    Args:
      value: seconds, 0 or more.
      like: seconds; the unit is chosen for this value instead, so that a spread stands beside its median.
    """
    if value <= 0 and like is None:
        return "0 s"
    for index, (size, unit, limit) in enumerate(_SECONDS):
        # Decided after rounding: `100.0 ms` is never said.
        if float(_digits((value if like is None else like) / size, index)) * size < limit * (1 - 1e-9):
            return f"{_digits(value / size, index)} {unit}"
    return _long(value)


def _digits(value: float, index: int) -> str:
    if index == 0:  # microseconds are never worth a second decimal: the clock itself costs as much
        return f"{value:.1f}" if 0 < round(value, 1) < 9.95 and value % 1 > 0.049 else f"{value:.0f}"
    if value < 9.995:
        text = f"{value:.2f}"
        return text if value <= 0 or float(text) > 0 else f"{value:.1g}"
    return f"{value:.1f}" if value < 99.95 else f"{value:.0f}"


def elapsed(value: float) -> str:
    """Whole seconds, for a clock that ticks: `3 s`, `1 min 3 s`."""
    return f"{int(value)} s" if value < 60 else _long(int(value))


def _long(value: float) -> str:
    """Minutes or hours, with the next unit below when it is not zero."""
    minutes, rest = divmod(round(value), 60)
    if minutes < 60:
        return f"{minutes} min" + (f" {rest} s" if rest else "")
    hours, minutes = divmod(round(value / 60), 60)
    return f"{hours} h" + (f" {minutes} min" if minutes else "")


def bytes_(value: int) -> str:
    """`60 B`, `1.2 KB`, `3.4 MB`: steps of 1000."""
    return _scaled(value, ("B", "KB", "MB", "GB", "TB", "PB"), exact=1_000)


def flops(value: int) -> str:
    """`800 FLOP`, `1.2 MFLOP`: floating-point operations, in steps of 1000."""
    return _scaled(value, ("FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP"), exact=1_000)


def share(value: float) -> str:
    """A part of a whole: `0.3 %`, `41 %`, `120 %`."""
    percent = 100 * value
    return f"{percent:.1g} %" if percent < 0.95 else f"{percent:,.0f} %"


def count(value: int) -> str:
    """`15`, `1,234`, `12.3 k`, `1.2 M`: exact below ten thousand."""
    return _scaled(value, ("", "k", "M", "G", "T"), exact=10_000)


def ulp(value: int) -> str:
    """`1 ulp`, `1,234 ulp`; of numbers whose bits differ and that are no ulp apart, what they are."""
    return f"{value:,} ulp" if value else "0 ulp: 0 and -0"


def plural(value: int, noun: str) -> str:
    """`1 parameter`, `15 parameters`."""
    return f"{count(value)} {noun}" if value == 1 else f"{count(value)} {noun}s"


def _scaled(value: int, units: tuple[str, ...], exact: int) -> str:
    if value < exact:
        return f"{value:,} {units[0]}".rstrip()
    scaled, index = float(value), 0
    while scaled >= 999.5 and index < len(units) - 1:
        scaled, index = scaled / 1000, index + 1
    digits = f"{scaled:.1f}" if scaled < 99.95 else f"{scaled:,.0f}"
    return f"{digits} {units[index]}"


def join(path: Iterable[str]) -> str:
    """A module's path as Flax writes it; the model itself is `(the model)`."""
    return "/".join(path) or "(the model)"


def quoted_name(name: str) -> str:
    """A name that stood in a file, safe to print."""
    return f"`{cut(clean(name), 80)}`"
