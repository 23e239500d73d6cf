"""The commands: read the line, call the session, show what comes back.

Nothing here imports JAX or Flax before a command is used.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property, wraps
from typing import TYPE_CHECKING, Any

from IPython.core.magic import Magics, line_cell_magic, line_magic, magics_class, needs_local_scope, no_var_expand
from traitlets import Bool, Dict, Enum, Int, observe, validate

from .call import ParsedCall, parse_call, parse_expression
from .celllog import CellLog, Rerun
from .cells import displayed, displayed_quietly, run_body, run_statements_with_call
from .commands import (
    FLAX,
    FLAX_APPLY,
    FLAX_EXPORT,
    FLAX_HISTORY,
    FLAX_INIT,
    FLAX_KEY,
    FLAX_LOAD,
    FLAX_REPLAY,
    FLAX_SAVE,
    FLAX_SUMMARY,
    FLAXMODEL,
)
from .current import current, existing
from .errors import FlaxMagicsError, did_you_mean
from .journal import Journal, load_of
from .kinds import KINDS
from .library import library
from .options import Command, Read, file_name, read, unquoted
from .reporter import Reporter
from .tracebacks import show_user_frames, stopped

if TYPE_CHECKING:
    from .complete import ModelNames
    from .run import Run
    from .sessions import Session
    from .show.live import Live

Namespace = dict[str, Any]


def command(spec: Command) -> Callable[[Any], Any]:
    """Gives a command its help, and errors that a person can read."""

    def decorate(function: Any) -> Any:
        @wraps(function)
        def run(self: FlaxMagics, line: str, cell: str | None = None, local_ns: Namespace | None = None) -> Any:
            try:
                # A `;` belongs to a call, which reads it itself; elsewhere it only silences.
                options = read(spec, line if spec.takes == "call" else line.rstrip("; "))
                bare = not line.strip() and cell is None
                if options.help or (bare and spec not in (FLAX, FLAX_KEY, FLAX_HISTORY, FLAX_EXPORT)):
                    self.reporter.publish({"text/plain": spec.render_help()})
                    return None
                value = function(self, line, options, cell, self.shell.user_ns if local_ns is None else local_ns)
                self._tell_of_autosave()
                return value
            except FlaxMagicsError:
                raise
            except Exception as error:
                show_user_frames(error, self.shell, hint=_hints(error))
                raise

        del run.__wrapped__  # IPython 7 calls by the signature that it finds behind it
        run.__doc__ = spec.render_help()
        return run

    return decorate


def _hints(error: Exception) -> tuple[str, ...]:
    """What to add to an error of the model's own."""
    from .ready import is_tracer_error

    if is_tracer_error(error):
        return ("the model looks at a value while it is compiled; to run it op by op: %flax_apply --eager …",)
    if isinstance(error, ValueError) and "must be passed to the constructor or at call time" in str(error):
        return ("it is the model's switch: %flax_apply --train … or --eval … sets it",)
    lacking = re.match(r"(\w+)\.__init__\(\) missing .*'rngs'", str(error)) if isinstance(error, TypeError) else None
    if lacking is not None:
        return (f"to have it built with the session's rngs, move it to the line: %%flaxmodel net = {lacking[1]}(…)",)
    return ()


def _mode(options: Read) -> str | None:
    """What `--train` and `--eval` ask for."""
    train, evaluation = options.options["train"], options.options["eval"]
    if train and evaluation:
        raise FlaxMagicsError("--train and --eval contradict each other. Leave one of them out.")
    return "train" if train else "eval" if evaluation else None


class _Working:
    """A command at work: its live line, which is blank again if it fails, and what an interrupt says it stopped.

    While XLA compiles there is nothing else to do here, so `meanwhile` is called.
    """

    def __init__(self, session: Session, live: Live, what: str, meanwhile: Callable[[], None]) -> None:
        self._session = session
        self._live = live
        self._what = what
        self._meanwhile = meanwhile

    def __enter__(self) -> Live:
        self._phase = self._live.begin(self._what)
        self._session.on_phase = self._doing
        return self._live

    def _doing(self, phase: str) -> None:
        self._phase.doing(phase)
        if phase.startswith("compiling "):
            self._meanwhile()

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, KeyboardInterrupt):
            stopped(error, self._phase.text)
        self._live.end()
        if error is not None:
            self._live.clear()


