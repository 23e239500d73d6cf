"""Edits and runs in any order: what is shown, drawn and kept is the same whether or not a line is known by its text."""

from __future__ import annotations

import contextlib
import io
import re
from typing import Any

import jax
import pytest
from by_hand import bits
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from msgspec.structs import asdict

from flax_magics import _session
from flax_magics.notebook import command
from flax_magics.report import facts as report_facts
from flax_magics.run import RELEASED, Run
from flax_magics.state.runs import RunLog

SETUP = """
import jax, jax.numpy as jnp, numpy as np, flax.linen as nn
from flax import nnx
%config FlaxMagics.disk_cache = False
%config FlaxMagics.report = 'auto'
%config FlaxMagics.notes = {}
%config FlaxMagics.replay_bytes = 256_000_000
%alias_magic fa flax_apply
SCALE = 2.0
x = jax.random.uniform(jax.random.key(42), (3, 4))
"""
LINEN = """%%flaxmodel
class Net(nn.Module):
  features: int = 4
  @nn.compact
  def __call__(self, x, train=False):
    x = nn.BatchNorm(use_running_average=not train)(nn.Dense(self.features)(x))
    self.sow('intermediates', 'inner', x)
    return nn.Dropout(0.5, deterministic=not train)(x) * SCALE
net = Net()
"""
NNX = """%%flaxmodel net = Net(rngs=nnx.Rngs(0))
class Net(nnx.Module):
  def __init__(self, features=4, *, rngs):
    self.linear, self.norm = nnx.Linear(4, features, rngs=rngs), nnx.BatchNorm(features, rngs=rngs)
    self.dropout = nnx.Dropout(0.5, rngs=rngs)
  def __call__(self, x):
    return self.dropout(self.norm(self.linear(x))) * SCALE
"""
MODELS = {
    "linen": LINEN,
    "linen, whose dropout is always off": LINEN.replace("deterministic=not train", "deterministic=True"),
    "nnx": NNX,
}
RUNS = [
    "%flax_apply net(x)",
    "%flax_apply --train net(x);",
    "y = %flax_apply --train net(x)",
    "for i in range(3):\n  y = %flax_apply --train net(x)",
    "for i in range(3):\n  x = x + i\n  y = %flax_apply -q --train net(x)",
    "%flax_apply -q --train -o run net(x)",
    "ys = []\ndef f(x):\n  y = %flax_apply -q --train net(x)\n  return y\nys += [f(x), f(x + 1)]",
    "%%capture shown\n%flax_apply --train net(x)",
    "%%flax_apply --train\nnet(x)",
    "%fa --train net(x)",
    "%flax_apply --mutable intermediates net(x);",
    "%flax_apply -q --train -o x net(x);",
]
EDITS = [
    "x = jax.random.uniform(jax.random.key(42), (3, 4))",
    "x = np.asarray(x, 'float32')",
    "x = jnp.zeros((2, 4))",
    "x = jnp.full((3, 4), jnp.nan)",
    "x = jnp.ones((3, 5))",
    "del x",
    "del net",
    "other = net",
    "net = Net(2, rngs=nnx.Rngs(1)) if issubclass(Net, nnx.Module) else Net(2)",
    "net = other",
    "SCALE = 3.0",
    "SCALE = 2.0",
    "variables = %flax_vars net",
    "variables = jax.tree_util.tree_map(lambda v: v * 2 if jnp.issubdtype(v.dtype, jnp.floating) else v, variables)",
    "%flax_vars net = variables",
    "%flax_init net(x)",
    "%flax_key --seed 0 --fresh",
    "%flax_key --seed 3",
    "%flax_key latent",
    "%flax_replay last",
    "%flax_history",
    "%flax",
    "%flax_summary net(x)",
    "%flax_export",
    "%flax_save saved.safetensors",
    "%flax_load saved.safetensors",
    "%flax_save --autosave again.safetensors",
    "%config FlaxMagics.report = 'normal'",
    "%config FlaxMagics.report = 'off'",
    "%config FlaxMagics.notes = {'dropout': False, 'nan': False}",
    "%config FlaxMagics.replay_bytes = 300",
    "%reload_ext flax_magics",
    "jax.config.update('jax_default_matmul_precision', 'bfloat16')",
    "%flaxmodel net",
    "with nn.intercept_methods(lambda call, args, kwargs, _: call(*args, **kwargs) * 3):\n"
    "  for i in range(2):\n    y = %flax_apply --train net(x)",
    "before = %flax_apply -q net(x)\nSCALE += 1\nafter = %flax_apply -q net(x)",
    "the model",
    "the model, edited",
]
# Few lines in each notebook, so that they come again.
CELLS = st.lists(st.sampled_from(RUNS), min_size=1, max_size=3).flatmap(
    lambda lines: st.lists(st.sampled_from(lines) | st.sampled_from(EDITS), min_size=6, max_size=14)
)


