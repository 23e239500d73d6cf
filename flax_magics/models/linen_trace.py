"""Watches a linen model while it is traced: streams asked for, collections written, layers passed, mapped axes missed."""

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

from ..base.types import PyTree
from .base import CallTrace, KeyUse, Needs, replaced
from .calls import Args, Function, Kwargs
from .switch import mask_of

_UNBOUND = re.compile(r"unbound axis name:? '?(\w+)")


def unbound_axis(error: BaseException) -> str | None:
    """The axis that JAX misses, None for any other error."""
    match = _UNBOUND.search(str(error)) if isinstance(error, (NameError, KeyError)) else None
    return match[1] if match else None


def bound(function: Callable[[], PyTree], axes: list[str]) -> PyTree:
    """The result of `function()`, run where each of `axes` is there with size 1."""
    if not axes:
        return function()
    *others, last = axes
    mapped = jax.vmap(lambda: bound(function, others), axis_name=last, axis_size=1)()
    return jax.tree_util.tree_map(lambda leaf: leaf[0], mapped)


def inside(axes: Iterable[str], code: str) -> str:
    """The run by hand as a person binds the axes: `jax.vmap(lambda: …, axis_name='batch', axis_size=1)()`."""
    for name in sorted(axes):
        code = f"jax.vmap(lambda: {code}, axis_name='{name}', axis_size=1)()"
    return code


_traces = itertools.count(1)


class Recorder:
    """Fills a CallTrace. `incomplete` tells that the trace must be done again with all that the record asks for.

    Args:
      keys: stream → the key that the model is given of it.
    """

    def __init__(self, ask: Needs, record: CallTrace, keys: Mapping[str, Any], root_impl: str) -> None:
        self.ask = ask
        self.record = record
        self.keys = keys
        self.root_impl = root_impl
        self.trace = next(_traces)
        self.incomplete = False
        self.asking = False
        self.forking = False
        self.drawing: tuple[tuple[int, ...], float] | None = None

    def _takes(self, name: str, scope: Scope) -> None:
        path = tuple(scope.path)
        self.record.asked.setdefault(name, []).append(path)
        lazy = scope.rngs.get(name)
        # A lifted transform hands on a key of its own: one of many, a forked one, or a tracer of its inside.
        inside = lazy is not None and lazy.rng is not self.keys.get(name)
        source = (*(lazy.suffix if lazy is not None else path), scope.rng_counters.get(name, 0))
        self.record.takes.append(KeyUse(name, path, source, self.drawing, inside))

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Inside the block, calls of the model on this thread fill the record."""
        with (
            replaced(
                (Scope, "make_rng", self._make_rng),
                (Scope, "has_rng", self._has_rng),
                (Scope, "put_variable", self._put_variable),
                (nn.Module, "sow", self._sow),
                # `nn.jit` traces what it wraps once more, and its forking of streams counts as nobody's.
                (transforms, "fork_rngs", self._fork_rngs),
                (transforms._HashableProxy, "from_module", self._of_this_trace),
            ),
            nn.intercept_methods(self._layers),
        ):
            yield

    def _make_rng(self, make_rng: Function, scope: Scope, name: str = "params") -> PyTree:
        if not self.forking:
            self._takes(name, scope)
        # A stream that was given, and that a lifted transform keeps from its inside, is Flax's to answer.
        if self.forking or name in scope.rngs or name in self.ask.streams:
            self.asking = True  # it calls `has_rng` itself: that is no question of the model's
            try:
                return make_rng(scope, name)
            finally:
                self.asking = False
        self.incomplete = True
        return jax.random.key(0, impl=self.root_impl)

    def _has_rng(self, has_rng: Callable[..., bool], scope: Scope, name: str) -> bool:
        if not self.asking:
            self.record.queried.add(name)
        return has_rng(scope, name)

    def _put_variable(self, put_variable: Function, scope: Scope, col: str, name: str, value: object) -> None:
        self.record.written.add(col)
        if col not in self.ask.mutable and scope.has_variable(col, name):
            self.incomplete = True
        else:
            put_variable(scope, col, name, value)

    def _sow(self, sow: Function, module: nn.Module, col: str, *args: PyTree, **kwargs: PyTree) -> PyTree:
        self.record.sown.add(col)
        self.record.written.add(col)
        self.incomplete |= col not in self.ask.mutable
        return sow(module, col, *args, **kwargs)

    @contextlib.contextmanager
    def _fork_rngs(self, fork_rngs: Callable[..., AbstractContextManager[None]], module: nn.Module) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            self.forking = True
            try:
                stack.enter_context(fork_rngs(module))
            finally:
                self.forking = False
            yield

    def _of_this_trace(self, from_module: Function, cls: Function, module: nn.Module) -> object:
        proxy = from_module(cls, module)
        return cls(proxy.module_ref, hash((proxy.hash_key, self.trace)))

    def _layers(self, call: Function, args: Args, kwargs: Kwargs, context: Any) -> PyTree:
        module = context.module
        if context.method_name == "__call__" and module.scope is not None:
            if isinstance(module, nn.Dropout) and module.rate != 0.0:
                self._layer("dropout", context, args, kwargs)
            elif isinstance(module, nn.BatchNorm):
                self._layer("norm", context, args, kwargs)
        if type(module) is not nn.Dropout:
            return self._noted(call, args, kwargs, context)
        self.drawing = mask_of(module, args, kwargs)
        try:
            return self._noted(call, args, kwargs, context)
        finally:
            self.drawing = None

    def _noted(self, call: Function, args: Args, kwargs: Kwargs, context: Any) -> PyTree:
        module, name, calls = context.module, context.method_name, self.record.calls
        # A transformed class has a method without a name around the module's own.
        if calls is None or module.scope is None or name == "setup" or not hasattr(type(module), name):
            return call(*args, **kwargs)
        return calls.note(call, args, kwargs, path=tuple(module.scope.path), cls=type(module).__name__, method=name)

    def _layer(self, kind: str, context: Any, args: Args, kwargs: Kwargs) -> None:
        try:
            arguments = inspect.signature(context.orig_method).bind(*args, **kwargs).arguments
        except TypeError:  # the call itself raises it
            return
        around, parent = [], context.module.parent
        while isinstance(parent, nn.Module):
            around.append(parent)
            parent = parent.parent
        self.record.passed(kind, tuple(context.module.scope.path), context.module, around, arguments)


@contextlib.contextmanager
def sowing() -> Iterator[set[str]]:
    """Gives the set of collections that are sown in the block. An init runs as Flax runs it, and is only listened to."""
    sown: set[str] = set()

    def note(sow: Function, module: nn.Module, col: str, *args: PyTree, **kwargs: PyTree) -> PyTree:
        sown.add(col)
        return sow(module, col, *args, **kwargs)

    with replaced((nn.Module, "sow", note)):
        yield sown
