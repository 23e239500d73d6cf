"""Parsing of a command's options, up to the call; the axes of a mesh, and the kinds of notes, as a user writes them.

argparse does not fit: the Python call that follows the options may contain dashes, quotes, brackets and white space.
"""

from __future__ import annotations

import builtins
import re
import textwrap
from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

from ..base.text import width
from ..base.tokens import Unbalanced, pieces, point_at, statements, token_end
from ..base.types import PyTree, Record
from ..errors import FlaxMagicsError, nearest, written

if TYPE_CHECKING:
    from ..run import DrawNumber


_DASHES = "-–—"
"""Phones and word processors turn two hyphens into one of the long dashes; these get a message, too."""


class Option(Record):
    """The definition of one option.

    Attributes:
      flag: its long form, such as `--train`.
      help: one sentence.
      metavar: placeholder of its value in the help, such as `NAME`; None for a flag, which is True or False.
      short: its short form, such as `-o`.
      many: it may be repeated; its value is then a tuple.
      quotes: its value may be written in quotes, which are removed.
      type: type of the value, str or int.
      least: the smallest int that is accepted, None for any.
      is_name: the value must be a Python identifier.
      was: what it was called before.
      takes: what its value is, for completion: `collection`, `argument`, `draw`, `variables`, `file`.
    """

    flag: str
    help: str
    metavar: str | None = None
    short: str | None = None
    many: bool = False
    quotes: bool = False
    type: builtins.type[str] | builtins.type[int] = str
    least: int | None = 1
    is_name: bool = False
    was: str = ""
    takes: str = ""

    @property
    def key(self) -> str:
        """Its key in `LineOptions.options`, such as `train`."""
        return self.flag.lstrip("-").replace("-", "_")

    @property
    def flags(self) -> tuple[str, ...]:
        """All forms of the flag."""
        return (self.flag,) if self.short is None else (self.short, self.flag)


HELP = Option("--help", "show this help", short="-h")


class Command(Record):
    """The definition of one command: help text, options and what follows them.

    Attributes:
      name: with its percent signs, such as `%flax_apply`.
      usage: one or more lines, such as `%flax_apply [options] model.method(x, mask=m)`.
      does: what it does, in one line of the help and of `%flax`.
      help: paragraphs, separated by blank lines.
      options: in the order in which they are of use.
      examples: two or three lines or cells that run as they are, in this order.
      pitfalls: what can go wrong, and what then helps; a paragraph each.
      takes: what follows the options, for completion: `call`, `assignment`, `model`, `stream`, `draw`, `file`.
      bare: it works without anything after it; other commands then show their help.
    """

    name: str
    usage: str
    does: str
    help: str
    options: tuple[Option, ...] = ()
    examples: tuple[str, ...] = ()
    pitfalls: tuple[str, ...] = ()
    takes: str = "call"
    bare: bool = False

    @property
    def bare_name(self) -> str:
        """The name without percent signs."""
        return self.name.lstrip("%")

    @property
    def flags(self) -> dict[str, Option]:
        """Every form of every flag → its option, `--help` included."""
        return {flag: option for option in (*self.options, HELP) for flag in option.flags}

    def needs_rest(self, line: str) -> bool:
        """Whether something must follow the options of `line`; not for a cell command, whose body follows."""
        return not self.bare and not self.name.startswith("%%") and "--autosave" not in line

    def render_help(self) -> str:
        """The help text: usage, what it does, options, examples, and what can go wrong."""
        options = [
            (", ".join(option.flags) + (f" {option.metavar}" if option.metavar else ""), option.help)
            for option in (*self.options, HELP)
        ]
        column = min(max(len(spelled) for spelled, _ in options), 24) + 4
        lines = ["options:"]
        for spelled, text in options:
            first = f"  {spelled}".ljust(column)
            if len(spelled) + 4 > column:
                lines.append(first)
                first = " " * column
            lines += textwrap.wrap(
                text, width(), initial_indent=first, subsequent_indent=" " * column, break_on_hyphens=False
            )
        does = f"{self.does[0].upper()}{self.does[1:]}."
        paragraphs = [
            textwrap.fill(paragraph, width(), break_on_hyphens=False) for paragraph in (does, *self.help.split("\n\n"))
        ]
        blocks = [self.usage, *paragraphs, "\n".join(lines)]
        between = "\n\n" if any("\n" in example for example in self.examples) else "\n"
        blocks += ["examples:\n" + textwrap.indent(between.join(self.examples), "  ")]
        pitfalls = (
            textwrap.fill(text, width(), initial_indent="  ", subsequent_indent="    ", break_on_hyphens=False)
            for text in self.pitfalls
        )
        blocks += ["\n".join(("what can go wrong:", *pitfalls))]
        return "\n\n".join(blocks)


