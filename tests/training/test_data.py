"""Data of every form: what a step is given, and one message for what is no data."""

from __future__ import annotations

import contextvars
import itertools
import multiprocessing
import sys
import threading
import time
import types
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from by_hand import bits
from sessions import session_of

from flax_magics import FlaxMagicsError
from flax_magics.state.training import Position
from flax_magics.training.data import ArrayData

X, Y = np.arange(12, dtype=np.float32).reshape(6, 2) / 10, np.ones((6, 1), np.float32)
SGD = optax.sgd(0.1)


def loss(net: Any, batch: Any) -> Any:
    return ((net(batch["x"]) - batch["y"]) ** 2).mean()


def batches(*sizes: int) -> list[dict[str, Any]]:
    """Batches of so many rows, one after the other."""
    edges = np.cumsum([0, *sizes])
    return [{"x": X[begin:end], "y": Y[begin:end]} for begin, end in itertools.pairwise(edges)]


def trained(data: Any, **options: Any) -> Any:
    return session_of(nn.Dense(1)).train(loss, "net", data, **{"optimizer": SGD, **options})


class Loader:
    """An iterable without a length, as a data loader."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches, self.begun = batches, 0

    def __iter__(self) -> Any:
        self.begun += 1
        yield from self.batches


class Tensor:
    """An array of another library."""

    def __init__(self, values: Any) -> None:
        self.values = values
        self.shape, self.dtype = values.shape, "tensor.float32"

    def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
        return self.values


def test_a_tuple_or_a_single_array_is_data_too():
    of_tuple = session_of(nn.Dense(1)).train(
        lambda net, batch: ((net(batch[0]) - batch[1]) ** 2).mean(), "net", (X, Y), optimizer=SGD, batch=4, epochs=2
    )
    assert bits(of_tuple.losses) == bits(trained({"x": X, "y": Y}, batch=4, epochs=2).losses)
    alone = session_of(nn.Dense(1)).train(lambda net, x: ((net(x) - 1) ** 2).mean(), "net", X, optimizer=SGD, steps=2)
    assert alone.steps == 2


class Buffer(Loader):
    """A loader that fills one buffer with each batch."""

    def __iter__(self) -> Any:
        x, y = np.empty_like(self.batches[0]["x"]), np.empty_like(self.batches[0]["y"])
        for batch in self.batches:
            x[:], y[:] = batch["x"], batch["y"]
            yield {"x": x, "y": y}
        x[:] = np.nan


def test_an_iterable_may_fill_one_buffer_again_and_again():
    data = batches(2, 2, 2)
    ours, expected = (trained(form(data), epochs=3, eval=form(data)) for form in (Buffer, list))
    assert bits(ours.losses) == bits(expected.losses)
    assert ours.eval == expected.eval


@pytest.mark.parametrize("form", [list, Loader])
def test_an_iterable_gives_its_batches_in_their_order_in_each_epoch(form):
    data = form(batches(2, 2, 1))
    run = trained(data, epochs=2)
    again = session_of(nn.Dense(1))
    first = again.train(loss, "net", batches(2)[0], optimizer=SGD, steps=1)
    assert run.losses[0] == first.losses[0]
    for batch in (*batches(2, 2, 1)[1:], *batches(2, 2, 1)):
        last = again.train(loss, "net", batch, steps=1)
    assert run.losses[-1] == last.losses[-1]
    assert (run.steps, run.trained.total, run.trained.epoch, run.trained.examples) == (6, 6, 3, 10)


def test_an_iterable_begins_again_until_there_are_enough_steps():
    loader = Loader(batches(2, 2))
    run = trained(loader, steps=5)
    assert (run.steps, loader.begun) == (5, 3)


def test_tensors_of_other_libraries_are_arrays():
    tensors = [{"x": Tensor(each["x"]), "y": Tensor(each["y"])} for each in batches(2, 2)]
    assert bits(trained(tensors, epochs=1).losses) == bits(trained(batches(2, 2), epochs=1).losses)


def test_a_list_goes_on_at_the_batch_where_it_stopped():
    whole = trained(batches(2, 2, 2), steps=5)
    session = session_of(nn.Dense(1))
    session.train(loss, "net", batches(2, 2, 2), optimizer=SGD, steps=2)
    run = session.train(loss, "net", batches(2, 2, 2), resume=True, steps=5)
    assert bits(run.losses) == bits(whole.losses)
    assert run.notes == ()
    session = session_of(nn.Dense(1))
    session.train(loss, "net", Loader(batches(2, 2, 2)), optimizer=SGD, steps=2)
    (note,) = session.train(loss, "net", Loader(batches(2, 2, 2)), resume=True, steps=5).notes
    assert note.text == "goes on with what the iterable gives now: that all is as without the stop is not claimed"


def test_an_iterator_that_runs_dry_is_told_and_its_steps_stay():
    session = session_of(nn.Dense(1))
    with pytest.raises(FlaxMagicsError) as error:
        session.train(loss, "net", iter(batches(2, 2, 2)), optimizer=SGD, steps=9)
    message = "`data` has run dry after 3 steps of 9: an iterator can be gone through only once."
    assert str(error.value).splitlines()[0] == message
    assert (session.runs[-1].steps, session.runs[-1].trained.stopped) == (3, message)
    (note,) = session.runs[-1].notes
    assert (note.write, note.form) == (None, "data = list(…)\n%flax_train --resume loss(net, data)")
    run = session.train(loss, "net", batches(2, 2, 2), resume=True, steps=5)
    whole = trained(batches(2, 2, 2), steps=5)
    assert bits(run.losses) == bits(whole.losses)
    assert trained(iter(batches(2, 2, 2)), epochs=1).steps == 3


def test_an_error_of_the_iterable_is_passed_on():
    def failing() -> Any:
        yield batches(2)[0]
        raise OSError("no such shard")

    session = session_of(nn.Dense(1))
    with pytest.raises(OSError, match="no such shard"):
        session.train(loss, "net", failing(), optimizer=SGD, steps=9)
    assert session.runs[-1].steps == 1


def forked(monkeypatch: Any, context: Any = None, workers: int = 2) -> Any:
    """A loader with what is looked at of torch's: the number of its workers, and a context or None, never a name."""

    class DataLoader(list[Any]):
        num_workers, multiprocessing_context = workers, context

    module = types.ModuleType("torch.utils.data")
    module.DataLoader = DataLoader  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.data", module)
    return DataLoader(batches(2, 2))


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        ({"x": X, "y": Y[:4]}, {}, "`data['x']` has 6 rows and `data['y']` 4: arrays of the data have one length."),
        ({"x": X[:0], "y": Y[:0]}, {}, "`data` is empty: there is nothing to train with."),
        ([], {}, "`data` has no batch: there is nothing to train with."),
        (
            {"x": X, "y": jnp.float32(1)},
            {},
            "`data['y']` is a single number: each array of the data has an axis of examples first.",
        ),
        (
            {"x": X, "y": "labels"},
            {},
            "`data` is a dict: data are a dict or tuple of arrays, or an iterable of batches.",
        ),
        (3, {}, "`data` is an int: data are a dict or tuple of arrays, or an iterable of batches."),
        (batches(2, 2), {"batch": 2}, "`data` gives batches of its own: --batch cuts arrays."),
        (
            [*batches(2), {"x": X[:2].astype(np.int32), "y": Y[:2]}],
            {},
            "a batch of `data` is {'x': int32[…,2], 'y': float32[…,1]}, and those before were {'x': float32[…,2], 'y':"
            " float32[…,1]}.",
        ),
        ([{"x": X, "y": Y, "name": "first"}], {}, "`batch['name']` of `data` is a str: a batch consists of arrays."),
        ((X.tolist(), Y.tolist()), {}, "`batch[0][0]` of `data` is a float: a batch consists of arrays."),
        (
            [{"x": X, "y": np.array(["a"] * 6)}],
            {},
            "`batch['y']` of `data` has the dtype <U1, and JAX computes with numbers alone.",
        ),
        (
            [{"x": X, "y": Y[:4]}],
            {},
            "`data['x']` has 6 rows and `data['y']` 4: arrays of the data have one length.",
        ),
        (
            [{"x": np.float32(1), "y": np.float32(2)}],
            {},
            "`data['x']` is a single number: each array of the data has an axis of examples first.",
        ),
        ([*batches(2), {"x": X[:0], "y": Y[:0]}], {}, "a batch of `data` has no rows."),
        (
            {"x": np.ma.array(X), "y": Y},
            {},
            "`data['x']` is a masked array, and JAX knows no masks: `.filled(…)` makes a plain array of it.",
        ),
        (
            [{"x": np.ma.array(X), "y": Y}],
            {},
            "an array of a batch is a masked array, and JAX knows no masks: `.filled(…)` makes a plain array of it.",
        ),
        (
            forked,
            {},
            "`data` forks 2 workers, and a fork of a process in which JAX runs may wait for ever.",
        ),
    ],
)
def test_what_is_no_data_is_told_in_one_message(data, options, message, monkeypatch):
    data = data(monkeypatch) if data is forked else data
    session = session_of(nn.Dense(1))
    with pytest.raises(FlaxMagicsError) as error:
        session.train(loss, "net", data, optimizer=SGD, epochs=2, **options)
    assert str(error.value).splitlines()[0] == message


