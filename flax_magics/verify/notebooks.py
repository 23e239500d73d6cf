"""The runs in a notebook's outputs, and executing its cells in a fresh kernel.

Whatever a file contains is validated, field by field, before it is used. The kernel uses the Python that runs this
command, not one that a kernelspec names.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import os
import signal
import stat
import sys
import tempfile
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, Literal, TypeVar

import msgspec
from msgspec import Struct

from ..base.files import RUN_JSON, RUNS_JSON, Damaged, convert, open_without_waiting
from ..base.text import clean, cut
from ..errors import FlaxMagicsError

if TYPE_CHECKING:
    from jupyter_client.manager import AsyncKernelManager
    from nbclient import NotebookClient
    from nbformat import NotebookNode

LARGEST = 256 << 20
"""Bytes of the largest notebook that is read."""

_LEAVES = 1000
_ROWS = 100_000
_VERSIONS = ("jax", "jaxlib", "flax")
_ARRAY = r"\A[a-z][a-z0-9_]{0,30}\[(?:[0-9]{1,18}(?:,[0-9]{1,18}){0,99})?\]\Z"
STARTUP = 120
"""Seconds in which a kernel has to start."""
_OUTPUTS = 120
_NEEDED = ("nbclient", "nbformat", "jupyter_client", "ipykernel", "tqdm")
T = TypeVar("T")
Number = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]


class Leaf(msgspec.Struct, frozen=True):
    """One array of an output: its path, its dtype and shape (`float32[3,4]`), and how many of its values are stored."""

    path: str
    array: Annotated[str, msgspec.Meta(pattern=_ARRAY)]
    values: Number

    def __post_init__(self) -> None:
        if self.values > min(self.size, _LEAVES):
            raise ValueError("`values` is more than there can be")

    @property
    def dtype(self) -> str:
        """The dtype's name, such as `float32`."""
        return self.array.partition("[")[0]

    @property
    def size(self) -> int:
        """How many elements the array has."""
        shape = self.array.partition("[")[2].rstrip("]")
        return math.prod(int(size) for size in shape.split(",")) if shape else 1


class RecordedCurve(msgspec.Struct, frozen=True):
    """The losses of a training, as `Curve.to_json` wrote them; null for one that is not finite.

    Attributes:
      every: only the losses of every so many steps are there.
      stopped: why it ended before its last step; empty where it did not.
    """

    losses: list[float | None]
    every: Number
    stopped: str


class Recorded(msgspec.Struct, frozen=True):
    """One run, as `Run.to_json` wrote it. Unknown fields, of a later version, are ignored.

    Attributes:
      keys: stream → the words of its key in hex.
      leaves, bits: the stored values of the output; None where the run has none.
      versions, device, device_kind, processor, threads: see `environment`; `UNSET` where it was not stored.
      trained: for a training, its losses.
    """

    version: Literal[1]
    command: str
    call: str
    output: str
    seed: int
    draw: Number
    keys: dict[str, str]
    started: float
    device: str
    model: str | None = None
    samples: Number | None = None
    digest: str | None = None
    leaves: Annotated[tuple[Leaf, ...], msgspec.Meta(max_length=_LEAVES)] | None = None
    bits: bytes = b""
    trained: RecordedCurve | None = None
    versions: dict[str, str] = {}
    device_kind: str | msgspec.UnsetType | None = msgspec.UNSET
    processor: str | msgspec.UnsetType | None = msgspec.UNSET
    threads: Number | msgspec.UnsetType | None = msgspec.UNSET

    def __post_init__(self) -> None:
        # A notebook may come from anybody: absurd numbers must not cost time or memory.
        if self.seed.bit_length() > 128:
            raise ValueError("`seed` is too large")
        if not math.isfinite(self.started):
            raise ValueError("`started` is not finite")

    @property
    def environment(self) -> dict[str, str | None]:
        """What its bits depend on: name → value; None where a fact does not apply, left out where it was not stored."""
        facts = {name: self.versions[name] for name in _VERSIONS if name in self.versions}
        more = {name: getattr(self, name) for name in ("device", "device_kind", "processor", "threads")}
        stored = {name: value for name, value in more.items() if value is not msgspec.UNSET}
        return facts | {name: None if value is None else str(value) for name, value in stored.items()}


