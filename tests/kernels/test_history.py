"""`%flax_history` and `%flax_replay` in a real kernel, and cells that the frontend names."""

from __future__ import annotations

import pytest
from jupyter_core.utils import run_sync
from kernels import Notebook
from sharp_bits import SHARP_BITS


def by_id(notebook: Notebook, cell: str, source: str) -> None:
    """Executes a cell as JupyterLab does, which says which one it is."""
    client = notebook.client.kc
    content = {"code": source, "silent": False, "store_history": True, "user_expressions": {}, "allow_stdin": False}
    message = client.session.msg("execute_request", content, metadata={"cellId": cell})
    client.shell_channel.send(message)
    reply = run_sync(client.get_shell_msg)(timeout=60)
    assert reply["parent_header"]["msg_id"] == message["header"]["msg_id"]
    assert reply["content"]["status"] == "ok", reply["content"]


@pytest.mark.smoke
def test_a_cell_that_the_frontend_names_is_known_when_it_is_run_again_or_edited(open_notebook):
    notebook = open_notebook()
    notebook.run_all(SHARP_BITS)
    before = notebook.run("%flax")
    assert "out of order" not in before.report
    number = notebook.client.nb.cells[-1].execution_count
    by_id(notebook, "one", "%flax_apply -q my_model(x);")
    by_id(notebook, "two", "%flax_apply -q my_model(x);")  # the same text, another cell
    by_id(notebook, "three", "x = x + 1")
    by_id(notebook, "one", "%flax_apply -q --train my_model(x);")
    report = " ".join(notebook.run("%flax").report.split())
    one, three, again = number + 1, number + 3, number + 4
    said = f"cell [{again}] was edited and ran twice; x changed in [{three}]"
    assert report.count("ran twice") == 1
    assert said in report
    history = notebook.run("%flax_history").report
    assert f"! cell edited since, as [{again}]" in history
    assert f"! x changed in [{three}], after [{one}]" in history
