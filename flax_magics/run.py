"""The record of a run, frozen: returned by `Session.apply`, kept in `Session.runs`, shown by the report."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Literal

import msgspec
from msgspec import Struct
from msgspec.structs import asdict, replace

from .base.digest import all_words, describe, is_gone
from .base.measures import Cost, Curve, Evaluation, LayerGradient, Limits, Memory, MeshUse, Timing, environment
from .base.output import Agreement, OutputFacts, Spread, Values, sample_of, spread_of, values_of
from .base.types import HostArray, Leaf, PyTree
from .errors import advice

Settings = tuple[tuple[str, bool], ...]
"""Train/eval switches and their values, such as `(("config.training", True),)`."""


DrawNumber = int | tuple[int, int]
"""A draw: its number under the current seed, or `(seed, number)`."""

MODULE = "\0"  # no source text can contain it
"""Placeholder for the module's name in stored expressions: an export may give the module another name."""


class CommandKind(Struct, frozen=True):
    """Properties that all runs of one command share.

    Attributes:
      model: the run concerns a registered model.
      forward: the model, or a loss of it, is called, compiled or eagerly, and its result is the output.
      opens: the run makes variables from a draw's `params` key and leaves the draw open: if the model's next run is a
        forward run, it uses the other streams of the same draw.
      loss: what is called is a function of the user's, with the model as its first argument.
      trains: it changes the model's parameters, step by step; its output are the variables after the last step.
    """

    model: bool
    forward: bool
    opens: bool
    loss: bool = False
    trains: bool = False


CommandName = Literal["apply", "init", "key", "grad", "train"]

COMMANDS: dict[CommandName, CommandKind] = {
    "apply": CommandKind(model=True, forward=True, opens=False),
    "init": CommandKind(model=True, forward=False, opens=True),
    "key": CommandKind(model=False, forward=False, opens=False),
    "grad": CommandKind(model=True, forward=True, opens=False, loss=True),
    "train": CommandKind(model=True, forward=True, opens=False, loss=True, trains=True),
}
"""The commands that draw. A module that needs more per command has a dict of its own with the same keys."""


class Note(Struct, frozen=True, forbid_unknown_fields=True):
    """A remark about a likely mistake in a run ("sharp bit"), such as dropout that is off although training was asked.

    Attributes:
      kind: the name by which `%config FlaxMagics.notes` turns such notes off.
      text: one line.
      write, form, edit, where: how to fix it; see `errors.advice`.
    """

    kind: str
    text: str
    write: str | None = None
    form: str | None = None
    edit: str | None = None
    where: Annotated[str, msgspec.Meta(pattern=r"\A(model|loss)\Z")] = "model"

    @property
    def advice(self) -> list[tuple[str, str]]:
        """How to fix it, as (label, text) pairs."""
        return advice(self.write, self.form, self.edit, self.where)


class Cause(Struct, frozen=True):
    """One reason why a program had to be compiled.

    Attributes:
      kind: for an argument `shape`, `dtype`, `weak` (weak type), `number` (a Python number in place of an array, or the
        reverse), `static` (a static value), `given` (present in one call only), `placed` (another device) or
        `structure`; else `method`, `mode`, `model`, `variables`, `option`, `setting`, `keys`, `dropped` (from cache).
      name: the argument, option or setting; empty where the kind says it all.
      text: the change in words: `x: float32[128,784] → float32[64,784]`.
      shapes, dtypes: of an array argument, before and now.
    """

    kind: str
    name: str
    text: str
    shapes: tuple[tuple[int, ...], ...] = ()
    dtypes: tuple[str, ...] = ()


class InitStats(Struct, frozen=True, forbid_unknown_fields=True):
    """The variables that a run initialised: elements of `params`, and bytes and names of all collections."""

    parameters: int
    bytes: int
    collections: tuple[str, ...]
    added: bool = False
    """True where existing variables were completed, because a method needs some that the first init did not make."""


class Released:
    """Type of `RELEASED`, the placeholder for an output that the session no longer holds."""

    def __repr__(self) -> str:
        return "<no longer held by the session>"


