"""Summaries held against `nn.tabulate` and `nnx.tabulate`: all that they tell, from the same call."""

from __future__ import annotations

from typing import Any

import flax
import jax
import jax.numpy as jnp
import linen_kinds as of_linen
import pytest
from by_hand import Normed, bits
from flax import linen as nn
from flax import nnx
from flax.linen import summary as flax_summary
from nnx_kinds import Own
from sessions import session_of

from flax_magics.errors import FlaxMagicsError
from flax_magics.summary.view import Size, Summary

X = jnp.ones((5, 4))
RNGS = {name: jax.random.key(i) for i, name in enumerate(("params", "dropout", "noise"))}


def summarise(module: Any, *args: Any, **options: Any) -> Summary:
    return session_of(module).summary("net", *args, **options)


def of(summary: Summary, *path: str) -> Any:
    (found,) = (module for module in summary.modules if module.path == path)
    return found


class Mlp(nn.Module):
    @nn.compact
    def __call__(self, x, train: bool = False):
        x = nn.Dense(8)(x)
        x = nn.BatchNorm(use_running_average=not train)(x)
        x = nn.Dropout(0.5, deterministic=not train)(nn.relu(x))
        return nn.Dense(2)(x)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        h = nn.Dense(4)(x)
        h = nn.BatchNorm(use_running_average=False)(h)
        return nn.relu(nn.Dropout(0.5, deterministic=False)(h)), None


class Lifted(nn.Module):
    @nn.compact
    def __call__(self, x):
        axes = {"params": 0, "batch_stats": 0}
        split = {"params": True, "dropout": True}
        x, _ = nn.scan(Block, length=3, variable_axes=axes, split_rngs=split)(name="s")(x, None)
        x, _ = nn.remat(Block)()(x)
        x, _ = nn.jit(Block)()(x)
        x, _ = nn.vmap(Block, variable_axes=axes, split_rngs=split)()(x[None])
        return x[0]


class Shared(nn.Module):
    """One layer handed to another, and called by both."""

    def setup(self):
        self.embed = nn.Embed(10, 4)
        self.head = Head(self.embed)

    def __call__(self, tokens):
        return self.head(self.embed(tokens))


class Head(nn.Module):
    embed: nn.Module

    @nn.compact
    def __call__(self, x):
        return self.embed.attend(nn.Dense(4)(x))


class Methods(nn.Module):
    def setup(self):
        self.encoder = nn.Dense(3)
        self.decoder = nn.Dense(4)

    def encode(self, x):
        return self.encoder(x)

    def __call__(self, x):
        return self.decoder(self.encode(x))


class Half(nn.Module):
    @nn.compact
    def __call__(self, x):
        return {"out": nn.Dense(3, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)(x), "none": None}


class Noise(nn.Module):
    @nn.compact
    def __call__(self, x):
        y = x + jax.random.normal(self.make_rng("noise"), x.shape)
        self.sow("losses", "size", jnp.sum(y**2))
        return y


class Nothing(nn.Module):
    @nn.compact
    def __call__(self):
        return self.param("bias", nn.initializers.ones, (3,)) * 2


PARTITIONED = nn.Dense(3, kernel_init=nn.with_partitioning(nn.initializers.lecun_normal(), (None, "mlp")))
CASES: dict[str, tuple[nn.Module, tuple[Any, ...], dict[str, Any]]] = {
    "mlp": (Mlp(), (X,), {}),
    "mlp in training": (Mlp(), (X,), {"train": True}),
    "lifted": (Lifted(), (X,), {}),
    "shared": (Shared(), (jnp.ones((2, 3), int),), {}),
    "methods": (Methods(), (X,), {}),
    "bfloat16": (Half(), (X,), {}),
    "partitioned": (PARTITIONED, (X,), {}),
    "noise": (Noise(), (X,), {}),
    "no inputs": (Nothing(), (), {"method": "__call__"}),
    "static": (of_linen.Plain(), (X, 3, "tanh"), {}),
}


