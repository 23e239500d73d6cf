"""Python text that may be unfinished: where its strings, brackets and comments are, and how to point at a place in it.

`tokenize` raises on the first open bracket and `ast` needs the whole; a command line, a cell that is being typed and an
error message need neither. What is whole is taken apart by `statements`.
"""

from __future__ import annotations

import ast
import re
import unicodedata
from collections.abc import Callable, Iterator
from typing import NamedTuple

_PIECE = r"""
      (?P<string>'''(?:[^\\]|\\.)*?'''|\"\"\"(?:[^\\]|\\.)*?\"\"\"|'(?:[^'\\\n]|\\.)*'|"(?:[^"\\\n]|\\.)*")
    | (?P<quote>'''|\"\"\"|['"])
    | (?P<comment>\#[^\n]*)
    | (?P<open>[(\[{])
    | (?P<close>[)\]}])
    | (?P<join>\\\r?\n)
    | (?P<newline>\r?\n)
    | (?P<space>[^\S\n]+)
    | (?P<word>[^\s'"\#()\[\]{}\\]+|\\)
"""
_PARTNER = {")": "(", "]": "[", "}": "{"}


class Token(NamedTuple):
    """A stretch of text, `text[start:end]`.

    Attributes:
      kind: `string`, `quote` (a string that is never closed begins here), `comment`, `open`, `close`, `join` (a
        backslash and its newline), `newline`, `space` or `word`.
      depth: how many brackets are open after it.
    """

    kind: str
    start: int
    end: int
    depth: int


class Unbalanced(ValueError):
    """Brackets or quotes that do not match.

    Args:
      reason: such as `'(' was never closed`, in Python's own words.
      position: index of the bracket or quote in the text.
    """

    def __init__(self, reason: str, position: int) -> None:
        super().__init__(reason)
        self.reason = reason
        self.position = position


def pieces(text: str, start: int = 0) -> Iterator[Token]:
    """The pieces of `text` from `start` on; a closing bracket that nothing opened leaves the depth at 0."""
    depth = 0
    # Compiled at first use: loading the extension needs none of it.
    for match in re.compile(_PIECE, re.VERBOSE | re.DOTALL).finditer(text, start):
        kind = match.lastgroup or ""
        if kind == "open":
            depth += 1
        elif kind == "close":
            depth = max(depth - 1, 0)
        yield Token(kind, match.start(), match.end(), depth)


def token_end(text: str, start: int) -> int:
    """Index after the token that begins at `start`: text up to white space that is in no string and no bracket.

    Raises:
      Unbalanced: if it ends inside a string or a bracket, or closes a bracket that was not open.
    """
    opened: list[int] = []
    end = start
    for piece in pieces(text, start):
        if piece.kind in ("space", "newline", "join") and not opened:
            return end
        if piece.kind == "quote":
            raise Unbalanced("unterminated string literal", piece.start)
        if piece.kind == "open":
            opened.append(piece.start)
        elif piece.kind == "close":
            bracket = text[piece.start]
            if not opened:
                raise Unbalanced(f"unmatched '{bracket}'", piece.start)
            if text[opened[-1]] != _PARTNER[bracket]:
                raise Unbalanced(f"'{bracket}' does not match '{text[opened[-1]]}'", piece.start)
            opened.pop()
        end = piece.end
    if opened:
        raise Unbalanced(f"'{text[opened[-1]]}' was never closed", opened[-1])
    return end


def logical_end(text: str, start: int) -> int | None:
    """Index of the newline that ends the logical line begun at `start` (or of the end of `text`).

    None if a bracket or a string is still open there.
    """
    end, depth = start, 0
    for piece in pieces(text, start):
        if piece.kind == "newline" and not piece.depth:
            return piece.start
        if piece.kind == "quote":
            return None
        end, depth = piece.end, piece.depth
    return None if depth else end


def ends_quietly(text: str) -> bool:
    """Whether the last thing in `text`, comments and white space aside, is a `;`."""
    tokens = [piece for piece in pieces(text) if piece.kind not in ("comment", "space", "newline", "join")]
    return bool(tokens) and tokens[-1].kind == "word" and text[tokens[-1].end - 1] == ";"


def point_at(text: str, position: int) -> str:
    """The line of `text` that holds index `position`, and under it a caret at that place."""
    start = text.rfind("\n", 0, position) + 1
    end = text.find("\n", start)
    # Tabs and control characters would move the caret, or the terminal's cursor.
    line = re.sub(r"[\x00-\x1f\x7f]", " ", text[start:] if end < 0 else text[start:end])
    indent = len(line) - len(line.lstrip())
    left = line[indent : position - start]
    # Wide characters take two columns; a caret by their count would stand too far left.
    columns = sum(2 if unicodedata.east_asian_width(char) in "WF" else 1 for char in left)
    return f"{line.strip()}\n{' ' * columns}^"


def index_of(text: str, line: int, column: int) -> int:
    """Index in `text` of a position as `ast` gives it: `line` from 1, `column` in bytes of UTF-8."""
    lines = text.split("\n")
    line = min(max(line, 1), len(lines))
    here = lines[line - 1].encode()[: max(column, 0)].decode(errors="ignore")
    return sum(len(above) + 1 for above in lines[: line - 1]) + len(here)


def statements(text: str, transform: Callable[[str], str] = str) -> list[ast.stmt]:
    """What a text holds as Python, once `transform` has made Python of it; nothing where it is none."""
    try:
        return ast.parse(transform(text)).body
    except (SyntaxError, ValueError):
        return []


def variable_name(class_name: str) -> str:
    """`MyModel` → `my_model`, `CNN` → `cnn`, `VAE2` → `vae2`."""
    name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[^_])(?=[A-Z][a-z])", "_", class_name).lower()
    return name if name != class_name else f"{name}_model"
