"""Each check made true in a process of its own: what it says, and that its line mends it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import socket
import subprocess
import sys
import sysconfig
import textwrap
from typing import Any, NamedTuple

import IPython
import pytest
from html_reader import Reader
from processes import environment, printed_by

from flax_magics.base.text import cell_len
from flax_magics.doctor.checks import CHECKS
from flax_magics.report.html import notice_bundle
from flax_magics.report.text import Notice, notes
from flax_magics.run import Note

SHELL = """
import json, os, sys, types
from IPython.core.interactiveshell import InteractiveShell
shell = InteractiveShell.instance()

def run(cell):
    result = shell.run_cell(cell, store_history=True)
    result.raise_error()

def found():
    diagnosis = shell.user_ns["flax_magics"].session().doctor(names=shell.user_ns, shell=shell)
    assert diagnosis.failed == {}, diagnosis.failed
    return diagnosis.findings

run(SETUP)
told = {}
assert found() == {}, found()
run("sizes = jnp.asarray([3, 4], 'uint32')")  # which is no key
assert found() == {}, found()
run("del sizes")
for name, check, cell, after in CASES:
    run(cell)
    findings = found()
    finding = findings[check]
    note = finding.note
    told[name] = [note.text, note.write, note.form, finding.now, sorted(findings)]
    run(note.write if after is None else after)
    assert found() == {}, (name, found())
print("TOLD" + json.dumps(told))
"""
SETUP = """
import os, sys, types
os.environ.pop("JAX_PLATFORMS", None)
import jax
jax.config.update("jax_disable_most_optimizations", False)
jax.config.update("jax_platforms", "")
import jax.numpy as jnp, numpy as np, flax_magics
import flax.linen as nn
from flax import nnx
%load_ext flax_magics
%config FlaxMagics.style = 'text'
class Noisy(nnx.Module):
  def __init__(self, rngs):
    self.linear = nnx.Linear(4, 2, rngs=rngs)
    self.drop = nnx.Dropout(0.5, rngs=rngs)
  def __call__(self, x):
    return self.drop(self.linear(x))
x = jnp.ones((3, 4))
def jax_of(folder, name, version, requires=''):
  os.makedirs(f'{folder}/{name}-{version}.dist-info')
  with open(f'{folder}/{name}-{version}.dist-info/METADATA', 'w') as file:
    file.write(f'Metadata-Version: 2.1\\nName: {name}\\nVersion: {version}\\n{requires}')
  sys.path.insert(0, folder)
"""


class Case(NamedTuple):
    """A finding of a check, told as `shown`.

    Attributes:
      cell: makes it true.
      now: it stands beneath the first report of a kernel.
      after: ends it, in the place of the line that is told, where that has a gap or asks for a restart.
      beside: what else is found then.
    """

    check: str
    cell: str
    shown: str
    now: bool = False
    after: str | None = None
    beside: tuple[str, ...] = ()


def update(**values: Any) -> str:
    return "\n".join(["import jax", *(f'jax.config.update("{name}", {value!r})' for name, value in values.items())])


AUTORELOAD = importlib.util.find_spec("imp") is not None or IPython.version_info >= (8,)
"""IPython 7 imports a module that Python has no more since 3.12."""
GPU = """
from jax._src import hardware_utils
hardware_utils.has_visible_nvidia_gpu = lambda: True
"""
NO_GPU = "hardware_utils.has_visible_nvidia_gpu = lambda: False\nimport jax\njax.config.update('jax_platforms', '')"
FAKE = """
local_devices = jax.local_devices
gpu = types.SimpleNamespace(platform='gpu', id=0, memory_stats=lambda: {'bytes_limit': 60_000_000_000, 'pool_bytes': POOL})
jax.local_devices = lambda backend=None: [gpu]
"""
NO_FAKE = """
jax.local_devices = local_devices
sys.modules.pop('torch', None)
os.environ.pop('XLA_PYTHON_CLIENT_PREALLOCATE', None)
"""

CASES: dict[str, Case] = {
    "jit": Case(
        "without jit",
        update(jax_disable_jit=True),
        """
