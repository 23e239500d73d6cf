"""Watches a linen model while it is traced: streams asked for, collections written, layers passed, mapped axes missed."""

from __future__ import annotations

import contextlib
import inspect
import itertools
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
from flax import linen as nn
from flax.core.scope import Scope
from flax.linen import transforms

from .base import REPLACING, CallTrace, KeyUse, Needs
from .layers import layer_of, mask_of

_UNBOUND = re.compile(r"unbound axis name:? '?(\w+)")


def unbound_axis(error: BaseException) -> str | None:
    """The axis that JAX misses, None for any other error."""
    found = _UNBOUND.search(str(error)) if isinstance(error, (NameError, KeyError)) else None
    return found[1] if found else None


def bound(function: Callable[[], Any], axes: Iterable[str]) -> Any:
    """The result of `function()`, run where each of `axes` is there with size 1."""
    for name in axes:
        function = _bind(function, name)
    return function()


def _bind(function: Callable[[], Any], name: str) -> Callable[[], Any]:
    def run() -> Any:
        outputs = jax.vmap(function, axis_name=name, axis_size=1)()
        return jax.tree_util.tree_map(lambda leaf: leaf[0], outputs)

    return run


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
        self.incomplete = False
        self.asking = False
        self.forking = False
        self.drawing: tuple[tuple[int, ...], float] | None = None

    @contextlib.contextmanager
    def _inside(self) -> Iterator[None]:
        """Flax's `make_rng` calls `has_rng` itself: that is no question of the model's."""
        self.asking = True
        try:
            yield
        finally:
            self.asking = False

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
        """Replaces the four methods for the time of the block, for calls of this thread alone."""
        with REPLACING, self._watching():
            yield

    @contextlib.contextmanager
    def _watching(self) -> Iterator[None]:
        thread = threading.get_ident()
        make_rng, has_rng, put_variable, sow = Scope.make_rng, Scope.has_rng, Scope.put_variable, nn.Module.sow

        def make(scope: Scope, name: str = "params") -> Any:
            if threading.get_ident() != thread:
                return make_rng(scope, name)
            if self.forking:
                with self._inside():
                    return make_rng(scope, name)
            self._takes(name, scope)
            # A stream that was given, and that a lifted transform keeps from its inside, is Flax's to answer.
            if name in scope.rngs or name in self.ask.streams:
                with self._inside():
                    return make_rng(scope, name)
            self.incomplete = True
            return jax.random.key(0, impl=self.root_impl)

        def has(scope: Scope, name: str) -> bool:
            if threading.get_ident() == thread and not self.asking:
                self.record.queried.add(name)
            return has_rng(scope, name)

        def put(scope: Scope, col: str, name: str, value: Any) -> None:
            if threading.get_ident() == thread:
                self.record.written.add(col)
                if col not in self.ask.mutable and scope.has_variable(col, name):
                    self.incomplete = True
                    return
            put_variable(scope, col, name, value)

        def sow_(module: nn.Module, col: str, name: str, *args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() == thread:
                self.record.sown.add(col)
                self.record.written.add(col)
                self.incomplete |= col not in self.ask.mutable
            return sow(module, col, name, *args, **kwargs)

        try:  # an interrupt may come at any moment
            _replace(Scope, make_rng=make, has_rng=has, put_variable=put)
            _replace(nn.Module, sow=sow_)
            with self._jitted_anew(thread), nn.intercept_methods(self._layers):
                yield
        finally:
            _replace(Scope, make_rng=make_rng, has_rng=has_rng, put_variable=put_variable)
            _replace(nn.Module, sow=sow)

    @contextlib.contextmanager
    def _jitted_anew(self, thread: int) -> Iterator[None]:
        """Inside the block, `nn.jit` traces what it wraps once more, and its forking of streams counts as nobody's."""
        trace = next(_traces)
        fork_rngs, proxy = transforms.fork_rngs, transforms._HashableProxy
        from_module = proxy.__dict__["from_module"]

        @contextlib.contextmanager
        def fork(module: nn.Module) -> Iterator[None]:
            with contextlib.ExitStack() as stack:
                self.forking = threading.get_ident() == thread
                try:
                    stack.enter_context(fork_rngs(module))
                finally:
                    self.forking = False
                yield

        def of_this_trace(cls: Any, module: nn.Module) -> Any:
            made = from_module.__get__(None, cls)(module)
            if threading.get_ident() != thread:
                return made
            return cls(made.module_ref, hash((made.hash_key, trace)))

        try:
            _replace(transforms, fork_rngs=fork)
            _replace(proxy, from_module=classmethod(of_this_trace))
            yield
        finally:
            _replace(transforms, fork_rngs=fork_rngs)
            _replace(proxy, from_module=from_module)

    def _layers(self, call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        module = context.module
        if context.method_name == "__call__" and module.scope is not None:
            if isinstance(module, nn.Dropout) and module.rate != 0.0:
                self._layer(module, "dropout", "deterministic", context, args, kwargs)
            elif isinstance(module, nn.BatchNorm):
                self._layer(module, "norm", "use_running_average", context, args, kwargs)
        if type(module) is nn.Dropout:
            self.drawing = mask_of(module, args, kwargs)
            try:
                return self._noted(call, args, kwargs, context)
            finally:
                self.drawing = None
        return self._noted(call, args, kwargs, context)

    def _noted(self, call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        module, name, calls = context.module, context.method_name, self.record.calls
        # A transformed class has a method without a name around the module's own.
        if calls is None or module.scope is None or name == "setup" or not hasattr(type(module), name):
            return call(*args, **kwargs)
        return calls.note(tuple(module.scope.path), type(module).__name__, name, call, args, kwargs)

    def _layer(self, module: Any, kind: str, switch: str, context: Any, args: Any, kwargs: Any) -> None:
        value = getattr(module, switch)
        try:
            bound = inspect.signature(context.orig_method).bind(*args, **kwargs)
        except TypeError:
            return
        in_call = bound.arguments.get(switch) is not None
        if in_call:
            value = bound.arguments[switch]
        if isinstance(value, bool):
            around, parent = [], module.parent
            while isinstance(parent, nn.Module):
                around.append(parent)
                parent = parent.parent
            layer = layer_of(kind, tuple(module.scope.path), module, around, (switch, value, in_call))
            if layer not in self.record.layers:
                self.record.layers.append(layer)


def _replace(owner: Any, **methods: Any) -> None:
    for name, method in methods.items():
        setattr(owner, name, method)


@contextlib.contextmanager
def sowing() -> Iterator[set[str]]:
    """Gives the set of collections that are sown in the block. An init runs as Flax runs it, and is only listened to."""
    thread = threading.get_ident()
    sown: set[str] = set()
    with REPLACING:
        sow = nn.Module.sow

        def sow_(module: nn.Module, col: str, name: str, *args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() == thread:
                sown.add(col)
            return sow(module, col, name, *args, **kwargs)

        try:
            _replace(nn.Module, sow=sow_)
            yield sown
        finally:
            _replace(nn.Module, sow=sow)
