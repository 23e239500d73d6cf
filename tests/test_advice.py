"""Every advice that a message gives, followed: provoked, read off what was printed, pasted (filled, edited), and run.

A new message needs one `Scenario` in the table below: the file and function that make the message, the cell that provokes
it, the cells before that, and what stands in the gaps of a `form` (`fill`) or how an `edit` is made in the last of the
cells (`edit`). The last test holds the places that were followed against all that the source has: it names each that is
left by file and line.
"""

from __future__ import annotations

import contextlib
import io
import shlex
from collections.abc import Iterator
from typing import Any

import jax
import made
import nbformat
import numpy as np
import pytest
from advice import SITES, Follower, Recorder, Scenario, site_of
from flax import configurations

from flax_magics.base.measures import Limits
from flax_magics.compile import placement
from flax_magics.execution import apply, execute
from flax_magics.line.commands import COMMANDS
from flax_magics.snapshot import format
from flax_magics.training import grad, train
from flax_magics.verify import command, notebooks

NET = """%%flaxmodel net = Net(2)
class Net(nn.Module):
  features: int
  @nn.compact
  def __call__(self, x):
    return nn.Dense(self.features)(x)
"""
CLASS = NET.partition("\n")[2]
EXPLICIT = """from jax.sharding import AxisType, NamedSharding, PartitionSpec
mesh = jax.make_mesh((1,), ('data',), axis_types=(AxisType.Explicit,))
x = jax.device_put(x, NamedSharding(mesh, PartitionSpec('data')))
"""


OTHER_MESH = EXPLICIT.replace("'data',", "'z',").replace("('data')", "('z')").replace("Explicit", "Auto")


def model(call: str, body: str, made: str = "") -> str:
    """The cell of a model whose call takes `x` and what stands in `call`; `made`: what stands after the command."""
    return f"%%flaxmodel{made}\nclass Net(nn.Module):\n  @nn.compact\n  def __call__(self, x{call}):\n    {body}\n"


AS_NET = " net = Net()"
SWITCHED = model(
    ", train", "return nn.Dropout(0.5, deterministic=not train)(nn.BatchNorm(use_running_average=not train)(x))"
)
BLOCK = """class Block(nn.Module):
  @nn.compact
  def __call__(self, x, train=False):
    return nn.Dropout(0.5, deterministic=not train)(x)
"""
FIXED = model(", train=False", "return nn.Dropout(0.5, deterministic=True)(x)")
INNER = FIXED.replace("nn.Dropout(0.5, deterministic=True)", "Block()").replace("\nclass", f"\n{BLOCK}class", 1)
MISTYPED = model("", "return nn.Dropout(0.5, deterministic=False, rng_collection='droppout')(x)")
UNSET = FIXED.replace(", deterministic=True", "")
UNSWITCHED = UNSET.replace(", train=False", "")
KEYED = model(
    ", noise=None, other=None",
    """for key in (noise, other):
      if key is not None:
        x = x + jax.random.uniform(key, x.shape)
    return nn.Dense(2)(x)""",
    AS_NET,
)
UNUSED = model(", noise{}", "return nn.Dense(2)(x)", AS_NET)
DRAWN = model(
    ", {0}=None",
    "x = nn.Dense(2)(x)\n"
    "    return x if {0} is None else x + jax.random.uniform(self.make_rng('noise')) + jax.random.uniform({0})",
    AS_NET,
)
BRANCHES = model("", "return x if x.sum() > 0 else -x")
SCANNED = """%%flaxmodel
class Cell(nn.Module):
  @nn.compact
  def __call__(self, carry, x):
    return nn.Dropout(0.5, deterministic=False)(carry + x), x
class Net(nn.Module):
  @nn.compact
  def __call__(self, x):
    return nn.scan(Cell, split_rngs={'params': False})()(x[0], x)
"""
SCALED = model(", scale", "return x * scale", AS_NET)
INITIALISED = model("", "return nn.Dense(2, kernel_init={})(x)", AS_NET)
LOOP = model(", n", "{}\n    return x", AS_NET)
NNX = """from flax import nnx
class N(nnx.Module):
  def __init__(self, features, rngs):
    self.linear = nnx.Linear(4, features, rngs=rngs)
    self.drop = nnx.Dropout(0.5)
  def __call__(self, x, *, rngs=None):
    return self.drop(self.linear(x), rngs=rngs)
"""
OWN = f"%%flaxmodel\n{NNX}net = N(2, rngs=nnx.Rngs(0))\n"
OWN_CLASS = f"%%flaxmodel\n{NNX}".replace("self, features,", "self,").replace("features,", "2,")
OWN_EDITED = OWN.replace("features, rngs=rngs", "features, kernel_init=nnx.initializers.ones, rngs=rngs")
REFERENCE = """from flax import nnx
new_ref = getattr(jax, 'new_ref', None) or jax.array_ref
class N(nnx.Module):
  def __init__(self):
    self.count = new_ref(jnp.zeros(()))
  def __call__(self, x):
    return x + self.count[...]
net = N()
"""
AGENT = """class Agent:
  net = nn.Dense(2)
agent = Agent()
"""
FLAT = """%%flaxmodel net = Net()
class Net(nn.Module):
  @nn.compact
  def __call__(self, x):
    return nn.Dense(2)(x.reshape(x.shape[0], -1))
"""
FLAT_OWN = """from flax import nnx
class N(nnx.Module):
  def __init__(self, rngs):
    self.linear = nnx.Linear(16, 2, rngs=rngs)
  def __call__(self, x):
    return self.linear(x.reshape(x.shape[0], -1))
own = N(nnx.Rngs(0))
"""
OBJECTS = """%%flaxmodel net = Net()
class Normal:
  def __init__(self, mean):
    self.mean = mean
class Net(nn.Module):
  @nn.compact
  def __call__(self, x):
    return Normal(nn.Dense(2)(x)), "linear"
"""
SESSION = "import flax_magics\nsession = flax_magics.session()"
FLAGS, HIJAX = configurations.config._values, "flax_hijax_variable"
NEW_SESSION = "from flax_magics import _session\n_session._current = None"
INIT = "variables = %flax_init net(x)"
RAN = "%flax_apply -q -o first net(x);"
SAVED = (NET, RAN, "%flax_save -q a", NEW_SESSION)
BATCH = SWITCHED.replace("%%flaxmodel", f"%%flaxmodel{AS_NET}")
BATCH_INIT = "variables = %flax_init net(x, train=False)"
ZEROS = "jax.tree_util.tree_map(jnp.zeros_like, variables)"
KERNEL = "abs(get_ipython().run_line_magic('flax_vars', '-q net')['params']['Dense_0']['kernel']).sum()"
SUM = "def loss(net, x):\n  return net(x).sum()"
DIFFERENCE = "return (net(x) - y[..., :2]).sum()"
OPTAX = "import optax"
TRAIN = "%flax_train --optimizer optax.sgd(0.1)"
OF_IMAGES = "def loss(net, batch):\n  return net(batch['image']).sum()"
LOADER = """import sys, types
class DataLoader:
  multiprocessing_context = None
  def __init__(self, batches, num_workers):
    self.batches, self.num_workers = batches, num_workers
  def __iter__(self):
    return iter([self.batches])
sys.modules['torch.utils.data'] = types.SimpleNamespace(DataLoader=DataLoader)
data = DataLoader(x, num_workers=2)
"""
CHECKPOINT = "def loss(net, x):\n  return jax.checkpoint(lambda x: net(x))(x).sum()"
OWN_BATCH = """%%flaxmodel
from flax import nnx
class Normed(nnx.Module):
  def __init__(self, rngs):
    self.norm = nnx.BatchNorm(4, rngs=rngs)
  def __call__(self, x):
    return self.norm(x)
own = Normed(nnx.Rngs(0))
"""
FORGOTTEN = model(", train=False", "return nn.Dropout(0.5, deterministic=not train)(nn.Dense(2)(x))", AS_NET)
STEP = "params = jax.tree_util.tree_map(lambda leaf: leaf + 1, params)"
DONATED = "for leaf in jax.tree_util.tree_leaves(variables): leaf.delete()"
STEPPED = f"trained = {ZEROS}\n{DONATED}\nvariables = trained"
LOST = "for leaf in jax.tree_util.tree_leaves(nnx.state(net)): leaf.delete()"
STATE = """import flax_magics, dataclasses
session = flax_magics.session()
@dataclasses.dataclass
class State:
  params: dict
state = State(variables['params'])
"""
MOVED = f"state = State({ZEROS}['params'])"
LOSS = """def loss(variables):
  y = {}
  return (y ** 2).sum()
grads = jax.grad(loss)(variables)
"""
ROWS = """def one(row):
  y = {}
  return y
rows = jax.vmap(one)(x)
"""
MADE = """@jax.jit
def make(x):
  variables = {}
  return variables
variables = make(x)
"""
NOISY = """@jax.jit
def noisy(x):
  key = {}
  return x + jax.random.uniform(key, x.shape)
noisy = noisy(x)
"""
OWN_LOSS = """def loss(net):
  y = {}
  return (y ** 2).sum()
grads = nnx.grad(loss)(net)
"""
BUILT = """@nnx.jit
def make():
  state = {}
  return state
state = make()
"""
TWIN = f"{SESSION}\nsession.models['net'].variables = "
FAKE_PIP = """from IPython.core.magic import register_line_magic
@register_line_magic
def pip(line):
  assert line == 'install -U flax_magics'
  from flax_magics.snapshot import format
  format.VERSION += 1
"""
UPGRADED = "from flax_magics.snapshot import format\nformat.VERSION -= 1"


