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
        self.message = message
        self.write = write
        self.form = form
        self.edit = edit
        self.hint = hint
        lines = [message]
        if hint:
            lines += [f"  {line}" for line in hint.splitlines()]
        for label, text in advice(write, form, edit):
            first, *rest = text.splitlines()
            lines += [f"  {label}{first}", *(" " * (2 + len(label)) + line for line in rest)]
        super().__init__("\n".join(lines))

    def _render_traceback_(self) -> list[str]:
        return [f"{FlaxMagicsError.__name__}: {self}"]


def advice(write: str | None, form: str | None, edit: str | None) -> list[tuple[str, str]]:
    """What a message advises, each text after the label that says how it is meant.

    `write: ` stands before complete lines that can be pasted and run, `form: ` before a text with a gap (`…`), and
    `in your model: ` before an edit of the user's code.
    """
    labelled = (("write: ", write), ("form: ", form), ("in your model: ", edit))
    return [(label, text) for label, text in labelled if text]


def nearest(name: str, known: Iterable[str], n: int = 3) -> list[str]:
    """The names in `known` that a person may have meant by `name`, nearest first, at most `n`."""
    import difflib  # a millisecond that a session without mistakes does not need

    choices = sorted(set(known))
    folded = {choice.lower(): choice for choice in reversed(choices)}
    found = difflib.get_close_matches(name.lower(), list(folded), n=n, cutoff=0.6)
    return [folded[match] for match in found]


def did_you_mean(name: str, known: Iterable[str]) -> str | None:
    """`did you mean dropout?`, or None where nothing is near."""
    found = nearest(name, known)
    if not found:
        return None
    return f"did you mean {' or '.join(found)}?"
