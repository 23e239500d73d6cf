"""Cells measured in fresh processes, by hand and ours in turn."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .table import Measured

ROOT = Path(__file__).parents[2]


def seconds_of(work: dict[str, Any], cache: str | None = None) -> list[float]:
    """What `child.py` measures for `work`; `cache` is the user's cache directory, an empty one unless given."""
    with tempfile.TemporaryDirectory() as empty:
        # As a user's kernel has it: bytecode is kept, and no cache of JAX's own is set.
        unset = ("JAX_COMPILATION", "PYTHONDONTWRITEBYTECODE")
        environment = {name: value for name, value in os.environ.items() if not name.startswith(unset)}
        environment |= {"XDG_CACHE_HOME": cache or empty}
        done = subprocess.run(
            [sys.executable, "-m", "tests.benchmarks.child"],
            input=json.dumps(work),
            capture_output=True,
            text=True,
            cwd=ROOT,
            env=environment,
        )
    if done.returncode:
        raise RuntimeError(f"the lap failed with {done.returncode}:\n{done.stdout}\n{done.stderr}")
    return [float(value) for value in json.loads(done.stdout.splitlines()[-1])]


def in_turn(by_hand: Callable[[], Sequence[float]], ours: Callable[[], Sequence[float]], rounds: int) -> Measured:
    """Both measured `rounds` times, the order changing from round to round. Each may give several values at once."""
    hand: list[float] = []
    own: list[float] = []
    for i in range(rounds):
        for which, values in [(by_hand, hand), (ours, own)][:: 1 if i % 2 == 0 else -1]:
            values.extend(which())
    return Measured(own, hand)
