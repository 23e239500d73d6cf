"""`%flax_save` and `%flax_load` as a person writes them."""

from __future__ import annotations

import re

import numpy as np
import pytest
from by_hand import bits
from safetensors import numpy

from flax_magics import _session

NET = """\
%%flaxmodel net = Net({})
class Net(nn.Module):
  features: int
  @nn.compact
  def __call__(self, x, train=False):
    x = nn.BatchNorm(use_running_average=not train)(nn.Dense(self.features)(x))
    return nn.Dropout(0.5, deterministic=not train)(x)
"""
CODE = """
net = Net(features=3) · waits for its cell, or for %flaxmodel net ·
    its code, which was not run:
    %%flaxmodel net = Net(3)
    class Net(nn.Module):
      features: int
      @nn.compact
      def __call__(self, x, train=False):
        x = nn.BatchNorm(use_running_average=not train)(nn.Dense(self.features)(x))
        return nn.Dropout(0.5, deterministic=not train)(x)"""

UNFIT = """\
net · Net(features=4) · registered ·
    the variables in a.safetensors do not fit, and none is used:
    BatchNorm_0/bias [3]→[4], BatchNorm_0/scale [3]→[4], Dense_0/bias [3]→[4],
    Dense_0/kernel [4,3]→[4,4]"""


@pytest.fixture
def here(notebook, tmp_path, monkeypatch):
    """A notebook in a folder of its own, with a model that ran twice."""
    monkeypatch.chdir(tmp_path)
    notebook(NET.format(3))
    notebook("for _ in range(2):\n  y = %flax_apply --train -q net(x)")
    yield notebook
    session = _session._current
    if session is not None:
        session.autosave(None)


def sizes(text):
    return re.sub(r"\d[\d.]* (B|KB)", "… KB", text)


def restart(notebook):
    """As a fresh kernel has it: no session, no model."""
    _session._current = None
    notebook("del net, Net")


def test_one_line_says_what_was_saved_and_one_what_was_restored(here):
    assert sizes(here("%flax_save a.safetensors")) == (
        "a.safetensors · saved · net: 21 parameters · 2 runs · next is draw 3 of seed 0 ·\n    … KB"
    )
    y = here("y = %flax_apply --train -q net(x)") or here["y"]
    restart(here)
    assert here("%flax_load a.safetensors") == (
        "a.safetensors · loaded · net waits to be registered · 21 parameters · 2 runs ·\n"
        "    next is draw 3 of seed 0\n" + CODE
    )
    assert here.fails("%flax_apply net(x)") == (
        "FlaxMagicsError: no model is registered as `net` yet: its variables from `a.safetensors` wait for it,"
        " until the cell that defines it is run.\n  form: %flaxmodel net = …"
    )
    assert "net   Net(features=3)   21 parameters in a.safetensors wait until its cell is" in here("%flax")
    assert here.fails("%flax_replay 2").endswith("form: %flax_apply --keys-of 0:2 --train net(…)")
    assert here(NET.format(3)) == "net · Net(features=3) · registered · variables from a.safetensors"
    here("y = %flax_apply --train -q net(x)")
    assert bits(here["y"]) == bits(y)


def test_a_model_that_is_there_is_restored_at_once(here):
    here("%flax_save a.safetensors")
    _session._current = None
    here("%flaxmodel net")
    assert here("%flax_load a.safetensors") == (
        "a.safetensors · loaded · net restored · 21 parameters · 2 runs ·\n    next is draw 3 of seed 0"
    )
    assert "draw 3" in here("y = %flax_apply --train net(x)")


def test_what_does_not_fit_is_told_where_the_model_is_registered(here):
    here("%flax_save a.safetensors")
    restart(here)
    here("%flax_load -q a.safetensors")
    assert here(NET.format(4)) == UNFIT
    assert here.fails("%flax_load a.safetensors") == (
        "FlaxMagicsError: the variables in `a.safetensors` do not fit: `net` as registered does not have them."
        " Nothing was loaded.\n"
        "  net: BatchNorm_0/bias [3]→[4]\n"
        "  net: BatchNorm_0/scale [3]→[4]\n"
        "  net: Dense_0/bias [3]→[4]\n"
        "  net: Dense_0/kernel [4,3]→[4,4]"
    )
    assert here(NET.format(3)).endswith("variables from a.safetensors")


@pytest.mark.parametrize(
    ("written", "name"), [("my file", "my file"), ("'quoted name'", "quoted name"), ('"ö"', "ö"), ("-- -odd", "-odd")]
)
def test_names_of_files_may_have_spaces_and_quotes(here, tmp_path, written, name):
    here(f"%flax_save -q {written}")
    assert (tmp_path / name).exists()
    here(f"%flax_load -q {written}")


def test_quiet_says_nothing_but_sharp_bits(here):
    assert here("%flax_save -q a") == ""
    assert here("%flax_load -q a") == ""
    here("y = %flax_apply -q net(x)")
    assert here("%flax_load -q a") == (
        "a · loaded · net restored · 21 parameters · 2 runs · next is draw 3 of seed 0\n"
        "! gone with the session that was here: 1 run of net; root key and history are\n  those of the file now"
    )


