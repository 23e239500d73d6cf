"""What a run was, as data: frozen, returned by `Session.apply`, kept in `Session.runs`, shown by the report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import msgspec
from msgspec import Struct
from msgspec.structs import asdict, replace

from .base.digest import Agreement, Spread, Values, all_words, describe, digest_of, sample_of, spread_of, values_of
from .base.measures import Cost, Limits, Memory, Timing, environment
from .base.types import Leaf, PyTree
from .errors import advice

Settings = tuple[tuple[str, bool], ...]
"""Switches by name, or by path, and their values."""


DrawNumber = int | tuple[int, int]
"""A draw by its number under the seed that is in use, or by `(seed, number)`."""

MODULE = "\0"
"""What stands for the module's name in an expression that is kept."""


class CommandKind(NamedTuple):
    """What runs of one command have in common.

    Attributes:
      model: they run a registered model.
      forward: the model is called, by a program or op by op, and gives the output.
      opens: they make variables, of a draw's `params`; a forward run of the model that comes next has the rest of the draw.
    """

    model: bool
    forward: bool
    opens: bool


COMMANDS = {
    "apply": CommandKind(model=True, forward=True, opens=False),
    "init": CommandKind(model=True, forward=False, opens=True),
    "key": CommandKind(model=False, forward=False, opens=False),
}
"""What draws. Where a room tells these apart in more than that, it has a dict of its own with the same keys."""


class Note(Struct, frozen=True, forbid_unknown_fields=True):
    """A sharp bit that was found.

    Attributes:
      kind: what `%config FlaxMagics.notes` can quiet.
      text: one line.
      write, form, edit: what mends it; see `errors.advice`.
    """

    kind: str
    text: str
    write: str | None = None
    form: str | None = None
    edit: str | None = None

    @property
    def advice(self) -> list[tuple[str, str]]:
        """Label and text of what mends it."""
        return advice(self.write, self.form, self.edit)


class Cause(Struct, frozen=True):
    """One thing that made a program new.

    Attributes:
      kind: of an argument `shape`, `dtype`, `weak`, `number` (a Python number and an array), `static`, `given`,
        `placed` or `structure`; or `method`, `mode`, `model`, `variables`, `option`, `setting`, `keys`.
      name: of the argument, option or setting; empty where the kind says it.
      text: what was, and what is: `x: float32[128,784] → float32[64,784]`.
      shapes, dtypes: of an array, before and now.
    """

    kind: str
    name: str
    text: str
    shapes: tuple[tuple[int, ...], ...] = ()
    dtypes: tuple[str, ...] = ()


class InitStats(Struct, frozen=True, forbid_unknown_fields=True):
    """Variables that this run initialised: how many parameters (array elements of `params`) and bytes of all."""

    parameters: int
    bytes: int
    collections: tuple[str, ...]
    added: bool = False
    """True when they were added to variables that were there: a method needed what the first init did not make."""


class Released:
    """Stands for an output that the session no longer holds."""

    def __repr__(self) -> str:
        return "<no longer held by the session>"


RELEASED = Released()


@dataclass(eq=False)
class OutputFacts:
    """What was read off the output once. Shared by the copies of one Run, so that it outlives the output."""

    digest: str | None = None
    shape: str | None = None
    spread: tuple[Spread, ...] | None = None
    values: tuple[Values, ...] | None = None

    def take(self, output: PyTree) -> None:
        """Computes digest and values of an output that is still there, where they are not known yet."""
        self.digest = self.digest or digest_of(output)
        if self.values is None:
            self.values = values_of(output)


