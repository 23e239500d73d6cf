"""The run by hand, as a report's details have it: Python that gives the run's bits."""

from __future__ import annotations

import dataclasses

import jax
import pytest
from by_hand import bits

MODELS = """\
%%flaxmodel
import dataclasses
import jax
import jax.numpy as jnp
import flax.linen as nn
from flax import nnx

class Switched(nn.Module):
  @nn.compact
  def __call__(self, x, train=False):
    return nn.Dropout(0.5, deterministic=not train)(nn.Dense(3)(x))

class Field(nn.Module):
  training: bool = False

  @nn.compact
  def __call__(self, x):
    return nn.Dropout(0.5, deterministic=not self.training)(nn.Dense(3)(x))

@dataclasses.dataclass(frozen=True)
class Config:
  rate: float = 0.5
  deterministic: bool = True

class Configured(nn.Module):
  config: Config = Config()

  @nn.compact
  def __call__(self, x):
    return nn.Dropout(self.config.rate, deterministic=self.config.deterministic)(nn.Dense(3)(x))

class Around(nn.Module):
  inner: nn.Module

  def __call__(self, x):
    return self.inner(x)

class Noisy(nn.Module):
  @nn.compact
  def __call__(self, x, z_rng):
    return nn.Dense(3)(x) + jax.random.normal(z_rng, (3,))

class Bridged(nnx.Module):
  def __init__(self, rngs):
    self.linear = nnx.Linear(4, 3, rngs=rngs)
    self.dropout = nnx.Dropout(0.5, rngs=rngs)

  def __call__(self, x):
    return self.dropout(self.linear(x))

class Choosing(nn.Module):
  @nn.compact
  def __call__(self, x, options):
    x = nn.Dense(3)(x) * options['scale']
    return nn.relu(x) if options['act'] == 'relu' else x

class Holding(nn.Module):
  parts: dict
  pair: tuple = ()

  def __call__(self, x):
    for part in (*self.parts.values(), *self.pair):
      x = part(x)
    return x

def dropout():
  return nn.Dropout(0.5, deterministic=False)

seq = nn.Sequential([nn.Dense(3), nn.relu, dropout(), nn.Dense(3)])
twice = nn.Sequential([dropout(), nn.Dense(3), dropout()])
same = dropout()
shared = nn.Sequential([same, nn.Dense(3), same, same])
holding = Holding({'dense': nn.Dense(3), 'drop=': dropout()}, (dropout(),))
nested = Around(nn.Sequential((nn.Dense(3), Holding({'seq': seq}))))
bridged = nnx.bridge.to_linen(Bridged)

choosing = Choosing()
options = {'act': 'relu', 'scale': 2.0}
switched, field, configured, noisy = Switched(), Field(), Configured(), Noisy()
around, around_configured = Around(Field()), Around(Configured())
x = jnp.ones((2, 4))
"""


SEQ = "layers=[*seq.layers[:2], seq.layers[2].clone(deterministic=True), *seq.layers[3:]]"
RNGS = "rngs={'dropout': dropout_key}"


@pytest.mark.parametrize(
    ("line", "by_hand"),
    [
        ("--train switched(x)", "switched.apply(variables, x, train=True, rngs={'dropout': dropout_key})"),
        ("--train switched(x, train=True)", "switched.apply(variables, x, train=True, rngs={'dropout': dropout_key})"),
        ("--train switched(x,)", "switched.apply(variables, x, train=True, rngs={'dropout': dropout_key})"),
        ("--eval switched(x)", "switched.apply(variables, x, train=False)"),
        ("--train field(x)", "field.clone(training=True).apply(variables, x, rngs={'dropout': dropout_key})"),
        (
            "--train configured(x)",
            "configured.clone(config=dataclasses.replace(configured.config, deterministic=False))"
            ".apply(variables, x, rngs={'dropout': dropout_key})",
        ),
        (
            "--train around(x)",
            "around.clone(inner=around.inner.clone(training=True)).apply(variables, x, rngs={'dropout': dropout_key})",
        ),
        (
            "--train around_configured(x)",
            "around_configured.clone(inner=around_configured.inner.clone(config=dataclasses.replace("
            "around_configured.inner.config, deterministic=False))).apply(variables, x, rngs={'dropout': dropout_key})",
        ),
        ("--eval seq(x)", f"seq.clone({SEQ}).apply(variables, x)"),
        (
            "--eval twice(x)",
            "twice.clone(layers=[twice.layers[0].clone(deterministic=True), *twice.layers[1:2], "
            "twice.layers[2].clone(deterministic=True)]).apply(variables, x)",
        ),
        (
            "--train shared(x)",
            "shared.clone(layers=[(shared_1 := shared.layers[0].clone(deterministic=False)), *shared.layers[1:2], "
            f"shared_1, shared_1]).apply(variables, x, {RNGS})",
        ),
        (
            "--train holding(x)",
            "holding.clone(parts={**holding.parts, 'drop=': holding.parts['drop='].clone(deterministic=False)}, "
            f"pair=(holding.pair[0].clone(deterministic=False),)).apply(variables, x, {RNGS})",
        ),
        (
            "--eval nested(x)",
            "nested.clone(inner=nested.inner.clone(layers=(*nested.inner.layers[:1], "
            "nested.inner.layers[1].clone(parts={**nested.inner.layers[1].parts, 'seq': "
            "nested.inner.layers[1].parts['seq'].clone("
            + SEQ.replace("seq", "nested.inner.layers[1].parts['seq']")
            + ")})))).apply(variables, x)",
        ),
        ("bridged(x)", f"bridged.apply(variables, x, {RNGS})"),
        ("--key z_rng noisy(x)", "noisy.apply(variables, x, z_rng=z_rng_key)"),
        ("choosing(x, {'act': 'relu', 'scale': 2.0})", "choosing.apply(variables, x, {'act': 'relu', 'scale': 2.0})"),
        ("choosing(x, options=options)", "choosing.apply(variables, x, options=options)"),
    ],
)
def test_it_is_python_that_gives_the_bits_of_the_run(notebook, line, by_hand):
    notebook(MODELS)
    notebook(f"y = %flax_apply -o run {line}")
    run = notebook["run"]
    assert run.by_hand == by_hand
    names = {**notebook.shell.user_ns, "dataclasses": dataclasses}
    names |= {f"{name}_key": key for name, key in run.keys.items()}
    variables = notebook.session.models[run.model].variables

    def again(variables):
        return eval(run.by_hand, {**names, "variables": variables})

    assert bits(jax.jit(again)(variables)) == bits(run.output)


