"""What Flax keeps of its own, for this thread or for the process, that a program depends on.

Of Flax 0.11.2, 0.12.8 and 0.12.12 all that is kept outside of modules and scopes was looked at:

    flax.config                                       every flag
    linen.module._global_interceptor_stack            `nn.intercept_methods`, by what the functions do
    core.spmd._axis_rules                             `nn.logical_axis_rules`, `nn.set_logical_axis_rules`, NNX's too
    nnx.variablelib.VARIABLE_CONTEXT                  `nnx.use_eager_sharding`, `nnx.var_defaults`, `nnx.use_refs`
    nnx.graphlib.GRAPH_CONTEXT, its two modes         `nnx.set_graph_mode`, `nnx.set_graph_updates`

    left out: it names operations in a profile        linen.module._use_named_call
    left out: it is empty outside of a call           linen.module._context, core.lift's and NNX's split and merge stacks,
                                                      nnx.bridge.module.MODULE_CONTEXT, `nnx.capture` (on the modules)
    left out: it is about texts and files             nnx.reprlib, nnx.pytreelib.OBJECT_CONTEXT, serialization, io,
                                                      traceback_util
    left out: it fills while models are traced        caches and registries of classes, names and transforms
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from operator import is_
from typing import Any

from ..base.private import NNX_STACKS, flax_globals, nnx_stacks
from .fingerprint import Fingerprint


class Unknown:
    """Stands for what cannot be told from what it was before: it equals itself alone, and each look gives a new one."""

    __slots__ = ()


@dataclass(frozen=True)
class Described:
    """Something of the user's as a person would write it, and what tells it from another that is written alike."""

    text: str
    contents: Any

    def __str__(self) -> str:
        return self.text


class _Contents:
    """The contents of some values of the user's, read again where one of them is another or has changed."""

    def __init__(self) -> None:
        self._print = Fingerprint(())

    def of(self, *values: Any) -> bytes | Unknown:
        """A digest of `values`."""
        print_ = self._print
        if len(print_.value) != len(values) or not all(map(is_, print_.value, values)):
            print_ = self._print = Fingerprint(values)
        return print_.digest() or Unknown()


_interceptor_contents, _rule_contents = _Contents(), _Contents()


def flax_state() -> tuple[Any, ...]:
    """What Flax keeps, on this thread now: two equal ones give the same trace. It takes about a microsecond."""
    if "flax.linen" not in sys.modules:  # then nobody has set anything
        return ()
    try:
        flags, interceptors, rules, stacks = flax_globals()
    except (AttributeError, KeyError):  # a Flax that keeps it elsewhere: every run is traced
        return (Unknown(),)
    return (
        tuple(flags.values()),
        _interceptor_contents.of(*interceptors) if interceptors else None,
        _rule_contents.of(rules) if rules else None,
        tuple([stack[-1] if stack else None for stack in stacks]) if any(stacks) else None,
    )


def flax_state_in_words() -> dict[str, Any]:
    """What Flax keeps, by name, for a person."""
    try:
        flags, interceptors, rules, stacks = flax_globals()
    except (AttributeError, KeyError):
        return {}
    words = dict(flags)
    names = ", ".join(getattr(function, "__name__", type(function).__name__) for function in interceptors)
    contents = _interceptor_contents.of(*interceptors)
    words["interceptors"] = Described(names or "none", None if isinstance(contents, Unknown) else contents)
    words["logical axis rules"] = Described(str(rules) if rules else "none", None)
    for (_, name), stack in zip(nnx_stacks() if stacks else (), stacks, strict=True):
        words[NNX_STACKS[name]] = stack[-1] if stack else "not set"
    return words
