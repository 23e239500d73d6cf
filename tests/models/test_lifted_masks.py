"""A run with an earlier draw's keys, where transforms of Flax's are in the model: paths and shapes are compared, no more."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from flax_magics import Session
from flax_magics.compile.trace import TraceRequest, trace
from flax_magics.execution.call import Call, prepare
from flax_magics.execution.notes import compare
from flax_magics.models.calls import Arguments
from flax_magics.models.construction import adopt
from flax_magics.rng.keys import RootKey

x = jnp.ones((4, 8))
SPLIT = {"params": True, "dropout": True}


class Drop(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        return x, nn.Dropout(0.5, deterministic=False)(x)


class Noise(nn.Module):
    """A module that draws with a key itself."""

    @nn.compact
    def __call__(self, x, _=None):
        return x, x + jax.random.normal(self.make_rng("dropout"), x.shape)


class Scan(nn.Module):
    length: int
    layer: type = Drop

    @nn.compact
    def __call__(self, x):
        return nn.scan(self.layer, split_rngs=SPLIT, length=self.length)(name="layers")(x, None)[1]


class Vmap(nn.Module):
    @nn.compact
    def __call__(self, x):
        each = nn.vmap(Drop, variable_axes={}, split_rngs=SPLIT)
        return nn.Dropout(0.5, deterministic=False)(each(name="each")(x)[1])


class Wrapped(nn.Module):
    """One layer, under a transform that splits nothing."""

    around: str = ""

    @nn.compact
    def __call__(self, x):
        lift = {"": lambda cls: cls, "remat": nn.remat, "jit": nn.jit}[self.around]
        return lift(Drop)(name="layer")(x)[1]


class Loop(nn.Module):
    """`nn.while_loop` folds the turn into its streams."""

    turns: int

    @nn.compact
    def __call__(self, x):
        def turn(module, carry):
            return carry[0] + 1, nn.Dropout(0.5, deterministic=False, parent=module, name="drop")(carry[1])

        return nn.while_loop(lambda _, carry: carry[0] < self.turns, turn, self, (0, x), split_rngs=SPLIT)[1]


class NnxDrop(nnx.Module):
    def __init__(self, *, rngs):
        self.drop = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return self.drop(x)


class NnxScan(nnx.Module):
    """So many layers, each with a stream of its own from the start."""

    def __init__(self, length):
        make = nnx.vmap(lambda rngs: NnxDrop(rngs=rngs), in_axes=0, out_axes=0)
        self.layers = nnx.split_rngs(splits=length)(make)(nnx.Rngs(0))

    def __call__(self, x):
        layer = nnx.scan(lambda x, drop: (x, drop(x)), in_axes=(nnx.Carry, 0), out_axes=(nnx.Carry, 0))
        return layer(x, self.layers)[1]


class NnxVmap(nnx.Module):
    """Mapped over the batch, its stream split there and put back, and drawn from once more."""

    def __init__(self):
        self.each = NnxDrop(rngs=nnx.Rngs(0))
        self.last = NnxDrop(rngs=nnx.Rngs(0))

    def __call__(self, x):
        axes = nnx.StateAxes({nnx.RngState: 0, ...: None})
        each = nnx.split_rngs(splits=x.shape[0])(nnx.vmap(lambda drop, x: drop(x), in_axes=(axes, 0)))
        return self.last(each(self.each, x))


class NnxJit(nnx.Module):
    def __init__(self, jitted):
        self.jitted = jitted
        self.layer = NnxDrop(rngs=nnx.Rngs(0))

    def __call__(self, x):
        return (nnx.jit if self.jitted else lambda call: call)(lambda layer, x: layer(x))(self.layer, x)


def may_differ(names):
    return f"random numbers drawn inside a transform may differ from those of draw 1: {names}"


def differ(text):
    return f"other random numbers than in draw 1 at {text}"


BATCH = "[4,8] there, [2,8] here"
CASES = {
    "scan": (Scan(3), Scan(5), x, [may_differ("layers/Dropout_0")]),
    "scan, keys of the module's own": (Scan(3, Noise), Scan(5, Noise), x, [may_differ("layers")]),
    "vmap, another batch": (Vmap(), Vmap(), x[:2], [differ(f"Dropout_0: {BATCH}"), may_differ("each/Dropout_0")]),
    "vmap, another width": (
        *(Vmap(), Vmap(), x[:, :6]),
        [differ("each/Dropout_0: [8] there, [6] here; Dropout_0: [4,8] there, [4,6] here")],
    ),
    "remat": (Wrapped(), Wrapped("remat"), x, [may_differ("layer/Dropout_0")]),
    "jit": (Wrapped(), Wrapped("jit"), x, [differ("layer/Dropout_0: another key, by its place in the model")]),
    "while_loop": (Loop(1), Loop(2), x, [may_differ("drop")]),
    "nnx.scan": (NnxScan(3), NnxScan(5), x, [may_differ("layers/drop")]),
    "nnx.vmap, another batch": (NnxVmap(), NnxVmap(), x[:2], [differ(f"last/drop: {BATCH}"), may_differ("each/drop")]),
    "nnx.jit": (NnxJit(False), NnxJit(True), x, [may_differ("layer/drop")]),
}


def seen(net, x):
    """What a trace of `net(x)` saw. Nothing is compiled."""
    prepared = prepare("net", adopt(net, "net"), Call((), (x,), {}, "net(x)"), None)
    arguments = Arguments.of((x,), prepared.kwargs, prepared.signature, frozenset())
    variables = prepared.model.own_variables(None) or {}
    return trace(TraceRequest("net", prepared.model, (), arguments, variables, RootKey.from_seed(0).draw()))[2]


@pytest.mark.parametrize("case", CASES)
def test_what_is_said_of_another_trace(case):
    there, here, other, texts = CASES[case]
    assert [note.text for note in compare(1, seen(there, x), seen(here, other))] == texts


@pytest.mark.parametrize("case", ["scan", "nnx.vmap, another batch"])
def test_a_run_of_the_same_program_draws_the_same_masks_and_nothing_is_said_of_it(case):
    there, here, other, texts = CASES[case]
    session = Session()
    session.register_all({"there": there, "here": here})
    first, again = session.apply("there", x), session.apply("there", 3 * x, keys_of=1)
    np.testing.assert_array_equal(first.output == 0, again.output == 0)
    assert [note for note in again.notes if note.kind == "masks"] == []
    said = [note.text for note in session.apply("here", other, keys_of=1).notes if note.kind == "masks"]
    assert said == texts
