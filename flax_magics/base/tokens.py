"""A tokenizer for Python text that may be incomplete: its strings, brackets and comments, and carets for messages.

`tokenize` raises on an open bracket, and `ast` needs complete code. A command line has text after the code, and a cell
that is being typed has no end yet. Of complete text `statements` are parsed, and `assigned_names` are what these bind.
"""

from __future__ import annotations

import ast
import re
import unicodedata
from collections.abc import Callable, Iterator

from .types import Record

# The order counts: a closed string before the lone quote that opens an unclosed one, and triple quotes before single.
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


class Token(Record):
    """One token, `text[start:end]`.

    Attributes:
      kind: `string`, `quote` (the start of an unclosed string), `comment`, `open`, `close` (brackets), `join` (a
        backslash and its newline), `newline`, `space` or `word` (anything else).
      depth: the number of brackets that are open after it.
    """

    kind: str
    start: int
    end: int
    depth: int


class Unbalanced(ValueError):
    """Raised by `token_end` for brackets or quotes that do not match.

    Args:
      reason: in Python's own words, such as `'(' was never closed`.
      position: index of the bracket or quote in the text.
    """

    def __init__(self, reason: str, position: int) -> None:
        super().__init__(reason)
        self.reason = reason
        self.position = position


def pieces(text: str, start: int = 0) -> Iterator[Token]:
    """The tokens of `text` from index `start` on. An unmatched closing bracket leaves the depth at 0."""
    depth = 0
    # Compiled at first use (`re` caches it), so that `%load_ext` does not pay for it.
    for match in re.compile(_PIECE, re.VERBOSE | re.DOTALL).finditer(text, start):
        kind = match.lastgroup or ""
        if kind == "open":
            depth += 1
        elif kind == "close":
            depth = max(depth - 1, 0)
        yield Token(kind, match.start(), match.end(), depth)


def token_end(text: str, start: int) -> int:
    """The end index of the command-line word at `start`, which ends at white space outside strings and brackets.

    Raises:
      Unbalanced: the text ends inside a string or a bracket, or a closing bracket matches no open one.
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
    """The index of the newline that ends the logical line beginning at `start`, or of the end of `text`.

    None if `text` ends with a bracket or string still open.
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
    """Whether `text` ends in a `;`, comments and white space aside: IPython's way to show no output."""
    tokens = [piece for piece in pieces(text) if piece.kind not in ("comment", "space", "newline", "join")]
    return bool(tokens) and tokens[-1].kind == "word" and text[tokens[-1].end - 1] == ";"


def point_at(text: str, position: int) -> str:
    """The line of `text` around index `position`, and below it a caret that points at the position."""
    start = text.rfind("\n", 0, position) + 1
    end = text.find("\n", start)
    # A tab has another width on each screen, and control characters move the terminal's cursor.
    line = re.sub(r"[\x00-\x1f\x7f]", " ", text[start:] if end < 0 else text[start:end])
    indent = len(line) - len(line.lstrip())
    left = line[indent : position - start]
    # East Asian wide characters take two columns each.
    columns = sum(2 if unicodedata.east_asian_width(char) in "WF" else 1 for char in left)
    return f"{line.strip()}\n{' ' * columns}^"


def index_of(text: str, line: int, column: int) -> int:
    """The index in `text` of a position in `ast`'s terms: `line` counts from 1, `column` is in UTF-8 bytes from 0."""
    lines = text.split("\n")  # not `splitlines`, which also splits at form feeds and other separators
    line = min(max(line, 1), len(lines))
    here = lines[line - 1].encode()[: max(column, 0)].decode(errors="ignore")
    return sum(len(above) + 1 for above in lines[: line - 1]) + len(here)


def statements(text: str, transform: Callable[[str], str] = str) -> list[ast.stmt]:
    """The statements of a text, which `transform` first turns into Python; empty where it does not parse."""
    try:
        return ast.parse(transform(text)).body
    except (SyntaxError, ValueError):
        return []


def assigned_names(tree: ast.AST) -> tuple[str, ...]:
    """The names that running `tree` binds in its own scope, in order of first appearance."""
    return tuple(dict.fromkeys(_assigned(tree)))


def _assigned(node: ast.AST, comprehension: bool = False) -> Iterator[str]:
    """Names bound by `node`; `comprehension`: it stands inside one, whose loop variables are its own."""
    children = [*ast.iter_child_nodes(node)]
    match node:
        case ast.FunctionDef() | ast.AsyncFunctionDef():
            yield node.name
            # The body has a scope of its own; decorators and defaults run in this one, and may hold a walrus.
            children = [*node.decorator_list, *node.args.defaults, *(d for d in node.args.kw_defaults if d)]
        case ast.ClassDef():
            yield node.name
            children = [*node.decorator_list, *node.bases, *(keyword.value for keyword in node.keywords)]
        case ast.Lambda():
            children = [*node.args.defaults, *(d for d in node.args.kw_defaults if d)]
        case ast.Import() | ast.ImportFrom():
            for alias in node.names:
                if alias.name != "*":
                    yield alias.asname or alias.name.split(".")[0]
        case ast.AnnAssign(value=None):  # `x: int` binds nothing
            children = []
        case ast.NamedExpr(target=ast.Name(name)):
            yield name
            children = [node.value]
        case ast.ListComp() | ast.SetComp() | ast.DictComp() | ast.GeneratorExp():
            comprehension = True  # its targets are its own, but a walrus inside binds in the scope around it
        case ast.Name(name, ast.Store()) if not comprehension:
            yield name
        case ast.MatchAs(name=str(name)) | ast.MatchStar(name=str(name)) | ast.MatchMapping(rest=str(name)):
            yield name
    for child in children:
        yield from _assigned(child, comprehension)


def variable_name(class_name: str) -> str:
    """A variable name for a class: `MyModel` → `my_model`, `CNN` → `cnn`, `VAE2` → `vae2`; never its own name."""
    name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[^_])(?=[A-Z][a-z])", "_", class_name).lower()
    return name if name != class_name else f"{name}_model"
