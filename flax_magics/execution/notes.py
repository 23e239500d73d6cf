"""The sharp bits that every run is searched for; each is a note of one line, with the line that mends it."""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Iterator, Mapping

import jax
import numpy as np

from ..base.digest import data_of, is_key, is_spread, may_be_key
from ..base.output import has_nan
from ..base.text import join
from ..base.types import Leaf
from ..errors import nearest, written
from ..line.expression import Line, as_array, new_key
from ..line.options import ApplyOptions
from ..models.base import CallTrace, KeyUse
from ..models.calls import Arguments, Path
from ..models.switch import WHEN_TRAINING, Layer, following, setting_of, written_in_call
from ..rng.keys import SeenKeys
from ..run import RELEASED, Note, Run
from ..state.weights import FOR_THIS_RUN, Collections
from .call import BoundCall

KNOWN_STREAMS = ("params", "dropout", "default")

INITIALISED = ("kernel", "bias", "scale", "embedding")
"""Parameters whose initializer is set on Flax's layers by an argument `NAME_init`."""

OUTDATED = Note("outdated", "variables from before the edit: %flax_init for new ones")


def outdated_own(name: str) -> Note:
    """The same note for an NNX module that the user's own code built: only that code can build it again."""
    text = "variables from before the edit: its cell again after `del` gives new ones"
    return Note("outdated", text, write=f"del {name}")


def of_mode(name: str, prepared: BoundCall, mode: str, record: CallTrace, *, loss: str = "") -> Iterator[Note]:
    """Notes that a mode did not take: all layers of a kind (dropout, norm) behave the other way, or there is no switch.

    Where other layers obey, one that does not is meant to be so (a frozen backbone), unless a literal beside a switch
    of its own sets it.

    Args:
      name: the model's.
      mode: the mode that the run was in: what was asked for, or `as written` if nothing was set.
      loss: the name of the loss that calls the model, if one does: then nobody has asked for training.
    """
    asked = prepared.mode
    if asked not in ("train", "eval"):
        return
    training = asked == "train"
    set_by_loss = () if record.structure is None else record.structure.others
    for name in [name for name in set_by_loss if loss and name.rpartition(".")[2] in WHEN_TRAINING][:1]:
        yield Note(
            "switch", f"`{loss}` sets `{name}` of the net, and so does the command: leave out `.eval()` and `.train()`"
        )
        return
    obeyed = any(layer.training is training for layer in record.layers)
    wrong: dict[str, list[Layer]] = {}
    for kind in ("dropout", "norm"):
        layers = [layer for layer in record.layers if layer.kind == kind]
        if any(layer.training is training for layer in layers):
            continue
        of_kind = [layer for layer in layers if not obeyed or (layer.source.literal and layer.own_switch)]
        wrong |= {kind: of_kind} if of_kind else {}
    if mode != asked and not wrong and not loss:
        yield Note("mode", f"{name} has no train switch: --{asked} changed nothing")
    links = {layers[0].link for layers in wrong.values()}
    together = len(links) == 1 and None not in links  # one edit mends both kinds
    for kinds in [wrong] if together else [{kind: layers} for kind, layers in wrong.items()]:
        yield _wrong_mode(kinds, training, loss)


def _wrong_mode(kinds: Mapping[str, list[Layer]], training: bool, loss: str) -> Note:
    option = "--train" if training else "--eval"
    in_evaluation = {"dropout": "off", "norm": "using running averages"}
    in_training = {"dropout": "on", "norm": "using the batch's own statistics"}
    states = []
    for kind, layers in kinds.items():
        are = "is" if len(layers) == 1 else f"and {len(layers) - 1} more are"
        states.append(f"{join(layers[0].path)} {are} {(in_evaluation if training else in_training)[kind]}")
    (kind, (first, *_)), link = next(iter(kinds.items())), next(iter(kinds.values()))[0].link
    what = " and ".join(states) + (" in training" if loss and training else f" although {option} was asked")
    place, at = (first.owner, first) if link is None else (link.caller, link)
    if at.source.literal:
        why = f"{at.switch}={at.value} is fixed in {place}"
    elif at.source.text:
        why = f"{at.switch} was {at.value}, from `{at.source.text}` in {place}"
    elif link is not None:
        why = f"{place} calls `{link.text}` without `{link.switch}`"
    else:
        why = f"{at.switch} was {at.value} in {place}"
    if link is not None:
        kind, where = (kind, "model") if link.in_model else ("switch", "loss")
        return Note(kind, f"{what}: {why}", edit=link.edit, where=where)
    edit = following(first.switch, first.own_switch, first.method)
    # Where it is written so already, it is not known what keeps the switch from the layer.
    return Note(kind, f"{what}: {why}", edit=None if edit == f"{first.switch}={first.source.text}" else edit)


