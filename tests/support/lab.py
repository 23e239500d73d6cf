"""JupyterLab in headless Chromium, driven by Playwright."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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


@contextmanager
def serving(files: Path, folder: Path, runtime: Path) -> Iterator[Callable[[str], str]]:
    """A JupyterLab server over the notebooks in `files`; gives a function from a name to the address that opens it.

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
    options = ["--no-browser", "--allow-root", "--ip=127.0.0.1", "--port=0", f"--ServerApp.root_dir={files}"]
    with open(folder / "log", "w") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "jupyterlab", *options], env=environment, stdout=log, stderr=subprocess.STDOUT
        )
        try:
            found = _listening(runtime, server, folder / "log")
            yield lambda name: f"http://127.0.0.1:{found['port']}/lab/tree/{name}?token={found['token']}&reset"
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
    page.get_by_text("Python 3 (ipykernel) | Idle").wait_for()


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
