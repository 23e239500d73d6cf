"""A linen module as a session sees it."""

from __future__ import annotations

import ast
import inspect
import re
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from types import ModuleType
from typing import Any, ClassVar, Literal

import jax
from flax import linen as nn
from flax.core import meta
from flax.errors import InvalidRngError, ScopeCollectionNotFound, ScopeParamNotFoundError, ScopeVariableNotFoundError

from ..base.types import Leaf, PyTree
from ..code.fingerprint import Fingerprint
from ..code.inventory import shorten
from ..errors import FlaxMagicsError, did_you_mean
from ..run import MODULE, Settings
from .base import (
    FLAX_ARGUMENTS,
    CallTrace,
    Commit,
    Forward,
    Incomplete,
    MissingVariables,
    Model,
    Needs,
    Updates,
    Variables,
    check_name,
    own_methods,
)
from .calls import TAKES_ANYTHING, Args, Function, Kwargs, Names, Path, without_self
from .linen_trace import Recorder, bound, sowing, unbound_axis
from .switch import cloned, read_fields, set_fields, set_unset_fields, setting_of

_MISSING = (ScopeParamNotFoundError, ScopeCollectionNotFound, ScopeVariableNotFoundError)


def lacking_stream(error: InvalidRngError) -> str | None:
    """The stream of which a module needs a key and has none, None where Flax does not say."""
    match = re.search(r'PRNG for "(\w+)"', str(error))
    return match[1] if match else None


def nnx_bridge() -> ModuleType | None:
    """The module that watches NNX modules inside linen ones; None as long as nobody has imported Flax's bridge."""
    if "flax.nnx.bridge" not in sys.modules:
        return None
    from . import bridge

    return bridge


@dataclass
class ModeCache:
    """Results about a module that hold for as long as its code and its fields are the same."""

    fingerprint: Fingerprint | None = None
    init_streams: set[str] = field(default_factory=set)
    """Streams that an init by hand has to be given besides `params`."""
    digest: bytes | None = None
    modes: dict[tuple[bool, frozenset[str]], tuple[Model, tuple[str, ...]]] = field(default_factory=dict)