def of_streams(record: CallTrace, told: Container[str]) -> Iterator[Note]:
    """Notes streams that Flax's layers do not use, each once: Flax accepts a mistyped `rng_collection` in silence."""
    for name, paths in record.asked.items():
        if name in KNOWN_STREAMS or name in told:
            continue
        where = join(paths[0]) + (f" and {len(set(paths)) - 1} more" if len(set(paths)) > 1 else "")
        close = nearest(name, KNOWN_STREAMS, 1)
        asked = f"the stream `{name}` is asked for by {where}"
        if close:
            yield Note("stream", f"{asked}: is `{close[0]}` meant?", edit=f"'{close[0]}' for '{name}'")
        else:
            yield Note("stream", f"{asked}: it gets a key of its own from the draw")


def of_params(variables: Collections) -> Iterator[Note]:
    """Notes freshly initialised params that hold NaN, or that are all zero.

    Zero biases are usual, so the zero leaves must have a weight of two dimensions or more among them.
    """
    zero, weight = True, ""
    for path, leaf in jax.tree_util.tree_flatten_with_path(variables.get("params", {}))[0]:
        # It is no array, or another process holds parts of it: it cannot be read here.
        if not isinstance(leaf, jax.Array) or is_spread(leaf):
            return
        if not jax.numpy.issubdtype(leaf.dtype, jax.numpy.inexact):
            continue
        # On a CPU NumPy reads the array in place; JAX would compile the comparison.
        on_host = all(device.platform == "cpu" for device in leaf.devices())
        values: Leaf = np.asarray(leaf) if on_host else leaf
        names = [str(getattr(key, "key", getattr(key, "name", ""))) for key in path]
        # Only NaN differs from itself.
        if bool((values != values).any()):
            text = f"{join(names)} holds NaN after init: look at its initializer"
            yield Note("nan params", text, edit=_initializer(names, values.ndim))
            return
        zero = zero and not bool((values != 0).any())
        if values.ndim >= 2 and not weight:
            weight = _initializer(names, values.ndim)
    if zero and weight:
        text = "all params are zero after init: the layers compute the same, and get the same gradients"
        yield Note("zero params", text, edit=weight)


def _initializer(path: list[str], ndim: int) -> str:
    """Code that sets a parameter's initializer: with `NAME_init=` for Flax's layers, bare for the user's own."""
    name = path[-1] if path else "kernel"
    initializer = {"bias": "zeros", "scale": "ones"}.get(name, "lecun_normal()" if ndim >= 2 else "normal()")
    return f"{name}_init=" * (name in INITIALISED) + f"jax.nn.initializers.{initializer}"


def of_samples(bound: BoundCall, options: ApplyOptions, record: CallTrace, line: Line) -> Iterator[Note]:
    """Samples that are all the same, because no key went into them: with dropout that is off, the line that turns it on."""
    if record.asked or not record.unused.issuperset(options.key):
        return
    text = f"the {options.samples} samples are the same: no key is used in this run"
    off = [layer for layer in record.layers if layer.kind == "dropout" and not layer.training]
    evaluating = [
        name for name, value in map(setting_of, bound.switch) if value is not WHEN_TRAINING[name.rpartition(".")[2]]
    ]
    if bound.mode == "train" and off:  # which is said, with what to write
        yield Note("samples", text)
    elif "dropout" in record.queried or (evaluating and (off or not record.layers)):
        training = line
        for name in written_in_call(bound.signature, bound.call.args, bound.call.kwargs).keys() & set(evaluating):
            training = training.with_argument(name, str(WHEN_TRAINING[name])) or training
        if training == line:
            command = line.without_option("--eval").command
            training = line._replace(command=command.replace("flax_apply", "flax_apply --train", 1))
        yield Note("samples", text, **written(str(training)))
    elif off:
        yield Note("samples", text, edit=following(off[0].switch, off[0].own_switch, off[0].method))
    else:
        yield Note("samples", text, **written(str(line.without_option("--samples", "[0-9]+"))))


