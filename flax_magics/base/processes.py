"""The processes of a job: what they tell each other before they run a program together, and which of them have ended.

They speak by the key-value store of JAX's coordinator, with a deadline. A collective could not tell that one of them does
something else: it would wait for ever. `Store` is that store, `Lives` looks who has ended, and `Processes` exchange and
decide.
"""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
from msgspec import Struct
from msgspec.structs import asdict

from ..errors import FlaxMagicsError
from .private import coordination
from .text import plural

DEADLINE = 10.0
"""Seconds that a process waits for the others, unless it is told otherwise."""
OFTEN = 100
"""Every so many draws, or steps of a training, the processes exchange where they are, though no program is new."""
SLICE = 0.2
"""Seconds between two looks whether a process that has not answered still lives, and so the wait of Ctrl-C."""
REACH = 0.3
"""Seconds in which a living process takes a connection: the system does that for it, however busy it is."""
_KEYS = "flax_magics"


class Waiting(Protocol):
    """How long the others are waited for, in seconds, and who is told that they are."""

    @property
    def deadline(self) -> float: ...  # noqa: D102 they are the fields of `Services`

    @property
    def on_phase(self) -> Callable[[str], object]: ...  # noqa: D102


class Standing(Struct, frozen=True):
    """Where a process stands before it runs a program; equal in all processes, unless they have come apart.

    Attributes:
      what: is run, in words: a model's name, or the line of a command.
      program: its fingerprint, empty where there is none.
      values: a digest of some elements of each array that it takes and that is the same in all processes.
    """

    seed: int
    draw: int
    what: str
    program: str = ""
    values: str = ""

    def __str__(self) -> str:
        program = f", program {self.program[:12]}" if self.program else ""
        return f"seed {self.seed}, draw {self.draw}, {self.what}{program}"


class Store:
    """The key-value store of JAX's coordinator, under keys of our own."""

    def __init__(self, client: Any) -> None:
        self._client = client

    def get(self, key: str, seconds: float = 0.0) -> str | None:
        """The value of a key, waited for so long; None where there is none."""
        try:
            if not seconds:
                return str(self._client.key_value_try_get(f"{_KEYS}/{key}"))
            return str(self._client.blocking_key_value_get(f"{_KEYS}/{key}", int(1000 * seconds)))
        except Exception as error:
            if "NOT_FOUND" in str(error) or "DEADLINE_EXCEEDED" in str(error):
                return None
            raise

    def put(self, key: str, text: str) -> None:
        """Sets the value of a key."""
        self._client.key_value_set(f"{_KEYS}/{key}", text, allow_overwrite=True)

    def put_first(self, key: str, text: str) -> str:
        """Sets the value of a key that has none. Returns its value: that of the first to set it."""
        try:
            self._client.key_value_set(f"{_KEYS}/{key}", text)
        except Exception as error:
            if "ALREADY_EXISTS" not in str(error):
                raise
            return self.get(key) or "{}"
        return text

    def under(self, place: object) -> dict[str, str]:
        """Name → value, of the keys `place/name`."""
        pairs = self._client.key_value_dir_get(f"{_KEYS}/{place}")
        return {key.rpartition("/")[2]: text for key, text in pairs}

    def forget(self, place: object) -> None:
        """Deletes the keys `place/name`."""
        self._client.key_value_delete(f"{_KEYS}/{place}/")


class Lives:
    """Which processes have ended: while one lives, its system takes connections for it, however busy it is."""

    def __init__(self, store: Store, rank: int) -> None:
        self._store, self._rank = store, rank
        # Nobody is accepted, and nothing is said.
        self._listens = socket.create_server((_own_address(), 0), backlog=128)
        self._listens.setblocking(False)
        host, port = self._listens.getsockname()[:2]
        self._addresses = {rank: (str(host), int(port))}
        store.put(f"address/{rank}", json.dumps([host, port]))

    def close(self) -> None:
        """Lets the others take this process for one that has ended."""
        self._listens.close()

    def has_ended(self, rank: int) -> bool:
        """Whether a process is known to have ended: its system takes no connections for it any more."""
        if rank == self._rank:
            return False
        with contextlib.suppress(OSError):
            while True:  # those of other processes that have looked
                self._listens.accept()[0].close()
        if rank not in self._addresses:
            address = self._store.get(f"address/{rank}")
            if address is None:
                return False
            host, port = json.loads(address)
            self._addresses[rank] = str(host), int(port)
        try:
            socket.create_connection(self._addresses[rank], REACH).close()
        except ConnectionRefusedError:
            return True
        except OSError:  # its host cannot be reached, or not so: that proves nothing
            return False
        return False


