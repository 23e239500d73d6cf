"""Summaries of a model, and checks of a call, by shapes alone: nothing is computed, drawn or compiled.

FLOPs come from XLA's cost analysis. Each module call is traced in a name scope of its own (its mark); a module's
equations are cut out of the jaxpr by their marks, and lowered alone. Equal pieces are lowered once, so that fifty equal
blocks cost no more than one.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Var, jaxpr_as_fun
from msgspec import Struct

from ..base.digest import count_parameters, data_of, describe
from ..base.text import bytes_, join, natural, plural
from ..base.types import PyTree
from ..errors import FlaxMagicsError
from ..execution.call import Call, prepare, prepare_init, trace_shapes
from ..execution.execute import plain_errors
from ..execution.notes import of_mode
from ..models.base import CallTrace, Model
from ..models.calls import LONGEST, Called, Calls, Path, marks_of
from ..models.switch import WHEN_TRAINING
from ..rng.keys import Draw
from ..state.entry import LinenEntry, ModelEntry, by_kind
from .view import Array, Module, Summary, innermost, total

LOOP = "a loop (scan, while) counts as one turn of it: XLA does not know how many there are"
NO_COUNT = "this backend counts no FLOPs"
_OWN = re.compile(r"0x[0-9a-f]+|\b\d+(?=:u32\[\])")
"""Matches what may differ between pieces of equal cost: addresses of functions, and constants folded into keys."""


class Flops(NamedTuple):
    """FLOPs as XLA counts them; None where the backend does not tell."""

    forward: int | None
    both: int | None
    """Of the forward and backward pass together; None also if the backward pass was not asked for."""


def of_variables(entry: ModelEntry) -> Summary:
    """The summary of a model's variables, without a call.

    Raises:
      FlaxMagicsError: it has no variables yet.
    """
    name, model = entry.name, entry.model
    variables = entry.held
    if variables is None:
        reason = "and without a call nobody knows which it will have"
        raise FlaxMagicsError(f"`{name}` has no variables yet, {reason}.", form=f"%flax_summary {name}(…)")
    modules = modules_of(model, variables, {}, {}, {})
    return Summary(name, model.describe(), "", "as written", model.fields_as_written(), True, modules)


def of_call(
    entry: ModelEntry, call: Call, mode: str | None, draw: Draw, *, backward: bool, phase: Callable[[str], None]
) -> Summary:
    """The summary of a model in a call.

    Args:
      mode: `train`, `eval` or None: as written.
      draw: any; only its PRNG implementation matters.
      backward: count the FLOPs of the backward pass too.
      phase: called with the name of each phase as it begins.

    Raises:
      FlaxMagicsError: the arguments do not fit. What the model raises is passed on.
    """
    prepared = prepare(entry.name, entry.model, call, mode)
    with plain_errors(call):
        phase(f"tracing {entry.name}")
        call_traced = trace_shapes(entry, prepared, draw)
        traced, record, variables = call_traced.traced, call_traced.trace, call_traced.request.variables
        phase(f"counting {entry.name}")
        program, calls, costs = traced.jaxpr.jaxpr, record.calls or Calls(), _Costs(backward)
        pieces = _pieces(program, calls, _handed_back(entry, traced, variables))
        # A module without equations costs nothing.
        flops = defaultdict(lambda: costs.count([]), {path: costs.count(parts) for path, parts in pieces.items()})
        modules = modules_of(prepared.model, variables, _called_in(calls, program), record.asked, flops)
    _, updates = traced.out_info
    written = sorted(name for name in prepared.model.commit(updates, record).changed if name in updates)
    sown = {name: describe(updates[name], LONGEST) for name in written if name in record.sown}
    mode = prepared.mode_of(record)
    # An empty trace: only a model without a switch is worth a note here, not its layers.
    notes = [note.text for note in of_mode(entry.name, prepared, mode, CallTrace())]
    notes += [LOOP] if any(equation.primitive.name in ("scan", "while") for equation in equations(program)) else []
    notes += [NO_COUNT] if flops[None].forward is None else []
    about = (entry.name, entry.model.describe(), call.text, mode, prepared.switch, entry.ready)
    collections = tuple(name for name in written if name not in sown)
    return Summary(*about, modules, *flops[None], collections, sown, tuple(notes))


def _unwritten(entry: LinenEntry, traced: Any, variables: Mapping[str, PyTree]) -> frozenset[Var]:
    """Inputs of the program that hold variables which the model does not write.

    Flax's count of the backward pass lets linen's `apply` return every collection, written or not, which costs one
    addition for each parameter's gradient. To agree with it, these inputs count as returned.
    """
    _, updates = traced.out_info
    written = set(_paths(updates))
    inputs = zip(traced.jaxpr.jaxpr.invars, _paths(variables), strict=False)  # the variables' leaves come first
    return frozenset(var for var, path in inputs if path not in written)


_handed_back = by_kind(_unwritten, lambda entry, traced, variables: frozenset())


def _paths(tree: PyTree) -> list[str]:
    return [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_flatten_with_path(tree)[0]]


def check_call(entry: ModelEntry, call: Call, key: jax.Array) -> tuple[tuple[str, str], ...]:
    """The rows of `--check`, label and value each: parameters, output, collections written, streams and switches.

    Args:
      key: any typed key of shape (); only its PRNG implementation matters.

    Raises:
      FlaxMagicsError: the arguments do not fit. What the model raises is passed on.
    """
    _, init_call = prepare_init(entry.name, entry.model, call)
    prepared = prepare(entry.name, entry.model, init_call, None)
    call_traced = trace_shapes(entry, prepared, Draw(0, 1, data_of(key), str(jax.random.key_impl(key))))
    record, (output, updates) = call_traced.trace, call_traced.traced.out_info
    parameters, size = count_parameters(entry.model.collections(call_traced.request.variables) or {})
    changed = entry.model.commit(updates, record).changed
    rows = [("params", f"{plural(parameters, 'parameter')}, {bytes_(size)} in all"), ("out", describe(output))]
    if changed:
        rows.append(("writes", ", ".join(sorted(changed))))
    asked = [f"{stream} → {', '.join(dict.fromkeys(map(join, paths)))}" for stream, paths in record.asked.items()]
    rows.append(("streams", "; ".join(asked) or "none as written"))
    switches = [*prepared.switch, *(n for n in prepared.signature.parameters if n in WHEN_TRAINING)]
    names = dict.fromkeys(switch.partition("=")[0] for switch in switches)
    rows.append(("switch", ", ".join(names) or "none"))
    return tuple(rows)


# -- modules


def _called_in(calls: Calls, program: Jaxpr) -> dict[Path, tuple[Called, int]]:
    """Path → the module's first call, and how many calls there are.

    A transform may trace its body twice and drop one trace, of which only few equations are left in the program. So a
    call counts if the program has more than half as many of its equations as of any equal call.
    """
    traced = Counter(mark for equation in equations(program) for mark in marks_of(equation))
    from_outside = [called for called in calls.made.values() if not called.inside]
    most: Counter[tuple[Path, str, str]] = Counter()
    for called in from_outside:
        kind = (called.path, called.method, called.inputs)
        most[kind] = max(most[kind], traced[called.mark])
    whole = (c for c in from_outside if 0 < most[c.path, c.method, c.inputs] < 2 * traced[c.mark])
    times = Counter(called.path for called in whole)
    first: dict[Path, Called] = {}
    for called in from_outside:
        first.setdefault(called.path, called)
    return {path: (called, max(times[path], 1)) for path, called in first.items()}


def modules_of(
    model: Model,
    variables: Mapping[str, PyTree],
    called: Mapping[Path, tuple[Called, int]],
    asked: Mapping[str, list[Path]],
    flops: Mapping[Path | None, Flops],
) -> tuple[Module, ...]:
    """The modules that were called or that hold variables, each with its own variables, streams and costs.

    Args:
      called: path → the first call, and how many there are.
      asked: random stream → paths of the modules that consumed it.
      flops: path → the cost of all its calls; None → of the whole model.
    """
    classes = dict(model.module_classes())
    leaves = sorted(model.iter_variables(variables), key=lambda leaf: (leaf[0], leaf[1]))
    if not called and len(classes) <= 1:
        # No call has shown which modules there are: every inner node of a variable's path counts as one.
        around = (path[:n] for _, path, _, _ in leaves for n in range(1, len(path)))
        classes = {**dict.fromkeys(around, ""), **classes}
    known = {*called, *classes}
    paths = {(), *called, *(innermost(path, known) for _, path, _, _ in leaves)}
    arrays: dict[Path, list[Array]] = {}
    for collection, path, leaf, about in leaves:
        if hasattr(leaf, "shape") and hasattr(leaf, "dtype"):
            owner, shape = innermost(path, paths), tuple(leaf.shape)
            size = math.prod(shape) * leaf.dtype.itemsize
            name = "/".join(path[len(owner) :])
            arrays.setdefault(owner, []).append(Array(collection, name, str(leaf.dtype), shape, size, about))
    streams: dict[Path, dict[str, None]] = {}
    for stream, takers in asked.items():
        for taker in takers:
            streams.setdefault(innermost(taker, paths), {})[stream] = None
    modules = []
    for path in _ordered(paths, list(called)):
        held = tuple(arrays.get(path, ())), tuple(streams.get(path, ()))
        if path in called:
            first, times = called[path]
            module = Module(path, first.cls, first.method, times, first.inputs, first.outputs, *held, *flops[path])
        else:
            module = Module(path, classes.get(path, ""), "", 0, "", "", *held)
        modules.append(module)
    return tuple(modules)


def _ordered(paths: Iterable[Path], called: list[Path]) -> list[Path]:
    """Parents before children, siblings in the order of their first calls; modules that were not called come last."""
    rank = {path: i for i, path in enumerate(called)}
    first: dict[Path, int] = {}
    for path in paths:
        for n in range(len(path) + 1):
            first[path[:n]] = min(first.get(path[:n], len(rank)), rank.get(path, len(rank)))
    return sorted(paths, key=lambda path: [(first[path[:n]], natural(path[n - 1])) for n in range(1, len(path) + 1)])


# -- FLOPs


class ModuleEquations(Struct, frozen=True):
    """Equations of one jaxpr that belong to one module.

    Attributes:
      back: inputs of the jaxpr that count as returned, see `_handed_back`.
    """

    jaxpr: Jaxpr
    equations: list[JaxprEqn]
    back: frozenset[Var]


def _pieces(program: Jaxpr, calls: Calls, back: frozenset[Var]) -> dict[Path | None, list[ModuleEquations]]:
    """The equations of each module by path; those of all modules together under None.

    Args:
      back: inputs of the program that count as returned.
    """
    pieces: dict[Path | None, list[ModuleEquations]] = {}

    def collect(jaxpr: Jaxpr, back: frozenset[Var], around: frozenset[Path | None]) -> None:
        # An equation counts for each module around it, but once only: not again in a jaxpr inside one that counted.
        here: dict[Path | None, ModuleEquations] = {}
        for equation in jaxpr.eqns:
            owners: set[Path | None] = {calls.made[mark].path for mark in marks_of(equation) if mark in calls.made}
            owners |= {None} if owners else set()
            for path in owners - around:
                here.setdefault(path, ModuleEquations(jaxpr, [], back)).equations.append(equation)
            for inner in _inner(equation):
                # Where the inputs match one by one (jit, remat), what counts as returned is passed inwards.
                same = len(inner.invars) == len(equation.invars)
                pairs = zip(inner.invars, equation.invars, strict=True) if same else ()
                below = frozenset(mine for mine, outer in pairs if isinstance(outer, Var) and outer in back)
                collect(inner, below, around | owners)
        for path, piece in here.items():
            pieces.setdefault(path, []).append(piece)

    collect(program, back, frozenset())
    return pieces


def equations(jaxpr: Jaxpr) -> Iterator[JaxprEqn]:
    """All equations of a program, those of jaxprs in their parameters included."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in _inner(equation):
            yield from equations(inner)


