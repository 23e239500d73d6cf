"""One measurement in a process of its own: cells in a real IPython shell. Reads JSON, prints the seconds as JSON.

The work is `{"setup": [cell, …], "timed": [[cell, …], …], "expect": expression}`: cells that are run first, groups of
cells that are timed, and what must be true in the namespace at the end, so that a lap measures what it says it does.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
import time
from typing import Any


def shell() -> Any:
    """An IPython shell as a terminal has it, without colours and without history on disk."""
    from IPython.core.interactiveshell import InteractiveShell
    from traitlets.config import Config

    config = Config()
    config.HistoryManager.enabled = False
    return InteractiveShell.instance(config=config)


def run(ipython: Any, cell: str) -> None:
    """Runs a cell, which must work."""
    ipython.run_cell(cell, store_history=True).raise_error()


def measure(work: dict[str, Any]) -> list[float]:
    """Seconds of each timed group of cells."""
    seconds = []
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        ipython = shell()
        for cell in work["setup"]:
            run(ipython, cell)
        for cells in work["timed"]:
            begin = time.perf_counter()
            for cell in cells:
                run(ipython, cell)
            seconds.append(time.perf_counter() - begin)
    expected = work.get("expect")
    if expected and not eval(expected, ipython.user_ns):
        sys.exit(f"{printed.getvalue()}\nnot as expected: {expected}")
    own = ipython.user_ns.get("seconds")  # a cell that times itself says so
    return seconds if own is None else [float(value) for value in own]


if __name__ == "__main__":
    print(json.dumps(measure(json.load(sys.stdin))))
