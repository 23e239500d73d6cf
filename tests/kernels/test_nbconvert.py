"""nbconvert and papermill: reports survive into a page, and a notebook that fails is a failed command."""

from __future__ import annotations

import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import nbformat
from sharp_bits import SHARP_BITS

APPLY = "y = %flax_apply --train my_model(x)"
LOSS = "import optax\n\ndef loss(net, batch):\n  return (net(batch) ** 2).mean()"
TRAIN = "%flax_train --optimizer optax.adam(0.1) --steps 20 --eval x loss(my_model, x)"
MISTAKE = "y = %flax_apply --train my_modl(x)"


def written(folder: Path, *cells: str) -> Path:
    notebook = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell(cell.strip("\n")) for cell in cells],
        metadata={"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}},
    )
    path = folder / "a notebook.ipynb"
    nbformat.write(notebook, path)
    return path


def run(*command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", *command], cwd=folder, capture_output=True, text=True, timeout=300)


class Elements(HTMLParser):
    """Names and attributes of the elements inside reports."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.depth = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        if tag == "div":
            self.depth += bool(self.depth) or "flax-magics" in (attributes.get("class") or "").split()
        if self.depth:
            self.found.append((tag, attributes))

    def handle_endtag(self, tag: str) -> None:
        if tag == "div" and self.depth:
            self.depth -= 1


def test_a_notebook_becomes_a_page_with_its_reports(tmp_path):
    path = written(tmp_path, *SHARP_BITS, APPLY, LOSS, TRAIN)
    done = run("nbconvert", "--execute", "--to", "html", path.name, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    page = path.with_suffix(".html").read_text(encoding="utf-8")
    elements = Elements()
    elements.feed(page)
    tags = [tag for tag, _ in elements.found]
    assert tags.count("details") == 2
    assert tags.count("polyline") == 2  # the losses, and those of the eval data
    assert tags.count("circle") == 10
    assert "open" not in dict(elements.found)["details"]
    assert "th" in tags
    assert "script" not in tags
    assert not any({"src", "href", "onclick"} & set(attributes) for _, attributes in elements.found)


def test_papermill_fails_at_the_cell_and_keeps_what_ran_before_it(tmp_path):
    path = written(tmp_path, *SHARP_BITS, APPLY, MISTAKE, "print('never')")
    done = run("papermill", path.name, "out.ipynb", "--no-progress-bar", folder=tmp_path)
    assert done.returncode != 0
    assert "no model is called `my_modl`; registered: my_model." in done.stderr
    cells = [cell for cell in nbformat.read(tmp_path / "out.ipynb", 4).cells if cell.cell_type == "code"]
    apply, mistake, never = cells[3:]
    assert "text/html" in apply.outputs[0].data
    assert [output.output_type for output in mistake.outputs] == ["error"]
    assert never.execution_count is None
