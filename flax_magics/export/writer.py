"""How lines of a script are written: free names, quotes, indentation, draws from the root key, line breaks."""

from __future__ import annotations

import ast
import builtins
import itertools
import math
import re
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import jax

from ..base.tokens import pieces
from ..line.expression import end_of, segment, start_of
from ..rng.keys import SPLIT, stream_tag

if TYPE_CHECKING:
    import jinja2

WIDTH = 88
"""The width that formatters use by default."""
_NAMED = re.compile(r"""(?:'[^']*'|"[^"]*"): |\w+=(?!=)""")
"""Matches `key: ` of a dict entry or `name=` of an argument at the beginning of a text."""
_INDENTED = re.compile(r":[ \t]*(?:#.*)?\n\s*?^([ \t]+)\S", re.MULTILINE)
"""Matches the beginning of a block, to which its indentation belongs."""

_NOTEBOOK = {"get_ipython", "In", "Out", "__IPYTHON__"}
# In a notebook IPython puts names of its own into `builtins`, such as `display`.
BUILTIN = frozenset(vars(builtins)) - _NOTEBOOK - {"display"} | {"__name__", "__doc__", "__builtins__", "exit", "quit"}
"""Names that exist in any Python script without an import."""


def is_of_the_notebook(name: str) -> bool:
    """Whether `name` is one that IPython defines, for itself or for past inputs and results: `In`, `_`, `_3`, `_i3`."""
    return name in _NOTEBOOK or re.fullmatch(r"_+|_[_i]*\d+|_i{1,3}|_[iod]h", name) is not None


class Free:
    """Hands out names that the session's own code does not use, each once."""

    def __init__(self, used: set[str]) -> None:
        self.used = used | set(BUILTIN)

    def take(self, *wanted: str) -> str:
        """Returns the first free name of `wanted`, else the last one with a number from 2, and marks it as used.

        What no identifier may have, such as a space, becomes `_`.
        """
        wanted = tuple(re.sub(r"\W", "_", name) for name in wanted)
        numbered = (f"{wanted[-1]}_{number}" for number in itertools.count(2))
        name = next(name for name in itertools.chain(wanted, numbered) if name not in self.used)
        self.used.add(name)
        return name


@dataclass
class Lines:
    """Lines of a script that belong together.

    Attributes:
      apart: a function that we add, with two empty lines around it.
      ours: some are ours, so that our imports must come before them.
    """

    text: list[str]
    apart: bool = False
    ours: bool = True


