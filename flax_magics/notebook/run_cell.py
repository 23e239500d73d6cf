"""Runs the bodies of `%%flax…` cells like ordinary cells, and rewrites magic lines that go on over several lines."""

from __future__ import annotations

import ast
import dis
import operator
import re
import sys
from collections import deque
from collections.abc import Callable, Iterator
from copy import copy
from itertools import starmap
from types import CodeType
from typing import Any

from ..base.tokens import assigned_names, ends_quietly, index_of, logical_end, pieces, point_at
from ..base.types import Record
from ..cells.journal import calling_frame
from ..errors import FlaxMagicsError, written
from ..line.call import CallExpression, parse_call, syntax_error
from ..line.commands import COMMANDS
from ..line.options import read

_VALUE = "__flax_value__"
IN_CELL = "line {line} of this cell"
"""Where a syntax error is. Ours, because for a magic's SyntaxError IPython would show all frames down to the parser."""


def run_body(shell: Any, body: str, line: str, ran: list[int] | None = None) -> tuple[str, ...]:
    """Runs the body of a `%%flaxmodel` cell in the user's namespace, as an ordinary cell.

    Magics and `!commands` work, expressions are displayed as `ast_node_interactivity` says, `__future__` imports hold
    for later cells, and tracebacks and `inspect.getsource` show the user's text with the cell's own line numbers.

    Args:
      shell: an `InteractiveShell`.
      body: the lines below the magic line.
      line: the text of the magic line after the command.
      ran: gets the last line of each statement that has run, counted in the cell.

    Returns:
      The names that it assigned at the top level and that are bound now, in order of first appearance.

    Raises:
      FlaxMagicsError: the body is no Python, or awaits; nothing of it has run.
      Exception: whatever a statement of the body raises; those before it have run.
    """
    cell = _read(shell, body, f"%%flaxmodel {line}".rstrip())
    _run(shell, cell.tree.body, cell, shell.ast_node_interactivity, [] if ran is None else ran)
    return tuple(name for name in assigned_names(cell.tree) if name in shell.user_ns)


def run_statements_with_call(
    shell: Any,
    body: str,
    line: str = "",
    command: str = "%%flax_apply",
    *,
    taken: frozenset[str] = frozenset(),
    ran: list[int] | None = None,
) -> tuple[CallExpression, Callable[[Any], None] | None]:
    """Runs all statements of a body but the last, which must be a call with or without assignment.

    Arguments and errors are those of `run_body`; `command` is the magic, `taken` as in `parse_call`. The last statement is
    read before anything runs.

    Returns:
      The call, quiet if the body ends in `;`; and a function that assigns its value, None for a call alone.
    """
    first = f"{command} {line}".rstrip()
    cell = _read(shell, body, first)
    if not cell.tree.body:
        raise FlaxMagicsError(f"{command} needs a call in the cell.", form=f"{first}\n…")
    *statements, last = cell.tree.body
    value = getattr(last, "value", None)
    if not isinstance(last, (ast.Expr, ast.Assign, ast.AnnAssign, ast.AugAssign)) or not isinstance(value, ast.Call):
        pointed = point_at(cell.source, index_of(cell.source, last.lineno, last.col_offset))
        message = f"the last statement of a {command} cell is the call."
        raise FlaxMagicsError(message, hint=pointed, form=f"{first}\n…\ny = …")
    typed = _magic_argument(value)
    if typed is not None:
        message = f"the last line of a {command} cell is the call itself, without a magic."
        options, call_text = typed
        start, end = (index_of(cell.source, node.lineno, node.col_offset) for node in (last, value))
        lines = (f"{first} {options}".rstrip(), *(["…"] if statements else []), cell.source[start:end] + call_text)
        raise FlaxMagicsError(message, **written("\n".join(lines)))
    # The text as it was written, which reports and exports show.
    call_text = ast.get_source_segment(cell.source, value) or ast.unparse(value)
    call = parse_call(call_text, first.replace("%%", "%", 1), taken)._replace(quiet=cell.quiet)
    interactivity = "all" if shell.ast_node_interactivity == "all" else "none"
    _run(shell, statements, cell, interactivity, [] if ran is None else ran)
    return call, None if isinstance(last, ast.Expr) else _assigner(last, cell.filename, shell.user_ns)


