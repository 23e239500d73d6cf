"""A kernel stays alive while something is slow: it tells of it, it can be interrupted, and it can leave.

No time is measured. That an interrupt returned at once is shown by what is still going on behind it.
"""

from __future__ import annotations

import contextlib
import queue
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from jupyter_client.manager import KernelManager
from kernels import RENEW, RUN_JSON
from sharp_bits import LOAD, SETUP

MODELS = """
%%flaxmodel
import pathlib, time
import flax_magics

def touch(name):
  pathlib.Path(name).touch()

def until(name):
  while not pathlib.Path(name).exists():
    time.sleep(0.01)

class Big(nn.Module):  # XLA takes 7 s for it on a slow machine
  @nn.compact
  def __call__(self, x):
    x = nn.Dense(4)(x)
    for i in range(1 if self.is_initializing() else 400):
      x = jnp.sin(x @ jnp.full((4, 4), 0.1 * i)) + i
    return x

class Traced(nn.Module):
  @nn.compact
  def __call__(self, x):
    x = nn.Dense(4)(x)
    if not self.is_initializing() and not pathlib.Path('free').exists():
      touch('tracing')
      until('free')
    return x

class Stubborn(nn.Module):
  @nn.compact
  def __call__(self, x):
    if not pathlib.Path('free').exists():
      try:
        touch('stubborn')
        until('free')
      except KeyboardInterrupt:
        pass  # as do the callbacks of Python's garbage collector
      until('free')
    return nn.Dense(4)(x)

class Deep(nn.Module):
  @nn.compact
  def __call__(self, x):
    for i in range(10_000):
      x = nn.Dense(64 + i % 7)(x)
      if i == 20:
        touch('initialising')
    return x

class Long(nn.Module):  # 20 s on a slow machine
  @nn.compact
  def __call__(self, x):
    w = nn.Dense(1000)(jnp.ones((1000, 1000)))
    turns = jnp.where(x.sum() > 0, 200, 1)
    return jax.lax.fori_loop(0, turns, lambda i, w: jnp.sin(w @ w), w)

class Calls(nn.Module):
  @nn.compact
  def __call__(self, x):
    def hold(v):
      touch('called')
      until('go')
      return v
    x = nn.Dense(4)(x)
    return x if self.is_initializing() else jax.pure_callback(hold, jax.ShapeDtypeStruct(x.shape, x.dtype), x)

big, traced, stubborn, deep, long, calls = Big(), Traced(), Stubborn(), Deep(), Long(), Calls()
x = jnp.ones((3, 4))
session = flax_magics.session()
"""

STATE = """
leaves = {name: jax.tree_util.tree_leaves(model.variables) for name, model in session.models.items()}
print(session.draws, len(session.runs), session._state.root.data.hex(),
      {name: [leaf.unsafe_buffer_pointer() for leaf in found if not jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)]
       for name, found in leaves.items()})
"""
"""All of the session, read without asking the device for anything: it may be busy."""


class Kernel:
    """A real kernel, driven by jupyter_client."""

    def __init__(self) -> None:
        self.manager = KernelManager(kernel_name="python3")
        self.manager.start_kernel()
        provisioner = getattr(self.manager, "provisioner", None)
        self.process: Any = self.manager.kernel if provisioner is None else provisioner.process
        self.client = self.manager.client()
        self.client.start_channels()
        self.client.wait_for_ready(timeout=120)

    def renew(self, folder: Path) -> None:
        """As if it were new, and had been started in `folder`, with the models."""
        self.folder = folder
        for cell in (RENEW.format(folder=str(folder)), LOAD, SETUP, MODELS):
            self.run(cell)

    def send(self, source: str) -> str:
        """Begins to run a cell."""
        # Else a kernel turns away, unheard, what comes just after an error.
        message: str = self.client.execute(source.strip("\n"), stop_on_error=False)
        return message

    def outputs(self, message: str, interrupt: Callable[[], bool] | None = None) -> list[dict[str, Any]]:
        """Everything that a cell published until it was done, in order; it is interrupted when `interrupt` says so."""
        found = []
        deadline = time.monotonic() + 180
        while time.monotonic() < deadline:
            if interrupt is not None and interrupt():
                self.manager.interrupt_kernel()
                interrupt = None
            try:
                got = self.client.get_iopub_msg(timeout=0.02)
            except queue.Empty:
                continue
            if got["parent_header"].get("msg_id") != message:
                continue
            if got["msg_type"] == "status" and got["content"]["execution_state"] == "idle":
                return found
            found.append({"type": got["msg_type"], **got["content"]})
        raise AssertionError(f"the kernel does not answer; so far: {found}")

    def run(self, source: str) -> list[dict[str, Any]]:
        """Runs a cell that must work."""
        found = self.outputs(self.send(source))
        errors = [item for item in found if item["type"] == "error"]
        assert not errors, "\n".join(errors[0]["traceback"])
        return found

    def prints(self, source: str) -> str:
        return "".join(item["text"] for item in self.run(source) if item["type"] == "stream")

    def interrupted(self, source: str, when: Callable[[], bool]) -> list[dict[str, Any]]:
        """Runs a cell and interrupts it when `when` says so; gives what it published before the error."""
        *found, error = self.outputs(self.send(source), when)
        assert (error["type"], error.get("ename")) == ("error", "KeyboardInterrupt")
        return found

    def appeared(self, name: str) -> Callable[[], bool]:
        return (self.folder / name).exists

    def close(self) -> None:
        self.client.stop_channels()
        self.manager.shutdown_kernel(now=True)
        self.manager.context.destroy()


