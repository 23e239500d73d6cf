"""NaN and infinity in an output: counted in the report and in the Run, and NaN is a sharp bit."""

from __future__ import annotations

import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sessions import session_of

from flax_magics.base.output import Values, values_of

X = jnp.ones((2, 3))


def log():
    return nn.Sequential([nn.Dense(4, kernel_init=nn.initializers.ones), jnp.log])


def sharp_bits(run):
    return [(note.text, note.form) for note in run.notes if note.kind == "nan"]


FINDING = "import jax\nwith jax.debug_nans(True):\n    %flax_apply --eager --keys-of last net(x)"


def test_the_numbers_of_each_array():
    found = values_of({"a": jnp.array([1.0, 3.0, jnp.nan, jnp.inf, -jnp.inf]), "b": (jnp.arange(3), jnp.zeros((0, 2)))})
    assert found == (Values("['a']", 5, 1, 2, 1.0, 3.0, 2.0), Values("['b'][1]", 0, 0, 0, None, None, None))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float8_e5m2"])
def test_of_every_width(dtype):
    assert values_of(jnp.array([1.0, 3.0, jnp.nan, jnp.inf], dtype)) == (Values("", 4, 1, 1, 1.0, 3.0, 2.0),)


def test_float8_without_infinity_has_nan_in_its_place():
    assert values_of(jnp.array([1.0, jnp.inf], "float8_e4m3fn")) == (Values("", 2, 1, 0, 1.0, 1.0, 1.0),)


def test_complex_numbers_have_no_range():
    assert values_of(jnp.array([1 + 1j, complex("nan")])) == (Values("", 2, 1, 0, None, None, None),)


def test_what_is_no_number_is_left_out():
    assert values_of((jax.random.key(0), True, 3, "text", None, jnp.arange(2), np.array(["a"]))) == ()
    assert values_of(float("nan")) == (Values("", 1, 1, 0, None, None, None),)


def test_an_array_of_many_parts(monkeypatch):
    monkeypatch.setattr("flax_magics.base.output.CHUNK", 3)
    array = np.arange(10, dtype=np.float32).reshape(2, 5)
    array[1, 4] = np.nan
    assert values_of(array) == (Values("", 10, 1, 0, 0.0, 8.0, 4.0),)


def test_a_run_whose_output_holds_nan_says_so():
    session = session_of(log())
    runs = [session.apply("net", x) for x in (-X, -X, X, X, -X)]
    assert [run.values[0].nan for run in runs] == [8, 8, 0, 0, 8]
    assert [len(sharp_bits(run)) for run in runs] == [1, 1, 0, 0, 1]
    assert sharp_bits(runs[0]) == [("the output of net holds NaN", FINDING.replace("(x)", "(…)"))]
    assert [run.notes for run in session.runs] == [run.notes for run in runs]


def test_nan_that_is_in_new_params_is_told_of_there():
    session = session_of(nn.Dense(2, kernel_init=nn.initializers.constant(jnp.nan)))
    first, later = session.apply("net", X), session.apply("net", X)
    assert [note.kind for note in first.notes] == ["nan params"]
    assert [note.kind for note in later.notes] == ["nan"]


def test_nan_that_was_in_the_input_is_told_as_such():
    run = session_of(nn.Dense(2)).apply("net", X * jnp.nan)
    assert sharp_bits(run) == [("the output of net holds NaN, and so does its input", None)]


def test_infinity_is_counted_and_no_sharp_bit():
    masked = nn.Sequential([lambda x: jnp.where(x > 0, x, -jnp.inf)])
    run = session_of(masked).apply("net", jnp.array([1.0, -1.0, 2.0]))
    assert run.notes == ()
    assert run.values == (Values("", 3, 0, 1, 1.0, 2.0, 1.5),)


