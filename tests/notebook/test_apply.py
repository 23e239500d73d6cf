"""`%flax_apply`, `%flax_init`, `%flax_key` and `%flax` as a person writes them, in one shell."""

from __future__ import annotations

import re

import jax
import pytest
from by_hand import bits

from .conftest import MODEL_CELL, net

FIXED = net("nn.Dropout(0.5, deterministic=True)(nn.Dense(2)(x))", field="training: bool = False\n")


def by_hand(notebook, *, training: bool = False, draws: int = 1):
    """Variables of draw 1, and the output of the last of so many draws."""
    root_key, params_key, dropout_key = jax.random.split(jax.random.key(0), 3)
    model = notebook["MyModel"](3, training)
    variables = model.init(params_key, notebook["x"])
    for _ in range(draws - 1):
        root_key, _, dropout_key = jax.random.split(root_key, 3)
    return variables, jax.jit(model.apply)(variables, notebook["x"], rngs={"dropout": dropout_key})


def times(text: str) -> str:
    """Times, which no test owns here, as `…`.

    How much of a compilation ran beside the init depends on them too, where a line is broken, and whether a busy machine
    took a millisecond to say that the inputs were there.
    """
    text = re.sub(r"\d+(\.\d+)? (µs|ms|s)\b", "…", text.replace(" ·\n    ", " · "))
    return re.sub(r" \(… beside the init\)|\n  wait  inputs were ready after …| · waited …", "", text)


def test_the_notebook_with_its_report(sharp_bits):
    out = sharp_bits("y = %flax_apply my_model(x)")
    assert times(out) == (
        "new session, seed 0\n"
        "my_model · as written (training=False) · cpu:0 · draw 1 of seed 0\n"
        "  out   float32[3,4,3]\n"
        "  vars  initialised in draw 1    params: 15 parameters, 60 B\n"
        "  keys  params → new variables    dropout → nobody\n"
        "  init  …, eager\n"
        "  jit   compiled in …: first run of this program\n"
        "  run   …"
    )
    variables, y = by_hand(sharp_bits)
    assert bits(sharp_bits["y"]) == bits(y)
    assert bits(sharp_bits.session.models["my_model"].variables) == bits(variables)


def test_train_in_the_second_draw_and_a_line_when_nothing_is_new(sharp_bits):
    sharp_bits("%flax_apply my_model(x);")
    out = sharp_bits("y = %flax_apply --train my_model(x)")
    assert times(out) == (
        "my_model · train (training=True) · cpu:0 · draw 2 of seed 0\n"
        "  out   float32[3,4,3]\n"
        "  vars  initialised in draw 1\n"
        "  keys  dropout → Dropout_0\n"
        "  jit   compiled in …: now with --train\n"
        "  run   …"
    )
    assert bits(sharp_bits["y"]) == bits(by_hand(sharp_bits, training=True, draws=2)[1])
    assert times(sharp_bits("y = %flax_apply --train my_model(x)")) == (
        "my_model · train · cpu:0 · draw 3 · reused · run … · weights of draw 1"
    )
    assert bits(sharp_bits["y"]) == bits(by_hand(sharp_bits, training=True, draws=3)[1])


def test_init_in_one_cell_and_apply_in_the_next(sharp_bits):
    sharp_bits("variables = %flax_init my_model(x)")
    sharp_bits("y = %flax_apply --train my_model(x)")
    variables, y = by_hand(sharp_bits, training=True)
    assert bits(sharp_bits["variables"]) == bits(variables)
    assert bits(sharp_bits["y"]) == bits(y)


def test_running_all_cells_again_equals_a_restart(notebook):
    cells = [
        "%flax_key --seed 0 --fresh",
        MODEL_CELL,
        "a = %flax_apply my_model(x)",
        "k = %flax_key latent",
        "b = %flax_apply --train my_model(x + jax.random.normal(k, x.shape))",
        "v = %flax_init my_model(x)",
        "c = %flax_apply --train my_model(x)",
    ]

    def run_all() -> list[object]:
        for cell in cells:
            notebook(cell)
        return [bits(notebook[name]) for name in "abcv"]

    first = run_all()
    assert run_all() == first
    assert "!" not in notebook("%flax_key --seed 0 --fresh")


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
    sharp_bits("keep = None")
    sharp_bits(cell)
    assert bits(sharp_bits["y"]) == bits(by_hand(sharp_bits, training=True)[1])


def test_a_semicolon_keeps_out_clean(sharp_bits):
    assert "Out[" not in sharp_bits("%flax_apply my_model(x);")
    assert "Out[" not in sharp_bits("%%flax_apply\nmy_model(x);")
    assert "Out[" in sharp_bits("%flax_apply my_model(x)")
    assert "Out[" in sharp_bits("%%flax_apply\nmy_model(x)")


def test_a_loop_shares_one_counting_line(sharp_bits):
    sharp_bits("%flax_apply --train my_model(x);")
    out = sharp_bits("for i in range(10):\n  %flax_apply --train my_model(x)")
    assert times(out) == (
        "my_model · train · cpu:0 · draw 2 · reused · run … · weights of draw 1\n"
        "my_model · train · cpu:0 · draws 3–11 · 9 runs · reused · run median … · weights of draw 1"
    )
    out = sharp_bits("%flax_apply --train my_model(x);\n%flax_apply --train my_model(x);")
    assert times(out) == (
        "my_model · train · cpu:0 · draw 12 · reused · run … · weights of draw 1\n"
        "my_model · train · cpu:0 · draw 13 · reused · run … · weights of draw 1"
    )


