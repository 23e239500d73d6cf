"""What the lines of a script share: names that are free, quotes, indentation, the root key and its draws, blank lines."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from ..base.tokens import pieces
from ..cells.names import Free
from ..line.expression import end_of, segment, start_of
from ..rng.keys import SPLIT, stream_tag

WIDTH = 88
"""Columns, the default of formatters."""
_NAMED = re.compile(r"""(?:'[^']*'|"[^"]*"): |\w+=(?!=)""")
"""What stands before a value in a dict and in a call."""


@dataclass
class Lines:
    """Lines of a script that belong together.

    Attributes:
      apart: a function of ours, which stands apart.
      ours: some of them are ours, so that our imports have to stand above.
    """

    text: list[str]
    apart: bool = False
    ours: bool = True


@dataclass(eq=False)
class LineWriter:
    """How a script is written.

    Attributes:
      free: names that are left.
      unit: one step of indentation, as the session's own code has it.
      quote: the quotes that the session's own code prefers.
      digests: whether a line with a digest is printed for each run.
      needs: modules that our lines use: see `IMPORTS`.
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

    IMPORTS: ClassVar[dict[str, str]] = {
        "dataclasses": "import dataclasses",
        "functools": "import functools",
        "jax": "import jax",
        "jnp": "import jax.numpy as jnp",
        "nnx": "from flax import nnx",
        "safetensors": "import safetensors.flax",
        "traverse_util": "from flax import traverse_util",
    }
    STAYS: ClassVar[str] = "# The first run below splits this key again, and takes the rest of the draw."

    @classmethod
    def like(cls, texts: Sequence[str], free: Free, *, digests: bool) -> LineWriter:
        """One that writes as the cells `texts` are written."""
        quotes = Counter(letter for text in texts for letter in text if letter in "'\"")
        unit = next((unit for text in texts if (unit := _indentation(text))), "    ")
        return cls(free, unit, "'" if quotes["'"] > quotes['"'] else '"', digests)

    def __post_init__(self) -> None:
        names = ("root_key", "params_key", "dropout_key")
        prefix = "session_" if any(name in self.free.used for name in names) else ""
        self.root, self.params, self.dropout = (self.free.take(prefix + name) for name in names)
        self.digest = self.free.take("print_digest")
        self.spare |= {"params_key": self.params, "dropout_key": self.dropout}

    # -- text

    def text(self, value: str) -> str:
        """`value` as a string literal."""
        plain = repr(value)
        inner = plain[1:-1]
        if self.quote not in value and plain[0] != self.quote and "\\" not in inner:
            return f"{self.quote}{inner}{self.quote}"
        return plain

    def variable(self, name: str, other: str | None = None) -> str:
        """The variable of ours that is called so, or `other` where that name is not free."""
        if name not in self.spare:
            self.spare[name] = self.free.take(name, other or name)
        return self.spare[name]

    def fitted(self, lines: Iterable[str], column: int = 0) -> list[str]:
        """Our lines with those that are too long as several, where all will stand `column` columns to the right."""
        return [short for line in lines for short in _fitted(line, self.unit, WIDTH - column)]

    # -- keys

    def key(self, stream: str, *, taken: bool = False) -> str:
        """The variable that holds a stream's key of the last draw.

        Args:
          taken: an init took the draw's `params` key, and this is another.
        """
        return self.variable("own_params_key" if taken and stream == "params" else f"{stream}_key")

    def fold(self, stream: str, key: str, root: str | None = None) -> str:
        """The line that gives `key` a stream that the split does not give, from the root key before it is split."""
        made = f"jax.random.fold_in({root or self.root}, 0x{stream_tag(stream):08X})"
        return f"{key} = {made}  # stream {self.text(stream)}"

    def draw(self, streams: Iterable[str] = (), *, taken: bool = False) -> list[str]:
        """One draw from the root key, of which `streams` will be used."""
        self.needs.add("jax")
        folds = [self.fold(stream, self.key(stream, taken=taken)) for stream in _apart(streams, taken)]
        return [*folds, f"{self.root}, {self.params}, {self.dropout} = jax.random.split({self.root}, 3)"]

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
        folded = _apart(streams, taken)
        lines = [self.fold(stream, key(stream), root) for stream in folded]
        split = [root if moves else "_"]
        split += [key(stream) if stream in streams and stream not in folded else "_" for stream in SPLIT]
        if any(name != "_" for name in split):
            lines.append(f"{', '.join(split)} = jax.random.split({root}, 3)")
        return lines

    def advance(self, draws: int, root: str | None = None) -> list[str]:
        """Moves the root key on by so many draws that nothing is taken of."""
        root = root or self.root
        line = f"{root} = jax.random.split({root}, 3)[0]"
        return [line] if draws == 1 else [f"for _ in range({draws}):", self.unit + line]

    # -- digests

    def show(self, label: str, value: str) -> list[str]:
        """The line that prints a digest, where they are wanted."""
        if not self.digests:
            return []
        self.labels.append(label)
        return [f"{self.digest}({self.text(label)}, {value})"]

    def digest_function(self, has: Container[str]) -> list[str]:
        """The function that prints the digest of a run: what `flax_magics.run.digest_of` states, on little-endian machines.

        Args:
          has: `keys` and `objects`, where some result has leaves that are such.
        """
        key_type, result = "", "result"
        opened: list[str] = []
        inner = ["path = jax.tree_util.keystr(path)"]
        if "objects" in has:
            result = "jax.tree_util.tree_map(opened, result)"
            opened = [
                "\tdef opened(leaf):",
                '\t\theld = {} if hasattr(leaf, "dtype") or callable(leaf) else getattr(leaf, "__dict__", {})',
                '\t\theld = {name: value for name, value in held.items() if not name.startswith("__")}',
                "\t\treturn {type(leaf).__qualname__: jax.tree_util.tree_map(opened, held)} if held else leaf",
                "",
            ]
            inner += [
                "if not isinstance(leaf, (jax.Array, np.ndarray, np.generic, int, float, complex)):",
                '\thasher.update(f"{path}\\0{leaf!r}\\0".encode())',
                "\tcontinue",
            ]
        if "keys" in has:
            inner += [
                'key_type, dtype = "", getattr(leaf, "dtype", None)',
                "if dtype is not None and jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key):",
                "\tkey_type, leaf = str(dtype), jax.random.key_data(leaf)",
            ]
            key_type = "{key_type}"
        lines = [
            f"def {self.digest}(call, result):",
            '\t"""Prints a digest of the bits of a result, by which two runs can be compared."""',
            "\timport hashlib",
            "",
            "\timport numpy as np",
            "",
            *opened,
            "\thasher = hashlib.sha256()",
            f"\tfor path, leaf in jax.tree_util.tree_flatten_with_path({result})[0]:",
            *("\t\t" + line for line in inner),
            '\t\tarray = np.asarray(leaf, order="C")',
            f'\t\theader = f"{{path}}\\0{key_type}{{array.dtype.name}}{{list(array.shape)}}\\0"',
            "\t\thasher.update(header.encode() + array.tobytes())",
            f'\tprint(f"{{call:<{min(max(map(len, self.labels)), 48)}}}  {{hasher.hexdigest()[:16]}}")',
        ]
        if self.quote == "'":
            lines = [line if '"""' in line else line.replace('"', "'") for line in lines]
        return [line.replace("\t", self.unit) for line in lines]


