"""The lines that stand in the place of a command."""

from __future__ import annotations

from collections.abc import Sequence

from . import draws, linen_runs, loading, nnx_runs
from .page import CannotSay, Page
from .reading import MODELS, Site
from .scribe import label_of


def lines(page: Page, site: Site, indices: Sequence[int]) -> list[str]:
    """The lines for `site`, whose runs are `indices`.

    Raises:
      CannotSay: it cannot be written.
    """
    page.assigned = set()
    options = site.given.options
    if site.name == "flax_key":
        return draws.named(page, site)
    if site.name == "flaxmodel":
        return _register(page, site, indices)
    if site.name == "flax_load":
        return loading.lines(page)
    if not site.draws:
        if site.name not in _LEAVING:
            raise CannotSay("what it does has no lines in a script")
        if site.target:
            raise CannotSay(f"its value is a report of %{site.name}")
        return []
    if page.gone:
        raise CannotSay("the history of its run is gone: %flax_load brought another")
    if not indices:
        # Another branch, say: what a line like it did elsewhere is what this one would do.
        alike = [i for i, run in enumerate(page.story.runs) if run.made is None and site.matches(run)]
        if not alike or site.name == "flax_init":
            raise CannotSay("it never ran")
        indices = alike[-1:]
    run = page.story.runs[indices[-1]]
    model = page.models.get(run.model or "")
    if model is None:
        raise CannotSay(f"the model `{run.model}` is not known any more")
    if site.name == "flax_init" or any(page.story.runs[index].made is not None for index in indices):
        page.lost.pop(run.model or "", None)
    if run.model in page.lost and options.get("variables") is None:
        raise CannotSay(page.lost[run.model])
    if site.name == "flax_init":
        return (
            nnx_runs.build_again(page, site, model, indices)
            if model.holds
            else linen_runs.init(page, site, model, indices)
        )
    apply = nnx_runs.apply if model.holds else linen_runs.apply
    return apply(page, site, model, indices)


_LEAVING = (
    "help",
    "flax",
    "flax_doctor",
    "flax_export",
    "flax_free",
    "flax_history",
    "flax_replay",
    "flax_save",
    "flax_summary",
)
"""Commands that leave the session as it was."""
_ANY = "nnx.Rngs(params=0, dropout=1)"


def _register(page: Page, site: Site, indices: Sequence[int]) -> list[str]:
    """`%flaxmodel net = Net(8)`, and what a cell registers by itself."""
    scribe = page.scribe
    name, _, written = (part.strip() for part in site.given.rest.partition("="))
    lines: list[str] = []
    for registered in page.states if name == MODELS else (name,):
        model = page.models.get(registered)
        if model is None or model.name == registered or (model.holds and indices):
            continue
        if not model.holds:
            lines.append(f"{model.name} = {registered}()")
        elif page.states.get(registered) != "unchanged":
            lines.append(f"{model.name} = {nnx_runs.with_rngs(f'{registered}()', _ANY)}")
        page.assigned.add(model.name)
    for index in indices:
        run = page.story.runs[index]
        model = page.models[run.model or name]
        _, _, built = run.by_hand.partition(" = ")
        built = built.replace("params=params_key", f"params={scribe.params}")
        built = built.replace("dropout=dropout_key", f"dropout={scribe.dropout}")
        streams, taken = page.story.folded_later(site)
        stays = page.story.stays(site)
        page.assigned |= {scribe.root, model.name}
        scribe.needs.add("nnx")
        lines += [*scribe.draw(streams, taken=taken, stay=stays), f"{model.name} = {built}"]
        lines += scribe.show(label_of(f"{model.name} = {run.call}"), f"nnx.state({model.name})")
    if lines or name == MODELS or not written:
        return lines
    known = page.models.get(name)
    if known is not None and known.construction and "rngs" not in written:
        if page.states.get(name) == "unchanged":
            return []
        # An edit that kept the values: the keys do not matter, the streams do.
        scribe.needs.add("nnx")
        written = nnx_runs.with_rngs(written, _ANY)
    page.assigned.add(name)
    return [f"{name} = {written}"]
