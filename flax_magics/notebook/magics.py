"""The commands: each reads its line, calls the session and shows the result.

Importing this module imports neither JAX nor Flax; the first command does.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from IPython.core.magic import Magics, magics_class
from traitlets import Bool, Dict, Enum, Float, Int, TraitError, observe, validate

from ..cells.journal import Load, state_of
from ..errors import FlaxMagicsError, did_you_mean
from ..line.call import CallExpression, parse_call, parse_expression, parse_variables, plain_name
from ..line.commands import (
    FLAX,
    FLAX_APPLY,
    FLAX_DOCTOR,
    FLAX_EXPORT,
    FLAX_FREE,
    FLAX_GRAD,
    FLAX_HISTORY,
    FLAX_INIT,
    FLAX_KEY,
    FLAX_LOAD,
    FLAX_MESH,
    FLAX_REPLAY,
    FLAX_SAVE,
    FLAX_SUMMARY,
    FLAX_TRAIN,
    FLAX_VARS,
    FLAXMODEL,
    restart_line,
)
from ..line.options import KINDS, ApplyOptions, file_name, quoted, unquoted
from .command import CommandUse, command, with_package
from .notebook import KNOWN_LINES, KnownLine, Notebook, existing
from .reporter import Settings
from .run_cell import assigned_to, displayed, run_body

if TYPE_CHECKING:
    from .._session import Session
    from ..report.text import Notice
    from ..run import Note, Run
    from ..snapshot.save import Restored


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
        256_000_000, min=0, help="Bytes kept of what only %flax_replay needs: inputs, and variables overwritten since."
    ).tag(config=True)

    deadline = Float(
        10.0, min=0.1, help="Seconds that a job's processes wait for each other before they run a program together."
    ).tag(config=True)

    free = Bool(True, help="Whether %flax_free runs by itself after a cell that ran out of memory.").tag(config=True)

    def __init__(self, shell: Any, **kwargs: Any) -> None:
        super().__init__(shell=shell, **kwargs)
        self.notebook = Notebook(shell, self._settings)
        # Until what a first run needs was imported, see `end_cell`.
        self._imports_wait = True

    # -- settings

    def _settings(self) -> Settings:
        return Settings(
            self.seed, self.report, self.style, self.notes, self.disk_cache, self.replay_bytes, deadline=self.deadline
        )

    @validate("seed")
    def _check_seed(self, proposal: Any) -> int:
        from ..base.text import plural

        session = existing()
        seed: int = proposal["value"]
        # Traitlets validates in `__init__` as well, before there is a notebook.
        if hasattr(self, "notebook") and session is not None and session.draws and session.seed != seed:
            draws = plural(session.draws, "draw")
            message = f"the session has made {draws} from seed {session.seed}; `seed` is where it starts."
            # After any other error traitlets would keep the value.
            raise TraitError(str(FlaxMagicsError(message, write=restart_line(seed, fresh=False))))
        return seed

    def update_config(self, config: Any) -> None:
        """Sets what `%config` says. What is refused goes no further: the shell would hand it to the next `%load_ext`."""
        try:
            super().update_config(config)
        except TraitError:
            config.pop("FlaxMagics", None)  # `%config` shows one object to all that can be set, to us before the shell
            raise

    @observe("seed", "disk_cache", "replay_bytes", "deadline")
    def _tell_session(self, change: Any) -> None:
        session = existing()
        if session is None:
            return
        if change["name"] == "disk_cache":
            session.programs.compiler.keep_on_disk(change["new"])
        elif change["name"] == "replay_bytes":
            session.replay_bytes = change["new"]
        elif change["name"] == "deadline":
            session.services.deadline = change["new"]
        # Before the first draw nothing depends on the seed.
        elif not session.draws:
            session.restart(change["new"])

    @observe("report", "style", "notes")
    def _tell_reporter(self, change: Any) -> None:
        if hasattr(self, "notebook"):  # traitlets observes in `__init__` as well
            self.notebook.reporter.settings_changed()

    @validate("notes")
    def _check_notes(self, proposal: Any) -> dict[str, bool]:
        notes: dict[str, bool] = proposal["value"]
        for kind, said in notes.items():
            if kind not in KINDS:
                message = f"no sharp bit is of the kind `{kind}`; the kinds: {', '.join(KINDS)}."
                raise TraitError(str(FlaxMagicsError(message, hint=did_you_mean(str(kind), KINDS))))
            if not isinstance(said, bool):
                raise TraitError(str(FlaxMagicsError(f"`{kind}` is said (True) or not (False), not {said!r}.")))
        return notes

    @property
    def session(self) -> Session:
        """The session of this kernel, made at first use."""
        return self.notebook.session

    def end_cell(self, result: Any = None) -> None:
        """Handles `post_run_cell`. After the cell that imports JAX and Flax, imports what a first run needs, too."""
        self.notebook.end_cell(result)
        if self._imports_wait and all(name in sys.modules for name in ("jax", "flax.linen")):
            self._imports_wait = False
            # Where it fails only speed is lost: the first command imports the same, and reports what is wrong.
            with suppress(Exception, KeyboardInterrupt):
                _import()
        if self.free and getattr(result, "error_in_exec", None) is not None and "jax" in sys.modules:
            from .free import free_after

            self.publish(free_after(self.notebook, result, self.style))

    # -- commands

    def publish(self, bundle: Mapping[str, Any], use: CommandUse | None = None) -> None:
        """Shows a MIME bundle, unless the command is quiet."""
        if use is None or not use["quiet"]:
            self.notebook.reporter.publish(bundle)

    def tell(self, notice: Notice, use: CommandUse) -> None:
        """Shows a line of news, unless the command is quiet."""
        from ..report.html import notice_bundle

        self.publish(notice_bundle(notice, self.style), use)

    @command(FLAX)
    def flax(self, use: CommandUse) -> None:
        """`%flax`"""
        from .status import status, status_bundle

        use.takes_nothing()
        self.publish(status_bundle(status(self.session, self.notebook.reruns()), self.style))

    @command(FLAXMODEL)
    def flaxmodel(self, use: CommandUse) -> None:
        """`%%flaxmodel [net = Net(…)]` and `%flaxmodel net [= Net(…)]`"""
        from ..report.html import registered_bundle
        from . import model_cell

        if use.cell is None:
            modules = model_cell.from_line(use)
        else:
            model_cell.read_line(use.rest)  # only to have a mistake told before the body runs
            # A copy: the cell may bind names again, which is compared below.
            names_before = dict(use.user_ns)
            assigned = run_body(self.shell, use.cell, use.line, self.notebook.journal.body)
            modules = model_cell.from_cell(use, assigned, names_before)
        with self.notebook.working("registering") as live:
            registered = model_cell.register(modules, use, model_cell.check(modules, use))
        live.show({} if use["quiet"] else registered_bundle(registered, self.style))

    @command(FLAX_INIT)
    def flax_init(self, use: CommandUse) -> Any:
        """`%flax_init net(x)`"""

        def run(expression: CallExpression) -> Run:
            name, call, module = use.resolve(expression)
            init_run = self.session.run_init(name, call, keys_of=use.keys_of(), module=module)
            target = assigned_to(self.shell) if use.cell is None else None
            variables = self.session.collections[name]
            # `variables = %flax_init net(x)`: a name that now holds the model's weights.
            if target is not None and variables is not None:
                self.notebook.weight_names.hold(name, target, variables)
            return init_run

        variables = use.run(run)
        return None if use["quiet"] and displayed(self.shell) else variables

    @command(FLAX_APPLY)
    def flax_apply(self, use: CommandUse) -> Any:
        """`%flax_apply net(x)`"""
        mode = use.mode  # first, so that a mistake in the options is told before arguments are evaluated

        def run(expression: CallExpression) -> Run:
            name, call, module = use.resolve(expression)
            variables = use["variables"]
            notes = use.notes_of(name, weights=variables is None)
            if variables is not None:
                variables = parse_expression(variables, "--variables").evaluate(use.user_ns, use.local_ns)
            chosen = {option: use[option] for option in ("mutable", "key", "samples", "eager", "roofline")}
            chosen |= {"keys_of": use.keys_of(), "repeat": use["repeat"] or 1}
            options = ApplyOptions(mode=mode, variables=variables, **chosen)
            apply_run = self.session.run_apply(name, call, options, module=module, notes=notes)
            if use.cell is None and options.plain and expression.is_plain:
                lines = self.notebook.known_lines
                if len(lines) >= KNOWN_LINES:
                    lines.clear()
                lines[use.line] = KnownLine(expression, type(call), options, use["out"], use["quiet"])
            return apply_run

        return use.run(run)

    @command(FLAX_GRAD)
    def flax_grad(self, use: CommandUse) -> Any:
        """`%flax_grad loss(net, batch)`"""
        mode, frozen = "eval" if use["eval"] else "train", use["freeze"]

        def run(expression: CallExpression) -> Run:
            name, loss, call, module = use.resolve_loss(expression)
            notes = use.notes_of(name)
            return self.session.run_grad(name, loss, call, mode=mode, freeze=frozen, module=module, notes=notes)

        gradients = use.run(run)
        # Displayed, they would show the report once more.
        return None if gradients is None else use.value_once(gradients)

    @command(FLAX_TRAIN)
    def flax_train(self, use: CommandUse) -> Any:
        """`%flax_train loss(net, data)`"""

        def run(expression: CallExpression) -> Run:
            from ..state.training import Optimizer, TrainOptions

            name, loss, call, module = use.resolve_loss(expression)
            notes = use.notes_of(name)
            earlier = self.session.training_of(name) if use["resume"] else None
            optimizer, data = use["optimizer"], use["eval"] or ("" if earlier is None else earlier.eval)

            def evaluated(option: str, text: str | None) -> Any:
                return use.evaluated(parse_expression(text, option)) if text else None

            options = TrainOptions(
                optimizer=Optimizer(optimizer, evaluated("--optimizer", optimizer)) if optimizer else None,
                eval=evaluated("--eval", data),
                eval_text=data,
                **{option: use[option] for option in ("batch", "epochs", "steps", "freeze", "resume")},
            )
            return self.session.run_train(name, loss, call, options, module=module, notes=notes)

        trained = use.run(run, gives_run=True)
        # Displayed, it would show the report once more, or that which `-q` leaves out.
        hidden = use["quiet"] and displayed(self.shell)
        return None if trained is None or hidden else use.value_once(trained)

    @command(FLAX_SUMMARY)
    def flax_summary(self, use: CommandUse) -> Any:
        """`%flax_summary net(x)`"""
        from ..summary.view import summary_bundle, tree_bundle

        mode, target = use.mode, use.rest.rstrip("; ")
        # A name alone summarizes the variables, without a call.
        bare = use.cell is None and target.isidentifier()
        expression, assign = (parse_call(f"{target}()", "%flax_summary"), None) if bare else use.read_body()
        name, call, module = use.resolve(expression)
        with self.notebook.working("summarising") as live:
            model_call = None if bare else call
            summary = self.session.run_summary(name, model_call, mode, backward=use["backward"], module=module)
            tree = tree_bundle(name, self.session.variables(name, module), self.style) if use["tree"] else {}
        live.show({} if use["quiet"] else summary_bundle(summary, use["depth"], self.style))
        self.publish(tree, use)
        if assign is not None:
            assign(summary)
            return None
        return None if expression.quiet else use.value_once(summary)

    @command(FLAX_KEY)
    def flax_key(self, use: CommandUse) -> Any:
        """`%flax_key [--seed N [--fresh] | NAME]`"""
        from .status import key_bundle, key_card, restarted

        seed, fresh, name = use["seed"], use["fresh"], use.rest
        if seed is not None:
            if name:
                raise FlaxMagicsError(
                    f"%flax_key restarts with --seed or draws `{name}`, not both in one line.",
                    write=f"{restart_line(seed, fresh=fresh)}\n%flax_key {plain_name(name, 'latent')}",
                )
            from ..base.threads import uninterrupted

            with uninterrupted():  # the journal tells an export where the root key was restarted
                restart = self.session.restart(seed, fresh=fresh)
                self.notebook.journal.restarted(fresh=fresh)
            self.tell(restarted(restart), use)
            return None
        if fresh:
            raise FlaxMagicsError("--fresh goes with --seed.", write=restart_line(self.session.seed, fresh=True))
        if not name:
            self.publish(key_bundle(key_card(self.session), self.style))
            return None
        with self.notebook.working("drawing") as live:
            run = self.session.run_key(name, cell=self.notebook.number)
        self.notebook.reporter.report(run, live, quiet=use["quiet"])
        return None if use.silenced else run.output

    @command(FLAX_MESH)
    def flax_mesh(self, use: CommandUse) -> None:
        """`%flax_mesh data=-1`"""
        from ..mesh.methods import mesh_bundle

        if use.rest.strip():
            with self.notebook.working("moving the variables"):
                self.session.mesh(use.rest.strip())
        self.publish(mesh_bundle(self.session.mesh(), self.style), use)

    @command(FLAX_VARS)
    def flax_vars(self, use: CommandUse) -> Any:
        """`%flax_vars net [= EXPR]`"""
        from ..state.weights import Written
        from .status import variables

        name, expression = parse_variables(use.rest)
        name, _, module = use.resolve(parse_call(f"{name}()"), registers=False)
        value = None
        notes: tuple[Note, ...] = ()
        if expression is None:
            value = self.session.variables(name, module)
            if value is None:
                message = f"`{name}` has no variables yet: its first run initialises them, or an init does."
                raise FlaxMagicsError(message, form=f"%flax_init {name}(…)")
        else:
            # Evaluated with the package's name, since messages write `flax_magics.session()` without an import.
            weights = expression.evaluate(use.user_ns, with_package(use.user_ns, use.local_ns))
            written = Written(f"%flax_vars {name} = {{}}", expression.source)
            notes = self.session.assign(name, weights, module=module, written=written)
            self.notebook.weight_names.chosen(name, use.user_ns)
        self.tell(variables(self.session, name, notes), use)
        return None if use.silenced else value

    @command(FLAX_EXPORT)
    def flax_export(self, use: CommandUse) -> None:
        """`%flax_export [FILE]`"""
        from ..export import notice, script_bundle, write

        name = unquoted(use.rest).strip()
        if name and use["cell"]:
            line = f"%flax_export{' --plain' if use['plain'] else ''} --cell"
            raise FlaxMagicsError("--cell is instead of a file: leave one of them out.", write=line)
        script = self.session.run_export(plain=use["plain"])
        if name:
            path, replaced = write(name, script.text, force=use["force"])
            self.tell(notice(script, path, replaced), use)
        elif use["cell"]:
            self.shell.set_next_input(script.text)
        else:
            self.publish(script_bundle(script.text, self.style))

    @command(FLAX_HISTORY)
    def flax_history(self, use: CommandUse) -> None:
        """`%flax_history`"""
        from ..history.table import history_bundle

        marks = dict(mark for rerun in self.notebook.reruns() for mark in rerun.marks())
        if use.rest.isdigit():
            message = "%flax_history takes the name of a model, and the last runs by an option."
            raise FlaxMagicsError(message, write=f"%flax_history --last {use.rest}")
        history = self.session.history(last=use["last"], model=use.rest or None, cells=marks)
        self.publish(history_bundle(history, use["all"], self.style))

    @command(FLAX_REPLAY)
    def flax_replay(self, use: CommandUse) -> Any:
        """`%flax_replay N`"""
        from ..history.replay import notice_of
        from ..report.html import bundle, notice_bundle

        draw = use.replay_of()
        with self.notebook.working("preparing") as live:
            runs = self.session.run_replay(draw, step=use["step"])
        if use["out"]:
            use.user_ns[use["out"]] = runs[-1]
        # The first report replaces the live line, further ones come below.
        live.show({} if use["quiet"] else notice_bundle(notice_of(runs[0]), self.style))
        for run in runs[1:]:
            self.tell(notice_of(run), use)
        if use["step"] is not None:
            self.publish(bundle(runs[-1], "normal", self.style), use)
        return use.value_once(runs[-1])

    @command(FLAX_SAVE)
    def flax_save(self, use: CommandUse) -> None:
        """`%flax_save [--autosave] FILE`"""
        from ..report.html import notice_bundle
        from ..snapshot.save import autosave_ended, saved

        autosave = use["autosave"]
        if autosave is not None and use.rest:
            raise FlaxMagicsError(
                f"--autosave takes its own file, and `{use.rest}` stands after it.",
                write=f"%flax_save {use.rest}\n%flax_save --autosave {quoted(autosave)}",
            )
        with self.notebook.working("saving") as live:
            if autosave is None:
                notice = saved(self.session.save(file_name(use.rest, FLAX_SAVE)))
            else:
                autosaving_before = self.session.autosaving
                first = self.session.autosave(None if autosave == "off" else autosave)
                notice = autosave_ended(autosaving_before) if first is None else saved(first, autosaving=True)
        live.show({} if use["quiet"] else notice_bundle(notice, self.style))

    @command(FLAX_LOAD)
    def flax_load(self, use: CommandUse) -> None:
        """`%flax_load FILE`"""
        from ..snapshot.save import loaded_bundle

        with self.notebook.working("loading") as live:
            file = file_name(use.rest, FLAX_LOAD)

            def loaded(restored: Restored) -> None:
                models = (*restored.models, *(saved.name for saved in restored.waiting))
                # The file's state tells an export whether it still is the file that was loaded.
                size = state_of(restored.path) or (0, 0)
                load = Load(file, size, restored.seed, restored.draws, models, restored.trained)
                self.notebook.journal.loaded(load)

            restored = self.session.load(file, then=loaded)
        live.show(loaded_bundle(restored, self.style, quiet=use["quiet"]))

    @command(FLAX_FREE)
    def flax_free(self, use: CommandUse) -> None:
        """`%flax_free [--replays]`"""
        use.takes_nothing()
        with self.notebook.working("letting go") as live:
            from ..doctor.findings import freed_bundle
            from .free import free

            freed = free(self.notebook, replays=use["replays"])
        live.show(freed_bundle(freed, self.style))

    @command(FLAX_DOCTOR)
    def flax_doctor(self, use: CommandUse) -> None:
        """`%flax_doctor`"""
        use.takes_nothing()
        with self.notebook.working("examining") as live:
            from ..doctor.findings import diagnosis_notice
            from ..report.html import notice_bundle

            diagnosis = self.session.doctor(names=use.user_ns, shell=self.shell)
        live.show(notice_bundle(diagnosis_notice(diagnosis), self.style))


def _import() -> None:
    """Imports the modules that a cell with a model and a first run need."""
    from .. import _session  # noqa: F401
    from ..models import linen  # noqa: F401
    from ..report import html, live  # noqa: F401
    from . import model_cell  # noqa: F401

    # Those of NNX only for a notebook that uses it.
    if "flax.nnx" in sys.modules:
        from ..models import nnx  # noqa: F401