@pytest.fixture(scope="module")
def shared(home: Path) -> Iterator[Kernel]:
    with contextlib.closing(Kernel()) as kernel:
        yield kernel


@pytest.fixture
def kernel(tmp_path: Path, shared: Kernel) -> Kernel:
    """A kernel with the models, which other tests have had before."""
    shared.renew(tmp_path)
    return shared


@pytest.fixture
def own_kernel(tmp_path: Path, home: Path) -> Iterator[Kernel]:
    """The same, for a test that leaves something going on, or ends it."""
    with contextlib.closing(Kernel()) as kernel:
        kernel.renew(tmp_path)
        yield kernel


def texts(outputs: list[dict[str, Any]]) -> list[str]:
    """What displays said, updates of them included."""
    shown = [item for item in outputs if item["type"] in ("display_data", "update_display_data")]
    return [item["data"]["text/plain"] for item in shown]


def report(outputs: list[dict[str, Any]]) -> dict[str, Any]:
    """The Run that was shown last."""
    return [item["data"][RUN_JSON] for item in outputs if RUN_JSON in item.get("data", {})][-1]


COMPILING = """
import threading
def tell():
  while not session.programs.compiling:
    time.sleep(0.01)
  touch('compiling')
threading.Thread(target=tell, daemon=True).start()
"""
RUNNING = """
from flax_magics.compile import cache
def tell(*result, wait=cache.wait_on):
  touch('running')
  wait(*result)
cache.wait_on = tell
"""


def test_an_interrupted_compilation_returns_at_once_and_the_next_run_finishes_it(own_kernel):
    own_kernel.run("%flax_init -q big(x);")
    before = own_kernel.prints(STATE)
    own_kernel.run(COMPILING)
    shown = own_kernel.interrupted("y = %flax_apply big(x)", own_kernel.appeared("compiling"))
    assert own_kernel.prints("(future,) = session.programs.compiling.values(); print(future.done())") == "False\n"
    assert own_kernel.prints(STATE) == before
    assert texts(shown)[-1:] in ([], [""])  # the live line, if there was time for one, is gone

    again = own_kernel.run("y = %flax_apply big(x)")
    *live, last = texts(again)
    assert all(
        re.fullmatch(r"(tracing|lowering|compiling|running) big · \d+ s · interrupt the kernel to stop", text)
        for text in live
    )
    assert any(text.startswith("compiling big · ") for text in live)
    assert "first run of this program; begun by the run that was" in last
    run = report(again)
    assert (run["program"], run["draw"]) == ("compiled", 1)
    assert run["reason"] == "first run of this program; begun by the run that was interrupted"
    assert own_kernel.prints("print(future.done(), len(session.programs), session.programs.compiling)") == "True 1 {}\n"
    assert report(own_kernel.run("y = %flax_apply big(x)"))["program"] == "reused"


TRAINING = """
import optax
class Batches:
  def __iter__(self):
    while True:
      time.sleep(0.005)
      yield x
def loss(net, batch):
  return (net(batch) ** 2).mean()
dense = nn.Dense(2)
reporter = get_ipython().magics_manager.registry['FlaxMagics'].notebook.reporter
def progress(run, working, progress=reporter.progress):
  bundle = progress(run, working)
  if run.steps:
    touch('shown')
  return bundle
reporter.progress = progress
"""


