"""`%flax_export`: the session as plain Flax, whose digests in a fresh process are those of the session."""

from __future__ import annotations

import pytest
import sharp_bits
from exporting import NOISY, NORMED, assert_same, printed

MODEL = sharp_bits.MODEL.lstrip()
TRAIN = "y = %flax_apply --train my_model(x)"

pytestmark = pytest.mark.usefixtures("digests_taken")


def test_two_cells_share_a_draw(notebook, tmp_path):
    cells = ("variables = %flax_init my_model(x)", TRAIN, "z = %flax_apply --train my_model(x)\nz.shape")
    assert "variables = my_model.init(params_key, x)\n" in assert_same(notebook, tmp_path, MODEL, *cells)


def test_statistics_are_kept_in_a_loop_that_initialises(notebook, tmp_path):
    notebook(NORMED)
    notebook("batches = jax.random.normal(jax.random.key(7), (3, 8, 4))")
    notebook("for batch in batches:\n    y = %flax_apply --train normed(batch)")
    notebook("%flax_apply --eval normed(batches[0]);")
    notebook("for i, batch in enumerate(batches):\n    if i:\n        %flax_apply --train normed(batch);")
    script = assert_same(notebook, tmp_path)
    assert "if variables is None:" in script


def test_an_init_before_a_loop_is_of_the_loops_first_draw(notebook, tmp_path):
    loop = "for i in range(3):\n  y = %flax_apply --train my_model(x * i)\n  print(y.shape)"
    assert_same(notebook, tmp_path, MODEL, "%flax_init my_model(x);", loop)


def test_further_streams_and_keys_by_name(notebook, tmp_path):
    notebook(NOISY)
    runs = ("%flax_init noisy(x);", "y = %flax_apply noisy(x)", "y = %flax_apply --key z_rng noisy(x)")
    keys = ("latent = %flax_key latent\ndropout = %flax_key dropout", "%flax_key another")
    last = "z = jax.random.normal(latent, x.shape)\ny = %flax_apply noisy(z)"
    script = assert_same(notebook, tmp_path, *runs, *keys, last)
    assert "noise_key = jax.random.fold_in(root_key, 0x" in script


def test_restarts_repeated_and_edited_cells(notebook, tmp_path):
    notebook("WIDTH = 3\nscale = 2.0\ndef twice(x):\n    return x * scale")
    cell = MODEL.replace("nn.Dense(self.num_neurons)(x)", "twice(nn.Dense(self.num_neurons)(x))")
    cells = [cell, TRAIN, TRAIN, cell, TRAIN, "scale = 3.0", TRAIN, "%flax_key --seed 3", TRAIN]
    cells += [cell.replace("rate=0.5", "rate=0.2"), TRAIN]  # variables kept
    cells += [cell.replace("num_neurons=3", "num_neurons=5"), TRAIN]  # variables dropped
    assert_same(notebook, tmp_path, *cells, "%flax_key --seed 0 --fresh", TRAIN)


def test_of_lines_that_are_alike_the_one_that_ran(notebook, tmp_path):
    notebook(MODEL)
    notebook("""\
def first(x):
    y = %flax_apply --train my_model(x)
    return y

def second(x):
    y = %flax_apply --train my_model(x)
    return y""")
    notebook("if x.ndim == 2:\n    y = %flax_apply my_model(x)\nelse:\n    z = %flax_apply my_model(x)")
    script = assert_same(notebook, tmp_path, "y = second(x)\ny = second(y @ jnp.ones((3, 4)))")
    assert "if x.ndim == 2:\n    # Left out: it never ran.\n" in script
    assert "else:\n    root_key, params_key, dropout_key = jax.random.split(root_key, 3)\n" in script
    assert script.count("Left out") == 1


def test_a_function_and_its_loop_in_a_cell_that_is_run_again(notebook, tmp_path):
    run = "y = %flax_apply my_model(x)"
    cell = """\
def step(x):
    y = %flax_apply --train --keys-of last my_model(x)
    return y
for i in range(2):
    y = step(x * i)"""
    assert "Left out" not in assert_same(notebook, tmp_path, MODEL, run, cell, run, cell)


