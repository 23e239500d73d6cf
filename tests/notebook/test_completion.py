"""Tab completion, as a pure function and in the shell's own completer."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flax_magics.line.commands import COMMANDS as COMMANDS_THERE_ARE
from flax_magics.line.options import Command, Option
from flax_magics.notebook.completion import Matcher, completions
from flax_magics.state.handles import ModelNames

COMMANDS = {
    command.name: command
    for command in (
        Command(
            "%flax_apply",
            "",
            "",
            (
                Option("--train", ""),
                Option("--repeat", "", metavar="N", type=int),
                Option("--mutable", "", metavar="NAME", many=True),
                Option("--out", "", metavar="NAME", short="-o"),
            ),
        ),
        Command("%flax_key", "", "", (Option("--seed", "", metavar="N", type=int),), takes="stream"),
        Command("%%flaxmodel", "", "", (Option("--check", "", metavar="CALL", quotes=True),), takes="assignment"),
    )
}
MODELS = {
    "net": ModelNames({"__call__": ("x", "mask", "train"), "encode": ("x", "mode")}, ("num_neurons",), ("noise",)),
    "net2": ModelNames({"__call__": ("x",)}),
}


@pytest.mark.parametrize(
    ("line", "text", "expected"),
    [
        ("%flax_apply --tr", "--tr", ["--train"]),
        ("%flax_apply --", "--", ["--train", "--repeat", "--mutable", "--out", "--help"]),
        ("%flax_apply -", "-", ["--train", "--repeat", "--mutable", "-o", "--out", "-h", "--help"]),
        ("%flax_apply --train --t", "--t", []),
        ("%flax_apply --mutable a --m", "--m", ["--mutable"]),
        ("%flax_apply --repeat ", "", []),
        ("%flax_apply --repeat 3", "3", []),
        ("%flax_apply --repeat 3 --t", "--t", ["--train"]),
        ("%flax_apply --repeat=3 --t", "--t", ["--train"]),
        ("y = %flax_apply --tr", "--tr", ["--train"]),
        ("    y = %flax_apply --tr", "--tr", ["--train"]),
        ("%%flax_apply --tr", "--tr", ["--train"]),
        ("%flaxmodel --", "--", ["--check", "--help"]),
        ("%%flaxmodel --c", "--c", ["--check"]),
        ("%%flaxmodel net = N", "N", []),
        ("%flax_apply ", "", ["net", "net2", "--train", "--repeat", "--mutable", "--out", "--help"]),
        ("%flax_apply n", "n", ["net", "net2"]),
        ("%flax_apply --train n", "n", ["net", "net2"]),
        ("y = %flax_apply net2", "net2", ["net2"]),
        ("%flax_apply net.", "net.", ["net.encode", "net.num_neurons"]),
        ("%flax_apply net.en", "net.en", ["net.encode"]),
        ("%flax_apply net.en", "en", ["encode"]),
        ("%flax_apply net.encode.x", "net.encode.x", []),
        ("%flax_apply nowhere.x", "nowhere.x", []),
        ("%flax_apply net(", "", ["x=", "mask=", "train="]),
        ("%flax_apply net(x, t", "t", ["train="]),
        ("%flax_apply net(x, m", "m", ["mask="]),
        ("%flax_apply net.encode(x, m", "m", ["mode="]),
        ("y = %flax_apply --train net(f(x), [1, 2], tr", "tr", ["train="]),
        ("%flax_apply net(mask=m, ", "", ["x=", "train="]),
        ("%flax_apply net(mask=m", "m", []),
        ("%flax_apply net(f(", "", []),
        ("%flax_apply net('", "", []),
        ("%flax_apply net(x)", "", []),
        ("%flax_apply net(x).", ".", []),
        ("%flax_key ", "", ["params", "dropout", "noise", "--seed", "--help"]),
        ("key = %flax_key d", "d", ["dropout"]),
        ("%flax_key --s", "--s", ["--seed"]),
        ("%flax_unknown --", "--", []),
        ("%timeit --", "--", []),
        ("x = net.", "net.", []),
        ("", "", []),
    ],
)
def test_what_is_offered(line: str, text: str, expected: list[str]) -> None:
    assert completions(line, text, COMMANDS, MODELS) == expected


@given(st.text("%flax_apply net.(),='\"[]# -", max_size=30).map("%flax_apply ".__add__), st.text("net-.", max_size=5))
def test_any_line_is_answered(line: str, text: str) -> None:
    assert isinstance(completions(line, text, COMMANDS, MODELS), list)


@pytest.fixture(params=[True, False], ids=["jedi", "no jedi"])
def matcher(request: pytest.FixtureRequest, shell: Any) -> Matcher:
    shell.Completer.use_jedi = request.param
    for name in COMMANDS:
        shell.register_magic_function(lambda line, cell=None: None, "line_cell", name.lstrip("%"))
    matcher = Matcher(shell, lambda: MODELS)
    matcher.install()
    return matcher


def offered(shell: Any, cell: str) -> list[str]:
    """What a notebook is offered at the end of `cell`."""
    from IPython.core.completer import provisionalcompleter

    with provisionalcompleter():
        return [cell[: found.start] + found.text for found in shell.Completer.completions(cell, len(cell))]


@pytest.mark.parametrize(
    ("line", "text", "expected"),
    [
        ("%flax_summary n", "n", ["net", "net2"]),
        ("v = %flax_vars n", "n", ["net", "net2"]),
        ("%flax_summary --d", "--d", ["--depth"]),
        ("s = %flax_summary --b", "--b", ["--backward"]),
        ("%flax_summary --train net.en", "net.en", ["net.encode"]),
        ("%flax_summary net(x, t", "t", ["train="]),
    ],
)
def test_other_commands_are_offered_what_an_apply_is(line: str, text: str, expected: list[str]) -> None:
    assert completions(line, text, COMMANDS_THERE_ARE, MODELS) == expected


@pytest.mark.parametrize(
    ("line", "text", "expected"),
    [
        ("%flax_load ", "", ["b.safetensors", "data/", "b.txt", "with space(1)", "--quiet", "--help"]),
        ("%flax_load b", "b", ["b.safetensors", "b.txt"]),
        ("%flax_load ./b.t", "./b.t", ["./b.txt"]),
        ("%flax_load data/", "data/", ["data/inside"]),
        ("%flax_load .h", ".h", [".hidden"]),
        ("%flax_load none/", "none/", []),
        ("%flax_load -", "-", ["-q", "--quiet", "-h", "--help"]),
        ("%flax_save -q b.s", "b.s", ["b.safetensors"]),
        ("%flax_save --autosave ", "", ["b.safetensors", "data/", "b.txt", "with space(1)"]),
        ("%flax_save --autosave da", "da", ["data/"]),
        ('%flax_load "b', "b", ["b.safetensors", "b.txt"]),
    ],
)
def test_files_are_offered_saved_sessions_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, text: str, expected: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    for name in ("b.txt", "b.safetensors", ".hidden", "data/inside", "with space(1)"):
        (tmp_path / name).touch()
    assert completions(line, text, COMMANDS_THERE_ARE, MODELS) == expected


class TestInTheShell:
    """In the completer of IPython itself."""

    @pytest.mark.parametrize(
        ("cell", "expected"),
        [
            ("%flax_apply --tr", ["%flax_apply --train"]),
            ("y = %flax_apply --tr", ["y = %flax_apply --train"]),
            ("x = 1\ny = %flax_apply --tr", ["x = 1\ny = %flax_apply --train"]),
            ("%flax_apply ne", ["%flax_apply net", "%flax_apply net2"]),
            ("%flax_apply net.en", ["%flax_apply net.encode"]),
            ("%flax_apply net(x, tr", ["%flax_apply net(x, train="]),
            ("%%flaxmodel --ch", ["%%flaxmodel --check"]),
            ("%flax_key drop", ["%flax_key dropout"]),
            ("%flax_k", ["%flax_key"]),
            ("y = %flax_k", ["y = %flax_key"]),
            ("%%flaxm", ["%%flaxmodel"]),
        ],
    )
    def test_a_notebook_is_offered(self, shell: Any, matcher: Matcher, cell: str, expected: list[str]) -> None:
        assert set(expected) <= set(offered(shell, cell))

    @pytest.mark.filterwarnings("ignore::PendingDeprecationWarning")
    def test_the_old_way_of_asking_works_too(self, shell: Any, matcher: Matcher) -> None:
        line = "y = %flax_apply --tr"
        assert shell.complete("--tr", line, len(line)) == ("--tr", ["--train"])

    def test_in_the_place_of_an_option_nothing_else_is_offered(self, shell: Any, matcher: Matcher) -> None:
        if not hasattr(sys.modules["IPython.core.completer"], "SimpleCompletion"):
            pytest.skip("matchers of IPython 7.34 cannot suppress others")
        assert offered(shell, "%flax_apply --tr") == ["%flax_apply --train"]
        shell.user_ns["net"] = 3
        assert offered(shell, "%flax_apply net.") == ["%flax_apply net.encode", "%flax_apply net.num_neurons"]

    def test_names_of_the_namespace_are_offered_beside_arguments(self, shell: Any, matcher: Matcher) -> None:
        shell.user_ns["training_data"] = 3
        found = offered(shell, "%flax_apply net(tr")
        assert {"%flax_apply net(train=", "%flax_apply net(training_data"} <= set(found)

    def test_ordinary_lines_are_left_to_ipython(self, shell: Any, matcher: Matcher) -> None:
        shell.user_ns["variable"] = 3
        before = offered(shell, "vari")
        matcher.uninstall()
        assert offered(shell, "vari") == before
        assert shell.Completer.custom_matchers == []
        matcher.uninstall()

    def test_an_error_is_swallowed(
        self, shell: Any, matcher: Matcher, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail() -> dict[str, ModelNames]:
            raise RuntimeError

        monkeypatch.setattr(matcher, "get_models", fail)
        offered(shell, "%flax_apply --tr")
        assert capsys.readouterr() == ("", "")
