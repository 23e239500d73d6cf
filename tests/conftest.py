"""Fixtures that every test may use."""

from __future__ import annotations

import atexit
import builtins
import gc
import sys
from collections import OrderedDict
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from traitlets.config import Config

from flax_magics import Session, _session

# No example is timed: one of them may meet a collection of garbage, or a busy machine.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")
# `--hypothesis-profile few` is for a lane whose examples another lane tries in full.
settings.register_profile("few", max_examples=5)
# `--hypothesis-profile many` looks for more, by hand: a failure of it is news, and ends no other's run.
settings.register_profile("many", max_examples=1000, deadline=None)

OPTIMISED_LITTLE = "jax_disable_most_optimizations"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--unoptimised", action="store_true", help="XLA leaves out its optimisations in the files that ask for them too"
    )


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With `-n`, a worker takes whole files: their tests share what was compiled. Those with kernels are as one file."""
    from xdist.scheduler import LoadScopeScheduling

    class Files(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return "kernels" if nodeid.startswith("tests/kernels/") else nodeid.partition("::")[0]

    return Files(config, log)


@pytest.fixture(scope="module")
def optimised(request: pytest.FixtureRequest) -> Iterator[None]:
    """XLA optimises as users have it: for a file whose subject is bits.

    Both sides of a comparison are compiled alike, ours and the one by hand; so nothing is kept that JAX compiled otherwise.
    """
    import jax

    if request.config.getoption("unoptimised"):
        yield
        return
    jax.config.update(OPTIMISED_LITTLE, False)
    jax.clear_caches()
    yield
    jax.config.update(OPTIMISED_LITTLE, True)
    jax.clear_caches()


@pytest.fixture(autouse=True, scope="session")
def optimised_little() -> None:
    """XLA compiles without its optimisations in the tests' own process, which takes half of the time."""
    import jax

    from flax_magics.rng import keys

    keys.PATIENCE = sys.maxsize  # nor is a program of draws to come compiled in the middle of a test that counts
    jax.config.update(OPTIMISED_LITTLE, True)
    jax.clear_caches()  # of operations that files ran when they were imported


@pytest.fixture(autouse=True, scope="module")
def young_heap() -> None:
    """A collection looks at what this file makes alone: what earlier ones left would make each take seconds in the end."""
    gc.collect()
    gc.freeze()


_executables: OrderedDict[Any, Any] = OrderedDict()
MOST_EXECUTABLES = 1000  # each holds a megabyte or two


