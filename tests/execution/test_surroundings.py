"""A command is no part of a function that JAX traces, of a host callback, or of another command."""

from __future__ import annotations

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from jax.experimental import io_callback
from jax.sharding import PartitionSpec
from sessions import session_of
from together import on_threads

from flax_magics import FlaxMagicsError, Session
from flax_magics.base import private

X = jnp.ones((2, 3))
LIKE = jax.ShapeDtypeStruct((3,), jnp.float32)
TRACED = "in a function that JAX traces: it would happen once, while JAX traces, and be no part of what then runs."
CALLED_BACK = "in a host callback, and the program that calls it waits for it."
INSIDE = "in code that another command runs, and the draw of that one is not finished."


class Command:
    """Draws a key where it is called, and notes how that went."""

    def __init__(self) -> None:
        self.session = Session()
        self.said: list[str] = []

    def __call__(self, x):
        try:
            self.session.key("noise")
            self.said.append("drawn")
        except FlaxMagicsError as error:
            self.said.append(str(error))
        return x

    def total(self, x):
        return jnp.sum(self(x))

    def on_host(self, x):
        return np.asarray(self(x))


@pytest.fixture
def command():
    return Command()


def with_rules(command, **rules):
    """A function whose own derivative is `command` in its forward or in its backward rule."""

    @jax.custom_vjp
    def function(x):
        return jnp.sum(x)

    function.defvjp(
        lambda x: (rules.get("forward", lambda x: x)(x).sum(), x), lambda x, g: (rules.get("back", lambda x: x)(x) * g,)
    )
    return function


def with_tangent(command):
    @jax.custom_jvp
    def function(x):
        return jnp.sum(x)

    function.defjvp(lambda primals, tangents: (function(*primals), command.total(tangents[0])))
    return function


def at_the_trace(command):
    def function(x):
        with jax.ensure_compile_time_eval():
            command(1.0)
        return jnp.sum(x)

    return function


class Lifted(nn.Module):
    """A transform of linen's around the command."""

    lift: str
    command: Command

    @nn.compact
    def __call__(self, x):
        inner = Plain(self.command)
        if self.lift != "scan":
            return getattr(nn, self.lift)(lambda module, x: module(x))(inner, x)
        return nn.scan(lambda module, carry, x: (carry, module(x)), variable_broadcast="params")(inner, 0.0, x)[1]


class Plain(nn.Module):
    command: Command

    @nn.compact
    def __call__(self, x):
        return self.command(x)


def mesh():
    return jax.sharding.Mesh(np.array(jax.devices()[:1]), ("a",))


TRACES = {
    "jit": lambda c, x: jax.jit(c)(x),
    "lower": lambda c, x: jax.jit(c).lower(x),
    "grad": lambda c, x: jax.grad(c.total)(x),
    "grad without jit": lambda c, x: without_jit(jax.grad(c.total), x),
    "vjp": lambda c, x: jax.vjp(c, x),
    "jvp": lambda c, x: jax.jvp(c, (x,), (x,)),
    "vmap": lambda c, x: jax.vmap(c)(x),
    "pmap": lambda c, x: jax.pmap(c)(x[None]),
    "shard_map": lambda c, x: jax.shard_map(c, mesh=mesh(), in_specs=PartitionSpec(), out_specs=PartitionSpec())(x),
    "checkpoint": lambda c, x: jax.checkpoint(c)(x),
    "scan": lambda c, x: jax.lax.scan(lambda carry, x: (carry, c(x)), 0.0, x),
    "while_loop": lambda c, x: jax.lax.while_loop(lambda i: i < 2, lambda i: c(i) + 1, 0),
    "cond": lambda c, x: jax.lax.cond(True, c, lambda x: x, x),
    "eval_shape": lambda c, x: jax.eval_shape(c, x),
    "make_jaxpr": lambda c, x: jax.make_jaxpr(c)(x),
    "compile time in jit": lambda c, x: jax.jit(at_the_trace(c))(x),
    "compile time in grad": lambda c, x: jax.grad(at_the_trace(c))(x),
    "a rule's forward": lambda c, x: jax.grad(with_rules(c, forward=c))(x),
    "a rule's backward": lambda c, x: jax.grad(with_rules(c, back=c))(x),
    "a rule's tangent": lambda c, x: jax.grad(with_tangent(c))(x),
    "nnx.jit": lambda c, x: nnx.jit(c)(x),
    "nnx.grad": lambda c, x: nnx.grad(c.total)(x),
    "nnx.vmap": lambda c, x: nnx.vmap(c)(x),
    "nnx.scan": lambda c, x: nnx.scan(lambda carry, x: (carry, c(x)))(0.0, x),
    "nn.jit": lambda c, x: Lifted("jit", c).apply({}, x),
    "nn.remat": lambda c, x: Lifted("remat", c).apply({}, x),
    "nn.scan": lambda c, x: Lifted("scan", c).apply({}, x),
    "linen under jit": lambda c, x: jax.jit(lambda x: Plain(c).apply({}, x))(x),
}

