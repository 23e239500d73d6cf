"""The session: models, the root key, runs. The only thing that changes, and it changes by one assignment.

Everything a command does is worked out first; then one new `State` takes the place of the old. A command that fails or
is interrupted anywhere has changed nothing: same root key, same variables, same runs.

(The module is called `sessions` because `flax_magics.session()` is the function.)
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax

from .base.critical import at_once, uninterrupted
from .cells.journal import cell_number, cells_of_notebook
from .code.library import library
from .compile.cache import ProgramCache, Services
from .compile.disk_cache import DiskCache
from .errors import FlaxMagicsError
from .execution import record, surroundings
from .execution.apply import apply_again, apply_model, init_model
from .execution.build import build, rebuild
from .execution.call import Call, as_names, method_path, spell_call
from .execution.idioms import Translation
from .execution.plan_cache import PlanCache
from .execution.record import Outcome
from .line.call import plain_name
from .line.options import ApplyOptions
from .models.construction import Construction
from .rng.keys import RootKey, SeenKeys
from .run import Note, Run
from .state.budget import REPLAY_BYTES, ReplayBudget, arrays_of, checked_limit
from .state.entry import ModelEntry
from .state.handles import Models, RegisteredModel, entry_now, entry_of
from .state.models import Registration, assigned, register
from .state.runs import StoredRun, backwards, newest
from .state.state import Restart, State
from .state.weights import Written

if TYPE_CHECKING:
    from .export.file import Exported
    from .history.table import History
    from .snapshot.save import Autosave, Restored, Saved
    from .state.saved import SavedModel
    from .summary.view import Summary


class Session:
    """Models, one root key, and the runs that split it. Needs no IPython.

    Every `apply` is one draw: `root, params, dropout = jax.random.split(root, 3)`, made only once the run has succeeded.

    Args:
      seed: what the root key starts from.
      clock: gives seconds; for tests that own time.
      disk_cache: keep compiled programs on disk, in the user's cache directory or in a folder of that name, and use what
        is there; see `DiskCache` for what that trusts. The commands of a notebook do, a script does if it asks for it.
      replay_bytes: how much is kept of what only replays need: inputs, and variables that later runs overwrote.

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
        disk_cache: bool | str | os.PathLike[str] = False,
        replay_bytes: int = REPLAY_BYTES,
    ) -> None:
        self._state = State(RootKey.from_seed(_checked_seed(seed)))
        self.services = Services(ProgramCache(clock), clock, _ignore, SeenKeys({self._state.root.data}))
        """What commands work with; `on_phase` is told what one is doing, as it begins: `compiling net`."""
        self.keep_on_disk(disk_cache)
        self._plans = PlanCache()
        self._keeping = ReplayBudget(replay_bytes, lambda pinned: arrays_of(self._state.models, pinned))
        self.autosaving: Autosave | None = None
        """What saves the session in the background, None where nothing does."""

    def keep_on_disk(self, where: bool | str | os.PathLike[str]) -> None:
        """Turns the disk cache on or off: see `disk_cache` of the class."""
        folder = None if isinstance(where, bool) else Path(where)
        self.programs.compiler.disk = None if where is False else DiskCache(folder)

    # -- what there is

    @property
    def programs(self) -> ProgramCache:
        """The programs that are kept."""
        return self.services.programs

    @property
    def seed(self) -> int:
        """The seed that the root key came from."""
        return self._state.root.seed

    @property
    def draws(self) -> int:
        """How many draws have been made under this seed."""
        return self._state.root.draws

    @property
    def root_key(self) -> jax.Array:
        """The typed key, shape (), that the next draw will split. Not to be used: it would be used twice."""
        return self._state.root.key

    @property
    def models(self) -> Mapping[str, RegisteredModel]:
        """Registered models by name."""
        return Models(lambda: self._state, self.assign)

    def module(self, name: str) -> Any:
        """The module that is registered as `name`, None if there is none."""
        entry = self._state.models.get(name)
        return None if entry is None else entry.model.module

    @property
    def runs(self) -> list[Run]:
        """Every run so far, newest last; outputs that nobody holds any more are gone."""
        return self.last(len(self))

    def last(self, n: int) -> list[Run]:
        """The last `n` runs, newest last."""
        return newest(self._state.runs, n)

    @property
    def cells(self) -> dict[int, tuple[str, ...]]:
        """Numbers of this kernel's cells that drew → the calls that they made, as they were written."""
        found: dict[int, set[str]] = {}
        for kept in backwards(self._state.runs):
            if kept.facts["cell"] is not None and not kept.facts["replayed"] and kept.facts["elsewhere"] is None:
                call = "" if kept.facts["command"] == "key" else kept.facts["call"]
                found.setdefault(kept.facts["cell"], set()).add(call)
        return {number: tuple(calls) for number, calls in found.items()}

    @property
    def replay_bytes(self) -> int:
        """How many bytes are kept for replays at most; can be set."""
        return self._keeping.limit

    @replay_bytes.setter
    def replay_bytes(self, limit: int) -> None:
        self._keeping.limit = checked_limit(limit)
        self._keeping.settle()

    def settle(self) -> None:
        """Lets go at once of what is more than `replay_bytes`. A session does so by itself, some runs later."""
        self._keeping.settle()

    @property
    def kept_bytes(self) -> int:
        """How many bytes only replays need now."""
        return self._keeping.bytes

    def __len__(self) -> int:
        return 0 if self._state.runs is None else self._state.runs.length

    def __bool__(self) -> bool:
        return True

    def __repr__(self) -> str:
        models = ", ".join(self._state.models) or "none"
        return f"<Session: seed {self.seed}, {self.draws} draws, models: {models}>"

    # -- models

    def register(self, name: str, module: Any) -> RegisteredModel:
        """Registers a Flax module under `name`, or an edited one in its place.

        The same code and values keep the model, its variables and its programs. After an edit the variables stay if the
        whole tree still fits.

        Raises:
          FlaxMagicsError: `module` is no module that can be registered.
        """
        self.register_all({name: module})
        return self.models[name]

    def register_all(
        self, modules: Mapping[str, Any], *, anew: Container[str] = (), cell: int | None = None
    ) -> list[Registration]:
        """Registers several modules, all or none; says what became of each.

        Args:
          modules: name → module, or the Construction of an NNX module that the session is to build: a draw for each.
          anew: names that stand for nothing any more: a module of the user's own is a new one there.
          cell: number of the cell that asks for it.
        """
        if modules:
            self._stand_outside(lambda where: surroundings.of_register(where, *next(iter(modules.items())), cell))
        state = self._state
        before = state.runs
        changes: list[Registration] = []
        kept: list[StoredRun] = []
        for name, module in modules.items():
            if isinstance(module, Construction):
                state, change, built = self._built(state, name, module, cell)
                kept += [] if built is None else [built]
            else:
                old = state.models.get(name)
                if old is not None and name in anew and old.model.holds_variables and old.built is None:
                    old = None
                entry, change = register(old, name, module)
                if name in state.waiting:
                    from .snapshot import restore

                    state, change = restore.registered(state, entry, change)
                else:
                    state = replace(state, models={**state.models, name: entry})
            changes.append(change)
            gone = change.variables in ("dropped", "own") and not isinstance(module, Construction)
            if (gone or change.unfit) and state.opened is not None and state.opened[0] == name:
                state = replace(state, opened=None)  # its `params` went into variables that are no more
        with uninterrupted():
            for change in changes:
                if change.write is not None:
                    change.write()
            self.services.seen.roots.add(state.root.data)
            self._state = state
            self._keeping.noted += kept
        self._keeping.look(sum(one.size for one in kept))
        for change in changes:
            if change.state != "unchanged":
                self._plans.forget(change.name)
        if state.runs is not before:  # something was built
            self._autosave()
        return changes

    def _built(
        self, state: State, name: str, recipe: Construction, cell: int | None
    ) -> tuple[State, Registration, StoredRun | None]:
        """The state with the module of `recipe`, what became of the name, and the run if it was built now.

        A module that a file's session had built is built with the keys of that time, which is no draw, if its variables
        then fit.
        """
        waiting = state.waiting
        if name in waiting:
            from .snapshot import restore

            restored = restore.built_before(state, name, recipe)
            if restored is not None:
                return (*restored, None)
        entry, change, run, draw = build(state, name, recipe, self.services, cell=cell)
        if run is None or draw is None:
            return replace(state, models={**state.models, name: entry}), change, None
        if name in waiting:
            entry, change = restore.matched(waiting, entry, change) or (entry, change)
        after = state.after(run, draw, entry, (name, draw))
        return (replace(after, waiting=waiting) if change.unfit else after), change, run

    def _stand_outside(self, refused: Callable[[str], FlaxMagicsError]) -> None:
        """Whatever draws, runs or changes the session begins here, before anything happens.

        Raises:
          FlaxMagicsError: what `refused` gives, where it stands in a function that JAX traces, or the like.
        """
        where = surroundings.surroundings()
        if where is not None:
            raise refused(where)

    def _entry(self, model: Any) -> ModelEntry:
        return entry_of(self._state.models, model)

    def _translation(self, entry: ModelEntry, call: Call) -> Translation:
        return Translation(entry.name, entry.model, call, entry.variables)

    def _entry_now(self, name: str, module: Any) -> tuple[ModelEntry, tuple[Note, ...]]:
        entry, notes = entry_now(self._state.models, name, module)
        if not notes or name not in self._state.waiting:
            return entry, notes
        from .snapshot import restore

        return restore.rebound(self._state.waiting, entry, notes)

    def assign(
        self, name: str, variables: Mapping[str, Any] | None, *, module: Any = None, written: Written | None = None
    ) -> tuple[Note, ...]:
        """Gives a model other variables, as `models[name].variables = …` does. They are held as they are, not copied.

        Args:
          variables: of a linen model collections by name, None to have the next run initialise; of an NNX module an
            `nnx.State` of all or some of its variables. What the model has must be there: tree, shapes and dtypes.
          module: see `run_apply`.
          written: how the user gave them, for what a message says to write.

        Returns:
          What is to be said.

        Raises:
          FlaxMagicsError: they do not fit, or an array of them is gone. Nothing has changed.
        """
        line = f"session.models['{name}'].variables = …" if written is None else f"%flax_vars {name} = …"
        self._stand_outside(lambda where: surroundings.of_state(where, f"the assignment of `{name}`'s variables", line))
        entry, notes = self._entry_now(name, module)
        after, write = assigned(entry, variables, written or Written.assignment(name), cell_number())
        with uninterrupted():
            if write is not None:
                write()
            self._state = self._state.with_variables(after)
        if notes:
            self._plans.forget(name)
        self._autosave()
        return notes

    @property
    def collections(self) -> dict[str, Mapping[str, Any] | None]:
        """The variables that the session holds, by model; None for an NNX module, and before the first init."""
        return {name: entry.variables for name, entry in self._state.models.items()}

    # -- draws

    def init(
        self,
        model: Any,
        /,
        *args: Any,
        method: str | None = None,
        draw: int | tuple[int, int] | None = None,
        **kwargs: Any,
    ) -> Mapping[str, Any]:
        """Initialises the variables of a model anew, and returns them: collections by name, as Flax's `init` gives them.

        Opens a draw and uses its `params` key; if the next draw is this model's `apply`, it takes the same draw's other
        streams.

        Raises:
          FlaxMagicsError: the model is unknown or the arguments do not fit. What the model raises is passed on.
        """
        name = self._entry(model).name
        call = Call(method_path(method), args, kwargs, spell_call(name, method, args, kwargs), command="%flax_init")
        return self.run_init(name, call, draw=draw).output  # type: ignore[no-any-return]

    def apply(
        self,
        model: Any,
        /,
        *args: Any,
        method: str | None = None,
        mode: str | None = None,
        mutable: str | Iterable[str] = (),
        variables: Mapping[str, Any] | None = None,
        key: str | Iterable[str] = (),
        draw: int | tuple[int, int] | None = None,
        draws: int | None = None,
        repeat: int = 1,
        eager: bool = False,
        roofline: bool = False,
        **kwargs: Any,
    ) -> Run:
        """One draw, one compiled forward pass; the Run says what it was.

        Args:
          model: a registered name, or what `models[...]` gives.
          args, kwargs: the call's own arguments.
          method: another method than the call; dots reach into submodules.
          mode: `train` or `eval` sets the model's own switch; None runs it as written.
          mutable: collections to hand back: the output is then `(output, updates)`, as in Flax.
          variables: run with these and keep nothing.
          key: arguments that are given the draw's stream of their name.
          draw: use the keys of an earlier draw: its number, or `(seed, number)`. No new draw is made.
          draws: so many draws at once, the model mapped over their keys; every array of the output has an axis of that
            size in front.
          repeat: run so often with the same keys; `timing.steady` has every time.
          eager: run without compiling.
          roofline: `limits` has what the machine reaches, measured once; without `repeat` there are 20 runs.

        Raises:
          FlaxMagicsError: a mistake in the call. What the model raises is passed on. Either way nothing has changed.
        """
        if mode not in (None, "train", "eval"):
            raise FlaxMagicsError(f"`mode` is 'train', 'eval' or None, not {mode!r}.")
        name = self._entry(model).name
        options = ApplyOptions(mode, as_names(mutable), variables, as_names(key), draw, draws, repeat, eager, roofline)
        call = Call(method_path(method), args, kwargs, spell_call(name, method, args, kwargs), command=options.line)
        return self.run_apply(name, call, options)

    def key(self, name: str) -> jax.Array:
        """Draws a key and returns its stream `name`: a typed key, shape (). The session never splits it."""
        return self.run_key(name).output  # type: ignore[no-any-return]

    def export(
        self, file: str | os.PathLike[str] | None = None, *, plain: bool = False, force: bool = False
    ) -> Exported:
        """The session as a plain Flax script, without flax_magics; written to `file` if one is named.

        In a notebook it is made of the cells that ran. In a script it is made of the code behind the models and inputs
        that have names at the top of their files, and of the runs; what has none is left out, and said.

        Args:
          plain: leave out the digests that the script prints.
          force: replace a file whatever it is; without it only one that was exported and not changed since.

        Raises:
          FlaxMagicsError: the file cannot be written, or is somebody else's.
        """
        from .export import of_session

        cells = cells_of_notebook() if self is existing() else None
        return of_session(self, cells, file, plain=plain, force=force)

    def summary(
        self,
        model: Any,
        /,
        *args: Any,
        method: str | None = None,
        mode: str | None = None,
        backward: bool = False,
        **kwargs: Any,
    ) -> Summary:
        """Modules, shapes, variables, FLOPs and streams of a call, by shapes alone: nothing is computed, drawn or kept.

        Without arguments and `method` it is of the variables alone, where there are some; `method="__call__"` is the
        call of a model without inputs. See `apply` for the other arguments.

        Args:
          backward: count the FLOPs of the backward pass too, which takes about three times as long.

        Raises:
          FlaxMagicsError: a mistake in the call. What the model raises is passed on.
        """
        if mode not in (None, "train", "eval"):
            raise FlaxMagicsError(f"`mode` is 'train', 'eval' or None, not {mode!r}.")
        name = self._entry(model).name
        if not args and not kwargs and method is None:
            return self.run_summary(name, None, mode, backward=backward)
        call = Call(method_path(method), args, kwargs, spell_call(name, method, args, kwargs), command="%flax_summary")
        return self.run_summary(name, call, mode, backward=backward)

    def history(
        self, *, last: int | None = None, model: str | None = None, cells: Mapping[int, tuple[str, ...]] | None = None
    ) -> History:
        """Every draw of the session, oldest first: what drew, keys, input shapes, digest, cell and time, a record each.

        A command that failed drew nothing and is not there. Digests are taken of outputs that are still there.

        Args:
          last: so many of the last draws alone.
          model: those of one model alone.
          cells: a cell's number → what became of that cell since.

        Raises:
          FlaxMagicsError: the model is unknown.
        """
        from .history import table

        name = None if model is None else self._entry(model).name
        return table.of_runs(self._state.runs, self._state.root, last, name, cells or {})

    def replay(self, draw: int | tuple[int, int] | str | Run) -> Run:
        """Runs a draw again, with its keys, its variables and its inputs. Moves nothing, and is no draw.

        Args:
          draw: its number, `(seed, number)`, `"last"`, or a Run, for which it is the run alone.

        Returns:
          A Run that is marked as replayed and whose `agreement` tells whether every bit is the same; of a draw that an
          init and an apply shared, that of the apply.

        Raises:
          FlaxMagicsError: there is no such draw, or what the run needs was let go of. What the model raises is passed on.
        """
        return self.run_replay(draw)[-1]

    def run_replay(self, draw: int | tuple[int, int] | str | Run) -> list[Run]:
        """`replay`, giving every run of the draw: two where an init and an apply shared it."""
        self._stand_outside(lambda where: surroundings.of_replay(where, draw))
        from .history import table
        from .history.replay import Replaying

        replaying = Replaying(self._state.models, self.services, self.replay_bytes)
        runs = []
        for kept in table.find(self._state, draw):
            run = replaying.replay(kept)
            differs = run.agreement is not None and run.agreement.identical is False
            kept.replays = (kept.replays[0] + 1, kept.replays[1] or differs)
            runs.append(run)
        return runs

    def run_summary(
        self, name: str, call: Call | None, mode: str | None, *, backward: bool = False, module: Any = None
    ) -> Summary:
        """`summary` with the call as it was written, None for none; see `run_apply` for `module`."""
        from .summary import summary

        if module is not None:  # another than was registered: what JAX traces in its place holds no arrays
            line = f"%flax_summary {name if call is None else call.text}"
            self._stand_outside(lambda where: surroundings.of_state(where, line, line))
        entry, _ = entry_now(self._state.models, name, module)
        if call is None:
            return summary.of_variables(entry)
        with self._translation(entry, call):
            # The next draw is looked at, and not made.
            return summary.of_call(
                entry, call, mode, self._state.root.draw(), backward=backward, phase=self.services.on_phase
            )

    def variables(self, name: str, module: Any = None) -> Any:
        """The variables of a model as `models[name].variables` gives them; see `run_apply` for `module`."""
        entry, _ = entry_now(self._state.models, name, module)
        model: Any = entry.model
        return model.state() if model.holds_variables else entry.variables

    def restart(self, seed: int, *, fresh: bool = False) -> Restart:
        """Starts the root key again at draw 1 of `seed`; `fresh` also initialises every model anew at its next use."""
        line = f"%flax_key --seed {seed}{' --fresh' if fresh else ''}"
        self._stand_outside(lambda where: surroundings.of_state(where, line, line))
        root = RootKey.from_seed(_checked_seed(seed))
        self._state, restart = self._state.restarted(root, fresh=fresh)
        self.services.seen = SeenKeys({root.data})
        return restart

    # -- files

    @property
    def waiting(self) -> Mapping[str, SavedModel]:
        """Models of a file that was loaded whose variables nobody has yet: they are given to what is registered so."""
        return {name: saved for name, saved in self._state.waiting.items() if saved.ready}

    def save(self, path: str | os.PathLike[str]) -> Saved:
        """Writes models' variables, root key, history and model sources into one file, whole or not at all.

        It is a safetensors file: `safetensors.numpy.load_file(path)` gives the arrays.

        Raises:
          FlaxMagicsError: something cannot be saved, or not there. The file that was there is as it was.
        """
        from .snapshot.save import save_session

        return save_session(self._state, path)

    def load(self, path: str | os.PathLike[str]) -> Restored:
        """Restores what `save` wrote: the next draw is the one that would have come. Runs nothing that the file says.

        Variables go to the models that are registered under their names, now or later; root key and history are those
        of the file. Models that are not in it stay as they are.

        Raises:
          FlaxMagicsError: the file is none of ours or damaged, or a model that is registered does not have variables
            like those in it, which is told leaf by leaf. Nothing has changed.
        """
        line = f"%flax_load {os.fspath(path)}"
        self._stand_outside(lambda where: surroundings.of_state(where, line, line))
        from .snapshot.save import load_session

        state, writes, restored = load_session(self._state, path)
        with uninterrupted():
            for write in writes:
                write()
            self._state, self.services.seen, self._plans = state, SeenKeys({state.root.data}), PlanCache()
            self._keeping = self._keeping.emptied()
            self._keeping.noted += [entry.replaced for entry in state.models.values() if entry.replaced is not None]
        return restored

    def autosave(self, path: str | os.PathLike[str] | None) -> Saved | None:
        """From now on, saves in the background after whatever changes variables; None ends that.

        The first time is now, so that what cannot be saved is told at once. `autosaving` is what does it.

        Raises:
          FlaxMagicsError: see `save`. Nothing is saved in the background then.
        """
        from .snapshot.save import autosave_session

        autosaving = None if path is None else autosave_session(self._state, path)
        saved = None if autosaving is None else autosaving.last
        before, self.autosaving = self.autosaving, autosaving
        if before is not None:
            before.flush()
        return saved

    def _autosave(self) -> None:
        if self.autosaving is not None:
            self.autosaving.offer(self._state)

    # -- how: one Run each, committed at the end

    def run_init(self, name: str, call: Call, *, draw: Any = None, module: Any = None) -> Run:
        """`init` with the call as it was written; see `run_apply` for `module`."""
        self._stand_outside(lambda where: surroundings.of_init(where, self._entry(name), call))
        entry, notes = self._entry_now(name, module)
        if entry.model.holds_variables:
            with self._translation(entry, call):
                entry.model.signature(call.method)
            outcome = rebuild(self._state, entry, call, self.services, draw=draw, limit=self.replay_bytes)
        else:
            with self._translation(entry, call):
                outcome = init_model(
                    self._state, entry, call, self.services, draw=draw, limit=self.replay_bytes, said=notes
                )
        self._commit(outcome)
        self._keep_replaced(entry, outcome.entry)
        return outcome.run

    def _keep_replaced(self, before: ModelEntry, after: ModelEntry | None) -> None:
        """Counts the variables that an init replaced among what is kept, in the place of those that one replaced before."""
        if after is None or after.replaced is before.replaced:
            return
        if before.replaced is not None:
            self._keeping.drop(before.replaced)
        if after.replaced is not None:
            self._keeping.noted.append(after.replaced)
            self._keeping.look(after.replaced.size)

    def run_apply(
        self, name: str, call: Call, options: ApplyOptions, *, module: Any = None, notes: tuple[Note, ...] = ()
    ) -> Run:
        """`apply` with the call as it was written.

        Args:
          notes: what is to be said of it besides what the run itself shows.
          module: what the name stands for now, if it may be another module than was registered: then that one is
            registered in its place, once the run has succeeded.
        """
        where = surroundings.surroundings()  # `_stand_outside`, whose function takes longer to make than to look
        if where is not None:
            raise surroundings.of_apply(where, self._state, self._entry(name), call, options)
        library.look()
        entry = self._state.models.get(name) or self._entry(name)
        if module is None or module is entry.model.module:
            with entry.model.steady:
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
        self._stand_outside(lambda where: surroundings.of_key(where, name, cell))
        now = self._state.root.draw()
        run = record.run_of_key(name, now, cell, first=self._state.runs is None)
        self._commit(Outcome(run, StoredRun(run), now))
        return run

    def _commit(self, outcome: Outcome) -> None:
        """Makes the run part of the session, with what it left behind in the user's own object: one step."""
        _, kept, draw, entry, opened, write, commit = outcome
        new = self._state.after(kept, draw.last, entry, opened)
        for one in draw.draws:
            self.services.seen.roots.add(one.next_root)
        write = write or (commit.make if commit is not None and commit.write is not None else None)
        if write is None:
            into = () if commit is None else commit.assignments
            at_once((*into, (object.__setattr__, self, "_state", new), (self._keeping.noted.append, kept)))
        else:
            with uninterrupted():
                write()
                self._state = new
                self._keeping.noted.append(kept)
        self._keeping.look(kept.size)
        if self.autosaving is not None:
            self.autosaving.after(kept.facts, new)


def _ignore(phase: str) -> None:
    pass


def _checked_seed(seed: Any) -> int:
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise FlaxMagicsError(f"a seed is an int, not {seed!r}.")
    return seed


_current: Session | None = None


def existing() -> Session | None:
    """The session of this process if it has been made."""
    return _current


def current(seed: int = 0) -> Session:
    """The session of this process, made at first use with `seed`."""
    global _current
    if _current is None:
        _current = Session(seed)
    return _current
