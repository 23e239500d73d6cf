"""`%flax_free`: what a notebook keeps of cells that have run goes, and what its names reach stays."""

from __future__ import annotations

import gc
import sys

import jax
import pytest

from flax_magics.doctor import findings, methods
from flax_magics.doctor.findings import buffer_of, reached
from flax_magics.notebook import free

NET = """%%flaxmodel net = Net()
class Net(nn.Module):
  @nn.compact
  def __call__(self, x):
    return nn.Dense(2)(x)
"""
FAILS = """
def f(a):
  b = jnp.ones((500, 500)) * a
  raise ValueError(b.shape)
"""
OUT_OF_MEMORY = """
def g():
  b = (jnp.ones((500, 500)) + 1).block_until_ready()
  return jax.jit(lambda x: jnp.broadcast_to(x, (1 << 44,)) + 1)(1.0)
"""


@pytest.fixture(autouse=True)
def process_of_its_own(notebook, monkeypatch):
    """Leaves out what other tests of this process keep alive: their arrays, and their modules with all they lead to."""
    jax.clear_caches()
    gc.collect()
    others, modules = (
        findings.live_arrays(),
        set(sys.modules),
    )  # held until the test ends: no memory is given to another
    known, live = {*map(buffer_of, others.values())}, findings.live_arrays

    def made_since():
        return {number: array for number, array in live().items() if buffer_of(array) not in known}

    def of_new_modules(names):
        return ((name, value) for name, value in users_modules(names) if name.rpartition(".")[0] not in modules)

    users_modules = methods.users_modules
    for module in (findings, methods, free):
        monkeypatch.setattr(module, "live_arrays", made_since)
    monkeypatch.setattr(methods, "users_modules", of_new_modules)


@pytest.fixture
def alive(notebook):
    """Counts the arrays that were made since the test began: those alive, and those that names and models reach."""

    def count():
        gc.collect()
        live = findings.live_arrays()
        users = {name: value for name, value in notebook.shell.user_ns.items() if not name.startswith("_")}
        session, stops = notebook.session, {id(notebook.shell), id(notebook.shell.user_ns), id(notebook.session)}
        entries = {} if session is None else session._state.models
        of_models = [(entry.variables, entry.model, entry.last_init) for entry in entries.values()]
        held = reached([*users.values(), of_models], live, stops)
        return len({*map(buffer_of, live.values())}), len({buffer_of(live[number]) for number in held})

    return count


def test_what_is_alive_afterwards_is_what_names_and_models_reach(notebook, alive):
    notebook(NET)
    notebook("%flax_apply -o run net(x)")
    notebook(NET.replace("Dense(2)(x)", "Dense(2)(x) * 2"))
    notebook("%flax_apply net(x)")
    notebook("[run, {'x': x * 2}]")
    notebook("kept = x + 1\nkept")
    notebook("old = nn.Dense(3)\n%flax_apply old(x);")
    notebook("del old, run")
    notebook(FAILS)
    notebook.fails("f(2.0)")
    before, reachable = alive()
    assert before > reachable
    assert "the last error, with its frames" in notebook("%flax_free --replays")
    after, reachable = alive()
    assert after == reachable
    # `kept`, kernel and bias, and the key that they were made with.
    assert reachable == 4
    assert notebook["kept"].shape == (3, 4, 4)
    assert set(notebook.session.models) == {"net"}
    assert notebook("y = %flax_apply net(x)").startswith("net · ")


def test_it_says_what_went_and_who_holds_the_rest(notebook):
    notebook("big = jnp.ones((300, 1000)) * 2\nsame = [big]")
    notebook("big + 1")
    notebook(FAILS)
    notebook.fails("f(1.0)")
    shown = notebook("%flax_free").splitlines()
    assert shown[0].startswith("free · cpu:0 2.2 MB freed · held: cpu:0 ")
    assert shown[1] == "  let go  the last error, with its frames    Out[4]"
    assert shown[2] == "  held    1.2 MB  big, same"
    assert notebook["same"][0] is notebook["big"]


def test_a_module_that_holds_its_own_variables_is_one_row(notebook):
    notebook("from flax import nnx\nown = nnx.Linear(4, 3, rngs=nnx.Rngs(0))\n%flax_apply own(x);")
    shown = notebook("%flax_free")
    assert shown.count("the model own") == 1
    assert "own, the model" not in shown


