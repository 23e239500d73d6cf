"""Text for people: numbers with units, and lines wrapped to a width in terminal cells. Nothing is cut unless asked.

The width is 80 columns wherever a text is kept (a notebook's `text/plain`, a pipe); a terminal has its own.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from typing import Any

from ..errors import visible

WIDTH = 80
_width = WIDTH
DIGITS = 6
"""How many hex digits of a digest are shown where a person holds two against each other; the data have all of them."""
LEAST = 20
"""The smallest width, in terminal cells, of the last column of a table."""
_BREAKS = " /,.:;·→([{=_-"


def width() -> int:
    """The columns that a text has now."""
    return _width


def fit(columns: int = WIDTH) -> None:
    """Sets the columns that texts have from now on; at least half of 80, so that a table keeps its columns."""
    global _width
    _width = max(columns, WIDTH // 2)


def on_terminal(shell: Any) -> bool:
    """Whether what a shell shows is printed on a terminal: not in a kernel, and neither captured nor piped."""
    with suppress(AttributeError, ValueError):  # `sys.stdout` may be None (pythonw) or closed
        return getattr(shell, "kernel", None) is None and sys.stdout.isatty()
    return False


def replaces(shell: Any) -> bool:
    """Whether what a shell has shown can be replaced: in a kernel, but not in an engine of ipyparallel.

    `%%px` shows what engines display, and drops what would replace it.
    """
    kernel = getattr(shell, "kernel", None)
    return kernel is not None and not type(kernel).__module__.startswith("ipyparallel.")


def three_digits(value: float) -> str:
    """A number by its first three digits: `0.0123`, `1.23e+06`."""
    return f"{value:.3g}"


def cell_len(text: str) -> int:
    """The number of terminal columns that a text takes: wide characters take two, combining ones none."""
    return _measure()(text)


@functools.cache
def _measure() -> Callable[[str], int]:
    from rich.cells import cell_len  # here, because `%load_ext` imports this module and shows nothing

    return cell_len


def clean(text: str) -> str:
    """One line that is safe to print: whitespace becomes single spaces, other invisible characters their escapes."""
    # The common case, a fraction of the cost of looking up every character.
    if text.isascii() and text.isprintable() and "  " not in text:
        return text.strip(" ")
    return visible(" ".join(text.split()), keeps="")


def clean_lines(text: str) -> list[str]:
    """`clean` for code: line by line, indentation kept. Empty lines at the start and the end are dropped."""
    lines = []
    for line in text.expandtabs(4).splitlines():
        indent = " " * (len(line) - len(line.lstrip(" ")))
        lines.append((indent + clean(line)).rstrip(" "))
    return "\n".join(lines).strip("\n").splitlines()


def cut(text: str, width: int) -> str:
    """`text` cut to at most `width` terminal cells, its end replaced by `…` if it is longer."""
    from rich.cells import set_cell_size

    return text if cell_len(text) <= width else set_cell_size(text, width - 1).rstrip() + "…"


def wrap(text: str, first: str = "", rest: str | None = None, columns: int | None = None) -> list[str]:
    """Wraps `text` into lines: the first after the prefix `first`, the others after `rest` (by default as many spaces).

    A line breaks at a space. Only a word that is longer than a line is broken: after punctuation in its last half, else
    anywhere.

    Args:
      columns: the width of a line, `width()` by default.
    """
    columns = width() if columns is None else columns
    rest = " " * cell_len(first) if rest is None else rest
    lines, prefix = [], first
    while True:
        room = max(columns - cell_len(prefix), 8)  # a prefix wider than the line must not stop the loop from advancing
        if cell_len(text) <= room:
            lines.append((prefix + text).rstrip())
            return lines
        at = _break(text, room)
        lines.append((prefix + text[:at]).rstrip())
        text, prefix = text[at:].lstrip(" "), rest


def _break(text: str, room: int) -> int:
    """The number of characters of `text` to put on a line of `room` cells, at least one."""
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
    if space > 0 and text[:space].strip():
        return space
    after = max(text.rfind(mark, 0, fits) for mark in _BREAKS) + 1
    return after if after > fits // 2 and text[:after].strip() else fits


def flow(
    items: Iterable[str], first: str = "", rest: str | None = None, gap: str = "    ", columns: int | None = None
) -> list[str]:
    """Lines of items side by side, `gap` between them; an item that does not fit starts the next line.

    `first` and `rest` are the prefixes of the first and of the further lines.
    """
    columns = width() if columns is None else columns
    rest = " " * cell_len(first) if rest is None else rest
    lines: list[str] = []
    current, empty = first, True
    for item in items:
        joined = current + item if empty else current + gap + item
        if cell_len(joined) <= columns:
            current, empty = joined, False
            continue
        if not empty:
            lines.append(current.rstrip())
            current = rest
        *full, current = wrap(item, current, rest, columns)
        lines += full
        empty = False
    lines.append(current.rstrip())
    return lines


def dotted(parts: Sequence[str], columns: int | None = None) -> list[str]:
    """`a · b · c` without the empty parts; a line that is too long breaks after a dot, the next one is indented."""
    shown = [part for part in parts if part]
    return flow([*(part + " ·" for part in shown[:-1]), *shown[-1:]], rest="    ", gap=" ", columns=columns)


def table(rows: Iterable[Sequence[str]], indent: str = "", gap: str = "  ", columns: int | None = None) -> list[str]:
    """Lines of a table: each column but the last is as wide as its widest cell (at most 40); the last column wraps."""
    columns = width() if columns is None else columns
    cells = [list(row) for row in rows]
    if not cells:
        return []
    widths = [min(40, max(cell_len(row[at]) for row in cells)) for at in range(len(cells[0]) - 1)]
    hang = min(len(indent) + sum(wide + len(gap) for wide in widths), columns - LEAST)
    lines: list[str] = []
    for row in cells:
        prefix = indent
        for cell, wide in zip(row, widths, strict=False):
            over = cell_len(cell) > wide
            prefix += cell + ("" if over else " " * (wide - cell_len(cell))) + gap
        longest = max(map(cell_len, row[-1].split()), default=0)
        # The last column goes on the line below, where a word of it would be broken that fits a line.
        if cell_len(prefix) > columns - LEAST or columns - cell_len(prefix) < longest <= columns - len(indent) - 4:
            lines += wrap(prefix.strip(), indent, indent + "  ", columns)
            prefix = indent + "    "
        lines += wrap(row[-1], prefix, " " * hang, columns)
    return lines


# (size, unit, limit): a unit is used below its limit, a tenth of the next unit, since 0.22 ms reads better than 220 µs.
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
        # Compared after rounding, so that a value just below the limit is not written as `100.0 ms`.
        if float(_digits((value if like is None else like) / size, index)) * size < limit * (1 - 1e-9):
            return f"{_digits(value / size, index)} {unit}"
    return _long(value)


def _digits(value: float, index: int) -> str:
    """The number with three significant digits; `index` is that of its unit in `_SECONDS`."""
    if index == 0:  # no second decimal for microseconds: reading the clock itself costs as much
        return f"{value:.1f}" if 0 < round(value, 1) < 9.95 and value % 1 > 0.049 else f"{value:.0f}"
    if value < 9.995:
        text = f"{value:.2f}"
        return text if value <= 0 or float(text) > 0 else f"{value:.1g}"
    return f"{value:.1f}" if value < 99.95 else f"{value:.0f}"


def elapsed(value: float) -> str:
    """Whole seconds, rounded down, for the ticking display of a running command: `3 s`, `1 min 3 s`."""
    return f"{int(value)} s" if value < 60 else _long(int(value))


def _long(value: float) -> str:
    """Minutes and seconds, or hours and minutes; the smaller unit is left out when it is zero."""
    minutes, rest = divmod(round(value), 60)
    if minutes < 60:
        return f"{minutes} min" + (f" {rest} s" if rest else "")
    hours, minutes = divmod(round(value / 60), 60)
    return f"{hours} h" + (f" {minutes} min" if minutes else "")


EXACT = 1_000_000
"""The smallest count that is rounded."""


def bytes_(value: int) -> str:
    """Bytes as `60 B`, `1.2 KB`, `3.4 MB`, in steps of 1000."""
    return _scaled(value, ("B", "KB", "MB", "GB", "TB", "PB"), exact=1_000)


def flops(value: int) -> str:
    """Floating-point operations as `800 FLOP`, `1.2 MFLOP`, in steps of 1000."""
    return _scaled(value, ("FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP"), exact=1_000)


def share(value: float) -> str:
    """A fraction (1.0 is the whole) as percent: `0.3 %`, `41 %`, `120 %`."""
    percent = 100 * value
    return f"{percent:.1g} %" if percent < 0.95 else f"{percent:,.0f} %"


def count(value: int, like: int | None = None) -> str:
    """A count as `15`, `12,340`, `1.2 M`: exact below a million.

    Args:
      value: 0 or more.
      like: the largest of a column; the style is chosen for it, so that all of the column is exact or all is rounded.
    """
    exact = EXACT if (value if like is None else like) < EXACT else 1_000
    return _scaled(value, ("", "k", "M", "G", "T"), exact)


def ulp(value: int) -> str:
    """`1 ulp`, `1,234 ulp`; numbers of different bits that are 0 ulp apart can only be 0 and -0, which is said."""
    return f"{value:,} ulp" if value else "0 ulp: 0 and -0"


def plural(value: int, noun: str) -> str:
    """`1 parameter`, `15 parameters`."""
    return f"{count(value)} {noun}" if value == 1 else f"{count(value)} {noun}s"


def natural(name: str) -> tuple[str, int]:
    """A sort key by which `layer_10` comes after `layer_9`."""
    stem = name.rstrip("0123456789")
    return (stem, int(name[len(stem) :] or 0))


def repeats(signs: Sequence[object], longest: int) -> Iterator[tuple[int, int, int]]:
    """Parts a sequence where it repeats itself: (begin, length, times) of each part, in order.

    A part of several times is one sign that follows itself, or a sequence of up to `longest` signs that occurs three
    times or more; of all lengths the one that covers most wins. All else are parts of one sign, once.
    """
    at = 0
    while at < len(signs):
        turn, times = 1, 1
        for length in range(1, longest + 1):
            n = 1
            while signs[at + n * length : at + (n + 1) * length] == signs[at : at + length]:
                n += 1
            if (n > 2 or (n == 2 and length == 1)) and n * length > turn * times:
                turn, times = length, n
        yield at, turn, times
        at += turn * times


def _scaled(value: int, units: tuple[str, ...], exact: int) -> str:
    """`value` in the largest unit that keeps it at 1 or more; below `exact` in full, in the first unit."""
    if value < exact:
        return f"{value:,} {units[0]}".rstrip()
    scaled, index = float(value), 0
    while scaled >= 999.5 and index < len(units) - 1:
        scaled, index = scaled / 1000, index + 1
    digits = f"{scaled:.1f}" if scaled < 99.95 else f"{scaled:,.0f}"
    return f"{digits} {units[index]}"


def join(path: Iterable[str]) -> str:
    """A module's path with slashes, as Flax writes it; the empty path is `(the model)`."""
    return "/".join(path) or "(the model)"


def quoted_name(name: str) -> str:
    """A name that was read from an untrusted file: cleaned, cut to 80 cells and in backticks."""
    return f"`{cut(clean(name), 80)}`"
