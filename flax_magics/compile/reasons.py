"""Why a program had to be compiled, in one sentence; and a note where a model is compiled again and again."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp
from msgspec.structs import replace

from ..base.digest import describe
from ..base.measures import name_devices
from ..base.types import Leaf
from ..code.contents import Structure, static_fields
from ..code.inventory import Inventory, changes, inventory, values
from ..line.expression import Line, changed
from ..models.calls import Arguments
from ..models.switch import WHEN_TRAINING
from ..run import Cause, Note
from .cache import KEPT, BuiltProgram, LastCall, LeafSpec, ProgramCache, ProgramSpec
from .disk_cache import jax_settings, settings_in_words
from .placement import Placement
from .trace import TraceRequest

REMEMBERED = 16
"""The number of a model's last programs with which a new one is compared."""
NAMED = 2
"""The most changes that the sentence names; the others are counted."""

T = TypeVar("T")
Causes = tuple[Cause, ...]

FIRST = "first run of this program"
RESUMED = "begun by the run that was interrupted"


def ran(method: tuple[str, ...], arguments: Arguments, key: Hashable | None) -> LastCall:
    """The LastCall of this run, for comparison with the model's next run."""
    kinds = {
        name: str(leaf.dtype) if (kind := _kind(leaf, traced)) == "array" else kind
        for name, leaf, traced in arguments.rows
    }
    return LastCall(method, kinds, key)


def scalars(before: LastCall | None, now: LastCall) -> dict[str, str]:
    """Argument that is a Python number now and was an array in the model's last run → its dtype then."""
    if before is None or before.method != now.method:
        return {}
    was = {name: before.kinds.get(name, "static") for name, kind in now.kinds.items() if kind == "number"}
    return {name: kind for name, kind in was.items() if kind not in ("number", "static")}


def purpose(key: Hashable | None, request: TraceRequest) -> ProgramSpec:
    """The ProgramSpec of a program. Takes some milliseconds for a large model, so only new programs get one."""
    model, arguments = request.model, request.arguments
    leaves, held = jax.tree_util.tree_flatten_with_path(request.variables)
    parts = [part for which in arguments.treedef.children() for part in which.children()]
    options = {
        "--mutable": ", ".join(sorted(request.mutable)),
        "--samples": "" if request.draw.size is None else str(request.draw.size),
        "--key": ", ".join(sorted(request.keyed)),
        "%flax_mesh": "" if request.placement is None else request.placement.axes,
    }
    return ProgramSpec(
        key=key,
        method=request.method,
        mode=request.mode,
        edition=model.fingerprint(),
        inventory=inventory(model.module),
        arguments={name: _leaf_spec(leaf, traced) for name, leaf, traced in arguments.rows},
        structures=dict(zip(arguments.parameters, map(Structure.of, parts), strict=True)),
        # Where a mesh is used, that it is tells it all.
        variables={_variable(path): _leaf_spec(leaf, True, on=request.placement) for path, leaf in leaves},
        held=Structure.of(held),
        static={
            name: values(static_fields(part, name)) for name, part in zip(arguments.parameters, parts, strict=True)
        },
        held_static=values((_variable_name(place), value) for place, value in static_fields(held, "")),
        options={name: value for name, value in options.items() if value},
        settings=settings_in_words(),
        context=jax_settings(),
        keys=request.draw.impl,
    )


def _variable(path: tuple[object, ...]) -> str:
    """A variable's path with slashes; the collection is left out if it is `params` or `Param`."""
    return re.sub("^(params/)?(Param/)?", "", jax.tree_util.keystr(path, simple=True, separator="/"))


def _variable_name(place: str) -> str:
    """`['params']['Dense_0']['kernel'].names` as a variable's path is written: `Dense_0/kernel.names`."""
    return re.sub("^(params/)?(Param/)?", "", re.sub(r"\['([^']*)'\]", r"/\1", place).removeprefix("/"))