! `jax_disable_jit` is on: jitted functions run operation by operation, some 10
  to 100 times slower
  write: import jax
         jax.config.update("jax_disable_jit", False)
""",
        now=True,
    ),
    "threefry": Case(
        "threefry",
        update(jax_threefry_partitionable=False),
        """
! `jax_threefry_partitionable` is off: random numbers are others than elsewhere,
  and change with the number of devices
  write: import jax
         jax.config.update("jax_threefry_partitionable", True)
""",
        now=True,
    ),
    "x64": Case(
        "x64",
        update(jax_enable_x64=True),
        """
! `jax_enable_x64` is on, and new arrays are float64: twice the memory, and on a
  GPU or TPU 2 to 60 times the time
  write: import jax
         jax.config.update("jax_enable_x64", False)
""",
    ),
    "x64 too late": Case(
        "x64",
        "os.environ['JAX_ENABLE_X64'] = '1'",
        """
! JAX_ENABLE_X64 is set, and JAX was imported before, or told otherwise: arrays
  are float32 all the same
  write: import jax
         jax.config.update("jax_enable_x64", True)
""",
        after="del os.environ['JAX_ENABLE_X64']",
    ),
    "one flag": Case(
        "debug flags",
        update(jax_debug_nans=True),
        """
! `jax_debug_nans` is on: each result is looked through
  write: import jax
         jax.config.update("jax_debug_nans", False)
""",
    ),
    "flags": Case(
        "debug flags",
        update(jax_debug_nans=True, jax_debug_infs=True, jax_check_tracer_leaks=True, jax_explain_cache_misses=True),
        """
! `jax_debug_nans`, `jax_debug_infs`, `jax_check_tracer_leaks`,
  `jax_explain_cache_misses` are on: each result is looked through; each trace
  is searched, and none is used again; each trace is compared with earlier ones,
  and printed
  write: import jax
         jax.config.update("jax_debug_nans", False)
         jax.config.update("jax_debug_infs", False)
         jax.config.update("jax_check_tracer_leaks", False)
         jax.config.update("jax_explain_cache_misses", False)
""",
    ),
    "typed by a setting": Case(
        "legacy keys",
        update(jax_enable_custom_prng=True),
        """
! `jax_enable_custom_prng` is on, and PRNGKey gives typed keys here and plain
  numbers elsewhere: code that was tried here fails there
  write: import jax
         jax.config.update("jax_enable_custom_prng", False)
""",
    ),
    "a raw key": Case(
        "legacy keys",
        "key = jax.random.PRNGKey(0)",
        """
! `key` is a key of jax.random.PRNGKey, plain uint32[2]: adding to a key, or
  giving one where numbers belong, passes unnoticed; jax.random.key makes typed
  ones
  write: import jax
         key = jax.random.wrap_key_data(key)
""",
    ),
    "raw keys": Case(
        "legacy keys",
        "key, other = jax.random.split(jax.random.PRNGKey(0))",
        """
! `key`, `other` are keys of jax.random.PRNGKey, plain uint32[2]: adding to a
  key, or giving one where numbers belong, passes unnoticed; jax.random.key
  makes typed ones
  write: import jax
         key = jax.random.wrap_key_data(key)
         other = jax.random.wrap_key_data(other)
""",
    ),
    "a module passed": Case(
        "jitted modules",
        """
net = Noisy(nnx.Rngs(0))
@jax.jit
def step(net, x):
  return net(x)
step(net, x);
""",
        """
! `step` is a plain jax.jit, and is called with the NNX module `net`: what it
  changes there (counts of random streams, statistics, weights) is lost in
  silence
  write: from flax import nnx
         step = nnx.jit(step.__wrapped__)
""",
        now=True,
    ),
    "a module trained": Case(
        "jitted modules",
        """
net = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
step = jax.jit(lambda net, x: net.update(x))
def loop():
  step(x=x, net=net)
""",
        """
