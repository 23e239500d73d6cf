"""`%flax_export` in a real kernel: shell lines, the next cell, and the project's own example."""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
from alone import run_alone
from kernels import RUN_JSON
from sharp_bits import SHARP_BITS

EXAMPLE = Path(__file__).parents[2] / "examples" / "the_sharp_bits.ipynb"
DIGEST = re.compile(r"\b[0-9a-f]{16}$", re.MULTILINE)


def test_a_session_with_shell_lines_is_exported_and_gives_its_digests(open_notebook, tmp_path):
    notebook = open_notebook()
    notebook.run_all(SHARP_BITS)
    digests = [notebook.run("y = %flax_apply my_model(x)").run["digest"]]
    notebook.run("!echo hello\nfiles = !echo a\n%precision 4\nprint(files)")
    digests.append(notebook.run("%%time\ny = %flax_apply --train my_model(x)").run["digest"])
    notebook.fails("1 / 0")
    digests.append(notebook.run("y = %flax_apply --train my_model(x + y.mean())").run["digest"])
    written = notebook.run(f"%flax_export {tmp_path / 'session.py'}").report
    assert written.splitlines()[0] == "session.py · written · 7 cells · 3 runs"
    script = (tmp_path / "session.py").read_text()
    assert "# !echo hello\n# files = !echo a\n# %precision 4\n# Left out: `files` is not there" in script
    assert "# %%time\n" in script
    assert "\n# 1 cell that failed and left nothing is left out.\n" in script
    assert DIGEST.findall(run_alone(tmp_path / "session.py", afresh=True)) == digests


def test_the_script_is_shown_as_code_or_put_into_the_next_cell(open_notebook):
    notebook = open_notebook()
    notebook.run_all(SHARP_BITS)
    notebook.run("y = %flax_apply -q my_model(x)")
    (shown,) = notebook.run("%flax_export --plain").displays
    assert set(shown) == {"text/plain", "text/markdown"}
    assert shown["text/markdown"] == f"```python\n{shown['text/plain']}```\n"
    assert notebook.run("%flax_export --plain --cell").outputs == []
    payload = (
        "(sent,) = get_ipython().payload_manager.read_payload()\nprint(sent['source'], sent['replace'], sent['text'])"
    )
    printed = notebook.run(f"%flax_export --plain --cell\n{payload}").printed
    assert printed == f"set_next_input False {shown['text/plain']}\n"


def test_the_example_exported_runs_without_flax_magics_and_agrees_with_it(open_notebook, tmp_path):
    notebook = open_notebook()
    digests = []
    for cell in nbformat.read(EXAMPLE, 4).cells:
        if cell.cell_type == "code":
            found = notebook.run(cell.source).displays
            runs = [data[RUN_JSON] for data in found if RUN_JSON in data]
            digests += [run["digest"] for run in runs if run.get("digest")]
    notebook.run(f"%flax_export -q {tmp_path / 'session.py'}")
    text = (tmp_path / "session.py").read_text()
    assert "flax_magics" not in text
    assert "Left out" not in text
    printed = run_alone(tmp_path / "session.py", afresh=True)
    assert printed.count(": True\n") == 8
    assert ": False\n" not in printed
    assert set(digests) <= set(DIGEST.findall(printed))
    assert len(digests) >= 8
