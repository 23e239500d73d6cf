"""What an export needs to write a training as plain Flax."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from msgspec.structs import replace

from ..execution import record

if TYPE_CHECKING:
    from ..compile.trace import TracedCall
    from ..execution.call import BoundCall
    from ..execution.execute import RunVariables
    from ..run import ExportFacts


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
