"""Runs of NNX models as plain Flax: streams replaced, the mode set, `nnx.jit` of the call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..call import ParsedCall
from ..spelling import MODULE, Spelling
from .functions import Passed, Wanted, passed
from .page import CannotSay
from .scribe import Scribe, call, indented


@dataclass(frozen=True)
class Held:
    """An NNX run: what is called, with which keys. See `Called` of linen."""

    model: str
    call: ParsedCall
    spelling: Spelling
    keys: Mapping[str, str]
    arguments: tuple[str, ...]


def reseeded(scribe: Scribe, held: Held, model: str) -> list[str]:
    """The line that gives the streams that the module holds the keys of the draw."""
    streams = [stream for stream in held.spelling.streams if stream in held.spelling.held]
    if not streams:
        return []
    scribe.needs.add("nnx")
    items = [model, f"policy={scribe.text('match_shape')}", *(f"{s}={held.keys[s]}" for s in streams)]
    return [call("nnx.reseed(", items)]


def rngs(scribe: Scribe, held: Held) -> str:
    """The `rngs` that the call is given; empty where it takes none, or the user's."""
    if not held.spelling.handed:
        return ""
    scribe.needs.add("nnx")
    own = held.spelling.held - {"params", "dropout"}
    given = ", ".join(f"{s}={held.keys[s]}" for s in held.spelling.streams if s not in own)
    return f"nnx.Rngs({given})"


def set_mode(scribe: Scribe, spelling: Spelling, model: str, *, back: bool = False) -> list[str]:
    """The lines that set the mode of a run, or that set it `back`."""
    if spelling.mode is None:
        return []
    lines = [line.replace(MODULE, model) for line in (spelling.mode.back or () if back else spelling.mode.to)]
    if any("dataclasses." in line for line in lines):
        scribe.needs.add("dataclasses")
    return lines


def updates(scribe: Scribe, model: str, spelling: Spelling, popped: str) -> str:
    """The collections that a run handed back, as a dict.

    Args:
      popped: the expression that takes off `model` what was sown; a name for it where that is not given as it is.

    Raises:
      CannotSay: the run sowed variables of a type of their own.
    """
    items = []
    for given in spelling.given:
        if not given.sown:
            values = [_held(model, path, variable) for path, variable in given.paths]
            names = ["/".join(map(str, path)) for path, _ in given.paths]
            rows = ", ".join(f"{scribe.text(name)}: {value}" for name, value in zip(names, values, strict=True))
            items.append(f"{scribe.text(given.name)}: {{{rows}}}")
            continue
        if given.name != "Intermediate":
            raise CannotSay(f"what it sowed are variables of a type of their own, `{given.name}`")
        pure = f"nnx.to_pure_dict({popped})" if given.whole else _nested(scribe, given.paths, popped)
        items.append(f"{scribe.text(given.name)}: {pure}")
    return f"{{{', '.join(items)}}}"


def _nested(scribe: Scribe, paths: Sequence[tuple[tuple[str | int, ...], bool]], sown: str) -> str:
    """Values of `sown`, nested by their paths, with names in the place of numbers."""
    tree: dict[str, Any] = {}
    for path, _ in paths:
        inner = tree
        for step in path[:-1]:
            inner = inner.setdefault(str(step), {})
        steps = (scribe.text(step) if isinstance(step, str) else str(step) for step in path)
        inner[str(path[-1])] = sown + "".join(f"[{step}]" for step in steps)

    def text(part: Any) -> str:
        if isinstance(part, str):
            return part
        return f"{{{', '.join(f'{scribe.text(name)}: {text(inner)}' for name, inner in part.items())}}}"

    return text(tree)


def _held(model: str, path: tuple[str | int, ...], variable: bool) -> str:
    """`net.layers[0].kernel[...]`"""
    steps = [f".{step}" if isinstance(step, str) and step.isidentifier() else f"[{step!r}]" for step in path]
    return f"{model}{''.join(steps)}{'[...]' if variable else ''}"


def series(scribe: Scribe, held: Held, mode: str, several: bool, size: int) -> tuple[Wanted, Passed]:
    """The jitted function for many draws at once, given the keys of each stream, and what else it is called with."""
    one, arguments = function(scribe, held, mode, several)
    keys = [held.keys[stream] for stream in dict.fromkeys((*held.spelling.streams, *held.arguments))]
    copy = "model" if held.model != "model" else "copy"
    while copy in {*one.parameters, *keys}:
        copy += "_"
    given = rngs(scribe, held)
    body = [
        f"{copy} = nnx.clone({held.model})",
        *reseeded(scribe, held, copy),
        *set_mode(scribe, held.spelling, copy),
        *(line.replace(f"return {held.model}", f"return {copy}", 1) for line in one.body),
    ]
    if given:
        body[-1] = body[-1].replace("rngs=rngs", f"rngs={given}")
    mapped = f"jax.vmap(one_draw)({', '.join(f'{key}s' for key in keys)})"
    if not keys:
        mapped = f"jax.vmap(one_draw, axis_size={size})()"
    lines = [f"def one_draw({', '.join(keys)}):", *indented(body, scribe.unit), "", f"return {mapped}"]
    scribe.needs.add("jax")
    verb = {"train": "train", "eval": "evaluate"}.get(mode, held.call.method[-1] if held.call.method else "apply")
    names = (f"{verb}_draws_{held.model}",) if several else (f"{verb}_draws", f"{verb}_draws_{held.model}")
    parameters = (held.model, *arguments.parameters, *(f"{key}s" for key in keys))
    wanted = Wanted((*one.key, tuple(lines)), names, one.decorator, parameters, one.static, tuple(lines), one.reads)
    return wanted, arguments


def function(scribe: Scribe, held: Held, mode: str, several: bool) -> tuple[Wanted, Passed]:
    """The jitted function for a run, and what it is called with besides the module."""
    used = [held.model, *(f"{name}_key" for name in held.arguments)]
    if held.spelling.handed:
        used.append("rngs")
    arguments = passed(scribe, held.call, held.spelling, used)
    items = [*arguments.inside, *(f"{name}={value}" for name, value in held.spelling.arguments)]
    items += [f"{name}={name}_key" for name in held.arguments]
    parameters = [held.model, *arguments.parameters, *(f"{name}_key" for name in held.arguments)]
    if held.spelling.handed:
        items.append("rngs=rngs")
        parameters.append("rngs")
    starred = [name for name in parameters if name.startswith("*")]
    parameters = [name for name in parameters if name not in starred] + starred
    path = ".".join((held.model, *held.call.method))
    body = [call(f"return {path}(", items)]
    # The mode is the module's own, unless the call has it as an argument.
    mode = mode if held.spelling.arguments else "as written"
    verb = {"train": "train", "eval": "evaluate"}.get(mode, "apply")
    if held.call.method:
        verb = held.call.method[-1] if mode == "as written" else f"{verb}_{held.call.method[-1]}"
    long = f"{verb}_{held.model}"
    names = (long,) if several else (verb, long)
    scribe.needs.add("nnx")
    key = (held.model, names, tuple(parameters), arguments.static, tuple(body))
    return Wanted(
        key, names, "nnx.jit", tuple(parameters), arguments.static, tuple(body), frozenset({held.model})
    ), arguments
