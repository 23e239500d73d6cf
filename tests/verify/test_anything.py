"""Whatever stands in an output under our name, there is a verdict or one clear message."""

from __future__ import annotations

import json
import unicodedata
from typing import Any

import nbformat
from hypothesis import example, given, settings
from hypothesis import strategies as st
from made import cell, run

from flax_magics.errors import FlaxMagicsError
from flax_magics.verify.command import Result, text, to_json
from flax_magics.verify.compare import Tolerance, compare
from flax_magics.verify.notebooks import runs_of

LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
ANYTHING = st.recursive(LEAVES, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=8)
FIELDS = st.sampled_from([*run(), "runs", "further"])
ARRAY = st.builds("{}[{}]".format, st.sampled_from(["float32", "int4", "bfloat16", "complex64", "x"]), st.text("0123,"))
LEAF = st.fixed_dictionaries(
    {"path": st.text(), "array": ARRAY | st.text(), "values": st.integers(-2, 9) | st.integers()}
)
BITS = st.sampled_from(["", "AAAA", "AAAAAAAA", "AACAfwAAwH8=", "AAAAAAAA8H8AAAAAAADwfw==", "="])
CHANGED = st.dictionaries(FIELDS, ANYTHING, max_size=3) | st.fixed_dictionaries(
    {"leaves": st.lists(LEAF, max_size=3), "bits": BITS, "digest": st.text(max_size=1)}
)


def judged(stored: Any, now: Any) -> None:
    """Compares two outputs as they come out of files."""
    for tolerance in (None, Tolerance(1e-3, 1e-3)):
        try:
            found = [runs_of(nbformat.from_dict({"cells": [json.loads(json.dumps(data))]})) for data in (stored, now)]
            result = Result("a.ipynb", compare(*found, tolerance), tolerance=tolerance)
        except FlaxMagicsError as error:
            assert str(error).startswith("cell 1 holds an output of flax_magics that cannot be read: ")
            continue
        shown = text(result).replace("\n", "")
        assert not {unicodedata.category(character) for character in shown} & {"Cc", "Cf", "Cs", "Zl", "Zp"}
        json.dumps(to_json([result]), allow_nan=False)


EMPTY = {"leaves": [{"path": "", "array": "float32[]", "values": 0}], "bits": ""}


@settings(max_examples=60, deadline=None)
@given(one=CHANGED, other=CHANGED)
@example(one={**EMPTY, "digest": ""}, other={**EMPTY, "digest": "0"})  # no value was kept
def test_a_run_of_anything(one, other):
    judged(cell(run(**one)), cell(run(**other)))
    judged(cell(run(**one)), cell(run(**one, version=1) if "version" not in one else run()))


@settings(max_examples=60, deadline=None)
@given(loop=ANYTHING | st.fixed_dictionaries({"version": st.just(1), "runs": st.lists(CHANGED, max_size=3)}))
def test_a_loop_of_anything(loop):
    if isinstance(loop, dict) and loop.get("runs"):
        loop["runs"][0] = {**run(), **loop["runs"][0]}
    judged(cell(loop=loop), cell(run()))
    judged(cell(loop=loop), cell(loop=loop))
