"""Pictures of the examples in JupyterLab, with the outputs that they are committed with.

`python -m tests.support.pictures` takes those of the README, a report in the light and in the dark theme;
`python -m tests.support.pictures FOLDER` also takes one of each whole example in both, into that folder.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from .lab import MISSING, cell, choose_theme, opened, serving

EXAMPLES = Path(__file__).parents[2] / "examples"
REPORT = "y_train = "
"""The cell of `the_sharp_bits.ipynb` whose report stands in the README."""
WIDTH = 800
PANEL = "document.querySelector('.jp-WindowedPanel-outer')"
WHOLE = f"n => {PANEL}.scrollHeight"


def take(address: str, name: str, folder: Path | None) -> None:
    """The pictures of one example."""
    with opened(address, width=WIDTH, height=1000, scale=2) as page:
        page.keyboard.press("Control+B")  # the side bar goes
        page.wait_for_timeout(1000)
        for theme in ("light", "dark"):
            choose_theme(page, theme)
            page.wait_for_timeout(1000)
            if name == "the_sharp_bits.ipynb":
                taken = cell(page, REPORT)
                taken.scroll_into_view_if_needed()
                taken.screenshot(path=EXAMPLES / f"report-{theme}.png")
            if folder is not None:
                page.set_viewport_size({"width": WIDTH, "height": 200 + page.evaluate(WHOLE)})
                page.evaluate(f"n => {PANEL}.scrollTop = 0")
                page.wait_for_timeout(1000)
                page.screenshot(path=folder / f"{Path(name).stem}-{theme}.png")


def main(folder: Path | None) -> None:
    """Takes them all; those of the whole examples into `folder`."""
    if MISSING:
        sys.exit(f"pictures take {', '.join(MISSING)}")
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as home:
        work = Path(home) / "work"
        for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR"):
            os.environ[name] = str(work / name.lower())
            (work / name.lower()).mkdir(parents=True, mode=0o700)
        files = work / "files"
        files.mkdir()
        examples = sorted(EXAMPLES.glob("*.ipynb"))
        for example in examples:
            shutil.copy(example, files)
        # An output of a notebook that is not trusted is shown without its style.
        names = [example.name for example in examples]
        subprocess.run([sys.executable, "-m", "nbformat.sign", *names], cwd=files, check=True)
        with serving(files, work, work / "jupyter_runtime_dir") as address_of:
            for name in names:
                if folder is not None or name == "the_sharp_bits.ipynb":
                    take(address_of(name), name, folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else None)