def verify(line: str) -> str:
    """What the command line prints of a notebook that ran on another machine and gives other bits on this one."""
    elsewhere = {**made.HERE, "processor": "another"}
    nbformat.write(made.notebook(made.cell(made.run(**elsewhere))), "a b.ipynb")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        command.main(shlex.split(line)[3:])
    return printed.getvalue()


async def ran_here(*_: Any) -> tuple[Any, int, None]:
    """In the place of a kernel: what the notebook gives here, one ulp off."""
    values = np.nextafter(made.VALUES, np.float32(9))
    return made.notebook(made.cell(made.run(digest="f" * 16, **made.sample(values)))), 1, None


def install(line: str) -> str:
    """In the place of a shell: what was missing is there."""
    assert shlex.split(line) == ["pip", "install", "flax_magics[verify]"]
    notebooks._NEEDED = ("nbclient",)
    return verify(VERIFY)


VERIFY = "python -m flax_magics verify 'a b.ipynb'"


def put(old: str, new: str = "{}", gap: str = "…") -> Any:
    """An edit that puts the advice in the place of `old`; `gap` stands for its gaps."""
    return lambda cell, advice: cell.replace(old, new.replace("{}", advice.replace("…", gap)))


def summed(cell: str, advice: str) -> str:
    """The cell of `SUM` with its function as it is advised."""
    return f"{advice.replace('… ', 'return ')}.sum()"


def outside(function: str) -> Any:
    """Pastes the last line of the advice into a function that JAX traces, and those before it outside."""

    def cell(advice: str) -> str:
        *before, last = advice.splitlines()
        return "\n".join([*before, function.replace("{}", last)])

    return cell


def traced(function: str, command: str, cells: Any, fill: Any = (), *, check: str, mended: str = "") -> Scenario:
    """A command in a function that JAX traces. `mended` is the function around what is advised, where it is another."""
    cell, use = function.replace("{}", command), outside(mended or function)
    return Scenario(TRACED, cell, cells, fill, use=use, check=check)


def made_of_hijax(monkeypatch: pytest.MonkeyPatch) -> None:
    """In this test, modules are made of Variables of hijax until the flag is changed."""
    monkeypatch.setitem(FLAGS, HIJAX, True)