def displayed_quietly(shell: Any, line: str) -> bool:
    """Whether the value of the running line magic would be displayed, if its `line` did not end in `;`.

    `y = %flax_apply net(x);` must give `y` its value, and `%flax_apply net(x);` alone must leave `Out` as it is.
    IPython looks for the `;` in the transformed cell, where it is inside a string, and its decorator
    `output_can_be_silenced` (IPython ≥ 8.9) drops the value of an assignment too. So this looks at what the calling
    code does next: the code of a displayed expression prints the value at once.
    """
    return ";" in line and ends_quietly(line) and displayed(shell)


def displayed(shell: Any) -> bool:
    """Whether the value of the running line magic is about to be displayed, and not used otherwise."""
    name, argument, _ = _following(shell)
    # The instruction of a displayed expression: PRINT_EXPR up to Python 3.11, later the intrinsic number 1.
    return name == "PRINT_EXPR" or (name, argument) == ("CALL_INTRINSIC_1", 1)


def assigned_to(shell: Any) -> str | None:
    """The notebook's name that the value of the running line magic is about to be assigned to; None for none."""
    name, _, target = _following(shell)
    return target if name in ("STORE_NAME", "STORE_GLOBAL") else None


def _following(shell: Any) -> tuple[str, int | None, Any]:
    """The next instruction of the cell's code: what is done with the value of the running line magic.

    Returns its name, its argument, and what that stands for; the name is empty if no cell is running.
    """
    frame = calling_frame(shell.user_global_ns, sys._getframe())
    if frame is None:
        return "", None, None
    # There is always one: a call is never the last instruction.
    following = next(step for step in dis.get_instructions(frame.f_code) if step.offset > frame.f_lasti)
    return following.opname, following.arg, following.argval


class _Cell(Record):
    tree: ast.Module
    source: str
    filename: str
    quiet: bool


def _read(shell: Any, body: str, magic_line: str) -> _Cell:
    """Parses the body as IPython would, with line numbers of the whole cell."""
    # IPython strips empty lines at the top, which count in the cell's line numbers.
    above = next((i for i, line in enumerate(body.splitlines()) if line.strip()), 0)
    # The magic line becomes a comment, so that the text is Python for `inspect.getsource`.
    source = f"# {magic_line}\n" + "\n" * above + shell.transform_cell(body)
    # The cell as it was typed: kernels name cells, and debuggers find them, by a hash of that text.
    typed = (getattr(getattr(shell, "history_manager", None), "input_hist_raw", None) or [""])[-1]
    if not body.strip() or body.strip() not in typed or not typed.lstrip().startswith("%%"):
        typed = f"{magic_line}\n{body}"
    # The number that IPython shows: 7.34 counts after the cell, 9 before it.
    filename = shell.compile.cache(source, shell.displayhook.prompt_count, raw_code=typed)
    try:
        tree = shell.compile.ast_parse(source, filename=filename)
    except (SyntaxError, ValueError, OverflowError, MemoryError) as error:
        raise syntax_error(source, error, IN_CELL) from None
    tree = shell.transform_ast(tree)
    waiting = next(_awaits(tree), None)
    if waiting is not None:
        pointed = point_at(source, index_of(source, waiting.lineno, waiting.col_offset))
        message = f"`await` cannot be used at the top level of a {magic_line.split(' ')[0]} cell."
        raise FlaxMagicsError(message, hint=f"{pointed}\nawait in a cell of its own, and use the value here")
    return _Cell(tree, source, filename, ends_quietly(source))


