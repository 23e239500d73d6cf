"""The keys of a run: a draw from the root key, many of them, or one that was made before."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..spelling import Spelling
from .page import CannotSay, Page
from .reading import Site
from .scribe import indented

Keys = tuple[list[str], Callable[[str], str], str]
"""The lines that make keys; the variable of each stream's; and that of the `params` key for an init."""


def named(page: Page, site: Site) -> list[str]:
    """The lines of `%flax_key`."""
    scribe, options = page.scribe, site.given.options
    if options["seed"] is not None:
        page.assigned = {scribe.root}
        return [scribe.start(options["seed"])]
    name = site.given.rest
    if not name:
        return []
    page.assigned = {scribe.root}
    target = site.target.removesuffix("=").strip()
    plain = site.target.endswith("=") and target.isidentifier()
    show = scribe.show(f"key {name}", target if plain else scribe.key(name))
    if name in ("params", "dropout"):
        bind = [f"{site.target} {scribe.key(name)}"] if site.target else []
        return [*scribe.draw(), *bind, *show]
    if plain:
        return [f"{target} = {scribe.fold(name)}  # stream {scribe.text(name)}", *scribe.draw(), *show]
    bind = [f"{site.target} {scribe.key(name)}"] if site.target else []
    return [*scribe.draw((name,)), *bind, *show]


def of_run(page: Page, site: Site, indices: Sequence[int], spelling: Spelling) -> Keys:
    """The lines that make the keys of a run; the variable of each stream's; and that of the `params` for an init."""
    scribe, options = page.scribe, site.given.options
    streams = (*spelling.streams, *options["key"])
    if options["draw"] is not None:
        return replayed(page, indices, streams, spelling.taken)
    page.assigned.add(scribe.root)

    def key(stream: str) -> str:
        return scribe.key(stream, taken=spelling.taken)

    if options["draws"] is not None:
        return series(page, options["draws"], streams, indices)
    if page.story.shares_in_place(site):
        page.assigned |= {scribe.params, scribe.dropout, *(key(stream) for stream in streams)}
        return [], key, scribe.params
    return scribe.draw(streams, taken=spelling.taken), key, scribe.params


def series(page: Page, size: int, streams: Sequence[str], indices: Sequence[int]) -> Keys:
    """As many draws as one run takes: their keys in lists."""
    scribe = page.scribe
    made = any(page.story.runs[index].made for index in indices)
    wanted = dict.fromkeys([*streams, *(("params",) if made else ())])
    names = {stream: scribe.variable(f"{stream}_keys") for stream in wanted}
    if not names:
        return scribe.advance(size), scribe.key, scribe.params
    empty = ", ".join(["[]"] * len(names))
    body = [*scribe.draw(streams), *(f"{many}.append({scribe.key(stream)})" for stream, many in names.items())]
    lines = [f"{', '.join(names.values())} = {empty}", f"for _ in range({size}):", *indented(body, scribe.unit)]
    return lines, lambda stream: names[stream], f"{names.get('params', '')}[0]"


def replayed(page: Page, indices: Sequence[int], streams: Sequence[str], taken: bool) -> Keys:
    """The keys of an earlier draw, made again from its seed."""
    scribe = page.scribe
    found = {(page.story.runs[index].seed, page.story.runs[index].draw) for index in indices}
    if len(found) > 1:
        raise CannotSay("--draw stood for another draw each time")
    ((seed, number),) = found
    scribe.needs.add("jax")
    root = scribe.variable("replayed_root_key")
    names = {name: scribe.variable(f"replayed_{name}_key") for name in ("params", "dropout", *streams)}
    lines = [f"{root} = jax.random.key({seed})  # draw {number} again"]
    step = f"{root} = jax.random.split({root}, 3)[0]"
    if number == 2:
        lines.append(step)
    elif number > 2:
        lines += [f"for _ in range({number - 1}):", scribe.unit + step]
    for stream in streams:
        if stream not in ("params", "dropout") or (taken and stream == "params"):
            names[stream] = scribe.variable(f"replayed_{stream}_key")
            lines.append(f"{names[stream]} = {scribe.fold(stream, root)}  # stream {scribe.text(stream)}")
    lines.append(f"_, {names['params']}, {names['dropout']} = jax.random.split({root}, 3)")
    return lines, lambda stream: names[stream], names["params"]
