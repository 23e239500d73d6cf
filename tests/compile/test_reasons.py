"""Why a program is new: one sentence, of what differs from the most similar program, in exact words."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest
from by_hand import MyModel, notebook_x
from flax import nnx, struct
from processes import printed_by

from flax_magics import Session
from flax_magics.compile import cache


class Namespace(dict):
    """A notebook's namespace, in which cells are run."""

    def __init__(self) -> None:
        super().__init__(nn=nn, nnx=nnx, jnp=jnp, jax=jax, __name__="__main__")

    def cell(self, source: str) -> Namespace:
        exec(compile(source, "<cell>", "exec"), self)
        return self


X = jnp.ones((2, 4))


def first_run(session: Session, net: Any) -> None:
    """Registers `net` in the session and runs it once."""
    session.register("net", net)
    session.apply("net", X)


def why(run: Any) -> str:
    assert run.program == "compiled"
    return run.reason


# -- an argument


class Takes(nn.Module):
    @nn.compact
    def __call__(self, x, scale=1.0, n=1, mask=None, how="relu"):
        x = nn.Dense(3)(x) if x.ndim == 2 else x
        for _ in range(n):
            x = getattr(nn, how)(x)
        return x * scale if mask is None else x * scale * mask


@pytest.fixture
def takes(session):
    session.register("net", Takes())
    return session


def test_it_is_held_against_the_most_similar_program_not_the_last(takes):
    takes.apply("net", X, 2.0)
    takes.apply("net", jnp.ones((7, 4), jnp.bfloat16), jnp.float32(2.0))
    assert why(takes.apply("net", jnp.ones((3, 4)), 2.0)) == "x: float32[2,4] → float32[3,4]"


def test_of_equally_similar_ones_it_is_the_one_that_ran_last(takes):
    for rows in (2, 3, 4):
        takes.apply("net", jnp.ones((rows, 4)))
    assert takes.apply("net", jnp.ones((3, 4))).program == "reused"
    assert why(takes.apply("net", jnp.ones((9, 4)))) == "x: float32[3,4] → float32[9,4]"


def test_two_changes_are_named_and_more_are_counted(takes):
    takes.apply("net", X, jnp.ones(3))
    run = takes.apply("net", jnp.ones((5, 4)), jnp.ones((1, 3)))
    assert why(run) == "x: float32[2,4] → float32[5,4]; scale: float32[3] → float32[1,3]"
    run = takes.apply("net", jnp.ones((6, 4), jnp.bfloat16), jnp.ones((6, 3)), how="tanh", mask=jnp.ones(3))
    assert why(run) == "x: float32[5,4] → bfloat16[6,4]; scale: float32[1,3] → float32[6,3]; and 2 more"


def test_a_weak_type(takes):
    half = X.astype(jnp.bfloat16)
    takes.apply("net", half[0], jnp.float32(2.0))
    run = takes.apply("net", half[0], jnp.asarray(2.0))
    assert why(run) == "scale: float32[], weakly typed now"
    takes.apply("net", half[0], jnp.asarray(2.0), how="tanh")
    assert (
        why(takes.apply("net", half[0], jnp.float32(2.0), how="tanh")) == "scale: float32[], not weakly typed any more"
    )


def test_a_python_number_in_place_of_an_array(takes):
    takes.apply("net", X, jnp.float32(2.0))
    assert why(takes.apply("net", X, 2.0)) == "scale: float32[] → a Python float"
    assert takes.apply("net", X, 3.0).program == "reused"
    assert why(takes.apply("net", X, 3)) == "scale: a Python float → a Python int"


def test_a_static_value(takes):
    takes.apply("net", X, n=3)
    assert why(takes.apply("net", X, n=4)) == "n: 3 → 4"
    assert why(takes.apply("net", X, n=4, how="tanh")) == "how: not given before"
    assert why(takes.apply("net", X, n=4, how="gelu")) == "how: 'tanh' → 'gelu'"


def test_an_argument_more_or_less(takes):
    takes.apply("net", X, how="tanh")
    assert why(takes.apply("net", X, how="tanh", mask=jnp.ones(3))) == "mask: not given before"
    assert why(takes.apply("net", X)) == "how: given before"


