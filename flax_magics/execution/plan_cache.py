"""Plans kept per line (a call's text with its options): a line that ran before needs no trace, no lookup, no new notes.

A run leaves a `LastRun` behind if everything that it depended on can be checked cheaply: the model's guards, JAX's
settings, the signatures of arguments and variables. The next run of the line compares these with what is there now; if
anything differs, `apply_model` works everything out, as if nothing had been kept.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from operator import call as call_it
from operator import is_

import jax
from msgspec import Struct

from ..base.digest import may_be_key, owned_copy
from ..base.measures import Timing
from ..base.output import SMALL as COPIED
from ..base.output import Floats, any_nan, floats_in, has_nan, nan_in
from ..base.threads import Running
from ..base.types import Leaf, PyTree
from ..code.contents import Structure
from ..code.library import library
from ..compile.cache import KEPT, LastCall, ProgramCache, Services
from ..compile.compiler import keep
from ..compile.disk_cache import settings, trace_context
from ..line.options import ApplyOptions
from ..models.base import Model, Variables
from ..models.calls import signature_of
from ..run import RELEASED, like
from ..state.entry import ApplyRecipe, ModelEntry, Origin
from ..state.runs import Inputs as InputLeaves
from ..state.runs import RunLine, StoredRun
from .call import Call
from .plan import Plan
from .record import Applied

SIMPLE = (bool, int, float, complex, str, bytes, type(None))
"""Types whose values compare by `==`: static arguments of other types keep a line from having a plan."""
SMALL = 65_536
"""Outputs of at most this many bytes are checked for NaN by each run of a plan."""

BRIEF = 0.02
"""Seconds of a run, at most, for which the next one begins before everything is checked."""

WeakLeaf = Callable[[], Leaf]
"""Returns a leaf that is held by a weak reference, None once it is gone."""


class Inputs(Struct, frozen=True, eq=False):
    """The inputs of a run of a plan.

    Attributes:
      kwargs: the call's, with those that the mode adds.
      arguments: the traced ones by name; `passed`: weak references to them, as `LastRun` has them.
      flat: all of them as leaves, with the structure; None where they are the very objects of the run before.
      leaves: those of the variables; `known`: weak references to them, as `LastRun` has them.
      fresh: those that neither the run before used nor wrote.
      pending: inputs that may still be computed on the device.
    """

    kwargs: dict[str, PyTree]
    arguments: dict[str, Leaf]
    passed: list[WeakLeaf]
    flat: InputLeaves | None
    variables: Variables
    leaves: list[Leaf]
    known: list[WeakLeaf]
    fresh: list[Leaf]
    pending: PyTree


@dataclass(eq=False)
class LastRun:
    """The last run of a line: its plan, and everything that the plan depends on.

    Attributes:
      registered: the registered model, whose guards notice an edit; the plan has a copy of it, set to its mode.
      key: the registered model's cache key.
      library: the edition of Flax's own code.
      leaves: for each leaf of the arguments its name, whether it is traced, and its signature, or its value if static.
      structure: of the arguments' pytree.
      flat: names of the call's arguments, if all are positional and each is a single leaf.
      added: keyword arguments that the mode added to the call's.
      variables: structure of the variables, and the signatures of their leaves.
      known, passed: leaves of the variables and of the arguments that the last run left, held weakly.
      written: the leaves that a run writes, as indices among those that it updates and among the variables' leaves.
      parts: the run as `ProgramCache` keeps it, to say why the next program is new.
      numbers: some arguments are Python numbers, which is worth a note where arrays were before.
      seconds: of the last run; it was `brief` where the next is dispatched before `holds` is asked.
      line: what the Runs of the line have in common.
      looked_at: the output is small and on the host, so that a check for NaN takes some microseconds; `floats`: see
        `floats_in`.
      recipe: what replays of the line's runs share.
    """

    plan: Plan
    registered: Model
    key: object
    library: int
    leaves: tuple[tuple[str, bool, object], ...]
    structure: Structure
    flat: tuple[str, ...]
    added: Mapping[str, PyTree]
    variables: tuple[Structure, list[object]]
    known: list[WeakLeaf]
    passed: list[WeakLeaf]
    written: tuple[list[int], list[int]]
    parts: LastCall
    numbers: bool
    looked_at: bool
    floats: Floats | None
    seconds: float
    brief: bool
    line: RunLine = field(repr=False)
    recipe: ApplyRecipe = field(repr=False)

    def inputs(self, entry: ModelEntry, call: Call, programs: ProgramCache) -> Inputs | None:
        """The inputs to run the plan with; None where one differs from the last run's in more than its values.

        Nothing is noted here: a run that is interrupted, or dropped, is no run before the next.
        """
        anew = entry.rebuild_next and entry.built is not None
        if entry.model is not self.registered or entry.outdated or anew:
            return None
        if programs.unfinished.wait is not None:
            return None
        kwargs = {**call.kwargs, **self.added} if self.added else call.kwargs
        args, passed = call.args, self.passed
        same = len(args) == len(self.flat) and not call.kwargs
        # Their references come first; those of arguments that the mode adds follow.
        for reference, leaf in zip(passed, args if same else (), strict=False):
            # A dead reference returns None too, so an argument that is None proves nothing.
            if leaf is None or reference() is not leaf:
                same = False
                break
        flat: InputLeaves | None = None
        if same:  # as in a loop
            arguments = dict(zip(self.flat, args, strict=True))
        elif (traced := self._traced(args, kwargs)) is None:
            return None
        else:
            arguments, passed, flat = traced
        try:
            variables = entry.held
        except Exception:  # the user has taken an NNX module apart, as `holds` would notice
            return None
        if variables is None:
            return None
        placement = self.recipe.placement
        if placement is not None:
            arguments = placement.put(arguments, self.recipe.shardings)
        leaves, treedef = _flatten(variables)
        if not self.variables[0].fits(treedef):
            return None
        known = self.known
        fresh: list[Leaf] = []
        # `map` keeps this loop in C: it goes over every leaf at every run.
        if not all(map(is_, map(call_it, known), leaves)):
            known = list(map(_weakly, leaves))
            for leaf, before, signature in zip(leaves, self.known, self.variables[1], strict=True):
                if before() is not leaf:
                    if _differs(leaf, signature):
                        return None
                    fresh.append(leaf)
        # Everything else was computed before the last run began.
        pending = (fresh, arguments) if fresh or not same or placement is not None else ()
        return Inputs(kwargs, arguments, passed, flat, variables, leaves, known, fresh, pending)

    def holds(self, entry: ModelEntry, programs: ProgramCache, running: Running | None = None) -> bool:
        """Whether the program is the one to run: settings and the model's code are as they were.

        The settings tell a function that JAX traces, too.

        Args:
          running: the program, if it was dispatched: it may be done before all is compared.
        """
        # Another program has run for the model since: whether numbers replaced arrays must be asked again.
        if self.numbers and programs.parts.get(entry.name) is not self.parts:
            return False
        if settings() != self.recipe.settings:
            return False
        if running is not None:
            running.look()
        return entry.model.has_same_layout() and entry.model.cache_key() == self.key

    def look_through(self, output: PyTree) -> tuple[bytes, bool]:
        """The bytes of a small output, empty for any other; and whether it holds NaN, as far as that is looked at."""
        if self.line.small is not None:
            copy = memoryview(output).tobytes()
            return copy, nan_in(copy, self.line.small[0])
        if not self.looked_at:
            return b"", False
        return b"", has_nan(output) if self.floats is None else any_nan(output, self.floats)

    def stored(
        self, inputs: Inputs, args: tuple[PyTree, ...], before: StoredRun | None
    ) -> tuple[Origin, InputLeaves, int]:
        """What is kept for a replay, and its size. It is shared with the run before as far as it is the same.

        Args:
          args: of the call.
          before: the session's last run, None if there was none.
        """
        recipe, fresh = self.recipe, bool(inputs.fresh)
        origin: Origin | None = None
        leaves: InputLeaves | None = None
        # Only the run before is shared with, and only if it is of this line. What it had is compared, not what this plan
        # knows: another thread may have run the line in between.
        # Each is read once, since another thread may drop it.
        earlier, passed = (None, None) if before is None else (before.origin, before.inputs)
        if earlier is not None and earlier.how is recipe:
            if inputs.flat is None and passed is not None and all(map(is_, passed[1], args)):
                leaves = passed
            if not recipe.written and all(map(is_, earlier.leaves, inputs.leaves)):
                origin = earlier
        # NumPy arrays are copied: the user may write into them.
        if origin is None:
            origin = Origin(recipe, list(map(owned_copy, inputs.leaves)) if fresh else inputs.leaves)
        if leaves is None:
            if (flat := inputs.flat) is None:
                values, treedef = _flatten((args, inputs.kwargs))
                flat = treedef, values
            leaves = flat[0], list(map(owned_copy, flat[1]))
        size = recipe.written + (0 if inputs.flat is None else recipe.inputs) + (recipe.variables if fresh else 0)
        return origin, leaves, size

    def is_overtaken(self, entry: ModelEntry, inputs: Inputs) -> bool:
        """Whether a variable that the run writes holds another value by now than the run had."""
        places = self.written[1]
        if not places:
            return False
        leaves, had = entry.held_leaves, inputs.leaves
        # `map` keeps this in C: a model may write as many as it has.
        at, before = leaves.__getitem__, had.__getitem__
        return len(leaves) != len(had) or not all(map(is_, map(at, places), map(before, places)))

    def wrote(self, inputs: Inputs, updates: Mapping[str, PyTree], seconds: float) -> None:
        """Notes what a run leaves that has become part of the session: what it was given, and what it wrote.

        The same program wrote it, so its signatures are those of before.
        """
        known = inputs.known
        if updates:
            known, (updated, places) = list(known), self.written
            for i, leaf in zip(places, map(_leaves(updates).__getitem__, updated), strict=True):
                known[i] = weakref.ref(leaf)
        self.seconds, self.brief, self.passed, self.known = seconds, seconds < BRIEF, inputs.passed, known

    def _traced(
        self, args: tuple[PyTree, ...], kwargs: Mapping[str, PyTree]
    ) -> tuple[dict[str, Leaf], list[WeakLeaf], InputLeaves] | None:
        """The traced leaves by name, `Inputs.passed` and `Inputs.flat`; None where structure, signature or a static
        value differs.
        """
        leaves, treedef = _flatten((args, kwargs))
        if not self.structure.fits(treedef):
            return None
        arguments: dict[str, Leaf] = {}
        passed = list(self.passed)
        for i, ((name, traced, was), leaf) in enumerate(zip(self.leaves, leaves, strict=True)):
            if traced:
                if passed[i]() is not leaf:
                    if _differs(leaf, was):
                        return None
                    passed[i] = _weakly(leaf)
                arguments[name] = leaf
            # `True == 1 == 1.0`, but each type has its own program.
            elif type(leaf) is not type(was) or leaf != was:
                return None
        return arguments, passed, (treedef, leaves)


_flatten = jax.tree_util.default_registry.flatten


def _leaves(tree: PyTree) -> list[Leaf]:
    return _flatten(tree)[0]  # type: ignore[no-any-return]


def _weakly(leaf: Leaf) -> WeakLeaf:
    return weakref.ref(leaf) if isinstance(leaf, jax.Array) else _nothing


def _nothing() -> None:
    """Stands for the reference to a leaf that can change in place: no leaf is it, so the leaf is checked every time."""


def _differs(leaf: Leaf, signature: object) -> bool:
    """Whether a program that takes leaves of this signature cannot take this one."""
    # A tracer, in a function of the user's that JAX traces, raises when it is asked for its sharding.
    return isinstance(leaf, jax.core.Tracer) or signature_of(leaf) != signature


def last_run(entry: ModelEntry, applied: Applied, services: Services) -> LastRun | None:
    """What a run leaves behind for the next run of its line; None where only `apply_model` can tell whether they agree.

    Args:
      entry: the model as it was before the run.
    """
    execution, run, after = applied.execution, applied.outcome.run, applied.outcome.entry
    plan, bound, arguments = execution.plan, execution.request.bound, execution.arguments
    model, program, call, args = entry.model, plan.program, bound.call, bound.call.args
    key = model.cache_key()
    if (
        not execution.request.options.plain
        or program is None
        or execution.built.key is None
        or program.effects
        or key is None
        or bound.model.cache_key() is None
        or entry.outdated
        or applied.keys_in_call
        or bound.own_rngs
        or program.trace.structure is not None
        or not trace_context()
        or applied.recipe.taken
    ):
        return None
    traced = arguments.dynamic
    # Whether a key was used before has to be asked at each run.
    if any(map(may_be_key, traced.values())) or any(type(leaf) not in SIMPLE for _, leaf in arguments.static):
        return None
    assert after is not None
    variables = execution.built.request.variables
    values, treedef = jax.tree_util.tree_flatten(variables)
    values_after, structure = jax.tree_util.tree_flatten(variables if after.variables is None else after.variables)
    signatures: list[object] = list(map(signature_of, values))
    passed, held = Structure.of(arguments.treedef), Structure.of(treedef)
    # The run changed the kind of its variables (a cache that grew), so the next one needs another program.
    if not held.fits(structure) or passed.contents is None or list(map(signature_of, values_after)) != signatures:
        return None
    template = like(
        run,
        inputs=RELEASED,
        output=RELEASED,
        sown={},
        program="reused",
        reason="",
        causes=(),
        registered="",
        timing=Timing(),
        made=None,
        notes=applied.steady,
        first=False,
    )
    memory = program.memory
    looked_at = run.device.startswith("cpu") and memory is not None and memory.outputs <= SMALL
    floats, output = floats_in(run.output), run.output
    is_small = looked_at and bool(floats) and isinstance(output, jax.Array) and output.nbytes <= COPIED
    return LastRun(
        plan=plan,
        registered=model,
        key=key,
        library=library.edition,
        leaves=tuple(
            (name, name in traced, signature_of(leaf) if name in traced else leaf)
            for name, leaf in zip(arguments.names, arguments.leaves, strict=True)
        ),
        structure=passed,
        flat=() if call.kwargs or not jax.tree_util.all_leaves(args) else tuple(arguments.names[: len(args)]),
        added={name: value for name, value in bound.kwargs.items() if name not in bound.call.kwargs},
        variables=(held, signatures),
        known=list(map(_weakly, values_after)),
        passed=[_nothing] * len(arguments.leaves),
        written=_places(variables, execution.result.updates),
        parts=services.programs.parts[entry.name],
        numbers=any(not hasattr(leaf, "dtype") for leaf in traced.values()),
        looked_at=looked_at,
        floats=floats,
        seconds=run.timing.run,
        brief=run.timing.run < BRIEF,
        line=RunLine(
            template,
            plan.key_names(program.needs),
            (output.dtype, output.shape) if is_small else None,
            run.shape,
            applied.recipe.record,
        ),
        recipe=applied.recipe,
    )


def _places(variables: Variables, updates: Variables) -> tuple[list[int], list[int]]:
    """Indices of those leaves of `updates` that are leaves of the variables too, and their indices there."""
    paths = {path: i for i, (path, _) in enumerate(jax.tree_util.tree_flatten_with_path(variables)[0])}
    updated = [path for path, _ in jax.tree_util.tree_flatten_with_path(updates)[0]]
    both = [i for i, path in enumerate(updated) if path in paths]
    return both, [paths[updated[i]] for i in both]


class PlanCache:
    """The `LastRun` of each of the lines that ran last."""

    def __init__(self) -> None:
        self._lines: OrderedDict[Hashable, LastRun] = OrderedDict()

    def find(self, name: str, call: Call, options: ApplyOptions) -> LastRun | None:
        """The `LastRun` of this line, None if it left none, or if the options ask for more than that repeats."""
        return self._lines.get((name, call.text, options.mode, options.mutable)) if options.plain else None

    def keep(self, entry: ModelEntry, applied: Applied, services: Services) -> None:
        """Keeps what a run leaves behind (see `last_run`); beyond `KEPT` lines the oldest is dropped."""
        request = applied.execution.request
        place = (entry.name, request.call.text, request.options.mode, request.options.mutable)
        # A run that cannot be checked cheaply leaves its line without a plan.
        self._lines.pop(place, None)
        last = last_run(entry, applied, services)
        if last is not None:
            keep(self._lines, place, last, KEPT)

    def forget(self, name: str) -> None:
        """Drops every line of a model that was registered again."""
        self._lines = OrderedDict((place, last) for place, last in self._lines.items() if last.recipe.name != name)
