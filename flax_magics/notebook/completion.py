"""Tab completion: options, model names, their methods and fields, and argument names.

The names of the commands themselves are completed by IPython, as those of any magic.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from ..base.tokens import Unbalanced, pieces, token_end
from ..line.commands import COMMANDS
from ..line.options import Command, Option

if TYPE_CHECKING:
    from ..state.handles import ModelNames

_COMMAND = re.compile(r"\s*(?:[^%#]*=\s*)?(?P<name>%{1,2}flax\w*)\s+(?P<rest>.*)", re.DOTALL)
_PATH = re.compile(r"[^\W\d]\w*(\.\w*)*")
STREAMS = ("params", "dropout")


def completions(line: str, text: str, commands: Mapping[str, Command], models: Mapping[str, ModelNames]) -> list[str]:
    """What may stand in the place of `text`, best first.

    Args:
      line: the line up to the cursor.
      text: the token before the cursor, as IPython cuts it (at white space, brackets and commas, not at dots).
      commands: by name, `%` signs included.
      models: the registered ones, by name.
    """
    line_match = _COMMAND.fullmatch(line)
    if line_match is None:
        return []
    name, rest = line_match["name"], line_match["rest"]
    bare = name.lstrip("%")
    command = commands.get(name) or commands.get(f"%{bare}") or commands.get(f"%%{bare}")
    if command is None:
        return []
    complete_options, position, waiting = _options_before(command, rest)
    if waiting is not None:
        return files(rest[position:], text) if waiting.metavar == "FILE" else []
    rest = rest[position:]
    if command.takes == "file" and not rest.startswith("-"):
        return [*files(rest, text), *(_options(command, "--", complete_options) if not rest else ())]
    if rest.startswith("-"):
        return _options(command, rest, complete_options)
    if not rest:
        return [*_targets(command, "", models), *_options(command, "--", complete_options)]
    if _PATH.fullmatch(rest):
        return _attributes(rest, text, models) if "." in rest else _targets(command, rest, models)
    return _arguments(rest, text, models) if command.takes == "call" else []


def _options_before(command: Command, rest: str) -> tuple[set[str], int, Option | None]:
    """The options that are complete, the index of what follows them, and the option whose value is being written."""
    given: set[str] = set()
    position, waiting = 0, None
    while position < len(rest):
        if rest[position].isspace():
            position += 1
            continue
        if waiting is None and rest[position] != "-":
            break
        try:
            end = token_end(rest, position)
        except Unbalanced:
            break
        if end == len(rest):
            break
        if waiting is None:
            written, equals, _ = rest[position:end].partition("=")
            option = command.flags.get(written)
            if option is not None:
                given.add(option.key)
                waiting = option if option.kind != "flag" and not equals else None
        else:
            waiting = None
        position = end
    return given, position, waiting


def _options(command: Command, start: str, given: set[str]) -> list[str]:
    repeated = {option.key for option in command.options if option.kind == "many"}
    return [
        flag
        for flag, option in command.flags.items()
        if flag.startswith(start) and (option.key not in given or option.key in repeated)
    ]


def files(start: str, text: str, most: int = 200) -> list[str]:
    """Folders and files whose name begins as `start` does, those that may be a saved session first.

    Args:
      text: the part of `start` that is replaced by what is found.
    """
    start, text = start.lstrip("'\""), text.lstrip("'\"")
    folder, _, name = start.rpartition("/")
    where = os.path.expanduser(folder + "/" if "/" in start else ".")
    names = []
    try:
        with os.scandir(where) as entries:
            for entry in entries:
                if entry.name.startswith(name) and (name or not entry.name.startswith(".")):
                    names.append(entry.name + ("/" if entry.is_dir() else ""))
    except OSError:
        return []
    names.sort(key=lambda one: (not one.endswith(".safetensors"), not one.endswith("/"), one))
    over = len(name) - len(text)  # what is typed may be cut at a bracket, or have a folder before it
    return (
        [one[over:] if over > 0 else text[: len(text) - len(name)] + one for one in names[:most]]
        if text
        else names[:most]
    )


def _targets(command: Command, start: str, models: Mapping[str, ModelNames]) -> list[str]:
    names: list[str] = []
    if command.takes in ("call", "model"):
        names = list(models)
    elif command.takes == "draw":
        names = ["last"]
    elif command.takes == "stream":
        names = [*STREAMS, *(stream for model in models.values() for stream in model.streams)]
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
    """`train=` where an argument of the call begins."""
    path = _PATH.match(rest)
    if path is None or rest[path.end() : path.end() + 1] != "(":
        return []
    target, _, method = path[0].partition(".")
    model = models.get(target)
    if model is None:
        return []
    depth, here, written = 0, path.end() + 1, set()
    for piece in pieces(rest, path.end()):
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
    """`completions` as IPython's completer calls it.

    Args:
      shell: an `InteractiveShell`.
      get_models: gives the registered models; must be cheap, and must not make a session.
      commands: by name, `%` signs included; left out, those of this package.
    """

    def __init__(
        self,
        shell: Any,
        get_models: Callable[[], Mapping[str, ModelNames]],
        commands: Mapping[str, Command] = COMMANDS,
    ) -> None:
        self.shell = shell
        self.get_models = get_models
        self.commands = commands

    def flax_matches(self, text: str) -> list[str]:
        """A matcher for every IPython."""
        try:
            return completions(self.shell.Completer.text_until_cursor, text, self.commands, self.get_models())
        except Exception:
            return []  # IPython would print the traceback into the line that is being typed

    def flax_matcher(self, context: Any) -> dict[str, Any]:
        """A matcher of version 2 (IPython ≥ 8.6): in the place of an option or a model, nothing else is offered."""
        from IPython.core.completer import SimpleCompletion

        line = self.shell.Completer.text_until_cursor
        token = re.split(r"[\s`!@#$^&*()=+\[{\]}\\|;:'\",<>?]", line)[-1]
        matches = self.flax_matches(token)
        only = bool(matches) and not matches[0].endswith("=")
        return {
            "completions": [SimpleCompletion(text=name, type="magic") for name in matches],
            "suppress": only,
            "matched_fragment": token,
        }

    flax_matcher.matcher_api_version = 2  # type: ignore[attr-defined]

    @property
    def hook(self) -> Callable[[Any], Any]:
        """The matcher that this version of IPython takes."""
        from IPython.core import completer

        return self.flax_matcher if hasattr(completer, "SimpleCompletion") else self.flax_matches


def install(shell: Any, matcher: Matcher) -> None:
    """Has the shell's completer ask `matcher`, once."""
    completer = getattr(shell, "Completer", None)
    if completer is not None and matcher.hook not in completer.custom_matchers:
        completer.custom_matchers.append(matcher.hook)


def uninstall(shell: Any, matcher: Matcher) -> None:
    """Takes `matcher` away again."""
    completer = getattr(shell, "Completer", None)
    if completer is not None and matcher.hook in completer.custom_matchers:
        completer.custom_matchers.remove(matcher.hook)
