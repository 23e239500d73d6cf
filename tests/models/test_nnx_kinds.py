"""Every kind of NNX model, each as small as it goes: the session's bits are those of `nnx.jit` after `nnx.reseed`."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import nnx_kinds as kinds
import optax
import pytest
from by_hand import bits, keys_of
from flax import nnx
from linen_kinds import Graph
from nnx_kinds import Holding, Noise, Remembered, a_sequence, an_input, runs_as_by_hand, scanned, stack, with_refs

from flax_magics import FlaxMagicsError, Session
from flax_magics.report import facts

pytestmark = [kinds.WARNINGS, pytest.mark.usefixtures("optimised")]

WRAPPERS = [getattr(nnx, name) for name in ("WeightNorm", "SpectralNorm") if hasattr(nnx, name)]


# -- transforms


def mapped(block: Any, x: Any) -> Any:
    axes = nnx.StateAxes({"noise": 0, ...: None})
    return nnx.split_rngs(splits=5, only="noise")(nnx.vmap(lambda block, x: block(x), in_axes=(axes, 0)))(block, x)


def in_loop(block: Any, x: Any) -> Any:
    return nnx.fori_loop(0, 3, lambda _, carry: (carry[0], carry[0](carry[1])), (block, x))[1]


def chosen(block: Any, x: Any) -> Any:
    x = nnx.cond(x.sum() > 0, lambda block, x: block(x), lambda block, x: block.linear(x), block, x)
    return nnx.switch(jnp.int32(1), [lambda block, x: x, lambda block, x: block(x)], block, x)


TRANSFORMS: dict[str, tuple[Any, Any]] = {
    "scan": (stack(Noise), scanned),
    "vmap": (lambda rngs: Noise(nnx.Rngs(params=0, noise=1)), mapped),
    "remat": (Noise, nnx.remat(lambda block, x: block(x))),
    "jit": (Noise, nnx.jit(lambda block, x: block(x))),
    "remat in scan": (stack(Noise), lambda block, x: scanned(block, x) + scanned(block, x)),
    "cond and switch": (Noise, chosen),
    "loop": (Noise, in_loop),
}


@pytest.mark.parametrize(("make", "run"), TRANSFORMS.values(), ids=TRANSFORMS)
def test_a_stream_of_any_name_inside_a_transform(session, make, run):
    """Params go through the transform, and are not counted as written."""
    ran = runs_as_by_hand(session, lambda: Holding(make, run), an_input())
    assert ran.used["noise"] == ("block",)
    assert ran.changed == {}


@pytest.mark.parametrize("eager", [False, True])
def test_what_jax_remembers_of_an_earlier_trace_hides_no_stream_and_no_layer(session, eager):
    run = runs_as_by_hand(session, lambda: Remembered(nnx.Rngs(0)), an_input(), mode="train", eager=eager)
    assert run.used == {"default": ("dropout",)}
    assert run.changed == {"BatchStat": 3}


def test_remat_writes_statistics_alone_op_by_op_too(session):
    class Checkpointed(Remembered):
        __call__ = nnx.remat(lambda self, x: self.dropout(self.norm(x)))

    for eager in (False, True):
        run = runs_as_by_hand(Session(seed=0), lambda: Checkpointed(nnx.Rngs(0)), an_input(), mode="train", eager=eager)
        assert run.changed == {"BatchStat": 3}


def test_many_draws_of_a_model_whose_transform_hands_params_through(session):
    net = Holding(Noise, nnx.remat(lambda block, x: block(x)))
    session.register("net", net)
    many = session.apply("net", an_input(), samples=3)
    singles = [session.apply("net", an_input(), keys_of=draw).output for draw in (1, 2, 3)]
    assert bits(many.output) == bits(jnp.stack(singles))


def test_gradients_taken_inside_the_call(session):
    class Inside(nnx.Module):
        def __init__(self, rngs):
            self.linear, self.norm = nnx.Linear(4, 1, rngs=rngs), nnx.BatchNorm(1, rngs=rngs)
            self.dropout = nnx.Dropout(0.5, rngs=rngs)

        def __call__(self, x):
            def loss(net, x):
                return (net.norm(net.dropout(net.linear(x))) ** 2).sum()

            return nnx.value_and_grad(loss, argnums=nnx.DiffState(0, nnx.Param))(self, x)

    run = runs_as_by_hand(session, lambda: Inside(nnx.Rngs(0)), an_input(), mode="train")
    assert (run.changed, run.used) == ({"BatchStat": 3}, {"default": ("dropout",)})


# -- sown values


class Loss(nnx.Variable):
    pass


class Sows(nnx.Module):
    """Sows a type that it also holds: what was sown is told by where it came from, not by its type."""

    def __init__(self, rngs: nnx.Rngs):
        self.linear = nnx.Linear(4, 4, rngs=rngs)
        self.total = Loss(jnp.zeros(()))

    def __call__(self, x: Any) -> Any:
        y = self.linear(x)
        self.sow(Loss, "last", y.sum())
        self.sow(nnx.Intermediate, "mean", y.mean(), init_fn=lambda: 0.0, reduce_fn=lambda a, b: a + b)
        self.total[...] = self.total[...] + 1
        return y


@pytest.mark.parametrize(("make", "run"), [(Sows, lambda block, x: block(x)), (stack(Sows), scanned)])
def test_a_sown_value_is_told_from_a_variable_of_its_type(session, make, run):
    net = Holding(make, run)
    session.register("net", net)
    for draw in (1, 2, 3):
        ran = session.apply("net", an_input())
        assert {kind: set(tree["block"]) for kind, tree in ran.sown.items()} == {
            "Loss": {"last"},
            "Intermediate": {"mean"},
        }
        assert ran.changed == {"Loss": draw}
        assert float(jnp.max(net.block.total[...])) == draw
        assert not hasattr(net.block, "last")
    assert ran.program == "reused"


def test_what_is_sown_into_a_variable_that_the_model_made_itself_stays_as_by_hand(session):
    class Sums(nnx.Module):
        def __init__(self):
            self.loss = Loss(jnp.zeros(()))

        def __call__(self, x):
            self.sow(Loss, "loss", x.sum(), reduce_fn=lambda a, b: a + b)
            return x

    assert runs_as_by_hand(session, Sums, an_input()).changed == {"Loss": 3}


def test_perturbations_and_intermediates(session):
    class Perturbed(nnx.Module):
        def __init__(self, rngs):
            self.linear = nnx.Linear(4, 4, rngs=rngs)

        def __call__(self, x):
            y = self.perturb("hidden", self.linear(x))
            self.sow(nnx.Intermediate, "seen", y)
            return y

    assert set(runs_as_by_hand(session, lambda: Perturbed(nnx.Rngs(0)), an_input()).sown) == {"Intermediate"}


# -- the switch


@dataclasses.dataclass(frozen=True)
class Inner:
    deterministic: bool = True


@dataclasses.dataclass(frozen=True)
class Outer:
    inner: Inner = Inner()


class Switches(nnx.Module):
    train: bool = False

    def __init__(self, rngs: nnx.Rngs):
        self.config = Outer()
        self.is_training = False
        self.training = None
        self.dropout = nnx.Dropout(0.5, deterministic=True, rngs=rngs)
        self.norm = nnx.BatchNorm(4, use_running_average=True, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        x = self.norm(self.dropout(x))
        x = x + 1 if self.train else x
        x = x * 2 if self.is_training else x
        return self.dropout(x, deterministic=self.config.inner.deterministic)


def test_every_switch_is_set_on_a_copy_whatever_its_name_and_the_objects_own_stay(session):
    def hand(net):
        net.train, net.is_training, net.training, net.config = True, True, True, Outer(Inner(False))
        net.dropout.deterministic, net.norm.use_running_average = False, False

    run = runs_as_by_hand(Session(seed=0), lambda: Switches(nnx.Rngs(0)), an_input(), mode="train", hand=hand)
    assert run.changed == {"BatchStat": 3}
    assert run.switch == (
        "deterministic=False in 2 modules, is_training=True, train=True, training=True, use_running_average=False"
    )
    assert runs_as_by_hand(Session(seed=0), lambda: Switches(nnx.Rngs(0)), an_input()).changed == {}

    net = Switches(nnx.Rngs(0))
    parts = (net, net.dropout, net.norm)
    before = [dict(vars(part)) for part in parts]
    session.register("net", net)
    for mode in ("train", "eval"):
        session.apply("net", an_input(), mode=mode)
        for part, was in zip(parts, before, strict=True):
            assert list(vars(part)) == list(was)
            assert all(vars(part)[name] is value for name, value in was.items())


@pytest.mark.parametrize(
    ("mode", "eager", "error"),
    [("train", False, RuntimeError), ("train", True, KeyboardInterrupt), (None, False, KeyboardInterrupt)],
)
def test_a_run_that_fails_or_is_interrupted_leaves_every_bit_and_every_object(session, mode, eager, error):
    class Failing(Switches):
        def __call__(self, x):
            super().__call__(x)
            self.config = None
            self.dropout = None
            self.extra = nnx.Variable(jnp.ones(2))
            self.sow(nnx.Intermediate, "seen", x)
            raise error("no")

    net = Failing(nnx.Rngs(0))
    session.register("net", net)
    state = bits(nnx.state(net))
    parts = {path: id(part) for path, part in nnx.iter_graph(net)}
    attributes = {path: dict(vars(part)) for path, part in nnx.iter_graph(net) if isinstance(part, nnx.Pytree)}
    with pytest.raises(error, match="no"):
        session.apply("net", an_input(), mode=mode, eager=eager)
    assert session.runs == []
    assert bits(jax.random.key_data(session.root_key)) == bits(jax.random.key_data(jax.random.key(0)))
    assert bits(nnx.state(net)) == state
    assert {path: id(part) for path, part in nnx.iter_graph(net)} == parts
    for path, part in nnx.iter_graph(net):
        if isinstance(part, nnx.Pytree):
            assert list(vars(part)) == list(attributes[path])
            assert all(vars(part)[name] is value for name, value in attributes[path].items())
        if isinstance(part, nnx.Variable):
            assert not [name for name in part.get_metadata() if "flax_magics" in name]


# -- rngs in the call


class Taking(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.linear = nnx.Linear(4, 4, rngs=rngs)
        self.dropout = nnx.Dropout(0.5)

    def __call__(self, x: Any, *, rngs: nnx.Rngs | None = None) -> Any:
        x = self.linear(x) + jax.random.normal(rngs(), x.shape) + jax.random.normal(rngs.noise(), x.shape)
        return self.dropout(x, rngs=rngs)


def test_each_stream_that_is_asked_of_rngs_in_the_call_has_a_key_of_its_own(session):
    """NNX would take the key of `default` for `noise`, once there is one."""
    streams = ("params", "dropout", "default", "noise")
    run = runs_as_by_hand(session, lambda: Taking(nnx.Rngs(0)), an_input(), rngs=streams)
    assert run.used == {"default": ("(the model)",), "noise": ("(the model)",), "dropout": ("dropout",)}
    assert all(f"{stream}={stream}_key" in run.by_hand for stream in streams)


def test_streams_of_rngs_in_the_call_are_the_models_own_where_a_layer_would_ask_for_them(session):
    """The session's `rngs` have a `dropout` stream for every model; no report tells of one that it has no use for."""

    class Plain(nnx.Module):
        def __init__(self, rngs):
            self.linear, self.dropout = nnx.Linear(4, 4, rngs=rngs), nnx.Dropout(0.5)

        def __call__(self, x, rngs):
            return self.linear(x)

        def drop(self, x, rngs):
            return self.dropout(x, rngs=rngs)

    session.register("net", Plain(nnx.Rngs(0)))
    runs = [session.apply("net", an_input(), method=name, mode="eval") for name in ("__call__", "drop")]
    assert [run.idle for run in runs] == [(), ("dropout",)]
    assert [facts.keys_of(run) for run in runs] == [(), ("dropout → nobody, layers off",)]
    assert [sorted(run.keys) for run in runs] == [["dropout", "params"]] * 2


