"""The sharp bits that are looked for in every run, each one line and the line that mends it."""

from __future__ import annotations

import math
import re
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import jax
import numpy as np

from .arguments import Arguments
from .errors import nearest, written
from .frozen import altered
from .keys import data_of
from .lines import Line, as_array, new_key
from .models import Layer, Record
from .models.switch import WHEN_TRAINING, following
from .outputs import has_nan
from .prepare import Prepared
from .run import GONE, Made, Note, Run
from .weights import FOR_THIS_RUN

KNOWN_STREAMS = ("params", "dropout", "default")

INITIALISED = ("kernel", "bias", "scale", "embedding")
"""Parameters of Flax's layers, each with an argument `NAME_init`."""

OUTDATED = Note("outdated", "variables from before the edit: %flax_init for new ones")


def outdated_own(name: str) -> Note:
    """The same of an NNX module that the user's own code built."""
    return Note(
        "outdated", "variables from before the edit: its cell again after `del` gives new ones", write=f"del {name}"
    )


def join(path: Iterable[str]) -> str:
    """A module's path as Flax writes it; the model itself is `(the model)`."""
    return "/".join(path) or "(the model)"


def of_mode(name: str, prepared: Prepared, mode: str, record: Record) -> Iterator[Note]:
    """Training was asked and every dropout (or BatchNorm) is in its evaluation behaviour, or the other way round; or
    the model `name` has nothing that could be set.

    Where other layers do as was asked, one that is told otherwise by more than a literal beside a switch is meant to be:
    a backbone that stays frozen.

    Args:
      mode: what was asked if something was set, else `as written`.
    """
    asked = prepared.mode
    if asked not in ("train", "eval"):
        return
    training, told = asked == "train", False
    obeyed = any(layer.training is training for layer in record.layers)
    for kind in ("dropout", "norm"):
        layers = [layer for layer in record.layers if layer.kind == kind]
        if any(layer.training is training for layer in layers):
            continue
        wrong = [layer for layer in layers if not obeyed or (layer.source.literal and layer.own_switch)]
        if wrong:
            told = True
            yield _wrong_mode(kind, wrong, training)
    if mode != asked and not told:
        yield Note("mode", f"{name} has no train switch: --{asked} changed nothing")


def _wrong_mode(kind: str, layers: list[Layer], training: bool) -> Note:
    option = "--train" if training else "--eval"
    first = layers[0]
    names = join(first.path) if len(layers) == 1 else f"{join(first.path)} and {len(layers) - 1} more"
    verb = "is" if len(layers) == 1 else "are"
    if kind == "dropout":
        state = "off" if training else "on"
    else:
        state = "using running averages" if training else "using the batch's own statistics"
    value = f"{first.switch}={first.value}"
    if first.source.literal:
        why = f"{value} is fixed in {first.owner}"
    elif first.source.text:
        why = f"{first.switch} was {first.value}, from `{first.source.text}` in {first.owner}"
    else:
        why = f"{first.switch} was {first.value} in {first.owner}"
    edit = following(first.switch, first.own_switch, first.method)
    return Note(kind, f"{names} {verb} {state} although {option} was asked: {why}", edit=edit)


def of_streams(record: Record, told: Container[str]) -> Iterator[Note]:
    """Streams other than Flax's own, once each: a mistyped `rng_collection` must not pass in silence."""
    for name, paths in record.asked.items():
        if name in KNOWN_STREAMS or name in told:
            continue
        where = join(paths[0]) + (f" and {len(set(paths)) - 1} more" if len(set(paths)) > 1 else "")
        close = nearest(name, KNOWN_STREAMS, 1)
        if close:
            text = f"the stream `{name}` is asked for by {where}: is `{close[0]}` meant?"
        else:
            text = f"the stream `{name}` is asked for by {where}: it gets a key of its own from the draw"
        yield Note("stream", text)


