"""JupyterLab and Notebook 7 in headless Chromium, driven by Playwright, and what axe-core says of our output there."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
MISSING = [name for name in ("jupyterlab", "playwright") if find_spec(name) is None] + (
    [] if CHROMIUM else ["chromium"]
)
"""What is not installed of that which this takes."""

SETTINGS = {
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
    "notebook-extension/tracker": {"windowingMode": "none"},  # every cell is in the page, seen or not
}
QUIET = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--no-first-run",
]
CELLS = "[...document.querySelectorAll('.jp-Notebook .jp-CodeCell')]"


LAB, NOTEBOOK = "lab/tree", "notebooks"
"""Where a server opens a notebook: in JupyterLab, or in Notebook 7 where that is installed beside it."""


@contextmanager
def serving(notebooks: Path, folder: Path, runtime: Path) -> Iterator[Callable[..., str]]:
    """A Jupyter server over the folder `notebooks`; gives a function from the name of one, and the `host` to open it in,
    to its address.

    Args:
      folder: for its settings, workspaces and log.
      runtime: Jupyter's runtime folder, where it writes what it listens to.
    """
    for name, values in SETTINGS.items():
        path = folder / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(values))
    environment = {
        **os.environ,
        "JUPYTERLAB_SETTINGS_DIR": str(folder / "settings"),
        "JUPYTERLAB_WORKSPACES_DIR": str(folder / "workspaces"),
    }
    options = ["--no-browser", "--allow-root", "--ip=127.0.0.1", "--port=0", f"--ServerApp.root_dir={notebooks}"]
    with open(folder / "log", "w") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "jupyterlab", *options], env=environment, stdout=log, stderr=subprocess.STDOUT
        )
        try:
            found = _listening(runtime, server, folder / "log")
            server_at = f"http://127.0.0.1:{found['port']}"
            yield lambda name, host=LAB: f"{server_at}/{host}/{name}?token={found['token']}&reset"
        finally:
            server.terminate()
            server.wait(30)


def _listening(runtime: Path, server: subprocess.Popen[Any], log: Path) -> dict[str, Any]:
    """What the server wrote of itself once it listens."""
    path = runtime / f"jpserver-{server.pid}.json"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and server.poll() is None:
        try:
            return dict(json.loads(path.read_text()))
        except (FileNotFoundError, json.JSONDecodeError):
            time.sleep(0.1)
    raise RuntimeError(f"JupyterLab did not start:\n{log.read_text()}")


IDLE = """() => document.querySelector('.jp-Notebook-ExecutionIndicator')?.dataset.status === 'idle'
  && document.querySelector('.jp-Toolbar-kernelName')?.innerText === 'Python 3 (ipykernel)'"""


@contextmanager
def opened(address: str, *, width: int, height: int, scale: float = 1) -> Iterator[Any]:
    """A page with the notebook at an address, once its kernel is there; `scale`: pixels of pictures for one of the page."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        page = browser.new_page(viewport={"width": width, "height": height}, device_scale_factor=scale)
        go_to(page, address)
        yield page
        browser.close()


def go_to(page: Any, address: str) -> None:
    """Opens the notebook at an address, and waits for its kernel."""
    page.set_default_timeout(60_000)
    page.goto(address)
    page.wait_for_function(IDLE)
    page.wait_for_timeout(1000)  # with the name's first sight a kernel may not have said anything yet
    page.wait_for_function(IDLE)


def menu(page: Any, *names: str) -> None:
    """Chooses an entry of a menu by the names that lead there."""
    page.locator(".lm-MenuBar-itemLabel").get_by_text(names[0], exact=True).click()
    for name in names[1:]:
        page.locator(".lm-Menu-itemLabel").get_by_text(name, exact=True).click()


def cell(page: Any, source: str) -> Any:
    """The cell whose source begins so."""
    number = page.evaluate(
        f"start => {CELLS}.findIndex(cell => cell.querySelector('.cm-content').innerText.startsWith(start))", source
    )
    assert number >= 0, f"no cell begins with {source!r}"
    return page.locator(".jp-Notebook .jp-CodeCell").nth(number)


def choose_theme(page: Any, theme: str) -> None:
    """Chooses JupyterLab's theme, `light` or `dark`; its server keeps that for the pages to come."""
    menu(page, "Settings", "Theme", f"JupyterLab {theme.title()}")
    is_light = str(theme == "light").lower()
    page.wait_for_selector(f'body[data-jp-theme-light="{is_light}"]', state="attached")


OPEN = """open => document.querySelectorAll('.flax-magics details').forEach(details => {
  if (open && !details.open) details.dataset.opened = '';
  if (open || 'opened' in details.dataset) details.open = open;
})"""
FAULTS = """async contrast => {
  // A body without a height, as JupyterLab's, hides all that lies outside of it, or so axe thinks.
  document.body.style.overflow = 'visible';
  // The rule at a report's left is no ground that its text stands on.
  const check = {id: 'color-contrast', options: {ignorePseudo: true, ignoreUnicode: true, ignoreLength: false,
    boldValue: 700, boldTextPt: 14, largeTextPt: 18, contrastRatio: {normal: {expected: 4.5}, large: {expected: 3}}}};
  axe.configure({checks: [check]});
  const rule = 'color-contrast';
  const how = contrast ? {runOnly: {type: 'rule', values: [rule]}} : {rules: {[rule]: {enabled: false}}};
  const results = await axe.run('.flax-magics', how);
  const passed = results.passes.reduce((count, rule) => count + rule.nodes.length, 0);
  return [passed, results.violations.flatMap(rule => rule.nodes.map(node => `${rule.id}: ${node.html}`))];
}"""
COLOURS = """() => ({
  background: getComputedStyle(document.querySelector('.jp-Notebook')).backgroundColor,
  color: getComputedStyle(document.querySelector('.flax-magics')).color,
  reports: [...document.querySelectorAll('.jp-OutputArea-output .flax-magics')].map(report => report.outerHTML).join(''),
})"""


def faults(page: Any) -> list[str]:
    """What axe-core finds wrong with our reports in the page, all of them opened: rule and element.

    Contrast is looked at in a page of its own, with the reports and the colours of this one: what JupyterLab lays over
    them keeps axe from a verdict.
    """
    axe = (files("axe_playwright_python") / "axe.min.js").read_text(encoding="utf-8")
    page.evaluate(OPEN, True)
    alone = page.context.browser.new_page()
    shown = page.evaluate(COLOURS)
    style = f"background:{shown['background']};color:{shown['color']};font:13px sans-serif"
    alone.set_content(f"<!doctype html><body style='{style}'>{shown['reports']}")
    found = []
    for place, contrast in ((page, False), (alone, True)):
        place.evaluate(axe)
        passed, wrong = place.evaluate(FAULTS, contrast)
        assert passed > 20, "axe has looked at next to nothing"
        found += wrong
    alone.close()
    page.evaluate(OPEN, False)
    return found
