"""The lines for `%flax_train`: a jitted step and the loop around it, as one writes them by hand.

They are the very step and loop that ran, so that they give the same bits: the keys of a step are folded and its batch
is taken inside of the program, and a step that is not finite is turned down by `jax.lax.cond`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ..base.curve import ROW_ORDER, Curve
from ..base.text import clean
from ..run import Run
from .context import CommandLines, shuffled
from .functions import CannotSay, JittedFunction, as_written, split
from .losses import init_lines, patterns_of, taken_apart
from .runs import build_before, mode_lines, of_module, rebuilt
from .writer import call, indented

TAKEN = (
    *("jax", "jnp", "nn", "nnx", "optax", "optimizer", "graphdef", "state", "data", "rows", "step", "variables"),
    *("params", "frozen", "stats", "rest", "model", "opt_state", "finite", "rngs", "loss_of", "value", "metrics"),
    *("updates", "grads", "changes", "new", "old", "leaves", "new_opt_state", "new_params", "new_stats"),
    *("new_variables", "parted", "joined"),
)
"""Names in the functions that no parameter may have."""


class Part(NamedTuple):
    """The steps `first` to `end - 1`: all, or those that one command did of a training that was interrupted."""

    first: int
    end: int
    is_last: bool


def parts_of(run: Run) -> list[Part]:
    """The parts of a training, in order."""
    assert run.trained is not None
    ends = (*run.trained.task.parts, run.steps)
    last = len(ends) - 1
    return [Part(first, end, n == last) for n, (first, end) in enumerate(zip((0, *ends), ends, strict=False))]


class TrainLines:
    """One part of a training, and what the lines for linen and for NNX have in common."""

    def __init__(self, command: CommandLines, part: Part) -> None:
        self.command, self.part = command, part
        self.writer, self.model, self.facts = command.writer, command.model, command.facts
        curves = [run.trained for run in command.runs if run.trained is not None]
        self.curve: Curve = curves[-1]
        self.task = self.curve.task
        counts = {(len(curve.losses), curve.epoch, curve.task) for curve in curves}
        if len(counts) > 1 or (command.site.path and self.task.parts):
            raise CannotSay("each of its runs did other steps")
        if self.facts.axes or self.facts.handed:
            raise CannotSay("its net asks for a mapped axis, or for `rngs` in its call")
        if self.task.takes_loss:
            raise CannotSay("the `update` of its optimizer takes the loss, too")
        self.loss, self.after_net = taken_apart(command)
        self.cut = bool(shuffled(command.runs[-1]))
        self.streams = (*self.facts.streams, *shuffled(command.runs[-1]))
        self.keys = {stream: f"{stream}_key" for stream in self.facts.streams}
        self.frozen = patterns_of(command, self.task.freeze)
        self.metrics = "metrics" in self.facts.returns
        taken = (*TAKEN, self.model.name, self.loss, *self.keys.values())
        self.arguments = split(self.writer, self.after_net, self.facts, taken)
        if not self.arguments.inside or self.arguments.inside[0] != self.arguments.parameters[0]:
            raise CannotSay("its data are put together in the call")
        self.writer.needs |= {"jax", "jnp", "optax"}

    def own(self, purpose: str) -> str:
        """The script's variable for a purpose in the trainings of this model."""
        key = f"{purpose} of {self.model.name}"
        if key not in self.writer.spare:
            self.writer.spare[key] = self.writer.free.take(purpose, f"{self.model.name}_{purpose}")
        self.command.context.assigned.add(self.writer.spare[key])
        return self.writer.spare[key]

    def key(self, stream: str) -> str:
        """The variable that has the training's key of a stream."""
        # Other draws may come between the parts of a training, and assign the usual names.
        if self.task.parts:
            return self.own(f"train_{stream}_key")
        return self.writer.key(stream, taken=self.facts.taken)

    # -- the step

    def folds(self, form: str) -> list[str]:
        """Each stream with its key in a step."""
        text = self.writer.text
        folded = {stream: f"jax.random.fold_in({key}, step)" for stream, key in self.keys.items()}
        return [form.format(text(stream) if ":" in form else stream, key) for stream, key in folded.items()]

    def given(self) -> list[str]:
        """The line that takes a step's batch from the data; none where it is given."""
        return [f"{self.arguments.parameters[0]} = jax.tree.map(lambda array: array[rows], data)"] * self.cut

    def updated(self, written: str) -> list[str]:
        """The lines that take gradients and update `params`; `written`: the name for what the loss writes, or empty."""
        aux = f"(metrics, {written})" if self.metrics and written else "metrics" if self.metrics else written
        value, has_aux = (f"(value, {aux})", ", has_aux=True") if aux else ("value", "")
        return [
            f"{value}, grads = jax.value_and_grad(loss_of{has_aux})(params)",
            "changes, new_opt_state = optimizer.update(grads, opt_state, params)",
            "new_params = optax.apply_updates(params, changes)",
        ]

    def guarded(self, new: Sequence[str], old: Sequence[str], changed: Sequence[str]) -> list[str]:
        """The last lines of the step, which is taken only if it is finite, and if all before it were.

        Args:
          changed: what of the new values the step has changed.
        """
        text = self.writer.text
        metrics = f", {text('metrics')}: metrics" if self.metrics else ""
        return [
            "# A step that is not finite is not taken, and none after it.",
            call("leaves = jax.tree.leaves((", ["value", "grads", *changed], "))"),
            "finite &= jnp.stack([jnp.isfinite(leaf).all() for leaf in leaves]).all()",
            f"new, old = ({', '.join(new)}, new_opt_state), ({', '.join(old)}, opt_state)",
            "state = jax.lax.cond(finite, lambda: new, lambda: old)",
            f"return (*state, finite), {{{text('loss')}: value{metrics}}}",
        ]

    def step(self, body: Sequence[str], *, static: Sequence[str] = (), constant: Sequence[str] = ()) -> str:
        """Makes sure that the jitted step is defined, and returns its name."""
        data = ["data", *self.arguments.parameters[1:], "rows"] if self.cut else self.arguments.parameters
        parameters = ("optimizer", *static, "state", *constant, *data, "step", *self.keys.values())
        loss = self.loss.rpartition(".")[2]
        names = ("train_step", f"train_step_{self.model.name}", f"train_step_{self.model.name}_{loss}")
        fixed = ("optimizer", *static, *self.arguments.static)
        return self.define(names, parameters, body, decorator="jax.jit", static=fixed)

    def define(
        self,
        names: Sequence[str],
        parameters: Sequence[str],
        body: Sequence[str],
        *,
        decorator: str = "",
        static: Sequence[str] = (),
    ) -> str:
        """Makes sure that a function is defined, and returns its name."""
        function = JittedFunction(
            self.model.name, tuple(names), decorator, tuple(parameters), tuple(static), tuple(body)
        )
        return self.command.context.define(function, self.command.site)

    # -- around the loop

    def optimizer(self) -> tuple[list[str], str]:
        """The line that makes the optimizer, none where it is there, and its name."""
        written, key = self.command.options["optimizer"], f"optimizer of {self.model.name}"
        if written is not None and written.isidentifier():
            self.writer.spare[key] = written
        elif written is not None:
            self.writer.spare.pop(key, None)
            return [f"{self.own('optimizer')} = {written}"], self.own("optimizer")
        elif key not in self.writer.spare:
            raise CannotSay("its optimizer was not made by any line of the script")
        return [], self.writer.spare[key]

    def draw(self) -> tuple[list[str], str, str]:
        """The lines of the draw, and the keys `params` and `dropout` for an init."""
        lines, key, params = self.command.keys(*shuffled(self.command.runs[-1]))
        if self.task.parts and self.streams:
            kept = [self.own(f"train_{stream}_key") for stream in self.streams]
            lines.append(f"{', '.join(kept)} = {', '.join(map(key, self.streams))}")
        return lines, params, self.writer.dropout

    def data(self) -> list[str]:
        """The line that puts arrays on the device, or goes through an iterable again and again."""
        text = self.arguments.outside[0]
        if self.task.arrays:
            return [f"{self.own('data')} = jax.tree.map(jnp.asarray, {text})"]
        self.writer.needs.add("itertools")
        return [f"{self.own('batches')} = itertools.chain.from_iterable(itertools.repeat({text}))"]

    def first_batch(self) -> tuple[list[str], str]:
        """The lines that take the batch by which the net is initialised, and its name."""
        if self.task.arrays and not self.cut:
            return [], self.own("data")
        first, batches = self.own("first_batch"), self.own("batches")
        if self.cut:
            return [f"{first} = jax.tree.map(lambda array: array[:{self.task.batch}], {self.own('data')})"], first
        return [f"{first} = next({batches})", f"{batches} = itertools.chain([{first}], {batches})"], first

    def loop(self, step: str, optimizer: str, *, static: Sequence[str] = (), constant: Sequence[str] = ()) -> list[str]:
        """The loop over the steps of this part."""
        (first, end, _), number, unit = self.part, self.own("step"), self.writer.unit
        state, curve, values = self.own("state"), self.own("curve"), self.own("values")
        source = self.own("data" if self.task.arrays else "batch")
        before = [optimizer, *static, state, *constant, source, *self.arguments.outside[1:]]
        after = [number, *map(self.key, self.keys)]
        rows = [self.own("rows")] if self.cut else []
        steps = f"range({first}, {end})" if first else f"range({end})"
        head, body = f"for {number} in {steps}:", list[str]()
        if not self.task.arrays:
            self.writer.needs.add("np")
            head = f"for {number}, {source} in zip({steps}, {self.own('batches')}):"
            body.append(f"{source} = jax.tree.map(np.asarray, {source})")
        one = [call(f"{state}, {values} = {step}(", [*before, *rows, *after]), f"{curve}.append({values})"]
        size = self.curve.group
        if size == 1:
            body += [*self._rows("1"), *one]
        else:
            many, fits, place = self.own("many"), self.own("fits"), self.own("place") if self.cut else number
            full = f" and {place} + {size} <= len({self.own('order')}) // {self.task.batch}" if self.cut else ""
            whole = [
                f"{fits} = {place} % {size} == 0{full}",
                f"{many} = {size} if {fits} and {number} + {size} <= {end} else 1",
            ]
            rows = [f"{rows[0]}.reshape({size}, {self.task.batch})"] if rows else []
            together = call(f"{state}, {values} = {self.steps(step, static, constant)}(", [*before, *rows, *after])
            parts = f"{curve} += [jax.tree.map(lambda leaf: leaf[n], {values}) for n in range({size})]"
            head = f"while {number} < {end}:"
            body += [*self._rows(many, whole), *([] if self.cut else whole), f"if {many} == 1:"]
            body += [*indented(one, unit), "else:", *indented([together, parts], unit), f"{number} += {many}"]
        begin = [*([] if first else [f"{curve} = []"]), *([] if size == 1 else [f"{number} = {first}"])]
        return [*begin, head, *indented(body, unit)]

    def _rows(self, many: str, whole: Sequence[str] = ()) -> list[str]:
        """The lines that take the rows of `many` steps, in an order that is drawn for each epoch; none without rows.

        Args:
          whole: lines that say how many steps, which stand below those that draw the order.
        """
        if not self.cut:
            return []
        self.writer.needs.add("np")
        first, number, size, unit = self.part.first, self.own("step"), self.task.batch, self.writer.unit
        epoch, place, order, rows = map(self.own, ("epoch", "place", "order", "rows"))
        key, data = f"jax.random.fold_in({self.key(ROW_ORDER)}, {epoch})", self.own("data")
        begins = f"{place} == 0" + f" or {number} == {first}" * bool(first)
        return [
            f"{epoch}, {place} = divmod({number}, {self.curve.epoch})",
            f"if {begins}:",
            f"{unit}{order} = jax.random.permutation({key}, len(jax.tree.leaves({data})[0]))",
            *whole,
            f"{rows} = np.asarray({order})[{size} * {place} : {size} * ({place} + {many})]",
        ]

    def steps(self, step: str, static: Sequence[str], constant: Sequence[str]) -> str:
        """Makes sure that the function is defined that does several steps in one program, and returns its name."""
        size = self.curve.group
        data = "data" if self.cut else self.arguments.parameters[0]
        passed = [data, *self.arguments.parameters[1:], *(["rows"] if self.cut else [])]
        given = ["optimizer", *static, "state", *constant, *passed, "step", *self.keys.values()]
        numbers = f"step + jnp.arange({size})"
        body = [
            f"def one(state, {'each' if self.cut else 'step'}):",
            *([f"{self.writer.unit}rows, step = each"] if self.cut else []),
            f"{self.writer.unit}{call(f'return {step}(', given)}",
            "",
            f"return jax.lax.scan(one, state, {f'(rows, {numbers})' if self.cut else numbers})",
        ]
        names = (step.replace("train_step", "train_steps", 1), f"{step}_in_groups")
        fixed = ("optimizer", *static, *self.arguments.static)
        return self.define(names, given, body, decorator="jax.jit", static=fixed)

    def ended(self, variables: str) -> list[str]:
        """The lines after the loop: the digest of the variables, and the Run as far as the script has it."""
        if not self.part.is_last:
            return [f"# Interrupted here, after {self.part.end} steps."]
        lines = self.writer.show(self.command.label, variables)
        if self.curve.evals:
            looks = f"the looks at `{clean(self.task.eval)}` while it trains"
            self.command.context.unexported.append(looks)
            lines = [f"# Left out: {looks}.", *lines]
        if self.command.site.target:
            self.writer.needs |= {"np", "types"}
            curve, text = self.own("curve"), self.writer.text
            of_metrics = f"each[{text('metrics')}]"
            values = {
                name: f"np.array([{of_metrics}[{text(name)}] for each in {curve}])" for name in self.curve.metrics
            }
            metrics = ", ".join(f"{text(name)}: {value}" for name, value in values.items())
            losses = f"losses=np.array([each[{text('loss')}] for each in {curve}])"
            fields = [losses, f"metrics={{{metrics}}}", f"steps={self.part.end}"]
            lines.append(call(f"{self.command.site.target} types.SimpleNamespace(", fields))
        return lines


