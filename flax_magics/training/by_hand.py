"""The lines of plain Flax that take the gradients of a loss, as a person writes them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from msgspec.structs import replace

from ..execution import record
from ..line.expression import with_arguments
from ..models.calls import Names
from ..models.switch import cloned

if TYPE_CHECKING:
    from ..compile.trace import TracedCall
    from ..execution.call import BoundCall
    from ..execution.execute import RunVariables
    from ..run import ExportFacts
    from .loss import Loss


def lines(
    loss: Loss, call: str, fields: Iterable[tuple[str, Any]], streams: Names, mutable: Sequence[str], *, metrics: bool
) -> str:
    """The lines for one run, without those that part frozen parameters from the others.

    Args:
      call: the loss's, with the switches that the command added: `loss(net, batch, train=True)`.
      fields: the net's own switches as they were set.
      streams, mutable: those that the run was given.
      metrics: the loss returns metrics, too.
    """
    inside = call.partition("(")[2].rpartition(")")[0]
    net, _, rest = (part.strip() for part in inside.partition(","))
    if loss.model.holds_variables:
        return _nnx(loss, net, rest, streams, metrics=metrics)
    rngs = "rngs={" + ", ".join(f"'{name}': {name}_key" for name in streams) + "}"
    bound = ", ".join(filter(None, (loss.name, cloned(net, loss.model.module, fields), _mutable(mutable))))
    given = ", ".join(filter(None, ("{**variables, 'params': params}", rest, rngs if streams else "")))
    applied = f"nn.apply({bound})({given})"
    body = f"return {applied}"
    if mutable and metrics:
        body = f"(value, metrics), updates = {applied}\n    return value, (metrics, updates)"
    aux = ", has_aux=True" if mutable or metrics else ""
    return f"def loss_of(params):\n    {body}\njax.value_and_grad(loss_of{aux})(variables['params'])"


def facts_of_training(
    bound: BoundCall, variables: RunVariables, traced: TracedCall[None], written: Iterable[str], *, taken: bool
) -> ExportFacts:
    """What an export needs to write a training; `written`: collections that its steps write besides the parameters."""
    taken = taken and "params" in traced.needs.streams
    facts = record.facts_of_call(bound, variables, traced.request.arguments, traced.needs, taken=taken)
    metrics = traced.traced.out_info[0][1] is not None
    facts = replace(facts, returns=frozenset({"metrics"} if metrics else ()))
    kept: dict[str, object] = dict.fromkeys(written)
    facts = record.in_mode_of(bound, facts, kept=kept, sown=dict.fromkeys(traced.trace.sown), handed={})
    return replace(facts, mutable=tuple(sorted(kept))) if facts.nnx else facts


def _mutable(names: Sequence[str]) -> str:
    return f"mutable={list(names)!r}" if names else ""


def _nnx(loss: Loss, net: str, rest: str, streams: Names, *, metrics: bool) -> str:
    from ..models.nnx_graph import mode_by_hand

    model: Any = loss.model
    parts = [] if model.mode is None else [*mode_by_hand(net, model.layout.nodes, model.mode)]
    keys = ", ".join(f"{stream}={stream}_key" for stream in streams if stream in model.layout.tags)
    parts += [f"nnx.reseed({net}, policy='match_shape', {keys})"] if keys else []
    aux = ", has_aux=True" if metrics else ""
    call = f"nnx.jit(nnx.value_and_grad({loss.name}{aux}))({net}{', ' if rest else ''}{rest})"
    if model.gives_rngs:
        call = with_arguments(call, [f"rngs=nnx.Rngs({', '.join(f'{one}={one}_key' for one in streams)})"])
    return "; ".join([*parts, call])