! `step` is a plain jax.jit, and is called with the NNX module `net`: what it
  changes there (counts of random streams, statistics, weights) is lost in
  silence
  write: from flax import nnx
         step = nnx.jit(step.__wrapped__)
""",
        now=True,
    ),
    "a module captured": Case(
        "jitted modules",
        "step = jax.jit(lambda x: net(x))",
        """
! `step` is jax.jit of a function that reads the NNX module `net` from outside:
  its weights are constants of the program, and later ones are never seen
  form: from flax import nnx
        @nnx.jit
        def step(net, …):
          …
""",
        now=True,
        after="del step, net",
    ),
    "a module itself": Case(
        "jitted modules",
        "net = Noisy(nnx.Rngs(0))\nstep = jax.jit(net)",
        """
! `step` is jax.jit of a function that reads the NNX module `net` from outside:
  its weights are constants of the program, and later ones are never seen
  form: from flax import nnx
        @nnx.jit
        def step(net, …):
          …
""",
        now=True,
        after="del step, net",
    ),
    "a mesh": Case(
        "explicit mesh",
        "layer, kinds = nn.Dense(2), (jax.sharding.AxisType.Explicit,)\n"
        "mesh = jax.make_mesh((1, 1), ('data', 'model'), axis_types=kinds * 2)",
        """
! `mesh` has Explicit axes: Flax's Dropout, Embed and RNN fail on arrays that
  are sharded so
  write: import jax
         from jax.sharding import AxisType
         mesh = jax.make_mesh((1, 1), ('data', 'model'), axis_types=(AxisType.Auto,) * 2)
""",
    ),
    "a mesh that is set": Case(
        "explicit mesh",
        "del mesh\njax.set_mesh(jax.make_mesh((1,), ('data',), axis_types=kinds))",
        """
! the mesh that is set has Explicit axes: Flax's Dropout, Embed and RNN fail on
  arrays that are sharded so
  write: import jax
         from jax.sharding import AxisType
         mesh = jax.make_mesh((1,), ('data',), axis_types=(AxisType.Auto,))
         jax.set_mesh(mesh)
""",
    ),
    "workers": Case(
        "forked workers",
        """
class DataLoader:
  multiprocessing_context = None
  num_workers = 2
sys.modules['torch.utils.data'] = types.SimpleNamespace(DataLoader=DataLoader)
train = DataLoader()
""",
        """
! `train` forks 2 workers: a fork of a process in which JAX runs may wait for
  ever; multiprocessing_context='forkserver' starts them otherwise
  write: train.num_workers = 0
""",
        now=True,
    ),
    "reloaded": Case(
        "autoreload",
        """
%load_ext autoreload
%autoreload 2
with open('users_models.py', 'w') as file:
  file.write('import flax.linen as nn\\nclass Net(nn.Module):\\n  pass')
sys.path.insert(0, os.getcwd())
import users_models
other = users_models.Net()
""",
        """
! autoreload changes `Net` of users_models in place: functions that were jitted
  before an edit go on with the code before it, in silence, until
  jax.clear_caches()
  write: %aimport -users_models
""",
    ),
    "a folder for all": Case(
        "cache folder",
        "os.makedirs('cache')\nos.chmod('cache', 0o777)\nflax_magics.session().programs.compiler.keep_on_disk('cache')",
        """
! the folder of compiled programs, cache, can be written by others, and is not
  trusted: no program is kept, and a restarted kernel compiles all of them again
  write: import os
         os.chmod('cache', 0o700)
""",
    ),
    "no folder": Case(
        "cache folder",
        "open('file', 'w').close()\nflax_magics.session().programs.compiler.keep_on_disk('file/cache')",
        """
! the folder of compiled programs, file/cache, cannot be written: no program is
  kept, and a restarted kernel compiles all of them again
  form: import flax_magics
        flax_magics.session().programs.compiler.keep_on_disk("…")
""",
        after="flax_magics.session().programs.compiler.keep_on_disk(False)",
    ),
    "JAX's": Case(
        "cache folder",
        update(jax_compilation_cache_dir="file/cache"),
        """
