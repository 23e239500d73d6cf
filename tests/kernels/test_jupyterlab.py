"""JupyterLab and Notebook 7 in headless Chromium: Run All, and the reports in light, in dark, in a narrow window and by
keyboard.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import hostile
import nbformat
import pytest
from lab import CELLS, MISSING, NOTEBOOK, cell, choose_theme, faults, go_to, menu, opened, serving
from sharp_bits import SHARP_BITS

HOSTILE = "hostile.ipynb"
SHORT = "short.ipynb"
EXAMPLE = Path(__file__).parents[2] / "examples" / "the_sharp_bits.ipynb"
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(
        bool(MISSING), reason=f"JupyterLab is driven in Chromium by Playwright; missing: {', '.join(MISSING)}"
    ),
]

SUMMARY = (
    """%%flaxmodel
class Block(nn.Module):
  @nn.compact
  def __call__(self, x, train):
    h = nn.Dropout(0.5, deterministic=not train)(nn.Dense(4)(nn.LayerNorm()(x)))
    return x + h

class Stack(nn.Module):
  @nn.compact
  def __call__(self, x, train=False):
    for _ in range(50):
      x = Block()(x, train)
    x = nn.BatchNorm(use_running_average=not train)(x)
    return nn.Dense(2)(x)

stack = Stack()""",
    "%flax_summary --train --backward stack(x)",
    "%flax_summary --tree my_model",
    "for i in range(5):\n  %flax_apply -q --train my_model(x)",
    """import optax, time

def loss(net, batch):
  return (net(batch) ** 2).mean()

