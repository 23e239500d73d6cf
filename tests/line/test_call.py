"""A call read as Python, and evaluated as Python would."""

from __future__ import annotations

import linecache
import traceback
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flax_magics.errors import FlaxMagicsError
from flax_magics.line.call import parse_assignment, parse_call, parse_expression


def refused(function: Any, *args: Any) -> str:
    """The message with which `function` refuses its arguments."""
    with pytest.raises(FlaxMagicsError) as caught:
        function(*args)
    return str(caught.value)


def test_target_method_and_arguments_are_told_apart() -> None:
    parsed = parse_call("net.encoder.embed( x, *rest, train = not z, **more )")
    assert (parsed.target, parsed.method) == ("net", ("encoder", "embed"))
    assert parsed.call == "net.encoder.embed(x, *rest, train=not z, **more)"
    assert parsed.arguments == (
        (None, "x"),
        ("*", "rest"),
        ("train", "not z"),
        ("**", "more"),
    )
    assert not parsed.quiet


@pytest.mark.parametrize(
    ("text", "quiet"),
    [
        ("net(x)", False),
        ("  net(x)  # a comment; with a semicolon;", False),
        ("net(x);", True),
        ("net(x) ;  # why", True),
        ("net(\n  x,  # first (\n  y\n);", True),
        ("net('x;')", False),
        ("# above\nnet(x)", False),
    ],
)
def test_a_semicolon_or_a_comment_may_follow(text: str, quiet: bool) -> None:
    parsed = parse_call(text)
    assert parsed.target == "net"
    assert parsed.quiet is quiet


