"""Definitions that were replaced before anything read them."""

from __future__ import annotations

import pytest

from flax_magics.export.layout import Item
from flax_magics.export.unread import drop_unread

FIRST = "class Net(nn.Module):\n    width: int = 1"
SECOND = "class Net(nn.Module):\n    width: int = 2"


def left(*codes: str) -> list[str]:
    blocks = [[Item(code.split("\n"))] for code in codes]
    drop_unread(blocks, {"net"})
    return ["\n".join(item.lines) for block in blocks for item in block if item.lines]


def test_an_attempt_that_nothing_read_is_left_out_with_the_model_that_was_made_of_it():
    assert left(FIRST, "net = Net(width=3)", SECOND, "net = Net(width=4)", "y = net.init(key, x)") == [
        SECOND,
        "net = Net(width=4)",
        "y = net.init(key, x)",
    ]


@pytest.mark.parametrize(
    "between",
    [
        "y = Net()",
        "print(Net)",
        "class Around(Net):\n    pass",
        "for _ in range(2):\n    Net()",
        "if x:\n    Net = None",
        "y = build()",
    ],
)
def test_one_that_something_read_stays(between):
    helper = "def build():\n    return Net()"
    if between.startswith("if"):  # binds it, or does not
        assert left(FIRST, between, "y = Net()", SECOND) == [FIRST, between, "y = Net()", SECOND]
    else:
        assert left(helper, FIRST, between, SECOND) == [helper, FIRST, between, SECOND]


def test_a_function_that_reads_it_and_is_not_called_in_between_keeps_nothing():
    helper = "def build():\n    return Net()"
    assert left(helper, FIRST, "z = 1", SECOND, "y = build()") == [helper, "z = 1", SECOND, "y = build()"]


def test_what_may_leave_a_trace_stays():
    registered = "@registry.register\ndef f():\n    pass"
    assert left(registered, registered) == [registered, registered]
    assert left("net = Net(print(1))", "net = Net()") == ["net = Net(print(1))", "net = Net()"]
    assert left("other = Net()", "other = Net()") == ["other = Net()", "other = Net()"]
