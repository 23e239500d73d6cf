"""Every kind of linen model, each as small as it goes: the session's bits are those of plain Flax."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from by_hand import STATIC_ARGUMENTS, STATIC_CHANGES, apply_by_hand, bits, keys_of, notebook_x
from linen_kinds import Batch, Graph, GraphNet, Heads, Plain, Sampler, Settings, Sows, Takes

from flax_magics import FlaxMagicsError, Session
from flax_magics.compile import trace

pytestmark = pytest.mark.usefixtures("optimised")


def runs_as_by_hand(
    session: Session,
    module: Any,
    *args: Any,
    hand: Any = None,
    mode: str | None = None,
    streams: tuple[str, ...] = (),
    mutable: Any = False,
    init: dict[str, Any] | None = None,
    call: dict[str, Any] | None = None,
    **kwargs: Any,
) -> Any:
    """Applies `module` twice, and compares variables, output and updates of both runs with plain Flax.

    Args:
      hand: the module that a person would apply; `module` itself without it.
      streams: what a person would pass as `rngs`.
      mutable: what a person would make mutable.
      init, call: keyword arguments that only the person writes, for init and for apply.
    """
    session.register("net", module)
    hand = module if hand is None else hand
    init_kwargs = {**kwargs, **(init or {})}
    variables = module.init(keys_of(1)("params")["params"], *args, **init_kwargs)
    variables = {name: tree for name, tree in variables.items() if name != "intermediates"}
    run, result = None, None
    for draw in (1, 2):
        run = session.apply("net", *args, mode=mode, **kwargs)
        if draw == 1 or streams or mutable:  # otherwise by hand nothing has changed
            result = apply_by_hand(
                hand, variables, keys_of(draw)(*streams), *args, mutable=mutable, **{**kwargs, **(call or {})}
            )
        output, updates = result if mutable else (result, {})
        assert bits(run.output) == bits(output)
        sown = {name: tree for name, tree in updates.items() if name in run.sown}
        assert bits(dict(run.sown)) == bits(sown)
        variables = {**variables, **{name: tree for name, tree in updates.items() if name not in sown}}
        assert bits(dict(session.models["net"].variables)) == bits(variables)
        assert set(run.keys) == {"params", "dropout", *streams}
        assert {note.kind for note in run.notes} <= {"stream" if draw == 1 else "key again"}
    return run


# -- the switch


@dataclasses.dataclass(frozen=True)
class Inner:
    deterministic: bool = True
    rate: float = 0.5


@flax.struct.dataclass
class Outer:
    inner: Inner
    width: int = 4


class TwoDown(nn.Module):
    config: Outer

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(self.config.width)(x)
        return nn.Dropout(self.config.inner.rate, deterministic=self.config.inner.deterministic)(x)


def test_deterministic_on_a_config_two_levels_down_is_the_switch(session):
    net, hand = TwoDown(Outer(Inner())), TwoDown(Outer(Inner(deterministic=False)))
    run = runs_as_by_hand(session, net, notebook_x(), hand=hand, mode="train", streams=("dropout",))
    assert run.switch == "config.inner.deterministic=False"


# -- lifted transforms


class Noise(nn.Module):
    stream: str = "noise"

    @nn.compact
    def __call__(self, x, _=None):
        x = nn.Dense(x.shape[-1])(x)
        x = x + jax.random.uniform(self.make_rng(self.stream), x.shape)
        return x, jnp.sum(x)


class Layers(nn.Module):
    lift: Callable[..., Any]

    @nn.compact
    def __call__(self, x):
        x, _ = self.lift(Noise)(name="inside")(x, None)
        return nn.Dropout(0.5, deterministic=False)(x)


def scanned(cls):
    return nn.scan(cls, variable_axes={"params": 0}, split_rngs={"params": True, "noise": True}, length=3)


def mapped(cls):
    return nn.vmap(cls, variable_axes={"params": None}, split_rngs={"params": False, "noise": True}, in_axes=(0, None))


LIFTS = {
    "scan": scanned,
    "vmap": mapped,
    "remat": nn.remat,
    "jit": nn.jit,
    "remat of vmap in scan": lambda cls: scanned(nn.remat(mapped(cls), prevent_cse=False)),
}


@pytest.mark.parametrize("lift", LIFTS.values(), ids=LIFTS)
def test_a_stream_of_any_name_inside_a_lifted_transform(session, lift):
    run = runs_as_by_hand(session, Layers(lift), notebook_x(), streams=("noise", "dropout"))
    assert run.used == {"noise": ("inside",), "dropout": ("Dropout_0",)}


class Choices(nn.Module):
    how: str

    def setup(self):
        self.dense = nn.Dense(4)
        self.drop = nn.Dropout(0.5, deterministic=False)

    def __call__(self, x):
        def plain(mdl, x):
            return mdl.drop(mdl.dense(x))

        def noisy(mdl, x):
            return plain(mdl, x) + jax.random.uniform(mdl.make_rng("noise"), x.shape)

        if self.how == "cond":
            return nn.cond(x.sum() > 0, noisy, plain, self, x)
        if self.how == "switch":
            return nn.switch(jnp.int32(1), [plain, noisy, plain], self, x)
        if self.is_initializing():
            return noisy(self, x)
        _, x = nn.while_loop(
            lambda mdl, c: c[0] < 3,
            lambda mdl, c: (c[0] + 1, noisy(mdl, c[1])),
            self,
            (0, x),
            split_rngs={"noise": True, "dropout": True},
        )
        return x


class JittedOnce(nn.Module):
    @nn.jit
    @nn.compact
    def __call__(self, x):
        self.sow("intermediates", "in", x)
        return nn.Dropout(0.5, deterministic=False)(x) + jax.random.uniform(self.make_rng("noise"), x.shape)


class AroundJitted(nn.Module):
    n: int

    @nn.compact
    def __call__(self, x):
        return JittedOnce(name="inside")(x) * self.n


def test_what_jax_remembers_of_an_earlier_trace_hides_no_stream(session):
    """A jitted method is traced once for equal arguments: a trace that is answered from there would see nothing."""
    x = notebook_x()
    for draw, n in enumerate((2, 3), 1):
        net = AroundJitted(n)
        session.register(f"net_{n}", net)
        run = session.apply(f"net_{n}", x)
        output, sown = apply_by_hand(net, {}, keys_of(draw)("noise", "dropout"), x, mutable=["intermediates"])
        assert bits(run.output) == bits(output)
        assert bits(dict(run.sown)) == bits(sown)
        assert run.used == {"dropout": ("inside/Dropout_0",), "noise": ("inside",)}


@pytest.mark.parametrize("how", ["cond", "switch", "while_loop"])
def test_streams_inside_control_flow(session, how):
    run = runs_as_by_hand(session, Choices(how), notebook_x(), streams=("noise", "dropout"))
    assert set(run.used) == {"noise", "dropout"}


def test_a_stream_that_a_transform_keeps_out_is_one_message(session):
    net = nn.scan(Noise, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)()
    session.register("net", net)
    with pytest.raises(FlaxMagicsError, match="does not pass that stream on"):
        session.apply("net", notebook_x(), None)
    assert session.draws == 0


# -- variables


class SowsInScan(nn.Module):
    @nn.compact
    def __call__(self, x):
        deep = nn.scan(Sows, variable_axes={"params": 0, "intermediates": 0}, split_rngs={"params": True}, length=3)
        x, _ = deep()(x, None)
        self.sow("intermediates", "last", x)
        return x


@pytest.mark.parametrize("net", [Sows(), SowsInScan()], ids=["plain", "in scan"])
def test_sown_intermediates_are_handed_back_and_not_kept(session, net):
    run = runs_as_by_hand(session, net, notebook_x(), mutable=["intermediates"])
    assert "intermediates" not in session.models["net"].variables
    assert set(run.sown) == {"intermediates"}


class Sums(nn.Module):
    @nn.compact
    def __call__(self, x):
        self.sow("losses", "l2", jnp.sum(x**2), init_fn=lambda: 0.0, reduce_fn=lambda a, b: a + b)
        self.sow("losses", "l2", jnp.sum(x**2), init_fn=lambda: 0.0, reduce_fn=lambda a, b: a + b)
        return nn.Dense(4)(x)


def test_sow_with_a_reduce_function_starts_anew_in_each_run(session):
    x = notebook_x()
    session.register("net", Sums())
    for _ in range(2):
        run = session.apply("net", x)
        assert float(run.sown["losses"]["l2"]) == pytest.approx(2 * float(jnp.sum(x**2)))


def test_an_autoregressive_cache_goes_on_from_step_to_step(session):
    x = jax.random.normal(jax.random.key(7), (2, 5, 8))
    net = nn.MultiHeadDotProductAttention(num_heads=2, decode=True)
    step = jax.jit(partial(net.apply, mutable=["cache"]))
    session.register("net", net)
    session.init("net", x)
    variables = net.init(keys_of(1)("params")["params"], x)
    assert bits(dict(session.models["net"].variables)) == bits(variables)
    outputs = []
    for i in range(5):
        run = session.apply("net", x[:, i : i + 1], mode="eval" if i == 3 else None)
        output, updates = step(variables, x[:, i : i + 1])
        variables = {**variables, **updates}
        assert bits(run.output) == bits(output)
        assert run.notes == ()
        outputs.append(run.output)
    assert int(session.models["net"].variables["cache"]["cache_index"]) == 5
    whole = net.clone(decode=False).apply(
        {"params": variables["params"]}, x, mask=nn.make_causal_mask(jnp.ones((2, 5)))
    )
    np.testing.assert_allclose(jnp.concatenate(outputs, 1), whole, atol=1e-5)


class LoRA(nn.Module):
    rank: int = 2

    @nn.compact
    def __call__(self, x):
        frozen = self.variable("frozen", "kernel", nn.initializers.normal(), self.make_rng("params"), (4, 4))
        a = self.variable("lora", "a", nn.initializers.normal(), self.make_rng("params"), (4, self.rank))
        b = self.variable("lora", "b", jnp.zeros, (self.rank, 4))
        return x @ (frozen.value + a.value @ b.value)


def test_collections_of_the_users_own_that_a_run_only_reads(session):
    session.register("net", LoRA())
    x = notebook_x()
    run = session.apply("net", x)
    variables = LoRA().init(keys_of(1)("params")["params"], x)
    assert bits(dict(session.models["net"].variables)) == bits(variables)
    assert bits(run.output) == bits(jax.jit(LoRA().apply)(variables, x, rngs={"params": run.keys["params (folded)"]}))
    assert run.changed == {}


class Lora(nn.Module):
    @nn.compact
    def __call__(self, x):
        def make(init, shape):
            return init(self.make_rng("params"), shape)

        a = self.variable("lora", "a", make, nn.initializers.normal(), (4, 2))
        b = self.variable("lora", "b", make, nn.initializers.zeros, (2, 4))
        return nn.Dense(4)(x) + x @ a.value @ b.value


class Statistics(nn.Module):
    @nn.compact
    def __call__(self, x, train=True):
        norm = nn.BatchNorm(use_running_average=not train, axis_name="batch")
        return norm(nn.Dense(4)(x))


class Replicas(nn.Module):
    @nn.compact
    def __call__(self, x, train=True):
        axes = {"params": None, "batch_stats": None}
        lift = partial(nn.vmap, in_axes=(0, None), variable_axes=axes, split_rngs={"params": False}, axis_name="batch")
        return lift(Statistics)()(x, train)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_batch_norm_over_an_axis_of_nn_vmap(session, mode):
    train = mode == "train"
    runs_as_by_hand(
        session, Replicas(), notebook_x(), mode=mode, call={"train": train}, mutable=["batch_stats"] if train else False
    )


class Wrapped(nn.Module):
    norm: Any

    @nn.compact
    def __call__(self, x, train):
        x = self.norm(nn.Dense(4))(x, **({"update_stats": train} if self.norm is nn.SpectralNorm else {}))
        return nn.Dense(4)(x)


@pytest.mark.parametrize(("norm", "mode"), [(nn.SpectralNorm, "train"), (nn.WeightNorm, "eval")])
def test_normalised_weights(session, norm, mode):
    mutable, call = ["batch_stats"] if norm is nn.SpectralNorm else False, {"train": mode == "train"}
    runs_as_by_hand(session, Wrapped(norm), notebook_x(), mode=mode, init={"train": False}, call=call, mutable=mutable)


def test_partitioned_metadata_stays_on_the_variables(session):
    init = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "model"))
    runs_as_by_hand(session, nn.Dense(4, kernel_init=init), notebook_x())
    kernel = session.models["net"].variables["params"]["kernel"]
    assert isinstance(kernel, nn.Partitioned)
    assert kernel.names == (None, "model")


def test_logically_partitioned_metadata_inside_scan(session):
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            init = nn.with_logical_partitioning(nn.initializers.lecun_normal(), ("embed", "mlp"))
            return nn.Dense(4, kernel_init=init)(x), None

    lift = partial(nn.scan, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
    runs_as_by_hand(session, lift(Block, metadata_params={nn.PARTITION_NAME: "layers"})(), notebook_x(), None)


# -- setup, compact, methods


class Both(nn.Module):
    def setup(self):
        self.encoder = nn.Sequential([nn.Dense(4), nn.relu, nn.Dense(4)])
        self.decoder = nn.Dense(4)

    def __call__(self, x):
        return self.decoder(self.encoder(x))

    def encode(self, x):
        return self.encoder(x)

    def decode(self, z):
        return self.decoder(z)


def test_setup_with_methods(session):
    runs_as_by_hand(session, Both(), notebook_x())
    variables = session.models["net"].variables
    x = notebook_x()
    z = session.apply("net", x, method="encode").output
    assert bits(z) == bits(apply_by_hand(Both(), variables, {}, x, method="encode"))
    assert bits(session.apply("net", z, method="decoder").output) == bits(
        apply_by_hand(Both(), variables, {}, z, method="decode")
    )


def test_several_methods_with_variables_of_their_own(session):
    x = notebook_x()
    session.register("net", Heads())
    session.apply("net", x)
    body = session.models["net"].variables
    run = session.apply("net", x, method="head")
    assert run.made is not None
    assert run.made.added
    variables = session.models["net"].variables
    assert bits(variables["params"]["body"]) == bits(body["params"]["body"])
    assert bits(run.output) == bits(apply_by_hand(Heads(), variables, {}, x, method="head"))


class Shared(nn.Module):
    inner: nn.Module

    def setup(self):
        self.same = self.inner
        self.other = Names(self.inner)

    def __call__(self, x):
        return self.other(self.same(x))


class Names(nn.Module):
    layer: nn.Module

    def __call__(self, x):
        return self.layer(x)


def test_a_shared_submodule_has_one_set_of_variables(session):
    runs_as_by_hand(session, Shared(nn.Dense(4)), notebook_x())
    assert len(jax.tree_util.tree_leaves(session.models["net"].variables)) == 2


class SharedScope(nn.Module):
    def setup(self):
        self.base = nn.Dense(4)
        nn.share_scope(self, self.base)
        self.bonus = self.param("bonus", nn.initializers.normal(), (4,))

    def __call__(self, x):
        return self.base(x) + self.bonus


def test_share_scope(session):
    runs_as_by_hand(session, SharedScope(), notebook_x())
    assert set(session.models["net"].variables["params"]) == {"bias", "bonus", "kernel"}


# -- arguments


def test_a_graph_in_and_a_graph_out(session):
    graph = Graph(jnp.ones((3, 4)), jnp.arange(16.0).reshape(4, 4), jnp.array([0, 1, 2, 0]))
    run = runs_as_by_hand(session, GraphNet(), graph)
    assert isinstance(run.output, Graph)


@dataclasses.dataclass
class Loose:
    width: int = 4


@pytest.mark.parametrize("settings", [Settings(), Loose()], ids=["frozen", "loose"])
def test_dataclasses_as_arguments(session, settings):
    run = runs_as_by_hand(session, Takes(), Batch(notebook_x(), 2.0), settings)
    assert run.program == "reused"
    again = session.apply("net", Batch(notebook_x(), 3.0), dataclasses.replace(settings))
    assert again.program == "reused"


@pytest.mark.parametrize(("change", "reason"), STATIC_CHANGES)
def test_static_arguments_compile_again_and_say_so(session, change, reason):
    x, changed = notebook_x(), {**STATIC_ARGUMENTS, **change}
    session.register("net", Plain())
    session.apply("net", x, **STATIC_ARGUMENTS)
    assert session.apply("net", x, **STATIC_ARGUMENTS).program == "reused"
    run = session.apply("net", x, **changed)
    assert run.program == "compiled"
    assert reason in run.reason
    by_hand = jax.jit(lambda v, x: Plain().apply(v, x, **changed))(session.models["net"].variables, x)
    assert bits(run.output) == bits(by_hand)
    assert session.apply("net", x, **changed).program == "reused"


def test_bfloat16(session):
    net = nn.Sequential([nn.Dense(4, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16), nn.LayerNorm(dtype=jnp.bfloat16)])
    run = runs_as_by_hand(session, net, notebook_x().astype(jnp.bfloat16))
    assert run.output.dtype == jnp.bfloat16


class NoInputs(nn.Module):
    @nn.compact
    def __call__(self):
        return self.param("w", nn.initializers.normal(), (3,))


class NoParameters(nn.Module):
    def __call__(self, x):
        return jnp.tanh(x)


class Nothing(nn.Module):
    def __call__(self):
        return None


class ManyOutputs(nn.Module):
    @nn.compact
    def __call__(self, x):
        return {"a": nn.Dense(4)(x), "b": (None, [x, Batch(x)]), "n": 3}


@pytest.mark.parametrize(("net", "args"), [(NoParameters(), (notebook_x(),)), (Nothing(), ())])
def test_models_with_no_parameters_and_no_output(session, net, args):
    run = runs_as_by_hand(session, net, *args)
    assert session.models["net"].variables == {}
    assert (run.output is None) is isinstance(net, Nothing)


# -- the library's own layers


class Recurrent(nn.Module):
    @nn.compact
    def __call__(self, x):
        cell = nn.OptimizedLSTMCell(4, carry_init=nn.initializers.normal())
        carry = cell.initialize_carry(self.make_rng("carry"), x[:, 0].shape)
        return nn.RNN(cell, return_carry=True)(x, initial_carry=carry)


class Attends(nn.Module):
    @nn.compact
    def __call__(self, x, mask=None):
        embed = nn.Embed(10, 4)
        return embed.attend(nn.MultiHeadDotProductAttention(2)(embed(x), mask=mask))


class Perturbed(nn.Module):
    @nn.compact
    def __call__(self, x):
        return self.perturb("hidden", nn.Dense(4)(x))


TOKENS = jnp.array([[1, 2, 3]])
KINDS: dict[str, tuple[Callable[[], nn.Module], tuple[Any, ...], dict[str, Any]]] = {
    "collections made by a function at init alone": (Lora, (notebook_x(),), {}),
    "a typed key as argument": (Sampler, (notebook_x(), jax.random.key(9)), {}),
    "a legacy key as argument": (Sampler, (notebook_x(), jax.random.PRNGKey(9)), {}),
    "no inputs": (NoInputs, (), {}),
    "outputs that are pytrees": (ManyOutputs, (notebook_x(),), {}),
    "an LSTM whose carry is from a stream": (Recurrent, (notebook_x(),), {"streams": ("carry",)}),
    "a GRU that makes its own carry": (lambda: nn.RNN(nn.GRUCell(4)), (notebook_x(),), {}),
    "bidirectional and embedding": (
        lambda: nn.Sequential([nn.Embed(10, 4), nn.Bidirectional(nn.RNN(nn.GRUCell(4)), nn.RNN(nn.GRUCell(4)))]),
        (TOKENS,),
        {},
    ),
    "an embedding shared with the output, and a mask": (Attends, (TOKENS,), {"mask": nn.make_causal_mask(TOKENS)}),
    "perturbations": (Perturbed, (notebook_x(),), {}),
}


@pytest.mark.parametrize(("make", "args", "options"), KINDS.values(), ids=KINDS)
def test_a_small_model_of_every_other_kind(session, make, args, options):
    runs_as_by_hand(session, make(), *args, **options)


# -- what a first run needs


class AllLayers(nn.Module):
    @nn.compact
    def __call__(self, x: Any, train: bool = True) -> Any:
        x = nn.BatchNorm(use_running_average=not train)(nn.Dense(3)(x))
        x = nn.Dropout(0.5, deterministic=not train)(x)
        return x + jax.random.normal(self.make_rng("noise"), x.shape)


@pytest.mark.parametrize("mode", ["train", "eval", None])
def test_what_the_init_saw_spares_a_first_run_the_second_trace(session, monkeypatch, mode):
    traces, named = [], trace._named
    monkeypatch.setattr(trace, "_named", lambda *args: traces.append(args) or named(*args))
    session.register("net", AllLayers())
    run = session.apply("net", notebook_x(), mode=mode)
    drops = () if mode == "eval" else ("dropout",)
    assert set(run.used) == {*drops, "noise"}
    # As written, nobody can tell from the init that the batch norm writes.
    assert len(traces) == (2 if mode is None else 1)


class Fewer(nn.Module):
    """Its init calls a dropout layer, and a run in train mode does not."""

    @nn.compact
    def __call__(self, x: Any, train: bool = False) -> Any:
        x = nn.Dense(3)(x)
        return x * (2 if self.has_rng("noise") else 3) if train else nn.Dropout(0.5, (), True, "noise")(x)


def test_a_guess_of_too_much_is_corrected(session):
    session.register("net", Fewer())
    run = session.apply("net", notebook_x(), mode="train")
    assert run.used == {}
    variables = session.models["net"].variables
    assert bits(run.output) == bits(apply_by_hand(Fewer(), variables, {}, notebook_x(), train=True))
