"""Sessions of any commands in any order, failures and interrupts among them: what holds after each step holds always.

Which keys a model is handed is read off the model: it gives those that its own `make_rng` returns, and a loss tells them as
metrics. They are held against Flax's own, made from the seed by the rule in the README.
"""

from __future__ import annotations

import contextlib
import re
import signal
import sys
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from by_hand import bits, keys_of
from exporting import digests_of, printed
from flax import linen as nn
from flax import nnx
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from interrupts import interrupted_after, press

from flax_magics import _session
from flax_magics.models import base

SESSIONS, STEPS = 40, 250
"""10,000 steps in 115 s of one processor: most are runs of some ms; an edit or a first run takes some tens."""
FEW = 5
MANY = 1000
"""`--hypothesis-profile many` asks for all of these steps, others each time, and runs what each session exports; without it
a few are tried, the same ones."""

SETUP = """\
import jax, optax, flax.linen as nn, numpy as np
import jax.numpy as jnp
from flax import nnx
x = np.arange(8, dtype=np.float32).reshape(2, 4) / 8
wrong = np.ones((2, 5), np.float32)
def halves(key):
    return {f'k{2 * i + j}': (word >> 16 * j) & 0xFFFF for i, word in enumerate(key) for j in range(2)}
def loss(net, batch):
    y, key = net(batch)
    return (y ** 2).mean(), halves(key)
def fails(net, batch):
    return net(batch)[0] + net(batch)[1]
"""

LINEN = """\
%%flaxmodel
class Net(nn.Module):
    training: bool = False
    width = WIDTH
    @nn.compact
    def __call__(self, x, z=None, fail=None):
        first = self.variable('received', 'params', lambda: jax.random.key_data(self.make_rng('params')))
        key = self.make_rng('dropout')
        counted = self.variable('batch_stats', 'count', jnp.zeros, ())
        if self.training and not self.is_initializing():
            counted.value += 1
        kernel = self.param('kernel', nn.initializers.normal(), (4, WIDTH))
        y = (x @ kernel) * jax.random.bernoulli(key, 0.5, (WIDTH,)) * SCALE
        if fail == 'trace':
            raise ValueError('on purpose')
        if fail == 'run':
            y = jax.pure_callback(lambda y: 1 / 0, y, y)
        return y, jax.random.key_data(key if z is None else z)

net = Net()
"""
NNX = """\
%%flaxmodel nnet = Nnet()
class Nnet(nnx.Module):
    width = WIDTH
    def __init__(self, *, rngs):
        self.received = nnx.Cache(jax.random.key_data(rngs.params()))
        self.kernel = nnx.Param(jax.random.normal(rngs.params(), (4, WIDTH)))
        self.count = nnx.BatchStat(jnp.zeros(()))
        self.dropout = rngs.dropout  # a stream of `params` would be no more the init's alone, for which loops have no lines
    def __call__(self, x, fail=None):
        key = self.dropout()
        self.count[...] = self.count[...] + 1
        y = (x @ self.kernel[...]) * jax.random.bernoulli(key, 0.5, (WIDTH,)) * SCALE
        if fail == 'trace':
            raise ValueError('on purpose')
        return y, jax.random.key_data(key)
"""
SOURCES = {"net": LINEN, "nnet": NNX}
EDITS = [(3, 1.0), (3, 2.0), (2, 1.0)]
"""(width, scale): variables stay after an edit of the scale, and are dropped after one of the width."""

FAILURES = {
    "a shape": "%flax_apply {name}(wrong)",
    "an init of a shape": "%flax_init net(wrong)",
    "a name": "%flax_apply nett(x)",
    "an argument": "%flax_apply {name}(x, mask=x)",
    "an option": "%flax_apply --trian {name}(x)",
    "no draw": "%flax_apply --keys-of 99999 {name}(x)",
    "an error of the model": "%flax_apply {name}(x, fail='trace')",
    "an error of the model, eager": "%flax_apply --eager {name}(x, fail='trace')",
    "an error of its run": "%flax_apply net(x, fail='run')",
    "a name that is none": "%flax_key not a name",
    "a replay of nothing": "%flax_replay 99999",
    "no file": "%flax_load nowhere.safetensors",
    "no session": "%flax_load pyproject.toml",
    "a folder that is none": "%flax_save nowhere/s.safetensors",
    "variables": "%flax_vars {name} = {{'params': {{'kernel': x}}}}",
    "a cell that fails at its end": "{source}\n1 / 0",
    "a model that cannot be built": "%flaxmodel other = Nnet(width=3)",
    "a loss that fails": "%flax_grad fails({name}, x)",
    "a training that fails": "%flax_train --optimizer optax.sgd(0.1) --steps 2 fails({name}, x)",
    "a training of what is not finite": "%flax_train --optimizer optax.sgd(0.1) --steps 2 loss({name}, x * np.nan)",
    "a traced function": "jax.jit(lambda x: get_ipython().run_line_magic('flax_apply', '{name}(x)'))(x)",
}


