"""What a notebook is told of a command in a traced function: complete lines, which run."""

from __future__ import annotations

import pytest

TRACED = "in a function that JAX traces: it would happen once, while JAX traces, and be no part of what then runs."

SETUP = """\
from flax import nnx
x, key = jnp.arange(6.0).reshape(2, 3), jax.random.key(7)
class Net(nn.Module):
  @nn.compact
  def __call__(self, x, train=False):
    x = nn.BatchNorm(use_running_average=not train)(nn.Dense(4)(x))
    x = nn.Dropout(0.5, deterministic=not train)(x)
    return x + jax.random.normal(self.make_rng('noise'), x.shape) if train else x
class Handed(nnx.Module):
  def __init__(self, features, *, rngs):
    self.linear = nnx.Linear(3, features, rngs=rngs)
    self.dropout = nnx.Dropout(0.5)
  def __call__(self, x, *, rngs):
    return self.dropout(self.linear(x), rngs=rngs)
class Sampled(nn.Module):
  @nn.compact
  def __call__(self, x, z_rng):
    return nn.Dense(2)(x) + jax.random.normal(z_rng, (2,))
class Own(nnx.Module):
  def __init__(self, features, *, rngs):
    self.linear = nnx.Linear(3, features, rngs=rngs)
    self.dropout = nnx.Dropout(0.5, rngs=rngs)
  def __call__(self, x):
    return self.dropout(self.linear(x))
"""

BY_HAND = "Take variables and keys before it, and call the model with them."
TRAINED = ".apply(variables, x, train=True, rngs={'dropout': dropout_key, 'noise': noise_key}, mutable=['batch_stats'])"
KEYS = ["dropout_key = %flax_key dropout", "noise_key = %flax_key noise"]
OF_NNX = (
    "Call the module itself there: nnx.grad, nnx.jit and the like see what it changes, where jax.grad and jax.jit do"
    " not."
)
BUILD = "Draw the keys before it, and build with them."
BUILT = ["params_key = %flax_key params", "dropout_key = %flax_key dropout"]
RNGS = "rngs=nnx.Rngs(params=params_key, dropout=dropout_key)"

TOLD = {
    "flax_apply --train net(x)": (
        f"%flax_apply --train net(x) stands {TRACED} {BY_HAND}",
        ["variables = %flax_vars net", *KEYS, f"net{TRAINED}"],
    ),
    "flax_apply -q net(x, train=False)": (
        f"%flax_apply -q net(x, train=False) stands {TRACED} {BY_HAND}",
        ["variables = %flax_vars net", "net.apply(variables, x, train=False)"],
    ),
    "flax_apply --train fresh(x)": (
        f"%flax_apply --train fresh(x) stands {TRACED} {BY_HAND}",
        ["variables = %flax_init fresh(x)", *KEYS, f"fresh{TRAINED}"],
    ),
    "flax_apply --key z_rng --samples 3 vae(x)": (
        f"%flax_apply --key z_rng --samples 3 vae(x) stands {TRACED} {BY_HAND}",
        ["variables = %flax_vars vae", "z_rng_key = %flax_key z_rng", "vae.apply(variables, x, z_rng=z_rng_key)"],
    ),
    "flax_init net(x)": (
        f"%flax_init net(x) stands {TRACED} Draw the key before it, and initialise with that.",
        ["params_key = %flax_key params", "variables = net.init(params_key, x)"],
    ),
    "flax_apply --train own(x)": (f"%flax_apply --train own(x) stands {TRACED} {OF_NNX}", ["own.train()", "own(x)"]),
    "flax_apply handed(x)": (
        f"%flax_apply handed(x) stands {TRACED} {OF_NNX}",
        ["dropout_key = %flax_key dropout", "handed(x, rngs=nnx.Rngs(dropout_key))"],
    ),
    "flax_init own(x)": (f"%flax_init own(x) stands {TRACED} {BUILD}", [*BUILT, f"own = Own(4, {RNGS})"]),
    "flaxmodel new = Own(2)": (f"`new` is registered {TRACED} {BUILD}", [*BUILT, f"new = Own(2, {RNGS})"]),
    "flaxmodel net": (f"`net` is registered {TRACED} Register it before.", ["%flaxmodel net"]),
    "flax_key noise": (
        f"the key `noise` is drawn {TRACED} Draw it before, and use it there.",
        ["noise_key = %flax_key noise"],
    ),
    "flax_replay 1": (f"%flax_replay 1 stands {TRACED} Write it before or after.", ["%flax_replay 1"]),
    "flax_key --seed 3 --fresh": (
        f"%flax_key --seed 3 --fresh stands {TRACED} Write it before or after.",
        ["%flax_key --seed 3 --fresh"],
    ),
}


