"""Model files of Flax's examples and cells of its documentation, run verbatim."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from .sdist import NotFetched, code_cells, root


@pytest.fixture(scope="session")
def flax_sdist() -> Any:
    """The unpacked sdist of the installed Flax; skips, with the reason, where it cannot be fetched."""
    try:
        return root()
    except NotFetched as error:
        pytest.skip(str(error))


@pytest.fixture
def model_cell(notebook: Any, flax_sdist: Any) -> Callable[..., None]:
    """Runs a file of the sdist as a `%%flaxmodel` cell, `line` standing after the command."""

    def run(path: str, line: str = "") -> None:
        notebook(f"%%flaxmodel {line}\n{(flax_sdist / path).read_text(encoding='utf-8')}")

    return run


@pytest.fixture
def docs_cells(flax_sdist: Any) -> Callable[[str], list[str]]:
    """The code cells of a notebook of the sdist, as they are."""
    return code_cells
