"""Lines of an export that are too long, broken as a formatter would break them."""

from __future__ import annotations

import pytest

from flax_magics.export.wrapping import fitted, remark

KEYS = "params_key, dropout_key, noise_key"


@pytest.mark.parametrize(
    ("line", "broken"),
    [
        ("y = apply(variables, x)", ["y = apply(variables, x)"]),
        (
            f"    return network.apply(variables, batch, train=True, rngs={{'dropout': key}}, method={'e' * 12!r})",
            [
                "    return network.apply(",
                "        variables, batch, train=True, rngs={'dropout': key}, method='eeeeeeeeeeee'",
                "    )",
            ],
        ),
        (
            f"result = apply({KEYS}, another_argument=1, yet_another_argument=2, rngs={{'dropout': dropout_key}})",
            [
                "result = apply(",
                "    params_key,",
                "    dropout_key,",
                "    noise_key,",
                "    another_argument=1,",
                "    yet_another_argument=2,",
                "    rngs={'dropout': dropout_key},",
                ")",
            ],
        ),
        (
            "updates = {'BatchStat': {'norm/mean': net.norm.mean[...], 'norm/var': net.norm.var[...]}, 'Count': n}",
            [
                "updates = {",
                "    'BatchStat': {'norm/mean': net.norm.mean[...], 'norm/var': net.norm.var[...]},",
                "    'Count': n,",
                "}",
            ],
        ),
        (
            f"a_rather_long_name_for_a_key = jax.random.fold_in(root_key, 0xEFE2A5C0)  # stream {'n' * 12}",
            [
                "# stream nnnnnnnnnnnn",
                "a_rather_long_name_for_a_key = jax.random.fold_in(root_key, 0xEFE2A5C0)",
            ],
        ),
        (
            "y = net.apply(variables, x, method=lambda module, *args, **kwargs: module.encoder.dense(*args, **kwargs))",
            [
                "y = net.apply(",
                "    variables,",
                "    x,",
                "    method=lambda module, *args, **kwargs: module.encoder.dense(*args, **kwargs),",
                ")",
            ],
        ),
        (
            "print_digest('a label, with commas (and brackets)', apply_to_everything(variables, inputs))[0](variables)",
            [
                "print_digest('a label, with commas (and brackets)', apply_to_everything(variables, inputs))[0](",
                "    variables",
                ")",
            ],
        ),
    ],
)
def test_it_is_broken_at_its_last_bracket_then_at_commas(line, broken):
    assert fitted([line], "    ") == broken


def test_what_stands_further_right_is_broken_earlier():
    line = f"print_digest('net(x)', train(variables, inputs, {KEYS}))"
    assert fitted([line], "  ") == [line]
    assert fitted([line], "  ", 12) == [
        "print_digest(",
        f"  'net(x)', train(variables, inputs, {KEYS})",
        ")",
    ]
    assert fitted([line], "  ", 20) == [
        "print_digest(",
        "  'net(x)',",
        f"  train(variables, inputs, {KEYS}),",
        ")",
    ]


def test_a_long_remark_goes_on_in_the_next_line():
    assert remark("Left out: " + "a word and another " * 5) == [
        "# Left out: a word and another a word and another a word and another a word and another",
        "# a word and another",
    ]
