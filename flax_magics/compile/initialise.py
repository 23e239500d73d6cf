"""The initialisation of a linen model, faster than op by op and with the same bits.

By hand, `module.init` runs op by op, and every op of the forward pass is compiled and run with it. Here the same code is
traced by shapes. What the variables do not depend on is left out, and what is left runs as JAX's op-by-op execution would
run it, unit by unit (see `Units`): the bits are those of `module.init`. Where that could not be said (the model looks at
values, it has side effects or callbacks, its functions run differently in a trace) it is `module.init` that runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from ..base.digest import count_parameters, data_of, weakly_typed
from ..base.workers import Future
from ..models.base import Model
from ..models.calls import Path
from ..rng import threefry
from ..rng.keys import Draw, as_key, shape_of_key
from ..run import InitStats, altered
from . import init_trace
from .init_trace import COMPUTED, TracedInit, is_array, read_by, trace_init
from .units import Units, run


class Initialising:
    """Variables that are being made: `begin` has what takes long compiled, `finish` gives them.

    Args:
      model, method, args, kwargs: the call, made ready for an init.
      draw: what its `params` key is drawn from.
      taken: see `Draw.stream`.
    """

    def __init__(
        self,
        model: Model,
        method: Path,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        draw: Draw,
        units: Units,
        taken: bool = False,
    ) -> None:
        assert not model.holds_variables  # an NNX module is initialised where it is built
        self._model = model
        self._call = method, args, kwargs
        self._draw, self._taken = draw, taken
        self._traced: TracedInit | None = None
        self._running: Running | None = None
        self._units: Units | None = None
        try:
            init = (model, shape_of_key(draw.impl), *self._call)
            self._traced = init_trace.take(*init) or trace_init(*init)
        except Exception:  # `module.init` raises it, or does without a trace
            return
        if can_run(self._traced):
            self._units = units

    @property
    def expected(self) -> Mapping[str, Any] | None:
        """The variables, shapes in place of arrays that are to be computed; None where only running can tell."""
        return None if self._units is None or self._traced is None else self._traced.variables

    def begin(self) -> None:
        """Has the functions among the units compiled, on other threads: they take as long as a small model."""
        if self._units is not None and self._running is None:
            assert self._traced is not None
            self._running = Running(self._traced, self._units)

    def begin_rest(self) -> None:
        """Has the other units compiled as well: single ops, which take little."""
        self.begin()
        if self._running is not None:
            self._running.begin_rest()

    def finish(self) -> tuple[dict[str, Any], InitRecord]:
        """The variables, once the device has them, and how they were made."""
        self.begin_rest()
        key = self._draw.stream("params", taken=self._taken)
        variables = self._running.finish(key) if self._running is not None else self._model.init(key, *self._call)
        jax.block_until_ready(variables)
        return variables, record(self._traced, key, *self._call)


class Running:
    """An initialisation as its units: functions, which are being compiled, and single ops, once `begin_rest` was called."""

    def __init__(self, traced: TracedInit, units: Units) -> None:
        self.traced = traced
        self._kinds = units
        self._on_host = {i for i, equation in enumerate(traced.needed) if _folds_a_constant(equation)}
        self._units: dict[int, Future | None] = {}
        self._begin(lambda equation: "jaxpr" in equation.params)

    def begin_rest(self) -> None:
        """Has the single ops compiled as well."""
        self._begin(lambda equation: True)

    def _begin(self, which: Callable[[Any], bool]) -> None:
        for i, equation in enumerate(self.traced.needed):
            if i not in self._units and i not in self._on_host and which(equation):
                self._units[i] = self._kinds.of_equation(equation)

    def finish(self, key: Any) -> dict[str, Any]:
        """The variables, computed. What is not needed any more is let go of on the way."""
        traced = self.traced
        jaxpr = traced.closed.jaxpr
        last = {
            var: i for i, equation in enumerate(traced.needed) for var in equation.invars if not hasattr(var, "val")
        }
        last.update(dict.fromkeys((var for var in jaxpr.outvars if not hasattr(var, "val")), len(traced.needed)))
        values: dict[Any, Any] = dict(zip(jaxpr.constvars, traced.closed.consts, strict=True))
        values.update(zip(jaxpr.invars, (key, *traced.inputs), strict=True))

        def read(atom: Any) -> Any:
            return np.asarray(atom.val, atom.aval.dtype) if hasattr(atom, "val") else values[atom]

        for i, equation in enumerate(traced.needed):
            arguments = list(map(read, equation.invars))
            results = self._evaluate(i, equation, arguments)
            values.update(
                (var, value) for var, value in zip(equation.outvars, results, strict=True) if last.get(var, -1) >= i
            )
            for atom in equation.invars:
                if not hasattr(atom, "val") and last[atom] == i:
                    values.pop(atom, None)
        computed = (_as_array(read(atom), weak=atom.aval.weak_type) for atom in jaxpr.outvars)
        leaves = [next(computed) if leaf is COMPUTED else leaf for leaf in traced.leaves]
        variables: dict[str, Any] = jax.tree_util.tree_unflatten(traced.treedef, leaves)
        return variables

    def _evaluate(self, i: int, equation: Any, arguments: list[Any]) -> list[Any]:
        if i in self._on_host:
            key, constant = arguments
            return [as_key(threefry.hashes(data_of(key), (int(constant),))[0], _KEYS)]
        unit = self._units[i]
        results: Any = equation.primitive.bind(*arguments, **equation.params) if unit is None else run(unit, *arguments)
        return list(results) if equation.primitive.multiple_results else [results]


_KEYS = "threefry2x32"


def _as_array(value: Any, *, weak: bool) -> Any:
    """A leaf as `module.init` gives it: a literal of the program is none yet."""
    if not isinstance(value, np.ndarray):
        return value
    return weakly_typed(value) if weak else jax.device_put(value)


def _folds_a_constant(equation: Any) -> bool:
    """Whether a module's name is folded into a key, as every `make_rng` does, which needs no program."""
    if equation.primitive.name != "random_fold_in":
        return False
    key, constant = equation.invars
    return (
        key.aval.shape == ()
        and str(key.aval.dtype._impl.name) == _KEYS
        and threefry.is_in_force(_KEYS)
        and hasattr(constant, "val")
        and constant.aval.dtype == np.uint32
    )