def of_scalars(dtypes: Mapping[str, str], line: Line) -> Iterator[Note]:
    """Notes arguments that are Python numbers where an array was before: each of the two kinds compiles a program."""
    for name, dtype in dtypes.items():
        text = f"`{name}` is a Python number where an array was before: that is another program"
        yield Note("scalar", text, **as_array(line, name, dtype))


def of_unused(switch: Iterable[str], keys: Iterable[str], unused: Container[str], line: Line) -> Iterator[Note]:
    """Notes keys in the call that the program does not read, except in evaluation mode, where that is expected."""
    for setting in switch:
        path, _, value = setting.partition("=")
        name = path.rpartition(".")[2]
        if name in WHEN_TRAINING and value != str(WHEN_TRAINING[name]):
            return
    for name in keys:
        if name in unused:
            text = f"the key `{name}` is passed, and nothing in the model uses it"
            parameter = line.signature.parameters.get(name)
            optional = parameter is None or parameter.default is not parameter.empty
            shorter = line.without_option("--key", name)
            if shorter == line:
                shorter = line.with_argument(name, None) or line
            used = {"edit": f"jax.random.normal({name}, …)"}
            yield Note("unused key", text, **(written(str(shorter)) if optional and shorter != line else used))


def of_mutable(asked: Iterable[str], known: Iterable[str], line: Line) -> Iterator[Note]:
    """Notes names in `--mutable` that are no collection of the model: Flax silently returns nothing for these.

    Args:
      asked: names that the line has; `known`: collections of the variables, and of what the run wrote or sowed.
    """
    known = sorted(known)
    for name in asked:
        if name not in known:
            has = f"it has {', '.join(known)}" if known else "it has none"
            near = nearest(name.replace("_", ""), known, 1)
            text = f"--mutable {name} hands back nothing: the model has no collection of this name; {has}"
            corrected = line.without_option("(?:--mutable|-m)", name)
            if near and near[0] not in asked:
                corrected = corrected._replace(command=f"{corrected.command} --mutable {near[0]}")
            yield Note("mutable", text, **written(str(corrected)))


def with_notes_of_output(run: Run) -> Run:
    """The run, with a note if its output holds NaN and no other note says so. Reads the whole output."""
    if any(note.kind in ("nan", "nan params") for note in run.notes) or not any(values.nan for values in run.values):
        return run
    text = f"the output of {run.model} holds NaN"
    from_input = run.inputs is not RELEASED and has_nan(run.inputs)
    note = Note("nan", f"{text}, and so does its input") if from_input else Note("nan", text, **_finding_nan(run))
    return run.with_notes((*run.notes, note))


def _finding_nan(run: Run) -> dict[str, str]:
    """The line that runs it again, op by op, up to the operation that makes NaN; empty where no line can repeat it."""
    added = {} if run.inputs is RELEASED else run.inputs[1]
    # Beyond the mode's switches, an argument that is not in the call's text was passed by `--key`.
    by_key = any(name not in WHEN_TRAINING and f"{name}=" not in run.call for name in added)
    # A loss that holds NaN says where it comes from; here only a metric can hold some.
    if by_key or run.inputs is RELEASED or run.samples is not None or run.weights == FOR_THIS_RUN or run.kind.loss:
        return {}
    mode = f"--{run.mode} " if run.mode in ("train", "eval") else ""
    return written(f"import jax\nwith jax.debug_nans(True):\n    %flax_apply --eager --keys-of last {mode}{run.call}")


def keys_in(arguments: Arguments, seen: SeenKeys, but: Container[str]) -> Iterator[tuple[str, bytes]]:
    """Yields name and key data of the arguments that are keys.

    A legacy key is an ordinary uint32 array: it counts where this session has met its words as a key.

    Args:
      but: names that are left out.
    """
    for name, leaf in arguments.dynamic.items():
        # An array of typed keys is meant to be split up, so it is no key that may be used twice.
        if name not in but and may_be_key(leaf) and not (is_key(leaf) and leaf.ndim):
            data = data_of(leaf)
            if is_key(leaf) or data in seen.roots or data in seen.runs:
                yield name, data