UNSET = """\
%%flaxmodel
import flax.linen as nn

class Unset(nn.Module):
  training: bool | None = None

  def setup(self):
    self.dense = nn.Dense(3 if self.training is None else 2)
    self.dropout = nn.Dropout(0.5)

  def __call__(self, x, deterministic):
    return self.dropout(self.dense(x), deterministic=deterministic)

  def encode(self, x):
    return self.dropout(self.dense(x), deterministic=not self.training)

unset = Unset()
"""


@pytest.mark.parametrize(
    ("line", "by_hand"),
    [
        ("bridged(x)", "bridged.init({'params': params_key, 'dropout': params_key}, x)"),
        ("unset(x)", "unset.init(params_key, x, deterministic=True)"),
        ("unset.encode(x)", "unset.clone(training=False).init(params_key, x, method='encode')"),
    ],
)
def test_so_is_an_init(notebook, line, by_hand):
    notebook(MODELS)
    notebook(UNSET)
    notebook(f"variables = %flax_init {line}")
    run = notebook.session.runs[-1]
    assert run.by_hand == by_hand
    assert bits(eval(by_hand, {**notebook.shell.user_ns, "params_key": run.keys["params"]})) == bits(run.output)


HELD = """\
%%flaxmodel
import dataclasses
import jax
import jax.numpy as jnp
from flax import nnx

@dataclasses.dataclass(frozen=True)
class Config:
  training: bool = False

class Held(nnx.Module):
  def __init__(self, rngs):
    self.config, self.is_training = Config(), False
    self.dropout = nnx.Dropout(0.5, rngs=rngs)

  def __call__(self, x):
    return self.dropout(x) * (3 if self.config.training else 1) * (5 if self.is_training else 1)

class Outer(nnx.Module):
  def __init__(self, rngs):
    self.inner = Held(rngs)

  def __call__(self, x):
    return self.inner(x)

held, outer = Held(nnx.Rngs(dropout=0)), Outer(nnx.Rngs(dropout=0))
x = jnp.ones((2, 4))
"""


@pytest.mark.parametrize(("model", "inside"), [("held", "held"), ("outer", "outer.inner")])
@pytest.mark.parametrize(("mode", "verb", "value"), [("--train", "train", True), ("--eval", "eval", False)])
def test_and_a_run_of_an_nnx_module_with_switches_of_its_own(notebook, model, inside, mode, verb, value):
    notebook(HELD)
    notebook(f"y = %flax_apply -o run {mode} {model}(x)")
    run = notebook["run"]
    reseed = f"nnx.reseed({model}, policy='match_shape', dropout=dropout_key); "
    assert run.by_hand == (
        f"{model}.{verb}(is_training={value}); {inside}.config = dataclasses.replace({inside}.config, training={value}); "
        f"{reseed}nnx.jit(lambda {model}: {model}(x))({model})"
    )
    names = {**notebook.shell.user_ns, **{f"{name}_key": key for name, key in run.keys.items()}}
    *statements, value_of_run = run.by_hand.split("; ")
    exec("; ".join(statements), names)
    assert bits(eval(value_of_run, names)) == bits(run.output)
