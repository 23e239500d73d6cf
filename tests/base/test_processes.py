"""What processes tell each other, with a store in memory in the place of the coordinator's."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from together import on_threads

from flax_magics import FlaxMagicsError
from flax_magics.base.processes import Processes, Standing


class Store:
    """The coordinator's key-value store, as its client has it."""

    def __init__(self) -> None:
        self.values: dict[str, str] = {}
        self._changed = threading.Condition()

    def key_value_set(self, key: str, value: str, allow_overwrite: bool = False) -> None:
        with self._changed:
            if key in self.values and not allow_overwrite:
                raise RuntimeError(f"ALREADY_EXISTS: key {key} already exists.")
            self.values[key] = value
            self._changed.notify_all()

    def key_value_try_get(self, key: str) -> str:
        with contextlib.suppress(KeyError):
            return self.values[key]
        raise RuntimeError(f"NOT_FOUND: Config key {key} not found.")

    def blocking_key_value_get(self, key: str, milliseconds: int) -> str:
        with self._changed:
            if not self._changed.wait_for(lambda: key in self.values, milliseconds / 1000):
                raise RuntimeError("DEADLINE_EXCEEDED: GetKeyValue() timed out")
            return self.values[key]

    def key_value_dir_get(self, place: str) -> list[tuple[str, str]]:
        with self._changed:
            return [(key, value) for key, value in self.values.items() if key.startswith(f"{place.rstrip('/')}/")]

    def key_value_delete(self, place: str) -> None:
        with self._changed:
            self.values = {key: value for key, value in self.values.items() if not key.startswith(place)}


def job(count: int) -> Iterator[list[Processes]]:
    store = Store()
    all = [Processes(store, rank, count) for rank in range(count)]
    yield all
    for one in all:
        one.lives.close()


@pytest.fixture
def three() -> Iterator[list[Processes]]:
    yield from job(3)


@pytest.fixture
def two() -> Iterator[list[Processes]]:
    yield from job(2)


WAITING = SimpleNamespace(deadline=60.0, on_phase=lambda phase: None)
HURRY = SimpleNamespace(deadline=0.3, on_phase=lambda phase: None)


def together(*calls: Any) -> list[Any]:
    """What the calls give or raise, all made at once."""
    results: list[Any] = [None] * len(calls)

    def made(place: int) -> None:
        try:
            results[place] = calls[place]()
        except (FlaxMagicsError, KeyboardInterrupt) as error:
            results[place] = error

    on_threads(*(lambda place=place: made(place) for place in range(len(calls))))  # type: ignore[misc]
    return results


def gathers(all: list[Processes], waiting: Any = WAITING) -> list[Any]:
    return together(*(lambda one=one: one.gather(json.dumps({"n": one.rank}), "it", waiting) for one in all))


def test_all_get_what_each_says(three):
    for _ in range(3):
        assert gathers(three) == [['{"n": 0}', '{"n": 1}', '{"n": 2}']] * 3
    # Of exchanges that are over only the last stays.
    assert {key.split("/")[1] for key in three[0]._store._client.values} == {"address", "2"}


def test_those_that_stand_elsewhere_are_told_with_their_numbers(three):
    places = [Standing(0, 4, "net", "abc", "1"), Standing(0, 4, "net", "abc", "1"), Standing(0, 5, "net", "abc", "2")]
    results = together(
        *(lambda one=one, place=place: one.agree(place, WAITING) for one, place in zip(three, places, strict=True))
    )
    assert len({str(error) for error in results}) == 1
    assert str(results[0]) == (
        "net was not begun: the processes of this job do not stand at the same place, and a program that they run together"
        " would wait for ever.\n  processes 0, 1: seed 0, draw 4, net, program abc\n"
        "  process 2: seed 0, draw 5, net, program abc"
    )


def test_all_fail_where_one_does_not_answer_and_find_each_other_when_it_is_back(three):
    for rank in (0, 2):
        errors = gathers([one for one in three if one.rank != rank], HURRY)
        assert all(f"it was not begun: process {rank} did not answer within 0.3 s" in str(error) for error in errors)
        assert all(f"  process {rank}: no answer" in str(error) for error in errors)
    assert gathers(three) == [['{"n": 0}', '{"n": 1}', '{"n": 2}']] * 3


def test_one_that_comes_too_late_fails_alone_and_is_told_who_is_not_there(two):
    first, second = two
    (early,) = gathers([first], HURRY)
    (late,) = gathers([second], HURRY)
    assert "process 1 did not answer" in str(early)
    assert "process 0 did not answer" in str(late)


def test_an_interrupt_is_no_wait_for_the_others(two):
    class Interrupted:
        deadline = 60.0

        def on_phase(self, phase: str) -> None:
            raise KeyboardInterrupt

    first, second = two
    (interrupted,) = gathers([first], Interrupted())
    assert isinstance(interrupted, KeyboardInterrupt)
    # The second was not there, and passes over what was given up.
    assert gathers([first, second]) == [['{"n": 0}', '{"n": 1}']] * 2
    begin = time.monotonic()
    results = together(
        lambda: first.gather("{}", "it", WAITING),
        lambda: second.gather("{}", "it", WAITING),
    )
    assert results == [["{}", "{}"]] * 2
    assert time.monotonic() - begin < WAITING.deadline


def test_one_that_has_ended_is_named_at_once(two):
    first, second = two
    assert (first.lives.has_ended(0), first.lives.has_ended(1)) == (False, False)
    second.lives.close()
    assert first.lives.has_ended(1)
    (error,) = gathers([first])
    assert str(error).startswith("it was not begun: process 1 has ended, and cannot take part.")
    assert str(first.why_failed("net(x)")).startswith("net(x) was given up: process 1 has ended.")


def test_a_stop_is_seen_by_those_that_go_on_and_all_learn_after_how_many_steps(two):
    first, second = two
    first.check_stopped("it")
    stopped = threading.Thread(target=lambda: steps.append(second.stop(7, "interrupted", "it", WAITING)))
    steps: list[Any] = []
    stopped.start()
    while "flax_magics/0/1" not in first._store._client.values:
        time.sleep(1e-3)
    with pytest.raises(FlaxMagicsError, match=r"^it ends here: process 1 stopped after 7 steps: interrupted\.$"):
        first.check_stopped("it")
    assert first.stop(8, "", "it", WAITING) == [8, 7]
    stopped.join(60)
    assert steps == [[8, 7]]


def test_a_stop_where_another_is_asked_something_else_fails_that_one_alone(two):
    first, second = two

    def asked() -> Any:
        try:
            first.agree(Standing(0, 4, "net"), WAITING)
        except FlaxMagicsError as error:
            return str(error), first.stop(3, "", "it", WAITING)

    (text, of_first), of_second = together(asked, lambda: second.stop(3, "KeyError", "it", WAITING))
    assert "  process 1: stopped after 3 steps: KeyError" in text
    assert of_first == of_second == [3, 3]
