"""`%flax_apply`, `%flax_init`, `%flax_key` and `%flax` as a person writes them, in one shell."""

from __future__ import annotations

import re

import jax
import pytest
from by_hand import bits, keys_of

from .conftest import net

FIXED = net("nn.Dropout(0.5, deterministic=True)(nn.Dense(2)(x))", field="training: bool = False\n")


def times(text: str) -> str:
    """Times, which no test owns here, as `…`; they also say where a line is broken, and whether inputs were waited for."""
    return re.sub(r"\d+(\.\d+)? (µs|ms|s)\b", "…", text.replace(" ·\n    ", " · ")).replace(" · waited …", "")


@pytest.mark.parametrize(
    "cell",
    [
        "y = %flax_apply --train my_model(x)",
        "y = %flax_apply --train my_model(x);",
        "y = %flax_apply --train my_model(\n    x,  # the input\n)",
        "%%flax_apply --train\ny = my_model(x)",
        "# a comment\n%%flax_apply --train\nz = x\ny = my_model(\n  z)",
        "def f(given):\n  out = %flax_apply --train my_model(given)\n  return out\ny = f(x)",
        "for i in range(1):\n  y = %flax_apply --train my_model(x)",
        "%flax_apply --train -o run my_model(x)\ny = run.output",
        "%flax_apply --train -o run my_model(x=x);\nimport flax_magics\ny = flax_magics.session().runs[-1].output",
    ],
)
def test_every_way_to_write_it_gives_the_same(sharp_bits, cell):
    sharp_bits(cell)
    model, keys = sharp_bits["MyModel"](3, True), keys_of(1)("params", "dropout")
    variables = model.init(keys["params"], sharp_bits["x"])
    by_hand = jax.jit(model.apply)(variables, sharp_bits["x"], rngs={"dropout": keys["dropout"]})
    assert bits(sharp_bits["y"]) == bits(by_hand)


def test_a_semicolon_keeps_out_clean(sharp_bits):
    assert "Out[" not in sharp_bits("%flax_apply my_model(x);")
    assert "Out[" not in sharp_bits("%%flax_apply\nmy_model(x);")
    assert "Out[" in sharp_bits("%flax_apply my_model(x)")
    assert "Out[" in sharp_bits("%%flax_apply\nmy_model(x)")


def test_two_lines_of_a_cell_have_a_report_each(sharp_bits):
    sharp_bits("%flax_apply --train my_model(x);")
    out = sharp_bits("%flax_apply --train my_model(x);\n%flax_apply --train my_model(x);")
    assert times(out) == (
        "my_model · train · cpu:0 · draw 2 · reused · run … · weights of draw 1\n"
        "my_model · train · cpu:0 · draw 3 · reused · run … · weights of draw 1"
    )


def test_quiet_shows_nothing_but_a_sharp_bit_not_yet_said(notebook):
    notebook(FIXED)
    assert notebook("y = %flax_apply --train -q Net(x)") == (
        "! Dropout_0 is off although --train was asked: deterministic=True is fixed in\n"
        "  Net (line 6)\n"
        "  in your model: deterministic=not self.training"
    )
    assert notebook("y = %flax_apply --train -q Net(x)") == ""


def test_roofline_holds_it_against_the_machine(sharp_bits):
    out = sharp_bits("%flax_apply --roofline --repeat 5 -o run my_model(x);")
    told = " ".join(out.split())
    assert re.search(r"seed 0 roof [\w -]+: \S+ % of what a large (copy|float32 matmul) reaches out ", told)
    assert "of a large float32 matmul's " in told
    assert len(sharp_bits["run"].timing.steady.times) == 5


def test_roofline_needs_a_program(sharp_bits):
    assert sharp_bits.fails("%flax_apply --roofline --eager my_model(x)") == (
        "FlaxMagicsError: --roofline holds a compiled program against the machine; --eager compiles none.\n"
        "  write: %flax_apply --roofline my_model(x)"
    )


def test_mutable_and_out(notebook):
    notebook(net("nn.BatchNorm(use_running_average=not train)(nn.Dense(2)(x))", "x, train=False"))
    notebook("y, updates = %flax_apply --train --mutable batch_stats -o run Net(x)")
    assert set(notebook["updates"]) == {"batch_stats"}
    assert notebook["run"].output[0] is notebook["y"]
    assert "batch_stats: update 2" in notebook("%flax_apply --train Net(x);")


def test_an_earlier_draw_by_number_last_seed_or_run(sharp_bits):
    sharp_bits("a = %flax_apply --train -o run my_model(x)")
    sharp_bits("b = %flax_apply --train my_model(x)")
    for option, expected in (("1", "a"), ("2", "b"), ("last", "b"), ("0:1", "a"), ("run", "a")):
        out = sharp_bits(f"c = %flax_apply --train --keys-of {option} my_model(x)")
        assert bits(sharp_bits["c"]) == bits(sharp_bits[expected])
        assert "again" in out
    assert sharp_bits.session.draws == 2


def test_a_restart_says_what_it_means(sharp_bits):
    assert sharp_bits("%flax_key --seed 0") == "root key · restarted · seed 0 · next is draw 1"
    sharp_bits("%flax_apply my_model(x);")
    assert sharp_bits("%flax_key --seed 0") == (
        "root key · restarted · seed 0 · next is draw 1\n"
        "! my_model keeps the variables that were there\n"
        "  write: %flax_key --seed 0 --fresh\n"
        "! seed 0 was used before in this session: its keys come again"
    )


def test_a_sharp_bit_in_a_loop_is_said_once_and_carried_by_the_counting_line(notebook):
    notebook(FIXED)
    out = notebook("for _ in range(50):\n  %flax_apply --train Net(x)")
    assert out.count("Dropout_0 is off although --train was asked") == 2
    assert "Net · train · cpu:0 · draws 2–50 · 49 runs · reused" in out


def test_a_loop_of_a_file_of_cells_has_its_counting_line_too(notebook, tmp_path, capsys):
    file = tmp_path / "loop.ipy"  # as `ipython loop.ipy` runs it
    file.write_text(
        "net = nn.Dense(3)\n%flaxmodel -q net\nfor _ in range(4):\n  y = %flax_apply net(x)\nprint('end')\n"
    )
    notebook.shell.safe_execfile_ipy(file)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("net", "end"))]
    assert len(lines) == 3
    assert lines[1] == "end"
    assert lines[2].startswith("net · as written · cpu:0 · draws 2–4 · 3 runs · reused")


def test_a_model_that_is_not_plain_is_traced_each_time_and_the_report_says_so(notebook):
    notebook("class Scale:\n  by = 2.0\n  def __call__(self, x):\n    return x * self.by\nscale = Scale()\n")
    notebook(net("scale(nn.Dense(2)(x))"))
    notebook("%flax_apply Net(x);")
    assert times(notebook("%flax_apply Net(x);")) == (
        "Net · as written · cpu:0 · draw 2 · reused, traced in … · run … · weights of draw 1"
    )


def test_eager_says_that_there_is_no_program(sharp_bits):
    out = sharp_bits("%flax_apply --eager my_model(x);")
    assert "  jit   eager, op by op: no program, and JAX compiles each op at its first use" in out