def of_params(variables: Mapping[str, Any]) -> Iterator[Note]:
    """Params, just initialised, that hold NaN, or that are zero throughout.

    A layer may begin at zero, and so may a model that has nothing but biases: a weight of two dimensions or more has to
    be among what is zero.
    """
    zero, weight = True, ""
    for path, leaf in jax.tree_util.tree_flatten_with_path(variables.get("params", {}))[0]:
        if not isinstance(leaf, jax.Array) or not leaf.is_fully_addressable:
            return
        if not jax.numpy.issubdtype(leaf.dtype, jax.numpy.inexact):
            continue
        # On a CPU NumPy reads the array where it is, and compiles nothing.
        on_host = all(device.platform == "cpu" for device in leaf.devices())
        values: Any = np.asarray(leaf) if on_host else leaf
        names = [str(getattr(key, "key", getattr(key, "name", ""))) for key in path]
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
    """How a layer of Flax is told to initialise a parameter; one of the user's own names its initializer itself."""
    name = path[-1] if path else "kernel"
    initializer = {"bias": "zeros", "scale": "ones"}.get(name)
    initializer = f"jax.nn.initializers.{initializer}" if initializer else ""
    initializer = initializer or f"jax.nn.initializers.{'lecun_normal' if ndim >= 2 else 'normal'}()"
    return f"{name}_init={initializer}" if name in INITIALISED else initializer


def of_scalars(dtypes: Mapping[str, str], line: Line) -> Iterator[Note]:
    """Python numbers where arrays of these dtypes were: each kind of argument has a program of its own."""
    for name, dtype in dtypes.items():
        text = f"`{name}` is a Python number where an array was before: that is another program"
        yield Note("scalar", text, **as_array(line, name, dtype))


def of_unused(switch: Iterable[str], given: Iterable[str], unused: Container[str], line: Line) -> Iterator[Note]:
    """Keys in the call that the program does not read. In evaluation that is as it should be."""
    for setting in switch:
        path, _, value = setting.partition("=")
        name = path.rpartition(".")[2]
        if name in WHEN_TRAINING and value != str(WHEN_TRAINING[name]):
            return
    for name in given:
        if name in unused:
            text = f"the key `{name}` is passed, and nothing in the model uses it"
            parameter = line.signature.parameters.get(name)
            optional = parameter is None or parameter.default is not parameter.empty
            shorter = line.without_option("--key", name)
            if shorter == line:
                shorter = line.without_argument(name) or line
            if optional and shorter != line:
                yield Note("unused key", text, **written(str(shorter)))
            else:
                yield Note("unused key", text, edit=f"jax.random.normal({name}, …)")


def of_mutable(asked: Iterable[str], known: Iterable[str], line: Line) -> Iterator[Note]:
    """Collections to be handed back that are not there: Flax hands back nothing, in silence.

    Args:
      asked: names of collections; `known`: those of the variables, and of what the run wrote or sowed.
    """
    known = sorted(known)
    for name in asked:
        if name not in known:
            has = f"it has {', '.join(known)}" if known else "it has none"
            near = nearest(name.replace("_", ""), known, 1)
            text = f"--mutable {name} hands back nothing: the model has no collection of this name; {has}"
            corrected = line.without_option("(?:--mutable|-m)", name)
            if near and near[0] not in asked:
                corrected = corrected.with_option(f"--mutable {near[0]}")
            yield Note("mutable", text, **written(str(corrected)))


def of_rngs(own: bool, record: Record) -> Iterator[Note]:
    """The call has `rngs` of the user's, so that what the session drew is for the streams that the model holds, if any."""
    if own and not record.asked:
        yield Note("rngs", "rngs: yours, draw unused")


def with_values(run: Run) -> Run:
    """The run, with the sharp bit that its output holds NaN, where no other tells of it. Reads all of the output."""
    if any(note.kind in ("nan", "nan params") for note in run.notes) or not any(values.nan for values in run.values):
        return run
    text = f"the output of {run.model} holds NaN"
    if run.inputs is not GONE and has_nan(run.inputs):
        return altered(run, {"notes": (*run.notes, Note("nan", f"{text}, and so does its input"))})
    return altered(run, {"notes": (*run.notes, Note("nan", text, **_finding_nan(run)))})


