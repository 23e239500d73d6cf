"""What a check finds, what keeps arrays alive on each device, and both as text and HTML."""

from __future__ import annotations

import contextlib
import gc
import math
import sys
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from typing import Any, Literal

import jax
from msgspec import Struct

from ..base.measures import name_devices, name_numbers
from ..base.text import bytes_, clean, count, dotted, plural, table
from ..code.library import library_file, library_module
from ..code.walk import ATOMS
from ..report.facts import Row
from ..report.html import note_lines, render, shown_bundle
from ..report.text import Notice, columns, notes, notice_text
from ..run import Note

MOST = 2_000_000
"""The most objects that are visited from one name, or from all modules; arrays beyond them are not found."""

LAST_ERROR = "the last error, with its frames"
REPLAYS = "%flax_replay"
"""Who holds what only replays need."""

PROGRAMS = "compiled programs"
SPARE = (REPLAYS, PROGRAMS)

LiveArrays = Mapping[int, jax.Array]
"""id → array, of all that are alive; it holds them, so that no id is given to another object meanwhile."""
Roots = Iterable[tuple[str, object]]
"""(who holds it, the value), in the order in which they are to be named."""


class Holding(Struct, frozen=True):
    """Arrays that are held by the same holders.

    Attributes:
      holders: names of variables, and words for what is the session's own; empty where no name reaches the arrays.
      arrays, bytes: how many, and what they take on all devices of this process.
    """

    holders: tuple[str, ...]
    arrays: int
    bytes: int


def live_arrays() -> LiveArrays:
    """The arrays that are alive on the default platform and on the host's."""
    arrays: dict[int, jax.Array] = {}
    for platform in dict.fromkeys((jax.default_backend(), "cpu")):
        with contextlib.suppress(RuntimeError):  # `jax_platforms` leaves the CPU out
            arrays |= {id(array): array for array in jax.live_arrays(platform) if not array.is_deleted()}
    return arrays


def buffer_of(array: jax.Array) -> int:
    """The memory of an array of one device, as a number."""
    with contextlib.suppress(Exception):  # a platform that has no pointers
        return array.unsafe_buffer_pointer() or id(array)
    return id(array)


def counted_as(live: LiveArrays) -> dict[int, int]:
    """The id of each array → that of the array as which it counts: the first of those that share its memory.

    JAX has a second array for what NumPy was shown of the first on a CPU, and one for each part of an array of several
    devices, once somebody has asked for the parts.
    """
    first: dict[int, int] = {}
    counted: dict[int, int] = {}
    for number, array in sorted(live.items(), key=lambda item: -len(item[1].sharding.device_set)):
        parts = [array]
        if len(array.sharding.device_set) > 1:
            parts = [shard.data for shard in array.addressable_shards]
        buffers = [buffer_of(part) for part in parts]
        counted[number] = next((first[buffer] for buffer in buffers if buffer in first), number)
        first |= {buffer: counted[number] for buffer in buffers if buffer not in first}
    return counted


def bytes_by_device(live: LiveArrays) -> dict[str, int]:
    """Device → bytes that arrays take on it, of the devices of this process."""
    sizes: dict[Any, int] = {}
    for number in set(counted_as(live).values()):
        for device, size in _places(live[number]):
            sizes[device] = sizes.get(device, 0) + size
    return {name_devices([device]): sizes[device] for device in sorted(sizes, key=lambda device: device.id)}


def _places(array: jax.Array) -> Iterator[tuple[Any, int]]:
    size = math.prod(array.sharding.shard_shape(array.shape)) * array.dtype.itemsize
    for device in array.sharding.addressable_devices:
        yield device, size


def holdings(live: LiveArrays, roots: Roots, stops: Set[int] = frozenset(), others: Roots = ()) -> tuple[Holding, ...]:
    """Who holds the live arrays, the largest holding first.

    Args:
      roots: where to begin.
      stops: ids of objects that are not looked into.
      others: where to go on for arrays that are reached from none of these.
    """
    counted = counted_as(live)
    holders: dict[int, list[str]] = {number: [] for number in counted.values()}
    for name, value in roots:
        for number in {counted[number] for number in reached(value, live, stops)}:
            # What is held anyway, replays and programs hold at no cost.
            if not (name in SPARE and holders[number]):
                holders[number].append(name)
    seen = set(stops)  # of all of them together: what one has led to is not gone through again from the next
    for name, value in others:
        if all(holders.values()):
            break
        for number in {counted[number] for number in _walk(value, live, seen)}:
            holders[number] = holders[number] or [name]
    groups: dict[tuple[str, ...], list[int]] = {}
    for number, names in holders.items():
        sizes = groups.setdefault(tuple(dict.fromkeys(names)), [])
        sizes.append(sum(size for _, size in _places(live[number])))
    rows = [Holding(names, len(sizes), sum(sizes)) for names, sizes in groups.items()]
    return tuple(sorted(rows, key=lambda row: -row.bytes))


def reached(value: object, live: LiveArrays, stops: Set[int] = frozenset()) -> list[int]:
    """The ids of the live arrays that an object keeps alive, through whatever it holds.

    Modules and installed classes are not looked into, nor the globals that a function reads.
    """
    return _walk(value, live, set(stops))


