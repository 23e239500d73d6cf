"""Warm runs in a real kernel, interrupted at random moments: each interrupt is heard, and every draw is made once."""

from __future__ import annotations

SETUP = """
%load_ext flax_magics
import os, random, signal, threading, time
import jax, jax.numpy as jnp, numpy as np, flax.linen as nn
import flax_magics

class Normed(nn.Module):
  @nn.compact
  def __call__(self, x):
    x = nn.BatchNorm(use_running_average=False)(nn.Dense(4)(x))
    return nn.Dropout(0.5, deterministic=False)(x)

net = Normed()
x = jax.random.uniform(jax.random.key(42), (3, 4))
session = flax_magics.session()
%flaxmodel net
%flax_init -q net(x);
variables = session.models['net'].variables
"""

INTERRUPTED = """
moments, turn, sent, heard, lost, got = random.Random(0), -1, 0, 0, 0, []

def interrupt():
  global sent
  for n in range({interrupts}):
    while turn < n:  # no lock of Python's own, which an interrupt can leave taken
      time.sleep(1e-4)
    time.sleep(moments.random() * 2e-3)
    sent += 1
    os.kill(os.getpid(), signal.SIGINT)

threading.Thread(target=interrupt, daemon=True).start()
for n in range({interrupts}):
  after = 0
  try:
    turn = n
    while after < 1000:
      after += sent > n
      y = %flax_apply -q -o run net(x)
      got.append((run.draw, np.asarray(y).tobytes()))
    lost += 1
  except KeyboardInterrupt:
    heard += 1
"""

CHECK = """
y = %flax_apply -q -o run net(x)
got.append((run.draw, np.asarray(y).tobytes()))  # waits for what the last interrupt left on the device
apply = jax.jit(lambda v, x, key: net.apply(v, x, rngs={'dropout': key}, mutable=['batch_stats']))
root, by_hand = jax.random.key(0), {}
for draw in range(1, session.draws + 1):
  root, _, key = jax.random.split(root, 3)
  y, updates = apply(variables, x, key)
  variables, by_hand[draw] = {**variables, **updates}, np.asarray(y).tobytes()
draws = [draw for draw, _ in got]
model = session.models['net']
print(sent, heard, lost)
print(draws == sorted(set(draws)), all(by_hand[draw] == y for draw, y in got))
print([run.draw for run in session.runs if run.command == 'apply'] == list(by_hand))
print(jax.random.key_data(root).tobytes() == session._state.root.data, model.updates['batch_stats'] == len(by_hand))
print(all((one == two).all() for one, two in zip(*map(jax.tree_util.tree_leaves, (variables, model.variables)))))
print(session.programs.unfinished.wait, signal.getsignal(signal.SIGINT) is signal.default_int_handler)
"""


def test_each_interrupt_is_heard_and_no_draw_is_lost_or_made_twice(open_notebook):
    notebook = open_notebook()
    notebook.run_all(
        [SETUP, "for _ in range(3):\n  y = %flax_apply -q -o run net(x)", INTERRUPTED.format(interrupts=1000)]
    )
    checked = notebook.run(CHECK).printed
    assert checked == "1000 1000 0\nTrue True\nTrue\nTrue True\nTrue\nNone True\n"
