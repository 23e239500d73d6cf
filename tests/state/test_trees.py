"""Any tree of a session's comes back from its JSON and arrays: types, bits, keys and their order."""

from __future__ import annotations

import json
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import FrozenDict, freeze
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays_of
from linen_kinds import Batch, Pair

from flax_magics.base.digest import weakly_typed
from flax_magics.base.files import Damaged
from flax_magics.errors import FlaxMagicsError
from flax_magics.snapshot.format import read, write
from flax_magics.state.trees import _RAW, CODES, DEPTH, Differs, OpaqueNode, Reader, Writer, dtype_named, graft


def there_and_back(tree):
    writer = Writer()
    node = json.loads(json.dumps(writer.tree(tree, "net")))
    return Reader(writer.arrays).tree(node)


def alike(one: Any, other: Any) -> bool:
    """Whether two trees are the same in type, order and every bit."""
    if type(one) is not type(other):
        return False
    if isinstance(one, (dict, FrozenDict)):
        pairs = zip(one.items(), other.items(), strict=True)
        return len(one) == len(other) and all(a == b and type(a) is type(b) and alike(x, y) for (a, x), (b, y) in pairs)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(alike, one, other))
    if isinstance(one, (nn.Partitioned, nn.LogicallyPartitioned)):
        return one.names == other.names and alike(one.value, other.value)
    if isinstance(one, jax.Array):
        if one.dtype != other.dtype:
            return False
        if jax.dtypes.issubdtype(one.dtype, jax.dtypes.prng_key):
            one, other = jax.random.key_data(one), jax.random.key_data(other)
        return one.weak_type == other.weak_type and alike(np.asarray(one), np.asarray(other))
    if isinstance(one, (np.ndarray, np.generic)):
        return one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()
    if isinstance(one, float):
        return one.hex() == other.hex() or (math.isnan(one) and math.isnan(other))
    if isinstance(one, complex):
        return alike(one.real, other.real) and alike(one.imag, other.imag)
    return bool(one == other)


odd_names = st.one_of(
    st.text(max_size=6),
    st.sampled_from(["", "/", "a/b", "a.b", "..", "é", "层", "\ud800", "\0", "a\nb", "#2", "params", "__metadata__"]),
)
keys = st.one_of(odd_names, st.integers(-3, 3), st.booleans(), st.none(), st.tuples(odd_names, st.integers(0, 3)))
shapes = st.sampled_from([(), (1,), (3,), (0,), (2, 0, 3), (2, 3), (1, 1, 1, 2)])
DTYPES = [dtype_named(name) for name in (*CODES, *_RAW)]


@st.composite
def host_arrays(draw, dtypes=tuple(DTYPES)):
    dtype, shape = draw(st.sampled_from(dtypes)), draw(shapes)
    data = draw(arrays_of.arrays(np.uint8, (*shape, dtype.itemsize)))
    if dtype.name == "bool":
        return (data[..., 0] % 2).astype(bool)
    if dtype.itemsize == 1 and any(word in dtype.name for word in ("int2", "int4", "float4", "float6")):
        return (data[..., 0] % 7).astype(np.float32).astype(dtype)
    return np.frombuffer(data.tobytes(), dtype).reshape(shape).copy()


