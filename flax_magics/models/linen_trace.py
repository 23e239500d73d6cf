"""Observation of a linen model in a trace: streams, collections written, layers called, unbound mapped axes."""

from __future__ import annotations

import contextlib
import inspect
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

import jax
from flax import linen as nn
from flax.core.scope import Scope
from flax.linen import transforms
from msgspec import Struct

from ..base.types import PyTree
from .base import CallTrace, KeyUse, Needs, replaced
from .calls import Args, Function, Kwargs, mask_of

# JAX has no exception type for it: versions raise NameError or KeyError, and write it with or without colon and quotes.
_UNBOUND = r"unbound axis name:? '?(\w+)"


def unbound_axis(error: BaseException) -> str | None:
    """The mapped axis that is unbound according to JAX's `error`, None for any other error."""
    match = re.search(_UNBOUND, str(error)) if isinstance(error, (NameError, KeyError)) else None
    return match[1] if match else None


def bound(function: Callable[[], PyTree], axes: list[str]) -> PyTree:
    """Calls `function()` with each of `axes` bound as a mapped axis of size 1, as on one device; returns its result."""
    if not axes:
        return function()
    *others, last = axes
    mapped = jax.vmap(lambda: bound(function, others), axis_name=last, axis_size=1)()
    return jax.tree_util.tree_map(lambda leaf: leaf[0], mapped)


def inside(axes: Iterable[str], code: str) -> str:
    """The text of a run with the axes bound: `jax.vmap(lambda: …, axis_name='batch', axis_size=1)()`."""
    for name in sorted(axes):
        code = f"jax.vmap(lambda: {code}, axis_name='{name}', axis_size=1)()"
    return code


_traces = itertools.count(1)


class Recorder:
    """Fills a CallTrace during one trace of a linen model.

    `incomplete` becomes true when the model asks for something that it was not given: the trace must then be repeated
    with everything that `record` lists.

    Args:
      ask: what the model is given.
      record: the CallTrace to fill.
      keys: stream → the key that the model is given.
      root_impl: PRNG implementation of the dummy keys for streams that are missing.
    """

    def __init__(self, ask: Needs, record: CallTrace, keys: Mapping[str, Any], root_impl: str) -> None:
        self.ask = ask
        self.record = record
        self.keys = keys
        self.root_impl = root_impl
        self.trace = next(_traces)
        self.incomplete = False
        # True while Flax itself, and not the model, calls `has_rng` (asking) or `make_rng` (forking).
        self.asking = False
        self.forking = False
        self.drawing: tuple[tuple[int, ...], float] | None = None

    def _takes(self, name: str, scope: Scope) -> None:
        """Records that the model took a key of stream `name`, and of what the key is made."""
        path = tuple(scope.path)
        self.record.asked.setdefault(name, []).append(path)
        lazy = scope.rngs.get(name)
        # Inside a lifted transform the scope's key is another object: a split, a forked key, or an inner tracer.
        inside = lazy is not None and lazy.rng is not self.keys.get(name)
        source = (*(lazy.suffix if lazy is not None else path), scope.rng_counters.get(name, 0))
        self.record.takes.append(KeyUse(name, path, source, self.drawing, inside))

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """During the block, calls of linen's methods on this thread fill the record."""
        with (
            replaced(
                (Scope, "make_rng", self._make_rng),
                (Scope, "has_rng", self._has_rng),
                (Scope, "put_variable", self._put_variable),
                (nn.Module, "sow", self._sow),
                # `nn.jit` forks every stream before it traces, which does not mean that the model uses them. And it
                # caches traces by a hash of the module: made new for this trace, or a cached one would hide streams.
                (transforms, "fork_rngs", self._fork_rngs),
                (transforms._HashableProxy, "from_module", self._of_this_trace),
            ),
            nn.intercept_methods(self._layers),
        ):
            yield

    def _make_rng(self, make_rng: Function, scope: Scope, name: str = "params") -> PyTree:
        """Replaces `Scope.make_rng`: records the stream, and returns a stand-in key where it was not given."""
        if not self.forking:
            self._takes(name, scope)
        # A stream that was given but that a lifted transform withholds from its inside: Flax raises its own error.
        if self.forking or name in scope.rngs or name in self.ask.streams:
            self.asking = True  # Flax's `make_rng` calls `has_rng`
            try:
                return make_rng(scope, name)
            finally:
                self.asking = False
        self.incomplete = True
        # A stand-in lets the trace go on to find everything that is missing; its results are thrown away.
        return jax.random.key(0, impl=self.root_impl)

    def _has_rng(self, has_rng: Callable[..., bool], scope: Scope, name: str) -> bool:
        """Replaces `Scope.has_rng`: records questions of the model, not those of Flax itself."""
        if not self.asking:
            self.record.queried.add(name)
        return has_rng(scope, name)

    def _put_variable(self, put_variable: Function, scope: Scope, col: str, name: str, value: object) -> None:
        """Replaces `Scope.put_variable`: records the collection; an immutable one makes the trace incomplete."""
        self.record.written.add(col)
        if col not in self.ask.mutable and scope.has_variable(col, name):
            self.incomplete = True  # and not written, which Flax would refuse
        else:
            put_variable(scope, col, name, value)

    def _sow(self, sow: Function, module: nn.Module, col: str, *args: PyTree, **kwargs: PyTree) -> PyTree:
        """Replaces `nn.Module.sow`: records the collection as sown and written."""
        self.record.sown.add(col)
        self.record.written.add(col)
        self.incomplete |= col not in self.ask.mutable
        return sow(module, col, *args, **kwargs)

    @contextlib.contextmanager
    def _fork_rngs(self, fork_rngs: Callable[..., AbstractContextManager[None]], module: nn.Module) -> Iterator[None]:
        """Replaces `transforms.fork_rngs`: keys that it takes while it forks do not count as used."""
        with contextlib.ExitStack() as stack:  # only entering Flax's block forks; its body is the model's again
            self.forking = True
            try:
                stack.enter_context(fork_rngs(module))
            finally:
                self.forking = False
            yield

    def _of_this_trace(self, from_module: Function, cls: Function, module: nn.Module) -> object:
        """Replaces `_HashableProxy.from_module`: adds this trace to the hash by which `nn.jit` caches its traces."""
        proxy = from_module(cls, module)
        return cls(proxy.module_ref, hash((proxy.hash_key, self.trace)))

    def _layers(self, call: Function, args: Args, kwargs: Kwargs, context: Any) -> PyTree:
        """Interceptor of every method: records dropout and normalization layers, and calls for a summary."""
        module = context.module
        if context.method_name == "__call__" and module.scope is not None:
            if isinstance(module, nn.Dropout) and module.rate != 0.0:
                self._layer("dropout", context, args, kwargs)
            elif isinstance(module, nn.BatchNorm):
                self._layer("norm", context, args, kwargs)
        if type(module) is not nn.Dropout:  # a subclass may draw otherwise
            return self._noted(call, args, kwargs, context)
        self.drawing = mask_of(module, args, kwargs)
        try:
            return self._noted(call, args, kwargs, context)
        finally:
            self.drawing = None

    def _noted(self, call: Function, args: Args, kwargs: Kwargs, context: Any) -> PyTree:
        """Makes the call, recorded in `CallTrace.calls` where these are wanted."""
        module, name, calls = context.module, context.method_name, self.record.calls
        # Transformed classes (`nn.jit(Net)`) call a wrapper that is no method of the class around the module's own.
        if calls is None or module.scope is None or name == "setup" or not hasattr(type(module), name):
            return call(*args, **kwargs)
        return calls.note(call, args, kwargs, path=tuple(module.scope.path), cls=type(module).__name__, method=name)

    def _layer(self, kind: str, context: Any, args: Args, kwargs: Kwargs) -> None:
        """Records one dropout or normalization layer with the modules around it."""
        try:
            arguments = inspect.signature(context.orig_method).bind(*args, **kwargs).arguments
        except TypeError:  # the call itself raises it
            return
        around, parent = [], context.module.parent
        while isinstance(parent, nn.Module):
            around.append(parent)
            parent = parent.parent
        self.record.passed(kind, tuple(context.module.scope.path), context.module, around, arguments)


