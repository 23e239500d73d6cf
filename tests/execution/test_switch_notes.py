"""A layer in the wrong mode: said to be fixed only where a literal is, and mended by the model's own switch."""

from __future__ import annotations

import pytest

HEAD = "%%flaxmodel net = Net()\n"


def model(fields: str = "", call: str = "train=False", body: str = "", before: str = "") -> str:
    """A cell of a model whose layer under test stands alone in its last line."""
    lines = ["class Net(nn.Module):", *(f"  {line}" for line in fields.splitlines()), "  @nn.compact"]
    lines += [f"  def __call__(self, x{', ' if call else ''}{call}):", *(f"    {line}" for line in body.splitlines())]
    return HEAD + before + "\n".join(lines)


DROP = "return nn.Dropout(0.5, deterministic={})(x)"
NORM = "return nn.BatchNorm(use_running_average={})(x)"
OFF = "Dropout_0 is off although --train was asked: "
NO_SWITCH = "def __call__(self, …, train):\ndeterministic=not train"
CONFIG = "import dataclasses\n@dataclasses.dataclass(frozen=True)\nclass Config:\n  deterministic: bool = True\n"
BACKBONE = """class Backbone(nn.Module):
  @nn.compact
  def __call__(self, x, {}):
    return nn.BatchNorm(use_running_average={})(x)
"""


AVERAGES = "is using running averages although --train was asked: "
NOT_TRAIN = "deterministic=not train"


@pytest.mark.parametrize(
    ("cell", "text", "edit"),
    [
        (model(body=DROP.format("True")), f"{OFF}deterministic=True is fixed in Net (line 5)", NOT_TRAIN),
        (model("training: bool = False", "", DROP.format("True")),
         f"{OFF}deterministic=True is fixed in Net (line 6)", "deterministic=not self.training"),
        (model("config: Config = Config()", "", DROP.format("True"), CONFIG),
         f"{OFF}deterministic=True is fixed in Net (line 10)", "deterministic=self.config.deterministic"),
        (model("", "deterministic=True", NORM.format("True")),
         f"BatchNorm_0 {AVERAGES}use_running_average=True is fixed in Net (line 5)", "use_running_average=deterministic"),
        (model("", "mode='eval'", DROP.format("mode == 'eval'")),
         f"{OFF}deterministic was True, from `mode == 'eval'` in Net (line 5)", NO_SWITCH),
        (model("", "", f"off = True\n{DROP.format('off')}"),
         f"{OFF}deterministic was True, from `off` in Net (line 6)", NO_SWITCH),
        (model(body="drop = nn.Dropout(0.5)\nx = nn.Dense(2)(x)\nreturn drop(x, deterministic=True)"),
         f"{OFF}deterministic=True is fixed in Net (line 7)", NOT_TRAIN),
        (model(body="drop = nn.Dropout(0.5)\nreturn drop(jnp.add(x, 1), True)"),
         f"{OFF}deterministic was True in Net", NOT_TRAIN),
        (model(body="drop = nn.Dropout(0.5)\nreturn drop(x, True)"),
         f"{OFF}deterministic=True is fixed in Net (line 6)", NOT_TRAIN),
        (model(body="return nn.Dropout(0.5, **{'deterministic': True})(jnp.add(x, 1))"),
         f"{OFF}deterministic was True in Net", NOT_TRAIN),
        (model(body="drop = partial(nn.Dropout, deterministic=True)\nreturn drop(0.5)(x)",
               before="from functools import partial\n"),
         f"{OFF}deterministic=True is fixed in Net (line 6)", NOT_TRAIN),
        (model(body="return Backbone()(x, train=False)", before=BACKBONE.format("train", "not train")),
         f"Backbone_0/BatchNorm_0 {AVERAGES}train=False is fixed in Net (line 9)", "Backbone()(x, train=train)"),
        (model(body=f"x = nn.BatchNorm(use_running_average=True)(x)\n{DROP.format('not train')}"),
         f"BatchNorm_0 {AVERAGES}use_running_average=True is fixed in Net (line 5)", "use_running_average=not train"),
        (model(body="x = nn.Dropout(0.1, deterministic=True)(x)\nreturn nn.Dropout(0.5, deterministic=train)(x)"),
         "Dropout_0 and 1 more are off although --train was asked: deterministic=True is fixed in Net (line 5)", NOT_TRAIN),
    ],
)  # fmt: skip
def test_a_layer_that_does_not_follow_the_switch(notebook, cell, text, edit):
    notebook(cell)
    notebook("%flax_apply --train -q -o run net(x);")
    assert [(note.text, note.edit) for note in notebook["run"].notes] == [(text, edit)]