def test_a_function_defined_again_and_a_model_bound_anew(notebook, tmp_path):
    step, model = "def step(x):\n    y = %flax_apply net(x)\n    return y", "net = nn.Dense(2)\n%flaxmodel net"
    run = "y = step(x)"
    cells = (model, step, step, run, run, "net = nn.Dense(3)", run, model)
    script = assert_same(notebook, tmp_path, *cells, "y = step(x)\nfor _ in range(2): y = step(x)")
    assert script.count("def step") == 2
    assert "    global root_key, variables\n" in script
    assert script.count("def apply") == 3


def test_options_of_one_run(notebook, tmp_path):
    assert_same(
        notebook,
        tmp_path,
        MODEL,
        "y = %flax_apply --train --samples 4 my_model(x)",
        "y = %flax_apply --train --keys-of 2 my_model(x)\ny = %flax_apply --train --keys-of last my_model(x)",
        "y = %flax_apply --train --eager my_model(x)",
        "other = my_model.init(jax.random.key(9), x)\ny = %flax_apply --variables other my_model(x)",
        "y = %flax_apply --train --repeat 2 my_model(x)",
    )


def test_mutable_and_sown_collections_and_methods(notebook, tmp_path):
    notebook("""\
%%flaxmodel
class Auto(nn.Module):
  def setup(self):
    self.encoder = nn.Dense(2)
    self.decoder = nn.Dense(4)
    self.norm = nn.BatchNorm(use_running_average=False)
  def encode(self, x):
    z = self.encoder(x)
    self.sow('intermediates', 'z', z)
    return z
  def decode(self, z):
    return self.decoder(self.norm(z))
  def __call__(self, x, scale=1.0, *, act=None, n=1):
    for _ in range(n):
      x = self.encode(x) @ jnp.ones((2, 4))
    z = self.encode(x)
    return self.decode(z if act is None else act(z)) * scale

auto = Auto()
""")
    methods = ("z = %flax_apply auto.encode(x)", "back = %flax_apply auto.decode(z)")
    calls = "y = %flax_apply auto(x, 2.0, act=nn.relu)\ny = %flax_apply auto(x, scale=3, n=2)"
    sown = "y, updates = %flax_apply --mutable intermediates auto(x)"
    written = "out = %flax_apply --mutable batch_stats auto(x)"
    assert_same(notebook, tmp_path, *methods, calls, sown, written, "h = %flax_apply auto.encoder(x)")


def test_cells_of_statements_and_what_is_around_commands(notebook, tmp_path, monkeypatch, bang):
    # A real one forks, which JAX warns of.
    monkeypatch.setattr(notebook.shell, "system", print)
    monkeypatch.setattr(notebook.shell, "getoutput", lambda line, **_: [line])
    notebook(MODEL)
    notebook("%%flax_apply --train\nx2 = x * 2  # twice\ny = my_model(\n  x2,\n)")
    notebook("%%time\ny = %flax_apply --train my_model(x)")
    notebook("%%capture out\nprint('hidden')\ny = %flax_apply --train my_model(x)")
    notebook(f"%time z = y + 1\nfiles = {bang}echo a b\n!true\n%precision 3")
    script = assert_same(notebook, tmp_path, "print(len(files))", "w = %flax_apply my_model(z @ jnp.ones((3, 4)))")
    assert "# %%time\n" in script
    assert f"# files = {bang}echo a b\n" in script
    assert "# Left out: `files` is not there: a magic or the shell gives it.\n# print(len(files))\n" in script
    assert "z = y + 1  # %time\n" in script


def test_cells_that_fail(notebook, tmp_path):
    notebook(MODEL)
    notebook.fails("y = %flax_apply my_model(x)\nz = undefined + 1\nw = 3")
    notebook.fails("%flax_apply my_model(undefined)")
    notebook.fails("for i in range(3):\n    y = %flax_apply --train my_model(x)\n    if i: raise RuntimeError")
    notebook(TRAIN)
    script = assert_same(notebook, tmp_path)
    assert "\n# Left out: the rest of In [4], which failed with NameError.\n" in script
    assert (
        "\n# In [6] failed here with RuntimeError, after 2 runs.\nruns_left = 2\ntry:\n"
        "  for i in range(3):\n      if runs_left == 0:\n        raise KeyboardInterrupt\n      runs_left -= 1\n"
    ) in script
    assert "    if i: raise RuntimeError\nexcept (KeyboardInterrupt, RuntimeError):\n  pass\n" in script
    assert "undefined" not in script
    assert script.endswith("\n# 1 cell that failed and left nothing is left out.\n")