def _run(shell: Any, nodes: list[ast.stmt], cell: _Cell, interactivity: str, ran: list[int]) -> None:
    """Compiles all of `nodes`, then runs them one by one, as `InteractiveShell.run_ast_nodes` does."""
    if interactivity == "last_expr_or_assign" and nodes:
        match nodes[-1]:
            case ast.Assign([ast.Name(name)]) | ast.AugAssign(ast.Name(name)) | ast.AnnAssign(ast.Name(name)):
                # Displaying `y` after `y = …` takes an expression of its own.
                shown = ast.Expr(ast.Name(name, ast.Load()))
                nodes = [*nodes, ast.fix_missing_locations(ast.copy_location(shown, nodes[-1]))]
    codes: list[CodeType] = []
    for node in nodes:
        is_shown = interactivity == "all" or (
            node is nodes[-1] and (interactivity == "last" or ("expr" in interactivity and isinstance(node, ast.Expr)))
        )
        single = is_shown and not cell.quiet
        module = ast.Interactive([node]) if single else ast.Module([node], [])
        try:
            # The shell's compiler passes `__future__` flags on to what it compiles next.
            codes.append(shell.compile(module, cell.filename, "single" if single else "exec"))
        except (SyntaxError, ValueError, OverflowError) as error:
            raise syntax_error(cell.source, error, IN_CELL) from None
    # After all were compiled, so that a syntax error is told before anything runs.
    for node, code in zip(nodes, codes, strict=True):
        # Both in one C call: an interrupt in between would leave a statement that has run unsaid.
        run = (exec, code, shell.user_global_ns, shell.user_ns), (ran.append, node.end_lineno)
        deque(starmap(operator.call, run), maxlen=0)


def _awaits(node: ast.AST) -> Iterator[ast.expr | ast.stmt]:
    """Yields what makes the code of `node` itself asynchronous, without looking into functions and classes."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda, ast.ClassDef)):
            continue
        generators = child.generators if isinstance(child, (ast.ListComp, ast.SetComp, ast.DictComp)) else []
        if isinstance(child, (ast.Await, ast.AsyncFor, ast.AsyncWith)) or any(each.is_async for each in generators):
            yield child  # type: ignore[misc]
        yield from _awaits(child)


def _assigner(statement: ast.stmt, filename: str, user_ns: dict[str, Any]) -> Callable[[Any], None]:
    """Makes a function that runs the assignment `statement` with a given value in place of its right side."""
    assert isinstance(statement, (ast.Assign, ast.AnnAssign, ast.AugAssign))
    assert statement.value is not None
    value = ast.copy_location(ast.Name(_VALUE, ast.Load()), statement.value)
    assignment = copy(statement)
    assignment.value = value
    code = compile(ast.Module([assignment], []), filename, "exec")

    def assign(result: Any) -> None:
        # Through a name, since any object may be the value, and the target may be any (`a, b`, `x[0]`).
        user_ns[_VALUE] = result
        try:
            exec(code, user_ns)
        finally:
            user_ns.pop(_VALUE, None)

    return assign


def _magic_argument(call: ast.Call) -> tuple[str, str] | None:
    """Options and call of a line magic, if `call` is what IPython made of one; None for any other call."""
    match call:
        case ast.Call(
            ast.Attribute(ast.Call(ast.Name("get_ipython")), "run_line_magic"),
            [ast.Constant(str(name)), ast.Constant(str(line))],
        ):
            command = COMMANDS.get(f"%{name}")
            try:
                rest = line.strip() if command is None else read(command, line).rest
            except FlaxMagicsError:
                rest = ""
            return (line[: line.rindex(rest)].strip(), rest) if rest else ("", "…")
    return None


_LINE = re.compile(r"(?P<before>[ \t]*(?P<target>[^\s%#][^%#\n]*=[ \t]*)?)%(?P<name>flax\w*)(?=[ \t\\])")
_ESCAPED = re.compile(r"[ \t]*(?:[%!?,;/]|[^\n#'\"]*=[ \t]*[%!])")
"""Matches the beginning of a line for IPython, whose quotes and brackets do not mean what they do in Python."""


def line_magic_transformer(lines: list[str]) -> list[str]:
    """An input transformer, for the end of `shell.input_transformers_cleanup`: joins magics over several lines.

    The number of lines stays the same, so that no line of a body changes its number.
    """
    if not any("%flax" in line for line in lines):
        return lines
    # To tell whether a cell is complete, IPython looks for open brackets in Python: in a string it would find none.
    asked = sys._getframe(1).f_code.co_name == "check_complete"
    if len(lines) == 1 and not asked:
        return lines
    # A comment or `#@title` line may stand above the magic.
    first = next((i for i, line in enumerate(lines) if line.strip() and not line.lstrip().startswith("#")), 0)
    if lines[first].startswith("%%flax"):
        magic, *below = _joined(lines[first:])
        # IPython wants the magic on the first line.
        return [magic, *lines[:first], *below]
    # Other cell magics have a body of their own language.
    if lines[first].startswith("%%"):
        return lines
    return _line_magics("".join(lines), asked).splitlines(keepends=True)


def _joined(lines: list[str]) -> list[str]:
    """Joins the `%%flax…` line of a cell that goes on over several lines.

    The further lines stay as comments: they keep the numbers of the lines below, and an empty line would tell a
    terminal that the cell is complete.
    """
    text = "".join(lines)
    end = logical_end(text, 0)
    if end is None or "\n" not in text[:end]:
        return lines
    parts = [(piece.kind, text[piece.start : piece.end]) for piece in pieces(text[:end])]
    if any(kind == "string" and "\n" in part for kind, part in parts):
        return lines  # a string with a newline cannot be put on one line
    joined = "".join(part for kind, part in parts if kind not in ("newline", "join", "comment"))
    whole = "\n".join([joined, *(f"# {line}" for line in text[:end].split("\n")[1:])])
    return (whole + text[end:]).splitlines(keepends=True)


def _line_magics(text: str, leave_open: bool) -> str:
    """`text` with each `%flax…` call over several lines rewritten as the Python that IPython makes of a magic.

    A call whose bracket is never closed takes the rest of the text, as in Python, and fails when it runs. With
    `leave_open` the text from its bracket on is returned as it is, so that the open bracket is found.
    """
    rewritten, position = "", 0
    while position < len(text):
        magic = _magic_at(text, position)
        if magic is None:
            end = _physical_end(text, position) if _ESCAPED.match(text, position) else _statement_end(text, position)
            if end is None:
                break
            line = text[position:end]
        else:
            start = magic.end()
            end = logical_end(text, start)
            call = _open_call(text, start) if end is None else None
            if call is not None:
                if leave_open:
                    return rewritten + magic["before"] + text[call:]
                end = len(text.rstrip())
            argument = text[start:end]
            parts = [argument[piece.start : piece.end] for piece in pieces(argument) if piece.kind != "join"]
            if end is not None and any("\n" in part for part in parts):
                line = magic["before"] + _as_call(magic["name"], argument)
            else:
                end = _physical_end(text, position)
                line = text[position:end]
        rewritten += line + text[end : end + 1]
        position = end + 1
    return rewritten + text[position:]


def _magic_at(text: str, position: int) -> re.Match[str] | None:
    """Matches a `%flax…` line at `position`, up to the command's name; None if there is none."""
    magic = _LINE.match(text, position)
    target = magic["target"] if magic else None
    if target and (target.rstrip()[-2:-1] in tuple("=!<>+-*/|&^@:") or logical_end(target, 0) is None):
        return None  # not a plain `=`, or the `%` is inside a string or a bracket
    return magic