@dataclass(eq=False)
class LineWriter:
    """Writes lines in the style of the session's own code.

    Attributes:
      free: names that are not taken yet.
      unit: one level of indentation.
      quote: the preferred quotes.
      digests: whether a digest is printed for each run.
      spare: purpose → name of a variable of ours.
      labels: the labels of all digests, whose lengths align the output.
    """

    free: Free
    unit: str = "    "
    quote: str = '"'
    digests: bool = True
    spare: dict[str, str] = field(default_factory=dict)
    labels: list[str] = field(default_factory=list)

    IMPORTS: ClassVar[dict[str, str]] = {
        "dataclasses": "import dataclasses",
        "fnmatch": "import fnmatch",
        "functools": "import functools",
        "itertools": "import itertools",
        "jax": "import jax",
        "jnp": "import jax.numpy as jnp",
        "nn": "from flax import linen as nn",
        "nnx": "from flax import nnx",
        "np": "import numpy as np",
        "optax": "import optax",
        "safetensors": "import safetensors.flax",
        "traverse_util": "from flax import traverse_util",
        "types": "import types",
    }
    # The comment after an init whose draw an apply elsewhere goes on with.
    STAYS: ClassVar[str] = "# The first run below splits this key again, and takes the rest of the draw."

    @classmethod
    def like(cls, texts: Sequence[str], free: Free, *, digests: bool) -> LineWriter:
        """A writer that uses the indentation and quotes of the cells `texts`."""
        quotes = Counter(letter for text in texts for letter in text if letter in "'\"")
        indented = next(filter(None, map(_INDENTED.search, texts)), None)
        unit = "    " if indented is None else indented[1]
        return cls(free, unit, "'" if quotes["'"] > quotes['"'] else '"', digests)

    def __post_init__(self) -> None:
        names = ("root_key", "params_key", "dropout_key")
        # If the user has one of these names, all three get a prefix, so that they stay recognizable.
        prefix = "session_" if any(name in self.free.used for name in names) else ""
        self.root, self.params, self.dropout = (self.free.take(prefix + name) for name in names)
        self.digest = self.free.take("print_digest")
        self.spare |= {"params_key": self.params, "dropout_key": self.dropout}

    # -- text

    def text(self, value: str) -> str:
        """`value` as a string literal, in the preferred quotes where that needs no escaping."""
        plain = repr(value)
        inner = plain[1:-1]
        if self.quote not in value and plain[0] != self.quote and "\\" not in inner:
            return f"{self.quote}{inner}{self.quote}"
        return plain

    def number(self, value: float) -> str:
        """A number as an expression that gives the same one."""
        return repr(value) if math.isfinite(value) else f"float({self.text(str(value))})"

    def variable(self, name: str, other: str | None = None) -> str:
        """Our variable for a purpose, called `name` if that is free, else `other`; the same at each call."""
        if name not in self.spare:
            self.spare[name] = self.free.take(name, other or name)
        return self.spare[name]

    def fitted(self, lines: Iterable[str], column: int = 0) -> list[str]:
        """Our lines, with long ones broken, for an indentation of `column` columns."""
        return [short for line in lines for short in _fitted(line, self.unit, WIDTH - column)]

    # -- keys

    def key(self, stream: str, *, taken: bool = False) -> str:
        """The variable that holds a stream's key of the latest draw.

        Args:
          taken: the draw's `params` key went into variables, so the stream `params` has another.
        """
        return self.variable("own_params_key" if taken and stream == "params" else f"{stream}_key")

    def fold(self, stream: str, key: str, root: str | None = None) -> str:
        """The line that makes the key of a stream other than the split's, from the root key before it is split."""
        fold = f"jax.random.fold_in({root or self.root}, 0x{stream_tag(stream):08X})"
        return f"{key} = {fold}  # stream {self.text(stream)}"

    def draw(self, streams: Iterable[str] = (), *, taken: bool = False) -> list[str]:
        """The lines of one draw from the root key, for a run that uses `streams`."""
        folds = [self.fold(stream, self.key(stream, taken=taken)) for stream in _apart(streams, taken)]
        return [*folds, f"{self.root}, {self.params}, {self.dropout} = jax.random.split({self.root}, 3)"]

    def start(self, seed: int) -> str:
        """The line that makes the root key, at draw 1 of `seed`."""
        return f"{self.root} = jax.random.key({seed})"

    def keys_of(
        self, root: str, streams: Iterable[str], key: Callable[[str], str], *, taken: bool = False, moves: bool = False
    ) -> list[str]:
        """The lines that make the keys of `streams` in one draw from `root`, which may be another than the session's.

        Args:
          key: stream → the variable for its key.
          taken: see `key`.
          moves: whether `root` becomes the root key of the next draw.
        """
        folded = _apart(streams, taken)
        lines = [self.fold(stream, key(stream), root) for stream in folded]
        split = [root if moves else "_"]
        split += [key(stream) if stream in streams and stream not in folded else "_" for stream in SPLIT]
        if any(name != "_" for name in split):
            lines.append(f"{', '.join(split)} = jax.random.split({root}, 3)")
        return lines

    def advance(self, draws: int, root: str | None = None) -> list[str]:
        """The lines that move the root key on by `draws` draws, without taking keys."""
        root = root or self.root
        line = f"{root} = jax.random.split({root}, 3)[0]"
        return [line] if draws == 1 else [f"for _ in range({draws}):", self.unit + line]

    # -- digests

    def show(self, label: str, value: str) -> list[str]:
        """The line that prints a digest, if digests are wanted."""
        if not self.digests:
            return []
        self.labels.append(label)
        return [f"{self.digest}({self.text(label)}, {value})"]

    def digest_function(self, has: Container[str]) -> list[str]:
        """The lines of the function that prints a digest, computed like `digest_of` on little-endian machines.

        Args:
          has: `keys` and `objects` if some result has such leaves; the lines for them are left out otherwise.
        """
        width = min(max(map(len, self.labels)), 48)
        kinds = ("keys" in has, "objects" in has, jax.process_count() > 1)
        return self.rendered("digest", "print_digest", self.digest, *kinds, width)

    # -- functions and loops

    def rendered(self, template: str, macro: str, *arguments: object) -> list[str]:
        """The lines of a macro of `templates/{template}.py.jinja`, with the indentation and quotes of this writer."""
        module = _templates(self.unit, self.quote).get_template(template).module
        lines: str = getattr(module, macro)(*arguments)
        return lines.rstrip("\n").split("\n")


