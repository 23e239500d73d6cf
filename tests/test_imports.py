"""Nobody imports what only the other half of Flax needs."""

from __future__ import annotations

import subprocess
import sys
import textwrap


def test_a_run_of_a_linen_model_imports_nothing_of_nnx():
    script = """
        import sys
        import jax.numpy as jnp
        import flax.linen as nn
        import flax_magics

        class Net(nn.Module):
          @nn.compact
          def __call__(self, x):
            return nn.Dropout(0.5, deterministic=False)(nn.Dense(3)(x))

        before = "flax.nnx" in sys.modules
        session = flax_magics.Session()
        session.register("net", Net())
        for rows in (2, 2, 3):
          session.apply("net", jnp.ones((rows, 4)))
        print(before, "flax.nnx" in sys.modules)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=True)
    before, after = done.stdout.split()
    assert after == before
