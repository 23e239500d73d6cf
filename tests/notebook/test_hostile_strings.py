"""Whatever a string says and wherever it stands, it is shown as text: no markup of it, nothing that a terminal obeys."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pytest
from hostile import STRINGS, Markup, hidden

from flax_magics import FlaxMagicsError, Session, _session
from flax_magics.snapshot import format

pytestmark = pytest.mark.alike

SETUP = """\
import flax_magics, optax
import numpy as np
from flax import nnx
from typing import Any
x = jnp.ones((2, 4))

class Net(nn.Module):
  label: str
  parts: dict
  @nn.compact
  def __call__(self, x, how=None):
    s = self.label
    for part in self.parts.values():
      y = part(x)
    y = y + jax.random.normal(self.make_rng(s), y.shape)
    self.variable(s, s, jnp.zeros, ()).value += 1
    self.variable('batch_stats', s, jnp.zeros, ()).value += 1
    self.sow('intermediates', s, y)
    if how is not None and how.startswith('fail'):
      raise ValueError(how)
    return {s: y, 'y': [y]}

class Held(nnx.Module):
  def __init__(self, label, *, rngs):
    self.label, self.parts = label, nnx.data({label: nnx.Linear(4, 2, rngs=rngs)})
  def __call__(self, x, how=None):
    return {self.label: self.parts[self.label](x)}

def loss(net, batch, scale=1.0):
  y = jax.tree_util.tree_leaves(net(*batch.values()))[-1]
  return (y ** 2).mean() * scale, {s: y.mean()}