def test_the_same_text_is_read_once() -> None:
    assert parse_call("net(x, 3)") is parse_call("net(x, 3)")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "%flax_apply needs a call, such as net(x).\n  form: %flax_apply …"),
        ("  # nothing\n", "%flax_apply needs a call, such as net(x).\n  form: %flax_apply …"),
        ("net", "`net` is not a call.\n  form: %flax_apply net(…)"),
        ("net.encode;", "`net.encode;` is not a call.\n  form: %flax_apply net.encode(…)"),
        ("net(x) + 1", "`net(x) + 1` is not one call.\n  write: y = %flax_apply net(x)\n         y + 1"),
        ("net(x)[0]", "`net(x)[0]` is not one call.\n  write: y = %flax_apply net(x)\n         y[0]"),
        (
            "net(x), net(y)",
            "`net(x), net(y)` is not one call.\n"
            "  write: y2 = %flax_apply net(x)\n         y3 = %flax_apply net(y)\n         y2, y3",
        ),
        ("net(x) + y", "`net(x) + y` is not one call.\n  write: y2 = %flax_apply net(x)\n         y2 + y"),
        ("len(net(x)) + 1", "`len(net(x)) + 1` is not one call.\n  write: y = %flax_apply net(x)\n         len(y) + 1"),
        ("f(net(x)) + 1", "`f(net(x)) + 1` is not one call.\n  form: %flax_apply …"),
        ("[net(i) for i in x]", "`[net(i) for i in x]` is not one call.\n  form: %flax_apply …"),
        ("await net(x)", "`await net(x)` is not one call.\n  write: %flax_apply net(x)"),
        ("lambda: net(x)", "`lambda: net(x)` is not one call.\n  form: %flax_apply …"),
        ("net(x", "%flax_apply: '(' was never closed\n  net(x\n     ^"),
        ("net(x))", "%flax_apply: unmatched ')'\n  net(x))\n        ^"),
        ("net(x,\n    y z)", "%flax_apply: invalid syntax. Perhaps you forgot a comma?\n  y z)\n  ^"),
        ("nét('é', y z)", "%flax_apply: invalid syntax. Perhaps you forgot a comma?\n  nét('é', y z)\n           ^"),
        (
            "net('日本', y z)",
            "%flax_apply: invalid syntax. Perhaps you forgot a comma?\n  net('日本', y z)\n              ^",
        ),
        ("net('abc)", "%flax_apply: unterminated string literal (detected at line 1)\n  net('abc)\n      ^"),
        ("net(x=1, x=2)", "%flax_apply: keyword argument repeated: x\n  net(x=1, x=2)\n           ^"),
        ("net((yield))", "%flax_apply: 'yield' outside function\n  net((yield))\n       ^"),
        ("net(\0)", "%flax_apply: source code string cannot contain null bytes\n  net( )\n  ^"),
        (
            "Net(3)(x)",
            "`Net(3)` has no name: register it first.\n  write: %flaxmodel net = Net(3)\n         %flax_apply net(x)",
        ),
        (
            "MyNet(3).encode(x)",
            "`MyNet(3)` has no name: register it first.\n"
            "  write: %flaxmodel my_net = MyNet(3)\n         %flax_apply my_net.encode(x)",
        ),
        (
            "nn.Dense(3)(x)",
            "`nn.Dense(3)` has no name: register it first.\n"
            "  write: %flaxmodel dense = nn.Dense(3)\n         %flax_apply dense(x)",
        ),
        (
            "nets['a'](x)",
            "`nets['a']` has no name: register it first.\n  write: %flaxmodel a = nets['a']\n         %flax_apply a(x)",
        ),
        (
            "nets[0](x)",
            "`nets[0]` has no name: register it first.\n  write: %flaxmodel net = nets[0]\n         %flax_apply net(x)",
        ),
        (
            "net(x).sum()",
            "`net(x).sum()` is more than the model's call.\n  write: y = %flax_apply net(x)\n         y.sum()",
        ),
        (
            "Net(3)(x).sum()",
            "`Net(3)` has no name: register it first.\n"
            "  write: %flaxmodel net = Net(3)\n         y = %flax_apply net(x)\n         y.sum()",
        ),
        (
            "net(x).sum().item()",
            "`net(x).sum().item()` is more than the model's call.\n  write: y = %flax_apply net(x)\n         y.sum().item()",
        ),
        ("y = net(x)", "%flax_apply takes the call alone, and gives its value.\n  write: y = %flax_apply net(x)"),
        (
            "a, b = net(x);",
            "%flax_apply takes the call alone, and gives its value.\n  write: a, b = %flax_apply net(x)",
        ),
        ("for i in x: pass", "`for i in x: pass` is a statement, not a call.\n  form: %flax_apply …"),
        ("z = 3", "%flax_apply takes the call alone, and gives its value.\n  form: z = %flax_apply …"),
        (
            "a = b = net(x)",
            "%flax_apply takes the call alone, and gives its value.\n  write: a = %flax_apply net(x)\n         b = a",
        ),
        (
            "y = net(x) + 1",
            "%flax_apply takes the call alone, and gives its value.\n  write: y2 = %flax_apply net(x)\n         y = y2 + 1",
        ),
        ("net(x); print(y)", "one call at a time.\n  form: %flax_apply net(x)\n        …"),
        ("net(x); net(y)", "one call at a time.\n  write: %flax_apply net(x)\n         %flax_apply net(y)"),
    ],
)
def test_what_is_no_call_is_answered_with_the_line_to_write(text: str, message: str) -> None:
    assert refused(parse_call, text) == message


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("Net(3)(x)", "%flaxmodel net3 = Net(3)\n         %flax_apply net3(x)"),
        ("nets['a'](x)", "%flaxmodel a2 = nets['a']\n         %flax_apply a2(x)"),
        ("net(x).sum()", "y2 = %flax_apply net(x)\n         y2.sum()"),
        ("z = net(x) + 1", "y2 = %flax_apply net(x)\n         z = y2 + 1"),
    ],
)
def test_advice_binds_no_name_that_is_taken(text: str, lines: str) -> None:
    said = refused(lambda text: parse_call(text, taken=frozenset({"net", "net2", "a", "y"})), text)
    assert said.endswith(f"\n  write: {lines}")


def test_a_registration_is_advised_under_a_free_name() -> None:
    said = refused(
        lambda text: parse_assignment(text, taken=frozenset({"net", "dense"})), "Net(3), Net(4), nn.Dense(2)"
    )
    names = "%flaxmodel net2 = Net(3)\n         %flaxmodel net3 = Net(4)\n         %flaxmodel dense2 = nn.Dense(2)"
    assert said == f"one model at a time.\n  write: {names}"


@pytest.mark.parametrize("transform", ["jax.grad", "jax.value_and_grad", "nnx.grad", "jax.jit"])
@pytest.mark.parametrize("command", ["%flax_grad --eval", "%flax_train --steps 3"])
def test_a_loss_in_a_transform_is_advised_alone(transform: str, command: str) -> None:
    assert refused(parse_call, f"{transform}(ce)(net, batch)", command) == (
        f"{command.split()[0]} takes the loss itself: gradients and the compiled program are its own to make.\n"
        f"  write: {command} ce(net, batch)"
    )


def test_the_message_names_the_command_that_was_used() -> None:
    assert refused(parse_call, "net", "%flax_init") == "`net` is not a call.\n  form: %flax_init net(…)"


def test_arguments_are_evaluated_in_pythons_order() -> None:
    seen: list[int] = []

    def note(value: int) -> int:
        seen.append(value)
        return value

    namespace = {"note": note}
    args, kwargs = parse_call("net(a=note(3), *[note(1)], **{'b': note(4)}, c=note(5))").evaluate(namespace)
    assert (args, kwargs) == ((1,), {"a": 3, "b": 4, "c": 5})
    assert seen == [1, 3, 4, 5]