def test_the_session_in_the_users_own_code(notebook, tmp_path):
    notebook(MODEL)
    notebook("import flax_magics\nsession = flax_magics.session()")
    notebook("y = %flax_apply my_model(x)")
    notebook(
        "params = session.models['my_model'].variables['params']\n"
        "session.models['my_model'].variables = {'params': jax.tree.map(lambda p: p * 2, params)}\n"
        "print(session.runs[-1].digest)"
    )
    notebook("y = %flax_apply my_model(x)\nz = %flax_apply --variables {'params':params} my_model(x)")
    notebook("%flax_init my_model(x);\ny = %flax_apply my_model(x)")
    runs = notebook.session.runs
    script = assert_same(notebook, tmp_path, kept=[runs[0], *runs[3:]])
    for lines in (
        "# Left out: `flax_magics` is not there: it comes from flax_magics.\n# session = flax_magics.session()\n",
        "# Left out: `session` is not there: it comes from flax_magics.\n"
        "# params = session.models['my_model'].variables['params']\n"
        "# Left out: `params` is not there: it comes from flax_magics.\n"
        "# session.models['my_model'].variables = {'params': jax.tree.map(lambda p: p * 2, params)}\n",
        "# Left out: its variables were set by a line that is left out.\n# y = %flax_apply my_model(x)\n",
    ):
        assert lines in script


SHARP_BITS = """\
import jax
import jax.numpy as jnp
import flax.linen as nn
x = jax.random.uniform(jax.random.key(42), (3, 4, 4))


def print_digest(call, result):
  \"""Prints a digest of the bits of a result, by which two runs can be compared.\"""
  import hashlib

  import numpy as np

  hasher = hashlib.sha256()
  for path, leaf in jax.tree_util.tree_flatten_with_path(result)[0]:
    path = jax.tree_util.keystr(path)
    array = np.asarray(leaf, order="C")
    header = f"{path}\\0{array.dtype.name}{list(array.shape)}\\0"
    hasher.update(header.encode() + array.tobytes())
  print(f"{call:<17}  {hasher.hexdigest()[:16]}")


{model}

@jax.jit
def apply(variables, x):
  return my_model.apply(variables, x)


@jax.jit
def train(variables, x, dropout_key):
  return my_model.clone(training=True).apply(
    variables, x, rngs={"dropout": dropout_key}
  )


root_key = jax.random.key(0)
root_key, params_key, dropout_key = jax.random.split(root_key, 3)
variables = my_model.init(params_key, x)
y = apply(variables, x)
print_digest("my_model(x)", y)

# once more
root_key, params_key, dropout_key = jax.random.split(root_key, 3)
y_train = train(variables, x, dropout_key)
print_digest("train my_model(x)", y_train)
y_train
""".replace("{model}", MODEL.partition("\n")[2])


def test_the_notebook_of_the_sharp_bits_is_the_code_that_it_has_by_hand(notebook, tmp_path):
    cells = ("y = %flax_apply my_model(x)", "# once more\ny_train = %flax_apply --train my_model(x)\ny_train")
    script = assert_same(notebook, tmp_path, MODEL, *cells)
    docstring, _, code = script.partition('"""\n\n')
    assert code == SHARP_BITS
    assert docstring.startswith('"""The cells of a notebook in the order in which they ran, as plain JAX and Flax.\n')
    assert max(map(len, script.splitlines()[:-1])) <= 88


def test_names_of_the_users_own_are_left_alone(notebook, tmp_path):
    notebook(MODEL)
    notebook("train, variables, updates, root_key, result, hashlib, np = range(7)\ndef apply(a): return a")
    notebook("def print_digest(a): print(a)\ny = %flax_apply my_model(x)\ny = %flax_apply --train my_model(x)")
    script = assert_same(notebook, tmp_path, "print_digest(apply(train))\nprint(root_key, variables, apply)")
    assert notebook.session.export().unexported == ()
    assert "session_root_key, session_params_key, session_dropout_key = " in script
    assert "my_model_variables = my_model.init(session_params_key, x)\n" in script