class LineOptions(Record):
    """A parsed command line.

    Attributes:
      options: key → value for every option of the command; False, None or () where it was not given.
      rest: the stripped text after the options.
      offset: index of `rest` in the line.
      help: `--help` was given; nothing else is filled in.
    """

    options: dict[str, Any]
    rest: str = ""
    offset: int = 0
    help: bool = False


def read(command: Command, line: str) -> LineOptions:
    """Parses the options at the beginning of `line`.

    A value ends at white space outside strings and brackets. `--` ends the options.

    Raises:
      FlaxMagicsError: an option is unknown, lacks its value, has a wrong value, or stands after the call.
    """
    return _Reader(command, line).read()


class _Reader:
    """Parses one line of a command; keeps what error messages need."""

    def __init__(self, command: Command, line: str) -> None:
        self.command, self.line = command, line

    def read(self) -> LineOptions:
        """The implementation of the function `read`."""
        command, line = self.command, self.line
        options: dict[str, Any] = {option.key: None if option.metavar else False for option in command.options}
        options |= {option.key: () for option in command.options if option.many}
        position = self._skip(0)
        while position < len(line) and line[position] in _DASHES:
            start, position = position, self._end_of(position)
            flag, equals, value = line[start:position].partition("=")
            if flag == "--":
                position = self._skip(position)
                break
            option = command.flags.get(flag)
            if option is None:
                raise self._unknown(start, flag)
            if option is HELP:
                return LineOptions({}, help=True)
            if option.metavar is None:
                if equals:
                    advice = self._corrected(f"{line[:start]}{flag}{line[position:]}")
                    raise FlaxMagicsError(f"{flag} takes no value.", **advice)
                options[option.key] = True
                position = self._skip(position)
                continue
            begin = position - len(value) if equals else self._skip(position)
            if not equals:
                # If another option or nothing follows, the value was left out.
                word = (line[begin:].split(None, 1) or ["--"])[0]
                position = begin if word.startswith("--") or word in command.flags else self._end_of(begin)
            value, after = line[begin:position], line[position:]
            if (
                "(" in value
                and not after.strip()
                and not equals
                and command.takes == "call"
                and command.needs_rest(line)
            ):
                raise self._wants(option, line[: start + len(flag)], value, "")
            converted = _convert(option, value) if value else None
            if converted is None:
                raise self._wants(option, line[: start + len(flag)], value, after)
            options[option.key] = (*options[option.key], converted) if option.many else converted
            position = self._skip(position)
        rest = line[position:].rstrip()
        word, _, call = rest.partition(" ")
        if call and f"--{word}" in command.flags and not statements(rest):
            advice = self._corrected(f"{line[:position]}--{rest}")
            raise FlaxMagicsError(f"`{word}` is an option, and options begin with two dashes.", **advice)
        if self._after_the_call(position, position + len(rest)):
            return LineOptions({}, help=True)
        return LineOptions(options, rest, position)

    def _skip(self, position: int) -> int:
        """The index of the next word at or after `position`."""
        words = (piece.start for piece in pieces(self.line, position) if piece.kind not in ("space", "newline", "join"))
        return next(words, len(self.line))

    def _end_of(self, start: int) -> int:
        """The end of the word that begins at `start`; raises the error for an unclosed bracket or quote."""
        try:
            return token_end(self.line, start)
        except Unbalanced as error:
            prefix = f"{self.command.name} "
            pointed = point_at(prefix + self.line, len(prefix) + error.position)
            raise FlaxMagicsError(f"{self.command.name}: {error.reason}", hint=pointed) from None

    def _wants(self, option: Option, before: str, value: str, after: str) -> FlaxMagicsError:
        """The error for an option whose value is missing or wrong; `before` is the line up to its flag, included."""
        wanted = "a Python name" if option.is_name else f"a value ({option.metavar})"
        sample = "…"
        if option.type is int:
            wanted, sample = "a whole number", str(max(option.least or 0, 0) * 20)
            if option.least is not None:
                wanted = "a positive whole number" if option.least == 1 else f"a whole number from {option.least} on"
        message = f"{before.split()[-1]} needs {wanted}" + (f", not {value}." if value else ".")
        # In `--repeat net(x)` the number was left out and the call taken for it: the advice keeps the call.
        rest = (value + after if "(" in value else after).strip()
        rest = rest or ("…" if self.command.needs_rest(self.line) else "")
        return FlaxMagicsError(message, **self._corrected(f"{before.strip()} {sample} {rest}"))

    def _unknown(self, start: int, flag: str) -> FlaxMagicsError:
        """The error for an unknown option, with the nearest known ones and the list of all."""
        command, line, bare = self.command, self.line, flag.lstrip(_DASHES)
        for option in command.options:
            if option.was == flag:
                advice = self._corrected(f"{line[:start]}{option.flag}{line[start + len(flag) :]}")
                return FlaxMagicsError(f"{flag} is called {option.flag} now.", **advice)
        if command.takes == "file" and bare in ("file", "out", "output", "path", "o") and "…" not in line:
            rest = line[start + len(flag) :].lstrip(" =")
            return FlaxMagicsError(
                f"{command.name} takes the file's name alone.", **self._corrected(line[:start] + rest)
            )
        if bare in ("lr", "learning-rate", "learning_rate", "rate") and "--optimizer" in command.flags:
            rate, _, rest = line[start + len(flag) :].lstrip(" =").partition(" ")
            optimizer = f"--optimizer optax.adam({rate or '…'})"
            message = f"{command.name} has no option {flag}: the rate is the optimizer's, as in {optimizer}."
            has_optimizer = "--optimizer" in line  # whose rate only its own expression can say
            return FlaxMagicsError(
                message, **({} if has_optimizer else self._corrected(f"{line[:start]}{optimizer} {rest}"))
            )
        known = [option.flag.lstrip("-") for option in (*command.options, HELP)]
        near = [f"--{name}" for name in known if bare and name.startswith(bare)]
        near = near or [f"--{name}" for name in nearest(bare, known, 1)]
        message, advice = f"{command.name} has no option {flag}.", {}
        if near:
            message = f"{message[:-1]}: did you mean {' or '.join(near)}?"
            advice = self._corrected(f"{line[:start]}{near[0]}{line[start + len(flag) :]}")
        listed = "options: " + "  ".join("/".join(option.flags) for option in (*command.options, HELP))
        hint = textwrap.fill(listed, width() - 2, subsequent_indent=" " * 9, break_on_hyphens=False)
        return FlaxMagicsError(message, hint=hint, **advice)

    def _after_the_call(self, start: int, end: int) -> bool:
        """Whether `--help` stands after the call; raises for any other option there.

        Python would parse `net(x) --train` as `net(x) - (-train)`.
        """
        command, line = self.command, self.line
        flags, spaced = list[tuple[int, str]](), False
        for piece in pieces(line[:end], start):
            if piece.kind == "comment":
                end = piece.start
                break
            # Only a word of its own outside brackets: `f(a --b)` and `x-o` are Python.
            if spaced and not piece.depth and piece.kind == "word" and piece.start > start:
                word = line[piece.start : piece.end].partition("=")[0].rstrip(";")
                if word in command.flags or (word.startswith("--") and word[2:3].isalpha()):
                    flags.append((piece.start, word))
            spaced = piece.kind in ("space", "newline", "join")
        if not flags:
            return False
        if any(command.flags.get(word) is HELP for _, word in flags):
            return True
        for position, word in flags:
            if word not in command.flags:
                raise self._unknown(position, word)
        first, word = flags[0]
        call = line[start:first].strip()
        options = line[first:end].strip().rstrip("; ")
        last = command.flags.get(options.split()[-1])
        gap = "" if last is None or last.metavar is None else " …"  # in front it would take the call as its value
        advice = self._corrected(f"{line[:start]}{options}{gap} {call}")
        raise FlaxMagicsError(f"options come first: {word} stands after `{call.splitlines()[0]}`.", **advice)

    def _corrected(self, line: str) -> dict[str, str]:
        """Advice that shows `line`, from which a mistake was removed. If it has another, the advice for that one."""
        command, line = self.command, line.strip()
        if "…" in line:
            return written(f"{command.name} {line}")
        try:
            corrected = _Reader(command, line).read()
        except FlaxMagicsError as error:
            return written(error.write or error.form or "") if error.write or error.form else {}
        # The two exclude each other, and which one was meant is unknown: no advice.
        if corrected.options.get("train") and corrected.options.get("eval"):
            return {}
        return written(f"{command.name} {line}" + (" …" if not corrected.rest and command.needs_rest(line) else ""))


