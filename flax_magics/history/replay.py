"""Runs a draw again, with its keys, variables and inputs, and says whether the result is the same. Changes nothing.

The program that ran is used again while the session keeps it. Otherwise it is compiled again from the model as it was;
what its code reads from outside (globals, files) may have changed since, which the replay then says.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple, Protocol

import jax
import numpy as np
from msgspec import Struct
from msgspec.structs import replace

from ..base.measures import Curve, Timing
from ..base.output import Agreement, Difference, with_digest, with_output
from ..base.text import bytes_, clean, cut, plural, ulp
from ..base.types import Leaf, PyTree
from ..code.fingerprint import fingerprint
from ..compile.cache import Services
from ..compile.disk_cache import settings
from ..compile.placement import Placement, agree
from ..errors import FlaxMagicsError
from ..execution.call import Call, initialising, prepare_init
from ..execution.execute import ApplyRequest, execute, plain_errors
from ..execution.plan import Plan
from ..models.construction import adopt_built
from ..report.facts import draw_of, mode_of, name_of, verdict
from ..report.text import Notice
from ..rng.keys import Draw, DrawBatch, RunKeys
from ..run import COMMANDS, RELEASED, Note, Run, like
from ..state.entry import ApplyRecipe, BuildRecipe, InitRecipe, ModelEntry, TrainRecipe, objects_in
from ..state.runs import StoredRun


class Repeat(NamedTuple):
    """The result of running once more: output, sown values, the program's origin, times, remarks, a training's curve."""

    output: PyTree
    sown: Mapping[str, PyTree]
    program: str
    timing: Timing
    said: tuple[str, ...] = ()
    trained: Curve | None = None


class Retrained(Protocol):
    """A training that was done again up to some step."""

    run: Run

    def gradients(self) -> Run:
        """The Run of the gradients in the step that comes next."""


class Replaying(Struct, frozen=True):
    """Replays the runs of a session.

    Attributes:
      models: the registered ones as they are now.
      limit: the most bytes kept for replays, named in the error where something was dropped.
      retrain: does so many steps of a training again.
    """

    models: Mapping[str, ModelEntry]
    services: Services
    limit: int
    retrain: Callable[[StoredRun, int], Retrained]

    def replay_all(self, draw: Iterable[StoredRun]) -> list[Run]:
        """Replays the runs of a draw, as new Runs. Each stored run counts its replays, and notes if any differed."""
        runs = []
        for stored in draw:
            run = self.replay(stored)
            differs = run.agreement is not None and run.agreement.identical is False
            stored.replays = (stored.replays[0] + 1, stored.replays[1] or differs)
            runs.append(run)
        return runs

    def replay(self, stored: StoredRun) -> Run:
        """Runs it again. Returns a new Run, marked as replayed, with its `agreement`.

        Raises:
          FlaxMagicsError: what it needs is gone. What the model raises is passed on.
        """
        started = time.time()
        repeat = self._again(stored)
        output, digest = stored.output(), stored.facts._taken.read().digest
        if output is not RELEASED:
            agreement = with_output(output, repeat.output)
        elif digest is not None:
            # The output is gone, but its digest was taken while it was there.
            agreement = with_digest(digest, repeat.output)
        elif repeat.trained is not None and stored.facts.trained is not None:
            # Later steps have other variables; the losses are kept for good.
            before, now = ((curve.losses, dict(curve.metrics)) for curve in (stored.facts.trained, repeat.trained))
            agreement = replace(with_output(before, now), against="losses")
        else:
            agreement = Agreement(None)
        agreement = self._in_all(agreement, stored)
        news = {"output": repeat.output, "sown": repeat.sown, "program": repeat.program, "timing": repeat.timing}
        unset = {"reason": "", "causes": (), "cost": None, "limits": None, "cell": None, "notes": (), "made": None}
        return like(
            stored.run(),
            **{**unset, **news, "changed": {}, "replayed": True, "first": False, "registered": "", "started": started},
            trained=repeat.trained,
            inputs=RELEASED if stored.inputs is None else jax.tree_util.tree_unflatten(*stored.inputs),
            agreement=replace(agreement, said=repeat.said),
        )

    def _again(self, stored: StoredRun) -> Repeat:
        facts, origin = stored.facts, stored.origin
        # A key was only drawn: nothing has to be run.
        if not COMMANDS[facts.command].model:
            return Repeat(facts.keys[facts.call], {}, "", Timing())
        self._check(stored)
        assert origin is not None
        assert stored.inputs is not None
        how = origin.how
        if isinstance(how, BuildRecipe):
            return self._build(how, facts.keys)
        if isinstance(how, TrainRecipe):
            run = self.retrain(stored, facts.steps).run
            said = (*self._edited(how), *_of_data(facts))
            return Repeat(run.output, {}, run.program, run.timing, said, run.trained)
        args, kwargs = jax.tree_util.tree_unflatten(*stored.inputs)
        call = Call(how.method, args, kwargs, facts.call)
        # Only runs of a file and constructions have other keys, and both are dealt with above.
        assert isinstance(facts.keys, RunKeys)
        draw = facts.keys.draw
        if isinstance(how, InitRecipe):
            return self._init(how, call, draw.first)
        variables = jax.tree_util.tree_unflatten(how.structure, origin.leaves)
        program = None if how.program is None else how.program()
        changed = [text for text, old, new in zip(SETTINGS, how.settings, settings(), strict=True) if old != new]
        said = (*self._edited(how), *_of_inputs(how, *stored.inputs), *changed)
        if program is None or changed:  # under other settings the program may not even accept the arguments
            repeat = self._made_anew(how, variables, call, draw)
        else:  # the program that ran is still kept
            plan = Plan.of_recipe(how, program, call.text)
            arguments = {name: leaf for name, leaf in zip(how.names, stored.inputs[1], strict=True) if name is not None}
            if how.placement is not None:
                arguments = how.placement.put(arguments, how.shardings)
            what = f"the replay of {call.text}"
            agree(self.services, how.placement, draw, what, digest=program.digest, tree=variables)
            result = plan.run(draw, variables, arguments, self.services)
            repeat = Repeat(result.output, result.sown, "reused", Timing(run=result.timing.run))
        return repeat._replace(said=(*said, *repeat.said))

    def _in_all(self, agreement: Agreement, stored: StoredRun) -> Agreement:
        """What all processes of the run's mesh found, each of which has compared what it holds."""
        placement: Placement | None = getattr(None if stored.origin is None else stored.origin.how, "placement", None)
        if placement is None or placement.processes is None:
            return agreement
        processes, services, what = placement.processes, self.services, f"the comparison with draw {stored.facts.draw}"
        text = json.dumps({"identical": agreement.identical})
        found = processes.gather(text, what, services)
        differs = [json.loads(one).get("identical") is False for one in found]
        others = [str(rank) for rank, one in enumerate(differs) if one and rank != processes.rank]
        if not others:
            return agreement
        differ = Difference("", text=f"other bits in process {', '.join(others)}")
        return replace(agreement, identical=False, differences=(*agreement.differences, differ))

    def _check(self, stored: StoredRun) -> None:
        """Raises FlaxMagicsError where something is gone that a run needs to be run again."""
        facts, origin = stored.facts, stored.origin
        what = f"draw {facts.draw} of seed {facts.seed}"
        if facts.elsewhere is not None:
            again = "" if facts.kind.loss else " With inputs of its own a run takes the same keys."
            raise FlaxMagicsError(
                f"{what} cannot be run again: it ran in the session that was saved, and its inputs are not in the file."
                f"{again}",
                form=None if facts.kind.loss else _same_keys(facts),
            )
        if facts.kind.trains and origin is None and not stored.size:
            raise FlaxMagicsError(f"{what} cannot be run again: {self._why_not_kept(facts)}.")
        if origin is None or stored.inputs is None:
            raise FlaxMagicsError(
                f"{what} cannot be run again: its inputs and variables were let go of: by %flax_free --replays, or the"
                f" oldest to stay within {bytes_(self.limit)}. With a higher limit later ones are kept.",
                write=f"%config FlaxMagics.replay_bytes = {max(4 * self.limit, 1_000_000_000)}",
            )
        if any(isinstance(leaf, jax.Array) and leaf.is_deleted() for leaf in (*stored.inputs[1], *origin.leaves)):
            raise FlaxMagicsError(
                f"{what} cannot be run again: an array that it used was deleted or donated since, and its values are gone."
            )

    def _why_not_kept(self, facts: Run) -> str:
        """Why nothing was kept of how a training began."""
        changes = [note.text for note in facts.notes if note.kind == "resume"]
        if changes:
            return "; ".join(changes)
        task = None if facts.trained is None else facts.trained.task
        if task is not None and task.once:
            return "its data are an iterator, which is gone through only once"
        if task is not None and task.parts:
            return "it was resumed, and how it had begun was not there any more: in a file, or let go of"
        return f"what it began with was not kept: it came out of a file, or is more than {bytes_(self.limit)}"

    def _made_anew(self, how: ApplyRecipe, variables: PyTree, call: Call, draw: Draw | DrawBatch) -> Repeat:
        """Runs it with a program that is compiled again, from the model as it was."""
        entry = how.entry.with_arrays(variables)
        options = how.options._replace(keys_of=(draw.first.seed, draw.first.number), repeat=1, roofline=False)
        # `--key` adds these to the call again.
        call = replace(call, kwargs={name: value for name, value in call.kwargs.items() if name not in options.key})
        parts = self.services.programs.parts
        last = parts.get(how.name)
        try:
            taken, placement = how.taken, how.placement
            request = ApplyRequest(entry, call, options, draw, self.services, params_taken=taken, placement=placement)
            execution = execute(request)
        finally:  # the reason for the model's next new program is found by comparing with its own last run
            parts.pop(how.name, None)
            if last is not None:
                parts[how.name] = last
        said: tuple[str, ...] = ()
        if how.key is None and not how.options.eager:
            said = ("the program was made anew: whether all that the model reads is as it was cannot be told",)
        elif not how.options.eager and execution.plan.model.cache_key() != how.key:
            said = ("the program was made anew: something that the model's code reads is another now",)
        result = execution.result
        return Repeat(result.output, result.sown, execution.built.origin, execution.timing, said)

    def _init(self, how: InitRecipe, call: Call, draw: Draw) -> Repeat:
        name, clock, units = how.entry.name, self.services.clock, self.services.programs.units
        self.services.on_phase(f"initialising {name}")
        model, init_call = prepare_init(name, how.entry.model, call)
        begin = clock()
        with plain_errors(call):
            variables, _ = initialising(model, init_call, draw, units).finish()
        return Repeat(variables, {}, "eager", Timing(init=clock() - begin), self._edited(how))

    def _build(self, how: BuildRecipe, keys: Mapping[str, jax.Array]) -> Repeat:
        self.services.on_phase(f"building {how.name}")
        said: tuple[str, ...] = ()
        if how.fingerprint is None or how.recipe.fingerprint() != how.fingerprint:
            said = ("what the module is built of may have changed since",)
        begin = self.services.clock()
        state = adopt_built(how.recipe.build(keys), how.recipe.text).state()
        jax.block_until_ready(state)
        return Repeat(state, {}, "eager", Timing(init=self.services.clock() - begin), said)

    def replay_step(self, stored: StoredRun, step: int) -> Run:
        """Repeats a training up to a step, and takes the gradients in that one. Returns their Run, with its `agreement`.

        Args:
          step: its number, from 0 on.

        Raises:
          FlaxMagicsError: there is no such step, or what it needs is gone. What the loss raises is passed on.
        """
        facts = stored.facts
        _check_step(facts, step)
        self._check(stored)
        run = self.retrain(stored, step).gradients()
        assert facts.trained is not None
        was, now = facts.trained.losses[step], np.asarray(run.output.loss).astype(np.float32)[()]
        agreement = replace(with_output(was, now), against="losses", said=_of_data(facts))
        return like(run, replayed=True, first=False, cell=None, agreement=agreement)

    def _edited(self, how: ApplyRecipe | InitRecipe | TrainRecipe) -> tuple[str, ...]:
        """A remark if the registered model is not the one that ran: edited since, or no longer there."""
        entry, current = how.entry, self.models.get(how.entry.name)
        if current is not None and current.still(entry):
            return ()
        return (f"{entry.name} was edited since: this is its code as it was then",)


