"""The first example: it runs, and what it compares agrees; all examples are committed as a reader should get them."""

from __future__ import annotations

import ast
import copy
import re
from pathlib import Path
from typing import Any

import nbformat
import pytest
from alone import run_alone
from kernels import RUN_JSON

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.ipynb"))
EXAMPLE, KOREAN = (Path(__file__).parents[2] / "examples" / f"the_sharp_bits{tail}.ipynb" for tail in ("", ".ko"))
COMPARED = [
    "the variables agree in every bit: True",
    "y agrees in every bit: True",
    "the first mask agrees in every bit: True",
    "the second mask agrees in every bit: True",
    "the numbers are the keys, folded in two: True",
    "two cells agree with one, in every bit: True",
    "the running statistics agree in every bit: True",
    "two dropout keys, one mask: True",
]


@pytest.fixture(scope="module")
def committed() -> Any:
    return nbformat.read(EXAMPLE, 4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("example")


@pytest.fixture(scope="module")
def executed(committed, kernels, folder) -> Any:
    """The example as a run leaves it; what it exports at its end is in the folder."""
    example = copy.deepcopy(committed)
    with kernels.lent(folder) as notebook:
        for cell in code(example):
            cell.outputs, cell.execution_count = [], None
            notebook.execute(cell)
        notebook.run("%flax_export -q session.py")
    return example


def code(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def streams(notebook: Any) -> list[str]:
    return [output.text for cell in code(notebook) for output in cell.outputs if output.output_type == "stream"]


def compared(notebook: Any) -> list[str]:
    return re.findall(r"^.*: (?:True|False)$", "".join(streams(notebook)), re.MULTILINE)


def shown(notebook: Any) -> list[tuple[str, list[list[str]]]]:
    """Each cell's id with the kinds of what it displayed."""
    return [(c.id, [sorted(o.data) for o in c.outputs if o.output_type == "display_data"]) for c in code(notebook)]


def test_it_runs_and_what_is_compared_agrees(executed):
    assert compared(executed) == COMPARED


def test_its_committed_outputs_are_those_that_a_run_gives(committed, executed):
    assert compared(committed) == COMPARED
    assert shown(committed) == shown(executed)
    assert [cell.execution_count for cell in code(committed)] == [cell.execution_count for cell in code(executed)]


def test_both_sharp_bits_are_found(committed):
    text = {cell.id: "".join(o.data["text/plain"] for o in cell.outputs if "data" in o) for cell in code(committed)}
    assert "! Dropout_0 is off although --train was asked" in text["sharp-fixed-run"]
    assert "! the stream `droppout` is asked for by Dropout_0: is `dropout` meant?" in text["sharp-stream-run"]


def test_its_first_command_stands_in_its_second_cell(committed):
    setup, model, run = code(committed)[:3]
    assert [cell.source.partition("\n")[0] for cell in (setup, model, run)] == [
        "import flax.linen as nn",
        "%%flaxmodel",
        "y = %flax_apply my_model(x)",
    ]


def test_in_korean_it_is_the_same_code_with_the_same_results(committed):
    korean = nbformat.read(KOREAN, 4)
    assert [cell.id for cell in korean.cells] == [cell.id for cell in committed.cells]
    assert [tree_of(cell) for cell in code(korean)] == [tree_of(cell) for cell in code(committed)]
    assert len(re.findall(r": True$", "".join(streams(korean)), re.MULTILINE)) == len(COMPARED)


def tree_of(cell: Any) -> str:
    """What Python makes of the cell, without its comments and the words that it prints."""
    python = re.sub(r"^(\s*)(?:(\w+) = )?%.*", r"\1\2 = 0", cell.source, flags=re.MULTILINE)
    python = re.sub(r"^(\s*) = 0", r"\1...", python, flags=re.MULTILINE)
    tree = ast.parse(python)
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "print":
            node.args = [arg for arg in node.args if not isinstance(arg, ast.Constant)]
    return ast.dump(tree)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_a_reader_gets_it_executed_and_without_a_trace_of_the_machine(path):
    example = nbformat.read(path, 4)
    assert not re.search(r"/(home|root|tmp|Users|usr|work)/", path.read_text(encoding="utf-8"))
    assert [cell.execution_count for cell in code(example)] == [*range(1, 1 + len(code(example)))]
    for cell in code(example):
        fails = any(output.output_type == "error" for output in cell.outputs)
        assert fails is ("raises-exception" in cell.metadata.get("tags", [])), cell.id
        assert not [output for output in cell.outputs if output.get("name") == "stderr"], cell.id


def test_exported_it_runs_without_flax_magics_and_agrees_with_the_session(executed, folder):
    script = folder / "session.py"
    assert "flax_magics" not in script.read_text()
    assert "Left out" not in script.read_text()
    printed = run_alone(script, afresh=True)
    assert re.findall(r"^.*: (?:True|False)$", printed, re.MULTILINE) == COMPARED
    bundles = [output.get("data", {}) for cell in code(executed) for output in cell.outputs]
    digests = [data[RUN_JSON]["digest"] for data in bundles if data.get(RUN_JSON, {}).get("digest")]
    assert set(digests) <= set(re.findall(r"\b[0-9a-f]{16}$", printed, re.MULTILINE))
    assert len(digests) >= 8
