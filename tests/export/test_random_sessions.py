"""Random sessions: each exported and run in a fresh process, which prints its digests; saved, loaded and replayed.

`FLAX_MAGICS_SESSIONS=50` runs so many; `FLAX_MAGICS_SESSION=17` that one alone.
"""

from __future__ import annotations

import os
import random
import re
from collections.abc import Iterator

import pytest
from exporting import CHILD, NNX_NET, NOISY, digests_of, exported, printed

import flax_magics

pytestmark = pytest.mark.usefixtures("digests_taken")

ONE = os.environ.get("FLAX_MAGICS_SESSION")
SEEDS = [int(ONE)] if ONE else range(int(os.environ.get("FLAX_MAGICS_SESSIONS", "4")))

IMPORTS = "import dataclasses\nfrom flax import nnx\nx = x[0]\nbatches = jnp.stack([x, x * 2])\n"

MODELS = {
    "child": CHILD,
    "normed": """\
%%flaxmodel
class Normed(nn.Module):
    @nn.compact
    def __call__(self, x, train=False, scale=1.0):
        x = nn.BatchNorm(use_running_average=not train)(nn.Dense(3)(x))
        self.sow('intermediates', 'h', x)
        return nn.Dropout(0.5, deterministic=not train)(x) * scale

normed = Normed()
""",
    "seq": """\
%%flaxmodel
drop = nn.Dropout(0.5, deterministic=False)
seq = nn.Sequential([nn.Dense(3), nn.relu, drop, nn.Dense(2), drop])
""",
    "holding": """\
%%flaxmodel holding = Holding({'dense': nn.Dense(3), 'drop': nn.Dropout(0.5, deterministic=True)}, Config())
@dataclasses.dataclass(frozen=True)
class Config:
    rate: float = 0.5
    training: bool = False
class Holding(nn.Module):
    parts: dict
    config: Config
    @nn.compact
    def __call__(self, x):
        x = self.parts['drop'](self.parts['dense'](x))
        return nn.Dropout(self.config.rate, deterministic=not self.config.training)(x)
""",
    "noisy": NOISY,
    "bridged": """\
%%flaxmodel
class Inner(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(4, 3, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
    def __call__(self, x):
        return self.dropout(self.linear(x))

bridged = nnx.bridge.to_linen(Inner)
""",
    "net": NNX_NET,
    "own": """\
%%flaxmodel
@dataclasses.dataclass(frozen=True)
class Mode:
    training: bool = False
class Own(nnx.Module):
    def __init__(self, *, rngs):
        self.linear = nnx.Linear(4, 3, rngs=rngs)
        self.mode, self.is_training = Mode(), False
    def __call__(self, x, rngs=None):
        return self.linear(x) * (2 if self.mode.training else 1) * (3 if self.is_training else 1)

own = Own(rngs=nnx.Rngs(7))
""",
}
EDITS = [
    ("rate: float = 0.5", "rate: float = 0.25"),
    ("nn.Dense(3)", "nn.Dense(2)"),
    ("nn.relu", "nn.tanh"),
    ("Dropout(0.5", "Dropout(0.1"),
    ("Net(8, 3)", "Net(8, 2)"),
    ("* scale", "* scale * 2"),
]
CALLS = {
    "normed": ["normed(x)", "normed(x, scale=2.0)", "normed(x * 2)"],
    "noisy": ["noisy(x)", "noisy(x, options={'act': 'relu', 'scale': 2.0})"],
    "child": ["child(x)", "child.encode(x)"],
    "net": ["net(x)", "net(x, 2.0)"],
}
KEYS = ["latent = %flax_key latent", "%flax_key --seed 3", "%flax_key --seed 0 --fresh", "k = %flax_key dropout"]
PYTHON = [
    "def half(values):\n    return values / 2\nz = half(jnp.ones(3))",
    "try:\n    1 / 0\nexcept ZeroDivisionError as error:\n    told = str(error)\nprint(told)",
    "import math, flax_magics\nprint(math.pi); seen = flax_magics.session().seed\nprint(seen)",
    "if (n := len(batches)) > 1: print(n)",
    "x = x + 1",
    "1 / 0",
    "n = 3\nundefined + 1",
    "for i in range(2):\n    undefined",
    "# a comment\n%precision 3\nw = x.mean(); w",
]
LIMITS = re.compile(
    "flax_magics|it is a Run|with `--keys-of`|built the module anew|no line of the cells|another `params` key|failed"
    "|--keys-of |--samples |stood for another"
)
"""What is left out with these reasons is said, and no mistake."""


