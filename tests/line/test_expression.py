"""The line of a run, written otherwise: its other options and arguments stay as they were."""

from __future__ import annotations

import inspect

import pytest

from flax_magics.line.expression import Line, without_option


def takes(x, noise=None, *rest, mask=None, other=None):
    return x


SIGNATURE = inspect.signature(takes)


def line(call: str) -> Line:
    return Line("%flax_apply --train -o run", call, SIGNATURE)


@pytest.mark.parametrize(
    ("call", "name", "expected"),
    [
        ("net(x, k)", "noise", "net(x, new)"),
        ("net(x, noise=s.key)", "noise", "net(x, noise=new)"),
        ("net.encode(x, mask=m, noise=keys['a'])", "noise", "net.encode(x, mask=m, noise=new)"),
        ("net(…, noise=…)", "noise", "net(…, noise=new)"),
        ("net(x, k, y)", "rest[0]", "net(x, k, new)"),
        ("net(*arguments)", "noise", None),
        ("net(x, **more)", "noise", None),
        ("net(x, batch)", "noise['key']", None),
    ],
)
def test_an_argument_is_given_another_text(call, name, expected):
    changed = line(call).with_argument(name, "new")
    assert (changed and str(changed)) == (expected and f"%flax_apply --train -o run {expected}")


@pytest.mark.parametrize(
    ("call", "name", "expected"),
    [
        ("net(x, noise=k, mask=m)", "noise", "net(x, mask=m)"),
        ("net(x, k)", "noise", "net(x)"),
        ("net(x, k)", "x", "net(noise=k)"),
        ("net(x, k, y)", "noise", None),
        ("net(x)", "noise", None),
    ],
)
def test_an_argument_is_left_out(call, name, expected):
    changed = line(call).with_argument(name, None)
    assert (changed and changed.call) == expected


@pytest.mark.parametrize(
    ("flag", "value", "expected"),
    [
        ("--eager", "", "%flax_apply --key a --key=b -m c"),
        ("--key", "a", "%flax_apply --key=b --eager -m c"),
        ("--key", "b", "%flax_apply --key a --eager -m c"),
        ("(?:--mutable|-m)", "c", "%flax_apply --key a --key=b --eager"),
        ("--ke", "", "%flax_apply --key a --key=b --eager -m c"),
    ],
)
def test_an_option_is_left_out(flag, value, expected):
    assert without_option("%flax_apply --key a --key=b --eager -m c", flag, value) == expected
