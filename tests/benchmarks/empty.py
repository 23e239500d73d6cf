"""An extension that does nothing: what IPython itself takes for a `%load_ext`."""

from __future__ import annotations


def load_ipython_extension(shell: object) -> None:
    """Registers nothing."""
