"""Tab completion: options and their values, models, their methods and fields, draws, settings, and names in a call.

IPython itself completes the names of the commands, as of any magic.
"""

from __future__ import annotations

import builtins
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from types import FunctionType
from typing import TYPE_CHECKING, Any, NamedTuple

from traitlets import Bool, Dict, Enum, Int, TraitType

from ..base.tokens import Unbalanced, pieces, token_end, variable_name
from ..code.library import is_module, is_module_class
from ..line.commands import COMMANDS, FLAX_GRAD
from ..line.options import KINDS, Command, Option

if TYPE_CHECKING:
    from ..state.handles import ModelNames

_COMMAND = re.compile(r"\s*(?:[^%#]*=\s*)?(?P<name>%{1,2}flax\w*)\s+(?P<rest>.*)", re.DOTALL)
_SETTING = re.compile(r"\s*%config\s+FlaxMagics\.(?P<name>\w+)\s*=\s*(?P<rest>.*)", re.DOTALL)
_PATH = re.compile(r"[^\W\d]\w*(\.\w*)*")
_BEFORE_A_NAME = re.compile(r"(?:^|[(\[{,=:+\-*/%<>&|^~@]|\b(?:and|await|else|for|if|in|is|lambda|not|or))$")
"""Matches code behind which an expression, and so a name, begins."""
DRAWS = 20
"""How many draws are offered, the last ones."""


class Names(NamedTuple):
    """The names that completion offers.

    Attributes:
      values: the names of the notebook's own, with their values.
      models: names of the registered models, by model.
      draws: how many draws have been made under this seed.
    """

    values: Mapping[str, object] = {}
    models: Mapping[str, ModelNames] = {}
    draws: int = 0


def completions(line: str, text: str, commands: Mapping[str, Command], names: Names) -> list[str]:
    """What can stand in the place of `text`, best first.

    Args:
      line: the line up to the cursor.
      text: the token before the cursor, as IPython cuts it: at white space, brackets and commas, but not at dots.
      commands: by name, `%` signs included.
    """
    line_match = _COMMAND.fullmatch(line)
    if line_match is None:
        return []
    bare, rest = line_match["name"].lstrip("%"), line_match["rest"]
    command = next((commands[sign + bare] for sign in ("%", "%%") if sign + bare in commands), None)
    if command is None:
        return []
    written, position, waiting = _options_before(command, rest)
    before, rest = rest[:position].split(), rest[position:]
    # The value of an option is being typed.
    if waiting is not None:
        return [choice for choice in _choices(waiting.takes, rest, text, names) if choice not in before]
    flag_start = rest or "--"
    flags = [
        flag
        for flag, option in command.flags.items()
        if flag.startswith(flag_start) and (option not in written or option.many)
    ]
    if rest.startswith("-"):
        return flags
    takes = "loss" if command is FLAX_GRAD else command.takes
    return [*_choices(takes, rest, text, names), *(flags if not rest or command.takes == "file" else ())]


def values_of_setting(line: str, text: str, settings: Mapping[str, TraitType[Any, Any]]) -> list[str]:
    """The values that `%config FlaxMagics.NAME = ` can set, as they are written; without a quote that is there."""
    setting = _SETTING.fullmatch(line)
    trait = None if setting is None else settings.get(setting["name"])
    if setting is None or trait is None:
        return []
    values: tuple[object, ...] = ()
    inside: tuple[str, ...] = ()
    match trait:
        case Enum():
            values = inside = tuple(trait.values or ())
        case Dict():
            values, inside = tuple({kind: False} for kind in KINDS), tuple(KINDS)
        case Bool():
            values = (True, False)
        case Int():
            values = (trait.default_value,)
    quoted = any(piece.kind == "quote" for piece in pieces(setting["rest"]))
    if not quoted and setting["rest"] != text:
        return []
    return [value for value in (inside if quoted else map(repr, values)) if value.startswith(text)]


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
            end = len(rest)
        flag, equals, _ = rest[position:end].partition("=")
        option = command.flags.get(flag) if waiting is None else None
        # The last token is still being typed.
        if end == len(rest):
            if option is not None and option.metavar is not None and equals:
                return complete | {option}, position + len(flag) + 1, option
            break
        if option is not None:
            complete.add(option)
        waiting = option if option is not None and option.metavar is not None and not equals else None
        position = end
    return complete, position, waiting