def _check_step(run: Run, step: int) -> None:
    """Raises FlaxMagicsError where a run has no such step."""
    line = f"%flax_replay {run.seed}:{run.draw}"
    if run.trained is None:
        raise FlaxMagicsError(f"--step is a step of a training, and draw {run.draw} is none.", write=line)
    if not 0 <= step < run.steps:
        last = run.steps - 1
        message = f"the training of draw {run.draw} has the steps 0 to {last}, and no step {step}."
        raise FlaxMagicsError(message, write=line.replace("replay", f"replay --step {last}"))


def _same_keys(facts: Run) -> str:
    """The line that runs a call with the keys of an earlier draw, with a gap for its arguments."""
    command = f"%flax_{facts.command}"
    mode = {"train": " --train", "eval": " --eval"}.get(facts.mode, "")
    return f"{command} --keys-of {facts.seed}:{facts.draw}{mode} {facts.call.partition('(')[0]}(…)"


SETTINGS = (
    "JAX is set otherwise than it was: its precision, its devices or the like",
    "Flax is set otherwise than it was: its flags, its interceptors or the like",
)
"""Remarks for JAX settings and for Flax settings that changed since, in the order of `program_keys.settings`."""


def _of_data(facts: Run) -> tuple[str, ...]:
    """A remark on data that may be others each time that a training goes through them."""
    if facts.trained is None or facts.trained.task.arrays:
        return ()
    return ("its data are an iterable: whether it gives the same batches again cannot be told",)