@pytest.mark.smoke
def test_a_training_has_its_curve_in_one_display_which_keeps_the_finished_steps(own_kernel):
    own_kernel.run(TRAINING)
    line = "%flax_train --optimizer optax.sgd(1e-3) --steps 100000 loss(dense, Batches())"
    shown = own_kernel.interrupted(line, own_kernel.appeared("shown"))
    displays = [item for item in shown if item["type"] in ("display_data", "update_display_data")]
    assert len({item["transient"]["display_id"] for item in displays}) == 1
    under_way = next(item["data"] for item in displays if "of 100,000" in item["data"]["text/plain"])
    assert re.search(r"\n[a-z]+ dense · \d+ s · interrupt the kernel to stop$", under_way["text/plain"])
    assert "<svg" in under_way["text/html"]

    data, trained = displays[-1]["data"], report(shown)["trained"]
    assert trained["stopped"] == "interrupted"
    assert len(trained["losses"]) == trained["steps"] > 0
    assert data["text/plain"].endswith(
        f"\n! interrupted after {trained['steps']:,} steps · `flax_magics.session().runs[-1]` is its Run\n"
        "  write: %flax_train --resume loss(dense, Batches())"
    )
    assert "stopped</text>" in data["text/html"]
    assert own_kernel.prints("print(session.runs[-1].steps)") == f"{trained['steps']}\n"
    more = f"%flax_train --resume --steps {trained['steps'] + 1} loss(dense, Batches())"
    assert report(own_kernel.run(more))["trained"]["losses"][:-1] == trained["losses"]


@pytest.mark.smoke
def test_the_live_line_and_the_report_are_one_display(kernel):
    kernel.run("%flax_init -q traced(x);")
    outputs = kernel.run("import threading\nthreading.Timer(3, touch, ['free']).start()\ny = %flax_apply traced(x)")
    displays = [item for item in outputs if item["type"] in ("display_data", "update_display_data")]
    assert [item["type"] for item in displays[:2]] == ["display_data", "update_display_data"]
    assert re.fullmatch(r"tracing traced · \d+ s · interrupt the kernel to stop", displays[0]["data"]["text/plain"])
    assert len({item["transient"]["display_id"] for item in displays}) == 1
    assert RUN_JSON in displays[-1]["data"]


@pytest.mark.smoke
def test_a_trace_that_is_interrupted(kernel):
    kernel.run("%flax_init -q traced(x);")
    before = kernel.prints(STATE)
    kernel.interrupted("y = %flax_apply traced(x)", kernel.appeared("tracing"))
    assert kernel.prints(STATE) == before
    kernel.run("touch('free')")
    assert report(kernel.run("y = %flax_apply traced(x)"))["draw"] == 1


def test_an_interrupt_that_is_swallowed_strikes_again(kernel):
    before = kernel.prints(STATE)
    kernel.interrupted("y = %flax_apply stubborn(x)", kernel.appeared("stubborn"))
    assert kernel.prints(STATE) == before
    kernel.run("touch('free')")
    assert report(kernel.run("y = %flax_apply stubborn(x)"))["draw"] == 1


@pytest.mark.parametrize("command", ["%flax_init deep(x);", "%flax_apply deep(x);"])
def test_an_initialisation_that_is_interrupted(kernel, command):
    before = kernel.prints(STATE)
    kernel.interrupted(command, kernel.appeared("initialising"))
    assert kernel.prints(STATE) == before
    assert kernel.prints("print(session.models['deep'].variables)") == "None\n"


def test_a_run_that_is_interrupted_goes_on_and_the_next_one_waits_and_says_so(own_kernel):
    own_kernel.run("%flax_apply -q long(-x);")
    before = own_kernel.prints(STATE)
    own_kernel.run(RUNNING)
    own_kernel.interrupted("y = %flax_apply long(x)", own_kernel.appeared("running"))
    busy = "print(session.programs.unfinished.wait.__self__.is_ready())"
    assert own_kernel.prints(busy) == "False\n"
    assert own_kernel.prints(STATE) == before
    again = own_kernel.run("%config FlaxMagics.report = 'normal'\ny = %flax_apply long(-x)")
    assert report(again)["draw"] == 2
    assert report(again)["timing"]["busy"] > report(again)["timing"]["run"]
    assert re.search(r"\n  wait  the interrupted run had the device for [\d.]+ m?s more\n", texts(again)[-1])
    assert own_kernel.prints("print(session.programs.unfinished.wait)") == "None\n"
    assert report(own_kernel.run("y = %flax_apply long(-x)"))["timing"]["busy"] == 0


