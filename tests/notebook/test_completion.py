"""Tab completion, as a pure function and in the shell's own completer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from flax_magics.line.commands import COMMANDS as COMMANDS_THERE_ARE
from flax_magics.line.options import Command, Option
from flax_magics.notebook.completion import Matcher, Names, completions
from flax_magics.state.handles import ModelNames

COMMANDS = {
    command.name: command
    for command in (
        Command(
            "%flax_apply",
            "",
            "",
            "",
            (
                Option("--train", ""),
                Option("--repeat", "", metavar="N", type=int),
                Option("--mutable", "", metavar="NAME", many=True, takes="collection"),
                Option("--out", "", metavar="NAME", short="-o"),
            ),
        ),
        Command("%flax_key", "", "", "", (Option("--seed", "", metavar="N", type=int),), takes="stream"),
        Command("%%flaxmodel", "", "", "", (Option("--check", "", metavar="CALL", quotes=True),), takes="assignment"),
    )
}
MODELS = {
    "net": ModelNames(
        {"__call__": ("x", "mask", "train"), "encode": ("x", "mode")}, ("num_neurons",), ("noise",), ("cache",)
    ),
    "net2": ModelNames({"__call__": ("x",)}),
}
NAMES = Names(models=MODELS)


@pytest.mark.parametrize(
    ("line", "text", "expected"),
    [
        ("%flax_apply --tr", "--tr", ["--train"]),
        ("%flax_apply --", "--", ["--train", "--repeat", "--mutable", "--out", "--help"]),
        ("%flax_apply -", "-", ["--train", "--repeat", "--mutable", "-o", "--out", "-h", "--help"]),
        ("%flax_apply --train --t", "--t", []),
        ("%flax_apply --mutable a --m", "--m", ["--mutable"]),
        ("%flax_apply --repeat ", "", []),
        ("%flax_apply --mutable ", "", ["cache"]),
        ("%flax_apply --mutable cache --mutable ", "", []),
        ("%flax_apply --repeat 3", "3", []),
        ("%flax_apply --repeat 3 --t", "--t", ["--train"]),
        ("%flax_apply --repeat=3 --t", "--t", ["--train"]),
        ("y = %flax_apply --tr", "--tr", ["--train"]),
        ("    y = %flax_apply --tr", "--tr", ["--train"]),
        ("%%flax_apply --tr", "--tr", ["--train"]),
        ("%flaxmodel --", "--", ["--check", "--help"]),
        ("%%flaxmodel --c", "--c", ["--check"]),
        ("%%flaxmodel net = Ne", "Ne", []),
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
        ("%flax_apply net(x, tr", "tr", ["train="]),
        ("%flax_apply net(x, mas", "mas", ["mask="]),
        ("%flax_apply net.encode(x, mo", "mo", ["mode="]),
        ("y = %flax_apply --train net(f(x), [1, 2], tr", "tr", ["train="]),
        ("%flax_apply net(mask=m, ", "", ["x=", "train="]),
        ("%flax_apply net(mask=mas", "mas", []),
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
    assert completions(line, text, COMMANDS, NAMES) == expected


@given(st.text("%flax_apply net.(),='\"[]# -", max_size=30).map("%flax_apply ".__add__), st.text("net-.", max_size=5))
def test_any_line_is_answered(line: str, text: str) -> None:
    assert isinstance(completions(line, text, COMMANDS, NAMES), list)


@pytest.fixture(params=[True, False], ids=["jedi", "no jedi"])
def matcher(request: pytest.FixtureRequest, shell: Any) -> Matcher:
    shell.Completer.use_jedi = request.param
    for name in COMMANDS:
        shell.register_magic_function(lambda line, cell=None: None, "line_cell", name.lstrip("%"))
    matcher = Matcher(shell, lambda: NAMES)
    matcher.install()
    return matcher


def offered(shell: Any, cell: str) -> list[str]:
    """What a notebook is offered at the end of `cell`."""
    from IPython.core.completer import provisionalcompleter

    with provisionalcompleter():
        return [cell[: found.start] + found.text for found in shell.Completer.completions(cell, len(cell))]


def test_a_gradient_is_offered_functions_and_in_their_call_a_model_first() -> None:
    values = {"loss": lambda net, x: net(x), "net": nn.Dense(2), "net_x": np.zeros(2), "_hidden": lambda net: net}
    names = Names(values, MODELS)
    assert completions("%flax_grad ", "", COMMANDS_THERE_ARE, names)[0] == "loss"
    assert completions("%flax_grad net", "net", COMMANDS_THERE_ARE, names) == []
    assert completions("%flax_grad loss(ne", "ne", COMMANDS_THERE_ARE, names) == ["net", "net_x", "next"]
    assert completions("%flax_grad loss(net, ne", "ne", COMMANDS_THERE_ARE, names) == ["net_x", "net", "next"]


@pytest.mark.parametrize(
    ("line", "text", "expected"),
    [
        ("%flax_summary n", "n", ["net", "net2"]),
        ("v = %flax_vars n", "n", ["net", "net2"]),
        ("%flax_summary --d", "--d", ["--depth"]),
        ("s = %flax_summary --b", "--b", ["--backward"]),
        ("%flax_summary --train net.en", "net.en", ["net.encode"]),
        ("%flax_summary net(x, tr", "tr", ["train="]),
        ("g = %flax_grad --fr", "--fr", ["--freeze"]),
    ],
)
def test_other_commands_are_offered_what_an_apply_is(line: str, text: str, expected: list[str]) -> None:
    assert completions(line, text, COMMANDS_THERE_ARE, NAMES) == expected


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
    assert completions(line, text, COMMANDS_THERE_ARE, NAMES) == expected


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
        assert offered(shell, "%flax_apply --tr") == ["%flax_apply --train"]
        shell.user_ns["net"] = 3
        assert offered(shell, "%flax_apply net.") == ["%flax_apply net.encode", "%flax_apply net.num_neurons"]

    def test_ordinary_lines_are_left_to_ipython(self, shell: Any, matcher: Matcher) -> None:
        shell.user_ns["variable"] = 3
        before = offered(shell, "vari")
        matcher.uninstall()
        assert offered(shell, "vari") == before
        assert matcher._hook not in [*shell.Completer.custom_matchers, *shell.Completer.magic_arg_matchers]
        matcher.uninstall()

    def test_an_error_is_swallowed(
        self, shell: Any, matcher: Matcher, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail() -> dict[str, ModelNames]:
            raise RuntimeError

        monkeypatch.setattr(matcher, "get_names", fail)
        offered(shell, "%flax_apply --tr")
        assert capsys.readouterr() == ("", "")


TRAINED = """\
import numpy
@jax.jit
def model_fn(x): return x
class Bayes(nn.Module):
  @nn.compact
  def __call__(self, image, mask=None, z_rng=None, train=False):
    x = nn.BatchNorm(use_running_average=not train)(nn.Dense(2)(image))
    self.sow('intermediates', 'x', x)
    return nn.Dropout(0.5, deterministic=not train)(x)
