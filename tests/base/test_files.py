"""A file is replaced whole or not at all, and keeps what it was besides its contents."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest

from flax_magics.base.files import Cancelled, replace_file
from flax_magics.errors import FlaxMagicsError

posix = pytest.mark.skipif(os.name != "posix", reason="rights and links are those of POSIX")


def put(text: str):
    return lambda name: Path(name).write_text(text)


def test_a_new_file_has_the_rights_that_the_umask_gives(tmp_path):
    path, usual = tmp_path / "new", tmp_path / "usual"
    usual.write_text("")
    replace_file(path, put("text"))
    assert path.read_text() == "text"
    assert path.stat().st_mode == usual.stat().st_mode


@posix
@pytest.mark.parametrize("mode", [0o600, 0o640, 0o666, 0o755])
def test_an_old_file_keeps_its_rights(tmp_path, mode):
    path = tmp_path / "file"
    path.write_text("old")
    path.chmod(mode)
    replace_file(path, put("new"))
    assert (path.read_text(), stat.S_IMODE(path.stat().st_mode)) == ("new", mode)


@posix
def test_a_link_stays_and_what_it_points_at_is_replaced(tmp_path):
    (tmp_path / "folder").mkdir()
    real, link, dangling = tmp_path / "folder" / "real", tmp_path / "link", tmp_path / "dangling"
    real.write_text("old")
    link.symlink_to(real)
    dangling.symlink_to(tmp_path / "folder" / "to be")
    replace_file(link, put("new"))
    replace_file(dangling, put("made"))
    assert link.is_symlink()
    assert real.read_text() == "new"
    assert (tmp_path / "folder" / "to be").read_text() == "made"
    assert sorted(os.listdir(tmp_path / "folder")) == ["real", "to be"]


def test_whatever_fails_leaves_the_old_file_and_nothing_beside_it(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def fail(error):
        def write(name):
            Path(name).write_text("half")
            raise error

        return write

    for error in (OSError(28, "No space left on device"), KeyboardInterrupt(), ValueError("no"), MemoryError()):
        with pytest.raises(type(error)):
            replace_file(path, fail(error))
        assert path.read_text() == "old"
        assert os.listdir(tmp_path) == ["file"]


def test_a_write_that_is_called_off_replaces_nothing(tmp_path):
    path, ticket = tmp_path / "file", threading.Lock()
    path.write_text("old")

    def write(name):
        Path(name).write_text("new")
        ticket.acquire()

    with pytest.raises(Cancelled):
        replace_file(path, write, ticket)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


def test_where_no_file_can_be_is_told_before_anything_is_written(tmp_path):
    (tmp_path / "file").write_text("")
    told = {}
    for name in ("", "none/file", "file/file"):
        with pytest.raises(FlaxMagicsError) as error:
            replace_file(tmp_path / name, put("text"))
        told[name] = error.value.message.replace(str(tmp_path), "…")
    assert told == {
        "": "`…` is a folder, not a file.",
        "none/file": "there is no folder `…/none` to write into.",
        "file/file": "`…/file` is a file, not a folder to write into.",
    }


@posix
def test_a_pipe_is_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(FlaxMagicsError, match="is no regular file, and is not replaced by one"):
        replace_file(tmp_path / "pipe", put("text"))


@posix
def test_what_a_killed_writer_left_is_taken_away_and_what_another_is_writing_stays(tmp_path):
    script = """
        import sys, time
        from pathlib import Path
        from flax_magics.base.files import replace_file

        def write(name):
            Path(name).write_text("half")
            print("writing", flush=True)
            time.sleep(60)

        replace_file(Path(sys.argv[1]), write)
    """
    path = tmp_path / "file"

    def writer():
        command = [sys.executable, "-c", textwrap.dedent(script), str(path)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert process.stdout.readline() == "writing\n"
        return process

    def half_written():
        (name,) = set(os.listdir(tmp_path)) - {"file"}
        os.utime(tmp_path / name, (0, 0))  # begun long ago
        return name

    path.write_text("old")
    with writer() as killed:
        killed.kill()
    left = half_written()
    with writer() as living:
        try:
            held = half_written()  # one alone: the second has swept after the first
            assert held != left
            replace_file(path, put("new"))
            assert half_written() == held
            assert path.read_text() == "new"
        finally:
            living.kill()
