"""A run as HTML: the same facts, escaped, with nothing to fetch or to run."""

from __future__ import annotations

import html
import re
from pathlib import Path

import numpy as np
import pytest
from html_reader import EVIL, Reader
from msgspec.structs import replace
from runs_to_show import COMPILED, INIT, KEY, NOTED, REPEATED, REUSED

from flax_magics import report
from flax_magics.base.measures import Cost, Limits
from flax_magics.report.html import figures, report_html, segments
from flax_magics.run import InitStats, Note

TEMPLATES = Path(report.__file__).parent / "templates"


def test_without_styles_a_line_reads_as_in_the_terminal() -> None:
    assert Reader(report_html(REUSED, "line")).text == "net · train · cpu:0 · draw 2 · reused · run 0.22 ms"


def test_without_styles_the_normal_form_reads_in_order() -> None:
    text = Reader(report_html(COMPILED, "normal")).text
    assert text.startswith(
        "net · train · cpu:0 · training=True · draw 1 of seed 0 "
        "compile 0.41 s, first run of this program · run 0.22 ms "
        "trace 21.0 ms · lower 12.0 ms · XLA 0.38 s · run 0.22 ms "
        "out float32[3,4,3] vars params: 15 parameters, 60 B keys params → new variables · dropout → Dropout_0 "
        "details Keys stream key made by went to params 375f238f split(root, 3)[1] new variables "
    )
    assert text.endswith(f"By hand {COMPILED.by_hand}")


def test_sharp_bits_and_the_line_to_write_are_there_at_every_level() -> None:
    note = NOTED.notes[0]
    for level in ("off", "line", "normal", "details"):
        assert f"! {note.text} in your model: {note.edit}" in Reader(report_html(NOTED, level)).text  # type: ignore[arg-type]


def test_details_are_closed_until_asked_for() -> None:
    assert "<details>" in report_html(REUSED, "normal")
    assert "<details open>" in report_html(REUSED, "details")
    assert "<details" not in report_html(REUSED, "line")


def test_tables_have_header_cells() -> None:
    html = report_html(REUSED, "details")
    assert '<th scope="col"' in html
    assert '<th scope="row"' in html


def test_the_largest_numerals_are_what_took_time() -> None:
    shown = [(figure.label, figure.time, figure.words) for figure in figures(COMPILED)]
    assert shown == [("compile", "0.41 s", "first run of this program"), ("run", "0.22 ms", "")]
    assert [(f.label, f.time, f.words) for f in figures(REUSED)] == [("run", "0.22 ms", "reused")]
    assert [(f.label, f.time, f.words) for f in figures(INIT)] == [("init", "0.52 ms", "eager")]
    from_disk = figures(replace(COMPILED, program="disk cache"))[0]
    assert (from_disk.label, from_disk.words) == (
        "trace",
        "and read from the disk cache in 0.38 s: first run of this program",
    )
    assert figures(REPEATED)[0].words == "± 0.005 ms of 21 (first outlier: the first run, 0.30 ms)"


def test_the_bar_is_in_proportion() -> None:
    shares = [(phase.name, round(share)) for phase, share in segments(COMPILED)]
    assert shares == [("trace", 5), ("lower", 3), ("XLA", 92), ("run", 0)]
    assert segments(REUSED) == ()


@pytest.mark.parametrize("level", ["off", "line", "normal", "details"])
def test_every_string_is_escaped_and_nothing_is_fetched_or_run(level: str) -> None:
    run = replace(
        COMPILED,
        model=EVIL,
        mode=EVIL,
        switch=EVIL,
        call=EVIL,
        device=EVIL,
        reason=EVIL,
        output={EVIL: np.zeros(3)},
        keys={EVIL: COMPILED.keys["dropout"]},
        used={EVIL: (EVIL,)},
        changed={EVIL: 1},
        sown={EVIL: np.zeros(3)},
        static=(EVIL,),
        by_hand=EVIL,
        made=InitStats(1, 4, (EVIL,)),
        notes=(Note(EVIL, EVIL, EVIL), Note(EVIL, EVIL, f"{EVIL}\n{EVIL}")),
        first=True,
    )
    for shown in (run, replace(run, command="init"), replace(run, command="key"), replace(run, program=EVIL)):
        html = report_html(shown, level)  # type: ignore[arg-type]
        assert "&lt;script&gt;" in html
        for word in ("<script", "http", "src=", "href=", "url(", "@import", "javascript:"):
            assert word not in html
        assert Reader(html).tags <= {
            *("div", "style", "span", "strong", "table", "caption", "thead", "tbody", "tr", "th", "td"),
            *("details", "summary", "pre", "code", "br"),
        }


def test_it_brings_no_colour_of_its_own_and_no_rule_outside_its_class() -> None:
    html = report_html(COMPILED, "details")
    style = html[html.index("<style>") + 7 : html.index("</style>")]
    assert re.search(r"#[0-9a-fA-F]{3}|rgb|hsl", style) is None
    colours = set(re.findall(r"(?<![-\w])color:([^;}]+)", style))
    assert colours == {"inherit"}
    rules = re.sub(r"@container\([^)]*\)\{((?:[^{}]*\{[^{}]*\})*)\}", r"\1", style)
    for selectors in re.findall(r"([^{}]+)\{", rules):
        assert all(selector.strip().startswith(".flax-magics") for selector in selectors.split(","))


def test_a_key_is_a_line_at_every_level() -> None:
    text = "key latent · draw 3 of seed 0 · 33b04f44"
    assert {
        Reader(html).text
        for html in (report_html(KEY, "line"), report_html(KEY, "normal"), report_html(KEY, "details"))
    } == {text}


def test_the_rates_and_the_memory_of_a_repeated_run_are_rows() -> None:
    run = replace(REPEATED, cost=Cost(2e6, 4e3), limits=Limits("cpu:0", "float32", 2e10, 2e9))
    html = report_html(run, "normal")
    for item in (
        "9.5 GFLOP/s, 48 % of a large float32 matmul&#39;s 20.0 GFLOP/s",
        "19.0 MB/s, 1 % of a large copy&#39;s 2.0 GB/s",
        "(2.0 MFLOP and 4.0 KB a run by XLA&#39;s count)",
        "1.5 KB by XLA&#39;s analysis: arguments, temporaries and outputs",
    ):
        assert f'<span class="fm-item">{item}</span>' in html
    assert "<caption>Memory, by XLA's analysis</caption>" in html


def test_no_report_is_read_as_formulas() -> None:
    # JupyterLab, nbviewer and nbconvert look for `$…$` in HTML, and typeset what a name or a number of dollars says.
    for template in TEMPLATES.glob("*.html"):
        roots = re.findall(r'<div class="(flax-magics[ "][^"]*)', template.read_text("utf-8"))
        assert set(roots) <= {"flax-magics mathjax_ignore tex2jax_ignore"}, template.name


def test_a_word_of_hundreds_of_letters_says_where_it_may_be_broken() -> None:
    word = "k" * 60 + "<b>" + "é" * 200
    page = report_html(replace(REUSED, used={"dropout": (word,)}), "details")
    [row] = re.findall(r"<tr><th[^>]*>keys</th>.*?</tr>", page)
    shown = html.unescape(re.sub(r"<(?!wbr)[^>]*>", " ", row))
    assert word in shown.replace("<wbr>", "")
    assert max(map(len, re.split(r"<wbr>|\s", shown))) == 16
    assert "<wbr>" not in report_html(REUSED, "details")