def slowly(batch):
  while True:
    time.sleep(0.01)
    yield batch""",
    "%flax_train --optimizer optax.adam(0.01) --steps 300 --eval x loss(my_model, x)",
    "%flax_replay 1",
    "%flax_history",
    "%flax_export --plain",
)
"""Cells that are added to the example: a deep model, summarised; one trained; its draws, listed; all of it as plain Flax."""
APPLY = "y = %flax_apply --train my_model(x)"
LOSS = "import optax\n\ndef loss(net, batch):\n  return (net(batch) ** 2).mean()"
TRAIN = "%flax_train --optimizer optax.adam(0.1) --steps 20 --eval x loss(my_model, x)"


@pytest.fixture(scope="module")
def address_of(home, tmp_path_factory) -> Iterator[Callable[[str], str]]:
    """A JupyterLab server with the example in it, its outputs cleared; gives the address that opens a notebook."""
    folder = tmp_path_factory.mktemp("jupyterlab")
    files = folder / "files"
    files.mkdir()
    example = nbformat.read(EXAMPLE, 4)
    for each in example.cells:
        if each.cell_type == "code":
            each.outputs, each.execution_count = [], None
    example.cells += [nbformat.v4.new_code_cell(source) for source in SUMMARY]
    nbformat.write(example, files / EXAMPLE.name)
    cells = [nbformat.v4.new_code_cell(source) for source in hostile.CELLS]
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=example.metadata), files / HOSTILE)
    cells = [nbformat.v4.new_code_cell(source.strip()) for source in (*SHARP_BITS, APPLY, LOSS, TRAIN, *SUMMARY[-2:])]
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=example.metadata), files / SHORT)
    with serving(files, folder, home / "jupyter_runtime_dir") as address_of:
        yield address_of


@pytest.fixture(scope="module")
def page(address_of) -> Iterator[Any]:
    """The example opened, and all of it run."""
    with opened(address_of(EXAMPLE.name), width=1280, height=1600) as page:
        run_all(page)
        yield page


def run_all(page: Any) -> None:
    menu(page, "Run", "Run All Cells")
    page.wait_for_function(f"({STARTED})() && !({WAITING})()", timeout=300_000)


PROMPTS = CELLS + ".map(cell => cell.querySelector('.jp-InputPrompt').textContent)"
STARTED = f"() => {PROMPTS}.some(text => /\\d/.test(text))"
WAITING = f"() => {PROMPTS}.some(text => text.includes('*'))"
REPORTS = ".jp-OutputArea-output .flax-magics"
LUMINANCE = """element => {
  const [r, g, b] = getComputedStyle(element).color.match(/[\\d.]+/g).map(Number);
  return (r + g + b) / 3;
}"""
WIDER = f"""() => [...document.querySelectorAll('{REPORTS}')]
  .filter(report => report.scrollWidth > report.parentElement.clientWidth + 1)
  .map(report => report.textContent.slice(-100))"""


def report(page: Any, source: str) -> Any:
    """The last report of the cell whose source begins so."""
    return cell(page, source).locator(".flax-magics").last


def test_run_all_runs_every_cell_and_none_fails(page, tmp_path):
    page.screenshot(path=tmp_path / "light.png", full_page=True)
    prompts = page.evaluate(f"() => {PROMPTS}")
    assert all(any(letter.isdigit() for letter in prompt) for prompt in prompts), prompts
    assert (
        page.locator(
            '[data-mime-type="application/vnd.jupyter.error"], .jp-RenderedText[data-mime-type*=stderr]'
        ).count()
        == 0
    )
    assert page.locator(REPORTS).count() >= 12
    assert page.locator(f"{REPORTS} script").count() == 0


def test_a_report_has_its_name_chips_numerals_bar_and_rows(page):
    train = report(page, "y_train = ")
    assert train.locator(".fm-name").inner_text() == "my_model"
    assert [chip.rstrip("0123456789") for chip in train.locator(".fm-chip").all_inner_texts()] == ["train", "cpu:"]
    assert train.locator(".fm-figure").count() == 2
    bar = train.locator(".fm-bar").bounding_box()
    assert bar is not None
    assert bar["width"] > 200
    assert train.locator(".fm-bar .fm-part").count() == train.locator(".fm-legend .fm-swatch").count() >= 3
    rows = train.locator("table").first.locator("tr").all_inner_texts()
    assert any("dropout → Dropout_0" in row for row in rows)
    sizes = train.evaluate(
        "r => ['.fm-time', '.fm-name'].map(s => parseFloat(getComputedStyle(r.querySelector(s)).fontSize))"
    )
    assert sizes[0] > 1.5 * sizes[1]


def test_details_are_closed_and_open_at_a_click_with_their_table_of_keys(page):
    train = report(page, "y_train = ")
    keys = train.locator(".fm-keys")
    assert not keys.is_visible()
    train.locator("summary").click()
    assert keys.is_visible()
    assert keys.locator("thead th").all_inner_texts() == ["stream", "key", "made by", "went to"]
    assert "rngs={'dropout': dropout_key}" in train.locator("details pre").last.inner_text()
    train.locator("summary").click()
    assert not keys.is_visible()


def test_a_run_without_news_is_one_line_high(page):
    box = report(page, "y_again = ").bounding_box()
    assert box is not None
    assert box["height"] < 45


def test_a_sharp_bit_stands_in_its_report(page):
    note = report(page, "%flax_apply --train fixed(x)").locator(".fm-note").inner_text()
    assert "Dropout_0 is off although --train was asked" in note
    assert "deterministic=not self.training" in note


def test_a_summary_has_a_row_for_fifty_equal_blocks_and_its_rows_fold(page, tmp_path):
    summary = report(page, "%flax_summary --train")
    rows = summary.locator(".fm-module > summary:visible")
    assert [row.split()[0] for row in rows.all_inner_texts()] == [
        *("stack", "Block_0", "LayerNorm_0", "Dense_0", "Dropout_0", "BatchNorm_0", "Dense_0")
    ]
    assert "50 × Block" in rows.nth(1).inner_text()
    rights = "r => [...r.querySelectorAll('.fm-numbers')].map(n => Math.round(n.getBoundingClientRect().right))"
    assert len(set(summary.evaluate(rights))) == 1
    said = summary.get_by_text("params: bias float32[2], kernel float32[4,2]")
    assert not said.is_visible()
    rows.last.click()
    assert said.is_visible()
    rows.nth(1).click()
    assert rows.count() == 4
    rows.nth(1).click()
    summary.screenshot(path=tmp_path / "summary.png")


def test_a_training_has_its_curve_and_the_numbers_beneath(page, tmp_path):
    training = report(page, "%flax_train --optimizer")
    curve = training.locator(".fm-curve > svg")
    box, place = curve.bounding_box(), training.bounding_box()
    assert box is not None
    assert place is not None
    assert 300 < box["width"] <= min(700, place["width"])
    assert training.locator(".fm-values th").all_inner_texts() == ["loss", "eval loss"]
    sizes = curve.evaluate("c => [...c.querySelectorAll('text')].map(t => t.getBoundingClientRect().height)")
    assert min(sizes) > 8
    training.screenshot(path=tmp_path / "training.png")


def test_the_history_is_a_table_of_all_draws(page, tmp_path):
    history = report(page, "%flax_history")
    assert history.locator("thead th").all_inner_texts() == ["draw", "what", "keys", "inputs", "digest", "cell", "time"]
    rows = history.locator(".fm-history tbody tr").all_inner_texts()
    assert len(rows) >= 8
    assert "5 runs" in rows[-2]
    assert rows[-1].split("\t")[1].startswith("train my_model · 300 steps · loss ")
    assert sum("replayed" in row for row in rows) == 2  # the init and the apply of draw 1, started again
    assert "run again" not in history.inner_text()  # Run All in a fresh kernel ran each cell once
    assert "identical" in report(page, "%flax_replay").inner_text()
    strip, place = history.locator(".fm-curve > svg").bounding_box(), history.bounding_box()
    assert strip is not None
    assert place is not None
    assert 300 < strip["width"] <= min(700, place["width"])
    assert "program compiled" in history.locator(".fm-legend").inner_text()
    history.screenshot(path=tmp_path / "history.png")


def test_an_export_is_shown_as_code_in_the_colours_of_the_cells(page, tmp_path):
    code = cell(page, "%flax_export --plain").locator("code.language-python")
    text = code.inner_text()
    assert text.startswith('"""The cells of a notebook in the order in which they ran, as plain JAX and Flax.\n')
    assert "\nroot_key, params_key, dropout_key = jax.random.split(root_key, 3)\n" in text
    compile(text, "copied", "exec")
    code.screenshot(path=tmp_path / "export.png")
    colours = "c => new Set([...c.querySelectorAll('span')].map(s => getComputedStyle(s).color)).size"
    assert code.evaluate(colours) >= 4