@pytest.mark.parametrize("streams", [{"default": 0}, {"params": 0, "dropout": 1}])
def test_nobody_is_told_of_the_stream_that_a_dropout_layer_holds_and_of_no_other(session, streams):
    class Keeping(nnx.Module):
        def __init__(self, rngs):
            self.linear, self.dropout = nnx.Linear(4, 4, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)
            self.rngs = rngs

        def __call__(self, x):
            return self.dropout(self.linear(x))

        def embed(self, x):
            return self.linear(x)

    tag = list(streams)[-1]
    session.register("net", Keeping(nnx.Rngs(**streams)))
    assert facts.keys_of(session.apply("net", an_input(), method="embed")) == ()
    runs = [session.apply("net", an_input(), mode=mode) for mode in ("train", "eval")]
    assert [facts.keys_of(run) for run in runs] == [(f"{tag} → dropout",), (f"{tag} → nobody, layers off",)]


def test_rngs_of_the_call_split_over_a_vmap(session):
    class Split(nnx.Module):
        def __init__(self, rngs):
            self.linear, self.dropout = nnx.Linear(4, 4, rngs=rngs), nnx.Dropout(0.5)

        def __call__(self, x, rngs):
            @nnx.split_rngs(splits=5)
            @nnx.vmap(in_axes=(None, 0, 0))
            def each(net, x, rngs):
                return net.dropout(net.linear(x), rngs=rngs)

            return each(self, x, rngs)

    run = runs_as_by_hand(session, lambda: Split(nnx.Rngs(0)), an_input(), rngs=("params", "dropout"))
    assert "dropout" in run.used