class Processes:
    """All processes of this job, and the place of this one among them.

    Args:
      client: of the coordinator's key-value store.
    """

    def __init__(self, client: Any, rank: int, count: int) -> None:
        self.rank, self.count, self._store = rank, count, Store(client)
        self.lives = Lives(self._store, rank)
        self._number = 0
        """Of the next exchange; those that were given up before this process came to them are passed over."""
        self._agreed: int | None = None
        """The last exchange that all took part in, whose keys nobody reads any more once there is another."""

    def agree(self, standing: Standing, waiting: Waiting) -> None:
        """Raises unless every process stands where this one does; see `gather`.

        Raises:
          FlaxMagicsError: with where each of them stands.
        """
        texts = self.gather(json.dumps(asdict(standing)), standing.what, waiting)
        if len(set(texts)) == 1:
            return
        said = [json.loads(text) for text in texts]
        others = {name: [one.get(name) for one in said] for name in asdict(standing)}
        if all(len(set(each)) == 1 for name, each in others.items() if name != "values"):
            rows = _rows({rank: f"arrays {values[:12]}" for rank, values in enumerate(others["values"])})
            parts = "parts of your own are made one array by jax.make_array_from_process_local_data"
            raise FlaxMagicsError(
                f"{standing.what} was not begun: its arrays, or its variables, are not the same in all processes of this"
                " job. Each of them is given the whole, and takes its part.",
                hint="\n".join([*rows, f"{parts}(flax_magics.session().mesh().batch, …)"]),
            )
        raise FlaxMagicsError(
            f"{standing.what} was not begun: the processes of this job do not stand at the same place, and a program that"
            " they run together would wait for ever.",
            hint="\n".join(_rows(dict(enumerate(map(_told, texts))))),
        )

    def gather(self, text: str, what: str, waiting: Waiting) -> list[str]:
        """What each process says in this exchange, by its rank. All of them get the same, or all of them fail.

        Process 0 collects, and the first to write how the exchange ended decides that for all: else one could run, and
        wait for another that has given up.

        Args:
          what: is about to be run, for the error.

        Raises:
          FlaxMagicsError: some process did not answer, or has ended, or the coordinator has.
        """
        while True:
            number, self._number = self._number, self._number + 1
            outcome = self._exchanged(number, text, waiting)
            if str(self.rank) in outcome["said"]:
                break  # else the others had given up before this process came
        if outcome["why"]:
            said = {int(rank): _told(one) for rank, one in outcome["said"].items()}
            rows = _rows(
                said | dict.fromkeys(outcome["silent"], "no answer") | dict.fromkeys(outcome["ended"], "ended")
            )
            raise FlaxMagicsError(f"{what} was not begun: {outcome['why']}", hint="\n".join(rows))
        if self.rank == 0 and self._agreed is not None:
            self._store.forget(self._agreed)
        self._agreed = number
        return [outcome["said"][str(rank)] for rank in range(self.count)]

    def _exchanged(self, number: int, text: str, waiting: Waiting) -> dict[str, Any]:
        """How the exchange with that number ended."""
        place, seconds = str(number), waiting.deadline
        until = time.monotonic() + seconds
        try:
            self._store.put(f"{place}/{self.rank}", text)
            try:
                while True:
                    missing = self._missing(place) if self.rank == 0 else []
                    if self.rank == 0 and not missing:
                        return self._decide(place)
                    answer = self._store.get(f"{place}/{missing[0]}" if missing else f"{place}/outcome", SLICE)
                    outcome = None if missing else answer
                    if answer is None:
                        waiting.on_phase("waiting for the other processes")
                        ended = [rank for rank in self._missing(place) if self.lives.has_ended(rank)]
                        if ended or time.monotonic() > until:
                            return self._decide(place, ended, seconds)
                        outcome = self._store.get(f"{place}/outcome")  # process 0 comes late to one that was given up
                    if outcome is not None:
                        decided: dict[str, Any] = json.loads(outcome)
                        return decided
            except KeyboardInterrupt:
                self._decide(place, (), seconds, f"process {self.rank} was interrupted.")
                raise
        except Exception as error:
            if isinstance(error, FlaxMagicsError) or not _is_of_jax(error):
                raise
            message = f"process 0, which coordinates this job, cannot be reached: {str(error).partition(chr(10))[0]}"
            raise FlaxMagicsError(message) from None

    def _missing(self, place: str) -> list[int]:
        said = self._store.under(place)
        return [rank for rank in range(self.count) if str(rank) not in said]

    def _decide(
        self, place: str, ended: Sequence[int] = (), seconds: float | None = None, why: str = ""
    ) -> dict[str, Any]:
        """Writes how the exchange ended, unless another process has: then that is what it was.

        Args:
          seconds: that some process was waited for in vain; None where all have answered.
        """
        said = self._store.under(place)
        said.pop("outcome", None)
        silent = [rank for rank in range(self.count) if str(rank) not in said and rank not in ended]
        if ended:
            why = f"{_named(ended)} ended, and cannot take part."
        elif silent and not why and seconds is not None:
            why = (
                f"{_named(silent, has=False)} did not answer within {seconds:g} s, and a program that all run together would"
                " wait for ever. A cell runs in every process (`%%px`); %config FlaxMagics.deadline is how long it waits."
            )
        outcome = {"said": said, "silent": silent, "ended": list(ended), "why": why}
        decided: dict[str, Any] = json.loads(self._store.put_first(f"{place}/outcome", json.dumps(outcome)))
        return decided

    # -- steps that are done together

    def stop(self, steps: int, why: str, what: str, waiting: Waiting) -> list[int] | None:
        """Tells the others after how many steps this process stops, and gives that of all; None where not all answer.

        Args:
          steps: that it has begun, with the others or before them.
          why: it stops earlier than it would; empty where there are no more steps.
        """
        while True:
            try:
                texts = self.gather(json.dumps({"steps": steps, "why": why}), what, waiting)
            except FlaxMagicsError:
                return None
            said = [json.loads(text) for text in texts]
            if all("steps" in one for one in said):  # else one of them has come to another exchange, and fails there
                return [int(one["steps"]) for one in said]

    def check_stopped(self, what: str) -> None:
        """Raises FlaxMagicsError where another process has stopped, for whose next step this one would wait for ever."""
        for rank, text in self._store.under(self._number).items():
            if rank.isdecimal() and "steps" in json.loads(text):
                raise FlaxMagicsError(f"{what} ends here: process {rank} {_told(text)}.")

    def why_failed(self, what: str) -> FlaxMagicsError | None:
        """The error for a program that failed because processes have ended; None where all of them live.

        What JAX says of that names a port.
        """
        ended = [rank for rank in range(self.count) if self.lives.has_ended(rank)]
        if not ended:
            return None
        hint = "%flax_mesh off goes on in one process"
        return FlaxMagicsError(f"{what} was given up: {_named(ended)} ended.", hint=hint)