@magics_class
class FlaxMagics(Magics):
    """Settings of flax_magics; `%config FlaxMagics.NAME = VALUE` sets one."""

    shell: Any

    seed = Int(0, help="The seed that the session's root key starts from.").tag(config=True)
    report = Enum(
        ["auto", "line", "normal", "details", "off"],
        "auto",
        help="How much a run reports: auto is as long as its news; off shows sharp bits alone.",
    ).tag(config=True)
    style = Enum(
        ["auto", "text"],
        "auto",
        help="How reports are shown: auto is HTML where the host shows it; text is plain text everywhere.",
    ).tag(config=True)

    notes = Dict(
        help="Sharp bits that are not to be said, by kind: {'stream': False}. The kinds are " + ", ".join(KINDS) + "."
    ).tag(config=True)

    disk_cache = Bool(
        True, help="Whether compiled programs are kept on disk, so that a restarted kernel does not compile them again."
    ).tag(config=True)

    replay_bytes = Int(
        256_000_000,
        min=0,
        help="How many bytes are kept of what only %flax_replay needs: inputs, and variables that later runs overwrote.",
    ).tag(config=True)

    def __init__(self, shell: Any, **kwargs: Any) -> None:
        self._ready = False
        self.cells = CellLog()
        self._cell: int | None = None
        super().__init__(shell=shell, **kwargs)
        self._ready = True
        self.reporter = Reporter(shell)
        self.journal = Journal()

    # -- settings

    @validate("seed")
    def _check_seed(self, proposal: Any) -> int:
        from .show.units import plural

        session = existing()
        seed: int = proposal["value"]
        if self._ready and session is not None and session.draws and session.seed != seed:
            raise FlaxMagicsError(
                f"the session has made {plural(session.draws, 'draw')} from seed {session.seed}; `seed` is where it starts.",
                write=f"%flax_key --seed {seed}",
            )
        return seed

    @observe("seed")
    def _start_from(self, change: Any) -> None:
        session = existing()
        if session is not None and not session.draws:
            session.restart(change["new"])

    @observe("disk_cache")
    def _keep_on_disk(self, change: Any) -> None:
        session = existing()
        if session is not None:
            session.keep_on_disk(change["new"])

    @observe("replay_bytes")
    def _keep_for_replays(self, change: Any) -> None:
        session = existing()
        if session is not None:
            session.replay_bytes = change["new"]

    @validate("notes")
    def _check_notes(self, proposal: Any) -> dict[str, bool]:
        notes: dict[str, bool] = proposal["value"]
        for kind, said in notes.items():
            if kind not in KINDS:
                known = ", ".join(KINDS)
                hint = did_you_mean(str(kind), KINDS)
                raise FlaxMagicsError(f"no sharp bit is of the kind `{kind}`; the kinds: {known}.", hint=hint)
            if not isinstance(said, bool):
                raise FlaxMagicsError(f"`{kind}` is said (True) or not (False), not {said!r}.")
        return notes

    def _report(self, run: Run, live: Any, *, quiet: bool) -> None:
        if quiet and not run.notes:
            self.reporter.later(run)
            live.clear()
            return
        shown = run
        if run.notes:
            notes = tuple(note for note in run.notes if self.notes.get(note.kind, True))
            shown = run if len(notes) == len(run.notes) else replace(run, notes=notes)
        self.reporter.report(shown, live, setting=self.report, style=self.style, quiet=quiet)

    # -- the session

    def begin_cell(self, info: Any = None, *_: Any) -> None:
        """`pre_run_cell`: runs are counted anew, and what the cell before did to Flax's own code may count."""
        self._cell = None
        self._cell = self._number
        if getattr(info, "store_history", False):
            self.cells.begin(self._cell, _cell_id(info, self.shell), info.raw_cell)
        self.reporter.begin_cell()
        library.new_cell()

    @property
    def session(self) -> Session:
        """The session of this kernel, made at first use."""
        session = existing()
        if session is None:
            session = current(self.seed)
            session.keep_on_disk(self.disk_cache)
            session.replay_bytes = self.replay_bytes
        return session

    def executed(self) -> tuple[Any, ...]:
        """What an export is made of: the cells that ran, what makes Python of them, restarts, and the seed at first."""
        shell = self.shell
        return self.journal.cells(shell), shell.transform_cell, self.journal.restarts, self.seed

    def end_cell(self, *_: Any) -> None:
        """`post_run_cell`: reports come to their end, and what is more than may be kept goes."""
        self._cell = None
        self.reporter.end_cell()
        session = existing()
        if session is not None:
            session.settle()

    @property
    def _number(self) -> int:
        """The number in the prompt of the cell that is running. IPython 7.34 counts after the cell, 9 before it."""
        number: int = self.shell.displayhook.prompt_count if self._cell is None else self._cell
        return number

    @cached_property
    def _asked(self) -> Any:
        """What lines ask for, read by a module that imports JAX and Flax."""
        from . import asked

        return asked

    def model_names(self) -> dict[str, ModelNames]:
        """What completion needs to know; makes no session."""
        session = existing()
        return {} if session is None else {name: model.names() for name, model in session.models.items()}

    # -- commands

    @line_magic
    @no_var_expand
    @command(FLAX)
    def flax(self, line: str, options: Read, cell: str | None, local_ns: Namespace) -> None:
        """`%flax`"""
        from .overview import status
        from .show.bundle import status_bundle

        if options.rest:
            raise FlaxMagicsError(f"%flax takes nothing after it, and `{options.rest}` stands there.", write="%flax")
        self.reporter.publish(status_bundle(status(self.session, self._reruns()), self.style))

    @line_cell_magic
    @no_var_expand
    @needs_local_scope
    @command(FLAXMODEL)
    def flaxmodel(self, line: str, options: Read, cell: str | None, local_ns: Namespace) -> None:
        """`%%flaxmodel [net = Net(…)]` and `%flaxmodel net [= Net(…)]`"""
        from . import modelcell
        from .show.bundle import registered_bundle

        if cell is None:
            found = modelcell.from_line(options.rest, self.shell.user_ns, local_ns)
        else:
            modelcell.read_line(options.rest)  # a mistake there is told before anything runs
            before = dict(self.shell.user_ns)
            body = run_body(self.shell, cell, line)
            found = modelcell.from_cell(options.rest, self.shell.user_ns, body.names, before)
        with self._working("registering") as live:
            rows = modelcell.check(found, options.options["check"], self.session, self.shell.user_ns, local_ns)
            registered = modelcell.register(found, self.session, self.shell.user_ns, rows)
            self.journal.registered(registered)
        live.show({} if options.options["quiet"] else registered_bundle(registered, self.style))

    @line_cell_magic
    @no_var_expand
    @needs_local_scope
    @command(FLAX_INIT)
    def flax_init(self, line: str, options: Read, cell: str | None, local_ns: Namespace) -> Any:
        """`%flax_init net(x)`"""

        def run(parsed: ParsedCall) -> Run:
            name, call, module = self._read_call(parsed, local_ns)
            return self.session.run_init(name, call, draw=self._draw(options, local_ns), module=module)

        return self._call(FLAX_INIT, line, options, cell, run)

    @line_cell_magic
    @no_var_expand
    @needs_local_scope
    @command(FLAX_APPLY)
    def flax_apply(self, line: str, options: Read, cell: str | None, local_ns: Namespace) -> Any:
        """`%flax_apply net(x)`"""
        given = options.options
        mode = _mode(options)

        def run(parsed: ParsedCall) -> Run:
            name, call, module = self._read_call(parsed, local_ns)
            chosen = self._asked.options(
                mode,
                given["mutable"],
                given["key"],
                self._draw(options, local_ns),
                given["draws"],
                given["repeat"] or 1,
                given["eager"],
                given["roofline"],
            )
            if given["variables"] is not None:
                expression = parse_expression(given["variables"], "--variables")
                chosen = replace(chosen, variables=expression.evaluate(self.shell.user_ns, local_ns))
            return self.session.run_apply(name, call, chosen, module=module)

        return self._call(FLAX_APPLY, line, options, cell, run)

    @line_cell_magic
    @no_var_expand
    @needs_local_scope
    @command(FLAX_SUMMARY)
    def flax_summary(self, line: str, options: Read, cell: str | None, local_ns: Namespace) -> Any:
        """`%flax_summary net(x)`"""
        from .show.bundle import summary_bundle, tree_bundle

        given, mode = options.options, _mode(options)
        bare = options.rest.rstrip("; ") if cell is None and options.rest.rstrip("; ").isidentifier() else None
        parsed, assign = (
            self._parsed(FLAX_SUMMARY, line, options, cell) if bare is None else (parse_call(f"{bare}()"), None)
        )
        name, call, module = self._read_call(parsed, local_ns)
        with self._working("summarising") as live:
            summary = self.session.run_summary(
                name, call if bare is None else None, mode, backward=given["backward"], module=module
            )
            tree = tree_bundle(name, self.session.variables(name, module), self.style) if given["tree"] else {}
        quiet = given["quiet"]
        live.show({} if quiet else summary_bundle(summary, given["depth"], self.style))
        self.reporter.publish({} if quiet else tree)
        if assign is not None:
            assign(summary)
            return None
        shown = not quiet and (cell is not None or displayed(self.shell))  # once is enough
        return None if shown or parsed.quiet or displayed_quietly(self.shell, line) else summary

    @line_magic
    @no_var_expand
    @command(FLAX_KEY)
    def flax_key(self, line: str, options: Read, cell: str | None, local_ns: Namespace) -> Any:
        """`%flax_key [--seed N [--fresh] | NAME]`"""
        from .overview import key_card, restarted
        from .show.bundle import key_bundle, notice_bundle

        seed, fresh, quiet = (options.options[name] for name in ("seed", "fresh", "quiet"))
        name = options.rest
        if seed is not None:
            if name:
                raise FlaxMagicsError(
                    f"%flax_key restarts with --seed or draws `{name}`, not both in one line.",
                    write=f"%flax_key --seed {seed}\n%flax_key {name}",
                )
            notice = restarted(self.session.restart(seed, fresh=fresh))
            self.journal.restarted()
            self.reporter.publish({} if quiet else notice_bundle(notice, self.style))
            return None
        if fresh:
            raise FlaxMagicsError("--fresh goes with --seed.", write=f"%flax_key --seed {self.session.seed} --fresh")
        if not name:
            self.reporter.publish(key_bundle(key_card(self.session), self.style))
            return None
        with self._working("drawing") as live:
            run = self.session.run_key(name, cell=self._number)
        self._report(run, live, quiet=quiet)
        return None if displayed_quietly(self.shell, line) else run.output

    @line_magic
    @no_var_expand
    @command(FLAX_EXPORT)
    def flax_export(self, line: str, options: Read, cell: str | None, local_ns: Namespace) -> None:
        """`%flax_export [FILE]`"""
        from .export import export_cells
        from .export.file import write
        from .show.bundle import notice_bundle, script_bundle
        from .show.exported import exported

        given, shell = options.options, self.shell
        name = unquoted(options.rest).strip()
        if name and given["cell"]:
            raise FlaxMagicsError("--cell is instead of a file: leave one of them out.", write=f"%flax_export {name}")
        script = export_cells(self.session, *self.executed(), digests=not given["plain"])
        if name:
            path, replaced = write(name, script.text, force=given["force"])
            self.reporter.publish({} if given["quiet"] else notice_bundle(exported(script, path, replaced), self.style))
        elif given["cell"]:
            shell.set_next_input(script.text)
        else:
            self.reporter.publish(script_bundle(script.text, self.style))

    @line_magic
    @no_var_expand
    @command(FLAX_HISTORY)
    def flax_history(self, line: str, options: Read, cell: str | None, local_ns: Namespace) -> None:
        """`%flax_history`"""
        from .show.bundle import history_bundle

        marks = dict(mark for rerun in self._reruns() for mark in rerun.marks())
        given = options.options
        found = self.session.history(last=given["last"], model=options.rest or None, cells=marks)
        self.reporter.publish(history_bundle(found, given["all"], self.style))

    @line_magic
    @no_var_expand
    @needs_local_scope
    @command(FLAX_REPLAY)
    def flax_replay(self, line: str, options: Read, cell: str | None, local_ns: Namespace) -> Any:
        """`%flax_replay N`"""
        from .show.bundle import replay_bundle

        draw = self._asked.replay_of(options.rest, self.session, self.shell.user_ns, local_ns)
        with self._working("preparing") as live:
            runs = self.session.run_replay(draw)
        given = options.options
        if given["out"]:
            self.shell.user_ns[given["out"]] = runs[-1]
        live.show({} if given["quiet"] else replay_bundle(runs[0], self.style))
        for run in runs[1:]:
            self.reporter.publish({} if given["quiet"] else replay_bundle(run, self.style))
        shown = not given["quiet"] and displayed(self.shell)  # once is enough
        return None if shown or displayed_quietly(self.shell, line) else runs[-1]

    @line_magic
    @no_var_expand
    @command(FLAX_SAVE)
    def flax_save(self, line: str, options: Read, cell: str | None, local_ns: Namespace) -> None:
        """`%flax_save [--autosave] FILE`"""
        from .overview import autosave_ended, saved
        from .show.bundle import notice_bundle

        autosave, quiet = options.options["autosave"], options.options["quiet"]
        if autosave is not None and options.rest:
            raise FlaxMagicsError(
                f"--autosave takes its own file, and `{options.rest}` stands after it.",
                write=f"%flax_save {options.rest}\n%flax_save --autosave {autosave}",
            )
        with self._working("saving") as live:
            if autosave is None:
                notice = saved(self.session.save(file_name(options.rest, FLAX_SAVE)))
            else:
                before = self.session.autosaving
                done = self.session.autosave(None if autosave == "off" else autosave)
                notice = autosave_ended(before) if done is None else saved(done, autosaving=True)
        live.show({} if quiet else notice_bundle(notice, self.style))

    @line_magic
    @no_var_expand
    @command(FLAX_LOAD)
    def flax_load(self, line: str, options: Read, cell: str | None, local_ns: Namespace) -> None:
        """`%flax_load FILE`"""
        from .overview import loaded
        from .show.bundle import loaded_bundle

        with self._working("loading") as live:
            file = file_name(options.rest, FLAX_LOAD)
            restored = self.session.load(file)
            self.journal.loaded(load_of(file, restored))
            found = loaded(restored, quiet=options.options["quiet"])
        live.show(loaded_bundle(found, self.style))

    # -- what they share

    def _tell_of_autosave(self) -> None:
        """Says, once, that saving in the background fails: at the first command after it did."""
        session = existing()
        if session is None or session.autosaving is None:
            return
        error = session.autosaving.news()
        if error is not None:
            from .overview import autosave_failed
            from .show.bundle import notice_bundle

            self.reporter.publish(notice_bundle(autosave_failed(error), self.style))

    def _reruns(self) -> tuple[Rerun, ...]:
        """Cells that drew and were run again."""
        return self.cells.reruns(self.session.cells, self.shell.transform_cell)

    def _working(self, what: str) -> _Working:
        """A live line for as long as the block runs; blank again if it fails."""
        return _Working(self.session, self.reporter.live(), what, self._prepare)

    def _prepare(self) -> None:
        """Gets ready to show a run."""
        if self.style != "text" and self.report != "off":
            from .show.html import prepare

            prepare()

    def _call(self, spec: Command, line: str, options: Read, cell: str | None, run: Callable[[ParsedCall], Run]) -> Any:
        """A command that takes a call, as a line or as a cell: runs it, reports it, gives its value."""
        parsed, assign = self._parsed(spec, line, options, cell)
        with self._working("preparing") as live:
            done = run(parsed)
        name = options.options["out"]
        if name:
            self.shell.user_ns[name] = done
        self._report(done, live, quiet=options.options["quiet"])
        if assign is not None:
            assign(done.output)
            return None
        quiet = parsed.quiet if cell is not None else displayed_quietly(self.shell, line)
        return None if quiet else done.output

    def _parsed(
        self, spec: Command, line: str, options: Read, cell: str | None
    ) -> tuple[ParsedCall, Callable[[Any], None] | None]:
        """The call of a line or of a cell, whose other statements are run; and what binds its value, in a cell."""
        if cell is None:
            return parse_call(options.rest, spec.name), None
        if options.rest:
            raise FlaxMagicsError(
                f"%{spec.name} takes its call from the cell's last line; `{options.rest}` stands on the first.",
                write=f"{spec.name} {line.strip()}",
            )
        body = run_statements_with_call(self.shell, cell, line, f"%{spec.name}")
        return body.call, body.assign

    def _read_call(self, parsed: ParsedCall, local_ns: Namespace) -> tuple[str, Any, Any]:
        """Name, call, and the module that the name stands for in the namespace, if it is another than was registered."""
        shell = self.shell
        call: tuple[str, Any, Any] = self._asked.read_call(parsed, self.session, shell.user_ns, local_ns, self._number)
        return call

    def _draw(self, options: Read, local_ns: Namespace) -> int | tuple[int, int] | None:
        """`--draw`: a number, `last`, `seed:N`, or the name of a Run."""
        text = options.options["draw"]
        return None if text is None else self._asked.draw_of(text, self.session, self.shell.user_ns, local_ns)


def _cell_id(info: Any, shell: Any) -> str | None:
    """The id of the cell that begins, None where the frontend sends none."""
    found = getattr(info, "cell_id", None)
    if found is None:  # older IPythons do not hand it on
        parent = getattr(shell, "parent_header", None)
        metadata = parent.get("metadata") if isinstance(parent, dict) else None
        found = metadata.get("cellId") if isinstance(metadata, dict) else None
    return found if isinstance(found, str) else None


for _names in FlaxMagics.magics.values():
    for _name in set(_names.values()):
        # IPython 7 puts a function around each that binds its signature in every call: as much as all that a line needs.
        setattr(FlaxMagics, _name, getattr(vars(FlaxMagics)[_name], "__wrapped__", vars(FlaxMagics)[_name]))
