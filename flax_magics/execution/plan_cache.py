"""Plans kept by the line that they are of: a run like an earlier one needs nothing found out anew.

A run that went through leaves a `LastRun` behind where all that it depended on can be looked at cheaply: the model's
guards, JAX's settings, the signatures of arguments and variables. The next run of the same line holds these against what
is there now. Where anything differs everything is found out, as if nothing had been kept.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from operator import call as call_it
from operator import is_
from typing import NamedTuple

import jax

from ..base.digest import own
from ..base.measures import Timing
from ..base.types import Leaf, PyTree
from ..code.contents import Structure
from ..code.library import library
from ..compile.cache import KEPT, LastCall, Services
from ..compile.compiler import keep, settings
from ..line.options import ApplyOptions
from ..models.base import Model, Variables
from ..models.calls import signature_of
from ..run import RELEASED, Run, like
from ..state.entry import ApplyRecipe, ModelEntry, Origin
from ..state.runs import StoredRun
from .call import Call
from .notes import may_be_key
from .plan import Plan
from .record import Applied

SIMPLE = (bool, int, float, complex, str, bytes, type(None))
SMALL = 65_536
"""Bytes."""

WeakLeaf = Callable[[], Leaf]
"""Gives a leaf that is held weakly, None once it is gone."""


class Inputs(NamedTuple):
    """What a run of a plan takes.

    Attributes:
      kwargs: the call's, with those that the mode adds.
      arguments: the traced ones by name; `same`: they are the very arrays of the run before.
      leaves: those of the variables; `fresh`: those among them that are others than the run before left.
      pending: what may not be there yet.
    """

    kwargs: dict[str, PyTree]
    arguments: dict[str, Leaf]
    same: bool
    variables: Variables
    leaves: list[Leaf]
    fresh: list[Leaf]
    pending: PyTree


@dataclass(eq=False)
class LastRun:
    """The last run of a line: its plan, and what that depends on.

    Attributes:
      registered: the registered model, whose guards tell of an edit; the plan's was made of it by setting its mode, and is
        nobody else's.
      key: the cache key of the registered one.
      library: the edition of Flax's own code.
      leaves: for each leaf of the arguments its name, whether it is traced, and its signature or else its value.
      structure: how the arguments are put together; `flat`: each of them is one leaf, and none has a name.
      added: keyword arguments that the mode added to the call's.
      variables: how the variables are put together, and signatures of their leaves.
      known, passed: leaves of the variables and of the arguments that were looked at, held weakly.
      written: for each leaf that a run writes which of the variables it is, None for a stream's own.
      key_names: the keys of the Run: see `RunKeys`.
      parts: the run as `ProgramCache` keeps it, to say why the next program is new.
      numbers: some arguments are Python numbers, which is worth a note where arrays were before.
      template: the Run, as far as it does not change.
      looked_at: the output is small and on the host: looking for NaN takes some microseconds.
      recipe: what replays of its runs have in common.
    """

    plan: Plan
    registered: Model
    key: object
    library: int
    leaves: tuple[tuple[str, bool, object], ...]
    structure: Structure
    flat: bool
    added: Mapping[str, PyTree]
    variables: tuple[Structure, list[object]]
    known: list[WeakLeaf]
    passed: list[WeakLeaf]
    written: tuple[int | None, ...]
    key_names: Mapping[str, tuple[str, bool]]
    parts: LastCall
    numbers: bool
    looked_at: bool
    template: Run = field(repr=False)
    recipe: ApplyRecipe = field(repr=False)

    def accepts(self, entry: ModelEntry, call: Call, services: Services) -> Inputs | None:
        """What the plan is to be run with; None where something that it depends on differs from the last run."""
        model, programs = entry.model, services.programs
        if model is not self.registered or entry.outdated or entry.rebuild_next or settings() != self.recipe.settings:
            return None
        if model.cache_key() != self.key or library.edition != self.library or programs.unfinished.wait is not None:
            return None
        if self.numbers and programs.parts.get(entry.name) is not self.parts:
            return None
        kwargs = {**call.kwargs, **self.added} if self.added else call.kwargs
        known = self._known(call.args, kwargs)
        arguments = self._traced(call.args, kwargs) if known is None else known
        variables = entry.held
        if arguments is None or variables is None:
            return None
        leaves, treedef = jax.tree_util.tree_flatten(variables)
        fresh = self._fresh(leaves, treedef)
        if fresh is None:
            return None
        # The others were there for the run before.
        pending = (fresh, arguments) if fresh or known is None else ()
        return Inputs(kwargs, arguments, known is not None, variables, leaves, fresh, pending)

    def stored(self, run: Run, inputs: Inputs, before: StoredRun | None) -> StoredRun:
        """The run as the session keeps it. What is as it was in the run before is shared with that: a loop adds little.

        Args:
          before: the session's last run, None if there was none.
        """
        recipe, fresh = self.recipe, bool(inputs.fresh)
        origin = shared_inputs = None
        if before is not None and before.origin is not None and before.origin.how is recipe:
            shared_inputs = before.inputs if inputs.same else None
            origin = None if fresh or recipe.written else before.origin
        if origin is None:
            # What is no array of JAX's may be changed where it is.
            origin = Origin(recipe, list(map(own, inputs.leaves)) if fresh else inputs.leaves)
        size = recipe.written + (0 if inputs.same else recipe.inputs) + (recipe.variables if fresh else 0)
        return StoredRun(run, origin, size, shared_inputs)

    def wrote(self, updates: Mapping[str, PyTree]) -> None:
        """What the run itself wrote need not be looked at by the next: the same program gave it, and it is there."""
        for i, leaf in zip(self.written, jax.tree_util.tree_leaves(updates), strict=True):
            if i is not None:
                self.known[i] = _weakly(leaf)

    def _known(self, args: tuple[PyTree, ...], kwargs: Mapping[str, PyTree]) -> dict[str, Leaf] | None:
        """The traced leaves by name where they are the very arrays of the run before, as in a loop; None otherwise."""
        if not self.flat or kwargs or len(args) != len(self.passed):
            return None
        for known, leaf in zip(self.passed, args, strict=True):
            if leaf is None or known() is not leaf:
                return None
        return dict(zip([name for name, _, _ in self.leaves], args, strict=True))

    def _traced(self, args: tuple[PyTree, ...], kwargs: Mapping[str, PyTree]) -> dict[str, Leaf] | None:
        """The traced leaves by name, None where the arguments are others."""
        leaves, treedef = jax.tree_util.tree_flatten((args, kwargs))
        if not self.structure.fits(treedef):
            return None
        arguments = {}
        for i, ((name, traced, was), leaf) in enumerate(zip(self.leaves, leaves, strict=True)):
            if traced:
                if self.passed[i]() is not leaf:
                    if signature_of(leaf) != was:
                        return None
                    self.passed[i] = _weakly(leaf)
                arguments[name] = leaf
            elif type(leaf) is not type(was) or leaf != was:
                return None
        return arguments

    def _fresh(self, leaves: list[Leaf], treedef: jax.tree_util.PyTreeDef) -> list[Leaf] | None:
        """The leaves of the variables that are others than they were, None where one of them is of another kind."""
        if not self.variables[0].fits(treedef):
            return None
        if all(map(is_, map(call_it, self.known), leaves)):
            return []
        fresh = []
        for i, (known, leaf) in enumerate(zip(self.known, leaves, strict=True)):
            if known() is not leaf:
                if signature_of(leaf) != self.variables[1][i]:
                    return None
                fresh.append(leaf)
                self.known[i] = _weakly(leaf)
        return fresh


def _weakly(leaf: Leaf) -> WeakLeaf:
    return weakref.ref(leaf) if isinstance(leaf, jax.Array) else _nothing


def _nothing() -> None:
    """In place of a reference to what may change where it is: it is looked at every time."""


def last_run(entry: ModelEntry, applied: Applied, services: Services) -> LastRun | None:
    """What a run leaves behind for the next of its line; None where only the long way can tell whether it is the same.

    Args:
      entry: the model as it was before the run.
    """
    execution, run, after = applied.execution, applied.outcome.run, applied.outcome.entry
    plan, bound, arguments = execution.plan, execution.request.bound, execution.arguments
    model, program = entry.model, plan.program
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
        or applied.recipe.taken
    ):
        return None
    traced = arguments.dynamic
    if any(map(may_be_key, traced.values())) or any(type(leaf) not in SIMPLE for _, leaf in arguments.static):
        return None
    assert after is not None
    variables = execution.built.request.variables
    values, treedef = jax.tree_util.tree_flatten(variables)
    values_after, structure = jax.tree_util.tree_flatten(variables if after.variables is None else after.variables)
    signatures: list[object] = list(map(signature_of, values))
    passed, held = Structure.of(arguments.treedef), Structure.of(treedef)
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
    )
    memory = program.memory
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
        flat=arguments.treedef == jax.tree_util.tree_structure(((0,) * len(arguments.leaves), {})),
        added={name: value for name, value in bound.kwargs.items() if name not in bound.call.kwargs},
        variables=(held, signatures),
        known=list(map(_weakly, values_after)),
        passed=[_nothing] * len(arguments.leaves),
        written=_places(variables, execution.result.updates),
        key_names=plan.key_names(program.needs),
        parts=services.programs.parts[entry.name],
        numbers=any(not hasattr(leaf, "dtype") for leaf in traced.values()),
        looked_at=run.device.startswith("cpu") and memory is not None and memory.outputs <= SMALL,
        template=template,
        recipe=applied.recipe,
    )


def _places(variables: Variables, updates: Variables) -> tuple[int | None, ...]:
    """For each leaf of `updates` the number of the variables' leaf in its place; None: it is no leaf of theirs."""
    paths = {path: i for i, (path, _) in enumerate(jax.tree_util.tree_flatten_with_path(variables)[0])}
    return tuple(paths.get(path) for path, _ in jax.tree_util.tree_flatten_with_path(updates)[0])


class PlanCache:
    """The last lines that ran, each with its last run."""

    def __init__(self) -> None:
        self._lines: OrderedDict[Hashable, LastRun] = OrderedDict()

    def find(self, name: str, call: Call, options: ApplyOptions) -> LastRun | None:
        """What a run of the same line left behind."""
        return self._lines.get((name, call.text, options.mode, options.mutable))

    def keep(self, entry: ModelEntry, applied: Applied, services: Services) -> None:
        """Keeps what a run leaves behind (see `last_run`); of many lines the oldest is let go."""
        request = applied.execution.request
        place = (entry.name, request.call.text, request.options.mode, request.options.mutable)
        self._lines.pop(place, None)
        last = last_run(entry, applied, services)
        if last is not None:
            keep(self._lines, place, last, KEPT)

    def forget(self, name: str) -> None:
        """Lets go of every line of a model: it is another now."""
        self._lines = OrderedDict((place, last) for place, last in self._lines.items() if last.recipe.name != name)
