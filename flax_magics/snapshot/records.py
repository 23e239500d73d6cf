"""What stands in a saved file's JSON: the types that it is read into, and made of.

They are the file's own, so that a field that is renamed in the session does not rename it in files.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec

from ..base.jsondata import Hex
from ..models.calls import Path

Count = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]
Seed = Annotated[str, msgspec.Meta(pattern=r"\A-?[0-9]{1,60}\Z")]
KeyWords = Annotated[str, msgspec.Meta(pattern=r"\A([0-9a-f]{8})*\Z")]
Node = Any
"""A tree as `Writer` writes it."""


class _Record(msgspec.Struct, forbid_unknown_fields=True):
    """What stands in the file, and no more. Floats are `Hex`, as JSON has neither NaN nor infinity."""


class DrawRecord(_Record):
    """The root key of a seed, and how many draws were made of it."""

    seed: Seed
    draws: Count
    key: KeyWords
    impl: str


class OpenedRecord(DrawRecord):
    """A draw that an init opened, and of which model."""

    model: str


class InitCallRecord(_Record):
    """See `SavedInit`."""

    key: Node
    args: Node
    kwargs: Node
    method: Path
    program: str | None


class ModelRecord(_Record):
    """See `SavedModel`. `variables`: one tree of a linen model, and a row of each variable of an NNX one."""

    name: str
    api: Literal["linen", "nnx"]
    text: str
    source: str
    variables: Any
    updates: dict[str, Count]
    outdated: bool
    stale: bool
    made: InitCallRecord | None
    assigned: bool
    keys: dict[str, Node] | None
    parameters: Count
    bytes: Count
    versions: dict[str, str]


VariableRows = list[tuple[str, list[Any], Node]]
"""Of each variable of an NNX model its type, the steps of its path, and its value."""


class SessionRecord(_Record):
    """All but the runs, which are an array of their own: they are many, and most of them are as they were last time."""

    saved: Hex
    versions: dict[str, str]
    settings: dict[str, str]
    device: str
    root: DrawRecord
    opened: OpenedRecord | None
    seeds: list[tuple[Seed, Count, str]]
    models: list[ModelRecord]


class TimingRecord(_Record):
    """See `Timing`."""

    trace: Hex
    lower: Hex
    compile: Hex
    beside: Hex
    run: Hex
    wait: Hex
    busy: Hex
    init: Hex
    steady: tuple[Hex, ...] | None = None


class MemoryRecord(_Record):
    """See `Memory`."""

    arguments: Count
    outputs: Count
    temporaries: Count
    code: Count
    peak: Count | None


class CostRecord(_Record):
    """See `Cost`."""

    flops: Hex
    bytes: Hex
    loops: bool


class LimitsRecord(_Record):
    """See `Limits`."""

    device: str
    dtype: str
    flops: Hex
    bytes: Hex


class InitStatsRecord(_Record):
    """See `InitStats`."""

    parameters: Count
    bytes: Count
    collections: tuple[str, ...]
    added: bool


class SpreadRecord(_Record):
    """See `Spread`."""

    path: str
    mean: Hex
    deviation: Hex


class ValuesRecord(_Record):
    """See `Values`."""

    path: str
    size: Count
    nan: Count
    inf: Count
    least: Hex | None
    most: Hex | None
    mean: Hex | None


class NoteRecord(_Record):
    """See `Note`."""

    kind: str
    text: str
    write: str | None
    form: str | None
    edit: str | None


class SampleRecord(_Record):
    """See `sample_of`."""

    path: str
    array: str
    values: Count


class RunRecord(_Record):
    """What `Run.to_json` says of a run, with what the history has of it besides.

    Attributes:
      impl: the PRNG implementation of its keys, None where it has none.
      inputs: their dtypes and shapes.
      replays: how often it was run again, and whether any of these gave other bits.
    """

    version: Literal[1]
    command: Literal["apply", "init", "key"]
    model: str | None
    mode: str
    weights: str
    call: str
    output: str
    seed: int
    draw: Count
    draws: Count | None
    keys: dict[str, KeyWords]
    digest: str | None
    device: str
    started: Hex
    replayed: bool
    versions: dict[str, str | None]
    device_kind: str | None
    processor: str | None
    threads: Count | None
    switch: str
    used: dict[str, tuple[str, ...]]
    changed: dict[str, Count]
    made: InitStatsRecord | None
    program: str
    reason: str
    static: tuple[str, ...]
    timing: TimingRecord
    memory: MemoryRecord | None
    cost: CostRecord | None
    limits: LimitsRecord | None
    spread: tuple[SpreadRecord, ...]
    values: tuple[ValuesRecord, ...]
    cell: Count | None
    notes: tuple[NoteRecord, ...]
    by_hand: str
    impl: str | None
    inputs: str
    replays: tuple[Count, bool]
    leaves: list[SampleRecord] | None = None
    bits: str = ""
