"""Tab completion of options, model names, their methods and fields, and argument names.

IPython itself completes the names of the commands, as of any magic.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from ..base.tokens import Unbalanced, pieces, token_end
from ..line.commands import COMMANDS
from ..line.options import Command, Option

if TYPE_CHECKING:
    from ..state.handles import ModelNames

_COMMAND = re.compile(r"\s*(?:[^%#]*=\s*)?(?P<name>%{1,2}flax\w*)\s+(?P<rest>.*)", re.DOTALL)
_PATH = re.compile(r"[^\W\d]\w*(\.\w*)*")


def completions(line: str, text: str, commands: Mapping[str, Command], models: Mapping[str, ModelNames]) -> list[str]:
    """What can stand in the place of `text`, best first.

    Args:
      line: the line up to the cursor.
      text: the token before the cursor, as IPython cuts it: at white space, brackets and commas, but not at dots.
      commands: by name, `%` signs included.
      models: names of the registered models, by model.
    """
    line_match = _COMMAND.fullmatch(line)
    if line_match is None:
        return []
    bare, rest = line_match["name"].lstrip("%"), line_match["rest"]
    command = next((commands[sign + bare] for sign in ("%", "%%") if sign + bare in commands), None)
    if command is None:
        return []
    written, position, waiting = _options_before(command, rest)
    rest = rest[position:]
    # The value of an option is being typed: only file names can be offered.
    if waiting is not None:
        return files(rest, text) if waiting.metavar == "FILE" else []
    flag_start = rest or "--"
    flags = [
        flag
        for flag, option in command.flags.items()
        if flag.startswith(flag_start) and (option not in written or option.many)
    ]
    if rest.startswith("-"):
        return flags
    if command.takes == "file":
        return [*files(rest, text), *flags]
    if not rest:
        return [*_targets(command, "", models), *flags]
    if _PATH.fullmatch(rest):
        return _attributes(rest, text, models) if "." in rest else _targets(command, rest, models)
    return _arguments(rest, text, models) if command.takes == "call" else []


def _options_before(command: Command, rest: str) -> tuple[set[Option], int, Option | None]:
    """The options that are complete, where the text after them begins, and the option whose value is being typed."""
    complete, position, waiting = set[Option](), 0, None
    while position < len(rest) and (waiting is not None or rest[position] == "-" or rest[position].isspace()):
        if rest[position].isspace():
            position += 1
            continue
        try:
            end = token_end(rest, position)
        except Unbalanced:
            break
        # The last token is still being typed.
        if end == len(rest):
            break
        flag, equals, _ = rest[position:end].partition("=")
        option = command.flags.get(flag) if waiting is None else None
        if option is not None:
            complete.add(option)
        waiting = option if option is not None and option.metavar is not None and not equals else None
        position = end
    return complete, position, waiting


def files(start: str, text: str, most: int = 200) -> list[str]:
    """Folders and files that begin with `start`, files that may be a saved session first.

    Args:
      text: the end of `start`, which each result replaces.
    """
    start, text = start.lstrip("'\""), text.lstrip("'\"")
    folder, _, name = start.rpartition("/")
    where = os.path.expanduser(folder + "/" if "/" in start else ".")
    try:
        with os.scandir(where) as entries:
            names = [entry.name + "/" * entry.is_dir() for entry in entries if entry.name.startswith(name)]
    except OSError:
        return []
    # Hidden files are offered once a dot is typed.
    names = [each for each in names if name or not each.startswith(".")]
    names.sort(key=lambda each: (not each.endswith(".safetensors"), not each.endswith("/"), each))
    # IPython's token may begin inside the file's name (after a bracket), or before it (at the folder).
    over = len(name) - len(text) if text else 0
    return [text[: max(-over, 0)] + each[max(over, 0) :] for each in names[:most]]


def _targets(command: Command, start: str, models: Mapping[str, ModelNames]) -> list[str]:
    streams = ("params", "dropout", *(stream for model in models.values() for stream in model.streams))
    names = {"call": models, "model": models, "draw": ("last",), "stream": streams}.get(command.takes, ())
    return [name for name in dict.fromkeys(names) if name.startswith(start)]


def _attributes(path: str, text: str, models: Mapping[str, ModelNames]) -> list[str]:
    owner, _, start = path.rpartition(".")
    model = models.get(owner)
    if model is None:
        return []
    path_start = text[: len(text) - len(start)]
    names = [name for name in (*model.methods, *model.fields) if name != "__call__"]
    return [path_start + name for name in dict.fromkeys(names) if name.startswith(start)]


def _arguments(rest: str, text: str, models: Mapping[str, ModelNames]) -> list[str]:
    """`name=` for each argument of the call that is not given yet, where an argument begins; else nothing."""
    path = _PATH.match(rest)
    if path is None or rest[path.end() : path.end() + 1] != "(":
        return []
    target, _, method = path[0].partition(".")
    model = models.get(target)
    if model is None:
        return []
    depth, here, written = 0, path.end() + 1, set[str]()
    for piece in pieces(rest, path.end()):
        # Inside of a string or a comment.
        if piece.kind in ("quote", "comment"):
            return []
        depth = piece.depth
        if depth == 1 and piece.kind == "word":
            for comma in re.finditer(",", rest[piece.start : piece.end]):
                here = piece.start + comma.end()
            named = re.match(r"(?:.*,)?(\w+)=(?!=)", rest[piece.start : piece.end])
            if named:
                written.add(named[1])
    if depth != 1 or rest[here:].strip() != text:
        return []
    names = model.methods.get(method or "__call__", ())
    return [f"{name}=" for name in names if name.startswith(text) and name not in written]


class Matcher:
    """Connects `completions` with IPython's completer.

    Args:
      shell: an `InteractiveShell`.
      get_models: returns the names of the registered models; must be fast, and must not make a session.
    """

    def __init__(self, shell: Any, get_models: Callable[[], Mapping[str, ModelNames]]) -> None:
        self.shell, self.get_models = shell, get_models

    def flax_matches(self, text: str) -> list[str]:
        """The matcher for versions of IPython that only take the token."""
        try:
            return completions(self.shell.Completer.text_until_cursor, text, COMMANDS, self.get_models())
        except Exception:
            return []  # IPython would print a traceback into the line that is being typed

    def flax_matcher(self, context: Any) -> dict[str, Any]:
        """The matcher of version 2 (IPython ≥ 8.6): beside an option or a model, it suppresses all other matches."""
        from IPython.core.completer import SimpleCompletion

        line = self.shell.Completer.text_until_cursor
        token = re.split(r"[\s`!@#$^&*()=+\[{\]}\\|;:'\",<>?]", line)[-1]
        matches = self.flax_matches(token)
        return {
            "completions": [SimpleCompletion(text=name, type="magic") for name in matches],
            # Where an argument begins, any expression may stand: other completions are still of use.
            "suppress": bool(matches) and not matches[0].endswith("="),
            "matched_fragment": token,
        }

    flax_matcher.matcher_api_version = 2  # type: ignore[attr-defined]

    def install(self) -> None:
        """Adds the matcher to the shell's completer, in the form that this version of IPython takes."""
        from IPython.core import completer

        self._hook = self.flax_matcher if hasattr(completer, "SimpleCompletion") else self.flax_matches
        self.shell.Completer.custom_matchers.append(self._hook)

    def uninstall(self) -> None:
        """Removes the matcher."""
        with suppress(ValueError):  # the completer was replaced meanwhile
            self.shell.Completer.custom_matchers.remove(self._hook)
