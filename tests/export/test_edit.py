"""The names that a piece of a session's code reads, the same on every Python."""

from __future__ import annotations

import ast

import pytest

from flax_magics.export.edit import reads


@pytest.mark.parametrize(
    ("code", "names"),
    [
        ("z = [w for w in range(n)]", {"n", "range"}),
        ("x = x + 1", {"x"}),
        ("x += 1", {"x"}),
        ("def f(a):\n  return [(p.shape, c) for p in a]", {"c"}),
        ("class K:\n  m = [k for k in data]\n  def g(self): return other", {"data", "other"}),
        ("return [(p, q) for p in a]", {"a", "q"}),
        ("await thing(x)", {"thing", "x"}),
        ("from os import *", set()),
        ("try:\n  a\nexcept E as e:\n  print(e)", {"E", "a", "print"}),
    ],
)
def test_variables_of_a_comprehension_are_its_own(code, names):
    assert reads(ast.parse(code).body[0]) == names
