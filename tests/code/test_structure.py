"""Static data of a tree that was changed in place: the next run gives what a fresh run by hand gives."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict, namedtuple
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from by_hand import apply_by_hand, bits
from flax import nnx, struct
from hypothesis import given
from hypothesis import strategies as st
from sessions import session_of

from flax_magics import Session
from flax_magics.code.contents import Structure, static_data

X = jax.random.normal(jax.random.key(42), (2, 4))


@struct.dataclass
class Batch:
    """Flax's own dataclass: `cfg` is no part of the data."""

    x: Any
    cfg: Any = struct.field(pytree_node=False)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Registered:
    """JAX's."""

    x: Any
    cfg: Any = dataclasses.field(metadata={"static": True})


@jax.tree_util.register_pytree_node_class
class Custom:
    """A class of trees that its author registered."""

    def __init__(self, x: Any, cfg: Any) -> None:
        self.x, self.cfg = x, cfg

    def tree_flatten(self) -> Any:
        return (self.x,), self.cfg

    @classmethod
    def tree_unflatten(cls, cfg: Any, children: Any) -> Custom:
        return cls(*children, cfg)


@dataclasses.dataclass
class Config:
    """Plain, and changed in place."""

    rate: Any


class Opaque:
    """Of which nobody can tell whether it is as it was."""

    def __init__(self, rate: Any) -> None:
        self.rate = rate


Pair = namedtuple("Pair", ["batch", "other"])


def rate_of(cfg: Any) -> Any:
    """The number that a config holds."""
    if isinstance(cfg, (Config, Opaque)):
        return cfg.rate
    if isinstance(cfg, tuple):
        return rate_of(cfg[-1])
    return cfg["rate"] if isinstance(cfg, dict) else cfg() if callable(cfg) else cfg[0]


def calling(rate: Any) -> Callable[[], Any]:
    """A function that closes over what it gives."""
    return lambda: rate


CONFIGS: dict[str, tuple[Callable[[Any], Any], Callable[[Any, Any], Any]]] = {
    "a list": (lambda v: [v], lambda cfg, v: cfg.__setitem__(0, v)),
    "a dict": (lambda v: {"rate": v}, lambda cfg, v: cfg.update(rate=v)),
    "an array": (lambda v: np.array([v, 1.0]), lambda cfg, v: cfg.__setitem__(0, v)),
    "a config": (lambda v: Config(v), lambda cfg, v: setattr(cfg, "rate", v)),
    "a config in a tuple": (lambda v: ("of", Config(v)), lambda cfg, v: setattr(cfg[1], "rate", v)),
    "a function": (calling, lambda cfg, v: setattr(cfg.__closure__[0], "cell_contents", v)),
    "an opaque object": (lambda v: Opaque(v), lambda cfg, v: setattr(cfg, "rate", v)),
}

PLACES: dict[str, Callable[[Any], tuple[tuple[Any, ...], dict[str, Any]]]] = {
    "an argument": lambda batch: ((batch,), {}),
    "a keyword": lambda batch: ((), {"batch": batch}),
    "inside": lambda batch: (({"a": [Pair(batch, None)]},), {}),
    "beside another": lambda batch: ((OrderedDict(one=X, a=[batch]),), {}),
}


SPELLED = {
    "an argument": "batch",
    "a keyword": "batch",
    "inside": "batch['a'][0].batch",
    "beside another": "batch['a'][0]",
}
"""Where the batch is, for a person."""
CHANGED = {
    "a list": "{}.cfg[0]: 2.0 → 5.0",
    "a dict": "{}.cfg['rate']: 2.0 → 5.0",
    "an array": "{}.cfg: other values",
    "a config": "{}.cfg.rate: 2.0 → 5.0",
    "a config in a tuple": "{}.cfg[1].rate: 2.0 → 5.0",
    "a function": "rate: 2.0 → 5.0",
}


class Net(nn.Module):
    """Scales by what the batch's config says."""

    @nn.compact
    def __call__(self, batch: Any) -> Any:
        while not hasattr(batch, "cfg"):
            batch = batch["a"] if isinstance(batch, dict) else batch[0]
        return nn.Dense(3)(batch.x) * rate_of(batch.cfg)


