"""Laps: cells that are run and timed, in an IPython shell in a process of its own or in a kernel."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeAlias

ROOT = Path(__file__).parents[2]
Laps: TypeAlias = Iterable[tuple[str, list[str]]]
"""What is timed under which name (`cold/ours`), in order; what has an empty name is run and not timed."""
Seconds: TypeAlias = dict[str, list[float]]
"""Name → how long it took, each time."""


def timed(laps: Laps, run: Callable[[str], object], settle: Callable[[], float | None]) -> Seconds:
    """Runs all laps.

    Args:
      settle: waits for what the cells have put off, within the lap, and returns what they say they took, if they do.
    """
    seconds = defaultdict(list)
    for name, cells in laps:
        begin = time.perf_counter()
        for cell in cells:
            run(cell)
        spent = settle()
        seconds[name].append(time.perf_counter() - begin if spent is None else spent)
    seconds.pop("", None)
    return dict(seconds)


def in_shell(laps: Laps, cache: str | None = None) -> Seconds:
    """Runs laps in a fresh process, as a terminal's IPython without history on disk.

    Args:
      cache: the user's cache directory, an empty one unless given.

    Raises:
      RuntimeError: a cell failed.
    """
    with tempfile.TemporaryDirectory() as empty:
        # As a user's kernel has it: bytecode is kept, and no cache of JAX's own is set.
        unset = ("JAX_COMPILATION", "PYTHONDONTWRITEBYTECODE")
        environment = {name: value for name, value in os.environ.items() if not name.startswith(unset)}
        process = subprocess.run(
            [sys.executable, "-m", "tests.benchmarks.cells"],
            input=json.dumps(list(laps)),
            capture_output=True,
            text=True,
            cwd=ROOT,
            env=environment | {"XDG_CACHE_HOME": cache or empty},
        )
    if process.returncode:
        raise RuntimeError(f"a lap failed:\n{process.stdout}\n{process.stderr}")
    seconds: Seconds = json.loads(process.stdout.splitlines()[-1])
    return seconds


def _here(laps: Laps) -> Seconds:
    """Runs laps in a shell of this process."""
    from IPython.core.interactiveshell import InteractiveShell
    from traitlets.config import Config

    config = Config()
    config.HistoryManager.enabled = False
    shell: Any = InteractiveShell.instance(config=config)

    def settle() -> float | None:
        for thread in threading.enumerate():
            if thread.name == "flax_magics compile":
                thread.join()
        spent: float | None = shell.user_ns.pop("spent", None)
        return spent

    with contextlib.redirect_stdout(io.StringIO()):
        return timed(laps, lambda cell: shell.run_cell(cell, store_history=True).raise_error(), settle)


def in_kernel(laps: Laps) -> Seconds:
    """Runs laps in a fresh kernel, timed from outside: each cell ends when the kernel is idle again."""
    from jupyter_client.manager import KernelManager

    manager = KernelManager(kernel_name="python3")
    manager.start_kernel(cwd=str(ROOT))
    client: Any = manager.client()

    def run(cell: str) -> None:
        reply = client.execute_interactive(cell, timeout=120, output_hook=lambda message: None)
        if reply["content"]["status"] != "ok":
            raise RuntimeError(f"a lap failed:\n{reply['content']}")

    try:
        client.start_channels()
        client.wait_for_ready(timeout=120)
        return timed(laps, run, lambda: None)
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


if __name__ == "__main__":
    print(json.dumps(_here(json.load(sys.stdin))))