class Sums(nn.Module):
    def __call__(self, parts):
        return sum(parts) if isinstance(parts, tuple) else parts[0] - parts[1]


def test_arguments_in_another_container(session):
    session.register("net", Sums())
    session.apply("net", (X, X))
    assert why(session.apply("net", [X, X])) == "the arguments are put together in another way"


# -- the model


FIELDS = """
class Net(nn.Module):
  features: int = 3
  @nn.compact
  def __call__(self, x):
    return nn.Dense(self.features)(x)
"""


def test_edited_code_and_the_leaf_that_it_changes(session):
    first_run(session, Namespace().cell(FIELDS)["Net"]())
    session.register("net", Namespace().cell(FIELDS.replace("self.features", "5"))["Net"]())
    assert why(session.apply("net", X)) == "Net.__call__ was edited: Dense_0/bias [3]→[5] and 1 more"
    session.register(
        "net", Namespace().cell(FIELDS.replace("(x)\n", "(x) + 1\n").replace("self.features", "5"))["Net"]()
    )
    assert why(session.apply("net", X)) == "Net.__call__ was edited"


READS = """
WIDTH = 128
TABLE = jnp.arange(3.0)
config = {"scale": 2.0, "inner": [1, 2]}
def deep(x, by=1.0):
  return x * by * config["scale"]
def helper(x):
  return deep(x) + WIDTH + TABLE.sum()
class Base(nn.Module):
  factor = 2.0
  def scaled(self, x):
    return x * self.factor
class Net(Base):
  @nn.compact
  def __call__(self, x):
    return self.scaled(helper(nn.Dense(3)(x)))
net = Net()
"""


@pytest.mark.parametrize(
    ("edit", "sentence"),
    [
        ("WIDTH = 256", "WIDTH: 128 → 256"),
        ("TABLE = jnp.arange(3.0) + 1", "TABLE: other values"),
        ("TABLE = jnp.arange(4.0)", "TABLE: float32[3] → float32[4]"),
        ("config['scale'] = 3.0", "config['scale']: 2.0 → 3.0"),
        ("def helper(x):\n  return deep(x) - WIDTH - TABLE.sum()", "helper() was redefined"),
        ("def deep(x, by=1.0):\n  return x * by / config['scale']", "deep() was redefined"),
        ("deep.__defaults__ = (7.0,)", "by of deep: 1.0 → 7.0"),
        ("Base.factor = 4.0", "Base.factor: 2.0 → 4.0"),
        ("Base.scaled = lambda self, x: x - self.factor", "Base.scaled was edited"),
    ],
)
def test_what_the_model_reads(session, edit, sentence):
    cells = Namespace().cell(READS)
    first_run(session, cells["net"])
    cells.cell(edit)
    assert why(session.apply("net", X)) == sentence


CLOSURE = """
def make(offset):
  class Net(nn.Module):
    def __call__(self, x):
      return x + offset
  return Net()
"""


@pytest.mark.parametrize(
    ("source", "first", "edit", "then", "sentence"),
    [
        (FIELDS, "Net()", "", "Net(features=5)", "features: 3 → 5"),
        (FIELDS, "Net()", FIELDS.replace("= 3", "= 5"), "Net()", "features: 3 → 5"),
        (CLOSURE, "make(1.0)", "", "make(2.5)", "offset: 1.0 → 2.5"),
    ],
    ids=["field", "default", "closure"],
)
def test_a_value_that_the_model_is_made_with(session, source, first, edit, then, sentence):
    cells = Namespace().cell(source)
    first_run(session, eval(first, cells))
    session.register("net", eval(then, cells.cell(edit)))
    assert why(session.apply("net", X)) == sentence


def test_a_config_object_that_was_changed_where_it_is(session):
    cells = Namespace().cell(
        "import dataclasses\n"
        "@dataclasses.dataclass\n"
        "class Config:\n"
        "  width: int = 3\n"
        "class Net(nn.Module):\n"
        "  config: Config\n"
        "  @nn.compact\n"
        "  def __call__(self, x):\n"
        "    return x * self.config.width\n"
    )
    config = cells["Config"]()
    first_run(session, cells["Net"](config))
    config.width = 5
    assert why(session.apply("net", X)) == "config.width: 3 → 5"


