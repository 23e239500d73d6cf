"""Every draw of a session, a record each: what `%flax_history` shows; and which runs a replay is of."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from typing import Any, overload

from . import history
from .errors import FlaxMagicsError
from .history import Chain, Kept
from .keys import Root, Streams, fingerprint
from .run import Run
from .state import State

KEYS_ALONE = "replayed, its keys alone"
"""What marks a run with `--draw`."""


@dataclass(frozen=True, eq=False)
class Drawn:
    """One draw, or one of the runs that shared a draw.

    Attributes:
      seed, draw: which draw of which seed.
      draws: how many it took at once, None for one.
      command: what drew: `apply`, `init`, `key`.
      name: the model's; for a key its stream.
      mode: as in `Run`; empty for an init or a key.
      call: as it was written.
      cell: the cell's number, None outside a notebook.
      started: seconds since the epoch.
      marks: `replayed` where it was run again, of a run with the keys of an earlier draw `KEYS_ALONE`, and what became of
        the cell since.
    """

    seed: int
    draw: int
    draws: int | None
    command: str
    name: str
    mode: str
    call: str
    cell: int | None
    started: float
    marks: tuple[str, ...]
    _kept: Kept = field(repr=False)

    @cached_property
    def keys(self) -> Mapping[str, str]:
        """Stream → the first word of its key, of the streams that something took."""
        facts = self._kept.facts
        keys, made = facts["keys"], facts["made"] is not None
        taken = [*(["params"] if made and self.command == "apply" else []), *facts["used"]]
        names = [name for name in dict.fromkeys(taken) if name in keys] if self.command == "apply" else list(keys)
        return {name: _word(keys, name) for name in names}

    @cached_property
    def inputs(self) -> str:
        """Dtypes and shapes of the arguments: `float32[3,4,4], train=True`."""
        return "" if self.command == "key" else self._kept.shapes

    @cached_property
    def digest(self) -> str | None:
        """The output's digest, taken now if it was not and the output is still there; None if it is gone."""
        return self._kept.run().digest

    @property
    def weights(self) -> str:
        """Whose variables ran, such as `initialised in draw 1`; empty for a key."""
        weights: str = self._kept.facts["weights"]
        return weights

    @property
    def initialises(self) -> bool:
        """Whether it made variables."""
        return self._kept.facts["made"] is not None

    @property
    def last(self) -> int:
        """The number of the last draw that it took."""
        return self.draw + (self.draws or 1) - 1

    @property
    def run(self) -> Run:
        """The Run; an array that nobody holds any more makes its whole field `GONE`."""
        return self._kept.run()


def _word(keys: Any, name: str) -> str:
    if isinstance(keys, Streams):  # no array has to be made
        return keys.data(name)[:4][::-1].hex()
    return fingerprint(keys[name])


@dataclass(frozen=True, eq=False)
class History:
    """The draws of a session, oldest first: a sequence of `Drawn`, shown as a table.

    Attributes:
      earlier: how many draws before these were left out.
      seed: the seed under which the next draw is made.
    """

    rows: tuple[Drawn, ...]
    earlier: int
    seed: int

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Drawn]:
        return iter(self.rows)

    @overload
    def __getitem__(self, at: int) -> Drawn: ...
    @overload
    def __getitem__(self, at: slice) -> tuple[Drawn, ...]: ...
    def __getitem__(self, at: int | slice) -> Drawn | tuple[Drawn, ...]:
        return self.rows[at]

    def __str__(self) -> str:
        from .show.history import history_text

        return history_text(self)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        from .show import html

        return html.history(self)


def of_runs(
    chain: Chain | None, root: Root, last: int | None, model: str | None, cells: Mapping[int, tuple[str, ...]]
) -> History:
    """See `Session.history`.

    Raises:
      FlaxMagicsError: `last` is no number of draws.
    """
    if last is not None and (isinstance(last, bool) or not isinstance(last, int) or last < 1):
        raise FlaxMagicsError(f"`last` is a number of draws, 1 or more, not {last!r}.")
    wanted = (kept for kept in history.backwards(chain) if model is None or kept.facts["model"] == model)
    rows = [_drawn(kept, cells) for kept in islice(wanted, last)][::-1]
    return History(tuple(rows), sum(1 for _ in wanted), root.seed)


def _drawn(kept: Kept, cells: Mapping[int, tuple[str, ...]]) -> Drawn:
    facts = kept.facts
    times, differs = kept.replays
    marks = [KEYS_ALONE] if facts["replayed"] else []
    if times:
        marks.append("replayed, and it differed" if differs else "replayed")
    if facts["elsewhere"] is None:  # the numbers of another process are those of other cells
        marks += cells.get(facts["cell"], ())
    return Drawn(
        facts["seed"],
        facts["draw"],
        facts["draws"],
        facts["command"],
        facts["call"] if facts["command"] == "key" else facts["model"],
        facts["mode"],
        facts["call"],
        facts["cell"],
        facts["started"],
        tuple(marks),
        kept,
    )


def find(state: State, draw: int | tuple[int, int] | str | Run) -> list[Kept]:
    """The runs that a replay of `draw` is of, in order.

    Raises:
      FlaxMagicsError: there is no such draw.
    """
    if isinstance(draw, Run):
        for kept in history.backwards(state.runs):
            if kept.facts["_taken"] is draw._taken:
                return [kept]
        wanted: tuple[int, int] = (draw.seed, draw.draw)
    elif draw == "last":
        drawn = (kept.facts for kept in history.backwards(state.runs) if not kept.facts["replayed"])
        wanted = next(((facts["seed"], facts["draw"]) for facts in drawn), (state.root.seed, 0))
    elif isinstance(draw, str):
        raise FlaxMagicsError(f"a draw is a number, (seed, number), 'last' or a Run, not {draw!r}.")
    else:
        wanted = state.check_draw(draw)
    found = history.of_draw(state.runs, *state.check_draw(wanted))
    if not found:
        raise FlaxMagicsError(f"draw {wanted[1]} of seed {wanted[0]} has no run that could be run again.")
    return found
