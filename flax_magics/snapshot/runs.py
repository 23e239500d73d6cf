"""Runs as JSON data, and back: what each was, without its arrays. Inputs and output of one that was read are `RELEASED`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from ..base.compare import Spread
from ..base.digest import Values
from ..base.jsondata import Damaged, JsonObject, finite
from ..base.measures import Cost, Limits, Memory, Steady, Timing
from ..rng.keys import RunKeys, as_key
from ..run import COMMANDS, RELEASED, InitStats, Note, OutputFacts, Run, altered
from ..state.runs import RunLog, StoredRun
from ..state.trees import key_type

_TIMES = ("trace", "lower", "compile", "beside", "run", "wait", "busy", "init")


def data_of(run: Run, *, digest: bool) -> dict[str, Any]:
    """The run as JSON data.

    Args:
      digest: take the digest of an output that is still there, which reads all of it.
    """
    if not digest:
        _ = run.shape  # while there is an output to read it from
        run = altered(run, {"output": RELEASED})
    data: dict[str, Any] = finite(run.to_json())
    return {**data, "impl": _impl(run.keys)}


def _impl(keys: Mapping[str, Any]) -> str | None:
    """The PRNG implementation of a run's keys, None where it has none."""
    if isinstance(keys, RunKeys):
        return keys.draw.impl
    if isinstance(keys, WrittenKeys):
        return keys.impl
    return next((str(jax.random.key_impl(key)) for key in keys.values()), None)


@dataclass(frozen=True)
class WrittenKeys(Mapping[str, jax.Array]):
    """The keys of a run that was read, made when they are looked at.

    Attributes:
      words: stream → its words in hex, of all its keys one after the other.
      size: of how many draws each has the keys; None for one key of shape ().
    """

    words: Mapping[str, str]
    impl: str
    size: int | None = None

    def data(self, name: str) -> bytes:
        """Key data."""
        text = self.words[name]
        return np.array([int(text[i : i + 8], 16) for i in range(0, len(text), 8)], np.uint32).tobytes()

    def __getitem__(self, name: str) -> jax.Array:
        return as_key(self.data(name), self.impl, self.size)

    def __iter__(self) -> Iterator[str]:
        return iter(self.words)

    def __len__(self) -> int:
        return len(self.words)


def kept_of(data: Any, where: str, *, first: bool) -> StoredRun:
    """The run of a history that was written. Raises Damaged: it is something else."""
    own = JsonObject(data, where)
    match own.items("replays"):
        case [int(times), bool(differed)] if times >= 0:
            return StoredRun.read(run_of(data, where, first=first), own.text("inputs"), (int(times), differed))
    raise Damaged(f"`{where}.replays` is not what it should be")


def run_of(data: Any, where: str, *, first: bool) -> Run:
    """The run that `data_of` wrote. Raises Damaged: it is something else."""
    own = JsonObject(data, where)
    if own.whole("version") != 1:
        raise Damaged(f"`{where}` is of a version that is not known here")
    if own.text("command") not in COMMANDS:
        raise Damaged(f"`{where}.command` is not known here")
    draws = own.maybe_whole("draws")
    spread = _spread(own) if draws is not None else None
    taken = OutputFacts(own.maybe_text("digest"), own.text("output"), spread, _values(own))
    return Run(
        command=own.text("command"),
        model=own.maybe_text("model"),
        mode=own.text("mode"),
        call=own.text("call"),
        inputs=RELEASED,
        output=RELEASED,
        seed=own.whole("seed", None, 1 << 200),
        draw=own.whole("draw"),
        draws=draws,
        keys=_keys(own, draws),
        device=own.text("device"),
        started=own.real("started"),
        used=own.mapping("used", JsonObject.texts),
        changed=own.mapping("changed", JsonObject.whole),
        program=own.text("program"),
        reason=own.text("reason"),
        switch=own.text("switch"),
        static=own.texts("static"),
        timing=_timing(own.inner("timing")),
        memory=_memory(own),
        cost=_cost(own),
        limits=_limits(own),
        cell=own.maybe_whole("cell"),
        notes=tuple(_note(note, where) for note in own.items("notes")),
        made=_made(own),
        by_hand=own.text("by_hand"),
        weights=own.text("weights") if "weights" in own.data else "",  # files of the first version have none
        replayed=own.flag("replayed"),
        first=first,
        elsewhere=_elsewhere(own),
        _taken=taken,
    )


def _keys(own: JsonObject, draws: int | None) -> WrittenKeys:
    words, impl = own.mapping("keys", JsonObject.text), own.maybe_text("impl")
    if words and impl is None:
        raise Damaged(f"`{own.where}.impl` is missing")
    digits = 0 if impl is None else 8 * math.prod(key_type(impl)[1]) * (1 if draws is None else draws)
    for name, text in words.items():
        if len(text) != digits or not all(digit in "0123456789abcdef" for digit in text):
            raise Damaged(f"`{own.where}.keys.{name}` is no key")
    return WrittenKeys(words, impl or "", draws)