@dataclass(frozen=True)
class LinenModel:
    """Wraps `flax.linen.Module`; holds no variables."""

    module: nn.Module
    _cache: ModeCache = field(default_factory=ModeCache, repr=False, compare=False)

    held_still: ClassVar[AbstractContextManager[None]] = nullcontext()
    """A block that does nothing: a linen module does not change."""
    holds_variables: ClassVar[Literal[False]] = False

    def describe(self) -> str:
        """The module's fields as they differ from their defaults, in one line."""
        parts = []
        for name in self.fields():
            declared = type(self.module).__dataclass_fields__[name]
            value, default = getattr(self.module, name, None), declared.default
            is_default = value is default or (isinstance(value, (bool, int, float, str)) and value == default)
            if declared.init and not is_default:
                parts.append(f"{name}={_short(value)}")
        return f"{type(self.module).__name__}({', '.join(parts)})"

    def methods(self) -> list[str]:
        """Public methods that the user's classes define, in order of definition."""
        return own_methods(type(self.module), but="setup")

    def fields(self) -> list[str]:
        """The dataclass fields, without linen's own."""
        return [name for name in type(self.module).__dataclass_fields__ if name not in ("parent", "name")]

    def signature(self, method: Path) -> inspect.Signature:
        """Without `self`. A submodule of `setup` is known only inside the model: its signature is `(*args, **kwargs)`."""
        name = method[0] if method else "__call__"
        if method:
            check_name(self.module, name)
        function = getattr(type(self.module), name, None)
        has_setup = type(self.module).setup is not nn.Module.setup
        if len(method) > 1 or (function is None and (name in self.fields() or has_setup)):
            return TAKES_ANYTHING
        if not callable(function):
            hint = did_you_mean(name, self.methods())
            known = ", ".join(self.methods()) or "none but the call itself"
            cls = type(self.module).__name__
            what = f"{cls} has no method `{name}`" if method else f"{cls} defines no `__call__`"
            raise FlaxMagicsError(f"{what}; its methods: {known}.", hint=hint)
        return without_self(inspect.signature(function))

    def fields_in_mode(self, train: bool, *, fixed: frozenset[str]) -> tuple[Model, tuple[str, ...]]:
        """A clone with the switches among its fields set. Clones are kept for as long as the module is the same."""
        cache, digest = self._cache, self.fingerprint()
        if digest is None or digest != cache.digest:  # without one, fields may change where they are
            cache.digest, cache.modes = digest, {}
        if (train, fixed) not in cache.modes:
            module, settings = set_fields(self.module, train, fixed)
            cache.modes[train, fixed] = LinenModel(module), settings
        return cache.modes[train, fixed]

    def fields_for_init(self, *, fixed: frozenset[str]) -> Model:
        """A clone whose unset switches stand for evaluation."""
        return LinenModel(set_unset_fields(self.module, fixed), ModeCache(init_streams=self._cache.init_streams))

    def fields_as_written(self) -> tuple[str, ...]:
        """The switches among the module's fields, as they stand."""
        return read_fields(self.module)

    def init(self, key: Any, method: Path, args: Args, kwargs: Kwargs) -> Updates:
        """Eager, as by hand. Sown collections are dropped: Flax would append the next run's values to them."""
        across = nnx_bridge()
        with sowing() as sown, nullcontext() if across is None else across.initialising(self._cache.init_streams):
            target, kwargs = self._target(method, kwargs)
            variables = self._init(key, partial(self.module.init, method=target), args, kwargs)
        return {name: tree for name, tree in dict(variables).items() if name not in sown}

    def _init(self, key: Any, init: Function, args: Args, kwargs: Kwargs) -> Variables:
        """Linen's init with the `params` key alone.

        Where a stream is asked for it falls back on `params`, but inside a transform that hands on that stream and not
        `params` it finds nothing: there it is given the key that it would have fallen back on.
        """
        streams: list[str] = []
        while True:
            try:
                variables: Variables = init({"params": key, **dict.fromkeys(streams, key)}, *args, **kwargs)
            except InvalidRngError as error:
                lacking = lacking_stream(error)
                if lacking in (None, "params", *streams):
                    raise
                streams.append(str(lacking))
                continue
            self._cache.init_streams.update(streams)
            return variables

    def streams(self) -> frozenset[str]:
        """No stream: one is given only because a trace asked for it."""
        return frozenset()

    def fingerprint(self) -> bytes | None:
        """A digest of the module's classes and fields, kept for as long as nothing that it was read from changes."""
        if self._cache.fingerprint is None:
            self._cache.fingerprint = Fingerprint(self.module)
        return self._cache.fingerprint.digest()

    cache_key = code = fingerprint  # it holds all that a program is made from

    def with_rngs(self, signature: inspect.Signature, args: Args, kwargs: Kwargs) -> tuple[Model, bool]:
        """Nothing is added: linen's streams are no arguments."""
        return self, False

    def supplied_arguments(self) -> tuple[str, ...]:
        """No argument: streams are given to linen's `apply`, not to the method."""
        return ()

    def commit(self, updates: Variables, record: CallTrace) -> Commit:
        """The collections that were written; the session holds them, and there is nothing to assign."""
        return Commit(tuple(updates))

    def forward(self, method: Path, ask: Needs, record: CallTrace, root_impl: str) -> Forward:
        """The module's `apply`, watched. Raises MissingVariables for variables that are not there."""
        mutable = sorted(ask.mutable)

        def run(variables: Variables, keys: PyTree, args: Args, kwargs: Kwargs) -> tuple[PyTree, Updates]:
            across, recorder = nnx_bridge(), Recorder(ask, record, keys, root_impl)
            target, kwargs = self._target(method, kwargs)
            apply = partial(
                self.module.apply, variables, *args, rngs=dict(keys), method=target, mutable=mutable, **kwargs
            )
            try:
                with recorder.watching(), nullcontext() if across is None else across.watching(recorder):
                    output, updates = bound(apply, sorted(ask.axes))
            except _MISSING as error:
                if recorder.incomplete:
                    raise Incomplete from None
                raise MissingVariables(str(error)) from error
            except Exception as error:
                axis = unbound_axis(error)
                if axis is not None and axis not in ask.axes:
                    record.axes.add(axis)
                elif not recorder.incomplete:
                    raise
                raise Incomplete from None
            if recorder.incomplete:
                raise Incomplete
            record.axes |= ask.axes
            return output, {name: tree for name, tree in dict(updates).items() if name in record.written}

        return run

    def _target(self, method: Path, kwargs: Kwargs) -> tuple[str | Function | None, Kwargs]:
        """The `method` for Flax's `apply` and `init`, and the keywords that they hand on to it."""
        shadowed = kwargs if kwargs.keys() & FLAX_ARGUMENTS.keys() else {}  # Flax would take them for its own
        if not method and not shadowed:
            return None, kwargs
        if len(method) == 1 and hasattr(type(self.module), method[0]) and not shadowed:
            return method[0], kwargs

        def call(module: nn.Module, *args: PyTree, **kwargs: PyTree) -> PyTree:
            target: Any = module
            for name in method:
                if isinstance(target, nn.Module):
                    check_name(target, name)
                target = getattr(target, name)
            return target(*args, **kwargs, **shadowed)

        return call, {} if shadowed else kwargs

    def module_classes(self) -> dict[Path, str]:
        """The model itself: its submodules are made in a call."""
        return {(): type(self.module).__name__}

    def iter_variables(self, variables: Variables) -> Iterator[tuple[str, Path, Leaf, str]]:
        """Collection, path, value and partitioning names of every array."""
        for name, tree in variables.items():
            boxes = jax.tree_util.tree_leaves_with_path(
                tree, is_leaf=lambda value: isinstance(value, meta.AxisMetadata)
            )
            for keys, box in boxes:
                path = tuple(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in keys)
                about = f"names={box.names}" if isinstance(box, meta.Partitioned) else ""
                for leaf in jax.tree_util.tree_leaves(box):
                    yield name, path, leaf, about

    def by_hand(self, call: str, method: Path, switch: Names, streams: Names, mutable: Names) -> str:
        """`net.clone(training=True).apply(variables, x, rngs={'dropout': dropout_key})`"""
        more = []
        if streams:
            more.append("rngs={" + ", ".join(f"'{stream}': {stream}_key" for stream in streams) + "}")
        if mutable:
            more.append(f"mutable={list(mutable)!r}")
        module = cloned(MODULE, self.module, map(setting_of, switch))
        return self._in_plain_flax("apply", call, method, module, first="variables", more=more)

    def init_by_hand(self, call: str, method: Path, arguments: Settings, module: str) -> str:
        """`net.init(params_key, x)`; `call` with the switches in `arguments` and in `module`: see `ExportFacts.module`."""
        key = "params_key"
        if self.init_streams:
            key = "{" + ", ".join(f"'{stream}': params_key" for stream in ("params", *self.init_streams)) + "}"
        more = [f"{name}={value}" for name, value in arguments]
        return self._in_plain_flax("init", call, method, module, first=key, more=more)

    @property
    def init_streams(self) -> tuple[str, ...]:
        """Streams that an init by hand has to be given besides `params`: those of NNX modules inside, once it has run."""
        return tuple(sorted(self._cache.init_streams))

    def _in_plain_flax(self, verb: str, call: str, method: Path, module: str, *, first: str, more: list[str]) -> str:
        """`call` as one of Flax's `verb` on `module`, with `first` before the call's own arguments and `more` after them."""
        name, _, rest = call.partition("(")
        arguments = rest.rpartition(")")[0].strip().rstrip(",")
        shadowed = any(f"{name}=" in arguments for name in FLAX_ARGUMENTS) and _keywords(call) & {*FLAX_ARGUMENTS}
        parts = [first, *([arguments] if arguments and not shadowed else []), *more]
        if shadowed:
            parts.append(f"method=lambda m: {'.'.join(('m', *method))}({arguments})")
        elif len(method) == 1 and hasattr(type(self.module), method[0]):
            parts.append(f"method='{method[0]}'")
        elif method:
            parts.append(f"method=lambda m, *a, **k: m.{'.'.join(method)}(*a, **k)")
        return f"{module.replace(MODULE, name.partition('.')[0])}.{verb}({', '.join(parts)})"


def _keywords(call: str) -> set[str]:
    """Names of the keyword arguments of a call, as far as it is written as text."""
    with suppress(SyntaxError):
        tree = ast.parse(call, mode="eval").body
        return {keyword.arg for keyword in tree.keywords if keyword.arg} if isinstance(tree, ast.Call) else set()
    return set()


def _short(value: object) -> str:
    if isinstance(value, nn.Module):
        return f"{type(value).__name__}(…)"
    return str(value.__name__) if callable(value) and hasattr(value, "__name__") else shorten(repr(value))