def _convert(option: Option, value: str) -> str | int | None:
    """`value` converted to the option's type, None if it is not valid."""
    value = unquoted(value) if option.quotes else value
    if option.type is str:
        return None if option.is_name and not value.isidentifier() else value
    try:
        number = int(value)
    except ValueError:
        return None
    return None if option.least is not None and number < option.least else number


def unquoted(value: str) -> str:
    """`value` without its quotes if it is a single quoted string, else unchanged."""
    first = next(pieces(value), None)
    if first is None or first.kind != "string" or first.end != len(value):
        return value
    quote = value[:3] if value[:3] in ("'''", '"""') else value[0]
    return value[len(quote) : -len(quote)].replace("\\" + quote, quote)


def quoted(value: str) -> str:
    """`value` as it is written on a command line: in double quotes unless it is a plain word."""
    return value if re.fullmatch(r"[\w./~:+-]+", value) else '"' + value.replace('"', '\\"') + '"'


def file_name(rest: str, command: Command) -> str:
    """The file name in `rest`, the text after the options; it may be in quotes.

    Raises:
      FlaxMagicsError: there is none.
    """
    name = unquoted(rest).strip()
    if not name:
        raise FlaxMagicsError(f"{command.name} needs the name of a file.", form=f"{command.name} …")
    return name


