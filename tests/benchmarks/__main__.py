"""`python -m tests.benchmarks [LAP …] [--rounds N]`: measures the laps and prints the table."""

from __future__ import annotations

import argparse
import sys

from . import laps, memory, warm
from .table import machine, row, table

LAPS = (*laps.LAPS, *warm.LAPS, memory.LAP)
NOTES = """\
Medians; the spread is of single rounds. By hand and ours are measured in turn, in both orders. Cold and restarted kernels
and edits: an IPython shell in a fresh process; JAX and Flax are imported, the extension is loaded (with it come our
modules, a row of their own) and the input is made before the clock starts. By hand: typed key, split, init, jax.jit of
apply, block_until_ready; with variables kept, without the init."""


def main(arguments: list[str]) -> str:
    """The table of the laps that are asked for: all unless named."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    keys = [lap.key for lap in LAPS]
    parser.add_argument("laps", nargs="*", metavar="LAP", help=f"which: {', '.join(keys)}; all unless named")
    parser.add_argument("--rounds", type=int, default=5, help="how often each is measured (5)")
    given = parser.parse_args(arguments)
    unknown = sorted(set(given.laps) - set(keys))
    if unknown:
        parser.error(f"no lap is called {unknown[0]}; there are {', '.join(keys)}")
    chosen = [lap for lap in LAPS if not given.laps or lap.key in given.laps]
    rows = []
    for lap in chosen:
        print(f"{lap.key} …", file=sys.stderr, flush=True)
        rows.append(row(lap, lap.measure(given.rounds)))
    return f"{table(rows)}\n\n{machine()}\n{NOTES}"


if __name__ == "__main__":
    print(main(sys.argv[1:]))
