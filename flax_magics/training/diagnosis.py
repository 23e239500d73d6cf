"""Gradients by module, and why one is zero, or not finite: the module, the line and the value that made it so.

The reasons are told from the very program that ran, traced once more with its modules recorded and evaluated equation by
equation. It takes seconds rather than milliseconds, and happens only where there is something to explain.
"""

from __future__ import annotations

import linecache
import math
import weakref
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, TypeAlias

import jax
import numpy as np
from jax.extend.core import Jaxpr
from msgspec.structs import replace

from ..base.digest import is_spread
from ..base.measures import LayerGradient
from ..base.private import frames_of
from ..base.text import join, plural
from ..base.types import HostArray, Leaf, PyTree
from ..code.library import library_file
from ..compile.cache import Program
from ..compile.jaxpr import Atom, Equation
from ..compile.trace import TracedCall, TraceRequest, inputs_of, trace_call
from ..execution.execute import Execution
from ..models.base import Variables
from ..models.calls import Calls, Kwargs, Path
from ..rng.keys import Words
from ..run import Note, Run
from .evaluation import Culprit, Level, culprit_of, is_bad
from .loss import Gradients, Loss
from .step import Step


def parameter_paths(loss: Loss, variables: Variables) -> Iterator[Path]:
    """The path of each parameter, its own name last."""
    return (path for path, _ in _parameters(loss, variables))


def frozen_modules(loss: Loss, variables: Variables) -> set[Path]:
    """The modules of which some parameters are frozen."""
    trained = {path for path, _ in loss.rows(loss.as_users(loss.parameters(variables)))}
    return {path[:-1] for path in parameter_paths(loss, variables) if path not in trained}


def _parameters(loss: Loss, variables: Variables) -> Iterator[tuple[Path, Leaf]]:
    kinds = loss.trainable()
    trainable = {name: tree for name, tree in variables.items() if name in kinds}
    for name, path, leaf, _ in loss.iter_variables(trainable):
        if name in kinds:
            yield path, leaf


def _gradients(gradients: Gradients, loss: Loss) -> dict[Path, list[Leaf]]:
    """The gradient of each parameter that has one, by path; several arrays for a box that holds several."""
    by_path: dict[Path, list[Leaf]] = {}
    for path, leaf in loss.rows(gradients.grads):
        by_path.setdefault(path, []).extend(jax.tree_util.tree_leaves(leaf))
    return by_path


def layer_gradients(gradients: Gradients, loss: Loss, variables: Variables) -> tuple[LayerGradient, ...]:
    """One row for each module that holds parameters, in the order of the variables."""
    classes, measured = loss.module_classes(), _gradients(gradients, loss)
    rows: dict[Path, list[LayerGradient]] = {}
    for path, weight in _parameters(loss, variables):
        owner, parts = path[:-1], measured.get(path)
        gradient = parts.pop(0) if parts else None
        rows.setdefault(owner, []).append(_measured(weight, gradient))
    return tuple(LayerGradient.of_all(parts, path, classes.get(path, "")) for path, parts in rows.items())


def _measured(weight: Leaf, gradient: PyTree) -> LayerGradient:
    """The row of one parameter alone."""
    size = int(np.size(weight))
    if gradient is None:
        return LayerGradient((), "", size, frozen=size)
    if is_spread(gradient) or is_spread(weight):
        return LayerGradient((), "", size)
    values = _wide(gradient)
    return LayerGradient(
        (),
        "",
        size,
        0,
        float(np.vdot(values, values).real),
        float(np.vdot(_wide(weight), _wide(weight)).real),
        int(values.size - np.count_nonzero(values)),
        int(values.size - np.count_nonzero(np.isfinite(values))),
    )


def _wide(array: Leaf) -> np.ndarray[Any, Any]:
    """The array in double precision on the host: squares of float32 would overflow from 1e19 on."""
    values = np.asarray(array)
    return values.astype(np.complex128 if np.iscomplexobj(values) else np.float64).ravel()