def test_inputs_that_are_not_there_yet(own_kernel):
    own_kernel.run("touch('free')\ny = %flax_apply -q traced(x)")
    before = own_kernel.prints(STATE)
    own_kernel.run(
        "def turn(i, w): return jnp.sin(w @ w)\n"
        "slow = jax.jit(lambda w: jax.lax.fori_loop(0, 200, turn, w)[:3, :4])\n"
        "compiled = slow.lower(jnp.ones((1000, 1000))).compile()"
    )
    own_kernel.interrupted(
        "later = compiled(jnp.ones((1000, 1000)))\ntouch('waiting')\ny = %flax_apply traced(later)",
        own_kernel.appeared("waiting"),
    )
    assert own_kernel.prints("print(later.is_ready())") == "False\n"
    assert own_kernel.prints(STATE) == before


def test_a_program_with_callbacks_is_interrupted_while_it_runs(kernel):
    kernel.run("%flax_init -q calls(x);")
    before = kernel.prints(STATE)
    kernel.interrupted("y = %flax_apply calls(x)", kernel.appeared("called"))
    assert kernel.prints(STATE) == before  # and the callback waits for a file that is not there
    kernel.run("touch('go')")
    again = kernel.run("y = %flax_apply calls(x)\nassert y.shape == (3, 4)")
    assert report(again)["draw"] == 1


def test_what_a_model_prints_while_it_runs_is_in_its_own_cell(kernel):
    kernel.run(
        "%%flaxmodel loud = Loud()\n"
        "class Loud(nn.Module):\n"
        "  def __call__(self, x):\n"
        "    jax.debug.print('sum {}', x.sum())\n"
        "    def say(v):\n"
        "      print('called')\n"
        "      return v\n"
        "    return jax.pure_callback(say, jax.ShapeDtypeStruct(x.shape, x.dtype), x)\n"
    )
    kernel.run("%flax_init -q loud(x);")
    for _ in range(2):
        assert sorted(kernel.prints("y = %flax_apply -q loud(x)").split("\n")) == ["", "called", "sum 12.0"]


def test_an_nnx_module_is_as_it_was(kernel):
    kernel.run(
        "%%flaxmodel net = Net()\n"
        "from flax import nnx\n"
        "class Net(nnx.Module):\n"
        "  def __init__(self, *, rngs):\n"
        "    self.norm = nnx.BatchNorm(4, rngs=rngs)\n"
        "    self.dropout = nnx.Dropout(0.5, rngs=rngs)\n"
        "  def __call__(self, x):\n"
        "    def hold(v):\n"
        "      touch('called')\n"
        "      until('go')\n"
        "      return v\n"
        "    x = self.dropout(self.norm(x))\n"
        "    return jax.pure_callback(hold, jax.ShapeDtypeStruct(x.shape, x.dtype), x)\n"
    )
    look = "print([str(leaf) for leaf in jax.tree_util.tree_leaves(nnx.state(net))])"
    before = kernel.prints(STATE), kernel.prints(look)
    kernel.interrupted("y = %flax_apply --train net(x + jnp.arange(3.0)[:, None])", kernel.appeared("called"))
    assert (kernel.prints(STATE), kernel.prints(look)) == before
    kernel.run("touch('go')")
    kernel.run("y = %flax_apply --train net(x + jnp.arange(3.0)[:, None])")
    assert kernel.prints(look) != before[1]


def test_the_kernel_can_be_shut_down_while_something_compiles_behind_an_interrupt(own_kernel):
    own_kernel.run("%flax_init -q big(x);")
    own_kernel.run(COMPILING)
    own_kernel.interrupted("y = %flax_apply big(x)", own_kernel.appeared("compiling"))
    assert own_kernel.prints("(future,) = session.programs.compiling.values(); print(future.done())") == "False\n"
    own_kernel.client.shutdown()
    assert own_kernel.process.wait(timeout=180) == 0