def test_the_tree_of_the_variables_has_pictures(page):
    tree = cell(page, "%flax_summary --tree my_model")
    tree.get_by_text("'kernel'").first.wait_for()
    assert tree.locator("treescope-container, .treescope_root").count() >= 1


def test_it_is_readable_in_dark_as_in_light(page, tmp_path):
    train = report(page, "y_train = ")
    assert train.evaluate(LUMINANCE) < 100
    choose_theme(page, "dark")
    page.screenshot(path=tmp_path / "dark.png", full_page=True)
    train.screenshot(path=tmp_path / "report.png")
    assert train.evaluate(LUMINANCE) > 155
    transparent = "r => getComputedStyle(r).backgroundColor === 'rgba(0, 0, 0, 0)'"
    assert train.evaluate(transparent)
    table = train.locator("table").first
    assert table.evaluate(LUMINANCE) > 155
    summary = report(page, "%flax_summary --train")
    summary.screenshot(path=tmp_path / "summary.png")
    assert summary.locator(".fm-number").first.evaluate(LUMINANCE) > 155
    history = report(page, "%flax_history")
    history.screenshot(path=tmp_path / "history.png")
    assert history.locator("tbody td").first.evaluate(LUMINANCE) > 155
    training = report(page, "%flax_train --optimizer")
    training.screenshot(path=tmp_path / "training.png")
    stroke = "s => getComputedStyle(s).stroke.match(/[\\d.]+/g).map(Number).slice(0, 3).every(v => v > 155)"
    assert training.locator("polyline").first.evaluate(stroke)


