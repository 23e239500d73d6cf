"""The lines for `%flax_train`: a jitted step and the loop around it, as one writes them by hand.

They are the very step and loop that ran, so that they give the same bits: the keys of a step are folded and its batch
is taken inside of the program, and a step that is not finite is turned down by `jax.lax.cond`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax

from ..base.digest import is_key
from ..base.measures import ROW_ORDER, Curve
from ..run import ExportFacts, LookFacts, Run
from .context import CommandLines, streams_of_training
from .functions import CannotSay, JittedFunction, SplitArguments, split
from .losses import check_names, patterns_of, taken_apart
from .mesh import TrainingOnMesh
from .writer import call, indented

TAKEN = (
    *("jax", "jnp", "nn", "nnx", "np", "optax", "optimizer", "graphdef", "state", "data", "rows", "step", "variables"),
    *("params", "frozen", "stats", "rest", "model", "opt_state", "finite", "rngs", "loss_of", "value", "metrics"),
    *("updates", "grads", "changes", "new", "old", "leaves", "new_opt_state", "new_params", "new_stats"),
    *("new_variables", "split_frozen", "merge_frozen", "batches", "values", "sizes", "first", "number"),
)
"""Names in the functions that no parameter may have."""


class Part(NamedTuple):
    """The steps `first` to `end - 1`: all, or those that one command did of a training that was interrupted.

    Attributes:
      looks: after how many steps each look at the `--eval` data was.
      look: how these were done.
      facts: of the loss as this command called it; None where that is not known.
    """

    first: int
    end: int
    is_last: bool
    looks: tuple[int, ...]
    look: LookFacts | None
    facts: ExportFacts | None


def parts_of(run: Run) -> list[Part]:
    """The parts of a training, in order."""
    assert run.trained is not None
    task, looks = run.trained.task, [look.step for look in run.trained.evals]
    ends, begun = (*task.parts, run.steps), (0, *task.looks, len(looks))
    known, facts = ((), ()) if run.spelling is None else (run.spelling.looks, (*run.spelling.parts, run.spelling))
    # Those of the commands before a load are not known.
    look_of = (*[None] * (len(ends) - len(known)), *known)
    facts_of = (*[None] * (len(ends) - len(facts)), *facts)
    return [
        Part(first, end, n == len(task.parts), tuple(looks[begun[n] : begun[n + 1]]), look_of[n], facts_of[n])
        for n, (first, end) in enumerate(zip((0, *ends), ends, strict=False))
    ]


def resumed_of(runs: Sequence[Run], model: str, steps: int | None) -> tuple[int, int] | None:
    """The index of the training that went on after so many steps, and the number of that part; None where none did."""
    trainings = [
        (index, parts_of(run)) for index, run in enumerate(runs) if run.model == model and run.trained is not None
    ]
    matching = [(i, n) for i, parts in trainings for n, part in enumerate(parts) if n and part.first == steps]
    return matching[-1] if matching else None


class TrainLines:
    """One part of a training, and what the lines for linen and for NNX have in common."""

    def __init__(self, command: CommandLines, part: Part) -> None:
        self.command, self.part = command, part
        self.writer, self.model, self.facts = command.writer, command.model, command.facts
        curves = [run.trained for run in command.runs if run.trained is not None]
        self.curve: Curve = curves[-1]
        self.task = self.curve.task
        steps = {(len(one.losses), one.epoch, one.task, tuple(look.step for look in one.evals)) for one in curves}
        if len(steps) > 1 or (command.site.path and self.task.parts):
            raise CannotSay("each of its runs did other steps")
        if self.facts.axes or self.facts.handed:
            raise CannotSay("its net asks for a mapped axis, or for `rngs` in its call")
        self.on_mesh = TrainingOnMesh(command, begins=part.first == 0)
        self.loss, self.after_net = taken_apart(command)
        self.is_cut = self.task.arrays and self.task.batch is not None
        self.is_gathered = self.is_cut and not self.task.on_host
        """The step is given all arrays, and takes its batch from them."""
        self.keys = {stream: f"{stream}_key" for stream in self.facts.streams}
        self.folded = {stream: f"jax.random.fold_in({key}, step)" for stream, key in self.keys.items()}
        self.frozen = patterns_of(command, self.task.freeze)
        self.has_metrics = "metrics" in self.facts.returns
        taken = (*TAKEN, self.model.name, self.loss, *self.keys.values())
        self.arguments = split(self.writer, self.after_net, self.facts, taken)
        self.check_arguments(self.arguments)
        self.writer.needs |= {"jax", "jnp", "optax"}

    def check_arguments(self, arguments: SplitArguments) -> None:
        """Raises CannotSay where the data are no single argument."""
        if not arguments.inside or arguments.inside[0] != arguments.parameters[0]:
            raise CannotSay("its data are put together in the call")

    def variable(self, purpose: str) -> str:
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
            return self.variable(f"train_{stream}_key")
        return self.writer.key(stream, taken=self.facts.taken)

    # -- the step

    def batch_line(self) -> list[str]:
        """The line that takes a step's batch from the data; none where the function is given the batch."""
        batch = self.on_mesh.rows("jax.tree.map(lambda array: array[rows], data)")
        return [f"{self.arguments.parameters[0]} = {batch}"] * self.is_gathered

    def updated(self, written: str) -> list[str]:
        """The lines that take gradients and update `params`; `written`: the name for what the loss writes, or empty."""
        aux = f"(metrics, {written})" if self.has_metrics and written else "metrics" if self.has_metrics else written
        value, has_aux = (f"(value, {aux})", ", has_aux=True") if aux else ("value", "")
        passed = ["grads", "opt_state", "params"]
        if self.task.takes_loss:
            of_params = "lambda params: loss_of(params)[0]" if aux else "loss_of"
            passed += ["value=value", "grad=grads", f"value_fn={of_params}"]
        return [
            f"{value}, grads = jax.value_and_grad(loss_of{has_aux})(params)",
            call("changes, new_opt_state = optimizer.update(", passed),
            "new_params = optax.apply_updates(params, changes)",
        ]

    def guarded(self, new: Sequence[str], old: Sequence[str], changed: Sequence[str]) -> list[str]:
        """The last lines of the step, which is taken only if it is finite, and if all before it were.

        Args:
          changed: what of the new values the step has changed.
        """
        text = self.writer.text
        metrics = f", {text('metrics')}: metrics" if self.has_metrics else ""
        return [
            "# A step that is not finite is not taken, and none after it.",
            call("leaves = jax.tree.leaves((", ["value", "grads", *changed], "))"),
            "finite &= jnp.stack([jnp.isfinite(leaf).all() for leaf in leaves]).all()",
            f"new, old = ({', '.join(new)}, new_opt_state), ({', '.join(old)}, opt_state)",
            f"state = {self.on_mesh.state('jax.lax.cond(finite, lambda: new, lambda: old)')}",
            f"return (*state, finite), {{{text('loss')}: value{metrics}}}",
        ]

    def step(self, body: Sequence[str], *, static: Sequence[str] = (), constant: Sequence[str] = ()) -> str:
        """Makes sure that the jitted step is defined, and returns its name."""
        data = ["data", *self.arguments.parameters[1:], "rows"] if self.is_gathered else self.arguments.parameters
        parameters = ("optimizer", *static, "state", *constant, *data, "step", *self.keys.values())
        fixed = ("optimizer", *static, *self.arguments.static)
        check_names(self.command, self.loss, parameters, body)
        return self.define("train_step", parameters, body, decorator="jax.jit", static=fixed)

    def define(
        self,
        name: str,
        parameters: Sequence[str],
        body: Sequence[str],
        *,
        decorator: str = "",
        static: Sequence[str] = (),
    ) -> str:
        """Makes sure that a function is defined, and returns its name: `name`, with those of net and loss if needed."""
        model, loss = self.model.name, self.loss.rpartition(".")[2]
        names = (name, f"{name}_{model}", f"{name}_{model}_{loss}")
        function = JittedFunction(model, names, decorator, tuple(parameters), tuple(static), tuple(body))
        return self.command.context.define(function, self.command.site)

    # -- around the loop

    def optimizer(self) -> tuple[list[str], str]:
        """The line that makes the optimizer, none where it is there, and its name."""
        written, present = self.command.options["optimizer"], f"present optimizer of {self.model.name}"
        spare = self.writer.spare
        if written is None:
            if present not in spare:
                raise CannotSay("its optimizer was not made by any line of the script")
            return [], spare[present]
        # A name that is bound again may stand for another one by the next training.
        if written.isidentifier() and written not in self.command.context.rebound:
            spare[present] = written
            return [], written
        spare[present] = self.variable("optimizer")
        return [f"{spare[present]} = {written}"], spare[present]

    def draw(self) -> tuple[list[str], str, str]:
        """The lines of the draw, and the keys `params` and `dropout` for an init."""
        run = self.command.runs[-1]
        parts = (part.facts.streams for part in parts_of(run) if part.facts is not None)
        of_others = dict.fromkeys(name for streams in parts for name in streams if name not in self.facts.streams)
        besides = (*of_others, *streams_of_training(run))
        lines, key, params = self.command.keys(*besides)
        streams = (*self.facts.streams, *besides)
        if self.task.parts and streams:
            lines.append(f"{', '.join(map(self.key, streams))} = {', '.join(map(key, streams))}")
        return lines, params, self.writer.dropout

    def data(self) -> list[str]:
        """The lines that put arrays on the device, or go through an iterable again and again."""
        text, first = self.arguments.outside[0], self.part.first
        if self.task.arrays:
            data, rows = self.variable("data"), list[str]()
            if self.is_cut:
                rows = [f"{self.variable('size')} = len(jax.tree.leaves({data})[0])"]
            arrays = f"jax.tree.map({'np.asarray' if self.task.on_host else 'jnp.asarray'}, {text})"
            if self.task.on_host:
                self.writer.needs.add("np")
            else:
                arrays = self.on_mesh.data(arrays, whole=self.is_cut)
            return [f"{data} = {arrays}", *rows]
        batches, of_name = self.variable("batches"), f"iterator {text} of {self.model.name}"
        # One that has a name goes on where it is; all else is begun anew, and what the steps took of it is left out.
        if first and of_name in self.writer.spare:
            return []
        self.writer.spare.pop(of_name, None)
        if self.task.once and text.isidentifier() and text not in self.command.context.rebound:
            self.writer.spare[of_name] = batches
        self.writer.needs.add("itertools")
        epochs = f"itertools.chain.from_iterable(itertools.repeat({text}))"
        taken = 0 if self.task.once else first % self.curve.epoch if self.curve.epoch else first
        return [f"{batches} = " + (f"itertools.islice({epochs}, {taken}, None)" if taken else epochs)]

    def from_file(self, saved: str, optimizer: str, params: str) -> list[str]:
        """The lines that read from a file what the training goes on with: keys, optimizer's state, losses and looks.

        Args:
          saved: the file's arrays of the training.
          params: those that are trained.
        """
        run, writer, text = self.command.runs[-1], self.writer, self.writer.text
        state = self.model.opt_state
        leaves = jax.tree_util.tree_leaves(state)
        plain = all(isinstance(leaf, jax.Array) and not is_key(leaf) and not leaf.weak_type for leaf in leaves)
        if not plain or any("/" in name for name in self.curve.metrics):
            raise CannotSay("the file has it in a form that plain lines do not read")
        root, arrays, values = map(self.variable, ("train_root_key", "saved", "values"))
        streams = (*self.facts.streams, *streams_of_training(run))
        lines = [f"# The training in the file began in draw {run.draw} of seed {run.seed}."] if streams else []
        if streams:
            lines += [
                f"{root} = jax.random.key({run.seed})",
                *(writer.advance(run.draw - 1, root) if run.draw > 1 else []),
            ]
            lines += writer.keys_of(root, streams, self.key, taken=self.facts.taken)
        lines.append(f"{arrays} = {saved}")
        opt_state, new = self.variable("opt_state"), f"{optimizer}.init({params})"
        if leaves:
            writer.needs.add("traverse_util")
            of_file, pairs, tree, names = map(self.variable, ("saved_opt_state", "leaves", "treedef", "names"))
            name = f"jax.tree_util.keystr(path, simple=True, separator={text('/')})"
            lines += [
                f"{of_file} = traverse_util.flatten_dict({arrays}[{text('opt_state')}], sep={text('/')})",
                f"{pairs}, {tree} = jax.tree_util.tree_flatten_with_path({new})",
                f"{names} = [{name} for path, _ in {pairs}]",
                f"{opt_state} = jax.tree.unflatten({tree}, [{of_file}[name] for name in {names}])",
            ]
        else:
            lines.append(f"{opt_state} = {new}")
        steps = {"loss": "losses", "metrics": "metrics"} if self.has_metrics else {"loss": "losses"}
        of_steps = ", ".join(f"{text(name)}: {arrays}[{text(key)}]" for name, key in steps.items())
        lines += [
            f"{values} = {{{of_steps}}}",
            f"{self.variable('curve')} = [jax.tree.map(lambda leaf: leaf[n], {values}) for n in range({self.part.first})]",
        ]
        if self.curve.evals:
            writer.needs.add("types")
            lines.append(f"{self.variable('evals')} = [")
            number = self.command.context.trained[self.command.indices[-1]]
            for look in self.curve.evals[: sum(len(part.looks) for part in parts_of(run)[:number])]:
                metrics = ", ".join(f"{text(name)}: {writer.number(value)}" for name, value in look.metrics.items())
                fields = (f"step={look.step}", f"loss={writer.number(look.loss)}", f"metrics={{{metrics}}}")
                lines.append(f"{writer.unit}{call('types.SimpleNamespace(', fields)},")
            lines.append("]")
        return lines

    def first_batch(self) -> tuple[list[str], str]:
        """The lines that take the batch by which the net is initialised, and its name."""
        if self.task.arrays and not self.is_cut:
            return [], self.variable("data")
        first, batches = self.variable("first_batch"), self.variable("batches")
        if self.is_cut:
            rows = f"array[:{self.task.batch}]"
            return [f"{first} = jax.tree.map(lambda array: {rows}, {self.variable('data')})"], first
        return [f"{first} = next({batches})", f"{batches} = itertools.chain([{first}], {batches})"], first

    def loop(
        self, step: str, optimizer: str, look: str, *, static: Sequence[str] = (), constant: Sequence[str] = ()
    ) -> list[str]:
        """The loop over the steps of this part.

        Args:
          step: the name of the jitted step.
          look: the call that looks at the `--eval` data; empty where nothing does.
          static, constant: what the step is given before and after its state.
        """
        first, end, looks = self.part.first, self.part.end, self.part.looks
        number, state, curve, values = map(self.variable, ("step", "state", "curve", "values"))
        source = self.variable("data" if self.task.arrays and not self.task.on_host else "batch")
        before = [optimizer, *static, state, *constant, source, *self.arguments.outside[1:]]
        after, is_iterable = [number, *map(self.key, self.keys)], not self.task.arrays
        rows = [self.variable("rows")] if self.is_gathered else []
        one = [call(f"{state}, {values} = {step}(", [*before, *rows, *after]), f"{curve}.append({values})"]
        steps, group = f"range({first}, {end})" if first else f"range({end})", self.curve.group
        body: list[str] = []
        if is_iterable:
            self.writer.needs.add("np")
        if is_iterable and group == 1:
            head = f"for {number}, {source} in zip({steps}, {self.variable('batches')}):"
            body.append(f"{source} = jax.tree.map(np.asarray, {source})")
            body += [f"{source} = {self.on_mesh.batch(source)}"] * self.on_mesh.is_used
        elif group == 1:
            head = f"for {number} in {steps}:"
        else:
            head = f"while {number} < {end}:"
        if group == 1:
            finished = f"{number} + 1"
            body += [*self._order(), *self._rows("1"), *self._on_host(source), *one]
        else:
            finished, many = number, self.variable("many")
            rows = [f"{each}.reshape({group}, {self.task.batch})" for each in rows]
            together = call(f"{state}, {values} = {self.steps(step, static, constant)}(", [*before, *rows, *after])
            split = f"{curve} += [jax.tree.map(lambda leaf: leaf[n], {values}) for n in range({group})]"
            body += [*self._order(), *self._grouped(many), *self._rows(many)]
            is_single, grouped = f"{many} == 1", [together, split]
            if is_iterable:
                part, each, batches = self.variable("part"), self.variable("each_step"), self.variable("batches")
                body.append(
                    f"{part} = [jax.tree.map(np.asarray, each) for each in itertools.islice({batches}, {many})]"
                )
                kind = "str(jax.tree.map(lambda leaf: (leaf.dtype, leaf.shape), each))"
                is_single += f" or len({{{kind} for each in {part}}}) > 1"
                one = [call(f"{state}, {values} = {step}(", [*before, each, *after[1:]]), one[1]]
                one = [f"for {each}, {source} in enumerate({part}, {number}):", *indented(one, self.writer.unit)]
                grouped.insert(0, f"{source} = jax.tree.map(lambda *leaves: np.stack(leaves), *{part})")
            body += [f"if {is_single}:", *indented(one, self.writer.unit)]
            body += ["else:", *indented(grouped, self.writer.unit), f"{number} += {many}"]
        lines = [] if group == 1 else [f"{number} = {first}"]
        if look and looks[0] == first:
            lines += ["# The look that was stopped.", *self._looked(look, str(first))]
        if look and looks[-1] > first:
            body += self._at_looks(finished, self._looked(look, finished))
            if self.reaches_over:
                lines.append(f"{self.variable('looks')} = {self.looks}")
        return [*lines, head, *indented(body, self.writer.unit)]

    @property
    def looks(self) -> tuple[int, ...] | range:
        """After how many steps of the loop there is a look."""
        looks = tuple(look for look in self.part.looks if look > self.part.first)
        if len(looks) > 1:
            every = range(looks[0], looks[-1] + 1, looks[1] - looks[0])
            if tuple(every) == looks and every.start % every.step == 0:
                return every
        return looks

    def _looked(self, look: str, finished: str) -> list[str]:
        """The lines that look at the `--eval` data once `finished` steps are finished."""
        evals = self.variable("evals")
        self.writer.needs.add("types")
        means = self.variable("means")
        return [
            f"{means} = {look}",
            f"{evals}.append(types.SimpleNamespace(step={finished}, **{means}))",
            f"print({evals}[-1])",
        ]

    def _at_looks(self, finished: str, lines: list[str]) -> list[str]:
        """`lines` under the condition that `finished` steps are so many that there is a look."""
        looks, (first, end, *_), condition = self.looks, self.part, f"{finished} in {self.looks}"
        if self.reaches_over:
            condition = f"{finished} in {self.variable('looks')}"
        elif len(looks) == 1:
            condition = f"{finished} == {looks[0]}"
        elif isinstance(looks, range) and looks.start - looks.step <= first and end < looks.stop - 1 + looks.step:
            if looks.step == 1:
                return lines
            condition = f"{finished if finished.isidentifier() else f'({finished})'} % {looks.step} == 0"
        return [f"if {condition}:", *indented(lines, self.writer.unit)]

    def _order(self) -> list[str]:
        """The lines that shuffle the rows anew in each epoch; none where each step takes all of them."""
        if not self.is_cut:
            return []
        self.writer.needs.add("np")
        first, number = self.part.first, self.variable("step")
        epoch, place, order = map(self.variable, ("epoch", "place", "order"))
        begins = f"{place} == 0" + f" or {number} == {first}" * bool(first)
        epoch_key = self.variable("epoch_key")
        shuffled = [
            f"{epoch_key} = jax.random.fold_in({self.key(ROW_ORDER)}, {epoch})",
            f"{order} = np.asarray(jax.random.permutation({epoch_key}, {self.variable('size')}))",
        ]
        return [
            f"{epoch}, {place} = divmod({number}, {self.curve.epoch})",
            f"if {begins}:",
            *indented(shuffled, self.writer.unit),
        ]

    def _rows(self, many: str) -> list[str]:
        """The line that takes the rows of `many` steps."""
        size, place = self.task.batch, self.variable("place") if self.is_cut else ""
        end = f"({place} + {many})"
        return [f"{self.variable('rows')} = {self.variable('order')}[{size} * {place} : {size} * {end}]"] * self.is_cut

    def _on_host(self, source: str) -> list[str]:
        """The lines that take a batch from arrays which are not on the device."""
        data, rows = (self.variable(name) if self.task.on_host else "" for name in ("data", "rows"))
        lines = [f"{source} = jax.tree.map(lambda array: array[{rows}], {data})"]
        lines += [f"{source} = {self.on_mesh.batch(source)}"] * self.on_mesh.is_used
        return lines if self.task.on_host else []

    @property
    def reaches_over(self) -> bool:
        """Whether a group of steps could reach over a look, which none does that is at the end of an epoch."""
        inside, epoch = [step for step in self.looks if step < self.part.end], self.curve.epoch or 1
        return self.curve.group > 1 and any(not self.has_epochs or step % epoch for step in inside)

    @property
    def has_epochs(self) -> bool:
        """Whether groups are counted from the first step of an epoch, and end with it."""
        return self.is_cut or (not self.task.arrays and self.curve.epoch is not None)

    def _grouped(self, many: str) -> list[str]:
        """The lines that say how many steps the next program does: a group on the grid of the run, or one."""
        group, number, end = self.curve.group, self.variable("step"), str(self.part.end)
        place = self.variable("place") if self.has_epochs else number
        lines, fits = [f"# {group} steps are one program where they fit."], [f"{place} % {group} == 0"]
        if self.is_cut:
            fits.append(f"{place} + {group} <= {self.variable('size')} // {self.task.batch}")
        elif self.has_epochs:
            lines.insert(0, f"{place} = {number} % {self.curve.epoch}")
            fits.append(f"{place} + {group} <= {self.curve.epoch}")
        if self.reaches_over:
            until, later = self.variable("until"), f"look for look in {self.variable('looks')} if look > {number}"
            lines.append(
                f"{until} = min({later})" if self.looks[-1] == self.part.end else f"{until} = min({end}, *({later}))"
            )
            end = until
        fits.append(f"{number} + {group} <= {end}")
        is_group = self.variable("fits")
        return [*lines, f"{is_group} = {' and '.join(fits)}", f"{many} = {group} if {is_group} else 1"]

    def steps(self, step: str, static: Sequence[str], constant: Sequence[str]) -> str:
        """Makes sure that the function is defined that does several steps in one program, and returns its name."""
        numbers = f"step + jnp.arange({self.curve.group})"
        of_steps = ["rows"] if self.is_cut else [] if self.task.arrays else self.arguments.parameters[:1]
        data = ["data", *self.arguments.parameters[1:], "rows"] if self.is_cut else self.arguments.parameters
        parameters = ["optimizer", *static, "state", *constant, *data, "step", *self.keys.values()]
        body = [
            f"def one(state, {'each' if of_steps else 'step'}):",
            *([f"{self.writer.unit}{of_steps[0]}, step = each"] if of_steps else []),
            f"{self.writer.unit}{call(f'return {step}(', parameters)}",
            "",
            f"return jax.lax.scan(one, state, {f'({of_steps[0]}, {numbers})' if of_steps else numbers})",
        ]
        fixed = ("optimizer", *static, *self.arguments.static)
        return self.define("train_steps", parameters, body, decorator="jax.jit", static=fixed)

    def begun(self) -> list[str]:
        """The lines that begin the lists of what the steps and the looks give."""
        curve, evals = self.variable("curve"), self.variable("evals")
        return [f"{curve}, {evals} = [], []"] if self.curve.evals else [f"{curve} = []"]

    def ended(self, variables: str) -> list[str]:
        """The lines after the loop: the digest of the variables, and the Run as far as the script has it."""
        lines = [f"# Stopped here, after {self.part.end} steps."]
        if self.part.is_last:
            lines = self.writer.show(self.command.label, variables)
        if self.command.site.target:
            self.writer.needs |= {"np", "types"}
            curve, text = self.variable("curve"), self.writer.text
            of_metrics = f"each[{text('metrics')}]"
            values = {
                name: f"np.array([{of_metrics}[{text(name)}] for each in {curve}])" for name in self.curve.metrics
            }
            metrics = ", ".join(f"{text(name)}: {value}" for name, value in values.items())
            losses = f"losses=np.array([each[{text('loss')}] for each in {curve}])"
            evals = f"eval=tuple({self.variable('evals')})" if self.curve.evals else "eval=()"
            fields = [losses, f"metrics={{{metrics}}}", evals, f"steps={self.part.end}"]
            lines.append(call(f"{self.command.site.target} types.SimpleNamespace(", fields))
        return lines
