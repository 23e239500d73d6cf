"""The keys of a run: a draw from the root key, many of them, or one that was made before."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..spelling import Spelling
from .page import CannotSay, Page
from .reading import Site
from .scribe import Scribe, indented
from .values import name_of

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
    target = name_of(site.target)
    show = scribe.show(f"key {name}", target or scribe.key(name))
    if name in ("params", "dropout"):
        bind = [f"{site.target} {scribe.key(name)}"] if site.target else []
        return [*scribe.draw(), *bind, *show]
    if target:
        return [f"{target} = {scribe.fold(name)}  # stream {scribe.text(name)}", *scribe.draw(), *show]
    bind = [f"{site.target} {scribe.key(name)}"] if site.target else []
    return [*scribe.draw((name,)), *bind, *show]


def of_run(page: Page, site: Site, indices: Sequence[int], spelling: Spelling) -> Keys:
    """The lines that make the keys of a run; the variable of each stream's; and that of the `params` for an init."""
    scribe, options = page.scribe, site.given.options
    streams = (*spelling.streams, *options["key"])
    size = options["draws"]
    if size is not None and spelling.taken and "params" in streams:
        raise CannotSay("the first of its draws has another `params` key than the others")
    made = any(page.story.runs[index].made for index in indices)
    if options["draw"] is not None:
        more = ("params", "dropout") if made else ()
        return replayed(page, indices, tuple(dict.fromkeys((*streams, *more))), spelling.taken, size)
    page.assigned.add(scribe.root)

    def key(stream: str) -> str:
        return scribe.key(stream, taken=spelling.taken)

    if size is not None:
        return _series(scribe, scribe.root, size, (*streams, *(("params",) if made else ())), key)
    if page.story.shares_in_place(site):
        page.assigned |= {scribe.params, scribe.dropout, *(key(stream) for stream in streams)}
        return [], key, scribe.params
    return scribe.draw(streams, taken=spelling.taken), key, scribe.params


def replayed(page: Page, indices: Sequence[int], streams: Sequence[str], taken: bool, size: int | None = None) -> Keys:
    """The keys of an earlier draw, or of `size` draws from that on, made again from its seed."""
    scribe = page.scribe
    found = {(page.story.runs[index].seed, page.story.runs[index].draw) for index in indices}
    if len(found) > 1:
        raise CannotSay("--draw stood for another draw each time")
    ((seed, number),) = found
    scribe.needs.add("jax")
    root = scribe.variable("replayed_root_key")
    names = {name: scribe.variable(f"replayed_{name}_key") for name in streams}
    which = f"draw {number}" if size in (None, 1) else f"draws {number} to {number + (size or 1) - 1}"
    lines = [
        f"{root} = jax.random.key({seed})  # {which} again",
        *(scribe.advance(number - 1, root) if number > 1 else []),
    ]

    def key(stream: str) -> str:
        return names[stream]

    if size is not None:
        moved, many, params = _series(scribe, root, size, streams, key)
        return [*lines, *moved], many, params
    return [*lines, *scribe.keys_of(root, streams, key, taken=taken)], key, names.get("params", "")


def _series(scribe: Scribe, root: str, size: int, streams: Sequence[str], key: Callable[[str], str]) -> Keys:
    """As many draws from `root` as one run takes: their keys in lists."""
    names = {stream: scribe.variable(f"{stream}_keys") for stream in dict.fromkeys(streams)}
    if not names:
        return scribe.advance(size, root), key, scribe.params
    own = root == scribe.root
    body = scribe.draw(tuple(names)) if own else scribe.keys_of(root, tuple(names), key, moves=True)
    body += [f"{many}.append({key(stream)})" for stream, many in names.items()]
    empty = ", ".join(["[]"] * len(names))
    lines = [f"{', '.join(names.values())} = {empty}", f"for _ in range({size}):", *indented(body, scribe.unit)]
    return lines, lambda stream: names[stream], f"{names.get('params', '')}[0]"
