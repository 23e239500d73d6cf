"""The command line of `python -m flax_magics verify FILES…`."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import math
import shutil
import signal
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ..base import __version__
from ..base.text import clean_lines, fit
from ..errors import FlaxMagicsError
from .notebooks import check_installed, code_cells, executed, other_order, read, runs_of
from .report import EXIT, Result, exit_status, text, to_json

if TYPE_CHECKING:
    from nbformat import NotebookNode

    from .compare import Tolerance

INTERRUPTED = 130

_DESCRIPTION = """\
Runs notebooks again, each from top to bottom in a fresh kernel of this Python
and in its own folder, and compares the keys and the output digest of every run
with those in the notebook's saved outputs. The notebooks are never written.
What they hold is executed: verify only what you would run."""

_EPILOG = """\
exit status:
  0  every run agrees: in its keys, and in every bit or within --rtol
  1  a run differs
  2  a notebook could not be read, or did not run to its end
  3  no run differs, but some cannot be compared: their keys agree, their bits
     do not, and versions, device, processor or thread count are others than
     those stored
  4  a notebook has no outputs of flax_magics; it is not run

Of several notebooks it is that of the worst, in the order 2, 1, 4, 3. In CI, 3
may pass where machines differ:
  python -m flax_magics verify *.ipynb || [ $? -eq 3 ]

Keys and shapes are compared in any case. How far two outputs are apart is told
by the values that are stored with each run, 48 at most: what else an output has
is known by its digest alone. Cells are counted as code cells, from 1. Those
tagged skip-execution are left out, those tagged raises-exception may fail. Runs
under -q, or with reports turned off, leave no output to compare."""


def parser() -> argparse.ArgumentParser:
    """The argument parser of `python -m flax_magics`."""
    top = argparse.ArgumentParser(
        prog="python -m flax_magics", description="Commands for notebooks that run Flax models."
    )
    top.add_argument("--version", action="version", version=f"flax_magics {__version__}")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True)
    verify = commands.add_parser(
        "verify",
        help="run notebooks again and compare each run with the one that was saved",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verify.add_argument("files", nargs="+", metavar="FILE", help="a notebook")
    verify.add_argument(
        "--rtol",
        type=_tolerance,
        metavar="R",
        help="where bits differ, accept floating-point values that are within R of the stored ones, as numpy has it;"
        " shapes, keys and integers must be equal",
    )
    verify.add_argument(
        "--atol", type=_tolerance, metavar="A", help="with --rtol, accept a difference of A in any case (default: 0)"
    )
    verify.add_argument("--json", action="store_true", help="print the result as JSON")
    jobs = "so many notebooks at once, each in a kernel (default: 1)"
    whole = partial(_whole, 1, "number of notebooks")
    verify.add_argument("-j", "--jobs", type=whole, default=1, metavar="N", help=jobs)
    timeout = "what one cell may take; 0 for as long as it likes (default: 600)"
    whole = partial(_whole, 0, "time in seconds")
    verify.add_argument("--timeout", type=whole, default=600, metavar="SECONDS", help=timeout)
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit status. A wrong line exits with 2, as argparse does."""
    top = parser()
    options = top.parse_args(arguments)
    if options.atol is not None and options.rtol is None:
        top.error("--atol goes with --rtol")
    from .compare import Tolerance  # imports NumPy, which `--help` does not need

    tolerance = None if options.rtol is None else Tolerance(options.rtol, options.atol or 0.0)
    try:
        check_installed()
        results = asyncio.run(verify(options.files, tolerance, options.jobs, options.timeout or None))
    except FlaxMagicsError as error:
        print("\n".join(clean_lines(str(error))), file=sys.stderr)
        return EXIT["could not run"]
    except (KeyboardInterrupt, asyncio.CancelledError):
        print("interrupted: its kernels are ended", file=sys.stderr)
        return INTERRUPTED
    if options.json:
        print(json.dumps(to_json(results), indent=2, allow_nan=False))
    else:
        # The text has arrows and dots, which the encoding of a pipe may lack.
        with contextlib.suppress(AttributeError, ValueError, OSError):
            sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
        if sys.stdout.isatty():
            fit(shutil.get_terminal_size().columns)
        print("\n".join(text(result) for result in results))
    return exit_status(results)


async def verify(
    files: Sequence[str], tolerance: Tolerance | None = None, jobs: int = 1, timeout: int | None = None
) -> list[Result]:
    """Verifies notebooks. Returns a result for each, in the order given.

    Args:
      files: their paths; one that is given twice is run once.
      tolerance: accept values within it; None where every bit has to agree.
      jobs: how many kernels run at once.
      timeout: seconds that one cell may take, None without limit.
    """
    from tqdm import tqdm  # type: ignore[import-untyped]

    with contextlib.suppress(NotImplementedError, RuntimeError, ValueError):  # on Windows, or not in the main thread
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        # SIGTERM cancels the task, which ends the kernels; by itself it would leave them running.
        loop.add_signal_handler(signal.SIGTERM, task.cancel)  # type: ignore[union-attr]
    notebooks = {file: _read(file) for file in files}
    results = {file: result for file, result in notebooks.items() if isinstance(result, Result)}
    to_run = {file: notebook for file, notebook in notebooks.items() if not isinstance(notebook, Result)}
    cells = sum(len(code_cells(notebook)) for notebook in to_run.values())
    limit = asyncio.Semaphore(jobs)
    with tqdm(total=cells, unit="cell", leave=False, disable=None, file=sys.stderr) as bar:  # None: on a terminal

        async def one(file: str) -> Result:
            async with limit:
                return await _verify(file, to_run[file], tolerance, timeout, bar.update)

        async with asyncio.TaskGroup() as group:
            tasks = {file: group.create_task(one(file)) for file in to_run}
    results |= {file: task.result() for file, task in tasks.items()}
    return [results[file] for file in notebooks]


def _read(file: str) -> NotebookNode | Result:
    """The notebook; or its result already, if it cannot be read or has no runs to compare."""
    try:
        notebook = read(Path(file))
        return notebook if any(cell.count for cell in runs_of(notebook)) else Result(file)
    except FlaxMagicsError as error:
        return Result(file, failed=_line(error))


async def _verify(
    file: str, notebook: NotebookNode, tolerance: Tolerance | None, timeout: int | None, on_cell: Callable[[], object]
) -> Result:
    from .compare import compare

    started = time.monotonic()
    folder = Path(file).absolute().parent
    outputs, cells_run, failed = await executed(notebook, folder, timeout, on_cell)
    try:
        # A notebook that stopped is compared as far as it ran.
        verdicts = compare(runs_of(notebook)[:cells_run], runs_of(outputs)[:cells_run], tolerance)
    except FlaxMagicsError as error:
        return Result(file, failed=failed or _line(error), seconds=time.monotonic() - started, tolerance=tolerance)
    return Result(file, verdicts, failed, time.monotonic() - started, tolerance, other_order(notebook))


def _line(error: FlaxMagicsError) -> str:
    return " ".join(line.strip() for line in clean_lines(str(error)))


def _tolerance(value: str) -> float:
    with contextlib.suppress(ValueError):
        number = float(value)
        if math.isfinite(number) and number >= 0:
            return number
    raise argparse.ArgumentTypeError(f"{value!r} is no tolerance: it is 0 or more, such as 1e-5")


def _whole(least: int, what: str, value: str) -> int:
    with contextlib.suppress(ValueError):
        number = int(value)
        if number >= least:
            return number
    raise argparse.ArgumentTypeError(f"{value!r} is no {what}: it is a whole number, {least} or more")
