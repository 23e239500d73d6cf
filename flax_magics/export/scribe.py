"""What the lines of a script share: names, quotes, indentation, the root key and its draws."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from ..keys import SPLIT, stream_tag
from .names import Free

WIDTH = 100


@dataclass(eq=False)
class Scribe:
    """How a script is written.

    Attributes:
      free: names that are left.
      unit: one step of indentation, as the session's own code has it.
      quote: the quotes that the session's own code prefers.
      digests: whether a line with a digest is printed for each run.
      needs: modules that our lines use: `jax`, `jnp`, `nnx`, `dataclasses`, `functools`.
    """

    free: Free
    unit: str = "    "
    quote: str = '"'
    digests: bool = True
    needs: set[str] = field(default_factory=set)
    spare: dict[str, str] = field(default_factory=dict)
    """Names of variables that hold something for the next line."""

    def __post_init__(self) -> None:
        names = ("root_key", "params_key", "dropout_key")
        before = "session_" if any(name in self.free.used for name in names) else ""
        self.root, self.params, self.dropout = (self.free.take(before + name) for name in names)
        self.digest = self.free.take("print_digest")
        self._streams = {"params": self.params, "dropout": self.dropout}

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

    def fit(self, before: str, items: Sequence[str], after: str, depth: int = 0) -> list[str]:
        """`before` + the items + `after`, on one line where that fits, otherwise on one line for each item.

        Args:
          depth: steps of indentation that will stand before it.
        """
        line = f"{before}{', '.join(items)}{after}"
        if len(line) + depth * len(self.unit) <= WIDTH or not items:
            return [line]
        joined = self.unit + ", ".join(items)
        if len(joined) + depth * len(self.unit) <= WIDTH and not any(item.startswith("*") for item in items):
            return [before, joined, after]
        return [before, *(f"{self.unit}{item}," for item in items), after]

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
        return f"jax.random.fold_in({root or self.root}, 0x{stream_tag(stream):08x})"

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
        ahead = ["# The first run below makes this draw; its other keys are for that."] if stay else []
        return [*ahead, *self.folds(streams, taken=taken), line]

    def start(self, seed: int) -> str:
        """The root key at draw 1 of `seed`."""
        self.needs.add("jax")
        return f"{self.root} = jax.random.key({seed})"

    def advance(self, draws: int) -> list[str]:
        """Moves the root key on by so many draws that nothing is taken of."""
        self.needs.add("jax")
        line = f"{self.root} = jax.random.split({self.root}, 3)[0]"
        return [line] if draws == 1 else [f"for _ in range({draws}):", self.unit + line]

    def show(self, label: str, value: str) -> list[str]:
        """The line that prints a digest, where they are wanted."""
        return self.fit(f"{self.digest}(", [self.text(label), value], ")") if self.digests else []


def label_of(call: str, mode: str = "") -> str:
    """How a run is called where its digest is printed: `train net(x)`."""
    call = " ".join(call.split())
    if len(call) > 48:
        call = call[:47].rstrip() + "…"
    return f"{mode} {call}" if mode in ("train", "eval") else call


def indented(lines: Iterable[str], by: str) -> list[str]:
    """`lines` further to the right; empty ones stay empty."""
    return [by + line if line else line for line in lines]