class Further(msgspec.Struct, frozen=True):
    """Runs of a loop that are not stored one by one: how many, one digest of their keys, one of their digests."""

    runs: Annotated[int, msgspec.Meta(ge=1, le=(1 << 63) - 1)]
    keys: str
    digest: str


class RecordedLoop(msgspec.Struct, frozen=True):
    """The runs of a loop, as `Rows.to_json` wrote them: each row has only what differs from the row before."""

    version: Literal[1]
    runs: list[dict[str, object]]
    further: Further | None = None


class Cell(Struct, frozen=True):
    """The runs of one cell, in the order in which they were made.

    Attributes:
      number: of the cell among the code cells, from 1.
      line: its first line that is not empty.
    """

    number: int
    line: str
    runs: tuple[Recorded, ...] = ()
    further: Further | None = None

    @property
    def count(self) -> int:
        """How many runs it has, those of `further` included."""
        return len(self.runs) + (self.further.runs if self.further else 0)


def read(path: Path) -> NotebookNode:
    """Reads a notebook into nbformat's type. The file is only read.

    Raises:
      FlaxMagicsError: it cannot be read, or is no notebook.
    """
    import nbformat
    from nbformat.v4.nbjson import JSONReader

    try:
        with open_without_waiting(path) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise FlaxMagicsError("it is no file.")
            if status.st_size > LARGEST:
                raise FlaxMagicsError(f"it has {status.st_size:,} bytes, and {LARGEST:,} is the most that is read.")
            # One byte more than allowed: the size may have grown since.
            data = file.read(LARGEST + 1)
    except OSError as error:
        raise FlaxMagicsError(f"it cannot be read: {error.strerror or type(error).__name__}.") from None
    try:
        content = json.loads(data.decode("utf-8"))
        version = content.get("nbformat") if isinstance(content, dict) else None
        if version != 4 or isinstance(version, bool):
            raise FlaxMagicsError("it is no notebook of format 4, which Jupyter writes: open it there and save it.")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old notebooks have cells without ids
            nbformat.validate(nbformat.from_dict(content))
            notebook: NotebookNode = JSONReader().to_notebook(content)
    except RecursionError:
        raise FlaxMagicsError("it is no notebook: it is nested too deeply.") from None
    except nbformat.ValidationError as error:
        raise FlaxMagicsError(f"it is no valid notebook: {brief(str(error))}") from None
    except ValueError as error:  # not UTF-8, not JSON, or an integer with thousands of digits
        raise FlaxMagicsError(f"it is no notebook: {brief(str(error))}") from None
    return notebook


def brief(text: str) -> str:
    """The first line of a message that is not empty, cleaned and cut for display."""
    lines = [clean(line[:2000]) for line in text[:20_000].splitlines()]
    return cut(next(filter(None, lines), ""), 200)


def code_cells(notebook: NotebookNode) -> list[tuple[int, NotebookNode]]:
    """The code cells with their numbers, from 1."""
    return list(enumerate((cell for cell in notebook.cells if cell.cell_type == "code"), 1))


def is_run(cell: NotebookNode) -> bool:
    """Whether a code cell is to be run: not empty, and without the tag skip-execution."""
    return bool(cell.source.strip()) and "skip-execution" not in tags_of(cell)


def tags_of(cell: NotebookNode) -> list[str]:
    """The tags in a cell's metadata; none where these are malformed."""
    tags = cell.metadata.get("tags")
    return [tag for tag in tags if isinstance(tag, str)] if isinstance(tags, list) else []


def first_line(cell: NotebookNode) -> str:
    """The cell's first line that is not empty."""
    return next((clean(line[:1000]) for line in cell.source.splitlines() if line.strip()), "")


