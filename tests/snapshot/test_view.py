"""What `%flax_load` says, as text and as HTML."""

from __future__ import annotations

import unicodedata

from html_reader import EVIL, Reader
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len

from flax_magics.report.text import Notice
from flax_magics.run import Note
from flax_magics.snapshot import view
from flax_magics.snapshot.view import SHORT, Loaded, Waiting, loaded_bundle, loaded_text

FOUND = Loaded(
    Notice("a.safetensors", ("loaded", "net waits to be registered", "2 runs")),
    (
        Waiting("net", "Net(3)", "class Net(nn.Module):\n  pass", "%flaxmodel net"),
        Waiting("b", "B()", "", "%flaxmodel b"),
    ),
)


def test_a_line_and_the_code_of_what_waits() -> None:
    assert loaded_text(FOUND) == (
        "a.safetensors · loaded · net waits to be registered · 2 runs\n\n"
        "net = Net(3) · waits for its cell, or for %flaxmodel net ·\n"
        "    its code, which was not run:\n"
        "    class Net(nn.Module):\n      pass\n\n"
        "b = B() · waits for its cell, or for %flaxmodel b · its code is not in the file"
    )


def test_html_says_the_same_and_folds_long_code_away() -> None:
    read = Reader(view.loaded_html(FOUND))
    assert read.text == (
        "a.safetensors · loaded · net waits to be registered · 2 runs"
        " net = Net(3) · waits for its cell, or for %flaxmodel net · its code, which was not run:"
        " code of net class Net(nn.Module): pass"
        " b = B() · waits for its cell, or for %flaxmodel b · its code is not in the file"
    )
    assert "<details open><summary>code of net</summary><pre>" in view.loaded_html(FOUND)
    long = Waiting("net", "Net(3)", "\n".join(f"a{i} = {i}" for i in range(SHORT + 1)), "%flaxmodel net")
    assert "<details><summary>code of net</summary><pre>" in view.loaded_html(Loaded(FOUND.notice, (long,)))


def test_quiet_shows_sharp_bits_alone() -> None:
    assert loaded_bundle(Loaded(FOUND.notice, FOUND.waiting, quiet=True), "auto") == {}
    noted = Notice("a", ("loaded",), (Note("versions", "saved with other versions"),))
    shown = loaded_bundle(Loaded(noted, FOUND.waiting, quiet=True), "text")
    assert shown == {"text/plain": "a · loaded\n! saved with other versions"}


@settings(max_examples=50, deadline=None)
@given(st.text() | st.just(EVIL))
def test_whatever_stands_in_a_file_is_safe_to_show(text: str) -> None:
    note = Note("versions", text or "-", text or None)
    found = Loaded(Notice(text, (text, text), (note,)), (Waiting(text, text, text, text),))
    plain, rich = loaded_text(found), view.loaded_html(found)
    assert not any(unicodedata.category(character) in ("Cc", "Cf", "Cs") for character in plain.replace("\n", ""))
    # A line that is to be pasted is not broken.
    wrapped = loaded_text(Loaded(Notice(text, (text, text), (Note("versions", text or "-"),))))
    assert all(cell_len(line) <= 80 for line in wrapped.splitlines())
    assert "<script" not in rich
    Reader(rich)
