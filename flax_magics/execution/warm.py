"""A run like an earlier one, which needs nothing found out anew: the same call of the same model, unchanged.

A run that went through leaves a `Warm` behind where all that it depended on can be looked at cheaply: the model's
guards, JAX's settings, the signatures of arguments and variables. The next run of the same line holds these against what
is there now. Where anything differs it is `execute` that runs, as if there had been no Warm.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from operator import call, is_
from typing import Any

import jax

from ..base.digest import has_nan, own
from ..base.measures import Timing
from ..code.library import library
from ..code.structure import Structure
from ..compile.cache import KEPT, LastCall, Program, ProgramCache
from ..compile.compiler import settings
from ..compile.limits import devices_in, with_peak
from ..line.options import ApplyOptions
from ..models.arguments import signature_of
from ..models.base import CallTrace, Commit, Model
from ..rng.keys import Draw, RunKeys
from ..run import RELEASED, Run, altered, like
from ..state.entry import ModelEntry, Origin
from ..state.runs import StoredRun
from .apply import AppliedRun
from .call import Call
from .execute import hand_back
from .notes import with_values

SIMPLE = (bool, int, float, complex, str, bytes, type(None))
SMALL = 65_536
"""Bytes."""
_KEY_SHAPES = ((2,), (4,))


@dataclass(frozen=True)
class WarmApply:
    """A run that is done: the Run and how the session keeps it, the entry as it is to be kept (None: as it is), and what to
    write into the model.
    """

    run: Run
    kept: StoredRun
    entry: ModelEntry | None
    commit: Commit | None


@dataclass
class Warm:
    """What a run depended on, and what it found.

    Attributes:
      given: the registered model, whose guards tell of an edit; `model`: the one that ran, which was made of it by
        setting its mode, and is nobody else's.
      print: the key of the registered one.
      library: the edition of Flax's own code.
      leaves: for each leaf of the arguments its name, whether it is traced, and its signature or else its value.
      structure: how the arguments are put together; `flat`: each of them is one leaf, and none has a name.
      added: keyword arguments that the mode added to the call's.
      variables: how the variables are put together, and signatures of their leaves.
      known, passed: leaves of the variables and of the arguments that were looked at, held weakly.
      written: for each leaf that a run writes which of the variables it is, None for a stream's own.
      names: the keys of the Run: see `RunKeys`.
      parts: the run as `ProgramCache` keeps it, to say why the next program is new.
      numbers: some arguments are Python numbers, which is worth a note where arrays were before.
      template: the Run, as far as it does not change.
      streams: those that the program is given.
      looked_at: the output is small and on the host: looking for NaN takes some microseconds.
      how: what replays of its runs have in common.
    """

    given: Model
    model: Model
    print: Any
    settings: tuple[Any, ...]
    library: int
    leaves: tuple[tuple[str, bool, Any], ...]
    structure: Structure
    flat: bool
    added: Mapping[str, Any]
    program: Program
    record: CallTrace
    variables: tuple[Structure, list[Any]]
    known: list[Callable[[], Any]]
    passed: list[Callable[[], Any]]
    written: tuple[int | None, ...]
    names: Mapping[str, tuple[str, bool]]
    mutable: tuple[str, ...]
    parts: LastCall
    numbers: bool
    streams: tuple[str, ...]
    looked_at: bool
    template: Run = field(repr=False)
    how: Any = field(repr=False)

    def again(
        self, entry: ModelEntry, call: Call, draw: Draw, programs: ProgramCache, started: float, last: StoredRun | None
    ) -> WarmApply | None:
        """The run once more, with the keys of `draw`; None where something differs, and then nothing has happened.

        Args:
          last: the session's last run, None if there was none.
        """
        given, model = entry.model, self.model
        if programs.unfinished.wait is not None:
            return None
        if given is not self.given or entry.outdated or entry.rebuild_next or settings() != self.settings:
            return None
        if given.cache_key() != self.print or library.edition != self.library:
            return None
        if self.numbers and programs.parts.get(entry.name) is not self.parts:
            return None
        kwargs = {**call.kwargs, **self.added} if self.added else call.kwargs
        dynamic = known = self._known(call.args, kwargs)
        if dynamic is None:
            dynamic = self._dynamic(call.args, kwargs)
        variables = entry.held
        if dynamic is None or variables is None:
            return None
        leaves, treedef = jax.tree_util.tree_flatten(variables)
        fresh = self._fresh(leaves, treedef)
        if fresh is None:
            return None
        keys = {name: draw.words(name) for name in self.streams}
        clock = programs.clock
        before = clock()
        try:
            if fresh or known is None:  # the others were there for the run before
                jax.block_until_ready((fresh, dynamic))
            begin = clock()
            result = programs.run(self.program, variables, keys, dynamic)
        except Exception:  # the long way finds out what it is, and says so
            return None
        timing = altered(self.template.timing, {"run": clock() - begin, "wait": begin - before})
        memory = self.template.memory
        if memory is not None and memory.peak is not None:
            memory = with_peak(memory, devices_in(result))
        programs.parts[entry.name] = self.parts

        output, updates = result
        output, updates, sown = hand_back(output, updates, self.record, self.mutable)
        source = entry.source
        kept, changed, commit = None, {}, None
        if fresh and source is not None:
            source = source.now(variables, entry.update_counts)
            if source is not entry.source:
                kept = altered(entry, {"source": source})
        if updates:
            commit = model.commit(updates, self.record)
            changed = {name: entry.update_counts.get(name, 0) + 1 for name in sorted(commit.changed)}
            if changed:
                kept = altered(kept or entry, {"update_counts": {**entry.update_counts, **changed}})
            if not model.holds_variables:
                kept = altered(kept or entry, {"variables": {**variables, **updates}})
            self._know(updates)
        run = like(
            self.template,
            call=call.text,
            inputs=(call.args, kwargs),
            output=output,
            seed=draw.seed,
            draw=draw.number,
            keys=RunKeys(draw, self.names),
            started=started,
            sown=sown,
            changed=changed,
            timing=timing,
            memory=memory,
            cell=call.cell,
            first=last is None,
            weights="" if source is None else source.describe(draw.seed),
        )
        if self.looked_at and has_nan(output):
            run = with_values(run)
        return WarmApply(run, self._kept(run, leaves, bool(fresh), known is not None, last), kept, commit)

    def _kept(self, run: Run, leaves: list[Any], fresh: bool, known: bool, last: StoredRun | None) -> StoredRun:
        """The run as the session keeps it. What is as it was in the run before is shared with that: a loop adds little.

        Args:
          leaves: the variables that it ran with; `fresh`: some are others than the run before left.
          known: its arguments are the very arrays of the run before.
        """
        how: Any = self.how
        origin, inputs = None, None
        if last is not None and last.origin is not None and last.origin.how is self.how:
            inputs = last.inputs if known else None
            origin = None if fresh or how.written else last.origin
        if origin is None:
            # What is no array of JAX's may be changed where it is.
            origin = Origin(how, list(map(own, leaves)) if fresh else leaves)
        return StoredRun(
            run, origin, how.written + (0 if known else how.inputs) + (how.variables if fresh else 0), inputs
        )

    def _know(self, updates: Mapping[str, Any]) -> None:
        """What the run itself wrote need not be looked at by the next: the same program gave it, and it is there."""
        for i, leaf in zip(self.written, jax.tree_util.tree_leaves(updates), strict=True):
            if i is not None:
                self.known[i] = _weakly(leaf)

    def _known(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any] | None:
        """The same for arguments that are the very arrays of the run before, as in a loop; None where they are not."""
        if not self.flat or kwargs or len(args) != len(self.passed):
            return None
        for known, leaf in zip(self.passed, args, strict=True):
            if leaf is None or known() is not leaf:
                return None
        return dict(zip([name for name, _, _ in self.leaves], args, strict=True))

    def _dynamic(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any] | None:
        """The traced leaves by name, None where the arguments are others."""
        leaves, treedef = jax.tree_util.tree_flatten((args, kwargs))
        if not self.structure.fits(treedef):
            return None
        dynamic = {}
        for i, ((name, traced, was), leaf) in enumerate(zip(self.leaves, leaves, strict=True)):
            if traced:
                if self.passed[i]() is not leaf:
                    if signature_of(leaf) != was:
                        return None
                    self.passed[i] = _weakly(leaf)
                dynamic[name] = leaf
            elif type(leaf) is not type(was) or leaf != was:
                return None
        return dynamic

    def _fresh(self, leaves: list[Any], treedef: Any) -> list[Any] | None:
        """The leaves of the variables that are others than they were, None where one of them is of another kind."""
        if not self.variables[0].fits(treedef):
            return None
        if all(map(is_, map(call, self.known), leaves)):
            return []
        fresh = []
        for i, (known, leaf) in enumerate(zip(self.known, leaves, strict=True)):
            if known() is not leaf:
                if signature_of(leaf) != self.variables[1][i]:
                    return None
                fresh.append(leaf)
                self.known[i] = _weakly(leaf)
        return fresh


def _weakly(leaf: Any) -> Callable[[], Any]:
    return weakref.ref(leaf) if isinstance(leaf, jax.Array) else _nothing


def _nothing() -> None:
    """In place of a reference to what may change where it is: it is looked at every time."""


def remember(
    entry: ModelEntry, call: Call, options: ApplyOptions, applied: AppliedRun, programs: ProgramCache
) -> Warm | None:
    """What a run leaves behind for the next of its kind; None where only the long way can tell whether it is the same.

    Args:
      entry: the model as it was before the run.
    """
    done, run = applied.done, applied.run
    ready, prepared = done.ready, done.prepared
    program, arguments = ready.program, ready.arguments
    model = entry.model
    print_ = model.cache_key()
    if (
        not options.plain
        or program is None
        or program.effects
        or print_ is None
        or prepared.model.cache_key() is None
        or entry.outdated
        or done.keys_in_call
        or prepared.own_rngs
        or ready.record.structure is not None
        or ("params" in ready.ask.streams and any(taken for _, taken in done.names.values()))
    ):
        return None
    leaves = []
    for name, leaf, traced in zip(arguments.names, arguments.leaves, arguments.traced, strict=True):
        if traced and _may_be_a_key(leaf):
            return None
        if not traced and type(leaf) not in SIMPLE:
            return None
        leaves.append((name, traced, signature_of(leaf) if traced else leaf))
    if done.entry.variables is None and not model.holds_variables:
        return None
    values, treedef = jax.tree_util.tree_flatten(ready.variables)
    structure: Any
    after, structure = jax.tree_util.tree_flatten(
        ready.variables if done.entry.variables is None else done.entry.variables
    )
    signatures = list(map(signature_of, values))
    passed, held = Structure.of(arguments.treedef), Structure.of(treedef)
    if not held.fits(structure) or passed.contents is None or list(map(signature_of, after)) != signatures:
        return None
    template = like(
        run,
        inputs=RELEASED,
        output=RELEASED,
        sown={},
        program="reused",
        reason="",
        causes=(),
        timing=Timing(),
        made=None,
        notes=done.steady,
    )
    return Warm(
        given=model,
        model=prepared.model,
        print=print_,
        settings=settings(),
        library=library.edition,
        leaves=tuple(leaves),
        structure=passed,
        flat=arguments.treedef == jax.tree_util.tree_structure(((0,) * len(leaves), {})),
        added={name: value for name, value in prepared.kwargs.items() if name not in call.kwargs},
        program=program,
        record=ready.record,
        variables=(held, signatures),
        known=list(map(_weakly, after)),
        passed=[_nothing] * len(leaves),
        written=_places(ready.variables, done.updates),
        names={name: pair for name, pair in done.names.items() if not pair[1]},
        mutable=options.mutable,
        parts=programs.parts[entry.name],
        numbers=any(not hasattr(leaf, "dtype") for leaf in arguments.dynamic.values()),
        streams=tuple(sorted(program.ask.streams)),
        looked_at=run.device.startswith("cpu") and program.memory is not None and program.memory.outputs <= SMALL,
        template=template,
        how=applied.how,
    )


def _places(variables: Any, updates: Mapping[str, Any]) -> tuple[int | None, ...]:
    """For each leaf of `updates` the number of the variables' leaf in its place; None: it is no leaf of theirs."""
    paths = {path: i for i, (path, _) in enumerate(jax.tree_util.tree_flatten_with_path(variables)[0])}
    return tuple(paths.get(path) for path, _ in jax.tree_util.tree_flatten_with_path(updates)[0])