@cache
def _templates(unit: str, quote: str) -> jinja2.Environment:
    """The templates of Python code, written with this indentation and these quotes."""
    import jinja2

    def source(name: str) -> str:
        text = (Path(__file__).parent / "templates" / f"{name}.py.jinja").read_text("utf-8")
        text = re.sub("^(?: {4})+", lambda indent: unit * (len(indent[0]) // 4), text, flags=re.MULTILINE)
        lines = (line if '"""' in line else line.replace('"', quote) for line in text.split("\n"))
        return "\n".join(lines)

    loader = jinja2.FunctionLoader(source)
    environment = jinja2.Environment(
        loader=loader, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, auto_reload=False
    )
    environment.globals["unit"] = unit
    return environment


def _apart(streams: Iterable[str], taken: bool) -> list[str]:
    """The streams whose keys are folded in, since the split does not make them."""
    return [stream for stream in streams if stream not in SPLIT or (taken and stream == "params")]


def draws(many: int) -> str:
    """A number of draws in words: `a draw`, `3 draws`."""
    return "a draw" if many == 1 else f"{many} draws"


def label_of(call: str, mode: str = "") -> str:
    """The label of a run's digest, such as `train net(x)`, shortened to fit a line."""
    call = " ".join(call.split())
    if len(call) > 48:
        call = call[:47].rstrip() + "…"
    return f"{mode} {call}" if mode in ("train", "eval") else call


def call(before: str, items: Iterable[str], after: str = ")") -> str:
    """`before`, the items with commas between them, and `after`: one line, which `fitted` may break."""
    return f"{before}{', '.join(items)}{after}"


def indented(lines: Iterable[str], by: str) -> list[str]:
    """`lines` indented by `by`; empty lines stay empty."""
    return [by + line if line else line for line in lines]


def joined(blocks: Sequence[Sequence[Lines]]) -> str:
    """The text of all blocks, with one empty line between cells, and two around functions and classes."""
    script, above, after_function = "", "", False
    for block in blocks:
        begins = True
        for lines in block:
            parted = begins or lines.apart or after_function
            text = "\n".join(line.rstrip() for line in lines.text)
            text = text.lstrip("\n") if parted else text
            if not text.strip():
                continue
            if script and parted:
                far = lines.apart or after_function or _defines(text, 0) or _defines(above, -1)
                script = script.rstrip("\n") + ("\n\n\n" if far else "\n\n")
            script += f"{text}\n"
            above, after_function, begins = text, lines.apart, False
    return f"{script.rstrip()}\n" if script else ""


def _defines(text: str, place: int) -> bool:
    """Whether the statement at `place` (0: first, -1: last) of `text` defines a function or class."""
    body = ast.parse(text).body
    return bool(body) and isinstance(body[place], (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))


def _fitted(line: str, unit: str, width: int) -> list[str]:
    """A line, or if it is too long, several: the contents of its last brackets go on lines of their own."""
    indent = line[: len(line) - len(line.lstrip())]
    if len(line) <= width or line.lstrip().startswith("#"):
        return [line]
    code, mark, stream = line.partition("  # stream ")
    if mark:
        return [f"{indent}# stream {stream}", *_fitted(code, unit, width)]
    text = line.strip()
    start, end, items = _last_brackets(text)
    if not items:
        return [line]
    inner = [indent + unit + ", ".join(items)]
    if len(inner[0]) > width:
        inner = []
        for item in items:
            *head, last = _fitted(indent + unit + item, unit, width - 1)
            inner += [*head, f"{last},"]
    return [indent + text[:start], *inner, indent + text[end:]]


def _last_brackets(text: str) -> tuple[int, int, list[str]]:
    """Start, end and items of the contents of the brackets that end a line; no items if it ends otherwise."""
    if text.startswith("def "):
        start, end = text.index("(") + 1, text.rindex(")")
        return start, end, text[start:end].split(", ")
    named = _NAMED.match(text)
    if named is not None:
        start, end, items = _last_brackets(text[named.end() :])
        return named.end() + start, named.end() + end, items
    try:
        node = getattr(ast.parse(text).body[0], "value", None)
    except SyntaxError:  # a decorator or the like, which stays one line
        return 0, 0, []
    if not isinstance(node, (ast.Call, ast.Dict)) or end_of(text, node) != len(text):
        return 0, 0, []
    if isinstance(node, ast.Call):
        arguments: list[Any] = [*node.args, *node.keywords]
        items = [segment(text, each) for each in sorted(arguments, key=lambda each: each.col_offset)]
        return text.index("(", end_of(text, node.func)) + 1, len(text) - 1, items
    signs = ("**" if key is None else f"{segment(text, key)}: " for key in node.keys)
    items = [sign + segment(text, value) for sign, value in zip(signs, node.values, strict=True)]
    return start_of(text, node) + 1, len(text) - 1, items


def tried_until(lines: Sequence[str], error: str, unit: str) -> list[str]:
    """`lines` of a statement that ended with this error, whose lines may also stop themselves by a KeyboardInterrupt."""
    known = error if hasattr(builtins, error) else "Exception"
    caught = known if known == "KeyboardInterrupt" else f"(KeyboardInterrupt, {known})"
    return ["try:", *_inside("\n".join(lines), unit), f"except {caught}:", f"{unit}pass"]


def _inside(code: str, unit: str) -> Iterator[str]:
    """The lines of `code` indented, but for those that begin inside a string."""
    strings = [piece for piece in pieces(code) if piece.kind == "string"]
    start = 0
    for line in code.split("\n"):
        in_string = any(piece.start < start < piece.end for piece in strings)
        yield line if in_string or not line else unit + line
        start += len(line) + 1
