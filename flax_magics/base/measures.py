"""Measurements of a run (times, memory, cost, limits, gradients, the curve of a training) and the environment that its bits
depend on: versions, kind of device, processor, threads.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import importlib.metadata
import math
import os
import platform
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import cached_property, lru_cache
from pathlib import Path

import jax
import numpy as np
from jaxlib import version as jaxlib_version
from msgspec import Struct
from msgspec.structs import asdict

from .text import bytes_, flops, seconds
from .types import HostArray, PyTree


class LayerGradient(Struct, frozen=True):
    """The gradient by the parameters that one module holds itself, those of its submodules left out.

    Attributes:
      path: of the module; empty for the model itself.
      cls: its class, empty where that is not known.
      parameters, frozen: elements of its parameters, and how many of these have no gradient because they are frozen.
      squares, weights: sums of the squares of the gradient, and of the parameters that it is taken by.
      zeros, bad: elements of the gradient that are zero, and that are NaN or infinite.
    """

    path: tuple[str, ...]
    cls: str
    parameters: int
    frozen: int = 0
    squares: float = 0.0
    weights: float = 0.0
    zeros: int = 0
    bad: int = 0

    @classmethod
    def of_all(cls, parts: Sequence[LayerGradient], path: tuple[str, ...] = (), of: str = "") -> LayerGradient:
        """The gradient by the parameters of all `parts` together, under `path` and with the class `of`."""
        sums = {name: sum(getattr(part, name) for part in parts) for name in cls.__struct_fields__[2:]}
        return cls(path, of, **sums)


class Lies(Struct, frozen=True, forbid_unknown_fields=True):
    """How arrays are cut over the devices of a mesh, such as `cut over data`, and their bytes on each device."""

    name: str
    how: str
    bytes: int


class MeshUse(Struct, frozen=True, dict=True, eq=False):
    """What a run made of a mesh.

    Attributes:
      axes: of the mesh, with their sizes.
      devices: their names, the last axis running fastest.
      inputs, variables, output: where these live.
      text: gives the compiled program as XLA writes it; None where it is gone.
    """

    axes: tuple[tuple[str, int], ...]
    devices: tuple[str, ...]
    inputs: tuple[Lies, ...]
    variables: tuple[Lies, ...]
    output: tuple[Lies, ...]
    text: Callable[[], str | None]

    def __repr__(self) -> str:
        return f"<MeshUse: {self.name}>"

    @property
    def name(self) -> str:
        """Its axes as a line has them: `data=4,model=2`."""
        return ",".join(f"{name}={size}" for name, size in self.axes)

    @cached_property
    def collectives(self) -> tuple[tuple[str, int, int], ...] | None:
        """(kind, how many, bytes of their results on a device) of what the program sends between devices; None: unknown."""
        text = self.text()
        return None if text is None else collectives_in(text)

    def to_json(self) -> dict[str, object]:
        """Its axes, devices, and where things live, as JSON data."""
        lies = {name: [asdict(one) for one in getattr(self, name)] for name in ("inputs", "variables", "output")}
        return {"axes": [list(axis) for axis in self.axes], "devices": list(self.devices), **lies}


_COLLECTIVE = (
    r"= (.*?) (all-reduce|all-gather|reduce-scatter|collective-permute|all-to-all|collective-broadcast"
    r"|ragged-all-to-all)(?:-start)?\("
)
_ARRAY = r"([a-z]+)([0-9]*)\w*\[([0-9,]*)\]"
"""An operation of a compiled program that sends between devices: its result's shapes, and its kind; and one such shape."""


def collectives_in(text: str) -> tuple[tuple[str, int, int], ...]:
    """(kind, how many, bytes of their results on a device) of a compiled program as XLA writes it."""
    by_kind: dict[str, tuple[int, int]] = {}
    for shapes, kind in re.findall(_COLLECTIVE, text):
        times, size = by_kind.get(kind, (0, 0))
        by_kind[kind] = times + 1, size + sum(_bytes_of(*shape) for shape in re.findall(_ARRAY, shapes))
    return tuple((kind, *numbers) for kind, numbers in sorted(by_kind.items()))