def test_it_is_in_the_run_as_data_and_in_a_saved_session(tmp_path):
    file = str(tmp_path / "s.safetensors")
    session = session_of(log())
    run = session.apply("net", -X)
    data = json.loads(json.dumps(run.to_json()))
    assert data["values"] == [{"path": "", "size": 8, "nan": 8, "inf": 0, "least": None, "most": None, "mean": None}]
    assert [note["kind"] for note in data["notes"]] == ["nan"]
    session.save(file)
    session.load(file)
    assert session.runs[0].values == run.values
    assert session.runs[0].notes == run.notes


# -- in a notebook

NET = """\
%%flaxmodel net = Net()
class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        return jnp.log(nn.Dense(4, kernel_init=nn.initializers.ones)(x))
"""


@pytest.fixture
def negative(notebook):
    """A notebook with `net`, and an `x` for which its output is all NaN."""
    notebook(NET)
    notebook("x = -jnp.ones((2, 3))")
    return notebook


def test_the_report_counts_them_and_the_lines_stop_at_the_operation(negative):
    out = negative("y = %flax_apply net(x)").splitlines()
    assert out[2] == "  out   float32[2,4] · 8 of 8 NaN"
    assert out[-4:] == [
        "! the output of net holds NaN",
        "  write: import jax",
        "         with jax.debug_nans(True):",
        "             %flax_apply --eager --keys-of last net(x)",
    ]
    before = negative.session.draws
    stopped = negative.fails(FINDING)
    assert "FloatingPointError: invalid value (nan) encountered in log" in stopped
    assert "return jnp.log(nn.Dense(4" in stopped
    assert negative.session.draws == before


def test_infinity_and_several_arrays_in_the_report(notebook):
    notebook("%flaxmodel net = nn.Sequential([lambda x: {'a': x, 'b': jnp.where(x > 1, jnp.nan, 1 / (x - 1))}])")
    notebook("x = jnp.array([0.0, 1.0, 2.0, 3.0])")
    out = notebook("y = %flax_apply net(x)").splitlines()
    assert out[2] == "  out   {a: float32[4], b: float32[4]} · 2 of 8 NaN, first in ['b'] · 1 of 8"
    assert out[3] == "        inf, first in ['b']"


def test_details_have_range_and_mean(notebook):
    notebook(NET)
    notebook("%config FlaxMagics.report = 'details'")
    notebook("x = jnp.ones((2, 3))")
    out = notebook("y = %flax_apply net(x)")
    assert "  out     float32[2,4]\n          1.1 … 1.1, mean 1.1\n" in out


def test_quiet_runs_say_it_once_and_large_ones_when_the_cell_ends(negative):
    assert negative("y = %flax_apply -q net(x)").splitlines()[0] == "! the output of net holds NaN"
    assert negative("y = %flax_apply -q net(x)") == ""
    negative("big = -jnp.ones((2_000_000, 3), jnp.float16)")
    negative(NET.replace("net = Net()", "big_net = Net()"))
    said = negative("y = %flax_apply -q big_net(big)")
    # Of what is larger than is held until then, nothing is read.
    assert said in ("", "! the output of big_net holds NaN")


def test_nan_that_came_with_the_input_is_said_once(negative):
    assert negative("y = %flax_apply -q net(x * jnp.nan)") == "! the output of net holds NaN, and so does its input"
    assert negative("y = %flax_apply -q net(x * jnp.nan)") == ""


def test_it_can_be_quieted(negative):
    negative("%config FlaxMagics.notes = {'nan': False}")
    out = negative("y = %flax_apply net(x)")
    assert "8 of 8 NaN" in out
    assert "!" not in out


def test_a_loop_says_it_once(notebook):
    notebook(NET)
    notebook("%flax_apply -q net(jnp.ones((2, 3)));")
    out = notebook("for i in range(4):\n  %flax_apply net(jnp.full((2, 3), 1.0 - i))")
    assert out.count("the output of net holds NaN") == 2  # of the run that is the first with it, and beneath the count