class Receives(nn.Module):
    """Gives what plain Flax hands to a model."""

    @nn.compact
    def __call__(self, stream: str) -> Any:
        return jax.random.key_data(self.make_rng(stream))


@partial(jax.jit, static_argnums=(0, 1))
def received(name: str, stream: str, key: Any) -> Any:
    """The data of the first key that plain Flax gives a model, in a call with `key` for that stream."""
    if name == "net":
        return Receives().apply({}, stream, rngs={stream: key})
    rngs = nnx.Rngs(**{stream: key})
    if stream != "params":  # a module that was built before
        nnx.reseed(rngs, policy="match_shape", **{stream: key})
    return jax.random.key_data(rngs[stream]())


_split = jax.jit(lambda root: jax.random.split(root, 3))
_folded = jax.jit(jax.random.fold_in)


@cache
def root_of(seed: int, draws: int) -> Any:
    """The root key once so many draws were made, by the notebook's own line."""
    return _split(root_of(seed, draws - 1))[0] if draws else jax.random.key(seed)


@cache
def by_rule(seed: int, draw: int, stream: str, step: int | None, name: str) -> bytes:
    """The key data that a model is to be handed in a draw; without a name, the stream's own key."""
    _, params, dropout = _split(root_of(seed, draw - 1))
    key = params if stream == "params" else dropout
    if step is not None:
        key = _folded(key, step)
    return np.asarray(received(name, stream, key) if name else jax.random.key_data(key)).tobytes()


def data(key: Any) -> bytes:
    return np.asarray(jax.random.key_data(key)).tobytes()


class Handed(NamedTuple):
    """A key that somebody was handed: which draw's, which stream's, of a training which step's."""

    seed: int
    draw: int
    stream: str
    step: int | None = None


class Saved(NamedTuple):
    """What was true when a session was saved into a file."""

    path: Path
    seen: Any
    handed: set[Handed]
    widths: dict[str, int]
    repeated: set[str]


names = st.sampled_from(["net", "nnet"])
interrupts = st.integers(0, 9).flatmap(lambda pick: st.none() if pick else st.integers(0, 400) | st.integers(0, 4000))
"""After how many of the package's lines a command is interrupted, in about one of ten."""