def test_a_loader_that_forks_nothing_is_gone_through(monkeypatch):
    expected = trained(batches(2, 2), steps=2)
    for context, workers in ((multiprocessing.get_context("spawn"), 2), (None, 0)):
        assert bits(trained(forked(monkeypatch, context, workers), steps=2).losses) == bits(expected.losses)


def test_a_look_weighs_each_batch_by_its_examples():
    def counted(net: Any, batch: Any) -> Any:
        return net(batch["x"]).sum() * 0 + batch["x"].shape[0], {"rows": batch["x"].shape[0]}

    session = session_of(nn.Dense(1))
    run = session.train(counted, "net", {"x": X, "y": Y}, optimizer=SGD, batch=4, steps=3, eval={"x": X, "y": Y})
    # 4 rows of a loss of 4, and 2 rows of 2.
    assert [(look.step, look.loss, dict(look.metrics)) for look in run.eval] == [
        (step, 20 / 6, {"rows": 20 / 6}) for step in (1, 2, 3)
    ]
    run = session.train(counted, "net", {"x": X, "y": Y}, batch=4, epochs=2, eval=batches(1, 5))
    assert [(look.step, look.loss) for look in run.eval] == [(2, 26 / 6), (4, 26 / 6)]


def test_the_thread_that_fetches_ends_with_the_training():
    def fetching() -> list[str]:
        return [thread.name for thread in threading.enumerate() if thread.name == "flax_magics data"]

    class Endless:
        def __iter__(self) -> Any:
            while True:
                yield batches(2)[0]

    trained(Endless(), steps=3)
    with pytest.raises(FlaxMagicsError):
        session_of(nn.Dense(1)).train(lambda net, batch: net(batch["x"]), "net", Endless(), optimizer=SGD, steps=3)
    until = time.perf_counter() + 5
    while fetching() and time.perf_counter() < until:
        time.sleep(0.02)
    assert fetching() == []