# Without x64 JAX has no arrays of 64 bits; float6 it does not know.
UNKNOWN_TO_JAX = ("float64", "int64", "uint64", "complex128", "float6_e2m3fn", "float6_e3m2fn")
OF_JAX = tuple(dtype for dtype in DTYPES if dtype.name not in UNKNOWN_TO_JAX)
device_arrays = host_arrays(OF_JAX).map(jax.device_put)
weak_arrays = st.one_of(
    st.floats(width=32, allow_nan=False).map(jnp.asarray),
    st.integers(-9, 9).map(jnp.asarray),
    st.floats(width=32, allow_nan=False).map(lambda value: jnp.broadcast_to(jnp.asarray(value), (2, 3))),
    host_arrays(OF_JAX).map(weakly_typed),
)
typed_keys = st.tuples(st.sampled_from(["threefry2x32", "rbg", "unsafe_rbg"]), st.integers(0, 99), shapes).map(
    lambda drawn: (
        jax.random.split(jax.random.key(drawn[1], impl=drawn[0]), drawn[2])
        if 0 not in drawn[2] and drawn[2]
        else jax.random.key(drawn[1], impl=drawn[0])
    )
)
numbers = st.one_of(
    st.booleans(), st.integers(-(2**190), 2**190), st.floats(), st.complex_numbers(), st.text(max_size=9), st.none()
)
leaves = st.one_of(host_arrays(), device_arrays, weak_arrays, typed_keys, numbers, st.just(np.float32(1.5)))
axis_names = st.lists(st.one_of(st.none(), st.text(max_size=3), st.tuples(st.text(max_size=2))), max_size=3).map(tuple)


def branches(children):
    return st.one_of(
        st.dictionaries(keys, children, max_size=4),
        st.dictionaries(odd_names, children, max_size=3).map(freeze),
        st.lists(children, max_size=3),
        st.lists(children, max_size=3).map(tuple),
        st.builds(nn.Partitioned, children, axis_names),
        st.builds(nn.LogicallyPartitioned, children, axis_names),
    )


trees = st.recursive(leaves, branches, max_leaves=12)


@settings(max_examples=300, deadline=None)
@given(trees)
def test_any_tree_comes_back(tree):
    assert alike(there_and_back(tree), tree)


@settings(max_examples=40, deadline=None)
@given(trees)
def test_any_tree_comes_back_from_a_file(tmp_path_factory, tree):
    path = tmp_path_factory.mktemp("trees") / "file"
    writer = Writer()
    write(path, {"tree": writer.tree(tree, "net")}, writer.arrays)
    found = read(path)
    assert alike(Reader(found.arrays).tree(found.document["tree"]), tree)


def test_arrays_are_named_after_where_they_are():
    writer = Writer()
    writer.tree({"params": {"Dense_0": {"kernel": jnp.ones(2)}, "a/b": np.ones(1), "a": {"b": np.ones(1)}}}, "net")
    assert list(writer.arrays) == ["net/params/Dense_0/kernel", "net/params/a/b", "net/params/a/b#2"]


MADE = []


@jax.tree_util.register_pytree_node_class
class Watched:
    def __init__(self, value):
        MADE.append(value)
        self.value = value

    def tree_flatten(self):
        return (self.value,), None

    @classmethod
    def tree_unflatten(cls, _, children):
        return cls(*children)


def test_a_node_of_a_class_of_the_users_is_not_made_by_what_the_file_says():
    MADE.clear()
    tree = {"a": Watched(jnp.ones(2)), "b": Pair(jnp.zeros(1), 2), "c": Batch(jnp.asarray(1), {"w": jnp.ones(3)})}
    made = len(MADE)
    found = there_and_back(tree)
    assert len(MADE) == made
    classes = [f"{__name__}.Watched", "linen_kinds.Pair", "linen_kinds.Batch"]
    assert [value.cls for value in found.values()] == classes


def test_a_tree_of_the_users_own_code_tells_what_to_make_of_it():
    tree = {"b": Pair(jnp.zeros(1), 2), "c": [Batch(jnp.asarray(1), {"w": Pair(jnp.ones(3), None)})]}
    like = {"b": Pair(0, 0), "c": [Batch(0, {"w": Pair(0, 0)}, "of now")]}
    found = graft(there_and_back(tree), like)
    assert isinstance(found["b"], Pair)
    assert alike(found["b"].weight, tree["b"].weight)
    assert isinstance(found["c"][0], Batch)
    assert isinstance(found["c"][0].scale["w"], Pair)
    assert found["c"][0].name == "of now"  # what is no array is the code's own