@pytest.mark.parametrize("case", CASES)
def test_it_tells_all_that_the_table_of_linen_tells(case):
    module, args, kwargs = CASES[case]
    ours = summarise(module, *args, **kwargs, backward=True)
    table = flax_summary._get_module_table(
        module, depth=None, show_repeated=False, compute_flops=True, compute_vjp_flops=True
    )
    theirs = table(RNGS, *args, **{name: value for name, value in kwargs.items() if name != "method"})
    assert [m.path for m in ours.modules] == [row.path for row in theirs]
    for row in theirs:
        mine = of(ours, *row.path)
        assert (mine.cls, mine.method) == (type(row.module_copy).__name__, row.method)
        for leaf in jax.tree_util.tree_leaves(row.outputs):
            assert _spelled(leaf) in mine.outputs
        for leaf in jax.tree_util.tree_leaves(row.inputs):
            assert _spelled(leaf) in mine.inputs
        counted = {name: size for name, size in row.size_and_bytes(theirs.collections).items() if size != (0, 0)}
        own = {name: Size(0, 0) for name in counted}
        for array in mine.arrays:
            own[array.collection] += array.size
        assert own.pop("losses", Size()) == Size()  # what is sown is no variable, and told by itself
        counted.pop("losses", None)
        assert {name: (size.elements, size.bytes) for name, size in own.items()} == counted
        if mine.calls == 1:
            assert (mine.flops, mine.vjp_flops) == (row.flops, row.vjp_flops), row.path
    assert (ours.flops, ours.vjp_flops) == (theirs[0].flops, theirs[0].vjp_flops)


def _spelled(leaf: Any) -> str:
    if hasattr(leaf, "array_representation"):
        leaf = leaf.array_representation
    return f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]" if hasattr(leaf, "shape") else repr(leaf.obj)


def test_the_layers_of_a_model_and_what_each_is():
    summary = summarise(Mlp(), X, mode="train")
    dense = of(summary, "Dense_0")
    assert (dense.cls, dense.inputs, dense.outputs) == ("Dense", "float32[5,4]", "float32[5,8]")
    arrays = [("bias", "float32", (8,)), ("kernel", "float32", (4, 8))]
    assert [(array.name, array.dtype, array.shape) for array in dense.arrays] == arrays
    assert of(summary, "Dropout_0").streams == ("dropout",)
    assert summary.streams == {"dropout": (("Dropout_0",),)}
    assert summary.totals == {"params": Size(74, 296), "batch_stats": Size(16, 64)}
    assert (summary.parameters, summary.bytes, summary.initialised) == (74, 360, False)
    assert summary.vjp_flops is None


def test_nothing_is_computed_drawn_or_kept():
    session = session_of(Mlp())
    root = jax.random.key_data(session.root_key).tolist()
    with jax.transfer_guard("disallow"):
        session.summary("net", X, mode="train", backward=True)
    assert jax.random.key_data(session.root_key).tolist() == root
    assert (session.draws, session.runs, session.models["net"].variables) == (0, [], None)
    assert len(session.programs) == 0


def test_variables_that_are_there_are_those_that_are_told():
    session = session_of(Mlp())
    session.init("net", X)
    assert session.summary("net", X).initialised
    alone = session.summary("net")
    inside = [((name,), "", 0) for name in ("BatchNorm_0", "Dense_0", "Dense_1")]
    assert [(m.path, m.cls, m.calls) for m in alone.modules] == [((), "Mlp", 0), *inside]
    assert alone.totals == session.summary("net", X).totals
    assert (alone.flops, alone.call) == (None, "")


def test_without_variables_and_without_a_call_it_says_what_to_write():
    with pytest.raises(FlaxMagicsError) as error:
        summarise(Mlp())
    assert str(error.value) == (
        "`net` has no variables yet, and without a call nobody knows which it will have.\n  form: %flax_summary net(…)"
    )