def _bytes_of(kind: str, bits: str, shape: str) -> int:
    """The bytes of an array as XLA writes it: `f32[4,8]`, `pred[]`."""
    elements = math.prod(int(size) for size in shape.split(",") if size)
    return elements * max(1, int(bits or 8) // 8)


class Steady(Struct, frozen=True, forbid_unknown_fields=True):
    """The times of a run that was repeated with the same keys, in seconds and in the order they were taken."""

    times: tuple[float, ...]

    def __repr__(self) -> str:
        spread = seconds(self.spread, like=self.median)
        return f"<Steady: median {seconds(self.median)} ± {spread} of {len(self.times)}>"

    @property
    def median(self) -> float:
        """The median time in seconds."""
        return float(np.median(self.times))

    @property
    def spread(self) -> float:
        """Half the interquartile range, in seconds."""
        low, high = np.percentile(self.times, [25, 75])
        return float(high - low) / 2

    @property
    def outliers(self) -> tuple[int, ...]:
        """Indices of slow runs, in order; empty for fewer than `LEAST` runs.

        A run is slow if its time exceeds the upper quartile by more than 1.5 interquartile ranges and by more than
        10%. The second condition keeps out runs that stand out only because all others agree to a part in a thousand.
        """
        if len(self.times) < LEAST:
            return ()
        low, high = np.percentile(self.times, [25, 75])
        limit = max(high + 1.5 * (high - low), 1.1 * high)
        return tuple(i for i, time in enumerate(self.times) if time > limit)


LEAST = 5
"""Number of repeated runs from which outliers are looked for."""


class Cost(Struct, frozen=True, forbid_unknown_fields=True):
    """XLA's cost analysis of one run of a program, per device.

    Attributes:
      flops: floating-point operations.
      bytes: bytes read and written, after fusion.
      loops: the program has loops over floating-point values. XLA counts a body once: the true cost is higher.
    """

    flops: float
    bytes: float
    loops: bool = False

    def __repr__(self) -> str:
        least = "at least " if self.loops else ""
        return f"<Cost: {least}{flops(round(self.flops))}, {least}{bytes_(round(self.bytes))}>"


class Limits(Struct, frozen=True, forbid_unknown_fields=True):
    """The measured peak rates of one device: FLOP/s in a large matmul of `dtype`, bytes/s (read plus written) in a
    large copy.
    """

    device: str
    dtype: str
    flops: float
    bytes: float

    def __repr__(self) -> str:
        rates = f"{flops(round(self.flops))}/s in {self.dtype}, {bytes_(round(self.bytes))}/s"
        return f"<Limits of {self.device}: {rates}>"


class Timing(Struct, frozen=True, forbid_unknown_fields=True):
    """Seconds spent in each phase of a run; 0.0 for a phase that did not happen.

    `run` starts once the inputs are ready (`wait`) and the device is free of an earlier interrupted run (`busy`), and
    ends when the device has finished; it never includes tracing, lowering or compilation. `compile` is the whole
    compilation, `beside` the part of it that overlapped other work, so all phases minus `beside` add up to the elapsed
    time. `init` is the initialisation of variables; in a run that also compiles, its tracing counts as `trace`.
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

    def __repr__(self) -> str:
        phases = ((name, getattr(self, name)) for name in self.__struct_fields__ if name != "steady")
        shown = [f"{name} {seconds(value)}" for name, value in phases if value]
        shown += [] if self.steady is None else [f"steady {self.steady!r}"]
        return f"<Timing: {', '.join(shown) or 'nothing was timed'}>"

    @property
    def building(self) -> float:
        """Seconds that the caller waited for the program: trace, lower and compile without the overlapped part."""
        return self.trace + self.lower + self.compile - self.beside

    @property
    def typical(self) -> float:
        """Seconds on the device; of a repeated run the median."""
        return self.run if self.steady is None else self.steady.median


class Memory(Struct, frozen=True, forbid_unknown_fields=True):
    """Bytes by XLA's memory analysis of the program.

    `peak` is the device's own high-water mark since the process started, whatever else ran; None where it keeps none.
    """

    arguments: int
    outputs: int
    temporaries: int
    code: int
    peak: int | None = None

    def __repr__(self) -> str:
        amounts = ((name, getattr(self, name)) for name in self.__struct_fields__)
        return f"<Memory: {', '.join(f'{name} {bytes_(amount)}' for name, amount in amounts if amount is not None)}>"

    @property
    def analysed(self) -> int:
        """Arguments, outputs and temporaries together: an upper bound of what the program needs, by XLA's analysis."""
        return self.arguments + self.outputs + self.temporaries


_NAMES = ("vendor_id", "cpu family", "model", "CPU implementer", "CPU part")
# Instruction sets that decide how XLA vectorizes, and so in which order it sums; other CPU flags leave bits alone.
_VECTORS = ("asimd", "simd", "sse", "ssse", "avx", "fma", "f16c", "amx", "neon", "sve", "sme", "bf16", "i8mm", "fphp")


def environment(device: str) -> dict[str, object]:
    """The environment of a run on `device` (such as `cpu:0`), as JSON data.

    Keys: `versions` of jax, jaxlib and flax; `device_kind` as JAX names it (`NVIDIA H100 80GB HBM3`, `cpu`), None where
    there is no such backend; `processor` (see `processor`) and `threads` (of XLA), None unless it is a CPU.
    """
    return copy.deepcopy(_on(device.partition(":")[0]))  # a copy: the cached dict would be the caller's to change


@lru_cache(maxsize=8)
def _on(kind: str) -> dict[str, object]:
    """`environment` for a platform such as `cpu`."""
    try:
        device_kind = str(jax.devices(kind)[0].device_kind) if kind else None
    except RuntimeError:  # no such backend in this process
        device_kind = None
    flax_version = importlib.metadata.version("flax")  # without importing it
    return {
        "versions": {"jax": jax.__version__, "jaxlib": jaxlib_version.__version__, "flax": flax_version},
        "device_kind": device_kind,
        "processor": processor() if kind == "cpu" else None,
        "threads": threads() if kind == "cpu" else None,
    }


def threads() -> int:
    """The number of threads of XLA's CPU client: `NPROC` if that is set, else the CPUs that this process may use."""
    with contextlib.suppress(ValueError, KeyError):
        return int(os.environ["NPROC"])
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@lru_cache(maxsize=1)
def processor() -> str:
    """The processor's make with a digest of its vector instructions: `x86_64-GenuineIntel-6-143-5a1b9c02`.

    XLA compiles for the processor it runs on, so another one may sum in another order and differ in the last bits.
    """
    machine, rows = platform.machine() or "unknown", first_core()
    if not rows:
        return "-".join([machine, *re.findall(r"\w+", platform.processor())])
    make = [rows[name] for name in _NAMES if rows.get(name)]
    words = (rows.get("flags") or rows.get("Features") or "").split()
    vectors = " ".join(sorted(word for word in words if word.startswith(_VECTORS)))
    return "-".join([machine, *make, hashlib.sha256(vectors.encode()).hexdigest()[:8]])


@lru_cache(maxsize=1)
def first_core() -> dict[str, str]:
    """The fields of the first core in Linux's `/proc/cpuinfo`; empty elsewhere. Cached: callers must not change it."""
    try:
        with Path("/proc/cpuinfo").open(encoding="utf-8", errors="replace") as file:
            first = file.read(1 << 14).split("\n\n")[0]  # on machines with many cores the whole file takes long to read
    except OSError:
        return {}
    return {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in first.splitlines())}