@pytest.fixture(autouse=True)
def executables_of_the_process(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """XLA compiles a program once a process: who lowers the same one again, with the same options, has the first one's.

    Nothing else is left out, of ours or of JAX's: it is traced, lowered, bound and counted as `compiled`. Four in five
    programs of the tests' sessions were compiled by an earlier test, and a fifth of those by hand. Off where compiling
    itself is the subject: `own_executables`.
    """
    if request.node.get_closest_marker("own_executables"):
        return
    from jax._src import compiler

    compile_module = compiler.backend_compile_and_load

    def compiled(backend: Any, module: Any, devices: Any, options: Any, host_callbacks: Any) -> Any:
        text = module.operation.get_asm(enable_debug_info=False)
        if host_callbacks or "callback" in text:  # the text does not say which function is called
            return compile_module(backend, module, devices, options, host_callbacks)
        program = (backend, sha256(text.encode()).digest(), str(devices), options.SerializeAsString())
        executable = _executables.pop(program, None)
        if executable is None:
            executable = compile_module(backend, module, devices, options, host_callbacks)
        _executables[program] = executable  # the last one that was asked for
        if len(_executables) > MOST_EXECUTABLES:
            _executables.popitem(last=False)
        return executable

    monkeypatch.setattr(compiler, "backend_compile_and_load", compiled)


@pytest.fixture(autouse=True)
def cache_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's cache directory, for this test and for what it starts: not the real one, and not another test's."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder


@pytest.fixture(autouse=True, scope="module")
def cache_directory_of_kernels(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The same for kernels that the tests of a file share, which start before any one of them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def session() -> Session:
    """One of seed 0, without a model."""
    return Session(seed=0)


def _fresh_shell(shell_class: Any) -> Iterator[Any]:
    saved = {
        name: getattr(sys, name) for name in ("displayhook", "excepthook", "ps1", "ps2", "ps3") if hasattr(sys, name)
    }
    modules = {name: sys.modules.get(name) for name in ("__main__",)}
    config = Config()
    config.HistoryManager.enabled = False
    config.InteractiveShell.colors = "NoColor" if _version() < (8,) else "nocolor"
    shell_class.clear_instance()
    shell = shell_class.instance(config=config)
    try:
        yield shell
    finally:
        shell.restore_sys_module_state()
        # It collects garbage: up to 0.3 s in a process that has JAX, for each test with a shell.
        shell.displayhook.flush = lambda: None
        atexit.unregister(shell.atexit_operations)
        shell.atexit_operations()
        shell_class.clear_instance()
        for name, value in saved.items():
            setattr(sys, name, value)
        for name, module in modules.items():
            if module is not None:
                sys.modules[name] = module
        for name in ("get_ipython", "display"):
            builtins.__dict__.pop(name, None)


def _version() -> tuple[int, ...]:
    import IPython

    return tuple(IPython.version_info[:1])


@pytest.fixture
def shell() -> Iterator[Any]:
    """A fresh `InteractiveShell` without colours and without history, gone after the test."""
    from IPython.core.interactiveshell import InteractiveShell

    yield from _fresh_shell(InteractiveShell)


@pytest.fixture
def bang() -> str:
    """What stands before a shell command whose output is assigned.

    IPython 7 looks for an error token there, and from Python 3.12 on `!` is an operator: it does not read `x = !…` itself.
    """
    return "%sx " if _version() < (8,) and sys.version_info >= (3, 12) else "!"


SETUP = """\
import jax
import jax.numpy as jnp
import flax.linen as nn
x = jax.random.uniform(jax.random.key(42), (3, 4, 4))
"""


class Notebook:
    """Runs cells as a notebook does, and says what they printed or raised."""

    def __init__(self, shell: Any, capsys: Any) -> None:
        self.shell = shell
        self._capsys = capsys

    def __getitem__(self, name: str) -> Any:
        return self.shell.user_ns[name]

    def __call__(self, cell: str) -> str:
        """Runs a cell that must work; what it printed."""
        self.read()
        result = self.shell.run_cell(cell, store_history=True)
        out = self.read()
        if result.error_before_exec or result.error_in_exec:
            raise AssertionError(f"{cell}\n{out}") from (result.error_before_exec or result.error_in_exec)
        return out.rstrip("\n")

    def fails(self, cell: str) -> str:
        """Runs a cell that must fail; what a person sees."""
        self.read()
        result = self.shell.run_cell(cell, store_history=True)
        assert result.error_in_exec is not None, cell
        return self.read().rstrip("\n")

    def read(self) -> str:
        """What was printed since this was asked last."""
        out: str = self._capsys.readouterr().out
        return out

    @property
    def session(self) -> Any:
        return _session._current


@pytest.fixture
def notebook(shell: Any, capsys: Any) -> Iterator[Notebook]:
    """The extension loaded, JAX and Flax imported, `x` made, and a session of its own."""
    _session._current = None
    running = Notebook(shell, capsys)
    running("%load_ext flax_magics")
    running(SETUP)
    yield running
    if "flax_magics" in shell.extension_manager.loaded:
        running("%unload_ext flax_magics")
    _session._current = None


@pytest.fixture
def digests_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every run's digest is taken while its output is there."""
    from flax_magics.state.runs import RunLog

    add = RunLog.add

    def taking(chain: Any, kept: Any) -> Any:
        assert kept.run().digest
        return add(chain, kept)

    monkeypatch.setattr(RunLog, "add", staticmethod(taking))