def test_layers_in_a_field(session):
    first_run(session, nn.Sequential([nn.Dense(3), nn.relu]))
    session.register("net", nn.Sequential([nn.Dense(5), nn.relu]))
    assert why(session.apply("net", X)) == "layers[0].features: 3 → 5"
    session.register("net", nn.Sequential([nn.Dense(5), nn.tanh]))
    assert why(session.apply("net", X)) == "layers[1]: relu → tanh"
    session.register("net", nn.Sequential([nn.Dense(5), nn.tanh, nn.Dense(2)]))
    assert why(session.apply("net", X)) == "layers: 2 items → 3 items"


def test_another_class_under_the_name(session):
    first_run(session, Takes())
    session.register("net", MyModel(3, True))
    assert why(session.apply("net", X)).startswith("the model: Takes → MyModel")


def test_state_of_an_object_that_is_not_plain(session):
    cells = Namespace().cell(
        "class Scale:\n"
        "  factor = 1.0\n"
        "  def __call__(self, x):\n"
        "    return x * self.factor\n"
        "scale = Scale()\n"
        "class Net(nn.Module):\n"
        "  def __call__(self, x):\n"
        "    return scale(x)\n"
    )
    first_run(session, cells["Net"]())
    cells["scale"].factor = 5.0
    assert why(session.apply("net", X)) == "scale.factor: not there before"
    cells["scale"].factor = 6.0
    assert why(session.apply("net", X)) == "scale.factor: 5.0 → 6.0"


NNX = """
class Net(nnx.Module):
  def __init__(self, features, *, rngs):
    self.features = features
    self.hidden = nnx.Linear(4, features, rngs=rngs)
  def __call__(self, x):
    return nnx.relu(self.hidden(x))
"""


def test_nnx_says_the_field_the_code_or_the_leaf(session):
    cells = Namespace().cell(NNX)
    first_run(session, cells["Net"](3, rngs=nnx.Rngs(0)))
    session.register("net", cells["Net"](5, rngs=nnx.Rngs(0)))
    assert why(session.apply("net", X)) == "features: 3 → 5"
    cells.cell(NNX.replace("relu", "tanh"))
    session.register("net", cells["Net"](5, rngs=nnx.Rngs(0)))
    assert why(session.apply("net", X)) == "Net.__call__ was edited"
    session.models["net"].module.hidden = nnx.Linear(4, 7, rngs=nnx.Rngs(0))
    assert why(session.apply("net", X)) == "hidden.out_features: 5 → 7"


def test_an_attribute_of_a_layer_that_was_set(session):
    class Drops(nnx.Module):
        def __init__(self, rngs):
            self.drop = nnx.Dropout(0.5, rngs=rngs)
            self.layers = getattr(nnx, "List", list)([nnx.Dropout(0.5, rngs=rngs)])

        def __call__(self, x):
            return self.layers[0](self.drop(x))

    net = Drops(nnx.Rngs(0))
    first_run(session, net)
    net.drop.rate = 0.1
    assert why(session.apply("net", X)) == "drop.rate: 0.5 → 0.1"
    net.layers[0].rate = 0.2
    assert why(session.apply("net", X)) == "layers[0].rate: 0.5 → 0.2"
    net.drop.deterministic = True
    assert why(session.apply("net", X)) == "drop.deterministic: False → True"


class ConfigDict:
    """As that of ml_collections: its fields are in none of its own attributes, and it is no Mapping."""

    def __init__(self, **fields):
        object.__setattr__(self, "_fields", fields)

    def __getattr__(self, name):
        if name.startswith("_"):
            raise AttributeError(name)
        return self._fields[name]

    def __setattr__(self, name, value):
        self._fields[name] = value

    def items(self):
        return self._fields.items()


def test_a_field_of_a_config_that_keeps_them_inside(session):
    class Configured(nn.Module):
        config: ConfigDict

        def __call__(self, x):
            return x * self.config.rate * self.config.inner.width

    config = ConfigDict(rate=0.5, inner=ConfigDict(width=2))
    first_run(session, Configured(config))
    config.rate = 0.25
    assert why(session.apply("net", X)) == "config.rate: 0.5 → 0.25"
    config.inner.width = 3
    assert why(session.apply("net", X)) == "config.inner.width: 2 → 3"