@pytest.fixture
def models(notebook):
    notebook(SETUP)
    for line in ("net = Net()", "fresh = Net()", "vae = Sampled()", "own = Own(4)", "handed = Handed(4)"):
        notebook(f"%flaxmodel -q {line}")
    notebook("_ = %flax_init -q net(x)\n_ = %flax_init -q vae(x, key)")
    return notebook


def told(notebook, line):
    """The message of a command in a traced function, and the lines that it says to write."""
    name, _, rest = line.partition(" ")
    out = notebook.fails(f"jax.jit(lambda z: get_ipython().run_line_magic({name!r}, {rest!r}))(1.0)")
    message, _, advice = out.partition("\n  write: ")
    return message.removeprefix("FlaxMagicsError: "), advice.split("\n         ")


def test_a_notebook_is_told_what_to_write_and_that_runs(models):
    for line, expected in TOLD.items():
        state = models.session._state
        message, advice = told(models, line)
        assert (message, advice) == expected
        assert models.session._state is state
        models("\n".join(advice))


def test_a_call_that_does_not_fit_is_refused_all_the_same(models):
    out = models.fails("jax.jit(lambda z: get_ipython().run_line_magic('flax_apply', 'net.copy_of(x)'))(1.0)")
    assert out == (
        f"FlaxMagicsError: %flax_apply net.copy_of(x) stands {TRACED} {BY_HAND}\n"
        "  form: variables = %flax_vars net\n"
        "        dropout_key = %flax_key dropout\n"
        "        net.apply(variables, …, rngs={'dropout': dropout_key})"
    )


def test_a_tracer_error_in_a_traced_function_is_not_sent_to_eager(models):
    models("def look(x):\n  if x > 0:\n    return x\n  return -x\n%flaxmodel -q net")
    out = models.fails("jax.jit(lambda z: get_ipython().run_line_magic('flax_apply', 'net(x * look(z))'))(1.0)")
    assert "TracerBoolConversionError" in out
    assert "--eager" not in out


def test_a_summary_of_a_traced_module_refuses(models):
    out = models.fails("nnx.jit(lambda own: get_ipython().run_line_magic('flax_summary', 'own(x)'))(own)")
    assert f"stands {TRACED} Write it before or after.\n  write: %flax_summary own(x)" in out


def test_a_command_in_a_function_that_is_not_jitted_runs(models):
    models("def look(x):\n  y = %flax_apply -q net(x)\n  return y\nwith jax.disable_jit():\n  y = jax.jit(look)(x)")
    assert models["y"].shape == (2, 4)


def test_a_model_with_the_name_of_its_class_is_written_as_the_module_that_is_registered(models):
    models("%%flaxmodel -q\nclass Plain(Net):\n  pass")
    module = ["import flax_magics", "module = flax_magics.session().models['Plain'].module"]
    _, advice = told(models, "flax_init Plain(x)")
    assert advice == [*module, "params_key = %flax_key params", "variables = module.init(params_key, x)"]
    models("\n".join(advice))
    _, advice = told(models, "flax_apply --train Plain(x)")
    assert advice == [*module, "variables = %flax_init Plain(x)", *KEYS, f"module{TRAINED}"]
    models("\n".join(advice))


def test_an_argument_that_is_traced_is_a_gap_in_what_is_written_outside(models):
    out = models.fails("def one(x):\n  y = %flax_apply -q fresh(x)\n  return y\njax.vmap(one)(x)")
    assert "  form: variables = %flax_init fresh(…)\n        fresh.apply(variables, x)" in out
    models("_ = %flax_init -q fresh(x)")
    out = models.fails("jax.vmap(one)(x)")
    assert "  write: variables = %flax_vars fresh\n         fresh.apply(variables, x)" in out
