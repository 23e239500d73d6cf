"""Programs on disk: hit by a second process, bits equal, never in the way of a user's own cache.

A file that is not exactly what was asked for is a miss: never an error, never another program.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, TypeAlias

import flax.linen as nn
import jax
import jax.numpy as jnp
import processes
import pytest
from by_hand import SUPPORT, MyModel, apply_by_hand, bits, notebook_x
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sessions import session_of, settle
from sharp_bits import MODEL

from flax_magics.compile import disk_cache
from flax_magics.compile.disk_cache import DiskCache, default_folder

pytestmark = pytest.mark.own_executables

SCRIPT = """
import hashlib, json, sys
import jax, numpy as np
sys.path.insert(0, TESTS)
from by_hand import MyModel, bits, notebook_x
from flax_magics import Session

compiled = []
jax.monitoring.register_event_duration_secs_listener(
    lambda event, seconds, **more: compiled.append(more) if event.endswith('backend_compile_duration') else None)
x = notebook_x()
session = Session(seed=0, disk_cache=True)
session.register('net', MyModel(3, True))
compiled.clear()
run = session.apply('net', x)
here = len(compiled)
import threading
for thread in threading.enumerate():
    if thread.name == 'flax_magics compile':
        thread.join()
everything = bits((run.output, session.models['net'].variables))
digest = hashlib.sha256(repr(everything).encode()).hexdigest()
print(json.dumps({'program': run.program, 'compilations': here, 'bits': digest}))
"""


def start(environment: dict[str, str] | None = None) -> subprocess.Popen[str]:
    script = SCRIPT.replace("TESTS", repr(SUPPORT))
    return subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=processes.environment() | (environment or {}),
    )


def result(process: subprocess.Popen[str]) -> dict[str, Any]:
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return dict(json.loads(out.splitlines()[-1]))


def ran(environment: dict[str, str] | None = None) -> dict[str, Any]:
    return result(start(environment))


def programs(folder: Path) -> list[Path]:
    return sorted((folder / "flax_magics" / "programs").glob("*"))


def test_a_second_process_compiles_nothing_and_has_the_same_bits(cache_directory):
    first = ran()
    assert first["program"] == "compiled"
    assert programs(cache_directory)
    second = ran()
    assert (second["program"], second["compilations"]) == ("disk cache", 0)
    assert second["bits"] == first["bits"]


def test_two_processes_at_once(cache_directory):
    found = [result(process) for process in [start(), start()]]
    assert found[0]["bits"] == found[1]["bits"]
    assert not [file for file in programs(cache_directory) if file.name.startswith("new-")]
    assert ran()["program"] == "disk cache"


def test_another_processor_or_version_or_flag_is_another_program(monkeypatch):
    cache = DiskCache()
    key = cache.name_of(("text", "settings"))
    assert cache.name_of(("text", "settings")) == key
    assert cache.name_of(("other", "settings")) != key
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=true")
    assert cache.name_of(("text", "settings")) != key
    monkeypatch.delenv("XLA_FLAGS")
    for change in ("_processor", "__version__"):
        with monkeypatch.context() as patch:
            patch.setattr(disk_cache, change, (lambda: "another") if change == "_processor" else "another")
            disk_cache._surroundings.cache_clear()
            assert cache.name_of(("text", "settings")) != key
    disk_cache._surroundings.cache_clear()


def test_a_script_keeps_nothing_unless_it_asks(cache_directory):
    session = session_of(MyModel(3, True))
    session.apply("net", notebook_x())
    settle(session)
    assert programs(cache_directory) == []


def test_a_folder_of_ones_own(tmp_path):
    for program in ("compiled", "disk cache"):
        session = session_of(MyModel(3, True), disk_cache=tmp_path / "mine")
        run = session.apply("net", notebook_x())
        assert run.program == program
        assert run.reason == ("first run of this program" if program == "compiled" else "")
        settle(session)
    assert list((tmp_path / "mine").iterdir())


def test_a_notebook_keeps_programs_until_it_is_told_not_to(notebook, cache_directory):
    notebook(MODEL)
    notebook("%flax_apply -q my_model(x);")
    settle(notebook.session)
    assert programs(cache_directory)
    *_, on_disk = notebook("%flax").split("  on disk ")
    assert re.match(r"[\d.]+KBin/\S*/flax_magics/programs", "".join(on_disk.split()))
    notebook("%config FlaxMagics.disk_cache = False")
    before = programs(cache_directory)
    notebook("%flax_apply -q my_model(x[:2]);")
    settle(notebook.session)
    assert programs(cache_directory) == before
    assert "  on disk                        off" in notebook("%flax")


def test_a_users_own_cache_is_used_and_ours_stands_aside(cache_directory, tmp_path):
    theirs = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "theirs"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    first = ran(theirs)
    assert first["program"] == "compiled"
    assert programs(cache_directory) == []
    assert list((tmp_path / "theirs").iterdir())
    second = ran(theirs)
    assert (second["program"], second["bits"]) == ("disk cache", first["bits"])


def test_jaxs_own_setting_is_left_alone(tmp_path):
    before = (jax.config.jax_compilation_cache_dir, jax.config.jax_enable_compilation_cache)
    session = session_of(MyModel(3, True), disk_cache=tmp_path)
    session.apply("net", notebook_x())
    settle(session)
    assert (jax.config.jax_compilation_cache_dir, jax.config.jax_enable_compilation_cache) == before


def test_programs_with_callbacks_are_not_kept(tmp_path):
    heard: list[str] = []

    class Calling(nn.Module):
        word: str

        def __call__(self, x: Any) -> Any:
            jax.debug.callback(lambda: heard.append(self.word))
            return x + 1

    for word in ("one", "two"):
        session = session_of(Calling(word), disk_cache=tmp_path / "own")
        session.init("net", jnp.ones(2))
        heard.clear()
        assert session.apply("net", jnp.ones(2)).program == "compiled"
        assert heard == [word]
        settle(session)
    assert not (tmp_path / "own").exists()


def test_what_was_used_longest_ago_is_dropped(tmp_path):
    executables = [jax.jit(lambda x, n=n: x + n).lower(jnp.ones(2)).compile() for n in range(3)]
    cache = DiskCache(tmp_path)
    for i, name in enumerate("ab"):
        cache.store(name, executables[i])
        os.utime(tmp_path / name, (i, i))
    cache.limit = cache.size
    assert bits(cache.load("a", executables[0])(jnp.ones(2))) == bits(jnp.ones(2))
    cache.store("c", executables[2])
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a", "c"]


@pytest.mark.skipif(os.name != "posix", reason="there are no such rights")
def test_a_folder_that_others_may_write_is_not_used(tmp_path):
    executable = jax.jit(lambda x: x + 1).lower(jnp.ones(2)).compile()
    cache = DiskCache(tmp_path / "programs")
    cache.store("a", executable)
    assert (tmp_path / "programs").stat().st_mode & 0o777 == 0o700
    (tmp_path / "programs").chmod(0o777)
    assert cache.load("a", executable) is None
    cache.store("b", executable)
    assert [file.name for file in (tmp_path / "programs").iterdir()] == ["a"]


def test_a_place_that_cannot_be_written_fails_nothing(tmp_path):
    (tmp_path / "file").write_text("")
    session = session_of(MyModel(3, True), disk_cache=tmp_path / "file" / "below")
    assert session.apply("net", notebook_x()).program == "compiled"
    settle(session)


def test_the_folder_is_where_the_system_has_caches(monkeypatch, cache_directory):
    assert default_folder() == cache_directory / "flax_magics" / "programs"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setenv("HOME", "/home/me")
    assert default_folder() == Path("/home/me/.cache/flax_magics/programs")
    monkeypatch.setattr("sys.platform", "darwin")
    assert default_folder() == Path("/home/me/Library/Caches/flax_magics/programs")


# -- what lies in the folder

PROGRAMS = {
    "plus": (lambda x: x + 1, jnp.ones(2)),
    "minus": (lambda x: x - 1, jnp.ones(2)),
    "wider": (lambda x: x + 1, jnp.ones(3)),
    "ints": (lambda x: x + 1, jnp.ones(2, int)),
    "two": (lambda x: (x + 1, x), jnp.ones(2)),
}


@pytest.fixture(scope="module")
def lowered() -> dict[str, Any]:
    """A few small programs."""
    return {name: jax.jit(function).lower(x) for name, (function, x) in PROGRAMS.items()}


@pytest.fixture(scope="module")
def stored(lowered: Any, tmp_path_factory: Any) -> dict[str, bytes]:
    """What the cache writes for each."""
    cache = DiskCache(tmp_path_factory.mktemp("stored"))
    for name, program in lowered.items():
        cache.store(name, program.compile())
    return {name: (cache.folder / name).read_bytes() for name in lowered}


def give(folder: Path, name: str, program: Any) -> Any:
    """What the cache in `folder` gives for a program: its result by name, None for a miss."""
    executable = DiskCache(folder).load(name, program)
    return None if executable is None else bits(executable(PROGRAMS[name][1]))


def test_each_entry_gives_its_program(lowered, stored, tmp_path):
    for name, data in stored.items():
        (tmp_path / name).write_bytes(data)
        function, x = PROGRAMS[name]
        assert give(tmp_path, name, lowered[name]) == bits(jax.jit(function)(x))


@given(
    st.sampled_from(sorted(PROGRAMS)),
    st.lists(
        st.tuples(st.sampled_from(["cut", "flip", "insert", "drop"]), st.floats(0, 1))
        | st.tuples(st.just("head"), st.floats(0, 0.02)),
        min_size=1,
        max_size=3,
    ),
)
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damage_is_a_miss(lowered, stored, tmp_path_factory, name, damages):
    data = stored[name]
    for kind, where in damages:
        i = int(where * max(len(data) - 1, 0))
        if kind == "cut":
            data = data[:i]
        elif kind == "insert":
            data = data[:i] + b"\n" + data[i:]
        elif kind == "drop":
            data = data[:i] + data[i + 7 :]
        elif data:
            data = data[:i] + bytes([data[i] ^ 1]) + data[i + 1 :]
    folder = tmp_path_factory.mktemp("damaged")
    (folder / name).write_bytes(data)
    if data == stored[name]:
        return
    assert give(folder, name, lowered[name]) is None
    assert not (folder / name).exists()


@pytest.mark.parametrize(("asked", "there"), list(itertools.permutations(sorted(PROGRAMS), 2)))
def test_the_file_of_another_program_is_a_miss(lowered, stored, tmp_path, asked, there):
    (tmp_path / asked).write_bytes(stored[there])
    assert give(tmp_path, asked, lowered[asked]) is None


@pytest.mark.parametrize(("asked", "there"), list(itertools.permutations(["plus", "wider", "ints", "two"], 2)))
def test_even_under_its_own_name_a_program_of_other_types_is_none(lowered, stored, tmp_path, asked, there):
    (tmp_path / there).write_bytes(stored[there])
    assert DiskCache(tmp_path).load(there, lowered[asked]) is None


def test_whatever_else_stands_in_the_place_is_a_miss_and_stays_or_goes(lowered, stored, tmp_path):
    program = lowered["plus"]
    cache = DiskCache(tmp_path / "programs")
    cache.store("plus", program.compile())
    place = tmp_path / "programs" / "plus"
    place.unlink()
    place.mkdir()
    assert cache.load("plus", program) is None
    cache.store("plus", program.compile())
    assert place.is_dir()
    assert [file.name for file in place.parent.iterdir()] == ["plus"]
    assert cache.size == 0
    place.rmdir()
    place.symlink_to(tmp_path / "nowhere")
    assert cache.load("plus", program) is None
    place.unlink()
    for other in (b"", b"flax_magics program 1\n" + stored["plus"][22:], b"\x80\x04N.", os.urandom(100)):
        place.write_bytes(other)
        assert cache.load("plus", program) is None
        assert not place.exists()


def test_a_session_goes_on_with_whatever_lies_under_its_programs_names(tmp_path):
    first = session_of(MyModel(3, True), disk_cache=tmp_path / "programs")
    output = bits(first.apply("net", notebook_x()).output)
    settle(first)
    files = sorted((tmp_path / "programs").iterdir())
    assert len(files) > 2
    contents = [file.read_bytes() for file in files]
    for file, data in zip(files, [*contents[1:], contents[0]], strict=True):
        file.write_bytes(data)
    again = session_of(MyModel(3, True), disk_cache=tmp_path / "programs")
    run = again.apply("net", notebook_x())
    assert (run.program, bits(run.output)) == ("compiled", output)
    settle(again)
    assert [file.read_bytes()[:22] for file in files] == [data[:22] for data in contents]
    third = session_of(MyModel(3, True), disk_cache=tmp_path / "programs")
    run = third.apply("net", notebook_x())
    assert (run.program, bits(run.output)) == ("disk cache", output)


@pytest.mark.parametrize("order", [("rbg", "unsafe_rbg", "threefry2x32"), ("unsafe_rbg", "rbg", "unsafe_rbg")])
def test_sessions_of_other_kinds_of_keys_share_a_folder(tmp_path, order):
    class Handing(nn.Module):
        @nn.compact
        def __call__(self, x: Any, key: Any) -> Any:
            return nn.Dropout(0.5, deterministic=False)(nn.Dense(3)(x)), key

    for i, impl in enumerate(order):
        with jax.default_prng_impl(impl):
            session = session_of(Handing(), disk_cache=tmp_path / "programs")
            key = jax.random.key(5)
            run = session.apply("net", jnp.ones((2, 4)), key)
            keys = {"dropout": run.keys["dropout"]}
            variables = session.models["net"].variables
            assert bits(run.output) == bits(apply_by_hand(Handing(), variables, keys, jnp.ones((2, 4)), key))
            assert run.output[1].dtype == key.dtype
            assert run.program == ("disk cache" if impl in order[:i] else "compiled")
            settle(session)


def test_a_weak_type_is_no_strong_one_in_memory_and_on_disk(tmp_path):
    class Doubling(nn.Module):
        def __call__(self, x: Any) -> Any:
            return x * 2

    for program in ("compiled", "disk cache"):
        session = session_of(Doubling(), disk_cache=tmp_path / "programs")
        session.init("net", 1.0)
        for x in (2.0, jnp.float32(2.0), jax.numpy.asarray(2.0)):
            run = session.apply("net", x)
            assert run.output.weak_type == jax.jit(lambda x: x * 2)(x).weak_type
            assert run.program in (program, "reused")
        settle(session)


# -- what a call of the same looks had is loaded while this one is traced

Loads: TypeAlias = "list[tuple[str, bool]]"


@pytest.fixture
def loads(monkeypatch) -> Loads:
    """Each file that is loaded: its name, and whether that is a guess."""
    noted: Loads = []
    load = DiskCache.load

    def noting(cache: DiskCache, name: str, lowered: Any = None) -> Any:
        noted.append((name, lowered is None))
        return load(cache, name, lowered)

    monkeypatch.setattr(DiskCache, "load", noting)
    return noted


class Times(nn.Module):
    factor: float

    @nn.compact
    def __call__(self, x: Any) -> Any:
        return nn.Dropout(0.5, deterministic=False)(x * self.factor)


def applied(folder: Path, factor: float) -> str:
    """Where the program of a fresh session's first run is from; its output is the one by hand."""
    session, x = session_of(Times(factor), disk_cache=folder), jnp.arange(8.0)
    run = session.apply("net", x)
    assert bits(run.output) == bits(apply_by_hand(Times(factor), {}, {"dropout": run.keys["dropout"]}, x))
    settle(session)
    return run.program


