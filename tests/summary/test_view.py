"""A summary as text in 80 columns and as HTML, and variables as a tree."""

from __future__ import annotations

from textwrap import dedent

import numpy as np
import pytest
import treescope
from html_reader import EVIL, Reader
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from rich.cells import cell_len

from flax_magics.errors import FlaxMagicsError
from flax_magics.summary import view
from flax_magics.summary.view import Array, Module, Summary, summary_bundle, summary_text, tree, tree_bundle

KERNEL = Array("params", "kernel", "float32", (9, 4), 144)
BIAS = Array("params", "bias", "float32", (4,), 16)
MEAN = Array("batch_stats", "mean", "float32", (4,), 16)
SCALE = Array("params", "scale", "bfloat16", (4,), 8, "names=('mlp',)")
SAME = "float32[16,4]"


def dense(*path: str, flops: int = 1216) -> Module:
    return Module(path, "Dense", "__call__", 1, "float32[16,9]", "float32[16,4]", (BIAS, KERNEL), (), flops, 3 * flops)


NET = Summary(
    "net",
    "Net(features=4)",
    "net(x, train=True)",
    "train",
    ("train=True",),
    True,
    (
        Module((), "Net", "encode", 1, "float32[16,9], train=True", "float32[16,2]", (), (), 1504, 4460),
        dense("Dense_0"),
        Module(("BatchNorm_0",), "BatchNorm", "__call__", 2, SAME, SAME, (MEAN, SCALE), (), 120, 360),
        Module(("Dropout_0",), "Dropout", "__call__", 1, SAME, SAME, (), ("dropout",), 168, 500),
        Module(("unused",), "", arrays=(BIAS,)),
    ),
    1504,
    4460,
    ("batch_stats",),
    {"losses": "{size: (float32[],)}"},
    ("a loop (scan, while) counts as one turn of it: XLA does not know how many there are",),
)


def stack(layers: int) -> Summary:
    """A model of so many equal blocks, and of so many turns of two layers."""
    modules = [Module((), "Net", "__call__", 1, "float32[16,9]", "float32[16,4]", (), (), 10**9, None)]
    for i in range(layers):
        modules.append(Module((f"Block_{i}",), "Block", "__call__", 1, SAME, SAME, flops=1216))
        modules.append(replace(dense(f"Block_{i}", "Dense_0"), vjp_flops=None))
    for i in range(layers):
        modules.append(replace(dense(f"Dense_{i}"), vjp_flops=None))
        modules.append(Module((f"Norm_{i}",), "Norm", "__call__", 1, SAME, SAME, flops=8))
    return Summary("net", "Net()", "net(x)", "as written", (), True, tuple(modules), 10**9)


def test_all_of_it_as_text() -> None:
    assert summary_text(NET) == dedent("""\
        net · Net(features=4) · train (train=True) · net(x, train=True)
          module                          out            params  bytes  FLOPs  vjp FLOPs
          net  Net.encode                 float32[16,2]      48  184 B  1,504      4,460
            in float32[16,9], train=True · batch_stats 4, 16 B
            Dense_0  Dense                float32[16,4]      40  160 B  1,216      3,648
              in float32[16,9] · params: bias float32[4], kernel float32[9,4]
            BatchNorm_0  BatchNorm        float32[16,4]       4    8 B    120        360
              in float32[16,4] · 2 calls · params: scale bfloat16[4] names=('mlp',) ·
                batch_stats 4, 16 B: mean float32[4]
            Dropout_0  Dropout            float32[16,4]                   168        500
              in float32[16,4] · takes dropout
            unused                                            4   16 B
              not called · params: bias float32[4]
          total   params 48, 184 B    batch_stats 4, 16 B    in all 52, 200 B
          FLOPs   forward 1,504    forward and backward 4,460
          keys    dropout → Dropout_0
          writes  batch_stats
          sown    losses: {size: (float32[],)}
          note    a loop (scan, while) counts as one turn of it: XLA does not know how
                  many there are""")


def test_fifty_equal_blocks_are_one_row_and_turns_of_two_layers_another() -> None:
    assert summary_text(stack(50)) == dedent("""\
        net · Net() · as written · net(x)
          module                                   out            params    bytes  FLOPs
          net  Net                                 float32[16,4]   4,000  16.0 KB  1.0 G
            in float32[16,9]
            Block_0 … Block_49  50 × Block         float32[16,4]      40    160 B  1.2 k
              in float32[16,4]
              Dense_0  Dense                       float32[16,4]      40    160 B  1.2 k
                in float32[16,9] · params: bias float32[4], kernel float32[9,4]
            Dense_0 … Norm_49  50 × (Dense, Norm)  float32[16,4]      40    160 B  1.2 k
              Dense_0  Dense                       float32[16,4]      40    160 B  1.2 k
                in float32[16,9] · params: bias float32[4], kernel float32[9,4]
              Norm_0  Norm                         float32[16,4]                       8
                in float32[16,4]
          total  params 4,000, 16.0 KB
          FLOPs  forward 1,000,000,000""")


def test_an_output_that_is_too_long_for_its_column_is_told_in_full_beneath() -> None:
    outputs = "(float32[16,128], {hidden: float32[16,128], cell: float32[16,128]})"
    module = replace(NET.modules[0], outputs=outputs)
    assert summary_text(replace(NET, modules=(module,))).splitlines()[2:5] == [
        "  net  Net.encode  (float32[16,128], {hidden:…                  1,504      4,460",
        "    out (float32[16,128], {hidden: float32[16,128], cell: float32[16,128]}) · in",
        "      float32[16,9], train=True",
    ]


