"""A patch of Flax's own code is noticed: by every run of a script, by the first of each cell in a notebook."""

from __future__ import annotations

import flax.linen as nn
import pytest

from flax_magics.code.library import FlaxPatches


@pytest.fixture
def looked() -> FlaxPatches:
    library = FlaxPatches()
    library.look()
    return library


def test_nothing_changed_is_the_same_edition(looked):
    nn.Dense(3)  # using Flax changes nothing of it
    first = looked.edition
    looked.look()
    assert looked.edition == first


@pytest.mark.parametrize(("owner", "name"), [(nn.Dense, "__call__"), (nn, "relu"), (nn.initializers, "zeros")])
def test_a_patch_and_its_end_are_two_more(looked, monkeypatch, owner, name):
    first = looked.edition
    monkeypatch.setattr(owner, name, lambda *args, **kwargs: None)
    looked.look()
    assert looked.edition == first + 1
    monkeypatch.undo()
    looked.look()
    assert looked.edition == first + 2


def test_in_cells_the_first_look_of_each_counts(looked, monkeypatch):
    looked.in_cells(True)
    looked.look()
    first = looked.edition
    monkeypatch.setattr(nn, "relu", lambda x: x)
    looked.look()
    assert looked.edition == first
    looked.new_cell()
    looked.look()
    assert looked.edition == first + 1


def test_a_patched_layer_counts_in_the_cell_that_patches_it(notebook):
    notebook("%flaxmodel net = nn.Dense(3)")
    notebook("dense = nn.Dense.__call__\n%flax_apply -q -o before net(x)")
    notebook("nn.Dense.__call__ = lambda self, x: dense(self, x) * 2\n%flax_apply -q -o after net(x)")
    notebook("nn.Dense.__call__ = dense\n%flax_apply -q -o again net(x)")
    assert (notebook["after"].output == notebook["before"].output * 2).all()
    assert notebook["again"].digest == notebook["before"].digest
