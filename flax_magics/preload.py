"""Our own modules, imported as soon as the user's notebook has JAX and Flax: the first command does not wait for them.

It happens at the end of the cell after which JAX, Flax and this extension are there, and adds a tenth of a second or
two to the seconds that JAX and Flax took. It imports nothing of theirs that is not there and touches no device, and
`%load_ext` by itself stays as quick as it is.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

NEEDS = ("jax", "flax.linen")
"""Flax imports its linen half with everything."""


class Preload:
    """A hook for the end of each cell, which takes itself away once it has done its work.

    Args:
      events: the shell's event manager.
      show: gets ready to show a report, as far as the settings want it.
    """

    def __init__(self, events: Any, show: Callable[[], None]) -> None:
        self._events = events
        self._show = show
        self._waiting = False

    def begin(self) -> None:
        """Starts to look for JAX and Flax."""
        self._events.register("post_run_cell", self.end_cell)
        self._waiting = True

    def stop(self) -> None:
        """Stops looking for them."""
        if self._waiting:
            self._waiting = False
            self._events.unregister("post_run_cell", self.end_cell)

    def end_cell(self, _: object = None) -> None:
        """Imports, if they are there."""
        if all(name in sys.modules for name in NEEDS):
            self.stop()
            try:
                _import()
                self._show()
            except (Exception, KeyboardInterrupt):
                pass  # It was for speed alone. What is wrong is said by the first command, which imports it as well.


def _import() -> None:
    """What a model cell and a first run import."""
    from . import asked, diskcache, modelcell, recorded, sessions, weightnames  # noqa: F401
    from .models import linen  # noqa: F401
    from .show import bundle, live  # noqa: F401

    if "flax.nnx" in sys.modules:
        from .models import nnx  # noqa: F401