def test_a_sequential_hands_rngs_on_to_the_layers_that_take_some(session):
    def make():
        rngs = nnx.Rngs(0)
        return nnx.Sequential(nnx.Linear(4, 4, rngs=rngs), nnx.relu, nnx.BatchNorm(4, rngs=rngs), nnx.Dropout(0.5))

    if not hasattr(nnx, "List"):
        pytest.skip("in this version nnx.Sequential hands nothing on")
    run = runs_as_by_hand(session, make, an_input(), mode="train", rngs=("params", "dropout"))
    assert run.used == {"dropout": ("layers/3",)}


def test_a_layer_of_flax_that_holds_streams_uses_them(session):
    """Its `rngs` argument is there to override what it holds, which is the draw's already."""
    assert runs_as_by_hand(session, lambda: nnx.Dropout(0.5, rngs=nnx.Rngs(0)), an_input()).used == {
        "default": ("(the model)",)
    }


# -- caches and cells


def test_an_autoregressive_cache_goes_on_from_step_to_step(session):
    def make():
        net = nnx.MultiHeadAttention(num_heads=2, in_features=8, decode=True, rngs=nnx.Rngs(0))
        net.init_cache((2, 5, 8))
        return net

    x, net, other = a_sequence(8), make(), make()
    session.register("net", net)
    step = nnx.jit(lambda net, x: net(x))
    for i in range(5):
        run = session.apply("net", x[:, i : i + 1], mode="eval" if i == 3 else None)
        assert bits(run.output) == bits(step(other, x[:, i : i + 1]))
        assert bits(nnx.state(net)) == bits(nnx.state(other))
        assert run.notes == ()
    assert run.changed == {"Cache": 5}