ROWS = 4
"""How many rows of a batch are named."""
STOP = "stop_gradient"
"""The primitive of `jax.lax.stop_gradient`."""
STOPPED = "has no gradient: `jax.lax.stop_gradient` keeps it from the loss"
UNREAD = "has no gradient: the loss does not depend on it"
"""What is said of a module that a loss does not use."""


def notes_of(execution: Execution, run: Run) -> Iterator[Note]:
    """Notes on what is not finite, and on layers without a gradient where the reason can be measured."""
    bad = any(map(is_bad, (run.output.loss, *_floats((run.output.grads, run.output.updates)))))
    dead = [layer for layer in run.layers if _is_dead(layer)]
    if not bad and not dead:
        return
    on_phase = execution.request.services.on_phase
    if bad:
        on_phase("looking where it is not finite")
        yield Note("nan", _not_finite(run.output.loss, run.layers, _evaluated(execution)))
        return
    # A loop of runs would look for the same reason each time.
    known, paths = _known(execution.plan.program), frozenset(layer.path for layer in dead)
    if paths not in known:
        on_phase("looking where no gradient gets through")
        evaluated = _evaluated(execution)
        known[paths] = ()
        with suppress(Exception):
            known[paths] = () if evaluated is None else tuple(evaluated.dead(paths))
    yield from known[paths]


Reasons: TypeAlias = dict[frozenset[Path], tuple[Note, ...]]
_reasons: dict[int, tuple[weakref.ref[Program], Reasons]] = {}
"""id of a program → a weak reference to it, and what was found of layers without a gradient."""


def _known(program: Program | None) -> Reasons:
    if program is None:
        return {}
    held = _reasons.get(id(program))
    if held is None or held[0]() is not program:
        key = id(program)
        held = _reasons[key] = weakref.ref(program, lambda _: _reasons.pop(key, None)), {}
    return held[1]


def why_of_step(
    step: Step,
    request: TraceRequest,
    opt_state: PyTree,
    inputs: tuple[Mapping[str, Words], Kwargs, HostArray | None],
    loss: Leaf,
) -> str:
    """Why a step of a training is not finite.

    Args:
      request: of the step's loss, with the variables before the step.
      opt_state: before the step.
      inputs: key data of the step, its arguments by name, and the rows of the data that its batch consists of.
      loss: that the step gave.
    """
    try:
        keys, named, rows = inputs
        arguments = step.arguments
        leaves = tuple(named.get(name, leaf) for name, leaf in zip(arguments.names, arguments.leaves, strict=True))
        request = replace(request, model=step.loss.as_model(), arguments=replace(arguments, leaves=leaves))
        evaluated = Evaluated(request, keys, {} if rows is None else dict.fromkeys(step.batched, rows))
        gradients = evaluated.gradients
        if any(map(is_bad, (loss, *_floats((gradients.loss, gradients.grads, gradients.updates))))):
            return _not_finite(loss, layer_gradients(gradients, step.loss, request.variables), evaluated)
        params, grads = step.loss.as_users(step.loss.parameters(request.variables)), gradients.grads
        changed = params if step.takes_loss else step.updated(params, grads, opt_state)[0]
        paths = jax.tree_util.tree_flatten_with_path(changed)[0]
        bad = next((_steps_of(path) for path, leaf in paths if is_bad(leaf)), "a parameter")
        return f"the loss and its gradients are finite, and the optimizer makes {bad} infinite"
    except Exception:  # as in `_evaluated`; the finished steps must not be lost for want of a reason
        return f"the loss is {_number(np.asarray(loss))}" if is_bad(loss) else "its gradients or variables are not"


def _steps_of(path: Sequence[object]) -> str:
    return "/".join(str(getattr(key, "key", getattr(key, "name", key))) for key in path)


def _evaluated(execution: Execution) -> Evaluated | None:
    """The run's program with its values; None where it cannot be evaluated equation by equation."""
    try:
        # What the run was given, so that the trace is the one of the program.
        request = replace(execution.built.request, guess=execution.result.needs)
        return Evaluated(request, execution.plan.keys(execution.request.draw))
    except Exception:  # a primitive that runs in no other way than compiled, or too little memory for all values
        return None


