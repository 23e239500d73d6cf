"""Whose weights ran: where they came from, in every Run; others that are given, checked; and what an init replaced."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from by_hand import bits
from flax import nnx
from flax.core import freeze
from linen_kinds import Heads
from sessions import session_of

from flax_magics import FlaxMagicsError, Session
from flax_magics.models.construction import Construction
from flax_magics.run import recorded

X = jnp.ones((2, 3))


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        return nn.BatchNorm(use_running_average=not train)(nn.Dense(4)(x))


class Plain(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(4)(x)


class Block(nnx.Module):
    def __init__(self, features, rngs):
        self.linear = nnx.Linear(features, 4, rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)

    def __call__(self, x):
        return self.norm(self.linear(x))


def session_with_set_weights(**settings):
    """A session whose model was initialised, and then given weights twice as large."""
    session = session_of(Plain(), **settings)
    session.init("net", X)
    session.models["net"].variables = doubled(session.models["net"].variables)
    return session


def nnx_session():
    session = Session()
    session.register_all({"net": Construction.of(Block, (3,), {}, "Block(3)")})
    return session


def doubled(tree):
    return jax.tree_util.tree_map(lambda leaf: leaf * 2, tree)


# -- whose they are


def test_a_run_says_which_draw_initialised_its_weights():
    session = session_of(Net())
    assert session.models["net"].weights == ""
    session.init("net", X)
    assert session.models["net"].weights == "initialised in draw 1"
    runs = [session.apply("net", X), session.apply("net", X, mode="train"), session.apply("net", X)]
    assert [run.weights for run in runs] == ["initialised in draw 1"] * 3
    session.init("net", X)
    assert session.apply("net", X).weights == "initialised in draw 4"
    assert next(run.weights for run in session.runs) == "initialised in draw 1"


def test_a_run_that_initialises_says_so_and_a_key_says_nothing():
    session = session_of(Plain())
    session.key("noise")
    run = session.apply("net", X)
    assert run.weights == run.to_json()["weights"] == recorded(run)["weights"] == "initialised in draw 2"
    assert [run.weights for run in session.runs] == ["", "initialised in draw 2"]


def test_under_another_seed_the_draw_is_told_with_its_seed():
    session = session_of(Plain())
    session.apply("net", X)
    session.restart(7)
    assert session.apply("net", X).weights == "initialised in draw 1 of seed 0"
    session.restart(7, fresh=True)
    assert session.apply("net", X).weights == "initialised in draw 1"


def test_weights_that_are_set_in_a_script_and_those_of_one_run():
    session = session_of(Plain())
    session.apply("net", X)
    variables = session.models["net"].variables
    assert session.apply("net", X, variables=doubled(variables)).weights == "given for this run"
    session.models["net"].variables = doubled(variables)
    run = session.apply("net", X)
    assert run.weights == "set in a script"
    assert np.array_equal(run.output, Plain().apply(doubled(variables), X))
    session.models["net"].variables = None
    assert session.models["net"].weights == ""


def test_a_saved_session_keeps_it_and_one_that_is_loaded_says_from_where(tmp_path):
    file = str(tmp_path / "s.safetensors")
    session = session_of(Net())
    session.apply("net", X, mode="train")
    session.save(file)
    loaded = session_of(Net())
    loaded.load(file)
    assert [run.weights for run in loaded.runs] == ["initialised in draw 1"]
    run = loaded.apply("net", X)
    assert run.weights == f"loaded from {file}"
    waiting = Session()
    waiting.load(file)
    waiting.register("net", Net())
    assert waiting.apply("net", X).weights == f"loaded from {file}"
    assert loaded.models["net"].updates == {"batch_stats": 1}


def test_the_same_for_an_nnx_module(tmp_path):
    file = str(tmp_path / "s.safetensors")
    session = nnx_session()
    assert [session.apply("net", X, mode="train").weights for _ in range(2)] == ["initialised in draw 1"] * 2
    session.save(file)
    session.load(file)
    assert session.apply("net", X).weights == f"loaded from {file}"
    assert session_of(Block(3, nnx.Rngs(0))).apply("net", X).weights == "held by net"


def test_an_edit_that_keeps_the_weights_keeps_where_they_came_from():
    session = session_with_set_weights()

    class Edited(Plain):
        @nn.compact
        def __call__(self, x):
            return nn.relu(nn.Dense(4)(x))

    session.register("net", Edited())
    assert session.apply("net", X).weights == "set in a script"


@pytest.mark.parametrize("restarted", [False, True])
def test_an_edit_that_set_weights_do_not_fit_drops_them_and_takes_none_like_them(restarted):
    session = session_with_set_weights()
    variables = session.models["net"].variables
    if restarted:  # then no init is there, but what it was is still known
        session.restart(0, fresh=True)
        session.models["net"].variables = variables

    class Edited(Plain):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(5)(x)

    session.register("net", Edited())
    assert session.models["net"].variables is None
    with pytest.raises(FlaxMagicsError, match=r"kernel: float32\[3,4\], and the model has float32\[3,5\]"):
        session.models["net"].variables = variables
    assert session.apply("net", X).output.shape == (*X.shape[:-1], 5)


def test_a_replay_says_whose_weights_it_ran_with():
    session = session_of(Plain())
    runs = [session.apply("net", X)]
    session.models["net"].variables = doubled(session.models["net"].variables)
    runs.append(session.apply("net", X))
    replayed = [session.replay(1), session.replay(2)]
    assert [run.weights for run in replayed] == [run.weights for run in runs]
    assert [run.weights for run in runs] == ["initialised in draw 1", "set in a script"]
    assert all(run.agreement.identical for run in replayed)


# -- changed behind the session's back


@pytest.mark.parametrize("warm", [False, True])
def test_other_values_in_an_nnx_module_are_noticed(warm):
    session = nnx_session()
    net = session.models["net"].module
    for _ in range(2 * warm):
        session.apply("net", X, mode="train")
    nnx.update(net, doubled(nnx.state(net, nnx.Param)))
    expected = "initialised in draw 1, changed by your code since"
    assert session.models["net"].weights == expected
    assert [session.apply("net", X, mode="train").weights for _ in range(2)] == [expected] * 2


def test_the_same_values_in_other_arrays_are_no_change():
    """`nnx.jit` by hand gives every Variable a new array."""
    session = nnx_session()
    net = session.models["net"].module
    session.apply("net", X)
    before = net.linear.kernel[...]
    nnx.jit(lambda module, x: module(x))(net, X)
    assert net.linear.kernel[...] is not before
    assert [session.apply("net", X).weights for _ in range(2)] == ["initialised in draw 1"] * 2


def test_an_edit_of_the_dict_in_place_is_noticed():
    session = session_of(Plain())
    variables = session.init("net", X)
    for _ in range(2):
        session.apply("net", X)
    variables["params"]["Dense_0"]["bias"] = jnp.ones(4)
    run = session.apply("net", X)
    assert run.weights == "initialised in draw 1, changed by your code since"
    assert np.array_equal(run.output, Plain().apply(variables, X))


def test_lines_by_turns_that_write_statistics_are_no_change():
    session = session_of(Net())
    for _ in range(3):
        for x in (X, jnp.ones((5, 3))):
            assert session.apply("net", x, mode="train").weights == "initialised in draw 1"


def test_parameters_that_a_method_adds_are_no_change():
    session = session_of(Heads())
    session.apply("net", X)
    assert [session.apply("net", X, method="head").weights for _ in range(2)] == ["initialised in draw 1"] * 2


# -- others, checked


@pytest.fixture
def initialised():
    session = session_of(Net())
    session.init("net", X)
    return session


def refused(session, value, message):
    before = session._state
    with pytest.raises(FlaxMagicsError) as error:
        session.models["net"].variables = value
    assert str(error.value) == message
    assert session._state is before


NOW = "flax_magics.session().models['net'].variables"


def test_without_a_collection_and_params_without_theirs(initialised):
    params = initialised.models["net"].variables["params"]
    missing = "variables of `net` have no `batch_stats`, and the model has."
    refused(initialised, {"params": params}, f"{missing}\n  form: {NOW} = {{**{NOW}, **…}}")
    bare = "variables of `net` have no `params`, but `BatchNorm_0`: these look like the params themselves."
    refused(initialised, params, f"{bare}\n  form: {NOW} = {{**{NOW}, 'params': …}}")


def test_other_names_shapes_and_dtypes_leaf_by_leaf(initialised):
    variables = initialised.models["net"].variables
    params = {
        "BatchNorm_0": {"scale": jnp.ones(4, jnp.bfloat16), "bias": jnp.ones(4)},
        "Dense_0": {"kernel": jnp.ones((3, 5)), "bais": jnp.ones(4)},
    }
    refused(
        initialised,
        {**variables, "params": params, "cache": {"index": jnp.zeros((), jnp.int32)}},
        "these variables do not fit `net`, and none of them was taken:\n"
        "  BatchNorm_0/scale: bfloat16[4], and the model has float32[4]\n"
        "  Dense_0/bias: missing\n"
        "  Dense_0/kernel: float32[3,5], and the model has float32[3,4]\n"
        "  cache/index: the model has none\n"
        "  Dense_0/bais: the model has none; did you mean Dense_0/bias?",
    )


@pytest.mark.parametrize(
    ("value", "kind"), [(3, "an int"), ([1], "a list"), (jnp.ones(3), "an array (float32[3])"), ({1: 2}, "a dict")]
)
def test_what_is_no_dict_of_collections(initialised, value, kind):
    refused(
        initialised,
        value,
        f"variables of `net` are a dict of collections, not {kind}.\n  form: {NOW} = {{'params': …}}",
    )


def test_an_array_that_was_donated_is_refused_and_later_is_one_message(initialised):
    model = initialised.models["net"]
    given = jax.tree_util.tree_map(jnp.copy, model.variables)
    model.variables = given
    assert model.variables is given
    initialised.apply("net", X)
    jax.tree_util.tree_leaves(given)[0].delete()
    for _ in range(2):
        gone = r"the weights of `net` \(set in a script\) are gone: your code has donated"
        with pytest.raises(FlaxMagicsError, match=gone):
            initialised.apply("net", X)
    refused(
        initialised,
        given,
        "these variables of `net` are gone: your code has donated or deleted their arrays.\n"
        "  a jitted step with donate_argnums takes the arrays that it is given: give it copies of these",
    )


def test_values_of_a_traced_function_are_refused(initialised):
    traced, before = [], initialised._state
    jax.eval_shape(lambda variables: traced.append(variables), initialised.models["net"].variables)
    with pytest.raises(FlaxMagicsError, match="cannot be values of a function that is being traced"):
        initialised.models["net"].variables = traced[0]
    assert initialised._state is before


def test_what_fits_in_another_container_or_of_numpy_is_taken(initialised):
    model = initialised.models["net"]
    as_numpy = jax.tree_util.tree_map(lambda leaf: np.asarray(leaf, np.float64), model.variables)
    expected = Net().apply(model.variables, X)
    for given in (freeze(model.variables), as_numpy):
        model.variables = given
        assert np.array_equal(initialised.apply("net", X).output, expected)


def test_boxed_parameters_are_taken_with_and_without_their_boxes():
    boxed = nn.Dense(4, kernel_init=nn.with_partitioning(nn.initializers.lecun_normal(), (None, "mlp")))
    session = session_of(boxed)
    session.apply("net", X)
    model = session.models["net"]
    for given in (doubled(model.variables), nn.unbox(doubled(model.variables))):
        model.variables = given
        assert np.array_equal(session.apply("net", X).output, boxed.apply(given, X))


def test_a_collection_that_another_method_added_may_be_left_out():
    class Decoding(Plain):
        @nn.compact
        def decode(self, x):
            count = self.variable("cache", "count", lambda: jnp.zeros(()))
            count.value += 1
            return x + count.value

    session = session_of(Decoding())
    session.init("net", X)
    session.apply("net", X, method="decode")
    model = session.models["net"]
    assert set(model.variables) == {"params", "cache"}
    model.variables = {"params": model.variables["params"]}
    run = session.apply("net", X, method="decode")
    assert run.weights == "set in a script"
    assert set(model.variables) == {"params", "cache"}


def test_a_model_without_variables_takes_what_its_first_run_then_checks():
    session = session_of(Plain())
    params = {"Dense_0": {"kernel": jnp.ones((3, 4)), "bias": jnp.zeros(4)}}
    session.models["net"].variables = {"params": {"Dense_0": 3}}  # a mistake that nobody can see yet
    session.models["net"].variables = {"params": params}
    assert session.apply("net", X).weights == "set in a script"


def test_an_nnx_state_goes_into_the_object_whole_or_in_part():
    session = nnx_session()
    model, net = session.models["net"], session.models["net"].module
    kernel, mean = net.linear.kernel, net.norm.mean
    model.variables = doubled(nnx.state(net, nnx.Param))
    assert net.linear.kernel is kernel
    assert net.norm.mean is mean
    run = session.apply("net", X)
    assert run.weights == "set in a script"
    wrong = nnx.State({"linear": {"kernel": nnx.Param(jnp.ones((3, 5)))}})
    before = bits(nnx.state(net))
    with pytest.raises(FlaxMagicsError) as error:
        model.variables = wrong
    assert str(error.value) == (
        "these variables do not fit `net`, and none of them was taken:\n"
        "  linear/kernel: float32[3,5], and the model has float32[3,4]"
    )
    assert bits(nnx.state(net)) == before
    with pytest.raises(FlaxMagicsError, match=r"variables of `net` are an nnx.State, not a Block"):
        model.variables = net


def test_weights_that_are_set_after_a_fresh_start_are_not_initialised_over():
    session = nnx_session()
    net = session.models["net"].module
    session.restart(0, fresh=True)
    given = doubled(nnx.state(net))
    session.models["net"].variables = given
    session.apply("net", X)
    assert bits(nnx.state(net, nnx.Param)) == bits(nnx.filter_state(given, nnx.Param))


# -- what an init replaced

PREVIOUS = "%flax_vars net = flax_magics.session().models['net'].previous"


def notes_of(session):
    return [(note.text, note.write) for note in session.runs[-1].notes if note.kind == "replaced"]


def test_an_init_over_fresh_weights_replaces_nothing_worth_a_word():
    session = session_of(Net())
    session.init("net", X)
    session.apply("net", X)
    session.init("net", X)
    assert notes_of(session) == []
    with pytest.raises(FlaxMagicsError, match="no init and no edit has replaced weights of `net`"):
        _ = session.models["net"].previous


def test_weights_that_were_set_come_back():
    session = session_with_set_weights()
    given = session.models["net"].variables
    session.init("net", X)
    assert notes_of(session) == [("this init replaced weights of net: set in a script", PREVIOUS)]
    assert bits(session.models["net"].variables) != bits(given)
    session.init("net", X)  # the cell once more
    assert notes_of(session) == []
    session.models["net"].variables = session.models["net"].previous
    assert bits(session.models["net"].variables) == bits(given)


def test_statistics_that_runs_have_written_come_back():
    session = session_of(Net())
    session.apply("net", X, mode="train")
    session.apply("net", X, mode="train")
    trained = session.models["net"].variables
    session.init("net", X)
    text = "this init replaced weights of net: initialised in draw 1, batch_stats: update 2"
    assert notes_of(session) == [(text, PREVIOUS)]
    assert bits(session.models["net"].previous) == bits(trained)


def test_those_of_an_nnx_module_that_was_trained_by_hand_come_back():
    session = nnx_session()
    model, net = session.models["net"], session.models["net"].module
    nnx.update(net, doubled(nnx.state(net, nnx.Param)))
    trained = bits(nnx.state(net, nnx.Param))
    session.init("net", X)
    text = "this init replaced weights of net: initialised in draw 1, changed by your code since"
    assert notes_of(session) == [(text, PREVIOUS)]
    assert model.module is net
    assert bits(nnx.state(net, nnx.Param)) != trained
    model.variables = model.previous
    assert bits(nnx.state(net, nnx.Param)) == trained


def test_they_count_in_replay_bytes_and_are_let_go_of_with_the_oldest():
    session = session_with_set_weights()
    before = session.kept_bytes
    session.init("net", X)
    size = sum(leaf.nbytes for leaf in jax.tree_util.tree_leaves(session.models["net"].variables))
    assert session.kept_bytes == before + size
    session.replay_bytes = 0
    with pytest.raises(FlaxMagicsError, match="were let go of, to stay within `replay_bytes`"):
        _ = session.models["net"].previous


def test_where_they_are_too_large_to_be_kept_the_note_says_so():
    session = session_with_set_weights(replay_bytes=10)
    session.init("net", X)
    why = "they are not kept: 64 B are more than replay_bytes, 10 B"
    assert notes_of(session) == [(f"this init replaced weights of net: set in a script; {why}", None)]


def test_the_next_that_are_replaced_take_their_place():
    session = session_of(Plain())
    session.init("net", X)
    model = session.models["net"]
    sizes = []
    for _ in range(3):
        model.variables = doubled(model.variables)
        given = model.variables
        session.init("net", X)
        sizes.append(session.kept_bytes)
    assert bits(model.previous) == bits(given)
    assert sizes[0] == sizes[1] == sizes[2]


def test_an_init_that_fails_replaces_nothing():
    session = session_with_set_weights()
    given = session.models["net"].variables
    with pytest.raises(FlaxMagicsError):
        session.init("net", X, wrong=1)
    assert session.models["net"].variables is given
    assert session.models["net"].weights == "set in a script"
