"""The README's cells and lines, run one after the other as a reader would."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from by_hand import bits

README = (Path(__file__).parents[2] / "README.md").read_text("utf-8")
CELLS = re.findall(r"^```python\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
LINES = re.findall(r"^\| `([^`]*%[^`]*)` \|", README.partition("## The commands")[2], re.MULTILINE)


def test_its_cells_and_the_lines_of_its_tables_run_in_their_order(shell, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    places = {README.index(f"```python\n{cell}"): cell for cell in CELLS}
    places |= {README.index(f"| `{line}` |"): line for line in LINES}
    ran = {}
    for _, cell in sorted(places.items()):
        result = shell.run_cell(cell)
        assert result.success, cell
        ran[cell] = shell.user_ns.get("y")
    in_three_cells = next(y for cell, y in ran.items() if "y = %flax_apply --train" in cell)
    assert bits(in_three_cells) == bits(shell.user_ns["y_by_hand"])
    assert shell.user_ns["run"].steps == 20


def test_a_reader_gets_through_it():
    lines = README.splitlines()
    assert len(lines) < 250
    assert [line for line in lines if len(line) > 120] == []


@pytest.mark.parametrize("target", re.findall(r"\]\(([^)#:]+)[)#]|srcset=\"([^\"]+)|src=\"([^\"]+)", README))
def test_what_it_links_to_is_there(target):
    assert (Path(__file__).parents[2] / "".join(target)).exists()
