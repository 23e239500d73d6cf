"""Trace, lower, compile; and programs kept by what they compute.

A program is looked up three times. First by what the call is made of (the model's fingerprint, mode, argument shapes,
JAX's settings): a hit skips tracing, and is offered only for models whose whole source could be fingerprinted. Then by the
equations of its trace, so that an edit which computes the same thing is traced, but neither lowered nor compiled again.
Last by the lowered program's own text, which tells what the equations leave open.
"""

from __future__ import annotations

import os
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import jax
from msgspec import Struct
from msgspec.structs import replace

from ..base.measures import Memory, Timing, default_device, name_devices
from ..base.private import hide_frames
from ..base.threads import Future, Unfinished, elsewhere, smallest, wait_for
from ..base.types import PyTree
from ..code.contents import Structure, Unknown
from ..code.fingerprint import fingerprint
from ..code.inventory import Inventory
from ..code.library import library
from ..models.base import CallTrace, ForeignOutput, Needs, Variables
from ..models.calls import signature_of
from ..rng.keys import SeenKeys
from ..run import Cause
from .compiler import (
    Compiled,
    Compiler,
    Executable,
    Units,
    devices_of,
    hashable,
    jax_settings,
    keep,
    program_key,
    settings,
)
from .jaxpr import identity
from .limits import memory_of
from .trace import PROGRAM_FILE, Traced, TracedCall, TraceRequest, trace_call

FOLDER = f"{Path(__file__).parent.parent}{os.sep}"
"""Of this package."""
KEPT = 128
"""Programs kept at most, the least recently used dropped first. The smallest takes most of a megabyte."""

LEFT = 4
"""Compilations kept at most that were interrupted, have ended since, and that no run has come back for."""


OnPhase = Callable[[str], None]
Trees = tuple[Structure, Structure]
"""How a program's arguments and its results are put together."""


class Program(Struct, frozen=True, weakref=True):
    """An executable and what its trace told about it."""

    executable: Executable
    """`executable(variables, keys, arguments) -> (output, updates)`, dispatched; `keys` are key data by stream."""
    needs: Needs
    trace: CallTrace
    device: str
    memory: Memory | None
    effects: bool
    """It calls back into Python, or has other effects: such a program holds an interrupt for as long as it runs."""


class BuiltProgram(Struct, frozen=True):
    """A program and where it came from.

    Attributes:
      key: what it is kept by, None where tracing again could give another.
      request: what it was made for.
      program: None where the model runs op by op.
      origin: `compiled`, `disk cache`, `reused` or `eager`.
      timing: of its phases; those that did not happen took no time.
      resumed: an interrupted run had begun to compile it.
      reason, causes: why it is new.
      scalars: arguments that are Python numbers, and were arrays in the model's run before → their dtypes then.
    """

    key: Hashable | None
    request: TraceRequest
    program: Program | None
    origin: str = "reused"
    timing: Timing = Timing()
    resumed: bool = False
    reason: str = ""
    causes: tuple[Cause, ...] = ()
    scalars: Mapping[str, str] = {}


class PendingProgram(Struct, frozen=True):
    """A program that has been traced and lowered, and is being compiled; `executable` is None until then."""

    key: Hashable | None
    call: TracedCall[Program]
    trees: Trees
    text_key: Hashable
    shareable: bool
    executable: Executable
    timing: Timing
    resumed: bool

    @property
    def request(self) -> TraceRequest:
        """What it is made for."""
        return self.call.request


