"""Trainings against the same loop by hand, bit for bit; what of the session moves, and when; mistakes in a line."""

from __future__ import annotations

import functools
import gc
import inspect
import signal
from collections.abc import Iterator
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from by_hand import bits, keys_of
from flax import nnx
from interrupts import training_interrupted
from nnx_kinds import NormedMLP
from sessions import session_of
from together import on_threads

from flax_magics import FlaxMagicsError
from flax_magics.base.text import plural
from flax_magics.report.facts import key_facts
from flax_magics.training import train

pytestmark = pytest.mark.usefixtures("optimised")

RANDOM = np.random.RandomState(0)
DATA = {"x": RANDOM.randn(22, 6).astype(np.float32), "y": RANDOM.randint(0, 3, 22)}


def cross_entropy(logits: Any, labels: Any) -> Any:
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


class Dense(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        return nn.Dense(3)(nn.relu(nn.Dense(16)(x)))


class Switched(nn.Module):
    """BatchNorm and dropout, switched by an argument of the call."""

    @nn.compact
    def __call__(self, x: Any, train: bool = False) -> Any:
        x = nn.BatchNorm(use_running_average=not train)(nn.Dense(8)(x))
        return nn.Dense(3)(nn.Dropout(0.5, deterministic=not train)(nn.relu(x)))


class Fielded(nn.Module):
    """Dropout that is switched by a field, a stream of its own, and LayerNorm."""

    training: bool = False

    @nn.compact
    def __call__(self, x: Any) -> Any:
        x = x + jax.random.normal(self.make_rng("noise"), x.shape)
        return nn.Dense(3)(nn.Dropout(0.5, deterministic=not self.training)(nn.LayerNorm()(nn.Dense(8)(x))))


class Convolved(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        x = nn.Conv(4, (3,))(x.reshape(len(x), 6, 1))
        return nn.Dense(3)(nn.relu(x).reshape(len(x), -1))


class Attending(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        x = nn.Dense(8)(x.reshape(len(x), 3, 2))
        return nn.Dense(3)(nn.MultiHeadDotProductAttention(2)(x).mean(1))


class Recurrent(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        return nn.Dense(3)(nn.RNN(nn.LSTMCell(5))(x.reshape(len(x), 3, 2))[:, -1])


def plain_loss(net: Any, batch: Any) -> Any:
    return cross_entropy(net(batch["x"]), batch["y"])


def switched_loss(net: Any, batch: Any, train: bool) -> Any:
    logits = net(batch["x"], train=train)
    return cross_entropy(logits, batch["y"]), {"accuracy": (logits.argmax(-1) == batch["y"]).mean()}


class ByHand:
    """The loop as a person writes it, over draw 1 of seed 0."""

    def __init__(self, net: Any, loss: Any, optimizer: Any, *, frozen: tuple[str, ...] = (), **rest: Any) -> None:
        self.fields, self.mutable, self.streams = (
            rest.get("fields", {}),
            rest.get("mutable", []),
            rest.get("streams", []),
        )
        self.switch: dict[str, Any] = {"train": True} if loss is switched_loss else {}
        self.net, self.loss, self.optimizer, self.frozen = net, loss, optimizer, frozen
        self.keys = keys_of(1)("params", "row order", *self.streams)
        self.losses: list[np.float32] = []
        self.metrics: list[Any] = []
        self._step = jax.jit(self.step)

    def init(self, batch: Any) -> None:
        first = dict.fromkeys(self.switch, False)
        self.variables = nn.init(self.loss, self.net)(self.keys["params"], batch, **first)
        self.opt_state = self.optimizer.init(self.trained(self.variables["params"]))

    def trained(self, params: Any) -> Any:
        return {name: tree for name, tree in params.items() if name not in self.frozen}

    def step(self, variables: Any, opt_state: Any, batch: Any, keys: Any) -> Any:
        def loss_of(params: Any) -> Any:
            applied = nn.apply(self.loss, self.net.clone(**self.fields), mutable=self.mutable)
            given = {**variables, "params": {**variables["params"], **params}}
            output = applied(given, batch, rngs=keys, **self.switch)
            output, updates = output if self.mutable else (output, {})
            value, metrics = output if isinstance(output, tuple) else (output, {})
            return value, (metrics, updates)

        params = self.trained(variables["params"])
        (value, (metrics, updates)), grads = jax.value_and_grad(loss_of, has_aux=True)(params)
        changes, opt_state = self.optimizer.update(grads, opt_state, params)
        params = {**variables["params"], **optax.apply_updates(params, changes)}
        return {**variables, **updates, "params": params}, opt_state, value, metrics

    def rows(self, size: int, batch: int, epoch: int) -> list[Any]:
        order = jax.random.permutation(jax.random.fold_in(self.keys["row order"], epoch), size)
        return [order[begin : begin + batch] for begin in range(0, size, batch)]

    def take(self, batch: Any) -> None:
        number = len(self.losses)
        keys = {name: jax.random.fold_in(self.keys[name], number) for name in self.streams}
        self.variables, self.opt_state, value, metrics = self._step(self.variables, self.opt_state, batch, keys)
        self.losses.append(np.float32(value))
        self.metrics.append(metrics)


NETS = {
    "dense": (Dense(), plain_loss, {}),
    "an argument switches, metrics": (Switched(), switched_loss, {"mutable": ["batch_stats"], "streams": ["dropout"]}),
    "a field switches": (Fielded(), plain_loss, {"fields": {"training": True}, "streams": ["dropout", "noise"]}),
    "frozen": (Dense(), plain_loss, {"frozen": ("Dense_0",)}),
    "convolution": (Convolved(), plain_loss, {}),
    "attention": (Attending(), plain_loss, {}),
    "recurrent": (Recurrent(), plain_loss, {}),
}
ADAMW = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(optax.cosine_decay_schedule(1e-2, 20)))


HUGE = optax.chain(optax.scale(-1e30), optax.scale(1e30))


def same_as(hand: ByHand, session: Any, run: Any) -> None:
    assert bits(run.losses) == bits(np.array(hand.losses))
    for name, values in run.metrics.items():
        assert bits(values) == bits(np.array([np.float32(one[name]) for one in hand.metrics]))
    assert bits(session.models["net"].variables) == bits(dict(hand.variables))
    assert bits(session._state.models["net"].training.opt_state) == bits(hand.opt_state)


@pytest.mark.parametrize("case", NETS)
def test_of_linen_it_is_the_loop_by_hand(case):
    net, loss, how = NETS[case]
    # A last batch of fewer rows is one more program, which is compiled for two of the nets.
    size, steps = (22, 9) if loss is switched_loss or case == "dense" else (16, 6)
    data = {name: values[:size] for name, values in DATA.items()}
    session = session_of(net)
    run = session.train(
        loss, "net", data, optimizer=ADAMW, batch=8, epochs=3, freeze=[f"{one}/*" for one in how.get("frozen", ())]
    )
    hand = ByHand(net, loss, ADAMW, **how)
    hand.init({name: values[:8] for name, values in data.items()})
    for epoch in range(3):
        for rows in hand.rows(size, 8, epoch):
            hand.take({name: values[rows] for name, values in data.items()})
    same_as(hand, session, run)
    assert (run.steps, run.draw, session.draws) == (steps, 1, 1)
    assert (run.trained.total, run.trained.epoch, run.trained.examples) == (steps, steps // 3, 3 * size)
    assert bits(run.output) == bits(session.models["net"].variables)


class Drawing(nn.Module):
    """Draws from a stream that is called like what a training does, in evaluation too."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        return nn.Dense(3)(x + jax.random.normal(self.make_rng("shuffle"), x.shape))


def test_no_stream_of_a_model_has_the_key_of_the_rows():
    run = session_of(Drawing()).train(plain_loss, "net", DATA, optimizer=optax.sgd(0.1), batch=8, steps=1)
    assert sorted(run.keys) == ["dropout", "params", "row order", "shuffle"]
    assert bits(run.keys["shuffle"]) != bits(run.keys["row order"])


def test_each_batch_of_a_look_has_a_key_of_its_own_and_each_look_the_same():
    session = session_of(Drawing())
    run = session.train(plain_loss, "net", DATA, optimizer=optax.sgd(0.0), batch=8, epochs=2, eval=DATA)
    variables, total = session.models["net"].variables, 0.0
    key = keys_of(1)("eval shuffle")["eval shuffle"]
    for number, begin in enumerate(range(0, 22, 8)):
        batch = {name: values[begin : begin + 8] for name, values in DATA.items()}
        rngs = {"shuffle": jax.random.fold_in(key, number)}
        total += float(nn.apply(plain_loss, Drawing())(variables, batch, rngs=rngs)) * len(batch["y"])
    assert [look.loss for look in run.eval] == [pytest.approx(total / 22, rel=1e-6)] * 2


def test_a_key_among_the_arguments_is_the_same_in_every_step():
    def with_key(net: Any, batch: Any, key: Any) -> Any:
        return cross_entropy(net(batch["x"] + jax.random.normal(key, batch["x"].shape)), batch["y"])

    session, key, other = session_of(Dense()), jax.random.key(5), jax.random.key(6)
    for number, command in ((1, session.train), (2, session.grad)):
        options = {"optimizer": optax.sgd(0.1), "steps": 2} if command == session.train else {}
        expected = ["`key` goes into every step: each has the same numbers"] if options else []
        again = [] if number == 1 else ["`key` went into draw 1 too: the same key gives the same numbers"]
        run = command(with_key, "net", DATA, key, **options)
        assert [note.text for note in run.notes] == [*expected, *again]
    assert session.grad(with_key, "net", DATA, other).notes == ()
    run = session.train(with_key, "net", DATA, other, steps=2)
    assert [note.text for note in run.notes][1:] == ["`key` went into draw 3 too: the same key gives the same numbers"]
    run = session.train(with_key, "net", DATA, other, steps=4, resume=True)
    assert [note.text for note in run.notes] == ["`key` goes into every step: each has the same numbers"]


def test_without_a_batch_all_rows_are_one_in_their_order():
    session, hand = session_of(Dense()), ByHand(Dense(), plain_loss, optax.sgd(0.1))
    run = session.train(plain_loss, "net", DATA, optimizer=optax.sgd(0.1), steps=4)
    hand.init(DATA)
    for _ in range(4):
        hand.take(DATA)
    same_as(hand, session, run)


def test_the_run_says_what_it_was():
    session = session_of(Switched())
    first = session.apply("net", DATA["x"], mode="eval")
    run = session.train(switched_loss, "net", DATA, optimizer=optax.adamw(1e-2), batch=8, epochs=1)
    assert session.runs[-1] is run
    assert (run.command, run.model, run.mode, run.call, run.switch) == (
        "train", "net", "train", "switched_loss(net, data)", "train=True",
    )  # fmt: skip
    assert (run.seed, run.draw, sorted(run.keys)) == (0, 2, ["dropout", "params", "row order"])
    assert run.weights == first.weights == "initialised in draw 1"
    assert dict(run.changed) == {"params": 3, "batch_stats": 3}
    assert run.losses.dtype == np.float32
    assert list(run.metrics) == ["accuracy"]
    assert run.program == "compiled"
    assert [fact.takers for fact in key_facts(run) if fact.stream == "row order"] == ["the order of the rows"]
    assert session.apply("net", DATA["x"], mode="eval").weights == "trained, 3 steps"
    assert session.history()[1].inputs == "{x: float32[22,6], y: int64[22]}, train=True"


def test_weights_are_told_by_all_the_steps_that_they_have_had():
    session, sgd = session_of(Dense()), optax.sgd(0.1)
    told = []
    for options in (
        {"steps": 2},
        {"steps": 3, "resume": True},
        {"steps": 4},
        {"steps": 5, "resume": True},
        {"steps": 1},
    ):
        session.train(plain_loss, "net", DATA, optimizer=sgd, **options)
        told.append(session.models["net"].weights)
    assert told == [
        "trained, 2 steps",
        "trained, 3 steps",
        "trained, 7 steps (4 in draw 2)",
        "trained, 8 steps (5 in draw 2)",
        "trained, 9 steps (1 in draw 3)",
    ]
    session.models["net"].variables = jax.tree_util.tree_map(jnp.copy, session.models["net"].variables)
    session.train(plain_loss, "net", DATA, steps=2)
    assert session.models["net"].weights == "trained, 2 steps"
    # Weights that the user's own code has put there since have had none of these steps.
    net = NormedMLP(nnx.Rngs(0))
    session.register("own", net)
    for _ in range(2):
        nnx.update(net, jax.tree_util.tree_map(jnp.ones_like, nnx.state(net, nnx.Param)))
        session.train(plain_loss, "own", DATA, optimizer=sgd, steps=2)
    assert session.models["own"].weights == "trained, 2 steps"


def test_a_training_goes_on_with_the_draw_of_an_init():
    session = session_of(Dense())
    session.init("net", DATA["x"])
    run = session.train(plain_loss, "net", DATA, optimizer=optax.sgd(0.1), steps=2)
    assert (run.draw, session.draws, run.made) == (1, 1, None)


def test_the_optimizer_stays_with_the_net():
    session = session_of(Dense())
    session.train(plain_loss, "net", DATA, optimizer=optax.sgd(0.1), steps=2)
    one = session.train(plain_loss, "net", DATA, steps=2)
    assert one.draw == 2
    again = session_of(Dense())
    again.train(plain_loss, "net", DATA, optimizer=optax.sgd(0.1), steps=2)
    assert bits(again.train(plain_loss, "net", DATA, optimizer=optax.sgd(0.1), steps=2).losses) == bits(one.losses)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 3}, "`net` has no optimizer: any of optax's is one."),
        ({"optimizer": optax.sgd(0.1)}, "how long? --steps counts steps, --epochs times through the data."),
        (
            {"optimizer": optax.sgd(0.1), "steps": 1, "epochs": 1},
            "--epochs and --steps both say how long the training is. Leave one of them out.",
        ),
        (
            {"optimizer": 0.1, "steps": 1},
            "--optimizer takes an optax transformation, and `optax.…` is a float.",
        ),
        (
            {"resume": True},
            "`net` has no training to go on with: no step of one is finished, or others took its weights.",
        ),
    ],
)
def test_a_mistake_is_told_in_one_message_and_changes_nothing(options, message):
    session = session_of(Dense())
    before = session._state
    with pytest.raises(FlaxMagicsError) as error:
        session.train(plain_loss, "net", DATA, **options)
    assert str(error.value).splitlines()[0] == message
    assert session._state is before


def test_an_error_of_the_loss_changes_nothing():
    session = session_of(Dense())
    before = session._state

    def wrong(net: Any, batch: Any) -> Any:
        return jnp.dot(net(batch["x"]), batch["y"]).mean()

    with pytest.raises(TypeError, match="dot"):
        session.train(wrong, "net", DATA, optimizer=optax.sgd(0.1), steps=2)
    assert session._state is before


def left_by(session: Any) -> tuple[Any, ...]:
    """All that a training of `session`, its last run, has left, and the keys of the draw after it."""
    run, training = session.runs[-1], session._state.models["net"].training
    trees = (run.losses, run.metrics, session.models["net"].variables, training.opt_state)
    return (*map(bits, trees), run.eval, bits(session.apply("net", DATA["x"]).keys))


@functools.cache
def left_by_an_uninterrupted_one() -> tuple[Any, ...]:
    net, loss, _ = NETS["an argument switches, metrics"]
    session = session_of(net)
    session.train(loss, "net", DATA, optimizer=ADAMW, batch=8, epochs=4, eval=DATA)
    return left_by(session)


def test_no_state_is_held_but_the_last_one(monkeypatch):
    class Looks(list[Any]):
        def __iter__(self) -> Any:
            held.append(kernels())
            return super().__iter__()

    def kernels() -> int:
        return sum(array.shape == (6, 16) for array in jax.live_arrays())

    monkeypatch.setattr(train, "OFTEN", 0.0)  # what was committed before is another
    others, held, session = kernels(), list[int](), session_of(Dense())
    gc.disable()  # nor does one wait for it
    try:
        session.train(plain_loss, "net", DATA, optimizer=ADAMW, batch=8, epochs=4, eval=Looks([DATA]))
        held.append(kernels())
    finally:
        gc.enable()
    assert [count - others for count in held] == [3] * 5, "a kernel and Adam's two moments of it"


@pytest.mark.parametrize("seed", range(5))
def test_an_interrupt_loses_no_finished_step_and_resume_gives_the_whole(seed):
    net, loss, _ = NETS["an argument switches, metrics"]
    expected = left_by_an_uninterrupted_one()
    session, random = session_of(net), np.random.RandomState(seed)
    stops = 0
    # The first program is traced in some 620 lines, and the last one that a part runs for the first time is its 1,550th.
    with training_interrupted(session, random.randint(660, 1400), once=True):
        session.train(loss, "net", DATA, optimizer=ADAMW, batch=8, epochs=4, eval=DATA)
    while session.runs and session.runs[-1].trained.stopped:
        stops += 1
        run = session.runs[-1]
        assert (run.trained.stopped, run.draw, len(session.runs)) == ("interrupted", 1, 1)
        assert run.notes[-1].text == f"interrupted after {plural(run.steps, 'step')}"
        assert run.notes[-1].write == "%flax_train --resume switched_loss(net, data)"
        with training_interrupted(session, random.randint(100, 1800), once=True):
            session.train(loss, "net", DATA, eval=DATA, resume=True)
    assert stops
    assert session.runs[-1].steps == 12
    assert left_by(session) == expected


def test_a_step_that_is_not_finite_is_not_taken_and_is_told_by_step_row_and_value():
    data = {**DATA, "x": DATA["x"].copy()}
    data["x"][7, 2] = np.nan
    session = session_of(Dense())
    with pytest.raises(FlaxMagicsError) as error:
        session.train(plain_loss, "net", data, optimizer=optax.sgd(0.1), batch=8, epochs=1)
    order = np.asarray(jax.random.permutation(jax.random.fold_in(keys_of(1)("row order")["row order"], 0), 22))
    step = int(np.flatnonzero(order == 7)[0]) // 8
    rows = ", ".join(map(str, order[8 * step : 8 * step + 4]))
    text = (
        f"step {step} (epoch 0, rows {rows}, …) is not finite and was not taken: the loss is NaN: `batch['x']` holds NaN"
        " in row 7"
    )
    assert str(error.value).splitlines()[0] == text
    if step:
        assert session.runs[-1].steps == step
        assert session.runs[-1].trained.stopped == text


def test_what_a_step_made_not_finite_is_told_and_the_steps_before_stay():
    session = session_of(Dense())
    with pytest.raises(FlaxMagicsError) as error:
        session.train(plain_loss, "net", DATA, optimizer=HUGE, steps=3)
    assert str(error.value).startswith(
        "step 0 is not finite and was not taken: the loss and its gradients are finite, and the optimizer makes"
        " Dense_0/bias infinite"
    )
    assert (session.runs, session.draws) == ([], 0)

    def later(net: Any, batch: Any) -> Any:
        return jnp.log(plain_loss(net, batch) - limit)

    run = session.train(plain_loss, "net", DATA, optimizer=optax.sgd(0.1), steps=1)
    limit = float(run.losses[0]) * 0.8
    with pytest.raises(FlaxMagicsError) as error:
        session.train(later, "net", DATA, optimizer=optax.sgd(0.1), steps=500)
    stopped = session.runs[-1]
    assert stopped.steps > 0
    assert f"step {stopped.steps} is not finite" in str(error.value)
    assert "log(-" in str(error.value)
    assert "return jnp.log(plain_loss(net, batch) - limit)" in str(error.value)
    hint = "once the loss or its data are mended, `%flax_train --resume later(net, data)` goes on with this step"
    assert error.value.hint == hint
    assert error.value.write is None
    assert np.isfinite(stopped.losses).all()
    assert stopped.notes[-1].text == f"stopped after {plural(stopped.steps, 'step')}: {stopped.trained.stopped}"
    assert run.draw == 1


class Masked(nn.Module):
    """A mask, as a variable and as a parameter."""

    @nn.compact
    def __call__(self, x: Any, train: bool = False) -> Any:
        mask = self.variable("masks", "of_x", lambda: jnp.full(3, -jnp.inf).at[0].set(0.0))
        other = self.param("other", lambda _: jnp.full(3, -jnp.inf).at[1].set(0.0))
        x = nn.BatchNorm(use_running_average=not train)(nn.Dense(3)(x))
        return jnp.where(jnp.isfinite(mask.value + other), x, x - 1)


class MaskedNnx(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.first = nnx.Linear(6, 3, rngs=rngs)
        self.mask, self.cache = nnx.Variable(jnp.full(3, -jnp.inf)), nnx.Cache(jnp.full(3, -jnp.inf))
        self.norm = nnx.BatchNorm(3, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        return jnp.where(jnp.isfinite(self.mask[...]), 0.0, self.norm(self.first(x)))


def test_what_no_step_updates_may_be_infinite_and_is_not_counted_as_updated():
    session = session_of(Masked())
    run = session.train(switched_loss, "net", DATA, optimizer=optax.sgd(0.1), steps=2, freeze="other")
    assert (run.steps, dict(run.changed)) == (2, {"params": 2, "batch_stats": 2})
    session = session_of(MaskedNnx(nnx.Rngs(0)))
    run = session.train(nnx_loss, "net", DATA, optimizer=optax.sgd(0.1), steps=2)
    assert (run.steps, dict(run.changed)) == (2, {"Param": 2, "BatchStat": 2})


def nnx_loss(net: Any, batch: Any) -> Any:
    logits = net(batch["x"])
    return cross_entropy(logits, batch["y"]), {"accuracy": (logits.argmax(-1) == batch["y"]).mean()}


@pytest.mark.parametrize("frozen", [(), ("first",)])
def test_of_nnx_it_is_the_loop_with_nnx_optimizer(frozen):
    net, twin = NormedMLP(nnx.Rngs(0)), NormedMLP(nnx.Rngs(0))
    session = session_of(net)
    run = session.train(nnx_loss, "net", DATA, optimizer=ADAMW, batch=8, epochs=2, freeze=frozen)

    trained = nnx.All(nnx.Param, lambda path, _: not frozen or path[0] not in frozen)
    optimizer = nnx.Optimizer(twin, ADAMW, wrt=trained)
    (tag,) = {str(part.key.tag) for _, part in nnx.iter_graph(twin) if isinstance(part, nnx.RngStream)}
    keys = keys_of(1)("row order", tag)
    twin.train()

    @nnx.jit
    def step(net: Any, optimizer: Any, batch: Any) -> Any:
        (value, metrics), grads = nnx.value_and_grad(nnx_loss, argnums=nnx.DiffState(0, trained), has_aux=True)(
            net, batch
        )
        optimizer.update(net, grads)
        return value, metrics["accuracy"]

    numbers = []
    for epoch in range(2):
        order = jax.random.permutation(jax.random.fold_in(keys["row order"], epoch), 22)
        for begin in range(0, 22, 8):
            nnx.reseed(twin, policy="match_shape", **{tag: jax.random.fold_in(keys[tag], len(numbers))})
            batch = {name: values[order[begin : begin + 8]] for name, values in DATA.items()}
            numbers.append([np.float32(one) for one in step(twin, optimizer, batch)])
    losses, accuracies = np.array(numbers).T
    assert bits(run.losses) == bits(losses)
    assert bits(run.metrics["accuracy"]) == bits(accuracies)
    kinds = (nnx.Param, nnx.BatchStat)
    assert bits(nnx.state(net, kinds)) == bits(nnx.state(twin, kinds))
    assert net.dropout.deterministic is False
    assert session.models["net"].variables is not None
    assert dict(run.changed) == {"Param": 6, "BatchStat": 6}


def test_an_nnx_module_of_the_session_is_trained_in_place():
    session = session_of(nnx.Linear(6, 3, rngs=nnx.Rngs(0)))
    module = session.models["net"].module
    kernel = module.kernel
    before = np.array(kernel[...])
    with training_interrupted(session, 2500):
        session.train(nnx_loss, "net", DATA, optimizer=optax.sgd(0.1), batch=8, epochs=400)
    assert module.kernel is kernel
    run = session.runs[-1]
    assert 0 < run.steps < 1200
    assert (np.array(kernel[...]) != before).any()
    whole = session_of(nnx.Linear(6, 3, rngs=nnx.Rngs(0)))
    expected = whole.train(nnx_loss, "net", DATA, optimizer=optax.sgd(0.1), batch=8, epochs=400)
    after = session.train(nnx_loss, "net", DATA, resume=True)
    assert bits(after.losses) == bits(expected.losses)
    assert bits(nnx.state(module)) == bits(nnx.state(whole.models["net"].module))


class Halved(nn.Module):
    """One layer is called for nothing."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        nn.Dense(4, name="spare")(x)
        return nn.Dropout(0.5, deterministic=True)(nn.Dense(3)(x))


def test_sharp_bits_of_the_whole_run_are_said_once():
    session, line = session_of(Halved()), inspect.getsourcelines(Halved)[1] + 6
    run = session.train(plain_loss, "net", DATA, optimizer=optax.sgd(0.0), steps=60, freeze=["spare", "Dense_1"])
    assert [note.text for note in run.notes] == [
        f"Dropout_0 is off in training: deterministic=True is fixed in Halved (line {line})",
        "--freeze Dense_1 matches no parameter of net: nothing is frozen by it",
        "the loss has not moved in the last 50 steps",
    ]
    run = session.train(plain_loss, "net", DATA, optimizer=optax.sgd(0.1), steps=2)
    assert run.notes[1].text == "spare has no gradient: the loss does not depend on it"


def test_what_is_under_way_is_shown_and_committed(monkeypatch):
    session = session_of(Dense())
    shown = []
    session.services.on_progress = lambda run: shown.append((run, session.runs[-1].steps))
    monkeypatch.setattr(train, "SHOWN", 0.0)
    monkeypatch.setattr(train, "OFTEN", 0.0)
    run = session.train(plain_loss, "net", DATA, optimizer=optax.sgd(0.1), steps=5)
    assert [(each.steps, committed) for each, committed in shown] == [(1, 1), (2, 2), (3, 3), (4, 4), (5, 5)]
    assert {(each.draw, each.digest, each.trained.total) for each, _ in shown} == {(1, None, 5)}
    assert (len(session.runs), session.draws, run.digest is None) == (1, 1, False)


def test_another_thread_that_changes_the_net_ends_the_training(monkeypatch):
    session = session_of(Dense())
    monkeypatch.setattr(train, "SHOWN", 0.0)
    monkeypatch.setattr(train, "OFTEN", 0.0)

    def change() -> None:
        session.models["net"].variables = jax.tree_util.tree_map(jnp.zeros_like, session.models["net"].variables)

    def on_progress(run: Any) -> None:
        if run.steps == 2:
            on_threads(change)

    session.services.on_progress = on_progress
    with pytest.raises(FlaxMagicsError, match="`net` was changed by another thread while it was trained"):
        session.train(plain_loss, "net", DATA, optimizer=optax.sgd(0.1), steps=5)
    assert session.runs[-1].steps == 2
    assert session._state.models["net"].training is None


def test_another_thread_may_register_and_apply_while_a_net_is_trained(monkeypatch):
    session, alone = session_of(Dense()), session_of(Dense())
    monkeypatch.setattr(train, "SHOWN", 0.0)
    monkeypatch.setattr(train, "OFTEN", 0.0)

    def on_phase(phase: str) -> None:
        if phase.startswith("training") and "other" not in session.models:
            on_threads(lambda: session.register("other", Switched()))

    session.services.on_phase = on_phase
    session.services.on_progress = lambda run: on_threads(lambda: session.apply("net", DATA["x"]))
    run, undisturbed = (
        each.train(plain_loss, "net", DATA, optimizer=optax.sgd(0.1), steps=4) for each in (session, alone)
    )
    assert bits(run.losses) == bits(undisturbed.losses)
    assert bits(session.models["net"].variables) == bits(alone.models["net"].variables)
    assert (run.draw, session.draws) == (1, 5)
    assert [each.draw for each in session.runs] == [1, 2, 3, 4, 5]


def test_data_that_draw_as_they_are_gone_through_are_refused_and_ctrl_c_is_heard(monkeypatch):
    session = session_of(Dense())
    monkeypatch.setattr("flax_magics.training.methods.ATTEMPTS", 2)

    class Drawing:
        def __iter__(self) -> Iterator[Any]:
            for _ in range(2):
                session.key("noise")
                yield DATA

    with pytest.raises(FlaxMagicsError, match="something else drew from the session before the first step was kept"):
        session.train(plain_loss, "net", Drawing(), optimizer=optax.sgd(0.1), epochs=1)
    assert session._state.models["net"].training is None
    monkeypatch.setattr(train.Trainer, "_on_step", lambda trainer: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        session.train(plain_loss, "net", Drawing(), optimizer=optax.sgd(0.1), epochs=1)
    assert session._state.models["net"].training is None


def test_variables_that_the_first_init_did_not_make_are_added():
    class Two(nn.Module):
        def setup(self) -> None:
            self.first, self.last = nn.Dense(4), nn.Dense(3)

        def __call__(self, x: Any) -> Any:
            return self.first(x)

        def classify(self, x: Any) -> Any:
            return self.last(self.first(x))

    session = session_of(Two())
    session.init("net", DATA["x"])
    run = session.train(
        lambda net, batch: cross_entropy(net.classify(batch["x"]), batch["y"]),
        *("net", DATA),
        optimizer=optax.sgd(0.1),
        steps=2,
    )
    assert run.made is not None
    assert run.made.added
    assert sorted(session.models["net"].variables["params"]) == ["first", "last"]


def test_variables_of_a_frozen_dict_are_trained_as_dicts():
    session, plain = session_of(Switched()), session_of(Switched())
    variables = session.init("net", DATA["x"])
    session.models["net"].variables = flax.core.freeze(variables)
    plain.init("net", DATA["x"])
    plain.models["net"].variables = variables
    runs = [
        each.train(switched_loss, "net", DATA, optimizer=optax.adam(0.1), steps=2, epochs=None)
        for each in (session, plain)
    ]
    assert bits(runs[0].losses) == bits(runs[1].losses)
    assert bits(runs[0].output) == bits(runs[1].output)


def test_a_resumed_training_without_its_eval_data_says_that_it_no_longer_looks():
    session = session_of(Dense())
    session.train(plain_loss, "net", DATA, optimizer=optax.sgd(0.1), steps=2, eval=DATA)
    run = session.train(plain_loss, "net", DATA, steps=4, resume=True)
    assert (len(run.eval), run.trained.task.eval) == (2, "")
    text = "it no longer looks at `data`: the data of `--eval` have to be given again"
    assert [note.text for note in run.notes if note.kind == "resume"] == [text]
    run = session.train(plain_loss, "net", DATA, steps=6, resume=True)
    assert [note.text for note in run.notes if note.kind == "resume"] == []


def test_a_training_goes_on_with_its_batch_and_what_is_frozen_or_not_at_all():
    session = session_of(Dense())
    session.train(plain_loss, "net", DATA, optimizer=optax.sgd(0.1), batch=8, steps=2, freeze="Dense_0")
    again = {"steps": 3, "resume": True}
    for options, message in (
        ({"batch": 4}, "a training goes on as it began: `--batch 8`, which need not be given again."),
        ({"freeze": "*/bias"}, "a training goes on as it began: `--freeze Dense_0`, which need not be given again."),
    ):
        with pytest.raises(FlaxMagicsError) as error:
            session.train(plain_loss, "net", DATA, **again, **options)
        assert str(error.value) == message
    with pytest.raises(FlaxMagicsError) as error:
        session.train(plain_loss, "net", [DATA], **again)
    hint = "--resume goes on with arrays where --batch 8 had cut some"
    assert str(error.value).splitlines()[0] == "`data` gives batches of its own: --batch cuts arrays."
    assert (error.value.hint, error.value.write) == (hint, None)
    assert session.train(plain_loss, "net", DATA, batch=8, freeze="Dense_0", **again).steps == 3


def test_an_interrupt_after_a_look_alone_is_one(monkeypatch):
    monkeypatch.setattr(train, "OFTEN", 0.0)
    session = session_of(Dense())
    session.train(plain_loss, "net", DATA, optimizer=optax.sgd(0.1), batch=8, epochs=1)
    monkeypatch.setattr(train, "SHOWN", 0.0)
    session.services.on_progress = lambda run: signal.raise_signal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        session.train(plain_loss, "net", DATA, eval=DATA, epochs=2, resume=True)
    run = session.runs[-1]
    assert (run.steps, len(run.eval), run.trained.stopped) == (3, 1, "interrupted")


@pytest.mark.parametrize("optimizer", [optax.lbfgs(), optax.chain(optax.adam(1e-2), optax.contrib.reduce_on_plateau())])
def test_an_optimizer_that_takes_the_loss_is_given_it(optimizer):
    session, hand = session_of(Dense()), ByHand(Dense(), plain_loss, optimizer)
    run = session.train(plain_loss, "net", DATA, optimizer=optimizer, steps=4)
    hand.init(DATA)

    def step(variables: Any, opt_state: Any, batch: Any, keys: Any) -> Any:
        def loss_of(params: Any) -> Any:
            return nn.apply(plain_loss, hand.net)({"params": params}, batch)

        params = variables["params"]
        value, grads = jax.value_and_grad(loss_of)(params)
        of_loss = {"value": value, "grad": grads, "value_fn": loss_of}
        changes, opt_state = optimizer.update(grads, opt_state, params, **of_loss)
        return {"params": optax.apply_updates(params, changes)}, opt_state, value, {}

    hand._step = jax.jit(step)
    for _ in range(4):
        hand.take(DATA)
    same_as(hand, session, run)
    assert run.trained.task.takes_loss is True


def test_a_total_that_is_passed_is_no_training_and_one_that_is_reached_has_no_steps_left():
    session = session_of(Dense())
    session.train(plain_loss, "net", DATA, optimizer=optax.sgd(0.1), steps=4)
    state = session._state
    for total in ({"steps": 2}, {"epochs": 3}):
        with pytest.raises(FlaxMagicsError, match=r"4 steps are finished already, and the total is [23]") as error:
            session.train(plain_loss, "net", DATA, resume=True, **total)
        assert error.value.write == "%flax_train --resume --steps 8 plain_loss(net, data)"
    assert session._state is state
    losses = session.runs[-1].losses
    assert bits(session.train(plain_loss, "net", DATA, resume=True).losses) == bits(losses)
    assert session.train(plain_loss, "net", DATA, resume=True, steps=8).steps == 8


@pytest.mark.parametrize("wrong", [{"steps": -1}, {"steps": True}, {"epochs": 0}, {"steps": 2, "batch": 0}])
def test_numbers_are_one_or_more(wrong):
    name, number = list(wrong.items())[-1]
    session = session_of(Dense())
    with pytest.raises(FlaxMagicsError) as error:
        session.train(plain_loss, "net", DATA, optimizer=optax.sgd(0.1), **wrong)
    assert str(error.value) == f"--{name} takes a number, 1 or more, not {number}."


def test_what_is_looked_at_can_be_looked_at_before_the_first_step():
    session = session_of(Dense())

    def refused(looks: Any) -> str:
        with pytest.raises(FlaxMagicsError) as error:
            session.train(plain_loss, "net", DATA, optimizer=optax.sgd(0.1), epochs=2, eval=looks)
        assert not session.runs
        return str(error.value)

    once = "can be gone through only once, and it is looked at several times."
    assert once in refused(iter([DATA]))
    assert "data are a dict or tuple of arrays, or an iterable of batches" in refused(3)
