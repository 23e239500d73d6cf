"""A session saved in one kernel and gone on with in another, as nbclient runs them."""

from __future__ import annotations

from sharp_bits import LOAD, MODEL, SETUP

RUNS = """
y = %flax_apply --train my_model(x)
z = %flax_key latent
import flax_magics
digests = [flax_magics.base.digest.digest_of(y), flax_magics.base.digest.digest_of(z)]
print(*digests)
"""
NEXT = RUNS.replace("import flax_magics\n", "import flax_magics, flax_magics.run\n")


def test_another_kernel_goes_on_where_the_first_was_saved(open_notebook):
    first = open_notebook()
    first.run_all([LOAD, SETUP, MODEL, NEXT])
    saved = first.run("%flax_save session.safetensors")
    assert saved.report.startswith("session.safetensors · saved · my_model: 15 parameters · 2 runs ·")
    expected = first.run(NEXT).printed

    second = open_notebook()
    *_, loaded, registered = second.run_all([LOAD, SETUP, "%flax_load session.safetensors", MODEL])
    assert "my_model waits to be registered" in loaded.report
    assert "    class MyModel(nn.Module):" in loaded.report
    assert "class MyModel(nn.Module):" in loaded.displays[0]["text/html"]
    assert registered.report.endswith("variables from session.safetensors")
    assert second.run(NEXT).printed == expected
    assert second.fails("%flax_load none.safetensors").outputs[0].output_type == "error"
