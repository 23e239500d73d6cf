"""Where the arrays of a run live: the mesh of a session, and how variables and arguments are laid out over it.

A run's own program is told by the shardings of its inputs, as `jax.jit` is by hand. Arrays that the user has sharded
stand as they are, and inside a mesh of the user's own nothing is placed at all.
"""

from __future__ import annotations

import sys
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import meta
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from msgspec import Struct
from msgspec.structs import replace

from ..base.digest import digest_of_alike, is_gone, is_key, is_spread, may_be_key, weakly_typed
from ..base.measures import Lies, MeshUse, name_devices
from ..base.private import is_in_mesh
from ..base.processes import Processes, Standing, Waiting, processes_of
from ..base.text import plural
from ..base.types import Leaf, PyTree
from ..code.library import nnx_modules
from ..errors import FlaxMagicsError, written
from ..line.expression import Line
from ..line.options import axes_text
from ..models.base import names_in
from ..models.calls import Arguments
from ..rng.keys import Draw, DrawBatch

DATA = "data"
"""The axis of a mesh over which the leading axis of arrays is sharded."""
RECENT = 16
"""So many arrays of the user's are remembered with their copies on the mesh: a loop moves its input once."""
MESH = "flax_magics.session().mesh()"
"""The expression of a session's placement, for advice."""

Names: TypeAlias = tuple[Any, ...]
"""For each axis of a variable the mesh's axis that shards it, several of them as a tuple, or None."""
Annotations: TypeAlias = Mapping[str, Mapping[str, Names]]
"""Collection → path → names, of variables that have no box of their own around them (NNX)."""


