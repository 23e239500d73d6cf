"""The initialisation of a linen model, faster than eager `module.init` and with the same bits.

By hand, `module.init` runs eagerly, and compiles and runs every op of the forward pass, too. Here the same code is
traced abstractly and the equations on which no variable depends are dropped. The others run one by one as in eager
execution, each compiled ahead (see `Units`), so that the bits are those of `module.init`. Where this cannot be
guaranteed (the model looks at values, has side effects or callbacks, or contains functions that run otherwise in a
trace), `module.init` runs.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import re
import threading
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from typing import Any, TypeAlias

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr
from msgspec import Struct
from msgspec.structs import replace

from ..base.digest import count_parameters, data_of, is_key, weakly_typed
from ..base.private import is_in_mesh, staging_of
from ..base.threads import Future, wait_for
from ..base.types import Leaf, PyTree
from ..models.base import ModelWithInit, Updates, Variables
from ..models.calls import Args, Function, Kwargs, Path
from ..models.switch import WHEN_TRAINING, value_of
from ..rng.keys import THREEFRY, Draw, as_key, is_on_host, shape_of_key, threefry
from ..run import InitStats
from .compiler import Units, shape_of
from .jaxpr import Atom, Equation

Key: TypeAlias = jax.Array | jax.ShapeDtypeStruct

COMPUTED = object()
"""Placeholder for a leaf of the variables that the jaxpr computes."""


class TracedInit(Struct, frozen=True, dict=True):
    """An initialisation as a jaxpr over the key and the arrays among the arguments.

    Attributes:
      closed: the jaxpr; its outputs are the leaves of the variables that have to be computed.
      needed: the equations on which the outputs depend, in order.
      leaves: all leaves of the variables, `COMPUTED` in place of each output.
      treedef: the treedef of the variables.
      inputs: the arrays among the arguments.
      whole: JAX inlined no jitted function, so each equation is what eager execution runs as one program.
    """

    closed: ClosedJaxpr
    needed: tuple[Equation, ...]
    leaves: tuple[Leaf, ...]
    treedef: PyTree
    inputs: tuple[Leaf, ...]
    whole: bool

    @property
    def variables(self) -> PyTree:
        """The variables before they are computed: known leaves as they are, the others as shapes."""
        return self.filled(map(_shape, self.closed.out_avals))

    def filled(self, computed: Iterator[Leaf]) -> PyTree:
        """The variables, with `computed` in place of the leaves that the jaxpr computes."""
        leaves = [next(computed) if leaf is COMPUTED else leaf for leaf in self.leaves]
        return jax.tree_util.tree_unflatten(self.treedef, leaves)

    @property
    def shapes(self) -> PyTree:
        """The variables as shapes."""
        return jax.tree_util.tree_map(_shape, self.variables)

    @cached_property
    def digest(self) -> str:
        """A digest of the equations and constants that the variables depend on: an edited forward pass keeps it."""
        jaxpr = self.closed.jaxpr
        text = str(jaxpr.replace(eqns=list(self.needed)))
        text = re.sub(r"0x[0-9a-f]+", "", text)  # addresses of functions, which differ between runs
        hasher = hashlib.sha256(text.encode())
        read = _read_by(self.needed) | _variables(jaxpr.outvars)
        constants = [value for var, value in zip(jaxpr.constvars, self.closed.consts, strict=True) if var in read]
        values = [*filter(_is_plain_array, constants), *(leaf for leaf in self.leaves if leaf is not COMPUTED)]
        for value in values:
            hasher.update(np.asarray(value).tobytes() if _is_plain_array(value) else repr(value).encode())
        return hasher.hexdigest()


def trace_init(model: ModelWithInit, key: Key, method: Path | Function, args: Args, kwargs: Kwargs) -> TracedInit:
    """Traces `module.init` abstractly; nothing is computed. `key`, `args` and `kwargs` may hold arrays or shapes.

    Lets through what the model raises, and JAX's tracer errors where the model looks at values.
    """
    leaves, treedef = jax.tree_util.tree_flatten((args, kwargs))
    dynamic = [leaf for leaf in leaves if is_array(leaf)]
    variables: PyTree = None
    whole = False

    def init(key: jax.Array, dynamic: list[Leaf]) -> list[Leaf]:
        nonlocal variables, whole
        arrays = iter(dynamic)
        filled = [next(arrays) if is_array(leaf) else leaf for leaf in leaves]
        args, kwargs = jax.tree_util.tree_unflatten(treedef, filled)
        with _no_inlining(key) as whole:
            variables = model.init(key, method, args, kwargs)
        # Only tracers: a constant leaf must stay the object that the model made, not become an output of the jaxpr.
        return [leaf for leaf in jax.tree_util.tree_leaves(variables) if isinstance(leaf, jax.core.Tracer)]

    closed = jax.make_jaxpr(init)(key, dynamic)
    traced, structure = jax.tree_util.tree_flatten(variables)
    parts = tuple(COMPUTED if isinstance(leaf, jax.core.Tracer) else leaf for leaf in traced)
    return TracedInit(closed, _needed(closed.jaxpr), parts, structure, tuple(dynamic), whole)


_lock = threading.RLock()


@contextlib.contextmanager
def _no_inlining(key: jax.Array) -> Iterator[bool]:
    """During the block, jitted functions stay single equations in the trace of `key`. Yields whether JAX allows that.

    Eager JAX runs a jitted function as one program, but inlines some (most of `jax.numpy`) in a trace, where they would
    fall apart into ops and might give other bits.
    """
    staging = staging_of(key)
    if staging is None:
        yield False
        return
    rules, jit, thread = staging.rules, staging.jit, threading.get_ident()
    with _lock:
        rule = rules[jit]

        def stage(trace: PyTree, source: object, *args: Atom, **params: PyTree) -> PyTree:
            # A bool in older versions of JAX, an enum in newer ones.
            inline = params.get("inline")
            inlined = inline is True or getattr(inline, "name", "") == "JAX_EARLY"
            is_ours = trace is staging.trace and threading.get_ident() == thread
            if is_ours and inlined and not params["compiler_options_kvs"]:
                return trace.default_process_primitive(jit, args, params, source_info=source)
            return rule(trace, source, *args, **params)

        try:
            rules[jit] = stage
            yield True
        finally:
            rules[jit] = rule


def _needed(jaxpr: Jaxpr) -> tuple[Equation, ...]:
    """The equations on which a jaxpr's outputs depend, in order."""
    wanted, needed = _variables(jaxpr.outvars), []
    for equation in reversed(jaxpr.eqns):
        if wanted.intersection(equation.outvars):
            needed.append(equation)
            wanted |= _variables(equation.invars)
    return tuple(needed[::-1])


