"""Mistakes in a loss of which Flax's error, or a gradient of nothing but zeros, tells too little: each in one message."""

from __future__ import annotations

import ast
import contextlib
import inspect
import os
import re
import textwrap
from collections.abc import Iterator, Mapping
from types import CodeType, TracebackType
from typing import Any

import jax
from flax import linen as nn

from ..base.text import cut, plural
from ..base.types import PyTree, Record
from ..code.library import is_module, library_file
from ..compile.placement import DATA, Placement
from ..errors import FlaxMagicsError
from ..execution.call import Call
from ..line.expression import with_arguments
from ..models.base import FLAX_ARGUMENTS
from ..models.calls import CallText, first_line, self_of
from ..models.switch import WHEN_TRAINING
from ..run import Note
from .data import ArrayData, Data, is_arrays
from .diagnosis import UNREAD
from .loss import Loss, transformed

LONGEST = 60
"""The most characters of a call that a message quotes."""
LACKS = re.compile(r"missing \d+ required .*'(\w+)'")
"""The message of Python's TypeError for a call without an argument."""


class mistakes_told(Record, contextlib.AbstractContextManager["mistakes_told"]):
    """A block that traces a loss: errors that come of a common mistake become a message that says what to write.

    Attributes:
      call: its arguments are those after the net.
      batch: of how many rows the batches are that the first of these is cut into; None where it is not.
    """

    loss: Loss
    call: Call
    batch: int | None = None

    def __exit__(self, kind: object, error: BaseException | None, trace: TracebackType | None) -> None:
        if isinstance(error, jax.errors.UnexpectedTracerError):
            # Of one that the user's own code has kept from an earlier trace JAX tells all there is to say.
            if f"{os.sep}flax{os.sep}" in str(error) or "DynamicJaxprTracer" not in str(error):
                raise transformed(self.loss.name, error) from None
        elif isinstance(error, Exception) and not isinstance(error, FlaxMagicsError):
            for code, names, call in _calls_in(trace):
                told = self._of_call(error, code, names, call)
                if told is not None:
                    raise told from None
            told = self._of_rows(error)
            if told is not None:
                raise told from None

    def _of_call(
        self, error: Exception, code: CodeType, names: Mapping[str, object], call: CallText
    ) -> FlaxMagicsError | None:
        """What to say where the loss, or a function that it calls, failed in `call`."""
        said, lacks = f"`{self.loss.name}` calls `{cut(call.text, LONGEST)}`", LACKS.search(str(error))
        if lacks and lacks[1] in WHEN_TRAINING and is_module(_value(call.tree.func, names)):
            switch = lacks[1]
            head = [] if switch in code.co_varnames else [first_line(code, switch)]
            edit = "\n  … ".join([*head, with_arguments(call.text, [f"{switch}={switch}"])])
            message = f"{said} without `{switch}`, which it needs: a parameter of the loss with that name is given it."
            return FlaxMagicsError(message, edit=edit, where="loss")
        first = next((name for name in code.co_varnames[: code.co_argcount] if name not in ("self", "cls")), "")
        plain = as_plain_call(call, names, first, certain=True)
        if plain is None:
            return None
        # What was called `params` is the net.
        head = [] if plain.startswith((f"{first}(", f"{first}.")) else [first_line(code, "net", in_place_of=first)]
        edit = "\n  … ".join([*head, plain])
        alone = ", and gives the output alone" if "mutable=" in call.text else ""
        return FlaxMagicsError(f"{said}: {AS_IT_IS}{alone}.", edit=edit, where="loss")

    def _of_rows(self, error: Exception) -> FlaxMagicsError | None:
        """What to say where arrays of all rows met those of a batch: the first argument alone is cut into batches."""
        rows = [_rows(value) for value in self.call.args]
        whole = [place for place in range(1, len(rows)) if rows[place] is not None and rows[place] == rows[0]]
        if self.batch is None or not whole or str(rows[0]) not in re.findall(r"\d+", str(error)):
            return None
        (net, *names), call = inspect.signature(self.loss.function).parameters, CallText(self.call.text, 1)
        written = [ast.get_source_segment(call.text, each) or "…" for each in call.tree.args]
        if len(written) != 1 + len(rows):  # some of them are starred
            return None
        together, left = (0, *whole), [place for place in range(1, len(rows)) if place not in whole]
        data, taken = (", ".join(texts[place] for place in together) for texts in (written[1:], names))
        others = [f"{each.arg}={ast.unparse(each.value)}" for each in call.tree.keywords]
        passed = ", ".join([written[0], f"({data})", *(written[1 + place] for place in left), *others])
        taking = ", ".join(
            [net, "batch", *(names[place] for place in left), *(other.partition("=")[0] for other in others)]
        )
        what = f"{self.batch} rows of `{written[1]}`, and all {rows[0]} of `{written[1 + whole[0]]}`"
        return FlaxMagicsError(
            f"`{self.loss.name}` is given {what}: only the first argument after the net is cut into batches.",
            form=f"def {self.loss.name.rpartition('.')[2]}({taking}):\n  {taken} = batch\n  …\n"
            f"{self.call.command} {self.loss.name}({passed})",
        )


AS_IT_IS = "in a loss the model is the first argument, and is called as it is, without `apply` and variables"


