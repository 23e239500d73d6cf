"""A file of the disk cache that is not exactly what was asked for is a miss: never an error, never another program."""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from by_hand import MyModel, apply_by_hand, bits, notebook_x
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flax_magics import Session
from flax_magics.compile.disk_cache import DiskCache

pytestmark = pytest.mark.own_executables

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


def settle(session: Session) -> None:
    """Waits until what was compiled is on disk."""
    session.programs.compiler.workers.submit(lambda: None).result()
    while session.programs.compiler.workers.busy:
        pass


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
        st.one_of(
            st.tuples(st.just("cut"), st.floats(0, 1)),
            st.tuples(st.just("flip"), st.floats(0, 1)),
            st.tuples(st.just("insert"), st.floats(0, 1)),
            st.tuples(st.just("head"), st.floats(0, 0.02)),
            st.tuples(st.just("drop"), st.floats(0, 1)),
        ),
        min_size=1,
        max_size=3,
    ),
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
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
    first = Session(seed=0, disk_cache=tmp_path / "programs")
    first.register("net", MyModel(3, True))
    output = bits(first.apply("net", notebook_x()).output)
    settle(first)
    files = sorted((tmp_path / "programs").iterdir())
    assert len(files) > 2
    contents = [file.read_bytes() for file in files]
    for file, data in zip(files, [*contents[1:], contents[0]], strict=True):
        file.write_bytes(data)
    again = Session(seed=0, disk_cache=tmp_path / "programs")
    again.register("net", MyModel(3, True))
    run = again.apply("net", notebook_x())
    assert (run.program, bits(run.output)) == ("compiled", output)
    settle(again)
    assert [file.read_bytes()[:22] for file in files] == [data[:22] for data in contents]
    third = Session(seed=0, disk_cache=tmp_path / "programs")
    third.register("net", MyModel(3, True))
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
            session = Session(seed=0, disk_cache=tmp_path / "programs")
            session.register("net", Handing())
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
        @nn.compact
        def __call__(self, x: Any) -> Any:
            return x * 2

    for program in ("compiled", "disk cache"):
        session = Session(seed=0, disk_cache=tmp_path / "programs")
        session.register("net", Doubling())
        session.init("net", 1.0)
        for x in (2.0, jnp.float32(2.0), jax.numpy.asarray(2.0)):
            run = session.apply("net", x)
            assert run.output.weak_type == jax.jit(lambda x: x * 2)(x).weak_type
            assert run.program in (program, "reused")
        settle(session)
