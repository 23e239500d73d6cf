"""The draws and a replay as text and as HTML: complete, in 80 columns, every string of the user's cleaned and escaped."""

from __future__ import annotations

import re
import time

import numpy as np
from html_reader import EVIL, Reader
from msgspec.structs import replace
from rich.cells import cell_len
from runs_to_show import COMPILED, DRAW, INIT, INTERRUPTED, KEY, REUSED, TRAINED

from flax_magics.base.measures import Timing
from flax_magics.base.output import Agreement, Difference
from flax_magics.history import table
from flax_magics.history.replay import notice_of
from flax_magics.history.table import SHOWN, DrawRow, History, history_text
from flax_magics.report.text import notice_text
from flax_magics.rng.keys import RunKeys
from flax_magics.run import Run
from flax_magics.state.runs import StoredRun

AT = time.mktime((2026, 11, 25, 9, 30, 0, 0, 0, -1))


def drawn(run: Run, *marks: str, after: float = 0.0, **changes: object) -> DrawRow:
    run = replace(run, started=AT + after, keys=RunKeys.of(DRAW, *run.keys), **changes)
    KEPT.append(run)  # the session's own record holds no output
    name = (run.call if run.command == "key" else run.model) or ""
    about = (run.seed, run.draw, run.samples, run.command, name, run.mode, run.call, run.cell)
    return DrawRow(*about, run.started, marks, StoredRun(run))


KEPT: list[Run] = []
X = np.zeros((3, 4, 4), np.float32)


def history(*rows: DrawRow, earlier: int = 0) -> History:
    return History(rows, earlier, 0)


def test_each_draw_is_two_lines() -> None:
    rows = [
        drawn(INIT, inputs=((X,), {})),
        drawn(REUSED, "replayed", "cell run again since, as [9]", inputs=((X,), {"mask": None})),
        drawn(KEY, call="latent"),
    ]
    assert history_text(history(*rows)) == (
        "history · 3 runs · seed 0 · 2026-11-25\n"
        "  draw  what             digest  cell  time\n"
        f"     1  init net         {INIT.digest[:6]}  [3]   09:30:00\n"
        "        float32[3,4,4] · params 375f238f\n"
        f"     2  apply net train  {REUSED.digest[:6]}  [3]   09:30:00\n"
        "        float32[3,4,4], mask=None · dropout f71f4ea9 · replayed\n"
        "        ! cell run again since, as [9]\n"
        f"     3  key latent       {KEY.digest[:6]}  [3]   09:30:00\n"
        f"        latent {DRAW.data('latent')[:4][::-1].hex()}"
    )


def test_a_training_has_what_it_came_to_and_no_two_are_one_row() -> None:
    rows = [
        drawn(INTERRUPTED, inputs=((X,), {})),
        *(drawn(TRAINED, draw=draw, inputs=((X,), {})) for draw in (4, 5, 6)),
    ]
    shown = history_text(history(*rows)).splitlines()
    assert shown[2:5] == [
        f"     3  train net  {INTERRUPTED.digest[:6]}  [3]   09:30:00",
        "        step 6 of 500 · epoch 1.5 · interrupted · loss 0.5 · accuracy 0.875 ·",
        "            eval loss 0.6 · eval accuracy 0.812 · float32[3,4,4] ·",
    ]
    assert [line.split()[0] for line in shown if "train net" in line] == ["3", "4", "5", "6"]
    html = table.history_html(history(*rows))
    assert "train net · step 6 of 500 · epoch 1.5 · interrupted · loss 0.5" in Reader(html).text


def test_alike_runs_of_one_cell_are_one_row_and_two_are_two() -> None:
    rows = [drawn(REUSED, draw=draw) for draw in range(2, 102)]
    text = history_text(history(*rows))
    assert text.splitlines()[2] == "  2–101  apply net train  100 runs  [3]   09:30:00"
    assert len(history_text(history(*rows[:2])).splitlines()) == 6
    other = drawn(REUSED, draw=102, mode="eval")
    assert len(history_text(history(*rows, other)).splitlines()) == 6