def test_a_method_that_makes_the_cache_leaves_it_on_the_object(session):
    class Decoder(nnx.Module):
        def __init__(self, rngs):
            self.attention = nnx.MultiHeadAttention(num_heads=2, in_features=8, decode=False, rngs=rngs)

        def start(self, shape):
            self.attention.init_cache(shape)
            self.attention.decode = True

        def __call__(self, x):
            return self.attention(x)

    x, net, other = a_sequence(8), Decoder(nnx.Rngs(0)), Decoder(nnx.Rngs(0))
    session.register("net", net)
    session.apply("net", (2, 5, 8), method="start")
    other.start((2, 5, 8))
    for i in range(2):
        run = session.apply("net", x[:, i : i + 1])
        assert bits(run.output) == bits(nnx.jit(lambda net, x: net(x))(other, x[:, i : i + 1]))
        assert bits(nnx.state(net)) == bits(nnx.state(other))


@pytest.mark.parametrize("cell", [nnx.GRUCell, nnx.OptimizedLSTMCell])
def test_recurrent_cells(session, cell):
    def make():
        rngs = nnx.Rngs(params=0, carry=1)
        return Holding(lambda _: nnx.RNN(cell(4, 4, rngs=rngs), rngs=rngs, return_carry=True), lambda rnn, x: rnn(x))

    runs_as_by_hand(session, make, a_sequence())


