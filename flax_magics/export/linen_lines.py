"""Runs of linen models as plain Flax."""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..call import ParsedCall
from ..models.switch import Settings, cloned
from ..spelling import Spelling
from .functions import Passed, Wanted, as_written, passed
from .scribe import Scribe, call


@dataclass(frozen=True)
class Called:
    """A linen run: what is called, with which keys.

    Attributes:
      model: the name of the module in the script.
      module: the module itself, as it is registered now.
      variables: the expression for the variables.
      keys: stream → the variable that holds its key.
      arguments: arguments that are given a key of the draw (`--key`), which `keys` has too.
      mutable: collections.
    """

    model: str
    module: Any
    call: ParsedCall
    spelling: Spelling
    variables: str
    keys: Mapping[str, str]
    arguments: tuple[str, ...]
    mutable: tuple[str, ...]


def init_items(scribe: Scribe, called: Called, key: str) -> tuple[str, list[str]]:
    """`net.init(` and its arguments, for the init that is part of a run (or is the run)."""
    spelling = called.spelling
    extra = [f"{name}={value}" for name, value in spelling.init_arguments]
    extra += [f"{name}={called.keys[name]}" for name in called.arguments]
    model = _cloned(scribe, called.model, called.module, spelling.init_fields)
    if spelling.init_streams:
        key = "{" + ", ".join(f"{scribe.text(stream)}: {key}" for stream in ("params", *spelling.init_streams)) + "}"
    items = [key, *as_written(called.call.arguments), *extra, *_method(scribe, called)]
    return f"{model}.init(", items


def apply_items(scribe: Scribe, called: Called, given: Sequence[str], variables: str) -> tuple[str, list[str]]:
    """`net.apply(` and its arguments, `given` being those of the call."""
    spelling = called.spelling
    model = _cloned(scribe, called.model, called.module, spelling.fields)
    items = [variables, *given, *(f"{name}={value}" for name, value in spelling.arguments)]
    items += [f"{name}={called.keys[name]}" for name in called.arguments]
    if spelling.streams:
        rngs = ", ".join(f"{scribe.text(stream)}: {called.keys[stream]}" for stream in spelling.streams)
        items.append(f"rngs={{{rngs}}}")
    if called.mutable:
        items.append(f"mutable={scribe.texts(called.mutable)}")
    return f"{model}.apply(", [*items, *_method(scribe, called)]


def function(scribe: Scribe, called: Called, mode: str, several: bool, draws: int | None) -> tuple[Wanted, Passed]:
    """The jitted function for a run, and what it is called with besides variables and keys.

    Args:
      several: other models have functions too, so that this one's name says whose it is.
      draws: it is mapped over that many keys.
    """
    own = {stream: f"{stream}_key" for stream in called.keys}
    called = replace(called, keys=own)
    keys = list(own.values())
    variables = "variables"
    arguments = passed(scribe, called.call, called.spelling, (variables, *keys, *(f"{key}s" for key in keys)))
    before, items = apply_items(scribe, called, arguments.inside, variables)
    given = keys if draws is None else [f"{key}s" for key in keys]
    parameters = (variables, *given, *arguments.parameters)
    if not any(name.startswith("*") for name in arguments.parameters):
        parameters = (variables, *arguments.parameters, *given)
    if draws is not None:
        body = _mapped(scribe, before, items, keys, draws)
    elif called.spelling.axes:
        body = _bound(scribe, before, items, called.spelling.axes)
    else:
        body = [call(f"return {before}", items)]
    names = _names(called, mode, several, draws)
    reads = frozenset({called.model, *_words(arguments.inside, arguments.parameters)})
    scribe.needs.add("jax")
    key = (called.model, names, parameters, arguments.static, tuple(body))
    return Wanted(key, names, "jax.jit", parameters, arguments.static, tuple(body), reads), arguments


def _mapped(scribe: Scribe, before: str, items: list[str], keys: list[str], draws: int) -> list[str]:
    body = [call(f"return {before}", items)]
    if not keys:
        return [f"return jax.vmap(lambda: {call(before, items)}, axis_size={draws})()"]
    inner = [f"def one_draw({', '.join(keys)}):", *(scribe.unit + line for line in body)]
    return [*inner, "", f"return jax.vmap(one_draw)({', '.join(f'{key}s' for key in keys)})"]


def _bound(scribe: Scribe, before: str, items: list[str], axes: Sequence[str]) -> list[str]:
    """Around a model that names a mapped axis: the axis with one element, which stands for this device."""
    lines = ["def one_device():", scribe.unit + call(f"return {before}", items), ""]
    mapped = "one_device"
    for axis in sorted(axes):
        mapped = f"jax.vmap({mapped}, axis_name={scribe.text(axis)}, axis_size=1)"
    first = ", ".join("0" for _ in axes)
    return [*lines, f"outputs = {mapped}()", f"return jax.tree.map(lambda leaf: leaf[{first}], outputs)"]


def _names(called: Called, mode: str, several: bool, draws: int | None) -> tuple[str, ...]:
    verb = {"train": "train", "eval": "evaluate"}.get(mode, "apply")
    if called.call.method:
        verb = called.call.method[-1] if mode == "as written" else f"{verb}_{called.call.method[-1]}"
    if draws is not None:
        verb += "_draws"
    long = f"{verb}_{called.model}"
    return (long,) if several else (verb, long)


def _words(texts: Sequence[str], parameters: Sequence[str]) -> set[str]:
    """Global names in arguments that are written into a function."""
    found: set[str] = set()
    for text in texts:
        value = text.partition("=")[2] if text.partition("=")[0].isidentifier() else text
        try:
            tree = ast.parse(value, mode="eval")
        except SyntaxError:
            continue
        found |= {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    return found - set(parameters)


def _cloned(scribe: Scribe, name: str, module: Any, fields: Settings) -> str:
    text = cloned(name, module, fields)
    if "dataclasses.replace(" in text:
        scribe.needs.add("dataclasses")
    return text


def _method(scribe: Scribe, called: Called) -> list[str]:
    method = called.call.method
    if not method:
        return []
    if len(method) == 1 and hasattr(type(called.module), method[0]):
        return [f"method={scribe.text(method[0])}"]
    return [f"method=lambda module, *args, **kwargs: module.{'.'.join(method)}(*args, **kwargs)"]
