"""What a run was, as data: frozen, returned by `Session.apply`, kept in `Session.runs`, shown by the report."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from .errors import advice
from .frozen import altered
from .outputs import Values, values_of

if TYPE_CHECKING:
    from .agreement import Agreement
    from .draws import Spread
    from .spelling import Spelling


@dataclass(frozen=True)
class Note:
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


@dataclass(frozen=True)
class Cause:
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


@dataclass(frozen=True)
class Steady:
    """A run repeated with the same keys: every time in seconds, in the order they were taken."""

    times: tuple[float, ...]

    @property
    def median(self) -> float:
        """Seconds."""
        return float(np.median(self.times))

    @property
    def spread(self) -> float:
        """Half the distance between the quartiles, seconds."""
        low, high = np.percentile(self.times, [25, 75])
        return float(high - low) / 2

    @property
    def outliers(self) -> tuple[int, ...]:
        """Indices of the runs that were slow, in order.

        Slow is beyond the upper quartile by more than 1.5 times the distance between the quartiles, and by more than a
        tenth: where all runs agree to a part in a thousand, none of them is worth a word. Fewer than five tell nothing.
        """
        if len(self.times) < LEAST:
            return ()
        low, high = (float(quartile) for quartile in np.percentile(self.times, [25, 75]))
        limit = max(high + 1.5 * (high - low), 1.1 * high)
        return tuple(i for i, time in enumerate(self.times) if time > limit)


LEAST = 5
"""Runs from which a slow one can be told."""


@dataclass(frozen=True)
class Cost:
    """What XLA counts in one run of a program, on each of its devices.

    Attributes:
      flops: floating-point operations.
      bytes: bytes that are read and written, after fusion.
      loops: the program has loops over numbers, and XLA counts the body of a loop once: it is more than that.
    """

    flops: float
    bytes: float
    loops: bool = False


@dataclass(frozen=True)
class Limits:
    """What one device was measured to reach: FLOP/s in a large matmul of `dtype`, bytes/s in a large copy (read and
    written).
    """

    device: str
    dtype: str
    flops: float
    bytes: float


@dataclass(frozen=True)
class Timing:
    """Seconds that each phase took; 0.0 for a phase that did not happen.

    `run` begins once the inputs are ready (that wait is `wait`) and a run that was interrupted before has left the device
    (that wait is `busy`), and ends when the device has finished; it never includes trace, lowering or compilation.
    `compile` is all that the compilation took, and `beside` the part of it that went on beside other work and that nobody
    waited for: the phases without `beside` add up to the time that passed. `init` is the initialisation of variables; in a
    run that initialises and compiles, its tracing is part of `trace`.
    """

    trace: float = 0.0
    lower: float = 0.0
    compile: float = 0.0
    run: float = 0.0
    wait: float = 0.0
    busy: float = 0.0
    init: float = 0.0
    beside: float = 0.0
    steady: Steady | None = None

    @property
    def building(self) -> float:
        """What the program was waited for: trace, lower and compile together, without what ran beside; seconds."""
        return self.trace + self.lower + self.compile - self.beside


@dataclass(frozen=True)
class Memory:
    """Bytes, as XLA's analysis of the program gives them; `peak` is the device's own count, None where it keeps none.

    The device counts from the start of the process, whatever ran in it.
    """

    arguments: int
    outputs: int
    temporaries: int
    code: int
    peak: int | None = None

    @property
    def analysed(self) -> int:
        """Arguments, outputs and temporaries together: what the program needs at most, as XLA has it."""
        return self.arguments + self.outputs + self.temporaries


@dataclass(frozen=True)
class Made:
    """Variables that this run initialised: how many parameters (array elements of `params`) and bytes of all."""

    parameters: int
    bytes: int
    collections: tuple[str, ...]
    added: bool = False
    """True when they were added to variables that were there: a method needed what the first init did not make."""


class Gone:
    """Stands for an output that the session no longer holds."""

    def __repr__(self) -> str:
        return "<no longer held by the session>"


GONE = Gone()


@dataclass(eq=False)
class Taken:
    """What was read off the output once. Shared by the copies of one Run, so that it outlives the output."""

    digest: str | None = None
    shape: str | None = None
    spread: tuple[Spread, ...] | None = None
    values: tuple[Values, ...] | None = None

    def take(self, output: Any) -> None:
        """Takes the digest, if it was not, while the output is there; and looks at its numbers, as all is read anyway."""
        if self.digest is None:
            self.digest = digest_of(output)
        if self.values is None:
            self.values = values_of(output)


@dataclass(frozen=True, eq=False)
class Run:
    """One run.

    Attributes:
      command: what drew: `apply`, `init` or `key`.
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
      elsewhere: of a run that was read from a file, as JSON data: what its bits depended on (see `environment`) and a
        few values of its output, if they were kept (see `sample_of`); None for every other.
      agreement: of a replay by `Session.replay`, how it compares with the run; None for every other.
    """

    command: str
    model: str | None
    mode: str
    call: str
    inputs: Any
    output: Any
    seed: int
    draw: int
    keys: Mapping[str, Any]
    device: str
    started: float
    sown: Mapping[str, Any] = field(default_factory=dict)
    used: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    changed: Mapping[str, int] = field(default_factory=dict)
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
    made: Made | None = None
    by_hand: str = ""
    weights: str = ""
    replayed: bool = False
    first: bool = False
    draws: int | None = None
    elsewhere: Mapping[str, Any] | None = None
    agreement: Agreement | None = None
    _taken: Taken = field(default_factory=Taken, repr=False)
    spelling: Spelling | None = field(default=None, repr=False)
    """Of an apply and an init: what it takes to write them as plain Flax."""

    @property
    def digest(self) -> str | None:
        """`digest_of(output)`, taken when first asked for; None if the output was let go before."""
        if self.output is not GONE:
            self._taken.take(self.output)
        return self._taken.digest

    @property
    def shape(self) -> str:
        """The output's structure with dtypes and shapes: `float32[3,4,3]`."""
        if self._taken.shape is None:
            self._taken.shape = describe(self.output)
        return self._taken.shape

    @property
    def spread(self) -> tuple[Spread, ...]:
        """How each array of the output differs between the draws of this run, worked out when first asked for.

        Empty for one draw, and where the output was let go before.
        """
        if self.draws is None:
            return ()
        if self._taken.spread is None and self.output is not GONE:
            from .draws import spread_of

            self._taken.spread = spread_of(self.output)
        return self._taken.spread or ()

    @property
    def values(self) -> tuple[Values, ...]:
        """What the numbers of each array of the output are like, looked at when first asked for.

        Empty for an init and a key, and where the output was let go before.
        """
        if self.command != "apply":
            return ()
        if self._taken.values is None and self.output is not GONE:
            self._taken.values = values_of(self.output)
        return self._taken.values or ()

    def to_json(self) -> dict[str, Any]:
        """The run as JSON data: what it was, with a few values of its output alone. Keys are given in full, their words in
        hex.
        """
        from .recorded import recorded

        timing: dict[str, Any] = {
            name: getattr(self.timing, name)
            for name in ("trace", "lower", "compile", "beside", "run", "wait", "busy", "init")
        }
        if self.timing.steady is not None:
            timing["steady"] = list(self.timing.steady.times)
        return {
            "version": 1,
            **recorded(self),
            "switch": self.switch,
            "used": {name: list(paths) for name, paths in self.used.items()},
            "changed": dict(self.changed),
            "made": None if self.made is None else asdict(self.made),
            "program": self.program,
            "reason": self.reason,
            "static": list(self.static),
            "timing": timing,
            "memory": None if self.memory is None else asdict(self.memory),
            "cost": None if self.cost is None else asdict(self.cost),
            "limits": None if self.limits is None else asdict(self.limits),
            "spread": [asdict(spread) for spread in self.spread],
            "values": [asdict(values) for values in self.values],
            "cell": self.cell,
            "notes": [asdict(note) for note in self.notes],
            "by_hand": self.by_hand,
        }


