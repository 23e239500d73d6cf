"""The session: models, the root key, runs. The only thing that changes, and it changes by one assignment.

Everything a command does is worked out first; then one new `State` takes the place of the old. A command that fails or
is interrupted anywhere has changed nothing: same root key, same variables, same runs.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Container, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import jax

from .base.threads import at_once, uninterrupted
from .base.types import PyTree
from .cells.journal import cell_number, cells_of_notebook
from .code.library import library
from .compile.cache import ProgramCache, Services
from .errors import FlaxMagicsError
from .execution import record, surroundings
from .execution.apply import apply_again, apply_model, init_model
from .execution.build import Building, rebuild
from .execution.call import Call, ShapeBefore, as_names, shapes_before
from .execution.idioms import Translation
from .execution.plan_cache import PlanCache
from .execution.record import Outcome
from .line.call import plain_name
from .line.commands import restart_line
from .line.options import ApplyOptions
from .models.calls import Path
from .rng.keys import RootKey, SeenKeys
from .run import DrawNumber, Note, Run
from .state.entry import ModelEntry
from .state.handles import Models, RegisteredModel, SessionView, entry_now, entry_of
from .state.models import Registration, assigned
from .state.runs import REPLAY_BYTES, ReplayBudget, StoredRun, arrays_of
from .state.state import Restart, State
from .state.weights import Written

if TYPE_CHECKING:
    from .export import Exported
    from .history.table import History
    from .snapshot.save import Autosave, Restored, Saved
    from .summary.view import Summary

FileName = str | os.PathLike[str]


class Session(SessionView):
    """Models, one root key, and the runs that split it. Needs no IPython.

    Every `apply` is one draw: `root, params, dropout = jax.random.split(root, 3)`, made only once the run has succeeded.
    A method raises FlaxMagicsError for a mistake, and passes on what the model raises: nothing has changed then.

    `seed` is what the root key starts from. `disk_cache` keeps compiled programs on disk, in the user's cache directory or
    in a folder of that name, and uses what is there (see `DiskCache` for what that trusts): a notebook's commands do, a
    script if it asks for it. `replay_bytes` is how much is kept of what only replays need: inputs, and variables that
    later runs overwrote. `clock` gives seconds, for tests that own time.

    Example::

        session = flax_magics.Session(seed=0)
        session.register("net", Net(8))
        run = session.apply("net", x, mode="train")
        run.output, run.keys, run.timing
    """

    def __init__(
        self,
        seed: int = 0,
        *,
        clock: Callable[[], float] = time.perf_counter,
        disk_cache: bool | FileName = False,
        replay_bytes: int = REPLAY_BYTES,
    ) -> None:
        self._state = State(RootKey.from_seed(seed))
        self.services = Services(ProgramCache(clock), clock, lambda phase: None, SeenKeys({self._state.root.data}))
        """What commands work with; `on_phase` is told what one is doing, as it begins: `compiling net`."""
        self.programs.compiler.keep_on_disk(disk_cache)
        self._plans = PlanCache()
        self._keeping = ReplayBudget(replay_bytes, lambda pinned: arrays_of(self._state.models, pinned))
        self.autosaving: Autosave | None = None
        """What saves the session in the background, None where nothing does."""

    @property
    def programs(self) -> ProgramCache:
        """The programs that are kept."""
        return self.services.programs

    # -- models

    @property
    def models(self) -> Mapping[str, RegisteredModel]:
        """Registered models by name; their `variables` can be read and assigned."""
        return Models(lambda: self._state, self.assign)

    def register(self, name: str, module: object) -> RegisteredModel:
        """Registers a Flax module under `name`, or an edited one in its place.

        The same code and values keep model, variables and programs. After an edit the variables stay if all of them fit.
        """
        self.register_all({name: module})
        return self.models[name]

    def register_all(
        self, modules: Mapping[str, object], *, anew: Container[str] = (), cell: int | None = None
    ) -> list[Registration]:
        """Registers several modules, all or none; says what became of each. A Construction is built, a draw for each.

        `anew` are names that stand for nothing any more: a module of the user's own is a new one there.
        """
        if modules:
            self._stand_outside(surroundings.of_register, *next(iter(modules.items())), cell)
        building = Building(self.services)
        if self._state.waiting:
            from .snapshot.restore import RestoringBuilding

            building = RestoringBuilding(self.services)
        runs_before = self._state.runs
        state, changes, builds = building.register_all(self._state, modules, anew, cell)
        with uninterrupted():
            for change in changes:
                if change.write is not None:
                    change.write()
            self.services.seen.roots.add(state.root.data)
            self._state = state
            self._keeping.noted += builds
        self._keeping.look(sum(build.size for build in builds))
        for change in changes:
            if change.state != "unchanged":
                self._plans.forget(change.name)
        if state.runs is not runs_before and self.autosaving is not None:  # something was built
            self.autosaving.offer(state)
        return changes

    def assign(
        self, name: str, variables: PyTree | None, *, module: object = None, written: Written | None = None
    ) -> tuple[Note, ...]:
        """Gives a model other variables, as `models[name].variables = …` does; gives what is to be said of that.

        Collections by name, held as they are and not copied, or None to have the next run initialise; of an NNX module an
        `nnx.State` of all or some. Trees, shapes and dtypes must be the model's. `written` is how the user gave them.
        """
        line = f"session.models['{name}'].variables = …" if written is None else f"%flax_vars {name} = …"
        self._stand_outside(surroundings.of_state, f"the assignment of `{name}`'s variables", line)
        entry, notes = self._entry_now(name, module)
        after, write = assigned(entry, variables, written or Written.assignment(name), cell_number())
        with uninterrupted():
            if write is not None:
                write()
            self._state = self._state.with_variables(after)
        if notes:
            self._plans.forget(name)
        if self.autosaving is not None:
            self.autosaving.offer(self._state)
        return notes

    def _stand_outside(self, refused: Callable[..., FlaxMagicsError], *what: object) -> None:
        """Whatever draws, runs or changes the session begins here: raises what `refused` gives where it may not."""
        where = surroundings.surroundings()
        if where is not None:
            raise refused(where, *what)

    def _entry(self, model: object, mode: str | None = None) -> ModelEntry:
        if mode not in (None, "train", "eval"):
            raise FlaxMagicsError(f"`mode` is 'train', 'eval' or None, not {mode!r}.")
        return entry_of(self._state.models, model)

    def _entry_now(self, name: str, module: object) -> tuple[ModelEntry, tuple[Note, ...]]:
        entry, notes = entry_now(self._state.models, name, module)
        if name not in self._state.waiting or not (notes or name not in self._state.models):
            return entry, notes
        from .snapshot import restore

        return restore.rebound(self._state.waiting, entry, notes)

    def _entry_before(self, name: str, module: object) -> ModelEntry:
        """The registered entry, or that of a module which its first run is to register."""
        return self._state.models.get(name) or entry_now(self._state.models, name, module)[0]

    def _translation(self, entry: ModelEntry, call: Call) -> Translation:
        return Translation(entry.name, entry.model, call, entry.variables)

    def shapes_before(self, name: str, method: Path) -> dict[str, ShapeBefore]:
        """Shapes of the arguments, by name, for which a model's variables were made, or else its last program."""
        entry = self._state.models.get(name)
        return {} if entry is None else shapes_before(entry, method, self.programs.purposes.get(name, ()))

    # -- draws

    def init(
        self, model: object, /, *args: Any, method: str | None = None, draw: DrawNumber | None = None, **kwargs: Any
    ) -> Mapping[str, PyTree]:
        """Initialises the variables of a model anew, and returns them: collections by name, as Flax's `init` gives them.

        Opens a draw and uses its `params` key; this model's `apply`, if it is next, takes the other streams of the draw.
        """
        name = self._entry(model).name
        call = Call.of(name, method, args, kwargs, command="%flax_init")
        return self.run_init(name, call, draw=draw).output  # type: ignore[no-any-return]

    def apply(
        self,
        model: object,
        /,
        *args: PyTree,
        method: str | None = None,
        mode: str | None = None,
        mutable: str | Iterable[str] = (),
        variables: Mapping[str, PyTree] | None = None,
        key: str | Iterable[str] = (),
        draw: DrawNumber | None = None,
        draws: int | None = None,
        repeat: int = 1,
        eager: bool = False,
        roofline: bool = False,
        **kwargs: PyTree,
    ) -> Run:
        """One draw, one compiled forward pass; the Run says what it was.

        Args:
          model: a registered name, or what `models[...]` gives; `args` and `kwargs` are the call's own arguments.
          method: another method than the call; dots reach into submodules.
          mode: `train` or `eval` sets the model's own switch; None runs it as written.
          mutable: collections to hand back: the output is then `(output, updates)`, as in Flax.
          variables: run with these and keep nothing.
          key: arguments that are given the draw's stream of their name.
          draw: use the keys of an earlier draw: its number, or `(seed, number)`. No new draw is made.
          draws: so many at once, the model mapped over their keys; arrays of the output have an axis of that size in front.
          repeat: run so often with the same keys; `timing.steady` has every time.
          eager: run without compiling.
          roofline: `limits` has what the machine reaches, measured once; without `repeat` there are 20 runs.
        """
        name = self._entry(model, mode).name
        options = ApplyOptions(
            mode=mode,
            mutable=as_names(mutable),
            variables=variables,
            key=as_names(key),
            draw=draw,
            draws=draws,
            repeat=repeat,
            eager=eager,
            roofline=roofline,
        )
        return self.run_apply(name, Call.of(name, method, args, kwargs, command=options.line), options)

    def key(self, name: str) -> jax.Array:
        """Draws a key and returns its stream `name`: a typed key, shape (). The session never splits it."""
        return self.run_key(name).output  # type: ignore[no-any-return]

    def restart(self, seed: int, *, fresh: bool = False) -> Restart:
        """Starts the root key again at draw 1 of `seed`; `fresh` also initialises every model anew at its next use."""
        line = restart_line(seed, fresh=fresh)
        self._stand_outside(surroundings.of_state, line, line)
        root = RootKey.from_seed(seed)
        self._state, restart = self._state.restarted(root, fresh=fresh)
        self.services.seen = SeenKeys({root.data})
        return restart

    # -- what was drawn, and what would be

    def summary(
        self,
        model: object,
        /,
        *args: PyTree,
        method: str | None = None,
        mode: str | None = None,
        backward: bool = False,
        **kwargs: PyTree,
    ) -> Summary:
        """Modules, shapes, variables, FLOPs and streams of a call, by shapes alone: nothing is computed, drawn or kept.

        Without arguments and `method` it is of the variables alone; `method="__call__"` is the call of a model without
        inputs. `backward` counts the backward pass's FLOPs too, which takes about three times as long.
        """
        name = self._entry(model, mode).name
        bare = not args and not kwargs and method is None
        call = None if bare else Call.of(name, method, args, kwargs, command="%flax_summary")
        return self.run_summary(name, call, mode, backward=backward)

    def history(
        self, *, last: int | None = None, model: str | None = None, cells: Mapping[int, tuple[str, ...]] | None = None
    ) -> History:
        """Every draw of the session, oldest first: what drew, keys, input shapes, digest, cell and time, a record each.

        `last` and `model` choose the last draws, and those of one model; `cells` says what became of a cell since. Digests
        are taken of outputs that are still there.
        """
        from .history import table

        name = None if model is None else self._entry(model).name
        return table.of_runs(self._state.runs, self._state.root, last, name, cells or {})

    def replay(self, draw: DrawNumber | str | Run) -> Run:
        """Runs a draw (its number, `(seed, number)`, `"last"`), or a Run alone, again: same keys, variables and inputs.

        Moves nothing, and is no draw. Of a draw that an init and an apply shared, the apply's Run is given; its
        `agreement` tells whether every bit is the same.
        """
        return self.run_replay(draw)[-1]

    # -- files

    def export(self, file: FileName | None = None, *, plain: bool = False, force: bool = False) -> Exported:
        """The session as a plain Flax script, without flax_magics; written to `file` if one is named.

        In a notebook it is made of the cells that ran. In a script it is made of the code behind the models and inputs
        that have names at the top of their files, and of the runs; what has none is left out, and said. `plain` leaves
        the digests out. Only a file that was exported and not changed since is replaced, with `force` any.
        """
        from .export import write

        script = self.run_export(plain=plain)
        if file is not None:
            write(file, script.text, force=force)
        return script

    def run_export(self, *, plain: bool) -> Exported:
        """`export`, which writes no file."""
        from .export import export_session

        cells = cells_of_notebook() if self is existing() else None
        return export_session(self._state.models, self.runs, cells, seed=self.seed, digests=not plain)

    def save(self, path: FileName) -> Saved:
        """Writes variables, root key, history and models' sources into one safetensors file, whole or not at all."""
        from .snapshot.save import save_session

        return save_session(self._state, path)

    def load(self, path: FileName) -> Restored:
        """Restores what `save` wrote: the next draw is the one that would have come. Runs nothing that the file says.

        Variables go to the models of their names, registered now or later: all of them fit, or nothing is loaded. Root
        key and history are those of the file; models that are not in it stay as they are.
        """
        line = f"%flax_load {os.fspath(path)}"
        self._stand_outside(surroundings.of_state, line, line)
        from .snapshot.save import load_session

        state, writes, restored = load_session(self._state, path)
        with uninterrupted():
            for write in writes:
                write()
            self._state, self.services.seen, self._plans = state, SeenKeys({state.root.data}), PlanCache()
            self._keeping = self._keeping.emptied()
            self._keeping.noted += [entry.replaced for entry in state.models.values() if entry.replaced is not None]
        return restored

    def autosave(self, path: FileName | None) -> Saved | None:
        """From now on, `autosaving` saves in the background after whatever changes variables; None ends that.

        The first time is now, so that what cannot be saved is told at once.
        """
        from .snapshot.save import autosave_session

        autosaving = None if path is None else autosave_session(self._state, path)
        earlier, self.autosaving = self.autosaving, autosaving
        if earlier is not None:
            earlier.flush()
        return None if autosaving is None else autosaving.last

    # -- how: one Run each, committed at the end

    def run_replay(self, draw: DrawNumber | str | Run) -> list[Run]:
        """`replay`, giving every run of the draw: two where an init and an apply shared it."""
        self._stand_outside(surroundings.of_replay, draw)
        from .history import table
        from .history.replay import Replaying

        replaying = Replaying(self._state.models, self.services, self.replay_bytes)
        return replaying.replay_all(table.find(self._state, draw))

    def run_summary(
        self, name: str, call: Call | None, mode: str | None, *, backward: bool = False, module: object = None
    ) -> Summary:
        """`summary` with the call as it was written, None for none; see `run_apply` for `module`."""
        from .summary import summary

        if module is not None:  # another than was registered: what JAX traces in its place holds no arrays
            line = f"%flax_summary {name if call is None else call.text}"
            self._stand_outside(surroundings.of_state, line, line)
        entry, _ = entry_now(self._state.models, name, module)
        if call is None:
            return summary.of_variables(entry)
        with self._translation(entry, call):
            draw, phase = self._state.root.draw(), self.services.on_phase  # the next draw is looked at, and not made
            return summary.of_call(entry, call, mode, draw, backward=backward, phase=phase)

    def run_init(self, name: str, call: Call, *, draw: DrawNumber | None = None, module: object = None) -> Run:
        """`init` with the call as it was written; see `run_apply` for `module`."""
        self._stand_outside(surroundings.of_init, self._entry_before(name, module), call)
        entry, notes = self._entry_now(name, module)
        inputs = self._state, entry, call, self.services
        if entry.model.holds_variables:
            with self._translation(entry, call):
                entry.model.signature(call.method)
            outcome = rebuild(*inputs, draw=draw, limit=self.replay_bytes)
        else:
            with self._translation(entry, call):
                outcome = init_model(*inputs, draw=draw, limit=self.replay_bytes, said=notes)
        self._commit(outcome)
        assert outcome.entry is not None
        self._keeping.replace(entry.replaced, outcome.entry.replaced)
        return outcome.run

    def run_apply(
        self, name: str, call: Call, options: ApplyOptions, *, module: object = None, notes: tuple[Note, ...] = ()
    ) -> Run:
        """`apply` with the call as it was written; `notes` are to be said besides what the run itself shows, and `module`,
        if it is not the one that is registered, takes its place once the run has succeeded.
        """
        where = surroundings.surroundings()  # as `_stand_outside` does, which costs a call more
        if where is not None:
            raise surroundings.of_apply(where, self._state, self._entry_before(name, module), call, options)
        library.look()
        entry = self._state.models.get(name)
        if entry is not None and (module is None or module is entry.model.module):
            with entry.model.held_still:
                state = self._state
                shares = state.opened is not None and state.opened[0] == entry.name
                last = None if shares or notes or not options.plain else self._plans.find(entry.name, call, options)
                outcome = None if last is None else apply_again(last, state, entry, call, self.services)
                if outcome is None:
                    return self._run(entry, notes, call, options)
                self._commit(outcome)
                return outcome.run
        entry, more = self._entry_now(name, module)
        return self._run(entry, (*more, *notes), call, options)

    def _run(self, entry: ModelEntry, notes: tuple[Note, ...], call: Call, options: ApplyOptions) -> Run:
        """`run_apply` where everything has to be found out; `notes` are on how the entry came to be."""
        with self._translation(entry, call):
            applied = apply_model(self._state, entry, call, options, self.services, said=notes)
        outcome = applied.outcome
        self._commit(outcome)
        if notes:
            self._plans.forget(entry.name)
        elif outcome.write is None:
            self._plans.keep(entry, applied, self.services)
        for data in applied.keys_in_call:
            self.services.seen.runs.setdefault(data, f"draw {outcome.draw.first.number}")
        return outcome.run

    def run_key(self, name: str, *, cell: int | None = None) -> Run:
        """`key`, as a Run whose output is the key."""
        if not name.isidentifier():
            line = f"%flax_key {plain_name(name, 'latent')}"
            raise FlaxMagicsError(f"`{name}` is not a name for a stream.", write=line)
        self._stand_outside(surroundings.of_key, name, cell)
        draw = self._state.root.draw()
        run = record.run_of_key(name, draw, cell, first=self._state.runs is None)
        self._commit(Outcome(run, StoredRun(run), draw))
        return run

    def _commit(self, outcome: Outcome) -> None:
        """Makes the run part of the session, with what it left behind in the user's own object: one step."""
        _, stored, draw, entry, opened, write, commit = outcome
        state = self._state.after(stored, draw.last, entry, opened)
        for one in draw.draws:
            self.services.seen.roots.add(one.next_root)
        write = write or (commit.make if commit is not None and commit.write is not None else None)
        if write is None:
            into = () if commit is None else commit.assignments
            at_once((*into, (object.__setattr__, self, "_state", state), (self._keeping.noted.append, stored)))
        else:
            with uninterrupted():
                write()
                self._state = state
                self._keeping.noted.append(stored)
        self._keeping.look(stored.size)
        if self.autosaving is not None:
            self.autosaving.after(stored.facts, state)


_current: Session | None = None


def existing() -> Session | None:
    """The session of this process if it has been made."""
    return _current


def current(seed: int = 0, *, disk_cache: bool = False, replay_bytes: int = REPLAY_BYTES) -> Session:
    """The session of this process, made at first use."""
    global _current
    if _current is None:
        _current = Session(seed, disk_cache=disk_cache, replay_bytes=replay_bytes)
    return _current