def other_order(notebook: NotebookNode) -> str:
    """`cell 4 was run before cell 3`, for the first two cells in another order; empty if run from top to bottom."""
    latest_count = latest_cell = 0
    for number, cell in code_cells(notebook):
        count = cell.execution_count
        if count is None or not is_run(cell):
            continue
        if count < latest_count:
            return f"cell {number} was run before cell {latest_cell}"
        latest_count, latest_cell = count, number
    return ""


def runs_of(notebook: NotebookNode) -> list[Cell]:
    """The runs in the outputs of each code cell; cells that are not to be run have none.

    Raises:
      FlaxMagicsError: an output of our MIME types is not what we write.
    """
    return [runs_of_cell(number, cell) for number, cell in code_cells(notebook)]


def runs_of_cell(number: int, cell: NotebookNode) -> Cell:
    """The runs in the outputs of one code cell. Raises FlaxMagicsError as `runs_of` does."""
    runs: list[Recorded] = []
    further: Further | None = None
    try:
        for output in cell.outputs if is_run(cell) else ():
            data = output.get("data", {})
            if RUN_JSON in data:
                runs.append(_of_this_version(data[RUN_JSON], Recorded, "the run"))
            if RUNS_JSON in data:
                loop = _of_this_version(data[RUNS_JSON], RecordedLoop, "the loop")
                if len(loop.runs) > _ROWS:
                    raise Damaged(f"the loop has more than {_ROWS} rows")
                if loop.further is not None and further is not None:
                    raise Damaged("there are two loops of more runs than are kept")
                row: dict[str, object] = {"version": 1}
                # Each row has only what changed since the row before.
                for changes in loop.runs:
                    row = {**row, **changes}
                    runs.append(_of_this_version(row, Recorded, "the run"))
                further = loop.further or further
    except Damaged as error:
        raise unreadable(number, error) from None
    # Runs with news have a report each, all others share one: only sorted by time they are in order.
    return Cell(number, first_line(cell), tuple(sorted(runs, key=lambda run: run.started)), further)


def unreadable(number: int, error: Damaged) -> FlaxMagicsError:
    """`error` as the message about a cell whose output cannot be read."""
    return FlaxMagicsError(f"cell {number} holds an output of flax_magics that cannot be read: {clean(str(error))}.")


def _of_this_version(data: object, kind: type[T], what: str) -> T:
    version = data.get("version") if isinstance(data, dict) else None
    if type(version) is int and version != 1:
        raise Damaged(
            f"{what} was written by another version of flax_magics (its format is {cut(str(version), 20)}, not 1)"
        )
    return convert(data, kind, what)


def check_installed() -> None:
    """Raises FlaxMagicsError where a package is missing that running notebooks takes."""
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        names = ", ".join(f"`{name}`" for name in missing)
        verb = "is" if len(missing) == 1 else "are"
        raise FlaxMagicsError(
            f"notebooks are run with nbclient and ipykernel, and {names} {verb} not installed.",
            write="pip install 'flax_magics[verify]'",
        )


async def executed(
    notebook: NotebookNode, folder: Path, timeout: int | None, on_cell: Callable[[], object]
) -> tuple[NotebookNode, int, str | None]:
    """Executes the code cells of a notebook in a fresh kernel.

    Args:
      notebook: in nbformat's type; not changed.
      folder: the kernel's working folder.
      timeout: seconds that one cell may take, None without limit.
      on_cell: called after each code cell.

    Returns:
      A notebook of the code cells with their new outputs; how many of them are done; and why it stopped, None where it
      ran to its end.
    """
    from nbclient import NotebookClient
    from nbformat.v4 import new_code_cell, new_notebook

    cells = [new_code_cell(cell.source, metadata={"tags": tags_of(cell)}) for _, cell in code_cells(notebook)]
    with tempfile.TemporaryFile() as said:
        manager = _manager()
        client = NotebookClient(
            new_notebook(cells=cells),
            km=manager,
            timeout=timeout,
            startup_timeout=STARTUP,
            iopub_timeout=_OUTPUTS,
            # Outputs that are lost would look like runs that were not made.
            raise_on_iopub_timeout=True,
            resources={"metadata": {"path": str(folder)}},
        )
        gently = False
        try:
            cells_run, failed = await _run(client, said, on_cell)
            gently = failed is None
        finally:
            await _stop(client, manager, gently)
    return client.nb, cells_run, failed


