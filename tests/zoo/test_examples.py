"""Flax's example models, their files run as cells without a change, against plain Flax from the same keys."""

from __future__ import annotations

import importlib.util
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from by_hand import apply_by_hand, bits, keys_of

pytestmark = [pytest.mark.zoo, pytest.mark.usefixtures("optimised")]


def applied(notebook: Any, line: str) -> Any:
    """The Run of `%flax_apply LINE`; what its authors do raises no sharp bit, but for the name of their own streams."""
    notebook(f"%flax_apply -q -o run {line}")
    run = notebook["run"]
    assert [note for note in run.notes if note.kind != "stream"] == []
    return run


def variables_of(notebook: Any, name: str) -> dict[str, Any]:
    return dict(notebook.session.models[name].variables)


def test_imagenet_resnet(notebook, model_cell):
    model_cell(
        "examples/imagenet/models.py",
        "net = ResNet(stage_sizes=[1], block_cls=ResNetBlock, num_classes=3, num_filters=4)",
    )
    notebook("image = jax.random.uniform(jax.random.key(42), (2, 16, 16, 3))")
    net, image = notebook["net"], notebook["image"]
    # The authors initialise with the default, train=True, which BatchNorm's statistics do not see.
    variables = net.init(keys_of(1)("params")["params"], image)
    run = applied(notebook, "--eval net(image)")
    assert bits(run.output) == bits(apply_by_hand(net, variables, {}, image, train=False))
    assert bits(variables_of(notebook, "net")) == bits(variables)

    # Training runs under `jax.pmap(…, axis_name='batch')` there, whose own compiler gives other last bits.
    for update in (1, 2):
        run = applied(notebook, "--train net(image)")

        def step(variables, image):
            def on_one_device():
                return net.apply(variables, image, train=True, mutable=["batch_stats"])

            mapped = jax.vmap(on_one_device, axis_name="batch", axis_size=1)()
            return jax.tree.map(lambda leaf: leaf[0], mapped)

        output, updates = jax.jit(step)(variables, image)
        variables = {**variables, **updates}
        assert bits(run.output) == bits(output)
        assert bits(variables_of(notebook, "net")) == bits(variables)
        assert run.changed == {"batch_stats": update}
    assert run.switch == "train=True, axis batch=1 device"
    assert run.program == "reused"


def test_imagenet_resnet_in_bfloat16_and_local_convolutions(notebook, model_cell):
    model_cell("examples/imagenet/models.py", "net = _ResNet1(num_classes=3, num_filters=4, dtype=jnp.bfloat16)")
    notebook("image = jnp.ones((1, 8, 8, 3), jnp.bfloat16)")
    run = applied(notebook, "--eval net(image)")
    net, image = notebook["net"], notebook["image"]
    variables = net.init(keys_of(1)("params")["params"], image)
    assert run.output.dtype == jnp.bfloat16
    assert bits(run.output) == bits(apply_by_hand(net, variables, {}, image, train=False))


def test_vae_with_a_key_as_an_argument(notebook, model_cell):
    model_cell("examples/vae/models.py", "vae = model(latents=3)")
    notebook("x = jax.random.uniform(jax.random.key(42), (2, 784))")
    notebook("z = %flax_key latent")
    vae, x, z = notebook["vae"], notebook["x"], notebook["z"]
    assert bits(z) == bits(keys_of(1)("latent")["latent"])

    run = applied(notebook, "vae(x, z)")
    variables = vae.init(keys_of(2)("params")["params"], x, z)
    assert bits(run.output) == bits(apply_by_hand(vae, variables, {}, x, z))
    assert bits(variables_of(notebook, "vae")) == bits(variables)

    run = applied(notebook, "--key z_rng vae(x)")
    key = keys_of(3)("z_rng")["z_rng"]
    assert bits(run.output) == bits(apply_by_hand(vae, variables, {}, x, key))

    run = applied(notebook, "vae.generate(run.output[1])")
    assert run.output.shape == (2, 784)


FRAMES = "jax.random.randint(jax.random.key(42), (1, 84, 84, 4), 0, 255, dtype='uint8')"


