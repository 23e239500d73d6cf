"""The adapter of linen modules: `LinenModel` implements `ModelWithInit`."""

from __future__ import annotations

import ast
import inspect
import re
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import partial
from types import ModuleType
from typing import Any, ClassVar, Literal, Self

import jax
from flax import linen as nn
from flax.core import meta, unfreeze
from flax.errors import InvalidRngError, ScopeCollectionNotFound, ScopeParamNotFoundError, ScopeVariableNotFoundError
from msgspec import Struct, field
from msgspec.structs import replace

from ..base.digest import alike
from ..base.types import Leaf, PyTree
from ..code.fingerprint import Fingerprint
from ..code.inventory import shorten
from ..code.walk import arrays_in
from ..errors import FlaxMagicsError, did_you_mean
from ..line.expression import GAP, with_arguments
from ..run import MODULE, ExportFacts, Settings
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
from .linen_trace import InitTrace, Recorder, bound, inside, unbound_axis
from .switch import by_place, cloned, read_fields, set_fields, set_unset_fields, setting_of, written_by_place

_MISSING = (ScopeParamNotFoundError, ScopeCollectionNotFound, ScopeVariableNotFoundError)


def lacking_stream(error: InvalidRngError) -> str | None:
    """The stream of which a module needs a key and has none, None where Flax does not say."""
    match = re.search(r'PRNG for "(\w+)"', str(error))
    return match[1] if match else None


def nnx_bridge() -> ModuleType | None:
    """Our `bridge` module; None while Flax's bridge is not imported, since then no model can contain NNX modules."""
    if "flax.nnx.bridge" not in sys.modules:
        return None
    from . import bridge

    return bridge


class ModeCache(Struct):
    """Cached results about a linen module, valid while its code and fields stay the same."""

    fingerprint: Fingerprint | None = None
    init_streams: set[str] = set()
    """Streams besides `params` that a handwritten init must be given."""
    init_trace: InitTrace = field(default_factory=InitTrace)
    digest: bytes | None = None
    """The fingerprint for which `modes` is valid."""
    modes: dict[tuple[bool, frozenset[str]], tuple[Model, tuple[str, ...]]] = {}


