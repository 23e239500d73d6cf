"""The error type of all commands, the advice in its message, and "did you mean".

Nothing here imports IPython, JAX or Flax: an error must be cheap to raise and safe to render.
"""

from __future__ import annotations

import textwrap
import unicodedata
from collections.abc import Callable, Iterable
from typing import ClassVar


class FlaxMagicsError(Exception):
    """A mistake in using a command: what is wrong, why, and what to write instead.

    The message is complete by itself, so a notebook shows it without a traceback: IPython calls `_render_traceback_` of
    an exception instead of formatting frames. The cell still fails, and Run All and nbclient stop.

    Args:
      message: one sentence that says what is wrong and why.
      write: complete lines that can be pasted and run instead.
      form: lines with a gap (`…`) that the reader has to fill.
      edit: an edit of the user's own code, in their `where`: the `model`, or the `loss`.
      hint: one more line, such as the nearest names.
    """

    before_shown: ClassVar[Callable[[FlaxMagicsError], int]] = lambda error: 0
    """Called with an error that IPython is about to show: gives the columns of its lines, 0 for any number of them."""

    def __init__(
        self,
        message: str,
        *,
        write: str | None = None,
        form: str | None = None,
        edit: str | None = None,
        where: str = "model",
        hint: str | None = None,
    ) -> None:
        # What a message quotes may come from anywhere: a file, a name in a dict, a line that was pasted.
        message, (write, form, edit, hint) = (
            visible(message),
            (text and visible(text) for text in (write, form, edit, hint)),
        )
        self.message, self.write, self.form, self.edit, self.hint = message, write, form, edit, hint
        self.where = where
        below = [*(hint or "").splitlines(), *advice_lines(write, form, edit, where)]
        super().__init__("\n".join([message, *(f"  {line}" for line in below)]))

    def _render_traceback_(self) -> list[str]:
        lines = f"{type(self).__name__}: {self}".split("\n")
        # Terminals and JupyterLab break long lines within words. Advice may be there to paste, and stays whole.
        columns = FlaxMagicsError.before_shown(self)
        if columns:
            wrapper = textwrap.TextWrapper(columns, subsequent_indent="  ")
            wrapper.break_long_words = wrapper.break_on_hyphens = False
            first, hints = wrapper.wrap(lines[0]), lines[1 : 1 + len((self.hint or "").splitlines())]
            wrapper.subsequent_indent = "    "
            below = lines[1 + len(hints) :]
            # Nothing is moved from above the mark that points at it.
            if not any(line.strip() == "^" for line in hints):
                hints = [part for line in hints for part in wrapper.wrap(line)]
            lines = [*first, *hints, *below]
        return ["\n".join(lines)]


_HIDDEN = ("Cc", "Cf", "Cs", "Zl", "Zp")


def visible(text: str, *, keeps: str = "\n\t") -> str:
    """`text` with its invisible characters as their escapes, those in `keeps` left out.

    A user's strings may hold control characters, which a terminal obeys, and marks that reverse the text's direction.
    """
    if text.isascii() and text.isprintable():  # a fraction of the cost of looking up every character
        return text
    return "".join(
        character.encode("unicode_escape").decode()
        if character not in keeps and unicodedata.category(character) in _HIDDEN
        else character
        for character in text
    )


def advice(write: str | None, form: str | None, edit: str | None, where: str) -> list[tuple[str, str]]:
    """(label, text) of each given piece of advice; the label says how the text is meant.

    `write: ` precedes complete lines that can be pasted and run, `form: ` a text with a gap (`…`), and
    `in your model: ` an edit of the user's code; `where` is what is edited, the `model` or the `loss`.
    """
    labelled = (("write: ", write), ("form: ", form), (f"in your {where}: ", edit))
    return [(label, text) for label, text in labelled if text]


def advice_lines(
    write: str | None = None, form: str | None = None, edit: str | None = None, where: str = "model"
) -> list[str]:
    """`advice` as lines of a message; further lines of a text are indented under its first."""
    lines = []
    for label, text in advice(write, form, edit, where):
        first, *rest = text.splitlines()
        lines += [f"{label}{first}", *(" " * len(label) + line for line in rest)]
    return lines


def written(text: str) -> dict[str, str]:
    """Keyword arguments of `FlaxMagicsError` for the advice `text`: `write`, or `form` where it has a gap (`…`).

    A `%%` line by itself gets a gap for the body of its cell.
    """
    if text.startswith("%%") and "\n" not in text and "…" not in text:
        text += "\n…"
    return {"form" if "…" in text else "write": text}


def nearest(name: str, known: Iterable[str], n: int = 3) -> list[str]:
    """At most `n` names in `known` that resemble `name`, nearest first.

    Case is ignored at first; it decides between names that are equally near, then the order of `known`.
    """
    import difflib  # a millisecond that only mistakes cost

    def likeness(one: str, other: str) -> float:
        return difflib.SequenceMatcher(None, one, other).ratio()

    near = []
    for place, choice in enumerate(dict.fromkeys(known)):
        folded = likeness(name.lower(), choice.lower())
        if folded >= 0.6:  # the default cutoff of `difflib.get_close_matches`
            near.append((-folded, -likeness(name, choice), place, choice))
    return [choice for *_, choice in sorted(near)[:n]]


def did_you_mean(name: str, *known: Iterable[str]) -> str | None:
    """`did you mean dropout?`, or None where no name is near.

    Args:
      known: groups of names, the likeliest first; only the first group with a near name is suggested from.
    """
    near = next(filter(None, (nearest(name, group) for group in known)), [])
    return f"did you mean {' or '.join(near)}?" if near else None
