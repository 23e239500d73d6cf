"""The lines for `%flax_mesh`, and what a mesh adds to the lines of a run: where its arrays are put."""

from __future__ import annotations

import itertools
import sys

import jax

from ..base.measures import MeshUse
from ..compile.placement import DATA, names_in_tree
from ..line.call import Argument
from ..line.options import mesh_axes
from .context import CommandLines, ScriptModel
from .functions import CannotSay, SplitArguments

CUT, WHOLE = f"cut over {DATA}", "whole on each"
"""How `MeshUse` says that the leading axis of an array is cut, and that each device has all of it."""
STARRED = "its starred arguments have no lines on a mesh"


def mesh_lines(command: CommandLines) -> list[str]:
    """`%flax_mesh`: makes a mesh and two shardings, or puts the variables back on one device."""
    context, writer, written = command.context, command.writer, command.site.parsed.rest.strip()
    if command.site.target:
        raise CannotSay(f"its value is a report of %{command.site.name}")
    if not written:
        return []
    if written == "off":
        models = [model for model in context.models.values() if model.name in context.laid_out]
        context.mesh, context.laid_out = "", set()
        return [_put(command, model, "jax.devices()[0]") for model in models]
    axes = mesh_axes(written)
    context.mesh, context.laid_out = written, set()
    known = [size for size in axes.values() if size != -1]
    others = " * ".join(map(str, known))
    left = "len(jax.devices())" + (f" // ({others})" if len(known) > 1 else f" // {others}" if known else "")
    sizes = [left if size == -1 else str(size) for size in axes.values()]
    names, batch = names_of(command), writer.text(DATA) if DATA in axes else ""
    context.assigned |= {*names}
    return writer.rendered("calls", "mesh", names, sizes, [*map(writer.text, axes)], batch)


def names_of(command: CommandLines) -> tuple[str, str, str]:
    """The script's variables for the mesh, and for the two shardings of arrays on it.

    Each mesh has its own: a jitted function that reads one is traced once, and for another mesh it is another function.
    """
    writer, written = command.writer, command.context.mesh
    axes = "_".join(f"{name}_{size}" if size != -1 else name for name, size in mesh_axes(written).items())

    def name(purpose: str) -> str:
        key = f"{purpose} {written}"
        if key not in writer.spare:
            writer.spare[key] = writer.free.take(purpose, f"{purpose}_{axes}")
        return writer.spare[key]

    return name("mesh"), name("over_data"), name("replicated")


def mesh_of(command: CommandLines) -> MeshUse | None:
    """The mesh that the runs of a command were laid out on; None where they were on one device.

    Raises:
      CannotSay: it is another for each, or no line of the script makes it.
    """
    uses = [run.mesh for run in command.runs]
    if len({"" if use is None else use.name for use in uses}) > 1:
        raise CannotSay("each of its runs was on another mesh")
    use = uses[-1]
    written = command.context.mesh
    if use is not None and (not written or [*mesh_axes(written)] != [name for name, _ in use.axes]):
        raise CannotSay(f"the mesh that it ran on, {use.name}, is made by no line of the script")
    return use


def variables_on_mesh(command: CommandLines) -> list[str]:
    """The line that puts the variables of the command's model on the mesh; none where they are there.

    Raises:
      CannotSay: they are annotated with axes that the mesh does not have, or the mesh is not the script's.
    """
    use, model, context = mesh_of(command), command.model, command.context
    if use is None or command.options.get("variables") is not None:
        return []
    if not command.site.path:
        if model.name in context.laid_out and not command.initialising:
            return []
        context.laid_out.add(model.name)
    whole = names_of(command)[2]
    if all(lies.how == WHOLE for lies in use.variables):
        return [_put(command, model, whole)]
    tree = f"nnx.state({model.name})" if model.holds else model.variables
    return [_put(command, model, _annotated(command, tree))]


def _put(command: CommandLines, model: ScriptModel, where: str) -> str:
    """The line that puts a model's variables somewhere."""
    if not model.holds:
        command.context.assigned.add(model.variables)
        return f"{model.variables} = jax.device_put({model.variables}, {where})"
    return f"nnx.update({model.name}, jax.device_put(nnx.state({model.name}), {where}))"


def _annotated(command: CommandLines, tree: str) -> str:
    """The shardings of a tree by the annotations of the command's model, as an expression."""
    use, model = mesh_of(command), command.model
    loaded = sys.modules["flax.nnx"].state(model.module) if model.holds else model.loaded
    if use is None or not names_in_tree(loaded) <= {name for name, _ in use.axes}:
        raise CannotSay("its variables lie on the mesh as plain lines do not put them")
    return f"{'nnx.get_named_sharding' if model.holds else 'nn.get_sharding'}({tree}, {names_of(command)[0]})"


def arguments_on_mesh(command: CommandLines, arguments: SplitArguments) -> None:
    """Puts the values of a function's parameters on the mesh, as the runs of the command had them.

    Raises:
      CannotSay: parts of one argument lie there in different ways, or the mesh is not the script's.
    """
    use = mesh_of(command)
    if use is None:
        return
    for place, (written, path) in enumerate(zip(arguments.outside, arguments.paths, strict=True)):
        arguments.outside[place] = _on_mesh(command, use, written, path)


