"""`%flax_export` of a session that came out of a file: what plain lines can read of it, and what is said of the rest."""

from __future__ import annotations

import pytest
from exporting import NORMED, digests_of, exported, printed

import flax_magics

pytestmark = pytest.mark.usefixtures("digests_taken")

HELD = """\
%%flaxmodel
class Held(nnx.Module):
  def __init__(self, rngs):
    self.linear = nnx.Linear(4, 3, rngs=rngs)
  def __call__(self, x):
    return self.linear(x)

held = Held(nnx.Rngs(0))
"""


@pytest.fixture
def saved(notebook, tmp_path, monkeypatch):
    """Saves a session with a model made of a cell, and runs of it, to `s.safetensors`."""
    monkeypatch.chdir(tmp_path)

    def save(cell: str, name: str, *, runs: int, opens: bool = False) -> None:
        names = dict(notebook.shell.user_ns)
        exec(cell.removeprefix("%%flaxmodel\n"), names)
        session = flax_magics.Session()
        session.register(name, names[name])
        if opens:
            session.init(name, notebook["x"])
        for _ in range(runs):
            session.apply(name, notebook["x"], mode="train")
        session.save("s.safetensors")

    return save


def test_a_linen_models_variables_are_read_from_the_file(notebook, saved, tmp_path):
    saved(NORMED, "normed", runs=2)
    notebook("%flax_load s.safetensors")
    notebook(NORMED)
    notebook(
        "y = %flax_apply --train normed(x)\nz = %flax_apply --train --keys-of 1 normed(x)\nw = %flax_apply normed(x)"
    )
    script = exported(notebook)
    assert (
        "tensors = traverse_util.unflatten_dict(\n"
        '  safetensors.flax.load_file("s.safetensors"), sep="/"\n'
        ")\n"
        'variables = tensors["normed"]\n'
        "root_key = jax.random.key(0)\n"
        "# The session in the file had made 2 draws.\n"
        "for _ in range(2):\n"
        "  root_key = jax.random.split(root_key, 3)[0]\n"
    ) in script.replace("'", '"')
    assert "Left out" not in script
    assert digests_of(printed(script, tmp_path)) == [run.digest for run in notebook.session.runs[2:]]


@pytest.mark.parametrize("command", ["y = %flax_apply --train normed(x)", "gradients = %flax_grad loss(normed, x)"])
def test_a_draw_that_an_init_opened_in_the_file_goes_on(notebook, saved, tmp_path, command):
    saved(NORMED, "normed", runs=0, opens=True)
    notebook("%flax_load s.safetensors")
    notebook(NORMED)
    notebook("def loss(net, x, train):\n  return net(x, train=train).mean()")
    notebook(command)
    notebook("z = %flax_apply --train normed(x)")
    script, runs = exported(notebook), notebook.session.runs[1:]
    assert [run.draw for run in runs] == [1, 2]
    assert "# The session in the file had made a draw; the next run takes the other keys of the last.\n" in script
    assert digests_of(printed(script, tmp_path)) == [run.digest for run in runs]


def test_a_file_that_is_another_now_is_not_read(notebook, saved, tmp_path):
    saved(NORMED, "normed", runs=1)
    notebook("%flax_load s.safetensors")
    notebook(NORMED)
    notebook("y = %flax_apply --train normed(x)\n%flax_save s.safetensors")
    notebook("print(y.mean())\nv = %flax_init normed(x)\nz = %flax_apply --train normed(x)")
    script = exported(notebook)
    why = "which is not the file any more that it was"
    said = f"# Left out: the variables of `normed` came from `s.safetensors`, {why}.\n"
    assert f"{said}root_key = jax.random.key(0)\n# The session in the file had made a draw.\n" in script
    assert f"{said}# y = %flax_apply --train normed(x)\n" in script
    assert "# print(y.mean())\n" in script
    assert digests_of(printed(script, tmp_path)) == [run.digest for run in notebook.session.runs[-2:]]


def test_what_ran_before_is_in_no_history_any_more_and_an_nnx_module_gets_what_the_file_has(notebook, saved, tmp_path):
    notebook("from flax import nnx")
    saved(HELD, "held", runs=1)
    notebook(HELD)
    notebook("y = %flax_apply held(x)")
    notebook("%flax_load s.safetensors")
    notebook("z = %flax_apply held(x)")
    script = exported(notebook)
    gone = "# Left out: the history of its run is gone: %flax_load brought another.\n# y = %flax_apply held(x)\n"
    assert gone in script
    assert (
        "for kind in (nnx.Param,):\n"
        "  loaded = nnx.state(held, kind)\n"
        "  nnx.replace_by_pure_dict(loaded, tensors['held'][kind.__name__])\n"
        "  nnx.update(held, loaded)\n"
    ) in script.replace('"', "'")
    assert digests_of(printed(script, tmp_path)) == [notebook.session.runs[-1].digest]


def test_types_of_ones_own_have_no_lines(notebook, saved):
    notebook("from flax import nnx\nclass Mine(nnx.Variable):\n  pass")
    own = HELD.replace("self.linear(x)", "self.linear(x) + self.mine[...]")
    own = own.replace("def __call__", "  self.mine = Mine(jnp.ones(3))\n  def __call__")
    saved(own, "held", runs=1)
    notebook("%flax_load s.safetensors")
    notebook(own)
    notebook("z = %flax_apply held(x)")
    why = "and have leaves or names that plain lines do not read"
    assert f"# Left out: the variables of `held` came from `s.safetensors`, {why}.\n" in exported(notebook)


def test_variables_that_were_dropped_since_tell_nothing_of_the_file(notebook, saved, tmp_path):
    saved(NORMED, "normed", runs=1)
    notebook("%flax_load s.safetensors")
    notebook(NORMED)
    notebook("y = %flax_apply --train normed(x)\n%flax_key --seed 1 --fresh")
    script = exported(notebook)
    why = "and were dropped since: nothing tells whether plain lines can read them"
    said = f"# Left out: the variables of `normed` came from `s.safetensors`, {why}.\n"
    assert script.count(said) == 2
    notebook("z = %flax_apply --train normed(x)")
    digests = digests_of(printed(exported(notebook), tmp_path))
    assert digests == [run.digest for run in notebook.session.runs[1:]]