def test_autosave_is_turned_on_and_off_and_shown(here):
    assert sizes(here("%flax_save --autosave a")) == (
        "a · autosave on, saved · net: 21 parameters · 2 runs ·\n    next is draw 3 of seed 0 · … KB"
    )
    here("y = %flax_apply --train -q net(x)")
    here.session.autosaving.flush()
    status = "".join(here("%flax").split())
    assert re.search(r"autosavea,lastat\d\d:\d\d:\d\dwith3drawsofseed0,[\d.]+KB", status)
    assert here("%flax_save --autosave off") == "autosave · off · a stays as it was saved last"
    assert here("%flax_save --autosave off") == "autosave · was off"
    assert "autosave " not in here("%flax").partition("commands")[0]


def test_an_autosave_of_a_fresh_kernel_does_not_replace_the_session_that_is_there(here):
    here("%flax_save -q a")
    restart(here)
    assert re.sub(r"\d\d:\d\d:\d\d", "00:00:00", here("%flax_save --autosave a")) == (
        "a · autosave on · nothing saved yet\n"
        "! a has a session of 2 runs, saved at 00:00:00: what changes variables next\n"
        "  replaces it, unless it is loaded first\n"
        "  write: %flax_load a"
    )
    here("%flax_load -q a")
    here(NET.format(3))
    here("y = %flax_apply --train -q net(x)")
    here.session.autosaving.flush()
    assert here.session.autosaving.last.draws == 3


def test_an_edit_since_is_told_with_the_variables(here):
    here("%flax_save -q a")
    restart(here)
    here("%flax_load -q a")
    assert here(NET.format(3).replace("0.5", "0.25")) == (
        "net · Net(features=3) · registered · variables from a · Net edited since"
    )


def test_an_autosave_that_fails_is_said_once_at_the_next_command(here, tmp_path):
    here("%flax_save -q --autosave a")
    (tmp_path / "a").unlink()
    (tmp_path / "a").mkdir()
    said = [here("y = %flax_apply --train -q net(x)")]  # that soon, if the thread is quick
    here.session.autosaving.flush()
    expected = (
        "autosave · fails · a is not there any more\n! `a` is a folder, not a file. write: %flax_save --autosave off"
    )
    said += [here("y = %flax_apply -q net(x)") for _ in range(2)]
    assert sorted(re.sub(r"! `/.*?/a` is", "! `a` is", text.replace("\n  ", " ")) for text in said) == [
        "",
        "",
        expected,
    ]
    assert "autosave" in here("%flax")


def test_a_file_and_a_file_to_save_by_itself_are_a_mistake(here):
    assert here.fails("%flax_save --autosave a b") == (
        "FlaxMagicsError: --autosave takes its own file, and `b` stands after it.\n"
        "  write: %flax_save b\n         %flax_save --autosave a"
    )


def test_a_file_that_is_no_session_is_not_replaced(here, tmp_path):
    numpy.save_file({"kernel": np.ones(2)}, "net.safetensors")
    for name, content in (
        ("mine.py", b"x = 1\n"),
        ("mine.pkl", b"\x80\x04N."),
        ("net", b"{"),
        ("net_2.safetensors", b""),
    ):
        (tmp_path / name).write_bytes(content)
    before = {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    refused = "FlaxMagicsError: `{}` is there already, and no %flax_save wrote it.\n  write: {} {}.safetensors"
    for option in ("", " --autosave"):
        line = f"%flax_save{option}"
        for name, free in (("mine.py", "mine"), ("mine.pkl", "mine"), ("net", "net_3"), ("net.safetensors", "net_3")):
            assert here.fails(f"{line} {name}") == refused.format(name, line, free)
        assert here.fails(f"{line} 'new file.pkl'") == (
            "FlaxMagicsError: a session is a file with the ending .safetensors, and `new file.pkl` has another.\n"
            f'  write: {line} "new file.safetensors"'
        )
    assert {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before
    assert here.session.autosaving is None
    here("%flax_save -q net_2.safetensors")  # an empty file, such as `tempfile` makes: nothing is lost
    (tmp_path / "net_2.safetensors").rename(tmp_path / "session.old")
    here("%flax_save -q session.old")
    assert here("%flax_load session.old").startswith("session.old · loaded · net restored · 21 parameters")


def test_autosave_replaces_no_other_file_that_has_taken_its_place(here, tmp_path):
    here("%flax_save -q --autosave a.safetensors")
    (tmp_path / "a.safetensors").write_text("mine")
    here("y = %flax_apply --train -q net(x)")
    here.session.autosaving.flush()
    assert here.session.autosaving.error == f"`{tmp_path}/a.safetensors` is there already, and no %flax_save wrote it."
    assert (tmp_path / "a.safetensors").read_text() == "mine"


def test_code_of_the_file_is_shown_and_never_run(here, tmp_path, monkeypatch):
    here(
        "%%flaxmodel evil = Evil()\n"
        "class Evil(nn.Module):\n"
        "  text: str = '<script>alert(1)</script>\\x1b[2J'\n"
        "  globals().setdefault('ran', []).append(1)\n"
        "  def __call__(self, x):\n"
        "    return x\n"
    )
    here("%flax_init -q evil(x)")
    here("%flax_save -q a")
    assert here["ran"] == [1]
    restart(here)
    published = []
    monkeypatch.setattr(here.shell.display_pub, "publish", lambda data, *a, **k: published.append(data))
    here("%flax_load a")
    (shown,) = [data for data in published if data.get("text/plain")]
    assert here["ran"] == [1]
    assert "<script>" not in shown["text/html"].replace("<style>", "")
    assert "&lt;script&gt;alert(1)" in shown["text/html"]
    assert "\x1b" not in shown["text/plain"] + shown["text/html"]
