"""Our own lines of an export, where no formatter is installed: those that are too long become several."""

from __future__ import annotations

import ast

import pytest

from flax_magics.cells.names import Free
from flax_magics.export.writer import LineWriter


@pytest.mark.parametrize(
    "line",
    [
        "y = apply(variables, x)",
        f"    return network.apply(variables, batch, train=True, rngs={{'dropout': key}}, method={'e' * 12!r})",
        f"result = apply(variables, {', '.join(f'argument_{i}=value_{i}' for i in range(9))})",
        f"updates = {{'BatchStat': {{{', '.join(f'{i}: net.norm_{i}.mean' for i in range(4))}}}, 'Count': net.count}}",
        f"net.init(params_key, *[f(a, b) for a in x], method=lambda module, *args: module.{'e' * 20}(*args))",
        f"a_rather_long_name_for_a_key = jax.random.fold_in(root_key, 0xEFE2A5C0)  # stream {'n' * 12!r}",
        f"print_digest('a label, with commas (and brackets)', apply({', '.join(['a_long_name'] * 6)}))",
        f"def train({', '.join(f'parameter_{i}' for i in range(9))}): pass",
        f"flat = traverse_util.flatten_dict(net.init({', '.join(f'argument_{i}' for i in range(8))}))",
    ],
)
@pytest.mark.parametrize("column", [0, 8])
def test_they_keep_to_88_columns_and_mean_the_same(line, column):
    lines = LineWriter(Free(set())).fitted([line.removesuffix(" pass")], column)
    assert max(map(len, lines)) <= 88 - column
    text = "\n".join(lines) + (" pass" if line.endswith(" pass") else "")
    assert ast.dump(ast.parse(text.strip())) == ast.dump(ast.parse(line.strip()))
    assert (lines == [line]) == (len(line) <= 88 - column)
