"""Flax's NNX notebooks and example files, run without a change, against the plain NNX code from the same keys."""

from __future__ import annotations

import importlib.util
import inspect
import sys
import warnings
from typing import Any

import jax
import pytest
from by_hand import bits, keys_of, sown_off, values
from flax import nnx

pytestmark = [pytest.mark.zoo, pytest.mark.filterwarnings("ignore::DeprecationWarning")]

TRAINING = {"deterministic": False, "use_running_average": False, "training": True}


@pytest.fixture
def docs(notebook, docs_cells):
    """Runs cells of a notebook, found by what is in them; `docs(path)` gives the function."""

    def of(path: str) -> Any:
        cells = docs_cells(f"docs_nnx/{path}.ipynb")

        def run(text: str, magic: str = "%%flaxmodel\n") -> None:
            found = [cell for cell in cells if text in cell]
            assert found, f"no cell of {path} has {text!r}"
            notebook(magic + found[0])

        return run

    return of


def only_since(version: str, what: str) -> None:
    """Skips where the installed Flax is older than what is tested."""
    import flax

    if tuple(map(int, flax.__version__.split(".")[:3])) < tuple(map(int, version.split("."))):
        pytest.skip(f"{what} came with Flax {version}")


def check(notebook: Any, name: str, call: str = "", mode: str | None = None, method: str | None = None) -> Any:
    """Two runs of `name(call)` against `nnx.jit` after `nnx.reseed`: output, state and intermediates, no sharp bit."""
    notebook("%flax_key --seed 0")
    net = notebook.session.models[name].module
    sown_off(net)  # of the cell's own calls
    twin = nnx.clone(net)
    for _, part in nnx.iter_graph(twin):
        for switch, value in TRAINING.items() if mode and isinstance(part, nnx.Module) else ():
            if switch in vars(part):
                setattr(part, switch, value if mode == "train" else not value)
    args, kwargs = notebook.shell.ev(f"(lambda *args, **kwargs: (args, kwargs))({call})")
    tags = {str(part.key.tag) for _, part in nnx.iter_graph(twin) if isinstance(part, nnx.RngStream)}
    parameters = inspect.signature(getattr(net, method or "__call__")).parameters
    takes_rngs = "rngs" in parameters or (isinstance(net, nnx.Sequential) and not tags)
    takes_rngs = takes_rngs and not type(net).__module__.startswith("flax.nnx.bridge")

    @nnx.jit
    def by_hand(net: Any, args: Any, rngs: dict[str, Any]) -> Any:
        return getattr(net, method or "__call__")(*args, **static, **rngs)

    static, run = kwargs, None
    for draw in (1, 2):
        notebook(f"%flax_apply -q -o run {'--' + mode if mode else ''} {name}{'.' + method if method else ''}({call})")
        run = notebook["run"]
        nnx.reseed(twin, policy="match_shape", **keys_of(draw)(*tags))
        rngs = nnx.Rngs(**keys_of(draw)("params", "dropout", *sorted(set(run.used) - tags)))
        output = by_hand(twin, args, {"rngs": rngs} if takes_rngs else {})
        assert bits(run.output) == bits(output)
        assert values(run.sown) == values(sown_off(twin))
        assert bits(nnx.state(net)) == bits(nnx.state(twin))
        assert [note for note in run.notes if note.kind != "stream"] == []
    return run


def test_nnx_basics(notebook, docs):
    run = docs("nnx_basics")
    run("from flax import nnx", "")
    run("class Linear(", "")
    run("model = Linear(2, 5")
    check(notebook, "model", "x=jnp.ones((1, 2))")
    run("class Counter(")
    assert check(notebook, "counter").changed == {"Count": 2}
    run("class MLP(")
    for mode in ("train", "eval"):
        check(notebook, "model", "x=jnp.ones((3, 2))", mode)
    run("class LoraLinear(")
    check(notebook, "model", "x=jnp.ones((3, 2))", "train")
    run("class StatefulLinear(")
    check(notebook, "model", "jnp.ones((1, 3))")


def test_mnist_tutorial(notebook, docs):
    run = docs("mnist_tutorial")
    run("class CNN(")
    notebook("image = jax.random.uniform(jax.random.key(42), (1, 28, 28, 1))")
    ran = check(notebook, "model", "image", "train")
    assert ran.changed == {"BatchStat": 2}
    assert set(ran.used) >= {"dropout"} or set(ran.used) == {"default"}
    assert check(notebook, "model", "image", "eval").used == {}


def test_key_concepts(notebook, docs):
    run = docs("key_concepts")
    notebook("from functools import partial\nfrom flax import nnx")
    run("class MLP(", "")
    notebook("%flaxmodel small = MLP(4, 2, nnx.Rngs(0))")
    check(notebook, "small", "x")


