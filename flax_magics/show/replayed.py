"""What `%flax_replay` says: identical, or what differs and by how much."""

from __future__ import annotations

from typing import TYPE_CHECKING

from . import facts
from .columns import clean, cut
from .notice import Notice
from .units import plural, ulp

if TYPE_CHECKING:
    from ..agreement import Agreement, Difference
    from ..run import Run

NAMED = 6
"""Leaves that are named; of more it is said how many."""


def notice_of(run: Run) -> Notice:
    """`net · train · draw 3 of seed 0 · replayed · identical: float32[3,4,3]`, and beneath it what differs."""
    from ..run import Note

    agreement = run.agreement
    assert agreement is not None
    notes = [Note("replay", clean(text)) for text in agreement.said]
    if agreement.identical is False:
        shown = [difference_text(difference) for difference in agreement.differences[:NAMED]]
        more = len(agreement.differences) - len(shown)
        if more:
            shown.append(f"and {plural(more, 'more leaf').replace('leafs', 'leaves')}")
        if not shown:
            shown = ["its output is gone, and a digest cannot tell where or by how much they differ"]
        notes = [*(Note("replay", text) for text in shown), *notes]
    elif agreement.identical is None:
        notes.insert(0, Note("replay", NOTHING, form="%flax_apply -o run …"))
    texts = (
        facts.mode_of(run),
        f"{facts.draw_of(run, seed=True).removesuffix(' again')}",
        "replayed",
        verdict(run, agreement),
    )
    return Notice(facts.name_of(run), tuple(text for text in texts if text), tuple(notes))


NOTHING = "its output was let go of before a digest was taken: there is nothing to compare with"


def verdict(run: Run, agreement: Agreement) -> str:
    """`identical: float32[3,4,3]`, `identical, by its digest`, `differs`, `nothing to compare with`."""
    if agreement.identical is None:
        return "nothing to compare with"
    if not agreement.identical:
        return "differs"
    how = ", by its digest" if agreement.against == "digest" else ""
    return f"identical{how}: {cut(clean(run.shape), 40)}"


def difference_text(difference: Difference) -> str:
    """`['a']: 3 of 36 elements, up to 1.19e-07 (1 ulp)`."""
    where = f"{clean(difference.path)}: " if difference.path else ""
    if difference.text:
        return where + cut(clean(difference.text), 120)
    text = f"{where}{difference.elements:,} of {plural(difference.size, 'element')}"
    if difference.largest is not None:
        text += f", up to {difference.largest:.3g}"
    return text + (f" ({ulp(difference.ulp)})" if difference.ulp is not None else "")
