"""The data of a training: arrays that are shuffled and cut into batches, or an iterable of batches."""

from __future__ import annotations

import queue
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from msgspec import Struct

from ..base.digest import kind_of
from ..base.text import plural
from ..base.types import HostArray, PyTree
from ..errors import FlaxMagicsError, written
from ..line.call import plain_name
from ..line.expression import without_option

AHEAD = 2
"""How many batches of an iterable are fetched ahead of the step that takes them."""


class Batch(Struct, frozen=True):
    """What one step takes.

    Attributes:
      rows: indices into the arrays, int32; None where the batch is there itself.
      tree: the batch; None where it is taken from the arrays by `rows`, in the program.
      examples: their number.
      steps: how many steps take it; `rows` then has a row for each, if they are more than one.
    """

    rows: HostArray | None
    tree: PyTree
    examples: int
    steps: int = 1


class ArrayData:
    """A tree of arrays with one leading axis, on the device.

    Args:
      text: the data as they are written in the call.
      batch: how many rows a step takes; None for all of them, unshuffled, in each step.

    Attributes:
      key: its fold by the number of an epoch shuffles the rows in that.
    """

    exact = True
    """The batches are a function of the step's number."""
    once = False
    key: jax.Array

    def __init__(self, text: str, tree: PyTree, batch: int | None) -> None:
        self.size = _rows_in(text, tree)
        self.tree = jax.tree_util.tree_map(jnp.asarray, tree)
        self._batch = batch
        self._epoch, self._order = -1, np.zeros(0, np.int32)
        self._following: tuple[int, jax.Array] | None = None
        """An epoch, and its order, which the device makes beside the steps before it."""

    @property
    def per_epoch(self) -> int:
        """The steps of an epoch; the last one may take fewer rows."""
        return 1 if self._batch is None else -(-self.size // self._batch)

    @property
    def first(self) -> PyTree:
        """A batch by which the loss is traced and the net initialised: the first rows as they stand."""
        return self.tree if self._batch is None else jax.tree_util.tree_map(lambda leaf: leaf[: self._batch], self.tree)

    def order(self, epoch: int) -> HostArray:
        """All rows in the order in which that epoch takes them: `jax.random.permutation` of the key's fold."""
        if epoch != self._epoch:
            begun = self._following
            order = begun[1] if begun is not None and begun[0] == epoch else self._shuffle(epoch)
            self._epoch, self._order = epoch, np.asarray(order, np.int32)
            self._following = epoch + 1, self._shuffle(epoch + 1)
        return self._order

    def _shuffle(self, epoch: int) -> jax.Array:
        return jax.random.permutation(jax.random.fold_in(self.key, epoch), self.size)

    @property
    def alike(self) -> int | None:
        """How many steps of an epoch take as many rows as the first; None where all steps do, for ever."""
        return None if self._batch is None else max(1, self.size // self._batch)

    def like(self, steps: int) -> Batch:
        """A batch for so many steps to compile a program by, with no rows in particular."""
        rows = None if self._batch is None else np.zeros((steps, min(self._batch, self.size)), np.int32)
        rows = rows if rows is None or steps > 1 else rows[0]
        return Batch(rows, None if rows is not None else self.tree, 0, steps)

    def take(self, step: int, steps: int = 1) -> Batch | None:
        """What that step takes, or so many from it on that lie in one epoch and take as many rows."""
        if self._batch is None:
            return Batch(None, self.tree, self.size * steps, steps)
        epoch, place = divmod(step, self.per_epoch)
        rows = self.order(epoch)[place * self._batch : (place + steps) * self._batch]
        return Batch(rows if steps == 1 else rows.reshape(steps, -1), None, len(rows), steps)

    def dry(self, step: int, total: int | None) -> FlaxMagicsError:
        """Arrays never run dry."""
        raise AssertionError

    def close(self) -> None:
        """Nothing is open."""


class BatchData:
    """An iterable of batches, fetched on a thread ahead of the steps that take them.

    Args:
      text: the data as they are written in the call.
      skip: how many steps of the present epoch are finished already.
    """

    tree: PyTree = None

    def __init__(self, text: str, batches: Any, skip: int = 0) -> None:
        self._text, self._batches = text, batches
        self.once = isinstance(batches, Iterator)
        """It can be gone through only once, as a generator."""
        self.exact = isinstance(batches, (list, tuple))
        self.per_epoch: int | None = None
        with suppress(TypeError, NotImplementedError):  # of a loader that has no length, or does not know it
            self.per_epoch = len(batches)
        # An iterator stands where it stands.
        self._skip, self._shapes = 0 if self.once else skip, ""
        self._fetching: Fetching | None = None
        self._ahead: PyTree = None

    @property
    def first(self) -> PyTree:
        """The next batch, by which the loss is traced and the net initialised; the next step takes it."""
        if self._ahead is None:
            skipped = self._skip
            self._ahead = self._next()
            if self._ahead is None and skipped:  # an epoch had just come to its end
                self.close()
                self.per_epoch = self.per_epoch or skipped
                self._ahead = self._next()
            if self._ahead is None:
                raise FlaxMagicsError(f"`{self._text}` has no batch: there is nothing to train with.")
        return self._ahead

    def take(self, step: int, steps: int = 1) -> Batch | None:
        """The next batch; None at the end of an epoch, after which the next call begins the next one."""
        begins = self._fetching is None
        tree, self._ahead = self._ahead, None
        tree = self._next() if tree is None else tree
        if tree is None and begins:  # it gives what is exhausted
            raise self.dry(step, None)
        if tree is None:
            self.close()
            return None
        return Batch(None, tree, _rows_in(self._text, tree))

    def _next(self) -> PyTree:
        if self._fetching is None:
            self._fetching = Fetching(self._batches, self._skip)
            self._skip = 0
        batch = self._fetching.next()
        if batch is None:
            return None
        shapes = _kinds(batch)
        if shapes != (self._shapes or shapes):
            message = f"a batch of `{self._text}` is {shapes}, and those before were {self._shapes}."
            raise FlaxMagicsError(message, hint="batches may differ in their length alone")
        self._shapes = shapes
        return batch

    def dry(self, step: int, total: int | None) -> FlaxMagicsError:
        """The error for an iterable that has ended, can be gone through only once, and is asked for more."""
        wanted = "" if total is None else f" of {total}"
        return FlaxMagicsError(
            f"`{self._text}` has run dry after {plural(step, 'step')}{wanted}: an iterator can be gone through only once.",
            form=f"{plain_name(self._text, 'batches')} = list(…)",
        )

    def close(self) -> None:
        """Ends the thread that fetches."""
        if self._fetching is not None:
            self._fetching.close()
            self._fetching = None


class Fetching:
    """Goes through an iterable once, on a thread of its own, `AHEAD` batches ahead of whoever takes them.

    Args:
      skip: how many batches at its beginning are left out.
    """

    def __init__(self, batches: Any, skip: int) -> None:
        self._queue: queue.Queue[tuple[PyTree, BaseException | None]] = queue.Queue(AHEAD - 1)
        self._batches, self._skip = batches, skip
        self._closed = threading.Event()
        # A daemon: it may be in the user's code when the interpreter ends, and compiles nothing.
        threading.Thread(target=self._work, name="flax_magics data", daemon=True).start()

    def _work(self) -> None:
        try:
            iterator: Iterator[PyTree] = iter(self._batches)
            for number, batch in enumerate(iterator):
                if number >= self._skip:
                    self._put(jax.tree_util.tree_map(_as_array, batch), None)
                if self._closed.is_set():
                    return
            self._put(None, None)
        except BaseException as error:  # whatever it is, or whoever waits would wait forever
            self._put(None, error)

    def _put(self, batch: PyTree, error: BaseException | None) -> None:
        while not self._closed.is_set():
            try:
                self._queue.put((batch, error), timeout=0.1)
            except queue.Full:
                continue
            return

    def next(self) -> PyTree:
        """The next batch; None where there is none. Raises what the iterable raised. Open to Ctrl-C."""
        while True:
            try:
                batch, error = self._queue.get(timeout=0.1)
            except queue.Empty:
                continue
            if error is not None:
                raise error
            return batch

    def close(self) -> None:
        """Has the thread end after the batch that it fetches now."""
        self._closed.set()


Data = ArrayData | BatchData


def is_arrays(data: object) -> bool:
    """Whether data are arrays with a leading axis, and not an iterable of batches."""
    # Before it is flattened: JAX warns of an iterator that is a leaf.
    if not hasattr(data, "dtype") and not isinstance(data, (Mapping, tuple)):
        return False
    leaves = jax.tree_util.tree_leaves(data)
    return bool(leaves) and all(hasattr(leaf, "dtype") and hasattr(leaf, "shape") for leaf in leaves)


def check(text: str, data: object, batch: int | None, line: str) -> None:
    """Checks what can be told of data before they are used.

    Args:
      text: the data as they are written in the call.
      batch: of `--batch`.
      line: the whole line.

    Raises:
      FlaxMagicsError: they are neither arrays nor an iterable, or `--batch` does not go with them.
    """
    if is_arrays(data):
        _rows_in(text, data)
        for path, leaf in jax.tree_util.tree_flatten_with_path(data)[0]:
            if getattr(leaf.dtype, "kind", "f") in "OUSMm":
                name = f"{text}{jax.tree_util.keystr(path)}"
                raise FlaxMagicsError(f"`{name}` has the dtype {leaf.dtype}, and JAX computes with numbers alone.")
        return
    iterable = hasattr(type(data), "__iter__") or hasattr(type(data), "__getitem__")
    if not iterable or isinstance(data, (str, bytes, Mapping)):
        message = f"`{text}` is {kind_of(data)}: data are a dict or tuple of arrays, or an iterable of batches."
        raise FlaxMagicsError(message, form=f"{plain_name(text, 'data')} = {{'image': …, 'label': …}}")
    if batch is not None:
        message = f"`{text}` gives batches of its own: --batch cuts arrays."
        write = without_option(line, "--batch", "[0-9]+")
        if write == line:  # of a training that goes on, with the batch that it began with
            raise FlaxMagicsError(message, hint=f"--resume goes on with arrays where --batch {batch} had cut some")
        raise FlaxMagicsError(message, **written(write))
    torch = sys.modules.get("torch.utils.data")
    if torch is not None and isinstance(data, torch.DataLoader) and data.num_workers > 0:
        context = getattr(data, "multiprocessing_context", None)
        method = context.get_start_method() if context is not None else "fork"
        if method == "fork" and sys.platform.startswith("linux"):
            raise FlaxMagicsError(
                f"`{text}` forks {plural(data.num_workers, 'worker')}, and a fork of a process in which JAX runs may"
                " wait for ever.",
                hint="multiprocessing_context='forkserver' starts them otherwise",
                edit="DataLoader(…, num_workers=0)",
            )


def check_looks(text: str, data: object, line: str) -> None:
    """`check` of the `--eval` data, which have to be there for each look."""
    check(text, data, None, line)
    if isinstance(data, Iterator):
        message = f"`{text}` can be gone through only once, and it is looked at several times."
        raise FlaxMagicsError(message, form=f"{plain_name(text, 'looks')} = list(…)")


def in_order(text: str, data: Any, batch: int | None) -> Iterator[tuple[PyTree, int]]:
    """The batches of data and their examples, in order: of arrays `batch` rows each, or all at once."""
    if is_arrays(data):
        size = _rows_in(text, data)
        for begin in range(0, size, batch or size):
            part = jax.tree_util.tree_map(lambda leaf: _as_array(leaf[begin : begin + (batch or size)]), data)  # noqa: B023
            yield part, min(batch or size, size - begin)
        return
    for each in data:
        tree = jax.tree_util.tree_map(_as_array, each)
        yield tree, _rows_in(text, tree)


def _rows_in(text: str, tree: PyTree) -> int:
    """The length of the leading axis. Raises FlaxMagicsError where arrays differ in it, have none, or are empty."""
    paths, _ = jax.tree_util.tree_flatten_with_path(tree)
    names = [f"`{text}{jax.tree_util.keystr(path)}`" for path, _ in paths]
    lengths = [int(leaf.shape[0]) if np.ndim(leaf) else -1 for _, leaf in paths]
    if -1 in lengths:
        name = names[lengths.index(-1)]
        raise FlaxMagicsError(f"{name} is a single number: each array of the data has an axis of examples first.")
    other = next((n for n, length in enumerate(lengths) if length != lengths[0]), None)
    if other is not None:
        message = f"{names[0]} has {plural(lengths[0], 'row')} and {names[other]} {lengths[other]}"
        raise FlaxMagicsError(f"{message}: arrays of the data have one length.")
    if not lengths or not lengths[0]:
        raise FlaxMagicsError(f"`{text}` is empty: there is nothing to train with.")
    return lengths[0]


def _as_array(leaf: Any) -> Any:
    """A leaf of a batch as JAX takes it: tensors of torch and TensorFlow as NumPy arrays.

    A copy, since an iterable may fill one buffer again and again, and it is asked for the next batch before this is used.
    """
    if isinstance(leaf, jax.Array) or not hasattr(leaf, "__array__"):
        return leaf
    return np.array(leaf)


class _Kind(str):
    """A text that shows without quotes."""

    def __repr__(self) -> str:
        return str(self)


def _kinds(batch: PyTree) -> str:
    """Structure, dtypes and shapes as text, `…` in the place of the length."""

    def kind(leaf: Any) -> _Kind:
        if not hasattr(leaf, "dtype"):
            return _Kind(type(leaf).__name__)
        return _Kind(f"{leaf.dtype}[{','.join(('…', *map(str, np.shape(leaf)[1:])))}]")

    return repr(jax.tree_util.tree_map(kind, batch))