def test_the_target_is_not_looked_up() -> None:
    assert parse_call("nowhere.method(1, b=2)").evaluate({}) == ((1,), {"b": 2})


def test_names_of_the_enclosing_function_are_seen_in_lambdas_and_comprehensions() -> None:
    namespace: dict[str, Any] = {"scale": 10, "x": "hidden"}
    local = {"x": 2, "items": [1, 2]}
    args, _ = parse_call("net([scale * x * i for i in items], (lambda: x + scale)(), x)").evaluate(namespace, local)
    assert args == ([20, 40], 12, 2)
    assert set(namespace) - {"__builtins__"} == {"scale", "x"}


def test_a_lambda_sees_globals_that_change_later() -> None:
    namespace = {"scale": 10}
    (function,), _ = parse_call("net(lambda: scale * x)").evaluate(namespace, {"x": 2})
    namespace["scale"] = 100
    assert function() == 200


def test_a_walrus_binds_in_the_namespace() -> None:
    namespace: dict[str, Any] = {"items": [1, 2]}
    parsed = parse_call("net(y := 3, [last := i for i in items], (lambda: (z := 4))(), y + 1)")
    args, _ = parsed.evaluate(namespace, {"unused": 0})
    assert args == (3, [1, 2], 4, 4)
    assert (namespace["y"], namespace["last"]) == (3, 2)
    assert "z" not in namespace


def test_a_walrus_on_a_local_name_holds_for_the_rest_of_the_call() -> None:
    namespace: dict[str, Any] = {}
    args, _ = parse_call("net(y := 3, y)").evaluate(namespace, {"y": 1})
    assert args == (3, 3)
    assert "y" not in namespace


def test_python_refuses_a_call_under_the_models_name() -> None:
    with pytest.raises(TypeError, match=r"^net\.encode\(\) got multiple values for keyword argument 'a'$"):
        parse_call("net.encode(a=1, **{'a': 2})").evaluate({})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("net(xyy)", "name 'xyy' is not defined.\n  net(xyy)\n      ^\n  did you mean xy?"),
        ("net(1,\n  zebra + 1)", "name 'zebra' is not defined.\n  zebra + 1)\n  ^\n  no cell that was run has made it"),
        (
            "net([q9 for i in [1]])",
            "name 'q9' is not defined.\n  net([q9 for i in [1]])\n       ^\n  no cell that was run has made it",
        ),
        ("net(mesk)", "name 'mesk' is not defined.\n  net(mesk)\n      ^\n  did you mean mask?"),
        ("net(pirnt)", "name 'pirnt' is not defined.\n  net(pirnt)\n      ^\n  did you mean print?"),
    ],
)
def test_a_name_that_is_not_defined_is_pointed_at(text: str, message: str) -> None:
    assert refused(parse_call(text).evaluate, {"xy": 1, "_xx": 2}, {"mask": 3}) == message


def test_a_name_that_the_users_own_function_misses_is_the_users_error() -> None:
    namespace: dict[str, Any] = {}
    exec("def f():\n    return missing", namespace)
    with pytest.raises(NameError, match=r"^name 'missing' is not defined$"):
        parse_call("net(f())").evaluate(namespace)


def test_an_error_in_an_argument_shows_the_text_of_the_call() -> None:
    linecache.clearcache()
    with pytest.raises(ZeroDivisionError) as caught:
        parse_call("net(1,\n    2 / 0)").evaluate({}, {"x": 1})
    assert "in <module>\n    2 / 0)" in "".join(traceback.format_exception(caught.value))


literals = st.integers(-5, 5).map(str) | st.sampled_from(["a", "b", "'s'", "[a, b]", "a + b", "(lambda: b)()", "None"])
arguments = st.lists(
    literals
    | literals.map(lambda text: f"*[{text}, {text}]")
    | st.tuples(st.sampled_from("pqr"), literals).map("=".join)
    | st.tuples(st.sampled_from("pstu"), literals).map(lambda pair: f"**{{'{pair[0]}': {pair[1]}}}"),
    max_size=5,
)


@given(arguments, st.booleans())
def test_evaluate_equals_pythons_own_call(parts: list[str], local: bool) -> None:
    text = f"net({', '.join(parts)})"
    names = {"a": 1, "b": 2}
    namespace = {"net": lambda *args, **kwargs: (args, kwargs), **names}
    refusal: type[Exception] | None = None
    try:
        expected = eval(text, dict(namespace))
    except (SyntaxError, TypeError) as error:
        refusal = FlaxMagicsError if isinstance(error, SyntaxError) else TypeError

    def ours() -> Any:
        return parse_call(text).evaluate({} if local else dict(names), names if local else None)

    # Not in the handler above: there, Python 3.11 itself raises KeyError for an argument given twice.
    if refusal is not None:
        with pytest.raises(refusal):
            ours()
        return
    args, kwargs = ours()
    assert (repr(args), repr(kwargs)) == (repr(expected[0]), repr(expected[1]))


