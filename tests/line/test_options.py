"""The options of a command line: what is read, and what a person is told."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flax_magics.errors import FlaxMagicsError
from flax_magics.line.commands import COMMANDS
from flax_magics.line.options import Command, Option, read

RUN = Command(
    "%run",
    "%run [options] net(x)",
    "one forward pass",
    "A second paragraph, long enough that it has to be broken somewhere before the eightieth column ends.",
    (
        Option("--train", "set the switch to training"),
        Option("--quiet", "say nothing", short="-q"),
        Option("--repeat", "run N times", metavar="N", type=int, was="--times"),
        Option("--mutable", "hand back a collection", metavar="NAME", many=True, is_name=True),
        Option("--variables", "other variables", metavar="EXPR"),
        Option("--check", "check a call", metavar="CALL", quotes=True),
        Option("--out", "bind the Run", metavar="NAME", short="-o", is_name=True),
        Option("--seed", "start again", metavar="N", type=int, least=0),
        Option("--offset", "any number", metavar="N", type=int, least=None),
    ),
    ("%run net(x)", "y = %run --train net(x)"),
    (
        "It fails: what is to be done then is said here, in a line that has to be broken before the eightieth column.",
        "It hangs: interrupt it.",
    ),
)

HELP = """\
%run [options] net(x)

One forward pass.

A second paragraph, long enough that it has to be broken somewhere before the
eightieth column ends.

options:
  --train           set the switch to training
  -q, --quiet       say nothing
  --repeat N        run N times
  --mutable NAME    hand back a collection
  --variables EXPR  other variables
  --check CALL      check a call
  -o, --out NAME    bind the Run
  --seed N          start again
  --offset N        any number
  -h, --help        show this help

examples:
  %run net(x)
  y = %run --train net(x)