def _variables(atoms: Iterable[Atom]) -> set[Atom]:
    """The variables among the atoms of a jaxpr, without literals."""
    return {atom for atom in atoms if not hasattr(atom, "val")}


def _read_by(equations: tuple[Equation, ...]) -> set[Atom]:
    return _variables(atom for equation in equations for atom in equation.invars)


def _is_plain_array(leaf: Leaf) -> bool:
    """Whether a leaf is an array other than typed keys."""
    return hasattr(leaf, "dtype") and not is_key(leaf)


def is_array(leaf: Leaf) -> bool:
    """Whether a leaf is an array or a shape, and so an input of the traced initialisation."""
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype")


def _shape(leaf: Leaf) -> jax.ShapeDtypeStruct:
    return shape_of(leaf if is_array(leaf) else jax.eval_shape(lambda: leaf))


class Initialising:
    """An initialisation under way: traced at construction; `begin` starts compiling, `finish` returns the variables.

    Args:
      model, method, args, kwargs: the call, with the switches set for an init.
      draw: the draw of the `params` key.
      units: compiles and caches the single programs.
      taken: the draw's `params` key is already used; see `Draw.stream`.
    """

    def __init__(
        self, model: ModelWithInit, method: Path, args: Args, kwargs: Kwargs, *, draw: Draw, units: Units, taken: bool
    ) -> None:
        self._model = model
        self._call = method, args, kwargs
        self._draw, self._taken = draw, taken
        self._units = units
        self._unit_of: dict[int, Future | None] = {}
        """Index in `needed` → the future of its unit; None for an equation that is evaluated by JAX itself."""
        self._traced: TracedInit | None = None
        self._in_units: TracedInit | None = None
        """The trace if its equations may be run one by one, else None: `module.init` runs."""
        try:
            self._traced = trace_init(model, shape_of_key(draw.impl), *self._call)
        except Exception:  # `module.init` raises it again, or works with values where a trace cannot
            return
        if can_run(self._traced):
            self._in_units = self._traced

    @property
    def expected(self) -> Variables | None:
        """The variables, as shapes where they are to be computed; None where only running `module.init` can tell."""
        return None if self._in_units is None else self._in_units.variables

    def begin(self, *, rest: bool = False) -> None:
        """Starts to compile, on other threads, the units that are jitted functions: these take longest.

        Args:
          rest: then also the other units, single ops.
        """
        if rest:
            self.begin()  # the long compilations first
        for i, equation in enumerate(() if self._in_units is None else self._in_units.needed):
            if i not in self._unit_of and ("jaxpr" in equation.params or (rest and not _folds_a_constant(equation))):
                self._unit_of[i] = self._units.of_equation(equation)

    def finish(self) -> tuple[Updates, InitRecord]:
        """Computes the variables, waits for the device, and returns them with the record of how they were made."""
        self.begin(rest=True)
        key = self._draw.stream("params", taken=self._taken)
        traced = self._in_units
        variables = self._model.init(key, *self._call) if traced is None else self._run(traced, key)
        jax.block_until_ready(variables)
        return variables, record(self._traced, key, *self._call)

    def _run(self, traced: TracedInit, key: jax.Array) -> Updates:
        """Evaluates the equations in order. An intermediate value is dropped after its last use, as eager code does."""
        jaxpr = traced.closed.jaxpr
        last = {var: i for i, equation in enumerate(traced.needed) for var in _variables(equation.invars)}
        last.update(dict.fromkeys(_variables(jaxpr.outvars), len(traced.needed)))
        values: dict[Atom, Leaf] = dict(zip(jaxpr.constvars, traced.closed.consts, strict=True))
        values.update(zip(jaxpr.invars, (key, *traced.inputs), strict=True))

        def read(atom: Atom) -> Leaf:
            # A literal's value is a Python number, which has the wrong dtype by itself.
            return np.asarray(atom.val, atom.aval.dtype) if hasattr(atom, "val") else values[atom]

        for i, equation in enumerate(traced.needed):
            results = self._evaluate(i, equation, list(map(read, equation.invars)))
            values.update(zip(equation.outvars, results, strict=True))
            for var in _variables([*equation.invars, *equation.outvars]):
                if last.get(var, -1) <= i:
                    values.pop(var, None)
        variables: Updates = traced.filled(_as_array(read(atom), weak=atom.aval.weak_type) for atom in jaxpr.outvars)
        return variables

    def _evaluate(self, i: int, equation: Equation, arguments: list[Leaf]) -> list[Leaf]:
        """The outputs of equation `i`: by its unit, on the host, or by JAX itself."""
        if i not in self._unit_of:  # `_folds_a_constant`: threefry on the host
            key, constant = arguments
            return [as_key(threefry(data_of(key), (int(constant),))[0], THREEFRY)]
        unit = self._unit_of[i]
        if unit is None:
            results: PyTree = equation.primitive.bind(*arguments, **equation.params)
        else:
            results = wait_for(unit).executable(*arguments)
        return list(results) if equation.primitive.multiple_results else [results]