def compare(known: deque[ProgramSpec], last: LastCall | None, now: ProgramSpec) -> Causes:
    """The differences between `now` and the most similar program in `known`; of equals the one that ran last."""

    def rank(pair: tuple[int, ProgramSpec]) -> tuple[int, int, bool, int]:
        age, old = pair
        ran_last = last is not None and last.key is not None and last.key == old.key
        return int(old.method != now.method), len(_causes(old, now)), not ran_last, -age

    _, nearest = min(enumerate([*known]), key=rank)  # a copy: another thread may add one
    causes = tuple(_causes(nearest, now))
    if causes:
        return causes
    if now.key is not None and now.key == nearest.key:
        return (Cause("dropped", "", f"made before, and dropped since: the last {KEPT} programs are kept"),)
    # The inventories show no difference, but the program is new: something changed that they do not list.
    changed = "the model" if now.edition != nearest.edition else "what the model reads"
    return (Cause("model", "", f"{changed} changed"),)


def sentence(causes: Causes) -> str:
    """The causes in one sentence; `FIRST` if there are none."""
    texts, more = [cause.text for cause in causes[:NAMED]], len(causes) - NAMED
    if all(text.startswith("now with --") and " instead " not in text for text in texts) and len(texts) > 1:
        texts = [" and ".join([texts[0], *(text.removeprefix("now with ") for text in texts[1:])])]
    return "; ".join([*texts, f"and {more} more"] if more > 0 else texts) or FIRST


def explained(programs: ProgramCache, built: BuiltProgram, *, new: bool) -> BuiltProgram:
    """Completes `built` with the reasons why it is new, by comparison with the model's earlier ones; records it.

    Args:
      new: the call was not in the cache, so that it was traced.
    """
    request = built.request
    last_call, this_call = programs.parts.get(request.name), ran(request.method, request.arguments, built.key)
    programs.parts[request.name] = this_call
    causes: Causes = ()
    reason = ""
    if new:
        spec, known = purpose(built.key, request), programs.purposes.get(request.name)
        if built.origin == "compiled":  # one from the disk cache is new to this process only
            causes = compare(known, last_call, spec) if known else ()
            reason = sentence(causes) + (f"; {RESUMED}" if built.resumed else "")
        programs.purposes.setdefault(request.name, deque(maxlen=REMEMBERED)).append(spec)
    return replace(built, reason=reason, causes=causes, scalars=scalars(last_call, this_call))


def _causes(old: ProgramSpec, now: ProgramSpec) -> list[Cause]:
    """All differences between two programs, the most telling first."""
    if old.method != now.method:  # arguments of different methods cannot be compared
        names = {(): "the call", ("loss()",): "a loss"}
        before, after = (names.get(spec.method, ".".join(spec.method)) for spec in (old, now))
        return [Cause("method", "", f"method: {before} → {after}")]
    causes = []
    if old.mode != now.mode:
        modes = ("" if mode == "as written" else f"--{mode}" for mode in (old.mode, now.mode))
        causes.append(Cause("mode", "", _of_option("", *modes)))
    causes += _of_model(old, now)
    fields = _of_static("the variables", old.held_static, now.held_static, changed=_is_changed(old.held, now.held))
    causes += (Cause("variables", "", text) for text in fields)
    causes += _of_arguments(old, now)
    for name, value_before, value in _changed(old.options, now.options):
        causes.append(Cause("option", name, _of_option(f"{name} ", value_before or "", value or "")))
    settings = list(_of_settings(old.settings, now.settings))
    if not settings and old.context != now.context:  # a setting without a name
        settings.append(Cause("setting", "", "a context of JAX's is another: a mesh, metadata or the like"))
    causes += settings
    if old.keys != now.keys:
        causes.append(Cause("keys", "", f"keys: {old.keys} → {now.keys}"))
    return causes


def _changed(old: Mapping[str, T], now: Mapping[str, T]) -> Iterator[tuple[str, T | None, T | None]]:
    """(name, old value, new value) of each name whose values differ; None for a missing one."""
    rows = ((name, old.get(name), now.get(name)) for name in dict.fromkeys([*old, *now]))
    return ((name, before, after) for name, before, after in rows if before is not after and before != after)