! the folder of JAX's cache, file/cache, cannot be written: no program is kept,
  and a restarted kernel compiles all of them again
  form: import jax
        jax.config.update("jax_compilation_cache_dir", "…")
""",
        after=update(jax_compilation_cache_dir="cache"),
    ),
    "huge": Case(
        "cache folder",
        "with open('cache/program', 'wb') as file:\n  file.truncate(12_000_000_000)",
        """
! JAX's cache in cache has 12.0 GB, and no limit: the disk fills up, and nothing
  is ever deleted; first of all in a restarted kernel
  write: import jax
         jax.config.update("jax_compilation_cache_max_size", 10_000_000_000)
""",
        after=update(jax_compilation_cache_dir=None),
    ),
    "a GPU": Case(
        "accelerator",
        GPU,
        """
! this machine has an NVIDIA GPU, and JAX runs on the CPU, since the plugin for
  it is not installed: models train some 10 to 100 times slower than on it; then
  restart the kernel
  write: %pip install -U "jax[cuda12]==JAX"
""",
        now=True,
        after=NO_GPU,
    ),
    "told to": Case(
        "accelerator",
        GPU + "os.environ['JAX_PLATFORMS'] = 'cpu'\njax.config.update('jax_platforms', 'cpu')",
        """
! this machine has an NVIDIA GPU, and JAX runs on the CPU, as
  JAX_PLATFORMS="cpu" says: models train some 10 to 100 times slower than on it;
  first of all in a restarted kernel
  write: import os
         os.environ.pop("JAX_PLATFORMS", None)
""",
        after=NO_GPU + "\ndel os.environ['JAX_PLATFORMS']",
    ),
    "by a setting": Case(
        "accelerator",
        GPU + "jax.config.update('jax_platforms', 'cpu')",
        """
! this machine has an NVIDIA GPU, and JAX runs on the CPU, as `jax_platforms`
  says: models train some 10 to 100 times slower than on it; first of all in a
  restarted kernel
  write: import jax
         jax.config.update("jax_platforms", None)
""",
        after=NO_GPU,
    ),
    "no start": Case(
        "accelerator",
        GPU + "import importlib.util\nfind_spec = importlib.util.find_spec\nimportlib.util.find_spec = lambda *_: True",
        """
! this machine has an NVIDIA GPU, and JAX runs on the CPU, since the plugin for
  it did not start: models train some 10 to 100 times slower than on it
  write: import jax
         jax.devices("cuda") # says why
""",
        now=True,
        after=NO_GPU + "\nimportlib.util.find_spec = find_spec",
    ),
    "torch too": Case(
        "preallocation",
        FAKE.replace("POOL", "60_000_000_000") + "sys.modules['torch'] = types.ModuleType('torch')",
        """
! JAX took 60.0 GB of gpu:0 at its first use, and torch is loaded too: what that
  asks for beyond the rest fails; first of all in a restarted kernel
  write: import os
         os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
""",
        now=True,
        after=NO_FAKE,
    ),
    "too late": Case(
        "preallocation",
        FAKE.replace("POOL", "60_000_000_000") + "os.environ['XLA_PYTHON_CLIENT_PREALLOCATE'] = 'false'",
        """
! XLA_PYTHON_CLIENT_PREALLOCATE=false was set after JAX had taken 60.0 GB of
  gpu:0: nothing else gets that memory; first of all in a restarted kernel
  write: import os
         os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
""",
        now=True,
        after=NO_FAKE,
    ),
    "told to use the CPU": Case(
        "accelerator",
        FAKE.replace("POOL", "0")
        + "backend, jax.default_backend = jax.default_backend, lambda: 'gpu'\n"
        + "jax.config.update('jax_default_device', jax.devices('cpu')[0])",
        """
! JAX has gpu:0, and `jax_default_device` is cpu:0: models train some 10 to 100
  times slower than on it
  write: import jax
         jax.config.update("jax_default_device", None)