def default_device() -> jax.Device:
    """The device on which JAX would place a new array now."""
    device: jax.Device | str | None = getattr(jax.config, "jax_default_device", None)
    # The setting may be a Device, a platform's name such as "cpu", or None for the default backend.
    return jax.local_devices(backend=device)[0] if device is None or isinstance(device, str) else device


def devices_of(tree: PyTree) -> str:
    """The devices that hold the arrays of `tree`, as text (see `name_devices`); without arrays the default device."""
    leaves = [leaf for leaf in jax.tree_util.tree_leaves(tree) if isinstance(leaf, jax.Array)]
    return name_devices({device for leaf in leaves for device in leaf.devices()} or {default_device()})


def name_devices(devices: Collection[jax.Device]) -> str:
    """`cpu:0` for one device; `gpu:0-7`, `gpu:0,2` or `cpu:0-3,2048-2051` for several."""
    return name_numbers(next(iter(devices)).platform, [device.id for device in devices])


def name_numbers(platform: str, numbers: Iterable[int]) -> str:
    """`name_devices` of a platform's devices by their numbers."""
    runs = list[list[int]]()
    for number in sorted(numbers):
        if not runs or number != runs[-1][-1] + 1:
            runs.append([])
        runs[-1].append(number)
    return f"{platform}:{','.join(f'{run[0]}-{run[-1]}' if len(run) > 2 else ','.join(map(str, run)) for run in runs)}"


