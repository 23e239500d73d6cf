"""The benchmarks measure and print their table. What they find is not asserted: that depends on the machine."""

from __future__ import annotations

import re

import pytest

from .__main__ import LAPS, main
from .fresh import in_turn, seconds_of
from .table import Lap, Measured, row, table


def test_one_lap_from_end_to_end():
    printed = main(["load", "--rounds", "2"])
    heading, _, line, blank, machine, *_ = printed.splitlines()
    assert heading.split() == ["lap", "by", "hand", "ours", "median", "spread", "goal", "met"]
    title, took = "%load_ext over an empty extension, nothing imported before", r"(\S+ ms +){3}\S+ ms – \S+ ms"
    assert re.match(rf"{title} +{took} +≤ 20 ms +(yes|NO)$", line)
    assert blank == ""
    assert re.match(r"Python \S+, jax \S+, jaxlib \S+, flax \S+, ipython \S+, \d+ cores, ", machine)


def test_a_lap_that_does_not_do_what_it_says_fails():
    with pytest.raises(RuntimeError, match="not as expected: x == 2"):
        seconds_of({"setup": ["x = 1"], "timed": [["x += 2"]], "expect": "x == 2"})
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        seconds_of({"setup": [], "timed": [["1 / 0"]]})


def test_by_hand_and_ours_take_turns_in_both_orders():
    order = []

    def one(name):
        return lambda: order.append(name) or [1.0]

    assert in_turn(one("hand"), one("ours"), 3) == Measured([1.0] * 3, [1.0] * 3)
    assert order == ["hand", "ours", "ours", "hand", "hand", "ours"]


def test_the_table():
    lap = Lap("cold", "first result", 0.6, lambda rounds: Measured(()))
    found = Measured([0.5, 0.7, 0.6], [1.0, 1.0, 1.5])
    amount = Lap("bare", "over the executable", 80, lambda rounds: Measured(()), "µs")
    over = Measured([1.1e-4, 1.2e-4, 1.3e-4], [3e-5, 2e-5, 1e-5])
    beside = Lap("plain", "without dropout", None, lambda rounds: Measured(()))
    grown = Lap("memory", "grown", 100, lambda rounds: Measured(()), "MB")
    rows = [row(lap, found), row(beside, found), row(amount, over), row(grown, Measured([123_000_000]))]
    assert table(rows).splitlines() == [
        "lap                  by hand  ours    median  spread           goal      met",
        "────────────────────────────────────────────────────────────────────────────",
        "first result         1.00 s   600 ms  0.600×  0.400× – 0.700×  ≤ 0.6×    yes",
        "without dropout      1.00 s   600 ms  0.600×  0.400× – 0.700×",
        "over the executable  20 µs    120 µs  100 µs  80 µs – 120 µs   ≤ 80 µs   NO",
        "grown                                 123 MB                   ≤ 100 MB  NO",
    ]


def test_every_lap_has_a_name_of_its_own():
    assert len({lap.key for lap in LAPS}) == len(LAPS)
