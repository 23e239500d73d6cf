"""What the plan of the package promises a reader, as far as a test can see it; its arrows are import-linter's."""

from __future__ import annotations

import ast
from collections import Counter
from pathlib import Path

import flax_magics

FILES = sorted(Path(flax_magics.__file__).parent.rglob("*.py"))
TREES = {path.relative_to(FILES[0].parent).as_posix(): ast.parse(path.read_text("utf-8")) for path in FILES}


def test_no_two_public_classes_have_one_name():
    names = Counter(
        node.name
        for tree in TREES.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
    )
    assert [name for name, times in names.items() if times > 1] == []


def test_no_function_has_more_than_five_positional_parameters():
    long = [
        f"{file}:{node.lineno} {node.name}"
        for file, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef)
        and len(
            [argument for argument in (*node.args.posonlyargs, *node.args.args) if argument.arg not in ("self", "cls")]
        )
        > 5
    ]
    assert long == []


def test_no_module_is_longer_than_a_reader_holds_in_mind():
    assert [path.name for path in FILES if path.read_text("utf-8").count("\n") > 500] == []


def test_there_are_no_more_modules_than_a_reader_finds_his_way_among():
    assert len(TREES) <= 145


def test_only_these_lie_at_the_door():
    root = Path(flax_magics.__file__).parent
    assert sorted(path.name for path in root.glob("*.py")) == [
        "__init__.py",
        "__main__.py",
        "_session.py",
        "errors.py",
        "run.py",
    ]
