"""Calls in Flax's own words on a command's line, such as `net.apply(variables, x)`, and the command that says the same.

They are refused, since a command would run them as methods of the model: `%flax_init net.init(key, x)` would then keep
what the method made, which are no variables of the model.
"""

from __future__ import annotations

import ast
import contextlib
import inspect
import re
from collections.abc import Mapping

from msgspec.structs import replace

from ..base.types import Record
from ..errors import FlaxMagicsError
from ..models.base import FLAX_ARGUMENTS, Idiom
from ..models.switch import call_switches, written_in_call
from ..state.entry import LinenEntry, ModelEntry, by_kind
from .call import BadCall, Call, init_shapes, of_module

INIT, APPLY, SUMMARY, CHECK = "%flax_init", "%flax_apply", "%flax_summary", "--check"

COMMANDS = {**dict.fromkeys(("init", "init_with_output", "lazy_init"), INIT), "apply": APPLY, "tabulate": SUMMARY}
"""Maps a method of Flax to the command that does the same."""

BOUND = frozenset(
    {"variable", "param", "has_variable", "get_variable", "put_variable", "is_mutable_collection", "has_rng", "sow"}
    | {"perturb", "is_initializing", "variables", "unbind", "setup", "scope", "parent", "path"}
)
"""Attributes of a linen module that only mean something inside the model, where it is bound."""


class Translation(Record, contextlib.AbstractContextManager["Translation"]):
    """Surrounds a call of the model: errors that come of Flax's own words become ones that name the command."""

    entry: ModelEntry
    call: Call

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, Idiom):
            raise (self._of_method(error) if error.method else self._of_argument(error.argument)) from None
        method, module = self.call.method, self.entry.model.module
        if isinstance(error, TypeError) and method and (len(method) > 1 or not hasattr(type(module), method[0])):
            # A submodule assigned in `setup` has no signature before it runs: what Python's own TypeError says is read.
            unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
            if unknown and unknown[1] in FLAX_ARGUMENTS.keys() & self.call.kwargs.keys():
                raise self._of_argument(unknown[1]) from None
        # Other messages of ours have named the mistake already.
        of_the_call = isinstance(error, BadCall) or not isinstance(error, FlaxMagicsError)
        if isinstance(error, Exception) and of_the_call and self._begins_with_variables():
            raise self._of_variables() from None

    @property
    def _function(self) -> str:
        return ".".join((self.entry.name, *self.call.method))

    # -- Flax's own methods

    def _of_method(self, error: Idiom) -> FlaxMagicsError:
        call, method, what = self.call, error.method, f"`{self._function}` is Flax's own"
        if method in COMMANDS:
            return self._of_command(COMMANDS[method])
        if method == "make_rng":
            named = [value for value in (*call.args, *call.kwargs.values()) if isinstance(value, str)]
            stream = named[0] if named and named[0].isidentifier() else "params"
            said = f"{what} and draws inside the model: outside, %flax_key draws."
            return self._error(said, [f"{stream}_key = %flax_key {stream}"], f"session.key('{stream}')")
        if method in ("variables", "get_variable", "has_variable") and error.linen and self.entry.variables is not None:
            said = f"{what} and looks at variables inside the model: outside, %flax_vars gives them."
            return self._error(
                said, [f"%flax_vars {self.entry.name}"], f"session.models['{self.entry.name}'].variables"
            )
        inside = method in BOUND or method.startswith("_") or len(call.method) > 1
        if method in ("sow", "perturb") or (error.linen and inside):
            said = f"{what} and for the code inside the model: a command runs a method of the model."
            form = f"session.apply('{self.entry.name}', …)" if not call.is_text else f"%flax_apply {self.entry.name}(…)"
            return FlaxMagicsError(said, form=form)
        said = f"{what} and needs no command: a command runs a method of the model."
        return self._error(said, [call.text], f"session.models['{self.entry.name}'].module.{'.'.join(call.method)}(…)")

    def _of_command(self, command: str) -> FlaxMagicsError:
        """The error for a method that a command replaces, with the same call without what the session passes itself."""
        what, argument = ("variables and keys", "variables") if command == APPLY else ("a key", "rngs")
        said = f"`{self._function}` is Flax's own, and {command} is the command for it: the session gives {what}."
        form = f"session.{command.removeprefix('%flax_')}('{self.entry.name}', …)"
        call, tree = self.call, _tree(self.call)
        if tree is None:
            return self._error(said, [], form)
        if call.command != CHECK and not call.command.startswith(command):
            call = replace(call, command=command)
        # `net.encoder.init(key, x)` becomes `net.encoder(x)`.
        tree.func = tree.func.value if isinstance(tree.func, ast.Attribute) else tree.func
        tree.keywords = [keyword for keyword in tree.keywords if keyword.arg != argument]
        first, tree.args = tree.args[:1], tree.args[1:]
        # In `net.apply(*arguments)` the first argument cannot be taken off.
        line = None if first and isinstance(first[0], ast.Starred) else _line(call, tree, None)
        return self._error(said, [line or call.text], form)

    # -- arguments of Flax's `apply` and `init`

    def _of_argument(self, argument: str) -> FlaxMagicsError:
        said = f"{self._function}() has no argument `{argument}`: {FLAX_ARGUMENTS[argument]}."
        tree = _tree(self.call)
        line = None if tree is None else _line(self.call, tree, self.entry.model.module)
        verb = "init" if "init" in self.call.command else "apply"
        return self._error(
            said, self._plain_flax() if line is None else [line], f"session.{verb}('{self.entry.name}', …)"
        )

    def _plain_flax(self) -> list[str]:
        """Lines that make the call by hand, where no option stands for an argument; none if they are unknown."""
        tree = _tree(self.call)
        return [] if tree is None or self.call.method else _plain_flax(self.entry, self.call.command, tree)

    # -- the variables as the first argument

    def _begins_with_variables(self) -> bool:
        """Whether the call's first argument is a pytree like the model's variables, as one passes it to `apply`."""
        value = self.call.args[0] if self.call.args else None
        if not isinstance(value, Mapping) or not value:
            return False
        entry, call = self.entry, replace(self.call, args=self.call.args[1:])
        with contextlib.suppress(Exception):  # it is no state of the module, or the call has another mistake, too
            held = entry.held
            shapes = init_shapes(entry.name, entry.linen.model, call, "threefry2x32") if held is None else held
            return entry.model.is_state(value, shapes)
        return False

    def _of_variables(self) -> FlaxMagicsError:
        said = f"{self._function}() takes no variables: the session passes its own."
        form = f"session.apply('{self.entry.name}', …)\nsession.apply('{self.entry.name}', …, variables=…)"
        tree = _tree(self.call)
        if tree is None:
            return self._error(said, [], form)
        first, *tree.args = tree.args
        command = self.call.command
        # The advised line has to run: a switch without a default needs a mode.
        if command.startswith((APPLY, SUMMARY)) and not {"--train", "--eval"} & set(command.split()):
            signature = self.entry.model.signature(self.call.method)
            switches = written_in_call(signature, self.call.args[1:], self.call.kwargs)
            missing = set(call_switches(signature)) - set(switches)
            needed = any(signature.parameters[name].default is inspect.Parameter.empty for name in missing)
            command += " --eval" * needed
        lines = [f"{command} {ast.unparse(tree)}"]
        if command.startswith(APPLY):
            lines.append(f"{command} --variables {_one_word(first)} {ast.unparse(tree)}")
        return self._error(said, lines, form)

    def _error(self, said: str, lines: list[str], form: str) -> FlaxMagicsError:
        """The error with `lines`, complete ones for a notebook, or `form`, for a script, whose calls have no text."""
        if not self.call.is_text:
            return FlaxMagicsError(said, form=form)
        if lines and lines[0].startswith(CHECK):
            return FlaxMagicsError(said, form=f"%flaxmodel --check {lines[0].removeprefix(CHECK).strip()!r} …")
        return FlaxMagicsError(said, write="\n".join(of_module(self.entry.name, self.entry.model, lines)) or None)