class Sampler(nnx.Module):
  def __init__(self, rngs):
    self.norm = nnx.BatchNorm(4, rngs=rngs)
  def __call__(self, x):
    return self.norm(x)
bayes, late, sampler = Bayes(), Bayes(), Sampler(nnx.Rngs(0))
image, mean = x, numpy.zeros(3)
most = 3
%flaxmodel -q bayes
%flaxmodel -q sampler
variables = %flax_init -q bayes(image)
%flax_apply -q --train -o first bayes(image);
%flax_apply -q sampler(x);
"""


@pytest.fixture(params=[True, False], ids=["jedi", "no jedi"])
def session_shell(request: pytest.FixtureRequest, notebook: Any) -> Any:
    """A shell with two models that ran, whose completer is asked as a notebook asks it."""
    shell = notebook.shell
    shell.Completer.use_jedi = request.param
    shell.push({"jnp": jnp, "np": np, "nn": nn, "nnx": nnx})
    notebook(TRAINED)
    return shell


FIRST = [
    ("%flax_apply --mutable ", ["batch_stats", "intermediates", "BatchStat", "params", "Param"]),
    ("%flax_apply -m ba", ["batch_stats"]),
    ("%flax_apply --mutable=int", ["intermediates"]),
    ("%flax_apply --keys-of ", ["last", "first", "2", "1"]),
    ("%flax_init --keys-of=f", ["first"]),
    ("y = %flax_apply --train --keys-of 2", ["2"]),
    ("%flax_replay ", ["last", "first", "2", "1", "--step", "--out", "--quiet", "--help"]),
    ("%flax_replay fi", ["first"]),
    ("%flax_apply --key ", ["z_rng", "image", "mask", "train", "x"]),
    ("%flax_apply --key z", ["z_rng"]),
    ("%flax_apply --key z_rng --key m", ["mask"]),
    ("%flax_apply --", ["--train", "--eval", "--samples"]),
    ("%flax_summary --", ["--train", "--eval", "--backward"]),
    ("%flax_apply --train ", ["bayes", "sampler", "--eval"]),
    ("%config FlaxMagics.report = ", ["'auto'", "'line'", "'normal'", "'details'", "'off'"]),
    ("%config FlaxMagics.report='", ["auto", "line", "normal", "details", "off"]),
    ("%config FlaxMagics.report = 'li", ["line"]),
    ("%config FlaxMagics.style = ", ["'auto'", "'text'"]),
    ("%config FlaxMagics.disk_cache = ", ["True", "False"]),
    ("%config FlaxMagics.replay_bytes = ", ["256000000"]),
    ("%config FlaxMagics.notes = {'unu", ["unused key"]),
    ("%config FlaxMagics.notes = ", ["{'dropout': False}", "{'norm': False}"]),
    ("%flaxmodel ", ["late", "bayes", "sampler"]),
    ("%flaxmodel la", ["late"]),
    ("%%flaxmodel sampler_", []),
    ("%flaxmodel net = ", ["Bayes", "Sampler", "bayes", "late", "sampler"]),
    ("%flaxmodel net = Bay", ["Bayes"]),
    ("%flax_vars bayes = ", ["variables"]),
    ("%flax_apply --variables ", ["variables"]),
    ("%flax_apply bayes(", ["x", "image", "mean", "image=", "mask=", "z_rng=", "train="]),
    ("y = %flax_apply --train bayes(im", ["image", "image="]),
    ("%flax_apply bayes(image, m", ["mean", "mask=", "model_fn", "most", "map", "max", "memoryview", "min"]),
    ("%flax_apply bayes(image, mask=m", ["mean", "model_fn", "most", "map", "max", "memoryview", "min"]),
    ("%flax_init bayes([x, {'a': im", ["image"]),
    ("%flax_summary sampler(x * me", ["mean", "memoryview"]),
    ("%flax_grad --eval loss(sam", ["sampler"]),
    ("%flax_grad loss(bayes, im", ["image"]),
]
"""Lines, and what is offered first; all that is, where a letter is typed."""


class TestOfASession:
    """What the completer of IPython itself offers where there are models, runs and arrays."""

    def test_what_can_stand_there_comes_first(self, session_shell: Any) -> None:
        for line, expected in FIRST:
            token = session_shell.Completer.splitter.split_line(line, len(line))
            offers = [text.removeprefix(line.removesuffix(token)) for text in offered(session_shell, line)]
            assert offers[: None if token.isidentifier() or not expected else len(expected)] == expected, line

    def test_the_line_that_makes_a_model_of_a_class_is_offered(self, session_shell: Any) -> None:
        offers = offered(session_shell, "%flaxmodel ")
        assert "%flaxmodel bayes = Bayes(" in offers
        assert "%flaxmodel sampler = Sampler(" in offers

    def test_names_that_begin_with_an_underscore_wait_for_one(self, session_shell: Any) -> None:
        session_shell.user_ns["_hidden"] = jnp.zeros(3)
        assert "%flax_apply bayes(_hidden" not in offered(session_shell, "%flax_apply bayes(")
        assert offered(session_shell, "%flax_apply bayes(_hi") == ["%flax_apply bayes(_hidden"]

    @pytest.mark.parametrize(
        "line", ["%flax_apply bayes('im", "%flax_apply bayes(image).", "%flax_apply bayes(image m"]
    )
    def test_where_no_name_can_begin_it_offers_none(self, session_shell: Any, line: str) -> None:
        text = session_shell.Completer.splitter.split_line(line, len(line))
        names = Names(session_shell.user_ns, MODELS)
        assert completions(line, text, COMMANDS_THERE_ARE, names) == []