class Unknown(Loader):
    """A loader that does not know its length, as that of a stream."""

    def __len__(self) -> int:
        raise TypeError("the stream has no length")


def test_a_loader_may_not_know_its_length():
    assert bits(trained(Unknown(batches(2, 2)), epochs=2).losses) == bits(trained(batches(2, 2), epochs=2).losses)


class Exhausted(Loader):
    """An iterable that gives the same iterator again."""

    def __init__(self, batches: list[Any]) -> None:
        self.iterator = iter(batches)

    def __iter__(self) -> Any:
        return self.iterator


def test_an_iterable_that_gives_what_is_exhausted_is_told():
    message = "`data` has run dry after 2 steps: an iterator can be gone through only once."
    with pytest.raises(FlaxMagicsError) as error:
        trained(Exhausted(batches(2, 2)), epochs=2)
    assert error.value.message == message


def test_one_that_stopped_at_an_epochs_end_goes_on_with_the_next():
    session = session_of(nn.Dense(1))
    session.train(loss, "net", Loader(batches(2, 2)), optimizer=SGD, steps=2)
    run = session.train(loss, "net", Loader(batches(2, 2)), epochs=2, resume=True)
    assert bits(run.losses) == bits(trained(batches(2, 2), epochs=2).losses)


def test_an_array_of_strings_is_told():
    with pytest.raises(FlaxMagicsError) as error:
        trained({"x": X, "y": np.array(["a"] * 6)}, steps=1)
    assert str(error.value) == "`data['y']` has the dtype <U1, and JAX computes with numbers alone."