def note_in(folder: Path) -> Path:
    (note,) = (file for file in folder.iterdir() if file.stat().st_size == 64)
    return note


def test_it_is_loaded_once_and_used(tmp_path, loads):
    assert applied(tmp_path, 2.0) == "compiled"
    program = note_in(tmp_path).read_text()
    loads.clear()
    assert applied(tmp_path, 2.0) == "disk cache"
    assert [load for load in loads if load[0] == program] == [(program, True)]


def test_another_edition_of_these_looks_is_a_program_of_its_own(tmp_path, loads):
    assert applied(tmp_path, 2.0) == "compiled"
    guessed = note_in(tmp_path).read_text()
    assert applied(tmp_path, 3.0) == "compiled"
    assert (guessed, True) in loads
    assert applied(tmp_path, 3.0) == "disk cache"
    assert applied(tmp_path, 2.0) == "disk cache"


def test_a_session_does_not_guess_again_what_it_has(tmp_path, loads):
    assert applied(tmp_path, 2.0) == "compiled"
    session = session_of(Times(2.0), disk_cache=tmp_path)
    session.apply("net", jnp.arange(8.0))
    loads.clear()
    session.register("net", Times(3.0))
    session.apply("net", jnp.arange(8.0))
    settle(session)
    assert not [load for load in loads if load[1]]