def of_keys(in_call: Mapping[str, bytes], seen: SeenKeys, line: Line) -> Iterator[Note]:
    """Notes keys that are used twice: by two arguments, as a root key, or in an earlier run."""
    first: dict[bytes, str] = {}
    for name, data in in_call.items():
        if data in first:
            text = f"`{first[data]}` and `{name}` are given the same key: they get the same numbers"
            yield Note("same key", text, **_with_keys(line, first[data], name))
        first.setdefault(data, name)
    for name, data in in_call.items():
        if data in seen.roots:
            text = f"`{name}` is a root key that this session splits: its numbers meet the session's own"
            yield Note("root key", text, **_with_keys(line, name))
        elif data in seen.runs:
            text = f"`{name}` went into {seen.runs[data]} too: the same key gives the same numbers"
            yield Note("key again", text, **_with_keys(line, name))


def _with_keys(line: Line, *names: str) -> dict[str, str]:
    """The lines that draw a new key for each argument by `%flax_key`, and the call with these."""
    draws, edited = [], line
    for name in names:
        stream = next((word for word in reversed(re.findall(r"\w+", name)) if word.isidentifier()), "latent")
        key = new_key(stream)
        draws.append(f"{key} = %flax_key {stream}")
        open_call = edited._replace(call=f"{edited.call.partition('(')[0]}(…)")
        edited = edited.with_argument(name, key) or open_call
    return written("\n".join([*dict.fromkeys(draws), str(edited)]))


NAMED = 4
"""How many layers a note names; the rest is counted."""
OTHER_KEY = "another key, by its place in the model"


def compare(draw: int, earlier: CallTrace | None, trace: CallTrace) -> Iterator[Note]:
    """Notes random numbers other than those of `earlier`, the run that made `draw`, though the keys are the same.

    Masks agree if key, shape and rate agree. Of a module that draws with a key by itself only the key is compared.
    Inside a lifted transform equal paths and shapes prove nothing, unless both runs come of one trace.
    """
    # A trace without `takes` is of a run whose keys could not be watched.
    if earlier is None or earlier is trace or not (earlier.takes or trace.takes):
        return
    old, new = _by_place(earlier.takes), _by_place(trace.takes)
    texts = {place: _apart(old[place], new[place]) for place in new if place in old}
    differences = [*_differing(texts)]
    only, missing = ([place for place in one if place not in other] for one, other in ((new, old), (old, new)))
    if only and old:
        differences.append(f"{_names(only)}: not in draw {draw}'s run")
    if missing and new:
        differences.append(f"{_names(missing)}: in draw {draw}'s run alone")
    if differences:
        yield Note("masks", f"other random numbers than in draw {draw} at {'; '.join(differences)}")
    inside = [place for place, text in texts.items() if not text and (old[place].inside or new[place].inside)]
    if inside:
        text = f"random numbers drawn inside a transform may differ from those of draw {draw}: {_names(inside)}"
        yield Note("masks", text)


_Place = tuple[str, Path, int]


def _by_place(takes: Iterable[KeyUse]) -> dict[_Place, KeyUse]:
    """Maps stream, module path, and how often the module had taken a key of the stream before, to the key's use."""
    by_place: dict[_Place, KeyUse] = {}
    for take in takes:
        n = 0
        while (take.stream, take.path, n) in by_place:
            n += 1
        by_place[take.stream, take.path, n] = take
    return by_place


def _differing(texts: dict[_Place, str]) -> Iterator[str]:
    """A text for each way to differ, with its places; past NAMED texts the remaining places are in one."""
    alike: dict[str, list[_Place]] = {}
    for place, text in texts.items():
        if text:
            alike.setdefault(text, []).append(place)
    if OTHER_KEY in alike:
        yield f"{_names(alike.pop(OTHER_KEY))}: {OTHER_KEY}"
    for text in list(alike)[:NAMED]:
        yield f"{_names(alike[text])}: {text}"
    rest = [place for places in list(alike.values())[NAMED:] for place in places]
    if rest:
        yield f"{_names(rest)}: other shapes or rates"


def _apart(old: KeyUse, new: KeyUse) -> str:
    """How two uses of a key differ, such as `[4,8] there, [2,8] here`; empty where they agree or one is unknown."""
    if old.source != new.source:
        return OTHER_KEY
    if old.drew is None or new.drew is None:
        return ""
    (old_shape, old_rate), (new_shape, new_rate) = old.drew, new.drew
    if old_shape != new_shape:
        there, here = (f"[{','.join(map(str, shape))}]" for shape in (old_shape, new_shape))
        return f"{there} there, {here} here"
    return f"rate {old_rate:g} there, {new_rate:g} here" if old_rate != new_rate else ""


def _names(places: list[_Place]) -> str:
    names = list(dict.fromkeys(join(path) for _, path, _ in places))
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more
