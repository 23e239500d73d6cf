"""What IPython's own transformers do not do for magic lines of this package.

Comment lines above a `%%flax…` line move below it, and a call goes on over lines while a bracket is open.
"""

from __future__ import annotations

import re
import sys

from .source import logical_end, pieces

_CELL = re.compile(r"%%flax\w*")
_LINE = re.compile(r"(?P<before>[ \t]*(?P<target>[^\s%#][^%#\n]*=[ \t]*)?)%(?P<name>flax\w*)(?=[ \t\\])")
_ESCAPED = re.compile(r"[ \t]*(?:[%!?,;/]|[^\n#'\"]*=[ \t]*[%!])")
"""The beginning of a line that IPython reads, and Python does not: its quotes and brackets mean nothing."""


def line_magic_transformer(lines: list[str]) -> list[str]:
    """A transformer for the end of `shell.input_transformers_cleanup`.

    The number of lines does not change, so neither does the number of any line of a body.
    """
    if not any("%flax" in line for line in lines):
        return lines
    first = next((i for i, line in enumerate(lines) if line.strip() and not line.lstrip().startswith("#")), 0)
    if _CELL.match(lines[first]):
        magic, *below = _joined(lines[first:])
        return [magic, *lines[:first], *below]
    if lines[first].startswith("%%"):
        return lines
    # To say whether a cell is complete, IPython looks for an open bracket, and in Python: in a string it is none.
    asked = sys._getframe(1).f_code.co_name == "check_complete"
    return _line_magics("".join(lines), asked).splitlines(keepends=True)


def _joined(lines: list[str]) -> list[str]:
    """A cell with its `%%flax…` line in one piece.

    The lines that it went on over stay, as comments: they keep the numbers of those that follow, and an empty line
    would tell a terminal that the cell is complete.
    """
    text = "".join(lines)
    end = logical_end(text, 0)
    if end is None or "\n" not in text[:end]:
        return lines
    joined, last = "", 0
    for piece in pieces(text[:end]):
        if piece.kind == "string" and "\n" in text[piece.start : piece.end]:
            return lines  # the line must be one, and a string's own newline cannot become a space
        if piece.kind in ("newline", "join", "comment"):
            joined += text[last : piece.start]
            last = piece.end
    joined += text[last:end]
    whole = "\n".join([joined, *(f"# {line}" for line in text[:end].split("\n")[1:])])
    return (whole + text[end:]).splitlines(keepends=True)


def _line_magics(text: str, leave_open: bool) -> str:
    """`text` with each `%flax…` call that goes on over lines rewritten as the Python that IPython would make of it.

    A call whose bracket is never closed takes the rest of the text, as it does in Python, and is told so when it runs;
    with `leave_open` the bracket is left to be found.
    """
    done, position = "", 0
    while position < len(text):
        magic = _magic_at(text, position)
        if magic is None:
            end = _physical_end(text, position) if _ESCAPED.match(text, position) else _statement_end(text, position)
            if end is None:
                break
            done += text[position : end + 1]
        else:
            start = magic.end()
            end = logical_end(text, start)
            call = _open_call(text, start) if end is None else None
            if call is not None:
                if leave_open:
                    return done + magic["before"] + text[call:]
                end = len(text.rstrip())
            if end is None or not _goes_on(text[start:end]):
                end = _physical_end(text, position)
                done += text[position : end + 1]
            else:
                done += magic["before"] + _as_call(magic["name"], text[start:end]) + text[end : end + 1]
        position = end + 1
    return done + text[position:]


def _magic_at(text: str, position: int) -> re.Match[str] | None:
    """The magic line that begins at `position`, up to its name."""
    found = _LINE.match(text, position)
    target = found["target"] if found else None
    if target and (target.rstrip()[-2:-1] in tuple("=!<>+-*/|&^@:") or logical_end(target, 0) is None):
        return None  # no assignment, or the `%` is inside a string or a bracket
    return found


def _physical_end(text: str, position: int) -> int:
    """Index of the newline that ends the line at `position`, lines joined by a backslash being one."""
    end = text.find("\n", position)
    while end > position and text[end - 1] == "\\":
        end = text.find("\n", end + 1)
    return len(text) if end < 0 else end


def _statement_end(text: str, position: int) -> int | None:
    """As `logical_end`; None if the rest of the text is inside a bracket or a string."""
    end = logical_end(text, position)
    if end is None:
        quote = next((piece for piece in pieces(text, position) if piece.kind == "quote"), None)
        if quote is not None and quote.end - quote.start == 1:
            return _physical_end(text, position)  # such as `!echo it's` after a name that IPython calls
    return end


def _goes_on(argument: str) -> bool:
    return any(piece.kind != "join" and "\n" in argument[piece.start : piece.end] for piece in pieces(argument))


def _open_call(text: str, start: int) -> int | None:
    """Where the token begins whose bracket is open at the end of `text`; None if it is not a bracket that is open."""
    opened: list[int] = []
    for piece in pieces(text, start):
        if piece.kind == "quote":
            return None
        if piece.kind == "open":
            opened.append(piece.start)
        elif piece.kind == "close" and opened:
            opened.pop()
    if not opened:
        return None
    call = opened[0]
    while call > start and not text[call - 1].isspace():
        call -= 1
    return call


def _as_call(name: str, argument: str) -> str:
    """The call of a line magic, over as many lines as `argument` has."""
    line = "".join(
        " " if piece.kind == "join" and not piece.depth else argument[piece.start : piece.end]
        for piece in pieces(argument)
    )
    *first, last = line.removeprefix(" ").rstrip().split("\n")
    strings = [*(repr(part + "\n") for part in first), repr(last)]
    filler = "\n" * (argument.count("\n") - len(first))
    return f"get_ipython().run_line_magic({name!r}, " + "\n".join(strings) + filler + ")"
