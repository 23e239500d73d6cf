"""`%flax_doctor`, and what of it the first report of a kernel says."""

from __future__ import annotations

import jax
import pytest

NET = "%flaxmodel net = nn.Dense(2)"
SAID = """\
! `jax_threefry_partitionable` is off: random numbers are others than elsewhere,
  and change with the number of devices
  write: import jax
         jax.config.update("jax_threefry_partitionable", True)"""


@pytest.fixture
def not_partitionable():
    jax.config.update("jax_threefry_partitionable", False)
    yield
    jax.config.update("jax_threefry_partitionable", True)


def test_on_a_healthy_system_it_is_one_quiet_line(notebook):
    shown = notebook("%flax_doctor")
    assert shown.startswith("doctor · nothing is wrong · 16 checks · jax ")
    assert "\n" not in shown
    assert notebook.session.doctor().findings == {}


@pytest.mark.usefixtures("not_partitionable")
def test_a_finding_is_told_with_the_line_that_mends_it(notebook):
    shown = notebook("%flax_doctor")
    assert shown.startswith("doctor · 1 finding · 16 checks · jax ")
    assert shown.partition("\n")[2] == SAID
    assert str(notebook.session.doctor()) == shown


@pytest.mark.usefixtures("not_partitionable")
def test_what_matters_now_stands_beneath_the_first_report_of_a_kernel_once(notebook):
    notebook(NET)
    assert notebook("%flax_apply -q net(x);") == SAID or notebook.session.draws == 1
    assert SAID not in notebook("%flax_apply net(x);")
    notebook("%reload_ext flax_magics")
    assert notebook("%flax_key latent;").endswith(SAID)
    assert SAID not in notebook("%flax_key latent;")
    notebook("%reload_ext flax_magics\n%config FlaxMagics.notes = {'doctor': False}")
    assert SAID not in notebook("%flax_apply net(x);")


def test_a_check_that_fails_is_told_and_hides_no_other(notebook, monkeypatch):
    from flax_magics.doctor import methods
    from flax_magics.doctor.findings import Check

    def fails(_):
        raise AttributeError("no such setting")

    monkeypatch.setattr(methods, "CHECKS", (Check("settings", fails, first=True), *methods.CHECKS))
    assert notebook("%flax_doctor").endswith("! not checked: settings (AttributeError: no such setting)")
    notebook(NET)
    assert "no such setting" not in notebook("%flax_apply net(x);")