@pytest.mark.parametrize(
    ("path", "line", "given"),
    [
        ("ppo/models.py", "net = ActorCritic(num_outputs=4)", FRAMES),
        ("linen_design_test/dense.py", "net = Dense(features=3)", "x"),
    ],
)
def test_ppo_and_linen_design_test_dense(notebook, model_cell, path, line, given):
    model_cell(f"examples/{path}", line)
    notebook(f"x = {given}")
    net, x = notebook["net"], notebook["x"]
    run = applied(notebook, "net(x)")
    variables = net.init(keys_of(1)("params")["params"], x)
    assert bits(run.output) == bits(apply_by_hand(net, variables, {}, x))
    assert bits(variables_of(notebook, "net")) == bits(variables)


TINY = "emb_dim=8, num_heads=2, num_layers=1, qkv_dim=8, mlp_dim=8, max_len=8"


def test_nlp_seq_transformer(notebook, model_cell):
    model_cell("examples/nlp_seq/models.py", f"net = Transformer(TransformerConfig(16, 5, {TINY}))")
    notebook("tokens = jnp.array([[1, 2, 3, 4]])")
    net, tokens = notebook["net"], notebook["tokens"]
    variables = net.init(keys_of(1)("params")["params"], inputs=tokens, train=False)
    for draw in (1, 2):
        run = applied(notebook, "--train net(inputs=tokens)")
        keys = keys_of(draw)("dropout")
        assert bits(run.output) == bits(apply_by_hand(net, variables, keys, inputs=tokens, train=True))
    assert bits(variables_of(notebook, "net")) == bits(variables)
    run = applied(notebook, "net(inputs=tokens, train=False)")
    assert bits(run.output) == bits(apply_by_hand(net, variables, {}, inputs=tokens, train=False))


def test_lm1b_trains_and_decodes(notebook, model_cell):
    model_cell("examples/lm1b/models.py", f"net = TransformerLM(TransformerConfig(16, 16, {TINY}))")
    notebook("tokens = jnp.array([[1, 2, 3, 4]])")
    tokens = notebook["tokens"]
    config = notebook["TransformerConfig"](16, 16, **eval(f"dict({TINY})"))
    for draw, (mode, deterministic) in enumerate((("--train", False), ("--eval", True)), 1):
        run = applied(notebook, f"{mode} net(tokens)")
        net = notebook["TransformerLM"](config.replace(deterministic=deterministic))
        if draw == 1:
            # By hand the authors initialise in evaluation. Parameters do not know the difference.
            eval_net = notebook["TransformerLM"](config.replace(deterministic=True))
            variables = eval_net.init(keys_of(1)("params")["params"], tokens)
        keys = {} if deterministic else keys_of(draw)("dropout")
        assert bits(run.output) == bits(apply_by_hand(net, variables, keys, tokens))
        assert run.switch == f"config.deterministic={deterministic}"
    assert bits(variables_of(notebook, "net")) == bits(variables)

    notebook(f"fast = TransformerLM(TransformerConfig(16, 16, {TINY}, deterministic=True, decode=True))")
    notebook("%flaxmodel fast")
    notebook("%flax_init fast(tokens)")
    fast = notebook["fast"]
    variables = fast.init(keys_of(3)("params")["params"], tokens)
    step = jax.jit(lambda v, t: fast.apply(v, t, mutable=["cache"]))
    for i in range(3):
        run = applied(notebook, f"fast(tokens[:, {i}:{i + 1}])")
        output, updates = step(variables, tokens[:, i : i + 1])
        variables = {**variables, **updates}
        assert bits(run.output) == bits(output)
    assert bits(variables_of(notebook, "fast")) == bits(variables)


