"""What a notebook holds is read field by field; what is not ours, or not true, is refused with a reason."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import nbformat
import pytest
from made import HERE, cell, notebook, run

from flax_magics.errors import FlaxMagicsError
from flax_magics.verify import notebooks
from flax_magics.verify.notebooks import Further, Leaf, read, runs_of


def test_a_run_is_read():
    (found,) = runs_of(notebook(cell(run(draw=3, extra="of a later version"))))
    (one,) = found.runs
    assert (found.number, found.line, found.count) == (1, "y = %flax_apply net(x)", 1)
    assert (one.command, one.model, one.call, one.seed, one.draw, one.samples) == ("apply", "net", "net(x)", 0, 3, None)
    assert one.keys == {"params": "375f238f00000000", "dropout": "f71f4ea900000000"}
    assert one.leaves == (Leaf("", "float32[2,3]", 6),)
    assert one.environment == {
        **HERE["versions"],
        "device": "cpu:0",
        "device_kind": "cpu",
        "processor": "x86_64-A",
        "threads": "2",
    }


def test_rows_of_a_loop_are_what_differs_from_the_row_before():
    rows = [run(draw=2, started=11.0), {"draw": 3, "started": 12.0}, {"draw": 5, "digest": "f", "started": 14.0}]
    loop = {"version": 1, "runs": rows, "further": {"runs": 7, "keys": "k", "digest": "d"}}
    # Of the runs of a cell, those that had news have a report of their own, wherever it stands.
    (found,) = runs_of(notebook(cell(run(draw=4, started=13.0), run(draw=1), loop=loop)))
    assert [(one.draw, one.digest) for one in found.runs] == [*((n, "0123456789abcdef") for n in range(1, 5)), (5, "f")]
    assert found.further == Further(7, "k", "d")
    assert found.count == 12


def test_cells_are_counted_as_code_cells_and_skipped_ones_hold_nothing():
    one, other = (nbformat.v4.new_markdown_cell("words") for _ in range(2))
    cells = runs_of(notebook(one, cell(run(), tags=("skip-execution",)), other, cell(run(), source="\n\n  z = 1\n")))
    assert [(one.number, one.line, one.count) for one in cells] == [(1, "y = %flax_apply net(x)", 0), (2, "z = 1", 1)]


DEEP: Any = []
for _ in range(200):
    DEEP = [DEEP]
LEAF = {"path": "", "array": "float32[2]", "values": 1}
RUN, LOOP = (f"the {what} is not what it should be: " for what in ("run", "loop"))


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"version": 2}, "the run was written by another version of flax_magics (its format is 2, not 1)."),
        ({"version": True}, RUN + "Expected `int`, got `bool` - at `$.version`."),
        ({"draw": "1"}, RUN + "Expected `int`, got `str` - at `$.draw`."),
        ({"draw": 10**60}, RUN + "Expected `int` <= 9223372036854775807 - at `$.draw`."),
        ({"seed": 1.5}, RUN + "Expected `int`, got `float` - at `$.seed`."),
        ({"seed": 10**60}, RUN + "`seed` is too large."),
        ({"keys": {"dropout\x1b[2J\u202e": 1}}, RUN + "Expected `str`, got `int` - at `$.keys[...]`."),
        ({"keys": DEEP}, RUN + "Expected `object`, got `array` - at `$.keys`."),
        ({"output": DEEP}, RUN + "Expected `str`, got `array` - at `$.output`."),
        ({"started": float("inf")}, RUN + "`started` is not finite."),
        ({"started": 10**400}, RUN + "Number out of range - at `$.started`."),
        ({"versions": {"jax": {}}}, RUN + "Expected `str`, got `object` - at `$.versions[...]`."),
        ({"processor": 1}, RUN + "Expected `str | null`, got `int` - at `$.processor`."),
        ({"leaves": [LEAF] * 1001}, RUN + "Expected `array` of length <= 1000 - at `$.leaves`."),
        ({"leaves": [{**LEAF, "array": "float32[2"}]}, RUN + "Expected `str` matching regex"),
        ({"leaves": [{**LEAF, "values": 3}]}, RUN + "`values` is more than there can be - at `$.leaves[0]`."),
        ({"leaves": [{**LEAF, "array": "float32[9999]", "values": 1001}]}, RUN + "`values` is more than there can be"),
        ({"bits": "no base64"}, RUN + "Invalid base64 encoded string - at `$.bits`."),
    ],
)
def test_a_run_that_is_not_what_we_write_is_refused(changes, why):
    with pytest.raises(FlaxMagicsError) as error:
        runs_of(notebook(cell(), cell(run(**changes))))
    assert str(error.value).startswith(f"cell 2 holds an output of flax_magics that cannot be read: {why}")
    assert str(error.value).isprintable()


@pytest.mark.parametrize(
    ("loop", "why"),
    [
        ([], LOOP + "Expected `object`, got `array`."),
        ({"version": 3}, "the loop was written by another version of flax_magics (its format is 3, not 1)."),
        ({"version": 1}, LOOP + "Object missing required field `runs`."),
        ({"version": 1, "runs": [1]}, LOOP + "Expected `object`, got `int` - at `$.runs[0]`."),
        ({"version": 1, "runs": [{}]}, RUN + "Object missing required field `command`."),
        ({"version": 1, "runs": [], "further": {"runs": 0}}, LOOP + "Expected `int` >= 1 - at `$.further.runs`."),
    ],
)
def test_a_loop_that_is_not_what_we_write_is_refused(loop, why):
    with pytest.raises(FlaxMagicsError) as error:
        runs_of(notebook(cell(loop=loop)))
    assert str(error.value) == f"cell 1 holds an output of flax_magics that cannot be read: {why}"


def test_more_rows_than_there_can_be_are_refused(monkeypatch):
    monkeypatch.setattr(notebooks, "_ROWS", 2)
    with pytest.raises(FlaxMagicsError, match="the loop has more than 2 rows"):
        runs_of(notebook(cell(loop={"version": 1, "runs": [run(), {}, {}]})))


def valid(source: Any = "x") -> dict[str, Any]:
    code = {"cell_type": "code", "metadata": {}, "source": source, "outputs": [], "execution_count": None}
    return {"nbformat": 4, "nbformat_minor": 4, "metadata": {}, "cells": [code]}


def test_an_old_notebook_without_ids_and_with_lines_is_read(tmp_path, recwarn):
    path = tmp_path / "old.ipynb"
    path.write_text(json.dumps(valid(["a\n", "b"])))
    assert read(path).cells[0].source == "a\nb"
    assert recwarn.list == []


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "it is no notebook: Expecting value: line 1 column 1 (char 0)"),
        (b"\xff\xfe", "it is no notebook: 'utf-8' codec can't decode byte 0xff in position 0: invalid start byte"),
        (b"[" * 100_000, "it is no notebook: it is nested too deeply."),
        (b'{"nbformat": true}', "it is no notebook of format 4, which Jupyter writes: open it there and save it."),
        (b'{"nbformat": 4', "it is no notebook: Expecting ',' delimiter: line 1 column 15 (char 14)"),
        (
            json.dumps({**valid(), "cells": [{"cell_type": "\x1b[31mno"}]}).encode(),
            "it is no valid notebook: {'cell_type': '\\x1b[31mno'} is not valid under any of the given schemas",
        ),
        (json.dumps(valid(5)).encode(), None),
        (b'{"nbformat": ' + b"9" * 10_000 + b"}", None),
    ],
)
def test_a_file_that_is_no_notebook_is_refused(tmp_path, data, why):
    path = tmp_path / "a.ipynb"
    path.write_bytes(data)
    with pytest.raises(FlaxMagicsError) as error:
        read(path)
    if why is not None:
        assert str(error.value) == why
    assert len(str(error.value)) < 300
    assert str(error.value).startswith("it is no ")


def test_what_is_no_file_is_refused_and_not_waited_for(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "large").write_bytes(b"12345")
    for path, why in [
        (tmp_path / "pipe", "it is no file."),
        (Path("/dev/zero"), "it is no file."),
        (tmp_path, "it cannot be read: Is a directory."),
        (tmp_path / "none", "it cannot be read: No such file or directory."),
    ]:
        with pytest.raises(FlaxMagicsError) as error:
            read(path)
        assert str(error.value) == why
    monkeypatch.setattr(notebooks, "LARGEST", 4)
    with pytest.raises(FlaxMagicsError, match="it has 5 bytes, and 4 is the most that is read"):
        read(tmp_path / "large")