class AnySession(RuleBasedStateMachine):
    """One session and the commands that are given to it."""

    def __init__(self, notebook: Any, folder: Path, finished: Callable[[AnySession], None]) -> None:
        super().__init__()
        self.notebook, self.folder, self.finished = notebook, folder, finished
        self.cells: list[str] = []
        self.handed: set[Handed] = set()
        """Those that no other run may be handed."""
        self.replayable: dict[tuple[int, int], bytes | None] = {}
        """Draws that can be replayed, with what the model was handed."""
        self.params: dict[str, bytes | None] = {"net": None, "nnet": None}
        """With what each model's variables were initialised, as it says itself."""
        self.saved: list[Saved] = []
        self.repeated: set[str] = set()
        """Models whose last training began with a seed that was restarted since: its further steps' keys may come twice."""
        self.kept: dict[str, int] = {}
        """Models whose variables are held under a name of the notebook, with their width."""
        self.runs = 0
        """How many runs there were after the last cell."""
        self.loaded = 0
        """How many of the session's runs came from a file."""
        if "flax_magics" in notebook.shell.extension_manager.loaded:
            notebook("%unload_ext flax_magics")
        _session._current = None
        history = notebook.shell.history_manager
        history.input_hist_raw[:], history.input_hist_parsed[:], notebook.shell.execution_count = [""], [""], 1
        notebook("%load_ext flax_magics")
        notebook(SETUP)

    # -- looking

    @property
    def session(self) -> Any:
        return self.notebook.session

    def seen(self) -> Any:
        """Whatever of the session a command may change, down to the bits."""
        session = self.session
        if session is None:
            return None
        models = {
            name: (model.module, dict(model.updates), bits(model.variables)) for name, model in session.models.items()
        }
        return session.seed, session.draws, data(session.root_key), len(session), models

    def handed_at_init(self, name: str) -> bytes | None:
        """The key data that initialised a model's variables; None where there are none."""
        model = self.session.models.get(name)
        if model is None or model.variables is None:
            return None
        if name == "nnet":
            return np.asarray(model.module.received[...]).tobytes()
        return np.asarray(model.variables["received"]["params"]).tobytes()

    def widths(self) -> dict[str, int]:
        """The width of each registered model."""
        return {name: model.module.width for name, model in self.session.models.items()}

    # -- doing

    def run(self, cell: str, interrupted: int | None = None) -> bool:
        """Runs a cell; whether it succeeded. An interrupt comes after so many lines of the package."""
        self.cells.append(cell if interrupted is None else f"{cell}    # interrupted after {interrupted} lines")
        with contextlib.ExitStack() as stack:
            if interrupted is not None:
                stack.enter_context(interrupted_after(interrupted, press))
            result = None
            result = self.notebook.shell.run_cell(cell, store_history=True)
        self.shown = self.notebook.read()
        if self.session is not None:  # digests, while the outputs are there
            new = [run.digest for run in self.session.last(max(len(self.session) - self.runs, 0))]
            assert None not in new
            self.runs = len(self.session)
        assert not base._REPLACING._is_owned()
        # What IPython calls around a cell is interrupted like anything else, which it prints; nothing else happens there.
        for told in self.shown.split("Error in callback")[1:]:
            assert re.findall(r"^-{70,}\n(\w+)", told, re.MULTILINE)[:1] == ["KeyboardInterrupt"], self.shown
            assert "During handling" not in told, self.shown
        self.error = KeyboardInterrupt() if result is None else result.error_before_exec or result.error_in_exec
        return self.error is None

    def draw(self, cell: str, interrupted: int | None, draws: int = 1, *, opens: bool = False) -> bool:
        """Runs a cell that makes draws. Where it is interrupted, all of them are made, or nothing is changed."""
        before, state = self.seen(), self.session._state
        if self.run(cell, interrupted):
            return True
        assert isinstance(self.error, KeyboardInterrupt), (cell, self.error)
        assert interrupted is not None
        if self.session._state is state:
            assert self.seen() == before
        else:
            self.committed(draws, opens=opens)
        return False

    def committed(self, draws: int, *, opens: bool = False) -> None:
        """Takes in that the session has drawn although the command was interrupted; an init leaves a draw open."""
        session = self.session
        for number in range(session.draws - draws + 1, session.draws + 1):
            self.handed |= {
                Handed(session.seed, number, stream) for stream in ("params", *([] if opens else ["dropout"]))
            }
        for name in self.params:
            self.params[name] = self.handed_at_init(name)

    def took(self, name: str, stream: str, data: bytes, draw: int | None = None) -> None:
        """Checks a key that a model was handed: that of this draw, and of no other run."""
        draw = self.session.draws if draw is None else draw
        self.took_as(Handed(self.session.seed, draw, stream), name, data)

    def took_as(self, handed: Handed, name: str, data: bytes) -> None:
        """Checks a key that a model was handed, which nobody else was."""
        assert data == by_rule(*handed, name)
        assert handed not in self.handed
        self.handed.add(handed)

    def initialised(self, name: str, draw: int | None = None, *, always: bool = False) -> None:
        """Checks the key of an init, if there was one."""
        data = self.handed_at_init(name)
        assert data is not None
        if always or data != self.params[name]:
            self.took(name, "params", data, draw)
        self.params[name] = data

    def unchanged(self, cell: str, interrupted: int | None = None) -> bool:
        """Runs a cell that changes nothing, whether it succeeds or fails."""
        before, state = self.seen(), self.session and self.session._state
        succeeded = self.run(cell, interrupted)
        assert self.seen() == before
        assert (self.session and self.session._state) is state
        return succeeded

    # -- the commands

    @initialize()
    def begin(self) -> None:
        for name in self.params:
            self.register(name, EDITS[0], None)

    @rule(name=names, edit=st.sampled_from(EDITS), interrupted=interrupts)
    def register(self, name: str, edit: tuple[int, float], interrupted: int | None) -> None:
        width, scale = edit
        cell = SOURCES[name].replace("WIDTH", str(width)).replace("SCALE", str(scale))
        draws = 0 if self.session is None else self.session.draws
        if not self.run(cell, interrupted):
            assert interrupted is not None
            if self.session is not None and self.session.draws > draws:
                self.committed(self.session.draws - draws, opens=True)
            return
        assert self.session.models[name].module.width == width
        assert self.session.draws - draws in ((0, 1) if name == "nnet" else (0,))
        if self.session.draws > draws:
            self.initialised(name, always=True)
        self.params[name] = self.handed_at_init(name)

    @rule(name=names, interrupted=interrupts)
    def init(self, name: str, interrupted: int | None) -> None:
        if self.draw(f"%flax_init -q {name}(x);", interrupted, opens=True):
            self.initialised(name, always=True)

    @rule(
        name=names,
        mode=st.sampled_from(["", "--train", "--eval"]),
        how=st.sampled_from(["", "", "-q", "--eager", "--repeat 2"]),
        rows=st.integers(1, 2),
        interrupted=interrupts,
    )
    def apply(self, name: str, mode: str, how: str, rows: int, interrupted: int | None) -> None:
        if name == "nnet":
            mode = ""
        if self.draw(f"y = %flax_apply {mode} {how} {name}(x[:{rows}])", interrupted):
            self.initialised(name)
            key = np.asarray(self.notebook["y"][1]).tobytes()
            self.took(name, "dropout", key)
            self.replayable[self.session.seed, self.session.draws] = key

    @rule(name=names, times=st.integers(2, 4))
    def apply_in_a_loop(self, name: str, times: int) -> None:
        if self.draw(f"ys = []\nfor _ in range({times}):\n  y = %flax_apply {name}(x)\n  ys.append(y)", None):
            last = self.session.draws
            self.initialised(name, last - times + 1)
            for draw, (_, key) in enumerate(self.notebook["ys"], last - times + 1):
                self.took(name, "dropout", np.asarray(key).tobytes(), draw)
                self.replayable[self.session.seed, draw] = np.asarray(key).tobytes()

    @rule(name=names, samples=st.integers(2, 3), interrupted=interrupts)
    def samples(self, name: str, samples: int, interrupted: int | None) -> None:
        if self.draw(f"ys = %flax_apply --samples {samples} {name}(x)", interrupted, samples):
            first = self.session.draws - samples + 1
            self.initialised(name, first)
            for draw, key in enumerate(np.asarray(self.notebook["ys"][1]), first):
                self.took(name, "dropout", key.tobytes(), draw)

    @rule(interrupted=interrupts)
    def key_as_an_argument(self, interrupted: int | None) -> None:
        if self.draw("y = %flax_apply --key z net(x)", interrupted):
            self.initialised("net")
            z = np.asarray(self.notebook["y"][1]).tobytes()
            assert z == data(keys_of(self.session.draws, self.session.seed)("z")["z"])
            self.handed |= {Handed(self.session.seed, self.session.draws, "dropout")}

    @rule(stream=st.sampled_from(["params", "dropout"]), interrupted=interrupts)
    def key(self, stream: str, interrupted: int | None) -> None:
        if self.draw(f"key = %flax_key {stream}", interrupted):
            self.took("", stream, data(self.notebook["key"]))
            self.replayable[self.session.seed, self.session.draws] = None

    @rule(seed=st.integers(0, 3), fresh=st.booleans())
    def seed(self, seed: int, fresh: bool) -> None:
        assert self.run(f"%flax_key --seed {seed}{' --fresh' if fresh else ''}")
        assert (self.session.seed, self.session.draws) == (seed, 0)
        # What a seed gave before, it gives again.
        trainings = {name: self.session.training_of(name) for name in self.params}
        self.repeated |= {name for name, training in trainings.items() if training and training.draw.seed == seed}
        self.handed = {handed for handed in self.handed if handed.seed != seed}
        self.replayable = {place: key for place, key in self.replayable.items() if place[0] != seed}
        self.params = {name: self.handed_at_init(name) for name in self.params}

    @rule(name=names, interrupted=interrupts)
    def grad(self, name: str, interrupted: int | None) -> None:
        if self.draw(f"gradients = %flax_grad loss({name}, x)", interrupted):
            self.initialised(name)
            key = whole(self.notebook["gradients"].metrics)[0].tobytes()
            self.took(name, "dropout", key)
            self.replayable[self.session.seed, self.session.draws] = None

    @rule(name=names, steps=st.integers(1, 4), interrupted=interrupts)
    def train(self, name: str, steps: int, interrupted: int | None) -> None:
        self.training(f"%flax_train --optimizer optax.sgd(0.1) --steps {steps} loss({name}, x)", name, 0, interrupted)

    @rule(name=names, more=st.integers(0, 2), interrupted=interrupts)
    def resume(self, name: str, more: int, interrupted: int | None) -> None:
        training = self.session.training_of(name)
        if training is None:
            self.unchanged(f"%flax_train --resume loss({name}, x)")
            assert self.error is not None
            return
        steps = len(training.curve.losses)
        cell = f"%flax_train --resume --optimizer optax.sgd(0.1) --steps {steps + more} loss({name}, x)"
        self.training(cell, name, steps, interrupted, training)

    def training(self, cell: str, name: str, begun: int, interrupted: int | None, training: Any = None) -> None:
        """Runs a training, and checks the keys of all steps that are finished."""
        before, state, draws = self.seen(), self.session._state, self.session.draws
        succeeded = self.run(f"run = {cell}", interrupted)
        assert succeeded or interrupted is not None, self.error
        if self.session._state is state:
            assert self.seen() == before
            return
        if training is None:
            run = self.session.runs[-1]
            self.repeated.discard(name)
            self.initialised(name)
        else:  # the run takes the place of the earlier one
            assert self.session.draws == draws
            began = training.draw.seed, training.draw.number, name
            run = next(
                run for run in reversed(self.session.runs) if run.trained and (run.seed, run.draw, run.model) == began
            )
        for step, key in enumerate(whole(run.metrics)):
            handed = Handed(run.seed, run.draw, "dropout", step)
            if name in self.repeated:
                assert key.tobytes() == by_rule(*handed, name)
            elif step >= begun:
                self.took_as(handed, name, key.tobytes())
        if name not in self.repeated:
            self.handed.add(Handed(run.seed, run.draw, "dropout"))

    @rule(pick=st.integers(0, 100))
    def replay(self, pick: int) -> None:
        if not self.replayable:
            return
        places = list(self.replayable)
        seed, draw = places[-1 - pick % min(len(places), 20)]
        assert self.unchanged(f"run = %flax_replay {seed}:{draw}"), self.error
        run, key = self.notebook["run"], self.replayable[seed, draw]
        assert run.agreement.identical
        if key is not None:
            assert np.asarray(run.output[1]).tobytes() == key

    @rule(name=names, failure=st.sampled_from(sorted(FAILURES)), interrupted=interrupts)
    def fail(self, name: str, failure: str, interrupted: int | None) -> None:
        source = SOURCES[name].replace("WIDTH", "1").replace("SCALE", "7.0")
        if failure == "variables" and name == "net" and self.session._state.models[name].last_init is None:
            return  # nobody knows yet what its variables are
        assert not self.unchanged(FAILURES[failure].format(name=name, source=source), interrupted)

    @rule(interrupted=interrupts)
    def save(self, interrupted: int | None) -> None:
        path = self.folder / f"{id(self)}-{len(self.cells)}.safetensors"
        succeeded = self.unchanged(f"%flax_save '{path}'", interrupted)
        assert path.exists() or not succeeded
        if path.exists():  # whole, whenever an interrupt came
            self.saved.append(Saved(path, self.seen(), set(self.handed), self.widths(), set(self.repeated)))

    @rule(pick=st.integers(0, 100), interrupted=interrupts)
    def load(self, pick: int, interrupted: int | None) -> None:
        if not self.saved or pick > 25:  # each load ends what an export can tell
            return
        saved = self.saved[-1 - pick % min(len(self.saved), 3)]
        before, state = self.seen(), self.session._state
        if saved.widths != self.widths() and state.models["net"].last_init is None:
            return  # nobody knows what fits: a loss made those in the file, and here nothing is made yet
        self.run(f"%flax_load '{saved.path}'", interrupted)
        if self.session._state is state:
            assert self.seen() == before
            assert isinstance(self.error, KeyboardInterrupt) or saved.widths != self.widths(), self.error
            return
        assert saved.widths == self.widths()
        *ledger, models = self.seen()
        assert ledger == list(saved.seen[:-1])
        assert {name: model[2] for name, model in models.items()} == {
            name: model[2] for name, model in saved.seen[-1].items()
        }
        self.loaded = len(self.session)
        self.handed, self.repeated, self.replayable = set(saved.handed), set(saved.repeated), {}
        self.params = {name: self.handed_at_init(name) for name in self.params}

    @rule()
    def load_the_extension_again(self) -> None:
        assert self.unchanged("%unload_ext flax_magics")
        assert not self.unchanged("%flax_apply net(x)")
        assert self.unchanged("%load_ext flax_magics")

    @rule(name=names)
    def keep_variables(self, name: str) -> None:
        module, there = self.notebook[name], self.handed_at_init(name) is not None
        # After an interrupt of the model's cell the name may stand for a module that the next command registers.
        if name == "nnet":
            assert module is self.session.models[name].module
        succeeded = self.unchanged(f"kept_{name} = %flax_vars {name}")
        assert succeeded == (there and module.width == self.widths()[name])
        if succeeded:
            self.kept[name] = module.width

    @rule(name=names, interrupted=interrupts)
    def set_variables(self, name: str, interrupted: int | None) -> None:
        if name not in self.kept:
            return
        before, state, width = self.seen(), self.session._state, self.notebook[name].width
        self.run(f"%flax_vars {name} = kept_{name}", interrupted)
        if self.session._state is state:
            assert self.seen() == before
            assert isinstance(self.error, KeyboardInterrupt) or self.kept[name] != width, self.error
        else:
            assert self.kept[name] == width
        self.params[name] = self.handed_at_init(name)

    @rule(command=st.sampled_from(["%flax", "%flax_history", "%flax_key", "%flax_summary net(x)"]))
    def look(self, command: str) -> None:
        assert self.unchanged(command), self.error

    # A place for `%flax_mesh`: `%flax_mesh data=-1` and `%flax_mesh off` change no key and no bit of a mask.

    @invariant()
    def the_root_is_the_rules(self) -> None:
        if self.session is not None:
            assert data(self.session.root_key) == data(root_of(self.session.seed, self.session.draws))

    def teardown(self) -> None:
        self.notebook.read()
        if sys.exc_info()[0] is not None:
            print("\n----\n".join(self.cells), self.shown, sep="\n====\n")
        else:
            self.finished(self)


