"""Works out `%flax_grad`: one draw, one program, and the Run of its Gradients. The session is not changed here."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Any, cast

import jax
from msgspec import Struct
from msgspec.structs import replace

from ..base.digest import owned_copy
from ..base.types import PyTree
from ..code.library import library
from ..compile.cache import Services
from ..compile.initialise import made_of
from ..compile.placement import in_force
from ..errors import nearest, written
from ..execution import notes, record
from ..execution.build import renewed
from ..execution.call import Call
from ..execution.execute import ApplyRequest, Execution, execute
from ..line.expression import with_arguments
from ..line.options import ApplyOptions
from ..models.switch import WHEN_TRAINING, setting_of, written_in_call
from ..rng.keys import Draw
from ..run import Note, Run, like
from ..state.entry import ModelEntry, Origin
from ..state.runs import StoredRun
from ..state.state import State
from . import diagnosis
from .loss import METHOD, Loss, OtherNet, check_arguments
from .mistakes import mistakes_told, without_net
from .nets import is_frozen


class LossCall(Struct, frozen=True):
    """A call of a loss that is ready to run.

    Attributes:
      entry: the net's; an NNX module that `--fresh` marked is built anew in it.
      loss: of that net.
      request: an apply of the loss as a model.
      read: other nets among the arguments, which the loss reads as constants.
      anew: the entry's module was built for this run, and the user's own object does not hold its values yet.
    """

    entry: ModelEntry
    loss: Loss
    request: ApplyRequest
    read: tuple[ModelEntry, ...]
    anew: bool

    @classmethod
    def of(
        cls,
        state: State,
        entry: ModelEntry,
        loss: Loss,
        call: Call,
        services: Services,
        *,
        mode: str,
        said: tuple[Note, ...],
        again: tuple[Draw, bool] | None = None,
    ) -> LossCall:
        """Prepares a call.

        Args:
          call: its arguments are those after the net.
          mode: `train` or `eval`; a switch that is written in the call stands.
          said: notes from finding the entry.
          again: an earlier draw to go on with, and whether its `params` key is used; None for the next draw.

        Raises:
          FlaxMagicsError: a mistake in the call.
        """
        library.look()
        name, opened = entry.name, state.opened
        # As an apply: it goes on with the draw that an init of its model opened, if the variables are still there.
        shares = again[1] if again else opened is not None and opened[0] == name and entry.ready
        draw = again[0] if again else opened[1] if shares and opened else state.root.draw()
        anew = entry.rebuild_next and entry.built is not None
        if anew:
            entry, shares = renewed(entry, draw, taken=shares), True
            loss = replace(loss, model=entry.model)
        others = (note.write or note.form for note in said if note.kind == "weights")
        entry.check_alive(f"{name}(…)", next(others, None))
        check_arguments(loss, name, call.args, call.kwargs, tuple(WHEN_TRAINING))
        of_loss = replace(entry, model=loss.as_model())
        in_call = written_in_call(loss.signature(METHOD), call.args, call.kwargs)
        if in_call and all(value is (not WHEN_TRAINING[switch]) for switch, value in in_call.items()):
            mode = "eval"
        nets = [other for other in state.models.values() if other.name != name]
        passed = (*call.args, *call.kwargs.values())
        read = tuple(net for net in nets if any(net.model.module is one for one in passed))
        call = replace(call, method=METHOD, args=tuple(_with_variables(one, read) for one in call.args))
        call = replace(call, kwargs={key: _with_variables(value, read) for key, value in call.kwargs.items()})
        options, placement = ApplyOptions(mode=mode), in_force(state.placement)
        request = ApplyRequest(of_loss, call, options, draw, services, params_taken=shares, placement=placement)
        return cls(entry, loss, request, read, anew)


def grad_model(
    state: State,
    entry: ModelEntry,
    loss: Loss,
    call: Call,
    services: Services,
    *,
    mode: str,
    said: tuple[Note, ...],
    again: tuple[Draw, bool] | None = None,
) -> record.Outcome:
    """Runs a loss and takes its gradients.

    Args:
      loss: of the entry's model.
      call: its arguments are those after the net.
      mode: `train` or `eval`.
      said: notes from finding the entry.
      again: see `LossCall.of`.

    Raises:
      FlaxMagicsError: a mistake in the call or in the loss. What the loss raises is passed on.
    """
    started, users_entry, name = time.time(), entry, entry.name
    ready = LossCall.of(state, entry, loss, call, services, mode=mode, said=said, again=again)
    entry, loss, draw, anew = ready.entry, ready.loss, ready.request.draw.first, ready.anew
    with mistakes_told(loss, call):
        execution = execute(ready.request)
    made, gradients = execution.variables.made, execution.result.output
    names = loss.collections_of(gradients.updates)
    run = record.run_of_apply(
        execution,
        (),
        notes=(),
        started=started,
        made=made_of(entry.nnx.model.collections()) if anew else made,
        changed={},
        dropped=tuple(sorted(names)),
        first=state.runs is None,
        registered="" if name in state.models else entry.model.describe(),
    )
    rows = diagnosis.layer_gradients(gradients, loss, execution.built.request.variables)
    gradients.layers, gradients.name = rows, name
    run = like(run, command="grad", layers=rows, **_by_hand(execution, loss, run, names))
    remarks = list(_notes(execution, loss, run, entry, [other.name for other in ready.read]))
    run = run.with_notes(
        (*said, *without_net(loss, remarks, len([one for one in rows if one.frozen < one.parameters])))
    )
    recipe = record.recipe_of(execution)
    leaves = jax.tree_util.tree_leaves(execution.built.request.variables)
    stored = StoredRun(run, Origin(recipe, list(map(owned_copy, leaves))), recipe.size)
    after = _learned(execution, entry, loss)
    keys = dict(notes.keys_in(execution.arguments, services.seen, ()))
    outcome = record.Outcome(run, stored, draw, after, committed=partial(services.seen.went_into, draw, keys.values()))
    if execution.variables.moved and not anew:
        values, module = execution.variables.values, after.nnx.model
        return replace(outcome, write=lambda: module.assign(values))
    if not anew:
        return outcome
    users_model, new_model = users_entry.nnx.model, entry.nnx.model
    return replace(outcome, entry=replace(after, model=users_model), write=lambda: users_model.become(new_model))


def _with_variables(argument: PyTree, others: Iterable[ModelEntry]) -> PyTree:
    """An argument that is another registered net of linen's together with its variables; any other as it is."""
    other = next((other for other in others if other.model.module is argument), None)
    return argument if other is None or other.variables is None else OtherNet(argument, other.variables)