def _floats(tree: object) -> list[Leaf]:
    return [leaf for leaf in jax.tree_util.tree_leaves(tree) if hasattr(leaf, "dtype")]


def _is_dead(layer: LayerGradient) -> bool:
    trained = layer.parameters - layer.frozen
    return trained > 0 and layer.zeros == trained


def _not_finite(loss: Leaf, rows: Sequence[LayerGradient], evaluated: Evaluated | None) -> str:
    """What of a loss, its gradients and the variables that it updates is not finite, and why."""
    if is_bad(loss):
        what = f"the loss is {_number(np.asarray(loss))}"
    else:
        bad = [layer for layer in rows if layer.bad]
        named = _name(bad[0].path) if bad else ""
        more = f" and {plural(len(bad) - 1, 'more layer')}" if len(bad) > 1 else ""
        what = f"the loss is finite, and the gradient of {named}{more} is not"
        what = what if bad else "the loss is finite, and what it writes into the variables is not"
    why = ""
    with suppress(Exception):  # without a reason the rest is still true
        why = "" if evaluated is None else evaluated.why()
    return f"{what}: {why}" if why else what


class Evaluated:
    """The program of a loss and its gradients with all values of its equations.

    Args:
      request: what it was made for.
      keys: key data by stream.
      rows: name of an argument that is a part of the data → which rows of them it is.
    """

    def __init__(
        self, request: TraceRequest, keys: Mapping[str, Words], rows: Mapping[str, HostArray] | None = None
    ) -> None:
        self.rows = rows or {}
        traced: TracedCall[None] = trace_call(replace(request, noted=True))
        inputs = request.variables, keys, request.arguments.dynamic
        paths, _ = jax.tree_util.tree_flatten_with_path(inputs)
        self.calls = traced.trace.calls or Calls()
        self.names = [_named(path) for path, _ in paths]
        self.top = Level(traced.traced.jaxpr, [jax.numpy.asarray(leaf) for _, leaf in paths])
        outputs, _ = jax.tree_util.tree_flatten_with_path(traced.traced.out_info)
        # `(Gradients, sown values)`: the name of each output's field.
        self.fields = [path[1].key if path[0].idx == 0 else "" for path, _ in outputs]
        structure = jax.tree_util.tree_structure(traced.traced.out_info)
        self.gradients: Gradients = jax.tree_util.tree_unflatten(structure, self.top.results)[0]

    def why(self) -> str:
        """Where the first bad value comes from; empty where that cannot be told."""
        outputs = list(zip(self.fields, self.top.jaxpr.outvars, strict=True))
        ordered = [atom for field in ("loss", "grads", "updates") for name, atom in outputs if name == field]
        bad = [atom for atom in ordered if is_bad(self.top.read(atom))]
        if not bad:
            return "evaluated op by op it is finite, so that it comes of how XLA has joined the operations"
        culprit = next(filter(None, (culprit_of(self.top, atom) for atom in bad)), None)
        if culprit is None:
            return ""
        return self._of_input(culprit) if culprit.equation is None else self._of_equation(culprit, culprit.equation)

    def _of_input(self, culprit: Culprit) -> str:
        name = dict(zip(self.top.jaxpr.invars, self.names, strict=True)).get(culprit.atom, "a constant")
        values = np.asarray(culprit.level.read(culprit.atom))
        if not values.ndim or name.startswith(VARIABLE):
            return f"{name} holds NaN"
        rows = np.flatnonzero(np.isnan(values).reshape(len(values), -1).any(axis=1))
        of_data = self.rows.get(name.strip("`"))
        rows = rows if of_data is None else of_data[rows]
        more = " and more" if len(rows) > ROWS else ""
        return f"{name} holds NaN in {'row' if len(rows) == 1 else 'rows'} {', '.join(map(str, rows[:ROWS]))}{more}"

    def _of_equation(self, culprit: Culprit, equation: Equation) -> str:
        level = culprit.level
        inputs = [np.asarray(level.read(atom)) for atom in equation.invars]
        output = np.asarray(level.read(culprit.atom))
        parts = [_spelled(equation.primitive.name, inputs, output)]
        where = self.module_of(level, equation)
        parts.append("in the loss itself" if where is None else f"in {_name(where)}")
        if level.step:
            parts.append(f"at {level.step} of the loop")
        if "transpose(" in str(equation.source_info.name_stack):
            parts.append("in the backward pass")
        line, around = _line_of(equation), level.around
        # A rule that JAX evaluates by itself, inside a loop, has no line of its own.
        while not line and around is not None:
            line, around = _line_of(around[1]), around[0].around
        return " ".join(parts) + (f", {line}" if line else "")

    def module_of(self, level: Level, equation: Equation) -> Path | None:
        """The path of the module in whose call an equation was traced; None for one of the loss's own."""
        marks = [mark for mark in level.marks_at(equation) if mark in self.calls.made]
        return self.calls.made[marks[-1]].path if marks else None

    def dead(self, paths: frozenset[Path]) -> Iterator[Note]:
        """Notes on those of the modules at `paths`, which have no gradient, for which a reason is measured."""
        silent, unused, stopped = self._behind_dead_relus(paths), self._unused(), self._unused(through_stops=False)
        for path in sorted(paths):
            if path in silent:
                yield Note("gradient", f"{_name(path)} has no gradient: relu's input is negative for every example")
            elif path in unused:
                yield Note("gradient", f"{_name(path)} {UNREAD}")
            elif path in stopped:
                yield Note("gradient", f"{_name(path)} {STOPPED}{self._line_of_stop(path)}")

    def _line_of_stop(self, path: Path) -> str:
        """The line of the first `stop_gradient` behind a module; empty where it is unknown."""
        for level, equation in self.top.equations():
            places = [(level, atom) for atom in equation.invars]
            # A loss has others: optax takes the largest logit so.
            if equation.primitive.name == STOP and self._nearest(frozenset({path}), places):
                line = _line_of(equation)
                return f", {line}" if line else ""
        return ""

    def _behind_dead_relus(self, paths: frozenset[Path]) -> set[Path]:
        """Those of the modules at `paths` that are the last before a relu which is given nothing but negative numbers."""
        modules: set[Path] = set()
        for level, equation in self.top.equations():
            if equation.primitive.name != "max" or not any(_is_zero(atom) for atom in equation.invars):
                continue
            inputs = [atom for atom in equation.invars if not hasattr(atom, "val")]
            if all(bool((np.asarray(level.read(atom)) <= 0).all()) for atom in inputs):
                modules |= self._nearest(paths, [(level, atom) for atom in inputs])
        return modules

    def _nearest(self, paths: frozenset[Path], places: list[tuple[Level, Atom]]) -> set[Path]:
        """Those of the modules at `paths` that are met first on the way back from `places`."""
        nearest: set[Path] = set()
        seen: set[tuple[int, int]] = set()
        while places:
            level, atom = places.pop()
            if hasattr(atom, "val") or (id(level), id(atom)) in seen:
                continue
            seen.add((id(level), id(atom)))
            if atom in level.outer:
                places.append(level.outer[atom])
            elif atom in level.makers:
                equation, n = level.makers[atom]
                inner = level.inner.get(id(equation))
                path = self.module_of(level, equation)
                if path in paths:
                    nearest.add(path)
                elif inner is not None:
                    places.append((inner, inner.jaxpr.outvars[n]))
                else:
                    places += ((level, each) for each in equation.invars)
        return nearest

    def _unused(self, *, through_stops: bool = True) -> set[Path]:
        """The modules on whose variables the loss does not depend; `through_stops`: see `unread`."""
        jaxpr = self.top.jaxpr
        loss = [var for name, var in zip(self.fields, jaxpr.outvars, strict=True) if name == "loss"]
        return unread(jaxpr, loss, self.names, through_stops=through_stops)


