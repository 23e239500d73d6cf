"""Masks under transforms: what is said of a run with an earlier draw's keys, held against the masks that were drawn."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from flax_magics import Session
from flax_magics.run import Note

x = jnp.ones((4, 8))


def rngs(split=True):
    return {"params": True, "dropout": split}


class Drop(nn.Module):
    """Gives what it was given, and its mask."""

    rate: float = 0.5

    @nn.compact
    def __call__(self, x, _=None):
        return x, nn.Dropout(self.rate, deterministic=False)(x)


class Scan(nn.Module):
    """So many layers, with masks of their own or with one."""

    length: int | None
    split: bool = True
    rate: float = 0.5

    @nn.compact
    def __call__(self, x):
        return nn.scan(Drop, split_rngs=rngs(self.split), length=self.length)(self.rate, name="layers")(x, None)[1]


class OverTime(nn.Module):
    """A scan along the input's axis 1, as long as that is."""

    split: bool = True

    @nn.compact
    def __call__(self, x):
        cell = nn.scan(Step, split_rngs=rngs(self.split), in_axes=1, out_axes=1)
        return cell(name="cell")(0.0, x)[1]


class Step(nn.Module):
    @nn.compact
    def __call__(self, carry, x):
        return carry, nn.Dropout(0.5, deterministic=False)(x)


class Vmap(nn.Module):
    """Mapped over the batch."""

    split: bool = True

    @nn.compact
    def __call__(self, x):
        return nn.vmap(Drop, variable_axes={}, split_rngs=rngs(self.split))(name="each")(x)[1]


class Ensemble(nn.Module):
    """So many at once of one input."""

    size: int

    @nn.compact
    def __call__(self, x):
        many = nn.vmap(Drop, variable_axes={}, split_rngs=rngs(), in_axes=None, axis_size=self.size)
        return many(name="members")(x)[1]


class VmapOfDropout(nn.Module):
    @nn.compact
    def __call__(self, x):
        many = nn.vmap(nn.Dropout, variable_axes={}, split_rngs=rngs())
        return many(0.5, deterministic=False, name="each")(x)


class ScanOfVmap(nn.Module):
    """Layers, each mapped over the batch and rematerialised."""

    length: int

    @nn.compact
    def __call__(self, x):
        each = nn.vmap(Drop, variable_axes={}, split_rngs=rngs(), in_axes=(0, None))
        return nn.scan(nn.remat(each), split_rngs=rngs(), length=self.length)(name="layers")(x, None)[1]


class Sown(nn.Module):
    @nn.compact
    def __call__(self, x):
        mask = nn.Dropout(0.5, deterministic=False)(x)
        self.sow("masks", "mask", mask)
        return x


class RematScan(nn.Module):
    """Loops in loops."""

    lengths: tuple[int, ...]

    @nn.compact
    def __call__(self, x):
        return nn.remat_scan(Sown, lengths=self.lengths)(name="layers")(x)


class Wrapped(nn.Module):
    """One layer, under a transform that splits nothing."""

    transform: str = ""

    @nn.compact
    def __call__(self, x):
        around = {"": lambda cls: cls, "remat": nn.remat, "jit": nn.jit}[self.transform]
        return around(Drop)(name="layer")(x)[1]


class ScanOfMethod(nn.Module):
    """A scan over a method."""

    length: int

    @nn.compact
    def __call__(self, x):
        return nn.scan(ScanOfMethod.one, split_rngs=rngs(), length=self.length)(self, x, None)[1]

    def one(self, x, _):
        return x, nn.Dropout(0.5, deterministic=False)(x)


class Keys(nn.Module):
    """A module that draws with a key itself."""

    @nn.compact
    def __call__(self, x, _=None):
        return x, x + jax.random.normal(self.make_rng("dropout"), x.shape)


class ScanOfKeys(nn.Module):
    length: int

    @nn.compact
    def __call__(self, x):
        return nn.scan(Keys, split_rngs=rngs(), length=self.length)(name="layers")(x, None)[1]


class Loop(nn.Module):
    """`nn.while_loop`, whose streams have the turn folded in; gives the masks of all turns, multiplied."""

    turns: int
    split: bool = True

    @nn.compact
    def __call__(self, x):
        def more(module, carry):
            return carry[0] < self.turns

        def turn(module, carry):
            drop = nn.Dropout(0.5, deterministic=False, parent=module, name="drop")
            return carry[0] + 1, drop(carry[1])

        return nn.while_loop(more, turn, self, (0, x), split_rngs=rngs(self.split))[1]


