"""`python -m flax_magics verify`: real notebooks, executed and saved, run again in real kernels."""

from __future__ import annotations

import base64
import contextlib
import copy
import json
import os
import re
import signal
import subprocess
import sys
import termios
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import nbformat
import numpy as np
import pytest
import yaml
from kernels import RUN_JSON, Kernels

from flax_magics.rng.keys import short_key
from flax_magics.verify.notebooks import read, runs_of

ROOT = Path(__file__).parents[2]
RUNS_JSON = "application/vnd.flax-magics.runs+json"
MODEL = """
%%flaxmodel
class Scaled(nn.Module):
  train: bool = False

  @nn.compact
  def __call__(self, x):
    return nn.Dropout(0.5, deterministic=not self.train)(x * FACTOR)

scaled = Scaled()
"""
CELLS = (
    "%load_ext flax_magics",
    "import flax.linen as nn\nimport jax.numpy as jnp\nx = jnp.ones((3, 4))",
    "FACTOR = 2.0",
    MODEL,
    "y = %flax_apply --train scaled(x)",
    "for _ in range(4):\n  %flax_apply --train scaled(x);",
    "%flax_apply -q scaled(x);",
    "%flax_apply scald(x)",
    "latent = %flax_key latent",
    "print(open('beside.txt').read())",
)
LOAD, FACTOR, APPLY, MISTAKE = 0, 2, 4, 7
FACTOR_2_ULP_MORE = "FACTOR = 2.0000005"


def notebook_of(*cells: str) -> Any:
    made = [nbformat.v4.new_code_cell(cell.strip("\n")) for cell in cells]
    # No such kernel is installed: the one that runs is of the Python that runs the command.
    spec = {"name": "someone-elses", "display_name": "Someone else's", "language": "python"}
    return nbformat.v4.new_notebook(cells=made, metadata={"kernelspec": spec})


def with_outputs_of(notebook: Any, source: str) -> Any:
    """A notebook of one cell with the outputs of the first run: quick to start, for it needs no JAX."""
    made = notebook_of(source)
    made.cells[0].outputs = notebook.cells[APPLY].outputs
    return made


@pytest.fixture(scope="module")
def executed(kernels: Kernels, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("first")
    (folder / "beside.txt").write_text("read in the notebook's own folder")
    notebook = notebook_of(*CELLS)
    notebook.cells[MISTAKE].metadata["tags"] = ["raises-exception"]
    with kernels.lent(folder) as living:
        for cell in notebook.cells:
            living.execute(cell)
    return notebook


@pytest.fixture
def notebook(executed: Any) -> Any:
    """The notebook with its outputs, to be edited."""
    return copy.deepcopy(executed)


class Folder:
    """Notebooks in a folder beside the one from which they are verified."""

    def __init__(self, path: Path) -> None:
        self.path = path
        (path / "notebooks").mkdir()
        (path / "notebooks" / "beside.txt").write_text("read in the notebook's own folder")

    def save(self, notebook: Any, name: str = "net") -> str:
        nbformat.write(notebook, self.path / "notebooks" / f"{name}.ipynb")
        return f"notebooks/{name}.ipynb"

    def verify(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "flax_magics", "verify", *arguments]
        return subprocess.run(command, cwd=self.path, capture_output=True, text=True, encoding="utf-8", timeout=300)

    def says(self, *arguments: str) -> tuple[int, list[str]]:
        """Exit status, and the lines of standard output; nothing may be said on standard error."""
        done = self.verify(*arguments)
        assert done.stderr == ""
        return done.returncode, done.stdout.splitlines()


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path)


def stored(notebook: Any) -> list[dict[str, Any]]:
    """The JSON data of the runs in the outputs; that of a loop has them in rows."""
    data = [output.get("data", {}) for cell in notebook.cells for output in cell.get("outputs", [])]
    runs = [one[RUN_JSON] for one in data if RUN_JSON in one]
    return [*runs, *(row for one in data if RUNS_JSON in one for row in one[RUNS_JSON]["runs"])]


def kept(run: dict[str, Any]) -> int:
    """How many values the dropout left."""
    return int(np.count_nonzero(np.frombuffer(base64.b64decode(run["bits"]), "<f4")))


