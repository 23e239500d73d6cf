"""What all commands share: help, errors that a person can read, and reading, running and reporting a call.

Turns what a line asks for into calls of the session. JAX and Flax are imported when that happens, not before.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache, partial, wraps
from typing import TYPE_CHECKING, Any

from IPython.core.magic import line_cell_magic, line_magic, needs_local_scope, no_var_expand

from ..base.tokens import variable_name
from ..base.types import Record
from ..code.library import is_module, is_module_class, nnx_modules
from ..errors import FlaxMagicsError, did_you_mean, nearest, written
from ..line.call import (
    CallExpression,
    fresh_names,
    parse_call,
    root_name,
    values_first,
)
from ..line.commands import FLAX_APPLY
from ..line.expression import end_of
from ..line.options import Command, LineOptions, read
from .notebook import BACK, BriefCommand, KnownLine, ModelCall, Notebook, existing
from .run_cell import displayed, displayed_quietly, run_statements_with_call
from .tracebacks import show_user_frames

if TYPE_CHECKING:
    from .._session import Session
    from ..execution.call import Call
    from ..line.expression import Expression
    from ..run import DrawNumber, Note, Run

Namespace = dict[str, object]


def command(spec: Command) -> Callable[[Callable[[Any, CommandUse], Any]], Any]:
    """Makes a magic of a method that takes a `CommandUse`: with help, and errors that a person can read."""
    # A loop runs one line many times, so the last lines are kept as read; nobody changes what was read.
    read_line, read_cell = (lru_cache(partial(read, spec._replace(name=sign + spec.bare_name))) for sign in ("%", "%%"))

    def decorate(function: Callable[[Any, CommandUse], Any]) -> Any:
        @wraps(function)
        def run(self: Any, line: str, cell: str | None = None, local_ns: Namespace | None = None) -> Any:
            notebook: Notebook = self.notebook
            options, journal, ended, session = NO_OPTIONS, notebook.journal, False, existing()
            runs_before, replacements = 0 if session is None else len(session), -1
            try:
                if cell is None and spec is FLAX_APPLY and (known := notebook.known_lines.get(line)) is not None:
                    names = notebook.shell.user_ns if local_ns is None else local_ns
                    value = MISSED if session is None else run_again(notebook, session, line, known, names)
                    if value is not MISSED:
                        ended = True
                        return value
                replacements = notebook.replacements
                # For a call, a `;` is read together with it; elsewhere it only silences.
                text = line if spec.takes == "call" else line.rstrip("; ")
                options = read_line(text) if cell is None else read_cell(text)
                if options.help or (not line.strip() and cell is None and not spec.bare):
                    notebook.reporter.publish({"text/plain": spec.render_help()})
                    return None
                names = notebook.shell.user_ns if local_ns is None else local_ns
                value = function(self, CommandUse(notebook, spec, line, cell, options, names))
                # Where it stood, for the runs that it made.
                journal.drew(runs_before, journal.runs(), notebook.shell.user_global_ns)
                ended = True
                notebook.tell_of_autosave()
                return value
            except FlaxMagicsError:
                raise
            # An error of the model's own: shown without our frames.
            except Exception as error:
                from .hints import hints

                hint: tuple[str, ...] = ()
                with suppress(Exception):  # what looks into an error must not hide it
                    hint = hints(error, notebook, options.options)
                show_user_frames(error, notebook.shell, hint=hint)
                raise
            finally:
                if not ended:  # what was committed by then is of this line all the same
                    journal.drew(runs_before, journal.runs(), notebook.shell.user_global_ns)
                    if replacements not in (-1, notebook.replacements):
                        journal.stopped(notebook.shell.user_global_ns)
                notebook.called = None  # its arguments would be held until the next command

        del run.__wrapped__  # IPython 7 would call by the signature of the wrapped function
        # Shown by `%flax_apply?`: IPython asks an object for `getdoc` before it reads `__doc__`.
        run.getdoc = spec.render_help  # type: ignore[attr-defined]
        run.__doc__ = f"{spec.usage}\n\n{spec.help}"
        # What `mark` returns is not used: IPython 7 returns a wrapper that binds the signature in every call, which
        # costs as much as all else that a line needs.
        mark = line_cell_magic if spec.takes in ("call", "assignment") else line_magic
        mark(no_var_expand(needs_local_scope(run)))
        return run

    return decorate


NO_OPTIONS = LineOptions({})
"""Of a line that was not read yet."""
MISSED = object()
"""Returned by `run_again` where the line has to be read and run as if it were new."""


def run_again(notebook: Notebook, session: Session, line: str, known: KnownLine, names: Namespace) -> Any:
    """Runs a line that ran before: what was read of it, its plan and its program are found, and nothing is said anew.

    Gives what the line gives, or `MISSED`, with nothing changed.
    """
    expression, call_type, options, out, quiet = known
    user_ns, name = notebook.shell.user_ns, expression.target
    module = names[name] if name in names else user_ns.get(name)
    try:
        args, kwargs = expression.evaluate(user_ns, names)
    except Exception:  # a name that is bound no more: the other way says so
        return MISSED
    if module is None or notebook.weight_names.moved(name, user_ns):
        return MISSED
    call = call_type(expression.method, args, kwargs, expression.call, notebook.number, expression.command)
    working, caller = BriefCommand(notebook, session, f"running {name}"), sys._getframe(2)  # whoever called the magic
    with working:
        outcome = session.run_again(name, call, options, module, caller)
    if outcome is None:
        working.clear()  # a line that is left would be nobody's: the other way begins with one of its own
        return MISSED
    if out is not None:
        user_ns[out] = outcome.run
    if not quiet or outcome.stored.notes:
        notebook.reporter.report_again(outcome, lambda: working.live, quiet=quiet)
    else:
        notebook.reporter.put_off(outcome)
    working.clear()
    notebook.journal.drew_again(outcome.runs - 1, caller)
    if session.autosaving is not None:
        notebook.tell_of_autosave()
    return None if ";" in line and displayed_quietly(notebook.shell, line) else outcome.output


class CommandUse(Record):
    """One use of a command. `use["train"]` is the value of an option.

    Attributes:
      line: the text after the command's name.
      cell: the lines below it; None for a line magic.
      read: the line as options and rest.
      local_ns: the names of the function that the line stands in; at the top of a cell those of the notebook.
    """

    notebook: Notebook
    spec: Command
    line: str
    cell: str | None
    read: LineOptions
    local_ns: Namespace

    def __getitem__(self, option: str) -> Any:
        return self.read.options[option]

    @property
    def rest(self) -> str:
        """The text after the options."""
        return self.read.rest

    @property
    def user_ns(self) -> Namespace:
        """The names of the notebook."""
        return self.notebook.shell.user_ns  # type: ignore[no-any-return]

    def value_of(self, name: str) -> Any:
        """The value of a name at the place of the line; None if it is not bound."""
        return self.local_ns[name] if name in self.local_ns else self.user_ns.get(name)

    def names(self) -> Namespace:
        """All names that the line can use. Not for a local variable: a traceback would keep all their arrays alive."""
        return {**self.user_ns, **self.local_ns}

    @property
    def taken(self) -> frozenset[str]:
        """Names that hold something of the user's or are those of models, which advice leaves as they are."""
        return frozenset({*self.user_ns, *self.local_ns, *self.notebook.session.models})

    @property
    def silenced(self) -> bool:
        """Whether a `;` keeps the value of the line from being displayed."""
        return displayed_quietly(self.notebook.shell, self.line)

    def value_once(self, value: Any) -> Any:
        """The value of a line that has shown it: None where the host would display it again, or a `;` silences it."""
        shown = not self["quiet"] and (self.cell is not None or displayed(self.notebook.shell))
        return None if shown or self.silenced else value

    @property
    def mode(self) -> str | None:
        """The mode that `--train` or `--eval` asks for; None for neither. Raises FlaxMagicsError for both."""
        if self["train"] and self["eval"]:
            raise FlaxMagicsError("--train and --eval contradict each other. Leave one of them out.")
        return "train" if self["train"] else "eval" if self["eval"] else None

    def takes_nothing(self) -> None:
        """Raises FlaxMagicsError where something stands after the options."""
        if self.rest:
            name = self.spec.name
            raise FlaxMagicsError(f"{name} takes nothing after it, and `{self.rest}` stands there.", write=name)

    def run(self, run: Callable[[CallExpression], Run], *, gives_run: bool = False) -> Any:
        """Runs the call of a line or a cell, and reports it. Returns the output; None if it is assigned or silenced.

        Args:
          gives_run: the command's value is the Run, not its output.
        """
        expression, assign = self.read_body()
        with self.notebook.working("preparing", quiet=self["quiet"], out=self["out"]) as live:
            finished = run(expression)
        if self["out"]:
            self.user_ns[self["out"]] = finished
        self.notebook.reporter.report(finished, live, quiet=self["quiet"])
        value = finished if gives_run else finished.output
        if assign is not None:
            assign(value)
            return None
        quiet = expression.quiet if self.cell is not None else self.silenced
        return None if quiet else value

    def read_body(self) -> tuple[CallExpression, Callable[[Any], None] | None]:
        """The call of a line; or of a cell, whose other statements are run, with a function that assigns the value."""
        name = self.spec.name
        if self.cell is None:
            command = f"{name} {self.line[: self.read.offset]}".strip()
            try:
                return parse_call(self.rest, command), None
            except FlaxMagicsError:
                self._check_call(command)
                return parse_call(self.rest, command, self.taken), None  # once more: advice binds no name that is taken
        if self.rest:
            raise FlaxMagicsError(
                f"%{name} takes its call from the cell's last line; `{self.rest}` stands on the first.",
                **written(f"{name} {self.line.strip()}"),
            )
        body = self.notebook.journal.body
        return run_statements_with_call(
            self.notebook.shell, self.cell, self.line, f"%{name}", taken=self.taken, ran=body
        )

    def _check_call(self, command: str) -> None:
        """Raises FlaxMagicsError where a name alone stands in the place of a call, and is no model's."""
        from ..base.digest import kind_of

        name, models = self.rest.rstrip("; "), self.notebook.session.models
        value = self.value_of(name)
        if value is None or callable(value) or name in models or self.spec.takes != "call":
            return
        kind = kind_of(value)
        del value  # the error's traceback would keep it
        model = next(iter(models)) if len(models) == 1 else "…"
        what, call = "a model", f"{model}({name})"
        if self.spec.bare_name in ("flax_grad", "flax_train"):
            what, call = "a loss", f"…({model}, {name})"
        message = f"`{name}` is {kind}, and %{self.spec.bare_name} takes the call of {what}."
        raise FlaxMagicsError(message, **written(f"{command} {call}"))

    def resolve(self, expression: CallExpression, *, registers: bool = True) -> tuple[str, Call, Any]:
        """Name of the model, the evaluated call, and the module that the name stands for now, None if as registered.

        Args:
          registers: a module that never was registered is, once the command has succeeded.
        """
        from ..execution.call import Call

        target, value = expression.target, self.value_of(expression.target)
        registered = self.notebook.session.module(target)
        # Variables of a file are given to an NNX module where it is registered, and not where it runs.
        waited_for = target in self.notebook.session.waiting and isinstance(value, nnx_modules())
        if registered is None and (waited_for or not registers or not is_module(value)):
            raise self._unknown(expression, value)
        args, kwargs = expression.evaluate(self.user_ns, self.local_ns)
        call = Call(expression.method, args, kwargs, expression.call, self.notebook.number, expression.command)
        # From here on an error may come from the model: its hints are about this call.
        self.notebook.called = ModelCall(expression, call, registered if registered is not None else value)
        if value is registered:
            return target, call, None
        if is_module_class(value) and type(registered).__name__ == value.__name__ and type(registered) is not value:
            # Registered under its own name, and the class was defined again in a cell without the magic.
            from ..models.construction import needed_fields

            value = None if needed_fields(value) else value()
        return target, call, value if is_module(value) else None

    def notes_of(self, name: str, *, weights: bool = True) -> tuple[Note, ...]:
        """Sharp bits of the names in the notebook, for a run of the model `name`.

        Args:
          weights: the model's own are used.
        """
        held = (
            self.notebook.weight_names.note(name, self.notebook.session.collections, self.user_ns) if weights else None
        )
        unbound = self.notebook.note_of_unbound(name, self.local_ns if name in self.local_ns else self.user_ns)
        return tuple(note for note in (unbound, held) if note is not None)

    def evaluated(self, expression: Expression) -> Any:
        """The value of an option's expression. Raises FlaxMagicsError, for a name of optax with the line to write."""
        try:
            return expression.evaluate(self.user_ns, self.local_ns)
        except FlaxMagicsError:
            import optax  # type: ignore[import-untyped]

            tree = expression.tree
            name = tree.func if isinstance(tree, ast.Call) else tree
            if not isinstance(name, ast.Name) or name.id in self.names() or not hasattr(optax, name.id):
                raise
            text = f"optax.{expression.source}" + ("" if isinstance(tree, ast.Call) else "(1e-3)")
            line = f"%{self.spec.bare_name} {self.line.replace(expression.source, text, 1)}".strip()
            advice = written(f"import optax\n{line}" if self.cell is None else f"%{line}")
            raise FlaxMagicsError(f"`{name.id}` is not defined here, and optax has one.", **advice) from None

    def resolve_loss(self, expression: CallExpression) -> tuple[str, Callable[..., Any], Call, Any]:
        """Name of the model that a loss is called with, the loss, its call without the model, and as in `resolve`."""
        from ..base.digest import kind_of
        from ..execution.call import Call
        from ..training.loss import METHOD, check

        first = expression.tree.args[0] if expression.tree.args else None
        try:
            loss, args, kwargs = expression.construct(self.user_ns, self.local_ns)
        except FlaxMagicsError:
            net = first.id if isinstance(first, ast.Name) else ""
            if net not in self.notebook.session.models or net in self.local_ns or net in self.user_ns:
                raise
            message = f"`{net}` was deleted, and a loss is called with it: the model is registered still."
            line = f"{expression.command} {expression.text}"
            raise FlaxMagicsError(message, write=f"{BACK.format(net)}\n{line}") from None
        written = ast.unparse(expression.tree.func)
        name = first.id if isinstance(first, ast.Name) else "net"
        check(loss, expression.call, expression.command)
        is_known = name in self.notebook.session.models or name in self.notebook.session.waiting
        if not isinstance(first, ast.Name) or not (is_known or is_module(args[0]) or is_module_class(args[0])):
            text = "nothing" if first is None else f"`{ast.unparse(first)}`"
            what = f", {kind_of(args[0])}" if isinstance(first, ast.Name) else ""
            known = ", ".join(self.notebook.session.models)
            raise FlaxMagicsError(
                f"the first argument of a loss is the model, by the name under which it is registered, and `{written}`"
                f" is given {text}{what}.",
                hint=f"registered: {known}" if known else "no model is registered yet",
                form=f"{expression.command} {written}({next(iter(self.notebook.session.models), 'net')}, …)",
            )
        name, _, module = self.resolve(parse_call(f"{name}()", expression.command))
        call = Call(METHOD, args[1:], kwargs, expression.call, self.notebook.number, expression.command)
        called = self.notebook.called
        self.notebook.called = None if called is None else called._replace(expression=expression, call=call)
        return name, loss, call, module

    def _unknown(self, expression: CallExpression, value: Any) -> FlaxMagicsError:
        """The error for a name without a registered model; `value` is what it is bound to in the namespace."""
        from ..base.digest import kind_of
        from ..models.construction import adopt, modules_in, spell_construction

        session, name = self.notebook.session, expression.target
        known, names = session.models, self.names()
        if is_module(value):
            try:
                adopt(value, name)
            except FlaxMagicsError as error:
                return error
            saved = session.waiting.get(name)
            waits = "" if saved is None else f", and its variables from `{saved.file}` wait for that"
            return FlaxMagicsError(f"`{name}` is not registered yet{waits}.", write=f"%flaxmodel {name}")
        if is_module_class(value):
            message = f"`{name}` is a class, and a model is an instance of it."
            free = next(fresh_names(variable_name(value.__name__), expression.tree, self.taken))
            return FlaxMagicsError(message, **written(spell_construction(value, "%flaxmodel", name, free)))
        saved = session.waiting.get(name)
        if saved is not None and value is None:
            text = f"no model is registered as `{name}` yet: its variables from `{saved.file}` wait for it"
            if is_module_class(names.get(saved.text.partition("(")[0])):
                return FlaxMagicsError(f"{text}.", **written(f"%flaxmodel {name} = {saved.text}"))
            return FlaxMagicsError(f"{text}, until the cell that defines it is run.", form=f"%flaxmodel {name} = …")
        listed = f"registered: {', '.join(known)}" if known else "no model is registered yet"
        hint = did_you_mean(name, known, *modules_in(names))
        text = f"no model is called `{name}`; {listed}."
        part = self._part_called(expression, value)
        if part is not None:
            return part
        if value is not None:
            text = f"`{name}` is {kind_of(value)}, not a model; {listed}."
            tree = expression.tree
            calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and root_name(node) in known]
            if calls:  # such as `jnp.sum(net(x))`, where only the inner call can be a command's
                return FlaxMagicsError(
                    text, **written(values_first(expression.text, tree, expression.command, calls, taken=self.taken))
                )
        if hint is None and value is None and len(known) == 1:  # the only model there is
            rest = expression.text[end_of(expression.text, expression.tree.func) :]
            called = ".".join((*known, *expression.method))
            return FlaxMagicsError(text, write=f"{expression.command} {called}{rest}")
        return FlaxMagicsError(text, hint=hint, form=None if hint or value is not None else f"%flaxmodel {name} = …")

    def _part_called(self, expression: CallExpression, value: Any) -> FlaxMagicsError | None:
        """The error for a module that is called as a part of something else, such as `agent.actor(x)`, None without one.

        Also for `self.net(x)` where nothing is called `self` and `net` is a model.
        """
        path, target = expression.method, expression.target
        rest = expression.text[end_of(expression.text, expression.tree.func) :]
        registered, names = self.notebook.session.models, self.names()
        if value is None and path and (path[0] in registered or is_module(names.get(path[0]))):
            line = f"{expression.command} {'.'.join(path)}{rest}"
            return FlaxMagicsError(f"nothing is called `{target}` here, and `{path[0]}` is a model.", write=line)
        for n, attribute in enumerate(path, 1):
            with suppress(Exception):  # whatever a property of the user's raises
                value = getattr(value, attribute, None)
            if is_module(value):
                part = ".".join((target, *path[:n]))
                name = next((one for one, model in registered.items() if model.module is value), None)
                lines = []
                if name is None:
                    name = attribute if names.get(attribute, value) is value else f"{target}_{attribute}"
                    lines = [f"%flaxmodel {name} = {part}"]
                lines.append(f"{expression.command} {'.'.join((name, *path[n:]))}{rest}")
                message = f"`{part}` is a model without a name of its own."
                return FlaxMagicsError(message, write="\n".join(lines))
        return None

    def keys_of(self) -> DrawNumber | None:
        """The draw that `--keys-of` names, None without the option."""
        text = self["keys_of"]
        if text is None:
            return None
        # Typed again with a gap for the draw, so that advice can be pasted.
        typed = f"{'%' if self.cell is None else '%%'}{self.spec.bare_name} {self.line}".strip()
        return self.draw_of(text, re.sub(rf"(--keys-of[\s=]+){re.escape(text)}", r"\1{}", typed, count=1))

    def draw_of(self, text: str, line: str) -> DrawNumber:
        """A draw as `Session.apply` takes it, from a number, `last`, `seed:N`, or the name of a Run.

        Args:
          line: the whole line, with `{}` in the place of `text`.

        Raises:
          FlaxMagicsError: `text` is none of these.
        """
        from ..run import Run

        session = self.notebook.session
        seed, colon, number = text.rpartition(":")
        if number.isdigit() and (not colon or seed.lstrip("-").isdigit()):
            return (int(seed), int(number)) if colon else int(number)
        if text == "last":
            return session.draws
        run = self.value_of(text)
        if isinstance(run, Run):
            return run.seed, run.draw
        choices = ["last", *(name for name, value in self.names().items() if isinstance(value, Run))]
        near = next(iter(nearest(text, choices)), "last")
        taker = "%flax_replay" if line.startswith("%flax_replay") else "--keys-of"
        raise FlaxMagicsError(
            f"{taker} takes a number, last, seed:N or the name of a Run, not `{text}`.",
            hint=did_you_mean(text, choices),
            **(written(line.replace("{}", near)) if session.draws else {}),
        )

    def replay_of(self) -> DrawNumber | str | Run:
        """The argument of `%flax_replay` as `Session.replay` takes it. The name of a Run means that run alone.

        Raises:
          FlaxMagicsError: nothing has been drawn, or the line names no draw.
        """
        from ..run import Run

        text, run = self.rest, self.value_of(self.rest)
        if text != "last" and isinstance(run, Run):
            return run
        if not len(self.notebook.session):
            message = "nothing has been drawn in this session that could be run again."
            raise FlaxMagicsError(message, form="%flax_apply …")
        return text if text == "last" else self.draw_of(text, f"%flax_replay {self.line[: self.read.offset]}{{}}")


def with_package(user_ns: Namespace, local_ns: Namespace) -> Namespace:
    """The names for an expression, with `flax_magics` even if it was not imported: advice relies on that."""
    names = {} if local_ns is user_ns else dict(local_ns)
    if "flax_magics" not in user_ns:
        names.setdefault("flax_magics", sys.modules["flax_magics"])
    return names
