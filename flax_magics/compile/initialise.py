"""The initialisation of a linen model, faster than op by op and with the same bits.

By hand, `module.init` runs op by op, and every op of the forward pass is compiled and run with it. Here the same code is
traced by shapes. What the variables do not depend on is left out, and what is left runs as JAX's op-by-op execution would
run it, unit by unit (see `Units`): the bits are those of `module.init`. Where that could not be said (the model looks at
values, it has side effects or callbacks, its functions run differently in a trace) it is `module.init` that runs.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import threading
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from typing import TypeAlias

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
from ..models.calls import Args, Kwargs, Path
from ..rng.keys import THREEFRY, Draw, as_key, is_on_host, shape_of_key, threefry
from ..run import InitStats
from .compiler import Units, shape_of
from .jaxpr import Atom, Equation

Key: TypeAlias = jax.Array | jax.ShapeDtypeStruct

COMPUTED = object()
"""Stands for a leaf of the variables that has to be computed."""


class TracedInit(Struct, frozen=True, dict=True):
    """An initialisation as a jaxpr over the key and the arrays among the arguments.

    Attributes:
      closed: the jaxpr, its outputs the variables' leaves that it computes.
      needed: its equations that these depend on, in order.
      leaves: the variables' leaves, `COMPUTED` in place of each output.
      treedef: how the variables are put together.
      inputs: the arrays among the arguments.
      whole: JAX's own inlining was kept off: each equation is one program where code runs op by op.
    """

    closed: ClosedJaxpr
    needed: tuple[Equation, ...]
    leaves: tuple[Leaf, ...]
    treedef: PyTree
    inputs: tuple[Leaf, ...]
    whole: bool

    @property
    def variables(self) -> PyTree:
        """The variables as far as they are known before they are computed: shapes in place of what is not."""
        return self.filled(map(_shape, self.closed.out_avals))

    def filled(self, computed: Iterator[Leaf]) -> PyTree:
        """The variables, with `computed` in the places of those that the jaxpr gives."""
        leaves = [next(computed) if leaf is COMPUTED else leaf for leaf in self.leaves]
        return jax.tree_util.tree_unflatten(self.treedef, leaves)

    @property
    def shapes(self) -> PyTree:
        """The variables, shapes in place of arrays."""
        return jax.tree_util.tree_map(_shape, self.variables)

    @cached_property
    def digest(self) -> str:
        """A digest of what the variables depend on, the forward pass left out."""
        jaxpr = self.closed.jaxpr
        text = str(jaxpr.replace(eqns=list(self.needed)))
        text = re.sub(r"0x[0-9a-f]+", "", text)  # functions are printed with their address
        hasher = hashlib.sha256(text.encode())
        read = _read_by(self.needed) | _variables(jaxpr.outvars)
        constants = [value for var, value in zip(jaxpr.constvars, self.closed.consts, strict=True) if var in read]
        values = [*filter(_is_plain_array, constants), *(leaf for leaf in self.leaves if leaf is not COMPUTED)]
        for value in values:
            hasher.update(np.asarray(value).tobytes() if _is_plain_array(value) else repr(value).encode())
        return hasher.hexdigest()


def trace_init(model: ModelWithInit, key: Key, method: Path, args: Args, kwargs: Kwargs) -> TracedInit:
    """Traces the initialisation by shapes; nothing is computed. `key`, `args` and `kwargs` may hold arrays or shapes.

    What the model raises is passed on, and what JAX raises where it looks at values.
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
        return [leaf for leaf in jax.tree_util.tree_leaves(variables) if isinstance(leaf, jax.core.Tracer)]

    closed = jax.make_jaxpr(init)(key, dynamic)
    traced, structure = jax.tree_util.tree_flatten(variables)
    parts = tuple(COMPUTED if isinstance(leaf, jax.core.Tracer) else leaf for leaf in traced)
    return TracedInit(closed, _needed(closed.jaxpr), parts, structure, tuple(dynamic), whole)


_lock = threading.RLock()