def _linen_by_hand(entry: LinenEntry, command: str, tree: ast.Call) -> list[str]:
    name, arguments = entry.name, ", ".join(map(ast.unparse, (*tree.args, *tree.keywords)))
    if command.startswith(INIT):
        return ["params_key = %flax_key params", f"variables = {name}.init(params_key, {arguments})"]
    if not command.startswith(APPLY):
        return []
    tree.keywords = [keyword for keyword in tree.keywords if keyword.arg not in FLAX_ARGUMENTS]
    variables = f"%flax_vars {name}" if entry.variables is not None else f"%flax_init {ast.unparse(tree)}"
    return [f"variables = {variables}", f"{name}.apply(variables, {arguments})"]


_plain_flax = by_kind(_linen_by_hand, lambda entry, command, tree: [])  # NNX's calls take none of Flax's arguments


def _tree(call: Call) -> ast.Call | None:
    """The call's syntax tree, parsed anew so that it may be edited; None where the call was not written as text."""
    if not call.is_text:
        return None
    tree = ast.parse(call.text, mode="eval").body
    assert isinstance(tree, ast.Call)
    return tree


def _line(call: Call, tree: ast.Call, module: object) -> str | None:
    """The command with each of Flax's arguments as an option or a method; None where one has neither.

    Args:
      module: its methods are those that `method=` may name; None where the model is not known.
    """
    words, keywords = [call.command], []
    applies = call.command.startswith(APPLY)
    for keyword in tree.keywords:
        value = call.kwargs.get(keyword.arg or "")
        if keyword.arg not in FLAX_ARGUMENTS:
            keywords.append(keyword)
        elif keyword.arg == "method":
            method = _method(value, module)
            if method is None:
                return None
            tree.func = ast.Attribute(tree.func, method) if method else tree.func
        elif keyword.arg == "mutable" and applies and value is not False:
            if not isinstance(value, (str, list, tuple)):
                return None
            words += [f"--mutable {name}" for name in ([value] if isinstance(value, str) else value)]
        elif keyword.arg == "variables" and applies:
            words.append(f"--variables {_one_word(keyword.value)}")
        elif keyword.arg == "capture_intermediates" and applies and value:
            return None
    tree.keywords = keywords
    return f"{' '.join(words)} {ast.unparse(tree)}"


def _method(value: object, module: object) -> str | None:
    """How `method=value` is written as a call: a name, empty for `__call__`; None for a function that is no method."""
    if value is None or isinstance(value, str):
        return value or ""
    name = getattr(value, "__name__", "")
    function = getattr(value, "__func__", value)
    if module is not None and getattr(type(module), name, None) is not function:
        return None
    return None if not name.isidentifier() else "" if name == "__call__" else name


def _one_word(node: ast.expr) -> str:
    """The expression's text as one word of an option: in parentheses where it may hold spaces outside of brackets."""
    text = ast.unparse(node)
    return text if isinstance(node, (ast.Name, ast.Attribute, ast.Subscript, ast.Dict, ast.Call)) else f"({text})"
