"""The session: models, the root key, runs. The only thing that changes, and it changes by one assignment.

Everything a command does is worked out first; then one new `State` takes the place of the old. A command that fails or
is interrupted anywhere has changed nothing: same root key, same variables, same runs.

(The module is called `sessions` because `flax_magics.session()` is the function.)
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import jax

from . import history, registry
from .edits import initialised
from .errors import FlaxMagicsError, did_you_mean
from .execution import Execution, Options, execute, plain_errors
from .keys import Draw, Root, Streams
from .models import is_module_class, spell_construction
from .notes import OUTDATED, SeenKeys, of_params, summary
from .prepare import Call, as_names, init_by_hand, method_path, prepare_init, spell_call
from .program import Programs, devices_of
from .registry import Change, Entry, Models, RegisteredModel
from .run import Made, Note, Run, Timing
from .state import Restart, State


class Session:
    """Models, one root key, and the runs that split it. Needs no IPython.

    Every `apply` is one draw: `root, params, dropout = jax.random.split(root, 3)`, made only once the run has succeeded.

    Args:
      seed: what the root key starts from.
      clock: gives seconds; for tests that own time.

    Example::

        session = flax_magics.Session(seed=0)
        session.register("net", Net(8))
        run = session.apply("net", x, mode="train")
        run.output, run.keys, run.timing
    """

    def __init__(self, seed: int = 0, *, clock: Callable[[], float] = time.perf_counter) -> None:
        self._state = State(Root.from_seed(_checked_seed(seed)))
        self._seen = SeenKeys()
        self._seen.roots.add(self._state.root.data)
        self.programs = Programs(clock)
        self.clock = clock
        self.on_phase: Callable[[str], None] = _ignore
        """Told what a command is doing, as it begins: `compiling net`."""

    # -- what there is

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
        return Models(self, lambda: self._state.models)

    @property
    def runs(self) -> list[Run]:
        """Every run so far, newest last; outputs that nobody holds any more are gone."""
        return self.last(len(self))

    def last(self, n: int) -> list[Run]:
        """The last `n` runs, newest last."""
        return history.newest(self._state.runs, n)

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
        return RegisteredModel(self, name)

    def register_all(self, modules: Mapping[str, Any]) -> list[Change]:
        """Registers several modules, all or none; says what became of each."""
        models = dict(self._state.models)
        opened = self._state.opened
        changes = []
        for name, module in modules.items():
            models[name], change = registry.register(models.get(name), name, module)
            changes.append(change)
            if change.variables == "dropped" and opened is not None and opened[0] == name:
                opened = None  # its `params` went into variables that are no more
        self._state = replace(self._state, models=models, opened=opened)
        return changes

    def _entry(self, model: Any) -> Entry:
        models = self._state.models
        if isinstance(model, RegisteredModel):
            model = model.name
        if isinstance(model, str):
            if model in models:
                return models[model]
            known = ", ".join(models) or "none yet"
            raise FlaxMagicsError(
                f"no model is registered as `{model}`; registered: {known}.",
                hint=did_you_mean(model, models),
                write=f"%flaxmodel {model}" if not models else None,
            )
        for entry in models.values():
            if entry.model.module is model:
                return entry
        write = spell_construction(model, "%flaxmodel") if is_module_class(model) else None
        raise FlaxMagicsError("this model is not registered.", write=write or "session.register('net', model)")

    def _entry_now(self, name: str, module: Any) -> tuple[Entry, tuple[Note, ...]]:
        entry = self._entry(name)
        if module is None or module is entry.model.module:
            return entry, ()
        entry, change = registry.register(entry, name, module)
        if change.state == "unchanged":
            return entry, ()
        became = {"none": "", "kept": ", variables kept", "dropped": ", variables dropped"}[change.variables]
        return entry, (Note("rebound", f"{name} is another module now, {entry.model.describe()}: registered{became}"),)

    def _assign(self, name: str, variables: Mapping[str, Any] | None) -> None:
        entry = replace(self._entry(name), variables=variables, made=None, updates={}, outdated=False)
        self._state = replace(self._state, models={**self._state.models, name: entry})

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
        call = Call(method_path(method), args, kwargs, spell_call(name, method, args, kwargs))
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
        repeat: int = 1,
        eager: bool = False,
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
          repeat: run so often with the same keys; `timing.steady` has every time.
          eager: run without compiling.

        Raises:
          FlaxMagicsError: a mistake in the call. What the model raises is passed on. Either way nothing has changed.
        """
        if mode not in (None, "train", "eval"):
            raise FlaxMagicsError(f"`mode` is 'train', 'eval' or None, not {mode!r}.")
        name = self._entry(model).name
        options = Options(mode, as_names(mutable), variables, as_names(key), draw, repeat, eager)
        call = Call(method_path(method), args, kwargs, spell_call(name, method, args, kwargs))
        return self.run_apply(name, call, options)

    def key(self, name: str) -> jax.Array:
        """Draws a key and returns its stream `name`: a typed key, shape (). The session never splits it."""
        return self.run_key(name).output  # type: ignore[no-any-return]

    def restart(self, seed: int, *, fresh: bool = False) -> Restart:
        """Starts the root key again at draw 1 of `seed`; `fresh` also initialises every model anew at its next use."""
        models = self._state.models
        if fresh:
            models = {
                name: replace(entry, variables=None, made=None, updates={}, outdated=False)
                for name, entry in models.items()
            }
        keeping = tuple(name for name, entry in models.items() if entry.variables is not None)
        again = seed in self._state.seeds
        root = Root.from_seed(_checked_seed(seed))
        self._state = replace(self._state, root=root, models=models, opened=None)
        self._seen = SeenKeys()
        self._seen.roots.add(root.data)
        return Restart(seed, fresh, keeping, again)

    # -- how: one Run each, committed at the end

    def run_init(self, name: str, call: Call, *, draw: Any = None, module: Any = None) -> Run:
        """`init` with the call as it was written; see `run_apply` for `module`."""
        entry, notes = self._entry_now(name, module)
        prepared = prepare_init(name, entry.model, call)
        now = self._find_draw(draw) or self._state.root.draw()
        key = now.stream("params")
        self.on_phase(f"initialising {name}")
        started, start = time.time(), self.clock()
        with plain_errors(call):
            variables = prepared.model.init(key, call.method, prepared.args, prepared.kwargs)
            jax.block_until_ready(variables)
        seconds = self.clock() - start
        made = initialised(prepared.model, key, call.method, prepared.args, prepared.kwargs)
        run = Run(
            command="init",
            model=name,
            mode="",
            call=call.text,
            inputs=(prepared.args, prepared.kwargs),
            output=variables,
            seed=now.seed,
            draw=now.number,
            keys=Streams.of(now, "params"),
            device=devices_of(variables),
            started=started,
            program="eager",
            timing=Timing(init=seconds),
            cell=call.cell,
            made=_made(variables),
            notes=(*notes, *of_params(variables)),
            by_hand=init_by_hand(call),
            replayed=draw is not None,
            first=self._state.runs is None,
        )
        entry = replace(entry, variables=variables, made=made, updates={}, outdated=False)
        self._commit(run, now, entry, opened=None if draw is not None else (name, now))
        return run

    def run_apply(self, name: str, call: Call, options: Options, *, module: Any = None) -> Run:
        """`apply` with the call as it was written.

        Args:
          module: what the name stands for now, if it may be another module than was registered: then that one is
            registered in its place, once the run has succeeded.
        """
        entry, notes = self._entry_now(name, module)
        replayed = self._find_draw(options.draw)
        opened = self._state.opened
        # Variables that an edit dropped took the opened draw's `params`: what comes now is a draw of its own.
        shares = replayed is None and opened is not None and opened[0] == name and entry.variables is not None
        now = replayed or (opened[1] if shares and opened else self._state.root.draw())
        started = time.time()
        done: Execution = execute(
            entry, call, options, now, self.programs, self._seen, self.on_phase, params_taken=shares
        )
        notes = (*notes, *done.notes)
        if entry.outdated and done.made is None and options.variables is None:
            notes = (*notes, OUTDATED)
        run = Run(
            command="apply",
            model=name,
            mode=done.mode,
            call=call.text,
            inputs=done.inputs,
            output=done.output,
            seed=now.seed,
            draw=now.number,
            keys=done.keys,
            device=done.device,
            started=started,
            sown=done.sown,
            used=done.used,
            changed=done.changed,
            program=done.program,
            reason=done.reason,
            switch=", ".join(done.switch),
            static=done.static,
            timing=done.timing,
            memory=done.memory,
            cell=call.cell,
            notes=notes,
            made=done.made,
            by_hand=done.by_hand,
            replayed=replayed is not None,
            first=self._state.runs is None,
        )
        self._commit(run, now, done.entry)
        for data in done.keys_in_call:
            self._seen.runs.setdefault(data, f"draw {now.number}")
        return run

    def run_key(self, name: str, *, cell: int | None = None) -> Run:
        """`key`, as a Run whose output is the key."""
        if not name.isidentifier():
            raise FlaxMagicsError(f"`{name}` is not a name for a stream.", write="%flax_key latent")
        now = self._state.root.draw()
        key = now.stream(name)
        run = Run(
            command="key",
            model=None,
            mode="",
            call=name,
            inputs=((), {}),
            output=key,
            seed=now.seed,
            draw=now.number,
            keys=Streams.of(now, name),
            device=devices_of(key),
            started=time.time(),
            cell=cell,
            by_hand="root_key, params_key, dropout_key = jax.random.split(root_key, 3)",
            first=self._state.runs is None,
        )
        self._commit(run, now, None)
        return run

    def _commit(self, run: Run, draw: Draw, entry: Entry | None, opened: tuple[str, Draw] | None = None) -> None:
        state = self._state
        root, seeds = state.root, state.seeds
        if run.replayed:
            opened = state.opened
        else:
            root = root.after(draw)
            seeds = {**seeds, draw.seed: (max(draw.number, seeds.get(draw.seed, (0, ""))[0]), draw.impl)}
        models = state.models if entry is None else {**state.models, entry.name: entry}
        new = State(root, models, opened, history.Chain.add(state.runs, run), seeds)
        self._seen.roots.add(root.data)
        self._state = new  # the one assignment

    def _find_draw(self, wanted: int | tuple[int, int] | None) -> Draw | None:
        if wanted is None:
            return None
        seed, number = wanted if isinstance(wanted, tuple) else (self.seed, wanted)
        last, impl = self._state.seeds.get(seed, (0, ""))
        if not 1 <= number <= last:
            drawn = f"draws 1 to {last}" if last else "no draw"
            raise FlaxMagicsError(f"draw {number} of seed {seed} was not made in this session: it has {drawn}.")
        with jax.default_prng_impl(impl) if hasattr(jax, "default_prng_impl") else _nothing():
            root = Root.from_seed(seed)
        for _ in range(number - 1):
            root = root.after(root.draw())
        return root.draw()


def _nothing() -> Any:
    import contextlib

    return contextlib.nullcontext()


def _ignore(phase: str) -> None:
    pass


def _checked_seed(seed: Any) -> int:
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise FlaxMagicsError(f"a seed is an int, not {seed!r}.")
    return seed


def _made(variables: Mapping[str, Any], *, added: bool = False) -> Made:
    parameters, size = summary(variables)
    return Made(parameters, size, tuple(variables), added)