def run_all(shell: Any, cells: list[str]) -> list[dict[str, Any]]:
    """Runs the cells in a kernel as good as new: for each, what it showed and raised, and what there is after it."""
    history: list[dict[str, Any]] = []
    shown: list[Any] = []
    runs: list[dict[str, Any]] = []
    add = RunLog.add

    def noting(chain: Any, kept: Any) -> Any:
        runs.append(facts(kept.run()))
        return add(chain, kept)

    def publish(data: Any = None, **how: Any) -> None:
        texts = {kind: masked(str(data[kind])) for kind in sorted(data) if kind.startswith("text/")}
        shown.append((texts, how.get("update", False)))

    precision = jax.config.jax_default_matmul_precision
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_session, "_current", None)
        patch.setattr(RunLog, "add", staticmethod(noting))
        patch.setattr(shell.display_pub, "publish", publish)
        patch.setattr(report_facts, "_waits", lambda timing: (0.0, 0.0))  # they are told from some length on
        shell.reset()
        try:
            for cell in ("%load_ext flax_magics", SETUP, *cells):
                with contextlib.redirect_stdout(io.StringIO()) as out:
                    result = shell.run_cell(cell, store_history=True)
                after = {"cell": cell, "printed": masked(out.getvalue()), "shown": list(shown), "runs": list(runs)}
                error = result.error_before_exec or result.error_in_exec
                history.append({**after, "error": masked(repr(error)), "names": names(shell.user_ns), **session()})
                shown.clear()
                runs.clear()
        finally:
            jax.config.update("jax_default_matmul_precision", precision)
            if "flax_magics" in shell.extension_manager.loaded:
                shell.run_cell("%unload_ext flax_magics")
    return history


TIMES = re.compile(r"[\d.,]+ ?(ns|µs|ms|s|%|[kKMG]?B/s|[kKMG]?B)(?!\w)|\d+:\d\d(:\d\d)?|0x[0-9a-f]+")


def masked(text: str) -> str:
    """The text of text or HTML without what is another at each run: times."""
    return TIMES.sub("#", re.sub("<[^>]*>", "", text))


def names(user_ns: dict[str, Any]) -> dict[str, Any]:
    held = {name: user_ns[name] for name in ("x", "y", "ys", "variables") if name in user_ns}
    return {name: value.draw if isinstance(value, Run) else bits(value) for name, value in held.items()}


def session() -> dict[str, Any]:
    """The root key, the models, and their variables."""
    there = _session._current
    if there is None:
        return {}
    models = [(name, bits(one.variables), dict(one.updates), one.weights) for name, one in there.models.items()]
    return {"root": (there.seed, there.draws, there._state.root.data), "length": len(there), "models": models}


def facts(run: Any) -> dict[str, Any]:
    """All that a run says, but for its times and what the machine had to do with it."""
    fields = {name: getattr(run, name) for name in run.__struct_fields__ if not name.startswith("_")}
    timing, keys = asdict(fields.pop("timing")), fields.pop("keys")
    del fields["started"], fields["memory"]
    for name in ("inputs", "output", "sown"):
        fields[name] = None if fields[name] is RELEASED else bits(fields[name])
    phases = {name: bool(timing[name]) for name in ("trace", "compile", "busy")}
    return {**fields, **phases, "keys": {name: keys.data(name) for name in keys}, "digest": run.digest}


@settings(
    max_examples=min(8, settings().max_examples),
    derandomize=True,
    phases=(Phase.generate,),  # to shrink a failure would take minutes, and its cells can be read as they are
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(model=st.sampled_from(sorted(MODELS)), cells=CELLS)
def test_a_line_that_is_known_is_what_it_is_when_it_is_read(shell, tmp_path_factory, model, cells):
    code = MODELS[model]
    edited = code.replace("features=4", "features=5").replace("features: int = 4", "features: int = 5")
    code_of = {"the model": code, "the model, edited": edited}
    ways = []
    for way in ("known", "read"):
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(tmp_path_factory.mktemp(way))
            if way == "read":
                patch.setattr(command, "run_again", lambda *args: command.MISSED)
            ways.append(run_all(shell, [code, *(code_of.get(cell, cell) for cell in cells)]))
    for known, read in zip(*ways, strict=True):
        assert known == read
