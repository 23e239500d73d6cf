"""`%flax_export` in a real kernel: shell lines, and the next cell."""

from __future__ import annotations

import re

from alone import run_alone
from sharp_bits import SHARP_BITS

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
    assert written.splitlines()[0] == "session.py · written · 6 cells · 3 runs"
    notebook.run("%precision")  # of the shell, which later tests have too
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
