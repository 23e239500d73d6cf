"""The adapter of NNX modules: the object in the user's namespace holds the state, and runs work on copies of it."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
from collections.abc import Iterator
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Self

import jax
from flax import nnx
from msgspec.structs import replace

from ..base.digest import quick_digest
from ..base.threads import at_once
from ..base.types import Leaf, PyTree
from ..code.library import is_module
from ..errors import FlaxMagicsError, did_you_mean
from ..line.expression import with_arguments
from ..run import MODULE, ExportFacts, HandedBack, ModeByHand, Settings
from . import nnx_trace
from .base import (
    CallTrace,
    Commit,
    Forward,
    Model,
    ModelRecord,
    ModelWithVariables,
    Needs,
    Updates,
    Variables,
    check_name,
    names_in,
    own_methods,
)
from .calls import Args, Function, Kwargs, Names, Path, constructor, readable_signature
from .nnx_graph import (
    GRAPH,
    SIMPLE,
    back_by_hand,
    flat_state,
    is_ref,
    mode_by_hand,
    parts_of,
    raw,
    spell,
    switches_read,
    transplant,
    walk,
)
from .nnx_layout import Layout, LayoutCache, Values

SUPPLIED = ("params", "dropout")
"""Streams that are always in the `nnx.Rngs` which the session makes for a call."""


@dataclass(frozen=True)
class NnxModel:
    """An NNX module, which holds its own variables."""

    module: Any
    mode: bool | None = None
    """Mode of the copy that runs: True for training, False for evaluation, None as the module has it."""
    gives_rngs: bool = False
    """The session adds an `rngs` argument to the call."""
    passed: tuple[nnx.Variable[Any], ...] = field(default=(), repr=False, compare=False)
    """Variables of NNX objects among the call's arguments, in order; a run may change them."""
    written: str = ""
    """The text of the construction, such as `Net(8, 3)`, where the session built the module; else empty."""
    _cache: LayoutCache = field(default_factory=LayoutCache, repr=False, compare=False)
    api: ClassVar[Literal["nnx"]] = "nnx"
    init_streams: ClassVar[Names] = ()
    """None: its construction is given its streams as `rngs`."""

    @property
    def layout(self) -> Layout:
        """The module split into graph and variables, as it is now."""
        return self._cache.of(self.module)

    @property
    def held_still(self) -> AbstractContextManager[None]:
        """A block during which nothing but `has_same_layout` checks the layout."""
        return self._cache

    def has_same_layout(self) -> bool:
        """Whether every module of the graph holds the attributes that it held when the layout was found."""
        return self._cache.check()

    # -- what it is

    def describe(self) -> str:
        """The construction as it was written, else put together from attributes named like constructor parameters."""
        if self.written:
            return self.written
        cls = type(self.module)
        attributes = ((name, vars(self.module).get(name)) for name in constructor(cls).parameters)
        parts = [f"{name}={value!r}" for name, value in attributes if isinstance(value, (bool, int, float, str))]
        return f"{cls.__name__}({', '.join(parts)})"

    def methods(self) -> list[str]:
        """Public methods that the user's classes define, in order of definition."""
        return own_methods(type(self.module), but="set_view")

    def fields(self) -> list[str]:
        """Names of the module's attributes."""
        return [str(name) for name, _ in parts_of(self.module) or ()]

    def signature(self, method: Path) -> inspect.Signature:
        """The signature of a method of the module or a submodule. Raises FlaxMagicsError if there is no such method."""
        cls = type(self.module).__name__
        target: Any = self.module
        for i, name in enumerate(method):
            if not hasattr(target, name):
                known = ", ".join(self.methods()) or "none but the call itself"
                where = ".".join((cls, *method[:i]))
                hint = did_you_mean(name, self.methods()) if not i else None
                raise FlaxMagicsError(f"{where} has no method `{name}`; its methods: {known}.", hint=hint)
            if is_module(target):
                check_name(target, name)
            target = getattr(target, name)
        if not callable(target):
            known = ", ".join(self.methods()) or "none"
            what = f"`{'.'.join(method)}` is no method of {cls}" if method else f"{cls} defines no `__call__`"
            raise FlaxMagicsError(f"{what}; its methods: {known}.")
        return readable_signature(target)

    # -- its switch

    def fields_in_mode(self, train: bool, *, fixed: frozenset[str]) -> tuple[Model, tuple[str, ...]]:
        """A model whose runs set every switch attribute on every module of their copy, and what they set."""
        return dataclasses.replace(self, mode=train), self._switches_read(train)

    def fields_for_init(self, *, fixed: frozenset[str]) -> Self:
        """The model itself: an NNX module is initialised when it is built."""
        return self

    def fields_as_written(self) -> tuple[str, ...]:
        """The switches of all modules in the graph with their present values."""
        return self._switches_read(None)

    def _switches_read(self, train: bool | None) -> tuple[str, ...]:
        """The switches with their values in mode `train`, None for the present ones; kept with the layout."""
        layout = self.layout
        if train not in layout.switches:
            layout.switches[train] = switches_read(layout.nodes, train)
        return layout.switches[train]

    # -- what it holds

    def streams(self) -> frozenset[str]:
        """Tags of the streams that the module holds, and streams of the `rngs` argument if the session adds one."""
        return self.layout.tags | (frozenset(SUPPLIED) if self.gives_rngs else frozenset())

    def likely_needs(self, mode: str) -> Needs:
        """Nothing besides the streams that it holds, which it is given anyway."""
        return Needs()

    @property
    def _own_tags(self) -> frozenset[str]:
        """Tags of held streams other than `params` and `dropout`, which the session's `rngs` argument has as well."""
        return self.layout.tags - frozenset(SUPPLIED)

    def own_variables(self, of_session: Variables | None = None) -> Values:
        """The module's present variables by type, without the random keys and counts that each draw replaces."""
        return self.layout.given()

    def collections(self, of_session: Variables | None = None) -> Values:
        """The module's present variables, without anything that belongs to random streams."""
        layout = self.layout
        return {name: tree for name, tree in layout.given().items() if name not in layout.random}

    def state(self, of_session: Variables | None = None) -> PyTree:
        """`nnx.state` of the module with copied variables, which later runs do not change."""
        # Runs replace arrays and change references in place: only the latter have to be read out.
        return jax.tree_util.tree_map(lambda leaf: leaf[...] if is_ref(leaf) else leaf, nnx.state(self.module, **GRAPH))

    def variables_to_save(self, of_session: Variables | None) -> Values:
        """The value of each variable by type and path, without sown and fixed ones."""
        out: Values = {}
        for slot in self.layout.slots:
            if not slot.sown and not slot.fixed:
                out.setdefault(slot.collection, {})[slot.name] = slot.read()
        return out

    def is_state(self, value: Variables, variables: Variables) -> bool:
        """Whether `read_state` takes it and something is in it; raises the error of `read_state` where not."""
        return bool(self.read_state("", value))

    def annotations(self) -> dict[str, dict[str, tuple[Any, ...]]]:
        """Type → path → axes of a mesh, of the Variables whose metadata have some."""
        out: dict[str, dict[str, tuple[Any, ...]]] = {}
        for slot in self.layout.slots:
            names = names_in(slot.leaf.get_metadata()) if isinstance(slot.leaf, nnx.Variable) else None
            if names is not None:
                out.setdefault(slot.collection, {})[slot.name] = names
        return out

    def other_arrays(self) -> tuple[Leaf, ...]:
        """None: what the module holds are its variables."""
        return ()

    def without_arrays(self) -> ModelRecord:
        """What it takes to build the module with other values. The module is the user's, and would keep its arrays alive."""
        return ModelRecord(self.written, self.layout.skeleton)

    def read_state(self, name: str, value: Any) -> Values:
        """The module's variables, replaced by those in `value`, an `nnx.State` or a mapping of the same form.

        Raises:
          FlaxMagicsError: `value` has a variable that the module lacks.
        """
        slots = {slot.path: slot for slot in self.layout.slots}
        out = self.own_variables()
        for path, leaf in flat_state(value if isinstance(value, nnx.State) else nnx.State(dict(value))):
            slot = slots.get(path)
            if slot is None:
                hint = did_you_mean(spell(path), [slot.name for slot in slots.values()])
                raise FlaxMagicsError(f"`{name}` has no variable `{spell(path)}`.", hint=hint)
            new = raw(leaf) if isinstance(leaf, nnx.Variable) else leaf
            out.setdefault(slot.collection, {})[slot.name] = new[...] if is_ref(new) else new
        return out

    def trainable(self) -> frozenset[str]:
        """The types of the variables that gradients are taken by: `Param`, and those that the user derived of it."""
        return frozenset(slot.collection for slot in self.layout.slots if isinstance(slot.leaf, nnx.Param))

    def as_state(self, values: Values) -> Any:
        """`values`, of some of the variables, as the `nnx.State` that `nnx.state` gives of them."""
        slots = {(slot.collection, slot.name): slot for slot in self.layout.slots}
        rows = [(slots[kind, name], value) for kind, tree in values.items() for name, value in tree.items()]
        # With the Variable's own type and metadata, without which it would not fit the module's state in a `tree_map`.
        return nnx.from_flat_state(
            [
                (slot.path, value if slot.structure is None else jax.tree_util.tree_unflatten(slot.structure, [value]))
                for slot, value in rows
            ]
        )

    def cache_key(self) -> tuple[object, ...] | None:
        """All that a program depends on: code, graph with static attributes, shapes of stream keys, mode, `rngs`."""
        layout = self.layout
        code = layout.fingerprint.digest()
        if code is None:
            return None
        return code, layout.graphdef, layout.numbers, layout.streams(), self.mode, self.gives_rngs

    def code(self) -> bytes | None:
        """A digest of the classes in the graph and of its static values other than numbers and text.

        None where something is not plain. The positions of these values are not in it: `cache_key` adds the graphdef.
        """
        return self.layout.fingerprint.digest()

    def fingerprint(self) -> bytes | None:
        """A digest of code, variable shapes and plain static values: the same after an unchanged cell ran again."""
        code = self.code()
        if code is None:
            return None
        shapes = [(slot.collection, slot.name, _shape(slot.read())) for slot in self.layout.slots if not slot.sown]
        rows = [(spell(path), name, value) for path, node in self.layout.nodes for name, value in parts_of(node) or ()]
        values = [row for row in rows if row[2] is None or isinstance(row[2], SIMPLE)]
        return hashlib.sha256(code + repr((shapes, values)).encode()).digest()

    def sample(self) -> bytes:
        """A digest of some elements of every variable outside random streams; another seed gives another digest.

        Raises:
          FlaxMagicsError: the module holds shapes in place of arrays (`nnx.eval_shape`).
        """
        collections = self.collections()
        for (_, name, *_), leaf in jax.tree_util.tree_leaves_with_path(collections):
            if isinstance(leaf, jax.ShapeDtypeStruct):
                raise FlaxMagicsError(
                    f"`{name.key}` is a shape without values: the module was made by nnx.eval_shape. Its values come"
                    " from a checkpoint, or from the state of another module.",
                    form="nnx.update(…, …)",
                )
        return quick_digest(jax.tree_util.tree_leaves(collections))

    # -- running

    def with_rngs(self, signature: inspect.Signature, args: Args, kwargs: Kwargs) -> tuple[Model, bool]:
        """(The model, adding `rngs` to the call if it takes some and lacks them; whether the user passed some).

        Raises:
          FlaxMagicsError: an NNX object among the arguments holds JAX array references.
        """
        passed = nnx_trace.variables_in((args, kwargs))
        if any(is_ref(raw(variable)) for variable in passed):
            raise FlaxMagicsError(
                "an object in the call holds references, which a run would change even where it fails.",
                hint="the registered module may hold some: make it part of that, or pass one that holds arrays",
            )
        model = dataclasses.replace(self, passed=passed) if passed else self
        # `nnx.Sequential.__call__` takes any keywords and passes `rngs` to those layers whose signature has it.
        layers = filter(callable, self.module.layers) if isinstance(self.module, nnx.Sequential) else ()
        takes = any("rngs" in each.parameters for each in (signature, *map(readable_signature, layers)))
        # A layer of Flax itself that holds streams, such as `nnx.Dropout`, uses these when called without `rngs`.
        holds_its_own = type(self.module).__module__.partition(".")[0] == "flax" and bool(self.layout.tags)
        if not takes or holds_its_own:
            return model, False
        arguments = dict(kwargs)
        with suppress(TypeError):  # arguments that do not fit get their message later
            arguments |= signature.bind_partial(*args, **kwargs).arguments
        return (model, True) if "rngs" in arguments else (dataclasses.replace(model, gives_rngs=True), False)

    def supplied_arguments(self) -> tuple[str, ...]:
        """`("rngs",)` where the session adds them to the call."""
        return ("rngs",) if self.gives_rngs else ()

    def forward(self, method: Path | Function, ask: Needs, record: CallTrace, root_impl: str) -> Forward:
        """The run on a copy whose held streams are reseeded from `keys` by tag, as `nnx.reseed` would do."""
        record.held |= self.streams()
        rngs = sorted(ask.streams - self._own_tags) if self.gives_rngs else None
        return nnx_trace.forward(self.layout, method, ask, record, mode=self.mode, rngs=rngs)

    def commit(self, updates: Variables, record: CallTrace) -> Commit:
        """The writes that bring `updates` into the module's own objects."""
        return nnx_trace.commit(self.layout, self.passed, updates, record.structure)

    def module_classes(self) -> dict[Path, str]:
        """Path → class name of every module in the graph."""
        modules = [(path, node) for path, node in self.layout.nodes if isinstance(node, nnx.Module)]
        return {tuple(map(str, path)): type(node).__name__ for path, node in modules}

    def iter_variables(self, variables: Variables) -> Iterator[tuple[str, Path, Leaf, str]]:
        """(type, path, array, metadata as text) of every array; values that earlier calls sowed are left out."""
        for slot in self.layout.slots:
            if slot.sown:
                continue
            name = "RngState" if isinstance(slot.leaf, nnx.RngState) else slot.collection
            value = variables.get(slot.collection, {}).get(slot.name)
            for leaf in jax.tree_util.tree_leaves(slot.read() if value is None else value):
                yield name, tuple(map(str, slot.path)), leaf, _about(slot.leaf)

    def assign(self, values: Variables) -> None:
        """Writes `values` into the module's own variables, in one uninterruptible step."""
        at_once(self.layout.assignments(values))

    def become(self, other: ModelWithVariables) -> None:
        """Makes the module's own objects equal to the newly built `other`, so that the user's references stay valid.

        Values are copied where both have the same graph; otherwise all attributes are transplanted.
        """
        if self.layout.graphdef == other.layout.graphdef:
            at_once(self.layout.copying(other.layout))
        else:
            transplant({id(other.module): self.module}, [part for _, part in walk(other.module)])

    def by_hand(self, call: str, method: Path, switch: Names, needs: Needs, *, samples: Names | None) -> str:
        """The run in plain Flax: `net.train(); nnx.reseed(net, dropout=…); nnx.jit(lambda net: net(x))(net)`.

        Samples are a loop over their keys, on copies.
        """
        name, streams = call.partition("(")[0].partition(".")[0], sorted(needs.streams)
        parts = []
        if samples is not None:
            parts.append(f"{name}_copy = nnx.clone({name})")
            name, call = f"{name}_copy", f"{name}_copy{call.removeprefix(name)}"
        parts += () if self.mode is None else mode_by_hand(name, self.layout.nodes, self.mode)
        held = [stream for stream in streams if stream in self.layout.tags]
        if held:
            keys = ", ".join(f"{stream}={stream}_key" for stream in held)
            parts.append(f"nnx.reseed({name}, policy='match_shape', {keys})")
        if self.gives_rngs:
            keys = ", ".join(f"{stream}={stream}_key" for stream in streams if stream not in self._own_tags)
            call = with_arguments(call, [f"rngs=nnx.Rngs({keys})"])
        code = "; ".join([*parts, f"nnx.jit(lambda {name}: {call})({name})"])
        if not samples:
            return code
        many = ", ".join(f"{key}s" for key in samples)
        return f"for {', '.join(samples)} in {many if len(samples) == 1 else f'zip({many})'}:\n    {code}"

    def facts_of_run(
        self, facts: ExportFacts, train: bool | None, fields: Settings, *, kept: Updates, sown: Updates, handed: Updates
    ) -> ExportFacts:
        """The streams that it holds or is handed, the lines around the run that set its mode, and what it handed back."""
        nodes, mode = self.layout.nodes, None
        if train is not None:
            mode = ModeByHand(mode_by_hand(MODULE, nodes, train), back_by_hand(MODULE, nodes, train))
        handed_back = tuple(self._given(handed, sown))
        return replace(facts, nnx=True, held=self.layout.tags, handed=self.gives_rngs, mode=mode, given=handed_back)

    def _given(self, handed: Updates, sown: Updates) -> Iterator[HandedBack]:
        """For each collection that was handed back, the places of its values in the module."""
        for name, tree in handed.items():
            if name in sown:
                leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda part: not isinstance(part, dict))
                steps = [tuple(str(key.key) for key in path) for path, _ in leaves]
                # The nested dicts have text as keys: digits are an index into a list of submodules.
                paths = [tuple(int(step) if step.isdigit() else step for step in path) for path in steps]
                whole = len(sown) == 1 and paths == steps
                yield HandedBack(name, tuple((path, True) for path in paths), sown=True, whole=whole)
            else:
                slots = [slot for slot in self.layout.slots if slot.collection == name and slot.name in tree]
                yield HandedBack(name, tuple((slot.path, slot.holder is None) for slot in slots))


def _about(variable: object) -> str:
    """A Variable's metadata as text, without Flax's defaults and hooks: `sharding_names=(None, 'mlp')`."""
    if not isinstance(variable, nnx.Variable) or isinstance(variable, nnx.RngState):
        return ""
    usual = getattr(type(variable), "required_metadata", ())
    rows = [
        (name, value) for name, value in variable._var_metadata.items() if name not in usual and not callable(value)
    ]
    return ", ".join(f"{name}={value}" for name, value in rows if value not in (None, True, False, ()))


def _shape(value: PyTree) -> str:
    leaves = jax.tree_util.tree_leaves(value)
    return str([(getattr(leaf, "shape", None), str(getattr(leaf, "dtype", type(leaf)))) for leaf in leaves])
