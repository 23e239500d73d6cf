"""The data of a training: arrays that are shuffled and cut into batches, or an iterable of batches."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from msgspec import Struct
from msgspec.structs import replace

from ..base.digest import kind_of
from ..base.measures import default_device
from ..base.text import plural
from ..base.threads import forked_workers
from ..base.types import HostArray, PyTree
from ..compile.compiler import free_bytes
from ..compile.placement import DATA, Placement
from ..errors import FlaxMagicsError, written
from ..line.call import plain_name
from ..line.expression import without_option
from ..state.training import Position
from .prefetch import MASKED, Fetching, as_array


class Batch(Struct, frozen=True):
    """What one step takes.

    Attributes:
      rows: indices into the arrays, int32; None where the batch is there itself.
      tree: the batch; None where it is taken from the arrays by `rows`, in the program.
      examples: their number.
      steps: how many steps take it; `rows` then has a row for each, if they are more than one.
      position: how far it goes in an iterable; None for arrays.
      gathered: the rows of which `tree` was made on the host; None for all other batches.
      parts: the batch of each of several steps, whose leaves are stacked in `tree`; empty for all other batches.
    """

    rows: HostArray | None
    tree: PyTree
    examples: int
    steps: int = 1
    position: Position | None = None
    gathered: HostArray | None = None
    parts: tuple[Batch, ...] = ()


class ArrayData:
    """A tree of arrays with one leading axis, on the device; on the host where they would take too much of that.

    Args:
      text: the data as they are written in the call.
      batch: how many rows a step takes; None for all of them, unshuffled, in each step.
      placement: the mesh that steps run on: each device then has the arrays, unless a step takes all of them.

    Attributes:
      key: its fold by the number of an epoch shuffles the rows in that.
      held: all steps are given the arrays. Else the rows of each are gathered on the host, on a thread.
    """

    once, counted, position = False, True, None
    unsure = ""
    key: jax.Array

    def __init__(self, text: str, tree: PyTree, batch: int | None, placement: Placement | None = None) -> None:
        self.size, self._given = _rows_in(text, tree), tree
        self.held = batch is None or batch >= self.size or _fits(tree)
        self.tree = jax.tree_util.tree_map(jnp.asarray, tree) if self.held else tree
        if placement is not None and self.held:
            self.tree = placement.of_batch(tree) if batch is None else placement.of_variables(self.tree)
        self._batch, self._is_placed = batch, placement is not None
        self._fetching: Fetching | None = None
        self._following = 0
        self._epoch, self._order = -1, np.zeros(0, np.int32)
        self._next_order: tuple[int, jax.Array] | None = None
        """An epoch, and its order, which the device makes beside the steps before it."""

    @property
    def per_epoch(self) -> int:
        """The steps of an epoch; the last one may take fewer rows."""
        return 1 if self._batch is None else -(-self.size // self._batch)

    @property
    def first(self) -> PyTree:
        """A batch by which the loss is traced and the net initialised: the first rows as they stand."""
        tree = self.tree if self.held and not self._is_placed else self._given
        return tree if self._batch is None else jax.tree_util.tree_map(lambda leaf: leaf[: self._batch], tree)

    def order(self, epoch: int) -> HostArray:
        """All rows in the order in which that epoch takes them: `jax.random.permutation` of the key's fold."""
        if epoch != self._epoch:
            begun = self._next_order
            order = begun[1] if begun is not None and begun[0] == epoch else self._shuffle(epoch)
            self._epoch, self._order = epoch, np.asarray(order, np.int32)
            self._next_order = epoch + 1, self._shuffle(epoch + 1)
        return self._order

    def _shuffle(self, epoch: int) -> jax.Array:
        return jax.random.permutation(jax.random.fold_in(self.key, epoch), self.size)

    @property
    def most_together(self) -> int:
        """How many steps one program may do: those of a whole batch in an epoch; 1 where they are not given the arrays."""
        if not self.held:
            return 1
        return FOR_EVER if self._batch is None else max(1, self.size // self._batch)

    def place(self, step: int) -> tuple[int, int]:
        """The place of a step in its epoch, and how many steps from it on take as many rows."""
        place = step if self._batch is None else step % self.per_epoch
        return place, FOR_EVER if self._batch is None else self.most_together - place

    def put_together(self, steps: int) -> None:
        """Arrays are there for any number of steps."""

    def put_back(self, batches: Iterable[Batch]) -> None:
        """The rows of a step are known by its number."""

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
        if not self.held:
            return Batch(None, self._gathered(step), len(rows), gathered=rows)
        return Batch(rows if steps == 1 else rows.reshape(steps, -1), None, len(rows), steps)

    def _gathered(self, step: int) -> PyTree:
        """The rows of that step, of an epoch whose order is there; those of the next steps of it are gathered ahead."""
        first = step % self.per_epoch
        if self._fetching is None or step != self._following or not first:
            assert self._batch is not None
            self.close()
            parts = [self._order[begin : begin + self._batch] for begin in range(0, self.size, self._batch)]
            tree = self.tree
            of_steps = (jax.tree_util.tree_map(lambda leaf: leaf[rows], tree) for rows in parts[first:])  # noqa: B023
            self._fetching = Fetching(of_steps, Position(), None)
        self._following = step + 1
        fetched = self._fetching.next()
        assert fetched is not None
        return fetched.batches[0]

    def dry(self, step: int, total: int | None) -> FlaxMagicsError:
        """Arrays never run dry."""
        raise AssertionError

    def close(self) -> None:
        """Ends the thread that gathers rows."""
        if self._fetching is not None:
            self._fetching.close()
            self._fetching = None


class BatchData:
    """An iterable of batches, fetched on a thread ahead of the steps that take them.

    Args:
      text: the data as they are written in the call.
      begin: how far earlier steps came in it; None for a new training.
      most: how many batches are taken at most; None for no limit. No more are fetched.
      placement: the mesh that steps run on, over which each batch is cut by itself.

    Attributes:
      position: how far it has been taken.
    """

    tree: PyTree = None

    def __init__(
        self,
        text: str,
        batches: Any,
        begin: Position | None = None,
        most: int | None = None,
        placement: Placement | None = None,
    ) -> None:
        self.position, self._is_placed = begin or Position(), placement is not None
        self._text, self._batches, self._left = text, batches, most
        self.once = isinstance(batches, Iterator)
        """It can be gone through only once, as a generator."""
        self.counted = isinstance(batches, (list, tuple))
        """Each epoch has as many batches as it says; a loader may be wrong about that."""
        self.per_epoch: int | None = None
        # Of a loader that has no length, or does not know it.
        with suppress(TypeError, ValueError, NotImplementedError):
            self.per_epoch = len(batches)
        self._shapes: object = None
        self._sample: PyTree = None  # the longest batch so far
        self._fetching: Fetching | None = None
        self._kinds, self._rows, self._longest, self._together = "", 0, 0, 1
        self._ahead: deque[Batch] = deque()
        """Those that were fetched, and that no step has taken."""
        self.unsure = "" if self.counted else "goes on with what the iterable gives now"
        """Why a training that goes on may have other batches than without the stop; empty where it has the same."""

    @property
    def first(self) -> PyTree:
        """The next batch, by which the loss is traced and the net initialised; the next step takes it."""
        if not self._has_next():
            if self.once and not self.unsure:  # in the state that it had, it is at its end
                raise self.dry(self.position.batches, None)
            begins = bool(self.position.batches)  # an epoch had just come to its end
            if begins:
                self._end()
            if not (begins and self._has_next()):
                raise FlaxMagicsError(f"`{self._text}` has no batch: there is nothing to train with.")
        return self._checked(self._ahead[0]).tree

    def take(self, step: int, steps: int = 1) -> Batch | None:
        """The next batch, or so many if they are alike; None at the end of an epoch, after which the next one begins."""
        begins = self._fetching is None
        if not self._has_next():
            if begins:  # it gives what is exhausted
                raise self.dry(step, None)
            self._end()
            return None
        if steps < self._ahead[0].steps:
            self.put_back([self._ahead.popleft()])
        batch = self._checked(self._ahead.popleft())
        assert batch.position is not None
        self.position = batch.position
        return batch

    def put_back(self, batches: Iterable[Batch]) -> None:
        """Has the next steps take batches that were taken already, one by one."""
        self._ahead.extendleft(reversed([part for batch in batches for part in batch.parts or (batch,)]))

    @property
    def most_together(self) -> int:
        """How many steps one program may do: 1 where the batches are on the device, or are cut for several of them."""
        leaves = jax.tree_util.tree_leaves(self.first)
        if self._is_placed or not all(isinstance(leaf, np.ndarray) for leaf in leaves):
            return 1
        size = max(1, sum(int(leaf.nbytes) for leaf in leaves))
        return max(1, min(TOGETHER, BYTES // size, self.per_epoch or TOGETHER))

    def place(self, step: int) -> tuple[int, int]:
        """The place of the next step in its epoch, and how many of it on may be in one program, as far as is known."""
        place, epoch = self.position.batches, self.per_epoch if self.counted else None
        return place, FOR_EVER if epoch is None else epoch - place

    def put_together(self, steps: int) -> None:
        """Has batches fetched for so many steps at once, counted from the first of an epoch."""
        self._together = steps
        if self._fetching is not None:
            self._fetching.size = steps

    def like(self, steps: int) -> Batch:
        """A batch for so many steps to compile a program by."""
        return Batch(None, jax.tree_util.tree_map(lambda leaf: np.stack([leaf] * steps), self._sample), 0, steps)

    def _end(self) -> None:
        """Ends an epoch."""
        self.close()
        self.per_epoch = self.per_epoch or self.position.batches
        self.position = Position(self.position.epoch + 1)

    def _has_next(self) -> bool:
        """Whether there is a batch in this epoch that no step has taken; fetches it."""
        if self._ahead:
            return True
        if self._fetching is None:
            # An iterator without a state stands where it stands.
            begin = replace(self.position, batches=0) if self.once else self.position
            place = self.position.batches
            self._fetching = Fetching(self._batches, begin, self._left, place=place, size=self._together)
        fetched = self._fetching.next()
        if self._fetching.unsure is not None:
            self.unsure = self._fetching.unsure
        if fetched is None:
            return False
        trees, stacked = fetched.batches, fetched.stacked
        self._left = None if self._left is None else self._left - len(trees)
        if stacked is not None:  # they are held once
            trees = [jax.tree_util.tree_map(lambda leaf: leaf[n], stacked) for n in range(len(trees))]  # noqa: B023
        epoch, taken = self.position.epoch, self.position.batches
        parts = tuple(
            Batch(None, tree, 0, position=Position(epoch, taken + n, state))
            for n, (tree, state) in enumerate(zip(trees, fetched.states, strict=True), 1)
        )
        whole = Batch(None, stacked, 0, len(parts), parts[-1].position, parts=parts)
        self._ahead.extend(parts if stacked is None else (whole,))
        return True

    def _checked(self, batch: Batch) -> Batch:
        """A batch with the number of its examples. Raises FlaxMagicsError where JAX does not take it, or the step."""
        tree = batch.parts[0].tree if batch.parts else batch.tree
        leaves, treedef = jax.tree_util.tree_flatten(tree)
        shapes = (treedef, [(getattr(leaf, "dtype", None), getattr(leaf, "shape", None)) for leaf in leaves])
        if shapes != self._shapes:
            kinds = _kinds(tree)
            if kinds != self._kinds:  # leaves of the kinds of those before need no look of their own
                for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
                    _check_leaf(f"`batch{jax.tree_util.keystr(path)}` of `{self._text}`", leaf)
            self._rows = _rows_in(self._text, tree, f"a batch of `{self._text}` has no rows.")
            if kinds != (self._kinds or kinds):
                message = f"a batch of `{self._text}` is {kinds}, and those before were {self._kinds}."
                raise FlaxMagicsError(message, hint="batches may differ in their length alone")
            self._shapes, self._kinds = shapes, kinds
            if self._rows > self._longest:
                self._longest, self._sample = self._rows, tree
        return replace(batch, examples=self._rows * batch.steps)

    def dry(self, step: int, total: int | None) -> FlaxMagicsError:
        """The error for an iterable that has ended, can be gone through only once, and is asked for more."""
        wanted = "" if total is None else f" of {total}"
        dry = f"`{self._text}` has run dry after {plural(step, 'step')}{wanted}"
        return FlaxMagicsError(f"{dry}: an iterator can be gone through only once.", **_as_list(self._text))

    def close(self) -> None:
        """Ends the thread that fetches."""
        if self._fetching is not None:
            self._fetching.close()
            self._fetching = None


Data = ArrayData | BatchData
FOR_EVER = 1 << 16
"""Steps that no epoch divides: more than any program does."""
TOGETHER = 16
"""The most batches of an iterable that one program takes: more are hardly faster, and are lost where it gives no state."""
BYTES = 1 << 24
"""The most bytes that these take."""
SHARE = 0.5
"""Arrays that would take more than this part of a device's free memory stay on the host."""


def _fits(tree: PyTree) -> bool:
    """Whether arrays go onto the device: no file that is mapped into memory is read into that as a whole."""
    device, leaves = default_device(), jax.tree_util.tree_leaves(tree)
    if device.platform == "cpu" and any(isinstance(leaf, np.memmap) for leaf in leaves):
        return False
    free = free_bytes(device)
    # Of other libraries' arrays it is not known whether they are indexed as NumPy's are.
    outside = [leaf for leaf in leaves if not isinstance(leaf, jax.Array)]
    by_numpy = all(isinstance(leaf, np.ndarray) for leaf in outside)
    return not by_numpy or free is None or sum(leaf.nbytes for leaf in outside) <= SHARE * free


def data_of(
    text: str,
    data: Any,
    batch: int | None,
    begin: Position | None = None,
    most: int | None = None,
    *,
    placement: Placement | None = None,
) -> Data:
    """The data of a training, checked already; see `ArrayData` and `BatchData` for the arguments."""
    if is_arrays(data):
        return ArrayData(text, data, batch, placement)
    return BatchData(text, data, begin, most, placement)


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
            _check_leaf(f"`{text}{jax.tree_util.keystr(path)}`", leaf)
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
    if workers := forked_workers(data):
        raise FlaxMagicsError(
            f"`{text}` forks {plural(workers, 'worker')}, and a fork of a process in which JAX runs may wait for ever.",
            hint="multiprocessing_context='forkserver' starts them otherwise",
            edit="DataLoader(…, num_workers=0)",
        )


def check_divides(text: str, data: Data, batch: int | None, placement: Placement, line: str) -> None:
    """Raises FlaxMagicsError where the first batch cannot be cut into equal parts: all others are as long, but the last.

    Args: see `check`.
    """
    rows, parts = _rows_in(text, data.first), placement.parts
    if not rows % parts:
        return
    message = f"a batch of `{text}` has {plural(rows, 'row')}, and {DATA}={parts} of the mesh does not divide that."
    if not isinstance(data, ArrayData):
        raise FlaxMagicsError(message, hint=f"a multiple of {parts} can be cut, such as {rows + parts - rows % parts}")
    if data.size < parts:
        raise FlaxMagicsError(message, write=f"%flax_mesh off\n{line}")
    command, _, call = without_option(line, "--batch", "[0-9]+").partition(" ")
    raise FlaxMagicsError(message, **written(f"{command} --batch {max(parts, rows - rows % parts)} {call}"))


def check_looks(text: str, data: object, line: str) -> None:
    """`check` of the `--eval` data, which have to be there for each look."""
    check(text, data, None, line)
    if isinstance(data, Iterator):
        message = f"`{text}` can be gone through only once, and it is looked at several times."
        raise FlaxMagicsError(message, **_as_list(text))


def in_order(text: str, data: Any, batch: int | None) -> Iterator[tuple[PyTree, int]]:
    """The batches of data and their examples, in order: of arrays `batch` rows each, or all at once."""
    if is_arrays(data):
        size = _rows_in(text, data)
        for begin in range(0, size, batch or size):
            part = jax.tree_util.tree_map(lambda leaf: as_array(leaf[begin : begin + (batch or size)]), data)  # noqa: B023
            yield part, min(batch or size, size - begin)
        return
    for each in data:
        tree = jax.tree_util.tree_map(as_array, each)
        yield tree, _rows_in(text, tree)


def _as_list(text: str) -> dict[str, str]:
    """The advice to make a list of an iterator: one that is made by a call is made anew."""
    return written(f"batch_list = list({text})" if text.endswith(")") else f"{plain_name(text, 'batches')} = list(…)")


def _check_leaf(name: str, leaf: Any) -> None:
    """Raises FlaxMagicsError where a leaf of data or of a batch is no array that JAX takes."""
    if not hasattr(leaf, "dtype") or not hasattr(leaf, "shape"):
        raise FlaxMagicsError(f"{name} is {kind_of(leaf)}: a batch consists of arrays.")
    if isinstance(leaf, np.ma.MaskedArray):
        raise FlaxMagicsError(f"{name} {MASKED}")
    if getattr(leaf.dtype, "kind", "f") in "OUSMm":
        raise FlaxMagicsError(f"{name} has the dtype {leaf.dtype}, and JAX computes with numbers alone.")


def _rows_in(text: str, tree: PyTree, empty: str = "") -> int:
    """The length of the leading axis.

    Args:
      empty: the message for arrays without a row.

    Raises:
      FlaxMagicsError: arrays differ in it, have none, or are empty.
    """
    paths, _ = jax.tree_util.tree_flatten_with_path(tree)
    names = [f"`{text}{jax.tree_util.keystr(path)}`" for path, _ in paths]
    lengths = [int(leaf.shape[0]) if np.ndim(leaf) else -1 for _, leaf in paths]
    if -1 in lengths:
        name = names[lengths.index(-1)]
        raise FlaxMagicsError(f"{name} is a single number: each array of the data has an axis of examples first.")
    if (other := next((n for n, length in enumerate(lengths) if length != lengths[0]), None)) is not None:
        message = f"{names[0]} has {plural(lengths[0], 'row')} and {names[other]} {lengths[other]}"
        raise FlaxMagicsError(f"{message}: arrays of the data have one length.")
    if not lengths or not lengths[0]:
        raise FlaxMagicsError(empty or f"`{text}` is empty: there is nothing to train with.")
    return lengths[0]


class _Kind(str):
    """A text that shows without quotes."""

    __repr__ = str.__str__


def _kinds(batch: PyTree) -> str:
    """Structure, dtypes and shapes as text, `…` in the place of the length."""

    def kind(leaf: Any) -> _Kind:
        if not hasattr(leaf, "dtype"):
            return _Kind(type(leaf).__name__)
        return _Kind(f"{leaf.dtype}[{','.join(('…', *map(str, np.shape(leaf)[1:])))}]")

    return repr(jax.tree_util.tree_map(kind, batch))