def test_surgery(notebook, docs):
    run = docs("guides/surgery")
    notebook("import numpy as np\nfrom flax import nnx")
    run("class TwoLayerMLP(", "")
    run("# Monkey-patching.")
    notebook(
        "%flax_apply -q -o run model(x)"
    )  # a function as a layer, which nnx.jit itself takes in some versions only
    assert bits(notebook["run"].output) == bits(
        nnx.jit(lambda net, x: net(x))(notebook["model"].linear1, notebook["x"])
    )
    notebook("model.linear2 = model.linear1; model.linear1.kernel = nnx.Param(model.linear2.kernel[...] * 2)")
    check(notebook, "model", "x")
    notebook("%flaxmodel lora = nnx.LoRALinear(4, 4, lora_rank=3)")
    check(notebook, "lora", "x")


def test_randomness(notebook, docs):
    run = docs("guides/randomness")
    notebook("from flax import nnx")
    run("model = Model(nnx.Rngs(params=0, dropout=1))\n\ny =")
    assert check(notebook, "model", "x=jnp.ones((1, 20))", "train").used == {"dropout": ("drop",)}
    run("class RNNCell(")
    notebook("h = cell.initial_state(4)")
    assert check(notebook, "cell", "h, jnp.ones((4, 8))").used == {"recurrent_dropout": ("drop",)}


def test_randomness_with_rngs_in_the_call(notebook, docs):
    only_since("0.12.8", "the page's model that takes rngs")
    run = docs("guides/randomness")
    run("y = model(x, rngs=rngs)")
    assert check(notebook, "model", "x").used == {"dropout": ("drop",)}


def test_performance(notebook, docs):
    docs("guides/performance")("class Model(")
    assert check(notebook, "model", "x").changed == {"BatchStat": 2}


def test_transforms(notebook, docs):
    run = docs("guides/transforms")
    run("from jax import numpy as jnp, random", "")
    run("class WeightStack(")
    check(notebook, "weights", "x")
    if not hasattr(nnx, "List"):  # newer versions refuse the page's `+=` on a Variable
        run("class Counter(")
        assert check(notebook, "counter", method="increment").changed == {"Param": 2}


def test_checkpointing(notebook, docs):
    run = docs("guides/checkpointing")
    notebook("from flax import nnx")
    run("class TwoLayerMLP(")
    check(notebook, "model", "x")


def test_bridge_to_nnx(notebook, docs):
    run = docs("guides/bridge_guide")
    notebook("import flax.linen as nn\nfrom flax import nnx\nfrom flax.nnx import bridge\nfrom typing import *")
    run("class LinenDot(")
    check(notebook, "model", "x")
    run("class NNXOuter(")
    check(notebook, "model", "x")
    run("bridge.ToNNX(nn.Dropout(rate=0.5")
    assert check(notebook, "model", "x").used == {"dropout": ("(the model)",)}
    run("class NNXVmapped(")
    check(notebook, "model", "x")
    if hasattr(nnx, "List"):  # older versions cannot read back what they sowed there, in a second call
        run("class LinenMultiCollections(")
        assert check(notebook, "model", "x, mutable=True").changed["counter"] == 2


def test_bridge_to_linen(notebook, docs):
    run = docs("guides/bridge_guide")
    notebook("import flax.linen as nn\nfrom flax import nnx\nfrom flax.nnx import bridge\nfrom typing import *")
    for text in ("class NNXDot(", "class NNXAddConstant(", "class LinenOuter(", "class LinenVmapped("):
        run(text)
        assert_as_linen(notebook, ())
    run("bridge.to_linen(nnx.Dropout, rate=0.5)")
    assert assert_as_linen(notebook, ("dropout",)).used == {"dropout": ("(the model)",)}
    run("class NNXMultiCollections(")
    assert assert_as_linen(notebook, (), mutable=["counts"]).changed == {"counts": 2}