def _of_static(whose: str, old: Inventory, now: Inventory, *, changed: bool) -> list[str]:
    """The static fields that are there as before and have other values; `changed` where one is known to that has no name."""
    texts = changes({name: old[name] for name in old if name in now}, {name: now[name] for name in now if name in old})
    return texts or ([f"{whose}: a static field changed"] if changed else [])


def _of_option(flag: str, before: str, after: str) -> str:
    """`now with --train instead of --eval`, `now with --repeat 3 instead of 2`; empty is what was not given."""
    if not after:
        return f"now without {flag}{before}"
    return f"now with {flag}{after}" + (f" instead of {before}" if before else "")


def _of_settings(old: Mapping[str, object], now: Mapping[str, object]) -> Iterator[Cause]:
    """Differences between settings, which have a name and a value each."""
    for name, before, after in _changed(old, now):
        one, other = str(before), str(after)
        yield Cause("setting", name, f"{name}: {one} → {other}" if one != other else f"{name}: {one}, which changed")


def _of_model(old: ProgramSpec, now: ProgramSpec) -> Iterator[Cause]:
    """Changes of the model itself and of the shapes of its variables, which follow from it."""
    texts = changes(_without_switches(old, now), _without_switches(now, old))
    leaves = list(_of_leaves(old.variables, now.variables))
    edited = old.edition != now.edition
    some = "".join(leaves[:1]) + (f" and {len(leaves) - 1} more" if len(leaves) > 1 else "")
    # `Net was edited` says little by itself: a changed leaf shows the effect.
    if texts and leaves and all(" → " not in text for text in texts):
        texts[-1] = f"{texts[-1]}: {some}"
    elif leaves and not texts:
        texts = [f"{'the model' if edited else 'the variables'} changed: {some}"]
    kind = "model" if edited or not leaves else "variables"
    yield from (Cause(kind, "", text) for text in texts)


def _without_switches(one: ProgramSpec, other: ProgramSpec) -> Inventory:
    """The inventory of `one`, without the switches if the modes differ: those are told as the change of mode."""
    if one.mode == other.mode:
        return one.inventory
    return {name: piece for name, piece in one.inventory.items() if name.rpartition(".")[2] not in WHEN_TRAINING}


def _of_leaves(old: Mapping[str, LeafSpec], now: Mapping[str, LeafSpec]) -> Iterator[str]:
    """Differences between leaves of the variables, as `kernel [4,3]→[4,5]`, with only the part that differs."""
    for name, before, after in _changed(old, now):
        if before is None or after is None:
            yield f"{name} {'added' if before is None else 'removed'}"
            continue
        if before.text == after.text:
            yield f"{name} {' and '.join(_in_words(before, after))}"
            continue
        one, other = _pair(before, after)
        if before.dtype == after.dtype:
            one, other = (text[text.index("[") :] for text in (one, other))
        elif before.shape == after.shape:
            one, other = before.dtype, after.dtype
        yield f"{name} {one}→{other}"


def _of_arguments(old: ProgramSpec, now: ProgramSpec) -> Iterator[Cause]:
    """Differences between arguments; switches that follow from another mode are left out."""
    differs = False
    for name, before, after in _changed(old.arguments, now.arguments):
        if name in WHEN_TRAINING and old.mode != now.mode:
            continue
        differs = True
        if before is None or after is None:
            yield Cause("given", name, f"{name}: {'not given before' if before is None else 'given before'}")
            continue
        one, other = _pair(before, after)
        are_arrays = before.kind == after.kind == "array"
        types = ((before.shape, after.shape), (before.dtype, after.dtype)) if are_arrays else ()
        text = f"{one} → {other}"
        if are_arrays and before.text == after.text:
            text = f"{after.text}, {' and '.join(_in_words(before, after))}"
        yield Cause(_what(before, after), name, f"{name}: {text}", *types)
    for name, structure in now.structures.items():
        is_changed = _is_changed(old.structures.get(name), structure)
        texts = _of_static(name, old.static.get(name, {}), now.static[name], changed=is_changed)
        differs = differs or bool(texts)
        yield from (Cause("structure", name, text) for text in texts)
    if not differs and old.structures != now.structures and old.mode == now.mode:
        yield Cause("structure", "", "the arguments are put together in another way")


