"""Seconds, bytes and counts as people read them: two or three digits and a unit."""

from __future__ import annotations

_SECONDS = ((1e-6, "µs"), (1e-3, "ms"), (1.0, "s"))
# A tenth of the next unit is where that unit takes over: 0.22 ms reads better than 220 µs.
_TAKES_OVER = (1e-4, 1e-1, 60.0)
_BYTES = ("B", "KB", "MB", "GB", "TB", "PB")
_FLOPS = ("FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP")
_COUNTS = ("", "k", "M", "G", "T")


def seconds(value: float, like: float | None = None) -> str:
    """`41 µs`, `0.22 ms`, `12.3 s`, `2 min 5 s`.

    Args:
      value: seconds, 0 or more.
      like: seconds; the unit is chosen for this value instead, so that a spread stands beside its median.
    """
    if value <= 0 and like is None:
        return "0 s"
    index = _unit_of(value if like is None else like)
    if index == len(_SECONDS):
        return _long(value)
    size, unit = _SECONDS[index]
    return f"{_digits(value / size, index)} {unit}"


def _unit_of(value: float) -> int:
    """Index into `_SECONDS`, its length for minutes and hours. Decided after rounding: `100.0 ms` is never said."""
    for index, (size, _) in enumerate(_SECONDS):
        if float(_digits(value / size, index)) * size < _TAKES_OVER[index] * (1 - 1e-9):
            return index
    return len(_SECONDS)


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
    return _scaled(value, _BYTES, exact=1_000)


def flops(value: int) -> str:
    """`800 FLOP`, `1.2 MFLOP`: floating-point operations, in steps of 1000."""
    return _scaled(value, _FLOPS, exact=1_000)


def share(value: float) -> str:
    """A part of a whole: `0.3 %`, `41 %`, `120 %`."""
    percent = 100 * value
    return f"{percent:.1g} %" if percent < 0.95 else f"{percent:,.0f} %"


def count(value: int) -> str:
    """`15`, `1,234`, `12.3 k`, `1.2 M`: exact below ten thousand."""
    return _scaled(value, _COUNTS, exact=10_000)


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