class Counting:
    """An iterator that gives and takes its state, one dict that it goes on writing into, as an iterator of grain's."""

    def __init__(self, batches: list[Any], state: Any = None) -> None:
        self.batches, self.state = batches, {"next": 0, "of": (np.int64(len(batches)), b"\x00\xff")}
        self.state |= state or {}

    def __iter__(self) -> Any:
        return self

    def __next__(self) -> Any:
        if self.state["next"] == len(self.batches):
            raise StopIteration
        self.state["next"] += 1
        return self.batches[self.state["next"] - 1]

    def get_state(self) -> Any:
        return self.state

    def set_state(self, state: Any) -> None:
        if state["of"] != self.state["of"]:
            raise ValueError(f"a state of {state['of'][0]} batches")
        self.state = state


class Stateful(Loader):
    """A loader whose iterators give and take their state, and whose epochs are of different length."""

    def __iter__(self) -> Any:
        self.begun += 1
        return Counting(self.batches)


@pytest.fixture(scope="module")
def whole():
    return trained(batches(1, 2, 3), epochs=2).losses


@pytest.mark.parametrize("steps", [2, 3, 4])
def test_a_loader_whose_iterators_take_their_state_goes_on_where_it_stopped(steps, whole):
    session = session_of(nn.Dense(1))
    session.train(loss, "net", Stateful(batches(1, 2, 3)), optimizer=SGD, steps=steps)
    session.train(loss, "net", Stateful(batches(1, 2, 3)), resume=True)  # no step is left
    run = session.train(loss, "net", Stateful(batches(1, 2, 3)), resume=True, epochs=2)
    assert bits(run.losses) == bits(whole)
    assert run.notes == ()
    assert run.trained.total == 6


class FailsOnce(Counting):
    """An iterator that fails at its fourth batch, once."""

    failed = False

    def __next__(self) -> Any:
        if self.state["next"] == 3 and not self.failed:
            self.failed = True
            raise OSError("no such shard")
        return super().__next__()


def test_an_iterator_that_takes_its_state_goes_on_although_it_was_read_ahead(whole):
    iterator = FailsOnce(batches(1, 2, 3) * 2)
    session = session_of(nn.Dense(1))
    with pytest.raises(OSError, match="no such shard"):
        session.train(loss, "net", iterator, optimizer=SGD, epochs=1)
    assert session.runs[-1].steps == 3
    iterator.state = {"next": 5, "of": iterator.state["of"]}
    run = session.train(loss, "net", iterator, resume=True)
    assert bits(run.losses) == bits(whole)
    assert run.notes == ()
    with pytest.raises(FlaxMagicsError) as error:
        session.train(loss, "net", iterator, resume=True, steps=9)
    assert error.value.message == "`data` has run dry after 6 steps: an iterator can be gone through only once."


def test_the_state_of_an_iterator_is_that_of_the_last_step_and_goes_through_a_file(tmp_path, whole):
    session = session_of(nn.Dense(1))
    session.train(loss, "net", Counting(batches(1, 2, 3) * 2), optimizer=SGD, steps=2)
    position = session.training_of("net").position
    assert position == Position(0, 2, {"next": 2, "of": (6, b"\x00\xff")})
    session.save(tmp_path / "session")
    other = session_of(nn.Dense(1))
    other.load(tmp_path / "session")
    assert other.training_of("net").position == position
    run = other.train(loss, "net", Counting(batches(1, 2, 3) * 2), optimizer=SGD, resume=True, steps=6)
    assert bits(run.losses) == bits(whole)
    assert run.notes == ()