def table(notebook: Any) -> list[str]:
    """What is said of the five applies, all values of which are two units in the last place further."""
    apply, first, _, *rows = stored(notebook)
    masks = [kept(run) for run in (apply, first, *rows)]
    return [
        "  cell  first line                draw  what    how far, in how many values",
        f"  5     y = %flax_apply --train…  1     digest  2 ulp, 9.54e-07 in {masks[0]} of 12",
        *(
            f"  6     for _ in range(4):        {draw}     digest  2 ulp, 9.54e-07 in {masks[draw - 1]} of 12"
            for draw in (2, 3, 4, 5)
        ),
    ]


def elsewhere(notebook: Any) -> None:
    """The same outputs, as another machine would have stored them."""
    for run in stored(notebook):
        if "versions" in run:
            run["versions"]["jax"] = "0.0.1\x1b[31m"
            run.update(threads=1024, device_kind="another CPU than this one")


OTHER = [
    f"  other than stored  jax 0.0.1\\x1b[31m → {jax.__version__}",
    "                     device kind another CPU than this one → cpu",
    f"                     threads 1024 → {len(os.sched_getaffinity(0))}",
]


@dataclass(frozen=True)
class Verified:
    """What one run of the command says of several notebooks."""

    status: int
    lines: list[str]
    untouched: bool

    def of(self, name: str) -> list[str]:
        """The lines of one of them."""
        starts = [number for number, line in enumerate(self.lines) if not line.startswith(" ")]
        (start,) = (number for number in starts if self.lines[number].startswith(f"notebooks/{name}.ipynb: "))
        return self.lines[start : min((number for number in starts if number > start), default=None)]


@pytest.fixture(scope="module")
def verified(executed: Any, tmp_path_factory: pytest.TempPathFactory) -> Verified:
    """The notebook edited in several ways, and all of them verified by one command, two at once."""
    folder = Folder(tmp_path_factory.mktemp("verified"))
    names = ("agrees", "seed", "fails")
    notebooks = {name: copy.deepcopy(executed) for name in names}
    skipped = with_outputs_of(executed, "raise SystemError('it is skipped')").cells[0]
    skipped.metadata["tags"] = ["skip-execution"]
    notebooks["agrees"].cells.append(skipped)
    elsewhere(notebooks["seed"])
    notebooks["seed"].cells[LOAD].source += "\n%config FlaxMagics.seed = 1"
    notebooks["fails"].cells[FACTOR].source = FACTOR_2_ULP_MORE
    notebooks["fails"].cells[MISTAKE].metadata["tags"] = []
    files = [folder.save(notebook, name) for name, notebook in notebooks.items()]
    before = [((folder.path / file).read_bytes(), (folder.path / file).stat().st_mtime_ns) for file in files]
    status, lines = folder.says(*files, "-j", "2")
    after = [((folder.path / file).read_bytes(), (folder.path / file).stat().st_mtime_ns) for file in files]
    left = sorted(os.listdir(folder.path / "notebooks"))
    untouched = before == after and left == sorted(["beside.txt", *(f"{name}.ipynb" for name in names)])
    return Verified(status, lines, untouched)


def test_the_status_is_that_of_the_worst_and_nothing_is_written(verified):
    assert verified.status == 2
    assert verified.untouched


def test_runs_that_agree(verified):
    assert verified.of("agrees") == ["notebooks/agrees.ipynb: agrees: 6 runs, keys and every bit"]


def test_another_seed_has_other_keys_on_any_machine(verified):
    head, *lines = verified.of("seed")
    assert head == "notebooks/seed.ipynb: differs: 6 of 6 runs"
    roots = [jax.random.key(0), jax.random.key(1)]
    for draw, line in enumerate(lines[1:6], 1):
        cell = "5     y = %flax_apply --train…" if draw == 1 else "6     for _ in range(4):      "
        was, now = (short_key(jax.random.split(root, 3)[2]) for root in roots)
        assert line == f"  {cell}  {draw}     keys  dropout {was} → {now}"
        roots = [jax.random.split(root, 3)[0] for root in roots]
    assert lines[6].startswith("  9     latent = %flax_key late…  7     keys  latent ")
    assert lines[7:] == OTHER


