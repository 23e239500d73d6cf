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
from .scribe import Scribe, call, indented, label_of
from .values import lines_of, lines_of_pair, merged, name_of, names_of


def init(page: Page, site: Site, model: Model, indices: Sequence[int]) -> list[str]:
    """The lines of `%flax_init`."""
    scribe, run = page.scribe, page.story.runs[indices[-1]]
    assert site.call is not None
    spelling = run.spelling or Spelling()
    called = _called(page, site, model, spelling, lambda s: s)
    if site.given.options["draw"] is not None:
        lines, _, params = draws.replayed(page, indices, ("params",), False)
    else:
        streams, taken = page.story.folded_later(site)
        params = scribe.params
        if page.story.stays(site):
            lines = [scribe.STAYS, *scribe.keys_of(scribe.root, ("params",), scribe.key)]
        else:
            lines = scribe.draw(streams, taken=taken)
        page.assigned |= {scribe.root, params, scribe.dropout}
    before, items = linen_lines.init_items(scribe, called, params)
    target = name_of(site.target)
    left = f"{target} = " if target and target != model.variables else ""
    lines.append(call(f"{left}{model.variables} = {before}", items))
    if site.target and not target:
        lines.append(f"{site.target} {model.variables}")
    page.assigned.add(model.variables)
    lines += _keep_first(page, model, params)
    return [*lines, *scribe.show(label_of(call(f"{model.name}.init(", items[1:])), model.variables)]


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
        value = call(*linen_lines.apply_items(scribe, called, as_written(called.call.arguments), called.variables))
    else:
        wanted, passed = linen_lines.function(scribe, called, site.mode, page.several, size)
        keys = list(called.keys.values())
        if size is not None and keys:
            scribe.needs.add("jnp")
            keys = [f"jnp.stack({name})" for name in keys]
        starred = any(name.startswith("*") for name in passed.parameters)
        items = [called.variables, *keys, *passed.outside] if starred else [called.variables, *passed.outside, *keys]
        value = call(f"{page.define(wanted, site)}(", items)
    keeps = options["variables"] is None and options["draw"] is None and size is None
    kept = tuple(name for name in spelling.kept if name in called.mutable) if keeps else ()
    if kept:
        page.assigned.add(model.variables)
    label = label_of(site.call.call, site.mode)
    parts = "parts" in spelling.returns
    if not called.mutable:
        return [*lines, *lines_of(scribe, site.target, label, value, parts=parts)]
    if options["mutable"]:
        given = tuple(name for name in options["mutable"] if name in spelling.mutable)
        return [*lines, *_with_updates(scribe, site.target, label, value, model.variables, given, kept, called)]
    updates = scribe.variable("updates", "new_values") if kept else "_"
    after = merged(scribe, model.variables, kept, called.mutable, updates)
    return [*lines, *lines_of_pair(scribe, site.target, label, value, updates, after=after, parts=parts)]


def _with_updates(
    scribe: Scribe,
    target: str,
    label: str,
    value: str,
    variables: str,
    given: Sequence[str],
    kept: Sequence[str],
    called: Called,
) -> list[str]:
    """The lines for a run that gives `(output, updates)`, with the collections `given` in the updates."""
    name, names = name_of(target), names_of(target)
    pair = names if len(names) == 2 else []
    if set(given) == set(called.mutable) and (name or pair or not kept):
        updates = pair[1] if pair else f"{name}[1]"
        after = merged(scribe, variables, kept, called.mutable, updates)
        return lines_of(scribe, target, label, value, after=after, parts=bool(pair))
    output = pair[0] if pair else scribe.variable("output", "result")
    updates = scribe.variable("updates", "new_values")
    after = merged(scribe, variables, kept, called.mutable, updates)
    picked = ", ".join(f"{scribe.text(name)}: {updates}[{scribe.text(name)}]" for name in given)
    lines = [f"{output}, {updates} = {value}", *after]
    if pair:
        return [*lines, f"{pair[1]} = {{{picked}}}", *scribe.show(label, f"({', '.join(pair)})")]
    return [*lines, *lines_of(scribe, target, label, f"({output}, {{{picked}}})")]


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
            inner = [call(f"{model.variables} = {before}", items), *_keep_first(page, model, params)]
            lines += [f"if {model.variables} is None:", *indented(inner, scribe.unit)]
        else:
            lines += [call(f"{model.variables} = {before}", items), *_keep_first(page, model, params)]
    if added:
        if site.path and len(added) < len(runs):
            raise CannotSay("its first run added variables to those that were there, and the others did not")
        page.assigned.add(model.variables)
        scribe.needs.add("traverse_util")
        flat = scribe.variable("flat_variables")
        first = replace(called, spelling=added[0].spelling or called.spelling)
        before, items = linen_lines.init_items(scribe, first, model.first_key or params)
        lines.append(call(f"{flat} = traverse_util.flatten_dict({before}", items, "))"))
        lines.append(f"{flat}.update(traverse_util.flatten_dict({model.variables}))")
        lines.append(f"{model.variables} = traverse_util.unflatten_dict({flat})")
    return lines


def _keep_first(page: Page, model: Model, params: str) -> list[str]:
    """The line that keeps the key of the first init, where a method adds variables later."""
    if not model.first_key:
        return []
    page.assigned.add(model.first_key)
    return [f"{model.first_key} = {params}"]