def test_a_layer_that_differs_stands_by_itself() -> None:
    modules = [NET.modules[0], dense("a_0"), dense("a_1"), dense("a_2", flops=7), dense("a_3"), dense("a_4")]
    rows = tree(replace(NET, modules=tuple(modules))).rows
    alike = [("a_0, a_1", "2 × Dense"), ("a_2", "Dense"), ("a_3, a_4", "2 × Dense")]
    assert [(row.name, row.cls) for row in rows] == alike


def test_a_depth_counts_in_what_it_hides() -> None:
    text = summary_text(NET, depth=0)
    assert text.splitlines()[2:4] == [
        "  net  Net.encode                 float32[16,2]      48  184 B  1,504      4,460",
        "    in float32[16,9], train=True · batch_stats 4, 16 B · 4 rows inside",
    ]
    assert "Dense_0  Dense" not in text


def test_what_goes_over_a_page_is_folded_at_a_depth_and_that_is_said() -> None:
    modules = [NET.modules[0]]
    for i in range(30):
        modules.append(Module((f"m_{i}",), "M", "__call__", 1, f"float32[{i}]", "float32[4]", flops=1))
        modules += [dense(f"m_{i}", name) for name in ("a", "b", "c")]
        modules.append(dense(f"m_{i}", "a", "inner"))
    text = summary_text(replace(NET, modules=tuple(modules)))
    assert text.count("\n") < 80
    assert text.splitlines()[-1] == "  deeper than 1 level is folded away: --depth 3 shows all of it"


def test_without_a_call_there_are_variables_alone() -> None:
    modules = tuple(Module(m.path, m.cls, arrays=m.arrays) for m in NET.modules[:2])
    bare = Summary("net", "Net(features=4)", "", "as written", (), True, modules)
    assert summary_text(bare) == dedent("""\
        net · Net(features=4)
          module                                                           params  bytes
          net  Net                                                             40  160 B
            Dense_0  Dense                                                     40  160 B
              params: bias float32[4], kernel float32[9,4]
          total  params 40, 160 B""")


WORDS = st.text(min_size=1, max_size=60)


@settings(max_examples=60)
@given(WORDS, WORDS, WORDS, st.integers(0, 10**15), st.integers(1, 9))
def test_nothing_is_wider_than_80_columns(name: str, cls: str, shape: str, flops: int, depth: int) -> None:
    path, modules = (), [NET.modules[0]]
    for i in range(depth):
        path = (*path, f"{name}_{i}")
        modules.append(Module(path, cls, "__call__", 2, shape, shape, (KERNEL,), (name,), flops, flops))
    text = summary_text(replace(NET, modules=tuple(modules), flops=flops))
    assert all(cell_len(line) <= 80 for line in text.splitlines())


def test_every_string_is_escaped_and_nothing_is_fetched_or_run() -> None:
    module = Module((), EVIL, EVIL, 1, EVIL, EVIL, (Array(EVIL, EVIL, EVIL, (), 1, EVIL),), (EVIL,), 1, 1)
    evil = Summary(EVIL, EVIL, EVIL, EVIL, (EVIL,), True, (module,), 1, 1, (EVIL,), {EVIL: EVIL}, (EVIL,))
    page = view.summary_html(evil)
    assert "&lt;script&gt;" in page
    for word in ("<script", "http", "src=", "href=", "url(", "@import", "javascript:"):
        assert word not in page
    Reader(page)
    hidden = replace(evil, name="\x1b[31m", call="\u202e", modules=(replace(module, cls="\x1b[0m\n", inputs="\x07"),))
    assert not {"\x1b", "\u202e", "\x07"} & set(summary_text(hidden))


def test_a_bundle_has_text_and_html() -> None:
    shown = {"text/plain": summary_text(NET, 0), "text/html": view.summary_html(NET, 0)}
    assert summary_bundle(NET, 0, "auto") == shown
    assert set(summary_bundle(NET, None, "text")) == {"text/plain"}


def test_it_prints_itself() -> None:
    assert str(NET) == summary_text(NET)
    assert repr(NET) == "<Summary of net(x, train=True): 5 modules, 48 parameters, 1,504 FLOPs>"
    assert NET._repr_html_() == view.summary_html(NET)


def test_variables_as_a_tree_with_pictures_and_nothing_set_for_the_rest() -> None:
    before = treescope.active_autovisualizer.get()
    shown = tree_bundle("net", {"params": {"kernel": np.ones((3, 4), np.float32)}}, "auto")
    assert "'kernel': " in shown["text/plain"]
    assert "float32(3, 4)" in shown["text/plain"]
    assert "<treescope-" in shown["text/html"]
    assert treescope.active_autovisualizer.get() is before
    assert set(tree_bundle("net", {}, "text")) == {"text/plain"}


def test_a_tree_without_variables_says_what_to_write() -> None:
    with pytest.raises(FlaxMagicsError) as error:
        tree_bundle("net", None, "auto")
    assert str(error.value) == "`net` has no variables yet that a tree could show.\n  form: %flax_init net(…)"