def test_a_method_alone_and_one_that_needs_variables_which_the_init_did_not_make():
    session = session_of(Methods())
    encode = session.summary("net", X, method="encode")
    assert [m.path for m in encode.modules] == [(), ("encoder",)]
    assert of(encode).method == "encode"
    session.init("net", X, method="encode")
    assert session.summary("net", X).totals == {"params": Size(31, 124)}
    dotted = session.summary("net", X, method="encoder")
    assert [(m.path, m.calls) for m in dotted.modules] == [((), 0), (("encoder",), 1)]
    assert dotted.flops == of(dotted, "encoder").flops == of(encode, "encoder").flops


def test_a_layer_that_is_called_twice_costs_twice():
    summary = summarise(nn.Sequential([nn.Dense(4)] * 2), X, backward=True)
    once = summarise(nn.Dense(4), X)
    assert of(summary, "layers_0").calls == 2
    assert of(summary, "layers_0").flops == 2 * once.flops == summary.flops
    assert summary.totals == {"params": Size(20, 80)}


def test_a_loop_counts_as_one_turn_and_that_is_said():
    summary = summarise(Lifted(), X)
    assert of(summary, "s").calls == 1
    assert summary.notes == ("a loop (scan, while) counts as one turn of it: XLA does not know how many there are",)
    assert summarise(Mlp(), X).notes == ()


def test_what_a_call_writes_and_sows():
    assert summarise(Mlp(), X, mode="train").written == ("batch_stats",)
    assert summarise(Mlp(), X, mode="eval").written == ()
    assert summarise(NnxNet(rngs=nnx.Rngs(0)), X, mode="train").written == ("BatchStat",)
    noise = summarise(Noise(), X)
    assert (noise.written, noise.sown) == ((), {"losses": "{size: (float32[],)}"})
    assert noise.streams == {"noise": ((),)}


def test_a_decoding_cache():
    session = session_of(nn.MultiHeadDotProductAttention(2, decode=True))
    session.init("net", jnp.ones((1, 6, 4)))
    summary = session.summary("net", jnp.ones((1, 1, 4)))
    assert summary.totals == {"params": Size(80, 320), "cache": Size(49, 196)}
    assert summary.written == ("cache",)


def test_partition_names_are_told():
    _, kernel = of(summarise(PARTITIONED, X)).arrays
    assert (kernel.name, kernel.about) == ("kernel", "names=(None, 'mlp')")


def test_the_mode_is_set_as_in_an_apply():
    assert summarise(Normed(), X, mode="train").switch == ("train=True",)
    with pytest.raises(FlaxMagicsError) as error:
        summarise(Normed(), X)
    assert str(error.value) == (
        "net(…) does not say whether it trains: `train` has no value.\n"
        "  form: %flax_summary --train net(…)\n"
        "        %flax_summary --eval net(…)"
    )
    with pytest.raises(FlaxMagicsError, match=r"^`mode` is 'train', 'eval' or None, not 'test'\.$"):
        summarise(Normed(), X, mode="test")


def test_a_mapped_axis_that_nothing_binds_stands_for_one_device():
    synced = nn.Sequential([nn.Dense(3), nn.BatchNorm(use_running_average=False, axis_name="batch")])
    assert [m.path for m in summarise(synced, X).modules] == [(), ("layers_0",), ("layers_1",)]


def test_outputs_and_inputs_that_have_no_gradient_are_no_hindrance_to_the_backward_pass():
    class Labels(nn.Module):
        @nn.compact
        def __call__(self, tokens, act):
            logits = act(nn.Embed(10, 4)(tokens))
            return {"logits": logits, "labels": jnp.argmax(logits, -1), "none": None}

    summary = summarise(Labels(), jnp.ones((2, 3), int), nn.relu, backward=True)
    assert of(summary).inputs == "int32[2,3], relu"
    assert (summary.flops, summary.vjp_flops) == (246, 196)  # a gradient needs no labels