needs_axe = pytest.mark.skipif(find_spec("axe_playwright_python") is None, reason="axe-core's script is not installed")


@needs_axe
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_axe_finds_no_fault_in_a_report(page, theme):
    choose_theme(page, theme)
    assert faults(page) == []


FOCUSED = "() => [document.activeElement.tagName, document.activeElement.parentElement.open]"


def opens_by_keyboard(page: Any, source: str) -> None:
    """From the cell whose source begins so, Tab leads to the details of its report, and Enter and Space open them."""
    cell(page, source).locator(".cm-content").click()
    page.keyboard.press("Escape")
    for _ in range(10):
        page.keyboard.press("Tab")
        if page.evaluate(FOCUSED)[0] == "SUMMARY":
            break
    assert page.evaluate(FOCUSED) == ["SUMMARY", False]
    outline = page.evaluate("() => getComputedStyle(document.activeElement).outlineStyle")
    assert outline != "none"  # one sees where one is
    page.keyboard.press("Enter")
    assert page.evaluate(FOCUSED) == ["SUMMARY", True]
    page.keyboard.press("Space")
    assert page.evaluate(FOCUSED) == ["SUMMARY", False]


def test_details_are_opened_by_the_keyboard_alone(page):
    opens_by_keyboard(page, "y_train = ")


@pytest.mark.parametrize("width", [1280, 700, 600, 480])
def test_no_report_is_wider_than_its_place(page, tmp_path, width):
    page.set_viewport_size({"width": width, "height": 1600})
    if width == 600:
        page.keyboard.press("Control+B")  # beside the side bar there would be no room for anything
    page.wait_for_timeout(500)
    page.screenshot(path=tmp_path / f"{width}.png")
    assert page.evaluate(WIDER) == []


def run_below(page: Any, source: str) -> None:
    """Types a line into a new cell after the last, and runs it."""
    page.locator(".jp-Notebook .jp-CodeCell").last.locator(".cm-content").click()
    page.keyboard.press("Escape")
    page.keyboard.press("b")
    page.keyboard.press("Enter")
    page.keyboard.type(source)
    page.keyboard.press("Control+Enter")


def test_a_training_is_drawn_as_it_goes_on_and_after_an_interrupt_says_how_far_it_came(page, tmp_path):
    page.set_viewport_size({"width": 1280, "height": 1600})
    line = "%flax_train --optimizer optax.adam(0.01) --steps 100000 loss(my_model, slowly(x))"
    run_below(page, line)
    last = page.locator(".jp-Notebook .jp-CodeCell").last
    training = last.locator(".flax-magics")
    training.get_by_text("interrupt the kernel to stop").wait_for()
    training.locator("polyline").first.wait_for()
    last.screenshot(path=tmp_path / "half-way.png")
    menu(page, "Kernel", "Interrupt Kernel")
    note = training.locator(".fm-note")
    note.wait_for()
    last.screenshot(path=tmp_path / "interrupted.png")
    assert "interrupted after " in note.inner_text()
    assert training.locator("svg").get_by_text("stopped").count() == 1
    assert training.get_by_text("interrupt the kernel to stop").count() == 0


def test_an_export_goes_into_the_next_cell(page):
    page.set_viewport_size({"width": 1280, "height": 1600})
    run_below(page, "%flax_export --plain --cell")
    cells = page.locator(".jp-Notebook .jp-CodeCell")
    before = cells.count()
    page.wait_for_function(f"n => {CELLS}.length > n", arg=before)
    assert cells.last.locator(".cm-content").inner_text().startswith('"""The cells of a notebook in the order')
    assert cells.nth(before - 1).locator(".jp-OutputArea-output").count() == 0


