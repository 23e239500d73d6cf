"""A loss and its gradients against the same by hand, bit for bit; what of the session moves; what a loss must be."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from by_hand import bits, keys_of
from flax import nnx
from nnx_kinds import NormedMLP
from sessions import session_of

import flax_magics
from flax_magics import FlaxMagicsError, Session
from flax_magics.report.facts import scalars_of
from flax_magics.training.loss import Gradients
from flax_magics.training.nets import is_frozen

pytestmark = pytest.mark.usefixtures("optimised")

BATCH = {"x": jax.random.normal(jax.random.key(5), (4, 6)), "y": jnp.array([0, 1, 2, 1])}


def test_a_metric_may_be_called_like_the_loss_and_has_to_be_called_something():
    def of_name(name: str) -> Any:
        return lambda net, batch: (net(batch["x"]).sum() * 0 + 2.0, {name: 3.0})

    session = Session()
    session.register("net", nn.Dense(3))
    run = session.grad(of_name("loss"), "net", BATCH)
    assert repr(run.output) == "<Gradients: loss 2, loss 3>"
    assert scalars_of(run) == ("loss 2", "loss 3")
    with pytest.raises(FlaxMagicsError, match="returns a metric without a name, and metrics are a dict of scalars"):
        session.grad(of_name(""), "net", BATCH)


def cross_entropy(logits: Any, labels: Any) -> Any:
    return -jax.nn.log_softmax(logits)[jnp.arange(len(labels)), labels].mean()


class Switched(nn.Module):
    """BatchNorm and dropout, switched by an argument of the call."""

    @nn.compact
    def __call__(self, x: Any, train: bool = False) -> Any:
        x = nn.BatchNorm(use_running_average=not train)(nn.Dense(8)(x))
        return nn.Dense(3)(nn.Dropout(0.5, deterministic=not train)(nn.relu(x)))

    def embed(self, x: Any) -> Any:
        return x


class Fielded(nn.Module):
    """Dropout that is switched by a field, and a stream of its own."""

    training: bool = False

    @nn.compact
    def __call__(self, x: Any) -> Any:
        x = x + jax.random.normal(self.make_rng("noise"), x.shape)
        return nn.Dense(3)(nn.Dropout(0.5, deterministic=not self.training)(nn.Dense(8)(x)))


class TwoMethods(nn.Module):
    def setup(self) -> None:
        self.inner = nn.Dense(6)
        self.norm = nn.BatchNorm(use_running_average=False)

    def encode(self, x: Any) -> Any:
        return self.norm(self.inner(x))

    def decode(self, z: Any) -> Any:
        return z @ self.inner.variables["params"]["kernel"].T


def switched_loss(net: Any, batch: Any, train: bool) -> Any:
    logits = net(batch["x"], train=train)
    return cross_entropy(logits, batch["y"]), {"accuracy": (logits.argmax(-1) == batch["y"]).mean()}


def plain_loss(net: Any, batch: Any) -> Any:
    return cross_entropy(net(batch["x"]), batch["y"])


def many_calls(net: Any, batch: Any, weight: Any, *, train: bool) -> Any:
    first, second = net(batch["x"], train=train), net(2 * batch["x"], train=train)
    return weight * ((first - second) ** 2).mean()


def autoencoder(net: Any, batch: Any) -> Any:
    return ((net.decode(net.encode(batch["x"])) - batch["x"]) ** 2).mean(), {"size": batch["x"].size}


LINEN = {
    "an argument switches, metrics": (Switched(), {}, switched_loss, ({"batch": BATCH},), ["batch_stats"], ["dropout"]),
    "a field switches, a stream of its own": (Fielded(), {"training": True}, plain_loss, (), [], ["dropout", "noise"]),
    "several calls, further arguments": (Switched(), {}, many_calls, (0.5,), ["batch_stats"], ["dropout"]),
    "methods, and variables that the loss reads": (TwoMethods(), {}, autoencoder, (), ["batch_stats"], []),
}


@pytest.mark.parametrize("case", LINEN)
def test_of_linen_it_is_value_and_grad_over_apply_by_hand(case):
    net, fields, loss, more, mutable, streams = LINEN[case]
    args = (BATCH, *(one for one in more if not isinstance(one, dict)))
    switch = {"train": True} if loss in (switched_loss, many_calls) else {}
    session = session_of(net)
    gradients = session.grad(loss, "net", *args).output

    keys = keys_of(1)("params", *streams)
    first = dict.fromkeys(switch, False)
    variables = nn.init(loss, net)(keys.pop("params"), *args, **first)
    assert bits(session.models["net"].variables) == bits(variables)

    @jax.jit
    def by_hand(variables: Any, keys: Any, args: Any) -> Any:
        def loss_of(params: Any) -> Any:
            applied = nn.apply(loss, net.clone(**fields), mutable=mutable)
            output, updates = applied({**variables, "params": params}, *args, rngs=keys, **switch)
            value, metrics = output if isinstance(output, tuple) else (output, None)
            return value, (metrics, dict(updates))

        return jax.value_and_grad(loss_of, has_aux=True)(variables["params"])

    (value, (metrics, updates)), grads = by_hand(variables, keys, args)
    assert bits(gradients.loss) == bits(value)
    assert bits(gradients.metrics) == bits(metrics)
    assert bits(gradients.grads) == bits(grads)
    assert bits(gradients.updates) == bits(updates)
    assert jax.tree_util.tree_structure(gradients.grads) == jax.tree_util.tree_structure(variables["params"])


@pytest.mark.parametrize("frozen", [(), ("first",), ("*/bias", "norm")])
def test_of_nnx_it_is_nnx_value_and_grad(frozen):
    net, same = NormedMLP(nnx.Rngs(0)), NormedMLP(nnx.Rngs(0))

    def loss(net: Any, batch: Any) -> Any:
        logits = net(batch["x"])
        return cross_entropy(logits, batch["y"]), {"accuracy": (logits.argmax(-1) == batch["y"]).mean()}

    before = bits(nnx.state(net))
    gradients = session_of(net).grad(loss, "net", BATCH, freeze=frozen).output
    assert bits(nnx.state(net)) == before

    same.train()
    nnx.reseed(same, policy="match_shape", **keys_of(1)("default"))

    def has_gradient(path: Any, value: Any) -> bool:
        return isinstance(value, nnx.Param) and not is_frozen("/".join(map(str, path)), frozen)

    of = nnx.DiffState(0, has_gradient)
    (value, metrics), grads = nnx.jit(nnx.value_and_grad(loss, argnums=of, has_aux=True))(same, BATCH)
    assert bits(gradients.loss) == bits(value)
    assert bits(gradients.metrics) == bits(metrics)
    assert bits(gradients.grads) == bits(grads)
    assert bits(gradients.updates) == bits(nnx.state(same, nnx.BatchStat))
    assert jax.tree_util.tree_structure(gradients.grads) == jax.tree_util.tree_structure(grads)


def test_an_nnx_type_is_frozen_by_its_name():
    class Scale(nnx.Param):
        pass

    class Net(nnx.Module):
        def __init__(self) -> None:
            self.weight, self.scale = nnx.Param(jnp.arange(6.0)), Scale(jnp.ones(()))

        def __call__(self, x: Any) -> Any:
            return (x @ self.weight) * self.scale

    session = session_of(Net())
    both = session.grad(lambda net, x: net(x).sum(), "net", BATCH["x"]).output.grads
    assert [path for path, _ in nnx.to_flat_state(both)] == [("scale",), ("weight",)]
    alone = session.grad(lambda net, x: net(x).sum(), "net", BATCH["x"], freeze="Scale").output.grads
    assert [path for path, _ in nnx.to_flat_state(alone)] == [("weight",)]


def test_frozen_parameters_are_constants_of_the_same_gradient():
    session = session_of(Switched())
    whole = session.grad(switched_loss, "net", BATCH, mode="eval").output
    part = session.grad(switched_loss, "net", BATCH, mode="eval", freeze=["Dense_0", "*/bias"]).output
    assert jax.tree_util.tree_map(jnp.shape, part.grads) == {
        "BatchNorm_0": {"scale": (8,)},
        "Dense_1": {"kernel": (8, 3)},
    }
    assert bits(part.grads["Dense_1"]["kernel"]) == bits(whole.grads["Dense_1"]["kernel"])
    assert bits(part.loss) == bits(whole.loss)


def test_nothing_of_the_session_moves_but_the_draw():
    session = session_of(Switched())
    session.init("net", BATCH["x"])
    before = bits(session.models["net"].variables)
    first = session.grad(switched_loss, "net", BATCH)
    # It goes on with the draw of the init, as an apply does.
    assert (first.draw, session.draws) == (1, 1)
    assert bits(first.keys["dropout"]) == bits(keys_of(1)("dropout")["dropout"])
    second = session.grad(switched_loss, "net", BATCH)
    assert (second.draw, session.draws, second.program) == (2, 2, "reused")
    assert bits(session.models["net"].variables) == before
    assert session.models["net"].updates == {}
    assert second.dropped == ("batch_stats",)
    after = session.apply("net", BATCH["x"], mode="eval")
    assert bits(after.output) == bits(Switched().apply(session.models["net"].variables, BATCH["x"]))


def test_a_failed_loss_has_changed_nothing():
    session = session_of(Switched())

    def loss(net: Any, batch: Any) -> Any:
        raise ValueError("of the user's own")

    with pytest.raises(ValueError, match="of the user's own"):
        session.grad(loss, "net", BATCH)
    assert (session.draws, session.runs, session.models["net"].variables) == (0, [], None)


def test_a_run_of_gradients_is_replayed():
    session = session_of(Switched())
    run = session.grad(switched_loss, "net", BATCH)
    replayed = session.replay(1)
    assert (replayed.command, replayed.agreement.identical, replayed.program) == ("grad", True, "reused")
    session.programs.by_call.clear()
    session.programs.by_text.clear()
    assert run.digest is not None
    del run
    assert session.replay(1).agreement.identical is True


def test_a_replay_of_an_nnx_loss_makes_its_program_anew():
    session = session_of(NormedMLP(nnx.Rngs(0)))
    run = session.grad(plain_loss, "net", BATCH, freeze="first")
    session.apply("net", BATCH["x"], mode="train")  # the statistics move on
    for cache in (session.programs.by_call, session.programs.by_text, session.programs.by_equations):
        cache.clear()
    replayed = session.replay(run)
    assert (replayed.agreement.identical, replayed.program) == (True, "compiled")


def test_a_file_knows_a_run_of_gradients(tmp_path):
    session = session_of(Switched())
    run = session.grad(switched_loss, "net", BATCH)
    session.save(tmp_path / "session.safetensors")
    loaded = session_of(Switched())
    loaded.load(tmp_path / "session.safetensors")
    (there,) = loaded.runs
    assert (there.command, there.call, there.digest, there.dropped) == ("grad", run.call, run.digest, ("batch_stats",))
    assert bits(loaded.models["net"].variables) == bits(session.models["net"].variables)
    assert str(loaded.history()).splitlines()[2].split()[:4] == ["1", "grad", "net", "train"]
    with pytest.raises(FlaxMagicsError, match="it ran in the session that was saved") as raised:
        loaded.replay(1)
    assert raised.value.form is None


def test_after_an_edit_of_the_net_variables_that_a_loss_made_stay():
    class Net(nn.Module):
        scale: float = 1.0

        @nn.compact
        def __call__(self, x: Any) -> Any:
            return self.scale * nn.Dense(3)(x)

    session = session_of(Net())
    session.grad(plain_loss, "net", BATCH)
    before = bits(session.models["net"].variables)
    session.register("net", Net(2.0))
    assert bits(session.models["net"].variables) == before
    session.grad(plain_loss, "net", BATCH)


def test_a_fresh_nnx_module_is_built_again_by_its_first_loss(notebook):
    notebook("from flax import nnx")
    notebook(
        "%%flaxmodel net = Net()\nclass Net(nnx.Module):\n  def __init__(self, rngs):\n"
        "    self.a = nnx.Linear(6, 3, rngs=rngs)\n  def __call__(self, x):\n    return self.a(x)"
    )
    notebook("def loss(net, x): return net(x).sum()\nimport jax\nx = jax.numpy.ones((2, 6))")
    session = flax_magics.session()
    built = bits(session.models["net"].variables)
    session.assign("net", jax.tree_util.tree_map(jnp.zeros_like, session.models["net"].variables))
    notebook("%flax_key --seed 0 --fresh\n%flax_grad loss(net, x)")
    assert bits(session.models["net"].variables) == built


def test_gradients_are_a_pytree_with_named_parts():
    gradients = Gradients(jnp.ones(()), {"accuracy": jnp.zeros(())}, {"kernel": jnp.ones(2)}, {})
    doubled = jax.tree_util.tree_map(lambda leaf: 2 * leaf, gradients)
    assert (float(doubled.loss), doubled.grads["kernel"].tolist()) == (2.0, [2.0, 2.0])
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_flatten_with_path(gradients)[0]]
    assert paths == ["['grads']['kernel']", "['loss']", "['metrics']['accuracy']"]
    assert repr(gradients) == "<Gradients: loss 1, accuracy 0>"


def refused(loss: Any, *args: Any, net: Any = None, **options: Any) -> str:
    session = session_of(Switched() if net is None else net)
    with pytest.raises(FlaxMagicsError) as raised:
        session.grad(loss, "net", *args, **options)
    assert (session.draws, session.runs) == (0, [])
    return str(raised.value)


TEACHER = NormedMLP(nnx.Rngs(1))


def distilled(net: Any, batch: Any) -> Any:
    return ((net(batch["x"]) - TEACHER(batch["x"])) ** 2).mean()


def inside_checkpoint(net: Any, batch: Any, train: bool) -> Any:
    return jax.checkpoint(lambda x: net(x, train=train))(batch["x"]).mean()


def inside_grad(net: Any, batch: Any, train: bool) -> Any:
    return jax.grad(lambda x: net(x, train=train).sum())(batch["x"]).mean()


def inside_nnx(net: Any, batch: Any) -> Any:
    return jax.grad(lambda x: net(x).sum())(batch["x"]).mean()


TRANSFORMED = (
    "`{}` calls the net inside a transform of JAX's own (jax.grad, jax.checkpoint, jax.vmap, …), which knows nothing of its"
    " variables and keys: what the net draws or writes there would be lost. Flax's own transforms in the model do.\n"
    "  in your model: {}"
)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (
            lambda net, batch: net(batch["x"]),
            "`loss` returns float32[4,3] as its loss, and a loss is one floating-point number: it may return that alone,"
            " or with a dict of metrics beside it.\n  in your loss: return ….mean()",
        ),
        (
            lambda net, batch: (net(batch["x"]).mean(), 1.0),
            "`loss` returns a float beside the loss, and metrics are a dict of scalars: one number to a name.\n"
            "  in your loss: return loss, {'accuracy': (logits.argmax(-1) == labels).mean()}",
        ),
        (
            lambda net, batch: (net(batch["x"]).mean(), {"logits": net(batch["x"])}),
            "`loss` returns float32[4,3] as `logits`, and metrics are a dict of scalars: one number to a name.\n"
            "  in your loss: return loss, {'accuracy': (logits.argmax(-1) == labels).mean()}",
        ),
        (
            lambda net: net(BATCH["x"]).mean(),
            "`loss` does not fit the call: too many positional arguments.\n  it takes: loss(net)",
        ),
        (
            "loss",
            "`loss` is a str, and a loss is a function that takes the model first.\n"
            "  form: def loss(net, batch):\n          …\n          return loss",
        ),
        (inside_checkpoint, TRANSFORMED.format("inside_checkpoint", "nn.remat(Block)(…)")),
        (inside_grad, TRANSFORMED.format("inside_grad", "nn.remat(Block)(…)")),
    ],
)
def test_what_a_loss_must_be(loss, message):
    session = session_of(Switched())
    session.init("net", BATCH["x"])
    draws, runs = session.draws, len(session.runs)
    with pytest.raises(FlaxMagicsError) as raised:
        session.grad(loss, "net", BATCH)
    assert str(raised.value) == message
    assert (session.draws, len(session.runs)) == (draws, runs)


def test_a_loss_in_a_transform_does_not_initialise():
    assert refused(inside_checkpoint, BATCH) == (
        "`inside_checkpoint` cannot initialise the net: it calls it inside a transform of JAX's own (jax.checkpoint,"
        " jax.grad, …), out of which no new variables come. Initialise it by a call of its own before.\n"
        "  form: %flax_init net(…)"
    )


def test_a_loss_is_not_jitted():
    assert refused(jax.jit(plain_loss), BATCH) == (
        "`plain_loss` is jitted, or wrapped by another transform: what the net draws and writes inside would be lost,"
        " and the whole is compiled in any case.\n  form: %flax_grad plain_loss.__wrapped__(net, …)"
    )


@pytest.mark.parametrize("transform", [jax.grad, jax.value_and_grad])
def test_a_loss_takes_no_gradients_by_itself(transform):
    text = "`plain_loss` takes gradients by itself, and %flax_grad takes those of the loss that is in it."
    assert refused(transform(plain_loss), BATCH) == f"{text}\n  form: %flax_grad plain_loss.__wrapped__(net, …)"
    assert refused(getattr(nnx, transform.__name__)(plain_loss), BATCH) == text.replace("plain_loss", "grad_wrapper")


def test_an_nnx_module_is_passed_and_not_closed_over():
    assert refused(distilled, BATCH, net=NormedMLP(nnx.Rngs(0))) == (
        "`distilled` reads `TEACHER`, an NNX module, from outside: it would be fixed in the program as it is now. The net is"
        " the first argument, and another module is passed beside it.\n"
        "  form: def distilled(net, batch, TEACHER):\n          …\n        %flax_grad distilled(net, …, TEACHER)"
    )
    assert refused(inside_nnx, BATCH, net=NormedMLP(nnx.Rngs(0))) == TRANSFORMED.format("inside_nnx", "nnx.remat(…)")


def test_another_net_in_the_call_is_a_constant():
    teacher, session = NormedMLP(nnx.Rngs(1)), Session(seed=0)
    session.register_all({"net": NormedMLP(nnx.Rngs(0)), "teacher": teacher})
    before = bits(nnx.state(teacher))
    run = session.grad(lambda net, x, teacher: ((net(x) - teacher(x)) ** 2).mean(), "net", BATCH["x"], teacher)
    assert [note.text for note in run.notes] == [
        "`teacher` is read as a constant: it gets no gradient, and keeps what it had"
    ]
    assert bits(nnx.state(teacher)) == before


def test_another_linen_net_is_bound_to_its_variables():
    session = Session(seed=0)
    session.register_all({"net": Fielded(), "teacher": nn.Dense(3)})
    variables = session.init("teacher", BATCH["x"])
    teacher = session.models["teacher"].module
    run = session.grad(lambda net, x, other: ((net(x) - other(x)) ** 2).mean(), "net", BATCH["x"], teacher, mode="eval")
    assert [note.kind for note in run.notes if note.kind == "constant"] == ["constant"]
    keys = keys_of(2)("noise")

    @jax.jit
    def by_hand(own: Any, others: Any, keys: Any, x: Any) -> Any:
        return ((Fielded().apply(own, x, rngs=keys) - nn.Dense(3).apply(others, x)) ** 2).mean()

    loss = by_hand(session.models["net"].variables, variables, keys, BATCH["x"])
    assert np.isclose(float(run.output.loss), float(loss), rtol=1e-6)


def test_every_parameter_frozen_leaves_nothing_to_take():
    assert refused(switched_loss, BATCH, freeze="*") == (
        "there is no parameter of the net to take gradients by: all of them are frozen."
    )


def test_sharp_bits_of_a_loss():
    session = session_of(Switched())

    def forgets(net: Any, batch: Any) -> Any:
        return plain_loss(net, batch)

    (note,) = session.grad(forgets, "net", BATCH).notes
    assert (note.kind, note.text) == (
        "switch",
        'Dropout_0 is off and BatchNorm_0 is using running averages in training: `plain_loss` calls `net(batch["x"])`'
        " without `train`",
    )
    assert note.advice == [("in your loss: ", 'def plain_loss(net, batch, train):\n  … net(batch["x"], train=train)')]
    (note,) = session.grad(switched_loss, "net", BATCH, freeze=["Dens_0"]).notes
    assert (note.kind, note.text) == ("freeze", "--freeze Dens_0 matches no parameter of net: nothing is frozen by it")
    assert note.write == "%flax_grad --freeze Dense_0 switched_loss(net, …)" or note.form is not None


def test_a_switch_that_is_written_in_the_call_stands():
    session = session_of(Switched())
    run = session.grad(switched_loss, "net", BATCH, train=False)
    assert (run.mode, run.switch, run.dropped) == ("eval", "train=False", ())
    assert bits(run.output.loss) == bits(session.grad(switched_loss, "net", BATCH, mode="eval").output.loss)


def test_a_field_is_switched_although_the_loss_has_a_parameter_of_its_name():
    class OwnField(nn.Module):
        train: bool = False

        @nn.compact
        def __call__(self, x: Any) -> Any:
            return nn.Dropout(0.5, deterministic=not self.train)(nn.Dense(3)(x))

    run = session_of(OwnField()).grad(lambda net, x, train: net(x).mean(), "net", BATCH["x"])
    assert (run.mode, list(run.used), run.notes) == ("train", ["dropout"], ())


def test_a_loss_may_take_any_arguments():
    def loss(*args: Any, **kwargs: Any) -> Any:
        net, x = args
        return (net(x) * kwargs["scale"]).mean()

    run = session_of(nn.Dense(3)).grad(loss, "net", BATCH["x"], scale=2.0)
    assert run.output.grads["kernel"].shape == (6, 3)


def test_a_mode_is_train_or_eval():
    assert refused(plain_loss, BATCH, mode="test") == "`mode` is 'train' or 'eval', not 'test'."


def test_is_frozen_by_a_path_or_by_a_module_around_it():
    paths = ["encoder/Dense_0/kernel", "encoder/Dense_0/bias", "decoder/kernel"]
    frozen = {
        pattern: [path for path in paths if is_frozen(path, (pattern,))]
        for pattern in ("encoder", "*/bias", "en*", "x")
    }
    assert frozen == {"encoder": paths[:2], "*/bias": paths[1:2], "en*": paths[:2], "x": []}
    assert np.all([is_frozen(path, ("*",)) for path in paths])