def _as_array(value: Leaf, *, weak: bool) -> Leaf:
    """A leaf as `module.init` returns it: a literal, still a NumPy array here, becomes a JAX array."""
    if not isinstance(value, np.ndarray):
        return value
    return weakly_typed(value) if weak else jax.device_put(value)


def _folds_a_constant(equation: Equation) -> bool:
    """Whether an equation folds a constant into a key, as `make_rng` does with a path: the host can do that."""
    if equation.primitive.name != "random_fold_in":
        return False
    key, constant = equation.invars
    is_key_of_host = key.aval.shape == () and str(key.aval.dtype) == "key<fry>" and is_on_host(THREEFRY)
    return is_key_of_host and hasattr(constant, "val") and constant.aval.dtype == np.uint32


def can_run(traced: TracedInit) -> bool:
    """Whether evaluating the equations one by one gives the bits of `module.init`."""
    # With these settings or in a mesh eager JAX runs in a different way.
    special = ("jax_debug_nans", "jax_debug_infs", "jax_disable_jit", "jax_check_tracer_leaks")
    is_special = any(getattr(jax.config, name, False) for name in special) or is_in_mesh()
    if is_special or not traced.whole or traced.closed.effects:
        return False
    read = _read_by(traced.needed)
    inputs = zip(traced.closed.jaxpr.invars[1:], traced.inputs, strict=True)
    if any(var in read and getattr(leaf, "committed", False) for var, leaf in inputs):
        return False  # committed arguments decide on which devices the variables are
    return all(map(_same_in_a_trace, traced.needed))