@contextlib.contextmanager
def _no_inlining(key: jax.Array) -> Iterator[bool]:
    """In the trace of `key`, each function jitted by itself stays one equation. Yields whether this JAX can do that.

    JAX runs a jitted function as one program, and inlines some (most of `jax.numpy`) where they are traced.
    """
    staging = staging_of(key)
    if staging is None:
        yield False
        return
    rules, jit, thread = staging.rules, staging.jit, threading.get_ident()
    with _lock:
        rule = rules[jit]

        def stage(trace: PyTree, source: object, *args: Atom, **params: PyTree) -> PyTree:
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
    """The equations that a jaxpr's outputs depend on."""
    wanted, needed = _variables(jaxpr.outvars), []
    for equation in reversed(jaxpr.eqns):
        if wanted.intersection(equation.outvars):
            needed.append(equation)
            wanted |= _variables(equation.invars)
    return tuple(needed[::-1])


def _variables(atoms: Iterable[Atom]) -> set[Atom]:
    """The variables among atoms of a jaxpr: the others are literals."""
    return {atom for atom in atoms if not hasattr(atom, "val")}


def _read_by(equations: tuple[Equation, ...]) -> set[Atom]:
    return _variables(atom for equation in equations for atom in equation.invars)


def _is_plain_array(leaf: Leaf) -> bool:
    """Whether a leaf is an array of anything but keys."""
    return hasattr(leaf, "dtype") and not is_key(leaf)


def is_array(leaf: Leaf) -> bool:
    """Whether a leaf is an array or the shape of one: what an initialisation is traced over."""
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype")


def _shape(leaf: Leaf) -> jax.ShapeDtypeStruct:
    return shape_of(leaf if is_array(leaf) else jax.eval_shape(lambda: leaf))


class Initialising:
    """An initialisation under way: `begin` starts to compile what takes long, `finish` gives the variables.

    Args:
      model, method, args, kwargs: the call, made ready for an init.
      draw: what its `params` key is drawn from.
      taken: see `Draw.stream`.
    """

    def __init__(
        self, model: ModelWithInit, method: Path, args: Args, kwargs: Kwargs, *, draw: Draw, units: Units, taken: bool
    ) -> None:
        self._model = model
        self._call = method, args, kwargs
        self._draw, self._taken = draw, taken
        self._units = units
        self._unit_of: dict[int, Future | None] = {}
        """Number of an equation → its unit, once this is being compiled; None for one that runs as JAX runs it."""
        self._traced: TracedInit | None = None
        self._in_units: TracedInit | None = None
        """The trace, if it can be run unit by unit."""
        try:
            self._traced = trace_init(model, shape_of_key(draw.impl), *self._call)
        except Exception:  # `module.init` raises it, or does without a trace
            return
        if can_run(self._traced):
            self._in_units = self._traced

    @property
    def expected(self) -> Variables | None:
        """The variables, shapes in place of arrays that are to be computed; None where only running can tell."""
        return None if self._in_units is None else self._in_units.variables

    def begin(self, *, rest: bool = False) -> None:
        """Starts to compile the units that are functions, on other threads: they take as long as a small model.

        Args:
          rest: the other units, too: single ops, which take little.
        """
        if rest:
            self.begin()
        for i, equation in enumerate(() if self._in_units is None else self._in_units.needed):
            if i not in self._unit_of and ("jaxpr" in equation.params or (rest and not _folds_a_constant(equation))):
                self._unit_of[i] = self._units.of_equation(equation)

    def finish(self) -> tuple[Updates, InitRecord]:
        """The variables, once the device has them, and how they were made."""
        self.begin(rest=True)
        key = self._draw.stream("params", taken=self._taken)
        traced = self._in_units
        variables = self._model.init(key, *self._call) if traced is None else self._run(traced, key)
        jax.block_until_ready(variables)
        return variables, record(self._traced, key, *self._call)

    def _run(self, traced: TracedInit, key: jax.Array) -> Updates:
        """The variables, computed. What is not needed any more is let go of on the way."""
        jaxpr = traced.closed.jaxpr
        last = {var: i for i, equation in enumerate(traced.needed) for var in _variables(equation.invars)}
        last.update(dict.fromkeys(_variables(jaxpr.outvars), len(traced.needed)))
        values: dict[Atom, Leaf] = dict(zip(jaxpr.constvars, traced.closed.consts, strict=True))
        values.update(zip(jaxpr.invars, (key, *traced.inputs), strict=True))

        def read(atom: Atom) -> Leaf:
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
        if i not in self._unit_of:  # it folds a constant
            key, constant = arguments
            return [as_key(threefry(data_of(key), (int(constant),))[0], THREEFRY)]
        unit = self._unit_of[i]
        if unit is None:
            results: PyTree = equation.primitive.bind(*arguments, **equation.params)
        else:
            results = wait_for(unit).executable(*arguments)
        return list(results) if equation.primitive.multiple_results else [results]


