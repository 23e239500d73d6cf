"""What the keys of linen's streams are made of inside lifted transforms: `nn.scan`, `nn.vmap`, `nn.jit`, `nn.remat`.

A scope's key is the stream's, with the scope's path and a count folded in. A transform puts another in its place: one that
was split along its axis, one that was forked. For the time of a trace, two names of Flax's own module are replaced by ones
that note this and go on as before, for calls of this thread alone.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
from flax.core import lift
from flax.core.scope import LazyRng, Scope

from .altered import Altered

Source = tuple[Any, ...]
"""What was done to the stream's key, in order: equal ones give equal keys."""
SPLIT = "split"
LOOP = "loop"


@dataclass(frozen=True)
class Made:
    """How a key was made of its stream's: `axes` are the sizes that it was split into, outermost first."""

    source: Source = ()
    axes: tuple[int, ...] = ()


@dataclass
class _Lift:
    """One call of a lifted transform: into how many keys it splits its streams, or whether it folds in a loop's turn."""

    size: int | None = None
    loop: bool = False

    def through(self, made: Made) -> Made:
        """A key on the inside of one that was handed in."""
        if self.size is not None:
            return Made((*made.source, SPLIT), (*made.axes, self.size))
        return Made((*made.source, LOOP), made.axes) if self.loop else made


class Lifts:
    """Knows the keys of one trace. One that it does not know is the stream's own."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[Any, Made]] = {}
        """id of a key → the key, so that its id stays its own, and how it was made."""
        self._latest = _Lift()

    def of(self, scope: Scope, name: str) -> Made:
        """How the next key is made that `scope` gives of its stream `name`."""
        lazy = scope.rngs.get(name, scope.rngs.get("params"))
        if lazy is None:
            return Made((tuple(scope.path), scope.rng_counters.get(name, 0)))
        made = self._made(lazy.rng)
        return Made((*made.source, (*lazy.suffix, scope.rng_counters.get(name, 0))), made.axes)

    def forked(self, key: Any, made: Made) -> None:
        """`key`, made so, is to be a stream's own from here on."""
        self._known[id(key)] = key, made

    def _made(self, key: Any) -> Made:
        known = self._known.get(id(key))
        return Made() if known is None else known[1]

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Replaces the names for the time of the block."""
        thread = threading.get_ident()
        pack, random = lift._partial_pack, lift.random

        def pack_(*args: Any, **kwargs: Any) -> Any:
            packed = pack(*args, **kwargs)
            if threading.get_ident() != thread:
                return packed
            scope_fn, repack_fn, variables, rngs, publish_fn = packed
            one = self._latest = _Lift()

            def scope_fn_(variables_: Any, rngs_: Any, *args: Any, **kwargs: Any) -> Any:
                for outer, inner in _pairs(rngs, rngs_):
                    if inner is not outer and id(inner) not in self._known:
                        self._known[id(inner)] = inner, one.through(self._made(outer))
                return scope_fn(variables_, rngs_, *args, **kwargs)

            return scope_fn_, repack_fn, variables, rngs, publish_fn

        def split(key: Any, num: int = 2) -> Any:
            if threading.get_ident() == thread:
                self._latest.size = num
            return jax.random.split(key, num)

        def fold_in(key: Any, data: Any) -> Any:
            if threading.get_ident() == thread:
                self._latest.loop = True
            return jax.random.fold_in(key, data)

        altered: Any = Altered(random, split=split, fold_in=fold_in)
        try:
            lift._partial_pack, lift.random = pack_, altered
            yield
        finally:
            lift._partial_pack, lift.random = pack, random
            self._known.clear()


def _pairs(outer: Iterable[Any], inner: Iterable[Any]) -> Iterator[tuple[Any, Any]]:
    """Keys that were handed into a transform, and those in their places on its inside.

    Args:
      outer, inner: by group and by scope, stream → LazyRng.
    """
    for groups in zip(outer, inner, strict=False):
        for one, other in zip(*groups, strict=False):
            if isinstance(one, Mapping) and isinstance(other, Mapping):
                for name in other:
                    if isinstance(one.get(name), LazyRng) and isinstance(other[name], LazyRng):
                        yield one[name].rng, other[name].rng