_OTHERWISE = ("closed_call", "sharding_constraint", "run_state", "remat", "checkpoint")
"""Further primitives that eager JAX does not run as one program."""


def _same_in_a_trace(equation: Equation) -> bool:
    """Whether eager JAX, too, runs the equation as one program; functions in custom_jvp run op by op there."""
    name, primitive = equation.primitive.name, equation.primitive
    if primitive.call_primitive or getattr(primitive, "map_primitive", False) or name.startswith("custom_"):
        return False
    return "callback" not in name and name not in _OTHERWISE


class InitRecord(Struct, frozen=True):
    """How a model's variables were made: enough to trace the init of an edited model for the same call and compare.

    `args` and `kwargs` have shapes in place of arrays. `traced` is None where the initialisation cannot be traced.
    `method` is a function for variables that a loss has made, see `AnyModel.forward`.
    """

    key: Key
    method: Path | Function
    args: Args
    kwargs: Kwargs
    traced: TracedInit | None

    @property
    def shapes(self) -> PyTree:
        """The variables as shapes; None where the initialisation cannot be traced."""
        return None if self.traced is None else self.traced.shapes

    @property
    def program(self) -> str | None:
        """A digest of what the variables depend on, without the forward pass; None where init cannot be traced."""
        return None if self.traced is None else self.traced.digest


def initialised(model: ModelWithInit, key: Key, method: Path | Function, args: Args, kwargs: Kwargs) -> InitRecord:
    """The record that an init of `model` would have, by an abstract trace; `args` and `kwargs` may hold shapes."""
    traced: TracedInit | None = None
    with contextlib.suppress(jax.errors.JAXTypeError):  # the init looks at values
        traced = trace_init(model, key, method, args, kwargs)
    return record(traced, key, method, args, kwargs)


def initialised_in_eval(
    model: ModelWithInit, key: Key, method: Path | Function, args: Args, kwargs: Kwargs
) -> InitRecord:
    """`initialised` by a call that the method does not take: with its switches, which mean evaluation where not given."""
    from flax import linen

    with linen.intercept_methods(_with_switches):
        return initialised(model, key, method, args, kwargs)


def _with_switches(run: Function, args: Args, kwargs: Kwargs, context: Any) -> object:
    scope = context.module.scope
    if scope is None or scope.path:  # a submodule, whose call is the model's own
        return run(*args, **kwargs)
    parameters = inspect.signature(context.orig_method).parameters
    given = {name: value for name, value in kwargs.items() if name in parameters or name not in WHEN_TRAINING}
    for name, parameter in [*parameters.items()][len(args) :]:
        if name in WHEN_TRAINING and parameter.default is parameter.empty:
            given.setdefault(name, value_of(name, train=False))
    return run(*args, **given)


def record(traced: TracedInit | None, key: Key, method: Path | Function, args: Args, kwargs: Kwargs) -> InitRecord:
    """The record of an init that was traced as `traced`; None where it cannot be traced."""
    if traced is not None:
        traced = replace(traced, inputs=())  # the record must not keep the user's arrays alive
        if traced.closed.consts or any(map(is_array, traced.leaves)):
            _ = traced.digest  # cached now: the arrays in it may be deleted or changed in place later
    return InitRecord(key, method, _abstract(args), _abstract(kwargs), traced)


def _abstract(tree: PyTree) -> PyTree:
    return jax.tree_util.tree_map(lambda leaf: _shape(leaf) if is_array(leaf) else leaf, tree)


def merged(old: Variables, new: Variables) -> tuple[Updates, Updates]:
    """(`old` completed by `new`, the part of `new` that was added), for nested mappings; `old` is never overwritten."""
    both, added = dict(old), {}
    for name, item in new.items():
        if name not in old:
            both[name] = added[name] = item
        elif isinstance(item, Mapping) and isinstance(old[name], Mapping):
            both[name], inside = merged(old[name], item)
            if inside:
                added[name] = inside
    return both, added


def made_of(variables: Variables, *, added: bool = False) -> InitStats:
    """Counts the variables that a run made; `added`: they complete existing ones."""
    parameters, size = count_parameters(variables)
    return InitStats(parameters, size, tuple(variables), added)
