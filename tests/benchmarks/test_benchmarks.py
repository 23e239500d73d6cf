"""The benchmarks measure and print their table. What they find is not asserted: that depends on the machine."""

from __future__ import annotations

import re

import pytest

from .__main__ import ROWS, main
from .cells import in_shell
from .table import Row, table
from .warm import Loop


def test_one_row_from_end_to_end():
    machine, blank, heading, _, row = main(["load", "--quick"]).splitlines()
    assert re.fullmatch(r".+, \d+ cores, \w+; Python \S+, jax \S+, flax \S+, ipython \S+, ipykernel \S+", machine)
    assert blank == ""
    assert heading.replace(" ", "") == "|name|lap|byhand|floor|ours|median|spread|goal|"
    title, took, spread = "%load_ext over an empty extension, each in a shell's first cell", r"\S+ ms", r"\S+ – \S+"
    assert re.fullmatch(
        rf"\| load \| {title} \| +\| {took} +\| {took} +\| {took} +\| {spread} +\| ≤ 20 ms, (NOT )?met +\|", row
    )


def test_laps_are_timed_by_name_and_one_that_fails_ends_it():
    seconds = in_shell([("", ["import time"]), ("a", ["time.sleep(0.01)", "pass"]), ("b", ["pass"]), ("a", ["pass"])])
    assert {name: len(values) for name, values in seconds.items()} == {"a": 2, "b": 1}
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        in_shell([("a", ["1 / 0"])])


def test_a_loop_takes_turns_in_both_orders_after_one_that_warms_up():
    loop = Loop(Row("warm", "", 0.5), [], "hand", "floor", "ours", pause=0.5, runs=2)
    assert list(loop.laps(2)) == [
        ("", ["for i in range(2):\n  ours"]),
        ("", ["for i in range(2):\n  floor"]),
        ("", ["for i in range(2):\n  hand"]),
        ("warm/by hand", ["for i in range(2):\n  hand"]),
        ("warm/floor", ["for i in range(2):\n  floor"]),
        ("warm/ours", ["for i in range(2):\n  ours"]),
        ("warm/ours", ["for i in range(2):\n  ours"]),
        ("warm/floor", ["for i in range(2):\n  floor"]),
        ("warm/by hand", ["for i in range(2):\n  hand"]),
    ]
    seconds = {"warm/by hand": [6.0, 4.0], "warm/floor": [2.0, 3.0], "warm/ours": [3.0, 3.0], "cold/ours": [1.0]}
    assert loop.of_a_run(seconds) == {"warm/by hand": [3.0, 2.0], "warm/floor": [0.5, 1.0], "warm/ours": [1.5, 1.5]}


def test_the_table():
    rows = [Row("cold", "first result", 0.6), Row("bare", "over it", 80, "µs"), Row("msgspec", "an import", None, "ms")]
    rows.append(Row("memory", "most of it", 1.1, in_bytes=True))
    seconds = {
        "cold/by hand": [1.0, 1.0, 1.5],
        "cold/ours": [0.5, 0.7, 0.6],
        "bare/floor": [3e-5, 2e-5, 1e-5],
        "bare/ours": [1.1e-4, 1.2e-4, 1.3e-4],
        "msgspec/ours": [0.01, 0.01],
        "memory/by hand": [8e8, 8e8],
        "memory/ours": [8e8, 8e8],
    }
    assert table(rows, seconds).splitlines() == [
        "| name    | lap          | by hand | floor | ours   | median | spread      | goal             |",
        "| ------- | ------------ | ------- | ----- | ------ | ------ | ----------- | ---------------- |",
        "| cold    | first result | 1 s     |       | 600 ms | 0.5 ×  | 0.42 – 0.66 | ≤ 0.6 ×, met     |",
        "| bare    | over it      |         | 20 µs | 120 µs | 100 µs | 84 – 116    | ≤ 80 µs, NOT met |",
        "| msgspec | an import    |         |       | 10 ms  | 10 ms  | 10 – 10     |                  |",
        "| memory  | most of it   | 800 MB  |       | 800 MB | 1 ×    | 1 – 1       | ≤ 1.1 ×, met     |",
    ]


def test_every_row_has_a_name_of_its_own():
    assert len({row.key for row in ROWS}) == len(ROWS)