def test_names_among_the_shells_own_that_the_user_has_bound_stay(notebook):
    notebook("x * 2")
    notebook("_ = x * 3\n_4 = x * 4")
    notebook("%flax_free")
    assert float(notebook["_"].max()) == float((notebook["x"] * 3).max())
    assert notebook["_4"].shape == (3, 4, 4)
    notebook("x * 5")
    notebook("%flax_free")
    assert notebook["_"].shape == (3, 4, 4)
    assert notebook.shell.displayhook._ == ""
    notebook("'a text'")
    notebook("%flax_free")
    assert "a text" in notebook["Out"].values()


def test_replays_stay_until_they_are_asked_for(notebook):
    notebook(NET)
    notebook("z = jnp.ones((3, 100_000, 4))\n%flax_apply -q net(z);")
    notebook("del z")
    shown = notebook("%flax_free")
    assert "4.8 MB  %flax_replay\n" in shown
    assert shown.endswith(
        "! 4.8 MB are held for %flax_replay alone, which could not repeat those runs\n"
        "  without\n"
        "  write: %flax_free --replays"
    )
    assert "identical" in notebook("%flax_replay -o again 1")
    notebook("del again")
    shown = notebook("%flax_free --replays")
    assert shown.endswith("! 1 run can be replayed no more: what they needed was let go of")
    assert "by %flax_free --replays" in notebook.fails("%flax_replay 1")


def test_a_model_whose_name_was_deleted_goes_and_one_that_never_had_a_name_stays(notebook):
    notebook("import flax_magics\nflax_magics.session().register('unnamed', nn.Dense(2))")
    notebook(NET)
    notebook("%flax_apply -q net(x);")
    notebook("%flax_free")
    assert set(notebook.session.models) == {"unnamed", "net"}
    notebook("del net")
    assert "the model net, whose name is gone" in notebook("%flax_free")
    assert set(notebook.session.models) == {"unnamed"}
    assert "identical" in notebook("%flax_replay 1")
    assert "no model is called `net`" in notebook.fails("%flax_apply net(x)")
    notebook(NET)
    assert "initialised in draw 2" in notebook("%flax_apply net(x);")


def test_programs_of_an_earlier_edition_go_and_those_of_this_one_stay(notebook):
    notebook(NET.replace("nn.Dense(2)(x)", "nn.Dropout(0.5, deterministic=False)(nn.Dense(2)(x))"))
    notebook("%flax_apply net(x);\n%flax_apply net(x[:1]);")
    assert "old program" not in notebook("%flax_free")
    assert "reused" in notebook("%flax_apply net(x);")
    notebook(NET)
    notebook("%flax_apply net(x);")
    assert "2 old programs" in notebook("%flax_free")
    assert len(notebook.session.programs) == 1
    assert "reused" in notebook("%flax_apply net(x);")


def test_it_runs_by_itself_where_the_device_has_no_more_memory(notebook):
    notebook(OUT_OF_MEMORY)
    shown = notebook.fails("g()")
    assert "RESOURCE_EXHAUSTED" in shown
    news = shown[shown.index("out of memory, so") :].splitlines()
    assert news[0] == "out of memory, so %flax_free ran; %config FlaxMagics.free = False turns it off"
    assert news[1] == "free · cpu:0 1.0 MB freed · nothing held"
    # Raised from it, too.
    shown = notebook.fails("try:\n  g()\nexcept Exception as error:\n  raise ValueError from error")
    assert "cpu:0 1.0 MB freed" in shown
    shown = notebook.fails("raise MemoryError")
    assert "free · nothing freed" in shown


def test_it_runs_after_no_other_error_and_not_where_it_is_turned_off(notebook):
    notebook(FAILS + OUT_OF_MEMORY)
    assert "flax_free" not in notebook.fails("f(1.0)")
    notebook("%config FlaxMagics.free = False")
    assert "flax_free" not in notebook.fails("g()")


def test_an_error_that_the_user_has_kept_keeps_its_frames_and_models_stay(notebook):
    notebook(NET)
    notebook("%flax_apply -q net(x);\ndel net")
    notebook(OUT_OF_MEMORY)
    shown = notebook.fails("try:\n  g()\nexcept Exception as error:\n  kept = error\n  raise")
    assert "1.0 MB  kept" in shown
    assert notebook["kept"].__traceback__ is not None
    assert set(notebook.session.models) == {"net"}


def test_nothing_may_stand_after_it(notebook):
    assert notebook.fails("%flax_free net").startswith(
        "FlaxMagicsError: %flax_free takes nothing after it, and `net` stands"
    )
