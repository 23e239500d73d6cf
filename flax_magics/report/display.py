"""Shows MIME bundles where the host does; on a terminal as text in rich's colours."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

_STYLES = (
    # What stands above a report, the name that it begins with, and the headings of blocks.
    (r"^(?:new session, seed -?\d+(?: · .*)?|\w+ registered: .*)$", "dim"),
    (r"^(?!new session, seed |\w+ registered: )[^\s!#][^·\n]*?(?= · )", "bold"),
    (r"(?<=\n\n)[a-z][^·\n]*(?=\n  \S)", "bold"),
    # The labels of rows, and the titles of columns.
    (
        r"^  (?:replay|roof|steps|out|samples|vars|sown|keys|static|init|jit|wait|run|rate|memory|call|digest|by hand)\b",
        "dim",
    ),
    (r"^  (?:total|FLOPs|writes|note)\b", "dim"),
    (r"^ +(?:draw  +what|module) .*$", "dim"),
    (r"(?<![\w.,])\d[\d.,]* (?:µs|ms|s|min|h)\b", "cyan"),
    (r"^ *! ", "bold yellow"),
    (r"^  (?:write|form|in your model): ", "green"),
)
"""What stands in a report, as regular expressions, and rich's style for it; a later one goes on top of an earlier one."""


def publish(shell: Any, bundle: Mapping[str, object], display_id: str | None = None, *, update: bool = False) -> None:
    """Publishes a MIME bundle in a shell of IPython's; with a `display_id`, it can be updated later."""
    data = dict(bundle)
    if on_terminal(shell) and str(getattr(shell, "colors", "")).lower() != "nocolor":
        data["text/plain"] = coloured(str(data.get("text/plain", "")))
    transient = {} if display_id is None else {"display_id": display_id}
    shell.display_pub.publish(data=data, metadata={}, transient=transient, update=update)


def on_terminal(shell: Any) -> bool:
    """Whether what a shell shows is printed on a terminal: not in a kernel, and neither captured nor piped."""
    with suppress(AttributeError, ValueError):  # `sys.stdout` may be None (pythonw) or closed
        return getattr(shell, "kernel", None) is None and sys.stdout.isatty()
    return False


def coloured(text: str) -> str:
    """The text with the terminal's codes for its parts; as it is where `NO_COLOR` is set or the terminal has no colours."""
    if os.environ.get("NO_COLOR"):
        return text
    from rich.console import Console
    from rich.text import Text

    shown = Text(text)
    for pattern, style in _STYLES:
        shown.highlight_regex(re.compile(pattern, re.MULTILINE), style)
    console = Console()
    with console.capture() as captured:
        console.print(shown, soft_wrap=True, end="")
    return captured.get()