@dataclass
class ProgramCache:
    """The compiled programs of a session, and the compilations that are under way. `clock` gives seconds."""

    clock: Callable[[], float]
    by_call: OrderedDict[Hashable, Program] = field(default_factory=OrderedDict)
    by_text: OrderedDict[Hashable, tuple[Executable, Trees]] = field(default_factory=OrderedDict)
    by_equations: OrderedDict[Hashable, tuple[Hashable, Trees]] = field(default_factory=OrderedDict)
    """equations → what the program lowered from them is kept by in `by_text`, and its trees."""
    compiling: dict[Hashable, Future] = field(default_factory=dict)
    parts: dict[str, LastCall] = field(default_factory=dict)
    """model → its last run."""
    purposes: dict[str, deque[ProgramSpec]] = field(default_factory=dict)
    """model → what its last programs were made for, newest last."""
    unfinished: Unfinished = field(default_factory=Unfinished)

    def __post_init__(self) -> None:
        for place in (FOLDER, PROGRAM_FILE):
            hide_frames(place)
        self.compiler = Compiler()
        self.units = Units(self.compiler)

    def __len__(self) -> int:
        return len(self.by_text)

    def find(self, key: Hashable | None) -> Program | None:
        """The program made for exactly this call; None if there is none, or the key is None."""
        program = None if key is None else self.by_call.get(key)
        if program is not None:
            self.by_call.move_to_end(key)
        return program

    def run(self, program: Program, variables: Variables, keys: Variables, dynamic: Variables) -> PyTree:
        """`(output, updates)` once the device has finished. An interrupt returns at once; the run goes on.

        `keys`: key data by stream, as `Draw.words` gives it.
        """
        if program.effects:

            def whole(*arguments: PyTree) -> PyTree:
                result = program.executable(*arguments)
                jax.block_until_ready(result)
                jax.effects_barrier()  # host callbacks are through, too
                return result

            return elsewhere(whole, (variables, keys, dynamic), self.unfinished, jax_settings)
        result = program.executable(variables, keys, dynamic)
        self.unfinished.wait = partial(jax.block_until_ready, result)
        try:
            jax.block_until_ready(result)
        except BaseException:
            self.unfinished.wait = smallest(result)
            raise
        self.unfinished.wait = None
        return result

    def start(self, request: TraceRequest, phase: OnPhase, since: float | None = None) -> PendingProgram | BuiltProgram:
        """Finds the program of a call, or traces it, and begins to compile unless a program of the same equations or,
        lowered, of the same text is kept.

        `phase` is told the name of each phase as it begins; `since` is when tracing began, if that was before.
        Compiling happens on another thread, so that an interrupt returns at once; what it had begun is finished and used
        when it is asked for again.
        """
        key: Hashable | None = None
        start = since

        def find(request: TraceRequest) -> Program | None:
            nonlocal key, start
            key = call_key(request)
            program = self.find(key)
            if program is None:
                phase("tracing")
                start = self.clock() if start is None else start
            return program

        call = trace_call(request, find=find)
        request, traced = call.request, call.traced
        if call.known is not None:
            return BuiltProgram(key, request, call.known)
        if call.trace.foreign:
            raise ForeignOutput(call.trace.foreign)
        assert start is not None
        equations = _equations(traced, request)
        timing, shareable, resumed = Timing(trace=self.clock() - start), True, True
        text_key, trees = self.by_equations.get(equations, (None, None))
        executable = self._executable(text_key, trees)
        if executable is not None or text_key in self.compiling:
            self.by_equations.move_to_end(equations)
        else:
            phase("lowering")
            start = self.clock()
            lowered = traced.lower()
            shared_key = program_key(traced, lowered, placed(request))
            timing = replace(timing, lower=self.clock() - start)
            # Host callbacks are numbered in the text, not named: two programs with the same text may call two functions.
            shareable = shared_key is not None
            text_key = shared_key or key or object()
            trees = (Structure.of(lowered.in_tree), Structure.of(lowered.out_tree))
            if shareable and equations is not None:
                keep(self.by_equations, equations, (text_key, trees), KEPT)
            executable = self._executable(text_key, trees)
            resumed = text_key in self.compiling
            if executable is None and not resumed:
                # Those that were interrupted, are done, and that nobody came back for are forgotten, but for the last few.
                for forgotten in [key for key, future in self.compiling.items() if future.done()][:-LEFT]:
                    del self.compiling[forgotten]
                self.compiling[text_key] = self.compiler.start(lowered, shared_key)
        assert trees is not None  # they are kept with the program's text
        return PendingProgram(key, call, trees, text_key, shareable, executable, timing, resumed)

    def _executable(self, text_key: Hashable, trees: Trees | None) -> Executable:
        """The executable of a lowered program whose trees are these, None where none is kept."""
        executable, known = self.by_text.get(text_key, (None, None))
        if executable is None or known != trees:
            return None
        self.by_text.move_to_end(text_key)
        return executable

    def finish(self, pending: PendingProgram | BuiltProgram, phase: OnPhase) -> BuiltProgram:
        """Waits until `pending` is compiled, and keeps it."""
        if isinstance(pending, BuiltProgram):
            return pending
        origin, timing, text_key, executable = "reused", pending.timing, pending.text_key, pending.executable
        if executable is None:
            phase("compiling")
            start = self.clock()
            try:
                compiled: Compiled = wait_for(self.compiling[text_key])
            except Exception:  # an interrupt leaves it there
                del self.compiling[text_key]
                raise
            waited = self.clock() - start
            del self.compiling[text_key]
            executable, origin = compiled.executable, compiled.origin
            # The threads go by the machine's clock, which cannot be held against another.
            beside = max(0.0, compiled.seconds - waited) if self.clock is time.perf_counter else 0.0
            timing = replace(timing, compile=waited + beside, beside=beside)
            if pending.shareable:
                keep(self.by_text, text_key, (executable, pending.trees), KEPT)
        call, effects = pending.call, bool(pending.call.traced.jaxpr.effects) or not pending.shareable
        device = name_devices(devices_of(executable) or {default_device()})
        program = Program(executable, call.needs, call.trace, device, memory_of(executable), effects)
        if pending.key is not None:
            keep(self.by_call, pending.key, program, KEPT)
        return BuiltProgram(pending.key, pending.request, program, origin, timing, pending.resumed)