def runs(session: Session, net: Any, place: Any, batch: Any) -> Any:
    """Two runs, each held against a fresh one by hand; gives the first."""
    args, kwargs = place(batch)
    out = []
    for _ in range(2):
        run = session.apply("net", *args, **kwargs)
        variables = session.models["net"].variables
        by_hand = jax.jit(lambda variables, x: net.apply(variables, type(batch)(x, batch.cfg)))(variables, batch.x)
        assert bits(run.output) == bits(by_hand)
        out.append(run)
    return out[0]


@pytest.mark.parametrize("place", sorted(PLACES))
@pytest.mark.parametrize("kind", sorted(CONFIGS))
def test_static_data_changed_in_place_counts_at_once_and_so_does_taking_it_back(kind, place):
    make, change = CONFIGS[kind]
    where = PLACES[place]
    net = Net()
    session = session_of(net)
    batch = Batch(X, make(2.0))
    args, kwargs = where(batch)
    session.init("net", *args, **kwargs)
    assert runs(session, net, where, batch).program == "compiled"
    change(batch.cfg, 5.0)
    changed = runs(session, net, where, batch)
    assert changed.program == "compiled"
    if kind != "an opaque object":
        assert changed.reason == CHANGED[kind].format(SPELLED[place])
    change(batch.cfg, 2.0)
    assert runs(session, net, where, batch).program == "reused"
    assert runs(session, net, where, Batch(X, make(5.0))).program == "reused"
    assert runs(session, net, where, batch).program == "reused"


@pytest.mark.parametrize("cls", [Registered, Custom])
def test_every_kind_of_registered_tree_is_read(cls):
    net = Net()
    session = session_of(net)
    batch = cls(X, [2.0])
    session.init("net", batch)
    for rate in (2.0, 5.0, 2.0, 7.0):
        batch.cfg[0] = rate
        runs(session, net, PLACES["an argument"], batch)


def test_a_partial_is_known_by_what_its_function_does():
    class Calling(nn.Module):
        @nn.compact
        def __call__(self, function: Any, x: Any) -> Any:
            return function(nn.Dense(3)(x))

    net = Calling()
    session = session_of(net)
    rate = calling(2.0)
    function = jax.tree_util.Partial(lambda by, x: x * by * rate(), jnp.float32(3.0))
    session.init("net", function, X)
    for value in (2.0, 5.0, 2.0):
        rate.__closure__[0].cell_contents = value
        for _ in range(2):
            run = session.apply("net", function, X)
            variables = session.models["net"].variables
            assert bits(run.output) == bits(apply_by_hand(net, variables, {}, function, X, afresh=True))


@pytest.mark.parametrize("values", [(1, 1.0, True, 1), (0.0, -0.0, 0.0), ("1", 1, "1")])
def test_numbers_that_are_equal_are_not_the_same(values):
    class Typed(nn.Module):
        @nn.compact
        def __call__(self, batch: Any) -> Any:
            return batch.x / jnp.asarray(float(batch.cfg)), type(batch.cfg).__name__ == "int"

    net = Typed()
    session = session_of(net)
    session.init("net", Batch(X, values[0]))
    for value in values:
        for _ in range(2):
            run = session.apply("net", Batch(X, value))
            by_hand = jax.jit(lambda x, value=value: net.apply({}, Batch(x, value)))(X)
            assert bits(run.output) == bits(by_hand)


