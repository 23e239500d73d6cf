"""`%flax_export` as a person writes it: shown, into the next cell, into a file, and never over a file of theirs."""

from __future__ import annotations

import os

import pytest


@pytest.fixture
def ran(sharp_bits, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sharp_bits("y = %flax_apply -q my_model(x)")
    return sharp_bits


def test_it_draws_nothing_and_changes_nothing(ran):
    before = ran.session._state
    ran("%flax_export")
    ran("%flax_export session.py")
    assert ran.session._state is before


def test_cell_puts_it_into_the_next_cell(ran, monkeypatch):
    found = []
    monkeypatch.setattr(ran.shell, "set_next_input", found.append)
    assert ran("%flax_export --plain --cell") == ""
    (text,) = found
    assert "y = apply(variables, x)\n" in text
    assert ran.fails("%flax_export --cell session.py") == (
        "FlaxMagicsError: --cell is instead of a file: leave one of them out.\n  write: %flax_export --cell"
    )


def test_a_file_of_its_own_is_replaced_and_says_what_it_has(ran, tmp_path):
    assert ran("%flax_export session.py") == "session.py · written · 3 cells · 1 run"
    first = (tmp_path / "session.py").read_text()
    ran("z = %flax_apply -q my_model(x)")
    assert ran("%flax_export 'session.py'") == "session.py · replaced · 4 cells · 2 runs"
    assert (tmp_path / "session.py").read_text() != first
    assert ran("%flax_export -q session.py") == ""
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]


def test_a_name_may_have_spaces_and_begin_at_home(ran, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for line in ("my session.py", "'my session.py'", '"~/my session.py"', "~/my session.py"):
        ran(f"%flax_export -q {line}")
    assert [name for name in os.listdir(tmp_path) if name.endswith(".py")] == ["my session.py"]


def test_a_file_of_the_users_own_is_not_replaced(ran, tmp_path):
    file = tmp_path / "train.py"
    file.write_text("print('mine')\n")
    assert ran.fails("%flax_export train.py") == (
        "FlaxMagicsError: `train.py` is there already, and no export wrote it. --force replaces it.\n"
        "  write: %flax_export --force train.py"
    )
    assert file.read_text() == "print('mine')\n"
    ran("%flax_export -q --force train.py")
    changed = file.read_text().replace("y = ", "yy = ")
    file.write_text(changed)
    assert ran.fails("%flax_export train.py").startswith(
        "FlaxMagicsError: `train.py` was changed since it was exported."
    )
    assert file.read_text() == changed


def test_a_name_that_is_no_script_is_refused(ran, tmp_path):
    (tmp_path / "folder.py").mkdir()
    for name, message in (
        (
            "notebook.ipynb",
            "a script is a file with the ending .py, and `notebook.ipynb` has another.\n"
            "  write: %flax_export notebook.py",
        ),
        (
            "session",
            "a script is a file with the ending .py, and `session` has another.\n  write: %flax_export session.py",
        ),
        ("folder.py", "`folder.py` is a folder, not a file."),
        (
            "'no folder/a b.py'",
            f"there is no folder `{tmp_path}/no folder` to write into.\n"
            f"  write: import os; os.makedirs('{tmp_path}/no folder')",
        ),
        (".py", "a script is a file with the ending .py, and `.py` has another.\n  write: %flax_export session.py"),
    ):
        assert ran.fails(f"%flax_export --force {name}") == f"FlaxMagicsError: {message}"


def test_a_write_that_fails_leaves_the_old_file(ran, tmp_path, monkeypatch):
    ran("%flax_export -q session.py")
    before = (tmp_path / "session.py").read_bytes()

    def broken(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", broken)
    assert ran.fails("%flax_export -q session.py") == (
        "FlaxMagicsError: `session.py` could not be written: no space left on device."
    )
    assert (tmp_path / "session.py").read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == ["cache", "session.py"] or os.listdir(tmp_path) == ["session.py"]


def test_what_is_left_out_is_said(ran, tmp_path):
    ran("z = %flax_apply -q -o run my_model(x)")
    ran("print(run.draw)")
    assert ran("%flax_export session.py") == (
        "session.py · written · 5 cells · 2 runs\n"
        "! not in the script: print(run.draw): `run` is not there: it is a Run of the\n"
        "  session"
    )


@pytest.mark.parametrize("again", ["%reload_ext flax_magics", "%unload_ext flax_magics\n%load_ext flax_magics", ""])
def test_it_has_the_cells_from_before_the_extension_was_loaded_again(ran, again):
    before = ran("%flax_export --plain").rstrip("\n")
    for cell in [again] if again else ["%unload_ext flax_magics", "n = 1", "%load_ext flax_magics"]:
        ran(cell)
    assert ran("%flax_export --plain").startswith(before)
    ran("z = %flax_apply -q my_model(x)")
    assert ran("%flax_export --plain").endswith("\nz = apply(variables, x)")