def _as_array(value: Leaf, *, weak: bool) -> Leaf:
    """A leaf as `module.init` gives it: a literal of the program is none yet."""
    if not isinstance(value, np.ndarray):
        return value
    return weakly_typed(value) if weak else jax.device_put(value)


def _folds_a_constant(equation: Equation) -> bool:
    """Whether a module's name is folded into a key, as every `make_rng` does, which needs no program."""
    if equation.primitive.name != "random_fold_in":
        return False
    key, constant = equation.invars
    is_key_of_host = key.aval.shape == () and str(key.aval.dtype) == "key<fry>" and is_on_host(THREEFRY)
    return is_key_of_host and hasattr(constant, "val") and constant.aval.dtype == np.uint32


def can_run(traced: TracedInit) -> bool:
    """Whether its equations give what `module.init` gives."""
    # Set so, JAX runs op by op in its own way: looking for NaN, without jit, or over a mesh.
    special = ("jax_debug_nans", "jax_debug_infs", "jax_disable_jit", "jax_check_tracer_leaks")
    is_special = any(getattr(jax.config, name, False) for name in special) or is_in_mesh()
    if is_special or not traced.whole or traced.closed.effects:
        return False
    read = _read_by(traced.needed)
    inputs = zip(traced.closed.jaxpr.invars[1:], traced.inputs, strict=True)
    if any(var in read and getattr(leaf, "committed", False) for var, leaf in inputs):
        return False  # where the arguments are decides where the variables are
    return all(map(_same_in_a_trace, traced.needed))


_OTHERWISE = ("closed_call", "sharding_constraint", "run_state", "remat", "checkpoint")
"""Further primitives that JAX runs otherwise op by op than in a program."""


def _same_in_a_trace(equation: Equation) -> bool:
    """Whether op by op, too, JAX runs the equation as one program; Python functions it would run op by op in turn."""
    name, primitive = equation.primitive.name, equation.primitive
    if primitive.call_primitive or getattr(primitive, "map_primitive", False) or name.startswith("custom_"):
        return False
    return "callback" not in name and name not in _OTHERWISE


class InitRecord(Struct, frozen=True):
    """How a model's variables were made: enough to ask what a later version of the model would make of it.

    `args` and `kwargs` hold shapes in place of arrays. `traced` is the initialisation as a program, None where it cannot be
    traced.
    """

    key: Key
    method: Path
    args: Args
    kwargs: Kwargs
    traced: TracedInit | None

    @property
    def shapes(self) -> PyTree:
        """The variables, shapes in place of arrays; None where they cannot be told."""
        return None if self.traced is None else self.traced.shapes

    @property
    def program(self) -> str | None:
        """A digest of what the variables depend on, forward pass left out; None where that cannot be told."""
        return None if self.traced is None else self.traced.digest


def initialised(model: ModelWithInit, key: Key, method: Path, args: Args, kwargs: Kwargs) -> InitRecord:
    """Traces the initialisation by shapes; nothing is computed. `args`/`kwargs` may hold arrays or shapes."""
    traced: TracedInit | None = None
    with contextlib.suppress(jax.errors.JAXTypeError):  # initialisation looks at values
        traced = trace_init(model, key, method, args, kwargs)
    return record(traced, key, method, args, kwargs)


def record(traced: TracedInit | None, key: Key, method: Path, args: Args, kwargs: Kwargs) -> InitRecord:
    """The record of an init whose program is `traced`, None where it cannot be traced."""
    if traced is not None:
        traced = replace(traced, inputs=())  # they are the user's arrays
        if traced.closed.consts or any(map(is_array, traced.leaves)):
            _ = traced.digest  # of arrays as they are now: they may be let go of, or written into
    return InitRecord(key, method, _abstract(args), _abstract(kwargs), traced)


def _abstract(tree: PyTree) -> PyTree:
    return jax.tree_util.tree_map(lambda leaf: _shape(leaf) if is_array(leaf) else leaf, tree)


def merged(old: Variables, new: Variables) -> tuple[Updates, Updates]:
    """`(old and what only new has, what only new has)`: of nested mappings. What is in `old` is never replaced."""
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
    """How many parameters and bytes were made; `added`: to variables that were there."""
    parameters, size = count_parameters(variables)
    return InitStats(parameters, size, tuple(variables), added)
