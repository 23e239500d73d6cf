"""The method of a `Session` that chooses the mesh its runs are laid out on, and what is shown of that mesh by itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

import jax
from msgspec.structs import replace

from ..base.digest import is_spread
from ..base.measures import default_device
from ..base.private import is_in_mesh
from ..base.text import bytes_
from ..base.threads import until_committed
from ..base.types import PyTree
from ..compile.placement import DATA, Placement, agree, of_devices, on_one_device, where_lies
from ..errors import FlaxMagicsError
from ..execution import surroundings
from ..execution.surroundings import stand_outside
from ..line.options import axes_text, check_axes, mesh_axes
from ..report.html import render, shown_bundle
from ..report.tables import mesh_drawing, mesh_lines
from ..report.text import Notice, notice_text

if TYPE_CHECKING:
    from ..base.types import PyTree
    from ..compile.cache import Services
    from ..state.entry import ModelEntry
    from ..state.state import State


OWN = "a mesh of your own is set here, and it stands"


def notice(placement: Placement | None) -> Notice:
    """The line of a mesh: `mesh · data=4,model=2 · cpu:0-7 · …`."""
    if placement is None:
        return Notice("mesh", (f"none: {OWN if is_in_mesh() else 'runs are on one device'}",))
    cut = f"the leading axis of arrays is cut into {placement.parts} parts"
    if placement.is_single:
        cut = "one device, as without it"
    elif placement.parts == 1:
        cut = f"no axis `{DATA}`: arrays are whole on each device"
    if is_in_mesh():
        cut = f"not used now: {OWN}"
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
            mesh_drawing(placement.shape, placement.devices),
            [notice_text(line), *mesh_lines(placement.shape, placement.devices, "  ")],
        )
    return shown_bundle("\n".join(text), lambda: render("mesh.html", {"texts": line.texts, "rows": rows}), style)


Write = Callable[[], None]


class MeshMethods:
    """The part of a Session that chooses devices."""

    _state: State
    services: Services
    _in_place_of: Callable[[State], AbstractContextManager[None]]

    def mesh(self, axes: Mapping[str, int] | str | None = None, /, **sizes: int) -> Placement | None:
        """Lays out runs over a mesh from now on, and returns it; without arguments the present one, None where none is.

        The leading axis of arrays in a call is cut over the axis `data`. Variables are whole on each device, or cut as
        their annotations say (`nn.with_partitioning`, an NNX Variable's sharding). A mesh or sharded arrays of your own
        stand. Its `mesh` is the `jax.sharding.Mesh`, its `batch` and `replicated` are shardings for arrays of your own.

        In a job of several processes it is of the devices of all of them: each makes the same calls with the same arrays,
        and takes its part of them.

        Args:
          axes, sizes: axis → number of devices, as `mesh(data=4, model=2)` or `mesh("data=4,model=2")`; one of them may be
            -1, for all that are left. "off" goes back to one device.

        Raises:
          FlaxMagicsError: they do not go with the devices, an annotated variable cannot be cut so, or another process of
            the job does something else.
        """
        if axes is None and not sizes:
            return self._state.placement
        if axes == "off":
            stand_outside(surroundings.of_state, "%flax_mesh off", "%flax_mesh off")
            return self._placed_on(None, "%flax_mesh off")
        if isinstance(axes, jax.sharding.Mesh):
            raise FlaxMagicsError(
                "a session makes its mesh itself, by axes and sizes; one of your own is set by jax.set_mesh, and stands.",
                hint="mesh(data=-1), or mesh(dict(mesh.shape)) for one of the same shape",
            )
        wanted = {**(mesh_axes(axes) if isinstance(axes, str) else axes or {}), **sizes}
        check_axes(wanted)
        line = f"%flax_mesh {axes_text(wanted)}"
        stand_outside(surroundings.of_state, line, line)
        if is_in_mesh():
            message = f"{OWN}: runs inside it are laid out by what you write."
            raise FlaxMagicsError(message, hint=f"outside of it (no jax.set_mesh, no `with mesh:`) {line} sets one")
        return self._placed_on(of_devices(wanted, jax.devices(default_device().platform)), line)

    @property
    def speaks(self) -> bool:
        """Whether this process shows what it does: of several that run together the first alone."""
        placement = self._state.placement
        return placement is None or placement.processes is None or placement.processes.rank == 0

    @until_committed
    def _placed_on(self, placement: Placement | None, line: str) -> Placement | None:
        """Makes it the session's, and moves all variables there; of None to one device. All of it or nothing."""
        before = self._state
        held = {name: entry.held for name, entry in before.models.items()}
        parted = [name for name, tree in held.items() if any(map(is_spread, jax.tree_util.tree_leaves(tree)))]
        on = placement or before.placement
        if parted and on is not None and on.processes is not None and on.processes.why_failed(line) is not None:
            message = f"{line}: parts of `{parted[0]}` were in a process that has ended, and are lost."
            raise FlaxMagicsError(
                message, hint="a kernel that is started anew goes on with a saved session: %flax_load"
            )
        # To give up what each process has whole takes no other.
        if placement is not None or parted:
            agree(self.services, on, before.root.draw(), line, tree=held)
        entries, writes = {}, []
        for name, entry in before.models.items():
            entries[name], write = _moved(entry, before.placement, placement)
            writes += [] if write is None else [write]
        with self._in_place_of(before):
            for write in writes:
                write()
            self._state = replace(before, models=entries, placement=placement)
        if before.placement is not None:
            before.placement.forget()
        return placement


def _moved(entry: ModelEntry, before: Placement | None, after: Placement | None) -> tuple[ModelEntry, Write | None]:
    """An entry with its variables, and what a training of it left, on the mesh; what writes them into an NNX module."""
    annotations = entry.model.annotations()

    def move(tree: PyTree) -> PyTree:
        if after is not None and not after.is_single:
            return after.of_variables(tree, annotations, before=before)
        return tree if before is None else on_one_device(tree, before)

    held = entry.held
    if held is None:
        return entry, None
    values = move(held)
    leaves = zip(*map(jax.tree_util.tree_leaves, (values, held)), strict=True)
    if all(now is was for now, was in leaves):
        return entry, None
    source = entry.source_now()
    in_module = entry.variables is None
    source = source and source.over(values, in_module=in_module)
    training = entry.training
    if training is not None:
        training = replace(training, opt_state=move(training.opt_state))
    entry = replace(entry, source=source, training=training)
    if not in_module:
        return replace(entry, variables=values), None
    module = entry.nnx.model
    return entry, lambda: module.assign(values)
