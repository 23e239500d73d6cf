"""The file of an export is formatted by what is installed; our own lines keep to 88 columns anyway."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys

import pytest
from alone import run_alone
from exporting import NNX_NET, exported, printed

from flax_magics.export.writer import Free, LineWriter

RUFF = shutil.which("ruff", path=os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", "")]))

CELLS = [
    "import functools\nimport time\n\nimport optax\nfrom flax import nnx\n",
    """\
%%flaxmodel
class ConvNet(nn.Module):
    classes: int = 10

    @nn.compact
    def __call__(self, x, options=None, *, train: bool = False):
        x = nn.BatchNorm(use_running_average=not train)(nn.Dense(8)(x))
        x = nn.Dropout(0.25, deterministic=not train)(x)
        if options is not None and options["noisy"]:
            noise = jax.random.normal(self.make_rng("noise"), x.shape)
            x = x + options["scale"] * noise
        return nn.Dense(self.classes)(x)


network = ConvNet()
""",
    "#@title A form\nvariables = %flax_init network(x)",
    "for step in range(2):\n    for batch in x:\n        logits = %flax_apply --train network(batch)\nlogits.shape",
    'logits, statistics = %flax_apply --train --mutable batch_stats network(x, {"noisy": True, "scale": 0.1})',
    "%flax_apply --keys-of 2 --eval network(x)\nlogits[:2].mean()",
    NNX_NET,
    "y, statistics = %flax_apply --train --mutable BatchStat net(x)",
    "samples = %flax_apply --eval --samples 4 net(x)\n%flax_init net(x)",
    "latent = %flax_key latent",
]


@pytest.mark.skipif(RUFF is None, reason="ruff is not installed; it comes with the extra dev")
def test_the_file_is_as_ruff_formats_it_and_prints_what_the_shown_script_prints(notebook, tmp_path):
    for cell in CELLS:
        notebook(cell)
    path = tmp_path / "formatted.py"
    notebook(f"%flax_export -q {path}")
    done = subprocess.run([RUFF, "format", "--diff", "--isolated", str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    shown = exported(notebook)
    assert path.read_text() != shown
    assert run_alone(path).splitlines() == printed(shown, tmp_path)
    assert max(map(len, shown.splitlines())) <= 88


def test_where_nothing_formats_the_file_is_what_is_shown(notebook, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.which", lambda *_, **__: None)
    notebook("net = nn.Dense(2)\n%flaxmodel net\ny = %flax_apply net(x)")
    notebook(f"%flax_export -q {tmp_path / 'session.py'}")
    assert (tmp_path / "session.py").read_text().startswith(exported(notebook))


@pytest.mark.parametrize(
    "line",
    [
        "y = apply(variables, x)",
        f"    return network.apply(variables, batch, train=True, rngs={{'dropout': key}}, method={'e' * 12!r})",
        f"result = apply(variables, {', '.join(f'argument_{i}=value_{i}' for i in range(9))})",
        f"updates = {{'BatchStat': {{{', '.join(f'{i}: net.norm_{i}.mean' for i in range(4))}}}, 'Count': net.count}}",
        f"net.init(params_key, *[f(a, b) for a in x], method=lambda module, *args: module.{'e' * 20}(*args))",
        f"a_rather_long_name_for_a_key = jax.random.fold_in(root_key, 0xEFE2A5C0)  # stream {'n' * 12!r}",
        f"print_digest('a label, with commas (and brackets)', apply({', '.join(['a_long_name'] * 6)}))",
        f"def train({', '.join(f'parameter_{i}' for i in range(9))}): pass",
        f"flat = traverse_util.flatten_dict(net.init({', '.join(f'argument_{i}' for i in range(8))}))",
    ],
)
@pytest.mark.parametrize("column", [0, 8])
def test_our_own_lines_keep_to_88_columns_and_mean_the_same(line, column):
    lines = LineWriter(Free(set())).fitted([line.removesuffix(" pass")], column)
    assert max(map(len, lines)) <= 88 - column
    text = "\n".join(lines) + (" pass" if line.endswith(" pass") else "")
    assert ast.dump(ast.parse(text.strip())) == ast.dump(ast.parse(line.strip()))
    assert (lines == [line]) == (len(line) <= 88 - column)