def train_linen(command: CommandLines, part: Part) -> list[str]:
    """The lines for a linen net. Raises CannotSay where there are none, or its runs differ too much for one set."""
    training = TrainLines(command, part)
    writer, facts, model, loss = command.writer, command.facts, command.model, training.loss
    writer.needs.add("nn")
    own, variables = writer.text("params"), model.variables
    command.context.assigned.add(variables)
    of_params, whole, parted = f"variables[{own}]", "{}", ""
    if training.frozen:
        writer.needs |= {"fnmatch", "traverse_util"}
        parted, joined = _parting(training)
        of_params, whole = f"{parted}(variables[{own}])", f"{joined}({{}}, frozen)"
    net = of_module(command, facts.module, model.name)
    mutable = f", mutable=[{', '.join(map(writer.text, facts.mutable))}]" if facts.mutable else ""
    switches = [f"{name}={value}" for name, value in facts.arguments]
    rngs = [f"rngs={{{', '.join(training.folds('{}: {}'))}}}"] if training.keys else []
    items = [f"{{**variables, {own}: {whole.format('params')}}}", *training.arguments.inside, *switches, *rngs]
    applied = call(f"nn.apply({loss}, {net}{mutable})(", items)
    inside = [f"return {applied}"]
    if training.metrics and mutable:
        inside = [f"(value, metrics), updates = {applied}", "return value, (metrics, updates)"]
    kept = [name for name in facts.mutable if name in facts.kept]
    written = ["updates"] if kept and kept == [*facts.mutable] else [f"updates[{writer.text(name)}]" for name in kept]
    updates = "".join(f"{writer.text(name)}: {tree}, " for name, tree in zip(kept, written, strict=False))
    updates = "**updates, " if written == ["updates"] else updates
    body = [
        "variables, opt_state, finite = state",
        *training.given(),
        f"params{', frozen' if parted else ''} = {of_params}",
        "",
        "def loss_of(params):",
        *indented(inside, writer.unit),
        "",
        *training.updated("updates" if mutable else ""),
        f"new_variables = {{**variables, {updates}{own}: {whole.format('new_params')}}}",
        *training.guarded(["new_variables"], ["variables"], ["new_params", *written]),
    ]
    step = training.step(body)
    opt_state, state = training.own("opt_state"), training.own("state")
    made, optimizer = training.optimizer()
    lines: list[str] = []
    if part.first == 0:
        drawn, params, _ = training.draw()
        lines += [*made, *drawn, *training.data()]
        if command.initialising:
            taken, first = training.first_batch()
            written = as_written(training.after_net.arguments)
            lines += [*taken, *init_lines(command, loss, [first, *written[1:]], params)]
        of_all = f"{variables}[{own}]"
        lines.append(f"{opt_state} = {optimizer}.init({f'{parted}({of_all})[0]' if parted else of_all})")
    lines += [f"{state} = {variables}, {opt_state}, True", *training.loop(step, optimizer)]
    return [*lines, f"{variables}, {opt_state}, _ = {state}", *training.ended(variables)]