@pytest.mark.parametrize("noted", [b"", b"a" * 63, b"../" * 21 + b"a", b"a" * 64, bytes(range(192, 256))])
def test_a_damaged_note_is_none_and_written_anew(tmp_path, noted):
    secret = tmp_path / "a"
    secret.write_text("not ours")
    folder = tmp_path / "programs"
    assert applied(folder, 2.0) == "compiled"
    note = note_in(folder)
    program = note.read_bytes()
    note.write_bytes(noted)
    assert applied(folder, 2.0) == "disk cache"
    assert note.read_bytes() == program
    assert secret.read_text() == "not ours"


def test_a_damaged_program_that_was_guessed_is_compiled_anew(tmp_path):
    assert applied(tmp_path, 2.0) == "compiled"
    (tmp_path / note_in(tmp_path).read_text()).write_bytes(b"flax_magics program 3\ndamaged")
    assert applied(tmp_path, 2.0) == "compiled"
    assert applied(tmp_path, 2.0) == "disk cache"


def test_trees_with_nodes_of_the_users_are_not_guessed(lowered, tmp_path, loads):
    @jax.tree_util.register_dataclass
    @dataclasses.dataclass
    class Pair:
        one: Any
        other: Any

    program = jax.jit(lambda pair: Pair(pair.other, pair.one + 1)).lower(Pair(jnp.ones(2), jnp.zeros(2)))
    cache = DiskCache(tmp_path)
    cache.store("pair", program.compile())
    assert cache.load("pair") is None
    swapped = cache.load("pair", program)(Pair(jnp.ones(2), jnp.zeros(2)))
    assert bits((swapped.one, swapped.other)) == bits((jnp.zeros(2), jnp.ones(2) + 1))
