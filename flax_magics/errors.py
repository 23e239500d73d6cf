"""The one error type, how it is shown, and "did you mean".

Nothing here imports IPython, JAX or Flax: an error must be cheap to raise and safe to render.
"""

from __future__ import annotations

from collections.abc import Iterable


class FlaxMagicsError(Exception):
    """A mistake in using a command: what, why, and what to write instead.

    The message is complete by itself, so a notebook shows it without a traceback. IPython asks an exception for
    `_render_traceback_` before it formats frames, and the cell is still an error (Run All and nbclient stop).

    Args:
      message: one sentence that says what is wrong and why.
      write: complete lines that can be pasted and run instead.
      form: the same with a gap (`…`) that the reader has to fill.
      edit: an edit of the user's own code.
      hint: one more line, such as the nearest names.
    """

    def __init__(
        self,
        message: str,
        *,
        write: str | None = None,
        form: str | None = None,
        edit: str | None = None,
        hint: str | None = None,
    ) -> None:
        self.message, self.write, self.form, self.edit, self.hint = message, write, form, edit, hint
        below = [*(hint or "").splitlines(), *advice_lines(write, form, edit)]
        super().__init__("\n".join([message, *(f"  {line}" for line in below)]))

    def _render_traceback_(self) -> list[str]:
        return [f"{type(self).__name__}: {self}"]


def advice(write: str | None, form: str | None, edit: str | None) -> list[tuple[str, str]]:
    """What a message advises, each text after the label that says how it is meant.

    `write: ` stands before complete lines that can be pasted and run, `form: ` before a text with a gap (`…`), and
    `in your model: ` before an edit of the user's code.
    """
    return [(label, text) for label, text in (("write: ", write), ("form: ", form), ("in your model: ", edit)) if text]


def advice_lines(write: str | None = None, form: str | None = None, edit: str | None = None) -> list[str]:
    """`advice` as lines of text; further lines of a text stand under its first."""
    lines = []
    for label, text in advice(write, form, edit):
        first, *rest = text.splitlines()
        lines += [f"{label}{first}", *(" " * len(label) + line for line in rest)]
    return lines


def written(text: str) -> dict[str, str]:
    """`text` as the `write` of a message, or as its `form` where it has a gap.

    The first line of a `%%` cell alone is no cell: its body is the gap.
    """
    if text.startswith("%%") and "\n" not in text and "…" not in text:
        text += "\n…"
    return {"form" if "…" in text else "write": text}


def nearest(name: str, known: Iterable[str], n: int = 3) -> list[str]:
    """The names in `known` that a person may have meant by `name`, nearest first, at most `n`.

    Upper and lower case decide between names that are equally near, then the order of `known`.
    """
    import difflib  # a millisecond that a session without mistakes does not need

    def likeness(one: str, other: str) -> float:
        return difflib.SequenceMatcher(None, one, other).ratio()

    near = []
    for place, choice in enumerate(dict.fromkeys(known)):
        folded = likeness(name.lower(), choice.lower())
        if folded >= 0.6:
            near.append((-folded, -likeness(name, choice), place, choice))
    return [choice for *_, choice in sorted(near)[:n]]


def did_you_mean(name: str, *known: Iterable[str]) -> str | None:
    """`did you mean dropout?`, or None where nothing is near.

    Args:
      known: groups of names, the likeliest first: of the first that has a near one, the nearest are told.
    """
    near = next(filter(None, (nearest(name, group) for group in known)), [])
    return f"did you mean {' or '.join(near)}?" if near else None
