"""Flax's own examples and documentation, from the source distribution of the installed version on PyPI."""

from __future__ import annotations

import functools
import importlib.metadata
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path


class NotFetched(Exception):
    """Why there is no source distribution."""


@functools.cache
def root() -> Path:
    """The unpacked source distribution. Fetched once, and kept outside the repository.

    `FLAX_MAGICS_ZOO` names another folder to keep it in.

    Raises:
      NotFetched: pip cannot fetch it, with what pip said.
    """
    version = importlib.metadata.version("flax")
    kept = Path(os.environ.get("FLAX_MAGICS_ZOO") or Path(tempfile.gettempdir()) / "flax_magics-zoo")
    folder = kept / f"flax-{version}"
    if (folder / "examples").is_dir():
        return folder
    kept.mkdir(parents=True, exist_ok=True)
    # In a folder of its own first: what is interrupted leaves nothing behind that looks whole.
    with tempfile.TemporaryDirectory(dir=kept) as temporary:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "flax"]
        try:
            subprocess.run(
                [*command, "--dest", temporary, f"flax=={version}"],
                check=True, capture_output=True, text=True, timeout=180,
            )  # fmt: skip
        except subprocess.CalledProcessError as error:
            last = [line for line in error.stderr.splitlines() if line.strip()][-1:] or ["no message"]
            raise NotFetched(f"pip could not fetch the sdist of flax {version}: {last[0]}") from None
        except (subprocess.TimeoutExpired, OSError) as error:
            raise NotFetched(f"pip could not fetch the sdist of flax {version}: {type(error).__name__}") from None
        archives = list(Path(temporary).glob("flax-*.tar.gz"))
        if not archives:
            raise NotFetched(f"PyPI gave no sdist of flax {version}")
        with tarfile.open(archives[0]) as archive:
            archive.extractall(temporary, filter="data")
        unpacked = next(path for path in Path(temporary).iterdir() if path.is_dir())
        try:
            unpacked.rename(folder)
        except OSError:  # another run of the tests was faster
            if not folder.is_dir():
                raise
    return folder


def code_cells(path: str) -> list[str]:
    """The code cells of a notebook of the sdist, as they are."""
    notebook = json.loads((root() / path).read_text(encoding="utf-8"))
    return ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
