"""The command line: what it takes, what it refuses, what it needs."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest

from flax_magics.verify import main, notebooks


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("verify", "the following arguments are required: FILE"),
        ("verify a.ipynb -j 0", "argument -j/--jobs: '0' is no number of notebooks: it is a whole number, 1 or more"),
        ("verify a.ipynb --rtol -1", "argument --rtol: '-1' is no tolerance: it is 0 or more, such as 1e-5"),
        ("verify a.ipynb --rtol nan", "argument --rtol: 'nan' is no tolerance: it is 0 or more, such as 1e-5"),
        ("verify a.ipynb --atol 1", "--atol goes with --rtol"),
        (
            "verify a.ipynb --timeout x",
            "argument --timeout: 'x' is no time in seconds: it is a whole number, 0 or more",
        ),
    ],
)
def test_a_mistake_in_the_line_is_told(line, why, capsys):
    with pytest.raises(SystemExit) as end:
        main(line.split())
    assert end.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].endswith(f": error: {why}")


def test_what_is_missing_is_named_with_the_line_that_installs_it(monkeypatch, capsys):
    monkeypatch.setattr(notebooks, "_NEEDED", ("nbclient", "no_such_package", "nor_this"))
    assert main(["verify", "a.ipynb"]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "notebooks are run with nbclient and ipykernel, and `no_such_package`, `nor_this` are not installed.",
        "  write: pip install 'flax_magics[verify]'",
    ]


def test_the_help_says_every_exit_status_in_80_columns_and_imports_no_jax():
    script = """
        import runpy, sys
        sys.argv = ["flax_magics", "verify", "--help"]
        try:
          runpy.run_module("flax_magics", run_name="__main__")
        except SystemExit:
          print(sorted({"jax", "flax", "IPython", "nbclient", "numpy"} & set(sys.modules)))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "COLUMNS": "80"},
    )
    *lines, imported = done.stdout.splitlines()
    assert imported == "[]"
    assert max(map(len, lines)) <= 80
    for status in range(5):
        assert any(line.startswith(f"  {status}  ") for line in lines)