REPEAT = 20
"""The number of runs of `--roofline` without `--repeat`."""


class ApplyOptions(Record):
    """The options of one apply; `Session.apply` documents them."""

    mode: str | None = None
    mutable: tuple[str, ...] = ()
    variables: Mapping[str, PyTree] | None = None
    key: tuple[str, ...] = ()
    keys_of: DrawNumber | None = None
    samples: int | None = None
    repeat: int = 1
    eager: bool = False
    roofline: bool = False
    """Also measure the machine's peak rates; without `repeat` the program runs `REPEAT` times."""

    @property
    def runs(self) -> int:
        """The number of times that the program runs."""
        return REPEAT if self.roofline and self.repeat == 1 else self.repeat

    @property
    def line(self) -> str:
        """`%flax_apply` with these options, for messages; variables, whose text is unknown, are `…`."""
        keys_of = ":".join(map(str, self.keys_of)) if isinstance(self.keys_of, tuple) else self.keys_of
        options = [f"--{self.mode}"] if self.mode else []
        options += [f"--mutable {name}" for name in self.mutable]
        options += [] if self.variables is None else ["--variables …"]
        options += [f"--key {name}" for name in self.key]
        options += [] if keys_of is None else [f"--keys-of {keys_of}"]
        options += [] if self.samples is None else [f"--samples {self.samples}"]
        options += [f"--repeat {self.repeat}"] if self.repeat > 1 else []
        options += [f"--{name}" for name in ("roofline", "eager") if getattr(self, name)]
        return " ".join(["%flax_apply", *options])

    @property
    def keeps(self) -> bool:
        """Whether what the model writes is kept."""
        return self.variables is None and self.keys_of is None and self.samples is None

    @cached_property
    def plain(self) -> bool:
        """Whether this is a single compiled run of the next draw with the model's own variables: no option but `mode`
        and `mutable`. Only such runs have a fast path.
        """
        return self.variables is None and self == ApplyOptions(mode=self.mode, mutable=self.mutable)