def unread(jaxpr: Jaxpr, outputs: Sequence[Atom], names: Sequence[str], *, through_stops: bool = True) -> set[Path]:
    """The modules on whose variables some `outputs` do not depend.

    Args:
      names: those of the inputs.
      through_stops: what a `stop_gradient` is given counts, too.
    """
    needed = set(map(id, outputs))
    for equation in reversed(jaxpr.eqns):
        if equation.primitive.name == STOP and not through_stops:
            continue
        if any(id(var) in needed for var in equation.outvars):
            needed.update(map(id, equation.invars))
    unused: dict[Path, bool] = {}
    for var, name in zip(jaxpr.invars, names, strict=True):
        if name.startswith(VARIABLE):
            path = tuple(name.removeprefix(VARIABLE).rstrip("`").split("/"))[1:-1]
            unused[path] = unused.get(path, True) and id(var) not in needed
    return {path for path, is_unused in unused.items() if is_unused}


def notes_of_unused(traced: TracedCall[None], kinds: Collection[str], frozen: Collection[Path]) -> Iterator[Note]:
    """Notes on modules whose parameters the loss never uses, so that a training leaves them as they are.

    Args:
      traced: the loss alone.
      kinds: the collections that have parameters.
      frozen: modules of which some are frozen.
    """
    request, jaxpr = traced.request, traced.traced.jaxpr.jaxpr
    paths, _ = jax.tree_util.tree_flatten_with_path(inputs_of(request, traced.needs))
    names = [_named(path) for path, _ in paths]
    of_parameters = [name if name.removeprefix(VARIABLE).partition("/")[0] in kinds else "" for name in names]
    unused, kept = unread(jaxpr, jaxpr.outvars[:1], of_parameters), set(frozen)
    for path in sorted(unused - kept):
        yield Note("gradient", f"{_name(path)} {UNREAD}")
    for path in sorted(unread(jaxpr, jaxpr.outvars[:1], of_parameters, through_stops=False) - unused - kept):
        yield Note("gradient", f"{_name(path)} {STOPPED}")


