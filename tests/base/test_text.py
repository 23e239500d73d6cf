"""Seconds, bytes and counts read as people write them."""

from __future__ import annotations

import io
import sys
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flax_magics.base.text import bytes_, count, elapsed, on_terminal, plural, seconds, table, wrap


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0 s"),
        (4e-7, "0.4 µs"),
        (4.1e-6, "4.1 µs"),
        (41e-6, "41 µs"),
        (99.4e-6, "99 µs"),
        (99.7e-6, "0.10 ms"),
        (0.00022, "0.22 ms"),
        (0.0022, "2.20 ms"),
        (0.0123, "12.3 ms"),
        (0.09994, "99.9 ms"),
        (0.09996, "0.10 s"),
        (0.41, "0.41 s"),
        (12.3, "12.3 s"),
        (59.94, "59.9 s"),
        (59.96, "1 min"),
        (125.0, "2 min 5 s"),
        (3599.7, "1 h"),
        (3725.0, "1 h 2 min"),
    ],
)
def test_seconds_choose_their_unit(value: float, text: str) -> None:
    assert seconds(value) == text


@pytest.mark.parametrize(
    ("value", "like", "text"),
    [(0.00001, 0.00021, "0.01 ms"), (0.000002, 0.00021, "0.002 ms"), (0.0, 0.00021, "0.00 ms"), (0.01, 1.5, "0.01 s")],
)
def test_a_spread_takes_the_unit_of_its_median(value: float, like: float, text: str) -> None:
    assert seconds(value, like=like) == text


@given(st.floats(1e-9, 1e6))
def test_seconds_never_reach_the_next_unit(value: float) -> None:
    number, unit = seconds(value).split(" ")[:2]
    assert float(number) < {"µs": 100, "ms": 100, "s": 60, "min": 60, "h": 1000}[unit]


@given(st.floats(0, 1e6), st.floats(0, 1e6))
def test_seconds_are_always_numbers_and_units(value: float, like: float) -> None:
    pieces = seconds(value, like=like).split(" ")
    assert len(pieces) % 2 == 0
    assert all(float(number) >= 0 for number in pieces[::2])


def test_a_ticking_clock_counts_whole_seconds() -> None:
    assert [elapsed(value) for value in (0.9, 3.2, 59.9, 63.7)] == ["0 s", "3 s", "59 s", "1 min 3 s"]


def test_bytes_go_in_thousands() -> None:
    sizes = (0, 60, 999, 1_200, 34_500, 999_900, 3_400_000, 80_000_000_000)
    assert ", ".join(map(bytes_, sizes)) == "0 B, 60 B, 999 B, 1.2 KB, 34.5 KB, 1.0 MB, 3.4 MB, 80.0 GB"


def test_counts_are_exact_below_a_million() -> None:
    assert [count(n) for n in (15, 12_340, 999_999, 1_240_000)] == ["15", "12,340", "999,999", "1.2 M"]


def test_a_column_of_counts_has_one_style() -> None:
    assert [count(n, like=999_999) for n in (15, 12_340, 999_999)] == ["15", "12,340", "999,999"]
    assert [count(n, like=1_240_000) for n in (15, 12_340, 1_240_000)] == ["15", "12.3 k", "1.2 M"]


def test_a_line_breaks_at_spaces_and_a_word_only_where_it_is_longer_than_a_line() -> None:
    assert wrap("params: bias float32[4], kernel float32[9,4]", columns=36) == [
        "params: bias float32[4], kernel",
        "float32[9,4]",
    ]
    assert wrap("a deterministic=not_self.training", columns=32) == ["a", "deterministic=not_self.training"]
    assert wrap("a/very/long/path/of/a/module", columns=16) == ["a/very/long/", "path/of/a/module"]


@given(st.lists(st.text("ab.,=/-", min_size=1, max_size=30), min_size=1), st.integers(30, 80))
def test_no_word_is_broken_that_fits_a_line(words: list[str], columns: int) -> None:
    lines = wrap(" ".join(words), columns=columns)
    assert [word for line in lines for word in line.split()] == words


def test_a_last_column_that_would_break_a_word_goes_on_the_line_below() -> None:
    rows = [("kept", "1.2 MB"), ("on disk", "2 MB in /data/a/user/cache/programs")]
    assert table(rows, "  ", columns=40) == [
        "  kept     1.2 MB",
        "  on disk  2 MB in",
        "           /data/a/user/cache/programs",
    ]
    assert table(rows, "  ", columns=36) == [
        "  kept     1.2 MB",
        "  on disk",
        "      2 MB in",
        "           /data/a/user/cache/",
        "           programs",
    ]


def test_one_parameter_is_singular() -> None:
    assert (plural(1, "parameter"), plural(15, "parameter")) == ("1 parameter", "15 parameters")


def test_what_is_captured_or_piped_is_on_no_terminal(monkeypatch) -> None:
    for stream in (io.StringIO(), None):
        monkeypatch.setattr(sys, "stdout", stream)
        assert not on_terminal(SimpleNamespace())