class InitTrace(Struct):
    """What inits of a model were seen to do.

    Attributes:
      asked: streams that they asked for.
      dropout: streams of the dropout layers that they called, on or off.
      averages: collections in which the batch norms that they called keep their averages.
    """

    asked: set[str] = set()
    dropout: set[str] = set()
    averages: set[str] = set()

    def likely_needs(self, mode: str) -> Needs:
        """What a run in this mode probably asks for."""
        if mode == "train":
            return Needs(frozenset(self.asked | self.dropout), frozenset(self.averages))
        return Needs(frozenset(self.asked - self.dropout if mode == "eval" else self.asked))

    @contextlib.contextmanager
    def watching(self) -> Iterator[set[str]]:
        """Notes what an init in the block does, and yields the set of collections that it sows. It does as ever."""
        sown: set[str] = set()

        def sow(sow: Function, module: nn.Module, col: str, *args: PyTree, **kwargs: PyTree) -> PyTree:
            sown.add(col)
            return sow(module, col, *args, **kwargs)

        def make_rng(make_rng: Function, scope: Scope, name: str = "params") -> PyTree:
            self.asked |= {name} - {"params"}
            return make_rng(scope, name)

        def drop(call: Function, module: nn.Dropout, *args: PyTree, **kwargs: PyTree) -> PyTree:
            self.dropout.add(module.rng_collection)
            return call(module, *args, **kwargs)

        def normalise(call: Function, module: nn.BatchNorm, *args: PyTree, **kwargs: PyTree) -> PyTree:
            self.averages.add("batch_stats")
            return call(module, *args, **kwargs)

        layers = (nn.Dropout, "__call__", drop), (nn.BatchNorm, "__call__", normalise)
        with replaced((nn.Module, "sow", sow), (Scope, "make_rng", make_rng), *layers):
            yield sown
