"""Sessions of kinds that an export once got wrong: each one's script prints the session's digests."""

from __future__ import annotations

import pytest
from exporting import NORMED, assert_same

pytestmark = pytest.mark.usefixtures("digests_taken")

NET = NORMED.replace("Normed", "Net").replace("normed", "net")
SESSIONS = {
    "commands in methods, nested functions and generators": [
        NET,
        """\
import contextlib, functools
class Trainer:
  '''Trains.'''
  def __init__(self, n): self.n = n
  def step(self, x):
    for i in range(self.n):
      with contextlib.suppress(ValueError):
        y = %flax_apply --train net(x * i)
    def inner(x):
      z = %flax_apply --eval net(x)
      return z
    return inner(x)
class Longer(Trainer):
  def step(self, x): return super().step(x) * 2
def twice(f):
  @functools.wraps(f)
  def both(*args): return f(*args), f(*args)
  return both
@twice
def each(xs):
  for x in xs:
    y = %flax_apply --train net(x)
    yield y""",
        "y = Longer(2).step(x)\nfor ys in each([x, x * 2]):\n  for y in ys: print(y.sum())",
    ],
    "a helper that changes and changes back": [
        "scale = 1.\ndef act(x): return x * scale",
        NET.replace("nn.Dense(3)(x)", "act(nn.Dense(3)(x))"),
        "y = %flax_apply net(x)",
        "scale = 2.\ny = %flax_apply net(x)",
        "scale = 1.\ny = %flax_apply net(x)",
        "def f(x):\n  y = %flax_apply net(x)\n  return y\nfor scale in (3., 4.): y = f(x)",
        "for scale in (5., 6.):\n  y = %flax_apply net(x)",
    ],
    "a model of another structure under the name": [
        "d = nn.Dropout(.5, deterministic=False)\nnet = nn.Sequential([nn.Dense(3), d, d])\n%flaxmodel net",
        "y = %flax_apply --eval net(x)\ny = %flax_apply --train net(x)",
        "net = nn.Sequential([nn.Dense(3), nn.relu, nn.Dense(2), nn.Dropout(.5, deterministic=False)])\n%flaxmodel net",
        "y = %flax_apply --eval net(x)\ny = %flax_apply --train net(x)",
    ],
    "switches without a value, and an init by itself": [
        NET.replace("train=False)", "train)"),
        "v = %flax_init net(x)",
        "y = %flax_apply --train net(x)\ny = %flax_apply --eval net(x)",
    ],
    "an NNX module inside a linen one": [
        "from flax import nnx\nx = x[0]",
        """\
%%flaxmodel
class Inner(nnx.Module):
  def __init__(self, n, rngs):
    self.linear = nnx.Linear(n, 3, rngs=rngs)
    self.dropout = nnx.Dropout(0.5, rngs=rngs)
    self.norm = nnx.BatchNorm(3, rngs=rngs)
  def __call__(self, x): return self.norm(self.dropout(self.linear(x)))
class Outer(nn.Module):
  @nn.compact
  def __call__(self, x):
    return nn.Dropout(0.2, deterministic=False)(nnx.bridge.to_linen(Inner, 4)(nn.Dense(4)(x)))
outer = Outer()
""",
        "v = %flax_init outer(x)\ny = %flax_apply outer(x)",
        "%flax_key --seed 3 --fresh\nfor i in range(2):\n  y = %flax_apply outer(x)",
    ],
    "an NNX module with a config and a linen one inside": [
        "from flax import nnx\nimport dataclasses\nx = x[0]",
        """\
%%flaxmodel net = Net(3)
@dataclasses.dataclass(frozen=True)
class Config:
  training: bool = False
class Base(nnx.Module):
  def __init__(self, n, *, rngs):
    self.linear = nnx.Linear(4, n, rngs=rngs)
class Net(Base):
  def __init__(self, n, *, rngs):
    super().__init__(n, rngs=rngs)
    self.config, self.is_training = Config(), False
    self.dropout = nnx.Dropout(0.5, rngs=rngs)
  def __call__(self, x):
    return self.dropout(self.linear(x)) * (2 if self.config.training else 1) * (3 if self.is_training else 1)
held = nnx.bridge.ToNNX(nn.Dropout(0.5, deterministic=False), rngs=nnx.Rngs(params=0, dropout=1)).lazy_init(x)
""",
        "for i in range(2):\n  y = %flax_apply --train net(x * i)",
        "y = %flax_apply --eval net(x)\ny = %flax_apply net(x)\nz = net(x)\nys = %flax_apply --train --samples 2 net(x)",
        "y = %flax_apply --train --eager net(x)\ny = %flax_apply --train --keys-of last net(x)",
        "%flax_init net(x);\nnet.eval()\ny = %flax_apply net(x)\ny = %flax_apply held(x)",
    ],
    "switches that lifted transforms take by their place, and samples of statistics that are not kept": [
        """\
%%flaxmodel
class Net(nn.Module):
  @nn.compact
  def __call__(self, x, train=False):
    x = nn.BatchNorm(use_running_average=not train)(x)
    return nn.Dropout(0.5, deterministic=not train)(nn.Dense(3)(x))
rngs = {'params': True, 'dropout': True}
again = nn.remat(Net, static_argnums=(2,))()
several = nn.vmap(Net, in_axes=(0, None), variable_axes={'params': 0, 'batch_stats': 0}, split_rngs=rngs)()
""",
        "y = %flax_apply --train again(x)\ny = %flax_apply again(x)",
        "%flax_init several(x)\nz = %flax_apply --train several(x)",
        "ys = %flax_apply --train --samples 3 again(x)\ny = %flax_apply --eval --eager again(x)",
        "ys, updates = %flax_apply --train --samples 2 --mutable batch_stats again(x)",
    ],
    "one name for several models in a loop": [
        "for n in (2, 3):\n  m = nn.Dense(n)\n  %flaxmodel m\n  y = %flax_apply m(x)\n  y = %flax_apply m(x)",
    ],
}


@pytest.mark.parametrize("kind", SESSIONS)
def test_a_session_of_this_kind_is_its_export(notebook, tmp_path, kind):
    assert "Left out" not in assert_same(notebook, tmp_path, *SESSIONS[kind])
    assert notebook.session.export().unexported == ()