def _walk(value: object, live: LiveArrays, seen: set[int]) -> list[int]:
    """`reached`, through what is not in `seen`, to which it adds all that it visits."""
    found, waiting = list[int](), [value]
    while waiting and len(seen) < MOST:
        thing = waiting.pop()
        if type(thing) in ATOMS or id(thing) in seen:
            continue
        seen.add(id(thing))
        if id(thing) in live:
            found.append(id(thing))
        waiting += _held_by(thing)
    return found


def _held_by(thing: Any) -> Iterable[object]:
    if isinstance(thing, types.ModuleType):
        return ()
    if isinstance(thing, type):
        return () if library_module(thing.__module__) else list(vars(thing).values())
    if isinstance(thing, types.FunctionType):
        # What a library closes over leads into its caches; its wrappers hold what the user gave them.
        if library_file(thing.__code__.co_filename) and not hasattr(thing, "__wrapped__"):
            return ()
        return (thing.__closure__, thing.__defaults__, thing.__kwdefaults__, vars(thing))
    if isinstance(thing, types.FrameType):
        return () if thing.f_locals is thing.f_globals else list(thing.f_locals.values())
    if isinstance(thing, dict) and "__builtins__" in thing:  # the namespace of a module
        return ()
    return gc.get_referents(thing)


def users_names(names: Mapping[str, object]) -> Roots:
    """The user's variables, without those of Python's own."""
    return [(name, value) for name, value in list(names.items()) if not name.startswith("__")]


def users_modules(names: Mapping[str, object]) -> Iterator[tuple[str, object]]:
    """What the user's own modules hold, `helpers.weights`; `names` are those of the main one."""
    for name, module in list(sys.modules.items()):
        is_users = (
            isinstance(module, types.ModuleType) and getattr(module, "__file__", None) and vars(module) is not names
        )
        if is_users and name.partition(".")[0] not in ("flax_magics", "__main__") and not library_module(name):
            for attribute, value in list(vars(module).items()):
                yield f"{name}.{attribute}", value


class Examined(Struct, frozen=True):
    """What the checks look at besides JAX itself.

    Attributes:
      names: the user's variables.
      modules: registered name → the Flax module.
      sources: gives the code of the cells that ran, or of the script.
      disk: (folder of the session's programs on disk, whether it can be used); None where they are not kept there.
      shell: IPython's; None outside of it.
      started: JAX had its devices already when the examination began.
    """

    names: Mapping[str, object] = {}
    modules: Mapping[str, object] = {}
    sources: Callable[[], Iterable[str]] = tuple
    disk: tuple[str, bool] | None = None
    shell: Any = None
    started: bool = True


class Finding(Struct, frozen=True):
    """Something that is wrong.

    Attributes:
      text: what it is.
      cost: what it costs, or may.
      mend: the lines that mend it, with a gap (`…`) where only the reader can say; None where a restart is all.
      when: `first` where they mend it in the first cell of a restarted kernel, since JAX has settled it for this one;
        `then` where the kernel is to be restarted after them; empty where they mend it at once.
      now: results or times of this kernel depend on it, so that its first report says so.
    """

    text: str
    cost: str
    mend: str | None = None
    when: Literal["", "first", "then"] = ""
    now: bool = False

    @property
    def note(self) -> Note:
        """What is wrong and what it costs in one line, with the line that mends it."""
        when = {"": "", "first": "; first of all in a restarted kernel", "then": "; then restart the kernel"}[self.when]
        when = when.replace("then ", "") if self.mend is None else when
        gap = self.mend is not None and "…" in self.mend
        text = f"{self.text}: {self.cost}{when}"
        return Note("doctor", text, write=None if gap else self.mend, form=self.mend if gap else None)


class Check(Struct, frozen=True):
    """One thing that may be wrong.

    Attributes:
      name: what is looked at, in a word or two.
      test: returns what is wrong, None where all is well.
      first: it is worth its time before the first report of a kernel: what it finds matters at once, and it takes a
        millisecond at most.
    """

    name: str
    test: Callable[[Examined], Finding | None]
    first: bool = False


def examine(checks: Iterable[Check], examined: Examined) -> tuple[dict[str, Finding], dict[str, str]]:
    """Makes the checks. Returns what they found and the reasons of those that failed, by name."""
    findings, failed = {}, {}
    for check in checks:
        try:
            finding = check.test(examined)
        except Exception as error:  # one that a version of JAX breaks must not hide what the others find
            failed[check.name] = f"{type(error).__name__}: {error}"
        else:
            if finding is not None:
                findings[check.name] = finding
    return findings, failed


SHOWN = 12
"""How many holdings are listed; what the smaller ones have together is one more row."""
WORTH = 1_000_000
"""Bytes that only replays hold, from which on the line is told that lets go of them."""
HELD = "  held    "
NOBODY = "reached by no name: programs that JAX keeps, or code that is running"


