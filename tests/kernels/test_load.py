"""What loading costs, proved in processes of their own: no JAX, no word, no name."""

from __future__ import annotations

import subprocess
import sys

HEAVY = ("jax", "jaxlib", "flax", "optax")

LOAD = """
import sys
from IPython.core.interactiveshell import InteractiveShell
shell = InteractiveShell.instance()
shell.run_cell("pass", store_history=False)
before = set(shell.user_ns)
shell.run_cell("%load_ext flax_magics").raise_error()
print(sorted(set(shell.user_ns) - before))
print(sorted({HEAVY} & set(sys.modules)))
"""


def python(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stderr == ""
    return done.stdout


def test_load_ext_imports_no_jax_prints_nothing_and_adds_no_name():
    printed = python(LOAD.replace("{HEAVY}", repr(set(HEAVY))))
    assert printed == "[]\n[]\n"


def test_importing_the_package_imports_neither_jax_nor_ipython():
    assert python(f"import flax_magics, sys; print(sorted({ {*HEAVY, 'IPython'} } & set(sys.modules)))") == "[]\n"


def test_the_names_that_need_jax_import_it_when_they_are_asked_for():
    assert python("import flax_magics; print(flax_magics.Session(seed=3).seed, flax_magics.Run.__name__)") == "3 Run\n"