def assert_as_linen(notebook: Any, streams: tuple[str, ...], mutable: Any = False) -> Any:
    """Two runs of the linen module `model` against `jax.jit` of its `apply`."""
    notebook("%flax_key --seed 0 --fresh")
    net, x = notebook["model"], notebook["x"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        variables = net.init(keys_of(1)("params", *streams), x)
    for draw in (1, 2):
        notebook("%flax_apply -q -o run model(x)")
        run = notebook["run"]
        result = jax.jit(lambda v, k: net.apply(v, x, rngs=k, mutable=mutable))(variables, keys_of(draw)(*streams))
        output, updates = result if mutable else (result, {})
        variables = {**variables, **updates}
        assert bits(run.output) == bits(output)
        assert bits(dict(notebook.session.models["model"].variables)) == bits(variables)
        assert run.notes == ()
    return run


def test_extracting_intermediates(notebook, docs):
    only_since("0.12.8", "the page")
    notebook("from flax import nnx")
    docs("guides/extracting_intermediates")("self.sow(nnx.Intermediate, 'activations', x2)")
    ran = check(notebook, "model", "jnp.ones(3)")
    assert set(ran.sown["Intermediate"]) == {"activations"}


def test_pytree(notebook, docs):
    only_since("0.12.8", "the page")
    run = docs("guides/pytree")
    notebook("from flax import nnx")
    run("class MLP(nnx.Module)")
    ran = check(notebook, "model", "x", "train")
    assert ran.sown["Intermediate"]["blocks"]["0"].keys() == {"y_mean"}
    run("self.perturb('xgrad', x)")
    check(notebook, "model", "x")


def test_view(notebook, docs):
    only_since("0.12.8", "nnx.view")
    run = docs("guides/view")
    run("nnx.Linear(2, 4, rngs=rngs), nnx.BatchNorm(4, rngs=rngs), nnx.Dropout(0.1)")
    for name in ("model", "train_model"):
        assert check(notebook, name, "jnp.ones((3, 2))", "train").used == {"dropout": ("layers/2",)}
    check(notebook, "eval_model", "jnp.ones((3, 2))")


def test_machine_translation(notebook, docs):
    only_since("0.12.8", "the page")
    run = docs("examples/machine_translation")
    notebook("from flax import nnx")
    for text in ("class TransformerEncoder(", "class PositionalEmbedding(", "class TransformerDecoder("):
        run(text, "")
    run("class TransformerModel(", "%%flaxmodel net = TransformerModel(5, 11, 8, 8, 2, 0.5)\n")
    notebook("source = jnp.array([[1, 2, 3, 0, 0]]); target = jnp.array([[4, 5, 6, 0, 0]])")
    assert check(notebook, "net", "source, target").used == {"dropout": ("dropout",)}


def test_scan_over_layers(notebook, model_cell):
    model_cell("examples/nnx_toy_examples/06_scan_over_layers.py")
    ran = check(notebook, "model", "x", "train")
    assert ran.changed == {"BatchStat": 2}
    assert ran.used == {"default": ("layers/dropout",)}
    check(notebook, "model", "x", "eval")


def test_parameter_surgery(notebook, model_cell):
    model_cell("examples/nnx_toy_examples/09_parameter_surgery.py")
    notebook("import jax.numpy as jnp; x = jnp.ones((2, 784))")
    check(notebook, "model", "x")


TINY = "num_layers=1, num_embed=11, embed_dim=8, hidden_dim=8, num_heads=2, head_dim=4, num_kv_heads=1, \
final_logit_softcap=30.0, use_post_attn_norm=True, use_post_ffw_norm=True"


@pytest.fixture
def gemma(notebook, model_cell, flax_sdist, monkeypatch):
    """Flax's own Gemma, `transformer.py` as the cell; the files beside it are imported, as in its folder."""
    if importlib.util.find_spec("jaxtyping") is None:
        pytest.skip("the example imports jaxtyping, which is not installed")
    folder, before = str(flax_sdist / "examples/gemma"), set(sys.modules)
    monkeypatch.syspath_prepend(folder)
    notebook("import layers, modules, sow_lib\nimport transformer as of_file\nfrom flax import nnx")
    notebook("AttentionType = modules.AttentionType; Config = of_file.TransformerConfig; del of_file")
    notebook(f"config = Config({TINY}, attention_types=(AttentionType.LOCAL_SLIDING,), sliding_window_size=4)")
    model_cell("examples/gemma/transformer.py", "net = Transformer(config)")
    yield
    for name in set(sys.modules) - before:
        if (getattr(sys.modules[name], "__file__", None) or "").startswith(folder):
            del sys.modules[name]


def test_gemma(notebook, gemma):
    notebook("tokens = jnp.array([[1, 2, 3, 4]]); mask = make_causal_attn_mask(tokens > 0)")
    notebook("positions = build_positions_from_mask(tokens > 0)")
    check(notebook, "net", "tokens, positions, None, mask")


def test_gemma_decodes_with_a_cache_in_the_call(notebook, gemma):
    notebook("cache = net.init_cache(cache_size=4, batch_size=1, dtype=jnp.float32)")
    notebook("token = jnp.array([[3]]); position = jnp.array([[1]]); mask = jnp.array([[[1, 1, 0, 0]]], bool)")
    check(notebook, "net", "token, position, cache, mask")
