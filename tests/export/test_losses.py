"""Exports of `%flax_grad`: the script takes the same gradients by hand, with the digests of the session."""

from __future__ import annotations

from exporting import NNX_NET, NORMED, assert_same, digests_of, exported, printed

LOSS = """\
def loss(net, batch, train, scale=1.0):
    y = net(batch["x"], train=train)
    return scale * (y ** 2).mean(), {"mean": y.mean()}
batch = {"x": x}
"""


def test_a_linen_net_that_its_first_loss_initialises(notebook, tmp_path):
    script = assert_same(
        notebook,
        tmp_path,
        NORMED,
        LOSS,
        "%flax_grad loss(normed, batch)",
        "g = %flax_grad --eval loss(normed, batch, scale=2.0)\nassert g.metrics['mean'].shape == ()",
        "for _ in range(2):\n    %flax_grad -q loss(normed, {'x': 2 * x})",
        "%%flax_grad --freeze Dense_0 --freeze */bias\nhalf = {'x': x / 2}\nloss(normed, half)",
    )
    assert "variables = nn.init(loss, normed)(params_key, batch, train=False)\n" in script
    assert '(value, metrics), updates = nn.apply(loss, normed, mutable=["batch_stats"])(\n' in script
    assert '  return jax.value_and_grad(loss_of, has_aux=True)(variables["params"])\n' in script


def test_a_loss_after_an_init_goes_on_with_its_draw(notebook, tmp_path):
    plain = "def plain(net, x):\n    return net(x).sum()"
    assert_same(notebook, tmp_path, NORMED, plain, "variables = %flax_init normed(x)", "%flax_grad plain(normed, x)")


def test_an_nnx_module(notebook, tmp_path):
    loss = "def loss(net, x):\n    return (net(x) ** 2).mean()"
    script = assert_same(
        notebook,
        tmp_path,
        "from flax import nnx",
        NNX_NET,
        loss,
        "%flax_grad loss(net, x)",
        "g = %flax_grad --eval --freeze hidden loss(net, x)",
        "%flax_apply --train -q net(x);",
        "%flax_grad loss(net, x)",
    )
    assert "  return nnx.value_and_grad(loss)(net, x)\n" in script


def test_what_has_no_lines_is_left_out_and_the_next_draw_is_the_right_one(notebook, tmp_path):
    for cell in (
        NORMED,
        "%flaxmodel teacher = nn.Dense(3)",
        "teacher_variables = %flax_init teacher(x)",
        "def distil(net, x, teacher):\n    return ((net(x) - teacher(x)) ** 2).mean()",
        "variables = %flax_init normed(x)",
        "for _ in range(2):\n    %flax_grad -q distil(normed, x, teacher)",
        "%flax_apply --train normed(x)",
    ):
        notebook(cell)
    script = exported(notebook)
    assert "# Left out: a second net in its call has no lines yet.\n# for _ in range(2):\n" in script
    assert digests_of(printed(script, tmp_path))[-1] == notebook.session.runs[-1].digest