def _physical_end(text: str, position: int) -> int:
    """Index of the newline that ends the line at `position`; lines joined by a backslash count as one."""
    end = text.find("\n", position)
    while end > position and text[end - 1] == "\\":
        end = text.find("\n", end + 1)
    return len(text) if end < 0 else end


def _statement_end(text: str, position: int) -> int | None:
    """`logical_end` of the statement at `position`; None if the rest of the text is in a bracket or a string."""
    end = logical_end(text, position)
    if end is None:
        quote = next((piece for piece in pieces(text, position) if piece.kind == "quote"), None)
        if quote is not None and quote.end - quote.start == 1:
            return _physical_end(text, position)  # an apostrophe, as in `!echo it's` after a name that IPython calls
    return end


def _open_call(text: str, start: int) -> int | None:
    """Start of the token whose bracket is still open at the end of `text`; None if no bracket is open."""
    opened: list[int] = []
    for piece in pieces(text, start):
        if piece.kind == "quote":
            # In an open string, brackets do not count.
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
    """The call of a line magic with `argument`, on as many lines as `argument` has."""
    line = "".join(
        " " if piece.kind == "join" and not piece.depth else argument[piece.start : piece.end]
        for piece in pieces(argument)
    )
    *first, last = line.removeprefix(" ").rstrip().split("\n")
    strings = [*(repr(text + "\n") for text in first), repr(last)]
    # Lines that a backslash joined were dropped: pad, so that the lines below keep their numbers.
    filler = "\n" * (argument.count("\n") - len(first))
    return f"get_ipython().run_line_magic({name!r}, " + "\n".join(strings) + filler + ")"
