"""The functions of a training, `train_step` and `eval_step`, for linen and for NNX, and all lines of `%flax_train`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..base.measures import EVAL
from ..run import ExportFacts
from .context import CommandLines
from .functions import CannotSay, as_written, split
from .losses import check_names, init_lines, is_trained_body
from .runs import build_before, mode_lines, of_module, rebuilt
from .training import TAKEN, Part, TrainLines
from .writer import call, indented


def train_linen(command: CommandLines, part: Part) -> list[str]:
    """The lines for a linen net. Raises CannotSay where there are none, or its runs differ too much for one set."""
    training = TrainLines(command, part)
    writer, facts, model, loss = command.writer, command.facts, command.model, training.loss
    writer.needs.add("nn")
    quoted, variables = writer.text("params"), model.variables
    command.context.assigned.add(variables)
    of_params, whole, split_frozen = f"variables[{quoted}]", "{}", ""
    if training.frozen:
        writer.needs |= {"fnmatch", "traverse_util"}
        split_frozen, merge_frozen = _with_frozen(training)
        of_params, whole = f"{split_frozen}(variables[{quoted}])", f"{merge_frozen}({{}}, frozen)"
    items = [f"{{**variables, {quoted}: {whole.format('params')}}}", *training.arguments.inside]
    rngs = [f"{writer.text(stream)}: {key}" for stream, key in training.folded.items()]
    applied = _applied(training, facts, items, rngs)
    mutable = bool(facts.mutable)
    inside = [f"return {applied}"]
    if training.has_metrics and mutable:
        inside = [f"(value, metrics), updates = {applied}", "return value, (metrics, updates)"]
    statistics = [name for name in facts.mutable if name in facts.kept]
    new_statistics = [f"updates[{writer.text(name)}]" for name in statistics]
    updates = "".join(f"{writer.text(name)}: updates[{writer.text(name)}], " for name in statistics)
    if statistics and statistics == [*facts.mutable]:
        new_statistics, updates = ["updates"], "**updates, "
    body = [
        "variables, opt_state, finite = state",
        *training.batch_line(),
        f"params{', frozen' if split_frozen else ''} = {of_params}",
        "",
        "def loss_of(params):",
        *indented(inside, writer.unit),
        "",
        *training.updated("updates" if mutable else ""),
        f"new_variables = {{**variables, {updates}{quoted}: {whole.format('new_params')}}}",
        *training.guarded(["new_variables"], ["variables"], ["new_params", *new_statistics]),
    ]
    step = training.step(body)
    opt_state, state = training.variable("opt_state"), training.variable("state")
    lines, optimizer = training.optimizer()
    of_all = f"{variables}[{quoted}]"
    trained = f"{split_frozen}({of_all})[0]" if split_frozen else of_all
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
        rngs = [f"{writer.text(stream)}: {key}" for stream, key in looking.folded.items()]
        applied = _applied(training, looking.facts, ["variables", *looking.arguments.inside], rngs)
        body = looking.body([], applied, updates=bool(looking.facts.mutable))
        data_lines, look = looking.lines(["variables"], [f"{state}[0]"], body)
        lines += data_lines
    lines += [f"{state} = {variables}, {opt_state}, True", *training.loop(step, optimizer, look)]
    return [*lines, f"{variables}, {opt_state}, _ = {state}", *training.ended(variables)]


def _applied(training: TrainLines, facts: ExportFacts, items: Sequence[str], rngs: Sequence[str]) -> str:
    """The loss applied to a linen net in the mode of `facts`; `items`: variables, batch and what follows it."""
    text, model = training.writer.text, training.model
    net = of_module(training.command, facts.module, model.name)
    mutable = f", mutable=[{', '.join(map(text, facts.mutable))}]" if facts.mutable else ""
    switches = [f"{name}={value}" for name, value in facts.arguments]
    keys = [f"rngs={{{', '.join(rngs)}}}"] if rngs else []
    return call(f"nn.apply({training.loss}, {net}{mutable})(", [*items, *switches, *keys])


def _with_frozen(training: TrainLines) -> tuple[str, str]:
    """Makes sure that the functions are defined that part frozen parameters from the others and join them again."""
    sep = f"sep={training.writer.text('/')}"
    matches = f"any(fnmatch.fnmatchcase(name, pattern) for pattern in {training.frozen})"
    parts = [
        "def is_frozen(name):",
        f"{training.writer.unit}return {matches}",
        "",
        f"flat = traverse_util.flatten_dict(params, {sep})",
        "frozen = {name: value for name, value in flat.items() if is_frozen(name)}",
        "trained = {name: value for name, value in flat.items() if not is_frozen(name)}",
        f"return traverse_util.unflatten_dict(trained, {sep}), frozen",
    ]
    joins = [
        f"flat = {{**frozen, **traverse_util.flatten_dict(trained, {sep})}}",
        f"return traverse_util.unflatten_dict(flat, {sep})",
    ]
    split_frozen = training.define("split_frozen", ("params",), parts)
    return split_frozen, training.define("merge_frozen", ("trained", "frozen"), joins)


def train_nnx(command: CommandLines, part: Part) -> list[str]:
    """The lines for an NNX module, of which a copy is trained. Raises CannotSay: see `train_linen`."""
    training = TrainLines(command, part)
    writer, facts, model = command.writer, command.facts, command.model
    writer.needs.add("nnx")
    kinds = [f"nnx.{name}" for name in facts.mutable if name != "Intermediate"]
    if any(kind not in ("nnx.BatchStat", "nnx.Cache") for kind in kinds):
        raise CannotSay("its net writes variables of a type of its own")
    written = kinds[0] if len(kinds) == 1 else f"nnx.Any({', '.join(kinds)})" if kinds else ""
    trains = "nnx.Param"
    if training.frozen:
        writer.needs.add("fnmatch")
        body = is_trained_body(command, training.frozen)
        trains = training.define("is_trained", ("path", "value"), body)
    stats, new_stats = (["stats"], ["new_stats"]) if written else ([], [])
    switches = [f"{name}={value}" for name, value in facts.arguments]
    called = call(f"{training.loss}(", ["model", *training.arguments.inside, *switches])
    result = f"nnx.state(model, {written})"
    inside = [f"model = nnx.merge({', '.join(('graphdef', 'params', *stats, 'rest'))}, copy=True)"]
    inside += _reseeded(training, {one: key for one, key in training.folded.items() if one in facts.held})
    if written and training.has_metrics:
        inside += [f"value, metrics = {called}", f"return value, (metrics, {result})"]
    else:
        inside.append(f"return {called}, {result}" if written else f"return {called}")
    body = [
        f"{', '.join(('params', *stats, 'opt_state', 'finite'))} = state",
        *training.batch_line(),
        "",
        "def loss_of(params):",
        *indented(inside, writer.unit),
        "",
        *training.updated("new_stats" if written else ""),
        *training.guarded(["new_params", *new_stats], ["params", *stats], ["new_params", *new_stats]),
    ]
    step = training.step(body, static=["graphdef"], constant=["rest"])
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
        *mode_lines(command, net_copy),
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
        inside = [f"model = nnx.merge({', '.join(('graphdef', 'params', *stats, 'rest'))}, copy=True)"]
        mode = looking.facts.mode
        inside += [] if mode is None else [of_module(command, line, "model") for line in mode.to]
        inside += _reseeded(training, {one: key for one, key in looking.folded.items() if one in looking.facts.held})
        items = ["model", *looking.arguments.inside, *(f"{name}={value}" for name, value in looking.facts.arguments)]
        body = looking.body(inside, call(f"{training.loss}(", items))
        parameters = ["graphdef", "params", *stats, "rest"]
        passed = [graphdef, f"*{state}[:{len(values)}]" if stats else f"{state}[0]", rest]
        data_lines, look = looking.lines(parameters, passed, body, ["graphdef"])
        lines += data_lines
    lines.append(f"{state} = {', '.join((*values, opt_state))}, True")
    lines += training.loop(step, optimizer, look, static=[graphdef], constant=[rest])
    lines += [f"{', '.join((*values, opt_state))}, _ = {state}", f"nnx.update({model.name}, {', '.join(values)})"]
    return [*lines, *training.ended(f"nnx.state({model.name}, nnx.Not(nnx.RngState))")]


def _reseeded(training: TrainLines, keys: Mapping[str, str]) -> list[str]:
    """The line that gives streams of `model` the keys of a step or look; none without any."""
    policy = f"policy={training.writer.text('match_shape')}"
    return [call("nnx.reseed(", ["model", policy, *(f"{one}={key}" for one, key in keys.items())])] if keys else []


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
        text, value = self.training.writer.text, "(value, metrics)" if self.has_metrics and updates else "value"
        value += ", metrics" if self.has_metrics and not updates else ", _" if updates else ""
        metrics = "metrics" if self.has_metrics else "{}"
        return [*inside, f"{value} = {applied}", f"return {{{text('loss')}: value, {text('metrics')}: {metrics}}}"]

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

    def lines(
        self, parameters: Sequence[str], passed: Sequence[str], body: Sequence[str], static: Sequence[str] = ()
    ) -> tuple[list[str], str]:
        """The line that has the data ready, and the call in the loop that looks at them.

        Args:
          parameters: of `eval_step`, before the batch: what the net consists of.
          passed: the values for these.
          body: of `eval_step`.
          static: those of `parameters` that are static.
        """
        training, arguments, keys = self.training, self.arguments, list(self.keys.values())
        writer, task, text = training.writer, training.task, self._text()
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
        name, fixed = "evaluate" if is_whole else "eval_step", (*static, *arguments.static)
        check_names(training.command, training.loss, of_step, body)
        step = training.define(name, of_step, body, decorator="jax.jit", static=fixed)
        if is_whole:
            looked = call(f"{step}(", [*outside, *(["0", *outside_keys] if keys else [])])
            return lines, f"jax.tree.map(float, {looked})"
        writer.needs.add("np")
        batch, unit, number = arguments.parameters[0], writer.unit, "number, " if keys else ""
        batches = "enumerate({})" if keys else "{}"
        if self.of_arrays:
            rows = f"array[first : first + {task.batch}]"
            batches = batches.format(f"range(0, len(jax.tree.leaves(data)[0]), {task.batch})")
            head = [f"for {number}first in {batches}:"]
            head.append(f"{unit}{batch} = jax.tree.map(lambda array: {rows}, data)")
        else:
            head = [f"for {number}{batch} in {batches.format('batches')}:"]
            head.append(f"{unit}{batch} = jax.tree.map(np.asarray, {batch})")
        head += [f"{unit}{batch} = {training.on_mesh.batch(batch)}"] * training.on_mesh.is_used
        whole = [
            "# Means over the batches, weighed by their examples.",
            "values, sizes = [], []",
            *head,
            f"{unit}values.append(jax.tree.map(float, {call(f'{step}(', of_step)}))",
            f"{unit}sizes.append(len(jax.tree.leaves({batch})[0]))",
            "return jax.tree.map(lambda *each: float(np.average(each, weights=sizes)), *values)",
        ]
        of_all = [*parameters, "data" if self.of_arrays else "batches", *arguments.parameters[1:], *keys]
        return lines, call(f"{training.define('evaluate', of_all, whole)}(", [*outside, *outside_keys])


def _are_looks(training: TrainLines) -> bool:
    """Whether this part of a training looks at `--eval` data."""
    return bool(training.part.looks) and training.part.look is not None