def test_what_differs_before_a_cell_that_fails_is_told(verified, executed):
    assert verified.of("fails") == [
        "notebooks/fails.ipynb: could not run: cell 8 (%flax_apply scald(x)) fails:",
        "  FlaxMagicsError: no model is called `scald`; registered: scaled. Before it, 5",
        "  runs differ.",
        *table(executed),
    ]


def test_a_notebook_that_does_not_run_to_its_end_is_no_verified_one(folder, notebook):
    failing = with_outputs_of(notebook, "raise ValueError('\\x1b[31mno\\nmore')")
    mistaken = with_outputs_of(notebook, "%load_ext flax_magics\n%flax_key --sed 1")
    slow = with_outputs_of(notebook, "import time\ntime.sleep(100)")
    dying = with_outputs_of(notebook, "import os\nos.write(2, b'the last words\\n')\nos._exit(3)")
    files = [folder.save(one, name) for name, one in zip("abcd", (failing, mistaken, slow, dying), strict=True)]
    status, lines = folder.says(*files, "-j", "2", "--timeout", "5")
    assert status == 2
    assert lines == [
        "notebooks/a.ipynb: could not run: cell 1 (raise ValueError('\\x1b[31mno\\nmore'))",
        "  fails: ValueError: \\x1b[31mno",
        "notebooks/b.ipynb: could not run: cell 1 (%load_ext flax_magics) fails:",
        "  FlaxMagicsError: %flax_key has no option --sed: did you mean --seed?",
        "notebooks/c.ipynb: could not run: cell 1 (import time) takes longer than 5 s:",
        "  --timeout SECONDS gives it more",
        "notebooks/d.ipynb: could not run: cell 1 (import os): the kernel died. the last",
        "  words",
    ]


def test_values_are_compared_where_a_tolerance_is_given(folder, notebook):
    elsewhere(notebook)
    notebook.cells[FACTOR].source = FACTOR_2_ULP_MORE
    assert folder.says(folder.save(notebook), "--rtol", "1e-6") == (
        0,
        [
            "notebooks/net.ipynb: agrees: 6 runs, keys and every bit in 1, keys and values",
            "  within rtol 1e-06 in 5 (by 60 of their 60 values)",
            *OTHER,
        ],
    )


def test_on_more_devices_a_mesh_over_all_gives_the_same_and_the_device_is_told(kernels, folder, tmp_path, monkeypatch):
    mesh = "x = jnp.ones((16, 4))\n%flax_mesh -q data=-1"
    notebook = notebook_of(*CELLS[:4], mesh, *CELLS[4:6])
    with kernels.lent(tmp_path) as living:
        for cell in notebook.cells:
            living.execute(cell)
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
    assert folder.says(folder.save(notebook)) == (
        0,
        ["notebooks/net.ipynb: agrees: 5 runs, keys and every bit", "  other than stored  device cpu:0 → cpu:0-7"],
    )


def test_several_at_once_as_json(folder, notebook):
    cleared = copy.deepcopy(notebook)
    notebook.cells[FACTOR].source = FACTOR_2_ULP_MORE
    for cell in cleared.cells:
        cell.outputs = []
    files = [folder.save(notebook, "a"), folder.save(cleared, "b")]
    done = folder.verify(*files, "nowhere.ipynb", "--json", "-j", "2")
    assert (done.returncode, done.stderr) == (2, "")
    found = json.loads(done.stdout)
    assert (found["version"], found["status"]) == (1, 2)
    for one in found["notebooks"]:
        assert isinstance(one.pop("seconds"), float)
    differs, empty, missing = found["notebooks"]
    none = {"all": 0, "agree": 0, "within": 0, "not_comparable": 0, "differ": 0}
    common = {"message": None, "order": None, "environment": {}, "differences": []}
    assert empty == {**common, "file": files[1], "status": "nothing to verify", "runs": none}
    why = "it cannot be read: No such file or directory."
    assert missing == {**common, "file": "nowhere.ipynb", "status": "could not run", "message": why, "runs": none}
    assert (differs["status"], differs["runs"]) == ("differs", {**none, "all": 6, "agree": 1, "differ": 5})
    first = stored(notebook)[0]
    now = differs["differences"][0].pop("now")
    assert now != first["digest"]
    assert differs["differences"][0] == {
        "cell": 5,
        "line": "y = %flax_apply --train scaled(x)",
        "outcome": "differs",
        "what": "digest",
        "command": "apply",
        "model": "scaled",
        "call": "scaled(x)",
        "seed": 0,
        "draw": 1,
        "samples": None,
        "stored": first["digest"],
        "values": {"compared": 12, "of": 12, "differ": kept(first), "ulp": 2, "absolute": 2.0**-20, "array": ""},
    }