same: str | None = None
LINEN = {
    "more layers": (Scan(3), x, Scan(5), x, "layers/Dropout_0: 3×[4,8] there, 5×[4,8] here"),
    "as many layers": (Scan(3), x, Scan(3), 3 * x, same),
    "another rate in each": (Scan(3), x, Scan(3, rate=0.25), x, "layers/Dropout_0: rate 0.5 there, 0.25 here"),
    "layers with one mask": (Scan(3, False), x, Scan(3, False), 2 * x, same),
    "one mask or many": (
        Scan(3),
        x,
        Scan(3, False),
        x,
        "layers/Dropout_0: another key, by its place in the model",
    ),
    "longer sequences": (OverTime(), x, OverTime(), x[:, :5], "cell/Dropout_0: 8×[4] there, 5×[4] here"),
    "another batch of sequences": (OverTime(), x, OverTime(), x[:2], "cell/Dropout_0: 8×[4] there, 8×[2] here"),
    "another batch under vmap": (Vmap(), x, Vmap(), x[:2], "each/Dropout_0: 4×[8] there, 2×[8] here"),
    "the same batch under vmap": (Vmap(), x, Vmap(), 3 * x, same),
    "a larger ensemble": (Ensemble(2), x, Ensemble(7), x, "members/Dropout_0: 2×[4,8] there, 7×[4,8] here"),
    "vmap of the layer": (VmapOfDropout(), x, VmapOfDropout(), x[:3], "each: 4×[8] there, 3×[8] here"),
    "nested, layers": (
        ScanOfVmap(2),
        x,
        ScanOfVmap(3),
        x,
        "layers/Dropout_0: 2×4×[8] there, 3×4×[8] here",
    ),
    "nested, batch": (
        ScanOfVmap(2),
        x,
        ScanOfVmap(2),
        x[:2],
        "layers/Dropout_0: 2×4×[8] there, 2×2×[8] here",
    ),
    "nested, the same": (ScanOfVmap(2), x, ScanOfVmap(2), 2 * x, same),
    "remat or not": (Wrapped(), x, Wrapped("remat"), x, same),
    "jit or not": (Wrapped(), x, Wrapped("jit"), x, "layer/Dropout_0: another key, by its place in the model"),
    "jit twice": (Wrapped("jit"), x, Wrapped("jit"), 2 * x, same),
    "jit, another batch": (Wrapped("jit"), x, Wrapped("jit"), x[:2], "layer/Dropout_0: [4,8] there, [2,8] here"),
    "a method": (ScanOfMethod(3), x, ScanOfMethod(2), x, "Dropout_0: 3×[4,8] there, 2×[4,8] here"),
    "keys of its own": (ScanOfKeys(3), x, ScanOfKeys(5), x, "layers: 3 keys there, 5 keys here"),
    "turns of a loop": (Loop(1), x, Loop(1), 3 * x, same),
    "turns, of one key or not": (Loop(1), x, Loop(1, False), x, "drop: another key, by its place in the model"),
}


def zeros(run):
    return np.asarray(run.output) == 0


def check(there, x_there, here, x_here, text):
    session = Session()
    session.register("there", there)
    session.register("here", here)
    first = session.apply("there", x_there)
    second = session.apply("here", x_here, draw=1)
    found = [note for note in second.notes if note.kind == "masks"]
    expected = [] if text is None else [Note("masks", f"other random numbers than in draw 1 at {text}")]
    assert found == expected
    drew = zeros(first).any()  # noise is never zero
    agree = np.array_equal(zeros(first), zeros(second)) if drew else first.output.shape == second.output.shape
    assert agree == (text is None)


@pytest.mark.parametrize("case", LINEN)
def test_linen(case):
    check(*LINEN[case])


def test_one_mask_for_every_element_of_a_batch_is_the_same_for_another():
    session = Session()
    session.register("net", Vmap(split=False))
    first = session.apply("net", x)
    second = session.apply("net", x[:2], draw=1)
    assert [note for note in second.notes if note.kind == "masks"] == []
    np.testing.assert_array_equal(zeros(first)[:2], zeros(second))


@pytest.mark.parametrize(("lengths", "text"), [((2, 5), "2×5×[4,8]"), ((3,), "3×[4,8]")])
def test_loops_in_loops(lengths, text):
    session = Session()
    session.register("net", RematScan((4, 5)))
    session.register("other", RematScan(lengths))
    session.apply("net", x)
    (said,) = (note for note in session.apply("other", x, draw=1).notes if note.kind == "masks")
    where = "layers/Dropout_0"
    if len(lengths) == 2:
        assert said.text == f"other random numbers than in draw 1 at {where}: 4×5×[4,8] there, {text} here"
    else:
        assert said.text.startswith(f"other random numbers than in draw 1 at {where}: another key")


class NnxDrop(nnx.Module):
    def __init__(self, *, rngs):
        self.drop = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return self.drop(x)


