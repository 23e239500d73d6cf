"""Tracing, lowering and compiling of calls, with a cache of programs.

A program is looked up by three keys in turn. First by the call (model fingerprint, mode, argument shapes, JAX's
settings): a hit skips tracing; models that cannot be fingerprinted have no such key. Then by the equations of the
trace: an edit that computes the same is neither lowered nor compiled again. Last by the lowered program's text, for
programs whose equations cannot be compared.
"""

from __future__ import annotations

import os
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Container, Hashable, Mapping
from pathlib import Path

import jax
from msgspec import Struct
from msgspec.structs import replace

from ..base.measures import Memory, Timing, default_device, name_devices
from ..base.private import hide_frames
from ..base.processes import DEADLINE
from ..base.threads import Future, Running, Unfinished, elsewhere, smallest, wait_for, wait_on
from ..base.types import PyTree
from ..code.contents import Structure
from ..code.inventory import Inventory
from ..models.base import CallTrace, ForeignOutput, Needs, Variables
from ..rng.keys import SeenKeys
from ..run import Cause, Run
from .compiler import Compiled, Compiler, Units, keep, memory_of
from .disk_cache import (
    Executable,
    call_key,
    devices_of,
    digest_of,
    equations_key,
    jax_settings,
    looks,
    placed,
    program_key,
)
from .trace import PROGRAM_FILE, Traced, TracedCall, TraceRequest, trace_call

FOLDER = f"{Path(__file__).parent.parent}{os.sep}"
"""Of this package."""
KEPT = 128
"""The most programs in the cache, evicted least recently used first. Even a small one takes most of a megabyte."""

LEFT = 4
"""The most finished compilations that are kept although their run was interrupted and not repeated so far."""

OnPhase = Callable[[str], None]
"""Called with what is being done, as it begins; here with `tracing`, `lowering` or `compiling`."""
Trees = tuple[Structure, Structure]
"""Structures of a program's arguments and of its results."""


class Program(Struct, frozen=True, weakref=True):
    """An executable, with what was learned from its trace."""

    executable: Executable
    """`executable(variables, keys, arguments) -> (output, updates)`, asynchronous; `keys`: stream → uint32 key data."""
    needs: Needs
    trace: CallTrace
    device: str
    memory: Memory | None
    digest: str
    """Of its text, equal in all processes that lower the same."""
    effects: bool
    """It has host callbacks or other effects. JAX dispatches it synchronously, so Ctrl-C has to wait until it ends."""


