"""`%flax_export` of NNX models: digests of a fresh process are those of the session."""

from __future__ import annotations

import pytest
from exporting import NNX_NET as NET
from exporting import assert_same


@pytest.fixture(autouse=True)
def nnx(notebook, digests_taken):
    notebook("from flax import nnx\nx = x[0]")


def test_a_module_that_the_session_builds(notebook, tmp_path):
    modes = "y = %flax_apply --train net(x, scale=2.0)\nz = %flax_apply --eval net(x)"
    methods = "y = %flax_apply net(x)\nh = %flax_apply net.embed(x)\ny = net(x)"
    script = assert_same(notebook, tmp_path, NET, "y = %flax_apply net(x)", modes, methods)
    assert "net = Net(8, 3, rngs=nnx.Rngs(params=params_key, dropout=dropout_key))\n" in script
    assert 'nnx.reseed(net, policy="match_shape", dropout=dropout_key)\n' in script


def test_a_module_of_the_users_own_in_a_loop(notebook, tmp_path):
    notebook(NET.replace("%%flaxmodel net = Net(8, 3)\n", "%%flaxmodel\n") + "\nnet = Net(8, 3, rngs=nnx.Rngs(7))")
    notebook("for i in range(3):\n  y = %flax_apply --train net(x + i)")
    after = "y = %flax_apply --eval net(x)\ny = %flax_apply --eager net(x)"
    assert_same(notebook, tmp_path, after, "state = nnx.state(net, nnx.BatchStat)")


def test_a_build_before_a_loop_is_of_the_loops_first_draw(notebook, tmp_path):
    step = "def step(x):\n  y = %flax_apply --train net(x)\n  return y"
    assert_same(notebook, tmp_path, NET, step, "for i in range(2):\n  step(x * i)")


def test_cells_run_again_edits_and_new_starts(notebook, tmp_path):
    train = "y = %flax_apply --train net(x)"
    cells = [NET, train, NET, train]
    cells += [NET.replace("0.5", "0.1"), train, "%flax_init net(x);", train]  # the variables are kept
    cells += [NET.replace("Net(8, 3)", "Net(6, 3)"), train]  # and here they are not
    assert_same(notebook, tmp_path, *cells, "%flax_key --seed 0 --fresh", train)


def test_rngs_in_the_call_streams_by_name_and_samples(notebook, tmp_path):
    notebook("""\
%%flaxmodel
class Taking(nnx.Module):
  def __init__(self, rngs):
    self.linear = nnx.Linear(4, 4, rngs=rngs)
    self.dropout = nnx.Dropout(0.5)
  def __call__(self, x, rngs):
    return self.dropout(self.linear(x), rngs=rngs)
class Noisy(nnx.Module):
  def __init__(self, rngs):
    self.rngs = rngs
  def __call__(self, x):
    return x + self.rngs.noise.normal(x.shape)

taking, noisy = Taking(nnx.Rngs(0)), Noisy(nnx.Rngs(noise=1))
""")
    runs = "y = %flax_apply taking(x)\ny = %flax_apply noisy(x)"
    assert_same(
        notebook, tmp_path, runs, "ys = %flax_apply --samples 3 noisy(x)\ny = %flax_apply --keys-of 1 taking(x)"
    )