def as_plain_call(call: CallText, names: Mapping[str, object], net: str, *, certain: bool) -> str | None:
    """How a call in Flax's own words is written in a loss, such as `net(x)` for `net.apply(variables, x)`; else None.

    These are the `apply` of a linen module, and the call of one that is not bound.

    Args:
      names: what is seen where the call stands.
      net: the first parameter of the function around it, which may stand for variables in the call.
      certain: only an `apply` that is given no variables, or is that of the net itself.
    """
    tree, applied, method = call.tree, False, ""
    module = _value(tree.func, names)
    if not isinstance(module, nn.Module) and isinstance(tree.func, ast.Attribute):
        module, applied = _value(tree.func.value, names), tree.func.attr == "apply"
        method = "" if applied else f".{tree.func.attr}"
    if not isinstance(module, nn.Module) or (not applied and module.scope is not None):
        return None
    args = [ast.get_source_segment(call.text, each) or "…" for each in tree.args]
    if applied:
        passed = {each.id for each in ast.walk(tree.args[0]) if isinstance(each, ast.Name)} if tree.args else set[str]()
        is_net = ast.unparse(tree.func) == f"{net}.apply"
        if certain and not is_net and not any(is_module(names.get(name)) for name in passed):
            return None
        net, args = "net" if net in passed else net, args[1:]
        named = [each.value for each in tree.keywords if each.arg == "method"]
        # A name as a string, or a method of the class.
        method = "".join("." + ast.unparse(each).strip("'").rpartition(".")[2] for each in named)
    keywords = [each for each in tree.keywords if each.arg not in FLAX_ARGUMENTS]
    args += [f"{each.arg}={ast.get_source_segment(call.text, each.value)}" for each in keywords]
    return f"{net or 'net'}{method}({', '.join(args)})"


def instead_of_net(loss: Loss) -> tuple[str, str] | None:
    """A call in the source of a loss that does not call the net, in Flax's own words, and how it is written."""
    function = inspect.unwrap(loss.function)
    try:
        source = textwrap.dedent(inspect.getsource(function))
        tree = ast.parse(source)
        seen = {**function.__globals__, **inspect.getclosurevars(function).nonlocals}
        # In a notebook a parameter is often called as the model is.
        names = {name: value for name, value in seen.items() if name not in function.__code__.co_varnames}
    except (OSError, TypeError, SyntaxError, AttributeError):
        return None
    net = next(iter(inspect.signature(function).parameters), "")
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            segment = ast.get_source_segment(source, node)
            call = CallText(ast.unparse(node) if segment is None or "\n" in segment else segment, node.lineno)
            plain = as_plain_call(call, names, net, certain=False)
            if plain is not None:
                return call.text, plain
    return None


def without_net(loss: Loss, remarks: list[Note], modules: int) -> list[Note]:
    """The notes with one in the place of all that say the same of each module: that the loss calls another than the net.

    Args:
      modules: how many there are with parameters to train.
    """
    unread = [note for note in remarks if note.text.endswith(UNREAD)]
    instead = instead_of_net(loss) if unread and len(unread) == modules else None
    if instead is None:
        return remarks
    text, plain = instead
    note = Note("gradient", f"`{loss.name}` calls `{cut(text, LONGEST)}`: {AS_IT_IS}", edit=plain, where="loss")
    return [note, *(each for each in remarks if each not in unread and each.kind not in ("dropout", "norm", "switch"))]


def _calls_in(trace: TracebackType | None) -> Iterator[tuple[CodeType, Mapping[str, Any], CallText]]:
    """The calls of the user's functions, not of modules, in which an error came about: innermost first.

    For each the function's code, and what it sees by name.
    """
    for frame, instruction in reversed([(step.tb_frame, step.tb_lasti) for step in _steps(trace)]):
        ours = str(frame.f_globals.get("__name__")).startswith("flax_magics.")
        if ours or library_file(frame.f_code.co_filename) or self_of(frame) is not None:
            continue
        call = CallText.at(frame.f_code, instruction)
        if call is not None:
            yield frame.f_code, {**frame.f_globals, **frame.f_locals}, call


def _rows(tree: PyTree) -> int | None:
    """How many rows all arrays of a tree have; None where they have none, or not the same number."""
    if not is_arrays(tree):
        return None
    shapes = {tuple(leaf.shape)[:1] for leaf in jax.tree_util.tree_leaves(tree)}
    return next(iter(shapes), (None,))[0] if len(shapes) == 1 and () not in shapes else None


def _steps(trace: TracebackType | None) -> Iterator[TracebackType]:
    while trace is not None:
        yield trace
        trace = trace.tb_next


def _value(node: ast.expr, names: Mapping[str, object]) -> object:
    """The value of a name with dots; None for any other expression."""
    if isinstance(node, ast.Attribute):
        return getattr(_value(node.value, names), node.attr, None)
    return names.get(node.id) if isinstance(node, ast.Name) else None


def notes_of_last(data: Data, batch: int | None, placement: Placement | None) -> tuple[Note, ...]:
    """A note where the last, shorter batch of an epoch cannot be cut into equal parts."""
    if placement is None or batch is None or not isinstance(data, ArrayData):
        return ()
    rows = data.size % batch
    if not rows % placement.parts:
        return ()
    has = f"the last batch of each epoch has {plural(rows, 'row')}"
    return (Note("mesh", f"{has}, which {DATA}={placement.parts} does not divide: it is whole on each device"),)
