"""What a training leaves with its model, so that `--resume` goes on with it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from msgspec import Struct

from ..base.measures import Curve, Evaluation, Task
from ..base.types import PyTree
from ..rng.keys import Draw


class Optimizer(Struct, frozen=True, eq=False):
    """An optax transformation.

    Attributes:
      text: as it was written, such as `optax.adamw(3e-4)`.
      transformation: None after a load, which runs no code: then it has to be given again.
    """

    text: str
    transformation: Any


class CodeDigests(Struct, frozen=True):
    """What tells in this process whether a training is still made of the same code; None for what cannot be told.

    Attributes:
      loss, net: with all that they read.
      optimizer: with its numbers and schedules.
      settings: those of JAX and Flax, see `program_keys.settings`.
    """

    loss: bytes | None
    net: bytes | None
    optimizer: bytes | None
    settings: tuple[object, ...]


class Position(Struct, frozen=True, forbid_unknown_fields=True):
    """How far a training has come in an iterable of batches.

    Attributes:
      epoch: how many times the iterable was gone through to its end.
      batches: how many were taken since.
      state: what the iterator's `get_state` gave after them; None where it has none. In a file's JSON a node.
    """

    epoch: int = 0
    batches: int = 0
    state: Any = None


class Training(Struct, frozen=True, eq=False):
    """A training after its last finished step; variables and optimizer are those of the model's entry.

    Attributes:
      draw: of whose keys those of each step are folded.
      taken: the draw's `params` key initialised the variables, see `Draw.stream`.
      opt_state: the optimizer's state.
      call: as it was written, such as `loss(net, train)`.
      batch: examples in a batch; None for one batch of everything, and for an iterable of batches.
      epochs, steps: as they were asked for; one of them is None.
      eval: the text of the `--eval` data, empty without any.
      freeze: patterns of parameters that stay as they are.
      group: how many steps one program does, on a grid counted from step 0.
      curve: what it has given so far; it has the number of finished steps.
      inputs: place in the call, such as `0['x']` → dtype, shape and a digest of what the steps were given there.
      changes: what was otherwise when it went on, in words, one for each: without any it is as if it had never stopped.
      code: of its last part; None after a load.
      position: after these, in data that are an iterable of batches; None for arrays.
      mesh: on which its last part ran, as its axes are written; empty for one device.
    """

    draw: Draw
    taken: bool
    opt_state: PyTree
    call: str
    batch: int | None
    epochs: int | None
    steps: int | None
    curve: Curve
    eval: str = ""
    freeze: tuple[str, ...] = ()
    group: int = 1
    inputs: Mapping[str, str] = {}
    changes: tuple[str, ...] = ()
    code: CodeDigests | None = None
    position: Position | None = None
    mesh: str = ""

    @property
    def step(self) -> int:
        """How many steps are finished."""
        return len(self.curve.losses)


class TrainOptions(Struct, frozen=True):
    """The options of a training; `Session.train` documents them."""

    optimizer: Optimizer | None = None
    batch: int | None = None
    epochs: int | None = None
    steps: int | None = None
    eval: PyTree = None
    eval_text: str = ""
    freeze: tuple[str, ...] = ()
    resume: bool = False


class SavedTraining(Struct, frozen=True, forbid_unknown_fields=True):
    """A training as a file has it: the fields of `Training` and of its curve, with all arrays in one tree.

    Attributes:
      trees: `opt_state`, `losses` and `metrics`; a file's JSON has a node in its place.
    """

    draw: Draw
    taken: bool
    call: str
    batch: int | None
    epochs: int | None
    steps: int | None
    eval: str
    freeze: tuple[str, ...]
    group: int
    trees: PyTree
    evals: tuple[Evaluation, ...]
    total: int | None
    epoch: int | None
    examples: int
    seconds: float
    stopped: str
    task: Task
    inputs: Mapping[str, str] = {}
    changes: tuple[str, ...] = ()
    position: Position | None = None
    mesh: str = ""

    @classmethod
    def of(cls, training: Training, trees: Mapping[str, PyTree]) -> SavedTraining:
        """A training with its arrays as `trees`."""
        holder = {name: training.curve if hasattr(training.curve, name) else training for name in cls.__struct_fields__}
        plain = {name: getattr(one, name) for name, one in holder.items() if name != "trees"}
        return cls(**plain, trees=trees)

    def training(self) -> Training:
        """The training; nodes of the optimizer's state stay opaque until an optimizer says what to make of them."""
        fields = {name: getattr(self, name) for name in self.__struct_fields__} | self.trees
        curve = Curve(**{name: fields[name] for name in Curve.__struct_fields__})
        return Training(**{name: fields[name] for name in Training.__struct_fields__ if name in fields}, curve=curve)