@pytest.mark.parametrize(
    "backbone",
    [
        BACKBONE.format("train=False", "not train"),
        BACKBONE.format("y=0", "True"),
        BACKBONE.format("train=False, frozen=True", "frozen or not train"),
    ],
    ids=["told not to train", "without a switch", "told to stay frozen"],
)
def test_a_backbone_that_is_frozen_on_purpose_is_no_sharp_bit(notebook, backbone):
    notebook(model("", "train=False", f"x = Backbone()(x)\n{DROP.format('not train')}", backbone))
    notebook("%flax_apply --train -q -o run net(x);")
    assert notebook["run"].notes == ()


def test_a_layer_that_is_on_in_evaluation(notebook):
    notebook(model(body=DROP.format("False")))
    notebook("%flax_apply --eval -q -o run net(x);")
    text = "Dropout_0 is on although --eval was asked: deterministic=False is fixed in Net (line 5)"
    assert [(note.text, note.edit) for note in notebook["run"].notes] == [(text, NOT_TRAIN)]


NNX = """%%flaxmodel net = Net()
from flax import nnx
class Net(nnx.Module):
  def __init__(self, rngs):
    self.drop = nnx.Dropout(0.5, rngs=rngs)
    self.other = nnx.Dropout(0.5, rngs=rngs)
    {}
  def __call__(self, x):
    return self.other(self.drop(x, deterministic={}), deterministic={})
"""


@pytest.mark.parametrize(
    ("attribute", "given", "why", "edit"),
    [
        ("self.training = False", "True", "deterministic=True is fixed in Net (line 9)", "deterministic=not self.training"),
        ("self.off = True", "self.off", "deterministic was True, from `self.off` in Net (line 9)", NO_SWITCH),
    ],
)  # fmt: skip
def test_in_nnx_a_call_may_overrule_the_attribute(notebook, attribute, given, why, edit):
    notebook(NNX.format(attribute, given, given))
    notebook("%flax_apply --train -q -o run net(x);")
    text = f"drop and 1 more are off although --train was asked: {why}"
    assert [(note.text, note.edit) for note in notebook["run"].notes] == [(text, edit)]


INNER = """class Block(nn.Module):
  {}
  @nn.compact
  def __call__(self, x{}):
    return nn.Dropout(0.5, deterministic=not {})(x)
"""
ARGUMENT = INNER.format("rate: float = 0.5", ", train=False", "train")
FIELD = INNER.format("training: bool = False", "", "self.training")
BY_ARGUMENT, BY_FIELD = (
    f"Block_0/{OFF}Net (line 10) calls `{{}}` without `train`",
    f"Block_0/{OFF}Net (line 10) calls `{{}}` without `training`",
)
OWN_METHOD = """%%flaxmodel net = Net()
class Net(nn.Module):
  @nn.compact
  def __call__(self, x, train=False):
    return self.encode(x)
  @nn.compact
  def encode(self, x, train=False):
    return nn.Dropout(0.5, deterministic=not train)(x)
"""
TWICE = """%%flaxmodel net = Net()
class Block(nn.Module):
  @nn.compact
  def __call__(self, x, train=False):
    return nn.Dropout(0.5, deterministic=not train)(x)
class Encoder(nn.Module):
  @nn.compact
  def __call__(self, x, train=False):
    return Block()(x, train)
class Net(nn.Module):
  training: bool = False
  @nn.compact
  def __call__(self, x):
    def encoded(x):
      return Encoder()(
        x,
      )
    return encoded(x)
"""
NNX_INNER = """%%flaxmodel net = Net()
from flax import nnx
class Block(nnx.Module):
  def __init__(self, rngs):
    self.drop = nnx.Dropout(0.5, rngs=rngs)
  def __call__(self, x, train=False):
    return self.drop(x, deterministic=not train)
class Net(nnx.Module):
  def __init__(self, rngs):
    self.block = Block(rngs)
  def __call__(self, x, train=False):
    return self.block(x)
"""