"""

CELLS = """\
net = Net(s, {{s: nn.Dense(2)}})
Net.__doc__ = Held.__doc__ = loss.__doc__ = s
%flaxmodel net
%flaxmodel held = Held(s)
%flax_apply --eager net(x)
%flax_apply --eager net(x, s)
%flax_apply --eager net(x, how={literal})
%flax_apply --eager --mutable batch_stats net(x)
%flax_apply --eager held(x)
for _ in range(2): get_ipython().run_line_magic('flax_apply', '--eager held(x, s)')
%flax_summary net(x, s)
%flax_summary held(x, s)
%flax_summary net
variables = %flax_vars net
%flax_vars net = {{**variables, s: {{s: x}}}}
%flax_vars net = {{s: variables}}
%flax_vars net = s
net.label = s
%flax_apply net(x, mask=s)
%flax_apply net({{s: x}})
%flax_apply net(x, 'fail' + s)
%flax_apply --variables {{s:s}} net(x)
%flax_apply --mutable {quoted} net(x)
%flax_apply --key {quoted} net(x)
%flax_apply --keys-of {quoted} net(x)
%flax_apply {quoted}
%flax_apply net({quoted}
%flax_apply --{quoted} net(x)
%flax_apply {quoted}(x)
%flax_key {quoted}
%flax_key --seed {quoted}
%flax {quoted}
%flax_history {quoted}
%flax_replay {quoted}
%flax_save '{folder}/'{quoted}
%flax_save {quoted}
%flax_load {quoted}
%flax_export {quoted}
%flax_export --plain
%flaxmodel {quoted}
%flaxmodel net = {quoted}
%flax_grad --freeze {quoted} loss(net, {{s: x}})
%flax_grad loss(net, s)
%flax_grad net(net, {quoted})
%flax_grad loss(net, {{'x': x}})
%flax_grad loss(held, {{{literal}: x}})
%flax_grad --freeze '{quoted}' --freeze "{quoted}/*" loss(held, {{s: x}})
%flax_train --optimizer "optax.sgd(0.1) if {quoted!r} else 0" --steps 2 --eval {{s:x}} loss(held, {{s: x}})
%flax_train --optimizer optax.sgd(0.1) --steps 1 --freeze '{quoted}' loss(held, {{s: x}})
%flax_train --optimizer optax.sgd(0.1) --steps 3 loss(held, {{s: x}}, scale=np.nan)
%flax_train --optimizer optax.sgd(0.1) --steps 3 loss(held, iter([{{s: x}}, s]))
%flax_train --optimizer {quoted} --steps 1 loss(net, {{s: x}})
%flax_train --optimizer s --steps 1 loss(net, {{s: x}})
%flax_train --optimizer optax.sgd(0.1) --steps 1 --freeze {quoted} loss(held, {{s: s}})
%flax
%flax_history
%flax_history --all
%flax_replay last
%flax_key
flax_magics.session().runs[-1]
str(flax_magics.session().runs[-1])
"""


class Shown:
    """All that a shell shows: displays, values, and the messages of our errors."""

    def __init__(self, notebook: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.notebook, self.bundles = notebook, []

        def published(data: Any, **rest: Any) -> None:
            self.bundles.append(dict(data))

        monkeypatch.setattr(notebook.shell.display_pub, "publish", published)
        monkeypatch.setattr(
            notebook.shell.displayhook, "write_format_data", lambda data, *_: self.bundles.append(dict(data))
        )

    def of(self, cell: str) -> Iterator[tuple[str, str]]:
        """(MIME type, text) of what a cell shows."""
        self.bundles.clear()
        result = self.notebook.shell.run_cell(cell, store_history=True)
        self.notebook.read()
        for bundle in self.bundles:
            yield from ((mime, text) for mime, text in bundle.items() if isinstance(text, str))
        error = result.error_before_exec or result.error_in_exec
        if isinstance(error, FlaxMagicsError):  # of others the text is IPython's to show
            yield "text/plain", "\n".join(error._render_traceback_())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("string", STRINGS, ids=range(len(STRINGS)))
def test_no_string_is_more_than_text_wherever_it_stands(notebook, monkeypatch, tmp_path, string):
    monkeypatch.chdir(tmp_path)
    notebook(SETUP)
    shown = Shown(notebook, monkeypatch)
    notebook.shell.user_ns["s"] = string
    wrong = []
    for line in CELLS.splitlines():
        cell = line.format(literal=ascii(string), quoted=string.replace("\n", " "), folder=tmp_path)
        for mime, text in shown.of(cell):
            foreign = Markup(text).foreign if mime == "text/html" else hidden(text) if mime == "text/plain" else None
            if foreign:
                wrong.append((cell, mime, foreign, text))
    assert not wrong


# -- a file with right checksums, whose author is not to be trusted

NETS = """\
import flax_magics, optax
import numpy as np
from flax import nnx
x = jnp.ones((2, 4))

class Net(nn.Module):
  width: int = 2
  @nn.compact
  def __call__(self, x, train=False):
    x = nn.BatchNorm(use_running_average=not train)(nn.Dense(self.width)(x))
    return {'y': nn.Dropout(0.5, deterministic=not train)(x)}

class Held(nnx.Module):
  def __init__(self, *, rngs):
    self.linear, self.dropout = nnx.Linear(4, 2, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)
  def __call__(self, x):
    return {'y': self.dropout(self.linear(x))}

def loss(net, batch):
  y = net(batch['x'])['y']
  return (y ** 2).mean(), {'size': y.mean()}

data = {'x': np.ones((4, 4), np.float32)}
net = Net()
"""
SAVED = """\
%flaxmodel net
%flaxmodel held = Held()
%flax_apply -q --samples 3 --train net(x)
%flax_apply -q held(x)
%flax_key -q latent
%flax_grad -q loss(net, data)
%flax_train -q --optimizer optax.sgd(0.1) --steps 3 --eval data loss(net, data)
%flax_train -q --optimizer optax.adam(0.1) --batch 2 --epochs 2 loss(held, data)
%flax_save whole
"""
LOADED = """\
%flax_load altered
%flax
%flax_history --all
%flax_replay last
%flaxmodel net = Net(3)
%flaxmodel net = Net()
%flaxmodel held = Held()
%flax_train --resume loss(net, data)
%flax_train --resume --optimizer optax.sgd(0.1) --steps 4 loss(net, data)
for run in flax_magics.session().runs: display(run)
flax_magics.session().runs
%flax_load other
"""
LONGER = """\
%flax
%flax_apply --keys-of 1 net(x)
%flax_export --plain
%flax_save other
"""
Place: TypeAlias = tuple[object, ...]
"""Where a text stands in JSON; all entries of a list are one place, and the names of a dict are places, too."""


def altered(value: Any, change: Callable[[Place, str], str], place: Place = ()) -> Any:
    """JSON data with `change(place, text)` for each text."""
    if isinstance(value, dict):
        return {change((*place, "name"), name): altered(one, change, (*place, name)) for name, one in value.items()}
    if isinstance(value, list):
        return [altered(one, change, (*place, 0)) for one in value]
    return change(place, value) if isinstance(value, str) else value


def write_altered(change: Callable[[Place, str], str]) -> None:
    """Writes the file `whole` once more as `altered`, with other texts in its session, its history and its arrays' names."""
    contents = format.read(Path("whole"))
    arrays = {change(("array",), name): array for name, array in contents.arrays.items() if name != "history"}
    runs = altered(json.loads(contents.arrays["history"].tobytes()), change, ("history",))
    runs[0]["mesh"] = altered(MESH, change, ("mesh",))
    history = np.frombuffer(json.dumps(runs).encode(), np.uint8)
    format.write(Path("altered"), altered(contents.document, change), {**arrays, "history": history})


LIES = [{"name": "x", "how": "whole on each", "bytes": 4}]
MESH = {"axes": [["data", 2]], "devices": ["cpu:0", "cpu:1"], "inputs": LIES, "variables": LIES, "output": LIES}


def test_no_string_of_a_file_is_more_than_text(notebook, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for cell in (NETS, *SAVED.splitlines()):
        notebook(cell)
    places: dict[Place, None] = {}
    write_altered(lambda place, text: (places.setdefault(place), text)[1])
    # In one place at a time: the file is refused, in an error that can be shown, or may have any text there.
    free = set()
    for number, place in enumerate(places):
        string, session = STRINGS[number % len(STRINGS)], Session()
        try:
            write_altered(lambda of, text, place=place, string=string: string if of == place else text)
            session.load("altered")
        except FlaxMagicsError as error:
            assert not hidden(str(error)), place
        else:
            free.add(place)
    assert {("models", 0, "text"), ("history", 0, "call"), ("history", 0, "trained", "task", "optimizer")} <= free
    # And each in all of these places; all at once where a cell takes its time.
    shown, wrong = Shown(notebook, monkeypatch), []
    for string in (*STRINGS, "".join(STRINGS)):
        write_altered(lambda place, text, string=string: string if place in free else text)
        head = json.dumps({"__metadata__": {string: string, "flax_magics": string}}).encode()
        Path("other").write_bytes(len(head).to_bytes(8, "little") + head)
        notebook("%unload_ext flax_magics")
        _session._current = None
        notebook("%load_ext flax_magics")
        for cell in (LOADED + LONGER * (string not in STRINGS)).splitlines():
            for mime, text in shown.of(cell):
                foreign = (
                    Markup(text).foreign if mime == "text/html" else hidden(text) if mime == "text/plain" else None
                )
                if foreign:
                    wrong.append((cell, mime, foreign, text))
    assert not wrong
