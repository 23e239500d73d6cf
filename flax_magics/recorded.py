"""What a saved notebook keeps of its runs so that they can be verified later."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

from .environment import environment
from .keys import all_words
from .run import GONE
from .samples import sample_of

if TYPE_CHECKING:
    from .run import Run

ROWS = 1000
"""Runs of one counting line that are kept one by one."""


def recorded(run: Run) -> dict[str, Any]:
    """As JSON data: which run it was, its keys (their words in hex), digest and sample, and what its bits depend on."""
    return {
        "command": run.command,
        "model": run.model,
        "mode": run.mode,
        "weights": run.weights,
        "call": run.call,
        "output": run.shape,
        "seed": run.seed,
        "draw": run.draw,
        "draws": run.draws,
        "keys": all_words(run.keys),
        "digest": run.digest,
        **(sample_of(run.output) if run.output is not GONE else {}),
        "device": run.device,
        "started": run.started,
        "replayed": run.replayed,
        **(environment(run.device) if run.elsewhere is None else run.elsewhere),
    }


class Rows:
    """The runs of a loop, which share one counting line.

    A row holds what differs from the row before it. Beyond `ROWS` of them, runs are counted, and their keys and digests
    go into one digest for all: whether they agree can still be told, but not which of them does not.
    """

    def __init__(self) -> None:
        self._rows: list[dict[str, Any]] = []
        self._last: dict[str, Any] = {}
        self._further = 0
        self._keys = hashlib.sha256()
        self._digests = hashlib.sha256()

    def add(self, run: Run) -> None:
        """One more run, whose output is still there."""
        if len(self._rows) < ROWS:
            row = recorded(run)
            self._rows.append({name: value for name, value in row.items() if self._last.get(name, self) != value})
            self._last = row
        else:
            self._further += 1
            self._keys.update(json.dumps(all_words(run.keys), sort_keys=True).encode() + b"\0")
            self._digests.update(f"{run.digest}\0".encode())

    def to_json(self) -> dict[str, Any]:
        """`runs`, the rows in order; and `further`, None or how many more there were, with a digest of their keys and one
        of their digests.
        """
        further = {
            "runs": self._further,
            "keys": self._keys.hexdigest()[:16],
            "digest": self._digests.hexdigest()[:16],
        }
        return {"version": 1, "runs": list(self._rows), "further": further if self._further else None}