LIMITS = (
    "its value is a report of %flax_replay|the history of its run is gone: %flax_load brought another"
    "|built the module anew|its variables come from a line that is left out"
)
"""What is left out with these reasons is said, and no mistake."""


def exported(ended: AnySession) -> None:
    """The script of a session prints the digests of the runs that are in it, in order but for those of trainings."""
    script, runs = ended.session.export(), ended.session.runs[ended.loaded :]
    digests = digests_of(printed(str(script.text), ended.folder))
    # A training that was resumed is printed where it ended, and stands where it began.
    trained = {run.digest for run in runs if run.trained is not None}
    told = [digest for digest in digests if digest not in trained]
    expected = [run.digest for run in runs if run.trained is None]
    if script.unexported:
        assert not [reason for reason in script.unexported if not re.search(LIMITS, reason)], script.text
        rest = iter(expected)
        assert all(digest in rest for digest in told), (expected, told, script.text)
    else:
        assert told == expected, script.text
        assert trained <= set(digests), script.text


def whole(metrics: Any) -> np.ndarray[Any, Any]:
    """The key data that a loss told in halves, which a float32 holds exactly: a row for each step."""
    low0, high0, low1, high1 = (np.atleast_1d(np.asarray(metrics[f"k{i}"])).astype(np.uint32) for i in range(4))
    return np.stack([low0 | high0 << 16, low1 | high1 << 16], -1)


def sessions_of(notebook: Any, folder: Path, sessions: int, steps: int, ended: Callable[[AnySession], object]) -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background has none
    try:
        run_state_machine_as_test(
            lambda: AnySession(notebook, folder, ended),
            settings=settings(
                max_examples=sessions,
                stateful_step_count=steps,
                derandomize=sessions == FEW,  # the same sessions each time
                phases=[Phase.generate],  # a session that fails is printed: to make it shorter takes minutes
                suppress_health_check=list(HealthCheck),
            ),
        )
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.alike
def test_whatever_is_done_in_whatever_order(notebook, tmp_path):
    if settings().max_examples >= MANY:
        sessions_of(notebook, tmp_path, SESSIONS, STEPS, exported)
    else:
        sessions_of(notebook, tmp_path, FEW, 40, exported)
