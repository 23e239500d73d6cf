"""A model summarised by shapes alone: its modules, their variables, FLOPs and streams. Nothing is computed or drawn."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import jax

from .arguments import Arguments
from .edits import shapes_of_init
from .errors import FlaxMagicsError
from .execution import plain_errors
from .flops import Costs, Flops, loops, marks_in, pieces
from .keys import Draw
from .models import Ask, MissingVariables, Model, Record
from .models.calls import LONGEST, Calls, Path
from .modules import Module, Size, called_in, modules_of, sizes
from .notes import of_mode
from .prepare import Call, Prepared, prepare, prepare_init
from .ready import is_tracer_error, static_choices
from .run import describe
from .starting import merged
from .tracing import Request, trace

if TYPE_CHECKING:
    from .registry import Entry

LOOP = "a loop (scan, while) counts as one turn of it: XLA does not know how many there are"
NO_COUNT = "this backend counts no FLOPs"


@dataclass(frozen=True, repr=False)
class Summary:
    """What a model is, by shapes alone. `print` shows all of it.

    Attributes:
      name: the registered name.
      model: how it is built, such as `Net(features=8)`.
      call: the call as it was written; empty if there was none: then nothing is known that depends on a call.
      mode: `train`, `eval` or `as written`.
      switch: the model's own switches as they stand, such as `training=True`.
      initialised: whether the variables are there; if not, these are those that an init would make.
      modules: in the order of their first calls, each before its submodules; the model itself comes first.
      flops, vjp_flops: of the whole call; see `Module`.
      written: collections that the call writes, such as `batch_stats`.
      sown: collection → what the model sows there, as `dtype[shape]`.
      notes: what has to be known to read the figures.
    """

    name: str
    model: str
    call: str
    mode: str
    switch: tuple[str, ...]
    initialised: bool
    modules: tuple[Module, ...]
    flops: int | None = None
    vjp_flops: int | None = None
    written: tuple[str, ...] = ()
    sown: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @cached_property
    def totals(self) -> Mapping[str, Size]:
        """Collection → how much there is of it, `params` first."""
        return sizes(array for module in self.modules for array in module.arrays)

    @property
    def parameters(self) -> int:
        """Elements of `params` (of NNX's `Param`)."""
        return self.totals.get("params", self.totals.get("Param", Size())).elements

    @property
    def bytes(self) -> int:
        """Bytes of all collections."""
        return sum(size.bytes for size in self.totals.values())

    @property
    def streams(self) -> Mapping[str, tuple[Path, ...]]:
        """Random stream → paths of the modules that consumed it."""
        names = dict.fromkeys(stream for module in self.modules for stream in module.streams)
        return {name: tuple(m.path for m in self.modules if name in m.streams) for name in names}

    def under(self, path: Path) -> Mapping[str, Size]:
        """How much there is in the module at `path` and its submodules, by collection."""
        return sizes(a for m in self.modules if m.path[: len(path)] == path for a in m.arrays)

    def __repr__(self) -> str:
        from .show.units import count, plural

        flops = "" if self.flops is None else f", {count(self.flops)} FLOPs"
        modules = plural(len(self.modules), "module")
        return f"<Summary of {self.call or self.name}: {modules}, {plural(self.parameters, 'parameter')}{flops}>"

    def __str__(self) -> str:
        from .show.summary import summary_text

        return summary_text(self)


def of_variables(entry: Entry) -> Summary:
    """The summary of a model without a call.

    Raises:
      FlaxMagicsError: it has no variables yet.
    """
    name, model = entry.name, entry.model
    variables = model.take() if model.holds_variables else entry.variables
    if variables is None:
        raise FlaxMagicsError(
            f"`{name}` has no variables yet, and without a call nobody knows which it will have.",
            form=f"%flax_summary {name}(…)",
        )
    modules = modules_of(model, variables, {}, {}, {})
    return Summary(name, model.describe(), "", "as written", model.fields_as_written(), True, modules)


def of_call(
    entry: Entry,
    call: Call,
    mode: str | None,
    draw: Draw,
    *,
    backward: bool = False,
    phase: Callable[[str], None] = lambda phase: None,
) -> Summary:
    """The summary of a model in a call.

    Args:
      mode: `train`, `eval` or None: as written.
      draw: any; only the kind of its keys matters.
      backward: count the backward pass too.
      phase: told what is being done.

    Raises:
      FlaxMagicsError: the arguments do not fit. What the model raises is passed on.
    """
    prepared = prepare(entry.name, entry.model, call, mode)
    with plain_errors(call):
        phase(f"tracing {entry.name}")
        traced, _, record, variables = trace_call(entry, prepared, call, draw)
        phase(f"counting {entry.name}")
        calls, program = record.calls or Calls(), traced.jaxpr.jaxpr
        back = _handed_back(prepared.model, traced, variables)
        parts = pieces(program, {mark: called.path for mark, called in calls.made.items()}, back)
        costs = Costs(backward)
        flops = {path: costs.count(found) for path, found in parts.items()}
    whole = flops.get(None, Flops(0, 0 if backward else None))
    updates = _updates(prepared.model, traced, record)
    called = called_in(calls, marks_in(program))
    modules = modules_of(prepared.model, variables, called, record.asked, flops, backward)
    return Summary(
        entry.name,
        entry.model.describe(),
        call.text,
        prepared.mode_of(record),
        prepared.switch,
        entry.ready,
        modules,
        whole.forward,
        whole.both,
        tuple(name for name in updates if name not in record.sown),
        {name: describe(updates[name], LONGEST) for name in updates if name in record.sown},
        (
            *(note.text for note in of_mode(entry.name, prepared, prepared.mode_of(record), Record())),
            *(note for note, said in ((LOOP, loops(program)), (NO_COUNT, whole.forward is None)) if said),
        ),
    )


def trace_call(entry: Entry, prepared: Prepared, call: Call, draw: Draw) -> tuple[Any, Ask, Record, Mapping[str, Any]]:
    """The program of the call, what it asks for, what its trace saw, modules' calls too, and the variables it was given."""
    forced = frozenset(name for method, name in entry.forced if method == call.method)
    arguments = Arguments.of(prepared.args, prepared.kwargs, prepared.signature, forced)
    try:
        return _trace_with(entry, prepared, call, draw, arguments)
    except Exception as error:
        if not is_tracer_error(error):
            raise
        for more in static_choices(arguments):
            arguments = Arguments.of(prepared.args, prepared.kwargs, prepared.signature, forced | more)
            try:
                return _trace_with(entry, prepared, call, draw, arguments)
            except Exception as again:
                if not is_tracer_error(again):
                    raise again from None
        raise


def _trace_with(
    entry: Entry, prepared: Prepared, call: Call, draw: Draw, arguments: Arguments
) -> tuple[Any, Ask, Record, Mapping[str, Any]]:
    variables, complete = _variables(entry, call, draw), False
    while True:
        request = Request(
            entry.name,
            prepared.model,
            call.method,
            arguments,
            variables,
            draw,
            training=prepared.mode == "train",
            guess=entry.guesses.get((call.method, prepared.mode), Ask()),
            noted=True,
        )
        try:
            traced, ask, record = trace(request)
        except MissingVariables as error:
            if complete or entry.model.holds_variables:
                raise error.__cause__ or error from None
            # A method needs what the first init did not make.
            variables, complete = merged(variables, _fresh(entry, call, draw))[0], True
            continue
        sown = record.sown & set(variables)
        if not sown:
            return traced, ask, record, variables
        variables = {name: tree for name, tree in variables.items() if name not in sown}


def _updates(model: Model, traced: Any, record: Record) -> dict[str, Any]:
    """Collection → shapes of what the call writes there."""
    _, updates = traced.out_info
    commit = model.commit(updates, record)
    names = updates if commit is None else commit.changed
    return {name: updates[name] for name in sorted(names) if name in updates}


def _handed_back(model: Model, traced: Any, variables: Mapping[str, Any]) -> frozenset[Any]:
    """Inputs of the program that hold the variables which the model does not write.

    Flax's own count of the backward pass has linen's `apply` hand back all that it may write, which is everything: a
    parameter's gradient is then one addition more.
    """
    if model.holds_variables:
        return frozenset()
    _, updates = traced.out_info
    written = {jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_flatten_with_path(updates)[0]}
    leaves = jax.tree_util.tree_flatten_with_path(variables)[0]
    given = traced.jaxpr.jaxpr.invars[: len(leaves)]
    return frozenset(
        var for var, (path, _) in zip(given, leaves, strict=True) if jax.tree_util.keystr(path) not in written
    )


def _variables(entry: Entry, call: Call, draw: Draw) -> Mapping[str, Any]:
    held = entry.model.take()
    if held is not None:
        return held
    return entry.variables if entry.variables is not None else _fresh(entry, call, draw)


def _fresh(entry: Entry, call: Call, draw: Draw) -> Mapping[str, Any]:
    """The shapes of what an init would make."""
    first = prepare_init(entry.name, entry.model, call)
    key = jax.eval_shape(lambda: jax.random.key(0, impl=draw.impl))
    shapes: Mapping[str, Any] = shapes_of_init(first.model, key, call.method, first.args, first.kwargs)
    return shapes
