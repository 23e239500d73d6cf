"""The arrays of a training in a file: its curve and the optimizer's state, checked as they are read."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress

import numpy as np
from msgspec import Struct
from msgspec.structs import replace

from ..base.files import Damaged
from ..base.measures import Curve, Evaluation, Task
from ..base.types import HostArray, PyTree
from ..errors import FlaxMagicsError
from ..state.training import Position, SavedTraining, Training
from ..state.trees import Writer
from .format import json_of

LONGEST = 1_000_000
"""Characters of JSON: the state of an iterator that has more, arrays not counted, is left out of a file's header."""
GROUPED = 10_000
"""The most steps of a group: a file does not decide how much memory is taken."""


def arrays_of(training: Training) -> dict[str, PyTree]:
    """`SavedTraining.trees` of a training."""
    curve = training.curve
    return {"opt_state": training.opt_state, "losses": curve.losses, "metrics": dict(curve.metrics)}


def written_position(position: Position | None, path: str, writer: Writer) -> Position | None:
    """The position with a node in the place of the iterator's state, or with None where a file cannot hold that.

    Args:
      path: the state's place, after which its arrays are named; they go into `writer`.
    """
    if position is None or position.state is None:
        return position
    # A writer of its own: if the state cannot be written, none of its arrays may be left in the file.
    own_writer, node = Writer(), None
    with suppress(FlaxMagicsError):
        node = own_writer.tree(position.state, path)
    if own_writer.foreign is not None or len(json_of(node)) > LONGEST:
        return replace(position, state=None)
    if node is not None:
        writer.arrays.update(own_writer.arrays)
    return replace(position, state=node)


def check_arrays(training: SavedTraining, name: str) -> None:
    """Raises Damaged where the arrays or sizes of a file's training of the model `name` are none."""
    trees, what = training.trees, f"the training of `{name}`"
    if not isinstance(trees, Mapping) or set(trees) != {"opt_state", "losses", "metrics"}:
        raise Damaged(f"{what} is none")
    metrics = trees["metrics"]
    if type(metrics) is not dict or not all(type(key) is str for key in metrics):
        raise Damaged(f"{what} has metrics that are none")
    if not all(type(one) is np.ndarray and one.dtype == np.float32 for one in (trees["losses"], *metrics.values())):
        raise Damaged(f"{what} has losses or metrics that are none")
    place = training.position
    if place is not None and min(place.epoch, place.batches) < 0:
        raise Damaged(f"{what} has a position in its data that is none")
    sizes = (training.batch, training.epochs, training.steps, training.total, training.epoch, training.group)
    shapes = {one.shape for one in (trees["losses"], *metrics.values())}
    is_none = any(size is not None and size < 1 for size in sizes) or training.group > GROUPED
    if is_none or shapes != {(trees["losses"].size,)}:
        raise Damaged(f"{what} has a number of steps that is none")


class SavedCurve(Struct, frozen=True, forbid_unknown_fields=True):
    """The `Curve` of a run in a file's history, with the bytes of its float32 arrays, little-endian."""

    losses: bytes
    metrics: Mapping[str, bytes]
    evals: tuple[Evaluation, ...]
    total: int | None
    epoch: int | None
    examples: int
    seconds: float
    group: int
    stopped: str
    task: Task

    @classmethod
    def of(cls, curve: Curve) -> SavedCurve:
        """The curve for a file."""
        fields = {name: getattr(curve, name) for name in cls.__struct_fields__}
        metrics = {name: _bytes_of(values) for name, values in curve.metrics.items()}
        return cls(**{**fields, "losses": _bytes_of(curve.losses), "metrics": metrics})

    def curve(self) -> Curve:
        """The curve. Raises Damaged where it is none."""
        many = {len(data) for data in (self.losses, *self.metrics.values())}
        if len(many) > 1 or many.pop() % 4:
            raise Damaged("a training in its history has losses or metrics that are none")
        fields = {name: getattr(self, name) for name in self.__struct_fields__}
        metrics = {name: _array_of(data) for name, data in self.metrics.items()}
        return Curve(**{**fields, "losses": _array_of(self.losses), "metrics": metrics})


def _bytes_of(values: HostArray) -> bytes:
    return np.asarray(values, "<f4").tobytes()


def _array_of(data: bytes) -> HostArray:
    return np.frombuffer(data, "<f4").astype(np.float32)