def _elsewhere(own: JsonObject) -> dict[str, Any]:
    """What its bits depended on, and a few values of its output where they were kept."""
    found: dict[str, Any] = {
        "versions": own.mapping("versions", JsonObject.maybe_text),
        "device_kind": own.maybe_text("device_kind"),
        "processor": own.maybe_text("processor"),
        "threads": own.maybe_whole("threads"),
    }
    if "leaves" in own.data:
        leaves = [JsonObject(leaf, f"{own.where}.leaves", ("path", "array", "values")) for leaf in own.items("leaves")]
        found["leaves"] = [
            {"path": leaf.text("path"), "array": leaf.text("array"), "values": leaf.whole("values")} for leaf in leaves
        ]
        found["bits"] = own.text("bits")
    return found


def _timing(own: JsonObject) -> Timing:
    steady = None
    if "steady" in own.data:
        inner = JsonObject({str(i): time for i, time in enumerate(own.items("steady"))}, f"{own.where}.steady")
        steady = Steady(tuple(inner.real(name) for name in inner.data))
    return Timing(**{name: own.real(name) for name in _TIMES}, steady=steady)


def _memory(own: JsonObject) -> Memory | None:
    if own.get("memory") is None:
        return None
    inner = own.inner("memory", ("arguments", "outputs", "temporaries", "code", "peak"))
    sizes = {name: inner.whole(name) for name in ("arguments", "outputs", "temporaries", "code")}
    return Memory(**sizes, peak=inner.maybe_whole("peak"))


def _cost(own: JsonObject) -> Cost | None:
    if own.get("cost") is None:
        return None
    inner = own.inner("cost", ("flops", "bytes", "loops"))
    return Cost(inner.real("flops"), inner.real("bytes"), inner.flag("loops"))


def _limits(own: JsonObject) -> Limits | None:
    if own.get("limits") is None:
        return None
    inner = own.inner("limits", ("device", "dtype", "flops", "bytes"))
    return Limits(inner.text("device"), inner.text("dtype"), inner.real("flops"), inner.real("bytes"))


def _made(own: JsonObject) -> InitStats | None:
    if own.get("made") is None:
        return None
    inner = own.inner("made", ("parameters", "bytes", "collections", "added"))
    return InitStats(inner.whole("parameters"), inner.whole("bytes"), inner.texts("collections"), inner.flag("added"))


def _note(data: Any, where: str) -> Note:
    inner = JsonObject(data, f"{where}.notes", ("kind", "text", "write", "form", "edit"))
    return Note(inner.text("kind"), inner.text("text"), *map(inner.maybe_text, ("write", "form", "edit")))


def _spread(own: JsonObject) -> tuple[Spread, ...]:
    found = []
    for data in own.items("spread"):
        inner = JsonObject(data, f"{own.where}.spread", ("path", "mean", "deviation"))
        found.append(Spread(inner.text("path"), inner.real("mean"), inner.real("deviation")))
    return tuple(found)


def _values(own: JsonObject) -> tuple[Values, ...]:
    found = []
    for data in own.items("values") if "values" in own.data else ():  # files of the first version have none
        inner = JsonObject(data, f"{own.where}.values", ("path", "size", "nan", "inf", "least", "most", "mean"))
        counts = (inner.whole(name) for name in ("size", "nan", "inf"))
        range_ = (None if inner.get(name) is None else inner.real(name) for name in ("least", "most", "mean"))
        found.append(Values(inner.text("path"), *counts, *range_))
    return tuple(found)


class WrittenRuns:
    """The runs of a session as JSON data, each made once: a session that is saved again and again adds few each time.

    Args:
      digest: see `data_of`.
    """

    def __init__(self, *, digest: bool) -> None:
        self._digest = digest
        self._last: RunLog | None = None
        self._data: list[tuple[dict[str, Any], StoredRun]] = []

    def of(self, chain: RunLog | None) -> list[dict[str, Any]]:
        """The data of every run, oldest first."""
        new = []
        at = chain
        while at is not None and at is not self._last:
            new.append(at.kept)
            at = at.before
        if at is None:
            self._data = []
        for kept in reversed(new):
            run = kept.run()
            more = {"inputs": kept.shapes, "replays": list(kept.replays)}
            self._data.append(({**data_of(run, digest=self._digest), **more}, kept))
        self._last = chain
        return [_now(data, kept) for data, kept in self._data]


def _now(data: dict[str, Any], kept: StoredRun) -> dict[str, Any]:
    """With what became of a run after it was noted down: its digest was taken, it was run again."""
    digest = data["digest"] or kept.facts["_taken"].digest
    if digest == data["digest"] and kept.replays == tuple(data["replays"]):
        return data
    return {**data, "digest": digest, "replays": list(kept.replays)}