def test_a_state_that_no_file_holds_or_that_is_refused_claims_nothing(tmp_path):
    session = session_of(nn.Dense(1))
    session.train(loss, "net", Counting(batches(1, 2, 3), {"lock": object()}), optimizer=SGD, steps=1)
    session.save(tmp_path / "session")
    other = session_of(nn.Dense(1))
    other.load(tmp_path / "session")
    assert other.training_of("net").position.state is None
    (note,) = session.train(loss, "net", Counting(batches(1, 2)), resume=True, steps=2).notes
    assert note.text == (
        "the iterator does not take the state that it had (ValueError: a state of 3 batches): it goes on with what it"
        " gives now: that all is as without the stop is not claimed"
    )


class Lying(Loader):
    """A loader that has three batches, whatever it says."""

    def __init__(self, length: int) -> None:
        super().__init__(batches(1, 2, 3))
        self.length = length

    def __len__(self) -> int:
        return self.length


@pytest.mark.parametrize("length", [2, 5, -1])
def test_an_epoch_ends_where_the_data_end_whatever_their_length_is_said_to_be(length, whole):
    run = trained(Lying(length), epochs=2, eval=batches(6))
    assert bits(run.losses) == bits(whole)
    assert ([look.step for look in run.eval], run.trained.total, run.trained.epoch) == ([3, 6], 6, 3)


def test_no_more_batches_are_fetched_than_the_steps_take():
    iterator = iter(batches(1, 2, 3))
    trained(iterator, steps=2)
    assert len(next(iterator)["x"]) == 3


def test_a_generator_that_is_still_in_its_next_batch_is_waited_for():
    entered, released = threading.Event(), threading.Event()

    def slow() -> Any:
        yield from batches(1)
        entered.set()
        released.wait()
        yield from batches(1, 2, 3) * 2

    generator = slow()

    def fails(net: Any, batch: Any) -> Any:
        entered.wait()
        raise OSError("not this loss")

    with pytest.raises(OSError, match="not this loss"):
        session_of(nn.Dense(1)).train(fails, "net", generator, optimizer=SGD, steps=6)
    # The batch that it was in is gone.
    expected = trained((batches(1, 2, 3) * 2)[1:], steps=5)
    threading.Timer(0.2, released.set).start()
    assert bits(trained(generator, steps=5).losses) == bits(expected.losses)


def test_an_iterable_is_gone_through_in_the_context_of_its_cell():
    cell: contextvars.ContextVar[str] = contextvars.ContextVar("cell", default="none")
    cells = []

    class Printing(Loader):
        def __iter__(self) -> Any:
            cells.append(cell.get())
            yield from self.batches

    token = cell.set("this one")
    trained(Printing(batches(2)), steps=1)
    cell.reset(token)
    assert cells == ["this one"]


@pytest.fixture(scope="module")
def on_device():
    return trained({"x": X, "y": Y}, batch=4, epochs=3)


def test_arrays_too_large_for_the_device_stay_on_the_host_and_give_the_same(on_device, monkeypatch):
    monkeypatch.setattr("flax_magics.training.data.SHARE", 0.0)
    session = session_of(nn.Dense(1))
    data = {"x": X, "y": Y}
    session.train(loss, "net", data, optimizer=SGD, batch=4, steps=3)
    run = session.train(loss, "net", data, resume=True, epochs=3)
    assert bits(run.losses) == bits(on_device.losses)
    assert bits(run.output) == bits(on_device.output)
    assert run.notes == ()
    assert session.replay(1).digest == run.digest
    assert session.replay(1, step=4).output.loss == run.losses[4]
    with pytest.raises(FlaxMagicsError) as error:
        trained({"x": np.where(X[3] == X, np.nan, X), "y": Y}, batch=4, epochs=3)
    assert "holds NaN in row 3" in error.value.message


def test_a_file_mapped_into_memory_is_not_read_whole(on_device, tmp_path):
    np.save(tmp_path / "x.npy", X)
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    data = ArrayData("data", {"x": mapped, "y": Y}, 4)
    assert (data.held, type(data.tree["x"]), type(data.first["x"])) == (False, np.memmap, np.memmap)
    assert bits(trained({"x": mapped, "y": Y}, batch=4, epochs=3).losses) == bits(on_device.losses)
