"""IPython in a real terminal, typed into: reports as text, no HTML, and calls that go on over lines."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator

import pytest
from sharp_bits import SETUP

pexpect = pytest.importorskip("pexpect", reason="a pseudo-terminal is driven by pexpect")
if not hasattr(pexpect, "spawn"):
    pytest.skip("pexpect has no pseudo-terminal on this system", allow_module_level=True)

pytestmark = [
    # A pseudo-terminal is made by forking, and the child does nothing but start IPython.
    pytest.mark.filterwarnings(r"ignore:os.fork\(\) was called:RuntimeWarning"),  # JAX's word on it
    pytest.mark.filterwarnings(r"ignore:.*use of forkpty\(\):DeprecationWarning"),  # Python's, from 3.12 on
]

_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b\][^\x07]*\x07")
_ENTERED = "\x1b[?2004l"
"""What prompt_toolkit sends once a line is complete: what follows was printed, not typed."""


class Terminal:
    """A terminal of 80 columns with IPython in it."""

    def __init__(self) -> None:
        options = ["--no-banner", "--no-confirm-exit", "--colors=NoColor", "--HistoryManager.enabled=False"]
        environment = {**os.environ, "TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1"}
        for size in ("COLUMNS", "LINES"):  # set, they would hide the terminal's own
            environment.pop(size, None)
        self.child = pexpect.spawn(
            sys.executable,
            ["-m", "IPython", *options],
            env=environment,
            encoding="utf-8",
            dimensions=(40, 80),
            timeout=60,
        )
        self.prompts = 0
        self.printed()

    def printed(self) -> str:
        """What was printed until the next prompt."""
        self.prompts += 1
        self.child.expect_exact(f"In [{self.prompts}]:")
        text = _ESCAPES.sub("", self.child.before.rpartition(_ENTERED)[2])
        lines = (line.rpartition("\r")[2] for line in text.replace("\r\n", "\n").split("\n"))  # as a terminal shows it
        return "\n".join(line.rstrip() for line in lines).strip("\n")

    def run(self, line: str) -> str:
        """Types a line and gives what it printed."""
        self.child.sendline(line)
        return self.printed()


@pytest.fixture(scope="module")
def terminal(home) -> Iterator[Terminal]:
    terminal = Terminal()
    for line in SETUP.strip().splitlines():
        terminal.run(line)
    assert terminal.run("%load_ext flax_magics") == ""
    terminal.run("net = nn.Dense(3)")
    terminal.run("%flaxmodel net")
    yield terminal
    terminal.child.sendline("exit")
    terminal.child.expect(pexpect.EOF)
    terminal.child.close()


@pytest.mark.smoke
def test_a_report_is_text_in_80_columns(terminal):
    text = terminal.run("y = %flax_apply net(x)")
    lines = text.splitlines()
    assert lines[0] == "new session, seed 0"
    assert re.fullmatch(r"net · as written · \w+:0 · draw 1 of seed 0", lines[1])
    assert "  out   float32[3,4,3]" in lines
    assert "<" not in text
    assert max(map(len, lines)) <= 80


@pytest.mark.parametrize("no_colour", [{}, {"NO_COLOR": "1"}])
def test_a_report_has_the_colours_and_the_width_of_the_terminal(home, no_colour):
    call = f"net({' + '.join(['x'] * 16)})"
    code = f"%load_ext flax_magics\n{SETUP}\nnet = nn.Dense(3)\n%flaxmodel -q net\n%flax_summary {call};"
    environment = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "COLUMNS")}
    command = ["-m", "IPython", "--colors=Linux", "--HistoryManager.enabled=False", "-c", code]
    child = pexpect.spawn(
        sys.executable,
        command,
        env={**environment, "TERM": "xterm", **no_colour},
        encoding="utf-8",
        dimensions=(40, 120),
        timeout=60,
    )
    child.expect(pexpect.EOF)
    text = child.before
    child.close()
    assert ("\x1b[1mnet\x1b[0m · Dense(" in text) is (not no_colour)
    assert 100 < max(map(len, _ESCAPES.sub("", text).splitlines())) <= 120


def test_a_message_breaks_between_words(terminal):
    terminal.child.setwinsize(40, 60)
    lines = terminal.run("%flax_apply --tran net(x)").splitlines()
    terminal.child.setwinsize(40, 80)
    assert lines[:2] == ["FlaxMagicsError: %flax_apply has no option --tran: did you", "  mean --train?"]


@pytest.mark.smoke
@pytest.mark.parametrize(
    "line",
    [
        "%flax_apply -o run net(x);",
        "%flax_summary net(x);",
        "%flax_history",
        "%flax_replay last;",
        "%flax",
        "print(run)",
    ],
)
def test_a_narrow_terminal_has_forty_columns(terminal, line):
    terminal.child.setwinsize(40, 40)
    lines = terminal.run(line).splitlines()
    terminal.child.setwinsize(40, 80)
    assert len(lines) > 0
    assert [wide for wide in lines if len(wide) > 40] == []


def test_a_call_with_an_open_bracket_goes_on_and_runs_when_it_is_closed(terminal):
    terminal.child.sendline("y = %flax_apply net(")
    terminal.child.expect_exact("...:")
    terminal.child.sendline("x)")
    terminal.child.sendline("")  # ends the cell where the closing bracket did not; else it asks for the prompt again
    text = terminal.printed()
    assert re.match(r"net · as written · \w+:0 · draw \d+ · reused · (waited [^·]+ · )?run ", text)


def test_the_runs_of_a_loop_share_a_line_that_is_printed_when_the_cell_ends(terminal):
    text = terminal.run("for _ in range(20): get_ipython().run_line_magic('flax_apply', 'net(x)');")
    lines = [line for line in text.splitlines() if "net ·" in line]
    assert len(lines) == 2
    assert "19 runs" in lines[1]