def _is_changed(old: Structure | None, now: Structure) -> bool:
    """Whether two trees of the same size have different static data: a change inside, not another structure."""
    return old is not None and old.contents != now.contents and old.size == now.size


def _what(before: LeafSpec, after: LeafSpec) -> str:
    """The kind of a `Cause` for an argument that differs, the most telling property first."""
    if "static" in (before.kind, after.kind):
        return "static"
    if before.kind != after.kind or before.kind == "number":
        return "number"
    if before.shape != after.shape:
        return "shape"
    if before.text != after.text:
        return "dtype"
    return "weak" if before.weak != after.weak else "placed"


def _in_words(before: LeafSpec, after: LeafSpec) -> Iterator[str]:
    """What is other about an array of the same dtype and shape."""
    if before.weak != after.weak:
        yield "weakly typed now" if after.weak else "not weakly typed any more"
    if before.where and after.where and before.where != after.where:
        yield f"moved from {before.where} to {after.where}"
    elif before.where != after.where:
        yield f"put on {after.where} now" if after.where else f"not put on {before.where} any more"
    elif before.sharding != after.sharding:  # over another mesh, or in another memory
        yield f"placed otherwise on {after.where}"


def _pair(before: LeafSpec, after: LeafSpec) -> tuple[str, str]:
    """Both as text; weak type and devices are mentioned only where they differ."""
    weak = before.weak != after.weak and before.kind == after.kind

    def written(spec: LeafSpec) -> str:
        place = f" on {spec.where}" if spec.where and before.where != after.where else ""
        return spec.text + (" (weak type)" if weak and spec.weak else "") + place

    return written(before), written(after)


def _kind(leaf: Leaf, traced: bool) -> str:
    return "static" if not traced else "array" if hasattr(leaf, "dtype") else "number"


def _leaf_spec(leaf: Leaf, traced: bool, on: Placement | None = None) -> LeafSpec:
    """The LeafSpec of an argument leaf or variable; without its place, if it lies on the mesh of the session."""
    kind = _kind(leaf, traced)
    if kind == "static":
        return LeafSpec(kind, describe(leaf))
    if kind == "number":
        return LeafSpec(kind, f"a Python {type(leaf).__name__}", weak=True)
    where, sharding = "", None
    if getattr(leaf, "committed", False) and not (on is not None and on.holds(leaf)):
        sharding = leaf.sharding
        devices, spec = sharding.device_set, getattr(sharding, "spec", None)
        where = name_devices(devices)
        if len(devices) > 1 and spec is not None:
            where += f" as P({', '.join(map(repr, spec))})"
    return LeafSpec(kind, describe(leaf), leaf.shape, bool(getattr(leaf, "weak_type", False)), where, sharding)


WINDOW = 10
"""The number of a model's last runs that are considered."""
NEW = 3
"""The number of compiled programs among them from which on there is a note."""

AVOIDABLE = ("shape", "dtype", "weak", "number", "static")
"""Kinds of causes that a user can avoid. Modes, methods and settings have programs side by side; edits are meant."""


def of_programs(
    line: Line, causes: Causes, earlier: Sequence[tuple[str, Causes]], leaf: Callable[[str], Leaf]
) -> Iterator[Note]:
    """At most one note, on a run that is one of many that had to compile.

    Args:
      line: the line of the run, for the advice.
      causes: why this run's program is new; empty where it is not, or where it is the model's first.
      earlier: (origin of the program, why it was new) of the runs before, newest first.
      leaf: returns an argument leaf of this run by its name, None where there is none.
    """
    name = re.split(r"\W", line.call, maxsplit=1)[0]
    avoidable = [cause for cause in causes if cause.kind in AVOIDABLE]
    if not avoidable or _of_another(causes):
        return
    runs = [("compiled", causes)]
    for run in earlier[: WINDOW - 1]:
        runs.append(run)
        if _of_another(run[1]):
            break
    compiled = [why for program, why in runs if program == "compiled"]
    # The model's first program counts, too: it has no causes, or the edit of the model.
    counted = [why for why in compiled if not why or _of_another(why) or any(cause.kind in AVOIDABLE for cause in why)]
    if len(counted) < NEW:
        return
    name_of, kind = avoidable[0].name, avoidable[0].kind
    whys = [cause for why in counted if not _of_another(why) for cause in why]
    all_of = [cause for cause in whys if cause.name == name_of and cause.kind in AVOIDABLE]
    mend = _advice(name_of, kind, all_of, leaf(name_of))
    if mend is not None:
        text, change = mend
        advice = change if isinstance(change, dict) else changed(line, name_of, change)
        yield Note("programs", f"{len(counted)} of the last {len(runs)} runs of {name} compiled: {text}", **advice)


