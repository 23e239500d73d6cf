"""`python -m tests.benchmarks [ROW …] [--quick]`: measures, and prints the table in Markdown."""

from __future__ import annotations

import argparse
import compileall
import sys
from functools import partial

from . import fresh, training, warm
from .cells import ROOT, Seconds
from .table import Row, machine, table

GROUPS = (
    *((partial(warm.measured, loops), [loop.row for loop in loops]) for loops in warm.PROCESSES),
    (fresh.sessions, [fresh.COLD, fresh.RESTART, *(edit.row for edit in fresh.EDITS)]),
    (training.measured, [row for window in training.WINDOWS for row in window.rows]),
    (training.first, [training.FIRST]),
    (training.both, [training.BOTH]),
    (training.memory, [training.MEMORY]),
    (fresh.loading, [fresh.LOADING]),
    (fresh.importing, [fresh.OWN, fresh.MSGSPEC, fresh.JINJA]),
)
"""What is measured together, and the rows that come of it."""
ROWS: list[Row] = [row for _, rows in GROUPS for row in rows]


def main(arguments: list[str]) -> str:
    """The table of the rows that are asked for: all unless named."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    names = [row.key for row in ROWS]
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"which: {', '.join(names)}; all unless named")
    parser.add_argument(
        "--quick", action="store_true", help="one round in place of five, and shorter windows of training"
    )
    given = parser.parse_args(arguments)
    unknown = sorted(set(given.rows) - set(names))
    if unknown:
        parser.error(f"no row is called {unknown[0]}; there are {', '.join(names)}")
    for folder in ("flax_magics", "tests/benchmarks"):  # what was edited would otherwise be compiled in the first lap
        compileall.compile_dir(ROOT / folder, quiet=1)
    seconds: Seconds = {}
    chosen = [row for row in ROWS if row.key in (given.rows or names)]
    for measure, rows in GROUPS:
        keys = [row.key for row in rows if row in chosen]
        if keys:
            print(f"{', '.join(keys)} …", file=sys.stderr, flush=True)
            seconds |= measure(keys, 1 if given.quick else 5)
    return f"{machine()}\n\n{table(chosen, seconds)}"


if __name__ == "__main__":
    print(main(sys.argv[1:]))