MESH_FORM = "%flax_mesh data=-1"


def mesh_axes(text: str) -> dict[str, int]:
    """Axis → size; commas or blanks stand between them.

    Raises:
      FlaxMagicsError: it is written otherwise.
    """
    axes: dict[str, int] = {}
    for part in filter(None, re.split(r"[\s,]+", text.strip())):
        name, equals, size = part.partition("=")
        if not equals or not name.isidentifier() or not re.fullmatch(r"-?[0-9]+", size):
            if not equals and nearest(part, ["off"]):
                raise FlaxMagicsError(f"`{part}` is no axis: did you mean off?", write="%flax_mesh off")
            message = f"`{part}` is no axis: a mesh is written by the names of its axes and their sizes."
            raise FlaxMagicsError(message, hint="-1 is for all devices that are left", write=MESH_FORM)
        if name in axes:
            raise FlaxMagicsError(f"the axis `{name}` has two sizes.", write=MESH_FORM)
        axes[name] = int(size)
    return axes


def check_axes(axes: Mapping[str, int]) -> None:
    """Raises FlaxMagicsError where there is no axis, a size is none, or more than one is -1."""
    if not axes:
        raise FlaxMagicsError("a mesh has at least one axis, as data=-1.")
    for name, size in axes.items():
        if isinstance(size, bool) or not isinstance(size, int) or (size < 1 and size != -1):
            message = f"{name}={size}: an axis has a number of devices, 1 or more, or -1 for all that are left."
            raise FlaxMagicsError(message, write=MESH_FORM)
    if list(axes.values()).count(-1) > 1:
        raise FlaxMagicsError(
            f"{axes_text(axes)}: only one axis can be -1, for all devices that are left.", write=MESH_FORM
        )


def axes_text(axes: Mapping[str, int]) -> str:
    """The axes as they are written: `data=4,model=2`."""
    return ",".join(f"{name}={size}" for name, size in axes.items())


KINDS = {
    "dropout": "every dropout is off in training, or on in evaluation",
    "norm": "BatchNorm is in the other mode than was asked",
    "mode": "training or evaluation was asked, and the model has no switch",
    "nan": "the output holds NaN",
    "stream": "a stream that is not Flax's own is asked for",
    "root key": "a key that the session splits is passed to a run",
    "key again": "a key that went into an earlier run is passed again",
    "same key": "one key is given to two arguments of a call",
    "unused key": "a key is passed that the model does not use",
    "mutable": "a collection is asked for by a name that the model does not have",
    "samples": "all samples of a run are the same, because no key went into them",
    "zero params": "all params are zero after init",
    "nan params": "params hold NaN after init",
    "scalar": "a Python number stands where an array was",
    "programs": "new programs keep being compiled for other shapes, dtypes or values of an argument",
    "masks": "with the keys of an earlier draw, a layer drew other numbers than in that draw's run",
    "replaced": "an init or an edit replaced weights that were set, loaded, trained or updated",
    "weights": "a name that held the model's weights holds others now, and the run used the model's",
    "outdated": "variables are from before an edit",
    "file": "a name stands for another module than was registered, and variables from a file wait for it",
    "rebound": "the name stands for another module than was registered",
    "name": "the name of a model was deleted, or holds something that is no module, and the model registered under it ran",
    "switch": "a loss leaves a switch of its net's call at its default",
    "freeze": "a pattern of --freeze matches no parameter",
    "gradient": "a layer has no gradient, and why",
    "constant": "another net in the call of a loss gets no gradient",
    "still": "the loss of a training has not moved in its last 50 steps",
    "stopped": "a training has ended before its last step, and the line that goes on with it",
    "resume": "a training goes on with other data, weights or code than it had, or an iterable that may give other batches",
    "doctor": "in the first report of a kernel, what is wrong with JAX there; see %flax_doctor",
    "mesh": "the last batch of each epoch cannot be cut over the axis `data`",
}
"""Kinds of notes on likely mistakes, by whose names `%config FlaxMagics.notes` turns them off, and when each is said."""