class BuiltProgram(Struct, frozen=True):
    """The program for a call, and where it came from.

    Attributes:
      key: its `call_key`; None where tracing again could give another program.
      request: what it was made for.
      program: None where the model runs eagerly.
      origin: `compiled`, `disk cache`, `reused` or `eager`.
      timing: seconds of each phase, 0.0 for those that did not happen.
      resumed: an interrupted run had begun to compile it.
      reason, causes: why it had to be compiled, as a sentence and in parts; empty where it was not.
      scalars: argument that is a Python number now and was an array in the model's last run → its dtype then.
      digest: see `Program`.
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
    digest: str = ""


class Compiling(Struct, frozen=True):
    """A lowered program while it is compiled, of a call or of any other function.

    Attributes:
      executable: None while it is being compiled; then `future` is the compilation.
      timing: of what has made it so far.
      key: in `by_text` and `compiling`.
      trees: the structures of arguments and results; None where no other call with the same key may use the executable.
      digest: see `Program`.
      resumed: an interrupted run had begun to compile it.
    """

    executable: Executable
    future: Future | None = None
    timing: Timing = Timing()
    key: Hashable = None
    trees: Trees | None = None
    digest: str = ""
    resumed: bool = False


class PendingProgram(Struct, frozen=True):
    """The program of a call that is traced and lowered; `key`: its `call_key`, None where that cannot be told."""

    key: Hashable | None
    call: TracedCall[Program]
    compiling: Compiling

    @property
    def request(self) -> TraceRequest:
        """The completed request that it is made for."""
        return self.call.request

    @property
    def digest(self) -> str:
        """See `Program`."""
        return self.compiling.digest


class ProgramCache:
    """The compiled programs of a session, and the compilations under way. `clock` returns seconds."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock
        self.by_call: OrderedDict[Hashable, Program] = OrderedDict()
        """`call_key` → program, least recently used first."""
        self.by_text: OrderedDict[Hashable, tuple[Executable, Trees]] = OrderedDict()
        """Key of the lowered program → executable and structures, least recently used first."""
        self.by_equations: OrderedDict[Hashable, tuple[Hashable, Trees]] = OrderedDict()
        """Equations of a trace → key in `by_text` of the program lowered from them, and its structures."""
        self.by_step: OrderedDict[Hashable, tuple[tuple[str, Hashable], Executable, str, bool]] = OrderedDict()
        """Key of a training's step → (model, `call_key` of the loss), executable, digest, whether the optimizer takes the
        loss; least recently used first."""
        self.compiling: dict[Hashable, Future] = {}
        """Key of the lowered program → future of its `Compiled`; left here when the waiting run is interrupted."""
        self.parts: dict[str, LastCall] = {}
        """Model → its last run."""
        self.purposes: dict[str, deque[ProgramSpec]] = {}
        """Model → descriptions of its last programs, newest last."""
        self.unfinished = Unfinished()
        for place in (FOLDER, PROGRAM_FILE):
            hide_frames(place)
        self.compiler = Compiler()
        self.units = Units(self.compiler)

    def __len__(self) -> int:
        return len(self.by_text)

    def find(self, key: Hashable | None) -> Program | None:
        """The program for a `call_key`; None if none is cached or the key is None."""
        program = None if key is None else self.by_call.get(key)
        if program is not None:
            self.by_call.move_to_end(key)
        return program

    def run(self, program: Program, variables: Variables, keys: Variables, dynamic: Variables) -> PyTree:
        """Runs a program and returns `(output, updates)` once the device has finished.

        Ctrl-C takes effect at once, but the device goes on: `unfinished` then waits for it. `keys`: stream → key data,
        as `Draw.words` returns it.
        """
        # Such a program is dispatched synchronously, deaf to Ctrl-C; others need no thread, whose hop costs 0.1 ms.
        if program.effects:

            def whole(*arguments: PyTree) -> PyTree:
                result = program.executable(*arguments)
                jax.block_until_ready(result)
                jax.effects_barrier()  # outputs may be ready before the last host callback has run
                return result

            return elsewhere(whole, (variables, keys, dynamic), self.unfinished, jax_settings)
        result = program.executable(variables, keys, dynamic)
        wait_on(result, self.unfinished)
        return result

    def begin(self, program: Program, variables: Variables, keys: Variables, dynamic: Variables) -> Running:
        """Dispatches a program without effects; see `run` for the arguments."""
        start = self.clock()
        result = program.executable(variables, keys, dynamic)
        try:
            return Running(result, start, self.clock, self.unfinished)
        except BaseException:
            self.unfinished.wait = smallest(result)
            raise

    def start(self, request: TraceRequest, phase: OnPhase, since: float | None = None) -> PendingProgram | BuiltProgram:
        """Finds the program of a call, or traces it and starts to compile it on another thread; see `finish`.

        Nothing is compiled if a program of the same equations, or with the same lowered text, is cached or being
        compiled. An interrupted run thus leaves its compilation to the next one.

        Args:
          phase: called with the name of each phase as it begins.
          since: when tracing began, if that was before this call.
        """
        key: Hashable | None = None
        start = since

        def find(request: TraceRequest) -> Program | None:
            nonlocal key, start
            key = call_key(request)
            program = self.find(key)
            if program is None:
                self.compiler.begin_to_load(looks(request))
                phase("tracing")
                start = self.clock() if start is None else start
            return program

        call = trace_call(request, find=find)
        request, traced = call.request, call.traced
        if call.known is not None:
            return BuiltProgram(key, request, call.known, digest=call.known.digest)
        if call.trace.foreign:
            raise ForeignOutput(call.trace.foreign)
        assert start is not None
        equations = equations_key(traced, request)
        timing = Timing(trace=self.clock() - start)
        text_key, trees = self.by_equations.get(equations, (None, None))
        executable, future = self._executable(text_key, trees), self.compiling.get(text_key)
        if executable is not None or future is not None:
            self.by_equations.move_to_end(equations)
            digest, resumed = digest_of(text_key, None), future is not None
            return PendingProgram(key, call, Compiling(executable, future, timing, text_key, trees, digest, resumed))
        begun = self.begin_compiling(traced, phase, placed(request), looks=looks(request), otherwise=key)
        if begun.trees is not None and equations is not None:
            keep(self.by_equations, equations, (begun.key, begun.trees), KEPT)
        return PendingProgram(key, call, replace(begun, timing=replace(begun.timing, trace=timing.trace)))

    def _executable(self, text_key: Hashable, trees: Trees | None) -> Executable:
        """The cached executable of a lowered program, None where there is none with these structures."""
        # Static data of the results is no part of the text: a hit with other trees would return the other's.
        executable, known = self.by_text.get(text_key, (None, None))
        if executable is None or known != trees:
            return None
        self.by_text.move_to_end(text_key)
        return executable

    def finish(self, pending: PendingProgram | BuiltProgram, phase: OnPhase) -> BuiltProgram:
        """Waits until `pending` is compiled, and caches it."""
        if isinstance(pending, BuiltProgram):
            return pending
        call, begun = pending.call, pending.compiling
        executable, origin, timing = self.finish_compiling(begun, phase)
        timing = replace(timing, compile=timing.compile + timing.beside)
        effects = bool(call.traced.jaxpr.effects) or begun.trees is None
        known = next((one for one in self.by_call.values() if one.executable is executable), None)
        if known is None:
            device = name_devices(devices_of(executable) or {default_device()})
            known = Program(executable, call.needs, call.trace, device, memory_of(executable), begun.digest, effects)
        program = replace(known, needs=call.needs, trace=call.trace, digest=begun.digest, effects=effects)
        if pending.key is not None:
            keep(self.by_call, pending.key, program, KEPT)
        return BuiltProgram(pending.key, pending.request, program, origin, timing, begun.resumed)

    def let_go(self, models: Container[str]) -> int:
        """Drops programs of other models than `models`, of earlier editions of these, of runs that were given up, and of
        trainings before a model's last.

        Returns how many. A program that is wanted again is compiled again, or read from the disk cache.
        """
        self.unfinished.finish()
        for text_key in [key for key, future in self.compiling.items() if future.done()]:
            self.compiling.pop(text_key, None)
        current: set[Hashable] = set()
        for name in [*self.purposes]:
            if name not in models:
                del self.purposes[name]
                self.parts.pop(name, None)
                continue
            # The edition in each mode: that of the last run, else that of the newest program.
            last, editions = self.parts.get(name), dict[str, bytes | None]()
            specs = [*reversed(self.purposes[name])]
            specs.sort(key=lambda spec: last is None or spec.key != last.key)
            current |= {spec.key for spec in specs if editions.setdefault(spec.mode, spec.edition) == spec.edition}
        old = [self.by_call.pop(key, None) for key in [*self.by_call] if key not in current]
        dropped = {id(program.executable) for program in old if program is not None}
        dropped -= {id(program.executable) for program in [*self.by_call.values()]}
        latest = {name: loss for (name, loss), *_ in self.by_step.values() if name in models}
        steps = [key for key, ((name, loss), *_) in self.by_step.items() if name not in latest or latest[name] != loss]
        dropped |= {id(self.by_step.pop(key)[1]) for key in steps}
        for text_key in [key for key, (executable, _) in [*self.by_text.items()] if id(executable) in dropped]:
            self.by_text.pop(text_key, None)
        return len(dropped)

    def begin_compiling(
        self, traced: Traced, phase: OnPhase, where: Hashable, *, looks: Hashable = None, otherwise: Hashable = None
    ) -> Compiling:
        """Lowers a traced function, and starts to compile it unless it is cached or being compiled.

        Args:
          where: the shardings of committed arguments.
          looks: of the call that it is the program of, see `Compiler.start`.
          otherwise: a key for it where its text gives none.
        """
        phase("lowering")
        start = self.clock()
        lowered = traced.lower()
        shared_key = program_key(traced, lowered, where)
        timing = Timing(lower=self.clock() - start)
        # The text numbers host callbacks and does not name them: programs of one text may call different functions.
        trees = None if shared_key is None else (Structure.of(lowered.in_tree), Structure.of(lowered.out_tree))
        key = shared_key or otherwise or object()
        executable, future = self._executable(key, trees), self.compiling.get(key)
        resumed = future is not None
        if executable is None and future is None:
            # Finished compilations of interrupted runs that were never repeated would pile up.
            for forgotten in [key for key, future in self.compiling.items() if future.done()][:-LEFT]:
                self.compiling.pop(forgotten, None)
            future = self.compiling[key] = self.compiler.start(lowered, shared_key, looks)
        return Compiling(executable, future, timing, key, trees, digest_of(shared_key, lowered), resumed)

    def finish_compiling(self, begun: Compiling, phase: OnPhase) -> tuple[Executable, str, Timing]:
        """Waits until it is compiled, and caches it.

        Returns the executable, whether it was `compiled`, `disk cache` or `reused`, and the times: of compiling the seconds
        that this took, and as `beside` those from before it.
        """
        if begun.executable is not None:
            return begun.executable, "reused", begun.timing
        assert begun.future is not None
        phase("compiling")
        start = self.clock()
        # Another thread may wait for the same one, and be the first to take it out of those under way.
        try:
            compiled: Compiled = wait_for(begun.future)
        except Exception:  # not on an interrupt: then the compilation goes on for the next run
            self.compiling.pop(begun.key, None)
            raise
        waited = self.clock() - start
        self.compiling.pop(begun.key, None)
        # `compiled.seconds` is in time of the machine's clock, which a test's own clock does not follow.
        beside = max(0.0, compiled.seconds - waited) if self.clock is time.perf_counter else 0.0
        if begun.trees is not None:
            keep(self.by_text, begun.key, (compiled.executable, begun.trees), KEPT)
        return compiled.executable, compiled.origin, replace(begun.timing, compile=waited, beside=beside)