def _of_inputs(how: ApplyRecipe, treedef: object, leaves: list[Leaf]) -> tuple[str, ...]:
    """Remarks on inputs that may have changed since the run."""
    if how.moving:
        return ("an object in the call holds variables of its own: whether they are as they were cannot be told",)
    if how.objects == b"":
        return ()
    if how.objects is None or fingerprint(objects_in(treedef, leaves, how.structure)) != how.objects:
        return ("an object in the call may have changed since",)
    return ()


NAMED = 6
"""How many leaves are named; the rest is counted."""


def notice_of(run: Run) -> Notice:
    """A replay's line, `net · train · draw 3 of seed 0 · replayed · identical: float32[3,4,3]`, and what differs."""
    agreement = run.agreement
    assert agreement is not None
    # These texts hold names and messages of the user's code.
    notes = [Note("replay", clean(text)) for text in agreement.said]
    if agreement.identical is False:
        shown = [difference_text(difference) for difference in agreement.differences[:NAMED]]
        more = len(agreement.differences) - len(shown)
        if more:
            shown.append(f"and {plural(more, 'more leaf').replace('leafs', 'leaves')}")
        if not shown:
            shown = ["its output is gone, and a digest cannot tell where or by how much they differ"]
        notes = [*(Note("replay", text) for text in shown), *notes]
    elif agreement.identical is None:
        notes.insert(0, Note("replay", NOTHING, form="%flax_apply -o run …"))
    draw = draw_of(run, seed=True).removesuffix(" again")
    return Notice(name_of(run), (mode_of(run), draw, "replayed", verdict(run)), tuple(notes))


NOTHING = "its output was let go of before a digest was taken: there is nothing to compare with"


def difference_text(difference: Difference) -> str:
    """How one leaf differs: `['a']: 3 of 36 elements, up to 1.19e-07 (1 ulp)`."""
    where = f"{clean(difference.path)}: " if difference.path else ""
    if difference.text:
        return where + cut(clean(difference.text), 120)
    text = f"{where}{difference.elements:,} of {plural(difference.size, 'element')}"
    if difference.largest is not None:
        text += f", up to {difference.largest:.3g}"
    return text + (f" ({ulp(difference.ulp)})" if difference.ulp is not None else "")
