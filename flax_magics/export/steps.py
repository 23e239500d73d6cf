"""The functions of a training, `train_step` and `eval_step`, for linen and for NNX, and all lines of `%flax_train`."""

from __future__ import annotations

from collections.abc import Sequence

from ..base.measures import EVAL
from .context import CommandLines
from .functions import CannotSay, as_written, split
from .losses import applied, check_names, init_lines, written_by
from .runs import build_before, mode_lines, rebuilt, reseeded
from .training import TAKEN, Part, TrainLines
from .writer import call


def train_linen(command: CommandLines, part: Part) -> list[str]:
    """The lines for a linen net. Raises CannotSay where there are none, or its runs differ too much for one set."""
    training = TrainLines(command, part)
    writer, facts, model, loss = command.writer, command.facts, command.model, training.loss
    quoted, variables = writer.text("params"), model.variables
    command.context.assigned.add(variables)
    training.define_frozen()
    items = [f"{{**variables, {quoted}: {training.whole('params')}}}", *training.arguments.inside]
    called = applied(command, loss, facts, items, training.folded)
    statistics = [name for name in facts.mutable if name in facts.kept]
    new_statistics = [f"updates[{writer.text(name)}]" for name in statistics]
    updates = "".join(f"{writer.text(name)}: updates[{writer.text(name)}], " for name in statistics)
    if statistics and statistics == [*facts.mutable]:
        new_statistics, updates = ["updates"], "**updates, "
    step = training.step(training.lines("linen_step", called, updates, new_statistics))
    opt_state, state = training.variable("opt_state"), training.variable("state")
    lines, optimizer = training.optimizer()
    trained = f"{variables}[{quoted}]"
    trained = f"{training.split_frozen}({trained})[0]" if training.frozen else trained
    saved = command.context.saved.pop(command.indices[-1], "")
    if part.first == 0:
        draw_lines, params, _ = training.draw()
        lines += [*draw_lines, *training.data()]
        if command.initialising:
            batch_lines, first = training.first_batch()
            arguments = as_written(training.after_net.arguments)
            lines += [*batch_lines, *init_lines(command, loss, [first, *arguments[1:]], params)]
        lines += training.on_mesh.variables()
        lines += [*training.on_mesh.opt_state(opt_state, f"{optimizer}.init({trained})"), *training.begun()]
    else:
        lines += training.on_mesh.variables()
        lines += [*(training.from_file(saved, optimizer, trained) if saved else []), *training.data()]
    look = ""
    if _are_looks(training):
        looking = LookLines(training)
        called = applied(command, loss, looking.facts, ["variables", *looking.arguments.inside], looking.folded)
        body = looking.body([], called, updates=bool(looking.facts.mutable))
        data_lines, look = looking.lines(["variables"], [f"{state}[0]"], body)
        lines += data_lines
    lines += [f"{state} = {variables}, {opt_state}, True", *training.loop(step, optimizer, look)]
    return [*lines, f"{variables}, {opt_state}, _ = {state}", *training.ended(variables)]


def train_nnx(command: CommandLines, part: Part) -> list[str]:
    """The lines for an NNX module, of which a copy is trained. Raises CannotSay: see `train_linen`."""
    training = TrainLines(command, part)
    writer, facts, model = command.writer, command.facts, command.model
    written = written_by(facts)
    trains = "nnx.Param"
    if training.frozen:
        body = writer.rendered("calls", "is_trained", training.frozen)
        trains = training.define("is_trained", ("path", "value"), body)
    stats = ["stats"] if written else []
    merged = f"model = nnx.merge({', '.join(('graphdef', 'params', *stats, 'rest'))}, copy=True)"
    switches = [f"{name}={value}" for name, value in facts.arguments]
    called = call(f"{training.loss}(", ["model", *training.arguments.inside, *switches])
    body = training.lines("nnx_step", called, merged, written, *reseeded(writer, facts, training.folded, "model"))
    step = training.step(body)
    net_copy, graphdef, rest = map(training.variable, (f"{model.name}_copy", "graphdef", "rest"))
    opt_state, state = training.variable("opt_state"), training.variable("state")
    values = [training.variable("params"), *(training.variable("stats") for _ in stats)]
    lines, optimizer = training.optimizer()
    if part.first == 0:
        draw_lines, params, dropout = training.draw()
        lines += draw_lines
        if command.initialising:
            lines.append(rebuilt(command, build_before(command), params, dropout))
    lines += [
        *training.on_mesh.variables(),
        *training.data(),
        f"{net_copy} = nnx.clone({model.name})",
        *mode_lines(facts, net_copy),
    ]
    filters = ", ".join(filter(None, (trains, written, "...")))
    lines.append(f"{graphdef}, {', '.join((*values, rest))} = nnx.split({net_copy}, {filters})")
    saved = command.context.saved.pop(command.indices[-1], "")
    if part.first == 0:
        lines += [*training.on_mesh.opt_state(opt_state, f"{optimizer}.init({values[0]})"), *training.begun()]
    elif saved:
        lines += training.from_file(saved, optimizer, values[0])
    look = ""
    if _are_looks(training):
        looking = LookLines(training)
        inside = [merged, *mode_lines(looking.facts, "model")]
        inside += reseeded(writer, looking.facts, looking.folded, "model")
        items = ["model", *looking.arguments.inside, *(f"{name}={value}" for name, value in looking.facts.arguments)]
        body = looking.body(inside, call(f"{training.loss}(", items))
        parameters = ["graphdef", "params", *stats, "rest"]
        passed = [graphdef, f"*{state}[:{len(values)}]" if stats else f"{state}[0]", rest]
        data_lines, look = looking.lines(parameters, passed, body)
        lines += data_lines
    lines.append(f"{state} = {', '.join((*values, opt_state))}, True")
    lines += training.loop(step, optimizer, look)
    lines += [f"{', '.join((*values, opt_state))}, _ = {state}", f"nnx.update({model.name}, {', '.join(values)})"]
    return [*lines, *training.ended(f"nnx.state({model.name}, nnx.Not(nnx.RngState))")]