@struct.dataclass
class Batch:
    x: Any
    kind: str = struct.field(pytree_node=False, default="a")


def test_a_static_field_of_an_argument_that_is_another(session):
    class Kinds(nn.Module):
        def __call__(self, batches):
            return sum(batch.x * (2 if batch.kind == "a" else 3) for batch in batches)

    session.register("net", Kinds())
    session.apply("net", [Batch(X), Batch(X)])
    assert why(session.apply("net", [Batch(X), Batch(X, "b")])) == "batches[1].kind: 'a' → 'b'"


# -- mode, method, options, settings, variables


class Both(nn.Module):
    def setup(self):
        self.dense = nn.Dense(4)
        self.drop = nn.Dropout(0.5)

    def encode(self, x):
        self.sow("intermediates", "z", x)
        return self.dense(x)

    def __call__(self, x, deterministic=True):
        return self.drop(self.encode(x) * 2, deterministic=deterministic)


def test_another_mode_or_method(session):
    first_run(session, Both())
    assert why(session.apply("net", X, mode="train")) == "now with --train"
    assert why(session.apply("net", X, method="encode")) == "method: the call → encode"
    assert why(session.apply("net", jnp.ones((5, 4)), mode="train")) == "x: float32[2,4] → float32[5,4]"


def test_a_mode_that_is_a_field_is_said_as_the_mode(session):
    session.register("net", MyModel(3, False))
    session.apply("net", notebook_x())
    assert why(session.apply("net", notebook_x(), mode="train")) == "now with --train"


class Switched(nn.Module):
    @nn.compact
    def __call__(self, x, train=None):
        return x if train is None else nn.Dropout(0.5, deterministic=not train)(x * 2)


def test_a_mode_in_place_of_another_and_none_again(session):
    session.register("net", Switched())
    session.apply("net", X, mode="train")
    assert why(session.apply("net", X, mode="eval")) == "now with --eval instead of --train"
    assert why(session.apply("net", X)) == "now without --eval"


class Asks(nn.Module):
    def __call__(self, x):
        return x + 1 if self.is_mutable_collection("cache") else x


def test_options(session):
    first_run(session, Asks())
    assert why(session.apply("net", X, mutable="cache")) == "now with --mutable cache"
    assert why(session.apply("net", X, samples=3)) == "now with --samples 3"
    assert why(session.apply("net", X, samples=4)) == "now with --samples 4 instead of 3"
    assert session.apply("net", X).program == "reused"
    assert why(session.apply("net", jnp.ones((5, 4)))) == "x: float32[2,4] → float32[5,4]"


def test_several_options_are_one_change(session):
    first_run(session, MyModel(3, True))
    assert why(session.apply("net", X, mode="eval", samples=3)) == "now with --eval and --samples 3"


def test_a_setting_of_jax_by_name_and_value(session):
    first_run(session, Takes())
    with jax.default_matmul_precision("float32"):
        run = session.apply("net", X)
    assert why(run) == "jax_default_matmul_precision: None → float32"


def test_a_flag_that_jax_reads_at_each_compilation(session):
    flag = "jax_disable_most_optimizations"
    before = jax.config.read(flag)
    first_run(session, Takes())
    jax.config.update(flag, not before)
    try:
        run = session.apply("net", X)
    finally:
        jax.config.update(flag, before)
    assert why(run) == f"{flag}: {before} → {not before}"


def test_variables_of_another_dtype(session):
    first_run(session, nn.Dense(3))
    half = jax.tree_util.tree_map(lambda leaf: leaf.astype(jnp.bfloat16), session.models["net"].variables)
    run = session.apply("net", X, variables=half)
    assert why(run) == "the variables changed: bias float32→bfloat16 and 1 more"


def test_variables_of_a_weak_type(session):
    first_run(session, nn.Dense(3))
    weak = jax.tree_util.tree_map(lambda leaf: jnp.full(leaf.shape, 1.0), session.models["net"].variables)
    run = session.apply("net", X, variables=weak)
    assert why(run) == "the variables changed: bias weakly typed now and 1 more"


