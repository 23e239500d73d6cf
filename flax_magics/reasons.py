"""Why a program is new, in one sentence: what differs from the most similar one that its model has had."""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from .arguments import Arguments
from .compiling import jax_settings, settings_in_words
from .inventory import Inventory, changes, inventory
from .models.switch import WHEN_TRAINING
from .program import KEPT, name_devices
from .run import Cause, describe
from .structure import Structure

REMEMBERED = 16
"""Programs of one model that a new one is held against."""
NAMED = 2
"""Changes that the sentence names; it counts the others."""

FIRST = "first run of this program"


@dataclass(frozen=True)
class Facet:
    """One argument or variable, as far as a program depends on it.

    Attributes:
      kind: `array`, `number` (of Python, traced) or `static`.
      text: `float32[2,4]`, `a Python float`, or the value.
      weak: its dtype gives way to others; `where`: the devices that it was placed on, empty if nobody chose.
    """

    kind: str
    text: str
    shape: tuple[int, ...] = ()
    weak: bool = False
    where: str = ""

    @property
    def dtype(self) -> str:
        """Of an array: `float32`."""
        return self.text.partition("[")[0]


@dataclass(frozen=True)
class Ran:
    """A run, as far as the next one of its model is compared with it: what was called, and each argument's kind."""

    method: tuple[str, ...]
    kinds: Mapping[str, str]
    """An array's is its dtype; `number` and `static` are the others."""
    key: Hashable | None


@dataclass(frozen=True)
class Purpose:
    """What a program was made for.

    Attributes:
      key: of the call, None where that cannot be told.
      edition: fingerprint of the model in its mode.
      structures: how each argument is put together, by the parameter's name.
      held: how the variables are put together.
      options: of the command, as they are written.
      settings: of JAX and Flax, by name; `context`: those of JAX that have no name, too.
    """

    key: Hashable | None
    method: tuple[str, ...]
    mode: str
    edition: bytes | None
    inventory: Inventory
    arguments: Mapping[str, Facet]
    structures: Mapping[str, Structure]
    variables: Mapping[str, Facet]
    held: Structure
    options: Mapping[str, str]
    settings: Mapping[str, Any]
    context: Any
    keys: str


def ran(method: tuple[str, ...], arguments: Arguments, key: Hashable | None) -> Ran:
    """What the next run is compared with."""
    rows = zip(arguments.names, arguments.leaves, arguments.traced, strict=True)
    kinds = {name: str(leaf.dtype) if (kind := _kind(leaf, traced)) == "array" else kind for name, leaf, traced in rows}
    return Ran(method, kinds, key)


def scalars(before: Ran | None, now: Ran) -> dict[str, str]:
    """Arguments that are Python numbers, and were arrays in the model's run before: their dtypes then."""
    if before is None or before.method != now.method:
        return {}
    was = {name: before.kinds.get(name, "static") for name, kind in now.kinds.items() if kind == "number"}
    return {name: kind for name, kind in was.items() if kind not in ("number", "static")}


def purpose(
    key: Hashable | None,
    method: tuple[str, ...],
    mode: str,
    edition: bytes | None,
    module: Any,
    arguments: Arguments,
    variables: Any,
    options: Mapping[str, str],
    keys: str,
) -> Purpose:
    """All that a program was made for, as a person would say it. Some milliseconds for a large model."""
    rows = zip(arguments.names, arguments.leaves, arguments.traced, strict=True)
    leaves, held = jax.tree_util.tree_flatten_with_path(variables)
    parts = [part for which in arguments.treedef.children() for part in which.children()]
    return Purpose(
        key,
        method,
        mode,
        edition,
        inventory(module),
        {name: _facet(leaf, traced) for name, leaf, traced in rows},
        dict(zip(arguments.parameters, map(Structure.of, parts), strict=True)),
        {_leaf_name(path): _facet(leaf, True) for path, leaf in leaves},
        Structure.of(held),
        options,
        settings_in_words(),
        jax_settings(),
        keys,
    )