ROW_ORDER = "row order"
"""The stream of a training's draw whose key shuffles the rows: no identifier, so that it is none of a model's."""
EVAL = "eval"
"""Stands before the names of the streams that a look takes: a step has others."""
STORED = 10_000
"""The most steps of which a saved notebook has the numbers."""


class Evaluation(Struct, frozen=True):
    """One look at the `--eval` data: loss and metrics over all of them, weighed by their examples.

    Attributes:
      step: how many steps were finished before it.
    """

    step: int
    loss: float
    metrics: Mapping[str, float]


class Task(Struct, frozen=True, forbid_unknown_fields=True):
    """What a training was asked to do, as it was written.

    Attributes:
      optimizer: the text of the optimizer, empty where it is not known.
      batch, epochs, steps, freeze: see `Session.train`.
      eval: the text of the `--eval` data, empty without any.
      arrays: its data are arrays, and no iterable of batches.
      once: its data are an iterator, which is gone through only once.
      on_host: its data are arrays of which the device is given a batch at a time.
      takes_loss: the optimizer's `update` takes the loss, too.
      parts: how many steps were finished when each of its commands ended, the present one left out.
      looks: how many looks at the `--eval` data there were by then.
    """

    optimizer: str = ""
    batch: int | None = None
    epochs: int | None = None
    steps: int | None = None
    eval: str = ""
    freeze: tuple[str, ...] = ()
    arrays: bool = True
    once: bool = False
    on_host: bool = False
    takes_loss: bool = False
    parts: tuple[int, ...] = ()
    looks: tuple[int, ...] = ()


class Curve(Struct, frozen=True, eq=False):
    """What a training has done so far.

    Attributes:
      losses: one for each finished step, float32.
      metrics: name → one for each finished step, float32.
      evals: the looks at the `--eval` data, in order.
      total: the steps that were asked for in all; None until the length of an iterable is known.
      epoch: the steps of one epoch; None where that is not known.
      examples: how many there were in the finished steps.
      seconds: the time of the finished steps, that of the looks included.
      group: how many steps one program does.
      task: what was asked for.
      stopped: empty for a training that has finished or is under way; `interrupted`, or why it ended, in one line.
    """

    losses: HostArray = np.zeros(0, np.float32)
    metrics: Mapping[str, HostArray] = {}
    evals: tuple[Evaluation, ...] = ()
    total: int | None = None
    epoch: int | None = None
    examples: int = 0
    seconds: float = 0.0
    group: int = 1
    stopped: str = ""
    task: Task = Task()

    def to_json(self) -> dict[str, object]:
        """The numbers as JSON data, null for one that is not finite.

        Of more than `STORED` steps only every n-th is there, the last among them: `every` is this n.
        """
        steps = len(self.losses)
        every = max(1, math.ceil(steps / STORED))
        chosen = slice((steps - 1) % every if steps else 0, None, every)
        looks = [
            {"step": look.step, "loss": _number(look.loss), "metrics": {k: _number(v) for k, v in look.metrics.items()}}
            for look in self.evals
        ]
        names = ("total", "epoch", "examples", "seconds", "group", "stopped")
        return {
            "steps": steps,
            "every": every,
            "losses": _numbers(self.losses[chosen]),
            "metrics": {name: _numbers(values[chosen]) for name, values in self.metrics.items()},
            "evals": looks,
            **{name: getattr(self, name) for name in names},
        }


def _number(value: float) -> float | None:
    # A browser does not read the NaN that Python writes into JSON.
    return value if math.isfinite(value) else None


def _numbers(values: HostArray) -> list[float | None]:
    """The shortest numbers that are these float32 values, read as float32: a half of the digits of their float64."""
    shortest: Iterable[str] = map(str, values)
    return [_number(float(text)) for text in shortest]