class Placement(Struct, frozen=True, dict=True):
    """A mesh of Auto axes, over which a session lays out what its runs take.

    Attributes:
      mesh: a `jax.sharding.Mesh`.
    """

    mesh: Mesh

    @property
    def axes(self) -> str:
        """The mesh as it is written on the command's line: `data=4,model=2`."""
        return axes_text(self.mesh.shape)

    @property
    def shape(self) -> tuple[tuple[str, int], ...]:
        """Its axes with their sizes."""
        return tuple(self.mesh.shape.items())

    @property
    def devices(self) -> tuple[str, ...]:
        """The names of its devices, the last axis running fastest."""
        return tuple(f"{device.platform}:{device.id}" for device in self.mesh.devices.flat)

    @property
    def where(self) -> str:
        """Its devices in words: `cpu:0-7`."""
        return name_devices(set(self.mesh.devices.flat))

    @cached_property
    def is_single(self) -> bool:
        """Whether it is one device alone: runs are then what they are without a mesh."""
        return bool(self.mesh.size == 1)

    @cached_property
    def parts(self) -> int:
        """Into how many parts the leading axis of an array is cut."""
        return int(self.mesh.shape.get(DATA, 1))

    @cached_property
    def replicated(self) -> NamedSharding:
        """The sharding of what each device holds whole."""
        return NamedSharding(self.mesh, PartitionSpec())

    @cached_property
    def batch(self) -> NamedSharding:
        """The sharding of an array whose leading axis is that of examples."""
        return NamedSharding(self.mesh, PartitionSpec(DATA)) if DATA in self.mesh.shape else self.replicated

    @cached_property
    def processes(self) -> Processes | None:
        """The processes of the job that the devices belong to; None where all are of this one."""
        return processes_of(list(self.mesh.devices.flat))

    @cached_property
    def _devices(self) -> set[jax.Device]:
        return set(self.mesh.devices.flat)

    @cached_property
    def _recent(self) -> OrderedDict[tuple[int, bool], tuple[weakref.ref[jax.Array], jax.Array]]:
        """Identity of an array, and whether it was cut → a reference to it, and its copy on the mesh."""
        return OrderedDict()

    def of_rows(self, rows: int) -> NamedSharding:
        """The sharding of so many rows: whole on each device where they cannot be cut into equal parts."""
        return self.replicated if rows % self.parts else self.batch

    def of_batch(self, tree: PyTree) -> PyTree:
        """A batch on the mesh, its rows cut where they can be; arrays that lie there stand as they are."""

        def place(leaf: Leaf) -> Leaf:
            return leaf if self.holds(leaf) else put(leaf, self.of_rows(leaf.shape[0]))

        return jax.tree_util.tree_map(place, tree)

    def holds(self, leaf: Leaf) -> bool:
        """Whether an array lies on the mesh, however it is cut. Another mesh of the same devices is another one."""
        if not isinstance(leaf, jax.Array) or leaf.sharding.device_set != self._devices:
            return False
        return not isinstance(leaf.sharding, NamedSharding) or leaf.sharding.mesh == self.mesh

    # -- variables

    def of_variables(
        self, tree: PyTree, annotations: Annotations | None = None, *, before: Placement | None = None
    ) -> PyTree:
        """Variables on the mesh: whole on each device, or cut as they are annotated. Shapes stay shapes.

        Args:
          annotations: of leaves that have no box around them.
          before: the placement that laid them out so far: what it has placed is placed anew.

        Raises:
          FlaxMagicsError: an axis cannot be cut as it is annotated.
        """

        def place(leaf: Leaf, names: Names | None, path: str) -> Leaf:
            if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
                return leaf
            ours = before is not None and _lies_on(leaf, before.mesh)
            if self.holds(leaf) and not ours:
                return leaf
            return put(leaf, self._sharding(leaf.shape, names, path))

        return _mapped(place, tree, annotations)

    def constrain(self, tree: PyTree, annotations: Annotations | None = None) -> PyTree:
        """What a program writes, laid out as the variables in whose place it comes; for a function under trace."""

        def constrain(leaf: Leaf, names: Names | None, path: str) -> Leaf:
            if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
                return leaf
            return jax.lax.with_sharding_constraint(leaf, self._sharding(leaf.shape, names, path))

        return _mapped(constrain, tree, annotations)

    def _sharding(self, shape: tuple[int, ...], names: Names | None, path: str) -> NamedSharding:
        """The sharding of a variable. Axes that the mesh does not have cut nothing."""
        if not names or len(names) > len(shape):
            return self.replicated
        spec = []
        for place, entry in enumerate(names):
            known = tuple(name for name in (entry if isinstance(entry, tuple) else (entry,)) if name in self.mesh.shape)
            parts = int(np.prod([self.mesh.shape[name] for name in known], dtype=int))
            if shape[place] % parts:
                raise FlaxMagicsError(
                    f"`{path}` is {list(shape)} and annotated {names}: its axis {place} of {shape[place]} cannot be cut"
                    f" into {parts} equal parts, and the mesh is {self.axes}.",
                    hint="a mesh whose axis divides it can, or another annotation in the model",
                )
            spec.append(known[0] if len(known) == 1 else known or None)
        return NamedSharding(self.mesh, PartitionSpec(*spec))

    # -- arguments

    def of_arguments(self, arguments: Arguments, line: Line, *, of_loss: bool) -> tuple[Arguments, Shardings]:
        """The arguments with those that are traced on the mesh, and how each was laid out by name.

        The leading axis is cut over `data`; of a loss that of its batch alone, since what follows is passed as it is.
        Keys, scalars and what NNX modules hold are whole on each device.

        Args:
          line: for the advice in an error.

        Raises:
          FlaxMagicsError: a leading axis cannot be cut, or an array lies on other devices.
        """
        shardings: dict[str, NamedSharding] = {}
        positional = arguments.treedef.children()[0].children()
        in_batch = positional[0].num_leaves if of_loss and positional else None if not of_loss else 0
        held = _in_modules(arguments)
        for place, (name, leaf, traced) in enumerate(arguments.rows):
            if not traced or not getattr(leaf, "shape", ()):
                continue
            if _is_laid_out(leaf) and not self.holds(leaf):
                raise self._of_other_devices(name, leaf, line)
            is_batch = place not in held and not may_be_key(leaf) and (in_batch is None or place < in_batch)
            if is_batch and not self.holds(leaf) and leaf.shape[0] % self.parts:
                raise self._undivided(name, leaf, line)
            shardings[name] = self.batch if is_batch else self.replicated
        return replace(arguments, placed=self.put(arguments.dynamic, shardings)), shardings

    def put(self, leaves: Mapping[str, Leaf], shardings: Shardings) -> dict[str, Leaf]:
        """The leaves by name, those with a sharding on the mesh by it; arrays that lie there stand as they are."""
        return {name: self._put(leaf, shardings[name]) if name in shardings else leaf for name, leaf in leaves.items()}

    def _put(self, leaf: Leaf, sharding: NamedSharding) -> Leaf:
        """An argument on the mesh. An array that was moved there before, and lives still, is not moved again."""
        if not isinstance(leaf, jax.Array) or leaf.is_deleted():
            return put(leaf, sharding)
        if self.holds(leaf):
            return leaf
        recent, key = self._recent, (id(leaf), sharding is self.replicated)
        reference, placed = recent.get(key, (None, None))
        if reference is None or reference() is not leaf:
            placed = put(leaf, sharding)
            recent[key] = weakref.ref(leaf, lambda _: recent.pop(key, None)), placed
            while len(recent) > RECENT:
                recent.popitem(last=False)
        return placed

    def forget(self) -> int:
        """Lets go of the copies of the user's arrays. Returns how many there were."""
        copies = len(self._recent)
        self._recent.clear()
        return copies

    def use(self, inputs: PyTree, variables: PyTree, output: PyTree, text: Callable[[], str | None]) -> MeshUse:
        """What a run made of the mesh.

        Args:
          inputs: by name.
          text: gives the compiled program as XLA writes it.
        """
        arguments = [lies for name, leaf in inputs.items() for lies in where_lies(leaf, name)]
        return MeshUse(
            self.shape, self.devices, tuple(arguments), tuple(where_lies(variables)), tuple(where_lies(output)), text
        )

    def _undivided(self, name: str, leaf: Leaf, line: Line) -> FlaxMagicsError:
        """The error for a leading axis that cannot be cut into equal parts."""
        rows, parts = leaf.shape[0], self.parts
        below = rows - rows % parts
        fitting = f"{below} or {below + parts}" if below else str(parts)
        return FlaxMagicsError(
            f"{line.call} cannot be sharded: the leading axis of `{name}` is {rows}, and {DATA}={parts} does not divide"
            " it.",
            hint=f"{fitting} rows can be; what is no batch is given whole to each device",
            **self._moved(name, line, "replicated"),
        )

    def _of_other_devices(self, name: str, leaf: Leaf, line: Line) -> FlaxMagicsError:
        """The error for an array that the user has put on other devices."""
        where, mesh = name_devices(leaf.sharding.device_set), getattr(leaf.sharding, "mesh", None)
        its = Placement(mesh).axes if isinstance(mesh, Mesh) else ""
        return FlaxMagicsError(
            f"`{name}` lies on {where}{f' as {its}' if its else ''}, and the session's mesh is {self.axes} on"
            f" {self.where}: one program has one mesh.",
            hint=f"%flax_mesh {its} makes its mesh the session's" if its and where == self.where else None,
            **self._moved(name, line, "replicated" if leaf.shape[0] % self.parts else "batch"),
        )

    def _moved(self, name: str, line: Line, sharding: str) -> dict[str, str]:
        """Advice: the line with the argument put on the mesh by that sharding."""
        argument = name.partition("[")[0].partition(".")[0]
        moved = line.with_argument(argument, lambda text: f"jax.device_put({text}, {MESH}.{sharding})")
        if moved is None:
            return {"form": f"jax.device_put(…, {MESH}.{sharding})"}
        return written(f"import flax_magics, jax\n{moved}")


