"""What `%%flaxmodel` says, in a line for each model."""

from __future__ import annotations

import pytest
from html_reader import EVIL, Reader
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len

from flax_magics.cells.journal import Registered
from flax_magics.report import html
from flax_magics.report.html import registered_bundle
from flax_magics.report.notice import registered_text


@pytest.mark.parametrize(
    ("model", "text"),
    [
        (Registered("net", "Net(features=8)"), "net · Net(features=8) · registered"),
        (Registered("net", "Net()", "unchanged", variables="kept"), "net unchanged · variables and programs kept"),
        (Registered("net", "Net()", "unchanged"), "net unchanged · programs kept"),
        (Registered("net", "Net()", "changed", variables="kept"), "net changed · variables kept"),
        (Registered("net", "Net()", "changed", ("f 3→4", "g 1→2")), "net changed: f 3→4, g 1→2 · registered anew"),
        (
            Registered("net", "Net()", "changed", ("a/kernel [4,3]→[4,5]",), "dropped"),
            "net changed: a/kernel [4,3]→[4,5] · variables dropped · next run initialises",
        ),
    ],
)
def test_one_line_says_what_became_of_a_model(model: Registered, text: str) -> None:
    assert registered_text([model]) == Reader(html.registered_html([model])).text == text


def test_several_models_are_several_lines_with_their_checks() -> None:
    models = [
        Registered("net", "Net()", check=(("out", "float32[3]"), ("streams", "dropout"))),
        Registered("critic", "Critic()"),
    ]
    assert registered_text(models) == (
        "net · Net() · registered\n  out      float32[3]\n  streams  dropout\ncritic · Critic() · registered"
    )


def test_nothing_registered_is_nothing_shown() -> None:
    assert registered_bundle([], "auto") == {}


def test_names_are_escaped() -> None:
    model = Registered(EVIL, EVIL, "changed", (EVIL,), "kept", ((EVIL, EVIL),))
    assert "<script" not in registered_bundle([model, Registered(EVIL, EVIL)], "auto")["text/html"]
    assert set(registered_bundle([model], "text")) == {"text/plain"}


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=150), st.text(max_size=150))
def test_nothing_is_wider_than_80_columns(name: str, text: str) -> None:
    model = Registered(name, text, "changed", (text, name), "dropped", ((name, text),))
    assert all(cell_len(row) <= 80 for row in registered_text([model, Registered(name, text)]).split("\n"))
