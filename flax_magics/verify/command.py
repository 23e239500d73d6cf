"""The command line of `python -m flax_magics verify FILES…`, and its result as text in 80 columns and as JSON."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import math
import re
import shlex
import shutil
import signal
import sys
import time
from collections import ChainMap
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from msgspec import Struct
from msgspec.structs import asdict

from ..base import __version__
from ..base.text import DIGITS, clean, clean_lines, count, cut, fit, flow, plural, table, ulp, wrap
from ..errors import FlaxMagicsError, advice_lines
from .notebooks import check_installed, code_cells, executed, other_order, read, runs_of

if TYPE_CHECKING:
    from nbformat import NotebookNode

    from .compare import Outcome, Tolerance, Verdict


Status = Literal["agrees", "differs", "could not run", "not comparable", "nothing to verify"]
EXIT: dict[Status, int] = {
    # The worst first: the exit status of several notebooks is that of the worst.
    "could not run": 2,
    "differs": 1,
    "nothing to verify": 4,
    "not comparable": 3,
    "agrees": 0,
}
SHOWN = 10
"""How many differences of a notebook the text shows."""
_GIVEN = 1000


class Result(Struct, frozen=True):
    """The result for one notebook.

    Attributes:
      file: its path as it was given.
      verdicts: on each of its runs, as far as it ran.
      failed: why it could not be read, or did not run to its end; None where it did.
      seconds: how long it ran.
      tolerance: within which values may differ; None where every bit has to agree.
      order: how its cells had been run, if not from top to bottom: `cell 4 was run before cell 3`.
    """

    file: str
    verdicts: Sequence[Verdict] = ()
    failed: str | None = None
    seconds: float = 0.0
    tolerance: Tolerance | None = None
    order: str = ""

    @property
    def status(self) -> Status:
        """The result in one word or two: the worst that applies."""
        if self.failed is not None:
            return "could not run"
        if not self.verdicts:
            return "nothing to verify"
        outcomes = {verdict.outcome for verdict in self.verdicts}
        return "differs" if "differs" in outcomes else "not comparable" if "not comparable" in outcomes else "agrees"

    def runs(self, *outcomes: Outcome) -> int:
        """How many runs have one of these outcomes; without arguments, how many there are."""
        return sum(verdict.runs for verdict in self.verdicts if not outcomes or verdict.outcome in outcomes)

    @property
    def changed(self) -> dict[str, tuple[str, str]]:
        """Facts of the environment that differ from those stored with a run: name → stored and now."""
        return dict(ChainMap(*(verdict.changed for verdict in self.verdicts)))


def exit_status(results: Iterable[Result]) -> int:
    """The exit status of the worst result; without results that of nothing to verify."""
    statuses = {result.status for result in results} or {"nothing to verify"}
    return next(number for status, number in EXIT.items() if status in statuses)


def text(result: Result) -> str:
    """A line on the notebook, and beneath it a table of what differs."""
    head = f"{clean(result.file)}: "
    lines = wrap(head + _summary(result), rest="  ")
    other = [v for v in result.verdicts if v.outcome == "differs"] or [
        v for v in result.verdicts if v.outcome == "not comparable"
    ]
    if other:
        rows = [("cell", "first line", "draw", "what", "how far, in how many values"), *map(_row, other[:SHOWN])]
        lines += table(rows, indent="  ")
    if len(other) > SHOWN:
        lines.append(f"  … and {plural(sum(v.runs for v in other[SHOWN:]), 'run')} more")
    if result.changed:
        parts = [f"{clean(name)} {clean(was)} → {clean(now)}" for name, (was, now) in result.changed.items()]
        lines += flow(parts, "  other than stored  ", gap="   ")
    if result.order and result.status in ("differs", "could not run"):
        lines += wrap(f"its cells were not run from top to bottom: {result.order}", "  ")
    if result.status == "not comparable":
        lines.append("  the values that are stored can be compared")
        command = f"python -m flax_magics verify --rtol 1e-5 {shlex.quote(result.file)}"
        lines += [f"  {line}" for line in advice_lines(command)]
    return "\n".join(lines)


def _summary(result: Result) -> str:
    if result.failed is not None:
        differ = result.runs("differs")
        return f"could not run: {result.failed}" + (f" Before it, {plural(differ, 'run')} differ." if differ else "")
    if not result.verdicts:
        return "no flax_magics outputs: nothing to verify"
    runs, bits, within = result.runs(), result.runs("agrees"), result.runs("within")
    apart, differ = result.runs("not comparable"), result.runs("differs")
    if bits == runs:
        return f"agrees: {plural(runs, 'run')}, keys and every bit"
    parts = [f"keys and every bit in {count(bits)}"] if bits else []
    if within and result.tolerance is not None:
        atol = f", atol {result.tolerance.atol:g}" if result.tolerance.atol else ""
        distances = [
            verdict.distance for verdict in result.verdicts if verdict.outcome == "within" and verdict.distance
        ]
        compared, of = sum(distance.compared for distance in distances), sum(distance.of for distance in distances)
        values = f"{count(compared)} of their {plural(of, 'value')}"
        parts.append(f"keys and values within rtol {result.tolerance.rtol:g}{atol} in {count(within)} (by {values})")
    if apart:
        parts.append(f"keys alone in {count(apart)}")
    head = f"differs: {count(differ)} of {plural(runs, 'run')}" if differ else f"{result.status}: {plural(runs, 'run')}"
    return ", ".join([head, *parts])


def _row(verdict: Verdict) -> tuple[str, ...]:
    line = cut(clean(verdict.line), 24)
    return (str(verdict.cell), line, _draw(verdict), verdict.what, how_far(verdict))


def _draw(verdict: Verdict) -> str:
    if verdict.what == "runs":
        return ""
    if verdict.run is None:
        return "later ones"
    first, many = verdict.run.draw, verdict.run.samples
    number = f"{first}–{first + many - 1}" if many else str(first)
    return cut(number if verdict.run.seed == 0 else f"{verdict.run.seed}:{number}", 20)


def how_far(verdict: Verdict) -> str:
    """`1 ulp, 5.96e-08 in 3 of 36`; for keys, shapes and numbers of runs the stored and the new one."""
    distance = verdict.distance
    if distance is None:
        stored_text, new_text = cut(clean(verdict.stored), 60), cut(clean(verdict.now), 60)
        if verdict.what == "keys" and stored_text.partition(" ")[0] == new_text.partition(" ")[0]:
            new_text = new_text.partition(" ")[2]  # without repeating the stream's name
        if verdict.what != "digest":
            return f"{stored_text} → {new_text}"
        # Where there was no digest, words stand in its place.
        stored_text, new_text = (
            re.sub("^[0-9a-f]{16}$", lambda all_: all_[0][:DIGITS], text) for text in (stored_text, new_text)
        )
        return f"{stored_text} → {new_text} (no values stored)"
    stored = f"{count(distance.compared)} stored, of " if distance.compared < distance.of else ""
    among = f"{stored}{count(distance.of)}"
    if not distance.differ:
        return f"in none of {among}"
    parts = [ulp(distance.ulp)] if distance.ulp is not None else []
    parts.append("NaN" if math.isnan(distance.absolute) else f"{distance.absolute:.3g}")
    where = f" ({cut(clean(distance.array), 40)})" if distance.array else ""
    return f"{', '.join(parts)}{where} in {count(distance.differ)} of {among}"


def to_json(results: Sequence[Result]) -> dict[str, object]:
    """All results as JSON data; numbers that are not finite are null."""
    return {"version": 1, "status": exit_status(results), "notebooks": list(map(_notebook, results))}


def _notebook(result: Result) -> dict[str, object]:
    return {
        "file": result.file,
        "status": result.status,
        "message": result.failed,
        "order": result.order or None,
        "seconds": round(result.seconds, 3),
        "runs": {
            "all": result.runs(),
            "agree": result.runs("agrees"),
            "within": result.runs("within"),
            "not_comparable": result.runs("not comparable"),
            "differ": result.runs("differs"),
        },
        "environment": {name: {"stored": was, "now": now} for name, (was, now) in result.changed.items()},
        "differences": [_difference(v) for v in result.verdicts if v.outcome != "agrees"][:_GIVEN],
    }


def _difference(verdict: Verdict) -> dict[str, object]:
    run, distance = verdict.run, verdict.distance
    values = None
    if distance is not None:
        values = asdict(distance) | {"absolute": distance.absolute if math.isfinite(distance.absolute) else None}
    return {
        **{name: getattr(verdict, name) for name in ("cell", "line", "outcome", "what")},
        "command": run and run.command,
        "model": run and (run.model or ""),
        **{name: getattr(run, name, None) for name in ("call", "seed", "draw", "samples")},
        "stored": verdict.stored,
        "now": verdict.now,
        "values": values,
    }


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