class LinenModel:
    """A linen module; the session holds its variables. Models of equal modules are equal."""

    held_still: ClassVar[AbstractContextManager[None]] = nullcontext()
    """Does nothing: linen modules are immutable."""
    api: ClassVar[Literal["linen"]] = "linen"

    def __init__(self, module: nn.Module, cache: ModeCache | None = None) -> None:
        self.module, self._cache = module, cache or ModeCache()

    def __eq__(self, other: object) -> bool:
        # In tuples, since the same object is equal to itself whatever a user's class says.
        return isinstance(other, LinenModel) and (self.module,) == (other.module,)

    def __hash__(self) -> int:
        return hash(self.module)

    def has_same_layout(self) -> bool:
        """True: linen modules are immutable."""
        return True

    def describe(self) -> str:
        """The construction with the fields that differ from their defaults, in one line."""
        parts = []
        for name in self.fields():
            declared = type(self.module).__dataclass_fields__[name]
            value, default = getattr(self.module, name, None), declared.default
            # `==` for plain values alone: an array's would be an array, and a user's class may raise.
            is_default = value is default or (isinstance(value, (bool, int, float, str)) and value == default)
            if declared.init and not is_default:
                parts.append(f"{name}={_short(value)}")
        return f"{type(self.module).__name__}({', '.join(parts)})"

    def methods(self) -> list[str]:
        """Public methods that the user's classes define, in order of definition."""
        return own_methods(type(self.module), but="setup")

    def fields(self) -> list[str]:
        """Names of the dataclass fields, without linen's own `parent` and `name`."""
        return [name for name in type(self.module).__dataclass_fields__ if name not in ("parent", "name")]

    def signature(self, method: Path) -> inspect.Signature:
        """The signature of a method, without `self`. Raises FlaxMagicsError if there is no such method.

        A submodule made in `setup` exists only inside a bound module: its signature is `(*args, **kwargs)`.
        """
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
        """A clone with its switch fields set, and what was set. Clones are cached until the fingerprint changes."""
        cache, digest = self._cache, self.fingerprint()
        if digest is None or digest != cache.digest:  # without a fingerprint, changes in place would go unnoticed
            cache.digest, cache.modes = digest, {}
        if (train, fixed) not in cache.modes:
            module, settings = set_fields(self.module, train, fixed)
            cache.modes[train, fixed] = LinenModel(module), settings
        return cache.modes[train, fixed]

    def fields_for_init(self, *, fixed: frozenset[str]) -> LinenModel:
        """A clone whose switches without a value are set for evaluation."""
        # Shared with the clone, so that this model knows what the clone's init finds.
        cache, module = self._cache, set_unset_fields(self.module, fixed)
        return LinenModel(module, ModeCache(init_streams=cache.init_streams, init_trace=cache.init_trace))

    def fields_as_written(self) -> tuple[str, ...]:
        """The switch fields with their present values, such as `training=False`."""
        return read_fields(self.module)

    def init(self, key: Any, method: Path | Function, args: Args, kwargs: Kwargs) -> Updates:
        """`module.init`, eagerly as by hand. Sown collections are dropped, since later runs would append to them."""
        across, cache = nnx_bridge(), self._cache
        bridge = nullcontext() if across is None else across.initialising(cache.init_streams)
        with cache.init_trace.watching() as sown, bridge:
            target, args, kwargs = self._target(method, args, kwargs)
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
        """None: a linen model is given the streams that a trace asked for."""
        return frozenset()

    def likely_needs(self, mode: str) -> Needs:
        """By what its inits did: streams that they asked for, and in train mode those of the dropout layers."""
        return self._cache.init_trace.likely_needs(mode)

    def fingerprint(self) -> bytes | None:
        """A digest of the module's classes and fields, cached until something that it was read from changes."""
        if self._cache.fingerprint is None:
            self._cache.fingerprint = Fingerprint(self.module)
        return self._cache.fingerprint.digest()

    cache_key = code = fingerprint  # a linen program depends on nothing else of the module

    def with_rngs(self, signature: inspect.Signature, args: Args, kwargs: Kwargs) -> tuple[Model, bool]:
        """The model itself: linen gets its streams from `apply`, not by an argument of the call."""
        return self, False

    def supplied_arguments(self) -> tuple[str, ...]:
        """None: linen gets its streams from `apply`."""
        return ()

    def commit(self, updates: Variables, record: CallTrace) -> Commit:
        """The written collections, without assignments: the session holds the variables."""
        return Commit(tuple(updates))

    def forward(self, method: Path | Function, ask: Needs, record: CallTrace, root_impl: str) -> Forward:
        """The module's `apply` under observation; see `AnyModel.forward`."""
        mutable = sorted(ask.mutable)

        def run(variables: Variables, keys: PyTree, args: Args, kwargs: Kwargs) -> tuple[PyTree, Updates]:
            across, recorder = nnx_bridge(), Recorder(ask, record, keys, root_impl)
            target, args, kwargs = self._target(method, args, kwargs)
            apply = partial(
                self.module.apply, variables, *args, rngs=dict(keys), method=target, mutable=mutable, **kwargs
            )
            try:
                with recorder.watching(), nullcontext() if across is None else across.watching(recorder):
                    output, updates = bound(apply, sorted(ask.axes))
            except _MISSING as error:
                if recorder.incomplete:  # the variable may be missing only because its collection was not mutable
                    raise Incomplete from None
                raise MissingVariables(str(error)) from error
            except Exception as error:
                # With stand-in keys or without its collections the model may fail in any way: try again with all first.
                axis = unbound_axis(error)
                if axis is not None and axis not in ask.axes:
                    record.axes.add(axis)
                elif not recorder.incomplete:
                    raise
                raise Incomplete from None
            if recorder.incomplete:
                raise Incomplete
            record.axes |= ask.axes  # bound axes raise no error, so they have to be recorded as needed here
            return output, {name: tree for name, tree in dict(updates).items() if name in record.written}

        return run

    def _target(
        self, method: Path | Function, args: Args, kwargs: Kwargs
    ) -> tuple[str | Function | None, Args, Kwargs]:
        """The `method` argument for Flax's `apply` and `init`, and the arguments to pass beside it."""
        if callable(method):  # a function that takes the bound module first, as for `flax.linen.apply(function, net)`
            if kwargs.keys() & FLAX_ARGUMENTS.keys():
                return lambda module, *args: method(module, *args, **kwargs), args, {}
            return method, args, kwargs
        args, kwargs = by_place(type(self.module), method, args, kwargs, lambda default: default)
        # A user's argument called `rngs` or `mutable` must be closed over, or Flax would take it for its own.
        shadowed = kwargs if kwargs.keys() & FLAX_ARGUMENTS.keys() else {}
        if not method and not shadowed:
            return None, args, kwargs
        if len(method) == 1 and hasattr(type(self.module), method[0]) and not shadowed:
            return method[0], args, kwargs

        def call(module: nn.Module, *args: PyTree, **kwargs: PyTree) -> PyTree:
            target: Any = module
            for name in method:
                if isinstance(target, nn.Module):
                    check_name(target, name)
                target = getattr(target, name)
            return target(*args, **kwargs, **shadowed)

        return call, args, {} if shadowed else kwargs

    def own_variables(self, of_session: Variables | None) -> Variables | None:
        """Those that the session holds."""
        return of_session

    collections = state = variables_to_save = own_variables  # they are the same to a user and to a file

    def is_state(self, value: Variables, variables: Variables) -> bool:
        """Whether both are put together alike; a FrozenDict counts as the dict that it freezes."""
        return alike(*(jax.tree_util.tree_structure(unfreeze(dict(tree))) for tree in (value, variables)))

    def annotations(self) -> dict[str, dict[str, tuple[Any, ...]]]:
        """None: `nn.Partitioned` boxes stand around the variables themselves."""
        return {}

    def other_arrays(self) -> tuple[Leaf, ...]:
        """Arrays in the module's fields."""
        return tuple(arrays_in(self.module))

    def without_arrays(self) -> Self:
        """The model itself: it holds no variables."""
        return self

    def module_classes(self) -> dict[Path, str]:
        """The model's own class: its submodules exist in a call only."""
        return {(): type(self.module).__name__}

    def iter_variables(self, variables: Variables) -> Iterator[tuple[str, Path, Leaf, str]]:
        """(collection, path, array, partitioning names as text) of every array."""
        for name, tree in variables.items():
            # A box (`nn.Partitioned`) is a pytree node itself: stopping at it keeps its metadata beside the array.
            boxes = jax.tree_util.tree_leaves_with_path(
                tree, is_leaf=lambda value: isinstance(value, meta.AxisMetadata)
            )
            for keys, box in boxes:
                path = tuple(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in keys)
                about = f"names={box.names}" if isinstance(box, meta.Partitioned) else ""
                for leaf in jax.tree_util.tree_leaves(box):
                    yield name, path, leaf, about

    def by_hand(self, call: str, method: Path, switch: Names, needs: Needs, *, samples: Names | None) -> str:
        """The run in plain Flax: `net.clone(training=True).apply(variables, x, rngs={'dropout': dropout_key})`.

        Samples are mapped over their keys by `jax.vmap`.
        """
        more = []
        if needs.streams:
            more.append("rngs={" + ", ".join(f"'{stream}': {stream}_key" for stream in sorted(needs.streams)) + "}")
        if needs.mutable:
            more.append(f"mutable={sorted(needs.mutable)!r}")
        module = cloned(MODULE, self.module, map(setting_of, switch))
        code = self._in_plain_flax("apply", call, method, module, first="variables", more=more)
        code = inside(needs.axes, code)
        if not samples:
            return code
        return f"jax.vmap(lambda {', '.join(samples)}: {code})({', '.join(f'{key}s' for key in samples)})"

    def facts_of_run(
        self, facts: ExportFacts, train: bool | None, fields: Settings, *, kept: Updates, sown: Updates, handed: Updates
    ) -> ExportFacts:
        """The module with its fields set, and the collections to make mutable and to keep."""
        module, mutable = cloned(MODULE, self.module, fields), tuple(sorted({*kept, *sown}))
        return replace(facts, module=module, mutable=mutable, kept=tuple(sorted(kept)))

    def init_by_hand(self, call: str, method: Path, arguments: Settings, module: str) -> str:
        """The init in plain Flax: `net.init(params_key, x)`, with the switches of `arguments` and `module` applied."""
        key = "params_key"
        if self.init_streams:
            key = "{" + ", ".join(f"'{stream}': params_key" for stream in ("params", *self.init_streams)) + "}"
        call = with_arguments(call, [f"{name}={value}" for name, value in arguments])
        return self._in_plain_flax("init", call, method, module, first=key, more=[])

    @property
    def init_streams(self) -> tuple[str, ...]:
        """Streams of NNX modules inside that a handwritten init must be given besides `params`; known after an init."""
        return tuple(sorted(self._cache.init_streams))

    def _in_plain_flax(self, verb: str, call: str, method: Path, module: str, *, first: str, more: list[str]) -> str:
        """`module.verb(first, <arguments of call>, *more)`, as text; `verb` is `apply` or `init`."""
        name, _, rest = call.partition("(")
        arguments = rest.rpartition(")")[0].strip().rstrip(",")
        texts = _argument_texts(call)
        shadowed = any(text.startswith(f"{name}=") for text in texts for name in FLAX_ARGUMENTS)
        placed = written_by_place(type(self.module), method, texts)
        if placed != texts:
            arguments = ", ".join(placed)
        parts = [first, *([arguments] if arguments and not shadowed else []), *more]
        if shadowed:
            parts.append(f"method=lambda m: {'.'.join(('m', *method))}({arguments})")
        elif len(method) == 1 and hasattr(type(self.module), method[0]):
            parts.append(f"method='{method[0]}'")
        elif method:
            parts.append(f"method=lambda m, *a, **k: m.{'.'.join(method)}(*a, **k)")
        return f"{module.replace(MODULE, name.partition('.')[0])}.{verb}({', '.join(parts)})"


def _argument_texts(call: str) -> list[str]:
    """The arguments of a call as text, `…` for each that has none; none where it does not parse."""
    with suppress(SyntaxError):
        tree = ast.parse(call.replace("…", GAP), mode="eval").body
        assert isinstance(tree, ast.Call)
        return [ast.unparse(node).replace(GAP, "…") for node in (*tree.args, *tree.keywords)]
    return []


def _short(value: object) -> str:
    if isinstance(value, nn.Module):
        return f"{type(value).__name__}(…)"
    if type(value) in (list, tuple) and any(isinstance(item, nn.Module) for item in value):  # type: ignore[attr-defined]
        items = ", ".join(map(_short, value))  # type: ignore[call-overload]
        return shorten(f"[{items}]" if isinstance(value, list) else f"({items})")
    return str(value.__name__) if callable(value) and hasattr(value, "__name__") else shorten(repr(value))