def _inner(equation: JaxprEqn) -> Iterator[Jaxpr]:
    """The jaxprs in an equation's parameters: the bodies of jit, scan, cond and the like."""
    for value in equation.params.values():
        for part in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(part, (ClosedJaxpr, Jaxpr)):
                yield part.jaxpr if isinstance(part, ClosedJaxpr) else part


@dataclass
class _Costs:
    """Counts FLOPs; pieces whose jaxprs read the same are lowered once."""

    backward: bool
    _known: dict[str, Flops] = field(default_factory=dict)
    _uses: dict[Jaxpr, Counter[Var]] = field(default_factory=dict)
    """jaxpr → how often each variable is read in it."""

    def count(self, pieces: list[ModuleEquations]) -> Flops:
        """The FLOPs of all `pieces` together."""
        counts = [self._count(piece) for piece in pieces]
        both = total([count.both for count in counts]) if self.backward else None
        return Flops(total([count.forward for count in counts]), both)

    def _count(self, piece: ModuleEquations) -> Flops:
        closed = self._closed(piece)
        text = _OWN.sub("", str(closed.jaxpr))
        if text not in self._known:
            function = jaxpr_as_fun(closed)
            shapes = [jax.ShapeDtypeStruct(var.aval.shape, var.aval.dtype) for var in closed.jaxpr.invars]
            both = _flops(_pulled_back(function), shapes) if self.backward else None
            self._known[text] = Flops(_flops(function, shapes), both)
        return self._known[text]

    def _closed(self, piece: ModuleEquations) -> ClosedJaxpr:
        """A piece as a jaxpr: its inputs are what its equations read, its outputs what the rest reads of them."""
        jaxpr = piece.jaxpr
        if jaxpr not in self._uses:
            self._uses[jaxpr] = _reads([*(var for each in jaxpr.eqns for var in each.invars), *jaxpr.outvars])
        uses, inside = self._uses[jaxpr], _reads([var for each in piece.equations for var in each.invars])
        results = dict.fromkeys(var for each in piece.equations for var in each.outvars)
        read = [var for var in inside if var not in results]
        outputs = [var for var in results if uses[var] > inside[var]] + [var for var in read if var in piece.back]
        debug_info = jaxpr.debug_info.with_unknown_names()
        parts = {"constvars": [], "invars": read, "outvars": outputs, "eqns": piece.equations}
        return ClosedJaxpr(jaxpr.replace(**parts, debug_info=debug_info), [])


def _reads(variables: Iterable[object]) -> Counter[Var]:
    """How often each variable occurs; literals are left out."""
    return Counter(var for var in variables if isinstance(var, Var))


def _flops(function: Callable[..., PyTree], shapes: list[jax.ShapeDtypeStruct]) -> int | None:
    cost = jax.jit(function).lower(*shapes).cost_analysis()
    return None if cost is None else int(cost.get("flops", 0))


def _pulled_back(function: Callable[..., list[jax.Array]]) -> Callable[..., PyTree]:
    """The forward and backward pass: the vjp for all floating inputs, with the outputs as cotangents."""

    def cotangent(output: jax.Array) -> jax.Array | np.ndarray:
        # JAX wants float0 as the cotangent of an output that is not floating.
        floating = jax.numpy.issubdtype(output.dtype, jax.numpy.inexact)
        return output if floating else np.zeros(output.shape, jax.dtypes.float0)

    def both(*values: jax.Array) -> PyTree:
        outputs, pull = jax.vjp(function, *values)
        return pull([cotangent(output) for output in outputs])

    return both
