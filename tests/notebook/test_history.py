"""`%flax_history`, `%flax_replay`, and what `%flax` and `--keys-of` say of earlier draws."""

from __future__ import annotations

import re

from by_hand import bits

from .conftest import MODEL

NORMED = """\
%%flaxmodel
class Normed(nn.Module):
  @nn.compact
  def __call__(self, x, train):
    x = nn.BatchNorm(use_running_average=not train)(nn.Dense(4)(x))
    return nn.Dropout(0.5, deterministic=not train)(x)
b = Normed()
"""


def fixed(text: str) -> str:
    """Times and days as `…`; digests too, for they depend on how the machine computes."""
    text = re.sub(r"\d\d:\d\d:\d\d", "hh:mm:ss", text)
    text = re.sub(r"\d{4}-\d\d-\d\d", "day", text)
    return re.sub(r"\b[0-9a-f]{16}\b", "digest__________", text)


def test_the_draws_of_a_session(notebook):
    notebook(NORMED)
    notebook("%flax_init -q b(x, train=False);")
    notebook("y = %flax_apply -q --train b(x)")
    notebook("for i in range(20):\n  %flax_apply --train b(x + i)")
    notebook("%flax_key -q latent;")
    notebook.fails("%flax_apply b(x)")
    out = notebook("%flax_history")
    assert fixed(out) == (
        "history · 23 runs · seed 0 · day\n"
        "  draw  what           digest            cell  time\n"
        "     1  init b         digest__________  [4]   hh:mm:ss\n"
        "        float32[3,4,4], train=False · params 375f238f\n"
        "     1  apply b train  digest__________  [5]   hh:mm:ss\n"
        "        float32[3,4,4], train=True · dropout f71f4ea9\n"
        "  2–21  apply b train  20 runs           [6]   hh:mm:ss\n"
        "        float32[3,4,4], train=True · dropout a93d9cf0 …\n"
        "    22  key latent     digest__________  [7]   hh:mm:ss\n"
        f"        latent {notebook.session.history()[-1].keys['latent']}"
    )
    assert max(map(len, out.splitlines())) <= 80


def test_a_part_of_them(notebook):
    notebook(NORMED)
    notebook("for i in range(3):\n  %flax_apply -q --train b(x)")
    notebook("%flax_key -q latent;")
    assert fixed(notebook("%flax_history --last 1")).splitlines()[:2] == [
        "history · 4 runs · seed 0 · day",
        "  3 earlier runs left out",
    ]
    assert "key latent" not in notebook("%flax_history b")
    assert "no model is registered as `c`; registered: b." in notebook.fails("%flax_history c")


def test_a_session_without_a_draw(notebook):
    assert notebook("%flax_history") == "history · 0 runs · seed 0\n  no draw yet: %flax_apply net(x) makes one"
    assert "nothing has been drawn in this session that could be run again." in notebook.fails("%flax_replay 1")


def test_a_loop_replays_identically_whatever_was_shown_of_it(notebook):
    notebook(NORMED)
    notebook("for i in range(10):\n  %flax_apply -q --train b(x + i)")
    notebook("for i in range(10):\n  %flax_apply --train b(x + i)")
    notebook(NORMED.replace("nn.Dense(4)(x)", "2 * nn.Dense(4)(x)"))
    notebook("%flax_key -q --seed 3")
    root = notebook("%flax_key")
    for draw in range(1, 21):
        assert notebook(f"run = %flax_replay 0:{draw}") == (
            f"b · train · draw {draw} of seed 0 · replayed ·\n"
            "    identical, by its digest: float32[3,4,4]\n"
            "! b was edited since: this is its code as it was then"
        )
        assert notebook["run"].agreement.identical
    assert notebook("%flax_key") == root
    assert len(notebook.session) == 20


def test_it_is_of_a_run_by_its_name_too_and_gives_the_run(sharp_bits):
    sharp_bits("y = %flax_apply -o first --train my_model(x)")
    sharp_bits("z = %flax_apply -q -o other --train --keys-of 1 my_model(x[:2])")
    assert sharp_bits("%flax_replay other") == (
        "my_model · train · draw 1 of seed 0 · replayed · identical: float32[2,4,3]"
    )
    assert sharp_bits("again = %flax_replay -q last") == ""
    assert bits(sharp_bits["again"].output) == bits(sharp_bits["y"])
    sharp_bits("%flax_replay -q -o same 1;")
    assert sharp_bits["same"].replayed
    assert "· replayed" in sharp_bits("%flax_history")


def test_a_mistake(sharp_bits):
    sharp_bits("y = %flax_apply -q my_model(x)")
    assert "draw 9 of seed 0 was not made in this session: it has draw 1 alone." in sharp_bits.fails("%flax_replay 9")
    wrong = "FlaxMagicsError: %flax_replay takes a number, last, seed:N or the name of a Run, not `{}`.\n"
    assert sharp_bits.fails("%flax_replay y") == wrong.format("y") + ("  write: %flax_replay last")
    sharp_bits("y = %flax_apply -q -o first my_model(x)")
    assert sharp_bits.fails("%flax_replay frst") == wrong.format("frst") + (
        "  did you mean first?\n  write: %flax_replay first"
    )
    sharp_bits("%flax_key -q --seed 3")
    assert sharp_bits.fails("%flax_replay 2") == (
        "FlaxMagicsError: draw 2 of seed 3 was not made in this session: it has no draw.\n"
        "  0:2 is draw 2 of seed 0\n"
        "  write: %flax_history"
    )


def test_what_was_let_go_of(notebook):
    notebook(f"%config FlaxMagics.replay_bytes = 0\n{''}")
    notebook(f"%%flaxmodel\n{MODEL}\nnet = MyModel(3, True)")
    notebook("y = %flax_apply -q net(x)")
    out = " ".join(notebook.fails("%flax_replay 1").split())
    assert "draw 1 of seed 0 cannot be run again: its inputs and variables were let go of" in out
    assert "kept for %flax_replay 0 B of 0 B" in " ".join(notebook("%flax").split())


def test_the_layers_with_other_masks_are_named(sharp_bits):
    sharp_bits("y = %flax_apply -q --train my_model(x)")
    out = sharp_bits("z = %flax_apply --train --keys-of 1 my_model(x[:2])")
    assert out.endswith("! other random numbers than in draw 1 at Dropout_0: [3,4,3] there, [2,4,3] here")
    sharp_bits("%config FlaxMagics.notes = {'masks': False}")
    assert "other random numbers" not in sharp_bits("z = %flax_apply --train --keys-of 1 my_model(x[:2])")


def test_cells_that_were_run_again_are_named_and_marked(sharp_bits):
    sharp_bits("y = %flax_apply -q my_model(x)")
    sharp_bits("x = x + 1")
    sharp_bits("y = %flax_apply -q my_model(x)")
    out = sharp_bits("%flax")
    assert (
        "cells that drew and were run again, or whose variables were rebound since\n"
        "  the text of cell [4] was run again as [6]; x was rebound by [5] in between\n"
        "  Run All draws once for each: whether it gives the same, only a fresh run can\n"
        "  tell\n"
    ) in out
    history = sharp_bits("%flax_history")
    assert "! the same text run again since, as [6]" in history
    assert "! x was rebound by [5] since [4]" in history


def test_nothing_is_said_where_none_was(sharp_bits):
    sharp_bits("y = %flax_apply -q my_model(x)")
    sharp_bits("x")
    sharp_bits("x")
    assert "run again" not in sharp_bits("%flax")
