"""What is shown of a mesh: its devices drawn as a table, and what lives where."""

from __future__ import annotations

from collections.abc import Iterator

from ..base.text import clean, table
from ..compile.placement import DATA, Placement
from ..report.html import render, shown_bundle
from ..report.text import Notice, notice_text

NONE = Notice("mesh", ("none: runs are on one device",))
SHOWN = 64
"""Of a mesh of more devices the first ones are drawn."""


def notice(placement: Placement | None) -> Notice:
    """The line of a mesh: `mesh · data=4,model=2 · cpu:0-7 · …`."""
    if placement is None:
        return NONE
    cut = f"the leading axis of arrays is cut into {placement.parts} parts"
    if placement.mesh.size == 1:
        cut = "one device, as without it"
    elif placement.parts == 1:
        cut = f"no axis `{DATA}`: arrays are whole on each device"
    return Notice("mesh", (placement.axes, placement.where, cut))


def drawing(placement: Placement) -> list[tuple[str, ...]]:
    """The mesh as rows of cells: the last axis from left to right, all others downwards."""
    mesh = placement.mesh
    *down, across = mesh.axis_names
    sizes = [mesh.shape[name] for name in down]
    columns = mesh.shape[across]
    devices = [f"{device.platform}:{device.id}" for device in mesh.devices.flat]
    shown = min(columns, SHOWN)
    more = ("…",) if shown < columns else ()

    def places(sizes: list[int]) -> Iterator[tuple[int, ...]]:
        if not sizes:
            yield ()
            return
        for place in range(sizes[0]):
            for rest in places(sizes[1:]):
                yield (place, *rest)

    rows = [("", *(f"{clean(across)} {n}" for n in range(shown)), *more)]
    for number, place in enumerate(places(sizes)):
        if number * shown >= SHOWN and number:
            rows.append(("…",))
            break
        label = " ".join(f"{clean(name)} {n}" for name, n in zip(down, place, strict=True))
        first = number * columns
        rows.append((label, *devices[first : first + shown], *more))
    return rows


def mesh_bundle(placement: Placement | None, style: str) -> dict[str, object]:
    """The MIME bundle of a bare `%flax_mesh`: the line, and beneath it the devices."""
    line = notice(placement)
    rows = [] if placement is None or placement.mesh.size == 1 else drawing(placement)
    text = [notice_text(line), *table(rows, indent="  ", gap="  ")]
    return shown_bundle("\n".join(text), lambda: render("mesh.html", {"texts": line.texts, "rows": rows}), style)
