"""What is said of notebooks: verdicts as a text of 80 columns, as JSON, and as an exit status."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from made import HERE, VALUES, cell, notebook, run, sample
from msgspec.structs import replace

from flax_magics.errors import FlaxMagicsError
from flax_magics.verify.command import Result, exit_status, text, to_json
from flax_magics.verify.compare import Tolerance, compare
from flax_magics.verify.notebooks import other_order, runs_of

OTHER_MACHINE = {"processor": "x86_64-B", "threads": 8}
NUDGED = np.nextafter(VALUES, np.float32(9))


def result(stored: Any, now: Any, tolerance: Tolerance | None = None) -> Result:
    """Of a notebook whose one cell holds the runs `stored`, and gives `now`."""
    cells = [runs_of(notebook(cell(*(runs if isinstance(runs, list) else [runs])))) for runs in (stored, now)]
    return Result("a.ipynb", compare(*cells, tolerance), tolerance=tolerance)


def says(stored: Any, now: Any, tolerance: Tolerance | None = None) -> list[str]:
    lines = text(result(stored, now, tolerance)).splitlines()
    assert max(map(len, lines)) <= 80
    return lines


HEAD = "  cell  first line              draw  what    how far, in how many values"


def test_bits_that_agree_agree_whatever_else_a_run_says_of_itself_and_on_another_machine():
    other = run(call="net(y)", mode="eval", model="other", started=20.0, replayed=True)
    assert says(run(), run()) == says(run(), other) == ["a.ipynb: agrees: 1 run, keys and every bit"]
    assert says(run(), run(**OTHER_MACHINE)) == [
        "a.ipynb: agrees: 1 run, keys and every bit",
        "  other than stored  processor x86_64-A → x86_64-B   threads 2 → 8",
    ]


def test_a_digest_that_differs_is_told_with_the_distance():
    assert says(run(draw=3), run(draw=3, digest="f" * 16, **sample(NUDGED))) == [
        "a.ipynb: differs: 1 of 1 run",
        HEAD,
        "  1     y = %flax_apply net(x)  3     digest  1 ulp, 4.77e-07 in 6 of 6",
    ]


def test_where_a_run_differs_the_order_in_which_cells_were_run_is_told():
    def cells(*counts):
        made = notebook(*(cell(run(draw=draw), source=f"y = {draw}") for draw in range(1, 1 + len(counts))))
        for one, count in zip(made.cells, counts, strict=True):
            one.execution_count = count
        return made

    assert other_order(cells(1, 4, 5)) == other_order(cells(None, 2, None)) == other_order(cells(3, 3)) == ""
    assert other_order(cells(1, 4, None, 3)) == "cell 4 was run before cell 2"
    order = other_order(cells(2, 1))
    told = "  its cells were not run from top to bottom: cell 2 was run before cell 1"
    found = replace(result(run(), run(keys={})), order=order)
    assert text(found).splitlines()[-1] == told
    assert to_json([found])["notebooks"][0]["order"] == "cell 2 was run before cell 1"
    assert text(Result("a.ipynb", failed="cell 1 fails.", order=order)).splitlines()[-1] == told
    assert text(replace(result(run(), run()), order=order)) == "a.ipynb: agrees: 1 run, keys and every bit"


def test_what_differs_outside_of_the_values_that_are_stored_is_told_as_that():
    leaves = [{"path": "", "array": "float32[100,100]", "values": 6}]
    stored, now = run(leaves=leaves), run(leaves=leaves, digest="f" * 16)
    assert says(stored, now)[2] == ("  1     y = %flax_apply net(x)  1     digest  in none of 6 stored, of 10,000")
    assert says(stored, now, Tolerance(1e-5)) == [
        "a.ipynb: agrees: 1 run, keys and values within rtol 1e-05 in 1 (by 6 of their",
        "  10,000 values)",
    ]


def test_other_bits_on_another_machine_are_not_comparable_without_a_tolerance():
    now = run(digest="f" * 16, **sample(NUDGED), **OTHER_MACHINE)
    row = "  1     y = %flax_apply net(x)  1     digest  1 ulp, 4.77e-07 in 6 of 6"
    changed = "  other than stored  processor x86_64-A → x86_64-B   threads 2 → 8"
    assert says(run(), now) == [
        "a.ipynb: not comparable: 1 run, keys alone in 1",
        HEAD,
        row,
        changed,
        "  the values that are stored can be compared",
        "  write: python -m flax_magics verify --rtol 1e-5 a.ipynb",
    ]
    assert says(run(), now, Tolerance(0.0, 1e-6)) == [
        "a.ipynb: agrees: 1 run, keys and values within rtol 0, atol 1e-06 in 1 (by 6 of",
        "  their 6 values)",
        changed,
    ]
    assert says(run(), now, Tolerance(1e-9)) == ["a.ipynb: differs: 1 of 1 run", HEAD, row, changed]


def test_a_notebook_of_an_earlier_version_says_that_it_knows_less():
    old = run(versions={"jax": "0.10.2", "flax": "0.12.8"})
    for name in ("leaves", "bits", "device_kind", "processor", "threads"):
        del old[name]
    assert says(old, run()) == [
        "a.ipynb: agrees: 1 run, keys and every bit",
        "  other than stored  jaxlib not stored → 0.10.2   device kind not stored → cpu",
        "                     processor not stored → x86_64-A   threads not stored → 2",
    ]
    lines = says(old, run(digest="f" * 16), Tolerance(1e-5))
    assert lines[:3] == [
        "a.ipynb: not comparable: 1 run, keys alone in 1",
        HEAD,
        "  1     y = %flax_apply net(x)  1     digest  012345 → ffffff (no values stored)",
    ]
    assert says(old, run(output="float32[7]"))[2] == (
        "  1     y = %flax_apply net(x)  1     shape  float32[2,3] → float32[7]"
    )


def test_keys_are_compared_on_any_machine():
    keys = {"params": "375f238f00000000", "dropout": "f71f4ea911111111"}
    assert says(run(), run(keys=keys, **OTHER_MACHINE))[:3] == [
        "a.ipynb: differs: 1 of 1 run",
        "  cell  first line              draw  what  how far, in how many values",
        "  1     y = %flax_apply net(x)  1     keys  dropout f71f4ea900000000 →",
    ]
    keys = {"params": "375f238f00000000"}
    assert says(run(), run(keys=keys))[2] == "  1     y = %flax_apply net(x)  1     keys  dropout f71f4ea9 → none"


def test_shapes_are_compared_on_any_machine():
    now = run(digest="f" * 16, **sample(np.zeros((2, 4), np.float32)), **OTHER_MACHINE)
    assert says(run(), now, Tolerance(1.0, 100.0))[:3] == [
        "a.ipynb: differs: 1 of 1 run",
        HEAD.replace("what  ", "what "),
        "  1     y = %flax_apply net(x)  1     shape  float32[2,3] → float32[2,4]",
    ]
    long = "{" + "a" * 58 + "…"
    one = run(**{**sample(VALUES, paths=("['a']",)), "output": long})
    other = run(**{**sample(VALUES, paths=("['b']",)), "output": long})
    assert says(one, other)[2:] == [
        "  1     y = %flax_apply net(x)  1     shape  ['a'] float32[2,3] → ['b']",
        "                                             float32[2,3]",
    ]


def test_draws_are_named_with_their_seed_and_their_number():
    now = {"digest": "f" * 16, **sample(NUDGED)}
    stored = [run(seed=7, draw=2), run(draw=3, samples=4, started=11.0)]
    rows = says(stored, [run(seed=7, draw=2, **now), run(draw=3, samples=4, started=11.0, **now)])[2:]
    assert rows == [
        "  1     y = %flax_apply net(x)  7:2   digest  1 ulp, 4.77e-07 in 6 of 6",
        "  1     y = %flax_apply net(x)  3–6   digest  1 ulp, 4.77e-07 in 6 of 6",
    ]


def test_of_many_differences_the_first_ten_are_shown():
    runs = [run(draw=draw, started=float(draw)) for draw in range(1, 21)]
    lines = says(runs, [{**one, "digest": "f" * 16} for one in runs])
    assert lines[0] == "a.ipynb: differs: 20 of 20 runs"
    assert len(lines) == 13
    assert lines[-1] == "  … and 10 runs more"


OTHER_REST = {"runs": 5, "keys": "k", "digest": "e"}


@pytest.mark.parametrize(
    ("now", "changes", "first"),
    [
        ({"runs": 5, "keys": "k", "digest": "d"}, {}, "agrees: 6 runs, keys and every bit"),
        ({"runs": 5, "keys": "l", "digest": "d"}, OTHER_MACHINE, "differs: 5 of 6 runs, keys and every bit in 1"),
        (OTHER_REST, {}, "differs: 5 of 6 runs, keys and every bit in 1"),
        (OTHER_REST, OTHER_MACHINE, "not comparable: 6 runs, keys and every bit in 1, keys alone in 5"),
        ({"runs": 6, "keys": "k", "digest": "d"}, {}, "differs: 6 of 6 runs"),
    ],
)
def test_runs_beyond_those_that_are_kept_are_compared_as_one(now, changes, first):
    rest = {"runs": 5, "keys": "k", "digest": "d"}
    cells = [
        runs_of(notebook(cell(loop={"version": 1, "runs": [run(**other)], "further": further})))
        for other, further in (({}, rest), (changes, now))
    ]
    lines = text(Result("a.ipynb", compare(*cells))).splitlines()
    assert lines[0] == f"a.ipynb: {first}"
    if now["digest"] == "e":
        assert lines[2].endswith("later ones  digest  d → e (no values stored)")


def test_strings_of_a_notebook_are_cleaned():
    evil = "\x1b[2J\u202ex\n"
    runs = [run(call=evil, processor=evil + key, keys={evil: key}) for key in "ab"]
    cells = [runs_of(notebook(cell(one, source=f"{evil}\ny"))) for one in runs]
    shown = text(Result(f"{evil}.ipynb", compare(*cells)))
    assert not {"\x1b", "\u202e"} & set(shown)
    assert shown.splitlines()[0] == "\\x1b[2J\\u202ex .ipynb: differs: 1 of 1 run"


def test_values_that_are_not_what_they_are_said_to_be_are_refused():
    cells = [runs_of(notebook(cell(run(digest=digest, bits="AAAA")))) for digest in "ab"]
    with pytest.raises(FlaxMagicsError) as error:
        compare(*cells)
    assert str(error.value) == (
        "cell 1 holds an output of flax_magics that cannot be read: `bits` is not as long as the values are."
    )


def test_json_has_no_number_that_is_not_finite():
    now = run(digest="f" * 16, **sample(np.full((2, 3), np.nan, np.float32)))
    data = to_json([result(run(), now)])
    (found,) = json.loads(json.dumps(data, allow_nan=False))["notebooks"][0]["differences"]
    assert found["values"] == {"compared": 6, "of": 6, "differ": 6, "ulp": None, "absolute": None, "array": ""}
    assert says(run(), now)[2].endswith("digest  NaN in 6 of 6")


def test_json_of_what_agrees():
    (found,) = to_json([replace(result(run(), run()), seconds=1.5)])["notebooks"]
    assert found == {
        "file": "a.ipynb",
        "status": "agrees",
        "message": None,
        "order": None,
        "seconds": 1.5,
        "environment": {},
        "runs": {"all": 1, "agree": 1, "within": 0, "not_comparable": 0, "differ": 0},
        "differences": [],
    }


@pytest.mark.parametrize(
    ("statuses", "expected"),
    [("a", 0), ("ad", 1), ("dfn", 2), ("an", 3), ("ane", 4), ("ed", 1), ("", 4)],
)
def test_the_exit_status_is_that_of_the_worst(statuses, expected):
    results = {
        "a": result(run(), run()),
        "d": result(run(), run(digest="f")),
        "n": result(run(), run(digest="f", **OTHER_MACHINE)),
        "f": Result("f.ipynb", failed="why"),
        "e": Result("e.ipynb"),
    }
    assert exit_status([results[status] for status in statuses]) == expected


def test_what_is_missing_on_either_side_is_a_number_of_runs():
    assert says([run(), run(draw=2)], run())[1:] == [
        "  cell  first line              draw  what  how far, in how many values",
        "  1     y = %flax_apply net(x)        runs  2 → 1",
    ]
    data = to_json([Result("a.ipynb", compare(runs_of(notebook(cell())), runs_of(notebook(cell(run())))))])
    assert data["notebooks"][0]["differences"][0]["stored"] == "0"
    assert HERE["threads"] == 2