def _told(text: str) -> str:
    """What a process said, as a line."""
    said = json.loads(text)
    if "steps" in said:
        why = f": {said['why']}" if said["why"] else ""
        return f"stopped after {plural(said['steps'], 'step')}{why}"
    return str(Standing(**said)) if "draw" in said else ", ".join(map(str, said.values()))


def _rows(lines: Mapping[int, str]) -> list[str]:
    """A line for each thing that processes say, with who says it."""
    by_text: dict[str, list[int]] = {}
    for rank, line in sorted(lines.items()):
        by_text.setdefault(line, []).append(rank)
    return [f"{_counted(ranks)}: {line}" for line, ranks in by_text.items()]


def _counted(ranks: Sequence[int]) -> str:
    return f"process{'es' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


def _named(ranks: Sequence[int], *, has: bool = True) -> str:
    verb = "" if not has else " has" if len(ranks) == 1 else " have"
    return f"{_counted(ranks)}{verb}"


def _is_of_jax(error: Exception) -> bool:
    return type(error).__name__ in ("XlaRuntimeError", "JaxRuntimeError")


def _own_address() -> str:
    """The address by which this host reaches the coordinator, and so others of the job this one."""
    host, _, port = str(coordination()[1] or "127.0.0.1:1").rpartition(":")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect((host.strip("[]"), int(port)))  # of a datagram socket: nothing is sent
        return str(probe.getsockname()[0])
    return "127.0.0.1"


_known: tuple[Any, Processes] | None = None


def processes_of(devices: Sequence[jax.Device]) -> Processes | None:
    """The processes that these devices belong to; None where all are of this one."""
    global _known
    if {device.process_index for device in devices} == {jax.process_index()}:
        return None
    client = coordination()[0]
    if client is None:
        raise FlaxMagicsError(
            "this job has no coordinator: its processes were not started by jax.distributed.initialize."
        )
    if _known is None or _known[0] is not client:
        if _known is not None:
            _known[1].lives.close()
        _known = client, Processes(client, jax.process_index(), jax.process_count())
    return _known[1]