def test_arrays_that_were_placed(session):
    first_run(session, Takes())
    run = session.apply("net", jax.device_put(X, jax.devices()[0]))
    if run.program == "compiled":  # JAX lowers a committed array as one that is not, where there is one device
        assert run.reason == "x: float32[2,4], put on cpu:0 now"


PLACES = """
import flax.linen as nn
import jax
import jax.numpy as jnp
from flax_magics import Session

class Net(nn.Module):
  def __call__(self, x):
    return x + 1

session = Session(0)
session.register("net", Net())
mesh = jax.sharding.Mesh(jax.devices(), ("data",))
rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
square = jax.sharding.Mesh([[device] for device in jax.devices()], ("data", "model"))
for place in (*jax.devices(), rows, jax.sharding.NamedSharding(square, rows.spec)):
  print(session.apply("net", jax.device_put(jnp.ones((4, 2)), place)).reason)
"""


def test_another_device():
    """With two devices, which takes a process of its own."""
    assert printed_by(PLACES, devices=2).splitlines() == [
        "first run of this program",
        "x: float32[4,2], moved from cpu:0 to cpu:1",
        "x: float32[4,2], moved from cpu:1 to cpu:0,1 as P('data')",
        "x: float32[4,2], placed otherwise on cpu:0,1 as P('data')",
    ]


# -- and where there is nothing to say


def test_no_reason_where_nothing_was_compiled(session):
    first_run(session, Takes())
    run = session.apply("net", X)
    assert (run.program, run.reason, run.causes) == ("reused", "", ())
    run = session.apply("net", X, eager=True)
    assert (run.program, run.reason, run.causes) == ("eager", "", ())


def test_a_program_that_was_dropped(session, monkeypatch):
    monkeypatch.setattr(cache, "KEPT", 1)
    first_run(session, Takes())
    session.apply("net", jnp.ones((3, 4)))
    assert why(session.apply("net", X)) == "made before, and dropped since: the last 128 programs are kept"


def test_two_models_have_reasons_of_their_own(session):
    session.register("one", Takes())
    session.register("two", Sums())
    session.apply("one", X)
    assert why(session.apply("two", [X, X])) == "first run of this program"


# -- the note on what to do about it


def advice(run: Any) -> list[tuple[str, list[tuple[str, str]]]]:
    return [(note.text, note.advice) for note in run.notes if note.kind == "programs"]


BATCH = (
    "the batch size of `{}` varies ({}), and each size is a program of its own: leave out the last batch, which is"
    " smaller, or pad it"
)
GROWS = BATCH.partition("leave")[0] + "pad to the largest that is to come"
AS_ARRAY = "import jax.numpy as jnp\n%flax_apply net(…, jnp.asarray(…, 'float32'))"
HALF = X[0].astype(jnp.bfloat16)


def padded(widths: str) -> tuple[str, str]:
    return "form: ", f"import jax.numpy as jnp\n%flax_apply net(jnp.pad(…, [{widths}]))"


@pytest.mark.parametrize(
    ("calls", "text", "form"),
    [
        ([(jnp.ones((rows, 4)),) for rows in (128, 64, 64, 32)],
         f"3 of the last 4 runs of net compiled: {BATCH.format('x', '32, 64, 128')}", padded("(0, 128 - len(…)), (0, 0)")),
        ([(jnp.ones((2, 2, length)),) for length in (4, 5, 9)],
         "3 of the last 3 runs of net compiled: the shape of `x` varies, and each shape is a program of its own:"
         " what is padding takes a mask", padded("(0, 0), (0, 0), (0, … - ….shape[2])")),
        ([(jnp.ones((2, 2, length)),) for length in (4, 9, 5)],
         "3 of the last 3 runs of net compiled: the shape of `x` varies, and each shape is a program of its own:"
         " what is padding takes a mask", padded("(0, 0), (0, 0), (0, 9 - ….shape[2])")),
        ([(X, 1.0, n) for n in (1, 2, 3)],
         "3 of the last 3 runs of net compiled: the model needs the value of `n`, and each value is a program of its own",
         ("in your model: ", "jax.lax.fori_loop(0, n, …) for range(n), jnp.where for if")),
        ([(HALF, scale) for scale in (jnp.float32(2.0), jnp.float16(2.0), jnp.asarray(2.0))],
         "3 of the last 3 runs of net compiled: the dtype of `scale` varies (float16, float32, weak types too), and each"
         " is a program of its own", ("form: ", AS_ARRAY)),
        ([(X, scale) for scale in (jnp.float32(2.0), 2.0, 2)],
         "3 of the last 3 runs of net compiled: `scale` is an array in one run and a Python number in another, and each"
         " kind is a program of its own", ("form: ", AS_ARRAY)),
    ],
    ids=["batch size", "another axis", "a smaller one", "static number", "dtype and weak type", "kind of number"],
)  # fmt: skip
def test_the_third_program_for_what_varies_has_a_note(takes, calls, text, form):
    *before, last = [advice(takes.apply("net", *args)) for args in calls]
    assert before == [[]] * len(before)
    assert last == [(text, [form])]