def test_legacy_keys_and_python_numbers_as_arguments():
    class Sampled(nn.Module):
        @nn.compact
        def __call__(self, x, key, scale):
            return scale * nn.Dense(4)(x) + jax.random.normal(key, x.shape)

    summary = summarise(Sampled(), X, jax.random.PRNGKey(0), 0.5)
    assert of(summary).inputs == "float32[5,4], uint32[2], float32[]"


def test_equal_blocks_are_lowered_once(monkeypatch):
    class Stack(nn.Module):
        layers: int

        @nn.compact
        def __call__(self, x):
            for _ in range(self.layers):
                x, _ = Block()(x)
            return x

    from flax_magics.summary import summary as counting

    lowered: list[Any] = []
    count = counting._flops
    monkeypatch.setattr(counting, "_flops", lambda function, shapes: lowered.append(shapes) or count(function, shapes))
    summary = summarise(Stack(12), X)
    assert len(summary.modules) == 49
    assert len(lowered) == 5  # the model, a block, its three layers
    assert len({of(summary, f"Block_{i}").flops for i in range(12)}) == 1


# -- NNX


class NnxNet(nnx.Module):
    def __init__(self, *, rngs):
        self.first = Own(4, rngs=rngs)
        self.second = Own(4, rngs=rngs)
        self.out = nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, x):
        return self.out(self.second(self.first(x)))


class Plain(nnx.Module):
    def __init__(self, *, rngs):
        self.embed = nnx.Embed(10, 4, rngs=rngs)
        self.norm = nnx.LayerNorm(4, rngs=rngs)
        self.out = nnx.Linear(4, 2, rngs=rngs)

    def encode(self, tokens):
        return self.norm(self.embed(tokens))

    def __call__(self, tokens):
        return self.out(self.encode(tokens))


class Handed(nnx.Module):
    def __init__(self, *, rngs):
        self.linear = nnx.Linear(4, 4, rngs=rngs)
        self.dropout = nnx.Dropout(0.5)

    def __call__(self, x, *, rngs):
        return self.dropout(self.linear(x), rngs=rngs)


def tabulated(module: nnx.Module, *args: Any, **options: Any) -> tuple[dict[str, list[str]], list[str], list[str]]:
    """Rows of `nnx.tabulate` by path (the first line of each), its columns, and its footer."""
    text = nnx.tabulate(
        module, *args, **options, console_kwargs={"width": 400, "force_terminal": False, "force_jupyter": False}
    )
    rows, columns, footer, begins = {}, [], [], False
    for line in text.splitlines():
        if line.startswith("┃"):
            columns = [cell.strip() for cell in line.strip("┃").split("┃")]
        elif line.startswith(("├", "┡")):
            begins = True
        elif line.startswith("│"):
            cells = [cell.strip() for cell in line.strip("│").split("│")]
            if "Total" in cells:
                footer = cells
            elif begins:
                rows[cells[0]] = cells
            begins = False
    return rows, columns, footer


COUNTED = tuple(map(int, flax.__version__.split(".")[:2])) >= (0, 12)
"""Whether `nnx.tabulate` counts FLOPs."""