CALLBACKS = {
    "pure_callback": lambda c, x: jax.pure_callback(c.on_host, LIKE, x),
    "pure_callback in jit": lambda c, x: jax.jit(lambda x: jax.pure_callback(c.on_host, LIKE, x))(x),
    "pure_callback without jit": lambda c, x: without_jit(lambda x: jax.pure_callback(c.on_host, LIKE, x), x),
    "io_callback": lambda c, x: jax.jit(lambda x: io_callback(c.on_host, LIKE, x))(x),
    "debug.callback": lambda c, x: jax.debug.callback(c.on_host, x),
    "debug.callback in jit": lambda c, x: jax.jit(lambda x: (jax.debug.callback(c.on_host, x), x)[1])(x),
    "debug.callback in grad": lambda c, x: jax.grad(lambda x: (jax.debug.callback(c.on_host, x), x.sum())[1])(x),
}

OUTSIDE = {
    "nothing around it": lambda c, x: c(x),
    "jit without jit": lambda c, x: without_jit(jax.jit(c), x),
    "scan without jit": lambda c, x: without_jit(lambda x: jax.lax.scan(lambda i, x: (i, c(x)), 0.0, x[:1]), x),
    "nnx.jit without jit": lambda c, x: without_jit(nnx.jit(c), x),
    "tree.map": lambda c, x: jax.tree.map(c, {"a": x}),
    "compile time": lambda c, x: at_the_trace(c)(x),
    "linen by hand": lambda c, x: Plain(c).apply({}, x),
    "another thread": lambda c, x: in_a_thread(lambda: c(x)),
    "a thread beside a trace": lambda c, x: jax.jit(lambda x: in_a_thread(lambda: c(1.0)) or x)(x),
}


def without_jit(function, x):
    with jax.disable_jit():
        return function(x)


def in_a_thread(work):
    on_threads(work)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("place", [*TRACES, *CALLBACKS])
def test_no_command_in_a_traced_function_or_a_host_callback(command, place):
    before, where = command.session._state, TRACED if place in TRACES else CALLED_BACK
    jax.block_until_ready({**TRACES, **CALLBACKS}[place](command, jnp.arange(3.0)))
    jax.effects_barrier()
    line = "\n  write: noise_key = session.key('noise')"
    assert set(command.said) == {f"the key `noise` is drawn {where} Draw it before, and use it there.{line}"}
    assert command.session._state is before


@pytest.mark.parametrize("place", OUTSIDE)
def test_a_command_where_nothing_is_traced(command, place):
    OUTSIDE[place](command, jnp.arange(3.0))
    assert command.said == ["drawn"]
    assert command.session.draws == 1


@pytest.mark.parametrize("place", ["jit", "grad", "vmap", "scan", "nnx.jit"])
def test_the_calling_frames_tell_most_where_a_version_has_the_private_name_no_longer(command, place, monkeypatch):
    monkeypatch.setattr(private, "_is_clean", lambda: lambda: True)
    TRACES[place](command, jnp.arange(3.0))
    assert command.session.draws == 0


# -- every command


REFUSING = {
    "register": lambda session: session.register("other", nn.Dense(3)),
    "register_all": lambda session: session.register_all({"other": nn.Dense(3)}),
    "init": lambda session: session.init("net", X),
    "apply": lambda session: session.apply("net", X),
    "assign": lambda session: session.assign("net", {}),
    "key": lambda session: session.key("noise"),
    "run_key": lambda session: session.run_key("noise"),
    "replay": lambda session: session.replay(1),
    "run_replay": lambda session: session.run_replay("last"),
    "restart": lambda session: session.restart(3, fresh=True),
    "mesh": lambda session: session.mesh(data=1),
    "load": lambda session: session.load("session.safetensors"),
    "free": lambda session: session.free(),
    "grad": lambda session: session.grad(lambda net, x: net(x).mean(), "net", X),
    "train": lambda session: session.train(lambda net, x: net(x).mean(), "net", X, optimizer=optax.sgd(0.1), steps=1),
}
"""Methods of a session that draw, run or change it; `init`, `apply`, `grad` and `train` call those that begin with `run_`,

and `run_again` leaves it to `run_apply` to refuse."""
HARMLESS = {
    "summary", "run_summary", "variables", "history", "last", "module", "save", "autosave", "export",
    "settle", "run_export", "training_of", "doctor", "first_findings",
}  # fmt: skip


