"""What all commands do alike when they are used: help, errors that a person can read, a call read, run and reported."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Any, Protocol

from ..base.private import is_tracing
from ..errors import FlaxMagicsError, advice_lines, written
from ..line.call import Assignment, CallExpression, parse_assignment, parse_call
from ..line.commands import FLAX_VARS
from ..line.options import Command, LineOptions, read
from .notebook import Notebook
from .run_cell import displayed_quietly, run_statements_with_call
from .tracebacks import show_user_frames

if TYPE_CHECKING:
    from ..run import Run

Namespace = dict[str, Any]


class InNotebook(Protocol):
    """Whose commands they are."""

    @property
    def notebook(self) -> Notebook:
        """Where they are used."""


def command(spec: Command) -> Callable[[Any], Any]:
    """Gives a command its help, and errors that a person can read."""
    as_line, as_cell = (spec._replace(name=sign + spec.name.lstrip("%")) for sign in ("%", "%%"))

    def decorate(function: Any) -> Any:
        @wraps(function)
        def run(self: InNotebook, line: str, cell: str | None = None, local_ns: Namespace | None = None) -> Any:
            notebook = self.notebook
            notebook.called = None
            try:
                # A `;` belongs to a call, which reads it itself; elsewhere it only silences.
                options = read(
                    as_line if cell is None else as_cell, line if spec.takes == "call" else line.rstrip("; ")
                )
                if options.help or (not line.strip() and cell is None and not spec.bare):
                    notebook.reporter.publish({"text/plain": spec.render_help()})
                    return None
                before = notebook.journal.runs()
                value = function(self, line, options, cell, notebook.shell.user_ns if local_ns is None else local_ns)
                notebook.journal.drew(before, notebook.shell.user_global_ns)
                notebook.tell_of_autosave()
                return value
            except FlaxMagicsError:
                raise
            except Exception as error:
                show_user_frames(error, notebook.shell, hint=_hints(error, notebook, options))
                raise

        del run.__wrapped__  # IPython 7 calls by the signature that it finds behind it
        run.__doc__ = spec.render_help()
        return run

    return decorate


def _hints(error: Exception, notebook: Notebook, options: LineOptions) -> tuple[str, ...]:
    """What to add to an error of the model's own."""
    from ..compile.trace import is_tracer_error

    called = notebook.called
    if is_tracer_error(error) and called is not None and not is_tracing():
        said = "the model looks at a value while it is traced"
        if not called.command.startswith("%flax_apply"):
            return (said,)
        return (f"{said}; op by op it can", *advice_lines(f"{called.command} --eager {called.call}"))
    unset = re.search(r'"(\w+)" must be passed to the constructor or at call time', str(error))
    if isinstance(error, ValueError) and unset is not None and called is not None:
        mode = options.options.get("train") or options.options.get("eval")
        return notebook.asked.of_unset(unset[1], called, notebook.session, bool(mode))  # type: ignore[no-any-return]
    lacking = re.match(r"(\w+)\.__init__\(\) missing .*'rngs'", str(error)) if isinstance(error, TypeError) else None
    if lacking is not None:
        return (f"to have it built with the session's rngs, move it to the line: %%flaxmodel net = {lacking[1]}(…)",)
    return ()


def mode_of(options: LineOptions) -> str | None:
    """What `--train` and `--eval` ask for."""
    train, evaluation = options.options["train"], options.options["eval"]
    if train and evaluation:
        raise FlaxMagicsError("--train and --eval contradict each other. Leave one of them out.")
    return "train" if train else "eval" if evaluation else None


def parse_variables(text: str) -> Assignment:
    """`net`, or `net = EXPR`: what `%flax_vars` takes.

    Raises:
      FlaxMagicsError: it is something else.
    """
    try:
        tree: ast.expr | None = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError):
        tree = None
    root = tree
    while isinstance(root, (ast.Attribute, ast.Subscript, ast.Call)):
        root = root.func if isinstance(root, ast.Call) else root.value
    if isinstance(root, ast.Name) and root is not tree:
        raise FlaxMagicsError(
            f"%flax_vars takes the name of a model, not `{text}`.", write=f"variables = %flax_vars {root.id}"
        )
    return parse_assignment(text, FLAX_VARS.name, "net")


def with_package(user_ns: Namespace, local_ns: Namespace) -> Namespace:
    """Names of the enclosing function, with `flax_magics` where the notebook has none: messages write that."""
    names = {} if local_ns is user_ns else dict(local_ns)
    if "flax_magics" not in user_ns:
        names.setdefault("flax_magics", sys.modules["flax_magics"])
    return names


def run_call(
    notebook: Notebook,
    spec: Command,
    line: str,
    options: LineOptions,
    cell: str | None,
    run: Callable[[CallExpression], Run],
) -> Any:
    """A command that takes a call, as a line or as a cell: runs it, reports it, gives its value."""
    parsed, assign = read_body(notebook, spec, line, options, cell)
    with notebook.working("preparing") as live:
        done = run(parsed)
    name = options.options["out"]
    if name:
        notebook.shell.user_ns[name] = done
    notebook.report(done, live, quiet=options.options["quiet"])
    if assign is not None:
        assign(done.output)
        return None
    quiet = parsed.quiet if cell is not None else displayed_quietly(notebook.shell, line)
    return None if quiet else done.output


def read_body(
    notebook: Notebook, spec: Command, line: str, options: LineOptions, cell: str | None
) -> tuple[CallExpression, Callable[[Any], None] | None]:
    """The call of a line or of a cell, whose other statements are run; and what binds its value, in a cell."""
    if cell is None:
        return parse_call(options.rest, f"{spec.name} {line[: options.offset]}".strip()), None
    if options.rest:
        raise FlaxMagicsError(
            f"%{spec.name} takes its call from the cell's last line; `{options.rest}` stands on the first.",
            **written(f"{spec.name} {line.strip()}"),
        )
    body = run_statements_with_call(notebook.shell, cell, line, f"%{spec.name}")
    return body.call, body.assign