def _may_be_a_key(leaf: Any) -> bool:
    """Keys in a call are looked up among those that were seen: that is the long way's."""
    if not isinstance(leaf, jax.Array):
        return False
    return jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key) or (
        leaf.dtype == "uint32" and leaf.shape in _KEY_SHAPES
    )


class WarmRuns:
    """The last lines that ran, each with its Warm."""

    def __init__(self) -> None:
        self._lines: dict[tuple[str, str, str | None, tuple[str, ...]], Warm] = {}

    def find(self, name: str, call: Call, options: ApplyOptions) -> Warm | None:
        """What a run of the same line left behind."""
        return self._lines.get((name, call.text, options.mode, options.mutable))

    def keep(
        self, entry: ModelEntry, call: Call, options: ApplyOptions, applied: AppliedRun, programs: ProgramCache
    ) -> None:
        """Keeps what a run leaves behind (see `remember`); of many lines the oldest is let go."""
        place = (entry.name, call.text, options.mode, options.mutable)
        self._lines.pop(place, None)
        warm = remember(entry, call, options, applied, programs)
        if warm is not None:
            self._lines[place] = warm
            if len(self._lines) > KEPT:
                del self._lines[next(iter(self._lines))]

    def forget(self, name: str) -> None:
        """Lets go of every line of a model: it is another now."""
        for place in [place for place in self._lines if place[0] == name]:
            del self._lines[place]