def test_every_method_of_a_session_is_one_or_the_other():
    public = {name for name, value in inspect.getmembers(Session, callable) if not name.startswith("_")}
    assert public <= {*REFUSING, "run_init", "run_apply", "run_again", "run_grad", "run_train", "run_free", *HARMLESS}


@pytest.fixture(scope="module")
def used():
    session = session_of(nn.Dense(2))
    session.apply("net", X)
    return session


@pytest.mark.parametrize("where", ["jit", "callback"])
@pytest.mark.parametrize("method", REFUSING)
def test_a_method_that_refuses_leaves_the_session_as_it_was(used, method, where):
    state, seen, said = used._state, {name: set(value) for name, value in vars(used.services.seen).items()}, []

    def call(x):
        try:
            REFUSING[method](used)
        except FlaxMagicsError as error:
            said.append(str(error))
        return x

    if where == "jit":
        jax.jit(call)(X)
    else:
        jax.block_until_ready(jax.pure_callback(lambda x: np.asarray(call(x)), LIKE, jnp.ones(3)))
    assert len(said) == 1
    assert f" {TRACED if where == 'jit' else CALLED_BACK} " in said[0]
    assert used._state is state
    assert {name: set(value) for name, value in vars(used.services.seen).items()} == seen


def test_variables_are_not_assigned_in_a_traced_function(used):
    state = used._state
    with pytest.raises(FlaxMagicsError) as told:
        jax.jit(lambda v: setattr(used.models["net"], "variables", v))(used.models["net"].variables)
    assert str(told.value) == (
        f"the assignment of `net`'s variables stands {TRACED} Write it before or after.\n"
        "  form: session.models['net'].variables = …"
    )
    assert used._state is state


def test_a_summary_in_a_traced_function_is_that_outside(used):
    inside: list[str] = []
    jax.jit(lambda x: inside.append(str(used.summary("net", x))) or x)(X)
    assert inside == [str(used.summary("net", X))]


def test_a_script_is_told_the_form(used):
    with pytest.raises(FlaxMagicsError) as told:
        jax.grad(lambda x: used.apply("net", x).output.sum())(X)
    assert str(told.value) == (
        f"%flax_apply net(…) stands {TRACED} Take variables and keys before it, and call the model with them.\n"
        "  form: variables = session.models['net'].variables\n"
        "        dropout_key = session.key('dropout')\n"
        "        session.models['net'].module.apply(variables, …, rngs={'dropout': dropout_key})"
    )


# -- a model that holds a command


class Nested(nn.Module):
    """A command in a model's own code."""

    session: Session

    @nn.compact
    def __call__(self, x):
        return nn.Dense(2)(x) + self.session.apply("net", x).output


@pytest.mark.parametrize("run", [lambda s: s.init("nested", X), lambda s: s.apply("nested", X, eager=True)])
def test_a_model_that_another_command_runs_draws_nothing(run):
    session = session_of(nn.Dense(2))
    session.register("nested", Nested(session))
    state = session._state
    with pytest.raises(FlaxMagicsError) as told:
        run(session)
    assert str(told.value).startswith(f"%flax_apply net(…) stands {INSIDE} ")
    assert session._state is state


class Called(nn.Module):
    """A command in a host callback of the model."""

    command: Command

    @nn.compact
    def __call__(self, x):
        return jax.pure_callback(self.command.on_host, jax.ShapeDtypeStruct(x.shape, x.dtype), x)


def test_a_program_with_a_callback_runs_and_a_command_in_it_does_not(command):
    command.session.register("net", Called(command))
    assert command.session.apply("net", X).output.shape == (2, 3)
    assert command.session.draws == 1
    assert {said.partition(". ")[0] for said in command.said} == {f"the key `noise` is drawn {CALLED_BACK[:-1]}"}


@pytest.mark.parametrize("transform", [jax.jit, jax.grad, lambda function: lambda x: jax.vmap(function)(x[None])])
def test_a_session_that_begins_in_a_traced_function_has_the_root_key_of_any(transform):
    sessions = []
    transform(lambda x: sessions.append(Session(seed=3)) or x)(jnp.float32(1))
    assert jax.random.key_data(sessions[0].root_key).tolist() == jax.random.key_data(jax.random.key(3)).tolist()
