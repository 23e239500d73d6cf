"""Calls in Flax's own words are refused with the command that says the same; what the user defines is the user's."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import pytest
from by_hand import bits
from flax import linen as nn
from sessions import session_of

from flax_magics import FlaxMagicsError

SETUP = """\
from flax import nnx
x = jnp.ones((2, 3))
key = jax.random.key(1)
class Encoder(nn.Module):
  @nn.compact
  def __call__(self, x):
    return nn.Dense(4)(x)
class Net(nn.Module):
  def setup(self):
    self.encoder = Encoder()
    self.norm = nn.BatchNorm()
  def __call__(self, x, train=False):
    return self.norm(self.encoder(x), use_running_average=not train)
  def encode(self, x):
    return self.encoder(x)
class Own(nnx.Module):
  def __init__(self, features, *, rngs):
    self.linear = nnx.Linear(3, features, rngs=rngs)
    self.dropout = nnx.Dropout(0.5, rngs=rngs)
  def __call__(self, x):
    return self.dropout(self.linear(x))
  def encode(self, x):
    return self.linear(x)
"""


def own(function, command, gives):
    return f"`{function}` is Flax's own, and {command} is the command for it: the session gives {gives}."


def init(function):
    return own(function, "%flax_init", "a key")


def apply(function):
    return own(function, "%flax_apply", "variables and keys")


def plain(function):
    return f"`{function}` is Flax's own and needs no command: a command runs a method of the model."


def bound(function):
    return f"`{function}` is Flax's own and for the code inside the model: a command runs a method of the model."


MAKE_RNG = "`net.make_rng` is Flax's own and draws inside the model: outside, %flax_key draws."
GET = "`net.get_variable` is Flax's own and looks at variables inside the model: outside, %flax_vars gives them."
TABULATE = own("net.tabulate", "%flax_summary", "a key")
CALLS_ENCODER = "net.apply(variables, x, method=lambda net, x: net.encoder(x))"
CAPTURES = "net.apply(variables, x, capture_intermediates=True)"
SETS = "own.set_attributes(deterministic=True)"

# what is said of a line → the lines, and what to write in place of each
METHODS = {
    init: {
        "%flax_init net.init(key, x)": "%flax_init net(x)",
        "%flax_init --keys-of 1 net.init(rngs=key, x=x)": "%flax_init --keys-of 1 net(x=x)",
        "%flax_apply net.init(key, x)": "%flax_init net(x)",
        "%flax_apply net.init(x)": "%flax_init net(x)",
        "%flax_init net.init(jax.random.PRNGKey(0), x)": "%flax_init net(x)",
        "%flax_init net.init_with_output(key, x)": "%flax_init net(x)",
        "%flax_init net.lazy_init({'params': key}, x)": "%flax_init net(x)",
        "%flax_init net.init(key, x, method='encode')": "%flax_init net.encode(x)",
        "%flax_init net.init(key, x, method=Net.encode, mutable=['params'])": "%flax_init net.encode(x)",
        "%flax_init net.encoder.init(key, x)": "%flax_init net.encoder(x)",
    },
    apply: {
        "%flax_apply net.apply(variables, x)": "%flax_apply net(x)",
        "%flax_apply net.apply(x)": "%flax_apply net(x)",
        "%flax_apply --train -o run net.apply(variables, x, rngs={'dropout': key}, mutable=['batch_stats'])": (
            "%flax_apply --train -o run --mutable batch_stats net(x)"
        ),
        f"%flax_apply {CALLS_ENCODER}": CALLS_ENCODER,
        f"%flax_apply {CAPTURES}": CAPTURES,
        "%flax_apply net.apply(*(variables, x))": "net.apply(*(variables, x))",
        "%flax_summary net.apply(variables, x)": "%flax_apply net(x)",
        "%flax_apply net.encoder.apply(variables, x)": "%flax_apply net.encoder(x)",
    },
    (lambda _: TABULATE): {
        "%flax_apply net.tabulate(key, x)": "%flax_summary net(x)",
        "%flax_summary net.tabulate(key, x, train=True)": "%flax_summary net(x, train=True)",
    },
    (lambda _: MAKE_RNG): {
        "%flax_apply net.make_rng('dropout')": "dropout_key = %flax_key dropout",
        "%flax_apply net.make_rng()": "params_key = %flax_key params",
    },
    (lambda _: GET): {"%flax_apply net.get_variable('params', 'encoder')": "%flax_vars net"},
    plain: {
        "%flax_apply net.bind(variables)": "net.bind(variables)",
        "%flax_apply net.clone(name='other')": "net.clone(name='other')",
        "%flax_init net.copy()": "net.copy()",
        "%flax_apply net.module_paths(key, x)": "net.module_paths(key, x)",
        "%flax_apply own.train()": "own.train()",
        "%flax_init own.eval()": "own.eval()",
        f"%flax_summary {SETS}": SETS,
        "%flaxmodel --check 'own.train()' own": "own.train()",
    },
}
OF_A_LAYER = ("%flax_apply own.dropout.eval()", plain("own.dropout.eval"), "own.dropout.eval()")

IN_PLACE = {
    "mutable": "--mutable hands a collection back",
    "rngs": "each run is a draw, and the session gives its keys",
    "method": "another method than the call is written by its name",
    "variables": "the session gives its own, and --variables gives others",
    "capture_intermediates": "it is one of Flax's `apply`",
}
PLAIN_INIT = "params_key = %flax_key params\nvariables = net.init(params_key, x, method=lambda net, x: net.encoder(x))"

# line with an argument that is Flax's → what to write in its place
IN_THE_CALL = {
    "%flax_apply --train net(x, mutable=['batch_stats'])": "%flax_apply --train --mutable batch_stats net(x)",
    "%flax_apply net(x, mutable=('a', 'b'), train=False)": "%flax_apply --mutable a --mutable b net(x, train=False)",
    "%flax_apply net(x, mutable=False)": "%flax_apply net(x)",
    "%flax_apply net(x, mutable=True)": "variables = %flax_vars net\nnet.apply(variables, x, mutable=True)",
    "%flax_apply net(x, rngs={'dropout': key})": "%flax_apply net(x)",
    "%flax_apply net(x, method='encode')": "%flax_apply net.encode(x)",
    "%flax_apply net(x, method=Net.encode)": "%flax_apply net.encode(x)",
    "%flax_apply net(x, method=Net.__call__)": "%flax_apply net(x)",
    "%flax_apply net(x, method=net.encode, rngs={}, mutable='batch_stats')": (
        "%flax_apply --mutable batch_stats net.encode(x)"
    ),
    "%flax_apply net(x, method=lambda net, x: net.encoder(x))": f"variables = %flax_vars net\n{CALLS_ENCODER}",
    "%flax_apply net(x, variables=variables)": "%flax_apply --variables variables net(x)",
    "%flax_apply net(x, variables=variables | {})": "%flax_apply --variables (variables | {}) net(x)",
    "%flax_apply net(x, capture_intermediates=True)": f"variables = %flax_vars net\n{CAPTURES}",
    "%flax_init net(x, method='encode', mutable=True)": "%flax_init net.encode(x)",
    "%flax_init net(x, method=lambda net, x: net.encoder(x))": PLAIN_INIT,
    "%flax_summary net(x, rngs={'dropout': key}, mutable=['batch_stats'])": "%flax_summary net(x)",
    "%flax_apply net.encoder(x, rngs={})": "%flax_apply net.encoder(x)",
    "%flax_apply own(x, rngs=nnx.Rngs(0))": "%flax_apply own(x)",
    "%flax_apply own(x, method='encode')": "%flax_apply own.encode(x)",
}


def function_in(line):
    return next(word for word in line.split() if "(" in word).partition("(")[0].strip("'")


def has_no(function, argument):
    return f"{function}() has no argument `{argument}`: {IN_PLACE[argument]}."


TAKES_NONE = "takes no variables: the session passes its own."
VARIABLES_FIRST = {
    "%flax_apply net(variables, x)": "%flax_apply net(x)\n%flax_apply --variables variables net(x)",
    "%flax_apply --eval net(variables, x)": "%flax_apply --eval net(x)\n%flax_apply --eval --variables variables net(x)",
    "%flax_apply net(dict(variables), x, train=False)": (
        "%flax_apply net(x, train=False)\n%flax_apply --variables dict(variables) net(x, train=False)"
    ),
    "%flax_apply net.encode(variables, x)": "%flax_apply net.encode(x)\n%flax_apply --variables variables net.encode(x)",
    "%flax_init net(variables, x)": "%flax_init net(x)",
    "%flax_summary net(variables, x)": "%flax_summary net(x)",
    "%flax_apply own(nnx.state(own), x)": "%flax_apply own(x)\n%flax_apply --variables nnx.state(own) own(x)",
    "%flax_apply fresh(variables, x)": "%flax_apply fresh(x)\n%flax_apply --variables variables fresh(x)",
}

BOUND = [
    *("net.unbind()", "net.sow('intermediates', 'h', x)", "net.perturb('h', x)", "net.scope.root()"),
    *("net.variable('cache', 'i', lambda: x)", "net.param('w', nn.initializers.zeros, (2,))"),
    *("net.put_variable('params', 'w', x)", "net.has_rng('params')", "net.is_initializing()"),
    *("net.is_mutable_collection('params')", "net.encoder.clone()"),
    *("own.sow(nnx.Intermediate, 'h', x)", "own.perturb('h', x)"),
]


@pytest.fixture
def models(notebook):
    notebook(SETUP)
    for line in ("net = Net()", "fresh = Net()", "own = Own(4)"):
        notebook(f"%flaxmodel -q {line}")
    notebook("variables = %flax_init -q net(x)")
    return notebook


def is_refused(models, line, message, advice):
    """The line fails with just this, changes nothing, and what is advised runs."""
    state = models.session._state
    written = "\n         ".join(advice.split("\n"))
    assert models.fails(line) == f"FlaxMagicsError: {message}\n  write: {written}"
    assert models.session._state is state
    models(advice)


def test_methods_that_flax_has_left_in_a_class_of_its_own(models):
    models("_ = nnx.tabulate(own, x)")
    is_refused(models, *OF_A_LAYER)


def test_methods_of_flaxs_own(models):
    is_refused(models, *OF_A_LAYER)
    for said, lines in METHODS.items():
        for line, advice in lines.items():
            is_refused(models, line, said(function_in(line)), advice)


def test_arguments_of_flaxs_own(models):
    for line, advice in IN_THE_CALL.items():
        argument = re.search(rf"\b({'|'.join(IN_PLACE)})=", line)[1]
        is_refused(models, line, has_no(function_in(line), argument), advice)


def test_the_variables_as_first_argument(models):
    for line, advice in VARIABLES_FIRST.items():
        is_refused(models, line, f"{function_in(line)}() {TAKES_NONE}", advice)


def test_methods_for_the_code_inside_the_model(models):
    state = models.session._state
    for call in BOUND:
        form = f"%flax_apply {call[:3]}(…)"
        told = f"FlaxMagicsError: {bound(call.partition('(')[0])}\n  form: {form}"
        assert models.fails(f"%flax_apply {call}") == told
    assert models.session._state is state


CHECKED = [
    ("net.apply(variables, x)", apply("net.apply")),
    ("net(variables, x)", f"net() {TAKES_NONE}"),
    ("net(x, rngs={})", has_no("net", "rngs")),
]


def test_a_check(models):
    for call, message in CHECKED:
        out = models.fails(f'%flaxmodel --check "{call}" net')
        assert out == f"FlaxMagicsError: {message}\n  form: %flaxmodel --check 'net(x)' …"


def test_a_cell_is_told_a_line_with_its_options(models):
    models("inputs = 2 * x")
    is_refused(
        models,
        "%%flax_apply --train -o run\ninputs = 3 * x\nnet.apply(variables, inputs, mutable=['batch_stats'])",
        apply("net.apply"),
        "%flax_apply --train -o run --mutable batch_stats net(inputs)",
    )


def test_the_advice_for_variables_runs_with_those(models):
    models("other = jax.tree.map(lambda leaf: leaf + 1, variables)")
    advice = models.fails("%flax_apply -q net(other, x)").partition("write: ")[2].split("\n")
    models(f"y = {advice[1].strip()}")
    assert bits(models["y"]) == bits(jax.jit(models["net"].apply)(models["other"], models["x"]))


def test_a_switch_that_the_call_needs_is_in_the_advice(models):
    models(
        "class Asks(nn.Module):\n  @nn.compact\n  def __call__(self, x, train):\n    return nn.Dense(2)(x)\n"
        "%flaxmodel -q asks = Asks()\nvariables = %flax_init -q asks(x)"
    )
    line = "%flax_apply --eval asks(x)\n%flax_apply --eval --variables variables asks(x)"
    is_refused(models, "%flax_apply asks(variables, x)", f"asks() {TAKES_NONE}", line)


X = jnp.ones((2, 3))
FORM = "\n  form: session.{}('net', …)"


@pytest.fixture(scope="module")
def session():
    session = session_of(nn.Dense(2))
    session.init("net", X)
    return session


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (lambda s: s.init("net", jax.random.key(0), X, method="init"), f"{init('net.init')}{FORM.format('init')}"),
        (lambda s: s.apply("net", {}, X, method="apply"), f"{apply('net.apply')}{FORM.format('apply')}"),
        (
            lambda s: s.apply("net", method="clone"),
            f"{plain('net.clone')}\n  form: session.models['net'].module.clone(…)",
        ),
        (lambda s: s.apply("net", method="unbind"), f"{bound('net.unbind')}{FORM.format('apply')}"),
        (
            lambda s: s.apply("net", s.models["net"].variables, X),
            f"net() {TAKES_NONE}{FORM.format('apply')}\n        session.apply('net', …, variables=…)",
        ),
        (lambda s: s.apply("net", X, rngs={}), f"{has_no('net', 'rngs')}{FORM.format('apply')}"),
    ],
)
def test_a_script_is_told_the_form(session, run, message):
    state = session._state
    with pytest.raises(FlaxMagicsError) as told:
        run(session)
    assert str(told.value) == message
    assert session._state is state