RELEASED = Released()


class Face(Struct, frozen=True):
    """How a Run is shown: in one line, as a report in text, and as one in HTML."""

    line: Callable[[Run], str]
    text: Callable[[Run], str]
    html: Callable[[Run], str]


_face: Face | None = None


def show_as(face: Face) -> None:
    """Sets how every Run is shown. The session does: reports stand above this room."""
    global _face
    _face = face


class Run(Struct, frozen=True, eq=False, weakref=True):
    """One run: an apply, an init, a key, a loss with its gradients, or a training.

    Attributes:
      command: a key of `COMMANDS`.
      model: the model's registered name, None for a key.
      mode: `train`, `eval` or `as written`; empty for an init or a key.
      switch: the model's own switches and their values, such as `training=True`; empty if it has none.
      call: the call as it was written, such as `net(x)`.
      inputs: (args, kwargs) as the model got them.
      output: what the model returned (an init or a training: the variables; a key: the key).
      sown: collection → the values that the model sowed there in this run.
      seed, draw: which draw of which seed; numbers count from 1 under each seed.
      samples: the number of draws taken at once, from `draw` on; arrays of output and keys then have a leading axis of
        that size. None for a single draw.
      keys: stream → its typed key in this draw: `params` and `dropout` (an apply has both), and every further stream
        that the model asked for. `params (folded)` is a run's own `params` stream where an init took the draw's.
      used: stream → paths of the modules that consumed it, in order.
      idle: streams that nobody consumed because the dropout layers that would have were off.
      changed: collection that the model wrote → the number of updates it has had so far.
      dropped: collections that it wrote in a run that keeps nothing.
      device: such as `cpu:0`.
      program: `compiled`, `reused`, `disk cache` or `eager`; empty for a key.
      reason: why a program was compiled, in a few words; empty when it was not. `causes` has it in parts.
      static: arguments that became part of the program, such as `n=3`.
      timing, memory: see `Timing` and `Memory`; memory is None where no program ran.
      cost, limits: for a repeated run, XLA's cost analysis, and the machine's measured peak rates if asked for.
      cell: the cell's execution number, None outside a notebook.
      started: seconds since the epoch.
      notes: likely mistakes that were found.
      made: the variables that this run initialised, if any.
      by_hand: a line of plain Flax that repeats the run.
      weights: the origin of the variables that it used (an init: made), such as `initialised in draw 1`.
      replayed: the keys were those of an earlier draw, and no new draw was made.
      first: it is the first draw of this session.
      registered: how the model is built, where this run registered it; empty where it was registered before.
      elsewhere: for a run loaded from a file, JSON data of the environment that its bits depended on (see
        `environment`) and a sample of its output if one was kept (see `sample_of`); else None.
      agreement: for a replay by `Session.replay`, the comparison with the original run; else None.
      layers: for gradients, those of each module.
      mesh: what it made of the session's mesh; None without one.
      trained: for a training, what its finished steps have given so far.
    """

    command: CommandName
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
    idle: tuple[str, ...] = ()
    changed: Mapping[str, int] = {}
    dropped: tuple[str, ...] = ()
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
    samples: int | None = None
    elsewhere: Mapping[str, object] | None = None
    agreement: Agreement | None = None
    layers: tuple[LayerGradient, ...] = ()
    trained: Curve | None = None
    mesh: MeshUse | None = None
    _taken: OutputFacts = msgspec.field(default_factory=OutputFacts)
    spelling: ExportFacts | None = None
    """For an apply and an init: the facts from which an export writes the run as plain Flax."""

    def __repr__(self) -> str:
        return object.__repr__(self) if _face is None else _face.line(self)

    def __str__(self) -> str:
        return repr(self) if _face is None else _face.text(self)

    def _repr_html_(self) -> str | None:
        return None if _face is None else _face.html(self)

    @property
    def kind(self) -> CommandKind:
        """The properties that all runs of its command share."""
        return COMMANDS[self.command]

    @property
    def _is_there(self) -> bool:
        """Whether the output can be read: the session holds it, and nobody has donated or deleted it."""
        return self.output is not RELEASED and not is_gone(self.output)

    @property
    def digest(self) -> str | None:
        """`digest_of(output)`, computed at first access; None if the output was released before that."""
        if self._is_there:
            self._taken.take(self.output)
        return self._taken.read().digest

    @property
    def shape(self) -> str:
        """The output's structure with dtypes and shapes: `float32[3,4,3]`."""
        self._taken.shape = self._taken.shape or describe(self.output)
        return self._taken.shape

    @property
    def spread(self) -> tuple[Spread, ...]:
        """How each array of the output varies between the samples of this run, computed at first access.

        Empty for a single draw, and where the output was released before that.
        """
        if self.samples is None:
            return ()
        if self._taken.spread is None and self._is_there:
            self._taken.spread = spread_of(self.output)
        return self._taken.spread or ()

    @property
    def values(self) -> tuple[Values, ...]:
        """Statistics of each floating-point array of the output, computed at first access.

        Empty for an init, a key and a training, and where the output was released before that.
        """
        if not self.kind.forward or self.kind.trains:
            return ()
        if self._taken.values is None and self._is_there:
            self._taken.values = values_of(self.output)
        return self._taken.read().values or ()

    @property
    def losses(self) -> HostArray | None:
        """The loss of each finished step of a training, float32; None for every other run."""
        return None if self.trained is None else self.trained.losses

    @property
    def metrics(self) -> Mapping[str, HostArray]:
        """The metrics of each finished step of a training by name, float32."""
        return {} if self.trained is None else self.trained.metrics

    @property
    def eval(self) -> tuple[Evaluation, ...]:
        """The looks at a training's `--eval` data, in order."""
        return () if self.trained is None else self.trained.evals

    @property
    def steps(self) -> int:
        """The number of finished steps of a training."""
        return 0 if self.trained is None else len(self.trained.losses)

    @property
    def resumed(self) -> bool:
        """Whether it is a training that went on with what earlier commands had done; how it began stands in it, too."""
        return self.trained is not None and bool(self.trained.task.parts)

    def with_notes(self, notes: tuple[Note, ...]) -> Run:
        """The run with these notes in place of its own."""
        return replace(self, notes=notes)

    def without_inputs(self) -> Run:
        """The run without its inputs: a kept copy then holds no more memory than its output."""
        return replace(self, inputs=RELEASED)

    def to_json(self) -> dict[str, object]:
        """The run as JSON data, with a sample of its output in place of the output. Keys are given in full, in hex."""
        timing = asdict(self.timing)
        steady = timing.pop("steady")
        timing |= {} if steady is None else {"steady": list(steady.times)}
        return {
            "version": 1,
            **recorded(self),
            **{name: getattr(self, name) for name in ("switch", "program", "reason", "cell", "by_hand")},
            **({} if self.trained is None else {"trained": self.trained.to_json()}),
            **({} if self.mesh is None else {"mesh": self.mesh.to_json()}),
            "used": {name: list(paths) for name, paths in self.used.items()},
            "changed": dict(self.changed),
            "dropped": list(self.dropped),
            "static": list(self.static),
            "timing": timing,
            **{
                name: None if (record := getattr(self, name)) is None else asdict(record)
                for name in ("made", "memory", "cost", "limits")
            },
            **{name: [asdict(record) for record in getattr(self, name)] for name in ("spread", "values", "notes")},
        }