@pytest.mark.parametrize(
    ("cell", "text", "edit"),
    [
        (model(body="return Block()(x)", before=ARGUMENT), BY_ARGUMENT.format("Block()(x)"), "Block()(x, train=train)"),
        (model(body="return Block()(x, mode == 2)", call="mode=1", before=ARGUMENT),
         f"Block_0/{OFF}train was False, from `mode == 2` in Net (line 10)",
         "def __call__(self, …, train):\n  … Block()(x, train=train)"),
        (model("training: bool = False", "", "return Block()(x, train=False)", ARGUMENT),
         f"Block_0/{OFF}train=False is fixed in Net (line 11)", "Block()(x, train=self.training)"),
        (model(body="return Block(name='Block_0')(x)", before=FIELD), BY_FIELD.format("Block(name='Block_0')"),
         "Block(name='Block_0', training=train)"),
        (model(body="return Block(False)(x)", before=FIELD), f"Block_0/{OFF}training=False is fixed in Net (line 10)",
         "Block(training=train)"),
        (OWN_METHOD, f"{OFF}Net (line 5) calls `self.encode(x)` without `train`", "self.encode(x, train=train)"),
        (TWICE, f"Encoder_0/Block_0/{OFF}`encoded` calls `Encoder()(x)` without `train`",
         "def encoded(x, train):\n  … Encoder()(x, train=train)"),
        (NNX_INNER, f"block/{OFF.replace('Dropout_0', 'drop')}Net (line 12) calls `self.block(x)` without `train`",
         "self.block(x, train=train)"),
        (model(body="return nn.remat(Block)()(x)", before=ARGUMENT),
         BY_ARGUMENT.replace("Block_0", "CheckpointBlock_0").format("nn.remat(Block)()(x)"), None),
        # Who calls it is Flax's own code.
        (model(body="return nn.Sequential([Block()])(x)", before=ARGUMENT),
         f"Block_0/{OFF}deterministic was True, from `not train` in Block (line 6)", None),
    ],
)  # fmt: skip
def test_a_call_that_keeps_the_switch_from_a_layer_is_named(notebook, cell, text, edit):
    notebook(cell)
    notebook("%flax_apply --train -q -o run net(x);")
    assert [(note.text, note.edit) for note in notebook["run"].notes] == [(text, edit)]


UNSET = ["`deterministic` has no value, and no switch of the model's sets it",
         "in your model: return nn.Dropout(0.5)(x, deterministic=not train)"]  # fmt: skip


@pytest.mark.parametrize(
    ("cell", "hint"),
    [
        ("%flax_apply net(x)", UNSET),
        ("%flax_apply --train net(x)", UNSET),
        *((f"%flax_apply {net}(x)", ["it is the model's own switch, and has no value as written",
                                     f"write: %flax_apply --train {net}(x)", f"       %flax_apply --eval {net}(x)"])
          for net in ("drop", "merged")),
    ],
)  # fmt: skip
def test_a_switch_without_a_value_is_set_by_an_option_only_where_one_sets_it(notebook, cell, hint):
    notebook(model(body="return nn.Dropout(0.5)(x)"))
    merged = "deterministic = nn.merge_param('deterministic', self.deterministic, deterministic)\n"
    notebook(
        model("deterministic: bool | None = None", "deterministic=None", merged + DROP.format("deterministic"))
        .replace("net = Net()", "merged = Merged()").replace("class Net", "class Merged")
    )  # fmt: skip
    notebook("%flaxmodel drop = nn.Dropout(0.5)")
    assert notebook.fails(cell).splitlines()[-len(hint) :] == hint
    notebook("%flax_apply --train -q drop(x);\n%flax_apply --eval -q merged(x);")
