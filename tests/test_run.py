"""The Run as data: digests, shapes, JSON."""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import json
import re
from pathlib import Path
from typing import get_args, get_type_hints

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from by_hand import MyModel, notebook_x
from sessions import session_of

import flax_magics
from flax_magics.base.digest import describe, digest_of
from flax_magics.base.measures import Cost, Limits, Memory, Steady, Timing
from flax_magics.export.cells import MATCHES
from flax_magics.report.facts import REPORTED
from flax_magics.report.html import report_html
from flax_magics.run import COMMANDS
from flax_magics.snapshot.document import RunRecord


def test_a_digest_is_what_its_documentation_says():
    tree = {"b": np.arange(3, dtype=np.int32), "a": (np.float32(1.5),)}
    hasher = hashlib.sha256()
    hasher.update(b"['a'][0]\0" + b"float32[]\0" + np.float32(1.5).tobytes())
    hasher.update(b"['b']\0" + b"int32[3]\0" + np.arange(3, dtype="<i4").tobytes())
    assert digest_of(tree) == hasher.hexdigest()[:16]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (np.zeros(4), np.zeros((2, 2))),
        (np.zeros(2, np.float32), np.zeros(2, np.int32)),
        ([np.zeros(2)], {"0": np.zeros(2)}),
        (np.array(0.0), np.array(-0.0)),
        (np.zeros(()), np.zeros(1)),
        (jax.random.key(0), jax.random.key(1)),
        (jax.random.key(0), jax.random.PRNGKey(0)),
        ("a", "b"),
    ],
)
def test_other_bits_other_digest(one, other):
    assert digest_of(one) != digest_of(other)


def test_byte_order_and_memory_layout_do_not_count():
    array = np.arange(6, dtype="<f4").reshape(2, 3)
    assert digest_of(array.astype(">f4")) == digest_of(array)
    assert digest_of(np.asfortranarray(array)) == digest_of(array)
    assert digest_of(jnp.asarray(array)) == digest_of(array)


Pair = collections.namedtuple("Pair", ["left", "right"])


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Box:
    inside: object


@pytest.mark.parametrize(
    ("tree", "text"),
    [
        (jnp.ones((3, 4)), "float32[3,4]"),
        (jnp.bfloat16(1), "bfloat16[]"),
        ({"a": jnp.ones(2), "b": None}, "{a: float32[2], b: None}"),
        ((jnp.ones(2),), "(float32[2],)"),
        ([1, 2.5, "x"], "[1, 2.5, 'x']"),
        (Pair(jnp.ones(1), 2), "Pair(left=float32[1], right=2)"),
        (Box(jnp.ones(1)), "Box(float32[1])"),
        (jax.random.key(0), "key<fry>[]"),
        ({"k" * 30: jnp.ones(1), "l" * 30: jnp.ones(1)}, "{" + "k" * 30 + ": float32[1], " + "l" * 14 + "…"),
        (object, "type"),
    ],
)
def test_an_output_is_described_by_structure_dtype_and_shape(tree, text):
    assert describe(tree) == text


def test_a_run_as_json_says_everything_but_the_arrays():
    session = session_of(MyModel(3, True))
    run = session.apply("net", notebook_x(), repeat=2)
    data = json.loads(json.dumps(run.to_json()))
    words = {name: "".join(f"{word:08x}" for word in jax.random.key_data(key)) for name, key in run.keys.items()}
    assert data["keys"] == words
    assert words["params"].startswith("375f238f")
    assert data["used"] == {"dropout": ["Dropout_0"]}
    assert data["made"] == {"parameters": 15, "bytes": 60, "collections": ["params"], "added": False}
    assert data["digest"] == digest_of(run.output)
    assert (data["output"], data["draw"], data["seed"], data["program"]) == ("float32[3,4,3]", 1, 0, "compiled")
    assert len(data["timing"]["steady"]) == 2
    assert data["versions"]["jax"] == jax.__version__


@pytest.mark.parametrize("read", [False, True])
def test_of_a_run_whose_output_was_donated_is_known_what_was_read_before(read):
    session = session_of(MyModel(3, True))
    run = session.apply("net", notebook_x(), samples=2)
    digest, known = digest_of(run.output), (run.digest, run.spread) if read else (None, ())
    run.output.delete()
    assert (run.digest, run.spread) == known
    assert (run.shape, run.values[0].size) == ("float32[2,3,4,3]", 72)  # each run is looked through for NaN
    data = run.to_json()
    assert (data["digest"], data["output"], "bits" in data) == (run.digest, run.shape, False)
    assert session.history()[0].run is run
    against = ("digest", True) if read else ("", None)
    replay = session.replay(1)
    assert (replay.agreement.against, replay.agreement.identical, digest_of(replay.output)) == (*against, digest)


def test_every_room_that_tells_commands_apart_knows_every_command():
    assert REPORTED.keys() == MATCHES.keys() == COMMANDS.keys()
    assert get_args(get_type_hints(RunRecord)["command"]) == tuple(COMMANDS)


def test_no_room_tells_commands_apart_anywhere_else():
    compared = re.compile(rf"""command["')\]]* (==|!=|in|not in) \(?["']({"|".join(COMMANDS)})["']""")
    files = Path(flax_magics.__file__).parent.rglob("*.py")
    assert [file.name for file in files if compared.search(file.read_text(encoding="utf-8"))] == []


def test_median_and_spread():
    steady = Steady((3.0, 1.0, 2.0, 5.0, 4.0))
    assert (steady.median, steady.spread) == (3.0, 1.0)


def test_a_run_shows_itself():
    session = session_of(MyModel(3, True))
    run = session.apply("net", notebook_x())
    assert re.fullmatch(
        r"net · as written · \w+:0 · draw 1 · 15 parameters · compiled in [\d.]+ \w+ · run [\d.]+ \w+", repr(run)
    )
    assert str(run).splitlines()[0] == "new session, seed 0"
    assert "  keys  params → new variables    dropout → Dropout_0" in str(run).splitlines()
    assert run._repr_html_() == report_html(run, "normal")
    assert repr(run.keys) == "{params: 375f238f, dropout: f71f4ea9}"
    assert repr(session.replay(1)).endswith(" · identical: float32[3,4,3]")


def test_measurements_have_units():
    timing = Timing(trace=0.021, compile=0.377, run=0.00022, steady=Steady((0.0002, 0.0002)))
    assert repr(timing) == (
        "<Timing: trace 21.0 ms, compile 0.38 s, run 0.22 ms, steady <Steady: median 0.20 ms ± 0.00 ms of 2>>"
    )
    assert repr(Timing()) == "<Timing: nothing was timed>"
    assert repr(Memory(204, 144, 1200, 3400)) == (
        "<Memory: arguments 204 B, outputs 144 B, temporaries 1.2 KB, code 3.4 KB>"
    )
    assert repr(Cost(2e6, 4e3, loops=True)) == "<Cost: at least 2.0 MFLOP, at least 4.0 KB>"
    assert repr(Limits("gpu:0", "bfloat16", 9.12e14, 1.3e12)) == (
        "<Limits of gpu:0: 912 TFLOP/s in bfloat16, 1.3 TB/s>"
    )
