"""`%flax_history`, `%flax_replay`, and what `%flax` and `--keys-of` say of earlier draws."""

from __future__ import annotations

from by_hand import bits
from sharp_bits import MODEL


def test_a_part_of_them(sharp_bits):
    sharp_bits("for i in range(3):\n  %flax_apply -q my_model(x)")
    sharp_bits("%flax_key -q latent;")
    assert sharp_bits("%flax_history --last 1").splitlines()[1] == "  3 earlier runs left out"
    assert "key latent" not in sharp_bits("%flax_history my_model")


def test_a_session_without_a_draw(notebook):
    assert notebook("%flax_history") == "history · 0 runs · seed 0\n  no draw yet: %flax_apply net(x) makes one"


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


def test_an_init_that_is_quiet_shows_no_tree_and_neither_does_its_replay(sharp_bits):
    assert sharp_bits("%flax_init -q my_model(x)") == ""
    sharp_bits("variables = %flax_init -q my_model(x)")
    assert [*sharp_bits["variables"]] == ["params"]
    assert sharp_bits("%flax_replay 1") == (
        "my_model · init · draw 1 of seed 0 · replayed ·\n    identical, by its digest: every variable"
    )


def test_a_run_that_is_not_kept_is_marked(sharp_bits):
    sharp_bits("%config FlaxMagics.replay_bytes = 0")
    sharp_bits("y = %flax_apply -q my_model(x)")
    assert any(line.endswith(" · no replay") for line in sharp_bits("%flax_history").splitlines())
    sharp_bits("%config FlaxMagics.replay_bytes = 256_000_000")


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
    notebook("%config FlaxMagics.replay_bytes = 0")
    notebook(MODEL)
    notebook("y = %flax_apply -q my_model(x)")
    out = " ".join(notebook.fails("%flax_replay 1").split())
    assert "draw 1 of seed 0 cannot be run again: its inputs and variables were let go of" in out
    assert "kept for %flax_replay 0 B of 0 B" in " ".join(notebook("%flax").split())


def test_nothing_is_said_where_none_was(sharp_bits):
    sharp_bits("y = %flax_apply -q my_model(x)")
    sharp_bits("x")
    sharp_bits("x")
    assert "run again" not in sharp_bits("%flax")
