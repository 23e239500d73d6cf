"""What is shown of a session's mesh by itself."""

from __future__ import annotations

from collections.abc import Mapping

from ..base.text import bytes_
from ..base.types import PyTree
from ..compile.placement import DATA, Placement, where_lies
from ..report.html import render, shown_bundle
from ..report.mesh import drawing, lines
from ..report.text import Notice, notice_text

NONE = Notice("mesh", ("none: runs are on one device",))


def notice(placement: Placement | None) -> Notice:
    """The line of a mesh: `mesh · data=4,model=2 · cpu:0-7 · …`."""
    if placement is None:
        return NONE
    cut = f"the leading axis of arrays is cut into {placement.parts} parts"
    if placement.is_single:
        cut = "one device, as without it"
    elif placement.parts == 1:
        cut = f"no axis `{DATA}`: arrays are whole on each device"
    return Notice("mesh", (placement.axes, placement.where, cut))


def cells(placement: Placement | None, models: Mapping[str, PyTree]) -> list[tuple[str, ...]]:
    """The mesh for `%flax`: how it is written, and where the variables of each model live."""
    if placement is None:
        return []
    rows: list[tuple[str, ...]] = [(placement.axes, placement.where)]
    for name, variables in models.items():
        rows += [(name, f"{one.how}, {bytes_(one.bytes)} a device") for one in where_lies(variables)]
    return rows


def mesh_bundle(placement: Placement | None, style: str) -> dict[str, object]:
    """The MIME bundle of `%flax_mesh`: the line, and beneath it the devices."""
    line = notice(placement)
    if placement is None or placement.is_single:
        rows, text = [], [notice_text(line)]
    else:
        rows, text = (
            drawing(placement.shape, placement.devices),
            [notice_text(line), *lines(placement.shape, placement.devices, "  ")],
        )
    return shown_bundle("\n".join(text), lambda: render("mesh.html", {"texts": line.texts, "rows": rows}), style)
