"""What importing the package costs, proved in processes of their own; what `%load_ext` does is in tests/test_imports.py."""

from __future__ import annotations

import subprocess
import sys

HEAVY = ("jax", "jaxlib", "flax", "optax")


def python(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stderr == ""
    return done.stdout


def test_importing_the_package_imports_neither_jax_nor_ipython():
    assert python(f"import flax_magics, sys; print(sorted({ {*HEAVY, 'IPython'} } & set(sys.modules)))") == "[]\n"


def test_the_names_that_need_jax_import_it_when_they_are_asked_for():
    assert python("import flax_magics; print(flax_magics.Session(seed=3).seed, flax_magics.Run.__name__)") == "3 Run\n"
