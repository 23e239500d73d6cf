"""Did you mean: the nearest name, of the likeliest kind, for models, methods, options, fields, arguments and streams."""

from __future__ import annotations

import pytest

from flax_magics.errors import FlaxMagicsError, did_you_mean, nearest

TWINS = """\
class CNN(nn.Module):
  features: int = 2
  @nn.compact
  def __call__(self, x, mask=None):
    return nn.Dense(self.features)(x)
  def encode(self, x):
    return x
  def Encode(self, x):
    return x
cnn = CNN()
"""


@pytest.mark.parametrize(
    ("name", "known", "expected"),
    [
        ("cnm", ["CNN", "cnn"], ["cnn", "CNN"]),
        ("CNM", ["CNN", "cnn"], ["CNN", "cnn"]),
        ("cnm", ["cnn", "CNN"], ["cnn", "CNN"]),
        ("Dropout", ["dropout", "params"], ["dropout"]),
        ("traning", ["train", "training", "Training"], ["training", "Training", "train"]),
        ("x", ["yy", "params"], []),
    ],
)
def test_case_decides_between_names_that_are_equally_near(name, known, expected):
    assert nearest(name, known) == expected


def test_a_group_of_likelier_names_comes_before_nearer_ones():
    assert did_you_mean("CNN2", ["cnn"], ["CNN1"]) == "did you mean cnn?"
    assert did_you_mean("CNN2", ["dense"], ["CNN1"]) == "did you mean CNN1?"
    assert did_you_mean("CNN2", ["dense"], []) is None


@pytest.mark.parametrize(
    ("cell", "said"),
    [
        ("%flax_apply CN(x)", "did you mean cnn?"),
        ("%flax_apply cnn.encod(x)", "did you mean encode or Encode?"),
        ("%flax_apply cnn(x, msk=None)", "did you mean mask?"),
        ("%flax_apply --key msk cnn(x)", "did you mean mask?"),
        ("%flax_apply cnn(xx)", "did you mean x?"),
        ("%flax_history cn", "did you mean cnn?"),
        ("%flaxmodel cnm", "did you mean cnn?"),
        ("%flaxmodel net = CNN(feature=3)", "did you mean features?\n  it takes: CNN(features)"),
        ("%flaxmodel net = nn.Dense(3, kernel_initt=None)", "did you mean kernel_init?"),
        ("%%flaxmodel cnm\ncnn = CNN()", "did you mean cnn?"),
    ],
)
def test_every_kind_of_name_has_its_nearest(notebook, cell, said):
    notebook(f"%%flaxmodel\n{TWINS}")
    assert said in notebook.fails(cell)


def test_what_is_near_to_nothing_is_not_advised(notebook):
    notebook(f"%%flaxmodel\n{TWINS}")
    assert notebook.fails("%flax_init cnn(x) --train") == (
        "FlaxMagicsError: %flax_init has no option --train.\n  options: --keys-of  -o/--out  -q/--quiet  -h/--help"
    )
    assert notebook.fails("%flax_apply --train --eval=1 cnn(x)") == "FlaxMagicsError: --eval takes no value."


def test_a_model_that_is_not_registered_is_thought_of(notebook):
    notebook(TWINS)
    assert notebook.fails("%flax_apply CN(x)") == (
        "FlaxMagicsError: no model is called `CN`; no model is registered yet.\n  did you mean cnn?"
    )
    notebook("%flaxmodel cnn")
    notebook("%%flaxmodel noisy = Noisy()\nclass Noisy(nn.Module):\n  def __call__(self, x):\n"
             "    return x + jax.random.uniform(self.make_rng('Dropot'), x.shape)")  # fmt: skip
    assert "the stream `Dropot` is asked for by (the model): is `dropout` meant?" in " ".join(
        notebook("%flax_apply noisy(x);").split()
    )


def test_a_message_breaks_between_words_and_its_advice_stays_whole(monkeypatch):
    monkeypatch.setattr(FlaxMagicsError, "before_shown", lambda error: 30)
    error = FlaxMagicsError(
        "`net` is a model without a name of its own.", hint="it takes: net(x, mask, train)", write=f"net({'x, ' * 9}x)"
    )
    assert error._render_traceback_() == [
        "FlaxMagicsError: `net` is a\n  model without a name of its\n  own.\n  it takes: net(x, mask,\n    train)\n"
        f"  write: net({'x, ' * 9}x)"
    ]
    pointed = FlaxMagicsError("name 'xyy' is not defined.", hint=f"net({'x, ' * 9}xyy)\n{' ' * 31}^")
    assert pointed._render_traceback_()[0].endswith(f"\n  net({'x, ' * 9}xyy)\n  {' ' * 31}^")
