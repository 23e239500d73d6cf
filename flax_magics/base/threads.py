"""Assignments that Ctrl-C cannot split, and worker threads, which leave the main thread free to be interrupted.

Python handles signals between bytecodes. `at_once` makes several assignments inside one C call, where there are none;
`uninterrupted` defers the signal during a block of Python code, which costs more.
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import contextvars
import functools
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import starmap
from operator import call
from types import FrameType
from typing import Any, ParamSpec, TypeAlias, TypeVar

import jax
from msgspec import Struct

from .types import PyTree

POLLED = 100e-6
"""Seconds for which a program is asked whether it is ready before the thread sleeps: as long as waking it up takes."""
LONG = 1e-3
"""Seconds from which on a program is not asked at all."""
_PROCESSORS = len(getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))(0))
_give_way: Callable[[], object] | None = getattr(os, "sched_yield", lambda: time.sleep(0)) if _PROCESSORS == 1 else None
"""With one processor, asking would keep the program from running: in between, that has its turn."""
Assignment = tuple[Any, ...]
"""A function implemented in C with its arguments, `(object.__setattr__, owner, name, value)` or `(setitem, items, key,
value)`; calling it runs no bytecode."""


def at_once(assignments: Iterable[Assignment]) -> None:
    """Makes all assignments, with no bytecode between one and the next: an interrupt comes before all or after all."""
    # `deque(maxlen=0)` exhausts an iterator in C. A loop, a comprehension or `all` would run bytecode.
    collections.deque(starmap(call, tuple(assignments)), maxlen=0)


class Interrupts:
    """A block in which Ctrl-C is noted, and raised where the block asks for it: a loop then stops between its steps.

    On other threads than the main one, which get no signals, it does nothing.
    """

    def __init__(self) -> None:
        self.signal: tuple[int, FrameType | None] | None = None
        """The interrupt that was noted."""
        self._handler: Callable[[int, FrameType | None], Any] | None = None
        self._opened = False

    def __enter__(self) -> Interrupts:
        handler = signal.getsignal(signal.SIGINT)
        # Only the main thread gets signals. A handler that is no callable ignores SIGINT, or was set outside of Python.
        if threading.current_thread() is threading.main_thread() and callable(handler):
            self._handler = handler
            signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        handler, self._handler = self._handler, None
        if handler is not None:
            signal.signal(signal.SIGINT, handler)
            if self.signal is not None and error is None:
                handler(*self.signal)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._opened and self._handler is not None:
            # What it raises may be dropped, as in a callback of the garbage collector: then the next check raises it.
            self.signal = number, frame
            self._handler(number, frame)
            self.signal = None
        elif self.signal is None:
            self.signal = number, frame

    def check(self) -> None:
        """Raises the interrupt that was noted, if one was."""
        if self.signal is not None and self._handler is not None:
            noted, self.signal = self.signal, None
            self._handler(*noted)

    @contextlib.contextmanager
    def opened(self) -> Iterator[None]:
        """A block inside in which Ctrl-C is raised at once, for what takes long and may be left anywhere."""
        self.check()
        self._opened = True
        try:
            yield
        finally:
            self._opened = False


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Defers Ctrl-C during the block and delivers it afterwards. On other threads than the main one it does nothing."""
    with Interrupts() as interrupts:
        try:
            yield
        finally:
            interrupts.check()


P = ParamSpec("P")
T = TypeVar("T")


class Overtaken(Exception):
    """Another thread has replaced what a result was worked out from: the result counts for nothing."""


def until_committed(method: Callable[P, T]) -> Callable[P, T]:
    """Has a method of a session begin anew as often as another thread has changed the session before it could."""

    @functools.wraps(method)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        while True:
            try:
                return method(*args, **kwargs)
            except Overtaken:
                continue

    return run


Future: TypeAlias = "concurrent.futures.Future[Any]"