def test_other_models_under_one_name_are_no_reason_for_a_note(session):
    for features in (3, 4, 5, 6):
        session.register("net", nn.Dense(features))
        assert advice(session.apply("net", jnp.ones((2, features)))) == []
    session.apply("net", jnp.ones((3, 6)))
    text = f"3 of the last 3 runs of net compiled: {GROWS.format('inputs', '2, 3, 4')}"
    assert advice(session.apply("net", jnp.ones((4, 6)))) == [(text, [padded("(0, … - len(…)), (0, 0)")])]
    text = f"4 of the last 4 runs of net compiled: {BATCH.format('inputs', '1, 2, 3, 4')}"
    assert advice(session.apply("net", jnp.ones((1, 6)))) == [(text, [padded("(0, 4 - len(…)), (0, 0)")])]


@pytest.mark.parametrize("net", [nn.Dense(1), nnx.Linear(4, 1, rngs=nnx.Rngs(0))])
def test_gradients_and_trainings_count_as_no_runs(net):
    def loss(net: Any, batch: Any) -> Any:
        return net(batch).sum()

    session = Session()
    session.register("net", net)
    session.apply("net", X[:1])
    for rows in (2, 3):
        session.grad(loss, "net", jnp.ones((rows, 4)))
        session.train(loss, "net", jnp.ones((rows, 4)), optimizer=optax.sgd(0.1), steps=1)
    assert advice(session.apply("net", jnp.ones((9, 4)), mode="eval")) == []


def test_modes_that_alternate_and_edits_are_no_cause(session):
    for features in (3, 4, 5, 6):
        session.register("net", Namespace().cell(FIELDS)["Net"](features=features))
        assert advice(session.apply("net", X)) == []
    session.register("both", Both())
    for mode in (None, "train", "eval", "train", "eval"):
        assert advice(session.apply("both", X, mode=mode)) == []
    assert advice(session.apply("both", X, method="encode")) == []
    assert advice(session.apply("both", jnp.ones((3, 4)), mode="train")) == []


def test_only_the_last_ten_runs_of_the_model_count(takes):
    takes.register("other", Sums())
    for rows in (2, 3):
        takes.apply("net", jnp.ones((rows, 4)))
    for _ in range(8):
        takes.apply("net", X)
        takes.apply("other", (X, X))
    assert advice(takes.apply("net", jnp.ones((5, 4)))) == []  # the first program is eleven runs ago
    assert len(advice(takes.apply("net", jnp.ones((6, 4))))) == 0
    assert len(advice(takes.apply("net", jnp.ones((7, 4))))) == 1


def test_the_note_is_quieted_by_its_kind(notebook):
    notebook("%%flaxmodel net = Net()\nclass Net(nn.Module):\n  def __call__(self, x):\n    return x + 1")
    notebook("%config FlaxMagics.notes = {'programs': False}")
    shown = [notebook(f"%flax_apply -o run net(jnp.ones({n}));") for n in (2, 3, 4)]
    assert [note.kind for note in notebook["run"].notes] == ["programs"]
    assert not any("compiled: the batch size" in text for text in shown)
    notebook("%config FlaxMagics.notes = {}")
    assert "the batch size" in notebook("%flax_apply net(jnp.ones(5));")
