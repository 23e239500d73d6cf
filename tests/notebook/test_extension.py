"""Loading into a shell, loading again, and leaving without a trace."""

from __future__ import annotations

import logging
import re
import subprocess
import sys
import textwrap
from typing import Any

import flax.linen  # noqa: F401
import pytest

from flax_magics.notebook import magics


def traces(shell: Any) -> Any:
    """Everything of a shell that an extension can change."""
    return {
        "line": set(shell.magics_manager.magics["line"]),
        "cell": set(shell.magics_manager.magics["cell"]),
        "registry": set(shell.magics_manager.registry),
        "configurables": list(map(id, shell.configurables)),
        "cleanup": list(shell.input_transformers_cleanup),
        "post": list(shell.input_transformers_post),
        "events": {name: list(callbacks) for name, callbacks in shell.events.callbacks.items()},
        "matchers": list(shell.Completer.custom_matchers),
        "names": set(shell.user_ns) - {"exit", "quit", "_exit_code"} - {n for n in shell.user_ns if n.startswith("_")},
        "hooks": {name: repr(getattr(shell.hooks, name)) for name in vars(shell.hooks)},
        "custom_exceptions": shell.custom_exceptions,
    }


def run(shell: Any, cell: str) -> None:
    result = shell.run_cell(cell, store_history=True)
    result.raise_error()


def test_unload_leaves_no_trace(shell, capsys):
    run(shell, "%load_ext storemagic\n%unload_ext storemagic")  # IPython makes its own `%load_ext` at first use
    capsys.readouterr()
    before = traces(shell)
    for _ in range(2):
        run(shell, "%load_ext flax_magics")
        assert traces(shell) != before
        assert traces(shell)["names"] == before["names"]
        run(shell, "%unload_ext flax_magics")
        assert traces(shell) == before
    assert capsys.readouterr() == ("", "")


def test_loading_twice_is_loading_once(shell):
    import flax_magics

    run(shell, "%load_ext flax_magics")
    once = traces(shell)
    flax_magics.load_ipython_extension(shell)
    assert traces(shell) == once
    flax_magics.unload_ipython_extension(shell)
    flax_magics.unload_ipython_extension(shell)


def test_reload_keeps_the_session_and_registers_nothing_twice(sharp_bits):
    sharp_bits("%flax_apply my_model(x)")
    session, before = sharp_bits.session, traces(sharp_bits.shell)
    sharp_bits("%reload_ext flax_magics")
    assert sharp_bits.session is session
    after = traces(sharp_bits.shell)
    assert [len(callbacks) for callbacks in after["events"].values()] == [
        len(callbacks) for callbacks in before["events"].values()
    ]
    assert len(after["matchers"]) == len(before["matchers"])
    line = "my_model · as written · cpu:0 · draw 2 · reused · "
    assert re.match(rf"{line}(waited [^·]+ · )?run ", sharp_bits("%flax_apply my_model(x);"))
    import flax_magics

    assert flax_magics.session() is session


def test_another_extension_of_the_same_name_is_left_alone(shell):
    run(shell, "%load_ext flax_magics")
    shell.register_magic_function(lambda line: "mine", "line", "flax")
    run(shell, "%unload_ext flax_magics")
    assert shell.run_line_magic("flax", "") == "mine"
    del shell.magics_manager.magics["line"]["flax"]


def test_the_seed_that_is_configured_is_where_the_session_starts(notebook, caplog):
    notebook("%config FlaxMagics.seed = 7")
    assert notebook("%flax_key").splitlines()[0].endswith("seed 7 · no draw so far · next is draw 1 · threefry2x32")
    notebook("%config FlaxMagics.seed = 8")
    assert notebook.session.seed == 8
    notebook("k = %flax_key latent")
    with caplog.at_level(logging.ERROR):  # `%config` logs what a setting refuses
        notebook("%config FlaxMagics.seed = 9")
    assert caplog.messages == [
        "the session has made 1 draw from seed 8; `seed` is where it starts.\n  write: %flax_key --seed 9"
    ]
    assert notebook.session.seed == 8
    assert notebook.shell.run_line_magic("config", "FlaxMagics.seed") == 8


def test_a_setting_that_is_refused_is_not_kept_for_the_next_load(notebook, caplog):
    refused = ("report = 'loud'", "style = 1", "seed = 'x'", "notes = {'x': 1}", "notes = {'stream': 1}", "free = 7")
    with caplog.at_level(logging.ERROR):
        for setting in (*refused, "replay_bytes = -1", "deadline = 0.0", "disk_cache = 'a'"):
            notebook(f"%config FlaxMagics.{setting}")
    assert len(caplog.messages) == 9
    notebook("%config FlaxMagics.report = 'line'")
    notebook("%reload_ext flax_magics")
    assert notebook.shell.config["FlaxMagics"] == {"report": "line"}
    values = {"report": "line", "style": "auto", "seed": 0, "notes": {}, "free": True}
    values |= {"replay_bytes": 256_000_000, "deadline": 10.0, "disk_cache": True}
    assert {name: notebook.shell.run_line_magic("config", f"FlaxMagics.{name}") for name in values} == values


# -- our modules are there before the first command, once JAX and Flax are

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
    print([name in sys.modules for name in names])

OURS = ("flax_magics._session", "flax_magics.report.html")
"""


def told(script: str) -> list[str]:
    """What a script prints in a process of its own, which must print no more and warn of nothing."""
    code = SHELL + textwrap.dedent(script)
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
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
    """) == ["[False, False, False, False]", "[False, False]", "[True, True]", "False False False"]


def test_loaded_after_jax_and_flax_it_is_done_with_that_cell():
    assert told("""
        run("from flax import nnx")
        run("%load_ext flax_magics")
        there(*OURS, "flax_magics.models.nnx")
        before = set(sys.modules)
        run("%%flaxmodel net = Net()\\nclass Net(nnx.Module):\\n  def __init__(self, *, rngs):\\n    pass")
        print([name for name in set(sys.modules) - before if name.startswith("flax_magics")])
    """)[::2] == ["[True, True, True]", "[]"]


def test_unloaded_it_imports_nothing():
    assert told("""
        run("%load_ext flax_magics")
        run("%unload_ext flax_magics")
        run("import jax, flax")
        there(*OURS)
    """) == ["[False, False]"]


@pytest.mark.parametrize("failure", [RuntimeError("no"), KeyboardInterrupt()])
def test_what_goes_wrong_is_left_to_the_command(shell: Any, capsys: Any, monkeypatch: Any, failure: BaseException):
    tried = []

    def fail() -> None:
        tried.append("once")
        raise failure

    monkeypatch.setattr(magics, "_import", fail)
    run(shell, "%load_ext flax_magics")
    run(shell, "pass")
    run(shell, "%unload_ext flax_magics")
    assert (tried, capsys.readouterr()) == (["once"], ("", ""))
