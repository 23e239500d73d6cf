"""What was measured of a run and a machine: times, memory, cost, limits."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Steady:
    """A run repeated with the same keys: every time in seconds, in the order they were taken."""

    times: tuple[float, ...]

    @property
    def median(self) -> float:
        """Seconds."""
        return float(np.median(self.times))

    @property
    def spread(self) -> float:
        """Half the distance between the quartiles, seconds."""
        low, high = np.percentile(self.times, [25, 75])
        return float(high - low) / 2

    @property
    def outliers(self) -> tuple[int, ...]:
        """Indices of the runs that were slow, in order.

        Slow is beyond the upper quartile by more than 1.5 times the distance between the quartiles, and by more than a
        tenth: where all runs agree to a part in a thousand, none of them is worth a word. Fewer than five tell nothing.
        """
        if len(self.times) < LEAST:
            return ()
        low, high = (float(quartile) for quartile in np.percentile(self.times, [25, 75]))
        limit = max(high + 1.5 * (high - low), 1.1 * high)
        return tuple(i for i, time in enumerate(self.times) if time > limit)


LEAST = 5
"""Runs from which a slow one can be told."""


@dataclass(frozen=True)
class Cost:
    """What XLA counts in one run of a program, on each of its devices.

    Attributes:
      flops: floating-point operations.
      bytes: bytes that are read and written, after fusion.
      loops: the program has loops over numbers, and XLA counts the body of a loop once: it is more than that.
    """

    flops: float
    bytes: float
    loops: bool = False


@dataclass(frozen=True)
class Limits:
    """What one device was measured to reach: FLOP/s in a large matmul of `dtype`, bytes/s in a large copy (read and
    written).
    """

    device: str
    dtype: str
    flops: float
    bytes: float


@dataclass(frozen=True)
class Timing:
    """Seconds that each phase took; 0.0 for a phase that did not happen.

    `run` begins once the inputs are ready (that wait is `wait`) and a run that was interrupted before has left the device
    (that wait is `busy`), and ends when the device has finished; it never includes trace, lowering or compilation.
    `compile` is all that the compilation took, and `beside` the part of it that went on beside other work and that nobody
    waited for: the phases without `beside` add up to the time that passed. `init` is the initialisation of variables; in a
    run that initialises and compiles, its tracing is part of `trace`.
    """

    trace: float = 0.0
    lower: float = 0.0
    compile: float = 0.0
    run: float = 0.0
    wait: float = 0.0
    busy: float = 0.0
    init: float = 0.0
    beside: float = 0.0
    steady: Steady | None = None

    @property
    def building(self) -> float:
        """What the program was waited for: trace, lower and compile together, without what ran beside; seconds."""
        return self.trace + self.lower + self.compile - self.beside


@dataclass(frozen=True)
class Memory:
    """Bytes, as XLA's analysis of the program gives them; `peak` is the device's own count, None where it keeps none.

    The device counts from the start of the process, whatever ran in it.
    """

    arguments: int
    outputs: int
    temporaries: int
    code: int
    peak: int | None = None

    @property
    def analysed(self) -> int:
        """Arguments, outputs and temporaries together: what the program needs at most, as XLA has it."""
        return self.arguments + self.outputs + self.temporaries