def _choices(takes: str, rest: str, text: str, names: Names) -> list[str]:
    """What can stand where an option or a command takes something, see `Command.takes` and `Option.takes`.

    Args:
      rest: what is typed of it, of which `text` is the end.
    """
    values, models = names.values, names.models
    choices: Iterable[str] = ()
    match takes:
        case "file":
            return files(rest, text)
        case "variables":
            return _expression(rest, text, values, lambda value: isinstance(value, Mapping))
        case "loss" if "(" in rest:
            return _expression(rest, text, values, _is_array if "," in rest else _is_instance)
        case "loss":
            choices = [name for name, value in values.items() if isinstance(value, FunctionType) and name[:1] != "_"]
        case "call" if not _PATH.fullmatch(rest) and rest:
            return _in_call(rest, text, names)
        case "call" if "." in rest:
            return _attributes(rest, text, models)
        case "model" | "assignment" if "=" in rest:
            wanted = _is_model if takes == "assignment" else lambda value: isinstance(value, Mapping)
            return _expression(rest.partition("=")[2], text, values, wanted)
        case "call" | "model":
            choices = models
        case "assignment":
            instances = [name for name, value in values.items() if _is_instance(value)]
            classes = [value for value in values.values() if _is_model(value) and isinstance(value, type)]
            classes = [cls for cls in classes if cls.__module__.partition(".")[0] != "flax"]
            instances.sort(key=lambda name: name in models)
            choices = [*instances, *models, *(f"{variable_name(cls.__name__)} = {cls.__name__}(" for cls in classes)]
        case "mesh":
            choices = ["data=-1", "off"]
        case "stream":
            choices = ["params", "dropout", *(stream for model in models.values() for stream in model.streams)]
        case "collection":
            collections = [collection for model in models.values() for collection in model.collections]
            # What runs write comes before what an init makes.
            choices = sorted(collections, key=lambda name: name in ("params", "Param"))
        case "argument":
            arguments = [name for model in models.values() for method in model.methods.values() for name in method]
            choices = sorted(arguments, key=lambda name: re.search("key|rng|seed|noise", name) is None)
        case "draw":
            run = getattr(sys.modules.get("flax_magics.run"), "Run", ())
            runs = [name for name, value in values.items() if isinstance(value, run)]
            choices = ["last", *runs, *map(str, range(names.draws, max(names.draws - DRAWS, 0), -1))]
    return [choice for choice in dict.fromkeys(choices) if choice.startswith(rest)]


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


def _attributes(path: str, text: str, models: Mapping[str, ModelNames]) -> list[str]:
    owner, _, start = path.rpartition(".")
    model = models.get(owner)
    if model is None:
        return []
    path_start = text[: len(text) - len(start)]
    names = [name for name in (*model.methods, *model.fields) if name != "__call__"]
    return [path_start + name for name in dict.fromkeys(names) if name.startswith(start)]


def _in_call(rest: str, text: str, names: Names) -> list[str]:
    """What can stand inside the brackets of a call; where an argument begins, `name=` for each that is not given yet."""
    path = _PATH.match(rest)
    if path is None or rest[path.end() : path.end() + 1] != "(":
        return []
    depth, here, written = 0, path.end() + 1, set[str]()
    for piece in pieces(rest, path.end()):
        depth = piece.depth
        if depth == 1 and piece.kind == "word":
            for comma in re.finditer(",", rest[piece.start : piece.end]):
                here = piece.start + comma.end()
            named = re.match(r"(?:.*,)?(\w+)=(?!=)", rest[piece.start : piece.end])
            if named:
                written.add(named[1])
    if not depth:
        return []
    target, _, method = path[0].partition(".")
    model = names.models.get(target)
    begins = model is not None and depth == 1 and rest[here:].strip() == text
    arguments = model.methods.get(method or "__call__", ()) if model is not None and begins else ()
    keywords = [f"{name}=" for name in arguments if name not in written]
    return _expression(rest[path.end() :], text, names.values, _is_array, keywords)