def test_an_assignment_is_a_name_and_an_expression() -> None:
    name, expression = parse_assignment("net: Net = Net(3, *rest, width=w);  # the model")
    assert name == "net"
    assert expression is not None
    assert expression.source == "Net(3, *rest, width=w)"
    namespace = {"Net": dict, "rest": [4], "w": 5}
    assert expression.construct(namespace) == (dict, (3, 4), {"width": 5})
    assert parse_assignment("net = nets['a']")[1].evaluate({"nets": {"a": 7}}) == 7  # type: ignore[union-attr]
    assert parse_assignment("net") == ("net", None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "%flaxmodel needs a name, such as net = Net(3).\n  form: %flaxmodel …"),
        (
            "a = b = Net(3)",
            "one name at a time: `a = b = …` would give one model two names.\n"
            "  write: %flaxmodel a = Net(3)\n         %flaxmodel b = Net(3)",
        ),
        ("a, b = Net(), Net()", "one name at a time.\n  write: %flaxmodel a = Net()\n         %flaxmodel b = Net()"),
        ("a, b = nets", "one name at a time.\n  form: %flaxmodel … = …"),
        ("Net(), Net()", "one model at a time.\n  write: %flaxmodel net = Net()\n         %flaxmodel net2 = Net()"),
        ("a, b", "one model at a time.\n  write: %flaxmodel a\n         %flaxmodel b"),
        ("a = A(); b = B()", "one model at a time.\n  write: %flaxmodel a = A()\n         %flaxmodel b = B()"),
        ("class = Net(3)", "`class` is a word of Python, not a name.\n  write: %flaxmodel net = Net(3)"),
        ("2net = Net(3)", "`2net` is not a Python name.\n  write: %flaxmodel net = Net(3)"),
        ("my-net = Net(3)", "`my-net` is not a Python name.\n  write: %flaxmodel my_net = Net(3)"),
        ("net =", "`net =` needs a value.\n  form: %flaxmodel net = …"),
        ("net == Net(3)", "write `=`, not `==`.\n  write: %flaxmodel net = Net(3)"),
        ("net := Net(3)", "write `=`, not `:=`.\n  write: %flaxmodel net = Net(3)"),
        ("MyNet(3)", "`MyNet(3)` has no name.\n  write: %flaxmodel my_net = MyNet(3)"),
        ("nets['a'] = Net(3)", "`nets['a']` is not a plain name.\n  write: %flaxmodel a = Net(3)"),
        ("self.net = Net(3)", "`self.net` is not a plain name.\n  write: %flaxmodel net = Net(3)"),
        ("net += 1", "`net += 1` is no name and no assignment.\n  form: %flaxmodel … = …"),
        ("net = Net(3", "%flaxmodel: '(' was never closed\n  net = Net(3\n           ^"),
        ("net = Net(x=1, x=2)", "%flaxmodel: keyword argument repeated: x\n  net = Net(x=1, x=2)\n                 ^"),
    ],
)
def test_what_is_no_assignment_is_answered_with_the_line_to_write(text: str, message: str) -> None:
    assert refused(parse_assignment, text) == message


def test_an_undefined_class_is_pointed_at_in_the_whole_assignment() -> None:
    expression = parse_assignment("net = Nett(3)")[1]
    assert expression is not None
    message = "name 'Nett' is not defined.\n  net = Nett(3)\n        ^\n  did you mean Net?"
    assert refused(expression.construct, {"Net": dict}) == message


def test_an_options_value_is_an_expression() -> None:
    assert parse_expression(" {'params': p} ", "--variables").evaluate({"p": 3}) == {"params": 3}
    assert refused(parse_expression, "{'params': p q}", "--variables").startswith("--variables: invalid syntax")


@given(st.text("net(x,)=[]{}.'\"; \n#:*@é\0\\", max_size=20))
def test_any_text_is_read_or_refused_with_a_message(text: str) -> None:
    for parse in (parse_call, parse_assignment):
        try:
            parse(text)
        except FlaxMagicsError as error:
            assert str(error)


def test_one_expression_is_evaluated_and_taken_apart_in_either_order() -> None:
    expression = parse_expression("dict(a=one)", "%flaxmodel")
    for one in (1, 2):
        names = {"one": one}
        assert expression.evaluate(names) == {"a": one}
        assert expression.construct(names) == (dict, (), {"a": one})