def _apart(streams: Iterable[str], taken: bool) -> list[str]:
    """The streams whose keys the split does not give."""
    return [stream for stream in streams if stream not in SPLIT or (taken and stream == "params")]


def draws(many: int) -> str:
    """`a draw`, `3 draws`."""
    return "a draw" if many == 1 else f"{many} draws"


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


def joined(blocks: Sequence[Sequence[Lines]]) -> str:
    """The text of all cells: one empty line between them, two around functions and classes."""
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
    """Whether the first statement of `text`, or the last, is a function or a class."""
    body = ast.parse(text).body
    return bool(body) and isinstance(body[place], (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))


def _indentation(text: str) -> str:
    """The indentation that the blocks of `text` have first; empty where it has none."""
    depth, line_begins = 0, True
    for piece in pieces(text):
        if piece.kind == "space" and line_begins and not depth:
            return text[piece.start : piece.end]
        line_begins = piece.kind == "newline"
        depth = depth if line_begins else piece.depth
    return ""


def _fitted(line: str, unit: str, width: int) -> list[str]:
    """A line as it is, or with what stands in its last brackets on lines of its own."""
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
    """Where the inside of the brackets that end one of our lines begins and ends, and its items; none for other lines."""
    if text.startswith("def "):
        start, end = text.index("(") + 1, text.rindex(")")
        return start, end, text[start:end].split(", ")
    named = _NAMED.match(text)
    if named is not None:
        start, end, items = _last_brackets(text[named.end() :])
        return named.end() + start, named.end() + end, items
    try:
        node = getattr(ast.parse(text).body[0], "value", None)
    except SyntaxError:  # a decorator
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
