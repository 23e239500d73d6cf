"""Hosts that show or rewrite a notebook: GitHub, jupytext, nbconvert's script, and marimo, which runs the Python twin."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import nbformat
import pytest
from html_reader import Reader
from lab import CHROMIUM, QUIET

FOLDER = Path(__file__).parents[2] / "examples"
EXAMPLES = sorted(FOLDER.glob("*.ipynb"))


def bundles(example: Path) -> Iterator[dict[str, Any]]:
    """What the cells of an example show."""
    for cell in nbformat.read(example, 4).cells:
        yield from (output.data for output in cell.get("outputs", ()) if "data" in output)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_where_a_host_strips_style_and_script_all_numbers_are_there(example):
    reports = [data for data in bundles(example) if "flax-magics" in data.get("text/html", "")]
    assert len(reports) > 5
    for data in reports:
        shown = Reader(data["text/html"]).text
        numbers = re.findall(r"[\w.,:%]*\d[\w.%]*", data["text/plain"])
        assert [number for number in numbers if number not in shown] == []


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_jupytext_keeps_every_cell(example):
    jupytext = pytest.importorskip("jupytext", reason="notebooks are made into scripts and back by jupytext")
    notebook = nbformat.read(example, 4)
    script = jupytext.writes(notebook, "py:percent")
    assert "\n# %load_ext flax_magics\n" in script  # Python that does not know the commands reads over them
    back = jupytext.reads(script, "py:percent")
    assert [(cell.cell_type, cell.source) for cell in back.cells] == [
        (cell.cell_type, cell.source) for cell in notebook.cells
    ]


def test_nbconverts_script_runs_in_ipython_with_the_same_keys(tmp_path, home):
    example = nbformat.read(FOLDER / "repeat_and_leave.ipynb", 4)
    example.cells = example.cells[:6]  # as far as its history
    nbformat.write(example, tmp_path / "notebook.ipynb")
    [history] = (output.data["text/plain"] for output in example.cells[-1].outputs)
    for command in (["nbconvert", "--to", "script", "notebook.ipynb"], ["IPython", "--colors=NoColor", "notebook.py"]):
        done = subprocess.run(
            [sys.executable, "-m", *command], cwd=tmp_path, check=False, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
    keys = re.findall(r"\b(?:params|dropout) [0-9a-f]{8}\b", history)
    assert len(keys) == 3
    assert re.findall(r"\b(?:params|dropout) [0-9a-f]{8}\b", done.stdout) == keys


@pytest.fixture
def marimo(tmp_path) -> Iterator[str]:
    """`marimo run` of the example for it; gives its address."""
    with closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = ["marimo", "run", str(FOLDER / "first_run_marimo.py"), "--headless", "--no-token"]
    with open(tmp_path / "log", "w") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", *command, "--host", "127.0.0.1", "--port", str(port)],
            cwd=tmp_path,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        try:
            deadline = time.monotonic() + 60
            while time.monotonic() < deadline and server.poll() is None:
                with closing(socket.socket()) as client:
                    if client.connect_ex(("127.0.0.1", port)) == 0:
                        break
                time.sleep(0.1)
            yield f"http://127.0.0.1:{port}"
        finally:
            server.terminate()
            server.wait(30)


@pytest.mark.browser
@pytest.mark.skipif(find_spec("marimo") is None, reason="marimo is not installed")
@pytest.mark.skipif(
    CHROMIUM is None or find_spec("playwright") is None, reason="a page is looked at in Chromium by Playwright"
)
def test_marimo_shows_reports_of_a_session(marimo, tmp_path):
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        page = browser.new_page(viewport={"width": 900, "height": 1600})
        page.set_default_timeout(60_000)
        page.goto(marimo)
        page.locator(".flax-magics .fm-history").wait_for()
        page.screenshot(path=tmp_path / "marimo.png")
        reports = page.locator(".flax-magics")
        heads = [" ".join(text.split()) for text in reports.locator(".fm-head").all_inner_texts()]
        assert [re.sub(r"\w+:0", "device", head) for head in heads[:3]] == [
            "my_model train device training=True · draw 1 of seed 0",
            "my_model MyModel(num_neurons=3, training=False) · as written (training=False) · my_model(…)",
            "my_model train device training=True · draw 2 of seed 0",
        ]
        assert heads[3].startswith("history 2 runs · seed 0 · ")
        assert reports.nth(2).locator("polyline").count() == 1
        reports.first.locator("summary").click()
        assert reports.first.locator(".fm-keys").is_visible()
        browser.close()