def test_quiet_shows_nothing_but_a_sharp_bit_not_yet_said(notebook):
    notebook(FIXED)
    assert notebook("y = %flax_apply --train -q Net(x)") == (
        "! Dropout_0 is off although --train was asked: deterministic=True is fixed in\n"
        "  Net (line 6)\n"
        "  in your model: deterministic=not self.training"
    )
    assert notebook("y = %flax_apply --train -q Net(x)") == ""


def test_a_mistyped_stream_does_not_pass_in_silence(notebook):
    notebook(net("nn.Dropout(0.5, deterministic=False, rng_collection='dropuot')(nn.Dense(2)(x))"))
    out = notebook("y = %flax_apply Net(x)")
    assert out.splitlines()[-1] == "! the stream `dropuot` is asked for by Dropout_0: is `dropout` meant?"


def test_repeat_shows_median_and_spread(sharp_bits):
    out = sharp_bits("%flax_apply --repeat 7 my_model(x);")
    said = " ".join(times(out).split())  # an outlier, if there was one, may need a line more
    assert " run median … ± … of 7 " in said
    assert re.search(r" rate .*/s .*/s \(.* a run by XLA's count\) memory ", said)
    assert said.endswith(" by XLA's analysis: arguments, temporaries and outputs")
    assert sharp_bits.session.draws == 1


def test_roofline_holds_it_against_the_machine(sharp_bits):
    out = sharp_bits("%flax_apply --roofline --repeat 5 -o run my_model(x);")
    assert "of a large float32 matmul's " in " ".join(out.split())
    assert "of a large copy's " in " ".join(out.split())
    assert len(sharp_bits["run"].timing.steady.times) == 5
    limits = sharp_bits["run"].limits
    assert (limits.device, limits.dtype) == ("cpu:0", "float32")
    sharp_bits("%flax_apply --roofline -o again my_model(x);")
    assert sharp_bits["again"].limits is limits
    assert len(sharp_bits["again"].timing.steady.times) == 20


def test_roofline_needs_a_program(sharp_bits):
    assert sharp_bits.fails("%flax_apply --roofline --eager my_model(x)") == (
        "FlaxMagicsError: --roofline holds a compiled program against the machine; --eager compiles none.\n"
        "  write: %flax_apply --roofline my_model(x)"
    )


def test_mutable_and_variables_and_out(notebook):
    notebook(net("nn.BatchNorm(use_running_average=not train)(nn.Dense(2)(x))", "x, train=False"))
    notebook("y, updates = %flax_apply --train --mutable batch_stats -o run Net(x)")
    assert set(notebook["updates"]) == {"batch_stats"}
    assert notebook["run"].output[0] is notebook["y"]
    assert "batch_stats: update 2" in notebook("%flax_apply --train Net(x);")
    notebook("z = %flax_apply --variables {'params': run.output[1], **{k: jax.tree.map(jnp.zeros_like, v) for k, v in "
             "__import__('flax_magics').session().models['Net'].variables.items()}} Net(x)")  # fmt: skip
    assert not notebook["z"].any()


def test_an_earlier_draw_by_number_last_seed_or_run(sharp_bits):
    sharp_bits("a = %flax_apply --train -o run my_model(x)")
    sharp_bits("b = %flax_apply --train my_model(x)")
    for option, expected in (("1", "a"), ("2", "b"), ("last", "b"), ("0:1", "a"), ("run", "a")):
        out = sharp_bits(f"c = %flax_apply --train --draw {option} my_model(x)")
        assert bits(sharp_bits["c"]) == bits(sharp_bits[expected])
        assert "again" in out
    assert sharp_bits.session.draws == 2
    assert sharp_bits.fails("%flax_apply --draw soon my_model(x)") == (
        "FlaxMagicsError: --draw takes a number, last, seed:N or the name of a Run, not `soon`.\n"
        "  write: %flax_apply --draw last my_model(x)"
    )


def test_a_key_is_drawn_under_a_name(sharp_bits):
    assert sharp_bits("k = %flax_key dropout") == ("new session, seed 0\nkey dropout · draw 1 of seed 0 · f71f4ea9")
    assert bits(sharp_bits["k"]) == bits(jax.random.split(jax.random.key(0), 3)[2])


def test_a_restart_says_what_it_means(sharp_bits):
    assert sharp_bits("%flax_key --seed 0") == "root key · restarted · seed 0 · next is draw 1"
    sharp_bits("%flax_apply my_model(x);")
    assert sharp_bits("%flax_key --seed 0") == (
        "root key · restarted · seed 0 · next is draw 1\n"
        "! my_model keeps the variables that were there\n"
        "  write: %flax_key --seed 0 --fresh\n"
        "! seed 0 was used before in this session: its keys come again"
    )
    assert sharp_bits("%flax_key --seed 0 --fresh") == (
        "root key · restarted · seed 0 · next is draw 1 · models initialise anew"
    )


@pytest.mark.parametrize("command", ["%flaxmodel", "%flax_init", "%flax_apply"])
def test_a_bare_command_help_and_a_question_mark_all_help(notebook, command):
    bare = notebook(command)
    assert bare == notebook(f"{command} --help") == notebook(f"{command} -h")
    assert "examples:" in bare
    assert all(len(line) <= 80 for line in bare.splitlines())


def test_a_sharp_bit_in_a_loop_is_said_once_and_carried_by_the_counting_line(notebook):
    notebook(FIXED)
    out = notebook("for _ in range(50):\n  %flax_apply --train Net(x)")
    assert out.count("Dropout_0 is off although --train was asked") == 2
    assert "Net · train · cpu:0 · draws 2–50 · 49 runs · reused" in out


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