class Workers:
    """A thread pool that starts work in the order it was submitted, on up to one thread per core; idle threads end.

    Unlike daemon threads these are joined at exit: cutting off an XLA compilation there aborts the process.
    """

    def __init__(self, threads: int | None = None) -> None:
        self._most = threads or os.cpu_count() or 1
        self._lock = threading.Lock()
        self._waiting: collections.deque[tuple[Future, Callable[[], object]]] = collections.deque()
        self._running = 0
        """Number of threads, each of which has or is about to take a task."""

    @property
    def busy(self) -> bool:
        """Whether any task is running or waiting."""
        with self._lock:
            return self._running > 0

    def submit(self, work: Callable[[], object]) -> Future:
        """Queues `work` and returns a future of its result."""
        future: Future = concurrent.futures.Future()
        with uninterrupted():  # an interrupt before the start of the thread would leave a future that is never filled
            with self._lock:
                self._waiting.append((future, work))
                start = self._running < self._most
                self._running += start
            if start:
                threading.Thread(target=self._work, name="flax_magics compile").start()
        return future

    def _work(self) -> None:
        """The body of a worker thread: takes tasks until none is waiting."""
        while True:
            with self._lock:
                if not self._waiting:
                    self._running -= 1  # under the same lock as the check: `submit` then starts another thread
                    return
                future, work = self._waiting.popleft()
            _fulfil(future, work)


def _fulfil(future: Future, work: Callable[[], object]) -> None:
    """Runs `work` and puts its result or its exception into `future`."""
    try:
        future.set_result(work())
    except BaseException as error:  # whatever it is, or whoever waits would wait forever
        future.set_exception(error)


def wait_for(future: Future) -> Any:
    """Waits for the result of a future, open to Ctrl-C; raises what the work raised."""
    # In slices, so that Python gets to run signal handlers in between.
    while not future.done():
        concurrent.futures.wait([future], timeout=0.2)
    return future.result()