class Services(Struct, eq=False):
    """What all commands of a session share.

    Attributes:
      programs: the program cache.
      clock: returns seconds.
      on_phase: called with what is being done, as it begins.
      seen: keys that were met before, for notes on reused keys.
      on_progress: called at most twice a second by a training under way, with the Run of what it has done so far.
      deadline: seconds that the processes of a job wait for each other's answer.
    """

    programs: ProgramCache
    clock: Callable[[], float]
    on_phase: OnPhase
    seen: SeenKeys
    on_progress: Callable[[Run], None] = lambda run: None
    deadline: float = DEADLINE


class LeafSpec(Struct, frozen=True):
    """What a program depends on of one argument leaf or variable, for comparison with an earlier program.

    Attributes:
      kind: `array`, `number` (a traced Python number) or `static`.
      text: `float32[2,4]`, `a Python float`, or the static value.
      shape: of an array.
      weak: its dtype is weak.
      where: the devices that it was placed on, empty if it is not committed.
      sharding: how it was placed there; None if it is not committed.
    """

    kind: str
    text: str
    shape: tuple[int, ...] = ()
    weak: bool = False
    where: str = ""
    sharding: object = None

    @property
    def dtype(self) -> str:
        """The dtype of an array: `float32`."""
        return self.text.partition("[")[0]


class LastCall(Struct, frozen=True):
    """A model's last run, with which its next one is compared: method, kind of each argument leaf, and `call_key`."""

    method: tuple[str, ...]
    kinds: Mapping[str, str]
    """Leaf → the dtype of an array, or `number`, or `static`."""
    key: Hashable | None


class ProgramSpec(Struct, frozen=True):
    """A readable description of all that a program was made for, to say later why another one is new.

    Attributes:
      key: the `call_key`, None where that cannot be told.
      edition: fingerprint of the model in its mode.
      structures: parameter → structure of its argument.
      held: structure of the variables.
      static: parameter → static fields inside its argument; held_static: those inside the variables.
      options: the command's option → its value as text.
      settings: settings of JAX and Flax by name.
      context: all settings of JAX, including those without a name.
      keys: the PRNG implementation.
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