def _expression(
    code: str, text: str, values: Mapping[str, object], wanted: Callable[[object], bool], keywords: Iterable[str] = ()
) -> list[str]:
    """Names that can stand at the end of `code`: those whose value is `wanted`, `keywords`, and the others by name.

    Empty inside of a string, and where no name begins. Builtins are offered once a letter is typed.
    """
    before = code[: len(code) - len(text)].rstrip()
    if not (text == "" or text.isidentifier()) or not _BEFORE_A_NAME.search(before):
        return []
    if any(piece.kind in ("quote", "comment") for piece in pieces(code)):
        return []
    known = [name for name in values if name.startswith(text) and (text or not name.startswith("_"))]
    first = [name for name in known if wanted(values[name])]
    library = [name for name in dir(builtins) if text and name.startswith(text)]
    keywords = [keyword for keyword in keywords if keyword.startswith(text)]
    return list(dict.fromkeys([*first, *keywords, *sorted(known), *library]))


def _is_array(value: object) -> bool:
    kinds = (getattr(sys.modules.get("jax"), "Array", None), getattr(sys.modules.get("numpy"), "ndarray", None))
    return isinstance(value, tuple(kind for kind in kinds if kind is not None))


def _is_model(value: object) -> bool:
    """Whether `value` is a Flax module or a class of modules; looking does not import Flax."""
    return "flax.linen" in sys.modules and (is_module(value) or is_module_class(value))


def _is_instance(value: object) -> bool:
    """Whether `value` is a Flax module, the first argument of a loss."""
    return _is_model(value) and not isinstance(value, type)


class Matcher:
    """Connects `completions` with IPython's completer.

    Args:
      shell: an `InteractiveShell`.
      get_names: returns the names to offer; must be fast, and must not make a session.
      settings: the traits that `%config FlaxMagics` sets.
    """

    def __init__(
        self, shell: Any, get_names: Callable[[], Names], settings: Mapping[str, TraitType[Any, Any]] | None = None
    ) -> None:
        self.shell, self.get_names, self.settings = shell, get_names, settings or {}

    def _token(self) -> tuple[str, str]:
        """The line up to the cursor, and the token before the cursor as IPython cuts it."""
        completer = self.shell.Completer
        line = completer.text_until_cursor
        return line, completer.splitter.split_line(line, len(line))

    def flax_matches(self, _: str = "") -> list[str]:
        """The matcher for IPython before 8.6. As one of a magic's arguments it comes first, and alone if it has any."""
        try:
            line, token = self._token()
            return values_of_setting(line, token, self.settings) or completions(line, token, COMMANDS, self.get_names())
        except Exception:
            return []  # IPython would print a traceback into the line that is being typed

    def flax_matcher(self, context: Any) -> dict[str, Any]:
        """The matcher of version 2 (IPython ≥ 8.6). Where it has matches, nobody else is asked: Jedi alone takes long."""
        from IPython.core.completer import SimpleCompletion

        matches = self.flax_matches()
        return {
            "completions": [SimpleCompletion(text=name, type="magic") for name in matches],
            "suppress": bool(matches),
            "ordered": True,
            "matched_fragment": self._token()[1],
        }

    flax_matcher.matcher_api_version = 2  # type: ignore[attr-defined]

    def install(self) -> None:
        """Adds the matcher to the shell's completer, in the form that this version of IPython takes."""
        from IPython.core import completer

        is_new = hasattr(completer, "SimpleCompletion")
        self._hook = self.flax_matcher if is_new else self.flax_matches
        theirs = self.shell.Completer
        self._matchers = theirs.custom_matchers if is_new else theirs.magic_arg_matchers
        self._matchers.insert(0, self._hook)

    def uninstall(self) -> None:
        """Removes the matcher."""
        with suppress(ValueError):  # the completer was replaced meanwhile
            self._matchers.remove(self._hook)