Shardings: TypeAlias = Mapping[str, NamedSharding]
"""Argument leaf → its sharding."""


def where_lies(tree: PyTree, name: str = "") -> Iterator[Lies]:
    """How the arrays of a tree are cut, with the bytes on each device: one for each way."""
    sizes: dict[str, int] = {}
    for leaf in jax.tree_util.tree_leaves(tree):
        if not isinstance(leaf, jax.Array) or is_gone(leaf):
            continue
        sharding, shape = leaf.sharding, leaf.shape
        spec = [entry for entry in getattr(sharding, "spec", ()) if entry is not None]
        axes = [name for entry in spec for name in (entry if isinstance(entry, tuple) else (entry,))]
        how = "whole on each" if sharding.is_fully_replicated else f"cut over {' and '.join(map(str, axes))}"
        if len(sharding.device_set) == 1:
            how = f"on {name_devices(sharding.device_set)}"
        itemsize = (jax.random.key_data(leaf).nbytes if is_key(leaf) else leaf.nbytes) // max(1, leaf.size)
        size = int(np.prod(sharding.shard_shape(shape), dtype=int)) * itemsize
        sizes[how] = sizes.get(how, 0) + size
    return (Lies(name, how, size) for how, size in sizes.items())


def agree(
    waiting: Waiting,
    placement: Placement | None,
    draw: Draw | DrawBatch,
    what: str,
    *,
    digest: str = "",
    tree: PyTree = None,
) -> None:
    """Raises unless all processes of a mesh are about to run the same; does nothing on a mesh of this process alone.

    Args:
      what: is run, in words.
      digest: of the program.
      tree: what it is given. Arrays that no process has all of are not compared.

    Raises:
      FlaxMagicsError: some process stands elsewhere, or did not answer.
    """
    if placement is not None and placement.processes is not None:
        standing = Standing(draw.first.seed, draw.first.number, what, digest, digest_of_alike(tree))
        placement.processes.agree(standing, waiting)