def _of_another(why: Causes) -> bool:
    """Whether the model was edited or replaced, so that earlier runs say nothing about it."""
    return any(cause.kind == "model" for cause in why)


def _advice(
    name: str, kind: str, causes: list[Cause], leaf: Leaf
) -> tuple[str, dict[str, str] | Callable[[str], str]] | None:
    """(What varies, what to write instead), or None where no advice helps.

    What to write is advice for a note, or a function from the argument's text to its replacement.
    """
    if kind == "shape":
        return _of_shapes(name, {shape for cause in causes for shape in cause.shapes}, leaf.shape)
    if kind == "static":
        if type(leaf) is not int:  # a bool or string chooses between programs on purpose
            return None
        text = f"the model needs the value of `{name}`, and each value is a program of its own"
        return text, {"edit": f"jax.lax.fori_loop(0, {name}, …) for range({name}), jnp.where for if"}
    dtypes = sorted({dtype for cause in causes for dtype in (cause.dtypes or re.findall(r"(\w+)\[", cause.text))})
    try:
        dtype = jnp.result_type(*dtypes).name if dtypes else "float32"
    except TypeError:  # typed keys have no common dtype with numbers
        return None
    if kind == "number":
        text = f"`{name}` is an array in one run and a Python number in another, and each kind is a program of its own"
    else:
        weak = any(cause.kind == "weak" or "(weak type)" in cause.text for cause in causes)
        listed = ", ".join([*dtypes, *(["weak types too"] if weak else [])])
        text = f"the dtype of `{name}` varies ({listed}), and each is a program of its own"
    return text, lambda argument: f"jnp.asarray({argument}, '{dtype}')"


def _of_shapes(
    name: str, shapes: set[tuple[int, ...]], now: tuple[int, ...]
) -> tuple[str, Callable[[str], str]] | None:
    """The advice for an argument whose shape varies: reshape, or pad to the largest size of each axis.

    Where `now`, this run's shape, is the largest so far, only the user knows what is still to come.
    """
    ranks = {len(shape) for shape in shapes}
    if len(ranks) > 1 or ranks == {0}:
        text = f"the number of axes of `{name}` varies, and each is a program of its own"
        return text, lambda argument: f"jnp.reshape({argument}, …)"
    longest = [max(sizes) for sizes in zip(*shapes, strict=True)]
    varies = [len(set(sizes)) > 1 for sizes in zip(*shapes, strict=True)]
    largest = list(now) == longest

    def padded(argument: str) -> str:
        sizes = [f"{argument}.shape[{axis}]" if axis else f"len({argument})" for axis in range(len(longest))]
        pads = ", ".join(
            f"(0, {'…' if largest else most} - {size})" if varied else "(0, 0)"
            for most, size, varied in zip(longest, sizes, varies, strict=True)
        )
        return f"jnp.pad({argument}, [{pads}])"

    if varies[0] and not any(varies[1:]):
        sizes = ", ".join(map(str, sorted({shape[0] for shape in shapes})))
        text = f"the batch size of `{name}` varies ({sizes}), and each size is a program of its own: "
        smaller = "leave out the last batch, which is smaller, or pad it"
        return text + ("pad to the largest that is to come" if largest else smaller), padded
    return f"the shape of `{name}` varies, and each shape is a program of its own: what is padding takes a mask", padded