def only_in_with(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has `jax.set_mesh(mesh)` by itself set nothing, which other tests would meet."""
    original = jax.set_mesh

    @contextlib.contextmanager
    def set_mesh(mesh: Any) -> Iterator[None]:
        with original(mesh):
            yield

    monkeypatch.setattr(jax, "set_mesh", set_mesh)


def in_two_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """One device stands for two: arrays that are not on the mesh already have to be cut into so many parts."""

    def laid_out(leaf: Any) -> bool:
        return isinstance(getattr(leaf, "sharding", None), jax.sharding.NamedSharding)

    def holds(self: Any, leaf: Any) -> bool:
        return laid_out(leaf) and leaf.sharding.mesh == self.mesh

    monkeypatch.setattr(placement.Placement, "parts", 2)
    monkeypatch.setattr(placement.Placement, "holds", holds)
    monkeypatch.setattr(placement, "_is_laid_out", laid_out)
    for module in (apply, grad, train):
        monkeypatch.setattr(module, "in_force", lambda placement: placement)


COLLECTIONS, OF_NNX = "state.weights.check_collections", "state.weights.check_state"
ALIVE, OTHERS = "state.weights.check_alive", "state.weights._note"
RUN_CELL, UNKNOWN = "notebook.run_cell.run_statements_with_call", "notebook.command._unknown"
IDIOM, TRACED = "execution.call._error", "execution.surroundings._error"
PARAMS, KEYS, PROGRAMS = "execution.notes.of_params", "execution.notes.of_keys", "compile.reasons.of_programs"
SAMPLES = "execution.notes.of_samples"

SCENARIOS = [
    # -- the line and its call
    Scenario("line.call.parse_call", "%flax_apply --eager", (NET,), ("net(x)",)),
    Scenario("line.call._statement", "%flax_apply net(x); net(x + 1)", (NET,)),
    Scenario("line.call._statement", "%flax_apply y = net(x)", (NET,), check="y.shape == (3, 4, 2)"),
    Scenario("line.call._statement", "%flax_apply for i in x: pass", (NET,), ("net(x)",)),
    Scenario("line.call.parse_call", "%flax_apply net", (NET,), ("x",)),
    Scenario("line.call.parse_call", "%flax_apply --eager net(x) + 1", (NET,), check="y.shape == (3, 4, 2)"),
    Scenario("line.call._no_name", "%flax_apply net(x).sum()", (NET,)),
    Scenario("line.call._no_name", "%flax_apply Net(2)(x)", (CLASS,), check="net.features == 2"),
    Scenario("line.call.parse_assignment", "%flaxmodel -q", (), ("net = nn.Dense(2)",), check="net.features == 2"),
    Scenario("line.call.parse_assignment", "%flaxmodel a = nn.Dense(1); b = nn.Dense(2)", check="b.features == 2"),
    Scenario("line.call._bad_name", "%flaxmodel net := nn.Dense(2)", check="net.features == 2"),
    Scenario("line.call._bad_name", "%flaxmodel net =", (), ("nn.Dense(2)",), check="net.features == 2"),
    Scenario("line.call._bad_name", "%flaxmodel my-net = nn.Dense(2)", check="my_net.features == 2"),
    Scenario("line.call._no_assignment", "%flaxmodel nn.Dense(2)", check="dense.features == 2"),
    Scenario("line.call._no_assignment", "%flaxmodel a, b = nn.Dense(1), nn.Dense(2)", check="b.features == 2"),
    Scenario("line.call._no_assignment", "%flaxmodel a = b = nn.Dense(2)", check="b.features == 2"),
    Scenario(RUN_CELL, "%%flax_apply\n# nothing", (NET,), ("y = net(x)",), check="y.ndim"),
    Scenario(RUN_CELL, "%%flax_apply\nz = x\nz", (NET,), ("z = x", "net(z)"), check="y.ndim"),
    Scenario(RUN_CELL, "%%flax_apply\nz = x\ny = %flax_apply -q net(z)", (NET,), ("z = x",)),
    Scenario("notebook.command.read_body", "%%flax_apply --eager net(x)\ny = 1", (NET,)),
    # -- its options
    Scenario("line.options.read", "%flax_apply --eager=yes net(x)", (NET,)),
    Scenario("line.options._wants", "%flax_apply --mutable net(x)", (NET,), ("params",)),
    Scenario("line.options._wants", "%flax_apply --repeat 0 net(x)", (NET,)),
    Scenario("line.options._wants", "%flax_apply --variables net(x)", (NET, INIT), ("variables",)),
    Scenario("line.options.read", "%flax_apply eager repeat 2 net(x)", (NET,)),
    Scenario("line.options._unknown", "%flax_apply --eagr net(x)", (NET,)),
    Scenario("line.options._unknown", "%flax_apply --draws 2 net(x)", (NET,)),
    Scenario("line.options._after_the_call", "%flax_apply net(x) --eager", (NET,)),
    Scenario("line.options.file_name", "%flax_save -q", (NET,), ("a.safetensors",)),
    Scenario("notebook.command.draw_of", "%flax_apply --keys-of frst net(x)", (NET, RAN)),
    Scenario("notebook.command.draw_of", "%flax_replay x", (NET, RAN)),
    Scenario("notebook.command.replay_of", "%flax_replay last", (NET,), ("net(x)",), again=True),
    Scenario("state.state.check_draw", "%flax_replay 9", (NET, RAN)),
    # -- which model
    Scenario(UNKNOWN, "%flax_vars net", (f"{NNX}net = N(2, rngs=nnx.Rngs(0))",), again=True),
    Scenario("notebook.command._part_called", "%flax_apply -q agent.net(x)", (AGENT,), check="net.features == 2"),
    Scenario("notebook.command._part_called", "%flax_apply -q self.net(x)", ("net = nn.Dense(2)",)),
    Scenario("notebook.command._check_call", "%flax_init x", (NET,)),
    Scenario("notebook.command._unknown", "%flax_apply model(x);", (NET,)),
    Scenario("notebook.notebook.note_of_unbound", "%flax_apply net(x);", (NET, RAN, "del net"), again=True),
    Scenario("state.models._set_aside", "net = Net(3)\n%flax_apply net(x);",
             (NET, f"{INIT}\n%flax_vars net = jax.tree.map(jnp.zeros_like, variables)"), ("net = Net(2)",)),
    Scenario(UNKNOWN, "%flax_apply Net(x)", (CLASS,), ("2",), check="net.features == 2"),
    Scenario(UNKNOWN, "%flax_apply --eager jnp.sum(net(x) + 1)", (NET,), check="y.shape == (3, 4, 2)"),
    Scenario(UNKNOWN, "%flax_apply model(x)", (), ("nn.Dense(2)",), again=True),
    Scenario(UNKNOWN, "%flax_apply net(x)", (*SAVED, "del net", "%flax_load -q a"), again=True),
    Scenario(UNKNOWN, "%flax_apply net(x)", (*SAVED, "Other = Net\ndel net, Net", "%flax_load -q a"), ("Other(2)",),
             again=True),
    Scenario("state.handles.entry_of", f"{SESSION}\nsession.apply('net', x)", (), ("nn.Dense(2)",), again=True),
    Scenario("state.handles.entry_of", f"{SESSION}\nsession.apply(nn.Dense(2), x)", (), ("nn.Dense(2)",)),
    Scenario("notebook.model_cell.from_line", "%flaxmodel net = Net", (CLASS,), ("2",), check="net.features == 2"),
    Scenario("notebook.model_cell.from_line", "%flaxmodel nett", ("net = nn.Dense(2)\nNet = nn.Dense",)),
    Scenario("notebook.model_cell.from_cell", "%%flaxmodel nett\nnet = nn.Dense(2)", (), ("net = nn.Dense(2)",)),
    Scenario("notebook.model_cell.from_cell", "%%flaxmodel\na = 1", ("net = nn.Dense(2)",), ("net",)),
    Scenario("notebook.model_cell._from_defaults", f"%%flaxmodel\n{CLASS}", (), ("2",), use=f"{{}}\n{CLASS}"),
    Scenario("models.construction.adopt", f"{SESSION}\nsession.register('net', Net)", (CLASS,), ("2",)),
    Scenario("models.construction.adopt", "%flaxmodel net",
             ("net = nn.Dense(2)\nnet = net.bind(net.init(jax.random.key(0), x))",),
             edit=lambda cell, advice: f"{cell}\n{advice}"),
    Scenario("models.nnx_layout.of", "%flaxmodel net", (REFERENCE,),
             edit=put("self.count = new_ref(jnp.zeros(()))", gap="jnp.zeros(())")),
    Scenario("models.nnx.sample", "%flaxmodel net", (f"{NNX}net = nnx.eval_shape(lambda: N(2, nnx.Rngs(0)))",),
             ("net", "nnx.state(N(2, nnx.Rngs(0)))"), again=True),
    # -- runs
    Scenario("execution.call.check_arguments", "%flax_apply -q Net(x)", (SWITCHED,)),
    Scenario("execution.call.check_arguments", "%flax_summary --depth 1 Net(x)", (SWITCHED,)),
    Scenario("execution.call.check_arguments", f"{SESSION}\nsession.apply('net', x, draws=2)", (NET,), ("x",)),
    Scenario("execution.call.check_arguments", f"{SESSION}\nsession.init('net', x, draw=1)", (NET, RAN), ("x",)),
    Scenario("notebook.hints._of_unset", "%flax_apply net(x)", ("%flaxmodel net = nn.Dropout(0.5)",)),
    Scenario("notebook.hints._of_unset", "%flax_apply --train Net(x)", (UNSET,), edit=put("return nn.Dropout(0.5)(x)")),
    Scenario("notebook.hints._of_unset", "%flax_apply --train Net(x)", (UNSWITCHED,), edit=lambda cell, advice: cell.replace(
        "def __call__(self, x):\n    return nn.Dropout(0.5)(x)", advice.replace("\n", "\n    ", 1))),
    Scenario("notebook.hints.hints", "%flax_apply Net(x)", (BRANCHES,)),
    Scenario("notebook.hints._of_shapes", "%flax_apply --eager net(x[0] * 2)", (FLAT, RAN)),
    Scenario("notebook.hints._of_shapes", "%flax_apply own(x[0])", (FLAT_OWN, "%flax_apply own(x);")),
    Scenario("notebook.hints._of_first_run", "%flax_apply own(x[0])", (FLAT_OWN,)),
    Scenario("execution.execute._foreign", "%flax_apply --train --roofline net(x)", (OBJECTS,)),
    Scenario("execution.execute._foreign", "%flax_apply --samples 2 --eager net(x)", (OBJECTS,)),
    Scenario("execution.build.rebuild", "%flax_init net(x)", (OWN,), ("2",), again=True),
    Scenario("execution.execute.held_variables", "%flax_apply --key params net(x)", (DRAWN.format("params"),)),
    Scenario("execution.execute._check_keys", "%flax_apply --key noise net(x)", (DRAWN.format("noise"),)),
    Scenario("execution.execute._kept_out", "%flax_apply Net(x)", (SCANNED,),
             edit=put("split_rngs={'params': False}", gap="'params': False")),
    Scenario("execution.execute.execute", "%flax_apply --roofline --repeat 2 --eager net(x)", (NET,),
             patch=lambda m: m.setattr(execute, "limits", lambda *_: Limits("cpu:0", "float32", 1e9, 1e9))),
    Scenario("execution.execute._check_samples", "%flax_apply --samples 2 net(x, rngs=nnx.Rngs(5))", (OWN,)),
    # -- weights
    Scenario("line.call.parse_variables", "%flax_vars net.variables['params']", (NET, INIT)),
    Scenario("notebook.magics.flax_vars", "%flax_vars net", (NET,), ("x",), again=True),
    Scenario(COLLECTIONS, f"{TWIN}[1]", (NET, INIT), ("variables['params']",)),
    Scenario(COLLECTIONS, "%flax_vars net = state", (NET, INIT, STATE, MOVED), check=f"{KERNEL} == 0"),
    Scenario(COLLECTIONS, "%flax_vars net = state | {}", (BATCH, BATCH_INIT, "state = variables['params']")),
    Scenario(COLLECTIONS, f"{TWIN}variables['params']", (NET, INIT), ("variables['params']",)),
    Scenario(COLLECTIONS, "%flax_vars net = variables['params']", (NET, INIT)),
    Scenario(COLLECTIONS, "%flax_apply --eager --variables [1] net(x)", (NET, INIT), ("variables['params']",)),
    Scenario("state.weights.check_fit", "%flax_vars net = {'params': variables['params']}", (BATCH, BATCH_INIT)),
    Scenario("state.weights.check_fit", "%flax_vars net = a or b",
             (BATCH, BATCH_INIT, "a, b = {}, {'params': variables['params']}")),
    Scenario(OF_NNX, f"{TWIN}[1]", (OWN,), ("net",)),
    Scenario(OF_NNX, "%flax_vars net = net", (OWN,)),
    Scenario(OF_NNX, "%flax_apply --train --variables net net(x, rngs=nnx.Rngs(1))", (OWN,), ("net",)),
    Scenario(ALIVE, "%flax_apply net(x)", (NET, INIT, DONATED), again=True),
    Scenario(ALIVE, "%flax_apply net(x)", (NET, INIT, STEPPED), again=True, check=f"{KERNEL} == 0"),
    Scenario(ALIVE, "%flax_vars net", (NET, INIT, DONATED), ("x",), again=True),
    Scenario(ALIVE, "%flax_apply net(x)", (OWN, LOST), after=OWN, again=True),
    Scenario(ALIVE, "%flax_apply --eval net(x, train=False)", (BATCH, BATCH_INIT, DONATED), again=True),
    Scenario(OTHERS, "%flax_apply net(x);", (NET, INIT, f"variables = {ZEROS}"), check=f"{KERNEL} == 0"),
    Scenario(OTHERS, "%flax_apply net(x);", (NET, INIT, STATE, MOVED), check=f"{KERNEL} == 0"),
    Scenario(OTHERS, "%flax_apply --eval net(x);", (BATCH, BATCH_INIT, "params = variables['params']\n%flax", STEP)),
    Scenario(OTHERS, "%flax_apply net(x);",
             (NET, INIT, "params = variables['params']\n%flax", f"variables = {ZEROS}\nparams = variables['params']"),
             ("variables",), again=True),
    Scenario("state.models.replaced_by_init", INIT, (NET, INIT, f"%flax_vars net = {ZEROS}"), check=f"{KERNEL} == 0"),
    Scenario("models.nnx_graph.raw", "%flaxmodel net", (f"{NNX}import flax\nnet = N(2, rngs=nnx.Rngs(0))",),
             after="net = N(2, rngs=nnx.Rngs(0))", again=True, patch=made_of_hijax)
    if HIJAX in FLAGS
    else None,
    Scenario("summary.summary.of_variables", "%flax_summary net", (NET,), ("x",)),
    Scenario("summary.view.tree_bundle", "%flax_summary --tree net(x)", (NET,), ("x",), again=True),
    # -- Flax's own words
    Scenario("execution.call._of_method", "%flax_apply net.sow('intermediates', 'h', x)", (NET,), ("x",)),
    Scenario(IDIOM, f"{SESSION}\nsession.apply('net', x, rngs={{}})", (NET,), ("x",)),
    Scenario(IDIOM, "%flaxmodel --check 'net(x, rngs={})' net", (NET,), ("net",)),
    Scenario(IDIOM, "variables = %flax_init net.init(jax.random.key(0), x)", (NET,)),
    Scenario(IDIOM, "%flax_apply Net(x, mutable=True)", (FIXED,)),
    Scenario(IDIOM, "%flax_init Net.clone(name='other')", (FIXED,)),
    # -- in a function that JAX traces
    traced(LOSS, "%flax_apply -q net(x)", (NET, INIT), check="grads['params']['Dense_0']['bias'].any()"),
    traced(LOSS, "%flax_apply -q --train Net(x)", (SWITCHED, "variables = %flax_init Net(x)"),
           mended=LOSS.replace("y =", "y, updates ="), check="grads['params']['BatchNorm_0']['bias'].any()"),
    traced(ROWS, "%flax_apply -q net(row)", (NET,), ("x",), check="rows.shape == (3, 4, 2)"),
    traced(MADE, "%flax_init -q net(x)", (NET,), check="variables['params']['Dense_0']['bias'].shape == (2,)"),
    Scenario(TRACED, NOISY.replace("{}", "%flax_key noise"),
             use=lambda advice: f"{advice}\n{NOISY.replace('{}', 'noise_key')}", check="(noisy != x).all()"),
    traced(OWN_LOSS, "%flax_apply -q --train net(x)", (OWN,), check="grads.linear.bias[...].any()"),
    traced(BUILT, "%flax_init -q net(x)",
           (OWN.replace("\nnet = N(2, rngs=nnx.Rngs(0))", "\n").replace("%%flaxmodel", "%%flaxmodel net = N(2)"),),
           mended=BUILT.replace("state = {}", "{}\n  state = nnx.state(net)"), check="state.linear.bias.shape == (2,)"),
    Scenario(TRACED, "@jax.jit\ndef step(v):\n  %flax_vars net = v\n  return v\nvariables = step(variables)",
             (NET, INIT), ("variables",)),
    traced(MADE, "%flax_init -q Net(x)", (FIXED,), check="variables == {}"),
    traced(MADE, "%flax_apply -q --train N(x)", (OWN_CLASS,), check="variables.shape == (3, 4, 2)"),
    # -- sharp bits
    Scenario("execution.notes.with_notes_of_output", "%flax_apply net(x)",
             (INITIALISED.format("jax.nn.initializers.ones").replace("(x)\n", "(x - x) / 0\n"),),
             stops="FloatingPointError"),
    Scenario("execution.notes._wrong_mode", "%flax_apply --train Net(x)", (FIXED,), edit=put("deterministic=True")),
    Scenario("execution.notes._wrong_mode", "%flax_apply --train Net(x)", (INNER,), edit=put("Block()(x)")),
    Scenario("execution.notes.of_streams", "%flax_apply Net(x);", (MISTYPED,),
             edit=lambda cell, advice: cell.replace(*reversed(advice.split(" for ")))),
    *(
        Scenario(PARAMS, "%flax_init net(x);", (INITIALISED.format(zero),), edit=put(f"kernel_init={zero}"))
        for zero in ("jax.nn.initializers.constant(jnp.nan)", "jax.nn.initializers.zeros")
    ),
    Scenario("execution.notes.of_scalars", "%flax_apply net(x, 2.0);", (SCALED, "%flax_apply net(x, jnp.float32(2));")),
    Scenario("execution.notes.of_unused", "%flax_apply net(x, noise=jax.random.key(5));", (UNUSED.format("=None"),)),
    Scenario("execution.notes.of_unused", "%flax_apply net(x, jax.random.key(5));", (UNUSED.format(""),),
             edit=put("(x)\n", "(x + {})\n", "x.shape")),
    Scenario("execution.notes.of_mutable", "%flax_apply --eval --mutable batchstats Net(x);", (SWITCHED,)),
    Scenario("execution.execute._of_explicit_axes", "with jax.set_mesh(mesh):\n  y = %flax_apply net(x)",
             ("%flaxmodel net = nn.Dropout(0.5, deterministic=False)", EXPLICIT), patch=only_in_with, again=True),
    Scenario(SAMPLES, "%flax_apply --eval --samples 2 Net(x);", (SWITCHED,)),
    Scenario(SAMPLES, "%flax_apply --samples 2 net(x);", (NET,)),
    Scenario(SAMPLES, "%flax_apply --samples 2 Net(x);", (FIXED.replace(", train=False", ""),),
             edit=lambda cell, advice: cell.replace("x)", "x, train=False)", 1).replace(
                 "deterministic=True", advice.splitlines()[-1])),
    Scenario(KEYS, "%flax_apply net(x, key, key);", (KEYED, "key = jax.random.key(5)")),
    Scenario(KEYS, "%flax_apply net(x, key);", (KEYED, f"{SESSION}\nkey = session.root_key")),
    Scenario(KEYS, "%flax_apply net(x, key);", (KEYED, "key = jax.random.key(5)\n%flax_apply net(x, key);")),
    Scenario("execution.notes.outdated_own", "%flax_apply net(x);", (OWN, OWN_EDITED), after=OWN_EDITED, again=True),
    Scenario(PROGRAMS, "%flax_apply net(x[:1]);", (NET, RAN, "%flax_apply -q net(x[:2]);")),
    Scenario(PROGRAMS, "%flax_apply net(x);", (NET, "for n in (1, 2):\n  %flax_apply -q net(x[:n]);"), ("5",)),
    Scenario(PROGRAMS, "%flax_apply net(x[0, 0]);", (NET, RAN, "%flax_apply -q net(x[0, :1]);"), ("(1, 4)",)),
    Scenario(PROGRAMS, "for n in (1, 2, 3):\n  %flax_apply net(x, n);",
             (LOOP.format("for _ in range(n):\n      x = x + 1"),),
             edit=lambda cell, advice: LOOP.format("x = jax.lax.fori_loop(0, n, lambda _, y: y + 1, x)")),
    # -- losses
    Scenario("line.call._no_name", "%flax_grad (lambda net, x: net(x).sum())(net, x)", (NET,)),
    Scenario("notebook.command.resolve_loss", "%flax_grad loss(x, net)", (NET, SUM), ("x",)),
    Scenario("notebook.command.resolve_loss", "%flax_grad loss(net, x)", (NET, SUM, RAN, "del net"), again=True),
    Scenario("notebook.command.evaluated", "%flax_train --optimizer sgd(0.1) --steps 2 loss(net, x)", (NET, SUM)),
    Scenario("notebook.command.evaluated", "%flax_train --optimizer adam --steps 2 loss(net, x);", (NET, SUM)),
    Scenario("line.options._unknown", "%flax_train --lr 1e-2 --steps 2 loss(net, x);", (NET, SUM, OPTAX)),
    Scenario("line.call._no_name", "%flax_grad jax.grad(loss)(net, x)", (NET, SUM)),
    Scenario("training.loss.check", "%flax_grad taken(net, x)", (NET, SUM, "import jax\ntaken = jax.grad(loss)")),
    Scenario("training.loss.check", "%flax_grad net(x)", (NET,), ("loss = net(batch).sum()",)),
    Scenario("training.loss.check", "%flax_grad x(net)", (NET,), ("loss = net(batch).sum()",),
             after="%flax_grad loss(net, x)"),
    Scenario("training.loss.check", "%flax_grad loss(net, x)", (NET, f"{SUM}\nloss = jax.jit(loss)")),
    Scenario("training.loss.check", "%flax_grad loss(net, x)",
             ("from flax import nnx\nnet, other = nnx.Linear(4, 2, rngs=nnx.Rngs(0)), nnx.Linear(4, 2, rngs=nnx.Rngs(1))",
              "def loss(net, x):\n  return (net(x) - other(x)).sum()"), ("return (net(batch) - other(batch)).sum()",)),
    Scenario("training.loss.read", "%flax_grad loss(net, x)", (NET, "def loss(net, x):\n  return net(x)"),
             edit=put("return net(x)", gap="net(x)")),
    Scenario("training.loss.read", "%flax_grad loss(net, x)", (NET, "def loss(net, x):\n  net(x)\n  return 1"),
             ("loss = net(batch).sum(); accuracy = loss",), after="%flax_grad loss(net, x)"),
    Scenario("training.loss.read", "%flax_grad loss(net, x)", (NET, "def loss(net, x):\n  return net(x).sum(), 1"),
             edit=lambda cell, advice: "labels = 0\ndef loss(net, x):\n  logits = net(x)\n  loss = logits.sum()\n  "
                                       f"{advice}"),
    Scenario("training.nets.init", "%flax_grad loss(net, x)", (NET, CHECKPOINT), ("x",), again=True),
    Scenario("training.loss.transformed", "%flax_grad loss(own, x)", (OWN_BATCH, CHECKPOINT),
             edit=lambda cell, advice: cell.replace("jax.checkpoint(lambda x: net(x))(x)",
                                                    advice.replace("(…)", "(type(net).__call__)(net, x)"))),
    Scenario("execution.notes._wrong_mode", "%flax_grad loss(net, x)", (FORGOTTEN, SUM), edit=summed),
    Scenario("training.mistakes._of_call", "%flax_grad loss(Net, x)", (SWITCHED, SUM), edit=summed),
    Scenario("training.mistakes._of_call", "%flax_grad loss(net, x)",
             (NET, SUM.replace("(net, ", "(params, ").replace("net(", "net.apply({'params': params}, ")), edit=summed),
    Scenario("training.mistakes.without_net", "%flax_grad loss(net, x)",
             (NET, INIT, f"other = net\n{SUM.replace(' net(', ' other.apply(variables, ')}"),
             edit=put("other.apply(variables, x)")),
    Scenario("training.mistakes._of_rows", f"{TRAIN} --steps 2 --batch 2 loss(net, x, x)",
             (NET, OPTAX, f"def loss(net, x, y):\n  {DIFFERENCE}"), (DIFFERENCE,)),
    Scenario("training.grad.of_freeze", "%flax_grad --freeze Dense_0/bia loss(net, x)", (NET, SUM)),
    # -- a mesh
    Scenario("line.options.mesh_axes", "%flax_mesh data"),
    Scenario("line.options.mesh_axes", "%flax_mesh of"),
    Scenario("line.options.mesh_axes", "%flax_mesh data=1,data=1"),
    Scenario("line.options.check_axes", "%flax_mesh data=0"),
    Scenario("line.options.check_axes", "%flax_mesh data=-1,model=-1"),
    Scenario("compile.placement.of_devices", "%flax_mesh data=64"),
    Scenario("compile.placement._undivided", "%flax_apply net(x)", (NET, "%flax_mesh data=1"), patch=in_two_parts),
    Scenario("compile.placement._of_other_devices", "%flax_apply net(x)", (NET, OTHER_MESH, "%flax_mesh data=1"),
             patch=in_two_parts),
    Scenario("training.data.check_divides", f"{TRAIN} --steps 2 loss(net, x[:1])",
             (NET, SUM, OPTAX, "%flax_mesh data=1"), patch=in_two_parts),
    Scenario("training.data.check_divides", f"{TRAIN} --steps 2 loss(net, x)", (NET, SUM, OPTAX, "%flax_mesh data=1"),
             patch=in_two_parts),
    # -- trainings
    Scenario("training.train.train", f"{TRAIN.replace('0.1', '1e9')} --steps 9 loss(net, x)",
             (NET, SUM.replace("net(x)", "(net(x) ** 4)"), OPTAX), check=f"{KERNEL} < 99"),
    Scenario("training.train.train_model", f"{TRAIN} --steps 2 loss(net)", (NET, SUM, OPTAX), ("x",)),
    Scenario("training.data.check_looks", f"{TRAIN} --steps 2 --eval iter([x]) loss(net, x)", (NET, SUM, OPTAX),
             use="{}\nassert len(batch_list) == 1"),
    Scenario("training.train.prepare", "%flax_train --resume --steps 2 loss(net, x)",
             (NET, SUM, OPTAX, f"{TRAIN} --steps 4 loss(net, x);")),
    Scenario("training.train._finish", f"{TRAIN} --steps 9 loss(net, data)",
             (NET, SUM, OPTAX, "data = iter([x, x])"), ("[x, x]",)),
    Scenario("training.train._finish", "%flax_train --resume loss(net, x)",
             (NET, SUM, OPTAX, f"{TRAIN} --steps 2 loss(net, x);")),
    Scenario("training.resumption.resumed_of", "%flax_train --resume loss(net, x)", (NET, SUM, OPTAX),
             ("optax.sgd(0.1)", "2")),
    Scenario("training.resumption.completed", f"{TRAIN} --steps 2 --epochs 2 loss(net, x)", (NET, SUM, OPTAX)),
    Scenario("training.resumption.completed", f"{TRAIN} loss(net, x)", (NET, SUM, OPTAX)),
    Scenario("training.resumption.completed", "%flax_train --steps 2 loss(net, x)", (NET, SUM)),
    Scenario("training.resumption.completed", "%flax_train --optimizer 0.1 --steps 2 loss(net, x)", (NET, SUM, OPTAX),
             ("1e-3",)),
    Scenario("training.resumption.completed", "%flax_train --optimizer optax.adam --steps 2 loss(net, x)", (NET, SUM, OPTAX),
             ("1e-3",)),
    Scenario("training.resumption.completed", "%flax_train --optimizer 'optax.adam(0.1)' --steps 2 loss(net, x)",
             (NET, SUM, OPTAX)),
    Scenario("training.resumption._other", "%flax_train --resume --batch 3 --steps 4 loss(net, x)",
             (NET, SUM, OPTAX, f"{TRAIN} --batch 2 --steps 2 loss(net, x);")),
    Scenario("training.resumption.fitted_state", "%flax_train --resume --steps 4 --optimizer optax.adam(0.1) loss(net, x)",
             (NET, SUM, OPTAX, f"{TRAIN} --steps 2 loss(net, x)")),
    Scenario("history.replay._check_step", "%flax_replay --step 2 1", (NET, SUM, OPTAX, f"{TRAIN} --steps 2 loss(net, x)")),
    Scenario("history.replay._check_step", "%flax_replay --step 0 1", (NET, RAN)),
    Scenario("training.data.check", f"{TRAIN} --steps 2 loss(net, data)", (NET, OF_IMAGES, OPTAX, "data = 3"),
             ("x", "x"), again=True),
    Scenario("training.data.check", f"{TRAIN} --steps 2 --batch 2 loss(net, data)", (NET, SUM, OPTAX, "data = [x, x]")),
    Scenario("training.data.check", f"{TRAIN} --steps 2 loss(net, data)", (NET, SUM, OPTAX, LOADER),
             edit=put("DataLoader(x, num_workers=2)", gap="x")),
    Scenario("training.data.dry", f"{TRAIN} --steps 3 loss(net, data)", (NET, SUM, OPTAX, "data = iter([x, x])"),
             ("[x, x]",), again=True),
    # -- keys, files, history
    Scenario("notebook.command.takes_nothing", "%flax nothing"),
    Scenario("doctor.findings.note", "%flax_doctor", ("key = jax.random.PRNGKey(0)",), again=True),
    Scenario("doctor.findings._notes", "%flax_free",
             (NET, "z = jnp.ones((100_000, 4))\n%flax_apply -q net(z);\ndel z"), again=True),
    Scenario("notebook.magics.flax_key", "%flax_key --seed 3 --fresh two words", (SESSION,), check="session.seed == 3"),
    Scenario("notebook.magics.flax_key", "%flax_key --fresh", (NET, RAN)),
    Scenario("notebook.magics._check_seed", "%config FlaxMagics.seed = 9", (NET, RAN), again=True),
    Scenario("_session.run_key", "key = %flax_key s.key"),
    Scenario("notebook.status.restarted", "%flax_key --seed 0", (NET, RAN)),
    Scenario("notebook.magics.flax_save", "%flax_save --autosave off b", (NET, RAN)),
    Scenario("base.files.checked_target", "%flax_save none/a", (NET, RAN), again=True),
    Scenario("snapshot.save._not_replaced", "%flax_save --autosave a", SAVED, after="%flax_save --autosave off"),
    Scenario("snapshot.save.autosave_failed", "%flax_init net(x);\nsession.autosaving.flush()\n%flax",
             (NET, SESSION, "%flax_save -q --autosave a", "import os\nos.remove('a')\nos.mkdir('a')"),
             after="%flax_init net(x);\n%flax"),
    Scenario("snapshot.save._replaceable", "%flax_save a.py",
             (NET, RAN, "import pathlib; mine = pathlib.Path('a.py'); mine.write_text('x = 1');"),
             check="mine.read_text() == 'x = 1'", after="%flax_load a.safetensors"),
    Scenario("snapshot.save._replaceable", "%flax_save --autosave a.pkl", (NET, RAN), after="%flax_save --autosave off"),
    Scenario("snapshot.format._metadata_in", "%flax_load a.safetensors",
             ("import safetensors.numpy, numpy as np\nsafetensors.numpy.save_file({'a': np.ones(2)}, 'a.safetensors')",
              "del safetensors"), check="arrays['a'].tolist() == [1, 1]"),
    Scenario("snapshot.format._json_in", "%flax_load a", (NET, RAN, "%flax_save -q a", FAKE_PIP, UPGRADED), again=True),
    Scenario("history.replay._check", "%flax_replay 1", (*SAVED, "del net, first", NET, "%flax_load -q a"), ("x",)),
    Scenario("history.replay._check", "%flax_replay 1",
             (NET, "%config FlaxMagics.replay_bytes = 0", RAN + "\ndel first"),
             after="%flax_apply -q net(x);\n%flax_replay 2"),
    Scenario("history.replay.notice_of", "%flax_replay 1", (NET, f"{SESSION}\nsession.apply('net', x)\nNone"),
             ("net(x)",), after="%flax_replay run"),
    Scenario("notebook.magics.flax_export", "%flax_export --cell a.py", (NET, RAN)),
    Scenario("line.options._unknown", "%flax_export --file a.py", (NET, RAN)),
    Scenario("notebook.magics.flax_history", "%flax_history 3", (NET, RAN)),
    Scenario("export.__init__.write", "%flax_export a.txt", (NET, RAN)),
    Scenario("export.__init__._check", "%flax_export a.py",
             (NET, RAN, "with open('a.py', 'w') as file:\n  file.write('mine')"), again=True),
    # -- the command line
    Scenario("snapshot.save.loaded_text", "%flax_load a",
             (NET + 24 * "\n    # A model of many lines.", RAN, "%flax_save -q a", NEW_SESSION)),
    Scenario("verify.command.text", lambda: verify(VERIFY), paste=verify,
             patch=lambda m: m.setattr(command, "executed", ran_here)),
    Scenario("verify.notebooks.check_installed", lambda: verify(VERIFY), paste=install,
             patch=lambda m: [m.setattr(command, "executed", ran_here),
                              m.setattr(notebooks, "_NEEDED", ("no_such_package",))]),
]  # fmt: skip
SCENARIOS = [scenario for scenario in SCENARIOS if scenario is not None]
IDS = [f"{n} {scenario.place}" for n, scenario in enumerate(SCENARIOS)]

_ran: set[str] = set()
_followed: set[str] = set()


@pytest.mark.parametrize("scenario", SCENARIOS, ids=IDS)
def test_advice_is_followed_as_it_is_printed(scenario, request, notebook, caplog, monkeypatch, tmp_path):
    _ran.add(request.node.callspec.id)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(format, "VERSION", format.VERSION)
    if scenario.patch is not None:
        scenario.patch(monkeypatch)
    follower = Follower(notebook, caplog, Recorder(monkeypatch))
    _followed.add(str(site_of(*follower.follow(scenario))))


@pytest.mark.parametrize("name", COMMANDS)
def test_the_examples_in_a_commands_help_run_in_their_order(name, request, notebook, monkeypatch, tmp_path):
    _ran.add(request.node.callspec.id)
    monkeypatch.chdir(tmp_path)
    known = COMMANDS[name]
    for cell in (NET, RAN, "%flax_save -q session.safetensors"):
        notebook(cell)
    shown = notebook(f"{name.replace('%%', '%')} --help")
    for example in known.examples:
        assert all(f"  {line}" in shown.splitlines() for line in example.splitlines())
        notebook(example)
    [site] = [site for site in SITES if site.file == "line/commands.py" and site.says == repr(name)]
    _followed.add(str(site))


def test_every_place_that_makes_advice_was_followed():
    expected = {*IDS, *COMMANDS}
    if not expected <= _ran:
        pytest.skip(f"only {len(_ran)} of the {len(expected)} tests before this one were run")
    here = [site for site in SITES if site.file != "models/nnx_graph.py" or HIJAX in FLAGS]
    left = [str(site) for site in here if str(site) not in _followed]
    assert left == [], "no scenario has followed:\n" + "\n".join(left)