class LookLines:
    """The lines of the looks at `--eval` data, once there are some in the part of a training."""

    def __init__(self, training: TrainLines) -> None:
        look = training.part.look
        assert look is not None
        self.training, self.facts, self.of_arrays = training, look.call, look.arrays
        if self.facts.axes or self.facts.handed:
            raise CannotSay("its net asks for a mapped axis, or for `rngs` in its call")
        self.keys = {stream: f"{EVAL}_{stream}_key" for stream in self.facts.streams}
        taken = (*TAKEN, training.model.name, training.loss, *self.keys.values())
        self.arguments = split(training.writer, training.after_net, self.facts, taken)
        training.check_arguments(self.arguments)
        self.has_metrics = "metrics" in self.facts.returns
        self.folded = {stream: f"jax.random.fold_in({key}, number)" for stream, key in self.keys.items()}

    def body(self, inside: Sequence[str], applied: str, *, updates: bool = False) -> list[str]:
        """The lines of `eval_step`: those before the loss is applied, and what is made of what it gives."""
        return self.training.writer.rendered("training", "eval_step", inside, applied, self.has_metrics, updates)

    def _text(self) -> str:
        """The `--eval` data as they are written; one that goes on takes the name of those before it. Raises CannotSay."""
        command, of_model = self.training.command, f"eval of {self.training.model.name}"
        text: str = command.options["eval"] or command.writer.spare.get(of_model, "")
        if not text:  # of a file
            text = self.training.task.eval
            missing = command.context.names.missing({text})
            if missing or not text.isidentifier():
                raise missing or CannotSay("its `--eval` data have no name")
        command.writer.spare[of_model] = text
        return text

    def lines(self, parameters: Sequence[str], passed: Sequence[str], body: Sequence[str]) -> tuple[list[str], str]:
        """The line that has the data ready, and the call in the loop that looks at them.

        Args:
          parameters: of `eval_step`, before the batch: what the net consists of.
          passed: the values for these.
          body: of `eval_step`.
        """
        training, arguments, keys = self.training, self.arguments, list(self.keys.values())
        task, text = training.task, self._text()
        data, lines = text, list[str]()
        if self.of_arrays:
            data = training.variable("eval_data")
            lines = [f"{data} = jax.tree.map(jnp.asarray, {text})"]
            lines += [f"{data} = {training.on_mesh.batch(data)}"] * (training.on_mesh.is_used and task.batch is None)
        elif not text.isidentifier():
            data = training.variable("eval_batches")
            lines = [f"{data} = {text}"]
        outside = [*passed, data, *arguments.outside[1:]]
        outside_keys = [training.key(f"{EVAL} {stream}") for stream in self.keys]
        is_whole = self.of_arrays and task.batch is None
        of_step = [*parameters, *arguments.parameters, *(["number", *keys] if keys else [])]
        name, fixed = "evaluate" if is_whole else "eval_step", (*training.static, *arguments.static)
        check_names(training.command, training.loss, of_step, body)
        step = training.define(name, of_step, body, fixed)
        if is_whole:
            looked = call(f"{step}(", [*outside, *(["0", *outside_keys] if keys else [])])
            return lines, f"jax.tree.map(float, {looked})"
        one = call(f"{step}(", of_step)
        whole = training.lines("evaluate", arguments.parameters[0], bool(keys), self.of_arrays, one)
        of_all = [*parameters, "data" if self.of_arrays else "batches", *arguments.parameters[1:], *keys]
        return lines, call(f"{training.define('evaluate', of_all, whole)}(", [*outside, *outside_keys])


def _are_looks(training: TrainLines) -> bool:
    """Whether this part of a training looks at `--eval` data."""
    return bool(training.part.looks) and training.part.look is not None