def test_wmt_encodes_and_decodes(notebook, model_cell):
    model_cell("examples/wmt/models.py", f"net = Transformer(TransformerConfig(16, 16, True, True, {TINY}))")
    notebook("source = jnp.array([[1, 2, 3, 4]]); target = jnp.array([[4, 3, 2]])")
    source, target = notebook["source"], notebook["target"]
    config = notebook["net"].config
    run = applied(notebook, "--train net(source, target)")
    net = notebook["Transformer"](config.replace(deterministic=False))
    still = notebook["Transformer"](config.replace(deterministic=True))
    variables = still.init(keys_of(1)("params")["params"], source, target)
    assert bits(variables_of(notebook, "net")) == bits(variables)
    assert bits(run.output) == bits(apply_by_hand(net, variables, keys_of(1)("dropout"), source, target))
    run = applied(notebook, "--eval net.encode(source)")
    assert bits(run.output) == bits(apply_by_hand(still, variables, {}, source, method="encode"))
    notebook("encoded = run.output")
    run = applied(notebook, "--eval net.decode(encoded, source, target)")
    assert bits(run.output) == bits(
        apply_by_hand(still, variables, {}, notebook["encoded"], source, target, method="decode")
    )


def test_seq2seq_samples_inside_a_scan(notebook, model_cell):
    model_cell("examples/seq2seq/models.py", "net = Seq2seq(teacher_force=False, hidden_size=4, vocab_size=6)")
    notebook("a = jax.nn.one_hot(jnp.array([[2, 3, 1]]), 6); b = jax.nn.one_hot(jnp.array([[2, 5, 3, 1]]), 6)")
    net, a, b = notebook["net"], notebook["a"], notebook["b"]
    variables = net.init(keys_of(1)("params")["params"], a, b)
    for draw in (1, 2):
        run = applied(notebook, "net(a, b)")
        assert bits(run.output) == bits(apply_by_hand(net, variables, keys_of(draw)("lstm"), a, b))
    assert bits(variables_of(notebook, "net")) == bits(variables)
    assert set(run.used) == {"lstm"}


def test_sst2_text_classifier(notebook, model_cell):
    fields = "embedding_size=4, hidden_size=4, vocab_size=9, output_size=1, dropout_rate=0.5, word_dropout_rate=0.5"
    model_cell("examples/sst2/models.py", f"net = TextClassifier({fields})")
    notebook("tokens = jnp.array([[2, 3, 4], [5, 6, 0]]); lengths = jnp.array([3, 2])")
    net, tokens, lengths = notebook["net"], notebook["tokens"], notebook["lengths"]
    variables = net.init(keys_of(1)("params")["params"], tokens, lengths, deterministic=True)
    variables = {"params": variables["params"]}
    for draw, mode in enumerate(("--train", "--eval"), 1):
        run = applied(notebook, f"{mode} net(tokens, lengths)")
        keys = keys_of(draw)("dropout") if mode == "--train" else {}
        output, sown = apply_by_hand(
            net, variables, keys, tokens, lengths, deterministic=mode == "--eval", mutable=["intermediates"]
        )
        assert bits(run.output) == bits(output)
        assert bits(dict(run.sown)) == bits(sown)
    assert bits(variables_of(notebook, "net")) == bits(variables)


@pytest.mark.parametrize("net", ["GraphNet", "GraphConvNet"])
def test_ogbg_molpcba(notebook, model_cell, net):
    if importlib.util.find_spec("jraph") is None:
        pytest.skip("the example imports jraph, which is not installed")
    model_cell(
        "examples/ogbg_molpcba/models.py",
        f"net = {net}(latent_size=4, num_mlp_layers=1, message_passing_steps=1, output_globals_size=2, dropout_rate=0.5)",
    )
    notebook(
        "graph = jraph.GraphsTuple(n_node=jnp.array([2]), n_edge=jnp.array([3]), nodes=jnp.ones((2, 3)),"
        " edges=jnp.ones((3, 3)), globals=jnp.zeros((1, 2)), senders=jnp.array([0, 1, 1]), receivers=jnp.array([1, 0, 1]))"
    )
    made, graph = notebook["net"], notebook["graph"]
    run = applied(notebook, "--train net(graph)")
    variables = made.init(keys_of(1)("params")["params"], graph)
    by_hand = made.clone(deterministic=False)
    assert bits(run.output) == bits(apply_by_hand(by_hand, variables, keys_of(1)("dropout"), graph))
    assert bits(variables_of(notebook, "net")) == bits(variables)