class Diagnosis(Struct, frozen=True):
    """What the checks have found.

    Attributes:
      findings: the name of each check that found something → what it found.
      failed: the names of checks that could not be made, with the reason.
      checks: how many were made.
      system: versions and devices, in words.
    """

    findings: Mapping[str, Finding]
    failed: Mapping[str, str]
    checks: int
    system: tuple[str, ...]

    def __str__(self) -> str:
        return notice_text(diagnosis_notice(self))

    __repr__ = __str__


class Freed(Struct, frozen=True):
    """What was let go of, and what is still held.

    Attributes:
      freed: device → bytes that it holds no more; devices that hold what they held are left out.
      held: device → bytes of the arrays that are alive.
      let_go: what was let go of, in words.
      holdings: who holds the arrays that are alive, the largest first: each array counts once.
      lost: how many runs can be replayed no more.
    """

    freed: Mapping[str, int]
    held: Mapping[str, int]
    let_go: tuple[str, ...]
    holdings: tuple[Holding, ...]
    lost: int = 0

    @property
    def replayable(self) -> int:
        """Bytes that are held for replays alone."""
        return sum(holding.bytes for holding in self.holdings if holding.holders == (REPLAYS,))

    def __str__(self) -> str:
        return freed_text(self)

    __repr__ = __str__


def diagnosis_notice(diagnosis: Diagnosis) -> Notice:
    """One line, and a note for each finding; the system is told where nothing is wrong."""
    checks = plural(diagnosis.checks, "check")
    found = len(diagnosis.findings)
    failed = [Note("doctor", f"not checked: {name} ({why})") for name, why in diagnosis.failed.items()]
    noted = (*(finding.note for finding in diagnosis.findings.values()), *failed)
    if found:
        return Notice("doctor", (plural(found, "finding"), checks, *diagnosis.system), noted)
    return Notice("doctor", ("nothing is wrong", checks, *diagnosis.system), noted)


def freed_text(freed: Freed, first: str = "") -> str:
    """The answer of `%flax_free` as text; `first` is a line above it."""
    above = [first] if first else []
    let_go = columns([Row("let go", tuple(map(clean, freed.let_go)))])
    held = table(_rows(freed), indent=" " * len(HELD))
    held[:1] = [HELD + line[len(HELD) :] for line in held[:1]]
    return "\n".join([*above, *dotted(("free", *_parts(freed))), *let_go, *held, *notes(_notes(freed))])


def freed_bundle(freed: Freed, style: str, first: str = "") -> dict[str, object]:
    """The MIME bundle of `freed_text`."""

    def html() -> str:
        context = {
            "first": first,
            "texts": _parts(freed),
            "let_go": [clean(what) for what in freed.let_go],
            "rows": _rows(freed),
        }
        return render("free.html", {**context, "notes": note_lines(_notes(freed))})

    return shown_bundle(freed_text(freed, first), html, style)


def _parts(freed: Freed) -> tuple[str, ...]:
    gone = [f"{amount} freed" for amount in _amounts(freed.freed)]
    held = _amounts(freed.held)
    return (*(gone or ["nothing freed"]), f"held: {', '.join(held)}" if held else "nothing held")


def _amounts(sizes: Mapping[str, int]) -> list[str]:
    """`cpu:0 4.2 MB`, `cpu:1-7 66 KB each`: devices with the same amount are named together."""
    alike: dict[tuple[str, str], list[int]] = {}
    for device, size in sizes.items():
        platform, _, number = device.partition(":")
        alike.setdefault((platform, bytes_(size)), []).append(int(number))
    return [
        f"{name_numbers(platform, numbers)} {size}{' each' * (len(numbers) > 1)}"
        for (platform, size), numbers in alike.items()
    ]


def _rows(freed: Freed) -> list[tuple[str, str]]:
    """(bytes, who holds them) of each holding."""
    shown = freed.holdings if len(freed.holdings) <= SHOWN + 1 else freed.holdings[:SHOWN]
    sizes: dict[str, int] = {}
    for holding in shown:
        sizes[_who(holding)] = sizes.get(_who(holding), 0) + holding.bytes
    rows = [(bytes_(size), who) for who, size in sizes.items()]
    rest = freed.holdings[len(shown) :]
    if rest:
        rows.append((bytes_(sum(holding.bytes for holding in rest)), f"{count(len(rest))} others, smaller"))
    return rows


def _who(holding: Holding) -> str:
    # An NNX module is held by its name and as a model, which is one thing to the reader.
    holders = [holder for holder in holding.holders if f"the model {holder}" not in holding.holders]
    first, more = holders[:4], len(holders) - 4
    return clean(", ".join(first) + f" and {more} more" * (more > 0)) or f"{plural(holding.arrays, 'array')} {NOBODY}"


def _notes(freed: Freed) -> tuple[Note, ...]:
    noted = []
    if freed.lost:
        noted.append(
            Note("replays", f"{plural(freed.lost, 'run')} can be replayed no more: what they needed was let go of")
        )
    if freed.replayable >= WORTH:
        text = f"{bytes_(freed.replayable)} are held for %flax_replay alone, which could not repeat those runs without"
        noted.append(Note("replays", text, write="%flax_free --replays"))
    return tuple(noted)