def _manager() -> AsyncKernelManager:
    from jupyter_client.kernelspec import KernelSpec, KernelSpecManager
    from jupyter_client.manager import AsyncKernelManager

    class ThisPython(KernelSpecManager):  # type: ignore[misc,unused-ignore]
        """Returns the kernel of this Python, whatever name a notebook asks for."""

        def get_kernel_spec(self, kernel_name: str) -> KernelSpec:
            command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
            return KernelSpec(argv=command, display_name="this Python", language="python")

    return AsyncKernelManager(kernel_name="python3", kernel_spec_manager=ThisPython())


async def _run(client: NotebookClient, said: IO[bytes], on_cell: Callable[[], object]) -> tuple[int, str | None]:
    """Runs the cells in order. Returns how many are done, and why it stopped, None where it ran to its end."""
    try:
        # The process's own output would get into our table; it is only of interest if the kernel dies.
        await client.async_start_new_kernel(stdout=said, stderr=said)
        await client.async_start_new_kernel_client()
    except Exception as error:  # the kernel's last words tell more than what nbclient raises
        return 0, f"its kernel did not start: {_last_words(said) or brief(str(error)) or type(error).__name__}"
    for index, cell in enumerate(client.nb.cells):
        why = await _run_cell(client, said, index, cell) if is_run(cell) else ""
        if why:
            return index, f"cell {index + 1} ({cut(first_line(cell), 40)}){why}"
        on_cell()
    return len(client.nb.cells), None


async def _run_cell(client: NotebookClient, said: IO[bytes], index: int, cell: NotebookNode) -> str:
    """Runs one cell. Returns why it did not end, as the text that follows the cell's name; empty where it did."""
    from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

    try:
        await client.async_execute_cell(cell, index, execution_count=client.code_cells_executed + 1)
    except CellExecutionError as error:
        return f" fails: {cut(clean(error.ename), 60)}: {brief(error.evalue)}"
    except CellTimeoutError as error:
        if "IOPub" in str(error):
            return ": its outputs did not arrive"
        return f" takes longer than {client.timeout} s: --timeout SECONDS gives it more"
    except DeadKernelError:
        task = asyncio.current_task()
        if task is not None and task.cancelling():  # nbclient raises the same for a cell that was cancelled
            raise asyncio.CancelledError from None
        return f": the kernel died. {_last_words(said)}".rstrip()
    except Exception as error:  # source that cannot be sent, or output that cannot be parsed
        return f" cannot be run: {type(error).__name__}: {brief(str(error))}"
    return ""


async def _stop(client: NotebookClient, manager: AsyncKernelManager, gently: bool) -> None:
    """Ends the kernel and the processes that it started."""
    group = getattr(manager.provisioner, "pgid", None)
    try:
        with contextlib.suppress(Exception):  # what the shutdown leaves behind is killed below
            if manager.has_kernel:
                await manager.shutdown_kernel(now=not gently)
    finally:
        # Never our own group, which has this process in it.
        if group is not None and hasattr(os, "killpg") and group != os.getpgrp():
            with contextlib.suppress(OSError):
                os.killpg(group, signal.SIGKILL)
        with contextlib.suppress(Exception):  # the sockets may be those of a dead kernel
            if client.kc is not None:
                client.kc.stop_channels()


def _last_words(said: IO[bytes]) -> str:
    """The last line that the kernel's process wrote; empty if it wrote none."""
    with contextlib.suppress(OSError, ValueError):
        said.seek(max(0, said.seek(0, os.SEEK_END) - 4000))
        lines = said.read().decode("utf-8", errors="replace").splitlines()
        return next((cut(clean(line), 200) for line in reversed(lines) if line.strip()), "")
    return ""
