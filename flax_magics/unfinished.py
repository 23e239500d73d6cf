"""What goes on after an interrupt: XLA cannot cancel a run, and a run with host callbacks holds the interrupt back."""

from __future__ import annotations

import concurrent.futures
import contextlib
import contextvars
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax

from .uninterrupted import uninterrupted


@dataclass
class Unfinished:
    """The run that the device is busy with, from its dispatch until somebody has waited for it."""

    wait: Callable[[], Any] | None = None
    """Returns once the device has finished; None where nobody was interrupted."""

    def finish(self) -> None:
        """Waits for what an interrupted run has left behind; its errors are nobody's any more."""
        if self.wait is not None:
            with contextlib.suppress(Exception):  # of a run that the user has given up
                self.wait()
            self.wait = None


def smallest(result: Any) -> Callable[[], Any] | None:
    """Waits for all of a program's result, of which it holds the smallest array alone; None where there is none."""
    arrays = [leaf for leaf in jax.tree_util.tree_leaves(result) if isinstance(leaf, jax.Array)]
    least: Any = min(arrays, key=lambda array: array.nbytes, default=None)
    return None if least is None else least.block_until_ready


def elsewhere(function: Callable[..., Any], arguments: Any, unfinished: Unfinished, settings: Callable[[], Any]) -> Any:
    """`function(*arguments)` on another thread, so that an interrupt returns at once where the call itself would hold it.

    It costs 0.1 ms. Of JAX's settings another thread has the global ones alone: where this thread has others, by a
    `with` of the user's, the call is made here.

    Args:
      arguments: a pytree; what is no array in it becomes one here, under this thread's settings.
      settings: gives those of the thread that asks.
    """
    arguments = jax.tree_util.tree_map(_array, arguments)
    here = settings()
    future: concurrent.futures.Future[Any] = concurrent.futures.Future()

    def work() -> None:
        try:
            future.set_result(function(*arguments) if settings() == here else _HERE)
        except BaseException as error:
            future.set_exception(error)

    # The context carries the cell that output belongs to, in ipykernel 7 and after.
    context = contextvars.copy_context()
    thread = threading.Thread(target=context.run, args=(work,), name="flax_magics run")
    with uninterrupted():  # a future that no thread will fill would be waited for forever
        unfinished.wait = future.result
        thread.start()
    while not future.done():
        concurrent.futures.wait([future], timeout=0.2)
    unfinished.wait = None
    result = future.result()
    return function(*arguments) if result is _HERE else result


_HERE = object()


def _array(leaf: Any) -> Any:
    return leaf if isinstance(leaf, jax.Array) else jax.numpy.asarray(leaf)
