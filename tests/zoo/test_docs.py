"""Cells of Flax's linen notebooks, those with models as `%%flaxmodel` cells, run without a change."""

from __future__ import annotations

import re
from typing import Any

import flax.linen as nn
import pytest
from by_hand import apply_by_hand, bits, keys_of

pytestmark = pytest.mark.zoo


def run_cells(notebook: Any, cells: list[str], numbers: Any) -> None:
    """Runs cells; one that makes a module registers it, as a person would who puts the magic above it."""
    for number in numbers:
        cell = cells[number]
        makes = re.search(r"^(\w+) = (\w+\.)?[A-Z]\w*\(", cell, re.MULTILINE)
        magic = makes and isinstance(notebook.shell.user_ns.get("nn"), type(nn))
        notebook(f"%%flaxmodel\n{cell}" if magic else cell)


def check(notebook: Any, name: str, call: str, *streams: str, mutable: Any = False, init: str | None = None) -> Any:
    """Two runs of `name(call)` from a restarted root against plain Flax: variables, output, updates, no sharp bit."""
    notebook("%flax_key --seed 0 --fresh")
    net = notebook.session.models[name].module
    args, kwargs = notebook.shell.ev(f"(lambda *args, **kwargs: (args, kwargs))({call})")
    variables = net.init(keys_of(1)("params")["params"], *args, **kwargs)
    for draw in (1, 2) if streams or mutable else (1,):
        notebook(f"%flax_apply -q -o run {name}({call})")
        run = notebook["run"]
        result = apply_by_hand(net, variables, keys_of(draw)(*streams), *args, mutable=mutable, **kwargs)
        output, updates = result if mutable else (result, {})
        variables = {**variables, **updates}
        assert bits(run.output) == bits(output)
        assert bits(dict(notebook.session.models[name].variables)) == bits(variables)
        assert [note for note in run.notes if note.kind != "stream"] == []
        assert set(run.used) == set(streams)
    return run


INTRO = [
    (5, "ExplicitMLP", "x", (), False),
    (8, "ExplicitDense", "x", (), False),
    (9, "Counter", "", (), ["counter"]),
    (10, "Block", "x", ("dropout",), ["batch_stats"]),
    (11, "MLP", "x", (), False),
    (12, "RematMLP", "x", (), False),
    (14, "SimpleScan", "xs", (), False),
]


def test_linen_intro(notebook, docs_cells):
    cells = docs_cells("docs/linen_intro.ipynb")
    run_cells(notebook, cells, [1, 2, 3, 4])
    check(notebook, "model", "x")
    for number, name, call, streams, mutable in INTRO:
        assert f"class {name}(" in cells[number]
        run_cells(notebook, cells, [number])
        assert type(notebook["model"]).__name__ == name
        check(notebook, "model", call, *streams, mutable=mutable)


def test_linen_intro_attention(notebook, docs_cells):
    cells = docs_cells("docs/linen_intro.ipynb")
    run_cells(notebook, cells, [1, 13])
    notebook("%flaxmodel small = model(train=True, qkv_features=4, out_features=4)")
    notebook("small_x = jnp.ones((2, 3, 4))")
    check(notebook, "small", "small_x, small_x", "dropout")


def test_quick_start(notebook, docs_cells):
    cells = docs_cells("docs/quick_start.ipynb")
    notebook(f"%%flaxmodel cnn\n{cells[2]}\ncnn = CNN()")
    check(notebook, "cnn", "jnp.ones((1, 28, 28, 1))")


def test_the_sharp_bits(notebook, docs_cells):
    cells = docs_cells("docs/guides/flax_sharp_bits.ipynb")
    run_cells(notebook, cells, [1, 2])
    notebook("%flax_key --seed 0 --fresh")
    notebook("%flax_apply -q -o run my_model(x)")
    assert bits(notebook.session.models["my_model"].variables) == bits(notebook["variables"])
    assert bits(notebook["run"].output) == bits(notebook["y"])


BASICS = [(12, "ExplicitMLP", False), (15, "SimpleDense", False), (16, "BiasAdderWithRunningMean", ["batch_stats"])]


def test_flax_basics(notebook, docs_cells):
    cells = docs_cells("docs/guides/flax_fundamentals/flax_basics.ipynb")
    run_cells(notebook, cells, [1, 2])
    check(notebook, "model", "x")
    for number, name, mutable in BASICS:
        run_cells(notebook, cells, [number])
        assert type(notebook["model"]).__name__ == name
        check(notebook, "model", "x", mutable=mutable)


def test_model_surgery(notebook, docs_cells):
    cells = docs_cells("docs/guides/model_inspection/model_surgery.ipynb")
    run_cells(notebook, cells, [1])
    notebook(f"%%flaxmodel\n{cells[2]}")
    check(notebook, "CNN", "jnp.ones((1, 28, 28, 1))")


RNG = [
    (5, "rng_module", "", ("rng_stream",)),
    (7, "rng_module_two_streams", "", ("rng_stream1", "rng_stream2")),
    (12, "rng_module", "", ("rng_stream",)),
    (14, "rng_module", "", ("rng_stream",)),
    (16, "model", "jnp.ones((2, 2))", ()),
    (18, "module", "x, train=True", ("dropout",)),
]


def test_rng_guide(notebook, docs_cells):
    cells = docs_cells("docs/guides/flax_fundamentals/rng_guide.ipynb")
    notebook("import flax, flax.linen as nn\nimport jax, jax.numpy as jnp\nimport hashlib")
    for number, name, call, streams in RNG:
        run_cells(notebook, cells, [number])
        check(notebook, name, call, *streams)