def in_force(placement: Placement | None) -> Placement | None:
    """The placement, unless it has one device alone, or the user's own mesh is set: that one stands."""
    return None if placement is None or placement.is_single or is_in_mesh() else placement


def on_one_device(tree: PyTree, placement: Placement) -> PyTree:
    """The tree with what lies on the placement's mesh on one device, as if it had never been placed."""

    def back(leaf: Leaf) -> Leaf:
        if not _lies_on(leaf, placement.mesh):
            return leaf
        if is_key(leaf):
            return jax.random.wrap_key_data(
                jnp.asarray(np.asarray(whole(jax.random.key_data(leaf)))), impl=jax.random.key_impl(leaf)
            )
        # By way of the host: what `device_put` puts somewhere is bound to that device.
        array = np.asarray(whole(leaf))
        return weakly_typed(array) if leaf.weak_type else jnp.asarray(array)

    return jax.tree_util.tree_map(back, tree)


def _is_laid_out(leaf: Leaf) -> bool:
    """Whether the user has laid an array out over several devices."""
    return isinstance(leaf, jax.Array) and len(leaf.sharding.device_set) > 1


def _lies_on(leaf: Leaf, mesh: Mesh) -> bool:
    sharding = getattr(leaf, "sharding", None)
    return isinstance(sharding, NamedSharding) and sharding.mesh == mesh


def put(leaf: Leaf, sharding: NamedSharding) -> Leaf:
    """A leaf laid out by a sharding. Shapes stay shapes.

    Over several processes each puts its own parts of an array that all of them have.
    """
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, weak_type=leaf.weak_type, sharding=sharding)
    if sharding.is_fully_addressable or not getattr(leaf, "is_fully_addressable", True):
        return jax.device_put(leaf, sharding)
    # `device_put` would first compare it in all processes: a program of its own, whenever an array is put.
    if is_key(leaf):
        return jax.random.wrap_key_data(put(jax.random.key_data(leaf), sharding), impl=jax.random.key_impl(leaf))
    array = np.asarray(leaf, jax.dtypes.canonicalize_dtype(leaf.dtype))
    placed = jax.make_array_from_callback(array.shape, sharding, array.__getitem__)
    return weakly_typed(placed) if getattr(leaf, "weak_type", False) else placed


def whole(leaf: Leaf) -> Leaf:
    """An array that this process has all of; of one that others hold parts of a copy, which all have to ask for."""
    return jax.device_put(leaf, NamedSharding(leaf.sharding.mesh, PartitionSpec())) if is_spread(leaf) else leaf


def _mapped(place: Callable[[Leaf, Names | None, str], Leaf], tree: PyTree, annotations: Annotations | None) -> PyTree:
    """`place(leaf, names, path)` of each leaf, where the names are those of the box around it, or of `annotations`."""

    def of_part(path: tuple[Any, ...], part: PyTree) -> PyTree:
        text = jax.tree_util.keystr(path, simple=True, separator="/").removeprefix("params/")
        if _is_box(part):
            names = _names_of(part)
            return jax.tree_util.tree_map(lambda leaf: place(leaf, names, text), part)
        names = None
        if annotations and len(path) > 1:
            names = annotations.get(getattr(path[0], "key", ""), {}).get(getattr(path[1], "key", ""))
        return place(part, names, text)

    return jax.tree_util.tree_map_with_path(of_part, tree, is_leaf=_is_box)


