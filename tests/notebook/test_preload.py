"""Our modules are there before the first command, once JAX and Flax are."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from typing import Any

import flax.linen  # noqa: F401
import pytest

SHELL = """\
import sys
from IPython.core.interactiveshell import InteractiveShell
from traitlets.config import Config

config = Config()
config.HistoryManager.enabled = False
shell = InteractiveShell.instance(config=config)

def run(cell):
    shell.run_cell(cell, store_history=True).raise_error()

def there(*names):
    print([name in sys.modules for name in names], len(shell.events.callbacks["post_run_cell"]))

OURS = ("flax_magics._session", "flax_magics.report.html", "jinja2")
"""


def told(script: str) -> list[str]:
    """What a script prints in a process of its own, which must print no more and warn of nothing."""
    code = SHELL + textwrap.dedent(script)
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return done.stdout.splitlines()


def test_loaded_before_jax_it_waits_for_the_cell_that_imports_jax_and_flax():
    assert told("""
        run("%load_ext flax_magics")
        there("jax", "flax", *OURS)
        run("import jax")
        there(*OURS)
        run("import flax")
        there(*OURS)
        from jax._src import xla_bridge
        print(xla_bridge.backends_are_initialized(), "flax.nnx" in sys.modules, "flax_magics.models.nnx" in sys.modules)
    """) == [
        "[False, False, False, False, False] 3",
        "[False, False, False] 3",
        "[True, True, True] 2",
        "False False False",
    ]


def test_loaded_after_jax_and_flax_it_is_done_with_that_cell():
    assert told("""
        run("from flax import nnx")
        run("%load_ext flax_magics")
        there(*OURS, "flax_magics.models.nnx")
        before = set(sys.modules)
        run("%%flaxmodel net = Net()\\nclass Net(nnx.Module):\\n  def __init__(self, *, rngs):\\n    pass")
        print([name for name in set(sys.modules) - before if name.startswith(("flax_magics", "jinja2"))])
    """)[::2] == ["[True, True, True, True] 2", "[]"]


def test_unloaded_it_imports_nothing():
    assert told("""
        run("%load_ext flax_magics")
        run("%unload_ext flax_magics")
        run("import jax, flax")
        there(*OURS)
    """) == ["[False, False, False] 0"]


@pytest.mark.parametrize("failure", [RuntimeError("no"), KeyboardInterrupt()])
def test_what_goes_wrong_is_left_to_the_command(shell: Any, capsys: Any, monkeypatch: Any, failure: BaseException):
    from flax_magics.notebook import extension

    def fail() -> None:
        raise failure

    monkeypatch.setattr(extension, "_import", fail)
    hooks = list(shell.events.callbacks["post_run_cell"])
    waiting = extension.Preload(shell.events, lambda: None)
    waiting.begin()
    shell.run_cell("pass").raise_error()
    assert shell.events.callbacks["post_run_cell"] == hooks
    assert capsys.readouterr() == ("", "")