def _parting(training: TrainLines) -> tuple[str, str]:
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
    name = training.model.name
    parted = training.define(("parted", f"parted_{name}"), ("params",), parts)
    return parted, training.define(("joined", f"joined_{name}"), ("trained", "frozen"), joins)


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
        named = f"({writer.text('/')}.join(map(str, path)), type(value).__name__)"
        matches = f"fnmatch.fnmatchcase(name, pattern) for name in {named} for pattern in {training.frozen}"
        body = [f"frozen = any({matches})", "return isinstance(value, nnx.Param) and not frozen"]
        trains = training.define(("is_trained", f"is_trained_{model.name}"), ("path", "value"), body)
    stats, new_stats = (["stats"], ["new_stats"]) if written else ([], [])
    switches = [f"{name}={value}" for name, value in facts.arguments]
    called = call(f"{training.loss}(", ["model", *training.arguments.inside, *switches])
    result = f"nnx.state(model, {written})"
    inside = [f"model = nnx.merge({', '.join(('graphdef', 'params', *stats, 'rest'))}, copy=True)"]
    held = [fold for fold in training.folds("{}={}") if fold.partition("=")[0] in facts.held]
    if held:
        inside.append(call("nnx.reseed(", ["model", f"policy={writer.text('match_shape')}", *held]))
    if written and training.metrics:
        inside += [f"value, metrics = {called}", f"return value, (metrics, {result})"]
    else:
        inside.append(f"return {called}, {result}" if written else f"return {called}")
    body = [
        f"{', '.join(('params', *stats, 'opt_state', 'finite'))} = state",
        *training.given(),
        "",
        "def loss_of(params):",
        *indented(inside, writer.unit),
        "",
        *training.updated("new_stats" if written else ""),
        *training.guarded(["new_params", *new_stats], ["params", *stats], ["new_params", *new_stats]),
    ]
    step = training.step(body, static=["graphdef"], constant=["rest"])
    copy, graphdef, rest = training.own(f"{model.name}_copy"), training.own("graphdef"), training.own("rest")
    opt_state, state = training.own("opt_state"), training.own("state")
    values = [training.own("params"), *(training.own("stats") for _ in stats)]
    made, optimizer = training.optimizer()
    lines: list[str] = []
    if part.first == 0:
        drawn, params, dropout = training.draw()
        lines += [*made, *drawn]
        if command.initialising:
            lines.append(rebuilt(command, build_before(command), params, dropout))
        lines += training.data()
    lines += [f"{copy} = nnx.clone({model.name})", *mode_lines(command, copy)]
    filters = ", ".join(filter(None, (trains, written, "...")))
    lines.append(f"{graphdef}, {', '.join((*values, rest))} = nnx.split({copy}, {filters})")
    lines += [f"{opt_state} = {optimizer}.init({values[0]})"] * (part.first == 0)
    lines.append(f"{state} = {', '.join((*values, opt_state))}, True")
    lines += training.loop(step, optimizer, static=[graphdef], constant=[rest])
    lines += [f"{', '.join((*values, opt_state))}, _ = {state}", f"nnx.update({model.name}, {', '.join(values)})"]
    return [*lines, *training.ended(f"nnx.state({model.name}, nnx.Not(nnx.RngState))")]