def can_run(traced: TracedInit) -> bool:
    """Whether its equations give what `module.init` gives."""
    if not traced.whole or traced.closed.effects or _special_settings():
        return False
    read = read_by(traced.needed)
    inputs = dict(zip(traced.closed.jaxpr.invars[1:], traced.inputs, strict=True))
    if any(var in read and getattr(leaf, "committed", False) for var, leaf in inputs.items()):
        return False  # where the arguments are decides where the variables are
    return all(map(_same_in_a_trace, traced.needed))


def _special_settings() -> bool:
    """Whether JAX is set to run op by op in its own way: looking for NaN, without jit, or over a mesh."""
    config = jax.config
    special = ("jax_debug_nans", "jax_debug_infs", "jax_disable_jit", "jax_check_tracer_leaks")
    if any(getattr(config, name, False) for name in special):
        return True
    try:
        from jax._src import mesh

        return not (mesh.get_abstract_mesh().empty and mesh.thread_resources.env.physical_mesh.empty)
    except (ImportError, AttributeError):  # private names: where they are others, it cannot be told
        return True


def _same_in_a_trace(equation: Any) -> bool:
    """Whether op-by-op execution runs what the equation says: not Python functions, which it runs op by op in their turn."""
    name = equation.primitive.name
    return not (
        equation.primitive.call_primitive
        or getattr(equation.primitive, "map_primitive", False)
        or name.startswith("custom_")
        or "callback" in name
        or name in ("closed_call", "sharding_constraint", "run_state", "remat", "checkpoint")
    )


@dataclass(frozen=True)
class InitRecord:
    """How a model's variables were made: enough to ask what a later version of the model would make of it.

    `args` and `kwargs` hold shapes in place of arrays. `traced` is the initialisation as a program, None where it cannot be
    traced.
    """

    key: Any
    method: Path
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    traced: TracedInit | None

    @property
    def shapes(self) -> Any:
        """The variables, shapes in place of arrays; None where they cannot be told."""
        return None if self.traced is None else self.traced.shapes

    @property
    def program(self) -> str | None:
        """A digest of what the variables depend on, forward pass left out; None where that cannot be told."""
        return None if self.traced is None else self.traced.digest


def initialised(model: Model, key: Any, method: Path, args: tuple[Any, ...], kwargs: dict[str, Any]) -> InitRecord:
    """Traces the initialisation by shapes; nothing is computed. `args`/`kwargs` may hold arrays or shapes."""
    traced: TracedInit | None
    try:
        traced = trace_init(model, key, method, args, kwargs)
    except jax.errors.JAXTypeError:  # initialisation looks at values
        traced = None
    return record(traced, key, method, args, kwargs)


def shapes_of_init(model: Model, key: Any, method: Path, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The variables that an init would make, as shapes. Nothing is computed; an init that looks at values raises."""
    return trace_init(model, key, method, args, kwargs).shapes


def record(
    traced: TracedInit | None, key: Any, method: Path, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> InitRecord:
    """How variables were made that `traced` is the program of; None where it cannot be traced."""
    if traced is not None:
        traced = altered(traced, {"inputs": ()})  # they are the user's arrays
        if traced.closed.consts or any(map(is_array, traced.leaves)):
            _ = traced.digest  # of arrays as they are now: they may be let go of, or written into
    return InitRecord(key, method, _abstract(args), _abstract(kwargs), traced)


def _abstract(tree: Any) -> Any:
    def one(leaf: Any) -> Any:
        return (
            jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, weak_type=getattr(leaf, "weak_type", False))
            if is_array(leaf)
            else leaf
        )

    return jax.tree_util.tree_map(one, tree)


def merged(old: Mapping[str, Any], new: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """`old` with what only `new` has, and that part alone. What is there is never replaced."""
    both, added = dict(old), {}
    for name, item in new.items():
        if name not in old:
            both[name] = added[name] = item
        elif isinstance(item, Mapping) and isinstance(old[name], Mapping):
            both[name], inside = merged(old[name], item)
            if inside:
                added[name] = inside
    return both, added


def made_of(variables: Mapping[str, Any], *, added: bool = False) -> InitStats:
    """How much of variables was made, or was added to those that were there."""
    parameters, size = count_parameters(variables)
    return InitStats(parameters, size, tuple(variables), added)