""",
        now=True,
        after="jax.config.update('jax_default_device', None)\njax.default_backend = backend\n" + NO_FAKE,
    ),
    "twice": Case(
        "two on the path",
        "jax_of(os.path.abspath('other'), 'flax', '9.9')",
        """
! flax is on the path twice, 9.9 in /other and FLAX in /site: Python imports the
  first, and its parts or pip may take the other; first of all in a restarted
  kernel
  write: import sys
         sys.path.remove('/other')
""",
        now=True,
        beside=("installed since",),
    ),
    "two jaxes": Case(
        "two on the path",
        "jax_of(os.path.abspath('another'), 'jax', '9.9')",
        """
! jax is on the path twice, 9.9 in /another and JAX in /site: Python imports the
  first, and its parts or pip may take the other; first of all in a restarted
  kernel
  write: import sys
         sys.path.remove('/another')
""",
        now=True,
        beside=("installed since",),
    ),
    "together": Case(
        "versions",
        "jax_of(os.path.abspath('third'), 'optax', '9.9', 'Requires-Dist: jax<0.1\\n')",
        """
! optax 9.9 takes jax<0.1, and JAX is installed: calls fail, or a GPU is not
  found; then restart the kernel
  write: %pip install "jax<0.1"
""",
        after="sys.path.pop(0)",
        beside=("installed since",),
    ),
}


if not AUTORELOAD:
    del CASES["reloaded"]


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    """What was said of each case, and what else was found beside it; versions and folders by words."""
    folder = tmp_path_factory.mktemp("doctor")
    cases = [(name, case.check, case.cell, case.after) for name, case in CASES.items()]
    script = f"import os\nos.chdir({str(folder)!r})\nSETUP, CASES = {SETUP!r}, {cases!r}\n{SHELL}"
    text = printed_by(script).partition("TOLD")[2].replace(str(folder), "")
    text = text.replace(sysconfig.get_path("purelib"), "/site").replace("%pip install filelock\\n", "")
    for package in ("jax", "flax"):
        text = text.replace(importlib.metadata.version(package), package.upper())
    return json.loads(text)


@pytest.mark.parametrize("name", CASES)
def test_a_check_says_what_is_wrong_what_it_costs_and_what_mends_it(name: str, told: Any) -> None:
    text, write, form, now, found = told[name]
    note = Note("doctor", text, write=write, form=form)
    case, lines = CASES[name], notes([note])
    assert "\n".join(lines) == case.shown.strip("\n")
    assert (now, found) == (case.now, sorted({case.check, *case.beside}))
    advice = "" if write is None and form is None else (write or form)
    assert all(cell_len(line) <= 80 for line in lines if line.strip(" ") not in advice and "write: " not in line)
    html = Reader(notice_bundle(Notice("doctor", (), (note,)), "auto")["text/html"]).text
    assert " ".join(text.split()) in html
    assert " ".join(advice.split()) in html


def test_every_check_is_made_true() -> None:
    covered = {case.check for case in CASES.values()} | {one for case in CASES.values() for one in case.beside}
    covered |= set() if AUTORELOAD else {"autoreload"}
    assert {check.name for check in CHECKS} - covered == {"recoverability"}  # below


def test_a_job_of_several_processes_is_told_when_one_would_take_all_with_it() -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    script = """
        import sys, jax
        jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
        import flax_magics
        session = flax_magics.Session()
        print(session.doctor())
        print([note.kind for note in session.first_findings({}, None)])
        jax.config.update("jax_enable_recoverability", True)
        print(list(session.doctor().findings))
    """
    jobs = [
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(script), address, str(rank)],
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    for job in jobs:
        printed, errors = job.communicate(timeout=120)
        assert job.returncode == 0, errors
        assert printed.partition("\n")[2] == (
            "! `jax_enable_recoverability` is off in a job of 2 processes: when one of them\n"
            "  ends, JAX ends the others, and what they hold is lost; first of all in a\n"
            "  restarted kernel\n"
            "  write: import jax\n"
            '         jax.config.update("jax_enable_recoverability", True)\n'
            "['doctor']\n[]\n"
        )