def like(run: Run, **changes: Any) -> Run:
    """The run with a few fields changed, and with nothing of its output read yet."""
    changes["_taken"] = Taken()
    return altered(run, changes)


def digest_of(tree: Any) -> str:
    """sha256, first 16 hex digits, over each leaf of `tree` in JAX's order.

    Per leaf: its key path as `jax.tree_util.keystr` writes it, dtype and shape as text, each closed by a zero byte, then
    its elements as little-endian bytes in C order (typed keys: their key data). A leaf that is no array is its `repr`.
    """
    hasher = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        hasher.update(jax.tree_util.keystr(path).encode() + b"\0")
        if not hasattr(leaf, "dtype") and not isinstance(leaf, (bool, int, float, complex)):
            hasher.update(repr(leaf).encode() + b"\0")
            continue
        if hasattr(leaf, "dtype") and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            hasher.update(str(leaf.dtype).encode())
            leaf = jax.random.key_data(leaf)
        array = np.asarray(leaf, order="C")
        hasher.update(f"{array.dtype.name}{list(array.shape)}".encode() + b"\0")
        if array.dtype.byteorder == ">":
            array = array.astype(array.dtype.newbyteorder("<"))
        hasher.update(array.tobytes())
    return hasher.hexdigest()[:16]


def describe(tree: Any, limit: int = 60) -> str:
    """The structure of `tree` with every array as `dtype[shape]`, cut to `limit` characters with `…`."""
    text = _describe(tree)
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _describe(tree: Any) -> str:
    if hasattr(tree, "shape") and hasattr(tree, "dtype"):
        return f"{tree.dtype}[{','.join(map(str, tree.shape))}]"
    if isinstance(tree, Mapping):
        return "{" + ", ".join(f"{key}: {_describe(value)}" for key, value in tree.items()) + "}"
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        inner = ", ".join(f"{name}={_describe(value)}" for name, value in zip(tree._fields, tree, strict=True))
        return f"{type(tree).__name__}({inner})"
    if isinstance(tree, (tuple, list)):
        inner = ", ".join(map(_describe, tree))
        if isinstance(tree, list):
            return f"[{inner}]"
        return f"({inner},)" if len(tree) == 1 else f"({inner})"
    if tree is None or isinstance(tree, (bool, int, float, complex, str)):
        return repr(tree)
    if callable(tree) and not isinstance(tree, type) and isinstance(getattr(tree, "__name__", None), str):
        return str(tree.__name__)
    leaves = jax.tree_util.tree_leaves(tree)
    if leaves and not (len(leaves) == 1 and leaves[0] is tree):
        return f"{type(tree).__name__}({', '.join(map(_describe, leaves))})"
    return type(tree).__name__