def test_thousands_of_cells_are_cut_to_the_last_and_that_is_said() -> None:
    rows = [drawn(REUSED, draw=draw, cell=draw) for draw in range(1, 1001)]
    lines = history_text(history(*rows)).splitlines()
    assert lines[1] == "  940 earlier runs not shown: %flax_history --all"
    assert len(lines) == 3 + 2 * SHOWN
    whole = history(*rows)
    assert len(history_text(whole, table.rows(whole, everything=True)).splitlines()) == 2 + 2 * 1000
    assert Reader(table.history_html(history(*rows))).text.count("apply net train") == SHOWN


def test_what_is_not_shown_is_counted_in_runs() -> None:
    rows = [drawn(REUSED, draw=draw, cell=1 + draw // 10) for draw in range(10, 1010)]
    lines = history_text(history(*rows, earlier=7)).splitlines()
    assert lines[0] == "history · 1,007 runs · seed 0 · 2026-11-25"
    assert lines[1] == "  407 earlier runs not shown: %flax_history --all"
    assert lines[3] == "    410–419  apply net train  10 runs  [42]   09:30:00"


def test_a_loop_that_trains_and_evaluates_by_turns_is_two_rows() -> None:
    rows = [drawn(REUSED, draw=draw, mode="eval" if draw % 2 else "train") for draw in range(2, 2002)]
    assert history_text(history(*rows)).splitlines()[2::2] == [
        "  2 … 2000  apply net train  1,000 runs  [3]   09:30:00",
        "  3 … 2001  apply net eval   1,000 runs  [3]   09:30:00",
    ]
    few = history_text(history(*rows[:6])).splitlines()[2::2]
    assert [line.split()[0] for line in few] == ["2", "3", "4", "5", "6", "7"]


def test_two_seeds_are_told_apart() -> None:
    text = history_text(history(drawn(REUSED), drawn(REUSED, seed=12, draw=1)))
    assert text.splitlines()[0] == "history · 2 runs · seeds 0, 12 · 2026-11-25"
    assert [line.split()[0] for line in text.splitlines()[2::2]] == ["0:2", "12:1"]


IN_TIME = (
    drawn(COMPILED),
    drawn(REUSED, after=10.0),
    drawn(TRAINED, after=20.0, reason=""),
    drawn(REUSED, draw=4, after=4000.0),
)


def test_programs_that_were_compiled_are_listed_with_their_reasons() -> None:
    assert history_text(history(*IN_TIME)).splitlines()[-4:] == [
        "",
        "  compiled 2 times, in 0.82 s",
        "    1  0.41 s  first run of this program",
        "    3  0.41 s  the steps of a training",
    ]
    assert "compiled" not in history_text(history(IN_TIME[1]))
    many = [drawn(COMPILED, draw=n, timing=replace(COMPILED.timing, lower=float(n % 10))) for n in range(1, 13)]
    lines = history_text(history(*many)).splitlines()[-9:]
    assert lines[0] == "  compiled 12 times, in 52.8 s; the longest 8"
    assert [line.split()[0] for line in lines[1:]] == ["2", "3", "4", "5", "6", "7", "8", "9"]


def test_the_strip_has_each_run_at_its_time_and_no_pause() -> None:
    strip = table.strip_of(IN_TIME)
    assert strip is not None
    assert strip.said == "4 runs from 09:30:00 to 10:36:40; a program was compiled for 2 of them"
    assert (strip.begin, strip.end) == ("09:30:00", "10:36:40")
    assert (strip.runs, strip.compiled) == ((0, 281, 563, 600), (0, 563))
    assert [(round(x), round(width)) for x, width in strip.trainings] == [(563, 13)]
    assert [(round(x), width) for x, width in strip.pauses] == [(576, 24)]
    page = table.history_html(history(*IN_TIME))
    assert f'role="img" aria-label="{strip.said}"' in page
    assert 'd="M-5 3h10l-5 9zM558 3h10l-5 9z"' in page
    text = Reader(re.sub(r"<svg.*?</svg>", "", page, flags=re.DOTALL)).text
    assert "09:30:00 to 10:36:40 · run · training · program compiled · pause of more than a minute, cut out" in text
    assert "Compiled 2 times, in 0.82 s draw 1 0.41 s first run of this program" in text


def test_a_strip_goes_over_days_and_has_room_for_many_pauses() -> None:
    rows = [drawn(REUSED, draw=n, after=86_400.0 * n) for n in range(2, 102)]
    assert table.strip_of(rows) is None  # what is left without the pauses is less than a second
    rows = [drawn(REUSED, draw=n, after=86_400.0 * n, timing=Timing(run=1.0)) for n in range(2, 102)]
    strip = table.strip_of(rows)
    assert strip is not None
    assert (strip.begin, strip.end) == ("09:30:00", "2027-03-06 09:30:01")
    assert (len(strip.pauses), strip.runs[0], strip.runs[-1]) == (99, 0, 597)
    assert table.strip_of(rows[:1]) is not None
    assert table.strip_of([]) is None


def test_long_and_hostile_names_stay_in_their_place() -> None:
    rows = [
        drawn(REUSED, "cell edited since, as [12]", model="a_very_long_name_of_a_model_" * 4, inputs=((X,) * 20, {})),
        drawn(REUSED, EVIL + "\x1b[31m", model=EVIL, mode=EVIL, used={EVIL: ()}),
        drawn(KEY, call="電" * 40),
    ]
    text = history_text(history(*rows, earlier=2))
    assert max(map(cell_len, text.splitlines())) <= 80
    assert "\x1b" not in text
    page = table.history_html(history(*rows, earlier=2))
    assert Reader(page).tags.isdisjoint({"script", "img", "a", "link", "iframe"})
    assert "&lt;script&gt;" in page
    assert "\x1b" not in page


def test_html_says_that_there_is_no_draw_yet() -> None:
    assert Reader(table.history_html(history())).text == (
        "history · 0 runs · seed 0 no draw yet: %flax_apply net(x) makes one"
    )


def test_html_says_what_the_text_says() -> None:
    rows = [
        drawn(INIT, inputs=((X,), {})),
        drawn(REUSED, "replayed", "cell run again since, as [9]", inputs=((X,), {})),
    ]
    words = Reader(table.history_html(history(*rows))).text
    for word in ("history · 2 runs · seed 0 · 2026-11-25", "float32[3,4,4]", "dropout f71f4ea9", "[3]", "09:30:00"):
        assert word in words
    assert "replayed ! cell run again since, as [9]" in words
    assert "style=" not in re.sub(r'style="text-align:left"', "", table.history_html(history(*rows)))


def replayed(agreement: Agreement) -> str:
    return notice_text(notice_of(replace(REUSED, replayed=True, agreement=agreement)))


def test_a_replay_says_identical_or_where_it_differs_and_by_how_much() -> None:
    assert replayed(Agreement(True, "output")) == (
        "net · train · draw 2 of seed 0 · replayed · identical: float32[3,4,3]"
    )
    assert replayed(Agreement(True, "digest")).endswith("identical, by its digest: float32[3,4,3]")
    differences = (Difference("['a']", 3, 36, 1.1920929e-07, 1), Difference("['n']", 1, 3, 5.0))
    assert replayed(Agreement(False, "output", differences)) == (
        "net · train · draw 2 of seed 0 · replayed · differs\n"
        "! ['a']: 3 of 36 elements, up to 1.19e-07 (1 ulp)\n"
        "! ['n']: 1 of 3 elements, up to 5"
    )
    assert replayed(Agreement(False, "digest")) == (
        "net · train · draw 2 of seed 0 · replayed · differs\n"
        "! its output is gone, and a digest cannot tell where or by how much they differ"
    )


def test_of_many_leaves_some_are_named_and_nothing_to_compare_with_is_said() -> None:
    many = tuple(Difference(f"['{n}']", 1, 3, 5.0) for n in range(8))
    assert replayed(Agreement(False, "output", many)).splitlines()[-1] == "! and 2 more leaves"
    assert replayed(Agreement(None)) == (
        "net · train · draw 2 of seed 0 · replayed · nothing to compare with\n"
        "! its output was let go of before a digest was taken: there is nothing to\n"
        "  compare with\n"
        "  form: %flax_apply -o run …"
    )
