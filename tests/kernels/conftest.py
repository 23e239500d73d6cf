"""Real kernels for the tests of this folder: of the interpreter that runs them, and of nobody's own settings."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from kernels import Kernels, Notebook
from sharp_bits import SHARP_BITS


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks what this folder has as `kernel`."""
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker("kernel")


@pytest.fixture(scope="session", autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where Jupyter and IPython keep their files for the time of the tests: kernel, settings, history."""
    home = tmp_path_factory.mktemp("home")
    names = ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR")
    with pytest.MonkeyPatch.context() as patch:
        for name in names:
            folder = home / name.lower()
            folder.mkdir(mode=0o700)
            patch.setenv(name, str(folder))
        patch.setenv("JUPYTER_PATH", str(home / "jupyter"))  # looked at before all others
        patch.setenv("JUPYTER_PLATFORM_DIRS", "1")
        patch.setenv("PYDEVD_DISABLE_FILE_VALIDATION", "1")  # else the kernel's debugger writes to standard error
        patch.delenv("JUPYTER_PREFER_ENV_PATH", raising=False)
        from ipykernel.kernelspec import write_kernel_spec

        write_kernel_spec(os.fspath(home / "jupyter" / "kernels" / "python3"))
        yield home


@pytest.fixture(scope="session", autouse=True)
def event_loop() -> Iterator[None]:
    """The thread has one: jupyter_client 7, which is Colab's, would make one, be warned for it, and never close it."""
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    yield
    asyncio.set_event_loop(None)
    loop.close()


@pytest.fixture(scope="session")
def kernels(home: Path) -> Iterator[Kernels]:
    """The kernels that tests use one after another."""
    with contextlib.closing(Kernels()) as kernels:
        yield kernels


@pytest.fixture
def open_notebook(tmp_path: Path, kernels: Kernels) -> Iterator[Callable[[], Notebook]]:
    """Gives another notebook at each call; their kernels are those of earlier tests, renewed."""
    with contextlib.ExitStack() as stack:
        yield lambda: stack.enter_context(kernels.lent(tmp_path))


@pytest.fixture
def start_notebook(tmp_path: Path, home: Path) -> Iterator[Callable[[], Notebook]]:
    """Gives a notebook with a kernel of its own at each call, for what a kernel is not the same after."""
    with contextlib.ExitStack() as stack:
        yield lambda: stack.enter_context(Notebook.opened(tmp_path))


@pytest.fixture(scope="module")
def living(tmp_path_factory: pytest.TempPathFactory, kernels: Kernels) -> Iterator[Notebook]:
    """A notebook that the tests of one file share, with the extension and the notebook's model loaded."""
    with kernels.lent(tmp_path_factory.mktemp("living")) as notebook:
        notebook.run_all(SHARP_BITS)
        yield notebook