@dataclass
class Services:
    """What every command of a session works with.

    Attributes:
      clock: gives seconds.
      on_phase: told what is being done, as it begins.
    """

    programs: ProgramCache
    clock: Callable[[], float]
    on_phase: OnPhase
    seen: SeenKeys


def call_key(request: TraceRequest) -> Hashable | None:
    """Equal keys mean that tracing would give the same program; None if that cannot be told."""
    arguments = request.arguments
    model, static = request.model.cache_key(), fingerprint(arguments.static)
    leaves, treedef = jax.tree_util.tree_flatten(request.variables)
    passed, variables = Structure.of(arguments.treedef), Structure.of(treedef)
    state = settings()
    # What is unknown now cannot be compared with what it will be.
    if None in (model, static, passed.contents, variables.contents) or any(isinstance(s, Unknown) for s in state[1]):
        return None
    call = (request.name, request.method, request.mutable, request.mode == "train", request.keyed)
    draw = (request.draw.impl, request.draw.size)
    types = (tuple(map(signature_of, arguments.dynamic.values())), tuple(map(signature_of, leaves)))
    trees = (passed, arguments.traced, variables)
    return hashable((*call, *draw, *types, *trees, model, static, state, library.edition))


def _equations(traced: Traced, request: TraceRequest) -> Hashable | None:
    """What tells a traced program from others before it is lowered; None where only the lowered text can tell."""
    equations = identity(traced.jaxpr)
    trees = (Structure.of(traced.in_tree), Structure.of(jax.tree_util.tree_structure(traced.out_info)))
    return equations and (equations, trees, request.name, jax_settings(), jax.default_backend(), placed(request))


def placed(request: TraceRequest) -> tuple[object, ...]:
    """The devices of the arguments that the user placed: they decide where the results are, and are part of the program."""
    leaves = jax.tree_util.tree_leaves((request.variables, request.arguments.dynamic))
    return tuple(signature_of(leaf)[-1] for leaf in leaves)


class LeafSpec(Struct, frozen=True):
    """One argument or variable, as far as a program depends on it.

    Attributes:
      kind: `array`, `number` (of Python, traced) or `static`.
      text: `float32[2,4]`, `a Python float`, or the value.
      weak: its dtype gives way to others; `where`: the devices that it was placed on, empty if nobody chose.
    """

    kind: str
    text: str
    shape: tuple[int, ...] = ()
    weak: bool = False
    where: str = ""

    @property
    def dtype(self) -> str:
        """The dtype of an array: `float32`."""
        return self.text.partition("[")[0]


class LastCall(Struct, frozen=True):
    """What the next run of a model is compared with: what was called, and the kind of each argument."""

    method: tuple[str, ...]
    kinds: Mapping[str, str]
    """An array's is its dtype; `number` and `static` are the others."""
    key: Hashable | None


class ProgramSpec(Struct, frozen=True):
    """What a program was made for.

    Attributes:
      key: of the call, None where that cannot be told.
      edition: fingerprint of the model in its mode.
      structures: how each argument is put together, by the parameter's name.
      held: how the variables are put together.
      static, held_static: their static fields, by the names that a person knows; of the arguments one by one.
      options: of the command, as they are written.
      settings: of JAX and Flax, by name; `context`: those of JAX that have no name, too.
    """

    key: Hashable | None
    method: tuple[str, ...]
    mode: str
    edition: bytes | None
    inventory: Inventory
    arguments: Mapping[str, LeafSpec]
    structures: Mapping[str, Structure]
    variables: Mapping[str, LeafSpec]
    held: Structure
    static: Mapping[str, Inventory]
    held_static: Inventory
    options: Mapping[str, str]
    settings: Mapping[str, object]
    context: tuple[object, ...]
    keys: str
