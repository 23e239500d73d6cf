"""Runs of NNX models: the module built, its streams replaced, its mode set, the jitted call."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..spelling import Spelling
from . import draws, nnx_lines
from .functions import as_written
from .nnx_lines import Held
from .page import CannotSay, Model, Page, common
from .reading import Site
from .scribe import Scribe, call, label_of
from .values import lines_of, names_of

_RNGS = "nnx.Rngs(params=params_key, dropout=dropout_key)"


def with_rngs(construction: str, rngs: str) -> str:
    """`Net(8, 3)` with the argument that it lacks."""
    inside = construction.rstrip().removesuffix(")").rstrip().rstrip(",")
    return f"{inside}{'' if inside.endswith('(') else ', '}rngs={rngs})"


def build_again(page: Page, site: Site, model: Model, indices: Sequence[int]) -> list[str]:
    """The lines of `%flax_init`: the same construction with other keys, into the same object."""
    scribe, run = page.scribe, page.story.runs[indices[-1]]
    _, _, built = run.by_hand.partition(" = ")
    if site.given.options["draw"] is not None:
        lines, _, params = draws.replayed(page, indices, ("params", "dropout"), False)
        dropout = scribe.variable("replayed_dropout_key")
    else:
        streams, taken = page.story.folded_later(site)
        lines = scribe.draw(streams, taken=taken, stay=page.story.stays(site))
        params, dropout = scribe.params, scribe.dropout
        page.assigned |= {scribe.root, params, dropout}
    lines += _rebuilt(page, model, built, params, dropout)
    target = [f"{site.target} nnx.state({model.name})"] if site.target else []
    assert site.call is not None
    label = label_of(f"init {site.call.call}")
    return [*lines, *target, *scribe.show(label, f"nnx.state({model.name})")]


def _rebuilt(page: Page, model: Model, built: str, params: str, dropout: str) -> list[str]:
    """A module's own objects get the values of one that is built anew."""
    scribe = page.scribe
    scribe.needs.add("nnx")
    built = built.replace("params=params_key", f"params={params}").replace("dropout=dropout_key", f"dropout={dropout}")
    return [f"nnx.update({model.name}, nnx.state({built}))"]


def apply(page: Page, site: Site, model: Model, indices: Sequence[int]) -> list[str]:
    """The lines of `%flax_apply`.

    Raises:
      CannotSay: its runs were not alike, or an option has no lines.
    """
    scribe, options = page.scribe, site.given.options
    assert site.call is not None
    runs, size = page.runs(indices), options["draws"]
    spelling = common(runs)
    lines, key, params = draws.of_run(page, site, indices, spelling)
    rebuilt = [run for run in runs if run.made is not None]
    if rebuilt:
        if size is not None:
            raise CannotSay("many draws at once, the first of which built the module anew, have no lines yet")
        if len(rebuilt) < len(runs):
            raise CannotSay("its first run built the module anew, and the others did not")
        lines += _rebuilt(page, model, with_rngs(model.construction, _RNGS), params, key("dropout"))
    names = (*spelling.streams, *options["key"])
    keys = {stream: key(stream) if size is None else f"{stream}_key" for stream in names}
    held = Held(model.name, site.call, spelling, keys, tuple(options["key"]))
    if size is not None:
        return [*lines, *_series(page, site, held, key, size)]
    keeps = options["variables"] is None and options["draw"] is None
    name = model.name
    if not keeps or (spelling.mode is not None and spelling.mode.back is None):
        name = scribe.variable(f"{model.name}_copy")
        lines += _copied(scribe, model.name, name, options["variables"])
    lines += [*nnx_lines.reseeded(scribe, held, name), *nnx_lines.set_mode(scribe, spelling, name)]
    rngs = nnx_lines.rngs(scribe, held)
    extra = [*(keys[name] for name in held.arguments), *([rngs] if rngs else [])]
    if options["eager"]:
        items = [*as_written(site.call.arguments)]
        items += [f"{argument}={value}" for argument, value in spelling.arguments]
        items += [f"{argument}={keys[argument]}" for argument in held.arguments]
        items += [f"rngs={rngs}"] if rngs else []
        value = call(".".join((name, *site.call.method)) + "(", items)
    else:
        wanted, passed = nnx_lines.function(scribe, held, site.mode, page.several)
        starred = [text for text in passed.outside if text.startswith("*")]
        plain = [text for text in passed.outside if not text.startswith("*")]
        value = call(f"{page.define(wanted, site)}(", [name, *plain, *extra, *starred])
    after = nnx_lines.set_mode(scribe, spelling, name, back=True) if name == model.name else []
    kept = [f"nnx.update({model.name}, nnx.state({name}))"] if name != model.name and keeps else []
    label = label_of(site.call.call, site.mode)
    if options["mutable"]:
        after += kept
        return [*lines, *_with_updates(scribe, site.target, label, value, name, spelling, after)]
    if spelling.sown:
        after.append(f"nnx.pop({name}, nnx.Intermediate)")
    parts = "parts" in spelling.returns
    return [*lines, *lines_of(scribe, site.target, label, value, after=[*after, *kept], parts=parts)]


def _copied(scribe: Scribe, model: str, name: str, variables: str | None) -> list[str]:
    """The lines that make a copy of a module for a run that keeps nothing, with other variables where some are given."""
    scribe.needs.add("nnx")
    lines = [f"{name} = nnx.clone({model})"]
    return lines if variables is None else [*lines, f"nnx.update({name}, {variables})"]


def _with_updates(
    scribe: Scribe, target: str, label: str, value: str, model: str, spelling: Spelling, after: Sequence[str]
) -> list[str]:
    """The lines for a run that gives `(output, updates)`."""
    pair = names_of(target) if len(names_of(target)) == 2 else []
    output = pair[0] if pair else scribe.variable("output", "result")
    lines = [f"{output} = {value}", *after]
    popped = ""
    if spelling.sown:
        scribe.needs.add("nnx")
        popped = f"nnx.pop({model}, nnx.Intermediate)"
        sown = [given for given in spelling.given if given.sown]
        if not sown:
            lines.append(popped)
        elif not all(given.whole for given in sown):
            held = scribe.variable("sown", "sown_values")
            lines.append(f"{held} = nnx.to_pure_dict({popped})")
            popped = held
    updates = nnx_lines.updates(scribe, model, spelling, popped)
    if pair:
        return [*lines, f"{pair[1]} = {updates}", *scribe.show(label, f"({', '.join(pair)})")]
    return [*lines, *lines_of(scribe, target, label, f"({output}, {updates})")]


def _series(page: Page, site: Site, held: Held, key: Callable[[str], str], size: int) -> list[str]:
    """Many draws of an NNX model: a function that takes the module apart, and puts it together once for each draw."""
    scribe, options = page.scribe, site.given.options
    assert site.call is not None
    if options["mutable"]:
        raise CannotSay("--mutable of many draws of an NNX model at once has no lines yet")
    lines: list[str] = []
    name = held.model
    if options["variables"] is not None:
        name = scribe.variable(f"{held.model}_copy")
        lines += _copied(scribe, held.model, name, options["variables"])
    wanted, passed = nnx_lines.series(scribe, held, site.mode, page.several, size)
    if held.keys:
        scribe.needs.add("jnp")
    keys = [f"jnp.stack({key(stream)})" for stream in dict.fromkeys((*held.spelling.streams, *held.arguments))]
    value = call(f"{page.define(wanted, site)}(", [name, *passed.outside, *keys])
    label = label_of(site.call.call, site.mode)
    return [*lines, *lines_of(scribe, site.target, label, value, parts="parts" in held.spelling.returns)]
