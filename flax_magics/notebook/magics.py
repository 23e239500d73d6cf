"""The commands: read the line, call the session, show what comes back.

Nothing here imports JAX or Flax before a command is used.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from IPython.core.magic import Magics, line_cell_magic, line_magic, magics_class, needs_local_scope, no_var_expand
from traitlets import Bool, Dict, Enum, Int, observe, validate

from ..cells.journal import load_of
from ..errors import FlaxMagicsError, did_you_mean
from ..line.call import CallExpression, parse_call, parse_expression, plain_name
from ..line.commands import (
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
    FLAX_VARS,
    FLAXMODEL,
    KINDS,
)
from ..line.options import LineOptions, file_name, quoted, unquoted
from .command import Namespace, command, mode_of, parse_variables, read_body, run_call, with_package
from .notebook import Notebook, existing
from .run_cell import assigned_to, displayed, displayed_quietly, run_body

if TYPE_CHECKING:
    from .._session import Session
    from ..run import Note, Run


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
        self.notebook = Notebook(shell, self)
        self.reporter, self.journal = self.notebook.reporter, self.notebook.journal
        # What `extension.py` hooks into the shell.
        self.begin_cell, self.end_cell = self.notebook.begin_cell, self.notebook.end_cell
        self.executed, self.model_names = self.notebook.executed, self.notebook.model_names
        self.cell_number = lambda: self.notebook.number
        super().__init__(shell=shell, **kwargs)
        self._ready = True

    # -- settings

    @validate("seed")
    def _check_seed(self, proposal: Any) -> int:
        from ..base.text import plural

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

    @property
    def session(self) -> Session:
        """The session of this kernel, made at first use."""
        return self.notebook.session

    # -- commands

    @line_magic
    @no_var_expand
    @command(FLAX)
    def flax(self, line: str, options: LineOptions, cell: str | None, local_ns: Namespace) -> None:
        """`%flax`"""
        from .status import status, status_bundle

        if options.rest:
            raise FlaxMagicsError(f"%flax takes nothing after it, and `{options.rest}` stands there.", write="%flax")
        self.reporter.publish(status_bundle(status(self.session, self.notebook.reruns()), self.style))

    @line_cell_magic
    @no_var_expand
    @needs_local_scope
    @command(FLAXMODEL)
    def flaxmodel(self, line: str, options: LineOptions, cell: str | None, local_ns: Namespace) -> None:
        """`%%flaxmodel [net = Net(…)]` and `%flaxmodel net [= Net(…)]`"""
        from ..report.html import registered_bundle
        from . import model_cell

        if cell is None:
            found = model_cell.from_line(options.rest, self.shell.user_ns, local_ns)
        else:
            model_cell.read_line(options.rest)  # a mistake there is told before anything runs
            before = dict(self.shell.user_ns)
            body = run_body(self.shell, cell, line)
            found = model_cell.from_cell(options.rest, self.shell.user_ns, body.names, before)
        with self.notebook.working("registering") as live:
            rows = model_cell.check(found, options.options["check"], self.session, self.shell.user_ns, local_ns)
            registered = model_cell.register(found, self.session, self.shell.user_ns, rows, self.notebook.number)
            self.journal.registered(registered)
        live.show({} if options.options["quiet"] else registered_bundle(registered, self.style))

    @line_cell_magic
    @no_var_expand
    @needs_local_scope
    @command(FLAX_INIT)
    def flax_init(self, line: str, options: LineOptions, cell: str | None, local_ns: Namespace) -> Any:
        """`%flax_init net(x)`"""

        def run(parsed: CallExpression) -> Run:
            name, call, module = self.notebook.read_call(parsed, local_ns)
            typed = f"{'%' if cell is None else '%%'}flax_init {line}"
            draw = self.notebook.draw(options.options["draw"], local_ns, typed)
            init_run = self.session.run_init(name, call, draw=draw, module=module)
            if cell is None:
                self.notebook.holds_weights(name, assigned_to(self.shell))
            return init_run

        return run_call(self.notebook, FLAX_INIT, line, options, cell, run)

    @line_cell_magic
    @no_var_expand
    @needs_local_scope
    @command(FLAX_APPLY)
    def flax_apply(self, line: str, options: LineOptions, cell: str | None, local_ns: Namespace) -> Any:
        """`%flax_apply net(x)`"""
        given = options.options
        mode = mode_of(options)

        def run(parsed: CallExpression) -> Run:
            name, call, module = self.notebook.read_call(parsed, local_ns)
            typed = f"{'%' if cell is None else '%%'}flax_apply {line}"
            chosen = self.notebook.asked.options(
                mode,
                given["mutable"],
                given["key"],
                self.notebook.draw(options.options["draw"], local_ns, typed),
                given["draws"],
                given["repeat"] or 1,
                given["eager"],
                given["roofline"],
            )
            if given["variables"] is not None:
                expression = parse_expression(given["variables"], "--variables")
                chosen = replace(chosen, variables=expression.evaluate(self.shell.user_ns, local_ns))
            notes = self.notebook.weight_notes(name) if chosen.variables is None else ()
            return self.session.run_apply(name, call, chosen, module=module, notes=notes)

        return run_call(self.notebook, FLAX_APPLY, line, options, cell, run)

    @line_cell_magic
    @no_var_expand
    @needs_local_scope
    @command(FLAX_SUMMARY)
    def flax_summary(self, line: str, options: LineOptions, cell: str | None, local_ns: Namespace) -> Any:
        """`%flax_summary net(x)`"""
        from ..summary.view import summary_bundle, tree_bundle

        given, mode = options.options, mode_of(options)
        bare = options.rest.rstrip("; ") if cell is None and options.rest.rstrip("; ").isidentifier() else None
        parsed, assign = (
            read_body(self.notebook, FLAX_SUMMARY, line, options, cell)
            if bare is None
            else (parse_call(f"{bare}()", "%flax_summary"), None)
        )
        name, call, module = self.notebook.read_call(parsed, local_ns)
        with self.notebook.working("summarising") as live:
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
    def flax_key(self, line: str, options: LineOptions, cell: str | None, local_ns: Namespace) -> Any:
        """`%flax_key [--seed N [--fresh] | NAME]`"""
        from ..report.html import notice_bundle
        from .status import key_bundle, key_card, restarted

        seed, fresh, quiet = (options.options[name] for name in ("seed", "fresh", "quiet"))
        name = options.rest
        if seed is not None:
            if name:
                restart = f"%flax_key --seed {seed}{' --fresh' if fresh else ''}"
                raise FlaxMagicsError(
                    f"%flax_key restarts with --seed or draws `{name}`, not both in one line.",
                    write=f"{restart}\n%flax_key {plain_name(name, 'latent')}",
                )
            notice = restarted(self.session.restart(seed, fresh=fresh))
            self.journal.restarted(fresh=fresh)
            self.reporter.publish({} if quiet else notice_bundle(notice, self.style))
            return None
        if fresh:
            raise FlaxMagicsError("--fresh goes with --seed.", write=f"%flax_key --seed {self.session.seed} --fresh")
        if not name:
            self.reporter.publish(key_bundle(key_card(self.session), self.style))
            return None
        with self.notebook.working("drawing") as live:
            run = self.session.run_key(name, cell=self.notebook.number)
        self.notebook.report(run, live, quiet=quiet)
        return None if displayed_quietly(self.shell, line) else run.output

    @line_magic
    @no_var_expand
    @needs_local_scope
    @command(FLAX_VARS)
    def flax_vars(self, line: str, options: LineOptions, cell: str | None, local_ns: Namespace) -> Any:
        """`%flax_vars net [= EXPR]`"""
        from ..report.html import notice_bundle
        from ..state.weights import Written
        from .status import variables

        name, expression = parse_variables(options.rest)
        name, _, module = self.notebook.read_call(parse_call(f"{name}()"), local_ns)
        quiet, value = options.options["quiet"], None
        notes: tuple[Note, ...] = ()
        if expression is None:
            value = self.session.variables(name, module)
            if value is None:
                raise FlaxMagicsError(
                    f"`{name}` has no variables yet: its first run initialises them, or an init does.",
                    form=f"%flax_init {name}(…)",
                )
        else:
            given = expression.evaluate(self.shell.user_ns, with_package(self.shell.user_ns, local_ns))
            written = Written(f"%flax_vars {name} = {{}}", expression.source)
            notes = self.session.assign(name, given, module=module, written=written)
            self.notebook.has_set_weights(name)
        self.reporter.publish({} if quiet else notice_bundle(variables(self.session, name, notes), self.style))
        return None if displayed_quietly(self.shell, line) else value

    @line_magic
    @no_var_expand
    @command(FLAX_EXPORT)
    def flax_export(self, line: str, options: LineOptions, cell: str | None, local_ns: Namespace) -> None:
        """`%flax_export [FILE]`"""
        from ..export.file import notice, script_bundle, write
        from ..report.html import notice_bundle

        given, shell = options.options, self.shell
        name = unquoted(options.rest).strip()
        if name and given["cell"]:
            plain = " --plain" if given["plain"] else ""
            raise FlaxMagicsError(
                "--cell is instead of a file: leave one of them out.", write=f"%flax_export{plain} --cell"
            )
        script = self.session.run_export(self.notebook.executed(), plain=given["plain"])
        if name:
            path, replaced = write(name, script.text, force=given["force"])
            self.reporter.publish({} if given["quiet"] else notice_bundle(notice(script, path, replaced), self.style))
        elif given["cell"]:
            shell.set_next_input(script.text)
        else:
            self.reporter.publish(script_bundle(script.text, self.style))

    @line_magic
    @no_var_expand
    @command(FLAX_HISTORY)
    def flax_history(self, line: str, options: LineOptions, cell: str | None, local_ns: Namespace) -> None:
        """`%flax_history`"""
        from ..history.table import history_bundle

        marks = dict(mark for rerun in self.notebook.reruns() for mark in rerun.marks())
        given = options.options
        found = self.session.history(last=given["last"], model=options.rest or None, cells=marks)
        self.reporter.publish(history_bundle(found, given["all"], self.style))

    @line_magic
    @no_var_expand
    @needs_local_scope
    @command(FLAX_REPLAY)
    def flax_replay(self, line: str, options: LineOptions, cell: str | None, local_ns: Namespace) -> Any:
        """`%flax_replay N`"""
        from ..history.table import replay_bundle

        open_line = f"%flax_replay {line[: options.offset]}{{}}"
        draw = self.notebook.asked.replay_of(options.rest, self.session, self.shell.user_ns, local_ns, open_line)
        with self.notebook.working("preparing") as live:
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
    def flax_save(self, line: str, options: LineOptions, cell: str | None, local_ns: Namespace) -> None:
        """`%flax_save [--autosave] FILE`"""
        from ..report.html import notice_bundle
        from ..snapshot.view import autosave_ended, saved

        autosave, quiet = options.options["autosave"], options.options["quiet"]
        if autosave is not None and options.rest:
            raise FlaxMagicsError(
                f"--autosave takes its own file, and `{options.rest}` stands after it.",
                write=f"%flax_save {options.rest}\n%flax_save --autosave {quoted(autosave)}",
            )
        with self.notebook.working("saving") as live:
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
    def flax_load(self, line: str, options: LineOptions, cell: str | None, local_ns: Namespace) -> None:
        """`%flax_load FILE`"""
        from ..snapshot.view import loaded, loaded_bundle

        with self.notebook.working("loading") as live:
            file = file_name(options.rest, FLAX_LOAD)
            restored = self.session.load(file)
            self.journal.loaded(load_of(file, restored))
            found = loaded(restored, quiet=options.options["quiet"])
        live.show(loaded_bundle(found, self.style))


for _names in FlaxMagics.magics.values():
    for _name in set(_names.values()):
        # IPython 7 puts a function around each that binds its signature in every call: as much as all that a line needs.
        setattr(FlaxMagics, _name, getattr(vars(FlaxMagics)[_name], "__wrapped__", vars(FlaxMagics)[_name]))
