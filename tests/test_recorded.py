"""What a notebook keeps of a run: a few values of the output, what its bits depend on, and the runs of a loop."""

from __future__ import annotations

import base64
import importlib.metadata
import json
import os
import platform
import signal
from typing import Any

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
import pytest
from by_hand import MyModel, notebook_x
from sessions import session_of

from flax_magics import Session
from flax_magics.base import measures
from flax_magics.base.digest import digest_of
from flax_magics.base.output import VALUES, sample_of
from flax_magics.report import text
from flax_magics.report.text import Rows
from flax_magics.run import recorded


def bits(sample: dict[str, object]) -> bytes:
    return base64.b64decode(str(sample["bits"]))


def test_a_small_output_is_kept_whole():
    array = np.arange(48, dtype=np.float32).reshape(3, 16)
    sample = sample_of(jnp.asarray(array))
    assert sample["leaves"] == [{"path": "", "array": "float32[3,16]", "values": 48}]
    assert bits(sample) == array.tobytes()


def test_of_a_large_output_some_values_are_kept_from_first_to_last():
    array = np.arange(1000, dtype=np.float32).reshape(10, 100)
    sample = sample_of(array)
    assert sample["leaves"] == [{"path": "", "array": "float32[10,100]", "values": 48}]
    values = np.frombuffer(bits(sample), np.float32)
    assert (values[0], values[1], values[-1]) == (0.0, 21.0, 999.0)
    assert len(np.unique(values)) == VALUES


def test_arrays_share_the_values():
    tree = {"b": np.zeros((2, 2), np.int32), "a": np.arange(100.0), "n": None, "s": "text", "x": 1.5}
    sample = sample_of(tree)
    assert sample["leaves"] == [
        {"path": "['a']", "array": "float64[100]", "values": 16},
        {"path": "['b']", "array": "int32[2,2]", "values": 4},
        {"path": "['x']", "array": "float64[]", "values": 1},
    ]
    assert len(bits(sample)) == 16 * 8 + 4 * 4 + 8
    many = sample_of([np.full(3, i) for i in range(100)])
    assert [leaf["path"] for leaf in many["leaves"]] == [f"[{i}]" for i in range(VALUES)]
    assert np.frombuffer(bits(many), np.int64).tolist() == list(range(VALUES))


@pytest.mark.parametrize(
    ("leaf", "expected"),
    [
        (jnp.ones(2, jnp.bfloat16), ("bfloat16[2]", np.asarray(jnp.ones(2, jnp.bfloat16)).tobytes())),
        (np.array([1, 2], ">i4"), ("int32[2]", np.array([1, 2], "<i4").tobytes())),
        (np.asfortranarray(np.arange(6).reshape(2, 3)), ("int64[2,3]", np.arange(6).tobytes())),
        (jax.random.key(1), ("uint32[2]", np.array([0, 1], np.uint32).tobytes())),
        (jnp.zeros((0, 3)), ("float32[0,3]", b"")),
        (True, ("bool[]", b"\1")),
    ],
)
def test_every_kind_of_array_is_kept_by_its_bits(leaf, expected):
    sample = sample_of(leaf)
    assert (sample["leaves"][0]["array"], bits(sample)) == expected


def test_what_is_no_number_is_left_out():
    assert sample_of((np.array(["a"]), np.array([None]), "b", None)) == {"leaves": [], "bits": ""}


def test_a_run_says_what_its_bits_depend_on(monkeypatch):
    monkeypatch.delenv("NPROC", raising=False)
    measures._on.cache_clear()
    found = measures.environment("cpu:0")
    assert found == {
        "versions": {"jax": jax.__version__, "jaxlib": jaxlib.__version__, "flax": importlib.metadata.version("flax")},
        "device_kind": "cpu",
        "processor": measures.processor(),
        "threads": len(os.sched_getaffinity(0)),
    }
    assert found["processor"].startswith(platform.machine())
    assert measures.environment("no such device:0")["device_kind"] is None
    assert measures.environment("no such device:0")["threads"] is None
    assert measures.environment("")["device_kind"] is None


@pytest.mark.parametrize(("nproc", "expected"), [("3", 3), ("many", len(os.sched_getaffinity(0)))])
def test_threads_are_those_that_xla_takes(monkeypatch, nproc, expected):
    monkeypatch.setenv("NPROC", nproc)
    assert measures.threads() == expected


@pytest.fixture(scope="module")
def session() -> Session:
    session = session_of(MyModel(3, True))
    session.apply("net", notebook_x())
    return session


def test_rows_are_what_differs_from_the_row_before(session):
    rows, runs = Rows(), [session.apply("net", notebook_x()) for _ in range(3)]
    for run in runs:
        rows.add(run)
    data = json.loads(json.dumps(rows.to_json()))
    first, *others = data["runs"]
    assert first == json.loads(json.dumps(recorded(runs[0])))
    assert [set(row) for row in others] == [{"draw", "keys", "digest", "bits", "started"}] * 2
    row: dict[str, object] = {}
    for run, one in zip(runs, data["runs"], strict=True):
        row |= one
        assert row == json.loads(json.dumps(recorded(run)))
        assert row["digest"] == digest_of(run.output)
    assert (data["version"], data["further"]) == (1, None)


def test_an_interrupt_while_rows_are_made_loses_none(session):
    rows, run = Rows(), session.apply("net", notebook_x())
    rows.add(run)

    def interrupted(like: Any, keeps: bool) -> dict[str, object]:
        signal.raise_signal(signal.SIGINT)
        return {**like, "draw": like["draw"] + 1}

    for _ in range(3):
        rows.add_again(interrupted)
    with pytest.raises(KeyboardInterrupt):
        rows.to_json()
    assert [row["draw"] for row in rows.to_json()["runs"]] == list(range(run.draw, run.draw + 4))


def test_beyond_the_rows_runs_are_counted_and_digested(session, monkeypatch):
    monkeypatch.setattr(text, "ROWS", 2)
    runs = [session.apply("net", notebook_x()) for _ in range(5)]

    def further(*chosen: int) -> object:
        rows = Rows()
        for index in chosen:
            rows.add(runs[index])
        assert len(rows.to_json()["runs"]) == 2
        return rows.to_json()["further"]

    whole = further(0, 1, 2, 3)
    assert whole["runs"] == 2
    assert further(0, 1, 2, 3) == whole
    assert further(0, 1, 2) != whole
    other = further(0, 1, 2, 4)
    assert (other["keys"] == whole["keys"], other["digest"] == whole["digest"]) == (False, False)


def test_a_hundred_runs_of_a_loop_are_some_tens_of_kilobytes_in_a_notebook(session):
    rows = Rows()
    for _ in range(100):
        rows.add(session.apply("net", notebook_x()))
    assert len(json.dumps(rows.to_json(), indent=1)) < 50_000
