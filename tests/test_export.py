"""`%flax_export`: the session as plain Flax, whose digests in a fresh process are those of the session."""

from __future__ import annotations

import pytest
from exporting import assert_same

MODEL = """\
%%flaxmodel
class MyModel(nn.Module):
  num_neurons: int
  training: bool

  @nn.compact
  def __call__(self, x):
    x = nn.Dense(self.num_neurons)(x)
    return nn.Dropout(rate=0.5, deterministic=not self.training)(x)

my_model = MyModel(num_neurons=3, training=False)
"""

NORMED = """\
%%flaxmodel
class Normed(nn.Module):
  @nn.compact
  def __call__(self, x, train):
    x = nn.BatchNorm(use_running_average=not train)(x)
    return nn.Dropout(0.5, deterministic=not train)(nn.Dense(3)(x))

normed = Normed()
"""


pytestmark = pytest.mark.usefixtures("digests_taken")


def test_two_cells_share_a_draw(notebook, tmp_path):
    notebook(MODEL)
    notebook("variables = %flax_init my_model(x)")
    notebook("y = %flax_apply --train my_model(x)")
    notebook("z = %flax_apply --train my_model(x)\nz.shape")
    script = assert_same(notebook, tmp_path)
    assert "variables = my_model.init(params_key, x)\n" in script


def test_statistics_are_kept_in_a_loop_that_initialises(notebook, tmp_path):
    notebook(NORMED)
    notebook("batches = jax.random.normal(jax.random.key(7), (3, 8, 4))")
    notebook("for batch in batches:\n    y = %flax_apply --train normed(batch)")
    notebook("%flax_apply --eval normed(batches[0]);")
    notebook("for i, batch in enumerate(batches):\n    if i:\n        %flax_apply --train normed(batch);")
    script = assert_same(notebook, tmp_path)
    assert "if variables is None:" in script


def test_an_init_before_a_loop_is_of_the_loops_first_draw(notebook, tmp_path):
    notebook(MODEL)
    notebook("%flax_init my_model(x);")
    notebook("for i in range(3):\n  y = %flax_apply --train my_model(x * i)\n  print(y.shape)")
    assert_same(notebook, tmp_path)


def test_further_streams_and_keys_by_name(notebook, tmp_path):
    notebook("""\
%%flaxmodel
class Noisy(nn.Module):
  @nn.compact
  def __call__(self, x, z_rng=None):
    x = nn.Dense(3)(x)
    x = x + jax.random.normal(self.make_rng('noise'), x.shape)
    return x if z_rng is None else x + jax.random.normal(z_rng, x.shape)

noisy = Noisy()
""")
    notebook("%flax_init noisy(x);")
    notebook("y = %flax_apply noisy(x)")
    notebook("y = %flax_apply --key z_rng noisy(x)")
    notebook("latent = %flax_key latent\ndropout = %flax_key dropout")
    notebook("%flax_key another")
    notebook("z = jax.random.normal(latent, x.shape)\ny = %flax_apply noisy(z)")
    script = assert_same(notebook, tmp_path)
    assert "noise_key = jax.random.fold_in(root_key, 0x" in script


def test_restarts_repeated_and_edited_cells(notebook, tmp_path):
    notebook("WIDTH = 3\nscale = 2.0\ndef twice(x):\n    return x * scale")
    cell = MODEL.replace("nn.Dense(self.num_neurons)(x)", "twice(nn.Dense(self.num_neurons)(x))")
    notebook(cell)
    run = "y = %flax_apply --train my_model(x)"
    notebook(run)
    notebook(run)
    notebook(cell)
    notebook(run)
    notebook("scale = 3.0")
    notebook(run)
    notebook("%flax_key --seed 3")
    notebook(run)
    notebook(cell.replace("rate=0.5", "rate=0.2"))  # variables kept
    notebook(run)
    notebook(cell.replace("num_neurons=3", "num_neurons=5"))  # variables dropped
    notebook(run)
    notebook("%flax_key --seed 0 --fresh")
    notebook(run)
    assert_same(notebook, tmp_path)


