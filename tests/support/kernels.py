"""A notebook with a living kernel, driven by nbclient cell by cell."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

RUN_JSON = "application/vnd.flax-magics.run+json"

RENEW = """
import os, sys
if "flax_magics" in get_ipython().extension_manager.loaded:
  get_ipython().run_line_magic("unload_ext", "flax_magics")
if "flax_magics._session" in sys.modules:
  sys.modules["flax_magics._session"]._current = None
os.chdir({folder!r})
get_ipython().reset()
"""


@dataclass(frozen=True)
class Cell:
    """A cell that was executed."""

    outputs: list[Any]

    @property
    def printed(self) -> str:
        """What it wrote to standard output and standard error."""
        return "".join(output.text for output in self.outputs if output.output_type == "stream")

    @property
    def result(self) -> str:
        """`Out`, as text; empty if there is none."""
        return "".join(o.data["text/plain"] for o in self.outputs if o.output_type == "execute_result")

    @property
    def displays(self) -> list[dict[str, Any]]:
        """The MIME bundles that it displayed, blank ones left out."""
        shown = [dict(output.data) for output in self.outputs if output.output_type == "display_data"]
        return [data for data in shown if data.get("text/plain") or len(data) > 1]

    @property
    def report(self) -> str:
        """The one thing that it displayed, as text."""
        (data,) = self.displays
        return str(data["text/plain"])

    @property
    def run(self) -> dict[str, Any]:
        """The one Run that it reported, as JSON data."""
        (run,) = (data[RUN_JSON] for data in self.displays if RUN_JSON in data)
        return dict(run)


class Notebook:
    """Runs cells; a cell that fails raises nbclient's CellExecutionError, as Run All would stop."""

    def __init__(self, client: NotebookClient) -> None:
        self.client = client

    @classmethod
    @contextlib.contextmanager
    def opened(cls, folder: Path) -> Iterator[Notebook]:
        """A new notebook in `folder`, its kernel running until the block ends."""
        client = NotebookClient(
            nbformat.v4.new_notebook(),
            kernel_name="python3",
            timeout=180,
            iopub_timeout=120,  # a busy machine is slow to hand on what a cell printed
            shutdown_kernel="immediate",
            resources={"metadata": {"path": str(folder)}},
        )
        with client.setup_kernel():
            yield cls(client)

    def renew(self, folder: Path) -> None:
        """As a new notebook in `folder`, but that its kernel has imported and compiled what it has."""
        node = nbformat.v4.new_code_cell(RENEW.format(folder=os.fspath(folder)))
        self.client.nb.cells[:] = [node]
        self.client.execute_cell(node, 0, store_history=False)
        self.client.nb.cells.clear()

    def execute(self, node: Any) -> Cell:
        """Adds a code cell and executes it, unless a tag of its says that it is skipped."""
        self.client.nb.cells.append(node)
        for _ in range(20):
            self.client.execute_cell(node, len(self.client.nb.cells) - 1)
            if node.execution_count is not None or "skip-execution" in node.metadata.get("tags", []):
                return Cell(node.outputs)
            time.sleep(0.1)  # just after an error, a kernel turns away what comes
        raise AssertionError(f"the kernel did not run the cell:\n{node.source}")

    def run(self, source: str) -> Cell:
        """Adds a cell and executes it."""
        return self.execute(nbformat.v4.new_code_cell(source.strip("\n")))

    def run_all(self, sources: Iterable[str]) -> list[Cell]:
        """Cell after cell, until one fails."""
        return [self.run(source) for source in sources]

    def fails(self, source: str) -> Cell:
        """Runs a cell that must fail, and gives it with its one error output."""
        try:
            self.run(source)
        except CellExecutionError:
            return Cell(self.client.nb.cells[-1].outputs)
        raise AssertionError(f"the cell did not fail:\n{source}")


class Kernels:
    """Kernels that tests use one after another: to start one, and to import JAX and Flax in it, takes seconds."""

    def __init__(self) -> None:
        self._all = contextlib.ExitStack()
        self._idle: list[Notebook] = []

    @contextlib.contextmanager
    def lent(self, folder: Path) -> Iterator[Notebook]:
        """A notebook in `folder`, as if it were new."""
        notebook = self._idle.pop() if self._idle else self._all.enter_context(Notebook.opened(folder))
        notebook.renew(folder)
        yield notebook
        self._idle.append(notebook)

    def close(self) -> None:
        self._all.close()