# -- what a model holds


def test_whatever_a_module_may_hold(session):
    """Numbers and 64-bit arrays become JAX's own with the first run, as `nnx.jit` makes them."""
    run = runs_as_by_hand(session, lambda: kinds.Odd(nnx.Rngs(0)), an_input(), mode="train")
    assert run.changed == {"Array": 3, "BatchStat": 3, "Variable": 3}


def test_lists_dicts_and_layers_of_every_sort(session):
    class Many(nnx.Module):
        def __init__(self, rngs):
            self.list = kinds.List([nnx.Linear(4, 4, rngs=rngs), nnx.LoRALinear(4, 4, lora_rank=2, rngs=rngs)])
            self.dict = kinds.Dict(a=nnx.LoRA(4, 2, 4, rngs=rngs), b=nnx.Dropout(0.5, rngs=rngs, rng_collection="mask"))
            self.norms = nnx.Sequential(nnx.GroupNorm(4, 2, rngs=rngs), nnx.RMSNorm(4, rngs=rngs))
            self.wrapped = kinds.List([wrap(nnx.Linear(4, 4, rngs=rngs), rngs=rngs) for wrap in WRAPPERS])

        def __call__(self, x):
            for layer in self.list:
                x = layer(x)
            x = self.norms(self.dict["b"](self.dict["a"](x)))
            for wrap, layer in zip(WRAPPERS, self.wrapped, strict=True):
                x = layer(x, **({"update_stats": True} if wrap.__name__ == "SpectralNorm" else {}))
            return x

    run = runs_as_by_hand(session, lambda: Many(nnx.Rngs(0, mask=1)), an_input())
    assert run.used == {"mask": ("dict/b",)}


def test_a_function_in_the_place_of_a_layer(session):
    class Two(nnx.Module):
        def __init__(self, rngs):
            self.first, self.second = nnx.Linear(4, 4, rngs=rngs), nnx.Linear(4, 4, rngs=rngs)

        def __call__(self, x):
            return self.second(self.first(x))

    net = Two(nnx.Rngs(0))
    session.register("net", net)
    expected = nnx.jit(lambda net, x: net(x))(net.first, an_input())
    net.second = lambda x: x
    assert bits(session.apply("net", an_input()).output) == bits(expected)
    assert session.apply("net", an_input()).program == "reused"
    net.second = lambda x: x * 2
    assert bits(session.apply("net", an_input()).output) == bits(expected * 2)


def test_keys_in_variables_typed_and_legacy(session):
    runs_as_by_hand(session, kinds.Keyed, an_input())


def contents(net: Any) -> list[Any]:
    """What the variables hold, references read."""
    return [bits(part[...]) for _, part in nnx.iter_graph(net) if isinstance(part, nnx.Variable)]


def references(net: Any) -> list[int]:
    return [id(part.raw_value) for _, part in nnx.iter_graph(net) if isinstance(part, nnx.Variable)]


class Adds(Remembered):
    """Says whether it fails, and gets an attribute more with every run."""

    def __call__(self, x: Any, fails: bool = False) -> Any:
        setattr(self, f"mean_{len(vars(self))}", nnx.Variable(x.mean()))
        x = self.dropout(self.norm(x))
        if fails:
            raise RuntimeError("no")
        return x


