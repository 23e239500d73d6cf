"""What it takes to write a run again as plain Flax: facts alone, neither arrays nor text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import jax

from .arguments import positional_names
from .models.switch import MODULE, Settings, cloned, read_fields, setting_of, written_in_call
from .prepare import Call, prepare_init

if TYPE_CHECKING:
    from .execution import Execution


@dataclass(frozen=True)
class Given:
    """A collection that an NNX run handed back.

    Attributes:
      name: of the variables' type.
      paths: of its values in the module, each with whether a variable holds it.
      sown: they were sown, and are nested by path; others stand under their path as one name.
      whole: it is all that was sown, by names alone.
    """

    name: str
    paths: tuple[tuple[tuple[str | int, ...], bool], ...]
    sown: bool = False
    whole: bool = False


@dataclass(frozen=True)
class Part:
    """A container of an argument, or what is in one.

    Attributes:
      kind: `dict`, `list` or `tuple`; `none`; `data` for what is given to the program, `choice` for a leaf that it is
        made for; `other` for a container of another kind with such a leaf in it.
      inside: keys or places, and what is there.
    """

    kind: str
    inside: tuple[tuple[str | int, Part], ...] = ()

    def has(self, kind: str) -> bool:
        """Whether it is, or has, a part of that kind."""
        return self.kind == kind or any(part.has(kind) for _, part in self.inside)


@dataclass(frozen=True)
class ModeByHand:
    """The statements that set an NNX module's mode, and those that set it back: None where no call of one mode does.

    `MODULE` stands for the module's name.
    """

    to: tuple[str, ...]
    back: tuple[str, ...] | None


@dataclass(frozen=True)
class Spelling:
    """The parts of an apply by hand; an init has those of the init alone.

    Attributes:
      parameters: names of the parameters that the positional arguments are given to.
      static: names of the arguments' leaves that are part of the program: `train`, `batch['flag']`.
      streams: the random streams that the model is given.
      held: those of them that an NNX module holds itself.
      handed: the session makes the call's `rngs` (NNX).
      taken: the run's own `params` key is folded in, since an init took that of the draw.
      arguments: switches that are added to the call.
      nnx: it is a run of an NNX module.
      module: the expression for a linen module with the switches set that are its fields.
      mode: how the mode of an NNX module is set; None where it ran as written.
      mutable: collections that are mutable in a linen run. `kept` are those that become part of the variables.
      sown: whether something was sown.
      axes: mapped axes that are bound around the run.
      init_arguments, init_module: `arguments` and `module` of the init that was part of the run, or is the run.
      init_streams: random streams that it has to be given besides `params`.
      containers: arguments that have such a leaf inside, by name, taken apart.
      returns: what the output has besides arrays: `keys`, `objects`; `parts` where it is a tuple or list.
      given: collections that an NNX run handed back.
      code: a fingerprint of the model's code and of what that reads, None where it has none.
    """

    parameters: tuple[str, ...] = ()
    static: frozenset[str] = frozenset()
    streams: tuple[str, ...] = ()
    held: frozenset[str] = frozenset()
    handed: bool = False
    taken: bool = False
    arguments: Settings = ()
    nnx: bool = False
    module: str = MODULE
    mode: ModeByHand | None = None
    mutable: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()
    sown: bool = False
    axes: tuple[str, ...] = ()
    init_arguments: Settings = ()
    init_module: str = MODULE
    init_streams: tuple[str, ...] = ()
    returns: frozenset[str] = frozenset()
    given: tuple[Given, ...] = ()
    code: bytes | None = None
    containers: tuple[tuple[str, Part], ...] = ()


def of_apply(call: Call, done: Execution) -> Spelling:
    """The spelling of an apply, from its execution."""
    prepared, ask = done.prepared, done.ready.ask
    model: Any = prepared.model
    holds = prepared.model.holds_variables
    arguments = _added(prepared.kwargs, call.kwargs)
    module = MODULE
    if prepared.mode != "as written":
        in_call = {*dict(arguments), *written_in_call(prepared.signature, call.args, call.kwargs)}
        fields = () if holds else tuple(pair for pair in map(setting_of, prepared.switch) if pair[0] not in in_call)
        module = MODULE if holds else cloned(MODULE, model.module, fields)
    init_arguments: Settings = ()
    init_module = MODULE
    if done.made is not None and not holds:
        # With the keys that `--key` adds, and without the switches of the run.
        given = {n: v for n, v in prepared.kwargs.items() if n in call.kwargs or not isinstance(v, bool)}
        init_arguments, init_module = _of_init(replace(call, kwargs=given), done.entry.model)
    written = () if holds else tuple(sorted(done.updates))
    parameters = tuple(positional_names(prepared.signature, len(call.args)))
    static = frozenset(name for name, _ in done.ready.arguments.static)
    passed = [*zip(parameters, call.args, strict=True), *call.kwargs.items()]
    return Spelling(
        parameters=parameters,
        static=static,
        containers=tuple((name, _part(value, name, static)) for name, value in passed if _holds(name, static)),
        streams=tuple(sorted(ask.streams)),
        held=frozenset(model.layout.tags) if holds else frozenset(),
        handed=bool(model.supplies()),
        taken="params (folded)" in done.names,
        arguments=arguments,
        nnx=holds,
        module=module,
        mode=_mode(done.entry.model, prepared.mode == "train") if holds and prepared.mode != "as written" else None,
        mutable=() if holds else tuple(sorted({*written, *done.sown})),
        kept=written,
        sown=bool(done.sown),
        axes=tuple(sorted(ask.axes)),
        init_arguments=init_arguments,
        init_module=init_module,
        init_streams=getattr(done.entry.model, "init_streams", ()),
        returns=_returns(done.output),
        given=tuple(_given(done)) if holds else (),
        code=done.entry.model.code() if holds else done.entry.model.print(),  # type: ignore[attr-defined]
    )


def _mode(model: Any, train: bool) -> ModeByHand:
    from .models.nnx_switch import back_by_hand, mode_by_hand

    nodes = model.layout.nodes
    return ModeByHand(mode_by_hand(MODULE, nodes, train), back_by_hand(MODULE, nodes, train))


def of_init(call: Call, model: Any) -> Spelling:
    """The spelling of the init of a linen model that has run."""
    arguments, module = _of_init(call, model)
    return Spelling(init_arguments=arguments, init_module=module, init_streams=model.init_streams)


def _of_init(call: Call, model: Any) -> tuple[Settings, str]:
    prepared = prepare_init("", model, call)
    before, after = read_fields(model.module), read_fields(prepared.model.module)
    fields = tuple(map(setting_of, after)) if before != after else ()
    return _added(prepared.kwargs, call.kwargs), cloned(MODULE, model.module, fields)


def _holds(name: str, static: frozenset[str]) -> bool:
    return any(leaf.startswith((f"{name}[", f"{name}.")) for leaf in static)


def _part(value: Any, name: str, static: frozenset[str]) -> Part:
    """`value`, whose path is `name`, taken apart as far as there are leaves in it that a program is made for."""
    if value is None:
        return Part("none")
    if name in static:
        return Part("choice")
    if not _holds(name, static):
        return Part("data")
    rows: list[tuple[Any, Any]] = []
    if type(value) is dict and all(type(key) in (str, int) for key in value):
        rows += value.items()
    elif type(value) in (list, tuple):
        rows += enumerate(value)
    kind = type(value).__name__ if rows else "other"
    return Part(kind, tuple((key, _part(inner, f"{name}[{key!r}]", static)) for key, inner in rows))


def _given(done: Execution) -> Iterator[Given]:
    """The collections in the updates of an NNX run that was asked for some."""
    model: Any = done.prepared.model
    if not done.mutable:
        return
    for name, tree in done.output[1].items():
        if name in done.sown:
            leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda part: not isinstance(part, dict))
            steps = [tuple(str(key.key) for key in path) for path, _ in leaves]
            paths = [tuple(int(step) if step.isdigit() else step for step in path) for path in steps]
            whole = len(done.sown) == 1 and paths == steps
            yield Given(name, tuple((path, True) for path in paths), sown=True, whole=whole)
        else:
            slots = [slot for slot in model.layout.slots if slot.collection == name and slot.name in tree]
            yield Given(name, tuple((slot.path, slot.holder is None) for slot in slots))


def _returns(output: Any) -> frozenset[str]:
    found = {"parts"} if type(output) in (tuple, list) else set()
    for leaf in jax.tree_util.tree_leaves(output):
        if not hasattr(leaf, "dtype"):
            found |= set() if isinstance(leaf, (bool, int, float, complex)) else {"objects"}
        elif jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            found.add("keys")
    return frozenset(found)


def _added(now: Mapping[str, Any], written: Mapping[str, Any]) -> Settings:
    """The switches that a call got besides what is written in it."""
    return tuple((name, value) for name, value in now.items() if name not in written and isinstance(value, bool))
