"""Runs a notebook in a fresh kernel of the Python that runs this command, and not in one that a kernelspec names."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any

from ..base.text import clean, cut
from ..errors import FlaxMagicsError
from .stored import brief, code_cells, first_line, is_run, tags_of

STARTUP = 120
"""Seconds that a kernel may take to start."""
_OUTPUTS = 120
_NEEDED = ("nbclient", "nbformat", "jupyter_client", "ipykernel", "tqdm")


def check_installed() -> None:
    """Raises FlaxMagicsError where something is missing that runs notebooks."""
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        names = ", ".join(f"`{name}`" for name in missing)
        verb = "is" if len(missing) == 1 else "are"
        raise FlaxMagicsError(
            f"notebooks are run with nbclient and ipykernel, and {names} {verb} not installed.",
            write="pip install 'flax_magics[verify]'",
        )


async def executed(
    notebook: Any, folder: Path, timeout: int | None, on_cell: Callable[[], None]
) -> tuple[Any, int, str | None]:
    """What the code cells of a notebook give now.

    Args:
      notebook: as nbformat has it; not changed.
      folder: where its kernel works.
      timeout: seconds that one cell may take, None for as long as it likes.
      on_cell: told after each code cell.

    Returns:
      A notebook of the code cells with their outputs; how many of them are done; and why it went no further, None where
      it ran to its end.
    """
    from nbclient import NotebookClient
    from nbformat.v4 import new_code_cell, new_notebook

    cells = [new_code_cell(cell.source, metadata={"tags": tags_of(cell)}) for _, cell in code_cells(notebook)]
    done = 0

    def counted() -> None:
        nonlocal done
        done += 1
        on_cell()

    with tempfile.TemporaryFile() as said:
        manager = _manager()
        client = NotebookClient(
            new_notebook(cells=cells),
            km=manager,
            timeout=timeout,
            startup_timeout=STARTUP,
            iopub_timeout=_OUTPUTS,
            raise_on_iopub_timeout=True,
            resources={"metadata": {"path": str(folder)}},
        )
        gently = False
        try:
            failed = await _run(client, said, counted)
            gently = failed is None
        finally:
            await _stop(client, manager, gently)
    return client.nb, done, failed


def _manager() -> Any:
    from jupyter_client.kernelspec import KernelSpec, KernelSpecManager
    from jupyter_client.manager import AsyncKernelManager

    class ThisPython(KernelSpecManager):  # type: ignore[misc,unused-ignore]
        """Gives one kernel under every name: of this Python."""

        def get_kernel_spec(self, kernel_name: str) -> Any:
            command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
            return KernelSpec(argv=command, display_name="this Python", language="python")

    return AsyncKernelManager(kernel_name="python3", kernel_spec_manager=ThisPython())


async def _run(client: Any, said: IO[bytes], on_cell: Callable[[], None]) -> str | None:
    """Runs cell after cell; why it went no further, None where it ran to its end."""
    from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

    try:
        # What the kernel's process says would go through our table, and is wanted only if it dies.
        await client.async_start_new_kernel(stdout=said, stderr=said)
        await client.async_start_new_kernel_client()
    except Exception as error:  # whatever a kernel may fail with: its own last words tell more
        return f"its kernel did not start: {_last_words(said) or brief(str(error)) or type(error).__name__}"
    for index, cell in enumerate(client.nb.cells):
        where = f"cell {index + 1} ({cut(first_line(cell), 40)})"
        try:
            if is_run(cell):
                await client.async_execute_cell(cell, index, execution_count=client.code_cells_executed + 1)
        except CellExecutionError as error:
            return f"{where} fails: {cut(clean(error.ename), 60)}: {brief(error.evalue)}"
        except CellTimeoutError as error:
            if "IOPub" in str(error):
                return f"{where}: its outputs did not arrive"
            return f"{where} takes longer than {client.timeout} s: --timeout SECONDS gives it more"
        except DeadKernelError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():  # nbclient says so of a cell that was cancelled, too
                raise asyncio.CancelledError from None
            return " ".join(filter(None, [f"{where}: the kernel died.", _last_words(said)]))
        except Exception as error:  # a source that cannot be sent, an output that cannot be read
            return f"{where} cannot be run: {type(error).__name__}: {brief(str(error))}"
        on_cell()
    return None


async def _stop(client: Any, manager: Any, gently: bool) -> None:
    """Ends the kernel, and what it started."""
    group = getattr(manager.provisioner, "pgid", None)
    try:
        with contextlib.suppress(Exception):  # whatever it did not end by is ended below
            if manager.has_kernel:
                await manager.shutdown_kernel(now=not gently)
    finally:
        if group is not None and hasattr(os, "killpg") and group != os.getpgrp():
            with contextlib.suppress(OSError):
                os.killpg(group, signal.SIGKILL)
        with contextlib.suppress(Exception):  # sockets of a kernel that is no more
            if client.kc is not None:
                client.kc.stop_channels()


def _last_words(said: IO[bytes]) -> str:
    """The last line that the kernel's process wrote."""
    with contextlib.suppress(OSError, ValueError):
        size = said.seek(0, os.SEEK_END)
        said.seek(max(0, size - 4000))
        lines = said.read().decode("utf-8", errors="replace").splitlines()
        return next((cut(clean(line), 200) for line in reversed(lines) if line.strip()), "")
    return ""
