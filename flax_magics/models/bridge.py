"""Watches NNX modules inside linen ones (`nnx.bridge.to_linen`) while a linen model is traced or initialised.

`ToLinen` builds its NNX module anew in every call, with the streams that linen was given. A stream that is missing
falls back silently on a `default` of seed 0, and writes to an immutable collection are dropped silently. Here both
count as asking for the stream or the collection, as they do in linen.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import jax
from flax import nnx
from flax.linen import module as linen_module
from flax.nnx import variablelib
from flax.nnx.bridge import wrappers

from ..base.types import PyTree
from .base import replaced
from .calls import Function
from .nnx_graph import is_sown, walk

if TYPE_CHECKING:
    from .linen_trace import Recorder


def _current() -> Any:
    """The `ToLinen` module whose call is running, None outside of one."""
    stack = linen_module._context.module_stack
    return stack[-1] if stack and isinstance(stack[-1], wrappers.ToLinen) else None


@contextlib.contextmanager
def watching(recorder: Recorder) -> Iterator[None]:
    """During the block, `recorder` learns of streams that `ToLinen` modules look up and of collections they write."""

    def streams_of(original: Function, *args: PyTree, **kwargs: PyTree) -> PyTree:
        # The bridge takes a key of every stream to build its Rngs, which does not mean that the module uses them.
        recorder.forking, was_forking = True, recorder.forking
        try:
            return original(*args, **kwargs)
        finally:
            recorder.forking = was_forking

    def look_up(original: Function, rngs: nnx.Rngs, name: str, error: object) -> PyTree:
        outer = _current()
        # `params` is only used while the module is built anew, and those values are replaced by the variables.
        if outer is not None and name != "params" and not name.startswith("_"):
            recorder.record.asked.setdefault(name, []).append(tuple(outer.scope.path))
            recorder.incomplete |= name not in recorder.ask.streams
        return original(rngs, name, error)

    def update(original: Function, outer: wrappers.ToLinen, module: nnx.Module) -> None:
        for collection, sown in _written(outer, module):
            recorder.record.written.add(collection)
            if sown:
                recorder.record.sown.add(collection)
            recorder.incomplete |= collection not in recorder.ask.mutable
        original(outer, module)

    with replaced(
        (wrappers, "linen_rngs_dict", streams_of),
        (nnx.Rngs, "_get_stream", look_up),
        (wrappers.ToLinen, "_update_variables", update),
    ):
        yield


@contextlib.contextmanager
def initialising(streams: set[str]) -> Iterator[None]:
    """During the block, a stream missing in an init falls back on `params`, as linen's own streams do.

    The names of such streams are added to `streams`: a handwritten init must be given them.
    """

    def look_up(original: Function, rngs: nnx.Rngs, name: str, error: object) -> PyTree:
        outer = _current()
        if outer is not None and not name.startswith("_") and not {name, "default"} & set(vars(rngs)):
            streams.add(name)
            setattr(rngs, name, vars(nnx.Rngs(**{name: outer.make_rng(name)}))[name])
        return original(rngs, name, error)

    with replaced((nnx.Rngs, "_get_stream", look_up)):
        yield


def _written(outer: wrappers.ToLinen, module: nnx.Module) -> Iterator[tuple[str, bool]]:
    """(collection, whether it was sown) of every variable that the call has changed."""
    # By identity: an array that was not written is the very object that linen's variables have.
    ids_before = {id(leaf) for leaf in jax.tree_util.tree_leaves(outer.variables)}
    for _, part in walk(module):
        if isinstance(part, nnx.Variable) and not isinstance(part, nnx.RngState):
            if all(id(leaf) in ids_before for leaf in jax.tree_util.tree_leaves(part)):
                continue
            yield variablelib.variable_name_from_type(type(part), allow_register=True), is_sown(part)
