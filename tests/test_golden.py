"""What users see of the commands, against transcripts of notebooks: any change of it is one of tests/golden."""

from __future__ import annotations

import os
import time

import golden
import pytest

from flax_magics import Session, _session

# As in a notebook: they are Flax's, of its own layers.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.mark.parametrize("path", sorted(golden.FOLDER.glob("*.txt")), ids=lambda path: path.stem)
def test_the_notebook_shows_what_its_transcript_has(path, shell, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(time, "perf_counter", lambda: 0.0)  # what XLA's own threads take
    monkeypatch.setattr(_session, "_current", Session(seed=0, clock=golden.clock()))
    before = path.read_text(encoding="utf-8")
    after = golden.rerun(before, shell)
    if os.environ.get(golden.UPDATE):
        path.write_text(after, encoding="utf-8")
        before = after
    assert after == before, "python -m tests.support.golden writes what is shown now; git diff tells what changed"
    shell.run_cell("%unload_ext flax_magics")
