"""Runs of linen models: init, the jitted apply, what it keeps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from ..run import Run
from ..spelling import Spelling
from . import draws, linen_lines
from .functions import as_written
from .linen_lines import Called
from .page import CannotSay, Model, Page, common
from .reading import Site
from .scribe import indented, label_of
from .values import Value, lines_of, merged


def init(page: Page, site: Site, model: Model, indices: Sequence[int]) -> list[str]:
    """The lines of `%flax_init`."""
    scribe, run = page.scribe, page.story.runs[indices[-1]]
    assert site.call is not None
    spelling = run.spelling or Spelling()
    called = _called(page, site, model, replace(spelling, init_arguments=spelling.arguments), lambda s: s)
    if site.given.options["draw"] is not None:
        lines, _, params = draws.replayed(page, indices, (), False)
    else:
        streams, taken = page.story.folded_later(site)
        lines, params = scribe.draw(streams, taken=taken, stay=page.story.stays(site)), scribe.params
        page.assigned |= {scribe.root, params, scribe.dropout}
    before, items = linen_lines.init_items(scribe, called, params)
    target = site.target.removesuffix("=").strip()
    plain = site.target.endswith("=") and target.isidentifier()
    left = f"{target} = " if plain and target != model.variables else ""
    lines += scribe.fit(f"{left}{model.variables} = {before}", items, ")")
    if site.target and not plain:
        lines.append(f"{site.target} {model.variables}")
    page.assigned.add(model.variables)
    lines += _keep_first(page, model, params)
    return [*lines, *scribe.show(label_of(f"{model.name}.init({', '.join(items[1:])})"), model.variables)]


def apply(page: Page, site: Site, model: Model, indices: Sequence[int]) -> list[str]:
    """The lines of `%flax_apply`.

    Raises:
      CannotSay: its runs were not alike.
    """
    scribe, options = page.scribe, site.given.options
    assert site.call is not None
    runs, size = page.runs(indices), options["draws"]
    spelling = common(runs)
    lines, key, params = draws.of_run(page, site, indices, spelling)
    called = _called(page, site, model, spelling, key)
    lines += _made(page, site, model, called, runs, params)
    if options["eager"]:
        before, items = linen_lines.apply_items(scribe, called, as_written(called.call.arguments), called.variables)
        value = Value(before, tuple(items), ")")
    else:
        wanted, passed = linen_lines.function(scribe, called, site.mode, page.several, size)
        keys = list(called.keys.values())
        if size is not None:
            scribe.needs.add("jnp")
            keys = [f"jnp.stack({name})" for name in keys]
        starred = any(name.startswith("*") for name in passed.parameters)
        items = [called.variables, *keys, *passed.outside] if starred else [called.variables, *passed.outside, *keys]
        value = Value(f"{page.define(wanted, site)}(", tuple(items), ")")
    keeps = options["variables"] is None and options["draw"] is None and size is None
    kept = tuple(name for name in spelling.kept if name in called.mutable) if keeps else ()
    asked = options["mutable"]
    after = merged(scribe, model.variables, kept, called.mutable)
    if kept:
        page.assigned.add(model.variables)
    label = label_of(site.call.call, site.mode)
    if not called.mutable:
        return [*lines, *lines_of(scribe, site.target, label, value)]
    if asked and not kept and set(asked) == set(spelling.mutable):
        return [*lines, *lines_of(scribe, site.target, label, value)]
    pair = scribe.variable("updates", "new_values") if kept or asked else "_"
    given = ""
    if asked:
        there = [name for name in asked if name in spelling.mutable]
        picked = ", ".join(f"{scribe.text(name)}: {pair}[{scribe.text(name)}]" for name in there)
        given = "({output}, {{" + picked + "}})"
    return [*lines, *lines_of(scribe, site.target, label, value, after=after, pair=pair, given=given)]


def _called(page: Page, site: Site, model: Model, spelling: Spelling, key: Callable[[str], str]) -> Called:
    assert site.call is not None
    options = site.given.options
    given = options.get("variables")
    arguments = tuple(options.get("key") or ())
    return Called(
        model.name,
        model.module,
        site.call,
        spelling,
        given or model.variables,
        {stream: key(stream) for stream in (*spelling.streams, *arguments)},
        arguments,
        tuple(sorted({*spelling.mutable, *(options.get("mutable") or ())})),
    )


def _made(page: Page, site: Site, model: Model, called: Called, runs: Sequence[Run], params: str) -> list[str]:
    """The init that is part of a run, or what a method adds to the variables."""
    scribe = page.scribe
    made = [run for run in runs if run.made is not None and not run.made.added]
    added = [run for run in runs if run.made is not None and run.made.added]
    lines: list[str] = []
    if made:
        page.assigned.add(model.variables)
        first = replace(called, spelling=made[0].spelling or called.spelling)
        before, items = linen_lines.init_items(scribe, first, params)
        if page.is_conditional(site):
            inner = [*scribe.fit(f"{model.variables} = {before}", items, ")", 2), *_keep_first(page, model, params)]
            lines += [f"if {model.variables} is None:", *indented(inner, scribe.unit)]
        else:
            lines += [*scribe.fit(f"{model.variables} = {before}", items, ")"), *_keep_first(page, model, params)]
    if added:
        if site.path and len(added) < len(runs):
            raise CannotSay("its first run added variables to those that were there, and the others did not")
        page.assigned.add(model.variables)
        scribe.needs.add("traverse_util")
        flat = scribe.variable("flat_variables")
        first = replace(called, spelling=added[0].spelling or called.spelling)
        before, items = linen_lines.init_items(scribe, first, model.first_key or params)
        lines += scribe.fit(f"{flat} = traverse_util.flatten_dict({before}", items, "))")
        lines.append(f"{flat}.update(traverse_util.flatten_dict({model.variables}))")
        lines.append(f"{model.variables} = traverse_util.unflatten_dict({flat})")
    return lines


def _keep_first(page: Page, model: Model, params: str) -> list[str]:
    """The line that keeps the key of the first init, where a method adds variables later."""
    if not model.first_key:
        return []
    page.assigned.add(model.first_key)
    return [f"{model.first_key} = {params}"]