class NnxScan(nnx.Module):
    """So many layers, each with a stream of its own from the start."""

    def __init__(self, length, *, rngs):
        @nnx.split_rngs(splits=length)
        @nnx.vmap(in_axes=0, out_axes=0)
        def make(rngs):
            return NnxDrop(rngs=rngs)

        self.layers = make(rngs)

    def __call__(self, x):
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=(nnx.Carry, 0))
        def layer(x, drop):
            return x, drop(x)

        return layer(x, self.layers)[1]


class NnxVmap(nnx.Module):
    """Mapped over the batch in the call, its stream split there or the same for all."""

    def __init__(self, split=True, *, rngs):
        self.split = split
        self.each = NnxDrop(rngs=rngs)

    def __call__(self, x):
        axes = nnx.StateAxes({nnx.RngState: 0, ...: None})

        def one(drop, x):
            return drop(x)

        if not self.split:
            return nnx.vmap(one, in_axes=(None, 0))(self.each, x)
        return nnx.split_rngs(splits=x.shape[0])(nnx.vmap(one, in_axes=(axes, 0)))(self.each, x)


class NnxNested(nnx.Module):
    """Split in a split."""

    def __init__(self, size, *, rngs):
        self.size = size
        self.each = NnxDrop(rngs=rngs)

    def __call__(self, x):
        axes = nnx.StateAxes({nnx.RngState: 0, ...: None})

        @nnx.split_rngs(splits=self.size)
        @nnx.vmap(in_axes=(axes, None), axis_size=self.size)
        def members(drop, x):
            @nnx.split_rngs(splits=x.shape[0])
            @nnx.vmap(in_axes=(axes, 0))
            def each(drop, x):
                return drop(x)

            return each(drop, x)

        return members(self.each, x)


class NnxWrapped(nnx.Module):
    """Under a transform that splits nothing."""

    def __init__(self, transform="", *, rngs):
        self.transform = transform
        self.layer = NnxDrop(rngs=rngs)

    def __call__(self, x):
        around = {"": lambda function: function, "remat": nnx.remat, "jit": nnx.jit}[self.transform]
        return around(lambda layer, x: layer(x))(self.layer, x)


class NnxAfter(nnx.Module):
    """Split along the batch, put back, and drawn from once more: that key knows nothing of the batch."""

    def __init__(self, *, rngs):
        self.each = NnxVmap(rngs=rngs)

    def __call__(self, x):
        self.each(x)
        return self.each.each(jnp.ones((4, 8)))


NNX = {
    "more layers": (NnxScan, (3,), x, (5,), x, "layers/drop: 3×[4,8] there, 5×[4,8] here"),
    "as many layers": (NnxScan, (3,), x, (3,), 2 * x, same),
    "another batch": (NnxScan, (3,), x, (3,), x[:2], "layers/drop: 3×[4,8] there, 3×[2,8] here"),
    "another batch under vmap": (NnxVmap, (), x, (), x[:2], "each/drop: 4×[8] there, 2×[8] here"),
    "the same batch under vmap": (NnxVmap, (), x, (), 3 * x, same),
    "nested, members": (NnxNested, (2,), x, (3,), x, "each/drop: 2×4×[8] there, 3×4×[8] here"),
    "nested, batch": (NnxNested, (2,), x, (2,), x[:2], "each/drop: 2×4×[8] there, 2×2×[8] here"),
    "nested, the same": (NnxNested, (2,), x, (2,), 2 * x, same),
    "remat or not": (NnxWrapped, (), x, ("remat",), x, same),
    "jit or not": (NnxWrapped, (), x, ("jit",), x, same),
}


@pytest.mark.parametrize("case", NNX)
def test_nnx(case):
    cls, there, x_there, here, x_here, text = NNX[case]
    check(cls(*there, rngs=nnx.Rngs(0)), x_there, cls(*here, rngs=nnx.Rngs(1)), x_here, text)


def test_one_mask_of_nnx_for_every_element_of_a_batch():
    session = Session()
    session.register("net", NnxVmap(False, rngs=nnx.Rngs(0)))
    first = session.apply("net", x)
    second = session.apply("net", x[:2], draw=1)
    assert [note for note in second.notes if note.kind == "masks"] == []
    np.testing.assert_array_equal(zeros(first)[:2], zeros(second))


def test_a_stream_that_was_put_back_is_no_longer_split():
    session = Session()
    session.register("net", NnxAfter(rngs=nnx.Rngs(0)))
    first = session.apply("net", x)
    second = session.apply("net", x[:2], draw=1)
    (said,) = (note for note in second.notes if note.kind == "masks")
    assert said.text == "other random numbers than in draw 1 at each/each/drop: 4×[8] there, 2×[8] here"
    np.testing.assert_array_equal(zeros(first), zeros(second))  # the last of them