class Writer:
    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        names = self.random.sample(sorted(MODELS), 2)
        self.models = {name: MODELS[name] for name in names}
        self.cells: list[str] = []

    def options(self, name: str, call: str) -> str:
        pick = self.random.choice
        mode = pick(["", "--train", "--eval"])
        more = pick(["", "", "--keys-of last", "--keys-of 1", "--samples 2", "--eager", "--repeat 2", "-o run", "-q"])
        if name == "normed" and self.random.random() < 0.3:
            more = pick(["--mutable batch_stats", "--mutable intermediates --mutable batch_stats"])
        if name == "net" and self.random.random() < 0.2:
            more = "--mutable BatchStat"
        if name == "noisy" and "options" not in call and self.random.random() < 0.3:
            more += " --key z_rng"
        if name == "child" and self.random.random() < 0.2:
            more += " --variables {'params':child.init(jax.random.key(5),x)['params']}"
        return " ".join(f"{mode} {more}".split())

    def line(self, name: str) -> str:
        call = self.random.choice(CALLS.get(name, [f"{name}(x)"]))
        return " ".join(f"%flax_apply {self.options(name, call)} {call}".split())

    def cell(self) -> str:
        pick = self.random.choice
        name = pick(list(self.models))
        line = self.line(name)
        match self.random.randrange(13):
            case 0:
                return f"for batch in batches:\n    y = {line.replace('(x', '(batch')}\n    total = y"
            case 1:
                return f"def step(x, n=1):\n    '''A step.'''\n    for _ in range(n):\n        y = {line}\n    return y"
            case 2:
                return pick(["y = step(x)", "y = step(x * 2, 2)", "for i in range(2): y = step(x + i)"])
            case 3:
                return pick([f"%flax_init {name}(x);", f"variables = %flax_init {name}(x)\nn = len(variables)"])
            case 4:
                return pick(KEYS)
            case 5:
                return pick(PYTHON)
            case 6 if self.cells:
                return pick(self.cells)
            case 7:
                old, new = pick(EDITS)
                self.models[name] = self.models[name].replace(old, new)
                return self.models[name]
            case 8:
                head, _, call = line.rpartition(" " + name)
                call = f"y = {name}{call.replace('(x', '(x2')}"
                return f"%%flax_apply {head.removeprefix('%flax_apply')}\nx2 = x * 2  # twice\n{call}"
            case 9:
                return f"if len(x) > 2:\n    y = {line}\nelse:\n    y = %flax_apply {name}(x)"
            case 10:
                return f"{line};"
        return f"y = {line}"

    def session(self, size: int = 12) -> Iterator[str]:
        yield from self.models.values()
        for _ in range(size):
            cell = self.cell()
            self.cells.append(cell)
            yield cell


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("seed", SEEDS)
def test_a_random_session_is_its_export_its_file_and_its_replays(notebook, tmp_path, seed):
    notebook("%config FlaxMagics.report = 'off'")
    writer = Writer(seed)
    cells = [IMPORTS, *writer.session()]
    for i, cell in enumerate(cells):
        notebook.shell.run_cell(cell, store_history=i % 5 != 4)
    session = flax_magics.session()
    runs = session.runs
    script = exported(notebook)
    story = "\n---\n".join(cells) + f"\n=====\n{script}"
    left_out = session.export().unexported
    assert not [reason for reason in left_out if not LIMITS.search(reason)], f"{left_out}\n{story}"
    expected = [run.digest for run in runs]
    told = digests_of(printed(script, tmp_path))
    if left_out:
        rest = iter(expected)
        assert all(digest in rest for digest in told), f"{left_out}\n{story}"
    else:
        assert told == expected, story

    session.save(tmp_path / "s.safetensors")
    again = flax_magics.Session()
    again.load(tmp_path / "s.safetensors")
    assert [run.digest for run in again.runs] == expected
    for name, model in session.models.items():
        if model._entry().variables is None or name == "noisy":
            continue
        again.register(name, model.module)
        loaded, saved = (each.apply(name, notebook["x"], mode="eval").digest for each in (again, session))
        assert loaded == saved
    drawn = [run for run in runs if run.command == "apply" and not run.replayed and run.seed == session.seed]
    for run in drawn[-2:]:
        if [r.draw for r in runs if r.seed == run.seed].count(run.draw) == 1:
            assert session.replay(run.draw).agreement.identical