class OneByOne:
    """A thread that makes calls in the order they were submitted, and does not keep Python from ending.

    For calls that may block for ever: a dispatch of a small program blocks as long as the program runs.
    """

    def __init__(self) -> None:
        self._calls: queue.SimpleQueue[tuple[Future, Callable[[], object]] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def submit(self, work: Callable[[], object]) -> Future:
        """Queues `work` and returns a future of its result."""
        if self._thread is None:
            context = contextvars.copy_context()
            self._thread = threading.Thread(target=context.run, args=(self._work,), daemon=True)
            self._thread.start()
        future: Future = concurrent.futures.Future()
        self._calls.put((future, work))
        return future

    def close(self) -> None:
        """Has the thread end after the calls that were submitted."""
        self._calls.put(None)

    def _work(self) -> None:
        while (task := self._calls.get()) is not None:
            _fulfil(*task)
            del task  # else its result would live until the next one


class Unfinished(Struct, eq=False):
    """The run that still occupies the device after an interrupt: XLA cannot cancel it, so the next run waits for it."""

    wait: Callable[[], object] | None = None
    """Blocks until the device has finished; None where it is idle."""

    def finish(self) -> None:
        """Blocks until the interrupted run has left the device. Its errors are dropped."""
        if self.wait is not None:
            with contextlib.suppress(Exception):  # the user has given this run up
                self.wait()
            self.wait = None


def all_ready(tree: PyTree) -> bool:
    """Whether all arrays in `tree` are computed."""
    for leaf in jax.tree_util.tree_leaves(tree):
        if isinstance(leaf, jax.Array) and not (hasattr(leaf, "is_ready") and leaf.is_ready()):
            return False
    return True


def smallest(result: PyTree) -> Callable[[], object] | None:
    """A function that blocks until a program's `result` is computed; None where the result has no array.

    Of the result it keeps only the smallest array alive: all outputs of a program become ready together.
    """
    arrays = [leaf for leaf in jax.tree_util.tree_leaves(result) if isinstance(leaf, jax.Array)]
    return min(arrays, key=lambda array: array.nbytes).block_until_ready if arrays else None


def wait_on(result: PyTree, unfinished: Unfinished) -> None:
    """Waits until the device has computed `result`, open to Ctrl-C: then `unfinished` waits for it."""
    try:
        jax.block_until_ready(result)
    except BaseException:
        unfinished.wait = smallest(result)  # so that the large outputs are freed
        raise


class Running:
    """A dispatched program. Its time ends when it was first seen to be ready, not when its run was worked out."""

    def __init__(self, result: PyTree, start: float, clock: Callable[[], float], unfinished: Unfinished) -> None:
        self.result, self._start, self._clock, self._unfinished = result, start, clock, unfinished
        self._seconds: float | None = None
        # All results of a program are ready together, and fail together. The first is the model's output.
        self._one: Any = result[0]
        if not hasattr(self._one, "is_ready"):
            self._one = next((leaf for leaf in jax.tree_util.tree_leaves(result) if hasattr(leaf, "is_ready")), None)

    def look(self) -> bool:
        """Notes the time if the device is done, and says whether it is."""
        if self._seconds is None and self._one is not None and self._one.is_ready():
            self._seconds = self._clock() - self._start
        return self._seconds is not None

    def finish(self, sleeps: Callable[[], object], expected: float = 0.0) -> float:
        """Waits for the device, and returns the seconds since the dispatch.

        Args:
          sleeps: called before the thread is put to sleep.
          expected: how many they will be. Where these are many, asking would take a processor from the program.
        """
        asked = 0.0 if expected > LONG else POLLED
        until: float | None = None
        while not self.look():
            now = time.perf_counter()
            until = now + asked if until is None else until
            if now >= until:
                sleeps()
                wait_on(self.result, self._unfinished)
                self._seconds = self._clock() - self._start
            elif _give_way is not None:
                _give_way()
        if self._one is not None:
            self._one.block_until_ready()  # raises the error of a program that failed
        assert self._seconds is not None
        return self._seconds


def forked_workers(data: object) -> int:
    """How many workers a `DataLoader` of torch's forks from this process; 0 for whatever else, and for other ways."""
    torch = sys.modules.get("torch.utils.data")
    if torch is None or not isinstance(data, torch.DataLoader) or not sys.platform.startswith("linux"):
        return 0
    import multiprocessing  # takes some milliseconds, and torch has it

    context = getattr(data, "multiprocessing_context", None)
    default = multiprocessing.get_start_method(allow_none=True) or multiprocessing.get_all_start_methods()[0]
    method = default if context is None else context.get_start_method()
    return int(data.num_workers) if method == "fork" else 0


def elsewhere(
    function: Callable[..., T], arguments: PyTree, unfinished: Unfinished, settings: Callable[[], object]
) -> T:
    """Calls `function(*arguments)` on another thread, so that Ctrl-C takes effect during a call that blocks in C.

    The hop costs 0.1 ms. A new thread sees JAX's global settings only: where this thread has others, set by a `with` of
    the user's, the function is called here instead.

    Args:
      arguments: a pytree of arrays and numbers.
      settings: returns the JAX settings of the thread that calls it.
    """
    # Numbers become arrays here: their dtype depends on this thread's settings (x64, dtype promotion).
    arguments = jax.tree_util.tree_map(
        lambda leaf: leaf if isinstance(leaf, jax.Array) else jax.numpy.asarray(leaf), arguments
    )
    here = settings()
    future: Future = concurrent.futures.Future()

    def call_there() -> object:
        return function(*arguments) if settings() == here else _HERE

    # Since version 7 ipykernel finds the cell to which printed output belongs in a context variable.
    context = contextvars.copy_context()
    thread = threading.Thread(target=context.run, args=(_fulfil, future, call_there), name="flax_magics run")
    with uninterrupted():  # an interrupt before the start of the thread would leave a future that is never filled
        unfinished.wait = future.result
        thread.start()
    # An interrupt leaves this loop, and `unfinished.wait` set: the next run waits for the thread.
    while not future.done():
        concurrent.futures.wait([future], timeout=0.2)
    unfinished.wait = None
    result: T = future.result()
    return function(*arguments) if result is _HERE else result


_HERE = object()
"""Returned by the other thread where its JAX settings differ, so that the call is made on the calling thread."""
