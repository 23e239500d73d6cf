"""A kernel that lives through 10,000 runs and 200 edits of a model: a run costs what it did, and memory stays."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

SETUP = """
%load_ext flax_magics
import gc, json, sys, threading
import flax.linen as nn, jax, jax.numpy as jnp
x = jnp.ones((2, 4))

def resident():
  gc.collect()
  with open('/proc/self/statm') as file:
    return int(file.read().split()[1]) * 4096

def counts():
  gc.collect()
  return len(jax.live_arrays()), len(session.programs)

def calls():  # of Python functions: the same number each time, where nothing grows with the number of runs
  made = 0
  def count(frame, event, arg):
    nonlocal made
    made += event == 'call'
  sys.setprofile(count)
  for n in range(64):  # the draws that a program works out at once
    %flax_apply -q net(x)
  sys.setprofile(None)
  return made
"""

MODEL = """
%%flaxmodel
class Net(nn.Module):
  @nn.compact
  def __call__(self, x):
    x = nn.Dense(2)(x)
    return nn.Dropout(0.5, deterministic=False)(x) * {edit}.0

net = Net()
"""

RUNS = """
import flax_magics
session = flax_magics.session()
seen = []
for block in range(10):
  for n in range(1000):
    %flax_apply -q net(x)
  seen.append((resident(), *counts(), calls()))
  for thread in threading.enumerate():  # which compiles that program, after the first thousand
    if thread.name == 'flax_magics compile':
      thread.join()
print(json.dumps([seen, session.draws]))
"""

EDITED = "print(json.dumps((resident(), *counts(), calls())))"


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="resident memory is read as Linux tells it")
def test_ten_thousand_runs_and_two_hundred_edits(start_notebook):
    notebook = start_notebook()
    notebook.run_all([SETUP, MODEL.format(edit=0), "for _ in range(5):\n  %flax_apply -q net(x)"])
    seen, draws = json.loads(notebook.run(RUNS).printed)
    assert draws == 5 + 10_000 + 10 * 64
    resident, arrays, programs, calls = zip(*seen, strict=True)
    assert len(set(arrays)) == len(set(programs)) == len(set(calls[1:])) == 1
    assert resident[-1] - resident[0] < 9_000 * 2_000  # bytes: the history keeps 1,500 of a run

    edited = []
    for edit in range(1, 201):
        notebook.run(MODEL.format(edit=edit))
        notebook.run("%flax_apply -q net(x);")
        if edit in (1, 160, 180, 200):
            edited.append(json.loads(notebook.run(EDITED).printed))
    (_, *first), *full = edited
    resident, arrays, programs, calls = zip(*full, strict=True)
    assert set(programs) == {128}  # as many as are kept
    assert max(arrays) <= first[0]
    assert max(calls) <= first[2]
    assert (
        resident[-1] - resident[0] < 40 * 350_000
    )  # bytes: a program takes 1,400,000, and some hang about for a while