class Run(Struct, frozen=True, eq=False, weakref=True):
    """One run.

    Attributes:
      command: what drew, one of `COMMANDS`.
      model: the registered name, None for a key.
      mode: `train`, `eval` or `as written`; empty for an init or a key.
      switch: the model's own switches and their values, such as `training=True`; empty if it has none.
      call: the call as it was written, such as `net(x)`.
      inputs: positional and keyword arguments as the model got them.
      output: what the model returned (an init: the variables; a key: the key).
      sown: collection → what the model sowed there in this run.
      seed, draw: which draw of which seed; numbers count from 1 under each seed.
      draws: how many draws were taken at once, from `draw` on; arrays of the output and the keys then have an axis of
        that size in front. None for one draw as it is.
      keys: stream → its typed key in this draw: `params` and `dropout` (an apply has both), and every further stream
        that the model asked for. `params (folded)` is a run's own `params` stream where an init took the draw's.
      used: stream → paths of the modules that consumed it, in order.
      changed: collection that the model wrote → how many updates it has had.
      device: such as `cpu:0`.
      program: `compiled`, `reused`, `disk cache` or `eager`; empty for a key.
      reason: why a program was compiled, in a few words; empty when it was not. `causes` has it in parts.
      static: arguments that became part of the program, such as `n=3`.
      timing, memory: see `Timing` and `Memory`; memory is None where no program ran.
      cost, limits: of a repeated run, what XLA counts in the program, and what the machine reaches if that was asked for.
      cell: the cell's execution number, None outside a notebook.
      started: seconds since the epoch.
      notes: the sharp bits that were found.
      made: the variables this run initialised, if any.
      by_hand: the same run as plain Flax.
      weights: where the variables came from that it ran with (an init: that it made), such as `initialised in draw 1`.
      replayed: the keys were those of an earlier draw, and no new draw was made.
      first: the first draw of this session.
      registered: how the model is built, where this run registered it; empty where it was registered before.
      elsewhere: of a run that was read from a file, as JSON data: what its bits depended on (see `environment`) and a
        few values of its output, if they were kept (see `sample_of`); None for every other.
      agreement: of a replay by `Session.replay`, how it compares with the run; None for every other.
    """

    command: str
    model: str | None
    mode: str
    call: str
    inputs: PyTree
    output: PyTree
    seed: int
    draw: int
    keys: Mapping[str, Leaf]
    device: str
    started: float
    sown: Mapping[str, PyTree] = {}
    used: Mapping[str, tuple[str, ...]] = {}
    changed: Mapping[str, int] = {}
    program: str = ""
    reason: str = ""
    causes: tuple[Cause, ...] = ()
    switch: str = ""
    static: tuple[str, ...] = ()
    timing: Timing = Timing()
    memory: Memory | None = None
    cost: Cost | None = None
    limits: Limits | None = None
    cell: int | None = None
    notes: tuple[Note, ...] = ()
    made: InitStats | None = None
    by_hand: str = ""
    weights: str = ""
    replayed: bool = False
    first: bool = False
    registered: str = ""
    draws: int | None = None
    elsewhere: Mapping[str, object] | None = None
    agreement: Agreement | None = None
    _taken: OutputFacts = msgspec.field(default_factory=OutputFacts)
    spelling: ExportFacts | None = None
    """Of an apply and an init: what it takes to write them as plain Flax."""

    def __repr__(self) -> str:
        return repr_without(self, "_taken", "spelling")

    @property
    def kind(self) -> CommandKind:
        """What the run has in common with all of its command."""
        return COMMANDS[self.command]

    @property
    def digest(self) -> str | None:
        """`digest_of(output)`, taken when first asked for; None if the output was let go before."""
        if self.output is not RELEASED:
            self._taken.take(self.output)
        return self._taken.digest

    @property
    def shape(self) -> str:
        """The output's structure with dtypes and shapes: `float32[3,4,3]`."""
        self._taken.shape = self._taken.shape or describe(self.output)
        return self._taken.shape

    @property
    def spread(self) -> tuple[Spread, ...]:
        """How each array of the output differs between the draws of this run, worked out when first asked for.

        Empty for one draw, and where the output was let go before.
        """
        if self.draws is None:
            return ()
        if self._taken.spread is None and self.output is not RELEASED:
            self._taken.spread = spread_of(self.output)
        return self._taken.spread or ()

    @property
    def values(self) -> tuple[Values, ...]:
        """What the numbers of each array of the output are like, looked at when first asked for.

        Empty for an init and a key, and where the output was let go before.
        """
        if not self.kind.forward:
            return ()
        if self._taken.values is None and self.output is not RELEASED:
            self._taken.values = values_of(self.output)
        return self._taken.values or ()

    def with_notes(self, notes: tuple[Note, ...]) -> Run:
        """The run with these notes in place of its own."""
        return replace(self, notes=notes)

    def to_json(self) -> dict[str, object]:
        """The run as JSON data: what it was, with a few values of its output alone. Keys are given in full, their words in
        hex.
        """
        timing = asdict(self.timing)
        steady = timing.pop("steady")
        timing |= {} if steady is None else {"steady": list(steady.times)}
        return {
            "version": 1,
            **recorded(self),
            **{name: getattr(self, name) for name in ("switch", "program", "reason", "cell", "by_hand")},
            "used": {name: list(paths) for name, paths in self.used.items()},
            "changed": dict(self.changed),
            "static": list(self.static),
            "timing": timing,
            **{
                name: None if (record := getattr(self, name)) is None else asdict(record)
                for name in ("made", "memory", "cost", "limits")
            },
            **{name: [asdict(record) for record in getattr(self, name)] for name in ("spread", "values", "notes")},
        }


