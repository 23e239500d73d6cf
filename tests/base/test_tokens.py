"""Python text as a cell or a line has it."""

from __future__ import annotations

import ast

from flax_magics.base.tokens import assigned_names


def test_every_binding_is_an_assigned_name() -> None:
    tree = ast.parse(
        """
a, (b, *c) = d.e = f['g'] = (h := 1)
i: int = 1
j: int
k += 1
import l.m, n as o
from p import q, r as s
from t import *
for u, v in w: pass
with x as y, z as (aa, ab): pass
def ac(ad=(ae := 1)): af = 1
async def ag(): pass
@(ah := id)
class ai((aj := object)): ak = 1
try: al = 1
except E as am: an = 1
if (ao := 1): ap = 1
[aq for aq in ar if (au := aq)]
av = lambda aw=(ax := 1): (ay := 2)
match az:
    case [ba, *bb]: pass
    case {'k': bc, **bd}: pass
    case X() as be: bf = 1
while True: bg = 1
global bh
"""
    )
    expected = "a b c h i k l o q s u v y aa ab ac ae ag ai ah aj al an ao ap au av ax ba bb bd bc be bf bg"
    assert " ".join(assigned_names(tree)) == expected