def _name(path: Path) -> str:
    return join(path) if path else "the model itself"


VARIABLE = "the variable `"


def _named(path: Sequence[object]) -> str:
    """The name of an input: a variable by its path, an argument as it is called in the loss."""
    which, *inside = path
    if which.idx == 0:  # type: ignore[attr-defined]
        return f"{VARIABLE}{_steps_of(inside)}`"
    return f"`{inside[0].key}`" if which.idx == 2 else "a key"  # type: ignore[attr-defined]


def _is_zero(atom: object) -> bool:
    return hasattr(atom, "val") and np.ndim(atom.val) == 0 and float(atom.val) == 0.0


WHOLE = ("dot_general", "conv_general", "reduce", "cum", "scatter", "gather", "sort", "select_and")
"""How the names of operations begin that are not elementwise, whatever the shapes."""

Array: TypeAlias = "np.ndarray[Any, Any]"


def _spelled(name: str, inputs: list[Array], output: Array) -> str:
    """`log(0) gives -inf`, for the first element that is not finite; for others than elementwise ones how large it was."""
    at = tuple(int(n) for n in np.argwhere(~np.isfinite(output))[0])
    result = _number(output[at])
    fits = (not each.shape or each.ndim == output.ndim for each in inputs)
    if all(fits) and not name.startswith(WHOLE):
        with suppress(IndexError):  # it is not elementwise after all
            elements = (
                each[tuple(0 if m == 1 else n for n, m in zip(at, each.shape, strict=False))] for each in inputs
            )
            return f"{name}({', '.join(map(_number, elements))}) gives {result}"
    floats = [each for each in inputs if each.size and jax.numpy.issubdtype(each.dtype, np.floating)]
    most = max((float(np.max(np.abs(each.astype(np.float64)))) for each in floats), default=math.nan)
    return f"{name} of {output.dtype} gives {result}, of numbers up to {most:.3g}"


def _number(value: Array) -> str:
    number = float(np.real(value)) if np.ndim(value) == 0 else math.nan
    return "NaN" if math.isnan(number) else f"{number:.4g}"


def _line_of(equation: Equation) -> str:
    """Number and text of the user's line that an equation comes from; empty where no frame is the user's."""
    for file, line, _ in frames_of(equation.source_info):
        if library_file(file):
            continue
        text = linecache.getline(file, line).strip()
        return f"line {line}: {text}" if text else f"line {line} of {file}"
    return ""
