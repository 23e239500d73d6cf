"""Works out `%flax_grad`: one draw, one program, and the Run of its Gradients. The session is not changed here."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, cast

import jax
from msgspec.structs import replace

from ..base.digest import own
from ..base.types import PyTree
from ..code.library import library
from ..compile.cache import Services
from ..compile.initialise import made_of
from ..errors import nearest, written
from ..execution import notes, record
from ..execution.build import renewed
from ..execution.call import Call
from ..execution.execute import ApplyRequest, Execution, execute
from ..line.expression import with_arguments
from ..line.options import ApplyOptions
from ..models.switch import WHEN_TRAINING, call_switches, setting_of, written_in_call
from ..run import Note, Run, like
from ..state.entry import ModelEntry, Origin
from ..state.runs import StoredRun
from ..state.state import State
from . import by_hand, diagnosis, layers
from .loss import METHOD, Gradients, Loss, OtherNet, check_arguments, is_frozen, transformed


def grad_model(
    state: State, entry: ModelEntry, loss: Loss, call: Call, services: Services, *, mode: str, said: tuple[Note, ...]
) -> record.Outcome:
    """Runs a loss and takes its gradients.

    Args:
      loss: of the entry's model.
      call: its arguments are those after the net.
      mode: `train` or `eval`.
      said: notes from finding the entry.

    Raises:
      FlaxMagicsError: a mistake in the call or in the loss. What the loss raises is passed on.
    """
    library.look()
    name, opened = entry.name, state.opened
    # As an apply: it goes on with the draw that an init of its model opened, if the variables are still there.
    shares = opened is not None and opened[0] == name and entry.ready
    draw = opened[1] if shares and opened else state.root.draw()
    started, users_entry = time.time(), entry
    anew = entry.rebuild_next and entry.built is not None
    if anew:
        entry, shares = renewed(entry, draw, taken=shares), True
        loss = replace(loss, model=entry.model)
    entry.check_alive(f"{name}(…)", next((note.write or note.form for note in said if note.kind == "weights"), None))
    check_arguments(loss, name, call.args, call.kwargs, tuple(WHEN_TRAINING))
    of_loss = replace(entry, model=loss.as_model())
    # A switch that is written in the call stands.
    in_call = written_in_call(loss.signature(METHOD), call.args, call.kwargs)
    if in_call and all(value is (not WHEN_TRAINING[switch]) for switch, value in in_call.items()):
        mode = "eval"
    others = [other for other in state.models.values() if other.name != name]
    read = [other for other in others if any(other.model.module is one for one in (*call.args, *call.kwargs.values()))]
    call = replace(call, method=METHOD, args=tuple(_with_variables(one, read) for one in call.args))
    call = replace(call, kwargs={key: _with_variables(value, read) for key, value in call.kwargs.items()})
    request = ApplyRequest(of_loss, call, ApplyOptions(mode=mode), draw, services, params_taken=shares)
    try:
        execution = execute(request)
    except jax.errors.UnexpectedTracerError as error:
        # A value of a transform inside the trace: linen has written it into its scope there. Of one that the user's own
        # code has kept from an earlier trace JAX tells all there is to say.
        if f"{os.sep}flax{os.sep}" in str(error) or "DynamicJaxprTracer" not in str(error):
            raise transformed(loss.name, error) from None
        raise
    made, gradients = execution.variables.made, execution.result.output
    names = _written(gradients, nnx=entry.model.holds_variables)
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
    rows = layers.of(gradients, entry.model, execution.built.request.variables)
    gradients.layers, gradients.name = rows, name
    run = like(run, command="grad", layers=rows, **_by_hand(execution, loss, run, names))
    run = run.with_notes((*said, *_notes(execution, loss, run, entry, [other.name for other in read])))
    recipe = record.recipe_of(execution)
    leaves = jax.tree_util.tree_leaves(execution.built.request.variables)
    stored = StoredRun(run, Origin(recipe, list(map(own, leaves))), recipe.size)
    after = _learned(execution, entry, loss)
    if not anew:
        return record.Outcome(run, stored, draw, after)
    users_model, new_model = users_entry.nnx.model, entry.nnx.model
    return record.Outcome(
        run, stored, draw, replace(after, model=users_model), write=lambda: users_model.become(new_model)
    )


def _with_variables(argument: PyTree, others: Iterable[ModelEntry]) -> PyTree:
    """An argument that is another registered net of linen's together with its variables; any other as it is."""
    other = next((other for other in others if other.model.module is argument), None)
    return argument if other is None or other.variables is None else OtherNet(argument, other.variables)


def _written(gradients: Gradients, *, nnx: bool) -> set[str]:
    """The collections (NNX: variable types) that the loss wrote."""
    if not nnx:
        return set(gradients.updates)
    from ..models.nnx_graph import flat_state

    return {type(leaf).__name__ for _, leaf in flat_state(gradients.updates)}


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
        code = by_hand.lines(in_mode, text, fields, facts.streams, mutable, metrics=metrics)
    return {"by_hand": code, "spelling": facts}


def _notes(execution: Execution, loss: Loss, run: Run, entry: ModelEntry, read: Iterable[str]) -> Iterator[Note]:
    """The sharp bits of one run."""
    request, result, line = execution.request, execution.result, execution.request.line
    bound, services, name = request.bound, request.services, request.entry.name
    yield from _of_switch(execution, loss)
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
    yield from _of_freeze(loss, entry, execution.built.request.variables, bound.call)
    yield from diagnosis.notes_of(execution, run)


def _of_switch(execution: Execution, loss: Loss) -> Iterator[Note]:
    """Layers that behave the other way; where a switch of the net's call is not passed on by the loss, that one."""
    bound = execution.request.bound
    wrong = notes.of_mode(execution.request.entry.name, bound, bound.mode, execution.result.trace)
    passes = set(call_switches(bound.signature))
    for note in wrong:
        if note.kind == "mode":  # that the net has no switch is no news: nobody asked for a mode
            continue
        if loss.switches and not passes:
            switch = loss.switches[0]
            what = note.text.partition(" although ")[0]
            text = f"{what}: `{loss.name}` leaves `{switch}` of the net's call at its default"
            edit = f"def {loss.name.rpartition('.')[2]}(net, batch, {switch}):\n  … net(…, {switch}={switch})"
            yield Note("switch", text, edit=edit)
            return
        yield note


def _of_freeze(loss: Loss, entry: ModelEntry, variables: Mapping[str, Any], call: Call) -> Iterator[Note]:
    """Patterns that match no parameter, with the nearest name of one."""
    paths = list(layers.parameter_paths(entry.model, variables))
    for pattern in loss.freeze:
        kinds = set(variables) if entry.model.holds_variables else set()
        if pattern in kinds or any(is_frozen("/".join(path), (pattern,)) for path in paths):
            continue
        modules = dict.fromkeys("/".join(path[:n]) for path in paths for n in range(1, len(path) + 1))
        near = nearest(pattern, modules, 1)
        text = f"--freeze {pattern} matches no parameter of {entry.name}: nothing is frozen by it"
        line = f"{call.command} {call.text}"
        corrected = line.replace(f"--freeze {pattern}", f"--freeze {near[0]}" if near else "--freeze …", 1)
        yield Note("freeze", text, **written(corrected))
