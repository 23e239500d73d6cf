"""A session that is saved and loaded before every run: the run of the loaded one is the same in every bit."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from by_hand import bits

from flax_magics import Session
from flax_magics.uninterrupted import at_once


class Reborn(Session):
    """Runs everything twice: here, and in a session that has read what this one was."""

    register_first = True

    def apply(self, model: Any, /, *args: Any, **kwargs: Any) -> Any:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "session.safetensors"
            saved = self.save(path)
            modules = {name: twin_of(entry.model) for name, entry in self._state.models.items()}
            run = super().apply(model, *args, **kwargs)
            other = Session(seed=99)
            if self.register_first:
                for name, module in modules.items():
                    other.register(name, module)
                restored = other.load(path)
                assert restored.waiting == ()
            else:
                other.load(path)
                for name, module in modules.items():
                    (change,) = other.register_all({name: module})
                    assert change.unfit == ()
            assert (other.seed, other.draws, len(other)) == (saved.seed, saved.draws, saved.runs)
            again = other.apply(getattr(model, "name", model), *args, **kwargs)
        assert bits(again.output) == bits(run.output)
        assert bits(dict(again.sown)) == bits(dict(run.sown))
        assert bits(variables_of(other)) == bits(variables_of(self))
        assert (again.seed, again.draw, dict(again.changed)) == (run.seed, run.draw, dict(run.changed))
        return run


def variables_of(session: Session) -> dict[str, Any]:
    return {name: dict(model.collections() or {}) for name, model in session.models.items()}


def twin_of(model: Any) -> Any:
    """The same linen module; of an NNX one a copy in which no variable has its value."""
    if not model.holds_variables:
        return model.module
    from flax import nnx

    from flax_magics.models import adopt

    copy = nnx.clone(model.module)
    slots = [slot for slot in adopt(copy, "net").layout.slots if not slot.sown and not slot.fixed]
    at_once([slot.assignment(jax.tree_util.tree_map(other, slot.read())) for slot in slots])
    return copy


def other(leaf: Any) -> Any:
    """Another value of the same shape and dtype."""
    if not hasattr(leaf, "dtype"):
        return leaf
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        data = jax.random.key_data(leaf)
        return jax.random.wrap_key_data(data ^ 1, impl=jax.random.key_impl(leaf))
    return np.ones_like(leaf) if isinstance(leaf, np.ndarray) else jnp.ones_like(leaf)
