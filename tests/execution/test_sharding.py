"""Arguments that the user has sharded, on eight devices that are this host; and what is said of a mesh of Explicit axes."""

from __future__ import annotations

import jax
import pytest
from by_hand import SUPPORT
from flax import linen as nn
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from processes import printed_by
from sessions import session_of

X = jax.random.uniform(jax.random.key(42), (16, 4))
SCRIPT = f"""
    import sys
    sys.path.insert(0, {SUPPORT!r})
    import jax, jax.numpy as jnp, numpy as np
    from by_hand import MyModel, bits
    from flax import nnx
    from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
    from sessions import session_of

    class Own(nnx.Module):
        def __init__(self, *, rngs):
            self.linear, self.dropout = nnx.Linear(4, 8, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)
        def __call__(self, x):
            return self.dropout(self.linear(x))

    x = jax.random.normal(jax.random.key(5), (16, 4))
    sharding = NamedSharding(jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,)), P("data"))
    for make in (lambda: MyModel(8, True), lambda: Own(rngs=nnx.Rngs(0))):
        for options in ({{}}, {{"eager": True}}, {{"repeat": 2}}, {{"mode": "eval"}}, {{"samples": 2}}):
            one, many = session_of(make()), session_of(make())
            output, run = one.apply("net", x, **options).output, many.apply("net", jax.device_put(x, sharding), **options)
            # Every bit of a mask; a matmul of fewer rows has other last bits on some processors.
            assert bits(run.output == 0) == bits(output == 0), options
            np.testing.assert_allclose(run.output, output, rtol=1e-5)
            assert (run.device, len(run.output.sharding.device_set)) == ("cpu:0-7", 8)
            assert many.replay(run).agreement.identical
        run = many.apply("net", jax.device_put(2 * x, sharding), mode="train")
        again = many.apply("net", jax.device_put(3 * x, sharding), mode="train")
        assert (again.program, again.device) == ("reused", "cpu:0-7")
        assert len(many.summary("net", jax.device_put(x, sharding)).modules) == 3
    print("done")
"""


@pytest.mark.usefixtures("optimised")
def test_arguments_on_eight_devices_give_the_masks_of_one():
    assert printed_by(SCRIPT, devices=8) == "done\n"


def test_explicit_axes_are_one_message(notebook):
    notebook("%flaxmodel -q net = nn.Dropout(0.5, deterministic=False)")
    notebook(
        "from jax.sharding import AxisType, NamedSharding, PartitionSpec\n"
        "mesh = jax.make_mesh((1,), ('data',), axis_types=(AxisType.Explicit,))\n"
        "x = jax.device_put(x, NamedSharding(mesh, PartitionSpec('data')))"
    )
    for option in ("", "--eager "):
        said = notebook.fails(f"with jax.set_mesh(mesh):\n  y = %flax_apply {option}net(x)")
        assert said == (
            "FlaxMagicsError: net(x) cannot run on a mesh of Explicit axes: a layer leaves open how its result is sharded"
            " (ShardingTypeError). Under Auto axes XLA works it out: put the arrays on such a mesh.\n"
            "  write: import jax\n"
            "         from jax.sharding import AxisType, NamedSharding, PartitionSpec as P\n"
            "         mesh = jax.make_mesh((1,), ('data',), axis_types=(AxisType.Auto,))\n"
            "         jax.set_mesh(mesh)\n"
            "         x = jax.device_put(x, NamedSharding(mesh, P('data')))"
        )
    assert notebook.session.draws == 0


def test_what_is_no_matter_of_axes_is_raised_as_it_is():
    class Wrong(nn.Module):
        def __call__(self, x):
            raise TypeError("no float32[16@data,4]")

    mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,))
    with pytest.raises(TypeError, match="no float32"):
        session_of(Wrong()).apply("net", jax.device_put(X, NamedSharding(mesh, PartitionSpec("data"))))
