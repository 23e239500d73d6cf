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

class Choosing(nn.Module):
  @nn.compact
  def __call__(self, x, options):
    x = nn.Dense(3)(x) * options['scale']
    return nn.relu(x) if options['act'] == 'relu' else x

choosing = Choosing()
options = {'act': 'relu', 'scale': 2.0}
switched, field, configured, noisy = Switched(), Field(), Configured(), Noisy()
around, around_configured = Around(Field()), Around(Configured())
x = jnp.ones((2, 4))
"""


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
        ("--key z_rng noisy(x)", "noisy.apply(variables, x, z_rng=z_rng_key)"),
        (
            "choosing(x, {'act': 'relu', 'scale': 2.0})",
            "choosing.apply(variables, x, {'act': 'relu', 'scale': 2.0})",
        ),
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