FOREIGN = """tags => [
  ...document.querySelectorAll('.jp-OutputArea-output :is(.flax-magics, .jp-RenderedText) *')
].filter(element =>
  (element.closest('.flax-magics') && !tags.includes(element.tagName.toLowerCase()))
  || element.matches('script, iframe, object, embed, link, meta, base, form, img, mjx-container')
  || [...element.attributes].some(attribute => /^(on|src|href|action|srcdoc)/i.test(attribute.name))
  || (element.closest('[style]') && /fixed/.test(getComputedStyle(element).position))
).map(element => element.outerHTML.slice(0, 200))"""
SHOWN = f"() => [...document.querySelectorAll('{REPORTS}')].map(report => report.textContent).join('\\n')"
OUTSIDE = """() => [...document.querySelectorAll('.jp-OutputArea-output')]
  .filter(output => output.scrollWidth > output.clientWidth && getComputedStyle(output).overflowX === 'visible')
  .map(output => output.textContent.slice(-100))"""


def test_no_string_runs_asks_for_anything_or_moves_the_page(page, address_of, tmp_path):
    page = page.context.browser.new_page(viewport={"width": 1280, "height": 1600})
    requests, dialogs = [], []
    page.on("request", lambda request: requests.append(request.url))
    page.on("dialog", lambda dialog: dialogs.append(dialog.message))
    go_to(page, address_of(HOSTILE))
    run_all(page)
    page.wait_for_timeout(1000)
    page.screenshot(path=tmp_path / "hostile.png", full_page=True)
    prompts = page.evaluate(f"() => {PROMPTS}")
    assert all(any(letter.isdigit() for letter in prompt) for prompt in prompts), prompts

    server = page.url.partition("/lab/")[0]
    assert [url for url in requests if not url.startswith((server, "data:", "blob:"))] == []
    assert dialogs == []
    assert [frame.evaluate("() => window.hit") for frame in page.frames] == [None]
    assert page.evaluate(FOREIGN, sorted(hostile.TAGS)) == []

    shown = page.evaluate(SHOWN)
    for string in hostile.STRINGS[:46]:  # the further ones are escaped, and cut
        assert " ".join(string.split())[:20].replace("\0", "\\x00") in shown
    page.evaluate("() => document.querySelectorAll('.flax-magics details').forEach(one => { one.open = true; })")
    for width in (1280, 760, 480):
        page.set_viewport_size({"width": width, "height": 1600})
        page.wait_for_timeout(500)
        assert page.evaluate("() => document.documentElement.scrollWidth") == width
        assert page.evaluate(OUTSIDE) == []
        assert width == 480 or page.evaluate(WIDER) == []  # there the place has 250 pixels, and scrolls
        page.screenshot(path=tmp_path / f"hostile-{width}.png")
    page.close()


@needs_axe
@pytest.mark.skipif(find_spec("notebook") is None, reason="Notebook 7 is not installed")
def test_notebook_7_shows_what_jupyterlab_does(page, address_of, tmp_path):
    page = page.context.browser.new_page(viewport={"width": 1280, "height": 1600})
    go_to(page, address_of(SHORT, NOTEBOOK))
    run_all(page)
    prompts = page.evaluate(f"() => {PROMPTS}")
    assert all(any(letter.isdigit() for letter in prompt) for prompt in prompts), prompts
    assert page.locator(REPORTS).count() >= 4
    opens_by_keyboard(page, APPLY)
    for theme in ("light", "dark"):
        choose_theme(page, theme)
        assert (report(page, APPLY).evaluate(LUMINANCE) > 155) is (theme == "dark")
        assert faults(page) == []
        for width in (1280, 600):
            page.set_viewport_size({"width": width, "height": 1600})
            page.wait_for_timeout(500)
            page.screenshot(path=tmp_path / f"{theme}-{width}.png", full_page=True)
            assert page.evaluate(WIDER) == []
        page.set_viewport_size({"width": 1280, "height": 1600})  # narrow, its menus fold
    page.close()