def like(run: Run, **changes: object) -> Run:
    """A copy of the run with `changes`, its output facts not computed yet."""
    # `replace` alone would share the facts of `run` with a run that may have another output.
    return replace(run, _taken=OutputFacts(), **changes)


def repr_without(record: Struct, *hidden: str) -> str:
    """The `repr` of a Struct without the `hidden` fields."""
    shown = (f"{name}={getattr(record, name)!r}" for name in record.__struct_fields__ if name not in hidden)
    return f"{type(record).__name__}({', '.join(shown)})"


class HandedBack(Struct, frozen=True):
    """A collection of an NNX run's updates that `--mutable` handed back with the output.

    Attributes:
      name: the variables' type, such as `BatchStat`.
      paths: path of each value in the module, and whether an `nnx.Variable` holds it there.
      sown: the values were sown and are nested by path; others are keyed by their joined path.
      whole: nothing else was sown, and every step of the paths is a name: an export can take the whole state.
    """

    name: str
    paths: tuple[tuple[tuple[str | int, ...], bool], ...]
    sown: bool = False
    whole: bool = False


class ContainerPart(Struct, frozen=True):
    """A node of an argument's pytree, taken apart as far as it contains static leaves.

    Attributes:
      kind: `dict`, `list` or `tuple`; `none`; `data` for a part without static leaves; `choice` for a static leaf;
        `other` for a container of another kind that has a static leaf inside.
      inside: key or index of each child, and the child; empty but for `dict`, `list` and `tuple`.
    """

    kind: str
    inside: tuple[tuple[str | int, ContainerPart], ...] = ()

    def has(self, kind: str) -> bool:
        """Whether this node or any node below it is of that kind."""
        return self.kind == kind or any(part.has(kind) for _, part in self.inside)