def written_on_mesh(command: CommandLines) -> list[Argument]:
    """The arguments of the command's call as a cell has them, put on the mesh where its runs had them there.

    Raises:
      CannotSay: see `arguments_on_mesh`.
    """
    use, facts = mesh_of(command), command.facts
    if use is None:
        return list(command.call.arguments)
    unnamed = itertools.chain(facts.parameters, (f"argument_{place}" for place in itertools.count()))
    containers, arguments = dict(facts.containers), list[Argument]()
    for name, written in command.call.arguments:
        if name in ("*", "**"):
            raise CannotSay(STARRED)
        leaf = next(unnamed) if name is None else name
        moved = written if leaf in facts.static else _on_mesh(command, use, written, leaf)
        if moved != written and leaf in containers and any(map(containers[leaf].has, ("choice", "other"))):
            raise CannotSay(f"parts of `{written}` are no arrays, and others lie on the mesh")
        arguments.append((name, moved))
    return arguments


def _on_mesh(command: CommandLines, use: MeshUse, written: str, path: str) -> str:
    """A value that is put on the mesh as the runs had it; the value itself where the user has laid it out."""
    if written.startswith("*"):
        raise CannotSay(STARRED)
    _, cut, whole = names_of(command)
    how = {lies.how for lies in use.inputs if lies.name == path or lies.name.startswith((f"{path}[", f"{path}."))}
    if len(how) > 1:
        raise CannotSay(f"parts of `{written}` are cut over the mesh, and others are not")
    where = {CUT: cut, WHOLE: whole}.get(next(iter(how), ""))
    return f"jax.device_put({written}, {where})" if where else written


class TrainingOnMesh:
    """What a mesh adds to the lines of a training: where data, batches and state are put.

    Args:
      begins: the lines are those of its first steps.

    Raises:
      CannotSay: the training goes on that was begun on another mesh, or without one, whose state has to be moved.
    """

    def __init__(self, command: CommandLines, *, begins: bool) -> None:
        use, run, spare = mesh_of(command), command.runs[-1], command.writer.spare
        self.is_used, self._command = use is not None, command
        axes, begun = mesh_axes(command.context.mesh or "data=1"), f"mesh of {command.model.name}'s training"
        is_single = all(size == 1 or (size == -1 and jax.device_count() == 1) for size in axes.values())
        mesh = "" if is_single else command.context.mesh
        # Of a training that went on, the run knows where its last steps were.
        elsewhere = run.trained is not None and run.trained.task.parts and self.is_used != bool(mesh)
        if elsewhere or (not begins and spare.get(begun, "") != mesh):
            raise CannotSay("a training that goes on on other devices than it was begun on has no lines yet")
        spare[begun] = mesh
        if use is None:
            return
        self._is_cut = any(lies.how != WHOLE for lies in use.variables)
        self.mesh, self.cut, self.whole = names_of(command)
        self._may_be_whole = any(note.kind == "mesh" for note in run.notes)

    def variables(self) -> list[str]:
        """The line that puts the variables there."""
        return variables_on_mesh(self._command) if self.is_used else []

    def data(self, value: str, *, whole: bool) -> str:
        """The arrays on the mesh: `whole` on each device, of which steps take rows, or cut, where a step takes all."""
        return f"jax.device_put({value}, {self.whole if whole else self.cut})" if self.is_used else value

    def rows(self, batch: str) -> str:
        """The batch that a step takes of the arrays."""
        if not self.is_used:
            return batch
        cut = self.cut
        if self._may_be_whole:  # the last, shorter batch cannot be cut
            text = self._command.writer.text(DATA)
            cut = f"{self.cut} if len(rows) % {self.mesh}.shape[{text}] == 0 else {self.whole}"
        return f"jax.lax.with_sharding_constraint({batch}, {cut})"

    def batch(self, batch: str) -> str:
        """A batch that comes from the host, cut where its rows can be."""
        if not self.is_used:
            return batch
        rows, text = f"len(jax.tree.leaves({batch})[0])", self._command.writer.text(DATA)
        return f"jax.device_put({batch}, {self.cut} if {rows} % {self.mesh}.shape[{text}] == 0 else {self.whole})"

    def state(self, state: str) -> str:
        """The state after a step, laid out as that before it."""
        if not self.is_used:
            return state
        where = _annotated(self._command, "old") if self._is_cut else self.whole
        return f"jax.lax.with_sharding_constraint({state}, {where})"

    def opt_state(self, name: str, state: str) -> list[str]:
        """The lines that make the optimizer's state before the first step."""
        if not self.is_used:
            return [f"{name} = {state}"]
        if not self._is_cut:
            return [f"{name} = jax.device_put({state}, {self.whole})"]
        return [f"{name} = {state}", f"{name} = jax.device_put({name}, {_annotated(self._command, name)})"]
