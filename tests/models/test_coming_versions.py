"""What newer versions of Flax may be set to."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import flax
import jax
import jax.numpy as jnp
import pytest
from by_hand import bits, values
from flax import nnx
from nnx_kinds import List
from sessions import session_of

from flax_magics import FlaxMagicsError
from flax_magics.models.construction import Construction

X = jax.random.normal(jax.random.key(42), (2, 4))
FLAGS = flax.config._values


@contextlib.contextmanager
def flag(name: str, value: bool) -> Iterator[None]:
    """One of Flax's flags, where this version has it."""
    if name not in FLAGS:
        yield
        return
    before = FLAGS[name]
    flax.config.update(name, value)
    try:
        yield
    finally:
        flax.config.update(name, before)


class Inner(nnx.Module):
    """Sows twice under one name, and another type."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.linear = nnx.Linear(4, 4, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        x = self.linear(x)
        self.sow(nnx.Intermediate, "seen", x)
        self.sow(nnx.Intermediate, "seen", x + 1)
        self.sow(Seen, "mean", x.mean(), init_fn=lambda: 0.0, reduce_fn=lambda a, b: a + b)
        return x


class Seen(nnx.Intermediate):
    """A type of the user's."""


class Sowing(nnx.Module):
    """Sows in itself, in its parts, and inside a transform."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.blocks = List([Inner(rngs), Inner(rngs)])

    def __call__(self, x: Any) -> Any:
        for block in self.blocks:
            x = block(x)
        x = nnx.jit(lambda block, x: block(x))(self.blocks[0], x)
        self.sow(nnx.Intermediate, "last", x)
        return x


class Plain(nnx.Module):
    """Sows one value."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.first, self.second = nnx.Linear(4, 4, rngs=rngs), nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        self.sow(nnx.Intermediate, "hidden", x := self.first(x))
        return self.second(x)


@pytest.mark.parametrize("eager", [False, True])
def test_what_is_sown_is_handed_back_where_flax_sows_nothing_outside_of_capture(eager):
    net = Plain(nnx.Rngs(0))
    session = session_of(net)
    with flag("nnx_sow_capture_noop", True):
        for _ in range(2):
            run = session.apply("net", X, eager=eager)
            assert set(run.sown) == {"Intermediate"}
            if hasattr(nnx, "capture"):
                graphdef, state = nnx.split(net)

                def forward(state: Any, x: Any, graphdef: Any = graphdef) -> Any:
                    return nnx.capture(nnx.merge(graphdef, state), nnx.Intermediate)(x)

                output, sown = (forward if eager else jax.jit(forward))(state, X)
                assert bits(run.output) == bits(output)
                assert bits(run.sown["Intermediate"]) == bits(nnx.to_pure_dict(sown))
    assert not hasattr(net, "hidden")


@pytest.mark.skipif("nnx_sow_capture_noop" not in FLAGS, reason="this version has no such flag")
def test_whatever_is_sown_is_the_same_with_the_flag_and_without():
    runs = []
    for value in (False, True, False):
        with flag("nnx_sow_capture_noop", value):
            session = session_of(Sowing(nnx.Rngs(0)))
            runs.append(session.apply("net", X))
            assert values(session.apply("net", X).sown) == values(runs[-1].sown)
    assert [bits(run.output) for run in runs] == [bits(runs[0].output)] * 3
    assert [values(run.sown) for run in runs] == [values(runs[0].sown)] * 3
    assert set(runs[1].sown) == {"Intermediate", "Seen"}


@pytest.mark.parametrize("name", ["nnx_graph_mode", "nnx_graph_updates"])
def test_without_graph_mode_a_run_is_that_of_a_run_by_hand(name):
    with flag(name, False):
        net = Plain(nnx.Rngs(0))
        session = session_of(net)
        for _ in range(2):
            run = session.apply("net", X)
            copy = nnx.clone(net)
            assert bits(run.output) == bits(jax.jit(lambda x, copy=copy: copy.second(copy.first(x)))(X))


@pytest.mark.skipif("nnx_sow_capture_noop" not in FLAGS, reason="this version has no such flag")
def test_what_is_perturbed_stays_untouched_as_by_hand():
    class Perturbed(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.linear = nnx.Linear(4, 3, rngs=rngs)

        def __call__(self, x: Any) -> Any:
            return self.perturb("felt", self.linear(x))

    net = Perturbed(nnx.Rngs(0))
    session = session_of(net)
    with flag("nnx_sow_capture_noop", True):
        assert bits(session.apply("net", X).output) == bits(nnx.jit(lambda net: net(X))(net))
    assert not hasattr(net, "felt")


HIJAX = """\
the module holds Variables of hijax, and flax_magics does not run these yet.
  they come of flax_hijax_variable, nnx.var_defaults or hijax=True: build the module again without"""
WRITE = "\n  write: import flax; flax.config.update('flax_hijax_variable', False)"


@pytest.mark.skipif("flax_hijax_variable" not in FLAGS, reason="this version has no such Variables")
def test_variables_of_hijax_are_refused_in_one_message(session):
    session.register("kept", Plain(nnx.Rngs(0)))
    output = bits(session.apply("kept", X).output)
    with flag("flax_hijax_variable", True):
        net = Plain(nnx.Rngs(0))
        for refused in (
            lambda: session.register("net", net),
            lambda: session.register_all({"net": Construction(Plain, (), {}, "Plain()")}),
            lambda: session.apply("kept", net.first.kernel),
        ):
            with pytest.raises(FlaxMagicsError) as told:
                refused()
            assert str(told.value) == HIJAX + WRITE
        assert bits(session.apply("kept", X).output) == output
    with pytest.raises(FlaxMagicsError) as told:
        session.register("net", net)
    assert str(told.value) == HIJAX
    assert list(session.models) == ["kept"]
    assert len(session.runs) == 2
    session.register("net", Plain(nnx.Rngs(0)))
    assert bits(session.apply("net", jnp.asarray(X)).output) == output
