"""Transcripts of notebooks: a file of cells, and under each what it showed, told apart from a change by a test.

`python -m tests.support.golden` runs every cell of tests/golden again and writes what it shows now; `git diff` is then what
has changed for a user. A new cell is written into a file under a line `#%% in`, and what it shows comes by itself.

What differs from machine to machine and from version to version is taken out: values, digests (numbered, so that equal
ones stay equal), dates, memory as XLA counts it, versions, folders. Seconds are those of a clock that moves by 1/16384 at
each look. Keys stay: they are the same everywhere.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent.parent / "golden"
UPDATE = "FLAX_MAGICS_UPDATE_GOLDEN"
MARK = "#%% "
IN = MARK + "in"


def cells_of(transcript: str) -> list[str]:
    """The cells of a transcript, without what they showed."""
    blocks = re.split(rf"^{MARK}(.*)\n", transcript, flags=re.MULTILINE)[1:]
    return [text.strip("\n") for mark, text in zip(blocks[::2], blocks[1::2], strict=True) if mark == "in"]


def rerun(transcript: str, shell: Any) -> str:
    """The transcript as it comes out now, from cells that run one after the other in a fresh `shell`."""
    plain, parts = Plain(), []
    for cell in cells_of(transcript):
        parts.append(f"{IN}\n{cell}\n")
        for kind, text in run(cell, shell):
            lines = "".join(f"  {line}".rstrip() + "\n" for line in plain(text).splitlines())
            parts.append(f"{MARK}{kind}\n{lines}")
    return "\n".join(parts)


def run(cell: str, shell: Any) -> Iterator[tuple[str, str]]:
    """Runs a cell as a notebook does, and gives what it showed: of what kind each is, and its text.

    A cell that fails must leave the session as it was.
    """
    from IPython.utils.capture import capture_output

    from flax_magics import session

    state = session()._state
    with capture_output() as captured:
        result = shell.run_cell(cell, store_history=True)
    error = result.error_before_exec or result.error_in_exec
    if error is not None:
        assert session()._state is state, cell
        yield "error", error_text(error)
    elif captured.stdout.strip() or captured.stderr.strip():
        yield "printed", captured.stdout + captured.stderr
    for shown in captured.outputs:
        for kind, data in sorted(shown.data.items(), key=lambda pair: pair[0] != "text/plain"):
            yield kind, text_of(kind, data)


def error_text(error: BaseException) -> str:
    """Type and message. Of others' errors the first line: the rest is theirs, and another in each version."""
    from flax_magics import FlaxMagicsError

    text = f"{type(error).__name__}: {error}"
    return text if isinstance(error, FlaxMagicsError) else text.splitlines()[0]


HEX = "[0-9a-f]{8}"
ELSEWHERE = (
    "bits",
    "cost",
    "device_kind",
    "peak",
    "processor",
    "spread",
    "started",
    "temporaries",
    "code",
    "threads",
    "versions",
)
"""Fields of a run's JSON that are others on another machine or with other versions."""


def text_of(kind: str, data: Any) -> str:
    """Data of a MIME type as lines that can be compared by eye; keys in two words, which tells them from digests."""
    if kind.endswith("json"):
        data = _without(json.loads(data) if isinstance(data, str) else data)
        rows = data.items() if isinstance(data, dict) else enumerate(data)
        lines = [f"{name}: {json.dumps(value, ensure_ascii=False)}" for name, value in rows]
        return "\n".join(re.sub(rf"({HEX})({HEX})", r"\1 \2", line) if "keys" in line else line for line in lines)
    if kind == "text/html":
        data = re.sub(r"<style>.*?</style>", "<style>…</style>", data, flags=re.DOTALL)
        data = re.sub(r'<div class="fm-curve fm-strip">.*?</div>\s*</div>\n', "", data, flags=re.DOTALL)  # real times
        rows = re.sub(r"(?=<(?:div|table|caption|thead|tbody|tr|details|summary|pre|ul|li|p)\b)", "\n", data)
        return re.sub(r"\n\s*(?=\n)", "", rows).strip("\n")
    return str(data)


def _without(data: Any) -> Any:
    if isinstance(data, dict):
        return {name: _without(value) for name, value in sorted(data.items()) if name not in ELSEWHERE}
    if isinstance(data, float):
        return float(f"{round(data, 6) + 0.0:.3g}")  # the last bits are others on each version and processor
    return [_without(value) for value in data] if isinstance(data, list) else data


PLAIN = (
    (r"\b\d{4}-\d\d-\d\d\b", "yyyy-mm-dd"),
    (r"\b\d\d:\d\d:\d\d\b", "hh:mm:ss"),
    (r"\b(flax_magics|jax|jaxlib|flax|Python|IPython|numpy) \d+(\.\d+)+[\w.]*", r"\1 <version>"),
    (r"\b(?:cuda|rocm|gpu|tpu):(?=\d)", "cpu:"),
    (r"\b[\d.]+ (?:[kKMG]B|B/s)\b", "<bytes>"),
    (r"\b(temporaries|code)( |</th>.*?>)[\d.]+ [KMG]?B\b", r"\1\2<bytes>"),
    (r"(arrays alive in this process)( +|</th>.*?>)[\d.]+ [KMG]?B\b", r"\1\2<bytes>"),
)


class Plain:
    """Takes out of a text what is not the same everywhere. One for a transcript: it numbers the digests of it."""

    def __init__(self) -> None:
        # By their first six digits, which are all that a table shows.
        self._digests: dict[str, str] = {}

    def __call__(self, text: str) -> str:
        for pattern, replacement in PLAIN:
            text = re.sub(pattern, replacement, text)
        return re.sub(rf"(?<![\w.#])(?:({HEX}){{2}}|[0-9a-f]{{6}})(?![\w.])", self._number, text)

    def _number(self, digest: re.Match[str]) -> str:
        """A digest's number, as long as the digest: in full, or as far as it is shown beside others."""
        number = self._digests.setdefault(digest[0][:6], str(len(self._digests) + 1))
        return "digest"[: len(digest[0]) - 3] + number.zfill(max(len(digest[0]) - 6, 3))


def clock() -> Callable[[], float]:
    """A clock that moves by 1/16384 of a second at each look, which is exact."""
    looks = itertools.count()
    return lambda: next(looks) / 16384


if __name__ == "__main__":
    tests = FOLDER.parent / "test_golden.py"
    command = [sys.executable, "-m", "pytest", "-q", str(tests), *sys.argv[1:]]
    sys.exit(subprocess.run(command, env={**os.environ, UPDATE: "1"}, check=False).returncode)