def test_a_setting_before_jax_is_imported_stays_before_it(notebook, tmp_path):
    notebook("%reset -f")
    notebook("import os\nos.environ['A_SETTING'] = '1'\nimport jax, flax.linen as nn")
    notebook("x = jax.random.uniform(jax.random.key(42), (3, 4))\nnet = nn.Dense(2)\n%flaxmodel net")
    # The first cells of this notebook import JAX without a setting before.
    script = assert_same(notebook, tmp_path, "y = %flax_apply net(x)")
    assert script.index("import jax") < script.index("os.environ")


def test_nested_models_of_several_cells_and_a_helper_that_changes(notebook, tmp_path):
    block = """\
%%flaxmodel
class Block(nn.Module):
  width: int = 4
  @nn.compact
  def __call__(self, x):
    return nn.relu(nn.Dense(self.width)(x))
"""
    net = """\
%%flaxmodel
class Net(nn.Module):
  @nn.compact
  def __call__(self, x, train=False):
    return nn.Dropout(0.5, deterministic=not train)(nn.Dense(2)(Block()(x)))
"""
    outer, inner = "y = %flax_apply --train Net(x)", "y = %flax_apply Block(x)"
    assert_same(notebook, tmp_path, block, net, outer, inner, block.replace("relu", "tanh"), f"{outer}\n{inner}")


def test_switches_in_a_config_mapped_axes_and_starred_arguments(notebook, tmp_path):
    notebook("""\
import dataclasses
@dataclasses.dataclass(frozen=True)
class Config:
  width: int = 4
  deterministic: bool = True
""")
    notebook("""\
%%flaxmodel net = Net(Config())
class Net(nn.Module):
  config: Config
  @nn.compact
  def __call__(self, x, n=1, kind='a'):
    x = nn.Dense(self.config.width)(x) * n if kind == 'a' else x
    for _ in range(n):
      x = nn.BatchNorm(use_running_average=self.config.deterministic, axis_name='batch')(x)
    return nn.Dropout(0.5, deterministic=self.config.deterministic)(x)
""")
    notebook("y = %flax_apply --train net(x)\ny = %flax_apply --eval net(x, 2)")
    notebook("args, given = (x,), {'n': 1}\ny = %flax_apply net(*args, **given)")
    script = assert_same(notebook, tmp_path, "kind = 'a'\ny = %flax_apply net(x, kind=kind)")
    assert "net.clone(config=dataclasses.replace(net.config, deterministic=False)).apply(" in script


def test_branches_and_assignments_of_every_kind(notebook, tmp_path):
    notebook(NORMED)
    notebook("""\
results = {}
try:
    if len(x) > 2:
        results['a'] = %flax_apply --train normed(x)
    else:
        y = %flax_apply --train normed(x)
finally:
    first, *rest = %flax_apply --eval normed(x)
    total: jax.Array = %flax_apply --eval normed(x)
""")
    assert_same(notebook, tmp_path)


def test_what_only_a_notebook_knows_is_left_out_with_its_reason(notebook, tmp_path):
    notebook(MODEL)
    notebook("y = %flax_apply -o run my_model(x)")
    notebook("print(run.timing)\nprint(Out)\nawait_me = 1")
    script = assert_same(notebook, tmp_path, "s = %flax_summary -q my_model(x)\nprint(s.flops)\nawait_me += 1")
    for lines in (
        "# Left out: `run` is not there: it is a Run of the session.\n# print(run.timing)\n",
        "# Left out: `Out` is not there: it is the notebook's own.\n# print(Out)\n",
        "# Left out: its value is a report of %flax_summary.\n# s = %flax_summary -q my_model(x)\n",
        "# Left out: `s` is not there: its value is a report of %flax_summary.\n# print(s.flops)\n",
    ):
        assert lines in script
    assert script.endswith("await_me += 1\n")


def test_without_digests_it_is_shorter_still(notebook, tmp_path):
    notebook(NORMED)
    notebook("y = %flax_apply --train normed(x)\n%flax_apply --eval normed(x);")
    script = notebook.session.export(plain=True).text
    assert "hashlib" not in script
    assert "\ny, updates = train(variables, x, dropout_key)\nvariables = {**variables, **updates}\n" in script
    assert "\nevaluate(variables, x)\n" in script
    assert printed(script, tmp_path) == []