@pytest.mark.parametrize(("cls", "eager"), [(Remembered, False), (Adds, False), (Adds, True)])
def test_references_keep_their_identity_and_hold_what_they_hold_by_hand(session, cls, eager):
    net, other = with_refs(cls(nnx.Rngs(0))), with_refs(cls(nnx.Rngs(0)))
    other.train()
    session.register("net", net)
    before = references(net)
    by_hand = (lambda net, x: net(x)) if eager else nnx.jit(lambda net, x: net(x))
    for draw in (1, 2):
        nnx.reseed(other, policy="match_shape", **keys_of(draw)("default"))
        output = by_hand(other, an_input())
        assert bits(session.apply("net", an_input(), mode="train", eager=eager).output) == bits(output)
        assert contents(net) == contents(other)
    assert [each for each in references(net) if each in before] == before
    if cls is Adds:
        held = contents(net)
        with pytest.raises(RuntimeError, match="no"):
            session.apply("net", an_input(), fails=True, mode="train", eager=eager)
        assert contents(net) == held


def test_references_in_the_call_are_refused(session):
    class Counts(nnx.Module):
        def __call__(self, x, metric):
            metric.update(values=x)

    session.register("net", Counts())
    with pytest.raises(FlaxMagicsError, match="an object in the call holds references, which a run would change"):
        session.apply("net", an_input(), with_refs(nnx.metrics.Average()))


@pytest.mark.parametrize("make", [jax.random.key, jax.random.PRNGKey], ids=["typed", "legacy"])
def test_keys_as_arguments(session, make):
    class Sampler(nnx.Module):
        def __call__(self, x, key):
            return x + jax.random.normal(key, x.shape)

    runs_as_by_hand(session, Sampler, an_input(), make(9))


