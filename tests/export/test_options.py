"""`%flax_export` of what was left out before: choices inside containers, earlier draws by the dozen, what NNX hands back."""

from __future__ import annotations

import pytest
from exporting import NORMED, assert_same

pytestmark = pytest.mark.usefixtures("digests_taken")

ATTEND = """\
%%flaxmodel
class Attend(nn.Module):
  @nn.compact
  def __call__(self, x, options=None, rate=0.5):
    x = nn.Dense(3)(x['x'] if isinstance(x, dict) else x)
    x = nn.Dropout(rate, deterministic=False)(x)
    if options is None:
      return x
    for act in options.get('acts', ()):
      x = act(x)
    return x * options['scale'] if options['causal'] else x

attend = Attend()
"""


def test_choices_inside_containers_are_literals_or_static_arguments(notebook, tmp_path):
    notebook(ATTEND)
    notebook("y = %flax_apply attend(x, {'causal': True, 'scale': 2.0})")
    notebook("for causal in (True, False):\n  y = %flax_apply attend(x, {'causal': causal, 'scale': x.mean()})")
    notebook("options = {'causal': True, 'scale': 3, 'acts': [nn.gelu, nn.relu], 'mask': None}")
    notebook("y = %flax_apply attend(x, options)")
    notebook("options['causal'] = False\ny = %flax_apply attend(x, options=options)")
    script = assert_same(
        notebook, tmp_path, "batch = {'x': x, 'lang': 'en'}\ny = %flax_apply --samples 2 attend(batch)"
    )
    assert "  return attend.apply(variables, x, {'causal': True, 'scale': scale}, rngs={'dropout': dropout_key})\n" in (
        script.replace("(\n    ", "(").replace("\n  )", ")")
    )
    assert "@functools.partial(jax.jit, static_argnames=('causal',))\n" in script
    assert "@functools.partial(jax.jit, static_argnames=('causal', 'acts_0', 'acts_1'))\n" in script
    assert "Left out" not in script


def test_draws_from_an_earlier_one_on(notebook, tmp_path):
    notebook(ATTEND)
    notebook("y = %flax_apply attend(x)\nys = %flax_apply --samples 3 attend(x)")
    notebook("ys = %flax_apply --keys-of 2 --samples 3 attend(x)\nys = %flax_apply --keys-of 1 --samples 1 attend(x)")
    script = assert_same(
        notebook, tmp_path, "%flax_key --seed 5\nys = %flax_apply --keys-of 0:2 --samples 2 attend(x * 2)"
    )
    digests = [run.digest for run in notebook.session.runs]
    assert digests[1] == digests[2]
    assert "replayed_root_key = jax.random.key(0)  # draws 2 to 4 again\n" in script


@pytest.mark.filterwarnings("ignore:Using .Module.sow:DeprecationWarning")
def test_what_an_nnx_run_hands_back(notebook, tmp_path):
    notebook("from flax import nnx\nx = x[0]")
    notebook("""\
%%flaxmodel net = Net()
class Block(nnx.Module):
  def __init__(self, rngs):
    self.linear = nnx.Linear(4, 4, rngs=rngs)
    self.norm = nnx.BatchNorm(4, rngs=rngs)
    self.dropout = nnx.Dropout(0.5, rngs=rngs)
  def __call__(self, x):
    h = self.linear(x)
    self.sow(nnx.Intermediate, 'hidden', h)
    return self.dropout(self.norm(h))
class Net(nnx.Module):
  def __init__(self, rngs):
    self.first, self.second = Block(rngs), Block(rngs)
  def __call__(self, x):
    return self.second(self.first(x))
""")
    notebook("y, updates = %flax_apply --train --mutable BatchStat net(x)")
    notebook("pair = %flax_apply --train --mutable Intermediate --mutable BatchStat net(x)")
    notebook("%flax_apply --eval --mutable Intermediate net(x);")
    notebook("y, sown = %flax_apply --train --keys-of 2 --mutable Intermediate net(x)")
    script = assert_same(notebook, tmp_path, "ys = %flax_apply --eval --samples 2 net(x)\ny = net(x)")
    assert "updates = {\n  'BatchStat': {\n    'first/norm/mean': net.first.norm.mean[...],\n" in script
    assert "sown = {'Intermediate': nnx.to_pure_dict(nnx.pop(net_copy, nnx.Intermediate))}\n" in script
    assert "  def one_sample(dropout_key):\n    model = nnx.clone(net)\n" in script


@pytest.mark.filterwarnings("ignore:Using .Module.sow:DeprecationWarning")
def test_what_layers_of_a_list_sow(notebook, tmp_path):
    notebook("from flax import nnx\nx = x[0]")
    notebook("""\
%%flaxmodel net = Net()
class Layer(nnx.Module):
  def __init__(self, rngs):
    self.linear = nnx.Linear(4, 4, rngs=rngs)
  def __call__(self, x):
    self.sow(nnx.Intermediate, 'before', x)
    return self.linear(x)
class Net(nnx.Module):
  def __init__(self, rngs):
    layers = [Layer(rngs), Layer(rngs)]
    self.layers = nnx.List(layers) if hasattr(nnx, 'List') else layers
  def __call__(self, x):
    for layer in self.layers:
      x = layer(x)
    return x
""")
    notebook("y, sown = %flax_apply --mutable Intermediate net(x)\nnames = sown['Intermediate']['layers'].keys()")
    assert list(notebook["names"]) == ["0", "1"]
    assert "Left out" not in assert_same(notebook, tmp_path)


def test_outputs_are_taken_apart_where_they_are_made(notebook, tmp_path):
    notebook("""\
%%flaxmodel
class Two(nn.Module):
  @nn.compact
  def __call__(self, x, train=True):
    h = nn.BatchNorm(use_running_average=not train)(nn.Dense(3)(x))
    return h, h.mean()

two = Two()
""")
    notebook("h, mean = %flax_apply two(x)\n(h, mean), updates = %flax_apply --mutable batch_stats two(x)")
    notebook("out, updates = %flax_apply --mutable batch_stats two(x)\nout, *rest = %flax_apply two(x)")
    script = assert_same(notebook, tmp_path, "out = %flax_apply --mutable batch_stats two(x)")
    assert "(h, mean), new_values = apply(variables, x)\n" in script
    assert "out, updates = apply(variables, x)\nvariables = {**variables, **updates}\n" in script
    assert "out = apply(variables, x)\nvariables = {**variables, **out[1]}\n" in script


def test_a_name_for_the_variables_that_is_read_after_they_changed_keeps_what_it_was(notebook, tmp_path):
    runs = ("variables = %flax_init normed(x)\nn = len(variables)", "y = %flax_apply --train normed(x)")
    script = assert_same(notebook, tmp_path, NORMED, *runs, "y = %flax_apply --variables variables normed(x)")
    assert "\nvariables = normed_variables = normed.init(params_key, x)\n" in script