def test_a_notebook_without_our_outputs_is_reported_and_not_run(folder, open_notebook):
    quiet = notebook_of(
        *CELLS[:4],
        "y = %flax_apply -q scaled(x)",
        "%config FlaxMagics.report = 'off'\ny = %flax_apply scaled(x)\n%config FlaxMagics.report = 'auto'",
    )
    living = open_notebook()
    for cell in quiet.cells:
        living.execute(cell)
    other = notebook_of("print('not of ours')", "open('ran', 'w')")
    assert [stored(quiet), stored(other)] == [[], []]
    files = [folder.save(quiet, "quiet"), folder.save(other, "other")]
    assert folder.says(*files) == (
        4,
        [
            "notebooks/quiet.ipynb: no flax_magics outputs: nothing to verify",
            "notebooks/other.ipynb: no flax_magics outputs: nothing to verify",
        ],
    )
    assert not (folder.path / "notebooks" / "ran").exists()


def test_a_terminal_shows_how_far_it_is(folder, notebook):
    command = [sys.executable, "-m", "flax_magics", "verify", folder.save(with_outputs_of(notebook, "1"))]
    terminal, end = os.openpty()
    termios.tcsetwinsize(end, (24, 80))
    os.set_blocking(terminal, False)
    with subprocess.Popen(command, cwd=folder.path, stdout=subprocess.PIPE, stderr=end, text=True) as running:
        out = running.stdout.read()
    shown = os.read(terminal, 10_000).decode()
    os.close(terminal)
    os.close(end)
    assert re.search(r"0%\|.*\| 0/1 \[", shown)
    assert shown.rpartition("\r")[0].endswith(" ")  # and nothing is left of it
    # The cell gives no run, and the outputs say that there was one.
    assert (running.returncode, out.splitlines()[0]) == (1, "notebooks/net.ipynb: differs: 1 of 1 run")


WAITS = """
import os, subprocess, time
child = subprocess.Popen(['sleep', '600'])
with open(f'{os.getpid()}.{child.pid}.pids', 'w'):
  pass
time.sleep(600)
"""


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_ends_the_kernels_and_what_they_started(folder, notebook, sent):
    notebook = with_outputs_of(notebook, WAITS)
    files = [folder.save(notebook, "a"), folder.save(notebook, "b")]
    command = [sys.executable, "-m", "flax_magics", "verify", *files, "-j", "2"]
    running = subprocess.Popen(
        command, cwd=folder.path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        waiting = folder.path / "notebooks"
        deadline = time.monotonic() + 120
        while len(list(waiting.glob("*.pids"))) < 2 and time.monotonic() < deadline:
            time.sleep(0.1)
        processes = [int(pid) for path in waiting.glob("*.pids") for pid in path.name.split(".")[:2]]
        assert len(processes) == 4
        running.send_signal(sent)
        out, err = running.communicate(timeout=60)
    finally:
        running.kill()
    assert (running.returncode, out, err) == (130, "", "interrupted: its kernels are ended\n")
    assert [pid for pid in processes if _lives(pid)] == []


def _lives(pid: int) -> bool:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
            if state != "Z":  # an orphan that nobody has waited for yet
                time.sleep(0.1)
                continue
        return False
    return True


def test_the_pre_commit_hook_is_the_command_on_notebooks():
    (hook,) = yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text(encoding="utf-8"))
    assert hook["entry"] == "python -m flax_magics verify"
    assert (hook["language"], hook["types"], hook["additional_dependencies"]) == ("python", ["jupyter"], [".[verify]"])


def test_the_examples_hold_all_that_is_compared():
    cells = runs_of(read(ROOT / "examples" / "the_sharp_bits.ipynb"))
    runs = [run for cell in cells for run in cell.runs]
    assert len(runs) == sum(cell.count for cell in cells) == 12
    for run in runs:
        assert run.digest is not None
        assert run.leaves is not None
        assert set(run.environment) == {"jax", "jaxlib", "flax", "device", "device_kind", "processor", "threads"}