def test_names_of_boxed_variables_are_read():
    class Boxed(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            init = nn.with_partitioning(nn.initializers.ones, ["in", "out"])
            self.param("kernel", init, (4, 3))
            names = self.get_variable("params", "kernel").names
            return x * len(names[0])

    net = Boxed()
    session = session_of(net)
    variables = session.init("net", X)
    for name, reason in (("in", "first run of this program"), ("inner", "kernel.names[0]: 'in' → 'inner'")):
        variables["params"]["kernel"].names[0] = name
        for expected in (reason, ""):
            run = session.apply("net", X)
            assert bits(run.output) == bits(X * len(name))
            assert run.reason == expected


def test_a_result_is_put_together_as_it_is_by_hand():
    class Handing(nn.Module):
        @nn.compact
        def __call__(self, batch: Any) -> Any:
            return Batch(nn.Dense(3)(batch.x), batch.cfg)

    session = session_of(Handing())
    first = Batch(X, [1.0])
    session.init("net", first)
    for cfg in ([1.0], [2.0], [1.0]):
        first.cfg[:] = cfg
        assert session.apply("net", first).output.cfg == cfg
        assert session.apply("net", Batch(X, list(cfg))).output.cfg == cfg
    first.cfg[:] = [9.0]
    assert session.apply("net", Batch(X, [1.0])).output.cfg == [1.0]


def test_a_replay_says_that_a_static_field_may_have_changed():
    session = session_of(Net())
    batch = Batch(X, [2.0])
    run = session.apply("net", batch)
    assert session.replay(run.draw).agreement.said == ()
    batch.cfg[0] = 3.0
    again = session.replay("last").agreement
    assert (again.identical, again.said) == (True, ("an object in the call may have changed since",))


# -- NNX


class Holding(nnx.Module):
    """Static attributes, and a variable with metadata."""

    def __init__(self, cfg: Any, about: Any) -> None:
        self.cfg = cfg
        self.kernel = nnx.Param(jnp.ones((4, 3)), about=about)

    def __call__(self, x: Any) -> Any:
        return x @ self.kernel[...] * rate_of(self.cfg) + rate_of(self.kernel.about)


HELD = sorted(set(CONFIGS) - {"an array"})  # NNX takes an array for data


@pytest.mark.parametrize("kind", HELD)
@pytest.mark.parametrize("where", ["an attribute", "metadata"])
def test_what_an_nnx_module_holds_counts_at_once(kind, where):
    make, change = CONFIGS[kind]
    net = Holding(make(2.0), make(3.0))
    session = session_of(net)
    outputs = []
    for value in (2.0, 5.0, 2.0):
        change(net.cfg if where == "an attribute" else net.kernel.about, value)
        for _ in range(2):
            run = session.apply("net", X)
            by_hand = jax.jit(lambda x: net(x))(X)
            np.testing.assert_allclose(run.output, by_hand, rtol=1e-6)
        outputs.append(bits(run.output))
    assert outputs[0] == outputs[2] != outputs[1]


def test_equal_numbers_that_an_nnx_module_holds_are_not_the_same():
    class Typed(nnx.Module):
        def __init__(self) -> None:
            self.gain: Any = 1

        def __call__(self, x: Any) -> Any:
            return x * self.gain

    net = Typed()
    session = session_of(net)
    x = jnp.arange(3)
    for gain in (1, 1.0, True, 1):
        net.gain = gain
        for _ in range(2):
            assert bits(session.apply("net", x).output) == bits(x * gain)


# -- the structure itself

TREES = st.recursive(
    st.sampled_from([None, 1.0, X]),
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(st.sampled_from("ab"), inner, max_size=2)
        | st.builds(Batch, inner, st.lists(st.sampled_from([1, 1.0, True, "1"]), max_size=2))
        | st.builds(lambda inner: nn.Partitioned(inner, ("a",)), inner)
    ),
    max_leaves=5,
)


@given(TREES, TREES)
def test_two_structures_are_equal_where_all_but_the_leaves_is_the_same(one, other):
    treedefs = [jax.tree_util.tree_structure(tree) for tree in (one, other)]
    same = [repr(treedef) for treedef in treedefs]
    first, second = map(Structure.of, treedefs)
    assert (first == second) == (same[0] == same[1]) == first.fits(treedefs[1])
    assert first == Structure.of(treedefs[0])
    assert first != second or hash(first) == hash(second)


def test_trees_without_static_data_are_only_compared():
    plain = {"a": [1, (2, None)], "b": nn.Partitioned(1.0, ("x", None)), "c": OrderedDict(d=Pair(1, 2))}
    assert static_data(jax.tree_util.tree_structure(plain)) == []