@pytest.mark.parametrize(
    "like", [{}, {"b": 1}, {"b": (0, 0)}, {"b": Batch(0, 0)}, {"c": Pair(0, 0)}, [Pair(0, 0)], None]
)
def test_without_such_a_node_nothing_is_made(like):
    with pytest.raises(Differs, match=r"b is a .*Pair in the file"):
        graft(there_and_back({"b": Pair(1, 2)}), like)


@pytest.mark.parametrize(
    ("leaf", "why"),
    [
        (object(), "it is of type object"),
        (np.array(["text"]), "it has the dtype <U4"),
        (np.array([None]), "it has the dtype object"),
        (2**300, "it is a whole number of more than 200 bits"),
        ({1.5: 2}, "it has the key 1.5, which is neither text nor a whole number"),
        (len, "it is of type builtin_function_or_method"),
    ],
)
def test_what_cannot_be_saved_is_told_by_its_place(leaf, why):
    with pytest.raises(FlaxMagicsError) as error:
        Writer().tree({"params": leaf}, "net")
    assert str(error.value) == f"`net/params` cannot be saved: {why}."


def test_an_array_that_was_given_away_is_told():
    array = jnp.ones(3) + 1
    array.delete()
    with pytest.raises(FlaxMagicsError, match=r"`net/params` cannot be saved: JAX says: Array has been deleted"):
        Writer().tree({"params": array}, "net")


def test_a_tree_that_is_too_deep_is_told():
    tree: Any = 1
    for _ in range(DEPTH + 1):
        tree = [tree]
    with pytest.raises(FlaxMagicsError, match="is nested too deeply to be saved"):
        Writer().tree(tree, "net")


WRONG = [
    [],
    {},
    {"dict": 1},
    {"dict": [["a"]]},
    {"dict": [[1.5, None]]},
    {"dict": [["a", None], ["a", None]]},
    {"dict": [], "list": []},
    {"list": {}},
    {"complex": [1.5]},
    {"complex": [1, 2]},
    {"array": "none"},
    {"array": ["a"]},
    {"array": "doubles"},
    {"scalar": "a"},
    {"key": ["a", "threefry2x32"]},
    {"key": ["words", "rbg"]},
    {"key": ["words", "nope"]},
    {"key": ["words", None]},
    {"key": "words"},
    {"other": ["os.system"]},
    {"other": [1, []]},
    {"partitioned": [[1.5], None]},
    {"partitioned": [None, None]},
    {"shape": [[-1], "float32", False]},
    {"shape": [[1], "nope", False]},
    {"shape": [[1], "key nope", False]},
    {"shape": [[1], "float32"]},
    {"__import__": ["os"]},
    {"tree": 1},
    {"_dict": []},
]


@pytest.mark.parametrize("node", WRONG, ids=json.dumps)
def test_a_node_that_nobody_wrote_is_told(node):
    arrays = {"a": np.ones(3, np.float32), "words": np.zeros(2, np.uint32), "doubles": np.ones(1)}
    with pytest.raises(Damaged):
        Reader(arrays).tree(node)


def test_nodes_nested_without_end_are_told():
    node: Any = None
    for _ in range(DEPTH + 2):
        node = {"list": [node]}
    with pytest.raises(Damaged, match="nested too deeply"):
        Reader({}).tree(node)
    key: Any = "a"
    for _ in range(DEPTH + 2):
        key = [key]
    with pytest.raises(Damaged, match="has a key that is none"):
        Reader({}).tree({"dict": [[key, None]]})


def test_what_waits_is_written_as_it_was_read():
    tree = {"b": Pair(jnp.zeros(1), {"c": Batch(1, 2)})}
    once = there_and_back(tree)
    assert isinstance(once["b"], OpaqueNode)
    twice = there_and_back(once)
    assert twice["b"].cls == once["b"].cls
    assert isinstance(graft(twice, {"b": Pair(0, {"c": Batch(0, 0)})})["b"].bias["c"], Batch)
