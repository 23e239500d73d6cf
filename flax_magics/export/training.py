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
        # What a step is given before and after its state.
        self.static, self.constant = (["graphdef"], ["rest"]) if self.model.holds else ([], [])

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

    def lines(self, macro: str, *arguments: object) -> list[str]:
        """The lines of a macro of `templates/training.py.jinja`, which is given this object first."""
        return self.writer.rendered("training", macro, self, *arguments)

    # -- the step

    @property
    def batch_of_rows(self) -> str:
        """The line that takes a step's batch from the data."""
        batch = self.on_mesh.rows("jax.tree.map(lambda array: array[rows], data)")
        return f"{self.arguments.parameters[0]} = {batch}"

    def define_frozen(self) -> None:
        """Makes sure that the functions are defined that part frozen parameters of a linen net from the others."""
        if self.frozen:
            parts, joins = map(self.lines, ("split_frozen", "merge_frozen"))
            self.split_frozen = self.define("split_frozen", ("params",), parts)
            self.merge_frozen = self.define("merge_frozen", ("trained", "frozen"), joins)

    def whole(self, params: str) -> str:
        """The parameters of a linen net with those that are frozen, as an expression."""
        return f"{self.merge_frozen}({params}, frozen)" if self.frozen else params

    @property
    def parameters(self) -> list[str]:
        """The parameters of the step, and of the function that does several of them."""
        data = ["data", *self.arguments.parameters[1:], "rows"] if self.is_gathered else self.arguments.parameters
        return ["optimizer", *self.static, "state", *self.constant, *data, "step", *self.keys.values()]

    def step(self, body: Sequence[str]) -> str:
        """Makes sure that the jitted step is defined, and returns its name."""
        check_names(self.command, self.loss, self.parameters, body)
        static = ("optimizer", *self.static, *self.arguments.static)
        return self.define("train_step", self.parameters, body, static)

    def define(
        self, name: str, parameters: Sequence[str], body: Sequence[str], static: Sequence[str] | None = None
    ) -> str:
        """Makes sure that a function is defined, and returns its name: `name`, with those of net and loss if needed.

        Args:
          static: the static arguments of one that is jitted.
        """
        decorator = "" if static is None else "jax.jit"
        model, loss = self.model.name, self.loss.rpartition(".")[2]
        names = (name, f"{name}_{model}", f"{name}_{model}_{loss}")
        function = JittedFunction(model, names, decorator, tuple(parameters), tuple(static or ()), tuple(body))
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
            if not self.task.on_host:
                arrays = self.on_mesh.data(arrays, whole=self.is_cut)
            return [f"{data} = {arrays}", *rows]
        batches, of_name = self.variable("batches"), f"iterator {text} of {self.model.name}"
        # One that has a name goes on where it is; all else is begun anew, and what the steps took of it is left out.
        if first and of_name in self.writer.spare:
            return []
        self.writer.spare.pop(of_name, None)
        if self.task.once and text.isidentifier() and text not in self.command.context.rebound:
            self.writer.spare[of_name] = batches
        epochs = f"itertools.chain.from_iterable(itertools.repeat({text}))"
        taken = 0 if self.task.once else first % self.curve.epoch if self.curve.epoch else first
        return [f"{batches} = " + (f"itertools.islice({epochs}, {taken}, None)" if taken else epochs)]

    def from_file(self, saved: str, optimizer: str, params: str) -> list[str]:
        """The lines that read from a file what the training goes on with: keys, optimizer's state, losses and looks.

        Args:
          saved: the file's arrays of the training.
          params: those that are trained.
        """
        run, writer = self.command.runs[-1], self.writer
        state = self.model.opt_state
        leaves = jax.tree_util.tree_leaves(state)
        plain = all(isinstance(leaf, jax.Array) and not is_key(leaf) and not leaf.weak_type for leaf in leaves)
        if not plain or any("/" in name for name in self.curve.metrics):
            raise CannotSay("the file has it in a form that plain lines do not read")
        root = self.variable("train_root_key")
        streams = (*self.facts.streams, *streams_of_training(run))
        lines = [f"# The training in the file began in draw {run.draw} of seed {run.seed}."] if streams else []
        if streams:
            lines += [
                f"{root} = jax.random.key({run.seed})",
                *(writer.advance(run.draw - 1, root) if run.draw > 1 else []),
            ]
            lines += writer.keys_of(root, streams, self.key, taken=self.facts.taken)
        number = self.command.context.trained[self.command.indices[-1]]
        looks = self.curve.evals[: sum(len(part.looks) for part in parts_of(run)[:number])]
        return lines + self.lines("saved", self.variable, saved, f"{optimizer}.init({params})", bool(leaves), looks)

    def first_batch(self) -> tuple[list[str], str]:
        """The lines that take the batch by which the net is initialised, and its name."""
        if self.task.arrays and not self.is_cut:
            return [], self.variable("data")
        first, batches = self.variable("first_batch"), self.variable("batches")
        if self.is_cut:
            rows = f"array[:{self.task.batch}]"
            return [f"{first} = jax.tree.map(lambda array: {rows}, {self.variable('data')})"], first
        return [f"{first} = next({batches})", f"{batches} = itertools.chain([{first}], {batches})"], first

    def loop(self, step: str, optimizer: str, look: str) -> list[str]:
        """The loop over the steps of this part.

        Args:
          step: the name of the jitted step.
          look: the call that looks at the `--eval` data; empty where nothing does.
        """
        state, number = self.variable("state"), self.variable("step")
        source = self.variable("data" if self.task.arrays and not self.task.on_host else "batch")
        static, constant = (map(self.variable, names) for names in (self.static, self.constant))
        before = [optimizer, *static, state, *constant, source, *self.arguments.outside[1:]]
        after = [number, *map(self.key, self.keys)]
        steps = self.steps(step) if self.curve.group > 1 else ""
        row_order = self.key(ROW_ORDER) if self.is_cut else ""
        return self.lines("loop", self.variable, step, steps, look, source, before, after, row_order)

    @property
    def looks(self) -> tuple[int, ...] | range:
        """After how many steps of the loop there is a look."""
        looks = tuple(look for look in self.part.looks if look > self.part.first)
        if len(looks) > 1:
            every = range(looks[0], looks[-1] + 1, looks[1] - looks[0])
            if tuple(every) == looks and every.start % every.step == 0:
                return every
        return looks

    def at_looks(self, finished: str) -> str:
        """The condition under which so many steps are `finished` that there is a look; empty if there always is."""
        looks, (first, end, *_) = self.looks, self.part
        if self.reaches_over:
            return f"{finished} in {self.variable('looks')}"
        if len(looks) == 1:
            return f"{finished} == {looks[0]}"
        if isinstance(looks, range) and looks.start - looks.step <= first and end < looks.stop - 1 + looks.step:
            number = finished if finished.isidentifier() else f"({finished})"
            return f"{number} % {looks.step} == 0" if looks.step > 1 else ""
        return f"{finished} in {looks}"

    @property
    def reaches_over(self) -> bool:
        """Whether a group of steps could reach over a look, which none does that is at the end of an epoch."""
        inside, epoch = [step for step in self.looks if step < self.part.end], self.curve.epoch or 1
        return self.curve.group > 1 and any(not self.has_epochs or step % epoch for step in inside)

    @property
    def has_epochs(self) -> bool:
        """Whether groups are counted from the first step of an epoch, and end with it."""
        return self.is_cut or (not self.task.arrays and self.curve.epoch is not None)

    def steps(self, step: str) -> str:
        """Makes sure that the function is defined that does several steps in one program, and returns its name."""
        rows = "rows" if self.is_cut else "" if self.task.arrays else self.arguments.parameters[0]
        body = self.writer.rendered("training", "steps", rows, step, self.parameters, self.curve.group)
        return self.define("train_steps", self.parameters, body, ("optimizer", *self.static, *self.arguments.static))

    def begun(self) -> list[str]:
        """The lines that begin the lists of what the steps and the looks give."""
        curve, evals = self.variable("curve"), self.variable("evals")
        return [f"{curve}, {evals} = [], []"] if self.curve.evals else [f"{curve} = []"]

    def ended(self, variables: str) -> list[str]:
        """The lines after the loop: the digest of the variables, and the Run as far as the script has it."""
        lines = [f"# Stopped here, after {self.part.end} steps."]
        if self.part.is_last:
            lines = self.writer.show(self.command.label, variables)
        target = self.command.site.target
        return lines + (self.lines("run", self.variable, target) if target else [])
