"""Several processes that do the steps of one training together."""

from __future__ import annotations

from ..base.processes import OFTEN
from ..base.threads import OneByOne
from ..compile.cache import Services
from ..compile.placement import Placement, agree
from ..errors import FlaxMagicsError
from ..rng.keys import Draw
from .data import Batch


class Together:
    """The processes of a job that do the steps of a training together.

    Args:
      text: the call, for messages.

    Attributes:
      beside: where steps are dispatched, so that this thread can leave one for which another process never comes.
    """

    def __init__(self, placement: Placement, services: Services, draw: Draw, text: str) -> None:
        assert placement.processes is not None
        self._processes, self._placement, self.beside = placement.processes, placement, OneByOne()
        self._services, self._draw, self._text = services, draw, text

    def agree(self, step: int, batch: Batch) -> None:
        """Now and then, raises unless all of them are about to do that step with the same batch."""
        if step % OFTEN == 0:
            what = f"step {step} of {self._text}"
            agree(self._services, self._placement, self._draw, what, tree=(batch.rows, batch.tree))

    @property
    def seconds(self) -> float:
        """How long the others are waited for."""
        return self._services.deadline

    def check(self) -> None:
        """Raises where one of them has stopped."""
        self._processes.check_stopped(self._text)

    def stop(self, steps: int, error: BaseException | None) -> tuple[int, int] | None:
        """Tells the others that this one stops after so many steps; gives the fewest and the most that any has begun.

        None where not all have answered.
        """
        why = ""
        if error is not None:
            why = "interrupted" if isinstance(error, KeyboardInterrupt) else type(error).__name__
            why = str(error).partition("\n")[0].rstrip(".") if isinstance(error, FlaxMagicsError) else why
        of_all = self._processes.stop(steps, why, self._text, self._services)
        return None if of_all is None else (min(of_all), max(of_all))

    def why_failed(self) -> FlaxMagicsError | None:
        """The error for a step that failed because one of them has ended."""
        return self._processes.why_failed(self._text)
