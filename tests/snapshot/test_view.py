"""What `%flax_load` says, as text and as HTML."""

from __future__ import annotations

import unicodedata

from html_reader import EVIL, Reader
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from rich.cells import cell_len

from flax_magics.run import Note
from flax_magics.snapshot.save import SHORT, Restored, loaded_bundle, loaded_html, loaded_text
from flax_magics.state.state import SavedModel

NET = SavedModel("net", "linen", "Net(3)", "class Net(nn.Module):\n  pass", {})
FOUND = Restored("a.safetensors", 0, 2, 2, (), (NET, SavedModel("b", "linen", "B()", "", {})), 0)
HEAD = "a.safetensors · loaded · net, b wait to be registered · no model had variables ·"


def test_a_line_and_the_code_of_what_waits() -> None:
    assert loaded_text(FOUND) == (
        f"{HEAD}\n    2 runs · next is draw 3 of seed 0\n\n"
        "net = Net(3) · waits for its cell, or for %flaxmodel net ·\n"
        "    its code, which was not run:\n"
        "    class Net(nn.Module):\n      pass\n\n"
        "b = B() · waits for its cell, or for %flaxmodel b · its code is not in the file"
    )


def test_html_says_the_same_and_folds_long_code_away() -> None:
    assert Reader(loaded_html(FOUND)).text == (
        f"{HEAD} 2 runs · next is draw 3 of seed 0"
        " net = Net(3) · waits for its cell, or for %flaxmodel net · its code, which was not run:"
        " code of net class Net(nn.Module): pass"
        " b = B() · waits for its cell, or for %flaxmodel b · its code is not in the file"
    )
    assert "<details open><summary>code of net</summary><pre>" in loaded_html(FOUND)
    long = replace(NET, source="\n".join(f"a{i} = {i}" for i in range(SHORT + 1)))
    assert "<details><summary>code of net</summary><pre>" in loaded_html(replace(FOUND, waiting=(long,)))


def test_text_shows_a_screenful_of_code_and_how_to_see_the_rest() -> None:
    code = "\n".join(f"a{i} = {i}" for i in range(SHORT - 1))
    restored = replace(
        FOUND, waiting=(replace(NET, source=code), replace(NET, name="b"), replace(NET, name="c", source="1"))
    )
    assert loaded_text(restored).splitlines()[-9:] == [
        "    a22 = 22",
        "",
        "b = Net(3) · waits for its cell, or for %flaxmodel b ·",
        "    its code (2 lines), which was not run:",
        "    write: import flax_magics; print(flax_magics.session().waiting['b'].source)",
        "",
        "c = Net(3) · waits for its cell, or for %flaxmodel c ·",
        "    its code, which was not run:",
        "    1",
    ]


def test_quiet_shows_sharp_bits_alone() -> None:
    assert loaded_bundle(FOUND, "auto", quiet=True) == {}
    noted = replace(FOUND, notes=(Note("versions", "saved with other versions"),))
    shown = loaded_bundle(noted, "text", quiet=True)["text/plain"]
    assert shown.splitlines()[2:] == ["! saved with other versions"]


@settings(max_examples=50, deadline=None)
@given(st.text() | st.just(EVIL))
def test_whatever_stands_in_a_file_is_safe_to_show(text: str) -> None:
    model = SavedModel(text, "linen", text, text, {})
    note = Note("versions", text or "-", text or None)
    found = Restored(text, 0, 2, 2, (text,), (model,), 0, (note,))
    plain, rich = loaded_text(found), loaded_html(found)
    assert not any(unicodedata.category(character) in ("Cc", "Cf", "Cs") for character in plain.replace("\n", ""))
    # A line that is to be pasted is not broken.
    wrapped = loaded_text(replace(found, waiting=(), notes=(Note("versions", text or "-"),)))
    assert all(cell_len(line) <= 80 for line in wrapped.splitlines())
    assert "<script" not in rich
    Reader(rich)
