"""The state of a script that is being written: models, runs, names; and the command whose lines are written now."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import chain, pairwise

from msgspec.structs import replace

from ..base.measures import EVAL, ROW_ORDER, Curve
from ..base.types import PyTree
from ..cells.journal import Load
from ..line.call import CallExpression
from ..rng.keys import SPLIT, StepDraw
from ..run import ExportFacts, Run
from .cells import CellRun, CommandSite
from .functions import CannotSay, JittedFunction
from .writer import WIDTH, LineWriter, indented, is_of_the_notebook, label_of


@dataclass(eq=False)
class ScriptModel:
    """A registered model as the script has it.

    Attributes:
      name: the variable that holds the module; not the registered name where that is its class.
      module: the module as it is registered now.
      holds: whether it holds its variables (NNX).
      variables: the variable that holds its variables (linen).
      construction: the text by which the session built it, without `rngs` (NNX); empty if the user did.
      first_key: the variable that keeps the key of the first init, if a method adds variables later; else empty.
      loaded: its present variables, whose tree shows whether a file's can be read by plain lines; of an NNX module by
        type and path.
      opt_state: the present state of its optimizer, for the same reason.
    """

    name: str
    module: object
    holds: bool
    variables: str = ""
    construction: str = ""
    first_key: str = ""
    loaded: PyTree = None
    opt_state: PyTree = None


class RunGroups:
    """The runs of a session, the commands that made them, and which of them share a draw.

    Attributes:
      runs: all of them, in order.
      versions: for each run a value that is equal as long as the model's code, and all that it reads, stays the same.
      made_by: index of a run → the command that made it; missing for runs that no command explains.
      by_statement: command → the indices of its runs, a list for each executed statement that it ran in.
      follower: index of an init → that of the apply which took the rest of its draw; `leader` is the inverse.
    """

    def __init__(self, runs: Sequence[Run], cell_runs: Sequence[CellRun], restarts: Sequence[int]) -> None:
        self.runs = runs
        self.versions: list[object] = []
        self.made_by: dict[int, CommandSite] = {}
        self.by_statement: dict[CommandSite, list[list[int]]] = {}
        self.follower: dict[int, int] = {}
        # The model's fingerprint at each run; without one, a count of how often the model had changed by then.
        changes: Counter[str | None] = Counter()
        for run in runs:
            changes[run.model] += any(cause.kind == "model" for cause in run.causes)
            code = None if run.spelling is None else run.spelling.code
            self.versions.append(changes[run.model] if code is None else code)
        for statement in (statement for cell_run in cell_runs for statement in cell_run.statements):
            for site in {site for _, site in statement.runs if site is not None}:
                indices = [index for index, other in statement.runs if other is site]
                self.made_by |= dict.fromkeys(indices, site)
                self.by_statement.setdefault(site, []).append(indices)
        in_functions = {(site.name, site.line, site.target): site for site in self.by_statement if site.in_function}
        for site in (site for cell_run in cell_runs for site in cell_run.source.sites.values()):
            twin = in_functions.get((site.name, site.line, site.target))
            if twin is not None and site not in self.by_statement and site.in_function is not None:
                # A function that was defined again before it was called would make the runs that the other made.
                self.by_statement[site] = self.by_statement[twin]
        for init, index in pairwise(i for i, run in enumerate(runs) if not run.replayed):
            first, second = runs[init], runs[index]
            goes_on = first.kind.opens and second.kind.forward and not any(init < n <= index for n in restarts)
            if goes_on and (first.model, first.seed, first.draw) == (second.model, second.seed, second.draw):
                self.follower[init] = index
        self.leader = {apply: init for init, apply in self.follower.items()}

    def of_site(self, site: CommandSite) -> list[int]:
        """The indices of all runs that a command made."""
        return list(chain.from_iterable(self.by_statement.get(site, [])))

    def shares_in_place(self, site: CommandSite) -> bool:
        """Whether each run of `site` goes on with a draw that an init in the same block opened just before."""
        inits = [self.made_by.get(self.leader.get(index, -1)) for index in self.of_site(site)]
        alone = site.parsed.options.get("samples") is None
        return alone and bool(inits) and all(init is not None and init.path == site.path for init in inits)

    def stays(self, site: CommandSite) -> bool:
        """Whether the root key stays after an init, because an apply elsewhere splits it again."""
        after = [self.made_by.get(self.follower.get(index, -1)) for index in self.of_site(site)]
        return bool(after) and all(other is not None and not self.shares_in_place(other) for other in after)

    def goes_on(self, load: Load) -> bool:
        """Whether a run takes keys from the draw that an init had opened in the session of a file."""
        runs = (self.runs[init] for init in self.follower if init not in self.made_by)
        return any((run.seed, run.draw) == (load.seed, load.draws) for run in runs)

    def folded_later(self, site: CommandSite) -> tuple[tuple[str, ...], bool]:
        """Streams that the apply after an init takes from the same draw, and whether its own `params` is folded in."""
        after = [self.follower.get(index, -1) for index in self.of_site(site)]
        shared = [index for index in after if index in self.made_by and self.shares_in_place(self.made_by[index])]
        facts = {index: self.runs[index].spelling or ExportFacts() for index in shared}
        more = {i: (*self.made_by[i].parsed.options["key"], *streams_of_training(self.runs[i])) for i in shared}
        streams = (name for i in shared for name in (*more[i], *facts[i].streams))
        return tuple(dict.fromkeys(streams)), any(each.taken for each in facts.values())


def streams_of_training(run: Run) -> tuple[str, ...]:
    """The streams of a training besides those of its steps: of the looks, and of the key by which it shuffles arrays.

    Empty for every other run.
    """
    if run.trained is None:
        return ()
    task, looks = run.trained.task, () if run.spelling is None else run.spelling.looks
    of_looks = dict.fromkeys(f"{EVAL} {stream}" for look in looks if look is not None for stream in look.call.streams)
    return (*of_looks, *([ROW_ORDER] if task.arrays and task.batch is not None else []))


FROM_PACKAGE = "it comes from flax_magics"


@dataclass(eq=False)
class SessionNames:
    """Names that have no value in the script, with the reason.

    These are names of flax_magics and IPython, and names that only left-out lines assign. All other names are the
    user's: whether they are defined is never asked.

    Attributes:
      bound: names that the session's code assigned itself, such as `_`.
    """

    gone: dict[str, str] = field(default_factory=lambda: {"flax_magics": FROM_PACKAGE})
    bound: set[str] = field(default_factory=set)

    def lose(self, names: Iterable[str], reason: str) -> None:
        """Records that `names` have no value from here on."""
        self.gone.update(dict.fromkeys(names, reason))

    def bind(self, names: Iterable[str]) -> None:
        """Records that `names` are assigned in the script."""
        for name in names:
            self.gone.pop(name, None)
            self.bound.add(name)

    def missing(self, names: Iterable[str]) -> CannotSay | None:
        """The error for code that reads a name without a value; None if it reads none."""
        for name in sorted(names):
            reason = self.gone.get(name)
            if reason is None and is_of_the_notebook(name) and name not in self.bound:
                reason = "it is the notebook's own"
            if reason:
                return CannotSay(f"`{name}` is not there: {reason}", reason)
        return None


@dataclass(eq=False)
class ScriptContext:
    """The state of a script that is being written.

    Attributes:
      models: by registered name.
      names: those without a value in the script.
      unexported: what could not be exported, each with its reason.
      lost: model → the reason why the script does not have its variables.
      asked_back: models whose replaced variables a line takes, by `models['net'].previous`.
      aside: model → why the script has not kept those that were replaced last; empty where it has.
      assigned: names that the lines of the present command assign; inside a function they are declared global.
      states: model → what became of it in the present cell: `new`, `unchanged`, `changed`.
      restored: models that get the variables of a file in the present cell; `waiting` has their lines.
      load: what the present `%flax_load` read.
      trained: index of a training's run → how many of its parts have lines.
      saved: index of a training's run → the file's arrays of it, where the script has not gone on with them yet.
      rebound: names that are bound by more than one statement that ran.
      gone: the runs of the present cell are not in the history, which a later `%flax_load` replaced.
      mesh: the axes of the mesh that runs are laid out on, as they were written; empty without one.
      laid_out: variables that hold a module whose variables lie on it.
      apart: variables that hold a module whose class's name stands for another class since.
      define: makes sure that a function is defined before it is used, and returns its name.
    """

    writer: LineWriter
    groups: RunGroups
    models: Mapping[str, ScriptModel]
    names: SessionNames = field(default_factory=SessionNames)
    unexported: list[str] = field(default_factory=list)
    lost: dict[str, str] = field(default_factory=dict)
    asked_back: Set[str] = frozenset()
    aside: dict[str, str] = field(default_factory=dict)
    assigned: set[str] = field(default_factory=set)
    states: Mapping[str, str] = field(default_factory=dict)
    restored: Set[str] = frozenset()
    waiting: dict[str, list[str]] = field(default_factory=dict)
    load: Load | None = None
    trained: dict[int, int] = field(default_factory=dict)
    saved: dict[int, str] = field(default_factory=dict)
    rebound: frozenset[str] = frozenset()
    gone: bool = False
    mesh: str = ""
    laid_out: set[str] = field(default_factory=set)
    apart: set[str] = field(default_factory=set)
    define: Callable[[JittedFunction, CommandSite], str] = field(init=False)

    def is_conditional(self, site: CommandSite) -> bool:
        """Whether only some runs of a command initialised, so that the script must test for variables."""
        inits = [initialises(self.groups.runs[index]) for index in self.groups.of_site(site)]
        return bool(site.path) and any(inits) and (len(inits) == 1 or not all(inits))

    def going(self, site: CommandSite) -> int | None:
        """The index of the training that a `%flax_train --resume` goes on with; None for any other command."""
        if site.name != "flax_train" or not site.parsed.options["resume"] or site.call is None:
            return None
        runs = self.groups.runs
        mine = [index for index in self.trained if runs[index].model == site.model]
        going = [index for index in mine if self.trained[index] <= len(_trained(runs[index]).task.parts)]
        return going[-1] if going else None

    def skipped(self, indices: Sequence[int], reason: str) -> None:
        """Records runs that have no lines: the script no longer has the variables that they made or changed."""
        for run in (self.groups.runs[index] for index in indices):
            if run.model is not None and not run.replayed and (run.made is not None or run.changed):
                self.lost[run.model] = reason

    def model(self, name: str) -> ScriptModel:
        """A registered model. Raises CannotSay where it is unknown by now."""
        if name not in self.models:
            raise CannotSay(f"the model `{name}` is not known any more")
        return self.models[name]


def _trained(run: Run) -> Curve:
    assert run.trained is not None
    return run.trained


def initialises(run: Run) -> bool:
    """Whether a run made all variables of its model, rather than adding some."""
    return run.made is not None and not run.made.added


KeyNames = Callable[[str], str]
"""Stream → the variable that holds its key."""


class CommandLines:
    """One command of a cell with its runs, and the parts of which its lines are composed."""

    def __init__(
        self, context: ScriptContext, site: CommandSite, indices: Sequence[int], part: ExportFacts | None = None
    ) -> None:
        self.context, self.site, self.indices, self._part = context, site, indices, part
        self.writer, self.options = context.writer, site.parsed.options
        self.runs = [context.groups.runs[index] for index in indices]

    @property
    def call(self) -> CallExpression:
        """The model's call, as written on the command's line."""
        assert self.site.call is not None
        return self.site.call

    @property
    def model(self) -> ScriptModel:
        """The model that the command runs."""
        return self.context.model(self.runs[-1].model or "")

    @property
    def initialising(self) -> list[Run]:
        """Those of its runs that made all variables of the model."""
        return [run for run in self.runs if initialises(run)]

    @cached_property
    def facts(self) -> ExportFacts:
        """The facts that all of its runs share; streams and collections are those of all runs together.

        Raises:
          CannotSay: the runs are too different for one set of lines.
        """
        facts = [run.spelling for run in self.runs if run.spelling is not None]
        if self._part is not None:  # of a training that went on, which may have another loss since
            facts = [self._part]
        if not facts:
            raise CannotSay("the session does not know how it was run")
        last = facts[-1]
        modes = [(each.arguments, each.module, None if each.mode is None else each.mode.to) for each in facts]
        alike = [(each.taken, each.containers, mode) for each, mode in zip(facts, modes, strict=True)]
        if any(one != alike[-1] for one in alike):  # keys, containers in the call, or after an edit the mode
            raise CannotSay("its runs differ too much for one set of lines")
        mode = last.mode
        if mode is not None and any(each.mode != mode for each in facts):
            # Runs that set the mode back in different ways: a copy is run, which needs no setting back.
            mode = replace(mode, back=None)
        taken_apart = tuple(f"{name}[" for name, part in last.containers if not part.has("other"))
        names = (name for name in last.static if not name.isidentifier() and name not in last.parameters)
        parts = sorted(name for name in names if not name.startswith(taken_apart))
        if parts:
            raise CannotSay(f"`{parts[0]}` is part of the program, and jax.jit takes no such part of an argument")

        def of_any(field: str) -> tuple[str, ...]:
            return tuple(sorted({name for each in facts for name in getattr(each, field)}))

        return replace(last, mode=mode, streams=of_any("streams"), mutable=of_any("mutable"), kept=of_any("kept"))

    # -- the keys of its draw

    def keys(self, *more: str) -> tuple[list[str], KeyNames, str]:
        """The lines that make its keys, the variable of each stream's key, and the variable of the init's key.

        Args:
          more: streams that it takes beside those of the model.
        """
        context, writer, facts, many = self.context, self.writer, self.facts, self.options["samples"] is not None
        streams = (*facts.streams, *self.options["key"], *more)
        if many and facts.taken and "params" in streams:
            raise CannotSay("the first of its samples has another `params` key than the others")
        makes = any(run.made for run in self.runs)
        if self.options["keys_of"] is not None:
            return self.replayed_keys((*streams, *(SPLIT if makes else ())), taken=facts.taken)
        context.assigned.add(writer.root)
        key = partial(writer.key, taken=facts.taken)
        if many:
            return self._many_keys(writer.root, (*streams, *(("params",) if makes else ())), key)
        if context.groups.shares_in_place(self.site):
            # The init before it has split the root key already.
            context.assigned |= {writer.params, writer.dropout, *map(key, streams)}
            return [], key, writer.params
        return writer.draw(streams, taken=facts.taken), key, writer.params

    def keys_of_init(self, *streams: str) -> tuple[list[str], KeyNames, str]:
        """`keys` for an init, which takes `streams` of its draw."""
        if self.options["keys_of"] is not None:
            return self.replayed_keys(streams)
        writer = self.writer
        self.context.assigned |= {writer.root, writer.params, writer.dropout}
        return self.draw_of_init(*streams), writer.key, writer.params

    def replayed_keys(self, streams: Iterable[str], *, taken: bool = False) -> tuple[list[str], KeyNames, str]:
        """`keys` for `--keys-of`: those of an earlier draw, or of several from it on, made again from the seed."""
        writer, size = self.writer, self.options.get("samples")
        draws = {(run.seed, run.draw) for run in self.runs}
        if len(draws) > 1:
            raise CannotSay("--keys-of stood for another draw each time")
        ((seed, number),) = draws
        root = writer.variable("replayed_root_key")
        names = {name: writer.variable(f"replayed_{name}_key") for name in streams}
        which = f"draw {number}" if size in (None, 1) else f"draws {number} to {number + size - 1}"
        lines = [f"{root} = jax.random.key({seed})  # {which} again"]
        lines += writer.advance(number - 1, root) if number > 1 else []
        if size is not None:
            moves, many, params = self._many_keys(root, names, names.__getitem__)
            return [*lines, *moves], many, params
        lines += writer.keys_of(root, names, names.__getitem__, taken=taken)
        if any(
            isinstance(getattr(run.keys, "draw", None), StepDraw) for run in self.runs
        ):  # of a training's first step
            lines += [f"{name} = jax.random.fold_in({name}, 0)" for name in names.values()]
        return lines, names.__getitem__, names.get("params", "")

    def _many_keys(self, root: str, streams: Iterable[str], key: KeyNames) -> tuple[list[str], KeyNames, str]:
        """`keys` for `--samples`: a loop of draws from `root`, with the keys of each stream in a list."""
        writer, size = self.writer, self.options["samples"]
        names = {stream: writer.variable(f"{stream}_keys") for stream in dict.fromkeys(streams)}
        if not names:
            return writer.advance(size, root), key, writer.params
        body = writer.draw(names) if root == writer.root else writer.keys_of(root, names, key, moves=True)
        body += [f"{many}.append({key(stream)})" for stream, many in names.items()]
        empty = ", ".join(["[]"] * len(names))
        lines = [f"{', '.join(names.values())} = {empty}", f"for _ in range({size}):", *indented(body, writer.unit)]
        return lines, names.__getitem__, f"{names.get('params', '')}[0]"

    def draw_of_init(self, *streams: str) -> list[str]:
        """The draw of an init that takes `streams`, with the keys that the apply after it takes from the same draw."""
        writer, groups = self.writer, self.context.groups
        # The root key is not moved on: the apply that goes on with this draw splits it again.
        if groups.stays(self.site):
            return [writer.STAYS, *writer.keys_of(writer.root, streams, writer.key)]
        later, taken = groups.folded_later(self.site)
        return writer.draw(later, taken=taken)

    # -- its function

    def jitted(
        self, decorator: str, parameters: Sequence[str], body: Sequence[str], static: Sequence[str], *, mode: str = ""
    ) -> str:
        """Makes sure that the jitted function of the call is defined, and returns its name; `mode` as in its name."""
        model, method, mode = self.model.name, self.call.method, mode or self.site.mode
        # The function's name: `train`, `evaluate`, `apply`; with a method `encode`, `train_encode`.
        verb = {"train": "train", "eval": "evaluate"}.get(mode, "apply")
        if method:
            verb = method[-1] if mode == "as written" else f"{verb}_{method[-1]}"
        verb += "" if self.options["samples"] is None else "_samples"
        # With several models, each function has the model in its name.
        several = len({run.model for run in self.context.groups.runs if run.kind.forward}) > 1
        names = (f"{verb}_{model}",) if several else (verb, f"{verb}_{model}")
        function = JittedFunction(model, names, decorator, tuple(parameters), tuple(static), tuple(body))
        return self.context.define(function, self.site)

    # -- its value

    @property
    def label(self) -> str:
        """The label of its digest."""
        return label_of(self.call.call, self.site.mode)

    @cached_property
    def target(self) -> str:
        """The single name in `y =`; empty for any other target."""
        name = self.site.target.removesuffix("=").strip()
        return name if self.site.target.endswith("=") and name.isidentifier() else ""

    @cached_property
    def targets(self) -> list[str]:
        """The names in `y, updates =`; empty for any other target."""
        match ast.parse(f"{self.site.target} 0").body if self.site.target else []:
            case [ast.Assign([ast.Tuple(parts)])] if all(isinstance(part, ast.Name) for part in parts):
                return [part.id for part in parts if isinstance(part, ast.Name)]
        return []

    def value_lines(
        self, value: str, *, after: Sequence[str] = (), parts: bool = False, updates: str = ""
    ) -> list[str]:
        """The lines that evaluate `value`, assign or drop the result, and print its digest.

        Args:
          after: lines that come right after the evaluation.
          parts: the output is a tuple, which the names of the target take apart.
          updates: the name for the second part where `value` is (output, updates); `_` if nobody uses it.
        """
        writer, target, label = self.writer, self.site.target, self.label
        if not target and not updates:
            line = f"{writer.digest}({writer.text(label)}, {value})" if writer.digests else value
            # Printed in one go, if the line stays within the width.
            if not writer.digests or len(line) <= WIDTH - 2 * len(writer.unit):
                writer.labels += [label] * writer.digests
                return [line, *after]
        whole = f"({', '.join(self.targets)})"
        if not updates and (not writer.digests or (self.targets and parts)):
            return [f"{target} {value}", *after, *writer.show(label, whole)]
        if updates and self.targets and (not writer.digests or parts):
            return [f"{whole}, {updates} = {value}", *after, *writer.show(label, whole)]
        output = self.target or (writer.variable("output", "result") if target or writer.digests else "_")
        lines = [f"{output}{', ' if updates else ''}{updates} = {value}", *after, *writer.show(label, output)]
        return lines if self.target or not target else [*lines, f"{target} {output}"]

    @property
    def output(self) -> str:
        """The variable that holds the output where the command's value is `(output, updates)`."""
        return self.targets[0] if len(self.targets) == 2 else self.writer.variable("output", "result")

    def pair_lines(self, updates: str) -> list[str]:
        """The lines that assign `(output, updates)` as the cell does, once `self.output` holds the output."""
        if len(self.targets) != 2:
            return self.value_lines(f"({self.output}, {updates})")
        return [f"{self.targets[1]} = {updates}", *self.writer.show(self.label, f"({', '.join(self.targets)})")]
