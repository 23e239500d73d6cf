"""How many steps one program does: several where that was measured to be faster, and gives the bits of one by one."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from typing import TypeAlias

import jax
import numpy as np

from ..base.digest import is_key
from ..base.types import PyTree
from .data import Batch, Data
from .step import StepResult, TrainState

StepProgram: TypeAlias = Callable[[TrainState, int, Batch], StepResult]
"""`program(state, number, batch)`: the steps of a batch, the first of which has that number."""

MEASURED = 30
"""After so many steps it is known how long one takes."""
SHORT = 5e-3
"""Seconds: a step that takes longer gains nothing in a group."""
LONG = 0.03
"""Seconds that a group should take: an interrupt waits for two of them."""
FASTER = 0.95
"""A group is used if it takes less than this share of the time of its steps one by one."""
LONGEST = 0.25
"""Seconds that a group may take."""
MISSES = 3
"""After so many places where the batches for a first group are not alike, none is tried."""


class Groups:
    """Tries whether groups are faster, once; then says where one begins.

    Args:
      build: starts to compile the program for a batch of several steps; returns a function that gives the program, or
        None as long as it is not there. None where steps are to be done one by one.
      cost: seconds that it took to build the program of one step.
      size: of the groups of a training like this one, which needs no measurement; 1 for none.

    Attributes:
      size: steps in a group; 1 as long as there are none.
      asked: the size that is tried.
      decided: the size will not change any more.
    """

    def __init__(
        self,
        data: Data,
        build: Callable[[Batch], Callable[[], StepProgram | None] | None],
        cost: Callable[[], float],
        size: int,
    ) -> None:
        self._data, self._build, self._cost = data, build, cost
        self._most = data.most_together
        # A size may come from a file, and the data may be fewer by now: none is built that would never fit.
        self.size, self.asked = 1, size if size <= self._most else 1
        self._built: Callable[[], StepProgram | None] | None = None
        self._program: StepProgram | None = None
        self.decided, self._misses = self._most == 1, 0
        self._spent: list[float] = []

    def count(self, step: int, total: int | None, spent: float, room: int) -> None:
        """Called after each finished step, until it is decided: measures, and starts to compile where it is worth it.

        Args:
          spent: seconds in all steps so far.
          room: how many states there is memory for.
        """
        if self.decided or self._built is not None or total is None:
            return
        self._spent.append(spent)
        if self.asked > 1:
            self._begin(self.asked)  # as it was measured in an earlier training
        elif len(self._spent) > MEASURED:
            seconds = max(float(np.median(np.diff(self._spent))), 1e-5)
            # The device idles while the group is traced, and the trial takes the time of some groups.
            worth = (total - step) * seconds * 0.3 > 2 * self._cost() + 4 * LONG
            size = self._fitting(min(room, int(LONG / seconds)))
            if seconds > SHORT or not worth or size < 2:
                self.decided = True
            else:
                self._begin(size)

    def _fitting(self, size: int) -> int:
        """About `size`, so that an epoch has as few steps as possible besides its groups.

        One of few sizes, so that the next training in this session finds the program.
        """
        parts = 1
        while self._most // parts > 1.5 * size:
            parts *= 2
        return self._most // parts

    def _begin(self, size: int) -> None:
        self.asked = size
        with suppress(Exception):  # as many steps one by one are no program that fails
            self._built = self._build(self._data.like(size))
        if self._built is None:
            self._give_up()
        else:
            self._data.put_together(size)

    def begins_at(self, step: int, until: int | None) -> bool:
        """Whether a group of `size` may begin at that step.

        Args:
          until: the next step before which no group may reach over; None for none.
        """
        size = self.asked if self.size == 1 else self.size
        place, room = self._data.place(step)
        return place % size == 0 and size <= room and (until is None or step + size <= until)

    def to_try(self, step: int, until: int | None) -> bool:
        """Whether the program is there, and this is the place to try it."""
        if self.decided or self._built is None or not self.begins_at(step, until):
            return False
        try:
            self._program = self._program or self._built()
        except Exception:  # XLA could not compile it
            self._give_up()
        return self._program is not None

    def missed(self) -> None:
        """Notes that the batches were not alike where a group should be tried."""
        self._misses += 1
        if self._misses == MISSES:
            self._give_up()

    def _give_up(self) -> None:
        self.decided = True
        self._data.put_together(1)

    def attempt(
        self, state: TrainState, step: int, together: Batch, program_of: Callable[[Batch], StepProgram]
    ) -> list[tuple[StepResult, Batch]]:
        """Does the steps of one group both ways, and decides. Returns the steps as they were done one by one."""
        group, whole = self._program, None
        assert group is not None
        self.decided = True
        batches = together.parts or [self._data.take(step + n) for n in range(self.asked)]
        times: dict[bool, list[float]] = {True: [], False: []}
        singles: list[tuple[StepResult, Batch]] = []
        for _ in range(2):
            begin = time.perf_counter()
            with suppress(Exception):  # there was no memory for it
                whole = jax.block_until_ready(group(state, step, together))
            times[True].append(time.perf_counter() - begin)
            begin, ahead, singles = time.perf_counter(), state, []
            for n, batch in enumerate(batches):
                assert batch is not None
                result = program_of(batch)(ahead, step + n, batch)
                ahead = result.state
                singles.append((result, batch))
            jax.block_until_ready(ahead)
            times[False].append(time.perf_counter() - begin)
            # XLA's convolutions take many times longer in a loop.
            if times[True][0] > 2 * FASTER * times[False][0]:
                break
        stacked = [
            np.stack(leaves) for leaves in zip(*(jax.tree_util.tree_leaves(one[1:]) for one, _ in singles), strict=True)
        ]
        same = whole is not None and _bits(whole.state) == _bits(ahead) and _bits(whole[1:]) == _bits(stacked)
        if same and min(times[True]) < min(FASTER * min(times[False]), LONGEST):
            self.size = self.asked
        else:
            self._give_up()
        return singles


def _bits(tree: PyTree) -> list[bytes]:
    leaves = (jax.random.key_data(leaf) if is_key(leaf) else leaf for leaf in jax.tree_util.tree_leaves(tree))
    return [np.asarray(leaf).tobytes() for leaf in leaves]
