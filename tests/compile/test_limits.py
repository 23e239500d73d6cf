"""What XLA counts in a program, and what the machine reaches: measured once, the device waited for."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from by_hand import Ticks
from sessions import session_of

from flax_magics.base.measures import Cost, Memory, Steady
from flax_magics.compile import compiler as limits_module
from flax_magics.compile.compiler import cost_of, devices_in, dtype_of, limits, with_peak


def compiled(function: Any, *args: Any) -> Any:
    return jax.jit(function).lower(*args).compile()


@pytest.fixture(autouse=True)
def small_and_forgotten(monkeypatch):
    monkeypatch.setattr(limits_module, "_MEASURED", {})
    monkeypatch.setattr(limits_module, "SIDES", {"cpu": 128})
    monkeypatch.setattr(limits_module, "COPIED", {"cpu": 4096})


def test_the_operations_of_a_matmul_are_counted_exactly():
    cost = cost_of(compiled(lambda x: x @ x, jnp.ones((64, 64))))
    assert cost is not None
    assert (cost.flops, cost.loops) == (2 * 64**3, False)
    assert cost.bytes >= 2 * 64 * 64 * 4


def test_a_loop_over_numbers_is_said_and_one_for_random_bits_is_not():
    loop = compiled(lambda x: jax.lax.fori_loop(0, 9, lambda i, x: jnp.sin(x @ x), x), jnp.ones((8, 8)))
    bits = compiled(lambda key: jax.random.normal(key, (8, 8)), jax.random.key(0))
    assert cost_of(loop).loops
    assert not cost_of(bits).loops


def test_a_backend_that_does_not_count_gives_nothing():
    assert cost_of(SimpleNamespace(cost_analysis=Mock(side_effect=NotImplementedError))) is None
    assert cost_of(SimpleNamespace(cost_analysis=dict)) is None
    assert cost_of(SimpleNamespace(cost_analysis=lambda: {"flops": -1.0}, as_text=str)) is None
    assert cost_of(SimpleNamespace(cost_analysis=lambda: {"flops": 4.0}, as_text=str)) == Cost(4.0, 0.0)


def test_the_machine_is_measured_once_for_a_device_a_dtype_and_the_settings():
    (device,) = devices_in(jnp.ones(3))
    found = limits(device, "float32", Ticks())
    assert (found.device, found.dtype, found.flops, found.bytes) == ("cpu:0", "float32", 2 * 128**3, 2 * 4096)
    assert limits(device, "float32", Ticks()) is found
    assert limits(device, "bfloat16", Ticks()) is not found
    with jax.default_matmul_precision("float32"):
        assert limits(device, "float32", Ticks()) is not found


def test_a_device_that_is_full_is_measured_with_less(monkeypatch):
    real = jax.device_put

    class XlaRuntimeError(RuntimeError):
        pass

    def full(x: Any, device: Any) -> Any:
        if x.nbytes > 200_000:
            raise XlaRuntimeError("RESOURCE_EXHAUSTED: out of memory")
        return real(x, device)

    monkeypatch.setattr(limits_module, "SIDES", {"cpu": 512})
    monkeypatch.setattr(jax, "device_put", full)
    (device,) = devices_in(jnp.ones(3))
    assert limits(device, "float32", Ticks()).flops == 2 * 128**3


def test_the_dtype_is_that_of_most_elements_of_the_variables():
    variables = {"a": jnp.ones(3), "b": jnp.ones(9, jnp.bfloat16), "n": jnp.ones(99, jnp.int32)}
    assert dtype_of(variables, jnp.ones(3)) == "bfloat16"
    assert dtype_of({}, {"x": jnp.ones(3, jnp.float16)}) == "float16"
    assert dtype_of({}, {"x": 2}) == "float32"


def test_a_repeated_run_has_its_cost_and_the_limits_where_they_were_asked_for():
    session = session_of(nn.Dense(64, use_bias=False))
    x = jnp.ones((64, 64))
    assert session.apply("net", x).cost is None
    run = session.apply("net", x, repeat=3)
    assert run.cost is not None
    assert run.cost.flops >= 2 * 64**3
    assert run.limits is None
    heard: list[str] = []
    session.services.on_phase = heard.append
    run = session.apply("net", x, roofline=True)
    assert heard[-1] == "measuring what cpu:0 reaches"
    assert len(run.timing.steady.times) == 20
    assert (run.limits.device, run.limits.dtype) == ("cpu:0", "float32")
    json = run.to_json()
    assert json["limits"] == {
        "device": "cpu:0", "dtype": "float32", "flops": run.limits.flops, "bytes": run.limits.bytes,
    }  # fmt: skip
    assert json["cost"] == {"flops": run.cost.flops, "bytes": run.cost.bytes, "loops": False}
    assert session.apply("net", x).cost is None


def test_an_interrupted_measurement_leaves_the_session_as_it_was(monkeypatch):
    session = session_of(nn.Dense(64, use_bias=False))
    session.apply("net", jnp.ones((4, 64)))
    before = session._state
    monkeypatch.setattr(limits_module, "_measure", Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        session.apply("net", jnp.ones((4, 64)), roofline=True)
    assert session._state is before


def test_outliers_are_slow_by_the_quartiles_and_by_a_tenth():
    assert Steady((1.0, 1.0, 9.0, 1.0)).outliers == ()  # too few
    assert Steady((9.0, 1.0, 1.0, 1.0, 1.0)).outliers == (0,)
    assert Steady((1.0,) * 9 + (1.05,)).outliers == ()
    assert Steady((1.0,) * 5 + (1.2,) + (1.0,) * 5 + (3.0,)).outliers == (5, 11)
    assert Steady((1.0, 2.0, 3.0, 4.0, 5.0, 6.0)).outliers == ()


def test_the_peak_is_the_devices_own_where_it_counts():
    memory = Memory(arguments=1, outputs=2, temporaries=3, code=4)
    counts = SimpleNamespace(memory_stats=lambda: {"peak_bytes_in_use": 500})
    more = SimpleNamespace(memory_stats=lambda: {"peak_bytes_in_use": 700})
    silent = SimpleNamespace(memory_stats=lambda: None)
    assert with_peak(memory, [counts, more]).peak == 700
    assert with_peak(memory, [silent]) is memory
    assert with_peak(None, [counts]) is None
    assert memory.analysed == 6