def without_inputs(run: Run) -> Run:
    """The run, holding on to its output alone."""
    return altered(run, {"inputs": GONE})


def _finding_nan(run: Run) -> dict[str, str]:
    """The lines that run it once more, op by op, and stop at the operation that gives NaN; none where more is needed."""
    added = {} if run.inputs is GONE else run.inputs[1]
    by_key = any(name not in WHEN_TRAINING and f"{name}=" not in run.call for name in added)
    if by_key or run.inputs is GONE or run.draws is not None or run.weights == FOR_THIS_RUN:
        return {}
    mode = f"--{run.mode} " if run.mode in ("train", "eval") else ""
    lines = f"import jax\nwith jax.debug_nans(True):\n    %flax_apply --eager --draw last {mode}{run.call}"
    return {"form" if "…" in run.call else "write": lines}


class SeenKeys:
    """Keys that went into runs, and roots that the session has split or will split."""

    def __init__(self) -> None:
        self.roots: set[bytes] = set()
        self.runs: dict[bytes, str] = {}

    def find(self, arguments: Arguments) -> Iterator[tuple[str, bytes]]:
        """Names and data of the arguments that are keys: typed ones, and legacy ones that are known as keys."""
        for name, leaf, traced in zip(arguments.names, arguments.leaves, arguments.traced, strict=True):
            if not traced or not isinstance(leaf, jax.Array):
                continue
            if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
                if leaf.ndim == 0:
                    yield name, data_of(leaf)
            elif leaf.dtype == "uint32" and leaf.shape in ((2,), (4,)):
                data = data_of(leaf)
                if data in self.roots or data in self.runs:
                    yield name, data

    def notes(self, found: Mapping[str, bytes], line: Line) -> Iterator[Note]:
        """What is to be said of the keys in a call."""
        first: dict[bytes, str] = {}
        for name, data in found.items():
            if data in first:
                text = f"`{first[data]}` and `{name}` are given the same key: they get the same numbers"
                yield Note("same key", text, **_with_keys(line, first[data], name))
            first.setdefault(data, name)
        for name, data in found.items():
            if data in self.roots:
                text = f"`{name}` is a root key that this session splits: its numbers meet the session's own"
                yield Note("root key", text, **_with_keys(line, name))
            elif data in self.runs:
                text = f"`{name}` went into {self.runs[data]} too: the same key gives the same numbers"
                yield Note("key again", text, **_with_keys(line, name))


def _with_keys(line: Line, *names: str) -> dict[str, str]:
    """The lines that draw keys of their own for arguments, and pass them."""
    draws, edited = [], line
    for name in names:
        stream = next((word for word in reversed(re.findall(r"\w+", name)) if word.isidentifier()), "latent")
        key = new_key(stream)
        draws.append(f"{key} = %flax_key {stream}")
        open_call = replace(edited, call=f"{edited.call.partition('(')[0]}(…)")
        edited = edited.with_argument(name, key) or open_call
    return written("\n".join([*dict.fromkeys(draws), str(edited)]))


def summary(tree: Mapping[str, Any]) -> tuple[int, int]:
    """Elements of `params` (of NNX's `Param`), and bytes of everything; of arrays or of their shapes."""
    parameters = sum(math.prod(leaf.shape) for leaf in _arrays(tree.get("params", tree.get("Param", {}))))
    return parameters, sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in _arrays(tree))


def made_of(variables: Mapping[str, Any], *, added: bool = False) -> Made:
    """How much of variables was made, or was added to those that were there."""
    parameters, size = summary(variables)
    return Made(parameters, size, tuple(variables), added)


def _arrays(tree: Any) -> Iterator[Any]:
    return (leaf for leaf in jax.tree_util.tree_leaves(tree) if hasattr(leaf, "shape") and hasattr(leaf, "dtype"))
