"""Runs of NNX models: the module built, its streams replaced, its mode set, the jitted call."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from . import draws, nnx_lines
from .functions import as_written
from .nnx_lines import Held
from .page import CannotSay, Model, Page, common
from .reading import Site
from .scribe import indented, label_of
from .values import Value, lines_of

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
        lines, _, params = draws.replayed(page, indices, ("dropout",), False)
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
    return scribe.fit("nnx.update(", [model.name, f"nnx.state({built})"], ")")


def apply(page: Page, site: Site, model: Model, indices: Sequence[int]) -> list[str]:
    """The lines of `%flax_apply`.

    Raises:
      CannotSay: its runs were not alike, or an option has no lines.
    """
    scribe, options = page.scribe, site.given.options
    assert site.call is not None
    if options["mutable"]:
        raise CannotSay("--mutable of an NNX model has no lines yet")
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
    modes = nnx_lines.modes(spelling, model.name)
    keeps = options["variables"] is None and options["draw"] is None
    name = model.name
    if modes is None or not keeps or size is not None:
        name = scribe.variable(f"{model.name}_copy")
        lines.append(f"{name} = nnx.clone({model.name})")
        scribe.needs.add("nnx")
        if options["variables"] is not None:
            lines.append(f"nnx.update({name}, {options['variables']})")
        one_way = nnx_lines.mode_set(spelling.fields, name)
        if one_way is None:
            raise CannotSay("its switches are set to different values")
        modes = (one_way, "")
    if size is not None:
        return [*lines, *filter(None, modes[:1]), *_series(page, site, held, name, key, size)]
    lines += [*nnx_lines.reseeded(scribe, held, name), *filter(None, modes[:1])]
    rngs = nnx_lines.rngs(scribe, held)
    extra = [*(keys[name] for name in held.arguments), *([rngs] if rngs else [])]
    if options["eager"]:
        items = [*as_written(site.call.arguments)]
        items += [f"{argument}={value}" for argument, value in spelling.arguments]
        items += [f"{argument}={keys[argument]}" for argument in held.arguments]
        items += [f"rngs={rngs}"] if rngs else []
        value = Value(".".join((name, *site.call.method)) + "(", tuple(items), ")")
    else:
        wanted, passed = nnx_lines.function(scribe, held, site.mode, page.several)
        outside = list(passed.outside)
        starred = [text for text in outside if text.startswith("*")]
        plain = [text for text in outside if not text.startswith("*")]
        value = Value(f"{page.define(wanted, site)}(", (name, *plain, *extra, *starred), ")")
    after = [line for line in modes[1:] if line]
    if spelling.sown:
        after.append(f"nnx.pop({name}, nnx.Intermediate)")
    if name != model.name and keeps:
        after.append(f"nnx.update({model.name}, nnx.state({name}))")
    return [*lines, *lines_of(scribe, site.target, label_of(site.call.call, site.mode), value, after=after)]


def _series(page: Page, site: Site, held: Held, name: str, key: Callable[[str], str], size: int) -> list[str]:
    """Many draws of an NNX model: the module taken apart, and put together once for each draw."""
    scribe = page.scribe
    assert site.call is not None
    scribe.needs |= {"jax", "jnp"}
    graphdef, state, one = (scribe.variable(n) for n in ("graphdef", "state", "one_draw"))
    wanted, passed = nnx_lines.function(scribe, held, site.mode, page.several)
    streams = list(dict.fromkeys((*held.spelling.streams, *held.arguments)))
    keys = [held.keys[stream] for stream in streams]
    body = [f"{held.model} = nnx.merge({graphdef}, {state})", *nnx_lines.reseeded(scribe, held, held.model)]
    rngs = nnx_lines.rngs(scribe, held)
    body += [line.replace("rngs=rngs", f"rngs={rngs}") if rngs else line for line in wanted.body]
    axes = ", ".join(["None"] * (1 + len(passed.outside)) + ["0"] * len(keys))
    given = [state, *passed.outside, *(f"jnp.stack({key(stream)})" for stream in streams)]
    counted = f", axis_size={size}" if not keys else ""
    value = Value(f"jax.jit(jax.vmap({one}, in_axes=({axes}){counted}))(", tuple(given), ")")
    return [
        f"{graphdef}, {state} = nnx.split({name})",
        "",
        f"def {one}({', '.join([state, *passed.parameters, *keys])}):",
        *indented(body, scribe.unit),
        "",
        *lines_of(scribe, site.target, label_of(site.call.call, site.mode), value),
    ]
