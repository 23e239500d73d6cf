"""The cells of Flax's notebook *The Sharp Bits*, as a person writes them with the commands."""

LOAD = "%load_ext flax_magics"
SETUP = """
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
x = jax.random.uniform(jax.random.key(42), (3, 4, 4))
"""
CLASS = """\
class MyModel(nn.Module):
  num_neurons: int
  training: bool

  @nn.compact
  def __call__(self, x):
    x = nn.Dense(self.num_neurons)(x)
    return nn.Dropout(rate=0.5, deterministic=not self.training)(x)
"""
MODEL = f"%%flaxmodel\n{CLASS}\nmy_model = MyModel(num_neurons=3, training=False)\n"
SHARP_BITS = (LOAD, SETUP, MODEL)
"""The cells of Flax's notebook, as far as the first run."""