def like(run: Run, **changes: object) -> Run:
    """The run with a few fields changed, and with nothing of its output read yet."""
    return replace(run, _taken=OutputFacts(), **changes)


def repr_without(record: Struct, *hidden: str) -> str:
    """The `repr` of a Struct, without fields that are of no use to a reader."""
    shown = (f"{name}={getattr(record, name)!r}" for name in record.__struct_fields__ if name not in hidden)
    return f"{type(record).__name__}({', '.join(shown)})"


class HandedBack(Struct, frozen=True):
    """A collection that an NNX run handed back.

    Attributes:
      name: of the variables' type.
      paths: of its values in the module, each with whether a variable holds it.
      sown: they were sown, and are nested by path; others stand under their path as one name.
      whole: it is all that was sown, by names alone.
    """

    name: str
    paths: tuple[tuple[tuple[str | int, ...], bool], ...]
    sown: bool = False
    whole: bool = False


class ContainerPart(Struct, frozen=True):
    """A container of an argument, or what is in one.

    Attributes:
      kind: `dict`, `list` or `tuple`; `none`; `data` for what is given to the program, `choice` for a leaf that it is
        made for; `other` for a container of another kind with such a leaf in it.
      inside: keys or places, and what is there.
    """

    kind: str
    inside: tuple[tuple[str | int, ContainerPart], ...] = ()

    def has(self, kind: str) -> bool:
        """Whether it is, or has, a part of that kind."""
        return self.kind == kind or any(part.has(kind) for _, part in self.inside)


class ModeByHand(Struct, frozen=True):
    """The statements that set an NNX module's mode, and those that set it back: None where no call of one mode does.

    `MODULE` stands for the module's name.
    """

    to: tuple[str, ...]
    back: tuple[str, ...] | None


class ExportFacts(Struct, frozen=True):
    """The parts of an apply by hand; an init has those of the init alone.

    Attributes:
      parameters: names of the parameters that the positional arguments are given to.
      static: names of the arguments' leaves that are part of the program: `train`, `batch['flag']`.
      streams: the random streams that the model is given.
      held: those of them that an NNX module holds itself.
      handed: the session makes the call's `rngs` (NNX).
      taken: the run's own `params` key is folded in, since an init took that of the draw.
      arguments: switches that are added to the call.
      nnx: it is a run of an NNX module.
      module: the expression for a linen module with the switches set that are its fields.
      mode: how the mode of an NNX module is set; None where it ran as written.
      mutable: collections that are mutable in a linen run. `kept` are those that become part of the variables.
      sown: whether something was sown.
      axes: mapped axes that are bound around the run.
      init_arguments, init_module: `arguments` and `module` of the init that was part of the run, or is the run.
      init_streams: random streams that it has to be given besides `params`.
      containers: arguments that have such a leaf inside, by name, taken apart.
      returns: what the output has besides arrays: `keys`, `objects`; `parts` where it is a tuple or list.
      given: collections that an NNX run handed back.
      code: a fingerprint of the model's code and of what that reads, None where it has none.
    """

    parameters: tuple[str, ...] = ()
    static: frozenset[str] = frozenset()
    streams: tuple[str, ...] = ()
    held: frozenset[str] = frozenset()
    handed: bool = False
    taken: bool = False
    arguments: Settings = ()
    nnx: bool = False
    module: str = MODULE
    mode: ModeByHand | None = None
    mutable: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()
    sown: bool = False
    axes: tuple[str, ...] = ()
    init_arguments: Settings = ()
    init_module: str = MODULE
    init_streams: tuple[str, ...] = ()
    returns: frozenset[str] = frozenset()
    given: tuple[HandedBack, ...] = ()
    code: bytes | None = None
    containers: tuple[tuple[str, ContainerPart], ...] = ()


def recorded(run: Run) -> dict[str, object]:
    """As JSON data: which run it was, its keys (their words in hex), digest and sample, and what its bits depend on."""
    plain = ("command", "model", "mode", "weights", "call", "seed", "draw", "draws", "device", "started", "replayed")
    return {
        **{name: getattr(run, name) for name in plain},
        "output": run.shape,
        "keys": all_words(run.keys),
        "digest": run.digest,
        **(sample_of(run.output) if run.output is not RELEASED else {}),
        **(environment(run.device) if run.elsewhere is None else run.elsewhere),
    }
