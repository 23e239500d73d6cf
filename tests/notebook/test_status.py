"""The session at a glance, and the root key."""

from __future__ import annotations

from textwrap import dedent

from html_reader import EVIL, Reader
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len
from runs_to_show import COMPILED, REUSED

from flax_magics.notebook.status import KeyCard, Status, key_bundle, status_bundle

CARD = KeyCard(seed=0, draws=3, root="375f238f", impl="threefry2x32")
STATUS = Status(
    devices=(("cpu:0", "cpu", ""), ("gpu:0", "NVIDIA H100", "1.2 GB of 80.0 GB")),
    key=CARD,
    models=(("net", "Net(features=8)", "15 parameters, 60 B"), ("vae", "VAE(latents=20)", "not initialised")),
    runs=(COMPILED, REUSED),
    amounts=(("kept for replay", "1.2 MB of 256 MB"), ("programs kept", "3")),
    versions=("flax_magics 0.1.0", "jax 0.10.2", "flax 0.12.8"),
    commands=(("%flax", "the session at a glance"), ("%flax_init net(x)", "gives the variables")),
)


def status_text(status: Status) -> str:
    return status_bundle(status, "text")["text/plain"]


def key_text(card: KeyCard) -> str:
    return key_bundle(card, "text")["text/plain"]


def test_the_session_at_a_glance() -> None:
    assert status_text(STATUS) == dedent("""\
        flax_magics 0.1.0 · jax 0.10.2 · flax 0.12.8

        devices
          cpu:0   cpu
          gpu:0   NVIDIA H100   1.2 GB of 80.0 GB

        root key
          375f238f · seed 0 · 3 draws so far · next is draw 4 · threefry2x32

        models
          net   Net(features=8)   15 parameters, 60 B
          vae   VAE(latents=20)   not initialised

        last runs
          net · train · cpu:0 · draw 1 · 15 parameters · compiled in 0.41 s ·
              run 0.22 ms
          net · train · cpu:0 · draw 2 · reused · run 0.22 ms

        memory and caches
          kept for replay   1.2 MB of 256 MB
          programs kept     3

        commands
          %flax               the session at a glance
          %flax_init net(x)   gives the variables""")


def test_what_ran_out_of_order_is_told_with_how_to_check_it() -> None:
    status = STATUS._replace(reruns=("cell [4] ran 3 times; x changed in [7]", "cell [9] ran twice"))
    block = (
        "out of order\n  cell [4] ran 3 times; x changed in [7]\n  cell [9] ran twice\n  To check: Restart & Run All"
    )
    assert f"\n\n{block}\n\nmemory" in status_text(status)
    page = Reader(status_bundle(status, "auto")["text/html"]).text
    assert "Out of order cell [4] ran 3 times; x changed in [7] cell [9] ran twice To check: Restart & Run All" in page


def test_an_empty_session_says_how_to_begin() -> None:
    text = status_text(Status(devices=(), key=KeyCard(0, 0, "00000000", "threefry2x32")))
    assert text == dedent("""\
        flax_magics

        root key
          00000000 · seed 0 · no draw so far · next is draw 1 · threefry2x32

        models
          none yet: begin a cell with %%flaxmodel, or write %flaxmodel net

        last runs
          none yet""")


def test_the_last_five_runs_are_shown() -> None:
    text = status_text(Status(devices=(), key=CARD, runs=(COMPILED, *[REUSED] * 5)))
    assert "draw 1 " not in text
    assert text.count("draw 2 ") == 5


def test_the_root_key() -> None:
    assert key_text(CARD) == dedent("""\
        root key 375f238f · seed 0 · 3 draws so far · next is draw 4 · threefry2x32
          latent = %flax_key latent    draws a key under a name
          %flax_key --seed 0           starts again at draw 1: the same keys once more
          %flax_key --seed 0 --fresh   and every model is initialised anew""")


def test_the_html_says_the_same_words() -> None:
    ignoring = str.maketrans("", "", "· ")
    for bundle in (status_bundle(STATUS, "auto"), key_bundle(CARD, "auto")):
        words = "".join(bundle["text/plain"].split()).translate(ignoring).lower()
        assert "".join(Reader(bundle["text/html"]).text.split()).translate(ignoring).lower() == words


def test_they_are_escaped() -> None:
    status = Status(
        devices=((EVIL, EVIL, EVIL),),
        key=KeyCard(0, 1, EVIL, EVIL),
        models=((EVIL, EVIL, EVIL),),
        amounts=((EVIL, EVIL),),
        versions=(EVIL, EVIL),
        commands=((EVIL, EVIL),),
    )
    for page in (status_bundle(status, "auto")["text/html"], key_bundle(status.key, "auto")["text/html"]):
        assert "<script" not in page
    assert set(status_bundle(status, "text")) == {"text/plain"}


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=120), st.text(max_size=120))
def test_nothing_is_wider_than_80_columns(name: str, text: str) -> None:
    status = Status(
        devices=((name, text, ""),),
        key=KeyCard(12345678901234567890, 10**9, name, text),
        models=((name, text, text), ("net", text, name)),
        runs=(COMPILED,),
        amounts=((name, text),),
        versions=(f"{name} {text}",),
        commands=((name, text),),
    )
    for row in (status_text(status) + "\n" + key_text(status.key)).split("\n"):
        assert cell_len(row) <= 80, row