def compare(known: deque[Purpose], last: Ran | None, now: Purpose) -> tuple[Cause, ...]:
    """What differs between `now` and the one of `known` that is most like it; of equals the one that ran last."""

    def rank(pair: tuple[int, Purpose]) -> tuple[int, int, bool, int]:
        age, old = pair
        ran_last = last is not None and last.key is not None and last.key == old.key
        return int(old.method != now.method), len(_causes(old, now)), not ran_last, -age

    _, nearest = min(enumerate(known), key=rank)
    causes = tuple(_causes(nearest, now))
    if causes:
        return causes
    if now.key is not None and now.key == nearest.key:
        return (Cause("dropped", "", f"made before, and dropped since: the last {KEPT} programs are kept"),)
    if now.edition != nearest.edition:
        return (Cause("model", "", "the model changed"),)
    return (Cause("model", "", "what the model reads changed"),)


def sentence(causes: tuple[Cause, ...]) -> str:
    """The causes in one sentence; without any it is a first run."""
    if not causes:
        return FIRST
    more = len(causes) - NAMED
    return "; ".join([cause.text for cause in causes[:NAMED]] + ([f"and {more} more"] if more > 0 else []))


def remember(known: dict[str, deque[Purpose]], name: str, now: Purpose) -> None:
    """Keeps what a program of the model `name` was made for."""
    known.setdefault(name, deque(maxlen=REMEMBERED)).append(now)


def _causes(old: Purpose, now: Purpose) -> list[Cause]:
    """All that differs, the most telling first."""
    if old.method != now.method:  # its arguments are others altogether
        return [Cause("method", "", f"method: {_method(old)} → {_method(now)}")]
    found = []
    if old.mode != now.mode:
        found.append(Cause("mode", "", f"mode: {old.mode} → {now.mode}"))
    found += _of_model(old, now)
    if _is_changed(old.held, now.held):
        found.append(Cause("variables", "", "the variables: a static field changed"))
    found += _of_arguments(old, now)
    found += _of_pairs("option", old.options, now.options)
    settings = list(_of_pairs("setting", old.settings, now.settings))
    if not settings and old.context != now.context:
        settings.append(Cause("setting", "", "a context of JAX's is another: a mesh, metadata or the like"))
    found += settings
    if old.keys != now.keys:
        found.append(Cause("keys", "", f"keys: {old.keys} → {now.keys}"))
    return found


def _method(one: Purpose) -> str:
    return ".".join(one.method) or "the call"


