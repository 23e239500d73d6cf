"""Runs with fixed numbers, made by hand, that the tests of `show` have in common."""

from __future__ import annotations

from typing import Any

import numpy as np
from msgspec.structs import replace

from flax_magics.base.measures import Curve, Evaluation, Memory, Steady, Timing
from flax_magics.rng.keys import RootKey
from flax_magics.run import InitStats, Note, Run, like

DRAW = RootKey.from_seed(0).draw()
BY_HAND = "net.clone(training=True).apply(variables, x, rngs={'dropout': dropout_key})"
MEMORY = Memory(arguments=204, outputs=144, temporaries=1200, code=3400)


def keys(*streams: str) -> dict[str, Any]:
    """The keys of the first draw of seed 0."""
    return {stream: DRAW.stream(stream) for stream in streams}


REUSED = Run(
    command="apply",
    model="net",
    mode="train",
    switch="training=True",
    call="net(x)",
    inputs=((), {}),
    output=np.zeros((3, 4, 3), np.float32),
    seed=0,
    draw=2,
    keys=keys("dropout"),
    used={"dropout": ("Dropout_0",)},
    device="cpu:0",
    program="reused",
    timing=Timing(run=0.00022),
    memory=MEMORY,
    started=0.0,
    cell=3,
    by_hand=BY_HAND,
)
COMPILED = replace(
    REUSED,
    draw=1,
    keys=keys("params", "dropout"),
    program="compiled",
    reason="first run of this program",
    timing=Timing(trace=0.021, lower=0.012, compile=0.377, run=0.00022),
    made=InitStats(15, 60, ("params",)),
)
NOTE = Note(
    "dropout",
    "Dropout_0 is off although --train was asked: deterministic=True is fixed in MyModel (line 8)",
    edit="deterministic=not self.training",
)
NOTED = replace(REUSED, draw=3, used={}, notes=(NOTE,), idle=("dropout",))
INIT = like(
    REUSED,
    command="init",
    mode="",
    switch="",
    draw=1,
    output={"params": np.zeros(15, np.float32)},
    keys=keys("params"),
    used={},
    program="eager",
    timing=Timing(init=0.00052),
    memory=None,
    made=InitStats(15, 60, ("params",)),
    by_hand="net.init(params_key, x)",
)
KEY = replace(
    INIT,
    command="key",
    model=None,
    call="",
    device="",
    draw=3,
    keys=keys("latent"),
    program="",
    timing=Timing(),
    made=None,
)
REPEATED = replace(REUSED, timing=Timing(run=0.0003, steady=Steady((0.0003, *[0.0002, 0.00021, 0.00021, 0.00022] * 5))))
CURVE = Curve(
    losses=np.float32([2.31, 1.7, 1.4, 0.9, 0.23, 0.5]),
    metrics={"accuracy": np.float32([0.125, 0.25, 0.5, 0.75, 0.9375, 0.875])},
    evals=(Evaluation(3, 1.5, {"accuracy": 0.5}), Evaluation(6, 0.6, {"accuracy": 0.8125})),
    total=6,
    epoch=3,
    examples=768,
    seconds=0.0625,
)
TRAINED = like(
    COMPILED,
    command="train",
    call="loss(net, train)",
    output={"params": np.zeros(15, np.float32)},
    draw=3,
    weights="initialised in draw 3",
    trained=CURVE,
    timing=replace(COMPILED.timing, run=0.0625),
)
INTERRUPTED = replace(
    TRAINED,
    trained=replace(CURVE, total=500, epoch=4, stopped="interrupted"),
    notes=(Note("stopped", "interrupted after 6 steps", "%flax_train --resume loss(net, train)"),),
)
UNDER_WAY = replace(TRAINED, trained=replace(CURVE, total=500, epoch=4))