class ModeByHand(Struct, frozen=True):
    """Statements that switch an NNX module to a run's mode (`to`), and `back` to the mode that it had.

    `back` is None where the earlier switches were mixed, so that no single mode restores them. `MODULE` stands for the
    module's name.
    """

    to: tuple[str, ...]
    back: tuple[str, ...] | None


class ExportFacts(Struct, frozen=True):
    """The facts from which an export writes an apply as plain Flax; an init has the `init_…` ones alone.

    Attributes:
      parameters: names of the parameters that receive the positional arguments.
      static: names of argument leaves that are static, part of the program: `train`, `batch['flag']`.
      streams: the random streams that the model is given.
      held: those streams that an NNX module holds itself.
      handed: the session makes the call's `rngs` argument (NNX).
      taken: the run's `params` key is folded in, because an init used the one of the draw's split.
      arguments: switches that are added to the call as arguments.
      nnx: the model is an NNX module.
      module: the expression for a linen module, switches set that are fields of it.
      mode: how an NNX module's mode is set; None where it ran as written.
      mutable: collections that are mutable in a linen run; `kept` are those that become part of the variables.
      sown: whether something was sown.
      axes: names of mapped axes that `jax.vmap` has to bind around the run.
      init_arguments, init_module: `arguments` and `module` of the init that was part of the run, or is the run.
      init_streams: random streams that this init needs besides `params`.
      containers: arguments that have a static leaf inside, by name, taken apart.
      looks: of a training: how each of its commands has looked at `--eval` data, None for one that has not.
      parts: of a training that went on: the facts of its earlier commands.
      returns: what the output contains besides arrays: `keys`, `objects`; `parts` where it is a tuple or list.
      given: collections that an NNX run handed back.
      code: a fingerprint of the model's code and of all that it reads; None where that cannot be told.
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
    looks: tuple[LookFacts | None, ...] = ()
    parts: tuple[ExportFacts, ...] = ()


class LookFacts(Struct, frozen=True):
    """How a training has looked at its `--eval` data.

    Attributes:
      call: of the loss in evaluation mode.
      arrays: the data are arrays, and no iterable of batches.
    """

    call: ExportFacts
    arrays: bool


def recorded(run: Run) -> dict[str, object]:
    """The run as JSON data: identity, keys (in hex), digest and sample of the output, and its environment."""
    plain = ("command", "model", "mode", "weights", "call", "seed", "draw", "samples", "device", "started", "replayed")
    return {
        **{name: getattr(run, name) for name in plain},
        "output": run.shape,
        "keys": all_words(run.keys),
        "digest": run.digest,
        **(sample_of(run.output) if run._is_there else {}),
        # A run from a file keeps the environment that it was made in.
        **(environment(run.device) if run.elsewhere is None else run.elsewhere),
    }