def _of_pairs(kind: str, old: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[Cause]:
    for name in dict.fromkeys([*old, *now]):
        before, after = old.get(name), now.get(name)
        if before is not after and before != after:
            one, other = str("none" if before is None and kind == "option" else before), str(after)
            yield Cause(kind, name, f"{name}: {one} → {other}" if one != other else f"{name}: {one}, which changed")


def _of_model(old: Purpose, now: Purpose) -> Iterator[Cause]:
    """The model itself, and its variables' shapes, which follow from it."""
    found = changes(_without_switches(old, now), _without_switches(now, old))
    leaves = list(_of_leaves(old.variables, now.variables))
    edited = old.edition != now.edition
    if found and leaves and all(" → " not in text for text in found):
        found[-1] = f"{found[-1]}: {_some(leaves)}"
    elif leaves and not found:
        found = [f"{'the model' if edited else 'the variables'} changed: {_some(leaves)}"]
    kind = "model" if edited or not leaves else "variables"
    yield from (Cause(kind, "", text) for text in found)


def _without_switches(one: Purpose, other: Purpose) -> Inventory:
    """The inventory; where the mode differs, without the switches that the mode sets."""
    if one.mode == other.mode:
        return one.inventory
    return {name: piece for name, piece in one.inventory.items() if name.rpartition(".")[2] not in WHEN_TRAINING}


def _of_leaves(old: Mapping[str, Facet], now: Mapping[str, Facet]) -> Iterator[str]:
    for name in dict.fromkeys([*old, *now]):
        before, after = old.get(name), now.get(name)
        if before == after:
            continue
        if before is None or after is None:
            yield f"{name} {'added' if before is None else 'removed'}"
            continue
        one, other = _pair(before, after)
        if before.text != after.text and before.dtype == after.dtype:
            one, other = (text[text.index("[") :] for text in (one, other))
        elif before.text != after.text and before.shape == after.shape:
            one, other = before.dtype, after.dtype
        yield f"{name} {one}→{other}"


def _some(texts: list[str]) -> str:
    return texts[0] + (f" and {len(texts) - 1} more" if len(texts) > 1 else "")


def _of_arguments(old: Purpose, now: Purpose) -> Iterator[Cause]:
    found = False
    for name in dict.fromkeys([*old.arguments, *now.arguments]):
        before, after = old.arguments.get(name), now.arguments.get(name)
        if before == after or (name in WHEN_TRAINING and old.mode != now.mode):
            continue
        found = True
        if before is None or after is None:
            yield Cause("given", name, f"{name}: {'not given before' if before is None else 'given before'}")
            continue
        one, other = _pair(before, after)
        text = f"{name}: {one} → {other}"
        if before.kind == after.kind == "array":
            yield Cause(_what(before, after), name, text, (before.shape, after.shape), (before.dtype, after.dtype))
        else:
            yield Cause(_what(before, after), name, text)
    for name, structure in now.structures.items():
        if _is_changed(old.structures.get(name), structure):
            found = True
            yield Cause("structure", name, f"{name}: a static field changed")
    if not found and old.structures != now.structures and old.mode == now.mode:
        yield Cause("structure", "", "the arguments are put together in another way")


def _is_changed(old: Structure | None, now: Structure) -> bool:
    """Whether static data is other than it was in a tree that is put together alike."""
    return old is not None and old.contents != now.contents and old.size == now.size


def _what(before: Facet, after: Facet) -> str:
    if "static" in (before.kind, after.kind):
        return "static"
    if before.kind != after.kind or before.kind == "number":
        return "number"
    if before.shape != after.shape:
        return "shape"
    if before.text != after.text:
        return "dtype"
    return "weak" if before.weak != after.weak else "placed"


def _pair(before: Facet, after: Facet) -> tuple[str, str]:
    """Both as they are written, without what they have in common."""
    one, other = before.text, after.text
    if before.weak != after.weak and before.kind == after.kind:
        one, other = (text + " (weak type)" * facet.weak for text, facet in ((one, before), (other, after)))
    if before.where != after.where:
        one, other = (
            text + (f" on {facet.where}" if facet.where else "") for text, facet in ((one, before), (other, after))
        )
    return one, other


def _kind(leaf: Any, traced: bool) -> str:
    return "static" if not traced else "array" if hasattr(leaf, "dtype") else "number"


def _facet(leaf: Any, traced: bool) -> Facet:
    kind = _kind(leaf, traced)
    if kind == "static":
        return Facet(kind, describe(leaf))
    if kind == "number":
        return Facet(kind, f"a Python {type(leaf).__name__}", weak=True)
    if isinstance(leaf, (np.ndarray, np.generic)):
        return Facet(kind, describe(leaf), leaf.shape)
    committed = getattr(leaf, "committed", getattr(leaf, "_committed", False))
    where = _where(leaf.sharding) if committed else ""
    return Facet(kind, describe(leaf), leaf.shape, bool(getattr(leaf, "weak_type", False)), where)


def _where(sharding: Any) -> str:
    devices = name_devices(sharding.device_set)
    spec = getattr(sharding, "spec", None)
    return devices if len(sharding.device_set) == 1 or spec is None else f"{devices} as P{tuple(spec)}"


def _leaf_name(path: Any) -> str:
    name: str = jax.tree_util.keystr(path, simple=True, separator="/")
    return name.removeprefix("params/").removeprefix("Param/")