def _learned(execution: Execution, entry: ModelEntry, loss: Loss) -> ModelEntry:
    """The entry with variables that the run initialised, and with what it learned of the call; else as before."""
    of_loss, mode = execution.variables.entry, execution.request.bound.mode
    # After an edit of the net its init is traced again with this call, which is the loss's.
    if execution.variables.made is not None and of_loss.init is not None:
        of_loss = replace(of_loss, init=replace(of_loss.init, method=loss.function))
    return replace(
        of_loss,
        model=entry.model,
        known_needs={**entry.known_needs, (METHOD, mode): execution.result.needs},
        static_ints=entry.static_ints | {(METHOD, name) for name in execution.arguments.forced},
    )


def _by_hand(execution: Execution, loss: Loss, run: Run, names: set[str]) -> dict[str, Any]:
    """The fields of the Run that tell how a person writes it."""
    bound, result = execution.request.bound, execution.result
    facts = run.spelling
    assert facts is not None
    metrics = result.output.metrics is not None
    mutable = sorted({*names, *result.sown})
    facts = replace(facts, mutable=tuple(mutable), kept=(), returns=facts.returns | ({"metrics"} if metrics else set()))
    in_call = {*dict(facts.arguments), *written_in_call(bound.signature, bound.call.args, bound.call.kwargs)}
    fields = [setting for setting in map(setting_of, bound.switch) if setting[0] not in in_call]
    text = with_arguments(bound.call.text, [f"{name}={value}" for name, value in facts.arguments])
    code = ""
    if not facts.axes and not loss.freeze:
        in_mode = cast("Loss", bound.model)
        code = in_mode.lines(text, fields, facts.streams, mutable, metrics=metrics)
    return {"by_hand": code, "spelling": facts}


def _notes(execution: Execution, loss: Loss, run: Run, entry: ModelEntry, read: Iterable[str]) -> Iterator[Note]:
    """The sharp bits of one run."""
    request, result, line = execution.request, execution.result, execution.request.line
    bound, services, name = request.bound, request.services, request.entry.name
    yield from notes.of_mode(name, bound, bound.mode, execution.result.trace, loss=loss.name)
    known = {stream for needs in request.entry.known_needs.values() for stream in needs.streams}
    yield from notes.of_streams(result.trace, known)
    in_call = dict(notes.keys_in(execution.arguments, services.seen, ()))
    yield from notes.of_keys(in_call, services.seen, line)
    yield from notes.of_unused(bound.switch, in_call, result.trace.unused, line)
    if execution.variables.made is not None:
        yield from notes.of_params(execution.variables.values)
    elif entry.outdated:
        yield notes.outdated_own(name) if entry.built_by_user else notes.OUTDATED
    yield from notes.of_scalars(execution.built.scalars, line)
    for other in read:
        yield Note("constant", f"`{other}` is read as a constant: it gets no gradient, and keeps what it had")
    yield from of_freeze(loss, entry, execution.built.request.variables, bound.call)
    yield from diagnosis.notes_of(execution, run)


def of_freeze(loss: Loss, entry: ModelEntry, variables: Mapping[str, Any], call: Call) -> Iterator[Note]:
    """Patterns that match no parameter, with the nearest name of one."""
    paths = list(diagnosis.parameter_paths(loss, variables))
    for pattern in loss.freeze:
        if pattern in loss.types(variables) or any(is_frozen("/".join(path), (pattern,)) for path in paths):
            continue
        modules = dict.fromkeys("/".join(path[:n]) for path in paths for n in range(1, len(path) + 1))
        near = nearest(pattern, modules, 1)
        text = f"--freeze {pattern} matches no parameter of {entry.name}: nothing is frozen by it"
        line = f"{call.command} {call.text}"
        corrected = line.replace(f"--freeze {pattern}", f"--freeze {near[0]}" if near else "--freeze …", 1)
        yield Note("freeze", text, **written(corrected))
