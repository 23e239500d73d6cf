"""Nobody imports what only the other half of Flax needs."""

from __future__ import annotations

import subprocess
import sys
import textwrap


def test_loading_the_extension_imports_nothing_that_only_a_command_needs():
    script = """
        import sys
        from IPython.core.interactiveshell import InteractiveShell
        shell = InteractiveShell.instance()
        before = set(sys.modules)
        shell.run_line_magic("load_ext", "flax_magics")
        print(*sorted({name.partition(".")[0] for name in set(sys.modules) - before} - {"flax_magics", "IPython"}))
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) <= {"_blake2", "_hashlib", "bdb", "hashlib"}


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
