"""A report is as long as its news, and carries its data."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from runs_to_show import COMPILED, INIT, KEY, NOTED, REPEATED, REUSED

from flax_magics.base.jsondata import RUN_JSON
from flax_magics.report.html import bundle, level
from flax_magics.report.html import report_html as html
from flax_magics.report.text import report as text
from flax_magics.run import Run


@pytest.mark.parametrize(
    ("run", "expected"),
    [
        (REUSED, "line"),
        (COMPILED, "normal"),
        (INIT, "normal"),
        (KEY, "line"),
        (NOTED, "normal"),
        (REPEATED, "normal"),
        (replace(REUSED, first=True), "normal"),
        (replace(KEY, first=True), "normal"),
        (replace(REUSED, program="disk cache"), "line"),
    ],
)
def test_auto_is_as_long_as_the_news(run: Run, expected: str) -> None:
    assert level(run, "auto") == expected


@pytest.mark.parametrize("setting", ["off", "line", "normal", "details"])
def test_a_setting_is_obeyed(setting: str) -> None:
    assert level(COMPILED, setting) == setting


def test_a_bundle_has_text_html_and_data() -> None:
    shown = bundle(REUSED, "line", "auto")
    assert shown["text/plain"] == text(REUSED, "line")
    assert shown["text/html"] == html(REUSED, "line")
    assert shown[RUN_JSON] == REUSED.to_json()
    assert json.loads(json.dumps(shown[RUN_JSON]))["draw"] == 2


def test_style_text_leaves_the_html_out() -> None:
    assert set(bundle(REUSED, "line", "text")) == {"text/plain", RUN_JSON}


def test_off_shows_sharp_bits_alone() -> None:
    assert bundle(REUSED, "off", "auto") == {}
    assert set(bundle(NOTED, "off", "auto")) == {"text/plain", "text/html"}