what can go wrong:
  It fails: what is to be done then is said here, in a line that has to be
    broken before the eightieth column.
  It hangs: interrupt it."""

LISTED = """
  options: --train  -q/--quiet  --repeat  --mutable  --variables  --check
           -o/--out  --seed  --offset  -h/--help"""


def given_options(line: str) -> dict[str, object]:
    """The options that the line sets, and the rest."""
    found = read(RUN, line)
    defaults = read(RUN, "").options
    return {key: value for key, value in found.options.items() if value != defaults[key]} | {"rest": found.rest}


def test_help_stands_in_eighty_columns() -> None:
    assert RUN.render_help() == HELP
    assert max(map(len, HELP.splitlines())) <= 80


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_each_command_is_explained_in_the_same_way(command: Command) -> None:
    blocks = command.render_help().split("\n\n")
    assert blocks[1] == f"{command.does[0].upper()}{command.does[1:]}."
    assert max(map(len, command.render_help().splitlines())) <= 80
    assert command.help.endswith(".")
    assert 2 <= len(command.examples) <= 3
    assert 1 <= len(command.pitfalls) <= 4
    assert all(pitfall.endswith(".") and pitfall[0].isupper() for pitfall in command.pitfalls)
    # What the result is called, and how little is said of it, come last.
    last = [option.flag for option in command.options if option.flag in ("--out", "--quiet")]
    assert [option.flag for option in command.options][len(command.options) - len(last) :] == last
    assert last == sorted(last)
    # `;` is explained where it first stands.
    silenced = [line for example in command.examples for line in example.splitlines() if ";" in line]
    assert all("keeps the value from being printed" in line for line in silenced[:1])


def test_every_option_has_its_default_when_nothing_is_given() -> None:
    assert read(RUN, "").options == {
        "train": False,
        "quiet": False,
        "repeat": None,
        "mutable": (),
        "variables": None,
        "check": None,
        "out": None,
        "seed": None,
        "offset": None,
    }


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("net(x)", {"rest": "net(x)"}),
        ("--train net(x)", {"train": True, "rest": "net(x)"}),
        ("  --train   -q  net( x )  ", {"train": True, "quiet": True, "rest": "net( x )"}),
        ("--repeat 20 net(x)", {"repeat": 20, "rest": "net(x)"}),
        ("--repeat=20 net(x)", {"repeat": 20, "rest": "net(x)"}),
        ("-o run net(x)", {"out": "run", "rest": "net(x)"}),
        ("-o=run net(x)", {"out": "run", "rest": "net(x)"}),
        ("--mutable a --mutable b net(x)", {"mutable": ("a", "b"), "rest": "net(x)"}),
        ("--variables {'params': p} net(x)", {"variables": "{'params': p}", "rest": "net(x)"}),
        ("--variables={'params': p} net(x)", {"variables": "{'params': p}", "rest": "net(x)"}),
        ("--variables f(a, 'b c')[0] net(x)", {"variables": "f(a, 'b c')[0]", "rest": "net(x)"}),
        ("--variables 'p' net(x)", {"variables": "'p'", "rest": "net(x)"}),
        ("--check 'net(x, train=False)' net", {"check": "net(x, train=False)", "rest": "net"}),
        ("--check \"net('a')\" net", {"check": "net('a')", "rest": "net"}),
        (r"--check 'net(\'a\')' net", {"check": "net('a')", "rest": "net"}),
        ("--check '''net(x)''' net", {"check": "net(x)", "rest": "net"}),
        ("--check net(x, train=False) net", {"check": "net(x, train=False)", "rest": "net"}),
        ("--check 'a'+'b' net", {"check": "'a'+'b'", "rest": "net"}),
        ("--seed 0", {"seed": 0, "rest": ""}),
        ("--offset -3 net(x)", {"offset": -3, "rest": "net(x)"}),
        ("-- --train", {"rest": "--train"}),
        ("net(x, '--train')", {"rest": "net(x, '--train')"}),
        ("net(x, - -train)", {"rest": "net(x, - -train)"}),
        ("net(x)  # not --train", {"rest": "net(x)  # not --train"}),
        ("net(x -q)", {"rest": "net(x -q)"}),
        ("--train net(x,\n    y)", {"train": True, "rest": "net(x,\n    y)"}),
        ("net(x);", {"rest": "net(x);"}),
    ],
)
def test_options_come_before_the_call(line: str, expected: dict[str, object]) -> None:
    assert given_options(line) == expected


def test_offset_is_the_place_of_the_rest_in_the_line() -> None:
    line = "  --repeat 3  --train   net(x)  "
    found = read(RUN, line)
    assert line[found.offset :].startswith("net(x)")
    assert found.rest == "net(x)"


@pytest.mark.parametrize("line", ["--help", "-h", "--train --help net(x)", "net(x) --help", "net(x) -h"])
def test_help_may_be_asked_for_anywhere(line: str) -> None:
    assert read(RUN, line).help


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--trian net(x)", f"%run has no option --trian: did you mean --train?{LISTED}\n  write: %run --train net(x)"),
        ("--tr net(x)", f"%run has no option --tr: did you mean --train?{LISTED}\n  write: %run --train net(x)"),
        ("-train net(x)", f"%run has no option -train: did you mean --train?{LISTED}\n  write: %run --train net(x)"),
        ("—train net(x)", f"%run has no option —train: did you mean --train?{LISTED}\n  write: %run --train net(x)"),
        ("--zzz net(x)", f"%run has no option --zzz.{LISTED}"),
        ("net(x) --zzz", f"%run has no option --zzz.{LISTED}"),
        ("--times 3 net(x)", "--times is called --repeat now.\n  write: %run --repeat 3 net(x)"),
        ("net(x) --times=3", "--times is called --repeat now.\n  write: %run --repeat=3 net(x)"),
        ("--times net(x)", "--times is called --repeat now.\n  write: %run --repeat 20 net(x)"),
        ("--train=True net(x)", "--train takes no value.\n  write: %run --train net(x)"),
        ("--repeat net(x)", "--repeat needs a positive whole number, not net(x).\n  write: %run --repeat 20 net(x)"),
        ("--repeat 0 net(x)", "--repeat needs a positive whole number, not 0.\n  write: %run --repeat 20 net(x)"),
        ("--repeat 2.5 net(x)", "--repeat needs a positive whole number, not 2.5.\n  write: %run --repeat 20 net(x)"),
        ("--repeat", "--repeat needs a positive whole number.\n  form: %run --repeat 20 …"),
        ("--repeat=", "--repeat needs a positive whole number.\n  form: %run --repeat 20 …"),
        (
            "--repeat --train net(x)",
            "--repeat needs a positive whole number.\n  write: %run --repeat 20 --train net(x)",
        ),
        ("--seed -1", "--seed needs a whole number from 0 on, not -1.\n  form: %run --seed 0 …"),
        ("--offset x", "--offset needs a whole number, not x.\n  form: %run --offset 0 …"),
        ("-o net(x)", "-o needs a Python name, not net(x).\n  form: %run -o … net(x)"),
        ("--train -o 5x net(x)", "-o needs a Python name, not 5x.\n  form: %run --train -o … net(x)"),
        ("--variables", "--variables needs a value (EXPR).\n  form: %run --variables … …"),
        (
            "net(x) --variables",
            "options come first: --variables stands after `net(x)`.\n  form: %run --variables … net(x)",
        ),
        ("net(x) --train", "options come first: --train stands after `net(x)`.\n  write: %run --train net(x)"),
        (
            "--train net(x) --repeat 3;",
            "options come first: --repeat stands after `net(x)`.\n  write: %run --train --repeat 3 net(x)",
        ),
        (
            "--variables {'params': p net(x)",
            "%run: '{' was never closed\n  %run --variables {'params': p net(x)\n                   ^",
        ),
        ("--check 'net(x) net", "%run: unterminated string literal\n  %run --check 'net(x) net\n               ^"),
        ("--variables p) net(x)", "%run: unmatched ')'\n  %run --variables p) net(x)\n                    ^"),
        (
            "--variables {p) net(x)",
            "%run: ')' does not match '{'\n  %run --variables {p) net(x)\n                     ^",
        ),
    ],
)
def test_a_mistake_says_what_and_what_to_write(line: str, message: str) -> None:
    with pytest.raises(FlaxMagicsError) as caught:
        read(RUN, line)
    assert str(caught.value) == message


names = st.from_regex(r"[a-z][a-z_]{0,8}", fullmatch=True)
values = st.recursive(
    names | st.integers().map(str) | st.text("abc ()[]'\"#=-", max_size=6).map(repr),
    lambda inner: (
        st.lists(inner, max_size=3).map(lambda parts: f"[{', '.join(parts)}]")
        | st.tuples(names, inner).map(lambda pair: f"{pair[0]}({pair[1]})")
        | st.dictionaries(names.map(repr), inner, max_size=2).map(
            lambda d: "{" + ", ".join(f"{key}: {value}" for key, value in d.items()) + "}"
        )
    ),
    max_leaves=5,
)


@given(
    train=st.booleans(),
    repeat=st.none() | st.integers(1, 10**6),
    mutable=st.lists(names, max_size=3),
    variables=st.none() | values.filter(lambda value: not value.startswith("-")),
    equals=st.booleans(),
    space=st.sampled_from([" ", "  ", "\t"]),
    argument=values,
)
def test_what_is_written_is_read_back(
    train: bool, repeat: int | None, mutable: list[str], variables: str | None, equals: bool, space: str, argument: str
) -> None:
    between = "=" if equals else space
    parts = ["--train"] * train
    parts += [] if repeat is None else [f"--repeat{between}{repeat}"]
    parts += [f"--mutable{between}{name}" for name in mutable]
    parts += [] if variables is None else [f"--variables{between}{variables}"]
    call = f"net({argument})"
    found = read(RUN, space.join([*parts, call]))
    assert found.rest == call
    expected = {"train": train, "repeat": repeat, "mutable": tuple(mutable), "variables": variables}
    assert {key: found.options[key] for key in expected} == expected


@given(st.text("-abtrin =()[]{}'\"#\\\n;é—", max_size=30))
def test_any_line_is_read_or_refused_with_a_message(line: str) -> None:
    try:
        found = read(RUN, line)
    except FlaxMagicsError as error:
        assert str(error)
    else:
        assert found.help or line[found.offset :].startswith(found.rest)
