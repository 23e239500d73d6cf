"""`Session.export` where no cells are: a script's session."""

from __future__ import annotations

import os
import subprocess
import sys

import jax
from exporting import digests_of, printed

SCRIPT = """\
import flax.linen as nn
import jax
import jax.numpy as jnp

import flax_magics

WIDTH = 3


def helper(x):
    return x * WIDTH


class Net(nn.Module):
    width: int
    training: bool = False

    @nn.compact
    def __call__(self, x, scale=1.0):
        x = nn.Dense(self.width)(helper(x))
        return nn.Dropout(0.5, deterministic=not self.training)(x) * scale


x = jax.random.uniform(jax.random.key(42), (3, 4))
unrelated = 1
session = flax_magics.Session(seed=7)
session.register("net", Net(width=5))
first = session.apply("net", x)
second = session.apply("net", x, mode="train", scale=2.0)
key = session.key("latent")
session.apply("net", x * 2)
third = session.apply("net", x, mode="train", samples=3)
script = session.export("session.py")
print(script.unexported)
print(first.digest, second.digest, session.runs[2].digest, third.digest)
"""


def test_a_scripts_session_is_its_models_its_inputs_by_name_and_its_runs(tmp_path):
    (tmp_path / "train.py").write_text(SCRIPT)
    flag = "jax_disable_most_optimizations"
    environment = {**os.environ, flag.upper(): str(jax.config.read(flag))}
    options = {"capture_output": True, "text": True, "timeout": 300, "check": True}
    done = subprocess.run([sys.executable, "train.py"], cwd=tmp_path, env=environment, **options)
    unexported, digests = done.stdout.splitlines()
    assert unexported == "('a draw that no line of the cells explains: net(…)',)"
    text = (tmp_path / "session.py").read_text()
    assert text.startswith('"""The models and runs of a session, as plain JAX and Flax.\n')
    assert "unrelated" not in text
    assert "flax_magics" not in text
    assert "# Left out: apply net(…): its input has no name at the top of a file.\n" in text
    assert digests_of(printed(text, tmp_path)) == digests.split()
