"""`%flax_summary` as a person writes it."""

from __future__ import annotations

SUMMARY = """\
my_model · MyModel(num_neurons=3, training=False) ·
    as written (training=False) · my_model(x)
  module                                    out             params  bytes  FLOPs
  my_model  MyModel                         float32[3,4,3]      15   60 B    324
    in float32[3,4,4]
    Dense_0  Dense                          float32[3,4,3]      15   60 B    324
      in float32[3,4,4] · params: bias float32[3], kernel float32[4,3]
    Dropout_0  Dropout                      float32[3,4,3]                     0
      in float32[3,4,3]
  total  params 15, 60 B
  FLOPs  forward 324"""
NOTE = "\n  note   not initialised: variables are those that an init would make"


def test_a_call_is_summarised_once_and_leaves_the_session_as_it_was(sharp_bits):
    assert sharp_bits("%flax_summary my_model(x)") == SUMMARY + NOTE
    assert sharp_bits.session.draws == 0
    assert sharp_bits.session.runs == []
    assert sharp_bits.session.models["my_model"].variables is None
    sharp_bits("y = %flax_apply my_model(x)")
    assert sharp_bits("%flax_summary my_model(x)") == SUMMARY


def test_the_value_is_the_summary(sharp_bits):
    assert sharp_bits("s = %flax_summary my_model(x)") == SUMMARY + NOTE
    assert sharp_bits("s2 = %flax_summary -q my_model(x)") == ""
    assert sharp_bits["s"] == sharp_bits["s2"]
    assert (sharp_bits["s"].flops, sharp_bits["s"].parameters) == (324, 15)
    out = sharp_bits("%flax_summary -q my_model(x)")
    assert out.endswith("<Summary of my_model(x): 3 modules, 15 parameters, 324 FLOPs>")
    assert sharp_bits("%flax_summary -q my_model(x);") == ""


def test_depth(sharp_bits):
    assert "2 rows inside" in sharp_bits("%flax_summary --depth 0 my_model(x)")


def test_a_cell_of_statements(sharp_bits):
    assert sharp_bits("%%flax_summary -q\nx2 = x[:1]\ns = my_model(x2)") == ""
    assert sharp_bits["s"].call == "my_model(x2)"
    assert "my_model(x2)" in sharp_bits("%%flax_summary\nmy_model(x2)")


def test_in_a_loop_each_is_shown(sharp_bits):
    out = sharp_bits("for n in (1, 2):\n  %flax_summary my_model(x[:n])")
    assert out.count("total  params 15, 60 B") == 2


def test_the_tree_shows_the_variables_as_they_are(sharp_bits):
    assert sharp_bits.fails("%flax_summary --tree my_model(x)") == (
        "FlaxMagicsError: `my_model` has no variables yet that a tree could show.\n  form: %flax_init my_model(…)"
    )
    sharp_bits("%flax_init my_model(x);")
    out = sharp_bits("%flax_summary --tree my_model(x)")
    assert out.startswith(SUMMARY)
    assert "'kernel': # jax.Array float32(4, 3)" in out


def test_an_nnx_module(notebook):
    notebook(
        "from flax import nnx\nclass Net(nnx.Module):\n  def __init__(self, *, rngs):\n"
        "    self.out = nnx.Linear(4, 3, rngs=rngs)\n  def __call__(self, x):\n    return self.out(x)"
    )
    notebook("%flaxmodel net = Net()")
    out = notebook("%flax_summary net(x)")
    assert "    out  Linear                              float32[3,4,3]     15   60 B    324" in out
    assert "Param(" in notebook("%flax_summary --tree net")
    assert notebook.session.draws == 1  # the one that built it


def test_a_model_that_looks_at_values_has_its_line_shown(notebook):
    notebook(
        "%%flaxmodel net = Net()\nclass Net(nn.Module):\n  @nn.compact\n  def __call__(self, x):\n"
        "    if x.sum() > 0:\n      x = -x\n    return nn.Dense(3)(x)"
    )
    out = notebook.fails("%flax_summary net(x)")
    assert "if x.sum() > 0:" in out
    assert out.splitlines()[-1] == "the model looks at a value while it is traced"