def _is_box(part: object) -> bool:
    nnx = sys.modules.get("flax.nnx")
    return isinstance(part, meta.AxisMetadata) or (nnx is not None and isinstance(part, nnx.Variable))


def _names_of(box: Any) -> Names | None:
    """The names in linen's box around a variable, logical ones as Flax's rules say; of an NNX Variable's metadata."""
    if not isinstance(box, meta.AxisMetadata):
        return names_in(box.get_metadata())
    names = getattr(box, "names", None)
    linen = sys.modules["flax.linen"]
    if names is not None and isinstance(box, linen.LogicallyPartitioned):
        names = linen.logical_to_mesh_axes(names, box.rules)
    return None if names is None else tuple(names)


def auto_mesh(name: str, mesh: Any) -> str:
    """The line that makes the mesh of that name with Auto axes, in the place of a mesh with Explicit ones."""
    sizes, axes = tuple(mesh.shape.values()), tuple(mesh.axis_names)
    kinds = "(AxisType.Auto,)" + f" * {len(axes)}" * (len(axes) > 1)
    return f"{name} = jax.make_mesh({sizes}, {axes}, axis_types={kinds})"


def names_in_tree(tree: PyTree) -> set[str]:
    """The axes that linen's boxes in a tree name."""
    boxes = filter(_is_box, jax.tree_util.tree_leaves(tree, is_leaf=_is_box))
    entries = (entry for box in boxes for entry in _names_of(box) or ())
    return {
        str(name) for entry in entries for name in (entry if isinstance(entry, tuple) else (entry,)) if name is not None
    }


def _in_modules(arguments: Arguments) -> set[int]:
    """The numbers of the leaves that NNX modules hold."""
    modules = nnx_modules()
    if not modules:
        return set()
    nnx = sys.modules["flax.nnx"]
    numbered = jax.tree_util.tree_unflatten(arguments.treedef, range(len(arguments.leaves)))
    kinds = (*modules, nnx.Variable)
    parts = jax.tree_util.tree_leaves(numbered, is_leaf=lambda part: isinstance(part, kinds))
    return {number for part in parts if isinstance(part, kinds) for number in jax.tree_util.tree_leaves(part)}


def of_devices(axes: Mapping[str, int], devices: list[jax.Device]) -> Placement:
    """The placement on the first of the devices, as many as the axes ask for; one size may be -1, for all that is left.

    Raises:
      FlaxMagicsError: the sizes and the devices do not go together.
    """
    named = int(np.prod([size for size in axes.values() if size != -1], dtype=int))
    have = f"{plural(len(devices), 'device')} ({name_devices(set(devices))})"
    if named > len(devices) or (-1 in axes.values() and len(devices) % named):
        fits = {**dict.fromkeys(axes, 1), next(iter(axes)): -1}
        write = f"%flax_mesh {axes_text(fits)}"
        verb = "is" if len(devices) == 1 else "are"
        many = f"{named} devices" if named > len(devices) else f"a number of devices that {named} divides"
        raise FlaxMagicsError(f"{axes_text(axes)} takes {many}, and there {verb} {have}.", write=write)
    sizes = tuple(len(devices) // named if size == -1 else size for size in axes.values())
    types = (jax.sharding.AxisType.Auto,) * len(sizes)
    # By position: the name of the first argument is another since jax 0.11.1.
    count = int(np.prod(sizes, dtype=int))
    left = {device.process_index for device in devices} - {device.process_index for device in devices[:count]}
    if left:
        message = (
            f"{axes_text(axes)} leaves process {min(left)} of this job without a device: each takes part in a mesh."
        )
        raise FlaxMagicsError(message, hint="an axis of -1 takes all devices that are left")
    return Placement(jax.make_mesh(sizes, tuple(axes), axis_types=types, devices=devices[:count]))