def test_bfloat16(session):
    class Low(nnx.Module):
        def __init__(self, rngs):
            kind = {"dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16}
            self.linear, self.norm = nnx.Linear(4, 4, rngs=rngs, **kind), nnx.BatchNorm(4, rngs=rngs, **kind)

        def __call__(self, x):
            return self.norm(self.linear(x))

    run = runs_as_by_hand(session, lambda: Low(nnx.Rngs(0)), an_input().astype(jnp.bfloat16), mode="train")
    assert run.output.dtype == jnp.bfloat16


def test_sharding_metadata_stays_on_the_variables(session):
    init = nnx.with_partitioning(nnx.initializers.lecun_normal(), (None, "model"))

    class Parted(nnx.Module):
        def __init__(self, rngs):
            self.linear = nnx.Linear(4, 4, kernel_init=init, rngs=rngs)
            self.mean = nnx.BatchStat(jnp.zeros(4), written_by="hand")

        def __call__(self, x):
            self.mean[...] = x.mean(0)
            return self.linear(x)

    nets: list[Any] = []
    with (
        jax.set_mesh(jax.make_mesh((1, 1), ("data", "model")))
        if hasattr(nnx, "List")
        else jax.make_mesh((1,), ("model",))
    ):
        runs_as_by_hand(session, lambda: nets.append(Parted(nnx.Rngs(0))) or nets[-1], an_input())
    for of in (lambda net: net.linear.kernel, lambda net: net.mean):
        assert of(nets[0]).get_metadata() == of(nets[1]).get_metadata()
    assert nets[0].mean.get_metadata()["written_by"] == "hand"


# -- arguments and outputs


class OnGraphs(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.linear = nnx.Linear(4, 4, rngs=rngs)

    def __call__(self, graph: Any) -> Any:
        messages = self.linear(graph.edges) * graph.nodes[graph.senders]
        return {"graph": graph._replace(nodes=jax.ops.segment_sum(messages, graph.senders, 3), edges=None), "n": 3}

    def nothing(self) -> None:
        return None

    def parameters(self) -> Any:
        return nnx.state(self, nnx.Param), self.linear.kernel[...]


def test_graphs_and_other_trees_in_and_out_and_nothing_at_all(session):
    graph = Graph(jnp.ones((3, 4)), jnp.arange(16.0).reshape(4, 4), jnp.array([0, 1, 2, 0]))
    assert isinstance(runs_as_by_hand(session, lambda: OnGraphs(nnx.Rngs(0)), graph).output["graph"], Graph)
    assert runs_as_by_hand(Session(seed=0), lambda: OnGraphs(nnx.Rngs(0)), method="nothing").output is None
    runs_as_by_hand(Session(seed=0), lambda: OnGraphs(nnx.Rngs(0)), method="parameters")


def test_an_optimizer_and_a_metric_in_the_call_move_on_as_by_hand(session):
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.linear = nnx.Linear(4, 1, rngs=rngs)
            self.metric = nnx.MultiMetric(loss=nnx.metrics.Average("loss"))

        def step(self, x, optimizer, metric):
            loss, grads = nnx.value_and_grad(lambda linear: (linear(x) ** 2).mean())(self.linear)
            optimizer.update(self.linear, grads)
            metric.update(values=loss)
            self.metric.update(loss=loss)
            return loss

    net, other = Net(nnx.Rngs(0)), Net(nnx.Rngs(0))
    session.register("net", net)
    held = [nnx.Optimizer(each.linear, optax.adam(0.1), wrt=nnx.Param) for each in (net, other)]
    metrics = [nnx.metrics.Average(), nnx.metrics.Average()]
    for update in (1, 2, 3):
        run = session.apply("net", an_input(), held[0], metrics[0], method="step")
        step = nnx.jit(lambda net, *args: net.step(*args))
        assert bits(run.output) == bits(step(other, an_input(), held[1], metrics[1]))
        for ours, theirs in ((net, other), held, metrics):
            assert bits(nnx.state(ours)) == bits(nnx.state(theirs))
        assert run.changed == {"MetricState": update, "Param": update}
        assert run.notes == ()


# -- linen inside NNX, and NNX inside linen


@pytest.mark.parametrize("options", [{"train": False}, {"mutable": ["batch_stats"]}], ids=["eval", "train"])
def test_a_linen_module_inside_an_nnx_one(session, options):
    class Around(nnx.Module):
        def __init__(self, rngs):
            self.inner = nnx.bridge.ToNNX(kinds.OfLinen(), rngs=rngs)

        def __call__(self, x, options=None):
            return self.inner(x, **(options or {}))

    def make():
        net = Around(nnx.Rngs(params=0, dropout=1))
        nnx.bridge.lazy_init(net, an_input())
        return net

    runs_as_by_hand(session, make, an_input(), options)


@pytest.mark.parametrize(
    ("net", "used"),
    [
        (nnx.bridge.to_linen(kinds.OfNnx, 4), {"mask": ("(the model)",)}),
        (kinds.AroundNnx(), {"mask": ("inner",), "dropout": ("Dropout_0",)}),
    ],
    ids=["alone", "inside"],
)
def test_an_nnx_module_inside_a_linen_one_is_asked_for_streams_and_collections(session, net, used):
    """Flax itself would take a `default` of seed 0 for the stream, and drop the statistics, both in silence."""
    x, mutable = an_input(), ["batch_stats", "intermediates"]
    session.register("net", net)
    variables = net.init(keys_of(1)("params", "mask"), x)
    variables.pop("intermediates", None)
    step = jax.jit(lambda variables, x, keys: net.apply(variables, x, rngs=keys, mutable=mutable))
    for draw in (1, 2):
        run = session.apply("net", x)
        output, updates = step(variables, x, keys_of(draw)(*used))
        assert bits(run.output) == bits(output)
        assert bits(dict(run.sown)["intermediates"]) == bits(updates.pop("intermediates"))
        variables = {**variables, **updates}
        assert bits(dict(session.models["net"].variables)) == bits(variables)
        assert (run.used, run.changed) == (used, {"batch_stats": draw})


def test_a_module_of_shapes_is_refused_with_what_to_write(session):
    net = nnx.eval_shape(lambda: Noise(nnx.Rngs(params=0, noise=1)))
    with pytest.raises(FlaxMagicsError, match="`linear/bias` is a shape without values") as error:
        session.register("net", net)
    assert "form: nnx.update(…, …)" in str(error.value)