def test_functions_hold_commands(notebook, tmp_path):
    notebook(MODEL)
    notebook('''\
def step(x, n):
    """One step."""
    for i in range(n):
        y = %flax_apply --train my_model(x + i)
    return y
''')
    notebook("a = step(x, 2)\nb = step(a @ jnp.ones((3, 4)), 1)")
    script = assert_same(notebook, tmp_path)
    assert "    global root_key, variables\n" in script


def test_options_of_one_run(notebook, tmp_path):
    notebook(MODEL)
    notebook("y = %flax_apply --train --draws 4 my_model(x)")
    notebook("y = %flax_apply --train --draw 2 my_model(x)\ny = %flax_apply --train --draw last my_model(x)")
    notebook("y = %flax_apply --train --eager my_model(x)")
    notebook("other = my_model.init(jax.random.key(9), x)\ny = %flax_apply --variables other my_model(x)")
    notebook("y = %flax_apply --train --repeat 2 my_model(x)")
    assert_same(notebook, tmp_path)


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
    notebook("z = %flax_apply auto.encode(x)")
    notebook("back = %flax_apply auto.decode(z)")
    notebook("y = %flax_apply auto(x, 2.0, act=nn.relu)\ny = %flax_apply auto(x, scale=3, n=2)")
    notebook("y, updates = %flax_apply --mutable intermediates auto(x)")
    notebook("out = %flax_apply --mutable batch_stats auto(x)")
    notebook("h = %flax_apply auto.encoder(x)")
    assert_same(notebook, tmp_path)


def test_cells_of_statements_and_what_is_around_commands(notebook, tmp_path, monkeypatch):
    # A real one forks, which JAX warns of.
    monkeypatch.setattr(notebook.shell, "system", print)
    monkeypatch.setattr(notebook.shell, "getoutput", lambda line, **_: [line])
    notebook(MODEL)
    notebook("%%flax_apply --train\nx2 = x * 2  # twice\ny = my_model(\n  x2,\n)")
    notebook("%%time\ny = %flax_apply --train my_model(x)")
    notebook("%%capture out\nprint('hidden')\ny = %flax_apply --train my_model(x)")
    notebook("%time z = y + 1\nfiles = !echo a b\n!true\n%precision 3")
    notebook("print(len(files))")
    notebook("w = %flax_apply my_model(z @ jnp.ones((3, 4)))")
    script = assert_same(notebook, tmp_path)
    assert "# %%time\n" in script
    assert "# files = !echo a b\n" in script
    assert "# Left out: `files` is not there (what a magic or the shell gives is not known to a script).\n" in script


def test_cells_that_fail(notebook, tmp_path):
    notebook(MODEL)
    notebook.fails("y = %flax_apply my_model(x)\nz = undefined + 1\nw = 3")
    notebook.fails("%flax_apply my_model(undefined)")
    notebook.fails("for i in range(3):\n    y = %flax_apply --train my_model(x)\n    if i: raise RuntimeError")
    notebook("y = %flax_apply --train my_model(x)")
    kept = [run for run in notebook.session.runs if run.draw not in (2, 3)]
    script = assert_same(notebook, tmp_path, kept)
    assert "# In [4] failed here with NameError:\n# z = undefined + 1\n" in script
    assert "2 draws that no line of the cells explains: my_model(x).\n" in script


def test_the_session_in_the_users_own_code(notebook, tmp_path):
    notebook(MODEL)
    notebook("import flax_magics\nsession = flax_magics.session()")
    notebook("y = %flax_apply my_model(x)")
    notebook(
        "params = session.models['my_model'].variables['params']\n"
        "session.models['my_model'].variables = {'params': jax.tree.map(lambda p: p * 2, params)}\n"
        "print(session.runs[-1].digest)"
    )
    notebook("y = %flax_apply my_model(x)")
    assert_same(notebook, tmp_path)