@pytest.mark.parametrize(
    ("make", "x", "mode"),
    [(NnxNet, X, "eval"), (NnxNet, X, "train"), (Plain, jnp.ones((2, 3), int), None)],
    ids=["eval", "train", "plain"],
)
def test_it_tells_all_that_the_table_of_nnx_tells(make, x, mode):
    module = make(rngs=nnx.Rngs(0))
    ours = summarise(module, x, mode=mode, backward=True)
    if mode is not None:
        (module.train if mode == "train" else module.eval)()
    flops = {"compute_flops": True, "compute_vjp_flops": True} if COUNTED else {}
    rows, columns, footer = tabulated(module, x, **flops)
    for path, cells in rows.items():
        row = dict(zip(columns, cells, strict=True))
        if row["type"] == make.__name__ and path:
            continue  # a method that the model calls on itself has a row there
        mine = of(ours, *filter(None, path.split("/")))
        assert (mine.cls, mine.inputs, mine.outputs) == (row["type"], row["inputs"], row["outputs"])
        # Theirs leaves out what updates the statistics in training, which every such run computes.
        if COUNTED and (mode != "train" or mine.cls in ("Linear", "Dropout")):
            assert (mine.flops, mine.vjp_flops) == (int(row["flops"]), int(row["vjp_flops"])), path
    # Theirs takes two calls of one module with the same inputs for one: `encode` stands there, and the model does not.
    assert ("" in rows) is (make is not Plain or not COUNTED)
    totals = {name: f"{size.elements:,}" for name, size in ours.totals.items()}
    found = dict(zip(columns, footer, strict=True))
    assert {name: found[name].partition(" ")[0] for name in totals} == totals
    assert sum(size.bytes for size in ours.totals.values()) == ours.bytes


def test_the_object_stays_as_it_is():
    module = NnxNet(rngs=nnx.Rngs(0))
    before = bits(nnx.state(module))
    call = vars(Own)["__call__"]
    summarise(module, X, mode="train")
    assert bits(nnx.state(module)) == before
    assert module.first.dropout.deterministic is False
    assert vars(Own)["__call__"] is call
    assert not [name for name in vars(nnx.Linear) if "flax_magics" in name]
    assert all(
        "flax_magics" not in str(v._var_metadata) for _, v in nnx.iter_graph(module) if isinstance(v, nnx.Variable)
    )


def test_streams_of_an_nnx_module_by_their_tags():
    summary = summarise(NnxNet(rngs=nnx.Rngs(params=0, dropout=1)), X, mode="train")
    assert summary.streams == {"dropout": (("first", "dropout"), ("second", "dropout"))}
    assert of(summary, "first").calls == 1


def test_rngs_of_the_call_are_the_sessions_to_give():
    summary = summarise(Handed(rngs=nnx.Rngs(0)), X, mode="train")
    assert summary.streams == {"dropout": (("dropout",),)}
    assert of(summary, "dropout").inputs == "float32[5,4], rngs=Rngs(…)"


def test_an_nnx_module_is_told_without_a_call_by_its_graph():
    summary = summarise(Plain(rngs=nnx.Rngs(0)))
    inside = [(("embed",), "Embed"), (("norm",), "LayerNorm"), (("out",), "Linear")]
    assert [(m.path, m.cls) for m in summary.modules] == [((), "Plain"), *inside]
    assert summary.totals == {"Param": Size(58, 232)}


def test_layers_inside_nnx_transforms_keep_their_paths():
    class Stacked(nnx.Module):
        def __init__(self, *, rngs):
            self.once = nnx.Linear(4, 4, rngs=rngs)
            make = nnx.vmap(lambda key: nnx.Linear(4, 4, rngs=nnx.Rngs(key)))
            self.layers = make(jax.random.split(rngs.params(), 3))
            self.unused = nnx.Linear(7, 7, rngs=rngs)

        def __call__(self, x):
            x = nnx.jit(lambda layer, x: layer(x))(self.once, x)
            x = nnx.remat(lambda layer, x: layer(x))(self.once, x)
            return nnx.scan(lambda x, layer: layer(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.layers)

    module = Stacked(rngs=nnx.Rngs(0))
    for _ in range(2):  # what a transform remembers of the first is no hindrance to the second
        summary = summarise(module, X)
        inside = [(("once",), 2), (("layers",), 1), (("unused",), 0)]
        assert [(m.path, m.calls) for m in summary.modules] == [((), 1), *inside]
        assert of(summary, "once").flops == 2 * of(summary, "layers").flops == 360
        assert of(summary, "unused").flops is None
