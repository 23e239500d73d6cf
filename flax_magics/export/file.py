"""The file that an export is written to: whole or not at all, formatted, and never over something that a person wrote."""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..base.files import replace_file
from ..base.text import plural
from ..errors import FlaxMagicsError
from ..report.text import Notice
from ..run import Note


def script_bundle(code: str, style: str) -> dict[str, Any]:
    """The MIME bundle of Python code: as Markdown, every notebook gives it the colours of its cells."""
    if style == "text":
        return {"text/plain": code}
    fence = "`" * max(3, *(len(ticks) + 1 for ticks in re.findall("`+", code)), 3)
    return {"text/plain": code, "text/markdown": f"{fence}python\n{code}{fence}\n"}


@dataclass(frozen=True)
class Exported:
    """A script.

    Attributes:
      text: the whole of it.
      cells: how many executions of cells left something in it.
      runs: how many there were.
      unexported: what could not be exported, each with its reason.
    """

    text: str
    cells: int
    runs: int
    unexported: tuple[str, ...] = ()


# The last line, with a digest of those above: by it can be told whether somebody has changed the file.
_MARK = "# Written by %flax_export, which replaces this file as long as nobody changes it: "


def write(file: str | os.PathLike[str], text: str, *, force: bool = False) -> tuple[Path, bool]:
    """Writes the script `text` to `file`, which ends in `.py`; gives the file's path, and whether it replaced one.

    Args:
      force: replace what is there whatever it is.

    Raises:
      FlaxMagicsError: there is a file that no export wrote, or one that was changed since; or no place for a file, or
        no writing to it: what was there is as it was.
    """
    path = Path(file).expanduser()
    if path.suffix != ".py":
        name = path.with_suffix(".py") if path.suffix not in ("", ".") else path.parent / f"{path.name.strip('.')}.py"
        line = f"%flax_export {name if path.name != '.py' else path.parent / 'session.py'}"
        raise FlaxMagicsError(f"a script is a file with the ending .py, and `{path.name}` has another.", write=line)
    path = path.resolve()  # through a link the file is written that it stands for
    if path.is_dir():
        raise FlaxMagicsError(f"`{file}` is a folder.", write=f"%flax_export {Path(file) / 'session.py'}")
    if not path.parent.is_dir():
        raise FlaxMagicsError(
            f"there is no folder `{Path(file).parent}`.",
            write=f"!mkdir -p {_quoted(Path(file).parent)}\n%flax_export {file}",
        )
    replaces = path.exists()
    if replaces and not force:
        _check(path, file)
    code = formatted(text, path)

    def write_signed(name: str) -> None:
        Path(name).write_text(f"{code}\n{_MARK}{_digest(code)}\n", encoding="utf-8", newline="\n")

    try:
        replace_file(path, write_signed)
    except OSError as error:
        raise FlaxMagicsError(f"`{file}` could not be written: {error.strerror or error}.") from error
    return path, replaces


def _quoted(path: Path) -> str:
    """A path as the shell reads it, a `~` at its begin as it is."""
    home, slash, rest = str(path).partition("/")
    return home + slash + shlex.quote(rest) if home == "~" and rest else shlex.quote(str(path)) if home != "~" else home


def formatted(text: str, path: Path) -> str:
    """`text` as ruff or black has it by the settings that hold for `path`; as it is where neither is installed."""
    folders = os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", "")])
    for name, options in (("ruff", ["format"]), ("black", ["--quiet"])):
        program = shutil.which(name, path=folders)
        if program is None:
            continue
        command = [program, *options, "--stdin-filename", str(path), "-"]
        try:
            result = subprocess.run(command, input=text, capture_output=True, encoding="utf-8", timeout=30)
        except (OSError, subprocess.SubprocessError):
            continue
        if result.returncode == 0 and result.stdout:
            return result.stdout
    return text


def notice(script: Exported, path: Path, replaced: bool) -> Notice:
    """`session.py · written · 12 cells · 9 runs`, and below it what could not be exported."""
    notes = tuple(Note("export", f"not in the script: {reason}") for reason in script.unexported)
    parts = ("replaced" if replaced else "written", plural(script.cells, "cell"), plural(script.runs, "run"))
    return Notice(path.name, parts, notes)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _check(path: Path, file: str | os.PathLike[str]) -> None:
    try:
        text = path.read_text("utf-8")
    except (OSError, ValueError):
        text = ""
    before, mark, digest = text.rpartition(f"\n{_MARK}")
    if not mark:
        what = f"`{file}` is there already, and no export wrote it."
    elif digest.strip() != _digest(before):
        what = f"`{file}` was changed since it was exported."
    else:
        return
    raise FlaxMagicsError(f"{what} --force replaces it.", write=f"%flax_export --force {file}")
