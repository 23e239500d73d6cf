"""A model's variables as treescope shows them: a tree, with a picture of every array in its HTML.

The one thing shown here that needs scripts: its pictures and its folding are treescope's own. So it is shown only where
it is asked for, and nothing is set for the rest of the notebook.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import treescope  # type: ignore[import-untyped]

from ..errors import FlaxMagicsError
from .columns import clean_lines


def check(name: str, variables: Any) -> None:
    """Raises FlaxMagicsError if there are no variables."""
    if variables is None:
        raise FlaxMagicsError(f"`{name}` has no variables yet that a tree could show.", form=f"%flax_init {name}(…)")


def tree_text(variables: Any) -> str:
    """The tree as text."""
    with _unwarned():
        return "\n".join(clean_lines(treescope.render_to_text(variables, ignore_exceptions=True)))


def tree_html(variables: Any) -> str:
    """The tree as HTML. A part that cannot be rendered is named, and the rest stands."""
    with _unwarned(), treescope.active_autovisualizer.set_scoped(treescope.ArrayAutovisualizer()):
        html: str = treescope.render_to_html(variables, ignore_exceptions=True)
    return html


@contextlib.contextmanager
def _unwarned() -> Iterator[None]:
    """To know things by their names treescope looks at all that NumPy has, and NumPy warns of what it will drop."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        yield
