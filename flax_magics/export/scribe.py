"""What the lines of a script share: names, quotes, indentation, the root key and its draws."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import ClassVar

from ..keys import SPLIT, stream_tag
from .names import Free


@dataclass(eq=False)
class Scribe:
    """How a script is written.

    Attributes:
      free: names that are left.
      unit: one step of indentation, as the session's own code has it.
      quote: the quotes that the session's own code prefers.
      digests: whether a line with a digest is printed for each run.
      needs: modules that our lines use: `jax`, `jnp`, `nnx`, `dataclasses`, `functools`.
      spare: names of variables that hold something for the next line.
      labels: what the digests are called.
    """

    free: Free
    unit: str = "    "
    quote: str = '"'
    digests: bool = True
    needs: set[str] = field(default_factory=set)
    spare: dict[str, str] = field(default_factory=dict)
    labels: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        names = ("root_key", "params_key", "dropout_key")
        before = "session_" if any(name in self.free.used for name in names) else ""
        self.root, self.params, self.dropout = (self.free.take(before + name) for name in names)
        self.digest = self.free.take("print_digest")
        self._streams = {"params": self.params, "dropout": self.dropout}

    STAYS: ClassVar[str] = "# The first run below splits this key again, and takes the rest of the draw."

    # -- text

    def text(self, value: str) -> str:
        """`value` as a string literal."""
        plain = repr(value)
        inner = plain[1:-1]
        if self.quote not in value and plain[0] != self.quote and "\\" not in inner:
            return f"{self.quote}{inner}{self.quote}"
        return plain

    def texts(self, values: Iterable[str]) -> str:
        """A list of string literals."""
        return "[" + ", ".join(map(self.text, values)) + "]"

    def variable(self, name: str, other: str | None = None) -> str:
        """The variable of ours that is called so, or `other` where that name is not free."""
        if name not in self.spare:
            self.spare[name] = self.free.take(name, other or name)
        return self.spare[name]

    # -- keys

    def key(self, stream: str, *, taken: bool = False) -> str:
        """The variable that holds a stream's key of the last draw.

        Args:
          taken: an init took the draw's `params` key, and this is another.
        """
        name = "own_params" if taken and stream == "params" else stream
        if name not in self._streams:
            self._streams[name] = self.free.take(f"{name}_key")
        return self._streams[name]

    def fold(self, stream: str, root: str | None = None) -> str:
        """The key of a stream that the split does not give, from the root key before it is split."""
        self.needs.add("jax")
        return f"jax.random.fold_in({root or self.root}, 0x{stream_tag(stream):08X})"

    def folds(self, streams: Iterable[str], *, taken: bool = False) -> list[str]:
        """The lines that fold further streams into the root key, before it is split."""
        return [
            f"{self.key(stream, taken=taken)} = {self.fold(stream)}  # stream {self.text(stream)}"
            for stream in streams
            if stream not in SPLIT or (taken and stream == "params")
        ]

    def draw(self, streams: Iterable[str] = (), *, taken: bool = False, stay: bool = False) -> list[str]:
        """One draw from the root key.

        Args:
          streams: those that will be used.
          stay: the root key does not move: the next draw is the same one.
        """
        self.needs.add("jax")
        root = "_" if stay else self.root
        line = f"{root}, {self.params}, {self.dropout} = jax.random.split({self.root}, 3)"
        ahead = [self.STAYS] if stay else []
        return [*ahead, *self.folds(streams, taken=taken), line]

    def start(self, seed: int) -> str:
        """The root key at draw 1 of `seed`."""
        self.needs.add("jax")
        return f"{self.root} = jax.random.key({seed})"

    def keys_of(
        self, root: str, streams: Iterable[str], key: Callable[[str], str], *, taken: bool = False, moves: bool = False
    ) -> list[str]:
        """The keys of one draw from another root key than the session's: those of `streams` alone.

        Args:
          key: the variable of each stream's.
          taken: see `key`.
          moves: `root` is that of the next draw then.
        """
        self.needs.add("jax")
        folded = [stream for stream in streams if stream not in SPLIT or (taken and stream == "params")]
        lines = [f"{key(stream)} = {self.fold(stream, root)}  # stream {self.text(stream)}" for stream in folded]
        split = [root if moves else "_"]
        split += [key(stream) if stream in streams and stream not in folded else "_" for stream in SPLIT]
        if any(name != "_" for name in split):
            lines.append(f"{', '.join(split)} = jax.random.split({root}, 3)")
        return lines

    def advance(self, draws: int, root: str | None = None) -> list[str]:
        """Moves the root key on by so many draws that nothing is taken of."""
        self.needs.add("jax")
        root = root or self.root
        line = f"{root} = jax.random.split({root}, 3)[0]"
        return [line] if draws == 1 else [f"for _ in range({draws}):", self.unit + line]

    def show(self, label: str, value: str) -> list[str]:
        """The line that prints a digest, where they are wanted."""
        if not self.digests:
            return []
        self.labels.append(label)
        return [f"{self.digest}({self.text(label)}, {value})"]


def label_of(call: str, mode: str = "") -> str:
    """How a run is called where its digest is printed: `train net(x)`."""
    call = " ".join(call.split())
    if len(call) > 48:
        call = call[:47].rstrip() + "…"
    return f"{mode} {call}" if mode in ("train", "eval") else call


def call(before: str, items: Iterable[str], after: str = ")") -> str:
    """`before`, the items with commas between, and `after`: one logical line."""
    return f"{before}{', '.join(items)}{after}"


def indented(lines: Iterable[str], by: str) -> list[str]:
    """`lines` further to the right; empty ones stay empty."""
    return [by + line if line else line for line in lines]
