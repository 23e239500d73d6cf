"""The session: models, root key and runs, in one immutable `State` that each command replaces by a single assignment.

A command computes everything first and commits at the end. One that fails or is interrupted before that has changed
nothing: same root key, same variables, same runs.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Container, Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import jax

from .base.threads import Overtaken, at_once, until_committed
from .base.types import PyTree
from .cells.journal import cell_number, cells_of_notebook
from .compile.cache import ProgramCache, Services
from .doctor.methods import HealthMethods
from .errors import FlaxMagicsError
from .execution import record, surroundings
from .execution.apply import apply_again, apply_model, init_model
from .execution.build import Building, rebuild
from .execution.call import Call, Translation, as_names
from .execution.plan_cache import PlanCache
from .execution.record import Outcome
from .execution.surroundings import stand_outside
from .line.call import plain_name
from .line.commands import restart_line
from .line.options import ApplyOptions
from .mesh.methods import MeshMethods
from .report.html import FACE
from .rng.keys import RootKey, SeenKeys
from .run import DrawNumber, Note, Run, show_as
from .state.entry import ModelEntry, by_kind
from .state.handles import Models, RegisteredModel, SessionView, Then, entry_now, nothing
from .state.models import Registration, assigned
from .state.runs import StoredRun
from .state.state import REPLAY_BYTES, ReplayBudget, Restart, State, arrays_of
from .state.weights import Written
from .training.methods import LossMethods

if TYPE_CHECKING:
    from .export import Exported
    from .history.table import History
    from .snapshot.save import Autosave, Restored, Saved
    from .summary.view import Summary

FileName = str | os.PathLike[str]

_init = by_kind(init_model, rebuild)
show_as(FACE)


class Session(SessionView, LossMethods, MeshMethods, HealthMethods):
    """Registered models, one root key, and the runs that split it. Needs no IPython.

    Every `apply` is one draw, `root, params, dropout = jax.random.split(root, 3)`, committed once the run has
    succeeded. A method that raises, FlaxMagicsError for a mistake or what the model itself raises, has changed nothing.

    `seed` starts the root key. `disk_cache` keeps compiled programs on disk, in the user's cache directory (True) or in
    the given folder, and loads programs from there; see `compile.compiler` for what that trusts. `replay_bytes` limits
    what is kept for replays alone: inputs, and variables that later runs overwrote. `clock` returns seconds;
    tests replace it.

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
        super().__init__(State(RootKey.from_seed(seed)))
        self.services = Services(ProgramCache(clock), clock, lambda phase: None, SeenKeys({self._state.root.data}))
        """Shared by all commands; its `on_phase` is called with what one begins to do, such as `compiling net`."""
        self.programs.compiler.keep_on_disk(disk_cache)
        self._plans = PlanCache()
        self._keeping = ReplayBudget(replay_bytes, lambda pinned: arrays_of(self._state.models, pinned))
        self.autosaving: Autosave | None = None
        """Saves the session in the background after changes; None where autosave is off."""

    @property
    def programs(self) -> ProgramCache:
        """The cache of compiled programs."""
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

    @until_committed
    def register_all(
        self, modules: Mapping[str, object], *, anew: Container[str] = (), cell: int | None = None, then: Then = nothing
    ) -> list[Registration]:
        """Registers several modules, all or none, and returns what became of each.

        A Construction among them is built first, one draw each. A user-built NNX module whose name is in `anew` counts
        as new, even if one of the same code was registered before. `then` is called with the commit.
        """
        if modules:
            stand_outside(surroundings.of_register, *next(iter(modules.items())), cell)
        building, before = Building(self.services, self.replay_bytes), self._state
        if before.waiting:  # variables from a file wait for their models
            from .snapshot.restore import RestoringBuilding

            building = RestoringBuilding(self.services, self.replay_bytes)
        state, changes, builds = building.register_all(before, modules, anew, cell)
        with self._in_place_of(before, partial(then, changes)):
            for write in filter(None, (change.write for change in changes)):
                write()
            self.services.seen.roots.add(state.root.data)
            self._state = state
            self._keeping.noted += builds
        self._keeping.look(sum(build.size for build in builds))
        for change in changes:
            self._count_replaced(before, state.models[change.name])
            if change.state != "unchanged":
                self._plans.forget(change.name)
        if state.runs is not before.runs and self.autosaving is not None:  # something was built
            self.autosaving.offer(state)
        return changes

    @until_committed
    def assign(
        self, name: str, variables: PyTree | None, *, module: object = None, written: Written | None = None
    ) -> tuple[Note, ...]:
        """Replaces a model's variables, as `models[name].variables = …` does, and returns notes for the report.

        For linen: collections by name, held without a copy, or None, which has the next run initialise. For NNX: an
        `nnx.State` of all or some variables. Trees, shapes and dtypes must fit. `written` tells how the user gave them.
        """
        line = f"session.models['{name}'].variables = …" if written is None else f"%flax_vars {name} = …"
        stand_outside(surroundings.of_state, f"the assignment of `{name}`'s variables", line)
        before = self._state
        entry, notes = self._entry_now(name, module)
        after, write = assigned(entry, variables, written or Written.assignment(name), cell_number())
        with self._in_place_of(before):
            if write is not None:
                write()
            self._state = before.with_variables(after)
        self._count_replaced(before, after)
        if notes:
            self._plans.forget(name)
        if self.autosaving is not None:
            self.autosaving.offer(self._state)
        return notes

    def _entry_now(self, name: str, module: object) -> tuple[ModelEntry, tuple[Note, ...]]:
        """`handles.entry_now`, with waiting variables of a loaded file considered; see `run_apply` for `module`."""
        entry, notes = entry_now(self._state.models, name, module, self.replay_bytes)
        if name not in self._state.waiting or not (notes or name not in self._state.models):
            return entry, notes
        from .snapshot import restore

        return restore.rebound(self._state.waiting, entry, notes)

    # -- draws

    def init(
        self, model: object, /, *args: Any, method: str | None = None, keys_of: DrawNumber | None = None, **kwargs: Any
    ) -> Mapping[str, PyTree]:
        """Initialises a model's variables and returns them as Flax's `init` does: collections by name.

        Opens a draw and uses its `params` key. If this model's `apply` comes next, it uses the draw's other streams.
        """
        name = self._entry(model).name
        call = Call.of(name, method, args, kwargs, command="%flax_init")
        return self.run_init(name, call, keys_of=keys_of).output  # type: ignore[no-any-return]

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
        keys_of: DrawNumber | None = None,
        samples: int | None = None,
        repeat: int = 1,
        eager: bool = False,
        roofline: bool = False,
        **kwargs: PyTree,
    ) -> Run:
        """Makes one draw and one compiled forward pass, and returns the Run that describes it.

        Args:
          model: a registered name or an item of `models`; `args` and `kwargs` are the arguments of the call itself.
          method: a method to call in place of `__call__`; dots reach into submodules.
          mode: `train` or `eval` sets the model's own switch; None runs it as written.
          mutable: collections to hand back: the output is then `(output, updates)`, as in Flax.
          variables: run with these in place of the model's own, and keep no updates.
          key: names of arguments that receive the draw's key of the stream of the same name.
          keys_of: reuse the keys of an earlier draw: its number, or `(seed, number)`. No new draw is made.
          samples: take this many draws at once and map the model over their keys; output arrays get a leading axis.
          repeat: run this many times with the same keys; `timing.steady` has all times.
          eager: run op by op, without compiling.
          roofline: also measure the machine's peak rates, once, into `limits`; without `repeat` there are 20 runs.
        """
        name = self._entry(model, mode).name
        options = ApplyOptions(
            mode=mode,
            mutable=as_names(mutable),
            variables=variables,
            key=as_names(key),
            keys_of=keys_of,
            samples=samples,
            repeat=repeat,
            eager=eager,
            roofline=roofline,
        )
        return self.run_apply(name, Call.of(name, method, args, kwargs, command=options.line), options)

    def key(self, name: str) -> jax.Array:
        """Makes a draw and returns its key of stream `name`: a typed key, shape (), which the session never splits."""
        return self.run_key(name).output  # type: ignore[no-any-return]

    @until_committed
    def restart(self, seed: int, *, fresh: bool = False) -> Restart:
        """Restarts the root key at draw 1 of `seed`; with `fresh` every model also initialises anew at its next use."""
        line = restart_line(seed, fresh=fresh)
        stand_outside(surroundings.of_state, line, line)
        root, before = RootKey.from_seed(seed), self._state
        state, restart = before.restarted(root, fresh=fresh)
        with self._in_place_of(before):
            self._state, self.services.seen = state, SeenKeys({root.data})
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
        """Modules, shapes, variables, FLOPs and streams of a call, by abstract evaluation: nothing is drawn.

        Without arguments and `method` it covers the variables alone; a model whose call takes no inputs is summarized
        by `method="__call__"`. `backward` also counts the FLOPs of the backward pass, which takes three times as long.
        """
        name = self._entry(model, mode).name
        bare = not args and not kwargs and method is None
        call = None if bare else Call.of(name, method, args, kwargs, command="%flax_summary")
        return self.run_summary(name, call, mode, backward=backward)

    def history(
        self, *, last: int | None = None, model: str | None = None, cells: Mapping[int, tuple[str, ...]] | None = None
    ) -> History:
        """Every draw of the session, oldest first. Digests are computed now, of outputs that still exist.

        `last` limits it to the last draws, `model` to one model; `cells` maps a cell's number to remarks on its later life.
        """
        from .history import table

        name = None if model is None else self._entry(model).name
        return table.of_runs(self._state.runs, self._state.root, last, name, cells or {})

    def replay(self, draw: DrawNumber | str | Run, *, step: int | None = None) -> Run:
        """Repeats a draw (its number, `(seed, number)` or `"last"`) or a Run with the same keys, variables and inputs.

        It is no new draw and changes nothing. Where an init and an apply shared the draw, the apply's Run is returned;
        its `agreement` tells whether every bit is the same. With `step` it is the Run of the gradients in one step of a
        training, counted from 0.
        """
        return self.run_replay(draw, step=step)[-1]

    # -- files

    def export(self, file: FileName | None = None, *, plain: bool = False, force: bool = False) -> Exported:
        """The session as a plain Flax script that does not need flax_magics; written to `file` if one is named.

        It consists of the cells that ran; in a script of the runs, and of models and inputs with top-level names. `plain`
        omits the digests. An existing file is replaced only if it is an unchanged export, or with `force`.
        """
        from .export import write

        script = self.run_export(plain=plain)
        if file is not None and self.speaks:
            write(file, script.text, force=force)
        return script

    def run_export(self, *, plain: bool) -> Exported:
        """`export` without writing a file."""
        from .export import export_session

        # The journal has the cells of the process-wide session, not those of a user's second `Session()`.
        cells = cells_of_notebook() if self is _current else None
        return export_session(self._state.models, self.last(len(self)), cells, seed=self.seed, digests=not plain)

    def save(self, path: FileName) -> Saved:
        """Writes variables, root key, history and models' sources into one safetensors file, whole or not at all."""
        from .snapshot.save import save_session

        return save_session(self._state, path, self.services)

    @until_committed
    def load(self, path: FileName, *, then: Then = nothing) -> Restored:
        """Restores a saved session, so that its next draw is the one that would have come. Runs no code from the file.

        Variables go to the models of the same names, registered now or later; unless all fit, nothing is loaded. Root
        key and history become those of the file; models that are not in it stay as they are. `then` is as there.
        """
        line = f"%flax_load {os.fspath(path)}"
        stand_outside(surroundings.of_state, line, line)
        from .snapshot.save import load_session

        before = self._state
        state, writes, restored = load_session(before, path)
        with self._in_place_of(before, partial(then, restored)):
            for write in writes:
                write()
            self._state, self.services.seen, self._plans = state, SeenKeys({state.root.data}), PlanCache()
            self._keeping = self._keeping.emptied()
            self._keeping.noted += [entry.replaced for entry in state.models.values() if entry.replaced is not None]
        return restored

    def autosave(self, path: FileName | None) -> Saved | None:
        """Turns autosave to `path` on: variables are saved in the background after each change. None turns it off.

        The first save happens now, so that an error shows at once.
        """
        from .snapshot.save import autosave_session

        autosaving = None if path is None else autosave_session(self._state, path, self.services)
        earlier, self.autosaving = self.autosaving, autosaving
        if earlier is not None:
            earlier.flush()
        return None if self.autosaving is None else self.autosaving.last

    # -- how: one Run each, committed at the end

    def run_replay(self, draw: DrawNumber | str | Run, *, step: int | None = None) -> list[Run]:
        """`replay` that returns every run of the draw: two where an init and an apply shared it."""
        stand_outside(surroundings.of_replay, draw)
        from .history import table
        from .history.replay import Replaying
        from .training.methods import Again

        models, services = self._state.models, self.services
        retrain = partial(Again, models=models, services=services)
        replaying = Replaying(models, services, self.replay_bytes, retrain)
        stored = table.find(self._state, draw)
        return replaying.replay_all(stored) if step is None else [replaying.replay_step(stored[-1], step)]

    def run_summary(
        self, name: str, call: Call | None, mode: str | None, *, backward: bool = False, module: object = None
    ) -> Summary:
        """`summary` of a parsed call, None for the variables alone; see `run_apply` for `module`."""
        from .summary import summary

        # A summary changes nothing and may run in a traced function, unless the name now stands for another module.
        if module is not None:
            line = f"%flax_summary {name if call is None else call.text}"
            stand_outside(surroundings.of_state, line, line)
        entry, _ = entry_now(self._state.models, name, module)
        if call is None:
            return summary.of_variables(entry)
        with Translation(entry, call):
            draw, phase = self._state.root.draw(), self.services.on_phase  # the draw is not committed
            return summary.of_call(entry, call, mode, draw, backward=backward, phase=phase)

    @until_committed
    def run_init(self, name: str, call: Call, *, keys_of: DrawNumber | None = None, module: object = None) -> Run:
        """`init` of a parsed call; see `run_apply` for `module`."""
        stand_outside(surroundings.of_init, self._entry_before(name, module), call)
        before = self._state
        entry, notes = self._entry_now(name, module)
        with Translation(entry, call):
            outcome = _init(entry, before, call, self.services, keys_of=keys_of, limit=self.replay_bytes, said=notes)
        self._commit(before, outcome)
        return outcome.run

    @until_committed
    def run_apply(
        self, name: str, call: Call, options: ApplyOptions, *, module: object = None, notes: tuple[Note, ...] = ()
    ) -> Run:
        """`apply` of a parsed call.

        `notes` are added to those of the run. `module` is the object that the name stands for now; if it is not the
        registered one, it takes that one's place once the run has succeeded.
        """
        if not notes and (outcome := self.run_again(name, call, options, module)) is not None:
            return outcome.run
        state = self._state
        stand_outside(surroundings.of_apply, state, self._entry_before(name, module), call, options)
        entry, more = self._entry_now(name, module)
        with entry.model.held_still:
            return self._run(state, entry, (*more, *notes), call, options)

    def run_again(
        self, name: str, call: Call, options: ApplyOptions, module: object, caller: Any = None
    ) -> Outcome | None:
        """`run_apply` of a line whose last run left a plan; None, with nothing changed, where only that can run it."""
        state, last = self._state, self._plans.find(name, call, options)
        if last is None or (entry := state.models.get(name)) is None or (state.opened and state.opened[0] == name):
            return None
        if not (module is None or module is entry.model.module):
            return None
        with entry.model.held_still:
            outcome = apply_again(last, state, entry, call, self.services, caller=caller or sys._getframe())
        if outcome is not None:
            try:
                self._commit(state, outcome)
            except Overtaken:
                return None
        return outcome

    def _run(self, state: State, entry: ModelEntry, notes: tuple[Note, ...], call: Call, options: ApplyOptions) -> Run:
        """`run_apply` without a plan of an earlier run; `notes` concern how the entry came to be."""
        with Translation(entry, call):
            applied = apply_model(state, entry, call, options, self.services, said=notes)
        outcome = applied.outcome
        self._commit(state, outcome)
        if notes:  # the name was rebound: plans of the earlier module must not be found again
            self._plans.forget(entry.name)
        elif outcome.write is None:
            self._plans.keep(entry, applied, self.services)
        self.services.seen.went_into(outcome.draw.first, applied.keys_in_call)
        return outcome.run

    @until_committed
    def run_key(self, name: str, *, cell: int | None = None) -> Run:
        """`key` that returns the Run, whose output is the key. `cell`: the number of the notebook cell."""
        if not name.isidentifier():
            write = f"%flax_key {plain_name(name, 'latent')}"
            raise FlaxMagicsError(f"`{name}` is not a name for a stream.", write=write)
        stand_outside(surroundings.of_key, name, cell)
        before, draw = self._state, self._state.root.draw()
        run = record.run_of_key(name, draw, cell, first=before.runs is None)
        self._commit(before, Outcome(run, StoredRun(run), draw))
        return run

    def _commit(self, before: State, outcome: Outcome) -> None:
        """Makes the run part of the session, and writes its updates into an NNX module, in one uninterruptible step."""
        stored, draw, write, commit, state = outcome.stored, outcome.draw, outcome.write, outcome.commit, outcome.state
        state = before.after(stored, draw.last, outcome.entry, outcome.opened) if state is None else state
        # Before the commit: a root that is never split does no harm there, a missing one would hide a reused key.
        for one in draw.draws:
            self.services.seen.roots.add(one.next_root)
        write = write or (commit.make if commit is not None and commit.write is not None else None)
        into = () if commit is None or write is not None else commit.assignments
        assignments = (*into, (object.__setattr__, self, "_state", state), (self._keeping.noted.append, stored))
        # `write` runs Python code. Without it, plain assignments in one C call cost less than deferring the signal.
        with self._committing if write is None else self._in_place_of(before):
            self._check(before)
            if write is not None:
                write()
            at_once(assignments)
        if outcome.committed is not None:
            outcome.committed()
        if outcome.entry is not None:
            self._count_replaced(before, outcome.entry)
        self._keeping.look(stored.size)
        if self.autosaving is not None:
            self.autosaving.after(stored.facts, state)


_current: Session | None = None
"""The session of this process, None if none has been made yet."""


def current(seed: int = 0, *, disk_cache: bool = False, replay_bytes: int = REPLAY_BYTES) -> Session:
    """The session of this process. The arguments count at its creation alone, which is at the first call."""
    global _current
    if _current is None:
        _current = Session(seed, disk_cache=disk_cache, replay_bytes=replay_bytes)
    return _current
